"""Forms of what users write: the protocol itself, TRL's classes of tools, Gymnasium's ``step(text)``, functions."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from selfdistill.data import COLUMNS, Message, Verdict, as_verdict, said_in
from selfdistill.environments.hosted import NOTHING, Hosted, copied
from selfdistill.environments.protocol import Environment, Step
from selfdistill.environments.runner import ToolRunner
from selfdistill.environments.texts import Mistake, Reader
from selfdistill.errors import UserError

_NO_TOOLS = ("reset", "reward", "close")
ROW_COLUMNS = tuple(name for name in COLUMNS if name not in ("messages", "image", "images", "tools"))
"""Columns that ``reset`` may receive."""
_NO_REWARD = object()
"""The reward of an object that has none."""
_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class OwnClass:
    """A class that implements the protocol itself, with time limits on its calls."""

    def __init__(self, host: Hosted) -> None:
        self._host = host
        self.tools = host.object.tools
        for number, tool in enumerate(self.tools):
            if not isinstance(tool, dict):
                raise host.mistake(f"tools[{number}] is {type(tool).__name__!r}, expected a JSON schema")

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """The messages that the class returns."""
        return list(self._host.must("reset", lambda: self._host.object.reset(copied(row)), self._first))

    def step(self, message: Message) -> Step:
        """The class's step; one that fails ends the episode with reward 0."""
        step: Step = self._host.attempt("step", lambda: self._host.object.step(copied(message)), self._read)
        if step.reward is None:
            return step
        returned = (step.reward, step.feedback) if step.feedback else step.reward
        found = as_verdict(returned, f"environment {self._host.name!r}: step")
        return replace(step, reward=found.reward, feedback=found.feedback)

    def close(self) -> None:
        """Close the object and its thread."""
        self._host.close()

    def _first(self, returned: Any) -> list[Message]:
        if not isinstance(returned, list) or not _are_messages(returned):
            raise Mistake(f"reset returned {returned!r:.60}, expected a list of messages")
        return Reader().messages(returned)

    def _read(self, step: Any) -> Step:
        if not isinstance(step, Step):
            raise Mistake(f"step returned {step!r:.60}, expected a Step")
        if step.reward is not None and not step.done:
            raise Mistake("step returned a reward before the end, expected it only at the end")
        if step.done:
            return replace(step, observations=(), shortened=0)
        given = _listed(step.observations)
        if not _are_messages(given):
            raise Mistake(f"step returned the observations {step.observations!r:.60}, expected messages")
        reader = Reader(self._host.observation_limit)
        observations = tuple(reader.messages(given))
        if not observations:
            raise Mistake("step returned neither observations nor the end, expected one of them")
        return replace(step, observations=observations, shortened=reader.shortened)


def _listed(returned: Any) -> list[Any]:
    """What was returned as a list, because a generator can be read only once; what is none becomes the only item."""
    if returned is None:
        return []
    return list(returned) if isinstance(returned, Iterable) else [returned]


def _are_messages(returned: Iterable[Any]) -> bool:
    return all(isinstance(one, dict) and "role" in one for one in returned)


class ToolClass:
    """A class in the form of TRL's ``environment_factory``: its public methods are the tools.

    ``reset`` takes the row's columns as keywords, or a parameter ``row``, and may return a text, which follows the
    prompt as a user turn. The episode is done when the model replies without a call. Then ``reward`` is read: an
    attribute, or a method that may take the text of that reply, without its thinking. It is a bool, a reward from 0 to
    1, or a pair of one of these and a feedback text.
    """

    def __init__(self, host: Hosted) -> None:
        self._host = host
        methods = [getattr(host.object, name) for name in tool_names(type(host.object))]
        try:
            self._runner = ToolRunner(methods, host.time_limit, host.observation_limit, host.worker)
        except UserError as error:
            raise host.mistake(
                f"{error}; if the model should not call it, begin its name with an underscore"
            ) from error
        self.tools = self._runner.schemas

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """The result of the object's ``reset``, as a user turn."""
        arguments = _wanted(self._host, copied(row), row=copied(row))
        return list(self._host.must("reset", lambda: self._host.object.reset(**arguments), Reader().messages))

    def step(self, message: Message) -> Step:
        """Run the message's calls; without calls, the episode is done."""
        answer = self._runner.answer(message)
        if answer.observations:
            return answer
        found = self._verdict(said_in(message))
        return Step((), True, found.reward, found.feedback) if found else Step(done=True)

    def close(self) -> None:
        """Close the object and its thread."""
        self._host.close()

    def _verdict(self, reply: str) -> Verdict | None:
        if not has_reward(self._host.object):
            return None
        if self._host.worker.is_late:
            return Verdict(0.0, "a tool is still running, so the episode cannot be judged")
        found = self._host.must("reward", lambda: self._reward(reply))
        return None if found is _NO_REWARD else as_verdict(found, f"environment {self._host.name!r}: reward")

    def _reward(self, reply: str) -> Any:
        """What the object's ``reward`` is or returns. Runs in its thread, because a property may use its resources."""
        made = self._host.object
        reward = made.reward if hasattr(type(made), "reward") else getattr(made, "reward", _NO_REWARD)
        if not callable(reward):
            return reward
        return reward(reply) if inspect.signature(reward).parameters else reward()


class StepClass:
    """A class in the form of Gymnasium or OpenEnv: ``step`` takes the model's reply as text.

    The text excludes thinking, as for scorers, and has calls as lines of text.

    ``reset`` may take ``seed`` (the same for every episode of a row) and ``options`` (the row). It returns the first
    observation, alone, with a dict of information, or as an object's ``observation``. ``step`` returns (observation,
    reward, terminated, truncated, info), (observation, reward, done, info), or an object with observation, reward and
    done. The episode's reward is the sum of its steps', from 0 to 1.
    """

    tools: list[dict[str, Any]]

    def __init__(self, host: Hosted) -> None:
        self._host = host
        self.tools = []
        self._sum = 0.0

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """The first observation, as a user turn."""
        self._sum = 0.0
        arguments = _wanted(self._host, {}, row=copied(row), options=copied(row), seed=seed_of(row))
        return list(self._host.must("reset", lambda: self._host.object.reset(**arguments), _first_observation))

    def step(self, message: Message) -> Step:
        """The object's step; one that fails ends the episode with reward 0."""
        reader = Reader(self._host.observation_limit)

        def read(returned: Any) -> tuple[tuple[Message, ...], float, bool]:
            observation, reward, done = _parts(returned)
            return tuple(reader.messages(observation)), reward, done

        found = self._host.attempt("step", lambda: self._host.object.step(said_in(message)), read)
        if isinstance(found, Step):
            return found
        observations, reward, done = found
        self._sum += reward
        if not done:
            return Step(observations or (NOTHING,), shortened=reader.shortened)
        who = f"environment {self._host.name!r}: the sum of the episode's rewards, which step"
        total = round(self._sum, 9)  # ten steps of 0.1 are 1
        return Step((), True, as_verdict(total, who).reward, "\n".join(one["content"] for one in observations))

    def close(self) -> None:
        """Close the object and its thread."""
        self._host.close()


def _first_observation(returned: Any) -> list[Message]:
    if isinstance(returned, tuple) and len(returned) == 2:
        returned = returned[0]
    return Reader().messages(getattr(returned, "observation", returned))


def _parts(returned: Any) -> tuple[Any, float, bool]:
    """Observation, reward and whether the episode is done, of what ``step`` returned."""
    if isinstance(returned, tuple) and len(returned) in (4, 5):
        observation, reward, *ends = returned[:-1]
        done = any(ends)
    elif isinstance(returned, Step):
        raise Mistake("step returned a Step, which needs a class that also has tools and close; add them")
    elif hasattr(returned, "reward") and hasattr(returned, "done"):
        observation = getattr(returned, "observation", None)
        reward, done = returned.reward, bool(returned.done)
    else:
        want = "expected (observation, reward, terminated, truncated, info) or an object with reward and done"
        raise Mistake(f"step returned {returned!r:.60}, {want}")
    try:
        return observation, float(reward or 0.0), done
    except (TypeError, ValueError):
        raise Mistake(f"step returned the reward {reward!r:.60}, expected a number") from None


class Functions:
    """Functions as tools, which all episodes share. The episode is done when the model replies without a call.

    It has no reward.

    Args:
        functions: what the model may call.

    Raises:
        UserError: a function has no schema, or two have the same name.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._runner = ToolRunner(functions)
        self.tools = self._runner.schemas

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """No messages."""
        return []

    def step(self, message: Message) -> Step:
        """Run the message's calls; without calls, the episode is done."""
        answer = self._runner.answer(message)
        return replace(answer, done=not answer.observations)

    def close(self) -> None:
        """Let the thread end."""
        self._runner.close()


def tool_names(kind: type) -> list[str]:
    """Names of the methods that are tools: base classes first, then in the order of the source."""
    names = dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base))
    return [
        name
        for name in names
        if not name.startswith("_") and name not in _NO_TOOLS and inspect.isroutine(getattr(kind, name, None))
    ]


def has_reward(made: Any) -> bool:
    """Whether an object whose methods are tools has a reward, or a method such as ``reset`` that may set one."""
    kind = type(made)
    if any(hasattr(kind, name) for name in ("reward", "__getattr__")) or "reward" in getattr(made, "__dict__", {}):
        return True
    methods = [inspect.unwrap(one) for base in kind.__mro__ for one in vars(base).values() if inspect.isfunction(one)]
    return any("reward" in (*one.__code__.co_names, *one.__code__.co_consts) for one in methods)


def form_of(host: Hosted, *, is_class: bool) -> Callable[[Hosted], Environment]:
    """The form that turns a user's object into an environment, chosen by the object's methods.

    Args:
        host: holds the object.
        is_class: whether the user named a class rather than a function; for messages.

    Raises:
        UserError: the object has no known form.
    """
    made = host.object
    kind = type(made).__name__
    if not is_class and type(made).__module__ == "builtins":
        raise host.mistake(f"the function returned an object of type {kind!r}, expected an environment")
    who = "the class" if is_class else f"the class {kind!r}"
    if not callable(getattr(made, "reset", None)):
        raise host.mistake(f"{who} has no method reset; for the forms see docs/agents.md")
    if callable(getattr(made, "step", None)):
        has_protocol = isinstance(getattr(made, "tools", None), list) and callable(getattr(made, "close", None))
        return OwnClass if has_protocol else StepClass
    if not tool_names(type(made)):
        raise host.mistake(f"{who} has reset, but neither a method step nor public methods that are tools; add them")
    return ToolClass


def seed_of(row: Mapping[str, Any]) -> int:
    """A seed from the row's content, below 2**31."""
    text = json.dumps(dict(row), sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4], "big") >> 1


def _wanted(host: Hosted, columns: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """The columns and other values that ``reset`` has parameters for.

    If it takes any keyword, also all columns, and Gymnasium's ``seed`` and ``options``, which a wrapper passes on.

    Raises:
        UserError: ``reset`` has another parameter without a default.
    """
    parameters = inspect.signature(host.object.reset).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    named = {name: value for name, value in {**others, **columns}.items() if name in parameters}
    for name, one in parameters.items():
        if name in named or one.default is not inspect.Parameter.empty or one.kind in _ANY_NUMBER:
            continue
        if columns and name in ROW_COLUMNS:
            raise host.mistake(f"the row has no column {name!r}, which reset takes")
        known = f"row or columns of the data: {', '.join(ROW_COLUMNS)} (docs/data.md)" if columns else ", ".join(others)
        raise host.mistake(f"reset takes {name!r}, expected only {known}")
    passed_on: dict[str, Any] = {name: others[name] for name in ("seed", "options") if name in others}
    return {**passed_on, **columns, **named} if takes_all else named
