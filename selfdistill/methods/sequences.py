"""The sequence slot: whose tokens are scored.

Each source returns completions for the examples of one optimizer step. They depend only on weights, seed and step.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from selfdistill.data import ChatFormat, Example
from selfdistill.model import LoadedModel, Sampling, sample, sample_seed
from selfdistill.runtime import ProgressBar, read_lines, write_atomically


@dataclass(frozen=True)
class Completion:
    """Tokens to score after an example's prompts."""

    example: Example
    ids: list[int]
    logps: list[float] | None
    """Log-probability of each token under the policy that sampled it; None if it was not sampled."""
    truncated: bool
    """Reached the length limit without an end token."""


class SequenceSource(Protocol):
    """Whose tokens are scored."""

    def __call__(self, loaded: LoadedModel, rows: Sequence[Example], step: int) -> list[Completion]: ...


@dataclass(frozen=True)
class StudentSamples:
    """On-policy: the student's own samples."""

    sampling: Sampling
    num_generations: int
    seed: int

    def __call__(self, loaded: LoadedModel, rows: Sequence[Example], step: int) -> list[Completion]:
        expanded = [row for row in rows for _ in range(self.num_generations)]
        seen: Counter[int] = Counter()  # an example may occur twice in a batch that spans the end of an epoch
        seeds = []
        for row in expanded:
            number = row.demonstration.row
            seeds.append(sample_seed(self.seed, step, number, seen[number]))
            seen[number] += 1
        rollouts = sample(loaded, [row.student_ids for row in expanded], self.sampling, seeds)
        return [Completion(row, r.ids, r.logps, r.truncated) for row, r in zip(expanded, rollouts, strict=True)]


@dataclass(frozen=True)
class DatasetCompletions:
    """Off-policy: the examples' own completions, which are the demonstrations unless replaced."""

    def __call__(self, loaded: LoadedModel, rows: Sequence[Example], step: int) -> list[Completion]:
        return [_held(loaded, row) for row in rows]


def _held(loaded: LoadedModel, row: Example) -> Completion:
    return Completion(row, row.completion_ids, None, row.completion_ids[-1] not in loaded.end_token_ids)


@dataclass(frozen=True)
class ColdStart:
    """Student samples, of which demonstrations replace some in the first steps.

    For a student whose own samples never come close to the demonstration. Step n (from 0) uses each demonstration with
    probability 1 - n / ``steps``.
    """

    samples: StudentSamples
    steps: int

    def __call__(self, loaded: LoadedModel, rows: Sequence[Example], step: int) -> list[Completion]:
        completions = self.samples(loaded, rows, step)
        chance = random.Random(f"{self.samples.seed}-{step}")
        share = 1 - step / self.steps
        return [_held(loaded, c.example) if chance.random() < share else c for c in completions]


SAMPLES_FILE = "teacher_samples.jsonl"
"""File in the run folder with the ids and text of :class:`TeacherSamples`."""


@dataclass(frozen=True)
class TeacherSamples:
    """A fixed data set: one sample per example from the model given the demonstration, drawn before training."""

    sampling: Sampling
    seed: int
    batch_size: int

    def __call__(self, loaded: LoadedModel, rows: Sequence[Example], folder: Path) -> list[Example]:
        """The examples with these completions; a resumed run reads them from ``SAMPLES_FILE`` in ``folder``."""
        kept = {line["key"]: line["ids"] for line in read_lines(folder / SAMPLES_FILE)}
        keys = [self._key(row) for row in rows]
        if kept.keys() >= set(keys):
            return [replace(row, completion_ids=kept[key]) for row, key in zip(rows, keys, strict=True)]
        drawn: list[Example] = []
        with ProgressBar("teacher's samples", len(rows)) as reporter:
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                seeds = [sample_seed(self.seed, 0, row.demonstration.row, 0) for row in part]
                rollouts = sample(loaded, [row.teacher_ids or [] for row in part], self.sampling, seeds)
                drawn += [replace(row, completion_ids=r.ids) for row, r in zip(part, rollouts, strict=True)]
                reporter.advance(len(drawn))
        return drawn

    def _key(self, row: Example) -> str:
        """Hash of what an example's sample depends on, apart from the model."""
        parts = [row.demonstration.row, row.teacher_ids, asdict(self.sampling), self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def write(self, folder: Path, rows: Sequence[Example], chat: ChatFormat) -> None:
        """Save the samples, for a resumed run and for inspection."""
        texts = ((row, chat.decode(row.completion_ids)) for row in rows)
        lines = [
            {"source": row.demonstration.source, "text": text, "ids": row.completion_ids, "key": self._key(row)}
            for row, text in texts
        ]
        write_atomically(folder / SAMPLES_FILE, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
