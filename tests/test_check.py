"""The check before training: what it measures, how it ranks, what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from selfdistill import check as module
from selfdistill.check import UNLIKELY, Layout, best_context, check
from selfdistill.config import CheckConfig, TrainConfig
from selfdistill.contexts import ChatFormat, parse_context
from selfdistill.demonstrations import load_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluate import answer
from selfdistill.models import LoadedModel


def layout(accuracy: float, logp: float = -1.0, kl: float = 1.0) -> Layout:
    return Layout("turns:repeats=2", accuracy, logp, kl, [kl], 5.0, 0.0, 50.0)


def config_of(folder: Path, data: Path, **settings: object) -> CheckConfig:
    values = {"max_completion_length": 6, "sample": 4, "batch_size": 2} | settings
    return CheckConfig(model=str(folder), data=str(data), **values)


def test_measures_equal_recomputation_row_by_row(
    model_folder: Callable[..., Path], load: Callable[..., LoadedModel], write_rows: Callable[..., Path]
) -> None:
    data = write_rows(count=4)
    result = check(config_of(model_folder(), data, contexts=["turns:repeats=1", "example:reasoning=false"]))
    loaded = load()
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
    rows = load_demonstrations(str(data))
    assert result.items == 4
    for found in result.layouts:
        context, total, count = parse_context(found.context), 0.0, 0
        for row in rows:
            prompt, completion = chat.encode_prompt(context.messages(row, rows)), chat.encode_completion(row.completion)
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
            for j, token in enumerate(completion):
                total, count = total + float(logits[len(prompt) + j - 1, token]), count + 1
        assert found.logp == pytest.approx(total / count, rel=1e-5)
        assert found.kl > 0
        assert found.kl_by_position[0] > 0
    assert result.seconds_per_step > 0
    assert result.memory_gib > 0


def test_a_layout_whose_teacher_answers_right_comes_first_and_is_worth_trying(
    model_folder: Callable[..., Path],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The "demonstrated" answer of each row is what this model says under turns:repeats=2 to that very context.
    loaded = load()
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
    rows = load_demonstrations(str(write_rows(count=4)))
    context = parse_context("turns:repeats=2")
    prompts = [chat.encode_prompt(context.messages(row, rows)) for row in rows]
    replies = answer(loaded, prompts, rows, chat, max_completion_length=6, batch_size=4).replies
    data = write_rows(
        [
            {"prompt": row.prompt[0]["content"], "completion": row.completion, "answer": reply}
            for row, reply in zip(rows, replies, strict=True)
        ],
        name="right.jsonl",
    )
    result = check(config_of(model_folder(), data))
    assert result.best.context == "turns:repeats=2"
    assert result.best.accuracy == 1.0
    assert result.exit_code == 0
    assert result.verdict.startswith("Worth trying: the teacher with turns:repeats=2 is right on 100%")
    assert "few_shot:k=3,pick=seed,this=false,seed=0" in [found.context for found in result.layouts]
    as_json = json.loads(json.dumps(result.to_dict()))
    assert (as_json["best"], as_json["ceiling"]) == ("turns:repeats=2", 1.0)
    assert "Best: --context turns:repeats=2" in capsys.readouterr().out
    train = TrainConfig(model=str(model_folder()), data=str(data), output_dir="unused", max_completion_length=6)
    assert best_context(train) == "turns:repeats=2"


def test_hopeless_data_is_called_unlikely(model_folder: Callable[..., Path], write_rows: Callable[..., Path]) -> None:
    result = check(config_of(model_folder(), write_rows(count=4)))
    assert result.exit_code == UNLIKELY
    assert result.verdict.startswith("Self-distillation is unlikely to help: ")


def test_layouts_that_do_not_fit_are_named_and_left_out(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    data = write_rows(count=3)
    result = check(config_of(model_folder(), data, contexts=["turns:repeats=1", "few_shot:k=3", "document"]))
    assert [found.context for found in result.layouts] == ["turns:repeats=1"]
    assert result.skipped["few_shot:k=3,pick=seed,this=false,seed=0"].startswith(
        "context 'few_shot' needs 3 other demonstrations, found 2"
    )
    assert result.skipped["document:repeats=1,show=both"].startswith("context 'document' needs a document")
    with pytest.raises(UserError, match="no context layout could be measured: document:repeats=1"):
        check(config_of(model_folder(), data, contexts=["document"]))


def test_verdicts() -> None:
    text, code = module._verdict(0.0, -3.0, layout(0.9), 20)
    assert (code, text) == (
        0,
        "Worth trying: the teacher with turns:repeats=2 is right on 90%, the student on 0% of 20 rows. Expect at most "
        "about 90% after training.",
    )
    text, code = module._verdict(0.95, -0.1, layout(1.0), 20)
    assert code == UNLIKELY
    assert "it knows this already" in text
    text, code = module._verdict(0.0, -3.0, layout(0.0, logp=-1.0), 20)
    assert code == UNLIKELY
    assert "a scorer that fits the data better may show a difference" in text
    text, code = module._verdict(0.5, -1.0, layout(0.5, logp=-2.0), 20)
    assert code == UNLIKELY
    assert "Try other contexts" in text
    assert "lower temperature" in module._verdict(0.0, -9.0, layout(1.0, kl=5.0), 20)[0]
