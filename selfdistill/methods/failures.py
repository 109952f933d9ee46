"""Learning from prompts without a right sample, where all group advantages are 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selfdistill.config import TrainConfig
from selfdistill.data import ContextEncoder, Demonstration, Example, Verdict
from selfdistill.errors import UserError, number_of
from selfdistill.methods.checking import ScorerChecker, verdicts_on
from selfdistill.methods.encoders import cut, guided
from selfdistill.methods.examples import ScoredExamples
from selfdistill.methods.grpo import GroupAdvantages
from selfdistill.methods.samples_file import Sample, SamplesFile
from selfdistill.methods.sequences import Completion, DrawnSamples
from selfdistill.methods.slots import Method, Schedule, State
from selfdistill.model import LoadedModel, check_matching, load_matching, sample, sample_seed
from selfdistill.runtime import say


def failed_groups(verdicts: Sequence[Verdict], group: int, success_reward: float) -> list[int]:
    """The first sample of each group in which no reward is at least ``success_reward``."""
    starts = range(0, len(verdicts), group)
    return [first for first in starts if all(v.reward < success_reward for v in verdicts[first : first + group])]


@dataclass(frozen=True)
class PlannedExamples(ScoredExamples):
    """Prompts with a completion to learn, and, unless ``planned`` is False, a plan for it."""

    planned: bool = True

    def lacks(self, demonstration: Demonstration) -> str | None:
        if self.planned and demonstration.privileged_context is None:
            return (
                f"column 'privileged_context': missing, the plan that method {self.config.method!r} shows; add it, or "
                "give method_settings with plan 0"
            )
        return super().lacks(demonstration)


@dataclass(frozen=True)
class References:
    """Replaces each group without a right sample by its prompt's completion, with the share of such groups as factor.

    So the mean of their losses is a mean over all groups, where those with a right sample count as 0.
    """

    group: int
    """Samples per prompt, which are adjacent."""
    planned: bool
    """Whether a teacher sees the prompt with ``privileged_context`` as a guide."""
    success_reward: float
    gates = True

    def __call__(
        self, samples: Sequence[Completion], verdicts: Sequence[Verdict], encode: ContextEncoder
    ) -> list[Completion]:
        failed = [samples[first].example for first in failed_groups(verdicts, self.group, self.success_reward)]
        if self.planned:
            shown = [replace(x, teacher_ids=self._shown(x, encode)) for x in failed]
            failed = [x for x in shown if x.teacher_ids is not None]
        factor = len(failed) * self.group / len(samples)
        return [Completion(x, x.completion_ids, None, False, factor, x.given) for x in failed]

    @staticmethod
    def _shown(example: Example, encode: ContextEncoder) -> list[int] | None:
        row = example.demonstration
        return guided(row, row.privileged_context or "", encode)

    def longest(self, example: Example, tokens: int, encode: ContextEncoder) -> Example:
        if not self.planned:
            return example
        return replace(example, teacher_ids=cut(lambda whole: self._shown(example, whole), encode))


@dataclass(frozen=True)
class OthersSuccesses(DrawnSamples):
    """Replaces each completion, before the first step, by a right sample of another model, which ends by itself.

    It is empty if none of ``tries`` samples is right.
    """

    model: str = field(kw_only=True)
    """Name or folder of the other model."""
    tries: int = field(kw_only=True)
    success_reward: float = field(kw_only=True)
    config: TrainConfig = field(kw_only=True, compare=False)
    first_right: list[bool] = field(init=False, default_factory=list, compare=False)
    """Whether the first sample is right, of each example that this process draws for."""
    what = "other model's samples"

    @property
    def others(self) -> tuple[str, ...]:
        return (self.model,)

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], file: SamplesFile) -> list[Example]:
        drawn = super().__call__(loaded, examples, file)
        first = self.first_right
        rate = f"{sum(first)} of {len(first)} first samples are right, and " if first else ""
        solved = f"{sum(bool(x.completion_ids) for x in drawn)} of {number_of(len(drawn), 'prompt')}"
        say(f"{self.model}: {rate}{solved} have a right one among up to {self.tries}")
        return drawn

    def sampler(self, loaded: LoadedModel) -> LoadedModel:
        return load_matching(self.model, loaded, dtype=self.config.dtype, reads_chats=True)

    def draw(self, loaded: LoadedModel, examples: Sequence[Example]) -> list[list[int]]:
        chat = loaded.chat_for(self.config)
        check = ScorerChecker(self.config.scorer)
        found: list[list[int]] = [[] for _ in examples]
        for number in range(self.tries):
            left = {place: examples[place] for place, ids in enumerate(found) if not ids}
            if not left:
                break
            seeds = [sample_seed(self.seed, 0, x.demonstration.row, number) for x in left.values()]
            rollouts = sample(loaded, [x.student_ids for x in left.values()], self.sampling, seeds)
            made = [Completion(x, r.ids, r.logps, r.truncated) for x, r in zip(left.values(), rollouts, strict=True)]
            verdicts = verdicts_on(check, made, chat)
            for place, one, verdict in zip(left, made, verdicts, strict=True):
                if verdict.reward >= self.success_reward and not one.truncated:
                    found[place] = one.ids
            if number == 0:
                self.first_right.extend(map(bool, found))
        return found

    def depends_on(self, example: Example) -> list[Any]:
        row = example.demonstration
        own = [self.model, self.tries, self.config.scorer, row.scorer, row.answer, row.completion]
        own += [self.success_reward] if self.success_reward < 1 else []  # folders of earlier versions have none
        return [*super().depends_on(example), *own]


@dataclass(frozen=True)
class SuccessesInOrder(OthersSuccesses):
    """The same of several models: those of the first as completions, those of the others as ``later_ids``."""

    later: tuple[OthersSuccesses, ...] = field(kw_only=True)

    @property
    def others(self) -> tuple[str, ...]:
        return (self.model, *(found.model for found in self.later))

    def check_steps(self, steps: int) -> None:
        """See :class:`DrawnSamples`."""
        if steps < len(self.others):
            raise UserError(
                f"setting 'max_steps': found {steps}, expected at least {len(self.others)}, one for teacher_model and "
                "each model of 'later'"
            )

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], file: SamplesFile) -> list[Example]:
        kept = file.read()
        for found in self.later:  # now, because the first may draw for long
            if found.is_missing_from(kept, examples):
                check_matching(found.model, loaded)
        first = super().__call__(loaded, examples, file)
        drawn = [found(loaded, examples, file) for found in self.later]
        later = zip(*drawn, strict=True)
        return [replace(x, later_ids=tuple(y.completion_ids for y in own)) for x, own in zip(first, later, strict=True)]

    def samples(self, examples: Sequence[Example]) -> list[Sample]:
        made = super().samples(examples)
        for number, found in enumerate(self.later):
            made += found.samples([replace(x, completion_ids=x.later_ids[number]) for x in examples])
        return made


@dataclass(frozen=True)
class ModelInTurn(Schedule):
    """The number, from 0, of the model whose samples rescue a group: each in order, for an equal part of the steps."""

    models: int

    def value(self, state: State, step: int, steps: int) -> float:
        return min(self.models - 1, step * self.models // steps)

    def applied(self, method: Method, value: float) -> Method:
        """See :class:`selfdistill.methods.slots.Controller`."""
        assert isinstance(method.select, RescuedAdvantages)
        return replace(method, select=replace(method.select, model=int(value)))


@dataclass(frozen=True)
class RescuedAdvantages(GroupAdvantages):
    """Group advantages, where the last sample of a group without a right one is the example's completion, if any.

    It has a reward of 1, and ``weight`` times the advantage.
    """

    success_reward: float
    weight: float
    model: int = 0
    """0: ``completion_ids``; n: the n-th of ``later_ids``."""

    def __call__(
        self, samples: Sequence[Completion], verdicts: Sequence[Verdict], encode: ContextEncoder
    ) -> list[Completion]:
        learnt, judged, rescued = list(samples), list(verdicts), set()
        for last in (first + self.group - 1 for first in failed_groups(verdicts, self.group, self.success_reward)):
            example = samples[last].example
            if ids := (example.completion_ids, *example.later_ids)[self.model]:
                learnt[last], judged[last] = Completion(example, ids, None, False), Verdict(1.0)
                rescued.add(last)
        found = super().__call__(learnt, judged, encode)
        return [replace(x, factor=self.weight * x.factor) if n in rescued else x for n, x in enumerate(found)]
