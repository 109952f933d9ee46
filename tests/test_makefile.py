"""The Makefile, with programs that only write down how they were called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
# Says that it is of VERSION; what is not asked of it itself is written down, and fails.
[ "$1" = -c ] && exec REAL -c "import sys; sys.modules['pip'] = sys; sys.version_info = VERSION
$2"
echo "$@" >>calls
exit 1
"""


@pytest.mark.parametrize("target", ["demo", "gpu-pack", "docs"])
@pytest.mark.parametrize(("version", "made_anew"), [("(3, 9, 6)", True), ("(3, 10, 1)", False)])
def test_a_venv_of_too_old_a_python_is_made_anew(tmp_path: Path, target: str, version: str, made_anew: bool) -> None:
    if shutil.which("make") is None:
        pytest.skip("NOT TESTED: make is not installed")
    venv = ".venv-docs" if target == "docs" else ".venv"
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for python in (tmp_path / venv / "bin" / "python", tmp_path / "new"):
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(PYTHON.replace("REAL", sys.executable).replace("VERSION", version))
        python.chmod(0o755)
    done = subprocess.run(
        ["make", target, "PYTHON=./new", "UV="], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith(f"-m venv --clear {venv}" if made_anew else "-m pip install")
