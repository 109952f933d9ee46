"""What the teacher says of each token of a few rollouts: what ``report`` shows before and after training."""

from __future__ import annotations

from typing import Any

import torch

from selfdistill.models import casts_kept
from selfdistill.rollouts import Sampling, sample
from selfdistill.run import Run

PREFERRED = 5
"""The teacher's likeliest tokens that are kept for each token."""


@torch.no_grad()
def token_views(run: Run) -> list[dict[str, Any]]:
    """Greedy rollouts of ``view_rows`` rows, spread over the data, scored by student p and teacher q.

    Returns:
        One dict a row: ``row`` (source), ``prompt`` (its last turn), ``demonstration``, ``truncated`` and ``tokens``,
        each with ``text``, ``logp`` and ``logq`` (of the token, nats), ``kl`` (KL(q||p), nats) and ``top``, the
        teacher's likeliest tokens with their probabilities. Nothing where the method has no teacher.
    """
    if run.teacher is None:
        return []
    count = min(run.config.view_rows, len(run.rows))
    rows = [run.rows[number * len(run.rows) // count] for number in range(count)]
    model, tokenizer, views = run.loaded.model, run.loaded.tokenizer, []
    greedy = Sampling(run.config.max_completion_length, temperature=0)
    with casts_kept(model), run.accelerator.autocast():
        rollouts = sample(run.loaded, [row.student_ids for row in rows], greedy) if rows else []
    for row, rollout in zip(rows, rollouts, strict=True):
        with casts_kept(model), run.accelerator.autocast():
            student = run.scorer(model, [row.student_ids], [rollout.ids])
            logp_TV = student.head(student.hidden_ND).float().log_softmax(-1)
        with run.teacher.model() as network, casts_kept(network), run.accelerator.autocast():
            teacher = run.scorer(network, [row.teacher_ids or []], [rollout.ids])
            logq_TV = teacher.head(teacher.hidden_ND).float().log_softmax(-1)
        kl_T = (logq_TV.exp() * (logq_TV - logp_TV)).sum(-1).tolist()
        top = logq_TV.topk(PREFERRED)
        tokens = []
        for t, token in enumerate(rollout.ids):
            preferred = zip(top.indices[t].tolist(), top.values[t].exp().tolist(), strict=True)
            tokens.append(
                {
                    "text": tokenizer.decode([token]),
                    "logp": float(logp_TV[t, token]),
                    "logq": float(logq_TV[t, token]),
                    "kl": kl_T[t],
                    "top": [[tokenizer.decode([other]), share] for other, share in preferred],
                }
            )
        views.append(
            {
                "row": row.demonstration.source,
                "prompt": row.demonstration.prompt[-1]["content"],
                "demonstration": row.demonstration.shown,
                "tokens": tokens,
                "truncated": rollout.truncated,
            }
        )
    return views
