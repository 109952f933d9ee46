"""The collapse guard: detects signs of collapse in a run's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

COLLAPSE_WINDOW = 5
"""Steps over which metrics are averaged; a stage's latest steps are compared with its first ones."""
DRIFT = 3.0
"""KL from the initial model, nats per token. The largest of 48 successful runs was 1.9; a collapsed one had 6.4."""
TRUNCATED = 0.95
"""Share of samples that reach the length limit."""
TRUNCATED_SIGN = "truncated"
"""Name of the sign that they do."""
EMPTY = 0.2
"""Reply length as a share of the demonstrations' length."""
NOISE = 4.0
"""Entropy of the samples, nats per token."""
APART = 1.0
"""KL between teacher and student, nats per token."""


class CollapseGuard:
    """Inspects the metrics of every step.

    Args:
        demonstrated: mean number of tokens of the demonstrations, per stage of the method; None for a stage without
            demonstrations, where reply length is no sign.
    """

    def __init__(self, demonstrated: Sequence[float | None]) -> None:
        self._demonstrated = demonstrated
        self._stage = -1
        self._lines: list[Mapping[str, Any]] = []

    def look(self, metrics: Mapping[str, Any], *, stage: int, sampled: bool) -> dict[str, str]:
        """Signs of collapse at this step: name to description. Empty for a skipped step.

        Args:
            metrics: a line of metrics.jsonl.
            stage: the stage of the method that the step belongs to.
            sampled: whether the completions are the student's own samples; others are compared with nothing.
        """
        if stage != self._stage:
            self._stage, self._lines = stage, []
        if "skipped" in metrics:
            return {}
        signs = {
            who: f"the {who} has drifted {metrics[key]:.1f} nats per token from the initial model"
            for who, key in (("student", "drift/student"), ("teacher", "drift/teacher"))
            if metrics.get(key, 0.0) > DRIFT
        }
        if sampled:
            self._lines.append(metrics)
            if len(self._lines) >= 2 * COLLAPSE_WINDOW:
                signs |= self._compared()
        return signs

    def _compared(self) -> dict[str, str]:
        """Signs from comparing the samples of the latest steps with those of the first."""
        signs = {}
        demonstrated = self._demonstrated[self._stage]
        truncated, before = self._means("completion/truncated")
        if demonstrated and truncated >= TRUNCATED and before < 0.8 * TRUNCATED:
            signs[TRUNCATED_SIGN] = f"{truncated:.0%} of the replies reach the length limit, at the start {before:.0%}"
        length, length_before = self._means("completion/length")
        if demonstrated and length < EMPTY * min(demonstrated, length_before):
            signs["empty"] = f"replies have {length:.1f} tokens, demonstrations {demonstrated:.1f}"
        entropy, entropy_before = self._means("entropy")
        if entropy > max(NOISE, 1.5 * entropy_before):
            signs["noise"] = f"the entropy is {entropy:.1f} nats per token, at the start {entropy_before:.1f}"
        apart, apart_before = self._means("kl/forward")
        if apart > max(APART, 2 * apart_before):
            signs["apart"] = (
                f"the student is {apart:.1f} nats per token from its teacher, at the start {apart_before:.1f}"
            )
        return signs

    def _means(self, key: str) -> tuple[float, float]:
        """Means over the last and over the first steps that have a value.

        If only the last steps have one, nothing has changed since; 0 if no step has one.
        """
        windows = self._lines[-COLLAPSE_WINDOW:], self._lines[:COLLAPSE_WINDOW]
        last, first = ([line[key] for line in window if key in line] for window in windows)
        return mean(last or [0.0]), mean(first or last or [0.0])
