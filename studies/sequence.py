"""Three skills in a row, by SFT and by self-distillation: what is left of each.

    python studies/sequence.py DIR [SEED...]

Facts, routing and tools are learnt one after the other (`selfdistill learn` with open gates), and each also alone from
the base. Prints the retention matrix of each seed, each skill's last score as a share of its score when learnt alone
(with the 95% interval over seeds), and writes DIR/sequence.json and DIR/sequence.svg: that share along the training.
What is done is not done again; of a run that stands in DIR/sequence.json no other file is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from selfdistill.comparison.plots import Curve, over
from selfdistill.config.commands import LearnConfig
from selfdistill.continual.add_skill import add
from selfdistill.continual.learn import retention_matrix
from selfdistill.continual.ledger import START, Ledger
from selfdistill.data.bundled import packaged
from selfdistill.evaluation.statistics import seeds_interval
from selfdistill.runtime.files import write_atomically
from selfdistill.runtime.tracking import read_lines

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
    "anchors": (),
    "remember": "none",
}
LOOKS = 4
"""Measurements along each skill."""


def learn(state: Path, method: str, seed: int, skills: list[str]) -> dict[str, Any]:
    """Add the skills that are missing, and return what is left of each."""
    for skill in skills:
        done = [known.name for known in Ledger(str(state)).skills] if (state / START).is_dir() else []
        if skill in done:
            continue
        base = {} if done else {"model": MODEL, "prior": packaged("prior/test/facts.jsonl")}
        own = SKILLS[skill]
        values = COMMON | own | base | {"method": method, "seed": seed, "name": skill, "state": str(state)}
        looks = {"eval_steps": own["max_steps"] // LOOKS} if len(skills) > 1 else {}
        files = {part: packaged(f"{skill}.{part}.jsonl") for part in ("train", "test")}
        result = add(LearnConfig(**values | looks | {"data": files["train"], "test": files["test"]}))
        assert result["accepted"], result["reasons"]
    return retention_matrix(Ledger(str(state)))


def along(state: Path) -> list[dict[str, Any]]:
    """The scores of every skill along the whole sequence, with ``step`` counted from its beginning."""
    lines, start = [], 0
    for skill in Ledger(str(state)).skills:
        for line in read_lines(skill.folder / "along.jsonl"):
            lines.append(line | {"step": start + line["step"]})
        start += SKILLS[skill.name]["max_steps"]
    return lines


def each(values: list[float | None]) -> str:
    """Scores of all seeds beside each other; nothing where it was not measured."""
    return " / ".join(f"{value:.2f}" for value in values if value is not None)


def table(method: str, runs: list[dict[str, Any]]) -> list[str]:
    """The retention matrix of each seed, and what is left of each skill at the end, with its interval over seeds."""
    names = list(SKILLS)
    lines = [f"| {method} after | {' | '.join(names)} | prior |", "|---" * (len(names) + 2) + "|"]
    for row, after in enumerate(["base", *names]):
        cells = [each([run["matrix"][row][column] for run in runs]) for column in range(len(names))]
        lines.append(f"| {after} | {' | '.join([*cells, each([run['prior'][row] for run in runs])])} |")
    lines.append(f"| alone | {' | '.join(each([run['alone'][name] for run in runs]) for name in names)} | |")
    shares = []
    for column, name in enumerate(names):
        kept = [run["matrix"][-1][column] / run["alone"][name] for run in runs if run["alone"][name]]
        middle, low, high = seeds_interval(kept) if kept else (float("nan"), None, None)
        shares.append(f"{middle:.2f}" + ("" if low is None or low == high else f" ({low:.2f} to {high:.2f})"))
    return [*lines, f"| last, as a share of alone | {' | '.join(shares)} | |"]


def draw(found: dict[str, Any], seeds: list[int], file: Path) -> None:
    """Each skill's score as a share of that when learnt alone, along the sequence: the mean over seeds, and each.

    A run whose scores along the way were not kept (its ``along`` is empty) is left out.
    """
    curves = []
    for method in METHODS:
        runs = [found[f"{method}-{seed}"] for seed in seeds]
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
            curves.append(Curve(f"{method}: {name}", middle, lines))
    over(curves, "step", "score / score alone", file=file)


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
            write_atomically(kept, json.dumps(found) + "\n")
    for method in METHODS:
        print("\n".join(["", *table(method, [found[f"{method}-{seed}"] for seed in seeds])]))
    draw(found, seeds, Path(folder) / "sequence.svg")


if __name__ == "__main__":
    main(sys.argv[1], [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
