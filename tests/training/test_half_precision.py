"""Half precision: runs in bfloat16 end where runs in float32 do, and float16 is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import started_together
from conftest import ENDS, final_weights, metrics_of, quick
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill.comparison.compare import compare
from selfdistill.config.commands import CompareConfig, LearnConfig
from selfdistill.config.files import dump_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.continual.learn import learn
from selfdistill.errors import UserError
from selfdistill.model.loading import load_model
from selfdistill.model.precision import refuse_float16
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.plan import plan
from selfdistill.training.train import train

OPTIMS = ["adamw_torch", "adamw_8bit"]
SNAPSHOT = {"teacher": "snapshot", "snapshot_steps": 2}
REFUSED = (
    "model {!r}: its trainable weights are float16, where small gradients become zero; load it with dtype "
    "bfloat16 or float32 (a loaded model with torch.bfloat16 or torch.float32), or train an adapter with lora_rank 16"
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


def needs(optim: str) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")


def logps(folder: str) -> Tensor:
    """Log-probabilities of a saved model, in float32, on a few sequences."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(256, (16, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids).logits).log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def refused(work: Callable[[], Any], model: str) -> None:
    with pytest.raises(UserError) as caught:
        work()
    assert str(caught.value) == REFUSED.format(model)


@pytest.mark.parametrize("method", quick(["sdft", "sft", "sft_reinvoke"], "sdft"))
def test_full_fine_tuning_in_float16_is_refused(
    settings: Callable[..., TrainConfig],
    in_dtype: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    model = in_dtype("float16")
    config = settings(model=model, dtype="auto", method=method, mixed_precision="bf16")
    refused(lambda: train(config), model)
    refused(lambda: plan(config), model)
    refused(lambda: train(config.model_copy(update={"context": "auto"})), model)
    assert "layout" not in capsys.readouterr().err  # before contexts are compared
    assert not Path(config.output_dir).exists()


def test_float32_is_read_from_files_in_half_precision(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str]
) -> None:
    config = settings(model=in_dtype("bfloat16"), dtype="float32", method="sft", learning_rate=1e-5, max_steps=3)
    train(config)
    start, end = load_file(f"{config.model}/model.safetensors"), final_weights(config)
    moved = sum(int((end[name] != start[name].float()).sum()) for name in start)
    assert moved > 0.5 * sum(weight.numel() for weight in start.values())


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_run_in_bfloat16_ends_where_one_in_float32_does(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], optim: str
) -> None:
    """On the same rows, that is: samples of runs that differ a little soon differ altogether."""
    needs(optim)
    model = in_dtype("bfloat16")
    values = {"model": model, "method": "sft", "max_steps": 60, "learning_rate": 5e-4, "batch_size": 6}
    whole, half = settings("whole", **values), settings("half", dtype="bfloat16", optim=optim, **values)
    for config in (whole, half):
        train(config)
    assert {weight.dtype for weight in final_weights(half).values()} == {torch.bfloat16}
    start, first, second = logps(model), logps(f"{whole.output_dir}/final"), logps(f"{half.output_dir}/final")
    assert kl(first, second) < 0.1 * kl(first, start)
    assert kl(second, start) == pytest.approx(kl(first, start), rel=0.1)


@pytest.mark.parametrize(
    ("values", "optim"),
    [
        ({}, "adamw_torch"),
        (SNAPSHOT, "adamw_8bit"),
        pytest.param({}, "adamw_8bit", marks=pytest.mark.slow),
        pytest.param(SNAPSHOT, "adamw_torch", marks=pytest.mark.slow),
        *(pytest.param({"method": "sft"}, optim, marks=pytest.mark.slow) for optim in OPTIMS),
    ],
)
def test_a_run_in_bfloat16_resumes_bit_by_bit(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], values: dict[str, Any], optim: str
) -> None:
    needs(optim)
    values = {"model": in_dtype("bfloat16"), "dtype": "bfloat16", "optim": optim, "save_steps": 2, **values}
    values |= {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 2}
    whole = settings("whole", **values)
    train(whole)
    for max_steps in (2, 6):
        part = settings("parts", **values | {"max_steps": max_steps})
        train(part, resume=max_steps > 2)
    ends, found = final_weights(whole), final_weights(part)
    assert all(torch.equal(ends[name], found[name]) for name in ends)
    last = list_checkpoints(Path(part.output_dir))[-1]
    dtypes = {
        file: {tensor.dtype for tensor in load_file(last / f"{file}.safetensors").values()}
        for file in ("weights", "optimizer", "teacher")
    }
    moments = {torch.float32} if optim == "adamw_torch" else {torch.float32, torch.uint8}
    averages = set() if values.get("method") == "sft" else {torch.float32}
    assert dtypes == {"weights": {torch.bfloat16}, "optimizer": moments, "teacher": averages}
    with pytest.raises(UserError, match="optim was"):
        train(part.model_copy(update={"optim": next(other for other in OPTIMS if other != optim)}), resume=True)


def test_processes_end_with_the_same_bfloat16_weights(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], tmp_path: Path
) -> None:
    config = settings(model=in_dtype("bfloat16"), dtype="bfloat16", method="sft", max_steps=3)

    def work() -> None:
        def on_step(step: int, loaded: Any, _metrics: Any) -> None:
            save_file(dict(loaded.model.named_parameters()), tmp_path / f"{os.environ['RANK']}-{step}.safetensors")

        train(config, on_step=on_step)

    assert [child.wait() for child in started_together(work, tmp_path / "two")] == [0, 0]
    one, two = (load_file(tmp_path / f"{rank}-3.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        ("float16", "no"),
        ("bfloat16", "bf16"),
        pytest.param("float16", "bf16", marks=pytest.mark.slow),
        pytest.param("bfloat16", "no", marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.parametrize(
    ("dtype", "teacher"),
    [
        ("float16", "ema"),
        ("bfloat16", "frozen"),
        pytest.param("float16", "frozen", marks=pytest.mark.slow),
        pytest.param("bfloat16", "ema", marks=pytest.mark.slow),
    ],
)
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
            assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32}, part
        assert {tensor.dtype for tensor in final_weights(config).values()} == {torch.float32}


def test_an_adapter_is_continued_on_half_precision(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str]
) -> None:
    model = in_dtype("bfloat16")
    first = settings("first", model=model, dtype="auto", lora_rank=2, method="sft")
    train(first)
    (note,) = load_model(first.output_dir, dtype="auto", merge_adapter=True).notes
    assert note == f"the adapter {first.output_dir} is merged into its base, so training saves a full model"
    second = settings("second", model=first.output_dir, dtype="auto", lora_rank=2, method="sft")
    train(second)
    assert {weight.dtype for weight in final_weights(second).values()} == {torch.bfloat16}  # merged: the base's
    for before, now in zip(metrics_of(first), metrics_of(second), strict=True):  # the same rows at every step
        assert now["loss"] < before["loss"]


def test_an_old_run_in_float16_says_why_it_cannot_be_resumed(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str]
) -> None:
    config = settings(save_steps=3, method="sft")
    train(config)
    run = Path(config.output_dir)
    model = in_dtype("float16")
    old = config.model_copy(update={"model": model, "dtype": "auto", "max_steps": 8})
    for file in (run / "config.yaml", list_checkpoints(run)[-1] / "config.yaml"):
        file.write_text(dump_yaml(old))
    refused(lambda: train(old, resume=True), model)


@pytest.mark.slow
def test_comparisons_are_refused_before_they_begin(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], write_rows: Callable[..., Path]
) -> None:
    model = in_dtype("float16")
    run = settings("compared", model=model, dtype="auto").model_dump()
    values = {name: run[name] for name in CompareConfig.model_fields.keys() & run.keys()}
    values |= {"test": str(write_rows(count=2, name="test.jsonl"))}
    refused(lambda: compare(CompareConfig(**values)), model)
    refused(lambda: compare(CompareConfig(**values, vary={"lora_rank": [2, 0]})), model)
    assert not Path(run["output_dir"]).exists()
    compare(CompareConfig(**values | {"lora_rank": 2, "seeds": (0,), "methods": ("sft",), "max_steps": 1}))


@pytest.mark.slow
def test_skills_are_refused_before_anything_is_measured(
    settings: Callable[..., TrainConfig], in_dtype: Callable[[str], str], tmp_path: Path
) -> None:
    model = in_dtype("float16")
    run = settings(model=model, dtype="auto").model_dump()
    values = {name: run[name] for name in LearnConfig.model_fields.keys() & run.keys() - {"output_dir", "test"}}
    values |= {"state": str(tmp_path / "state"), "action": "add", "test_share": 0.4, "method": "sft"}
    refused(lambda: learn(LearnConfig(**values)), model)
    assert not (tmp_path / "state" / "start").exists()
    with_lora = LearnConfig(**values | {"lora_rank": 2})
    learn(with_lora)
    assert json.loads((tmp_path / "state" / "start" / "base.json").read_text()) is not None
    refused(lambda: learn(LearnConfig(**values | {"name": "second"})), model)
    learn(with_lora.model_copy(update={"name": "third"}))  # the refused one is not in the way


def test_frozen_weights_may_be_half(in_dtype: Callable[[str], str]) -> None:
    model = load_model(in_dtype("float16"), dtype="auto").model
    refused(lambda: refuse_float16(model, "m"), "m")
    model.requires_grad_(False)
    model.lm_head.float().requires_grad_(True)
    refuse_float16(model, "m")
