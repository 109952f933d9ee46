"""The loop on tiny models: gradients against plain code, resuming to the bit, what a run folder holds, how it fails."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
import shutil
import signal
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    ENDS,
    Cut,
    add_gradient,
    assert_same_run,
    byte_tokenizer,
    crash_at,
    final_weights,
    gradients,
    largest_difference,
    metrics_of,
    quick,
    row_log_probs,
    same,
)
from odd_models import ODD_LAYERS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from selfdistill.config.files import continued, load_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.data.chat_format import ChatFormat
from selfdistill.errors import RunFailed, RunStopped, UserError
from selfdistill.evaluation.answers import answer
from selfdistill.methods import METHODS, Method
from selfdistill.methods.sequences import StudentSamples
from selfdistill.methods.slots import Completion
from selfdistill.model.loading import load_model
from selfdistill.model.sampling import Sampling
from selfdistill.runtime import files, progress_shown
from selfdistill.runtime.files import folder_lock
from selfdistill.runtime.tracking import METRICS
from selfdistill.training import checkpoint as checkpoint_module
from selfdistill.training.batch_gradient import BatchGradient
from selfdistill.training.checkpoint import list_checkpoints, newest_whole
from selfdistill.training.first_lines import first_lines
from selfdistill.training.plan import plan
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer


def weights(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def moved_run(config: TrainConfig) -> Trainer:
    """A run after one large step, so that student and teacher differ."""
    run = Trainer(config)
    run.step(0)
    return run


# --- the gradient of a step, against plain code ---


def plain_gradients(
    run: Trainer, completions: list[Completion], divergence: str, normalisation: str, skip: int
) -> tuple[float, dict[str, Tensor]]:
    """Row by row, whole logits, float64 sums, nothing but autograd."""
    student = copy.deepcopy(run.loaded.model)
    student.zero_grad()
    rows = []
    for c in completions:
        log_p_TV = row_log_probs(student, c.example.student_ids, c.ids)
        with torch.no_grad(), run.teacher.model() as network:  # type: ignore[union-attr]
            log_q_TV = row_log_probs(network, c.example.teacher_ids or [], c.ids)
        if divergence == "forward_kl":
            values_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)
        else:
            values_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
        if len(values_T) > skip:
            rows.append(values_T[skip:])
    loss = torch.cat(rows).mean() if normalisation == "token" else torch.stack([r.mean() for r in rows]).mean()
    loss.backward()
    return float(loss.detach()), gradients(student)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    ("divergence", "normalisation", "skip", "lora_rank"),
    [
        ("forward_kl", "sequence", 0, 0),
        ("forward_kl", "token", 0, 0),
        ("forward_kl", "sequence", 2, 0),
        ("forward_kl", "token", 2, 0),
        ("reverse_kl", "sequence", 0, 0),
        ("forward_kl", "sequence", 0, 4),
    ],
)
def test_an_sdft_gradient_equals_plain_autograd_row_by_row(
    settings: Callable[..., TrainConfig], divergence: Any, normalisation: Any, skip: int, lora_rank: int, parts: int
) -> None:
    config = settings(
        batch_size=4,
        num_generations=2,
        divergence=divergence,
        loss_normalisation=normalisation,
        skip_first_tokens=skip,
        lora_rank=lora_rank,
        gradient_accumulation_steps=parts,
        learning_rate=1e-2,
    )
    run = moved_run(config)
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 7)
    assert len({len(c.ids) for c in completions}) > 2
    loss, expected = plain_gradients(run, completions, divergence, normalisation, skip)
    result = add_gradient(run, completions)
    found = gradients(run.loaded.model)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert loss > 0.01
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-2
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_an_sft_gradient_equals_transformers_own_loss_per_sequence(
    settings: Callable[..., TrainConfig], model_folder: Callable[..., Path], tied: bool
) -> None:
    run = Trainer(settings(method="sft", model=str(model_folder(tied=tied)), batch_size=4))
    model = copy.deepcopy(run.loaded.model)
    losses = []
    for row in run.stage.task.examples[:4]:
        assert row.completion_ids[-1] == 257
        ids = torch.tensor([row.student_ids + row.completion_ids])
        labels = torch.tensor([[-100] * len(row.student_ids) + row.completion_ids])
        losses.append(model(input_ids=ids, labels=labels).loss)
    assert len({len(row.completion_ids) for row in run.stage.task.examples[:4]}) > 2
    loss = torch.stack(losses).mean()
    loss.backward()
    result = add_gradient(run, run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 0))
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert largest_difference(gradients(run.loaded.model), gradients(model)) < 1e-5


def test_student_and_teacher_score_the_sampled_ids_verbatim(settings: Callable[..., TrainConfig]) -> None:
    run = Trainer(settings(batch_size=4))
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 0)
    tokenizer = run.loaded.tokenizer
    again = [tokenizer(tokenizer.decode(c.ids), add_special_tokens=False)["input_ids"] for c in completions]
    assert again != [c.ids for c in completions]  # random bytes: decoding and encoding would change them
    seen: list[tuple[list[int], ...]] = []

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        seen.append(tuple(kwargs["input_ids"].tolist()))

    with run.teacher.model() as network:  # type: ignore[union-attr]
        network.model.register_forward_pre_hook(note, with_kwargs=True)
    run.loaded.model.model.register_forward_pre_hook(note, with_kwargs=True)
    add_gradient(run, completions)
    by_teacher, by_student = seen
    for c, taught, own in zip(completions, by_teacher, by_student, strict=True):
        for row, context in ((taught, c.example.teacher_ids), (own, c.example.student_ids)):
            assert context is not None
            joined = [*context, *c.ids]
            assert row[: len(joined)] == joined
            assert set(row[len(joined) :]) <= {run.loaded.pad_token_id}


# --- what must not change the numbers ---


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_a_batch_of_eight_and_eight_batches_of_one_give_the_same_weights(
    settings: Callable[..., TrainConfig], method: Any, normalisation: Any
) -> None:
    common: dict[str, Any] = {
        "method": method,
        "loss_normalisation": normalisation,
        "batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-4,
    }
    one = settings("one", gradient_accumulation_steps=1, **common)
    eight = settings("eight", gradient_accumulation_steps=8, **common)
    train(one)
    train(eight)
    for a, b in zip(metrics_of(one), metrics_of(eight), strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-4)
    assert largest_difference(final_weights(one), final_weights(eight)) < 1e-5


def test_a_part_whose_tokens_are_all_skipped_adds_nothing(settings: Callable[..., TrainConfig]) -> None:
    run = Trainer(settings(batch_size=2, gradient_accumulation_steps=2, skip_first_tokens=1))
    a, b = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:2], 0)
    short, long = replace(a, ids=[5], logps=[0.0]), replace(b, ids=[5, 6, 7], logps=[0.0] * 3)
    add_gradient(run, [long])
    alone = gradients(run.loaded.model)
    for order in ([short, long], [long, short]):
        run.optimizer.zero_grad()
        add_gradient(run, order)
        assert largest_difference(gradients(run.loaded.model), alone) < 1e-6


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradient_checkpointing_changes_no_weight(settings: Callable[..., TrainConfig], lora_rank: int) -> None:
    common: dict[str, Any] = {"lora_rank": lora_rank, "max_steps": 3, "learning_rate": 1e-4}
    without, using = settings("without", **common), settings("using", gradient_checkpointing=True, **common)
    modes = []
    train(without)
    train(using, on_step=lambda _step, loaded, _metrics: modes.append(loaded.model.training))
    assert modes == [False] * 4
    assert largest_difference(final_weights(without), final_weights(using)) < 1e-6


COMPILES = any(map(shutil.which, ("g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="NOT TESTED: no C++ compiler, or no headers of Python")
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_compiled_layers_train_to_the_same_weights(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, lora_rank: int
) -> None:
    common: dict[str, Any] = {"lora_rank": lora_rank, "max_steps": 3, "learning_rate": 1e-4}
    without, using = settings("without", **common), settings("using", torch_compile=True, **common)
    train(without)
    compile_, calls = torch.compile, []

    def counting(function: Any, **options: Any) -> Any:
        compiled = compile_(function, **options)

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return compiled(*args, **kwargs)

        return forward

    monkeypatch.setattr(torch, "compile", counting)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(using)
    assert calls == [True] * 2 * (1 + 3), "both layers, at the start and in the student's pass of each step, only there"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (2 if lora_rank else 1), "layers share what was compiled, but for the first under LoRA"
    assert largest_difference(final_weights(without), final_weights(using)) < 1e-5
    run = Trainer(using)
    assert not any("forward" in vars(module) for module in run.loaded.model.modules())
    assert not any(p.grad is not None for p in run.parameters), "the start-up probe leaves no gradient"


@pytest.mark.parametrize("where", ["decorating", "running"])
def test_layers_that_cannot_be_compiled_are_refused(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("backend='inductor' raised:\nno C++ compiler\n\nSet this and that")

    monkeypatch.setattr(torch, "compile", broken if where == "decorating" else lambda *_, **__: broken)
    want = "torch_compile does not work here: backend='inductor' raised: no C++ compiler; leave it out"
    with pytest.raises(UserError, match=re.escape(want)):
        Trainer(settings(torch_compile=True))


def test_a_model_that_does_not_name_its_layers_is_not_compiled(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_no_split_modules", None)
    monkeypatch.setattr(LlamaPreTrainedModel, "_no_split_modules", None)
    with pytest.raises(UserError, match="does not declare which modules are its layers; leave torch_compile out"):
        Trainer(settings(torch_compile=True))


def test_an_evaluation_between_steps_leaves_the_weights_as_they_would_have_been(
    settings: Callable[..., TrainConfig],
) -> None:
    plain, watched = settings("plain"), settings("watched")
    calls = []

    def evaluate(step: int, loaded: Any, _metrics: Any) -> None:
        run = Trainer(watched)
        chat = ChatFormat(loaded.tokenizer, loaded.end_token_ids, {})
        rows = run.stage.task.examples
        answer(
            loaded,
            [row.student_ids for row in rows],
            [row.demonstration for row in rows],
            chat,
            Sampling(6, temperature=0),
            batch_size=4,
        )
        torch.rand(3)
        calls.append(step)

    train(plain)
    train(watched, on_step=evaluate)
    assert calls == list(range(7))
    assert same(final_weights(plain), final_weights(watched))
    assert metrics_of(plain) == metrics_of(watched)


def test_the_saved_settings_run_again_to_the_same_weights(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    first = settings(max_steps=None, num_train_epochs=1.5, learning_rate=None, top_k=50, temperature=0.8, batch_size=4)
    train(first)
    values = load_yaml(Path(first.output_dir) / "config.yaml", TrainConfig)
    assert values["max_steps"] == 3  # 6 rows x 1.5 epochs / 4, rounded up
    assert values["learning_rate"] == 1e-5
    second = TrainConfig(**(values | {"output_dir": str(tmp_path / "again")}))
    train(second)
    assert same(final_weights(first), final_weights(second))
    assert metrics_of(first) == metrics_of(second)


def test_a_seed_may_be_a_time_in_nanoseconds_or_larger(settings: Callable[..., TrainConfig]) -> None:
    found = []
    for seed in (1, 2**64 + 1, 1_790_000_000_123_456_789):
        config = settings(f"seed{seed}", seed=seed, lora_rank=2, max_steps=1)
        train(config)
        found.append(metrics_of(config))
    assert found[0] != found[1] != found[2] != found[0]


def test_the_seed_changes_the_run(settings: Callable[..., TrainConfig]) -> None:
    train(settings("a"))
    train(settings("b", seed=1))
    assert not same(final_weights(settings("a")), final_weights(settings("b")))


# --- resuming ---


def terminate_at(step: int) -> Callable[[int, Any], None]:
    def on_step(done: int, _loaded: Any, _metrics: Any) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


@pytest.mark.parametrize(
    ("lora_rank", "teacher"),
    [
        pytest.param(0, "ema", id="full-ema"),
        pytest.param(4, "snapshot", id="lora-snapshot"),
        pytest.param(0, "frozen", id="full-frozen", marks=pytest.mark.slow),
        pytest.param(0, "snapshot", id="full-snapshot", marks=pytest.mark.slow),
        pytest.param(4, "ema", id="lora-ema", marks=pytest.mark.slow),
        pytest.param(4, "frozen", id="lora-frozen", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_interrupted_to_the_bit(
    settings: Callable[..., TrainConfig], lora_rank: int, teacher: Any
) -> None:
    # Three steps an epoch; a snapshot at step 4, after each cut.
    common: dict[str, Any] = {
        "lora_rank": lora_rank,
        "teacher": teacher,
        "ema_rate": 0.2,
        "snapshot_steps": 4,
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "importance_cap": 2.0,
    }
    whole = settings("whole", **common)
    train(whole)
    assert len(load_file(list_checkpoints(Path(whole.output_dir))[-1] / "teacher.safetensors")) == (
        0 if teacher == "frozen" else 28 if lora_rank else 21
    )

    crashed = settings("crashed", **common)  # in the middle of an epoch, one step after a checkpoint
    with pytest.raises(Cut):
        train(crashed, on_step=crash_at(5))
    assert [m["step"] for m in metrics_of(crashed)] == [1, 2, 3, 4, 5]
    train(crashed, resume=True)
    assert_same_run(whole, crashed)

    stopped = settings("stopped", **common)  # at the end of an epoch, where no checkpoint is due
    with pytest.raises(RunStopped):
        train(stopped, on_step=terminate_at(3))
    assert [path.name for path in list_checkpoints(Path(stopped.output_dir))] == [
        "checkpoint-00000002",
        "checkpoint-00000003",
    ]
    train(stopped, resume=True)
    assert_same_run(whole, stopped)


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(
    settings: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, crashed = settings("whole", save_steps=3), settings("crashed", save_steps=3)
    train(whole)
    with pytest.raises(Cut):
        train(crashed, on_step=crash_at(2))
    assert list_checkpoints(Path(crashed.output_dir)) == []
    capsys.readouterr()
    train(crashed, resume=True)
    assert f"no checkpoint to resume from in {crashed.output_dir}: starting" in capsys.readouterr().err
    assert_same_run(whole, crashed)


def test_a_run_that_is_resumed_where_there_is_none_says_so_first(
    settings: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings("new", max_steps=1)
    capsys.readouterr()  # what writing the model has printed
    train(config, resume=True)
    said = capsys.readouterr().err
    assert said.startswith(f"note: {config.output_dir} holds no run to resume, so a new one begins there\n")
    assert said.count("to resume") == 1


def test_other_rows_are_refused_before_they_are_evaluated_with_what_has_changed(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    test = str(write_rows(count=2, name="test.jsonl"))
    for method in ("sdft", "ssd"):
        config = settings(method, method=method, test=test, max_steps=1, save_steps=1, max_completion_length=12)
        train(config)
        other = config.model_copy(update={"data": str(write_rows(count=5, name="other.jsonl"))})
        told = f"changed: data was '{config.data}' and is now '{other.data}'; if these are the same, template"
        with monkeypatch.context() as patch:
            if method == "sdft":  # the samples of ssd become its examples
                patch.setattr("selfdistill.training.trainer.Evaluator", None)
            with pytest.raises(UserError, match=re.escape(told)):
                train(other, resume=True)


def test_what_a_run_decides_and_does_not_use_is_said(settings: Callable[..., TrainConfig]) -> None:
    run = Trainer(settings(method="sft", context="turns", teacher="frozen", lora_rank=4))
    assert run.config.lora_alpha == 8
    assert "note: sft ignores these settings: context, teacher" in first_lines(run)
    assert not any("ignores these settings" in line for line in first_lines(Trainer(settings(teacher="frozen"))))


def test_settings_of_anchors_without_anchors_are_not_blamed_on_the_method(settings: Callable[..., TrainConfig]) -> None:
    without = first_lines(Trainer(settings(method="sft", anchor_share=0.5, anchor_divergence="jsd")))
    assert "note: without anchors, these settings have no effect: anchor_share, anchor_divergence" in without
    assert not any("ignores" in line and "anchor" in line for line in without)
    off = first_lines(Trainer(settings(method="sft", anchors="package", anchor_share=0)))
    assert "note: anchor_share is 0, so no anchors are used" in off


def test_the_first_lines_tell_what_lora_may_not_learn_of_a_new_end_token(
    settings: Callable[..., TrainConfig], model_folder: Callable[..., Path]
) -> None:
    base = str(model_folder(template="{% for m in messages %}{{ m.role }}: {{ m.content }} <|stop|>\n{% endfor %}"))
    doubt = "a base that never learnt '<|stop|>' may not learn to end with it"
    assert any(doubt in line for line in first_lines(Trainer(settings(model=base, lora_rank=2))))
    assert not any(doubt in line for line in first_lines(Trainer(settings(model=base))))
    assert not any("may not learn" in line for line in first_lines(Trainer(settings(lora_rank=2))))


def test_prompts_that_are_rendered_chats_are_noted(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"<|im_start|>user\nq{i}<|im_end|>\n<|im_start|>assistant\n", "answer": "a"} for i in range(4)]
    Trainer(settings(method="grpo", data=str(write_rows(rows, name="rendered.jsonl"))))
    note = "note: 4 of 4 prompts contain '<|im_start|>', which stays plain text, because the chat template is applied"
    assert note in capsys.readouterr().err


def test_the_first_lines_name_anchors_of_which_the_share_is_none(settings: Callable[..., TrainConfig]) -> None:
    tiny = {"method": "sft", "anchors": "package", "anchor_share": 0.001, "batch_size": 2}
    few = first_lines(Trainer(settings(**tiny, max_steps=10)))
    assert (
        "note: anchors:package is in none of the 10 steps; raise batch_size or its share (of anchors: anchor_share)"
        in few
    )
    assert not any("is in none of" in line for line in first_lines(Trainer(settings(**tiny, max_steps=500))))
    used = first_lines(Trainer(settings(method="sft", anchors="package", anchor_share=0.5)))
    assert not any("note:" in line and "anchor" in line for line in used)


def test_a_run_that_can_hardly_learn_says_so(settings: Callable[..., TrainConfig]) -> None:
    repeats = "so every step repeats some; lower batch_size, and set the number of steps with max_steps"
    lines = first_lines(Trainer(settings(batch_size=8, max_steps=None)))
    assert f"note: 6 demonstrations do not fill a batch of 8, {repeats}" in lines
    assert "note: this run has only 2 steps, which teaches a model little; raise max_steps" in lines
    given = first_lines(Trainer(settings(batch_size=6, max_steps=1)))
    assert "note: this run has only 1 step, which teaches a model little; raise max_steps" in given
    shared = first_lines(Trainer(settings(batch_size=10, anchors="package", anchor_share=0.25)))
    assert f"note: 6 demonstrations do not fill their part (7 or more) of a batch of 10, {repeats}" in shared
    assert not any("batch_size" in line for line in first_lines(Trainer(settings(batch_size=6, max_steps=5))))


@pytest.mark.parametrize(("batch_size", "share"), [(20, 0.7), (9, 0.25)])
def test_rows_that_fill_their_part_of_some_batches_are_not_called_too_few(
    settings: Callable[..., TrainConfig], batch_size: int, share: float
) -> None:
    """6 rows are all of the part in float arithmetic, 6.000000000000001, or that of some steps, 6 or 7."""
    lines = first_lines(Trainer(settings(batch_size=batch_size, anchors="package", anchor_share=share)))
    assert not any("so every step repeats some" in line for line in lines)


def test_a_plan_with_samples_of_one_batch_does_not_call_the_data_too_few(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path]
) -> None:
    """Of a plan's batch, ssd drops the shortest samples."""
    rows = {"method": "ssd", "data": str(write_rows(count=24, name="many.jsonl")), "max_steps": 5}
    notes = plan(settings(**rows, batch_size=12)).notes
    assert "note: for this plan, samples of 12 of 24 rows were drawn" in notes
    assert any(line.startswith("ssd on 11 demonstrations") for line in notes)
    assert not any("so every step repeats some" in line for line in notes)
    few = plan(settings(**rows, batch_size=24)).notes
    assert any("do not fill a batch of 24, so every step repeats some" in line for line in few)
    assert not any("for this plan" in line for line in few)


def test_demonstrations_longer_than_samples_are_counted(
    settings: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        "note: 4 of 6 demonstrations are longer than a sample may be, 4 tokens: up to 9; raise max_completion_length "
        "(train.jsonl:2; train.jsonl:3; train.jsonl:4; train.jsonl:6)\n"
    )
    for method in ("sdft", "grpo"):
        Trainer(settings(method=method, max_completion_length=4))
        assert said.replace("train.jsonl", settings().data) in capsys.readouterr().err
    Trainer(settings(max_completion_length=9))
    assert "longer than a sample" not in capsys.readouterr().err


def test_a_run_whose_samples_were_all_truncated_says_so_at_its_end(
    settings: Callable[..., TrainConfig], model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        "note: 100% of the samples were truncated at their maximum length, so the model hardly learnt to end a reply; "
        "raise max_completion_length\n"
    )
    model = str(model_folder(ends=(257,)))
    for out, values, count in (
        ("cut", {"max_completion_length": 2}, 1),
        ("whole", {"max_completion_length": 10, "model": settings().model}, 0),
        ("cold", {"cold_start_steps": 2, "max_steps": 4, "learning_rate": 1e-9}, 1),  # demonstrations come first
        ("demonstrated", {"method": "sft"}, 0),
    ):
        train(settings(out, **{"model": model, "max_steps": 2} | values))
        assert capsys.readouterr().err.count(said) == count


def test_resuming_a_finished_run_writes_the_same_final_model_again(settings: Callable[..., TrainConfig]) -> None:
    config = settings(save_steps=3)
    train(config)
    before, lines = final_weights(config), metrics_of(config)
    shutil.rmtree(Path(config.output_dir) / "final")
    train(config, resume=True)
    assert same(before, final_weights(config))
    assert metrics_of(config) == lines


def test_a_run_that_is_going_on_elsewhere_is_not_continued(settings: Callable[..., TrainConfig]) -> None:
    config = settings(save_steps=3)

    def on_step(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 4:
            train(config, resume=True)

    with pytest.raises(UserError, match=r"output_dir '.*run': in use by another process; wait for it, or stop"):
        train(config, on_step=on_step)
    train(config, resume=True)
    with folder_lock(Path(config.output_dir), "free"):
        pass


@pytest.mark.parametrize("values", [{"lora_rank": 4}, {"teacher": "frozen"}], ids=["lora", "frozen teacher"])
def test_a_run_whose_model_has_changed_is_not_continued(
    settings: Callable[..., TrainConfig], tmp_path: Path, values: dict[str, Any]
) -> None:
    config = settings(save_steps=3, **values)
    copied = shutil.copytree(config.model, tmp_path / "model")
    config = config.model_copy(update={"model": str(copied)})
    train(config)
    train(config, resume=True)
    weights_ = load_file(copied / "model.safetensors")
    weights_["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(weights_, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"checkpoint-00000006: changed since the run began: the initial weights of model '.*model'; "
    ):
        train(config, resume=True)


def test_a_run_goes_on_where_its_files_lie_elsewhere(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    test = write_rows(count=2, name="test.jsonl")
    asked = {"test": str(test), "prior": str(test)}
    begun = settings(max_steps=3, save_steps=3, lr_scheduler_type="constant", drift_steps=0, **asked)
    whole = begun.model_copy(update={"max_steps": 6, "output_dir": str(tmp_path / "whole")})
    train(whole)
    train(begun)
    places = {
        "model": str(shutil.copytree(begun.model, tmp_path / "elsewhere" / "model")),
        "data": str(shutil.copy(begun.data, tmp_path / "elsewhere" / "rows.jsonl")),
        "test": str(shutil.copy(test, tmp_path / "elsewhere" / "questions.jsonl")),
        "prior": str(shutil.copy(test, tmp_path / "elsewhere" / "test.jsonl")),
        "output_dir": str(shutil.move(begun.output_dir, tmp_path / "elsewhere" / "run")),
    }
    moved = begun.model_copy(update=places | {"max_steps": 6})
    write_rows(count=3, name="elsewhere/questions.jsonl")
    with pytest.raises(
        UserError,
        match=r"checkpoint-00000003: changed since the run began: the rows of test '.*questions.jsonl' or prior '.*'; ",
    ):
        train(moved, resume=True)
    shutil.copy(test, places["test"])
    with pytest.raises(UserError, match=r"prior was '.*' and is now None; a resumed run keeps its settings"):
        train(moved.model_copy(update={"prior": None}), resume=True)
    train(moved, resume=True)
    assert_same_run(whole, moved)


def test_a_run_on_a_folded_adapter_goes_on_in_its_place_only(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    adapter = settings("adapter", lora_rank=2, max_steps=1)
    train(adapter)
    config = settings(model=f"{adapter.output_dir}/final", save_steps=3)
    train(config)
    train(config, resume=True)
    copied = shutil.copytree(config.model, tmp_path / "model")
    with pytest.raises(UserError, match=r"checkpoint-00000006: model was '.*final' and is now '.*model'; with"):
        train(config.model_copy(update={"model": str(copied)}), resume=True)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(save_steps=3)
    train(config)

    def refuse(_path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("selfdistill.runtime.files.sha256", refuse)
    with pytest.raises(UserError, match=r"checkpoint-00000006/.*: permission denied; resume as the user"):
        train(config, resume=True)
    assert len(list_checkpoints(Path(config.output_dir))) == 2


def test_a_checkpoint_of_another_teacher_or_model_is_refused(
    settings: Callable[..., TrainConfig], model_folder: Callable[..., Path]
) -> None:
    config = settings(save_steps=3, teacher="frozen")
    train(config)
    (Path(config.output_dir) / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"checkpoint-00000006/config.yaml: teacher was 'frozen' and is now 'ema'; "):
        train(settings(save_steps=3, teacher="ema"), resume=True)
    tied = str(model_folder(ends=ENDS, tied=True))
    changed = (
        r"checkpoint-00000006: changed since the run began: the initial weights of model '.*', config.json of model"
    )
    with pytest.raises(UserError, match=changed):
        train(settings(save_steps=3, teacher="frozen", model=tied), resume=True)


# --- stopping and failing ---


def test_sigterm_saves_and_stops_with_143_and_gives_the_handler_back(settings: Callable[..., TrainConfig]) -> None:
    config = settings()  # save_steps 0: no checkpoint but this one
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped) as error:
        train(config, on_step=terminate_at(2))
    assert error.value.exit_code == 143
    assert str(error.value) == (
        f"{config.output_dir}: stopped after step 2 of 6; progress is saved, continue with resume=True"
    )
    assert [path.name for path in list_checkpoints(Path(config.output_dir))] == ["checkpoint-00000002"]
    assert not (Path(config.output_dir) / "final").exists()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_during_the_last_step_finishes_the_run(settings: Callable[..., TrainConfig]) -> None:
    final = train(settings(), on_step=terminate_at(6))
    assert (final / "model.safetensors").exists()


def test_a_step_that_fails_saves_the_steps_before_it(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scorer = """
from pathlib import Path

def score(reply, row):
    if Path("odd").exists():
        raise KeyError("an odd sample")
    return len(reply) / (1 + len(reply))
"""
    Path("sometimes.py").write_text(scorer, encoding="utf-8")
    values: dict[str, Any] = {"method": "grpo", "scorer": "python:sometimes.score", "num_generations": 2}
    whole, cut = (settings(out, save_steps=100, **values) for out in ("whole", "cut"))
    train(whole)
    Path("odd").touch()
    with pytest.raises(UserError, match="an odd sample"):
        train(cut)
    assert list_checkpoints(tmp_path / "cut") == []  # nothing was learnt
    Path("odd").unlink()

    def on_step(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3:
            Path("odd").touch()

    with pytest.raises(UserError, match="an odd sample"):
        train(cut, resume=True, on_step=on_step)
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["checkpoint-00000003"]
    Path("odd").unlink()
    train(cut, resume=True)
    assert_same_run(whole, cut)


def test_an_output_folder_that_is_in_use_is_refused_and_untouched(settings: Callable[..., TrainConfig]) -> None:
    config = settings()
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "precious.txt").write_text("mine", encoding="utf-8")
    want = f"output_dir {config.output_dir!r} exists and is not empty: choose another, or continue it with resume=True"
    with pytest.raises(UserError, match=f"^{re.escape(want)}$"):
        train(config)
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


def test_a_loss_that_is_not_finite_changes_nothing_and_names_its_row(settings: Callable[..., TrainConfig]) -> None:
    run = Trainer(settings(batch_size=6, gradient_accumulation_steps=3))
    scored = run.forward_pass
    guilty = run.stage.task.examples[4]

    def one_row_is_nan(network: Any, contexts: Any, completions: Any, *more: Any) -> Any:
        scores = scored(network, contexts, completions, *more)
        factor_N = torch.ones(len(scores.hidden_ND))
        start = 0
        for context, completion in zip(contexts, completions, strict=True):
            if context == guilty.student_ids:
                factor_N[start : start + len(completion)] = torch.nan
            start += len(completion)
        return replace(scores, hidden_ND=scores.hidden_ND * factor_N[:, None])

    run.gradient = replace(run.gradient, forward_pass=one_row_is_nan)  # type: ignore[arg-type]
    before, average = weights(run.loaded.model), copy.deepcopy(run.teacher.state_dict())  # type: ignore[union-attr]
    metrics = run.step(0)
    assert metrics["skipped"] == {"why": "the loss is nan", "rows": [guilty.demonstration.source]}
    assert "loss" not in metrics
    assert "entropy" not in metrics
    assert same(before, weights(run.loaded.model))
    assert same(average, run.teacher.state_dict())  # type: ignore[union-attr]
    assert not run.optimizer.state
    assert all(parameter.grad is None for parameter in run.parameters)


def test_a_gradient_that_is_not_finite_changes_nothing(settings: Callable[..., TrainConfig]) -> None:
    run = moved_run(settings())
    run.loaded.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    before, average = weights(run.loaded.model), copy.deepcopy(run.teacher.state_dict())  # type: ignore[union-attr]
    metrics = run.step(1)
    assert metrics["skipped"]["why"] in ("the gradient's norm is inf", "the gradient's norm is nan")
    assert len(metrics["skipped"]["rows"]) == 2
    assert math.isfinite(metrics["loss"])
    assert same(before, weights(run.loaded.model))
    assert same(average, run.teacher.state_dict())  # type: ignore[union-attr]


class _Spoilt:
    """Makes the gradients of some steps infinite."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        self._steps, self._step, self._whole = steps, Trainer.step, BatchGradient.add
        monkeypatch.setattr(Trainer, "step", lambda run, step: self._begin(run, step))
        monkeypatch.setattr(BatchGradient, "add", lambda *arguments: self._add(*arguments))

    def _begin(self, run: Trainer, step: int) -> Any:
        self._now = step + 1
        return self._step(run, step)

    def _add(self, gradient: Any, *arguments: Any) -> Any:
        result = self._whole(gradient, *arguments)
        if self._now in self._steps:
            for parameter in gradient.loaded.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)
        return result


def test_steps_that_are_left_out_are_said_and_too_many_in_a_row_stop_the_run(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _Spoilt(monkeypatch, {1, 2, 4, 5, 6})
    config = settings(max_skipped_steps=3, max_steps=8, save_steps=4)
    with pytest.raises(RunFailed) as error:
        train(config)
    assert error.value.exit_code == 3
    rows = r"train.jsonl:\d, .*train.jsonl:\d"
    assert re.fullmatch(
        rf"{re.escape(config.output_dir)}: 3 consecutive steps were skipped; in the last, step 6, the gradient's norm "
        rf"is (inf|nan) \(.*{rows}\); they did not change the weights. Lower learning_rate, inspect these "
        "rows, or see metrics.jsonl for the onset",
        str(error.value),
    )
    said = capsys.readouterr().err
    assert re.search(rf"^note: step 2 was skipped: the gradient's norm is (inf|nan) \(.*{rows}\)$", said, re.M)
    lines = metrics_of(config)
    assert ["skipped" in line for line in lines] == [True, True, False, True, True, True]
    learnt = lines[2]["tokens"]
    assert learnt > 0
    assert [line["tokens"] for line in lines] == [0, 0, learnt, learnt, learnt, learnt]
    assert [path.name[-1] for path in list_checkpoints(Path(config.output_dir))] == ["4", "6"]


def test_tokens_are_those_of_selected_completions_also_without_a_gradient(
    settings: Callable[..., TrainConfig],
) -> None:
    metrics = Trainer(settings(method="grpo", scorer="exact", batch_size=2, num_generations=2)).step(0)
    assert metrics["reward"] == metrics["grad_norm"] == 0
    assert metrics["tokens"] == 4 * metrics["completion/length"] > 0
    assert "selected" in METRICS["tokens"]
    assert "without a gradient" in METRICS["tokens"]


def test_a_resumed_run_remembers_how_many_steps_were_left_out(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    _Spoilt(monkeypatch, {3, 4, 5})
    config = settings(max_skipped_steps=3, save_steps=2)
    with pytest.raises(Cut):
        train(config, on_step=crash_at(4))
    with pytest.raises(RunFailed, match="3 consecutive steps were skipped; in the last, step 5"):
        train(config, resume=True)


FILES = ["weights.safetensors", "optimizer.safetensors", "teacher.safetensors", "state.json", "config.yaml"]


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        pytest.param(damage, name, marks=() if "bit" in damage or "weights" in name else pytest.mark.slow)
        for damage in ("cut", "missing", "bit", "foreign", "empty")
        for name in (*FILES, "manifest.json")
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    settings: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    config = settings(save_steps=2)
    with pytest.raises(Cut):
        train(config, on_step=crash_at(4 + 1))
    before, newest = list_checkpoints(Path(config.output_dir))
    file = newest / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "bit":
        middle = content.index(b'"sha256": "') + 12 if name == "manifest.json" else len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        other = (before / name).read_bytes() if name not in ("config.yaml",) else b"method: sft\n"
        file.write_bytes({"cut": content[:-2], "foreign": other, "empty": b""}[damage])
    assert not file.exists() or file.read_bytes() != content
    capsys.readouterr()
    assert newest_whole(Path(config.output_dir)) == before
    said = capsys.readouterr().err
    assert said.startswith(f"note: skipping the corrupt checkpoint {newest} (")
    assert said.endswith(")\n")
    assert said.count("\n") == 1
    guilty = re.search(r"\((\S+) ", said)
    assert guilty is not None
    assert guilty[1] in (FILES if name == "manifest.json" and damage in ("bit", "foreign") else [name, "manifest.json"])


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    settings: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = settings("whole", save_steps=2), settings("damaged", save_steps=2)
    train(whole)
    with pytest.raises(Cut):
        train(damaged, on_step=crash_at(5))
    older, newest = list_checkpoints(Path(damaged.output_dir))
    (newest / "weights.safetensors").write_bytes(b"")
    (older / "optimizer.pt").write_bytes(b"not ours")
    capsys.readouterr()
    train(damaged, resume=True)
    said = capsys.readouterr().err
    assert re.search(r"skipping the corrupt checkpoint .*-00000004 \(weights.safetensors has 0 of \d+ bytes\)", said)
    assert f"note: {older}: ignoring files that are not part of the checkpoint: optimizer.pt\n" in said
    assert "resuming after step 2\n" in said
    assert_same_run(whole, damaged)


def test_without_a_whole_checkpoint_a_run_does_not_go_on(settings: Callable[..., TrainConfig]) -> None:
    config = settings(save_steps=2)
    train(config)
    for path in list_checkpoints(Path(config.output_dir)):
        (path / "state.json").unlink()
    with pytest.raises(UserError) as error:
        train(config, resume=True)
    assert str(error.value) == (
        f"{config.output_dir}: no checkpoint is intact: checkpoint-00000006 (state.json is missing), "
        "checkpoint-00000004 (state.json is missing); restore one, or start a new run in another output_dir"
    )


def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(settings: Callable[..., TrainConfig]) -> None:
    one, other = settings("one", save_steps=3), settings("other", save_steps=3, ema_rate=0.3)
    train(one)
    with pytest.raises(Cut):
        train(other, on_step=crash_at(3))
    last = list_checkpoints(Path(one.output_dir))[-1]
    shutil.copytree(last, Path(other.output_dir) / last.name)
    with pytest.raises(UserError, match=r"checkpoint-00000006/config.yaml: ema_rate was 0.01 and is now 0.3; a"):
        train(other, resume=True)


@pytest.mark.parametrize("failing", [*(pytest.param(at, marks=pytest.mark.slow) for at in (0, 1)), 2])
def test_a_full_disk_leaves_the_earlier_checkpoints_whole(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    whole, full = settings("whole", save_steps=2, view_rows=1), settings("full", save_steps=2, view_rows=1)
    train(whole)
    calls = []

    def save_file(tensors: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 4 + failing:  # of the second checkpoint
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        checkpoint_save(tensors, path)

    checkpoint_save = checkpoint_module.save_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", save_file)
        with pytest.raises(UserError) as error:
            train(full)
    out = Path(full.output_dir)
    assert str(error.value) == (
        f"{out / 'checkpoint-00000004'}: cannot write the checkpoint ([Errno 28] No space left on device); earlier "
        "checkpoints are intact. Free disk space, then continue with resume=True"
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint-00000002",
        "config.yaml",
        "metrics.jsonl",
        "system_turn.json",
        "token_views.jsonl",
    ]
    train(full, resume=True)
    assert_same_run(whole, full)


def test_a_final_model_that_cannot_be_written_is_one_line_and_can_be_continued(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(save_steps=6)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def on_step(_step: int, loaded: Any, _metrics: Any) -> None:
        monkeypatch.setattr(loaded.model, "save_pretrained", refuse)

    with pytest.raises(UserError, match=r"final: cannot write the model \(\[Errno 28\].*which needs a checkp"):
        train(config, on_step=on_step)
    assert not (Path(config.output_dir) / "final").exists()
    assert (train(config, resume=True) / "model.safetensors").exists()


def test_a_final_model_that_cannot_be_flushed_leaves_the_earlier_one(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(save_steps=3, max_steps=3, lr_scheduler_type="constant")
    train(config)
    before = final_weights(config)

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(import_module("selfdistill.training.export"), "fsync", refuse)
    with pytest.raises(UserError, match=r"final: cannot write the model \(\[Errno 28\]"):
        train(config.model_copy(update={"max_steps": 6}), resume=True)
    assert same(before, final_weights(config))


def test_skipping_most_of_the_completions_is_refused(settings: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match=r"^skip_first_tokens: 9 would mask \d+ of \d+ completion tokens and all of 6"):
        train(settings(skip_first_tokens=9))
    assert not Path(settings().output_dir).exists()


def test_samples_of_rows_without_demonstrations_are_measured_in_the_first_step(
    settings: Callable[..., TrainConfig],
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"prompt": f"q{i}", "privileged_context": f"What is q{i}?"} for i in range(4)]
    data = str(write_rows(rows, name="rewritten.jsonl"))
    short: dict[str, Any] = {"method": "msd", "context": "rewritten", "data": data, "max_steps": 2}
    short |= {"skip_first_tokens": 3, "max_completion_length": 3}
    message = (
        r"^skip_first_tokens: 3 would mask (\d) of \1 completion tokens and all of 2 of 2 samples in the first step;"
    )
    with pytest.raises(UserError, match=message):
        train(settings(**short))
    monkeypatch.setattr("selfdistill.training.trainer.check_first_samples", lambda *_: None)  # later ones may be short
    train(settings("later", **short))
    said = "note: in 2 of 2 steps no sample taught anything, because skip_first_tokens 3 masked them all; lower it"
    assert said in capsys.readouterr().err
    train(settings("enough", **short | {"skip_first_tokens": 0}))
    assert "taught" not in capsys.readouterr().err


# --- what a run folder holds ---


@pytest.mark.parametrize("tied", [False, True])
def test_the_final_model_is_what_was_trained_and_loads_with_transformers(
    settings: Callable[..., TrainConfig], model_folder: Callable[..., Path], tied: bool
) -> None:
    kept: dict[str, Tensor] = {}
    config = settings(model=str(model_folder(ends=ENDS, tied=tied)))
    final = train(config, on_step=lambda _step, loaded, _metrics: kept.update(weights(loaded.model)))
    assert final == Path(config.output_dir) / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert same({name: p.detach() for name, p in model.named_parameters()}, kept)
    assert not same(kept, weights(load_model(config.model).model))
    assert model.generation_config.eos_token_id == list(ENDS)
    assert AutoTokenizer.from_pretrained(final)("<|im_end|>")["input_ids"] == [257]
    assert same(weights(load_model(config.output_dir).model), kept)  # the run folder stands for its final model
    assert not list(Path(config.output_dir).glob(".*"))


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_keeping_a_frozen_teachers_contexts_changes_no_number(
    settings: Callable[..., TrainConfig], lora_rank: int
) -> None:
    common: dict[str, Any] = {"teacher": "frozen", "lora_rank": lora_rank, "context": "turns:repeats=3"}
    read, kept = (settings(name, teacher_cache_mib=mib, **common) for name, mib in (("read", 0), ("kept", 1)))
    train(read)
    train(kept)
    for a, b in zip(metrics_of(read), metrics_of(kept), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["kl/reverse"] == pytest.approx(a["kl/reverse"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"teacher": "frozen"}, True),
        ({"teacher": "frozen", "lora_rank": 4}, True),
        ({"teacher": "frozen", "teacher_cache_mib": 0}, False),
        ({"teacher": "ema"}, False),
        ({"method": "sft", "teacher": "frozen"}, False),
    ],
)
def test_only_what_a_frozen_teacher_reads_is_kept(
    settings: Callable[..., TrainConfig], options: dict[str, Any], kept: bool
) -> None:
    run = Trainer(settings(**options))
    assert any(run.prefix_caches.values()) == kept
    assert any("cached for later epochs" in line for line in first_lines(run)) == kept


@pytest.mark.parametrize("teacher", ["frozen", "live", "ema"])
def test_the_teachers_drift_is_zero_the_students_or_its_own(settings: Callable[..., TrainConfig], teacher: Any) -> None:
    config = settings(teacher=teacher, ema_rate=0.5, learning_rate=1e-2, drift_steps=3)
    train(config)
    last = metrics_of(config)[-1]
    assert last["drift/student"] > 0
    expected = {"frozen": 0.0, "live": last["drift/student"]}
    if teacher in expected:
        assert last["drift/teacher"] == expected[teacher]
    else:
        assert 0 < last["drift/teacher"] != last["drift/student"]


def test_a_separate_teacher_has_no_drift(
    settings: Callable[..., TrainConfig], model_folder: Callable[..., Path]
) -> None:
    config = settings(teacher_model=str(model_folder(ends=ENDS, seed=1)), learning_rate=1e-2, drift_steps=3)
    train(config)
    last = metrics_of(config)[-1]
    assert last["drift/student"] > 0
    assert "drift/teacher" not in last


@pytest.mark.parametrize("teacher", quick(["ema", "frozen"], "ema"))
def test_a_final_adapter_is_what_was_trained_and_loads_with_peft(
    settings: Callable[..., TrainConfig], teacher: Any
) -> None:
    config = settings(lora_rank=4, teacher=teacher, learning_rate=1e-2)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    logits: list[Tensor] = []

    @torch.no_grad()
    def on_step(_step: int, loaded: Any, _metrics: Any) -> None:
        logits.append(loaded.model(ids).logits)

    final = train(config, on_step=on_step)
    assert sorted(path.name for path in final.glob("*adapter*")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert len({path.stat().st_mode for path in final.iterdir()}) == 1, "whoever may read one file may read all"
    assert not (final / "teacher").exists()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), final)
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, logits[-1])
        assert torch.equal(load_model(config.output_dir).model(ids).logits, logits[-1])
        torch.testing.assert_close(
            load_model(config.output_dir, merge_adapter=True).model(ids).logits, logits[-1], atol=1e-5, rtol=0
        )
    assert float((logits[-1] - logits[0]).abs().max()) > 0.01


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_training_goes_on_from_an_adapter_without_losing_it(
    settings: Callable[..., TrainConfig], lora_rank: int
) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    train(settings("first", lora_rank=4, learning_rate=1e-2))
    seen: list[Tensor] = []

    @torch.no_grad()
    def on_step(_step: int, loaded: Any, _metrics: Any) -> None:
        seen.append(loaded.model(ids).logits)

    second = settings("second", model=settings("first").output_dir, lora_rank=lora_rank, learning_rate=1e-2)
    train(second, on_step=on_step)
    with torch.no_grad():
        first_logits, second_logits = (
            load_model(settings(name).output_dir).model(ids).logits for name in ("first", "second")
        )
    torch.testing.assert_close(seen[0], first_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(second_logits, seen[-1], atol=1e-5, rtol=0)


def test_a_checkpoint_that_cannot_be_read_is_passed_over(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(save_steps=3)
    train(config)
    before, newest = list_checkpoints(Path(config.output_dir))
    whole = files.sha256

    def failing(path: Path) -> str:
        if path.parent == newest:
            raise OSError(errno.EIO, "Input/output error")
        return whole(path)

    monkeypatch.setattr(files, "sha256", failing)
    assert newest_whole(Path(config.output_dir)) == before
    assert (
        f"skipping the corrupt checkpoint {newest} (config.yaml cannot be read (Input/output error))"
        in capsys.readouterr().err
    )
    (before / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json names no file"):
        newest_whole(Path(config.output_dir))


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(settings: Callable[..., TrainConfig], limit: int) -> None:
    config = settings(save_steps=1, save_total_limit=limit, max_steps=5)
    train(config)
    kept = [path.name for path in list_checkpoints(Path(config.output_dir))]
    assert kept == [f"checkpoint-{step:08d}" for step in range(6 - max(2, limit), 6)]


def test_a_resumed_run_keeps_no_file_of_its_checkpoint_in_use(settings: Callable[..., TrainConfig]) -> None:
    """Else its blocks stay taken until the run ends, and on NFS its folder cannot be removed."""
    config = settings(save_steps=2)
    with pytest.raises(Cut):
        train(config, on_step=crash_at(5))
    mapped: list[str] = []

    def look(step: int, _loaded: Any, _metrics: Any) -> None:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        mapped.extend(line for line in maps if "checkpoint-" in line)

    train(config, resume=True, on_step=look)
    assert mapped == []


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove = checkpoint_module.remove_folder

    def refuse(folder: Path) -> None:
        if folder.name == "checkpoint-00000001" and folder.exists():
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        remove(folder)

    monkeypatch.setattr(checkpoint_module, "remove_folder", refuse)
    config = settings(save_steps=1, max_steps=4)
    with progress_shown(True):
        assert (train(config) / "model.safetensors").exists()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "cannot remove" in line)
    first = Path(config.output_dir) / "checkpoint-00000001"
    reason = f"[Errno 39] Directory not empty: '{first}'"
    assert line == f"note: cannot remove the old checkpoint {first.name} ({reason}); remove it by hand"


def test_of_a_linked_checkpoint_only_the_link_is_removed(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = settings(save_steps=1)
    out = Path(config.output_dir)
    with pytest.raises(Cut):
        train(config, on_step=crash_at(3))
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    for path in list_checkpoints(out):
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    (out / ".checkpoint-00000001.removed").symlink_to(elsewhere)
    train(config, resume=True)
    names = sorted(path.name for path in out.iterdir())
    assert [name for name in names if "checkpoint" in name] == ["checkpoint-00000005", "checkpoint-00000006"]
    assert [path.name for path in list_checkpoints(elsewhere)] == ["checkpoint-00000001", "checkpoint-00000002"]


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_every_step_reports_every_metric(settings: Callable[..., TrainConfig], method: Any) -> None:
    config = settings(method=method, importance_cap=2.0 if method == "sdft" else None, drift_steps=1)
    completions: list[int] = []
    train(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    of_sdft = {"kl/forward", "kl/reverse", "drift/teacher", "importance", "rollout/tokens_per_second"}
    of_others = {
        "reward",
        "reward/helped",
        "teacher_gain/right",
        "teacher_gain/wrong",
        "learnt",
        "unfit",
        "control",
        "skipped",
        "loss/PART",
        "share/PART",
        "time/of/PART_s",
    }
    of_others |= {"engine/gap", "engine/gap_max", "time/sync_s", "turn_loss/NUMBER"}
    of_others |= {f"episode/{name}" for name in ("turns", "invalid_calls", "cut", "reward", "success")}
    expected = set(METRICS) - of_others - (of_sdft if method == "sft" else set())
    values = [json.loads(line) for line in lines]
    assert [v["step"] for v in values] == [1, 2, 3, 4, 5, 6]
    assert all(v.keys() == expected for v in values)
    assert all(isinstance(x, int | float) and x == x for v in values for x in v.values())
    assert [v["epoch"] for v in values] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    for v in values:
        completions.append(round(2 * v["completion/length"]))
        assert v["tokens"] == sum(completions)
        assert v["drift/student"] > 0
    if method == "sdft":
        assert all(v["loss"] == pytest.approx(v["kl/forward"], abs=1e-5) for v in values)
        assert 0 < values[0]["drift/teacher"] < values[0]["drift/student"]
        for v, sampled in zip(values, completions, strict=True):
            assert 0 < sampled / v["rollout/tokens_per_second"] <= v["time/rollout_s"]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (9, [6]), (0, [])])
def test_drift_is_measured_every_so_many_steps(
    settings: Callable[..., TrainConfig], every: int, steps: list[int]
) -> None:
    config = settings(drift_steps=every)
    train(config)
    metrics = metrics_of(config)
    for key in ("drift/student", "drift/teacher"):
        assert [m["step"] for m in metrics if key in m] == steps


def test_dropped_rows_are_counted_and_said(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "x" * (300 if i == 1 else 3), "completion": "y"} for i in range(5)]
    train(settings(data=str(write_rows(rows, name="long.jsonl")), on_long_prompt="drop", max_steps=1))
    captured = capsys.readouterr()
    assert "sdft on 4 demonstrations (1 too long, dropped), 1 step of 2" in captured.err
    assert captured.out == ""


# --- settings that act in the loop ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_on_policy_the_importance_weight_is_one_at_any_temperature(
    settings: Callable[..., TrainConfig], temperature: float
) -> None:
    run = moved_run(settings(importance_cap=2.0, temperature=temperature, batch_size=4))
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 3)
    unweighted = replace(run.stage.task.method, importance_cap=None)
    assert add_gradient(run, completions).importance == pytest.approx(1.0, abs=1e-3)
    on_policy = gradients(run.loaded.model)
    run.stage.task.method, weighted = unweighted, run.stage.task.method
    run.optimizer.zero_grad()
    add_gradient(run, completions)
    assert largest_difference(gradients(run.loaded.model), on_policy) < 1e-3

    def shifted(by: float) -> list[Completion]:
        return [replace(c, logps=[logp + by for logp in c.logps or []]) for c in completions]

    run.stage.task.method = weighted
    for shift, ratio in ((0.6931472, 0.5), (-0.4054651, 1.5), (-3.0, 2.0)):
        run.optimizer.zero_grad()
        assert add_gradient(run, shifted(shift)).importance == pytest.approx(ratio, abs=2e-3)
        expected = {name: ratio * g for name, g in on_policy.items()}
        assert largest_difference(gradients(run.loaded.model), expected) < 2e-3


def test_the_importance_weight_is_at_the_temperature_of_the_methods_samples(
    settings: Callable[..., TrainConfig],
) -> None:
    def cooler(config: TrainConfig) -> Method:
        (method,) = METHODS["sdft"](config)
        return replace(method, sequence=StudentSamples(Sampling(8, temperature=0.5), 1, config.seed))

    run = moved_run(settings(method=cooler, importance_cap=2.0, batch_size=4))
    completions = run.stage.task.method.sequence(run.loaded, run.stage.task.examples[:4], 3)
    assert add_gradient(run, completions).importance == pytest.approx(1.0, abs=1e-3)


def test_the_learning_rate_follows_the_schedule_and_the_gradient_is_clipped(
    settings: Callable[..., TrainConfig],
) -> None:
    config = settings(lr_scheduler_type="cosine", max_steps=4, learning_rate=1e-3, max_grad_norm=1e-6)
    run = Trainer(config)
    norms, rates = [], []
    for step in range(4):
        before = weights(run.loaded.model)
        metrics = run.step(step)
        rates.append(metrics["learning_rate"])
        norms.append(metrics["grad_norm"])
        assert run.optimizer.param_groups[0]["lr"] == metrics["learning_rate"]
        assert 0 < largest_difference(before, weights(run.loaded.model)) <= 10 * metrics["learning_rate"]
    assert rates == pytest.approx([1e-3, 1e-3 * (0.5 + 0.5**1.5), 5e-4, 1e-3 * (0.5 - 0.5**1.5)])
    assert min(norms) > 1e-3  # before clipping
    second_moments = [state["exp_avg_sq"].sum() for state in run.optimizer.state.values()]
    assert float(sum(second_moments)) < 4 * 0.001 * 1e-12 * 1.01


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_optimizer_never_sees_the_teacher(settings: Callable[..., TrainConfig], lora_rank: int) -> None:
    run = Trainer(settings(lora_rank=lora_rank, teacher="ema", ema_rate=1e-9, weight_decay=0.1, learning_rate=1e-2))
    assert run.teacher is not None
    optimized = {p.data_ptr() for group in run.optimizer.param_groups for p in group["params"]}
    assert optimized == {p.data_ptr() for p in run.loaded.model.parameters() if p.requires_grad}
    assert not optimized & {t.data_ptr() for t in run.teacher.state_dict().values()}
    before = copy.deepcopy(run.teacher.state_dict())
    start = weights(run.loaded.model)
    for step in range(3):
        run.step(step)
    assert largest_difference(before, run.teacher.state_dict()) < 1e-7
    assert largest_difference(start, weights(run.loaded.model)) > 1e-3


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """As in a new process: accelerate keeps its state for a whole one."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    "options", [{}, {"importance_cap": 2.0}, {"teacher": "live"}, {"gradient_checkpointing": True}]
)
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_arithmetic_gives_nearly_the_gradient_of_float32(
    settings: Callable[..., TrainConfig], lora_rank: int, options: dict[str, Any]
) -> None:
    found = {}
    for precision in ("bf16", "no"):
        run = Trainer(settings(mixed_precision=precision, lora_rank=lora_rank, batch_size=4, **options))
        completions = [
            Completion(row, row.completion_ids, [-5.0] * len(row.completion_ids), False)
            for row in run.stage.task.examples[:4]
        ]
        add_gradient(run, completions)
        found[precision] = gradients(run.loaded.model)
        assert all(g.dtype == torch.float32 for g in found[precision].values())
    assert found["bf16"].keys() == found["no"].keys()
    a, b = (torch.cat([g.flatten() for g in found[p].values()]) for p in ("bf16", "no"))
    assert not torch.equal(a, b)
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.98


@pytest.mark.usefixtures("fresh_accelerate")
def test_runs_of_unlike_precision_can_follow_each_other_in_one_process(settings: Callable[..., TrainConfig]) -> None:
    train(settings("a", mixed_precision="no", max_steps=1))
    train(settings("b", mixed_precision="bf16", max_steps=1))
    train(settings("c", mixed_precision="no", max_steps=1))
    assert same(final_weights(settings("a")), final_weights(settings("c")))
    assert not same(final_weights(settings("a")), final_weights(settings("b")))


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron-LM"])
def test_what_the_launcher_would_do_to_the_model_is_refused(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper().replace('-', '_')}", "true")
    with pytest.raises(UserError, match=f"the launcher's own {name} is enabled"):
        Trainer(settings())


def test_the_launchers_gradient_accumulation_divides_no_gradient(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = Trainer(settings()).step(0)["grad_norm"]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert Trainer(settings()).step(0)["grad_norm"] == norm


def test_the_teacher_is_updated_with_the_number_of_steps_done(settings: Callable[..., TrainConfig]) -> None:
    run = Trainer(settings(teacher="snapshot", snapshot_steps=2))
    assert run.teacher is not None
    start = copy.deepcopy(run.teacher.state_dict())
    run.step(0)
    assert same(run.teacher.state_dict(), start)
    run.step(1)
    assert same(run.teacher.state_dict(), weights(run.loaded.model))
    assert not same(run.teacher.state_dict(), start)


def test_a_run_does_not_go_on_with_other_settings(settings: Callable[..., TrainConfig]) -> None:
    train(settings(max_steps=2, save_steps=1, lr_scheduler_type="constant"))
    with pytest.raises(UserError, match=r"learning_rate was 0\.001 and is now 0\.002; a resumed run keeps"):
        train(settings(max_steps=2, save_steps=1, lr_scheduler_type="constant", learning_rate=2e-3), resume=True)
    train(settings(max_steps=3, save_steps=1, lr_scheduler_type="constant"), resume=True)
    assert [line["step"] for line in metrics_of(settings())] == [1, 2, 3]


def test_settings_that_change_no_number_may_change(settings: Callable[..., TrainConfig]) -> None:
    begun = settings(max_steps=2, save_steps=1, lr_scheduler_type="constant")
    train(begun)
    others = {"view_rows": 1, "teacher_cache_mib": 0, "judge_url": "http://localhost:1/v1"}
    given = {"output_dir": begun.output_dir, "max_steps": 3, "mixed_precision": "auto", **others}
    config = continued(given, TrainConfig)
    assert config == begun.model_copy(update={**given, "mixed_precision": "no"})
    train(config, resume=True)
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3]


def test_general_prompts_may_lie_elsewhere_and_stay_the_same(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\nabc\n", encoding="utf-8")
    values: dict[str, Any] = {"method": "sft_reinvoke", "save_steps": 1, "max_completion_length": 20}
    config = settings(general_prompts=str(prompts), max_steps=3, **values)
    with pytest.raises(Cut):
        train(config, on_step=crash_at(2))
    moved = config.model_copy(update={"general_prompts": str(prompts.rename(tmp_path / "moved.txt"))})
    Path(moved.general_prompts or "").write_text("hello\nabd\n", encoding="utf-8")
    with pytest.raises(UserError, match="the training examples have changed"):
        train(moved, resume=True)
    Path(moved.general_prompts or "").write_text("hello\nabc\n", encoding="utf-8")
    train(moved, resume=True)
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3]


def files_of(config: TrainConfig) -> dict[str, bytes]:
    """Everything in a run folder, without the lock and what the clock says."""
    files = (path for path in Path(config.output_dir).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(config.output_dir)): path.read_bytes() for path in files}


def steps_said(config: TrainConfig) -> tuple[int, str, list[int]]:
    """The steps that config.yaml, the model card and metrics.jsonl name."""
    folder = Path(config.output_dir)
    card = (folder / "final" / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"\| `max_steps` \| `(.*)` \|", card)
    return (
        load_yaml(folder / "config.yaml", TrainConfig)["max_steps"],
        row,
        [line["step"] for line in metrics_of(config)],
    )


@pytest.mark.parametrize("fewer", [1, 3])
@pytest.mark.parametrize("save_steps", [1, 3, 6])
def test_a_run_does_not_go_on_with_fewer_steps_than_it_has_done(
    settings: Callable[..., TrainConfig], fewer: int, save_steps: int
) -> None:
    train(settings(max_steps=4, save_steps=save_steps, method="sft"))
    before = files_of(settings())
    message = rf"'max_steps': found {fewer}, but .*checkpoint-00000004 has already done 4 steps; give 4 or more"
    with pytest.raises(UserError, match=message) as caught:
        train(settings(max_steps=fewer, save_steps=save_steps, method="sft"), resume=True)
    assert "\n" not in str(caught.value)
    assert files_of(settings()) == before
    assert steps_said(settings()) == (4, "4", [1, 2, 3, 4])


def test_a_stopped_run_may_end_at_any_step_from_the_last_one_on(settings: Callable[..., TrainConfig]) -> None:
    def stopped(out: str) -> TrainConfig:
        config = settings(out, max_steps=6, save_steps=2, method="sft", lr_scheduler_type="constant")
        train(config, on_step=lambda step, _loaded, _metrics: step == 3)
        assert "It ended early, after step 3 of 6" in (Path(config.output_dir) / "final/README.md").read_text()
        return config

    with pytest.raises(UserError, match=r"setting 'max_steps': found 2, but .*checkpoint-00000003 has already done 3"):
        train(stopped("a").model_copy(update={"max_steps": 2}), resume=True)
    for out, steps in (("b", 3), ("c", 4), ("d", 6), ("e", 7)):
        config = stopped(out).model_copy(update={"max_steps": steps})
        train(config, resume=True)
        assert steps_said(config) == (steps, str(steps), list(range(1, steps + 1)))
        assert "ended early" not in (Path(config.output_dir) / "final/README.md").read_text()


@pytest.mark.parametrize(("steps", "said"), [(1, "1 step"), (2, "2 steps")])
def test_a_finished_run_that_is_resumed_with_its_own_steps_stays_as_it_is(
    settings: Callable[..., TrainConfig], steps: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(max_steps=steps, save_steps=1)
    train(config)
    before = files_of(config)
    train(config, resume=True)
    assert f"already finished after {said}: raise max_steps to train further" in capsys.readouterr().err
    assert files_of(config) == before


def test_fewer_epochs_are_refused(settings: Callable[..., TrainConfig]) -> None:
    epochs: dict[str, Any] = {"max_steps": None, "method": "sft", "save_steps": 1}
    train(settings(num_train_epochs=2.0, **epochs))
    before = files_of(settings())
    with pytest.raises(UserError, match=r"num_train_epochs was 2\.0 and is now 1\.0; a resumed run keeps"):
        train(settings(num_train_epochs=1.0, **epochs), resume=True)
    assert files_of(settings()) == before


def test_stages_are_not_resumed_with_fewer_steps(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = settings(max_steps=4, save_steps=1, method="sft_reinvoke", max_completion_length=20)
    train(config)
    before = files_of(config)
    for steps in (2, 5):
        with pytest.raises(UserError, match=f"setting 'max_steps': 4 in .* and now {steps}; sft_reinvoke divides its"):
            train(config.model_copy(update={"max_steps": steps}), resume=True)
    assert files_of(config) == before


def test_the_checkpoint_that_a_run_resumes_from_counts_its_steps(settings: Callable[..., TrainConfig]) -> None:
    """Where the newest is corrupt, the steps after the one before it are done again, and may be fewer."""
    config = settings(max_steps=4, save_steps=1, method="sft", lr_scheduler_type="constant", save_total_limit=4)
    train(config)
    for step in (3, 4):
        (Path(config.output_dir) / f"checkpoint-0000000{step}" / "weights.safetensors").write_bytes(b"")
    shorter = config.model_copy(update={"max_steps": 3})
    train(shorter, resume=True)
    assert steps_said(config) == (3, "3", [1, 2, 3])
    with pytest.raises(UserError, match="checkpoint-00000003 has already done 3 steps"):
        train(config.model_copy(update={"max_steps": 2}), resume=True)


def test_a_run_does_not_go_on_with_other_rows(
    settings: Callable[..., TrainConfig], write_rows: Callable[..., Path]
) -> None:
    data = write_rows(count=6, name="changing.jsonl")
    config = settings(data=str(data), save_steps=3)
    train(config)
    write_rows(count=7, name="changing.jsonl")
    with pytest.raises(UserError, match=r"checkpoint-00000006: the training examples have changed"):
        train(config, resume=True)


def test_rows_that_moved_are_not_blamed_for_what_an_earlier_version_did(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(save_steps=1)
    train(config)
    moved = config.model_copy(update={"data": str(shutil.copy(config.data, tmp_path / "moved.jsonl"))})
    monkeypatch.setattr(import_module("selfdistill.training.resume"), "data_fingerprint", lambda *_: "other")
    with pytest.raises(UserError) as refused:
        train(moved, resume=True)
    said = str(refused.value)
    assert f"data was {config.data!r} and is now {moved.data!r}; if these are the same, template" in said
    assert "or an earlier version encoded them differently (CHANGELOG.md); restore them" in said


def test_a_finished_run_without_a_checkpoint_is_not_begun_again(settings: Callable[..., TrainConfig]) -> None:
    config = settings(save_steps=0)
    train(config)
    before = final_weights(config)
    with pytest.raises(UserError, match="this run is finished and has no checkpoint, so it cannot be resumed"):
        train(config, resume=True)
    assert same(before, final_weights(config))


@pytest.mark.parametrize("teacher", quick(["ema", "frozen"], "frozen"))
def test_the_last_step_is_a_checkpoint_from_which_a_run_can_be_made_longer(
    settings: Callable[..., TrainConfig], teacher: Any
) -> None:
    common: dict[str, Any] = {"save_steps": 4, "lr_scheduler_type": "constant", "teacher": teacher}
    train(settings("short", max_steps=3, **common))
    longer = settings("short", max_steps=6, **common)
    train(longer, resume=True)
    whole = settings("whole", max_steps=6, **common)
    train(whole)
    assert same(final_weights(longer), final_weights(whole))


def test_the_importance_weight_does_not_scale_the_statistics(settings: Callable[..., TrainConfig]) -> None:
    plain, capped = Trainer(settings()), Trainer(settings(importance_cap=0.5))  # on-policy every ratio is cut to 0.5
    first, second = plain.step(0), capped.step(0)
    assert second["importance"] == pytest.approx(0.5)
    assert second["loss"] == pytest.approx(0.5 * first["loss"], rel=1e-5)
    for key in ("entropy", "kl/forward", "kl/reverse"):
        assert second[key] == pytest.approx(first[key], rel=1e-5)


def test_gradient_checkpointing_adds_no_noise_to_a_router(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    folder = tmp_path / "phimoe"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ODD_LAYERS["phimoe"][0]().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    common: dict[str, Any] = {"model": str(folder), "max_steps": 3, "learning_rate": 1e-4}
    without, using = settings("without", **common), settings("using", gradient_checkpointing=True, **common)
    train(without)
    train(using)
    assert largest_difference(final_weights(without), final_weights(using)) < 1e-6
