"""Is thinking preserved when a model that thinks learns from demonstrations that only answer?

    python studies/thinking.py DIR [SEED...]

First a small thinking model is made: SmolLM2-135M is fine-tuned on sums of two numbers with the way to the result
between <think> and </think>. Then it learns differences from answers alone, by SFT and by self-distillation. The share
of right answers is measured, and the tokens inside and outside the tags. Finished work is not repeated.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from intervals import cell

from selfdistill.config.commands import EvalConfig
from selfdistill.config.train import TrainConfig
from selfdistill.evaluation.evaluate import evaluate
from selfdistill.training.train import train

MODEL = "smollm2-135m"
THINK_STEPS = 150
TESTS = 100
"""Differences that are asked, none of them learnt."""
COMMON: dict[str, Any] = {
    "max_completion_length": 64,
    "batch_size": 16,
    "learning_rate": 1e-4,
    "save_steps": 0,
    "view_rows": 2,
    "logging_steps": 20,
}
LEARN: dict[str, Any] = {
    "context": "example:reasoning=true",
    "teacher": "frozen",
    "temperature": 0.6,
    "max_steps": 60,
}
SHOWN = ("accuracy", "completion/thinking", "completion/said", "completion/length")


def thought(a: int, b: int, sign: int) -> str:
    """The way from two numbers to their sum or difference, by tens and ones."""
    tens, ones = a // 10 * 10 + sign * (b // 10 * 10), a % 10 + sign * (b % 10)
    word = "+" if sign > 0 else "-"
    parts = [f"{a // 10 * 10} {word} {b // 10 * 10} = {tens}", f"{a % 10} {word} {b % 10} = {ones}"]
    return ", ".join([*parts, f"{tens} + {ones} = {tens + ones}"])


def rows(kind: str, count: int, seed: int, *, thinks: bool) -> list[dict[str, Any]]:
    """Questions of one kind, sums or differences, no two alike."""
    chance, made = random.Random(f"{kind}-{seed}"), {}
    while len(made) < count:
        a, b = chance.randint(11, 99), chance.randint(11, 99)
        if kind == "difference" and a <= b:
            continue
        sign = 1 if kind == "sum" else -1
        question = f"What is {a} + {b}?" if kind == "sum" else f"How much more is {a} than {b}?"
        reply = f"{a + sign * b}"
        full = f"<think>{thought(a, b, sign)}</think>{reply}" if thinks else reply
        made[question] = {"prompt": question, "completion": full, "answer": reply, "scorer": "contains"}
    return list(made.values())


def write(file: Path, lines: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def trained(folder: Path, **values: Any) -> str:
    if not (folder / "final").exists():
        train(TrainConfig(output_dir=str(folder), **COMMON | values))
    return str(folder)


def measured(file: Path, model: str, data: str) -> dict[str, Any]:
    if not file.exists():
        found = evaluate(EvalConfig(model=model, data=data, max_completion_length=64, mixed_precision="no"))
        file.write_text(json.dumps({key: found[key] for key in SHOWN}), encoding="utf-8")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def main(folder: Path, seeds: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sums = write(folder / "sums.jsonl", rows("sum", 600, 0, thinks=True))
    known = rows("difference", 160 + TESTS, 0, thinks=False)
    learn, test = write(folder / "learn.jsonl", known[:160]), write(folder / "test.jsonl", known[160:])
    thinker = trained(folder / "thinker", model=MODEL, data=sums, method="sft", max_steps=THINK_STEPS)
    found = {"thinking model": [measured(folder / "thinker.json", thinker, test)]}
    for method in ("sft", "sdft"):
        found[method] = []
        for seed in seeds:
            name = f"{method}-{seed}"
            model = trained(folder / name, model=thinker, data=learn, method=method, seed=seed, **LEARN)
            found[method].append(measured(folder / f"{name}.json", model, test))
    print(f"| | {' | '.join(SHOWN)} |")
    print("|---" * (len(SHOWN) + 1) + "|")
    for name, runs in found.items():
        cells = [cell([run[key] for run in runs], 1.0 if key == "accuracy" else math.inf) for key in SHOWN]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
