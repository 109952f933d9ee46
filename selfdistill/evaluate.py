"""Evaluation: what a model can do on the new task, what it can still do, and how far it has moved from its base.

Legend: N completion tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from selfdistill.answers import answer, check_answers
from selfdistill.config import EvalConfig
from selfdistill.contexts import ChatFormat, encode
from selfdistill.demonstrations import Demonstration, load_demonstrations
from selfdistill.divergence import forward_kl
from selfdistill.errors import UserError
from selfdistill.models import LoadedModel, load_model, to_best_device
from selfdistill.priors import encode_priors, load_prior, prior_abilities
from selfdistill.rollouts import Sampling, sample
from selfdistill.scorers import default_scorer, doubt_about
from selfdistill.scores import Scorer
from selfdistill.tracking import output, say


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
    """A small :class:`Distance` that is cheap enough during training: 3 prompts, 16 tokens each."""

    def __init__(self, base: LoadedModel, scorer: Scorer, chat: ChatFormat) -> None:
        super().__init__(base, scorer, chat, general_prompts()[:3], 16)


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
    check_answers(kept, config.scorer)
    if doubt := doubt_about(kept, config.scorer):
        say(f"note: {doubt}")
    encoded_priors = encode_priors(loaded, chat, priors)
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
        results = prior_abilities(loaded, scorer, chat, encoded_priors, batch_size=config.batch_size)
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
    # The width of the logits, which are what is compared: a tokenizer may have fewer entries, and padding differs.
    own, others = (model.config.get_text_config().vocab_size for model in (loaded.model, base.model))
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
    output().print(table)
