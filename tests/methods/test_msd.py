"""MSD: its weights against plain float64 code, its limits, its context, and runs that stop or are divided.

Dimensions in names: T completion tokens, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Cut,
    assert_same_run,
    crash_at,
    final_weights,
    largest_difference,
    row_log_probs,
)
from formulas import assert_gradient, kl, moved, trained_in_one_and_two
from torch import Tensor

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.sequences import Completion
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]

COMMON: dict[str, Any] = {"method": "msd", "ema_rate": 0.3, "num_generations": 2}


def plain_weights(log_p_TV: Tensor, log_q_TV: Tensor, ids: list[int], k: int) -> Tensor:
    """Token by token."""
    weights = []
    for log_p_V, log_q_V, token in zip(log_p_TV, log_q_TV, ids, strict=True):
        q_K = log_q_V.exp().sort(descending=True).values[:k]
        q_K = q_K / q_K.sum()
        doubt = -float((q_K * q_K.log()).sum()) / float(torch.tensor(float(k)).log())
        weights.append((1 - doubt) * (1 - float(log_p_V[token].exp())))
    return torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"method_settings": {"entropy_top_k": 5}, "gradient_accumulation_steps": 4},
        {"skip_first_tokens": 1, "lora_rank": 4},
    ],
    ids=str,
)
def test_msd_is_its_formula(all_of_them: Settings, values: dict[str, Any]) -> None:
    run = moved(all_of_them(**COMMON, batch_size=4, **values))
    k, skipped = values.get("method_settings", {}).get("entropy_top_k", 20), values.get("skip_first_tokens", 0)
    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 1)
    samples = [c for c in samples if len(c.ids) > skipped]

    def loss_of(student: Any, c: Completion) -> Tensor:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        with torch.no_grad(), run.teacher.model() as network:  # type: ignore[union-attr]
            log_q_TV = row_log_probs(network, c.example.teacher_ids or [], c.ids)
        weight_T = plain_weights(log_p_TV.detach(), log_q_TV, c.ids, k)[skipped:]
        return weight_T / weight_T.mean() * kl(log_p_TV, log_q_TV)[skipped:]

    assert len({len(c.ids) for c in samples}) > 2
    assert_gradient(run, samples, loss_of)


def test_msd_without_its_factors_is_sdft_with_the_reverse_kl(all_of_them: Settings) -> None:
    neither = all_of_them("msd", **COMMON, method_settings={"confidence": False, "disagreement": False})
    others = [
        all_of_them("sdft", **COMMON | {"method": "sdft", "divergence": "reverse_kl"}),
        all_of_them("one", **COMMON, method_settings={"confidence": False}),
    ]
    for config in (neither, *others):
        train(config)
    same, other = (largest_difference(final_weights(neither), final_weights(config)) for config in others)
    assert same < 1e-6
    assert other > 1e-5


def test_a_student_that_is_sure_of_every_token_has_no_weights_and_no_loss(all_of_them: Settings) -> None:
    run = Trainer(all_of_them(**COMMON))
    with torch.no_grad():
        run.loaded.model.lm_head.weight.mul_(1e6)
    line = run.step(0)
    assert (line["loss"], line["grad_norm"]) == (0, 0)
    assert "skipped" not in line


def test_the_teacher_may_read_the_question_in_other_words(
    all_of_them: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"Frage {i}", "privileged_context": f"Question {i}. Be careful."} for i in range(3)]
    run = Trainer(all_of_them(**COMMON, data=str(write_rows(rows, name="german.jsonl")), context="rewritten"))
    for number, example in enumerate(run.stage.task.examples):
        student, teacher = (run.loaded.tokenizer.decode(ids) for ids in (example.student_ids, example.teacher_ids))
        assert teacher == student.replace(f"Frage {number}", f"Question {number}. Be careful.") != student
    run.step(0)


def test_a_row_without_other_words_is_refused(all_of_them: Settings) -> None:
    with pytest.raises(UserError, match="column 'privileged_context': missing, which context 'rewritten' shows"):
        Trainer(all_of_them(**COMMON, context="rewritten"))


def test_a_killed_run_goes_on_to_the_same_bits(all_of_them: Settings) -> None:
    whole, cut = (all_of_them(name, **COMMON, max_steps=4, save_steps=2) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    assert_same_run(whole, cut)


@pytest.mark.slow  # tests/methods/test_sdpo.py has such a part in two processes
@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="copies"),
        pytest.param({"fsdp": True, "batch_size": 2, "learning_rate": 3e-5}, id="sharded"),
    ],
)
def test_two_processes_train_to_the_weights_of_one(
    all_of_them: Settings, tmp_path: Path, values: dict[str, Any]
) -> None:
    trained_in_one_and_two(all_of_them, tmp_path, COMMON | {"batch_size": 3, "max_steps": 3} | values)
