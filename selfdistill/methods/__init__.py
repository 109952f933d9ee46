"""Methods: each a composition of slots, run by the same loop.

A method answers the loop's questions: what is learnt from and what is the teacher shown (rows), whose tokens are scored
(sequence), whose weights score them (teacher), how the gap is measured (loss, and the target within it), and which
tokens count (weights). One that has several stages answers them for each. The loop never asks for a method's name.
"""

from __future__ import annotations

from collections.abc import Callable

from selfdistill.config import TrainConfig
from selfdistill.methods.cpt import cpt
from selfdistill.methods.dft import dft
from selfdistill.methods.grpo import grpo
from selfdistill.methods.offline_distillation import offline_distillation
from selfdistill.methods.rows import DemonstrationRows
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
"""By the name that ``--method`` takes: from the settings to the stages, which share the steps evenly."""


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings about the teacher that were given though the method does not use them."""
    kinds = {stage.teacher for stage in METHODS[config.method](config)}
    own = config.teacher in kinds and config.teacher_model is None
    used = {"context": shows_context(config), "teacher": own}
    return [name for name in used if not used[name] and getattr(config, name) != TrainConfig.model_fields[name].default]


def shows_context(config: TrainConfig) -> bool:
    """Whether the method shows demonstrations to a teacher, so that it matters how."""
    rows = [stage.rows for stage in METHODS[config.method](config)]
    return any(isinstance(source, DemonstrationRows) and source.context is not None for source in rows)
