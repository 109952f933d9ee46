"""The columns of a row: those that are read, those that mean something to other tools, and all others.

No text is lost in silence. A column that other tools read as part of the conversation, or as a verdict on it, is
refused by name, with the place where its content belongs. Others that are not read are named once, in a note.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

PICTURE_COLUMNS = ("images", "image")
"""Columns with pictures: a list, or a single one."""
COLUMNS = (
    *("prompt", "completion", "messages", "document", "privileged_context", "answer", "scorer"),
    *("tools", "chat_template_kwargs"),
    *PICTURE_COLUMNS,
)
"""Columns that are read."""

OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query"),
    "messages": ("conversation", "conversations", "chat", "dialogue"),
    "completion": ("response", "output", "reply", "target", "chosen", "golden_response", "output_text"),
    "answer": ("gold", "label", "solution", "ground_truth"),
}
"""Other projects' names for a column."""

_IN_PROMPT = ("system", "system_prompt", "instruction", "input", "context", "history", "question", "query")
"""Parts of a prompt that other tools keep in columns of their own."""

_MEDIA = "only text and pictures are supported; leave it out"
_REFUSED = {
    **dict.fromkeys(("video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("instruction", "input"), "put its text into the prompt, or leave it out if it is there"),
    "context": "put its text into the prompt, or name it 'document' if only the teacher should read it",
    **dict.fromkeys(("system", "system_prompt"), "write it as the system message that begins the prompt"),
    "history": "write it as earlier messages of the prompt",
    **dict.fromkeys(OTHER_NAMES["messages"], "keep either the prompt or the conversation"),
    "functions": "write them as 'tools'",
    "teacher_prompt": "write its text as 'privileged_context', with context rewritten",
    "rejected": "preference pairs are not supported; leave it out, and rename 'chosen' to 'completion'",
    "label": "it marks good and bad completions; keep the good rows, and leave it out",
}
"""Columns that TRL, the SDFT authors, Alpaca, ShareGPT or LLaMA-Factory read, and what to do with their content."""

_CLOSE = 0.8
"""Similarity from which a name counts as a misspelling: ``anwser`` and ``answer`` have 0.83."""


FROM_SHAREGPT = "role (human: user, gpt: assistant) and content (see docs/data.md)"
"""What to write in place of ShareGPT's from and value."""


def unread(row: Mapping[str, Any]) -> list[str]:
    """The columns that hold something and are not read."""
    return [column for column, value in row.items() if column not in COLUMNS and not is_empty(value)]


def refused(row: Mapping[str, Any]) -> list[str]:
    """A problem for each column that other tools read and that would be lost here."""
    found = []
    for column in unread(row):
        name = str(column).lower()
        is_class = name == "label" and not isinstance(row[column], bool)  # a class, not a verdict on the completion
        if name in _REFUSED and not is_class:
            found.append(f"column {column!r}: not read, {_REFUSED[name]}")
    return found


def missing(row: Mapping[str, Any], *names: str, want: str) -> str:
    """The problem of a row without the first column of ``names``: see :func:`misnamed`, else what was expected."""
    return misnamed(row, *names) or f"column '{names[0]}': missing, {want}"


def misnamed(row: Mapping[str, Any], *names: str) -> str | None:
    """The problem of a row without the first column of ``names``, if another looks like a name of one of them."""
    begin = f"column '{names[0]}': missing, found"
    # Also those that are empty in this row: where its neighbours hold both, renaming one would be wrong.
    parts = [column for column in row if str(column).lower() in _IN_PROMPT]
    if names[0] == "prompt" and len(parts) > 1 and set(parts) & set(unread(row)):
        return f"{begin} {_all_of(parts)}; join them in 'prompt' (see docs/data.md)"
    for name in names:
        for column in unread(row):
            if _meant(column) != name:
                continue
            if name == "messages" and _is_sharegpt(row[column]):
                return f"{begin} {column!r} with from and value; write 'messages' with {FROM_SHAREGPT}"
            return f"{begin} {column!r}; rename it to '{name}'"
    return None


def misnamed_in(problem: str, row: Mapping[str, Any]) -> str | None:
    """The problem of a row without the columns that ``problem`` asks for, if another looks like a name of one."""
    lacking = [name for name in re.findall(r"'(\w+)'", problem) if name in COLUMNS and is_empty(row.get(name))]
    return misnamed(row, *lacking) if lacking else None


def notes_on_unread(rows: Sequence[Mapping[str, Any]], useless: Sequence[str]) -> list[str]:
    """A note that names the columns that are not used, each with the column it may be meant as.

    Not if rows have that column, or it would be ``useless``.
    """
    columns = dict.fromkeys(column for row in rows for column in unread(row))
    if not columns:
        return []
    held = {*useless} | {column for row in rows for column, value in row.items() if not is_empty(value)}
    named = []
    for column in columns:
        hint = _meant(column)
        shown = str(column).strip() or "one without a name"
        named.append(shown if hint is None or hint in held else f"{column} (did you mean '{hint}'?)")
    return [f"columns not used: {', '.join(named)}"]


@lru_cache(1024)
def _meant(column: str) -> str | None:
    """The column of which this is a misspelling or another project's name; the rows of a file all have the same few."""
    name = str(column).lower()
    close = difflib.get_close_matches(name, COLUMNS, 1, _CLOSE)
    return next((known for known, others in OTHER_NAMES.items() if name in others), close[0] if close else None)


def _all_of(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def is_empty(value: Any) -> bool:
    """Whether a column or key with this value counts as absent: null, white space, an empty list or object."""
    value = value.strip() if isinstance(value, str) else value
    return value is None or (isinstance(value, str | list | dict) and not value)


def _is_sharegpt(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0]
