"""What sharded processes hold by plan, against sizes worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from selfdistill.config import TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.traced_step import Bytes, Device

Make = Callable[..., TrainConfig]
ROOT = 4 * (2 * 300 * 32 + 32)
"""Bytes outside the layers of the tiny model in float32: embeddings, head and the last norm."""


def phases(config: TrainConfig) -> dict[str, Bytes]:
    """Of each of two processes."""
    plan = MemoryPlanner(config, load_demonstrations(config.data), Device("cpu", "no", 2)).plan(config)
    return {phase.name: phase.bytes for phase in plan.phases}


@pytest.mark.parametrize(
    "values",
    [
        {"teacher": "ema"},
        pytest.param({"teacher": "frozen"}, marks=pytest.mark.slow),
        pytest.param({"anchors": "package"}, marks=pytest.mark.slow),
    ],
)
def test_the_weights_outside_the_layers_are_gathered_of_every_copy(settings: Make, values: dict[str, Any]) -> None:
    live, found = (phases(settings(fsdp=True, batch_size=8, **{"teacher": "live"} | x)) for x in ({}, values))
    for name in ("teacher", "student"):
        assert found[name]["casts"] - live[name]["casts"] == ROOT
    assert found["sampling"]["casts"] == live["sampling"]["casts"], "samples are the student's"


def test_an_adapters_teacher_gathers_nothing_more_and_frozen_weights_have_no_gradients(settings: Make) -> None:
    """In two micro-batches, so that there are gradients from the start."""
    live, ema, full = (
        phases(settings(fsdp=True, batch_size=4, gradient_accumulation_steps=2, **values))["student"]
        for values in ({"lora_rank": 2, "teacher": "live"}, {"lora_rank": 2}, {})
    )
    assert ema["casts"] == live["casts"]
    assert full["gradients"] == pytest.approx(full["moments"] / 2 + ROOT, abs=2)
    assert 0 < ema["gradients"] == pytest.approx(ema["moments"] / 2, abs=2)
