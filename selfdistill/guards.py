"""Guards: signals that ask a run to stop, runs that fail, disk space, memory."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from selfdistill.errors import UserError


class RunStopped(UserError):
    """A run ended before its last step; what it had done is saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class RunFailed(UserError):
    """Training itself went wrong (not finite). Exit code 3."""

    exit_code = 3


class RunCollapsed(RunFailed):
    """A run fell apart and was stopped; ``final/`` has the model of the last measurement before."""


class StopRequests:
    """While active, SIGINT, SIGTERM and SIGHUP are noted in ``received`` for the loop; a second one acts at once.

    SIGHUP, which a terminal that is closed sends, only where it is not ignored (``nohup``).
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the caller's handlers stay
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        outer = getattr(self._previous.get(self.received or 0), "__self__", None)
        if isinstance(outer, StopRequests):  # it is to know, too
            outer.received = self.received

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number


def free_bytes(path: Path) -> int:
    """Free disk space where ``path`` is or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where it does not say."""
    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + own
    if device.type != "cpu":
        return None
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()).isdecimal():
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = int(held["inactive_file"]) + int(held["active_file"])  # given back when they are needed
        free = min(free, int(most) - int((group / "memory.current").read_text()) + files)
    return free


def check_memory(needed: int, device: torch.device) -> str:
    """Refuse to start what cannot fit into memory; returns a line for the start of a run.

    ``needed`` is what is surely still to come: gradients and the optimizer's moments. Activations come on top.

    Raises:
        UserError: with both sizes.
    """
    free = free_memory(device)
    sizes = f"{needed / 2**30:.2f} GiB for gradients and moments, and activations"
    if free is None:
        return f"memory to come: {sizes}"
    if free < needed:
        raise UserError(
            f"{free / 2**30:.1f} GiB of memory are free on {device}, training needs {sizes}, beside the weights that "
            "are loaded: free some, or train an adapter (--lora_rank 16)"
        )
    return f"memory to come: {sizes}; {free / 2**30:.1f} GiB are free"


def check_disk(path: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        UserError: with both sizes.
    """
    free = free_bytes(path)
    if free < needed:
        raise UserError(
            f"{path}: {free / 2**30:.1f} GiB free, checkpoints and final model need about {needed / 2**30:.1f} GiB; "
            "free some, or lower --save_total_limit, or --save_steps 0 for the final model only"
        )
