"""Checkpoints: everything a run needs to resume and reach the same weights, written atomically.

``checkpoint-00000100/`` holds ``weights.safetensors`` (trained weights), ``optimizer.safetensors``,
``teacher.safetensors`` (the float32 average), ``state.json`` (position, and what a controller remembers),
``config.yaml`` (the run's settings) and ``manifest.json`` (sizes and SHA-256 of the others, written last). Data order
and sampling follow from the seed and the step, so only the position needs to be saved for them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfdistill.config import TrainConfig, load_saved
from selfdistill.errors import RESUME, CannotResume, UserError
from selfdistill.model import Optim, Teacher, distribute_like, full_tensors, moment_bytes
from selfdistill.runtime import (
    agreed,
    corruption,
    fsync,
    is_rank0,
    remove_folder,
    say,
    say_note,
    unlisted_files,
    write_manifest,
)

PREFIX = "checkpoint-"
AT_LEAST = 2
"""Minimum number of checkpoints to keep."""


@dataclass(frozen=True)
class Position:
    """Progress of a run, and fingerprints of what it began with."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """The metric ``tokens``."""
    skipped: int = 0
    """Consecutive steps, up to this one, skipped because of a non-finite loss or gradient."""
    engine: str = ""
    """Name of the engine that samples; empty without one."""
    control: dict[str, Any] = field(default_factory=dict)
    """State of the method's controller; empty without one."""
    digests: dict[str, str] = field(default_factory=dict)
    """What the run began with, by name; see :func:`selfdistill.training.resume.digests_of`."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by name; tied weights once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint_bytes(model: nn.Module, optim: Optim, teacher: Teacher | None) -> int:
    """Size of a checkpoint in bytes: trained weights, AdamW's moments of them, and the teacher's average."""
    parameters = list(trained_parameters(model).values())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    average = sum(t.numel() * t.element_size() for t in teacher.state_dict().values()) if teacher else 0
    return weights + moment_bytes(parameters, optim) + average


def save_checkpoint(
    output_dir: Path,
    position: Position,
    settings: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher | None,
    *,
    keep: int,
    spared: Sequence[int] = (),
) -> Path:
    """Write a checkpoint, then remove all others except the newest ``keep`` and those of the steps ``spared``.

    All ranks call this; rank 0 writes. The files are written to a hidden folder, flushed to disk and renamed: a crash
    at any moment leaves earlier checkpoints intact. ``settings`` is the run's ``config.yaml``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    target = checkpoint_at(output_dir, position.step)
    temporary = output_dir / f".{target.name}.unfinished"
    parameters = trained_parameters(model)
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            moments[f"{key}:{name}"] = value
    parts: dict[str, dict[str, Tensor]] = {
        "weights": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": moments,
        "teacher": teacher.state_dict() if teacher else {},
    }
    if not is_rank0():
        for tensors in parts.values():
            full_tensors(tensors)
        return target
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for part, tensors in parts.items():
            whole = {name: tensor.contiguous() for name, tensor in full_tensors(tensors).items()}
            save_file(whole, temporary / f"{part}.safetensors")
        (temporary / "state.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
        (temporary / "config.yaml").write_text(settings, encoding="utf-8")
        write_manifest(temporary)
        remove_folder(target)
        os.replace(temporary, target)
        fsync(output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{target}: cannot write the checkpoint ({error}); earlier checkpoints are intact. "
            f"Free disk space, then {RESUME}"
        ) from None
    stay = {checkpoint_at(output_dir, step) for step in spared}
    for old in [path for path in list_checkpoints(output_dir) if path.name <= target.name][: -max(AT_LEAST, keep)]:
        if old not in stay:
            remove_checkpoint(old)
    return target


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint that is no longer needed; one that cannot be removed is noted."""
    try:
        remove_folder(checkpoint)
    except OSError as error:
        say_note(f"cannot remove the old checkpoint {checkpoint.name} ({error}); remove it by hand", "old checkpoints")


def checkpoint_at(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after a step, whether or not it exists."""
    return output_dir / f"{PREFIX}{step:08d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(output_dir.glob(f"{PREFIX}[0-9]*"))


def newest_whole(output_dir: Path) -> Path | None:
    """The newest intact checkpoint; None if there are no checkpoints.

    Prints a note about each corrupt checkpoint, and about files in the result that do not belong to it.

    Raises:
        CannotResume: all checkpoints are corrupt.
    """
    found = []
    for path in reversed(list_checkpoints(output_dir)):
        wrong = corruption(path)
        if wrong is None:
            if others := unlisted_files(path):
                say(f"note: {path}: ignoring files that are not part of the checkpoint: {', '.join(others)}")
            return path
        say(f"note: skipping the corrupt checkpoint {path} ({wrong})")
        found.append(f"{path.name} ({wrong})")
    if found:
        raise CannotResume(f"{output_dir}: no checkpoint is intact: {', '.join(found)}; restore one")
    return None


def saved_position(checkpoint: Path) -> Position:
    """Where a run stood when it wrote a checkpoint.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return Position(**{"digests": _former_digests(state)} | state)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint}: cannot read the checkpoint ({error})") from None


def _former_digests(state: dict[str, Any]) -> dict[str, str]:
    """Takes from a state the digests that were fields of it in earlier versions.

    Teachers' weights followed the model's; ``rewards`` is no longer compared.
    """
    data, model, test, _ = (state.pop(name, "") for name in ("data", "model", "test", "rewards"))
    model, _, teacher = model.partition("+")
    found = {"data": data, "model": model, "teacher_model": teacher.replace("+", ""), "test": test}
    return {name: digest for name, digest in found.items() if digest}


def settings_of(checkpoint: Path) -> TrainConfig:
    """The settings that a checkpoint was saved with."""
    return TrainConfig(**load_saved(checkpoint / "config.yaml", TrainConfig))


def load_weights(path: Path, model: nn.Module) -> None:
    """Restore the trained weights alone.

    Raises:
        UserError: the file cannot be read, or belongs to another model.
    """
    parameters = trained_parameters(model)
    (weights,) = _read(path, parameters, ("weights",))
    _restore(parameters, weights)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, teacher: Teacher | None
) -> Position:
    """Restore weights, optimizer and teacher.

    All ranks call this, and each reads the files. They meet before they share anything out.

    Returns:
        The saved position.

    Raises:
        UserError: a file cannot be read, or belongs to another model or other settings, on any rank.
    """
    parameters = trained_parameters(model)
    position, (weights, moments, average) = agreed(
        lambda: (saved_position(path), _read(path, parameters, ("weights", "optimizer", "teacher")))
    )
    _restore(parameters, weights)
    moments.pop("rng", None)  # earlier versions saved the state of the global generator
    state: dict[Tensor, dict[str, Any]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition(":")
        parameter = parameters[name]
        value = value.clone()  # the file's own memory would keep its blocks on the disk
        value = distribute_like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)
        state.setdefault(parameter, {})[kind] = value
    optimizer.state.update(state)
    if teacher is not None:
        try:
            teacher.load_state_dict(average)
        except ValueError as error:
            raise UserError(f"{path}: {error}; resume with the run's own teacher") from None
    return position


@torch.no_grad()
def _restore(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(distribute_like(weights[name], parameter))


def _read(path: Path, parameters: dict[str, nn.Parameter], names: Sequence[str]) -> list[dict[str, Tensor]]:
    """The tensors of a checkpoint's files of these names, the weights first."""
    try:
        parts = [load_file(path / f"{name}.safetensors") for name in names]
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the checkpoint ({error})") from None
    if {n: p.shape for n, p in parameters.items()} != {n: w.shape for n, w in parts[0].items()}:
        raise UserError(f"{path}: its weights do not match this model and adapter; resume with the run's own settings")
    return parts
