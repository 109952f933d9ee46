"""Tools: Python functions that a model may call, with schemas from their signatures and docstrings."""

from __future__ import annotations

import copy
import inspect
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from selfdistill.data import schema_of
from selfdistill.errors import UserError, shortened

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_HINTS = (str, int, float, bool, type(None), list, dict, Any, Union, types.UnionType, Literal)
"""Types of arguments that JSON can hold, and of which a tool gets what it declared."""
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class BadArguments(ValueError):
    """A call's arguments do not fit the tool; the message tells the model why."""


@dataclass(frozen=True)
class Tool:
    """A function with the JSON schema that the model sees."""

    function: Callable[..., Any]
    schema: dict[str, Any]

    @property
    def name(self) -> str:
        """The name that the model calls."""
        return str(self.schema["function"]["name"])

    def arguments(self, given: Any) -> dict[str, Any]:
        """A copy of a call's arguments, checked against the schema.

        A whole number may be written 3.0. Nothing else is converted: a model that writes "3" is told to write 3.

        Raises:
            BadArguments: the arguments are not an object, or one is missing, unknown or of the wrong type.
        """
        if not isinstance(given, dict):
            raise BadArguments(f"the arguments are {_shown(given)}, expected a JSON object")
        parameters = self.schema["function"]["parameters"]
        known: dict[str, Any] = parameters["properties"]
        for name in given:
            if name not in known:
                raise BadArguments(f"unknown argument {_shown(name)}, expected {', '.join(known) or 'none'}")
        for name in parameters.get("required", ()):
            if name not in given:
                raise BadArguments(f"missing argument '{name}'")
        return {name: _fitted(value, known[name], name) for name, value in copy.deepcopy(given).items()}


def tool_of(function: Callable[..., Any]) -> Tool:
    """A function as a tool, with a schema made from its name, type hints and docstring (Google style).

    Raises:
        UserError: type hints or a docstring line for an argument are missing, one cannot be passed by name, or its type
            is none of JSON's; or it is an async generator.
    """
    name = getattr(function, "__qualname__", repr(function))
    if inspect.isasyncgenfunction(function):
        raise UserError(f"tool {name}: found an async generator, expected a function that returns its result")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in _BY_NAME:
            raise UserError(
                f"tool {name}: argument {str(parameter)!r} cannot be passed by name; declare each argument by name"
            )
    try:
        schema = schema_of(function)
    except UserError as error:
        raise UserError(f"tool {name}: {error}") from error
    schema["function"].pop("return", None)  # of no use to a model
    for argument, hint in get_type_hints(function).items():
        if argument != "return" and (unfit := _unfit(hint)):
            raise UserError(f"tool {name}: argument {argument!r} has the type {unfit}")
    return Tool(function, schema)


def _unfit(hint: Any) -> str:
    """The part of a type hint that no call can give, and what to write instead; empty if there is none."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return ""
    if kind not in _HINTS:
        shown = getattr(kind, "__name__", repr(kind))
        return f"{shown}, which a call cannot give; use Literal[...], list[...] or another type of JSON"
    if kind is dict and parts and parts[0] not in (str, Any):
        return "dict with other keys than str, which a call cannot give; use dict[str, ...]"
    return next((found for part in parts if (found := _unfit(part))), "")


def _fitted(value: Any, schema: Mapping[str, Any], name: str) -> Any:
    """The value; a whole number is converted to int if the schema expects one.

    Raises:
        BadArguments: the value does not fit the schema.
    """
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        return _first_fitting(value, schema["anyOf"], name)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, float) and "integer" in kinds and "number" not in kinds and value.is_integer():
        value = int(value)
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise BadArguments(f"argument '{name}' is {_shown(value)}, expected {' or '.join(kinds)}")
    if "enum" in schema and value not in schema["enum"]:
        raise BadArguments(f"argument '{name}' is {_shown(value)}, expected one of {_shown(schema['enum'])}")
    if isinstance(value, list) and "items" in schema:
        return [_fitted(item, schema["items"], f"{name}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, dict) and "additionalProperties" in schema:
        return {key: _fitted(item, schema["additionalProperties"], f"{name}.{key}") for key, item in value.items()}
    return value


def _first_fitting(value: Any, schemas: list[Mapping[str, Any]], name: str) -> Any:
    for schema in schemas:
        try:
            return _fitted(value, schema, name)
        except BadArguments:
            continue
    raise BadArguments(f"argument '{name}' is {_shown(value)}, which fits none of its types")


def _is(value: Any, kind: str) -> bool:
    """Whether a value has a JSON type; in Python, unlike JSON, true is an integer."""
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _shown(value: Any) -> str:
    try:
        shown = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a number with more digits than Python prints
        shown = f"a {type(value).__name__}"
    return shortened(shown, 60)
