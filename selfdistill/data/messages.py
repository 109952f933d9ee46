"""Chat messages and texts of a row, validated; each function appends to a list of problems."""

from __future__ import annotations

import re
from typing import Any

from selfdistill.data.columns import FROM_SHAREGPT, is_empty
from selfdistill.data.rows import LONE_SURROGATE, describe_value, from_text, one_of, quoted

Message = dict[str, str]
"""One chat message: ``{"role": "system" | "user" | "assistant", "content": text}``."""

_ROLES = ("system", "user", "assistant")
_INTO_CONTENT = {
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "put it into content as <think>...</think>"),
    **dict.fromkeys(
        ("tool_calls", "function_call"),
        "write the call as text in content, as the model writes it (see docs/data.md)",
    ),
}
"""Keys of other tools' messages, and where their text belongs."""


_LIKE_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:.*\}\s*\]\s*""", re.DOTALL)


def chat_of(value: Any, column: str, problems: list[str]) -> Any:
    """The list of messages of which the value is the JSON text, as tables keep it; anything else as it is.

    A text that looks like messages but is not JSON, such as Python's own form with single quotes, is a problem.
    """
    if not isinstance(value, str) or not _LIKE_CHAT.fullmatch(value):
        return value
    found = from_text(value)
    if isinstance(found, str):
        problems.append(f"column '{column}': found messages as Python writes them, expected a list or its JSON text")
    return found


def messages_of(value: Any, column: str, problems: list[str]) -> list[Message]:
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
        if "from" in message and "role" not in message:
            problems.append(f"column '{at}': found from and value, expected {FROM_SHAREGPT}")
            continue
        role = message.get("role")
        if role == "tool":
            problems.append(f"column '{at}.role': found 'tool', which is not supported, expected {one_of(_ROLES)}")
        elif role not in _ROLES:
            problems.append(wrong(f"{at}.role", role, one_of(_ROLES)))
        elif role == "system" and number:
            problems.append(f"column '{at}.role': found 'system', expected only in the first message")
        text = _content(message.get("content"), f"{at}.content", problems)
        # Arrow writes null for a key that only other messages have. What holds something would be lost silently.
        others = [key for key in message if key not in ("role", "content") and not is_empty(message[key])]
        if others:
            advice = f"; {_INTO_CONTENT[others[0]]}" if others[0] in _INTO_CONTENT else ""
            problems.append(f"column '{at}': found key {quoted(others[0])}, expected only role and content{advice}")
        turns.append({"role": str(role), "content": text})
    return turns if len(problems) == before else []


def _content(value: Any, column: str, problems: list[str]) -> str:
    """The text of a message, also of a list of parts, which are joined as they are, as chat templates do."""
    if not isinstance(value, list) or not value:
        return text_of(value, column, "text", problems)
    texts = []
    for number, part in enumerate(value):
        at = f"{column}[{number}]"
        held = {key for key, held in part.items() if held is not None} if isinstance(part, dict) else set()
        if "type" in held and part["type"] != "text":
            problems.append(f"column '{at}': found a part of type {describe_value(part['type'])}, expected text alone")
        elif held != {"type", "text"} or not isinstance(part["text"], str):
            problems.append(f"column '{at}': found {describe_value(part)}, expected an object with type and text")
        else:
            texts.append(part["text"])
    return text_of("".join(texts), column, "text", problems) if len(texts) == len(value) else ""


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
