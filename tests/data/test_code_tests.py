"""A reply's code against unit tests: whatever it does, there is a result in time, and nothing of it remains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from selfdistill.data.code_tests import LIMITS, CodeResult, code_in, run_tests
from selfdistill.errors import UserError

TESTS = ["assert f('ab') == 'AB'", "assert f('') == ''"]
RIGHT = "def f(s):\n    return s.upper()"


def result(code: str, tests: list[str] = TESTS) -> CodeResult:
    (found,) = run_tests([f"Sure:\n```python\n{code}\n```\nThis works."], [tests])
    return found


# --- the code of a reply ---


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("def f(s): return s", "def f(s): return s"),
        ("Sure:\n```python\na = 1\n```\nor\n```\nb = 2\n```", "a = 1\n"),
        ("```\na = 1", "a = 1"),
        ("- so:\n  ```py\n  if a:\n      b = 1\n\n  c = 2\n  ```\n  Done.", "if a:\n    b = 1\n\nc = 2\n"),
        ("1. So:\n\t```py\n    a = 1", "a = 1"),
        ("```a = 0```\nor\n```\na = 1\n```", "a = 1\n"),
        ("````python\na = 1\n````", "a = 1\n"),
        ('```\na = """x\n  \ny"""\n```', 'a = """x\n  \ny"""\n'),
        ("use `a = 1`", "use `a = 1`"),
        ("", ""),
    ],
)
def test_the_code_is_the_first_fenced_block_or_all(reply: str, code: str) -> None:
    assert code_in(reply) == code


def test_the_code_of_a_long_reply_is_found_soon() -> None:
    start = time.monotonic()
    for reply in ("```" * 100_000, "``` \n" * 100_000, " " * 300_000 + "```"):
        code_in(reply)
    assert time.monotonic() - start < 10


# --- verdicts ---


@pytest.mark.parametrize(
    ("code", "feedback"),
    [
        ("def f(s): return s", "f('ab'): expected 'AB', found 'ab'"),
        ("def f(s): return 'AB'", "f(''): expected '', found 'AB'"),
        ("def f(s): print(s.upper())", "f('ab'): expected 'AB', found None"),
        ("def g(s): return s", "assert f('ab') == 'AB': NameError: name 'f' is not defined"),
        ("def f(): return 1", "assert f('ab') == 'AB': TypeError: f() takes 0 positional arguments but 1 was given"),
        (
            "def f(s):\n    return s.big()",
            "assert f('ab') == 'AB': AttributeError: 'str' object has no attribute 'big'",
        ),
        ("x = 1\n\ny = x + z", "NameError: name 'z' is not defined (line 3)"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy' (line 1)"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines (line 1)"),
        ("def f(s): return f(s)", "assert f('ab') == 'AB': RecursionError: maximum recursion depth exceeded"),
        ("import sys\nsys.exit(0)", "SystemExit: 0 (line 2)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt (line 1)"),
        ("import os\nos._exit(0)", "the code: ended the process"),
        ("def f(s): return input()", "assert f('ab') == 'AB': EOFError: EOF when reading a line"),
        ("def f(s: return s", "SyntaxError: invalid syntax (line 1)"),
        ("a = '\0'", "SyntaxError: source code string cannot contain null bytes"),
        ("a = '\ud800'", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800'"),
        ("def f(s): return '\\ud800'", "f('ab'): expected 'AB', found '\\ud800'"),
        ("-" * 100_000 + "1", ""),
        ("(" * 100_000, "SyntaxError: too many nested parentheses (line 1)"),
        ("class A:\n    def __repr__(self): 1/0\ndef f(s): return A()", "assert f('ab') == 'AB': ZeroDivisionError"),
        ("class A(Exception):\n    def __str__(self): 1/0\nraise A", "A (line 3)"),
        ("import os\nos.closerange(0, 99)\n" + RIGHT, "the code: ended the process"),
    ],
)
def test_wrong_code_has_feedback(code: str, feedback: str) -> None:
    found = result(code)
    assert not found.passed
    assert found.unusable is None
    assert found.feedback.startswith(feedback)
    assert 0 < len(found.feedback) < 400
    assert "\n" not in found.feedback


@pytest.mark.parametrize(
    "code",
    [
        RIGHT,
        "import sys\nsys.stdout.buffer.write(bytes(range(256)))\nprint('\\ud800', file=sys.stderr)\n" + RIGHT,
        "def f(s):\n    print('x' * 10**7)\n    return s.upper()",
        "if __name__ == '__main__':\n    input()\n" + RIGHT,
        "import re, math, collections, itertools, random, string, datetime, json, typing\n" + RIGHT,
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    left: 'A' = None\n    x: int = 0\n" + RIGHT,
        RIGHT + "\ndef g(x: int): return x\nassert g.__annotations__ == {'x': int}",
        "from __future__ import annotations\n"
        + RIGHT
        + "\ndef g(x: int): pass\nassert g.__annotations__ == {'x': 'int'}",
    ],
)
def test_right_code_passes(code: str) -> None:
    assert result(code) == CodeResult(True)


@pytest.mark.parametrize("reply", ["", "   \n", "Here it is:\n```python\n```"])
def test_a_reply_without_code(reply: str) -> None:
    assert run_tests([reply], [TESTS]) == [CodeResult(False, "SyntaxError: there is no code (line 1)")]


@pytest.mark.parametrize(
    ("test", "feedback"),
    [
        ("f('ab') == 'ab'", "f('ab'): expected 'ab', found 'AB'"),
        ("assert f('ab').islower(), 'why'", "f('ab').islower() is not true"),
        ("x = f('ab')\nassert x == 'ab'", "x = f('ab') assert x == 'ab': AssertionError"),
        ("for s in 'ab':\n    assert f(s) == s, s", "for s in 'ab': assert f(s) == s, s: AssertionError: a"),
    ],
)
def test_kinds_of_tests(test: str, feedback: str) -> None:
    assert result(RIGHT, [test]) == CodeResult(False, feedback)
    assert result("def f(s): return s", [test]) == CodeResult(True)


@pytest.mark.parametrize(
    ("test", "unusable"),
    [
        ("assert f('ab'", "test 2: SyntaxError: '(' was never closed (line 1)"),
        ("f = upper", "test 2: ValueError: it asserts nothing"),
        ("", "test 2: ValueError: it asserts nothing"),
        ("return 1", "test 2: SyntaxError: 'return' outside function (line 1)"),
    ],
)
def test_tests_that_cannot_be_run(test: str, unusable: str) -> None:
    assert result(RIGHT, [TESTS[0], test]) == CodeResult(False, unusable=unusable)


# --- limits ---


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("while True: pass", marks=pytest.mark.slow),
        "def f(s):\n    while True: pass",
        "int('9' * 4000) ** 10**7",
    ],
)
def test_an_endless_loop_ends(code: str) -> None:
    found = result(code)
    assert not found.passed
    assert "did not end within " in found.feedback


@pytest.mark.parametrize(
    ("code", "wall"),
    [
        pytest.param("import time\ntime.sleep(100)", 1, marks=pytest.mark.slow),
        (
            "import signal\n"
            "for s in (signal.SIGXCPU, signal.SIGALRM, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n"
            "while True: pass",
            4,
        ),
        ("import threading\nt = threading.Thread(target=threading.Event().wait)\nt.start()\nt.join()", 1),
    ],
)
def test_what_waits_or_ignores_signals_ends(code: str, wall: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "wall", wall)
    start = time.monotonic()
    assert not result(code).passed
    assert time.monotonic() - start < 30


def test_threads_that_go_on_end_with_the_tests() -> None:
    start = "try: threading.Thread(target=threading.Event().wait).start()\nexcept Exception: pass"  # some may not start
    assert result(f"import threading\n{start}\n{RIGHT}").passed


@pytest.mark.parametrize(
    "code",
    [
        "x = 'a' * 10**10",
        "x = []\nwhile True: x.append('a' * 10**6)",
        "x = [0]\nwhile True: x = x + x",
        "def f(s): return bytearray(10**9)",
    ],
)
def test_memory_is_limited(code: str) -> None:
    found = result(code)
    assert not found.passed
    assert "MemoryError" in found.feedback or "did not end within " in found.feedback


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("import os\nwhile True: os.fork()", "os.fork is not allowed here"),
        ("import subprocess\nsubprocess.run(['ls'])", "subprocess.Popen is not allowed here"),
        ("import os\nos.system('ls')", "os.system is not allowed here"),
        ("import os\nos.execv('/bin/ls', ['ls'])", "os.exec is not allowed here"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "not allowed here"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)", "os.kill is not allowed here"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "is not allowed here"),
        ("import socket\nsocket.socket()", "socket.__new__ is not allowed here"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "is not allowed here"),
        ("open('new.txt', 'w')", "files cannot be written here"),
        ("import os\nos.open('new.txt', os.O_CREAT)", "files cannot be written here"),
        ("import os\nos.mkdir('new')", "os.mkdir is not allowed here"),
        ("import tempfile\ntempfile.NamedTemporaryFile()", "No usable temporary directory"),
        ("import ctypes\nctypes.CDLL(None)", "is not allowed here"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9, 9))", "resource.setrlimit is not allowed here"),
    ],
)
def test_what_a_function_has_no_need_of_is_refused(code: str, refused: str) -> None:
    found = result(code)
    assert not found.passed
    assert refused in found.feedback


def test_files_of_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "kept.txt"
    file.write_text("kept", encoding="utf-8")
    for code in (
        f"import os\nos.remove({str(file)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import pathlib\npathlib.Path({str(file)!r}).unlink()",
        f"import os\nos.rename({str(file)!r}, 'gone')",
        f"open({str(file)!r}, 'a')",
        f"import os\nos.truncate({str(file)!r}, 0)",
    ):
        assert "PermissionError" in result(code).feedback
    assert file.read_text(encoding="utf-8") == "kept"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has namespaces")
def test_there_is_no_network_interface_where_the_kernel_permits() -> None:
    apart = subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True).returncode == 0
    if not apart:
        pytest.skip("this kernel permits no network namespace")
    found = result("rows = open('/proc/self/net/dev').read().count(':')", ["assert rows == 1"])
    assert found.passed, found.feedback  # lo alone


def test_the_order_of_a_set_is_the_same_every_time() -> None:
    code = "raise ValueError(list({str(number) for number in range(9)}))"
    assert len({found.feedback for found in run_tests([code] * 4, [["True"]] * 4)}) == 1


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert result("import os", ["assert not {'HF_TOKEN', 'PATH', 'HOME'} & set(os.environ)"]).passed
    assert result("import os", ["assert os.listdir() == []"]).passed
    assert result("import sys", ["assert not any('site-packages' in path for path in sys.path)"]).passed


def test_what_python_needs_to_start_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    assert result("import os", ["assert os.environ['LD_LIBRARY_PATH'] == '/opt/python/lib'"]).passed


def test_a_python_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho a warning >&2\necho 'python: cannot open libpython3.so' >&2\nexit 127\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError) as caught:
        result("def f(s): return s")
    message = "scorer 'code': the process of a reply ended with status 127 before it began: "
    assert str(caught.value) == message + "python: cannot open libpython3.so"


@pytest.mark.parametrize(
    "code",
    [
        "import os\ndef f(s): return os.getcwd()",
        "import sys\ndef f(s): return sys.executable",
        "from string import nothing",
        "import os\nraise ValueError(os.__file__)",
        "import sys\ndef f(s): return sys.path",
        "import os\ndef f(s): return open(os.path.join(os.getcwd(), 'a'))",
    ],
)
def test_feedback_has_no_path_of_the_machine(code: str) -> None:
    feedback = result(code).feedback
    assert "<path>" in feedback
    assert "/" not in feedback


# --- many, and the end ---


def test_many_replies_keep_their_order() -> None:
    replies = [f"def f(s): return s * {number}" for number in range(12)]
    tests = [[f"f('a') == '{'a' * number}'"] for number in range(12)]
    assert all(found.passed for found in run_tests(replies, tests))
    found = run_tests(replies, tests[::-1])
    assert found[0].feedback == "f('a'): expected 'aaaaaaaaaaa', found ''"
    assert run_tests([], []) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process ends at its own time limit")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_no_process_outlives_its_parent(number: int) -> None:
    program = (
        "from selfdistill.data.code_tests import run_tests\n"
        "run_tests(['import time\\nprint()\\nwhile True: time.sleep(1)'] * 2, [['f(1)']] * 2)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while not children and time.monotonic() < deadline:
            time.sleep(0.1)
            children = [c for c in psutil.Process(parent.pid).children() if "sys.addaudithook" in " ".join(c.cmdline())]
        assert children
        time.sleep(1)  # until it has said that it is to end with its parent
    finally:
        parent.send_signal(number)
        parent.wait()
    deadline = time.monotonic() + 5
    while (alive := [child for child in children if runs(child)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that is only to be reaped has."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
