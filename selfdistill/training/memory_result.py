"""The result of a memory plan: what a run needs, by component and phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from selfdistill.config import TrainConfig
from selfdistill.runtime import Printable, result_table
from selfdistill.training.traced_step import Bytes, Device, arithmetic

GIB, MIB = 2**30, 2**20
COMPONENTS = (
    *("weights", "teacher", "average", "other model", "moments", "gradients", "casts", "activations"),
    *("loss", "keys and values", "workspace", "contexts", "pictures", "drift", "engine"),
)
"""In the order of the table."""


@dataclass(frozen=True)
class Phase:
    """A phase of a step at its peak."""

    name: str
    bytes: Bytes
    """By component."""

    @property
    def total(self) -> int:
        return self.bytes.total()


@dataclass(frozen=True, repr=False)
class MemoryPlan(Printable):
    """Memory of a run, on each of its processes, if all completions of a batch have maximum length."""

    config: TrainConfig
    device: Device
    phases: tuple[Phase, ...]
    """Of the step, at its largest."""
    lengths: tuple[int, int]
    """Tokens of the longest row: of the student's prompt with the completion, and of the teacher's."""
    dtype: torch.dtype
    """Data type of the weights, also where it is ``auto`` in the settings."""
    untraced: str | None
    """Why the step is not counted; None if it is."""
    host: int = 0
    """Bytes of host memory besides a GPU's, for the teacher's average."""

    @property
    def largest(self) -> Phase:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.largest.total

    def line(self) -> str:
        """One line with the components of the peak."""
        _, size = _unit(self.peak)
        parts = ", ".join(f"{name} {self.largest.bytes[name] / size:.1f}" for name in _shown([self.largest]))
        beside = f"; {self._host()}" if self.host else ""
        beside += f"; not counted: {self.untraced}" if self.untraced else ""
        return f"memory by plan: at most {size_text(self.peak)} ({parts}){beside}"

    def _host(self) -> str:
        each = " for each device" if self.device.processes > 1 else ""
        return f"{size_text(self.host)} of host memory in addition{each}, for the teacher's average"

    def print(self, console: Console) -> None:
        """Print a table of components by phase."""
        config = self.config
        kind = f"LoRA rank {config.lora_rank}" if config.lora_rank else "full fine-tuning"
        products = "bfloat16" if arithmetic(self.dtype, self.device.mixed_precision) == "bf16" else "float32"
        batch = f"batch {config.batch_size} in {config.micro_batches}"
        held = "4-bit" if config.load_in_4bit else str(self.dtype).removeprefix("torch.")
        lines = [
            f"{config.model}: {kind}, {held} weights, {config.optim}, {products} arithmetic, {batch}; "
            f"longest rows {self.lengths[0]} tokens, teacher's {self.lengths[1]}"
        ]
        if self.device.processes > 1:
            held = "which share the weights (fsdp)" if config.fsdp else "which all hold all weights"
            lines.append(f"for each of {self.device.processes} devices, {held}")
        elif config.fsdp:
            lines.append("for one device, on which fsdp shards nothing; for several, give memory 8x80GiB")
        if self.untraced:
            lines.append(f"not counted: {self.untraced}")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        unit, size = _unit(self.peak)
        table = result_table(f"{unit} by plan", *(phase.name for phase in self.phases))
        for name in _shown(self.phases):
            table.add_row(name, *(f"{phase.bytes[name] / size:.1f}" for phase in self.phases))
        table.add_section()
        table.add_row("sum", *(f"{phase.total / size:.1f}" for phase in self.phases))
        console.print(table)
        if self.host:
            console.print(self._host(), markup=False, highlight=False, soft_wrap=True)


def size_text(size: int) -> str:
    """A number of bytes as readable text."""
    name, unit = _unit(size)
    return f"{size / unit:.1f} {name}"


def _unit(size: int) -> tuple[str, int]:
    return ("GiB", GIB) if size >= GIB else ("MiB", MIB)


def _shown(phases: Sequence[Phase]) -> list[str]:
    """The components that are at least a thousandth of the largest phase."""
    least = max(phase.total for phase in phases) / 1000
    return [name for name in COMPONENTS if any(phase.bytes[name] > least for phase in phases)]
