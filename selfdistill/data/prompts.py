"""Prompts without answers, such as anchors: lines of a text file, or rows whose answers do not count."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.demonstrations import Demonstration, Rows, load_demonstrations, notes_on_repeated, without_answer
from selfdistill.data.readers import is_data_file, read_prompts
from selfdistill.data.sources import Note
from selfdistill.errors import UserError

PROMPT_ROWS: dict[str, Any] = {
    "turns": "last",
    "prompts_only": True,
    "split_advice": "(to choose one, give its file or its rows)",  # no setting does
}
"""How rows of prompts are read: arguments of :func:`load_demonstrations`."""


def load_prompts(data: Rows, note: Note | None = None, name: str = "data") -> list[Demonstration]:
    """Read prompts, as demonstrations without completions.

    Args:
        data: a text file with one prompt per line, of which empty ones are skipped; or any data that
            :func:`load_demonstrations` reads. Of its rows, the prompts count and the completions do not.
        note: takes what the user should know, as in :func:`load_demonstrations`.
        name: of in-memory rows in messages.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has no prompts; or rows are invalid.
    """
    if isinstance(data, str | os.PathLike) and _is_text(path := os.fspath(data)):
        prompts = _lines_of(path)
        if note:
            for found in notes_on_repeated(prompts):
                note(f"{path}: {found}")
        return prompts
    rows = load_demonstrations(data, note=note, name=name, **PROMPT_ROWS)
    return [without_answer(row) for row in rows]


def notes_on_rendered(rows: Sequence[Demonstration], chat: ChatFormat) -> list[str]:
    """A note on prompts to which the chat template seems to have been applied already: half of them name its tokens."""
    for name in chat.turn_names:
        count = sum(any(name in message["content"] for message in row.prompt) for row in rows)
        if 2 * count >= len(rows) > 0:
            return [
                f"{count} of {len(rows)} prompts contain {name!r}, which stays plain text, because the chat template "
                "is applied to them; give questions or messages (role, content), not rendered chats"
            ]
    return []


def _is_text(path: str) -> bool:
    return Path(path).suffix == ".txt" or (os.path.isfile(path) and not is_data_file(path))


def _lines_of(path: str) -> list[Demonstration]:
    """A prompt for each line that is not empty."""
    try:
        numbered = read_prompts(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not numbered:
        raise UserError(f"{path}: no prompts, expected one per line")
    return [
        Demonstration(({"role": "user", "content": text},), row=row, source=f"{Path(path).name}:{number}")
        for row, (number, text) in enumerate(numbered)
    ]
