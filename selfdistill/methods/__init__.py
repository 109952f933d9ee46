"""Methods: each a composition of slots, run by the same loop.

The slots of a method define its training data and the teacher's context (examples), whose tokens are scored (sequence),
whose weights score them (teacher), the loss and its target, and the weights of the tokens. A method with several stages
defines them for each. The loop never depends on a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from selfdistill.config import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.cpt import cpt
from selfdistill.methods.dft import dft
from selfdistill.methods.grpo import grpo
from selfdistill.methods.offline_distillation import offline_distillation
from selfdistill.methods.sdft import sdft
from selfdistill.methods.sft import sft
from selfdistill.methods.sft_from_teacher import sft_from_teacher
from selfdistill.methods.sft_reinvoke import sft_reinvoke
from selfdistill.methods.slots import Method

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
"""Constructors by the value of ``--method``: from the settings to the stages, which share the steps evenly."""


def check_steps(steps: int, method: str, stages: Sequence[Method], setting: str = "max_steps") -> None:
    """Check that every stage gets at least one step.

    Raises:
        UserError: ``steps``, the value of ``setting``, is less than the number of stages.
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
"""Two values of each setting that affects a slot."""
_OF_TEACHERS = {"ema_rate": "ema", "snapshot_steps": "snapshot"}
"""Settings that apply to one kind of teacher."""


def uses(config: TrainConfig, name: str) -> bool:
    """Whether the method depends on this setting."""
    make = METHODS[config.method]
    if name in _OF_TEACHERS:
        return _OF_TEACHERS[name] in {stage.teacher for stage in make(config)}
    if name not in _TWO:
        return True
    try:
        one, other = (make(config.model_copy(update={name: value})) for value in _TWO[name])
    except UserError:  # the method reads it and rejects the combination
        return True
    return one != other


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings with non-default values that the method does not use."""
    fields = TrainConfig.model_fields
    given = [name for name in (*_TWO, *_OF_TEACHERS) if getattr(config, name) != fields[name].default]
    return [name for name in given if not uses(config, name)]
