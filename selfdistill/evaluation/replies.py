"""Replies to rows as objects for JSON Lines files: all of them, or a few short ones that a run keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfdistill.data import Demonstration, shown_text
from selfdistill.errors import shortened
from selfdistill.evaluation.answers import Answers
from selfdistill.evaluation.episodes import told

KEPT_ROWS = 16
"""Maximum number of test rows whose replies a run keeps, spread over the test."""
KEPT_CHARACTERS = 4000
"""Maximum length of each text in them."""


def write_replies(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write the objects of :func:`reply_lines`, a line each."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def reply_lines(rows: Sequence[Demonstration], answers: Answers) -> list[dict[str, Any]]:
    """An object for each row: its source, prompt and answer, the model's reply, and whether that is correct.

    With an environment, also the episode: see :func:`told`.
    """
    lines: list[dict[str, Any]] = [
        {
            "source": row.source,
            "prompt": [{**turn, "content": shown_text(turn["content"])} for turn in row.prompt],
            "answer": row.completion if row.answer is None else row.answer,
            "reply": reply,
            "correct": right,
            "tokens": length,
        }
        for row, reply, right, length in zip(rows, answers.replies, answers.correct, answers.lengths, strict=True)
    ]
    for line, episode in zip(lines, answers.episodes, strict=bool(answers.episodes)):
        line.update(told(episode))
    return lines


def kept_replies(rows: Sequence[Demonstration], answers: Answers) -> list[dict[str, Any]]:
    """The objects of at most ``KEPT_ROWS`` rows, whose texts have at most ``KEPT_CHARACTERS``."""
    count = min(KEPT_ROWS, len(rows))
    lines = reply_lines(rows, answers)
    return [_shortened(lines[number * len(lines) // count]) for number in range(count)]


def _shortened(value: Any) -> Any:
    """The value with every text in it, at any depth, cut where it is too long."""
    if isinstance(value, str):
        return shortened(value, KEPT_CHARACTERS)
    if isinstance(value, dict):
        return {name: _shortened(part) for name, part in value.items()}
    return [_shortened(part) for part in value] if isinstance(value, list) else value
