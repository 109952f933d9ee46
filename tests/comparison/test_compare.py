"""A comparison of tiny runs: what it keeps, what it goes on with, what it says."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ENDS
from safetensors.torch import load_file, save_file

from selfdistill.cli import main
from selfdistill.comparison.compare import compare
from selfdistill.comparison.compare_result import CompareResult
from selfdistill.comparison.kinds import first_run, kinds_of, runs_of
from selfdistill.comparison.report import report
from selfdistill.config.commands import CompareConfig, EvalConfig, ReportConfig
from selfdistill.config.files import continued, dump_yaml, load_yaml, with_runs_of
from selfdistill.config.train import TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.errors import EngineFailed, RunFailed, RunStopped, UserError
from selfdistill.evaluation.evaluate import evaluate
from selfdistill.methods import METHODS, Method, Part
from selfdistill.methods.examples import OtherRows
from selfdistill.methods.sft import sft
from selfdistill.runtime.files import folder_lock
from selfdistill.training.train import train

# The package has a function of this name, too.
module = importlib.import_module("selfdistill.comparison.compare")


@pytest.fixture
def settings(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> Callable[..., CompareConfig]:
    data, test = write_rows(count=6), write_rows(count=5, name="test.jsonl")
    prior = tmp_path / "p.jsonl"
    choices = {"query": "Question: a or b?", "choices": ["a", "b b b"], "gold": 0}
    prior.write_text("".join(json.dumps(choices | {"gold": gold}) + "\n" for gold in (0, 1, 0)), encoding="utf-8")

    def make(**values: Any) -> CompareConfig:
        defaults: dict[str, Any] = {
            "model": str(model_folder(ends=ENDS, layers=1)),
            "data": str(data),
            "test": str(test),
            "prior": str(prior),
            "output_dir": str(tmp_path / "comparison"),
            "seeds": "0,1",
            "context": "turns",
            "max_completion_length": 10,
            "batch_size": 2,
            "max_steps": 2,
            "eval_steps": 1,
            "learning_rates": "1e-3",
            "save_steps": 1,
            "drift_steps": 0,
            "view_rows": 0,
            "mixed_precision": "no",
        }
        return CompareConfig(**(defaults | values))

    return make


def test_every_method_and_seed_is_run_measured_and_kept(
    settings: Callable[..., CompareConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = settings()
    compared = compare(config)
    result = compared.details
    folder = Path(config.output_dir)
    kept = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(result))
    assert [run["folder"] for run in kept["runs"]] == [
        f"{method}-0.001-seed{seed}" for seed in (0, 1) for method in ("sft", "sdft")
    ]
    assert [[e["step"] for e in run["evaluations"]] for run in kept["runs"]] == [[0, 1, 2]] * 4
    assert all(run["evaluations"][0]["correct"] == kept["base"]["correct"] for run in kept["runs"])
    assert (folder / "sdft-0.001-seed1" / "final" / "model.safetensors").is_file()
    assert not list(folder.glob("*/checkpoint-*"))
    assert kept["teacher"]["items"] == 5
    assert list(kept["moved"]) == ["sft 0.001 seed 0", "sdft 0.001 seed 0"]
    alone = evaluate(
        EvalConfig(
            model=str(folder / "sft-0.001-seed0"),
            base=config.model,
            data=config.test,
            max_completion_length=10,
            batch_size=2,
            mixed_precision="no",
        )
    )
    assert kept["moved"]["sft 0.001 seed 0"] == pytest.approx(alone["distance"]["new_task"]["kl_model"], rel=1e-4)
    assert kept["budget"] == "Every run has 2 steps of 2 prompts of the same demonstrations."
    out = repr(compared)
    assert kept["sentence"].split(". ")[0] in out
    assert (folder / "trade_off.svg").read_text(encoding="utf-8").count("<svg") == 1
    page = tmp_path / "report.html"
    report(ReportConfig(runs=[str(folder)], output=str(page)))
    assert "sdft 0.001 seed 1" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_method_of_the_package_can_be_compared(
    settings: Callable[..., CompareConfig],
    write_rows: Callable[..., Path],
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    told = {"completion": "Aa b.\nCc d.", "privileged_context": "Say a.\nSay c.", "document": "Aa b is before Cc d."}
    rows = [{"prompt": f"q{i}", **told, "scorer": "regex", "answer": r"[\s\S]{4,}"} for i in range(4)]
    general = tmp_path / "general.txt"
    general.write_text("Who?\n\nWhy is that so?\n", encoding="utf-8")
    shared: dict[str, Any] = {"data": str(write_rows(rows, name="whole.jsonl")), "general_prompts": str(general)}
    other = str(model_folder(ends=ENDS, layers=1, seed=1))  # of npo and t3s; it also teaches what has a teacher
    shared |= {"prior": None, "max_completion_length": 16, "teacher_model": other, "seeds": "0"}
    config = settings(**shared, methods=",".join(METHODS))
    runs = compare(config).details["runs"]
    assert [run["method"] for run in runs] == list(METHODS)
    assert [[one["step"] for one in run["evaluations"]] for run in runs] == len(METHODS) * [[0, 1, 2]]


@pytest.mark.slow
def test_methods_are_compared_in_an_environment(
    settings: Callable[..., CompareConfig],
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"q{i}", "completion": "ab" * (1 + i % 4), "answer": 1 + i % 3} for i in range(6)]
    values: dict[str, Any] = {"model": str(model_folder(ends=ENDS, seed=5, room=2048))}
    values |= {
        "environment": "python:tiny_worlds.Asks",
        "max_episode_length": 300,
        "prior": None,
        "seeds": "0",
        "view_rows": 2,
    }
    values |= {"data": str(write_rows(rows)), "test": str(write_rows(rows[1:], name="test.jsonl"))}
    config = settings(**values)
    result = compare(config).details
    folder = tmp_path / "comparison"
    assert [run["folder"] for run in result["runs"]] == ["sft-0.001-seed0", "sdft-0.001-seed0"]
    assert all(run["failed"] is None for run in result["runs"])
    own = {key: getattr(config, key) for key in ("environment", "max_episode_length", "batch_size", "mixed_precision")}
    for run in result["runs"]:
        alone = evaluate(
            EvalConfig(model=str(folder / run["folder"]), data=config.test, max_completion_length=10, **own)
        )
        for key in ("correct", "episode/turns", "episode/reward", "episode/invalid_calls"):
            assert run["evaluations"][-1][key] == alone[key]
    assert 0 <= result["teacher"]["accuracy"] <= 1
    page = tmp_path / "report.html"
    report(ReportConfig(runs=[str(folder)], output=str(page)))
    text = page.read_text(encoding="utf-8")
    assert '<p class="speaker">assistant' in text
    assert "invalid calls" in text
    assert compare(config, resume=True).details["base"] == result["base"]


def test_a_comparison_that_was_stopped_goes_on_with_the_run_it_was_in(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: dict[str, Any] = {"methods": "sft", "seeds": "0,1,2"}
    whole = compare(settings(**shared, output_dir=str(Path(settings().output_dir).with_name("whole")))).details
    real, started = module.train, []

    def stops_in_the_second(config: TrainConfig, **options: Any) -> Path:
        started.append(Path(config.output_dir).name)
        if len(started) == 2:

            def stop(step: int, _loaded: Any, _metrics: Any) -> None:
                if step == 1:
                    raise RunStopped("stopped", 15)

            options["on_step"] = stop
        return real(config, **options)

    config = settings(**shared)
    monkeypatch.setattr(module, "train", stops_in_the_second)
    with pytest.raises(RunStopped) as stopped:
        compare(config)
    assert stopped.value.exit_code == 143
    assert str(stopped.value).endswith("progress is saved, continue with resume=True")
    with pytest.raises(UserError, match="exists and is not empty"):
        compare(config)
    result = compare(config, resume=True).details
    assert started == [f"sft-0.001-seed{seed}" for seed in (0, 1, 1, 2)]
    assert _without_time(result) == _without_time(whole)


def test_runs_that_are_added_take_nothing_from_the_result(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: dict[str, Any] = {"prior": None, "test": settings().data, "context": "turns"}
    first = settings(methods="sdft", seeds="0,1", **shared)
    folder = Path(first.output_dir)
    finished = compare(first).details
    real = module.train

    def stopped_in_sft(run: TrainConfig, **options: Any) -> Path:
        if run.method == "sft":
            raise RunStopped("stopped", 15)
        return real(run, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", stopped_in_sft)
        with pytest.raises(RunStopped):
            compare(settings(methods="sft,sdft", seeds="0,1", **shared), resume=True)
    kept = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert kept["moved"] == json.loads(json.dumps(finished["moved"]))
    assert kept["runs"] == json.loads(json.dumps(finished["runs"]))

    more = compare(continued({"output_dir": str(folder), "seeds": "3"}, CompareConfig), resume=True).details
    assert [(run["method"], run["seed"]) for run in more["runs"]] == [
        (method, seed) for seed in (0, 1, 3) for method in ("sdft", "sft")
    ]
    saved = load_yaml(folder / "config.yaml", CompareConfig)
    assert (saved["methods"], saved["seeds"]) == (["sdft", "sft"], [0, 1, 3])


def test_settings_that_change_no_number_may_change(settings: Callable[..., CompareConfig]) -> None:
    begun = settings(mixed_precision="bf16")
    folder = Path(begun.output_dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(begun), encoding="utf-8")
    others = {"judge_url": "http://localhost:1/v1", "teacher_cache_mib": 0}
    given = {"output_dir": begun.output_dir, "mixed_precision": "auto", **others}
    assert continued(given, CompareConfig) == begun.model_copy(update=others)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, {"learning_rates": "1e-3"}, "learning_rates was 'none' and is now (0.001,)"),
        ({}, {"vary": {"teacher": ["ema"]}}, "vary was {} and is now {'teacher': ['ema']}"),
        (
            {"vary": {"teacher": ["ema"]}},
            {"vary": {"ema_rate": [0.1]}},
            "vary was {'teacher': ['ema']} and is now {'ema_rate': [0.1]}",
        ),
        ({}, {"arms": {"a": {"method": "sft"}}}, "arms was {} and is now {'a': {'method': 'sft'}}"),
    ],
)
def test_runs_that_would_replace_those_of_a_comparison_are_refused(
    settings: Callable[..., CompareConfig], before: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    default: dict[str, Any] = {"learning_rates": ()}
    message = f"{said}; a resumed comparison keeps its runs: leave these out, or start a new run in another output_dir"
    with pytest.raises(UserError, match=re.escape(message)):
        with_runs_of(settings(**default | before), settings(**default | now), Path("config.yaml"))


def test_values_may_be_added_to_what_is_varied(settings: Callable[..., CompareConfig]) -> None:
    saved = settings(vary={"teacher": ["ema"]}, learning_rates="1e-3")
    added = with_runs_of(
        saved, settings(vary={"teacher": ["frozen", "ema"]}, learning_rates="1e-4"), Path("config.yaml")
    )
    assert (added.vary, added.learning_rates) == ({"teacher": ["ema", "frozen"]}, (1e-3, 1e-4))
    assert with_runs_of(saved, settings(), Path("config.yaml")) == saved


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_do_not_share_a_comparison(settings: Callable[..., CompareConfig], resume: bool) -> None:
    config = settings(methods="sft", seeds="0")
    folder = Path(config.output_dir)
    with folder_lock(folder, ""), pytest.raises(UserError, match="comparison': in use by another process; wait for"):
        compare(config, resume=resume)
    assert not list(folder.iterdir())
    with pytest.raises(UserError, match="batch_size"):
        compare(config.model_copy(update={"batch_size": 0}), resume=resume)
    with folder_lock(folder, "free"):
        pass


def _without_time(result: dict[str, Any]) -> Any:
    text = json.loads(json.dumps(result))
    for run in text["runs"]:
        for evaluation in run["evaluations"]:
            evaluation.pop("seconds")
    for row in text["table"]:
        row.pop("seconds")
    return text


def test_a_run_that_diverges_is_reported_and_not_tried_again(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, started = module.train, []

    def fails_once(config: TrainConfig, **options: Any) -> Path:
        started.append(Path(config.output_dir).name)
        if config.method == "sft" and config.seed == 0:

            def fail(step: int, _loaded: Any, _metrics: Any) -> None:
                if step == 1:
                    raise RunFailed("step 1: the loss is nan")

            options["on_step"] = fail
        return real(config, **options)

    monkeypatch.setattr(module, "train", fails_once)
    config = settings(methods="sft")
    result = compare(config).details
    assert [run["failed"] for run in result["runs"]] == ["step 1: the loss is nan", None]
    assert {(row["method"], row["seeds"]) for row in result["table"]} == {("sft", 1)}
    assert "the loss is nan" in capsys.readouterr().err
    compare(config, resume=True)
    assert len(started) == 2


def test_a_comparison_whose_runs_all_failed_has_a_report(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = module.train

    def fail(step: int, _loaded: Any, _metrics: Any) -> None:
        raise RunFailed(f"step {step}: the loss is nan")

    monkeypatch.setattr(module, "train", lambda run, **options: real(run, on_step=fail, **options))
    config = settings(methods="sft", seeds="0")
    assert compare(config).all_failed
    page = tmp_path / "report.html"
    report(ReportConfig(runs=[config.output_dir], output=str(page)))
    text = page.read_text(encoding="utf-8")
    assert "1 of 1 runs failed and are excluded: sft 0.001 seed 0." in text
    assert "No run here finished." in text


def test_names_of_arms_are_no_markup() -> None:
    names = ["sdft [ema]", "sdft [live]", "[/x]"]
    row = {"learning_rate": 1e-3, "steps": 2, "seeds": 1, "seconds": 60.0, "accuracy": (0.5, None, None)}
    details = {
        "data": "d.jsonl",
        "test": "t.jsonl",
        "base": {"items": 2, "accuracy": 0.5},
        "teacher": None,
        "rag": None,
        "table": [row | {"method": name, "prior_accuracy": None, "kl_base": None} for name in names],
        "sentence": "",
    }
    said = repr(CompareResult(Path("folder"), details))
    assert [name for name in names if f" {name} 0.001 " in said] == names


def test_the_teacher_has_its_number_of_items_where_it_is_another() -> None:
    shown = {"accuracy": 0.5, "interval": [0.1, 0.9], "kl": 0.1}
    details = {
        "data": "d.jsonl",
        "test": "t.jsonl",
        "base": {"items": 2, "accuracy": 0.5},
        "teacher": shown | {"items": 1},
        "rag": shown | {"items": 2},
        "table": [],
        "sentence": "",
    }
    said = repr(CompareResult(Path("folder"), details))
    assert " teacher, 1 item " in said
    assert " oracle RAG " in said


def test_folders_of_long_names_of_arms_are_cut(settings: Callable[..., CompareConfig]) -> None:
    first, second = ("\u043f\u0440\u0438" * 30 + str(number) for number in (1, 2))
    config = settings(arms={"short": {"method": "sft"}, first: {"method": "sft"}, second: {"method": "sdft"}})
    folders = [Path(run.output_dir).name for _, run in runs_of(config)]
    assert len(set(folders)) == 6
    assert max(len(folder.encode()) for folder in folders) <= 255
    assert "short-0.001-seed1" in folders


def test_an_engine_that_fails_ends_no_run_for_good(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, config = module.train, settings(methods="sft", seeds="0")

    def fail(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 2:
            raise EngineFailed("engine vllm: the server ended")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda run, **options: real(run, on_step=fail, **options))
        with pytest.raises(EngineFailed):
            compare(config)
    assert list(Path(config.output_dir).rglob("checkpoint-*"))  # the run can go on
    assert [run["failed"] for run in compare(config, resume=True).details["runs"]] == [None]


def test_settings_of_a_comparison() -> None:
    base = {"model": "m", "data": "d", "test": "t", "output_dir": "o"}
    config = CompareConfig(**base, methods="sdft", seeds="3,1", learning_rates="1e-5,2e-5")
    assert (config.methods, config.seeds, config.learning_rates) == (("sdft",), (3, 1), (1e-5, 2e-5))
    for wrong, message in (
        ({"methods": "sft,sgd"}, r"setting 'methods': found 'sgd', expected: sdft, sft, dft, cpt"),
        ({"seeds": "0,0"}, r"setting 'seeds': found \(0, 0\), expected each value once"),
        ({"seeds": "-1"}, r"setting 'seeds': found '-1'"),
        ({"learning_rates": "fast"}, r"setting 'learning_rates': found 'fast'"),
    ):
        with pytest.raises(UserError, match=message):
            CompareConfig(**base, **wrong)


def test_a_signal_in_the_last_step_of_a_run_stops_before_the_next(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = module.train, []

    def signalled(config: TrainConfig, **options: Any) -> Path:
        started.append(config.method)

        def terminate(step: int, _loaded: Any, _metrics: Any) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return real(config, **options, on_step=terminate)

    monkeypatch.setattr(module, "train", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped) as stopped:
        compare(settings(methods="sft", seeds="0,1"))
    assert stopped.value.exit_code == 143
    assert started == ["sft"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_signal_before_the_first_step_of_the_last_run_stops_it(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = module.train, []

    def signalled(config: TrainConfig, **options: Any) -> Path:
        started.append(config.output_dir)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, **options)

    monkeypatch.setattr(module, "train", signalled)
    config = settings(methods="sft", seeds="0,1")
    with pytest.raises(RunStopped, match=r"stopped in run 2 of 2 \(sft-.*; progress is saved, continue") as stopped:
        compare(config)
    assert stopped.value.exit_code == 143
    assert not (Path(started[1]) / "final").exists()
    monkeypatch.undo()
    assert len(compare(config, resume=True).details["runs"]) == 2


def test_a_comparison_goes_on_only_with_what_it_began_with(
    settings: Callable[..., CompareConfig], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings(methods="sft", seeds="0")
    shutil.copytree(config.model, tmp_path / "own")  # other tests use the same model
    config = config.model_copy(update={"model": str(tmp_path / "own")})
    compare(config)
    with pytest.raises(UserError, match="batch_size was 2 and is now 3"):
        compare(config.model_copy(update={"batch_size": 3}), resume=True)
    for steps in (1, 9):
        with pytest.raises(UserError, match=rf"max_steps was \d and is now {steps}; a resumed run keeps its settings"):
            compare(config.model_copy(update={"max_steps": steps}), resume=True)
    before = {file: file.read_bytes() for file in (Path(config.data), Path(config.test))}
    changed = {
        Path(config.data): "changed since this comparison began: the demonstrations; restore model, data, test, prior",
        Path(config.test): "changed since this comparison began: the test rows or prior questions; restore",
    }
    for file, message in changed.items():
        write_rows([{"prompt": f"other {i}", "completion": "b", "answer": "never"} for i in range(4)], name=file.name)
        with pytest.raises(UserError, match=message):
            compare(config, resume=True)
        file.write_bytes(before[file])
    network = Path(config.model) / "config.json"
    text = network.read_text(encoding="utf-8")
    network.write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 1e-3}), encoding="utf-8")
    with pytest.raises(UserError, match=r"changed since this comparison began: config\.json of the base; restore"):
        compare(config, resume=True)
    network.write_text(text, encoding="utf-8")
    weights = Path(config.model) / "model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="changed since this comparison began: the base; restore"):
        compare(config, resume=True)


def test_a_comparison_goes_on_only_with_the_rows_that_a_method_replays(
    settings: Callable[..., CompareConfig], write_rows: Callable[..., Path]
) -> None:
    files = {name: write_rows([{"prompt": name, "completion": "cd"}], name=f"{name}.jsonl") for name in ("old", "more")}

    def replaying(config: TrainConfig, name: str) -> Method:
        (task,) = sft(config)
        old = replace(task, examples=OtherRows(config, str(files[name]), task.examples))
        return replace(task, beside=(Part("replay", old, 0.5),))

    def old(config: TrainConfig) -> Method:
        return replaying(config, "old")

    def more(config: TrainConfig) -> Method:
        return replaying(config, "more")

    compare(settings(methods=[old], seeds="0", max_steps=1))
    both = settings(methods=[old, more], seeds="0", max_steps=1)
    assert len(compare(both, resume=True).details["runs"]) == 2  # of other rows
    write_rows([{"prompt": "new", "completion": "cd"}], name="old.jsonl")
    with pytest.raises(UserError, match=rf"changed since this comparison began: the rows of {files['old']}; restore"):
        compare(both, resume=True)


def test_a_comparison_keeps_the_precision_that_its_first_machine_chose(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = settings(methods="sft", seeds="0,1", mixed_precision="auto", prior=None), module.train

    def stop(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 1:
            raise RunStopped("stopped", 15)

    monkeypatch.setattr("selfdistill.model.precision.bfloat16_is_fast", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda run, **options: real(run, **options | {"on_step": stop}))
        with pytest.raises(RunStopped):
            compare(config)
    monkeypatch.setattr("selfdistill.model.precision.bfloat16_is_fast", lambda: False)  # another machine
    assert [run["failed"] for run in compare(config, resume=True).details["runs"]] == [None, None]
    written = (yaml.safe_load(file.read_text()) for file in Path(config.output_dir).rglob("config.yaml"))
    assert {found["mixed_precision"] for found in written} == {"bf16"}


@pytest.mark.parametrize("writes", [0, 1])
def test_a_comparison_killed_at_its_start_goes_on(
    settings: Callable[..., CompareConfig], monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    real, left = module.write_atomically, [None] * writes

    def killed(file: Path, text: str) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        real(file, text)

    config = settings(methods="sft", seeds="0")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    given = config.model_dump(exclude_unset=True)
    assert len(compare(continued(given, CompareConfig), resume=True).details["runs"]) == 1


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_comparison_goes_on_after_its_files_have_moved(
    settings: Callable[..., CompareConfig], tmp_path: Path, lora_rank: int
) -> None:
    base = str(shutil.copytree(settings().model, tmp_path / "base"))  # other tests use the same model
    (tmp_path / "anchors.txt").write_text("Hello\nHow are you?\n", encoding="utf-8")
    given: dict[str, Any] = {"model": base, "anchors": str(tmp_path / "anchors.txt"), "lora_rank": lora_rank}
    config = settings(methods="sft", seeds="0", batch_size=4, **given)
    compare(config)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = ("model", "data", "test", "prior")
    moved: dict[str, Any] = {name: str(elsewhere / Path(getattr(config, name)).name) for name in names}
    for name in names:
        shutil.move(getattr(config, name), moved[name])
    moved["anchors"] = (str(shutil.move(config.anchors[0], elsewhere / "anchors.txt")),)
    more = continued({"output_dir": config.output_dir, "seeds": "1", **moved}, CompareConfig)
    assert [run["seed"] for run in compare(more, resume=True).details["runs"]] == [0, 1]
    (elsewhere / "anchors.txt").write_text("Hello\nGoodbye\n", encoding="utf-8")
    with pytest.raises(UserError, match="changed since this comparison began: the anchors; restore"):
        compare(more, resume=True)


def test_a_comparison_goes_on_where_the_base_of_its_adapter_has_moved(
    settings: Callable[..., CompareConfig], tmp_path: Path
) -> None:
    base = shutil.copytree(settings().model, tmp_path / "base")
    own: dict[str, Any] = {"model": str(base), "data": settings().data, "lora_rank": 2, "max_completion_length": 10}
    train(TrainConfig(**own, output_dir=str(tmp_path / "adapter"), method="sft", max_steps=1, view_rows=0))
    config = settings(methods="sft", seeds="0", prior=None, model=str(tmp_path / "adapter" / "final"))
    compare(config)
    moved = {"seeds": "1", "adapter_base": str(shutil.move(base, tmp_path / "moved"))}
    more = continued({"output_dir": config.output_dir, **moved}, CompareConfig)
    assert [run["seed"] for run in compare(more, resume=True).details["runs"]] == [0, 1]


@pytest.mark.parametrize(("what", "lost"), [("the base", "model"), ("the anchors", "anchors")])
def test_what_an_earlier_release_kept_no_fingerprint_of_must_stay_in_its_place(
    settings: Callable[..., CompareConfig], tmp_path: Path, what: str, lost: str
) -> None:
    for name in ("anchors", "others"):
        (tmp_path / f"{name}.txt").write_text(f"What of {name}?\n", encoding="utf-8")
    config = settings(methods="sft", seeds="0", anchors=str(tmp_path / "anchors.txt"), batch_size=4)
    compare(config)
    file = Path(config.output_dir) / "began.json"
    began = json.loads(file.read_text(encoding="utf-8")) | {what: ""}
    file.write_text(json.dumps(began), encoding="utf-8")
    compare(config, resume=True)
    file.write_text(json.dumps(began), encoding="utf-8")
    other = {
        "model": str(shutil.copytree(config.model, tmp_path / "other")),
        "anchors": (str(tmp_path / "others.txt"),),
    }[lost]
    with pytest.raises(UserError, match=f"changed since this comparison began: {what}; restore"):
        compare(config.model_copy(update={lost: other}), resume=True)


def test_a_context_that_is_still_to_be_found_is_not_varied(settings: Callable[..., CompareConfig]) -> None:
    with pytest.raises(UserError, match="context 'auto' means the best one; name the contexts to compare"):
        compare(settings(vary={"context": ["auto", "turns"]}))


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ({"anchor_share": [0.25, 0.5]}, "'anchor_share' has no effect without anchors; set anchors, too"),
        ({"teacher": ["ema", "frozen"]}, "no method here uses 'teacher' \\(sft\\); vary another"),
    ],
)
def test_a_varied_setting_that_no_run_uses_is_refused(
    settings: Callable[..., CompareConfig], vary: dict[str, list[Any]], says: str
) -> None:
    config = settings(methods="sft", seeds="0", vary=vary)
    with pytest.raises(UserError, match=f"setting 'vary': {says}"):
        compare(config)
    assert not Path(config.output_dir).exists()


def test_a_varied_budget_is_said(settings: Callable[..., CompareConfig]) -> None:
    result = compare(settings(methods="sft", seeds="0", vary={"num_demonstrations": [2, 4]})).details
    assert result["budget"].endswith(" of the same demonstrations, except for num_demonstrations, which is varied.")
    assert len(result["runs"]) == 2


def test_a_budget_with_anchors_is_said(settings: Callable[..., CompareConfig], tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("Who?\nWhy?\n", encoding="utf-8")
    varied = ["none", str(tmp_path / "lines.txt")]
    result = compare(settings(methods="sft", seeds="0", vary={"anchors": varied})).details
    assert result["budget"] == "Every run has 2 steps of 2 prompts of the same demonstrations, anchors:lines included."
    assert len(result["runs"]) == 2


def test_a_batch_too_small_for_one_of_the_runs_is_told_before_any_begins(
    settings: Callable[..., CompareConfig],
) -> None:
    config = settings(methods="sft", batch_size=1, vary={"anchors": ["none", "package"]})
    with pytest.raises(UserError, match="'batch_size': 1 is too small for 2 parts of a step"):
        compare(config)
    assert not Path(config.output_dir).exists()


def test_a_misspelt_test_leaves_no_folder_behind(settings: Callable[..., CompareConfig]) -> None:
    config = settings(test="no/such.jsonl")
    with pytest.raises(UserError, match=r"no/such\.jsonl"):
        compare(config)
    assert not Path(config.output_dir).exists()


def test_what_a_method_lacks_is_told_before_anything_is_measured(
    settings: Callable[..., CompareConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(methods="sft,cpt")
    with pytest.raises(UserError, match=r"method 'cpt' learns from documents, and .* has none; add the column"):
        compare(config)
    assert "new task" not in capsys.readouterr().err
    assert not Path(config.output_dir).exists()


def test_rows_that_one_method_has_no_room_for_are_left_out_for_all(
    settings: Callable[..., CompareConfig], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{i}" * (150 if i == 2 else 1), "completion": "ab"} for i in range(5)]
    data = write_rows(rows, name="long.jsonl")
    config = settings(data=str(data), seeds="0", on_long_prompt="drop", max_steps=None, num_train_epochs=1)
    result = compare(config).details
    assert "dropped 1 of 5 rows for all methods: too long for at least one" in capsys.readouterr().err
    assert result["budget"] == "Every run has 2 steps of 2 prompts of the same demonstrations."
    assert {run["evaluations"][-1]["step"] for run in result["runs"]} == {2}


def test_rows_that_a_separate_teacher_has_no_room_for_are_told_or_left_out_before_any_run(
    settings: Callable[..., CompareConfig],
    write_rows: Callable[..., Path],
    model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"prompt": f"q{i}" * (60 if i == 2 else 1), "completion": "ab"} for i in range(5)]
    given = {"data": str(write_rows(rows, name="long.jsonl")), "seeds": "0"}
    given["teacher_model"] = str(model_folder(ends=ENDS, layers=1, seed=1, room=100))
    config = settings(**given)
    with pytest.raises(UserError, match=r"1 of 5 rows do not fit: .* limit 90; "):
        compare(config)
    assert "new task" not in capsys.readouterr().err
    assert not Path(config.output_dir).exists()
    compare(settings(**given, on_long_prompt="drop", max_steps=1))
    told = capsys.readouterr().err
    assert "dropped 1 of 5 rows for all methods: too long for at least one" in told
    assert "1 too long, dropped" not in told


@pytest.mark.parametrize("methods", ["sdft,sft", "grpo,sft"])
def test_rows_of_several_replies_are_those_that_train_would_get(
    settings: Callable[..., CompareConfig],
    write_rows: Callable[..., Path],
    methods: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replies = [{"role": "assistant", "content": "ab"}, {"role": "user", "content": "and?"}]
    replies += [{"role": "assistant", "content": "cd"}]
    rows = [{"prompt": f"q{i}", "completion": replies, "answer": "cd"} for i in range(4)]
    config = settings(data=str(write_rows(rows)), methods=methods, seeds="0", max_steps=1)
    given, real = [], module.train

    def recorded(run: TrainConfig, **options: Any) -> Path:
        given.append(options["demonstrations"])
        return real(run, **options)

    monkeypatch.setattr(module, "train", recorded)
    compare(config)
    assert given == [load_demonstrations(config.data)] * 2


def test_an_added_run_that_drops_further_rows_is_refused_with_that_reason(
    settings: Callable[..., CompareConfig], write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"q{i}" * (120 if i == 2 else 1), "completion": "ab"} for i in range(5)]
    given = {"data": str(write_rows(rows, name="long.jsonl")), "seeds": "0", "on_long_prompt": "drop"}
    compare(settings(**given, methods="sft"))
    with pytest.raises(UserError, match=r"demonstrations; .*, leave out added runs that drop further rows, or"):
        compare(settings(**given, methods="sft,sdft"), resume=True)


@pytest.mark.parametrize(
    ("values", "read"),
    [({"method_settings": {"pull": 0.1}}, "method_settings"), ({"teacher_model": "other"}, "teacher_model")],
)
def test_a_run_has_the_settings_that_its_method_reads(
    settings: Callable[..., CompareConfig], values: dict[str, Any], read: str
) -> None:
    config = settings(methods="sft,isdft", **values)
    without, with_it = [first_run(config, kind) for kind in kinds_of(config)]
    assert getattr(without, read) == TrainConfig.model_fields[read].get_default(call_default_factory=True)
    assert getattr(with_it, read) == values[read]


def test_a_comparison_that_evaluates_five_times_may_stop_on_collapse(settings: Callable[..., CompareConfig]) -> None:
    result = compare(settings(methods="sft", seeds="0", eval_steps=0, stop_on_collapse=True)).details
    assert [line["step"] for line in result["runs"][0]["evaluations"]] == [0, 1, 2]


@pytest.mark.slow
def test_the_command_goes_on_from_its_folder_alone_and_seeds_may_be_added(
    settings: Callable[..., CompareConfig],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(methods="sft", seeds="0")
    compare(config)
    real, started = module.train, []

    def counted(run: TrainConfig, **options: Any) -> Path:
        started.append(Path(run.output_dir).name)
        return real(run, **options)

    monkeypatch.setattr(module, "train", counted)
    again = ["compare", "--resume", "--output_dir", config.output_dir]
    assert main(again) == 0
    assert started == []
    assert main([*again, "--seeds", "0,3", "--json", str(tmp_path / "result.json")]) == 0
    assert started == ["sft-0.001-seed3"]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert len(result["runs"]) == 2
    assert {row["seeds"] for row in result["table"]} == {2}
    capsys.readouterr()
    assert main([*again, "--batch_size", "3"]) == 2
    assert "batch_size was 2 and is now 3" in capsys.readouterr().err
