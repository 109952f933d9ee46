"""Prior abilities: multiple choice and continuations by log-likelihood, or questions with scored replies.

Legend: N completion tokens of all choices, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfdistill.data import (
    ChatFormat,
    Demonstration,
    RawRow,
    RowProblem,
    by_reason,
    check_rows,
    encode_prompts,
    load_demonstrations,
    located,
    not_object,
    nothing_to_score,
    read_jsonl,
    repeated_key,
    text_of,
    wrong,
)
from selfdistill.errors import UserError
from selfdistill.evaluation.answers import answer, check_answers, in_batches
from selfdistill.model import ForwardPass, LoadedModel, Sampling
from selfdistill.runtime import say_note

REPLY_TOKENS = 48
"""Maximum length of the reply to a question, in tokens."""

_SCORER = "contains"  # for questions that name none
_WANT_ROW = (
    "expected query + choices + gold, contexts + continuation + gold, context + continuation, or a file of "
    "prompt + answer"
)


@dataclass(frozen=True)
class Choices:
    """A multiple-choice item, or a single continuation that the model should generate."""

    source: str
    """Its location: ``piqa.jsonl:12``."""
    pairs: tuple[tuple[str, str], ...]
    """(context, continuation) of each choice, as plain text."""
    gold: int | None
    """Index of the correct pair; None: a single pair, correct if it is the greedy continuation."""


@dataclass(frozen=True)
class EncodedPrior:
    """The items of one prior file with their token ids: one context per pair, or one prompt per question."""

    name: str
    rows: Sequence[Choices | Demonstration]
    contexts: list[list[int]]
    continuations: list[list[int]]
    """One per context; empty for questions."""


@dataclass(frozen=True)
class PriorResult:
    """One prior file's result."""

    name: str
    items: int
    accuracy: float
    """Share of items whose most likely choice (or greedy continuation, or reply) is correct."""
    accuracy_norm: float | None
    """The same with log-likelihoods divided by the choice's length in characters; None without choices."""
    correct: list[bool]
    """Whether each item is correct, as counted in ``accuracy``."""
    truncated: int | None = None
    """Number of replies truncated at ``REPLY_TOKENS``; None without questions."""


# --- loading ---


def load_prior(path: str) -> dict[str, list[Choices] | list[Demonstration]]:
    """Load a ``.jsonl`` prior file, or all in a folder, by file name without its suffix; see :func:`located`.

    A row is ``query`` + ``choices`` + ``gold``, or ``contexts`` + ``continuation`` + ``gold``, or ``context`` +
    ``continuation``. If the first row has ``prompt`` or ``messages``, rows are questions as :func:`load_demonstrations`
    reads them, whose replies are scored. All rows of a file have the same form. A query that starts with ``Question:``
    is followed by ``Answer:``. A space precedes choices and continuations, unless a continuation of ``contexts`` starts
    with punctuation.

    Raises:
        UserError: there is no such file, or a file has bad rows; names the first ten and the total.
    """
    root = Path(located(path))
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"prior {path!r}: no such .jsonl file, or a folder without any; check the path")
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
        return load_demonstrations(path, lacks=nothing_to_score(_SCORER))
    return check_rows(path, raws, _form, lambda raw, form, _, problems: _choices(raw, form, problems), "file")


def _form(row: Any, problems: list[str]) -> str | None:
    """The column that identifies the row's form; None, with a problem, if there is none."""
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
    """The row as pairs; invalid if there are problems."""
    row: dict[str, Any] = raw.value
    if form == "context":
        context = row["context"]
        if context != "":
            context = text_of(context, "context", 'text, or "" for no context', problems)
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
    want = f"an integer from 0 to {len(pairs) - 1}" if pairs else "the index of the correct one, from 0"
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
    """Encode every item of every file, to find those that are too long before any computation.

    Questions use the chat template; pairs are plain text. A continuation's tokens are those of the joint text after the
    context's. An empty context becomes the tokenizer's BOS token, or EOS if it has none, as in lm-eval.

    Raises:
        UserError: rows exceed the model's context window, or a scorer cannot use the answer to a question; names the
            first ten and the total.
    """
    encoded: list[EncodedPrior] = []
    bad: list[RowProblem] = []
    for name, rows in priors.items():
        questions = [row for row in rows if isinstance(row, Demonstration)]
        check_answers(questions, _SCORER)
        contexts = encode_prompts(questions, chat)
        lengths = [(row.source, len(ids) + REPLY_TOKENS) for row, ids in zip(questions, contexts, strict=True)]
        continuations: list[list[int]] = []
        for row in rows:
            if isinstance(row, Choices):
                pairs = [_pair_ids(loaded, chat, *pair) for pair in row.pairs]
                contexts += [context for context, _ in pairs]
                continuations += [continuation for _, continuation in pairs]
                lengths.append((row.source, max(len(context) + len(continuation) for context, continuation in pairs)))
        if loaded.window is not None:
            bad += [RowProblem(row, "", str(length), " tokens") for row, length in lengths if length > loaded.window]
        encoded.append(EncodedPrior(name, rows, contexts, continuations))
    if bad:
        count = "1 row is" if len(bad) == 1 else f"{len(bad)} rows are"
        raise UserError(
            f"prior: {count} longer than the context window of {loaded.window} tokens of model {loaded.name!r}: "
            f"{by_reason(bad)}; shorten or remove {'it' if len(bad) == 1 else 'them'}"
        )
    return encoded


def _pair_ids(loaded: LoadedModel, chat: ChatFormat, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if context:
        return chat.encode_pair(context, continuation)
    ids = (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id, loaded.end_token_ids[0])
    first = next(token for token in ids if token is not None)
    return [first], chat.encode_pair("", continuation)[1]


# --- computing ---


def prior_abilities(
    loaded: LoadedModel,
    forward_pass: ForwardPass,
    chat: ChatFormat,
    priors: Sequence[EncodedPrior],
    *,
    batch_size: int,
    who: str,
) -> list[PriorResult]:
    """Accuracy on each prior file.

    Choices are compared by the log-likelihood of their continuation given their context, in plain text without a chat
    template.

    Args:
        loaded: the model.
        forward_pass: runs it.
        chat: encodes and decodes replies to questions.
        priors: from :func:`encode_priors`.
        batch_size: pairs per forward pass.
        who: the model's name in progress bars.
    """
    results = []
    for prior in priors:
        what = f"{who} on prior {prior.name}"
        questions = [row for row in prior.rows if isinstance(row, Demonstration)]
        if questions:
            results.append(_replied(loaded, prior, questions, chat, what))
            continue
        found = _loglikelihoods(loaded, forward_pass, prior.contexts, prior.continuations, batch_size, what)
        rows = [row for row in prior.rows if isinstance(row, Choices)]
        right: list[bool] = []
        right_norm, at = 0, 0
        for row in rows:
            values = [value for value, _ in found[at : at + len(row.pairs)]]
            if row.gold is None:
                _, is_greedy = found[at]
                right.append(is_greedy)
            else:
                right.append(_is_best(values, row.gold))
                normed = [v / len(text.strip()) for v, (_, text) in zip(values, row.pairs, strict=True)]
                right_norm += _is_best(normed, row.gold)
            at += len(row.pairs)
        norm = None if rows[0].gold is None else right_norm / len(rows)
        results.append(PriorResult(prior.name, len(rows), sum(right) / len(rows), norm, right))
    _note_truncated(results)
    return results


def _is_best(values: Sequence[float], gold: int) -> bool:
    """Whether the first of the highest values is the gold one; never if one is no number, as after an overflow."""
    return not any(map(math.isnan, values)) and values.index(max(values)) == gold


def _note_truncated(results: Sequence[PriorResult]) -> None:
    cut = [result for result in results if result.truncated]
    if cut:
        files = ", ".join(f"{result.truncated} of {result.items} in {result.name}" for result in cut)
        say_note(
            f"prior: replies stopped at the limit of {REPLY_TOKENS} tokens and are scored as far as they go: {files}; "
            "ask for short answers, and let a model that thinks answer at once (chat_template_kwargs, such as "
            "enable_thinking false)",
            topic=f"truncated prior replies: {', '.join(result.name for result in cut)}",
        )


def _replied(
    loaded: LoadedModel, prior: EncodedPrior, questions: Sequence[Demonstration], chat: ChatFormat, what: str
) -> PriorResult:
    """Generate and score the replies to the questions of a file."""
    answers = answer(
        loaded,
        prior.contexts,
        questions,
        chat,
        Sampling(REPLY_TOKENS, temperature=0),
        batch_size=32,
        scorer=_SCORER,
        what=what,
    )
    return PriorResult(prior.name, len(questions), answers.accuracy, None, answers.correct, truncated=answers.truncated)


@torch.no_grad()
def _loglikelihoods(
    loaded: LoadedModel,
    forward_pass: ForwardPass,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
    what: str,
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy decoding would generate it."""

    def scored(batch: list[int]) -> list[tuple[float, bool]]:
        chosen = [continuations[i] for i in batch]
        scores = forward_pass(loaded.model, [contexts[i] for i in batch], chosen)
        logps_NV = scores.head(scores.hidden_ND).float().log_softmax(-1)
        tokens_N = torch.tensor([t for ids in chosen for t in ids], device=logps_NV.device)
        picked = logps_NV.gather(-1, tokens_N[:, None])[:, 0].split([len(ids) for ids in chosen])
        same = (logps_NV.argmax(-1) == tokens_N).split([len(ids) for ids in chosen])
        return [(float(p.sum()), bool(s.all())) for p, s in zip(picked, same, strict=True)]

    lengths = [len(context) + len(ids) for context, ids in zip(contexts, continuations, strict=True)]
    return in_batches(scored, lengths, batch_size, what)
