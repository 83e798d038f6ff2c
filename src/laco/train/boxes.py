"""Where in a picture of the world is what a question asks about: for methods that learn where to look."""

from laco.methods.glimpse_prune import Box
from laco.world.questions import Question
from laco.world.scene import BAR_PITCH, BAR_WIDTH, SIDE, UNIT, Scene

Pixels = tuple[int, int, int, int]  # x, y, width, height


def boxes_about(scene: Scene, question: Question) -> list[Box]:
    """Boxes around what must be seen to answer, in fractions of the picture's sides.

    That is the text or the bar in question (all bars, where they are compared), the shape in question with the one that
    is the answer, and all shapes, where they are counted.
    """
    word, number = scene.texts
    said = {part.strip("?") for part in question.question.split()}
    match question.family:
        case "word":
            pixels = list(word.boxes)
        case "number":
            pixels = list(number.boxes)
        case "chart":
            pixels = bars(scene, said)
        case "count":
            pixels = [(shape.x, shape.y, shape.size, shape.size) for shape in scene.shapes]
        case _:
            said |= {question.answer} if question.family == "relation" else set()
            asked = [shape for shape in scene.shapes if {shape.kind, shape.colour} & said]
            pixels = [(shape.x, shape.y, shape.size, shape.size) for shape in asked]
    return [(x / SIDE, y / SIDE, min((x + w) / SIDE, 1.0), min((y + h) / SIDE, 1.0)) for x, y, w, h in pixels]


def bars(scene: Scene, said: set[str]) -> list[Pixels]:
    """Those whose colour is named; all, if none is."""
    chart = scene.chart
    assert chart is not None
    base = chart.y + chart.height - 2
    found = [
        (colour, (chart.x + 2 + index * BAR_PITCH, base - value * UNIT, BAR_WIDTH, value * UNIT))
        for index, (colour, value) in enumerate(zip(chart.colours, chart.values, strict=True))
    ]
    return [box for colour, box in found if colour in said or not said & set(chart.colours)]
