"""The gates: what a new model must still reach to be accepted."""

from __future__ import annotations

from typing import Any

from selfdistill.config import LearnConfig
from selfdistill.evaluation import Evaluation


def least_retained(score: Evaluation, config: LearnConfig) -> float:
    """The minimum score at which a skill counts as retained, given its earlier score."""
    if config.max_skill_drop is not None:
        return float(score["accuracy"]) - config.max_skill_drop
    return float(score["accuracy_interval"][0])


def reasons_against(result: dict[str, Any], base_result: dict[str, Any], config: LearnConfig) -> list[str]:
    """Reasons to refuse a new model; empty if all gates pass.

    Args:
        result: what was measured; see :func:`selfdistill.continual.add_skill.add`.
        base_result: of the base on the prior abilities.
        config: settings of the addition.
    """
    name, after, before = result["name"], result["after"], result["before"]
    new, least = after["skills"][name]["accuracy"], least_retained(before, config)
    reasons = []
    if new < least - 1e-9:
        reasons.append(
            f"{name} itself: {before['accuracy']:.3f} before, {new:.3f} after, but at least {least:.3f} is "
            "required (max_skill_drop)"
        )
    for earlier, retained in result["retained"].items():
        now, least = after["skills"][earlier]["accuracy"], retained["least"]
        if now < least - 1e-9:
            reasons.append(
                f"{earlier}: {retained['learnt']:.3f} when it was learnt, {now:.3f} now, but at least {least:.3f} is "
                "required (max_skill_drop)"
            )
    if "prior_accuracy" in after:
        base, now = base_result["prior_accuracy"], after["prior_accuracy"]
        if base - now > config.max_prior_drop + 1e-9:
            reasons.append(
                f"prior abilities: {base:.3f} for the base, {now:.3f} now, a drop of more than "
                f"{config.max_prior_drop:g} (max_prior_drop)"
            )
    return reasons
