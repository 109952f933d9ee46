"""The gates: what a new model must still reach to be accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from selfdistill.config import LearnConfig
from selfdistill.continual.ledger import Ledger
from selfdistill.errors import UserError, number_of
from selfdistill.evaluation import Evaluation, detected, load_prior, prior_difference, share_interval
from selfdistill.runtime import say_note

GATES = ("min_teacher", "max_prior_drop", "max_skill_drop")
"""Settings that decide on an addition and change nothing that it learns."""
FEW = 20
"""A test of fewer rows is small: by default, more than 15% of them may be lost."""
UNLIKE = 0.09
"""Share of prior questions on which only one of two models is right that are about equally good at them.

In the 40 runs in docs/comparisons/studies whose mean prior accuracy ended less than .04 below the base's, it is .04 to
.16, with a median of .083.
"""


def _least_retained(score: Evaluation, config: LearnConfig) -> float:
    """The minimum score at which a skill counts as retained, given its earlier score."""
    if config.max_skill_drop is not None:
        return float(score["accuracy"]) - config.max_skill_drop
    return float(score["accuracy_interval"][0])


def compared(ledger: Ledger, after: Evaluation, config: LearnConfig) -> dict[str, Any]:
    """What the gates on earlier abilities decide by.

    Args:
        ledger: the state, before the addition.
        after: what was measured of the new model.
        config: settings of the addition.

    Returns:
        ``retained``: for each earlier skill that is not replaced, its score when ``learnt``, ``before`` the addition,
        and the ``least`` that counts as retained. ``prior_change``: mean accuracies on the prior questions of the
        ``base``, the model ``before`` the addition and the one ``now``, the ``difference`` from the base with its
        interval from ``low`` to ``high``, and ``files``: by name, the number of ``items`` and of those ``gained``, and
        the places of those ``lost``; None without prior questions.
    """
    return {"retained": _retained(ledger, config), "prior_change": _prior_change(ledger, after)}


def _retained(ledger: Ledger, config: LearnConfig) -> dict[str, dict[str, float]]:
    skills = ledger.in_force(config.replaces)
    learnt = {skill.name: skill.result["after"]["skills"][skill.name] for skill in skills}
    before = ledger.skills[-1].result["after"]["skills"] if learnt else {}
    return {
        name: {"learnt": score["accuracy"], "before": before[name]["accuracy"], "least": _least_retained(score, config)}
        for name, score in learnt.items()
    }


def _prior_change(ledger: Ledger, after: Evaluation) -> dict[str, Any] | None:
    if ledger.prior is None:
        return None
    base = ledger.base_result
    rows: dict[str, Any] = load_prior(ledger.prior)
    before = ledger.skills[-1].result["after"] if ledger.skills else base
    files = {}
    for name, prior in after["prior"].items():
        sides = list(zip(rows[name], base["prior"][name]["correct"], prior["correct"], strict=True))
        files[name] = {
            "items": len(sides),
            "lost": [Path(row.source).name for row, was, now in sides if was and not now],
            "gained": sum(now and not was for _, was, now in sides),
        }
    scores = {"base": base, "before": before, "now": after}
    means = {name: score["prior_accuracy"] for name, score in scores.items()}
    return {**means, **prior_difference(base, after), "files": files}


def told(change: Mapping[str, Any]) -> str:
    """What a ``prior_change`` says, in one line."""
    files = change["files"].values()
    lost, gained, items = (sum(counts) for counts in zip(*map(_counts, files), strict=True))
    return (
        f"{change['base']:.3f} for the base, {_then(change['before'], change['now'])}; of "
        f"{number_of(items, 'question')} {lost} lost and {gained} gained since the base: difference "
        f"{change['difference']:+.3f} ({change['low']:.3f}, {change['high']:.3f})"
    )


def _then(before: float, now: float) -> str:
    """A score before the addition and now; once if they are equal, as they are before it."""
    return f"{now:.3f} now" if before == now else f"{before:.3f} before, {now:.3f} now"


def _counts(file: Mapping[str, Any]) -> tuple[int, int, int]:
    """Questions lost and gained, and all."""
    return len(file["lost"]), file["gained"], file["items"]


def say_drop_not_shown(change: Mapping[str, Any] | None, config: LearnConfig) -> None:
    """Say if prior abilities have fallen by more than the limit, but perhaps by chance."""
    if _is_above_limit(change, config) and not _is_shown(change):
        above = f"the drop is above max_prior_drop {config.max_prior_drop:g}, but may be chance"
        say_note(f"prior abilities: {told(change)}; {above}")


def _is_above_limit(change: Mapping[str, Any] | None, config: LearnConfig) -> TypeGuard[Mapping[str, Any]]:
    return change is not None and -change["difference"] > config.max_prior_drop + 1e-9


def _is_shown(change: Mapping[str, Any]) -> bool:
    """Whether the interval of the difference from the base excludes 0."""
    return bool(change["high"] < 0)


def _against_prior(change: Mapping[str, Any] | None, config: LearnConfig) -> list[str]:
    """The reason against a model whose prior abilities have fallen by more than the limit, if that is shown."""
    if not _is_above_limit(change, config) or not _is_shown(change):
        return []
    fell = {name: file for name, file in change["files"].items() if len(file["lost"]) > file["gained"]}
    of_files = ", ".join("{} (lost {}, gained {} of {})".format(name, *_counts(file)) for name, file in fell.items())
    places = [place for file in fell.values() for place in file["lost"]]
    return [
        f"prior abilities: {told(change)}; the limit is {change['base'] - config.max_prior_drop:.3f} "
        f"(max_prior_drop); fallen: {of_files}; first questions lost: {', '.join(places[:3])}"
    ]


def reasons_against(result: dict[str, Any], config: LearnConfig) -> list[str]:
    """Reasons to refuse a new model; empty if all gates pass.

    Args:
        result: what was measured; see :func:`selfdistill.continual.add_skill.add`.
        config: settings of the addition.
    """
    name, after, before = result["name"], result["after"], result["before"]
    new, least = after["skills"][name]["accuracy"], _least_retained(before, config)
    reasons = []
    if new < least - 1e-9:
        reasons.append(
            f"{name} itself: {result['base']['accuracy']:.3f} for the base, {before['accuracy']:.3f} before, {new:.3f} "
            f"now, but at least {least:.3f} is required (max_skill_drop)"
        )
    reasons += _against_skills(result["retained"], after["skills"])
    return reasons + _against_prior(result["prior_change"], config)


def _against_skills(found: Mapping[str, Mapping[str, float]], scores: Mapping[str, Evaluation]) -> list[str]:
    """Reasons against a model with these scores: earlier skills that it does not retain."""
    reasons = []
    for name, skill in found.items():
        now, least = scores[name]["accuracy"], skill["least"]
        if now < least - 1e-9:
            reasons.append(
                f"{name}: {skill['learnt']:.3f} when it was learnt, {_then(skill['before'], now)}, but at least "
                f"{least:.3f} is required (max_skill_drop)"
            )
    return reasons


# --- before anything is learnt ---


def refuse_failed(ledger: Ledger, config: LearnConfig) -> None:
    """Refuse an addition whose gates the current model already fails, by the scores in the state.

    Raises:
        UserError: it fails at least one.
    """
    if not ledger.skills:
        return
    now = ledger.skills[-1].result["after"]
    found = compared(ledger, now, config)
    reasons = _against_skills(found["retained"], now["skills"]) + _against_prior(found["prior_change"], config)
    if reasons:
        raise UserError(
            f"state {config.state!r}: its current model already fails these gates, so nothing was learnt: "
            f"{'; '.join(reasons)}; give higher limits, or roll back"
        )


def say_prior_detects(sizes: Sequence[int]) -> None:
    """Say what drop is shown by prior files with these numbers of questions."""
    # The mean over files varies as much as that over one file of this size.
    items = int(len(sizes) ** 2 / sum(1 / size for size in sizes) + 1e-9)
    shown = detected(items, UNLIKE).removesuffix(".")
    if len(sizes) > 1:
        shown = f"{sum(sizes)} questions in {len(sizes)} files of equal weight count as {items} in one; {shown}"
    say_note(f"prior abilities: a drop refuses a skill only if it is more than chance; {shown}")


def say_if_few(rows: int, config: LearnConfig) -> None:
    """Say what a test of few rows lets the skill lose, unless the limit is given."""
    if rows < FEW and config.max_skill_drop is None:
        lost = rows - _items(share_interval(rows, rows)[0], rows)
        say_note(
            f"the test has only {number_of(rows, 'row')}: if all are right, later additions may lose {lost} of them "
            f"unless they set max_skill_drop; give at least {FEW}"
        )


def to_keep(score: Evaluation) -> str:
    """What later additions must keep of a skill with this score when it was learnt."""
    least, items = float(score["accuracy_interval"][0]), score["items"]
    if not _items(least, items):
        return f"later additions need not keep any of its {number_of(items, 'test item')}"
    return (
        f"later additions must keep {least:.3f} or more, {_items(least, items)} of "
        f"{number_of(items, 'test item')}, unless they set max_skill_drop"
    )


def _items(share: float, items: int) -> int:
    """The smallest number of items that is at least this share."""
    return math.ceil(share * items - 1e-9)
