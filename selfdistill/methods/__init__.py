"""Methods: each is a composition of slots, run by the same loop.

The slots of a method define its training data and the teacher's context (examples), whose tokens are scored (sequence),
whose weights score them (teacher), the loss and its target, the weights of the tokens, and which samples are learnt
(checker, select). A method with several stages defines them for each stage. A step may sum several methods, its parts.
The loop never depends on a method's name.

A method is a function that maps settings to stages, the package's in a file of the same name. Users name their own as
``python:module.function``. A method uses the settings that it reads. Its own settings come in ``method_settings``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

from selfdistill.config import UNTEMPERED, MethodName, MethodSettings, TrainConfig, without_defaults
from selfdistill.data import Demonstration, Lacks, is_own
from selfdistill.errors import UserError
from selfdistill.methods.anchors import anchors
from selfdistill.methods.checking import to_score, verdicts_on
from selfdistill.methods.encoders import encoder_of, with_teachers_window
from selfdistill.methods.episodes import EpisodeRules, episode_rules, play, rules_of, with_environment
from selfdistill.methods.examples import DemonstrationExamples, OtherRows, examples_of_prompts, repeated_prompts
from selfdistill.methods.hints import shows_parts
from selfdistill.methods.own import check_losses, own_errors, own_stages
from selfdistill.methods.samples_file import SamplesFile
from selfdistill.methods.sequences import (
    ColdStart,
    Completion,
    DatasetCompletions,
    LearnsOtherPrompts,
    SamplesOtherPrompts,
)
from selfdistill.methods.slots import (
    FROZEN,
    Checker,
    Controller,
    Method,
    Part,
    Parts,
    Selection,
    State,
    function_of,
    own_names,
    whose,
)
from selfdistill.methods.worlds import EpisodeRow, begun, limits_of, scorer_judges

__all__ = [
    "FROZEN",
    "METHODS",
    "Checker",
    "ColdStart",
    "Completion",
    "Controller",
    "DatasetCompletions",
    "DemonstrationExamples",
    "EpisodeRow",
    "EpisodeRules",
    "LearnsOtherPrompts",
    "Method",
    "OtherRows",
    "Part",
    "Parts",
    "SamplesFile",
    "SamplesOtherPrompts",
    "Selection",
    "State",
    "anchors",
    "begun",
    "check_losses",
    "check_steps",
    "encoder_of",
    "episode_rules",
    "examples_of_prompts",
    "lacks_of",
    "limits_of",
    "own_errors",
    "own_names",
    "play",
    "repeated_prompts",
    "rules_of",
    "scorer_judges",
    "shows_parts",
    "stages_of",
    "to_score",
    "unused_settings",
    "uses",
    "verdicts_on",
    "whose",
    "with_teachers_window",
]

METHODS: dict[str, Callable[[TrainConfig], tuple[Method, ...]]] = {
    name: function_of(name) for name in get_args(MethodName)
}
"""The package's methods by name: functions from settings to stages, which share the steps evenly."""


TASK = "task"
"""Name of the method's own part of a step."""


def stages_of(config: TrainConfig) -> tuple[Parts, ...]:
    """The stages of the method that the settings name, each with the parts of its steps.

    Raises:
        UserError: the method rejects the settings, or does not use a given ``method_settings`` or ``teacher_model``; or
            it is the user's and cannot be used.
    """
    if config.method_settings and "method_settings" not in _settings_read(config):
        first, *others = config.method_settings
        hint = "" if others else whose(first)
        raise UserError(
            f"setting 'method_settings': found {', '.join(config.method_settings)}, but method {config.method!r} has "
            f"no settings of its own{hint or '; remove them'}"
        )
    if config.teacher_model is not None and "teacher_model" not in _settings_read(config):
        raise UserError(
            f"setting 'teacher_model' is for methods with a choice of teacher, such as sdft, found {config.method!r}: "
            "leave it out"
        )
    anchored = anchors(config)
    stages = tuple(_parts(config, method, anchored) for method in with_environment(config, _made(config)))
    scored = any(part.method.checker for parts in stages for part in parts if not part.same_samples)
    if scored and not config.is_untempered:  # they are weighed as the student's own
        raise UserError(f"setting 'method': {config.method} needs {UNTEMPERED}")
    return stages


def _made(config: TrainConfig) -> tuple[Method, ...]:
    """What the function of the method makes of the settings.

    Raises:
        UserError: the method rejects the settings; or it is the user's and cannot be used.
    """
    if not is_own(config.method):
        return METHODS[config.method](config)
    return own_stages(config)


def _parts(config: TrainConfig, method: Method, anchored: Parts) -> Parts:
    """The task, the parts that learn from its samples, and those beside it.

    Raises:
        UserError: two have one name, or the shares leave nothing for the task.
    """
    beside = (*method.beside, *anchored)
    names = [TASK, *(name for name, _ in method.also), *(part.name for part in beside)]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"method {config.method!r}: found two parts named {twice[0]!r}; rename the method's")
    share = 1 - sum(part.share for part in beside)
    if share < 1e-9:  # rounded: .7, .2 and .1 sum to a little less than 1
        shares = ", ".join(f"{part.name} {part.share:g}" for part in beside)
        raise UserError(
            f"method {config.method!r}: found shares that leave nothing for the task ({shares}), expected a sum below "
            "1; lower them or anchor_share"
        )
    same = (Part(name, other, share, same_samples=True) for name, other in method.also)
    return (Part(TASK, method, share), *same, *beside)


def lacks_of(stages: Sequence[Parts]) -> Lacks:
    """What a row must have for all of the stages."""
    sources = [part.method.examples for parts in stages for part in parts]

    def lacks(demonstration: Demonstration) -> str | None:
        return next(filter(None, (source.lacks(demonstration) for source in sources)), None)

    return lacks


def check_steps(steps: int, method: str, stages: Sequence[object], setting: str = "max_steps") -> None:
    """Check that every stage gets at least one step.

    Raises:
        UserError: ``steps``, the value of ``setting``, is less than the number of stages.
    """
    if steps < len(stages):
        raise UserError(
            f"setting {setting!r}: found {steps}, expected at least {len(stages)}, one per stage of {method}"
        )


class _Read:
    """Settings that record which names are read, also from copies of them."""

    def __init__(self, config: TrainConfig, names: set[str] | None = None) -> None:
        self._config = config
        self.names: set[str] = set() if names is None else names

    def model_copy(self, **how: Any) -> _Read:
        return _Read(self._config.model_copy(**how), self.names)

    def model_dump(self, **how: Any) -> dict[str, Any]:
        self.names |= TrainConfig.model_fields.keys()
        return self._config.model_dump(**how)

    def __getattr__(self, name: str) -> Any:
        member = getattr(type(self._config), name, None)
        if isinstance(member, property) and member.fget is not None:  # it reads the settings that it copies
            return member.fget(self)
        self.names.add(name)
        return getattr(self._config, name)


def _settings_read(config: TrainConfig) -> set[str]:
    """Names of the settings that the method and its additional parts read.

    Raises:
        UserError: the method rejects the settings.
    """
    read: Any = _Read(config)
    with_environment(read, _made(read))
    anchors(read)
    return set(read.names)


_OF_METHODS = (*(name for name in MethodSettings.model_fields if name != "max_completion_length"), "teacher_model")
"""Settings that only some methods read. ``max_completion_length`` limits every run's prompts and evaluations."""


def _unread(config: TrainConfig) -> set[str]:
    """The settings of methods that the method does not read; none if it rejects what it reads."""
    try:
        return set(_OF_METHODS) - _settings_read(config)
    except UserError:
        return set()


def uses(config: TrainConfig, name: str) -> bool:
    """Whether the method reads the setting ``name``; True for settings that do not belong to methods."""
    return name not in _OF_METHODS or name not in _unread(config)


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings with non-default values that the method does not use."""
    given, unread = without_defaults(config), _unread(config)
    return [name for name in _OF_METHODS if name in given and name in unread]
