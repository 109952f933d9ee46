"""Autocast's casts of weights: a run uses none from before a step, nor one without gradients in its loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import add_gradient

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.training import batch_gradient
from selfdistill.training.plan import plan
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize("start", [train, Trainer, plan])
def test_a_run_within_a_callers_autocast_is_refused(settings: Make, start: Callable[..., Any]) -> None:
    config = settings()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=r"^torch\.autocast is on, .*\n?$"):
        start(config)
    assert not Path(config.output_dir).exists()


def test_autocast_keeps_casts_that_are_no_longer_true() -> None:
    """Why it is refused: the weight changes, and the product does not."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        before = torch.ones(2, 2) @ weight
        with torch.no_grad():
            weight.mul_(2)
        assert torch.equal(torch.ones(2, 2) @ weight, before)


def test_casts_made_without_gradients_are_dropped_before_the_loss(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch up to 2.10 would take the head's cast from there, and the loss would have no gradient."""
    run = Trainer(settings(importance_cap=2.0, batch_size=2, mixed_precision="bf16"))
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:2], 0)
    seen = []
    loss, clear = batch_gradient.chunked_loss, torch.clear_autocast_cache

    def noted_loss(*arguments: Any, **options: Any) -> Any:
        seen.append("loss" if torch.is_grad_enabled() else "weights")
        return loss(*arguments, **options)

    def noted_clear() -> None:
        seen.append("clear")
        clear()

    monkeypatch.setattr(batch_gradient, "chunked_loss", noted_loss)
    monkeypatch.setattr(torch, "clear_autocast_cache", noted_clear)
    add_gradient(run, completions)
    assert seen[seen.index("weights") : seen.index("loss")] == ["weights", "clear"]  # regions clear at their end, too
