"""Eight small runs give the numbers that were pinned before: no change of structure may move them."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest

PINNED = json.loads(golden.PINNED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", golden.RUNS)
def test_every_metric_is_the_pinned_one(name: str, tmp_path: Path) -> None:
    found = golden.numbers(golden.run(name, tmp_path))
    assert found.keys() == PINNED[name].keys()
    for metric, values in found.items():
        # Float32 sums in another order differ by 1e-6; ten steps of Adam make at most a few 1e-5 of it.
        assert values == [None if x is None else pytest.approx(x, rel=1e-3, abs=1e-5) for x in PINNED[name][metric]], (
            metric
        )
