"""Thinking: the part of a reply between tags, which is neither scored nor compared with an answer."""

from __future__ import annotations

import re

TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""Opening and closing tag of a thought, by model family. If a prompt ends with the first, a reply holds only the
second."""

EMPTY_THOUGHT = "|".join(rf"{re.escape(begin)}\s*{re.escape(end)}\s*" for begin, end in TAGS)
"""Pattern of a thought without a word, as templates write it where none is wanted."""
_LAST_THOUGHT = re.compile("|".join(rf"{re.escape(begin)}\s*(?:{re.escape(end)}\s*)?\Z" for begin, end in TAGS))


def split_thinking(reply: str, *, begun: bool = False) -> tuple[str, str]:
    """Split a reply into its thought and its final text, which is empty if the thought never ends.

    A thought begins with its opening tag. Without one, a closing tag ends a thought only if the prompt has begun it, or
    if the tag has a line of its own.

    Args:
        begun: whether the prompt ends with an opening tag.
    """
    for begin, end in TAGS:
        opened = reply.lstrip().startswith(begin)
        text = reply.lstrip().removeprefix(begin) if opened else reply
        closing = re.search(re.escape(end) if opened or begun else rf"(?m)^[ \t]*{re.escape(end)}[ \t]*$", text)
        if closing:
            return text[: closing.start()], text[closing.end() :].lstrip()
        if opened:
            return text, ""
    return (reply, "") if begun else ("", reply)


def thinks(reply: str) -> bool:
    """Whether a reply has a thought of its own."""
    return split_thinking(reply) != ("", reply)


def open_thought(prompt: str) -> tuple[str, str] | None:
    """The tags of the thought that the prompt opens for the reply; None if it opens none."""
    return next((tags for tags in TAGS if prompt.rstrip().endswith(tags[0])), None)


def before_thought(prompt: str) -> str:
    """The prompt up to the thought, open or empty, with which it ends."""
    return _LAST_THOUGHT.sub("", prompt)


def without_thought(text: str) -> str:
    """The text up to the first opening tag: what a template writes before a reply, less the thought it puts there."""
    return text[: min((text.find(begin) for begin, _ in TAGS if begin in text), default=len(text))]


def within_open_thought(reply: str, prompt: str, tags: tuple[str, str]) -> str:
    """A demonstrated reply as it continues a prompt that has opened a thought.

    The reply's own opening tag is left out; a reply without a thought closes the prompt's first, empty.
    """
    begin, end = tags
    new_line = "\n" if prompt.endswith("\n") else ""
    if end in reply or reply.lstrip().startswith(begin):
        return reply.lstrip().removeprefix(begin).removeprefix(new_line)
    return f"{'' if new_line else chr(10)}\n{end}\n\n{reply}"
