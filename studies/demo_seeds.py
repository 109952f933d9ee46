"""Mean and spread of several demo runs, as a table.

    for seed in 0 1 2; do selfdistill demo --seed $seed --output_dir runs/seed-$seed; done
    python studies/demo_seeds.py runs/seed-*/demo.json

Prints a line for the base, the teacher and every arm: mean and, in brackets, smallest and largest over the seeds. Then
every arm of every run, with each kind of prior questions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

COLUMNS = {"new": "new", "prior": "prior", "kl": "KL", "minutes": "minutes"}


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def row(name: str, points: list[dict[str, Any]]) -> str:
    points = [{**point, "minutes": point["seconds"] / 60} for point in points]
    return f"| {name} | " + " | ".join(cell([point[key] for point in points]) for key in COLUMNS) + " |"


def main(paths: list[str]) -> None:
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    kinds = list(runs[0]["base"]["kinds"])
    print(f"| {len(runs)} seeds | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    print(row("base", [run["base"] for run in runs]))
    print(f"| teacher | {cell([run['teacher'] for run in runs])} | | | |")
    for arm in runs[0]["arms"]:
        print(row(arm, [run["arms"][arm] for run in runs]))
    print(f"\n| seed | arm | new | prior | KL | {' | '.join(kinds)} |")
    print("|---" * (5 + len(kinds)) + "|")
    for run in runs:
        for arm, point in run["arms"].items():
            values = [point["new"], point["prior"], point["kl"], *(point["kinds"][kind] for kind in kinds)]
            print(f"| {run['seed']} | {arm} | {' | '.join(f'{value:.3f}' for value in values)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
