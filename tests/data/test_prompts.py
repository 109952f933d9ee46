"""Prompts without answers, such as anchors: what is asked of their rows, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfdistill.data.prompts import load_prompts
from selfdistill.errors import UserError


@pytest.mark.parametrize("kind", ["file", "rows"])
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"body": "Who?"}, "column 'prompt': missing, expected 'prompt' or 'messages'"),
        ({"question": "Who?"}, "column 'prompt': missing, found 'question'; rename it to 'prompt'"),
        ({"body": "Who?", "response": "I."}, "column 'prompt': missing, expected 'prompt' or 'messages'"),
        (
            {"prompt": "Who?", "messages": [{"role": "user", "content": "Who?"}]},
            "has 'prompt' and 'messages', expected either 'messages' or 'prompt'",
        ),
    ],
)
def test_messages_about_prompts_ask_for_no_completion(
    tmp_path: Path, kind: str, row: dict[str, Any], told: str
) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as found:
        load_prompts(str(tmp_path / "p.jsonl") if kind == "file" else [row], name="anchors")
    assert str(found.value).endswith(told)


def test_another_name_of_the_answer_is_no_mistake_in_a_prompt() -> None:
    notes: list[str] = []
    rows = [{"prompt": "Who?", "response": "I."}, {"prompt": "When?", "completion": "Now."}]
    found = load_prompts(rows, notes.append, "anchors")
    assert [(row.prompt[0]["content"], row.completion) for row in found] == [("Who?", ""), ("When?", "")]
    assert notes == ["anchors: columns not used: response"]


def test_prompts_that_differ_in_their_answers_alone_are_equal() -> None:
    notes: list[str] = []
    load_prompts([{"prompt": "Who?", "completion": text} for text in ("I.", "You.")], notes.append, "anchors")
    assert notes == ["anchors: 1 row repeats an earlier one (anchors[0] and anchors[1])"]
