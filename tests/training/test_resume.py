"""What a resumed run must have in common with the one that it continues, and what it keeps of that run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import metrics_of

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.runtime import write_manifest
from selfdistill.training.checkpoint import list_checkpoints, saved_position
from selfdistill.training.train import train

Settings = Callable[..., TrainConfig]
TALK = "python:tiny_worlds.Talk"


def resumed(config: TrainConfig, **values: Any) -> int:
    """Makes the run longer by a step; returns the number of its steps."""
    assert config.max_steps is not None
    train(config.model_copy(update={"max_steps": config.max_steps + 1, **values}), resume=True)
    return len(metrics_of(config))


def test_what_a_method_spreads_over_all_steps_follows_their_new_number(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, follows in (
        ("veto", "the learning rate, and what the method spreads over all steps, follow"),
        ("sdft", "the learning rate follows"),
        ("isdft", "the learning rate follows"),  # it has a number of steps of its own
    ):
        config = settings(method, method=method, max_steps=2, save_steps=1)
        train(config)
        resumed(config)
        assert f"max_steps was 2 and is now 3: {follows} the new schedule from here on" in capsys.readouterr().err


def test_another_document_is_refused_where_a_scorer_may_read_it(
    all_of_them: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"q{i}", "answer": "a", "document": "old"} for i in range(4)]
    config = all_of_them(method="grpo", max_steps=2, save_steps=1, data=str(write_rows(rows, name="rewarded.jsonl")))
    train(config)
    write_rows([{**row, "document": "new"} for row in rows], name="rewarded.jsonl")
    with pytest.raises(UserError, match=r"changed since the run began: column 'document' of the training rows; rest"):
        resumed(config)


def test_another_answer_is_refused_where_an_environment_may_read_it(
    settings: Settings, model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"q{i}", "completion": "ab", "answer": 1} for i in range(4)]
    data = write_rows(rows, name="talks.jsonl")
    model = str(model_folder(ends=(257, *range(40, 75)), seed=5))
    config = settings(environment=TALK, model=model, max_episode_length=100, max_steps=2, save_steps=1, data=str(data))
    train(config)
    write_rows([{**row, "answer": 2} for row in rows], name="talks.jsonl")
    with pytest.raises(UserError, match=r"changed since the run began: column 'answer' of the training rows; restore"):
        resumed(config)


def test_another_completion_is_refused_where_only_its_beginning_is_learnt(
    all_of_them: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"q{i}", "completion": "abcdefgh" * 2} for i in range(4)]
    data = write_rows(rows, name="pope.jsonl")
    config = all_of_them(method="pope", max_steps=2, save_steps=1, data=str(data), max_completion_length=24)
    train(config)
    write_rows([{**row, "completion": "abcdefgh" * 2 + "z"} for row in rows], name="pope.jsonl")
    with pytest.raises(UserError, match=r"changed since the run began: column 'completion' of the training rows"):
        resumed(config)


def test_another_template_is_refused_where_the_teacher_sees_samples_in_it(
    all_of_them: Settings, tmp_path: Path
) -> None:
    template = tmp_path / "template.txt"
    template.write_text("{prompt} One said {demonstration}. And you?", encoding="utf-8")
    context = {"context": f"template:file={template}"}
    config = all_of_them(method="sdpo", method_settings=context, max_steps=2, save_steps=1)
    train(config)
    assert resumed(config) == 3
    template.write_text("{prompt} Another said {demonstration}. And you?", encoding="utf-8")
    with pytest.raises(UserError, match=r"changed since the run began: the template that shows samples to the teacher"):
        resumed(config, max_steps=4)


@pytest.mark.parametrize(
    ("file", "key", "value", "told"),
    [
        ("config.json", "rms_norm_eps", 1e-3, r"config\.json of model '.*'"),
        ("generation_config.json", "eos_token_id", [257], r"the end tokens of model '.*'"),
        ("config.json", "transformers_version", "9", None),
    ],
    ids=["network", "end tokens", "version"],
)
def test_a_model_that_computes_something_else_is_refused(
    settings: Settings, tmp_path: Path, file: str, key: str, value: Any, told: str | None
) -> None:
    begun = settings(max_steps=2, save_steps=1)
    copied = shutil.copytree(begun.model, tmp_path / "model")
    config = begun.model_copy(update={"model": str(copied)})
    train(config)
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")
    if told is None:
        assert resumed(config) == 3
        return
    with pytest.raises(UserError, match=rf"changed since the run began: {told}; restore"):
        resumed(config)


def test_the_config_of_a_separate_teacher_is_compared_too(
    settings: Settings, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    other = shutil.copytree(model_folder(ends=(257, *range(40, 75)), seed=1), tmp_path / "other")
    config = settings(teacher="frozen", teacher_model=str(other), max_steps=2, save_steps=1)
    train(config)
    path = other / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"rms_norm_eps": 1e-3}), encoding="utf-8")
    with pytest.raises(UserError, match=r"changed since the run began: config\.json of teacher_model '.*other'; rest"):
        resumed(config)


@pytest.mark.parametrize("files", [("both",), ("fewer", "more")])
def test_anchors_that_moved_from_one_source_to_another_are_refused(
    settings: Settings, tmp_path: Path, files: tuple[str, ...]
) -> None:
    texts = {"one": "Who?\nWhen?\n", "two": "Why?\n", "both": "Who?\nWhen?\nWhy?\n"}
    texts |= {"fewer": "Who?\n", "more": "When?\nWhy?\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    sources = tuple(str(tmp_path / f"{name}.txt") for name in ("one", "two"))
    config = settings(anchors=sources, anchor_share=0.5, batch_size=8, max_steps=2, save_steps=1)
    train(config)
    with pytest.raises(
        UserError,
        match=r"changed since the run began: the number of examples in each source \(data, anchors, other parts\)",
    ):
        resumed(config, anchors=tuple(str(tmp_path / f"{name}.txt") for name in files))


def test_a_precision_left_open_stays_that_of_the_begun_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(mixed_precision="auto", max_steps=2, save_steps=1)
    monkeypatch.setattr("selfdistill.model.precision.bfloat16_is_fast", lambda: True)
    train(config)
    monkeypatch.setattr("selfdistill.model.precision.bfloat16_is_fast", lambda: False)
    assert resumed(config) == 3
    written = yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text(encoding="utf-8"))
    assert written["mixed_precision"] == "bf16"


def test_a_checkpoint_of_an_earlier_version_compares_what_it_knows(settings: Settings, tmp_path: Path) -> None:
    begun = settings(max_steps=2, save_steps=1)
    config = begun.model_copy(update={"model": str(shutil.copytree(begun.model, tmp_path / "model"))})
    train(config)
    for checkpoint in list_checkpoints(Path(config.output_dir)):
        as_before(checkpoint)
    path = Path(config.model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"rms_norm_eps": 1e-3}), encoding="utf-8")
    assert resumed(config) == 3  # from now on, what is new in it is compared, too
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"rms_norm_eps": 1e-4}), encoding="utf-8")
    with pytest.raises(UserError, match=r"changed since the run began: config\.json of model"):
        resumed(config, max_steps=4)


def as_before(checkpoint: Path) -> None:
    """Writes the state of a checkpoint as versions did that kept each digest as a field."""
    file, digests = checkpoint / "state.json", saved_position(checkpoint).digests
    state = json.loads(file.read_text(encoding="utf-8"))
    del state["digests"]
    state |= {"data": digests["data"], "model": digests["model"], "test": "", "rewards": ""}
    file.write_text(json.dumps(state), encoding="utf-8")
    manifest = checkpoint / "manifest.json"
    manifest.unlink()
    write_manifest(checkpoint)
