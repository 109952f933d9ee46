"""Methods: each a composition of slots, run by the same loop.

A method answers the loop's questions: what is learnt from and what is the teacher shown (rows), whose tokens are scored
(sequence), whose weights score them (teacher), how the gap is measured (loss, and the target within it), and which
tokens count (weights). One that has several stages answers them for each. The loop never asks for a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from selfdistill.config import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.cpt import cpt
from selfdistill.methods.dft import dft
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.grpo import grpo
from selfdistill.methods.offline_distillation import offline_distillation
from selfdistill.methods.sdft import sdft
from selfdistill.methods.sequences import Completion, DatasetCompletions
from selfdistill.methods.sft import sft
from selfdistill.methods.sft_from_teacher import sft_from_teacher
from selfdistill.methods.sft_reinvoke import sft_reinvoke
from selfdistill.methods.slots import Method

__all__ = [
    "METHODS",
    "Completion",
    "DatasetCompletions",
    "DemonstrationExamples",
    "Method",
    "check_steps",
    "unused_settings",
    "uses",
]

METHODS: dict[str, Callable[[TrainConfig], tuple[Method, ...]]] = {
    "sdft": sdft,
    "sft": sft,
    "dft": dft,
    "cpt": cpt,
    "sft_reinvoke": sft_reinvoke,
    "sft_from_teacher": sft_from_teacher,
    "offline_distillation": offline_distillation,
    "grpo": grpo,
}
"""By the name that ``--method`` takes: from the settings to the stages, which share the steps evenly."""


def check_steps(steps: int, method: str, stages: Sequence[Method], setting: str = "max_steps") -> None:
    """That every stage gets a step.

    Raises:
        UserError: there are fewer steps, by that ``setting``, than stages.
    """
    if steps < len(stages):
        raise UserError(
            f"setting {setting!r}: found {steps}, expected at least {len(stages)}, one per stage of {method}"
        )


_TWO: dict[str, tuple[Any, Any]] = {
    "context": ("turns", "example"),
    "temperature": (0.5, 1.0),
    "top_p": (0.5, 1.0),
    "top_k": (0, 1),
    "num_generations": (2, 3),
    "cold_start_steps": (0, 1),
    "teacher": ("frozen", "live"),
    "divergence": ("forward_kl", "reverse_kl"),
    "jsd_weight": (0.3, 0.6),
    "support": ("full", "top_k"),
    "support_top_k": (1, 2),
    "support_tail": ("bucket", "renormalise"),
    "sampled_baseline": (True, False),
    "target_teacher": (1.0, 2.0),
    "target_student": (0.0, 1.0),
    "target_base": (0.0, 1.0),
    "skip_first_tokens": (0, 1),
    "importance_cap": (None, 1.0),
    "general_prompts": (None, "file"),
}
"""Two values of each setting that fills a slot."""
_OF_TEACHERS = {"ema_rate": "ema", "snapshot_steps": "snapshot"}
"""Settings of one kind of teacher."""


def uses(config: TrainConfig, name: str) -> bool:
    """Whether another value of a setting would make another method of these settings."""
    make = METHODS[config.method]
    if name in _OF_TEACHERS:
        return _OF_TEACHERS[name] in {stage.teacher for stage in make(config)}
    if name not in _TWO:
        return True
    try:
        one, other = (make(config.model_copy(update={name: value})) for value in _TWO[name])
    except UserError:  # it is looked at, and refused beside the other settings
        return True
    return one != other


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings that were given though the method does not use them."""
    fields = TrainConfig.model_fields
    given = [name for name in (*_TWO, *_OF_TEACHERS) if getattr(config, name) != fields[name].default]
    return [name for name in given if not uses(config, name)]
