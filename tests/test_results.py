"""What the pages of results conclude follows from the measurements that stand beside it."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from results_pages import results_text

from selfdistill.comparison.conclusions import Compared, matched, sentences
from selfdistill.data import load_demonstrations
from selfdistill.environments import make_environment

DOCS = Path(__file__).parent.parent / "docs"
COMPARISONS = ("facts", "science", "science_methods", "baselines", "teacher_skill", "context")


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_paragraph_is_what_the_measurements_say(name: str) -> None:
    kept = json.loads((DOCS / "comparisons" / f"{name}.json").read_text(encoding="utf-8"))
    runs = [Compared(**run) for run in kept["runs"]]
    said = sentences(runs, kept["budget"])
    assert said in " ".join(results_text().replace("\n> ", " ").split())
    for run in runs:
        for evaluation in run.evaluations:
            assert evaluation["accuracy"] == sum(evaluation["correct"]) / evaluation["items"]
            shares = [sum(prior["correct"]) / prior["items"] for prior in evaluation["prior"].values()]
            assert evaluation["prior_accuracy"] == pytest.approx(sum(shares) / len(shares))


def test_a_run_compared_with_itself_loses_what_the_design_says() -> None:
    lost: dict[str, float] = {}
    for name in COMPARISONS:
        kept = json.loads((DOCS / "comparisons" / f"{name}.json").read_text(encoding="utf-8"))
        for run in kept["runs"]:
            last = matched(run["evaluations"][-1:], 0)
            gap = matched(run["evaluations"], last.accuracy).prior_accuracy - last.prior_accuracy
            lost[run["method"]] = max(gap, lost.get(run["method"], 0))
    most = max(lost, key=lambda method: lost[method])
    text = " ".join((DOCS / "design_running.md").read_text(encoding="utf-8").split())
    said = f"lost up to {100 * lost[most]:.0f} points ({most.upper()}; SFT up to {100 * lost['sft']:.0f})"
    assert f"a run compared with itself {said}" in text


def test_the_tables_of_studies_are_what_their_lines_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS.parent / "studies")
    study_file, summary = import_module("study_file"), import_module("summary")
    text = results_text() + (DOCS / "engines.md").read_text(encoding="utf-8")
    files = sorted((DOCS / "comparisons" / "studies").glob("*.jsonl"))
    assert files
    for file in files:
        (study,) = study_file.read_studies(list((DOCS.parent / "configs" / "study").glob(f"*/{file.stem}.yaml")))
        lines = summary.table(study_file.runs_of(study), study_file.results_of(study, file.parent))
        rows = [line for line in lines if line.startswith(("|", "-"))]
        assert len(rows) > 3
        assert [line for line in rows if line not in text] == []


def test_the_shop_by_kind_of_question_is_what_its_lines_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the numbers concluded from it."""
    monkeypatch.syspath_prepend(DOCS.parent / "studies")
    make_shop = import_module("make_shop")
    questions = {question.text: question for question in make_shop.questions("test")}
    asked = [questions[row.prompt[-1]["content"]].kind for row in load_demonstrations("bundled:shop.test.jsonl")]
    lines = (DOCS / "comparisons" / "studies" / "shop.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    kinds, arms = list(make_shop.ASKED["test"]), ("sft", "sdft", "sft+1/2", "sdft+1/2")

    def right(kind: str, evaluation: dict[str, Any]) -> int:
        return sum(int(digit) for digit, own in zip(evaluation["correct"], asked, strict=True) if own == kind)

    ends = {arm: [run["evaluations"][-1] for run in runs if run["arm"] == arm] for arm in arms}
    shop, calls = make_environment("bundled:shop")(), {}
    for question in questions.values():
        acted = make_shop.episode(shop, question)
        calls[question.kind] = [call["function"]["name"] for m in acted for call in m.get("tool_calls", [])]
    shop.close()
    text = (DOCS / "results_methods.md").read_text(encoding="utf-8")
    for kind in kinds:
        cells = [", ".join(f"`{name}`" for name in calls[kind]), str(asked.count(kind))]
        cells.append(", ".join({str(right(kind, run["evaluations"][0])) for run in runs}))
        cells += [", ".join(str(right(kind, end)) for end in ends[arm]) for arm in arms]
        (row,) = re.findall(rf"^\| `{kind}` \|.*", text, re.MULTILINE)
        assert row.endswith(f" | {' | '.join(cells)} |")

    def total(arm: str, some: list[str]) -> int:
        return sum(right(kind, end) for kind in some for end in ends[arm])

    said, seeds = " ".join(text.split()), len(ends["sdft"])
    counted = [kind for kind in kinds if "stock" in calls[kind]]
    needed, refusals = seeds * sum(map(asked.count, counted)), ["refused", "missing"]
    assert f"right in {total('sdft', counted)} of {needed} questions that need it" in said
    sdft, sft = (
        f"{total(arm, refusals)} of {whose}{total(arm, kinds)}" for arm, whose in (("sdft", ""), ("sft", "SFT's "))
    )
    assert f"{sdft}, and {sft}, to {seeds * sum(map(asked.count, refusals))} such questions" in said


def test_the_seconds_per_step_are_those_of_the_fastest_seeds() -> None:
    """The table on the page of methods: of each arm's three runs, which one machine made, the fastest."""
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    table = re.search(
        r"^\| 1 thread of an AMD EPYC \| routing.*\| tools.*\| facts.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE
    )
    assert table is not None
    shown = [[float(cell) for cell in line.split("|")[2:-1]] for line in table[1].splitlines()]
    arms = ("sft", "sdft", "sft+1/2", "sdft+1/2")
    found: dict[str, list[float]] = {}
    slowest = 0.0
    for name in ("routing", "tools", "facts"):
        lines = (DOCS / "comparisons" / "studies" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        runs = [run for run in map(json.loads, lines) if run["where"]["device"] == "AMD EPYC"]
        for arm in arms:
            seconds = [run["seconds"]["steps"] / run["settings"]["max_steps"] for run in runs if run["arm"] == arm]
            assert len(seconds) == 3
            found.setdefault(arm, []).append(round(min(seconds), 1))
            slowest = max(slowest, max(seconds) / min(seconds))
    assert [found[arm] for arm in arms] == shown
    assert f"the slowest took up to {slowest:.1f} times as long" in " ".join(text.split())
