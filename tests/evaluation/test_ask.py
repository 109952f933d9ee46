"""``ask``: with a system turn, the training rows' own or another, with a conversation, and in an environment."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_worlds
import yaml
from shared import CHATML, ENDS

import selfdistill as sd
from selfdistill.cli import main
from selfdistill.config.commands import EvalConfig
from selfdistill.config.train import TrainConfig
from selfdistill.evaluation import AskResult, evaluate
from selfdistill.model import LoadedModel, Rollout
from selfdistill.runtime import result_console
from selfdistill.training.train import train

WARD = {"role": "system", "content": "You keep the list of the ward."}
USER = {"role": "user", "content": "Where is Anna?"}
REPLY = {"role": "assistant", "content": "Room 4."}
SHARED = (
    f"asked with the system turn of all training rows, {WARD['content']!r}; set system to another, or to '' for none"
)


class Chats(list[list[dict[str, Any]]]):
    """Chats, with the options of the last call."""

    options: dict[str, Any]


@pytest.fixture
def asked(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chats:
    """The chats that the model is asked, in a folder with a run ``run`` on rows with the same system turn."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder(ends=ENDS), "run/final")
    Path("run/config.yaml").write_text(yaml.safe_dump({"model": "m", "data": "data.jsonl", "output_dir": "run"}))
    Path("run/metrics.jsonl").touch()
    rows_share(WARD)
    chats = Chats()

    def generate(_: Any, prompts: Any, **options: Any) -> list[str]:
        chats.extend(prompts)
        chats.options = options
        return ["Room 4."] * len(prompts)

    for module in ("selfdistill.evaluation.asked", "selfdistill.training.run"):
        monkeypatch.setattr(sys.modules[module], "generate", generate)
    return chats


def rows_share(turn: dict[str, str] | None) -> None:
    Path("run/system_turn.json").write_text(json.dumps(turn), encoding="utf-8")


@pytest.mark.parametrize(
    ("firsts", "shared"),
    [
        ([WARD, WARD], WARD),
        ([WARD, USER], None),
        ([WARD, {**WARD, "content": "Be brief."}], None),
        ([USER, USER], None),
    ],
)
def test_a_run_notes_the_system_turn_that_its_rows_share(
    firsts: list[dict[str, str]], shared: dict[str, str] | None, settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    rows = tmp_path / "shared.jsonl"
    chats = [[first, USER, REPLY] if first is not USER else [USER, REPLY] for first in firsts]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    config = settings(data=str(rows), method="sft", max_steps=1)
    train(config)
    assert json.loads((Path(config.output_dir) / "system_turn.json").read_text(encoding="utf-8")) == shared


def test_the_system_turn_of_all_training_rows_is_used(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "run", "Where is Anna?"]) == 0
    assert asked == [[WARD, USER]]
    assert f"note: {SHARED}" in capsys.readouterr().err


def test_a_model_inside_of_a_run_or_a_state_of_learn_is_asked_as_its_run_is(asked: Any) -> None:
    settings = yaml.safe_load(Path("run/config.yaml").read_text()) | {"chat_template_kwargs": {"thinks": True}}
    Path("run/config.yaml").write_text(yaml.safe_dump(settings))
    skill = Path("state/skills/0001-ward")
    shutil.copytree("run", skill / "run")
    shutil.copytree(skill / "run" / "final", skill / "model")
    stream = Path("state/skills/0002-stream")
    shutil.copytree("run", stream / "chunks" / "00003" / "run")
    shutil.copytree("run/final", stream / "model")
    for model in ("run/final", str(skill / "model"), str(stream / "model")):
        sd.ask(model, "Where is Anna?")
        assert asked.pop() == [WARD, USER]
        assert asked.options["chat_template_kwargs"] == {"thinks": True}


def test_a_model_is_not_asked_as_a_run_beside_it_is(asked: Any) -> None:
    shutil.copytree("run", "runs/run")
    shutil.copytree("run", "runs/model")
    Path("runs/model/system_turn.json").write_text("null", encoding="utf-8")
    shutil.copytree("run/final", "final")
    Path("config.yaml").write_text("state: memory\n", encoding="utf-8")
    for model in ("runs/model", "final"):
        sd.ask(model, "Where is Anna?")
        assert asked.pop() == [USER]


@pytest.mark.parametrize("turn", [WARD, None])
def test_an_export_says_what_it_is_to_be_asked_with(
    asked: Any, capsys: pytest.CaptureFixture[str], turn: dict[str, str] | None
) -> None:
    rows_share(turn)
    sd.export("run", output_dir="out")
    note = f"training used the system turn {WARD['content']!r}, which the exported folder does not store; use it in"
    assert (note in capsys.readouterr().err) == (turn is not None)


def test_the_training_rows_need_not_be_there_nor_valid(asked: Any) -> None:
    Path("data.jsonl").write_text("no row\n", encoding="utf-8")
    sd.ask("run", "Where is Anna?")
    assert asked == [[WARD, USER]]


def test_a_run_answers_as_ask_does(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sd.ask("run", "Where is Anna?")
    capsys.readouterr()
    run = sd.Run("run")
    for _ in range(2):
        assert run.generate("Where is Anna?") == "Room 4."
    assert capsys.readouterr().err.count(SHARED) == 1
    own = [{**WARD, "content": "Be brief."}, USER]
    run.generate(["Where is Anna?", own])
    run.generate("Where is Anna?", system="")
    run.generate("Where is Anna?", system="Be brief.")
    assert asked == [[WARD, USER]] * 4 + [own, [USER], own]
    with pytest.raises(sd.UserError, match=r"^setting 'system': the messages begin with a system turn of their own"):
        run.generate([own], system="x")


def test_without_a_shared_system_turn_none_is_sent(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows_share(None)
    sd.ask("run", "Where is Anna?")
    sd.ask("run/final", "Where is Anna?")
    assert asked == [[USER], [USER]]
    assert "system" not in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_noted(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run/system_turn.json").unlink()
    sd.ask("run", "Where is Anna?")
    assert asked == [[USER]]
    assert "run 'run' does not say whether its rows share a system turn, so none is sent" in capsys.readouterr().err


def test_another_system_turn_or_none(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "run", "Where is Anna?", "--system", "Be brief."]) == 0
    sd.ask("run", "Where is Anna?", system="")
    assert asked == [[{**WARD, "content": "Be brief."}, USER], [USER]]
    assert "system" not in capsys.readouterr().err


def test_a_conversation(asked: Any) -> None:
    chat = [USER, REPLY, {"role": "user", "content": "And Ben?"}]
    assert sd.ask("run", chat).question == chat
    own = [{**WARD, "content": "Be brief."}, USER]
    sd.ask("run", own)
    assert asked == [[WARD, *chat], own]
    with pytest.raises(sd.UserError, match=r"^setting 'system': the messages begin with a system turn of their own"):
        sd.ask("run", own, system="x")
    for wrong in ([USER, REPLY], [{"role": "user"}], []):
        with pytest.raises(sd.UserError, match=r"^question"):
            sd.ask("run", wrong)


# --- in an environment ---

TWICE = "python:tiny_worlds.Twice"
EPISODE = ("messages", "turns", "invalid_calls", "truncated", "reward", "feedback")


def test_a_question_begins_the_episode_that_eval_plays_of_its_prompt(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    model, base = (str(model_folder(ends=ENDS, seed=seed)) for seed in (5, 1))
    own: dict[str, Any] = {"environment": TWICE, "max_completion_length": 16, "max_episode_length": 200}
    answered = sd.ask(model, "Where is Anna?", base=base, **own)
    data = str(write_rows([{"prompt": "Where is Anna?"}], name="one.jsonl"))
    for name, reply, episode in (
        (model, answered.reply, answered.episode),
        (base, answered.base_reply, answered.base_episode),
    ):
        evaluate(EvalConfig(model=name, data=data, replies=str(tmp_path / "replies.jsonl"), **own))
        line = json.loads((tmp_path / "replies.jsonl").read_text(encoding="utf-8"))
        first = {"role": "user", "content": "Go on."}
        assert episode == {**{key: line[key] for key in EPISODE}, "messages": [first, *line["messages"]]}
        assert episode["turns"] == 2
        assert reply == line["reply"] == episode["messages"][-1]["content"]
    assert answered.episode != answered.base_episode
    seeded = [sd.ask(model, "Where?", temperature=1.0, seed=seed, **own).episode for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_a_single_reply_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    reply = f"def f(items):\n    return {' + '.join(['[b]'] * 60)}\n"
    AskResult("Write f.", reply, None).print(result_console())
    assert capsys.readouterr().out == f"{reply}\n"


@pytest.mark.parametrize("base", [None, "\x1b[2J"])
def test_no_reply_controls_the_terminal(base: str | None) -> None:
    said = repr(AskResult("q", "\x1b]52;c;aGk=\x07", base))
    assert "\x1b" not in said
    assert r"\u001b]52;c;aGk=\u0007" in said


class Shopper:
    """In place of a sampler: finds a kettle, orders two, and says so, whatever it reads."""

    def __init__(self, loaded: LoadedModel, count: int) -> None:
        self._chat, self._turn = loaded.chat(), 0

    def __call__(self, going: Any, prompts: Any, sampling: Any, seeds: Any) -> list[Rollout]:
        self._turn += 1
        calls = {
            1: {"name": "find", "arguments": {"name": "copper kettle"}},
            2: {"name": "order", "arguments": {"id": 101, "count": 2, "customer": "Ann"}},
        }
        message: dict[str, Any] = {"role": "assistant", "content": "[b]Done[/b]."}
        if self._turn in calls:
            message = {"role": "assistant", "content": "", "tool_calls": [{"function": calls[self._turn]}]}
        ids = self._chat.encode_reply(message, {})
        return [Rollout(ids, [-0.5] * len(ids), truncated=False)]


def unfolded(text: str) -> str:
    """A table's text without what its lines add."""
    return re.sub(r"[\s│]", "", text)


def test_the_transcript_of_an_episode_is_printed_and_is_data(
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("selfdistill.methods.episodes.TurnSampler", Shopper)
    model = str(model_folder(template=CHATML, room=8192))
    command = ["ask", model, "Order 2 copper kettles for Ann.", "--environment", "bundled:shop"]
    assert main([*command, "--json", "asked.json"]) == 0
    table = unfolded(capsys.readouterr().out)
    parts = [
        'assistant: Action: find Action Input: {"name": "copper kettle"}',
        "tool find: id 101, 13 euros",
        "tool order: ordered",
        "assistant: [b]Done[/b].",
        "(3 turns: reward 0.00, as for a row without an answer: expected no orders, found the orders 2 x copper kettle",
    ]
    places = [table.find(unfolded(part)) for part in parts]
    assert min(places) >= 0
    assert places == sorted(places)
    asked = json.loads(Path("asked.json").read_text(encoding="utf-8"))
    assert (asked["reply"], asked["base_reply"], asked["base_episode"]) == ("[b]Done[/b].", None, None)
    messages = asked["episode"]["messages"]
    assert [one["role"] for one in messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert messages[0]["tool_calls"][0]["function"]["name"] == "find"
    assert (asked["episode"]["turns"], asked["episode"]["invalid_calls"]) == (3, 0)
    assert main([*command, "--max_turns", "2", "--base", model]) == 0
    out = capsys.readouterr().out
    assert re.search("base .* model", out)
    assert out.count("(2 turns: the episode was cut after 2 turns)") == 2


def test_functions_of_python_are_an_environment_that_gives_no_reward(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdistill.methods.episodes.TurnSampler", Shopper)
    model = str(model_folder(template=CHATML, room=8192))
    answered = sd.ask(model, "Where?", environment=tiny_worlds.FUNCTIONS, progress=False)
    assert answered.episode is not None
    assert [answered.episode[name] for name in ("reward", "feedback", "invalid_calls")] == [None, "", 2]
    assert unfolded("tool find: Error: unknown tool 'find'") in unfolded(repr(answered))
    assert "(3 turns)" in repr(answered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--environment python:tiny_worlds.Scripted",
            "question, at its start: environment 'python:tiny_worlds.Scripted': reset failed: KeyError: 'answer'; ask "
            "gives the environment a row that has only a prompt",
        ),
        ("--environment bundled:no", "unknown environment 'bundled:no', expected bundled:shop or python:package."),
        (
            f"--environment {TWICE} --image a.png",
            "setting 'image': episodes support only text; leave out the picture or the environment",
        ),
        (
            f"--environment {TWICE} --max_episode_length 4",
            "setting 'max_episode_length': found 4, expected at least max_completion_length, 256",
        ),
    ],
)
def test_what_cannot_be_played_is_one_line_before_a_model_is_loaded(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert main(["ask", "no-such-model", "Where?", *options.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_that_a_run_learnt_in_an_environment_is_noted_where_none_is_shown(
    asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"model": "m", "data": "data.jsonl", "output_dir": "run", "environment": TWICE}
    Path("run/config.yaml").write_text(yaml.safe_dump(saved))
    note = f"run 'run' learnt in the environment {TWICE!r}, whose tools are not shown here; give it as environment"
    sd.ask("run", "Where is Anna?")
    assert note in capsys.readouterr().err
    run = sd.Run("run")
    run.generate("Where is Anna?")
    run.generate("Where is Anna?")
    assert capsys.readouterr().err.count(note) == 1
    sd.ask("run", "Where is Anna?", environment=None)
    sd.ask("run", "Where is Anna?", environment=TWICE, max_completion_length=8)
    assert note not in capsys.readouterr().err


def test_training_in_an_environment_ends_with_the_command_that_plays_one(
    settings: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"environment": TWICE, "max_turns": 3, "max_completion_length": 16, "max_episode_length": 100}
    config = settings(**own, method="sft", max_steps=1).model_dump(exclude_unset=True) | {"output_dir": "run"}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", "run.yaml"]) == 0
    *_, last = capsys.readouterr().err.splitlines()
    command = last.removeprefix("to try it: ")
    assert command == (
        f'selfdistill ask run "QUESTION" --environment {TWICE} --max_turns 3 --max_completion_length 16 '
        "--max_episode_length 100"
    )
    assert main(shlex.split(command)[1:]) == 0
    assert re.search(r"\(\d turns?: ", capsys.readouterr().out)
