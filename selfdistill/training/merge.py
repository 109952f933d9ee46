"""Arithmetic of weights: add to one model what another has learnt (PaST, arXiv 2601.11258; task vectors, 2212.04089).

    theta = target + l (a - b)

a is a model that has learnt, b what it was before, and a - b its task vector. PaST adds what reinforcement learning
taught a model on a source task to one that SFT has taught the target task, both from the same base: a skill is carried
over without any training. A negative l takes a skill away.

Differences: the paper starts from such a sum and may train on; that is ``train --model`` with the result. One vector is
added at a time; the result can be the target of the next.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfdistill.config import MergeConfig
from selfdistill.errors import UserError
from selfdistill.model import StoredWeights, is_image_text, overwrite_tensor, stored_weights
from selfdistill.runtime import ProgressBar, say
from selfdistill.training.export import model_files, unused_folder, whole_folder
from selfdistill.training.model_card import sum_card

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class _Squares:
    """Sums of squares over the tensors so far."""

    target: float = 0.0
    vector: float = 0.0
    """l (a - b)"""
    lost: float = 0.0
    """What rounding to the target's type took from it."""

    def say(self, scale: float) -> None:
        """Say how large the vector with this scale is, and how much of it was lost."""
        if not self.vector:
            why = "the two models are equal" if scale else "the scale is 0"
            say(f"note: {why}, so the target is unchanged")
            return
        lost = (self.lost / self.vector) ** 0.5
        say(
            f"added a task vector of norm {self.vector**0.5:.4g}, {(self.vector / self.target) ** 0.5:.2%} of the "
            f"target's; rounding to its data type changed the vector by {lost:.1%}"
        )


def merge(config: MergeConfig) -> Path:
    """Write ``model`` + ``scale`` * (``add`` - ``subtract``) to ``output_dir``, and return that folder.

    The result is a full model with the target's files, tensor types and shards. It is computed in float32, one
    tensor at a time. The target, or either of the others, may be a LoRA adapter on its base.

    Raises:
        UserError: a model is not there or cannot be read, the three do not have the same tensors, or ``output_dir``
            is not empty or cannot be written.
    """
    output_dir = unused_folder(config.output_dir)
    target, learnt = stored_weights(config.model), stored_weights(config.add)
    if config.subtract is None and learnt.base is None:
        raise UserError(f"setting 'subtract': {config.add!r} is not an adapter, so give the model it was trained from")
    before = learnt.base if config.subtract is None else stored_weights(config.subtract)
    assert before is not None
    for other in (learnt, before):
        _check_same(target, other)
    squares = _Squares()
    with whole_folder(output_dir, "free disk space or choose another output_dir") as folder:
        _copy_files(target, folder)
        with ProgressBar("tensors", len(target.files)) as reporter:
            for number, name in enumerate(target.files):
                value = _changed(target, name, learnt, before, config.scale, squares)
                if value is not None:
                    overwrite_tensor(folder / target.files[name].name, name, value)
                reporter.advance(number + 1)
        card = sum_card(config.model, config.add, before.name, config.scale, pictures=is_image_text(folder))
        (folder / "README.md").write_text(card, encoding="utf-8")
    squares.say(config.scale)
    return output_dir


def _check_same(target: StoredWeights, other: StoredWeights) -> None:
    """Check that two models have the same tensors.

    Raises:
        UserError: they do not; the message names the first difference.
    """
    unlike = f"model {other.name!r} does not match {target.name!r}: "
    advice = "; all three must have the same architecture and size"
    for one, two, lacks in ((target, other, "it has no"), (other, target, "it has a further")):
        if left := sorted(one.shapes.keys() - two.shapes.keys()):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UserError(f"{unlike}{lacks} tensor {left[0]}{more}{advice}")
    for name, shape in target.shapes.items():
        if other.shapes[name] != shape:
            sizes = (" x ".join(map(str, size)) for size in (other.shapes[name], shape))
            raise UserError(f"{unlike}tensor {name} is {' in place of '.join(sizes)}{advice}")


def _changed(
    target: StoredWeights, name: str, learnt: StoredWeights, before: StoredWeights, scale: float, squares: _Squares
) -> Tensor | None:
    """The target's tensor with its part of the vector; None where it stays as it is stored.

    Raises:
        UserError: the models differ in a tensor that is quantised.
    """
    learnt_part, before_part = learnt.read(name), before.read(name)
    if not all(model.is_float(name) for model in (target, learnt, before)):
        if learnt.types[name] == before.types[name] and _same_bytes(learnt_part, before_part):
            return None
        raise UserError(
            f"model {learnt.name!r}: tensor {name} is quantised ({learnt.types[name]}) and differs from that of "
            f"{before.name!r}; such tensors cannot be added, so use the original models"
        )
    old, vector = target.read(name), scale * (learnt_part - before_part)
    squares.target += _square(old)
    if target.base is None and not vector.any():
        return None
    new = (old + vector).to(_DTYPES[target.types[name]])
    squares.vector += _square(vector)
    squares.lost += _square(new.float() - old - vector)
    return new


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _square(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2


def _copy_files(target: StoredWeights, folder: Path) -> None:
    """Copy the files of a full model: of an adapter, its base's, and its own tokenizer."""
    for source in filter(None, (target.base, target)):
        for file in model_files(source.folder):
            other_weights = file.suffix == ".safetensors" and source.folder / file not in target.files.values()
            if other_weights or file.name.startswith("adapter_config"):
                continue
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / file, folder / file)
