"""Decoding as on a GPU, on a CPU: ends looked for every few tokens, passes of fixed shapes, and what captures them."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from odd_models import NAMES, ODD_LAYERS, SIZE, odd_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from waits import Waits

from selfdistill.data import NEXT_TURN
from selfdistill.model import LiveTensors, add_lora, sample_at_its_longest
from selfdistill.model.decoding_steps import BLOCK_TOKENS, LEAST_TOKENS, FixedSteps, GrowingSteps, steps_for
from selfdistill.model.dropout import disable_dropout
from selfdistill.model.loading import LoadedModel
from selfdistill.model.preallocated import FixedLayer
from selfdistill.model.sampling import Rollout, Sampling, choose, read, sample

Loader = Callable[..., LoadedModel]
MANY_ENDS = (257, *range(40, 75))  # so that samples end at unlike lengths
SEEDS = [1, 2, 3, 4, 5, 6]


def prompts(*lengths: int) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


BATCH = prompts(5, 1, 40, 17, 2, 17)
TINY: dict[str, Any] = SIZE | {"initializer_range": 0.3}
FIXED = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "qwen2, biases": lambda: Qwen2ForCausalLM(Qwen2Config(**TINY)),
    "gemma2, windows, eager": lambda: Gemma2ForCausalLM(
        Gemma2Config(**TINY, head_dim=8, sliding_window=6, attn_implementation="eager")
    ),
    "gpt2, learnt positions": lambda: odd_model("gpt2, learnt positions")[0],
    "bloom, bias by position": lambda: odd_model("bloom, bias by position")[0],
    "deepseek, latent": ODD_LAYERS["deepseek 3"][0],
    "llama 4, chunks": ODD_LAYERS["llama 4"][0],
    "qwen3, experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**TINY, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}
"""Models of many families whose passes can have fixed shapes."""


def of_kind(load: Loader, make: Callable[[], Any]) -> LoadedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    disable_dropout(model)
    return replace(load(), model=model, end_token_ids=MANY_ENDS, window=None, continues_cache=None)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Decodes from now on as if the CPU were a GPU, without capture."""

    def decide(every: int = 16, *, fixed: bool = True, block: int = BLOCK_TOKENS) -> None:
        monkeypatch.setattr("selfdistill.model.sampling.tokens_per_check", lambda _kind: every)
        monkeypatch.setattr("selfdistill.model.decoding_steps.BLOCK_TOKENS", block)
        monkeypatch.setattr("selfdistill.model.decoding_steps.has_graphs", lambda _kind: fixed)

    return decide


def assert_alike(found: list[Rollout], wanted: list[Rollout]) -> None:
    assert [(r.ids, r.truncated) for r in found] == [(r.ids, r.truncated) for r in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-4)


def pass_shapes(loaded: LoadedModel, work: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of the token ids of all passes."""
    shapes: list[tuple[int, ...]] = []
    hook = loaded.model.register_forward_pre_hook(
        lambda _m, _a, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    work()
    hook.remove()
    return shapes


# --- how often ends are looked for ---


@pytest.mark.parametrize(
    "name", ["llama, one key/value head", "mpt, bias by place", "mamba, recurrent", "lfm2, hybrid"]
)
@pytest.mark.parametrize("every", [4, 16])
def test_a_sample_is_the_same_however_often_ends_are_looked_for(
    load: Loader, on_a_gpu: Callable[..., None], name: str, every: int
) -> None:
    loaded = of_kind(load, lambda: odd_model(name)[0])
    for sampling in (Sampling(21), Sampling(21, temperature=0.0)):  # the limit is within a block
        on_a_gpu(1, fixed=False)
        wanted = sample(loaded, BATCH, sampling, SEEDS)
        on_a_gpu(every, fixed=False)
        assert_alike(sample(loaded, BATCH, sampling, SEEDS), wanted)


@pytest.mark.parametrize("fixed", [False, True])
def test_samples_that_all_end_within_a_block_compute_no_further_block(
    load: Loader, on_a_gpu: Callable[..., None], fixed: bool
) -> None:
    loaded = replace(load(), end_token_ids=tuple(range(300)), captures=True)  # each sample ends at once
    on_a_gpu(4, fixed=fixed)
    rollouts: list[Rollout] = []
    shapes = pass_shapes(loaded, lambda: rollouts.extend(sample(loaded, BATCH, Sampling(50), SEEDS)))
    assert len(shapes) == 1 + 3  # the prompts and three tokens
    assert [(len(r.ids), len(r.logps), r.truncated) for r in rollouts] == [(1, 1, False)] * len(BATCH)


@pytest.mark.parametrize("every", [1, 4, 16])
@pytest.mark.parametrize("fixed", [False, True])
def test_plain_text_ends_where_the_next_turn_begins_however_often_that_is_looked_for(
    load: Loader, on_a_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, every: int, fixed: bool
) -> None:
    loaded = load(template=None)
    texts = [f"Yes.{NEXT_TURN} more", f"Yes,\n\nand no.{NEXT_TURN} more", "One\nUser: two\n User: three"]
    scripts = [loaded.tokenizer(text)["input_ids"] + [0] * 99 for text in texts]
    on_a_gpu(every, fixed=fixed)
    at = 0

    def scripted(logits_BV: Tensor, _sampling: Sampling, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal at
        rows = [numbers.index(float(uniform)) for uniform in uniform_B for numbers in (uniforms[at],)]
        at += 1
        return torch.tensor([scripts[row][at - 1] for row in rows]), torch.zeros(len(rows))

    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    drawn = torch.stack([torch.rand(30, generator=g, dtype=torch.float64) for g in generators])
    uniforms = [drawn[:, t].tolist() for t in range(30)]  # tell which sample is in a row
    monkeypatch.setattr("selfdistill.model.sampling.choose", scripted)
    rollouts = sample(loaded, prompts(3, 4, 5), Sampling(30), [1, 2, 3])
    said = [loaded.tokenizer.decode(rollout.ids) for rollout in rollouts]
    assert said[:2] == [f"Yes.{NEXT_TURN}", f"Yes,\n\nand no.{NEXT_TURN}"]
    assert [rollout.truncated for rollout in rollouts] == [False, False, True]
    assert rollouts[2].ids == scripts[2][:30]


@pytest.mark.parametrize("lengths", [(9, 9), (9, 4)])
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_between_looks_nothing_waits_for_the_device(
    load: Loader, on_a_gpu: Callable[..., None], fixed: bool, windows: bool, lengths: tuple[int, int]
) -> None:
    config = Qwen2Config(**TINY, use_sliding_window=windows, sliding_window=6, max_window_layers=1)
    loaded = replace(of_kind(load, lambda: Qwen2ForCausalLM(config)), end_token_ids=(-1,), captures=True)
    batch = prompts(*lengths)
    on_a_gpu(16, fixed=fixed)

    def waits(tokens: int) -> int:
        with Waits() as seen:
            sample(loaded, batch, Sampling(tokens), [1, 2])
        return seen.count

    assert waits(15) == waits(10)


@pytest.mark.parametrize(("lengths", "masked"), [((9, 9), False), ((9, 4), True)])
def test_only_padded_rows_have_a_mask(
    load: Loader, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int], masked: bool
) -> None:
    attend, masks = torch.nn.functional.scaled_dot_product_attention, []

    def seen(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **others: Any) -> Tensor:
        if query.shape[2] <= 2:  # one token, or its two heads per group
            masks.append(attn_mask)
        return attend(query, key, value, attn_mask=attn_mask, **others)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", seen)
    loaded = of_kind(load, lambda: Qwen2ForCausalLM(Qwen2Config(**TINY)))
    sample(loaded, prompts(*lengths), Sampling(6), [1, 2])
    assert masks
    assert {mask is not None for mask in masks} == {masked}


# --- passes of fixed shapes ---


@pytest.mark.parametrize("name", FIXED)
def test_passes_of_fixed_shapes_give_the_same_samples(load: Loader, on_a_gpu: Callable[..., None], name: str) -> None:
    loaded = of_kind(load, FIXED[name])
    for sampling in (Sampling(21), Sampling(21, temperature=0.0)):
        on_a_gpu(1, fixed=False)
        wanted = sample(loaded, BATCH, sampling, SEEDS)
        on_a_gpu(4)
        assert isinstance(steps_for(loaded, read(loaded, BATCH), 20, "cuda"), FixedSteps)
        assert_alike(sample(loaded, BATCH, sampling, SEEDS), wanted)
        on_a_gpu(16)
        assert_alike(sample(loaded, BATCH, sampling, SEEDS), wanted)
        on_a_gpu(3, block=7)  # full after 7 and 14 tokens
        assert_alike(sample(loaded, BATCH, sampling, SEEDS), wanted)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("llama", "gpt2", "bloom"))])
def test_models_that_do_not_declare_it_have_passes_that_grow(load: Loader, name: str) -> None:
    loaded = of_kind(load, lambda: odd_model(name)[0])
    assert isinstance(steps_for(loaded, read(loaded, BATCH), 20, "cuda"), GrowingSteps)


def test_few_tokens_are_not_worth_a_capture(load: Loader) -> None:
    loaded = load()
    for tokens, kind in ((7, GrowingSteps), (8, FixedSteps)):
        assert type(steps_for(loaded, read(loaded, BATCH), tokens, "cuda")) is kind


def test_a_cpu_has_passes_that_grow(load: Loader) -> None:
    loaded = load()
    assert isinstance(steps_for(loaded, read(loaded, BATCH), 20, "cpu"), GrowingSteps)


def test_only_attention_of_pytorch_has_passes_of_fixed_shapes(load: Loader) -> None:
    loaded = load()
    rows = read(loaded, BATCH)
    loaded.model.config._attn_implementation = "flash_attention_2"
    assert isinstance(steps_for(loaded, rows, 20, "cuda"), GrowingSteps)


ROTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
        "factor": 2.0,
    },
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_positions_that_change_with_the_length_have_passes_that_grow(load: Loader, name: str) -> None:
    rope = {"rope_type": name, "rope_theta": 1e4, **ROTATIONS[name]}
    loaded = of_kind(load, lambda: LlamaForCausalLM(LlamaConfig(**TINY, rope_parameters=rope)))
    grows = name in ("dynamic", "longrope")
    assert type(steps_for(loaded, read(loaded, BATCH), 20, "cuda")) is (GrowingSteps if grows else FixedSteps)


def test_one_layer_type_whose_positions_change_with_the_length_is_enough(load: Loader) -> None:
    for full, kind in (("default", FixedSteps), ("dynamic", GrowingSteps)):
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": full, "rope_theta": 1e4, "factor": 2.0},
        }
        config = Gemma3TextConfig(**TINY, head_dim=8, sliding_window=6, layer_types=list(rope), rope_parameters=rope)
        loaded = of_kind(load, lambda config=config: Gemma3ForCausalLM(config))
        assert type(steps_for(loaded, read(loaded, BATCH), 20, "cuda")) is kind


@pytest.mark.parametrize("name", ["llama", "gemma2, windows, eager"])
def test_no_pass_reads_more_than_a_block_of_empty_memory(
    load: Loader, on_a_gpu: Callable[..., None], name: str
) -> None:
    loaded = of_kind(load, FIXED[name])
    empty: list[int] = []

    def note(_module: Any, _inputs: Any, inputs: dict[str, Any]) -> None:
        for layer in inputs["past_key_values"].layers:
            if isinstance(layer, FixedLayer):
                length, first = layer.get_mask_sizes()
                empty.append(first + length - int(layer.get_seq_length()))
                assert inputs["attention_mask"].shape[1] == first + length

    on_a_gpu(2, block=16)
    hook = loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    for loaded_as in (loaded, replace(loaded, end_token_ids=(-1,))):
        sample(loaded_as, BATCH, Sampling(70), SEEDS)
    hook.remove()
    assert max(empty) == 16
    assert min(empty) == 1  # nothing is added before it is full


def addresses(loaded: LoadedModel, steps: FixedSteps, token_B: Tensor) -> list[tuple[Any, ...]]:
    """Shapes and addresses of all that a pass for a token reads and writes, apart from weights."""
    found: list[tuple[Any, ...]] = []

    def note(_module: Any, _inputs: Any, inputs: dict[str, Any]) -> None:
        tensors = [inputs[name] for name in ("input_ids", "attention_mask", "position_ids")]
        for layer in inputs["past_key_values"].layers:
            assert isinstance(layer, FixedLayer)
            tensors += [layer.keys, layer.values, layer.get_seq_length()]
        found.extend((x.shape, x.dtype, x.data_ptr()) for x in tensors)

    hook = loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    steps(token_B)
    hook.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2, windows, eager"])
@torch.no_grad()
def test_every_pass_has_the_same_shapes_and_addresses(load: Loader, name: str) -> None:
    loaded = of_kind(load, FIXED[name])
    steps = steps_for(loaded, read(loaded, BATCH), 20, "cuda")
    assert isinstance(steps, FixedSteps)
    token_B = torch.arange(len(BATCH))
    first = addresses(loaded, steps, token_B)
    assert all(addresses(loaded, steps, token_B + n) == first for n in range(19))


@torch.no_grad()
def test_shapes_and_addresses_change_once_per_block(load: Loader, on_a_gpu: Callable[..., None]) -> None:
    loaded = replace(load(), captures=True)
    on_a_gpu(block=5)
    steps = steps_for(loaded, read(loaded, BATCH), 20, "cuda")
    assert isinstance(steps, FixedSteps)
    seen = [addresses(loaded, steps, torch.arange(len(BATCH))) for _ in range(20)]
    assert [n for n in range(1, 20) if seen[n] != seen[n - 1]] == [5, 10, 15]


def test_rows_leave_once_half_have_ended(load: Loader, on_a_gpu: Callable[..., None]) -> None:
    loaded = replace(load(), end_token_ids=MANY_ENDS, captures=True)
    on_a_gpu(1, fixed=False)
    wanted = sample(loaded, BATCH * 2, Sampling(40), range(12))
    lengths = sorted(len(r.ids) for r in wanted)
    on_a_gpu(2)
    shapes = pass_shapes(loaded, lambda: assert_alike(sample(loaded, BATCH * 2, Sampling(40), range(12)), wanted))
    rows = [count for count, width in shapes if width == 1]
    half = rows.index(6)
    assert rows[:half] == [12] * half
    assert lengths[5] <= half < lengths[5] + 2  # the sixth sample ended, and ends are looked for every two tokens
    assert set(rows) <= {12, 6, 3, 2, 1}


@pytest.mark.parametrize("active", [True, False], ids=["adapter on", "adapter off"])
def test_an_adapter_takes_part_in_passes_of_fixed_shapes(
    load: Loader, on_a_gpu: Callable[..., None], active: bool
) -> None:
    loaded = replace(load(), end_token_ids=MANY_ENDS)
    plain = sample(loaded, BATCH, Sampling(12), SEEDS)
    add_lora(loaded, 4, None, 0)
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    if not active:
        loaded.model.base_model.disable_adapter_layers()
    on_a_gpu(1, fixed=False)
    wanted = sample(loaded, BATCH, Sampling(12), SEEDS)
    assert ([r.ids for r in wanted] == [r.ids for r in plain]) is not active
    on_a_gpu()
    assert isinstance(steps_for(loaded, read(loaded, BATCH), 20, "cuda"), FixedSteps)
    assert_alike(sample(loaded, BATCH, Sampling(12), SEEDS), wanted)


def test_passes_of_fixed_shapes_keep_states_in_the_numbers_of_autocast(
    load: Loader, on_a_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = replace(load(), end_token_ids=(-1,))
    with torch.autocast("cpu", torch.bfloat16):
        on_a_gpu(1, fixed=False)
        wanted = sample(loaded, BATCH, Sampling(12), SEEDS)
        on_a_gpu()
        found = sample(loaded, BATCH, Sampling(12), SEEDS)
        steps = steps_for(loaded, read(loaded, BATCH), 20, "cuda")
    assert {layer.keys.dtype for layer in steps.cache.layers} == {torch.bfloat16}
    for a, b in zip(found, wanted, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if x != y), len(a.ids))
        assert same > 0  # from the prompts alone
        assert a.logps[:same] == pytest.approx(b.logps[:same], abs=0.1)


# --- capture ---


def graph(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What a captured pass does: everything again, and the result at the same address."""
    run()
    result = run().clone()

    def replay() -> Tensor:
        result.copy_(run())
        return result

    return replay


def repeated(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Passes that find that a repeated one gives the same bits."""

    def twice() -> Tensor:
        first_BV = run().clone()
        second_BV = run()
        assert torch.equal(first_BV, second_BV)
        return second_BV

    return twice


class Forbidden(Waits):
    """Counts what no capture allows: waits, and numbers of the CPU that are copied to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "lift_fresh"
        return super().__torch_dispatch__(func, types, args, kwargs)


MAKERS = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.scalar_tensor,
    torch.zeros,
}


class MadeOnTheCPU(TorchFunctionMode):
    """Counts tensors that are made without saying where, which on a GPU would have to be copied to it."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += func in MAKERS and kwargs.get("device") is None
        return func(*args, **kwargs)


def frozen(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A capture of nothing: every replay leaves the first result."""
    result = run().clone()
    return lambda: result


def refused(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    run()
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch, on_a_gpu: Callable[..., None]) -> Callable[..., list[int]]:
    """Uses this for captures; returns a list that gets the number of rows of each."""

    def use(capture: Callable[..., Callable[[], Tensor]]) -> list[int]:
        captures: list[int] = []

        def counted(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
            captures.append(len(run()))
            return capture(run, device)

        on_a_gpu(2)
        monkeypatch.setattr("selfdistill.model.decoding_steps.captured", counted)
        return captures

    return use


@pytest.mark.parametrize("name", ["llama", "gemma2, windows, eager"])
def test_a_pass_of_fixed_shapes_can_be_repeated(load: Loader, with_graphs: Callable[..., list[int]], name: str) -> None:
    """As before and after its capture."""
    loaded = of_kind(load, FIXED[name])
    wanted = sample(loaded, BATCH, Sampling(20), SEEDS)
    with_graphs(repeated)
    assert_alike(sample(loaded, BATCH, Sampling(20), SEEDS), wanted)


@pytest.mark.parametrize("name", FIXED)
def test_a_pass_of_fixed_shapes_does_nothing_that_a_capture_forbids_as_far_as_a_cpu_shows(
    load: Loader, with_graphs: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    counts: list[int] = []

    def watched(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        with monkeypatch.context() as during:
            during.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
            with Forbidden() as seen, MadeOnTheCPU() as made:
                run()
        counts.append(seen.count + made.count)
        return run

    with_graphs(watched)
    sample(of_kind(load, FIXED[name]), BATCH, Sampling(20), SEEDS)
    assert counts
    assert set(counts) == {0}


def test_passes_are_captured_once_for_each_number_of_rows(load: Loader, with_graphs: Callable[..., list[int]]) -> None:
    loaded = replace(load(), end_token_ids=MANY_ENDS)
    wanted = sample(loaded, BATCH, Sampling(40), SEEDS)
    captures = with_graphs(graph)
    assert_alike(sample(loaded, BATCH, Sampling(40), SEEDS), wanted)
    assert loaded.captures is True
    assert captures[0] == len(BATCH)
    assert len(captures) > 1
    assert captures == sorted(set(captures), reverse=True)
    loaded, tried = replace(loaded, end_token_ids=(-1,)), len(captures)
    with torch.no_grad():  # weights that change in place are read by the next rollouts
        loaded.model.lm_head.weight.mul_(1.5)
    shapes = pass_shapes(loaded, lambda: sample(loaded, BATCH, Sampling(12), SEEDS))
    assert captures[tried:] == [len(BATCH)]
    assert len(shapes) == 1 + 3 + 11  # the prompts, the capture and its count of rows, and a pass per token


def test_a_pass_is_captured_once_for_each_block(
    load: Loader, with_graphs: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = replace(load(), end_token_ids=(-1,))
    for limit, blocks in ((41, 3), (40, 2)):  # blocks of 16, 16 and 8 tokens, or of 16, 16 and 7
        wanted = sample(replace(loaded, captures=False), BATCH, Sampling(limit), SEEDS)
        captures = with_graphs(graph)
        monkeypatch.setattr("selfdistill.model.decoding_steps.BLOCK_TOKENS", 16)
        assert_alike(sample(loaded, BATCH, Sampling(limit), SEEDS), wanted)
        assert captures == [len(BATCH)] * blocks


@pytest.mark.parametrize(("after", "captured"), [(8, [6, 3]), (10, [6])])
def test_rows_stay_if_few_tokens_are_left(
    load: Loader,
    with_graphs: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    captured: list[int],
) -> None:
    """Half of the rows end after so many of 17 tokens."""
    loaded = replace(load(), end_token_ids=(299,))
    captures = with_graphs(graph)
    calls = 0

    def ends(*arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        token_B, logp_B = choose(*arguments)
        token_B = token_B.clamp(max=298)
        if calls == after:
            token_B[:3] = 299
        return token_B, logp_B

    monkeypatch.setattr("selfdistill.model.sampling.choose", ends)
    found = sample(loaded, BATCH, Sampling(17), SEEDS)
    assert [len(rollout.ids) for rollout in found] == [after] * 3 + [17] * 3
    assert captures == captured


@pytest.mark.parametrize("refuses", [False, True])
def test_the_cache_is_freed_with_its_passes(load: Loader, with_graphs: Callable[..., list[int]], refuses: bool) -> None:
    """Not only once Python looks for objects that refer to each other."""
    loaded, layers = load(), []
    with_graphs(refused if refuses else graph)
    gc.disable()
    try:
        with torch.no_grad():
            steps = steps_for(loaded, read(loaded, BATCH), 20, "cuda")
            steps(torch.arange(len(BATCH)))
            layers = [weakref.ref(layer) for layer in steps.cache.layers]
            del steps
        assert [layer() for layer in layers] == [None] * len(layers)
    finally:
        gc.enable()
    assert loaded.captures is (False if refuses else None)


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (refused, "CUDA error: operation not permitted when stream is capturing"),
        (frozen, "it computed other logits"),
    ],
)
def test_what_cannot_be_captured_runs_without_and_is_noted_once(
    load: Loader,
    with_graphs: Callable[..., list[int]],
    capsys: pytest.CaptureFixture[str],
    capture: Callable[..., Any],
    reason: str,
) -> None:
    loaded = replace(load(), end_token_ids=MANY_ENDS)
    wanted = sample(loaded, BATCH, Sampling(20), SEEDS)
    captures = with_graphs(capture)
    capsys.readouterr()
    for _ in range(2):
        assert_alike(sample(loaded, BATCH, Sampling(20), SEEDS), wanted)
    note = f"note: model {loaded.name!r}: sampling without a CUDA graph, which takes longer: {reason}\n"
    assert capsys.readouterr().err == note
    assert loaded.captures is False
    assert captures == [len(BATCH)]
    assert isinstance(steps_for(loaded, read(loaded, BATCH), 20, "cuda"), GrowingSteps)


# --- memory ---


@pytest.mark.parametrize(("kind", "ending", "left"), [("cpu", 1, 1), ("cuda", 3, 1 + LEAST_TOKENS)])
@pytest.mark.parametrize("name", ["llama", "gemma2, windows"])
def test_the_memory_of_sampling_is_as_planned(
    load: Loader,
    on_a_gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    ending: int,
    left: int,
    name: str,
) -> None:
    """As many samples as must end for the others to be copied end as late as that may be."""
    wide = TINY | {"head_dim": 64}
    models: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**wide)),
        "gemma2, windows": lambda: Gemma2ForCausalLM(Gemma2Config(**wide, sliding_window=30)),
    }
    loaded, sampling = of_kind(load, models[name]), Sampling(200)
    loaded = replace(loaded, end_token_ids=(299,), captures=True)
    on_a_gpu(1, fixed=kind == "cuda", block=80)

    def peak(work: Callable[[], Any]) -> int:
        live = LiveTensors(loaded.model)
        with live, torch.no_grad():
            work()
        return max(counts.total() for counts in live.peaks.values())

    planned = peak(lambda: sample_at_its_longest(loaded, BATCH, sampling, lambda _part: None, kind))
    chosen: list[Tensor] = []

    def ends_late(*arguments: Any) -> tuple[Tensor, Tensor]:
        token_B, logp_B = choose(*arguments)
        token_B = token_B.clamp(max=298)
        chosen.append(token_B)
        if len(chosen) == sampling.max_completion_length - left:
            token_B[:ending] = 299
        return token_B, logp_B

    monkeypatch.setattr("selfdistill.model.sampling.choose", ends_late)
    measured = peak(lambda: sample(loaded, BATCH, sampling, SEEDS))
    assert len(chosen[-1]) == len(BATCH) - ending
    assert planned == pytest.approx(measured, rel=0.03)
