"""Episodes: what is sampled and what is scored, the loss over several turns, and how an environment may fail.

Dimensions in names: T tokens of an episode, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import broken_tools
import pytest
import tiny_worlds
import torch
from children import train_together
from conftest import (
    CHATML,
    ENDS,
    Cut,
    add_gradient,
    assert_same_run,
    crash_at,
    final_weights,
    gradients,
    largest_difference,
    methods_where,
    metrics_of,
    needs,
    quick,
    row_log_probs,
)
from formulas import advantages, assert_gradient, chosen, kl, mean_over_rows, moved
from tool_templates import HERMES, QWEN3_CODER
from torch import Tensor

from selfdistill.cli import main
from selfdistill.config import EngineSettings, load_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.data import (
    ChatFormat,
    ContextEncoder,
    Demonstration,
    Picture,
    Verdict,
    load_demonstrations,
    packaged,
)
from selfdistill.errors import UserError
from selfdistill.methods import Method, Part, begun, episodes, lacks_of, rules_of, stages_of, unused_settings
from selfdistill.methods.attempts import AttemptContexts
from selfdistill.methods.examples import OtherRows
from selfdistill.methods.sdft import sdft
from selfdistill.methods.sequences import Completion
from selfdistill.methods.sft import sft
from selfdistill.methods.worlds import Worlds, environment_of
from selfdistill.model import LoadedModel, Rollout, Sampling
from selfdistill.runtime import progress_shown
from selfdistill.training.first_lines import first_lines
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.selection import BatchPart
from selfdistill.training.stopwatch import Stopwatch
from selfdistill.training.token_views import token_views
from selfdistill.training.traced_step import Device
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]
TALK = "python:tiny_worlds.Talk"


@pytest.fixture
def talks(settings: Settings, write_rows: Callable[..., Path]) -> Settings:
    """Runs of episodes of one to four turns."""
    rows = [{"prompt": f"q{i}" * (1 + i % 3), "completion": "ab" * (1 + i % 4), "answer": 1 + i % 4} for i in range(6)]
    data = write_rows(rows, name="talks.jsonl")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        own: dict[str, Any] = {"data": str(data), "environment": TALK, "max_completion_length": 16}
        own |= {"max_episode_length": 200, "batch_size": 3, "max_steps": 3}
        return settings(out, **(own | values))

    return make


def episodes_of(run: Trainer, count: int = 6) -> list[Completion]:
    with run.accelerator.autocast():
        return list(run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:count], 1))


def evaluations_of(config: TrainConfig) -> list[dict[str, float]]:
    """The means of each evaluation of a run."""
    lines = (Path(config.output_dir) / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    means = ("accuracy", "episode/reward", "episode/turns", "episode/invalid_calls", "completion/length", "kl_base")
    return [{key: json.loads(line)[key] for key in means} for line in lines]


def own_of(values_T: Tensor, completion: Completion) -> Tensor:
    """The values at the student's own tokens."""
    is_own = [not any(start <= t < end for start, end in completion.given) for t in range(len(completion.ids))]
    return values_T[torch.tensor(is_own)]


# --- what is sampled ---


def test_an_episode_is_its_turns_one_after_another(talks: Settings) -> None:
    run = Trainer(talks())
    chat, found = run.chat, episodes_of(run)
    assert {c.turns for c in found} >= {1, 2, 3}
    for c in found:
        row, messages = c.example.demonstration, list(c.messages)
        assert [m["role"] for m in messages] == ["assistant", "user"] * (c.turns - 1) + ["assistant"]
        ids: list[int] = []
        given = []
        ends = [start for start, _ in c.given] + [len(c.ids)]
        starts = [0] + [end for _, end in c.given]
        for turn, (start, end) in enumerate(zip(starts, ends, strict=True)):
            reply = c.ids[start:end]
            assert messages[2 * turn] == chat.message_of(reply, c.example.student_ids + ids)
            ids += reply
            if turn < c.turns - 1:
                assert reply[-1] in run.loaded.end_token_ids
                before = [*row.prompt, *messages[: 2 * turn + 1]]
                between = chat.encode_between(before, [messages[2 * turn + 1]], row.template_options)
                given.append((len(ids), len(ids) + len(between)))
                ids += between
        assert (c.ids, list(c.given)) == (ids, given)
        assert c.logps is not None
        assert len(c.logps) == len(c.ids)
        assert not any(c.logps[t] for start, end in c.given for t in range(start, end))


def test_log_probabilities_are_those_of_one_pass_over_the_episode(talks: Settings) -> None:
    run = Trainer(talks())
    for c in episodes_of(run):
        with torch.no_grad():
            logp_T = chosen(row_log_probs(run.loaded.model, c.example.student_ids, c.ids), c.ids)
        assert own_of(torch.tensor(c.logps), c).tolist() == pytest.approx(own_of(logp_T, c).tolist(), abs=1e-5)


def test_the_first_reply_is_that_of_a_sample_without_an_environment(talks: Settings) -> None:
    episodes, run = episodes_of(Trainer(talks())), Trainer(talks(environment="none"))
    for c, reply in zip(episodes, episodes_of(run), strict=True):
        first = c.given[0][0] if c.given else len(c.ids)
        assert c.ids[:first] == reply.ids


def test_an_episode_does_not_depend_on_the_others(talks: Settings) -> None:
    run = Trainer(talks(num_generations=2))
    together = episodes_of(run)
    assert len({tuple(c.ids) for c in together}) > 8
    for number, example in enumerate(run.stage.task.examples[:6]):
        alone = run.stage.task.method.sequence(run.loaded, [example], 1)
        for one, other in zip(alone, together[2 * number : 2 * number + 2], strict=True):
            assert (one.ids, one.given, one.verdict, one.messages) == (
                other.ids,
                other.given,
                other.verdict,
                other.messages,
            )
            assert one.logps == pytest.approx(other.logps, abs=1e-5)


def test_verdicts_and_counts_are_the_environments(talks: Settings) -> None:
    for c in episodes_of(Trainer(talks())):
        assert c.verdict is not None
        size = len(c.messages[-1]["content"])
        if not c.truncated:
            assert c.turns == c.example.demonstration.answer
            assert (c.verdict.reward, c.verdict.feedback) == (1.0 if size > 4 else size / 8, f"{size} letters")
            assert c.invalid_calls == sum(turn % 2 for turn in range(1, c.turns))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"max_turns": 2}, "the episode was cut after 2 turns"),
        ({"max_episode_length": 50}, "the episode was cut near 50 tokens"),
        ({"max_completion_length": 3}, "the reply was cut after 3 tokens"),
    ],
)
def test_an_episode_that_is_cut_has_failed(talks: Settings, values: dict[str, Any], why: str) -> None:
    config = talks(**values)
    found = episodes_of(Trainer(config))
    cut = [c for c in found if c.truncated]
    assert why in {c.verdict.feedback for c in cut if c.verdict}
    assert all(c.verdict is not None and c.verdict.reward == 0 for c in cut)
    assert all(c.turns <= config.max_turns for c in found)
    assert all(len(c.ids) <= config.longest_completion for c in found)
    assert all(not c.given or c.given[-1][1] < len(c.ids) for c in found)  # none ends with an observation


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"max_turns": 2}, r"at turn 2: the episode was cut after 2 turns, so it has reward 0; raise max_turns"),
        (
            {"max_episode_length": 50},
            r"at turn \d: the episode was cut near 50 tokens, so it has reward 0; raise max_episode_length, which "
            "counts replies, observations, and room for one more reply",
        ),
        ({"max_completion_length": 3, "max_episode_length": 300}, None),
    ],
)
def test_the_first_episode_that_a_limit_cuts_is_noted_and_all_are_counted(
    talks: Settings, capsys: pytest.CaptureFixture[str], values: dict[str, Any], note: str | None
) -> None:
    config = talks(batch_size=6, max_steps=2, **values)
    with progress_shown(True):  # as every command does
        train(config)
    notes = re.findall(r"note: (.* the episode was cut .*)", capsys.readouterr().err)
    assert len(notes) == (note is not None)
    assert note is None or re.fullmatch(rf".*talks.jsonl:\d, {note}", notes[0])
    cut, truncated = ([line[name] for line in metrics_of(config)] for name in ("episode/cut", "completion/truncated"))
    assert all(x <= y for x, y in zip(cut, truncated, strict=True))
    assert any(cut) == (note is not None)
    assert any(truncated)


def test_the_first_reply_that_the_template_shows_otherwise_is_noted(
    talks: Settings, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    begins = "<|im_start|>assistant\n"
    template = CHATML.replace(begins, f"{begins}<think>\n\n</think>\n\n")
    noted = r"note: (.*talks.jsonl:\d: as an earlier turn, the chat template .*)"
    for out, model in (("plain", {}), ("thinks", {"template": template})):
        folder = str(model_folder(ends=ENDS, **model))
        for again in ("", "again"):
            with progress_shown(True):  # as every command does
                train(talks(out + again, model=folder, batch_size=6))
        notes = re.findall(noted, capsys.readouterr().err)
        assert len(notes) == 2 * (out == "thinks")
        assert all(" chat template leaves out the empty thought of the reply " in note for note in notes)
        assert all(
            note.endswith(
                "; here it stays as it was sampled, but applications that send the messages again show the "
                "model what the template writes"
            )
            for note in notes
        )


def test_only_the_first_episodes_are_compared_with_what_the_template_shows(
    talks: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Any] = []
    monkeypatch.setattr(episodes, "changed_when_shown_anew", lambda *given: compared.append(given) or "")
    monkeypatch.setattr(episodes, "COMPARED", 3)
    config = talks(batch_size=6, max_steps=3)
    train(config)
    assert sum(line["episode/turns"] > 1 for line in metrics_of(config)) == 3  # each step has episodes of several turns
    assert len(compared) == 3


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (
            {"max_completion_length": 2, "max_episode_length": 300},
            r"100% within a reply and 0% after one, .* learnt to end an episode; raise max_completion_length",
        ),
        (
            {"environment": "python:tiny_worlds.Unending", "max_turns": 1},
            r"\d+% within a reply and \d+% after one, .* an episode; raise max_turns or max_episode_length",
        ),
    ],
)
def test_a_run_whose_episodes_were_all_cut_says_at_its_end_what_cut_them(
    talks: Settings,
    model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    advice: str,
) -> None:
    if "environment" not in values:
        values |= {"model": str(model_folder(ends=(257,)))}
    train(talks(max_steps=2, **values))
    (note,) = re.findall(r"note: 100% of the episodes were cut, (.*)", capsys.readouterr().err)
    assert re.fullmatch(advice, note)


def test_a_model_that_reads_episodes_anew_at_every_turn_is_noted(
    talks: Settings, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "mistral"
    shutil.copytree(model_folder(ends=ENDS), model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    note = (
        "note: this model (sliding windows, recurrent layers or positions of its own) reads each episode anew at every "
        "turn; an engine keeps what it has read (setting engine)"
    )
    assert note in first_lines(Trainer(talks(model=str(model))))
    assert note not in first_lines(Trainer(talks(model=str(model), max_turns=1)))
    assert note not in first_lines(Trainer(talks(model=str(model), environment="none")))
    run = Trainer(talks())
    assert note not in first_lines(run)
    run.loaded.continues_cache = False
    assert note in first_lines(run)


def test_tools_and_what_the_environment_says_first_are_shown_to_both(
    talks: Settings, model_folder: Callable[..., Path]
) -> None:
    model = str(model_folder(ends=ENDS, room=1024))
    run = Trainer(talks(environment="python:tiny_worlds.Asks", model=model))
    for example in run.stage.task.examples:
        for ids in (example.student_ids, example.teacher_ids):
            assert f"Go on, {example.demonstration.answer} times." in run.chat.tokenizer.decode(ids)
            assert "look_up" in run.chat.tokenizer.decode(ids)
    assert all(c.turns >= 1 for c in episodes_of(run))


def test_without_kept_states_episodes_are_the_same(talks: Settings) -> None:
    run, other = Trainer(talks()), Trainer(talks())
    other.loaded.continues_cache = False
    for a, b in zip(episodes_of(run), episodes_of(other), strict=True):
        assert (a.ids, a.given) == (b.ids, b.given)


# --- what is learnt ---


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize("values", [{}, {"gradient_accumulation_steps": 3}, {"skip_first_tokens": 2}])
def test_the_gradient_is_that_of_the_divergence_over_the_students_tokens(
    talks: Settings, values: dict[str, Any], normalisation: Any
) -> None:
    run = moved(talks(loss_normalisation=normalisation, **values))
    completions = episodes_of(run)
    assert any(len(c.given) > 1 for c in completions)
    student = copy.deepcopy(run.loaded.model)
    losses = []
    for c in completions:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        assert run.teacher is not None
        with run.teacher.model() as network:
            log_q_TV = row_log_probs(network, c.example.teacher_ids or [], c.ids).detach()
        losses.append(own_of(kl(log_q_TV, log_p_TV), c)[run.config.skip_first_tokens :])
    losses = [loss_T for loss_T in losses if len(loss_T)]
    loss = torch.cat(losses).mean() if normalisation == "token" else mean_over_rows(losses)
    loss.backward()
    run.optimizer.zero_grad()
    assert add_gradient(run, completions).loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert largest_difference(gradients(run.loaded.model), gradients(student)) < 1e-5


def test_importance_weights_are_of_the_students_tokens_alone(talks: Settings) -> None:
    run = moved(talks(importance_cap=1.5))
    completions = [replace(c, logps=[0.9 * logp for logp in c.logps or []]) for c in episodes_of(run)]

    def values(student: Any, c: Completion) -> Tensor:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        with run.teacher.model() as network:  # type: ignore[union-attr]
            log_q_TV = row_log_probs(network, c.example.teacher_ids or [], c.ids).detach()
        ratio_T = (chosen(log_p_TV, c.ids).detach() - torch.tensor(c.logps)).exp().clamp(max=1.5)
        return own_of(kl(log_q_TV, log_p_TV), c) * own_of(ratio_T, c).mean()

    assert_gradient(run, completions, values)


def test_grpo_learns_from_the_environments_rewards(talks: Settings) -> None:
    run = Trainer(talks(method="grpo", num_generations=4))
    completions = episodes_of(run, 3)
    rewards = [c.verdict.reward for c in completions if c.verdict]
    student = copy.deepcopy(run.loaded.model)
    losses = [
        own_of(-advantage * chosen(row_log_probs(student, c.example.student_ids, c.ids), c.ids), c)
        for c, advantage in zip(completions, advantages(rewards, 4), strict=True)
    ]
    loss = mean_over_rows(losses)
    loss.backward()
    task = run.stage.task
    (result,) = run.gradient.add([BatchPart(task.name, task.method, completions, 1.0)], Stopwatch(run.loaded.device))
    assert result.selected.reward() == pytest.approx(sum(rewards) / len(rewards))
    assert 0 < sum(rewards) < len(rewards)
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert largest_difference(gradients(run.loaded.model), gradients(student)) < 1e-5


SAMPLE = methods_where(lambda method: rules_of(method) is not None, environment=TALK)


@pytest.mark.parametrize("method", quick(SAMPLE, "sdft", "grpo", "sdpo", "atesd"))
def test_methods_that_sample_run_in_an_environment(talks: Settings, tmp_path: Path, method: Any) -> None:
    (tmp_path / "general.txt").write_text("Who?\n\nWhy is that so?\nWhen\n", encoding="utf-8")
    own = needs(method, "")
    own |= {"num_generations": 2} if "num_generations" in own else {}
    config = talks(method=method, anchors=str(tmp_path / "general.txt"), max_steps=2, batch_size=4, **own)
    train(config)
    for line in metrics_of(config):
        assert 1 <= line["episode/turns"] <= 4
        assert 0 <= line["episode/success"] <= line["episode/reward"] <= 1
        assert line["episode/invalid_calls"] >= 0
        assert line["tokens"] > 0


def test_sdpos_teacher_sees_an_episode_that_succeeded(talks: Settings) -> None:
    run = Trainer(talks(method="sdpo", num_generations=3))
    task, completions = run.stage.task, episodes_of(run)
    (selected,) = run.selector([BatchPart(task.name, task.method, completions, 1.0)])
    assert selected.completions
    shown = 0
    for c in selected.completions:
        number = next(n for n, other in enumerate(completions) if other.ids is c.ids)
        group = completions[number - number % 3 : number - number % 3 + 3]
        right = [other for other in group if other.ids is not c.ids and other.verdict and other.verdict.reward == 1]
        if right:
            row = c.example.demonstration
            shown += len(right[0].messages) > 1
            messages = [*row.prompt, *right[0].messages, *row.prompt]
            assert c.example.teacher_ids == run.chat.encode_prompt(messages, row.template_options)
    assert shown
    with pytest.raises(UserError, match="found 'example', and only turns shows episodes"):
        stages_of(talks(method="sdpo", method_settings={"context": "example"}))


def test_sdpos_teacher_sees_an_episode_without_its_thoughts(talks: Settings) -> None:
    run = Trainer(talks(method="sdpo", num_generations=2))
    example = run.stage.task.examples[0]
    first = {"role": "assistant", "content": "<think>a long way</think>\nOne."}
    asked, last = {"role": "user", "content": "Go on."}, {"role": "assistant", "content": "<think></think>Two."}
    right = Completion(example, [1, 2, 3], None, False, verdict=Verdict(1.0), messages=(first, asked, last))
    wrong = replace(right, verdict=Verdict(0.0))
    contexts = AttemptContexts(2, "sibling", "turns", episodes=True)
    encode = ContextEncoder(run.chat, None, 16, run.loaded.window)
    (learnt,) = contexts([right, wrong], [Verdict(1.0), Verdict(0.0)], encode)
    seen = run.chat.tokenizer.decode(learnt.example.teacher_ids)
    assert "<|im_start|>assistant\nOne.<|im_end|>" in seen
    assert "<|im_start|>assistant\nTwo.<|im_end|>" in seen
    assert "think" not in seen
    assert right.messages[0] == first


def test_further_parts_that_sample_replies_play_episodes(talks: Settings) -> None:
    def mine(config: TrainConfig) -> Method:
        (task,), (shown,) = sdft(config), sft(config)
        parts = [Part(name, one, 1 / 3) for name, one in (("played", task), ("shown", shown))]
        others = [
            replace(x, method=replace(x.method, examples=OtherRows(config, config.data, x.method.examples)))
            for x in parts
        ]
        return replace(task, beside=tuple(others))

    run = Trainer(talks(method=mine))
    metrics = run.step(0)
    assert [rules_of(part.method) is not None for part in run.stage.parts] == [True, True, False]
    assert [metrics[f"share/{name}"] for name in ("task", "played", "shown")] == [1 / 3] * 3


def test_views_of_tokens_are_of_episodes(talks: Settings) -> None:
    config = talks(max_steps=1, view_rows=6)
    train(config)
    lines = (Path(config.output_dir) / "token_views.jsonl").read_text(encoding="utf-8").splitlines()
    views = [json.loads(line) for line in lines]
    assert len(views) == 12
    assert any(len(view["tokens"]) > config.max_completion_length for view in views)
    assert any(len(view["turns"]) > 1 for view in views)
    for view in views:
        assert sum(turn["tokens"] for turn in view["turns"]) == len(view["tokens"])
        assert [len(turn["observations"]) for turn in view["turns"]] == [1] * (len(view["turns"]) - 1) + [0]
        assert all(o["speaker"] == "user" and "?" in o["text"] for turn in view["turns"] for o in turn["observations"])
        assert view["feedback"]
        assert 0 <= view["reward"] <= 1
    assert not any("<|im_start|>" in token["text"] for view in views for token in view["tokens"])


def test_views_show_tools_and_the_prompts_earlier_turns(
    talks: Settings, model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    data = str(write_rows([{"prompt": prompt, "completion": "ab", "answer": 2}], name="one.jsonl"))
    model = str(model_folder(ends=ENDS, room=1024))
    run = Trainer(talks(data=data, model=model, environment="python:tiny_worlds.Asks", view_rows=1, batch_size=1))
    (view,) = token_views(run)
    assert (view["before"], view["prompt"]) == ("system: Be brief.\nuser: q", "Go on, 2 times.")
    assert [json.loads(tool) for tool in view["tools"]] == [tiny_worlds.LOOK_UP["function"]]


@pytest.mark.parametrize("method", ["sdft", "grpo"])
def test_a_character_of_several_tokens_is_shown_whole(
    talks: Settings, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    own = {"num_generations": 2} if method == "grpo" else {}
    run = Trainer(talks(method=method, view_rows=2, **own))
    ids = [*run.chat.encode_text("a 界😀"), run.chat.end_token_id]
    monkeypatch.setattr("selfdistill.methods.episodes.TurnSampler", partial(Always, ids))
    for view in token_views(run):
        texts = [token["text"] for token in view["tokens"]]
        assert texts[:10] == ["a", " ", "", "", "界", "", "", "", "😀", "<|im_end|>"]


class Always:
    """A sampler of one and the same reply."""

    def __init__(self, ids: list[int], *_: Any) -> None:
        self._ids = ids

    def __call__(self, episodes: list[int], *_: Any) -> list[Rollout]:
        return [Rollout(self._ids, [-0.5] * len(self._ids), truncated=False) for _ in episodes]


def test_without_a_teacher_views_are_transcripts(talks: Settings, tmp_path: Path) -> None:
    config = talks(method="grpo", num_generations=2, max_steps=1, view_rows=3)
    train(config)
    lines = (Path(config.output_dir) / "token_views.jsonl").read_text(encoding="utf-8").splitlines()
    views = [json.loads(line) for line in lines]
    assert [view["step"] for view in views] == [0, 0, 0, 1, 1, 1]
    for view in views:
        assert sum(turn["tokens"] for turn in view["turns"]) == len(view["tokens"]) > 0
        assert all(token.keys() == {"text"} for token in view["tokens"])
    scored = token_views(Trainer(talks("coloured", view_rows=3)))
    for view, other in zip(views[:3], scored, strict=True):  # the same episodes as those that a teacher colours
        assert [token["text"] for token in view["tokens"]] == [token["text"] for token in other["tokens"]]
        assert (view["turns"], view["reward"]) == (other["turns"], other["reward"])
    page = tmp_path / "report.html"
    assert main(["report", config.output_dir, "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Step 1, " in text
    assert 'class="token ' not in text
    assert "First-token profile" not in text
    sft = talks("sft", method="sft", max_steps=1)
    train(sft)
    assert not (Path(sft.output_dir) / "token_views.jsonl").exists()


@pytest.mark.parametrize("method", ["sdft", "msd"])
def test_metrics_are_those_of_the_episodes(talks: Settings, method: Any) -> None:
    run, before = (Trainer(talks(method=method, loss_normalisation="token", batch_size=6)) for _ in range(2))
    metrics = run.step(0)
    found = before.stage.task.method.sequence(before.loaded, before.stage.task.examples, 0)
    assert metrics["episode/turns"] == pytest.approx(sum(c.turns for c in found) / 6)
    own = [sum(c.is_own) for c in found]
    assert metrics["completion/length"] == pytest.approx(sum(own) / 6)
    assert metrics["tokens"] == sum(own)
    assert metrics["completion/truncated"] == pytest.approx(sum(c.truncated for c in found) / 6)
    numbers = [turn for c in found for turn, is_own in zip(c.reply_numbers, c.is_own, strict=True) if is_own]
    losses = [metrics[f"turn_loss/{turn}"] for turn in numbers]
    assert sum(losses) / sum(own) == pytest.approx(metrics["loss"], abs=1e-5)
    assert {f"turn_loss/{turn}" for turn in numbers} == {name for name in metrics if name.startswith("turn_loss/")}


# --- runs ---


def test_a_resumed_run_is_the_uninterrupted_one(talks: Settings) -> None:
    whole, cut = talks("whole", save_steps=1, max_steps=4), talks("cut", save_steps=1, max_steps=4)
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(2))
    train(cut, resume=True)
    assert_same_run(whole, cut)
    assert tiny_worlds.Talk.open == 0


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="sdft", marks=pytest.mark.slow),
        pytest.param({"method": "grpo", "num_generations": 2}, id="grpo"),
        pytest.param({"fsdp": True, "batch_size": 4}, id="sharded", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_to_the_weights_of_one(talks: Settings, tmp_path: Path, values: dict[str, Any]) -> None:
    values = values | {"test": talks().data}
    one, two = talks("one", **values | {"fsdp": False}), talks("two", **values)
    train(one)
    train_together(two, tmp_path)
    for a, b in zip(evaluations_of(one), evaluations_of(two), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert largest_difference(final_weights(one), final_weights(two)) < 1e-5
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.slow
def test_a_plan_of_memory_counts_whole_episodes(talks: Settings) -> None:
    def length(**values: Any) -> tuple[int, int]:
        config = talks(**values)
        return MemoryPlanner(config, load_demonstrations(config.data), Device("cpu", "no")).plan(config).lengths

    short, long = length(max_episode_length=16), length(max_episode_length=216)
    assert [b - a for a, b in zip(short, long, strict=True)] == [200, 200]
    assert short == length(environment="none")


def test_a_plan_of_memory_counts_longer_episodes_of_a_cold_start(
    talks: Settings, write_rows: Callable[..., Path]
) -> None:
    says = [{"role": role, "content": "ab"} for role in ("assistant", "user") * 4]
    data = str(write_rows([{"prompt": "q", "completion": says[:-1], "answer": 1}], name="long.jsonl"))
    config = talks(data=data, context="turns", cold_start_steps=1, max_episode_length=16)
    (example,) = Trainer(config).stage.task.examples
    lengths = MemoryPlanner(config, load_demonstrations(data), Device("cpu", "no")).plan(config).lengths
    prompts = len(example.student_ids), len(example.teacher_ids or [])
    assert lengths == tuple(prompt + len(example.completion_ids) for prompt in prompts)


# --- mistakes ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "ssd"}, "setting 'environment': ssd does not learn from whole episodes"),
        ({"method": "pope"}, "setting 'environment': pope does not learn from whole episodes"),
        ({"environment": "bundled:no"}, "unknown environment 'bundled:no'"),
        ({"method": "trapo"}, "setting 'environment': trapo does not learn from whole episodes"),
        ({"method": "actguide"}, "setting 'environment': actguide does not learn from whole episodes"),
        ({"method": "npo", "teacher_model": "m"}, "setting 'environment': npo does not learn from whole episodes"),
        (
            {"hint": "shortest"},
            "setting 'hint': shortest needs single replies, not episodes: leave it or the environment out",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(talks: Settings, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stages_of(talks(**values))


@pytest.mark.parametrize("values", [{"hint": "0.5"}, {"hint": "1:0.5"}, {"method": "atesd"}], ids=str)
def test_a_teacher_that_sees_parts_refuses_episodes(
    talks: Settings, write_rows: Callable[..., Path], values: dict[str, Any]
) -> None:
    told = [{"role": role, "content": "a b"} for role in ("assistant", "user", "assistant")]
    data = write_rows([{"prompt": "q", "completion": told, "answer": 2}], name="told.jsonl")
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used: .*: the teacher cannot see a part of an episode"):
        Trainer(talks(data=str(data), context="turns", **values))


@pytest.mark.parametrize(
    "values",
    [
        {"context": "turns:repeats=2,show=turn"},
        {"method": "sdpo", "num_generations": 2, "method_settings": {"context": "turns:repeats=2,show=turn"}},
    ],
    ids=["sdft", "sdpo"],
)
def test_a_context_that_shows_one_turn_is_refused(talks: Settings, values: dict[str, Any]) -> None:
    message = "^context 'turns:repeats=2,show=turn': it shows a single reply, but in an environment whole episodes are "
    message += "sampled; leave show=turn out$"
    with pytest.raises(UserError, match=message) as caught:
        lacks_of(stages_of(talks(**values)))(Demonstration("q", "a"))
    assert "\n" not in str(caught.value)
    lacks_of(stages_of(talks(environment="none", context="turns:show=turn")))(Demonstration("q", "a"))


def test_a_template_whose_calls_are_not_read_plays_without_tools_alone(
    talks: Settings, model_folder: Callable[..., Path]
) -> None:
    other = QWEN3_CODER.replace("'<parameter=' + key + '>\n'", "'<' + key + '>\n'")
    assert other != QWEN3_CODER
    model = str(model_folder(template=other, ends=ENDS, room=4096))
    assert len(episodes_of(Trainer(talks(model=model)), 2)) == 2
    run = Trainer(talks(model=model, environment="python:tiny_worlds.Asks"))
    with pytest.raises(UserError, match=r"environment 'python:tiny_worlds\.Asks': it has tools, but the model's chat"):
        episodes_of(run, 2)


def test_limits_are_checked(talks: Settings) -> None:
    with pytest.raises(UserError, match="'max_episode_length': found 10, expected at least max_completion_length, 16"):
        talks(max_episode_length=10)
    with pytest.raises(UserError, match="setting 'max_episode_length': 600 leaves no room for a prompt"):
        Trainer(talks(max_episode_length=600))
    with pytest.raises(UserError, match=r"6 of 6 rows do not fit.*lower max_episode_length"):
        Trainer(talks(max_episode_length=500))


def test_a_demonstrated_reply_is_limited_as_a_sampled_one(talks: Settings) -> None:
    Trainer(talks(method="sft", max_completion_length=9))  # the longest has eight letters and an end token
    message = r"2 of 6 rows do not fit: .* 7, 9 tokens, limit 6 \(max_completion_length\); raise max_completion_length,"
    with pytest.raises(UserError, match=message):
        Trainer(talks(method="sft", max_completion_length=6))


@pytest.mark.parametrize("method", ["sft", "dft", "eaft", "cpt", "sft_reinvoke"])
def test_methods_that_learn_the_data_as_they_are_stay_as_they_are(talks: Settings, method: Any) -> None:
    def sequences(**values: Any) -> list[Any]:
        return [part.method.sequence for parts in stages_of(talks(method=method, **values)) for part in parts]

    assert sequences() == sequences(environment="none")
    assert unused_settings(talks(method=method)) == ["context"]


def test_auto_finds_a_context_by_episodes(talks: Settings) -> None:
    config = talks(context="auto", max_steps=1)
    train(config)
    written = load_yaml(Path(config.output_dir) / "config.yaml", TrainConfig)
    assert str(written["context"]).split(":")[0] in ("turns", "example", "few_shot")


def test_settings_of_episodes_are_noted_without_an_environment(talks: Settings) -> None:
    assert unused_settings(talks(environment="none", max_turns=3)) == ["max_turns", "max_episode_length"]
    assert unused_settings(talks(max_turns=3)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BreaksAtStart", r"talks.jsonl:1, at its start: .*ZeroDivisionError"),
        ("Lies", r"talks.jsonl:\d, at turn 2: .*expected a Step"),
        ("Mute", r"talks.jsonl:\d, at turn 1: environment .* returned neither observations nor the end"),
        ("Restless", r"talks.jsonl:\d: environment .* began with different messages from before"),
    ],
)
def test_an_environment_that_fails_is_named_with_its_row(talks: Settings, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(talks(environment=f"python:tiny_worlds.{name}"))
    assert "\n" not in str(caught.value)
    end = time.monotonic() + 20
    while getattr(tiny_worlds, name).open and time.monotonic() < end:
        time.sleep(0.01)  # one that was being made is closed by its own thread
    assert getattr(tiny_worlds, name).open == 0


def test_an_environment_that_cannot_be_closed_changes_nothing(talks: Settings) -> None:
    config, other = talks(), talks("other", environment="python:tiny_worlds.BreaksAtEnd")
    train(config)
    train(other)
    assert metrics_of(config) == metrics_of(other)
    assert tiny_worlds.BreaksAtEnd.open == 0


def test_the_first_step_that_fails_is_noted_with_its_row(talks: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("once", "again"):
        with progress_shown(True):  # as every command does
            train(talks(out, environment="python:tiny_worlds.Breaks"))
        notes = re.findall(r"note: (.* failed: .*)", capsys.readouterr().err)
        assert len(notes) == 1
        failed = r"environment 'python:tiny_worlds.Breaks': step failed: KeyError: 'no assistant'"
        assert re.fullmatch(rf".*talks.jsonl:\d, at turn 1: {failed}; the episode has reward 0", notes[0])


def test_the_first_episode_that_a_template_refuses_is_noted_with_its_row(
    talks: Settings, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    strict = (
        "{% for m in messages if m.content == 'Meanwhile.' %}{{ raise_exception('no narrators') }}{% endfor %}" + CHATML
    )
    model = str(model_folder(template=strict, ends=ENDS))
    config = talks(model=model, environment="python:tiny_worlds.Narrates")
    with progress_shown(True):  # as every command does
        train(config)
    notes = re.findall(r"note: (.* has reward 0)", capsys.readouterr().err)
    assert len(notes) == 1
    assert re.match(r".*talks.jsonl:\d, at turn 1: the chat template rejects the roles .*: no narrators;", notes[0])
    assert all(line["completion/truncated"] == 1 for line in metrics_of(config))


def test_an_observation_that_is_cut_is_noted_once_in_a_run_with_its_row(
    talks: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("once", "again"):
        with progress_shown(True):  # as every command does
            train(talks(out, environment="python:tiny_worlds.Rambles"))
        notes = re.findall(r"note: (.* was cut; .*)", capsys.readouterr().err)
        assert len(notes) == 1
        cut = r"an observation of at least 30 characters was cut; a class may raise its observation_limit"
        assert re.fullmatch(rf".*talks.jsonl:\d, at turn 1: {cut}", notes[0])
    train(talks("short"))
    assert "was cut; a class" not in capsys.readouterr().err


def test_environments_are_made_at_the_same_time() -> None:
    rows = [Demonstration("q", answer=number) for number in range(1, 21)]
    start = time.monotonic()
    assert len(begun("python:tiny_worlds.Slow", rows)) == 20
    assert time.monotonic() - start < 2.5  # one after another, 4 seconds


def test_episodes_with_other_tools_are_refused() -> None:
    rows = [Demonstration("q", answer=number, source=f"data:{number}") for number in (1, 2)]
    with pytest.raises(
        UserError, match=r"^data:2: environment '.*Fickle' has different tools from data:1, expected the"
    ):
        begun("python:tiny_worlds.Fickle", rows)


def test_a_row_far_behind_with_other_tools_is_refused_before_the_first_step() -> None:
    rows = [Demonstration("q", answer=number, source=f"data:{number}") for number in range(1, 34)]
    environment_of("python:tiny_worlds.Outlier")  # makes one to see its form
    tiny_worlds.Outlier.made = itertools.count()
    with pytest.raises(UserError, match=r"^data:33: .*Outlier' has different tools from data:1, expected the same in"):
        begun("python:tiny_worlds.Outlier", rows)


def test_an_episode_with_other_tools_than_its_row_shows_is_refused() -> None:
    tiny_worlds.Outlier.made = itertools.count(100)
    (row,) = begun("python:tiny_worlds.Outlier", [Demonstration("q", answer=1, source="data:1")])
    tiny_worlds.Outlier.made = itertools.count(32)
    with Worlds("python:tiny_worlds.Outlier", [row]) as worlds, pytest.raises(UserError, match=r"tools from before"):
        worlds.reset()


def test_many_episodes_may_call_async_tools_at_once() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 100  # with three files each
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * count, before[1]))
    try:
        rows = begun("python:tiny_worlds.Sleepy", [Demonstration("q", source=f"data:{n}") for n in range(count)])
        with Worlds("python:tiny_worlds.Sleepy", rows) as worlds:
            worlds.reset()
            call = {"function": {"name": "nap", "arguments": {}}}
            steps = worlds.step(range(count), [{"role": "assistant", "content": "", "tool_calls": [call]}] * count, 1)
        assert {one["content"] for step in steps for one in step.observations} == {"awake"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_rows_with_pictures_are_refused() -> None:
    rows = [Demonstration("Look.", "a kettle", source="a:1", images=(Picture("0" * 64),)), Demonstration("Say.", "so")]
    with pytest.raises(UserError, match=r"1 of 2 rows have pictures, but episodes support only text \(a:1\)"):
        begun(TALK, rows)


def test_a_method_that_needs_rewards_says_that_there_are_none(talks: Settings) -> None:
    with pytest.raises(UserError, match=r"talks.jsonl:\d: environment .*Silent' ended the episode without a reward"):
        train(talks(environment="python:tiny_worlds.Silent", method="grpo", num_generations=2))
    config = talks("learns", environment="python:tiny_worlds.Silent", max_turns=2)
    train(config)
    lines = metrics_of(config)
    assert any(line["completion/truncated"] for line in lines)
    assert not any("episode/reward" in line for line in lines if line["completion/truncated"] < 1)


@pytest.mark.parametrize("environment", ["python:tiny_worlds.OnlyTools", tiny_worlds.FUNCTIONS], ids=["class", "list"])
def test_where_there_are_no_rewards_the_scorer_gives_them(
    talks: Settings, model_folder: Callable[..., Path], environment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, own = str(model_folder(ends=ENDS, room=1024)), {"method": "grpo", "num_generations": 4}
    config = talks(model=model, environment=environment, scorer="python:tiny_worlds.long_enough", **own)
    train(config)
    assert "episodes of up to 8 turns and 200 tokens, whose last replies the scorer judges" in capsys.readouterr().err
    assert any(0 < line["reward"] < 1 for line in metrics_of(config))
    for line in metrics_of(config):
        assert line["episode/reward"] == line["reward"]
    written = (Path(config.output_dir) / "config.yaml").read_text(encoding="utf-8")
    assert "\nscorer: python:tiny_worlds.long_enough\n" in written


@pytest.mark.parametrize("method", ["grpo", "sdpo"])
def test_views_have_the_verdicts_of_the_scorer(
    talks: Settings, model_folder: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    model, own = str(model_folder(ends=ENDS, room=1024)), {"method": method, "num_generations": 4, "max_steps": 1}
    own |= {"scorer": "python:tiny_worlds.long_enough", "view_rows": 6}
    config = talks(model=model, environment=tiny_worlds.FUNCTIONS, **own)
    train(config)
    lines = (Path(config.output_dir) / "token_views.jsonl").read_text(encoding="utf-8").splitlines()
    views = [json.loads(line) for line in lines]
    whole = [view for view in views if not view["truncated"]]
    assert {view["reward"] for view in whole} >= {1}
    for view in whole:
        said = "".join(token["text"] for token in view["tokens"][:-1])  # without the end token
        assert view["reward"] == (len(said.strip()) > 4)
    page = tmp_path / "report.html"
    assert main(["report", config.output_dir, "-o", str(page)]) == 0
    assert "not judged" not in page.read_text(encoding="utf-8")


def test_an_episode_of_a_run_is_judged_by_its_last_reply_alone(
    talks: Settings, model_folder: Callable[..., Path]
) -> None:
    model, own = str(model_folder(ends=ENDS, room=1024)), {"num_generations": 2, "scorer": "contains"}
    run = Trainer(talks(model=model, environment="python:tiny_worlds.FUNCTIONS", method="grpo", **own))
    chat, (example, *_) = run.chat, run.stage.task.examples
    ids: list[int] = []
    given = []
    for text in ("1", "2"):
        between = chat.encode_text("?") if ids else []
        given += [(len(ids), len(ids) + 1)] if ids else []
        ids += [*between, *chat.encode_reply({"role": "assistant", "content": text}, {})]
    rows = [replace(example.demonstration, answer=answer) for answer in (1, 2)]
    episodes = [
        Completion(replace(example, demonstration=row), ids, None, False, given=tuple(given), turns=2) for row in rows
    ]
    checker = run.stage.task.method.checker
    assert checker is not None
    assert [verdict.reward for verdict in checker(episodes, chat)] == [0, 1]


# --- tools ---


class Expert:
    """An engine that says what a demonstration says."""

    def __init__(self, chat: ChatFormat, row: Demonstration) -> None:
        replies = [message for message in row.episode if message["role"] == "assistant"]
        self._left = [chat.encode_reply(message, row.template_options) for message in replies]
        self.asked: list[list[int]] = []

    def sample(self, loaded: LoadedModel, prompts: list[list[int]], *_: Any) -> list[Rollout]:
        self.asked += prompts
        ids = self._left.pop(0)
        return [Rollout(ids, [-0.5] * len(ids), truncated=False) for _ in prompts]


@pytest.mark.parametrize("template", [CHATML, HERMES, QWEN3_CODER], ids=["calls as text", "calls as JSON", "in tags"])
def test_an_expert_with_an_engine_calls_tools_and_succeeds(
    talks: Settings, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    model = str(model_folder(template=template, room=8192))
    own = {"data": str(packaged("shop.train.jsonl")), "environment": "bundled:shop", "max_turns": 12}
    run = Trainer(talks(model=model, max_completion_length=200, max_episode_length=3000, **own))
    run.loaded.engine = EngineSettings(engine="vllm")
    for example in run.stage.task.examples[:12]:
        row = example.demonstration
        expert = Expert(run.chat, row)
        monkeypatch.setattr("selfdistill.model.sampling.engine_for", lambda _, expert=expert: expert)
        (completion,) = run.stage.task.method.sequence(run.loaded, [example], 0)
        assert completion.verdict is not None
        assert completion.verdict.reward == 1, completion
        assert not completion.truncated
        assert completion.invalid_calls == 0
        told = [(m["role"], m["content"], m.get("tool_calls")) for m in completion.messages]
        assert told == [(m["role"], m["content"], m.get("tool_calls")) for m in row.episode]
        assert expert.asked[-1] == example.student_ids + completion.ids[: completion.given[-1][1]]
        assert set(completion.logps or []) == {-0.5, 0.0}
        assert (completion.ids, completion.given) == (example.completion_ids, example.given)  # as SFT learns it


class BrokenCases:
    """A sampler that first calls broken tools, then one that works, and is then done."""

    def __init__(self, loaded: LoadedModel, count: int) -> None:
        self._loaded, self._turn = loaded, -1

    def __call__(
        self, episodes: list[int], prompts: list[list[int]], sampling: Sampling, seeds: list[int]
    ) -> list[Rollout]:
        self._turn += 1
        texts = [self._loaded.tokenizer.decode(prompt) for prompt in prompts]
        cases = [int(re.findall(r"case (\d+)\.", text)[0]) for text in texts]
        return [self._rollout(self._said(case), sampling.max_completion_length) for case in cases]

    def _said(self, case: int) -> str:
        works = '<tool_call>\n{"name": "weigh", "arguments": {"item": "a"}}\n</tool_call>'
        return [broken_tools.case_of(case)[1], works, "Done."][self._turn]

    def _rollout(self, text: str, limit: int) -> Rollout:
        ids = [*self._loaded.tokenizer.encode(text, add_special_tokens=False), self._loaded.end_token_ids[0]]
        return Rollout(ids[:limit], [-0.5] * len(ids[:limit]), truncated=len(ids) > limit)


@pytest.fixture
def broken(
    talks: Settings,
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    """Runs in which every case of a broken tool comes once."""
    monkeypatch.setattr("selfdistill.methods.episodes.TurnSampler", BrokenCases)
    model = str(model_folder(template=HERMES, ends=ENDS, room=16384))
    own: dict[str, Any] = {"model": model, "environment": "python:broken_tools.Broken", "view_rows": 0}

    def make(cases: range = range(broken_tools.CASES), **values: Any) -> TrainConfig:
        rows = [{"prompt": f"case {number}.", "completion": "Done.", "answer": number} for number in cases]
        own["data"] = str(write_rows(rows, name="cases.jsonl"))
        return talks(**own | {"max_completion_length": 5200, "max_episode_length": 14000} | values)

    return make


@pytest.mark.property
def test_episodes_with_broken_tools_end(broken: Settings) -> None:
    begun = time.monotonic()
    found = episodes_of(Trainer(broken()), broken_tools.CASES)
    assert time.monotonic() - begun < 60
    assert len(found) == broken_tools.CASES
    ends: Counter[str] = Counter()
    for c in found:
        assert c.verdict is not None
        told = [message for message in c.messages if message["role"] != "assistant"]
        assert all(message["content"].strip() and len(message["content"]) <= 2010 for message in told)
        errors = [message["content"] for message in told if message["content"].startswith("Error: ")]
        assert not any("\n" in error for error in errors)
        if c.truncated:
            assert c.verdict.feedback.startswith(
                ("the reply was cut after 5200 tokens", "the episode was cut near 14000")
            )
            ends["cut"] += 1
        elif c.turns == 3:
            late = c.verdict.feedback == "a tool is still running, so the episode cannot be judged"
            # Loops of other episodes, until they are stopped, may keep a call that works from its processor.
            assert told[1]["content"] == "a 1" or re.search("longer than|still running", told[1]["content"])
            assert c.verdict.reward == (0 if late else 1)
            ends["done"] += told[1]["content"] == "a 1" and not late
            ends["error"] += told[0]["content"].startswith("Error: ")
            ends["invalid"] += c.invalid_calls
        else:
            ends["no call"] += 1
    assert ends["done"] > 120
    assert ends["error"] > 60
    assert ends["invalid"] > 20
    assert ends["cut"] < 20
    assert not ends["no call"]


def test_a_run_with_broken_tools_goes_on(broken: Settings) -> None:
    own: dict[str, Any] = {"max_completion_length": 120, "max_episode_length": 1200}
    config = broken(range(12), batch_size=6, max_steps=2, **own)
    train(config)
    for line in metrics_of(config):
        assert line["tokens"] > 0
        assert "skipped" not in line
        assert 1 < line["episode/turns"] <= 3
        assert 0 < line["episode/success"] <= 1


def test_a_base_models_reply_that_begins_the_next_turn_is_followed_by_the_rest_of_it(
    talks: Settings, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(talks(model=str(model_folder(template=None, room=1024))))
    run.loaded.engine = EngineSettings(engine="vllm")
    ids = run.chat.encode_text(" Hello.\n\nUser:")
    engine = Expert(run.chat, run.stage.task.examples[0].demonstration)
    monkeypatch.setattr(
        engine, "sample", lambda _, prompts, *__: [Rollout(ids, [-0.5] * len(ids), False)] * len(prompts)
    )
    monkeypatch.setattr("selfdistill.model.sampling.engine_for", lambda _: engine)
    for c in episodes_of(run):
        turns = [" Hello.\n\nUser:"] * c.turns
        between = [f" {m['content']}\n\nAssistant:" for m in c.messages if m["role"] == "user"]
        assert run.chat.tokenizer.decode(c.ids) == "".join(map("".join, zip(turns, [*between, ""], strict=True)))
        assert {m["content"] for m in c.messages if m["role"] == "assistant"} == {"Hello."}
