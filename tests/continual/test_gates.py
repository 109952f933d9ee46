"""The gate on prior abilities against simulated changes of a model, and the notes on what small sets can show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy
import pytest

from selfdistill.config import LearnConfig
from selfdistill.continual.gates import UNLIKE, reasons_against, say_if_few, say_prior_detects
from selfdistill.evaluation import prior_difference

BUNDLED = (30, 30, 30, 90, 30, 30)
"""Numbers of questions in the files of ``bundled:prior/test``."""


def settings(**values: Any) -> LearnConfig:
    return LearnConfig(state="state", action="add", data="rows.jsonl", **values)


def measured(files: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Prior abilities with these right questions in each file."""
    means = [sum(file) / len(file) for file in files]
    priors = {str(number): {"correct": list(file)} for number, file in enumerate(files)}
    return {"prior": priors, "prior_accuracy": sum(means) / len(means)}


def outcomes(sizes: Sequence[int], unlike: float, drop: float, count: int) -> dict[str, float]:
    """Of simulated changes on prior files of these sizes, the shares that the gate refuses, that are above its limit,
    and whose interval has the true drop in it.

    Args:
        sizes: numbers of questions.
        unlike: probability that a question is lost or gained.
        drop: true drop of the accuracy.
        count: number of changes.
    """
    generator = numpy.random.default_rng(43)
    shares = [(unlike + drop) / 2, (unlike - drop) / 2, 1 - unlike]
    config, found = settings(), {"refused": 0, "above": 0, "covered": 0}
    for _ in range(count):
        before, after, files = [], [], {}
        for name, size in enumerate(sizes):
            lost, gained, same = generator.multinomial(size, shares).tolist()
            before.append([True] * lost + [False] * gained + [True] * same)
            after.append([False] * lost + [True] * gained + [True] * same)
            files[str(name)] = {"items": size, "lost": ["?"] * lost, "gained": gained}
        base, now = measured(before), measured(after)
        change = prior_difference(base, now)
        means = {"base": base["prior_accuracy"], "before": base["prior_accuracy"], "now": now["prior_accuracy"]}
        score = {"accuracy": 1.0, "accuracy_interval": [0.9, 1.0]}
        result = {"name": "skill", "base": score, "before": score, "after": {"skills": {"skill": score}}}
        result |= {"retained": {}, "prior_change": {**means, **change, "files": files}}
        found["refused"] += bool(reasons_against(result, config))
        found["above"] += -change["difference"] > config.max_prior_drop
        found["covered"] += change["low"] <= -drop <= change["high"]
    return {name: number / count for name, number in found.items()}


@pytest.mark.parametrize("sizes", [BUNDLED, (5, 40, 40)])
def test_the_gate_refuses_few_changes_that_harm_nothing(sizes: Sequence[int]) -> None:
    found = outcomes(sizes, UNLIKE, 0.0, count=100)
    assert found["above"] > 0.12  # by the means alone these would be refused
    assert found["refused"] <= 0.06
    assert found["covered"] >= 0.9


def test_the_gate_refuses_a_drop_at_least_as_often_as_the_note_says(capsys: pytest.CaptureFixture[str]) -> None:
    say_prior_detects(BUNDLED)
    (told,) = re.findall(r"a difference in accuracy of (\S+) about 3 times in 4", capsys.readouterr().err)
    found = outcomes(BUNDLED, UNLIKE, float(told), count=100)
    assert found["refused"] >= 0.75
    assert found["covered"] >= 0.9


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((1000,), "chance; 1000 items detect a difference in accuracy of 0.03 about 3 times in 4, if only one of the"),
        (BUNDLED, "chance; 240 questions in 6 files of equal weight count as 202 in one; 202 items detect a diff"),
        (
            (5, 100, 100, 100, 100, 100),
            "505 questions in 6 files of equal weight count as 144 in one; 144 items detect",
        ),
        ((5,), "chance; 5 items are too few to detect even a difference in accuracy of 0.50\n"),
    ],
)
def test_what_prior_questions_detect_is_said(
    capsys: pytest.CaptureFixture[str], sizes: tuple[int, ...], said: str
) -> None:
    say_prior_detects(sizes)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "values", "said"),
    [
        (5, {}, "note: the test has only 5 rows: if all are right, later additions may lose 2 of them unless they set"),
        (19, {}, "note: the test has only 19 rows: if all are right, later additions may lose 3 of them unless they"),
        (20, {}, ""),
        (5, {"max_skill_drop": 0.1}, ""),
    ],
)
def test_what_a_small_test_lets_a_skill_lose_is_said(
    capsys: pytest.CaptureFixture[str], rows: int, values: dict[str, Any], said: str
) -> None:
    say_if_few(rows, settings(**values))
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert bool(told) == bool(said)
