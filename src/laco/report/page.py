"""Writes a report: one HTML file that needs nothing else, and its numbers as JSON, CSV and PNG."""

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from laco.files import write_file
from laco.report.data import Results, Row, as_csv
from laco.report.plots import accuracy_against_time, as_png, as_svg

WIDE, NARROW = (9.0, 4.6), (4.2, 5.4)  # inches: for desks and for phones


def write_report(results: Results, output: str | Path) -> list[Path]:
    """Writes report.html, results.json, results.csv and accuracy-time.png into a directory; returns their paths."""
    output = Path(output)
    texts: dict[str, str | bytes] = {
        "report.html": render(results),
        "results.json": results.model_dump_json(indent=1),
        "results.csv": as_csv([row.flat() for row in results.rows]),
        "accuracy-time.png": as_png(accuracy_against_time(results.rows, WIDE)),
    }
    for name, text in texts.items():
        write_file(output / name, text)
    return [output / name for name in texts]


def render(results: Results) -> str:
    """The page; style, pictures and plots are inside it."""
    folder = files("laco.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((folder / "report.html").read_text()).render(
        results=results,
        style=Markup((folder / "style.css").read_text()),
        wide=Markup(as_svg(accuracy_against_time(results.rows, WIDE), "wide")),
        narrow=Markup(as_svg(accuracy_against_time(results.rows, NARROW), "narrow")),
        finding=finding(results),
        families=list(results.rows[0].families) if results.rows else [],
    )


def finding(results: Results) -> str:
    """The result in two sentences, from the numbers, whatever they are."""
    none, ours = results.row("none"), results.row("LaCo@1/4")
    if none is None or ours is None or not ours.times:
        return "LaCo at a quarter of the encoder's depth was not measured in this run."
    speed, steps = ours.times["encoder"].speedup.value, results.protocol["steps"]
    text = (
        f"With LaCo after a quarter of its layers the vision encoder runs {speed:.1f} times as fast and the language"
        f" model reads {ours.visual_tokens:.0f} instead of {none.visual_tokens:.0f} visual tokens. After {steps} steps"
        f" of healing the model answers {ours.average:.0f}\u00a0% of held-out questions, the uncompressed model"
        f" {none.average:.0f}\u00a0%"
    )
    rivals = {"pixel-shuffle": "PixelShuffle@1/4", "plain averaging": "AveragePool@1/4"}
    found = [(title, row) for title, name in rivals.items() if (row := results.row(name))]
    if not found:
        return f"{text}."
    return f"{text}; at the same place {' and '.join(compared(title, row, ours) for title, row in found)}."


def compared(title: str, row: Row, ours: Row) -> str:
    """A rival's accuracy, and whether it can be told from ours."""
    apart = ours.low > row.high or ours.high < row.low
    return f"{title} reaches {row.average:.0f}\u00a0%" + (
        "" if apart else " (no clear difference: the intervals overlap)"
    )
