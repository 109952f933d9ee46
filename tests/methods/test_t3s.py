"""T3S: which tokens are learnt, against plain code; its limits.

Dimensions in names: T completion tokens, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENDS, Cut, assert_same_run, crash_at, final_weights, metrics_of, row_log_probs, same
from formulas import assert_gradient, chosen, moved
from torch import Tensor

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.sequences import Completion
from selfdistill.model.loading import load_model
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    "values",
    [{}, {"lora_rank": 4}, {"gradient_accumulation_steps": 2}, {"loss_normalisation": "token"}],
    ids=str,
)
def test_tokens_that_the_worse_model_has_learnt_are_left_out(all_of_them: Settings, values: dict[str, Any]) -> None:
    """A demonstration's loss is the mean over those that are left; with token normalisation they count alike."""
    config = all_of_them(method="t3s", batch_size=6, learning_rate=1e-2, **values)
    run = moved(config)
    assert config.teacher_model is not None
    base, worse = (load_model(name).model.requires_grad_(False) for name in (config.model, config.teacher_model))
    kept: list[bool] = []

    def values_of(student: Any, c: Completion) -> Tensor:
        seen = [chosen(row_log_probs(m, c.example.student_ids, c.ids), c.ids) for m in (student, worse, base)]
        left_T = seen[1] <= seen[2]
        kept.extend(left_T.tolist())
        lost_T = -torch.where(left_T, seen[0], 0.0)
        if "loss_normalisation" in values:
            return lost_T.sum()[None] / statistics.mean(len(sample.ids) for sample in samples)
        return lost_T.sum()[None] / left_T.sum().clamp(min=1)

    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples, 1)
    assert_gradient(run, samples, values_of)
    assert [c.ids for c in samples] == [x.completion_ids for x in run.stage.task.examples]
    assert 0 < sum(kept) < len(kept)


EPISODE = [{"role": role, "content": text} for role, text in (("assistant", "ab"), ("user", "go"), ("assistant", "cd"))]


@pytest.mark.parametrize("completion", ["abab", EPISODE], ids=["reply", "episode"])
def test_with_a_model_that_has_learnt_nothing_it_is_sft(
    all_of_them: Settings, write_rows: Callable[..., Path], completion: Any
) -> None:
    data = str(write_rows([{"prompt": f"q{i}", "completion": completion} for i in range(4)], name="own.jsonl"))
    found = []
    for method in ("t3s", "sft"):
        config = all_of_them(method, method=method, data=data)
        if method == "t3s":
            config = config.model_copy(update={"teacher_model": config.model})
        train(config)
        found.append(final_weights(config))
    assert same(*found)


def test_of_a_model_that_has_learnt_it_all_nothing_is_left(all_of_them: Settings) -> None:
    learnt = all_of_them("learnt", method="sft", max_steps=30, batch_size=6, learning_rate=1e-2)
    train(learnt)
    config = all_of_them(method="t3s", teacher_model=learnt.output_dir, batch_size=6, max_steps=1)
    train(config)
    assert metrics_of(config)[0]["loss"] < 0.1 * metrics_of(learnt)[0]["loss"]


def test_a_short_sft_run_is_a_checkpoint_of_a_longer_one(all_of_them: Settings) -> None:
    """So it can be the worse model."""
    common: dict[str, Any] = {"method": "sft", "lr_scheduler_type": "constant", "batch_size": 3}
    seen: list[dict[str, Tensor]] = []

    def look(step: int, loaded: Any, _: Any) -> None:
        if step == 2:
            seen.append({name: tensor.clone() for name, tensor in loaded.model.state_dict().items()})

    train(all_of_them("long", max_steps=5, **common), on_step=look)
    train(all_of_them("short", max_steps=2, **common))
    short = final_weights(all_of_them("short", max_steps=2, **common))
    assert all(torch.equal(short[name], seen[0][name]) for name in short)


def test_a_killed_run_leaves_out_the_same(all_of_them: Settings) -> None:
    whole, cut = (all_of_them(name, method="t3s", save_steps=2, max_steps=5) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    assert_same_run(whole, cut)


def test_it_needs_the_worse_model(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"^setting 'teacher_model': t3s needs an SFT run on the same data"):
        Trainer(settings(method="t3s"))


def test_the_worse_model_is_not_the_students_teacher(all_of_them: Settings, model_folder: Callable[..., Path]) -> None:
    run = Trainer(all_of_them(method="t3s"))
    assert {rule.model for rule in run.teachers} == {None, str(model_folder(ends=ENDS, seed=1))}
