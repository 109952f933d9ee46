"""A stand-in for the client of OpenEnv's echo environment, which docs/agents.md wraps: its calls, without a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EchoAction:
    message: str


@dataclass(frozen=True)
class EchoObservation:
    echoed_message: str


@dataclass(frozen=True)
class StepResult:
    observation: EchoObservation
    reward: float
    done: bool


class EchoEnv:
    def __init__(self, base_url: str) -> None:
        self.open = False

    def sync(self) -> EchoEnv:
        return self

    def connect(self) -> None:
        self.open = True

    def reset(self) -> StepResult:
        return self._said("Echo environment ready!", 0.0)

    def step(self, action: EchoAction) -> StepResult:
        assert isinstance(action, EchoAction)
        return self._said(action.message, 0.1 * len(action.message))

    def close(self) -> None:
        self.open = False

    def _said(self, text: str, reward: float) -> StepResult:
        assert self.open
        return StepResult(EchoObservation(text), reward, done=False)
