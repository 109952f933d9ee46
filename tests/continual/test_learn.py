"""A state: skills are accepted by gates, refused without a trace in what was there, and survive being killed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_worlds
import torch
import yaml
from chat_server import Server
from conftest import CHATML, ENDS
from power import Disk
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import selfdistill as sd
from selfdistill.cli import main
from selfdistill.config import LearnConfig, TrainConfig
from selfdistill.continual import add_skill, stream, teacher
from selfdistill.continual.add_skill import add
from selfdistill.continual.learn import LearnResult, learn, retention_matrix
from selfdistill.continual.ledger import NEEDED, Ledger
from selfdistill.continual.retention import transfer
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.sources import packaged
from selfdistill.errors import EngineFailed, RunFailed, RunStopped, UserError
from selfdistill.evaluation import load_prior
from selfdistill.runtime.files import folder_lock
from selfdistill.training import disk
from selfdistill.training.train import train

Settings = Callable[..., LearnConfig]


@pytest.fixture
def make(model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path) -> Settings:
    """Settings of an addition of ten rows by SFT, without gates and general prompts, to a state in ``state``."""
    write_rows([{"query": "a", "choices": ["b", "cc"], "gold": i % 2} for i in range(4)], name="prior.jsonl")

    def settings(skill: str = "first", **values: Any) -> LearnConfig:
        data = tmp_path / f"{skill}.jsonl"
        if not data.exists():
            write_rows(
                [{"prompt": f"{skill} {i}", "completion": skill[: 1 + i % 3]} for i in range(10)], name=data.name
            )
        defaults: dict[str, Any] = {
            "state": str(tmp_path / "state"),
            "action": "add",
            "data": str(data),
            "method": "sft",
            "max_completion_length": 8,
            "batch_size": 4,
            "max_steps": 3,
            "save_steps": 1,
            "drift_steps": 0,
            "view_rows": 0,
            "anchors": "none",
            "learning_rate": 1e-3,
            "mixed_precision": "no",
            "max_prior_drop": 1.0,
            "max_skill_drop": 1.0,
        }
        defaults |= {"model": str(model_folder(layers=1)), "prior": str(tmp_path / "prior.jsonl")}
        return LearnConfig(**(defaults | values))

    return settings


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[LearnConfig], None]:
    """Cuts an addition off after the second step of its training."""

    def cut(config: LearnConfig) -> None:
        def stop(step: int, _loaded: Any, _metrics: Any) -> None:
            if step == 2:
                raise KeyboardInterrupt

        real = add_skill.train
        with monkeypatch.context() as patch:
            patch.setattr(add_skill, "train", lambda *given, **named: real(*given, **named | {"on_step": stop}))
            with pytest.raises(KeyboardInterrupt):
                add(config)

    return cut


def digest(state: Path) -> dict[str, str]:
    """SHA-256 of every file that the state consists of."""
    files = [file for file in state.rglob("*") if file.is_file()]
    kept = [file for file in files if file.relative_to(state).parts[0] not in ("refused", "undone")]
    return {str(file.relative_to(state)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


def fixed(monkeypatch: pytest.MonkeyPatch, scores: dict[str, list[float]], prior: list[float]) -> None:
    """Let the measurements be these: by skill and for the priors, one of each list after the other."""

    def measured(_loaded: Any, folders: list[tuple[str, Path]], prior_folder: str | None, _config: Any) -> Any:
        skills = {}
        for items, (name, _) in enumerate(folders, start=20):
            value = scores[name].pop(0)
            interval = [max(value - 0.1, 0), value + 0.1]
            skills[name] = {"accuracy": value, "accuracy_interval": interval, "items": items, "correct": []}
        if prior_folder is None:
            return {"skills": skills}
        accuracy = prior.pop(0)
        priors = {}
        for name, rows in load_prior(prior_folder).items():  # the first ones of every file are right
            priors[name] = {"correct": [i < round(accuracy * len(rows)) for i in range(len(rows))]}
        return {"skills": skills, "prior": priors, "prior_accuracy": accuracy}

    monkeypatch.setattr(add_skill, "measure_model", measured)


# --- one skill, then another ---


def test_a_doubt_about_a_scorer_is_told_once(
    make: Settings, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(
        [{"prompt": f"first {i}", "completion": f"It is {i}.", "answer": str(i)} for i in range(6)], name="first.jsonl"
    )
    config = make(method="sdft", context="turns", min_teacher=0, max_steps=1)
    sd.learn(**config.model_dump(exclude_unset=True))  # which scores before, in the check, and after
    notes = [line for line in capsys.readouterr().err.splitlines() if "demonstrated completions" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: scorer 'exact' rejects 1 of 1 demonstrated completions, contains would accept")
    assert re.search(r"[^/]*/first\.jsonl:\d$", notes[0])  # the user's file, not its copy in the state


def test_an_answer_that_no_scorer_can_use_is_told_before_anything_is_written(
    make: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"first {i}", "completion": "It.", "answer": "(", "scorer": "regex"} for i in range(6)]
    file = write_rows(rows, name="first.jsonl")
    with pytest.raises(UserError, match=re.escape(f"{file}:")):
        add(make())
    assert not Path(make().state).exists()


def test_two_skills_in_a_row(make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = add(make())
    assert first["accepted"]
    assert first["reasons"] == []
    state = tmp_path / "state"
    ledger = Ledger(str(state))
    folder = state / "skills" / "0001-first"
    train, test = (load_demonstrations(str(folder / f"{part}.jsonl")) for part in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)
    assert {row.prompt[0]["content"] for row in (*train, *test)} == {f"first {i}" for i in range(10)}
    assert not list(folder.rglob("checkpoint-*"))
    assert ledger.model == str(folder / "model")
    add(make("second", eval_steps=2))
    assert [skill.name for skill in ledger.skills] == ["first", "second"]
    lines = [json.loads(line) for line in (state / "skills/0002-second/along.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    assert all(line["skills"].keys() == {"first", "second"} for line in lines)
    trained = load_file(Path(ledger.model) / "model.safetensors")
    before = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    assert main(["learn", "--state", str(state), "status"]) == 0
    said = capsys.readouterr().out
    assert "second" in said
    found = retention_matrix(ledger)
    assert f"forgetting {found['transfer']['forgetting']:.3f}. " in said  # without a plus: it is a loss
    assert [len(row) for row in found["matrix"]] == [2, 2, 2]
    assert found["matrix"][0][0] is not None
    assert all(score is not None for score in (*found["matrix"][2], found["matrix"][1][0], found["matrix"][1][1]))


def test_everything_in_a_state_sees_the_day_of_its_first_skill(
    make: Settings, model_folder: Callable[..., Path], tmp_path: Path, on_day: Callable[[str], list[str | None]]
) -> None:
    model = str(model_folder(template="{{ strftime_now('%d') }}" + CHATML))
    state = tmp_path / "state" / "start" / "state.yaml"
    on_day("2026-03-01")
    add(make(model=model))
    seen = on_day("2026-03-02")
    add(make("second", model=model, method="sdft", context="turns", min_teacher=0))
    assert set(seen) == {"2026-03-01"}
    with pytest.raises(UserError, match=r"'template_date': all scores in .* were measured with '2026-03-01'; use the"):
        add(make("third", model=model, template_date="2026-03-02"))
    saved = yaml.safe_load(state.read_text(encoding="utf-8"))
    assert saved.pop("template_date") == "2026-03-01"

    state.write_text(yaml.safe_dump(saved), encoding="utf-8")  # as an older release wrote it
    for skill in ("0001-first", "0002-second"):
        file = tmp_path / "state" / "skills" / skill / "settings.yaml"
        file.write_text(file.read_text(encoding="utf-8").replace("template_date: '2026-03-01'", "template_date: null"))
    seen = on_day("2026-03-03")
    add(make("third", model=model))
    assert set(seen) == {"2026-03-01"}
    assert yaml.safe_load(state.read_text(encoding="utf-8"))["template_date"] == "2026-03-01"


def test_a_pending_addition_of_an_older_release_keeps_its_day(
    make: Settings,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    on_day: Callable[[str], list[str | None]],
    cut_off: Callable[[LearnConfig], None],
) -> None:
    config = make(model=str(model_folder(template="{{ strftime_now('%d') }}" + CHATML)))
    state = tmp_path / "state" / "start" / "state.yaml"
    on_day("2026-03-01")
    cut_off(config)
    saved = yaml.safe_load(state.read_text(encoding="utf-8"))
    assert saved.pop("template_date") == "2026-03-01"
    state.write_text(yaml.safe_dump(saved), encoding="utf-8")  # as an older release wrote it
    on_day("2026-03-02")
    assert add(config)["accepted"]
    assert yaml.safe_load(state.read_text(encoding="utf-8"))["template_date"] == "2026-03-01"


def test_a_state_keeps_the_precision_that_its_first_machine_chose(
    make: Settings, cut_off: Callable[[LearnConfig], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(mixed_precision="auto")
    monkeypatch.setattr("selfdistill.model.precision.bfloat16_is_fast", lambda: True)
    cut_off(config)
    monkeypatch.setattr("selfdistill.model.precision.bfloat16_is_fast", lambda: False)  # another machine
    assert add(config)["accepted"]
    assert Ledger(config.state).measured_with["mixed_precision"] == "bf16"
    written = yaml.safe_load((tmp_path / "state/skills/0001-first/run/config.yaml").read_text(encoding="utf-8"))
    assert written["mixed_precision"] == "bf16"
    with pytest.raises(UserError, match=r"'mixed_precision': all scores in .* were measured with 'bf16'; use the same"):
        add(make("second", mixed_precision="no"))


def test_an_addition_to_a_state_that_left_the_precision_open_goes_on_in_that_of_its_run(
    make: Settings, cut_off: Callable[[LearnConfig], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(mixed_precision="auto")
    monkeypatch.setattr("selfdistill.model.precision.bfloat16_is_fast", lambda: True)
    cut_off(config)
    pending = tmp_path / "state/pending"
    for file in (tmp_path / "state/start/state.yaml", pending / "settings.yaml", pending / "asked.json"):
        text = file.read_text(encoding="utf-8")
        assert text.count("bf16") == 1
        file.write_text(text.replace("bf16", "auto"), encoding="utf-8")  # as earlier versions wrote it
    monkeypatch.setattr("selfdistill.model.precision.bfloat16_is_fast", lambda: False)
    assert add(config)["accepted"]


def test_an_addition_goes_on_where_the_base_of_its_adapter_has_moved(
    make: Settings, cut_off: Callable[[LearnConfig], None], settings: Callable[..., Any], tmp_path: Path
) -> None:
    base = shutil.copytree(settings().model, tmp_path / "base")
    train(settings("adapter", model=str(base), lora_rank=2, max_steps=1))
    config = make(model=str(tmp_path / "adapter" / "final"))
    cut_off(config)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(UserError, match="if it was moved, give its new location as adapter_base"):
        add(config)
    assert add(config.model_copy(update={"adapter_base": str(tmp_path / "moved")}))["accepted"]


def test_a_date_that_no_template_shows_is_not_compared(make: Settings, tmp_path: Path) -> None:
    add(make(template_date="2026-03-01"))
    assert Ledger(str(tmp_path / "state")).template_date is None
    assert add(make("second", template_date="2026-03-02"))["accepted"]


def test_a_skill_in_an_environment_is_measured_by_episodes(
    make: Settings, model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{i}", "completion": "ab" * (1 + i % 4), "answer": 1 + i % 3} for i in range(10)]
    write_rows(rows, name="talk.jsonl")
    model = str(model_folder(ends=ENDS, seed=5))
    own: dict[str, Any] = {"environment": "python:tiny_worlds.Talk", "max_episode_length": 200, "model": model}
    added = add(make("talk", method="sdft", context="turns", min_teacher=0.0, **own))
    assert added["accepted"]
    for score in (added["before"], added["after"]["skills"]["talk"]):
        assert score["episode/turns"] >= 1
        assert len(score["correct"]) == score["items"] == 2
    second = add(make("second", model=model))  # the first is measured in its own environment
    assert second["after"]["skills"]["talk"]["episode/turns"] >= 1
    assert "episode/turns" not in second["after"]["skills"]["second"]


def test_the_date_of_an_addition_is_that_of_its_end(make: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real, clock = add_skill.train, ["at the start"]

    def train(*arguments: Any, **named: Any) -> Path:
        clock.append("after training")
        return real(*arguments, **named)

    monkeypatch.setattr(add_skill, "train", train)
    monkeypatch.setattr(add_skill, "time", SimpleNamespace(strftime=lambda _: clock[-1]))
    assert add(make(max_steps=1))["date"] == "after training"
    (line,) = learn(make(action="history", data="")).details["history"]
    assert line["date"] == "after training"


def test_export_rollback_and_history(make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(make())
    state = tmp_path / "state"
    before = digest(state)
    add(make("second"))
    command = ["learn", "--state", str(state)]
    assert main([*command, "export", "--output_dir", str(tmp_path / "out")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["base_model"] == Path(make().model).name
    assert f"# `{Path(make().model).name}` after 2 skills\n" in body
    results = [skill.result for skill in Ledger(str(state)).skills]
    for name, result in zip(("first", "second"), results, strict=True):
        scores = (result["base"], result["after"]["skills"][name], results[1]["after"]["skills"][name])
        told = [
            f"{score['accuracy']:.3f} ({{:.3f}} to {{:.3f}})".format(*score["accuracy_interval"]) for score in scores
        ]
        assert f"| `{name}` | `sft` | `{name}.jsonl` | 2 | {' | '.join(told)} |" in body
    priors = [Ledger(str(state)).base_result["prior_accuracy"], results[1]["after"]["prior_accuracy"]]
    assert "Prior abilities, mean accuracy: {:.3f} (base), {:.3f} now.".format(*priors) in body
    weights = load_file(state / "skills/0002-second/model/model.safetensors")
    assert all(torch.equal(exported.state_dict()[name], weights[name]) for name in weights)
    assert main([*command, "rollback"]) == 0
    assert digest(state) == before
    assert (state / "undone" / "0002-second" / "model").is_dir()
    capsys.readouterr()
    assert main([*command, "history"]) == 0
    said = capsys.readouterr().out
    assert "learnt" in said
    assert "rolled back" in said
    assert "SHA-256" in said
    assert said.count("first.jsonl") == said.count("second.jsonl") == 1
    assert add(make("second"))["accepted"]


def test_what_was_rolled_back_is_restored(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed(monkeypatch, {name: [0.5] * 20 for name in ("first", "second", "third")}, [0.5] * 20)
    state = tmp_path / "state"
    command = ["learn", "--state", str(state)]
    for skill in ("first", "second", "third"):
        add(make(skill, max_steps=1))
    before = digest(state)
    for _ in range(2):
        assert main([*command, "rollback"]) == 0
    size = sum(file.stat().st_size for file in (state / "undone" / "0002-second").rglob("*") if file.is_file())
    assert f"in {state}/undone/0002-second ({size / 2**20:.1f} MiB)" in capsys.readouterr().out.replace("\n", "")
    add(make("second", max_steps=1, seed=1))
    assert main([*command, "restore"]) == 2  # third followed the other second
    assert f"state '{state}': no skill that followed second was rolled back; see learn" in capsys.readouterr().err
    learn(make(action="rollback", data=""))
    shutil.rmtree(state / "undone" / "0002-second-2")  # else it, learnt last, is restored
    for name in ("second", "third"):
        assert main([*command, "restore"]) == 0
        assert capsys.readouterr().out == f"Restored {name}\n"
    assert digest(state) == before


def test_of_several_the_skill_learnt_last_is_restored_under_its_name(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed(monkeypatch, {"first": [0.5] * 20}, [0.5] * 20)
    for seed in range(2):
        monkeypatch.setattr(time, "strftime", lambda *_, day=seed: f"2026-12-0{day + 1}")
        add(make(max_steps=1, seed=seed))
        learn(make(action="rollback", data=""))
    found = learn(make(action="restore", data="")).details
    assert found == {"skill": "first", "model": str(tmp_path / "state/skills/0001-first/model")}
    (skill,) = Ledger(make().state).skills
    assert skill.result["date"] == "2026-12-02"


def test_a_skill_keeps_its_name_if_its_folder_is_renamed(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed(monkeypatch, {"first": [0.1, 0.8, 0.8], "second": [0.2, 0.2, 0.6]}, [0.5] * 3)
    add(make(max_steps=1))
    skills = tmp_path / "state" / "skills"
    (skills / "0001-first").rename(skills / "0001-boxes")
    add(make("second", max_steps=1))
    found = retention_matrix(Ledger(make().state))
    assert found["skills"] == ["first", "second"]
    assert found["matrix"] == [[0.1, 0.2], [0.8, 0.2], [0.8, 0.6]]
    assert learn(make(action="rollback", data="")).details["folder"] == str(tmp_path / "state/undone/0002-second")


def test_an_adapter_is_merged_so_that_each_model_stands_alone(make: Settings, tmp_path: Path) -> None:
    for skill in ("first", "second"):
        assert add(make(skill, lora_rank=2))["accepted"]
        model = Path(Ledger(str(tmp_path / "state")).model)
        assert (model / "model.safetensors").exists()
        assert not (model / "adapter_config.json").exists()


def test_an_adapter_is_merged_into_its_base_wherever_that_is_by_now(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    def fill_the_disk(config: LearnConfig) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["selfdistill.training.export"], "write_model", full)  # of the merged model
            with pytest.raises(UserError, match=r"\(No space left on device\); free disk space, then rerun the same"):
                add(config)
        assert (Path(config.state) / "pending/run/final/adapter_config.json").is_file()

    base = shutil.copytree(make().model, tmp_path / "base")
    first = make(model=str(base), lora_rank=2)
    fill_the_disk(first)
    base.rename(tmp_path / "moved")
    first = first.model_copy(update={"model": str(tmp_path / "moved")})
    assert add(first)["accepted"]
    second = make("second", model="", lora_rank=2)
    fill_the_disk(second)
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    second = second.model_copy(update={"state": str(tmp_path / "elsewhere")})
    assert add(second)["accepted"]


def test_a_disk_without_room_for_the_merged_model_is_told_before_training(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda _: 10_000)
        with pytest.raises(UserError, match=r"free, the merged model needs about \d\.\d MiB; free some space$"):
            add(make(lora_rank=2))
    assert not (tmp_path / "state/pending/run").exists()
    assert add(make(lora_rank=2))["accepted"]


def test_a_teacher_that_is_no_better_is_refused(make: Settings, tmp_path: Path) -> None:
    result = add(make(method="sdft", context="turns"))
    assert not result["accepted"]
    assert "Self-distillation is unlikely to help" in result["reasons"][0]
    assert "after" not in result
    assert Ledger(str(tmp_path / "state")).skills == []
    assert add(make(method="sdft", context="turns", min_teacher=0))["accepted"]


@pytest.mark.parametrize(
    ("items", "right", "least", "reason"),
    [
        (16, 4, 0.5, "4 of 16 rows (95% interval: 10% to 49%), but at least 50% is required (min_teacher)"),
        (16, 5, 0.5, None),
        (4, 1, 0.5, None),
        (16, 15, 1.0, "15 of 16 rows (95% interval: 72% to 99%), but at least 100% is required (min_teacher)"),
        (16, 16, 1.0, None),
    ],
)
def test_a_teacher_is_refused_before_training_if_its_interval_is_below_what_is_asked(
    make: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    items: int,
    right: int,
    least: float,
    reason: str | None,
) -> None:
    best = SimpleNamespace(context="turns", accuracy=right / items, items=items)
    monkeypatch.setattr(teacher, "check_run", lambda _: SimpleNamespace(exit_code=0, verdict="", best=best))
    fixed(monkeypatch, {"first": [0.5, 0.5]}, [0.5, 0.5])
    with monkeypatch.context() as patch:
        if reason:
            patch.setattr(add_skill, "train", lambda *_, **__: pytest.fail("it was learnt"))
        result = add(make(method="sdft", context="turns", min_teacher=least, max_steps=1))
    assert result["reasons"] == ([f"the teacher with turns is right on {reason}"] if reason else [])
    assert result["check"]["items"] == items
    said = capsys.readouterr().err.splitlines()
    assert f"teacher: turns, {right} of {items} right" in said
    assert Path(make().state, "skills").exists() == (reason is None)


# --- gates ---


@pytest.mark.parametrize(
    ("values", "second", "first", "prior", "reason"),
    [
        ({}, (0.2, 0.2, 0.6), 0.71, 0.5, None),
        (
            {},
            (0.2, 0.2, 0.6),
            0.69,
            0.5,
            "first: 0.800 when it was learnt, 0.800 before, 0.690 now, but at least 0.700 is required (max_skill_drop)",
        ),
        pytest.param({"max_skill_drop": 0.2}, (0.2, 0.2, 0.6), 0.61, 0.5, None, marks=pytest.mark.slow),
        (
            {"max_skill_drop": 0.05},
            (0.2, 0.2, 0.6),
            0.74,
            0.5,
            "first: 0.800 when it was learnt, 0.800 before, 0.740 now, but at least",
        ),
        ({}, (0.2, 0.3, 0.21), 0.8, 0.5, None),
        (
            {},
            (0.2, 0.3, 0.19),
            0.8,
            0.5,
            "second itself: 0.200 for the base, 0.300 before, 0.190 now, but at least 0.200 is required (max_skill_d",
        ),
        pytest.param({"max_skill_drop": 0.05}, (0.2, 0.3, 0.25), 0.8, 0.5, None, marks=pytest.mark.slow),
        pytest.param(
            {"max_skill_drop": 0.05},
            (0.2, 0.3, 0.24),
            0.8,
            0.5,
            "second itself: 0.200 for the base, 0.300 before, 0.240 now, but at least",
            marks=pytest.mark.slow,
        ),
        ({}, (0.2, 0.2, 0.6), 0.8, 0.48, None),
        ({}, (0.2, 0.2, 0.6), 0.8, 0.47, None),  # three questions may be chance
        (
            {},
            (0.2, 0.2, 0.6),
            0.8,
            0.43,
            "prior abilities: 0.500 for the base, 0.490 before, 0.430 now; of 100 questions 7 lost and 0 gained since "
            "the base: difference -0.070 (-0.120, -0.030); the limit is 0.480 (max_prior_drop); fallen: prior "
            "(lost 7, gained 0 of 100); first questions lost: prior.jsonl:44, prior.jsonl:45, prior.jsonl:46",
        ),
        pytest.param({"max_prior_drop": 0.08}, (0.2, 0.2, 0.6), 0.8, 0.43, None, marks=pytest.mark.slow),
    ],
)
def test_the_gates(
    make: Settings,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    second: tuple[float, float, float],
    first: float,
    prior: float,
    reason: str | None,
) -> None:
    write_rows([{"query": "a", "choices": ["b", "cc"], "gold": 0} for _ in range(100)], name="prior.jsonl")
    scores = {"first": [0.1, 0.8, first], "second": list(second)}
    fixed(monkeypatch, scores, [0.5, 0.49, prior])
    gates = {"max_skill_drop": None, "max_prior_drop": 0.02}
    assert add(make(**gates))["accepted"]
    before = digest(tmp_path / "state")
    result = add(make("second", **(gates | values)))
    assert result["accepted"] == (reason is None)
    assert scores == {"first": [], "second": []}
    least = 0.8 - values.get("max_skill_drop", 0.1)
    told = capsys.readouterr().err
    assert ("above max_prior_drop 0.02, but may be chance\n" in told) == (prior == 0.47)
    said = repr(LearnResult("add", str(tmp_path / "state"), result))
    assert f"first: 0.800 when learnt, {first:.3f} now (must stay at or above {least:.3f})\n" in said
    if reason is not None:
        (found,) = result["reasons"]
        assert found.startswith(reason)
        assert digest(tmp_path / "state") == before  # byte for byte
        assert (tmp_path / "state" / "refused" / "second" / "result.json").exists()
    else:
        assert [skill.name for skill in Ledger(str(tmp_path / "state")).skills] == ["first", "second"]


def test_gates_that_the_model_already_fails_refuse_before_anything_is_learnt(
    make: Settings, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows([{"query": "a", "choices": ["b", "cc"], "gold": 0} for _ in range(100)], name="prior.jsonl")
    scores = {"first": [0.1, 0.8, 0.5], "second": [0.1, 0.1, 0.6], "third": [0.1, 0.1, 0.6]}
    fixed(monkeypatch, scores, [0.5, 0.43, 0.4, 0.4])
    assert add(make(max_steps=1))["accepted"]
    assert add(make("second", max_steps=1))["accepted"]
    before = digest(tmp_path / "state")
    gates = {"max_skill_drop": None, "max_prior_drop": 0.02}
    message = (
        "its current model already fails these gates, so nothing was learnt: first: 0.800 when it was learnt, 0.500 "
        "now, but at least 0.700 is required (max_skill_drop); prior abilities: 0.500 for the base, 0.400 now; of 100 "
        "questions 10 lost and 0 gained"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        add(make("third", **gates))
    assert digest(tmp_path / "state") == before
    assert scores["third"] == [0.1, 0.1, 0.6]  # nothing was measured
    scores |= {"first": [0.5], "second": [0.6]}
    assert add(make("third", max_steps=1))["accepted"]


def test_a_skill_is_compared_with_its_score_when_it_was_learnt_however_many_came_since(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"first": [0.1, 0.8, 0.75, 0.7], "second": [0.15, 0.3, 0.6, 0.65], "third": [0.2, 0.35, 0.9]}
    fixed(monkeypatch, scores, [0.5, 0.49, 0.48, 0.46])
    short: dict[str, Any] = {"max_steps": 1, "max_skill_drop": 0.05}
    assert add(make(**short))["accepted"]
    assert add(make("second", **short))["accepted"]
    (reason,) = add(make("third", **short))["reasons"]
    assert reason.startswith("first: 0.800 when it was learnt, 0.750 before, 0.700 now, but at least 0.750 is required")

    assert add(make("third", **(short | {"max_skill_drop": 0.1})))["accepted"]
    found = retention_matrix(Ledger(str(tmp_path / "state")))
    assert found.pop("transfer") == pytest.approx(
        {"average": 0.75, "backward": -0.025, "forward": 0.15, "forgetting": 0.025}
    )
    assert found == {
        "skills": ["first", "second", "third"],
        "matrix": [[0.1, 0.15, 0.2], [0.8, 0.3, None], [0.75, 0.6, 0.35], [0.7, 0.65, 0.9]],
        "intervals": [
            [
                [pytest.approx(max(score - 0.1, 0)), pytest.approx(score + 0.1)] if score is not None else None
                for score in row
            ]
            for row in found["matrix"]
        ],
        "must_keep": pytest.approx([0.7, 0.5, 0.8]),
        "prior": [0.5, 0.49, 0.48, 0.46],
        "prior_intervals": [None] * 4,
        "prior_items": 4,
        "items": [20, 21, 22],
    }
    status = repr(learn(make(action="status", data="")))
    assert re.search(r"must keep +│ +0\.700 │ +0\.500 │ +0\.800 │ +│", status)
    assert "prior (4)" in status
    gates = "max_prior_drop 1, max_skill_drop 0.05"
    said = f"Accepted with other gates than the defaults: first ({gates}), second ({gates}), third (max_prior_drop 1, "
    assert said in " ".join(status.split())


KEEP = "later additions must keep {:.3f} or more, {} of 20 test items, unless they set max_skill_drop"


@pytest.mark.parametrize(
    ("after", "values", "said"),
    [
        (0.6, {}, [f"accepted: first is skill 1 of STATE; {KEEP.format(0.5, 10)}"]),
        (
            0.5,
            {"max_skill_drop": 0.05},
            [
                "note: first: 0.500 before, 0.500 after on 20 items: no improvement; the test is rows that were not "
                "learnt: for facts, give other phrasings of the learnt ones as test; to undo: UNDO",
                f"accepted: first is skill 1 of STATE; {KEEP.format(0.4, 8)}",
            ],
        ),
        (
            0.05,
            {"max_skill_drop": 0.9, "test": "test.jsonl"},
            [
                "note: first: 0.500 before, 0.050 after on 20 items: no improvement; to undo: UNDO",
                "accepted: first is skill 1 of STATE; later additions need not keep any of its 20 test items",
            ],
        ),
    ],
)
def test_what_is_accepted_is_said_with_what_it_must_keep(
    make: Settings,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: float,
    values: dict[str, Any],
    said: list[str],
) -> None:
    write_rows([{"prompt": "p", "completion": "f"}], name="test.jsonl")
    monkeypatch.chdir(tmp_path)
    fixed(monkeypatch, {"first": [0.5, after]}, [0.5, 0.5])
    config = make(max_steps=1, **({"max_skill_drop": None} | values))
    assert add(config)["accepted"]
    lines = capsys.readouterr().err.splitlines()
    undo = f"selfdistill learn --state {config.state} rollback"
    assert lines[-len(said) :] == [line.replace("STATE", config.state).replace("UNDO", undo) for line in said]
    assert sum(line.startswith("note: first: ") for line in lines) == len(said) - 1
    history = repr(learn(make(action="history", data="")))
    assert ("improvement" in history) == (len(said) > 1)
    if len(said) > 1:
        assert main([*undo.split()[1:]]) == 0
        assert not Ledger(config.state).skills


def test_test_questions_that_are_learnt_are_counted(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed(monkeypatch, {"first": [0.1, 0.6], "second": [0.1, 0.1, 0.6]}, [0.5, 0.5, 0.5])
    test = tmp_path / "test.jsonl"
    rows = [{"prompt": prompt, "completion": "f"} for prompt in ("first 0", "first 9", "first 10")]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    add(make(max_steps=1, test=str(test)))
    assert "note: 2 of 3 test questions are also in the training data\n" in capsys.readouterr().err


def test_a_skill_that_hurts_is_refused_by_what_is_measured(make: Settings, tmp_path: Path) -> None:
    """The second skill answers the first one's questions otherwise; without gates it would be accepted."""
    hurts = tmp_path / "hurts.jsonl"
    rows = [{"prompt": f"first {i}", "completion": "no"} for i in range(10)]
    hurts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    one = tmp_path / "first.jsonl"
    rows = [{"prompt": f"first {i}", "completion": "yes"} for i in range(10)]
    one.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    learns: dict[str, Any] = {"max_steps": 60, "save_steps": 0, "learning_rate": 1e-2, "test_share": 0.5}
    learns |= {"max_skill_drop": None}
    assert add(make(**learns))["after"]["skills"]["first"]["accuracy"] == 1
    before = digest(tmp_path / "state")
    code, result = main_code(make("hurts", **learns))
    assert code == 4
    assert result["after"]["skills"] == {
        name: result["after"]["skills"][name] | {"accuracy": score} for name, score in (("first", 0), ("hurts", 1))
    }
    assert [reason.partition(":")[0] for reason in result["reasons"]] == ["first"]
    assert digest(tmp_path / "state") == before
    assert add(make("hurts", **(learns | {"max_skill_drop": 1.0})))["accepted"]


def test_a_refused_addition_is_decided_on_again_with_other_gates_and_not_trained(
    make: Settings,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows([{"query": "a", "choices": ["b", "cc"], "gold": 0} for _ in range(100)], name="prior.jsonl")
    fixed(monkeypatch, {"first": [0.1, 0.8]}, [0.5, 0.3])
    gates: dict[str, Any] = {"max_prior_drop": 0.02, "min_teacher": 0.5, "max_skill_drop": None}
    assert not add(make(**gates))["accepted"]
    refused = tmp_path / "state" / "refused" / "first"
    weights = (refused / "model" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(add_skill, "train", lambda *_, **__: pytest.fail("it was learnt"))
        assert not add(make(**gates))["accepted"]
        assert [folder.name for folder in refused.parent.iterdir()] == ["first"]
        result = add(make(**(gates | {"max_prior_drop": 0.2})))
    assert "first was refused on 20" in capsys.readouterr().err
    (skill,) = Ledger(make().state).skills
    assert result["accepted"]
    assert result == skill.result
    assert (skill.folder / "model" / "model.safetensors").read_bytes() == weights
    assert yaml.safe_load((skill.folder / "settings.yaml").read_text(encoding="utf-8"))["max_prior_drop"] == 0.2
    assert not list(refused.parent.iterdir())


def test_a_refused_addition_to_another_model_or_with_other_settings_is_learnt_again(
    make: Settings, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows([{"query": "a", "choices": ["b", "cc"], "gold": 0} for _ in range(100)], name="prior.jsonl")
    trained = []
    real = add_skill.train
    monkeypatch.setattr(add_skill, "train", lambda *given, **named: trained.append(1) or real(*given, **named))
    fixed(monkeypatch, {"first": [0.8] * 9, "second": [0.2] * 12}, [0.5, 0.5, 0.3, 0.3, 0.3, 0.5, 0.3])
    short: dict[str, Any] = {"max_steps": 1}
    add(make(**short))
    for values in (short, {"max_steps": 2}):
        assert not add(make("second", max_prior_drop=0.02, **values))["accepted"]
    assert len(trained) == 3
    shutil.rmtree(tmp_path / "state" / "refused" / "second-2" / "model")  # as a user may do who needs the space
    assert not add(make("second", max_prior_drop=0.02, max_steps=2))["accepted"]
    assert len(trained) == 4
    learn(make(action="rollback", data=""))
    add(make(**short))  # the same skill, learnt another time
    assert not add(make("second", max_prior_drop=0.02, **short))["accepted"]
    assert len(trained) == 6


def test_a_skill_that_was_accepted_as_it_is_asked_is_not_learnt_again(
    make: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed(monkeypatch, {"first": [0.1, 0.8, 0.8], "second": [0.2, 0.2, 0.6]}, [0.5, 0.5, 0.5])
    result = add(make(max_steps=1))
    add(make("second", max_steps=1))
    before = digest(Path(make().state))
    code, again = main_code(make(max_steps=1))
    assert (code, again) == (0, json.loads(json.dumps(result)))
    said = capsys.readouterr().err.splitlines()
    assert f"first is already skill 1 of {make().state}, learnt from these rows with these settings" in said
    assert digest(Path(make().state)) == before


def test_the_gates_of_an_interrupted_addition_may_change(
    make: Settings, tmp_path: Path, cut_off: Callable[[LearnConfig], None]
) -> None:
    cut_off(make(max_prior_drop=0.02, max_skill_drop=None, min_teacher=0.5))
    assert add(make(max_prior_drop=0.5, max_skill_drop=0.9, min_teacher=0))["accepted"]
    saved = yaml.safe_load((tmp_path / "state/skills/0001-first/settings.yaml").read_text(encoding="utf-8"))
    assert [saved[name] for name in ("max_prior_drop", "max_skill_drop", "min_teacher")] == [0.5, 0.9, 0]


def test_an_addition_that_has_begun_to_learn_from_its_teacher_is_not_refused_for_it(
    make: Settings, cut_off: Callable[[LearnConfig], None]
) -> None:
    values: dict[str, Any] = {"method": "sdft", "context": "turns"}
    cut_off(make(min_teacher=0, **values))
    result = add(make(min_teacher=0.5, **values))
    assert not result["check"]["worth"]
    assert result["accepted"]


def main_code(config: LearnConfig) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the command."""
    file, result = Path(config.state).parent / "again.yaml", Path(config.state).parent / "result.json"
    file.write_text(json.dumps(config.model_dump()), encoding="utf-8")
    code = main(["learn", "--config", str(file), "--state", config.state, "--json", str(result), "add", config.data])
    return code, json.loads(result.read_text(encoding="utf-8"))


def test_training_that_diverges_is_refused(make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise RunFailed("the loss is nan")

    monkeypatch.setattr(add_skill, "train", fail)
    assert add(make())["reasons"] == ["the loss is nan"]
    assert Ledger(str(tmp_path / "state")).skills == []


def test_what_is_refused_keeps_no_checkpoints(make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(step: int, *_: Any) -> None:
        if step == 2:
            raise RunFailed("the loss is nan")

    real = add_skill.train
    monkeypatch.setattr(add_skill, "train", lambda *given, **named: real(*given, **named | {"on_step": diverge}))
    assert add(make())["reasons"] == ["the loss is nan"]
    run = tmp_path / "state/refused/first/run"
    assert (run / "metrics.jsonl").exists()
    assert not list(run.glob("checkpoint-*"))


def test_an_engine_that_fails_refuses_no_skill(make: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise EngineFailed("run: stopped after step 1: the server ended; progress is saved, continue with resume=True")

    with monkeypatch.context() as patch:
        patch.setattr(add_skill, "train", fail)
        with pytest.raises(EngineFailed, match=r"progress is saved, rerun the same command to resume$"):
            add(make())
    assert add(make())["accepted"]


# --- interruptions ---


def test_an_interrupted_addition_goes_on_to_the_same_model(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(make(state=str(tmp_path / "whole")))
    # Of the measurements: the base's, then the new skill on the base, then what came of it.
    for name, call in (
        ("measure_model", 1),
        ("measure_model", 2),
        ("train", 1),
        ("measure_model", 1),
        ("write_json", 2),
    ):
        with monkeypatch.context() as patch:
            interrupt(patch, name, call)
            with pytest.raises(KeyboardInterrupt):
                add(make())
        assert not (tmp_path / "state" / "skills").exists()
    files = sorted(path.name for path in (tmp_path / "state" / "pending").iterdir())
    assert "after.json" in files  # it came as far as that
    assert add(make())["accepted"]
    a, b = (load_file(tmp_path / name / "skills/0001-first/model/model.safetensors") for name in ("whole", "state"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_addition_takes_the_settings_that_may_change(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "train", 1)
        with pytest.raises(KeyboardInterrupt):
            add(make())
    changed = {"gradient_accumulation_steps": 2, "logging_steps": 2, "save_total_limit": 4}
    add(make(**changed, judge_url="http://localhost:9/v1"))
    folder = tmp_path / "state/skills/0001-first"
    run, kept = (yaml.safe_load((folder / name).read_text()) for name in ("run/config.yaml", "settings.yaml"))
    assert {name: run[name] for name in changed} == changed
    assert kept["judge_url"] == "http://localhost:9/v1"


def test_earlier_skills_are_judged_at_the_address_of_the_addition(make: Settings, server: Server) -> None:
    judged = {"scorer": "judge", "judge_model": "j", "max_steps": 1}
    for skill in ("first", "second"):
        assert add(make(skill, judge_url=f"{server.url}/{skill}", **judged))["accepted"]
    paths = server.paths[server.paths.index("/v1/second/chat/completions") :]
    assert set(paths) == {"/v1/second/chat/completions"}


def test_of_several_judges_the_one_that_is_named_has_moved(make: Settings, server: Server) -> None:
    """Else replies would go to a server that does not have the model."""
    common = {"scorer": "judge", "max_steps": 1}
    add(make(judge_model="j", judge_url=f"{server.url}/first", **common))
    add(make("second", judge_model="k", judge_url=f"{server.url}/second", **common))
    for skill, named in (("third", None), ("fourth", "k")):
        assert add(make(skill, max_steps=1, judge_url=f"{server.url}/new", judge_model=named))["accepted"]
        assert ("/v1/new/chat/completions" in server.paths) is (named == "k")


def test_a_judge_that_moves_during_an_addition_is_asked_at_its_new_address(
    make: Settings, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(make(scorer="judge", judge_model="j", judge_url=f"{server.url}/old", max_steps=1))
    with monkeypatch.context() as patch:
        interrupt(patch, "measure_model", 3)  # that of the new model, the first one in which the judge is asked
        with pytest.raises(KeyboardInterrupt):
            add(make("second", max_steps=1))
    server.paths.clear()
    assert add(make("second", max_steps=1, judge_url=f"{server.url}/new"))["accepted"]
    assert set(server.paths) == {"/v1/new/chat/completions"}


def interrupt(patch: pytest.MonkeyPatch, name: str, call: int) -> None:
    real, calls = getattr(add_skill, name), [0]

    def once(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    patch.setattr(add_skill, name, once)


def test_a_signal_before_the_first_step_of_training_stops_it(make: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real = add_skill.train

    def signalled(*arguments: Any, **options: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(add_skill, "train", signalled)
    with pytest.raises(RunStopped, match="stopped while learning") as error:
        add(make())
    assert error.value.exit_code == 143
    assert [path.name for path in Path(make().state).rglob("checkpoint-*")] == ["checkpoint-00000001"]
    monkeypatch.undo()
    assert add(make())["accepted"]


def test_a_stop_while_the_base_is_measured_starts_no_other_measurement(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, measured = add_skill.measure_model, []

    def stopped(*given: Any) -> Any:
        measured.append(given)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(add_skill, "measure_model", stopped)
    with pytest.raises(RunStopped, match=r"stopped while learning .*first\.jsonl; rerun the same command to resume"):
        add(make())
    assert len(measured) == 1
    assert not (tmp_path / "state/pending/before.json").exists()
    monkeypatch.undo()
    assert add(make())["accepted"]


def test_a_stop_in_training_says_how_to_go_on(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = add_skill.train

    def stopped(*arguments: Any, **_: Any) -> Path:
        return real(
            *arguments, on_step=lambda step, _, _metrics: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None
        )

    monkeypatch.setattr(add_skill, "train", stopped)
    with pytest.raises(
        RunStopped, match=r"stopped while learning .*first\.jsonl; rerun the same command to resume"
    ) as error:
        add(make())
    assert error.value.exit_code == 143
    monkeypatch.undo()
    there = r"^'first' is unfinished: run the same command to finish it, or discard it with selfdistill learn --state "
    there += re.escape(make().state) + r" discard\. Differences: "
    with pytest.raises(UserError, match=there + r"name was 'first' and is now 'second'; its rows or test rows differ"):
        add(make("second"))
    changed = r"batch_size was 4 and is now 2; learning_rate was 0.001 and is now 0.002$"
    with pytest.raises(UserError, match=there + changed):
        add(make(learning_rate=2e-3, batch_size=2))
    with pytest.raises(UserError, match=there + r"max_steps was 3 and is now 1$"):
        add(make(max_steps=1))
    capsys.readouterr()
    status = learn(make(action="status", data=""))
    assert status.details["pending"] == "first"
    assert "Adding 'first' was interrupted: rerun the same command to resume" in repr(status)
    with folder_lock(tmp_path / "state", "state"):
        status = learn(make(action="status", data=""))
    assert status.details["running"]
    assert "Adding 'first' is in progress in another process." in repr(status)
    learnt = tmp_path / "state" / "skills" / "0001-x"
    learnt.mkdir(parents=True)
    for name in NEEDED:
        (learnt / name).touch()
    with pytest.raises(UserError, match=r"an addition was interrupted"):
        learn(make(action="rollback", data=""))
    shutil.rmtree(learnt)
    assert main(["learn", "--state", make().state, "discard"]) == 0
    assert add(make("second"))["accepted"]


@pytest.mark.slow
def test_killed_at_twenty_moments_a_state_opens_and_goes_on(make: Settings, tmp_path: Path) -> None:
    add(make())
    state = tmp_path / "state"
    before = digest(state)
    settings = make("second", max_steps=12, method="sdft", context="turns", min_teacher=0)
    file = tmp_path / "second.yaml"
    file.write_text(json.dumps(settings.model_dump()), encoding="utf-8")
    code = "import sys; from selfdistill.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "learn", "--config", str(file), "--state", str(state), "add", settings.data]
    began = time.monotonic()
    whole = tmp_path / "whole"
    subprocess.run(["cp", "-r", str(state), str(whole)], check=True)
    subprocess.run([str(whole) if part == str(state) else part for part in command], check=True, capture_output=True)
    lasts = time.monotonic() - began
    chance, kills = random.Random(0), 0
    while kills < 20:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(chance.uniform(0.3, 1.0) * lasts)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        ledger = Ledger(str(state))
        retention_matrix(ledger)
        names = [skill.name for skill in ledger.skills]
        assert names in (["first"], ["first", "second"])
        kept = {name: value for name, value in digest(state).items() if "0002" not in name and "pending" not in name}
        assert {name: kept[name] for name in before} == before
        if names == ["first", "second"]:
            a, b = (load_file(s / "skills/0002-second/model/model.safetensors") for s in (state, whole))
            assert all(torch.equal(a[key], b[key]) for key in a)
            ledger.undo(ledger.skills[-1])
    assert kills == 20


def test_a_state_of_another_version_is_read(make: Settings, tmp_path: Path) -> None:
    add(make())
    with (tmp_path / "state/skills/0001-first/settings.yaml").open("a", encoding="utf-8") as file:
        file.write("a_setting_of_old: 3\n")
    assert add(make("second"))["after"]["skills"].keys() == {"first", "second"}


def test_two_at_once_are_refused(make: Settings, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "state", ""), pytest.raises(UserError, match="in use by another process"):
        add(make())


# --- a stream ---


def test_a_stream_is_tested_before_it_is_learnt(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"r{i}", "completion": "yes"} for i in range(40)]
    data = tmp_path / "stream.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = make("stream", action="stream", chunk_size=8, chunk_steps=40, learning_rate=1e-2)
    result = add(config)
    assert result["accepted"]
    folder = tmp_path / "state" / "skills" / "0001-stream"
    lines = [json.loads(line) for line in (folder / "stream.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in lines] == [8, 8, 8, 8]
    assert lines[0]["accuracy"] == 0  # nobody has told it yet
    assert lines[-1]["accuracy"] == 1
    assert result["after"]["skills"]["stream"]["accuracy"] == 1
    assert lines[0]["loss_after"] < lines[0]["loss_before"]
    assert all(1 <= line["steps"] <= 40 for line in lines)
    assert lines[-1]["steps"] < 40  # the loss had stopped falling
    assert [path.name for path in (folder / "chunks").iterdir()] == ["00004"]
    said = capsys.readouterr().err
    loss = [f"{lines[0][key]:.3f}" for key in ("loss_before", "loss_after")]
    steps = lines[0]["steps"]
    assert f"chunk 1 of 4: accuracy 0.00 before training, {steps} steps; validation loss {loss[0]} before, " in said
    assert f" before, {loss[1]} after\n" in said


@pytest.mark.parametrize("own_test", [False, True])
def test_what_decides_how_long_a_stream_is_learnt_is_not_its_test(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_test: bool
) -> None:
    config = make(action="stream", chunk_size=4, chunk_steps=2, test_share=0.4)
    if own_test:
        shutil.copy(config.data, tmp_path / "test.jsonl")
        config = config.model_copy(update={"test": str(tmp_path / "test.jsonl")})
    watched = []

    def loss(loaded: Any, prompts: list[list[int]], *_: Any) -> float:
        texts = map(loaded.tokenizer.decode, prompts)
        watched.append([text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts])
        return 0.5

    monkeypatch.setattr(stream, "mean_loss", loss)
    assert add(config)["accepted"]
    folder = tmp_path / "state" / "skills" / "0001-first"
    train, validation, test = (
        [row.prompt[0]["content"] for row in load_demonstrations(str(folder / f"{part}.jsonl"))]
        for part in ("train", "validation", "test")
    )
    everything = [f"first {i}" for i in range(10)]
    if own_test:
        assert (len(validation), test) == (4, everything)
    else:
        assert (len(validation), len(test)) == (2, 2)
    assert sorted([*train, *validation, *([] if own_test else test)]) == everything
    assert watched[-1] == [row for row in validation if row <= max(train)]
    assert all(set(rows) <= set(validation) for rows in watched)


def test_a_chunk_is_on_the_disk_before_the_next_is_learnt_and_a_skill_before_it_is_accepted(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, tmp_path / "state")
    assert add(make(action="stream", chunk_size=4, chunk_steps=1))["accepted"]
    skill, chunk = "skills/0001-first", "pending/chunks/00002/model"
    assert {skill, chunk} <= disk.names
    for name in (skill, chunk):
        assert disk.lost_within(name) == set()
    assert "pending/stream.jsonl" not in disk.lost[chunk]
    assert disk.events[disk.events.index(("rename", skill)) + 1 :][:2] == [("flush", "skills"), ("flush", ".")]


def test_a_chunk_is_learnt_until_the_loss_on_the_latest_rows_has_not_fallen_twice(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([9.0, 9.0, 3.0, 3.5, 2.0, 2.5, 2.0])  # two before the first step
    watched = []

    def loss(loaded: Any, prompts: list[list[int]], *_: Any) -> float:
        watched.append([loaded.tokenizer.decode(prompt) for prompt in prompts])
        return next(losses)

    monkeypatch.setattr(stream, "mean_loss", loss)
    monkeypatch.setattr(stream, "BUFFER", 2)
    test = shutil.copy(make().data, tmp_path / "test.jsonl")
    add(make(action="stream", chunk_size=8, chunk_steps=20, test=str(test), test_share=0.4))
    folder = tmp_path / "state" / "skills" / "0001-first"
    (line,) = (json.loads(line) for line in (folder / "stream.jsonl").read_text().splitlines())
    assert (line["steps"], line["loss_before"], line["loss_after"]) == (5 * stream.LOOK_STEPS, 9.0, 2.0)
    train, held = (
        [row.prompt[0]["content"] for row in load_demonstrations(str(folder / f"{part}.jsonl"))]
        for part in ("train", "validation")
    )
    seen = [row for row in held if row < train[-1]]
    assert len(seen) > 2
    for texts in watched:
        assert all(f"user\n{row}<" in text for text, row in zip(texts, seen[-2:], strict=True))


def test_a_chunk_before_any_validation_row_takes_all_its_steps_and_says_so(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(make(action="stream", chunk_size=2, chunk_steps=3))
    folder = tmp_path / "state" / "skills" / "0001-first"
    held = load_demonstrations(str(folder / "validation.jsonl"))
    assert [row.prompt[0]["content"] for row in held] == ["first 6"]
    line = json.loads((folder / "stream.jsonl").read_text().splitlines()[0])
    assert (line["steps"], line["loss_before"]) == (3, None)
    said = [line for line in capsys.readouterr().err.splitlines() if " before training, " in line]
    assert said[0].endswith("before training, 3 steps; no validation rows yet, so it took chunk_steps")
    assert "validation loss" in said[-1]


def test_a_stream_in_an_environment_watches_what_the_model_reads(
    make: Settings,
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = [{"role": role, "content": text} for role, text in (("assistant", "a"), ("user", "b?"), ("assistant", "cd"))]
    write_rows([{"prompt": f"q{i}", "completion": told, "answer": 2} for i in range(10)], name="talk.jsonl")
    watched, real = [], stream.mean_loss

    def loss(loaded: Any, prompts: Any, completions: Any, own: Any) -> float:
        said = [list(itertools.compress(*pair)) for pair in zip(completions, own, strict=True)]
        watched.extend(zip(*(map(loaded.tokenizer.decode, ids) for ids in (prompts, said, completions)), strict=True))
        return real(loaded, prompts, completions, own)

    monkeypatch.setattr(stream, "mean_loss", loss)
    options: dict[str, Any] = {"environment": "python:tiny_worlds.Asks", "max_episode_length": 60, "chunk_size": 8}
    options |= {"model": str(model_folder(ends=ENDS, seed=5, room=2048)), "min_teacher": 0.0}
    assert add(make("talk", action="stream", chunk_steps=1, **options))["accepted"]
    for prompt, said, whole in watched:
        assert "look_up" in prompt
        assert "Go on, 2 times." in prompt
        assert said == "a<|im_end|>cd<|im_end|>"
        assert "b?" in whole
    assert watched
    with pytest.raises(UserError, match=r"rows do not fit: .*prompt has \d+ tokens, limit 100"):
        add(make("talk", name="long", action="stream", max_prompt_length=100, **options))


def test_a_stream_of_which_nothing_fits_leaves_the_base_where_it_is(make: Settings, tmp_path: Path) -> None:
    config = make(action="stream", chunk_size=3, max_completion_length=1, on_long_prompt="drop")
    with pytest.raises(
        UserError, match=r"first\.jsonl: every row is too long: . of . rows do not fit: .*; raise max_c"
    ):
        add(config)
    assert (Path(config.model) / "model.safetensors").is_file()
    assert not list(Path(config.state).glob("start"))
    assert add(make())["accepted"]
    with pytest.raises(UserError, match="every row is too long"):
        add(config.model_copy(update={"name": "more"}))
    assert [skill.name for skill in Ledger(config.state).skills] == ["first"]
    assert not (tmp_path / "state" / "pending").exists()


def test_rows_of_a_stream_whose_teacher_has_no_room_are_told_or_left_out(
    make: Settings, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    prompts = [f"{i} {'x' * (200 if 4 <= i < 7 or i == 8 else 1)}" for i in range(16)]
    write_rows([{"prompt": prompt, "completion": "ab"} for prompt in prompts], name="mixed.jsonl")
    write_rows([{"prompt": "t", "completion": "ab"}], name="test.jsonl")
    options = {"action": "stream", "chunk_size": 4, "chunk_steps": 1, "test": str(tmp_path / "test.jsonl")}
    options |= {"test_share": 0.01, "method": "sdft", "context": "turns:repeats=4", "min_teacher": 0}
    with pytest.raises(UserError, match=r"teacher's prompt has .* or drop them with on_long_prompt drop"):
        add(make("mixed", **options))
    assert add(make("mixed", **options, on_long_prompt="drop"))["accepted"]
    folder = tmp_path / "state" / "skills" / "0001-mixed"
    lines = [json.loads(line) for line in (folder / "stream.jsonl").read_text().splitlines()]
    train = [row.prompt[0]["content"] for row in load_demonstrations(str(folder / "train.jsonl"))]
    short = [sum(len(prompt) < 20 for prompt in train[start : start + 4]) for start in range(0, len(train), 4)]
    assert [line["rows"] for line in lines] == short
    assert sum(short) < len(train)


def test_an_interrupted_stream_goes_on_with_the_next_chunk(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"action": "stream", "chunk_size": 3, "chunk_steps": 2}
    add(make(**options, state=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        calls = []

        def counted(*arguments: Any, **named: Any) -> Path:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return stream_train(*arguments, **named)

        stream_train = stream.train
        patch.setattr(stream, "train", counted)
        with pytest.raises(KeyboardInterrupt):
            add(make(**options))
    assert add(make(**options))["accepted"]
    a, b = (load_file(tmp_path / name / "skills/0001-first/model/model.safetensors") for name in ("whole", "state"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_refused_stream_keeps_no_checkpoints(make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: TrainConfig, **_: Any) -> None:
        (Path(run.output_dir) / "checkpoint-00000001").mkdir(parents=True)  # the loop saves before it fails
        raise RunFailed("the loss is nan")

    monkeypatch.setattr(stream, "train", fail)
    assert add(make(action="stream", chunk_size=3, chunk_steps=2))["reasons"] == ["the loss is nan"]
    refused = tmp_path / "state/refused/first"
    assert (refused / "chunks/00001/run").is_dir()
    assert not list(refused.rglob("checkpoint-*"))


# --- numbers ---


def test_transfer_of_a_matrix() -> None:
    matrix = [[0.1, 0.2, 0.0], [0.9, 0.3, None], [0.8, 0.7, 0.1], [0.85, 0.5, 0.6]]
    found = transfer(matrix)
    assert found is not None
    assert found.average == pytest.approx((0.85 + 0.5 + 0.6) / 3)
    assert found.backward == pytest.approx(((0.85 - 0.9) + (0.5 - 0.7)) / 2)
    assert found.forward == pytest.approx(((0.3 - 0.2) + (0.1 - 0.0)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.85) + (0.7 - 0.5)) / 2)
    better = transfer([[0.1, 0.2, 0.0], [0.5, 0.3, None], [0.6, 0.7, 0.1], [0.8, 0.6, 0.6]])
    assert better is not None
    assert better.forgetting == pytest.approx(((0.6 - 0.8) + (0.7 - 0.6)) / 2)  # below 0: better than ever before
    one = transfer([[0.1], [0.4]])
    assert one is not None
    assert (one.average, one.backward, one.forward, one.forgetting) == (0.4, None, None, None)
    assert transfer([[]]) is None


# --- mistakes ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ""}, "does not exist yet; give the base as model"),
        ({"gradient_accumulation_steps": 3}, "setting 'gradient_accumulation_steps': 3 does not divide batch_size 4"),
        ({"method": "sdft", "context": "turn"}, "unknown context 'turn'"),
        ({"method": "grpo", "num_generations": 1}, "setting 'num_generations': grpo compares"),
        (
            {"method": "sft_reinvoke", "max_steps": 1},
            "setting 'max_steps': found 1, expected at least 2, one per stage of sft_reinvoke",
        ),
        (
            {"action": "stream", "method": "sft_reinvoke", "chunk_steps": 1},
            "setting 'chunk_steps': found 1, expected at least 2, one per stage of sft_reinvoke",
        ),
        ({"data": "none.jsonl"}, "none.jsonl: no such file or folder"),
        ({"prior": "none.jsonl"}, "prior 'none.jsonl': no such .jsonl file"),
        ({"test_share": 0.99}, "10 rows are too few to hold some out for the test; give a test"),
        (
            {"action": "stream", "test_share": 0.99, "test": "first.jsonl"},
            "10 rows are too few to hold some out for the validation; give more, or a lower test_share",
        ),
    ],
)
def test_mistakes_leave_no_state(make: Settings, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add(make(**values))
    assert not list(tmp_path.glob("state/*"))


def test_prior_questions_of_the_package_are_copied_by_name(make: Settings, tmp_path: Path) -> None:
    add(make(prior="bundled:prior/test/facts.jsonl", max_steps=1))
    copied = tmp_path / "state/start/prior/facts.jsonl"
    assert copied.read_bytes() == Path(packaged("prior/test/facts.jsonl")).read_bytes()
    with pytest.raises(UserError, match=r"setting 'prior': .* started with other questions"):
        add(make("second", prior="bundled:prior/test/code.jsonl"))


def test_a_prior_file_may_have_any_name(make: Settings, tmp_path: Path) -> None:
    prior = (tmp_path / "prior.jsonl").rename(tmp_path / "choices.json")
    for skill in ("first", "second"):
        assert add(make(skill, prior=str(prior), max_steps=1))["after"]["prior"].keys() == {"choices"}


def test_what_is_not_measured_without_prior_questions_is_noted(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def noted(**values: Any) -> list[str]:
        with pytest.raises(UserError, match="too few to hold some out"):
            learn(make(test_share=0.99, **values))
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]

    state = tmp_path / "state"
    created = (
        f"note: {state} is created without prior questions, so what the model loses outside its skills is not "
        "measured; they can only be given now, with prior"
    )
    gate = f"note: max_prior_drop has no effect: {state} has no prior questions"
    assert noted(prior=None) == [created, gate]
    assert not noted()
    (state / "start").mkdir(parents=True)
    assert noted(prior=None) == [gate]
    (state / "start" / "prior").mkdir()
    assert not noted(prior=None)


@pytest.mark.parametrize("action", ["status", "history", "rollback", "restore", "discard", "export"])
def test_an_action_without_data_refuses_it(make: Settings, action: str) -> None:
    with pytest.raises(UserError, match=f"^learn {action}: takes no data, found 'x.jsonl'; leave it out$"):
        learn(make(action=action, data="x.jsonl", output_dir="out"))


def test_settings_that_an_action_does_not_use_are_noted(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(make(max_steps=1))
    state, note = str(tmp_path / "state"), "note: learn status ignores these settings: anchors, max_steps"
    capsys.readouterr()
    learn(LearnConfig(state=state, action="status", anchors="own.txt", max_steps=2))
    assert note in capsys.readouterr().err
    learn(LearnConfig(state=state, action="export", output_dir=str(tmp_path / "out")))
    assert "ignores" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("action", "values", "ignored"),
    [
        (
            "stream",
            {"chunk_steps": 2, "max_steps": 9, "eval_steps": 1, "lr_scheduler_type": "cosine", "save_steps": 1},
            "drift_steps, eval_steps, lr_scheduler_type, max_steps, save_steps, view_rows",
        ),
        ("add", {"chunk_size": 2, "chunk_steps": 2}, "chunk_size, chunk_steps"),
    ],
)
def test_settings_that_an_addition_does_not_use_are_noted(
    make: Settings, capsys: pytest.CaptureFixture[str], action: str, values: dict[str, Any], ignored: str
) -> None:
    with pytest.raises(UserError, match="no such file"):
        learn(make(action=action, data="missing.jsonl", **values))
    assert f"note: learn {action} ignores these settings: {ignored}\n" in capsys.readouterr().err


def test_a_folder_that_is_no_state_is_refused_and_untouched(make: Settings, tmp_path: Path) -> None:
    (tmp_path / "state" / "prior").mkdir(parents=True)
    mine = tmp_path / "state" / "prior" / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not a state, contains 'prior'; give another folder"):
        add(make())
    assert mine.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(("file", "name"), [("my skill (1)", "my-skill-1"), (".hidden", None), ("a.b", "a")])
def test_a_skill_is_named_after_its_file(make: Settings, tmp_path: Path, file: str, name: str | None) -> None:
    config = make(file, max_steps=1)
    if name is None:
        with pytest.raises(UserError, match="setting 'name'"):
            add(config)
    else:
        assert add(config)["name"] == name


@pytest.mark.parametrize("action", ["add", "stream"])
def test_what_ends_with_this_process_are_refused(make: Settings, action: str) -> None:
    for given in (tiny_worlds.FUNCTIONS, "functions:look_up,count", tiny_worlds.Talk, "class:Talk"):
        with pytest.raises(UserError, match=r"^setting 'environment': learn plays it again .*; put it into a module"):
            make(action=action, environment=given)
    with pytest.raises(UserError, match=r"^setting 'scorer': learn scores with it .*; put it into a module"):
        make(action=action, scorer=lambda *_: True)
    assert make(action=action, environment="python:tiny_worlds.FUNCTIONS").environment == "python:tiny_worlds.FUNCTIONS"


def test_what_had_not_begun_to_learn_gives_way_to_another_addition(
    make: Settings, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    long = write_rows([{"prompt": "x" * 600, "completion": "y"}], name="long.jsonl")
    with pytest.raises(UserError, match="do not fit"):
        add(make("more", test=str(long)))  # a test is read after the addition has begun
    assert (tmp_path / "state" / "pending").is_dir()
    assert add(make())["accepted"]


def test_an_addition_goes_on_after_the_state_was_moved(
    make: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(make(state=str(tmp_path / "whole")))
    real = add_skill.train

    def cut(*arguments: Any, **named: Any) -> Path:
        def stop(step: int, _loaded: Any, _metrics: Any) -> None:
            if step == 2:
                raise KeyboardInterrupt

        return real(*arguments, **(named | {"on_step": stop}))

    monkeypatch.setattr(add_skill, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        add(make())
    monkeypatch.undo()
    (tmp_path / "state").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert add(make(state="moved", data="first.jsonl"))["accepted"]
    a, b = (load_file(tmp_path / name / "skills/0001-first/model/model.safetensors") for name in ("whole", "moved"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_the_command_line_leaves_out_is_in_the_file(
    make: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = make(max_steps=1).model_dump()
    file = tmp_path / "learn.yaml"
    file.write_text(json.dumps({key: value for key, value in values.items() if key != "action"}), encoding="utf-8")
    assert main(["learn", "--config", str(file), "add"]) == 0
    capsys.readouterr()
    assert main(["learn", "--state", str(tmp_path / "typo"), "rollback"]) == 2
    assert not (tmp_path / "typo").exists()


def test_a_base_that_was_moved_is_known_by_its_weights(make: Settings, tmp_path: Path) -> None:
    shutil.copytree(make().model, tmp_path / "base")
    config = make(model=str(tmp_path / "base"))
    add(config)
    second = make("second", model="")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"base '.*' does not exist; if it was moved, give its new location as model$"):
        add(second)
    assert add(second.model_copy(update={"model": str(tmp_path / "elsewhere")}))["accepted"]
    assert Ledger(config.state).base == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("learnt", [False, True])
def test_a_base_whose_weights_changed_in_place_is_refused(
    make: Settings, model_folder: Callable[..., Path], tmp_path: Path, learnt: bool
) -> None:
    base, link = model_folder(layers=1), tmp_path / "current"
    link.symlink_to(base)
    config = make(model=str(link), max_steps=1)
    if learnt:
        assert add(config)["accepted"]
    else:
        assert not add(config.model_copy(update={"method": "sdft", "context": "turns"}))["accepted"]  # by the teacher
    shutil.copytree(base, tmp_path / "v2")
    weights = load_file(base / "model.safetensors")
    changed = {name: weight + 1 for name, weight in weights.items()}
    save_file(changed, tmp_path / "v2" / "model.safetensors", {"format": "pt"})
    link.unlink()
    link.symlink_to(tmp_path / "v2")
    message = r"its base '.*/current' had weights [0-9a-f]{12} when the state began and has [0-9a-f]{12} now"
    with pytest.raises(UserError, match=message):
        add(make("second", model=str(link)))
    with pytest.raises(UserError, match=message):
        add(make("second", model=""))
    assert add(make("second", model=str(base), max_steps=1))["accepted"]


def test_a_base_that_is_an_adapter_is_to_be_put_back(
    make: Settings, settings: Callable[..., Any], tmp_path: Path
) -> None:
    train(settings("runs", lora_rank=2, max_steps=1))
    add(make(model=str(tmp_path / "runs")))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    back = "cannot be compared; if it was moved, put it or a link to it back there"
    with pytest.raises(UserError, match=rf"base '.*runs' does not exist; it is an adapter, whose .* {back}$"):
        add(make("second", model=""))
    with pytest.raises(UserError, match=rf"'model': .* started from '.*runs', an adapter, .* {back}, and leave model"):
        add(make("second", model=str(tmp_path / "elsewhere")))
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    assert add(make("second", model=""))["accepted"]


def test_what_has_not_begun_to_learn_does_not_keep_a_skill_from_being_taken_back(
    make: Settings, tmp_path: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    add(make())
    long = write_rows([{"prompt": "x" * 600, "completion": "y"}], name="long.jsonl")
    with pytest.raises(UserError, match="do not fit"):
        add(make("more", test=str(long)))  # a test is read after the addition has begun
    assert (tmp_path / "state" / "pending").is_dir()
    status = learn(make(action="status", data=""))
    assert (status.details["pending"], status.details["has_begun"]) == ("more", False)
    assert "Adding 'more' was interrupted before it began to learn: rerun the same command" in repr(status)
    with pytest.raises(UserError, match="do not fit"):
        add(make("other", test=str(long)))
    assert "note: the addition of 'more', which had not begun to learn, is discarded\n" in capsys.readouterr().err
    learn(make(action="rollback", data=""))
    assert not (tmp_path / "state" / "pending").exists()
    assert Ledger(make().state).skills == []


def test_mistakes_about_a_state_that_exists(make: Settings, tmp_path: Path) -> None:
    add(make())
    other = tmp_path / "other"
    shutil.copytree(make().model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "other.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n', encoding="utf-8")
    for values, message in (
        ({"model": str(other)}, "setting 'model': .* started from '.*', but '.*' has different weights; leave it out"),
        (
            {"prior": str(tmp_path / "other.jsonl")},
            "setting 'prior': .* started with other questions, or none; leave it",
        ),
        (
            {"mixed_precision": "bf16"},
            "setting 'mixed_precision': all scores in .* were measured with 'no'; use the same",
        ),
        (
            {"max_steps": 2, "max_prior_drop": 0.5},
            "setting 'name': .* already has a skill 'first'; give another name, with replaces 'first' if this skill "
            "is to replace it, or undo it first: .* rollback. Differences: "
            "max_steps was 3 and is now 2$",
        ),
    ):
        with pytest.raises(UserError, match=message):
            add(make(**values))
    assert add(make(name="again"))["accepted"]
    (tmp_path / "state" / "start" / "state.yaml").write_text("- no", encoding="utf-8")
    with pytest.raises(UserError, match=r"state\.yaml: cannot be read as a state of selfdistill learn"):
        Ledger(str(tmp_path / "state"))
