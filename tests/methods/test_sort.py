"""SORT: which references are learnt, their weights against plain float64 code, its limits, and runs that stop.

Dimensions in names: T completion tokens, V vocabulary.
"""

from __future__ import annotations

import copy
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
    gradients,
    largest_difference,
    metrics_of,
    row_log_probs,
    same,
)
from formulas import advantages, assert_gradient, chosen, judged, mean_over_rows, moved, trained_in_one_and_two

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.sequences import DatasetCompletions
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]


@pytest.fixture
def planned(all_of_them: Settings, write_rows: Callable[..., Path]) -> Settings:
    """Rows with plans; few replies are right."""
    rows = [
        {
            "prompt": f"q{i}" * (1 + i % 3),
            "completion": "ab" * (1 + i % 4),
            "privileged_context": f"first {i}, then b" * (1 + i % 2),
            "scorer": "regex",
            "answer": r"[\s\S]{8,}",
        }
        for i in range(6)
    ]
    data = write_rows(rows, name="plans.jsonl")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        fixed: dict[str, Any] = {"method": "sort", "data": str(data), "num_generations": 3, "method_settings": {}}
        return all_of_them(out, **(fixed | values))

    return make


REWARDS = [0.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
"""Of three prompts, the first and last of which have no right sample."""


@pytest.mark.parametrize(
    ("own", "values"),
    [({}, {}), ({"plan": 0.2, "weight": 0.4}, {"gradient_accumulation_steps": 3}), ({"plan": 1}, {"lora_rank": 4})],
    ids=str,
)
def test_sort_is_its_formula(planned: Settings, own: dict[str, Any], values: dict[str, Any]) -> None:
    run = moved(planned(batch_size=3, learning_rate=1e-2, method_settings=own, **values))
    examples, exponent = run.stage.task.examples[:3], own.get("plan", 0.5)
    samples = run.stage.task.method.sequence(run.loaded, examples, 2)
    student = copy.deepcopy(run.loaded.model).double()
    policy = [
        -advantage * chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids)
        for c, advantage in zip(samples, advantages(REWARDS, 3), strict=True)
    ]
    learnt: list[Any] = [torch.zeros(1).double()]  # of the second prompt nothing
    for x in (examples[0], examples[2]):
        row = x.demonstration
        text = f"{row.prompt[0]['content']}\n\nLet this guide your answer:\n\n{row.privileged_context}\n\n"
        guided = run.chat.encode_prompt([{"role": "user", "content": f"{text}Now answer the question."}])
        logp_T, planned_T = (
            chosen(row_log_probs(student, ids, x.completion_ids), x.completion_ids) for ids in (x.student_ids, guided)
        )
        weight_T = logp_T.exp() ** (1 - exponent) * planned_T.exp() ** exponent
        learnt.append(-weight_T.detach() * logp_T)
    losses = mean_over_rows(policy), mean_over_rows(learnt)
    (losses[0] + own.get("weight", 1) * losses[1]).backward()
    for result, loss in zip(judged(run, samples, REWARDS), losses, strict=True):
        assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert largest_difference(gradients(run.loaded.model), gradients(student)) < 1e-5


def test_without_plans_the_references_are_learnt_as_by_dft(planned: Settings) -> None:
    run = moved(planned(batch_size=3, method_settings={"plan": 0}))
    examples = run.stage.task.examples[:3]
    judged(run, run.stage.task.method.sequence(run.loaded, examples, 2), [0.0] * 9)
    found = gradients(run.loaded.model)
    dft = moved(planned("dft", method="dft"))
    dft.loaded.model.load_state_dict(run.loaded.model.state_dict())
    completions = DatasetCompletions()(dft.loaded, examples, 0)

    def values(student: Any, c: Any) -> torch.Tensor:
        logp_T = chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids)
        return -logp_T.exp().detach() * logp_T

    assert_gradient(dft, completions, values)
    assert largest_difference(found, gradients(dft.loaded.model)) < 1e-6


def test_where_every_sample_is_right_sort_is_grpo(planned: Settings, write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": f"q{i}", "completion": "ab", "scorer": "regex", "answer": r"[\s\S]*"} for i in range(4)]
    rows = [row | {"privileged_context": "p"} for row in rows]
    runs = [planned(x, method=x, data=str(write_rows(rows, name="easy.jsonl")), max_steps=2) for x in ("sort", "grpo")]
    for config in runs:
        train(config)
    assert same(*map(final_weights, runs))
    assert metrics_of(runs[0])[0]["loss/references"] == 0


def test_no_weights_are_held_for_the_plan(planned: Settings) -> None:
    (teacher,) = Trainer(planned()).teachers.values()
    assert (teacher.kind, teacher.memory_bytes) == ("live", 0)
    assert not Trainer(planned("none", method_settings={"plan": 0})).teachers


def test_a_row_needs_a_plan_unless_it_is_not_used(planned: Settings, write_rows: Callable[..., Path]) -> None:
    data = str(write_rows([{"prompt": "q", "completion": "a"}], name="bare.jsonl"))
    with pytest.raises(UserError, match="'privileged_context': missing, the plan that method 'sort' shows; add it, or"):
        train(planned(data=data))
    Trainer(planned(data=data, method_settings={"plan": 0}))


def test_a_killed_run_goes_on_to_the_same_bits(planned: Settings) -> None:
    whole, cut = (planned(name, max_steps=4, save_steps=2) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    assert_same_run(whole, cut)
    assert min(line["loss/references"] for line in metrics_of(whole)) >= 0 < metrics_of(whole)[-1]["loss/references"]


@pytest.mark.slow  # tests/methods/test_sdpo.py has such a part in two processes
@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="copies"),
        pytest.param({"fsdp": True, "batch_size": 2, "learning_rate": 3e-5}, id="sharded"),
    ],
)
def test_two_processes_train_to_the_weights_of_one(planned: Settings, tmp_path: Path, values: dict[str, Any]) -> None:
    common: dict[str, Any] = {"batch_size": 3, "max_steps": 3, "num_generations": 2}
    lines = trained_in_one_and_two(planned, tmp_path, common | values)
    assert max(line["loss/references"] for line in lines) > 0
