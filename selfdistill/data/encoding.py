"""Encode demonstrations as token ids, as the student and the teacher see them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.contexts import Context
from selfdistill.data.demonstrations import Demonstration
from selfdistill.data.differences import same_start
from selfdistill.data.episodes import Replies, encode_replies, turns_of
from selfdistill.data.images import PictureRefusal, by_digest
from selfdistill.data.messages import Message, uses_tools
from selfdistill.data.rows import RowProblem, by_reason, first_ten
from selfdistill.data.template import TemplateRefusal
from selfdistill.data.thinking import split_thinking
from selfdistill.errors import UserError

Made = TypeVar("Made")

_REFUSED = {
    TemplateRefusal: "do not fit the chat template",
    PictureRefusal: "have pictures that the model does not read",
}
"""What is wrong with rows that raise these errors."""


@dataclass(frozen=True)
class Example:
    """A demonstration as token ids."""

    demonstration: Demonstration
    student_ids: list[int]
    """The prompt, as the student sees it."""
    teacher_ids: list[int] | None
    """The prompt with the context, as the teacher sees it; None without a context."""
    completion_ids: list[int]
    """The completion with its end token; empty without a completion, which is not an empty reply."""
    given: tuple[tuple[int, int], ...] = ()
    """Half-open spans of ``completion_ids``, in order, that are not the model's: what tools or users said. They are
    read and never a target."""
    later_ids: tuple[list[int], ...] = ()
    """Completions that take the place of ``completion_ids`` later in the run, in order; an empty one is none."""
    source: int = 0
    """Number of the part of a step that it belongs to: 0 the task, others those beside it. Rows of equal numbers in
    several parts have samples with different seeds."""

    @property
    def is_own(self) -> list[bool]:
        """Whether each token of the completion is the model's own."""
        return own_tokens(len(self.completion_ids), self.given)

    @property
    def learnt_tokens(self) -> int:
        """Tokens of the completion that are not given."""
        return sum(self.is_own)


def own_tokens(length: int, given: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each of so many tokens is outside of the given half-open spans."""
    own = [True] * length
    for start, end in given:
        own[start:end] = [False] * (end - start)
    return own


def reply_spans(length: int, given: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The half-open spans of so many tokens between the given ones: the replies of an episode."""
    starts, ends = zip(*given, strict=True) if given else ((), ())
    return list(zip((0, *ends), (*starts, length), strict=True))


class NothingFits(UserError):
    """Every row is too long, and ``on_long_prompt`` is ``drop``."""


def encode(
    demonstrations: Sequence[Demonstration],
    context: Context | None,
    chat: ChatFormat,
    *,
    max_prompt_length: int | None,
    max_completion_length: int,
    window: int | None,
    on_long_prompt: str = "error",
    completion_must_fit: bool = False,
    pool: Sequence[Demonstration] | None = None,
    replies: Replies = "last",
    max_episode_length: int | None = None,
) -> tuple[list[Example], int]:
    """Encode demonstrations, and count the examples dropped because they are too long.

    Args:
        demonstrations: what to encode.
        context: the teacher's context, or None.
        max_prompt_length: limit for either prompt, in tokens; None: the window minus the tokens after a prompt.
        max_completion_length: limit for a completion, in tokens; of an episode, for each reply.
        window: the model's limit for prompt plus completion, in tokens; None if it has none.
        on_long_prompt: ``error`` or ``drop``.
        completion_must_fit: apply ``max_completion_length`` to the demonstrated completion, which is trained on.
        pool: demonstrations that contexts may draw from; default ``demonstrations``.
        replies: which replies of an episode are examples: ``episode``, all in one; ``each``, after the conversation so
            far as the demonstration has it; ``last``.
        max_episode_length: tokens after a prompt, for which prompts leave room in the window; None:
            ``max_completion_length``.

    Returns:
        The examples, and the number of examples dropped.

    Raises:
        NothingFits: with ``drop``, no row is left.
        UserError: rows are too long, all reported together; completions end with the name of an end token; or the
            template does not show a row's tools or other arguments.
    """
    limits = _Limits(max_prompt_length, max_completion_length, window, completion_must_fit, max_episode_length)
    limits.check()
    others = pool or demonstrations
    demonstrations = [turn for row in demonstrations for turn in turns_of(row, replies)]
    _refuse_end_names(demonstrations, chat)
    refuse_unshown(demonstrations, chat)
    _refuse_pictures(demonstrations, chat)
    pictures = by_digest([*demonstrations, *others])

    def example_of(demonstration: Demonstration) -> Example:
        options = demonstration.template_options
        teacher = context.messages(demonstration, others) if context else None
        completion_ids, given = encode_replies(demonstration, chat)
        return Example(
            demonstration,
            chat.encode_prompt(demonstration.prompt, options, by_digest([demonstration])),
            chat.encode_prompt(teacher, options, pictures) if teacher else None,
            completion_ids,
            given,
        )

    kept, problems = [], []
    for example in _by_row(demonstrations, example_of):
        problem = limits.problem(example)
        if problem is None:
            kept.append(example)
        else:
            problems.append(problem)
    if problems and (on_long_prompt == "error" or not kept):
        found = by_reason([problem for problem, _ in problems])
        text = f"{len(problems)} of {len(demonstrations)} rows do not fit: {found}; "
        ways = list(dict.fromkeys(way for _, ways in problems for way in ways))
        if on_long_prompt == "drop":
            raise NothingFits(text + " or ".join(ways))
        raise UserError(f"{text}{', '.join(ways)}, or drop them with on_long_prompt drop")
    return kept, len(problems)


@dataclass
class ContextEncoder:
    """Encodes contexts that are made during a run, such as those that show the teacher a sample.

    Args:
        chat: the format of both prompts.
        max_prompt_length: as in :func:`encode`, as are the others.
        max_completion_length: limit for a completion, in tokens.
        window: the model's limit for prompt plus completion, in tokens; None if it has none.
    """

    chat: ChatFormat
    max_prompt_length: int | None
    max_completion_length: int
    window: int | None
    unfit: list[str] = field(default_factory=list)
    """Why each context that could not be encoded could not, with its row."""

    @property
    def limit(self) -> int | None:
        """Limit for a context, in tokens; None if there is none."""
        return _Limits(self.max_prompt_length, self.max_completion_length, self.window, False).prompt

    def __call__(self, demonstration: Demonstration, messages: Sequence[Message]) -> list[int] | None:
        """Token ids of the teacher's messages for this row; None, and a line in ``unfit``, if they cannot be shown.

        That is if they exceed the limit, or if the chat template does not show what the model wrote.
        """
        try:
            pictures = by_digest([demonstration])
            ids = self.chat.encode_prompt(messages, demonstration.template_options, pictures)
        except TemplateRefusal as error:
            self.unfit.append(f"{demonstration.source}: {error}")
            return None
        if self.limit is not None and len(ids) > self.limit:
            self.unfit.append(f"{demonstration.source}: the context has {len(ids)} tokens, limit {self.limit}")
            return None
        return ids


def encode_prompts(demonstrations: Sequence[Demonstration], chat: ChatFormat) -> list[list[int]]:
    """Token ids of the demonstrations' prompts.

    Raises:
        UserError: the chat template rejects rows, or does not show their tools or other arguments; names them.
    """
    refuse_unshown(demonstrations, chat)
    _refuse_pictures(demonstrations, chat)

    def ids_of(row: Demonstration) -> list[int]:
        return chat.encode_prompt(row.prompt, row.template_options, by_digest([row]))

    return _by_row(demonstrations, ids_of)


def _by_row(demonstrations: Sequence[Demonstration], make: Callable[[Demonstration], Made]) -> list[Made]:
    """What ``make`` returns for each row.

    Raises:
        UserError: the chat template or the processor rejects rows; see :func:`by_reason`.
    """
    made: list[Made] = []
    refused: dict[str, list[RowProblem]] = {}
    for demonstration in demonstrations:
        try:
            made.append(make(demonstration))
        except (TemplateRefusal, PictureRefusal) as error:
            refused.setdefault(_REFUSED[type(error)], []).append(RowProblem(demonstration.source, str(error)))
    if refused:
        count = len(demonstrations)
        raise UserError("; ".join(f"{len(of)} of {count} rows {what}: {by_reason(of)}" for what, of in refused.items()))
    return made


def notes_on(examples: Sequence[Example], chat: ChatFormat) -> list[str]:
    """What the user should know of the demonstrated completions: texts that are not trained or shown as they are meant.

    That is completions that the tokenizer changes, such as by unknown characters; thoughts after a prompt that has
    closed its own; and arguments that the chat template does not use.
    """
    notes = []
    if changes := _text_changes(examples, chat):
        notes.append(changes)
    demonstrations = [example.demonstration for example in examples]
    closed = [
        row.source
        for row in demonstrations
        if split_thinking(row.completion)[0]
        and chat.closes_thought(row.template_options, after_result=row.prompt[-1]["role"] == "tool")
    ]
    if closed:
        notes.append(
            f"{len(closed)} of {len(examples)} completions think, but the chat template closes the thought before the "
            f"reply ({first_ten(closed)}); remove their thoughts, or turn thinking on (chat_template_kwargs)"
        )
    if unused := chat.unshown((), chat.kwargs):
        notes.append(f"setting 'chat_template_kwargs': the chat template does not use {unused!r}")
    return notes


def _text_changes(examples: Sequence[Example], chat: ChatFormat) -> str | None:
    changed = []
    for example in examples:
        if uses_tools(example.demonstration.episode[-1:]):  # the text of its calls is not what is learnt
            continue
        found = unicodedata.normalize("NFC", chat.decode(example.completion_ids))
        meant = unicodedata.normalize("NFC", example.demonstration.completion).strip()
        thought, said = split_thinking(meant)
        # Between them, prompt and completion may divide the tags of a thought.
        if not found.endswith(said or thought):
            changed.append((example.demonstration.source, *_difference(meant, found)))
    if not changed:
        return None
    source, meant, found = changed[0]
    return (
        f"the tokenizer changes {len(changed)} of {len(examples)} completions: in {source}, {meant!r} becomes {found!r}"
    )


def _difference(meant: str, found: str) -> tuple[str, str]:
    """Excerpts of the two texts from the word before their first difference."""
    same = same_start(meant, found)
    start = max(0, same - 10)
    return meant[start : same + 20], found[start : same + 20]


@dataclass(frozen=True)
class _Limits:
    """Limits for prompts and completions, in tokens."""

    max_prompt_length: int | None
    max_completion_length: int
    window: int | None
    completion_must_fit: bool
    max_episode_length: int | None = None

    @property
    def after(self) -> int:
        """Tokens after a prompt."""
        return self.max_episode_length or self.max_completion_length

    @property
    def setting(self) -> str:
        """Which limits the tokens after a prompt."""
        return "max_episode_length" if self.max_episode_length else "max_completion_length"

    @property
    def prompt(self) -> int | None:
        """Limit for a prompt; None if there is none."""
        room = None if self.window is None else self.window - self.after
        return min((x for x in (room, self.max_prompt_length) if x is not None), default=None)

    def check(self) -> None:
        """Refuse settings that leave no room for a prompt."""
        if self.prompt is not None and self.prompt < 1:
            raise UserError(
                f"setting {self.setting!r}: {self.after} leaves no room for a prompt in the "
                f"model's context window of {self.window} tokens"
            )

    def problem(self, example: Example) -> tuple[RowProblem, list[str]] | None:
        """What is too long, and what helps; None if nothing is."""
        source, limit = example.demonstration.source, self.prompt
        student, teacher = len(example.student_ids), len(example.teacher_ids or [])
        for who, length in (("prompt", student), ("teacher's prompt", teacher)):
            if limit is not None and length > limit:
                found = RowProblem(source, f"{who} has ", str(length), f" tokens, limit {limit}")
                return found, self._room_for(length, is_teachers=who != "prompt")
        length = _longest_reply(example)
        if self.completion_must_fit and length > self.max_completion_length:
            after = f" tokens, limit {self.max_completion_length} (max_completion_length)"
            can_grow = self.window is None or max(student, teacher) + length <= self.window
            way = "raise max_completion_length" if can_grow else f"shorten the completions{self._window}"
            return RowProblem(source, "completion has ", str(length), after), [way]
        whole = max(student, teacher) + len(example.completion_ids)
        if self.completion_must_fit and example.given and self.window is not None and whole > self.window:
            after = f" tokens, limit {self.window} (the context window)"
            return RowProblem(source, "prompt and episode have ", str(whole), after), ["shorten them"]
        return None

    def _room_for(self, length: int, *, is_teachers: bool) -> list[str]:
        """Ways to make room for a prompt of this length."""
        others = ["choose a shorter context"] if is_teachers else []
        if self.window is not None and length >= self.window:
            return others or [f"shorten the prompts{self._window}"]
        ways = []
        if self.max_prompt_length is not None and length > self.max_prompt_length:
            ways.append("raise max_prompt_length")
        if self.window is not None and length > self.window - self.after:
            ways.append(f"lower {self.setting}{self._window}")
        return [" and ".join(ways), *others]

    @property
    def _window(self) -> str:
        return f" (the context window is {self.window} tokens)"


def _longest_reply(example: Example) -> int:
    """Tokens of the longest reply of a completion."""
    return max(end - start for start, end in reply_spans(len(example.completion_ids), example.given))


def _refuse_end_names(demonstrations: Sequence[Demonstration], chat: ChatFormat) -> None:
    """Refuse completions that end with the name of an end token, which would be encoded as plain text."""
    replies = [(row.source, m["content"]) for row in demonstrations for m in row.episode if m["role"] == "assistant"]
    replies += [(row.source, row.completion) for row in demonstrations if not row.episode]
    ended = [source for source, reply in replies if reply.rstrip().endswith(tuple(chat.end_names))]
    if ended:
        raise UserError(
            f"{len(ended)} of {len(demonstrations)} completions end with {' or '.join(chat.end_names)}, which the chat "
            f"format adds itself ({', '.join(ended[:10])}); remove it"
        )


def _refuse_pictures(demonstrations: Sequence[Demonstration], chat: ChatFormat) -> None:
    """Refuse rows with pictures where the model reads none."""
    sources = [row.source for row in demonstrations if row.images]
    if sources and chat.pictures is None:
        raise UserError(
            f"{len(sources)} of {len(demonstrations)} rows have pictures, which the model does not read "
            f"({', '.join(sources[:10])}); use an image-text model with its processor's files, or remove the column"
        )


def refuse_unshown(demonstrations: Sequence[Demonstration], chat: ChatFormat) -> None:
    """Refuse rows with tools or other arguments of the chat template that it does not show.

    Raises:
        UserError: names the first of them, and the first ten rows.
    """
    rows = [row for row in demonstrations if row.template_options]
    names = _by_row(rows, lambda row: chat.unshown(row.prompt, row.template_options))
    sources = [row.source for row, name in zip(rows, names, strict=True) if name]
    if sources:
        name = next(filter(None, names))
        held, why = f"chat_template_kwargs {name!r}", "which the chat template does not use"
        if name == "tools":
            held, why = "tools", "but the chat template does not show them"
        if not chat.tokenizer.chat_template:
            why = "but the tokenizer has no chat template"
        raise UserError(
            f"{len(sources)} of {len(demonstrations)} rows have {held}, {why} ({', '.join(sources[:10])}); use a model "
            "whose template does, or remove the column"
        )
