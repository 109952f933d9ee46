"""Predict spill: how a few real steps on the task change the model on unrelated prompts.

    gain = log p(demo) after - before;   moved = KL(before||after) on anchors

SFT and SDFT each take ``STEPS`` steps of AdamW on the same rows, from the same weights. Gain is measured on the
demonstrations for both, because their losses are not comparable.

One step is not enough. On the package's routing skill, the first step of SDFT moves the starter model further than the
first step of SFT does, but eight steps move it less far, as does the whole run.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfdistill.config import CheckConfig
from selfdistill.data import (
    PACKAGE,
    ChatFormat,
    Demonstration,
    Example,
    anchor_prompts,
    encode,
    is_packaged,
)
from selfdistill.errors import number_of
from selfdistill.evaluation.distances import Distance, mean_loss, summed_loss
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.model import (
    ForwardPass,
    LoadedModel,
    Sampling,
    add_lora,
    freeze_vision,
    make_optimizer,
    moment_bytes,
    rest_engine,
    sample,
    sample_seed,
    tensor_bytes,
    vision_weights,
)
from selfdistill.runtime import say_note

STEPS = 8
"""Steps of each method."""
_ANCHORS = 16
"""Prompts that are drawn to measure on."""
_TOKENS = 16
"""Maximum length of an answer to one, in tokens."""
ROWS = 8
"""Per forward pass."""


@dataclass(frozen=True)
class Trial:
    """The effect of a few steps of a method on the task."""

    gain: float
    """Rise of the demonstrations' log-probability under the student, nats per token."""
    moved: float
    """KL(before||after) along the model's own answers to anchors, nats per token."""


@dataclass(frozen=True)
class Spill:
    """Trials of SFT and of SDFT, from the same weights."""

    sft: Trial | None = None
    """None if no step was taken."""
    sdft: Trial | None = None
    """None as above."""
    untried: str | None = None
    """Why no step was taken; None if it was."""
    prompts: str | None = None
    """The anchors on which ``moved`` is measured; None if no step was taken."""

    def sentence(self) -> str:
        """The finding and the advice, without a full stop."""
        if self.sft is None or self.sdft is None:
            return f"not measured: {self.untried}"
        trials = "; ".join(
            f"{name} {trial.gain:+.2f} on the demonstrations, drift {trial.moved:.2f} on {self.prompts}"
            for name, trial in (("SFT", self.sft), ("SDFT", self.sdft))
        )
        advice = "To reduce it, train with anchors (package, or prompts of your own)"
        return f"after {STEPS} steps, in nats per token: {trials}. {advice}"


@dataclass(frozen=True)
class TrialSettings:
    """Settings of the trials' steps."""

    learning_rate: float
    sampling: Sampling
    """How SDFT's student samples."""
    seed: int
    lora_rank: int
    """Rank of the adapter that learns; 0: all weights learn."""
    arithmetic: Callable[[], AbstractContextManager[Any]]
    """Context with the precision of training; the distance is measured in the precision of the weights."""


Anchors = Mapping[str, Sequence[Demonstration]]
"""Prompts by source."""


def read_anchors(config: CheckConfig, loaded: Sequence[Demonstration] | None) -> Anchors:
    """The prompts on which ``spill`` and ``hints`` measure, by source; empty for episodes.

    Prints notes about those of the user.

    Args:
        config: settings.
        loaded: the prompts, if already loaded; else ``config.anchors`` are read.

    Raises:
        UserError: a source cannot be read or has bad rows.
    """
    if config.environment != "none":
        return {}
    if loaded is not None:
        return {"the given rows": loaded}
    return {source: anchor_prompts(source, say_note) for source in config.anchors}


def drawn_anchors(config: CheckConfig, anchors: Anchors, loaded: LoadedModel, chat: ChatFormat) -> list[Demonstration]:
    """Draw prompts to measure on, one of each source in turn.

    Args:
        config: settings.
        anchors: the prompts.
        loaded: the model.
        chat: encodes the prompts.

    Raises:
        UserError: prompts are too long and ``on_long_prompt`` is ``error``, or all of a source are.
    """
    drawn = []
    for source, prompts in anchors.items():
        is_own = not is_packaged(source)  # the user cannot shorten the package's
        examples, dropped = encode(
            prompts,
            None,
            chat,
            max_prompt_length=config.max_prompt_length if is_own else None,
            max_completion_length=max(_TOKENS, config.max_completion_length) if is_own else _TOKENS,
            window=loaded.window,
            on_long_prompt=config.on_long_prompt if is_own else "drop",
        )
        if dropped and is_own:
            say_note(f"dropped {dropped} of {number_of(len(prompts), 'prompt')} of {Path(source).name}: too long")
        fitting = {example.demonstration.row for example in examples}
        shuffled = random.Random(config.seed).sample(prompts, len(prompts))
        drawn.append([prompt for prompt in shuffled if prompt.row in fitting])
    in_turn = chain.from_iterable(zip_longest(*drawn))
    return list(islice((prompt for prompt in in_turn if prompt is not None), _ANCHORS))


def named_anchors(anchors: Anchors, count: int) -> str:
    """Drawn anchors in words."""
    if list(anchors) == [PACKAGE]:
        return "general prompts"
    return f"{number_of(count, 'prompt')} of {', '.join(Path(source).name for source in anchors)}"


class Trials:
    """Takes a few steps of a method, each time on a copy of the model, and measures their effect.

    Needs the memory of a training run in addition to the model's.

    Args:
        loaded: the model, which is also SDFT's teacher; it is not changed. Its weights are not float16.
        forward_pass: runs the model.
        anchors: prompts to measure on.
        chat: encodes them.
        settings: settings of the steps.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        forward_pass: ForwardPass,
        anchors: Sequence[Demonstration],
        chat: ChatFormat,
        settings: TrialSettings,
    ) -> None:
        self._loaded, self._forward_pass, self._settings = loaded, forward_pass, settings
        self._distance = Distance(loaded, forward_pass, chat, anchors, _TOKENS)

    def __call__(self, loss: CrossEntropy | Divergence, rows: Sequence[Example]) -> Trial:
        """The effect of SFT, or with a divergence of SDFT.

        Args:
            loss: of the steps.
            rows: rows of the task, each with a completion; for SDFT also with the teacher's prompt.
        """
        student = replace(self._loaded, model=copy.deepcopy(self._loaded.model))
        if self._settings.lora_rank:
            add_lora(student, self._settings.lora_rank, None, self._settings.seed)
        elif student.pictures is not None:
            freeze_vision(student.model)  # as in a run
        _train(student, self._loaded, self._forward_pass, loss, rows, self._settings)
        prompts, demos = [row.student_ids for row in rows], [row.completion_ids for row in rows]
        before, after = (mean_loss(model, prompts, demos) for model in (self._loaded, student))
        return Trial(before - after, self._distance.of(student.model))


def bytes_of_steps(loaded: LoadedModel, lora_rank: int) -> int:
    """The least that a trial needs in addition to the model: a copy, its gradients, and AdamW's moments.

    With LoRA only the copy counts.
    """
    weights = list(loaded.model.parameters())
    if lora_rank:
        return tensor_bytes(weights)
    frozen = set(map(id, vision_weights(loaded.model))) if loaded.pictures is not None else set()
    trained = [weight for weight in weights if weight.requires_grad and id(weight) not in frozen]
    return tensor_bytes(weights) + tensor_bytes(trained) + moment_bytes(trained, "adamw_torch")


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
            rest_engine()
            completions = [rollout.ids for rollout in rollouts]
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
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
