"""Columns that mean something to other tools: refused by name, so that no advice leads to lost text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.errors import UserError

GOOD = {"prompt": "2+2?", "completion": "4"}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]


def problem_of(row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        load_demonstrations([row])
    message = str(caught.value)
    assert message.startswith("data: 1 bad row: data[0], ")
    return message.removeprefix("data: 1 bad row: data[0], ")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"instruction": "Translate.", "input": "night", "output": "Nacht"},
            "column 'prompt': missing, found 'instruction' and 'input'; join them in 'prompt' (see docs/data.md) and "
            "column 'completion': missing, found 'output'; rename it to 'completion'",
        ),
        (
            {"instruction": "Translate.", "input": "", "output": "Nacht"},
            "column 'prompt': missing, found 'instruction' and 'input'; join them in 'prompt' (see docs/data.md) and "
            "column 'completion': missing, found 'output'; rename it to 'completion'",
        ),
        (
            {"instruction": "Translate.", "output": "Nacht"},
            "column 'prompt': missing, found 'instruction'; rename it to 'prompt' and "
            "column 'completion': missing, found 'output'; rename it to 'completion'",
        ),
        (
            {"instruction": "", "input": None, "completion": "Nacht"},
            "column 'prompt': missing, expected 'prompt' with 'completion', or 'messages'",
        ),
        (
            {"question": "Who?", "context": None, "completion": "he"},
            "column 'prompt': missing, found 'question' and 'context'; join them in 'prompt' (see docs/data.md)",
        ),
        (
            {"system": "s", "instruction": "i", "input": "x", "history": [["a", "b"]], "output": "o"},
            "column 'prompt': missing, found 'system', 'instruction', 'input' and 'history'; join them in 'prompt' "
            "(see docs/data.md) and "
            "column 'completion': missing, found 'output'; rename it to 'completion'",
        ),
        (
            {"question": "Who?", "context": "A text.", "answer": "he"},
            "column 'prompt': missing, found 'question' and 'context'; join them in 'prompt' (see docs/data.md)",
        ),
        (
            {"instruction": "Who?", "context": "A text.", "completion": "he"},
            "column 'prompt': missing, found 'instruction' and 'context'; join them in 'prompt' (see docs/data.md)",
        ),
        (
            {"system_prompt": "s", "question": "q", "response": "r"},
            "column 'prompt': missing, found 'system_prompt' and 'question'; join them in 'prompt' (see docs/data.md) "
            "and column 'completion': missing, found 'response'; rename it to 'completion'",
        ),
        (
            {"conversations": TURNS},
            "column 'prompt': missing, found 'conversations' with from and value; write 'messages' with role "
            "(human: user, gpt: assistant) and content (see docs/data.md)",
        ),
        (
            {"messages": TURNS},
            "column 'messages[0]': found from and value, expected role (human: user, gpt: assistant) and content (see "
            "docs/data.md) and column 'messages[1]': found from and value, expected role (human: user, gpt: assistant) "
            "and content (see docs/data.md)",
        ),
    ],
)
def test_the_parts_of_a_prompt_are_named_together(row: dict[str, Any], problem: str) -> None:
    assert problem_of(row) == problem


@pytest.mark.parametrize("column", ["golden_response", "output_text"])
def test_the_authors_names_of_the_completion_are_known(column: str) -> None:
    want = f"column 'completion': missing, found {column!r}; rename it to 'completion'"
    assert problem_of({"prompt": "q", column: "a"}) == want


@pytest.mark.parametrize(
    ("column", "value", "advice"),
    [
        ("input", "night", "put its text into the prompt, or leave it out if it is there"),
        ("instruction", "Translate.", "put its text into the prompt, or leave it out if it is there"),
        ("teacher_prompt", TURNS, "write its text as 'privileged_context', with context rewritten"),
        (
            "context",
            "A text.",
            "put its text into the prompt, or name it 'document' if only the teacher should read it",
        ),
        ("system", "Be brief.", "write it as the system message that begins the prompt"),
        ("System", "Be brief.", "write it as the system message that begins the prompt"),
        ("system_prompt", "Be brief.", "write it as the system message that begins the prompt"),
        ("history", [["a", "b"]], "write it as earlier messages of the prompt"),
        ("videos", ["a.mp4"], "only text and pictures are supported; leave it out"),
        ("audio", "a.wav", "only text and pictures are supported; leave it out"),
        ("functions", [{"name": "f"}], "write them as 'tools'"),
        (
            "rejected",
            "five",
            "preference pairs are not supported; leave it out, and rename 'chosen' to 'completion'",
        ),
        ("conversations", TURNS, "keep either the prompt or the conversation"),
        ("label", False, "it marks good and bad completions; keep the good rows, and leave it out"),
    ],
)
def test_a_column_that_would_be_lost_is_refused(column: str, value: Any, advice: str) -> None:
    assert problem_of(GOOD | {column: value}) == f"column {column!r}: not read, {advice}"
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}
    assert problem_of(chat | {column: value}) == f"column {column!r}: not read, {advice}"


def test_the_table_in_the_documentation_names_what_is_refused() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = text.partition("## Alpaca, ShareGPT and other formats")[2]
    table = section.partition("\n\nA note names any other unused column")[0]
    named = [
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall("`(\\w+)`", line.split("|")[1])
    ]
    assert len(named) == len(set(named)) > 15
    for column in named:
        assert problem_of(GOOD | {column: True}).startswith(f"column {column!r}: not read, ")


@pytest.mark.parametrize("column", ["input", "system", "history", "images", "rejected", "context"])
@pytest.mark.parametrize("empty", [None, "", " ", [], {}])
def test_empty_ones_are_not_missed(column: str, empty: Any) -> None:
    assert load_demonstrations([GOOD | {column: empty}])[0].completion == "4"


def test_a_class_beside_a_completion_is_only_not_used() -> None:
    notes: list[str] = []
    load_demonstrations([GOOD | {"label": 3}], note=notes.append)
    assert notes == ["data: columns not used: label (did you mean 'answer'?)"]


def test_a_column_that_the_rows_have_is_no_guess() -> None:
    notes: list[str] = []
    load_demonstrations([GOOD | {"question": "2 + 2?", "label": 3, "answer": "4"}], note=notes.append)
    assert notes == ["data: columns not used: question, label"]


def test_advice_about_names_followed_to_its_end_loses_no_text() -> None:
    """Each renaming that a message proposes is done, until the rows are read or no more is proposed."""
    rows: list[dict[str, Any]] = [
        {"instruction": "Translate.", "input": "night", "output": "Nacht"},
        {"question": "Who?", "context": "A text.", "response": "he"},
        {"query": "Who?", "system": "Be brief.", "chosen": "he", "rejected": "she"},
        {"input": "Who?", "history": [["a", "b"]], "target": "he"},
    ]
    for row in rows:
        while True:
            try:
                (read,) = load_demonstrations([row])
            except UserError as error:
                message = str(error)
            else:
                texts = {read.prompt[-1]["content"], read.completion}
                assert all(value in texts for value in row.values())
                break
            if "; rename it to '" not in message or "join them" in message:
                break
            old, new = (
                message.partition("found '")[2].split("'")[0],
                message.partition("rename it to '")[2].split("'")[0],
            )
            row = {new if column == old else column: value for column, value in row.items()}
