"""``ask``: with a system turn, the training rows' own or another, and with a conversation."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared import ENDS

import selfdistill as sd
from selfdistill.cli import main
from selfdistill.config.train import TrainConfig
from selfdistill.training.train import train

WARD = {"role": "system", "content": "You keep the list of the ward."}
USER = {"role": "user", "content": "Where is Anna?"}
REPLY = {"role": "assistant", "content": "Room 4."}
SHARED = (
    f"asked with the system turn of all training rows, {WARD['content']!r}; set system to another, or to '' for none"
)


@pytest.fixture
def asked(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[list[dict[str, Any]]]:
    """The chats that the model is asked, in a folder with a run ``run`` on rows with the same system turn."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder(ends=ENDS), "run/final")
    Path("run/config.yaml").write_text(yaml.safe_dump({"model": "m", "data": "data.jsonl", "output_dir": "run"}))
    rows_share(WARD)
    chats: list[list[dict[str, Any]]] = []

    def generate(_: Any, prompts: Any, **options: Any) -> list[str]:
        chats.extend(prompts)
        return ["Room 4."] * len(prompts)

    for module in ("selfdistill.evaluation.generate", "selfdistill.training.run"):
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
