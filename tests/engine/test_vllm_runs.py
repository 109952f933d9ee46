"""Commands that sample with vLLM: what they measure, what they leave as it was, and how they stop and go on."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from children import started_together, train_together
from conftest import (
    ENDS,
    NEEDS_VLLM,
    VLLM,
    Cut,
    assert_same_run,
    crash_at,
    final_weights,
    largest_difference,
    metrics_of,
    same,
)

from selfdistill.config import CheckConfig, EvalConfig, TrainConfig
from selfdistill.config.files import continued
from selfdistill.errors import EngineFailed
from selfdistill.evaluation.check import check
from selfdistill.evaluation.evaluate import evaluate
from selfdistill.model import Sampling, load_model, sample, use_engine, vllm_engine
from selfdistill.model.engine import close_engine
from selfdistill.model.vllm_engine import VllmEngine
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.train import train

pytestmark = NEEDS_VLLM
Settings = Callable[..., TrainConfig]


@pytest.fixture
def model(model_folder: Callable[..., Path]) -> str:
    return str(model_folder(head_dim=32, ends=ENDS))


@pytest.fixture
def run(settings: Settings, model: str) -> Settings:
    """Settings of a tiny run that samples with vLLM."""
    return lambda out="run", **values: settings(out, **{"model": model, **VLLM, **values})


def state_of_the_process() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": (torch.get_num_threads(), torch.set_num_threads),
        "products": torch.get_float32_matmul_precision(),
        "frozen": gc.get_freeze_count(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "children": len(psutil.Process().children()),
    }


@pytest.mark.parametrize("threads", [1, 2])
def test_the_process_stays_as_it_was(model: str, threads: int) -> None:
    close_engine()
    gc.unfreeze()  # conftest.py froze what it had imported
    torch.set_num_threads(threads)
    loaded = load_model(model)
    before = state_of_the_process()
    use_engine(loaded, EvalConfig(model=model, data="", **VLLM))
    sample(loaded, [[1, 2, 3]], Sampling(5), [7])
    assert state_of_the_process() == before
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1.1)
    sample(loaded, [[1, 2, 3]], Sampling(5), [7])
    assert state_of_the_process() == before
    accelerator = Accelerator()
    assert accelerator.num_processes == 1
    assert not accelerator.distributed_type.startswith("MULTI")
    close_engine()
    assert state_of_the_process() == before
    torch.set_num_threads(1)


def test_a_process_group_that_was_there_survives_the_engine(model: str, tmp_path: Path) -> None:
    code = f"""
import torch
from selfdistill.config import EvalConfig
from selfdistill.model import Sampling, load_model, sample, use_engine
from selfdistill.model.engine import close_engine
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
group = torch.distributed.group.WORLD
loaded = load_model({model!r})
use_engine(loaded, EvalConfig(model="m", data="", **{VLLM!r}))
for _ in range(2):
    sample(loaded, [[1, 2, 3]], Sampling(5), [7])
    assert torch.distributed.group.WORLD is group
    close_engine()
    assert torch.distributed.group.WORLD is group
torch.distributed.barrier()
print("still there")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "still there\n", result.stderr[-2000:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_rank": 4},
        {"temperature": 0.7},
        {"cold_start_steps": 4},
        {"anchors": "package", "batch_size": 4},
        {"mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_a_run_samples_from_its_student(run: Settings, options: dict[str, Any]) -> None:
    config = run(learning_rate=1e-2, max_steps=4, **options)
    train(config)
    half = config.mixed_precision == "bf16"
    lines = metrics_of(config)
    if config.cold_start_steps:  # at first with demonstrations alone, whose weight is 1
        assert "engine/gap" not in lines[0]
        assert lines.pop(0)["importance"] == 1
    for line in lines:
        assert line["engine/gap"] < (0.1 if half else 1e-3)
        assert line["engine/gap"] <= line["engine/gap_max"] < (1.0 if half else 1e-3)
        assert line["importance"] == pytest.approx(1, abs=0.1 if half else 1e-3)
    times = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["time/sync_s"] < line["time/rollout_s"] for line in times)


def test_truncated_samples_have_no_importance_weights(run: Settings) -> None:
    config = run(top_p=0.9, max_steps=2)
    train(config)
    assert all("engine/gap" not in line and "importance" not in line for line in metrics_of(config))


@pytest.mark.parametrize("method", ["grpo", "sft_from_teacher", "sft_reinvoke"])
def test_other_methods_sample_with_it(run: Settings, write_rows: Callable[..., Path], method: str) -> None:
    rows = [{"prompt": f"q{i}", "completion": "ab", "scorer": "regex", "answer": "[a-m]"} for i in range(6)]
    options: dict[str, Any] = {"data": str(write_rows(rows, name="scored.jsonl"))}
    if method == "grpo":
        options["num_generations"] = 2
    config = run(method=method, **options)
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        own = VllmEngine.sample

        def counted(self: VllmEngine, loaded: Any, prompts: Any, *rest: Any) -> Any:
            calls.append(len(prompts))
            return own(self, loaded, prompts, *rest)

        patch.setattr(VllmEngine, "sample", counted)
        train(config)
    assert calls
    gaps = [line.get("engine/gap", 0.0) for line in metrics_of(config)]
    assert max(gaps) < 1e-3
    assert (max(gaps) > 0) == (method != "sft_from_teacher")


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(run: Settings, lora_rank: int) -> None:
    common: dict[str, Any] = {"save_steps": 2, "lora_rank": lora_rank}
    whole, cut = run("whole", **common), run("cut", **common)
    train(whole)
    with pytest.raises(Cut):
        train(cut, on_step=crash_at(5))
    close_engine()  # as in another process
    train(cut, resume=True)
    assert_same_run(whole, cut)


@pytest.mark.parametrize(("first", "second"), [("vllm", "none"), ("none", "vllm")])
def test_a_run_goes_on_with_another_engine_and_says_so(
    run: Settings, capsys: pytest.CaptureFixture[str], first: str, second: str
) -> None:
    train(run(engine=first, max_steps=2, save_steps=2))
    train(run(engine=second, max_steps=4, save_steps=2), resume=True)
    before, now = ("vllm 0.", "PyTorch") if first == "vllm" else ("PyTorch", "vllm 0.")
    said = capsys.readouterr().err
    assert f"note: the run sampled with {before}" in said
    assert f"and continues with {now}" in said
    capsys.readouterr()
    train(run(engine=second, max_steps=6, save_steps=2), resume=True)
    assert "the run sampled" not in capsys.readouterr().err
    folder = {"output_dir": run().output_dir}
    assert continued({**folder, "engine": first}, TrainConfig).engine == first


def test_an_engine_that_fails_leaves_a_checkpoint_and_the_run_goes_on(
    run: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = run("whole", save_steps=100), run("cut", save_steps=100)
    train(whole)
    train_until_it_fails(cut, monkeypatch)
    assert [path.name for path in list_checkpoints(Path(cut.output_dir))] == ["checkpoint-00000003"]
    train(cut, resume=True)
    assert same(final_weights(whole), final_weights(cut))
    assert metrics_of(whole) == metrics_of(cut)


def train_until_it_fails(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    def fail_after(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3:
            patch.setattr(LLMEngine, "step", lambda self: 1 / 0)

    with monkeypatch.context() as patch, pytest.raises(EngineFailed) as error:
        train(config, on_step=fail_after)
    message = str(error.value)
    assert message.startswith(f"{config.output_dir}: stopped after step 3: engine vllm failed: ZeroDivisionError: ")
    assert message.endswith("progress is saved, continue with resume=True")
    assert "\n" not in message
    close_engine()


def test_eval_check_and_pass_at_k_use_it(run: Settings, write_rows: Callable[..., Path], model: str) -> None:
    data = str(write_rows())
    common: dict[str, Any] = {"model": model, "data": data, "max_completion_length": 10, "mixed_precision": "no"}
    sizes = {"num_samples": 2, "base": model}
    engine = evaluate(EvalConfig(**common, **sizes, **VLLM))
    ours = evaluate(EvalConfig(**common, **sizes))
    assert engine["accuracy"] == ours["accuracy"]
    assert engine["completion/length"] == ours["completion/length"]
    assert engine["kl_base"] == 0 == ours["kl_base"]
    assert engine["pass@k"].keys() == ours["pass@k"].keys()
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        own = VllmEngine.sample
        patch.setattr(VllmEngine, "sample", lambda self, *rest: calls.append(1) or own(self, *rest))
        check(CheckConfig(**common, contexts=["turns"], sample=4, **VLLM), cost=False)
    assert len(calls) >= 3  # student, teacher, rollouts


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 4},
        {"batch_size": 1},
        {"batch_size": 4, "fsdp": True},
        {"batch_size": 4, "fsdp": True, "lora_rank": 4},
        {"batch_size": 4, "fsdp": True, "mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_two_processes_sample_what_one_does(run: Settings, tmp_path: Path, values: dict[str, Any]) -> None:
    close_engine()  # these are forked
    common: dict[str, Any] = {"max_steps": 4, "drift_steps": 2, "ema_rate": 0.2, **values}
    one, two = run("one", **common | {"fsdp": False}), run("two", **common)
    train_together(two, tmp_path)
    train(one)
    half = "mixed_precision" in values
    assert largest_difference(final_weights(one), final_weights(two)) < (0.01 if half else 2e-5)
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert max(a["engine/gap_max"], b["engine/gap_max"]) < (1.0 if half else 1e-3)
        if not half:
            assert a == pytest.approx(b, abs=1e-4)


def test_when_the_engine_of_one_process_fails_all_stop_with_a_checkpoint(run: Settings, tmp_path: Path) -> None:
    close_engine()
    config = run("two", batch_size=4, save_steps=100)

    def fail_in_the_second(step: int, _loaded: Any, _metrics: Any) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        if step == 3 and os.environ["RANK"] == "1":
            LLMEngine.step = lambda self: 1 / 0

    fail_together(config, tmp_path, fail_in_the_second)
    train_together(config, tmp_path, resume=True)
    assert len(metrics_of(config)) == 6


def fail_together(config: TrainConfig, tmp_path: Path, on_step: Callable[..., None]) -> None:
    children = started_together(lambda: train(config, on_step=on_step), tmp_path / "two")
    assert [child.wait() for child in children] == [1, 1]
    for child in children:
        assert "stopped after step 3: engine vllm failed: ZeroDivisionError" in child.log.read_text()


def test_when_one_engine_fails_among_shards_the_others_do_not_wait_for_it(run: Settings, tmp_path: Path) -> None:
    close_engine()
    config = run("two", batch_size=4, save_steps=100, fsdp=True)

    def fail_in_the_second(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3 and os.environ["RANK"] == "1":
            vllm_engine.put_weights = lambda worker, weights, on_cpu: (next(weights), 1 / 0)

    fail_together(config, tmp_path, fail_in_the_second)
    assert [path.name for path in list_checkpoints(Path(config.output_dir))] == ["checkpoint-00000003"]
