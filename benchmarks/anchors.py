"""What anchors cost: a step with a quarter and with half of the batch from the package's prompts against one without.

    python benchmarks/anchors.py [--data routing] [--max_completion_length 48] [--steps 5]

By SFT and by SDFT with a frozen and an EMA teacher, full and LoRA. Steps of the three shares alternate in one process;
the learning rate is so small that the model stays what it is. Prints the median seconds of a step, their ratio to those
without anchors, the tokens that are scored, and how much memory a step needs above what it found.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from typing import Any

from measure import Stepped, alternate, peak_bytes

from selfdistill.config import TrainConfig
from selfdistill.data import packaged

CONTEXTS = {"routing": "turns:repeats=4", "tools": "turns:repeats=2", "knowledge": "document:repeats=2"}
RUNS: dict[str, dict[str, Any]] = {
    "SFT": {"method": "sft"},
    "SFT, LoRA": {"method": "sft", "lora_rank": 16},
    "SDFT, frozen": {"teacher": "frozen"},
    "SDFT, EMA": {"teacher": "ema"},
    "SDFT, frozen, LoRA": {"teacher": "frozen", "lora_rank": 16},
    "SDFT, EMA, LoRA": {"teacher": "ema", "lora_rank": 16},
}
SHARES = {"none": 0.0, "1/4": 0.25, "1/2": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=list(CONTEXTS), default="routing")
    parser.add_argument("--max_completion_length", type=int, default=48)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    print("| run | anchors | seconds | ratio | tokens | GiB |\n|---|---|---|---|---|---|")
    for name, settings in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            common: dict[str, Any] = {
                "model": "smollm2-135m",
                "data": packaged(f"{options.data}.train.jsonl"),
                "context": CONTEXTS[options.data],
                "output_dir": folder,
                "max_completion_length": options.max_completion_length,
                "batch_size": 16,
                "temperature": 0.3,
                "learning_rate": 1e-12,
                "drift_steps": 0,
                "anchors": "package",
            }
            runs = {
                share: Stepped(TrainConfig(**common | settings | {"anchor_share": value}))
                for share, value in SHARES.items()
            }
            seconds = alternate(runs, options.steps)
            for share, run in runs.items():
                gib = peak_bytes(run) / 2**30
                ratio = seconds[share] / seconds["none"]
                print(
                    f"| {name} | {share} | {seconds[share]:.2f} | {ratio:.2f} | {run.tokens():.0f} | {gib:.2f} |",
                    flush=True,
                )
            del runs
            gc.collect()


if __name__ == "__main__":
    main()
