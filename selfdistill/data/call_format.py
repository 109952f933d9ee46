"""How a model writes tool calls: in its chat template's format, found by rendering a known call, or as lines of text.

The text layout is for models whose template writes no calls, and for models without a template. A call is the lines
``Action: name`` and ``Action Input: {json}``, an observation is a user turn ``Observation: ...``, and the system turn
lists the tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from selfdistill.data.messages import Message, text_of_reply, uses_tools
from selfdistill.data.parameter_format import (
    PROBE_ARGUMENTS,
    ParameterFormat,
    Tools,
    any_space,
    parameter_format,
    tags_of,
)
from selfdistill.data.tool_calls import InvalidCall, actions_in, decoded, value_at

Render = Callable[[list[Message]], str | None]
"""What the template writes of messages that follow a user turn; None if it rejects them."""

_NAME, _KEY, _VALUE = "probe_name", "probe_key", "probe_value"
_ARGUMENTS = {_KEY: _VALUE}
_BRACE = re.compile("{")
_ID = re.compile(r"call\d{5}")
"""A placeholder id of nine characters, as Mistral's templates want."""
OBSERVED = "probe_result"
"""The content of :data:`PROBE_RESULT`."""
PROBE_RESULT = {"role": "tool", "name": _NAME, "content": OBSERVED}
"""The observation with which templates are probed."""
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "A probe."}}},
    },
}


@dataclass(frozen=True)
class CallFormat:
    """How a template writes calls. There may be any white space between the parts."""

    begin: str = ""
    """Before the first call's JSON object, or before its name."""
    between: str = ""
    """From the end of a call to the next; empty if the template writes only one call."""
    end: str = ""
    """After the last call."""
    name: tuple[str, ...] = ()
    """Keys that lead to the name in a call's object; none if the name is written before the arguments."""
    arguments: tuple[str, ...] = ()
    """Keys that lead to the arguments."""
    in_list: bool = False
    """Whether the objects are in a list."""
    middle: str = ""
    """Between a name and its arguments, if no object has both."""
    arguments_as_text: bool = False
    """Whether the template wants the arguments as JSON text."""
    with_ids: bool = False
    """Whether it wants calls to have ids."""
    to_result: str = ""
    """From the value of a call's last argument to the call's result."""
    parameters: ParameterFormat | None = None
    """The form of calls whose arguments have tags of their own; None for JSON."""

    @property
    def written(self) -> str:
        """The text around calls."""
        tags = self.parameters.written if self.parameters else ""
        return "".join((self.begin, self.middle, self.between, self.end, tags))

    @property
    def is_read(self) -> bool:
        """Whether calls in this format can be read."""
        return bool(self.name or self.begin.strip() or self.parameters)

    def shown(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the template's form.

        Calls are numbered within their turn, so that a turn alone has the ids that it has in a chat.
        """
        made: list[Message] = []
        waiting: list[str] = []
        for message in messages:
            if "tool_calls" in message:
                calls, waiting = [], []
                for number, call in enumerate(message["tool_calls"]):
                    function = call["function"]
                    if self.arguments_as_text:
                        text = json.dumps(function["arguments"], ensure_ascii=False)
                        call = {**call, "function": {**function, "arguments": text}}
                    if self.with_ids:
                        call = {"id": f"call{number:05d}", **call}
                        waiting.append(call["id"])
                    calls.append(call)
                message = {**message, "tool_calls": calls}
            elif message["role"] == "tool" and waiting:
                message = {"tool_call_id": waiting[0], **message}
                waiting = [each for each in waiting if each != message["tool_call_id"]]
            made.append(message)
        return made

    def unwritable(self, calls: Sequence[Mapping[str, Any]]) -> str | None:
        """The first argument of calls that could not be read back, described; None if there is none."""
        if self.parameters is None:
            return None
        return next(filter(None, (self.parameters.unwritable(call["function"]["arguments"]) for call in calls)), None)

    def read(self, text: str, tools: Tools) -> tuple[str, list[dict[str, Any]]]:
        """The content and the calls of a reply.

        Args:
            text: the reply.
            tools: the schemas by which an argument that is written as text may become another value.

        Raises:
            InvalidCall: a call cannot be read.
        """
        if self.parameters:
            content, found_calls = self.parameters.read(text, tools)
            return content, [_call(name, arguments, {}) for name, arguments in found_calls]
        first = self._first(text)
        if first is None:
            return text, []
        said, calls, at = [text[: first.start()].rstrip()], [], first.end()
        while True:
            found, at = self._one(text, at)
            calls += found
            if following := self._next.match(text, at):
                at = following.end()
            elif self.begin.strip() and (again := self._begin.search(text, at)):
                said.append(self._after(text[at : again.start()]))
                at = again.end()
            else:
                break
        said.append(self._after(text[at:]))
        return "\n".join(filter(None, said)), calls

    @cached_property
    def _begin(self) -> re.Pattern[str]:
        return re.compile(any_space(tags_of(self.begin)))

    @cached_property
    def _next(self) -> re.Pattern[str]:
        """From a call to the next; where the template writes only one call, or begins each alike, it never matches."""
        if tags := tags_of(self.between):
            return re.compile(rf"\s*{any_space(tags)}")
        return re.compile(r"\s*(?=\{)" if self.between else r"(?!)")

    def _after(self, text: str) -> str:
        """The content in a text that follows a call.

        Raises:
            InvalidCall: the text has a part that only a further call has.
        """
        end, between = tags_of(self.end), tags_of(self.between)
        marks = [tag for tag in between if tag not in end and re.match(r"[<\[]\W*\w", tag)]
        if any(mark in text for mark in marks):
            ways = " or ".join(dict.fromkeys("".join(tags) for tags in (end, between) if tags))
            raise InvalidCall(f"after a call, expected {ways}")
        found = re.match(rf"\s*{any_space(end)}", text)
        return text[found.end() if found else 0 :].strip()

    def _first(self, text: str) -> re.Match[str] | None:
        """What leads to the first call; None if there is none."""
        if self.begin.strip():
            return self._begin.search(text)
        if not self.name:
            return None
        # Llama's models may write a tag that its template does not.
        lead = r"(?m)(?:^[ \t]*|<\|python_tag\|>\s*)"
        return re.search(rf'{lead}(?=\[?\s*\{{\s*"({re.escape(self.name[0])}|id|type)"\s*:)', text)

    def _one(self, text: str, at: int) -> tuple[list[dict[str, Any]], int]:
        """The calls that begin at a position (several if they are a list), and where they end."""
        at = _skip(text, at)
        if self.name:
            value, at = decoded(text, at)
            values = value if isinstance(value, list) else [value]
            return [_call(value_at(each, self.name), value_at(each, self.arguments), each) for each in values], at
        cut = re.compile(any_space(tags_of(self.middle)) or r"(?=\{)").search(text, at)
        if cut is None:
            raise InvalidCall(f"the call has no {self.middle.strip() or 'arguments'} after its name")
        value, end = decoded(text, _skip(text, cut.end()))
        return [_call(text[at : cut.start()].strip(), value, {})], end


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _call(name: Any, arguments: Any, whole: Any) -> dict[str, Any]:
    if not isinstance(name, str) or not name.strip():
        raise InvalidCall("the call has no name")
    if isinstance(arguments, str):
        text = arguments.strip()
        arguments, end = decoded(text, 0)
        if end < len(text):
            raise InvalidCall(f"the arguments of {name} go on after their JSON value")
    if not isinstance(arguments, dict):
        raise InvalidCall(f"the arguments of {name} are not a JSON object")
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    given = whole.get("id") if isinstance(whole, dict) else None
    return {"id": given, **made} if isinstance(given, str) and given and not _ID.fullmatch(given) else made


# --- probing ---


def probe_call(calls: int = 1, arguments: Mapping[str, Any] = _ARGUMENTS) -> Message:
    """An assistant turn of known calls."""
    call = {"type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call] * calls}


def probe(reply: Render, prompt: Render) -> CallFormat | None:
    """How a template writes calls; None if it does not, or if it does not show tool results.

    Args:
        reply: writes an assistant turn without its end token.
        prompt: writes a whole chat with a generation prompt.
    """
    for as_text, with_ids in ((False, False), (False, True), (True, False), (True, True)):
        form = CallFormat(arguments_as_text=as_text, with_ids=with_ids)
        call = reply(form.shown([probe_call()]))
        if call is None or _NAME not in call or _VALUE not in call:
            continue
        head, observed, _ = (prompt(form.shown([probe_call(), PROBE_RESULT])) or "").partition(OBSERVED)
        if observed:
            found = _format(form, call, reply(form.shown([probe_call(2)])))
            parameters = None if found.is_read else _parameters(form, reply)
            return replace(found, parameters=parameters, to_result=head.rpartition(_VALUE)[2])
    return None


def _parameters(form: CallFormat, reply: Render) -> ParameterFormat | None:
    call, bare = (reply(form.shown([probe_call(1, arguments)])) for arguments in (PROBE_ARGUMENTS, {}))
    return None if call is None or bare is None else parameter_format(_NAME, call, bare)


def _format(form: CallFormat, one: str, two: str | None) -> CallFormat:
    """The format of a turn with one known call, and of one with two, if the template writes those.

    A format with neither an object nor a place for the arguments can be written, but not read.
    """
    starts = [found.start() for found in _BRACE.finditer(one, 0, one.index(_NAME))]
    found = (_object_format(form, one, two, start) for start in reversed(starts))
    return next(filter(None, found), None) or _named_format(form, one, two) or form


def _object_format(form: CallFormat, one: str, two: str | None, start: int) -> CallFormat | None:
    """The format whose objects have name and arguments, as the one at ``start``; None if that has not."""
    value, end = _tried(one, start)
    name, arguments = _path(value, _NAME), _path(value, _ARGUMENTS)
    if not name or not arguments:
        return None
    form = replace(form, name=name, arguments=arguments)
    before = one[:start]
    if before.rstrip().endswith("["):
        outer = before.rindex("[")
        values, outer_end = _tried(one, outer)
        if isinstance(values, list):
            return replace(form, begin=one[:outer], end=one[outer_end:], in_list=True)
    return replace(form, begin=before, between=_between_objects(before, two), end=one[end:])


def _between_objects(before: str, two: str | None) -> str:
    """From the end of the first call's object to the second's; "" if the template writes only one call."""
    if two is None or not two.startswith(before):
        return ""
    first_end = _tried(two, len(before))[1]
    starts = (found.start() for found in _BRACE.finditer(two, first_end, two.find(_NAME, first_end)))
    return next((two[first_end:start] for start in starts if _path(_tried(two, start)[0], _NAME)), "")


def _named_format(form: CallFormat, one: str, two: str | None) -> CallFormat | None:
    """The format that writes the name before the arguments; None if those are no object."""
    name = one.index(_NAME)
    name_end = name + len(_NAME)
    starts = (found.start() for found in _BRACE.finditer(one, name_end))
    start = next((start for start in starts if _tried(one, start)[0] == _ARGUMENTS), None)
    if start is None:
        return None
    end, between = _tried(one, start)[1], ""
    if two is not None and two.startswith(one[:end]) and (second := two.find(_NAME, end)) >= 0:
        between = two[end:second]
    return replace(form, begin=one[:name], between=between, end=one[end:], middle=one[name_end:start])


def _tried(text: str, at: int) -> tuple[Any, int]:
    try:
        return decoded(text, at)
    except InvalidCall:
        return None, at


def _path(value: Any, wanted: Any) -> tuple[str, ...]:
    """The keys that lead to a wanted value, at most two; none if it is not there."""
    if not isinstance(value, dict):
        return ()
    for key, part in value.items():
        if part == wanted or (isinstance(part, str) and wanted == _ARGUMENTS and _tried(part, 0)[0] == wanted):
            return (key,)
    return next(((key, *path) for key, part in value.items() if len(path := _path(part, wanted)) == 1), ())


# --- the text layout ---


def in_text(messages: Sequence[Message]) -> list[Message]:
    """Messages with calls and observations as text; consecutive observations become one user turn."""
    if not uses_tools(messages):
        return list(messages)
    made: list[Message] = []
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            text = text_of_reply(message)
            same = type(message["content"])  # a demonstration stays verbatim
            made.append({"role": "assistant", "content": same(text)})
        elif message["role"] == "tool":
            text = f"Observation: {message['content']}"
            if number and messages[number - 1]["role"] == "tool":
                made[-1] = {"role": "user", "content": f"{made[-1]['content']}\n{text}"}
            else:
                made.append({"role": "user", "content": text})
        else:
            made.append(message)
    return made


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], how: bool) -> list[Message]:
    """The messages with the tools listed in the system turn, and ``how`` to call them."""
    lines = ["You can call these tools:"]
    for tool in tools:
        function = tool.get("function", tool)
        parameters = json.dumps(function.get("parameters", {}).get("properties", {}), ensure_ascii=False)
        about = f": {function['description']}" if function.get("description") else ""
        lines.append(f"- {function.get('name', '')}{about}\n  Parameters: {parameters}")
    if how:
        lines += ["To call one, write its name and its arguments as a JSON object:", "Action: the name"]
        lines += ["Action Input: the arguments", "The next turn then begins with Observation: and has the result."]
    text = "\n".join(lines)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def read_text(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The content and the calls of a reply in the text layout.

    Raises:
        InvalidCall: an ``Action:`` line has no valid arguments.
    """
    found = actions_in(text)
    if found is None:
        raise InvalidCall(
            "a line 'Action: name' must be followed by 'Action Input:' and a JSON object, in which no key comes twice"
        )
    if not found:
        return text, []
    calls = [_call(name, value, {}) for name, value, _, _ in found]
    starts, ends = [start for *_, start, _ in found], [end for *_, end in found]
    said = [text[end:start].strip() for end, start in zip([0, *ends], [*starts, len(text)], strict=True)]
    return "\n".join(filter(None, said)), calls
