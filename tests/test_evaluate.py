"""Evaluation: distances and scores against straightforward recomputation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selfdistill import answers as answers_module
from selfdistill.answers import answer
from selfdistill.config import EvalConfig
from selfdistill.contexts import ChatFormat
from selfdistill.demonstrations import load_demonstrations
from selfdistill.distances import Distance, general_prompts, packaged
from selfdistill.errors import UserError
from selfdistill.evaluate import evaluate
from selfdistill.models import LoadedModel
from selfdistill.scores import Scorer

CHOICES = [
    {"query": "Question: What floats?", "choices": ["wood", "a stone of lead"], "gold": 0},
    {"query": "He opened the door, because", "choices": ["it rang.", "he was asleep in bed."], "gold": 1},
]


def chat_of(loaded: LoadedModel) -> ChatFormat:
    return ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})


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


def test_unusable_answers_are_named_together_before_anything_is_sampled(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load()
    chat = chat_of(loaded)
    data = [{"prompt": "q", "answer": "a(" if i else "a", "scorer": "regex"} for i in range(13)]
    rows = load_demonstrations(str(write_rows(data)), completion_required=False)
    monkeypatch.setattr(answers_module, "sample", lambda *_: pytest.fail("sampled"))
    prompts = [chat.encode_prompt(row.prompt) for row in rows]
    with pytest.raises(UserError) as error:
        answer(loaded, prompts, rows, chat, max_completion_length=5, batch_size=3)
    message = str(error.value)
    assert message.startswith(f"12 rows cannot be scored: {rows[1].source}: scorer 'regex' cannot use answer \"a(\": ")
    assert rows[10].source + ":" in message
    assert rows[11].source + ":" not in message
    assert message.endswith("; ... and 2 more")
    assert "\n" not in message
    with pytest.raises(UserError) as error:
        answer(loaded, prompts[:2], rows[:2], chat, max_completion_length=5, batch_size=3)
    assert str(error.value).startswith(f"{rows[1].source}: scorer 'regex'")


def test_base_is_compared_by_the_width_of_its_logits(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    data, folder = str(write_rows(count=2)), str(model_folder())
    # More tokenizer entries, the same logits.
    merged = str(model_folder(merges=(("a", "b"),)))
    result = evaluate(EvalConfig(model=folder, data=data, base=merged, max_completion_length=5))
    assert 0 <= result["kl_base"] < 0.05  # "ab" is one token in the base's prompts and two in the model's
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = 320
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    for file in Path(folder).glob("*token*"):
        shutil.copy(file, tmp_path / "wide")
    with pytest.raises(UserError, match=r"has a vocabulary of 320 tokens, model .* of 300"):
        evaluate(EvalConfig(model=folder, data=data, base=str(tmp_path / "wide"), max_completion_length=5))


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
    assert (len(validation), len(test)) == (40, 90)
