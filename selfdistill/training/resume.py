"""What a resumed run must have in common with the one that it continues."""

from __future__ import annotations

from pathlib import Path

from selfdistill.config import TrainConfig, changes, load_saved, refuse_changes
from selfdistill.errors import CannotResume, UserError, number_of
from selfdistill.model import LoadedModel
from selfdistill.training.checkpoint import Position, saved_position, settings_of
from selfdistill.training.setup import data_fingerprint, reward_fingerprint
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


def refuse_changed_rows(checkpoint: Path, trainer: Trainer) -> None:
    """Refuse to resume with different examples, before anything is drawn or evaluated.

    Samples that a method draws before the first step become examples, so there :func:`check_unchanged` compares later.

    Raises:
        CannotResume: names what changed.
    """
    if any(part.method.drawn for stage in trainer.stages for part in stage.parts):
        return
    data, rewards = data_fingerprint(trainer.stages, trainer.chat), reward_fingerprint(trainer.stages)
    found = Position(0, 0, data, rewards=rewards)
    _check_rows(checkpoint, settings_of(checkpoint), trainer.config, saved_position(checkpoint), found)


def _check_rows(
    checkpoint: Path, saved_config: TrainConfig, config: TrainConfig, saved: Position, position: Position
) -> None:
    """Refuse other examples, and other rows where rewards depend on them.

    Raises:
        CannotResume: names what changed.
    """
    if saved.data != position.data:
        before, now = ({name: getattr(one, name) for name in _OF_EXAMPLES} for one in (saved_config, config))
        moved = "; ".join(changes(before, now))
        rows = f"{moved}; if these are the same," if moved else f"rows of data {config.data!r}, anchors,"
        cause = f"{rows} template, tokenizer or limits differ, or an earlier version encoded them differently"
        raise CannotResume(f"{checkpoint}: the training examples have changed: {cause} (CHANGELOG.md); restore them")
    if "" not in (saved.rewards, position.rewards) and saved.rewards != position.rewards:
        what = "answers, scorers or privileged contexts of the training rows"
        raise CannotResume(f"{checkpoint}: {what} have changed; restore them")


def check_unchanged(
    trainer: Trainer, checkpoint: Path, saved_config: TrainConfig, saved: Position, position: Position
) -> None:
    """Refuse to resume with different examples, weights or evaluation data. File locations may differ.

    Raises:
        CannotResume: names what changed.
    """
    config = trainer.config
    _check_rows(checkpoint, saved_config, config, saved, position)
    if trainer.loaded.merged_adapter and config.model != saved_config.model:
        raise CannotResume(
            f"{checkpoint}: model was {saved_config.model!r} and is now {config.model!r}; with a merged adapter the "
            "weights cannot be compared, so use the original path"
        )
    if "" not in (saved.model, position.model) and saved.model != position.model:
        if trainer.loaded.adopted and saved.model.partition("+")[0] != position.model.partition("+")[0]:
            raise CannotResume(f"{checkpoint}: {_not_as_it_was(trainer.loaded, config.dtype)}")
        raise CannotResume(
            f"{checkpoint}: the initial weights of model {config.model!r} or of teacher_model have changed; "
            "restore them"
        )
    if "" not in (saved.test, position.test) and saved.test != position.test:
        raise CannotResume(
            f"{checkpoint}: the rows of test {config.test!r} or prior {config.prior!r} have changed; restore them"
        )


def _not_as_it_was(loaded: LoadedModel, dtype: str) -> str:
    """That a model which the caller has loaded is not the one of a run with this ``dtype``, and what to do."""
    another = f", in {dtype}" if dtype not in ("auto", loaded.dtype) else ""
    return (
        f"the loaded model is not the one that the run began with{another} (train changes a loaded model in place); "
        f"load it again{another}, or leave model and tokenizer out"
    )


def where(output_dir: Path, checkpoint: Path | None, position: Position, config: TrainConfig) -> str:
    """Describe where a run with ``resume`` starts."""
    if checkpoint is None:
        return f"note: no checkpoint to resume from in {output_dir}: starting from the first step"
    if position.step >= (config.max_steps or 0):
        return f"already finished after {number_of(position.step, 'step')}: raise max_steps to train further"
    resuming, planned = f"resuming after step {position.step}", settings_of(checkpoint).max_steps
    if planned == config.max_steps:
        return resuming
    change = f"max_steps was {planned} and is now {config.max_steps}"
    return f"{resuming}; {change}: the learning rate follows the new schedule from here on"
