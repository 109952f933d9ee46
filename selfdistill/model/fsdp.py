"""Shard weights, gradients, optimizer and teacher across ranks (FSDP2).

A sharded weight is a ``DTensor``. Layers all-gather it for a pass and reshard it afterwards, a collective operation:
all ranks must run the same passes. Where they do not, as in sampling, the weights are :func:`unsharded` meanwhile.

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

from selfdistill.runtime import barrier, is_rank0


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    device: torch.device,
    read: Callable[[nn.Module], object],
    dtype: torch.dtype | None,
) -> None:
    """Shard the model's weights on ``device``: each layer separately, and the rest together.

    Args:
        model: the model; changed in place.
        layers: its layers, each of which becomes a unit.
        device: where the shards are.
        read: runs a forward pass, from which PyTorch learns how the modules belong together.
        dtype: data type of the all-gathered layers, for passes under autocast to it. Otherwise these would hold casts
            of all weights in addition to the shards. Gradients are reduced in float32. Default: the weights' own.

    Raises:
        AssertionError, TypeError, ValueError: PyTorch cannot shard this model.
    """
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
    """Whether the model is sharded, even if its weights are gathered at the moment."""
    return isinstance(model, FSDPModule)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """Gather all weights of the models, so that each rank can run its own passes, without gradients."""
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
    """Gather the weights outside the layers, so that body and head can be used separately."""
    units = [model for model in models if isinstance(model, FSDPModule)]
    try:
        for unit in units:
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.reshard()
            if hasattr(unit, "reset_iter_state") and not any(p.requires_grad for p in unit.parameters()):
                # The recorded order of passes, which a backward pass would reset. Older PyTorch keeps it, unused.
                unit.reset_iter_state()


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, sharing memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full tensors on rank 0, the only one that writes; shared tensors stay shared. All ranks must call this.

    Gathers one tensor at a time and moves it to the CPU, so that no device has to hold them all. Ranks begin together:
    rank 0 may still be writing what it gathered before, for longer than a GPU waits.
    """
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        barrier()
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
    """Move a full tensor to the device of ``other``, and shard it like ``other``."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor
