"""A step of SDFT against a step of SFT on the demo's data: ratio, and the parts of each.

    python benchmarks/step.py ['{"teacher": "frozen"}']

Settings above those of the demo as JSON. Steps alternate in one process; the learning rate is so small that the model
stays what it is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from statistics import median
from typing import Any

from selfdistill import demo
from selfdistill.config import TrainConfig
from selfdistill.evaluate import packaged
from selfdistill.run import Run

STEPS = 8


def main(settings: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        common = demo.SHARED | {"output_dir": folder, "data": packaged("knowledge.train.jsonl")} | settings
        runs = {
            name: Run(TrainConfig(**(method | common | {"learning_rate": 1e-12})))
            for name, method in (("SDFT", demo.SDFT), ("SFT", demo.SFT))
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for step in range(STEPS + 1):
            for name, run in runs.items():
                metrics = run.step(step)
                if step:
                    found[name].append(metrics)
    parts = {
        name: {
            key.removeprefix("time/"): round(median(m[key] for m in steps), 2)
            for key in steps[0]
            if key.startswith("time/")
        }
        for name, steps in found.items()
    }
    for name, seconds in parts.items():
        print(name, seconds, f"{median(m['completion/length'] for m in found[name]):.1f} tokens a reply")
    print(f"SDFT / SFT: {parts['SDFT']['step_s'] / parts['SFT']['step_s']:.2f}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
