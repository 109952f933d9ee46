"""The environment protocol: the world of one episode, which answers the model's messages until the episode ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from selfdistill.data import Message


@dataclass(frozen=True)
class Step:
    """An environment's answer to one message of the model."""

    observations: tuple[Message, ...] = ()
    """What the model reads next: tool or user messages. Empty if the episode is done."""
    done: bool = False
    """Whether the episode has ended."""
    reward: float | None = None
    """The episode's reward, from 0 to 1; only with ``done``. None: the environment does not judge."""
    feedback: str = ""
    """What the model may learn from a reward below 1; may be empty."""
    invalid_calls: int = 0
    """Number of the message's calls that could not be run as written."""
    failed: bool = False
    """Whether the episode ended because the environment failed; ``feedback`` says how."""
    shortened: int = 0
    """Characters that the longest truncated observation had at least; 0: none was truncated. The package sets it."""


@runtime_checkable
class Environment(Protocol):
    """One episode's world. A new one is created for every episode and used by one thread at a time.

    Calls come in the order ``reset``, ``step`` any number of times, ``close``. ``close`` may also come earlier.
    """

    tools: list[dict[str, Any]]
    """JSON schemas of the tools that the chat template shows, the same in every episode; may be empty."""

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """Begin the episode of a raw row. Return the messages that follow the row's prompt, often none."""
        ...

    def step(self, message: Message) -> Step:
        """Answer the model's message: run its ``tool_calls``, or report why a call is ``invalid``."""
        ...

    def close(self) -> None:
        """Release the episode's resources. A second call does nothing."""
        ...


@dataclass(frozen=True)
class EnvironmentFactory:
    """Creates the environment of each episode."""

    make: Callable[[], Environment]
    judges: bool = True
    """Whether episodes may have rewards; False if it is known in advance that they have none. A scorer then judges."""

    def __call__(self) -> Environment:
        """Create the environment of one episode."""
        return self.make()
