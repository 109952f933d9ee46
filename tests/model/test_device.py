"""What the passes decide by the kind of device, on a CPU that is taken for a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from selfdistill.model.device import (
    PASS_TOKENS,
    any_length,
    captured,
    cpu_asked,
    deterministic,
    doubled_sum,
    has_gpu,
    has_graphs,
    loss_tokens,
    padded_length,
    pass_tokens,
    rollout_factor,
    running_sum,
    staging,
    tokens_per_check,
)
from selfdistill.model.episode_sampling import TurnSampler
from selfdistill.model.forward import ForwardPass
from selfdistill.model.loading import LoadedModel
from selfdistill.model.precision import resolved_precision
from selfdistill.model.sampling import Sampling, sample


@pytest.mark.parametrize(
    ("kind", "rows", "at_once", "factor"),
    [("cuda", 8, 8, 1), ("cpu", 8, 8, 2), ("mps", 8, 8, 2), ("cuda", 33, 16, 1 / 3), ("cpu", 64, 16, 1 / 4)],
)
def test_a_gpu_samples_more_rows_at_once_in_the_same_time(kind: str, rows: int, at_once: int, factor: float) -> None:
    assert rollout_factor(kind, rows, 16, at_once) == factor


@pytest.mark.parametrize(("kind", "tokens"), [("cuda", 16), ("cpu", 1), ("mps", 1)])
def test_only_a_gpu_replays_passes_and_looks_for_ends_less_often(kind: str, tokens: int) -> None:
    assert tokens_per_check(kind) == tokens
    assert has_graphs(kind) == (kind == "cuda")


@pytest.mark.parametrize(
    ("version", "safe"), [("2.6.0", False), ("2.12.1+cu130", False), ("2.13.0+cu130", True), ("2.14.1", True)]
)
def test_nothing_is_captured_where_a_failed_capture_leaves_damage(
    monkeypatch: pytest.MonkeyPatch, version: str, safe: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert has_graphs("cuda") is safe


@pytest.mark.parametrize("fails", [False, True])
def test_what_follows_a_capture_waits_for_it_even_if_it_fails(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    order: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            order.append(f"{self.name} waits for {other.name}")

    def run() -> torch.Tensor:
        order.append("run")
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1)

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")  # whoever asks for a capture gets one
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: main)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        captured(run, torch.device("cuda", 90 + fails))  # streams are kept by device
    assert order == ["side waits for main", *["run"] * (1 if fails else 2), "main waits for side"]


def test_without_graphs_nothing_is_captured() -> None:
    def run() -> torch.Tensor:
        raise AssertionError("ran")

    assert captured(run, torch.device("cpu")) is run


@pytest.mark.usefixtures("cudnn_attention")
@pytest.mark.parametrize(("kind", "inside"), [("cuda", False), ("cpu", True)])
def test_cudnn_plans_no_attention_where_lengths_change(kind: str, inside: bool) -> None:
    with any_length(kind):
        assert torch.backends.cuda.cudnn_sdp_enabled() is inside
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.usefixtures("cudnn_attention")
def test_cudnn_attention_is_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="no memory"), any_length("cuda"):
        raise RuntimeError("no memory")
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.usefixtures("cudnn_attention")
def test_samples_use_no_attention_of_cudnn(load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfdistill.model.sampling.any_length", lambda _: any_length("cuda"))
    monkeypatch.setattr("selfdistill.model.episode_sampling.any_length", lambda _: any_length("cuda"))
    loaded, asked = load(), [[1, 2, 3], [4, 5]]
    turns = TurnSampler(loaded, 2)
    with seen_cudnn(loaded) as seen:
        sample(loaded, asked, Sampling(4, temperature=0))
        turns([0, 1], asked, Sampling(4, temperature=0))
    assert len(seen) >= 4
    assert not any(seen)


@pytest.mark.usefixtures("cudnn_attention")
@torch.no_grad()
def test_only_passes_of_rounded_length_use_attention_of_cudnn(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PASS_TOKENS, "cuda", 64)
    loaded = load()
    scores = ForwardPass(loaded, kind="cuda")
    alike, apart, completions = [[*range(100), 7], [*range(100), 8, 9]], [[1, 2], [3]], [[1, 2, 3], [4, 5]]
    with seen_cudnn(loaded) as seen:
        scores(loaded.model, apart, completions)
        assert seen == [True]
        scores(loaded.model, alike, completions)
        assert seen[1:] == [False, False]
        scores(loaded.model, alike, completions, scores.keep(alike, 2**20))
        assert len(seen) > 5
        assert not any(seen[1:])


@contextmanager
def seen_cudnn(loaded: LoadedModel) -> Iterator[list[bool]]:
    """Whether each pass of a model may use cuDNN's attention."""
    seen: list[bool] = []
    embeddings = loaded.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    yield seen
    hook.remove()


@pytest.mark.parametrize(
    ("kind", "kept", "passes"), [("cpu", False, 2), ("cuda", False, 1), ("cpu", True, 4), ("cuda", True, 3)]
)
@torch.no_grad()
def test_a_further_pass_must_save_more_on_a_gpu(
    load: Callable[..., LoadedModel], kind: str, kept: bool, passes: int
) -> None:
    """Two rows share 200 tokens: more than a pass costs on a CPU, less than on a GPU. The result is the same.

    For kept contexts, one pass reads a token to learn its size, and one reads what follows the shared tokens.
    """
    loaded = load()
    contexts = [list(range(200)) + [7] * n for n in (3, 5)]
    shapes: list[tuple[int, ...]] = []

    def note(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        shapes.append(tuple(inputs[0].shape))

    completions = [[1, 2, 3], [4, 5]]
    scores = ForwardPass(loaded, kind=kind)
    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(note)
    found = scores(loaded.model, contexts, completions, scores.keep(contexts, 2**20) if kept else None)
    hook.remove()
    assert len(shapes) == passes
    plain = loaded.model.model(input_ids=torch.tensor([contexts[0] + completions[0]])).last_hidden_state[0, 202:205]
    torch.testing.assert_close(found.hidden_ND[:3], plain, atol=1e-5, rtol=0)


def test_an_unknown_kind_of_device_counts_as_a_cpu() -> None:
    assert pass_tokens("mps") == pass_tokens("cpu")


@pytest.mark.parametrize(
    ("length", "most", "kind", "padded"),
    [
        (1, None, "cuda", 64),
        (64, None, "cuda", 64),
        (65, 1024, "cuda", 128),
        (65, 100, "cuda", 100),
        (101, 100, "cuda", 101),
        (65, None, "cpu", 65),
        (65, None, "mps", 65),
    ],
)
def test_passes_have_few_lengths_on_a_gpu(length: int, most: int | None, kind: str, padded: int) -> None:
    assert padded_length(length, most, kind) == padded


@pytest.mark.parametrize(
    ("vocabulary", "kind", "tokens"),
    [
        (152_064, "cuda", 882),
        (49_152, "cuda", 2730),
        (2**23, "cuda", 53),
        (152_064, "cpu", 53),
        (4096, "cpu", 640),
        (4096, "mps", 640),
    ],
)
def test_the_loss_has_large_chunks_on_a_gpu(vocabulary: int, kind: str, tokens: int) -> None:
    assert loss_tokens(vocabulary, kind) == tokens


@pytest.mark.parametrize("fused", [True, False], ids=["through the head", "from logits"])
def test_a_pass_says_how_large_chunks_of_its_loss_are(load: Callable[..., LoadedModel], fused: bool) -> None:
    loaded = load()
    loaded.separate_head = fused
    vocabulary = loaded.model.config.vocab_size
    for kind in ("cpu", "cuda"):
        scores = ForwardPass(loaded, kind=kind)(loaded.model, [[1, 2]], [[3, 4]])
        assert scores.chunk_tokens == loss_tokens(vocabulary, kind)


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(("kind", "asked"), [("cuda", 1), ("cpu", 0)])
def test_memory_beside_a_gpu_is_pinned_where_the_machine_allows_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, asked: int, allowed: bool
) -> None:
    pinned: list[torch.Tensor] = []

    def pin(room: torch.Tensor) -> torch.Tensor:
        pinned.append(room.clone())
        if not allowed:
            raise RuntimeError("CUDA error: out of memory")
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    room = staging(24, torch.device("cpu"), kind)
    assert (room.shape, room.dtype, len(pinned)) == ((24,), torch.uint8, asked)
    assert any(room is one for one in pinned) == (asked == 1 and allowed)


@pytest.mark.parametrize("kept", [False, True], ids=["whole", "after kept contexts"])
@torch.no_grad()
def test_a_padded_pass_gives_the_same_and_stays_within_the_window(load: Callable[..., LoadedModel], kept: bool) -> None:
    """The window has 80 tokens: no multiple of 64."""
    loaded = load(room=80)
    contexts, completions = [list(range(60)), [9] * 12], [[1] * 15, [4, 5]]  # near enough in length for one pass
    widths: list[int] = []

    def note(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        widths.append(inputs[0].shape[1])

    found = []
    for kind in ("cpu", "cuda"):
        scores = ForwardPass(loaded, kind=kind)
        cache = scores.keep(contexts, 2**20) if kept else None
        scores(loaded.model, contexts, completions, cache)  # reads the contexts
        hook = loaded.model.get_input_embeddings().register_forward_pre_hook(note)
        found.append(scores(loaded.model, contexts, completions, cache).hidden_ND)
        hook.remove()
    assert widths == ([16, 21] if kept else [75, 80])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("asked", "used"), [(None, True), ("false", True), ("true", False), ("1", False)])
def test_a_gpu_is_left_alone_where_the_cpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, used: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if asked is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    assert cpu_asked() is not used
    assert has_gpu() is used
    assert resolved_precision("auto") == ("bf16" if used else "no")


def flags() -> tuple[object, ...]:
    """What decides whether operations repeat."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize(
    ("variable", "inside"), [(None, ":4096:8"), (":0:0", ":4096:8"), (":16:8", ":16:8"), (":4096:8", ":4096:8")]
)
def test_operations_of_a_gpu_repeat_while_asked_to(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, inside: str
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", variable)
    before = flags()
    with deterministic("cuda"):
        assert flags() == (True, False, False, False, False, True, True, inside)
    assert flags() == before
    with pytest.raises(RuntimeError, match="no kernel"), deterministic("cuda"):
        raise RuntimeError("no kernel")
    assert flags() == before


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_elsewhere_nothing_changes(kind: str) -> None:
    before = flags()
    with deterministic(kind):
        assert flags() == before


@pytest.mark.parametrize("places", [1, 2, 7, 64, 1000])
def test_sums_that_repeat_are_running_sums(places: int) -> None:
    values_BV = torch.rand(3, places, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(doubled_sum(values_BV), values_BV.cumsum(-1), rtol=1e-14, atol=0)
    assert torch.equal(running_sum(values_BV), values_BV.cumsum(-1))
