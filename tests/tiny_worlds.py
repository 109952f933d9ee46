"""Environments of the tests, which answer whatever a tiny random model says."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from selfdistill.data import Message
from selfdistill.environments import Step

LOOK_UP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


class Talk:
    """Goes on for as many turns as the row's answer says. Long last replies are right."""

    tools: ClassVar[list[dict[str, Any]]] = []
    open = 0
    """Of this class, how many are not closed."""
    _counting = threading.Lock()

    def __init__(self) -> None:
        self.turn, self.turns = 0, 1
        with self._counting:
            type(self).open += 1
        self._closed = False

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        self.turn, self.turns = 0, int(row["answer"])
        return []

    def step(self, message: Message) -> Step:
        self.turn += 1
        size = len(message["content"])
        if self.turn >= self.turns:
            return Step(done=True, reward=1.0 if size > 4 else size / 8, feedback=f"{size} letters")
        return Step(({"role": "user", "content": f"{size}?" * self.turn},), invalid_calls=self.turn % 2)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with self._counting:
                type(self).open -= 1


class Scripted(Talk):
    """Ends as the row's answer says, whatever it is told: turns, reward, invalid calls of each turn."""

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        self.turn, self.script = 0, row["answer"]
        return []

    def step(self, message: Message) -> Step:
        self.turn += 1
        invalid = self.script["invalid"]
        if self.turn < self.script["turns"]:
            return Step(({"role": "user", "content": f"turn {self.turn}"},), invalid_calls=invalid)
        reward = self.script["reward"]
        return Step(done=True, reward=reward, feedback=f"worth {reward}", invalid_calls=invalid)


class Asks(Talk):
    """Has a tool, and says something first."""

    tools: ClassVar[list[dict[str, Any]]] = [LOOK_UP]

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        super().reset(row)
        return [{"role": "user", "content": f"Go on, {row['answer']} times."}]


class Twice(Talk):
    """Needs nothing of a row but its prompt: asks once more, then ends."""

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        super().reset({"answer": 2})
        return [{"role": "user", "content": "Go on."}]


class Restless(Talk):
    """Says something else first in every episode."""

    count = itertools.count()

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        super().reset(row)
        return [{"role": "user", "content": f"number {next(self.count)}"}]


class Silent(Talk):
    """Gives no rewards."""

    def step(self, message: Message) -> Step:
        step = super().step(message)
        return Step(step.observations, step.done)


class OnlyTools:
    """A class whose methods are tools, without a reward: a scorer judges."""

    def reset(self) -> None:
        return None

    def look(self) -> str:
        """Look."""
        return "nothing"


class Sleepy:
    """A class with an async tool."""

    def reset(self) -> None:
        return None

    async def nap(self) -> str:
        """Sleep."""
        await asyncio.sleep(0.001)
        return "awake"


def look_up(word: str) -> str:
    """Look something up.

    Args:
        word: what to look up
    """
    return f"{word} is a word"


def count(number: int = 1) -> int:
    """Count one further.

    Args:
        number: from where
    """
    return number + 1


FUNCTIONS = [look_up, count]
"""An environment of functions, which does not judge."""


def long_enough(reply: str, row: Mapping[str, Any]) -> bool:
    """A scorer: long replies are right."""
    return len(reply) > 4


class Mute(Talk):
    """Says nothing where it should."""

    def step(self, message: Message) -> Step:
        return Step()


class BreaksAtEnd(Talk):
    """Cannot be closed."""

    def close(self) -> None:
        super().close()
        raise OSError("still in use")


class Breaks(Talk):
    """Fails in every step."""

    def step(self, message: Message) -> Step:
        raise KeyError(f"no {message['role']}")


class BreaksAtStart(Talk):
    """Cannot begin."""

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        raise ZeroDivisionError("no\nworld")


class Lies(Talk):
    """Returns what no environment may return, in the second turn."""

    def step(self, message: Message) -> Step:
        return super().step(message) if self.turn < 1 else "done"  # type: ignore[return-value]


class Narrates(Talk):
    """Answers with what a chat template may refuse."""

    def step(self, message: Message) -> Step:
        return Step(({"role": "user", "content": "Meanwhile."},))


class Rambles(Talk):
    """Says more than the model reads."""

    observation_limit = 20

    def step(self, message: Message) -> Step:
        step = super().step(message)
        return step if step.done else Step(({"role": "user", "content": "and so on " * 3},))


class Slow(Talk):
    """Takes its time to be made."""

    def __init__(self) -> None:
        super().__init__()
        time.sleep(0.2)


class Fickle(Talk):
    """Has other tools in every episode."""

    made = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.tools = [LOOK_UP] * (next(self.made) % 2)  # type: ignore[misc]


class Outlier(Talk):
    """Has no tools; only the 33rd that is made has one."""

    made = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.tools = [LOOK_UP] * (next(self.made) == 32)  # type: ignore[misc]


class Unending(Talk):
    """Never ends an episode."""

    def step(self, message: Message) -> Step:
        return Step(({"role": "user", "content": "And?"},))


class Counter:
    """Counts up by calls. It wants to be at the row's answer when the model stops."""

    def reset(self, answer: int) -> None:
        self.number, self.wanted = 0, answer

    def add(self, by: int) -> int:
        """Add.

        Args:
            by: how much
        """
        self.number += by
        return self.number

    def reward(self) -> tuple[float, str]:
        return 1 / (1 + abs(self.number - self.wanted)), f"it is at {self.number}"
