"""Checks that the device computes what it should: against the CPU, in bfloat16, sampling, resuming, learning.

Legend: B prompts, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Check, Found
from models import accelerate_on, endless, make_trainer, rows, settings, small_model, starter
from safetensors.torch import load_file
from torch import Tensor

from selfdistill.config import TrainConfig
from selfdistill.data.sources import packaged
from selfdistill.methods.slots import Completion
from selfdistill.model import Sampling, load_for_training, sample, sample_seed
from selfdistill.model.loading import load_model
from selfdistill.training.selection import BatchPart
from selfdistill.training.stopwatch import Stopwatch
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

BATCH = 4


def step_settings(bench: Bench, out: str, **values: Any) -> TrainConfig:
    """Settings of a step of the small model."""
    common: dict[str, Any] = {
        "model": small_model(bench),
        "data": rows(bench, 8, 60, 40),
        "batch_size": BATCH,
        "max_completion_length": 64 if bench.cuda else 12,
        "max_steps": 4,
    }
    return settings(bench, out, **common | values)


def completions_of(run: Trainer, step: int) -> list[Completion]:
    """Samples of the student for the task's first rows."""
    task = run.stage.task
    with run.accelerator.autocast():
        return list(task.method.sequence(run.loaded, task.examples[:BATCH], step))


def gradient(run: Trainer, completions: Sequence[Completion]) -> tuple[float, Tensor]:
    """The loss of these completions and its gradient, in float64 on the CPU."""
    task = run.stage.task
    (result,) = run.gradient.add([BatchPart(task.name, task.method, completions, 1.0)], Stopwatch(run.loaded.device))
    found = [p.grad.detach().flatten().double().cpu() for p in run.parameters if p.grad is not None]
    run.optimizer.zero_grad(set_to_none=True)
    return result.loss, torch.cat(found)


def compare(
    found: Found, name: str, of: tuple[float, Tensor], reference: tuple[float, Tensor], **bounds: float
) -> None:
    """Differences of a loss and its gradient from the reference."""
    (loss, own), (expected, right) = of, reference
    found.add(f"{name}: loss, relative difference", abs(loss - expected) / abs(expected), at_most=bounds["loss"])
    difference = float((own - right).norm() / right.norm())
    found.add(f"{name}: gradient, relative difference", difference, at_most=bounds.get("gradient"))
    cosine = float(own @ right / own.norm() / right.norm())
    found.add(f"{name}: gradient, cosine", cosine, at_least=bounds.get("cosine"))


def check_agree(bench: Bench, found: Found) -> None:
    """One step in float32 on the CPU and on the device, of the same samples."""
    for name, values in (("full", {}), ("LoRA", {"lora_rank": 8, "teacher": "frozen"})):
        with accelerate_on("cpu"):
            on_cpu = make_trainer(step_settings(bench, "agree", **values))
            completions = completions_of(on_cpu, 0)
            reference = gradient(on_cpu, completions)
        on_device = make_trainer(step_settings(bench, "agree", **values))
        assert on_device.loaded.device.type == bench.device
        compare(found, name, gradient(on_device, completions), reference, loss=1e-5, gradient=1e-4)


def check_bf16(bench: Bench, found: Found) -> None:
    """One step with bfloat16 arithmetic against float32, of the same samples; also on bfloat16 weights."""
    for name, dtype in (("bf16", "float32"), ("bf16 weights", "bfloat16")):
        loaded = load_for_training(small_model(bench))
        for weight in loaded.model.parameters():  # exact, too, begins with the rounded weights
            weight.data = weight.data.to(getattr(torch, dtype)).float()
        exact = make_trainer(step_settings(bench, "exact"), loaded)
        completions = completions_of(exact, 0)
        reference = gradient(exact, completions)
        rounded = make_trainer(step_settings(bench, "rounded", mixed_precision="bf16", dtype=dtype))
        compare(found, name, gradient(rounded, completions), reference, loss=5e-3, cosine=0.99)


def check_greedy(bench: Bench, found: Found) -> None:
    """Greedy samples against ``generate``, from prompts of unlike lengths."""
    loaded = endless(load_model(small_model(bench)))
    loaded.model.to(bench.device)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(256, (5 + 7 * i,), generator=generator).tolist() for i in range(8)]
    tokens = 64 if bench.cuda else 12
    width = max(map(len, prompts))
    ids_BL = torch.tensor([[loaded.pad_token_id] * (width - len(p)) + p for p in prompts], device=bench.device)
    mask_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=bench.device)
    with torch.no_grad():
        generated = loaded.model.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=loaded.pad_token_id,
            eos_token_id=-1,
        )[:, width:].tolist()
    own = [one.ids for one in sample(loaded, prompts, Sampling(tokens, temperature=0))]
    same = sum(a == b for x, y in zip(own, generated, strict=True) for a, b in zip(x, y, strict=True))
    found.add("tokens that are those of generate", same / (tokens * len(prompts)), at_least=1.0)


def check_importance(bench: Bench, found: Found) -> None:
    """Log-probabilities of samples against those of a forward pass, and a full step with importance weights."""
    for name, precision, reach in (("float32", "no", 1e-3), ("bfloat16", "bf16", 0.01)):
        config = step_settings(bench, name, importance_cap=100.0, mixed_precision=precision, num_generations=4)
        run = make_trainer(config)
        completions = completions_of(run, 0)
        task = run.stage.task
        part = BatchPart(task.name, task.method, completions, 1.0)
        (result,) = run.gradient.add([part], Stopwatch(run.loaded.device))
        run.optimizer.zero_grad(set_to_none=True)
        assert result.gap is not None
        found.add(f"{name}: mean importance", result.importance, at_least=1 - reach, at_most=1 + reach)
        found.add(f"{name}: mean gap of a token", result.gap.total / result.gap.tokens, "nats")
        found.add(f"{name}: largest gap of a token", result.gap.largest, "nats")
        found.add(f"{name}: loss of a step", run.step(0)["loss"], at_least=0.0, at_most=100.0)


class _Stopped(Exception):
    """A crash."""


def check_resume(bench: Bench, found: Found) -> None:
    """A run that is stopped and resumed against one that is not, at a length of 400 tokens; and a run done twice."""
    kinds: dict[str, tuple[dict[str, Any], float | None, float | None]] = {
        "float32": ({"mixed_precision": "no"}, 1e-5, None),
        "bfloat16": ({"mixed_precision": "bf16"}, None, None),
        "bfloat16, deterministic": ({"mixed_precision": "bf16", "deterministic": True}, 0.0, 0.0),
    }
    for name, (values, reach, again) in kinds.items():

        def config(out: str, name: str = name, values: dict[str, Any] = values) -> TrainConfig:
            more: dict[str, Any] = {"data": rows(bench, 8, 330, 40), "save_steps": 2} | values
            return step_settings(bench, f"resume-{name}-{out}", **more)

        def stop(done: int, _loaded: Any, _metrics: Any) -> None:
            if done == 3:
                raise _Stopped

        once, twice = train(config("once")), train(config("twice"))
        with suppress(_Stopped):
            train(config("resumed"), on_step=stop)
        resumed = train(config("resumed"), resume=True)
        found.add(f"{name}: resumed, largest difference", furthest(once, resumed), at_most=reach)
        found.add(f"{name}: done twice, largest difference", furthest(once, twice), at_most=again)


def furthest(a: Path, b: Path) -> float:
    """The largest difference of a weight between two saved models."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (a, b))
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


def check_moves(bench: Bench, found: Found) -> None:
    """What share of float32 and of bfloat16 weights a run moves, and of the first what share rounded to bfloat16."""
    model, data, length = small_model(bench), rows(bench, 8, 60, 40), 12
    if bench.cuda:
        model, data, length = starter(bench), packaged("knowledge.train.jsonl"), 48
    common: dict[str, Any] = {"model": model, "data": data, "max_completion_length": length, "batch_size": 8}
    for dtype, least in (("float32", 0.5), ("bfloat16", None)):
        run = Trainer(settings(bench, f"moves-{dtype}", dtype=dtype, mixed_precision="bf16", max_steps=10, **common))
        before = [p.detach().clone() for p in run.parameters]
        for step in range(10):
            run.step(step)
        pairs = list(zip(before, run.parameters, strict=True))
        count = sum(p.numel() for p in before)
        moved = sum(int((a != b).sum()) for a, b in pairs)
        in_bf16 = sum(int((a.bfloat16() != b.bfloat16()).sum()) for a, b in pairs)
        # The embeddings of tokens that never occur have no gradient.
        found.add(f"{dtype} weights that ten steps move", moved / count, at_least=least)
        if dtype == "float32":
            found.add("the same, rounded to bfloat16", in_bf16 / count)


def check_rescored(bench: Bench, found: Found) -> None:
    """Mean importance over many sampled tokens of the starter model, with bfloat16 arithmetic."""
    loaded = load_for_training(starter(bench))
    run = Trainer(
        settings(
            bench,
            "rescored",
            model=loaded.name,
            data=packaged("knowledge.train.jsonl"),
            max_completion_length=128,
            batch_size=32,
            max_steps=1,
            importance_cap=100.0,
            mixed_precision="bf16",
        ),
        loaded=loaded,
    )
    found.add("mean importance", run.step(0)["importance"], at_least=0.99, at_most=1.01)


def check_same_samples(bench: Bench, found: Found) -> None:
    """Whether samples depend on the batch that they are in."""
    loaded = endless(load_model(small_model(bench)))
    loaded.model.to(bench.device)
    prompts = [list(range(3 + 2 * i)) for i in range(8)]
    seeds = [sample_seed(0, 0, row, 0) for row in range(8)]
    sampling = Sampling(64 if bench.cuda else 12)
    together = sample(loaded, prompts, sampling, seeds)
    alone = [sample(loaded, [p], sampling, [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    same = sum(a.ids == b.ids for a, b in zip(together, alone, strict=True))
    found.add("samples that are the same alone, in float32", same / len(prompts), at_least=0.9)


CHECKS = (
    Check("agree", "a step in float32 on the CPU and here", 45, check_agree),
    Check("bf16", "a step in bfloat16 against float32", 30, check_bf16),
    Check("greedy", "greedy samples against generate", 30, check_greedy),
    Check("batches", "samples alone and in a batch", 30, check_same_samples),
    Check("importance", "samples scored again; a step with importance weights", 30, check_importance),
    Check("resume", "a run stopped and resumed, at 400 tokens", 90, check_resume),
    Check("moves", "the weights that a run moves", 120, check_moves),
    Check("rescored", "samples of the starter model scored again", 60, check_rescored),
)
