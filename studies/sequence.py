"""Three skills in a row, by SFT and by self-distillation, without anchors and with them: what is left of each.

    python studies/sequence.py DIR [--arm ARM]... [--seed SEED]... [--part validation]

Facts, routing and tools are learnt one after the other (`selfdistill learn` with open gates), and each also alone from
the base. Prints the retention matrix of each seed, each skill's last score as a share of its score when learnt alone
by the same method without anchors (with the 95% interval over seeds), and writes DIR/sequence.json and
DIR/sequence.svg: that share along the training. Finished work is not repeated; for a run listed in
DIR/sequence.json no other file is needed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from intervals import cell

from selfdistill.comparison.plots import Curve, over
from selfdistill.config.commands import LearnConfig
from selfdistill.continual.add_skill import add
from selfdistill.continual.learn import retention_matrix
from selfdistill.continual.ledger import START, Ledger
from selfdistill.data.bundled import packaged
from selfdistill.runtime.files import write_atomically
from selfdistill.runtime.tracking import read_lines

MODEL = "smollm2-135m"
PRIORS = {"test": "prior/test", "validation": "prior/validation"}
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
    "min_teacher": 0.0,
    "max_prior_drop": 1.0,
    "max_skill_drop": 1.0,
}
WITHOUT: dict[str, Any] = {"anchors": (), "remember": "none"}
WITH: dict[str, Any] = {
    "anchors": ("package",),
    "anchor_share": 0.5,
    "remember": "all",
    "max_completion_length": 48,
    "batch_size": 8,
    "learning_rate": 5e-5,
}
STEPS_WITH = 2.5
"""With anchors, as many times the steps: the rate is half of that without, and only half of each batch is the skill."""
ARMS: dict[str, dict[str, Any]] = {
    "sft": WITHOUT | {"method": "sft"},
    "sdft": WITHOUT | {"method": "sdft"},
    "sft+anchors": WITH | {"method": "sft"},
    "sdft+anchors": WITH | {"method": "sdft"},
    "sdft+anchors@16": WITH | {"method": "sdft", "batch_size": 16},
}
LOOKS = 2
"""Measurements along each skill."""


def steps_of(skill: str, arm: str) -> int:
    steps: int = SKILLS[skill]["max_steps"]
    return round(steps * STEPS_WITH) if ARMS[arm]["anchors"] else steps


def learn(state: Path, arm: str, seed: int, skills: list[str], part: str) -> dict[str, Any]:
    """Add the skills that are missing, and return what is left of each."""
    for skill in skills:
        done = [known.name for known in Ledger(str(state)).skills] if (state / START).is_dir() else []
        if skill in done:
            continue
        base = {} if done else {"model": MODEL, "prior": packaged(PRIORS[part])}
        steps = steps_of(skill, arm)
        own = {"max_steps": steps, "seed": seed, "name": skill, "state": str(state)}
        looks = {"eval_steps": steps // LOOKS} if len(skills) > 1 else {}
        files = {"data": packaged(f"{skill}.train.jsonl"), "test": packaged(f"{skill}.{part}.jsonl")}
        result = add(LearnConfig(**COMMON | SKILLS[skill] | ARMS[arm] | own | base | looks | files))
        assert result["accepted"], result["reasons"]
    return retention_matrix(Ledger(str(state)))


def along(state: Path, arm: str) -> list[dict[str, Any]]:
    """The scores of every skill along the whole sequence, with ``step`` counted from its beginning."""
    lines, start = [], 0
    for skill in Ledger(str(state)).skills:
        for line in read_lines(skill.folder / "along.jsonl"):
            lines.append(line | {"step": start + line["step"]})
        start += steps_of(skill.name, arm)
    return lines


def each(values: list[float | None]) -> str:
    """Scores of all seeds beside each other; nothing where it was not measured."""
    return " / ".join(f"{value:.2f}" for value in values if value is not None)


def table(arm: str, runs: list[dict[str, Any]]) -> list[str]:
    """The retention matrix of each seed, and what is left of each skill at the end, with its interval over seeds."""
    names = list(SKILLS)
    lines = [f"| {arm} after | {' | '.join(names)} | prior |", "|---" * (len(names) + 2) + "|"]
    for row, after in enumerate(["base", *names]):
        cells = [each([run["matrix"][row][column] for run in runs]) for column in range(len(names))]
        lines.append(f"| {after} | {' | '.join([*cells, each([run['prior'][row] for run in runs])])} |")
    lines.append(f"| alone | {' | '.join(each([run['alone'][name] for run in runs]) for name in names)} | |")
    shares = []
    for column, name in enumerate(names):
        kept = [run["matrix"][-1][column] / run["alone"][name] for run in runs if run["alone"][name]]
        shares.append(cell(kept, most=math.inf) if kept else "nan")
    return [*lines, f"| last, as a share of alone | {' | '.join(shares)} | |"]


def draw(found: dict[str, Any], arms: list[str], seeds: list[int], file: Path) -> None:
    """Each skill's score as a share of that when learnt alone, along the sequence: the mean over seeds, and each.

    A run whose scores along the way were not kept (its ``along`` is empty) is left out.
    """
    curves = []
    for arm in arms:
        runs = [found[f"{arm}-{seed}"] for seed in seeds]
        for name in SKILLS:
            lines = [
                [
                    (float(at["step"]), at["skills"][name] / run["alone"][name])
                    for at in run["along"]
                    if name in at["skills"]
                ]
                for run in runs
                if run["along"] and run["alone"][name]
            ]
            middle = [(at[0][0], mean(y for _, y in at)) for at in zip(*lines, strict=True)]
            curves.append(Curve(f"{arm}: {name}", middle, lines))
    over(curves, "step", "score / score alone", file=file)


def alone(
    folder: Path, found: dict[str, Any], method: str, seed: int, part: str, known: dict[str, float]
) -> dict[str, float]:
    """The score of each skill when it is learnt alone, by ``method`` without anchors; of some it is ``known``."""
    for arm, settings in ARMS.items():
        if settings["method"] == method and f"{arm}-{seed}" in found:
            earlier: dict[str, float] = found[f"{arm}-{seed}"]["alone"]
            return earlier
    states = {name: folder / f"{method}-{seed}-{name}" for name in SKILLS if name not in known}
    return known | {name: learn(state, method, seed, [name], part)["matrix"][1][0] for name, state in states.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learn three skills in a row.")
    parser.add_argument("folder", type=Path, help="results, and the states on the way to them")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="repeatable; default: all")
    parser.add_argument("--seed", action="append", type=int, help="repeatable; default: 0, 1 and 2")
    parser.add_argument("--part", choices=list(PRIORS), default="test", help="of the rows, for scores")
    options = parser.parse_args(argv)
    folder, arms, seeds = options.folder, options.arm or list(ARMS), options.seed or [0, 1, 2]
    kept = folder / "sequence.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for seed in seeds:
        for arm in arms:
            if f"{arm}-{seed}" in found:
                continue
            state = folder / f"{arm}-{seed}"
            whole = learn(state, arm, seed, list(SKILLS), options.part)
            first = {} if ARMS[arm]["anchors"] else {next(iter(SKILLS)): whole["matrix"][1][0]}
            single = alone(folder, found, ARMS[arm]["method"], seed, options.part, first)
            found[f"{arm}-{seed}"] = {**whole, "alone": single, "along": along(state, arm)}
            write_atomically(kept, json.dumps(found) + "\n")
    for arm in arms:
        print("\n".join(["", *table(arm, [found[f"{arm}-{seed}"] for seed in seeds])]))
    draw(found, arms, seeds, folder / "sequence.svg")


if __name__ == "__main__":
    main()
