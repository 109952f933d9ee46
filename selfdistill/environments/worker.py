"""A thread that runs the user's code, one call after another, with time limits.

Python cannot stop a thread. Instead, an exception is raised in a late call, which ends loops in Python code. A call
that waits in C code, such as a sleep or a socket, keeps running; until it ends, the thread accepts no other call. The
thread is a daemon: the process may exit while it runs.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GRACE_SECONDS = 0.2
"""Seconds that a late call has to end by itself, and again after an exception was raised in it."""


class Late(Exception):
    """A call took too long, or an earlier call is still running, so this one did not begin."""


class Failed(Exception):
    """A call raised ``__cause__``, which may be any exception, even SystemExit or KeyboardInterrupt."""


class _Stopped(BaseException):
    """Raised in a late call."""


@dataclass(frozen=True)
class _Job:
    function: Callable[[], Any]
    seconds: float
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]]


class Worker:
    """One thread for all calls of one environment, because resources such as a database may belong to a thread."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._late: _Job | None = None

    def call(self, function: Callable[[], Any], seconds: float) -> Any:
        """Call ``function`` in the thread and return its result; a coroutine is run to its end.

        Raises:
            Late: the call took longer than ``seconds``, or an earlier call is still running.
            Failed: the call raised an exception.
        """
        if self.is_late:
            raise Late("an earlier call is still running")
        self._late = None
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="environment", daemon=True)
            self._thread.start()
        job = _Job(function, seconds, queue.SimpleQueue())
        self._jobs.put(job)
        try:
            returned, error = job.answer.get(timeout=seconds)
        except queue.Empty:
            self._stop(job)
            raise Late(f"it took longer than {seconds:g} s") from None
        if error is not None:
            raise Failed from error
        return returned

    @property
    def is_late(self) -> bool:
        """Whether a late call is still running."""
        return self._late is not None and self._late.answer.empty()

    def close(self) -> None:
        """Let the thread end after its current call."""
        self._jobs.put(None)

    def _stop(self, job: _Job) -> None:
        """Wait for a job to end by itself; otherwise raise an exception in the thread.

        If that does not end the job, remember it.
        """
        assert self._thread is not None
        if _ends(job):
            return
        thread = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Stopped))
        if not _ends(job):
            self._late = job


def _ends(job: _Job) -> bool:
    """Whether the job ends soon."""
    try:
        job.answer.get(timeout=GRACE_SECONDS)
    except queue.Empty:
        return False
    return True


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    """Run jobs until a None arrives."""
    loop: asyncio.AbstractEventLoop | None = None
    while (job := _next(jobs)) is not None:
        try:
            returned = job.function()
            if inspect.iscoroutine(returned):
                loop = loop or asyncio.new_event_loop()
                limit = job.seconds + GRACE_SECONDS / 2  # the caller has given up by then
                returned = loop.run_until_complete(asyncio.wait_for(returned, limit))
            job.answer.put((returned, None))
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: Ctrl-C reaches only the main thread
            job.answer.put((None, error))
    if loop is not None:
        loop.close()


def _next(jobs: queue.SimpleQueue[_Job | None]) -> _Job | None:
    while True:
        try:
            return jobs.get()
        except _Stopped:  # raised just after the late call had ended
            continue
