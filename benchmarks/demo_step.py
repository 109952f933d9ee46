"""A step of the demo in this checkout against the same step in another one.

    python benchmarks/demo_step.py OLD_CHECKOUT [--arm 'SDFT + anchors'] [--rounds 3] [--steps 6] [--model smollm2-135m]

Both checkouts run ``selfdistill train`` in turn, each in a process of its own, with the settings of an arm of this
checkout's demo; what the other one lacks as a setting, it refuses. The learning rate is so small that the model stays
what it is. Prints the median seconds of a step and of its parts, as the runs' ``metrics.jsonl`` tell them, and the
ratios of the medians. The first step of a run only warms up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from selfdistill.data.bundled import packaged
from selfdistill.demo import ARMS, SHARED

HERE = Path(__file__).resolve().parents[1]
PARTS = ("step", "rollout", "teacher", "student", "update")


def run(checkout: Path, settings: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics of a run's steps after the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "selfdistill", "train", "--output_dir", f"{folder}/run"]
        command += [f"--{name}={value}" for name, value in settings.items()]
        # Python looks for a module in the working directory first.
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        if done.returncode:
            *_, last = ["no message", *done.stderr.strip().splitlines()]
            raise SystemExit(f"error: {checkout}: exit code {done.returncode}: {last}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("old", type=Path, help="folder of the other checkout")
    parser.add_argument("--arm", choices=list(ARMS), default="SDFT + anchors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default=SHARED["model"])
    options = parser.parse_args()
    settings = {name: value for name, value in (SHARED | ARMS[options.arm]).items() if name != "test"}
    settings |= {"model": options.model, "max_steps": 1 + options.steps, "logging_steps": 1, "learning_rate": 1e-12}
    if "anchors" in settings:
        settings["anchors"] = packaged("anchors.jsonl")  # of this checkout in both, as are the data
    found: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for number in range(options.rounds):
        for name, checkout in (("old", options.old.resolve()), ("new", HERE)):
            found[name] += run(checkout, settings)
            step = median(line["time/step_s"] for line in found[name])
            print(f"round {number + 1}, {name}: {step:.2f} s a step so far", file=sys.stderr, flush=True)
    for name, lines in found.items():
        print(f"{name}: {median(line['completion/length'] for line in lines):.1f} tokens a reply")
    print("| part | old, s | new, s | ratio |\n|---|---|---|---|")
    for part in PARTS:
        old, new = (median(line.get(f"time/{part}_s", 0.0) for line in found[name]) for name in found)
        print(f"| {part} | {old:.3f} | {new:.3f} | {f'{new / old:.2f}' if old else ''} |")


if __name__ == "__main__":
    main()
