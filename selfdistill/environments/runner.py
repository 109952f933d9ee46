"""Run a model's calls: every error becomes one line that the model reads, and the run continues."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from inspect import iscoroutine
from typing import Any

from selfdistill.data import Message, from_text
from selfdistill.environments.texts import as_text, cleaned
from selfdistill.environments.tools import BadArguments, Tool, tool_of
from selfdistill.environments.worker import Failed, Late, Worker
from selfdistill.errors import UserError

TIME_LIMIT = 10.0
"""Time limit of one call in seconds."""
MOST_OF_AN_ERROR = 200
"""Maximum characters of an error line."""


class ToolRunner:
    """Tools, and the thread that runs their calls one after another.

    Args:
        functions: what the model may call; see :func:`~selfdistill.environments.tools.tool_of`.
        time_limit: seconds that one call may take.
        worker: runs the calls; default: a new one.

    Raises:
        UserError: a function has no schema, or two have the same name.
    """

    def __init__(
        self, functions: Sequence[Callable[..., Any]], time_limit: float = TIME_LIMIT, worker: Worker | None = None
    ) -> None:
        self._tools: dict[str, Tool] = {}
        for tool in map(tool_of, functions):
            if tool.name in self._tools:
                raise UserError(f"two tools are named '{tool.name}', expected distinct names")
            self._tools[tool.name] = tool
        self._time_limit = time_limit
        self._worker = worker or Worker()

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools' JSON schemas, as chat templates take them."""
        return [tool.schema for tool in self._tools.values()]

    def answer(self, message: Message) -> tuple[tuple[Message, ...], int]:
        """Run the calls of the model's message, in their order.

        If the message has the key ``invalid``, no call can be run, and a user turn gives the reason. After a late call,
        the message's remaining calls are not run.

        Returns:
            An observation for each call, and the number of calls that could not be run as written.
        """
        if message.get("invalid"):
            return ({"role": "user", "content": _error(str(message["invalid"]))},), 1
        observations: list[Message] = []
        invalid, late = 0, False
        for call in message.get("tool_calls") or ():
            name, given = _parts(call)
            if late:
                text = _error("not run, because the previous call took too long")
            else:
                text, valid, late = self._run(name, given)
                invalid += not valid
            identity = {"tool_call_id": call["id"]} if isinstance(call, dict) and call.get("id") else {}
            observations.append({"role": "tool", "name": cleaned(name, 60), **identity, "content": text})
        return tuple(observations), invalid

    def close(self) -> None:
        """Let the thread end."""
        self._worker.close()

    def _run(self, name: str, given: Any) -> tuple[str, bool, bool]:
        """The observation, whether the call was valid, and whether it was late."""
        tool = self._tools.get(name)
        if tool is None:
            return _error(f"unknown tool '{name[:60]}', expected one of {', '.join(self._tools)}"), False, False
        try:
            arguments = tool.arguments(given)
        except BadArguments as error:
            return _error(f"{name}: {error}"), False, False
        except RecursionError:
            return _error(f"{name}: the arguments are nested too deeply"), False, False
        try:
            return self._worker.call(lambda: _as_text(tool.function(**arguments)), self._time_limit), True, False
        except Late as error:
            return _error(f"{name}: {error}"), True, True
        except Failed as failed:
            return _error(f"{name}: {what_failed(failed)}"), True, False


def what_failed(failed: Failed) -> str:
    """Type and message of the exception that a call raised, on one line."""
    cause = failed.__cause__
    try:
        said = " ".join(str(cause).split())
    except BaseException:  # an exception's own str may raise
        said = ""
    return f"{type(cause).__name__}{': ' if said else ''}{said}"


def _as_text(returned: Any) -> Any:
    """A tool's result as text; for a coroutine, a coroutine that returns the text."""
    return _later(returned) if iscoroutine(returned) else as_text(returned)


async def _later(returned: Awaitable[Any]) -> str:
    return as_text(await returned)


def _parts(call: Any) -> tuple[str, Any]:
    """Name and arguments of a call; arguments given as JSON text are parsed."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return "", None
    return str(function.get("name", "")), from_text(function.get("arguments"))


def _error(said: str) -> str:
    return f"Error: {cleaned(' '.join(said.split()), MOST_OF_AN_ERROR)}"
