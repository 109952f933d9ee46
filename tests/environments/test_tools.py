"""Tools: their schemas and arguments, and that no tool and no call can stop a run."""

from __future__ import annotations

import ctypes
import enum
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from broken_tools import (
    Odd,
    Unspeakable,
    broken,
    called,
    circle,
    deep,
    endless,
    endless_numbers,
    later,
    never,
    raising,
    tool,
)
from PIL.Image import Image

from selfdistill.environments import Step
from selfdistill.environments.runner import ToolRunner
from selfdistill.errors import UserError


def calls(*given: tuple[Any, Any]) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in given]
    return {"role": "assistant", "content": "", "tool_calls": made}


def answer(runner: ToolRunner, name: Any, arguments: Any) -> str:
    (observation,) = runner.answer(calls((name, arguments))).observations
    return str(observation["content"])


# --- schemas and arguments ---


def weigh(
    item: str,
    count: int = 1,
    share: float = 0.5,
    exact: bool = False,
    unit: Literal["g", "kg"] = "g",
    parts: list[int] | None = None,
    label: str | int = "",
    sizes: dict[str, list[int]] | None = None,
) -> str:
    """Weigh something.

    Args:
        item: what is weighed
        count: how many
        share: which share
        exact: whether exactly
        unit: the unit
        parts: the parts
        label: a label
        sizes: sizes by name
    """
    return f"{item} {count!r} {share!r} {exact} {unit} {parts} {label!r}" + (f" {sizes}" if sizes else "")


def test_a_schema_comes_from_hints_and_docstring() -> None:
    schema = ToolRunner([weigh]).schemas[0]["function"]
    assert (schema["name"], schema["description"]) == ("weigh", "Weigh something.")
    assert schema["parameters"]["required"] == ["item"]
    assert schema["parameters"]["properties"]["count"] == {"type": "integer", "description": "how many"}
    assert "return" not in schema


RIGHT: list[tuple[Any, str]] = [
    ({"item": "a"}, "a 1 0.5 False g None ''"),
    ('{"item": "a", "count": 3}', "a 3 0.5 False g None ''"),
    ({"item": "a", "count": 3.0, "share": 2}, "a 3 2 False g None ''"),
    ({"item": "a", "parts": [1, 2.0], "unit": "kg"}, "a 1 0.5 False kg [1, 2] ''"),
    ({"item": "a", "parts": None, "label": 7}, "a 1 0.5 False g None 7"),
    ({"item": "a", "sizes": {"x": [1.0]}}, "a 1 0.5 False g None '' {'x': [1]}"),
]


@pytest.mark.parametrize(("given", "text"), RIGHT)
def test_arguments_that_fit(given: Any, text: str) -> None:
    assert answer(ToolRunner([weigh]), "weigh", given) == text


WRONG: list[tuple[Any, Any, str]] = [
    ("weigh", {}, "weigh: missing argument 'item'"),
    ("weigh", {"item": 3}, "weigh: argument 'item' is 3, expected string"),
    ("weigh", {"item": None}, "weigh: argument 'item' is null, expected string"),
    ("weigh", {"item": "a", "count": "3"}, "weigh: argument 'count' is \"3\", expected integer"),
    ("weigh", {"item": "a", "count": 3.5}, "weigh: argument 'count' is 3.5, expected integer"),
    ("weigh", {"item": "a", "count": True}, "weigh: argument 'count' is true, expected integer"),
    ("weigh", {"item": "a", "exact": 1}, "weigh: argument 'exact' is 1, expected boolean"),
    ("weigh", {"item": "a", "unit": "lb"}, 'weigh: argument \'unit\' is "lb", expected one of ["g", "kg"]'),
    ("weigh", {"item": "a", "parts": [1, "b"]}, "weigh: argument 'parts[1]' is \"b\", expected integer"),
    ("weigh", {"item": "a", "sizes": {"x": ["1"]}}, "weigh: argument 'sizes.x[0]' is \"1\", expected integer"),
    ("weigh", {"item": "a", "label": []}, "weigh: argument 'label' is [], expected integer or string"),
    ("weigh", {"item": "a", "size": 1}, 'weigh: unknown argument "size", expected item, count, share, exact, unit, '),
    ("weigh", "item=a", 'weigh: the arguments are "item=a", expected a JSON object'),
    ("weigh", "{item: a}", 'weigh: the arguments are "{item: a}", expected a JSON object'),
    ("weigh", ["a"], 'weigh: the arguments are ["a"], expected a JSON object'),
    ("weigh", None, "weigh: the arguments are null, expected a JSON object"),
    ("wei\ngh", {}, "unknown tool 'wei gh', expected one of weigh"),
    ("", {}, "unknown tool '', expected one of weigh"),
    (None, {}, "unknown tool 'None', expected one of weigh"),
]


@pytest.mark.parametrize(("name", "given", "line"), WRONG)
def test_a_call_that_does_not_fit_is_one_line(name: Any, given: Any, line: str) -> None:
    step = ToolRunner([weigh]).answer(calls((name, given)))
    assert step.invalid_calls == 1
    assert step.observations[0]["content"].startswith(f"Error: {line}")
    assert "\n" not in step.observations[0]["content"]


def test_arguments_are_the_tools_own() -> None:
    def spoil(parts: list[int], more: dict[str, list[int]]) -> str:
        """Spoil its arguments.

        Args:
            parts: some
            more: others
        """
        parts.clear()
        more["a"].clear()
        return "done"

    given = {"parts": [1], "more": {"a": [2]}}
    assert answer(ToolRunner([spoil]), "spoil", given) == "done"
    assert given == {"parts": [1], "more": {"a": [2]}}


def test_a_message_has_an_observation_for_each_call_with_its_identity() -> None:
    message = calls(("weigh", {"item": "a"}), ("way", {}), ("weigh", {"item": "b"}))
    message["tool_calls"][0]["id"] = "call_1"
    step = ToolRunner([weigh]).answer(message)
    assert step.invalid_calls == 1
    assert [one["role"] for one in step.observations] == ["tool"] * 3
    assert [one["name"] for one in step.observations] == ["weigh", "way", "weigh"]
    assert [one.get("tool_call_id") for one in step.observations] == ["call_1", None, None]
    assert ToolRunner([weigh]).answer({"role": "assistant", "content": "Hi."}) == Step()


def test_an_invalid_message_is_told_why() -> None:
    message = {"role": "assistant", "content": "<tool_call>{", "invalid": "the call is not JSON"}
    step = ToolRunner([weigh]).answer(message)
    assert step == Step(({"role": "user", "content": "Error: the call is not JSON"},), invalid_calls=1)


def test_functions_that_are_no_tools_are_refused() -> None:
    def no_hint(a) -> str:  # type: ignore[no-untyped-def]
        """Do.

        Args:
            a: it
        """
        return ""

    def no_line(a: int) -> str:
        """Do."""
        return ""

    def no_docstring() -> str:
        return ""

    def any_number(*a: int) -> str:
        """Do.

        Args:
            a: them
        """
        return ""

    for function in (no_hint, no_line, no_docstring, any_number):
        with pytest.raises(UserError, match=rf"tool .*{function.__name__}: .*argument") as caught:
            ToolRunner([function])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="two tools are named 'weigh'"):
        ToolRunner([weigh, weigh])


class Unit(enum.Enum):
    KG = "kg"


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        (Unit, "Unit, which a call cannot give; use Literal"),
        (list[Unit], "Unit, which a call cannot give"),
        (tuple[int, str], "tuple, which a call cannot give"),
        (dict[str, tuple[int, int]] | None, "tuple, which a call cannot give"),
        (torch.Tensor, "Tensor, which a call cannot give"),
        (Image, "Image, which a call cannot give"),
        (dict[int, str], "dict with other keys than str, which a call cannot give"),
    ],
)
def test_an_argument_that_would_not_have_the_declared_type_is_refused(hint: Any, shown: str) -> None:
    def act(a: Any) -> str:
        """Act.

        Args:
            a: it
        """
        return ""

    act.__annotations__["a"] = hint
    with pytest.raises(UserError, match=r"tool .*act: argument 'a' has the type ") as caught:
        ToolRunner([act])
    assert shown in str(caught.value)


def test_an_async_generator_is_refused() -> None:
    async def act() -> Any:
        """Act."""
        yield 1

    with pytest.raises(UserError, match=r"act: found an async generator, expected a function that returns its result"):
        ToolRunner([act])


def test_a_long_name_of_a_tool_stays_whole() -> None:
    act = tool(lambda: "done")
    act.__name__ = "server__" + "a" * 60
    runner = ToolRunner([act])
    names = [runner.answer(calls((name, {}))).observations[0]["name"] for name in (act.__name__, "b" * 80)]
    assert names == [act.__name__, "b" * 60 + " ... (cut)"]


# --- what tools return ---


RETURNED: list[tuple[Callable[[], Any], str]] = [
    (lambda: "text", "text"),
    (lambda: "a\r\nb\tc\x1b[31m\x00", "a\nb\tc[31m"),
    (lambda: "half \ud800 pair \U0001f600", "half \ufffd pair \U0001f600"),
    (lambda: {"a": [1, None, "\u00e4"]}, '{"a": [1, null, "\u00e4"]}'),
    (lambda: None, "null"),
    (lambda: 3, "3"),
    (lambda: "", "(nothing)"),
    (lambda: " \n", "(nothing)"),
    (lambda: Odd(), "odd"),
    (lambda: {1}, "{1}"),
    (object, "<object object>"),
    (lambda: {"a": {object}}, "{'a': {<class 'object'>}}"),
    (lambda: (letter for letter in "ab"), '["a", "b"]'),
    (lambda: {"all": map(len, ["a"])}, '{"all": [1]}'),
    (lambda: (one for one in [{1}]), "[{1}]"),
    (lambda: b"bytes", "b'bytes'"),
    (circle, "[[...]]"),
    (later, "later"),
    (raising(ValueError("no\nsuch thing")), "Error: act: ValueError: no such thing"),
    (raising(KeyError(object())), "Error: act: KeyError: <object object>"),
    (raising(KeyError("a")), "Error: act: KeyError: 'a'"),
    (raising(SystemExit(3)), "Error: act: SystemExit: 3"),
    (raising(KeyboardInterrupt()), "Error: act: KeyboardInterrupt"),
    (raising(Unspeakable()), "Error: act: Unspeakable"),
    (raising(ValueError("\ud800\x07")), "Error: act: ValueError: \ufffd"),
    (lambda: 10**10_000, "Error: act: ValueError: Exceeds the limit"),
    (deep, "Error: act: RecursionError: maximum recursion depth exceeded"),
]


@pytest.mark.parametrize(("body", "text"), RETURNED)
def test_what_a_tool_returns_or_raises_is_text(body: Callable[[], Any], text: str) -> None:
    found = answer(ToolRunner([tool(body)]), "act", {})
    assert found.startswith(text) if text.startswith("Error") else found == text
    assert len(found.splitlines()) == len(text.splitlines())


@pytest.mark.parametrize("value", ["x" * 10**7, ["x"] * 10**6, Odd], ids=["text", "list", "generator"])
def test_long_results_are_cut(value: Any) -> None:
    found = answer(ToolRunner([tool(lambda: [endless_numbers()] if value is Odd else value)]), "act", {})
    assert found.endswith(" ... (cut)")
    assert len(found) == 2010
    long_error = answer(ToolRunner([tool(raising(ValueError("y" * 10**6)))]), "act", {})
    assert len(long_error) < 250


def test_a_result_that_was_cut_says_how_long_it_was() -> None:
    runner = ToolRunner([tool(lambda: "x" * 5000), weigh])
    step = runner.answer(calls(("weigh", {"item": "a"}), ("act", {}), ("weigh", {"item": "b"})))
    assert step.shortened == 5000
    assert runner.answer(calls(("weigh", {"item": "a"}))).shortened == 0
    longer = ToolRunner([tool(lambda: "x" * 5000)], observation_limit=5000)
    assert answer(longer, "act", {}) == "x" * 5000


# --- tools that do not return ---


@pytest.mark.parametrize("body", [endless, never], ids=["loop", "async"])
def test_python_code_that_does_not_end_is_stopped(body: Callable[[], Any]) -> None:
    runner = ToolRunner([tool(body), weigh], time_limit=0.2)
    begun = time.monotonic()
    assert answer(runner, "act", {}) == "Error: act: it took longer than 0.2 s"
    assert answer(runner, "weigh", {"item": "a"}).startswith("a 1")
    assert time.monotonic() - begun < 2


def test_a_call_that_cannot_be_stopped_blocks_its_environment_only_until_it_ends() -> None:
    ended = threading.Event()
    runner = ToolRunner([tool(lambda: ended.wait(60)), weigh], time_limit=0.2)
    step = runner.answer(calls(("act", {}), ("weigh", {"item": "a"})))
    assert [one["content"] for one in step.observations] == [
        "Error: act: it took longer than 0.2 s",
        "Error: not run, because the previous call took too long",
    ]
    assert step.invalid_calls == 0
    assert answer(runner, "weigh", {"item": "a"}) == "Error: weigh: an earlier call is still running"
    assert answer(ToolRunner([weigh]), "weigh", {"item": "a"}).startswith("a 1")
    ended.set()
    time.sleep(0.1)
    assert answer(runner, "weigh", {"item": "a"}).startswith("a 1")


def test_a_call_that_ends_just_as_it_is_stopped_does_not_harm_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, stop = threading.Event(), ctypes.pythonapi.PyThreadState_SetAsyncExc

    def late(thread: Any, error: Any) -> None:
        ended.set()
        time.sleep(0.1)
        stop(thread, error)

    monkeypatch.setattr(ctypes.pythonapi, "PyThreadState_SetAsyncExc", late)
    runner = ToolRunner([tool(lambda: ended.wait(60)), weigh], time_limit=0.2)
    assert answer(runner, "act", {}) == "Error: act: it took longer than 0.2 s"
    assert answer(runner, "weigh", {"item": "a"}).startswith("a 1")


def test_too_many_calls_that_do_not_end_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("selfdistill.environments.worker.MOST_LATE", 1)

    def hang() -> str:
        return answer(ToolRunner([tool(lambda: ended.wait(60))], time_limit=0.1), "act", {})

    assert hang() == "Error: act: it took longer than 0.1 s"
    problem = "^tool 'act': 1 calls that took too long are still running; give them a time-out of their own$"
    with pytest.raises(UserError, match=problem):
        hang()
    ended.set()
    time.sleep(0.1)
    ended.clear()
    assert hang() == "Error: act: it took longer than 0.1 s"  # those that ended do not count
    ended.set()


def test_an_async_call_for_which_too_many_files_are_open_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(24, "Too many open files")

    runner = ToolRunner([tool(later)])
    monkeypatch.setattr("asyncio.new_event_loop", full)
    problem = (
        r"^tool 'act': no event loop for an async call \(Too many open files\); raise the limit of open files, ulimit"
    )
    with pytest.raises(UserError, match=problem):
        answer(runner, "act", {})
    monkeypatch.undo()
    assert answer(runner, "act", {}) == "later"


def test_a_text_of_a_result_that_takes_too_long_is_late() -> None:
    class Slow:
        def __str__(self) -> str:
            time.sleep(0.5)
            return "slow"

    async def act() -> Any:
        return Slow()

    for body in (Slow, act):
        runner = ToolRunner([tool(body)], time_limit=0.1)
        assert answer(runner, "act", {}) == "Error: act: it took longer than 0.1 s"


def test_a_runner_has_one_thread_for_all_calls_and_it_ends_with_it() -> None:
    def which() -> int:
        """Which thread."""
        return threading.get_ident()

    before = threading.active_count()
    runner = ToolRunner([which])
    assert threading.active_count() == before
    assert answer(runner, "which", {}) == answer(runner, "which", {}) != str(threading.get_ident())
    assert threading.active_count() == before + 1
    runner.close()
    time.sleep(0.1)
    assert threading.active_count() == before


ENDS = """
    import sys, time
    from selfdistill.environments.runner import ToolRunner

    def act() -> str:
        '''Act.'''
        time.sleep(60)

    runner = ToolRunner([act], time_limit={limit})
    call = {{"type": "function", "function": {{"name": "act", "arguments": {{}}}}}}
    print("begun", flush=True)
    step = runner.answer({{"role": "assistant", "content": "", "tool_calls": [call]}})
    print(step.observations[0]["content"], flush=True)
"""


def program(limit: float, folder: Path) -> subprocess.Popen[str]:
    file = folder / "ends.py"
    file.write_text(textwrap.dedent(ENDS.format(limit=limit)), encoding="utf-8")
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, str(file)], stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_a_thread_that_is_left_behind_does_not_keep_the_process(tmp_path: Path) -> None:
    with program(0.2, tmp_path) as process:
        out, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines() == ["begun", "Error: act: it took longer than 0.2 s"]


def test_ctrl_c_comes_through_while_a_tool_runs(tmp_path: Path) -> None:
    with program(50, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode != 0
    assert err.strip().endswith("KeyboardInterrupt")


# --- many broken tools ---


@pytest.mark.property
@pytest.mark.parametrize("seed", range(20))
def test_with_broken_tools_and_calls_a_run_goes_on(seed: int) -> None:
    """200 cases: each call gets one observation, errors are one line, and the tools that work go on working."""
    chance = random.Random(seed)
    for _ in range(10):
        runner = ToolRunner([tool(broken(chance)), weigh], time_limit=0.05)
        name, given = called(chance)
        begun = time.monotonic()
        step = runner.answer(calls((name, given)))
        assert time.monotonic() - begun < 5
        assert step.invalid_calls in (0, 1)
        assert [one["role"] for one in step.observations] == ["tool"]
        content = step.observations[0]["content"]
        assert content.strip()
        assert len(content) <= 2010
        content.encode("utf-8")  # raises for halves of surrogate pairs
        assert not any(ord(sign) < 32 and sign not in "\t\n" for sign in content)
        if content.startswith("Error: "):
            assert "\n" not in content
        time.sleep(0.1 if "longer" in content else 0)
        assert answer(runner, "weigh", {"item": "a"}).startswith("a 1")
        runner.close()
