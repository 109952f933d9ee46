"""Sampling with a separate engine: which one a model uses, and which one this process runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from selfdistill.config import EngineSettings
from selfdistill.model.head import unwrap
from selfdistill.model.loading import LoadedModel
from selfdistill.runtime import say_note, world_size

if TYPE_CHECKING:  # that module asks this one for the engine
    from selfdistill.model.sampling import Rollout, Sampling


Answered = Literal["completion", "episode"]
"""What follows a prompt."""


class Engine(Protocol):
    """Samples completions with its own weights, which it updates whenever the model's differ."""

    name: str
    """Its name, version and arithmetic, on which its samples depend."""
    failed: str | None
    """Why it must no longer be used; None while it works."""
    sync_s: float
    """Seconds spent so far on loading weights."""

    def sample(
        self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None
    ) -> list[Rollout]:
        """As :func:`selfdistill.model.sampling.sample`."""

    def check_room(self, prompts: Sequence[Sequence[int]], tokens: int, what: Answered = "completion") -> None:
        """Refuse prompts after which it has no room for so many tokens of a completion or an episode.

        Raises:
            UserError: names the settings that limit them.
        """

    def describe(self) -> str:
        """Its name and capacity."""

    def rest(self) -> None:
        """Free memory until the next sample, if the device allows it."""

    def close(self) -> None:
        """Shut the engine down and free its memory."""


@dataclass(frozen=True)
class _Kind:
    """The kind of model that an engine is built for. It can sample from any model of this kind, one at a time."""

    settings: EngineSettings
    architecture: str
    dtype: torch.dtype


_AT_A_TIME = 512
"""Prompts that an engine gets at once. It batches by itself; with few prompts it would often wait for the last one."""

_running: tuple[_Kind, Engine] | None = None


def use_engine(loaded: LoadedModel, settings: EngineSettings) -> None:
    """Sample from the model with the engine of the settings from now on; the engine starts when it is first needed."""
    own = {name: getattr(settings, name) for name in EngineSettings.model_fields}
    loaded.engine = None if settings.engine == "none" else EngineSettings(**own)


def engine_for(loaded: LoadedModel) -> Engine:
    """The engine that samples from the model in the current arithmetic: autocast's, or that of its weights.

    A process runs one engine at a time. An engine of another kind, or a failed one, is closed first. All ranks start
    theirs together.

    Raises:
        UserError: the engine is not installed, or does not support the model or the machine.
        EngineFailed: the engine does not start.
    """
    global _running
    assert loaded.engine is not None
    kind = _Kind(loaded.engine, _architecture(loaded.model), _arithmetic(loaded))
    if _running is not None and _running[0] == kind and not _running[1].failed:
        return _running[1]
    close_engine()
    from selfdistill.model.vllm_engine import VllmEngine
    from selfdistill.model.vllm_server import VllmServers

    of_kind = VllmServers if kind.settings.engine_url else VllmEngine
    engine: Engine = of_kind(loaded, kind.settings, kind.dtype)
    _running = kind, engine
    say_note(f"sampling with {engine.describe()}")
    return engine


def prompts_at_a_time(loaded: LoadedModel, batch_size: int) -> int:
    """How many prompts to sample from at once: a batch in every process, or at least 512 with an engine."""
    return batch_size * world_size() if loaded.engine is None else max(batch_size, _AT_A_TIME)


def engine_runs() -> bool:
    """Whether an engine samples in this process, in which case its library may have process groups."""
    return _running is not None


def rest_engine() -> None:
    """Free the memory of this process's engine, if any, until the next sample; on a GPU only. All ranks call it."""
    if _running is not None:
        _running[1].rest()


def close_engine() -> None:
    """End the engine that samples in this process, if any, and free its memory.

    The next call that needs one starts it again. Servers keep running. Under ``accelerate launch`` all processes call
    it together.
    """
    global _running
    if _running is not None:
        engine, _running = _running[1], None
        engine.close()


def _architecture(model: Any) -> str:
    """The model's configuration without entries that do not change its layers."""
    config = unwrap(model).config.to_dict()
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, default=str)


def _arithmetic(loaded: LoadedModel) -> torch.dtype:
    device = loaded.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = unwrap(loaded.model).dtype
    return dtype
