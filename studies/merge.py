"""Comparisons that were made apart (other seeds, other methods, several machines) as one: docs/comparisons.

    python studies/merge.py docs/comparisons/NAME TEACHER_SCORE runs/*/comparison.json

Writes NAME.json and NAME.svg, and prints the table and what may be concluded. A run that several files hold (the same
method, learning rate and seed) is taken from the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from intervals import interval_text

from selfdistill.comparison.conclusions import Compared, bases_of, mean_points, points_of, sentences, table
from selfdistill.comparison.plots import Curve, trade_off

KEYS = ("accuracy", "prior_accuracy", "kl_base")


def main(name: str, teacher: float, files: list[str]) -> None:
    found: dict[str, Compared] = {}
    budgets = set()
    for file in files:
        kept = json.loads(Path(file).read_text(encoding="utf-8"))
        budgets.add(kept["budget"])
        for values in kept["runs"]:
            run = Compared(**{key: value for key, value in values.items() if key != "name"})
            found.setdefault(run.name, run)
    (budget,) = budgets
    runs = sorted(found.values(), key=lambda run: run.seed)  # stable: methods keep their order
    starts = [run.evaluations[0] for run in runs]
    sizes = [{"": len(e["correct"])} | {name: len(p["correct"]) for name, p in e["prior"].items()} for e in starts]
    assert all(size == sizes[0] for size in sizes), "runs of different rows"
    kept = {"budget": budget, "runs": [run.__dict__ for run in runs]}
    Path(f"{name}.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    points = points_of(runs)
    curves = [Curve(label, mean_points(seeds), seeds) for label, seeds in points.items()]
    axes = ("prior abilities, share right", "new task, share right")
    trade_off(curves, bases_of(points), teacher, *axes, file=Path(f"{name}.svg"))
    print(sentences(runs, budget), "\n")
    for row in table(runs):
        cells = []
        for key in KEYS:
            middle, low, high = row[key]
            cells.append(f"{middle:.2f}{interval_text(low, high)}")
        print(f"| {row['method']} | {row['steps']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
