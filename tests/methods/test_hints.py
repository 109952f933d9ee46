"""Hints and controllers: what the teacher sees at each step, against contexts written by hand; resume; processes.

Dimensions in names: T completion tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import train_together
from conftest import (
    Cut,
    add_gradient,
    assert_same_run,
    crash_at,
    final_weights,
    largest_difference,
    methods_where,
    metrics_of,
    quick,
    row_log_probs,
    same,
    share_apart,
)
from formulas import assert_gradient, kl, moved, trained_whole_and_in_parts
from torch import Tensor

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods import METHODS, Method, shows_parts, stages_of
from selfdistill.methods.hints import HintSchedule
from selfdistill.methods.sequences import Completion
from selfdistill.model import Rollout
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.plan import plan
from selfdistill.training.run import Run
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]
WORDS = ["ab cd ef gh ij", "kl mn op", "qr", "st uv wx yz ab cd ef gh ij kl", "no yes", "ef  gh ij kl"]


@pytest.fixture
def worded(settings: Settings, write_rows: Callable[..., Path]) -> Settings:
    """Demonstrations of one to ten words; a reply is right if it has four letters or more."""
    rows = [
        {"prompt": f"q{i}", "completion": text, "scorer": "regex", "answer": r"[\s\S]{4,}"}
        for i, text in enumerate(WORDS)
    ]
    data = write_rows(rows, name="worded.jsonl")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        return settings(out, **({"data": str(data), "batch_size": 3, "learning_rate": 1e-4} | values))

    return make


def weights_after(config: TrainConfig) -> dict[str, Tensor]:
    train(config)
    return final_weights(config)


def context_by_hand(run: Trainer, row: Any, share: float) -> list[int]:
    words = row.completion.replace("  ", " +").split(" ")  # a double space belongs to the word after it
    shown = " ".join(words[: int(share * len(words) + 1e-9)]).replace("+", " ")
    before = [*row.prompt, {"role": "assistant", "content": shown}] if shown else []
    return run.chat.encode_prompt([*before, *row.prompt])


def gradient_with_share(run: Trainer, method: Method, share: float) -> None:
    samples = method.sequence(run.loaded, run.stage.task.examples[:4], 1)

    def values(student: Any, c: Completion) -> Tensor:
        seen = context_by_hand(run, c.example.demonstration, share)
        with torch.no_grad(), run.teacher.model() as network:  # type: ignore[union-attr]
            log_q_TV = row_log_probs(network, seen, c.ids)
        return kl(log_q_TV, row_log_probs(student, c.example.student_ids, c.ids))

    assert_gradient(run, samples, values, method)


# --- a share ---


@pytest.mark.parametrize("share", ["0.1", "0.4", "0.75"])
def test_the_teacher_sees_a_share_of_the_words(worded: Settings, share: str) -> None:
    run = moved(worded(hint=share, ema_rate=0.3, learning_rate=1e-2))
    gradient_with_share(run, run.stage.task.method, float(share))


def test_without_a_hint_another_model_teaches_rows_of_prompts(
    worded: Settings, write_rows: Callable[..., Path], model_folder: Callable[..., Path]
) -> None:
    prompts = write_rows([{"prompt": f"q{i}"} for i in range(len(WORDS))], name="prompts.jsonl")
    other = {"hint": 0, "teacher_model": str(model_folder(seed=1))}
    run = moved(worded(**other, data=str(prompts)))
    gradient_with_share(run, run.stage.task.method, 0)
    assert same(weights_after(worded("prompts", **other, data=str(prompts))), weights_after(worded("replies", **other)))
    with pytest.raises(UserError, match=r"column 'completion': missing, and no 'privileged_context'"):
        train(worded("half", **other | {"hint": 0.5}, data=str(prompts)))


def test_a_hint_of_the_whole_demonstration_is_sdft(worded: Settings) -> None:
    plain = weights_after(worded("plain"))
    for number, hint in enumerate((1, "1:1")):
        assert same(weights_after(worded(f"whole{number}", hint=hint)), plain)
    assert largest_difference(weights_after(worded("part", hint=0.5)), plain) > 1e-6


@pytest.mark.parametrize("method", methods_where(shows_parts, hint="0.2:0.8"))
def test_methods_take_hints(worded: Settings, method: Any) -> None:
    run = Trainer(worded(method=method, hint="0.2:0.8"))
    lines = [run.step(step) for step in range(6)]
    assert [line["control"] for line in lines] == pytest.approx([0.2, 0.32, 0.44, 0.56, 0.68, 0.8])
    assert run.stage.task.method.at(5, 6, 0.8).loss == replace(run.stage.task.method, controller=None).at(5, 6).loss


# --- a schedule ---


@pytest.mark.parametrize(("step", "share"), [(0, 0.2), (3, 0.6), (6, 1.0), (9, 1.0)])
def test_a_schedule_goes_from_one_share_to_the_other(worded: Settings, step: int, share: float) -> None:
    run = moved(worded(hint="0.2:1", ema_rate=0.3, max_steps=7))
    task = run.stage.task.method
    assert task.controller is not None
    assert task.controller.value({}, step, 7) == pytest.approx(share)
    gradient_with_share(run, task.at(step, 7, share), share)


@pytest.mark.parametrize("teacher", quick(("ema", "frozen"), "ema"))
def test_a_controller_that_is_constant_is_the_method_itself(
    worded: Settings, monkeypatch: pytest.MonkeyPatch, teacher: Any
) -> None:
    common: dict[str, Any] = {"teacher": teacher, "teacher_cache_mib": 0}
    fixed = weights_after(worded("fixed", hint="0.5", **common))
    assert same(weights_after(worded("same", hint="0.5:0.5", **common)), fixed)
    monkeypatch.setattr(HintSchedule, "value", lambda *_: 0.5)
    assert same(weights_after(worded("constant", hint="0:1", **common)), fixed)


EMA: dict[str, Any] = {}
LORA = {"teacher": "frozen", "lora_rank": 4}


@pytest.mark.parametrize(
    ("hint", "values"),
    [
        pytest.param("0.1:0.9", EMA, id="0.1:0.9-ema"),
        pytest.param("shortest", LORA, id="shortest-lora"),
        *(
            pytest.param(hint, values, id=f"{hint}-{name}", marks=pytest.mark.slow)
            for hint, name, values in (
                ("0.1:0.9", "lora", LORA),
                ("1:0", "ema", EMA),
                ("1:0", "lora", LORA),
                ("shortest", "ema", EMA),
            )
        ),
    ],
)
def test_a_killed_run_sees_the_same_hints(worded: Settings, hint: str, values: dict[str, Any]) -> None:
    common: dict[str, Any] = {"hint": hint, "save_steps": 2, "max_steps": 7, **values}
    whole, cut = worded("whole", **common), worded("cut", **common)
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    assert_same_run(whole, cut)


def test_a_context_without_room_leaves_its_sample_out_and_is_counted(worded: Settings) -> None:
    """Some part of a demonstration may have more tokens than the limit; here the limit falls after the examples."""
    run = Trainer(worded(hint="0:1", batch_size=6))
    run.selector.config = run.config.model_copy(update={"max_prompt_length": 60})
    lines = [run.step(step) for step in (0, 5)]
    assert [line["learnt"] for line in lines] == [1, 1 - lines[1]["unfit"]]
    assert 0 < lines[1]["unfit"] < 1


# --- the shortest ---


def test_the_shortest_hint_with_which_the_greedy_reply_is_right(
    worded: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is made to reply with as many letters as its context has beyond two prompts and three."""
    config = worded(hint="shortest", batch_size=6)
    length = len(Trainer(worded("other")).chat.encode_prompt([{"role": "user", "content": "q0"}]))
    asked: list[int] = []

    def reply(_: Any, prompts: list[list[int]], sampling: Any) -> list[Rollout]:
        assert sampling.temperature == 0
        asked.append(len(prompts))
        return [Rollout([97] * max(0, len(ids) - 2 * length - 3), [], False) for ids in prompts]

    monkeypatch.setattr("selfdistill.methods.hints.sample", reply)
    run = Trainer(config)
    tenths = []
    for example in run.stage.task.examples:
        row = example.demonstration
        seen = [context_by_hand(run, row, share / 10) for share in range(11)]
        right = [share for share in range(10) if len(seen[share]) - 2 * length - 3 >= 4]
        tenths.append(min(right, default=10))
        assert example.teacher_ids == seen[tenths[-1]]
    assert len(set(tenths)) > 3
    assert asked[0] == 6
    assert asked == sorted(asked, reverse=True)
    assert sum(asked) == sum(min(10, share + 1) for share in tenths)


def test_the_shortest_hints_are_kept(worded: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = worded(hint="shortest", save_steps=2, max_steps=2)
    train(config)
    lines = (Path(config.output_dir) / "teacher_samples.jsonl").read_text(encoding="utf-8").splitlines()
    run = Trainer(config)
    assert [json.loads(line)["ids"] for line in lines] == [x.teacher_ids for x in run.stage.task.examples]

    def refuse(*_: Any) -> None:
        raise AssertionError("looked for again")

    monkeypatch.setattr("selfdistill.methods.hints.ShortestHints.draw", refuse)
    train(config.model_copy(update={"max_steps": 3}), resume=True)


@pytest.mark.parametrize("turns", ["all", "last"])
def test_that_the_shortest_hint_learns_the_last_reply_alone_is_said(
    worded: Settings, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str], turns: str
) -> None:
    told = [("user", "q"), ("assistant", "ab"), ("user", "r"), ("assistant", "ab cd")]
    row = {"messages": [{"role": role, "content": text} for role, text in told], "answer": "ab"}
    run = Trainer(worded(hint="shortest", data=str(write_rows([row], name="e.jsonl")), turns=turns))
    said = "hint shortest learns the last reply alone of 1 row with several" in capsys.readouterr().err
    assert said == (turns == "all")
    assert len(run.stage.task.examples) == 1


# --- controllers ---


@dataclass(frozen=True)
class Follower:
    """The weight follows the last loss; it remembers how often it was asked."""

    @property
    def start(self) -> dict[str, Any]:
        return {"next": 0.5, "seen": 0}

    def value(self, state: dict[str, Any], step: int, steps: int) -> float:
        assert state["seen"] == step
        return float(state["next"])

    def update(self, state: dict[str, Any], metrics: dict[str, Any], step: int, steps: int) -> dict[str, Any]:
        return {"next": metrics["loss"] % 1, "seen": state["seen"] + 1}

    def applied(self, method: Method, value: float) -> Method:
        return replace(method, weight=1 + value)


@pytest.fixture
def follower(worded: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    plain = METHODS["sdft"]
    monkeypatch.setitem(METHODS, "sft", lambda config: tuple(replace(x, controller=Follower()) for x in plain(config)))

    def make(out: str = "run", **values: Any) -> TrainConfig:
        return worded(out, **({"method": "sft"} | values))

    return make


def test_a_controller_reads_a_step_and_writes_the_next(follower: Settings) -> None:
    run = Trainer(follower())
    lines = [run.step(step) for step in range(4)]
    assert lines[0]["control"] == 0.5
    assert [line["control"] for line in lines[1:]] == [line["loss"] % 1 for line in lines[:-1]]
    assert run.control == {"next": lines[-1]["loss"] % 1, "seen": 4}
    assert run.step(0)["control"] == 0.5  # a stage begins anew


def test_what_a_controller_remembers_is_in_the_checkpoint(follower: Settings) -> None:
    common: dict[str, Any] = {"save_steps": 2, "max_steps": 7}
    whole, cut = follower("whole", **common), follower("cut", **common)
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(5))
    state = json.loads((list_checkpoints(Path(cut.output_dir))[-1] / "state.json").read_text(encoding="utf-8"))
    assert state["control"] == {"next": metrics_of(cut)[3]["loss"] % 1, "seen": 4}
    train(cut, resume=True)
    assert_same_run(whole, cut)


def test_a_method_without_a_controller_is_the_same_at_every_step(worded: Settings) -> None:
    ((part,),) = stages_of(worded())
    assert part.method.at(3, 7) is part.method


def test_parts_of_a_batch_see_the_hints_of_the_whole(worded: Settings) -> None:
    lines = trained_whole_and_in_parts(worded, 3, {"hint": "0:1", "max_steps": 3})
    assert [line["control"] for line in lines] == [0, 0.5, 1]


@pytest.mark.parametrize("hint", ["0:1", pytest.param("shortest", marks=pytest.mark.slow)])
def test_two_processes_see_the_hints_of_one(worded: Settings, tmp_path: Path, hint: str) -> None:
    one, two = (worded(name, max_steps=3, hint=hint) for name in ("one", "two"))
    train(one)
    train_together(two, tmp_path)
    assert share_apart(final_weights(one), final_weights(two)) < 1e-3
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert a.get("control") == b.get("control")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"hint": "0.5"}, marks=pytest.mark.slow),
        pytest.param({"hint": "0:1"}, marks=pytest.mark.slow),
        {"hint": "shortest"},
        {"method": "atesd"},
    ],
    ids=str,
)
def test_only_layouts_that_can_show_a_part_are_compared(worded: Settings, values: dict[str, Any]) -> None:
    config = worded(context="auto", max_steps=1, **values)
    train(config)
    assert Run(config.output_dir).config.context.startswith(("turns", "example"))


@pytest.mark.parametrize("hint", quick(("0.5", "0:1", "shortest"), "shortest"))
def test_a_dry_run_with_a_hint(worded: Settings, hint: str) -> None:
    found = plan(worded(hint=hint))
    assert found.memory is not None
    assert found.memory.untraced is None
    assert found.teacher_prompt is not None
    assert len(found.teacher_prompt) > len(found.student_prompt)


# --- mistakes ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hint": "1.5"}, "setting 'hint': found '1.5', expected: a share from 0 to 1, two of them as in 0.2:1, or"),
        ({"hint": "0:1:0"}, "setting 'hint': found '0:1:0', expected: a share from 0 to 1"),
        ({"hint": "nan"}, "setting 'hint': found 'nan', expected: a share from 0 to 1"),
        (
            {"hint": "0.5", "context": "few_shot:k=2"},
            "context 'few_shot:k=2,pick=seed,this=false,seed=0': cannot show a part",
        ),
        ({"hint": "shortest", "context": "document"}, "context 'document:repeats=1,show=both': cannot show a part of"),
        ({"hint": "shortest", "teacher_model": "m"}, "setting 'hint': shortest samples from the student, not"),
    ],
)
def test_a_hint_that_cannot_be_used_is_refused_in_one_line(
    worded: Settings, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        train(worded(**values))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_add_gradient_takes_the_contexts_of_the_step(worded: Settings) -> None:
    """A step with nothing of the demonstration and a frozen teacher has nothing to teach at first."""
    run = Trainer(worded(hint="0:1", teacher="frozen"))
    task = run.stage.task.method
    samples = task.sequence(run.loaded, run.stage.task.examples, 1)
    assert add_gradient(run, samples, task.at(0, 6, 0.0)).loss == pytest.approx(0, abs=1e-6)
    assert add_gradient(run, samples, task.at(5, 6, 1.0)).loss > 1e-3
