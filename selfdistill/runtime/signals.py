"""Signals that stop a run."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequests:
    """Context that records SIGINT, SIGTERM and SIGHUP in ``received`` for the loop; a second signal acts at once.

    Ignored signals stay ignored, such as the SIGHUP of a closed terminal under ``nohup``.
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
        if isinstance(outer, StopRequests):  # pass it on
            outer.received = self.received

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
