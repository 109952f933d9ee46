"""The teacher's view of each token in a few rollouts, shown by ``report`` before and after training.

It also shows episodes that no teacher scores.

The rollouts are greedy. Where the teacher's contexts are made of a step's samples, they are samples, with the seeds of
the first step. Where the teacher sees more or less of the demonstration from step to step, it sees the most here.

Legend: N tokens of a completion, n tokens in one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from selfdistill.data import Demonstration, Example, as_transcript, shown_text, speaker_of, texts_of
from selfdistill.loss import CHUNK_TOKENS, forward_kl
from selfdistill.methods import Completion, play, rules_of, scorer_judges, verdicts_on
from selfdistill.model import Sampling, cached_casts, rest_engine, root_unsharded, sample, unsharded
from selfdistill.training.selection import BatchPart
from selfdistill.training.trainer import Trainer

PREFERRED = 5
"""Number of the teacher's most likely tokens saved at each position."""


@torch.no_grad()
def token_views(trainer: Trainer) -> list[dict[str, Any]]:
    """Rollouts of ``view_rows`` examples, or episodes, spread over the data, scored by student p and teacher q.

    Returns:
        One dict per example: ``row`` (source), ``tools`` (a JSON text of each), ``before`` (the prompt's other turns),
        ``prompt`` (its last turn), ``teacher_sees`` (the teacher's prompt), ``truncated`` and ``tokens``, the student's
        own. Each token has ``text`` (of :func:`texts_of`), ``logp`` and ``logq`` (nats), ``kl`` (KL(q||p), nats) and
        ``top``, the teacher's most likely tokens with their probabilities. An episode also has ``reward`` (None if it
        was not judged), ``feedback`` and ``turns``, each with the number of its ``tokens``, the names of its ``calls``,
        why it is ``invalid``, and ``observations``, each with ``speaker`` and ``text``. Where the teacher's contexts
        are made of samples, rows of which none is learnt are left out. Without a teacher only methods that learn from
        their own episodes have any; ``demonstration`` is in the place of ``teacher_sees``, and tokens have nothing but
        ``text``.
    """
    if trainer.teacher is None or trainer.stage.task.method.teacher is None:
        return _unscored(trainer)
    model, views = trainer.loaded.model, []
    with unsharded(model), cached_casts(model), trainer.accelerator.autocast():
        shown = _rollouts(trainer)
        rest_engine()
        students = [trainer.forward_pass(model, [x.example.student_ids], [x.ids]) for x in shown]
    with trainer.teacher.model() as network, unsharded(network), cached_casts(network), trainer.accelerator.autocast():
        teachers = [trainer.forward_pass(network, [x.example.teacher_ids or []], [x.ids]) for x in shown]
    with root_unsharded([model, *trainer.teacher.networks]), trainer.accelerator.autocast():
        for rollout, student, teacher in zip(shown, students, teachers, strict=True):
            tokens: list[dict[str, Any]] = []
            for ids, mine_nD, theirs_nD in zip(
                torch.tensor(rollout.ids).split(CHUNK_TOKENS),
                student.hidden_ND.split(CHUNK_TOKENS),
                teacher.hidden_ND.split(CHUNK_TOKENS),
                strict=True,
            ):
                logits_nV = student.head(mine_nD), teacher.head(theirs_nD)
                logs_nV = (part_nV.float().log_softmax(-1) for part_nV in logits_nV)
                tokens += _chunk(trainer.loaded.tokenizer, ids.tolist(), *logs_nV)
            sees = _read(trainer, rollout.example.teacher_ids or [])
            views.append(_view(trainer, rollout, tokens) | {"teacher_sees": sees})
    return views


def _unscored(trainer: Trainer) -> list[dict[str, Any]]:
    """Views of episodes that no teacher scores; empty for a method that plays none."""
    if not rules_of(trainer.stage.task.method):
        return []
    model = trainer.loaded.model
    with unsharded(model), cached_casts(model), trainer.accelerator.autocast():
        shown = _rollouts(trainer)
    rest_engine()
    return [
        _view(trainer, rollout, [{}] * len(rollout.ids))
        | {"demonstration": _demonstration(rollout.example.demonstration)}
        for rollout in shown
    ]


def _view(trainer: Trainer, rollout: Completion, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The view of a rollout with these scores of its tokens, of which the student's own are shown."""
    row = rollout.example.demonstration
    texts = texts_of(trainer.loaded.tokenizer, rollout.ids)
    tokens = [{"text": text, **score} for text, score in zip(texts, scores, strict=True)]
    return {
        "row": row.source,
        "tools": [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in row.tools or ()],
        "before": shown_text(as_transcript(row.prompt[:-1])),
        "prompt": shown_text(row.prompt[-1]["content"]),
        "tokens": [token for token, is_own in zip(tokens, rollout.is_own, strict=True) if is_own],
        "truncated": rollout.truncated,
        **_transcript(rollout),
    }


def _rollouts(trainer: Trainer) -> list[Completion]:
    """Greedy rollouts of examples with a context, or without a teacher; else of each the first sample learnt."""
    task, config = trainer.stage.task, trainer.config
    with_context = [example for example in task.examples if example.teacher_ids]
    source = with_context or task.examples
    count = min(config.view_rows, len(source))
    rows = [source[number * len(source) // count] for number in range(count)]
    if with_context or task.method.teacher is None:
        return _greedy(trainer, rows)
    samples = _judged(trainer, task.method.sequence(trainer.loaded, rows, 0))
    (selected,) = trainer.selector([BatchPart(task.name, task.method, samples, task.share, task.window)])
    first = {one.example.demonstration.row: one for one in reversed(selected.completions) if one.example.teacher_ids}
    return [first[row.demonstration.row] for row in rows if row.demonstration.row in first]


def _greedy(trainer: Trainer, rows: Sequence[Example]) -> list[Completion]:
    """Greedy rollouts, or episodes where the method learns from them."""
    policy = Sampling(trainer.config.max_completion_length, temperature=0)
    if rules := rules_of(trainer.stage.task.method):
        return _judged(trainer, play(trainer.loaded, trainer.chat, rows, policy, rules, [0] * len(rows)))
    rollouts = sample(trainer.loaded, [row.student_ids for row in rows], policy)
    return [Completion(row, r.ids, r.logps, r.truncated) for row, r in zip(rows, rollouts, strict=True)]


def _judged(trainer: Trainer, rollouts: list[Completion]) -> list[Completion]:
    """Episodes with the verdicts that the method learns from, where its scorer gives them; else they are unchanged."""
    method = trainer.stage.task.method
    if method.checker is None or not rules_of(method) or not scorer_judges(trainer.config):
        return rollouts
    verdicts = verdicts_on(method.checker, rollouts, trainer.chat)
    return [replace(one, verdict=verdict) for one, verdict in zip(rollouts, verdicts, strict=True)]


def _read(trainer: Trainer, ids: Sequence[int]) -> str:
    """A prompt as the model reads it, with its control tokens; a word for the tokens of a picture."""
    pictures = trainer.loaded.pictures
    mark = None if pictures is None else pictures.token_id
    runs = groupby(ids, key=lambda token: token == mark)
    return "".join("[picture]" if is_mark else trainer.loaded.tokenizer.decode(list(run)) for is_mark, run in runs)


def _demonstration(row: Demonstration) -> str:
    """The row's demonstration, as text."""
    return shown_text(row.privileged_context or (as_transcript(row.episode) if row.episode else row.completion))


def _transcript(episode: Completion) -> dict[str, Any]:
    """The turns of an episode and the environment's verdict; empty for a single reply."""
    if not episode.messages:
        return {}
    lengths = iter([end - start for start, end in episode.reply_spans])
    turns: list[dict[str, Any]] = []
    for message in episode.messages:
        if message["role"] != "assistant":
            turns[-1]["observations"].append({"speaker": speaker_of(message), "text": message["content"]})
            continue
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        invalid = message.get("invalid", "")
        turns.append({"tokens": next(lengths), "calls": calls, "invalid": invalid, "observations": []})
    verdict = episode.verdict
    return {"reward": verdict and verdict.reward, "feedback": verdict.feedback if verdict else "", "turns": turns}


def _chunk(tokenizer: Any, ids: list[int], logp_nV: Tensor, logq_nV: Tensor) -> list[dict[str, Any]]:
    """The scores of these tokens; see :func:`token_views`."""
    kl_n = forward_kl(logp_nV, logq_nV).tolist()
    top, tokens = logq_nV.topk(PREFERRED), []
    for n, token in enumerate(ids):
        preferred = zip(top.indices[n].tolist(), top.values[n].exp().tolist(), strict=True)
        tokens.append(
            {
                "logp": float(logp_nV[n, token]),
                "logq": float(logq_nV[n, token]),
                "kl": kl_n[n],
                "top": [[tokenizer.decode([other]), share] for other, share in preferred],
            }
        )
    return tokens
