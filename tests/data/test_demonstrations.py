"""Rows in, demonstrations or one exact message out."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from selfdistill.data.demonstrations import (
    SCORER_NAMES,
    Demonstration,
    Lacks,
    load_demonstrations,
    nothing_to_show,
    write_demonstrations,
)
from selfdistill.data.scorers import nothing_to_score
from selfdistill.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "skills"
USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
GOOD = {"prompt": "2+2?", "completion": "4"}


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, so that messages can be asserted whole."""
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: Any) -> str:
    """A .jsonl file; a row of type str is written as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return name


def message_of(path: str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_demonstrations(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- good rows ---


def test_prompt_and_completion_as_text() -> None:
    row = GOOD | {"document": "d", "privileged_context": "p", "answer": [1, {"a": None}], "scorer": "exact", "id": 7}
    assert load_demonstrations(write("train.jsonl", row)) == [
        Demonstration((USER,), "4", "d", "p", [1, {"a": None}], "exact", 0, "train.jsonl:1")
    ]


@pytest.mark.parametrize(
    ("row", "turns", "completion"),
    [
        ({"prompt": [USER], "completion": "4"}, (USER,), "4"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, (USER,), "4"),
        ({"prompt": [{"role": "system", "content": "s"}, USER]}, ({"role": "system", "content": "s"}, USER), ""),
        ({"prompt": [{"content": "q", "role": "user"}]}, ({"role": "user", "content": "q"},), ""),
        ({"prompt": [{"name": None, **USER}], "completion": [{"tool_calls": None, **ASSISTANT}]}, (USER,), "4"),
        ({"messages": [USER, ASSISTANT]}, (USER,), "4"),
    ],
)
def test_messages_may_be_their_json_text(row: dict[str, Any], turns: Any, completion: str) -> None:
    texts = {name: value if isinstance(value, str) else json.dumps(value, indent=1) for name, value in row.items()}
    datasets.Dataset.from_list([texts]).to_csv("a.csv")
    datasets.Dataset.from_list([texts]).to_parquet("a.parquet")
    for path in (write("a.jsonl", texts), "a.csv", "a.parquet"):
        (demonstration,) = load_demonstrations(path)
        assert (demonstration.prompt, demonstration.completion) == (turns, completion)


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'q'}]",
        "[{'content': 'q', 'role': 'user'}\n {'content': 'r', 'role': 'assistant'}]",
        "[{'from': 'human', 'value': 'q'}]",
        "[{'name': None, 'role': 'user', 'content': 'q'}]",
        '[{"role": "user", "content": "it\'s", "name": None}]',
    ],
)
@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_messages_as_python_writes_them_are_refused(column: str, text: str) -> None:
    problem = f"column '{column}': found the text of a Python list, expected a list or its JSON text"
    assert message_of(write("a.jsonl", {column: text})) == f"a.jsonl: 1 bad row: line 1, {problem}"
    both = {"prompt": json.dumps([USER]), "completion": text}
    assert "column 'completion': found the text of a Python list" in message_of(write("a.jsonl", both))


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[]",
        "[INST] q",
        '{"role": "user"}',
        '["a", "b"]',
        "What is [{'role': 'user'}]?",
        '[{"name": "Ada", "role": "chair"}]',
    ],
)
def test_other_texts_in_brackets_stay_text(text: str) -> None:
    (row,) = load_demonstrations(write("a.jsonl", {"prompt": text, "completion": json.dumps([ASSISTANT])}))
    assert (row.prompt[0]["content"], row.completion) == (text, json.dumps([ASSISTANT]))


def test_completion_is_kept_letter_for_letter() -> None:
    completion = " 4\u2028\n\tfour \U0001f600 "
    (demonstration,) = load_demonstrations(write("train.jsonl", {"prompt": " q ", "completion": completion}))
    assert demonstration.completion == completion
    assert demonstration.prompt == ({"role": "user", "content": " q "},)


def test_unescaped_line_separator_is_no_line_end() -> None:
    write("train.jsonl", json.dumps({"prompt": "a\u2028b", "completion": "c\x85d"}, ensure_ascii=False))
    assert load_demonstrations("train.jsonl")[0].completion == "c\x85d"


def test_prompt_and_completion_as_messages() -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": [system, USER, ASSISTANT, USER | {"name": None}], "completion": [ASSISTANT]}
    (demonstration,) = load_demonstrations(write("train.jsonl", row))
    assert demonstration.prompt == (system, USER, ASSISTANT, USER)
    assert demonstration.completion == "4"


@pytest.mark.parametrize("empty", [None, "", " \n", [], {}])
@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "name", "function_call"])
def test_an_empty_key_of_a_message_counts_as_absent(key: str, empty: Any) -> None:
    (demonstration,) = load_demonstrations([{"messages": [USER | {key: empty}, ASSISTANT | {key: empty}]}])
    assert (demonstration.prompt, demonstration.completion) == ((USER,), "4")


def test_messages_end_with_the_demonstration() -> None:
    last = {"role": "assistant", "content": "five"}
    (demonstration,) = load_demonstrations(write("train.jsonl", {"messages": [USER, ASSISTANT, USER, last]}))
    assert demonstration.prompt == (USER, ASSISTANT, USER)
    assert demonstration.completion == "five"


def test_null_is_absent() -> None:
    nulls = dict.fromkeys(("messages", "document", "privileged_context", "answer", "scorer"))
    (demonstration,) = load_demonstrations(write("train.jsonl", GOOD | nulls))
    assert demonstration == Demonstration((USER,), "4", source="train.jsonl:1")


def test_blank_lines_bom_and_carriage_returns() -> None:
    line = json.dumps(GOOD).encode()
    Path("train.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    rows = load_demonstrations("train.jsonl")
    assert [(row.row, row.source) for row in rows] == [(0, "train.jsonl:1"), (1, "train.jsonl:4")]


def test_equal_rows_are_kept() -> None:
    assert len(load_demonstrations(write("train.jsonl", GOOD, GOOD))) == 2


@pytest.mark.parametrize("name", SCORER_NAMES)
def test_scorer_names(name: str) -> None:
    assert load_demonstrations(write("train.jsonl", GOOD | {"scorer": name}))[0].scorer == name


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "answer": 4},
        {"prompt": [USER], "completion": None, "answer": 4},
        {"messages": [USER], "answer": 4},
    ],
)
def test_rows_without_completion(row: dict[str, Any]) -> None:
    (demonstration,) = load_demonstrations(write("test.jsonl", row))
    assert demonstration == Demonstration((USER,), answer=4, source="test.jsonl:1")


# --- sources ---


def test_json_and_parquet_name_items_and_rows() -> None:
    Path("a.json").write_text(json.dumps([GOOD, GOOD]))
    datasets.Dataset.from_list([{"prompt": [USER], "completion": [ASSISTANT], "answer": None}] * 2).to_parquet(
        "b.parquet"
    )
    assert [row.source for row in load_demonstrations("a.json")] == ["a.json[0]", "a.json[1]"]
    rows = load_demonstrations("b.parquet")
    assert rows[1] == Demonstration((USER,), "4", row=1, source="b.parquet[1]")


def test_folder_is_read_in_order_of_name() -> None:
    Path("data").mkdir()
    write("data/b.jsonl", GOOD)
    Path("data/a.json").write_text(json.dumps([GOOD]))
    Path("data/README.md").write_text("notes")
    rows = load_demonstrations("data")
    assert [(row.row, row.source) for row in rows] == [(0, "data/a.json[0]"), (1, "data/b.jsonl:1")]


def test_saved_data_set() -> None:
    one = datasets.Dataset.from_list([GOOD])
    two = datasets.Dataset.from_list([GOOD, {"prompt": "q", "completion": "r"}])
    one.save_to_disk("one")
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk("both")
    assert [row.source for row in load_demonstrations("one")] == ["one[0]"]
    assert [row.completion for row in load_demonstrations("both", split="test")] == ["4", "r"]
    assert message_of("both", split="dev") == (
        "both: no split 'dev' in this data set, expected train or test (setting 'split')"
    )


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> datasets.DatasetDict:
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([GOOD | {"answer": f"{name} {split}"}]) for split in ("train", "test")}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    (demonstration,) = load_demonstrations("owner/name-1.5", split="test")
    assert demonstration == Demonstration((USER,), "4", answer="owner/name-1.5 test", source="owner/name-1.5[0]")


def test_hub_data_set_in_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert message_of("owner/name") == (
        "owner/name: no such file, and the hub was not asked for a data set, because offline mode "
        "(HF_HUB_OFFLINE) is on"
    )


def test_hub_data_set_with_several_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert message_of("owner/name") == (
        "owner/name: no such file, and no readable hub data set: Config name is missing. Please pick one among the "
        "available configs: ['main', 'socratic']; load one configuration with datasets, write it with "
        "save_to_disk and give that folder"
    )


def test_hub_data_set_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert message_of("owner/name") == (
        "owner/name: no such file, and no readable hub data set: Couldn't reach 'owner/name' on the Hub"
    )


@pytest.mark.parametrize(
    "path", ["train.jsonl", "data/train.csv", "./data", "a/b/c", "/nowhere", "../up", "rows.txt", "folder/other"]
)
def test_missing_path_is_not_looked_for_on_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "folder" / "training").mkdir(parents=True)
    assert message_of(path) == f"{path}: no such file or folder (looked from {tmp_path}); check the path"
    meant = f"folder/traning: no such file or folder (looked from {tmp_path}); did you mean training?"
    assert message_of("folder/traning") == meant


# --- bad rows: each alone in line 2, after a good one ---

CHAT_ROLES = "system, user, assistant or tool"
BAD_ROWS: list[tuple[Any, str]] = [
    ({"prompt": "q", "response": "r"}, "column 'completion': missing, found 'response'; rename it to 'completion'"),
    ({"prompt": "q", "Completion": "r"}, "column 'completion': missing, found 'Completion'; rename it to 'completion'"),
    (
        {"prompt": "q", "completion": ""},
        "column 'completion': found empty text, expected text or a list of one assistant message",
    ),
    (
        {"prompt": "q", "completion": " \n"},
        "column 'completion': found only whitespace, expected text or a list of one assistant message",
    ),
    (
        {"prompt": "q", "completion": 4},
        "column 'completion': found the number 4, expected text or a list of one assistant message",
    ),
    (
        {"prompt": "q", "completion": True},
        "column 'completion': found true, expected text or a list of one assistant message",
    ),
    (
        {"prompt": "q", "completion": []},
        "column 'completion': found an empty list, expected text or a list of one assistant message",
    ),
    (
        {"prompt": "q", "completion": ASSISTANT},
        "column 'completion': found an object, expected text or a list of one assistant message",
    ),
    (
        {"prompt": "q", "completion": [ASSISTANT, ASSISTANT]},
        "column 'completion': found two assistant turns in a row, expected a tool or user turn in between",
    ),
    (
        {"prompt": "q", "completion": [USER]},
        "column 'completion': found messages of user, expected one assistant message, or turns from an "
        "assistant's to an assistant's",
    ),
    (
        {"prompt": "q", "completion": [{"role": "assistant", "content": None}]},
        "column 'completion[0].content': found null, expected text",
    ),
    (
        {"prompt": "q", "completion": "\ud83d"},
        "column 'completion': found '\\ud83d' with a lone surrogate, expected text or a list of one assistant message",
    ),
    ({"prompt": None, "completion": "r"}, "column 'prompt': found null, expected text or a list of messages"),
    ({"prompt": "", "completion": "r"}, "column 'prompt': found empty text, expected text or a list of messages"),
    ({"prompt": 0, "completion": "r"}, "column 'prompt': found the number 0, expected text or a list of messages"),
    ({"prompt": [], "completion": "r"}, "column 'prompt': found an empty list, expected a list of messages"),
    ({"completion": "r"}, "column 'prompt': missing, expected 'prompt' with 'completion', or 'messages'"),
    ({}, "column 'prompt': missing, expected 'prompt' with 'completion', or 'messages'"),
    ({"prompts": "q", "completion": "r"}, "column 'prompt': missing, found 'prompts'; rename it to 'prompt'"),
    (
        {"question": "q", "output": "r"},
        "column 'prompt': missing, found 'question'; rename it to 'prompt' and "
        "column 'completion': missing, found 'output'; rename it to 'completion'",
    ),
    ({"conversations": [USER]}, "column 'prompt': missing, found 'conversations'; rename it to 'messages'"),
    ({"prompt": ["q"], "completion": "r"}, "column 'prompt[0]': found 'q', expected an object with role and content"),
    (
        {"prompt": [{"content": "q"}], "completion": "r"},
        f"column 'prompt[0].role': found null, expected {CHAT_ROLES}",
    ),
    (
        {"prompt": [{"role": "human", "content": "q"}], "completion": "r"},
        f"column 'prompt[0].role': found 'human', expected {CHAT_ROLES}",
    ),
    (
        {"prompt": [USER, {"role": "tool", "content": "3"}], "completion": "r"},
        "column 'prompt[1]': found a tool message without a call, expected one after tool_calls",
    ),
    (
        {"prompt": [USER, {"role": "system", "content": "s"}], "completion": "r"},
        "column 'prompt[1].role': found 'system', expected only in the first message",
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}], "completion": "r"},
        "column 'prompt[0].content[0]': found an object, expected an object with type and text",
    ),
    (
        {"prompt": [USER | {"tool_calls": [1]}], "completion": "r"},
        "column 'prompt[0]': found key 'tool_calls', expected only role and content; only the assistant calls tools",
    ),
    (
        {"prompt": "q", "completion": [ASSISTANT | {"function_call": {"name": "f"}}]},
        "column 'completion[0]': found key 'function_call', expected only role, content and tool_calls; write it as "
        "tool_calls (see docs/data.md)",
    ),
    (
        {"prompt": "q", "completion": [ASSISTANT | {"reasoning_content": "so"}]},
        "column 'completion[0]': found key 'reasoning_content', expected only role, content and tool_calls; put "
        "it into content as <think>...</think>",
    ),
    (
        {"prompt": [USER | {"weight": 0}], "completion": "r"},
        "column 'prompt[0]': found key 'weight', expected only role and content; leave it out; put turns that are not "
        "learnt into 'prompt', and the rest into 'completion'",
    ),
    (
        {"prompt": [USER | {"name": "Ada"}], "completion": "r"},
        "column 'prompt[0]': found key 'name', expected only role and content; write it into content, or leave it out",
    ),
    (
        {"prompt": [{"role": "developer", "content": "s"}, USER], "completion": "r"},
        f"column 'prompt[0].role': found 'developer', expected {CHAT_ROLES}; write 'system'",
    ),
    (
        {"prompt": "q", "completion": [{"role": "assistant", "content": " ", "tool_calls": []}]},
        "column 'completion[0]': found neither content nor tool_calls, expected one of them",
    ),
    (
        {"prompt": [USER, ASSISTANT], "completion": "r"},
        "column 'prompt': the prompt ends with an assistant turn, expected it to end with a user turn",
    ),
    (GOOD | {"document": 3}, "column 'document': found the number 3, expected text or null"),
    (GOOD | {"privileged_context": " "}, "column 'privileged_context': found only whitespace, expected text or null"),
    (GOOD | {"answer": ""}, "column 'answer': found empty text, expected a value or null"),
    (
        GOOD | {"scorer": "exactly"},
        "column 'scorer': found 'exactly', expected exact, contains, choice, regex or tool_call",
    ),
    (
        GOOD | {"scorer": ["exact"]},
        "column 'scorer': found a list of 1, expected exact, contains, choice, regex or tool_call",
    ),
    (
        GOOD | {"messages": [USER, ASSISTANT]},
        "has 'prompt' and 'messages', expected either 'messages' or 'prompt' with 'completion'",
    ),
    ({"messages": [USER, ASSISTANT]}, "has 'messages' but line 1 has 'prompt'; use one form in the whole set"),
    ([GOOD], "found a list of 1, expected an object"),
    ('"text"', "found 'text', expected an object"),
    ('{"prompt": "q", "completion": "r"', "invalid JSON at character 34: Expecting ',' delimiter"),
    ('{"prompt": "q', "invalid JSON at character 12: a text begins there and has no closing quote"),
    (
        '{"prompt": "a\tb"}',
        r"invalid JSON at character 14: a text has a line break, a tab or the like there; write it as \n or \t",
    ),
    ("{'prompt': 'q'}", "invalid JSON at character 2: Expecting property name enclosed in double quotes"),
    ('{"prompt": "q", "completion": "r"} {}', "invalid JSON at character 36: Extra data"),
    ('{"prompt": "q", "answer": NaN}', "invalid JSON: NaN is not a JSON value"),
    ('{"prompt": "q", "prompt": "p", "completion": "r"}', "duplicate key 'prompt'; remove one"),
    (
        '{"prompt": [{"role": "user", "role": "user", "content": "q"}], "completion": "r"}',
        "duplicate key 'role'; remove one",
    ),
    (
        {"prompt": [USER | {"role": "x"}], "completion": "", "document": 3},
        "column 'completion': found empty text, expected text or a list of one assistant message and "
        f"column 'prompt[0].role': found 'x', expected {CHAT_ROLES} and "
        "column 'document': found the number 3, expected text or null",
    ),
]


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS)
def test_bad_row(row: Any, problem: str) -> None:
    path = write("train.jsonl", GOOD, row)
    assert message_of(path) == f"train.jsonl: 1 bad row: line 2, {problem}"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "column 'messages': found an empty list, expected a list of messages"),
        ({"messages": None}, "column 'messages': found null, expected a list of messages"),
        ({"messages": "q"}, "column 'messages': found 'q', expected a list of messages"),
        ({"messages": [ASSISTANT]}, "column 'messages': the prompt is empty, expected it to end with a user turn"),
        (
            {"messages": [USER, ASSISTANT, ASSISTANT]},
            "column 'messages': the prompt ends with an assistant turn, expected it to end with a user turn",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            "column 'messages[1].content': found empty text, expected text",
        ),
    ],
)
def test_bad_messages(row: Any, problem: str) -> None:
    path = write("train.jsonl", row)
    assert message_of(path) == f"train.jsonl: 1 bad row: line 1, {problem}"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "response": "r"}, "column 'completion': missing, found 'response'; rename it to 'completion'"),
        ({"prompt": "q", "anwser": "r"}, "column 'completion': missing, found 'anwser'; rename it to 'answer'"),
        (
            {"messages": [USER], "privilaged_context": "r"},
            "column 'completion': missing, found 'privilaged_context'; rename it to 'privileged_context'",
        ),
        ({"prompt": "q", "answers": "4"}, "column 'completion': missing, found 'answers'; rename it to 'answer'"),
        (
            {"prompt": "q", "completion": "", "answer": 4},
            "column 'completion': found empty text, expected text or a list of one assistant message",
        ),
    ],
)
def test_bad_row_without_completion(row: Any, problem: str) -> None:
    assert message_of(write("test.jsonl", row)) == f"test.jsonl: 1 bad row: line 1, {problem}"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("answer", "\ud83d"),
        ("answer", {"a": ["\ud83d"]}),
        ("answer", {"\ud83d": 1}),
        ("tools", [{"type": "function", "function": {"name": "clock", "description": "\ud83d"}}]),
        ("chat_template_kwargs", {"style": "\ud83d"}),
    ],
)
def test_a_value_that_utf_8_cannot_hold_is_refused(column: str, value: Any) -> None:
    problem = f"column '{column}': found a lone surrogate, expected text"
    assert message_of(write("a.jsonl", GOOD | {column: value})) == f"a.jsonl: 1 bad row: line 1, {problem}"


@pytest.mark.parametrize("column", ["answer", "tools", "chat_template_kwargs"])
def test_a_value_in_memory_that_is_not_json_is_refused(column: str) -> None:
    held = {"today": datetime.date(2026, 1, 1)}
    with pytest.raises(UserError) as error:
        load_demonstrations([GOOD | {column: [held] if column == "tools" else held}])
    problem = f"column '{column}': found a value that is not JSON, expected JSON values"
    assert str(error.value) == f"data: 1 bad row: data[0], {problem}"


def test_equal_mistakes_are_told_once_with_their_lines() -> None:
    bad = {"prompt": "q", "completion": ""}
    want = "expected text or a list of one assistant message"
    assert message_of(write("train.jsonl", GOOD, *[bad] * 12)) == (
        f"train.jsonl: 12 bad rows: lines 2, 3, 4 and 9 more: column 'completion': found empty text, {want}"
    )
    rows = [GOOD, bad, {"question": "q", "completion": "r"}, bad | {"completion": 1}, bad | {"completion": True}]
    assert message_of(write("train.jsonl", *rows)) == (
        f"train.jsonl: 4 bad rows: lines 2, 4, 5: column 'completion': found empty text, the number 1, ..., {want}; "
        "line 3, column 'prompt': missing, found 'question'; rename it to 'prompt'"
    )


def test_a_mistake_in_every_row_is_told_without_lines() -> None:
    row = {"question": "q", "completion": "r"}
    message = "rows.jsonl: all 6 rows: column 'prompt': missing, found 'question'; rename it to 'prompt'"
    assert message_of(write("rows.jsonl", *[row] * 6)) == message
    assert message_of(write("rows.jsonl", row)).startswith("rows.jsonl: 1 bad row: line 1, column 'prompt': missing")


def test_the_first_ten_reasons_are_told_and_the_others_counted() -> None:
    rows = ["{" + " " * number + "x" for number in range(12)]
    message = message_of(write("train.jsonl", GOOD, *rows))
    assert message.startswith("train.jsonl: 12 bad rows: line 2, invalid JSON at character 2: ")
    assert message.endswith("; ... and 2 more")
    assert message.count("invalid JSON") == 10


def test_bad_rows_of_other_sources() -> None:
    bad = GOOD | {"completion": " "}
    problem = "column 'completion': found only whitespace, expected text or a list of one assistant message"
    Path("a.json").write_text(json.dumps([GOOD, bad]))
    datasets.Dataset.from_list([GOOD, bad]).to_parquet("b.parquet")
    Path("data").mkdir()
    write("data/c.jsonl", GOOD, bad)
    write("data/d.jsonl", {"messages": [USER, ASSISTANT]})
    assert message_of("a.json") == f"a.json: 1 bad row: item 1, {problem}"
    assert message_of("b.parquet") == f"b.parquet: 1 bad row: row 1, {problem}"
    assert message_of("data") == (
        f"data: 2 bad rows: c.jsonl line 2, {problem}; "
        "d.jsonl line 1, has 'messages' but c.jsonl line 1 has 'prompt'; use one form in the whole set"
    )


# --- what a row is used for ---


def test_a_row_may_have_a_prompt_alone_until_it_is_used() -> None:
    rows = [{"prompt": "q"}, {"prompt": [USER], "completion": None}, {"messages": [USER]}]
    for row in rows:
        (demonstration,) = load_demonstrations(write("a.jsonl", row))
        assert (demonstration.completion, demonstration.has_reference) == ("", False)
        with pytest.raises(UserError, match=r"a\.jsonl:1: neither completion nor privileged_context"):
            _ = demonstration.shown
    assert message_of(write("a.jsonl", GOOD, *rows[:2]), lacks=nothing_to_show) == (
        "a.jsonl: 2 bad rows: lines 2, 3: column 'completion': missing, and no 'privileged_context' or 'document' to "
        "show the teacher instead"
    )


@pytest.mark.parametrize(
    ("row", "lacks", "problem"),
    [
        ({"completoin": "r", "answer": "a"}, nothing_to_show, "found 'completoin'; rename it to 'completion'"),
        ({"response": "r", "answer": "a"}, nothing_to_show, "found 'response'; rename it to 'completion'"),
        ({"docment": "d", "answer": "a"}, nothing_to_show, "found 'docment'; rename it to 'document'"),
        ({"solution": "a", "scorer": "exact"}, nothing_to_score(None), "found 'solution'; rename it to 'answer'"),
        (  # renaming it would not help
            {"solution": "a", "scorer": "exact"},
            nothing_to_show,
            "and no 'privileged_context' or 'document' to show the teacher instead",
        ),
    ],
)
def test_what_a_row_lacks_may_have_another_name(row: dict[str, Any], lacks: Lacks, problem: str) -> None:
    path = write("a.jsonl", {"prompt": "q"} | row)
    assert message_of(path, lacks=lacks) == f"a.jsonl: 1 bad row: line 1, column 'completion': missing, {problem}"


@pytest.mark.parametrize("row", [{"privileged_context": "p"}, {"completion": "r"}, {"document": "d"}])
def test_each_of_these_can_be_shown_to_a_teacher(row: dict[str, Any]) -> None:
    assert load_demonstrations([{"prompt": "q"} | row], lacks=nothing_to_show)


# --- tools and arguments of the template ---

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("value", [[TOOL], json.dumps([TOOL])])
def test_tools_are_a_list_or_its_text(value: Any) -> None:
    (row,) = load_demonstrations(write("a.jsonl", GOOD | {"tools": value, "chat_template_kwargs": {"x": 1, "y": None}}))
    assert row.tools == [TOOL]
    assert row.chat_template_kwargs == {"x": 1}
    assert row.template_options == {"tools": [TOOL], "x": 1}
    write_demonstrations(Path("b.jsonl"), [row])
    assert load_demonstrations("b.jsonl")[0].identity() == row.identity()


def test_tools_from_arrow_lose_the_nulls_of_other_rows() -> None:
    def tool(name: str) -> dict[str, Any]:
        return {
            "type": "function",
            "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}},
        }

    rows = [GOOD | {"tools": [tool("city")]}, GOOD | {"tools": [tool("zone")]}, GOOD]
    datasets.Dataset.from_list(rows).to_parquet("a.parquet")
    assert [row.tools for row in load_demonstrations("a.parquet")] == [[tool("city")], [tool("zone")], None]


def test_the_identity_of_a_row_without_them_is_that_of_older_folders() -> None:
    keys = ["row", "source", "prompt", "completion", "document", "privileged_context", "answer", "scorer"]
    assert list(Demonstration((USER,), "4").identity()) == keys
    assert list(Demonstration((USER,), "4", tools=[TOOL]).identity()) == [*keys, "tools"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tools": "clock"}, "column 'tools': found 'clock', expected a list of JSON schemas, or its JSON text"),
        ({"tools": ["clock"]}, "column 'tools[0]': found 'clock', expected an object"),
        (
            {"tools": [TOOL, {"type": "function", "name": "clock", "parameters": {}}]},
            "column 'tools[1]': found a tool of type 'function' without the key 'function'; put name, description and "
            "parameters into an object there",
        ),
        ({"tools": TOOL}, "column 'tools': found an object, expected a list of JSON schemas, or its JSON text"),
        (
            {"tools": '[{"a": 1, "a": 2}]'},
            "column 'tools': found '[{\"a\": 1, \"a\": 2}]', expected a list of JSON schemas, or its JSON text",
        ),
        ({"chat_template_kwargs": [1]}, "column 'chat_template_kwargs': found a list of 1, expected an object or null"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "column 'chat_template_kwargs': 'chat_template' is reserved; leave it out",
        ),
        (
            {"chat_template_kwargs": {"tools": [], "tokenize": True}},
            "column 'chat_template_kwargs': 'tokenize' is reserved; leave it out",
        ),
    ],
)
def test_bad_arguments_of_the_template(row: dict[str, Any], problem: str) -> None:
    assert message_of(write("a.jsonl", GOOD | row)) == f"a.jsonl: 1 bad row: line 1, {problem}"


# --- lists of parts ---


def test_text_parts_are_joined_as_they_are() -> None:
    parts = [
        {"type": "text", "text": "2+2"},
        {"type": "text", "text": ""},
        {"type": "text", "text": "?\n", "image": None},
    ]
    rows = [
        {"prompt": [{"role": "user", "content": parts}], "completion": [{"role": "assistant", "content": parts[:1]}]},
        {"prompt": [{"role": "system", "content": parts}, USER], "completion": "4"},
    ]
    one, other = load_demonstrations(write("a.jsonl", *rows))
    assert (one.prompt[0]["content"], one.completion) == ("2+2?\n", "2+2")
    assert other.prompt[0]["content"] == "2+2?\n"


AS_PICTURE = """write {"type": "image"} alone, and the picture into the column 'images'"""


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"type": "image"}, "found a part of type 'image', but no picture in the column 'images'; add it"),
        ({"type": "image", "image": "a.png"}, f"found a part of type 'image'; {AS_PICTURE}"),
        ({"type": "input_audio", "input_audio": {}}, "found a part of type 'input_audio', expected only text"),
        ({"type": "image_url", "image_url": {"url": "u"}}, f"found a part of type 'image_url'; {AS_PICTURE}"),
        ("text", "found 'text', expected an object with type and text"),
        ({"type": "text"}, "found an object, expected an object with type and text"),
        ({"type": "text", "text": "a", "cache_control": {}}, "found an object, expected an object with type and text"),
        ({"type": "text", "text": 3}, "found an object, expected an object with type and text"),
    ],
)
def test_other_parts_are_refused(part: Any, problem: str) -> None:
    content = [{"type": "text", "text": "q"}, part]
    path = write("a.jsonl", {"messages": [{"role": "user", "content": content}, ASSISTANT]})
    assert message_of(path) == f"a.jsonl: 1 bad row: line 1, column 'messages[0].content[1]': {problem}"


# --- notes ---


def notes_of(*rows: Any) -> list[str]:
    notes: list[str] = []
    load_demonstrations(write("a.jsonl", *rows), note=notes.append)
    return notes


def test_columns_that_are_not_used_are_named_once() -> None:
    rows = [GOOD | {"id": 7, "url": "u"}, GOOD | {"prompt": "r", "url": "v", "anwser": "x", "empty": ""}]
    assert notes_of(*rows, GOOD | {"prompt": "s", "score": 0.5, "solution": "y", "tools": []}) == [
        "a.jsonl: columns not used: id, url, anwser (did you mean 'answer'?), score (did you mean 'scorer'?), "
        "solution (did you mean 'answer'?)"
    ]
    assert notes_of(GOOD) == []


def test_equal_prompts_with_unlike_answers_are_named() -> None:
    other = GOOD | {"completion": "four"}
    assert notes_of(GOOD, other) == [
        "a.jsonl: 1 row repeats the prompt of an earlier one, but not its completion, answer and "
        "privileged_context (a.jsonl:1 and a.jsonl:2)"
    ]
    assert notes_of(GOOD, {"prompt": [USER], "completion": "4", "answer": 5}, *[other] * 5) == [
        "a.jsonl: 4 rows repeat an earlier one (a.jsonl:3 and a.jsonl:4, a.jsonl:3 and a.jsonl:5, "
        "a.jsonl:3 and a.jsonl:6, ...)",
        "a.jsonl: 2 rows repeat the prompt of an earlier one, but not its completion, answer and "
        "privileged_context (a.jsonl:1 and a.jsonl:2, "
        "a.jsonl:1 and a.jsonl:3)",
    ]


@pytest.mark.parametrize(
    ("row", "notes"),
    [
        ({"document": "another"}, 0),
        ({"tools": [TOOL]}, 0),
        ({"chat_template_kwargs": {"x": 1}}, 0),
        ({"prompt": [{"role": "system", "content": "s"}, USER]}, 0),
        ({"privileged_context": "p"}, 1),
        ({"answer": "p"}, 1),
    ],
)
def test_what_makes_a_prompt_another_and_what_an_answer(row: dict[str, Any], notes: int) -> None:
    assert len(notes_of(GOOD, GOOD | {"completion": "5"} | row)) == notes


# --- bad files ---

TYPES = ".jsonl, .json, .csv, .tsv or .parquet (text also compressed as .gz or .zst)"
GOOD_LINE = json.dumps(GOOD).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no rows, expected at least one"),
        ("a.jsonl", b"\n \n", "a.jsonl: no rows, expected at least one"),
        ("a.json", b"", "a.json: no rows, expected at least one"),
        ("a.json", b"[]", "a.json: no rows, expected at least one"),
        ("a.json", b"{}", "a.json: found an object, expected a list of rows"),
        (
            "a.json",
            b'{"n": 1, "data": [{"prompt": "q"}]}',
            "a.json: found an object, expected a list of rows; its 'data' is one: write that list alone",
        ),
        ("a.json", b'[{"a": 1,}]', "a.json: invalid JSON: {trailing}"),
        (
            "a.json",
            GOOD_LINE + b"\n" + GOOD_LINE,
            "a.json: found JSON Lines, expected a JSON list; rename it to end with .jsonl",
        ),
        ("a.json", b"[[1], 2]", "a.json: all 2 rows: found a list of 1, the number 2, expected an object"),
        ("a.xlsx", b"PK\x03\x04", f"a.xlsx: cannot read file type '.xlsx', expected {TYPES}"),
        ("a.parquet.gz", b"x", f"a.parquet.gz: cannot read file type '.parquet.gz', expected {TYPES}"),
        ("a", b"x", f"a: cannot read file type '', expected {TYPES}"),
        (
            "a.jsonl",
            GOOD_LINE + b'\n{"prompt": "caf\xe9", "completion": "r"}\n',
            "a.jsonl: not UTF-8: line 2, byte 16 is 0xe9; save it as UTF-8",
        ),
        (
            "a.jsonl",
            json.dumps(GOOD).encode("utf-16"),
            "a.jsonl: found UTF-16 text, expected JSON Lines; save it as UTF-8",
        ),
        (
            "data/x.txt",
            b"x",
            f"data: no {TYPES} file in this folder, in its subfolder data, or in one named after a split",
        ),
        ("data/x.xlsx", b"x", f"data: cannot read x.xlsx (.xlsx), expected {TYPES}; convert it or move it"),
        (
            "data/x.jsonl/y",
            b"x",
            f"data: no {TYPES} file in this folder, in its subfolder data, or in one named after a split",
        ),
    ],
)
def test_bad_file(name: str, content: bytes, message: str) -> None:
    # The words of json differ between releases of Python.
    with pytest.raises(json.JSONDecodeError) as trailing:
        json.loads('[{"a": 1,}]')
    message = message.replace("{trailing}", str(trailing.value))
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    assert message_of(name.split("/")[0]) == message


def test_broken_parquet_and_saved_set() -> None:
    Path("a.parquet").write_bytes(b"not parquet, not at all")
    Path("saved").mkdir()
    Path("saved/state.json").write_text("{}")
    assert message_of("a.parquet").startswith("a.parquet: not a readable parquet file: Parquet magic bytes not found")
    assert message_of("saved").startswith("saved: not a readable saved data set: ")


def test_empty_parquet() -> None:
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).to_parquet("a.parquet")
    assert message_of("a.parquet") == "a.parquet: no rows, expected at least one"


def test_nesting_too_deep_is_a_bad_row() -> None:
    row = '{"prompt": "q", "completion": "r", "answer": ' + "[" * 200_000 + "]" * 200_000 + "}"
    assert message_of(write("a.jsonl", GOOD, row)).startswith("a.jsonl: 1 bad row: line 2, invalid JSON: ")


# --- real data ---


@pytest.mark.parametrize(
    ("name", "rows", "turns"),
    [
        ("tooluse.train", 61, 1),
        ("tooluse.test", 36, 1),
        ("science.train", 280, 2),
        ("science.test", 110, 2),
        ("medical.train", 500, 1),
        ("medical.test", 200, 1),
    ],
)
def test_real_data(name: str, rows: int, turns: int) -> None:
    path = REAL / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"REAL DATA NOT READ: {path} does not exist")
    demonstrations = load_demonstrations(str(path))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(demonstrations) == rows == len(lines)
    for number, (demonstration, line) in enumerate(zip(demonstrations, lines, strict=True)):
        assert dataclasses.asdict(demonstration) == {
            "row": number,
            "source": f"{path}:{number + 1}",
            "prompt": tuple(line["prompt"]),
            "completion": line["completion"],
            "document": None,
            "privileged_context": None,
            "answer": line["answer"],
            "scorer": None,
            "images": (),
            "tools": None,
            "chat_template_kwargs": None,
            "episode": (),
            "turn_of": None,
        }
        assert len(demonstration.prompt) == turns


def test_earlier_replies_of_a_chat_that_do_not_count_get_a_note() -> None:
    said = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    rows: dict[str, dict[str, Any]] = {
        "chat": {"messages": said},
        "one reply": {"messages": said[:2]},
        "prompt": {"prompt": said[:3], "completion": "yes"},
        "episode": {"messages": [said[0], call, {"role": "tool", "content": "7"}, said[1]]},
    }
    for turns, kinds in (("auto", ["chat"]), ("last", []), ("all", [])):
        for kind, row in rows.items():
            notes: list[str] = []
            load_demonstrations([row], turns=turns, note=notes.append)
            expected = (
                "data: 1 of 1 rows have several replies, of which only the last counts; set turns all to count all"
            )
            assert (expected in notes) is (kind in kinds), (turns, kind, notes)
