"""What `check` foretells of spill on the package's skills, to compare with what runs then forget.

    python studies/spill.py [MODEL] [SETTINGS]

SETTINGS are more settings of `check` as JSON, e.g. '{"mixed_precision": "bf16"}'. Prints a table: for a small step of
SFT and one of SDFT, what it gains on the demonstrations, how far it moves general prompts, and spill, moved / gain^2.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from selfdistill.config import CheckConfig
from selfdistill.data.bundled import packaged
from selfdistill.evaluation import check

SETS: dict[str, dict[str, Any]] = {
    "routing": {"contexts": ["turns:repeats=2"], "max_completion_length": 24},
    "tools": {"contexts": ["turns:repeats=2"], "max_completion_length": 40},
    "knowledge": {"contexts": ["document:repeats=2"], "max_completion_length": 32},
}
COMMON: dict[str, Any] = {"spill": True, "temperature": 0.3, "sample": 16}


def main(model: str = "smollm2-135m", settings: str = "{}") -> None:
    print("| set | method | gain | moved | spill |\n|---|---|---|---|---|")
    for name, own in SETS.items():
        values = COMMON | own | json.loads(settings)
        result = check(CheckConfig(model=model, data=packaged(f"{name}.train.jsonl"), **values))
        assert result.spill is not None
        if result.spill.untried:
            sys.exit(result.spill.untried)
        for method, step in (("SFT", result.spill.sft), ("SDFT", result.spill.sdft)):
            assert step is not None
            spill = "-" if step.spill is None else f"{step.spill:.3g}"
            print(f"| {name} | {method} | {step.gain:.4f} | {step.moved:.3g} | {spill} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
