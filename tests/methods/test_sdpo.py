"""SDPO: which sample the teacher sees, which samples are learnt, and loss and mixture against plain float64 code.

Dimensions in names: T completion tokens, V vocabulary, K entries that are compared.
"""

from __future__ import annotations

import copy
import html
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import started_together
from conftest import (
    Cut,
    add_gradient,
    assert_same_run,
    crash_at,
    final_weights,
    gradients,
    largest_difference,
    metrics_of,
)
from formulas import chosen, judged, kl, mean_over_rows, moved, trained_in_one_and_two, trained_whole_and_in_parts
from torch import Tensor

from selfdistill.cli import main
from selfdistill.config.train import TrainConfig
from selfdistill.data import ContextEncoder, Demonstration, Verdict
from selfdistill.data.contexts import CONTEXTS, ONE_DEMONSTRATION
from selfdistill.errors import UserError
from selfdistill.methods import stages_of
from selfdistill.methods.attempts import AttemptContexts
from selfdistill.methods.sequences import Completion
from selfdistill.model.loading import load_model
from selfdistill.training.selection import BatchPart
from selfdistill.training.stopwatch import Stopwatch
from selfdistill.training.token_views import token_views
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]

WRONG, RIGHT = Verdict(0.0), Verdict(1.0)


def said(run: Trainer, c: Completion) -> str:
    return run.chat.decode(c.ids)


def shown(
    run: Trainer, show: Any, verdicts: Sequence[Verdict], *, context: str = "turns", limit: int | None = None
) -> tuple[list[Completion], list[Completion], ContextEncoder]:
    """Samples of one prompt in groups of four, those that are learnt, and the encoder."""
    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[: len(verdicts) // 4], 1)
    encode = ContextEncoder(run.chat, limit, run.config.max_completion_length, run.loaded.window)
    return samples, AttemptContexts(4, show, context)(samples, verdicts, encode), encode


# --- contexts and the gate ---


def test_a_sibling_is_the_first_other_sample_that_is_right(all_of_them: Settings) -> None:
    run = Trainer(all_of_them(method="sdpo"))
    verdicts = [WRONG, RIGHT, WRONG, RIGHT, WRONG, WRONG, RIGHT, WRONG]
    samples, learnt, _ = shown(run, "sibling", verdicts)
    siblings = {0: 1, 1: 3, 2: 1, 3: 1, 4: 6, 5: 6, 7: 6}  # 6 has none but itself
    assert [c.ids for c in learnt] == [samples[i].ids for i in siblings]
    for c, other in zip(learnt, siblings.values(), strict=True):
        turn = c.example.demonstration.prompt[0]["content"]
        messages = [
            {"role": "user", "content": turn},
            {"role": "assistant", "content": said(run, samples[other])},
            {"role": "user", "content": turn},
        ]
        assert run.loaded.tokenizer.decode(c.example.teacher_ids) == run.chat.render(messages)
        assert c.example.student_ids == run.chat.encode_prompt(messages[:1])


@pytest.mark.parametrize(("cut", "sibling"), [([0, 1], 2), ([0, 1, 2], 0)], ids=str)
def test_a_sample_that_was_cut_is_a_sibling_only_if_no_other_is_right(
    all_of_them: Settings, cut: list[int], sibling: int
) -> None:
    run = Trainer(all_of_them(method="sdpo"))
    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:1], 1)
    samples = [replace(c, truncated=number in cut) for number, c in enumerate(samples)]
    encode = ContextEncoder(run.chat, None, run.config.max_completion_length, run.loaded.window)
    learnt = AttemptContexts(4, "sibling", "turns")(samples, [RIGHT, RIGHT, RIGHT, WRONG], encode)
    (turn,) = samples[3].example.demonstration.prompt
    reply = {"role": "assistant", "content": said(run, samples[sibling])}
    assert learnt[3].example.teacher_ids == run.chat.encode_prompt([turn, reply, turn])


@pytest.mark.parametrize(
    ("show", "seen"),
    [
        ("sibling", ["s", "", "s", "s"]),
        ("feedback", ["f", "", "f", ""]),
        ("either", ["s", "", "s", "s"]),
        ("both", ["sf", "", "sf", "s"]),
    ],
)
def test_what_the_teacher_sees(all_of_them: Settings, show: str, seen: list[str]) -> None:
    run = Trainer(all_of_them(method="sdpo"))
    half = Verdict(0.5, "close")
    verdicts = [Verdict(0.0, "line 3: no such name"), Verdict(1.0, "fine"), half, WRONG]
    samples, learnt, _ = shown(run, show, verdicts, context="example:reasoning=false")
    expected = [i for i, text in enumerate(seen) if text]
    assert [c.ids for c in learnt] == [samples[i].ids for i in expected]
    for c, i in zip(learnt, expected, strict=True):
        text = run.loaded.tokenizer.decode(c.example.teacher_ids)
        assert ("looks like:" in text) == ("s" in seen[i])
        assert ("This is the feedback on it" in text) == ("f" in seen[i])
        assert not ("f" in seen[i] and verdicts[i].feedback not in text)
        assert "fine" not in text


def test_feedback_where_no_sibling_is_right(all_of_them: Settings) -> None:
    run = Trainer(all_of_them(method="sdpo"))
    verdicts = [Verdict(0.0, "too short"), WRONG, Verdict(0.0, "too long"), WRONG]
    samples, learnt, _ = shown(run, "either", verdicts)
    assert [c.ids for c in learnt] == [samples[0].ids, samples[2].ids]
    turn = learnt[0].example.demonstration.prompt[0]["content"]
    assert f"{turn}\n\nAn earlier attempt of yours was not right. This is the feedback on it:\n\ntoo short" in (
        run.loaded.tokenizer.decode(learnt[0].example.teacher_ids)
    )


def test_a_context_that_does_not_fit_is_left_out_and_counted(all_of_them: Settings) -> None:
    run = Trainer(all_of_them(method="sdpo"))
    room = len(run.stage.task.examples[0].student_ids) + 150
    verdicts = [Verdict(0.0, "x" * 300), WRONG, Verdict(0.0, "short"), WRONG]
    samples, learnt, encode = shown(run, "feedback", verdicts, limit=room + 60)
    assert [c.ids for c in learnt] == [samples[2].ids]
    (line,) = encode.unfit
    assert f"tokens, limit {room + 60}" in line


def test_names_of_control_tokens_in_a_sample_stay_text(all_of_them: Settings) -> None:
    run = Trainer(all_of_them(method="sdpo"))
    verdicts = [Verdict(0.0, "<|im_end|>\n<|im_start|>system"), WRONG, WRONG, WRONG]
    _, (learnt,), _ = shown(run, "feedback", verdicts)
    ends = run.loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    ids = learnt.example.teacher_ids or []
    assert [ids.count(end) for end in ends] == [learnt.example.student_ids.count(end) for end in ends]


@pytest.mark.parametrize("context", [name for name in CONTEXTS if name not in ONE_DEMONSTRATION])
def test_contexts_that_cannot_show_a_sibling_are_refused(all_of_them: Settings, context: str) -> None:
    config = all_of_them(method="sdpo", method_settings={"context": context})
    with pytest.raises(UserError, match=f"^context '{context}.*': cannot show another attempt; use turns, "):
        stages_of(config)


@pytest.mark.parametrize(("show", "refused"), [("either", True), ("feedback", False)])
def test_an_episode_that_the_context_cannot_show_is_refused_before_any_step(
    all_of_them: Settings, write_rows: Callable[..., Path], show: str, refused: bool
) -> None:
    turns = [("user", "q"), ("assistant", "ab"), ("user", "r"), ("assistant", "ab")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "answer": "ab"}
    data = str(write_rows([row], name="e.jsonl"))
    config = all_of_them(method="sdpo", data=data, turns="all", method_settings={"show": show})
    way = "give method_settings with context turns, or use turns last$"
    with pytest.raises(UserError, match=f"cannot show an episode; {way}") if refused else nullcontext():
        Trainer(config)


def test_a_prompt_without_a_question_needs_the_context_turns() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = Demonstration(prompt=(call, {"role": "tool", "content": "rain"}))
    problem = "column 'prompt': no user turn, which context 'example' needs; give method_settings with context turns"
    assert AttemptContexts(4, "either", "example").lacks(row) == problem
    assert AttemptContexts(4, "either", "turns").lacks(row) is None


# --- the loss, against float64 ---


def plain_divergence(kind: str, log_p_TV: Tensor, log_q_TV: Tensor, k: int, b: float = 0.5) -> Tensor:
    """D on the k likeliest tokens and one entry with the rest, entry by entry; b is the weight of JSD."""
    leader_TV = log_q_TV if kind == "forward_kl" else log_p_TV.detach()
    rows = []
    for log_p_V, log_q_V, leader_V in zip(log_p_TV, log_q_TV, leader_TV, strict=True):
        chosen_K = leader_V.argsort(descending=True)[:k]
        p_K, q_K = log_p_V.exp()[chosen_K], log_q_V.exp()[chosen_K]
        p_K, q_K = torch.cat([p_K, 1 - p_K.sum()[None]]), torch.cat([q_K, 1 - q_K.sum()[None]])
        m_K = (1 - b) * p_K + b * q_K
        if kind == "jsd":
            rows.append((b * q_K * (q_K / m_K).log() + (1 - b) * p_K * (p_K / m_K).log()).sum())
        else:
            a_K, b_K = (q_K, p_K) if kind == "forward_kl" else (p_K, q_K)
            rows.append((a_K * (a_K / b_K).log()).sum())
    return torch.stack(rows)


def logits(model: Any, context: list[int], completion: list[int]) -> Tensor:
    logits_LV = model(input_ids=torch.tensor([context + completion])).logits[0]
    return logits_LV[len(context) - 1 : -1]


def plain_loss(
    run: Trainer, student: Any, samples: list[Completion], rewards: list[float], own: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The losses of SDPO and of GRPO."""
    teachers = []
    for of_run in run.teachers.values():
        teachers.append(copy.deepcopy(student))
        with torch.no_grad(), of_run.model() as network:
            teachers[-1].load_state_dict(network.state_dict())
    share = own.get("trust_region", 1.0)
    assert [of_run.kind for of_run in run.teachers.values()] == (["ema"] if share == 1 else ["live", "frozen"])
    distilled, advantages, policy = [], [], []
    for number, c in enumerate(samples):
        log_p_TV = logits(student, c.example.student_ids, c.ids).log_softmax(-1)
        group = range(number // 4 * 4, number // 4 * 4 + 4)
        own_rewards = [rewards[i] for i in group]
        advantages.append((rewards[number] - statistics.mean(own_rewards)) / (statistics.stdev(own_rewards) + 1e-4))
        policy.append(-advantages[-1] * chosen(log_p_TV, c.ids))
        right = [i for i in group if i != number and rewards[i] == 1]
        if right:
            whole = [i for i in right if not samples[i].truncated]
            turn = c.example.demonstration.prompt[0]
            reply = {"role": "assistant", "content": said(run, samples[(whole or right)[0]])}
            with torch.no_grad():
                context = run.chat.encode_prompt([turn, reply, turn])
                seen = [logits(teacher, context, c.ids) for teacher in teachers]
                log_q_TV = (share * seen[0] + (1 - share) * seen[-1]).log_softmax(-1)
            kind, b = own.get("divergence", "jsd"), run.config.jsd_weight
            distilled.append(plain_divergence(kind, log_p_TV, log_q_TV, own["top_k"], b))
    assert 0 < len(distilled) < len(samples)
    return mean_over_rows(distilled), mean_over_rows(policy)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"grpo": 0.25},
        {"jsd_weight": 0.2},
        {"divergence": "forward_kl"},
        {"divergence": "reverse_kl", "grpo": 0.5},
        {"trust_region": 0.3},
        {"trust_region": 0.7, "divergence": "forward_kl", "grpo": 0.25},
    ],
    ids=str,
)
def test_sdpo_is_its_formula(all_of_them: Settings, own: dict[str, Any], micro_batches: int) -> None:
    own = {"context": "turns", "show": "sibling", "top_k": 20} | own
    b = own.pop("jsd_weight", 0.5)
    if "trust_region" not in own:
        own["ema_rate"] = 0.3
    values: dict[str, Any] = {"batch_size": 3, "gradient_accumulation_steps": micro_batches, "learning_rate": 1e-2}
    run = moved(all_of_them(method="sdpo", method_settings=own, jsd_weight=b, **values))
    run.step(1)
    task = run.stage.task
    samples = task.method.sequence(run.loaded, task.examples[:3], 2)
    rewards = [float(len(said(run, c)) >= 4) for c in samples]
    rewards[:4] = [0.0, 1.0, 0.0, 0.0]  # a group with a single success, which itself has no sibling

    reward_of = {id(c): reward for c, reward in zip(samples, rewards, strict=True)}  # two samples may be equal

    def checker(completions: Sequence[Completion], _: Any) -> list[Verdict]:
        return [Verdict(reward_of[id(c)]) for c in completions]

    student = copy.deepcopy(run.loaded.model).double()
    distilled, policy = plain_loss(run, student, samples, rewards, own)
    mixed = own.get("grpo", 0.0)
    ((1 - mixed) * distilled + mixed * policy).backward()
    parts = [
        BatchPart(part.name, replace(part.method, checker=checker), samples, part.method.weight)
        for part in run.stage.parts
    ]
    assert [part.name for part in parts] == (["task", "grpo"] if mixed else ["task"])
    run.optimizer.zero_grad()
    results = run.gradient.add(parts, Stopwatch(run.loaded.device))
    for result, loss in zip(results, (distilled, policy), strict=False):
        assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
        assert result.selected.reward() == pytest.approx(sum(rewards) / len(rewards))
    expected = gradients(student)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    assert largest_difference(gradients(run.loaded.model), expected) < 1e-5


@pytest.mark.parametrize("top_k", [None, 10**6])
def test_sdpo_that_shows_everything_and_compares_all_tokens_is_the_plain_divergence(
    all_of_them: Settings, write_rows: Callable[..., Path], top_k: int | None
) -> None:
    rows = write_rows([{"prompt": f"q{i}", "answer": "no such reply"} for i in range(4)], name="hard.jsonl")
    values: dict[str, Any] = {"data": str(rows), "batch_size": 3, "learning_rate": 1e-2}
    size = load_model(all_of_them().model).model.config.vocab_size
    own = {"show": "feedback", "top_k": top_k or size, "ema_rate": 0.3}
    run = moved(all_of_them(method="sdpo", method_settings=own, **values))
    run.step(1)
    task = run.stage.task
    samples = task.method.sequence(run.loaded, task.examples[:3], 2)
    (selected,) = run.selector([BatchPart("task", task.method, samples, 1.0)])
    shown = selected.completions
    assert [c.ids for c in shown] == [c.ids for c in samples]
    for c in shown:
        assert "the feedback on it:\n\nexpected 'no such reply', found " in run.chat.decode(c.example.teacher_ids or [])

    student, teacher = (copy.deepcopy(run.loaded.model).double() for _ in range(2))
    assert run.teacher is not None
    with torch.no_grad(), run.teacher.model() as network:
        teacher.load_state_dict(network.state_dict())
    plain = []
    for c in shown:
        log_p_TV = logits(student, c.example.student_ids, c.ids).log_softmax(-1)
        with torch.no_grad():
            log_q_TV = logits(teacher, c.example.teacher_ids or [], c.ids).log_softmax(-1)
        log_m_TV = ((log_p_TV.exp() + log_q_TV.exp()) / 2).log()
        plain.append((kl(log_q_TV, log_m_TV) + kl(log_p_TV, log_m_TV)) / 2)
    loss = mean_over_rows(plain)
    loss.backward()
    expected = gradients(student)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3

    ((of_sdft,),) = stages_of(all_of_them(method="sdft", divergence="jsd", ema_rate=0.3))
    for method, completions in ((task.method, samples), (of_sdft.method, shown)):
        run.optimizer.zero_grad()
        assert add_gradient(run, completions, method).loss == pytest.approx(float(loss.detach()), abs=1e-6)
        assert largest_difference(gradients(run.loaded.model), expected) < 1e-6


def test_a_checker_is_asked_once_about_the_same_samples(all_of_them: Settings) -> None:
    run = Trainer(all_of_them(method="sdpo", method_settings={"grpo": 0.5}))
    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:1], 2)
    asked = []

    def checker(completions: Sequence[Completion], _: Any) -> list[Verdict]:
        asked.append(len(completions))
        return [RIGHT] * len(completions)

    parts = [BatchPart(x.name, replace(x.method, checker=checker), samples, 0.5) for x in run.stage.parts]
    run.gradient.add(parts, Stopwatch(run.loaded.device))
    assert asked == [4]


@pytest.mark.parametrize("values", [{"teacher": "frozen"}, {"teacher_model": "other"}, {}], ids=str)
def test_a_mixture_as_teacher_takes_the_place_of_others(all_of_them: Settings, values: dict[str, Any]) -> None:
    own = {"trust_region": 0.5} if values else {"trust_region": 0.5, "ema_rate": 0.05}
    config = all_of_them(method="sdpo", method_settings=own, **values)
    with pytest.raises(UserError, match=r"mixes its own teacher: leave 'teacher', 'teacher_model' and 'ema_rate' out$"):
        stages_of(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "frozen", "method_settings": {"ema_rate": 0.1}}, "'ema_rate' needs teacher ema: leave it or the"),
        ({"teacher_model": "other", "method_settings": {"ema_rate": 0.1}}, "'ema_rate' needs teacher ema: leave it"),
        ({"method_settings": {"show": "feedback", "context": "turns"}}, "'context' shows siblings, found show 'feedb"),
    ],
    ids=str,
)
def test_own_settings_without_effect_are_refused(all_of_them: Settings, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^setting 'method_settings', {message}"):
        stages_of(all_of_them(method="sdpo", **values))


@pytest.mark.parametrize(("micro_batches", "success"), [(1, 1.0), (2, 1.0), (2, 0.5)])
def test_the_teachers_gain_is_apart_for_right_and_wrong_samples(
    all_of_them: Settings, micro_batches: int, success: float
) -> None:
    values: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": micro_batches, "learning_rate": 1e-2}
    run = moved(all_of_them(method="sdpo", success_reward=success, **values))
    samples = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:2], 2)
    results = judged(run, samples, [1.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])  # the fifth has no sibling
    student, teacher = (copy.deepcopy(run.loaded.model).double() for _ in range(2))
    assert run.teacher is not None
    with torch.no_grad(), run.teacher.model() as network:
        teacher.load_state_dict(network.state_dict())
    gains: dict[str, list[float]] = {"right": [], "wrong": []}
    with torch.no_grad():
        for c in results[0].selected.completions:
            mine, theirs = (
                chosen(logits(model, context or [], c.ids).log_softmax(-1), c.ids)
                for model, context in ((student, c.example.student_ids), (teacher, c.example.teacher_ids))
            )
            assert c.verdict is not None
            gains["right" if c.verdict.reward >= success else "wrong"].append(float((theirs - mine).mean()))
    assert [len(found) for found in gains.values()] == ([2, 5] if success == 1 else [3, 4])
    expected = {f"teacher_gain/{kind}": statistics.mean(found) for kind, found in gains.items()}
    assert min(map(abs, expected.values())) > 1e-3
    assert results[0].teacher_gains == pytest.approx(expected, abs=1e-5)


# --- steps and runs ---


def test_a_step_without_anything_to_learn_changes_nothing_and_says_so(
    all_of_them: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = write_rows([{"prompt": f"q{i}", "answer": "no such reply"} for i in range(4)], name="hard.jsonl")
    own = {"show": "sibling"}
    config = all_of_them(method="sdpo", data=str(rows), max_steps=3, weight_decay=0.1, method_settings=own)
    train(config)
    for line in metrics_of(config):
        assert (line["loss"], line["learnt"], line["reward"], line["grad_norm"], line["tokens"]) == (0, 0, 0, 0, 0)
        assert line["completion/length"] > 0
        assert "entropy" not in line
        assert "skipped" not in line
    before = load_model(config.model).model.state_dict()
    assert largest_difference(final_weights(config), {name: before[name] for name in final_weights(config)}) == 0


def test_the_teachers_view_is_of_samples_that_are_learnt(all_of_them: Settings) -> None:
    config = all_of_them(method="sdpo", view_rows=3)
    run = Trainer(config)
    views, asked = token_views(run), []
    rows = [run.stage.task.examples[number * len(run.stage.task.examples) // 3] for number in range(3)]
    samples = run.stage.task.method.sequence(run.loaded, rows, 0)
    (selected,) = run.selector([BatchPart("task", run.stage.task.method, samples, 1.0)])
    for row in rows:
        asked += [c for c in selected.completions if c.example.demonstration.row == row.demonstration.row][:1]
    assert [view["row"] for view in views] == [c.example.demonstration.source for c in asked]
    assert views
    for view, c in zip(views, asked, strict=True):
        assert "".join(token["text"] for token in view["tokens"]) == "".join(map(run.loaded.tokenizer.decode, c.ids))
        assert c.example.teacher_ids is not None
        logits_TV = logits(run.loaded.model, c.example.teacher_ids, c.ids)  # an EMA that has not moved
        expected = chosen(logits_TV.log_softmax(-1), c.ids).tolist()
        assert [token["logq"] for token in view["tokens"]] == pytest.approx(expected, abs=1e-4)


def test_the_report_shows_what_the_teacher_saw_and_not_the_rows_completion(
    all_of_them: Settings, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{i}", "completion": "the gold one", "answer": "no such reply"} for i in range(4)]
    data = str(write_rows(rows, name="hard.jsonl"))
    config = all_of_them(method="sdpo", data=data, view_rows=2, max_steps=1, method_settings={"show": "feedback"})
    train(config)
    lines = (Path(config.output_dir) / "token_views.jsonl").read_text(encoding="utf-8").splitlines()
    views = [json.loads(line) for line in lines]
    assert [view["step"] for view in views] == [0, 0, 1, 1]
    page = tmp_path / "report.html"
    assert main(["report", config.output_dir, "-o", str(page)]) == 0
    shown = html.unescape(page.read_text(encoding="utf-8"))
    for view in views:
        assert "the feedback on it:\n\nexpected 'no such reply', found " in view["teacher_sees"]
        assert view["teacher_sees"] in shown
        assert "the gold one" not in json.dumps(view)
    assert "the gold one" not in shown


def test_a_step_without_anything_to_learn_leaves_the_average_where_it_is(
    all_of_them: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = write_rows([{"prompt": f"q{i}", "answer": "no such reply"} for i in range(4)], name="hard.jsonl")
    run = Trainer(all_of_them(method="sdpo", data=str(rows), method_settings={"show": "sibling"}))
    assert run.teacher is not None
    with torch.no_grad():
        for weight in run.parameters:  # as earlier steps would
            weight.add_(0.01)
    before = copy.deepcopy(run.teacher.state_dict())
    assert run.step(0)["learnt"] == 0
    assert largest_difference(before, run.teacher.state_dict()) == 0


def test_anchors_are_learnt_where_the_task_has_nothing(
    all_of_them: Settings, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows([{"prompt": f"q{i}", "answer": "no such reply"} for i in range(4)], name="hard.jsonl")
    values: dict[str, Any] = {"anchors": str(tmp_path / "general.txt"), "anchor_share": 0.5}
    config = all_of_them(method="sdpo", data=str(rows), max_steps=2, method_settings={"show": "sibling"}, **values)
    train(config)
    last = metrics_of(config)[-1]
    assert (last["learnt"], last["loss/task"]) == (0, 0)
    assert last["tokens"] > 0


COMMON: dict[str, Any] = {"method": "sdpo", "batch_size": 3, "max_steps": 4, "save_steps": 2, "drift_steps": 2}
OWN: dict[str, Any] = {"context": "turns", "ema_rate": 0.3}
TRUSTED: dict[str, Any] = {"context": "turns", "trust_region": 0.3}
MIXED, TRUSTED_MIXED = ({"method_settings": own | {"grpo": 0.3}} for own in (OWN, TRUSTED))


def test_metrics_of_a_mixture(all_of_them: Settings) -> None:
    config = all_of_them(**COMMON | MIXED)
    train(config)
    for line in metrics_of(config):
        assert (line["share/task"], line["share/grpo"]) == (0.7, 0.3)
        assert line["loss"] == pytest.approx(0.7 * line["loss/task"] + 0.3 * line["loss/grpo"], abs=1e-7)
        assert line["unfit"] == 0
    assert {0 < line["learnt"] <= 1 for line in metrics_of(config)} == {True}
    assert min(line["learnt"] for line in metrics_of(config)) < 1
    gains = [line.keys() & {"teacher_gain/right", "teacher_gain/wrong"} for line in metrics_of(config)]
    assert all(bool(found) == bool(line["learnt"]) for found, line in zip(gains, metrics_of(config), strict=True))


@pytest.mark.parametrize("values", [MIXED, TRUSTED_MIXED], ids=str)
def test_a_killed_run_goes_on_to_the_same_bits(all_of_them: Settings, values: dict[str, Any]) -> None:
    whole, cut = (all_of_them(name, **COMMON | values) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(3))
    train(cut, resume=True)
    assert_same_run(whole, cut)


@pytest.mark.parametrize("values", [MIXED, TRUSTED_MIXED], ids=str)
def test_parts_of_a_batch_train_to_the_weights_of_the_whole(all_of_them: Settings, values: dict[str, Any]) -> None:
    trained_whole_and_in_parts(all_of_them, 3, COMMON | values)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(MIXED, id="copies"),
        pytest.param(
            {"fsdp": True, "batch_size": 2, "learning_rate": 3e-5, "method_settings": OWN},
            id="sharded",
            marks=pytest.mark.slow,
        ),
        pytest.param(TRUSTED_MIXED, id="trusted", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_to_the_weights_of_one(
    all_of_them: Settings, tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdistill.methods.grpo.engine_cap", lambda _: 2.0)  # so that importance is measured, too
    lines = trained_in_one_and_two(all_of_them, tmp_path, COMMON | values)
    assert min(line["learnt"] for line in lines) < 1
    assert any(line["importance"] for line in lines)


def test_a_mistake_of_the_scorer_on_one_rank_ends_both_in_one_line(
    all_of_them: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "import os\n\n\ndef right(reply, row):\n    return 2 if os.environ.get('RANK') == '1' else True\n"
    (tmp_path / "own_scorer_of_sdpo.py").write_text(text, encoding="utf-8")
    data = write_rows([{"prompt": f"q{i}"} for i in range(4)], name="plain.jsonl")
    config = all_of_them("two", **COMMON, data=str(data), scorer="python:own_scorer_of_sdpo.right")

    def work() -> int:
        with pytest.raises(UserError, match=r"right' returned 2, expected True or False, a reward from 0 to 1"):
            train(config)
        return 7

    children = started_together(work, tmp_path / "two")
    assert [child.wait() for child in children] == [7, 7]
