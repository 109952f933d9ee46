"""Models beside another one: which are refused, and what is noted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from selfdistill.config import CheckConfig, TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluation import check
from selfdistill.model.fake import check_matching
from selfdistill.model.loading import LoadedModel
from selfdistill.model.matching import load_matching
from selfdistill.training import plan_for
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.traced_step import Device
from selfdistill.training.trainer import Trainer


@pytest.fixture
def renamed(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """The tiny model with another name for some of its tokens, also in its chat template."""

    def make(**names: str) -> str:
        folder = tmp_path / "-".join(names)
        shutil.copytree(model_folder(), folder)
        changed = {json.dumps(f"<|{old}|>")[1:-1]: f"<|{new}|>" for old, new in names.items()}
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            text = (folder / name).read_text(encoding="utf-8")
            for old, new in changed.items():
                text = text.replace(old, new)
            (folder / name).write_text(text, encoding="utf-8")
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("old", "number", "new"), [("im_start", 256, "user"), ("im_end", 257, "end")], ids=["template", "end"]
)
def test_a_model_that_reads_the_chats_knows_their_control_tokens(
    load: Callable[..., LoadedModel], renamed: Callable[..., str], old: str, number: int, new: str
) -> None:
    """As of two models that were trained further from one base, in different chat formats."""
    student, name = load(), renamed(**{old: new})
    message = (
        f"model {name!r} has a different tokenizer from model {student.name!r}: token {number} is '<|{new}|>', not "
        f"'<|{old}|>'; use models with the same tokenizer"
    )
    for read in (
        lambda: load_matching(name, student, dtype="float32", reads_chats=True),
        lambda: check_matching(name, student),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == message
    assert load_matching(name, student, dtype="float32").chat().turn != student.chat().turn  # each reads its own


def test_a_control_token_that_no_chat_has_may_have_another_name(
    load: Callable[..., LoadedModel], renamed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    student, name = load(), renamed(stop="pause")
    load_matching(name, student, dtype="float32", reads_chats=True)
    check_matching(name, student)
    assert "note" not in capsys.readouterr().err


def test_models_whose_texts_have_other_ids_are_not_compared(
    load: Callable[..., LoadedModel], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(model_folder(), tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=r"a different tokenizer from model .*: token \d+ is 'b', not 'a'; use models"):
        load_matching(str(file.parent), load(), dtype="float32")


def test_a_teacher_is_checked_and_another_chat_format_noted(
    settings: Callable[..., TrainConfig],
    renamed: Callable[..., str],
    model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    unlike = settings(teacher_model=renamed(im_start="user"))
    for refusing in (Trainer, lambda config: plan_for(config, 10**9, None)):
        with pytest.raises(UserError, match="has a different tokenizer from model"):
            refusing(unlike)
    with pytest.raises(UserError, match="has a different tokenizer from model"):
        check(CheckConfig(model=unlike.model, data=unlike.data, fine_tuned=unlike.teacher_model))
    plain = str(model_folder(template=None))
    config = settings(teacher_model=plain)
    Trainer(config)
    note = f"note: model {plain!r} reads chats in the format of model {config.model!r}, not in that of its own"
    assert capsys.readouterr().err.count(note) == 1
    Trainer(settings(teacher_model=str(model_folder(seed=1))))
    assert "reads chats" not in capsys.readouterr().err


def test_prompts_fit_into_the_context_window_of_a_separate_teacher(
    settings: Callable[..., TrainConfig], model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(context="turns")
    lengths = [len(example.teacher_ids or []) for example in Trainer(config).stage.task.examples]
    room = max(lengths) + config.max_completion_length - 1
    values = {"context": "turns", "teacher_model": str(model_folder(seed=1, room=room))}
    with pytest.raises(UserError, match=f"teacher's prompt has {max(lengths)} tokens, limit {max(lengths) - 1}; "):
        Trainer(settings(**values))
    note = f"note: prompt plus completion may have {room} tokens, the context window of the separate teacher"
    assert capsys.readouterr().err.count(note) == 1
    shorter = settings(**values, on_long_prompt="drop")
    run = Trainer(shorter)
    assert len(run.stage.task.examples) == len([length for length in lengths if length < max(lengths)])
    assert run.stage.task.window == room
    plan = MemoryPlanner(shorter, load_demonstrations(shorter.data), Device("cpu", "no")).plan(shorter)
    assert plan.lengths[1] <= room
    assert run.loaded.window == 512  # its evaluations may be longer
