"""Several processes that train one model.

Every process does the same on the same numbers, so that all stay equal without being told. What takes long is shared:
:func:`rank_slice` says which part is a process's own, and the others' parts are fetched with :func:`all_gather` and
:func:`all_reduce_sum`. What is written is written by the first process alone.

Without ``torch.distributed`` everything here is that of a single process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from selfdistill.errors import UserError

if TYPE_CHECKING:  # torch takes a second to import, and a command line that is wrong is to be told at once
    import torch
    from torch import Tensor

Item = TypeVar("Item")


class RaisedOnAllRanks(UserError):
    """A mistake that all processes are told at the same place."""


TIMEOUT = timedelta(hours=6)
"""How long a process waits for another that does something alone. One that ends is noticed at once."""


def is_distributed() -> bool:
    """Whether this run has more than one process, and they know of each other."""
    if world_size() == 1:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def world_size() -> int:
    """Processes that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_rank0() -> bool:
    """Whether this is the process that writes and speaks."""
    return world_size() == 1 or int(os.environ.get("RANK") or 0) == 0


def rank_slice(count: int) -> slice:
    """This process's part of ``count`` things: neighbours, parts of like size, in the order of the processes."""
    if not is_distributed():
        return slice(0, count)
    from torch import distributed

    size = math.ceil(count / distributed.get_world_size())
    start = min(distributed.get_rank() * size, count)
    return slice(start, min(start + size, count))


def all_gather(own: Sequence[Item]) -> list[Item]:
    """All processes' parts, joined in the order of the processes."""
    if not is_distributed():
        return list(own)
    from torch import distributed

    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, list(own))
    return [item for part in parts for item in part]


def all_reduce_sum(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, in float64; keys that a process lacks count as 0."""
    if not is_distributed():
        return values
    parts = all_gather([values])
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0.0) for part in parts) for key in keys}


def all_reduce_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the sum over the processes in place of every gradient; where a process has none, but another, it is 0."""
    if not is_distributed():
        return
    import torch
    from torch import distributed

    chosen = list(parameters)
    there = torch.tensor([p.grad is not None for p in chosen], dtype=torch.uint8, device=chosen[0].device)
    distributed.all_reduce(there, op=distributed.ReduceOp.MAX)
    for parameter, anywhere in zip(chosen, there.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    if not is_distributed():
        return value
    import torch
    from torch import distributed

    tensor = torch.tensor(value, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return int(tensor)


def broadcast_from_rank0(make: Callable[[], Item]) -> Item:
    """What the first process makes, for all; a mistake of the user's that it finds is raised in all."""
    if not is_distributed():
        return make()
    from torch import distributed

    box: list[Any] = [None, None]
    if is_rank0():
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise RaisedOnAllRanks(box[1])
    result: Item = box[0]
    return result


def barrier() -> None:
    """Go on when all processes have come here."""
    if is_distributed():
        from torch import distributed

        distributed.barrier()
