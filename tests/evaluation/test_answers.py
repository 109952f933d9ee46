"""Answers that their scorers cannot use are refused together, before the first reply."""

from __future__ import annotations

from typing import Any

import pytest

from selfdistill.data import Demonstration
from selfdistill.errors import UserError
from selfdistill.evaluation.answers import check_answers


def row(answer: Any, number: int, scorer: str | None = None) -> Demonstration:
    return Demonstration(({"role": "user", "content": "q"},), answer=answer, scorer=scorer, source=f"a.jsonl:{number}")


def test_tests_that_cannot_run_are_named_with_their_rows() -> None:
    rows = [row("f(1) == 1", 1), row("f(1", 2), row(None, 3), row("4", 4, "exact"), row("a(", 5, "regex")]
    with pytest.raises(UserError) as error:
        check_answers(rows, "code")
    message = str(error.value)
    assert message.startswith("3 rows cannot be scored: a.jsonl:2: scorer 'code' cannot use answer \"f(1\": test 1: ")
    assert "a.jsonl:3: scorer 'code' needs tests; add the column 'answer'" in message
    assert "a.jsonl:5: scorer 'regex' cannot use answer" in message
    check_answers([rows[0], rows[3]], "code")
