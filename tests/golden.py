"""Eight small runs whose every number is pinned in ``golden.json``: a change of structure may move none of them.

``python tests/golden.py`` prints the SHA-256 of each run's final weights, to compare two versions on one machine.
``python tests/golden.py --write`` pins the numbers of this version, for a change that is meant to move them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from children import train_together
from safetensors.torch import load_file
from shared import ENDS, timeless, write_model

from selfdistill.config.train import TrainConfig
from selfdistill.training.train import train

PINNED = Path(__file__).parent / "golden.json"
COMMON: dict[str, Any] = {
    "context": "turns",
    "max_completion_length": 10,
    "batch_size": 4,
    "max_steps": 10,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "drift_steps": 5,
    "save_steps": 0,
    "view_rows": 0,
    "mixed_precision": "no",
}
RUNS: dict[str, dict[str, Any]] = {
    "sdft": {"teacher": "ema", "ema_rate": 0.05, "num_generations": 2},
    "sdft_lora": {"teacher": "frozen", "lora_rank": 4, "gradient_accumulation_steps": 2, "skip_first_tokens": 1},
    "sdft_top_k": {"divergence": "reverse_kl", "support": "top_k", "support_top_k": 20, "support_tail": "bucket"},
    "sft": {"method": "sft", "loss_normalisation": "token", "max_completion_length": 20},
    "sft_reinvoke": {"method": "sft_reinvoke", "max_completion_length": 20},
    "offline_distillation": {"method": "offline_distillation", "divergence": "jsd", "jsd_weight": 0.3},
    "grpo": {"method": "grpo", "num_generations": 4, "scorer": "regex"},
    "two_processes": {"teacher": "ema", "divergence": "jsd"},
}


def prepare(folder: Path) -> dict[str, Any]:
    """Write the model and the rows; returns the settings that name them."""
    write_model(folder / "model", ends=ENDS)
    answers = ["[a-m]", "[n-z]", "[A-Z]", "[0-9]"]
    rows = [
        {"prompt": f"q{i}" * (1 + i % 3), "completion": "ab" * (1 + i % 4), "answer": answers[i % 4]} for i in range(10)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "general.txt").write_text("Hello\nWhat is rain?\nCount to four.\n", encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "data": str(folder / "train.jsonl"),
        "general_prompts": str(folder / "general.txt"),
    }


def run(name: str, folder: Path) -> TrainConfig:
    """Train the run ``name`` under ``folder``, which :func:`prepare` filled."""
    config = TrainConfig(**COMMON | prepare(folder) | RUNS[name], output_dir=str(folder / name))
    if name == "two_processes":
        train_together(config, folder)
    else:
        train(config)
    return config


def numbers(config: TrainConfig) -> dict[str, list[float | None]]:
    """Every metric but the times, by step; None where a step has none."""
    text = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [timeless(json.loads(line)) for line in text.splitlines()]
    names = sorted({name for line in lines for name in line})
    return {name: [line.get(name) for line in lines] for name in names}


def weights_hash(config: TrainConfig) -> str:
    """SHA-256 over the final model's tensors by name."""
    digest = hashlib.sha256()
    (file,) = (Path(config.output_dir) / "final").glob("*.safetensors")
    for name, tensor in sorted(load_file(file).items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def main(write: bool) -> None:
    torch.set_num_threads(1)
    pinned = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            config = run(name, Path(folder))
            pinned[name] = numbers(config)
            print(name, weights_hash(config), flush=True)
    if write:
        assert all(math.isfinite(x) for run in pinned.values() for line in run.values() for x in line if x is not None)
        rounded = {
            name: {key: [None if x is None else float(f"{x:.7g}") for x in line] for key, line in found.items()}
            for name, found in pinned.items()
        }
        text = json.dumps(rounded, indent=1).replace("\n   ", " ").replace("\n  ]", " ]")
        PINNED.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
