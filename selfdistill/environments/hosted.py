"""A user's object whose calls all run in one thread and under time limits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from selfdistill.data import Message
from selfdistill.environments.protocol import Step
from selfdistill.environments.runner import TIME_LIMIT, what_failed
from selfdistill.environments.texts import MOST_CHARACTERS, as_text, cleaned
from selfdistill.environments.worker import Failed, Late, Worker
from selfdistill.errors import UserError

SETUP_LIMIT = 300.0
"""Time limit in seconds for creating, resetting or judging an environment."""

NOTHING: Message = {"role": "user", "content": "(nothing)"}
"""The observation if the environment returns none and the episode continues."""

_KEYS = ("role", "content", "name", "tool_call_id")
"""Keys that a message from an environment may have."""


class Hosted:
    """A user's object in its own thread.

    Its attribute ``time_limit`` sets how many seconds a step or a tool may take; the default is 10.

    Args:
        name: the environment's name, for messages.
        make: creates the object, in the thread.

    Raises:
        UserError: the object cannot be created.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self.worker = Worker()
        self._closed = False
        try:
            self.object = self.must("creating it", make)
        except UserError:
            self.worker.close()
            raise
        self.time_limit = float(getattr(self.object, "time_limit", TIME_LIMIT))

    def must(self, what: str, function: Callable[[], Any]) -> Any:
        """Call ``function`` and return its result; a failure is a mistake in the user's class.

        Raises:
            UserError: the call raised an exception, or took too long.
        """
        try:
            return self.worker.call(function, SETUP_LIMIT)
        except Failed as failed:
            if isinstance(failed.__cause__, UserError):
                raise failed.__cause__ from None
            raise self.mistake(f"{what} failed: {cleaned(what_failed(failed), 300)}") from failed.__cause__
        except Late as late:
            raise self.mistake(f"{what} failed: {late}") from None

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """Call ``function`` and return its result, or a :class:`Step` that ends the episode if it raises or is late.

        A model can make an environment fail, so the episode gets reward 0 and the run continues.
        """
        try:
            return self.worker.call(function, self.time_limit)
        except Failed as failed:
            said = what_failed(failed)
        except Late as late:
            said = str(late)
        return Step(done=True, reward=0.0, feedback=cleaned(f"{what} failed: {said}", 300), failed=True)

    def mistake(self, problem: str) -> UserError:
        """An error whose message names the environment."""
        return UserError(f"environment {self.name!r}: {' '.join(problem.split())}")

    def close(self) -> None:
        """Close the object, if it has ``close``, and let the thread end. Errors are ignored."""
        if self._closed:
            return
        self._closed = True
        close = getattr(self.object, "close", None)
        if callable(close):
            self.attempt("close", close)
        self.worker.close()


def copied(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the row, which the user's code may change."""
    return copy.deepcopy(dict(row))


def as_messages(returned: Any) -> list[Message]:
    """The user's return value as messages: none if empty, a list of messages with cleaned text, else one user turn."""
    if returned is None or (isinstance(returned, str | list) and not returned):  # an array has no truth value
        return []
    if isinstance(returned, list) and all(isinstance(one, dict) and "role" in one for one in returned):
        return [_message(one) for one in returned]
    return [{"role": "user", "content": as_text(returned)}]


def _message(given: Mapping[str, Any]) -> Message:
    """A message as the model reads it, with its text cleaned and truncated.

    Raises:
        UserError: the message has other keys, which would be lost.
    """
    if others := [key for key, value in given.items() if key not in _KEYS and value]:
        raise UserError(f"a message has the key {others[0]!r}, expected only {', '.join(_KEYS)}")
    content = given.get("content")
    kept = {key: str(given[key]) for key in ("name", "tool_call_id") if given.get(key)}
    return {"role": str(given["role"]), **kept, "content": as_text("" if content is None else content, MOST_CHARACTERS)}
