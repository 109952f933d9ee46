"""Samples that get a part of the demonstration: the student continues it as its reply, or sees it in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import fmean
from typing import Any, Literal

from selfdistill.config import TrainConfig
from selfdistill.data import ContextEncoder, Example, Verdict, continued_by
from selfdistill.errors import UserError
from selfdistill.methods.checking import ScorerChecker, verdicts_on
from selfdistill.methods.encoders import cut, encoder_of, guided
from selfdistill.methods.sequences import Completion, DrawnSamples, seeds_of
from selfdistill.model import LoadedModel, Sampling, sample, sample_seed

Where = Literal["reply", "prompt"]
"""Where a prefix of the demonstration is: it begins the reply, or is at the end of the prompt."""


def continued(
    loaded: LoadedModel,
    examples: Sequence[Example],
    prefixes: Sequence[list[int]],
    sampling: Sampling,
    longest: float,
    seeds: Sequence[int],
) -> list[Completion]:
    """The student's continuations of replies that begin with the given tokens; the loss sees the prompt alone.

    ``longest``, below 1, is the share of the maximum length that a prefix may have. A sample after a prefix has at most
    the rest, whatever the prefix, so it depends on no other sample. Without a prefix a sample may have the maximum
    length.
    """
    limit = sampling.max_completion_length
    after_prefix = replace(sampling, max_completion_length=limit - int(longest * limit))
    found: dict[int, Completion] = {}
    for policy, has_prefix in ((sampling, False), (after_prefix, True)):
        chosen = [number for number, prefix in enumerate(prefixes) if bool(prefix) == has_prefix]
        if not chosen:
            continue
        prompts = [continued_by(examples[number].student_ids, prefixes[number]) for number in chosen]
        rollouts = sample(loaded, prompts, policy, [seeds[number] for number in chosen])
        for number, r in zip(chosen, rollouts, strict=True):
            x, prefix = examples[number], prefixes[number]
            logps = [*([0.0] * len(prefix)), *r.logps]
            given = _beginning(prefix)
            found[number] = Completion(x, [*prefix, *r.ids], logps, r.truncated, given=given, helped=has_prefix)
    return [found[number] for number in range(len(prefixes))]


def _beginning(prefix: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The span of a prefix, if there is any."""
    return ((0, len(prefix)),) if prefix else ()


def prompted(
    loaded: LoadedModel,
    examples: Sequence[Example],
    prefixes: Sequence[list[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    config: TrainConfig,
) -> list[Completion]:
    """The student's replies to prompts that end with the text of the given tokens; the loss sees these prompts.

    Raises:
        UserError: such a prompt is too long, or the chat template cannot show it.
    """
    chat = loaded.chat_for(config)
    encode = encoder_of(config, chat, loaded.window)
    shown = [_prompted(x, prefix, encode) for x, prefix in zip(examples, prefixes, strict=True)]
    if encode.unfit:
        raise UserError(f"{encode.unfit[0]}, with a prefix of the demonstration; lower 'longest', or use where: reply")
    rollouts = sample(loaded, [x.student_ids for x in shown], sampling, seeds)
    return [
        Completion(x, r.ids, r.logps, r.truncated, helped=x is not plain)
        for x, plain, r in zip(shown, examples, rollouts, strict=True)
    ]


def _prompted(example: Example, prefix: Sequence[int], encode: ContextEncoder) -> Example:
    """The example with the text of these tokens at the end of its prompt; as it is if there is none, or it is unfit."""
    text = encode.chat.decode(prefix).rstrip("\N{REPLACEMENT CHARACTER}")  # a token may end within a character
    ids = guided(example.demonstration, text, encode) if text else None
    return example if ids is None else replace(example, student_ids=ids)


@dataclass(frozen=True)
class GuidedSamples:
    """For each example a group of samples of the prompt alone, then one that gets its completion as a prefix."""

    sampling: Sampling
    """Prefix and sample together have at most its number of tokens."""
    group: int
    seed: int
    longest: float
    """Share of the completion that a prefix may have."""
    where: Where
    config: TrainConfig = field(kw_only=True, compare=False)

    @property
    def per_example(self) -> int:
        return 2 * self.group

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], step: int) -> list[Completion]:
        expanded: list[Example] = []
        prefixes: list[list[int]] = []
        for example in examples:
            expanded += [example] * self.per_example
            prefixes += [[]] * self.group + [example.completion_ids] * self.group
        seeds = list(chain(*seeds_of(examples, self.per_example, self.seed, step)))
        return _helped(self, loaded, expanded, prefixes, seeds)

    def longest_example(self, example: Example, encode: ContextEncoder) -> Example:
        """The example with about the longest prompt that it is sampled with; for memory plans."""
        if self.where == "reply":
            return example
        ids = example.completion_ids[:-1]
        prefix = ids[: int(len(ids) * self.longest)]
        return replace(example, student_ids=cut(lambda whole: _prompted(example, prefix, whole).student_ids, encode))


@dataclass(frozen=True)
class MicroGroups:
    """Samples in micro-groups; later ones begin with a part of the completion if earlier ones were rarely right.

    Micro-group i follows a prefix of ``ratios[i]`` of the completion if the mean reward of the example's samples so far
    is below ``thresholds[i]``, else the prompt alone. With ratio 1 its samples are the completion itself.
    """

    sampling: Sampling
    """Prefix and sample together have at most its number of tokens."""
    seed: int
    sizes: tuple[int, ...]
    ratios: tuple[float, ...]
    thresholds: tuple[float, ...]
    config: TrainConfig = field(kw_only=True, compare=False)

    @property
    def per_example(self) -> int:
        return sum(self.sizes)

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], step: int) -> list[Completion]:
        chat = loaded.chat_for(self.config)
        check = ScorerChecker(self.config.scorer)
        made: list[list[Completion]] = [[] for _ in examples]
        rewards: list[list[float]] = [[] for _ in examples]
        seeds = seeds_of(examples, self.per_example, self.seed, step)
        for size, ratio, threshold in zip(self.sizes, self.ratios, self.thresholds, strict=True):
            helped = [number for number, own in enumerate(rewards) if fmean(own or [0]) < threshold]
            alone = [number for number in range(len(examples)) if number not in helped]
            numbers = slice(len(made[0]), len(made[0]) + size)
            for chosen, share in ((alone, 0.0), (helped, ratio)):
                expanded = [examples[number] for number in chosen for _ in range(size)]
                own_seeds = [seed for number in chosen for seed in seeds[number][numbers]]
                samples = self._after(loaded, expanded, share, own_seeds)
                verdicts = verdicts_on(check, samples, chat)
                for place, (one, verdict) in enumerate(zip(samples, verdicts, strict=True)):
                    made[chosen[place // size]].append(replace(one, verdict=verdict))
                    rewards[chosen[place // size]].append(verdict.reward)
        return [completion for own in made for completion in own]

    def _after(
        self, loaded: LoadedModel, examples: Sequence[Example], share: float, seeds: Sequence[int]
    ) -> list[Completion]:
        """A sample of each example after this share of its completion."""
        if share == 1:
            given = [example.completion_ids for example in examples]
            return [
                Completion(x, ids, [0.0] * len(ids), False, given=_beginning(ids), helped=True)
                for x, ids in zip(examples, given, strict=True)
            ]
        ends = [example.completion_ids[:-1] for example in examples]
        prefixes = [ids[: int(len(ids) * share)] for ids in ends]
        return continued(loaded, examples, prefixes, self.sampling, share, seeds)


@dataclass(frozen=True)
class GivenPrefixes:
    """The given tokens of the samples, as completions to learn, with the share of samples that have any as factor.

    So the mean of their losses is a mean over all samples.
    """

    gates = True

    def __call__(
        self, samples: Sequence[Completion], verdicts: Sequence[Verdict], encode: ContextEncoder
    ) -> list[Completion]:
        given = [one for one in samples if one.given]
        factor = len(given) / len(samples)
        return [Completion(x.example, x.ids[: x.given[0][1]], None, False, factor) for x in given]

    def longest(self, example: Example, tokens: int, encode: ContextEncoder) -> Example:
        return example


@dataclass(frozen=True)
class ShortestPrefixes(DrawnSamples):
    """Replaces each completion, before the first step, by its shortest prefix with which a sample is right.

    It tries ``lengths`` equal steps from 0 up to ``longest`` of the completion. If no sample is right,
    the prefix has the maximum length.
    """

    longest: float = 0.25
    """Share of the completion."""
    lengths: int = 4
    """Number of lengths above 0 that are tried."""
    tries: int = 8
    """Samples with each prefix."""
    where: Where = "reply"
    success_reward: float = 1.0
    config: TrainConfig = field(kw_only=True, compare=False)
    what = "shortest prefixes"

    @property
    def at_once(self) -> int:
        return self.tries

    @staticmethod
    def prompt(example: Example) -> list[int]:
        return example.student_ids

    def draw(self, loaded: LoadedModel, examples: Sequence[Example]) -> list[list[int]]:
        chat = loaded.chat_for(self.config)
        check, found = ScorerChecker(self.config.scorer), dict.fromkeys(range(len(examples)), -1)
        for number in range(self.lengths + 1):
            open_ = [i for i in found if found[i] < 0 for _ in range(self.tries)]
            prefixes = [self._prefix(examples[i], number) for i in open_]
            rows = [examples[i].demonstration.row for i in open_]
            seeds = [sample_seed(self.seed, -1 - number, row, n % self.tries) for n, row in enumerate(rows)]
            made = _helped(self, loaded, [examples[i] for i in open_], prefixes, seeds)
            verdicts = verdicts_on(check, made, chat)
            for i, verdict in zip(open_, verdicts, strict=True):
                if verdict.reward >= self.success_reward:
                    found[i] = number
        return [self._prefix(x, self.lengths if found[i] < 0 else found[i]) for i, x in enumerate(examples)]

    def _prefix(self, example: Example, number: int) -> list[int]:
        """The prefix of this length, without the end token."""
        ids = example.completion_ids[:-1]
        return ids[: int(len(ids) * self.longest * number / self.lengths)]

    def depends_on(self, example: Example) -> list[Any]:
        row = example.demonstration
        own = [row.completion, self.longest, self.lengths, self.tries, self.config.scorer, row.scorer, row.answer]
        own += [self.where] if self.where == "prompt" else []  # folders of earlier versions have neither
        own += [self.success_reward] if self.success_reward < 1 else []
        return [*super().depends_on(example), *own]


def _helped(
    how: GuidedSamples | ShortestPrefixes,
    loaded: LoadedModel,
    examples: Sequence[Example],
    prefixes: Sequence[list[int]],
    seeds: Sequence[int],
) -> list[Completion]:
    """The student's samples with the prefixes where they belong."""
    if how.where == "prompt":
        return prompted(loaded, examples, prefixes, how.sampling, seeds, how.config)
    return continued(loaded, examples, prefixes, how.sampling, how.longest, seeds)
