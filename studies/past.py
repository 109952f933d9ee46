"""PaST: does what SORT, largely from demonstrations, taught one SFT model reach another by a difference of weights?

    python studies/past.py DIR [SEED] [MODEL]

In the folder of the model and the seed in DIR, SFT on a few chains makes `source`. From it SORT makes `rewarded`, and
SFT on the same rows makes `longer`: what does a merge with mere SFT move? SFT on sums makes `target`. The merges are
target + rewarded - source and target + longer - source. Prints what each model answers of chains, sums and the prior
questions, in at most 40 tokens (study files ask the prior in 48). Finished runs are not repeated, and a stopped one
goes on.

The paper (arXiv 2601.11258) moves what reinforcement learning taught. Here SORT stands for it, which also learns the
demonstrations of prompts that it fails, because GRPO from the base learnt nothing of chains in 20 steps
(configs/study/methods/hints.yaml). GRPO from `source` was not tried.
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
FURTHER: dict[str, Any] = {"num_demonstrations": 40, "batch_size": 2, "learning_rate": 1e-5, "max_steps": 20}
"""From `source`."""
SORT: dict[str, Any] = FURTHER | {"method": "sort", "method_settings": {"plan": 0}, "num_generations": 8}
"""As in configs/study/methods/hints.yaml."""
SOURCE, TARGET = "chains", "sums"


def trained(folder: Path, model: str, skill: str, seed: int, **settings: Any) -> str:
    """The final model of a run on a skill's training rows."""
    final = folder / "final"
    if not final.is_dir():
        data = packaged(f"{skill}.train.jsonl")
        fixed: dict[str, Any] = {"seed": seed, "save_steps": 0, "drift_steps": 0, "view_rows": 0}
        sd.train(model, data, output_dir=folder, resume=folder.is_dir(), **COMMON | fixed | settings)
    return str(final)


def main(directory: str, seed: str = "0", model: str = "smollm2-135m") -> None:
    """Make the models, and print a line for each."""
    number = int(seed)
    folder = Path(directory) / f"{model.strip('/').replace('/', '-')}-{number}"
    source = trained(folder / "source", model, SOURCE, number, **SFT | {"num_demonstrations": 8, "max_steps": 5})
    taught = {
        "rewarded": trained(folder / "rewarded", source, SOURCE, number, **SORT),
        "longer": trained(folder / "longer", source, SOURCE, number, **SFT | FURTHER),
    }
    target = trained(folder / "target", model, TARGET, number, **SFT)
    named = {"base": model, "source": source, **taught, "target": target}
    for name, place in taught.items():
        merged = folder / f"merged from {name}"
        if not merged.is_dir():
            sd.merge(target, place, source, output_dir=merged)
        named[merged.name] = str(merged)
    print(f"| model | {SOURCE} | {TARGET} | prior |\n|---|---|---|---|")
    for name, place in named.items():
        source_test, target_test = (packaged(f"{skill}.test.jsonl") for skill in (SOURCE, TARGET))
        transferred = sd.evaluate(place, source_test, **COMMON)
        kept = sd.evaluate(place, target_test, prior=packaged("prior/test"), **COMMON)
        print(f"| {name} | {transferred.accuracy:.2f} | {kept.accuracy:.2f} | {kept.prior_accuracy:.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
