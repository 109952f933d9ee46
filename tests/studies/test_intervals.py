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


def test_seeds_without_a_spread_have_no_interval(intervals: ModuleType) -> None:
    assert intervals.interval_text(None, None) == ""
    assert intervals.cell([0.5]) == "0.50"
    assert intervals.cell([1.0, 1.0, 1.0], digits=3) == "1.000"
