"""The examples slot: training data as token ids, as the student and the teacher see it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from selfdistill.config import TrainConfig
from selfdistill.data import (
    ChatFormat,
    Demonstration,
    Example,
    Lacks,
    Replies,
    RowProblem,
    anchor_prompts,
    by_reason,
    context_of,
    encode,
    first_ten,
    is_packaged,
    load_demonstrations,
    no_part,
    notes_on,
    nothing_to_score,
    nothing_to_show,
    parse_context,
    turns_of,
)
from selfdistill.errors import UserError, number_of
from selfdistill.methods.worlds import begun, limits_of, scorer_judges
from selfdistill.model import LoadedModel


@runtime_checkable
class ExampleSource(Protocol):
    """Produces the examples to train on."""

    def counted(self, count: int) -> str:
        """This many of the examples, for messages: ``1 demonstration``, ``2 demonstrations``."""
        ...

    def lacks(self, demonstration: Demonstration) -> str | None:
        """The problem of a row that lacks something these examples need; None if it is complete."""
        ...

    def __call__(
        self, demonstrations: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> tuple[list[Example], int]:
        """Encode the examples, and count those dropped because they are too long.

        Raises:
            UserError: examples are too long, or there are none.
        """
        ...

    def notes(
        self, examples: Sequence[Example], rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> list[str]:
        """Notes for the user, before the run, on the encoded examples and the rows of which they were made."""
        ...


@dataclass(frozen=True)
class DemonstrationExamples:
    """The demonstrations."""

    config: TrainConfig = field(compare=False)
    context: str | None = None
    """How the teacher sees them; None without a teacher."""
    hint: float = 1.0
    """Share of the demonstration that the teacher sees."""
    in_parts: bool = False
    """Whether the teacher may see a part of the demonstration at some step."""
    completion_must_fit: bool = False
    """Whether the demonstrated completion itself is learnt: every row needs one, within the length limit."""
    replies: Replies = "each"
    """Which replies of an episode are examples."""

    def counted(self, count: int) -> str:
        return number_of(count, "demonstration")

    def __call__(
        self, demonstrations: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> tuple[list[Example], int]:
        if bad := [RowProblem(row.source, problem) for row in demonstrations if (problem := self.lacks(row))]:
            raise UserError(f"{len(bad)} of {len(demonstrations)} rows cannot be used: {by_reason(bad)}")
        if self.config.environment != "none":
            demonstrations = begun(self.config.environment, demonstrations)
        return encode(
            demonstrations,
            None if self.context is None else context_of(self.context, self.hint),
            chat,
            window=loaded.window,
            on_long_prompt=self.config.on_long_prompt,
            completion_must_fit=self.completion_must_fit,
            **limits_of(self.config, self.replies),
        )

    def notes(
        self, examples: Sequence[Example], rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> list[str]:
        """See :class:`ExampleSource`."""
        return [*notes_on(examples, chat), *self._longer_than_samples(examples)]

    def _longer_than_samples(self, examples: Sequence[Example]) -> list[str]:
        """A note on demonstrations longer than the samples may be; those that are learnt themselves fit."""
        limit = self.config.longest_completion
        long = [x for x in examples if x.learnt_tokens > limit]
        if not long:
            return []
        setting = "max_completion_length" if self.config.environment == "none" else "max_episode_length"
        longest = max(x.learnt_tokens for x in long)
        return [
            f"{len(long)} of {self.counted(len(examples))} are longer than a sample may be, {limit} tokens: up to "
            f"{longest}; raise {setting} ({first_ten([x.demonstration.source for x in long])})"
        ]

    def lacks(self, demonstration: Demonstration) -> str | None:
        problem = None
        if self.completion_must_fit and not demonstration.completion:
            problem = f"column 'completion': missing, which method {self.config.method!r} learns from"
        else:
            problem = (self._shows and self._shows(demonstration)) or self._no_part(demonstration)
        return problem and problem + self._other_method(demonstration)

    def _no_part(self, demonstration: Demonstration) -> str | None:
        """The problem of a row that the teacher would have to see in parts, but cannot."""
        turns = turns_of(demonstration, limits_of(self.config, self.replies)["replies"]) if self.in_parts else ()
        problem = next(filter(None, map(no_part, turns)), None)
        way = "use hint 1" if self.config.hint != "1" else f"use a method other than {self.config.method}"
        return problem and f"{problem}; {way}"

    def _other_method(self, demonstration: Demonstration) -> str:
        """Advice for a row that looks made for another method."""
        if demonstration.has_demonstration:
            is_for_sdft = not demonstration.completion and self.completion_must_fit and self.config.method != "sdft"
            return "; method sdft learns from 'privileged_context'" if is_for_sdft else ""
        return "; method grpo learns from 'answer'" if demonstration.answer is not None else ""

    @cached_property
    def _shows(self) -> Lacks | None:
        """The problem of a row that has nothing for the context to show; None if the teacher sees only the prompt."""
        if self.context == "auto":
            return nothing_to_show
        if self.context is None or not self.hint:
            return None
        return parse_context(self.context, episodes=self.config.environment != "none").lacks


@dataclass(frozen=True)
class ScoredExamples(DemonstrationExamples):
    """Demonstrations with an answer to the last turn, which a scorer compares the samples with."""

    replies: Replies = "last"

    def lacks(self, demonstration: Demonstration) -> str | None:
        unscored = nothing_to_score(self.config.scorer) if scorer_judges(self.config) else None
        return (unscored and unscored(demonstration)) or super().lacks(demonstration)


@dataclass(frozen=True)
class OtherRows:
    """Examples of rows other than the run's, such as those of an earlier task."""

    config: TrainConfig = field(compare=False)
    data: str
    """The rows, as the setting of this name takes them."""
    examples: ExampleSource
    """What is made of them."""

    def counted(self, count: int) -> str:
        return f"{self.examples.counted(count)} of {Path(self.data).name}"

    def lacks(self, demonstration: Demonstration) -> str | None:
        return None  # of the run's rows none is used

    def __call__(
        self, demonstrations: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> tuple[list[Example], int]:
        return self.examples(self.rows, loaded, chat)

    def notes(
        self, examples: Sequence[Example], rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> list[str]:
        """See :class:`ExampleSource`."""
        return self.examples.notes(examples, self.rows, loaded, chat)

    @cached_property
    def rows(self) -> list[Demonstration]:
        """Read once."""
        return load_demonstrations(self.data, turns=self.config.turns)


@dataclass(frozen=True)
class PromptExamples:
    """Prompts without answers, apart from the demonstrations; teacher and student see the same."""

    config: TrainConfig = field(compare=False)
    prompts: str
    """What :func:`selfdistill.data.anchor_prompts` takes."""

    def counted(self, count: int) -> str:
        if is_packaged(self.prompts):
            return number_of(count, "bundled general prompt")
        return f"{number_of(count, 'prompt')} of {Path(self.prompts).name}"

    def lacks(self, demonstration: Demonstration) -> str | None:
        return None

    def __call__(
        self, demonstrations: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> tuple[list[Example], int]:
        on_long_prompt = self.config.on_long_prompt
        if is_packaged(self.prompts):  # the user cannot shorten these
            on_long_prompt = "drop"
        return examples_of_prompts(self.config, anchor_prompts(self.prompts), loaded, chat, on_long_prompt)

    def notes(
        self, examples: Sequence[Example], rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> list[str]:
        """Prompts that are also prompts of the rows."""
        repeated = repeated_prompts(examples, rows)
        note = (
            f"{len(repeated)} of {self.counted(len(examples))} are also prompts of the demonstrations "
            f"({first_ten(repeated)}); remove them: they teach the model two things at once"
        )
        return [note] if repeated else []


def repeated_prompts(examples: Sequence[Example], rows: Sequence[Demonstration]) -> list[str]:
    """The sources of examples whose prompts are among those of the rows."""
    prompts = {json.dumps(row.prompt) for row in rows}
    return [x.demonstration.source for x in examples if json.dumps(x.demonstration.prompt) in prompts]


def examples_of_prompts(
    config: TrainConfig, prompts: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat, on_long_prompt: str
) -> tuple[list[Example], int]:
    """Encode prompts as examples whose teacher sees the same; see :func:`encode`."""
    examples, dropped = encode(
        prompts,
        None,
        chat,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        window=loaded.window,
        on_long_prompt=on_long_prompt,
    )
    return [replace(example, teacher_ids=example.student_ids) for example in examples], dropped


@dataclass(frozen=True)
class DocumentExamples:
    """The demonstrations' documents, each once, in chunks of ``max_completion_length`` tokens.

    A chunk is a completion whose prompt is the preceding text, as much as the window allows. Each document starts with
    the BOS token and ends with the end token.
    """

    config: TrainConfig = field(compare=False)

    def counted(self, count: int) -> str:
        return number_of(count, "document piece")

    def lacks(self, demonstration: Demonstration) -> str | None:
        return None

    def __call__(
        self, demonstrations: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> tuple[list[Example], int]:
        config, length = self.config, self.config.max_completion_length
        first = {d.document: d for d in reversed(demonstrations) if d.document}
        if not first:
            raise UserError(
                f"method {config.method!r} learns from documents, and {config.data} has none; add the column 'document'"
            )
        room = (loaded.window or 2 * length) - length
        if room < 1:
            raise UserError(
                f"setting 'max_completion_length': {length} leaves no room for preceding text in the model's context "
                f"window of {loaded.window} tokens; lower it"
            )
        room = min(room, config.max_prompt_length or room)
        begin = loaded.tokenizer.bos_token_id
        begin = chat.end_token_id if begin is None else begin
        examples: list[Example] = []
        for document, demonstration in sorted(first.items(), key=lambda item: item[1].row):
            ids = [begin, *chat.encode_text(document or ""), chat.end_token_id]
            for start in range(1, len(ids), length):
                piece = replace(demonstration, row=len(examples), completion=document or "", prompt=())
                examples.append(Example(piece, ids[max(0, start - room) : start], None, ids[start : start + length]))
        return examples, 0

    def notes(
        self, examples: Sequence[Example], rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> list[str]:
        """Rows that are not used."""
        without = [row.source for row in rows if not row.document]
        note = f"{len(without)} of {len(rows)} rows have no document and are not used ({first_ten(without)})"
        return [note] if without else []
