"""What sharded processes hold of a step's memory (FSDP2), by a formula; see :mod:`selfdistill.model.fsdp`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfdistill.config import TrainConfig
from selfdistill.model import LoadedModel, TeacherRule, layers_of, tensor_bytes, unwrap
from selfdistill.training.planned_parts import planned_methods
from selfdistill.training.setup import teacher_rules
from selfdistill.training.traced_step import Bytes, Device

SAMPLING = ("sampling", "drawing")
"""Phases in which every process runs passes of its own."""


@dataclass(frozen=True)
class Sharding:
    """Turns what a phase adds on one process with all weights into what it adds on each of several, in bytes.

    Sampling gathers all weights of the student. Elsewhere, the weights outside the layers are gathered, of every
    network at once, and of one network two layers at a time, in bfloat16 with that arithmetic. The layers' gradients
    are sharded at once, the others' at the end of the backward pass.
    """

    processes: int
    roots: tuple[int, ...]
    """Weights outside the layers, by network; the student is the first."""
    trained_root: int
    """Of the student's, those with gradients."""
    student: int
    """The student's layers, gathered."""
    two_layers: int
    """Two layers, gathered, of the network with the largest."""
    largest: int
    """The student's largest weight."""

    @classmethod
    def of(
        cls, config: TrainConfig, device: Device, loaded: LoadedModel, others: dict[TeacherRule, LoadedModel]
    ) -> Sharding:
        """Of a run's networks.

        Raises:
            UserError: a model does not declare its layers.
        """
        rules = teacher_rules(planned_methods(config))
        copies = [rule for rule in rules if rule in others or (not config.lora_rank and rule.kind != "live")]
        networks = [loaded.model, *(others.get(rule, loaded).model for rule in copies)]
        layers = [layers_of(loaded, network, "fsdp") for network in networks]
        gathered = [_gathered(network, own, device) for network, own in zip(networks, layers, strict=True)]
        trained = [p for p in loaded.model.parameters() if p.requires_grad]
        return cls(
            processes=device.processes,
            roots=tuple(tensor_bytes(_outside(n.parameters(), own)) for n, own in zip(networks, layers, strict=True)),
            trained_root=tensor_bytes(_outside(trained, layers[0])),
            student=sum(gathered[0]),
            two_layers=2 * max(map(max, gathered)),
            largest=max(p.nbytes for p in loaded.model.parameters()),
        )

    def __call__(self, phase: str, added: Bytes) -> Bytes:
        """What each process adds in a phase."""
        found = Bytes(added)
        samples = phase in SAMPLING
        held = self.roots[0] + self.student if samples else sum(self.roots) + self.two_layers
        found["casts"] = min(added["casts"], max(self.roots) // 2) + held
        found["gradients"] = added["gradients"] // self.processes + (self.trained_root if added["gradients"] else 0)
        return found


def _outside(weights: Iterable[Tensor], layers: Sequence[nn.Module]) -> list[Tensor]:
    within = {id(p) for layer in layers for p in layer.parameters()}
    return [p for p in weights if id(p) not in within]


def _gathered(network: nn.Module, layers: Sequence[nn.Module], device: Device) -> list[int]:
    """Bytes of each layer while its weights are gathered."""
    dtype = torch.bfloat16 if device.mixed_precision == "bf16" else unwrap(network).dtype
    return [dtype.itemsize * sum(p.numel() for p in layer.parameters()) for layer in layers]
