"""A user's object whose calls all run in one thread and under time limits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

from selfdistill.data import Message
from selfdistill.environments.protocol import Step
from selfdistill.environments.runner import TIME_LIMIT, what_failed
from selfdistill.environments.texts import OBSERVATION_LIMIT, Mistake, cleaned
from selfdistill.environments.worker import Exhausted, Failed, Late, Worker, same
from selfdistill.errors import UserError

SETUP_LIMIT = 300.0
"""Time limit in seconds for creating, resetting or judging an environment."""

NOTHING: Message = {"role": "user", "content": "(nothing)"}
"""The observation if the environment returns none and the episode continues."""

_MOST = 1_000_000_000
"""The largest limit that an object may set."""


class Hosted:
    """A user's object in its own thread.

    Its attribute ``time_limit`` sets how many seconds a step or a tool may take; the default is 10. Its attribute
    ``observation_limit`` sets how many characters of an observation the model reads; the default is 2,000.

    Args:
        name: the environment's name, for messages.
        make: creates the object, in the thread.

    Raises:
        UserError: the object cannot be created, or a limit of it is none.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self.worker = Worker()
        self._closed = threading.Lock()
        """Taken for ever by the first call of :meth:`close`."""
        self.object: Any = None
        self.time_limit: float = TIME_LIMIT
        self.observation_limit = OBSERVATION_LIMIT
        try:
            self.object = self.must("creating it", make)
            self.time_limit = self._limit("time_limit", self.time_limit, (int, float), "a number")
            self.observation_limit = self._limit("observation_limit", self.observation_limit, (int,), "a whole number")
        except UserError:
            self.close()
            raise

    def must(self, what: str, function: Callable[[], Any], then: Callable[[Any], Any] = same) -> Any:
        """Call ``function`` and return what ``then`` makes of its result; a failure is a mistake in the user's class.

        Raises:
            UserError: the call raised an exception, or took too long.
        """
        try:
            return self.worker.call(function, SETUP_LIMIT, then)
        except Failed as failed:
            if isinstance(failed.__cause__, Mistake):
                raise self.mistake(str(failed.__cause__)) from None
            if isinstance(failed.__cause__, UserError):
                raise failed.__cause__ from None
            raise self.mistake(f"{what} failed: {cleaned(what_failed(failed), 300)}") from failed.__cause__
        except (Late, Exhausted) as problem:
            raise self.mistake(f"{what} failed: {problem}") from None

    def attempt(self, what: str, function: Callable[[], Any], then: Callable[[Any], Any] = same) -> Any:
        """Call ``function`` and return what ``then`` makes of its result.

        If the call raises or is late, return a :class:`Step` that ends the episode with reward 0: a model can make an
        environment fail, and the run continues.

        Raises:
            UserError: ``then`` raised :class:`Mistake`, or too many calls that took too long are still running.
        """
        try:
            return self.worker.call(function, self.time_limit, then)
        except Failed as failed:
            if isinstance(failed.__cause__, Mistake):
                raise self.mistake(str(failed.__cause__)) from None
            said = what_failed(failed)
        except Exhausted as problem:
            raise self.mistake(f"{what}: {problem}") from None
        except Late as late:
            said = str(late)
        return Step(done=True, reward=0.0, feedback=cleaned(f"{what} failed: {said}", 300), failed=True)

    def mistake(self, problem: str) -> UserError:
        """An error whose message names the environment."""
        return UserError(f"environment {self.name!r}: {' '.join(problem.split())}")

    def close(self) -> None:
        """Close the object, if it has ``close``, and let the thread end. Errors are ignored."""
        if not self._closed.acquire(blocking=False):
            return
        close = getattr(self.object, "close", None)
        if callable(close):
            self.finish("close", close)
        self.worker.close()

    def finish(self, what: str, function: Callable[[], Any]) -> None:
        """Call ``function`` as :meth:`attempt` does, or without waiting if another call has to end before."""
        if self.worker.is_busy:
            self.worker.leave(function, self.time_limit)
        else:
            self.attempt(what, function)

    def _limit(self, name: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = getattr(self.object, name, default)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not (is_number and 0 < value <= _MOST):
            raise self.mistake(f"its {name} is {value!r:.60}, expected {what} above 0, at most {_MOST:,}")
        return value


def copied(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the row, which the user's code may change."""
    return copy.deepcopy(dict(row))
