"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


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
