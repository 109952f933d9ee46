"""The result of a tool or a game, as the text that the model reads."""

from __future__ import annotations

import json
import re
from typing import Any

from selfdistill.data import join_surrogates

MOST_CHARACTERS = 2000
"""Maximum characters of an observation; longer ones are truncated and say so."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters except tab and newline: terminal colours, bells, null."""


def as_text(value: Any, most: int = MOST_CHARACTERS) -> str:
    """A value as :func:`cleaned` text: text directly, anything else as JSON, or with ``str`` if it has no JSON."""
    if isinstance(value, str):
        return cleaned(value, most)
    parts, length = [], 0
    try:
        for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            parts.append(part)
            length += len(part)
            if length > most:  # also limits an endless value
                break
    except (TypeError, ValueError, RecursionError):
        return cleaned(str(value), most)
    return cleaned("".join(parts), most)


def cleaned(text: str, most: int = MOST_CHARACTERS) -> str:
    """At most ``most`` characters, without control characters or halves of surrogate pairs; never blank."""
    cut = " ... (cut)" if len(text) > most else ""
    text = join_surrogates(text[:most]).replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text)
    return text + cut if text.strip() else "(nothing)"
