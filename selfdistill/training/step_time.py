"""A rough time of a run's steps, by formulas.

A network has P weights that every token passes, H in its head that only scored tokens pass, and L layers with attention
of width A (heads times channels). n completions of T tokens follow prompts of S tokens for the student and S' for the
teacher; averages over the rows. A pass forward over n sequences of l tokens, T of each scored, is

    F(l) = 2 n (P l + H T) + 4 n L A l^2 FLOP

In training on a GPU in bfloat16 arithmetic, H counts twice if the head is one matrix product in float32 or bfloat16:
the loss multiplies it in TF32, at half the rate (see :mod:`selfdistill.loss.chunked`).

The parts of a step, on a device with c FLOP per second and b bytes per second:

    sampling   F(S) / c with one scored token; then T times the FLOP of n tokens, or reading the weights and all keys
               and values kept so far, whichever takes longer, and a fixed time per layer, on a GPU more with an adapter
    teacher    F(S' + T) / c
    student    3 F(S + T) / c; 2 with LoRA, which needs no gradients of the weights; 1 more with checkpointing
    update     bytes that clipping, AdamW and an EMA teacher move / b

Not counted: savings from shared and cached beginnings of contexts, padding, work on the CPU, communication between
processes, evaluations and checkpoints. Samples count at maximum length; in mixtures of experts all experts count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch

from selfdistill.config import TrainConfig
from selfdistill.errors import number_of
from selfdistill.loss import plain_weight
from selfdistill.model import LoadedModel, TeacherRule, body_and_head, count_of, moment_bytes
from selfdistill.training.rates import ADAPTER_SECONDS, Rates
from selfdistill.training.schedule import steps_of
from selfdistill.training.traced_step import Device, PlannedPart, sampled_together


@dataclass(frozen=True)
class Network:
    """The sizes of a network that determine its time."""

    body: int
    """Weights that every token passes: all but embeddings and head."""
    head: int
    """Weights of the head."""
    layers: int
    width: int
    """Of attention: heads times channels."""
    kept_width: int
    """Of keys and values: key/value heads times channels."""
    size: int
    """Bytes of a weight, key or value in the arithmetic."""
    head_cost: int = 1
    """How much longer the head's products take in training than others of as many FLOP."""

    @classmethod
    def of(cls, loaded: LoadedModel, device: Device) -> Network:
        """The sizes of a model, also one of fake tensors."""
        text, model = loaded.model.config.get_text_config(), loaded.model
        embeddings, head = (model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None))
        outside = {id(weight): weight.numel() for weight in (embeddings, head) if weight is not None}
        heads = getattr(text, "num_attention_heads", 0)
        parts, is_bfloat16 = body_and_head(model), device.mixed_precision == "bf16"
        weight = None if parts is None else plain_weight(parts[1])
        in_tf32 = weight is not None and device.kind == "cuda" and (is_bfloat16 or weight.dtype == torch.bfloat16)
        channels = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
        return cls(
            body=sum(map(count_of, model.parameters())) - sum(outside.values()),
            head=text.hidden_size * text.vocab_size,
            layers=text.num_hidden_layers,
            width=heads * channels,
            kept_width=(getattr(text, "num_key_value_heads", None) or heads) * channels,
            size=2 if is_bfloat16 else embeddings.dtype.itemsize,
            head_cost=2 if in_tf32 else 1,
        )

    def forward_flops(self, tokens: float, seen: float, scored: float) -> float:
        """FLOP of a pass over one sequence: its tokens, how many each of them sees, and how many are scored."""
        return tokens * (2 * self.body + 4 * self.layers * self.width * seen) + 2 * self.head * scored

    def scoring_flops(self, tokens: float, scored: float) -> float:
        """The same in training, over a sequence that sees itself; the head's as often as they cost."""
        return self.forward_flops(tokens, tokens, scored) + 2 * (self.head_cost - 1) * self.head * scored

    def sampling_seconds(self, rates: Rates, sequences: float, prompt: float, tokens: float) -> float:
        """Seconds to sample this many tokens after each prompt."""
        seen = prompt + tokens / 2
        flops = sequences * self.forward_flops(1, seen, 1)
        kept = 2 * self.layers * self.kept_width * seen * sequences
        read = self.size * (self.body + self.head + kept)
        each = max(flops / rates.products, read / rates.reading) + self.layers * rates.layer_seconds
        return sequences * self.forward_flops(prompt, prompt, 1) / rates.products + tokens * each


@dataclass(frozen=True)
class Seconds:
    """Of the parts of a step."""

    sampling: float = 0.0
    teacher: float = 0.0
    student: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        return self.sampling + self.teacher + self.student + self.update


@dataclass(frozen=True)
class TimePlan:
    """Rough time of a run, if all samples have maximum length."""

    rates: Rates
    step: Seconds
    """On average over the stages."""
    steps: int
    before: float
    """Seconds before the first step, for samples drawn in advance."""

    @property
    def total(self) -> float:
        """Seconds of the run, without evaluations and checkpoints."""
        return self.before + self.steps * self.step.total

    def line(self) -> str:
        """One line with the parts of a step."""
        parts = ", ".join(f"{name} {value:.2g}" for name, value in asdict(self.step).items() if value)
        before = f" and {duration_text(self.before)} before the first" if self.before else ""
        return (
            f"rough time, on {self.rates.name}: {self.step.total:.2g} s per step ({parts}), "
            f"{duration_text(self.total)} for {number_of(self.steps, 'step')}{before}, if all samples have maximum "
            "length"
        )

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``; times in seconds."""
        parts = asdict(self.step) | {"total": self.step.total}
        return {"device": self.rates.name, "seconds_per_step": parts, "steps": self.steps, "seconds": self.total}


def time_plan(
    config: TrainConfig,
    device: Device,
    loaded: LoadedModel,
    others: dict[TeacherRule, LoadedModel],
    stages: Sequence[Sequence[PlannedPart]],
    rates: Rates,
    examples: int,
) -> TimePlan:
    """Plan the time of a run.

    Args:
        config: settings of the run.
        device: what it is planned for.
        loaded: the model, which may be of fake tensors.
        others: separate teachers, by their rules.
        stages: its stages, with examples that stand for all.
        rates: of the device.
        examples: how many examples there are.
    """
    if config.engine != "none":  # it replays its operations
        rates = replace(rates, layer_seconds=0.0)
    elif device.kind == "cuda" and hasattr(loaded.model, "peft_config"):  # sampling does not merge the adapter
        rates = replace(rates, layer_seconds=rates.layer_seconds + ADAPTER_SECONDS)
    student = Network.of(loaded, device)
    networks = {rule: Network.of(other, device) for rule, other in others.items()}
    parts = [_scoring_seconds(config, device, student, networks, part, rates) for stage in stages for part in stage]
    together = [alike for stage in stages for alike in sampled_together(stage)]
    update = _update_seconds(config, device, loaded, stages, rates)
    step = Seconds(
        sampling=sum(_sampling_seconds(config, device, student, alike, rates) for alike in together) / len(stages),
        teacher=sum(part.teacher for part in parts) / len(stages),
        student=sum(part.student for part in parts) / len(stages),
        update=update,
    )
    drawn = [part for stage in stages for part in stage if part.sampling and part.method.sequence.sampling is None]
    before = sum(_drawing_seconds(student, part, rates, examples / device.processes) for part in drawn)
    return TimePlan(rates, step, steps_of(config, examples, stages[0][0].share), before)


def _sampling_seconds(
    config: TrainConfig, device: Device, network: Network, parts: Sequence[PlannedPart], rates: Rates
) -> float:
    """Seconds to sample the completions of parts that sample together."""
    rows, prompts, sampling = 0, 0.0, parts[0].sampling
    assert sampling is not None
    for part in parts:
        count = part.rows(config, device)
        rows += count
        prompts += count * fmean(len(x.student_ids) for x in part.examples)
    return network.sampling_seconds(rates, rows, prompts / rows, sampling.max_completion_length)


def _scoring_seconds(
    config: TrainConfig,
    device: Device,
    student: Network,
    networks: dict[TeacherRule, Network],
    part: PlannedPart,
    rates: Rates,
) -> Seconds:
    method, count = part.method, part.rows(config, device)
    prompt = fmean(len(x.student_ids) for x in part.examples)
    tokens = fmean(len(part.completion(x)) for x in part.examples)
    own = student.scoring_flops(prompt + tokens, tokens)
    length = fmean(len(x.teacher_ids or []) for x in part.examples) + tokens
    scored = 0.0
    if method.needs_base:
        scored += student.scoring_flops(length, tokens) if method.base_sees_context else own
    if method.teacher:
        scored += networks.get(method.teacher, student).scoring_flops(length, tokens)
    passes = (2 if config.lora_rank else 3) + bool(config.gradient_checkpointing)
    return Seconds(
        teacher=count * scored / rates.products,
        student=count * passes * own / rates.products,
    )


def _drawing_seconds(network: Network, part: PlannedPart, rates: Rates, examples: float) -> float:
    """Seconds to draw the samples of all examples before the first step."""
    drawn, sampling = part.method.drawn, part.sampling
    assert drawn is not None
    assert sampling is not None
    prompt = fmean(len(drawn.prompt(x)) for x in part.examples)
    batch = network.sampling_seconds(rates, drawn.batch_size, prompt, sampling.max_completion_length)
    return batch * examples / drawn.batch_size


def _update_seconds(
    config: TrainConfig,
    device: Device,
    loaded: LoadedModel,
    stages: Sequence[Sequence[PlannedPart]],
    rates: Rates,
) -> float:
    """Clipping reads gradients twice and writes them; AdamW reads them, and reads and writes weights and moments.

    An EMA teacher reads the weights, and reads and writes its float32 average.
    """
    trained = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    size = sum(weight.numel() * weight.element_size() for weight in trained)
    moved = 3 * size + 3 * size + 2 * moment_bytes(trained, config.optim)
    if any(part.method.teacher and part.method.teacher.kind == "ema" for stage in stages for part in stage):
        moved += size + 8 * sum(weight.numel() for weight in trained)
    return moved / rates.bandwidth / device.shares(config)


def duration_text(seconds: float) -> str:
    """A duration as readable text."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
