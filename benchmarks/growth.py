"""How a step grows: seconds and peak memory against completion length, vocabulary, batch and context length.

    python benchmarks/growth.py docs/growth.svg

The starter model (its embeddings resized for the vocabulary), float32, full fine-tuning, EMA teacher. Each curve
changes one thing of a step with 8 prompts, 32 new tokens (no end token stops them), a document of 200 words before the
demonstration, and 49,152 tokens of vocabulary. "Memory" is the peak of a step above what the run holds between steps,
gradients included. The shapes of the curves count, not the seconds: they come one after the other.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot
from measure import peak_bytes

from selfdistill.config.train import TrainConfig
from selfdistill.model.loading import load_model
from selfdistill.training.trainer import Trainer

NO_TOKEN = -1
"""An end token that is never sampled."""
STANDARD = {"new tokens": 32, "vocabulary": 49_152, "batch": 8, "document, words": 200}
CURVES: dict[str, tuple[int, ...]] = {
    "new tokens": (16, 32, 64, 128),
    "vocabulary": (49_152, 100_000, 151_936),
    "batch": (4, 8, 16, 32),
    "document, words": (100, 200, 400, 800),
}
STEPS = 3


def measure(folder: Path, shape: dict[str, int]) -> tuple[float, int]:
    """Median seconds of a step, and its peak memory."""
    model = folder / f"model-{shape['vocabulary']}"
    if not model.exists():
        loaded = load_model("smollm2-135m")
        loaded.model.resize_token_embeddings(shape["vocabulary"], mean_resizing=False)
        loaded.model.save_pretrained(model)
        loaded.tokenizer.save_pretrained(model)
    data = folder / "rows.jsonl"
    words = " ".join(["The mill by the river was built of grey stone in a dry summer."] * 100).split()
    rows = [
        {
            "document": f"Document {row}. {' '.join(words[: shape['document, words']])}",
            "prompt": f"Question {row}: of what was the mill built?",
            "completion": "Of grey stone.",
        }
        for row in range(64)
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = Trainer(
        TrainConfig(
            model=str(model),
            data=str(data),
            output_dir=str(folder / "run"),
            context="document:repeats=1",
            batch_size=shape["batch"],
            max_completion_length=shape["new tokens"],
            max_steps=STEPS + 1,
            learning_rate=1e-12,
            mixed_precision="no",
        )
    )
    run.loaded = replace(run.loaded, end_token_ids=(NO_TOKEN,))
    run.step(0)
    peak = peak_bytes(lambda: run.step(1))
    return median(run.step(1 + step)["time/step_s"] for step in range(STEPS)), peak


def main(target: str) -> None:
    figure, axes = pyplot.subplots(2, len(CURVES), figsize=(12, 5), sharey="row", layout="constrained")
    found: dict[tuple[Any, ...], tuple[float, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for column, (name, values) in enumerate(CURVES.items()):
            for value in values:
                shape = STANDARD | {name: value}
                key = tuple(shape.values())
                if key not in found:
                    found[key] = measure(Path(folder), shape)
                    gc.collect()
                seconds, peak = found[key]
                print(f"{name} {value}: {seconds:.2f} s, {peak / 2**20:.0f} MiB", flush=True)
            points = [found[tuple((STANDARD | {name: value}).values())] for value in values]
            axes[0, column].plot(values, [seconds for seconds, _ in points], marker="o")
            axes[1, column].plot(values, [peak / 2**20 for _, peak in points], marker="o")
            axes[1, column].set_xlabel(name)
            for axis in axes[:, column]:
                axis.set_xticks(values, [f"{value:,}" for value in values], fontsize="small")
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("memory, MiB")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
