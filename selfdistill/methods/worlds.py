"""The environments of some episodes: their first messages, their answers, and what happens if one fails."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from selfdistill.config import TaskSettings
from selfdistill.data import Demonstration, Message, Replies, as_row, first_ten
from selfdistill.environments import (
    IN_PYTHON,
    THREADS,
    Environment,
    EnvironmentFactory,
    Step,
    in_threads,
    make_environment,
)
from selfdistill.errors import UserError, named_error
from selfdistill.runtime import allow_open_files, say_note

Result = TypeVar("Result")

LEAVE_SECONDS = 2.0
"""Seconds that environments have to close after an error or Ctrl-C."""

_looked_up: Callable[[str], EnvironmentFactory] = functools.cache(make_environment)


def environment_of(name: str) -> EnvironmentFactory:
    """The factory of the environments of a name. A user's module is looked up once.

    Raises:
        UserError: there is no such environment.
    """
    return make_environment(name) if name.startswith(IN_PYTHON) else _looked_up(name)


def scorer_judges(config: TaskSettings) -> bool:
    """Whether the scorer judges: without an environment the replies, and the last reply in one that has no rewards.

    Raises:
        UserError: there is no such environment.
    """
    return config.environment == "none" or not environment_of(config.environment).judges


def limits_of(config: TaskSettings, replies: Replies = "last") -> dict[str, Any]:
    """Arguments of :func:`selfdistill.data.encode`: the settings' limits, and ``replies`` or whole episodes.

    The rows are those of the data or, with an environment, of :func:`begun`.
    """
    plays = config.environment != "none"
    return {
        "max_prompt_length": config.max_prompt_length,
        "max_completion_length": config.max_completion_length,
        "max_episode_length": config.longest_completion if plays else None,
        "replies": "episode" if plays else replies,
    }


@dataclass(frozen=True)
class EpisodeRow(Demonstration):
    """A row whose prompt ends with its environment's first messages, and which shows the environment's tools."""

    first: tuple[Message, ...] = ()
    """The messages of the environment at the end of the prompt."""

    @property
    def unbegun(self) -> EpisodeRow:
        """The row without its environment's first messages."""
        return replace(self, prompt=self.prompt[: len(self.prompt) - len(self.first)], first=())

    @property
    def columns(self) -> Mapping[str, Any]:
        """The row as its environment receives it: without the environment's first messages and tools."""
        return {name: value for name, value in as_row(self.unbegun).items() if name != "tools"}


def begun(name: str, rows: Sequence[Demonstration]) -> list[EpisodeRow]:
    """The rows with the environment's tools and first messages.

    An environment begins every episode of a row the same way, so this is done once per row. Rows that have already
    begun begin again.

    Raises:
        UserError: an environment fails or has other tools in another row, or rows have pictures, which episodes do not
            support.
    """
    if seen := [row.source for row in rows if row.images]:
        raise UserError(
            f"setting 'environment': {len(seen)} of {len(rows)} rows have pictures, but episodes support only text "
            f"({first_ten(seen)}); leave out the pictures or the environment"
        )
    known = _firsts(environment_of(name))
    rows = [row.unbegun if isinstance(row, EpisodeRow) else row for row in rows]
    blank = [_episode_row(row, [], ()) for row in rows]
    keys = [json.dumps(row.columns, default=str) for row in blank]
    new = {key: row for key, row in zip(keys, blank, strict=True) if key not in known}
    for start in range(0, len(new), THREADS):
        part = list(new.items())[start : start + THREADS]
        with Worlds(name, [row for _, row in part]) as worlds:
            said = worlds.reset(check=False)
            known |= {key: one for (key, _), one in zip(part, zip(said, worlds.tools, strict=True), strict=True)}
    made = [_episode_row(row, known[key][1], known[key][0]) for row, key in zip(rows, keys, strict=True)]
    for row in made:
        if row.tools != made[0].tools:
            raise UserError(
                f"{row.source}: environment {name!r} has different tools from {made[0].source}, expected the same in "
                "every episode"
            )
    return made


@functools.cache
def _firsts(factory: EnvironmentFactory) -> dict[str, tuple[tuple[Message, ...], list[dict[str, Any]]]]:
    """The environment's first messages and tools, by the row's columns."""
    return {}


def _episode_row(row: Demonstration, tools: list[dict[str, Any]], first: tuple[Message, ...]) -> EpisodeRow:
    values = {name: getattr(row, name) for name in Demonstration.__dataclass_fields__}
    values |= {"prompt": (*row.prompt, *first), "tools": tools or None}
    return EpisodeRow(**values, first=first)


class Worlds:
    """The environments of some episodes, which answer in threads; each is used by one thread at a time.

    They are closed when the block is left.

    Args:
        name: of the environment.
        rows: one per episode.

    Raises:
        UserError: an environment fails, in any method but ``close``.
    """

    def __init__(self, name: str, rows: Sequence[EpisodeRow]) -> None:
        self._name, self._rows = name, rows
        self._environments: dict[int, Environment] = {}
        self._left = False
        self.tools: list[list[dict[str, Any]]] = []
        """The tools of each, once they have begun."""

    def __enter__(self) -> Worlds:
        allow_open_files()  # each environment with async calls needs three
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close all environments. A failure here affects no result, and must not hide an earlier error.

        After an error, do not wait for those that do not answer.
        """
        self._left = True
        worlds = list(self._environments.values())
        closing = threading.Thread(target=in_threads, args=(_close, worlds), name="closing", daemon=True)
        closing.start()
        closing.join(None if kind is None else LEAVE_SECONDS)

    def reset(self, *, check: bool = True) -> list[tuple[Message, ...]]:
        """Make the environments and begin; returns their first messages.

        With ``check`` these and the tools must equal those in the rows.
        """
        factory = environment_of(self._name)

        def begin(number: int, row: EpisodeRow) -> tuple[Message, ...]:
            world = self._guarded(factory, row, "at its start")
            self._environments[number] = world
            if self._left:  # it was made too late to be closed with the others
                _close(world)
                return ()
            first = tuple(self._guarded(lambda: world.reset(row.columns), row, "at its start"))
            if check and first != row.first:
                raise UserError(
                    f"{row.source}: environment {self._name!r} began with different messages from before; reset must "
                    "depend only on the row, so seed random parts from it"
                )
            if check and world.tools != (row.tools or []):
                raise UserError(
                    f"{row.source}: environment {self._name!r} has different tools from before, expected the same in "
                    "every episode"
                )
            return first

        firsts = in_threads(begin, range(len(self._rows)), self._rows)
        self.tools = [self._environments[number].tools for number in range(len(self._rows))]
        return firsts

    def step(self, numbers: Sequence[int], messages: Sequence[Message], turn: int) -> list[Step]:
        """The answers to messages in some of the episodes, at turn ``turn`` (from 1)."""

        def step(number: int, message: Message) -> Step:
            world, row = self._environments[number], self._rows[number]
            return self._guarded(lambda: world.step(message), row, f"at turn {turn}")

        return in_threads(step, numbers, messages)

    def _guarded(self, work: Callable[[], Result], row: EpisodeRow, when: str) -> Result:
        """The result of ``work``; its failure becomes one line with row and turn."""
        try:
            return work()
        except UserError as error:
            raise UserError(f"{row.source}, {when}: {error}") from error
        except Exception as error:
            raise UserError(f"{row.source}, {when}: environment {self._name!r} failed: {named_error(error)}") from error


def _close(world: Environment) -> None:
    with suppress(Exception):
        world.close()


def tell_shortened(row: Demonstration, turn: int, step: Step) -> None:
    """Report, once in a run, that the model reads only the beginning of an observation."""
    if step.shortened:
        say_note(
            f"{row.source}, at turn {turn}: an observation of at least {step.shortened:,} characters was cut; a class "
            "may raise its observation_limit",
            topic="observation_limit",
        )
