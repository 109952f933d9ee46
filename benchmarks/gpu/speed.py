"""Times on the device, of layers with the shape of a 7B model: products, sampling, loss, shared prefixes, compiling.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from bench import Bench, Check, Found, NotRun
from measure import alternate, now
from models import WHOLE, endless, make_trainer, rows, settings, shape_folder, shape_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from selfdistill.loss.chunked import chunked_loss
from selfdistill.loss.divergence import Divergence
from selfdistill.model import LoadedModel, Sampling, add_lora, sample, sample_seed, sampling
from selfdistill.model.device import PASS_TOKENS, loss_tokens, pass_tokens
from selfdistill.model.head import body_and_head
from selfdistill.model.prefix_cache import shared_prefixes

SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


COUNTED = ("kernels", "operators", "synchronisations")


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call, after one to warm up."""
    return alternate({"": run}, repeats)[""]


def check_limits(bench: Bench, found: Found) -> None:
    """What the device can do at best."""
    size = 4096 if bench.cuda else 128
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("float32", torch.float32, "highest"),
        ("float32 through TF32", torch.float32, "high"),
    ):
        torch.set_float32_matmul_precision(precision)
        left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        found.add(f"products in {name}", 2e-12 * size**3 / seconds(lambda a=left, b=right: a @ b), "TFLOP/s")
    torch.set_float32_matmul_precision("highest")
    source = torch.ones(2**28 if bench.cuda else 2**20, device=bench.device)
    target = torch.empty_like(source)
    found.add("memory", 2e-9 * 4 * source.numel() / seconds(lambda: target.copy_(source)), "GB/s")


@torch.no_grad()
def check_rollout(bench: Bench, found: Found) -> None:
    """16 samples of 256 tokens, first and second, with cuDNN's attention off, as the package has it, and on.

    cuDNN plans its kernels anew for each new length, so the first rollout of new lengths shows what that costs.
    """
    loaded = endless(shape_model(bench, 2, torch.bfloat16))
    tokens = 256 if bench.cuda else 8
    found.add("cuDNN's attention outside of sampling", "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off")
    sampled(loaded, 16, 8, prompt=3)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    for name, chosen, prompt in (("off", sampling.any_length, 40), ("on", lambda _kind: nullcontext(), 41)):
        with patch.object(sampling, "any_length", chosen):
            for which in ("first", "second"):
                found.add(f"cuDNN {name}, {which}", sampled(loaded, 16, tokens, prompt), "s")
    torch.backends.cuda.enable_cudnn_sdp(before)


def sampled(loaded: LoadedModel, count: int, tokens: int, prompt: int) -> float:
    """Seconds of so many samples of so many tokens after prompts of so many."""
    prompts = [[(7 * row + place) % 256 for place in range(prompt)] for row in range(count)]
    seeds = [sample_seed(0, 0, row, 0) for row in range(count)]
    began = now()
    sample(loaded, prompts, Sampling(tokens), seeds)
    return now() - began


def check_decode(bench: Bench, found: Found) -> None:
    """What a new token of 16 samples costs: time, kernels, synchronisations; with an adapter too, scaled to all layers.

    Differences between two lengths leave the prompts out; those between two depths, embedding and head.
    """
    few, more = 2, 4
    per_token: dict[tuple[str, int], dict[str, float]] = {}
    for kind in ("full", "LoRA"):
        for layers in (few, more):
            loaded = endless(shape_model(bench, layers, torch.bfloat16))
            if kind == "LoRA":
                add_lora(loaded, 16, None, 0)
            per_token[kind, layers] = token_costs(bench, loaded)
            del loaded
        for name, unit in (("ms", "ms"), *((name, "") for name in COUNTED)):
            low, high = per_token[kind, few][name], per_token[kind, more][name]
            whole = low + (WHOLE - few) * (high - low) / (more - few)
            found.add(f"{kind}: {name} a token, {WHOLE} layers", whole, unit)
            found.add(f"{kind}: {name} a token, {few} layers", low, unit)
    found.add("LoRA against full, ms a token", per_token["LoRA", more]["ms"] / per_token["full", more]["ms"])


def token_costs(bench: Bench, loaded: LoadedModel) -> dict[str, float]:
    """Costs of one new token of 16 samples."""
    short, long = (16, 48) if bench.cuda else (2, 6)  # of like passes: on a GPU both captured, or neither

    def run(tokens: int) -> float:
        return sampled(loaded, 16, tokens, 40)

    token = token_times({"": run}, short, long)[""].token
    few, more = (profiled(bench, partial(run, tokens)) for tokens in (short, long))
    return {"ms": token} | {name: (more[name] - few[name]) / (long - short) for name in COUNTED}


class TokenTimes(NamedTuple):
    """Milliseconds of a new token, and of all before the first one."""

    token: float
    before: float


def token_times(runs: Mapping[str, Callable[[int], object]], short: int, long: int) -> dict[str, TokenTimes]:
    """Times of runs that take a number of tokens."""
    both = {f"{name} {tokens}": partial(run, tokens) for name, run in runs.items() for tokens in (short, long)}
    times = alternate(both, 3)
    found = {}
    for name in runs:
        few, more = (1e3 * times[f"{name} {tokens}"] for tokens in (short, long))
        token = (more - few) / (long - short)
        found[name] = TokenTimes(token, few - short * token)
    return found


def profiled(bench: Bench, run: Callable[[], Any]) -> Counter[str]:
    """Numbers of operators, kernels and synchronisations."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=activities) as profiler:
        run()
    counts: Counter[str] = Counter()
    for event in profiler.events() or []:
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        counts["kernels"] += on_gpu and not event.name.startswith(("Memcpy", "Memset"))
        counts["operators"] += event.name.startswith("aten::")
        counts["synchronisations"] += event.name in SYNCHRONISATIONS
    return counts


def check_loss(bench: Bench, found: Found) -> None:
    """Forward KL through the head of a 7B model with its gradients, for 4,096 tokens, by tokens a chunk.

    In bfloat16 arithmetic with weights of float32 and of bfloat16, and in float32.
    """
    vocabulary, width, tokens = (152_064, 3584, 4096) if bench.cuda else (1024, 64, 256)
    torch.manual_seed(0)
    with torch.device(bench.device):
        head, teacher_head = (torch.nn.Linear(width, vocabulary, bias=False) for _ in range(2))
        head.weight.data.normal_(std=0.02)
        teacher_head.weight.data.copy_(head.weight.data)
        teacher_head.requires_grad_(False)
        exact_ND = torch.randn(tokens, width)
        taught_ND = exact_ND + 0.3 * torch.randn(tokens, width)
        tokens_N = torch.randint(vocabulary, (tokens,))
        weights_N = torch.full((tokens,), 1 / tokens)
    gradients: dict[str, Tensor] = {}
    default = loss_tokens(vocabulary, bench.device)
    for precision in ("bfloat16", "float32", "bfloat16 weights"):  # the last rounds the heads in place
        dtype = torch.bfloat16 if precision == "bfloat16 weights" else torch.float32
        head.to(dtype)
        teacher_head.to(dtype)
        student_ND, teacher_ND = exact_ND.to(dtype, copy=True).requires_grad_(), taught_ND.to(dtype)
        for size in dict.fromkeys((default, 53, 256, 2048, 4096)) if bench.cuda else (default, 64):
            name = f"{precision}, {size} tokens a chunk" + (", default" if size == default else "")

            def run(
                size: int = size,
                precision: str = precision,
                student_ND: Tensor = student_ND,
                teacher_ND: Tensor = teacher_ND,
            ) -> None:
                head.weight.grad = student_ND.grad = None
                with torch.autocast(bench.device, torch.bfloat16, enabled=precision != "float32"):
                    value, _ = chunked_loss(
                        Divergence(),
                        student_ND,
                        head,
                        (head.weight,),
                        tokens_N,
                        weights_N,
                        (teacher_ND, teacher_head),
                        chunk_size=size,
                    )
                    value.backward()

            found.add(f"{name}: time", seconds(run, 2), "s")
            if bench.cuda:
                head.weight.grad = student_ND.grad = None
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                run()
                found.add(f"{name}: peak", (torch.cuda.max_memory_allocated() - before) / 2**30, "GiB")
            assert student_ND.grad is not None
            gradients[f"{precision} {size}"] = student_ND.grad.float()
    exact = gradients[f"float32 {default}"]
    for name, gradient in gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)
        found.add(f"gradient of {name} a chunk, cosine to float32", cosine.item(), at_least=0.99)


@torch.no_grad()
def check_pass(bench: Bench, found: Found) -> None:
    """How many tokens a further forward pass costs: what a shared prefix must save to be worth a pass of its own."""
    loaded = shape_model(bench, 2, torch.bfloat16)
    body, _ = body_and_head(loaded.model) or (None, None)
    assert body is not None
    many = 4096 if bench.cuda else 256
    long = torch.zeros(4, many // 4, dtype=torch.long, device=bench.device)
    short = torch.zeros(1, 16, dtype=torch.long, device=bench.device)
    times = alternate({"long": lambda: body(input_ids=long), "short": lambda: body(input_ids=short)}, 9)
    found.add("a short pass", 1e3 * times["short"], "ms")
    found.add("tokens of a long pass in that time", many * times["short"] / times["long"])
    found.add("tokens that the package assumes", pass_tokens(bench.device))


class TimedStep(NamedTuple):
    """A step that can be repeated."""

    run: Callable[[], None]
    metrics: list[dict[str, Any]]
    """Of each run so far."""
    contexts: dict[str, list[list[int]]]
    """Token ids before the completions, by whose they are."""


def timed_step(bench: Bench, out: str, *, alike: bool = False, **values: Any) -> TimedStep:
    """A step on long prompts, which begin ``alike`` or not."""
    layers = 2
    common: dict[str, Any] = {
        "model": shape_folder(bench, layers),
        "data": rows(bench, 16, 400 if bench.cuda else 100, 40, alike=alike),
        "batch_size": 16 if bench.cuda else 4,
        "max_completion_length": 64 if bench.cuda else 4,
        "max_steps": 9,
        "mixed_precision": "bf16",
        "lora_rank": 16,
        "teacher": "frozen",
        "teacher_cache_mib": 0,
    }
    run = make_trainer(settings(bench, out, **common | values), shape_model(bench, layers, torch.float32))
    metrics: list[dict[str, Any]] = []
    examples = run.stages[0].task.examples[: common["batch_size"]]
    contexts = {"student": [x.student_ids for x in examples], "teacher": [x.teacher_ids or [] for x in examples]}
    return TimedStep(lambda: metrics.append(run.step(0)), metrics, contexts)


def check_sharing(bench: Bench, found: Found) -> None:
    """A step on prompts that begin alike, with shared prefixes computed once and with each prompt in full."""
    step = timed_step(bench, "sharing", alike=True)
    for name, contexts in step.contexts.items():
        groups = shared_prefixes(contexts, pass_tokens(bench.device))
        saved = sum((len(group) - 1) * length for group, length in groups)
        found.add(f"{name}: share of the prompts that is saved", saved / sum(map(len, contexts)), at_least=0.2)

    def apart() -> None:
        with patch.dict(PASS_TOKENS, {bench.device: 10**9}):
            step.run()

    alternate({"shared": step.run, "apart": apart}, 3)
    for part in ("rollout", "teacher", "student"):
        shared, alone = (sorted(m[f"time/{part}_s"] for m in step.metrics[2 + i :: 2])[1] for i in (0, 1))
        found.add(f"{part}: shared against apart", shared / alone)


def check_compile(bench: Bench, found: Found) -> None:
    """A step with the layers compiled and without."""
    if not bench.cuda:
        raise NotRun("compiling takes half a minute")
    plain = timed_step(bench, "plain", lora_rank=0, teacher="live")
    began = now()
    compiled = timed_step(bench, "compiled", lora_rank=0, teacher="live", torch_compile=True)
    compiled.run()
    found.add("compiling, with a first step", now() - began, "s")
    compiled.metrics.clear()
    times = alternate({"compiled": compiled.run, "plain": plain.run}, 3)
    found.add("step: compiled against plain", times["compiled"] / times["plain"])
    student = [sorted(m["time/student_s"] for m in step.metrics[1:])[1] for step in (compiled, plain)]
    found.add("student: compiled against plain", student[0] / student[1])


CHECKS = (
    Check("limits", "what the device can do at best", 30, check_limits),
    Check("rollout", "16 samples of 256 tokens, with cuDNN's attention on and off", 60, check_rollout),
    Check("decode", "what a new token costs", 90, check_decode),
    Check("loss", "the loss through a large head, by tokens a chunk", 60, check_loss),
    Check("pass", "tokens that a further forward pass costs", 30, check_pass),
    Check("sharing", "shared prefixes computed once", 60, check_sharing),
    Check("compile", "compiled layers", 150, check_compile),
)
