"""Means with intervals in the tables of studies."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def intervals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "studies")
    return import_module("intervals")


def test_an_interval_lies_within_what_is_possible(intervals: ModuleType) -> None:
    assert intervals.interval_text(-0.1, 1.02, 1.0) == " (0.00 to 1.00)"
    assert intervals.interval_text(0.25, 1.25) == " (0.25 to 1.25)"
    assert intervals.cell([0.9, 1.0]) == "0.95 (0.31 to 1.00)"


def test_the_shares_of_a_sequence_are_not_negative(intervals: ModuleType) -> None:
    sequence = import_module("sequence")
    names = list(sequence.SKILLS)
    runs = [
        {"matrix": [[last] * len(names)] * (len(names) + 1), "prior": [0.5] * (len(names) + 1)}
        | {"alone": dict.fromkeys(names, 0.5)}
        for last in (0.0, 0.7)
    ]
    assert sequence.table("sft", runs)[-1].startswith("| last, as a share of alone | 0.70 (0.00 to 9.59) | ")


def test_seeds_without_a_spread_have_no_interval(intervals: ModuleType) -> None:
    assert intervals.interval_text(None, None) == ""
    assert intervals.cell([0.5]) == "0.50"
    assert intervals.cell([1.0, 1.0, 1.0], digits=3) == "1.000"
