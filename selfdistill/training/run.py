"""A run as a result object: its folder, its metrics, and replies of its model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from rich.console import Console

from selfdistill.config import AskConfig, TrainConfig, load_saved
from selfdistill.data import Message, load_demonstrations
from selfdistill.errors import UserError, closest, found_value, similar_inside
from selfdistill.evaluation import generate, note_on_environment, summary, system_turn_of, with_system_turn
from selfdistill.model import LoadedModel, load_model, to_best_device
from selfdistill.runtime import Printable, is_rank0, quiet_libraries, read_lines
from selfdistill.training.checkpoint import list_checkpoints, saved_position

OPTIONS = ("max_completion_length", "temperature", "top_p", "seed", "chat_template_kwargs", "dtype", "adapter_base")
"""Of :meth:`Run.generate`."""


@dataclass(frozen=True, repr=False, init=False)
class Run(Printable):
    """A run folder. ``Run("runs/skill")`` opens an existing one."""

    output_dir: Path

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "output_dir", Path(output_dir))
        if is_rank0() and not self.output_dir.is_dir():
            hint = similar_inside(str(self.output_dir.absolute())) or ""
            raise UserError(f"run {str(output_dir)!r}: no such folder{hint}")
        if is_rank0() and not (self.output_dir / "config.yaml").is_file():
            raise UserError(f"run {str(output_dir)!r}: no config.yaml in it, so it is not a run folder")

    def __fspath__(self) -> str:
        return str(self.output_dir)

    def __getstate__(self) -> dict[str, Any]:
        return {"output_dir": self.output_dir}  # not the model that generate() has loaded

    @property
    def final(self) -> Path:
        """Folder of the final model, for ``from_pretrained``."""
        return self.output_dir / "final"

    @property
    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints, for ``selfdistill.export``."""
        return [saved_position(path).step for path in list_checkpoints(self.output_dir)]

    @property
    def config(self) -> TrainConfig:
        """The resolved settings."""
        return TrainConfig(**load_saved(self.output_dir / "config.yaml", TrainConfig))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per step, as in ``metrics.jsonl``."""
        return read_lines(self.output_dir / "metrics.jsonl")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One dict per evaluation on ``test``, as in ``evaluations.jsonl``."""
        return read_lines(self.output_dir / "evaluations.jsonl")

    def _load(self, **options: Any) -> LoadedModel:
        """The final model; loaded again if the options are not those of the last call."""
        before, loaded = self.__dict__.pop("_loaded", (None, None))
        if loaded is None or before != options:
            note_on_environment(str(self.output_dir), self.config.model_dump())
            del loaded  # before another takes its memory
            with quiet_libraries():
                loaded = to_best_device(load_model(str(self.final), **options))
        self.__dict__["_loaded"] = options, loaded
        return loaded

    @cached_property
    def _system_turn(self) -> str | None:
        return system_turn_of(self.output_dir)

    @overload
    def generate(self, prompt: str, *, system: str | None = None, **options: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str | Sequence[Message]], *, system: str | None = None, **options: Any
    ) -> list[str]: ...
    def generate(self, prompt: Any, *, system: str | None = None, **options: Any) -> Any:
        """Generate the final model's reply to a prompt, or its replies to a list of prompts. Greedy by default.

        The first call loads the model; later calls with the same ``dtype`` and ``adapter_base`` reuse it. Tools are not
        shown; ``selfdistill.ask`` with an environment plays an episode.

        Args:
            prompt: text (one user turn), or a list of prompts, each text or chat messages.
            system: a system turn before each prompt that has none; "": none. Default: that of the training rows, if
                the same one begins all rows of the run.
            options: ``max_completion_length`` (tokens), ``dtype`` and ``chat_template_kwargs``, by default those of the
                run; ``temperature``, ``top_p``, ``seed``; ``adapter_base``, the base of an adapter, if it was moved.

        Raises:
            UserError: the prompt is neither or has a system turn beside ``system``, an option is wrong, or there is no
                final model.
        """
        if isinstance(prompt, list | tuple) and any(isinstance(one, dict) for one in prompt):
            raise UserError("prompt: found messages, expected text or a list of prompts; put the messages into a list")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not all(isinstance(one, str | list | tuple) for one in prompts):
            raise UserError(f"prompt: found {found_value(prompt)}, expected text or a list of prompts")
        options = self._options(options)
        rows = load_demonstrations([{"prompt": one} for one in prompts], prompts_only=True, name="prompt")
        chats = with_system_turn([row.prompt for row in rows], system, lambda: self._system_turn)
        loaded = self._load(**{name: options.pop(name) for name in ("dtype", "adapter_base")})
        replies = generate(loaded, chats, **options)
        return replies[0] if isinstance(prompt, str) else replies

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options of :meth:`generate` with those of the run that are not given.

        Raises:
            UserError: an option is unknown or has a wrong value.
        """
        for name in given:
            if name not in OPTIONS:
                hint = closest(name, OPTIONS, f", expected one of {', '.join(OPTIONS)}")
                raise UserError(f"generate: unknown option {name!r}{hint}")
        kept = ("max_completion_length", "chat_template_kwargs", "dtype")
        options = {"adapter_base": None} | {name: getattr(self.config, name) for name in kept} | given
        asked: dict[str, Any] = {name: value for name, value in options.items() if name != "top_p"}
        AskConfig(run=str(self.final), question="", **asked)  # refuses wrong values
        return options

    def print(self, console: Console) -> None:
        """Print what was trained, the first and last loss, and the evaluations."""
        config, metrics = self.config, self.metrics
        lines = [
            f"Run {self.output_dir}: {config.method} on {config.model}, {len(metrics)} of {config.max_steps} steps"
        ]
        losses = [line["loss"] for line in metrics if "loss" in line]
        if losses:
            lines.append(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
        lines += [f"step {found['step']}: {summary(found)}" for found in self.evaluations]
        if self.final.is_dir():
            lines.append(f"final model: {self.final}")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
