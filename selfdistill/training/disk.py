"""The disk space that a run needs."""

from __future__ import annotations

from pathlib import Path

from selfdistill.errors import UserError
from selfdistill.model import stored_bytes
from selfdistill.runtime import free_bytes, unfinished
from selfdistill.training.checkpoint import (
    AT_LEAST,
    checkpoint_bytes,
    list_checkpoints,
    saved_position,
    trained_parameters,
)
from selfdistill.training.collapse import COLLAPSE_WINDOW
from selfdistill.training.memory_result import size_text
from selfdistill.training.trainer import Trainer


def check_disk(trainer: Trainer, output_dir: Path, checkpoint: Path | None) -> list[str]:
    """Check that there is enough disk space for what a run still writes; returns lines that describe all of it.

    The bytes of earlier checkpoints count as free: later ones replace them.

    Args:
        trainer: the run.
        output_dir: its folder, which may not exist yet.
        checkpoint: from which it resumes, if it does.

    Raises:
        UserError: there is not enough; names both sizes.
    """
    config, model = trainer.config, trainer.loaded.model
    adapter = hasattr(model, "peft_config") and not trainer.loaded.merged_adapter
    weights = trained_parameters(model).values() if adapter else model.parameters()
    final = sum(weight.nbytes for weight in weights)  # of whole tensors, also if they are sharded
    one = checkpoint_bytes(model, config.optim, trainer.teacher)
    kept = max(AT_LEAST, config.save_total_limit) + 1 if config.save_steps else 0
    if config.stop_on_collapse:
        kept += COLLAPSE_WINDOW // config.eval_steps + 2
    is_done = checkpoint is not None and saved_position(checkpoint).step >= (config.max_steps or 0)
    left = 0 if is_done or not kept else max(one, kept * one - _held(output_dir))
    free, needed = free_bytes(output_dir), final + left
    if free < needed:
        what, advice = "the final model needs", "free some space"
        if left:
            lower = "lower save_total_limit, " if config.save_total_limit > AT_LEAST else ""
            what = "checkpoints and the final model need"
            advice += f", {lower}or use save_steps 0 to save only the final model"
        raise UserError(f"{output_dir}: {size_text(free)} free, {what} about {size_text(needed)}; {advice}")
    return (
        [f"disk space: {kept - 1} checkpoints of {size_text(one)}, the final model {size_text(final)}"] if kept else []
    )


def check_disk_for_merged(base: str, adapter_base: str | None, folder: Path) -> None:
    """Check that ``folder`` has space for ``base`` with an adapter merged into it, as large as the base is stored.

    Raises:
        UserError: there is not enough; names both sizes.
    """
    free, needed = free_bytes(folder), stored_bytes(base, adapter_base)
    if free < needed:
        raise UserError(
            f"{folder}: {size_text(free)} free, the merged model needs about {size_text(needed)}; free some space"
        )


def _held(output_dir: Path) -> int:
    """Bytes of the checkpoints in a folder, and of what a killed process left there."""
    folders = (path for path in (*list_checkpoints(output_dir), *unfinished(output_dir)) if not path.is_symlink())
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*"))
