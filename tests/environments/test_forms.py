"""Users' environments of every form, by name: what each is asked, what its answers become, and what is refused."""

from __future__ import annotations

import itertools
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_worlds

from selfdistill.config import EpisodeSettings
from selfdistill.data import Demonstration
from selfdistill.environments import Environment, EnvironmentFactory, Step, make_environment
from selfdistill.errors import UserError
from selfdistill.methods import begun

NUMBERS = itertools.count()
Make = Callable[..., EnvironmentFactory]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes the environment that a module of the current folder defines."""
    monkeypatch.chdir(tmp_path)

    def from_text(text: str, name: str = "World") -> EnvironmentFactory:
        module = f"own_world_{next(NUMBERS)}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        return make_environment(f"python:{module}.{name}")

    return from_text


def said(text: str, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}


ROW = {"prompt": "Count to 3.", "answer": 3, "document": None}

# --- names ---


@pytest.mark.parametrize("name", ["", "shop", "bundled:", "bundled:bank", "hub:shop", "none"])
def test_an_unknown_name_names_what_there_is(name: str) -> None:
    with pytest.raises(UserError) as caught:
        make_environment(name)
    expected = f"unknown environment {name!r}, expected bundled:shop or python:package.module.Class"
    assert str(caught.value) == expected


def test_what_cannot_be_imported_or_made_is_one_line(make: Make) -> None:
    wrong = {
        "python:here": "expected python:package.module.class",
        "python:os.path": "'os' is in the standard library; name your own module",
        "python:no_such_module_x.World": "module 'no_such_module_x' cannot be imported from",
    }
    for name, problem in wrong.items():
        with pytest.raises(UserError, match=r"^environment ") as caught:
            make_environment(name)
        assert problem in str(caught.value)
    bodies = {
        "Earth = 1": "has no class 'World'",
        "class Wrold: pass": "has no class 'World'; did you mean Wrold?",
        "World = 3": "has no class 'World'",
        "class World:\n    def __init__(self, size): pass": "creating it failed: TypeError:",
        "class World:\n    pass": "the class has no method reset; for the forms see docs/agents.md",
        "class World:\n    def reset(self): pass": "the class has reset, but neither a method step nor public methods",
        "class World:\n    def reset(self): pass\n    def go(self, a): pass": "tool World.go: no schema:",
        "def World():\n    raise ValueError('a\\nb')": "creating it failed: ValueError: a b",
        "import sys\ndef World():\n    sys.exit()": "creating it failed: SystemExit",
        "def World():\n    return 3": "the function returned an object of type 'int', expected an environment",
        "def World():\n    return None": "the function returned an object of type 'NoneType', expected an",
        "class Bare: pass\ndef World():\n    return Bare()": "the class 'Bare' has no method reset",
    }
    for value in ("None", "'ten'", "True", "0", "-1", "float('inf')", "float('nan')"):
        body = f"class World:\n    time_limit = {value}\n    def reset(self): pass\n    def step(self, a): pass"
        bodies[body] = f"its time_limit is {eval(value)!r}, expected a number above 0, at most 1,000,000,000"
        bodies[body.replace("time", "observation")] = (
            f"its observation_limit is {eval(value)!r}, expected a whole number"
        )
    bodies[OWN.replace('[{"type": "function", "function"', '[int, {"type": "function", "function"')] = (
        "tools[0] is 'type', expected a JSON schema"
    )
    for body, problem in bodies.items():
        with pytest.raises(UserError) as caught:
            make(body)
        assert problem in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_function_is_called_once_to_try_it_and_not_in_the_main_thread(make: Make) -> None:
    body = """
    import threading
    made = []

    class Bare:
        def reset(self): pass
        def step(self, a): pass

    def World():
        made.append(threading.current_thread() is threading.main_thread())
        return Bare()
    """
    make(body)
    assert sys.modules[f"own_world_{next(NUMBERS) - 1}"].made == [False]


# --- functions ---

ADD = """
    def add(a: int, b: int = 1) -> int:
        '''Add.

        Args:
            a: one
            b: the other
        '''
        return a + b

    def fail() -> None:
        '''Fail.'''
        raise ValueError("as always")

"""


@pytest.mark.parametrize("given", ["[add, fail]", "(add, fail)"])
def test_functions_are_an_environment_of_tools_that_does_not_judge(make: Make, given: str) -> None:
    factory = make(ADD + f"    TOOLS = {given}", "TOOLS")
    assert not factory.judges
    environment = factory()
    assert isinstance(environment, Environment)
    names = [tool["function"]["name"] for tool in environment.tools]
    assert names == ["add", "fail"]
    assert environment.tools[0]["function"]["parameters"]["required"] == ["a"]
    assert environment.reset(ROW) == []
    step = environment.step(said("", ("add", {"a": 2}), ("fail", {}), ("sub", {})))
    told = ["3", "Error: fail: ValueError: as always", "Error: unknown tool 'sub', expected one of add, fail"]
    assert [one["content"] for one in step.observations] == told
    assert (step.done, step.reward, step.invalid_calls) == (False, None, 1)
    assert environment.step(said("Three.")) == Step(done=True)
    environment.close()
    environment.close()


BAD_LISTS: dict[str, str] = {
    "[]": "found an empty list, expected functions that the model may call",
    "[add, 3]": "item 1 is 3, expected a function that the model may call",
    "['add']": "item 0 is 'add', expected a function that the model may call",
    "[dict]": "item 0 is <class 'dict'>, expected a function that the model may call",
    "[add, add]": "two tools are named 'add', expected distinct names",
    "[add, lambda a: a]": "tool <lambda>: no schema: ",
    "{add}": "has no class 'TOOLS'; expected one, or a list of functions",
}


@pytest.mark.parametrize("given", BAD_LISTS)
def test_a_list_of_anything_else_is_one_line(make: Make, given: str) -> None:
    with pytest.raises(UserError, match=r"^environment 'python:own_world_\d+.TOOLS': ") as caught:
        make(ADD + f"    TOOLS = {given}", "TOOLS")
    assert BAD_LISTS[given] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_functions_in_python_have_a_name_in_this_process() -> None:
    name = EpisodeSettings(environment=[tiny_worlds.look_up, tiny_worlds.count]).environment
    assert name == "functions:look_up,count"
    assert EpisodeSettings(environment=tiny_worlds.FUNCTIONS).environment == name
    assert EpisodeSettings(environment=name).environment == name
    first = make_environment(name)
    assert first is make_environment(name)
    assert first().step(said("", ("count", {"number": 6}))).observations[0]["content"] == "7"

    def count() -> str:
        """Count."""
        return "many"

    assert EpisodeSettings(environment=(tiny_worlds.look_up, count)).environment == name
    assert make_environment(name)().step(said("", ("count", {}))).observations[0]["content"] == "many"
    (row,) = begun(name, [Demonstration("Count.")])
    assert row.tools is not None
    assert row.tools[1]["function"]["description"] == "Count."
    EpisodeSettings(environment=tiny_worlds.FUNCTIONS)
    (row,) = begun(name, [Demonstration("Count.")])  # an edited cell of a notebook: its tools are the new ones
    assert row.tools is not None
    assert row.tools[1]["function"]["description"] == "Count one further."


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([], "setting 'environment': found an empty list, expected functions that the model may call"),
        (["bundled:shop"], "setting 'environment': item 0 is 'bundled:shop', expected a function that the model may"),
        ([len], "setting 'environment': tool len: "),
        (tiny_worlds.count, "expected: a class, a list of functions, or a name as python:package.module.Class"),
        (dict, "environment 'class:dict': the class has no method reset; for the forms see docs/agents.md"),
        (3, "setting 'environment': found 3, expected: text"),
    ],
)
def test_an_environment_in_python_that_is_none_is_one_line(given: Any, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        EpisodeSettings(environment=given)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["functions:gone", "class:Gone"])
def test_what_another_process_was_given_has_to_be_given_again(name: str) -> None:
    with pytest.raises(UserError) as caught:
        make_environment(name)
    assert str(caught.value) == (
        f"environment {name!r}: it was given in Python, in another process; give it again as environment=..., or put "
        "it into a module and name it python:package.module.name"
    )


def test_a_class_in_python_has_a_name_in_this_process() -> None:
    def made(reward: float) -> type:
        class World:
            def reset(self) -> None:
                self.reward = reward

            def wait(self) -> str:
                """Wait."""
                return "waited"

        return World

    World = made(0.5)
    name = EpisodeSettings(environment=World).environment
    assert name == EpisodeSettings(environment=name).environment == "class:World"
    first = make_environment(name)
    EpisodeSettings(environment=World)
    assert make_environment(name) is first
    for given, reward in ((World, 0.5), (made(1.0), 1.0)):  # the second an edited cell of a notebook
        environment = make_environment(EpisodeSettings(environment=given).environment)()
        environment.reset({"prompt": "Wait."})
        assert environment.step(said("", ("wait", {}))).observations[0]["content"] == "waited"
        assert environment.step(said("Done.")).reward == reward
        environment.close()


# --- the protocol itself ---

OWN = """
    import time
    from selfdistill.environments import Step

    class World:
        time_limit = 0.3
        closed = []

        def __init__(self):
            self.tools = [{"type": "function", "function": {"name": "go", "description": "", "parameters": {}}}]

        def reset(self, row):
            self.answer = row.pop("answer")
            return [{"role": "user", "content": "Go.\\x00"}]

        def step(self, message):
            if message["content"] == "fail":
                raise KeyError("x")
            if message["content"] == "sleep":
                time.sleep(1)
            if message["content"] == "odd":
                return ("text", 1.0)
            if message["content"] == "mute":
                return Step()
            if message["content"] == "long":
                return Step(({"role": "user", "content": "\\x1b" + "x" * 3000},))
            if message["content"] == "early":
                return Step(({"role": "user", "content": "Well."},), reward=1.0)
            if message["content"] == "much":
                return Step(done=True, reward=3.0)
            if message["content"] == str(self.answer):
                return Step(done=True, reward=1.0, feedback="good")
            return Step(({"role": "user", "content": "No."},))

        def close(self):
            self.closed.append(1)
"""


RETURNS = """
    from selfdistill.environments import Step

    class World:
        tools = []
        def reset(self, row): return []
        def step(self, message): return Step({}, {})
        def close(self): pass
"""


@pytest.mark.parametrize("observations", ["None", "('You won.',)", "5", "[]"])
def test_observations_of_a_finished_step_are_not_read(make: Make, observations: str) -> None:
    environment = make(RETURNS.replace("{}, {}", f"{observations}, True, 1.0"))()
    environment.reset(ROW)
    assert environment.step(said("3")) == Step(done=True, reward=1.0)
    environment.close()


@pytest.mark.parametrize("reward", ["numpy.float32(1)", "numpy.mean([1.0, 1.0])", "torch.tensor(1.0)", "True"])
def test_a_reward_of_the_protocol_is_a_plain_number(make: Make, reward: str) -> None:
    environment = make("import numpy, torch\n" + textwrap.dedent(RETURNS).replace("{}, {}", f"(), True, {reward}"))()
    environment.reset(ROW)
    step = environment.step(said("3"))
    assert (step, type(step.reward)) == (Step(done=True, reward=1.0), float)
    environment.close()


@pytest.mark.parametrize("returned", ["reward=1.0, feedback=5", "reward=(1.0, 'no'), feedback='well'"])
def test_what_is_no_reward_or_no_feedback_is_a_mistake(make: Make, returned: str) -> None:
    environment = make(RETURNS.replace("{}, {}", f"(), True, {returned}"))()
    environment.reset(ROW)
    with pytest.raises(UserError, match=r"step returned \(.*\), expected True or False, a reward from 0 to 1, or"):
        environment.step(said("3"))
    environment.close()


def test_observations_may_be_a_generator(make: Make) -> None:
    made = "(dict(role='user', content=one) for one in 'ab'), False"
    environment = make(RETURNS.replace("{}, {}", made))()
    environment.reset(ROW)
    assert environment.step(said("3")).observations == tuple({"role": "user", "content": one} for one in "ab")
    environment.close()


@pytest.mark.parametrize(
    ("observations", "problem"),
    [
        ("None", "step returned neither observations nor the end, expected one of them"),
        ("5", "step returned the observations 5, expected messages"),
        ("'text'", "step returned the observations 'text', expected messages"),
    ],
)
def test_observations_that_are_no_messages_are_a_mistake(make: Make, observations: str, problem: str) -> None:
    environment = make(RETURNS.replace("{}, {}", f"{observations}, False"))()
    environment.reset(ROW)
    with pytest.raises(UserError, match=problem):
        environment.step(said("3"))
    environment.close()


def test_a_call_that_runs_while_its_object_is_closed_is_not_stopped(make: Make) -> None:
    text = """
    import threading, time

    class World:
        time_limit, begun, closed = 0.1, threading.Event(), []
        def reset(self):
            self.begun.set()
            for _ in range(80): time.sleep(0.01)
            self.closed.append("not yet")
        def go(self): 'Go.'
        def close(self): self.closed.append("closed")
    """
    environment = make(text)()
    world = sys.modules[f"own_world_{next(NUMBERS) - 1}"].World
    world.closed.clear()  # another one was made to see its form
    running = threading.Thread(target=environment.reset, args=(ROW,))
    running.start()
    world.begun.wait(10)
    closing = [threading.Thread(target=environment.close) for _ in range(8)]
    for thread in closing:
        thread.start()
    for thread in (*closing, running):
        thread.join()
    time.sleep(0.2)
    assert world.closed == ["not yet", "closed"]


def test_a_class_of_the_protocol_is_used_as_it_is(make: Make) -> None:
    environment = make(OWN)()
    assert isinstance(environment, Environment)
    assert environment.tools[0]["function"]["name"] == "go"
    row = dict(ROW)
    assert environment.reset(row) == [{"role": "user", "content": "Go."}]
    assert row == ROW
    assert environment.step(said("2")) == Step(({"role": "user", "content": "No."},))
    assert environment.step(said("3")) == Step(done=True, reward=1.0, feedback="good")
    step = environment.step(said("long"))
    assert (step.observations[0]["content"], step.shortened) == ("x" * 1999 + " ... (cut)", 3001)
    begun = time.monotonic()
    environment.close()
    environment.close()
    assert time.monotonic() - begun < 0.2


@pytest.mark.parametrize(
    ("text", "feedback"), [("fail", "step failed: KeyError: 'x'"), ("sleep", "step failed: it took longer than 0.3 s")]
)
def test_a_step_that_fails_ends_the_episode_with_nothing(make: Make, text: str, feedback: str) -> None:
    environment = make(OWN)()
    environment.reset(ROW)
    assert environment.step(said(text)) == Step(done=True, reward=0.0, feedback=feedback, failed=True)
    begun = time.monotonic()
    environment.close()
    assert time.monotonic() - begun < 1


def test_what_a_class_may_not_return_is_the_users_mistake(make: Make) -> None:
    environment = make(OWN)()
    environment.reset(ROW)
    with pytest.raises(UserError, match=r"environment 'python:own_world_\d+.World': step returned .*expected a Step"):
        environment.step(said("odd"))
    with pytest.raises(UserError, match=r"step returned 3\.0, expected True or False, a reward from 0 to 1"):
        environment.step(said("much"))
    with pytest.raises(UserError, match="step returned neither observations nor the end"):
        environment.step(said("mute"))
    with pytest.raises(UserError, match="step returned a reward before the end"):
        environment.step(said("early"))
    environment = make(OWN.replace("return [{", "return 'Go.' or [{"))()
    with pytest.raises(UserError, match=r"reset returned 'Go\.', expected a list of messages"):
        environment.reset(ROW)
    wrong = {
        '"tool_calls": [1], "role": "user"': "a message has the key 'tool_calls', expected only role, content, name",
        '"role": "assistant"': "a message has the role 'assistant', expected user or tool",
        '"role": "developer"': "a message has the role 'developer', expected user or tool",
        '"to": "user"': r"reset returned \[{'to': 'user'.*, expected a list of messages",
    }
    for message, problem in wrong.items():
        environment = make(OWN.replace('"role": "user", "content": "Go.', message + ', "content": "Go.'))()
        with pytest.raises(UserError, match=f"^environment 'python:own_world_.*': {problem}"):
            environment.reset(dict(ROW))
    wrong = {
        '{"role": "system", "content": "No."}': "a message has the role 'system', expected user or tool",
        '{"role": "user", "content": [{"type": "image"}]}': "a message has a part of type 'image', expected only text",
        '"No."': r"step returned the observations \('No\.',\), expected messages",
    }
    for message, problem in wrong.items():
        environment = make(OWN.replace('{"role": "user", "content": "No."}', message))()
        environment.reset(ROW)
        with pytest.raises(UserError, match=f"^environment 'python:own_world_.*': {problem}"):
            environment.step(said("2"))
    with pytest.raises(UserError, match="reset failed: KeyError: 'answer'"):
        environment.reset({"prompt": "a"})


def test_parts_of_text_are_joined(make: Make) -> None:
    parts = '[{"type": "text", "text": "Go "}, {"type": "text", "text": "on."}]'
    environment = make(OWN.replace('"Go.\\x00"', parts).replace('"No."', parts))()
    assert environment.reset(ROW) == [{"role": "user", "content": "Go on."}]
    assert environment.step(said("2")).observations == ({"role": "user", "content": "Go on."},)


# --- TRL's classes of tools ---

TOOLS = """
    import sqlite3

    class Base:
        def first(self) -> str:
            '''Say who is first.'''
            return "base"

    class World(Base):
        def __init__(self):
            self.database = sqlite3.connect(":memory:")  # belongs to the thread that made it

        def reset(self, **columns) -> str | None:
            self.columns, self.number = columns, 0
            return "Begin." if columns["document"] else None

        def increment(self, by: int) -> int:
            '''Increment the counter.

            Args:
                by: how much
            '''
            self.database.execute("SELECT 1")
            self.number += by
            return self.number

        def _secret(self): pass

        @property
        def now(self): raise RuntimeError

        def close(self): self.database.close()
"""
GYM = """
    class World:
        def reset(self, *, seed=None, options=None):
            self.at, self.goal = 0, options["answer"]
            return f"seed {seed}", {}

        def step(self, action):
            self.at += 1
            right = action == str(self.goal)
            return f"heard {action}", 1.0 if right else 0.0, right, self.at > 2, {}
"""
METHOD = """
        def reward(self, reply: str):
            return (self.number == self.columns["answer"] and "3" in reply), "not three"
"""


def test_public_methods_are_tools_and_the_episode_ends_without_a_call(make: Make) -> None:
    environment = make(TOOLS + METHOD)()
    assert isinstance(environment, Environment)
    assert [one["function"]["name"] for one in environment.tools] == ["first", "increment"]
    assert environment.reset(ROW) == []
    step = environment.step(said("Well:", ("increment", {"by": 1}), ("first", {}), ("increment", {"by": "1"})))
    assert [one["content"] for one in step.observations][:2] == ["1", "base"]
    assert (step.done, step.reward, step.invalid_calls) == (False, None, 1)
    assert environment.step(said("3")) == Step(done=True, reward=0.0, feedback="not three")
    environment.step(said("", ("increment", {"by": 2})))
    assert environment.step(said("It is 3.")).reward == 1
    assert environment.reset({**ROW, "document": "a"}) == [{"role": "user", "content": "Begin."}]
    environment.close()


def test_an_invalid_message_does_not_end_the_episode(make: Make) -> None:
    environment = make(TOOLS + METHOD)()
    environment.reset(ROW)
    step = environment.step({**said("<tool_call>"), "invalid": "no JSON"})
    assert step == Step(({"role": "user", "content": "Error: no JSON"},), invalid_calls=1)


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        ("        def end(self):\n            'End.'\n            self.reward = 1", Step(done=True)),
        ("", Step(done=True)),
        ("        reward = 0.25", Step(done=True, reward=0.25)),
        ("        reward = True", Step(done=True, reward=1.0)),
        ("        def reward(self): return 0.5", Step(done=True, reward=0.5)),
    ],
)
def test_a_reward_is_an_attribute_or_a_method_or_nobodys(make: Make, reward: str, found: Step) -> None:
    factory = make(TOOLS + reward)
    environment = factory()
    environment.reset(ROW)
    assert environment.step(said("Done.")) == found
    assert factory.judges == bool(reward)


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ("        reward = 2", "reward returned 2, expected True or False, a reward from 0 to 1"),
        ("        def reward(self): return None", "reward returned None, expected True or False"),
        ("        def reward(self): return self.nothing", "reward failed: AttributeError:"),
    ],
)
def test_a_reward_that_is_none_is_the_users_mistake(make: Make, reward: str, problem: str) -> None:
    environment = make(TOOLS + reward)()
    environment.reset(ROW)
    with pytest.raises(UserError, match=f"environment 'python:own_world_.*': {problem}"):
        environment.step(said("Done."))


@pytest.mark.parametrize("parameters", ["row", "answer", "answer, prompt", "answer, **others", "*, answer, size=2"])
def test_reset_takes_the_row_or_its_columns(make: Make, parameters: str) -> None:
    text = f"""
    class World:
        def reset(self, {parameters}):
            self.seen = row["answer"] if "row" in vars() else answer
        def see(self) -> int:
            '''See.'''
            return self.seen
    """
    environment = make(text)()
    environment.reset(ROW)
    assert environment.step(said("", ("see", {}))).observations[0]["content"] == "3"


@pytest.mark.parametrize(
    ("base", "parameters", "problem"),
    [
        (TOOLS, "answer", "the row has no column 'answer', which reset takes"),
        (
            TOOLS,
            "size",
            r"reset takes 'size', expected only row or columns of the data: prompt, .*\(docs/data.md\)",
        ),
        (GYM, "answer", r"reset takes 'answer', expected only row, options, seed"),
    ],
)
def test_what_reset_takes_and_is_not_there(make: Make, base: str, parameters: str, problem: str) -> None:
    environment = make(base + f"\n        def reset(self, {parameters}): pass\n")()
    with pytest.raises(UserError, match=f"^environment 'python:own_world_.*': {problem}"):
        environment.reset({"prompt": "Count."})


def test_a_public_method_that_is_no_tool_says_how_to_leave_it_out(make: Make) -> None:
    wrong = {
        "def go(self, a: int): return a": r"no docstring; write one, with a line for each argument under 'Args:'",
        "def go(self, a: int): 'Go.'": r"'a'.*; give each argument a line under 'Args:' of the docstring",
        "def go(self, a: int): 'Go.\\n\\nArgs:\\n    a (int): it'": r"of the docstring, as 'a: ...' without a type",
        "def go(self, a): 'Go.'": r"; give each argument a type hint and a line under 'Args:' of the docstring",
    }
    for method, problem in wrong.items():
        text = f"class World:\n    def reset(self): pass\n    {method}"
        with pytest.raises(UserError, match=f"tool World.go: no schema: .*{problem}; if the model should not call it,"):
            make(text)


HANGS = """
        time_limit = 0.2

        def hang(self) -> str:
            '''Hang.'''
            import time
            time.sleep(1)
"""


def test_a_tool_that_hangs_leaves_an_episode_that_cannot_be_judged(make: Make) -> None:
    environment = make(TOOLS + METHOD + HANGS)()
    environment.reset(ROW)
    assert environment.step(said("", ("hang", {}))).observations[0]["content"].endswith("longer than 0.2 s")
    found = environment.step(said("3"))
    assert (found.reward, found.feedback) == (0.0, "a tool is still running, so the episode cannot be judged")
    environment.close()


@pytest.mark.parametrize("reward", ["self.reward = 1.0", "type(self).reward = property(lambda self: 1.0)"])
def test_a_tool_that_hangs_hides_a_reward_that_was_set(make: Make, reward: str) -> None:
    begins = f"        def reset(self, **columns):\n            {reward}\n"
    environment = make(TOOLS + begins + HANGS)()
    environment.reset(ROW)
    environment.step(said("", ("hang", {})))
    found = environment.step(said("3"))
    assert (found.reward, found.feedback) == (0.0, "a tool is still running, so the episode cannot be judged")
    environment.close()


def test_an_object_is_closed_once_its_late_call_has_ended(make: Make) -> None:
    text = """
    import threading

    class World:
        time_limit, ended, closed = 0.2, threading.Event(), []
        def reset(self): self.closed.clear()
        def hang(self):
            'Hang.'
            self.ended.wait(60)
        def close(self): self.closed.append(threading.get_ident())
    """
    environment = make(text)()
    environment.reset(ROW)
    environment.step(said("", ("hang", {})))
    world = sys.modules[f"own_world_{next(NUMBERS) - 1}"].World
    begun = time.monotonic()
    environment.close()
    environment.close()
    assert time.monotonic() - begun < 0.2
    assert world.closed == []
    world.ended.set()
    time.sleep(0.2)
    assert len(world.closed) == 1


def test_a_tool_that_hangs_gives_no_reward_where_there_is_none(make: Make) -> None:
    environment = make(TOOLS + HANGS)()
    environment.reset(ROW)
    environment.step(said("", ("hang", {})))
    assert environment.step(said("3")) == Step(done=True)
    environment.close()


def test_a_reward_may_be_a_property_that_uses_the_thread(make: Make) -> None:
    body = """
        @property
        def reward(self):
            return self.database.execute("SELECT 1").fetchone() == (1,)
    """
    environment = make(TOOLS + body)()
    environment.reset(ROW)
    assert environment.step(said("3")) == Step(done=True, reward=1.0)
    fails = make(TOOLS + body.replace("return", "return self.nothing or"))()
    fails.reset(ROW)
    with pytest.raises(UserError, match=r"reward failed: AttributeError: .* has no attribute 'nothing'"):
        fails.step(said("3"))


# --- Gymnasium and OpenEnv ---


def test_a_gymnasium_class_reads_replies_as_text(make: Make) -> None:
    factory = make(GYM)
    environment = factory()
    assert isinstance(environment, Environment)
    assert environment.tools == []
    first = environment.reset(ROW)
    assert first == factory().reset(ROW) != factory().reset({**ROW, "answer": 4})
    assert 0 <= int(first[0]["content"].removeprefix("seed ")) < 2**31
    assert environment.step(said("1")) == Step(({"role": "user", "content": "heard 1"},))
    assert environment.step(said("3")) == Step(done=True, reward=1.0, feedback="heard 3")
    environment.reset(ROW)
    assert [environment.step(said("1")).done for _ in range(3)] == [False, False, True]
    environment.close()


@pytest.mark.parametrize("parameters", ["**kwargs", "row=None, **kwargs", "*, seed, **kwargs"])
def test_reset_with_any_keyword_gets_the_seed_and_the_row(make: Make, parameters: str) -> None:
    body = GYM.replace("*, seed=None, options=None", parameters).replace('options["answer"]', "3")
    environment = make(body.replace('f"seed {seed}"', "sorted(kwargs)"))()
    passed_on = '["options"]' if "seed" in parameters else '["options", "seed"]'
    assert environment.reset(ROW) == [{"role": "user", "content": passed_on}]


LONG = """
    class World:
        observation_limit = 100
        def reset(self): return "x" * 5000
        def step(self, a): return "y" * int(a), 0, False, {}
"""


def test_the_class_sets_how_much_of_an_observation_is_read(make: Make) -> None:
    environment = make(LONG)()
    assert environment.reset(ROW)[0]["content"] == "x" * 5000  # a task is never cut
    assert environment.step(said("100")) == Step(({"role": "user", "content": "y" * 100},))
    cut = environment.step(said("150"))
    assert cut == Step(({"role": "user", "content": "y" * 100 + " ... (cut)"},), shortened=150)
    environment = make(LONG.replace("100", "3000"))()
    assert environment.step(said("3000")).shortened == 0
    tools = make(TOOLS + "        observation_limit = 2")()
    tools.reset(ROW)
    assert tools.step(said("", ("first", {}))).observations[0]["content"] == "ba ... (cut)"


def test_an_observation_whose_text_hangs_or_fails_ends_the_episode(make: Make) -> None:
    body = """
    import time

    class Odd:
        def __init__(self, what): self.what = what
        def __str__(self): return str(time.sleep(1) if self.what == "hang" else 1 / 0)

    class World:
        time_limit = 0.2
        def reset(self, answer=None): return "Begin."
        def step(self, a): return Odd(a), 0, False, {}
    """
    environment = make(body)()
    environment.reset(ROW)
    assert environment.step(said("fail")).feedback == "step failed: ZeroDivisionError: division by zero"
    assert environment.step(said("hang")).feedback == "step failed: it took longer than 0.2 s"
    environment = make(body.replace('"Begin."', "Odd(1)").replace("answer=None", ""))()
    with pytest.raises(UserError, match="reset failed: ZeroDivisionError"):
        environment.reset(ROW)


OPENENV = """
    from dataclasses import dataclass

    @dataclass
    class Result:
        observation: object
        reward: object
        done: bool

    class World:
        def reset(self):
            return Result({"board": [0, 1]}, None, False)

        def step(self, text):
            reward = {"half": 0.5, "text": "x"}.get(text)
            return Result(None if text == "quiet" else {"board": text}, reward, text != "quiet")
"""


def test_an_openenv_class_returns_objects(make: Make) -> None:
    environment = make(OPENENV)()
    assert environment.reset(ROW) == [{"role": "user", "content": '{"board": [0, 1]}'}]
    assert environment.step(said("quiet")) == Step(({"role": "user", "content": "(nothing)"},))
    assert environment.step(said("half")) == Step(done=True, reward=0.5, feedback='{"board": "half"}')
    environment.reset(ROW)
    with pytest.raises(UserError, match="step returned the reward 'x', expected a number"):
        environment.step(said("text"))


def test_an_array_as_observation_is_read_as_text(make: Make) -> None:
    body = """
    import numpy as np

    class World:
        def reset(self): return np.array([1, 2]), {}
        def step(self, text): return np.array([[0.5], [1.0]]), np.float32(0), np.bool_(text == "end"), False, {}
    """
    environment = make(body)()
    assert environment.reset(ROW) == [{"role": "user", "content": "[1 2]"}]
    assert environment.step(said("go")) == Step(({"role": "user", "content": "[[0.5]\n [1. ]]"},))
    assert environment.step(said("end")) == Step(done=True, reward=0.0, feedback="[[0.5]\n [1. ]]")


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ("'text'", r"step returned 'text', expected \(observation, reward, terminated, truncated, info\) or"),
        ("('a', 3.0, True, False, {})", "the sum of the episode's rewards, which step returned 3.0, expected"),
        (
            "Step(done=True, reward=3.0)",
            "step returned a Step, which needs a class that also has tools and close; add them",
        ),
        ("('a', float('nan'), True, {})", "the sum of the episode's rewards, which step returned nan, expected"),
    ],
)
def test_what_step_may_not_return_is_the_users_mistake(make: Make, returned: str, problem: str) -> None:
    imported = "from selfdistill.environments import Step\n"
    body = f"class World:\n    def reset(self): return ''\n    def step(self, a): return {returned}"
    environment = make(imported + body)()
    assert environment.reset(ROW) == []
    with pytest.raises(UserError, match=problem):
        environment.step(said("go"))


@pytest.mark.parametrize("steps", [3, 6, 9, 10])
def test_rewards_of_equal_steps_add_up_to_one(make: Make, steps: int) -> None:
    body = f"    def step(self, a): return 'b', 1 / {steps}, a == 'end', False, {{}}"
    environment = make("class World:\n    def reset(self): return 'a'\n" + body)()
    environment.reset(ROW)
    for _ in range(steps - 1):
        environment.step(said("go"))
    assert environment.step(said("end")).reward == 1


def test_a_gymnasium_class_reads_calls_in_a_reply_as_lines(make: Make) -> None:
    environment = make("class World:\n    def reset(self): return 'a'\n    def step(self, a): return a, 0, False, {}")()
    environment.reset(ROW)
    (heard,) = environment.step(said("North.", ("go", {"far": 2}))).observations
    assert heard["content"] == 'North.\nAction: go\nAction Input: {"far": 2}'


def test_thoughts_are_not_part_of_a_reply(make: Make) -> None:
    thought = "<think>\nNot 5.\n</think>\n\n"
    gym = make("class World:\n    def reset(self): return 'a'\n    def step(self, a): return a, 0, False, {}")()
    gym.reset(ROW)
    assert gym.step(said(f"{thought}7")).observations == ({"role": "user", "content": "7"},)
    shop = make_environment("bundled:shop")()
    shop.reset({"prompt": "How much?", "answer": {"number": 7}})
    assert shop.step(said(f"{thought}It is 7.")).reward == 1
    shop.close()


def test_a_gymnasium_step_that_fails_ends_the_episode(make: Make) -> None:
    environment = make("class World:\n    def reset(self): return 'a'\n    def step(self, a): return 1 / int(a)")()
    environment.reset(ROW)
    assert environment.step(said("x")).feedback.startswith("step failed: ValueError: invalid literal")
