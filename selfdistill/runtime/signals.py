"""Signals that stop a run."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from selfdistill.runtime.console import say_at_once

_STOPPING = "stopping at the end of the step, batch or measurement; another Ctrl-C stops at once, without saving"


class StopRequests:
    """Context that records SIGINT, SIGTERM or SIGHUP in ``received`` for the loop to read.

    The first signal is answered with a line. A further SIGINT raises ``KeyboardInterrupt``. A further SIGTERM or SIGHUP
    does nothing: when a terminal is closed, its shell sends one and the kernel another. Nested contexts share a signal:
    one that the outer context received, such as between two runs, counts in the inner one, and the other way round on
    exit. Ignored signals stay ignored, such as the SIGHUP of a closed terminal under ``nohup``.
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
            outer = self._outer(number)
            self.received = self.received or (outer.received if outer else None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.received is not None and (outer := self._outer(self.received)) is not None:
            outer.received = self.received  # pass it on

    def _outer(self, number: int) -> StopRequests | None:
        """The context that handled a signal before this one."""
        outer = getattr(self._previous.get(number), "__self__", None)
        return outer if isinstance(outer, StopRequests) else None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            say_at_once(_STOPPING)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
