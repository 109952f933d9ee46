"""Two processes that hold a part of the model each (FSDP2): the numbers of one, and one whole model at the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from children import started_together, train_together
from conftest import ENDS, final_weights, largest_difference, metrics_of
from odd_models import MAKERS
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from selfdistill.cli import main
from selfdistill.config.files import dump_yaml
from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import Evaluator
from selfdistill.model.compiled import layers_of
from selfdistill.model.fsdp import full_tensors, is_sharded, local_tensor, root_unsharded, shard, unsharded
from selfdistill.model.loading import LoadedModel
from selfdistill.model.teacher import Teacher
from selfdistill.runtime.distributed import broadcast_from_rank0, is_rank0
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.train import train
from selfdistill.training.trainer import Trainer

COMMON: dict[str, Any] = {"batch_size": 4, "max_steps": 4, "save_steps": 2, "ema_rate": 0.2, "drift_steps": 2}
CLOSE = 2e-5
"""Rows are read whole here, so numbers are rounded otherwise, and AdamW's first steps know only a gradient's sign."""


SNAPSHOT: dict[str, Any] = {
    "teacher": "snapshot",
    "snapshot_steps": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
}


def slow(*values: Any, id: str) -> Any:
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("tied", "values"),
    [
        pytest.param(True, {"importance_cap": 2.0, "eval_steps": 4, "view_rows": 3}, id="ema_tied, measured"),
        slow(False, {"target_base": 0.3, "teacher": "live"}, id="base"),
        pytest.param(True, {"lora_rank": 4}, id="lora"),
        slow(True, {"method": "sft_reinvoke"}, id="stages"),
        slow(False, {"importance_cap": 2.0}, id="ema"),
        slow(False, SNAPSHOT, id="snapshot"),
        slow(True, {"teacher": "frozen", "gradient_checkpointing": True}, id="frozen"),
        slow(False, {"lora_rank": 4, "teacher": "frozen", "gradient_accumulation_steps": 2}, id="lora_frozen"),
        slow(True, {"method": "sft"}, id="sft"),
        slow(False, {"method": "offline_distillation", "teacher": "frozen"}, id="teacher_samples"),
    ],
)
def test_sharded_processes_train_to_the_weights_of_one(
    settings: Callable[..., TrainConfig],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    write_rows: Callable[..., Path],
    values: dict[str, Any],
    tied: bool,
) -> None:
    values = COMMON | {"model": str(model_folder(ends=ENDS, tied=tied))} | values
    if "eval_steps" in values:
        values |= {"test": str(write_rows(count=5, name="test.jsonl"))}
    one, two = settings("one", **values), settings("two", fsdp=True, **values)
    train(one)
    train_together(two, tmp_path)
    assert largest_difference(final_weights(one), final_weights(two)) < CLOSE
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    files = [sorted(str(p.relative_to(c.output_dir)) for p in Path(c.output_dir).rglob("*")) for c in (one, two)]
    assert files[0] == files[1]
    for name in ("weights", "optimizer", "teacher"):
        x, y = (load_file(list_checkpoints(Path(c.output_dir))[-1] / f"{name}.safetensors") for c in (one, two))
        assert x.keys() == y.keys()
        assert all(torch.allclose(x[key], y[key], atol=CLOSE, rtol=0) for key in x)
    if "lora_rank" not in values:
        loaded, info = AutoModelForCausalLM.from_pretrained(Path(two.output_dir) / "final", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    if "test" in values:
        assert_same_measurements(one, two)


def assert_same_measurements(one: TrainConfig, two: TrainConfig) -> None:
    for name in ("evaluations", "token_views"):
        texts = [(Path(c.output_dir) / f"{name}.jsonl").read_text().splitlines() for c in (one, two)]
        assert len(texts[0]) == len(texts[1]) >= 2
        for a, b in zip(*texts, strict=True):
            found, expected = json.loads(a), json.loads(b)
            found.pop("seconds", None), expected.pop("seconds", None)
            found.pop("tokens", None), expected.pop("tokens", None)
            if name == "evaluations":
                assert found.pop("kl_base") == pytest.approx(expected.pop("kl_base"), abs=1e-5)
            assert found == expected


@pytest.mark.slow
def test_a_sharded_model_whose_head_cannot_be_taken_apart_is_taught_by_another(
    settings: Callable[..., TrainConfig],
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("selfdistill.model.forward.head_agrees", lambda _: False)
    values = COMMON | {"teacher_model": str(model_folder(ends=ENDS, seed=1))}
    one, two = settings("one", **values), settings("two", fsdp=True, **values)
    train(one)
    train_together(two, tmp_path)
    assert largest_difference(final_weights(one), final_weights(two)) < CLOSE


@pytest.fixture
def bfloat16_folder(load: Callable[..., LoadedModel], tmp_path: Path) -> str:
    """A model of bfloat16 weights, which forked processes need not convert: they lack their parent's threads."""
    loaded = load(dtype="bfloat16", ends=ENDS)
    loaded.model.save_pretrained(tmp_path / "bfloat16")
    loaded.tokenizer.save_pretrained(tmp_path / "bfloat16")
    return str(tmp_path / "bfloat16")


def test_a_sharded_average_of_bfloat16_weights_follows_them(
    settings: Callable[..., TrainConfig], tmp_path: Path, bfloat16_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, in parts of a shard, also where three processes get unequal ones."""
    monkeypatch.setattr("selfdistill.model.teacher.PART_NUMBERS", 100)
    own = {"model": bfloat16_folder, "dtype": "auto", "batch_size": 6, "max_steps": 2, "save_steps": 2, "ema_rate": 0.3}
    config = settings(fsdp=True, **COMMON | {"mixed_precision": "no"} | own)

    def keep(step: int, loaded: LoadedModel, _metrics: Any) -> None:
        weights = full_tensors(dict(loaded.model.named_parameters()))
        if os.environ["RANK"] == "0":
            torch.save({name: weight.detach().clone() for name, weight in weights.items()}, tmp_path / f"{step}.pt")

    for child in started_together(lambda: train(config, on_step=keep), tmp_path / "log", 3):
        assert child.wait() == 0, child.log.read_text()
    first, *later = (torch.load(tmp_path / f"{step}.pt", weights_only=True) for step in range(3))
    average = load_file(list_checkpoints(Path(config.output_dir))[-1] / "teacher.safetensors")
    for name, found in average.items():
        expected = first[name].float()
        for weights in later:
            expected.lerp_(weights[name].float(), 0.3)
        assert torch.equal(found, expected), name
    assert any(not torch.equal(first[name], later[-1][name]) for name in average)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "sdft"])
@pytest.mark.parametrize("lora", [pytest.param(False, id="full"), pytest.param(True, id="lora_on_bfloat16")])
def test_sharded_processes_with_bfloat16_arithmetic(
    settings: Callable[..., TrainConfig], tmp_path: Path, bfloat16_folder: str, method: str, lora: bool
) -> None:
    values = COMMON | {"mixed_precision": "bf16", "method": method}
    if lora:
        values |= {"lora_rank": 4, "model": bfloat16_folder, "dtype": "auto"}
    one, two = settings("one", **values), settings("two", fsdp=True, **values)
    train(one)
    train_together(two, tmp_path)
    steps = 4 if method == "sft" else 1  # a sample is another one where rounding turns a token
    for a, b in list(zip(metrics_of(one), metrics_of(two), strict=True))[:steps]:
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)
    assert {t.dtype for t in final_weights(two).values()} == {torch.float32}


@pytest.mark.slow
def test_layers_are_gathered_in_the_data_type_of_the_arithmetic_and_let_go_again(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = settings(fsdp=True, **COMMON | {"mixed_precision": "bf16", "drift_steps": 0})

    def work() -> None:
        run = Trainer(config)
        model = run.loaded.model
        seen: list[tuple[torch.dtype, bool]] = []
        first, second = model.model.layers
        weights = lambda: [layer.mlp.up_proj.weight for layer in (first, second)]  # noqa: E731
        second.mlp.register_forward_pre_hook(
            lambda *_: seen.append((weights()[1].dtype, isinstance(weights()[0], DTensor)))
        )
        passes: list[int] = []
        for step in range(3):
            del seen[:]
            run.step(step)
            assert (torch.bfloat16, True) in seen  # while one layer reads, the other is in shards
            assert {dtype for dtype, _ in seen} == {torch.bfloat16}
            assert {(w.dtype, isinstance(w, DTensor)) for w in weights()} == {(torch.float32, True)}
            assert run.teacher is not None
            (copy,) = run.teacher.networks
            passes.append(len(copy._get_fsdp_state()._comm_ctx.post_forward_order))
        assert passes == [0, 0, 0]

    for child in started_together(work, tmp_path / "log"):
        assert child.wait() == 0, child.log.read_text()


def test_weights_are_gathered_after_the_teachers_last_update(
    settings: Callable[..., TrainConfig], bfloat16_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread makes that update while the next step samples; a longer wait counts as the teacher's time."""
    run, happened = Trainer(settings(**COMMON | {"model": bfloat16_folder, "drift_steps": 0})), list[str]()
    assert run.teacher is not None
    wait = run.teacher.wait

    def waited() -> None:
        wait()
        if not happened:
            time.sleep(0.5)
        happened.append("waited")

    @contextmanager
    def gathered(networks: Iterable[nn.Module]) -> Iterator[None]:
        happened.append("gathered")
        yield

    monkeypatch.setattr(run.teacher, "wait", waited)
    monkeypatch.setattr("selfdistill.training.batch_gradient.root_unsharded", gathered)
    run.step(0)
    del happened[:]
    metrics = run.step(1)
    assert happened[:2] == ["waited", "gathered"]
    assert metrics["time/teacher_s"] >= 0.5


def test_parts_that_a_model_names_beside_its_layers_are_no_layers() -> None:
    model = MAKERS["mamba, recurrent"]()
    loaded = LoadedModel(model, None, "mamba", (), 0, None)
    assert set(model._no_split_modules) == {"MambaBlock", "MambaMixer"}
    assert {type(layer).__name__ for layer in layers_of(loaded, model, "fsdp")} == {"MambaBlock"}
    with pytest.raises(UserError, match="model 'mamba' does not declare which modules are its layers; leave fsdp out"):
        layers_of(loaded, nn.Linear(1, 1), "fsdp")


def test_a_pytorch_that_cannot_forget_the_order_of_passes_shards_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FSDPModule, "reset_iter_state")

    def work() -> None:
        Accelerator()
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).requires_grad_(False)
        inputs = torch.eye(2)
        expected = model(inputs)
        shard(model, [model[0]], torch.device("cpu"), lambda network: network(inputs), None)
        for _ in range(2):
            with root_unsharded([model]):
                assert torch.equal(model(inputs), expected)
        assert all(isinstance(p, DTensor) for p in model.parameters())

    torch.manual_seed(0)
    for child in started_together(work, tmp_path / "log"):
        assert child.wait() == 0, child.log.read_text()


def sizes(tensors: list[Tensor]) -> tuple[int, int]:
    """Numbers in this process, and in all."""
    return sum(local_tensor(t).numel() for t in tensors), sum(t.numel() for t in tensors)


def test_each_process_holds_half_of_weights_gradients_moments_and_teacher(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(fsdp=True, **COMMON)
    bind, bound = Teacher.bind, list[bool]()

    def noted(teacher: Teacher) -> None:
        bound.append(all(is_sharded(network) for network in teacher.networks))
        bind(teacher)

    monkeypatch.setattr(Teacher, "bind", noted)

    def work() -> None:
        run = Trainer(config)
        assert bound == [True], "no average of whole weights is made"
        gradients: list[Tensor] = []
        hook = run.optimizer.register_step_pre_hook(
            lambda *_: gradients.extend(p.grad for p in run.parameters if p.grad is not None)
        )
        run.step(0)
        hook.remove()
        assert run.teacher is not None
        (copy,) = run.teacher.networks
        moments = [t for state in run.optimizer.state.values() for t in state.values() if t.dim()]
        held = (run.parameters, gradients, moments, list(copy.parameters()), list(run.teacher.state_dict().values()))
        for tensors, times in zip(held, (1, 1, 2, 1, 1), strict=True):
            own, everywhere = sizes(tensors)
            assert own * 2 == everywhere == times * 2 * sizes(run.parameters)[0]
        assert {t.dtype for t in (*run.teacher.state_dict().values(), *copy.parameters())} == {torch.float32}
        assert all(isinstance(p, DTensor) for p in (*run.loaded.model.parameters(), *copy.parameters()))

    for child in started_together(work, tmp_path / "log"):
        assert child.wait() == 0, child.log.read_text()


def test_weights_are_whole_only_as_long_as_asked_for(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = settings(fsdp=True, **COMMON)

    def work() -> None:
        run = Trainer(config)
        assert run.loaded.continues_cache, "probed in all processes, before each samples at its own pace"
        model: nn.Module = run.loaded.model
        apart = sizes(list(model.parameters()))
        with unsharded(model):
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            with unsharded(model):
                pass
            model(input_ids=torch.tensor([[1, 2]]))
            assert sizes(list(model.parameters())) == (apart[1], apart[1])
        assert sizes(list(model.parameters())) == apart

    for child in started_together(work, tmp_path / "log"):
        assert child.wait() == 0, child.log.read_text()


def test_rank_0_may_write_for_longer_than_an_operation_may_take(tmp_path: Path) -> None:
    def work() -> int:
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=1))])
        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
        for _ in range(2):
            found = full_tensors({"weight": weight})["weight"]
            if is_rank0():
                time.sleep(1.5)  # as for a file
        return 10 if not is_rank0() or found.tolist() == [0.0, 1.0, 2.0, 3.0] else 11

    assert [child.wait() for child in started_together(work, tmp_path / "log")] == [10, 10]


def test_a_checkpoint_is_the_same_sharded_or_not(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    values = COMMON | {"lr_scheduler_type": "constant"}  # which does not depend on the number of steps
    one, begun = settings("one", **values | {"max_steps": 6}), settings("other", **values | {"max_steps": 2})
    train(one)
    train(begun)
    longer = begun.model_copy(update={"max_steps": 4, "fsdp": True})
    train_together(longer, tmp_path, resume=True)
    longest = begun.model_copy(update={"max_steps": 6})
    train(longest, resume=True)
    assert largest_difference(final_weights(one), final_weights(longest)) < CLOSE
    assert [line["step"] for line in metrics_of(longest)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_measurement_that_fails_in_all_processes_loses_no_step(
    settings: Callable[..., TrainConfig], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    config = settings(fsdp=True, **COMMON | {"test": str(write_rows(count=4, name="test.jsonl")), "eval_steps": 3})

    def asked() -> None:
        raise UserError("the judge does not answer")

    def work() -> None:
        measure = Evaluator.measure

        def failing(evaluator: Evaluator, loaded: LoadedModel, who: str) -> Any:
            return broadcast_from_rank0(asked) if hasattr(evaluator, "base") else measure(evaluator, loaded, who)

        Evaluator.measure = failing  # type: ignore[method-assign]
        train(config)

    for child in started_together(work, tmp_path / "log"):
        assert child.wait(60) == 1
        assert "the judge does not answer" in child.log.read_text()
    assert [path.name[-1] for path in list_checkpoints(Path(config.output_dir))] == ["2", "3"]


@pytest.mark.parametrize(
    ("values", "environment", "message"),
    [
        (
            {"batch_size": 3},
            {},
            "setting 'fsdp' needs parts of equal size: batch_size 3 is not a multiple of 2 processes ",
        ),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "the launcher's own FSDP is enabled (--use_fsdp, or "),
    ],
    ids=["uneven", "launcher"],
)
def test_what_cannot_be_sharded_is_refused(
    settings: Callable[..., TrainConfig],
    tmp_path: Path,
    values: dict[str, Any],
    environment: dict[str, str],
    message: str,
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(dump_yaml(settings(fsdp=True, **COMMON | values)), encoding="utf-8")

    def work() -> int:
        os.environ.update(environment)
        return main(["train", "--config", str(file)])

    first, second = started_together(work, tmp_path / "log")
    assert (first.wait(), second.wait()) == (2, 2)
    assert first.log.read_text().splitlines()[-1].startswith(f"selfdistill: error: {message}")
    assert not (tmp_path / "run").exists()


def test_one_process_is_not_sharded(settings: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match="setting 'fsdp' shards a model across processes, found only one"):
        Trainer(settings(fsdp=True))


def test_an_adapter_on_top_of_another_is_not_sharded(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    base = settings("base", lora_rank=4, max_steps=1)
    train(base)
    config = settings(fsdp=True, **COMMON | {"lora_rank": 4, "model": base.output_dir})
    for child in started_together(lambda: Trainer(config), tmp_path / "log"):
        assert child.wait() == 1
        assert (
            "setting 'fsdp' with lora_rank: the model already has an adapter; export it merged first"
            in child.log.read_text()
        )
