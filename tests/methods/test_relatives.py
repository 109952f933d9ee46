"""Relatives of SDFT and SFT: each method's gradient against its formula in plain code, its limits, and its schedule."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Cut,
    add_gradient,
    assert_same_run,
    crash_at,
    final_weights,
    gradients,
    largest_difference,
    row_log_probs,
    same,
)
from formulas import assert_gradient, chosen, kl, moved
from torch import Tensor

from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.loss import CrossEntropy, ProximalTarget, Target, chunked_loss
from selfdistill.methods import FROZEN, METHODS, stages_of
from selfdistill.methods.sequences import Completion
from selfdistill.model.loading import load_model
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]


def base_of(config: TrainConfig) -> Any:
    return load_model(config.model).model.requires_grad_(False)


def teachers_view(run: Trainer, c: Completion) -> Tensor:
    with torch.no_grad(), run.teacher.model() as network:  # type: ignore[union-attr]
        return row_log_probs(network, c.example.teacher_ids or [], c.ids)


def sampled(run: Trainer, count: int = 4) -> list[Completion]:
    return run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:count], 1)


def weights_after(config: TrainConfig) -> dict[str, Tensor]:
    train(config)
    return final_weights(config)


# --- OPSD ---


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_opsd_cuts_what_each_vocabulary_entry_adds(all_of_them: Settings, divergence: Any, lora_rank: int) -> None:
    clip = {"forward_kl": 0.05, "jsd": 0.01}[divergence]
    own = {} if clip == 0.05 else {"entry_clip": clip}
    config = all_of_them(method="opsd", divergence=divergence, batch_size=4, lora_rank=lora_rank, **own)
    run, base = moved(config), base_of(config)
    cut, entries = 0, 0

    def values(student: Any, c: Completion) -> Tensor:
        nonlocal cut, entries
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        log_q_TV = row_log_probs(base, c.example.teacher_ids or [], c.ids)
        if divergence == "forward_kl":
            added_TV = log_q_TV.exp() * (log_q_TV - log_p_TV)
        else:
            log_m_TV = ((log_p_TV.exp() + log_q_TV.exp()) / 2).log()
            added_TV = log_q_TV.exp() * (log_q_TV - log_m_TV) / 2 + log_p_TV.exp() * (log_p_TV - log_m_TV) / 2
        cut, entries = cut + int((added_TV > clip).sum()), entries + added_TV.numel()
        return added_TV.clamp(max=clip).sum(-1)

    assert_gradient(run, sampled(run), values)
    assert 0 < cut < entries / 10


@pytest.mark.parametrize(
    ("divergence", "support"),
    [
        ("forward_kl", "full"),
        ("jsd", "top_k"),
        pytest.param("forward_kl", "top_k", marks=pytest.mark.slow),
        pytest.param("jsd", "full", marks=pytest.mark.slow),
    ],
)
def test_opsd_without_a_clip_is_sdft_with_a_frozen_teacher(
    all_of_them: Settings, divergence: Any, support: Any
) -> None:
    common: dict[str, Any] = {"divergence": divergence, "support": support, "support_top_k": 9, "learning_rate": 1e-4}
    unclipped = weights_after(all_of_them("opsd", method="opsd", entry_clip=1e9, **common))
    sdft = weights_after(all_of_them("sdft", method="sdft", teacher="frozen", **common))
    clipped = weights_after(all_of_them("clipped", method="opsd", **common, entry_clip=0.01))
    assert largest_difference(unclipped, sdft) < 1e-5
    assert largest_difference(clipped, sdft) > 1e-5
    by_sdft = weights_after(all_of_them("by_sdft", method="sdft", teacher="frozen", entry_clip=0.01, **common))
    assert same(clipped, by_sdft)


# --- vOPD ---


@pytest.mark.parametrize("top_k", [None, 6])
def test_vopd_is_a_policy_gradient_with_the_closed_form_baseline(all_of_them: Settings, top_k: int | None) -> None:
    own = {} if top_k is None else {"baseline_top_k": top_k}
    run = moved(all_of_them(method="vopd", batch_size=4, ema_rate=0.3, method_settings=own))

    def values(student: Any, c: Completion) -> Tensor:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        log_q_TV = teachers_view(run, c)
        top_TK = log_p_TV.topk(top_k or log_p_TV.shape[-1]).indices
        baseline_T = kl(*(x.gather(-1, top_TK).log_softmax(-1) for x in (log_p_TV, log_q_TV)))
        advantage_T = chosen(log_q_TV - log_p_TV, c.ids) + baseline_T
        return -advantage_T.detach() * chosen(log_p_TV, c.ids)

    assert_gradient(run, sampled(run), values)


@pytest.mark.parametrize(
    ("own", "before"), [({}, [7, 30]), pytest.param({"baseline_top_k": 3}, [], marks=pytest.mark.slow)], ids=str
)
def test_vopd_has_the_gradient_of_the_reverse_kl_in_expectation(
    all_of_them: Settings, own: dict[str, Any], before: list[int]
) -> None:
    """Over every token that the student can say at a place, weighted by its probability."""
    run = moved(all_of_them(method="vopd", ema_rate=0.3, method_settings=own))
    reverse_kl = Trainer(all_of_them("other", method="sdft", divergence="reverse_kl", ema_rate=0.3))
    exact = reverse_kl.stage.task.method
    example = run.stage.task.examples[0]
    with torch.no_grad():
        log_p_V = row_log_probs(run.loaded.model, [*example.student_ids, *before], [0])[0]
    # What was said before is a part of both prompts, so that one token is all there is to learn.
    place = replace(
        example,
        student_ids=[*example.student_ids, *before],
        teacher_ids=[*(example.teacher_ids or []), *before],
    )
    mean: dict[str, Tensor] = {}
    for token, log_p in enumerate(log_p_V.tolist()):
        run.optimizer.zero_grad()
        add_gradient(run, [Completion(place, [token], None, False)])
        for name, gradient in gradients(run.loaded.model).items():
            mean[name] = mean.get(name, 0) + torch.tensor(log_p).double().exp() * gradient.double()
    run.optimizer.zero_grad()
    add_gradient(run, [Completion(place, [0], None, False)], exact)
    expected = {name: gradient.double() for name, gradient in gradients(run.loaded.model).items()}
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    assert largest_difference(mean, expected) < 1e-5


# --- iSDFT ---


def proximal(log_p_TV: Tensor, log_q_TV: Tensor, share: float) -> Tensor:
    """The target by 60 bisections."""
    gap_TV = log_q_TV - log_p_TV
    low_T1, high_T1 = torch.zeros(len(gap_TV), 1).double(), torch.ones(len(gap_TV), 1).double()
    for _ in range(60):
        middle_T1 = (low_T1 + high_T1) / 2
        found_TV = (log_p_TV + middle_T1 * gap_TV).softmax(-1)
        too_low_T1 = ((found_TV * gap_TV).sum(-1) < share * kl(log_q_TV, log_p_TV))[:, None]
        low_T1, high_T1 = torch.where(too_low_T1, middle_T1, low_T1), torch.where(too_low_T1, high_T1, middle_T1)
    return (log_p_TV + high_T1 * gap_TV).log_softmax(-1)


@pytest.mark.parametrize(("step", "share"), [(0, 0.25), (60, 0.55), (150, 1.0), (900, 1.0)])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_isdft_aims_near_the_student_and_is_pulled_to_the_base(
    all_of_them: Settings, step: int, share: float, lora_rank: int
) -> None:
    config = all_of_them(method="isdft", batch_size=4, ema_rate=0.3, lora_rank=lora_rank, method_settings={"pull": 0.2})
    run, base = moved(config), base_of(config)
    method = run.stage.task.method.at(step, 1000)
    assert isinstance(method.loss.target, ProximalTarget)
    assert method.loss.target.share == pytest.approx(share)

    def values(student: Any, c: Completion) -> Tensor:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        target_TV = proximal(log_p_TV.detach(), teachers_view(run, c), share)
        return kl(target_TV, log_p_TV) + 0.2 * kl(row_log_probs(base, c.example.student_ids, c.ids), log_p_TV)

    assert_gradient(run, sampled(run), values, method)


def test_isdft_with_the_whole_information_and_no_pull_is_sdft(all_of_them: Settings) -> None:
    own = {"first_share": 1.0, "pull": 0.0}
    isdft = all_of_them("isdft", method="isdft", method_settings=own, learning_rate=1e-4)
    assert largest_difference(weights_after(isdft), weights_after(all_of_them("sdft", learning_rate=1e-4))) < 1e-5
    assert FROZEN not in Trainer(isdft.model_copy(update={"output_dir": "elsewhere"})).teachers


def test_isdft_by_default_has_the_settings_of_its_authors(all_of_them: Settings) -> None:
    ((part,),) = stages_of(all_of_them(method="isdft"))
    losses = [part.method.at(step, 10).loss for step in (0, 75, 149, 150, 151)]
    assert [loss.target.share for loss in losses] == pytest.approx([0.25, 0.625, 0.995, 1, 1])
    assert {(loss.kind, loss.support, loss.pull) for loss in losses} == {("forward_kl", "full", 2e-3)}
    ((part,),) = stages_of(all_of_them(method="isdft", method_settings={"ramp_steps": 0, "share": 0.5}))
    assert part.method.at(0, 10).loss.target.share == 0.5


# --- Veto ---


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_vetos_target_leaves_the_student_behind(all_of_them: Settings, divergence: Any) -> None:
    run = moved(all_of_them(method="veto", batch_size=4, ema_rate=0.3, divergence=divergence))
    method = run.stage.task.method.at(3, 12)

    def values(student: Any, c: Completion) -> Tensor:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        target_TV = (teachers_view(run, c) + 0.8 * (1 - 3 / 12) * log_p_TV.detach()).log_softmax(-1)
        return kl(target_TV, log_p_TV) if divergence == "forward_kl" else kl(log_p_TV, target_TV)

    assert_gradient(run, sampled(run), values, method)


def test_vetos_schedule(all_of_them: Settings) -> None:
    def students(steps: int, **own: Any) -> list[float]:
        ((part,),) = stages_of(all_of_them(method="veto", method_settings=own))
        targets = [part.method.at(step, steps).loss.target or Target() for step in range(6)]
        assert all(target == Target(student=target.student) for target in targets)
        return [target.student for target in targets]

    assert students(8) == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert students(8, decay_steps=4, student=0.4) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0])


def test_veto_without_the_student_in_its_target_is_sdft(all_of_them: Settings) -> None:
    veto = weights_after(all_of_them("veto", method="veto", method_settings={"student": 0}))
    assert same(veto, weights_after(all_of_them("sdft")))


def test_a_constant_coefficient_is_that_of_sdft(all_of_them: Settings) -> None:
    """At its first step Veto is SDFT with ``target_student``."""
    veto = weights_after(all_of_them("veto", method="veto", method_settings={"student": 0.4}, max_steps=1))
    assert same(veto, weights_after(all_of_them("sdft", target_student=0.4, max_steps=1)))


# --- EAFT ---


@pytest.mark.parametrize("top_k", [20, 7])
def test_eaft_weighs_each_token_by_the_entropy_of_the_top(all_of_them: Settings, top_k: int) -> None:
    own = {} if top_k == 20 else {"entropy_top_k": top_k}
    run = moved(all_of_them(method="eaft", batch_size=4, method_settings=own))

    def values(student: Any, c: Completion) -> Tensor:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        p_TK = log_p_TV.detach().exp().sort(dim=-1, descending=True).values[:, :top_k]
        p_TK = p_TK / p_TK.sum(-1, keepdim=True)
        weight_T = -(p_TK * p_TK.log()).sum(-1) / torch.tensor(float(top_k)).log()
        return -weight_T * chosen(log_p_TV, c.ids)

    assert_gradient(run, sampled(run), values)


def test_eaft_of_a_student_that_knows_nothing_is_sft(all_of_them: Settings) -> None:
    found = []
    for method in ("eaft", "sft"):
        run = Trainer(all_of_them(method=method, batch_size=4))
        with torch.no_grad():
            run.loaded.model.lm_head.weight.zero_()
        found.append((add_gradient(run, sampled(run)).loss, gradients(run.loaded.model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert largest_difference(found[0][1], found[1][1]) < 1e-6


def test_eaft_of_equal_entropies_is_sft_times_a_constant(all_of_them: Settings) -> None:
    ((part,),) = stages_of(all_of_them(method="eaft"))
    random = torch.Generator().manual_seed(0)
    row_V = 3 * torch.randn(50, generator=random, dtype=torch.float64)
    logits_NV = torch.stack([row_V[torch.randperm(50, generator=random)] for _ in range(9)]).requires_grad_()
    tokens, weights = torch.randint(50, (9,), generator=random), torch.rand(9, generator=random, dtype=torch.float64)
    found = []
    for weighting in (part.method.weighting, None):
        value, _ = chunked_loss(
            CrossEntropy(), logits_NV, lambda x: x, [], tokens, weights, chunk_size=4, weighting=weighting
        )
        found.append((value.detach(), *torch.autograd.grad(value, logits_NV)))
    constant = float(found[0][0] / found[1][0])
    assert 0 < constant < 0.95
    assert torch.allclose(found[0][1], constant * found[1][1], atol=1e-12)


# --- SSD ---


def test_ssd_learns_the_models_own_samples_but_the_shortest(all_of_them: Settings) -> None:
    own = {"drop_shortest": 0.3, "top_k": 12}
    config = all_of_them(method="ssd", batch_size=4, save_steps=2, method_settings=own)
    run, base = moved(config), base_of(config)
    (part,) = run.stage.parts
    assert part.method.teacher is None
    assert len(part.all_drawn) == 6
    lengths = sorted(len(row.completion_ids) for row in part.all_drawn)
    assert [row for row in part.all_drawn if len(row.completion_ids) >= lengths[1]] == part.examples
    assert 0 < len(part.examples) < 6
    for row in part.all_drawn:  # of the prompt alone, among the likeliest
        log_p_TV = row_log_probs(base, row.student_ids, row.completion_ids)
        rank_T = (log_p_TV > chosen(log_p_TV, row.completion_ids)[:, None]).sum(-1)
        assert (rank_T < 12).all()
    assert [row.completion_ids for row in part.all_drawn] != [
        row.completion_ids for row in Trainer(all_of_them(method="sft")).stage.task.examples
    ]
    assert_gradient(
        run,
        sampled(run),
        lambda student, c: -chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids),
    )
    train(config)
    kept = (Path(config.output_dir) / "teacher_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["ids"] for line in kept] == [row.completion_ids for row in part.all_drawn]


def test_ssd_without_truncation_is_sft_on_plain_samples(all_of_them: Settings) -> None:
    own = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "drop_shortest": 0.0}
    ssd = Trainer(all_of_them("ssd", method="ssd", batch_size=4, method_settings=own))
    base = base_of(ssd.config)
    on_policy = Trainer(all_of_them("plain", method="sdft"))
    plain = on_policy.stage.task.method.sequence(on_policy.loaded, on_policy.stage.task.examples, 0)
    for c in plain:  # at temperature 1, among all tokens
        log_p_TV = row_log_probs(base, c.example.student_ids, c.ids)
        assert c.logps == pytest.approx(chosen(log_p_TV, c.ids).tolist(), abs=1e-4)
    assert [(x.student_ids, x.completion_ids) for x in ssd.stage.task.examples] == [
        (c.example.student_ids, c.ids) for c in plain
    ]
    sft = Trainer(all_of_them("sft", method="sft", batch_size=4))
    sft.stage.task.examples = [
        replace(x, completion_ids=c.ids) for x, c in zip(sft.stage.task.examples, plain, strict=True)
    ]
    for step in range(4):
        assert ssd.step(step)["loss"] == sft.step(step)["loss"]
    assert same(*({name: p.detach() for name, p in run.loaded.model.named_parameters()} for run in (ssd, sft)))
    held = ssd.stage.task.method.sequence(ssd.loaded, ssd.stage.task.examples, 4)
    samples = iter(plain)

    def values(student: Any, _: Completion) -> Tensor:
        c = next(samples)
        return -chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids)

    assert_gradient(ssd, held, values)


def test_a_resumed_ssd_reads_its_samples(all_of_them: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = all_of_them(method="ssd", max_steps=2, save_steps=1, method_settings={"drop_shortest": 0.5})
    train(config)

    def refuse(*_: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("selfdistill.methods.sequences.sample", refuse)
    train(config.model_copy(update={"max_steps": 3}), resume=True)


def test_ssd_samples_as_its_authors_and_needs_prompts_only(
    all_of_them: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = write_rows([{"prompt": f"q{i}"} for i in range(20)], name="prompts.jsonl")
    run = Trainer(all_of_them(method="ssd", data=str(rows)))
    drawn = run.stage.task.method.drawn
    assert drawn is not None
    assert (drawn.sampling.temperature, drawn.sampling.top_k, drawn.sampling.top_p) == (1.5, 20, 0.8)
    assert len(run.stage.task.all_drawn) == 20
    lengths = sorted(len(row.completion_ids) for row in run.stage.task.all_drawn)
    assert len(run.stage.task.examples) == sum(length >= lengths[2] for length in lengths)


# --- schedules ---


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("isdft", {"ramp_steps": 6, "pull": 0.1}),
        pytest.param("veto", {"student": 1.0}, marks=pytest.mark.slow),
        ("veto", {"decay_steps": 4}),
    ],
)
@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="ema"),
        pytest.param({"teacher": "frozen", "lora_rank": 4}, id="lora", marks=pytest.mark.slow),
    ],
)
def test_a_schedule_goes_on_where_a_killed_run_stopped(
    all_of_them: Settings, method: Any, own: dict[str, Any], values: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"method": method, "method_settings": own, "save_steps": 2, "max_steps": 7, **values}
    whole, cut = all_of_them("whole", **common), all_of_them("cut", **common)
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    assert_same_run(whole, cut)


def test_a_schedule_changes_what_is_learnt(all_of_them: Settings) -> None:
    """The second step aims at another target than that of the first."""
    for method, own, fixed in (
        ("veto", {"decay_steps": 2}, {"decay_steps": 10**6}),
        ("isdft", {"ramp_steps": 1}, {"ramp_steps": 10**6}),
    ):
        common: dict[str, Any] = {"method": method, "max_steps": 2}
        one = all_of_them(f"{method}-1", method_settings=own, **common)
        two = all_of_them(f"{method}-2", method_settings=fixed, **common)
        assert largest_difference(weights_after(one), weights_after(two)) > 1e-5


def test_anchors_beside_a_schedule_stay_as_they_are(all_of_them: Settings, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("Who?\nWhen?\nWhere?\n", encoding="utf-8")
    config = all_of_them(method="veto", anchors=str(tmp_path / "held.txt"), anchor_share=0.5, batch_size=4)
    run = Trainer(config)
    task, anchors = (part.method for part in run.stage.parts)
    assert task.at(2, 4).loss != task.at(1, 4).loss
    assert anchors.at(2, 4) is anchors
    metrics = run.step(0)
    assert metrics["loss/anchors:held"] >= 0


@pytest.mark.parametrize(
    ("values", "computed"),
    [
        ({"method": "sdft"}, False),
        ({"method": "opsd"}, True),  # its teacher
        ({"method": "veto"}, False),
        ({"method": "vopd"}, False),
        ({"method": "isdft"}, True),
        ({"method": "isdft", "method_settings": {"pull": 0}}, False),
        ({"method": "eaft"}, False),
        ({"method": "ssd"}, False),
    ],
)
def test_the_base_is_held_by_a_method_that_needs_it_only(
    all_of_them: Settings, values: dict[str, Any], computed: bool
) -> None:
    assert (FROZEN in Trainer(all_of_them(**values)).teachers) is computed


# --- mistakes ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "veto", "method_settings": {"studnt": 1}},
            "setting 'method_settings': veto has no 'studnt'; did you mean student?",
        ),
        (
            {"method": "veto", "method_settings": {"entropy_top_k": 1}},
            "setting 'method_settings': veto has no 'entropy_top_k'; it is a setting of eaft and msd",
        ),
        (
            {"method": "sdft", "method_settings": {"pull": 1}},
            "setting 'method_settings': found pull, but method 'sdft' has no settings of its own; it is a setting of "
            "isdft",
        ),
        (
            {"method": "sdft", "method_settings": {"pull": 1, "hold": 1}},
            "setting 'method_settings': found pull, hold, but method 'sdft' has no settings of its own; remove them",
        ),
        (
            {"method": "isdft", "method_settings": {"share": 2}},
            "setting 'method_settings', setting 'share': found 2, expected: 1 or less",
        ),
        (
            {"method": "eaft", "method_settings": {"entropy_top_k": "many"}},
            "setting 'method_settings', setting 'entropy_top_k': found 'many', expected: a whole number",
        ),
        (
            {"method": "vopd", "temperature": 0.7},
            "setting 'method': vopd needs untempered samples of the student: use temperature 1, top_p 1 and top_k 0",
        ),
        (
            {"method": "opsd", "teacher_model": "m"},
            "setting 'teacher_model' is for methods with a choice of teacher, such as sdft, found 'opsd': leave it",
        ),
        (
            {"method": "opsd", "method_settings": {"clip": 1}},
            "setting 'method_settings': found clip, but method 'opsd' has no settings of its own; remove them",
        ),
        (
            {"support": "sampled", "divergence": "reverse_kl", "entry_clip": 0.1},
            "setting 'entry_clip': the 'sampled' support has no sum over the vocabulary to clip: leave one out",
        ),
        (
            {"method": "opsd", "support": "sampled", "divergence": "reverse_kl"},
            "setting 'support': opsd clips each vocabulary entry, found 'sampled', which has none: use full or top_k",
        ),
    ],
)
def test_what_a_method_cannot_use_is_refused_in_one_line(
    all_of_them: Settings, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        Trainer(all_of_them(**values))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_each_method_is_short_and_says_where_it_comes_from() -> None:
    folder = Path(__file__).parents[2] / "selfdistill" / "methods"
    known = {"sdft", "sft", "dft", "cpt", "sft_reinvoke", "sft_from_teacher", "offline_distillation"}
    for name in METHODS.keys() - known:
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 80, f"{name}.py is longer than 80 lines"
        assert "arXiv" in text.splitlines()[0], f"{name}.py does not name its paper in its first line"
        assert "Differences:" in text, f"{name}.py does not say how it differs from the paper"
        for helper in re.findall(r"^from selfdistill\.methods\.(attempts|failures|guides|hints|prefixes) ", text, re.M):
            assert f":mod:`selfdistill.methods.{helper}`" in text, f"{name}.py does not name {helper}.py, a part of it"
