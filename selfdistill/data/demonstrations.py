"""Demonstrations: rows of a file, folder or data set, all checked, each as one small dataclass.

Columns are named as in TRL: ``prompt`` and ``completion``, or ``messages``. Bad rows are named in one error; nothing is
dropped, cut or repaired. Columns that are not listed in :data:`COLUMNS` are ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdistill.data.rows import (
    LONE_SURROGATE,
    RawRow,
    check_rows,
    describe_value,
    one_of,
    quoted,
    read_rows,
    repeated_key,
)
from selfdistill.errors import UserError

Message = dict[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""


@dataclass(frozen=True)
class Demonstration:
    """One prompt with its demonstrated completion, and what the teacher or a scorer may use."""

    row: int
    """Position in the whole set, from 0; part of every sample's seed."""
    source: str
    """Where it stands, for messages: ``train.jsonl:12`` (line from 1), or ``name[12]`` for data sets (row from 0)."""
    prompt: tuple[Message, ...]
    """Chat messages up to and including the last user turn. A string prompt is one user turn."""
    completion: str
    """The demonstrated reply; empty where the file has none and none was required."""
    document: str | None = None
    """Text that the teacher reads first."""
    privileged_context: str | None = None
    """What the teacher sees instead of the demonstration."""
    answer: Any = None
    """What a scorer compares with; the completion where absent."""
    scorer: str | None = None
    """Name of the scorer for this row; the command's setting or ``exact`` where absent."""

    @property
    def shown(self) -> str:
        """What the teacher is shown: ``privileged_context`` where given, else the completion.

        Raises:
            UserError: there is neither.
        """
        if self.privileged_context is None and not self.completion:
            raise UserError(f"{self.source}: has no completion that could be shown; add it, or take another context")
        return self.completion if self.privileged_context is None else self.privileged_context


SCORER_NAMES = ("exact", "contains", "choice", "regex", "tool_call")
"""Names that column ``scorer`` may hold; :mod:`selfdistill.data.scorers` has one function for each."""

COLUMNS = ("prompt", "completion", "messages", "document", "privileged_context", "answer", "scorer")
"""Columns that are read."""

_ROLES = ("system", "user", "assistant")

# Other projects' names for a column, suggested when the column is missing; misspellings are found by difflib.
_OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query"),
    "messages": ("conversation", "conversations", "chat", "dialogue"),
    "completion": ("response", "output", "reply", "target", "chosen"),
    "answer": ("gold", "label", "solution", "ground_truth"),
}
_WANT_CHAT = "text or a list of messages"
_WANT_COMPLETION = "text or one assistant message"


def load_demonstrations(path: str, *, completion_required: bool = True, split: str = "train") -> list[Demonstration]:
    """Read and check every row of ``path``, in order.

    ``path`` is a ``.jsonl``, ``.json`` (a list of rows) or ``.parquet`` file; a folder of such files, read in order of
    name and without its subfolders; a folder written by ``datasets`` ``save_to_disk``; or, where nothing of that name
    exists here, the name of a hub data set. ``split`` picks the split of a saved ``DatasetDict`` or a hub data set;
    files and a saved ``Dataset`` have no splits and are read whole.

    A row has ``prompt`` and ``completion`` (each text or chat messages, the completion exactly one assistant message),
    or ``messages``, whose last turn is the assistant's demonstration. Without ``completion_required`` a row may have
    ``answer`` in place of the completion, which is then "". Null stands for absent.

    Raises :class:`UserError` where the path cannot be read or has no rows, and one that names the first ten bad rows
    and the number of all of them where rows are not as above or do not all have the same form.
    """
    try:
        rows = read_rows(path, split)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    if not rows:
        raise UserError(f"{path}: no rows, expected at least one")

    def make(raw: RawRow, form: str, number: int, problems: list[str]) -> Demonstration:
        return _demonstration(raw, number, form, completion_required, problems)

    return check_rows(path, rows, _form, make, "set")


def write_demonstrations(path: Path, rows: Sequence[Demonstration]) -> None:
    """Write rows as a file that :func:`load_demonstrations` reads back to the same rows, but for their places."""
    lines = []
    for row in rows:
        values = {name: getattr(row, name) for name in COLUMNS if name != "messages"}
        lines.append({name: value for name, value in values.items() if value not in (None, "")})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def load_prompts(path: str) -> list[Demonstration]:
    """Read a text file with a prompt on every line that is not empty: rows without a completion.

    Raises:
        UserError: it cannot be read, is not UTF-8, or has no prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, expected one prompt a line") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: no prompts, expected one a line")
    return [
        Demonstration(row, f"{Path(path).name}:{number}", ({"role": "user", "content": text},), "")
        for row, (number, text) in enumerate(numbered)
    ]


# --- checking; each function adds what it finds to `problems` ---


def _form(row: Any, problems: list[str]) -> str | None:
    """``prompt`` or ``messages``: the column that holds the row's chat; None with a problem where that is not clear."""
    if repeated := repeated_key(row):
        problems.append(repeated)
    elif not isinstance(row, dict):
        problems.append(not_object(row))
    elif row.get("messages") is not None:
        other = next((name for name in ("prompt", "completion") if row.get(name) is not None), None)
        if other is None:
            return "messages"
        problems.append(f"has '{other}' and 'messages', expected 'messages' alone or 'prompt' with 'completion'")
    elif row.get("prompt") is not None:
        return "prompt"
    elif "prompt" in row:
        problems.append(wrong("prompt", None, _WANT_CHAT))
    elif "messages" in row:
        problems.append(wrong("messages", None, "a list of messages"))
    else:
        problems.append(_missing(row, "prompt", "messages", want="expected 'prompt' with 'completion', or 'messages'"))
    return None


def _demonstration(
    raw: RawRow, number: int, form: str, completion_required: bool, problems: list[str]
) -> Demonstration:
    """The row as a demonstration, to be thrown away where there are problems."""
    row: dict[str, Any] = raw.value
    others = {name: row.get(name) for name in ("document", "privileged_context", "answer", "scorer")}
    completion = _completion(row, completion_required, problems) if form == "prompt" else ""
    if form == "prompt" and not isinstance(row["prompt"], list):
        turns = [{"role": "user", "content": text_of(row["prompt"], "prompt", _WANT_CHAT, problems)}]
    else:
        turns = _messages(row[form], form, problems)
    if turns and form == "messages" and turns[-1]["role"] == "assistant":
        completion = turns.pop()["content"]
    elif turns and form == "messages" and completion_required:
        problems.append(f"column 'messages': ends with the {turns[-1]['role']}, expected the assistant's demonstration")
    if not problems and (not turns or turns[-1]["role"] != "user"):
        found = f"ends with the {turns[-1]['role']}" if turns else "is empty"
        problems.append(f"column '{form}': the prompt {found}, expected the user's turn at its end")
    if not problems and not completion and others["answer"] is None:
        problems.append(_missing(row, "completion", "answer", want="expected it or 'answer'"))
    if isinstance(others["answer"], str) and not others["answer"].strip():
        problems.append(wrong("answer", others["answer"], "a value or null"))
    for name in ("document", "privileged_context"):
        if others[name] is not None:
            text_of(others[name], name, "text or null", problems)
    if others["scorer"] is not None and others["scorer"] not in SCORER_NAMES:
        problems.append(wrong("scorer", others["scorer"], one_of(SCORER_NAMES)))
    return Demonstration(number, raw.source, tuple(turns), completion, **others)


def _completion(row: dict[str, Any], required: bool, problems: list[str]) -> str:
    value = row.get("completion")
    if value is None and not (required and "completion" in row):
        if required:
            problems.append(_missing(row, "completion", want=f"expected {_WANT_COMPLETION}"))
        return ""
    if not isinstance(value, list) or not value:
        return text_of(value, "completion", _WANT_COMPLETION, problems)
    turns = _messages(value, "completion", problems)
    roles = [turn["role"] for turn in turns]
    if turns and roles != ["assistant"]:
        problems.append(f"column 'completion': found messages of {', '.join(roles)}, expected one assistant message")
    return turns[0]["content"] if turns else ""


def _messages(value: Any, column: str, problems: list[str]) -> list[Message]:
    """The list's messages with role and content only; none where any of them is wrong."""
    if not isinstance(value, list) or not value:
        problems.append(wrong(column, value, "a list of messages"))
        return []
    before = len(problems)
    turns: list[Message] = []
    for number, message in enumerate(value):
        at = f"{column}[{number}]"
        if not isinstance(message, dict):
            problems.append(wrong(at, message, "an object with role and content"))
            continue
        role = message.get("role")
        if role == "tool":
            problems.append(f"column '{at}.role': found 'tool', which is not supported, expected {one_of(_ROLES)}")
        elif role not in _ROLES:
            problems.append(wrong(f"{at}.role", role, one_of(_ROLES)))
        elif role == "system" and number:
            problems.append(f"column '{at}.role': found 'system', expected it in the first message only")
        text = text_of(message.get("content"), f"{at}.content", "text", problems)
        # Null is what arrow writes for a key that other messages have. Anything else would be lost without a word.
        others = [key for key in message if key not in ("role", "content") and message[key] is not None]
        if others:
            problems.append(f"column '{at}': found key {quoted(others[0])}, expected role and content only")
        turns.append({"role": str(role), "content": text})
    return turns if len(problems) == before else []


def text_of(value: Any, column: str, want: str, problems: list[str]) -> str:
    """The value where it is text that is not blank; else "" and a problem more."""
    if isinstance(value, str) and value.strip() and not LONE_SURROGATE.search(value):
        return value
    problems.append(wrong(column, value, want))
    return ""


# --- wording ---


def wrong(column: str, value: Any, want: str) -> str:
    """The problem of a column: what was found there and what is wanted."""
    return f"column '{column}': found {describe_value(value)}, expected {want}"


def not_object(row: Any) -> str:
    """The problem of a row that is no object."""
    return f"found {describe_value(row)}, expected an object"


def _missing(row: dict[str, Any], *names: str, want: str) -> str:
    """That the first of ``names`` is missing, with the column that looks like one of them, else what is wanted."""
    for name in names:
        for column in row:
            close = difflib.get_close_matches(column.lower(), [name], cutoff=0.9)
            if column not in COLUMNS and (close or column.lower() in _OTHER_NAMES[name]):
                return f"column '{names[0]}': missing, found {quoted(column)}: rename it to '{name}'"
    return f"column '{names[0]}': missing, {want}"
