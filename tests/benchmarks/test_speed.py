"""The measurements of a step, with a tiny model: they run; their times mean nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
