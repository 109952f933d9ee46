"""ActGuide-RL: what counts as an action, which samples see how many, the loss against float64 code, limits, resuming.

Dimensions in names: T completion tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    CHATML,
    ENDS,
    Cut,
    assert_same_run,
    crash_at,
    final_weights,
    gradients,
    largest_difference,
    row_log_probs,
    same,
)
from formulas import advantages, checks_counted, chosen, judged, mean_over_rows, moved, trained_in_one_and_two

from selfdistill.config.train import TrainConfig
from selfdistill.data import Verdict, verdicts
from selfdistill.errors import UserError
from selfdistill.methods.guides import beginnings
from selfdistill.model import sample
from selfdistill.model.sampling import Rollout
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]

SELDOM = "[a-h]"
"""An answer that some replies have."""
STEPS = "one\ntwo\nthree\nfour\nfive\nsix\nseven"


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("a b\n\n  c\nd\n", "lines", ["a b", "a b\n\n  c", "a b\n\n  c\nd"]),
        ("One. Two is 2.5! Three?", "sentences", ["One.", "One. Two is 2.5!", "One. Two is 2.5! Three?"]),
        ("One.\nTwo", "sentences", ["One.", "One.\nTwo"]),
        ("one. two", "lines", ["one. two"]),
    ],
)
def test_actions_are_lines_or_sentences(text: str, unit: Any, expected: list[str]) -> None:
    assert beginnings(text, unit) == expected


@pytest.fixture
def guided(all_of_them: Settings, write_rows: Callable[..., Path]) -> Settings:
    """Rows with a demonstration of seven lines; a reply is right if it has the answer, which is never sampled."""

    def make(out: str = "run", answer: str = "ZZ", **values: Any) -> TrainConfig:
        rows = [{"prompt": f"q{i}", "completion": STEPS, "scorer": "regex", "answer": answer} for i in range(3)]
        data = write_rows(rows, name="steps.jsonl")
        fixed: dict[str, Any] = {"method": "actguide", "data": str(data), "batch_size": 3}
        return all_of_them(out, **(fixed | values))

    return make


def solved_with(monkeypatch: pytest.MonkeyPatch, run: Trainer, enough: dict[str, int]) -> list[list[int]]:
    """Make samples right once their prompt shows so many lines; returns what each sampling showed, by its prompts."""
    tries: list[list[int]] = []

    def sampled(loaded: Any, prompts: Sequence[Any], sampling: Any, seeds: Any) -> list[Rollout]:
        texts = [loaded.tokenizer.decode(ids) for ids in prompts]
        shown = [sum(f"\n{line}\n" in text for line in STEPS.split("\n")) for text in texts]
        tries.append(shown)
        needed = [next(lines for q, lines in enough.items() if q in text) for text in texts]
        right = [lines >= least for lines, least in zip(shown, needed, strict=True)]
        ids = run.loaded.tokenizer("ZZ")["input_ids"] + [257]
        made = sample(loaded, prompts, sampling, seeds)
        return [Rollout(ids, [-1.0] * 3, False) if good else r for good, r in zip(right, made, strict=True)]

    monkeypatch.setattr("selfdistill.methods.guides.sample", sampled)
    return tries


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_fewest_lines_with_which_a_sample_is_right(
    guided: Settings, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    run = Trainer(guided(method_settings={"share": share}))
    tries, task = solved_with(monkeypatch, run, {"q0": 3, "q1": 7, "q2": 9}), run.stage.task
    samples = task.method.sequence(run.loaded, task.examples, 1)
    count = int(4 * share)
    assert [sorted(set(shown)) for shown in tries] == [[4], [2, 6], [3, 7]]
    is_right = ["ZZ" in run.chat.decode(c.ids) for c in samples]
    half = [False] * (4 - count) + [True] * count
    assert is_right == [*half, *half, False, False, False, False]
    for c in samples:  # the loss sees the prompt alone
        assert "one" not in run.loaded.tokenizer.decode(c.example.student_ids)
    assert len({tuple(c.ids) for c in samples[8:]}) == 4


def test_a_guide_helps_from_the_asked_reward_on(guided: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(guided(success_reward=0.5))
    tries, task = solved_with(monkeypatch, run, {"q": 3}), run.stage.task

    def half(given: Any) -> list[Verdict]:
        return [Verdict(found.reward / 2) for found in verdicts(given)]

    monkeypatch.setattr("selfdistill.methods.checking.verdicts", half)
    samples = task.method.sequence(run.loaded, task.examples[:1], 1)
    assert [set(shown) for shown in tries] == [{4}, {2}, {3}]
    assert ["ZZ" in run.chat.decode(c.ids) for c in samples] == [False, False, True, True]


def test_a_run_across_midnight_keeps_its_day(
    guided: Settings, model_folder: Callable[..., Path], on_day: Callable[[str], list[str | None]]
) -> None:
    on_day("2026-03-01")
    run = Trainer(guided(model=str(model_folder(template="{{ strftime_now('%d') }}" + CHATML, ends=ENDS))))
    seen = on_day("2026-03-02")
    run.step(0)
    assert set(seen) == {"2026-03-01"}


def test_guides_that_do_not_fit_are_not_tried_and_said(
    guided: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trainer(guided())
    assert "the guides of" not in capsys.readouterr().err
    limit = len(run.stage.task.examples[0].student_ids) + len("\n\nLet this guide your answer:\n\n")
    limit += len("one\ntwo\nthree") + len("\n\nNow answer the question.")
    run = Trainer(guided(max_prompt_length=limit))
    said = " ".join(capsys.readouterr().err.split())
    assert "note: the guides of 3 of 3 rows do not fit completely into the prompt (" in said
    assert "steps.jsonl" in said
    assert "only as many of their first lines as fit are tried, none in 0 of these rows; a larger" in said
    tries, task = solved_with(monkeypatch, run, {"q": 5}), run.stage.task
    task.method.sequence(run.loaded, task.examples, 1)
    assert [set(shown) for shown in tries] == [{2}, {3}]
    Trainer(guided(max_prompt_length=limit - len("one\ntwo\nthree")))
    assert "none in 3 of these rows" in " ".join(capsys.readouterr().err.split())


def test_each_sample_is_checked_once(guided: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run, counts = Trainer(guided()), checks_counted(monkeypatch)
    tries = solved_with(monkeypatch, run, {"q0": 3, "q1": 7, "q2": 9})
    metrics = run.step(0)
    assert sum(counts) == 3 * 4 + sum(map(len, tries))
    assert (metrics["reward"], metrics["reward/helped"]) == (0, 1)  # two prompts are solved with a guide


@pytest.mark.parametrize("values", [{}, {"importance_cap": 2.0, "gradient_accumulation_steps": 3}], ids=str)
def test_actguide_is_grpo_under_the_prompt_alone(
    guided: Settings, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    run = moved(guided(learning_rate=1e-2, **values))
    solved_with(monkeypatch, run, {"q0": 3, "q1": 7, "q2": 9})
    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples, 1)
    assert [c.logps is None for c in samples[:4]] == [False, False, *[not values] * 2]
    rewards = [float("ZZ" in run.chat.decode(c.ids)) for c in samples]
    student = copy.deepcopy(run.loaded.model).double()
    losses = []
    for c, advantage in zip(samples, advantages(rewards, 4), strict=True):
        logp_T = chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids)
        ratio: Any = 1
        if "importance_cap" in values:
            ratio = (logp_T.detach() - torch.tensor(c.logps)).exp().clamp(max=2).mean()
        losses.append(-advantage * ratio * logp_T)
    loss = mean_over_rows(losses)
    loss.backward()
    (result,) = judged(run, samples, rewards)
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    if values:  # what a guide changes is no fault of the engine
        assert result.gap is not None
        assert result.gap.tokens == sum(len(c.ids) for c in (*samples[:2], *samples[4:6]))
        assert result.gap.largest < 1e-3
    assert largest_difference(gradients(run.loaded.model), gradients(student)) < 1e-5


@pytest.mark.parametrize("answer", [r"[\s\S]*", "never said"])
def test_where_no_guide_is_needed_or_helps_it_is_grpo(
    guided: Settings, write_rows: Callable[..., Path], answer: str
) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a\nb", "scorer": "regex", "answer": answer} for i in range(4)]
    data = str(write_rows(rows, name="all.jsonl"))
    runs = [guided(name, method=name, data=data, max_steps=2) for name in ("actguide", "grpo")]
    for config in runs:
        train(config)
    assert same(*map(final_weights, runs))


def test_a_row_needs_something_to_guide_by(guided: Settings, write_rows: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="and no 'privileged_context' for method 'actguide' to use"):
        train(guided(data=str(write_rows([{"prompt": "q", "answer": "a"}], name="bare.jsonl"))))
    rows = [{"prompt": "q", "answer": "a", "privileged_context": "Begin with a."}]
    Trainer(guided(data=str(write_rows(rows, name="plan.jsonl"))))


def test_a_killed_run_goes_on_to_the_same_bits(guided: Settings) -> None:
    whole, cut = (guided(name, SELDOM, max_steps=4, save_steps=2) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(guided: Settings, tmp_path: Path) -> None:
    lines = trained_in_one_and_two(guided, tmp_path, {"answer": SELDOM, "max_steps": 3})
    assert max(max(line["reward"], line.get("reward/helped", 0)) for line in lines) > 0
