"""The columns whose values go to the chat template: tools and extra arguments; each function appends to problems."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from selfdistill.data.messages import check_json, without_null, wrong
from selfdistill.data.rows import from_text
from selfdistill.errors import UserError, one_line

_RESERVED = (
    *("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "padding"),
    *("return_assistant_tokens_mask", "truncation", "max_length", "tokenizer_kwargs", "chat_template", "conversation"),
    *("tools", "messages"),
)
"""Arguments of ``apply_chat_template`` that a row may not give; one is a template, and so a program."""


def tools_of(value: Any, problems: list[str]) -> list[dict[str, Any]] | None:
    """The schemas from a list or its JSON text; a list in memory may hold functions, whose schemas are generated.

    Null within schemas means absent, because Arrow writes it for all keys.
    """
    tools = from_text(value)
    if tools in (None, [], ""):
        return None
    if not isinstance(tools, list):
        problems.append(wrong("tools", value, "a list of JSON schemas, or its JSON text"))
        return None
    before = len(problems)
    schemas = [without_null(_schema(tool, f"tools[{number}]", problems)) for number, tool in enumerate(tools)]
    if len(problems) == before:
        check_json(schemas, "tools", problems)
    return schemas


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The function's JSON schema from its type hints and docstring, made by transformers' chat template code.

    Raises:
        UserError: it has none; says why.
    """
    from transformers.utils import get_json_schema

    if not inspect.getdoc(function):
        raise UserError("no schema: no docstring; write one, with a line for each argument under 'Args:'")
    try:
        return dict(get_json_schema(function))
    except Exception as error:  # transformers' own, which differ between versions, or a hint's NameError
        hints = "" if _has_hints(function) else "a type hint and "
        remedy = f"give each argument {hints}a line under 'Args:' of the docstring"
        if typed := re.search(r"(?m)^\s*(\w+) *\(.*?\):", inspect.getdoc(function) or ""):
            remedy += f", as '{typed[1]}: ...' without a type"
        raise UserError(f"no schema: {one_line(error)}; {remedy}") from error


def _has_hints(function: Callable[..., Any]) -> bool:
    """Whether each argument has a type hint."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function in C
        return False
    return all(one.annotation is not inspect.Parameter.empty for one in parameters)


def _schema(tool: Any, column: str, problems: list[str]) -> Any:
    """A tool's schema, generated for a function; one that is flat or not an object is a problem."""
    if inspect.isroutine(tool):
        try:
            return schema_of(tool)
        except UserError as error:
            problems.append(f"column 'tools': function {getattr(tool, '__name__', repr(tool))!r}: {error}")
    elif not isinstance(tool, dict):
        problems.append(wrong(column, tool, "an object"))
    elif tool.get("type") == "function" and tool.get("function") is None:
        problems.append(
            f"column '{column}': found a tool of type 'function' without the key 'function'; put name, description and "
            "parameters into an object there"
        )
    return tool


def template_kwargs_of(value: Any, problems: list[str]) -> dict[str, Any] | None:
    """The arguments from an object or its JSON text, without null."""
    options = from_text(value)
    if options in (None, ""):
        return None
    if not isinstance(options, dict):
        problems.append(wrong("chat_template_kwargs", value, "an object or null"))
        return None
    options = {name: option for name, option in options.items() if option is not None}
    check_json(options, "chat_template_kwargs", problems)
    if taken := sorted(options.keys() & set(_RESERVED)):
        problems.append(f"column 'chat_template_kwargs': {taken[0]!r} is reserved; leave it out")
    return options or None
