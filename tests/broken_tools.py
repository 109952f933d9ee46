"""Tools and calls that are broken in many ways, drawn at random, and an environment that has such a tool."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


def tool(body: Callable[[], Any]) -> Callable[..., Any]:
    """A tool without arguments."""

    def act() -> Any:
        """Act."""
        return body()

    return act


class Odd:
    def __str__(self) -> str:
        return "odd"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def circle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def deep() -> list[Any]:
    made: list[Any] = []
    for _ in range(100_000):
        made = [made]
    return made


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


async def later() -> str:
    await asyncio.sleep(0.001)
    return "later"


async def never() -> None:
    await asyncio.sleep(60)


def endless() -> None:
    while True:
        pass


def endless_numbers() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


SAID = ["", "a", "\x00\x1b[2J", "\ud83d", "x" * 5000, "line\nline", "</s>", "\u202e", '{"a": ', "\U0001f600" * 900]
VALUES = [None, True, -1, 2.5, float("nan"), 10**400, *SAID, [], [[["a"]]], {"a": {"b": "\ud800"}}, {"1": [None]}]
ERRORS = [ValueError, KeyError, OSError, MemoryError, RecursionError, StopIteration, GeneratorExit, SystemExit]


def broken(chance: random.Random) -> Callable[[], Any]:
    """A tool that raises, returns something odd or something endless, or does not end."""
    kind = chance.randrange(8)
    value, said = chance.choice(VALUES), chance.choice(SAID)
    if kind == 0:
        return raising(chance.choice(ERRORS)(said))
    if kind == 1:
        return chance.choice([endless_numbers, lambda: (_ for _ in ())])
    if kind == 2:
        return chance.choice([endless, never, lambda: time.sleep(0.1)])
    if kind == 3:
        return chance.choice([circle, deep, Odd, lambda: raising, lambda: {Odd(): value}, lambda: object])
    if kind == 4:
        return lambda: [value] * chance.randrange(10_000)
    if kind == 5:
        return lambda: sys.exit(said)
    return lambda: value


def called(chance: random.Random) -> tuple[Any, Any]:
    """Name and arguments of a call that may fit neither ``act`` nor ``weigh``."""
    name = chance.choice(["act"] * 6 + ["weigh", "ac", *SAID])
    return name, {} if chance.random() < 0.7 else chance.choice([*VALUES, {"item": chance.choice(VALUES)}])


CASES = 200


def case_of(number: int) -> tuple[Callable[[], Any], str]:
    """A broken tool, and what the model says first: a call in the template's form, whose arguments may be no JSON."""
    chance = random.Random(f"case {number}")
    body, (name, given) = broken(chance), called(chance)
    arguments = given if isinstance(given, str) and given and chance.random() < 0.5 else json.dumps(given)
    said = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
    return body, said.encode("utf-8", "replace").decode()


class Broken:
    """Its tool ``act`` is broken as the row's case says; ``weigh`` works."""

    time_limit = 0.1

    def reset(self, answer: int) -> None:
        self._act, _ = case_of(answer)

    def act(self) -> Any:
        """Act."""
        return self._act()

    def weigh(self, item: str) -> str:
        """Weigh something.

        Args:
            item: what is weighed
        """
        return f"{item} 1"

    def reward(self, reply: str) -> bool:
        return reply == "Done."
