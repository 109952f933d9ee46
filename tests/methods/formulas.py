"""What the tests of methods share: a method's gradient against its formula in plain code.

Dimensions in names: T completion tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import train_together
from conftest import add_gradient, final_weights, gradients, largest_difference, metrics_of, share_apart
from torch import Tensor

from selfdistill.config.train import TrainConfig
from selfdistill.data import Verdict, verdicts
from selfdistill.methods.sequences import Completion
from selfdistill.methods.slots import Method
from selfdistill.training.batch_gradient import PartResult
from selfdistill.training.selection import BatchPart
from selfdistill.training.stopwatch import Stopwatch
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer


def moved(config: TrainConfig) -> Trainer:
    """After one large step, so that the student is not its base."""
    run = Trainer(config)
    run.step(0)
    return run


def prefix_of(completion: Completion) -> int:
    """Number of leading tokens that were given; a test's samples have no others."""
    assert len(completion.given) <= 1
    return completion.given[0][1] if completion.given else 0


def mean_over_rows(values: list[Tensor]) -> Tensor:
    return torch.stack([row_T.mean() for row_T in values]).mean()


def chosen(log_p_TV: Tensor, ids: list[int]) -> Tensor:
    return log_p_TV[torch.arange(len(ids)), torch.tensor(ids)]


def kl(log_a_TV: Tensor, log_b_TV: Tensor) -> Tensor:
    return (log_a_TV.exp() * (log_a_TV - log_b_TV)).sum(-1)


def assert_gradient(
    run: Trainer,
    completions: list[Completion],
    values_of: Callable[[Any, Completion], Tensor],
    method: Method | None = None,
) -> None:
    """The run's loss and gradient are those of the mean of ``values_of(student, completion)``, by autograd in float64.

    ``method``: in place of the task's, such as the method at another step.
    """
    student = copy.deepcopy(run.loaded.model).double()
    loss = mean_over_rows([values_of(student, completion) for completion in completions])
    loss.backward()
    run.optimizer.zero_grad()
    result = add_gradient(run, completions, method)
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    expected = gradients(student)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    assert largest_difference(gradients(run.loaded.model), expected) < 1e-5


def judged(run: Trainer, samples: list[Completion], rewards: list[float]) -> list[PartResult]:
    """The results of a step with these samples and rewards, all parts of it; its gradient is left in the model."""
    samples = [replace(c, verdict=None) for c in samples]
    reward_of = {id(c): reward for c, reward in zip(samples, rewards, strict=True)}  # two samples may be equal

    def checker(made: Sequence[Completion], _: Any) -> list[Verdict]:
        return [Verdict(reward_of[id(c)]) for c in made]

    parts = [BatchPart(x.name, replace(x.method, checker=checker), samples, x.method.weight) for x in run.stage.parts]
    run.optimizer.zero_grad()
    return run.gradient.add(parts, Stopwatch(run.loaded.device))


def trained_in_one_and_two(
    make: Callable[..., TrainConfig], tmp_path: Path, values: dict[str, Any]
) -> list[dict[str, Any]]:
    """Train in one process and in two: weights and metrics must be the same. Returns the metrics."""
    one, two = make("one", **values | {"fsdp": False}), make("two", **values)
    train(one)
    train_together(two, tmp_path)
    return _same_training(one, two)


def trained_whole_and_in_parts(
    make: Callable[..., TrainConfig], parts: int, values: dict[str, Any]
) -> list[dict[str, Any]]:
    """Train on whole batches and on parts of them: weights and metrics must be the same. Returns the metrics."""
    whole, divided = make("whole", **values), make("divided", gradient_accumulation_steps=parts, **values)
    train(whole)
    train(divided)
    return _same_training(whole, divided)


def _same_training(one: TrainConfig, other: TrainConfig) -> list[dict[str, Any]]:
    assert share_apart(final_weights(one), final_weights(other)) < 1e-4
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    return metrics_of(one)


def checks_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of samples whenever a scorer is asked about some."""
    counts: list[int] = []

    def counted(given: Sequence[Any]) -> list[Verdict]:
        counts.append(len(given))
        return verdicts(given)

    monkeypatch.setattr("selfdistill.methods.checking.verdicts", counted)
    return counts


def advantages(rewards: list[float], group: int) -> list[float]:
    """Of each sample over the others for its prompt."""
    found = []
    for number, reward in enumerate(rewards):
        own = rewards[number // group * group : number // group * group + group]
        found.append((reward - statistics.mean(own)) / (statistics.stdev(own) + 1e-4))
    return found
