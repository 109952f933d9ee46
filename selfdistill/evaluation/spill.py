"""Predict spill: how a few real steps on the task change the model on unrelated prompts.

    gain = log p(demo) after - before;   moved = KL(before||after) on general prompts

SFT and SDFT each take ``STEPS`` steps of AdamW on the same rows, from the same weights. Gain is measured on the
demonstrations for both, because their losses are not comparable.

One step is not enough. On the package's routing skill, the first step of SDFT moves the starter model further than the
first step of SFT does, but eight steps move it less far, as does the whole run.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from selfdistill.data import ChatFormat, Demonstration, Example, anchor_prompts, encode_prompts
from selfdistill.errors import UserError
from selfdistill.evaluation.distances import Distance, mean_loss, summed_loss
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.model import (
    ForwardPass,
    LoadedModel,
    Sampling,
    freeze_vision,
    make_optimizer,
    refuse_float16,
    sample,
    sample_seed,
)

STEPS = 8
"""Steps of each method."""
_ANCHORS, _TOKENS = 16, 16  # general prompts, and the maximum length of answers to them
_ROWS = 8  # per forward pass


@dataclass(frozen=True)
class Trial:
    """The effect of a few steps of a method on the task."""

    gain: float
    """Rise of the demonstrations' log-probability under the student, nats per token."""
    moved: float
    """KL(before||after) along the model's own answers to general prompts, nats per token."""

    def __str__(self) -> str:
        return f"{self.gain:+.2f} on the demonstrations and {self.moved:.2f} away on general prompts"


@dataclass(frozen=True)
class Spill:
    """Trials of SFT and of SDFT, from the same weights."""

    sft: Trial | None = None
    """None if no step was taken."""
    sdft: Trial | None = None
    """None as above."""
    untried: str | None = None
    """Why no step was taken; None if it was."""

    def sentence(self) -> str:
        """The finding and the advice, without a full stop."""
        if self.sft is None or self.sdft is None:
            return f"not measured: {self.untried}"
        found = f"after {STEPS} steps, in nats per token: SFT {self.sft}, SDFT {self.sdft}"
        return f"{found}. To reduce it, train with anchors (package, or prompts of your own)"


@dataclass(frozen=True)
class TrialSettings:
    """Settings of the trials' steps."""

    learning_rate: float
    sampling: Sampling
    """How SDFT's student samples."""
    seed: int
    arithmetic: Callable[[], AbstractContextManager[Any]]
    """Context with the precision of training; the distance is measured in the precision of the weights."""


def measure_spill(
    loaded: LoadedModel,
    forward_pass: ForwardPass,
    rows: Sequence[Example],
    chat: ChatFormat,
    settings: TrialSettings,
) -> Spill:
    """Take a few steps of SFT and of SDFT, each on a copy of the model.

    Needs the memory of a training run in addition to the model's.

    Args:
        loaded: the model, which is also SDFT's teacher; it is not changed.
        forward_pass: runs the model.
        rows: rows of the task, with the teacher's prompts. Those without a completion are left out.
        chat: encodes the general prompts, a sample of the package's anchors.
        settings: settings of the steps.

    Returns:
        Both trials, or the reason why no step was taken.
    """
    rows = [row for row in rows if row.completion_ids]
    if not rows:
        return Spill(untried="no row has a completion to measure the gain on")
    try:
        refuse_float16(loaded.model, loaded.name)
    except UserError as error:
        return Spill(untried=str(error))
    prompts, demos = [row.student_ids for row in rows], [row.completion_ids for row in rows]
    distance = Distance(loaded, forward_pass, chat, _general_prompts(chat, loaded.window, settings.seed), _TOKENS)
    before = mean_loss(loaded, prompts, demos)

    def trial(loss: CrossEntropy | Divergence) -> Trial:
        student = replace(loaded, model=copy.deepcopy(loaded.model))
        if student.pictures is not None:
            freeze_vision(student.model)  # as in a run
        _train(student, loaded, forward_pass, loss, rows, settings)
        return Trial(before - mean_loss(student, prompts, demos), distance.of(student.model))

    return Spill(sft=trial(CrossEntropy()), sdft=trial(Divergence()))


def _general_prompts(chat: ChatFormat, window: int | None, seed: int) -> list[Demonstration]:
    """A random sample of the package's anchors that fit the window."""
    prompts = anchor_prompts()
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    fitting = (row for row in shuffled if not window or len(encode_prompts([row], chat)[0]) + _TOKENS <= window)
    return list(islice(fitting, _ANCHORS))


def _train(
    student: LoadedModel,
    teacher: LoadedModel,
    forward_pass: ForwardPass,
    loss: CrossEntropy | Divergence,
    rows: Sequence[Example],
    settings: TrialSettings,
) -> None:
    """Train the student for ``STEPS`` steps, each on all rows; with a divergence, on its own samples."""
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, "adamw_torch", seed=settings.seed, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = settings.learning_rate
    completions = [row.completion_ids for row in rows]
    taught_by = teacher.model if isinstance(loss, Divergence) else None
    for step in range(STEPS):
        if taught_by is not None:
            seeds = [sample_seed(settings.seed, step, row.demonstration.row, 0) for row in rows]
            with settings.arithmetic():
                rollouts = sample(student, [row.student_ids for row in rows], settings.sampling, seeds)
            completions = [rollout.ids for rollout in rollouts]
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            task_loss(
                student.model, taught_by, forward_pass, loss, rows[part], completions[part], settings.arithmetic
            ).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def task_loss(
    model: Any,
    teacher: Any,
    forward_pass: ForwardPass,
    loss: CrossEntropy | Divergence,
    rows: Sequence[Example],
    completions: Sequence[list[int]],
    arithmetic: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """The loss summed over the completions' tokens; with a divergence, from a teacher that sees the rows' context."""
    taught = None
    if teacher is not None:
        with torch.no_grad(), arithmetic():  # its own autocast context: older torch caches casts that have no gradient
            taught = forward_pass(teacher, [row.teacher_ids or [] for row in rows], completions)
    with arithmetic():
        student = forward_pass(model, [row.student_ids for row in rows], completions)
        return summed_loss(loss, student, completions, taught)[0]
