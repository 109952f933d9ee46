"""Comparisons that were made apart (other seeds, other methods, several machines) as one: docs/comparisons.

    python studies/merge.py docs/comparisons/NAME TEACHER_SCORE runs/*/comparison.json

Writes NAME.json and NAME.svg, and prints the table and what may be concluded. A run that several files hold (the same
method, learning rate and seed) is taken from the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from selfdistill.comparison.conclusions import Compared, mean_points, points_of, sentences, table
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
    starts = [{key: run.evaluations[0][key] for key in ("correct", "prior")} for run in runs]
    assert all(start == starts[0] for start in starts), "runs of different bases or rows"
    kept = {"budget": budget, "runs": [run.__dict__ for run in runs]}
    Path(f"{name}.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    curves = [Curve(label, mean_points(seeds), seeds) for label, seeds in points_of(runs).items()]
    start = (runs[0].evaluations[0]["prior_accuracy"], runs[0].evaluations[0]["accuracy"])
    axes = ("prior abilities, share right", "new task, share right")
    trade_off(curves, start, teacher, *axes, file=Path(f"{name}.svg"))
    print(sentences(runs, budget), "\n")
    for row in table(runs):
        cells = []
        for key in KEYS:
            middle, low, high = row[key]
            cells.append(f"{middle:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})"))
        print(f"| {row['method']} | {row['steps']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
