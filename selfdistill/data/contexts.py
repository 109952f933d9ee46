"""What the student sees and what the teacher sees: demonstrations to chat messages to token ids.

The student sees the prompt. The teacher sees the same prompt and, through a *context*, the demonstration. Each context
is a small frozen dataclass whose fields are its options; on the command line it is written ``name:option=value,...``,
for instance ``turns:repeats=2``. Both sides are rendered by the same chat template with the same arguments, so they
differ only by what the context adds.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args, get_type_hints

from selfdistill.data.demonstrations import Demonstration, Message
from selfdistill.errors import UserError


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _split_system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    head = [m for m in messages if m["role"] == "system"]
    return head, [m for m in messages if m["role"] != "system"]


class Context(Protocol):
    """How the demonstration reaches the teacher."""

    name: ClassVar[str]

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        """The teacher's messages, ending with the user turn that the teacher answers.

        Args:
            demonstration: the row at hand.
            pool: all rows, from which other demonstrations may be taken.
        """
        ...


@dataclass(frozen=True)
class Turns:
    """The demonstration as earlier turns of the chat, ``repeats`` times: user x, assistant d, ..., user x."""

    name: ClassVar[str] = "turns"
    repeats: int = 1

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        system, turns = _split_system(demonstration.prompt)
        return [*system, *((*turns, _assistant(demonstration.shown)) * self.repeats), *turns]


@dataclass(frozen=True)
class ExampleAnswer:
    """One user turn: the question, the demonstration as an example, and a request for an own answer."""

    name: ClassVar[str] = "example"
    reasoning: bool = True
    """Also ask for the reasoning."""

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        request = (
            "Work out your own answer to the question, showing your reasoning."
            if self.reasoning
            else "Now give your own answer to the question, in the same form."
        )
        text = (
            f"{demonstration.prompt[-1]['content']}\n\n"
            f"For orientation, this is what a good answer to it looks like:\n\n{demonstration.shown}\n\n{request}"
        )
        return [*demonstration.prompt[:-1], _user(text)]


@dataclass(frozen=True)
class FewShot:
    """``k`` other demonstrations as earlier turns without their system turns, then this one where ``this`` is set."""

    name: ClassVar[str] = "few_shot"
    k: int = 3
    pick: Literal["seed", "nearest"] = "seed"
    """``seed``: drawn at random, the same for a row every time; ``nearest``: most words in common, nearest last."""
    this: bool = False
    seed: int = 0

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        others = [other for other in pool if other.prompt != demonstration.prompt]
        if len(others) < self.k:
            raise UserError(
                f"context 'few_shot' needs {self.k} other demonstrations, found {len(others)}: lower k or add rows"
            )
        if self.pick == "seed":
            shown = random.Random(f"{self.seed}-{demonstration.row}").sample(others, self.k)
        else:
            words = _words(demonstration.prompt[-1]["content"])
            shown = sorted(others, key=lambda other: _jaccard(words, _words(other.prompt[-1]["content"])))[-self.k :]
        system, turns = _split_system(demonstration.prompt)
        earlier = [m for other in shown for m in (*_split_system(other.prompt)[1], _assistant(other.shown))]
        if self.this:
            earlier += [*turns, _assistant(demonstration.shown)]
        return [*system, *earlier, *turns]


@lru_cache(maxsize=1 << 16)  # every row is compared with every other
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(len(a | b), 1)


@dataclass(frozen=True)
class Document:
    """The document as a turn of its own, then the demonstration as turns: for knowledge."""

    name: ClassVar[str] = "document"
    repeats: int = 1
    show: Literal["both", "document", "answer"] = "both"
    """``document`` leaves the demonstration out, ``answer`` the document (the paper's ablation of contexts)."""

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        system, turns = _split_system(demonstration.prompt)
        reading: list[Message] = []
        if self.show != "answer":
            if demonstration.document is None:
                raise UserError(
                    f"context 'document' needs a document, and {demonstration.source} has none: "
                    "add the column 'document' or take another context"
                )
            text = f"Read this text carefully. Questions about it follow.\n\n{demonstration.document}"
            reading = [_user(text), _assistant("I have read it. What would you like to know?")]
        answered: list[Message] = []
        if self.show != "document":
            answered = [*turns, _assistant(demonstration.shown)] * self.repeats
        return [*system, *reading, *answered, *turns]


@dataclass(frozen=True)
class Template:
    """The user's own text in place of the last user turn, with {prompt}, {demonstration} and {document} filled in."""

    name: ClassVar[str] = "template"
    file: str = ""
    """Text file with the template, UTF-8."""
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.file:
            raise UserError("context 'template' needs the file of the template: write template:file=PATH")
        try:
            text = Path(self.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(f"context 'template': cannot read file {self.file!r} ({reason})") from None
        if "{prompt}" not in text:
            raise UserError(f"context 'template': {self.file} does not contain {{prompt}}, so the question is missing")
        if "{demonstration}" not in text and "{document}" not in text:
            raise UserError(
                f"context 'template': {self.file} contains neither {{demonstration}} nor {{document}}, so the teacher "
                "would see nothing more than the student"
            )
        names = ("prompt", "demonstration", "document")
        for word in sorted(set(re.findall(r"\{(\w+)\}", text)) - set(names)):
            if difflib.get_close_matches(word, names, 1, 0.75):
                raise UserError(
                    f"context 'template': {self.file} has {{{word}}}, which stays as it is; there is {{prompt}}, "
                    "{demonstration} and {document}"
                )
        object.__setattr__(self, "text", text)

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        if "{document}" in self.text and demonstration.document is None:
            raise UserError(f"context 'template' uses {{document}}, and {demonstration.source} has none")
        values = {
            "prompt": demonstration.prompt[-1]["content"],
            "demonstration": demonstration.shown if "{demonstration}" in self.text else "",
            "document": demonstration.document or "",
        }
        # One pass, so that braces inside the filled-in texts are left alone.
        text = re.sub(r"\{(prompt|demonstration|document)\}", lambda match: values[match[1]], self.text)
        return [*demonstration.prompt[:-1], _user(text)]


CONTEXTS: dict[str, type[Any]] = {c.name: c for c in (Turns, ExampleAnswer, FewShot, Document, Template)}


def parse_context(spec: str) -> Context:
    """``name:option=value,option=value`` to a context.

    Raises:
        UserError: unknown name or option, or a value that does not fit; the message says what there is.
    """
    name, _, options = spec.partition(":")
    if name not in CONTEXTS:
        hint = "; options follow a colon, as in turns:repeats=2" if "=" in name else ""
        raise UserError(f"context {spec!r}: there is no context {name!r}, only {', '.join(CONTEXTS)}{hint}")
    kind = CONTEXTS[name]
    types = {key: hint for key, hint in get_type_hints(kind).items() if key not in ("name", "text")}
    values = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in types:
            raise UserError(f"context {spec!r}: {name} has no option {key!r}, only {', '.join(types)}")
        values[key] = _convert(spec, key, value, types[key])
    return kind(**values)


def _convert(spec: str, key: str, value: str, hint: Any) -> Any:
    choices: tuple[Any, ...] = get_args(hint)
    if hint is bool:
        choices = ("true", "false")
    if choices and value not in choices:
        raise UserError(f"context {spec!r}: option {key!r}: found {value!r}, expected {' or '.join(choices)}")
    if hint is bool:
        return value == "true"
    if hint is int:
        least = 0 if key == "seed" else 1
        if not value.isdecimal() or int(value) < least:
            raise UserError(f"context {spec!r}: option {key!r}: found {value!r}, expected a whole number from {least}")
        return int(value)
    return value


def context_spec(context: Context) -> str:
    """The text that :func:`parse_context` reads back to an equal context."""
    values = {f.name: getattr(context, f.name) for f in fields(context) if f.init}  # type: ignore[arg-type]
    options = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    return f"{context.name}:{','.join(options)}"
