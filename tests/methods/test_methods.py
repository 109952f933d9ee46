"""Every method: its gradient against its formula in plain code, its parts, resuming, and what it refuses."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import (
    DOCUMENTS,
    add_gradient,
    gradients,
    largest_difference,
    per_token,
    quick,
    row_log_probs,
    same,
)
from formulas import assert_gradient, chosen, judged, kl, mean_over_rows, moved
from safetensors.torch import load_file
from torch import Tensor

from selfdistill.config.method import MethodName
from selfdistill.config.train import TrainConfig
from selfdistill.data import Verdict, verdicts
from selfdistill.data.prompts import load_prompts
from selfdistill.errors import UserError
from selfdistill.loss.chunked import chunked_loss
from selfdistill.loss.divergence import Divergence, Target
from selfdistill.loss.token_weights import group_advantages
from selfdistill.methods import FROZEN, METHODS, encoder_of, stages_of, unused_settings, uses
from selfdistill.methods.sequences import Completion
from selfdistill.methods.slots import Method
from selfdistill.model.forward import ForwardPass
from selfdistill.model.loading import load_model
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.loop import without_gradient
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]
NAMES = get_args(MethodName)


# --- formulas ---


def test_dft_weighs_each_token_by_its_probability(all_of_them: Settings) -> None:
    run = moved(all_of_them(method="dft", batch_size=4, gradient_accumulation_steps=2))
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 1)
    assert [c.ids for c in completions] == [row.completion_ids for row in run.stage.task.examples[:4]]

    def values(student: Any, c: Completion) -> Tensor:
        logp_T = chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids)
        return -logp_T.exp().detach() * logp_T

    assert_gradient(run, completions, values)


def test_cpt_predicts_every_token_of_every_document_once(all_of_them: Settings) -> None:
    run = moved(all_of_them(method="cpt", batch_size=4))
    rows = run.stage.task.examples
    by_document: dict[str, list[int]] = {}
    for row in rows:
        text = by_document.setdefault(row.demonstration.completion, [])
        begin = [257]  # this tokenizer has no token for a beginning, so that for the end stands before the text
        assert row.student_ids == [*begin, *text]
        assert 0 < len(row.completion_ids) <= 10
        text += row.completion_ids
    tokenizer = run.loaded.tokenizer
    ends = {document: tokenizer(document, add_special_tokens=False)["input_ids"] + [257] for document in DOCUMENTS}
    assert by_document == ends
    completions = run.stage.task.method.sequence(run.loaded, rows, 1)
    assert_gradient(
        run, completions, lambda student, c: -chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids)
    )


def test_cpt_shows_no_more_of_the_text_before_than_there_is_room_for(all_of_them: Settings) -> None:
    run = Trainer(all_of_them(method="cpt", max_prompt_length=7))
    assert {len(row.student_ids) for row in run.stage.task.examples} == {1, 7}
    first, second = run.stage.task.examples[:2]
    assert second.student_ids == first.completion_ids[-7:]


def test_reinvoke_is_sft_and_then_reverse_kl_to_the_base_on_general_prompts(all_of_them: Settings) -> None:
    config = all_of_them(method="sft_reinvoke", max_steps=7, batch_size=2, lr_scheduler_type="cosine")
    run, sft = Trainer(config), Trainer(all_of_them("sft", method="sft", max_steps=3, lr_scheduler_type="cosine"))
    base = copy.deepcopy(run.loaded.model)
    assert [(s.first_step, s.steps) for s in run.stages] == [(0, 3), (3, 4)]
    for step in range(3):
        mine, theirs = run.step(step), sft.step(step)
        assert "kl/reverse" not in mine
        assert {k: mine[k] for k in ("loss", "learning_rate")} == {k: theirs[k] for k in ("loss", "learning_rate")}
    assert same(dict(run.loaded.model.named_parameters()), dict(sft.loaded.model.named_parameters()))
    metrics = run.step(3)
    assert metrics["learning_rate"] == config.learning_rate
    assert metrics["kl/reverse"] == pytest.approx(metrics["loss"], abs=1e-5)
    rows = run.stage.task.examples
    assert [row.demonstration.prompt[0]["content"] for row in rows] == ["Who?", "Why is that so?", "When"]
    assert all(row.teacher_ids == row.student_ids for row in rows)
    completions = run.stage.task.method.sequence(run.loaded, rows, 9)

    def values(student: Any, c: Completion) -> Tensor:
        log_base_TV = row_log_probs(base, c.example.student_ids, c.ids).detach()
        return kl(row_log_probs(student, c.example.student_ids, c.ids), log_base_TV)

    assert_gradient(run, completions, values)


@pytest.mark.parametrize("method", ["sft_from_teacher", "offline_distillation"])
def test_the_teachers_samples_are_drawn_once_from_the_base_that_sees_the_demonstration(
    all_of_them: Settings, method: Any
) -> None:
    config = all_of_them(method=method, batch_size=4)
    run = moved(config)
    base = load_model(config.model)
    base.model.requires_grad_(False)
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples, 1)
    again = run.stage.task.method.sequence(run.loaded, run.stage.task.examples, 5)
    assert [c.ids for c in again] == [c.ids for c in completions]
    demonstrated = Trainer(all_of_them(method="sft")).stage.task.examples
    assert [c.ids for c in completions] != [row.completion_ids for row in demonstrated]
    for row in run.stage.task.examples:  # each a likely draw of the teacher, not of the student
        assert row.teacher_ids is not None
        assert len(row.teacher_ids) > len(row.student_ids)
    taught, untaught = (
        sum(float(chosen(row_log_probs(base.model, context(c), c.ids), c.ids).sum()) for c in completions)
        for context in (lambda c: c.example.teacher_ids, lambda c: c.example.student_ids)
    )
    assert taught > untaught

    def values(student: Any, c: Completion) -> Tensor:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        if method == "sft_from_teacher":
            return -chosen(log_p_TV, c.ids)
        return kl(row_log_probs(base.model, c.example.teacher_ids or [], c.ids).detach(), log_p_TV)

    assert_gradient(run, completions, values)


def test_grpo_is_the_gradient_of_the_clipped_objective_with_group_advantages(all_of_them: Settings) -> None:
    run = moved(all_of_them(method="grpo", batch_size=3, num_generations=4, gradient_accumulation_steps=3))
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:3], 2)
    assert len(completions) == 12
    rewards = [float(len(run.chat.decode(c.ids)) >= 4) for c in completions]
    assert len(set(rewards)) == 2
    advantages = []
    for group in (rewards[i : i + 4] for i in range(0, 12, 4)):
        spread = statistics.stdev(group)
        advantages += [(r - statistics.mean(group)) / (spread + 1e-4) for r in group]
    student = copy.deepcopy(run.loaded.model)
    values = []
    for c, advantage in zip(completions, advantages, strict=True):
        logp_T = chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids)
        ratio_T = (logp_T - logp_T.detach()).exp()
        values.append(-torch.minimum(ratio_T * advantage, ratio_T.clamp(0.8, 1.2) * advantage))
    mean_over_rows(values).backward()
    run.optimizer.zero_grad()
    result = add_gradient(run, completions)
    assert result.selected.reward() == pytest.approx(sum(rewards) / 12)
    expected = gradients(student)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    assert largest_difference(gradients(run.loaded.model), expected) < 1e-5


def test_group_advantages() -> None:
    found = group_advantages([1, 0, 0, 1, 1, 1], 3)
    middle, spread = 1 / 3, (1 / 3) ** 0.5
    assert found == pytest.approx([(1 - middle) / (spread + 1e-4), *[-middle / (spread + 1e-4)] * 2, 0, 0, 0])


@pytest.mark.parametrize("reward", [0.1, 0.7])
def test_equal_rewards_have_exactly_no_advantage(reward: float) -> None:
    assert group_advantages(6 * [reward], 6) == 6 * [0.0]  # whatever the rounding of their mean


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_samples_without_an_advantage_take_no_passes_and_count_in_the_mean(
    all_of_them: Settings, monkeypatch: pytest.MonkeyPatch, micro_batches: int
) -> None:
    run = moved(all_of_them(method="grpo", batch_size=3, num_generations=4, gradient_accumulation_steps=micro_batches))
    samples = list(run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:3], 2))
    rewards = [1.0, 0, 0, 1, 0.7, 0.7, 0.7, 0.7, 0, 0, 0, 1]
    factors = group_advantages(rewards, 4)
    student, passed, plain = copy.deepcopy(run.loaded.model), [], ForwardPass.__call__
    rows = [row_log_probs(student, c.example.student_ids, c.ids) for c in samples]
    mean_over_rows([-f * chosen(row_TV, c.ids) for c, f, row_TV in zip(samples, factors, rows, strict=True)]).backward()
    entropies = [-(row_TV.exp() * row_TV).sum(-1).mean().item() for row_TV in rows]

    def counted(self: ForwardPass, model: Any, contexts: Any, completions: Any, kept: Any = None) -> Any:
        passed.extend(completions)
        return plain(self, model, contexts, completions, kept)

    monkeypatch.setattr(ForwardPass, "__call__", counted)
    (result,) = judged(run, samples, rewards)
    assert sorted(passed) == sorted(c.ids for c in [*samples[:4], *samples[8:]])
    assert largest_difference(gradients(run.loaded.model), gradients(student)) < 1e-5
    assert result.statistics["entropy"] == pytest.approx(statistics.mean(entropies[:4] + entropies[8:]), abs=1e-4)
    passed.clear()
    (result,) = judged(run, samples, 12 * [1.0])
    assert (passed, result.loss, result.statistics) == ([], 0.0, {})
    assert all(parameter.grad is None for parameter in run.parameters)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("teacher", ["ema", "frozen"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_target_is_a_mixture_of_logits(
    all_of_them: Settings, divergence: Any, teacher: Any, lora_rank: int
) -> None:
    weights = {"target_teacher": 0.7, "target_student": 0.4, "target_base": 0.25}
    config = all_of_them(
        divergence=divergence, teacher=teacher, ema_rate=0.3, batch_size=4, lora_rank=lora_rank, **weights
    )
    run = moved(config)
    base = load_model(config.model)
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 1)

    def values(student: Any, c: Completion) -> Tensor:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        with torch.no_grad(), run.teacher.model() as network:  # type: ignore[union-attr]
            log_q_TV = row_log_probs(network, c.example.teacher_ids or [], c.ids)
        log_base_TV = row_log_probs(base.model, c.example.student_ids, c.ids)
        mixed_TV = 0.7 * log_q_TV + 0.4 * log_p_TV + 0.25 * log_base_TV
        target_TV = mixed_TV.detach().log_softmax(-1)
        return kl(target_TV, log_p_TV) if divergence == "forward_kl" else kl(log_p_TV, target_TV)

    assert_gradient(run, completions, values)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("support", ["full", "top_k"])
def test_a_target_in_float64_against_autograd(kind: Any, support: Any) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11, bias=False).double()
    hidden_ND, teacher_ND, base_ND = (torch.randn(7, 5, dtype=torch.float64) for _ in range(3))
    hidden_ND.requires_grad_()
    tokens_N, weights_N = torch.randint(11, (7,)), torch.rand(7, dtype=torch.float64)
    plain = Divergence(kind, support, weight=0.3, top_k=4)
    value, found = chunked_loss(
        replace(plain, target=Target(0.5, 0.3, 0.4)),
        hidden_ND,
        head,
        (),
        tokens_N,
        weights_N,
        (teacher_ND, head),
        chunk_size=3,
        base=(base_ND, head),
    )
    value.backward()
    other_ND = hidden_ND.detach().clone().requires_grad_()
    log_p, log_q, log_b = (head(x).log_softmax(-1) for x in (other_ND, teacher_ND, base_ND))
    target = (0.5 * log_q + 0.3 * log_p + 0.4 * log_b).detach()
    expected = (per_token(plain, head(other_ND), target, tokens_N) * weights_N).sum()
    expected.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    assert torch.allclose(hidden_ND.grad, other_ND.grad, atol=1e-12)
    assert torch.allclose(found["forward_kl"], kl(log_q, log_p), atol=1e-12)  # of the teacher itself


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_another_model_can_teach(all_of_them: Settings, model_folder: Callable[..., Path], lora_rank: int) -> None:
    other = model_folder(seed=1)
    run = moved(all_of_them(teacher_model=str(other), batch_size=4, lora_rank=lora_rank))
    teacher = load_model(str(other)).model.requires_grad_(False)
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 1)

    def values(student: Any, c: Completion) -> Tensor:
        log_q_TV = row_log_probs(teacher, c.example.teacher_ids or [], c.ids)
        return kl(log_q_TV, row_log_probs(student, c.example.student_ids, c.ids))

    assert_gradient(run, completions, values)
    assert run.teacher is not None
    assert str(other) in run.teacher.describe()


def test_the_base_of_a_target_is_the_student_at_the_start_not_the_teacher(
    all_of_them: Settings, model_folder: Callable[..., Path]
) -> None:
    run = Trainer(all_of_them(teacher_model=str(model_folder(seed=1)), target_base=0.5))
    assert [rule.model is None for rule in run.teachers] == [False, True]
    assert run.teachers[FROZEN] is not run.teacher


# --- the loop ---


def weights_of(run: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.loaded.model.named_parameters()}


@pytest.mark.parametrize("method", quick(NAMES, "sdft", "sft_reinvoke", "grpo", "sdpo", "trapo"))
def test_parts_of_a_batch_change_nothing(all_of_them: Settings, method: Any) -> None:
    common: dict[str, Any] = {"method": method, "batch_size": 4, "max_steps": 3, "learning_rate": 1e-4}
    one, four = (Trainer(all_of_them(gradient_accumulation_steps=n, **common)) for n in (1, 4))
    start = weights_of(one)
    for run in (one, four):
        for step in range(3):
            run.step(step)
    assert largest_difference(weights_of(one), weights_of(four)) < 1e-5
    assert largest_difference(weights_of(one), start) > 1e-5


@pytest.mark.parametrize("method", NAMES)
def test_every_method_learns_what_it_aims_at(all_of_them: Settings, method: Any) -> None:
    values: dict[str, Any] = {"teacher": "frozen"}
    if method == "vopd":
        values["num_generations"] = 4
    if method == "t3s":  # nothing is left out where the worse model is the base
        values |= {"teacher_model": all_of_them().model}
    # One token a place is a noisy estimate, and a target that leaves the student behind overshoots.
    steps, rate = (32, 2e-3) if method in ("vopd", "veto") else (10, 8e-3)
    run = Trainer(all_of_them(method=method, batch_size=6, max_steps=steps, learning_rate=rate, **values))
    base, student = copy.deepcopy(run.loaded.model), run.loaded.model
    first = run.stages[0].task
    completions = first.method.sequence(run.loaded, first.examples * 4, 1000)  # of the untrained model, where sampled
    distils = isinstance(first.method.loss, Divergence)
    if distils and first.method.select is not None:
        verdicts = first.method.checker(completions, run.chat) if first.method.checker else []
        completions = first.method.select(completions, verdicts, encoder_of(run.config, run.chat, run.loaded.window))

    def lacks(model: Any) -> float:
        """What is still to be learnt: the distance to the teacher, wrong samples, or unlikely tokens."""
        if not distils and first.method.checker is not None:
            again = first.method.sequence(run.loaded, first.examples * 6, 1000)
            return statistics.mean(len(run.chat.decode(c.ids)) < 4 for c in again)
        values = []
        for c in completions:
            log_p_TV = row_log_probs(model, c.example.student_ids, c.ids)
            if distils:
                values.append(kl(row_log_probs(base, c.example.teacher_ids or [], c.ids), log_p_TV))
            else:
                values.append(-chosen(log_p_TV, c.ids))
        return float(mean_over_rows(values))

    with torch.no_grad():
        before = lacks(student)
    for step in range(steps):
        run.step(step)
    with torch.no_grad():
        after = lacks(student)
    slow = "if its target is noisy or moves, give it more steps at a lower rate, as vopd"
    assert after < 0.7 * before, f"{method}: {before:.3f} before and {after:.3f} after {steps} steps; {slow}"


RESUMED = [name for name in NAMES if name not in ("sdft", "sft")]


@pytest.mark.parametrize("method", quick(RESUMED, "sft_reinvoke", "offline_distillation", "grpo", "vopd"))
def test_a_resumed_run_equals_one_that_was_not_interrupted(all_of_them: Settings, method: Any) -> None:
    common: dict[str, Any] = {"method": method, "save_steps": 2, "max_steps": 7}
    whole, cut = all_of_them("whole", **common), all_of_them("cut", **common)
    train(whole)

    def crash(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, on_step=crash)
    train(cut, resume=True)
    for name in ("weights", "optimizer", "teacher"):
        a, b = (load_file(list_checkpoints(Path(c.output_dir))[-1] / f"{name}.safetensors") for c in (whole, cut))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_the_teachers_samples_are_kept_in_the_run_folder(
    all_of_them: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = all_of_them(method="sft_from_teacher", max_steps=2, save_steps=1)
    train(config)
    lines = (Path(config.output_dir) / "teacher_samples.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line) for line in lines]
    assert [line["source"].rpartition("/")[2] for line in kept] == [f"rows.jsonl:{i}" for i in range(1, 7)]
    assert all(line["text"].strip() == line["text"] and len(line["ids"]) > 0 for line in kept)

    def refuse(*_: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("selfdistill.methods.sequences.sample", refuse)
    resumed = config.model_copy(update={"max_steps": 3})
    train(resumed, resume=True)


def test_a_cold_start_goes_from_demonstrations_to_samples(all_of_them: Settings) -> None:
    run = Trainer(all_of_them(cold_start_steps=4, batch_size=6))
    demonstrated = {row.demonstration.row: row.completion_ids for row in run.stage.task.examples}
    shares = []
    for step in range(6):
        completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples * 50, step)
        held = [c for c in completions if c.logps is None]
        assert all(c.ids == demonstrated[c.example.demonstration.row] for c in held)
        shares.append(len(held) / len(completions))
    assert shares == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0], abs=0.08)
    assert shares[0] == 1
    assert shares[4:] == [0, 0]


@pytest.mark.parametrize("importance_cap", [None, 2.0])
def test_a_mixed_batch_of_a_cold_start_has_the_gradient_of_its_tokens(
    all_of_them: Settings, importance_cap: float | None
) -> None:
    run = moved(all_of_them(cold_start_steps=4, batch_size=6, importance_cap=importance_cap))
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples, 2)
    assert {c.logps is None for c in completions} == {True, False}

    def values(student: Any, c: Completion) -> Tensor:
        with torch.no_grad(), run.teacher.model() as network:  # type: ignore[union-attr]
            log_q_TV = row_log_probs(network, c.example.teacher_ids or [], c.ids)
        return kl(log_q_TV, row_log_probs(student, c.example.student_ids, c.ids))

    assert_gradient(run, completions, values)


def test_other_rows_get_other_samples_of_the_teacher(
    all_of_them: Settings, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    config = all_of_them(method="sft_from_teacher", max_steps=1)
    train(config)
    rows = [{"prompt": f"other {i}", "completion": "ab"} for i in range(6)]
    again = Trainer(config.model_copy(update={"data": str(write_rows(rows, name="rows.jsonl"))}))
    fresh = Trainer(again.config.model_copy(update={"output_dir": str(tmp_path / "fresh")}))
    samples = [[row.completion_ids for row in run.stage.task.examples] for run in (again, fresh)]
    assert samples[0] == samples[1]


ON_POLICY = {
    "context",
    "hint",
    "temperature",
    "top_p",
    "top_k",
    "num_generations",
    "skip_first_tokens",
    "importance_cap",
}
DIVERGENCE = {"divergence", "support", "entry_clip"}
TARGET = {"target_teacher", "target_student", "target_base"}
RIGHT = {"success_reward"}
USED = {
    "sdft": ON_POLICY | DIVERGENCE | TARGET | {"teacher", "ema_rate", "cold_start_steps"},
    "opsd": ON_POLICY | DIVERGENCE,
    "vopd": ON_POLICY | {"teacher", "ema_rate"},
    "isdft": ON_POLICY | DIVERGENCE | {"teacher", "ema_rate"},
    "veto": ON_POLICY | DIVERGENCE | {"teacher", "ema_rate"},
    "atesd": ON_POLICY | DIVERGENCE | {"teacher", "ema_rate"},
    "eaft": set(),
    "msd": ON_POLICY | {"teacher", "ema_rate"},
    "t3s": set(),
    "ssd": set(),
    "sft": set(),
    "dft": set(),
    "cpt": set(),
    "sft_reinvoke": {"general_prompts", "temperature", "top_p", "top_k"},
    "sft_from_teacher": {"context", "temperature", "top_p", "top_k"},
    "offline_distillation": {"context", "temperature", "top_p", "top_k", "skip_first_tokens"} | DIVERGENCE | TARGET,
    "grpo": {"num_generations", "temperature", "top_p", "top_k"},
    "sdpo": {"num_generations", "temperature", "top_p", "top_k", "teacher", "jsd_weight", "skip_first_tokens"} | RIGHT,
    "pope": {"num_generations", "temperature", "top_p", "top_k"} | RIGHT,
    "sort": {"num_generations", "temperature", "top_p", "top_k"} | RIGHT,
    "actguide": {"num_generations", "temperature", "top_p", "top_k", "importance_cap"} | RIGHT,
    "npo": {"num_generations", "temperature", "top_p", "top_k"} | RIGHT,
    "trapo": {"num_generations", "temperature", "top_p", "top_k"},
}
"""The settings of ``OTHERS`` that each method reads, with the defaults of all other settings."""
OTHERS: dict[str, Any] = {
    "context": "example",
    "hint": "0.5",
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 9,
    "num_generations": 3,
    "cold_start_steps": 2,
    "teacher": "snapshot",
    "ema_rate": 0.3,
    "snapshot_steps": 1,
    "divergence": "jsd",
    "jsd_weight": 0.2,
    "support": "top_k",
    "support_top_k": 7,
    "support_tail": "renormalise",
    "entry_clip": 0.01,
    "sampled_baseline": False,
    "target_teacher": 0.5,
    "target_student": 0.5,
    "target_base": 0.5,
    "skip_first_tokens": 1,
    "importance_cap": 2.0,
    "success_reward": 0.5,
    "general_prompts": "none.txt",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_that_a_method_does_not_use_changes_nothing(all_of_them: Settings, name: str) -> None:
    plain = all_of_them(method=name, max_steps=2)
    used = {setting for setting in OTHERS if uses(plain, setting)}
    assert used == USED.get(name), f"give {name!r} its line in USED, if it is to read {sorted(used) or 'none of them'}"
    unused = {setting: value for setting, value in OTHERS.items() if setting not in used}
    other = plain.model_copy(update=unused | {"output_dir": f"{plain.output_dir}-other"})
    assert set(unused_settings(other)) == set(unused)
    runs = [Trainer(config) for config in (plain, other)]
    for run in runs:
        for step in range(2):
            run.step(step)
    assert same(*map(weights_of, runs))


def test_one_call_of_a_method_tells_which_settings_it_does_not_use(
    all_of_them: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, sft = [], METHODS["sft"]

    def counted(config: TrainConfig) -> tuple[Method, ...]:
        calls.append(config)
        return sft(config)

    monkeypatch.setitem(METHODS, "sft", counted)
    assert {"top_k", "ema_rate"} <= set(unused_settings(all_of_them(method="sft", top_k=3, ema_rate=0.5)))
    assert len(calls) == 1


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, every scorer gives half of its reward."""

    def begin() -> None:
        def half(given: Any) -> list[Verdict]:
            return [replace(found, reward=found.reward / 2) for found in verdicts(given)]

        monkeypatch.setattr("selfdistill.methods.checking.verdicts", half)

    return begin


@pytest.mark.parametrize("values", [{"method": "pope"}, {"method": "npo"}, {"hint": "shortest"}], ids=str)
def test_half_a_reward_is_a_success_if_half_is_asked_for(
    all_of_them: Settings, halved: Callable[[], None], values: dict[str, Any]
) -> None:
    def drawn(**more: Any) -> list[Any]:
        return [(x.completion_ids, x.teacher_ids) for x in Trainer(all_of_them(**values, **more)).stage.task.examples]

    whole = drawn()
    halved()
    assert drawn(success_reward=0.5) == whole
    assert drawn() != whole


@pytest.mark.parametrize(
    ("method", "own", "expected"),
    [
        ("sdpo", {"show": "sibling", "context": "turns"}, {0.5: [1, 2, 3], 1.0: []}),
        ("sort", {"plan": 0}, {0.5: [9], 1.0: [8, 9]}),
        ("npo", {}, {0.5: [0, 1, 2, 3, 4, 5, 6, 9], 1.0: [0, 1, 2, 8, 4, 5, 6, 9]}),
    ],
)
def test_a_group_has_a_right_sample_from_the_asked_reward_on(
    all_of_them: Settings, method: str, own: dict[str, Any], expected: dict[float, list[int]]
) -> None:
    """Of two groups, the samples of which have the ids 0 to 7, and the completions 8 and 9."""
    run = Trainer(all_of_them(method="sft"))
    examples = [replace(x, completion_ids=[8 + i]) for i, x in enumerate(run.stage.task.examples[:2])]
    samples = [Completion(examples[i // 4], [i], None, False) for i in range(8)]
    judged = [Verdict(reward) for reward in (0.5, 0, 0, 0, 0.4, 0, 0, 0)]
    for success, ids in expected.items():
        (parts,) = stages_of(all_of_them(method=method, method_settings=own, success_reward=success))
        assert parts[-1].method.select is not None
        learnt = parts[-1].method.select(samples, judged, encoder_of(run.config, run.chat, run.loaded.window))
        assert [c.ids for c in learnt] == [[i] for i in ids]


def test_rewards_that_teach_nothing_are_said(
    all_of_them: Settings, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{i}", "completion": "ab", "scorer": "regex", "answer": "never said"} for i in range(4)]
    config = all_of_them(method="grpo", max_steps=3, data=str(write_rows(rows, name="hard.jsonl")))
    train(config)
    said = capsys.readouterr().err
    assert "  reward 0.000  " in said
    assert "note: in 3 of 3 steps no sample taught anything, for example because all samples of a prompt had" in said
    train(all_of_them("other", method="grpo", max_steps=3))
    said = capsys.readouterr().err
    assert "  reward 0." in said
    assert "no sample taught anything" not in said


def test_a_skipped_step_with_rewards_is_not_one_that_taught_nothing(tmp_path: Path) -> None:
    lines = [{"step": 1, "reward": 0.5, "skipped": {}}]
    lines += [{"step": step, "reward": 0.5, "grad_norm": 0.0, "completion/length": step} for step in (2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [without_gradient(tmp_path, skips) for skips in (0, 3)] == [(0, 3), (2, 1)]


@pytest.mark.parametrize(("method", "refused"), [("grpo", True), ("sft", False)])
@pytest.mark.parametrize("column", ["answer", "scorer"])
def test_rewards_must_be_the_same_on_resume(
    all_of_them: Settings, write_rows: Callable[..., Path], column: str, method: str, refused: bool
) -> None:
    rows = [{"prompt": f"q{i}", "completion": "ab", "scorer": "contains", "answer": "a"} for i in range(4)]
    data = write_rows(rows, name="rewarded.jsonl")
    config = all_of_them(method=method, max_steps=2, save_steps=1, data=str(data))
    train(config)
    write_rows([{**row, column: {"answer": "b", "scorer": "regex"}[column]} for row in rows], name="rewarded.jsonl")
    changed = f"changed since the run began: column '{column}' of the training rows; restore them, or start a new"
    with pytest.raises(UserError, match=changed) if refused else nullcontext():
        train(config.model_copy(update={"max_steps": 3}), resume=True)


def test_every_stage_has_a_step(all_of_them: Settings) -> None:
    with pytest.raises(
        UserError, match=r"^setting 'max_steps': found 1, expected at least 2, one per stage of sft_reinvoke"
    ):
        train(all_of_them(method="sft_reinvoke", max_steps=1))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"divergence": "jsd"}, "jsd_weight"),
        ({"method": "sft", "anchors": "package", "anchor_divergence": "jsd"}, "jsd_weight"),
        ({"support": "top_k"}, "support_tail"),
        ({"support": "sampled", "divergence": "reverse_kl"}, "sampled_baseline"),
        ({"support": "sampled", "divergence": "reverse_kl"}, "divergence"),
        ({"teacher": "snapshot"}, "snapshot_steps"),
        ({}, "batch_size"),
    ],
)
def test_settings_that_matter_beside_others(all_of_them: Settings, values: dict[str, Any], name: str) -> None:
    assert uses(all_of_them(**values), name)


# --- mistakes ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "grpo", "num_generations": 1},
            "setting 'num_generations': grpo compares the rollouts of a prompt, found 1, expected at least 2",
        ),
        (
            {"method": "grpo", "scorer": "judge", "judge_url": "http://localhost:1/v1", "judge_model": "m"},
            "setting 'scorer': grpo scores at every step, for which the judge is too slow; use another",
        ),
        ({"method": "sft_reinvoke", "general_prompts": "none.txt"}, "none.txt: cannot be read: No such file"),
        (
            {"method": "grpo", "num_generations": 2, "temperature": 0.3},
            "setting 'method': grpo needs untempered samples of the student: use temperature 1",
        ),
        (
            {"support": "sampled", "divergence": "reverse_kl", "cold_start_steps": 2},
            "setting 'support': 'sampled' needs the student's own samples",
        ),
        ({"method": "cpt", "max_completion_length": 512}, "setting 'max_completion_length': 512 leaves no room"),
        (
            {"teacher_model": "m", "method": "sft"},
            "setting 'teacher_model' is for methods with a choice of teacher, such as sdft, found 'sft'",
        ),
        ({"teacher_model": "m", "teacher": "live"}, "setting 'teacher_model' is a fixed teacher, found teacher 'live'"),
        (
            {"target_teacher": 0.0},
            "setting 'target_teacher': found 0, and the target's other weights are also 0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(all_of_them: Settings, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Trainer(all_of_them(**values))
    assert str(error.value).startswith(message)


def test_cpt_needs_documents(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"^method 'cpt' learns from documents, and .*train\.jsonl has none"):
        Trainer(settings(method="cpt"))


def test_cpt_says_which_rows_it_does_not_use(
    settings: Settings, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "q"}, {"prompt": "r", "document": "A text."}, {"prompt": "s"}]
    Trainer(settings(method="cpt", data=str(write_rows(rows, name="some.jsonl"))))
    said = " ".join(capsys.readouterr().err.split())
    assert "note: 2 of 3 rows have no document and are not used (" in said
    assert "some.jsonl:1; " in said
    assert "some.jsonl:3)" in said
    Trainer(settings(method="cpt", data=str(write_rows(rows[1:2], name="all.jsonl"))))
    assert "no document" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\n\xff\xfe", r"p\.txt: not UTF-8: line 2, byte 1 is 0xff; save it as UTF-8$"),
        (b" \n\n", "no prompts"),
        (
            b'{"prompt": "a"}\n{"prompt": "b"}\n',
            r"found JSON Lines, expected one prompt per line; rename it to .*\.jsonl$",
        ),
        (b'[{"prompt": "a"}]', r"found a JSON list, expected one prompt per line; rename it to end with \.json$"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompts(str(tmp_path / "p.txt"))


def test_prompts_of_a_text_file_are_its_lines_without_the_mark_of_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeff{How} is it? \r\n\n\t\rWhy, answer\u2028or not?\n".encode())
    found = load_prompts(str(tmp_path / "p.txt"))
    assert [row.prompt[0]["content"] for row in found] == ["{How} is it?", "Why, answer\u2028or not?"]
    assert [row.source for row in found] == ["p.txt:1", "p.txt:4"]


def test_a_run_of_two_stages_keeps_its_number_of_steps(all_of_them: Settings) -> None:
    config = all_of_them(method="sft_reinvoke", max_steps=2, save_steps=1)
    train(config)
    with pytest.raises(UserError, match=r"^setting 'max_steps': 2 in .*config\.yaml and now 4; sft_reinvoke divides"):
        train(config.model_copy(update={"max_steps": 4}), resume=True)


def test_a_method_with_a_setting_of_its_own_is_one_function(
    all_of_them: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sft(config: TrainConfig) -> tuple[Method, ...]:
        skip = int(config.method_settings.get("skip", 0))
        return tuple(replace(stage, skip_first_tokens=skip) for stage in plain(config))

    plain = METHODS["sft"]
    config = all_of_them(method="sft", method_settings={"skip": 2})
    with pytest.raises(UserError, match="found skip, but method 'sft' has no settings of its own; remove them"):
        stages_of(config)
    monkeypatch.setitem(METHODS, "sft", sft)
    assert stages_of(config)[0][0].method.skip_first_tokens == 2
    assert uses(config, "method_settings")
    assert not uses(config, "temperature")
