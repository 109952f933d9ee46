"""Differences between kinds of device: all choices about the model's passes that depend on the device.

A kind is PyTorch's device type, such as ``cuda`` or ``cpu``. The numbers for GPUs are estimates; ``make gpu`` measures
them.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfdistill.loss import chunk_tokens
from selfdistill.model.unchanged_process import environment_variable


def cpu_asked() -> bool:
    """Whether accelerate must use the CPU even if there is a GPU (``ACCELERATE_USE_CPU``)."""
    from accelerate.utils import parse_flag_from_env  # takes a second to import

    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def has_gpu() -> bool:
    """Whether there is a CUDA device to use."""
    return torch.cuda.is_available() and not cpu_asked()


def best_device() -> torch.device:
    """The device that accelerate chooses: a GPU if there is one."""
    from accelerate import PartialState

    device: torch.device = PartialState(cpu=cpu_asked()).device
    return device


PASS_TOKENS = {"cpu": 64, "cuda": 512}
"""Tokens that take about as long as one extra forward pass: a shared prefix must save more than this. Other kinds count
as CPUs."""


def pass_tokens(kind: str) -> int:
    """Tokens that a shared prefix must save on a device of this kind."""
    return PASS_TOKENS.get(kind, PASS_TOKENS["cpu"])


LENGTH_STEP = {"cuda": 64}
"""The length of a pass is padded to a multiple of this, so that kernels are chosen and planned for few lengths."""


def padded_length(length: int, most: int | None, kind: str) -> int:
    """The length to which a pass is padded on a device of this kind; it is never padded beyond ``most``."""
    step = LENGTH_STEP.get(kind, 1)
    rounded = -(-length // step) * step
    return rounded if most is None else max(length, min(rounded, most))


PLAIN_ATTENTION_TOKENS = {"cpu": 128}
"""Up to this length, plain attention trains faster than fused attention in bfloat16 arithmetic: its backward pass is
faster. With 44 tokens the whole model's backward pass takes 0.7 of the time; with 350 tokens there is no gain."""


def trains_on_plain_attention(length: int, kind: str) -> bool:
    """Whether a pass of this length learns faster with plain attention, in bfloat16 on a device of this kind."""
    return length <= PLAIN_ATTENTION_TOKENS.get(kind, 0)


LOSS_LOGITS = {"cuda": 2**27}
"""Logits per chunk of the loss: 512 MiB in float32. Other kinds have the loss's own default.

Each chunk reads the head's weights and reads and writes their gradient. On an H100 the sum into the gradient takes as
long as that with 4 bytes * 495 TFLOP/s / 3.35 TB/s = 590 tokens, by the data sheet. This is 882 tokens for the
vocabulary of Qwen2.5.
"""


def loss_tokens(vocabulary: int, kind: str) -> int:
    """Tokens per chunk of the loss on a device of this kind, for a vocabulary of this size."""
    return chunk_tokens(vocabulary, LOSS_LOGITS.get(kind))


@contextmanager
def any_length(kind: str) -> Iterator[None]:
    """Avoid attention kernels with a start-up cost for each length, for passes whose length keeps changing.

    cuDNN plans its kernels again for each batch size and length, in about 25 ms. Decoding has a new length at every
    token, and what follows a cached context attends to a context of any length. CPUs have no cuDNN.
    """
    if kind != "cuda":
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


TOKENS_PER_CHECK = {"cuda": 16}
"""After how many tokens decoding looks for samples that have ended. Each look waits for the device; without one, the
launch of the next tokens runs ahead. A sample that ends in between computes tokens that are thrown away."""


def tokens_per_check(kind: str) -> int:
    """After how many tokens decoding looks for ended samples on a device of this kind."""
    return TOKENS_PER_CHECK.get(kind, 1)


def rollout_factor(kind: str, rows: int, wanted: int, at_once: int) -> float:
    """The time to sample from ``wanted`` prompts at once, divided by the time for ``rows``, ``at_once`` at a time.

    A GPU is taken to need as long for any number at once: decoding mostly starts operations and reads weights. This is
    an estimate.
    """
    return 1 / ceil(rows / at_once) if kind == "cuda" else wanted / rows


GRAPHS_SINCE = (2, 13)
"""The first PyTorch that is trusted with captures in a run, because a failed one leaves its allocators usable.

Before, both allocators, of the GPU's memory and of pinned memory, took a failed capture to be under way for the rest of
the process: ``empty_cache`` failed, and nothing was freed before an out-of-memory error
(https://github.com/pytorch/pytorch/pull/180395, of April 2026, after 2.12). This cannot be repaired from outside.
PyTorch has a private function that ends a capture for the first allocator, and none for the second, which keeps a
reference to the deleted graph. This was read in PyTorch's source, not tried.

From 2.13 on, the memory of a failed capture (what one pass needs) stays reserved until the process ends
(https://github.com/pytorch/pytorch/pull/190348, of July 2026). Each model has at most one.
"""


def has_graphs(kind: str) -> bool:
    """Whether runs on a device of this kind replay captured work with a single launch: a failed capture is harmless."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return kind == "cuda" and release >= GRAPHS_SINCE


def captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """``run`` as one launch of a CUDA graph on a GPU, with any PyTorch; elsewhere ``run`` itself.

    A replay does again what ``run`` does now, at the same addresses: shapes, Python numbers and branches are fixed, and
    its result is overwritten by the next. Meanwhile other threads may launch work on the device and wait for their own
    streams. But one that waits for the whole device (``torch.cuda.synchronize()``) fails, and so does the capture.

    Follows https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

    Args:
        run: computes the same whenever it is called. It is called twice: first so that libraries allocate what they
            keep, then to be captured.
        device: where.

    Raises:
        RuntimeError: it cannot be captured, for instance because it waits for the device or needs more memory than
            there is. All work that it began precedes what follows.
    """
    if device.type != "cuda":
        return run
    stream, graph = side_streams(device).capture, torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):  # is left even if the capture fails at its end
            run()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = run()
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class SideStreams(NamedTuple):
    """Streams of a GPU for work beside that of its main one."""

    capture: torch.cuda.Stream
    average: torch.cuda.Stream


@cache
def side_streams(device: torch.device) -> SideStreams:
    """The same for the whole process, because libraries keep memory for each stream.

    PyTorch has 32 of them and gives them out in turn. So one that was made anew for each update of the average would
    sometimes be the one that captures, and a capture does not allow the waiting of another thread on its stream.
    """
    return SideStreams(torch.cuda.Stream(device), torch.cuda.Stream(device))


def staging(count: int, place: torch.device, kind: str) -> Tensor:
    """``count`` bytes at ``place``, through which a tensor is copied to and from a device of this kind.

    Host memory beside a GPU is pinned, or every copy would first go through pinned memory of the driver. If the machine
    does not allow that, it stays pageable.
    """
    room = torch.empty(count, dtype=torch.uint8, device=place)
    if kind != "cuda" or place.type != "cpu":
        return room
    try:
        return room.pin_memory()
    except RuntimeError:  # no more memory may be locked
        return room


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The environment variable for cuBLAS's workspace."""
REPEATING_WORKSPACES = (":4096:8", ":16:8")
"""Values that make cuBLAS deterministic."""


@contextmanager
def deterministic(kind: str) -> Iterator[None]:
    """Use only deterministic operations on a GPU, where not all are.

    Follows https://docs.pytorch.org/docs/stable/notes/randomness.html. Attention uses the memory-efficient kernel or
    plain products (``SDPBackend.MATH``), not FlashAttention and cuDNN, which may sum gradients in any order. By
    PyTorch's source the memory-efficient kernel takes no grouped queries, so without a mask these use plain products,
    which hold all scores. A nondeterministic operation raises a ``RuntimeError``. CPUs are always deterministic, so
    nothing changes there.
    """
    if kind != "cuda":
        yield
        return
    with ExitStack() as restored:
        if os.environ.get(WORKSPACE) not in REPEATING_WORKSPACES:
            restored.enter_context(environment_variable(WORKSPACE, REPEATING_WORKSPACES[0]))
        restored.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        memory: Any = torch.utils.deterministic
        restored.callback(setattr, memory, "fill_uninitialized_memory", memory.fill_uninitialized_memory)
        restored.callback(torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.flash_sdp_enabled())
        restored.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # nothing reads it
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield


def running_sum(values_BV: Tensor) -> Tensor:
    """Cumulative sums like ``cumsum(-1)``, which on a GPU may add in a different order each time.

    If deterministic operations are required, a parallel prefix sum with a fixed order replaces it.
    """
    if values_BV.device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return values_BV.cumsum(-1)
    return doubled_sum(values_BV)


def doubled_sum(values_BV: Tensor) -> Tensor:
    """:func:`running_sum` in log2(V) steps, each of which doubles the number of summed positions."""
    reach = 1
    while reach < values_BV.shape[-1]:
        values_BV = torch.cat([values_BV[:, :reach], values_BV[:, reach:] + values_BV[:, :-reach]], -1)
        reach *= 2
    return values_BV
