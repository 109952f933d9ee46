"""The check before training: what it measures, how it ranks, what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from selfdistill.cli_parser import parse
from selfdistill.config.commands import CheckConfig
from selfdistill.config.train import TrainConfig
from selfdistill.data.chat_format import ChatFormat
from selfdistill.data.contexts import parse_context
from selfdistill.data.demonstrations import Demonstration, load_demonstrations
from selfdistill.errors import EngineFailed, UserError
from selfdistill.evaluation import measure
from selfdistill.evaluation.answers import answer
from selfdistill.evaluation.check import best_context, check
from selfdistill.evaluation.check_result import UNLIKELY, Layout, verdict_on
from selfdistill.model.fingerprints import weights_fingerprint
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Sampling, sample, sample_seed
from selfdistill.runtime import result_console


def layout(accuracy: float, logp: float = -1.0, kl: float = 1.0) -> Layout:
    return Layout("turns:repeats=2", 20, accuracy, logp, kl, [kl], 5.0, 0.0, 50.0)


def config_of(folder: Path, data: Path, **settings: object) -> CheckConfig:
    values = {"max_completion_length": 6, "sample": 4, "batch_size": 2, "mixed_precision": "no"} | settings
    return CheckConfig(model=str(folder), data=str(data), **values)


def kl_along_samples(
    loaded: LoadedModel, context: str, rows: list[Demonstration], sampling: Sampling
) -> list[list[float]]:
    """KL(teacher||student) at each place of the student's samples: one row, one forward pass each, in float64."""
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
    by_position: list[list[float]] = []
    for row in rows:
        prompts = [chat.encode_prompt(m) for m in (parse_context(context).messages(row, rows), row.prompt)]
        (rollout,) = sample(loaded, prompts[1:], sampling, [sample_seed(0, 0, row.row, 0)])
        with torch.no_grad():
            log_q, log_p = (
                loaded.model(input_ids=torch.tensor([prompt + rollout.ids])).logits[0].double().log_softmax(-1)
                for prompt in prompts
            )
        for place in range(len(rollout.ids)):
            q, p = (log[len(ids) - 1 + place] for log, ids in zip((log_q, log_p), prompts, strict=True))
            by_position += [[]] if place == len(by_position) else []
            by_position[place].append(float((q.exp() * (q - p)).sum()))
    return by_position


def test_measures_equal_recomputation_row_by_row(
    model_folder: Callable[..., Path], load: Callable[..., LoadedModel], write_rows: Callable[..., Path]
) -> None:
    data = write_rows(count=4)
    result = check(config_of(model_folder(), data, contexts=["turns:repeats=1", "example:reasoning=false"]))
    loaded = load()
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
    rows = load_demonstrations(str(data))
    assert result.items == 4
    for found in result.layouts:
        context, total, count = parse_context(found.context), 0.0, 0
        for row in rows:
            prompt, completion = chat.encode_prompt(context.messages(row, rows)), chat.encode_completion(row.completion)
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
            for j, token in enumerate(completion):
                total, count = total + float(logits[len(prompt) + j - 1, token]), count + 1
        assert found.logp == pytest.approx(total / count, rel=1e-5)
        assert found.items == 4
        by_position = kl_along_samples(loaded, found.context, rows, Sampling(6, 1.0))
        assert len(by_position) == 6
        assert found.kl_by_position == pytest.approx([sum(column) / len(column) for column in by_position], rel=1e-4)
        every = [value for column in by_position for value in column]
        assert found.kl == pytest.approx(sum(every) / len(every), rel=1e-4)
        assert found.kl > 0.01
    assert result.dropped == 0
    assert result.seconds_per_step is not None
    assert result.memory_gib is not None
    assert result.seconds_per_step > 0
    assert result.memory_gib > 0
    assert result.memory_rows == 2


def test_the_in_context_assumption_is_measured_along_each_models_own_replies(
    model_folder: Callable[..., Path],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows(count=4)
    config = config_of(model_folder(), data, contexts=["turns:repeats=2"], fine_tuned=str(model_folder(seed=1)))
    result = check(config, cost=False)
    base, tuned = load(), load(seed=1)
    chat = ChatFormat(base.tokenizer, base.end_token_ids, {})
    rows = load_demonstrations(str(data))
    students = [chat.encode_prompt(row.prompt) for row in rows]
    teachers = [chat.encode_prompt(parse_context("turns:repeats=2").messages(row, rows)) for row in rows]
    for found, model, prompts in ((result.teacher_kl, base, teachers), (result.fine_tuned_kl, tuned, students)):
        total, count = 0.0, 0
        for prompt, student, rollout in zip(prompts, students, sample(model, prompts, Sampling(6, 0)), strict=True):
            with torch.no_grad():
                log_q, log_p = (
                    who.model(input_ids=torch.tensor([[*ids, *rollout.ids]])).logits[0, len(ids) - 1 : -1].double()
                    for who, ids in ((model, prompt), (base, student))
                )
            log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
            total, count = total + float((log_q.exp() * (log_q - log_p)).sum()), count + len(rollout.ids)
        assert found == pytest.approx(total / count, rel=1e-4)
    said = " ".join(repr(result).split())
    assert "In-context assumption: the teacher has" in said
    assert "the fine-tuned model has 0%" in said
    assert "It has learnt nothing, so its distance is not comparable: fine-tune it further." in said


def test_bfloat16_arithmetic_measures_nearly_the_same(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    folder, data = model_folder(), write_rows(count=4)
    exact, rounded = (
        check(config_of(folder, data, contexts=["turns:repeats=1"], mixed_precision=precision))
        for precision in ("no", "bf16")
    )
    assert rounded.layouts[0].logp == pytest.approx(exact.layouts[0].logp, rel=0.01)
    assert rounded.layouts[0].logp != exact.layouts[0].logp
    assert rounded.student_logp == pytest.approx(exact.student_logp, rel=0.01)


def test_a_layout_whose_teacher_answers_right_comes_first_and_is_worth_trying(
    model_folder: Callable[..., Path],
    load: Callable[..., LoadedModel],
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The "demonstrated" answer of each row is what this model says under turns:repeats=2 to that very context.
    loaded = load()
    chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
    rows = load_demonstrations(str(write_rows(count=4)))
    context = parse_context("turns:repeats=2")
    prompts = [chat.encode_prompt(context.messages(row, rows)) for row in rows]
    replies = answer(loaded, prompts, rows, chat, Sampling(6, temperature=0), batch_size=4).replies
    data = write_rows(
        [
            {"prompt": row.prompt[0]["content"], "completion": row.completion, "answer": reply}
            for row, reply in zip(rows, replies, strict=True)
        ],
        name="right.jsonl",
    )
    result = check(config_of(model_folder(), data))
    assert result.best.context == "turns:repeats=2"
    assert result.best.accuracy == 1.0
    assert result.exit_code == 0
    assert result.verdict.startswith(
        "Worth trying: the teacher with turns:repeats=2, best of 7 layouts, is right on 100% (95% interval 51% to "
        "100%), the student on 0% of 4 rows."
    )
    assert "few_shot:k=3,pick=seed,this=false,seed=0" in [found.context for found in result.layouts]
    as_json = json.loads(json.dumps(result.to_dict()))
    assert (as_json["best"], as_json["ceiling"]) == ("turns:repeats=2", 1.0)
    out = repr(result)
    assert "Best context: turns:repeats=2" in out
    assert "GiB with 2 rows per micro-batch (full fine-tuning, EMA)." in " ".join(out.split())
    assert "log p(demo) alone" not in out
    train = TrainConfig(model=str(model_folder()), data=str(data), output_dir="unused", max_completion_length=6)
    assert best_context(train) == "turns:repeats=2"
    assert "training anyway" not in capsys.readouterr().err


def test_the_cost_with_lora_is_that_of_its_adapter_which_is_gone_afterwards(
    load: Callable[..., LoadedModel], model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    loaded, config = load(), config_of(model_folder(), write_rows(count=4), batch_size=2, lora_rank=4)
    before, learnt = weights_fingerprint(loaded.model), []
    backward = torch.Tensor.backward

    def counted(loss: torch.Tensor) -> None:
        backward(loss)
        learnt.extend(name for name, p in loaded.model.named_parameters() if p.grad is not None)

    with patch.object(torch.Tensor, "backward", counted):
        result = check(config, loaded=loaded)
    assert learnt
    assert all("lora_" in name for name in learnt)
    assert "GiB with 2 rows per micro-batch (LoRA of rank 4, EMA)." in " ".join(repr(result).split())
    assert weights_fingerprint(loaded.model) == before
    assert all(p.requires_grad and p.grad is None for p in loaded.model.parameters())


def test_a_student_that_was_mostly_truncated_is_named(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    result = check(config_of(model_folder(), write_rows(count=4), contexts=["turns"]))
    line = "100% of the student's replies were truncated at the length limit, so its accuracy may be too low: raise"
    for student, teacher, says in ((1.0, 0.0, True), (0.5, 0.0, False), (1.0, 1.0, False)):
        found = replace(result, student_truncated=student, layouts=[replace(result.best, truncated=teacher)])
        assert (line in " ".join(repr(found).split())) is says


def test_long_replies_compared_word_for_word_without_being_asked_to_get_a_note(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    long, folder = {"completion": "ab cd " * 5}, model_folder()
    for number, (own, settings, says) in enumerate(
        (
            ({}, {}, True),
            ({"answer": "ab"}, {}, False),
            ({}, {"scorer": "exact"}, False),
            ({"completion": "ab"}, {}, False),
            ({"completion": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}]}, {}, False),
        )
    ):
        data = write_rows([{"prompt": f"q{i}", **long, **own} for i in range(4)], name=f"{number}.jsonl")
        check(config_of(folder, data, contexts=["turns"], max_completion_length=40, **settings))
        assert ("only if they repeat demonstrations of 31 tokens word for word" in capsys.readouterr().err) is says


def test_hopeless_data_is_called_unlikely(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result = check(config_of(model_folder(), write_rows(count=4), batch_size=32))
    assert result.exit_code == UNLIKELY
    assert result.verdict.startswith("Self-distillation is unlikely to help: ")
    assert result.memory_rows == 4
    out = " ".join(repr(result).split())
    assert "Expected with batch_size 32: " in out
    assert "GiB with 4 rows per micro-batch" in out
    assert "All layouts have the same accuracy, so log p(demo) alone decides their order." in out
    assert f"No context is good enough; the least bad: {result.best.context} " in out
    assert "Best context:" not in out
    assert "invalid calls" not in out
    known = replace(result, known=True)
    assert f"Best context: {result.best.context} " in " ".join(repr(known).split())
    assert repr(replace(known, layouts=[replace(result.best, context="[/x]")])).count("[/x]") == 3  # the table, too


def test_the_best_context_for_training_costs_nothing_takes_the_scorer_and_says_what_it_expects(
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("measured the cost"))
    scorers = []
    monkeypatch.setattr(measure, "answer", lambda *a, **k: scorers.append(k["scorer"]) or answer(*a, **k))
    train = TrainConfig(
        model=str(model_folder()),
        data=str(write_rows(count=4)),
        output_dir="unused",
        max_completion_length=6,
        scorer="contains",
    )
    best = best_context(train)
    assert set(scorers) == {"contains"}
    out, err = capsys.readouterr()
    assert out == ""
    assert "GiB" not in err
    assert err.splitlines()[-1] == (f"note: self-distillation is unlikely to help; training anyway, with {best}")


@pytest.mark.parametrize(
    ("free", "error", "reason"),
    [
        (0, None, r"full fine-tuning needs more than 0\.0 GiB, and there are 0\.0"),
        (2**40, torch.OutOfMemoryError("CUDA out of memory"), "one forward and backward pass ran out of memory"),
    ],
)
def test_a_step_that_needs_too_much_memory_loses_nothing_that_was_measured(
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    error: Exception | None,
    reason: str,
) -> None:
    def backward(*_: object, **__: object) -> None:
        if error is None:
            pytest.fail("measured the cost")
        raise error

    monkeypatch.setattr(measure, "free_memory", lambda _: free)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    result = check(config_of(model_folder(), write_rows(count=4), contexts=["turns:repeats=1"]))
    assert result.layouts[0].items == 4
    assert (result.seconds_per_step, result.memory_gib, result.memory_rows) == (None, None, None)
    said = f"Cost of a step: unknown, because {reason}; selfdistill (train .*) names settings that fit"
    found = re.search(said, " ".join(repr(result).split()))
    assert found is not None
    assert parse(found[1].split()) == ("train", {"dry_run": True, "device": "this"})


def test_an_error_of_a_pass_is_no_lack_of_memory(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(RuntimeError, match="a bug"):
        check(config_of(model_folder(), write_rows(count=4), contexts=["turns:repeats=1"]))


def test_rows_that_do_not_fit_are_left_out_of_a_layout_or_of_all_and_counted(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # The window is 512. Rows 2 and 3 fit once but not twice; row 4 does not fit at all.
    lengths = (5, 5, 150, 150, 600)
    data = write_rows([{"prompt": "q" * n, "completion": "ab"} for n in lengths])
    settings = {"contexts": ["turns:repeats=1", "turns:repeats=3"], "sample": 8}
    with pytest.raises(
        UserError, match=r"^1 of 5 rows do not fit: .*/train\.jsonl:5: prompt has 619 tokens, limit 506;"
    ):
        check(config_of(model_folder(), data, **settings))
    result = check(config_of(model_folder(), data, on_long_prompt="drop", **settings))
    assert (result.items, result.dropped) == (4, 1)
    assert {found.context: found.items for found in result.layouts} == {"turns:repeats=1": 4, "turns:repeats=3": 2}
    out = repr(result) + "\n"
    assert "dropped: 1 of 5 rows, too long\n" in out
    assert "dropped with turns:repeats=3: 2 of 4 rows, too long\n" in out
    few = check(config_of(model_folder(), write_rows([{"prompt": "q" * 5, "completion": "ab"}] * 2), **settings))
    both, few_both = (next(x for x in r.layouts if x.context == "turns:repeats=3") for r in (result, few))
    assert both.logp == pytest.approx(few_both.logp, rel=1e-5)  # the rows that fit, and no others
    fitting = write_rows([{"prompt": "q" * n, "completion": "ab"} for n in lengths[:4]])
    result = check(config_of(model_folder(), fitting, **settings))
    assert result.skipped["turns:repeats=3"].startswith(
        f"2 of 4 rows do not fit: {fitting}:3, 4: teacher's prompt has 688 tokens, limit 506; "
    )


def test_the_fine_tuned_model_and_the_student_are_compared_on_the_same_rows(
    model_folder: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_long = "def is_long(reply, row):\n    return len(row['prompt'][0]['content']) > 100\n"
    (tmp_path / "own_scorer_of_check.py").write_text(is_long)
    monkeypatch.syspath_prepend(tmp_path)
    data = write_rows([{"prompt": "q" * n, "completion": "ab"} for n in (5, 5, 150, 150)])
    config = config_of(
        model_folder(),
        data,
        contexts=["turns:repeats=3"],
        on_long_prompt="drop",
        fine_tuned=str(model_folder(seed=1)),
        scorer="python:own_scorer_of_check.is_long",
    )
    result = check(config, cost=False)
    assert (result.student_accuracy, result.student_accuracy_on_best, result.fine_tuned_accuracy) == (0.5, 0, 0)
    learnt = replace(result, fine_tuned_accuracy=0.5)
    assert "It has learnt nothing" in " ".join(repr(result).split())
    assert "It has learnt nothing" not in " ".join(repr(learnt).split())


def test_a_row_that_is_too_long_for_a_layout_counts_as_wrong(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measure.Measure.layout

    def measured(self: measure.Measure, context: str, hint: float = 1) -> Layout:
        return replace(real(self, context, hint), accuracy=1.0 if context.endswith("3") else 0.75)

    monkeypatch.setattr(measure.Measure, "layout", measured)
    data = write_rows([{"prompt": "q" * n, "completion": "ab"} for n in (5, 150, 150, 150)])
    contexts = ["turns:repeats=3", "turns:repeats=1"]
    result = check(config_of(model_folder(), data, on_long_prompt="drop", contexts=contexts))
    found = [(layout.context, layout.items) for layout in result.layouts]
    assert found == [("turns:repeats=1", 4), ("turns:repeats=3", 1)]


def test_a_demonstration_beyond_the_window_is_named(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    # The teacher is shown a hint, so its prompt is short whatever the demonstration.
    short = {"prompt": "q", "completion": "ab", "privileged_context": "hint"}
    data = write_rows([short, short, {**short, "completion": "a" * 450}])
    settings = {"contexts": ["turns:repeats=1", "turns:repeats=2"]}
    result = check(config_of(model_folder(), data, **settings))
    assert [found.context for found in result.layouts] == ["turns:repeats=1"]
    assert result.skipped == {
        "turns:repeats=2": f"1 of 3 rows do not fit: {data}:3: teacher's prompt and demonstration have 523 tokens, "
        "limit 512 (the model's context window); drop them with on_long_prompt drop"
    }
    result = check(config_of(model_folder(), data, on_long_prompt="drop", **settings))
    assert {found.context: found.items for found in result.layouts} == {"turns:repeats=1": 3, "turns:repeats=2": 2}
    data = write_rows([short, {**short, "completion": "a" * 600}])
    with pytest.raises(UserError) as error:
        check(config_of(model_folder(), data, **settings))
    assert str(error.value) == (
        f"1 of 2 rows do not fit: {data}:2: prompt and demonstration have 621 tokens, limit 512 (the model's context "
        "window); drop them with on_long_prompt drop"
    )


def test_layouts_that_do_not_fit_are_named_and_left_out(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    data = write_rows(count=3)
    result = check(config_of(model_folder(), data, contexts=["turns:repeats=1", "few_shot:k=3", "document"]))
    assert [found.context for found in result.layouts] == ["turns:repeats=1"]
    assert result.skipped["few_shot:k=3,pick=seed,this=false,seed=0"].startswith(
        "context 'few_shot' needs 3 other demonstrations, found 2"
    )
    assert result.skipped["document:repeats=1,show=both"].startswith("context 'document' needs a document")
    with pytest.raises(UserError, match="no context layout could be evaluated: few_shot:k=3"):
        check(config_of(model_folder(), data, contexts=["few_shot:k=3"]))


def test_an_engine_that_fails_leaves_no_layout_out(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:  # after the student
            raise EngineFailed("engine vllm: the server ended")
        return answer(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "answer", failing)
    with pytest.raises(EngineFailed, match="the server ended"):
        check(config_of(model_folder(), write_rows(count=3), contexts=["turns:repeats=1", "turns"]))


def test_answers_that_scorers_cannot_use_are_refused_before_anything_is_sampled(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "answer", lambda *_, **__: pytest.fail("sampled"))
    rows = write_rows([{"prompt": "q", "privileged_context": "a", "answer": "a("}] * 2)
    with pytest.raises(UserError, match=r"2 rows cannot be scored: .*scorer 'regex' cannot use answer"):
        check(config_of(model_folder(), rows, scorer="regex", contexts=["turns"]))


def verdict(student: float, logp: float, best: Layout, layouts: int = 1) -> tuple[str, int]:
    """The verdict where the weaker is right on no row on which the stronger is wrong."""
    right = [[row < round(share * best.items) for row in range(best.items)] for share in (student, best.accuracy or 0)]
    return verdict_on(*right, logp, best, layouts)


def test_verdicts() -> None:
    text, code = verdict(0.0, -3.0, layout(0.9))
    assert (code, text) == (
        0,
        "Worth trying: the teacher with turns:repeats=2 is right on 90% (95% interval 70% to 97%), the student on 0% "
        "of 20 rows. Expect at most about 90% after training.",
    )
    text, code = verdict(0.95, -0.1, layout(1.0))
    assert code == UNLIKELY
    assert "the student already knows this" in text
    for teacher in (0.5, 0.95):
        text, code = verdict(0.95, -0.1, replace(layout(teacher, logp=-0.05), truncated=1.0))
        assert code == UNLIKELY
        assert text.endswith("; the student already knows this."), "and no other context is advised"
    text, code = verdict(0.0, -3.0, layout(0.0, logp=-1.0))
    assert code == UNLIKELY
    assert "a scorer that suits the data better may show a difference" in text
    text, code = verdict(0.5, -1.0, layout(0.5, logp=-2.0))
    assert code == UNLIKELY
    assert "Try other contexts" in text
    text, code = verdict(0.0, -3.0, replace(layout(0.05), truncated=1.0))
    assert code == UNLIKELY
    assert text.endswith(
        "the teacher is not clearly better. 100% of its replies were truncated at the length limit, so they may be "
        "right but unfinished: raise max_completion_length."
    )
    assert verdict(0.1, -1.0, replace(layout(0.2), items=10))[1] == UNLIKELY
    few = "It is unknown whether self-distillation helps: the teacher with turns:repeats=2 is right on 100% (95% "
    few += "interval 44% to 100%), the student on 67% of 3 rows, which are too few to tell. Raise sample, or give more "
    few += "rows."
    assert verdict(2 / 3, -1.0, replace(layout(1.0), items=3)) == (few, 0)
    assert "the student already knows this" in verdict(1.0, -1.0, replace(layout(1.0), items=3))[0]
    text, code = verdict(0.89, -1.0, replace(layout(0.9), items=100))
    assert code == UNLIKELY
    assert "of 100 rows; the teacher is not clearly better." in text
    assert "lower temperature" in verdict(0.0, -9.0, layout(1.0, kl=5.0))[0]


@pytest.mark.parametrize(
    ("student", "teacher", "items", "layouts", "better"),
    [
        (0, 9, 16, 7, True),
        (0, 8, 16, 7, False),  # 2 / 2**8 is more than .05 / 7
        (0, 8, 16, 1, True),
        (8, 10, 16, 1, False),
        (1, 3, 10, 1, False),  # two more rows; .3 - .1 is less than .2
        (18, 20, 20, 1, False),
        (252, 254, 500, 7, False),
        (0, 4, 4, 7, True),  # 7 / 4**4 is less than .05
        (0, 3, 3, 7, False),
        (0, 3, 3, 1, True),
        (0, 3, 4, 1, False),
    ],
)
def test_a_teacher_is_not_called_better_by_chance(
    student: int, teacher: int, items: int, layouts: int, better: bool
) -> None:
    found = replace(layout(teacher / items), items=items)
    text, code = verdict(student / items, -1.0, found, layouts)
    assert code == 0
    assert text.startswith("Worth trying: " if better else "It is unknown whether self-distillation helps: ")
    assert ("too few to tell. Raise sample, or give more rows." in text) is not better
    chosen = "turns:repeats=2, best of 7 layouts, is" if layouts == 7 else "turns:repeats=2 is"
    assert f"the teacher with {chosen} right on" in text


def test_rows_on_which_only_the_student_is_right_count_against_the_teacher() -> None:
    teacher = [True] * 14 + [False] * 6
    student = [False] * 10 + [True] * 4 + [False] * 6
    assert verdict_on(student, teacher, -1.0, layout(0.7), 7)[0].startswith("Worth trying")
    student = [False] * 12 + [True] * 4 + [False] * 4  # ten more rows, twelve against two: p .013
    assert verdict_on(student, teacher, -1.0, layout(0.7), 7)[0].startswith("It is unknown")
    assert verdict_on(student, teacher, -1.0, layout(0.7), 3)[0].startswith("Worth trying")


# --- hints ---


def test_hints_are_measured_in_the_best_layout(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows([{"prompt": f"q{i}", "completion": f"ab cd ef g{i}"} for i in range(4)])
    contexts = ["few_shot:k=2", "turns:repeats=2", "example"]
    config = config_of(model_folder(), data, contexts=contexts, hints=True, anchors="none")
    result = check(config, cost=False)
    assert result.spill is None
    assert result.hints is not None
    assert [found.hint for found in result.hints] == [0, 0.25, 0.5, 0.75, 1]
    best = next(layout for layout in result.layouts if not layout.context.startswith("few_shot"))
    assert result.hints[-1] == best
    nothing = result.hints[0]
    assert nothing.kl == pytest.approx(0, abs=1e-6)
    assert nothing.logp == pytest.approx(result.student_logp, abs=1e-5)
    assert (nothing.accuracy, nothing.length) == (result.student_accuracy, result.student_length)
    lengths = [found.prompt_length for found in result.hints]
    assert lengths == sorted(set(lengths))
    cut = write_rows(
        [{"prompt": f"q{i}", "privileged_context": "ab cd", "completion": f"ab cd ef g{i}"} for i in range(4)],
        name="cut.jsonl",
    )
    by_hand = check(config_of(model_folder(), cut, contexts=[best.context]), cost=False).layouts[0]
    assert replace(by_hand, hint=0.5) == result.hints[2]
    narrow = Console(width=44, file=StringIO())
    result.print(narrow)
    assert "…" not in narrow.file.getvalue()  # type: ignore[attr-defined]
    result.print(result_console())
    printed = capsys.readouterr().out
    assert "the teacher with part of the demonstration" in printed
    assert "0.75" in printed
    assert [found["hint"] for found in result.to_dict()["hints"]] == [0, 0.25, 0.5, 0.75, 1]


def test_hints_need_a_layout_that_can_show_a_part(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    config = config_of(model_folder(), write_rows(), contexts=["few_shot:k=2"], hints=True)
    with pytest.raises(UserError, match=r"^hints need a context that shows one demonstration: "):
        check(config, cost=False)
    assert check(config.model_copy(update={"hints": False}), cost=False).hints is None
