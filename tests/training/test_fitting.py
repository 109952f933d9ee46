"""What is refused before a model is loaded, and which settings are proposed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from children import started_together
from conftest import ENDS, final_weights, same
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import LlamaConfig, LlamaForCausalLM

from selfdistill.config import TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.errors import UserError
from selfdistill.model import LoadedModel, tensor_bytes
from selfdistill.model.teacher import PART_NUMBERS
from selfdistill.runtime import planned_devices, resources
from selfdistill.runtime.resources import size_in_bytes
from selfdistill.training import memory, plan_for, train
from selfdistill.training.fitting import check_host_fits, fit, fitted, plan_that_fits
from selfdistill.training.memory import MemoryPlanner, has_moving_teacher
from selfdistill.training.memory_result import MemoryPlan
from selfdistill.training.traced_step import Device, TracedStep
from selfdistill.training.train import AMPLE, plan_memory

Make = Callable[..., TrainConfig]
CPU, GPU = Device("cpu", "no"), Device("cuda", "bf16")
BFLOAT16 = {"dtype": "bfloat16"}
IN_ONE = {"gradient_accumulation_steps": 1, "gradient_checkpointing": False}


def planned(config: TrainConfig, device: Device = CPU) -> MemoryPlan:
    return MemoryPlanner(config, load_demonstrations(config.data), device).plan(config)


@pytest.fixture
def settings(settings: Make, model_folder: Callable[..., Path]) -> Make:
    """Settings of runs of a model with a single layer, which is planned soonest."""
    folder = str(model_folder(ends=ENDS, layers=1))
    return lambda out="run", **values: settings(out, **{"model": folder} | values)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free memory."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(resources, "free_memory", lambda _: size)

    return set_free


@pytest.fixture
def long(settings: Make, write_rows: Callable[..., Path]) -> Make:
    """Settings of runs in which activations need most memory, of a method whose plan is made soonest."""
    rows = [{"prompt": f"q{i}", "completion": "ab" * (50 if i else 100)} for i in range(6)]
    data = str(write_rows(rows, name="long.jsonl"))

    def make(out: str = "run", **values: Any) -> TrainConfig:
        return settings(out, **{"data": data, "method": "sft", "batch_size": 4, "max_completion_length": 250} | values)

    return make


def test_what_cannot_fit_is_refused_before_the_model_is_loaded(
    settings: Make, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    free(1000)
    monkeypatch.setattr("selfdistill.training.trainer.load_model", lambda *_, **__: pytest.fail("loaded"))
    message = r"^0\.0 MiB of memory are free, but the run needs at least \d\.\d MiB, .*; no change of settings makes it"
    with pytest.raises(UserError, match=message):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("processes", [None, "8"])
def test_an_average_that_the_machine_cannot_hold_is_refused(
    settings: Make, monkeypatch: pytest.MonkeyPatch, processes: str | None
) -> None:
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    plan = planned(settings(**BFLOAT16), GPU)
    needed = plan.host * int(processes or 1)
    assert needed > 0
    monkeypatch.setattr("selfdistill.training.fitting.free_memory", lambda _: needed)
    check_host_fits(plan)
    monkeypatch.setattr("selfdistill.training.fitting.free_memory", lambda _: needed - 1)
    with pytest.raises(
        UserError, match=r"^\d+\.\d MiB of the machine's memory are free, but .* use teacher frozen or live"
    ):
        check_host_fits(plan)
    check_host_fits(planned(settings(**BFLOAT16)))  # on a CPU the average is part of the plan


def test_a_tiny_model_starts_without_a_plan(
    settings: Make, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(import_module("selfdistill.training.train"), "plan_that_fits", lambda *_: (None, ["planned"]))
    config = settings()
    weights = sum(file.stat().st_size for file in Path(config.model).glob("*.safetensors"))
    assert weights > 0
    model = get_peft_model(LlamaForCausalLM.from_pretrained(config.model), LoraConfig())
    model.save_pretrained(tmp_path / "adapter")  # its own files are smaller than its base's
    teacher = {"method": "npo", "teacher_model": config.model}
    for values in ({}, {"model": str(tmp_path / "adapter"), "adapter_base": config.model}, teacher):
        for size, said in ((2 * AMPLE * weights, "planned"), (4 * AMPLE * weights, "memory free: ")):
            free(size)
            _, (line,) = plan_memory(settings(**values), load_demonstrations(config.data), None)
            assert line.startswith(said)


def test_processes_on_cpus_share_the_memory_of_their_machine(
    settings: Make, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, load: Callable[..., LoadedModel]
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    free(4004)
    assert plan_for(settings(), None, "this").limit == 1001
    config, loaded = settings(), load()
    rows, held = load_demonstrations(config.data), tensor_bytes(loaded.model.parameters())
    message = r"^0\.0 MiB of memory are free for each of 4 processes, but the run needs"
    with pytest.raises(UserError, match=message):
        plan_memory(config, rows, None)
    monkeypatch.setattr(
        import_module("selfdistill.training.train"), "plan_that_fits", lambda *given: (None, [given[2]])
    )
    assert plan_memory(config, rows, loaded)[1] == [1001 + held], "this process holds the model itself"


@pytest.mark.slow
def test_where_one_process_has_too_little_all_are_refused(
    settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {"0": 2**40, "1": 1000}
    monkeypatch.setattr(resources, "free_memory", lambda _: sizes[os.environ["RANK"]])
    config = settings(method="sft")
    children = started_together(lambda: train(config), tmp_path / "two")
    assert [child.wait() for child in children] == [1, 1]
    assert all("memory are free, but the run needs at least" in child.log.read_text() for child in children)


@pytest.mark.slow
def test_what_fits_unless_completions_are_long_is_said_and_trained(
    settings: Make, free: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(max_completion_length=200, max_steps=1, batch_size=4, **IN_ONE)
    free(planned(config).peak - 1)
    train(config)
    said = capsys.readouterr().err
    assert "memory by plan: at most" in said
    assert re.search(r"note: it does not fit if all rows of a batch are as long as the longest, \d+ tokens; this", said)
    assert (Path(config.output_dir) / "final").is_dir()


@pytest.mark.slow
def test_where_no_choice_fits_the_open_settings_save_most(
    long: Make, free: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = long(max_steps=1)
    saving = config.model_copy(update={"gradient_accumulation_steps": 4, "gradient_checkpointing": True})
    planner = MemoryPlanner(config, load_demonstrations(config.data), CPU)
    least = planner.plan(saving, least=True).peak
    assert least < planner.plan(config, least=True).peak
    free(least)
    train(config)
    assert "note: it does not fit if all rows" in capsys.readouterr().err
    resolved = yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_checkpointing"] is True


@pytest.mark.slow
def test_long_rows_that_seldom_come_together_are_trained(
    settings: Make, write_rows: Callable[..., Path], free: Callable[[int], None]
) -> None:
    rows = [{"prompt": f"{i} " + "long " * (60 if i < 2 else 1), "completion": "ab"} for i in range(20)]
    config = settings(data=str(write_rows(rows, name="seldom.jsonl")), method="sft", max_steps=1, **IN_ONE)
    free(planned(config).peak - 1)
    train(config)
    assert (Path(config.output_dir) / "final").is_dir()


def test_rows_that_are_dropped_are_not_planned(settings: Make, write_rows: Callable[..., Path]) -> None:
    rows = [{"prompt": f"{i} " + "long " * (90 if i < 2 else 1), "completion": "ab"} for i in range(6)]
    config = settings(data=str(write_rows(rows, name="dropped.jsonl")), max_prompt_length=100, on_long_prompt="drop")
    assert planned(config).lengths[0] < 100


def test_a_context_of_more_rows_than_a_batch_is_planned(settings: Make) -> None:
    assert planned(settings(context="few_shot:k=3", batch_size=2, max_prompt_length=400)).lengths[1] > 0


def test_a_teacher_may_be_quantised(settings: Make, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    teacher = with_config(model_folder(), tmp_path / "quantised", **quantised)
    assert planned(settings(teacher_model=str(teacher))).untraced is None


def test_a_teacher_that_cannot_be_used_is_reported_once_its_files_are_read(settings: Make, tmp_path: Path) -> None:
    config = settings(teacher_model=str(tmp_path))
    with pytest.raises(UserError, match="the folder has neither") as error:
        train(config)
    assert any(entry.name == "make_stages" for entry in error.traceback)


@pytest.mark.slow
def test_servers_have_memory_of_their_own(settings: Make) -> None:
    config = settings()
    servers = {"engine": "vllm", "engine_url": "http://10.0.0.2:8000"}
    for device in (CPU, GPU):
        assert planned(config.model_copy(update=servers), device).peak <= planned(config, device).peak


def test_the_nearest_settings_change_least(long: Make) -> None:
    config = long(**IN_ONE)
    planner = MemoryPlanner(config, load_demonstrations(config.data), CPU)
    peaks = {n: planner.plan(config.model_copy(update={"gradient_accumulation_steps": n})).peak for n in (1, 2, 4)}
    assert peaks[1] > peaks[2] > peaks[4]
    assert fitted(planner, config, peaks[1]).fits
    for limit, parts in ((peaks[1] - 1, 2), (peaks[2] - 1, 4)):
        found = fitted(planner, config, limit)
        assert not found.fits
        assert found.nearest is not None
        changes, plan = found.nearest
        assert changes == {"gradient_accumulation_steps": parts}
        assert plan.peak <= limit
        assert f" MiB: gradient_accumulation_steps {parts}" in found.verdict()


def test_a_model_that_cannot_recompute_activations_is_not_asked_to(long: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    config = long(**IN_ONE)
    planner = MemoryPlanner(config, load_demonstrations(config.data), CPU)
    found = fitted(planner, config, planner.plan(config).peak - 1)
    assert found.nearest is not None
    assert found.nearest[0] == {"gradient_accumulation_steps": 2}
    _, lines = plan_that_fits(planner, long(), planner.plan(config, least=True).peak)
    assert "gradient_checkpointing" not in lines[0]
    refused = r"^setting 'gradient_checkpointing': LlamaForCausalLM does not support it; leave it out$"
    with pytest.raises(UserError, match=refused):
        train(long(gradient_checkpointing=True))


def test_another_optimizer_is_planned_without_another_trace(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    smaller = config.model_copy(update={"optim": "adamw_8bit"})
    expected, planner = planned(smaller), MemoryPlanner(config, load_demonstrations(config.data), CPU)
    moments = planner.plan(config).largest.bytes["moments"]
    monkeypatch.setattr(TracedStep, "learning", lambda *_, **__: pytest.fail("traced again"))
    found = planner.plan(smaller)
    assert found.phases == expected.phases
    assert found.largest.bytes["moments"] < moments


def test_a_teacher_that_does_not_follow_the_student_is_not_changed(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, it saves nothing; a method with a teacher of its own refuses the setting."""
    config = settings(method="sft", batch_size=1, gradient_checkpointing=True)
    planner = MemoryPlanner(config, load_demonstrations(config.data), CPU)
    limit = planner.plan(config.model_copy(update={"optim": "adamw_8bit"})).peak
    tried, plan = [], planner.plan

    def noted(config: TrainConfig, **options: Any) -> MemoryPlan:
        tried.append(config.teacher)
        return plan(config, **options)

    monkeypatch.setattr(planner, "plan", noted)
    assert fitted(planner, config, limit).nearest is not None
    assert tried == ["ema"] * len(tried)
    assert len(tried) > 2
    own: dict[str, Any] = {"scorer": "exact", "method_settings": {"trust_region": 0.5}}
    assert not has_moving_teacher(settings(method="sdpo", **own))


def test_micro_batches_and_checkpointing_are_chosen_where_they_are_not_given(long: Make) -> None:
    config = long()
    planner = MemoryPlanner(config, load_demonstrations(config.data), CPU)

    def peak(**values: Any) -> int:
        return planner.plan(config.model_copy(update=values)).peak

    assert fitted(planner, config, peak()).chosen == {}
    found = fitted(planner, config, peak() - 1)
    assert found.fits
    assert found.nearest is None
    assert found.chosen == {"gradient_accumulation_steps": 2}
    assert found.plan.config == config.model_copy(update=found.chosen)
    assert found.verdict().endswith(" MiB; chosen for that: gradient_accumulation_steps 2")
    least = {"gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    assert fitted(planner, config, peak(**least)).chosen == least
    in_one = config.model_copy(update={"gradient_accumulation_steps": 1})
    assert not fitted(planner, in_one, peak(**least)).fits, "what is given is not changed"


def test_on_a_gpu_choices_leave_a_tenth_free_if_any_can(long: Make) -> None:
    config = long(mixed_precision="bf16")
    planner = MemoryPlanner(config, load_demonstrations(config.data), GPU)

    def peak(**values: Any) -> int:
        return planner.plan(config.model_copy(update=values)).peak

    def chosen(limit: int) -> dict[str, Any]:
        found = fitted(planner, config, limit)
        assert found.fits
        return found.chosen

    assert chosen(peak() * 10 // 9 + 1) == {}
    assert chosen(peak() * 10 // 9 - 9) != {}, "it fits, and fills more than nine tenths"
    least = {"gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    assert chosen(peak(**least)) == least, "nothing leaves a tenth free"
    assert not fitted(planner, config, peak(**least) - 1).fits
    given = config.model_copy(update=IN_ONE)
    assert fitted(planner, given, peak()).fits, "what is given may fill all"
    proposed = fitted(planner, given, peak() - 1).nearest
    assert proposed is not None
    assert proposed[1].peak <= 0.9 * peak()


def test_processes_that_share_the_weights_have_equal_micro_batches(settings: Make) -> None:
    """With ``fsdp`` a batch is a multiple of processes times micro-batches: 8 of two processes has at most 4."""
    few_moves: dict[str, Any] = {"lora_rank": 4, **BFLOAT16}
    config = settings(method="sft", fsdp=True, batch_size=8, anchors="package", **few_moves)
    planner = MemoryPlanner(config, load_demonstrations(config.data), Device("cpu", "no", 2))
    saving = {"gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    limit = planner.plan(config.model_copy(update=saving), least=True).peak
    plan, lines = plan_that_fits(planner, config, limit)
    assert {name: getattr(plan.config, name) for name in saving} == saving
    assert lines[-1].startswith("note: it does not fit if all rows of a batch are as long as the longest")


def test_a_run_in_chosen_micro_batches_is_that_in_given_ones(
    long: Make, free: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    config, given = long("chosen", max_steps=1), long("given", max_steps=1, gradient_accumulation_steps=2)
    free(planned(config).peak - 1)
    train(config)
    assert "free; chosen for that: gradient_accumulation_steps 2\n" in capsys.readouterr().err
    train(given)
    chosen, expected = (yaml.safe_load((Path(x.output_dir) / "config.yaml").read_text()) for x in (config, given))
    assert chosen == expected | {"output_dir": config.output_dir}
    assert same(final_weights(config), final_weights(given))


def test_where_the_weights_do_not_fit_an_adapter_is_proposed(
    settings: Make, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    config = settings(model=str(with_config(model_folder(layers=1), tmp_path / "wide", **wide)), batch_size=1)
    rows = load_demonstrations(config.data)
    planner = MemoryPlanner(config, rows, CPU)
    live = planner.permanent(config.model_copy(update={"teacher": "live"})).total()
    found = fitted(planner, config, live - 1)
    assert found.nearest is not None
    assert found.nearest[0] == {"lora_rank": 16}
    assert found.nearest_full is not None
    changes, plan = found.nearest_full
    assert "lora_rank" not in changes
    assert plan.config == config.model_copy(update=changes)
    assert plan.peak <= found.limit
    assert found.to_dict()["nearest_without_adapter"] == changes
    full = ", ".join(f"{name} {str(value).lower()}" for name, value in changes.items())
    assert re.search(
        r"it does not fit: [\d.]+ MiB of [\d.]+ MiB; this would, with [\d.]+ MiB: lora_rank 16; "
        rf"or, without an adapter, with [\d.]+ MiB: {full}$",
        found.verdict(),
    )
    assert fitted(planner, config, plan.peak // 4).nearest_full is None
    with_tower = fit(config.model_copy(update={"train_vision_tower": True}), rows, CPU, live - 1)
    assert "lora_rank" not in with_tower.advice(), "the settings refuse the two together"


@pytest.mark.slow
def test_where_an_adapter_does_not_fit_weights_of_4_bits_are_proposed(
    settings: Make, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = with_config(model_folder(), tmp_path / "wide", hidden_size=512, intermediate_size=1024, head_dim=128)
    config = settings(model=str(folder), batch_size=1, max_completion_length=4, lora_rank=16)
    rows = load_demonstrations(config.data)
    least = planned(config.model_copy(update={"gradient_checkpointing": True, "dtype": "bfloat16"})).peak
    found = fit(config, rows, CPU, least)
    assert found.nearest is not None
    assert "load_in_4bit" not in found.nearest[0]
    limit = least * 2 // 3
    found = fit(config, rows, CPU, limit)
    assert found.nearest is not None
    changes, plan = found.nearest
    assert changes["load_in_4bit"] is True
    assert plan.peak <= limit
    assert found.verdict().endswith(" load_in_4bit true")
    adapter = tmp_path / "adapter"
    LoraConfig(base_model_name_or_path=str(folder), task_type="CAUSAL_LM").save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").touch()
    refused: dict[str, Any]
    for refused in ({"engine": "vllm"}, {"model": str(adapter)}):
        assert fit(config.model_copy(update=refused), rows, CPU, limit).nearest is None


@pytest.mark.slow
def test_weights_of_4_bits_are_proposed_with_an_adapter(
    settings: Make, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = with_config(model_folder(), tmp_path / "wide", hidden_size=512, intermediate_size=1024, head_dim=128)
    config = settings(model=str(folder), batch_size=1, max_completion_length=4, dtype="bfloat16")
    limit = planned(config.model_copy(update={"lora_rank": 16, "gradient_checkpointing": True})).peak * 2 // 3
    found = fit(config, load_demonstrations(config.data), CPU, limit)
    assert found.nearest is not None
    assert found.nearest[0].items() >= {"lora_rank": 16, "load_in_4bit": True}.items()


def test_weights_of_4_bits_are_not_proposed_with_pictures(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the planner tells; a run would refuse the setting with them."""
    pytest.importorskip("bitsandbytes")
    config = settings(batch_size=1, max_completion_length=4, lora_rank=16, dtype="bfloat16", **IN_ONE)
    planner = MemoryPlanner(config, load_demonstrations(config.data), CPU)
    assert not planner.has_pictures
    limit = planner.plan(config.model_copy(update={"load_in_4bit": True, "gradient_checkpointing": True})).peak
    found = fitted(planner, config, limit)
    assert found.nearest is not None
    assert "load_in_4bit" in found.nearest[0]
    planner.has_pictures = True
    found = fitted(planner, config, limit)
    assert found.nearest is None or "load_in_4bit" not in found.nearest[0]


@pytest.mark.parametrize(
    "values",
    [
        {"mixed_precision": "bf16"},
        pytest.param({"lora_rank": 4, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_all_alike_are_counted_from_a_few(
    settings: Make,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
) -> None:
    folder = with_config(model_folder(), tmp_path / "four", num_hidden_layers=4)
    config = settings(model=str(folder), **values)
    found = planned(config)
    monkeypatch.setattr(memory, "FEW_LAYERS", (4, 5))
    expected = planned(config)
    assert found.peak == pytest.approx(expected.peak, rel=0.01)
    assert found.largest.name == expected.largest.name


def with_config(folder: Path, copy: Path, **values: Any) -> Path:
    """A folder with the tokenizer and another config.json, without weights."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    config = LlamaConfig.from_pretrained(folder)
    for name, value in values.items():
        setattr(config, name, value)
    config.save_pretrained(copy)
    return copy


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_permanent_memory_is_that_of_the_shapes(
    settings: Make, model_folder: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    """W weights: D V, once more for a head of its own, and by layer those of attention, feed-forward and two norms."""
    layers, wide, inner, vocabulary, keys = 4, 3584, 18944, 152064, 512
    folder = with_config(
        model_folder(tied=tied),
        tmp_path / "large",
        num_hidden_layers=layers,
        hidden_size=wide,
        intermediate_size=inner,
        vocab_size=vocabulary,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
    )
    weights = vocabulary * wide * (1 if tied else 2) + wide
    weights += layers * (2 * wide * wide + 2 * wide * keys + 3 * wide * inner + 2 * wide)
    config = settings(model=str(folder), drift_steps=0)
    planner = MemoryPlanner(config, load_demonstrations(config.data), GPU)

    def of(**values: Any) -> dict[str, float]:
        return {k: v / weights for k, v in planner.permanent(config.model_copy(update=values)).items() if v}

    close = {"rel": 1e-6}
    assert of() == pytest.approx({"weights": 4, "moments": 8, "teacher": 4}, **close)
    assert of(teacher="live") == pytest.approx({"weights": 4, "moments": 8}, **close)
    assert of(teacher="frozen") == pytest.approx({"weights": 4, "moments": 8, "teacher": 4}, **close)
    half, average = {"weights": 2, "moments": 8, "teacher": 2}, planner.plan(config.model_copy(update=BFLOAT16)).host
    assert of(dtype="bfloat16") == pytest.approx(half, **close)  # the average is in the machine's memory
    staged = 2 * (PART_NUMBERS // wide * wide)  # of the embeddings; a float32 copy is made of it
    assert average == pytest.approx(4 * weights + 3 * staged, rel=1e-6)
    blocks = 2 * 4 / 256  # each with a scale of its own in float32
    half["moments"] = 2 + blocks
    assert of(dtype="bfloat16", optim="adamw_8bit") == pytest.approx(half, rel=1e-3)  # norms have none of 8 bits
    rank, adapter = 16, 0
    for read, written in ((wide, wide), (wide, keys), (wide, keys), (wide, wide), *[(wide, inner)] * 3):
        adapter += layers * rank * (read + written)
    found, share = of(dtype="bfloat16", lora_rank=rank), adapter / weights
    assert found == pytest.approx({"weights": 2 + 4 * share, "moments": 8 * share, "teacher": 4 * share}, **close)


def test_a_model_that_does_not_run_without_data_has_a_plan_without_its_step(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads_a_value(*_: Any, **__: Any) -> Any:
        raise DataDependentOutputException("aten._local_scalar_dense")

    config = settings(drift_steps=0)
    monkeypatch.setattr("selfdistill.training.traced_step.chunked_loss", reads_a_value)
    found = planned(config)
    assert set(found.largest.bytes) == {"weights", "moments", "teacher"}
    assert found.line().endswith(
        "; not counted: what a step adds, because this model does not run without data (DataDependentOutputException)"
    )


@pytest.mark.parametrize("error", [AssertionError, ImportError, IndexError, KeyError])
def test_what_fails_without_data_stops_no_run(
    settings: Make, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error("no data")

    monkeypatch.setattr("selfdistill.training.traced_step.FilledCache", fails)
    assert planned(settings(teacher="frozen")).untraced is not None


def test_anchors_hold_the_weights_of_before_the_run(settings: Make) -> None:
    plain, anchored = (planned(settings(anchors=anchors)).largest.bytes["teacher"] for anchors in ((), "package"))
    assert anchored == 2 * plain


def test_sharding_divides_what_stays(settings: Make) -> None:
    config = settings(fsdp=True)
    rows = load_demonstrations(config.data)
    one, two = (MemoryPlanner(config, rows, Device("cpu", "no", n)).permanent(config) for n in (1, 2))
    assert {name: two[name] for name in ("weights", "moments", "teacher")} == {
        name: one[name] // 2 for name in ("weights", "moments", "teacher")
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_an_average_is_moved_in_parts_of_a_shard(
    settings: Make, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 50 rows of the 300 of embeddings and head; two processes have 150 of them each."""
    monkeypatch.setattr("selfdistill.model.teacher.PART_NUMBERS", 50 * 32)
    part = 2 * 50 * 32
    config = settings(fsdp=processes > 1, **BFLOAT16)
    planner = MemoryPlanner(config, load_demonstrations(config.data), Device("cpu", "no", processes))
    permanent, phases = planner.permanent(config), {x.name: x.bytes["average"] for x in planner.plan(config).phases}
    assert permanent["teacher"] == permanent["weights"]
    assert permanent["average"] == pytest.approx(permanent["moments"] / 2 + part, abs=processes)
    assert phases["teacher"] == phases["student"] == permanent["average"]
    assert phases["sampling"] == permanent["average"] + 2 * part, (
        "a float32 copy of the part, while the next step samples"
    )
    again = planner.plan(config.model_copy(update={"gradient_accumulation_steps": 2})).phases
    assert next(x.bytes["average"] for x in again if x.name == "sampling") == phases["sampling"]


def test_the_largest_segment_of_a_phase_is_that_of_the_sharded_run(
    settings: Make, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Alone, a process holds most once all layers have gradients; one of 64 before there are."""
    wide = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    folder = with_config(model_folder(), tmp_path / "wide", num_hidden_layers=12, **wide)
    config = settings(model=str(folder), method="sft", fsdp=True, batch_size=64)
    alone, one_of_many = (
        planned(config.model_copy(update=values), Device("cpu", "no", n)).largest.bytes
        for values, n in (({"fsdp": False, "batch_size": 1}, 1), ({}, 64))
    )
    assert alone["gradients"] > alone["activations"]
    assert one_of_many["gradients"] < one_of_many["activations"]


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("1.5 TiB", 1.5 * 2**40)])
def test_sizes(text: str, size: float) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "80G", "GiB", "1.2.3GB", "-4GiB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^setting 'memory': found .*, expected a size such as 80GiB, 80GB or 8x80GiB"):
        size_in_bytes(text)


@pytest.mark.parametrize(
    ("memory", "device", "found"),
    [
        ("8x80GiB", None, (80 * 2**30, None, 8)),
        ("8 x 80 GB", None, (80 * 10**9, None, 8)),
        (None, "2xrtx4090", (None, "rtx4090", 2)),
        ("8x70GB", "8xh100", (70 * 10**9, "h100", 8)),
        ("70GB", "8xh100", (70 * 10**9, "h100", 8)),
        ("24GB", "this", (24 * 10**9, "this", None)),
        (None, None, (None, None, None)),
    ],
)
def test_a_number_of_devices_may_precede_size_and_name(
    memory: str | None, device: str | None, found: tuple[Any, ...]
) -> None:
    assert planned_devices(memory, device) == found


@pytest.mark.parametrize(
    ("memory", "device", "message"),
    [
        ("8x80", None, "setting 'memory': found '80', expected a size"),
        ("0x80GiB", None, "setting 'memory': found '0x80GiB', expected a size"),
        (None, "8xh10", "setting 'device': found 'h10', expected"),
        ("4x80GiB", "8xh100", "settings 'memory' and 'device': found '4x80GiB' and '8xh100'; give one number"),
        ("2x80GiB", "this", "setting 'device': 'this' is a single device"),
    ],
)
def test_other_numbers_of_devices_are_refused(memory: str | None, device: str | None, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        planned_devices(memory, device)


@pytest.mark.parametrize(
    ("fsdp", "held"), [(True, "which share the weights (fsdp)"), (False, "which all hold all weights")]
)
def test_a_plan_for_several_devices_is_that_of_each(settings: Make, fsdp: bool, held: str) -> None:
    config = settings(method="sft", batch_size=8, fsdp=fsdp)
    found = plan_for(config, 10**9, None, count=4)
    one, four = (planned(config, Device("cuda", "bf16", n)) for n in (1, 4))
    assert found.plan.peak == four.peak < one.peak
    assert found.to_dict()["devices"] == 4
    assert f"\nfor each of 4 devices, {held}\n" in str(found)
    assert found.verdict().endswith(" MiB on each of 4 devices")


def test_a_sharded_plan_says_for_how_many_devices_it_is_and_refuses_unequal_parts(settings: Make) -> None:
    config = settings(method="sft", batch_size=8, fsdp=True)
    assert "\nfor one device, on which fsdp shards nothing; for several, give memory 8x80GiB\n" in str(
        plan_for(config, 10**9, None)
    )
    with pytest.raises(UserError, match=r"batch_size 8 is not a multiple of 3 processes times gradient_accumulation"):
        plan_for(config, 10**9, None, count=3)


def test_sharding_is_proposed_first_where_several_devices_can_share_the_weights(settings: Make) -> None:
    config, device = settings(method="sft", batch_size=8, **IN_ONE), Device("cuda", "no", 8)
    rows = load_demonstrations(config.data)
    whole, sharded = (planned(config.model_copy(update={"fsdp": fsdp}), device) for fsdp in (False, True))
    found = fit(config, rows, device, whole.peak - 1)
    assert found.nearest is not None
    assert found.nearest[0] == {"fsdp": True}
    assert found.nearest[1].peak == sharded.peak
    assert re.search(r"MiB on each of 8 devices; this would, with \d\.\d MiB: fsdp true$", found.verdict())
    for values in ({"batch_size": 4}, {"optim": "adamw_8bit"}):
        nearest = fit(config.model_copy(update=values), rows, device, whole.peak // 4).nearest
        assert nearest is None or "fsdp" not in nearest[0]
