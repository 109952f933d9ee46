"""A skill that arrives as a stream, by SFT and by self-distillation, without anchors and with them.

    python studies/stream.py DIR [--arm ARM]... [--seed SEED]...

The routing rows are learnt in chunks, each of them tested before it is learnt (`selfdistill learn stream` with open
gates). Prints, and writes to DIR/stream.json, the share of each chunk that was right before it was learnt, and the last
model's scores on the skill's test split and on the prior questions. Newer runs have ``where`` there, too: where they
ran. Finished work is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import sequence
from intervals import cell
from machine import where
from sequence import COMMON, MODEL

from selfdistill.config import LearnConfig
from selfdistill.continual.add_skill import add
from selfdistill.continual.learn import retention_matrix
from selfdistill.continual.ledger import Ledger
from selfdistill.data.bundled import packaged
from selfdistill.runtime import read_lines, write_atomically

SKILL = "routing"
ARMS = {name: sequence.ARMS[name] for name in ("sft", "sdft", "sft+anchors", "sdft+anchors")}
STREAM: dict[str, Any] = {
    "action": "stream",
    "chunk_size": 16,
    "chunk_steps": 16,
    "context": "turns:repeats=4",
    "max_completion_length": 48,
    "batch_size": 8,
    "learning_rate": 5e-5,
}
"""The same in all arms, the rate included."""


def learn(state: Path, arm: str, seed: int) -> dict[str, Any]:
    """Learn the stream; returns what was right before it and after it, its steps, and where it ran."""
    files = {part: packaged(f"{SKILL}.{part}.jsonl") for part in ("train", "test")}
    own = {"seed": seed, "name": SKILL, "state": str(state), "model": MODEL, "prior": packaged("prior/test")}
    values = COMMON | ARMS[arm] | STREAM | own | {"data": files["train"], "test": files["test"]}
    config = LearnConfig(**values)
    result = add(config)
    assert result["accepted"], result["reasons"]
    ledger = Ledger(str(state))
    chunks, after = read_lines(ledger.skills[0].folder / "stream.jsonl"), retention_matrix(ledger)
    return {
        "before": [line["accuracy"] for line in chunks],
        "steps": sum(line["steps"] for line in chunks),
        "new": after["matrix"][-1][0],
        "prior": after["prior"],
        "where": where(config.mixed_precision),
    }


def table(found: dict[str, Any], arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """One line per arm: means over seeds, of the scores with their intervals."""
    lines = ["| arm | seeds | each chunk before it is learnt | steps | new | prior |", "|---|---|---|---|---|---|"]
    for arm in arms:
        runs = [found[f"{arm}-{seed}"] for seed in seeds]
        before = ", ".join(f"{mean(shares):.2f}" for shares in zip(*(run["before"] for run in runs), strict=True))
        new, prior = cell([run["new"] for run in runs]), cell([run["prior"][1] for run in runs], digits=3)
        lines.append(f"| {arm} | {len(runs)} | {before} | {mean(run['steps'] for run in runs):.0f} | {new} | {prior} |")
    return [*lines, f"| base | | | 0 | | {mean(run['prior'][0] for run in found.values()):.3f} |"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learn a skill that arrives as a stream.")
    parser.add_argument("folder", type=Path, help="results, and the states on the way to them")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="repeatable; default: all")
    parser.add_argument("--seed", action="append", type=int, help="repeatable; default: 0, 1 and 2")
    options = parser.parse_args(argv)
    arms, seeds = options.arm or list(ARMS), options.seed or [0, 1, 2]
    kept = options.folder / "stream.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for seed in seeds:
        for arm in arms:
            if f"{arm}-{seed}" not in found:
                found[f"{arm}-{seed}"] = learn(options.folder / f"stream-{arm}-{seed}", arm, seed)
                write_atomically(kept, json.dumps(found) + "\n")
    print("\n".join(table(found, arms, seeds)))


if __name__ == "__main__":
    main()
