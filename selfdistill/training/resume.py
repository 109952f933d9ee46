"""What a resumed run must have in common with the one that it continues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfdistill.config import TrainConfig, changes, load_saved, refuse_changes
from selfdistill.data import ContextEncoder, is_own
from selfdistill.errors import CannotResume, UserError, number_of
from selfdistill.methods import Method, rules_of
from selfdistill.model import LoadedModel
from selfdistill.training.checkpoint import Position, saved_position, settings_of
from selfdistill.training.setup import EncodedPart, data_fingerprint, sha256_of
from selfdistill.training.trainer import Trainer

_OF_EXAMPLES = ("model", "data", "anchors", "general_prompts")
"""Paths that may change on resume, and whose content the examples are made of."""


def refuse_changed_settings(output_dir: Path, checkpoint: Path, trainer: Trainer) -> None:
    """Refuse to resume with settings that differ from those of the folder or its checkpoint, or with too few steps.

    Raises:
        UserError: names the settings.
    """
    config, written, own = trainer.config, output_dir / "config.yaml", checkpoint / "config.yaml"
    saved, done = settings_of(checkpoint), saved_position(checkpoint).step
    assert config.max_steps is not None, "a trainer resolves its settings"
    if written.exists():
        refuse_changes(written, TrainConfig(**load_saved(written, TrainConfig)), config)
    refuse_changes(own, saved, config)
    if len(trainer.stages) > 1 and saved.max_steps != config.max_steps:
        raise UserError(
            f"setting 'max_steps': {saved.max_steps} in {own} and now {config.max_steps}; "
            f"{config.method} divides its steps among its stages, so keep max_steps"
        )
    if config.max_steps < done:
        raise CannotResume(
            f"setting 'max_steps': found {config.max_steps}, but {checkpoint} has already done {done} steps; "
            f"give {done} or more"
        )


def digests_of(trainer: Trainer) -> dict[str, str]:
    """Digests, by name, of what a run begins with; a resumed run compares those that both have.

    A model with a merged adapter has none of its weights.
    """
    asked = trainer.evaluator.questions.fingerprint() if trainer.evaluator else ""
    ends = sha256_of(sorted(trainer.loaded.end_token_ids))
    found = {**_of_rows(trainer), **trainer.digests, "ends": ends, "test": asked}
    return {name: digest for name, digest in found.items() if digest}


def _of_rows(trainer: Trainer) -> dict[str, str]:
    """Digests of the examples, of the words in which the teacher sees samples, and of columns that are read later."""
    parts = [part for stage in trainer.stages for part in stage.parts]
    return {
        "data": data_fingerprint(trainer.stages, trainer.chat),
        "parts": sha256_of([len(part.examples) for part in parts]),
        "shown": sha256_of(_shown_to_teachers(trainer, parts)),
        **{f"column {name!r}": sha256_of(values) for name, values in _read_later(parts).items()},
    }


def _shown_to_teachers(trainer: Trainer, parts: Sequence[EncodedPart]) -> list[list[int] | None]:
    """What the teacher sees of a sample of one token, for the first example of each part whose samples it is shown."""
    if is_own(trainer.config.method):  # its code may be mended
        return []
    encode = ContextEncoder(trainer.chat, None, trainer.config.longest_completion, None)
    return [
        part.method.select.longest(part.examples[0], 1, encode).teacher_ids
        for part in parts
        if part.method.select and part.examples
    ]


def _read_later(parts: Sequence[EncodedPart]) -> dict[str, list[Any]]:
    """The columns of the rows that checkers, selections and environments read during the run, by name."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        if part.method.checker or part.method.select or rules_of(part.method):
            rows += [example.demonstration.identity() for example in part.examples]
    names = sorted({name for row in rows for name in row})
    return {name: [row.get(name) for row in rows] for name in names}


def refuse_changed_rows(checkpoint: Path, trainer: Trainer) -> None:
    """Refuse to resume with different examples, before anything is drawn or evaluated.

    Samples that a method draws before the first step become examples, so there :func:`check_unchanged` compares later.

    Raises:
        CannotResume: names what changed.
    """
    if not any(part.method.drawn for stage in trainer.stages for part in stage.parts):
        _refuse_changes(checkpoint, trainer, _of_rows(trainer))


def check_unchanged(checkpoint: Path, trainer: Trainer, digests: dict[str, str]) -> None:
    """Refuse to resume with different examples, models or evaluation data. File locations may differ.

    Raises:
        CannotResume: names what changed.
    """
    before, now = settings_of(checkpoint).model, trainer.config.model
    if trainer.loaded.merged_adapter and now != before:
        raise CannotResume(
            f"{checkpoint}: model was {before!r} and is now {now!r}; with a merged adapter the "
            "weights cannot be compared, so use the original path"
        )
    _refuse_changes(checkpoint, trainer, digests)


def _refuse_changes(checkpoint: Path, trainer: Trainer, digests: dict[str, str]) -> None:
    """Refuse digests that differ from the checkpoint's of the same name, which one of an earlier version may lack.

    Raises:
        CannotResume: names what changed.
    """
    config, saved = trainer.config, saved_position(checkpoint).digests
    changed = [name for name, digest in digests.items() if saved.get(name, digest) != digest]
    if "model" in changed and trainer.loaded.adopted:
        raise CannotResume(f"{checkpoint}: {_not_as_it_was(trainer.loaded, config.dtype)}")
    if "data" in changed:
        then = settings_of(checkpoint)
        before, now = ({name: getattr(one, name) for name in _OF_EXAMPLES} for one in (then, config))
        moved = "; ".join(changes(before, now))
        rows = f"{moved}; if these are the same," if moved else f"rows of data {config.data!r}, anchors or other parts,"
        cause = f"{rows} template, tokenizer or limits differ, or an earlier version encoded them differently"
        raise CannotResume(f"{checkpoint}: the training examples have changed: {cause} (CHANGELOG.md); restore them")
    what = {
        "parts": "the number of examples in each source (data, anchors, other parts)",
        "column 'row'": "the places of the training rows among all rows",
        "shown": "the template that shows samples to the teacher",
        "model": f"the initial weights of model {config.model!r}",
        "config.json of model": f"config.json of model {config.model!r}",
        "teacher_model": f"the weights of teacher_model {config.teacher_model!r}",
        "config.json of teacher_model": f"config.json of teacher_model {config.teacher_model!r}",
        "ends": f"the end tokens of model {config.model!r}",
        "test": f"the rows of test {config.test!r} or prior {config.prior!r}",
    }
    if changed:
        named = ", ".join(what.get(name, f"{name} of the training rows") for name in changed)
        raise CannotResume(f"{checkpoint}: changed since the run began: {named}; restore them")


def _not_as_it_was(loaded: LoadedModel, dtype: str) -> str:
    """That a model which the caller has loaded is not the one of a run with this ``dtype``, and what to do."""
    another = f", in {dtype}" if dtype not in ("auto", loaded.dtype) else ""
    return (
        f"the loaded model is not the one that the run began with{another} (train changes a loaded model in place); "
        f"load it again{another}, or leave model and tokenizer out"
    )


def _spreads(method: Method, step: int, planned: int | None, steps: int | None) -> bool:
    """Whether a method's loss or controller follows the number of steps."""
    if method.loss_at is None or not planned or not steps:
        return method.controller is not None
    return method.controller is not None or method.loss_at(step, planned) != method.loss_at(step, steps)


def where(output_dir: Path, checkpoint: Path | None, position: Position, trainer: Trainer) -> str:
    """Describe where a run with ``resume`` starts."""
    config, methods = trainer.config, [part.method for stage in trainer.stages for part in stage.parts]
    if checkpoint is None:
        return f"note: no checkpoint to resume from in {output_dir}: starting from the first step"
    if position.step >= (config.max_steps or 0):
        return f"already finished after {number_of(position.step, 'step')}: raise max_steps to train further"
    resuming, planned = f"resuming after step {position.step}", settings_of(checkpoint).max_steps
    if planned == config.max_steps:
        return resuming
    change = f"max_steps was {planned} and is now {config.max_steps}"
    follows, step = "the learning rate follows", max(1, position.step)
    if any(_spreads(method, step, planned, config.max_steps) for method in methods):
        follows = "the learning rate, and what the method spreads over all steps, follow"
    return f"{resuming}; {change}: {follows} the new schedule from here on"
