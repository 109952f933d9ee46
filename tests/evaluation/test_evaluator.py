"""What is measured beside training: it changes nothing, and it says what ``eval`` says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.config.commands import EvalConfig
from selfdistill.config.train import TrainConfig
from selfdistill.data.demonstrations import Demonstration
from selfdistill.errors import UserError
from selfdistill.evaluation.evaluate import evaluate
from selfdistill.evaluation.evaluator import Evaluator, check_inputs, say_learnt
from selfdistill.evaluation.replies import KEPT_CHARACTERS, KEPT_ROWS
from selfdistill.model.loading import load_model
from selfdistill.training.token_views import PREFERRED, token_views
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer


@pytest.fixture
def settings(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], tmp_path: Path
) -> Callable[..., TrainConfig]:
    """The tiny run of all tests, measured."""
    tiny = settings
    test = write_rows(count=5, name="test.jsonl")
    prior = tmp_path / "prior.jsonl"
    choices = {"query": "Question: a or b?", "choices": ["a", "b b b"], "gold": 0}
    prior.write_text(json.dumps(choices) + "\n" + json.dumps(choices | {"gold": 1}) + "\n", encoding="utf-8")

    def make(out: str, *, measured: bool = True, **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "view_rows": 3 if measured else 0}
        if measured:
            defaults |= {"test": str(test), "prior": str(prior), "eval_steps": 2}
        return tiny(out, **(defaults | values))

    return make


def lines(config: TrainConfig, name: str) -> list[dict[str, Any]]:
    text = (Path(config.output_dir) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def final_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    (file,) = (Path(config.output_dir) / "final").glob("*.safetensors")
    return load_file(file)


def test_test_questions_that_are_learnt_are_said(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_rows([{"prompt": p, "completion": "x"} for p in ("q0", "new")], name="other.jsonl")
    train(settings("a", test=str(other), max_steps=1))
    assert "note: 1 of 2 test questions are also in the training data" in capsys.readouterr().err
    new = write_rows([{"prompt": "new", "completion": "x"}], name="new.jsonl")
    train(settings("b", test=str(new), max_steps=1))
    assert "among those" not in capsys.readouterr().err


def test_questions_are_found_among_very_many_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Demonstration(({"role": "user", "content": f"question {i}"},), row=i) for i in range(30_000)]
    began = time.process_time()
    say_learnt(rows[:20_000], rows[10_000:])
    assert time.process_time() - began < 2
    assert capsys.readouterr().err == "note: 10000 of 20000 test questions are also in the training data\n"


def test_test_rows_that_are_too_long_with_what_is_shown_are_counted(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    test = write_rows([{"prompt": "q" * n, "completion": "x"} for n in (5, 5, 300)], name="long.jsonl")
    config = settings("a", test=str(test), on_long_prompt="drop")
    base = load_model(config.model)
    found = Evaluator(config, base).shown(base, "turns", "teacher")
    assert found is not None
    assert found["items"] == 2
    assert f"dropped 1 of 3 rows of {test} for the teacher: too long with turns" in capsys.readouterr().err


def test_what_a_training_needs_is_read_first(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    for values, message in (
        ({"test": "none.jsonl"}, "none.jsonl: no such file"),
        ({"prior": "none.jsonl"}, "prior 'none.jsonl': no such"),
        ({"context": "turn"}, "unknown context 'turn'"),
    ):
        with pytest.raises(UserError, match=message):
            check_inputs(settings("c", **values))


@pytest.mark.parametrize(
    ("mixed_precision", "lora_rank", "teacher"),
    [
        ("no", 0, "ema"),
        ("bf16", 2, "frozen"),
        *(
            pytest.param(precision, rank, teacher, marks=pytest.mark.slow)
            for precision in ("no", "bf16")
            for rank in (0, 2)
            for teacher in ("ema", "frozen")
            if (precision, rank, teacher) not in (("no", 0, "ema"), ("bf16", 2, "frozen"))
        ),
    ],
)
def test_measuring_leaves_the_final_weights_bitwise_as_they_would_have_been(
    settings: Callable[..., TrainConfig], teacher: str, lora_rank: int, mixed_precision: str
) -> None:
    options = {"teacher": teacher, "lora_rank": lora_rank, "mixed_precision": mixed_precision}
    measured, plain = settings("measured", **options), settings("plain", measured=False, **options)
    torch.manual_seed(0)
    train(plain)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    train(measured)
    assert torch.equal(state, torch.get_rng_state())
    a, b = final_weights(measured), final_weights(plain)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (Path(plain.output_dir) / "evaluations.jsonl").exists()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_eval_computes_in_the_precision_of_its_setting(
    settings: Callable[..., TrainConfig], mixed_precision: str
) -> None:
    config = settings("unused", measured=True)
    loaded, seen = load_model(config.model), set()
    loaded.model.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    assert config.test is not None
    evaluate(
        EvalConfig(model=config.model, data=config.test, max_completion_length=10, mixed_precision=mixed_precision),
        loaded=loaded,
    )
    assert seen == {mixed_precision == "bf16"}


# A run's distance rounds logits to bfloat16 in this precision; that of eval, computed as a loss is, does not.
@pytest.mark.parametrize(("mixed_precision", "tolerance"), [("no", 1e-4), ("bf16", 2e-2)])
def test_evaluations_are_those_of_eval_at_the_start_every_so_many_steps_and_at_the_end(
    settings: Callable[..., TrainConfig], mixed_precision: str, tolerance: float
) -> None:
    config = settings("run", max_steps=5, mixed_precision=mixed_precision)
    train(config)
    found = lines(config, "evaluations.jsonl")
    assert [line["step"] for line in found] == [0, 2, 4, 5]
    assert found[0]["kl_base"] == pytest.approx(0, abs=1e-6)
    assert found[0]["seconds"] == 0 < found[1]["seconds"] < found[3]["seconds"]
    assert config.test is not None
    for line, model in ((found[0], config.model), (found[3], config.output_dir)):
        same = {"data": config.test, "prior": config.prior, "max_completion_length": 10, "batch_size": 2}
        alone = evaluate(EvalConfig(model=model, base=config.model, mixed_precision=mixed_precision, **same))
        assert alone["settings"]["mixed_precision"] == mixed_precision
        assert line["correct"] == alone["correct"]
        assert line["prior"] == alone["prior"]
        assert line["completion/length"] == alone["completion/length"]
        assert line["kl_base"] == pytest.approx(alone["kl_base"], rel=tolerance, abs=1e-6)


def test_a_run_keeps_the_bases_and_the_last_models_replies_to_some_test_rows(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    count = 3 * KEPT_ROWS
    rows = [{"prompt": f"q{row}", "answer": "long " * KEPT_CHARACTERS if row == 0 else "ab"} for row in range(count)]
    test = str(write_rows(rows, name="many.jsonl"))
    config = settings("run", method="sft", test=test, eval_steps=1, max_steps=3)
    seen: list[list[int]] = []

    def on_step(_step: int, _loaded: Any, _metrics: Any) -> None:
        seen.append(sorted({line["step"] for line in lines(config, "test_replies.jsonl")}))

    train(config, on_step=on_step)
    assert seen == [[0], [0, 1], [0, 2], [0, 3]]
    kept = lines(config, "test_replies.jsonl")
    assert [line["step"] for line in kept] == [0] * KEPT_ROWS + [3] * KEPT_ROWS
    for step, model in ((0, config.model), (3, config.output_dir)):
        same = {"data": test, "max_completion_length": 10, "batch_size": 2, "replies": str(tmp_path / "replies.jsonl")}
        evaluate(EvalConfig(model=model, mixed_precision="no", **same))
        alone = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
        alone[0]["answer"] = f"{alone[0]['answer'][: KEPT_CHARACTERS - 3]}..."
        assert [line for line in kept if line["step"] == step] == [{"step": step, **line} for line in alone[::3]]


@pytest.mark.parametrize("save_steps", [2, 0])  # 0: nothing to go on from, so it begins anew
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(
    settings: Callable[..., TrainConfig], save_steps: int
) -> None:
    whole, broken = settings("whole", save_steps=save_steps), settings("broken", save_steps=save_steps)
    train(whole)

    class Crash(BaseException):
        pass

    def crash(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3:
            raise Crash

    with pytest.raises(Crash):
        train(broken, on_step=crash)
    train(broken, resume=True)
    for name in ("evaluations.jsonl", "test_replies.jsonl", "token_views.jsonl"):
        a, b = lines(whole, name), lines(broken, name)
        for line in (*a, *b):
            line.pop("seconds", None)
        assert a == b


def test_settings_of_measuring_need_a_test(settings: Callable[..., TrainConfig]) -> None:
    for options in ({"prior": "p.jsonl"}, {"eval_steps": 3}):
        with pytest.raises(UserError, match="setting 'test' is missing"):
            settings("run", measured=False, **options)


def test_token_views_are_what_student_and_teacher_say_of_each_token(settings: Callable[..., TrainConfig]) -> None:
    config = settings("run")
    run = Trainer(config)
    run.step(0)
    views = token_views(run)
    assert [view["row"].rpartition(":")[2] for view in views] == ["1", "3", "5"]
    assert run.teacher is not None
    teacher = load_model(config.model).model
    teacher.load_state_dict(run.teacher.state_dict(), strict=False)
    for view, row in zip(
        views, (run.stage.task.examples[0], run.stage.task.examples[2], run.stage.task.examples[4]), strict=True
    ):
        ids = [tokens["text"] for tokens in view["tokens"]]
        assert view["prompt"] == row.demonstration.prompt[0]["content"]
        turn, reply = row.demonstration.prompt[0], {"role": "assistant", "content": row.demonstration.completion}
        assert view["teacher_sees"] == run.chat.render([turn, reply, turn])
        assert "demonstration" not in view
        chosen: list[int] = []
        for text, token in zip(ids, view["tokens"], strict=True):
            with torch.no_grad():
                p_V, q_V = (
                    model(input_ids=torch.tensor([[*context, *chosen]])).logits[0, -1].double().log_softmax(-1)
                    for model, context in ((run.loaded.model, row.student_ids), (teacher, row.teacher_ids))
                )
            greedy = int(p_V.argmax())
            assert run.loaded.tokenizer.decode([greedy]) == text
            assert token["logp"] == pytest.approx(float(p_V[greedy]), abs=1e-4)
            assert token["logq"] == pytest.approx(float(q_V[greedy]), abs=1e-4)
            assert token["kl"] == pytest.approx(float((q_V.exp() * (q_V - p_V)).sum()), abs=1e-4)
            best = q_V.exp().topk(PREFERRED)
            assert [share for _, share in token["top"]] == pytest.approx(best.values.tolist(), abs=1e-5)
            assert token["top"][0][0] == run.loaded.tokenizer.decode([int(best.indices[0])])
            chosen.append(greedy)
        assert view["truncated"] == (chosen[-1] not in run.loaded.end_token_ids)


def test_views_stand_at_the_start_and_at_the_end_and_only_where_there_is_a_teacher(
    settings: Callable[..., TrainConfig],
) -> None:
    config = settings("sdft", view_rows=2)
    train(config)
    assert [line["step"] for line in lines(config, "token_views.jsonl")] == [0, 0, 4, 4]
    config = settings("sft", method="sft")
    train(config)
    assert not (Path(config.output_dir) / "token_views.jsonl").exists()


def test_a_measurement_that_fails_loses_nothing_and_is_made_up(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = settings("whole"), settings("broken")
    train(whole)
    real, calls = Evaluator.measure, []

    def fails_at_last(self: Evaluator, loaded: Any, who: str) -> Any:
        calls.append(loaded)
        if len(calls) == 3:  # the base's, step 2, step 4
            raise UserError("judge: stays too busy")
        return real(self, loaded, who)

    monkeypatch.setattr(Evaluator, "measure", fails_at_last)
    with pytest.raises(UserError, match="stays too busy"):
        train(broken)
    assert not (Path(broken.output_dir) / "final").exists()
    train(broken, resume=True)
    a, b = lines(whole, "evaluations.jsonl"), lines(broken, "evaluations.jsonl")
    for line in (*a, *b):
        line.pop("seconds")
    assert a == b
    assert [line["step"] for line in lines(broken, "metrics.jsonl")] == [1, 2, 3, 4]
    x, y = final_weights(whole), final_weights(broken)
    assert all(torch.equal(x[name], y[name]) for name in x)
