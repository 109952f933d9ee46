"""Run a model's calls: every error becomes one line that the model reads, and the run continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from selfdistill.data import Message, from_text
from selfdistill.environments.protocol import Step
from selfdistill.environments.texts import OBSERVATION_LIMIT, Reader, cleaned, without_addresses
from selfdistill.environments.tools import BadArguments, Tool, tool_of
from selfdistill.environments.worker import Exhausted, Failed, Late, Worker
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
        observation_limit: characters of a result that the model reads.
        worker: runs the calls; default: a new one.

    Raises:
        UserError: a function has no schema, or two have the same name.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        time_limit: float = TIME_LIMIT,
        observation_limit: int = OBSERVATION_LIMIT,
        worker: Worker | None = None,
    ) -> None:
        self._tools: dict[str, Tool] = {}
        for tool in map(tool_of, functions):
            if tool.name in self._tools:
                raise UserError(f"two tools are named '{tool.name}', expected distinct names")
            self._tools[tool.name] = tool
        self._time_limit, self._observation_limit = time_limit, observation_limit
        self._worker = worker or Worker()

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The tools' JSON schemas, as chat templates take them."""
        return [tool.schema for tool in self._tools.values()]

    def answer(self, message: Message) -> Step:
        """Run the calls of the model's message, in their order.

        If the message has the key ``invalid``, no call can be run, and a user turn gives the reason. After a late call,
        the message's remaining calls are not run.

        Returns:
            An observation for each call; the episode is not done.

        Raises:
            UserError: too many calls that took too long are still running.
        """
        if message.get("invalid"):
            return Step(({"role": "user", "content": _error(str(message["invalid"]))},), invalid_calls=1)
        reader = Reader(self._observation_limit)
        observations: list[Message] = []
        invalid, late = 0, False
        for call in message.get("tool_calls") or ():
            name, given = _parts(call)
            if late:
                text = _error("not run, because the previous call took too long")
            else:
                text, valid, late = self._run(name, given, reader)
                invalid += not valid
            identity = {"tool_call_id": call["id"]} if isinstance(call, dict) and call.get("id") else {}
            shown = name if name in self._tools else cleaned(name, 60)
            observations.append({"role": "tool", "name": shown, **identity, "content": text})
        return Step(tuple(observations), invalid_calls=invalid, shortened=reader.shortened)

    def close(self) -> None:
        """Let the thread end."""
        self._worker.close()

    def _run(self, name: str, given: Any, reader: Reader) -> tuple[str, bool, bool]:
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
            text = self._worker.call(lambda: tool.function(**arguments), self._time_limit, reader.text)
            return text, True, False
        except Exhausted as error:
            raise UserError(f"tool '{name}': {error}") from None
        except Late as error:
            return _error(f"{name}: {error}"), True, True
        except Failed as failed:
            return _error(f"{name}: {what_failed(failed)}"), True, False


def what_failed(failed: Failed) -> str:
    """Type and message of the exception that a call raised, on one line."""
    cause = failed.__cause__
    try:
        said = without_addresses(" ".join(str(cause).split()))
    except BaseException:  # an exception's own str may raise
        said = ""
    return f"{type(cause).__name__}{': ' if said else ''}{said}"


def _parts(call: Any) -> tuple[str, Any]:
    """Name and arguments of a call; arguments given as JSON text are parsed."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return "", None
    return str(function.get("name", "")), from_text(function.get("arguments"))


def _error(said: str) -> str:
    return f"Error: {cleaned(' '.join(said.split()), MOST_OF_AN_ERROR)}"
