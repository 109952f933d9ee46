"""Episodes with tools whose replies a vLLM in this process samples: their tokens, and what runs learn from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENDS, NEEDS_VLLM, VLLM, byte_tokenizer, metrics_of, row_log_probs, write_model
from sampled import seeds
from tokenizers import AddedToken
from tool_templates import HERMES
from transformers import LlamaForCausalLM

from selfdistill.config import EngineSettings, EvalConfig, TrainConfig
from selfdistill.data import encode, load_demonstrations, parse_context
from selfdistill.evaluation import evaluate
from selfdistill.methods import Completion, EpisodeRules, begun, play
from selfdistill.model import LoadedModel, Sampling, engine_for, load_model, use_engine
from selfdistill.training.train import train

pytestmark = NEEDS_VLLM
CALLS = [
    f'<tool_call>\n{{"name": "{name}", "arguments": {{"by": {by}}}}}\n</tool_call>'
    for name, by in (("add", 1), ("add", 2), ("sub", 1))
]
"""Of which the last is of a tool that does not exist."""
LIMITS: dict[str, Any] = {"max_completion_length": 16, "max_episode_length": 900, "max_turns": 4}
COUNTER = "python:tiny_worlds.Counter"


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model that often calls tools: each call is a token, which is more likely than others."""
    folder = tmp_path_factory.mktemp("caller")
    write_model(folder, template=HERMES, ends=ENDS, room=2048, head_dim=32)
    tokenizer = byte_tokenizer(template=HERMES)
    tokenizer.add_tokens([AddedToken(call, normalized=False) for call in CALLS])
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(CALLS)] *= 3
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def counts(write_rows: Callable[..., Path]) -> str:
    """Rows that want 1 to 6, by demonstrated calls."""
    rows = []
    for number in range(1, 7):
        call = {"type": "function", "function": {"name": "add", "arguments": {"by": number}}}
        episode = [
            {"role": "user", "content": f"To {number}. " + chr(96 + number) * 9 * number},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "add", "content": str(number)},
            {"role": "assistant", "content": "Ok."},
        ]
        rows.append({"messages": episode, "answer": number})
    return str(write_rows(rows, name="counts.jsonl"))


@pytest.fixture
def sampled(caller: str) -> LoadedModel:
    """The model, whose engine has started."""
    loaded = load_model(caller)
    use_engine(loaded, EngineSettings(**VLLM))
    engine_for(loaded)
    return loaded


def played(loaded: LoadedModel, data: str, temperature: float, per_row: int) -> list[Completion]:
    """Episodes of the rows."""
    limits: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 16, "window": loaded.window}
    limits |= {"max_episode_length": 900, "replies": "episode"}
    rows = begun(COUNTER, load_demonstrations(data))
    found = encode(rows, parse_context("turns"), loaded.chat(), **limits)[0]
    examples = [example for example in found for _ in range(per_row)]
    sampling, rules = Sampling(16, temperature), EpisodeRules(COUNTER, 4, 900)
    return play(loaded, loaded.chat(), examples, sampling, rules, seeds(len(examples)))


def told(completion: Completion, role: str) -> list[str]:
    return [message["content"] for message in completion.messages if message["role"] == role]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_episodes_are_of_the_tokens_that_it_sampled_and_the_environment_gave(
    sampled: LoadedModel, counts: str, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    from vllm import LLM

    asked: list[list[int]] = []
    own = LLM.enqueue

    def recorded(self: LLM, requests: Any, *rest: Any, **options: Any) -> Any:
        asked.extend(request["prompt_token_ids"] for request in requests)
        return own(self, requests, *rest, **options)

    monkeypatch.setattr(LLM, "enqueue", recorded)
    found = played(sampled, counts, temperature, 1 if temperature == 0 else 4)
    assert max(c.turns for c in found) > 2
    assert 0 < sum(c.truncated for c in found) < len(found)
    assert any(text.isdecimal() for c in found for text in told(c, "tool"))
    assert any("unknown tool 'sub'" in text for c in found for text in told(c, "tool"))
    replies = [c.ids[start:end] for c in found for start, end in c.reply_spans]
    tokenizer = sampled.tokenizer
    assert any(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids for ids in replies)
    # What it read is, token by token, the prompt and what followed.
    going = [[c for c in found if c.turns > turn] for turn in range(4)]
    assert asked == [
        c.example.student_ids + c.ids[: c.reply_spans[turn][0]] for turn, those in enumerate(going) for c in those
    ]
    if temperature == 0:
        ours = played(replace(sampled, engine=None), counts, temperature, 1)
        assert [(c.ids, c.logps, c.given, c.messages, c.verdict, c.truncated) for c in found] == [
            (c.ids, c.logps, c.given, c.messages, c.verdict, c.truncated) for c in ours
        ]
        return
    assert played(sampled, counts, temperature, 4) == found
    for c in found:
        with torch.no_grad():
            logp_TV = row_log_probs(sampled.model, c.example.student_ids, c.ids)
        own_logps = [float(logp_TV[t, token]) for t, token in enumerate(c.ids)]
        for start, end in c.reply_spans:
            assert c.logps is not None
            assert c.logps[start:end] == pytest.approx(own_logps[start:end], abs=1e-3)


@pytest.mark.parametrize("method", ["sdft", "grpo"])
@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_a_run_learns_from_episodes_of_its_student(
    settings: Callable[..., TrainConfig], caller: str, counts: str, method: str, lora_rank: int
) -> None:
    own: dict[str, Any] = {"model": caller, "data": counts, "environment": COUNTER, "method": method}
    own |= {"num_generations": 4} if method == "grpo" else {}
    config = settings(**own, **LIMITS, **VLLM, learning_rate=1e-2, max_steps=3, lora_rank=lora_rank)
    train(config)
    lines = metrics_of(config)
    assert len(lines) == 3
    for line in lines:
        assert 0 < line["engine/gap"] <= line["engine/gap_max"] < 1e-3  # also after the steps
        assert line["importance"] == pytest.approx(1, abs=1e-3)
        assert line["loss"] != 0
        assert "skipped" not in line
        assert 1 <= line["episode/turns"] <= 4
        assert 0 <= line["episode/reward"] < 1
    assert max(line["episode/turns"] for line in lines) > 1
    assert max(line["episode/reward"] for line in lines) > 0


def test_eval_plays_the_same_episodes_with_it(caller: str, counts: str) -> None:
    values: dict[str, Any] = {"model": caller, "data": counts, "environment": COUNTER, **LIMITS}
    found, ours = evaluate(EvalConfig(**values, **VLLM)), evaluate(EvalConfig(**values))
    names = ("correct", "episode/reward", "episode/turns", "episode/invalid_calls", "completion/length")
    assert {name: found[name] for name in names} == {name: ours[name] for name in names}
    assert 1 < found["episode/turns"] < 4
