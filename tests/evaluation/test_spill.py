"""Spill: what a small step on the task does to other prompts, against a slow computation; and what is said of it."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfdistill.config.commands import CheckConfig
from selfdistill.config.train import TrainConfig
from selfdistill.data.bundled import anchor_prompts
from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.contexts import parse_context
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.evaluation import spill
from selfdistill.evaluation.check import best_context, check
from selfdistill.evaluation.spill import Spill, TrialStep
from selfdistill.model.loading import LoadedModel, weights_fingerprint
from selfdistill.model.sampling import Sampling, sample, sample_seed

Sequences = list[tuple[list[int], list[int]]]
"""Prompts and completions as token ids."""
# The package has a function of this name, too.
module = importlib.import_module("selfdistill.evaluation.check")


def config_of(folder: Path, data: Path, **settings: object) -> CheckConfig:
    values = {
        "max_completion_length": 6,
        "sample": 4,
        "batch_size": 2,
        "mixed_precision": "no",
        "spill": True,
    } | settings
    return CheckConfig(model=str(folder), data=str(data), contexts=["turns:repeats=2"], **values)


def log_probabilities(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of every token at each place of the completion; one row, one pass."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def slow_step(loaded: LoadedModel, loss: torch.Tensor, demos: Sequences, answers: Sequences) -> TrialStep:
    """One step of AdamW's first kind and what it does, in plain PyTorch."""
    model = loaded.model

    def logp() -> float:
        means = [log_probabilities(model, p, c)[range(len(c)), c].mean() for p, c in demos]
        return float(torch.stack(means).mean())

    with torch.no_grad():
        before, gained = [log_probabilities(model, *pair) for pair in answers], -logp()
    torch.optim.AdamW(model.parameters(), lr=spill.STEP, eps=0, weight_decay=0).zero_grad()
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=spill.STEP, eps=1e-30, weight_decay=0).step()
    with torch.no_grad():
        gained += logp()
        after = [log_probabilities(model, *pair) for pair in answers]
    moved = torch.cat([(q.exp() * (q - p)).sum(-1) for q, p in zip(before, after, strict=True)])
    return TrialStep(gained, float(moved.mean()))


def test_the_steps_equal_plain_pytorch(
    model_folder: Callable[..., Path],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spill, "STEP", 1e-3)  # large enough for float32 to tell what it does
    data = write_rows(count=4)
    found = check(config_of(model_folder(), data)).spill
    assert found is not None
    loaded = load()
    chat, context = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {}), parse_context("turns:repeats=2")
    rows = load_demonstrations(str(data))
    students = [chat.encode_prompt(row.prompt) for row in rows]
    teachers = [chat.encode_prompt(context.messages(row, rows)) for row in rows]
    demos = [(ids, chat.encode_completion(row.completion)) for ids, row in zip(students, rows, strict=True)]
    samples = sample(loaded, students, Sampling(6, 1.0), [sample_seed(0, 0, row.row, 0) for row in rows])
    prompts = anchor_prompts()
    general = [chat.encode_prompt(row.prompt) for row in random.Random(0).sample(prompts, len(prompts))]
    general = [ids for ids in general if len(ids) + 16 <= 512][:16]  # the model's window
    answers = [(ids, r.ids) for ids, r in zip(general, sample(loaded, general, Sampling(16, 0)), strict=True)]
    for method, step in (("sft", found.sft), ("sdft", found.sdft)):
        loaded = load()
        loss = torch.zeros(())
        for student, teacher, (_, demo), rollout in zip(students, teachers, demos, samples, strict=True):
            if method == "sft":
                loss -= log_probabilities(loaded.model, student, demo)[range(len(demo)), demo].sum()
                continue
            with torch.no_grad():
                q = log_probabilities(loaded.model, teacher, rollout.ids)
            loss += (q.exp() * (q - log_probabilities(loaded.model, student, rollout.ids))).sum()
        expected = slow_step(loaded, loss, demos, answers)
        assert step is not None
        assert step.gain == pytest.approx(expected.gain, rel=0.01)
        assert step.moved == pytest.approx(expected.moved, rel=0.01)
        assert step.moved > 1e-4


def test_spill_hardly_depends_on_the_size_of_the_step(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, steps = write_rows(count=4), []
    for size in (1e-4, 3e-4):
        monkeypatch.setattr(spill, "STEP", size)
        result = check(config_of(model_folder(), data))
        assert result.spill is not None
        steps.append(result.spill.sft)
    small, large = steps
    assert large.moved > 5 * small.moved
    assert large.spill == pytest.approx(small.spill, rel=0.2)


def test_the_weights_stay_as_they_were_and_the_seed_repeats_the_numbers(
    load: Callable[..., LoadedModel], model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    data, loaded = write_rows(count=4), load(tied=True)
    before = weights_fingerprint(loaded.model)
    first, again, other = (
        check(config_of(model_folder(tied=True), data, seed=seed), loaded=loaded).to_dict() for seed in (0, 0, 1)
    )
    assert weights_fingerprint(loaded.model) == before
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert first["spill"] == again["spill"]
    assert first["spill"] != other["spill"]


def test_an_interrupted_step_puts_the_weights_back(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    before = weights_fingerprint(loaded.model)
    loaded.model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()

    def interrupted() -> None:
        with spill.stepped(loaded.model):
            assert weights_fingerprint(loaded.model) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert weights_fingerprint(loaded.model) == before


def test_what_the_numbers_say() -> None:
    sft, sdft = TrialStep(gain=0.1, moved=0.004), TrialStep(gain=0.05, moved=0.0005)
    assert sft.spill == pytest.approx(0.4)
    assert sdft.spill == pytest.approx(0.2)
    assert Spill(sft, sdft).sentence() == (
        "a small step of SFT makes the demonstrations 0.1 nats per token more likely and moves general prompts by "
        "0.004; a small step of SDFT makes the demonstrations 0.05 nats per token more likely and moves general "
        "prompts by 0.0005. Against it: --anchors package"
    )
    lost = replace(sdft, gain=-0.1)
    assert lost.spill is None
    assert "of SDFT does not make the demonstrations more likely and moves general prompts by 0.0005" in (
        Spill(sft, lost).sentence()
    )


def test_where_there_is_nothing_to_learn_it_is_not_known(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "STEP", 0.0)
    result = check(config_of(model_folder(), write_rows(count=4)))
    assert (result.spill_sft, result.spill_sdft) == (None, None)
    assert "a small step of SFT does not make the demonstrations more likely" in " ".join(repr(result).split())


def test_it_is_left_out_where_it_makes_no_sense(
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model_folder()
    result = check(config_of(folder, write_rows(count=4), dtype="bfloat16"))
    assert result.spill_sft is None
    assert "Spill: not measured: model " in repr(result)
    assert "its trainable weights are bfloat16" in " ".join(repr(result).split())
    answers = write_rows([{"prompt": f"q{n}", "answer": "ab", "privileged_context": "hint"} for n in range(4)])
    result = check(config_of(folder, answers))
    assert "Spill: not measured: no row has a completion" in " ".join(repr(result).split())
    assert json.loads(json.dumps(result.to_dict()))["spill_sdft"] is None
    monkeypatch.setattr(module, "measure_spill", lambda *_: pytest.fail("measured the spill"))
    assert check(config_of(folder, write_rows(count=4), spill=False)).spill is None
    settings = {"output_dir": "unused", "max_completion_length": 6}
    best_context(TrainConfig(model=str(folder), data=str(write_rows(count=4)), **settings))
