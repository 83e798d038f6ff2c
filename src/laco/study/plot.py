"""Accuracy against measured time: a panel for methods as they are and one after healing, a line a method."""

from collections.abc import Sequence
from itertools import groupby

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from laco.report.plots import COLOURS as INK
from laco.report.plots import spread
from laco.study.recipe import percent
from laco.study.results import Line

COLOURS = {"baseline": "#31383f", "encoder": "#0b6e5f", "external": "#b4560f", "language_model": "#5b4bb3"}
PLACES = {
    "baseline": "baselines",
    "encoder": "inside the vision encoder",
    "external": "behind it",
    "language_model": "inside the language model",
}


def accuracy_against_time(lines: Sequence[Line]) -> Figure:
    """Of all lines whose time was measured; names stand at those that no other beats in both, and at the baselines."""
    timed = [line for line in lines if line.cost]
    states = sorted({line.healed for line in timed})
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 10, "axes.edgecolor": INK["muted"]}):
        figure = Figure(figsize=(6.2 * len(states), 5.6), layout="constrained")
        panels = figure.subplots(1, len(states), sharey=True, squeeze=False)[0]
        for axes, healed in zip(panels, states, strict=True):
            draw(axes, [line for line in timed if line.healed == healed])
            axes.set_title("after healing" if healed else "as they are", color=INK["ink"])
        panels[0].set_ylabel("accuracy, % (mean of families)", color=INK["muted"])
        figure.supxlabel("time of encoder and prefill, % of the model as it is", color=INK["muted"], fontsize=10)
        there = [place for place in PLACES if any(line.place == place for line in timed)]
        figure.legend(
            handles=[Line2D([], [], color=COLOURS[p], marker="o", linestyle="none", label=PLACES[p]) for p in there],
            loc="outside upper left",
            ncols=len(there) if len(states) > 1 else 2,
            frameon=False,
            labelcolor=INK["muted"],
        )
    return figure


def draw(axes: Axes, lines: Sequence[Line]) -> None:
    """A panel: the budgets of a row are joined by a thin line."""
    for row, group in groupby(sorted(lines, key=lambda line: line.row), key=lambda line: line.row):
        x, y = zip(*sorted((time(line), line.average) for line in group), strict=True)
        colour = COLOURS[next(line.place for line in lines if line.row == row)]
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.2, zorder=1)
        axes.scatter(x, y, color=colour, s=22, linewidths=0, zorder=2)
    least, most = min(map(time, lines)), max(map(time, lines))
    wide, top = max(most - least, most / 10), max(line.average for line in lines)
    axes.set_xlim(least - wide / 10, most + wide / 3)
    axes.set_ylim(0, min(100, max(top, 1) * 1.15))
    named = sorted(front(lines), key=time)
    heights = spread([line.average for line in named], axes.get_ylim()[1] * 0.035, *axes.get_ylim())
    for line, height in zip(named, heights, strict=True):
        text = line.row if line.budget is None else f"{line.row} {percent(line.budget)}"
        axes.annotate(
            text,
            (time(line), line.average),
            (time(line) + wide * 0.05, height),
            color=COLOURS[line.place],
            fontsize=7,
            va="center",
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            arrowprops={"arrowstyle": "-", "color": INK["muted"], "linewidth": 0.6},
        )
    axes.tick_params(colors=INK["muted"], length=0)
    axes.grid(color=INK["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def front(lines: Sequence[Line]) -> list[Line]:
    """The lines that no other beats in both time and accuracy, and the model as it is."""
    best = [
        line for line in lines if not any(time(other) < time(line) and other.average > line.average for other in lines)
    ]
    return best + [line for line in lines if line.row == "none" and line not in best]


def time(line: Line) -> float:
    """Per cent of the time of the model as it is, which was measured in turn with the line's."""
    assert line.cost is not None, "only lines that were timed are drawn"
    return 100 / line.cost.speedup.value
