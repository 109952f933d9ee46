"""What methods and commands ask of rows: no more than they use, and what they lack is said with row and method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import selfdistill as sd
from selfdistill.cli import main
from selfdistill.methods.sequences import DatasetCompletions
from selfdistill.training.trainer import Trainer

SDFT = [{"prompt": f"Where is {n}?", "privileged_context": f"It lies on shelf {n}."} for n in range(4)]
GRPO = [{"prompt": f"{n}+2?", "answer": str(n + 2)} for n in range(4)]
READING = [{"prompt": f"Where is {n}?", "document": f"It lies on shelf {n}."} for n in range(4)]
BARE = [{"prompt": f"{n}+2?"} for n in range(4)]
FULL = [{"prompt": f"{n}+2?", "completion": str(n + 2)} for n in range(4)]
RUN: dict[str, Any] = {
    "max_completion_length": 8,
    "batch_size": 2,
    "max_steps": 2,
    "save_steps": 0,
    "drift_steps": 1,
    "mixed_precision": "no",
    "progress": False,
}


@pytest.fixture
def model(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(model_folder(ends=(257, *range(40, 75))))


@pytest.mark.parametrize(
    ("method", "rows", "options"),
    [
        ("sdft", SDFT, {"context": "example"}),
        ("sdft", SDFT, {}),
        ("sdft", READING, {"context": "document:show=document"}),
        ("sdft", [*SDFT, *FULL], {"context": "turns"}),
        ("sft_from_teacher", SDFT, {"context": "turns"}),
        ("offline_distillation", SDFT, {"context": "few_shot:k=2"}),
        ("grpo", GRPO, {"num_generations": 2}),
        ("grpo", [row | {"scorer": "contains"} for row in GRPO], {"num_generations": 2}),
        ("grpo", BARE, {"num_generations": 2, "scorer": "python:rewards.length"}),
        ("sdpo", BARE, {"num_generations": 2, "scorer": "python:rewards.length"}),
        ("cpt", READING, {}),
    ],
)
def test_a_method_asks_for_no_more_than_it_uses(
    model: str, method: str, rows: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    Path("rewards.py").write_text("def length(reply, row):\n    return len(reply) > 3\n", encoding="utf-8")
    run = sd.train(model, rows, output_dir="run", method=method, **RUN | options)
    assert len(run.metrics) == 2
    assert [json.loads(line)["prompt"] for line in Path("run/data.jsonl").read_text().splitlines()] == [
        [{"role": "user", "content": row["prompt"]}] for row in rows
    ]


MISSING = "column 'completion': missing"
UNSHOWN = f"{MISSING}, and no 'privileged_context' for context"
NOTHING = f"{MISSING}, and no 'privileged_context' or 'document'"


@pytest.mark.parametrize(
    ("method", "rows", "options", "problem"),
    [
        ("sft", SDFT, {}, f"{MISSING}, which method 'sft' learns from; method sdft learns from 'privileged_context'"),
        ("dft", GRPO, {}, f"{MISSING}, which method 'dft' learns from"),
        ("sft_reinvoke", SDFT, {}, f"{MISSING}, which method 'sft_reinvoke' learns from"),
        ("sdft", SDFT, {"cold_start_steps": 1, "context": "turns"}, f"{MISSING}, which method 'sdft' learns from"),
        ("sft", GRPO, {}, f"{MISSING}, which method 'sft' learns from; method grpo learns from 'answer'"),
        ("sdft", GRPO, {"context": "turns"}, f"{UNSHOWN} 'turns' to show instead; method grpo learns from 'answer'"),
        ("sdft", GRPO, {}, f"{NOTHING} to show the teacher instead; method grpo learns from 'answer'"),
        ("sdft", READING, {"context": "document"}, f"{UNSHOWN} 'document' to show instead; context document:show="),
        ("sdft", READING, {"context": "turns"}, f"{UNSHOWN} 'turns' to show instead; context document:show=document"),
        ("sdft", FULL, {"context": "document:show=document"}, "column 'document': missing, which context 'document'"),
        ("sft_from_teacher", SDFT, {"context": "document"}, "column 'document': missing, which context 'document'"),
        ("sdft", BARE, {}, f"{NOTHING} to show the teacher instead"),
        ("grpo", SDFT, {}, f"{MISSING}, and no 'answer' to score replies with"),
        ("grpo", BARE, {"scorer": "contains"}, f"{MISSING}, and no 'answer' to score replies with"),
        ("offline_distillation", GRPO, {"context": "example"}, f"{UNSHOWN} 'example' to show instead"),
    ],
)
def test_what_is_missing_is_said_with_row_and_method_before_a_model_is_loaded(
    model: str,
    write_rows: Callable[..., Path],
    method: str,
    rows: list[dict[str, Any]],
    options: dict[str, Any],
    problem: str,
) -> None:
    data = write_rows([*(row | {"document": "d"} for row in FULL), rows[0]])
    for start in (sd.train, sd.plan):
        with pytest.raises(sd.UserError) as caught:
            start("no-such-model", data, output_dir="run", method=method, **RUN | options)
        assert str(caught.value).startswith(f"{data}: 1 bad row: line 5, {problem}")
    with pytest.raises(sd.UserError, match="line 5, "):
        sd.compare(
            "no-such-model", data, test=data, output_dir="both", methods=("cpt", method), **options, progress=False
        )


def test_no_example_without_a_completion_is_ever_learnt_from(
    settings: Callable[..., sd.TrainConfig], write_rows: Callable[..., Path]
) -> None:
    data = write_rows([*FULL, SDFT[0]])
    with pytest.raises(sd.UserError, match=r"1 of 5 rows cannot be used: .*:5: column 'completion': missing"):
        Trainer(settings(data=str(data), method="sft"))
    run = Trainer(settings(data=str(data)))
    with pytest.raises(IndexError):  # rather than an empty reply
        DatasetCompletions()(run.loaded, run.stage.task.examples, 0)


# --- the other commands ---


def test_check_measures_what_it_can(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"max_completion_length": 6, "sample": 4, "batch_size": 2, "mixed_precision": "no", "progress": False}
    blind = sd.check(model, SDFT, **options)
    assert (blind.student_accuracy, blind.student_logp, blind.best.accuracy, blind.best.logp) == (None,) * 4
    assert blind.best.context == "example:reasoning=true"
    assert blind.best.kl > 0
    assert blind.exit_code == 0
    assert blind.verdict.startswith(
        "It is unknown whether the teacher is better: rows have neither completion nor answer"
    )
    assert "It is unknown which layout is best" in repr(blind)
    scored = sd.check(model, [row | {"answer": "x"} for row in SDFT], **options)
    assert (scored.student_accuracy, scored.student_logp) == (0.0, None)
    mixed = sd.check(model, [*SDFT, *FULL], **options)
    assert mixed.student_logp is not None
    assert mixed.items == 4  # those that can be scored
    with pytest.raises(sd.UserError, match=r"data: all 4 rows: column 'completion': missing, and no"):
        sd.check(model, GRPO, **options)


def test_plan_compare_and_learn_take_such_rows(model: str, write_rows: Callable[..., Path]) -> None:
    plan = sd.plan(model, SDFT, context="turns", **RUN)
    assert plan.completion == ""
    assert "# the demonstration" not in repr(plan)
    result = sd.compare(
        model, SDFT, test=GRPO, output_dir="both", methods=("sdft",), seeds=(0,), context="turns", **RUN
    )
    assert [run["failed"] for run in result.details["runs"]] == [None]
    data, test = write_rows(SDFT, name="skill.jsonl"), write_rows(GRPO, name="skill-test.jsonl")
    given = {key: value for key, value in RUN.items() if key != "drift_steps"} | {"model": model, "test": test}
    gates = {"max_prior_drop": 1.0, "max_skill_drop": 1.0}
    refused = sd.learn("add", data, state="state", **given | gates)
    assert refused.details["reasons"] == [
        "the teacher cannot be scored, as rows have neither completion nor answer (min_teacher)"
    ]
    del given["test"]
    for action in ("add", "stream"):
        with pytest.raises(sd.UserError, match=r"all 4 rows: column 'completion': missing, and no 'answer'"):
            sd.learn(action, data, state="state", **given | gates)
    added = sd.learn("add", data, state="state", min_teacher=0, test=test, **given | gates)
    assert added.details["accepted"]


@pytest.mark.parametrize("command", ["eval", "train"])
def test_rows_that_nothing_can_score_are_no_test(
    model: str, write_rows: Callable[..., Path], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, test = write_rows(FULL), write_rows([*FULL, *SDFT[:1]], name="bare.jsonl")
    options = {"eval": f"--data {test}", "train": f"--data {data} --test {test} --output_dir run --context turns"}
    assert main([command, "--model", "no-such-model", *options[command].split()]) == 2
    assert f"{test}: 1 bad row: line 5, column 'completion': missing, and no 'answer'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "row", "problem"),
    [
        ("check --contexts turns", READING[0], f"{UNSHOWN} 'turns'"),
        ("check --contexts turns document", READING[0], f"{UNSHOWN} 'turns'"),
        ("check --contexts document:show=document", SDFT[0], "column 'document': missing"),
        ("eval --context document:show=document", FULL[0], "column 'document': missing"),
        ("eval --context turns", GRPO[0], f"{UNSHOWN} 'turns'"),
    ],
)
def test_what_a_named_context_lacks_is_said_before_a_model_is_loaded(
    write_rows: Callable[..., Path],
    command: str,
    row: dict[str, Any],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows([FULL[0] | {"document": "d"}, row])
    assert main([*command.split(), "--model", "no-such-model", "--data", str(data)]) == 2
    assert f"{data}: 1 bad row: line 2, {problem}" in capsys.readouterr().err


# --- splits ---


def three_splits() -> datasets.DatasetDict:
    rows = {"train": FULL, "validation": SDFT, "test": [{"prompt": "9+9?", "answer": "18"}]}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(row) for name, row in rows.items()})


def test_data_and_test_of_one_set_are_its_two_splits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    three_splits().save_to_disk("sets")
    options = RUN | {"context": "turns"}
    saved = sd.train(model, "sets", test="sets", output_dir="saved", **options)
    memory = sd.train(model, three_splits(), test=three_splits(), output_dir="memory", **options)
    for run in (saved, memory):
        assert {found["items"] for found in run.evaluations} == {1}
    assert saved.config.test_split is None
    other = sd.train(model, "sets", test="sets", test_split="train", output_dir="other", **options)
    assert {found["items"] for found in other.evaluations} == {4}
    for test_split in ("probe", "dev"):
        message = "sets: no split 'probe' in this data set, expected train, validation or test"
        with pytest.raises(sd.UserError, match=message if test_split == "probe" else "to score replies with"):
            sd.train(model, "sets", test="sets", test_split=test_split, output_dir="bad", **options)


def test_the_split_of_the_test_needs_a_test(model: str) -> None:
    with pytest.raises(sd.UserError, match="setting 'test_split' needs a test"):
        sd.train(model, FULL, test_split="test", output_dir="run", context="turns", **RUN)


def test_a_run_from_before_the_split_of_the_test_resumes_with_that_of_the_data(model: str) -> None:
    three_splits().save_to_disk("sets")
    options = RUN | {"context": "turns", "save_steps": 1}
    sd.train(model, "sets", test="sets", test_split="train", output_dir="run", **options)
    file = Path("run/config.yaml")
    file.write_text(file.read_text().replace("test_split: train\n", ""), encoding="utf-8")
    assert sd.Run("run").config.test_split == "train"
    assert len(sd.train(output_dir="run", resume=True, progress=False, max_steps=3).metrics) == 3
    with pytest.raises(sd.UserError, match="changed since the run began: the rows of test"):
        sd.train(output_dir="run", resume=True, progress=False, max_steps=4, test_split="test")


@pytest.mark.slow
def test_a_comparison_from_before_the_split_of_the_test_goes_on(model: str) -> None:
    three_splits().save_to_disk("sets")
    options = RUN | {"context": "turns", "methods": ("sdft",), "output_dir": "both"}
    sd.compare(model, "sets", test="sets", test_split="train", seeds=(0,), **options)
    for file in Path("both").rglob("config.yaml"):
        file.write_text(file.read_text().replace("test_split: train\n", ""), encoding="utf-8")
    more = sd.compare(output_dir="both", resume=True, seeds=(0, 1), progress=False)
    assert len(more.details["runs"]) == 2
    assert {found["items"] for run in more.details["runs"] for found in run["evaluations"]} == {4}
