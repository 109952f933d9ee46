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
from selfdistill.demo import Point, as_accurate


def point(step: int, new: float) -> Point:
    return Point("sft", step, new, 0.0, 0.0, 0.0, 0.0)


def test_sft_is_compared_where_it_first_knows_as_much_or_at_its_best() -> None:
    along = [point(10, 0.2), point(20, 0.7), point(30, 0.9), point(40, 0.8)]
    assert as_accurate(along, point(60, 0.7)).step == 20
    assert as_accurate(along, point(60, 0.8)).step == 30
    assert as_accurate(along, point(60, 1.0)).step == 30


@pytest.fixture
def tiny_demo(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo on a tiny model, two steps of SDFT, in an empty folder, which is returned."""
    monkeypatch.chdir(tmp_path)
    # The documents of the demo are longer in bytes than a tiny model's window.
    monkeypatch.setattr(module, "CONTEXT", "turns:repeats=1")
    monkeypatch.setattr(
        module, "SHARED", module.SHARED | {"model": str(model_folder()), "batch_size": 4, "max_completion_length": 100}
    )
    monkeypatch.setattr(module, "SDFT", module.SDFT | {"max_steps": 2, "context": "turns:repeats=1"})
    return tmp_path


def test_the_demo_runs_prints_and_keeps_its_folder(
    tiny_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SFT", module.SFT | {"max_steps": 2})
    monkeypatch.setattr(module, "SDFT_EVALUATIONS", (1, 2))
    monkeypatch.setattr(module, "SFT_EVALUATIONS", (2,))
    assert main(["demo", "--seed", "3", "--json", "result.json"]) == 0
    output = capsys.readouterr().out
    result = json.loads(Path("result.json").read_text())
    assert result == json.loads(Path("runs/demo/demo.json").read_text())
    assert [p["step"] for p in result["sdft"]] == [1, 2]
    assert [p["step"] for p in result["sft"]] == [2]
    assert result["base"]["kl"] == pytest.approx(0, abs=1e-6)
    assert result["sdft"][-1]["kl"] > 0
    for words in ("teacher: base", "SDFT, 2 steps", "SFT, 2 steps", "KL(base||model)", "minutes"):
        assert words in output
    assert output.count("before: ") == output.count("after:  ") == 3
    assert (tiny_demo / "runs/demo/sdft/final/model.safetensors").is_file()
    assert main(["demo", "--output_dir", "runs/demo"]) == 2
    assert capsys.readouterr().err.endswith("output_dir 'runs/demo' exists and is not empty: choose another\n")


def test_a_stopped_demo_does_not_promise_to_go_on_and_lies_beside_an_earlier_one(
    tiny_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SDFT_EVALUATIONS", (1,))
    Path("runs/demo").mkdir(parents=True)  # an earlier demo, beside which this one goes
    measure = module.Panel.measure

    def interrupted(panel: module.Panel, name: str, loaded: Any, step: int = 0, seconds: float = 0.0) -> Point:
        if name == "sdft":
            os.kill(os.getpid(), signal.SIGINT)
            return point(step, 0.0)
        return measure(panel, name, loaded, step, seconds)

    monkeypatch.setattr(module.Panel, "measure", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err.endswith("runs/demo-2: stopped; the demo cannot be resumed, start it again\n")
