"""PaST: does what rewards taught one SFT model reach another by the difference of weights? (arXiv 2601.11258)

    python studies/past.py DIR [SEED] [MODEL]

In DIR, SFT on a few chains makes `source`, SORT on all of them makes `rewarded` from it, and SFT on tickets makes
`target`. `merged` is target + rewarded - source. SORT stands for the reinforcement learning of the paper because GRPO
learnt nothing on these tasks. Prints what each answers of chains, tickets and the prior questions. Finished runs are
not repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import selfdistill as sd
from selfdistill.data.bundled import packaged

FIELDS = "python:selfdistill.data.bundled.checks.fields"
COMMON: dict[str, Any] = {"scorer": FIELDS, "mixed_precision": "bf16", "max_completion_length": 40}
"""Of every run and evaluation."""
SFT: dict[str, Any] = {"method": "sft", "batch_size": 4, "learning_rate": 5e-5, "max_steps": 20}
REWARDED: dict[str, Any] = {
    "method": "sort",
    "method_settings": {"plan": 0},
    "num_generations": 8,
    "num_demonstrations": 40,
    "batch_size": 2,
    "learning_rate": 1e-5,
    "max_steps": 20,
}
"""As in configs/study/methods/hints.yaml."""
SOURCE, TARGET = "chains", "tickets"


def trained(folder: Path, model: str, skill: str, seed: int, **settings: Any) -> str:
    """The final model of a run on a skill's training rows."""
    final = folder / "final"
    if not final.is_dir():
        fixed: dict[str, Any] = {"seed": seed, "save_steps": 0, "drift_steps": 0, "view_rows": 0}
        sd.train(model, packaged(f"{skill}.train.jsonl"), output_dir=folder, **COMMON | fixed | settings)
    return str(final)


def main(directory: str, seed: str = "0", model: str = "smollm2-135m") -> None:
    """Make the four models, and print a line for each."""
    folder, number = Path(directory), int(seed)
    source = trained(folder / "source", model, SOURCE, number, **SFT | {"num_demonstrations": 8, "max_steps": 5})
    rewarded = trained(folder / "rewarded", source, SOURCE, number, **REWARDED)
    target = trained(folder / "target", model, TARGET, number, **SFT)
    merged = folder / "merged"
    if not merged.is_dir():
        sd.merge(target, rewarded, source, output_dir=merged)
    named = {"base": model, "source": source, "rewarded": rewarded, "target": target, "merged": str(merged)}
    print(f"| model | {SOURCE} | {TARGET} | prior |\n|---|---|---|---|")
    for name, place in named.items():
        source_test, target_test = (packaged(f"{skill}.test.jsonl") for skill in (SOURCE, TARGET))
        transferred = sd.evaluate(place, source_test, **COMMON)
        kept = sd.evaluate(place, target_test, prior=packaged("prior/test"), **COMMON)
        print(f"| {name} | {transferred.accuracy:.2f} | {kept.accuracy:.2f} | {kept.prior_accuracy:.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
