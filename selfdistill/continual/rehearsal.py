"""Rehearsal: the state keeps each skill's prompts, and later additions use them as anchors.

A skill's prompts are in its ``prompts.jsonl``. An addition pools those of all earlier skills into one more source of
anchors, ``memory.jsonl``. The target on anchors is the model before the addition, so no answers are needed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfdistill.config import LearnConfig, TrainConfig
from selfdistill.continual.ledger import Skill, settings_of
from selfdistill.data import Demonstration, load_demonstrations, load_prompts, turns_of, write_demonstrations
from selfdistill.errors import UserError
from selfdistill.methods import anchors, begun, limits_of, stages_of
from selfdistill.runtime import read_lines
from selfdistill.training import check_parts, chosen_rows

PROMPTS, MEMORY = "prompts.jsonl", "memory.jsonl"


def to_remember(config: LearnConfig, rows: Sequence[Demonstration]) -> list[Demonstration]:
    """The distinct prompts of ``rows`` that the state keeps: all, none, or a random sample drawn with the seed.

    ``rows`` are those of :func:`as_shown`. An episode has a prompt for each reply: the conversation before it.
    """
    prompts = [
        Demonstration(x.prompt, tools=x.tools, chat_template_kwargs=x.chat_template_kwargs, images=x.images)
        for x in _turns(rows)
    ]
    found = list({_key(prompt): prompt for prompt in prompts}.values())
    count = {"all": len(found), "none": 0}.get(str(config.remember), config.remember)
    assert isinstance(count, int)
    chosen = sorted(random.Random(config.seed).sample(range(len(found)), min(count, len(found))))
    return [found[number] for number in chosen]


def keep_prompts(folder: Path, config: LearnConfig, rows: Sequence[Demonstration]) -> None:
    """Write the prompts of ``rows`` that the state keeps to the skill's ``folder``; see :func:`to_remember`."""
    if prompts := to_remember(config, rows):
        unfinished = folder / f".{PROMPTS}.unfinished"
        write_demonstrations(unfinished, prompts, copy_pictures=True)
        unfinished.replace(folder / PROMPTS)


def as_shown(config: LearnConfig, rows: Sequence[Demonstration]) -> Sequence[Demonstration]:
    """The rows with the prompts that the model sees: in an environment, with its tools and first messages."""
    return rows if config.environment == "none" else begun(config.environment, rows)


def remembered(folder: Path) -> list[Demonstration]:
    """The prompts kept of the skill in ``folder``; taken from its rows if an older release learnt it.

    Raises:
        UserError: their file is missing.
    """
    file, settings, rows = folder / PROMPTS, settings_of(folder), folder / "train.jsonl"
    if settings.remember == "none":
        return []
    if file.exists():
        return load_prompts(str(file))
    if "remember" in settings.model_fields_set:
        raise UserError(
            f"{file}: no such file; restore it, or write remember: none into settings.yaml in the same folder"
        )
    if not rows.exists():
        return []
    return to_remember(settings, as_shown(settings, chosen_rows(load_demonstrations(str(rows)), settings)))


def rehearsed(skills: Sequence[Skill], rows: Sequence[Demonstration]) -> tuple[list[Demonstration], int]:
    """The distinct prompts kept of ``skills``, except those that ``rows`` teach again, and the number of these.

    Messages about the prompts name their skill.
    """
    taught = {_key(row) for row in _turns(rows)}
    pooled = {
        _key(prompt): replace(prompt, source=f"skill {skill.name}, prompt {number}")
        for skill in skills
        for number, prompt in enumerate(remembered(skill.folder), start=1)
    }
    return [prompt for key, prompt in pooled.items() if key not in taught], len(pooled.keys() & taught)


def _turns(rows: Sequence[Demonstration]) -> list[Demonstration]:
    """The rows, with a turn for each reply of an episode."""
    return [turn for row in rows for turn in turns_of(row, "each")]


def rehearsed_and_asked(config: LearnConfig, memory: Sequence[Demonstration], test: Sequence[Demonstration]) -> int:
    """How many prompts of ``memory`` are also test questions: of an episode in the test, its last reply is asked."""
    replies = limits_of(config)["replies"]
    asked = {_key(turn) for row in as_shown(config, test) for turn in turns_of(row, replies)}
    return sum(_key(prompt) in asked for prompt in memory)


def longer_replies(config: LearnConfig, skills: Sequence[Skill]) -> tuple[str, int] | None:
    """Of skills learnt with a larger ``max_completion_length``, the name and limit of the one with the largest."""
    limits = {
        skill.name: settings.max_completion_length
        for skill in skills
        if (settings := settings_of(skill.folder)).remember != "none"
    }
    found = max(limits.items(), key=lambda item: item[1], default=None)
    return found if found and found[1] > config.max_completion_length else None


def _key(row: Demonstration) -> str:
    """What the model sees of a row."""
    return json.dumps([row.prompt, row.template_options])


def run_config(
    config: LearnConfig, model: str, context: str, folder: Path, *, rehearses: bool | None = None
) -> TrainConfig:
    """Training settings for a skill in ``folder``.

    Args:
        config: settings of the addition.
        model: the model before it.
        context: how the teacher sees the demonstration.
        folder: holds the skill's rows.
        rehearses: whether earlier skills' prompts are anchors, too; default: whether ``folder`` contains them.
    """
    memory = folder / MEMORY
    rehearses = memory.exists() if rehearses is None else rehearses
    anchors = (*config.anchors, *([str(memory)] if rehearses else []))
    names = TrainConfig.model_fields.keys() & LearnConfig.model_fields.keys()
    own = {
        "model": model,
        "data": str(folder / "train.jsonl"),
        "output_dir": str(folder / "run"),
        "context": context,
        "anchors": anchors,
        **{"test": None, "prior": None, "eval_steps": 0},  # evaluated by the addition
    }
    if not anchors:
        names -= {"anchor_share"}  # its default differs from TrainConfig's, so a note would call it unused
    return TrainConfig(**{name: getattr(config, name) for name in names} | own)


def check_batch(run: TrainConfig) -> None:
    """Check that the batch has room for the skill and all anchors.

    Raises:
        UserError: the batch is too small, or the method rejects the settings.
    """
    beside = _parts_beside(run)
    try:
        check_parts(run)
    except UserError as error:
        if not beside:
            raise
        *others, last = "the skill", *beside
        parts = f"{', '.join(others)} and {last}"
        raise UserError(f"{error}. The parts are {parts}; anchor_share 0 leaves anchors out") from None


def _parts_beside(run: TrainConfig) -> list[str]:
    """Names of the parts with samples of their own beside the skill."""
    _, *others = stages_of(run)[0]
    return [part.name for part in others if not part.same_samples]


def cost_of(run: TrainConfig, own: int) -> dict[str, Any]:
    """The cost of a run.

    Args:
        run: settings of a finished run.
        own: number of its anchor sources that are the addition's own; the others are prompts of earlier skills.

    Returns:
        ``steps``, ``seconds`` of these steps, and for ``anchors`` (the addition's own) and ``memory`` (earlier skills'
        prompts) the ``share`` of all examples and the ``estimated_seconds``, None if an older release did not write
        them: ``time/of/PART_s`` of :data:`selfdistill.runtime.tracking.METRICS`.
    """
    lines = read_lines(Path(run.output_dir) / "metrics.jsonl")
    names = [part.name for part in anchors(run)]
    costs = [_step_cost(line, {"anchors": names[:own], "memory": names[own:]}) for line in lines]
    return total(costs)


def _step_cost(line: dict[str, Any], parts: dict[str, list[str]]) -> dict[str, Any]:
    costs = {}
    for what, names in parts.items():
        own = [name for name in names if f"share/{name}" in line]  # a step may have no examples of a part
        seconds = [line.get(f"time/of/{name}_s") for name in own]
        costs[what] = {"share": sum(line[f"share/{name}"] for name in own), "estimated_seconds": sum_if_known(seconds)}
    return {"steps": 1, "seconds": line["time/step_s"], **costs}


def sum_if_known(values: Sequence[float | None]) -> float | None:
    """The sum; None if a value is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def total(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The total cost of several runs or steps; see :func:`cost_of`."""
    steps = sum(cost["steps"] for cost in costs)

    def of(what: str) -> dict[str, float | None]:
        shares = sum(cost[what]["share"] * cost["steps"] for cost in costs)
        seconds = sum_if_known([cost[what].get("estimated_seconds") for cost in costs])  # older chunks have none
        return {"share": shares / max(1, steps), "estimated_seconds": seconds}

    seconds = sum(cost["seconds"] for cost in costs)
    return {"steps": steps, "seconds": seconds, "anchors": of("anchors"), "memory": of("memory")}
