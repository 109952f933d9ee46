"""What tools and games return, as the messages and texts that the model reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from selfdistill.data import Message, join_surrogates
from selfdistill.errors import UserError

OBSERVATION_LIMIT = 2000
"""Maximum characters of an observation; longer ones are truncated and say so."""

_KEYS = ("role", "content", "name", "tool_call_id")
"""Keys that a message from an environment may have."""
_ROLES = ("user", "tool")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters except tab and newline: terminal colours, bells, null."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Mistake(UserError):
    """An environment returned what none may return; the message does not name the environment."""


class Reader:
    """Turns what an environment returns into what the model reads.

    Args:
        limit: maximum characters of a text; longer ones are truncated and say so. None: no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self.shortened = 0
        """Characters that the longest truncated text had at least; 0: nothing was truncated."""

    def text(self, value: Any) -> str:
        """A value as :func:`cleaned` text: text directly, anything else as JSON, or with ``str`` if it has no JSON.

        A generator is read as a list, up to the limit.
        """
        text = value if isinstance(value, str) else self._written(value)
        if self._limit is not None and len(text) > self._limit:
            self.shortened = max(self.shortened, len(text))
        return cleaned(text, self._limit)

    def messages(self, returned: Any) -> list[Message]:
        """A return value as messages: none if empty, a list of messages with cleaned text, else one user turn.

        Raises:
            Mistake: a message has another role than user or tool, or holds what would be lost.
        """
        if returned is None or (isinstance(returned, str | list) and not returned):  # an array has no truth value
            return []
        if isinstance(returned, list) and all(isinstance(one, dict) and "role" in one for one in returned):
            return [self._message(one) for one in returned]
        return [{"role": "user", "content": self.text(returned)}]

    def content(self, content: Any) -> str:
        """The content of a message as text; parts in OpenAI's form are joined.

        Raises:
            Mistake: a part is not text.
        """
        if not (isinstance(content, list) and content and all(isinstance(p, dict) and "type" in p for p in content)):
            return self.text("" if content is None else content)
        for part in content:
            if part["type"] != "text" or not isinstance(part.get("text"), str):
                raise Mistake(f"a message has a part of type {part['type']!r:.60}, expected only text")
        return self.text("".join(part["text"] for part in content))

    def _message(self, given: Mapping[str, Any]) -> Message:
        if given["role"] not in _ROLES:
            raise Mistake(f"a message has the role {given['role']!r:.60}, expected {' or '.join(_ROLES)}")
        if others := [key for key, value in given.items() if key not in _KEYS and value]:
            raise Mistake(f"a message has the key {others[0]!r:.60}, expected only {', '.join(_KEYS)}")
        kept = {key: str(given[key]) for key in ("name", "tool_call_id") if given.get(key)}
        return {"role": given["role"], **kept, "content": self.content(given.get("content"))}

    def _written(self, value: Any) -> str:
        """A value as JSON, up to the limit, or with ``str``."""
        value = self._as_list(value) if isinstance(value, Iterator) else value
        parts, length = [], 0
        try:
            for part in json.JSONEncoder(ensure_ascii=False, default=self._as_list).iterencode(value):
                parts.append(part)
                length += len(part)
                if self._limit is not None and length > self._limit:  # also limits an endless value
                    break
        except (TypeError, ValueError, RecursionError):
            return without_addresses(str(value))
        return "".join(parts)

    def _as_list(self, value: Any) -> list[Any]:
        if not isinstance(value, Iterator):
            raise TypeError(f"no JSON for {type(value).__name__}")
        return list(islice(value, self._limit))  # more would be truncated: each item has a character


def without_addresses(text: str) -> str:
    """The text without the addresses of objects, as in Python's default text of an object: they differ by run."""
    return _ADDRESS.sub("", text)


def cleaned(text: str, most: int | None) -> str:
    """At most ``most`` characters, without control characters or halves of surrogate pairs; never blank."""
    cut = " ... (cut)" if most is not None and len(text) > most else ""
    text = join_surrogates(text[:most]).replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text)
    return text + cut if text.strip() else "(nothing)"
