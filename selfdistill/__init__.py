"""Self-distillation fine-tuning: the model that sees a demonstration teaches the same model without it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from selfdistill.api import (
        ask,
        check,
        compare,
        evaluate,
        export,
        learn,
        make_questions,
        memory_plan,
        merge,
        plan,
        report,
        train,
    )
    from selfdistill.config import TrainConfig
    from selfdistill.data import Demonstration, load_demonstrations
    from selfdistill.errors import RunFailed, RunStopped, UserError
    from selfdistill.model import close_engine
    from selfdistill.training import Run

_HOMES = {
    "api": "ask check compare evaluate export learn make_questions memory_plan merge plan report train",
    "config": "TrainConfig",
    "data": "Demonstration load_demonstrations",
    "errors": "RunFailed RunStopped UserError",
    "model": "close_engine",
    "training": "Run",
}
"""Public names by their home. They are imported on first use, so that ``import selfdistill`` is fast."""

__all__ = [
    "Demonstration",
    "Run",
    "RunFailed",
    "RunStopped",
    "TrainConfig",
    "UserError",
    "ask",
    "check",
    "close_engine",
    "compare",
    "evaluate",
    "export",
    "learn",
    "load_demonstrations",
    "make_questions",
    "memory_plan",
    "merge",
    "plan",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            value = getattr(import_module(f"selfdistill.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'selfdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
