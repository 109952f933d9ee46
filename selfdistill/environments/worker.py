"""A thread that runs the user's code, one call after another, with time limits.

Python cannot stop a thread. Instead, an exception is raised in a late call, which ends loops in Python code. A call
that waits in C code, such as a sleep or a socket, keeps running; until it ends, the thread accepts no other call. The
thread is a daemon: the process may exit while it runs. C code that holds the interpreter's lock, such as a slow regular
expression, stops all threads, so that no limit acts until it ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import queue
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

GRACE_SECONDS = 0.2
"""Seconds that a late call has to end by itself, and again after an exception was raised in it."""
MOST_LATE = 200
"""Maximum late calls of this process that are still running, each in its thread."""


class Late(Exception):
    """A call took too long, or an earlier call is still running, so this one did not begin."""


class Failed(Exception):
    """A call raised ``__cause__``, which may be any exception, even SystemExit or KeyboardInterrupt."""


class Exhausted(Exception):
    """The process has no room for the call: too many late ones are still running, or too many files are open."""


class _Stopped(BaseException):
    """Raised in a late call."""


def same(returned: Any) -> Any:
    """Return what is given."""
    return returned


@dataclass(frozen=True)
class _Job:
    function: Callable[[], Any]
    seconds: float
    then: Callable[[Any], Any]
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]]


class Worker:
    """One thread for all calls of one environment, because resources such as a database may belong to a thread."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._late: _Job | None = None
        self._turn = threading.Lock()

    def call(self, function: Callable[[], Any], seconds: float, then: Callable[[Any], Any] = same) -> Any:
        """Call ``function`` in the thread and return its result; a coroutine is run to its end.

        Args:
            function: what to call.
            seconds: time limit of the call, with ``then``.
            then: what is made of the result, in the thread, because the user's ``__str__`` may hang as well.

        Raises:
            Late: the call took longer than ``seconds``, or an earlier call is still running.
            Failed: the call raised an exception.
            Exhausted: the call is late and does not end, and neither do :data:`MOST_LATE` others; or it is async, and
                too many files are open for its event loop.
        """
        with self._turn:  # after an error, an environment is closed while its last call may still run
            return self._call(function, seconds, then)

    def _call(self, function: Callable[[], Any], seconds: float, then: Callable[[Any], Any]) -> Any:
        if self.is_late:
            raise Late("an earlier call is still running")
        self._late = None
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="environment", daemon=True)
            self._thread.start()
        job = self._add(function, seconds, then)
        try:
            returned, error = job.answer.get(timeout=seconds)
        except queue.Empty:
            self._stop(job)
            raise Late(f"it took longer than {seconds:g} s") from None
        if isinstance(error, Exhausted):
            raise error
        if error is not None:
            raise Failed from error
        return returned

    @property
    def is_late(self) -> bool:
        """Whether a late call is still running."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self._late is not None and self._late.answer.empty()

    @property
    def is_busy(self) -> bool:
        """Whether a call is running, late or not."""
        return self._turn.locked() or self.is_late

    def leave(self, function: Callable[[], Any], seconds: float) -> None:
        """Let the thread call ``function`` once its current call has ended, without waiting for it."""
        self._add(function, seconds, same)

    def close(self) -> None:
        """Let the thread end after its current call."""
        self._jobs.put(None)

    def _add(self, function: Callable[[], Any], seconds: float, then: Callable[[Any], Any]) -> _Job:
        job = _Job(function, seconds, then, queue.SimpleQueue())
        self._jobs.put(job)
        return job

    def _stop(self, job: _Job) -> None:
        """Wait for a job to end by itself; otherwise raise an exception in the thread.

        If that does not end the job, remember it.
        """
        assert self._thread is not None
        if _ends(job):
            return
        thread = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Stopped))
        if _ends(job):  # perhaps by itself just before, so the next job would be hit
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
            return
        self._late = job
        if _count_late(job) > MOST_LATE:
            raise Exhausted(
                f"{MOST_LATE} calls that took too long are still running; give them a time-out of their own"
            )


_all_late: list[_Job] = []
"""Late calls of this process that may still be running."""
_counting = threading.Lock()


def _count_late(job: _Job) -> int:
    """Number of late calls that are still running, with this one."""
    with _counting:
        _all_late[:] = [one for one in _all_late if one.answer.empty()] + [job]
        return len(_all_late)


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
                loop = loop or _event_loop(returned)
                limit = job.seconds + GRACE_SECONDS / 2  # the caller has given up by then
                returned = loop.run_until_complete(asyncio.wait_for(returned, limit))
            job.answer.put((job.then(returned), None))
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: Ctrl-C reaches only the main thread
            job.answer.put((None, error))
    if loop is not None:
        loop.close()


def _event_loop(call: Coroutine[Any, Any, Any]) -> asyncio.AbstractEventLoop:
    """A loop for the calls of a thread, the first of which is ``call``."""
    try:
        return asyncio.new_event_loop()
    except OSError as error:  # of the machine, not of the call
        call.close()  # Python would warn that it was never awaited
        raise Exhausted(
            f"no event loop for an async call ({error.strerror}); raise the limit of open files, ulimit -n"
        ) from error


def _next(jobs: queue.SimpleQueue[_Job | None]) -> _Job | None:
    while True:
        try:
            return jobs.get()
        except _Stopped:  # raised just after the late call had ended
            continue
