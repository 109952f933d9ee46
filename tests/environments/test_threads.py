"""Environments that answer at the same time: none can keep the process, and a stall says where it is."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from selfdistill.data import Demonstration
from selfdistill.environments import in_threads
from selfdistill.errors import UserError
from selfdistill.methods import begun

NUMBERS = itertools.count()


def test_results_are_in_order_and_calls_run_at_the_same_time() -> None:
    together = threading.Barrier(3)

    def double(number: int, pause: float) -> int:
        together.wait(5)
        time.sleep(pause)
        return 2 * number

    assert in_threads(double, [1, 2, 3], [0.1, 0.0, 0.05]) == [2, 4, 6]
    assert in_threads(double, [], []) == []


def test_an_error_waits_for_no_other_call_and_begins_none() -> None:
    ended, begun = threading.Event(), []

    def act(number: int) -> None:
        begun.append(number)
        if number == 0:
            time.sleep(0.2)
            raise KeyError("first")
        ended.wait(20)

    start = time.monotonic()
    with pytest.raises(KeyError, match="first"):
        in_threads(act, range(40))
    assert time.monotonic() - start < 5
    ended.set()
    time.sleep(0.1)
    assert sorted(begun)[:32] == list(range(32))
    assert len(begun) <= 33  # the thread of the call that failed may have taken one more


@contextmanager
def program(text: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that has printed its first line."""
    (folder / "ends.py").write_text(textwrap.dedent(text), encoding="utf-8")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(folder / "ends.py")], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n", process.communicate()[1]
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type]:
    """An environment whose ``reset`` fails, at once or, as the row says, once ``ended`` is set."""
    text = """
        import threading

        class World:
            begun, ended, closed = threading.Event(), threading.Event(), []

            def reset(self, answer):
                if answer == "hangs":
                    self.begun.set()
                    self.ended.wait(60)
                self.begun.wait(10)
                1 / 0

            def go(self):
                'Go.'

            def close(self):
                self.closed.append(1)
    """
    module = f"hanging_world_{next(NUMBERS)}"
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    world = importlib.import_module(module).World
    yield world
    world.ended.set()


def test_ctrl_c_does_not_wait_for_an_environment_that_does_not_answer(hangs: type) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        begun(f"python:{hangs.__module__}.World", [Demonstration("a", answer="hangs")])
    assert time.monotonic() - start < 15


def test_an_error_does_not_wait_for_an_environment_that_does_not_answer(hangs: Any) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"b:1, at its start: .* reset failed: ZeroDivisionError"):
        begun(
            f"python:{hangs.__module__}.World",
            [Demonstration("a", answer="hangs"), Demonstration("b", answer="fails", source="b:1")],
        )
    assert time.monotonic() - start < 15
    assert hangs.closed == [1, 1]  # of the one that tries the class, and of the one that answers
    hangs.ended.set()
    time.sleep(0.5)
    assert hangs.closed == [1, 1, 1]


STALLS = """
    import re
    from selfdistill.environments import in_threads, threads
    from selfdistill.environments.runner import ToolRunner

    def find(pattern: str) -> bool:
        '''Find.

        Args:
            pattern: what
        '''
        return bool(re.match(pattern, "a" * 60 + "!"))

    def answer(number):
        call = {"type": "function", "function": {"name": "find", "arguments": {"pattern": "(a+)+$"}}}
        ToolRunner([find], time_limit=0.2).answer({"role": "assistant", "content": "", "tool_calls": [call]})

    threads.STALL_SECONDS = 1.5
    print("begun", flush=True)
    in_threads(answer, [1])
"""


def test_a_tool_that_holds_the_interpreter_is_named(tmp_path: Path) -> None:
    with program(STALLS, tmp_path) as process:
        assert process.stderr is not None
        said = ""
        while "in find" not in said and (line := process.stderr.readline()):
            said += line
    assert said.startswith("Timeout (0:00:01.5")
    assert 'ends.py", line 12 in find' in said
