"""Demonstrations: validated rows of a file, folder or data set, each as a small dataclass.

Columns have TRL's names: ``prompt`` and ``completion``, or ``messages``. One error names all bad rows; nothing is
dropped, truncated or repaired. Columns not listed in :data:`COLUMNS` are ignored.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    rows_in_memory,
)
from selfdistill.errors import UserError

Message = dict[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with its demonstrated completion, and extra information for the teacher or scorer."""

    prompt: tuple[Message, ...]
    """Chat messages up to and including the last user turn. A string becomes one user turn."""
    completion: str = ""
    """The demonstrated reply; empty if there is none."""
    document: str | None = None
    """Text that the teacher reads first."""
    privileged_context: str | None = None
    """What the teacher sees in place of the completion."""
    answer: Any = None
    """What a scorer compares the reply with; default: the completion."""
    scorer: str | None = None
    """Name of the scorer for this row; default: the command's setting, else ``exact``."""
    row: int = 0
    """Position in the whole set, from 0; part of every sample's seed."""
    source: str = ""
    """Location for messages: ``train.jsonl:12`` (line, from 1), or ``name[12]`` for data sets (row, from 0)."""

    def __post_init__(self) -> None:
        prompt: Any = self.prompt
        turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
        object.__setattr__(self, "prompt", turns)

    def identity(self) -> dict[str, Any]:
        """What fingerprints hash: all fields except the source, in the key order of older folders."""
        values = {**asdict(self), "source": ""}
        return {"row": values.pop("row"), "source": values.pop("source"), **values}

    @property
    def shown(self) -> str:
        """What the teacher is shown: ``privileged_context`` if given, else the completion.

        Raises:
            UserError: the row has neither.
        """
        if self.privileged_context is None and not self.completion:
            raise UserError(f"{self.source}: no completion to show the teacher; add one, or use another context")
        return self.completion if self.privileged_context is None else self.privileged_context


SCORER_NAMES = ("exact", "contains", "choice", "regex", "tool_call")
"""Valid values of the column ``scorer``; :mod:`selfdistill.data.scorers` has one function for each."""

COLUMNS = ("prompt", "completion", "messages", "document", "privileged_context", "answer", "scorer")
"""Columns that are read."""

_ROLES = ("system", "user", "assistant")

# Other projects' names for a column, recognised when the column is missing. difflib finds misspellings.
_OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query"),
    "messages": ("conversation", "conversations", "chat", "dialogue"),
    "completion": ("response", "output", "reply", "target", "chosen"),
    "answer": ("gold", "label", "solution", "ground_truth"),
}
_WANT_CHAT = "text or a list of messages"
_WANT_COMPLETION = "text or one assistant message"


Rows = str | Path | Sequence[Mapping[str, Any]] | Sequence[Demonstration] | Any
"""Where demonstrations come from: a path or hub name, dicts, :class:`Demonstration`s, or a ``datasets.Dataset``."""


def load_demonstrations(data: Rows, *, completion_required: bool = True, split: str = "train") -> list[Demonstration]:
    """Read and validate every row of ``data``, in order.

    Args:
        data: a ``.jsonl``, ``.json`` (a list of rows) or ``.parquet`` file; a folder of such files, read in name order
            without subfolders; a folder written by ``datasets`` ``save_to_disk``; if there is no such path, the name
            of a hub data set; or in-memory rows: dicts, demonstrations, a ``datasets.Dataset``.
        completion_required: every row must have a completion. Otherwise it may have ``answer`` instead, and the
            completion is "".
        split: split of a ``DatasetDict`` or a hub data set. Files and a single ``Dataset`` are read in full.

    A row has ``prompt`` and ``completion`` (each text or chat messages, the completion exactly one assistant message),
    or ``messages``, whose last turn is the assistant's demonstration. Null counts as absent. All rows have the same
    form.

    Raises:
        UserError: the data cannot be read or has no rows; or rows are invalid: names the first ten and the total.
    """
    name = "data"
    try:
        if isinstance(data, str | os.PathLike):
            name = os.fspath(data)
            rows = read_rows(name, split)
        else:
            rows = rows_in_memory(data, split, _as_row)
    except OSError as error:
        raise UserError(f"{error.filename or name}: cannot be read: {error.strerror}") from error
    if not rows:
        raise UserError(f"{name}: no rows, expected at least one")

    def make(raw: RawRow, form: str, number: int, problems: list[str]) -> Demonstration:
        return _demonstration(raw, number, form, completion_required, problems)

    return check_rows(name, rows, _form, make, "set")


def write_demonstrations(path: Path, rows: Sequence[Demonstration]) -> None:
    """Write a JSON Lines file that :func:`load_demonstrations` reads back equal except for ``row`` and ``source``."""
    text = "".join(json.dumps(_as_row(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _as_row(row: Any) -> Any:
    """A demonstration as a row that holds its columns; anything else as it is."""
    if not isinstance(row, Demonstration):
        return row
    values = {name: getattr(row, name) for name in COLUMNS if name != "messages"}
    return {name: list(v) if name == "prompt" else v for name, v in values.items() if v not in (None, "")}


def load_prompts(path: str) -> list[Demonstration]:
    """Read a text file with one prompt per line, skipping empty lines, as demonstrations without completions.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has no prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text, expected one prompt per line") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: no prompts, expected one per line")
    return [
        Demonstration(({"role": "user", "content": text},), row=row, source=f"{Path(path).name}:{number}")
        for row, (number, text) in enumerate(numbered)
    ]


# --- validation; each function appends to `problems` ---


def _form(row: Any, problems: list[str]) -> str | None:
    """The column that holds the row's chat, ``prompt`` or ``messages``; None, with a problem, if there is not one."""
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
    """The row as a demonstration; invalid if there are problems."""
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
        problems.append(f"column 'messages': ends with the {turns[-1]['role']}, expected an assistant turn")
    if not problems and (not turns or turns[-1]["role"] != "user"):
        found = f"ends with the {turns[-1]['role']}" if turns else "is empty"
        problems.append(f"column '{form}': the prompt {found}, expected it to end with a user turn")
    if not problems and not completion and others["answer"] is None:
        problems.append(_missing(row, "completion", "answer", want="expected 'completion' or 'answer'"))
    try:
        json.dumps(others["answer"], allow_nan=False)
    except (TypeError, ValueError):
        problems.append(wrong("answer", others["answer"], "a JSON value or null"))
    if isinstance(others["answer"], str) and not others["answer"].strip():
        problems.append(wrong("answer", others["answer"], "a value or null"))
    for name in ("document", "privileged_context"):
        if others[name] is not None:
            text_of(others[name], name, "text or null", problems)
    if others["scorer"] is not None and others["scorer"] not in SCORER_NAMES:
        problems.append(wrong("scorer", others["scorer"], one_of(SCORER_NAMES)))
    return Demonstration(tuple(turns), completion, **others, row=number, source=raw.source)


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
    """The list's messages, with role and content only; empty if any is invalid."""
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
            problems.append(f"column '{at}.role': found 'system', expected only in the first message")
        text = text_of(message.get("content"), f"{at}.content", "text", problems)
        # Arrow writes null for a key that only other messages have. Any other value would be lost silently.
        others = [key for key in message if key not in ("role", "content") and message[key] is not None]
        if others:
            problems.append(f"column '{at}': found key {quoted(others[0])}, expected only role and content")
        turns.append({"role": str(role), "content": text})
    return turns if len(problems) == before else []


def text_of(value: Any, column: str, want: str, problems: list[str]) -> str:
    """The value if it is non-blank text; else "", with a problem."""
    if isinstance(value, str) and value.strip() and not LONE_SURROGATE.search(value):
        return value
    problems.append(wrong(column, value, want))
    return ""


# --- wording ---


def wrong(column: str, value: Any, want: str) -> str:
    """The message for a column with an invalid value."""
    return f"column '{column}': found {describe_value(value)}, expected {want}"


def not_object(row: Any) -> str:
    """The message for a row that is not an object."""
    return f"found {describe_value(row)}, expected an object"


def _missing(row: dict[str, Any], *names: str, want: str) -> str:
    """The message for a missing column: the likely misspelling or synonym of one of ``names``, else ``want``."""
    for name in names:
        for column in row:
            close = difflib.get_close_matches(column.lower(), [name], cutoff=0.9)
            if column not in COLUMNS and (close or column.lower() in _OTHER_NAMES[name]):
                return f"column '{names[0]}': missing, found {quoted(column)}; rename it to '{name}'"
    return f"column '{names[0]}': missing, {want}"
