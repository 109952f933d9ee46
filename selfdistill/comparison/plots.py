"""Figures as SVG text, drawn by matplotlib, for light and dark pages and for screen readers.

Text and axes take the page's colour (``currentColor``), text stays text, and the figure's label contains the numbers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]

INK = "#1a1b1c"
"""Colour of text and axes; replaced by the page's text colour."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
"""Distinguishable with any colour vision (Okabe and Ito 2008), on white and on black."""
MARKERS = "osD^vP"
DASHES = ("-", "--", ":")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "selfdistill",  # deterministic output
    "text.parse_math": False,  # names of runs may contain dollar signs
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}
_LETTER_POINTS, _LINE_POINTS, _ROW_POINTS = 6, 45, 15
"""Room in a legend for a letter of a name, for its line with the gaps, and between rows."""
SMOOTHING = 20
"""The running mean covers 1/SMOOTHING of a curve."""


@dataclass(frozen=True)
class Curve:
    """One line of a figure. Curves with the same name share colour, marker and legend entry."""

    name: str
    points: Sequence[Point]
    """(x, y), connected in this order. A curve without points still reserves its colour, to keep figures consistent."""
    seeds: Sequence[Sequence[Point]] = ()
    """The individual runs that this curve averages, drawn as thin lines."""


def trade_off(
    curves: Sequence[Curve],
    bases: Sequence[Point],
    teacher: float | None,
    x_label: str,
    y_label: str,
    *,
    file: Path | None = None,
) -> str:
    """Plot learning against retention: one curve per method over its steps, and the Pareto front.

    Args:
        curves: points are (prior score, new-task score); higher is better in both.
        bases: the points of the model before training, drawn as stars; several if it scores differently on the
            machines of the runs.
        teacher: the teacher's new-task score, drawn as a dashed horizontal line.
        x_label: label of the prior score, with its unit.
        y_label: label of the new-task score, with its unit.
        file: also write the figure to this SVG file, black on white.

    Returns:
        An ``<svg>`` element for a page.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(x_label, y_label, (4.9, 4.2))
        handles = _draw(axes, curves, marked=True)
        front = pareto_front([point for curve in curves for point in curve.points] + [*bases])
        if len(front) > 1:
            wide: dict[str, Any] = {"alpha": 0.2, "linewidth": 9, "solid_capstyle": "round", "zorder": 1}
            (handles["Pareto front"],) = axes.plot(*_columns(front), color=INK, **wide)
        if teacher is not None:
            handles["teacher"] = axes.axhline(teacher, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        if bases:
            star: dict[str, Any] = {"marker": "*", "markersize": 13, "linestyle": "none", "zorder": 4}
            (handles["base"],) = axes.plot(*_columns(bases), color=INK, **star)
        axes.margins(0.08)
        said = _described(f"{y_label} against {x_label}", curves)
        said += f" Base at {' and '.join(map(_pair, bases))}." if bases else ""
        said += f" Teacher: {teacher:.3g}." if teacher is not None else ""
        said += f" Pareto front: {', '.join(map(_pair, front))}." if front else ""
        return _svg(figure, handles, said, file)


def over(curves: Sequence[Curve], x_label: str, y_label: str, *, smooth: bool = False, file: Path | None = None) -> str:
    """Plot curves over steps or positions, as an ``<svg>`` element for a page.

    Args:
        curves: the curves, in one figure.
        x_label: label of x.
        y_label: label of y, with its unit.
        smooth: draw thin lines for the values, and their running mean over them.
        file: also write the figure to this SVG file, black on white.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(x_label, y_label, (4.6, 3.1))
        if smooth:
            curves = [Curve(curve.name, _running_mean(curve.points), [curve.points]) for curve in curves]
        handles = _draw(axes, curves, marked=all(len(curve.points) <= 20 for curve in curves))
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        return _svg(figure, handles, _described(f"{y_label} over {x_label}", curves), file)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other dominates (at least as good in both coordinates, better in one), by ascending x."""
    front: list[Point] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def _running_mean(points: Sequence[Point]) -> list[Point]:
    half = len(points) // SMOOTHING // 2
    means = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(i - half, 0) : i + half + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def _figure(x_label: str, y_label: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    return figure, axes


def _draw(axes: Axes, curves: Sequence[Curve], *, marked: bool) -> dict[str, Line2D]:
    """Draw the curves, and return one line per name for the legend."""
    names = list(dict.fromkeys(curve.name for curve in curves))
    handles = {}
    for curve in curves:
        number = names.index(curve.name)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        for seed in curve.seeds:
            axes.plot(*_columns(seed), color=colour, linewidth=0.8, alpha=0.4)
        if curve.points:
            marker = MARKERS[number % len(MARKERS)] if marked else ""
            dash = dash if len(curve.points) > 1 else "none"
            line = axes.plot(*_columns(curve.points), color=colour, linestyle=dash, marker=marker, markersize=5)
            handles[curve.name] = line[0]
    return handles


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _described(what: str, curves: Sequence[Curve]) -> str:
    """The figure in words: where each curve starts and ends."""
    said = [f"Plot of {what}."]
    for curve in curves:
        if len(curve.points) == 1:
            said.append(f"{curve.name}: {_pair(curve.points[0])}.")
        elif curve.points:
            said.append(f"{curve.name}: from {_pair(curve.points[0])} to {_pair(curve.points[-1])}.")
    return " ".join(said)


def _pair(point: Point) -> str:
    return f"({number(point[0])}, {number(point[1])})"


def number(value: float | None) -> str:
    """The value with three significant digits, from 1000 on without decimals; empty for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


_figures = itertools.count()


def _legend(figure: Figure, handles: dict[str, Line2D]) -> None:
    """Name the lines below the axes. Names that are wider than the figure lose their middle, and the figure grows by
    the rows beyond the third, so that the axes keep their height."""
    points = 72 * figure.get_figwidth()
    names = [_shortened(name, math.floor((points - _LINE_POINTS) / _LETTER_POINTS)) for name in handles]
    widest = _LETTER_POINTS * max(map(len, names)) + _LINE_POINTS
    columns = max(1, min(3, math.floor(points / widest)))
    rows = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + max(0, rows - 3) * _ROW_POINTS / 72)
    figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns)


def _shortened(name: str, letters: int) -> str:
    """The name with ``...`` in its middle if it has more than this many letters."""
    half = (letters - 3) // 2
    return name if len(name) <= letters else f"{name[:half]}...{name[-half:]}"


def _svg(figure: Figure, handles: dict[str, Line2D], label: str, file: Path | None) -> str:
    """The figure as an element in the page's font and colour, with ids unique on the page."""
    if len(handles) > 1:
        _legend(figure, handles)
    nobody = {"Date": None, "Creator": None, "Format": None, "Type": None}
    text = StringIO()
    figure.savefig(text, format="svg", facecolor="white", metadata=nobody)
    svg = text.getvalue()
    if file is not None:
        file.write_text(svg, encoding="utf-8")
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("fill: #ffffff", "fill: none")
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{next(_figures)}-", svg)
    size = re.search(r'width="[\d.]+pt" height="[\d.]+pt"', svg)
    assert size is not None, "matplotlib gives the size in points"
    return svg.replace(size[0], f'role="img" aria-label="{escape(label)}"', 1)
