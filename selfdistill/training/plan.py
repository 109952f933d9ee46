"""A dry run: the resolved settings, one example as student and teacher see it, and the cost of a step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from selfdistill.config import TrainConfig, dump_yaml, without_defaults
from selfdistill.data import Demonstration, load_demonstrations
from selfdistill.errors import UserError, number_of
from selfdistill.evaluation import check_inputs
from selfdistill.methods import lacks_of, own_errors, stages_of
from selfdistill.model import LoadedModel, rest_engine
from selfdistill.runtime import (
    GPUS,
    THIS,
    Printable,
    check_tracker,
    own_memory,
    peak_memory,
    unobeyed,
    world_size,
)
from selfdistill.training.first_lines import first_lines
from selfdistill.training.fitting import Fit, fit
from selfdistill.training.memory_result import MemoryPlan
from selfdistill.training.rates import Rates, measured_rates, named_rates
from selfdistill.training.schedule import steps_of
from selfdistill.training.setup import check_parts, check_parts_are_equal, make_accelerator
from selfdistill.training.step_time import duration_text
from selfdistill.training.traced_step import Device
from selfdistill.training.train import check_output_dir, plan_memory, with_context
from selfdistill.training.trainer import Trainer


@dataclass(frozen=True, repr=False)
class Plan(Printable):
    """The result of ``train --dry_run``."""

    config: TrainConfig
    """The resolved settings, all of them."""
    given: dict[str, Any]
    """The given settings that differ from their defaults, without those in a temporary folder."""
    chosen: dict[str, Any]
    """The settings that were left open, with the values that the run chose."""
    notes: list[str]
    """Lines that the run would print at its start."""
    student_prompt: str
    """The first example as the student sees it, including special tokens."""
    teacher_prompt: str | None
    """The same for the teacher; None if the method has no teacher."""
    completion: str
    """The demonstration with its end token; "" if the row has no completion."""
    step_seconds: float
    """Seconds per optimizer step on this machine; the second of two steps."""
    total_seconds: float
    """Seconds for ``max_steps`` steps, without evaluations and checkpoints."""
    peak_gib: float
    """Peak memory of these steps in GiB: of the device with CUDA, else of the process."""
    memory: MemoryPlan | None
    """Maximum memory of a step, if all completions have maximum length; None if unknown."""

    def print(self, console: Console) -> None:
        """Print all of it."""
        parts = [
            "# the first example, as the student sees it",
            self.student_prompt,
            *(["\n# as the teacher sees it", self.teacher_prompt] if self.teacher_prompt is not None else []),
            *(["\n# the demonstration", self.completion] if self.completion else []),
            "\n# the given settings that differ from the defaults (the run's config.yaml will have all)",
            dump_yaml(self.given).rstrip(),
            *(["\n# settings that the run chose", dump_yaml(self.chosen).rstrip()] if self.chosen else []),
            "\n# the run",
            *self.notes,
            f"{self.step_seconds:.1f} s per step, {duration_text(self.total_seconds)} for "
            f"{number_of(self.config.max_steps, 'step')}, peak memory {self.peak_gib:.1f} GiB; nothing was written",
        ]
        for part in parts:
            console.print(unobeyed(part), markup=False, highlight=False, soft_wrap=True)
        if self.memory is not None:
            self.memory.print(console)


def plan(
    config: TrainConfig,
    loaded: LoadedModel | None = None,
    *,
    own_files: Sequence[str] = (),
    temporary: str | None = None,
) -> Plan:
    """Prepare a run, take two steps in memory, and discard them.

    Args:
        config: settings of the run.
        loaded: the model, if already loaded; a copy of it is trained.
        own_files: names of files that may be in the run folder before the run.
        temporary: a folder that exists only for the plan.

    Raises:
        UserError: any error that would stop the run at its start, except that the run folder exists.
    """
    asked_for = config
    try:
        check_output_dir(config.output_dir, resume=False, own_files=own_files)
        notes = []
    except UserError as error:  # nothing is written there
        notes = [f"note: {error}"]
    check_tracker(config.report_to)
    stages = stages_of(config)
    rows = _checked_rows(config, own_files)
    loaded = copy.deepcopy(loaded)
    memory, lines = plan_memory(config, rows, loaded, always=True)
    config = memory.config if memory else config
    config = with_context(config, rows, loaded)
    unmeasured: dict[str, Any] = {"drift_steps": 0, "test": None}
    all_rows = True
    if any(part.method.drawn for parts in stages for part in parts):  # one batch of samples is enough to see
        count = min(len(rows), config.num_demonstrations or len(rows))
        steps = steps_of(config, count, share=stages[0][0].share)
        unmeasured |= {"num_demonstrations": min(count, config.batch_size), "max_steps": steps}
        all_rows = count <= config.batch_size
        if not all_rows:
            notes.append(f"note: for this plan, samples of {config.batch_size} of {count} rows were drawn")
    trainer = Trainer(config.model_copy(update=unmeasured), rows, loaded=loaded)
    asked = {name: getattr(config, name) for name in ("drift_steps", "test", "num_demonstrations")}
    resolved = trainer.config.model_copy(update=asked)
    notes += [*first_lines(trainer, all_rows=all_rows), *lines]
    example = trainer.stages[0].task.examples[0]
    with own_errors(config.method):
        trainer.step(0)
        began = time.monotonic()
        trainer.step(min(1, (resolved.max_steps or 1) - 1))
        seconds = time.monotonic() - began
    decode = trainer.loaded.tokenizer.decode
    open_, own = asked_for.model_dump(), without_defaults(asked_for)
    return Plan(
        config=resolved,
        given={name: value for name, value in own.items() if temporary is None or temporary not in str(value)},
        chosen={name: value for name, value in resolved.model_dump().items() if value != open_[name]},
        notes=notes,
        student_prompt=str(decode(example.student_ids)),
        teacher_prompt=None if example.teacher_ids is None else str(decode(example.teacher_ids)),
        completion=str(decode(example.completion_ids)),
        step_seconds=seconds,
        total_seconds=seconds * (resolved.max_steps or 0),
        peak_gib=peak_memory(trainer.loaded.device) / 2**30,
        memory=memory,
    )


def plan_for(
    config: TrainConfig,
    memory: int | None,
    device: str | None,
    loaded: LoadedModel | None = None,
    *,
    own_files: Sequence[str] = (),
    count: int | None = None,
) -> Fit:
    """Plan a run's memory and time on a device, without reading weights or computing anything of the run.

    Args:
        config: settings of the run. Where ``mixed_precision`` is ``auto``, it is bf16 on a GPU.
        memory: memory of each device in bytes; None: that of ``device``.
        device: a GPU of ``GPUS``, or ``this``; None: a GPU of unknown speed, without a plan of the time.
        loaded: the model, if already loaded.
        own_files: names of files that may be in the run folder before the run.
        count: number of devices, each with a process of its own; None: as many as there are processes now.

    Raises:
        UserError: settings, data, ``config.json`` or tokenizer are invalid, or neither device nor memory is given.
    """
    processes = count or world_size()
    rows = _checked_rows(config, own_files, processes)
    rates: Callable[[str], Rates] | None = None
    if device == THIS:
        rest_engine()  # of an earlier call in this process
        accelerator = make_accelerator(config)
        own = Device.of(accelerator)
        has: float | None = own_memory(accelerator.device)
        rates = partial(measured_rates, accelerator.device)
    else:
        own, has = Device("cuda", "bf16", processes), None
        if device is not None:
            has = GPUS[device].memory_gb * 1e9
            rates = partial(named_rates, device)
    limit = has if memory is None else memory
    if limit is None:
        raise UserError("setting 'memory': the memory of this device is unknown; give it, such as 80GiB")
    return fit(config, rows, own, int(limit), loaded, rates)


def _checked_rows(config: TrainConfig, own_files: Sequence[str], processes: int | None = None) -> list[Demonstration]:
    check_inputs(config, own_files, lacks_of(stages_of(config)))
    check_parts_are_equal(config, processes or world_size())
    check_parts(config, processes)
    return load_demonstrations(config.data, split=config.split, turns=config.turns)
