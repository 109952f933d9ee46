"""Rows with tool calls, as text and as episodes: loading, SFT, SDFT and evaluation of a tiny model.

Each row is one turn: a prompt that describes the tools, and a reply of ``Action:`` and ``Action Input:`` lines. The
real ones (ToolAlpaca) are in a folder beside the repository; without it the made-up ones alone are tested.

Dimensions in names: T completion tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, row_log_probs
from formulas import assert_gradient, chosen, kl

from selfdistill.config.commands import EvalConfig
from selfdistill.config.train import TrainConfig
from selfdistill.data import encode, load_demonstrations, parse_context
from selfdistill.evaluation import evaluate
from selfdistill.methods.sequences import Completion
from selfdistill.model import LoadedModel, Rollout
from selfdistill.training.trainer import Trainer

SHARED = Path(__file__).parents[3] / "shared" / "data" / "skills" / "tooluse.train.jsonl"
REAL = pytest.mark.skipif(not SHARED.exists(), reason="the real rows are missing: ../shared/data/skills")


def made_up(*calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A row of the real ones' form whose reply has these calls."""
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    return {
        "prompt": [{"role": "user", "content": f'Use the tools.\nParameters: {{"c": "city"}}\nTell {len(calls)}.'}],
        "completion": "\n".join(f"Action: {name}\nAction Input: {arguments}" for name, arguments in written),
        "answer": json.dumps(written),
        "api": "Sky",
    }


@pytest.fixture(params=["made up", pytest.param("real", marks=REAL)])
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """A row with one call, and one with several; of the real ones the shortest."""
    if request.param == "made up":
        oslo, rome = ({"c": city, "day": {"in": 1.5, "of": ["a", 'b"']}} for city in ("Oslo", "Roma é"))
        return [made_up(("getSky", {})), made_up(("getSky", oslo), ("getRain", rome))]
    lines = SHARED.read_text(encoding="utf-8").splitlines()
    found = sorted(map(json.loads, lines), key=lambda row: len(row["prompt"][0]["content"]))
    counts = [len(json.loads(row["answer"])) for row in found]
    return [found[counts.index(1)], next(row for row, count in zip(found, counts, strict=True) if count > 1)]


def as_episode(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its reply as structured calls."""
    calls = [{"name": name, "arguments": arguments} for name, arguments in json.loads(row["answer"])]
    return {**row, "completion": [{"role": "assistant", "tool_calls": calls}]}


@pytest.fixture
def episodes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(map(as_episode, rows))


@pytest.fixture
def run_on(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], model_folder: Callable[..., Path]
) -> Callable[..., TrainConfig]:
    """Settings of two steps on rows, one row each."""

    def make(rows: list[dict[str, Any]], method: str) -> TrainConfig:
        longest = 4 if method == "sdft" else 400
        return settings(
            model=str(model_folder(template=CHATML, room=8192)),
            data=str(write_rows(rows, name="tools.jsonl")),
            method=method,
            context="turns:repeats=1",
            max_completion_length=longest,
            max_steps=2,
            batch_size=1,
        )

    return make


def test_calls_as_messages_are_the_tokens_of_the_text(
    rows: list[dict[str, Any]],
    episodes: list[dict[str, Any]],
    write_rows: Callable[..., Path],
    load: Callable[..., LoadedModel],
) -> None:
    chat, made = load(template=CHATML, room=8192).chat(), []
    for name, some in (("text", rows), ("episodes", episodes)):
        loaded = load_demonstrations(str(write_rows(some, name=f"{name}.jsonl")))
        limits: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 400, "window": 8192}
        made.append(encode(loaded, parse_context("turns"), chat, replies="episode", **limits)[0])
    for row, of_text, of_episode in zip(rows, *made, strict=True):
        assert chat.decode(of_text.completion_ids) == row["completion"]
        assert of_text.completion_ids == of_episode.completion_ids
        assert (of_text.student_ids, of_text.teacher_ids) == (of_episode.student_ids, of_episode.teacher_ids)
        assert all(of_episode.is_own)


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_only_the_assistants_tokens_are_learnt(
    run_on: Callable[..., TrainConfig], episodes: list[dict[str, Any]], method: str
) -> None:
    run = Trainer(run_on(episodes[:1], method))
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples, 0)
    teacher = run.loaded.model

    def value(student: Any, completion: Completion) -> torch.Tensor:
        example, ids = completion.example, completion.ids
        log_p_TV = row_log_probs(student, example.student_ids, ids)
        if method == "sft":
            assert ids == example.completion_ids
            return -chosen(log_p_TV, ids)
        with torch.no_grad():
            log_q_TV = row_log_probs(teacher, example.teacher_ids or [], ids)
        return kl(log_q_TV, log_p_TV)

    assert [all(completion.is_own) for completion in completions] == [True]
    assert_gradient(run, completions, value)


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_two_steps_learn_the_rows(
    run_on: Callable[..., TrainConfig], episodes: list[dict[str, Any]], method: str
) -> None:
    run = Trainer(run_on(episodes, method))
    found = [run.step(step) for step in range(2)]
    assert all(metrics["loss"] > 0 for metrics in found)
    lengths = [metrics["completion/length"] for metrics in found]
    expected = [len(example.completion_ids) for example in run.stage.task.examples]
    assert sorted(lengths) == sorted(expected) if method == "sft" else lengths == [4, 4]


class Replies:
    """An engine that says what a row demonstrates, except in the last row."""

    def __init__(self, loaded: LoadedModel, rows: list[dict[str, Any]]) -> None:
        texts = [*[row["completion"] for row in rows[:-1]], rows[-1]["completion"].partition("\n")[0]]
        self._replies = {row["prompt"][0]["content"]: text for row, text in zip(rows, texts, strict=True)}
        self._chat = loaded.chat()

    def sample(self, loaded: LoadedModel, prompts: list[list[int]], *_: Any) -> list[Rollout]:
        texts = [self._chat.tokenizer.decode(prompt) for prompt in prompts]
        said = [next(reply for asked, reply in self._replies.items() if asked in text) for text in texts]
        return [Rollout(self._chat.encode_completion(text), [], truncated=False) for text in said]


@pytest.mark.parametrize("form", ["as text", "as episodes"])
def test_evaluation_scores_the_calls(
    rows: list[dict[str, Any]],
    run_on: Callable[..., TrainConfig],
    load: Callable[..., LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    run = run_on(rows if form == "as text" else list(map(as_episode, rows)), "sft")
    engine = Replies(load(template=CHATML, room=8192), rows)
    monkeypatch.setattr("selfdistill.model.sampling.engine_for", lambda _: engine)
    result = evaluate(
        EvalConfig(model=run.model, data=run.data, scorer="tool_call", engine="vllm", max_completion_length=400)
    )
    assert result["correct"] == [True, False]
    assert result["scorers"] == ["tool_call"]
