"""NPO: which samples of the later model are found, whom they replace, the loss against float64 code, limits, resuming.

Dimensions in names: T completion tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    ENDS,
    Cut,
    assert_same_run,
    crash_at,
    final_weights,
    gradients,
    largest_difference,
    metrics_of,
    row_log_probs,
    same,
)
from formulas import (
    advantages,
    chosen,
    judged,
    mean_over_rows,
    moved,
    trained_in_one_and_two,
    trained_whole_and_in_parts,
)

from selfdistill.config.train import TrainConfig
from selfdistill.data import Verdict, load_demonstrations
from selfdistill.errors import UserError
from selfdistill.methods import encoder_of
from selfdistill.methods.sequences import Completion
from selfdistill.model import Sampling, load_model, sample, sample_seed
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.traced_step import Device
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

Settings = Callable[..., TrainConfig]


@pytest.fixture
def later(all_of_them: Settings, write_rows: Callable[..., Path]) -> Settings:
    """A reply is right if it has one of a few letters; to the last prompt none is."""
    rows = [{"prompt": f"q{i}", "scorer": "regex", "answer": "[a-h]"} for i in range(5)]
    rows.append({"prompt": "q5", "scorer": "regex", "answer": "never said"})
    data = write_rows(rows, name="letters.jsonl")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        fixed: dict[str, Any] = {"method": "npo", "data": str(data), "batch_size": 3, "num_generations": 3}
        return all_of_them(out, **(fixed | values))

    return make


def test_the_first_right_sample_of_the_later_model(later: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    config = later(method_settings={"tries": 20})
    run, model = Trainer(config), load_model(str(config.teacher_model))
    assert config.teacher_model != config.model
    found = {x.demonstration.row: x.completion_ids for x in run.stage.task.examples}
    at_once = 0
    for x in run.stage.task.examples:
        tries = [
            sample(model, [x.student_ids], Sampling(10), [sample_seed(0, 0, x.demonstration.row, number)])[0]
            for number in range(20)
        ]
        right = [r.ids for r in tries if set("abcdefgh") & set(run.chat.decode(r.ids)) and not r.truncated]
        assert found[x.demonstration.row] == ([] if x.demonstration.row == 5 else (right or [[]])[0])
        at_once += found[x.demonstration.row] == tries[0].ids
    solved = sum(map(bool, found.values()))
    assert solved >= 3
    rate = f"{at_once} of 6 first samples are right, and {solved} of 6 prompts have a right one among up to 20"
    assert f"{config.teacher_model}: {rate}\n" in capsys.readouterr().err
    assert not run.teachers  # it is not held


@pytest.mark.parametrize(
    "values", [{}, {"gradient_accumulation_steps": 3, "method_settings": {"weight": 0.3}}], ids=str
)
def test_npo_is_grpo_with_a_success_in_place_of_a_failure(later: Settings, values: dict[str, Any]) -> None:
    run = moved(later(learning_rate=1e-2, **values))
    ids = [run.loaded.tokenizer("abba")["input_ids"] + [ENDS[0]], [], [1, 2, ENDS[0]]]
    examples = [replace(x, completion_ids=y) for x, y in zip(run.stage.task.examples, ids, strict=False)]
    samples = run.stage.task.method.sequence(run.loaded, examples, 1)
    rewards = [0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]  # of the first prompt no sample is right, nor of the second
    student = copy.deepcopy(run.loaded.model).double()
    weight, losses = run.config.method_settings.get("weight", 1), []
    for number, advantage in enumerate(advantages([0.0, 0.5, 1.0, *rewards[3:]], 3)):
        learnt = ids[0] if number == 2 else samples[number].ids
        log_p_T = chosen(row_log_probs(student, samples[number].example.student_ids, learnt), learnt)
        losses.append(-advantage * log_p_T * (weight if number == 2 else 1))
    loss = mean_over_rows(losses)
    loss.backward()
    (result,) = judged(run, samples, rewards)
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert result.selected.reward() == pytest.approx(1.5 / 9)  # of the student's own samples
    assert largest_difference(gradients(run.loaded.model), gradients(student)) < 1e-5


def test_where_the_later_model_has_no_right_sample_npo_is_grpo(
    later: Settings, write_rows: Callable[..., Path]
) -> None:
    rows = [{"prompt": f"q{i}", "scorer": "regex", "answer": "never said"} for i in range(4)]
    data = str(write_rows(rows, name="hard.jsonl"))
    grpo = later("grpo", method="grpo", data=data, max_steps=2)
    npo = later("npo", data=data, max_steps=2, method_settings={"tries": 1})
    for config in (npo, grpo):
        train(config)
    assert same(final_weights(npo), final_weights(grpo))


@pytest.fixture
def wide(tmp_path: Path, model_folder: Callable[..., Path]) -> str:
    """A model with a larger vocabulary."""
    folder, model = tmp_path / "wide", load_model(str(model_folder(ends=ENDS)))
    model.model.resize_token_embeddings(310)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_later_model_is_needed_and_has_the_same_vocabulary(later: Settings, wide: str) -> None:
    with pytest.raises(UserError, match="setting 'teacher_model': npo needs a later checkpoint"):
        Trainer(later(teacher_model=None))
    with pytest.raises(UserError, match="has a vocabulary of 310 tokens"):
        Trainer(later(teacher_model=wide))


@pytest.mark.parametrize("place", ["teacher_model", "later"])
def test_prompts_fit_into_the_context_window_of_every_later_model(
    later: Settings, model_folder: Callable[..., Path], place: str
) -> None:
    config = later()
    (length,) = {len(x.student_ids) for x in Trainer(config).stage.task.examples}
    small = str(model_folder(ends=ENDS, seed=1, room=length + config.max_completion_length - 1))
    given: dict[str, Any] = {"teacher_model": small}
    if place == "later":
        given = {"method_settings": {"later": [small]}}
    with pytest.raises(UserError, match=rf"6 of 6 rows do not fit: .* {length} tokens, limit {length - 1}; "):
        Trainer(later(**given))


@pytest.fixture
def in_order(later: Settings, model_folder: Callable[..., Path]) -> Settings:
    """Two further models, for a run of 7 steps."""
    models = [str(model_folder(ends=ENDS, seed=seed)) for seed in (2, 3)]

    def make(out: str = "run", **values: Any) -> TrainConfig:
        own = {"tries": 20, "later": models} | values.pop("method_settings", {})
        return later(out, **({"max_steps": 7} | values), method_settings=own)

    return make


def test_the_run_moves_on_to_later_models(in_order: Settings) -> None:
    """Each step's rescued group learns the sample that a run with this step's model alone draws."""
    config = in_order()
    models = [config.teacher_model, *config.method_settings["later"]]
    run = Trainer(config)
    alone = [Trainer(in_order(teacher_model=model, method_settings={"later": []})) for model in models]
    drawn = [[x.completion_ids for x in one.stage.task.examples] for one in alone]
    assert len({str(found) for found in drawn}) == 3
    example = next(x for x in run.stage.task.examples if all(found[x.demonstration.row] for found in drawn))
    samples = [Completion(example, [1, ENDS[0]], None, False)] * 3
    learnt = []
    for step in range(7):
        control = run._control(run.stage, step)
        select = run.stage.task.method.at(step, 7, control).select
        assert select is not None
        learnt.append(select(samples, [Verdict(0.0)] * 3, encoder_of(run.config, run.chat, run.loaded.window))[-1].ids)
    expected = [found[example.demonstration.row] for found in drawn]
    assert learnt == [expected[number] for number in (0, 0, 0, 1, 1, 2, 2)]


def test_all_later_models_are_looked_at_before_the_first_draws(
    in_order: Settings, wide: str, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded to draw")

    monkeypatch.setattr("selfdistill.methods.failures.load_matching", refuse)
    first = str(model_folder(ends=ENDS, seed=2))
    for name, problem in ((f"{first}-mistyped", "no such folder"), (wide, "has a vocabulary of 310 tokens")):
        with pytest.raises(UserError, match=f"^model '{re.escape(name)}'.*{problem}"):
            train(in_order(method_settings={"later": [first, name]}))


def test_every_model_needs_a_step(in_order: Settings) -> None:
    with pytest.raises(UserError) as caught:
        Trainer(in_order(max_steps=2))
    assert str(caught.value) == (
        "setting 'max_steps': found 2, expected at least 3, one for teacher_model and each model of 'later'"
    )


def test_the_plan_of_memory_is_that_of_the_largest_model(in_order: Settings, model_folder: Callable[..., Path]) -> None:
    large = str(model_folder(ends=ENDS, seed=4, layers=6))

    def drawing(**values: Any) -> int:
        config = in_order(**values)
        plan = MemoryPlanner(config, load_demonstrations(config.data), Device("cpu", "no")).plan(config)
        return next(phase.total for phase in plan.phases if phase.name == "drawing")

    alone = drawing(teacher_model=large, method_settings={"later": []})
    assert drawing(method_settings={"later": [large, str(model_folder(ends=ENDS, seed=2))]}) == alone
    assert drawing(method_settings={"later": []}) < alone


def test_a_later_model_that_is_the_first_changes_nothing(in_order: Settings) -> None:
    one = in_order("one", method_settings={"later": []})
    same_twice = in_order("twice", method_settings={"later": [one.teacher_model]})
    for config in (one, same_twice):
        train(config)
    assert same(final_weights(one), final_weights(same_twice))
    assert [line["control"] for line in metrics_of(same_twice)] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("values", "last", "models"),
    [
        ({"method_settings": {"later": []}, "max_steps": 4, "save_steps": 2}, 3, 1),
        ({"save_steps": 1}, 3, 3),
        ({"save_steps": 1}, 4, 3),
    ],
    ids=str,
)
def test_a_killed_run_reads_its_samples_and_goes_on_as_it_would_have(
    in_order: Settings, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], last: int, models: int
) -> None:
    whole, cut = (in_order(name, **values) for name in ("whole", "cut"))
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(last))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr("selfdistill.methods.failures.load_matching", refuse)
    train(cut, resume=True)
    assert_same_run(whole, cut)
    lines = (Path(cut.output_dir) / "teacher_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6 * models
    assert any(json.loads(line)["ids"] for line in lines)


def test_other_samples_of_a_later_model_are_refused(in_order: Settings) -> None:
    config = in_order(save_steps=1)
    with pytest.raises(Cut):
        train(config, on_step=crash_at(2))
    file = Path(config.output_dir) / "teacher_samples.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[-2]["ids"] = [5, ENDS[0]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(UserError, match="the training examples have changed"):
        train(config, resume=True)


@pytest.mark.slow  # tests/methods/test_hints.py has a controller with parts of a batch
def test_parts_of_a_batch_learn_from_the_models_in_order(in_order: Settings) -> None:
    lines = trained_whole_and_in_parts(in_order, 3, {"max_steps": 3, "method_settings": {"tries": 4}})
    assert [line["control"] for line in lines] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("own", [{"later": []}, {}], ids=["one model", "in order"])
def test_two_processes_train_to_the_weights_of_one(in_order: Settings, tmp_path: Path, own: dict[str, Any]) -> None:
    trained_in_one_and_two(in_order, tmp_path, {"max_steps": 3, "learning_rate": 1e-4, "method_settings": own})
