"""Evaluation: what a model can do on the new task, what it can still do, and how far it has moved from its base.

Legend: N completion tokens of all rows, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selfdistill.config import EvalConfig
from selfdistill.contexts import ChatFormat, encode
from selfdistill.demonstrations import Demonstration, load_demonstrations
from selfdistill.divergence import forward_kl
from selfdistill.errors import UserError
from selfdistill.models import LoadedModel, load_model, to_best_device
from selfdistill.rollouts import Sampling, sample
from selfdistill.scorers import default_scorer, score
from selfdistill.scores import Scorer
from selfdistill.tracking import Reporter


@dataclass(frozen=True)
class Answers:
    """Greedy replies to a set of rows."""

    replies: list[str]
    correct: list[bool]
    lengths: list[int]
    """Tokens of each reply."""
    truncated: int
    """Replies stopped by the length limit."""

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


def answer(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    demonstrations: Sequence[Demonstration],
    chat: ChatFormat,
    *,
    max_completion_length: int,
    batch_size: int,
    scorer: str | None = None,
    what: str | None = None,
) -> Answers:
    """Greedy replies to ``prompts``, each scored against its row.

    Args:
        prompts: token ids, the student's or the teacher's, one per row.
        scorer: for rows that name none.
        what: label of the progress; None: silent.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of like length together: less padding
    replies, lengths, truncated = [""] * len(prompts), [0] * len(prompts), 0
    sampling = Sampling(max_completion_length, temperature=0)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with Reporter(what or "", len(batches), quiet=what is None, every=max(len(batches) // 4, 1)) as reporter:
        for number, batch in enumerate(batches):
            rollouts = sample(loaded, [prompts[i] for i in batch], sampling)
            for i, rollout in zip(batch, rollouts, strict=True):
                replies[i], lengths[i] = chat.decode(rollout.ids), len(rollout.ids)
                truncated += rollout.truncated
            reporter.advance(number + 1)
    correct = [score(default_scorer(d, scorer), r, d) for r, d in zip(replies, demonstrations, strict=True)]
    return Answers(replies, correct, lengths, truncated)


def general_prompts() -> list[Demonstration]:
    """The general prompts that ship with the package, for distances from the base."""
    lines = Path(packaged("general.txt")).read_text(encoding="utf-8").splitlines()
    return [
        Demonstration(i, f"general.txt:{i + 1}", ({"role": "user", "content": x},), "") for i, x in enumerate(lines)
    ]


def packaged(name: str) -> str:
    """Path of a data file of the package."""
    return str(resources.files("selfdistill") / "data" / name)


class Distance:
    """KL(base||model) per token, over the base's own greedy answers to fixed prompts.

    The base's log-probabilities are kept, so the base model itself need not be.

    Args:
        base: the model from which the distance is measured, as it is now.
        prompts: rows whose prompts are asked.
        max_tokens: of each answer.
    """

    def __init__(
        self, base: LoadedModel, scorer: Scorer, chat: ChatFormat, prompts: Sequence[Demonstration], max_tokens: int
    ) -> None:
        self._scorer = scorer
        self._contexts = [chat.encode_prompt(row.prompt) for row in prompts]
        rollouts = sample(base, self._contexts, Sampling(max_tokens, temperature=0))
        self._completions = [rollout.ids for rollout in rollouts]
        self._base_NV = self._logits(base.model)

    @torch.no_grad()
    def _logits(self, model: Any) -> list[Tensor]:
        logits = []
        for start in range(0, len(self._contexts), 8):
            part = slice(start, start + 8)
            scores = self._scorer(model, self._contexts[part], self._completions[part])
            logits.append(scores.head(scores.hidden_ND).float())
        return logits

    @torch.no_grad()
    def of(self, model: Any) -> float:
        """KL(base||model) in nats per token."""
        parts = zip(self._base_NV, self._logits(model), strict=True)
        return float(torch.cat([forward_kl(mine, base) for base, mine in parts]).mean())


class Drift(Distance):
    """A small :class:`Distance` that is cheap enough for every training step: 3 prompts, 16 tokens each."""

    def __init__(self, base: LoadedModel, scorer: Scorer, chat: ChatFormat) -> None:
        super().__init__(base, scorer, chat, general_prompts()[:3], 16)


@dataclass(frozen=True)
class PriorResult:
    """One prior file's result."""

    name: str
    items: int
    accuracy: float
    """Share of items whose likeliest choice (or greedy continuation, or scored reply) is right."""
    accuracy_norm: float | None
    """The same with log-likelihoods divided by the choice's length in characters; None where there are no choices."""


def load_prior(path: str) -> dict[str, list[dict[str, Any]] | list[Demonstration]]:
    """Prior files by name: a ``.jsonl`` file or every one of a folder.

    A row is ``query`` + ``choices`` + ``gold``, or ``contexts`` (two) + ``continuation`` + ``gold``, or ``context`` +
    ``continuation``, or an evaluation row (``prompt`` + ``answer``) which is answered and scored.

    Raises:
        UserError: nothing there, or a row of no known format.
    """
    root = Path(path)
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"prior {path!r}: no such .jsonl file, or a folder without any")
    found: dict[str, list[dict[str, Any]] | list[Demonstration]] = {}
    for file in files:
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}: line {number}: invalid JSON ({error})") from None
            if not isinstance(row, dict) or not _prior_format(row):
                raise UserError(
                    f"{file}: line {number}: not a prior row; want query + choices + gold, contexts + continuation + "
                    "gold, context + continuation, or prompt + answer"
                )
            rows.append(row)
        if not rows:
            raise UserError(f"{file}: no rows")
        if any("prompt" in row for row in rows):
            found[file.stem] = load_demonstrations(str(file), completion_required=False)
        else:
            found[file.stem] = rows
    return found


def _prior_format(row: dict[str, Any]) -> bool:
    if "prompt" in row or "messages" in row:
        return True
    if "context" in row:
        return isinstance(row["context"], str) and isinstance(row.get("continuation"), str)
    variants = row.get("choices") if isinstance(row.get("query"), str) else row.get("contexts")
    if not isinstance(variants, list) or not isinstance(row.get("gold"), int):
        return False
    return 0 <= row["gold"] < len(variants) and ("choices" in row or isinstance(row.get("continuation"), str))


def prior_abilities(
    loaded: LoadedModel, scorer: Scorer, chat: ChatFormat, priors: dict[str, Any], *, batch_size: int = 16
) -> list[PriorResult]:
    """Accuracy on each prior file.

    Choices are compared by the log-likelihood of ``" " + choice`` after the query as plain text, without a chat
    template; a query that starts with ``Question:`` is followed by ``Answer:``. The tokens of a choice are those that
    the joint text has beyond the query's.
    """
    results = []
    for name, rows in priors.items():
        if isinstance(rows[0], Demonstration):
            prompts = [chat.encode_prompt(row.prompt) for row in rows]
            answers = answer(
                loaded, prompts, rows, chat, max_completion_length=48, batch_size=32, scorer="contains", what=name
            )
            results.append(PriorResult(name, len(rows), answers.accuracy, None))
            continue
        pairs = [pair for row in rows for pair in _pairs(row)]
        loglikelihoods, greedy = _loglikelihoods(loaded, scorer, pairs, batch_size, name)
        right, right_norm, at = 0, 0, 0
        for row in rows:
            count = len(_pairs(row))
            values, lengths = loglikelihoods[at : at + count], [len(c.strip()) for _, c in pairs[at : at + count]]
            if count == 1:
                right += greedy[at]
            else:
                right += values.index(max(values)) == row["gold"]
                normed = [v / length for v, length in zip(values, lengths, strict=True)]
                right_norm += normed.index(max(normed)) == row["gold"]
            at += count
        many = len(pairs) > len(rows)
        results.append(PriorResult(name, len(rows), right / len(rows), right_norm / len(rows) if many else None))
    return results


def _pairs(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(context, continuation) of each choice of a row."""
    if "context" in row:
        return [(row["context"], " " + row["continuation"].strip())]
    if row.get("query") is None:
        joiner = "" if row["continuation"][:1] in ".,;:!?'" else " "
        return [(context, joiner + row["continuation"].strip()) for context in row["contexts"]]
    query = row["query"].rstrip()
    if query.startswith("Question:"):
        query += "\nAnswer:"
    return [(query, " " + str(choice)) for choice in row["choices"]]


@torch.no_grad()
def _loglikelihoods(
    loaded: LoadedModel, scorer: Scorer, pairs: Sequence[tuple[str, str]], batch_size: int, what: str
) -> tuple[list[float], list[bool]]:
    """Log-likelihood of each continuation, and whether it is what greedy decoding would say."""
    tokenizer = loaded.tokenizer
    contexts, continuations = [], []
    for context, continuation in pairs:
        head = tokenizer(context)["input_ids"]
        whole = tokenizer(context + continuation)["input_ids"]
        contexts.append(whole[: len(head)])
        continuations.append(whole[len(head) :])
    order = sorted(range(len(pairs)), key=lambda i: len(contexts[i]) + len(continuations[i]))
    loglikelihoods, greedy = [0.0] * len(pairs), [False] * len(pairs)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with Reporter(what, len(batches), every=max(len(batches) // 4, 1)) as reporter:
        for number, batch in enumerate(batches):
            chosen = [continuations[i] for i in batch]
            scores = scorer(loaded.model, [contexts[i] for i in batch], chosen)
            logps_NV = scores.head(scores.hidden_ND).float().log_softmax(-1)
            tokens_N = torch.tensor([t for ids in chosen for t in ids], device=logps_NV.device)
            picked = logps_NV.gather(-1, tokens_N[:, None])[:, 0].split([len(ids) for ids in chosen])
            same = (logps_NV.argmax(-1) == tokens_N).split([len(ids) for ids in chosen])
            for i, p, s in zip(batch, picked, same, strict=True):
                loglikelihoods[i], greedy[i] = float(p.sum()), bool(s.all())
            reporter.advance(number + 1)
    return loglikelihoods, greedy


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """``selfdistill eval``: new task, prior abilities and distance from a base; prints a table, returns the numbers.

    Keys: ``accuracy``, ``items``, ``scorers``, ``completion/length``, ``completion/truncated``, ``dropped``; with
    ``prior`` also ``prior`` (by file) and ``prior_accuracy`` (mean over files); with ``base`` also ``kl_base``,
    KL(base||model) in nats per token over the base's answers to the general prompts of the package.
    """
    demonstrations = load_demonstrations(config.data, completion_required=False, split=config.split)
    priors = load_prior(config.prior) if config.prior else {}
    loaded = load_model(config.model, dtype=config.dtype)
    to_best_device(loaded)
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, config.chat_template_kwargs)
    scorer = Scorer(loaded)
    rows, dropped = encode(
        demonstrations,
        None,
        chat,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        window=loaded.window,
        on_long_prompt=config.on_long_prompt,
    )
    kept = [row.demonstration for row in rows]
    distance = _distance_from(config, loaded) if config.base else None
    answers = answer(
        loaded,
        [row.student_ids for row in rows],
        kept,
        chat,
        max_completion_length=config.max_completion_length,
        batch_size=config.batch_size,
        scorer=config.scorer,
        what="new task",
    )
    result: dict[str, Any] = {
        "accuracy": answers.accuracy,
        "items": len(rows),
        "scorers": sorted({default_scorer(row, config.scorer) for row in kept}),
        "completion/length": sum(answers.lengths) / len(rows),
        "completion/truncated": answers.truncated / len(rows),
        "dropped": dropped,
    }
    if priors:
        results = prior_abilities(loaded, scorer, chat, priors, batch_size=config.batch_size)
        result["prior"] = {r.name: {k: v for k, v in asdict(r).items() if k != "name"} for r in results}
        result["prior_accuracy"] = sum(r.accuracy for r in results) / len(results)
    if distance:
        result["kl_base"] = distance.of(loaded.model)
    _print_table(config, result)
    return result


def _distance_from(config: EvalConfig, loaded: LoadedModel) -> Distance:
    assert config.base is not None
    base = load_model(config.base, dtype=config.dtype)
    to_best_device(base)
    own, others = len(loaded.tokenizer), len(base.tokenizer)
    if own != others:
        raise UserError(
            f"base {config.base!r} has a vocabulary of {others} tokens, model {config.model!r} of {own}: the distance "
            "needs the same"
        )
    chat = ChatFormat(base.tokenizer, base.end_token_ids, config.chat_template_kwargs)
    return Distance(base, Scorer(base), chat, general_prompts(), 32)


def _print_table(config: EvalConfig, result: dict[str, Any]) -> None:
    table = Table(title=f"{config.model} on {config.data}")
    for column in ("measured", "items", "value"):
        table.add_column(column, justify="left" if column == "measured" else "right")
    table.add_row(
        f"new task, accuracy ({', '.join(result['scorers'])})", str(result["items"]), f"{result['accuracy']:.3f}"
    )
    table.add_row("tokens per reply", "", f"{result['completion/length']:.1f}")
    table.add_row("replies cut at the limit", "", f"{result['completion/truncated']:.1%}")
    if result["dropped"]:
        table.add_row("rows left out as too long", str(result["dropped"]), "")
    for name, prior in result.get("prior", {}).items():
        value = f"{prior['accuracy']:.3f}"
        if prior["accuracy_norm"] is not None:
            value += f" ({prior['accuracy_norm']:.3f} by length)"
        table.add_row(f"prior: {name}", str(prior["items"]), value)
    if "kl_base" in result:
        table.add_row("KL(base||model), nats per token", "", f"{result['kl_base']:.3f}")
    Console().print(table)
