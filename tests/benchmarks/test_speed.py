"""The measurements of speed, with a tiny model: they run, and fail on wrong results; their times mean nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "last"),
    [
        ("step.py", ["--teacher", "ema", "--mixed_precision", "no", "--max_completion_length", "110"], "SDFT / SFT: "),
        ("busy.py", ["--threads", "1", "--tokens", "110"], "| kept | update | "),
    ],
)
def test_a_measurement_runs(
    model_folder: Callable[..., Path], script: str, options: list[str], last: str, tmp_path: Path
) -> None:
    tiny = ["--model", str(model_folder(room=2048)), "--batch_size", "4", "--steps", "1"]
    command = [sys.executable, str(FOLDER / script), *tiny, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith(last)


@pytest.mark.parametrize("factor", [1.0, 1.001, float("nan")])
def test_wrong_gradients_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    script = import_module("fused_loss")
    right = script.chunked_loss

    def scaled(*arguments: Any) -> tuple[Any, Any]:
        value, metrics = right(*arguments)
        return factor * value, metrics

    monkeypatch.setattr(script, "TOKENS", 8)
    monkeypatch.setattr(script, "chunked_loss", scaled)
    if factor == 1:
        script.compare(64, 8, parts=2, repeats=1)
    else:
        with pytest.raises(SystemExit, match="error: gradients differ by more than 0"):
            script.compare(64, 8, parts=2, repeats=1)
    assert "relative error of gradients" in capsys.readouterr().out


@pytest.mark.parametrize("same", [True, False])
def test_wrong_tokens_fail(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], same: bool
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    script = import_module("rollouts")
    right = script.sample

    def sampled(*arguments: Any) -> list[Any]:
        rollouts = right(*arguments)
        if not same:
            rollouts[3].ids[-1] += 1
        return rollouts

    monkeypatch.setattr(sys, "argv", ["rollouts.py", "--tokens", "2"])
    monkeypatch.setattr(script, "load_model", lambda name: load())
    monkeypatch.setattr(script, "sample", sampled)
    if same:
        script.main()
    else:
        with pytest.raises(SystemExit, match="error: the tokens are not those of generate"):
            script.main()
    assert capsys.readouterr().out.endswith(f"same tokens: {same}\n")
