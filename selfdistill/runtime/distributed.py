"""Data-parallel training in several processes.

Every rank runs the same deterministic computation, so all stay in sync without communication. Only expensive work is
divided: :func:`rank_slice` gives each rank its part, and :func:`all_gather` and :func:`all_reduce_sum` combine the
results. Only rank 0 writes files.

Ranks meet through gloo, also on GPUs: gloo notices at once that another process has ended, and NCCL does not. Only
gradients and shards go through the group's own backend, right after a meeting. So they keep PyTorch's own time limit.

Without ``torch.distributed``, everything here behaves as in a single process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from selfdistill.errors import UserError

if TYPE_CHECKING:  # importing torch takes a second; a mistake on the command line should be reported at once
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

Item = TypeVar("Item")


class RaisedOnAllRanks(UserError):
    """A user error that every rank raises at the same point."""


TIMEOUT = timedelta(hours=6)
"""How long ranks wait for each other where one works alone, such as for a judge or a checkpoint. A rank that exits is
noticed at once."""


BUCKET_BYTES = 2**26
"""Maximum size of a bucket of gradients that are all-reduced together. One all-reduce per tensor would wait for the
network hundreds of times."""


def is_distributed() -> bool:
    """Whether this run has more than one process and the process group is initialised."""
    if world_size() == 1:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_world_size() -> int:
    """Number of processes that the launcher started on this machine; 1 if it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


@cache
def _meeting(_world: ProcessGroup) -> ProcessGroup:
    """The run's processes, as the group in which they wait for each other."""
    from torch import distributed

    group: ProcessGroup = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    return group


def is_rank0() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return world_size() == 1 or int(os.environ.get("RANK") or 0) == 0


def rank_slice(count: int) -> slice:
    """This rank's slice of ``count`` items: contiguous, in rank order, of nearly equal size."""
    if not is_distributed():
        return slice(0, count)
    from torch import distributed

    size = math.ceil(count / distributed.get_world_size())
    start = min(distributed.get_rank() * size, count)
    return slice(start, min(start + size, count))


def all_gather(own: Sequence[Item]) -> list[Item]:
    """Concatenate the parts of all ranks, in rank order."""
    if not is_distributed():
        return list(own)
    from torch import distributed

    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, list(own), _meeting(distributed.group.WORLD))
    return [item for part in parts for item in part]


def agreed(make: Callable[[], Item]) -> Item:
    """What this rank makes; a :class:`UserError` on any rank is raised on all, so that none waits for it."""
    if not is_distributed():
        return make()
    problem, own = None, []
    try:
        own = [make()]
    except UserError as error:
        problem = str(error)
    for found in filter(None, all_gather([problem])):
        raise RaisedOnAllRanks(found)
    return own[0]


def gathered(make: Callable[[], Sequence[Item]]) -> list[Item]:
    """Concatenate what each rank makes, in rank order; a :class:`UserError` on any rank is raised on all."""
    return all_gather(agreed(make))


def all_reduce_sum(values: dict[str, float]) -> dict[str, float]:
    """Sum each value over all ranks, in float64; a key missing on a rank counts as 0."""
    if not is_distributed():
        return values
    parts = all_gather([values])
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0.0) for part in parts) for key in keys}


def all_reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """All-reduce (sum) every gradient in place; a gradient missing on some ranks counts as 0 there.

    Small gradients are all-reduced together, in buckets of up to ``BUCKET_BYTES``.
    """
    if not is_distributed():
        return
    import torch
    from torch import distributed

    chosen = list(parameters)
    there = all_gather([[p.grad is not None for p in chosen]])
    gradients = []
    for parameter, *on_ranks in zip(chosen, *there, strict=True):
        if any(on_ranks):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in buckets(gradients, BUCKET_BYTES):
        if len(bucket) == 1:
            distributed.all_reduce(bucket[0])
            continue
        together = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(together)
        for gradient, summed in zip(bucket, together.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def buckets(tensors: Iterable[Tensor], most: int) -> list[list[Tensor]]:
    """Group adjacent tensors of one dtype and device into buckets of at most ``most`` bytes; larger ones are alone."""
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size, kind = tensor.numel() * tensor.element_size(), (tensor.dtype, tensor.device)
        if not groups or size > room or (groups[-1][0].dtype, groups[-1][0].device) != kind:
            groups.append([])
            room = most
        groups[-1].append(tensor)
        room -= size
    return groups


def broadcast_from_rank0(make: Callable[[], Item]) -> Item:
    """Call ``make`` on rank 0 and broadcast the result; a :class:`UserError` there is raised on every rank."""
    if not is_distributed():
        return make()
    from torch import distributed

    box: list[Any] = [None, None]
    if is_rank0():
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    distributed.broadcast_object_list(box, src=0, group=_meeting(distributed.group.WORLD))
    if box[1] is not None:
        raise RaisedOnAllRanks(box[1])
    result: Item = box[0]
    return result


def connect(device: torch.device) -> None:
    """Let the group's own backend connect the devices of all ranks now, not when they first sum gradients.

    NCCL then takes its memory on a GPU before a plan reads how much is free. It connects an algorithm at its first use,
    and chooses by size, so as much is sent as in a bucket of gradients. By reading NCCL's source, not run on a GPU.
    """
    if is_distributed():
        import torch
        from torch import distributed

        count = BUCKET_BYTES if device.type == "cuda" else 1
        distributed.all_reduce(torch.zeros(count, dtype=torch.uint8, device=device))


def leave() -> None:
    """End the group after the last meeting, or PyTorch warns at the end of a process that has used NCCL.

    All ranks call this, right after they have met.
    """
    if is_distributed():
        from torch import distributed

        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until all ranks reach this point."""
    if is_distributed():
        from torch import distributed

        distributed.barrier(_meeting(distributed.group.WORLD))
