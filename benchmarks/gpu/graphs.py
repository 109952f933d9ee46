"""Decoding captured as a CUDA graph against decoding without: the same samples, and the time of a token.

On a CPU, passes have the same fixed shapes, but nothing is captured, and no number says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from bench import Bench, Check, Found
from models import WHOLE, endless, shape_model, small_model
from speed import TokenTimes, sampled, token_times

from selfdistill.model import LoadedModel, Sampling, add_lora, decoding_steps, sample, sample_seed
from selfdistill.model.device import has_graphs
from selfdistill.model.loading import load_model
from selfdistill.model.sampling import Rollout


@contextmanager
def decoding(graphs: bool) -> Iterator[None]:
    """Decode with passes of fixed shapes, captured on a GPU with any PyTorch, or with passes that grow."""
    with patch.object(decoding_steps, "has_graphs", lambda _kind: graphs):
        yield


def check_graphs(bench: Bench, found: Found) -> None:
    """Samples of a small model in float32 that end at unlike lengths; then the time of a token of a large one."""
    if bench.cuda:
        found.add("runs with this PyTorch capture", "yes" if has_graphs("cuda") else "no, it is too old")
    loaded = load_model(small_model(bench))
    loaded.model.to(bench.device)
    vocabulary = loaded.model.config.vocab_size
    loaded = replace(loaded, end_token_ids=tuple(range(0, vocabulary, 32)))
    compare(bench, found, loaded, "samples")
    fixed, growing = ("captured", "not captured") if bench.cuda else ("fixed shapes", "growing shapes")
    require_captures(bench, loaded)
    found.add(f"{fixed}: passes that computed the same logits", float(loaded.captures is True), at_least=1.0)
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.mul_(0.9)
    compare(bench, found, loaded, "after the weights changed")
    few, more = 2, 4
    for kind in ("full", "LoRA"):
        costs = [token_costs(bench, layers, adapter=kind == "LoRA") for layers in (few, more)]
        for name, low, high in zip((fixed, growing), *costs, strict=True):
            found.add(f"{kind}: a token, {name}, {few} layers", low.token, "ms")
            whole = low.token + (WHOLE - few) * (high.token - low.token) / (more - few)
            found.add(f"{kind}: a token, {name}, {WHOLE} layers", whole, "ms")
        if bench.cuda:
            captured, without = costs[1]
            found.add(f"{kind}: a capture, {more} layers", captured.before - without.before, "ms")


def require_captures(bench: Bench, loaded: LoadedModel) -> None:
    """Fail the check on a GPU if decoding was not captured, because no number may say that it was.

    It must fail by an error, which also ends the process: a failed capture can leave it damaged
    (:data:`~selfdistill.model.device.GRAPHS_SINCE`).
    """
    if bench.cuda and loaded.captures is not True:
        raise RuntimeError("decoding was not captured; a note on stderr has the reason")


def compare(bench: Bench, found: Found, loaded: LoadedModel, name: str) -> None:
    """How many samples are the same with and without graphs, and how much their log-probabilities differ."""
    prompts = [[(7 * row + place) % 256 for place in range(5 + 3 * row)] for row in range(16)]
    seeds = [sample_seed(0, 0, row, 0) for row in range(16)]
    made: dict[bool, list[Rollout]] = {}
    for graphs in (False, True):
        with decoding(graphs):
            made[graphs] = sample(loaded, prompts, Sampling(128 if bench.cuda else 40), seeds)
    pairs = list(zip(made[False], made[True], strict=True))
    same = [(a, b) for a, b in pairs if a.ids == b.ids]
    gaps = [abs(x - y) for a, b in same for x, y in zip(a.logps, b.logps, strict=True)]
    found.add(f"{name}: share that is the same", len(same) / len(pairs), at_least=0.9)
    found.add(f"{name}: largest gap of their log-probabilities", max(gaps, default=0.0), "nats", at_most=1e-3)


def token_costs(bench: Bench, layers: int, *, adapter: bool) -> list[TokenTimes]:
    """Times of 16 samples with graphs and without: the difference before the first token is what a capture costs."""
    loaded = endless(shape_model(bench, layers, torch.bfloat16))
    if adapter:
        add_lora(loaded, 16, None, 0)
    short, long = (16, 48) if bench.cuda else (10, 14)

    def run(graphs: bool, tokens: int) -> float:
        with decoding(graphs):
            return sampled(loaded, 16, tokens, 40)

    times = token_times({"fixed": partial(run, True), "growing": partial(run, False)}, short, long)
    require_captures(bench, loaded)
    return [times["fixed"], times["growing"]]


CHECKS = (Check("graphs", "decoding captured as a CUDA graph against decoding without", 90, check_graphs),)
