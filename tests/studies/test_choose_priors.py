"""Prior questions are chosen by what a model answers again and again, not by one lucky answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ENDS

from selfdistill.evaluation import generate
from selfdistill.model import LoadedModel, Sampling, sample, sample_seed


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "studies")
    return import_module("choose_priors")


def test_candidates_are_asked_greedily_and_by_samples_of_their_own(
    study: ModuleType,
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study, "LENGTH", 4)
    monkeypatch.setattr(study, "TEMPERATURE", 1.0)
    loaded = load(ends=ENDS)
    rows = [{"prompt": f"{n}?", "answer": "[a-z]" if n else ".", "scorer": "regex"} for n in range(12)]
    files = [write_rows(rows[:5], name="a.jsonl"), write_rows(rows[5:], name="b.jsonl")]
    with study.training_precision(loaded.model, "auto"):
        greedy = generate(loaded, [row["prompt"] for row in rows], max_completion_length=4)
        chat = loaded.chat()
        for number, (row, found) in enumerate(zip(rows, study.asked(loaded, list(map(str, files))), strict=True)):
            ids = chat.encode_prompt(({"role": "user", "content": row["prompt"]},))
            seeds = [sample_seed(0, 0, number, time) for time in range(8)]
            replies = [chat.decode(r.ids) for r in sample(loaded, [ids] * 8, Sampling(4, 1.0), seeds)]
            right = sum(bool(re.search(row["answer"], reply)) for reply in replies)
            assert (found.greedy, found.right) == (bool(re.search(row["answer"], greedy[number])), right)
            assert (found.line in files[found.file].read_text(), found.file) == (True, int(number > 4))
    assert {0 < found.right < 8 for found in study.asked(loaded, list(map(str, files)))} == {True, False}


def candidates(study: ModuleType, *many: tuple[int, int, bool, int]) -> list[Any]:
    """For each ``(how many, file, greedy, right)``."""
    return [
        study.Asked(f"{group}-{n}", file, greedy, right)
        for group, (count, file, greedy, right) in enumerate(many)
        for n in range(count)
    ]


def test_five_of_six_are_steady_and_none_is_between(study: ModuleType) -> None:
    between = [(20, 0, True, right) for right in (3, 4, 5)]
    steady, seldom = [(9, 1, True, 6), (9, 1, False, 7), (9, 1, True, 8)], [(5, 1, True, 2), (5, 1, False, 0)]
    found = study.chosen(candidates(study, *between, *steady, *seldom), 12)
    assert len({q.line for q in found}) == 12
    assert Counter(q.right >= 6 for q in found) == {True: 10, False: 2}
    assert all(q.right >= 6 or q.right <= 2 for q in found)
    greedy, mean = study.means(found)
    assert greedy == sum(q.greedy for q in found) / 12
    assert mean == sum(q.right for q in found) / 96
    assert abs(greedy - mean) <= study.AGREE


def test_the_first_file_goes_first_and_the_draw_is_the_same_each_time(study: ModuleType) -> None:
    many = candidates(study, (3, 0, True, 8), (40, 1, True, 8), (1, 0, False, 0), (9, 1, False, 0))
    found = study.chosen(many, 12)
    assert sum(q.file == 0 for q in found) == 4
    assert found == study.chosen(many, 12)
    assert [q.line for q in found] != sorted(q.line for q in found)


def test_without_agreement_the_nearest_draw_is_taken(study: ModuleType) -> None:
    many = candidates(study, (10, 0, True, 6), (1, 1, False, 0), (1, 1, False, 1), (1, 1, False, 2))
    assert sorted(q.right for q in study.chosen(many, 12))[:2] == [1, 2]


def test_too_few_are_refused(study: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"^9 steady and 2 others, expected 10 and 2: write more$"):
        study.chosen(candidates(study, (9, 0, True, 8), (2, 0, False, 0), (20, 0, True, 4)), 12)
