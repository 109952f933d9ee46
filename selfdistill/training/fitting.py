"""Whether a run fits into a device's memory, and the nearest settings that would."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from rich.console import Console

from selfdistill.config import OPEN, TrainConfig
from selfdistill.data import Demonstration
from selfdistill.errors import UserError
from selfdistill.model import LoadedModel, can_be_in_4bit
from selfdistill.runtime import Printable, all_gather, free_memory, local_world_size
from selfdistill.training.memory import MemoryPlanner, has_moving_teacher
from selfdistill.training.memory_result import MemoryPlan, size_text
from selfdistill.training.rates import Rates
from selfdistill.training.setup import check_parts, check_parts_are_equal
from selfdistill.training.step_time import TimePlan
from selfdistill.training.traced_step import Device

LORA_RANK = 16
"""Rank of a proposed adapter."""
MOST_CHANGES = 4
"""Maximum changes of settings in a proposal."""
AIMS = {"cuda": 0.9}
"""The share of a device's memory that chosen and proposed settings fill at most, if any can; elsewhere all of it.

The rest is for what a plan does not count, such as fragmentation of the allocator. An estimate, not measured.
"""
WITHOUT_ADAPTER = ("teacher", "optim")
"""Settings whose change saves memory only without an adapter."""

Changes = dict[str, Any]
Found = tuple[Changes, MemoryPlan]
"""Changes, and the plan with them."""
IN_4BIT: Changes = {"load_in_4bit": True}
"""Proposed last, and only with an adapter."""


@dataclass(frozen=True, repr=False)
class Fit(Printable):
    """A run's plan compared with the memory of a device."""

    plan: MemoryPlan
    """Plan of the settings, including chosen values for open ones."""
    limit: int
    """Memory of the device in bytes."""
    chosen: Changes
    """Values chosen for open settings so that the plan fits; empty if it fits without them, or not at all."""
    nearest: Found | None
    """The plan that fits with the fewest changes of settings, if this one does not; None if there is none."""
    nearest_full: Found | None = None
    """The same without an adapter, if ``nearest`` adds one; None if there is none."""
    time: TimePlan | None = None
    """Rough time; None if the device's rates are unknown."""

    @property
    def fits(self) -> bool:
        """Whether the plan's peak is within the limit."""
        return self.plan.peak <= self.limit

    def verdict(self) -> str:
        """Whether it fits, and otherwise what would."""
        devices = self.plan.device.processes
        sizes = f"{size_text(self.plan.peak)} of {size_text(self.limit)}"
        sizes += f" on each of {devices} devices" if devices > 1 else ""
        if not self.fits:
            return f"it does not fit: {sizes}; {self.advice()}"
        fits = "what stays between steps fits" if self.plan.untraced else "it fits"
        return f"{fits}: {sizes}{self.choice()}"

    def choice(self) -> str:
        """The chosen settings, as the end of a line; empty if there are none."""
        return f"; chosen for that: {_options(self.chosen)}" if self.chosen else ""

    def advice(self) -> str:
        """Settings that would fit, if any."""
        if self.nearest is None:
            return "no change of settings makes it fit; use a smaller model, or shorter prompts and completions"
        text = f"this would, with {_described(self.nearest)}"
        return text + (f"; or, without an adapter, with {_described(self.nearest_full)}" if self.nearest_full else "")

    def print(self, console: Console) -> None:
        """Print the table of the plan, the rough time and the verdict."""
        self.plan.print(console)
        for line in ([self.time.line()] if self.time else []) + [self.verdict()]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``; sizes in bytes."""
        return {
            "memory": self.limit,
            "devices": self.plan.device.processes,
            "peak": self.plan.peak,
            "fits": self.fits,
            "chosen": self.chosen,
            "phases": {phase.name: dict(phase.bytes) for phase in self.plan.phases},
            "machine_memory": self.plan.host,
            "not_counted": self.plan.untraced,
            "nearest": self.nearest and self.nearest[0],
            "nearest_without_adapter": self.nearest_full and self.nearest_full[0],
            "time": self.time and self.time.to_dict(),
        }


def fit(
    config: TrainConfig,
    demonstrations: Sequence[Demonstration],
    device: Device,
    limit: int,
    loaded: LoadedModel | None = None,
    rates: Callable[[str], Rates] | None = None,
) -> Fit:
    """Plan a run and compare it with a device.

    Args:
        config: settings of the run.
        demonstrations: its rows.
        device: the device to plan for.
        limit: memory of the device in bytes.
        loaded: the model, if already loaded.
        rates: gives the device's for an arithmetic, ``bf16`` or ``no``, to also plan the time.

    Raises:
        UserError: the model's files cannot be used, or no row fits.
    """
    planner = MemoryPlanner(config, demonstrations, device, loaded)
    found = fitted(planner, config, limit)
    return found if rates is None else replace(found, time=planner.time(config, rates(planner.arithmetic(config))))


def fitted(planner: MemoryPlanner, config: TrainConfig, limit: int) -> Fit:
    """Choose open settings so that a run fits, else find the nearest settings that would; see :class:`Fit`."""
    plan, aim = planner.plan(config), int(limit * AIMS.get(planner.device(config).kind, 1))
    if plan.peak <= aim:
        return Fit(plan, limit, {}, None)
    if found := _nearest(planner, config, aim, only_open=True) or _smallest_plan(planner, config, limit):
        chosen, plan = found
        return Fit(plan, limit, chosen, None)
    if sharded := _sharded(planner, config, aim):
        return Fit(plan, limit, {}, sharded)
    nearest, full = _nearest(planner, config, aim) or _nearest(planner, config, limit), None
    if nearest and "lora_rank" in nearest[0]:
        full = _nearest(planner, config, aim, adapter=False)
    return Fit(plan, limit, {}, nearest, full)


def _smallest_plan(planner: MemoryPlanner, config: TrainConfig, limit: int) -> Found | None:
    """The open settings that save most, or none if the plan is not smaller with them; None if it does not fit."""
    saving = _saving(planner, config)
    tried: list[Found] = [(changes, planner.plan(config.model_copy(update=changes))) for changes in ({}, saving)]
    changes, plan = min(tried, key=lambda found: found[1].peak)
    return (changes, plan) if plan.peak <= limit else None


def _sharded(planner: MemoryPlanner, config: TrainConfig, limit: int) -> Found | None:
    """The plan with sharded weights, if several devices can share them and it fits; this changes no result."""
    processes, sharded = planner.device(config).processes, config.model_copy(update={"fsdp": True})
    refused = config.torch_compile or config.load_in_4bit or config.optim == "adamw_8bit" or planner.has_pictures
    if config.fsdp or processes == 1 or refused or planner.has_model:  # a loaded model would stay sharded
        return None
    try:
        check_parts_are_equal(sharded, processes)
        check_parts(sharded, processes)
        plan = planner.plan(sharded)
    except UserError:  # the batch cannot be divided, or the model not sharded
        return None
    if plan.peak <= limit:
        return {"fsdp": True}, plan
    found = _nearest(planner, sharded, limit, only_open=True)
    return found and ({"fsdp": True} | found[0], found[1])


def plan_that_fits(planner: MemoryPlanner, config: TrainConfig, limit: int | None) -> tuple[MemoryPlan, list[str]]:
    """A run's plan, with values for open settings, and lines about it for its start.

    The longest rows rarely share a batch, and samples are mostly shorter than ``max_completion_length``. So a run is
    refused only if it cannot fit even with the shortest rows and samples of one token. It gets a warning if it does not
    fit with the longest. In both cases the open settings save as much as they can.

    Raises:
        UserError: it cannot fit; the message names the nearest settings that would.
    """
    if limit is None:
        plan = planner.plan(config)
        check_host_fits(plan)
        return plan, [plan.line()]
    found = fitted(planner, config, limit)
    if not found.fits and (saving := _saving(planner, config)):
        found = replace(found, plan=planner.plan(config.model_copy(update=saving)), chosen=saving)
    check_host_fits(found.plan)
    lines = [f"{found.plan.line()}; {size_text(limit)} free{found.choice()}"]
    if found.fits:
        return found.plan, lines
    least = planner.plan(found.plan.config, least=True)
    if least.peak > limit:
        shared = planner.device(config).kind == "cpu" and local_world_size() > 1
        each = f" for each of {local_world_size()} processes" if shared else ""
        raise UserError(
            f"{size_text(limit)} of memory are free{each}, but the run needs at least {size_text(least.peak)}, or with "
            f"the longest rows {size_text(found.plan.peak)}; {found.advice()}"
        )
    student, teacher = found.plan.lengths
    note = f"note: it does not fit if all rows of a batch are as long as the longest, {max(student, teacher)} tokens"
    note += f"; {found.advice()}"
    return found.plan, [*lines, note]


def check_host_fits(plan: MemoryPlan) -> None:
    """Check that the teacher's average of every process of this machine fits into its memory; else it would kill them.

    Raises:
        UserError: it does not.
    """
    if not plan.host:
        return
    processes = local_world_size()
    free = min(free for free in all_gather([free_memory(torch.device("cpu"))]) if free is not None)
    if processes * plan.host > free:
        of_all = f" in {processes} processes" if processes > 1 else ""
        adapter = "" if plan.config.train_vision_tower else f", or lora_rank {LORA_RANK}"
        raise UserError(
            f"{size_text(free)} of the machine's memory are free, but the teacher's float32 average needs "
            f"{size_text(processes * plan.host)}{of_all}; use teacher frozen or live{adapter}"
        )


def _described(found: Found) -> str:
    changes, plan = found
    return f"{size_text(plan.peak)}: {_options(changes)}"


def _options(changes: Changes) -> str:
    return ", ".join(f"{name} {str(value).lower()}" for name, value in changes.items())


def _nearest(
    planner: MemoryPlanner, config: TrainConfig, limit: int, *, only_open: bool = False, adapter: bool = True
) -> Found | None:
    """The fewest changes that fit; for equal numbers, those that change the result least come first.

    They include 4-bit weights only if nothing else fits. ``only_open``: change only settings of
    ``OPEN`` that are not given. ``adapter``: may add one.
    """
    moves, micro_batch_choices = _changes(planner, config, only_open=only_open)
    if not adapter:
        moves = [moved for moved in moves if "lora_rank" not in moved]
    if found := _fewest(planner, config, limit, moves, micro_batch_choices):
        return found
    if only_open or not adapter or not _may_be_in_4bit(planner, config):
        return None
    return _fewest(planner, config, limit, [*moves, IN_4BIT], micro_batch_choices)


def _may_be_in_4bit(planner: MemoryPlanner, config: TrainConfig) -> bool:
    """Whether a run with these settings and an adapter can have 4-bit weights here."""
    refused = config.load_in_4bit or config.fsdp or config.torch_compile or config.engine != "none"
    return not (refused or planner.has_model or planner.has_pictures) and can_be_in_4bit(config.model)


def _fewest(
    planner: MemoryPlanner, config: TrainConfig, limit: int, moves: list[Changes], micro_batch_choices: list[Changes]
) -> Found | None:
    """The fewest of these changes that fit; another number of micro-batches is one of them."""
    least = _joined(moves)
    if "lora_rank" in least:  # needs the least memory, and works with neither
        least = {name: value for name, value in least.items() if name not in WITHOUT_ADAPTER}
    if not _first_that_fits(planner, config, limit, least, micro_batch_choices[-1:] or [{}]):
        return None
    for count in range(1, MOST_CHANGES + 1):
        for chosen in combinations(moves, count - 1):
            if found := _first_that_fits(planner, config, limit, _joined(chosen), micro_batch_choices):
                return found
        for chosen in combinations(moves, count):
            if found := _first_that_fits(planner, config, limit, _joined(chosen), [{}]):
                return found
    return None


def _joined(changes: Iterable[Changes]) -> Changes:
    """Several changes as one."""
    return {name: value for change in changes for name, value in change.items()}


def _saving(planner: MemoryPlanner, config: TrainConfig) -> Changes:
    """The open settings with the values that save most."""
    moves, micro_batch_choices = _changes(planner, config, only_open=True)
    return _joined([*moves, *micro_batch_choices[-1:]])


def _changes(planner: MemoryPlanner, config: TrainConfig, *, only_open: bool) -> tuple[list[Changes], list[Changes]]:
    """Single changes of settings, and larger numbers of micro-batches."""
    is_open = {name: getattr(config, name) is None for name in OPEN}
    moves = [moved for moved in _moves(config, planner) if not only_open or all(is_open.get(name) for name in moved)]
    if only_open and not is_open["gradient_accumulation_steps"]:
        return moves, []
    shares = planner.device(config).shares(config)
    return moves, [{"gradient_accumulation_steps": count} for count in config.more_micro_batches(shares)]


def _moves(config: TrainConfig, planner: MemoryPlanner) -> Iterator[Changes]:
    """Single changes of settings except micro-batches, ordered by how much they change the result."""
    device = planner.device(config)
    if planner.can_checkpoint and not config.gradient_checkpointing and not config.torch_compile:
        yield {"gradient_checkpointing": True}
    if device.mixed_precision == "no" and device.kind == "cuda":
        yield {"mixed_precision": "bf16"}
    if config.teacher in ("ema", "snapshot") and has_moving_teacher(config) and not config.lora_rank:
        yield {"teacher": "live"}
    # An adapter needs the files of its base, and leaves the vision tower as it is.
    if not config.lora_rank and not planner.has_model and not config.train_vision_tower:
        yield {"lora_rank": LORA_RANK}
    if config.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if config.optim == "adamw_torch" and not config.lora_rank and not config.fsdp:
        yield {"optim": "adamw_8bit"}


def _first_that_fits(
    planner: MemoryPlanner, config: TrainConfig, limit: int, changes: Changes, choices: Sequence[Changes]
) -> Found | None:
    """``changes`` and the first of ``choices`` with which a run fits; each needs less memory than that before."""
    senseless = WITHOUT_ADAPTER if changes.get("lora_rank", config.lora_rank) else IN_4BIT
    if not changes.keys().isdisjoint(senseless):
        return None
    changed = config.model_copy(update=changes)
    if not choices or planner.permanent(changed).total() > limit:
        return None

    def plan(choice: Changes) -> MemoryPlan:
        return planner.plan(changed.model_copy(update=choice))  # each is planned once

    *others, least = choices
    if plan(least).peak > limit:
        return None
    chosen = choices[bisect_left(others, True, key=lambda choice: plan(choice).peak <= limit)]
    return changes | chosen, plan(chosen)
