"""Run the code of replies against unit tests: each in a process of its own, with limits.

It keeps a reply's mistakes away from this process, such as an endless loop, a full memory or a deleted file. It is no
sandbox: code that is written to break out, to read files or to pass without being right may succeed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdistill.data.rows import join_surrogates
from selfdistill.errors import UserError

LIMITS = {"cpu": 1, "wall": 10, "memory": 256 * 2**20, "file": 2**20, "files": 32}
"""Most seconds of computing and of waiting, bytes of memory and of a file, and open files of a reply's process."""

_CHILD = Path(__file__).with_name("code_child.py")
_FENCED = re.compile(r"^([ \t]*)```+[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Variables without which some Pythons do not start; they hold folders."""
_MOST_AT_ONCE = 8


@dataclass(frozen=True)
class CodeResult:
    """How a reply's code met its tests."""

    passed: bool
    """Whether all tests passed."""
    feedback: str = ""
    """The error, or the first failing test with what it expected and found; no path of the machine."""
    unusable: str | None = None
    """What is wrong with the tests themselves."""


def code_in(reply: str) -> str:
    """The first fenced block of a reply, closed or not; if it is indented, without that. Else all of the reply."""
    block = _FENCED.search(reply)
    if block is None:
        return reply
    return textwrap.dedent(block[2]) if block[1] else block[2]


def run_tests(replies: Sequence[str], tests: Sequence[Sequence[str]]) -> list[CodeResult]:
    """Run each reply's code and then its tests, Python statements that raise where the code is wrong.

    A process ends at ``LIMITS``, and with this one. It has no environment but a fixed hash seed and what Python needs
    to start, only the standard library and an empty folder. An audit hook of Python refuses network, processes, signals
    and files to write: what asks for one gets an error. On Linux the kernel, too, gives it no network, where it permits
    that. What the code prints is thrown away.

    Args:
        replies: what the model has written, without thoughts.
        tests: the tests of each reply.

    Raises:
        UserError: a process cannot be started.
    """
    if not replies:
        return []
    with ThreadPoolExecutor(min(len(replies), _cores(), _MOST_AT_ONCE)) as pool:
        return list(pool.map(_run, map(code_in, replies), tests))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(code: str, tests: Sequence[str]) -> CodeResult:
    if not code.strip():
        code = "raise SyntaxError('there is no code')"
    job = json.dumps({"code": code, "tests": list(tests), "limits": LIMITS}).encode()
    # Not as a file, whose folder would be on the path; not with -I, which would ignore the seed.
    command = [sys.executable, "-s", "-S", "-B", "-X", "utf8", "-c", _CHILD.read_text(encoding="utf-8")]
    # The seed gives the same verdict every time, also on code that depends on a set's order.
    environment = {"PYTHONHASHSEED": "0"} | {name: os.environ[name] for name in _LIBRARIES if name in os.environ}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as said,
            tempfile.TemporaryFile() as errors,
        ):
            given.write(job)
            given.seek(0)
            process = subprocess.Popen(
                command,
                stdin=given,
                stdout=said,
                stderr=errors,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
            in_time = _wait(process)
            said.seek(0)
            errors.seek(0)
            return _result(_lines(said.read()), process.returncode, in_time, errors.read())
    except OSError as error:
        raise UserError(f"scorer 'code': cannot start a process: {error.strerror or error}") from error


def _wait(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process ended in time; it has ended in any case."""
    try:
        process.wait(LIMITS["wall"])
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lines(said: bytes) -> list[dict[str, Any]]:
    """What the process has said; the code may have written between it."""
    found = []
    for line in said.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def _result(lines: list[dict[str, Any]], status: int, in_time: bool, errors: bytes) -> CodeResult:
    last = lines[-1] if lines else {}
    if "unusable" in last:
        return CodeResult(False, unusable=_text(last["unusable"]))
    if "passed" in last and in_time:
        return CodeResult(last["passed"] is True, _text(last.get("feedback")))
    if "at" not in last and in_time and status != -signal.SIGXCPU:
        why = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UserError(
            f"scorer 'code': the process of a reply ended with status {status} before it began" + (why and f": {why}")
        )
    if not in_time:
        end = f"did not end within {LIMITS['wall']} s"
    elif status == -signal.SIGXCPU:
        end = f"did not end within {LIMITS['cpu']} s of CPU time"
    else:
        end = f"was ended by signal {-status}" if status < 0 else "ended the process"
    return CodeResult(False, f"{_text(last.get('at', 'the code'))}: {end}")


def _text(value: Any) -> str:
    return join_surrogates(str(value))
