"""The line that a step writes to ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from selfdistill.methods import Completion, Method
from selfdistill.training.batch_gradient import BatchResult


def step_metrics(
    step: int,
    epoch: float,
    method: Method,
    completions: Sequence[Completion],
    result: BatchResult,
    *,
    learning_rate: float,
    grad_norm: float,
    drift: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Metrics of a finished step, under the names of :data:`selfdistill.runtime.tracking.METRICS`.

    Args:
        step: its number, from 1.
        epoch: passes over the examples so far.
        method: the method or stage.
        completions: the step's completions.
        result: the batch's result.
        learning_rate: of this step.
        grad_norm: global gradient norm before clipping.
        drift: distances from the base, if measured.
        seconds: duration of each part of the step.

    Returns:
        The metrics. For a skipped step: only finite ones, plus ``skipped``.
    """
    tokens = sum(len(c.ids) for c in completions)
    metrics: dict[str, Any] = {
        "step": step,
        "epoch": epoch,
        "loss": result.loss,
        "entropy": result.statistics["entropy"],
        "completion/length": tokens / len(completions),
        "completion/truncated": sum(c.truncated for c in completions) / len(completions),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": tokens,
    }
    if method.teacher is not None:
        metrics["kl/forward"] = result.statistics["forward_kl"]
        metrics["kl/reverse"] = result.statistics["reverse_kl"]
    if method.importance_cap is not None:
        metrics["importance"] = result.importance
    if result.reward is not None:
        metrics["reward"] = result.reward
    metrics |= drift
    for part in ("rollout", "teacher", "student", "update", "drift", "step"):
        metrics[f"time/{part}_s"] = seconds[part]
    if not is_sound(result, grad_norm):
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        return finite | {"skipped": _why(completions, result, grad_norm)}
    return metrics


def is_sound(result: BatchResult, grad_norm: float) -> bool:
    """Whether loss and gradient are finite, so that the step may update the weights."""
    return math.isfinite(result.loss) and math.isfinite(grad_norm)


def _why(completions: Sequence[Completion], result: BatchResult, grad_norm: float) -> dict[str, Any]:
    """Why a step was skipped, and the responsible rows; the whole batch if they are unknown."""
    sources = result.non_finite or [c.example.demonstration.source for c in completions]
    why = f"the loss is {result.loss}"
    if math.isfinite(result.loss):
        why = f"the gradient's norm is {grad_norm}"
    return {"why": why, "rows": list(dict.fromkeys(sources))}
