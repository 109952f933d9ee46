"""The sequence slot: whose tokens are scored.

Each source returns completions for the examples of one optimizer step. They depend only on weights, seed and step.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from selfdistill.data import ContextEncoder, Example, Message, Verdict, own_tokens, pictures_in, reply_spans
from selfdistill.errors import RESUME, EngineFailed, RunStopped
from selfdistill.methods.samples_file import Sample, SamplesFile
from selfdistill.model import LoadedModel, Sampling, prompts_at_a_time, sample, sample_seed
from selfdistill.runtime import ProgressBar, StopRequests, all_gather


@dataclass(frozen=True)
class Completion:
    """Tokens to score after an example's prompts."""

    example: Example
    ids: list[int]
    logps: list[float] | None
    """Log-probability of each token under the policy that sampled it; None if it was not sampled."""
    truncated: bool
    """Reached the length limit without an end token."""
    factor: float = 1.0
    """Factor on its loss, such as an advantage."""
    given: tuple[tuple[int, int], ...] = ()
    """Half-open spans of ``ids`` that are not the model's own, in order. They are never learnt, and have a
    log-probability of 0 in ``logps``."""
    cut: bool = False
    """Of a truncated episode: whether it was cut after a complete reply."""
    turns: int = 1
    """Replies of the episode."""
    invalid_calls: int = 0
    """Calls of tools that could not be run as they were written."""
    verdict: Verdict | None = None
    """The environment's, or the checker's if what sampled it needed it; None: not yet judged."""
    messages: tuple[Message, ...] = ()
    """All messages after the prompt; empty without an environment."""
    guided: bool = False
    """Sampled from another prompt than the example's, so that ``logps`` are far from the student's."""
    helped: bool = False
    """Sampled with a part of the demonstration, or a demonstration itself, so that its reward is not the student's."""

    @property
    def is_own(self) -> list[bool]:
        """Whether each token is the model's own."""
        return own_tokens(len(self.ids), self.given)

    @property
    def reply_spans(self) -> list[tuple[int, int]]:
        """Half-open spans of ``ids`` between those that are given: the replies of an episode."""
        return reply_spans(len(self.ids), self.given)

    @property
    def reply_numbers(self) -> list[int]:
        """The number of the reply that each token belongs to, from 1; a given token counts to the one before."""
        starts, number = {end for _, end in self.given}, 1
        found: list[int] = []
        for at in range(len(self.ids)):
            if at in starts:
                number += 1
            found.append(number)
        return found


@runtime_checkable
class SequenceSource(Protocol):
    """Whose tokens are scored."""

    @property
    def sampling(self) -> Sampling | None:
        """How the student samples; None if it does not."""
        ...

    @property
    def per_example(self) -> int:
        """Completions of each example."""
        ...

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], step: int) -> list[Completion]: ...


@runtime_checkable
class LearnsOtherPrompts(Protocol):
    """Part of a source whose samples are learnt under the prompts that they were sampled from, not the examples'."""

    def longest_example(self, example: Example, encode: ContextEncoder) -> Example:
        """The example with about the longest prompt that it is sampled with; for memory plans."""
        ...


@runtime_checkable
class SamplesOtherPrompts(Protocol):
    """Part of a source that replaces some samples by samples from other prompts, learnt under the examples' own."""

    @property
    def replaced(self) -> int:
        """How many of an example's completions they may replace."""
        ...

    def longest_prompt(self, example: Example, encode: ContextEncoder) -> list[int]:
        """About the longest prompt of such a sample; for memory plans."""
        ...


def seeds_of(examples: Sequence[Example], count: int, seed: int, step: int) -> list[list[int]]:
    """The seeds of each example's samples in a step, ``count`` of each."""
    seen: Counter[tuple[int, int]] = Counter()  # an example may occur twice in a batch that spans the end of an epoch
    found = []
    for source, row in ((example.source, example.demonstration.row) for example in examples):
        own = sample_seed(seed, 0, 0, source - 1) if source else seed
        first = seen[source, row]
        found.append([sample_seed(own, step, row, first + number) for number in range(count)])
        seen[source, row] += count
    return found


@dataclass(frozen=True)
class StudentSamples:
    """On-policy: the student's own samples."""

    sampling: Sampling
    num_generations: int
    seed: int

    @property
    def per_example(self) -> int:
        return self.num_generations

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], step: int) -> list[Completion]:
        expanded, seeds = self.expanded(examples, step)
        rollouts = sample(loaded, [example.student_ids for example in expanded], self.sampling, seeds)
        return [Completion(x, r.ids, r.logps, r.truncated) for x, r in zip(expanded, rollouts, strict=True)]

    def expanded(self, examples: Sequence[Example], step: int) -> tuple[list[Example], list[int]]:
        """Each example as often as it is sampled, and the seeds of the samples."""
        expanded = [example for example in examples for _ in range(self.num_generations)]
        return expanded, list(chain(*seeds_of(examples, self.num_generations, self.seed, step)))


@dataclass(frozen=True)
class DatasetCompletions:
    """Off-policy: the examples' own completions, which are the demonstrations unless replaced."""

    sampling = None
    per_example = 1

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], step: int) -> list[Completion]:
        return [_held(loaded, example) for example in examples]


def _held(loaded: LoadedModel, example: Example) -> Completion:
    ids = example.completion_ids
    return Completion(example, ids, None, ids[-1] not in loaded.end_token_ids, given=example.given)


@dataclass(frozen=True)
class ColdStart:
    """Student samples, some of which are replaced by demonstrations in the first steps.

    For a student whose own samples never come close to the demonstration. Step n (from 0) uses each demonstration with
    probability 1 - n / ``steps``.
    """

    samples: StudentSamples
    steps: int

    @property
    def sampling(self) -> Sampling:
        return self.samples.sampling

    @property
    def per_example(self) -> int:
        return self.samples.per_example

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], step: int) -> list[Completion]:
        completions = self.samples(loaded, examples, step)
        chance = random.Random(f"{self.samples.seed}-{step}")
        share = 1 - step / self.steps
        return [_held(loaded, c.example) if chance.random() < share else c for c in completions]


@dataclass(frozen=True)
class DrawnSamples:
    """A fixed data set: one sample per example from the model before training.

    The model sees what the teacher sees; without a teacher's view, the prompt alone. The samples replace the examples'
    ``replaces``.
    """

    sampling: Sampling
    seed: int
    batch_size: int
    drop_shortest: float = 0.0
    """Share of the samples that is not learnt, the shortest."""
    what = "teacher's samples"
    replaces = "completion_ids"

    def __call__(self, loaded: LoadedModel, examples: Sequence[Example], file: SamplesFile) -> list[Example]:
        """The examples with sampled completions; those in ``file`` are read, not drawn.

        Raises:
            RunStopped: a signal arrived while samples were drawn that the file keeps.
            EngineFailed: the engine failed; the file keeps the earlier batches.
        """
        kept, keys = file.read(), [self._key(example) for example in examples]
        if self.is_missing_from(kept, examples):
            self._complete(kept, loaded, examples, keys, file)
        return [self._with(x, kept[key]) for x, key in zip(examples, keys, strict=True)]

    def is_missing_from(self, kept: dict[str, list[int]], examples: Sequence[Example]) -> bool:
        """Whether samples of these examples are missing in ``kept``."""
        return not kept.keys() >= {self._key(example) for example in examples}

    def check_steps(self, steps: int) -> None:
        """Check that a stage with this many steps uses all that is drawn.

        Raises:
            UserError: it does not.
        """

    def _complete(
        self,
        kept: dict[str, list[int]],
        loaded: LoadedModel,
        examples: Sequence[Example],
        keys: Sequence[str],
        file: SamplesFile,
    ) -> None:
        """Draw the samples that are missing in ``kept``.

        The batches are those of a run that nothing interrupted, drawn whole, because rounding depends on the batch.
        """
        size, sampler, total = prompts_at_a_time(loaded, self.batch_size), self.sampler(loaded), len(keys)
        done = sum(key in kept for key in keys)
        with ProgressBar(self.what, total, start=done) as reporter, ExitStack() as held:
            stop = held.enter_context(StopRequests()) if file.grows else None
            for start in range(0, total, size):
                batch = range(start, min(start + size, total))
                missing = [i for i in batch if keys[i] not in kept]
                if not missing:
                    continue
                try:
                    drawn = dict(zip(batch, self.draw(sampler, examples[start : batch.stop]), strict=True))
                except EngineFailed as error:
                    if not (file.grows and done):
                        raise
                    raise EngineFailed(self._stopped(file, done, total, f": {error}")) from error
                file.append([(keys[i], examples[i], drawn[i]) for i in missing])
                kept.update({keys[i]: drawn[i] for i in missing})
                done += len(missing)
                reporter.advance(done)
                if stop and (received := max(all_gather([stop.received or 0]))):  # a signal may reach any rank
                    raise RunStopped(self._stopped(file, done, total), received)

    def _stopped(self, file: SamplesFile, done: int, total: int, why: str = "") -> str:
        """Where the run stopped, and how to resume it."""
        return (
            f"{file.folder}: stopped before the first step, with {done} of {total} {self.what} drawn{why}; they are "
            f"kept, {RESUME}"
        )

    @property
    def at_once(self) -> int:
        """Most samples of an example that are drawn together."""
        return 1

    @property
    def others(self) -> tuple[str, ...]:
        """The models that sample, one after the other; none if it is the one to be trained."""
        return ()

    def sampler(self, loaded: LoadedModel) -> LoadedModel:
        """The model that samples: by default the one to be trained."""
        return loaded

    def _with(self, example: Example, ids: list[int]) -> Example:
        changed: dict[str, Any] = {self.replaces: ids}
        return replace(example, **changed)

    def draw(self, loaded: LoadedModel, examples: Sequence[Example]) -> list[list[int]]:
        """What replaces a part of each example, which depends on no other."""
        seeds = [sample_seed(self.seed, 0, example.demonstration.row, 0) for example in examples]
        return [r.ids for r in sample(loaded, [self.prompt(x) for x in examples], self.sampling, seeds)]

    @staticmethod
    def prompt(example: Example) -> list[int]:
        """What the sampling model sees."""
        return example.student_ids if example.teacher_ids is None else example.teacher_ids

    def learnt(self, drawn: Sequence[Example]) -> list[Example]:
        """Those that are learnt: all but the shortest. Samples as long as the shortest that is kept are kept."""
        lengths = sorted(len(example.completion_ids) for example in drawn)
        shortest = lengths[int(len(lengths) * self.drop_shortest)]
        return [example for example in drawn if len(example.completion_ids) >= shortest]

    def _key(self, example: Example) -> str:
        """Hash of what an example's sample depends on, apart from the model."""
        return hashlib.sha256(json.dumps(self.depends_on(example)).encode()).hexdigest()

    def depends_on(self, example: Example) -> list[Any]:
        """What an example's sample depends on, apart from the model."""
        prompt = self.prompt(example)
        seen = [picture.digest for picture in pictures_in(prompt)]
        return [example.demonstration.row, prompt, asdict(self.sampling), self.seed, *seen]

    def samples(self, examples: Sequence[Example]) -> list[Sample]:
        """The samples with their keys, as the file has them."""
        return [(self._key(x), x, getattr(x, self.replaces)) for x in examples]
