"""Which of a step's samples are learnt: each gets a verdict, and the method chooses, weights and gives contexts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selfdistill.config import TrainConfig
from selfdistill.data import ChatFormat, Verdict
from selfdistill.errors import UserError, number_of
from selfdistill.methods import Checker, Completion, Method, encoder_of, own_errors, verdicts_on
from selfdistill.runtime import say_note


@dataclass(frozen=True)
class BatchPart:
    """What one part of a step contributes to the batch."""

    name: str
    method: Method
    completions: Sequence[Completion]
    """Samples, or what the method learns from instead of samples. Parts with the same samples share this object."""
    weight: float
    """Of the part's loss: its share of the batch's examples, times the method's weight."""
    window: int | None = None
    """Limit for prompt plus completion, in tokens, of all models that score them; None if there is none."""


@dataclass(frozen=True)
class Selected:
    """What a part learns."""

    part: BatchPart
    completions: Sequence[Completion]
    """With their factors and contexts, and samples with their verdicts; may be none."""
    verdicts: Sequence[Verdict]
    """One per sample; empty if the method has no checker."""
    unfit: int
    """Contexts that could not be shown to the teacher."""

    def reward(self, *, helped: bool = False) -> float | None:
        """Mean reward of the samples with or without help; None if there are none, or no verdicts.

        Prompts count by all of their samples, because those that are not solved have more samples with help.
        """
        if not self.verdicts:
            return None
        rows = [sample.example.demonstration.row for sample in self.part.completions]
        chosen = [number for number, sample in enumerate(self.part.completions) if sample.helped == helped]
        count, count_chosen = Counter(rows), Counter(rows[number] for number in chosen)
        weights = [count[rows[number]] / count_chosen[rows[number]] for number in chosen]
        rewards = [self.verdicts[number].reward for number in chosen]
        return sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights) if chosen else None


@dataclass
class Selector:
    """Selects what the parts of a step learn.

    Args:
        config: settings of the run.
        chat: the format of both prompts.
    """

    config: TrainConfig
    chat: ChatFormat
    _noted: bool = field(default=False, init=False)

    def __call__(self, parts: Sequence[BatchPart]) -> list[Selected]:
        """The same on every rank. A checker is asked once about each sample."""
        found: dict[tuple[int, Checker], list[Verdict]] = {}
        selected = []
        for part in parts:
            checker = part.method.checker
            verdicts: list[Verdict] = []
            if checker is not None:
                key = (id(part.completions), checker)
                verdicts = found[key] = found.get(key) or self._verdicts(checker, part.completions)
            selected.append(self._selected(part, verdicts))
        return selected

    def _verdicts(self, checker: Checker, samples: Sequence[Completion]) -> list[Verdict]:
        def checked(some: Sequence[Completion], chat: ChatFormat) -> list[Verdict]:
            with own_errors(self.config.method):
                found = checker(some, chat)
            self._check("checker", found, Verdict)
            if len(found) != len(some):
                raise UserError(
                    f"method {self.config.method!r}: slot 'checker': returned {number_of(len(found), 'verdict')} on "
                    f"{number_of(len(some), 'sample')}, expected one on each, in their order"
                )
            return found

        return verdicts_on(checked, samples, self.chat)

    def _check(self, slot: str, found: Any, kind: type) -> None:
        """Check that a slot has returned a list of this kind."""
        wrong = [x for x in found if not isinstance(x, kind)] if isinstance(found, Sequence) else [found]
        if wrong:
            raise UserError(
                f"method {self.config.method!r}: slot {slot!r}: returned {wrong[0]!r:.60}, expected a list of "
                f"{kind.__name__}"
            )

    def _selected(self, part: BatchPart, verdicts: Sequence[Verdict]) -> Selected:
        samples = part.completions
        if verdicts:
            samples = [replace(sample, verdict=verdict) for sample, verdict in zip(samples, verdicts, strict=True)]
        if part.method.select is None:
            return Selected(part, samples, verdicts, unfit=0)
        encode = encoder_of(self.config, self.chat, part.window)
        learnt = part.method.select(samples, verdicts, encode)
        self._check("select", learnt, Completion)
        if encode.unfit and not self._noted:
            self._noted = True
            say_note(
                f"{encode.unfit[0]}; such samples are left out, and metrics.jsonl counts them (unfit). A larger "
                "max_prompt_length may fit them"
            )
        return Selected(part, learnt, verdicts, len(encode.unfit))
