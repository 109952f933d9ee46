"""ATESD: what the teacher sees, and how the controller learns, against plain code in float64.

Dimensions in names: T completion tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import train_together
from conftest import (
    Cut,
    assert_same_run,
    crash_at,
    final_weights,
    largest_difference,
    metrics_of,
    row_log_probs,
    same,
)
from formulas import assert_gradient, kl, moved, trained_whole_and_in_parts
from scipy.stats import beta
from torch import Tensor

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.methods import Controller, stages_of
from selfdistill.methods.sequences import Completion
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]
REASONED = ["Aa b. Cc d. Ee f. So g.", "Hh. Ii j. So k.", "So l.", "<think>\nm n\no p\nq r\n</think>\n\nSo s."]


@pytest.fixture
def reasoned(settings: Settings, write_rows: Callable[..., Path]) -> Settings:
    """References of three, two, no and three steps before the answer."""
    data = write_rows(
        [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(REASONED)], name="reasoned.jsonl"
    )

    def make(out: str = "run", **values: Any) -> TrainConfig:
        own = {"hold": 2} | values.pop("method_settings", {})
        fixed: dict[str, Any] = {"method": "atesd", "data": str(data), "method_settings": own, "max_steps": 9}
        return settings(out, **(fixed | values))

    return make


def controller_of(config: TrainConfig) -> Controller:
    ((part,),) = stages_of(config)
    assert part.method.controller is not None
    return part.method.controller


SEEN = {  # by the tenths of the share: the steps that are seen of each row
    2: ["So g.", "So k.", "So l.", "So s."],
    6: ["Aa b. So g.", "Hh. So k.", "So l.", "<think>\nm n\n</think>\n\nSo s."],
    7: ["Aa b. Cc d. So g.", "Hh. So k.", "So l.", "<think>\nm n\no p\n</think>\n\nSo s."],
    10: REASONED,
}


@pytest.mark.parametrize("tenths", SEEN)
def test_the_teacher_sees_the_first_steps_and_always_the_answer(reasoned: Settings, tenths: int) -> None:
    run = moved(reasoned(batch_size=4, ema_rate=0.3))
    method = run.stage.task.method.at(1, 9, tenths / 10)

    def values(student: Any, c: Completion) -> Tensor:
        row = c.example.demonstration
        shown = {"role": "assistant", "content": SEEN[tenths][row.row]}
        seen = run.chat.encode_prompt([*row.prompt, shown, *row.prompt])
        with torch.no_grad(), run.teacher.model() as network:  # type: ignore[union-attr]
            log_q_TV = row_log_probs(network, seen, c.ids)
        return kl(log_q_TV, row_log_probs(student, c.example.student_ids, c.ids))

    assert_gradient(run, method.sequence(run.loaded, run.stage.task.examples, 1), values, method)


def log_density(weights: np.ndarray, seen: list[float], share: float) -> float:
    shapes = 1 + np.log1p(np.exp(weights.reshape(2, 3) @ np.array(seen)))
    return float(beta.logpdf(share, *shapes))


def slope(weights: np.ndarray, seen: list[float], share: float) -> np.ndarray:
    """By central differences."""
    steps = np.eye(6) * 1e-5
    found = [(log_density(weights + h, seen, share) - log_density(weights - h, seen, share)) / 2e-5 for h in steps]
    return np.array(found)


@pytest.mark.parametrize(("hold", "discount"), [(1, 0.9), (3, 0.5), (2, 0.0), (2, 1.0)])
def test_the_controller_is_reinforce_on_the_discounted_later_fall(
    reasoned: Settings, hold: int, discount: float
) -> None:
    own = {"hold": hold, "discount": discount, "rate": 5.0}
    controller, draws, steps = controller_of(reasoned(method_settings=own)), 6, 6 * hold
    losses = [2 + 1.5 * math.sin(1.3 * step) for step in range(steps)]
    state, weights, shares, seen, slopes = controller.start, np.zeros(6), [], [], []
    levels = [sum(losses[k * hold : (k + 1) * hold]) / hold for k in range(draws)]
    for step, loss in enumerate(losses):
        if step % hold == 0:
            k = step // hold
            seen.append([1, step / steps, levels[k - 1] / levels[0] if k else 1])
            shares.append(controller.value(state, step, steps))
            weights = np.array(state["weights"], dtype=np.float64).reshape(6)
            slopes.append(slope(weights, seen[k], shares[k]))
        assert controller.value(state, step, steps) == shares[-1]  # it is held
        state = json.loads(json.dumps(controller.update(state, {"loss": loss}, step, steps)))
    falls = [0.0] + [(levels[k - 1] - levels[k]) / levels[0] for k in range(1, draws)]
    returns = [sum(discount ** (j - k - 1) * falls[j] for j in range(k + 1, draws)) for k in range(draws)]
    expected = 5.0 * sum(g * d for g, d in zip(returns, slopes, strict=True))
    assert np.abs(expected).max() > 0.01
    assert np.array(state["weights"]).reshape(6) == pytest.approx(expected, abs=1e-4)
    assert len(set(shares)) == draws


def test_shares_are_drawn_from_the_beta_distribution(reasoned: Settings) -> None:
    weights = [[0.5, 0.0, 1.0], [-1.0, 0.0, 0.5]]
    shapes = [1 + math.log1p(math.exp(x)) for x in (1.5, -0.5)]
    found = []
    for seed in range(400):
        controller = controller_of(reasoned(seed=seed))
        found.append(controller.value({**controller.start, "weights": weights}, 0, 9))
    mean, spread = beta.mean(*shapes), beta.std(*shapes)
    assert np.mean(found) == pytest.approx(mean, abs=4 * spread / 20)
    assert np.std(found) == pytest.approx(spread, rel=0.15)


def test_it_learns_to_show_what_lets_the_loss_fall(reasoned: Settings) -> None:
    """Where the later loss falls by more the more was shown, the distribution moves to more."""
    controller = controller_of(reasoned(method_settings={"hold": 1, "discount": 0.0, "rate": 1.0}))
    state, loss, shares = controller.start, 100.0, []
    for step in range(600):
        shares.append(controller.value(state, step, 600))
        state = controller.update(state, {"loss": loss}, step, 600)
        loss -= 10 * (shares[-1] - 0.5)
    assert np.mean(shares[-100:]) > np.mean(shares[:100]) + 0.15


def test_a_skipped_step_and_other_parts_leave_it_as_it_is(reasoned: Settings) -> None:
    controller = controller_of(reasoned())
    one = controller.update(controller.start, {"skipped": {}}, 0, 9)
    assert controller.update(one, {"skipped": {}}, 1, 9) == controller.start
    both = controller.update(controller.start, {"loss": 3.0, "loss/task": 2.0}, 0, 9)
    assert both == controller.update(controller.start, {"loss": 2.0}, 0, 9)


def test_of_references_without_steps_it_is_sdft(settings: Settings, write_rows: Callable[..., Path]) -> None:
    data = write_rows([{"prompt": f"q{i}", "completion": f"ab{i}"} for i in range(6)], name="short.jsonl")
    found = []
    for method in ("atesd", "sdft"):
        config = settings(method, method=method, data=str(data), learning_rate=1e-4)
        train(config)
        found.append(final_weights(config))
    assert same(*found)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["Hh. So k.", "So l.", "a\nb", "<think>\nm n\n</think>\n\nSo s."], True),
        (["Hh. So k.", "a\nb\nc"], False),
        (["Hh. So k.", "<think>\nm\no\n</think>\n\nSo s."], False),
    ],
    ids=["one step", "two lines", "two thoughts"],
)
def test_that_the_teacher_always_sees_the_same_is_said(
    settings: Settings,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    texts: list[str],
    said: bool,
) -> None:
    data = write_rows([{"prompt": f"q{i}", "completion": text} for i, text in enumerate(texts)], name="steps.jsonl")
    Trainer(settings(method="atesd", data=str(data), batch_size=len(texts)))
    note = (
        "method 'atesd': no demonstration has two or more steps of reasoning before its answer, so the teacher sees "
        "the same at every share; write each step on a line of its own, or use method sdft"
    )
    assert (note in " ".join(capsys.readouterr().err.split())) == said


@pytest.mark.parametrize("values", [{}, {"teacher": "frozen", "lora_rank": 4}], ids=["ema", "lora"])
def test_a_killed_run_goes_on_with_its_controller(reasoned: Settings, values: dict[str, Any]) -> None:
    whole, cut = (reasoned(name, save_steps=3, **values) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(5))
    train(cut, resume=True)
    assert_same_run(whole, cut)
    shares = [line["control"] for line in metrics_of(cut)]
    assert shares[0::2][:4] == shares[1::2]
    assert len(set(shares)) == 5


def test_parts_of_a_batch_teach_its_controller_as_the_whole(reasoned: Settings) -> None:
    lines = trained_whole_and_in_parts(
        reasoned, 4, {"batch_size": 4, "max_steps": 5, "method_settings": {"hold": 1, "rate": 20.0}}
    )
    untaught = controller_of(reasoned(method_settings={"hold": 1, "rate": 0.0}))
    drawn = [untaught.value(untaught.start, step, 5) for step in range(5)]
    assert max(abs(line["control"] - share) for line, share in zip(lines, drawn, strict=True)) > 1e-3


@pytest.mark.slow  # tests/methods/test_hints.py has a controller in two processes
def test_two_processes_see_the_same_parts(reasoned: Settings, tmp_path: Path) -> None:
    one, two = (reasoned(name, max_steps=5, method_settings={"hold": 1}) for name in ("one", "two"))
    train(one)
    train_together(two, tmp_path)
    assert largest_difference(final_weights(one), final_weights(two)) < 2e-3
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a["control"] == pytest.approx(b["control"], abs=1e-3)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hint": 0.5}, "setting 'hint': atesd itself chooses how much the teacher sees: leave it out"),
        ({"context": "few_shot"}, "context 'few_shot:k=3,pick=seed,this=false,seed=0': cannot show a part of"),
        ({"method_settings": {"hold": 0}}, "setting 'method_settings', setting 'hold': found 0, expected"),
    ],
)
def test_what_it_cannot_use_is_refused(reasoned: Settings, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        train(reasoned(**values))
    assert str(error.value).startswith(message)
