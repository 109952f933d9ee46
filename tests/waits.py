"""Counts where a program would wait for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts operations whose result must be read before the next can begin: on a GPU, each waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))
