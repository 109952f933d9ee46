"""Program of the process in which a reply's code meets its tests; :mod:`selfdistill.data.code_tests` starts it.

It runs by ``python -s -S -B -c``, so it imports only the standard library. The job comes on standard input
as a JSON object: ``code``, ``tests`` and ``limits``. Lines of JSON go to standard output: ``{"at": ...}`` before what
may never end, then one ``{"passed": ..., "feedback": ...}`` or ``{"unusable": ...}``.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

REPLY = "<reply>"
SHOWN = 120
"""Most characters of a value, or of a message, in the feedback."""

PR_SET_PDEATHSIG, CLONE_NEWUSER, CLONE_NEWNET = 1, 0x10000000, 0x40000000
"""Constants of Linux."""

REFUSED = ("os.", "shutil.", "subprocess.", "pty.", "socket.", "ctypes.", "_thread.", "fcntl.", "resource.", "signal.")
"""Beginnings of the audit events of what a function under test has no need of."""
ALLOWED = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
"""Events that look and change nothing; Python's own imports raise the first."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

ROOTS = {os.getcwd(), os.path.dirname(os.__file__), sys.prefix, sys.base_prefix, os.path.dirname(sys.executable)}
PATH = re.compile("(?:" + "|".join(map(re.escape, sorted(ROOTS - {"", "/"}, reverse=True))) + r")[^\s'\"(),:;]*")
"""A path of this Python or of the current folder."""


def main() -> None:
    job = json.load(sys.stdin)
    lines = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    _isolate()
    _limit(job["limits"])
    sys.addaudithook(_refuse)

    def say(**values: Any) -> None:
        os.write(lines, (json.dumps(values) + "\n").encode())

    say(**_verdict(job["code"], job["tests"], say))
    os._exit(0)  # leaves exit handlers of the code behind


def _isolate() -> None:
    """On Linux: a network without an interface, where the kernel permits, and an end with the parent."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
            libc.unshare(CLONE_NEWNET)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last, because a new user clears it


def _limit(limits: dict[str, int]) -> None:
    """Limits of the kernel. The timer is for a process whose parent is gone; else the parent ends it before."""
    signal.setitimer(signal.ITIMER_REAL, 2 * limits["wall"])
    most = {
        resource.RLIMIT_CPU: (limits["cpu"], limits["cpu"] + 1),  # SIGXCPU at the first, SIGKILL at the second
        resource.RLIMIT_AS: (limits["memory"], limits["memory"]),
        resource.RLIMIT_FSIZE: (limits["file"], limits["file"]),
        resource.RLIMIT_NOFILE: (limits["files"], limits["files"]),
        resource.RLIMIT_NPROC: (1, 1),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, wanted in most.items():
        with contextlib.suppress(ValueError, OSError):  # macOS limits no memory; lower limits stay
            resource.setrlimit(kind, wanted)


def _refuse(event: str, given: tuple[Any, ...]) -> None:
    """Audit hook: no processes, threads, sockets, signals, C libraries, and no writing."""
    if event == "open":
        if isinstance(given[2], int) and given[2] & WRITING:
            raise PermissionError("files cannot be written here")
    elif event.startswith(REFUSED) and event not in ALLOWED:
        raise PermissionError(f"{event} is not allowed here")


def _verdict(code: str, tests: list[str], say: Callable[..., None]) -> dict[str, Any]:
    programs = []
    for number, test in enumerate(tests, start=1):
        problem, program = _attempt(_parsed, test)
        if problem:
            return {"unusable": f"test {number}: {problem}"}
        programs.append(program)
    module = sys.modules["reply"] = types.ModuleType("reply")  # dataclasses looks names up in it
    names = vars(module)
    say(at="the code")
    problem, _ = _attempt(_execute, code, names)
    if problem:
        return {"passed": False, "feedback": problem}
    for test, program in zip(tests, programs, strict=True):
        shown = _clipped(" ".join(test.split()))
        say(at=shown)
        problem, difference = _attempt(_test, program, names)
        if problem or difference:
            return {"passed": False, "feedback": difference or f"{shown}: {problem}"}
    return {"passed": True, "feedback": ""}


def _attempt(function: Callable[..., Any], *given: Any) -> tuple[str | None, Any]:
    """What went wrong, and what was returned."""
    try:
        return None, function(*given)
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too
        return _named(error), None


def _parsed(test: str) -> ast.Module:
    program = ast.parse(test)
    compile(program, "<test>", "exec", dont_inherit=True)
    if not any(isinstance(part, ast.Assert | ast.Raise) for part in ast.walk(program)) and not _expression(program):
        raise ValueError("it asserts nothing")
    return program


def _expression(program: ast.Module) -> ast.expr | None:
    """What must be true, if that is all of the test: of one ``assert`` or one expression."""
    only = program.body[0] if len(program.body) == 1 else None
    if isinstance(only, ast.Assert):
        return only.test
    return only.value if isinstance(only, ast.Expr) else None


def _execute(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, REPLY, "exec", dont_inherit=True), names)


def _test(program: ast.Module, names: dict[str, Any]) -> str | None:
    """Run a test. Where one expression must be true and is not: what differs, or that it is not true."""
    asked = _expression(program)
    if asked is None:
        exec(compile(program, "<test>", "exec", dont_inherit=True), names)
        return None
    if not (isinstance(asked, ast.Compare) and len(asked.ops) == 1 and isinstance(asked.ops[0], ast.Eq)):
        return None if _value(asked, names) else f"{_written(asked)} is not true"
    found, expected = _value(asked.left, names), _value(asked.comparators[0], names)
    if expected == found:
        return None
    return f"{_written(asked.left)}: expected {_shown(expected)}, found {_shown(found)}"


def _value(expression: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(expression), "<test>", "eval", dont_inherit=True), names)


def _written(expression: ast.expr) -> str:
    return _clipped(ast.unparse(expression))


def _shown(value: Any) -> str:
    return _clipped(PATH.sub("<path>", repr(value)))


def _named(error: BaseException) -> str:
    """The error's kind, its message and, where it is known, the line of the reply."""
    try:
        message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    except BaseException:  # the code may raise an error of its own
        message = ""
    line = error.lineno if isinstance(error, SyntaxError) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == REPLY:
            line = step.tb_lineno
        step = step.tb_next
    message = _clipped(PATH.sub("<path>", message))
    return f"{type(error).__name__}{': ' if message else ''}{message}{f' (line {line})' if line else ''}"


def _clipped(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


if __name__ == "__main__":
    main()
