"""Guards: signals that ask a run to stop, runs that fail, disk space."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

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
    """While active, SIGINT and SIGTERM are noted in ``received`` for the loop to act on; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in (signal.SIGINT, signal.SIGTERM):
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
