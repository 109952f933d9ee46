"""The stages of a planned run: their parts, with examples of a fake model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from selfdistill.config import TrainConfig
from selfdistill.data import ChatFormat, Demonstration
from selfdistill.errors import UserError
from selfdistill.evaluation import LAYOUTS
from selfdistill.methods import (
    LearnsOtherPrompts,
    Method,
    Part,
    SamplesOtherPrompts,
    encoder_of,
    rules_of,
    stages_of,
    uses,
    with_teachers_window,
)
from selfdistill.model import LoadedModel
from selfdistill.training.traced_step import PlannedPart

_PICTURE = 1000
"""A picture counts as this many characters: most models write a few hundred tokens for it."""


def planned_stages(
    config: TrainConfig, rows: Sequence[Demonstration], loaded: LoadedModel, count: int, *, least: bool = False
) -> list[list[PlannedPart]]:
    """The stages with the first rows, or with more if these are too long, or too few for a context.

    Args:
        config: settings of the run. The context ``auto`` becomes the longest one.
        rows: its rows.
        loaded: the model, of fake tensors.
        count: rows to begin with.
        least: with samples of one token instead of maximum length.

    Raises:
        UserError: no rows fit.
    """
    while True:
        try:
            return _stages_with(config, rows[:count], loaded, least)
        except UserError:
            if count >= len(rows):
                raise
        count *= 2


def _stages_with(
    config: TrainConfig, rows: Sequence[Demonstration], loaded: LoadedModel, least: bool
) -> list[list[PlannedPart]]:
    chat = loaded.chat_for(config)
    contexts = LAYOUTS if config.context == "auto" and uses(config, "context") else (config.context,)
    found: list[list[list[PlannedPart]]] = []
    problems: list[UserError] = []
    for context in contexts:
        own = config.model_copy(update={"context": context, "on_long_prompt": "drop"})
        try:
            planned = [[_planned(part, own, rows, loaded, chat, least) for part in x] for x in stages_of(own)]
            found.append(planned)
        except UserError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return max(found, key=lambda stages: longest_lengths(stages)[1])


def _planned(
    part: Part,
    config: TrainConfig,
    rows: Sequence[Demonstration],
    loaded: LoadedModel,
    chat: ChatFormat,
    least: bool,
) -> PlannedPart:
    method, loaded = part.method, with_teachers_window(loaded, part.method)
    rules = rules_of(method)
    longest = 1 if least else (rules.max_length if rules else config.max_completion_length)
    sampling = method.sequence.sampling or (method.drawn.sampling if method.drawn else None)
    if sampling is not None:
        sampling = replace(sampling, max_completion_length=longest)
    examples, _ = method.examples(rows, loaded, chat)
    encode = encoder_of(config, chat, loaded.window)
    if method.select is not None:
        examples = [method.select.longest(x, longest, encode) for x in examples]
    if isinstance(method.sequence, LearnsOtherPrompts):
        examples = [method.sequence.longest_example(x, encode) for x in examples]
    others: list[list[int]] = []
    if isinstance(method.sequence, SamplesOtherPrompts):
        others = [method.sequence.longest_prompt(x, encode) for x in examples]
    return PlannedPart(method, part.share, examples, sampling, part.same_samples, others)


def planned_methods(config: TrainConfig) -> list[Method]:
    """The methods of all parts of all stages."""
    named = config.model_copy(update={"context": LAYOUTS[0]}) if config.context == "auto" else config
    return [part.method for parts in stages_of(named) for part in parts]


def characters(row: Demonstration) -> int:
    """Approximate length of a row in characters, with a fixed number for each picture."""
    return len(json.dumps([*row.prompt, *row.episode])) + len(row.completion) + _PICTURE * len(row.images)


def longest_lengths(stages: list[list[PlannedPart]]) -> tuple[int, int]:
    """Tokens of the longest rows of student and teacher."""
    students, teachers = [0], [0]
    for part in (part for parts in stages for part in parts):
        for x in part.examples:
            length = len(part.completion(x))
            students.append(len(x.student_ids) + length)
            if part.method.teacher:
                teachers.append(len(x.teacher_ids or []) + length)
    return max(students), max(teachers)
