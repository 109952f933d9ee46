"""Chat messages and texts of a row, validated; each function appends to a list of problems."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from selfdistill.data.call_results import in_call_order
from selfdistill.data.columns import FROM_SHAREGPT, is_empty
from selfdistill.data.rows import LONE_SURROGATE, describe_value, from_text, one_of, quoted
from selfdistill.data.thinking import split_thinking
from selfdistill.data.tool_calls import written

Message = dict[str, Any]
"""One chat message: ``{"role": "system" | "user" | "assistant" | "tool", "content": text}``.

An assistant message may have ``tool_calls``, a list of ``{"type": "function", "function": {"name": text, "arguments":
object}}``, each with an ``id`` if one was given; its content may then be "". A tool message may have ``name`` and
``tool_call_id``.
"""

LearntTurns = Literal["auto", "last", "all"]
"""Which assistant turns of a chat are learnt; ``auto``: all if it has tool calls or tool turns, else the last."""

_WANT_COMPLETION = "text or a list of one assistant message"
_WANT_EPISODE = "one assistant message, or turns from an assistant's to an assistant's"
_ROLES = ("system", "user", "assistant", "tool")
_OWN_KEYS = {"assistant": ("tool_calls",), "tool": ("name", "tool_call_id")}
_ADVICE = {
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "put it into content as <think>...</think>"),
    "tool_calls": "only the assistant calls tools",
    "function_call": "write it as tool_calls (see docs/data.md)",
    "weight": "leave it out; put turns that are not learnt into 'prompt', and the rest into 'completion'",
    "name": "write it into content, or leave it out",
}
"""Keys of other tools' messages, and what to do with them."""
_AS_PICTURE = """write {"type": "image"} alone, and the picture into the column 'images'"""

_OBJECTS = re.compile(r"\s*\[\s*\{(.*)\}\s*\]\s*", re.DOTALL)
_FIRST_KEY = re.compile(r"""\s*['"](?:role|content|from|value)['"]\s*:""")
_KEYS = re.compile(r"""['"](role|content)['"]\s*:""")


def chat_of(value: Any, column: str, problems: list[str]) -> Any:
    """The list of messages of which the value is the JSON text, as tables keep it; anything else as it is.

    A text that looks like messages but is not JSON, such as Python's own form with single quotes, is a problem.
    """
    if not isinstance(value, str) or not _is_like_chat(value):
        return value
    found = from_text(value)
    if isinstance(found, str):
        problems.append(f"column '{column}': found the text of a Python list, expected a list or its JSON text")
    return found


def _is_like_chat(text: str) -> bool:
    """Whether a text is written as a list of objects with role and content, or whose first key is one of a message."""
    objects = _OBJECTS.fullmatch(text)
    return objects is not None and (bool(_FIRST_KEY.match(objects[1])) or len({*_KEYS.findall(objects[1])}) == 2)


def messages_of(value: Any, column: str, problems: list[str]) -> list[Message]:
    """The list's messages, each with the keys of :data:`Message` only; empty if any is invalid.

    Tool messages are in the order of the calls that they answer.
    """
    if not isinstance(value, list) or not value:
        problems.append(wrong(column, value, "a list of messages"))
        return []
    before = len(problems)
    turns: list[Message] = []
    for number, message in enumerate(value):
        at = f"{column}[{number}]"
        if not isinstance(message, dict):
            problems.append(wrong(at, message, "an object with role and content"))
        elif "from" in message and "role" not in message:
            problems.append(f"column '{at}': found from and value, expected {FROM_SHAREGPT}")
        else:
            turns.append(_message(message, at, problems))
            if turns[-1]["role"] == "system" and number:
                problems.append(f"column '{at}.role': found 'system', expected only in the first message")
    if len(problems) == before:
        turns = in_call_order(turns, column, problems)
    return turns if len(problems) == before else []


def _message(message: dict[str, Any], at: str, problems: list[str]) -> Message:
    role = message.get("role")
    if role not in _ROLES:
        advice = "; write 'system'" if role == "developer" else ""
        problems.append(wrong(f"{at}.role", role, one_of(_ROLES)) + advice)
    # Arrow writes null for a key that only other messages have. What holds something would be lost silently.
    held = [key for key in message if key not in ("role", "content") and not is_empty(message[key])]
    own = _OWN_KEYS.get(str(role), ())
    if others := [key for key in held if key not in own]:
        advice = f"; {_ADVICE[others[0]]}" if others[0] in _ADVICE else ""
        *first, last = ["role", "content", *own]
        expected = f"expected only {', '.join(first)} and {last}"
        problems.append(f"column '{at}': found key {quoted(others[0])}, {expected}{advice}")
    content = message.get("content")
    is_blank = is_empty(content) and content != {}
    made: Message = {"role": str(role), "content": ""}
    if role == "assistant" and is_blank and "tool_calls" in message and "tool_calls" not in held:
        problems.append(f"column '{at}': found neither content nor tool_calls, expected one of them")
    elif not is_blank or (role != "tool" and "tool_calls" not in held):
        made["content"] = _content(content, f"{at}.content", role == "assistant", problems)
    if role == "assistant" and "tool_calls" in held:
        made["tool_calls"] = tool_calls_of(message["tool_calls"], f"{at}.tool_calls", problems)
    if role == "tool":
        keys = [key for key in own if key in held]
        made |= {key: text_of(message[key], f"{at}.{key}", "text", problems) for key in keys}
    return made


def _content(value: Any, column: str, is_reply: bool, problems: list[str]) -> str:
    """The text of a message, also of a list of parts, which are joined as they are, as chat templates do."""
    if not isinstance(value, list) or not value:
        return text_of(value, column, "text", problems)
    texts = []
    for number, part in enumerate(value):
        at = f"{column}[{number}]"
        held = {key for key, held in part.items() if held is not None} if isinstance(part, dict) else set()
        if "type" in held and part["type"] != "text":
            expected = _in_place_of(part["type"], held, is_reply)
            problems.append(f"column '{at}': found a part of type {describe_value(part['type'])}{expected}")
        elif held != {"type", "text"} or not isinstance(part["text"], str):
            problems.append(f"column '{at}': found {describe_value(part)}, expected an object with type and text")
        else:
            texts.append(part["text"])
    return text_of("".join(texts), column, "text", problems) if len(texts) == len(value) else ""


def _in_place_of(kind: Any, held: set[Any], is_reply: bool) -> str:
    """What to do about a part that is not text; the places of a row's pictures have become text before."""
    if kind not in ("image", "image_url") or is_reply:
        return ", expected only text"
    if kind == "image" and held == {"type"}:
        return ", but no picture in the column 'images'; add it"
    return f"; {_AS_PICTURE}"


def tool_calls_of(value: Any, column: str, problems: list[str]) -> list[dict[str, Any]]:
    """Calls in the form of OpenAI, or flat with name and arguments, as those of :data:`Message`."""
    if not isinstance(value, list):
        problems.append(wrong(column, value, "a list of calls"))
        return []
    return [_call(call, f"{column}[{number}]", problems) for number, call in enumerate(value)]


def _call(value: Any, at: str, problems: list[str]) -> dict[str, Any]:
    call = {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else {}
    flat = "function" not in call
    function = call if flat else {key: part for key, part in _as_object(call["function"]).items() if part is not None}
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        problems.append(f"column '{at}': found {_named(value)}, expected a call with name and arguments")
        return {}
    known = [("id", "type", "name", "arguments")] if flat else [("id", "type", "function"), ("name", "arguments")]
    for held, keys in zip([call] if flat else [call, function], known, strict=True):
        if unknown := [key for key in held if key not in keys]:
            problems.append(f"column '{at}': found key {quoted(unknown[0])}, expected only {', '.join(keys)}")
    if call.get("type", "function") != "function":
        problems.append(wrong(f"{at}.type", call["type"], "'function'"))
    name = text_of(function["name"], f"{at}.name", "text", problems)
    made = {"type": "function", "function": {"name": name, "arguments": _arguments(function, at, problems)}}
    return {"id": text_of(call["id"], f"{at}.id", "text", problems), **made} if "id" in call else made


def _as_object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _named(value: Any) -> str:
    return "a call without a name" if isinstance(value, dict) else describe_value(value)


def _arguments(function: dict[str, Any], at: str, problems: list[str]) -> dict[str, Any]:
    """The arguments: an object, in which null counts as absent as Arrow writes it for all keys, or its JSON text."""
    given = function.get("arguments", {})
    if not given:
        found: Any = {}
    elif isinstance(given, str):
        found = from_text(given)
    else:
        found = given
    if not isinstance(found, dict):
        problems.append(wrong(f"{at}.arguments", given, "an object, or its JSON text"))
        return {}
    check_json(found, f"{at}.arguments", problems)
    return found if isinstance(given, str) else without_null(found)


def check_json(value: Any, column: str, problems: list[str]) -> None:
    """A problem if the value is not JSON, or if a text or key in it, at any depth, has a lone surrogate."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):
        problems.append(f"column '{column}': found a value that is not JSON, expected JSON values")
    else:
        if LONE_SURROGATE.search(text):
            problems.append(f"column '{column}': found a lone surrogate, expected text")


def without_null(value: Any) -> Any:
    """The value without keys whose value is null, at any depth."""
    if isinstance(value, dict):
        return {key: without_null(part) for key, part in value.items() if part is not None}
    return [without_null(part) for part in value] if isinstance(value, list) else value


def uses_tools(turns: Sequence[Message]) -> bool:
    """Whether a chat has tool calls or tool turns."""
    return any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)


def first_learnt(turns: Sequence[Message], learnt: LearntTurns) -> int:
    """Where a chat that ends with the assistant is divided into prompt and replies."""
    if learnt == "last" or (learnt == "auto" and not uses_tools(turns)):
        return len(turns) - 1
    return next(number for number, turn in enumerate(turns) if turn["role"] == "assistant")


def question_of(turns: Sequence[Message]) -> str:
    """The text of the last user turn, which calls and results may follow; "" if there is none."""
    return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")


def with_question(turns: Sequence[Message], text: str) -> list[Message]:
    """The turns with another text as their last user turn; there must be one."""
    place = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
    return [*turns[:place], {"role": "user", "content": text}, *turns[place + 1 :]]


def text_of_reply(message: Message) -> str:
    """A reply as one text, its calls as lines that the scorer ``tool_call`` reads."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message["content"], written(calls)]))


def said_in(message: Message) -> str:
    """A reply as one text without its thought, as its scorer reads it, and its calls as lines."""
    return text_of_reply({**message, "content": split_thinking(message["content"])[1]})


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    """The messages, of which replies have no thoughts."""
    return [
        {**message, "content": split_thinking(message["content"])[1]} if message["role"] == "assistant" else message
        for message in messages
    ]


def speaker_of(message: Message) -> str:
    """Who says a message: its role, with a tool's name."""
    return f"{message['role']} {message.get('name', '')}".strip()


def as_transcript(messages: Sequence[Message]) -> str:
    """Messages as one text, each after its speaker."""
    return "\n".join(f"{speaker_of(message)}: {text_of_reply(message)}" for message in messages)


def as_written(message: Message) -> Message:
    """The message as a file holds it: arguments as JSON text, in which null is kept."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def text_of(value: Any, column: str, want: str, problems: list[str]) -> str:
    """The value if it is non-blank text; else "", with a problem."""
    if isinstance(value, str) and value.strip() and not LONE_SURROGATE.search(value):
        return value
    problems.append(wrong(column, value, want))
    return ""


def check_order(replies: Sequence[Message], form: str, problems: list[str]) -> None:
    """A problem if two replies follow each other: between them somebody else says something."""
    if not problems and any(one["role"] == other["role"] == "assistant" for one, other in pairwise(replies)):
        column = "messages" if form == "messages" else "completion"
        problems.append(
            f"column '{column}': found two assistant turns in a row, expected a tool or user turn in between"
        )


def replies_of(row: dict[str, Any], problems: list[str]) -> list[Message]:
    """The completion's messages; none without a completion."""
    value = row.get("completion")
    if value is None:
        return []
    if not isinstance(value, list) or not value:
        return [{"role": "assistant", "content": text_of(value, "completion", _WANT_COMPLETION, problems)}]
    turns = messages_of(value, "completion", problems)
    roles = [turn["role"] for turn in turns]
    if turns and not roles[0] == roles[-1] == "assistant":
        problems.append(f"column 'completion': found messages of {', '.join(roles)}, expected {_WANT_EPISODE}")
    return turns


# --- wording ---


def wrong(column: str, value: Any, want: str) -> str:
    """The message for a column with an invalid value."""
    return f"column '{column}': found {describe_value(value)}, expected {want}"


def not_object(row: Any) -> str:
    """The message for a row that is not an object."""
    return f"found {describe_value(row)}, expected an object"


def notes_on_earlier_replies(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Sequence[Mapping[str, Any]]]
) -> list[str]:
    """A note that of several replies in ``messages`` only the last counts.

    Args:
        rows: as read.
        prompts: of each row, what comes before the reply that counts; () if all count.
    """
    of_chats = [prompt for row, prompt in zip(rows, prompts, strict=True) if row.get("messages") is not None]
    several = sum(any(turn["role"] == "assistant" for turn in prompt) for prompt in of_chats)
    if not several:
        return []
    return [
        f"{several} of {len(rows)} rows have several replies, of which only the last counts; set turns all to count all"
    ]
