"""What the pages of results conclude follows from the measurements that stand beside it."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from results_pages import results_text

from selfdistill.comparison.conclusions import Compared, matched, sentences
from selfdistill.data import load_demonstrations
from selfdistill.environments import make_environment
from selfdistill.evaluation import seeds_interval

DOCS = Path(__file__).parent.parent / "docs"
COMPARISONS = ("facts", "science", "science_methods", "baselines", "teacher_skill", "context")


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def said_on(name: str) -> str:
    """The page without its line breaks."""
    return " ".join(page(name).split())


def lines_of(study: str) -> list[dict[str, Any]]:
    text = (DOCS / "comparisons" / "studies" / f"{study}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


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
    said = f"lost up to {100 * lost[most]:.0f} points ({most.upper()}; SFT up to {100 * lost['sft']:.0f})"
    assert f"a run compared with itself {said}" in said_on("design_running")


def test_the_tables_of_studies_are_what_their_lines_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS.parent / "studies")
    study_file, summary = import_module("study_file"), import_module("summary")
    text = results_text() + page("engines")
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
    runs = lines_of("shop")
    kinds, arms = list(make_shop.ASKED["test"]), ("sft", "sdft", "sft+1/2", "sdft+1/2")

    def right(kind: str, evaluation: dict[str, Any]) -> int:
        return sum(int(digit) for digit, own in zip(evaluation["correct"], asked, strict=True) if own == kind)

    ends = {arm: [run["evaluations"][-1] for run in runs if run["arm"] == arm] for arm in arms}
    shop, calls = make_environment("bundled:shop")(), {}
    for question in questions.values():
        acted = make_shop.episode(shop, question)
        calls[question.kind] = [call["function"]["name"] for m in acted for call in m.get("tool_calls", [])]
    shop.close()
    text = page("results_methods")
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


def test_what_is_said_of_lora_on_four_bits_is_what_its_lines_say() -> None:
    runs = sorted(lines_of("precision"), key=lambda run: run["seed"])
    lora, qlora = ([run["evaluations"][-1] for run in runs if run["arm"] == arm] for arm in ("lora", "qlora"))
    first, second, third = (end["correct"].count("1") for end in qlora)
    said = said_on("results_methods")
    assert f"It learnt {first}, {second} and {third} of the {len(qlora[0]['correct'])} rows" in said
    differences = [four["kl"] - full["kl"] for four, full in zip(qlora, lora, strict=True)]
    found, low, high = (f"{value:.2f}".replace("0.", ".") for value in seeds_interval(differences))
    assert f"The interval of the difference, {found}, includes 0 ({low} to {high})" in said


def test_the_losses_beside_the_trials_of_spill_are_those_of_the_studies() -> None:
    rows = re.findall(r"^\| (\w+) \| (SDFT|SFT) \| [\d.]+ \| [\d.]+ \| (\.\d\d) \|$", page("contexts"), re.MULTILINE)
    assert len(rows) == 10
    for study, method, lost in rows:
        ends = [run["evaluations"] for run in lines_of(study) if run["arm"] == method.lower()]
        losses = [found[0]["prior_accuracy"] - found[-1]["prior_accuracy"] for found in ends]
        assert f"{mean(losses):.2f}" == f"0{lost}", (study, method)


def test_the_seconds_per_step_are_those_of_the_fastest_seeds() -> None:
    """The table on the page of methods: of each arm's three runs, which one machine made, the fastest.

    And their ratios on the page of anchors.
    """
    text = page("methods")
    table = re.search(
        r"^\| 1 thread of an AMD EPYC \| routing.*\| tools.*\| facts.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE
    )
    assert table is not None
    shown = [[float(cell) for cell in line.split("|")[2:-1]] for line in table[1].splitlines()]
    arms = ("sft", "sdft", "sft+1/2", "sdft+1/2")
    found: dict[str, list[float]] = {}
    slowest = 0.0
    for name in ("routing", "tools", "facts"):
        runs = [run for run in lines_of(name) if run["where"]["device"] == "AMD EPYC"]
        for arm in arms:
            seconds = [run["seconds"]["steps"] / run["settings"]["max_steps"] for run in runs if run["arm"] == arm]
            assert len(seconds) == 3
            found.setdefault(arm, []).append(min(seconds))
            slowest = max(slowest, max(seconds) / min(seconds))
    assert [[round(seconds, 1) for seconds in found[arm]] for arm in arms] == shown
    assert f"the slowest took up to {slowest:.1f} times as long" in said_on("methods")
    sft, sdft = ([f"{b / a:.1f}" for a, b in zip(found[m], found[f"{m}+1/2"], strict=True)] for m in ("sft", "sdft"))
    said = "SFT took {} (routing), {} (tools) and {} (facts) times as long as without, ".format(*sft)
    assert said + "SDFT {}, {} and {} times".format(*sdft) in said_on("results_anchors")
