"""Evaluation: log-likelihoods, distances and scores against straightforward recomputation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdistill import evaluate as module
from selfdistill.config import EvalConfig
from selfdistill.contexts import ChatFormat
from selfdistill.demonstrations import load_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluate import (
    Distance,
    answer,
    evaluate,
    general_prompts,
    load_prior,
    packaged,
    prior_abilities,
)
from selfdistill.models import LoadedModel
from selfdistill.scores import Scorer

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

CHOICES = [
    {"query": "Question: What floats?", "choices": ["wood", "a stone of lead"], "gold": 0},
    {"query": "He opened the door, because", "choices": ["it rang.", "he was asleep in bed."], "gold": 1},
    {"query": "Kill flies.\n", "choices": ["Swat them.", "Sing to them softly."], "gold": 0},
]
WINOGRANDE = [{"query": None, "contexts": ["Ann has the", "Bob owns the"], "continuation": "red car", "gold": 1}]
LAMBADA = [{"context": "once upon a", "continuation": "time"}]


def chat_of(loaded: LoadedModel) -> ChatFormat:
    return ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})


def reference_loglikelihood(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """One row, one forward pass, float64, a loop over positions."""
    context_ids = loaded.tokenizer(context)["input_ids"]
    ids = loaded.tokenizer(context + continuation)["input_ids"]
    logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
    total, greedy = 0.0, True
    for position in range(len(context_ids), len(ids)):
        row = logits[position - 1]
        total += float(row[ids[position]] - torch.logsumexp(row, 0))
        greedy &= int(row.argmax()) == ids[position]
    return total, greedy


@torch.no_grad()
def test_prior_accuracies_equal_row_by_row_loglikelihoods(load: Callable[..., LoadedModel]) -> None:
    for seed in range(4):
        loaded = load(seed=seed)
        priors: dict[str, Any] = {"choices": CHOICES, "winogrande": WINOGRANDE, "lambada": LAMBADA}
        results = {r.name: r for r in prior_abilities(loaded, Scorer(loaded), chat_of(loaded), priors, batch_size=4)}
        texts = [
            ("Question: What floats?\nAnswer:", [" wood", " a stone of lead"], 0),
            ("He opened the door, because", [" it rang.", " he was asleep in bed."], 1),
            ("Kill flies.", [" Swat them.", " Sing to them softly."], 0),
        ]
        right = right_norm = 0
        for context, continuations, gold in texts:
            values = [reference_loglikelihood(loaded, context, c)[0] for c in continuations]
            right += max(range(2), key=lambda i: values[i]) == gold
            right_norm += max(range(2), key=lambda i: values[i] / (len(continuations[i]) - 1)) == gold
        assert results["choices"].accuracy == pytest.approx(right / 3)
        assert results["choices"].accuracy_norm == pytest.approx(right_norm / 3)
        pair = [reference_loglikelihood(loaded, c, " red car")[0] for c in ("Ann has the", "Bob owns the")]
        assert results["winogrande"].accuracy == float(pair[1] > pair[0])
        assert results["lambada"].accuracy == float(reference_loglikelihood(loaded, "once upon a", " time")[1])
        assert results["lambada"].accuracy_norm is None


@torch.no_grad()
def test_greedy_continuation_of_the_model_itself_counts_as_right(load: Callable[..., LoadedModel]) -> None:
    found = 0
    for seed in range(4):
        loaded = load(seed=seed)
        for context in "abcdefghijklmnopqrstuvwxyz":
            ids = loaded.tokenizer(context)["input_ids"]
            text = loaded.tokenizer.decode([int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())])
            if not (text.isascii() and text.isalnum()):
                continue
            found += 1
            _, greedy = module._loglikelihoods(loaded, Scorer(loaded), [(context, text), (context, text + "~")], 4, "x")
            assert greedy == [True, reference_loglikelihood(loaded, context, text + "~")[1]]
    assert found >= 3


@torch.no_grad()
def test_distance_is_kl_from_base_along_the_bases_answers(load: Callable[..., LoadedModel]) -> None:
    base, other = load(seed=0), load(seed=1)
    chat, rows = chat_of(base), general_prompts()[:11]
    distance = Distance(base, Scorer(base), chat, rows, 6)
    assert distance.of(base.model) == pytest.approx(0, abs=1e-6)
    total, count = 0.0, 0
    for row in rows:
        ids = chat.encode_prompt(row.prompt)
        for _ in range(6):
            log_q = base.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            log_p = other.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            total, count = total + float((log_q.exp() * (log_q - log_p)).sum()), count + 1
            ids = [*ids, int(log_q.argmax())]
            if ids[-1] in base.end_token_ids:
                break
    assert distance.of(other.model) == pytest.approx(total / count, rel=1e-5)


def test_answers_keep_the_order_of_the_rows(load: Callable[..., LoadedModel], write_rows: Callable[..., Path]) -> None:
    loaded = load()
    chat = chat_of(loaded)
    rows = load_demonstrations(str(write_rows(count=7)))
    prompts = [chat.encode_prompt(row.prompt) for row in rows]
    together = answer(loaded, prompts, rows, chat, max_completion_length=5, batch_size=3)
    for prompt, row, reply, length in zip(prompts, rows, together.replies, together.lengths, strict=True):
        alone = answer(loaded, [prompt], [row], chat, max_completion_length=5, batch_size=1)
        assert (alone.replies, alone.lengths) == ([reply], [length])
    assert 0 <= together.truncated <= 7


def test_evaluate_counts_right_replies(
    model_folder: Callable[..., Path],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = load()
    chat = chat_of(loaded)
    rows = load_demonstrations(str(write_rows(count=4)))
    replies = answer(
        loaded, [chat.encode_prompt(r.prompt) for r in rows], rows, chat, max_completion_length=5, batch_size=4
    ).replies
    assert all(replies)
    expected = [
        {"prompt": row.prompt[0]["content"], "answer": reply if i < 3 else "never this"}
        for i, (row, reply) in enumerate(zip(rows, replies, strict=True))
    ]
    data = write_rows(expected, name="test.jsonl")
    prior = tmp_path / "prior"
    prior.mkdir()
    (prior / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in CHOICES), encoding="utf-8")
    (prior / "q.jsonl").write_text(json.dumps(expected[0]) + "\n", encoding="utf-8")
    folder = str(model_folder())
    config = EvalConfig(model=folder, data=str(data), prior=str(prior), base=folder, max_completion_length=5)
    result = evaluate(config)
    assert result["accuracy"] == 0.75
    assert result["items"] == 4
    assert result["kl_base"] == pytest.approx(0, abs=1e-6)
    assert set(result["prior"]) == {"c", "q"}
    assert result["prior_accuracy"] == pytest.approx(
        (result["prior"]["c"]["accuracy"] + result["prior"]["q"]["accuracy"]) / 2
    )
    assert "0.750" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: invalid JSON"),
        ('{"query": "x", "choices": ["a"], "gold": 3}', "line 1: not a prior row; want query + choices + gold"),
        ('{"contexts": ["a", "b"], "gold": 0}', "line 1: not a prior row"),
        ('{"context": "a"}', "line 1: not a prior row"),
        ("[1]", "line 1: not a prior row"),
        ("", "no rows"),
    ],
)
def test_bad_prior_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_prior(str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_prior_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or a folder without any"):
        load_prior(str(tmp_path / "none"))


def test_real_prior_files_load() -> None:
    folder = SHARED_DATA / "prior"
    if not folder.is_dir():
        pytest.skip(f"REAL DATA NOT CHECKED: {folder} is missing")
    priors = load_prior(str(folder))
    assert {name: len(rows) for name, rows in priors.items()} == {
        "arc_easy": 200,
        "copa": 100,
        "lambada": 200,
        "piqa": 200,
        "winogrande": 200,
    }


@pytest.mark.parametrize(("facts", "least"), [("knowledge", 20), ("study", 60)])
def test_shipped_facts_have_held_out_phrasings(facts: str, least: int) -> None:
    parts = {
        p: load_demonstrations(packaged(f"{facts}.{p}.jsonl")) for p in ("train", "validation", "test", "indirect")
    }
    completions = {row.completion for row in parts["train"]}
    assert len(completions) >= least
    assert {row.completion for row in parts["test"]} == completions == {row.completion for row in parts["validation"]}
    prompts = [row.prompt[0]["content"].casefold() for rows in parts.values() for row in rows]
    assert len(prompts) == len(set(prompts))
    assert all(row.document for rows in parts.values() for row in rows)
    assert len(parts["indirect"]) >= 15


def test_shipped_general_prompts_and_priors() -> None:
    assert len(general_prompts()) == 24
    validation = load_demonstrations(packaged("prior.validation.jsonl"), completion_required=False)
    test = load_demonstrations(packaged("prior.test.jsonl"), completion_required=False)
    assert not {r.prompt[0]["content"] for r in validation} & {r.prompt[0]["content"] for r in test}
    assert (len(validation), len(test)) == (40, 80)
    assert math.isclose(len({r.prompt[0]["content"] for r in test}), 80)
