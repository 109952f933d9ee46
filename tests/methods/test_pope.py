"""POPE: the prefixes that are found, what is sampled after them, and the loss against plain float64 code.

Dimensions in names: T completion tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Cut,
    add_gradient,
    assert_same_run,
    crash_at,
    final_weights,
    gradients,
    largest_difference,
    metrics_of,
    same,
)
from formulas import mean_over_rows, moved, prefix_of, trained_in_one_and_two

from selfdistill.config.train import TrainConfig
from selfdistill.data import Verdict
from selfdistill.errors import UserError
from selfdistill.model.sampling import Rollout
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]


@pytest.fixture
def guided(settings: Settings, write_rows: Callable[..., Path]) -> Settings:
    """Replies are right if they begin as the demonstration: with its first 3, 3, 7 or none of its letters."""
    beginnings = ["abc", "xyz", "qrstuvw", ""]
    rows = [
        {"prompt": f"q{i}", "completion": f"{text}-------------"[:12], "scorer": "regex", "answer": f"^{text}"}
        for i, text in enumerate(beginnings)
    ]
    data = write_rows(rows, name="guided.jsonl")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        own = {"longest": 0.5, "lengths": 6, "tries": 2} | values.pop("method_settings", {})
        fixed: dict[str, Any] = {"method": "pope", "data": str(data), "num_generations": 3, "max_completion_length": 16}
        return settings(out, **(fixed | values), method_settings=own)

    return make


def test_the_shortest_prefix_after_which_a_sample_is_right(guided: Settings) -> None:
    run = Trainer(guided())
    found = [run.chat.decode(x.completion_ids) for x in run.stage.task.examples]
    assert found == ["abc", "xyz", "qrstuv", ""]  # seven letters exceed the longest, which is taken


def test_half_of_the_samples_go_on_from_the_prefix(guided: Settings) -> None:
    run = Trainer(guided())
    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:2], 1)
    assert [prefix_of(c) for c in samples] == [0, 0, 0, 3, 3, 3] * 2
    assert [c.helped for c in samples] == [bool(prefix_of(c)) for c in samples]
    for c in samples:
        assert c.ids[: prefix_of(c)] == c.example.completion_ids[: prefix_of(c)]
        assert prefix_of(c) < len(c.ids) <= 16
        assert c.logps is not None
        assert len(c.logps) == len(c.ids)
    assert len({tuple(c.ids) for c in samples}) > 6


IN_PROMPT: dict[str, Any] = {"method_settings": {"where": "prompt"}}


def test_with_where_prompt_half_of_the_prompts_show_the_prefix(guided: Settings) -> None:
    run = Trainer(guided(num_generations=8, **IN_PROMPT))
    shown = [
        replace(x, completion_ids=run.loaded.tokenizer(text)["input_ids"])
        for x, text in zip(run.stage.task.examples, ("ab", ""), strict=False)
    ]
    samples = run.stage.task.method.sequence(run.loaded, shown, 1)
    guide = "q0\n\nLet this guide your answer:\n\nab\n\nNow answer the question."
    prompts = ["q0"] * 8 + [guide] * 8 + ["q1"] * 16
    assert [c.example.student_ids for c in samples] == [
        run.chat.encode_prompt([{"role": "user", "content": text}]) for text in prompts
    ]
    assert not any(c.given for c in samples)
    assert [c.helped for c in samples] == [False] * 8 + [True] * 8 + [False] * 16
    assert max(len(c.ids) for c in samples[8:16]) > 8  # after a prefix in the reply, it would be the limit
    half = replace(shown[0], completion_ids=run.loaded.tokenizer("é")["input_ids"][:1])  # half of a character
    samples = run.stage.task.method.sequence(run.loaded, [half], 1)
    assert {tuple(c.example.student_ids) for c in samples} == {tuple(shown[0].student_ids)}


def test_the_shortest_prefix_with_which_a_sample_is_right(guided: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is right if its prompt shows enough; the third row would need more than the longest prefix."""
    enough = {"q0": ("ab", "abc"), "q1": ("xyz", "xyz"), "q2": ("qrstuvw", "qrstuvw"), "q3": ("", "")}

    def sampled(loaded: Any, prompts: Any, *_: Any) -> list[Rollout]:
        replies = []
        for text in (loaded.tokenizer.decode(ids) for ids in prompts):
            part, reply = next(enough[q] for q in enough if q in text)
            ids = loaded.tokenizer(reply)["input_ids"] if f"\n\n{part}" in text else []
            replies.append(Rollout([*ids, 257], [0.0], False))
        return replies

    monkeypatch.setattr("selfdistill.methods.prefixes.sample", sampled)
    run = Trainer(guided(**IN_PROMPT))
    found = [run.chat.decode(x.completion_ids) for x in run.stage.task.examples]
    assert found == ["ab", "xyz", "qrstuv", ""]


@pytest.mark.parametrize("where", ["reply", "prompt"])
def test_without_prefixes_pope_is_grpo_on_two_groups(
    guided: Settings, write_rows: Callable[..., Path], where: str
) -> None:
    """A batch with a row twice has two groups of samples for it."""
    data = str(write_rows([{"prompt": "q", "completion": "a", "scorer": "regex", "answer": "[a-h]"}], name="one.jsonl"))
    fixed: dict[str, Any] = {"data": data, "max_steps": 3, "learning_rate": 1e-2}
    pope = guided("pope", batch_size=1, method_settings={"where": where}, **fixed)
    grpo = guided("grpo", batch_size=2, **fixed).model_copy(update={"method": "grpo", "method_settings": {}})
    for config in (pope, grpo):
        train(config)
    assert any(line["grad_norm"] > 0 for line in metrics_of(pope))
    assert same(final_weights(pope), final_weights(grpo))


def test_a_prompt_that_does_not_fit_with_its_prefix_is_named(guided: Settings) -> None:
    with pytest.raises(
        UserError,
        match=r"guided\.jsonl:\d: the context has \d+ tokens, limit 40, with a prefix of the demonstration; lower "
        r"'longest', or use where: reply$",
    ):
        Trainer(guided(max_prompt_length=40, **IN_PROMPT))


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize(
    "values", [{}, {"gradient_accumulation_steps": 2}, IN_PROMPT], ids=["one", "two", "in the prompt"]
)
def test_pope_is_grpo_on_each_group_without_the_prefix(
    guided: Settings, values: dict[str, Any], normalisation: Any
) -> None:
    run = moved(guided(batch_size=2, learning_rate=1e-2, loss_normalisation=normalisation, **values))
    task = run.stage.task
    samples = task.method.sequence(run.loaded, task.examples[:2], 3)
    rewards = [float(len(run.chat.decode(c.ids)) >= 9) for c in samples]
    rewards[:6] = [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    reward_of = {id(c): reward for c, reward in zip(samples, rewards, strict=True)}  # two samples may be equal
    method = replace(task.method, checker=lambda made, _: [Verdict(reward_of[id(c)]) for c in made])
    student = copy.deepcopy(run.loaded.model).double()
    losses: list[Any] = []
    for number, c in enumerate(samples):
        group = rewards[number // 3 * 3 : number // 3 * 3 + 3]
        advantage = (rewards[number] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        logits_LV = student(input_ids=torch.tensor([c.example.student_ids + c.ids])).logits[0]
        log_p_TV = logits_LV[len(c.example.student_ids) - 1 : -1].log_softmax(-1)
        targets = range(prefix_of(c), len(c.ids))
        losses.append(-advantage * torch.stack([log_p_TV[t, c.ids[t]] for t in targets]))
    loss = torch.cat(losses).mean() if normalisation == "token" else mean_over_rows(losses)
    loss.backward()
    run.optimizer.zero_grad()
    result = add_gradient(run, samples, method)
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    expected = gradients(student)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    assert largest_difference(gradients(run.loaded.model), expected) < 1e-5


def test_a_prefix_leaves_tokens_for_a_sample(guided: Settings) -> None:
    message = (
        "setting 'method_settings', setting 'longest': found 1, which leaves no tokens for a sample after a prefix"
    )
    with pytest.raises(UserError, match=f"^{message}; give less, or use where: prompt$"):
        Trainer(guided(method_settings={"longest": 1}))
    Trainer(guided(method_settings={"longest": 1, "where": "prompt"}))


def test_samples_of_the_prompt_alone_may_be_as_long_as_a_reply(guided: Settings) -> None:
    run = Trainer(guided(num_generations=8))
    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples, 1)
    alone, after = (max(sum(c.is_own) for c in samples if bool(c.given) == prefixed) for prefixed in (False, True))
    assert (alone, after) == (16, 8)
    assert {len(c.ids) == 16 or not c.truncated for c in samples if not c.given} == {True}


def test_metrics_count_what_is_sampled(guided: Settings) -> None:
    run = Trainer(guided(max_completion_length=16))
    line = run.step(0)
    assert line["tokens"] == pytest.approx(12 * line["completion/length"])
    assert line["completion/length"] <= 12


@pytest.mark.parametrize("where", ["reply", "prompt"])
def test_a_killed_run_reads_its_prefixes(guided: Settings, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    own: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "method_settings": {"where": where}}
    whole, cut = (guided(name, **own) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))

    def refuse(*_: Any) -> None:
        raise AssertionError("looked for again")

    monkeypatch.setattr("selfdistill.methods.prefixes.ShortestPrefixes.draw", refuse)
    train(cut, resume=True)
    assert_same_run(whole, cut)
    lines = (Path(cut.output_dir) / "teacher_samples.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["text"] for line in lines]
    assert found == (["abc", "xyz", "qrstuv", ""] if where == "reply" else ["abc---", "xyz---", "qrstuv", ""])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["reply", "prompt"])
def test_two_processes_train_to_the_weights_of_one(guided: Settings, tmp_path: Path, where: str) -> None:
    values: dict[str, Any] = {"max_steps": 3, "batch_size": 3, "method_settings": {"where": where}}
    trained_in_one_and_two(guided, tmp_path, values)


def test_a_row_needs_a_demonstration_to_take_prefixes_from(guided: Settings, write_rows: Callable[..., Path]) -> None:
    data = write_rows([{"prompt": "q", "answer": "a"}], name="bare.jsonl")
    with pytest.raises(UserError, match="column 'completion': missing, which method 'pope' learns from"):
        train(guided(data=str(data)))
