"""A step of SDFT against a step of SFT on the package's facts: ratio, the parts of each, what the arithmetic allows.

    python benchmarks/step.py [--teacher ema] [--lora] [--batch_size 16] [--mixed_precision auto] [--torch_compile]
        [--model smollm2-135m] [--max_completion_length 32] [--steps 5]

Steps alternate in one process, after an epoch's worth of contexts was read where the teacher is frozen; the learning
rate is so small that the model stays what it is. "Allowed" is the time of the matrix products at the rate measured
here (``limits.py``) and of the optimizer's and teacher's memory traffic at the rate of a copy, for the tokens of the
batch without padding and with shared prefixes once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from limits import bandwidth, product_rate

from selfdistill.config.train import TrainConfig
from selfdistill.data.encoding import Example
from selfdistill.data.sources import packaged
from selfdistill.methods.slots import Completion, SequenceSource
from selfdistill.model.head import body_and_head
from selfdistill.model.loading import LoadedModel
from selfdistill.model.precision import cached_casts
from selfdistill.model.prefix_cache import shared_prefixes
from selfdistill.training.trainer import Trainer

WARM = 1
SDFT: dict[str, Any] = {"method": "sdft", "context": "document:repeats=2", "temperature": 0.3}


def tokens_once(sequences: list[list[int]]) -> int:
    """Tokens of the sequences, what groups of them have in common counted once."""
    return sum(map(len, sequences)) - sum((len(rows) - 1) * length for rows, length in shared_prefixes(sequences))


@dataclass(eq=False)
class Recorder:
    """Remembers the completions of the last step."""

    sequence: SequenceSource
    last: list[Completion] = field(default_factory=list)

    def __call__(self, loaded: LoadedModel, rows: Sequence[Example], step: int) -> list[Completion]:
        self.last = self.sequence(loaded, rows, step)
        return self.last


class Timed:
    """Times the teacher's updates."""

    def __init__(self, teacher: Any) -> None:
        self.seconds: list[float] = []
        self._update, teacher.update = teacher.update, self

    def __call__(self, step: int, *, student_moved: bool) -> None:
        began = time.perf_counter()
        self._update(step, student_moved=student_moved)
        self.seconds.append(time.perf_counter() - began)


@dataclass(frozen=True)
class Limits:
    """Rates of this machine: floating-point operations or bytes a second."""

    body: float
    """In the arithmetic of the run, many rows."""
    decode: float
    """The same, as many rows as there are completions."""
    head: float
    """In float32, its factors rounded to bfloat16 where the run computes in bfloat16."""
    memory: float

    @classmethod
    def measure(cls, dtype: torch.dtype, rows: int) -> Limits:
        torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
        head = product_rate(torch.float32)
        torch.set_float32_matmul_precision("highest")
        return cls(product_rate(dtype), product_rate(dtype, rows), head, bandwidth())

    def allow(self, run: Trainer, completions: list[Completion]) -> dict[str, float]:
        """Least seconds of each part of a step with these completions."""
        body, head = body_and_head(run.loaded.model) or (None, None)
        assert body is not None
        assert head is not None
        head_weights: int = head.weight.numel()
        weights = sum(p.numel() for name, p in body.named_parameters() if "lora_" not in name and "embed" not in name)
        trained = sum(p.numel() for p in run.parameters)
        full = trained > weights
        new = sum(len(c.ids) for c in completions)
        student = tokens_once([list(c.example.student_ids) + c.ids for c in completions])
        # Forward 2, gradient of the input 2 and of the weights 2 operations a weight and token.
        seconds = {
            "time/student_s": (6 if full else 4) * (weights * student / self.body + head_weights * new / self.head)
        }
        if run.teacher is not None:
            read = 0 if run.prefix_caches else tokens_once([list(c.example.teacher_ids or []) for c in completions])
            seconds["time/teacher_s"] = 2 * weights * (read + new) / self.body
            seconds["time/student_s"] += 2 * head_weights * new / self.head  # the teacher's logits, timed with the loss
            prompts = tokens_once([list(c.example.student_ids) for c in completions])
            seconds["time/rollout_s"] = (
                2 * weights * prompts / self.body + 2 * (weights + head_weights) * new / self.decode
            )
        moved = 7 + 1 + (3 if run.teacher is not None and run.teacher.kind == "ema" else 0)  # AdamW, norm, average
        seconds["time/update_s"] = moved * 4 * trained / self.memory
        return seconds | {"time/step_s": sum(seconds.values())}


def first_epoch(run: Trainer) -> None:
    """What a frozen teacher reads in the first epoch, if anything is kept of it."""
    if not run.prefix_caches:
        return
    assert run.teacher is not None
    cache = run.prefix_caches[run.teacher.rule]
    with run.teacher.model() as network, cached_casts(network), run.accelerator.autocast():
        for row in run.stage.task.examples:
            run.forward_pass(network, [row.teacher_ids or []], [row.completion_ids[:1]], cache)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="frozen")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--mixed_precision", default="auto")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max_completion_length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "model": options.model,
            "output_dir": folder,
            "data": packaged("knowledge.train.jsonl"),
            "batch_size": options.batch_size,
            "mixed_precision": options.mixed_precision,
            "lora_rank": 16 if options.lora else 0,
            "max_completion_length": options.max_completion_length,
            "max_steps": WARM + options.steps,
            "learning_rate": 1e-12,
            "drift_steps": 0,
            "torch_compile": options.torch_compile,
        }
        runs = {
            name: Trainer(TrainConfig(**(method | common)))
            for name, method in (("SDFT", SDFT | {"teacher": options.teacher}), ("SFT", {"method": "sft"}))
        }
        first_epoch(runs["SDFT"])
        average_s = Timed(runs["SDFT"].teacher)
        for run in runs.values():
            run.stage.task.method = replace(run.stage.task.method, sequence=Recorder(run.stage.task.method.sequence))
        dtype = torch.bfloat16 if runs["SDFT"].config.mixed_precision == "bf16" else torch.float32
        limits = Limits.measure(dtype, options.batch_size)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        least: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for step in range(WARM + options.steps):
            for name, run in runs.items():
                metrics = run.step(step)
                if step >= WARM:
                    found[name].append(metrics)
                    least[name].append(limits.allow(run, run.stage.task.method.sequence.last))
        medians: dict[str, float] = {}
        for name in runs:
            length = median(m["completion/length"] for m in found[name])
            print(f"{name}, {str(dtype).removeprefix('torch.')}, {length:.1f} tokens a reply")
            for part in [key for key in found[name][0] if key.startswith("time/")]:
                medians[name] = median(m[part] for m in found[name])  # the last part is the whole step
                note = ""
                if part in least[name][0]:
                    ratio = median(m[part] / a[part] for m, a in zip(found[name], least[name], strict=True))
                    note = f", {ratio:.1f} times what the arithmetic allows"
                print(f"  {part.removeprefix('time/').removesuffix('_s')}: {medians[name]:.2f} s{note}")
        share = median(average_s.seconds[WARM:]) / medians["SDFT"]
        print(f"the teacher's average: {share:.1%} of the step of SDFT")
        print(f"SDFT / SFT: {medians['SDFT'] / medians['SFT']:.2f}")


if __name__ == "__main__":
    main()
