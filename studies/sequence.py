"""Three skills in a row, by SFT and by self-distillation: what is left of each.

    python studies/sequence.py DIR [SEED...]

Facts, routing and tools are learnt one after the other (`selfdistill learn` with open gates), and each also alone from
the base. Prints the retention matrices (means over seeds), each skill's last score beside its score when learnt alone,
and writes DIR/sequence.json and DIR/sequence.svg: the score of each skill as a share of that, along the training. What
is done is not done again; of a run that stands in DIR/sequence.json no other file is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from selfdistill.addition import add
from selfdistill.command_config import LearnConfig
from selfdistill.disk import write_whole
from selfdistill.distances import packaged
from selfdistill.learn import retention
from selfdistill.ledger import START, Ledger
from selfdistill.plots import Curve, over
from selfdistill.tracking import read_lines

MODEL = "smollm2-135m"
METHODS = ("sft", "sdft")
SKILLS: dict[str, dict[str, Any]] = {
    "knowledge": {"context": "document:repeats=2", "max_completion_length": 32, "max_steps": 80, "scorer": "contains"},
    "routing": {"context": "turns:repeats=4", "max_completion_length": 12, "max_steps": 24},
    "tools": {"context": "turns:repeats=4", "max_completion_length": 48, "max_steps": 40},
}
COMMON: dict[str, Any] = {
    "action": "add",
    "teacher": "frozen",
    "temperature": 0.3,
    "learning_rate": 1e-4,
    "batch_size": 16,
    "save_steps": 0,
    "logging_steps": 10,
    "view_rows": 0,
    "torch_compile": True,
    "min_teacher": 0.0,
    "max_prior_drop": 1.0,
    "max_skill_drop": 1.0,
}
LOOKS = 4
"""Measurements along each skill."""


def learn(state: Path, method: str, seed: int, skills: list[str]) -> dict[str, Any]:
    """Add the skills that are missing, and return what is left of each."""
    for skill in skills:
        done = [known.name for known in Ledger(str(state)).skills] if (state / START).is_dir() else []
        if skill in done:
            continue
        base = {} if done else {"model": MODEL, "prior": packaged("prior.test.jsonl")}
        own = SKILLS[skill]
        values = COMMON | own | base | {"method": method, "seed": seed, "name": skill, "state": str(state)}
        looks = {"eval_steps": own["max_steps"] // LOOKS} if len(skills) > 1 else {}
        files = {part: packaged(f"{skill}.{part}.jsonl") for part in ("train", "test")}
        result = add(LearnConfig(**values | looks | {"data": files["train"], "test": files["test"]}))
        assert result["accepted"], result["reasons"]
    return retention(Ledger(str(state)))


def along(state: Path) -> list[dict[str, Any]]:
    """The scores of every skill along the whole sequence, with ``step`` counted from its beginning."""
    lines, start = [], 0
    for skill in Ledger(str(state)).skills:
        for line in read_lines(skill.folder / "along.jsonl"):
            lines.append(line | {"step": start + line["step"]})
        start += SKILLS[skill.name]["max_steps"]
    return lines


def main(folder: str, seeds: list[int]) -> None:
    names = list(SKILLS)
    kept = Path(folder) / "sequence.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for seed in seeds:
        for method in METHODS:
            if f"{method}-{seed}" in found:
                continue
            state = Path(folder) / f"{method}-{seed}"
            whole = learn(state, method, seed, names)
            alone = {names[0]: whole["matrix"][1][0]}
            for name in names[1:]:
                alone[name] = learn(Path(folder) / f"{method}-{seed}-{name}", method, seed, [name])["matrix"][1][0]
            found[f"{method}-{seed}"] = {**whole, "alone": alone, "along": along(state)}
            write_whole(kept, json.dumps(found) + "\n")
    curves = []
    for method in METHODS:
        runs = [found[f"{method}-{seed}"] for seed in seeds]
        print(f"\n{method}, means of {len(runs)} seeds\n\n| after | {' | '.join(names)} | prior |")
        print("|---" * (len(names) + 2) + "|")
        for row, after in enumerate(["base", *names]):
            scores = [[run["matrix"][row][column] for run in runs] for column in range(len(names))]
            cells = ["" if None in values else f"{mean(values):.3f}" for values in scores]
            print(f"| {after} | {' | '.join(cells)} | {mean(run['prior'][row] for run in runs):.3f} |")
        for column, name in enumerate(names):
            ratios = [run["matrix"][-1][column] / run["alone"][name] for run in runs if run["alone"][name]]
            shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            share = f"{mean(ratios):.3f} ({shown})" if ratios else "never learnt alone"
            print(f"{name}: last score as a share of that when learnt alone: {share}")
            lines = [
                [
                    (float(at["step"]), at["skills"][name] / run["alone"][name])
                    for at in run["along"]
                    if name in at["skills"] and run["alone"][name]
                ]
                for run in runs
            ]
            middle = [(at[0][0], mean(y for _, y in at)) for at in zip(*lines, strict=True)]
            curves.append(Curve(f"{method}: {name}", middle, lines))
    over(curves, "step", "score as a share of the single-task score", file=Path(folder) / "sequence.svg")


if __name__ == "__main__":
    main(sys.argv[1], [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
