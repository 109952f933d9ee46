"""The Python API: public names, the README's example, rows and models from memory, results, callbacks, silence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ENDS, final_weights, same
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfdistill as sd
from selfdistill.config import CheckConfig, CompareConfig
from selfdistill.continual import add_skill
from selfdistill.model import load_model

ROWS = [{"prompt": f"Where is ticket {i}?", "completion": f"Shelf {'ABCD'[i % 4]}, box {i}."} for i in range(6)]
TINY: dict[str, Any] = {"max_completion_length": 12, "mixed_precision": "no"}
RUN: dict[str, Any] = TINY | {"batch_size": 2, "max_steps": 2, "save_steps": 0, "drift_steps": 0, "view_rows": 0}


@pytest.fixture
def model(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(model_folder(ends=ENDS, layers=1))


def loaded(model: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


def test_the_public_names_are_these_and_importing_them_is_quick() -> None:
    assert sd.__all__ == [
        *("Demonstration", "Run", "RunFailed", "RunStopped", "TrainConfig", "UserError"),
        *("ask", "check", "close_engine", "compare", "evaluate", "export", "learn"),
        *("load_demonstrations", "make_questions"),
        *("memory_plan", "merge", "plan", "report", "train"),
    ]
    assert all(getattr(sd, name).__name__ == name for name in sd.__all__)
    assert set(sd.__all__) <= set(dir(sd))
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        sd.tain  # noqa: B018
    code = "import selfdistill, sys; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_check_train_evaluate_generate(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    checked = sd.check(model, ROWS, contexts=["turns", "example"], sample=4, batch_size=2, **TINY)
    assert checked.best.context in ("turns:repeats=1", "example:reasoning=true")
    run = sd.train(model, ROWS, output_dir="runs/tickets", context=checked.best.context, **RUN)
    result = sd.evaluate(run.final, ROWS[:3], base=model, max_completion_length=12)
    assert result.base is not None
    assert (result.items, result.base.items) == (3, 3)
    assert 0.0 <= result.accuracy <= 1.0
    assert result.kl == result.details["kl_base"] > 0
    found = [(line["prompt"][0]["content"], line["answer"], line["correct"]) for line in result.replies]
    expected = zip(ROWS[:3], result.details["correct"], strict=True)
    assert found == [(row["prompt"], row["completion"], right) for row, right in expected]
    assert isinstance(run.generate("Where is ticket 3?"), str)
    assert len(run.generate(["Where is ticket 3?", [{"role": "user", "content": "And 4?"}]], temperature=1.0)) == 2
    assert capsys.readouterr().out == ""
    assert checked.verdict in " ".join(repr(checked).split())
    assert "runs/tickets" in repr(run)
    assert "KL(base||model)" in repr(result)
    page = result._repr_html_()
    assert page.startswith(f"<table>\n<caption>{run.final} on ")
    assert "KL(base||model)" in page


def test_a_run_that_compares_contexts_first_says_so_before(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sd.train(model, ROWS, output_dir="run", **RUN)
    said = (
        "context auto: first measuring on some rows which context makes the best teacher; to skip this, name one, such"
    )
    assert capsys.readouterr().err.startswith(f"{said} as turns\nloading {model}\n")
    sd.train(model, ROWS, output_dir="named", context="turns", **RUN)
    assert "context auto" not in capsys.readouterr().err


def test_python_and_the_command_line_have_the_same_defaults(model: str, write_rows: Callable[..., Path]) -> None:
    from selfdistill.cli import main

    data = str(write_rows(ROWS))
    options = [f"--{key}={value}" for key, value in RUN.items()]
    assert main(["train", "--model", model, "--data", data, "--output_dir", "shell", "--context=turns", *options]) == 0
    run = sd.train(model, data, output_dir="python", context="turns", **RUN)
    shell = sd.Run(Path("shell"))
    assert shell.config.model_copy(update={"output_dir": "python"}) == run.config
    assert same(final_weights(shell.config), final_weights(run.config))


def test_a_training_config_with_its_own_defaults_trains(model: str, write_rows: Callable[..., Path]) -> None:
    config = sd.TrainConfig(model=model, data=str(write_rows(ROWS)), output_dir="run", **RUN)
    assert config.context == "auto"
    run = sd.train(config)
    assert run.config.context != "auto"
    assert len(run.metrics) == 2


@pytest.mark.parametrize("kind", ["demonstrations", "dataset", "dataset_dict"])
def test_rows_come_from_memory(model: str, kind: str) -> None:
    given: Any = {
        "demonstrations": [sd.Demonstration(row["prompt"], row["completion"]) for row in ROWS],  # type: ignore[arg-type]
        "dataset": datasets.Dataset.from_list(ROWS),
        "dataset_dict": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
    }[kind]
    rows = sd.load_demonstrations(given)
    assert [row.identity() for row in rows] == [row.identity() for row in sd.load_demonstrations(ROWS)]
    run = sd.train(model, given, output_dir="run", test=ROWS[:2], context="turns", **RUN)
    assert [json.loads(line)["completion"] for line in Path("run/data.jsonl").read_text().splitlines()] == [
        row["completion"] for row in ROWS
    ]
    assert [found["items"] for found in run.evaluations] == [2, 2]
    assert run.config.data == str(Path("run/data.jsonl"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data: no rows, expected at least one"),
        ([*ROWS, {"prompt": "a"}], r"^data: 1 bad row: data\[6\], column 'completion': missing"),
        ([{"prompt": "a"}, ROWS[0], {"prompt": "b"}], r"^data: 2 bad rows: data\[0\], data\[2\]: column 'completion'"),
        (
            ROWS,
            r"^6 of 6 rows do not fit: data\[0\], data\[1\], data\[2\] and 3 more: completion has 16 tokens, limit 12",
        ),
        ([*ROWS, {"prompt": " ", "completion": "x"}], r"data: 1 bad row: data\[6\], column 'prompt': found only white"),
        (["a", "b"], "data: all 2 rows: found 'a', 'b', expected a dict"),
        (
            pandas.DataFrame([{"prompt": "a", "completion": "b"}]),
            "data: found a DataFrame; convert it with datasets.Dataset.from_pandas or from_polars",
        ),
        ({"prompt": "a"}, "data: found a dict, expected a path, a list of rows or a datasets.Dataset"),
        (
            datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("test", "dev")}),
            "no split 'train' in this data set, expected test or dev",
        ),
    ],
)
def test_bad_rows_in_memory_are_refused(model: str, data: Any, message: str) -> None:
    with pytest.raises(sd.UserError, match=message):
        sd.train(model, data, output_dir="run", method="sft", **RUN)
    assert not Path("run").exists()


def test_a_test_in_memory_is_named_by_its_rows(model: str) -> None:
    for wrong in ({"prompt": "a"}, {"prompt": ""}):
        with pytest.raises(sd.UserError, match=r"^test: 1 bad row: test\[2\], column "):
            sd.compare(model, ROWS, test=[*ROWS[:2], wrong], output_dir="run", methods=["sft"], **RUN)
    assert not Path("run").exists()


def test_a_run_on_rows_from_memory_resumes_with_them_and_refuses_others(model: str) -> None:
    options = RUN | {"context": "turns", "save_steps": 1}
    whole = sd.train(model, ROWS, output_dir="whole", **options | {"max_steps": 4, "lr_scheduler_type": "constant"})
    stops = sd.train(
        model,
        ROWS,
        output_dir="run",
        on_step=lambda step, _model, _metrics: step == 2,
        **options | {"max_steps": 4, "lr_scheduler_type": "constant"},
    )
    assert len(stops.metrics) == 2
    with pytest.raises(sd.UserError, match="its rows differ from those given"):
        sd.train(data=ROWS[1:], output_dir="run", resume=True)
    run = sd.train(data=ROWS, output_dir="run", resume=True)
    assert len(run.metrics) == 4
    assert same(final_weights(run.config), final_weights(whole.config))


def test_a_run_is_not_resumed_with_fewer_steps_than_it_has_done(model: str) -> None:
    run = sd.train(model, ROWS, output_dir="run", context="turns", **RUN | {"save_steps": 1})
    message = "setting 'max_steps': found 1, but run/checkpoint-00000002 has already done 2 steps; give 2 or more"
    with pytest.raises(sd.UserError, match=message):
        sd.train(output_dir="run", resume=True, max_steps=1)
    with pytest.raises(sd.UserError, match=message):
        sd.train(run.config.model_copy(update={"max_steps": 1}), resume=True)
    assert (run.config.max_steps, len(run.metrics)) == (2, 2)
    assert "2 of 2 steps" in repr(sd.Run("run"))


def test_a_loaded_model_is_checked_trained_and_evaluated_as_its_folder_is(model: str) -> None:
    ours, tokenizer = loaded(model)
    options = {"contexts": ["turns"], "sample": 4, "batch_size": 2} | TINY
    by_name, by_model = sd.check(model, ROWS, **options), sd.check(ours, ROWS, tokenizer=tokenizer, **options)
    assert by_name.layouts == by_model.layouts
    before = sd.evaluate(ours, ROWS, tokenizer=tokenizer, max_completion_length=12)
    assert before.accuracy == sd.evaluate(model, ROWS, max_completion_length=12).accuracy
    named = sd.train(model, ROWS, output_dir="named", context="turns", **RUN)
    run = sd.train(ours, ROWS, output_dir="run", tokenizer=tokenizer, context="turns", **RUN)
    assert same(final_weights(named.config), final_weights(run.config))
    assert same(final_weights(run.config), {name: p.detach() for name, p in ours.state_dict().items()})
    with pytest.raises(sd.UserError, match="needs its tokenizer"):
        sd.check(ours, ROWS)


def test_a_run_switches_back_what_it_switches(model: str) -> None:
    AcceleratorState._reset_state()
    own = Accelerator(mixed_precision="no", gradient_accumulation_steps=3)
    ours, tokenizer = loaded(model)
    given: dict[str, Any] = {"tokenizer": tokenizer, "context": "turns", **RUN, "mixed_precision": "bf16"}
    frozen = ours.get_input_embeddings().weight

    def freeze(*_: Any) -> None:  # as a run freezes a vision tower
        frozen.requires_grad_(False)

    sd.plan(ours, ROWS, **given)
    assert (own.mixed_precision, own.gradient_accumulation_steps) == ("no", 3)
    sd.train(ours, ROWS, output_dir="run", gradient_checkpointing=True, on_step=freeze, **given)
    assert (own.mixed_precision, own.gradient_accumulation_steps) == ("no", 3)
    assert not ours.is_gradient_checkpointing
    assert not ours.get_input_embeddings()._forward_hooks
    assert frozen.requires_grad


def test_a_callback_sees_every_step_and_its_metrics(model: str) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []
    run = sd.train(
        model, ROWS, output_dir="run", context="turns", on_step=lambda n, _model, m: seen.append((n, m)), **RUN
    )
    assert [step for step, _ in seen] == [1, 2]
    assert [metrics["loss"] for _, metrics in seen] == [line["loss"] for line in run.metrics]


def test_a_callback_sees_the_scores_of_an_evaluation_and_may_end_the_run_with_them(model: str) -> None:
    seen: list[dict[str, float]] = []

    def watch(step: int, _model: Any, metrics: dict[str, Any]) -> bool:
        seen.append({name: value for name, value in metrics.items() if name.startswith("eval/")})
        return step >= 3 and "eval/accuracy" in metrics

    options = RUN | {"context": "turns", "max_steps": 6, "eval_steps": 2}
    run = sd.train(model, ROWS, test=ROWS, output_dir="run", on_step=watch, **options)
    assert [line["step"] for line in run.evaluations] == [0, 2, 4]
    names = ("accuracy", "kl_base")
    scores = [{f"eval/{name}": line[name] for name in names} for line in run.evaluations]
    assert seen == [{}, scores[1], {}, scores[2]]
    assert len(run.metrics) == 4
    assert not any("eval/accuracy" in line for line in run.metrics)


@pytest.mark.parametrize("true", [True, np.float64(1) > 0, torch.tensor(True)])
def test_a_callback_ends_the_run_where_it_returns_true_and_a_line_says_so(
    model: str, capsys: pytest.CaptureFixture[str], true: Any
) -> None:
    returned = [1.5, np.float64(1), "yes", true]
    options = RUN | {"context": "turns", "max_steps": 6}
    run = sd.train(model, ROWS, output_dir="run", on_step=lambda step, *_: returned[step - 1], **options)
    assert len(run.metrics) == 4
    assert capsys.readouterr().err.count("the run ends early, after step 4 of 6\n") == 1


def test_a_callback_that_fails_loses_no_step(model: str) -> None:
    options = RUN | {"context": "turns", "max_steps": 3}
    whole = sd.train(model, ROWS, output_dir="whole", **options)

    def fail(step: int, _model: Any, _metrics: Any) -> None:
        if step == 2:
            raise ZeroDivisionError("theirs")

    with pytest.raises(ZeroDivisionError, match="theirs"):
        sd.train(model, ROWS, output_dir="run", on_step=fail, **options)
    numbers: list[int] = []
    with pytest.raises(sd.UserError, match=r"context was 'turns' and is now 'turns:repeats=2'"):
        sd.train(output_dir="run", resume=True, context="turns:repeats=2")
    in_words = {"context": "turns:repeats=1"}  # of which "turns" is short
    run = sd.train(output_dir="run", resume=True, on_step=lambda step, *_: numbers.append(step), **in_words)
    assert numbers == [3]
    assert same(final_weights(run.config), final_weights(whole.config))
    with pytest.raises(sd.UserError, match="on_step: found 3, expected a function of step, model and metrics"):
        sd.train("no/such/model", ROWS, output_dir="new", on_step=3)  # type: ignore[arg-type]
    assert not Path("new").exists()


def test_progress_can_be_switched_off_and_goes_to_the_log(
    model: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="selfdistill")
    sd.train(model, ROWS, output_dir="quiet", context="turns", progress=False, **RUN)
    assert capfd.readouterr() == ("", "")
    assert any("sdft on 6 demonstrations" in record.message for record in caplog.records)
    assert [record.message for record in caplog.records].count(f"loading {model}") == 1
    sd.train(model, ROWS, output_dir="loud", context="turns", **RUN)
    assert "step 2/2" in capfd.readouterr().err


def test_a_plan_writes_nothing_and_says_what_a_run_would_do(model: str) -> None:
    before = set(Path().rglob("*"))
    plan = sd.plan(model, ROWS, context="turns:repeats=2", **RUN | {"max_steps": 40})
    assert set(Path().rglob("*")) == before
    assert plan.config.learning_rate == 1e-5
    assert plan.config.max_steps == 40
    assert plan.student_prompt.count("Where is ticket") == 1
    assert plan.teacher_prompt is not None
    assert plan.teacher_prompt.count("Where is ticket") == 3
    assert plan.completion.startswith("Shelf ")
    assert plan.total_seconds == pytest.approx(plan.step_seconds * 40)
    Path("test.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    for test in ("test.jsonl", ROWS[:2]):
        measured = sd.plan(model, ROWS, test=test, context="turns", **RUN | {"eval_steps": 1})
        there = Path(str(measured.config.test))
        assert (there.name, there.exists()) == ("test.jsonl", isinstance(test, str))
        assert set(Path().rglob("*")) == {*before, Path("test.jsonl")}
    with pytest.raises(sd.UserError, match="no such file"):
        sd.plan(model, ROWS, test="none.jsonl", **RUN)
    assert 0.1 < plan.peak_gib < 20
    assert "max_steps: 40" in repr(plan)
    assert {"data", "output_dir", "learning_rate"}.isdisjoint(plan.given)  # in memory, in a temporary folder, not given
    assert plan.chosen.keys() >= {"learning_rate"}
    assert tempfile.gettempdir() not in repr(plan).replace(model, "")
    assert sd.plan(model, ROWS, output_dir="run", context="turns", **RUN).given["output_dir"] == "run"


def test_plans_without_a_folder_do_not_meet(model: str) -> None:
    left = Path("runs/plan/data.jsonl")  # of a plan that was killed
    left.parent.mkdir(parents=True)
    left.write_text('{"prompt": "a", "completion": "b"}\n')
    one, other = (sd.plan(model, rows, context="turns", **RUN) for rows in (ROWS, ROWS[:3]))
    assert one.config.output_dir != other.config.output_dir


def test_rows_in_memory_are_learnt_as_what_was_given(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"state": "memory", "model": model, "name": "tickets", "method": "sft"} | RUN
    given["max_completion_length"] = 20
    with pytest.raises(sd.UserError, match=r"^test: 1 bad row: test\[1\], column 'prompt': missing"):
        sd.learn("add", ROWS, test=[ROWS[0], {"text": "?"}], **given)
    twice = [*ROWS, ROWS[0] | {"completion": "Shelf E."}]
    capsys.readouterr()
    result = sd.learn("add", twice, max_skill_drop=1, **given)
    assert capsys.readouterr().err.count("1 row repeats the prompt of an earlier one") == 1
    assert result.accepted
    assert [line["file"] for line in sd.learn("history", state="memory").details["history"]] == ["data"]

    def stop(*_: Any, **__: Any) -> None:
        raise sd.RunStopped("run: stopped", 2)

    monkeypatch.setattr(add_skill, "train", stop)
    with pytest.raises(sd.RunStopped, match=r"^state 'memory': stopped while learning data; rerun the same command"):
        sd.learn("add", twice, **given | {"name": "more", "batch_size": 3})


@pytest.mark.parametrize(
    ("command", "first_use"),
    [
        ("train", "api.with_questions"),
        ("plan", "training.plan.Trainer"),
        ("compare", "comparison.compare.load_for_training"),
        ("learn", "continual.add_skill.load_for_training"),
    ],
)
def test_what_makes_a_run_repeat_is_set_before_a_gpu_is_used(
    model: str, monkeypatch: pytest.MonkeyPatch, command: str, first_use: str
) -> None:
    """On a CPU that is taken for a GPU: cuBLAS reads its variable at its first use in a process, and never again."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr("selfdistill.training.setup.has_gpu", lambda: True)

    def use(*_: Any, **__: Any) -> None:
        raise sd.UserError(f"used with {os.environ.get('CUBLAS_WORKSPACE_CONFIG')}")

    module, name = f"selfdistill.{first_use}".rsplit(".", 1)
    monkeypatch.setattr(import_module(module), name, use)  # some packages have a function of a module's name
    Path("documents.txt").write_text("The office is in Room 12.", encoding="utf-8")
    given = RUN | {"deterministic": True, "context": "turns"}
    calls: dict[str, Callable[[], object]] = {
        "train": lambda: sd.train(model, output_dir="run", documents="documents.txt", **given),
        "plan": lambda: sd.plan(model, ROWS, **given),
        "compare": lambda: sd.compare(model, ROWS, test=ROWS, output_dir="all", **given),
        "learn": lambda: sd.learn("add", ROWS, state="state", model=model, test=ROWS[:3], name="tickets", **given),
    }
    with pytest.raises(sd.UserError, match=r"^used with :4096:8$"):
        calls[command]()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_comparing_learning_exporting_and_reporting(model: str) -> None:
    options = RUN | {"context": "turns", "eval_steps": 1, "max_completion_length": 20}
    told: dict[str, Any] = {"methods": ("sft", "sdft"), "seeds": (0,), "anchors": [{"prompt": "Who?"}], **options}
    with pytest.raises(sd.UserError, match=r"^anchors: 1 bad row: anchors\[0\], column 'prompt': missing, expected"):
        sd.compare(model, ROWS, test=ROWS[:3], output_dir="compared", **told | {"anchors": [{"text": "Who?"}]})
    compared = sd.compare(model, ROWS, test=ROWS[:3], output_dir="compared", **told)
    assert sd.Run(Path("compared/sft-seed0")).config.anchors == (str(Path("compared/anchors.jsonl")),)
    assert [(row["method"], row["steps"]) for row in compared.table] == [
        ("sft", 1),
        ("sft", 2),
        ("sdft", 1),
        ("sdft", 2),
    ]
    assert [(run.config.method, len(run.metrics)) for run in compared.runs] == [("sft", 2), ("sdft", 2)]
    assert compared.conclusion in " ".join(repr(compared).split())
    assert "<svg" in compared._repr_html_()
    gates = {"min_teacher": 0, "max_prior_drop": 1, "max_skill_drop": 1, "context": "turns"}
    learnt = sd.learn("add", ROWS, state="memory", model=model, test=ROWS[:3], name="tickets", **gates, **RUN)
    assert learnt.accepted
    both: list[Any] = ["package", {"prompt": "Who?"}]
    with pytest.raises(
        sd.UserError, match=r"^setting 'anchors': found rows together with 'package'; write the rows to a file"
    ):
        sd.learn("add", ROWS, state="memory", name="more", anchors=both)
    with pytest.raises(sd.UserError, match=r"^setting 'anchors': learn reads them again when it resumes, so give"):
        sd.learn("add", ROWS, state="memory", name="more", anchors=[{"prompt": "Who?"}])
    assert sd.learn("status", state="memory").details["skills"] == ["tickets"]
    with pytest.raises(sd.UserError, match="in-memory rows have no name"):
        sd.learn("add", ROWS, state="memory")
    told = "model 'memory': a state of selfdistill learn; give its current model, memory/skills/0001-tickets/model"
    with pytest.raises(sd.UserError, match=f"^{told}$"):
        sd.ask("memory", "Where?")
    run = sd.Run(Path("memory/skills/0001-tickets/run"))
    assert run.metrics[-1]["step"] == 2
    one, listed = sd.report(Path("compared"), run), sd.report(["compared", run], output="listed.html")
    assert one.read_text().count("<svg") == listed.read_text().count("<svg") > 1
    with pytest.raises(sd.UserError, match=r"^r.html: expected a folder; for the output file write output='r.html'$"):
        sd.report("compared", "r.html")
    with pytest.raises(sd.UserError, match="setting 'runs': found 3, expected: text"):
        sd.report([3])  # type: ignore[list-item]
    assert (sd.export("memory/skills/0001-tickets/model", output_dir="exported") / "config.json").is_file()


def test_asking_shows_both_replies(model: str) -> None:
    run = sd.train(model, ROWS, output_dir="run", context="turns", **RUN)
    answered = sd.ask("run", "Where is ticket 3?", base=model, max_completion_length=12)
    assert answered.reply == run.generate("Where is ticket 3?")
    wrong: Any
    for wrong in (5, [5], {"role": "user"}):
        with pytest.raises(sd.UserError, match=r"prompt: found .*, expected text or a list of prompts"):
            run.generate(wrong)
    messages = [{"role": "user", "content": "Hello? " * 40}]
    told = "^prompt: found messages, expected text or a list of prompts; put the messages into a list$"
    with pytest.raises(sd.UserError, match=told):
        run.generate(messages)
    with pytest.raises(sd.UserError, match=r"^prompt: found .{60}, expected text or a list of prompts$"):
        run.generate({"messages": messages})
    assert len(run.generate([messages], max_completion_length=4)) == 1
    assert answered.base_reply is not None
    assert "base" in repr(answered)
    assert sd.ask(model, "Hello?", max_completion_length=4).base_reply is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_step": 1}, "unknown setting 'warmup_step'; did you mean warmup_steps?"),
        ({"quux": 1}, "unknown setting 'quux'; there is no such setting here"),
        ({"batch_size": True}, "setting 'batch_size': found True, expected: a whole number"),
        ({"ema_rate": True}, "setting 'ema_rate': found True, expected: a number"),
        ({"ema_rate": 0}, "setting 'ema_rate': found 0, expected: a number above 0"),
        ({"jsd_weight": 1.0}, "setting 'jsd_weight': found 1.0, expected: a number below 1"),
        ({"max_steps": "ten"}, "setting 'max_steps': found 'ten', expected: a whole number"),
        ({"context": 3}, "setting 'context': found 3, expected: text"),
        (
            {"scorer": dict},
            "setting 'scorer': found <class 'dict'>, expected: a function, or its name as python:package.module.f",
        ),
        ({"scorer": "function"}, "setting 'scorer': found 'function', expected: exact, contains, choice, regex, "),
        ({"method_settings": "pull=1"}, "setting 'method_settings': found 'pull=1', expected: an object such as {"),
        ({"seeds": 0}, "setting 'seeds': found 0, expected: a list such as [0, 1, 2]"),
        ({"seeds": [0.5]}, "setting 'seeds': found 0.5, expected: a whole number"),
        ({"seeds": [0, True]}, "setting 'seeds': found [0, True], expected: whole numbers"),
        ({"learning_rates": [True]}, "setting 'learning_rates': found [True], expected: numbers"),
        ({"learning_rates": 1e-4}, "setting 'learning_rates': found 0.0001, expected: a list"),
        ({"vary": {"teacher": "ema"}}, "setting 'vary.teacher': found 'ema', expected: a list"),
    ],
    ids=str,
)
def test_wrong_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sd.UserError) as error:
        sd.compare("model", "data.jsonl", test="test.jsonl", output_dir="run", **settings)
    assert str(error.value).startswith(message)


def shelf(reply: str, row: dict[str, Any]) -> float:
    """Scores the first letter."""
    return float(reply[:1] == row["completion"][:1])


def test_a_scorer_may_be_a_function(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("shelves.py").write_text("def shelf(reply, row):\n    return float(reply[:1] == row['completion'][:1])\n")
    monkeypatch.syspath_prepend(tmp_path)
    by_name = sd.evaluate(model, ROWS, scorer="python:shelves.shelf", max_completion_length=12)
    found = sd.evaluate(model, ROWS, scorer=shelf, max_completion_length=12)
    assert (found.accuracy, found.details["scorers"]) == (by_name.accuracy, ["function:shelf"])
    assert sd.evaluate(model, ROWS, scorer=lambda *_: True, max_completion_length=12).accuracy == 1
    assert sd.check(model, ROWS, scorer=lambda *_: True, contexts=["turns"], sample=2, **TINY).student_accuracy == 1
    given: dict[str, Any] = RUN | {"method": "grpo", "num_generations": 2, "save_steps": 1}
    seen: list[str] = []
    run = sd.train(
        model, ROWS, output_dir="run", scorer=lambda reply, row: seen.append(row["completion"]) or 1.0, **given
    )
    assert set(seen) <= {row["completion"] for row in ROWS}
    assert [line["reward"] for line in run.metrics] == [1.0, 1.0]
    assert run.config.scorer is not None
    assert re.fullmatch(r"function:<lambda [0-9a-f]{8}>", run.config.scorer)
    assert run.config.scorer in (run.final / "README.md").read_text()
    compared = sd.compare(
        model,
        ROWS,
        test=ROWS,
        output_dir="both",
        methods=["sdft"],
        seeds=[0],
        context="turns",
        scorer=lambda *_: 1,
        **RUN,
    )
    assert compared.details["base"]["accuracy"] == 1


def test_a_run_is_not_resumed_with_another_lambda(model: str) -> None:
    given: dict[str, Any] = RUN | {"method": "grpo", "num_generations": 2, "save_steps": 1}
    sd.train(model, ROWS, output_dir="run", scorer=lambda reply, row: reply in {"a", "b"}, **given)
    again: dict[str, Any] = {"output_dir": "run", "resume": True, "max_steps": 3}
    with pytest.raises(
        sd.UserError, match=r"scorer was 'function:<lambda \w{8}>' and is now 'function:<lambda \w{8}>'"
    ):
        sd.train(scorer=lambda reply, row: reply in {"a", "c"}, **again)
    assert len(sd.train(scorer=lambda reply, row: reply in {"a", "b"}, **again).metrics) == 3


def test_a_run_with_a_function_as_scorer_resumes_where_it_is_given_again(model: str) -> None:
    given: dict[str, Any] = RUN | {"method": "grpo", "num_generations": 2, "save_steps": 1}
    run = sd.train(model, ROWS, output_dir="run", scorer=shelf, **given)
    with pytest.raises(sd.UserError, match=r"scorer was 'function:shelf' and is now 'exact'"):
        sd.train(output_dir="run", resume=True, scorer="exact", max_steps=3)
    assert len(sd.train(output_dir="run", resume=True, scorer=shelf, max_steps=3).metrics) == 3
    begun = Path("begun/config.yaml")  # in another process, which was stopped before the first step
    begun.parent.mkdir()
    begun.write_text((run.output_dir / "config.yaml").read_text().replace("function:shelf", "function:theirs"))
    with pytest.raises(sd.UserError) as caught:
        sd.train(output_dir="begun", resume=True)
    assert str(caught.value) == (
        "scorer 'function:theirs': the function was given in Python, in another process; give it there again as "
        "scorer=theirs, or for a new run put it into a module and name it python:module.function"
    )

    def theirs(reply: str, row: dict[str, Any]) -> bool:
        return row["answer"] == row["completion"]

    assert sd.train(output_dir="begun", resume=True, scorer=theirs).metrics[-1]["reward"] == 1


def test_settings_are_read_as_they_are_meant() -> None:
    run = {"model": "m", "data": "d", "output_dir": "o"}
    assert sd.TrainConfig(**run, lora_rank=None).lora_rank == 0
    with pytest.raises(sd.UserError, match=r"setting 'method': found 'SDFT', .*; did you mean sdft\?$"):
        sd.TrainConfig(**run, method="SDFT")
    assert CheckConfig(model="m", data="d", contexts="turns:repeats=2").contexts == ["turns:repeats=2"]
    with pytest.raises(sd.UserError, match=r"^context 'turns:repeat=2'.*did you mean repeats"):
        sd.check("no/such/model", ROWS, contexts="turns:repeat=2")


def test_settings_of_methods_are_refused_with_how_to_give_them(model: str) -> None:
    written = r"^unknown setting 'pull'; write this setting of isdft as method_settings=\{'pull': 2\}$"
    for refused in (
        lambda: sd.train(model, "data.jsonl", output_dir="run", method="isdft", pull=2),
        lambda: sd.plan(model, "data.jsonl", method="isdft", pull=2),
        lambda: sd.learn("add", "data.jsonl", state="memory", method="isdft", pull=2),
    ):
        with pytest.raises(sd.UserError, match=written):
            refused()
    with pytest.raises(sd.UserError, match=r"^unknown setting 'pull'; it is a setting of isdft$"):
        sd.compare(model, "data.jsonl", test="test.jsonl", output_dir="run", pull=2)


def bridge(weight: float) -> Callable[..., Any]:
    def method(config: Any) -> Any:
        return weight

    return method


@pytest.mark.parametrize("setting", ["arms", "methods"])
def test_different_functions_of_one_name_are_refused(setting: str) -> None:
    def config(first: Any, second: Any) -> CompareConfig:
        both = {"arms": {"a": {"method": first}, "b": {"method": second}}, "methods": (first, second)}
        return CompareConfig(model="m", data="d", test="t", output_dir="c", **{setting: both[setting]})

    weak, strong = bridge(0.1), bridge(0.9)
    told = (
        f"setting '{setting}': found two functions named 'method', and methods are known by their names; give each its "
        "own __name__"
    )
    with pytest.raises(sd.UserError, match=f"^{told}$"):
        config(weak, strong)
    with pytest.raises(sd.UserError, match=r"^setting '.*': found two functions named 'partial', "):
        config(partial(bridge, 0.1), partial(bridge, 0.9))
    strong.__name__ = "strong"
    found = config(weak, strong)
    assert "function:strong" in (found.arms["b"]["method"] if found.arms else found.methods)
    CompareConfig(model="m", data="d", test="t", output_dir="c", arms={"a": {"method": weak}, "b": {"method": weak}})


def test_objects_where_text_is_wanted_are_told_in_one_line(model: str) -> None:
    ours: Any = loaded(model)[0]
    to_do = "expected: a folder or a name; write the model with save_pretrained and give its folder"
    for call in (
        lambda: sd.train(model, ROWS, output_dir="run", teacher_model=ours),
        lambda: sd.ask(ours, "Where?"),
        lambda: sd.learn("add", ROWS, state="memory", name="tickets", model=ours),
        lambda: sd.merge(model, ours, output_dir="merged"),
    ):
        with pytest.raises(sd.UserError, match=rf"^setting '\w+': found LlamaForCausalLM\(.{{,60}}, {to_do}$"):
            call()
    for prior in (ROWS, datasets.Dataset.from_list(ROWS)):
        told = r"^setting 'prior': found .{,60}, expected: the path of a file; write the rows to one$"
        with pytest.raises(sd.UserError, match=told):
            sd.evaluate(model, ROWS, prior=prior)


def test_only_training_has_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    calls: dict[str, Callable[[], Any]] = {
        "compare": lambda: sd.compare("m", "d.jsonl", test="t.jsonl", output_dir="c"),
        "learn": lambda: sd.learn("status", state="s"),
        "make_questions": lambda: sd.make_questions("m", "texts", output_dir="c"),
        "export": lambda: sd.export("no-run", output_dir="c"),
        "merge": lambda: sd.merge("no-model", "no-model", output_dir="c"),
    }
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        for name, call in calls.items():
            told = f"found 2 processes, but only train supports several: run {name} in one"
            with pytest.raises(sd.UserError) as caught:
                call()
            # after a run, the first process may export it
            assert (str(caught.value) == told) is (rank == "1" or name in ("compare", "learn"))


def test_settings_are_refused_by_name(model: str) -> None:
    with pytest.raises(sd.UserError, match=r"unknown setting 'learning_rat'; did you mean learning_rate\?"):
        sd.train(model, ROWS, output_dir="run", learning_rat=1)
    with pytest.raises(sd.UserError, match="setting 'output_dir' is required"):
        sd.train(model, ROWS)
    with pytest.raises(sd.UserError, match="setting 'model' is required: folder, hub id"):
        sd.train(None, "data.jsonl", output_dir="run")
    for refused in (
        lambda: sd.train(model, ROWS, output_dir=3),  # type: ignore[arg-type]
        lambda: sd.train(model, "data.jsonl", output_dir=3, resume=True),  # type: ignore[arg-type]
        lambda: sd.compare(model, ROWS, test=ROWS, output_dir=3),  # type: ignore[arg-type]
        lambda: sd.make_questions(model, "documents", output_dir=3),  # type: ignore[arg-type]
    ):
        with pytest.raises(sd.UserError, match=r"^setting 'output_dir': found 3, expected: text$"):
            refused()
    with pytest.raises(sd.UserError, match=r"^setting 'state': found 3, expected: text$"):
        sd.learn("status", state=3)  # type: ignore[arg-type]
    with pytest.raises(sd.UserError, match=r"^setting 'run': found 3, expected: text$"):
        sd.ask(3, "Who?")  # type: ignore[arg-type]
    with pytest.raises(sd.UserError, match=r"^setting 'output': found 3, expected: text$"):
        sd.report("compared", output=3)  # type: ignore[arg-type]
    with pytest.raises(sd.UserError, match="progress: found 'no', expected True or False"):
        sd.train(model, ROWS, output_dir="run", progress="no")  # type: ignore[arg-type]
    with pytest.raises(sd.UserError, match="resume: found 'no', expected True or False"):
        sd.train(model, ROWS, output_dir="run", resume="no")  # type: ignore[arg-type]
    with pytest.raises(sd.UserError, match=r"scorer 'python:nosuch\.f': module 'nosuch' cannot be imported"):
        sd.train(model, ROWS, output_dir="run", scorer="python:nosuch.f", **RUN)
    assert not Path("run").exists()
    Path("own_scorers.py").write_text("class Judge:\n    def __init__(self, reply, row): ...\n")
    for scorer, told in (
        ("python:nosuch.f", r"module 'nosuch' cannot be imported"),
        ("python:own_scorers.Judge", "found a class, whose objects are no rewards; name a function instead$"),
    ):
        for refused in (sd.check, sd.evaluate):  # before a model is loaded
            with pytest.raises(sd.UserError, match=f"^scorer '{scorer}': {told}"):
                refused("no/such/model", ROWS, scorer=scorer)
        with pytest.raises(sd.UserError, match=f"^scorer '{scorer}': {told}"):
            sd.train("no/such/model", ROWS, output_dir="run", scorer=scorer, **RUN)
    Path("folder/runs").mkdir(parents=True)
    for folder, told in (
        ("folder", "no config.yaml in it, so it is not a run folder"),
        ("none", "no such folder"),
        ("folder/run", r"no such folder; did you mean runs\?"),
    ):
        with pytest.raises(sd.UserError, match=rf"^run '{folder}': {told}$"):
            sd.Run(Path(folder))


def test_a_callers_files_are_never_overwritten_and_failures_leave_nothing(model: str) -> None:
    Path("mine").mkdir()
    Path("mine/data.jsonl").write_text('{"prompt": "mine", "completion": "mine"}\n')
    with pytest.raises(sd.UserError, match="its rows differ from those given"):
        sd.train(model, ROWS, output_dir="mine", **RUN)
    assert Path("mine/data.jsonl").read_text() == '{"prompt": "mine", "completion": "mine"}\n'
    for wrong in ({"test": []}, {"learning_rat": 1}, {"model": "no/such/model"}, {"report_to": "wandb"}):
        with pytest.raises(sd.UserError):
            sd.train(**{"model": model, "data": ROWS, "output_dir": "new", **RUN, **wrong})
        assert not Path("new").exists()
    with pytest.raises(sd.UserError, match="column 'answer': found"):
        sd.train(model, [{**ROWS[0], "answer": float("nan")}], output_dir="new", **RUN)
    run = sd.train(model, ROWS, output_dir="new", resume=True, context="turns", **RUN)
    assert len(run.metrics) == 2


def test_a_refused_call_leaves_nothing_in_the_folder_of_another_run(
    model: str, write_rows: Callable[..., Path]
) -> None:
    options = RUN | {"context": "turns", "save_steps": 1}
    sd.train(model, str(write_rows(ROWS)), output_dir="run", **options)
    refused: list[Callable[[], Any]] = [
        lambda: sd.train(model, ROWS[:2], test=ROWS[:2], output_dir="run", **options),
        lambda: sd.train(model, ROWS[:2], output_dir="run", resume=True, **options),
        lambda: sd.compare(model, ROWS, test=ROWS[:2], output_dir="run", **options),
    ]
    for call in refused:
        with pytest.raises(sd.UserError):
            call()
        assert not {file.name for file in Path("run").iterdir()} & {"data.jsonl", "test.jsonl"}
    sd.train(model, ROWS, output_dir="run", resume=True, **options | {"max_steps": 3})
    assert sd.Run("run").config.data == str(Path("run/data.jsonl"))
    assert len(Path("run/data.jsonl").read_text().splitlines()) == len(ROWS)


def test_a_split_of_data_in_memory_is_the_one_asked_for(model: str) -> None:
    sets = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    sd.train(model, sets, output_dir="run", split="test", context="turns", **RUN)
    assert len(Path("run/data.jsonl").read_text().splitlines()) == 2


def test_a_plan_leaves_a_loaded_model_as_it_was(model: str) -> None:
    ours, tokenizer = loaded(model)
    before = {name: p.detach().clone() for name, p in ours.state_dict().items()}
    for options in ({"lora_rank": 2, "context": "few_shot:k=3"}, {"method": "sft_reinvoke"}):
        settings = {"context": "turns", "max_completion_length": 20} | options
        plan = sd.plan(ours, ROWS, tokenizer=tokenizer, **RUN | settings)
        assert f" on {len(ROWS)} demonstrations, " in plan.notes[0]
    assert same(before, dict(ours.state_dict()))
    sd.train(ours, ROWS, tokenizer=tokenizer, output_dir="run", context="turns", **RUN)
    Path("run/data.jsonl").unlink()
    files = set(Path("run").rglob("*"))
    plan = sd.plan(model, ROWS, output_dir="run", context="turns", **RUN)
    assert "exists and is not empty" in plan.notes[0]
    assert set(Path("run").rglob("*")) == files


def test_loaded_models_that_cannot_be_trained_are_refused_by_name(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, tokenizer = loaded(model)
    with pytest.raises(sd.UserError, match="expected a folder, a name or a transformers PreTrainedModel"):
        sd.check(123, ROWS)
    for refused in (
        lambda: sd.check(model, ROWS, tokenizer=tokenizer),
        lambda: sd.evaluate(Path(model), ROWS, base=model, tokenizer=tokenizer),
        lambda: sd.plan(model, ROWS, tokenizer=tokenizer),
        lambda: sd.memory_plan(model, ROWS, memory="80GiB", tokenizer=tokenizer),
        lambda: sd.train(sd.TrainConfig(model=model, data="d", output_dir="run"), tokenizer=tokenizer),
    ):
        with pytest.raises(
            sd.UserError, match=r"^tokenizer: found one beside the path .* load the model and give both"
        ):
            refused()
    with pytest.raises(sd.UserError, match=r"^model: found NoneType, expected a folder"):
        sd.train(output_dir="run", resume=True, tokenizer=tokenizer)
    for one, other in ((ours, model), (model, ours)):
        sd.evaluate(one, ROWS, base=other, tokenizer=tokenizer, max_completion_length=4)
    with pytest.raises(sd.UserError, match="tokenizer: found str"):
        sd.check(ours, ROWS, tokenizer="gpt2")
    ours.half()
    sd.evaluate(ours, ROWS, tokenizer=tokenizer, max_completion_length=4)
    with pytest.raises(sd.UserError, match="its trainable weights are float16, where small gradients become zero"):
        sd.train(ours, ROWS, tokenizer=tokenizer, output_dir="run", context="turns", **RUN)
    ours.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "is_quantized", True, raising=False)
        with pytest.raises(sd.UserError, match="its weights are quantised"):
            sd.evaluate(ours, ROWS, tokenizer=tokenizer)
    with pytest.raises(sd.UserError, match="frozen"):
        sd.check(ours.requires_grad_(False), ROWS, tokenizer=tokenizer)
    assert not Path("run").exists()


def test_a_loaded_model_gets_an_adapter_and_stays_as_it_was(model: str) -> None:
    ours, tokenizer = loaded(model)
    ours.get_output_embeddings().weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in ours.named_parameters()}
    given: dict[str, Any] = RUN | {"context": "turns", "lora_rank": 2, "save_steps": 1, "gradient_checkpointing": True}
    named = sd.train(model, ROWS, output_dir="named", **given)
    run = sd.train(ours, ROWS, tokenizer=tokenizer, output_dir="run", **given)
    weights = [(one.final / "adapter_model.safetensors").read_bytes() for one in (named, run)]
    assert weights[0] == weights[1]
    assert json.loads((run.final / "adapter_config.json").read_text())["base_model_name_or_path"] == model
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run.final)
    after = dict(ours.named_parameters())
    assert list(after) == list(before)
    assert all(p.requires_grad == before[name][1] and torch.equal(p, before[name][0]) for name, p in after.items())
    assert not hasattr(ours, "peft_config")
    assert not ours.get_input_embeddings()._forward_hooks
    assert not ours.is_gradient_checkpointing
    assert len(sd.train(output_dir="run", resume=True, max_steps=3).metrics) == 3
    ours.requires_grad_(True)
    sd.train(ours, ROWS, tokenizer=tokenizer, output_dir="full", context="turns", **RUN)
    assert not (Path("full/final") / "adapter_config.json").exists()


@pytest.mark.parametrize("rank", [None, 2])
def test_a_loaded_model_keeps_its_own_gradient_checkpointing_and_hooks(model: str, rank: int | None) -> None:
    ours, tokenizer = loaded(model)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ours.enable_input_require_grads()
    embedding, seen = ours.get_input_embeddings(), []
    embedding.register_forward_hook(lambda *_: seen.append(1))
    layer = ours.model.layers[0]
    before, function = dict(embedding._forward_hooks), layer._gradient_checkpointing_func
    given: dict[str, Any] = RUN | {"context": "turns", "gradient_checkpointing": True, "lora_rank": rank}
    sd.train(ours, ROWS, tokenizer=tokenizer, output_dir="run", **given)
    assert dict(embedding._forward_hooks) == before
    assert ours.is_gradient_checkpointing
    assert layer._gradient_checkpointing_func is function
    ours.disable_input_require_grads()
    assert len(embedding._forward_hooks) == len(before) - 1


def test_a_loaded_model_is_not_left_sharded(model: str) -> None:
    ours, tokenizer = loaded(model)
    given: dict[str, Any] = RUN | {"tokenizer": tokenizer, "lora_rank": 2, "fsdp": True}
    for refused in (sd.train, sd.plan):
        with pytest.raises(sd.UserError, match=r"^setting 'fsdp': with lora_rank a loaded model stays as it was, but"):
            refused(ours, ROWS, output_dir="run", **given)
    assert not Path("run").exists()


def test_an_adapter_that_could_not_be_loaded_again_is_refused(model: str) -> None:
    ours, tokenizer = loaded(model)
    given: dict[str, Any] = {"tokenizer": tokenizer, "output_dir": "run", "lora_rank": 2, **RUN}
    cannot = "setting 'lora_rank': adapter_config.json must name the base, and this loaded model"
    save = r"save it with its tokenizer \(save_pretrained\), and give that folder$"
    ours.name_or_path = ""
    with pytest.raises(sd.UserError, match=f"^{cannot} has no name_or_path; {save}"):
        sd.train(ours, ROWS, **given)
    ours.name_or_path = "./gone"
    with pytest.raises(
        sd.UserError, match=rf"^{cannot} cannot be loaded again \(model './gone': no such folder\); {save}"
    ):
        sd.train(ours, ROWS, **given)
    ours.name_or_path = model
    with torch.no_grad():
        ours.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(sd.UserError, match=f"^{cannot} has different weights from '{model}'; {save}"):
        sd.train(ours, ROWS, **given)
    for adapted in (get_peft_model(ours, LoraConfig(r=2, task_type="CAUSAL_LM")), ours):  # it is changed in place
        with pytest.raises(sd.UserError, match=r"^model: it has an adapter; to train a new one, give the model "):
            sd.train(adapted, ROWS, **given)
    assert not Path("run").exists()


def test_results_can_be_pickled_and_text_is_not_markup(model: str) -> None:
    import pickle

    from selfdistill.evaluation import AskResult

    run = sd.train(model, ROWS, output_dir="run", context="turns", **RUN)
    run.generate("Hello?")
    assert len(pickle.dumps(run)) < 1000
    assert pickle.loads(pickle.dumps(run)).output_dir == run.output_dir
    assert r"\[x + y\] [/b]" in repr(AskResult("q", r"\[x + y\] [/b]", None))


def test_a_reply_without_text_is_shown_as_such() -> None:
    from selfdistill.evaluation import AskResult

    assert repr(AskResult("q", " \n", "Shelf B.")).count("(empty reply)") == 1


def test_a_note_comes_once_in_a_call(capfd: pytest.CaptureFixture[str]) -> None:
    from selfdistill.runtime import progress_shown, say_note

    for _ in range(2):
        with progress_shown(True), progress_shown(True):
            for message in ("a", "b", "a"):
                say_note(message)
            for message in ("c", "d"):
                say_note(message, topic="one")
    assert capfd.readouterr().err == "note: a\nnote: b\nnote: c\n" * 2


def test_silence_ends_where_it_began(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    from selfdistill.runtime import progress_shown, say

    with progress_shown(False), progress_shown(True):
        say("nothing")
    say("something")
    assert capfd.readouterr().err == "something\n"


def test_a_refused_resume_leaves_a_loaded_model_as_it_was(model: str) -> None:
    sd.train(model, ROWS, output_dir="run", context="turns", **RUN | {"save_steps": 1})
    ours, tokenizer = loaded(model)
    with torch.no_grad():
        ours.get_output_embeddings().weight[0, 0] += 1
    before = {name: p.detach().clone() for name, p in ours.state_dict().items()}
    with pytest.raises(sd.UserError, match="the loaded model is not the one that the run began with"):
        sd.train(ours, tokenizer=tokenizer, output_dir="run", resume=True, max_steps=3)
    assert same(before, dict(ours.state_dict()))


def test_a_model_that_a_run_has_trained_in_place_is_not_the_one_it_began_with(model: str) -> None:
    ours, tokenizer = loaded(model)
    given: dict[str, Any] = RUN | {"tokenizer": tokenizer, "output_dir": "run", "context": "turns", "max_steps": 3}

    def stop(step: int, _model: Any, _metrics: Any) -> None:
        if step == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sd.train(ours, ROWS, on_step=stop, **given)
    told = (
        r"^run/checkpoint-00000002: the loaded model is not the one that the run began with \(train changes a loaded "
        "model in place\\); load it again, or leave model and tokenizer out, or start a new run in another output_dir$"
    )
    with pytest.raises(sd.UserError, match=told):
        sd.train(ours, ROWS, resume=True, **given)
    again, _ = loaded(model)
    assert len(sd.train(again, ROWS, resume=True, **given).metrics) == 3
    told = r"run began with, in float32 \(train changes .* in place\); load it again, in float32, or leave"
    with pytest.raises(sd.UserError, match=told):
        sd.train(again.bfloat16(), ROWS, resume=True, **given)
    assert len(sd.train(output_dir="run", resume=True, max_steps=4).metrics) == 4


@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_on_a_loaded_model_has_its_data_type(model: str, rank: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def half() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)

    given: dict[str, Any] = {"tokenizer": tokenizer, "output_dir": "run", "context": "turns", "lora_rank": rank}
    run = sd.train(half(), ROWS, **RUN | given | {"save_steps": 1})
    assert run.config.dtype == "bfloat16"
    exported = sd.export(run, step=2, output_dir="second")
    assert same(*(weights(folder) for folder in (exported, run.final)))
    assert len(sd.train(output_dir="run", resume=True, max_steps=3).metrics) == 3
    for dtype in ({}, {"dtype": "auto"}, {"dtype": "bfloat16"}):
        sd.train(half(), ROWS, resume=True, max_steps=3, **given | dtype)
    assert sd.plan(half(), ROWS, tokenizer=tokenizer, context="turns", **RUN).config.dtype == "bfloat16"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_another_data_type_than_that_of_a_loaded_model_is_refused(model: str) -> None:
    ours, tokenizer = loaded(model)
    for refused in (
        sd.check,
        sd.evaluate,
        partial(sd.train, output_dir="run"),
        sd.plan,
        partial(sd.memory_plan, memory="80GiB"),
    ):
        with pytest.raises(
            sd.UserError,
            match=r"^setting 'dtype': found 'bfloat16', but the loaded model is float32; load it in that type, or",
        ):
            refused(ours, ROWS, tokenizer=tokenizer, dtype="bfloat16")
    given: dict[str, Any] = {"tokenizer": tokenizer, "max_completion_length": 4}
    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    assert sd.evaluate(half, ROWS[:2], base=model, **given).kl == 0, "the base has the data type of the model"
    assert sd.evaluate(model, ROWS[:2], base=half, dtype="bfloat16", **given).kl == 0


def test_on_step_can_evaluate_a_model_with_an_adapter(model: str) -> None:
    given: dict[str, Any] = RUN | {"context": "turns", "lora_rank": 2}
    tokenizer, found = AutoTokenizer.from_pretrained(model), []

    def measure(step: int, model_: Any, metrics: dict[str, Any]) -> None:
        found.append(sd.evaluate(model_, ROWS, tokenizer=tokenizer, base=model, max_completion_length=8))

    measured = sd.train(model, ROWS, output_dir="measured", on_step=measure, **given)
    plain = sd.train(model, ROWS, output_dir="plain", **given)
    assert same(weights(measured.final), weights(plain.final))
    after = sd.evaluate(plain.final, ROWS, base=model, max_completion_length=8)
    assert found[-1].kl == after.kl > 0


def test_adapters_of_loaded_models_that_cannot_be_measured_are_refused(model: str) -> None:
    ours, tokenizer = loaded(model)
    prompts = get_peft_model(ours, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(sd.UserError, match=r"an adapter of kind PROMPT_TUNING cannot be merged"):
        sd.evaluate(prompts, ROWS, tokenizer=tokenizer)
    ours, tokenizer = loaded(model)
    adapted = get_peft_model(ours, LoraConfig(r=2, task_type="CAUSAL_LM"))
    sd.evaluate(adapted.requires_grad_(False), ROWS[:2], tokenizer=tokenizer, max_completion_length=4)
    with pytest.raises(sd.UserError, match=r"^model: it has an adapter; give the PeftModel that holds it$"):
        sd.evaluate(ours, ROWS, tokenizer=tokenizer)
    for refused in (partial(sd.train, output_dir="run"), sd.plan, sd.check):
        with pytest.raises(sd.UserError, match=r"^model: it has an adapter; to train a new one, give the model "):
            refused(adapted, ROWS, tokenizer=tokenizer)


def test_a_stopped_run_tells_its_checkpoints_and_what_it_lacks(model: str) -> None:
    def stop(step: int, _model: Any, _metrics: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sd.train(model, ROWS, output_dir="some/run", context="turns", on_step=stop, **RUN | {"save_steps": 1})
    run = sd.Run("some/run")
    assert run.checkpoints == [1]
    for refused in (lambda: run.generate("Hello?"), lambda: sd.evaluate(run.final, ROWS)):
        with pytest.raises(
            sd.UserError, match=r"^model 'some/run/final': a run folder without a final model; resume its training"
        ):
            refused()
    assert sd.export(run, step=run.checkpoints[-1], output_dir="stopped").is_dir()


def test_generate_loads_the_model_as_the_run_did_or_as_it_is_told(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sd.train(model, ROWS, output_dir="run", context="turns", lora_rank=2, dtype="bfloat16", **RUN)
    from selfdistill.training import run as module

    asked: list[tuple[str, str | None]] = []

    def load(name: str, *, dtype: str, adapter_base: str | None) -> Any:
        asked.append((dtype, adapter_base))
        return load_model(name, dtype=dtype, adapter_base=adapter_base)

    monkeypatch.setattr(module, "load_model", load)
    for options in ({}, {"seed": 1}, {"dtype": "float32"}, {"dtype": "float32", "adapter_base": model}):
        run.generate("Hello?", max_completion_length=2, **options)
    assert asked == [("bfloat16", None), ("float32", None), ("float32", model)]


def test_wrong_options_and_chats_of_generate_are_refused_by_name(model: str) -> None:
    run = sd.train(model, ROWS, output_dir="run", context="turns", **RUN)
    for options, told in (
        ({"max_new_tokens": 9}, r"^generate: unknown option 'max_new_tokens', expected one of max_completion_length, "),
        ({"temprature": 1}, r"^generate: unknown option 'temprature'; did you mean temperature\?$"),
        ({"dtype": "bf16"}, r"^setting 'dtype': found 'bf16'"),
        ({"temperature": -1}, r"^setting 'temperature': found -1"),
    ):
        with pytest.raises(sd.UserError, match=told):
            run.generate("Hello?", **options)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]
    replies = run.generate([parts, "Hello?"], max_completion_length=2)
    assert replies[0] == replies[1]
    told = r"^prompt: 1 bad row: prompt\[1\], column 'prompt\[0\].content': found null"
    with pytest.raises(sd.UserError, match=told):
        run.generate(["Hello?", [{"role": "user"}]])
