"""The line that a step writes to ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from selfdistill.model import RolloutCount
from selfdistill.training.batch_gradient import PartResult, SamplerGap
from selfdistill.training.stopwatch import Stopwatch

_STATISTICS = {"entropy": "entropy", "kl/forward": "forward_kl", "kl/reverse": "reverse_kl"}
"""Statistics of the task's tokens, by the names of their metrics; a step that learns nothing of it has none."""


def step_metrics(
    step: int,
    epoch: float,
    results: Sequence[PartResult],
    *,
    learning_rate: float,
    grad_norm: float,
    drift: dict[str, float],
    stopwatch: Stopwatch,
    rollout_count: RolloutCount,
    by_part: bool,
    control: float | None,
) -> dict[str, Any]:
    """Metrics of a finished step, under the names of :data:`selfdistill.runtime.tracking.METRICS`.

    Args:
        step: its number, from 1.
        epoch: passes over the task's examples so far.
        results: of the parts with examples; the first, the task, gives all metrics but ``loss`` and ``tokens``.
        learning_rate: of this step.
        grad_norm: global gradient norm before clipping.
        drift: distances from the base, if measured.
        stopwatch: where the time of the step went; with ``sync`` if an engine samples.
        rollout_count: what was sampled from the student in this step.
        by_part: whether to tell how loss and time divide between the parts.
        control: the number of the method's controller, if it has one.

    Returns:
        The metrics. For a skipped step: only finite ones, plus ``skipped``.
    """
    task = results[0]
    completions, method = task.part.completions, task.part.method
    seconds = {"teacher": 0.0} | stopwatch.seconds()
    metrics: dict[str, Any] = {
        "step": step,
        "epoch": epoch,
        "loss": total_loss(results),
        "completion/length": sum(sum(c.is_own) for c in completions) / len(completions),
        "completion/truncated": sum(c.truncated for c in completions) / len(completions),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": sum(sum(c.is_own) for result in results for c in result.selected.completions),
    }
    for name, statistic in _STATISTICS.items():
        if statistic in task.statistics:
            metrics[name] = task.statistics[statistic]
    metrics |= _of_episodes(task)
    gated = [r for r in results if r.part.method.select is not None and r.part.method.select.gates]
    if task in gated:
        metrics["learnt"] = len(task.selected.completions) / len(completions)
    if gated:
        sampled = {id(result.part.completions): len(result.part.completions) for result in gated}  # parts may share it
        metrics["unfit"] = sum(result.selected.unfit for result in gated) / sum(sampled.values())
    if method.importance_cap is not None:
        metrics["importance"] = task.importance
    if task.selected.verdicts:
        rewards = {"reward": task.selected.reward(), "reward/helped": task.selected.reward(helped=True)}
        metrics |= {name: reward for name, reward in rewards.items() if reward is not None}
        metrics |= task.teacher_gains
    if control is not None:
        metrics["control"] = control
    if by_part:
        for result in results:
            metrics[f"loss/{result.part.name}"] = result.loss
            metrics[f"share/{result.part.name}"] = result.part.weight
    metrics |= drift
    if "sync" in seconds:
        metrics |= _engine_gap(results)
    if rollout_count.tokens:
        metrics["rollout/tokens_per_second"] = rollout_count.tokens / (rollout_count.seconds - seconds.get("sync", 0.0))
    if by_part:
        metrics |= _times_of_parts(results, stopwatch, seconds["step"])
    for part in ("rollout", "sync", "teacher", "student", "update", "drift", "step"):
        if part in seconds:
            metrics[f"time/{part}_s"] = seconds[part]
    if not is_sound(results, grad_norm):
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        return finite | {"skipped": _why(results, grad_norm)}
    return metrics


def _times_of_parts(results: Sequence[PartResult], stopwatch: Stopwatch, step: float) -> dict[str, float]:
    tokens = {result.part.name: sum(sum(c.is_own) for c in result.part.completions) for result in results}
    return {f"time/of/{part}_s": seconds for part, seconds in stopwatch.by_part(step, tokens).items()}


def _of_episodes(task: PartResult) -> dict[str, float]:
    """What only episodes have; empty without an environment.

    Rewards only where all are judged: without a judge, the cut ones alone have one.
    """
    episodes = [c for c in task.part.completions if c.messages]
    if not episodes:
        return {}
    verdicts = task.selected.verdicts or [c.verdict for c in episodes if c.verdict is not None]
    found = {
        "episode/turns": sum(c.turns for c in episodes) / len(episodes),
        "episode/invalid_calls": sum(c.invalid_calls for c in episodes) / len(episodes),
        "episode/cut": sum(c.cut for c in episodes) / len(episodes),
    }
    if len(verdicts) == len(episodes):
        found["episode/reward"] = sum(verdict.reward for verdict in verdicts) / len(verdicts)
        found["episode/success"] = sum(verdict.reward == 1 for verdict in verdicts) / len(verdicts)
    return found | task.turn_losses


def _engine_gap(results: Sequence[PartResult]) -> dict[str, float]:
    """Mean and largest gap of the step's samples; empty if nothing was sampled."""
    gap = sum((result.gap for result in results if result.gap), SamplerGap())
    return {"engine/gap": gap.total / gap.tokens, "engine/gap_max": gap.largest} if gap.tokens else {}


def total_loss(results: Sequence[PartResult]) -> float:
    """The batch's loss."""
    return sum(result.part.weight * result.loss for result in results)


def is_sound(results: Sequence[PartResult], grad_norm: float) -> bool:
    """Whether loss and gradient are finite, so that the step may update the weights."""
    return math.isfinite(total_loss(results)) and math.isfinite(grad_norm)


def _why(results: Sequence[PartResult], grad_norm: float) -> dict[str, Any]:
    """Why a step was skipped, and the responsible rows; the whole batch if they are unknown."""
    sources = [source for result in results for source in result.non_finite]
    sources = sources or [c.example.demonstration.source for result in results for c in result.part.completions]
    loss = total_loss(results)
    why = f"the loss is {loss}"
    if math.isfinite(loss):
        why = f"the gradient's norm is {grad_norm}"
    return {"why": why, "rows": list(dict.fromkeys(sources))}
