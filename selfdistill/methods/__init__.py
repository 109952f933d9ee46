"""Methods: each a composition of slots, run by the same loop.

A method answers the loop's questions: what is learnt from and what is the teacher shown (rows), whose tokens are scored
(sequence), whose weights score them (teacher), how the gap is measured (loss, and the target within it), and which
tokens count (weights). One that has several stages answers them for each. The loop never asks for a method's name.

A method is a file of its name here that has a function of its name, from the settings to the stages, and its name in
``selfdistill.config.train.MethodName``. It uses the settings that it reads; settings that only it knows come in
``method_settings``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, get_args

from selfdistill.config import MethodName, MethodSettings, TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.examples import DemonstrationExamples
from selfdistill.methods.sequences import Completion, DatasetCompletions
from selfdistill.methods.slots import Method

__all__ = [
    "METHODS",
    "Completion",
    "DatasetCompletions",
    "DemonstrationExamples",
    "Method",
    "check_steps",
    "stages_of",
    "unused_settings",
    "uses",
]

METHODS: dict[str, Callable[[TrainConfig], tuple[Method, ...]]] = {
    name: getattr(import_module(f"selfdistill.methods.{name}"), name) for name in get_args(MethodName)
}
"""By the name that ``--method`` takes: from the settings to the stages, which share the steps evenly."""


def stages_of(config: TrainConfig) -> tuple[Method, ...]:
    """The stages of the method that the settings name.

    Raises:
        UserError: settings that the method refuses, or ``method_settings`` of a method that has none.
    """
    read = _Read(config)
    METHODS[config.method](read)  # type: ignore[arg-type]
    if config.method_settings and "method_settings" not in read.names:
        raise UserError(
            f"setting 'method_settings': found {', '.join(config.method_settings)}, but method {config.method!r} has "
            "no settings of its own; remove them"
        )
    return METHODS[config.method](config)


def check_steps(steps: int, method: str, stages: Sequence[Method], setting: str = "max_steps") -> None:
    """That every stage gets a step.

    Raises:
        UserError: there are fewer steps, by that ``setting``, than stages.
    """
    if steps < len(stages):
        raise UserError(
            f"setting {setting!r}: found {steps}, expected at least {len(stages)}, one per stage of {method}"
        )


class _Read:
    """Settings that note the names of those that are read."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._config, name)


def uses(config: TrainConfig, name: str) -> bool:
    """Whether the method of these settings reads the setting ``name``; True for settings that are not a method's."""
    if name not in MethodSettings.model_fields:
        return True
    read = _Read(config)
    try:
        METHODS[config.method](read)  # type: ignore[arg-type]
    except UserError:  # it is read, and refused beside the other settings
        return True
    return name in read.names


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings that were given though the method does not use them."""
    fields = TrainConfig.model_fields
    given = [
        name
        for name in MethodSettings.model_fields
        if getattr(config, name) != fields[name].get_default(call_default_factory=True)
    ]
    return [name for name in given if not uses(config, name)]
