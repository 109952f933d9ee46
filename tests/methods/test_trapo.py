"""TRAPO: which samples get which prefix, the loss on prefixes and samples against float64 code, limits, resuming.

Dimensions in names: T completion tokens.
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
)
from formulas import (
    advantages,
    checks_counted,
    chosen,
    judged,
    mean_over_rows,
    moved,
    prefix_of,
    trained_in_one_and_two,
)

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods.sequences import Completion
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]


@pytest.fixture
def guided(all_of_them: Settings, write_rows: Callable[..., Path]) -> Settings:
    """A reply is right if it begins as the completion, with none, a letter or all of it."""
    answers = ["", "x", "qrstuvwxyz"]
    rows = [
        {"prompt": f"q{i}", "completion": f"{answer}----------"[:10], "scorer": "regex", "answer": f"^{answer}"}
        for i, answer in enumerate(answers)
    ]
    data = write_rows(rows, name="guided.jsonl")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        own = {"sizes": (2, 1, 2, 1)} | values.pop("method_settings", {})
        fixed: dict[str, Any] = {"method": "trapo", "data": str(data), "max_completion_length": 14}
        fixed |= {"num_generations": None, "batch_size": 3, "method_settings": own}
        return all_of_them(out, **(fixed | values))

    return make


def samples_of(run: Trainer) -> list[Completion]:
    return run.stage.task.method.sequence(run.loaded, run.stage.task.examples, 1)


def test_later_samples_get_more_of_the_demonstration_as_long_as_the_earlier_fail(guided: Settings) -> None:
    run = Trainer(guided())
    samples = samples_of(run)
    prefixes = [[prefix_of(c) for c in samples[first : first + 6]] for first in (0, 6, 12)]
    assert prefixes == [
        [0, 0, 0, 0, 0, 0],  # right without help
        [0, 0, 2, 5, 5, 11],  # right with a prefix: means of 0, 1/3 and 3/5
        [0, 0, 2, 5, 5, 11],  # right with all of it
    ]
    for c in samples:
        assert c.ids[: prefix_of(c)] == c.example.completion_ids[: prefix_of(c)]
        assert prefix_of(c) < len(c.ids) <= 14 or c.ids == c.example.completion_ids
        assert not any((c.logps or [])[: prefix_of(c)])
        assert len(c.logps or []) == len(c.ids)


def test_each_sample_is_checked_once(guided: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run, counts = Trainer(guided()), checks_counted(monkeypatch)
    metrics = run.step(0)
    assert sum(counts) == 3 * 6
    assert metrics["reward"] == pytest.approx(1 / 3)  # the first prompt is right without help, the others are not
    assert metrics["reward/helped"] == pytest.approx((1 + 1 / 4) / 2)


def test_a_prompt_that_is_solved_again_gets_no_further_help(guided: Settings) -> None:
    own = {"sizes": (1, 3, 3, 1), "thresholds": (-1, 0.5, 0.7, 0.8)}
    samples = samples_of(Trainer(guided(method_settings=own)))
    # Right after a first failure: means of 0, 3/4 and, where the third group had no help, 3/7 at least.
    assert [prefix_of(c) for c in samples[8:15]] == [0, 2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("own", "values"),
    [({}, {}), ({"trust": 0.003, "weight": 0.3}, {"gradient_accumulation_steps": 3})],
    ids=str,
)
def test_trapo_is_its_formula(guided: Settings, own: dict[str, Any], values: dict[str, Any]) -> None:
    run = moved(guided(learning_rate=1e-2, method_settings=own, **values))
    samples, trust = samples_of(run), own.get("trust", 0.1)
    rewards = [float(number % 4 == 1 or (number > 6 and number % 3 == 2)) for number in range(len(samples))]
    student = copy.deepcopy(run.loaded.model).double()
    policy, given, cut = [], [], 0
    for c, advantage in zip(samples, advantages(rewards, 6), strict=True):
        logp_T = chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids)
        if prefix_of(c) < len(c.ids):
            policy.append(-advantage * logp_T[prefix_of(c) :])
        p_T = logp_T[: prefix_of(c)].detach().exp()
        cut += int((p_T > trust).sum())
        weight_T = torch.where(p_T > trust, 1.0, p_T / trust)
        given.append(-weight_T * logp_T[: prefix_of(c)] if prefix_of(c) else torch.zeros(1).double())
    losses = mean_over_rows(policy), mean_over_rows(given)
    (losses[0] + own.get("weight", 1) * losses[1]).backward()
    for result, loss in zip(judged(run, samples, rewards), losses, strict=True):
        assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert len(policy) < len(samples)
    assert bool(cut) == (trust < 0.1)
    assert largest_difference(gradients(run.loaded.model), gradients(student)) < 1e-5


def test_without_prefixes_trapo_is_grpo(guided: Settings) -> None:
    trapo = guided("trapo", max_steps=3, method_settings={"thresholds": (-1, -1, -1, -1)})
    grpo = guided("grpo", max_steps=3, method="grpo", num_generations=6).model_copy(update={"method_settings": {}})
    for config in (trapo, grpo):
        train(config)
    assert largest_difference(final_weights(trapo), final_weights(grpo)) < 1e-6
    assert {line["loss/prefixes"] for line in metrics_of(trapo)} == {0}


def test_the_whole_demonstration_at_a_trust_of_1_is_learnt_as_by_dft(guided: Settings) -> None:
    own = {"sizes": (2,), "ratios": (1.0,), "thresholds": (2.0,), "trust": 1.0}
    run = moved(guided(method_settings=own))
    judged(run, samples_of(run), [0.0] * 6)
    dft = Trainer(guided("dft", method="dft").model_copy(update={"method_settings": {}}))
    dft.loaded.model.load_state_dict(run.loaded.model.state_dict())
    judged(dft, dft.stage.task.method.sequence(dft.loaded, run.stage.task.examples, 1), [0.0] * 3)
    assert largest_difference(gradients(run.loaded.model), gradients(dft.loaded.model)) < 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_generations": 8}, "setting 'num_generations': found 8, but the micro-groups of trapo have 6 samples;"),
        (
            {"method_settings": {"ratios": (0.5,)}},
            "setting 'method_settings', settings 'sizes', 'ratios' and 'thresholds': expected one value per",
        ),
        (
            {"method_settings": {"sizes": (1,), "ratios": (0.5,), "thresholds": (1.0,)}},
            "setting 'method_settings', setting 'sizes': found 1 sample per prompt, expected at least 2, to compare",
        ),
        ({"method_settings": {"sizes": (0, 1, 1, 1)}}, "setting 'method_settings', setting 'sizes"),
    ],
)
def test_micro_groups_that_do_not_fit_are_refused(guided: Settings, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Trainer(guided(**values))
    assert str(error.value).startswith(message)


def test_a_killed_run_goes_on_to_the_same_bits(guided: Settings) -> None:
    whole, cut = (guided(name, max_steps=4, save_steps=2, batch_size=2) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(guided: Settings, tmp_path: Path) -> None:
    lines = trained_in_one_and_two(guided, tmp_path, {"max_steps": 3})
    assert min(line["loss/prefixes"] for line in lines) > 0
