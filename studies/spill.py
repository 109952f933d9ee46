"""What `check` predicts about spill on the package's skills, to compare with what runs then forget.

    python studies/spill.py [MODEL] [SETTINGS]

SETTINGS are more settings of `check` as JSON, e.g. '{"mixed_precision": "bf16"}'. Prints a table: what a few steps of
SFT and of SDFT gain on the demonstrations, and how far they move general prompts. Data, context, temperature and each
method's rate are those of its runs without anchors (configs/study/anchors). `check` takes one rate, so where the two
differ it runs once for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from study_file import read_studies, runs_of

from selfdistill.config import CheckConfig, TrainConfig
from selfdistill.evaluation import check
from selfdistill.evaluation.spill import Spill

STUDIES = Path(__file__).resolve().parents[1] / "configs" / "study" / "anchors"
NAMES = ("routing", "tools", "facts", "codes", "letters")
METHODS = ("sft", "sdft")
"""Arms without anchors."""


def spill(run: TrainConfig, model: str, settings: dict[str, Any]) -> Spill:
    """The trials of both methods at the rate of the run."""
    values = {name: getattr(run, name) for name in ("data", "max_completion_length", "temperature", "learning_rate")}
    config = CheckConfig(**values | {"model": model, "contexts": [run.context], "sample": 16, "spill": True} | settings)
    found = check(config).spill
    assert found is not None
    if found.untried:
        sys.exit(found.untried)
    return found


def main(model: str = "smollm2-135m", settings: str = "{}") -> None:
    print("| set | method | gain | moved |\n|---|---|---|---|")
    for study in read_studies([STUDIES / f"{name}.yaml" for name in NAMES]):
        runs = {run.arm: run.config("run") for run in runs_of(study) if run.arm in METHODS}
        trials: dict[float, Spill] = {}
        for method in METHODS:
            rate = runs[method].learning_rate
            if rate not in trials:
                trials[rate] = spill(runs[method], model, json.loads(settings))
            trial = getattr(trials[rate], method)
            print(f"| {study.name} | {method.upper()} | {trial.gain:.2f} | {trial.moved:.3f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
