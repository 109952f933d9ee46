"""Evaluation: distances and scores against straightforward recomputation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from math import comb
from pathlib import Path

import pytest
import torch
from conftest import CHATML, ENDS
from tool_templates import HERMES
from transformers import LlamaConfig, LlamaForCausalLM

from selfdistill.config.commands import EvalConfig
from selfdistill.data.bundled import drift_prompts
from selfdistill.data.chat_format import ChatFormat, split_thinking
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.episodes import encode_replies
from selfdistill.data.sources import packaged
from selfdistill.errors import UserError
from selfdistill.evaluation import answers as answers_module
from selfdistill.evaluation.answers import answer, check_answers
from selfdistill.evaluation.distances import Distance
from selfdistill.evaluation.eval_result import EvalResult, detected
from selfdistill.evaluation.evaluate import evaluate
from selfdistill.model.forward import ForwardPass
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Rollout, Sampling, sample, sample_seed

CHOICES = [
    {"query": "Question: What floats?", "choices": ["wood", "a stone of lead"], "gold": 0},
    {"query": "He opened the door, because", "choices": ["it rang.", "he was asleep in bed."], "gold": 1},
]


def chat_of(loaded: LoadedModel) -> ChatFormat:
    return ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})


@torch.no_grad()
def test_distance_is_kl_from_base_along_the_bases_answers(load: Callable[..., LoadedModel]) -> None:
    base, other = load(seed=0), load(seed=1)
    chat, rows = chat_of(base), drift_prompts()[:11]
    distance = Distance(base, ForwardPass(base), chat, rows, 6)
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
    loaded = load(ends=ENDS)
    chat = chat_of(loaded)
    rows = load_demonstrations(str(write_rows(count=7)))
    prompts = [chat.encode_prompt(row.prompt) for row in rows]
    together = answer(loaded, prompts, rows, chat, Sampling(5, temperature=0), batch_size=3)
    for prompt, row, reply, length in zip(prompts, rows, together.replies, together.lengths, strict=True):
        alone = answer(loaded, [prompt], [row], chat, Sampling(5, temperature=0), batch_size=1)
        assert (alone.replies, alone.lengths) == ([reply], [length])
    cut = [greedy_is_cut(loaded, prompt, 5) for prompt in prompts]
    assert 0 < sum(cut) < 7
    assert together.truncated == sum(cut)


def greedy_is_cut(loaded: LoadedModel, prompt: list[int], most: int) -> bool:
    """Whether greedy decoding, one plain forward pass a token, says no end token within ``most``."""
    ids = list(prompt)
    for _ in range(most):
        ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in loaded.end_token_ids:
            return False
    return True


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
        loaded, [chat.encode_prompt(r.prompt) for r in rows], rows, chat, Sampling(5, temperature=0), batch_size=4
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
    assert "0.750" in repr(EvalResult(folder, str(data), result))
    for items, few in ((1, "1 item is too few"), (4, "4 items are too few")):
        assert few in " ".join(repr(EvalResult(folder, str(data), result | {"items": items})).split())
    alone = repr(EvalResult(folder, str(data), result | {"base": None, "paired": {}, "distance": {}}))
    assert "items are too few" not in " ".join(alone.split())
    assert alone.count("truncated replies") == 2  # of the task, and of the prior
    for side in (result, result["base"]):
        assert side["prior"]["q"].pop("truncated") == 1
    assert repr(EvalResult(folder, str(data), result)).count("truncated replies") == 1  # older results do not count


def test_the_bases_own_result_is_of_what_the_base_was_asked() -> None:
    scores = {"accuracy": 0.5, "accuracy_interval": [0.1, 0.9], "items": 4, "completion/thinking": 0}
    scores |= {f"completion/{key}": 1.0 for key in ("length", "said", "truncated")}
    settings = {"model": "tuned", "base": "small", "context": "document:show=document", "seed": 0}
    details = {**scores, "settings": settings, "scorers": ["exact"], "dropped": 3, "base": {**scores, "dropped": 1}}
    base = EvalResult("tuned", "test.jsonl", details).base
    assert base is not None
    assert base.details["settings"] == {"model": "small", "base": None, "context": None, "seed": 0}
    assert base.details["dropped"] == 3
    said = " ".join(repr(base).split())
    assert "small on test.jsonl" in said
    assert "context" not in said


@pytest.mark.parametrize(
    ("items", "unlike", "said"),
    [
        (1000, 0.1, "1000 items detect a difference in accuracy of 0.03 about 3 times in 4, if only one"),
        (1000, 0.003, "of 0.06 about 3 times in 4, if only one of the two models is right on 50% of them."),
        (90, 4 / 90, "of 0.21 about 3 times in 4, if only one of the two models is right on 50% of them."),
        (90, 0.0, "of 0.21 about"),
        (10, 0.1, "10 items are too few to detect even a difference in accuracy of 0.50."),
        (5, 1.0, "5 items are too few"),
    ],
)
def test_the_smallest_difference_is_said(items: int, unlike: float, said: str) -> None:
    assert said in detected(items, unlike)


def test_unusable_answers_are_named_together(write_rows: Callable[..., Path]) -> None:
    data = [{"prompt": "q", "answer": "a(" if i else "a", "scorer": "regex"} for i in range(13)]
    rows = load_demonstrations(str(write_rows(data)))
    with pytest.raises(UserError) as error:
        check_answers(rows, None)
    message = str(error.value)
    named = f"{rows[1].source}, 3, 4 and 9 more"
    assert message.startswith(f"12 rows cannot be scored: {named}: scorer 'regex' cannot use answer \"a(\": ")
    assert "\n" not in message
    with pytest.raises(UserError) as error:
        check_answers(rows[:2], None)
    assert str(error.value).startswith(f"{rows[1].source}: scorer 'regex'")


def test_unusable_and_missing_answers_are_refused_before_anything_is_sampled(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(answers_module, "sample", lambda *_: pytest.fail("sampled"))
    bad = write_rows([{"prompt": "q", "answer": "a("}])
    with pytest.raises(UserError, match="scorer 'regex' cannot use answer"):
        evaluate(EvalConfig(model=str(model_folder()), data=str(bad), scorer="regex"))
    lacking = write_rows([{"prompt": "q", "completion": "a"}])
    for scorer, what in (("regex", "a pattern"), ("code", "tests")):
        with pytest.raises(UserError, match=f"scorer '{scorer}' needs {what}; add the column 'answer'$"):
            evaluate(EvalConfig(model=str(tmp_path / "not read"), data=str(lacking), scorer=scorer))


def test_each_model_checks_the_tests_of_rows_once(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    by_tests = answers_module.by_tests
    monkeypatch.setattr(answers_module, "by_tests", lambda given: checked.append(len(given)) or by_tests(given))
    model, data = str(model_folder()), str(write_rows([{"prompt": "q", "answer": "f() == 1"}] * 2))
    evaluate(EvalConfig(model=model, base=model, data=data, scorer="code", num_samples=2, max_completion_length=3))
    assert [count for count in checked if count] == [2, 2]


def test_base_is_compared_by_the_width_of_its_logits(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    data, folder = str(write_rows(count=2)), str(model_folder())
    # More tokenizer entries, the same logits.
    merged = str(model_folder(merges=(("a", "b"),)))
    result = evaluate(EvalConfig(model=folder, data=data, base=merged, max_completion_length=5))
    assert 0 < result["kl_base"] < 0.05  # "ab" is one token in the base's prompts and two in the model's
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
    assert len(drift_prompts()) == 24
    validation = load_demonstrations(packaged("prior/validation/facts.jsonl"))
    test = load_demonstrations(packaged("prior/test/facts.jsonl"))
    assert not {r.prompt[0]["content"] for r in validation} & {r.prompt[0]["content"] for r in test}
    assert (len(validation), len(test)) == (40, 90)


def test_model_and_base_are_compared_on_the_same_items(
    model_folder: Callable[..., Path], load: Callable[..., LoadedModel], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    ends = (257, *range(40, 75))
    model, base = load(seed=0, ends=ends), load(seed=1, ends=ends)
    chat = chat_of(model)
    questions = load_demonstrations(str(write_rows(count=6)))
    prompts = [chat.encode_prompt(row.prompt) for row in questions]
    replies = {
        who.name: answer(who, prompts, questions, chat, Sampling(6, temperature=0), batch_size=3).replies
        for who in (model, base)
    }
    mine, theirs = replies[model.name], replies[base.name]
    answers = [mine[0], mine[1], mine[2], theirs[3], "never this", mine[5]]
    data = write_rows(
        [{"prompt": row.prompt[0]["content"], "answer": a} for row, a in zip(questions, answers, strict=True)],
        name="test.jsonl",
    )
    prior = tmp_path / "prior"
    prior.mkdir()
    asked = [{"prompt": row.prompt[0]["content"], "answer": a} for row, a in zip(questions, theirs, strict=True)]
    for name, some in (("c", CHOICES), ("q", asked)):
        (prior / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
    kept = tmp_path / "replies.jsonl"
    result = evaluate(
        EvalConfig(
            model=model.name,
            base=base.name,
            data=str(data),
            prior=str(prior),
            max_completion_length=6,
            num_samples=3,
            temperature=0.2,
            replies=str(kept),
        )
    )
    expected = [[reply == a for reply, a in zip(side, answers, strict=True)] for side in (mine, theirs)]
    assert [result["correct"], result["base"]["correct"]] == expected
    assert result["paired"]["accuracy"]["difference"] == pytest.approx(result["accuracy"] - result["base"]["accuracy"])
    assert result["paired"]["accuracy"]["difference"] > 0  # the model less the base, not the other way round
    difference = result["prior"]["c"]["accuracy"] - result["base"]["prior"]["c"]["accuracy"]
    assert result["paired"]["prior"]["c"]["difference"] == pytest.approx(difference)
    whole = result["paired"]["prior_accuracy"]
    assert whole["difference"] == pytest.approx(result["prior_accuracy"] - result["base"]["prior_accuracy"])
    assert whole["low"] < whole["difference"] < min(whole["high"], 0)  # the base gave the second file's answers
    for k, of_model in result["pass@k"].items():
        difference = of_model["value"] - result["base"]["pass@k"][k]["value"]
        assert result["paired"][f"pass@{k}"]["difference"] == pytest.approx(difference)
        assert difference > 0
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [line["reply"] for line in lines] == mine
    assert [line["correct"] for line in lines] == result["correct"]
    for side, loaded in ((result, model), (result["base"], base)):
        right = [0] * 6
        for number, (row, prompt) in enumerate(zip(questions, prompts, strict=True)):
            seeds = [sample_seed(0, 0, row.row, g) for g in range(3)]
            drawn = sample(loaded, [prompt] * 3, Sampling(6, 0.2), seeds)
            right[number] = sum(chat.decode(r.ids) == answers[number] for r in drawn)
        assert set(side["pass@k"]) == {"1", "2", "3"}
        for k in (1, 2, 3):
            values = [1 - comb(3 - c, k) / comb(3, k) for c in right]
            assert side["pass@k"][str(k)]["items"] == pytest.approx(values)


def test_rows_that_one_of_them_has_no_room_for_are_left_out_for_both(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    long = CHATML.replace("<|im_start|>assistant", "<|im_start|>" + "a" * 100 + "assistant")
    data, fitting = (
        write_rows([{"prompt": "q" * length, "answer": "a"} for length in lengths], name=name)
        for name, lengths in (("all.jsonl", (10, 400, 450, 20)), ("fitting.jsonl", (10, 20)))
    )
    model, base = str(model_folder()), str(model_folder(template=long))
    for one, other in ((model, base), (base, model)):
        config = EvalConfig(model=one, base=other, data=str(data), max_completion_length=5, on_long_prompt="drop")
        result = evaluate(config)
        assert (result["items"], result["base"]["items"], result["dropped"], result["base"]["dropped"]) == (2, 2, 2, 2)
        alone = evaluate(config.model_copy(update={"data": str(fitting), "on_long_prompt": "error"}))
        assert result["distance"]["new_task"] == pytest.approx(alone["distance"]["new_task"], rel=1e-4)
        assert result["distance"]["new_task"]["kl_base"] > 0.001


def test_rows_are_shown_the_same_others_after_some_are_left_out(
    model_folder: Callable[..., Path], load: Callable[..., LoadedModel], write_rows: Callable[..., Path]
) -> None:
    # Row 5 is too long, and so are rows 0 and 2, which draw it or row 3. Without these, row 1 would draw row 3.
    rows = [{"prompt": "q" * (400 if i == 5 else i + 1), "completion": "a" * (200 if i == 3 else 1)} for i in range(6)]
    data, model = str(write_rows(rows)), load()
    longest = len(chat_of(model).encode_prompt(load_demonstrations(data)[4].prompt))
    # The base's template is longer: by so much that row 4 alone becomes too long, or none.
    for more, items in ((151 - longest, 2), (150 - longest, 3)):
        template = CHATML.replace("<|im_start|>assistant", "<|im_start|>" + "a" * more + "assistant")
        base = str(model_folder(seed=1, template=template))
        config = EvalConfig(
            model=model.name,
            base=base,
            data=data,
            context="few_shot:k=1",
            max_prompt_length=150,
            on_long_prompt="drop",
            max_completion_length=5,
        )
        result = evaluate(config)
        assert (result["items"], result["base"]["items"], result["dropped"]) == (items, items, 6 - items)


@pytest.mark.parametrize(
    ("reply", "begun", "thought", "said"),
    [
        ("<think>hm</think>\n\n4", False, "hm", "4"),
        ("hm</think>4", True, "hm", "4"),
        ("hm, and no end", True, "hm, and no end", ""),
        ("<think>hm, and no end", False, "hm, and no end", ""),
        ("4", False, "", "4"),
    ],
)
def test_what_is_thought_is_told_from_what_is_said(reply: str, begun: bool, thought: str, said: str) -> None:
    assert split_thinking(reply, begun=begun) == (thought, said)


def test_thinking_is_counted_and_not_scored(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load()
    chat = chat_of(loaded)
    rows = load_demonstrations(str(write_rows([{"prompt": "q", "completion": "4"}])))
    text = chat.encode_text("<think>is it 5?</think>4")
    monkeypatch.setattr(answers_module, "sample", lambda *_: [Rollout([*text, 257], [0.0] * 25, False)])
    found = answer(loaded, [[1]], rows, chat, Sampling(40, temperature=0), batch_size=1)
    assert (found.correct, found.thinking, found.lengths) == ([True], [len("is it 5?")], [len(text) + 1])


def test_a_model_that_repeats_the_demonstrated_call_is_right(
    load: Callable[..., LoadedModel], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(template=HERMES)
    call = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]}
    rows = load_demonstrations(str(write_rows([{"prompt": "Weather in Oslo?", "completion": [call]}])))
    chat = chat_of(loaded)
    ids, _ = encode_replies(rows[0], chat)
    monkeypatch.setattr(answers_module, "sample", lambda *_: [Rollout(ids, [0.0] * len(ids), False)])
    prompts = [chat.encode_prompt(rows[0].prompt)]
    found = answer(loaded, prompts, rows, chat, Sampling(99, temperature=0), batch_size=1)
    assert (found.correct, found.replies[0][:11]) == ([True], "<tool_call>")


def test_a_scorer_that_no_call_of_the_template_satisfies_gets_a_note(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]}
    data = str(write_rows([{"prompt": "Weather in Oslo?", "completion": [call]}]))
    for scorer, rejects in ((None, False), ("contains", True)):
        evaluate(
            EvalConfig(model=str(model_folder(template=HERMES)), data=data, scorer=scorer, max_completion_length=2)
        )
        note = "scorer 'contains' rejects 1 of 1 demonstrated completions, tool_call would accept all"
        assert (note in " ".join(capsys.readouterr().err.split())) is rejects


@pytest.mark.parametrize("place", ["no/such/folder/x.jsonl", "folder", "file/x.jsonl", "read_only"])
def test_a_file_for_replies_that_cannot_be_written_is_refused_first(
    write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("file", "read_only"):
        (tmp_path / name).touch()
    # Root, who runs some tests, may write everything.
    monkeypatch.setattr("selfdistill.runtime.files.os.access", lambda path, _: path.name != "read_only")
    replies = str(tmp_path / place)
    config = EvalConfig(model="none/there", data=str(write_rows()), replies=replies)
    message = f"replies {replies!r}: cannot be written; give a file in an existing folder"
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(config)


def test_names_are_no_markup(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "a[").mkdir()
    data = write_rows(count=2, name="a[/b].jsonl")
    result = evaluate(EvalConfig(model=str(model_folder()), data=str(data), max_completion_length=3))
    result["settings"]["context"] = "[/x]"
    said = "".join(repr(EvalResult("model", str(data), result)).split())
    assert "a[/b].jsonl" in said
    assert "[/x]" in said


def test_what_is_demonstrated_is_scored_first(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "1?", "completion": "It is vitamin B.", "answer": "B", "scorer": "choice"},
        {"prompt": "2?", "completion": "<think>Not A.</think>(b)", "answer": "B", "scorer": "choice"},
        {"prompt": "3?", "completion": "<think>7 + 5</think>12", "answer": 12.0},
    ]
    data = write_rows(rows)
    config = EvalConfig(model=str(model_folder()), data=str(data), max_completion_length=4)
    evaluate(config)
    note = "note: scorer 'choice' rejects 1 of 2 demonstrated completions, contains would accept all: "
    assert f"{note}{data.name}:1\n" in capsys.readouterr().err.replace(str(data.parent) + "/", "")
    evaluate(config.model_copy(update={"data": str(write_rows(rows[1:], name="sound.jsonl"))}))
    assert "rejects" not in capsys.readouterr().err
