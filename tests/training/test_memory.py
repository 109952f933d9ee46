"""The plan of a run's memory against the tensors that are alive in real steps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import ENDS, byte_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from selfdistill.config import MethodName, TrainConfig
from selfdistill.data import ContextEncoder, Example, load_demonstrations
from selfdistill.methods import METHODS, stages_of
from selfdistill.methods.sequences import StudentSamples
from selfdistill.model.device import LOSS_LOGITS, PLAIN_ATTENTION_TOKENS
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.traced_step import Device
from selfdistill.training.trainer import Trainer

Make = Callable[..., TrainConfig]
VOCABULARY, HIDDEN = 2048, 128


def write_model(path: Path, layers: int) -> Path:
    """Write a random model whose parts all show: four layers have a million weights, for some CPUs multiply bfloat16
    slowly.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=257,
    )
    torch.manual_seed(0)  # some samples end early
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 257
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), 4)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For what is planned alone, which takes longer with more layers."""
    return str(write_model(tmp_path_factory.mktemp("model"), 1))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the logits of a step are several chunks."""
    monkeypatch.setattr("selfdistill.loss.chunked.CHUNK_LOGITS", 64 * VOCABULARY)


@pytest.fixture
def make(folder: Path, write_rows: Callable[..., Path], settings: Make) -> Make:
    rows = [
        {"prompt": f"{i}: " + "where is it? " * 2, "completion": "ab" * 15, "document": "It is there."}
        for i in range(8)
    ]
    data = write_rows(rows, name="rows.jsonl")

    def configure(**values: Any) -> TrainConfig:
        defaults = {"model": str(folder), "data": str(data), "max_completion_length": 32, "batch_size": 4}
        return settings(**defaults | {"max_steps": 2} | values)

    return configure


def live_bytes() -> int:
    """Bytes of all tensors alive, each memory once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measured_peak(config: TrainConfig) -> int:
    """Bytes of the tensors alive at the peak of two steps, as PyTorch's allocator tells."""
    before = live_bytes()
    trainer = Trainer(config)
    held = after_a_step(trainer) - before
    return held + added_peak(lambda: trainer.step(1))


def after_a_step(run: Trainer) -> int:
    """Bytes of all tensors alive once a step is done, and the teacher's average, which a thread moves beside it."""
    run.step(0)
    if run.teacher is not None:
        run.teacher.wait()
    return live_bytes()


def added_peak(work: Callable[[], object]) -> int:
    """Bytes by which the tensors alive grow at the peak of some work, as PyTorch's allocator tells."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    present, peak = 0, 0
    for event in sorted((e for e in events.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        present += event.nbytes()
        peak = max(peak, present)
    return peak


SETTINGS: dict[str, dict[str, Any]] = {
    "full, float32, EMA": {},
    "full, float32, frozen": {"teacher": "frozen"},
    "full, float32, live": {"teacher": "live"},
    "full, bfloat16 arithmetic": {"mixed_precision": "bf16"},
    "full, bfloat16 weights, EMA": {"dtype": "bfloat16"},
    "full, bfloat16 weights, 8-bit moments, EMA": {"dtype": "bfloat16", "optim": "adamw_8bit"},
    "full, bfloat16 weights, 8-bit moments, live": {"dtype": "bfloat16", "optim": "adamw_8bit", "teacher": "live"},
    "LoRA, float32": {"lora_rank": 16},
    "LoRA, bfloat16 base": {"lora_rank": 16, "dtype": "bfloat16"},
    "LoRA, float32, bfloat16 arithmetic": {"lora_rank": 16, "mixed_precision": "bf16"},
    "QLoRA, float32": {"lora_rank": 16, "load_in_4bit": True},
    "QLoRA, bfloat16 base": {"lora_rank": 16, "load_in_4bit": True, "dtype": "bfloat16"},
    "QLoRA, bfloat16 base, checkpointing": {
        "lora_rank": 16,
        "load_in_4bit": True,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 4,
    },
    "QLoRA, float32, bfloat16 arithmetic": {"lora_rank": 16, "load_in_4bit": True, "mixed_precision": "bf16"},
    "full, checkpointing": {"gradient_checkpointing": True},
    "full, four micro-batches": {"gradient_accumulation_steps": 4},
    "long completions": {"max_completion_length": 512},
    "anchors": {"anchors": "anchors.txt", "anchor_share": 0.5},
    "SFT": {"method": "sft"},
    "top-k loss": {"support": "top_k"},
    "a target solved per token": {"method": "isdft"},
    "samples drawn before": {"method": "ssd"},
}
QUICK = ("full, bfloat16 weights, 8-bit moments, EMA",)
QUICK_METHODS = ("sft_reinvoke", "offline_distillation", "sdpo", "pope", "cpt")
"""Methods whose steps differ in what they hold."""


def cases() -> Iterator[Any]:
    for name in SETTINGS:
        yield pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", cases())
def test_the_plan_is_what_the_steps_hold(
    make: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("anchors.txt").write_text("Tell me what a lighthouse is for, and who keeps it.\n", encoding="utf-8")
    config = make(**SETTINGS[name])
    if config.optim == "adamw_8bit" or config.load_in_4bit:
        pytest.importorskip("bitsandbytes")
    rows = load_demonstrations(config.data)
    plan = MemoryPlanner(config, rows, Device("cpu", config.mixed_precision)).plan(config)
    assert plan.untraced is None
    # oneDNN multiplies bfloat16 numbers in working memory that is no tensor, and whose size depends on the CPU.
    is_float32 = config.dtype == "float32" and config.mixed_precision == "no"
    with torch.backends.mkldnn.flags(enabled=is_float32):
        measured = measured_peak(config)
    print(f"\n| {name} | {plan.peak / 2**20:.0f} | {measured / 2**20:.0f} | {plan.peak / measured - 1:+.1%} |")
    print(repr(plan))
    assert plan.peak == pytest.approx(measured, rel=0.03)


def phases_of(config: TrainConfig, processes: int = 1) -> dict[str, int]:
    plan = MemoryPlanner(config, load_demonstrations(config.data), Device("cpu", "no", processes)).plan(config)
    assert plan.untraced is None
    return {phase.name: phase.total for phase in plan.phases}


def test_the_plan_counts_the_chunks_of_the_loss_as_they_are_on_a_gpu(
    make: Make, one_layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(model=one_layer, max_completion_length=256)  # 1,024 tokens in a batch
    rows = load_demonstrations(config.data)

    def loss(kind: str) -> int:
        plan = MemoryPlanner(config, rows, Device(kind, "bf16")).plan(config)
        return max(phase.bytes["loss"] for phase in plan.phases)

    found = []
    for tokens in (64, 256, 512):
        monkeypatch.setitem(LOSS_LOGITS, "cuda", tokens * VOCABULARY)
        found.append(loss("cuda"))
    assert found[0] == loss("cpu")
    more = [after - before for before, after in pairwise(found)]
    assert 4 * 4 * VOCABULARY <= more[0] / 192 <= 7 * 4 * (VOCABULARY + HIDDEN)  # logits and what is made of them
    assert more[1] / 256 == pytest.approx(more[0] / 192, rel=0.01)


def test_the_plan_of_a_gpu_has_no_attention_that_only_a_cpu_uses(
    make: Make, one_layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(model=one_layer, method="sft", mixed_precision="bf16")
    rows = load_demonstrations(config.data)

    def activations(kind: str) -> int:
        plan = MemoryPlanner(config, rows, Device(kind, "bf16")).plan(config)
        assert max(plan.lengths) <= 128
        return max(phase.bytes["activations"] for phase in plan.phases)

    gpu, cpu = activations("cuda"), activations("cpu")
    monkeypatch.setitem(PLAIN_ATTENTION_TOKENS, "cpu", 0)
    assert activations("cuda") == gpu
    assert activations("cpu") < cpu


def test_sampling_is_planned_anew_where_shards_sample_otherwise(
    make: Make, one_layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdistill.model.decoding_steps.has_graphs", lambda kind: kind == "cuda")  # with any PyTorch
    config = make(model=one_layer, max_completion_length=256)
    rows, device = load_demonstrations(config.data), Device("cuda", "no", 2)
    sharded = config.model_copy(update={"fsdp": True})

    def sampling(*planned: TrainConfig) -> int:
        planner = MemoryPlanner(config, rows, device)
        return [phase.total for one in planned for phase in planner.plan(one).phases if phase.name == "sampling"][-1]

    assert sampling(config) != sampling(sharded)
    assert sampling(config, sharded) == sampling(sharded)


def test_each_of_several_processes_draws_as_much_at_once_as_one(make: Make) -> None:
    config = make(method="ssd")
    one, two = (phases_of(config, processes)["drawing"] for processes in (1, 2))
    assert two == one


DRAWN: dict[str, dict[str, Any]] = {
    "another model's": {"method": "npo", "scorer": "exact", "method_settings": {"tries": 1}},
    "after prefixes": {"method": "pope", "scorer": "exact", "num_generations": 2},
    "with hints": {"hint": "shortest", "scorer": "exact", "teacher": "frozen"},
    "from the prompt": {"method": "ssd"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_the_plan_counts_what_is_drawn_before_the_first_step(
    make: Make, name: str, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{i}: " + "where is it? " * 2, "completion": "ab " * 9 + "c"} for i in range(8)]
    config = make(**DRAWN[name], data=str(write_rows(rows, name="words.jsonl")))
    if config.method == "npo":
        config = config.model_copy(update={"teacher_model": config.model})
    before, peaks = live_bytes(), []
    kind = type(stages_of(config)[0][0].method.drawn)
    draw = kind.draw

    def measured(fixed: Any, *arguments: Any) -> Any:
        held, found = live_bytes() - before, []
        peaks.append(held + added_peak(lambda: found.append(draw(fixed, *arguments))))
        return found[0]

    monkeypatch.setattr(kind, "draw", measured)
    Trainer(config)
    assert phases_of(config)["drawing"] == pytest.approx(max(peaks), rel=0.03)


@pytest.mark.slow
def test_the_plan_counts_the_guides_that_samples_see(make: Make, write_rows: Callable[..., Path]) -> None:
    """No sample is right, so nothing is learnt in the first step, and there are no moments yet."""
    guide = "\n".join(["look there " * 15] * 2)
    rows = [{"prompt": f"{i}", "completion": "ab" * 30, "privileged_context": guide} for i in range(4)]
    data = str(write_rows(rows, name="guides.jsonl"))
    values: dict[str, Any] = {"batch_size": 4, "max_completion_length": 16, "num_generations": 4}
    config = make(method="actguide", data=data, scorer="exact", **values)
    before = live_bytes()
    run = Trainer(config)
    held, task = after_a_step(run) - before, run.stage.task
    measured = held + added_peak(lambda: task.method.sequence(run.loaded, task.examples[:4], 1))
    plan = MemoryPlanner(config, load_demonstrations(config.data), Device("cpu", "no")).plan(config)
    (sampling,) = (phase for phase in plan.phases if phase.name == "sampling")
    assert sampling.total - sampling.bytes["moments"] == pytest.approx(measured, rel=0.03)


def test_the_plan_counts_the_prefixes_in_prompts(make: Make, one_layer: str, write_rows: Callable[..., Path]) -> None:
    """As GRPO on prompts that end with half of the demonstration, with as many samples."""
    completion = "ab" * 30
    prompts = ["q", f"q\n\nLet this guide your answer:\n\n{completion[:30]}\n\nNow answer the question."]
    alone, guided = (
        str(write_rows([{"prompt": prompt, "completion": completion}] * 4, name=f"{len(prompt)}.jsonl"))
        for prompt in prompts
    )
    values: dict[str, Any] = {"model": one_layer, "batch_size": 4, "max_completion_length": 64, "scorer": "exact"}
    own: dict[str, Any] = {"longest": 0.5, "where": "prompt"}
    pope = make(method="pope", data=alone, num_generations=2, method_settings=own, **values)
    short, long = (make(method="grpo", data=data, num_generations=4, **values) for data in (alone, guided))
    found, least, expected = map(phases_of, (pope, short, long))
    for phase in ("sampling", "student"):
        assert least[phase] < 0.95 * expected[phase]
        assert found[phase] == expected[phase]


class LearnsMore(StudentSamples):
    """A source as a user may write it, whose samples are learnt under longer prompts."""

    def longest_example(self, example: Example, encode: ContextEncoder) -> Example:
        return replace(example, student_ids=example.student_ids + 400 * [1])


class SamplesMore(StudentSamples):
    """The same, of which half of a group may come from longer prompts and is learnt without them."""

    replaced = 2

    def longest_prompt(self, example: Example, encode: ContextEncoder) -> list[int]:
        return example.student_ids + 400 * [1]


@pytest.mark.parametrize(("kind", "longer"), [(LearnsMore, {"sampling", "student"}), (SamplesMore, {"sampling"})])
def test_the_plan_asks_a_source_of_ones_own_for_its_longest_prompts(
    make: Make, one_layer: str, monkeypatch: pytest.MonkeyPatch, kind: type[StudentSamples], longer: set[str]
) -> None:
    config = make(model=one_layer, method="grpo", num_generations=4, scorer="exact")
    plain = phases_of(config)
    (method,) = METHODS["grpo"](config)
    assert isinstance(method.sequence, StudentSamples)
    own = kind(method.sequence.sampling, method.sequence.num_generations, method.sequence.seed)
    monkeypatch.setitem(METHODS, "grpo", lambda _: (replace(method, sequence=own),))
    found = phases_of(config)
    assert {name for name in plain if found[name] > plain[name]} == longer


@pytest.mark.parametrize(
    "method",
    [name if name in QUICK_METHODS else pytest.param(name, marks=pytest.mark.slow) for name in get_args(MethodName)],
)
def test_the_plan_of_every_method_is_whole(
    all_of_them: Make, model_folder: Callable[..., Path], method: MethodName
) -> None:
    own: list[dict[str, Any]] = [{}, {"method_settings": {"trust_region": 0.5}}] if method == "sdpo" else [{}]
    for values in own:
        config = all_of_them(method=method, model=str(model_folder(ends=ENDS, layers=1)), **values)
        planner = MemoryPlanner(config, load_demonstrations(config.data), Device("cpu", "no"))
        assert planner.plan(config).untraced is None
