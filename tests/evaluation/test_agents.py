"""Evaluation in an environment: what is counted, whose episodes they are, and what the teacher's view adds.

Dimensions in names: T tokens of an episode, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_worlds
import torch
from conftest import CHATML, ENDS, row_log_probs

from selfdistill import evaluate as evaluate_in_python
from selfdistill.cli import main
from selfdistill.config.commands import CheckConfig, EvalConfig
from selfdistill.config.train import TrainConfig
from selfdistill.data import Demonstration, Example, encode, load_demonstrations, packaged, parse_context
from selfdistill.errors import UserError
from selfdistill.evaluation import EvalResult, check, evaluate
from selfdistill.evaluation.judge import Judge
from selfdistill.evaluation.statistics import share_interval
from selfdistill.methods import Completion, EpisodeRules, begun, play
from selfdistill.model import LoadedModel, Rollout, Sampling, sample_seed
from selfdistill.training.train import train

EVERY = tuple(range(256))
"""With these as end tokens, every reply of a tiny model is one token."""
SCRIPTED, TALK = "python:tiny_worlds.Scripted", "python:tiny_worlds.Talk"


@pytest.fixture
def scripted(model_folder: Callable[..., Path], write_rows: Callable[..., Path]) -> Callable[..., EvalConfig]:
    """Settings of five episodes with known ends."""
    ends = [(1, 1.0, 0), (3, 0.5, 1), (2, 1.0, 0), (4, 0.0, 2), (1, 0.25, 3)]
    rows = [
        {"prompt": f"q{number}", "answer": {"turns": turns, "reward": reward, "invalid": invalid}}
        for number, (turns, reward, invalid) in enumerate(ends)
    ]
    data = str(write_rows(rows, name="scripted.jsonl"))

    def make(**values: Any) -> EvalConfig:
        own: dict[str, Any] = {"model": str(model_folder(ends=EVERY)), "data": data, "environment": SCRIPTED}
        return EvalConfig(**(own | {"max_completion_length": 4, "max_episode_length": 200, "batch_size": 2} | values))

    return make


@pytest.fixture
def talks(model_folder: Callable[..., Path], write_rows: Callable[..., Path]) -> dict[str, Any]:
    """Settings of eight episodes of one to four turns, whose ends depend on what the model says."""
    rows = [{"prompt": f"q{i}" * (1 + i % 3), "completion": "ab" * (1 + i % 4), "answer": 1 + i % 4} for i in range(8)]
    data = str(write_rows(rows, name="talks.jsonl"))
    values: dict[str, Any] = {"model": str(model_folder(ends=ENDS, seed=5)), "data": data, "environment": TALK}
    return values | {"max_completion_length": 16, "max_episode_length": 200, "batch_size": 3}


def examples_of(loaded: LoadedModel, data: str, environment: str) -> list[Example]:
    rows = begun(environment, load_demonstrations(data))
    limits: dict[str, Any] = {"max_prompt_length": None, "max_completion_length": 200, "window": loaded.window}
    return encode(rows, parse_context("turns"), loaded.chat(), replies="episode", **limits)[0]


def played(
    loaded: LoadedModel, values: dict[str, Any], sampling: Sampling, seeds: Sequence[int] | None = None, count: int = 1
) -> list[Completion]:
    """The episodes that rollouts with these settings have."""
    rules = EpisodeRules(values["environment"], 8, values["max_episode_length"])
    examples = [x for x in examples_of(loaded, values["data"], values["environment"]) for _ in range(count)]
    return play(loaded, loaded.chat(), examples, sampling, rules, seeds or [0] * len(examples))


# --- what is counted ---


def test_success_turns_and_invalid_calls_are_those_of_the_environment(scripted: Callable[..., EvalConfig]) -> None:
    config = scripted()
    result = evaluate(config)
    assert result["correct"] == [True, False, True, False, False]
    assert result["accuracy"] == 0.4
    assert result["accuracy_interval"] == list(share_interval(2, 5))
    assert result["episode/reward"] == pytest.approx(2.75 / 5)
    low, high = result["episode/reward_interval"]
    assert low < 2.75 / 5 < high
    assert result["episode/turns"] == 11 / 5
    assert result["episode/invalid_calls"] == (3 * 1 + 4 * 2 + 1 * 3) / 5
    assert 11 / 5 <= result["completion/length"] < 4 * 11 / 5
    assert result["completion/truncated"] == 0
    assert result["scorers"] == [SCRIPTED]
    assert (result["settings"]["environment"], result["settings"]["max_turns"]) == (SCRIPTED, 8)
    said = " ".join(repr(EvalResult(config.model, config.data, result)).split())
    for text in ("new task, success (python:tiny_worlds.Scripted)", "mean reward", "0.550", "turns per episode"):
        assert text in said


def test_an_episode_that_is_cut_has_failed_and_is_counted(scripted: Callable[..., EvalConfig]) -> None:
    result = evaluate(scripted(max_turns=2))
    assert result["correct"] == [True, False, True, False, False]
    assert result["completion/truncated"] == 2 / 5
    assert result["episode/turns"] == 8 / 5
    assert result["episode/reward"] == pytest.approx(2.25 / 5)


def test_two_models_are_compared_on_the_same_episodes(scripted: Callable[..., EvalConfig]) -> None:
    config = scripted()
    result = evaluate(config.model_copy(update={"base": config.model}))
    assert result["paired"]["accuracy"]["difference"] == 0
    assert result["base"]["correct"] == result["correct"]
    assert result["distance"]["new_task"]["changed"] == 0
    said = repr(EvalResult(config.model, config.data, result))
    (line,) = [line for line in said.splitlines() if "turns per" in line]
    assert line.count("2.20") == 2


def test_pass_at_k_of_known_ends(scripted: Callable[..., EvalConfig]) -> None:
    result = evaluate(scripted(num_samples=3))
    assert {k: found["items"] for k, found in result["pass@k"].items()} == {
        k: [1.0, 0.0, 1.0, 0.0, 0.0] for k in ("1", "2", "3")
    }


def test_rows_need_nothing_that_a_scorer_would(scripted: Callable[..., EvalConfig], write_rows: Any) -> None:
    data = write_rows([{"prompt": "stop"}], name="bare.jsonl")
    with pytest.raises(UserError, match=r"bare.jsonl:1, at its start: .*'answer'"):  # the environment itself needs it
        evaluate(scripted(data=str(data)))


def test_a_scorer_is_not_used_and_that_is_said(
    scripted: Callable[..., EvalConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(scripted(scorer="contains"))
    assert f"the environment {SCRIPTED} gives the rewards, so scorer contains is ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"environment": "bundled:no"}, "unknown environment 'bundled:no'"),
        ({"max_episode_length": 2}, "'max_episode_length': found 2, expected at least max_completion_length, 4"),
    ],
)
def test_mistakes_are_one_line(scripted: Callable[..., EvalConfig], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evaluate(scripted(**values))
    assert "\n" not in str(caught.value)


def test_an_environment_that_does_not_judge_cannot_be_measured(talks: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"talks.jsonl:\d: environment .*Silent' ended the episode without a reward"):
        evaluate(EvalConfig(**talks | {"environment": "python:tiny_worlds.Silent"}))


class Says:
    """An engine whose replies are known, turn by turn."""

    def __init__(self, loaded: LoadedModel, *replies: dict[str, Any]) -> None:
        self._chat, self._replies = loaded.chat(), replies

    def check_room(self, *_: Any) -> None: ...

    def sample(self, loaded: LoadedModel, prompts: list[list[int]], *_: Any) -> list[Rollout]:
        texts = [self._chat.tokenizer.decode(prompt) for prompt in prompts]
        replies = [self._replies[text.rsplit("Which", 1)[-1].count("<|im_start|>assistant") - 1] for text in texts]
        ids = [self._chat.encode_reply({"role": "assistant", "content": "", **reply}, {}) for reply in replies]
        return [Rollout(one, [-0.5] * len(one), truncated=len(one) > 190) for one in ids]


def asking(word: str) -> dict[str, Any]:
    function = {"name": "look_up", "arguments": {"word": word}}
    return {"tool_calls": [{"type": "function", "function": function}]}


@pytest.fixture
def words(
    model_folder: Callable[..., Path],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    """Settings of three questions, to a model that looks up a word and then says an answer, in an environment."""
    rows = [{"prompt": "Which word?", "answer": "tea"}, {"prompt": "Which?", "completion": "I say tea."}]
    rows += [{"prompt": "Which one?", "answer": [["look_up", {"word": "cat"}]], "scorer": "tool_call"}]
    data = str(write_rows(rows, name="words.jsonl"))

    def make(environment: Any, answer: str = "I say tea.") -> dict[str, Any]:
        loaded = load(template=CHATML, room=8192)
        engine = Says(loaded, asking("cat"), {"content": answer})
        monkeypatch.setattr("selfdistill.model.sampling.engine_for", lambda _: engine)
        values = {"model": str(model_folder(template=CHATML, room=8192)), "data": data, "environment": environment}
        return values | {"engine": "vllm", "max_completion_length": 200, "max_episode_length": 2000}

    return make


WITHOUT_A_REWARD = [tiny_worlds.FUNCTIONS, "python:tiny_worlds.FUNCTIONS", "python:tiny_worlds.OnlyTools"]


@pytest.mark.parametrize("environment", WITHOUT_A_REWARD, ids=["functions", "their list by name", "class"])
def test_without_a_reward_the_scorer_judges_the_last_reply(
    words: Callable[..., dict[str, Any]], environment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "replies.jsonl"
    result = evaluate(EvalConfig(**words(environment), scorer="contains", replies=str(file)))
    assert result["correct"] == [True, True, True]  # tool_call reads the calls of all replies
    assert result["scorers"] == ["contains", "tool_call"]
    assert (result["episode/reward"], result["episode/turns"]) == (1, 2)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(line["reward"], line["correct"], line["reply"]) for line in lines] == [(1, True, "I say tea.")] * 3
    assert [one["role"] for one in lines[0]["messages"]] == ["assistant", "tool", "assistant"]
    assert capsys.readouterr().err.count(" has no reward, so the scorer judges the last reply") == 1
    # an episode that was cut has failed, whatever its last reply says
    assert evaluate(EvalConfig(**words(environment, "tea " * 60), scorer="contains"))["correct"] == [False] * 3


def test_check_scores_last_replies_where_there_is_no_reward(words: Callable[..., dict[str, Any]]) -> None:
    own = {"contexts": ["turns"], "sample": 3, "mixed_precision": "no", "scorer": "contains"}
    rows = [Demonstration("Which?", "I say tea.", row=0), Demonstration("Which one?", "I say so.", row=1)]
    result = check(CheckConfig(**words(tiny_worlds.FUNCTIONS), **own), rows, cost=False)
    assert (result.student_accuracy, result.best.accuracy) == (0.5, 0.5)


def test_without_a_reward_the_judges_grades_count(
    words: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grades = {"Which word?": "strict", "Which?": "lenient"}

    def graded(_: Judge, rows: Sequence[Demonstration], replies: Sequence[str]) -> list[str]:
        assert list(replies) == ["I say tea."] * len(rows)
        return [grades[row.prompt[0]["content"]] for row in rows]

    monkeypatch.setattr(Judge, "grades", graded)
    own = {"scorer": "judge", "judge_url": "http://localhost:1", "judge_model": "m"}
    result = evaluate(EvalConfig(**words(tiny_worlds.FUNCTIONS), **own))
    assert (result["correct"], result["accuracy_lenient"]) == ([True, False, True], 1)
    # episodes that were cut have failed by both standards, though the judge sees none of them
    cut = evaluate(EvalConfig(**words(tiny_worlds.FUNCTIONS, "tea " * 60), **own))
    assert (cut["correct"], cut["accuracy_lenient"]) == ([False] * 3, 0)


def test_rows_without_anything_to_score_are_refused_before_a_model_is_loaded(
    talks: dict[str, Any], write_rows: Callable[..., Path]
) -> None:
    data = str(write_rows([{"prompt": "stop"}], name="bare.jsonl"))
    values = talks | {"environment": "python:tiny_worlds.OnlyTools", "model": "no-such-model", "data": data}
    with pytest.raises(UserError, match=r"bare.jsonl: .* line 1, column 'completion': missing, and no 'answer' to"):
        evaluate(EvalConfig(**values))


# --- whose episodes they are ---


def test_episodes_are_those_of_greedy_rollouts(
    talks: dict[str, Any], load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    file = tmp_path / "replies.jsonl"
    result = evaluate(EvalConfig(**talks, replies=str(file), mixed_precision="no"))
    expected = played(load(ends=ENDS, seed=5), talks, Sampling(16, temperature=0))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert max(c.turns for c in expected) > 2
    for line, c, right in zip(lines, expected, result["correct"], strict=True):
        assert c.verdict is not None
        assert line["messages"] == list(c.messages)
        assert line["reply"] == c.messages[-1]["content"]
        assert (line["reward"], line["feedback"]) == (c.verdict.reward, c.verdict.feedback)
        assert (line["turns"], line["invalid_calls"], line["truncated"]) == (c.turns, c.invalid_calls, c.truncated)
        assert line["tokens"] == sum(c.is_own)
        assert line["correct"] == right == (c.verdict.reward == 1)
    assert result["completion/length"] == pytest.approx(sum(sum(c.is_own) for c in expected) / 8)
    assert result["episode/reward"] == pytest.approx(sum(c.verdict.reward for c in expected if c.verdict) / 8)
    assert 0 < sum(result["correct"]) < 8
    assert tiny_worlds.Talk.open == 0


def test_samples_for_pass_at_k_are_those_of_rollouts(talks: dict[str, Any], load: Callable[..., LoadedModel]) -> None:
    found = evaluate(EvalConfig(**talks, num_samples=4, seed=7, mixed_precision="no"))["pass@k"]["1"]["items"]
    seeds = [sample_seed(7, 0, row, generation) for row in range(8) for generation in range(4)]
    expected = played(load(ends=ENDS, seed=5), talks, Sampling(16), seeds, count=4)
    right = [c.verdict is not None and c.verdict.reward == 1 for c in expected]
    assert found == [sum(right[i : i + 4]) / 4 for i in range(0, 32, 4)]
    assert len(set(found)) > 1


def test_distances_are_along_the_models_own_tokens(talks: dict[str, Any], load: Callable[..., LoadedModel]) -> None:
    other = load(ends=ENDS, seed=1)
    config = EvalConfig(**talks, mixed_precision="no")
    result = evaluate(config, loaded=other, base=load(ends=ENDS, seed=5))
    base, total, count = load(ends=ENDS, seed=5), 0.0, 0
    for c in played(other, talks, Sampling(16, temperature=0)):
        with torch.no_grad():
            log_q_TV, log_p_TV = (row_log_probs(m.model, c.example.student_ids, c.ids) for m in (other, base))
        kl_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
        own = [not any(start <= t < end for start, end in c.given) for t in range(len(c.ids))]
        total, count = total + float(kl_T[torch.tensor(own)].sum()), count + sum(own)
    assert result["distance"]["new_task"]["kl_model"] == pytest.approx(total / count, rel=1e-4)


# --- the teacher's view ---


class Copies:
    """An engine that says what a demonstration in its context says, and else nothing of use."""

    def __init__(self, loaded: LoadedModel, examples: Sequence[Example]) -> None:
        self._chat, self._examples = loaded.chat(), examples

    def check_room(self, *_: Any) -> None: ...

    def sample(self, loaded: LoadedModel, prompts: list[list[int]], *_: Any) -> list[Rollout]:
        replies = [self._reply(prompt) for prompt in prompts]
        return [Rollout(ids, [-0.5] * len(ids), truncated=False) for ids in replies]

    def _reply(self, prompt: list[int]) -> list[int]:
        for example in self._examples:
            shown, row = example.teacher_ids or [], example.demonstration
            if prompt[: len(shown)] == shown:
                turn = self._chat.tokenizer.decode(prompt[len(shown) :]).count("<|im_start|>assistant")
                replies = [message for message in row.episode if message["role"] == "assistant"]
                return self._chat.encode_reply(replies[turn], row.template_options)
        return self._chat.encode_reply({"role": "assistant", "content": "Well."}, {})


@pytest.fixture
def copies(
    model_folder: Callable[..., Path],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Settings of six questions of the shop, to a model that copies its demonstration."""
    lines = Path(packaged("shop.train.jsonl")).read_text(encoding="utf-8").splitlines()[:6]
    data = str(write_rows([json.loads(line) for line in lines], name="shop.jsonl"))
    loaded = load(template=CHATML, room=8192)
    engine = Copies(loaded, examples_of(loaded, data, "bundled:shop"))
    monkeypatch.setattr("selfdistill.model.sampling.engine_for", lambda _: engine)
    values = {"model": str(model_folder(template=CHATML, room=8192)), "data": data, "environment": "bundled:shop"}
    return values | {"engine": "vllm", "max_completion_length": 200, "max_episode_length": 2000}


def test_the_teachers_success_is_measured_with_its_context(copies: dict[str, Any], tmp_path: Path) -> None:
    assert evaluate(EvalConfig(**copies))["accuracy"] == 0
    file = tmp_path / "replies.jsonl"
    result = evaluate(EvalConfig(**copies, context="turns", replies=str(file)))
    assert result["accuracy"] == 1
    assert result["episode/invalid_calls"] == 0
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = load_demonstrations(copies["data"])
    for line, row in zip(lines, rows, strict=True):
        told = [(m["role"], m["content"], m.get("tool_calls")) for m in line["messages"]]
        assert told == [(m["role"], m["content"], m.get("tool_calls")) for m in row.episode]
        assert line["turns"] == sum(m["role"] == "assistant" for m in row.episode)


def test_check_compares_student_and_teacher_over_episodes(
    copies: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"contexts": ["turns:repeats=1", "example"], "sample": 4, "batch_size": 2, "mixed_precision": "no"}
    result = check(CheckConfig(**copies, **own, spill=True, hints=True))
    assert (result.student_accuracy, result.best.accuracy, result.best.context) == (0, 1, "turns:repeats=1")
    assert result.exit_code == 0
    assert result.verdict.startswith("Worth trying: the teacher with turns:repeats=1 is right on 100%")
    assert "cannot show an episode" in result.skipped["example:reasoning=true"]
    assert result.spill is not None
    assert result.spill.untried == "its steps need single replies, and this data has episodes"
    assert result.hints is None
    assert "hints are not measured, because a part of an episode cannot be shown" in capsys.readouterr().err
    assert "Spill: not measured: its steps need single replies" in " ".join(repr(result).split())


def test_check_counts_the_turns_of_student_and_teacher(copies: dict[str, Any]) -> None:
    own = {"contexts": ["turns:repeats=1"], "sample": 6, "mixed_precision": "no"}
    result = check(CheckConfig(**copies, **own), cost=False)
    demonstrated = [sum(m["role"] == "assistant" for m in row.episode) for row in load_demonstrations(copies["data"])]
    assert sum(demonstrated) / 6 > 1.5
    assert (result.student_turns, result.student_invalid_calls) == (1, 0)
    assert (result.best.turns, result.best.invalid_calls) == (sum(demonstrated) / 6, 0)


@pytest.mark.parametrize(("environment", "at_once"), [(TALK, 16), ("none", 8)])
def test_check_takes_into_account_how_many_episodes_are_played_at_once(
    talks: dict[str, Any], environment: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def factor(*given: Any) -> float:
        asked.append(given)
        return 1e9

    monkeypatch.setattr("selfdistill.evaluation.measure.rollout_factor", factor)
    own = {"contexts": ["turns"], "sample": 8, "mixed_precision": "no", "max_prompt_length": 200, "scorer": "contains"}
    result = check(CheckConfig(**talks | {"environment": environment}, **own))
    assert asked == [("cpu", 8, 3, at_once)]
    assert result.seconds_per_step is not None
    assert result.seconds_per_step > 1e6


def test_checks_table_has_turns_and_invalid_calls(
    scripted: Callable[..., EvalConfig], write_rows: Callable[..., Path]
) -> None:
    ends = [{"turns": 1, "reward": 1.0, "invalid": 0}, {"turns": 4, "reward": 0.0, "invalid": 2}]
    data = write_rows([{"prompt": "q", "completion": "a", "answer": end} for end in ends], name="known.jsonl")
    config, own = scripted(), {"contexts": ["turns"], "sample": 2, "mixed_precision": "no"}
    settings = {"max_completion_length": 4, "max_episode_length": 200}
    result = check(CheckConfig(model=config.model, data=str(data), environment=SCRIPTED, **settings, **own), cost=False)
    assert (result.student_turns, result.student_invalid_calls) == (5 / 2, 8 / 2)
    assert (result.best.turns, result.best.invalid_calls) == (5 / 2, 8 / 2)
    as_json = result.to_dict()
    assert (as_json["student_turns"], as_json["layouts"][0]["invalid_calls"]) == (5 / 2, 8 / 2)
    rows = [line.split() for line in repr(result).splitlines() if line.startswith(("│ none", "│ turns"))]
    assert [row[-4::2] for row in rows] == [["2.50", "4.00"]] * 2
    for shown in (repr(result), result._repr_html_()):
        assert (shown.count("2.50"), shown.count("4.00")) == (2, 2)
        assert "invalid" in shown


def test_check_measures_the_models_own_tokens_alone(talks: dict[str, Any], load: Callable[..., LoadedModel]) -> None:
    own = {"contexts": ["turns"], "sample": 8, "mixed_precision": "no", "max_prompt_length": 200}
    (layout,) = check(CheckConfig(**talks, **own), cost=False).layouts
    loaded = load(ends=ENDS, seed=5)
    seeds = [sample_seed(0, 0, row, 0) for row in range(8)]
    by_place: dict[int, list[float]] = {}
    for c in played(loaded, talks, Sampling(16), seeds):
        with torch.no_grad():
            log_q_TV, log_p_TV = (
                row_log_probs(loaded.model, ids or [], c.ids) for ids in (c.example.teacher_ids, c.example.student_ids)
            )
        kl_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
        for place, t in enumerate(t for t, is_own in enumerate(c.is_own) if is_own):
            by_place.setdefault(place, []).append(float(kl_T[t]))
    every = [value for values in by_place.values() for value in values]
    assert layout.kl == pytest.approx(sum(every) / len(every), rel=1e-4)
    means = [sum(by_place[place]) / len(by_place[place]) for place in range(8)]
    assert layout.kl_by_position == pytest.approx(means, rel=1e-4)


def test_check_counts_a_demonstrations_own_tokens_alone(
    copies: dict[str, Any], load: Callable[..., LoadedModel]
) -> None:
    own = {"contexts": ["turns"], "sample": 6, "mixed_precision": "no"}
    result = check(CheckConfig(**copies, **own), cost=False)
    loaded = load(template=CHATML, room=8192)
    examples = examples_of(loaded, copies["data"], "bundled:shop")
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logp_TV = row_log_probs(loaded.model, example.student_ids, example.completion_ids)
        logp_T = logp_TV[range(len(example.completion_ids)), example.completion_ids]
        given = {t for start, end in example.given for t in range(start, end)}
        assert given
        kept = [t for t in range(len(example.completion_ids)) if t not in given]
        total, count = total + float(logp_T[kept].sum()), count + len(kept)
    assert result.student_logp == pytest.approx(total / count, rel=1e-4)


def test_a_context_that_shows_one_turn_is_refused_before_a_model_is_loaded(talks: dict[str, Any]) -> None:
    values, spec = talks | {"model": "no-such-model"}, "turns:repeats=1,show=turn"
    message = f"^context '{spec}': it shows a single reply, but in an environment whole episodes are sampled;"
    with pytest.raises(UserError, match=message):
        evaluate(EvalConfig(**values, context=spec))
    with pytest.raises(UserError, match=message):
        check(CheckConfig(**values, contexts=[spec, "turns"]))


# --- in a run, and from the command line ---


def test_a_run_measures_its_test_as_eval_does(
    talks: dict[str, Any], settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = settings(**talks, test=talks["data"], max_steps=2, eval_steps=1, method="sft")
    train(config)
    found = [
        json.loads(line)
        for line in (Path(config.output_dir) / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in found] == [0, 1, 2]
    for line, model in ((found[0], talks["model"]), (found[2], config.output_dir)):
        alone = evaluate(EvalConfig(**talks | {"model": model, "mixed_precision": config.mixed_precision}))
        assert line["correct"] == alone["correct"]
        for name in ("reward", "turns", "invalid_calls"):
            assert line[f"episode/{name}"] == alone[f"episode/{name}"]
    kept = [json.loads(line) for line in (Path(config.output_dir) / "test_replies.jsonl").open(encoding="utf-8")]
    assert [line["step"] for line in kept] == [0] * 8 + [2] * 8
    assert [line["correct"] for line in kept[8:]] == found[2]["correct"]
    assert all(line["messages"][0]["role"] == "assistant" and line["turns"] > 0 for line in kept)


def test_rows_that_have_begun_begin_anew() -> None:
    rows = [Demonstration("Count.", "one", answer=2)]
    once = begun("python:tiny_worlds.Asks", rows)
    assert [turn["content"] for turn in once[0].prompt] == ["Count.", "Go on, 2 times."]
    assert begun("python:tiny_worlds.Asks", once) == once
    assert begun(TALK, once)[0].prompt == rows[0].prompt


def test_the_shop_from_the_command_line(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    result, replies = tmp_path / "result.json", tmp_path / "replies.jsonl"
    command = ["eval", "--model", str(model_folder(ends=EVERY, room=8192)), "--data", "bundled:shop.test.jsonl"]
    command += ["--environment", "bundled:shop", "--max_completion_length", "4", "--max_turns", "2"]
    assert main([*command, "--json", str(result), "--replies", str(replies)]) == 0
    found = json.loads(result.read_text(encoding="utf-8"))
    assert (found["items"], found["accuracy"], found["scorers"]) == (60, 0, ["bundled:shop"])
    lines = [json.loads(line) for line in replies.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 60
    assert lines[0]["source"] == "bundled:shop.test.jsonl:1"
    assert all(line["feedback"] for line in lines)


def test_the_shop_from_python(model_folder: Callable[..., Path]) -> None:
    rows = load_demonstrations("bundled:shop.validation.jsonl")[:3]
    model = str(model_folder(ends=EVERY, room=8192))
    options: dict[str, Any] = {"environment": "bundled:shop", "max_completion_length": 4, "progress": False}
    result = evaluate_in_python(model, rows, **options)
    assert (result.items, result.accuracy) == (3, 0)


def test_that_no_reply_called_a_tool_is_noted_once(
    model_folder: Callable[..., Path], talks: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    note = "note: no reply called a tool, though tools were shown"
    own: dict[str, Any] = {"environment": "bundled:shop", "data": "bundled:shop.validation.jsonl", "max_turns": 2}
    model = str(model_folder(ends=EVERY, room=8192))
    evaluate(EvalConfig(model=model, base=model, **own, max_completion_length=4), load_demonstrations(own["data"])[:2])
    assert capsys.readouterr().err.count(note) == 1
    rows = load_demonstrations("bundled:shop.train.jsonl")
    options: dict[str, Any] = {"contexts": ["turns"], "sample": 2, "mixed_precision": "no", "max_completion_length": 4}
    settings = CheckConfig(model=model, **own, **options)
    check(settings, rows, cost=False)
    assert capsys.readouterr().err.count(note) == 1
    evaluate(EvalConfig(**talks))  # shows no tools
    assert note not in capsys.readouterr().err
