"""Weights, gradients, optimizer and teacher cut into shards, one for each process (FSDP2).

A sharded weight is a ``DTensor``. Its layers gather it for a pass and let it go again, and each such pass is work that
all processes do together: all must do the same passes. Where they do not, as when each samples its own completions, the
weights are :func:`unsharded` for that time.

Source: PyTorch's ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from selfdistill.errors import UserError
from selfdistill.runtime import is_rank0


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    device: torch.device,
    read: Callable[[nn.Module], object],
    dtype: torch.dtype | None = None,
) -> None:
    """Cut the model's weights into shards, each layer on its own and what is left together, on ``device``.

    Args:
        read: does a pass through the model, at which PyTorch finds out which of its modules belong together.
        dtype: in which layers are gathered, for passes under autocast to it, which would hold casts of all weights
            beside the shards; gradients are added up in float32. Default: as they are.

    Raises:
        UserError: this PyTorch is too old.
        AssertionError, TypeError, ValueError: PyTorch cannot shard this model.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise UserError(f"setting 'fsdp' needs a newer PyTorch than {torch.__version__}")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        read(model)
    for unit in _units(model):
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are cut into shards, gathered at this moment or not."""
    return isinstance(model, FSDPModule)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """Every process has all weights of the models, so that it can do passes, without gradients, on its own."""
    apart = [model for model in models if any(isinstance(p, DTensor) for p in model.parameters())]
    units = [unit for model in apart for unit in _units(model)]
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


@contextmanager
def root_unsharded(models: Iterable[nn.Module]) -> Iterator[None]:
    """Every process has the weights outside of the layers, so that body and head can be used apart."""
    units = [model for model in models if isinstance(model, FSDPModule)]
    try:
        for unit in units:
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.reshard()
            if not any(p.requires_grad for p in unit.parameters()):
                unit.reset_iter_state()  # the order of passes, which a backward pass would forget


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of each tensor, for the first process, which alone writes; shared ones stay shared. All must call this.

    One after the other, and those that were sharded in the CPU's memory, so that no device has to hold them all.
    """
    found: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) in found:
            continue
        found[id(tensor)] = tensor
        if isinstance(tensor, DTensor):
            all_of_it = full_tensor(tensor.detach())
            found[id(tensor)] = all_of_it.cpu() if is_rank0() else all_of_it.new_empty(0)
    return {name: found[id(tensor)] for name, tensor in tensors.items()}


def distribute_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has all of, on the device of ``other`` and in shards where that is."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor
