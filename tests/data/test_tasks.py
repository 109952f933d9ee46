"""The bundled tasks for rewards and feedback: sizes, parts that share nothing, and checks that say what is wrong."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from selfdistill.data.demonstrations import Demonstration, load_demonstrations
from selfdistill.data.scorers import Verdict, said, verdict, verdicts
from selfdistill.data.sources import packaged

PARTS = {"train": 160, "validation": 48, "test": 64}
FIELDS = "python:selfdistill.data.bundled.checks.fields"
SCORERS = {"strings": "code", "sums": FIELDS, "tickets": FIELDS, "chains": FIELDS}


def rows(task: str) -> list[list[Demonstration]]:
    return [load_demonstrations(packaged(f"{task}.{part}.jsonl")) for part in PARTS]


def chat(row: Demonstration) -> str:
    return "\n".join(message["content"] for message in row.prompt)


def first(task: str) -> Demonstration:
    return rows(task)[0][0]


CHECKED = [pytest.param(task, marks=pytest.mark.slow if task == "strings" else ()) for task in SCORERS]
"""The tasks; hundreds of processes run those of code."""


@pytest.mark.parametrize("task", SCORERS)
def test_a_task_has_three_parts_that_share_no_prompt_and_no_prior_question(task: str) -> None:
    parts = rows(task)
    assert [len(part) for part in parts] == list(PARTS.values())
    prompts = [chat(row).casefold() for part in parts for row in part]
    assert len(set(prompts)) == len(prompts)
    prior = [load_demonstrations(file) for file in Path(packaged("prior")).rglob("*.jsonl")]
    asked = {re.sub(r"\d+", "0", chat(row).casefold()) for part in prior for row in part}
    assert len(asked) > 300
    for prompt in prompts:
        without_numbers = re.sub(r"\d+", "0", prompt)
        assert not [question for question in asked if question in without_numbers or without_numbers in question]


@pytest.mark.parametrize("task", CHECKED)
def test_every_completion_passes_its_check(task: str) -> None:
    every = [row for part in rows(task) for row in part]
    found = verdicts([(SCORERS[task], said(row), row) for row in every])
    assert [row.source for row, one in zip(every, found, strict=True) if one != Verdict(1.0)] == []


@pytest.mark.parametrize("task", CHECKED)
def test_no_completion_passes_the_check_of_another_answer(task: str) -> None:
    for part in rows(task):
        pairs = [(one, other) for one, other in itertools.pairwise(part) if one.completion != other.completion]
        if task in ("sums", "chains"):
            pairs = [(one, other) for one, other in pairs if one.answer != other.answer]
        found = verdicts([(SCORERS[task], said(one), other) for one, other in pairs])
        assert [other.source for (_, other), verdict in zip(pairs, found, strict=True) if verdict.reward] == []
        assert all(verdict.feedback for verdict in found)


def test_what_is_held_out_of_training() -> None:
    train, *others = ({row.completion for row in part} for part in rows("strings"))
    assert not any(train & other for other in others)
    train, *others = ({re.sub(r"\d+", "0", row.prompt[-1]["content"]) for row in part} for part in rows("sums"))
    assert not any(train & other for other in others)
    train, *others = ({row.prompt[-1]["content"].split('"')[1] for row in part} for part in rows("tickets"))
    assert not any(train & other for other in others)


def test_a_chain_has_a_line_for_each_operation_and_one_for_the_answer() -> None:
    for row in (row for part in rows("chains") for row in part):
        value, *steps = re.findall(r"(?:[-+] )?\d+", row.prompt[-1]["content"])
        lines = []
        for step in steps:
            result = eval(f"{value} {step}")
            lines.append(f"{value} {step} = {result}")
            value = result
        assert row.completion.splitlines() == [*lines, f"Answer: {value}"]
        assert len(lines) == 3


def test_the_plans_of_chains_name_the_operations_and_no_result() -> None:
    planned = load_demonstrations(packaged("chains.plans.jsonl"))
    assert [replace(row, privileged_context=None, source="") for row in planned] == [
        replace(row, source="") for row in rows("chains")[0]
    ]
    words = {"Add": "+", "Subtract": "-"}
    for row in planned:
        plan, asked = row.privileged_context or "", row.prompt[-1]["content"]
        assert [words[line.split()[0]] for line in plan.splitlines()] == re.findall(r"[-+]", asked)
        assert sorted(re.findall(r"\d+", plan)) == sorted(re.findall(r"\d+", asked))


@pytest.mark.slow
def test_a_function_that_returns_one_value_or_its_argument_fails() -> None:
    part = rows("strings")[1][::4]
    for body in ("s", "''", "0", "True", "len(s)"):
        found = verdicts([("code", f"def f(s): return {body}", row) for row in part])
        passed = [row.completion for row, one in zip(part, found, strict=True) if one.reward]
        assert passed == []


def test_queues_and_results_are_spread() -> None:
    for part in rows("tickets"):
        queues = [row.completion.splitlines()[0] for row in part]
        assert {queues.count(queue) for queue in queues} == {len(part) // 4}
    for task in ("sums", "chains"):
        assert all(len({row.answer["fields"]["Answer"] for row in part}) >= 10 for part in rows(task))


@pytest.mark.parametrize(
    ("reply", "feedback"),
    [
        ("Queue: {queue}\nRoom: {room}", ""),
        ("Let me see.\n\nQueue: {queue} \n Room: {room}.\n", ""),
        ("Room: {room}\nQueue: {queue}\nQueue: garden", ""),
        ("Queue: {queue}\nRoom: {room}\nHave a nice day!", ""),
        ("{queue}, {room}", "missing field 'Queue': expected a line 'Queue: ...'"),
        ("Queue: {queue}", "missing field 'Room': expected a line 'Room: ...'"),
        (
            "Queue: garden\nRoom: {room}",
            "unknown queue 'garden', expected one of kitchen, housekeeping, repairs, reception",
        ),
        ("Queue: {other}\nRoom: {room}", "wrong queue: expected {queue}, found {other}"),
        ("Queue: {queue}\nRoom: 9", "wrong room: expected {room}, found 9"),
        ("", "missing field 'Queue': expected a line 'Queue: ...'"),
    ],
)
def test_the_feedback_on_a_ticket(reply: str, feedback: str) -> None:
    row = first("tickets")
    values = {"queue": row.answer["fields"]["Queue"], "room": row.answer["fields"]["Room"]}
    values["other"] = next(queue for queue in row.answer["allowed"]["Queue"] if queue != values["queue"])
    expected = Verdict(float(not feedback), feedback.format(**values))
    assert verdict(FIELDS, reply.format(**values), row) == expected


def test_the_feedback_on_a_sum() -> None:
    row = first("sums")
    result = row.answer["fields"]["Answer"]
    assert verdict(FIELDS, f"So it is\nAnswer: {result}", row) == Verdict(1.0)
    assert verdict(FIELDS, "Answer: 999", row) == Verdict(0.0, f"wrong answer: expected {result}, found 999")
    missing = "missing field 'Answer': expected a line 'Answer: ...'"
    assert verdict(FIELDS, f"The answer is {result}.", row) == Verdict(0.0, missing)


def test_the_tasks_are_those_that_the_study_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "studies")
    import make_tasks

    make_tasks.main(str(tmp_path))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 13
    for file in files:
        assert file.read_bytes() == Path(packaged(file.name)).read_bytes()
    assert len({function.results for function in make_tasks.FUNCTIONS}) == len(make_tasks.FUNCTIONS)
