"""What `check` predicts about spill on the package's skills, to compare with what runs then forget.

    python studies/spill.py [MODEL] [SETTINGS]

SETTINGS are more settings of `check` as JSON, e.g. '{"mixed_precision": "bf16"}'. Prints a table: what a few steps of
SFT and of SDFT gain on the demonstrations, and how far they move general prompts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from selfdistill.config import CheckConfig
from selfdistill.data.bundled import packaged
from selfdistill.evaluation import check

SETS: dict[str, dict[str, Any]] = {
    "routing": {"contexts": ["turns:repeats=4"], "max_completion_length": 48},
    "tools": {"contexts": ["turns:repeats=2"], "max_completion_length": 48},
    "knowledge": {"contexts": ["document:repeats=2"], "max_completion_length": 48},
    "codes": {"contexts": ["turns:repeats=4"], "max_completion_length": 48},
    "letters": {"contexts": ["turns:repeats=2"], "max_completion_length": 96},
}
COMMON: dict[str, Any] = {"spill": True, "learning_rate": 5e-5, "temperature": 0.3, "sample": 16}


def main(model: str = "smollm2-135m", settings: str = "{}") -> None:
    print("| set | method | gain | moved |\n|---|---|---|---|")
    for name, own in SETS.items():
        values = COMMON | own | json.loads(settings)
        result = check(CheckConfig(model=model, data=packaged(f"{name}.train.jsonl"), **values))
        assert result.spill is not None
        if result.spill.untried:
            sys.exit(result.spill.untried)
        for method, trial in (("SFT", result.spill.sft), ("SDFT", result.spill.sdft)):
            assert trial is not None
            print(f"| {name} | {method} | {trial.gain:.2f} | {trial.moved:.3f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
