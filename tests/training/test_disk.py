"""A run starts only where the disk holds what it still writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cut, crash_at

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.model.loading import LoadedModel
from selfdistill.training import disk
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.train import train

Make = Callable[..., TrainConfig]
HEADERS = 1.05
"""Files are larger than their tensors, which counts in tiny ones."""


def held(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the free space in bytes."""
    return lambda size: monkeypatch.setattr(disk, "free_bytes", lambda _: int(size))


@pytest.mark.parametrize("stop", [False, True])
def test_the_disk_must_hold_what_a_run_may_go_back_to(
    settings: Make, write_rows: Callable[..., Path], free: Callable[[float], None], stop: bool
) -> None:
    test = {"test": str(write_rows(count=2, name="test.jsonl")), "eval_steps": 1}
    config = settings(**test, stop_on_collapse=stop, learning_rate=1e-6)
    train(config)
    free(0.95 * held(Path(config.output_dir)))
    with pytest.raises(UserError, match="checkpoints and the final model need about"):
        train(settings("again", **test, stop_on_collapse=stop, learning_rate=1e-6, save_steps=1))


def test_a_resumed_run_needs_space_for_what_it_adds(settings: Make, free: Callable[[float], None]) -> None:
    config = settings(save_steps=2)
    with pytest.raises(Cut):
        train(config, on_step=crash_at(5))
    one = held(list_checkpoints(Path(config.output_dir))[0])
    final = one / 4  # a checkpoint has two moments and an average of each weight, too
    free(HEADERS * (one + final))
    with pytest.raises(UserError, match="checkpoints and the final model need about"):
        train(settings("another", save_steps=2))
    train(config, resume=True)
    free(HEADERS * final)  # nothing else is left to write
    train(config, resume=True)
    free(0.8 * final)
    with pytest.raises(UserError, match=r"the final model needs about \d\.\d MiB; free some space$"):
        train(config, resume=True)
    with pytest.raises(UserError, match="free some space, or use save_steps 0"):
        train(config.model_copy(update={"max_steps": 7}), resume=True)


def test_what_a_killed_process_left_counts_as_free(settings: Make, free: Callable[[float], None]) -> None:
    config = settings(save_steps=2)
    with pytest.raises(Cut):
        train(config, on_step=crash_at(5))
    older = list_checkpoints(Path(config.output_dir))[0]
    one = held(older)
    older.rename(older.parent / f".{older.name}.removed")
    free(HEADERS * (1 + 1 / 4) * one)
    train(config, resume=True)


def test_weights_that_are_not_trained_are_in_the_final_model(
    settings: Make, load: Callable[..., LoadedModel], free: Callable[[float], None]
) -> None:
    config, loaded = settings(method="sft"), load()
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    size = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    free(size - 1)
    with pytest.raises(UserError, match="the final model needs about"):
        train(config, loaded=loaded)
    free(size)
    final = train(config, loaded=loaded)
    assert held(final) >= size
