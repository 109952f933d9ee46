"""Half precision: weights in float16 and bfloat16 are never stepped by an optimizer that loses the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENDS, final_weights, metrics_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill.comparison.compare import compare
from selfdistill.config.commands import CompareConfig, LearnConfig
from selfdistill.config.files import dump_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.continual.learn import learn
from selfdistill.errors import UserError
from selfdistill.model.loading import load_model
from selfdistill.model.precision import refuse_half_precision
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.plan import plan
from selfdistill.training.train import train

HALVES = ["float16", "bfloat16"]
REFUSED = (
    "model {!r}: its trainable weights are {}, in which the optimizer's steps round to nothing; load it with --dtype "
    "float32, or in Python with dtype=torch.float32 (--mixed_precision bf16 keeps the speed), or train an adapter with "
    "--lora_rank 16"
)


@pytest.fixture
def in_dtype(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], str]:
    """The tiny model, saved in a data type."""

    def make(dtype: str) -> str:
        folder = tmp_path / dtype
        model = AutoModelForCausalLM.from_pretrained(model_folder(ends=ENDS), dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model_folder(ends=ENDS)).save_pretrained(folder)
        return str(folder)

    return make


def refused(work: Callable[[], Any], model: str, dtype: str) -> None:
    with pytest.raises(UserError) as caught:
        work()
    assert str(caught.value) == REFUSED.format(model, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", ["sft", "sdft", "sft_reinvoke"])
def test_full_fine_tuning_is_refused(
    settings: Callable[..., TrainConfig],
    in_dtype: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    method: str,
) -> None:
    model = in_dtype(dtype)
    config = settings(model=model, dtype="auto", method=method, mixed_precision="bf16")
    refused(lambda: train(config), model, dtype)
    refused(lambda: plan(config), model, dtype)
    refused(lambda: train(config.model_copy(update={"context": "auto"})), model, dtype)
    assert "layout" not in capsys.readouterr().err  # before contexts are compared
    assert not Path(config.output_dir).exists()


def test_a_named_data_type_is_refused_where_the_files_are_float32(settings: Callable[..., TrainConfig]) -> None:
    config = settings(dtype="bfloat16")
    refused(lambda: train(config), config.model, "bfloat16")


def test_float32_is_read_from_files_in_half_precision(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str]
) -> None:
    config = settings(model=in_dtype("bfloat16"), dtype="float32", method="sft", learning_rate=1e-5, max_steps=3)
    train(config)
    start, end = load_file(f"{config.model}/model.safetensors"), final_weights(config)
    moved = sum(int((end[name] != start[name].float()).sum()) for name in start)
    assert moved > 0.5 * sum(weight.numel() for weight in start.values())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_on_half_precision_trains_to_what_it_does_on_float32(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], dtype: str, precision: str
) -> None:
    shared: dict[str, Any] = {"method": "sft", "lora_rank": 4, "max_steps": 20, "learning_rate": 3e-3, "batch_size": 6}
    shared |= {"mixed_precision": precision, "drift_steps": 10}
    whole, half = settings("whole", **shared), settings("half", model=in_dtype(dtype), dtype="auto", **shared)
    seen: set[torch.dtype] = set()

    def on_step(_step: int, loaded: Any, _metrics: Any) -> None:
        seen.update(p.dtype for p in loaded.model.parameters() if p.requires_grad)

    train(whole)
    train(half, on_step=on_step)
    assert seen == {torch.float32}
    first, last = metrics_of(whole)[0], metrics_of(whole)[-1]
    found = metrics_of(half)[-1]
    assert last["loss"] < 0.6 * first["loss"]
    assert found["loss"] == pytest.approx(last["loss"], rel=0.02)
    assert found["drift/student"] == pytest.approx(last["drift/student"], rel=0.05)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_factors_moments_and_averages_stay_float32_also_after_resuming(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], dtype: str, teacher: str
) -> None:
    values: dict[str, Any] = {"model": in_dtype(dtype), "dtype": "auto", "lora_rank": 2, "save_steps": 2}
    values |= {"teacher": teacher}
    for max_steps, resume in ((2, False), (4, True)):
        config = settings(max_steps=max_steps, **values)
        train(config, resume=resume)
        newest = list_checkpoints(Path(config.output_dir))[-1]
        for part in ("weights", "optimizer", "teacher"):
            tensors = load_file(newest / f"{part}.safetensors")
            tensors.pop("rng", None)
            assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32}, part
        assert {tensor.dtype for tensor in final_weights(config).values()} == {torch.float32}


def test_an_adapter_is_continued_on_half_precision(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str]
) -> None:
    model = in_dtype("bfloat16")
    first = settings("first", model=model, dtype="auto", lora_rank=2, method="sft")
    train(first)
    refused(
        lambda: train(settings("full", model=first.output_dir, dtype="auto", method="sft")),
        first.output_dir,
        "bfloat16",
    )
    (note,) = load_model(first.output_dir, dtype="auto", merge_adapter=True).notes
    assert note == f"the adapter {first.output_dir} is merged into its base, so training saves a full model"
    second = settings("second", model=first.output_dir, dtype="auto", lora_rank=2, method="sft")
    train(second)
    assert {weight.dtype for weight in final_weights(second).values()} == {torch.bfloat16}  # merged: the base's
    for before, now in zip(metrics_of(first), metrics_of(second), strict=True):  # the same rows at every step
        assert now["loss"] < before["loss"]


def test_an_old_run_in_half_precision_says_why_it_cannot_be_resumed(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str]
) -> None:
    config = settings(save_steps=3, method="sft")
    train(config)
    run = Path(config.output_dir)
    model = in_dtype("bfloat16")
    old = config.model_copy(update={"model": model, "dtype": "auto", "max_steps": 8})
    for file in (run / "config.yaml", list_checkpoints(run)[-1] / "config.yaml"):
        file.write_text(dump_yaml(old))
    refused(lambda: train(old, resume=True), model, "bfloat16")


def test_comparisons_are_refused_before_they_begin(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], write_rows: Callable[..., Path]
) -> None:
    model = in_dtype("float16")
    run = settings("compared", model=model, dtype="auto").model_dump()
    values = {name: run[name] for name in CompareConfig.model_fields.keys() & run.keys()}
    values |= {"test": str(write_rows(count=2, name="test.jsonl"))}
    refused(lambda: compare(CompareConfig(**values)), model, "float16")
    refused(lambda: compare(CompareConfig(**values, vary={"lora_rank": [2, 0]})), model, "float16")
    assert not Path(run["output_dir"]).exists()
    compare(CompareConfig(**values | {"lora_rank": 2, "seeds": (0,), "methods": ("sft",), "max_steps": 1}))


def test_skills_are_refused_before_anything_is_measured(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], tmp_path: Path
) -> None:
    model = in_dtype("bfloat16")
    run = settings(model=model, dtype="auto").model_dump()
    values = {name: run[name] for name in LearnConfig.model_fields.keys() & run.keys() - {"output_dir", "test"}}
    values |= {"state": str(tmp_path / "state"), "action": "add", "test_share": 0.4, "method": "sft"}
    refused(lambda: learn(LearnConfig(**values)), model, "bfloat16")
    assert not (tmp_path / "state" / "start").exists()
    with_lora = LearnConfig(**values | {"lora_rank": 2})
    learn(with_lora)
    assert json.loads((tmp_path / "state" / "start" / "base.json").read_text()) is not None
    refused(lambda: learn(LearnConfig(**values | {"name": "second"})), model, "bfloat16")
    learn(with_lora.model_copy(update={"name": "third"}))  # the refused one is not in the way


def test_frozen_weights_may_be_half(in_dtype: Callable[[str], str]) -> None:
    model = load_model(in_dtype("bfloat16"), dtype="auto").model
    refused(lambda: refuse_half_precision(model, "m"), "m", "bfloat16")
    model.requires_grad_(False)
    model.lm_head.float().requires_grad_(True)
    refuse_half_precision(model, "m")
