"""Foretell spill: what one small step on the task does to prompts that have nothing to do with it.

    d = -s sign(g);   gain = log p(demo) after - before;   moved = KL(before||after) on general prompts
    spill = moved / gain^2

g is the gradient of the method's loss on the rows. The sign makes d the first step of AdamW, which training uses. For
small s, gain grows with s and moved with s^2 (it is 1/2 d^T F d, with the Fisher information F on those prompts). So
spill does not depend on s: it is what would be moved where one nat is gained, if all steps were like the first. The
demonstrations are the yardstick of gain for every method, because the methods' own losses have no common unit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from selfdistill.data import ChatFormat, Demonstration, Example, anchor_prompts, encode_prompts
from selfdistill.errors import UserError
from selfdistill.evaluation.distances import Distance, mean_loss, summed_loss
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.model import ForwardPass, LoadedModel, refuse_half_precision

STEP = 1e-5
"""By how much the trial step moves every weight that has a gradient: as AdamW's first at the default learning rate."""
_ANCHORS, _TOKENS = 16, 16  # general prompts, and at most this long answers to them
_ROWS = 8  # per pass


@dataclass(frozen=True)
class TrialStep:
    """One small step of a method on the task."""

    gain: float
    """Rise of the demonstrations' log-probability under the student, nats per token."""
    moved: float
    """KL(before||after) along the model's own answers to general prompts, nats per token."""

    @property
    def spill(self) -> float | None:
        """Nats per token moved where one nat per token is gained, if all steps were like this; None without gain."""
        return self.moved / self.gain**2 if self.gain > 0 else None

    def __str__(self) -> str:
        learnt = (
            f"makes the demonstrations {self.gain:.2g} nats per token more likely"
            if self.gain > 0
            else "does not make the demonstrations more likely"
        )
        return f"{learnt} and moves general prompts by {self.moved:.2g}"


@dataclass(frozen=True)
class Spill:
    """A step of SFT and one of SDFT, from the same weights."""

    sft: TrialStep | None = None
    """None if no step was taken."""
    sdft: TrialStep | None = None
    """None as above."""
    untried: str | None = None
    """Why no step was taken; None if it was."""

    def sentence(self) -> str:
        """What was found, and what follows; without a full stop."""
        if self.sft is None or self.sdft is None:
            return f"not measured: {self.untried}"
        found = "; ".join(f"a small step of {name} {step}" for name, step in (("SFT", self.sft), ("SDFT", self.sdft)))
        return f"{found}. Against it: --anchors package"


def measure_spill(
    loaded: LoadedModel,
    forward_pass: ForwardPass,
    rows: Sequence[Example],
    sampled: Sequence[list[int]],
    chat: ChatFormat,
    seed: int,
    arithmetic: Callable[[], AbstractContextManager[Any]],
) -> Spill:
    """Take a step of SFT and one of SDFT; afterwards the weights are as before, to the bit.

    Needs the memory of a gradient; a copy of the weights lies in the CPU's memory meanwhile.

    Args:
        loaded: the model.
        forward_pass: runs it.
        rows: the task, with the teacher's prompts. Those without a completion are left out.
        sampled: the student's completion of each row.
        chat: encodes the general prompts, a sample of those that training offers as anchors.
        seed: of that sample.
        arithmetic: the precision of training, in which gradients are computed; all else is in that of the weights.
    """
    kept = [(row, ids) for row, ids in zip(rows, sampled, strict=True) if row.completion_ids]
    if not kept:
        return Spill(untried="no row has a completion, on which the gain is measured")
    try:
        refuse_half_precision(loaded.model, loaded.name)
    except UserError as error:
        return Spill(untried=str(error))
    rows, sampled = [row for row, _ in kept], [ids for _, ids in kept]
    prompts, demos = [row.student_ids for row in rows], [row.completion_ids for row in rows]
    distance = Distance(loaded, forward_pass, chat, _general_prompts(chat, loaded.window, seed), _TOKENS)
    before = mean_loss(loaded, prompts, demos)
    steps = []
    for loss, completions in ((CrossEntropy(), demos), (Divergence(), sampled)):
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            task_loss(loaded.model, forward_pass, loss, rows[part], completions[part], arithmetic).backward()
        with stepped(loaded.model):
            gain = before - mean_loss(loaded, prompts, demos)
            steps.append(TrialStep(gain, distance.of(loaded.model)))
    sft, sdft = steps
    return Spill(sft, sdft)


def _general_prompts(chat: ChatFormat, window: int | None, seed: int) -> list[Demonstration]:
    """A sample of those that the package offers as anchors and that fit the window."""
    prompts = anchor_prompts()
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    fitting = (row for row in shuffled if not window or len(encode_prompts([row], chat)[0]) + _TOKENS <= window)
    return list(islice(fitting, _ANCHORS))


def task_loss(
    model: Any,
    forward_pass: ForwardPass,
    loss: CrossEntropy | Divergence,
    rows: Sequence[Example],
    completions: Sequence[list[int]],
    arithmetic: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """A loss, summed over the completions' tokens; a divergence is from the model that is shown the rows' context."""
    teacher = None
    if isinstance(loss, Divergence):
        with torch.no_grad(), arithmetic():  # a context of its own: older releases of torch keep casts without gradient
            teacher = forward_pass(model, [row.teacher_ids or [] for row in rows], completions)
    with arithmetic():
        student = forward_pass(model, [row.student_ids for row in rows], completions)
        return summed_loss(loss, student, completions, teacher)[0]


@contextmanager
def stepped(model: nn.Module) -> Iterator[None]:
    """Move the weights against the sign of their gradients, drop these, and in the end put the weights back."""
    moving = [p for p in model.parameters() if p.grad is not None]
    kept = [p.detach().to("cpu", copy=True) for p in moving]
    try:
        with torch.no_grad():
            for parameter in moving:
                assert parameter.grad is not None
                parameter.sub_(parameter.grad.sign_(), alpha=STEP)
                parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in zip(moving, kept, strict=True):
                parameter.copy_(weights)
