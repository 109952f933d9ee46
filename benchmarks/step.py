"""A step of SDFT against a step of SFT on the demo's data: ratio, the parts of each, and what the arithmetic allows.

    python benchmarks/step.py [--teacher ema] [--lora] [--batch_size 16] [--mixed_precision auto]

Steps alternate in one process, after an epoch's worth of contexts was read where the teacher is frozen; the learning
rate is so small that the model stays what it is. "Allowed" is the time of the matrix products at the rate measured
here (``limits.py``) and of the optimizer's and teacher's memory traffic at the rate of a copy, for the tokens of the
batch without padding and with common beginnings once.
"""

from __future__ import annotations

import argparse
import tempfile
from statistics import median
from typing import Any

import torch
from limits import bandwidth, product_rate

from selfdistill import demo
from selfdistill.config import TrainConfig
from selfdistill.evaluate import packaged
from selfdistill.methods.slots import Completion
from selfdistill.models import body_and_head, casts_kept
from selfdistill.prefixes import shared_beginnings
from selfdistill.run import Run
from selfdistill.schedule import batch_rows

STEPS = 8
WARM = 2


def tokens_once(sequences: list[list[int]]) -> int:
    """Tokens of the sequences, what groups of them have in common counted once."""
    return sum(map(len, sequences)) - sum((len(rows) - 1) * length for rows, length in shared_beginnings(sequences))


def allowed(run: Run, completions: list[Completion], dtype: torch.dtype) -> dict[str, float]:
    """Seconds of each part at the machine's limits."""
    body, head = body_and_head(run.loaded.model) or (None, None)
    assert body is not None
    assert head is not None
    head_weights = head.weight.numel()
    weights = sum(p.numel() for name, p in body.named_parameters() if "lora_" not in name and "embed" not in name)
    trained = sum(p.numel() for p in run.parameters)
    fast, slow, bytes_s = product_rate(dtype), product_rate(dtype, len(completions)), bandwidth()
    new = sum(len(c.ids) for c in completions)
    student = tokens_once([list(c.row.student_ids) + c.ids for c in completions])
    backward = 2 if trained < weights else 4  # LoRA: no gradients of the weights
    seconds = {"student_s": (2 + backward) * (weights * student + head_weights * new) / fast}
    if run.teacher is not None:
        contexts = [] if run.kept else [list(c.row.teacher_ids or []) for c in completions]
        read = (tokens_once(contexts) if contexts else 0) + new
        seconds["teacher_s"] = 2 * (weights * read + head_weights * new) / fast
        prompts = tokens_once([list(c.row.student_ids) for c in completions])
        seconds["rollout_s"] = 2 * weights * prompts / fast + 2 * (weights + head_weights) * new / slow
    moved = 7 + 1 + (3 if run.teacher is not None and run.teacher.kind == "ema" else 0)  # AdamW, norm, average
    seconds["update_s"] = moved * 4 * trained / bytes_s
    return seconds | {"step_s": sum(seconds.values())}


def first_epoch(run: Run) -> None:
    """What a frozen teacher reads in the first epoch, if anything is kept of it."""
    if run.kept is None:
        return
    assert run.teacher is not None
    with run.teacher.model() as network, casts_kept(network), run.accelerator.autocast():
        for row in run.rows:
            run.scorer(network, [row.teacher_ids or []], [row.completion_ids[:1]], run.kept)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="frozen")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--mixed_precision", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = demo.SHARED | {
            "output_dir": folder,
            "data": packaged("knowledge.train.jsonl"),
            "batch_size": options.batch_size,
            "mixed_precision": options.mixed_precision,
            "lora_rank": 16 if options.lora else 0,
            "learning_rate": 1e-12,
        }
        runs = {
            name: Run(TrainConfig(**(method | common)))
            for name, method in (("SDFT", demo.SDFT | {"teacher": options.teacher}), ("SFT", demo.SFT))
        }
        first_epoch(runs["SDFT"])
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for step in range(WARM + STEPS):
            for name, run in runs.items():
                metrics = run.step(step)
                if step >= WARM:
                    found[name].append(metrics)
        dtype = torch.bfloat16 if runs["SDFT"].config.mixed_precision == "bf16" else torch.float32
        medians: dict[str, float] = {}
        for name, run in runs.items():
            step = WARM + STEPS // 2
            rows = batch_rows(run.rows, step, options.batch_size, run.config.seed)
            limits = allowed(run, run.method.sequence(run.loaded, rows, step), dtype)
            length = median(m["completion/length"] for m in found[name])
            print(f"{name}, {str(dtype).removeprefix('torch.')}, {length:.1f} tokens a reply")
            for part in [key for key in found[name][0] if key.startswith("time/")]:
                seconds, least = median(m[part] for m in found[name]), limits.get(part.removeprefix("time/"))
                note = f", {seconds / least:.1f} times the {least:.2f} s allowed" if least else ""
                print(f"  {part.removeprefix('time/').removesuffix('_s')}: {seconds:.2f} s{note}")
            medians[name] = median(m["time/step_s"] for m in found[name])
        print(f"SDFT / SFT: {medians['SDFT'] / medians['SFT']:.2f}")


if __name__ == "__main__":
    main()
