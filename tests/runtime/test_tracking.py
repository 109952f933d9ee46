"""Trackers: what is in metrics.jsonl reaches them, a run that goes on continues there, and off means off."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfdistill.cli import main
from selfdistill.config.train import TrainConfig
from selfdistill.errors import RunStopped, UserError
from selfdistill.runtime.tracking import StepsFile, Tracker, public_name, public_settings, read_lines
from selfdistill.training.train import train

SCALARS = (bool, int, float, str, type(None))


@pytest.fixture
def settings(settings: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """Four steps of SFT into ``run``."""
    return partial(settings, method="sft", max_steps=4)


def written(run: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl as (step, value) by metric."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        step = metrics.pop("step")
        for key, value in metrics.items():
            found.setdefault(key, []).append((step, pytest.approx(value, rel=1e-6)))  # tensorboard keeps float32
    return found


def in_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def test_tensorboard_has_every_metric_of_every_step(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings(report_to="tensorboard", chat_template_kwargs={"hint": ""}, drift_steps=2))
    run = tmp_path / "run"
    found = in_tensorboard(run)
    assert {"loss", "grad_norm", "drift/student", "time/step_s"} <= found.keys()
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert found == written(run)
    (hparams,) = (run / "tensorboard").glob("*/hparams.yml")
    text = hparams.read_text()
    assert "batch_size: 2" in text
    assert str(tmp_path) not in text


def test_scores_on_the_test_reach_the_tracker(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings(report_to="tensorboard", test=str(write_rows(name="test.jsonl")), eval_steps=2)
    train(config)
    evaluations = read_lines(tmp_path / "run" / "evaluations.jsonl")
    found = in_tensorboard(tmp_path / "run")
    for key in ("accuracy", "kl_base"):
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in evaluations]
        assert found[f"eval/{key}"] == expected
    assert [line["step"] for line in evaluations] == [0, 2, 4]


def test_a_run_that_goes_on_continues_in_tensorboard(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = settings(report_to="tensorboard", save_steps=2)

    def stop_hard(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3:  # after the checkpoint of step 2: step 3 is computed and reported twice
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stop_hard)
    assert [step for step, _ in in_tensorboard(run)["loss"]] == [1, 2, 3]
    train(config, resume=True)
    assert in_tensorboard(run) == written(run)
    assert [step for step, _ in written(run)["loss"]] == [1, 2, 3, 4]


def test_the_tracker_is_closed_when_a_signal_stops(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    def stop(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunStopped):
        train(settings(report_to="tensorboard"), on_step=stop)
    assert in_tensorboard(tmp_path / "run") == written(tmp_path / "run")
    train(settings(report_to="none"), resume=True)  # it may change
    assert [step for step, _ in in_tensorboard(tmp_path / "run")["loss"]] == [1, 2]


def test_off_writes_nothing_and_imports_nothing(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    config = settings(max_steps=1)
    assert config.report_to == "none"
    train(config)
    assert not {"tensorboard", "tracker_id", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_said_before_anything_is_done(
    settings: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    others = [tracker for tracker in get_available_trackers() if str(tracker) != name]
    monkeypatch.setattr("accelerate.tracking._available_trackers", others)
    monkeypatch.setattr("selfdistill.training.trainer.load_model", None)
    message = f"setting 'report_to': {name} is not installed: pip install {name}, or leave report_to out"
    config = settings(report_to=name)
    with pytest.raises(UserError) as caught:
        train(config)
    assert str(caught.value) == message
    options = f"--model {config.model} --data {config.data} --output_dir {config.output_dir} --report_to {name}"
    assert main(["train", *options.split()]) == 2  # with context auto: before the check, too
    assert capsys.readouterr().err == f"selfdistill: error: {message}\n"
    assert not (tmp_path / "run").exists()


class Recorder:
    """An accelerator that notes what it is told."""

    def __init__(self, name: str) -> None:
        self.log_with = [name]
        self.started: list[Any] = []
        self.logged: list[Any] = []
        self.ended = 0
        self.trackers = [self]

    def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        self.started.append((project, config, init_kwargs[self.log_with[0]]))

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_the_others_are_told(settings: Callable[..., TrainConfig], tmp_path: Path, name: str) -> None:
    config = settings(report_to=name)
    tmp_path.joinpath("run").mkdir()

    def told(start: int) -> dict[str, Any]:
        recorder = Recorder(name)
        with Tracker(recorder, config, tmp_path / "run", start) as tracker:
            tracker.write({"step": start + 1, "loss": 0.5})
        assert recorder.logged == [(start + 1, {"loss": 0.5})]
        assert recorder.ended == 1
        ((project, values, options),) = recorder.started
        assert project == "selfdistill"
        assert values == public_settings(config)
        return options

    first, continued, anew = told(0), told(2), told(0)
    assert first == continued  # the same run there
    assert first["name"] != anew["name"]  # another run in a folder that was emptied
    assert first["name"].startswith("run-")
    assert first["resume"] == "allow"
    assert first.get("dir") == (str(tmp_path / "run") if name == "wandb" else None)


def test_wandb_collects_nothing_by_itself(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real accelerate and a module in wandb's place."""
    started: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    config = SimpleNamespace(update=lambda *_, **__: None)
    fake = SimpleNamespace(init=lambda **options: started.append(options) or run, config=config)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    train(settings(report_to="wandb", max_steps=1))
    (options,) = started
    assert options["settings"] == {
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "program": "selfdistill",
        "x_disable_machine_info": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
    }
    assert str(tmp_path) not in repr({key: value for key, value in options.items() if key != "dir"})


def test_a_tracker_that_does_not_start_is_one_line(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    class Refusing(Recorder):
        def init_trackers(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no API key\nconfigured")

    with pytest.raises(UserError) as caught:
        Tracker(Refusing("wandb"), settings(), tmp_path, 0)
    message = "report_to 'wandb': cannot start (no API key configured); fix that or leave it out"
    assert str(caught.value) == message


def test_a_tracker_that_fails_later_ends_no_run(
    settings: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(Recorder):
        def log(self, values: dict[str, float], step: int) -> None:
            super().log(values, step)
            if step == 2:
                raise ConnectionError("no route\nto host")

        def finish(self) -> None:
            super().finish()
            raise RuntimeError("not sent")

    recorder = Failing("wandb")
    (tmp_path / "run").mkdir()
    with Tracker(recorder, settings(), tmp_path / "run", 0) as tracker:
        for step in (1, 2, 3):
            tracker.write({"step": step, "loss": 0.5})
    assert [step for step, _ in recorder.logged] == [1, 2]
    assert recorder.ended == 1
    said = "note: report_to 'wandb' failed (no route to host); metrics.jsonl has all metrics\n"
    assert capsys.readouterr().err == said
    with Tracker(Failing("wandb"), settings(), tmp_path / "run", 0):
        pass
    assert capsys.readouterr().err == said.replace("no route to host", "not sent")


def test_a_model_is_written_though_the_tracker_fails(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", fail)
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.finish", fail)
    assert (train(settings(report_to="tensorboard")) / "model.safetensors").exists()


def test_public_settings_hold_no_folder_and_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text("")
    config = TrainConfig(
        model="org/base",
        data="data/mine.jsonl",
        output_dir=str(tmp_path / "run"),
        context=f"template:file={tmp_path}/template.txt",
        judge_url="http://10.0.0.1:8000/v1",
        chat_template_kwargs={"enable_thinking": False},
        method_settings={"later": [f"{tmp_path}/acme/b", "https://acme.example/c"], "url": "http://10.0.0.2"},
        anchors=("package", f"{tmp_path}/data/mine.jsonl", f"{tmp_path}/k=1.txt", f"{tmp_path}/a=b/lines.txt"),
    )
    found = public_settings(config)
    assert found["anchors"] == '["package", "mine.jsonl", "k=1.txt", "lines.txt"]'
    assert (found["model"], found["data"], found["output_dir"]) == ("org/base", "mine.jsonl", "run")
    assert found["context"] == "template:file=template.txt"
    assert found["chat_template_kwargs"] == '{"enable_thinking": false}'
    assert found["method_settings"] == '{"later": ["b"]}'
    assert "judge_url" not in found
    assert str(tmp_path) not in repr(found)
    assert all(isinstance(value, SCALARS) for value in found.values())


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model", "org/model"),
        ("smollm2-135m", "smollm2-135m"),
        ("/home/me/org/model", "model"),
        ("~/models/tiny/", "tiny"),
        ("../tiny", "tiny"),
        ("runs/skill/final", "skill"),
        ("state/skills/0002-skill/model", "0002-skill"),
        ("data/model", "data/model"),
        ("data/tickets.jsonl", "tickets.jsonl"),  # which need not be there
        ("data/tickets.csv.gz", "tickets.csv.gz"),
        ("./model", "model"),
        ("a\nb.jsonl", "a b.jsonl"),
        ("bad\udcff.jsonl", "bad?.jsonl"),
    ],
)
def test_public_name(name: str, public: str) -> None:
    assert public_name(name) == public


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "views.jsonl"
    with StepsFile(path, -1) as file:
        for step in (0, 0, 4):
            file.write({"step": step, "text": "one\u2028two\u0085three\r"})
    with StepsFile(path, 3) as file:
        assert file.steps == {0}
        file.write({"step": 4, "text": "again"})
    steps = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert steps == [0, 0, 4]
