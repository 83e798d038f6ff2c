"""The plot of accuracy against time, as PNG for papers and as SVG that takes its colours from the page around it."""

from collections.abc import Mapping, Sequence
from io import BytesIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from laco.report.data import Row

# Colours by what they mean; in the SVG each becomes a CSS variable, so they follow the reader's colour scheme.
COLOURS = {
    "ink": "#1c2430",
    "muted": "#5d6878",
    "grid": "#dfe4ea",
    "inside": "#0b6e5f",
    "external": "#b4560f",
    "none": "#31383f",
}
PLACES = {"none": "uncompressed", "external": "after the encoder", "inside": "inside, after 1/4 of the layers"}


def accuracy_against_time(rows: Sequence[Row], size: tuple[float, float]) -> Figure:
    """Accuracy after healing over the time to the first word, a point a variant; size in inches."""
    narrow = size[0] < 5
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 10, "axes.edgecolor": COLOURS["muted"]}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        timed = [(row, row.answer_ms) for row in rows if row.answer_ms is not None]
        for row, x in timed:
            colour = COLOURS[row.place]
            axes.errorbar(
                x,
                row.average,
                yerr=[[row.average - row.low], [row.high - row.average]],
                color=colour,
                marker="o",
                markersize=7,
                markerfacecolor=colour if row.healed else "none",
                elinewidth=1.2,
                linestyle="none",
            )
        most = max((x for _, x in timed), default=1.0)
        top = max((row.high for row, _ in timed), default=100.0)
        axes.set_xlim(0, most * (1.4 if narrow else 1.25))
        axes.set_ylim(0, min(100, top * 1.12))
        label_points(axes, timed, gap=axes.get_ylim()[1] * 0.19 / size[1], narrow=narrow)
        axes.set_xlabel("milliseconds to the first word, per picture", color=COLOURS["muted"])
        axes.set_ylabel("accuracy, % (mean of families)", color=COLOURS["muted"])
        axes.tick_params(colors=COLOURS["muted"], length=0)
        axes.grid(color=COLOURS["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        places = [place for place in PLACES if any(row.place == place for row, _ in timed)]
        handles = [handle(place, PLACES[place]) for place in places]
        if any(not row.healed for row, _ in timed):
            handles += [handle("none", "hollow: not trained", fill="none")]
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=1 if narrow else len(handles),
            frameon=False,
            labelcolor=COLOURS["muted"],
            handletextpad=0.2,
        )
    return figure


def handle(place: str, text: str, fill: str | None = None) -> Line2D:
    """A line of the legend."""
    colour = COLOURS[place]
    return Line2D([], [], color=colour, marker="o", markerfacecolor=fill or colour, linestyle="none", label=text)


def label_points(axes: Axes, points: Sequence[tuple[Row, float]], gap: float, narrow: bool) -> None:
    """Writes names right of their points; those that would overlap are spread and tied to their point by a line."""
    right = axes.get_xlim()[1]
    for place in PLACES:
        group = [(row, x) for row, x in points if row.place == place]
        if not group:
            continue
        column = max(x for _, x in group) + right * 0.03
        heights = spread([row.average for row, _ in group], gap, *axes.get_ylim())
        for (row, x), height in zip(group, heights, strict=True):
            axes.plot([x, column], [row.average, height], color=COLOURS["grid"], linewidth=0.8, zorder=0)
            text = row.name.replace(" ", "\n", 1) if narrow else row.name
            axes.text(column, height, text, va="center", color=COLOURS[place], fontsize=8 if narrow else 9)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the values, in the same order, at least `gap` apart and within low .. high where they fit."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed: list[float] = []
    for index in order:
        placed.append(max(values[index], placed[-1] + gap if placed else low + gap / 2))
    # Down again from the top, so that a crowd stands around its middle instead of only above it.
    shift = sum(p - values[i] for p, i in zip(placed, order, strict=True)) / max(len(placed), 1)
    placed = [p - shift for p in placed]
    for k in range(len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gap if k else low + gap / 2)
    ceiling = high - gap / 2
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], ceiling)
        ceiling = placed[k] - gap
    positions = dict(zip(order, placed, strict=True))
    return [positions[i] for i in range(len(values))]


def as_png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor="white")
    return file.getvalue()


def as_svg(figure: Figure, salt: str, colours: Mapping[str, str] = COLOURS) -> str:
    """An <svg> element for a page: text as text, colours as CSS variables, no reference to anything outside."""
    file = BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    for namespace in (' xmlns:xlink="http://www.w3.org/1999/xlink"', ' xmlns="http://www.w3.org/2000/svg"'):
        svg = svg.replace(namespace, "")
    for name, colour in colours.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
