"""Accuracy against measured time: a panel for methods as they are and one after healing, a line a method."""

from collections.abc import Sequence
from itertools import groupby, product

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from laco.report.plots import COLOURS as INK
from laco.study.recipe import percent
from laco.study.results import Line

COLOURS = {"baseline": "#31383f", "encoder": "#0b6e5f", "external": "#b4560f", "language_model": "#5b4bb3"}
MARKERS = {"baseline": "D", "encoder": "o", "external": "o", "language_model": "o"}
PLACES = {
    "baseline": "baselines",
    "encoder": "inside the vision encoder",
    "external": "behind it",
    "language_model": "inside the language model",
}
BEST = 3  # rows of each place that are named, the most accurate ones


def accuracy_against_time(lines: Sequence[Line]) -> Figure:
    """Of all lines whose time was measured; names as of `named`."""
    timed = [line for line in lines if line.cost]
    states = sorted({line.healed for line in timed})
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 10, "axes.edgecolor": INK["muted"]}):
        figure = Figure(figsize=(7 * len(states), 7), layout="constrained")
        panels = figure.subplots(1, len(states), sharey=True, squeeze=False)[0]
        for axes, healed in zip(panels, states, strict=True):
            draw(axes, [line for line in timed if line.healed == healed])
            axes.set_title("after healing" if healed else "as they are", color=INK["ink"])
        panels[0].set_ylabel("accuracy, % (mean of families)", color=INK["muted"])
        figure.supxlabel("time of encoder and prefill, % of the model as it is", color=INK["muted"], fontsize=10)
        there = [place for place in PLACES if any(line.place == place for line in timed)]
        figure.legend(
            handles=[
                Line2D([], [], color=COLOURS[p], marker=MARKERS[p], markersize=5, linestyle="none", label=PLACES[p])
                for p in there
            ],
            loc="outside upper left",
            ncols=len(there) if len(states) > 1 else 2,
            frameon=False,
            labelcolor=INK["muted"],
        )
        figure.draw_without_rendering()  # where points are is known only now
        for axes, healed in zip(panels, states, strict=True):
            label(axes, [line for line in timed if line.healed == healed])
    return figure


def draw(axes: Axes, lines: Sequence[Line]) -> None:
    """A panel: the budgets of a row are joined by a thin line."""
    for row, group in groupby(sorted(lines, key=lambda line: line.row), key=lambda line: line.row):
        x, y = zip(*sorted((time(line), line.average) for line in group), strict=True)
        place = next(line.place for line in lines if line.row == row)
        axes.plot(x, y, color=COLOURS[place], linewidth=0.7, alpha=0.25, zorder=1)
        axes.scatter(x, y, color=COLOURS[place], s=26, marker=MARKERS[place], linewidths=0, zorder=2)
    least, most = min(map(time, lines)), max(map(time, lines))
    wide, top = max(most - least, most / 10), max(line.average for line in lines)
    axes.set_xlim(least - wide / 10, most + wide / 5)
    axes.set_ylim(0, min(100, max(top, 1) * 1.15))
    axes.tick_params(colors=INK["muted"], length=0)
    axes.grid(color=INK["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def named(lines: Sequence[Line]) -> list[Line]:
    """The lines of a panel that have names, one of a row.

    They are the most accurate of each baseline and of the best rows of each place; then, of the other rows, those that
    no line beats in both time and accuracy.
    """
    best: dict[str, Line] = {}
    for line in sorted(lines, key=lambda line: -line.average):
        best.setdefault(line.row, line)
    chosen = {line.row: line for line in best.values() if line.place == "baseline"}
    for place in PLACES:
        chosen |= {line.row: line for line in [line for line in best.values() if line.place == place][:BEST]}
    for line in front(lines):
        chosen.setdefault(line.row, line)
    return list(chosen.values())


def label(axes: Axes, lines: Sequence[Line]) -> None:
    """Writes names, each as near to its point as it covers neither points nor other names, and ties it to the point.

    One that finds no such place is left out.
    """
    point = axes.figure.dpi / 72  # pixels
    busy = axes.transData.transform([(time(line), line.average) for line in lines])  # points and ties
    names: list[Bbox] = []
    for line in named(lines):
        here = axes.transData.transform((time(line), line.average))
        note = axes.annotate(
            line.row if line.place == "baseline" else f"{line.row} {percent(line.budget or 1)}",
            (time(line), line.average),
            (0, 0),
            textcoords="offset points",
            color=COLOURS[line.place],
            fontsize=8,
            ha="center",
            va="center",
            in_layout=False,
            arrowprops={"arrowstyle": "-", "color": COLOURS[line.place], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        half = np.array(note.get_window_extent().size) / 2
        far = busy[np.linalg.norm(busy - here, axis=-1) > 6 * point]
        for reach, angle in product(range(6, 90, 3), np.linspace(0, 2 * np.pi, 24, endpoint=False)):
            away = np.array([np.cos(angle), np.sin(angle)])
            edge = here + away * reach * point
            middle = edge + away / abs(away).max() * half
            tie, box = np.linspace(here, edge, 20), Bbox([middle - half, middle + half])
            if (
                covered(axes.bbox, box.padded(3 * point).corners()) == 4
                and not covered(box.padded(3 * point), busy)
                and not any(
                    box.padded(2 * point).overlaps(other) or covered(other.padded(point), tie) for other in names
                )
                and np.linalg.norm(tie[:, None] - far, axis=-1).min(initial=np.inf) > 3 * point
            ):
                note.set_position((middle - here) / point)
                busy = np.concatenate([busy, tie[1:]])
                names.append(box)
                break
        else:
            note.remove()


def covered(box: Bbox, points: NDArray) -> int:
    """How many points lie in a box."""
    return int(((box.min < points) & (points < box.max)).all(axis=-1).sum())


def front(lines: Sequence[Line]) -> list[Line]:
    """The lines that no other beats in both time and accuracy."""
    return [
        line for line in lines if not any(time(other) < time(line) and other.average > line.average for other in lines)
    ]


def time(line: Line) -> float:
    """Per cent of the time of the model as it is, which was measured in turn with the line's."""
    assert line.cost is not None, "only lines that were timed are drawn"
    return 100 / line.cost.speedup.value
