"""The gate before training: whether the current model, shown the demonstration, can teach itself."""

from __future__ import annotations

from typing import Any

from selfdistill.config import TrainConfig
from selfdistill.evaluation import check_run, share_interval
from selfdistill.methods import uses
from selfdistill.runtime import say


def check_teacher(run: TrainConfig) -> dict[str, Any]:
    """Check the teacher of a run and find the best context.

    Returns:
        ``context``, ``worth`` (whether it may help), ``accuracy`` on ``items`` rows (None if they are not scored), and
        the ``verdict``. Without a teacher, ``items`` is 0.
    """
    if not uses(run, "context"):
        verdict = f"{run.method} has no teacher"
        return {"context": run.context, "worth": True, "accuracy": 1.0, "items": 0, "verdict": verdict}
    found = check_run(run)
    best = found.best
    context = best.context if run.context == "auto" else run.context
    checked = {"context": context, "worth": found.exit_code == 0, "accuracy": best.accuracy, "items": best.items}
    if best.accuracy is not None:
        say(f"teacher: {context}, {_right(checked)} of {best.items} right")
    return checked | {"verdict": found.verdict}


def _right(checked: dict[str, Any]) -> int:
    return round(checked["accuracy"] * checked["items"])


def reasons_against_teacher(checked: dict[str, Any], least: float) -> list[str]:
    """Reasons not to learn from a teacher that must be right on a share ``least`` of all rows; empty if there are none.

    It was asked a sample of them, so only the upper end of the interval of its accuracy may not be lower.
    """
    if not least:
        return []
    if not checked["worth"]:
        return [f"{checked['verdict']} (min_teacher)"]
    if checked["accuracy"] is None:
        return ["the teacher cannot be scored, as rows have neither completion nor answer (min_teacher)"]
    items = checked.get("items", 0)  # an older release kept only the accuracy, and decided when it checked
    if not items:
        return []
    low, high = share_interval(_right(checked), items)
    if high >= least - 1e-9:
        return []
    return [
        f"the teacher with {checked['context']} is right on {_right(checked)} of {items} rows (95% interval: "
        f"{low:.0%} to {high:.0%}), but at least {least:.0%} is required (min_teacher)"
    ]
