"""Texts at the end of a teacher's messages: feedback on an attempt, or a guide."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.data.messages import Message


def with_feedback(messages: Sequence[Message], feedback: str) -> list[Message]:
    """A teacher's messages, with feedback on an earlier attempt at the end of the last turn."""
    return _with_text(
        messages,
        f"An earlier attempt of yours was not right. This is the feedback on it:\n\n{feedback}\n\n"
        "Now answer the question correctly.",
    )


def with_guide(messages: Sequence[Message], guide: str) -> list[Message]:
    """Messages with a guide, such as a plan or the first steps of an answer, at the end of the last turn."""
    return _with_text(messages, f"Let this guide your answer:\n\n{guide}\n\nNow answer the question.")


def _with_text(messages: Sequence[Message], text: str) -> list[Message]:
    """Messages with a text at the end of the user's last turn, or as one after what a tool returned."""
    if messages[-1]["role"] == "tool":
        return [*messages, {"role": "user", "content": text}]
    return [*messages[:-1], {"role": "user", "content": f"{messages[-1]['content']}\n\n{text}"}]
