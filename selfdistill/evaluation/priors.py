"""Prior abilities: multiple choice and continuations by log-likelihood, or questions that are answered and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfdistill.data import (
    ChatFormat,
    Demonstration,
    RawRow,
    check_rows,
    first_ten,
    load_demonstrations,
    not_object,
    read_jsonl,
    repeated_key,
    text_of,
    wrong,
)
from selfdistill.errors import UserError
from selfdistill.evaluation.answers import answer, check_answers
from selfdistill.model import ForwardPass, LoadedModel
from selfdistill.runtime import ProgressBar

REPLY_TOKENS = 48
"""Most tokens of the reply to a question."""

_SCORER = "contains"  # for questions that name none
_WANT_ROW = (
    "expected query + choices + gold, contexts + continuation + gold, context + continuation, or a file of "
    "prompt + answer"
)


@dataclass(frozen=True)
class Choices:
    """One row whose choices are compared, or whose one continuation is to be the model's own."""

    source: str
    """Where it stands: ``piqa.jsonl:12``."""
    pairs: tuple[tuple[str, str], ...]
    """(context, continuation) of each choice, as plain text."""
    gold: int | None
    """The right pair; None: one pair, right if it is the greedy continuation."""


@dataclass(frozen=True)
class EncodedPrior:
    """The rows of one prior file with their token ids: one context a pair, or one prompt a question."""

    name: str
    rows: Sequence[Choices | Demonstration]
    contexts: list[list[int]]
    continuations: list[list[int]]
    """One a context; none where the rows are questions."""


@dataclass(frozen=True)
class PriorResult:
    """One prior file's result."""

    name: str
    items: int
    accuracy: float
    """Share of items whose likeliest choice (or greedy continuation, or scored reply) is right."""
    accuracy_norm: float | None
    """The same with log-likelihoods divided by the choice's length in characters; None where there are no choices."""
    correct: list[bool]
    """Of each item, by ``accuracy``."""


# --- loading ---


def load_prior(path: str) -> dict[str, list[Choices] | list[Demonstration]]:
    """Prior files by name: a ``.jsonl`` file or every one of a folder.

    A row is ``query`` + ``choices`` + ``gold``, or ``contexts`` + ``continuation`` + ``gold``, or ``context`` +
    ``continuation``; or, where the first has ``prompt`` or ``messages``, an evaluation row as
    :func:`load_demonstrations` reads it, which is answered and scored. All rows of a file have the same form. A query
    that starts with ``Question:`` is followed by ``Answer:``; before choices and continuations stands a space, unless
    a continuation of ``contexts`` starts with punctuation.

    Raises:
        UserError: nothing there, or a file with bad rows, of which it names the first ten and the number of all.
    """
    root = Path(path)
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"prior {path!r}: no such .jsonl file, or a folder without any")
    return {file.stem: _load_file(str(file)) for file in files}


def _load_file(path: str) -> list[Choices] | list[Demonstration]:
    try:
        raws = read_jsonl(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not raws:
        raise UserError(f"{path}: no rows, expected at least one")
    forms = (_form(raw.value, []) for raw in raws if not raw.problem)
    if next((form for form in forms if form), None) in ("prompt", "messages"):
        return load_demonstrations(path, completion_required=False)
    return check_rows(path, raws, _form, lambda raw, form, _, problems: _choices(raw, form, problems), "file")


def _form(row: Any, problems: list[str]) -> str | None:
    """The column that tells the row's form; None with a problem where there is none."""
    if repeated := repeated_key(row):
        problems.append(repeated)
    elif not isinstance(row, dict):
        problems.append(f"{not_object(row)}: {_WANT_ROW}")
    else:
        for name in ("prompt", "messages", "context", "query", "contexts"):
            if row.get(name) is not None:
                return name
        problems.append(f"not a prior row, {_WANT_ROW}")
    return None


def _choices(raw: RawRow, form: str, problems: list[str]) -> Choices:
    """The row as pairs, to be thrown away where there are problems."""
    row: dict[str, Any] = raw.value
    if form == "context":
        context = row["context"]
        if context != "":
            context = text_of(context, "context", 'text, or "" for a continuation of nothing', problems)
        return Choices(raw.source, ((context, " " + _continuation(row, problems).strip()),), None)
    if form == "contexts":
        continuation = _continuation(row, problems)
        joiner = "" if continuation[:1] in ".,;:!?'" else " "
        pairs = [(context, joiner + continuation.strip()) for context in _texts(row, "contexts", problems)]
    else:
        query = text_of(row["query"], "query", "text", problems).rstrip()
        if query.startswith("Question:"):
            query += "\nAnswer:"
        pairs = [(query, " " + choice) for choice in _texts(row, "choices", problems)]
    gold = row.get("gold")
    want = f"a whole number from 0 to {len(pairs) - 1}" if pairs else "the right one's number from 0"
    if "gold" not in row:
        problems.append(f"column 'gold': missing, expected {want}")
    elif not isinstance(gold, int) or isinstance(gold, bool) or (pairs and not 0 <= gold < len(pairs)):
        problems.append(wrong("gold", gold, want))
    return Choices(raw.source, tuple(pairs), gold)


def _continuation(row: dict[str, Any], problems: list[str]) -> str:
    if "continuation" in row:
        return text_of(row["continuation"], "continuation", "text", problems)
    problems.append("column 'continuation': missing, expected text")
    return ""


def _texts(row: dict[str, Any], column: str, problems: list[str]) -> list[str]:
    want = "a list of two or more texts"
    if column not in row:
        problems.append(f"column '{column}': missing, expected {want}")
        return []
    values = row[column]
    if not isinstance(values, list) or len(values) < 2:
        problems.append(wrong(column, values, want))
        return []
    return [text_of(value, f"{column}[{number}]", "text", problems) for number, value in enumerate(values)]


# --- token ids ---


def encode_priors(
    loaded: LoadedModel, chat: ChatFormat, priors: Mapping[str, Sequence[Choices] | Sequence[Demonstration]]
) -> list[EncodedPrior]:
    """Token ids of every row of every file, so that what does not fit is found before anything is computed.

    Questions are in the chat template, pairs are plain text. The tokens of a continuation are those that the joint text
    has beyond the context's. An empty context is the tokenizer's BOS token, or EOS where it has none, as in lm-eval.

    Raises:
        UserError: rows that do not fit the model's window or, among questions, have an answer that the scorer cannot
            use; names the first ten and the number of all.
    """
    encoded, bad = [], []
    for name, rows in priors.items():
        questions = [row for row in rows if isinstance(row, Demonstration)]
        check_answers(questions, _SCORER)
        contexts = [chat.encode_prompt(row.prompt) for row in questions]
        lengths = [(row.source, len(ids) + REPLY_TOKENS) for row, ids in zip(questions, contexts, strict=True)]
        continuations: list[list[int]] = []
        for row in rows:
            if isinstance(row, Choices):
                pairs = [_pair_ids(loaded, *pair) for pair in row.pairs]
                contexts += [context for context, _ in pairs]
                continuations += [continuation for _, continuation in pairs]
                lengths.append((row.source, max(len(context) + len(continuation) for context, continuation in pairs)))
        if loaded.window is not None:
            bad += [f"{source}: {length} tokens" for source, length in lengths if length > loaded.window]
        encoded.append(EncodedPrior(name, rows, contexts, continuations))
    if bad:
        count = "1 row is" if len(bad) == 1 else f"{len(bad)} rows are"
        raise UserError(
            f"prior: {count} longer than the window of {loaded.window} tokens of model {loaded.name!r}: "
            f"{first_ten(bad)}; shorten or remove {'it' if len(bad) == 1 else 'them'}"
        )
    return encoded


def _pair_ids(loaded: LoadedModel, context: str, continuation: str) -> tuple[list[int], list[int]]:
    tokenizer = partial(loaded.tokenizer, split_special_tokens=True)  # texts have no control tokens
    if context:
        head = tokenizer(context)["input_ids"]
        whole = tokenizer(context + continuation)["input_ids"]
        return whole[: len(head)], whole[len(head) :]
    ids = (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id, loaded.end_token_ids[0])
    first = next(token for token in ids if token is not None)
    return [first], tokenizer(continuation, add_special_tokens=False)["input_ids"]


# --- computing ---


def prior_abilities(
    loaded: LoadedModel, scorer: ForwardPass, chat: ChatFormat, priors: Sequence[EncodedPrior], *, batch_size: int = 16
) -> list[PriorResult]:
    """Accuracy on each prior file.

    Choices are compared by the log-likelihood of their continuation after their context, as plain text without a chat
    template.
    """
    results = []
    for prior in priors:
        questions = [row for row in prior.rows if isinstance(row, Demonstration)]
        if questions:
            answers = answer(
                loaded,
                prior.contexts,
                questions,
                chat,
                max_completion_length=REPLY_TOKENS,
                batch_size=32,
                scorer=_SCORER,
                what=prior.name,
            )
            results.append(PriorResult(prior.name, len(questions), answers.accuracy, None, answers.correct))
            continue
        loglikelihoods, greedy = _loglikelihoods(
            loaded, scorer, prior.contexts, prior.continuations, batch_size, prior.name
        )
        rows = [row for row in prior.rows if isinstance(row, Choices)]
        right: list[bool] = []
        right_norm, at = 0, 0
        for row in rows:
            values = loglikelihoods[at : at + len(row.pairs)]
            if row.gold is None:
                right.append(greedy[at])
            else:
                right.append(values.index(max(values)) == row.gold)
                normed = [v / len(text.strip()) for v, (_, text) in zip(values, row.pairs, strict=True)]
                right_norm += normed.index(max(normed)) == row.gold
            at += len(row.pairs)
        norm = None if rows[0].gold is None else right_norm / len(rows)
        results.append(PriorResult(prior.name, len(rows), sum(right) / len(rows), norm, right))
    return results


@torch.no_grad()
def _loglikelihoods(
    loaded: LoadedModel,
    scorer: ForwardPass,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
    what: str,
) -> tuple[list[float], list[bool]]:
    """Log-likelihood of each continuation, and whether it is what greedy decoding would say."""
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]) + len(continuations[i]))
    loglikelihoods, greedy = [0.0] * len(contexts), [False] * len(contexts)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with ProgressBar(what, len(batches)) as reporter:
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
