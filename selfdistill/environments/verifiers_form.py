"""Environments of the library ``verifiers``: its classic ``MultiTurnEnv``, in releases 0.1 to 0.3.

It uses ``env_response(messages, state)``, ``is_completed(state)``, ``setup_state(state)`` and ``cleanup(state)``, all
async; ``rubric.score_rollout(state)``, which sets ``state["reward"]``; and ``tool_defs``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import signal
import sys
import uuid
from collections.abc import Callable, Container, Mapping
from typing import Any

from selfdistill.data import Message, as_verdict
from selfdistill.environments.hosted import NOTHING, Hosted, copied
from selfdistill.environments.protocol import Step
from selfdistill.environments.runner import ToolRunner
from selfdistill.environments.texts import Mistake, Reader
from selfdistill.errors import UserError, named_error, one_line

_METHODS = ("env_response", "is_completed", "rubric")


def loaded(name: str, make: Callable[[], Any]) -> Any:
    """The ``verifiers`` environment that ``make`` creates; None if it creates something else.

    It is created in this thread, because the library sets signal handlers, which only the main thread may do. The
    handlers are then restored, because Ctrl-C must reach the run. What cannot make one is not called: a class without
    ``env_response``, and a function if the library is neither imported nor named in it.

    Raises:
        UserError: the environment cannot be created.
    """
    names = getattr(getattr(make, "__code__", None), "co_names", ())
    may_make = hasattr(make, _METHODS[0]) if inspect.isclass(make) else "verifiers" in (*sys.modules, *names)
    if not may_make:
        return None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        made = make()
    except (Exception, SystemExit) as error:
        problem = f"creating it failed: {named_error(error)}"
        raise UserError(f"environment {name!r}: {problem}") from error
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
    if all(hasattr(made, method) for method in _METHODS):
        return made
    if callable(close := getattr(made, "close", None)):
        with contextlib.suppress(Exception):
            close()
    return None


class VerifiersEpisode:
    """One episode of a ``verifiers`` environment. All episodes share the object; each has its own state.

    The object's stop conditions end the episode, and its rubric gives the reward, which must be from 0 to 1.
    """

    def __init__(self, host: Hosted) -> None:
        self._host = host
        self._env = host.object
        self._messages: list[Any] = []
        self._state: Any = {}
        self._to_clean = False
        """Whether the episode has begun, and its ``cleanup`` was not called yet."""
        self._no_tools = ToolRunner((), worker=host.worker)
        tools = getattr(self._env, "tool_defs", None) or ()
        try:
            self.tools = [_schema(one) for one in tools]
        except (AttributeError, TypeError) as error:
            raise host.mistake(
                f"its tool_defs cannot be read: {one_line(error)}; use objects of verifiers.types.Tool"
            ) from error

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """Create the episode's state; returns no messages, because they would follow the row's prompt.

        Raises:
            UserError: the object has turns for the beginning of prompts, which the library puts only into its own rows,
                and the row's prompt has none.
        """
        types, normalised = self._library()
        values = copied(row)
        prompt = values.get("prompt") or ""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        self._check_beginning({turn["role"] for turn in turns})
        self._messages = normalised(turns)
        given = {"example_id": 0, "answer": "", "info": {}, **values, "prompt": list(self._messages)}
        state = types.State(input=given)
        state["task"] = dict(given)
        nothing = ("completion", "reward", "metrics", "error", "final_env_response", "client", "sampling_args")
        for key in nothing:
            state[key] = None
        state["model"], state["trajectory"], state["trajectory_id"] = "", [], uuid.uuid4().hex
        state["is_completed"] = state["is_truncated"] = False
        state["tool_defs"] = list(getattr(self._env, "tool_defs", None) or ())
        state["timing"] = types.RolloutTiming()
        self._state = self._host.must("setup_state", lambda: self._env.setup_state(state)) or state
        self._to_clean = True
        return []

    def step(self, message: Message) -> Step:
        """The object's response, or its rubric's reward if one of its stop conditions is met."""
        _, normalised = self._library()
        if message.get("invalid"):
            answer = self._no_tools.answer(message)
            self._messages += normalised([_said(message), *answer.observations])
            return answer
        said = normalised([_raw(message)])
        self._state["trajectory"].append(self._trajectory_step(said))
        self._messages += said
        returned = self._host.attempt("env_response", self._respond)
        if isinstance(returned, Step):
            return returned
        if returned is None:
            return self._end()
        answers = normalised(returned)
        self._messages += answers
        names = {call.id: call.name for call in getattr(said[0], "tool_calls", None) or ()}
        own = {call.get("id") for call in _calls(message)}
        reader = Reader(self._host.observation_limit)
        try:
            observations = tuple(_observation(one, names, own, reader) for one in answers)
        except Mistake as mistake:
            raise self._host.mistake(str(mistake)) from None
        return Step(observations or (NOTHING,), shortened=reader.shortened)

    def close(self) -> None:
        """Clean up an episode that was not scored, and let the thread end; the object is shared and stays open."""
        if self._to_clean:
            self._to_clean = False
            self._host.finish("cleanup", self._clean)
        self._host.worker.close()

    def _check_beginning(self, roles: Container[str]) -> None:
        for name, role in (("system_prompt", "system"), ("few_shot", "assistant")):
            if getattr(self._env, name, None) and role not in roles:
                raise self._host.mistake(
                    f"the object has a {name}, but the row's prompt has no turn of the {role}; put it there, as "
                    "the rows of the object's get_dataset() have it"
                )

    async def _respond(self) -> Any:
        """The object's response; None if the episode is done."""
        if await self._env.is_completed(self._state):
            return None
        returned = await self._env.env_response(list(self._messages), self._state)
        return None if self._state.get("final_env_response") is not None else returned

    async def _clean(self) -> None:
        self._to_clean = False
        await self._env.cleanup(self._state)  # writes the completion into the state

    async def _score(self) -> None:
        await self._clean()
        await self._env.rubric.score_rollout(self._state)

    def _end(self) -> Step:
        if self._host.worker.is_late:
            return Step((), True, 0.0, "a call is still running, so the episode cannot be judged")
        self._host.must("scoring", self._score)
        found = as_verdict(self._state["reward"], f"environment {self._host.name!r}: its rubric")
        return Step((), True, found.reward, found.feedback)

    def _trajectory_step(self, said: list[Any]) -> dict[str, Any]:
        nothing = dict.fromkeys(("response", "tokens", "reward", "advantage"))
        identity = {"is_truncated": False, "trajectory_id": self._state["trajectory_id"], "extras": {}}
        return {"prompt": list(self._messages), "completion": said, **nothing, **identity}

    def _library(self) -> tuple[Any, Any]:
        """The library's types, and its function that converts dicts to messages."""
        try:
            types = importlib.import_module("verifiers.types")
            messages = importlib.import_module("verifiers.utils.message_utils")
            return types, messages.normalize_messages
        except (ImportError, AttributeError) as error:
            raise self._host.mistake(
                f"verifiers cannot be used: {one_line(error)}; install 'verifiers[all]<0.4'"
            ) from error


def _schema(tool: Any) -> dict[str, Any]:
    """A tool's JSON schema, as chat templates take it."""
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
    }


def _raw(message: Message) -> dict[str, Any]:
    """The model's message as the library reads it: calls flat, with an id, their arguments as JSON text."""
    calls = [
        {
            "id": str(call.get("id") or f"call_{number}"),
            "name": str(call["function"]["name"]),
            "arguments": json.dumps(call["function"]["arguments"]),
        }
        for number, call in enumerate(_calls(message))
    ]
    return {**_said(message), **({"tool_calls": calls} if calls else {})}


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(message.get("tool_calls") or ())


def _said(message: Message) -> dict[str, Any]:
    return {"role": "assistant", "content": message["content"]}


def _observation(answer: Any, names: Mapping[str, str], own: Container[Any], reader: Reader) -> Message:
    """The library's message as one of this package's, with the call's id only if the model gave one."""
    role = answer.role if answer.role in ("user", "tool") else "user"
    call = str(getattr(answer, "tool_call_id", None) or "") if role == "tool" else ""
    identity = {"name": names[call]} if call in names else {}
    identity |= {"tool_call_id": call} if call in own else {}
    content = [dict(part) for part in answer.content] if isinstance(answer.content, list) else answer.content
    return {"role": role, **identity, "content": reader.content(content)}
