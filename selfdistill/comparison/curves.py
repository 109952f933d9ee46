"""The curves of a report: metrics and scores of runs over their steps, as figures and as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from selfdistill.comparison.plots import Curve, Point, number, over
from selfdistill.comparison.run_folders import Json, RunFolder
from selfdistill.runtime import METRICS

CURVES = {
    "loss": "loss",
    "kl/forward": "KL(teacher||student)",
    "kl/reverse": "KL(student||teacher)",
    "drift/student": "KL(base||student)",
    "drift/teacher": "KL(base||teacher)",
    "completion/length": "tokens per completion",
    "entropy": "entropy",
}
"""Metrics to plot from metrics.jsonl, with their axis labels."""
SCORES = {
    "accuracy": "new-task score",
    "prior_accuracy": "prior score",
    "kl_base": "KL(base||model)",
}
"""Scores to plot from evaluations.jsonl, with their axis labels."""
NUMBERS_HEAD = ["curve", "run", "first", "last", "lowest", "highest"]


def series(run: RunFolder, key: str) -> list[Point]:
    """The finite values of a metric or score by step."""
    lines = run.evaluations if key in SCORES else run.metrics
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def figures(runs: list[RunFolder]) -> list[Json]:
    """The figures of all runs, as input for the template."""
    made = []
    for key, words in {**SCORES, **CURVES}.items():
        curves = [Curve(run.curve, series(run, key)) for run in runs]
        if any(curve.points for curve in curves):
            smooth = key in CURVES and not key.startswith("drift")
            meaning = METRICS.get(key, "share of correct answers" if "accuracy" in key else "nats per token")
            made.append(
                {
                    "figure": Markup(over(curves, "step", words, smooth=smooth)),
                    "title": words[0].upper() + words[1:],
                    "meaning": meaning.replace("``", ""),
                }
            )
    contributions = [Curve(f"{run.curve} {part}", points) for run in runs for part, points in _by_part(run).items()]
    if contributions:
        meaning = "a part's share of the batch times its mean loss, nats per token; the sum over the parts is the loss"
        figure = Markup(over(contributions, "step", "loss by part", smooth=True))
        made.append({"figure": figure, "title": "Loss by part", "meaning": meaning})
    return made


def _by_part(run: RunFolder) -> dict[str, list[Point]]:
    """Each part's contribution to the loss of every step, 0 without examples; empty if steps have a single part."""
    lines = [line for line in run.metrics if any(key.startswith("share/") for key in line)]
    names = dict.fromkeys(key.removeprefix("share/") for line in lines for key in line if key.startswith("share/"))
    return {
        name: [
            (line["step"], line.get(f"share/{name}", 0.0) * line.get(f"loss/{name}", 0.0))
            for line in lines
            if f"loss/{name}" in line or f"share/{name}" not in line  # a skipped step may lack the loss
        ]
        for name in names
    }


def numbers(runs: list[RunFolder]) -> list[list[str]]:
    """The curves as numbers, with the columns of :data:`NUMBERS_HEAD`."""
    rows = []
    for key in CURVES:
        for run in runs:
            rows += _numbers_of(CURVES[key], run.name, series(run, key))
    for run in runs:
        for part, points in _by_part(run).items():
            rows += _numbers_of("loss by part", f"{run.name} {part}", points)
    return rows


def _numbers_of(what: str, name: str, points: Sequence[Point]) -> list[list[str]]:
    values = [y for _, y in points]
    return [[what, name, *map(number, (values[0], values[-1], min(values), max(values)))]] if values else []
