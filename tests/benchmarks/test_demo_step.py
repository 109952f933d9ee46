"""A step of the demo in two checkouts, here the same one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("demo_step")


@pytest.mark.slow
def test_both_checkouts_take_the_step(
    demo_step: ModuleType,
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(model_folder(room=8192))
    monkeypatch.setattr(sys, "argv", ["demo_step.py", str(ROOT), "--rounds", "1", "--steps", "1", "--model", model])
    demo_step.main()
    said = capsys.readouterr().out.splitlines()
    old, new = (line.split(": ")[1] for line in said[:2])
    assert old == new
    assert [line.split(" | ")[0] for line in said[4:]] == [f"| {part}" for part in demo_step.PARTS]


def test_a_checkout_that_was_killed_is_named(demo_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(demo_step.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(SystemExit, match=r"^error: /old: exit code -9: no message$"):
        demo_step.run(Path("/old"), {})
