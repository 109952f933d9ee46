"""Calls whose arguments stand in tags of their own, as Qwen3-Coder, GLM and MiniMax write them.

``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`` is one form. The tags are found by
rendering a known call. Every value is text, so the tool's JSON schema says what it stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selfdistill.data.tool_calls import InvalidCall, decoded, value_at

Tools = Sequence[Mapping[str, Any]]
Tags = tuple[str, ...]
"""Parts of markup, between which there may be any white space."""

PROBE_ARGUMENTS: dict[str, Any] = {"probe_key": "probe_value", "probe_next": 90417}
"""Arguments with which templates are probed. Some write a text with another tag than a number; they are not read."""
_OF_PYTHON = {"True": True, "False": False, "None": None}
"""Values that some templates write as Python does."""


@dataclass(frozen=True)
class ParameterFormat:
    """The tags around each part of a call."""

    begin: Tags
    """Before the name."""
    name_end: Tags
    key_begin: Tags
    key_end: Tags
    """Between an argument's name and its value."""
    value_end: Tags
    end: Tags
    """After the last argument."""
    before_value: str
    after_value: str
    """White space that the template writes around a value, and that does not belong to it."""

    @property
    def written(self) -> str:
        """The tags."""
        tags = (self.begin, self.name_end, self.key_begin, self.key_end, self.value_end, self.end)
        return "".join(map(_shown, tags))

    def unwritable(self, arguments: Mapping[str, Any]) -> str | None:
        """The first of a call's arguments that would not be read back, described; None if there is none."""
        for key, value in arguments.items():
            if re.search(r"[<>]|\A\s|\s\Z", key):
                return f"an argument with the name {key!r}"
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if found := self._ends_value.search(text):
                return f"an argument that contains {found[0]!r}"
        return None

    def read(self, text: str, tools: Tools) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
        """The content of a reply, and the name and arguments of each call.

        Raises:
            InvalidCall: a call cannot be read.
        """
        said, calls, at = [], [], 0
        while found := self._begin.search(text, at):
            said.append(text[at : found.start()].strip())
            name, arguments, at = self._one(text, found.start())
            calls.append((name, _by_schema(name, arguments, tools)))
        said.append(text[at:].strip())
        return "\n".join(filter(None, said)) if calls else text, calls

    def _one(self, text: str, at: int) -> tuple[str, dict[str, str], int]:
        """Name and arguments of the call that begins at a position, and where it ends."""
        ends = f"{_shown(self.key_begin)} or {self.end[0]}"
        begun = self._name.match(text, at)
        if begun is None:
            raise InvalidCall(f"a call must begin with {_shown(self.begin)} and a name, then {ends}")
        name, at = begun["name"], begun.end()
        arguments: dict[str, str] = {}
        while not (ended := self._end.match(text, at)):
            given = self._argument.match(text, at)
            if given is None or self._ends_value.search(given["value"]):
                raise InvalidCall(f"in the call of {name}, expected {self._shown_argument} or {self.end[0]}")
            if given["key"] in arguments:
                raise InvalidCall(f"the call of {name} has the argument {given['key']!r} twice")
            value = given["value"].removeprefix(self.before_value).removesuffix(self.after_value)
            arguments[given["key"]] = value
            at = given.end()
        return name, arguments, ended.end()

    @property
    def _shown_argument(self) -> str:
        return f"{_shown(self.key_begin)}KEY{_shown(self.key_end)}VALUE{_shown(self.value_end)}"

    @cached_property
    def _outer(self) -> int:
        """How many parts of ``begin`` may be missing: tags around the one that leads to the name."""
        return max(place for place, part in enumerate(self.begin) if part.startswith("<"))

    @cached_property
    def _begin(self) -> re.Pattern[str]:
        """Where a call begins, complete or not."""
        return re.compile("|".join(map(re.escape, (self.begin[0], self.begin[self._outer]))))

    @cached_property
    def _name(self) -> re.Pattern[str]:
        outer, inner = self.begin[: self._outer], self.begin[self._outer :]
        lead = rf"(?:{any_space(outer)}\s*)?{any_space(inner)}\s*"
        ahead = rf"(?=\s*(?:{any_space(self.key_begin)}|{any_space(self.end[:1])}))"
        return re.compile(rf"{lead}(?P<name>[^<>\s]+?)\s*{any_space(self.name_end)}{ahead}")

    @cached_property
    def _argument(self) -> re.Pattern[str]:
        key = rf"\s*{any_space(self.key_begin)}\s*(?P<key>[^<>]*?)\s*{any_space(self.key_end)}"
        return re.compile(rf"{key}(?P<value>.*?){any_space(self.value_end)}", re.DOTALL)

    @cached_property
    def _ends_value(self) -> re.Pattern[str]:
        """What no value may contain: it would end it, or begin the next."""
        return re.compile("|".join(map(any_space, (self.value_end, self.key_begin))))

    @cached_property
    def _end(self) -> re.Pattern[str]:
        rest = rf"(?:\s*{any_space(self.end[1:])})?" if self.end[1:] else ""
        return re.compile(rf"\s*{re.escape(self.end[0])}{rest}")


def parameter_format(name: str, call: str, bare: str) -> ParameterFormat | None:
    """The form in which a template writes calls; None if it is another.

    Args:
        name: of the called tool.
        call: a turn with a call that has :data:`PROBE_ARGUMENTS`.
        bare: a turn with a call without arguments.
    """
    between, rest = [], call
    for part in (name, *(str(part) for pair in PROBE_ARGUMENTS.items() for part in pair)):
        before, found, rest = rest.partition(part)
        if not found:
            return None
        between.append(before)
    begin, to_key, to_value, to_next_key, to_next_value = between
    key_begin = _shared_end(tags_of(to_key), tags_of(to_next_key))
    if not key_begin:
        return None
    name_end, value_end = tags_of(to_key)[: -len(key_begin)], tags_of(to_next_key)[: -len(key_begin)]
    end = tags_of(rest)[len(value_end) :]
    made = ParameterFormat(
        begin=tags_of(begin),
        name_end=name_end,
        key_begin=key_begin,
        key_end=tags_of(to_value),
        value_end=value_end,
        end=end,
        before_value=to_value[len(to_value.rstrip()) :],
        after_value=to_next_key[: len(to_next_key) - len(to_next_key.lstrip())],
    )
    in_tags = all(any(part.startswith("<") for part in parts) for parts in (made.begin, key_begin, value_end, end))
    is_whole = tags_of(rest) == (*value_end, *end) and tags_of(bare.partition(name)[2]) == (*name_end, *end)
    return made if in_tags and is_whole and made.key_end and to_value == to_next_value else None


def tags_of(text: str) -> Tags:
    """The parts of markup, each of which begins with ``<`` or after white space."""
    return tuple(re.findall(r"<*[^<\s]+", text))


def _shown(tags: Tags) -> str:
    """Tags as text, with the spaces within them."""
    return "".join(part if part.startswith("<") else f" {part}" for part in tags).strip()


def any_space(tags: Tags) -> str:
    """A pattern of tags with any white space between them."""
    return r"\s*".join(map(re.escape, tags))


def _shared_end(one: Tags, other: Tags) -> Tags:
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]


def _by_schema(name: str, arguments: Mapping[str, str], tools: Tools) -> dict[str, Any]:
    """The arguments of a call as the tool's schema wants them; text where it allows text or says nothing."""
    functions = [tool.get("function", tool) for tool in tools]
    called = next((function for function in functions if value_at(function, ["name"]) == name), None)
    made: dict[str, Any] = {}
    for key, text in arguments.items():
        schema = value_at(called, ["parameters", "properties", key])
        made[key] = text if _may_be_text(schema) else _value_of(text)
    return made


def _may_be_text(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return True
    choices = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(choices, list):
        return any(map(_may_be_text, choices))
    kinds = schema.get("type", "string")
    return "string" in (kinds if isinstance(kinds, list) else [kinds])


def _value_of(text: str) -> Any:
    """The JSON value that the text is, else the text: the tool then says what it expects."""
    bare = text.strip()
    if bare in _OF_PYTHON:
        return _OF_PYTHON[bare]
    try:
        value, end = decoded(bare, 0)
    except InvalidCall:
        return text
    return value if end == len(bare) else text
