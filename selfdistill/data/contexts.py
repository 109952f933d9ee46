"""Contexts: how the teacher sees the demonstration.

The student sees the prompt. The teacher sees the same prompt and, through a *context*, the demonstration. Each context
is a small frozen dataclass whose fields are its options. On the command line it is written ``name:option=value,...``,
for example ``turns:repeats=2``. The same chat template with the same arguments renders both sides, so they differ only
in what the context adds.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

from selfdistill.data.demonstrations import Demonstration
from selfdistill.data.images import marks_in
from selfdistill.data.messages import Message, question_of, with_question
from selfdistill.errors import UserError, closest

Show = Literal["episode", "turn"]
"""What a context shows of an episode: all of it, or the one reply that is asked for."""


class Verbatim(str):
    """A demonstration as a turn: rendered as it is, even by a template that strips thoughts from earlier turns."""

    __slots__ = ()


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": Verbatim(text)}


def _turns_shown(demonstration: Demonstration, show: Show) -> tuple[list[Message], list[Message]]:
    """The turns before the question, that is the last user turn, and it with its reply or the whole episode."""
    row = demonstration
    if show == "episode" and row.turn_of is not None and row.privileged_context is None:
        row = row.turn_of
    _, turns = _split_system(row.prompt)
    start = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=0)
    earlier, question = turns[:start], turns[start:]
    if not row.episode or row.privileged_context is not None:
        return earlier, [*question, _assistant(row.shown)]
    said = [{**m, "content": Verbatim(m["content"])} if m["role"] == "assistant" else m for m in row.episode]
    return earlier, [*question, *said]


def _row_of(demonstration: Demonstration) -> Demonstration:
    """The row that a demonstration is, or is one turn of."""
    return demonstration.turn_of or demonstration


def _split_system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    head = [m for m in messages if m["role"] == "system"]
    return head, [m for m in messages if m["role"] != "system"]


class Context(Protocol):
    """How the demonstration is shown to the teacher."""

    name: ClassVar[str]
    one_demonstration: ClassVar[bool]
    """Whether it shows the row's demonstration alone, so that a part of it, or an attempt, can take its place."""

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        """The teacher's messages, ending with the turn to answer, as the prompt does.

        Args:
            demonstration: the demonstration to show.
            pool: all demonstrations, from which a context may draw others.
        """
        ...

    def lacks(self, demonstration: Demonstration) -> str | None:
        """The problem of a row that has not what the context shows; see :data:`Lacks`."""
        ...


def _no_demonstration(demonstration: Demonstration, context: str) -> str | None:
    if demonstration.has_demonstration:
        return None
    problem = f"column 'completion': missing, and no 'privileged_context' for context '{context}' to show instead"
    has_other = demonstration.document is not None
    return problem + ("; context document:show=document shows the document alone" if has_other else "")


def _no_document(demonstration: Demonstration, context: str) -> str | None:
    if demonstration.document is not None:
        return None
    return f"column 'document': missing, which context '{context}' shows the teacher; add it or use another context"


def _no_question(demonstration: Demonstration, context: str) -> str | None:
    """The problem of a row in which no user turn can take the context's text."""
    if _row_of(demonstration).episode:
        return f"context '{context}' cannot show an episode; use turns, few_shot or document, or turns last"
    if all(message["role"] != "user" for message in demonstration.prompt):
        return f"column 'prompt': no user turn, which context '{context}' needs; use turns, few_shot or document"
    return None


@dataclass(frozen=True)
class Turns:
    """The demonstration as earlier turns of the chat, ``repeats`` times: user x, assistant d, ..., user x.

    Turns before x come once, at the beginning: repeated, they would be copied like the demonstration.
    """

    name: ClassVar[str] = "turns"
    one_demonstration: ClassVar[bool] = True
    repeats: int = 1
    show: Show = "episode"

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        system, turns = _split_system(demonstration.prompt)
        earlier, told = _turns_shown(demonstration, self.show)
        return [*system, *earlier, *(told * self.repeats), *turns[len(earlier) :]]

    def lacks(self, demonstration: Demonstration) -> str | None:
        return _no_demonstration(demonstration, self.name)


@dataclass(frozen=True)
class ExampleAnswer:
    """One user turn: the question, the demonstration as an example, and a request for the model's own answer."""

    name: ClassVar[str] = "example"
    one_demonstration: ClassVar[bool] = True
    reasoning: bool = True
    """Ask for the reasoning, too."""

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        if problem := _no_question(demonstration, self.name):
            raise UserError(f"{demonstration.source}: {problem}")
        request = (
            "Work out your own answer to the question, showing your reasoning."
            if self.reasoning
            else "Now give your own answer to the question, in the same form."
        )
        text = (
            f"{question_of(demonstration.prompt)}\n\n"
            f"For orientation, this is what a good answer to it looks like:\n\n{demonstration.shown}\n\n{request}"
        )
        return with_question(demonstration.prompt, text)

    def lacks(self, demonstration: Demonstration) -> str | None:
        return _no_demonstration(demonstration, self.name) or _no_question(demonstration, self.name)


@dataclass(frozen=True)
class FewShot:
    """``k`` other demonstrations as earlier turns without their system turns, then this one if ``this`` is set."""

    name: ClassVar[str] = "few_shot"
    one_demonstration: ClassVar[bool] = False
    k: int = 3
    pick: Literal["seed", "nearest"] = "seed"
    """``seed``: drawn at random, always the same for a demonstration; ``nearest``: most shared words, nearest last."""
    this: bool = False
    seed: int = field(default=0, metadata={"least": 0})

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        row = _row_of(demonstration)
        others = [other for other in pool if _row_of(other).prompt != row.prompt]
        if len(others) < self.k:
            raise UserError(
                f"context 'few_shot' needs {self.k} other demonstrations, found {len(others)}; lower k or add rows"
            )
        if self.pick == "seed":
            shown = random.Random(f"{self.seed}-{row.row}").sample(others, self.k)
        else:
            words = _words(question_of(row.prompt))
            shown = sorted(others, key=lambda other: _jaccard(words, _words(question_of(other.prompt))))[-self.k :]
        system, turns = _split_system(demonstration.prompt)
        others_told = [message for other in shown for part in _turns_shown(other, "episode") for message in part]
        earlier, told = _turns_shown(demonstration, "episode") if self.this else ([], [])
        return [*system, *others_told, *earlier, *told, *turns[len(earlier) :]]

    def lacks(self, demonstration: Demonstration) -> str | None:
        return _no_demonstration(demonstration, self.name)  # others may draw it


@lru_cache(maxsize=1 << 16)  # every demonstration is compared with every other
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(len(a | b), 1)


@dataclass(frozen=True)
class Document:
    """The document in a turn of its own, then the demonstration as turns; for teaching knowledge."""

    name: ClassVar[str] = "document"
    one_demonstration: ClassVar[bool] = False
    repeats: int = 1
    show: Literal["both", "document", "answer"] = "both"
    """``document`` omits the demonstration, ``answer`` the document (the paper's ablation of contexts)."""

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        system, turns = _split_system(demonstration.prompt)
        reading: list[Message] = []
        if self.show != "answer":
            if demonstration.document is None:
                raise UserError(
                    f"context 'document' needs a document, and {demonstration.source} has none; "
                    "add the column 'document' or use another context"
                )
            text = f"Read this text carefully. Questions about it follow.\n\n{demonstration.document}"
            reading = [_user(text), _assistant("I have read it. What would you like to know?")]
        if self.show == "document":
            return [*system, *reading, *turns]
        earlier, told = _turns_shown(demonstration, "episode")
        return [*system, *reading, *earlier, *(told * self.repeats), *turns[len(earlier) :]]

    def lacks(self, demonstration: Demonstration) -> str | None:
        no_document = _no_document(demonstration, self.name) if self.show != "answer" else None
        return no_document or (_no_demonstration(demonstration, self.name) if self.show != "document" else None)


@dataclass(frozen=True)
class ContextTemplate:
    """The user's own text replaces the last user turn, with {prompt}, {demonstration} and {document} filled in."""

    name: ClassVar[str] = "template"
    one_demonstration: ClassVar[bool] = True
    file: str = ""
    """UTF-8 text file with the template."""
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.file:
            raise UserError("context 'template' needs a template file; write template:file=PATH")
        try:
            text = Path(self.file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(f"context 'template': cannot read file {self.file!r} ({reason})") from None
        names = ("prompt", "demonstration", "document")
        others = ("privileged_context", "golden_answer")  # of TRL and tinker-cookbook, which use str.format
        for word in sorted(set(re.findall(r"\{(\w+)\}", text)) - set(names)):
            if word in others or difflib.get_close_matches(word, names, 1, 0.75):
                raise UserError(
                    f"context 'template': {self.file} has {{{word}}}, which is not a field; use {{prompt}}, "
                    "{demonstration} or {document}, and write other braces once"
                )
        if "{prompt}" not in text:
            raise UserError(f"context 'template': {self.file} has no {{prompt}}, so the question would be missing")
        if "{demonstration}" not in text and "{document}" not in text:
            raise UserError(
                f"context 'template': {self.file} has neither {{demonstration}} nor {{document}}, so the teacher "
                "would see the same as the student"
            )
        object.__setattr__(self, "text", text)

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        if problem := _no_question(demonstration, self.name):
            raise UserError(f"{demonstration.source}: {problem}")
        if "{document}" in self.text and demonstration.document is None:
            raise UserError(f"context 'template' uses {{document}}, and {demonstration.source} has none")
        values = {
            "prompt": question_of(demonstration.prompt),
            "demonstration": demonstration.shown if "{demonstration}" in self.text else "",
            "document": demonstration.document or "",
        }
        # A single pass, so braces inside the filled-in texts are untouched.
        text = re.sub(r"\{(prompt|demonstration|document)\}", lambda match: values[match[1]], self.text)
        return with_question(demonstration.prompt, text)

    def lacks(self, demonstration: Demonstration) -> str | None:
        no_document = _no_document(demonstration, self.name) if "{document}" in self.text else None
        if problem := no_document or _no_question(demonstration, self.name):
            return problem
        return _no_demonstration(demonstration, self.name) if "{demonstration}" in self.text else None


@dataclass(frozen=True)
class Rewritten:
    """``privileged_context`` in place of the last user turn: the question in other words, or in another language.

    The turn's pictures stay, before it.
    """

    name: ClassVar[str] = "rewritten"
    one_demonstration: ClassVar[bool] = False

    def messages(self, demonstration: Demonstration, pool: Sequence[Demonstration]) -> list[Message]:
        if problem := self.lacks(demonstration):
            raise UserError(f"{demonstration.source}, {problem}")
        pictures = marks_in(question_of(demonstration.prompt))
        return with_question(demonstration.prompt, f"{pictures}{demonstration.privileged_context or ''}")

    def lacks(self, demonstration: Demonstration) -> str | None:
        if demonstration.privileged_context is not None:
            return _no_question(demonstration, self.name)
        return "column 'privileged_context': missing, which context 'rewritten' shows the teacher as the question"


@dataclass(frozen=True)
class Option:
    """An option of a context, as a spec can write it."""

    type: Any
    """bool, int, str, or a Literal of words."""
    least: int
    """The least value of an int: 1, unless the field's metadata have ``least``."""


def options_of(kind: type[Context]) -> dict[str, Option]:
    """The options of a context: the fields that its constructor takes.

    Raises:
        TypeError: an option has a type that a spec cannot write.
    """
    types = get_type_hints(kind)
    found = [option for option in fields(kind) if option.init]  # type: ignore[arg-type]
    for name in (option.name for option in found):
        if types[name] not in (bool, int, str) and get_origin(types[name]) is not Literal:
            want = "bool, int, str or a Literal of words"
            raise TypeError(f"context {kind.name!r}: option {name!r} is {types[name]}, expected {want}")
    return {option.name: Option(types[option.name], option.metadata.get("least", 1)) for option in found}


_KINDS: tuple[type[Context], ...] = (Turns, ExampleAnswer, FewShot, Document, ContextTemplate, Rewritten)
CONTEXTS = {kind.name: kind for kind in _KINDS}
OPTIONS = {name: options_of(kind) for name, kind in CONTEXTS.items()}
"""The options of each context."""
ONE_DEMONSTRATION = [name for name, kind in CONTEXTS.items() if kind.one_demonstration]
"""Names of the contexts that show one demonstration, and so can show a part of it."""


def parse_context(spec: str, *, episodes: bool = False) -> Context:
    """Parse ``name:option=value,option=value``; ``episodes``: whole episodes are sampled, as in an environment.

    Raises:
        UserError: unknown name or option, or invalid value; the message lists the valid ones. Or it shows one reply.
    """
    name, _, options = spec.partition(":")
    if name not in CONTEXTS:
        hint = closest(name, CONTEXTS, "; options follow a colon, as in turns:repeats=2" if "=" in name else "")
        raise UserError(f"unknown context {name!r}, expected one of {', '.join(CONTEXTS)}{hint}")
    known = OPTIONS[name]
    values = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"context {spec!r}: {name} has no option {key!r}; {has}{closest(key, known)}")
        values[key] = _convert(spec, key, value, known[key])
    if episodes and values.get("show") == "turn":
        why = "it shows a single reply, but in an environment whole episodes are sampled; leave show=turn out"
        raise UserError(f"context {spec!r}: {why}")
    return CONTEXTS[name](**values)


def _convert(spec: str, key: str, value: str, option: Option) -> Any:
    words: tuple[Any, ...] = ("true", "false") if option.type is bool else get_args(option.type)
    if words and value not in words:
        raise UserError(f"context {spec!r}: option {key!r}: found {value!r}, expected {' or '.join(words)}")
    if option.type is bool:
        return value == "true"
    if option.type is int:
        if not value.isdecimal() or int(value) < option.least:
            raise UserError(
                f"context {spec!r}: option {key!r}: found {value!r}, expected an integer of {option.least} or more"
            )
        return int(value)
    return value


def context_spec(context: Context) -> str:
    """The inverse of :func:`parse_context`."""
    values = {f.name: getattr(context, f.name) for f in fields(context) if f.init}  # type: ignore[arg-type]
    if isinstance(context, Turns) and context.show == "episode":
        del values["show"]  # so that specs of earlier runs stay the same
    options = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    return ":".join(filter(None, [context.name, ",".join(options)]))


def must_show_one(context: Context, what: str) -> None:
    """Refuse a context that cannot show ``what`` in place of the demonstration.

    Raises:
        UserError: the context does not show one demonstration.
    """
    if not context.one_demonstration:
        *others, last = ONE_DEMONSTRATION
        raise UserError(f"context {context_spec(context)!r}: cannot show {what}; use {', '.join(others)} or {last}")
