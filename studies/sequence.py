"""Three skills in a row, by SFT and by self-distillation, without anchors and with them: what is left of each.

    python studies/sequence.py DIR [--arm ARM]... [--seed SEED]... [--part validation]

Facts, routing and tools are learnt one after the other (`selfdistill learn` with open gates; one arm has the opposite
order), and each also alone from the base. Prints the retention matrix of each seed, each skill's last score as a share
of its score when learnt alone by the same method, with all weights and without anchors (with the 95% interval over
seeds), and writes DIR/sequence.json and DIR/sequence.svg: that share along the training. Finished work is not repeated;
for a run listed in DIR/sequence.json no other file is needed. Newer runs have ``where`` and ``alone_where`` there: on
what each skill was learnt, in the sequence and alone; if that was interrupted, on what it ended.
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
from machine import where

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
STEPS_OF = {"sdft+anchors+steps": 5.0, "sdft+anchors+quarter": STEPS_WITH * 0.5 / 0.75}
"""Arms with another number in place of ``STEPS_WITH``. With a quarter of anchors, rows of the skill are as many."""
ORDER_OF = {"sdft+anchors+reversed": ["tools", "routing", "knowledge"]}
"""Arms with another order of the skills."""
ARMS: dict[str, dict[str, Any]] = {
    "sft": WITHOUT | {"method": "sft"},
    "sdft": WITHOUT | {"method": "sdft"},
    "sft+anchors": WITH | {"method": "sft"},
    "sdft+anchors": WITH | {"method": "sdft"},
    "sdft+anchors@16": WITH | {"method": "sdft", "batch_size": 16},
    "sdft+anchors+rates": WITH | {"method": "sdft", "batch_size": 16},
    "sdft+anchors+quarter": WITH | {"method": "sdft", "anchor_share": 0.25},
    "sdft+anchors+steps": WITH | {"method": "sdft"},
    "sdft+anchors+lora": WITH | {"method": "sdft", "lora_rank": 16, "learning_rate": 5e-4},
    "sdft+anchors+reversed": WITH | {"method": "sdft"},
}
OF_SKILL: dict[str, dict[str, dict[str, Any]]] = {
    "sdft+anchors+rates": {"tools": {"batch_size": 8, "learning_rate": 1e-4}},
}
"""What an arm changes for one skill, chosen on validation parts."""
LOOKS = 2
"""Measurements along each skill."""
WHERE = "where.json"
"""In the folder of a skill: on what it was learnt."""


def order_of(arm: str) -> list[str]:
    return ORDER_OF.get(arm, list(SKILLS))


def steps_of(skill: str, arm: str) -> int:
    steps: int = SKILLS[skill]["max_steps"]
    return round(steps * STEPS_OF.get(arm, STEPS_WITH)) if ARMS[arm]["anchors"] else steps


def learn(state: Path, arm: str, seed: int, skills: list[str], part: str) -> dict[str, Any]:
    """Add the skills that are missing; returns what is left of each and, as ``where``, on what each was learnt."""
    for skill in skills:
        done = [known.name for known in Ledger(str(state)).skills] if (state / START).is_dir() else []
        if skill in done:
            continue
        base = {} if done else {"model": MODEL, "prior": packaged(PRIORS[part])}
        steps = steps_of(skill, arm)
        own = {"max_steps": steps, "seed": seed, "name": skill, "state": str(state)}
        looks = {"eval_steps": steps // LOOKS} if len(skills) > 1 else {}
        files = {"data": packaged(f"{skill}.train.jsonl"), "test": packaged(f"{skill}.{part}.jsonl")}
        settings = COMMON | SKILLS[skill] | ARMS[arm] | OF_SKILL.get(arm, {}).get(skill, {})
        config = LearnConfig(**settings | own | base | looks | files)
        result = add(config)
        assert result["accepted"], result["reasons"]
        here = json.dumps(where(config.mixed_precision))
        (Ledger(str(state)).skills[-1].folder / WHERE).write_text(here, encoding="utf-8")
    ledger = Ledger(str(state))
    places = {skill.name: skill.folder / WHERE for skill in ledger.skills}
    known = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in places.items() if file.exists()}
    return retention_matrix(ledger) | {"where": known}


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
    names = order_of(arm)
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
    folder: Path, found: dict[str, Any], method: str, seed: int, part: str, known: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Each skill alone, by ``method`` without anchors: its score (``alone``), on what (``alone_where``).

    ``known`` has by skill what :func:`learn` has returned already.
    """
    for arm, settings in ARMS.items():
        if settings["method"] == method and f"{arm}-{seed}" in found:
            earlier = found[f"{arm}-{seed}"]
            return {name: earlier[name] for name in ("alone", "alone_where") if name in earlier}
    states = {name: folder / f"{method}-{seed}-{name}" for name in SKILLS if name not in known}
    runs = known | {name: learn(state, method, seed, [name], part) for name, state in states.items()}
    return {
        "alone": {name: run["matrix"][1][0] for name, run in runs.items()},
        "alone_where": {name: run["where"][name] for name, run in runs.items() if name in run["where"]},
    }


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
            whole = learn(state, arm, seed, order_of(arm), options.part)
            first = {} if ARMS[arm]["anchors"] else {next(iter(SKILLS)): whole}
            single = alone(folder, found, ARMS[arm]["method"], seed, options.part, first)
            found[f"{arm}-{seed}"] = {**whole, **single, "along": along(state, arm)}
            write_atomically(kept, json.dumps(found) + "\n")
    for arm in arms:
        print("\n".join(["", *table(arm, [found[f"{arm}-{seed}"] for seed in seeds])]))
    draw(found, arms, seeds, folder / "sequence.svg")


if __name__ == "__main__":
    main()
