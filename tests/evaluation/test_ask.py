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
    """The chats that the model is asked, in a folder with a run ``run`` on two rows with the same system turn."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder(ends=ENDS), "run/final")
    Path("run/config.yaml").write_text(yaml.safe_dump({"model": "m", "data": "data.jsonl", "output_dir": "run"}))
    rows_are([[WARD, USER, REPLY], [WARD, {**USER, "content": "And Ben?"}, REPLY]])
    chats: list[list[dict[str, Any]]] = []

    def generate(_: Any, prompts: Any, **options: Any) -> list[str]:
        chats.extend(prompts)
        return ["Room 4."] * len(prompts)

    monkeypatch.setattr(sys.modules["selfdistill.evaluation.generate"], "generate", generate)
    return chats


def rows_are(chats: list[list[dict[str, str]]]) -> None:
    Path("data.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def test_the_system_turn_of_all_training_rows_is_used(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "run", "Where is Anna?"]) == 0
    assert asked == [[WARD, USER]]
    assert f"note: {SHARED}" in capsys.readouterr().err


@pytest.mark.parametrize("others", [[USER, REPLY], [{**WARD, "content": "Be brief."}, USER, REPLY]])
def test_a_system_turn_of_some_rows_is_not(asked: Any, others: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows_are([[WARD, USER, REPLY], others])
    sd.ask("run", "Where is Anna?")
    sd.ask("run/final", "Where is Anna?")
    assert asked == [[USER], [USER]]
    assert "system" not in capsys.readouterr().err


def test_rows_that_are_elsewhere_are_noted(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.jsonl").unlink()
    sd.ask("run", "Where is Anna?")
    assert asked == [[USER]]
    assert "the training rows 'data.jsonl' are not here, so ask sends no system turn" in capsys.readouterr().err


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
