"""Tables of results on a terminal of 80 columns: nothing is cut off."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfdistill.comparison import CompareResult
from selfdistill.continual import LearnResult
from selfdistill.evaluation import EvalResult
from selfdistill.runtime import Printable


def on_80_columns(result: Printable) -> str:
    console = Console(file=StringIO(), width=80, force_terminal=False)
    result.print(console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    return str(said)


def test_of_a_comparison_with_several_seeds() -> None:
    row = {"method": "sdft teacher=frozen", "learning_rate": 1e-4, "steps": 1200, "seeds": 3, "seconds": 60_000.0}
    row |= {"accuracy": (0.751, 0.61, 0.89), "prior_accuracy": (0.712, 0.69, 0.73), "kl_base": (0.123, 0.1, 0.15)}
    details = {
        "data": "a/very/long/path/to/the/folder/of/demonstrations/and/more/data.jsonl",
        "test": "test.jsonl",
        "base": {"items": 20, "accuracy": 0.152, "prior_accuracy": 0.803},
        "teacher": {"accuracy": 0.9, "kl": 0.2, "items": 20},
        "rag": {"accuracy": 0.954, "items": 20},
        "table": [row, row | {"method": "an_arm_with_a_long_name_in_one_word"}],
        "sentence": "",
    }
    said = on_80_columns(CompareResult(Path("folder"), details))
    numbers = "1200 0.751 (0.61, 0.89) 0.712 (0.69, 0.73) 0.123 (0.100, 0.150) 1000.0 0.152 0.803 0.954"
    assert [number for number in numbers.split() if number not in said] == []


@pytest.mark.parametrize(("p", "shown"), [(0.045, "0.045"), (1e-9, "<0.001")])
def test_of_an_evaluation_beside_the_base(p: float, shown: str) -> None:
    scores: dict[str, Any] = {"accuracy": 0.751, "accuracy_interval": (0.61, 0.89), "completion/thinking": 0}
    scores |= {f"completion/{key}": 1.0 for key in ("length", "said", "truncated")}
    paired = {"difference": 0.123, "low": 0.01, "high": 0.23, "p": p, "unlike": 0.2}
    details = {**scores, "items": 12345, "dropped": 0, "scorers": ["python:my_package.my_module.my_function"]}
    details |= {"base": scores | {"accuracy": 0.628}, "settings": {"context": None}, "paired": {"accuracy": paired}}
    said = on_80_columns(EvalResult("a/folder/of/a/model", "test.jsonl", details))
    numbers = f"12345 0.751 (0.61, 0.89) 0.628 +0.123 (0.01, 0.23) {shown}"
    assert [number for number in numbers.split() if number not in said] == []


@pytest.mark.parametrize("count", [1, 4, 25])
def test_of_the_retention_of_many_skills(count: int) -> None:
    names = [f"skill-number-{number}" for number in range(count)]
    scores = [[(100 * row + column) / 10_000 for column in range(count)] for row in range(count + 1)]
    matrix = [
        [score if column < row or row == 0 else None for column, score in enumerate(line)]
        for row, line in enumerate(scores)
    ]
    details = {"skills": names, "items": [20] * count, "matrix": matrix, "prior": [0.9] * (count + 1), "transfer": None}
    details |= {"prior_items": 240, "must_keep": [0.5] * count, "pending": None, "model": "m"}
    said = on_80_columns(LearnResult("status", "state", details))
    numbers = [f"{score:.3f}" for line in matrix for score in line if score is not None]
    assert [number for number in numbers if number not in said] == []
