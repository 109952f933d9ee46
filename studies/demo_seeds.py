"""Mean and spread of several demo runs, as the table of docs/results.md.

    for seed in 0 1 2; do selfdistill demo --seed $seed --output_dir runs/seed-$seed; done
    python studies/demo_seeds.py runs/seed-*/demo.json

Prints, for the base, the teacher, SDFT at its last step, SFT where it matches it, and SFT at its last step: mean
and, in brackets, smallest and largest over the seeds. Then every point of every run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

COLUMNS = {"new": "new facts", "indirect": "indirect", "prior": "prior", "kl": "KL from base", "minutes": "minutes"}


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def row(name: str, points: list[dict[str, Any]]) -> str:
    for point in points:
        point["minutes"] = point["seconds"] / 60
    return f"| {name} | " + " | ".join(cell([point[key] for point in points]) for key in COLUMNS) + " |"


def main(paths: list[str]) -> None:
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    print(f"| {len(runs)} seeds | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    print(row("base", [run["base"] for run in runs]))
    print(f"| teacher | {cell([run['teacher'] for run in runs])} | | | | |")
    print(row("SDFT, last step", [run["sdft"][-1] for run in runs]))
    print(row("SFT, as good as SDFT (or its best)", [run["sft_matched"] for run in runs]))
    print(row("SFT, last step", [run["sft"][-1] for run in runs]))
    ratios = [run["sft_matched"]["kl"] / run["sdft"][-1]["kl"] for run in runs]
    print(f"\nKL from base, SFT as good / SDFT: {cell(ratios)}")
    print("\n| seed | method | step | new facts | indirect | prior | KL from base |\n|---|---|---|---|---|---|---|")
    for run in runs:
        for point in [*run["sdft"], *run["sft"]]:
            values = " | ".join(f"{point[key]:.3f}" for key in ("new", "indirect", "prior", "kl"))
            print(f"| {run['seed']} | {point['name']} | {point['step']} | {values} |")


if __name__ == "__main__":
    main(sys.argv[1:])
