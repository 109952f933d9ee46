"""The collapse guard: signs in a run's metrics that it is no longer learning but falling apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLLAPSE_WINDOW = 5
"""Steps over which metrics are averaged: a stage's first ones are what the last ones are compared with."""
DRIFT = 3.0
"""KL from the start, nats per token. Of 48 runs that learnt the largest had 1.9; one that collapsed had 6.4."""
CUT = 0.95
"""Share of samples that reach the length limit."""
EMPTY = 0.2
"""Of the demonstrations' length."""
NOISE = 4.0
"""Entropy of the samples, nats per token."""
APART = 1.0
"""KL between teacher and student, nats per token."""


class CollapseGuard:
    """Told of every step, it says what it sees.

    Args:
        demonstrated: of each stage of the method, the mean tokens of its demonstrations; None where it has none, and
            the length of the replies tells nothing.
    """

    def __init__(self, demonstrated: Sequence[float | None]) -> None:
        self._demonstrated = demonstrated
        self._stage = -1
        self._lines: list[Mapping[str, Any]] = []

    def look(self, metrics: Mapping[str, Any], *, stage: int, sampled: bool) -> dict[str, str]:
        """Signs that this step shows, by their names, in words with numbers; none where it was left out.

        Args:
            metrics: a line of metrics.jsonl.
            stage: which stage of the method the step belongs to.
            sampled: whether the completions are the student's own, so that they tell of it.
        """
        if stage != self._stage:
            self._stage, self._lines = stage, []
        if "skipped" in metrics:
            return {}
        self._lines.append(metrics)
        signs = {
            who: f"the {who} is {metrics[key]:.1f} nats per token from where it began"
            for who, key in (("student", "drift/student"), ("teacher", "drift/teacher"))
            if metrics.get(key, 0.0) > DRIFT
        }
        if sampled and len(self._lines) >= 2 * COLLAPSE_WINDOW:
            signs |= self._compared()
        return signs

    def _compared(self) -> dict[str, str]:
        """What the last steps' samples show beside the first ones'."""
        signs = {}
        demonstrated = self._demonstrated[self._stage]
        cut, cut_before = self._means("completion/truncated")
        if demonstrated and cut >= CUT and cut_before < 0.8 * CUT:
            signs["cut"] = f"{cut:.0%} of the replies reach the length limit, at the start {cut_before:.0%}"
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
        """Of the last and of the first steps; 0 where a step has no such number."""
        last, first = self._lines[-COLLAPSE_WINDOW:], self._lines[:COLLAPSE_WINDOW]
        last_mean, first_mean = (sum(line.get(key, 0.0) for line in part) / COLLAPSE_WINDOW for part in (last, first))
        return last_mean, first_mean
