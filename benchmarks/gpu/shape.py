"""Steps of a model with the shape of Qwen2.5-7B and few layers: memory against plan, and time against plan by part.

All else is as in the real model: width, heads, vocabulary. Layers are alike, so the rest follows from two depths.
"""

from __future__ import annotations

import gc
from statistics import median
from typing import Any

import torch
from bench import Bench, Check, Found
from models import WHOLE, make_trainer, needs_bitsandbytes, rows, settings, shape_files, shape_folder, shape_model

from selfdistill.config import TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.rates import measured_rates
from selfdistill.training.traced_step import Device

DEPTHS = (1, 3)
STEPS = 3
"""The first warms up."""
PARTS = {"rollout": "sampling", "teacher": "teacher", "student": "student", "update": "update", "step": "total"}
"""Of a step, with their names in a plan of time."""
CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True, "gradient_accumulation_steps": 8}
SETUPS: dict[str, dict[str, Any]] = {
    "full, EMA": {"gradient_accumulation_steps": 8},
    "full, live, checkpointing": CHECKPOINTED | {"teacher": "live"},
    "LoRA 16": {"lora_rank": 16, "gradient_accumulation_steps": 8},
    "LoRA 16 on bfloat16, checkpointing": CHECKPOINTED | {"lora_rank": 16, "dtype": "bfloat16"},
    "full on bfloat16, 8-bit moments, EMA": CHECKPOINTED | {"dtype": "bfloat16", "optim": "adamw_8bit"},
    "QLoRA": CHECKPOINTED | {"lora_rank": 16, "dtype": "bfloat16", "load_in_4bit": True},
}


def shape_settings(bench: Bench, depth: int, values: dict[str, Any]) -> TrainConfig:
    """32 prompts of about 100 tokens, for the teacher 500 more, and 512 new tokens."""
    count, prompt, completion, new = (32, 70, 400, 512) if bench.cuda else (8, 20, 20, 8)
    common: dict[str, Any] = {
        "model": shape_folder(bench, depth),
        "data": rows(bench, count, prompt, completion),
        "batch_size": count,
        "max_completion_length": new,
        "max_steps": STEPS,
        "mixed_precision": "bf16",
    }
    return settings(bench, f"shape-{depth}", **common | values)


def measured(bench: Bench, config: TrainConfig, depth: int) -> tuple[dict[str, float], int]:
    """Median seconds of a step's parts after the first, and the bytes allocated at its peak; 0 on a CPU."""
    dtype = getattr(torch, config.dtype)
    if config.load_in_4bit:
        config = config.model_copy(update={"model": shape_files(bench, depth, dtype)})
        gc.collect()
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    run = make_trainer(config, None if config.load_in_4bit else shape_model(bench, depth, dtype))
    found = []
    for step in range(STEPS):
        if step == 1 and bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        found.append(run.step(step))
    peak = torch.cuda.max_memory_allocated() - before if bench.cuda else 0
    return {part: median(m[f"time/{part}_s"] for m in found[1:]) for part in PARTS}, peak


def check_setup(bench: Bench, found: Found, values: dict[str, Any]) -> None:
    """Peak and seconds by part against plan, of two depths, and what follows for the whole model."""
    times, planned, plans, peaks = {}, {}, {}, {}
    rates = measured_rates(torch.device(bench.device), "bf16")
    for depth in DEPTHS:
        config = shape_settings(bench, depth, values)
        planner = MemoryPlanner(config, load_demonstrations(config.data), Device(bench.device, "bf16"))
        plan, planned[depth] = planner.plan(config), planner.time(config, rates).step
        plans[depth] = plan.peak
        times[depth], peaks[depth] = measured(bench, config, depth)
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
            found.add(f"{depth} layers: measured", peaks[depth] / 2**30, "GiB")
            found.add(f"{depth} layers: measured of plan", peaks[depth] / plan.peak, at_least=0.85, at_most=1.15)
        found.add(f"{depth} layers: plan", plan.peak / 2**30, "GiB")
    for part, name in PARTS.items():
        seconds = {depth: times[depth][part] for depth in DEPTHS}
        by_plan = {depth: getattr(planned[depth], name) for depth in DEPTHS}
        for layers, took, expected in (
            (WHOLE, whole(seconds), whole(by_plan)),
            (DEPTHS[1], seconds[DEPTHS[1]], by_plan[DEPTHS[1]]),
        ):
            found.add(f"{part}, {layers} layers", took, "s")
            found.add(f"{part}, {layers} layers: measured of plan", took / expected)
    found.add(f"plan, {WHOLE} layers", whole(plans) / 2**30, "GiB")
    if bench.cuda:
        found.add(f"measured, {WHOLE} layers", whole(peaks) / 2**30, "GiB")


def whole(by_depth: dict[int, Any]) -> float:
    """A number that grows by as much per layer, at the depth of the whole model."""
    few, more = DEPTHS
    return float(by_depth[few] + (WHOLE - few) * (by_depth[more] - by_depth[few]) / (more - few))


def _of(values: dict[str, Any]) -> Any:
    def check(bench: Bench, found: Found) -> None:
        if {"optim", "load_in_4bit"} & {*values}:
            needs_bitsandbytes()
        check_setup(bench, found, values)

    return check


CHECKS = tuple(Check(name, "memory and time against plan", 75, _of(values)) for name, values in SETUPS.items())
