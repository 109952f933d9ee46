"""Distances between two models against a plain recomputation in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from selfdistill.data.bundled import drift_prompts
from selfdistill.data.chat_format import ChatFormat
from selfdistill.evaluation.distances import between, kl_along, mean_loss
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Sampling, sample


@torch.no_grad()
def log_probabilities(loaded: LoadedModel, context: list[int], ids: list[int]) -> torch.Tensor:
    logits = loaded.model(input_ids=torch.tensor([[*context, *ids]])).logits[0].double()
    return logits.log_softmax(-1)[len(context) - 1 : -1]


def test_each_distance_is_taken_along_its_own_answers(load: Callable[..., LoadedModel]) -> None:
    base, model = load(seed=0), load(seed=1)
    chat = ChatFormat(base.tokenizer, base.end_token_ids, {})
    contexts = [chat.encode_prompt(row.prompt) for row in drift_prompts()[:10]]
    of_base, of_model = ([r.ids for r in sample(m, contexts, Sampling(5, temperature=0))] for m in (base, model))
    of_model[3] = of_base[3]
    expected = {}
    for name, q, p, completions in (("kl_base", base, model, of_base), ("kl_model", model, base, of_model)):
        parts = []
        for context, ids in zip(contexts, completions, strict=True):
            log_q, log_p = log_probabilities(q, context, ids), log_probabilities(p, context, ids)
            parts.append((log_q.exp() * (log_q - log_p)).sum(-1))
        expected[name] = float(torch.cat(parts).mean())
    found = between(base, model, contexts, contexts, of_base, of_model)
    assert found.kl_base == pytest.approx(expected["kl_base"], rel=1e-5)
    assert found.kl_model == pytest.approx(expected["kl_model"], rel=1e-5)
    differing = sum(a != b for a, b in zip(of_base, of_model, strict=True))
    assert found.changed == differing / 10
    assert 0 < differing < 10


def test_the_teacher_may_see_another_context(load: Callable[..., LoadedModel]) -> None:
    loaded = load()
    log_q, log_p = log_probabilities(loaded, [1, 2, 3, 4], [5, 6]), log_probabilities(loaded, [3, 4], [5, 6])
    expected = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    assert kl_along([[3, 4]], [[5, 6]], loaded, loaded, [[1, 2, 3, 4]]) == pytest.approx(expected, rel=1e-5)
    assert kl_along([[3, 4]], [[5, 6]], loaded, loaded) == pytest.approx(0, abs=1e-7)


def test_the_mean_loss_is_over_the_tokens_that_count(load: Callable[..., LoadedModel]) -> None:
    """Of more rows than a batch has."""
    loaded, contexts = load(), [[1, 2], *([3, n] for n in range(9))]
    completions = [[5, 6, 7], *([8, n][: 1 + n % 2] for n in range(9))]
    own = [[True, False, True], *([True] * len(ids) for ids in completions[1:])]
    logps = [
        log_probabilities(loaded, context, ids).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        for context, ids in zip(contexts, completions, strict=True)
    ]
    whole = -sum(row.mean() for row in logps) / 10
    part = -sum(row[counted].mean() for row, counted in zip(logps, own, strict=True)) / 10
    assert mean_loss(loaded, contexts, completions) == pytest.approx(float(whole), rel=1e-5)
    assert mean_loss(loaded, contexts, completions, own) == pytest.approx(float(part), rel=1e-5)
