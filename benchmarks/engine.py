"""vLLM, our own loop and transformers' continuous batching, in turn: 16 samples of 256 tokens by the starter model.

    OMP_NUM_THREADS=1 python benchmarks/engine.py [--tokens 256] [--repeats 3] [--steps 5] [--dtypes bfloat16 float32]

It needs the environment of ``make test-vllm``. No sample ends before its last token. The engine gets the weights anew
each time, as in training. Per arithmetic it prints seconds and their ratio to our loop's, how far the log-probabilities
are from those of a forward pass, and how many of every second prompt's samples are the same without the other prompts.
Then it trains some steps with the engine, and prints what the parts of a step take.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from measure import alternate
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from selfdistill.config import EngineSettings, TrainConfig
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.sources import packaged
from selfdistill.model import LoadedModel, Rollout, Sampling, engine_for, load_model, sample, use_engine
from selfdistill.training.train import train

MODEL, DATA, SAMPLES, PAGE = "smollm2-135m", "knowledge.train.jsonl", 16, 32
PARTS = ("rollout", "sync", "teacher", "student", "update", "drift", "step")
Sampler = Callable[[Sequence[list[int]], int], list[Rollout]]
"""Samples so many tokens after each prompt."""


class ContinuousBatching:
    """``generate_batch``, whose samples share one seed. It computes in a thread, which autocast does not reach."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = copy.deepcopy(model).to(dtype)  # it changes the configuration

    def __call__(self, prompts: Sequence[list[int]], tokens: int) -> list[Rollout]:
        pages = len(prompts) * (1 + (max(map(len, prompts)) + tokens) // PAGE)
        found = self._model.generate_batch(
            prompts,
            GenerationConfig(do_sample=True, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(
                seed=0, return_logprobs=True, page_size=PAGE, num_blocks=2 * pages, max_batch_tokens=2048
            ),
        )
        assert len(found) == len(prompts), "it returns what it has, if its thread fails"
        return [Rollout(list(one.generated_tokens), list(one.logprobs), True) for one in found.values()]


def of_package(loaded: LoadedModel) -> Sampler:
    """``sample``, with the model's engine or our own loop; each prompt has a seed, wherever it stands."""

    def sampled(prompts: Sequence[list[int]], tokens: int) -> list[Rollout]:
        return sample(loaded, prompts, Sampling(tokens), [sum(prompt) for prompt in prompts])

    return sampled


def with_new_weights(loaded: LoadedModel, sampler: Sampler) -> Sampler:
    """Change a weight's last bits before every sampling."""

    def sampled(prompts: Sequence[list[int]], tokens: int) -> list[Rollout]:
        with torch.no_grad():
            loaded.model.model.norm.weight.mul_(1 + 1e-6)
        return sampler(prompts, tokens)

    return sampled


@torch.no_grad()
def gaps(loaded: LoadedModel, prompts: Sequence[list[int]], rollouts: Sequence[Rollout]) -> list[float]:
    """Absolute differences between the samples' log-probabilities and those of a forward pass, in nats."""
    found: list[float] = []
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids_1L = torch.tensor([prompt + rollout.ids])
        logits_TV = loaded.model(input_ids=ids_1L).logits[0, len(prompt) - 1 : -1].float()
        own_T = logits_TV.log_softmax(-1).gather(-1, torch.tensor(rollout.ids)[:, None])[:, 0]
        found += (own_T - torch.tensor(rollout.logps)).abs().tolist()
    return found


def arithmetic(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def compare(loaded: LoadedModel, prompts: list[list[int]], dtype: torch.dtype, tokens: int, repeats: int) -> None:
    """Time the three in turn, and print a table."""
    fast = replace(loaded)
    use_engine(fast, EngineSettings(engine="vllm", engine_memory_gib=1))
    samplers: dict[str, Sampler] = {
        "our loop": of_package(loaded),
        "vllm": with_new_weights(loaded, of_package(fast)),
        "generate_batch": ContinuousBatching(loaded.model, dtype),
    }
    print(f"{str(dtype).removeprefix('torch.')}: {len(prompts)} samples of {tokens} tokens", flush=True)
    with arithmetic(dtype):
        kept = {}
        for name, sampler in samplers.items():  # also warms up
            among_all, by_themselves = sampler(prompts, 8)[::2], sampler(prompts[::2], 8)
            kept[name] = sum(a.ids == b.ids for a, b in zip(among_all, by_themselves, strict=True))
        engine = engine_for(fast)
        rollouts: dict[str, list[Rollout]] = {}
        synced_s = engine.sync_s
        seconds = alternate(
            {
                name: lambda name=name, sampler=sampler: rollouts.update({name: sampler(prompts, tokens)})  # type: ignore[misc]
                for name, sampler in samplers.items()
            },
            repeats,
            warm_ups=0,
        )
        sync_s = (engine.sync_s - synced_s) / repeats
        for name in samplers:
            apart = gaps(loaded, prompts, rollouts[name])
            print(
                f"  {name:14} {seconds[name]:6.1f} s, {seconds[name] / seconds['our loop']:.2f} of our loop; "
                f"gap {mean(apart):.1g}, at most {max(apart):.1g} nats; {kept[name]} of {len(prompts[::2])} do not "
                "depend on the others",
                flush=True,
            )
    print(f"  of vllm's, getting the weights: {sync_s:.2f} s", flush=True)


def step_parts(tokens: int, steps: int) -> None:
    """Train some steps with the engine in bfloat16, and print the median seconds of a step's parts."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=MODEL,
            data=str(packaged(DATA)),
            output_dir=f"{folder}/run",
            context="turns",
            batch_size=SAMPLES,
            max_steps=steps,
            max_completion_length=tokens,
            learning_rate=1e-5,
            mixed_precision="bf16",
            save_steps=0,
            engine="vllm",
            engine_memory_gib=1,
        )
        train(config)
        lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    length = mean(line["completion/length"] for line in lines)
    parts = {part: median(line[f"time/{part}_s"] for line in lines[1:]) for part in PARTS}
    print(f"a step of {SAMPLES} samples, {length:.0f} tokens each, bfloat16, median of {len(lines) - 1}, seconds:")
    print("  " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    options = parser.parse_args()
    loaded = load_model(MODEL)
    chat = loaded.chat()
    prompts = [chat.encode_prompt(row.prompt) for row in load_demonstrations(packaged(DATA))[::11][:SAMPLES]]
    loaded.end_token_ids = ()
    print(
        f"{torch.get_num_threads()} thread(s), prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    )
    for dtype in options.dtypes:
        compare(loaded, prompts, getattr(torch, dtype), options.tokens, options.repeats)
    if options.steps:
        step_parts(options.tokens, options.steps)


if __name__ == "__main__":
    main()
