"""The guides for a real model: quoted messages exist, the batch file requeues, numbers are planned or measured."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from selfdistill.cli_parser import COMMANDS, SWITCHES, parse

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
YOUR_MODEL, SERVING, PROBLEMS = (
    (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("your_model", "serving", "problems")
)
BATCH_FILE = re.findall(r'^```text title="train.sbatch"\n(.*?)^```$', YOUR_MODEL, re.DOTALL | re.MULTILINE)[0]
MOST_WORDS = 1500
"""Of all three pages, without blocks, addresses of links, and signs."""


def test_the_guides_are_short() -> None:
    text = re.sub(r"^```.*?^```$", "", YOUR_MODEL + SERVING + PROBLEMS, flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"\w[^\s|]*", re.sub(r"\]\([^)]*\)", "", text))) <= MOST_WORDS


# --- messages ---


def texts() -> Iterator[str]:
    """Every text in the package's code; ``\\0`` stands for what an f-string fills in."""
    for file in (ROOT / "selfdistill").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_quoted_messages_exist() -> None:
    section = PROBLEMS.split("\n## Messages\n")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `(.*?)`", section, re.MULTILINE)
    assert len(quoted) > 10
    known = list(texts())
    for message in quoted:
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert any(re.search(pattern, text) for text in known), message


# --- the batch file ---


def test_the_batch_files_command_can_be_parsed() -> None:
    line = next(line for line in BATCH_FILE.replace("\\\n", " ").splitlines() if line.startswith("srun"))
    command, given = parse(shlex.split(line)[2:])
    assert given["resume"]
    COMMANDS[command][0](**{name: value for name, value in given.items() if name not in SWITCHES})


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (143, True)])
def test_the_batch_file_requeues_a_run_that_was_stopped(tmp_path: Path, code: int, requeued: bool) -> None:
    for name, does in {"srun": f"exit {code}", "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", "-c", BATCH_FILE], cwd=tmp_path, env=places, check=False)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 17\n"


# --- numbers ---


def curve(name: str, method: str, step: int, key: str) -> list[float]:
    """A score at a step in all runs of a method."""
    kept = json.loads((DOCS / "comparisons" / f"{name}.json").read_text(encoding="utf-8"))
    runs = [run["evaluations"] for run in kept["runs"] if run["method"] == method]
    return sorted(line[key] for run in runs for line in run if line["step"] == step)


def span(scores: list[float]) -> str:
    """Smallest and largest, as in .37-.40."""
    return f"{min(scores):.2f}-{max(scores):.2f}".replace("0.", ".")


def test_when_to_stop_says_what_was_measured() -> None:
    text = " ".join(YOUR_MODEL.split())
    early, late = (span(curve("facts", "sdft", step, "prior_accuracy")) for step in (32, 80))
    assert {f"{share:.2f}" for share in curve("facts", "sdft", 0, "prior_accuracy")} == {"0.88"}
    assert f"it fell from .88 to {early} in the first 32 of 80 steps, then stayed ({late})" in text
    early, late = (span(curve("facts", "sdft", step, "accuracy")) for step in (32, 80))
    assert f"accuracy still rose, from {early} to {late}" in text
    lines = (DOCS / "comparisons" / "studies" / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [line["evaluations"] for line in map(json.loads, lines) if line["arm"] == "sdft+1/2"]
    assert [[line["step"] for line in run] for run in runs] == [[0, 80, 160]] * 3
    spans = {key: [span([run[n][key] for run in runs]) for n in (1, 2)] for key in ("prior_accuracy", "accuracy")}
    kept, learnt = spans.values()
    assert f"prior accuracy was {kept[0]} after 80 steps and {kept[1]} after 160" in text
    assert f"accuracy rose from {learnt[0]} to {learnt[1]} (three seeds)" in text
    live = {step: curve("teacher_skill", "sdft teacher=live", step, "prior_accuracy")[0] for step in (8, 24)}
    assert f"{curve('teacher_skill', 'sdft teacher=live', 8, 'accuracy')[0]:.2f}" == "0.97"
    assert f"from {live[8]:.3f} to {live[24]:.3f} (one seed, 40 prior questions)".replace("0.", ".") in text


@pytest.mark.slow
def test_the_plan_is_that_of_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = import_module("your_model")
    columns = [script.cells(found) for found in script.plans(["skill", "four", "full"])]
    for label, *values in zip(script.LABELS, *columns, strict=True):
        assert f"| {label} | {' | '.join(values)} |" in YOUR_MODEL
