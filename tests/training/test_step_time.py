"""The rough time of a step against the formulas, worked out by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdistill.config import TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.errors import UserError
from selfdistill.model.fake import fake_model
from selfdistill.runtime import GPUS
from selfdistill.runtime.gpus import check_device
from selfdistill.training import plan_for, train
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.rates import ADAPTER_SECONDS, Rates, measured_rates, named_rates
from selfdistill.training.step_time import Network, TimePlan
from selfdistill.training.traced_step import Device

Make = Callable[..., TrainConfig]
SMALL = Network(body=1000, head=300, layers=2, width=8, kept_width=4, size=2)
FLOAT32 = Device("cpu", "no")
SLOW = Rates("a slow device", products=1e6, bandwidth=1e5, reading=1e5, layer_seconds=0.01)
ROWS = [{"prompt": "abcde", "completion": "xyz"}] * 4
"""Of equal lengths: the template adds a constant."""


def timed(config: TrainConfig, device: Device = FLOAT32) -> TimePlan:
    return MemoryPlanner(config, load_demonstrations(config.data), device).time(config, SLOW)


def test_a_model_has_these_sizes(settings: Make) -> None:
    """32 hidden, 48 in the feed-forward part, 4 heads and 2 key/value heads of 8, vocabulary 300."""
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    loaded = fake_model(settings().model, dtype="float32")
    assert Network.of(loaded, FLOAT32) == Network(2 * layer + 32, 300 * 32, layers=2, width=32, kept_width=16, size=4)
    assert Network.of(loaded, Device("cpu", "bf16")).size == 2


def test_tied_weights_are_those_of_the_head(settings: Make, model_folder: Callable[..., Any]) -> None:
    networks = [
        Network.of(fake_model(str(model_folder(tied=tied)), dtype="float32"), FLOAT32) for tied in (False, True)
    ]
    assert networks[0] == networks[1]


def test_weights_of_4_bits_count_as_what_they_stand_for(settings: Make) -> None:
    pytest.importorskip("bitsandbytes")
    lora, qlora = (fake_model(settings().model, dtype="float32", lora_rank=2, load_in_4bit=x) for x in (False, True))
    assert Network.of(qlora, FLOAT32) == Network.of(lora, FLOAT32)


def test_a_pass_multiplies_weights_and_attends() -> None:
    """Ten tokens, three scored: 2 x 10 x 1000 + 2 x 3 x 300, and 4 x 2 layers x 8 x 10 x 10 for attention."""
    assert SMALL.forward_flops(10, 10, 3) == 20_000 + 1_800 + 6_400


def test_sampling_computes_or_reads() -> None:
    """Five sequences, prompts of 10, then 4 tokens that see 12 on average.

    The prompts take 5 x (20,000 + 600 + 6,400) FLOP. A token takes 5 x (2,000 + 600 + 768) FLOP, or reads 2 bytes of
    1,300 weights and of 2 x 2 x 4 x 12 x 5 keys and values.
    """
    prompts = 5 * 27_000 / 1e6
    computing = Rates("", products=1e6, bandwidth=1, reading=1e9, layer_seconds=0.01)
    assert SMALL.sampling_seconds(computing, 5, 10, 4) == pytest.approx(prompts + 4 * (5 * 3_368 / 1e6 + 0.02))
    reading = Rates("", products=1e6, bandwidth=1, reading=1e5, layer_seconds=0.01)
    assert SMALL.sampling_seconds(reading, 5, 10, 4) == pytest.approx(prompts + 4 * (2 * (1_300 + 960) / 1e5 + 0.02))


def test_rows_and_anchors_sample_as_one_batch(settings: Make, write_rows: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "anchors.txt").write_text("fghij\nklmno\n", encoding="utf-8")
    data = str(write_rows(ROWS))
    alone = timed(settings(data=data, batch_size=4)).step
    beside = timed(settings(data=data, batch_size=4, anchors=str(tmp_path / "anchors.txt"), anchor_share=0.5)).step
    assert beside.sampling == pytest.approx(alone.sampling)
    assert beside.teacher < alone.teacher  # anchors have no context


@pytest.mark.parametrize(
    ("changes", "passes", "moved"),
    [
        ({}, 3, 3 * 4 + 3 * 4 + 2 * 8 + 4 + 8),
        ({"teacher": "live"}, 3, 3 * 4 + 3 * 4 + 2 * 8),
        ({"gradient_checkpointing": True}, 4, 3 * 4 + 3 * 4 + 2 * 8 + 4 + 8),
    ],
)
def test_a_step_is_the_sum_of_its_parts(
    settings: Make, write_rows: Callable[..., Any], changes: dict[str, Any], passes: int, moved: int
) -> None:
    config = settings(data=str(write_rows(ROWS, name="equal.jsonl")), batch_size=2, **changes)
    network = Network.of(fake_model(config.model, dtype="float32"), FLOAT32)
    plan, longest = timed(config), MemoryPlanner(config, load_demonstrations(config.data), FLOAT32)
    student, teacher = longest.plan(config).lengths  # of rows that are all alike
    assert plan.step.sampling == pytest.approx(network.sampling_seconds(SLOW, 2, student - 10, 10))
    assert plan.step.teacher == pytest.approx(2 * network.forward_flops(teacher, teacher, 10) / 1e6)
    assert plan.step.student == pytest.approx(2 * passes * network.forward_flops(student, student, 10) / 1e6)
    weights = network.body + 2 * network.head
    assert plan.step.update == pytest.approx(weights * moved / 1e5)
    assert plan.total == pytest.approx(6 * plan.step.total)
    assert re.fullmatch(
        r"rough time, on a slow device: \S+ s per step \(sampling .*, update .*\), .* 6 steps, .*", plan.line()
    )


@pytest.mark.parametrize(
    ("kind", "mixed_precision", "dtype", "cost"),
    [
        ("cuda", "bf16", "float32", 2),
        ("cuda", "bf16", "bfloat16", 2),
        ("cuda", "no", "float32", 1),
        ("cuda", "no", "bfloat16", 2),
        ("cpu", "bf16", "float32", 1),
    ],
)
def test_the_loss_multiplies_the_head_at_half_the_rate_of_bfloat16(
    settings: Make, kind: str, mixed_precision: str, dtype: str, cost: int
) -> None:
    loaded = fake_model(settings().model, dtype=dtype)
    found = Network.of(loaded, Device(kind, mixed_precision))
    assert found.head_cost == cost
    assert found.scoring_flops(10, 3) == found.forward_flops(10, 10, 3) + (cost - 1) * 2 * 3 * 300 * 32
    loaded.model.config.final_logit_softcapping = 30.0  # then autocast multiplies, and caps
    assert Network.of(loaded, Device(kind, mixed_precision)).head_cost == 1


def test_a_float32_head_takes_longer_in_learning_and_not_in_sampling(
    settings: Make, write_rows: Callable[..., Any]
) -> None:
    config = settings(data=str(write_rows(ROWS, name="equal.jsonl")), batch_size=2, mixed_precision="auto")
    plain, half = (timed(config, device).step for device in (FLOAT32, Device("cuda", "bf16")))
    head = 2 * 2 * 300 * 32 * 10 / 1e6  # forward, of two rows with ten tokens
    assert half.teacher == pytest.approx(plain.teacher + head)
    assert half.student == pytest.approx(plain.student + 3 * head)
    assert half.sampling < plain.sampling, "it reads smaller numbers"


def test_an_adapter_needs_no_gradients_of_the_weights(settings: Make) -> None:
    full, adapter = timed(settings()).step, timed(settings(lora_rank=2)).step
    assert 2 / 3 < adapter.student / full.student < 0.8  # its factors beside two thirds
    assert adapter.update < full.update


def test_on_a_gpu_an_adapter_adds_a_fixed_time_per_layer_and_token(settings: Make) -> None:
    """Ten tokens through two layers, and the factors' products."""
    gpu = Device("cuda", "no")
    full, adapter = (timed(settings(lora_rank=rank), gpu).step.sampling for rank in (0, 1))
    on_cpu = [timed(settings(lora_rank=rank)).step.sampling for rank in (0, 1)]
    assert adapter - full == pytest.approx(10 * 2 * ADAPTER_SECONDS + on_cpu[1] - on_cpu[0])
    served = [timed(settings(lora_rank=1, engine="vllm"), device).step.sampling for device in (gpu, FLOAT32)]
    assert served[0] == pytest.approx(served[1])


@pytest.mark.parametrize("count", [40, 100, 200])
def test_rows_of_all_lengths_determine_the_time(settings: Make, write_rows: Callable[..., Any], count: int) -> None:
    """Of a method whose steps take no samples, so that the student's time is that of the average row."""
    rows = [{"prompt": f"{i:03}" + "x" * i, "completion": "xyz"} for i in range(count)]
    middle = [rows[count // 2]] * 4
    found, expected = (
        timed(settings(method="sft", data=str(write_rows(own, name=f"{len(own)}.jsonl")))).step.student
        for own in (rows, middle)
    )
    assert found == pytest.approx(expected, rel=0.1)


def test_what_a_method_does_not_do_takes_no_time(settings: Make) -> None:
    sft = timed(settings(method="sft")).step
    assert (sft.sampling, sft.teacher) == (0, 0)
    assert timed(settings(method="grpo", scorer="exact")).step.teacher == 0
    drawn = timed(settings(method="sft_from_teacher"))
    assert drawn.step.sampling == 0
    assert drawn.before > 0
    assert drawn.total == pytest.approx(drawn.before + 6 * drawn.step.total)
    assert timed(settings(engine="vllm")).step.sampling < timed(settings()).step.sampling


def test_a_mixture_as_teacher_reads_the_context_twice(settings: Make) -> None:
    live = settings(method="sdpo", scorer="exact", teacher="live")
    mixture = settings(method="sdpo", scorer="exact", method_settings={"trust_region": 0.5})
    assert timed(mixture).step.teacher == pytest.approx(2 * timed(live).step.teacher)


def test_gpus_reach_a_share_of_their_data_sheets() -> None:
    assert named_rates("h100", "bf16").products == pytest.approx(0.4 * 989e12)
    assert named_rates("a100-40", "no").products == pytest.approx(0.4 * 19.5e12)
    assert named_rates("rtx4090", "bf16").reading == pytest.approx(0.7 * 1008e9)
    assert all(gpu.bfloat16_tflops > gpu.float32_tflops for gpu in GPUS.values())
    with pytest.raises(UserError, match=r"^setting 'device': found 'h10', expected this, .*; did you mean h100\?$"):
        check_device("h10")


def test_a_named_device_has_its_memory(settings: Make) -> None:
    found = plan_for(settings(mixed_precision="auto"), None, "l4")
    assert found.limit == 24 * 10**9
    assert found.time is not None
    assert found.time.rates == named_rates("l4", "bf16")
    assert plan_for(settings(), 10**9, "l4").limit == 10**9
    assert plan_for(settings(), 10**9, None).time is None
    with pytest.raises(UserError, match="setting 'memory': the memory of this device is unknown"):
        plan_for(settings(), None, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_bfloat16_weights_are_multiplied_in_bfloat16(
    settings: Make,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    model = shutil.copytree(model_folder(), tmp_path / "saved")
    saved = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(saved | {"dtype": "bfloat16"}))
    config = settings(model=str(model), dtype=dtype, mixed_precision="no")
    found = plan_for(config, None, "h100")
    assert found.time is not None
    assert found.time.rates == named_rates("h100", "bf16")
    assert "bfloat16 weights, adamw_torch, bfloat16 arithmetic" in " ".join(repr(found).split())
    asked = []
    measured = import_module("selfdistill.training.plan")
    monkeypatch.setattr(measured, "measured_rates", lambda _, precision: asked.append(precision) or SLOW)
    plan_for(config, None, "this")
    assert asked == ["bf16"]


def test_this_device_is_measured(settings: Make) -> None:
    rates = measured_rates(torch.device("cpu"), "no")
    assert 1e8 < rates.products < 1e14
    assert 1e7 < rates.reading < rates.bandwidth < 1e13
    found = plan_for(settings(), None, "this")
    assert found.time is not None
    assert math.isfinite(found.time.total)
    assert found.time.rates.name.startswith("this cpu, measured: ")


def test_a_deterministic_run_is_the_same_on_a_cpu(settings: Make) -> None:
    runs = [train(settings(name, max_steps=2, deterministic=asked)) for name, asked in (("a", False), ("b", True))]
    assert len({(run / "model.safetensors").read_bytes() for run in runs}) == 1
