"""Rows with episodes: SFT learns all replies in one sequence, SDFT each reply; what others said is no target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import final_weights, metrics_of, row_log_probs, same
from formulas import assert_gradient, kl, moved
from tool_templates import HERMES

import selfdistill as sd
from selfdistill.config import TrainConfig
from selfdistill.data import Demonstration, encode, load_demonstrations
from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.contexts import parse_context
from selfdistill.errors import UserError
from selfdistill.methods.sequences import Completion
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer


def rows() -> list[dict[str, Any]]:
    """Three episodes, with one, two and no calls, and a chat of two replies."""

    def call(city: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"name": "sky", "arguments": {"c": city}}]}

    def tool(text: str) -> dict[str, Any]:
        return {"role": "tool", "content": text}

    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    def says(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text}

    return [
        {"messages": [user("sky?"), call("Oslo"), tool("wet"), says("rain")]},
        {"messages": [user("skies?"), call("Rome"), tool("dry"), call("Riga"), tool("wet"), says("sun, rain")]},
        {"prompt": [user("hi")], "completion": [says("hello"), user("sky?"), call("Oslo")]},
    ]


@pytest.fixture
def of_episodes(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], model_folder: Callable[..., Path]
) -> Callable[..., TrainConfig]:
    """Settings of a tiny run on the episodes with a template that writes calls."""
    whole = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:]} if "messages" in row else row
        for row in rows()
    ]
    file = write_rows(whole, name="episodes.jsonl")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        own: dict[str, Any] = {"model": str(model_folder(template=HERMES, room=2048)), "data": str(file)}
        return settings(out, **(own | {"max_completion_length": 80, "batch_size": 3} | values))

    return make


def chat_texts(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompt and replies."""
    turns = row.get("messages") or [*row["prompt"], *row["completion"]]
    return turns[:1], turns[1:]


def rendered(tokenizer: Any, messages: list[dict[str, Any]], *, begins: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def cross_entropy_of(model: Any, tokenizer: Any, row: dict[str, Any]) -> torch.Tensor:
    """Of the assistant's tokens with their end tokens, found in the template's own text of the whole conversation."""
    prompt, replies = chat_texts(row)
    text = tokenizer.apply_chat_template([*prompt, *replies], tokenize=False)
    begin, end = "<|im_start|>assistant\n", "<|im_end|>"
    targets: list[int] = []
    place = 0
    while (found := text.find(begin, place)) >= 0:
        start, place = found + len(begin), text.index(end, found) + len(end)
        places = [len(tokenizer(text[:cut], add_special_tokens=False)["input_ids"]) for cut in (start, place)]
        targets += range(*places)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    logp_LV = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return torch.stack([-logp_LV[at - 1, ids[0, at]] for at in targets])


# --- gradients ---


def test_sft_learns_the_tokens_of_every_reply_and_no_others(of_episodes: Callable[..., TrainConfig]) -> None:
    run = moved(of_episodes(method="sft"))
    examples = run.stage.task.examples
    assert len(examples) == 3
    completions = run.stage.task.method.sequence(run.loaded, examples, 1)
    tokenizer = run.loaded.tokenizer
    for completion, row in zip(completions, rows(), strict=True):
        prompt, replies = chat_texts(row)
        both = [*completion.example.student_ids, *completion.ids]
        assert both == rendered(tokenizer, [*prompt, *replies])[: len(both)]
        given = tokenizer.decode([i for start, end in completion.given for i in completion.ids[start:end]])
        assert all(m["content"] in given for m in replies if m["role"] != "assistant")
        assert not any(m["content"] in given for m in replies if m.get("content") and m["role"] == "assistant")
    assert_gradient(
        run, completions, lambda student, c: cross_entropy_of(student, tokenizer, rows()[c.example.demonstration.row])
    )


@pytest.mark.parametrize("show", ["episode", "turn"])
def test_sdft_learns_each_reply_after_the_conversation_so_far(
    of_episodes: Callable[..., TrainConfig], show: str
) -> None:
    run = moved(of_episodes(method="sdft", teacher="live", context=f"turns:show={show}", batch_size=7))
    examples, tokenizer = run.stage.task.examples, run.loaded.tokenizer
    expected = []
    for row in rows():
        prompt, replies = chat_texts(row)
        for place, message in enumerate(replies):
            if message["role"] == "assistant":
                so_far = [*prompt, *replies[:place]]
                begun = prompt if show == "episode" else so_far
                question = max(number for number, turn in enumerate(begun) if turn["role"] == "user")
                shown = [*prompt, *replies] if show == "episode" else [*so_far, message]
                teacher = [*shown, *so_far[question:]]
                contexts = rendered(tokenizer, so_far, begins=True), rendered(tokenizer, teacher, begins=True)
                expected.append((*contexts, rendered(tokenizer, [*so_far, message])[len(contexts[0]) : -1]))
    assert [(x.student_ids, x.teacher_ids, x.completion_ids) for x in examples] == expected
    assert len({x.demonstration.row for x in examples}) == len(examples) == 7
    completions = run.stage.task.method.sequence(run.loaded, examples, 1)
    assert len({tuple(c.ids) for c in completions}) > 1
    contexts_of = {tuple(student): teacher for student, teacher, _ in expected}

    def values(student: Any, c: Completion) -> torch.Tensor:
        teacher = row_log_probs(student, contexts_of[tuple(c.example.student_ids)], c.ids).detach()
        return kl(teacher, row_log_probs(student, c.example.student_ids, c.ids))

    assert_gradient(run, completions, values)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", {}),
        ("sdft", {"context": "few_shot:k=2,this=true"}),
        ("sdft", {"context": "document:show=answer", "cold_start_steps": 2}),
        ("sft_from_teacher", {"context": "turns"}),
        ("dft", {}),
        ("eaft", {}),
        ("grpo", {"num_generations": 4, "scorer": "contains"}),
    ],
)
def test_methods_train_on_episodes(
    of_episodes: Callable[..., TrainConfig], method: str, options: dict[str, Any]
) -> None:
    config = of_episodes(method=method, max_steps=2, **options)
    train(config)
    assert len(metrics_of(config)) == 2
    assert final_weights(config)


def test_rows_in_memory_are_learnt_as_those_of_a_file(of_episodes: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = of_episodes(method="sft", max_steps=2)
    train(config)
    given = {name: getattr(config, name) for name in ("max_completion_length", "batch_size", "max_steps")}
    given |= {"learning_rate": config.learning_rate, "warmup_steps": 0, "save_steps": 0, "mixed_precision": "no"}
    for turns, row in (("auto", "completion"), ("all", "messages")):
        data: list[dict[str, Any]] = [{"messages": [*prompt, *replies]} for prompt, replies in map(chat_texts, rows())]
        if row == "completion":
            data = [dict(zip(("prompt", "completion"), chat_texts(each), strict=True)) for each in rows()]
        run = sd.train(
            config.model, data, output_dir=str(tmp_path / turns), method="sft", turns=turns, progress=False, **given
        )
        assert same(final_weights(run.config), final_weights(config))


# --- what is refused ---


@pytest.mark.parametrize("context", ["example", "template:file=shown.txt", "rewritten"])
def test_a_context_that_cannot_show_an_episode_says_so(
    of_episodes: Callable[..., TrainConfig], context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shown.txt").write_text("{prompt} {demonstration}", encoding="utf-8")
    config = of_episodes(context=context)
    if context == "rewritten":
        data = [
            row | {"privileged_context": "p"} for row in map(json.loads, Path(config.data).read_text().splitlines())
        ]
        Path(config.data).write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    name = context.partition(":")[0]
    with pytest.raises(UserError) as refused:
        train(config)
    assert f"context '{name}' cannot show an episode; use turns, few_shot or document, or turns last" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)


def test_the_last_reply_alone_can_be_learnt(of_episodes: Callable[..., TrainConfig]) -> None:
    config = of_episodes(method="sdft", context="example", turns="last")
    rows_ = load_demonstrations(config.data, turns=config.turns)
    assert [row.completion.splitlines()[0] for row in rows_] == ["rain", "sun, rain", "Action: sky"]
    assert [bool(row.episode) for row in rows_] == [False, False, True]  # a call is more than a text


def test_limits_are_those_of_one_reply_and_of_the_window(of_episodes: Callable[..., TrainConfig]) -> None:
    run = Trainer(of_episodes(method="sft"))
    data, chat = load_demonstrations(run.config.data), run.chat
    longest = max(len(chat.encode_reply(m)) for row in data for m in row.episode if m["role"] == "assistant")
    fits = {"max_prompt_length": None, "window": None, "completion_must_fit": True, "replies": "episode"}
    assert len(encode(data, None, chat, max_completion_length=longest, **fits)[0]) == 3
    with pytest.raises(UserError, match=f"completion has {longest} tokens, limit {longest - 1}"):
        encode(data, None, chat, max_completion_length=longest - 1, **fits)
    with pytest.raises(UserError, match=r"prompt and episode have 153, 285 tokens, limit 150 \(the context window\)"):
        encode(data, None, chat, max_completion_length=longest, **(fits | {"window": 150}))


def test_an_episode_that_is_learnt_fits_after_the_teachers_prompt(of_episodes: Callable[..., TrainConfig]) -> None:
    run = Trainer(of_episodes(method="sft"))
    data, turns = load_demonstrations(run.config.data)[1:2], parse_context("turns", episodes=True)
    fits: dict[str, Any] = {"max_prompt_length": None, "completion_must_fit": True, "replies": "episode"}
    (example,), _ = encode(data, turns, run.chat, window=None, max_completion_length=1000, **fits)
    replies = [len(run.chat.encode_reply(m)) for m in data[0].episode if m["role"] == "assistant"]
    whole = len(example.teacher_ids or []) + len(example.completion_ids)
    encode(data, turns, run.chat, window=whole, max_completion_length=max(replies), **fits)
    with pytest.raises(UserError, match=rf"prompt and episode have {whole} tokens, limit {whole - 1} \(the context"):
        encode(data, turns, run.chat, window=whole - 1, max_completion_length=max(replies), **fits)


# --- other users of rows ---


def test_eval_and_check_ask_for_the_last_reply_and_say_so(
    of_episodes: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = of_episodes()
    common: dict[str, Any] = {"max_completion_length": 80, "scorer": "contains"}
    note = "3 rows are episodes; only their last reply is evaluated, after the demonstrated ones"
    found = sd.evaluate(config.model, config.data, **common)
    assert found.items == 3
    assert capsys.readouterr().err.count(note) == 1
    result = sd.check(config.model, config.data, contexts=["turns", "example"], sample=3, **common)
    assert capsys.readouterr().err.count(note) == 1
    assert [layout.context for layout in result.layouts] == ["turns:repeats=1"]
    assert "cannot show an episode" in result.skipped["example:reasoning=true"]


TOOLUSE = Path(__file__).parents[3] / "shared" / "data" / "skills" / "tooluse.train.jsonl"


@pytest.mark.skipif(not TOOLUSE.exists(), reason="NOT TESTED: the tool use rows are not here")
def test_replies_of_real_rows_are_read_as_calls(make_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat(make_tokenizer(), [257], {})
    for row in load_demonstrations(str(TOOLUSE))[:200]:
        message = chat.message_of(chat.encode_completion(row.completion))
        assert "invalid" not in message
        assert [c["function"]["name"] for c in message.get("tool_calls", ())] == [name for name, _ in calls(row)]


def calls(row: Demonstration) -> list[Any]:
    return json.loads(row.answer) if isinstance(row.answer, str) else row.answer


@pytest.mark.parametrize(
    ("values", "way"),
    [
        ({"hint": "0.5"}, "use hint 1"),
        ({"hint": "0:1"}, "use hint 1"),
        ({"method": "atesd"}, "use a method other than atesd"),
    ],
    ids=str,
)
def test_rows_with_calls_are_refused_where_the_teacher_sees_parts(
    of_episodes: Callable[..., TrainConfig], values: dict[str, Any], way: str
) -> None:
    with pytest.raises(UserError, match="3 of 3 rows cannot be used: ") as error:
        Trainer(of_episodes(context="turns", **values))
    assert str(error.value).endswith(f": the teacher cannot see a part of an episode; {way}")


def test_replies_of_text_are_shown_in_part(
    of_episodes: Callable[..., TrainConfig], write_rows: Callable[..., Path]
) -> None:
    says = [{"role": role, "content": text} for role, text in (("assistant", "a b"), ("user", "so?"))]
    data = write_rows([{"prompt": "q", "completion": [*says, {"role": "assistant", "content": "c d"}]}], name="t.jsonl")
    run = Trainer(of_episodes(context="turns", hint="0.5", data=str(data)))
    first, second = (run.chat.tokenizer.decode(x.teacher_ids) for x in run.stage.task.examples)
    assert "a<|im_end|>" in first
    assert "c<|im_end|>" in second


def test_a_check_measures_no_hints_of_calls(
    of_episodes: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run = of_episodes()
    own: dict[str, Any] = {"contexts": ["turns"], "hints": True, "max_completion_length": 8, "mixed_precision": "no"}
    assert sd.check(run.model, run.data, **own).hints is None
    assert "hints are not measured, because a part of an episode cannot be shown" in capsys.readouterr().err
