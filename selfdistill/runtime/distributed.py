"""Several processes that train one model.

Every process does the same on the same numbers, so that all stay equal without being told. What takes long is shared:
:func:`share` says which part is a process's own, and the others' parts are fetched with :func:`gather` and
:func:`add_up`. What is written is written by the first process alone.

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


class EverywhereError(UserError):
    """A mistake that all processes are told at the same place."""


PATIENCE = timedelta(hours=6)
"""How long a process waits for another that does something alone. One that ends is noticed at once."""


def several() -> bool:
    """Whether this run has more than one process, and they know of each other."""
    if launched() == 1:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def launched() -> int:
    """Processes that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return launched() == 1 or int(os.environ.get("RANK") or 0) == 0


def share(count: int) -> slice:
    """This process's part of ``count`` things: neighbours, parts of like size, in the order of the processes."""
    if not several():
        return slice(0, count)
    from torch import distributed

    size = math.ceil(count / distributed.get_world_size())
    start = min(distributed.get_rank() * size, count)
    return slice(start, min(start + size, count))


def gather(own: Sequence[Item]) -> list[Item]:
    """All processes' parts, joined in the order of the processes."""
    if not several():
        return list(own)
    from torch import distributed

    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, list(own))
    return [item for part in parts for item in part]


def add_up(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, in float64; keys that a process lacks count as 0."""
    if not several():
        return values
    parts = gather([values])
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0.0) for part in parts) for key in keys}


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the sum over the processes in place of every gradient; where a process has none, but another, it is 0."""
    if not several():
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


def largest(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    if not several():
        return value
    import torch
    from torch import distributed

    tensor = torch.tensor(value, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return int(tensor)


def from_first(make: Callable[[], Item]) -> Item:
    """What the first process makes, for all; a mistake of the user's that it finds is raised in all."""
    if not several():
        return make()
    from torch import distributed

    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise EverywhereError(box[1])
    result: Item = box[0]
    return result


def wait() -> None:
    """Go on when all processes have come here."""
    if several():
        from torch import distributed

        distributed.barrier()
