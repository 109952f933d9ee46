"""Prompts without answers, such as anchors: what is asked of their rows, and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfdistill.data import ChatFormat
from selfdistill.data.prompts import load_prompts, notes_on_rendered
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


@pytest.mark.parametrize("empty", ["", " ", None, []])
def test_a_prompt_may_have_an_empty_completion(empty: Any) -> None:
    found = load_prompts([{"prompt": "Who?", "completion": empty}], name="anchors")
    assert [(row.prompt[0]["content"], row.completion) for row in found] == [("Who?", "")]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_repeated_prompts_are_named_whatever_their_answers(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "Who?", "completion": "I."}, {"prompt": "When?"}, {"prompt": "Who?", "completion": "You."}]
    lines = [row["prompt"] if name == "p.txt" else json.dumps(row) for row in rows]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    notes: list[str] = []
    assert len(load_prompts(str(tmp_path / name), notes.append)) == 3
    (note,) = notes
    assert note.startswith(f"{tmp_path / name}: 1 row repeats an earlier one (")
    assert f"{name}:1 and " in note
    assert note.endswith(f"{name}:3)")


@pytest.mark.parametrize("form", ["utf-16-le", "utf-16-be"])
def test_text_with_null_bytes_is_refused(tmp_path: Path, form: str) -> None:
    (tmp_path / "p.txt").write_bytes("Who?\nWhen?\n".encode(form))
    with pytest.raises(UserError, match=r"p\.txt: not text: line 1 has a null byte; save it as UTF-8$"):
        load_prompts(str(tmp_path / "p.txt"))


@pytest.mark.parametrize(
    ("template", "prompts", "count"),
    [
        ("chatml", ["<|im_start|>user\na<|im_end|>", "<|im_start|>user\nb<|im_end|>", "Who?"], 2),
        ("chatml", ["What is <|im_start|>?", "Who?", "When?"], 0),
        ("thinking", ["Think in <think> first. Who?"], 0),
        ("none", ["<|im_start|>user\na<|im_end|>"], 0),
    ],
    ids=["rendered", "one names it", "tags of thoughts", "no template"],
)
def test_rendered_chats_are_noted(
    make_tokenizer: Callable[..., Any], template: str, prompts: list[str], count: int
) -> None:
    tokenizer = make_tokenizer()
    if template == "none":
        tokenizer.chat_template = None
    if template == "thinking":
        tokenizer.add_tokens(["<think>"])
        tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    notes = notes_on_rendered(load_prompts([{"prompt": x} for x in prompts]), ChatFormat(tokenizer, [257], {}))
    assert [note.partition(" of ")[0] for note in notes] == ([str(count)] if count else [])
