"""What an engine samples, compared with the model itself."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import torch
from conftest import row_log_probs
from scipy.stats import chisquare

from selfdistill.model import LoadedModel, Rollout, Sampling, sample, sample_seed
from selfdistill.model.sampling import choose

GREEDY = Sampling(20, temperature=0)
FREE = Sampling(12)


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts, the same at each call."""
    draw = random.Random(7)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


def seeds(count: int, step: int = 0) -> list[int]:
    return [sample_seed(0, step, row, 0) for row in range(count)]


def own(
    loaded: LoadedModel, batch: list[list[int]], policy: Sampling, numbers: list[int] | None = None
) -> list[Rollout]:
    """What our loop samples from the same model."""
    return sample(replace(loaded, engine=None), batch, policy, numbers)


def differences(
    loaded: LoadedModel, batch: list[list[int]], rollouts: list[Rollout], temperature: float = 1.0
) -> list[float]:
    """Per sample the largest difference between its log-probabilities and those of the model's own forward pass."""
    found = []
    with torch.no_grad():
        for prompt, rollout in zip(batch, rollouts, strict=True):
            logp_TV = (row_log_probs(loaded.model, prompt, rollout.ids) / temperature).log_softmax(-1)
            model_T = logp_TV.gather(-1, torch.tensor(rollout.ids)[:, None])[:, 0]
            found.append(float((model_T - torch.tensor(rollout.logps)).abs().max()))
    return found


def gap(loaded: LoadedModel, policy: Sampling = FREE, step: int = 0, lengths: tuple[int, ...] = (5, 40, 200)) -> float:
    """The largest difference of some samples that are drawn now."""
    batch = prompts(*lengths)
    rollouts = sample(loaded, batch, policy, seeds(len(batch), step))
    return max(differences(loaded, batch, rollouts, policy.temperature))


def train(loaded: LoadedModel, steps: int) -> None:
    """Take AdamW steps on random text."""
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    for _ in range(steps):
        ids = torch.tensor(prompts(32))
        loaded.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def frequency_pvalue(loaded: LoadedModel, policy: Sampling, count: int) -> float:
    """Draw one token ``count`` times, and test against our own policy by chi-squared; other tokens are an error."""
    (prompt,) = prompts(20)
    rollouts = sample(loaded, [prompt] * count, policy, seeds(count))
    with torch.no_grad():
        logits_BV = loaded.model(input_ids=torch.tensor([prompt])).logits[:, -1]
    # The policy's probabilities from our own inverse distribution, read off at a fine grid.
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    token_B, _ = choose(logits_BV.expand(len(grid), -1), policy, grid)
    expected = torch.bincount(token_B, minlength=300).double() / len(grid)
    found = Counter(r.ids[0] for r in rollouts)
    assert set(found) <= set(expected.nonzero()[:, 0].tolist())
    often = [token for token in range(300) if expected[token] * count >= 5]
    rare = count - sum(found[token] for token in often)
    wanted = [float(expected[token]) * count for token in often]
    observed = [found[token] for token in often]
    if count - sum(wanted) > 1:
        observed, wanted = [*observed, rare], [*wanted, count - sum(wanted)]
    wanted = [value * sum(observed) / sum(wanted) for value in wanted]
    assert len(often) > 5
    return float(chisquare(observed, wanted).pvalue)
