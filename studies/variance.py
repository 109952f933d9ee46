"""How much does vOPD's baseline lower the variance of its gradient?

    python studies/variance.py [MODEL]

The model, at temperature 1, answers 48 training questions of `bundled:routing`. At each token of its replies, the mean
and the variance of the loss's gradient with respect to the logits are computed exactly, by summing over the whole
vocabulary: v = E|g|^2 - |E g|^2 with g(y) = -(A(y) + b) (e_y - p) and A = log q - log p. The teacher q has seen the
demonstration as turns, four times. Printed is the sum of v over all tokens, as a share of that without a baseline.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from selfdistill.data import load_demonstrations, parse_context
from selfdistill.model import LoadedModel, Sampling, load_model, sample

ROWS = 48
TOKENS = 24
TURNS = parse_context("turns:repeats=4")


def log_probs(loaded: LoadedModel, prompt: list[int], reply: list[int]) -> Tensor:
    """The model's log-probabilities at each token of the reply, in float64: [T, V]."""
    with torch.inference_mode():
        logits_TV = loaded.model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.double().log_softmax(-1)


def top_k_kl(log_p_TV: Tensor, log_q_TV: Tensor, k: int) -> Tensor:
    """KL(p||q) over the student's k most likely tokens, both renormalised: [T, 1]."""
    top_TK = log_p_TV.topk(k).indices
    p_TK, q_TK = (values.gather(-1, top_TK).log_softmax(-1) for values in (log_p_TV, log_q_TV))
    return (p_TK.exp() * (p_TK - q_TK)).sum(-1, keepdim=True)


def moments(log_p_TV: Tensor, advantages_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Squared length of the mean gradient, and the variance: [T] each."""
    p_TV = log_p_TV.exp()
    weighted_TV = p_TV * advantages_TV
    mean_TV = weighted_TV - p_TV * weighted_TV.sum(-1, keepdim=True)
    lengths_TV = 1 - 2 * p_TV + p_TV.square().sum(-1, keepdim=True)  # |e_y - p|^2
    mean_T = mean_TV.square().sum(-1)
    return mean_T, (weighted_TV * advantages_TV * lengths_TV).sum(-1) - mean_T


def main(model: str = "smollm2-135m") -> None:
    """Print a line for each baseline."""
    loaded = load_model(model)
    chat = loaded.chat()
    rows = load_demonstrations("bundled:routing.train.jsonl")[:ROWS]
    prompts = [chat.encode_prompt(list(row.prompt)) for row in rows]
    contexts = [chat.encode_prompt(TURNS.messages(row, ())) for row in rows]
    replies = [rollout.ids for rollout in sample(loaded, prompts, Sampling(TOKENS, temperature=1), range(ROWS))]
    sums: dict[str, list[Tensor]] = {"none": [], "KL": [], "KL over the 100 most likely": []}
    means = []
    for prompt, context, reply in zip(prompts, contexts, replies, strict=True):
        log_p_TV, log_q_TV = log_probs(loaded, prompt, reply), log_probs(loaded, context, reply)
        ratio_TV = log_q_TV - log_p_TV
        kl_T1 = -(log_p_TV.exp() * ratio_TV).sum(-1, keepdim=True)
        for name, baseline_T1 in zip(sums, (0 * kl_T1, kl_T1, top_k_kl(log_p_TV, log_q_TV, 100)), strict=True):
            mean_T, variance_T = moments(log_p_TV, ratio_TV + baseline_T1)
            sums[name].append(variance_T)
        means.append(mean_T)
    total = {name: torch.cat(parts) for name, parts in sums.items()}
    print(f"{len(total['none'])} tokens; |E g|^2 {torch.cat(means).mean():.4f} per token")
    for name, variance in total.items():
        first = torch.stack([part[0] for part in sums[name]]).sum() / torch.stack([p[0] for p in sums["none"]]).sum()
        share = variance.sum() / total["none"].sum()
        print(f"baseline {name}: variance {variance.mean():.4f} per token, share {share:.3f}, first tokens {first:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
