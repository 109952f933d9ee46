"""The adapter of ``verifiers``, with a package that has the parts of its classic API that the adapter uses."""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from selfdistill.environments import Environment, EnvironmentFactory, Step, make_environment
from selfdistill.errors import UserError

TYPES = """
    import time
    from dataclasses import dataclass, field

    @dataclass
    class Span:
        end: float = 0.0

    @dataclass
    class RolloutTiming:
        generation: Span = field(default_factory=Span)

    class State(dict):
        '''Keys of the input are read through it, as the library's state does.'''
        def __getitem__(self, key):
            if key in ("prompt", "answer", "info", "example_id") and key in self.get("input", {}):
                return dict.__getitem__(self, "input")[key]
            return dict.__getitem__(self, key)

        def get(self, key, default=None):
            return dict.get(self, key, default) if key == "input" or key not in self else self[key]

    @dataclass
    class Tool:
        name: str
        description: str
        parameters: dict

    @dataclass
    class ToolCall:
        id: str
        name: str
        arguments: str

    @dataclass
    class Message:
        role: str
        content: str | list
        tool_calls: list | None = None
        tool_call_id: str | None = None
"""
MESSAGES = """
    from verifiers.types import Message, ToolCall

    def normalize_messages(value):
        made = []
        for one in value:
            if isinstance(one, dict):
                calls = [ToolCall(**call) for call in one.get("tool_calls") or ()] or None
                one = Message(one["role"], one["content"], calls, one.get("tool_call_id"))
            made.append(one)
        return made
"""
WORLD = """
    import asyncio, json
    from verifiers.types import Message, Tool

    class Rubric:
        async def score_rollout(self, state):
            last = state["completion"][-1]
            state["reward"] = float(last.content == state["answer"]) * state.get("scale", 1)

    class World:
        '''A ToolEnv: stops when a reply has no call, after three turns, or where the environment says so.'''
        loaded, cleaned = [], []
        tool_defs = [Tool("add", "Add.", {"type": "object", "properties": {"a": {"type": "integer"}}})]
        rubric = Rubric()

        def __init__(self):
            self.loaded.append(1)

        async def setup_state(self, state):
            state["sum"] = 0

        async def is_completed(self, state):
            last = state["trajectory"][-1]["completion"][-1]
            return len(state["trajectory"]) > 2 or not last.tool_calls

        async def env_response(self, messages, state):
            made = []
            for call in messages[-1].tool_calls:
                added = json.loads(call.arguments)["a"]
                if added < 0:
                    await asyncio.sleep(60)
                state["sum"] += added
                made.append({"role": "tool", "content": f"sum {state['sum']}", "tool_call_id": call.id})
            if state["sum"] > 9:
                state["final_env_response"] = made
            return made

        async def cleanup(self, state):
            self.cleaned.append(state["sum"])
            last = state["trajectory"][-1]
            state["completion"] = (last["prompt"] + last["completion"])[len(state["prompt"]):]
            assert state["timing"].generation.end == 0

    World.time_limit = 0.3
"""
ROW = {"prompt": [{"role": "user", "content": "Add 2 and 3."}], "answer": "5", "scorer": None}


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EnvironmentFactory:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    files = {"verifiers/__init__.py": "", "verifiers/types.py": TYPES, "verifiers/utils/__init__.py": ""}
    files |= {"verifiers/utils/message_utils.py": MESSAGES, "verified_world.py": WORLD}
    for name in [name for name in sys.modules if name.partition(".")[0] in ("verifiers", "verified_world")]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
    return make_environment("python:verified_world.World")


def add(number: int, **more: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": number}}, **more}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def reply(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_calls_go_to_the_object_and_its_rubric_judges(factory: EnvironmentFactory) -> None:
    environment = factory()
    assert isinstance(environment, Environment)
    assert environment.tools[0]["function"]["name"] == "add"
    assert environment.reset(ROW) == []
    first = {"role": "tool", "name": "add", "content": "sum 2"}
    assert environment.step(add(2)) == Step((first,))
    second = {"role": "tool", "name": "add", "tool_call_id": "x", "content": "sum 5"}
    assert environment.step(add(3, id="x")) == Step((second,))
    assert environment.step(reply("5")) == Step(done=True, reward=1.0)
    environment.close()


def test_a_function_that_imports_the_library_is_called_in_the_main_thread(
    factory: EnvironmentFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = """
    import threading

    def load():
        import verifiers
        from verified_world import World
        World.loaded.append(threading.current_thread() is threading.main_thread())
        return World()
    """
    (tmp_path / "verified_later.py").write_text(textwrap.dedent(text), encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "verifiers"]:
        monkeypatch.delitem(sys.modules, name)
    environment = make_environment("python:verified_later.load")()
    assert environment.reset(ROW) == []
    assert sys.modules["verified_world"].World.loaded == [1, True, 1]


def test_episodes_share_the_object_and_not_the_state(factory: EnvironmentFactory) -> None:
    one, other = factory(), factory()
    for environment in (one, other):
        environment.reset(ROW)
    assert one.step(add(2)).observations[0]["content"] == "sum 2"
    assert other.step(add(3)).observations[0]["content"] == "sum 3"
    assert one.step(reply("4")) == Step(done=True, reward=0.0)
    assert len(sys.modules["verified_world"].World.loaded) == 1


def test_its_stop_conditions_and_final_response_end_the_episode(factory: EnvironmentFactory) -> None:
    environment = factory()
    environment.reset(ROW)
    assert [environment.step(add(1)).done for _ in range(3)] == [False, False, True]
    environment.reset(ROW)
    assert environment.step(add(10)).done


def test_an_invalid_message_a_failure_and_a_hang_do_not_stop_the_run(factory: EnvironmentFactory) -> None:
    environment = factory()
    environment.reset(ROW)
    step = environment.step({**reply("<tool_call>"), "invalid": "no JSON"})
    assert step == Step(({"role": "user", "content": "Error: no JSON"},), invalid_calls=1)
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    step = environment.step({**reply(""), "tool_calls": [call]})
    assert step == Step(done=True, reward=0.0, feedback="env_response failed: KeyError: 'a'", failed=True)
    environment.reset(ROW)
    step = environment.step(add(-1))
    assert (step.done, step.reward) == (True, 0.0)
    assert step.feedback == "env_response failed: it took longer than 0.3 s"


def test_every_episode_is_cleaned_up_once(factory: EnvironmentFactory) -> None:
    cleaned = sys.modules["verified_world"].World.cleaned
    factory().close()  # not begun
    for message in (add(1), {**add(2), "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}, reply("5")):
        environment = factory()
        environment.reset(ROW)
        environment.step(add(3))
        environment.step(message)
        environment.close()
        environment.close()
    assert cleaned == [4, 3, 3]
    environment = factory()
    environment.reset(ROW)
    environment.close()  # the world's own cleanup fails, because nothing was said
    assert cleaned == [4, 3, 3, 0]


def test_a_reward_above_one_is_the_users_mistake(factory: EnvironmentFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = factory()
    environment.reset(ROW)
    monkeypatch.setattr(sys.modules["verified_world"].Rubric, "score_rollout", score_two)
    with pytest.raises(UserError, match=r"environment 'python:verified_world\.World': its rubric returned 2\.0, exp"):
        environment.step(reply("5"))


@pytest.mark.parametrize(
    ("name", "value", "role"),
    [("system_prompt", "Be brief.", "system"), ("few_shot", [{"role": "user", "content": "1"}], "assistant")],
)
def test_turns_at_the_beginning_that_the_row_lacks_are_refused(
    factory: EnvironmentFactory, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, role: str
) -> None:
    monkeypatch.setattr(sys.modules["verified_world"].World, name, value, raising=False)
    with pytest.raises(
        UserError, match=f"the object has a {name}, but the row's prompt has no turn of the {role}; put"
    ):
        factory().reset(ROW)
    with pytest.raises(UserError, match=f"the object has a {name}"):
        factory().reset({**ROW, "prompt": "Add."})
    assert factory().reset({**ROW, "prompt": [{"role": role, "content": "Be brief."}, *ROW["prompt"]]}) == []


def test_tools_of_another_form_are_refused(factory: EnvironmentFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["verified_world"].World, "tool_defs", [{"name": "add"}])
    with pytest.raises(UserError, match=r"^environment 'python:verified_world.World': its tool_defs cannot be read: "):
        factory()


def test_a_long_response_is_cut_and_its_parts_are_joined(
    factory: EnvironmentFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = sys.modules["verified_world"].World
    parts: list[dict[str, Any]] = [{"type": "text", "text": "a" * 1500}, {"type": "text", "text": "b" * 1500}]

    async def respond(_self: Any, _messages: Any, _state: Any) -> Any:
        return [{"role": "user", "content": parts}]

    monkeypatch.setattr(world, "env_response", respond)
    environment = factory()
    environment.reset(ROW)
    step = environment.step(add(1))
    assert step.observations == ({"role": "user", "content": "a" * 1500 + "b" * 500 + " ... (cut)"},)
    assert step.shortened == 3000
    parts[0] = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(UserError, match="a message has a part of type 'image_url', expected only text"):
        environment.step(add(1))


def test_an_episode_is_cleaned_up_once_its_late_call_has_ended(
    factory: EnvironmentFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, ended = sys.modules["verified_world"].World, threading.Event()

    async def respond(_self: Any, _messages: Any, _state: Any) -> None:
        ended.wait(60)

    monkeypatch.setattr(world, "env_response", respond)
    environment = factory()
    environment.reset(ROW)
    assert environment.step(add(1)).failed
    environment.close()
    environment.close()
    assert world.cleaned == []
    ended.set()
    time.sleep(0.2)
    assert world.cleaned == [0]


async def score_two(_self: Any, state: Any) -> None:
    state["reward"] = 2.0


def test_without_the_library_its_form_is_refused(factory: EnvironmentFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.types", None)
    with pytest.raises(UserError, match=r"verifiers cannot be used: .*; install"):
        factory().reset(ROW)
