"""Many calls at once, none of which can keep the process: they run in threads that may be left behind."""

from __future__ import annotations

import faulthandler
import queue
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")

THREADS = 32
"""Maximum calls at the same time."""
STALL_SECONDS = 60.0
"""Seconds without any Python code running, after which the stacks of all threads are printed."""


def in_threads(function: Callable[..., Result], *columns: Sequence[Any]) -> list[Result]:
    """``list(map(function, *columns))``, in up to :data:`THREADS` threads.

    If a call raises, or on Ctrl-C, calls that have not begun do not begin, and those that run are left behind.

    C code may hold the interpreter's lock, so that neither a time limit nor Ctrl-C acts. Then Python's fault handler,
    which needs no lock, prints once where every thread is.
    """
    calls = [(Future[Result](), given) for given in zip(*columns, strict=True)]
    waiting: queue.SimpleQueue[tuple[Future[Result], tuple[Any, ...]]] = queue.SimpleQueue()
    for call in calls:
        waiting.put(call)

    def work() -> None:
        with suppress(queue.Empty):
            while True:
                future, given = waiting.get_nowait()
                if future.set_running_or_notify_cancel():
                    _fill(future, function, given)

    try:
        _watch()
        for _ in range(min(THREADS, len(calls))):
            threading.Thread(target=work, name="environments", daemon=True).start()
        return _results([future for future, _ in calls])
    finally:
        faulthandler.cancel_dump_traceback_later()
        for future, _ in calls:
            future.cancel()


def _fill(future: Future[Result], function: Callable[..., Result], given: tuple[Any, ...]) -> None:
    try:
        future.set_result(function(*given))
    except BaseException as error:
        future.set_exception(error)


def _results(futures: list[Future[Result]]) -> list[Result]:
    """The results; the error of the first call that fails, without waiting for the others."""
    running: Collection[Future[Result]] = futures
    while running:
        _, running = wait(running, timeout=1.0, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        _watch()
    return [future.result() for future in futures]


def _watch() -> None:
    """Print the stacks unless this is called again, or cancelled, in time."""
    faulthandler.dump_traceback_later(STALL_SECONDS, file=2)
