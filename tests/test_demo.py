"""The demo, on a tiny model: everything but its numbers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfdistill import demo as module
from selfdistill.cli import main
from selfdistill.config.train import TrainConfig
from selfdistill.data.sources import packaged
from selfdistill.evaluation.evaluator import Evaluator
from selfdistill.runtime.tracking import read_lines

ARMS = {
    "SFT": "sft",
    "SDFT": "sdft",
    "SFT + anchors": "sft-anchors",
    "SDFT + anchors": "sdft-anchors",
}


@pytest.fixture
def tiny_demo(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo on a tiny model, two steps an arm, in an empty folder, which is returned."""
    monkeypatch.chdir(tmp_path)
    ends = (257, *range(40, 75))
    own = {"model": str(model_folder(room=8192, ends=ends, layers=1)), "max_steps": 2, "batch_size": 4}
    large = {arm: own_of_arm | {"learning_rate": 1e-2} for arm, own_of_arm in module.ARMS.items()}
    monkeypatch.setattr(module, "ARMS", large)
    monkeypatch.setattr(module, "SHARED", module.SHARED | own | {"mixed_precision": "no"})
    monkeypatch.setattr(module, "PRIOR_OF_A_KIND", 2)
    return tmp_path


def test_the_demo_runs_prints_and_keeps_its_folder(tiny_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", "3", "--json", "result.json"]) == 0
    output = capsys.readouterr().out
    result = json.loads(Path("result.json").read_text())
    assert result == json.loads(Path("runs/demo/demo.json").read_text())
    assert result["base"]["kl"] == pytest.approx(0, abs=1e-6)
    assert list(result["arms"]) == list(ARMS)
    for arm, run in ARMS.items():
        folder, point = Path("runs/demo") / run, result["arms"][arm]
        first, last = read_lines(folder / "evaluations.jsonl")
        assert first["kl_base"] == pytest.approx(0, abs=1e-6)  # every arm starts from the base
        assert (point["new"], point["prior"], point["kl"]) == (
            last["accuracy"],
            last["prior_accuracy"],
            last["kl_base"],
        )
        assert point["kl"] > 1e-3
        config = TrainConfig(**json.loads(json.dumps(result["settings"][arm])))
        assert (config.method, bool(config.anchors), config.seed) == (run.split("-")[0], "anchors" in run, 3)
        assert (folder / "final/model.safetensors").is_file()
        assert arm in output
    assert len({json.dumps(point) for point in result["arms"].values()}) == 4
    for words in (
        "teacher: base + answer",
        "KL(base||model)",
        "minutes",
        "prior: share answered correctly of 12 other questions",
    ):
        assert words in output
    assert [output.count(f"\n{sort}: ") for sort in ("New", "Everyday")] == [3, 3]
    assert [output.count(f"\n  {name}: ") for name in ("base", "SDFT + anchors", "SFT")] == [6, 6, 3]
    assert output.endswith("A report with figures: runs/demo/report.html\n")
    page = Path("runs/demo/report.html").read_text()
    assert "Plot of new-task score" in page
    assert all(f"{name}: from " in page for name in ARMS.values())
    assert main(["demo", "--output_dir", "runs/demo"]) == 2
    assert capsys.readouterr().err.endswith("output_dir 'runs/demo' exists and is not empty: choose another\n")


def test_nothing_is_learnt_from_what_is_measured() -> None:
    names = [Path(module.SHARED[part]).name for part in ("data", "test")]
    assert names == ["routing.train.jsonl", "routing.test.jsonl"]
    assert packaged("prior/test") == module.PRIOR
    assert list(module.ARMS) == list(ARMS)


@pytest.mark.parametrize(
    "moment", [*(pytest.param(at, marks=pytest.mark.slow) for at in ("step", "last step")), "evaluation"]
)
def test_a_stopped_demo_says_what_to_do_and_lies_beside_an_earlier_one(
    tiny_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    Path("runs/demo").mkdir(parents=True)  # an earlier demo, beside which this one goes
    train, measure = module.train, Evaluator.measure

    def train_interrupted(config: TrainConfig, **given: Any) -> Path:
        def on_step(step: int, *_: Any) -> None:
            if step == {"step": 1, "last step": 2}.get(moment):
                os.kill(os.getpid(), signal.SIGINT)

        return train(config, **given, on_step=on_step)

    def measure_interrupted(evaluator: Evaluator, loaded: Any, who: str) -> Any:
        if hasattr(evaluator, "base") and moment == "evaluation":
            os.kill(os.getpid(), signal.SIGINT)
        return measure(evaluator, loaded, who)

    monkeypatch.setattr(module, "train", train_interrupted)
    monkeypatch.setattr(Evaluator, "measure", measure_interrupted)
    assert main(["demo"]) == 130
    said = "runs/demo-2: stopped before the results; the demo cannot resume, so start it again: selfdistill demo\n"
    assert capsys.readouterr().err.endswith(said)
    assert [file.name for file in Path("runs/demo-2").iterdir() if file.is_dir() and file.name != "prior"] == ["sft"]
    assert not Path("runs/demo-2/demo.json").exists()
