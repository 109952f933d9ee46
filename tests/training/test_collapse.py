"""The collapse guard: silent while a run learns, and back to the last measurement where one falls apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import final_weights, metrics_of
from safetensors.torch import load_file

from selfdistill.config.train import TrainConfig
from selfdistill.errors import RunCollapsed, RunFailed, UserError
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.collapse import COLLAPSE_WINDOW, CollapseGuard
from selfdistill.training.train import train

HEALTHY = {"completion/truncated": 0.4, "completion/length": 20.0, "entropy": 2.0, "kl/forward": 0.6}


def seen(guard: CollapseGuard, values: dict[str, float], *, sampled: bool = True) -> list[str]:
    """What is said in the first steps of a healthy run and in as many with these values."""
    said = []
    for step in range(4 * COLLAPSE_WINDOW):
        line = {"step": step + 1} | HEALTHY | (values if step >= 2 * COLLAPSE_WINDOW else {})
        said += guard.look(line, stage=0, sampled=sampled).values()
    return list(dict.fromkeys(sign.split(", at the start")[0] for sign in said))


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ({"drift/student": 3.1}, "the student has drifted 3.1 nats per token from the initial model"),
        ({"drift/teacher": 3.1}, "the teacher has drifted 3.1 nats per token from the initial model"),
        ({"completion/truncated": 1.0}, "100% of the replies reach the length limit"),
        ({"completion/length": 1.0}, "replies have 1.0 tokens, demonstrations 14.0"),
        ({"entropy": 9.0}, "the entropy is 9.0 nats per token"),
        ({"kl/forward": 5.0}, "the student is 5.0 nats per token from its teacher"),
    ],
)
def test_each_sign_is_seen_with_its_numbers(values: dict[str, float], sign: str) -> None:
    assert seen(CollapseGuard([14.0]), values)[-1] == sign


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"drift/student": 2.0, "drift/teacher": 2.0},
        {"completion/truncated": 0.0, "completion/length": 4.0},
        {"entropy": 0.01, "kl/forward": 0.01},
        {"entropy": 3.9},
    ],
)
def test_what_learning_looks_like_is_no_sign(values: dict[str, float]) -> None:
    assert seen(CollapseGuard([14.0]), values) == []


def test_completions_that_are_not_sampled_tell_nothing() -> None:
    values = {"completion/truncated": 1.0, "completion/length": 1.0, "entropy": 9.0}
    assert seen(CollapseGuard([14.0]), values, sampled=False) == []
    signs = seen(CollapseGuard([None]), values)  # without demonstrations
    assert signs
    assert all("entropy" in sign for sign in signs)


def test_demonstrations_of_a_cold_start_are_no_beginning() -> None:
    guard = CollapseGuard([14.0])
    for step in range(6 * COLLAPSE_WINDOW):
        cold = step < 2 * COLLAPSE_WINDOW
        line = {"step": step + 1} | HEALTHY | {"completion/truncated": 0.2 if cold else 1.0}
        assert guard.look(line, stage=0, sampled=not cold) == {}


@pytest.mark.parametrize(("start", "end", "is_sign"), [(None, 1.2, False), (0.1, 1.2, True), (1.2, None, False)])
def test_steps_that_teach_nothing_are_no_measurement(start: float | None, end: float | None, is_sign: bool) -> None:
    guard, signs = CollapseGuard([14.0]), {}
    for step in range(4 * COLLAPSE_WINDOW):
        apart = start if step < 2 * COLLAPSE_WINDOW else end
        line = {key: value for key, value in HEALTHY.items() if key != "kl/forward"} | {"step": step + 1}
        signs |= guard.look(line | ({} if apart is None else {"kl/forward": apart}), stage=0, sampled=True)
    assert ("apart" in signs) == is_sign


@pytest.mark.parametrize(
    ("demonstrated", "start", "end", "is_sign"),
    [(14.0, 2.0, 2.0, False), (100.0, 20.0, 5.0, False), (100.0, 20.0, 3.0, True)],
)
def test_replies_that_were_short_from_the_start_are_no_sign(
    demonstrated: float, start: float, end: float, is_sign: bool
) -> None:
    guard, signs = CollapseGuard([demonstrated]), {}
    for step in range(4 * COLLAPSE_WINDOW):
        length = {"completion/length": start if step < 2 * COLLAPSE_WINDOW else end}
        signs |= guard.look({"step": step + 1} | HEALTHY | length, stage=0, sampled=True)
    assert list(signs) == ["empty"] * is_sign


def test_a_stage_is_compared_with_its_own_beginning() -> None:
    guard = CollapseGuard([14.0, 14.0])
    seen(guard, {})
    for step in range(4 * COLLAPSE_WINDOW):
        line = {"step": step + 1} | HEALTHY | {"completion/truncated": 1.0}
        assert guard.look(line, stage=1, sampled=True) == {}


@pytest.fixture
def falling_apart(settings: Callable[..., TrainConfig], write_rows: Callable[..., Path]) -> Callable[..., TrainConfig]:
    """A live teacher and a rate far too high: what the student becomes, its teacher becomes, too."""
    test = str(write_rows(count=4, name="test.jsonl"))

    def make(out: str = "run", **values: Any) -> TrainConfig:
        common: dict[str, Any] = {
            "teacher": "live",
            "learning_rate": 0.02,
            "max_steps": 40,
            "batch_size": 4,
            "lr_scheduler_type": "constant",
            "drift_steps": 5,
            "test": test,
            "eval_steps": 3,
        }
        return settings(out, **common | values)

    return make


def test_a_run_that_falls_apart_is_warned_of_and_stopped_at_the_last_measurement(
    falling_apart: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = falling_apart(stop_on_collapse=True)
    with pytest.raises(RunCollapsed) as error:
        train(config)
    assert error.value.exit_code == 3
    found = re.fullmatch(
        rf"{re.escape(config.output_dir)}: stopped after step (\d+): (.+); final is the model of step (\d+), evaluated "
        r"before the collapse\. Lower learning_rate, use a frozen or slower teacher, or see metrics.jsonl for the "
        "onset",
        str(error.value),
    )
    assert found is not None, str(error.value)
    stopped, sign, kept = int(found[1]), found[2], int(found[3])
    assert f"note: step {stopped}: the run may be collapsing: {sign}\n" in capsys.readouterr().err
    assert [line["step"] for line in metrics_of(config)][-1] == stopped < 40
    assert kept % 3 == 0
    assert stopped - COLLAPSE_WINDOW - 3 < kept <= stopped - COLLAPSE_WINDOW
    saved = load_file(Path(config.output_dir) / f"checkpoint-{kept:08d}" / "weights.safetensors")
    final = final_weights(config)
    assert all(torch.equal(saved[name], final[name]) for name in saved)
    assert kept in [json.loads(line)["step"] for line in (Path(config.output_dir) / "evaluations.jsonl").open()]

    only_warned = falling_apart("warned")
    train(only_warned)
    said = capsys.readouterr().err
    assert f"note: step {stopped}: the run may be collapsing: {sign}\n" in said
    assert f"note: the run showed signs of collapse: step {stopped}: {sign}" in said
    told = f"- The run showed signs of collapse: step {stopped}: {sign}"
    assert told in (Path(only_warned.output_dir) / "final" / "README.md").read_text()
    assert "signs of collapse" not in (Path(config.output_dir) / "final" / "README.md").read_text()
    assert list_checkpoints(Path(only_warned.output_dir)) == []


def test_steps_that_were_left_out_tell_nothing() -> None:
    guard = CollapseGuard([14.0])
    for step in range(20):
        steady = {"step": step + 1} | HEALTHY | {"entropy": 4.5, "kl/forward": 1.2}
        line = {"step": step + 1, "skipped": {}} if step < 3 else steady
        assert guard.look(line, stage=0, sampled=True) == {}


def test_a_damaged_checkpoint_is_not_gone_back_to(
    falling_apart: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = falling_apart(stop_on_collapse=True)

    def spoil(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 5:
            (Path(config.output_dir) / "checkpoint-00000003" / "state.json").write_text("{}")

    with pytest.raises(RunFailed, match="no checkpoint was evaluated at least 5 steps earlier"):
        train(config, on_step=spoil)


def test_the_card_tells_of_the_model_that_was_gone_back_to(falling_apart: Callable[..., TrainConfig]) -> None:
    config = falling_apart(stop_on_collapse=True)
    with pytest.raises(RunCollapsed, match="final is the model of step 3,"):
        train(config)
    assert "Measured after step 3;" in (Path(config.output_dir) / "final" / "README.md").read_text()


@pytest.mark.slow
def test_the_option_on_resuming_stops_a_run_that_is_already_apart(falling_apart: Callable[..., TrainConfig]) -> None:
    train(falling_apart(save_steps=20))
    with pytest.raises(
        RunFailed, match=r"stopped after step 4[1-5]: .*; no checkpoint was evaluated at least 5 steps earlier"
    ):
        train(falling_apart(save_steps=20, max_steps=60, stop_on_collapse=True), resume=True)


def test_a_run_that_falls_apart_before_it_was_measured_leaves_no_model(
    falling_apart: Callable[..., TrainConfig],
) -> None:
    config = falling_apart(eval_steps=39, stop_on_collapse=True)
    with pytest.raises(
        RunFailed, match="no checkpoint was evaluated at least 5 steps earlier, so no final model is written"
    ):
        train(config)
    assert not (Path(config.output_dir) / "final").exists()


def test_the_guard_of_a_resumed_run_remembers_what_it_said(
    falling_apart: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    train(falling_apart(max_steps=10, save_steps=10))
    assert "the run may be collapsing" in capsys.readouterr().err
    train(falling_apart(max_steps=11, save_steps=10), resume=True)
    said = capsys.readouterr().err
    assert "the run may be collapsing" not in said
    assert "note: the run showed signs of collapse: step 10: " in said


def test_going_back_needs_measurements(settings: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match="'stop_on_collapse' returns to the last evaluation: add test and eval_steps"):
        settings(stop_on_collapse=True)


@pytest.mark.slow
def test_measured_checkpoints_that_may_be_needed_stay(falling_apart: Callable[..., TrainConfig]) -> None:
    config = falling_apart(learning_rate=1e-5, max_steps=17, stop_on_collapse=True, save_steps=1)
    train(config)
    steps = [int(path.name[-8:]) for path in list_checkpoints(Path(config.output_dir))]
    assert steps == [12, 15, 16, 17]  # 12 is the newest that was measured at least five steps ago
