"""Samples that saw the demonstration's first actions in their prompt, for prompts without a right sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Literal

from selfdistill.config import TrainConfig
from selfdistill.data import ChatFormat, ContextEncoder, Demonstration, Example, first_ten
from selfdistill.methods.checking import ScorerChecker, verdicts_on
from selfdistill.methods.encoders import cut, encoder_of, guided
from selfdistill.methods.examples import ScoredExamples
from selfdistill.methods.failures import failed_groups
from selfdistill.methods.sequences import Completion, StudentSamples
from selfdistill.model import LoadedModel, Sampling, sample, sample_seed

Unit = Literal["lines", "sentences"]
_ENDS: dict[Unit, str] = {"lines": r"\s*\n\s*", "sentences": r"(?<=[.!?])\s+|\s*\n\s*"}
_MOST_ROUNDS = 64
"""Maximum tries of a search: more than the binary digits of any number of actions."""


def beginnings(text: str, unit: Unit) -> list[str]:
    """The text up to the end of each of its actions: its lines or sentences."""
    text = text.strip()
    return [text[: end.start()] for end in re.finditer(_ENDS[unit], text)] + [text]


@dataclass(frozen=True)
class GuidedExamples(ScoredExamples):
    """Prompts with a demonstration to guide by: ``privileged_context`` if given, else the completion."""

    unit: Unit = "lines"
    """What counts as an action."""

    def notes(
        self, examples: Sequence[Example], rows: Sequence[Demonstration], loaded: LoadedModel, chat: ChatFormat
    ) -> list[str]:
        """Those of other demonstrations, and whose guides are never tried whole, as they do not fit."""
        encode, whole, none = encoder_of(self.config, chat, loaded.window), [], 0
        for row in (example.demonstration for example in examples):
            guides = beginnings(row.shown, self.unit)
            if guided(row, guides[-1], encode) is None:
                whole.append(row.source)
                none += guided(row, guides[0], encode) is None
        notes = super().notes(examples, rows, loaded, chat)
        if whole:
            notes.append(
                f"the guides of {len(whole)} of {len(examples)} rows do not fit completely into the prompt "
                f"({first_ten(whole)}): only as many of their first {self.unit} as fit are tried, none in {none} of "
                "these rows; a larger max_prompt_length may fit them"
            )
        return notes

    def lacks(self, demonstration: Demonstration) -> str | None:
        if not demonstration.has_demonstration:
            return (
                f"column 'completion': missing, and no 'privileged_context' for method {self.config.method!r} to use "
                "as a guide; method grpo needs none"
            )
        return super().lacks(demonstration)


@dataclass(frozen=True)
class GuidedAfterFailure:
    """Groups of student samples. Where none is right, samples with a guide replace the last ``replaced``.

    The guide is the smallest number of first actions of the demonstration, at the end of the prompt, with which a
    sample is right. A binary search finds it, with ``replaced`` samples per try. If no number helps, the group is
    unchanged.
    """

    sampling: Sampling
    group: int
    seed: int
    replaced: int
    unit: Unit
    weighed: bool
    """Whether samples with a guide keep their log-probabilities with it, for importance weights."""
    success_reward: float
    config: TrainConfig = field(kw_only=True, compare=False)

    @property
    def per_example(self) -> int:
        return self.group

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], step: int) -> list[Completion]:
        made = StudentSamples(self.sampling, self.group, self.seed)(loaded, examples, step)
        config, chat = self.config, loaded.chat_for(self.config)
        check = ScorerChecker(config.scorer)
        encode = encoder_of(config, chat, loaded.window)
        verdicts = verdicts_on(check, made, chat)
        made = [replace(one, verdict=verdict) for one, verdict in zip(made, verdicts, strict=True)]
        failed = failed_groups(verdicts, self.group, self.success_reward)
        searches = {first: self._search(examples, first // self.group) for first in failed}
        for number in count():
            tried = [search for search in searches.values() if search.low <= search.high]
            if not tried:
                break
            drawn = self._drawn(loaded, tried, encode, (step, number))
            found = iter(verdicts_on(check, [one for samples in drawn for one in samples], chat))
            for search, samples in zip(tried, drawn, strict=True):
                search.go_on([replace(one, verdict=next(found)) for one in samples], self.success_reward)
        for first, search in searches.items():
            if search.found:
                made[first + self.group - self.replaced : first + self.group] = search.found
        return made

    def longest_prompt(self, example: Example, encode: ContextEncoder) -> list[int]:
        """The prompt with about the longest guide that is tried; for memory plans."""
        row = example.demonstration
        return cut(lambda whole: guided(row, beginnings(row.shown, self.unit)[-1], whole), encode)

    def _search(self, examples: Sequence[Example], place: int) -> _Search:
        """A search for the example at a place of the batch; the example may also occur earlier in the batch."""
        example = examples[place]
        row = example.demonstration
        earlier = sum(other.demonstration.row == row.row for other in examples[:place])
        return _Search(example, beginnings(row.shown, self.unit), earlier)

    def _drawn(
        self, loaded: LoadedModel, tried: Sequence[_Search], encode: ContextEncoder, at: tuple[int, int]
    ) -> list[list[Completion]]:
        """Samples with the guide that each search tries, as if from the prompt alone; none if it does not fit."""
        prompts: list[list[int]] = []
        seeds: list[int] = []
        sizes: list[int] = []
        for search in tried:
            row, (step, number) = search.example.demonstration, at
            ids = guided(row, search.guides[search.middle - 1], encode)
            sizes.append(0 if ids is None else self.replaced)
            prompts += [ids or []] * sizes[-1]
            first = (search.earlier * _MOST_ROUNDS + number) * self.replaced
            seeds += [sample_seed(self.seed, -1 - step, row.row, first + each) for each in range(sizes[-1])]
        rollouts = iter(sample(loaded, prompts, self.sampling, seeds) if prompts else [])
        return [
            [
                Completion(
                    search.example, r.ids, r.logps if self.weighed else None, r.truncated, guided=True, helped=True
                )
                for r in islice(rollouts, size)
            ]
            for search, size in zip(tried, sizes, strict=True)
        ]


@dataclass
class _Search:
    """A binary search for the fewest actions with which a sample is right."""

    example: Example
    guides: list[str]
    """The first action, the first two, ..., all of them."""
    earlier: int
    """How often the example came earlier in the batch."""
    found: list[Completion] = field(default_factory=list)
    """Samples with the fewest so far."""
    low: int = 1
    high: int = field(init=False)

    def __post_init__(self) -> None:
        self.high = len(self.guides)

    @property
    def middle(self) -> int:
        """Number of actions to try."""
        return (self.low + self.high) // 2

    def go_on(self, samples: list[Completion], success_reward: float) -> None:
        """Update the search with the checked samples of the tried number."""
        right = any(one.verdict and one.verdict.reward >= success_reward for one in samples)
        if right:
            self.found = samples
        if right or not samples:  # a guide that does not fit is too long
            self.high = self.middle - 1
        else:
            self.low = self.middle + 1
