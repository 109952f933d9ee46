"""The phases of one optimizer step on fake tensors: what each holds at its peak, in addition to permanent memory.

The forward pass, loss and backward pass of training run over the longest rows that a micro-batch may have:
see :meth:`selfdistill.training.batch_gradient.BatchGradient.add` for its division.

Legend: N tokens of a micro-batch's completions without padding, D hidden size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator

from selfdistill.config import TrainConfig
from selfdistill.data import Example, pictures_in
from selfdistill.loss import CrossEntropy, Head, chunked_loss
from selfdistill.methods import FROZEN, ColdStart, Method, SamplesOtherPrompts
from selfdistill.model import (
    FilledCache,
    ForwardOutput,
    ForwardPass,
    LiveTensors,
    LoadedModel,
    Sampling,
    TeacherRule,
    alike_layers,
    cached_casts,
    sample_at_its_longest,
    set_recomputing,
    tensor_bytes,
    weight_tensors,
)
from selfdistill.training.setup import by_sequence

Ids = list[int]
Bytes = Counter[str]
"""Bytes by component."""
Segments = dict[tuple[str, str], Bytes]
"""The peaks of a step's segments, by phase and name. If all layers are alike, each grows equally per layer."""


@dataclass(frozen=True)
class Device:
    """The device that a run is planned for."""

    kind: str
    """``cuda`` or ``cpu``, as PyTorch names it."""
    mixed_precision: str
    """``bf16`` or ``no``: the meaning of the setting ``auto`` there."""
    processes: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> Device:
        """The device of this process."""
        return cls(accelerator.device.type, str(accelerator.mixed_precision), accelerator.num_processes)

    def shares(self, config: TrainConfig) -> int:
        """How many processes hold a share of the weights each, and need equal parts of a batch."""
        return self.processes if config.fsdp else 1


def arithmetic(weights: torch.dtype, mixed_precision: str) -> str:
    """``bf16`` if the run's products are of bfloat16 numbers, by autocast or because the weights are; else ``no``."""
    return "bf16" if mixed_precision == "bf16" or weights == torch.bfloat16 else "no"


def autocast(device: Device) -> torch.autocast:
    """The arithmetic of a device, for fake tensors."""
    return torch.autocast("cpu", torch.bfloat16, enabled=device.mixed_precision == "bf16")


@dataclass(frozen=True)
class PlannedPart:
    """A part of a stage's steps, with the longest of its examples."""

    method: Method
    share: float
    examples: list[Example]
    sampling: Sampling | None
    """How the completions are sampled; None if they come from the examples."""
    same_samples: bool = False
    """Whether they are the samples of the stage's first part."""
    other_prompts: list[Ids] = field(default_factory=list)
    """Prompts of the samples that may replace some; empty for a sequence source without them."""

    def rows(self, config: TrainConfig, device: Device) -> int:
        """Completions of a step on one process."""
        count = math.ceil(round(config.batch_size * self.share, 9)) * self.method.sequence.per_example
        return math.ceil(count / device.processes)

    def completion(self, example: Example) -> Ids:
        """The example's completion at maximum length."""
        if self.sampling is None:
            return example.completion_ids
        sampled = [0] * self.sampling.max_completion_length
        demonstrated = example.completion_ids if isinstance(self.method.sequence, ColdStart) else []
        return max(sampled, demonstrated, key=len)


def sampled_together(parts: Sequence[PlannedPart]) -> list[list[PlannedPart]]:
    """A step's parts whose completions are sampled, those that are sampled by one call together."""
    return by_sequence(part for part in parts if part.method.sequence.sampling is not None and not part.same_samples)


class TracedStep:
    """Runs the phases of a step.

    Args:
        config: settings of the run.
        device: what it is planned for.
        loaded: the student, of fake tensors.
        others: separate teachers, by their rules.
        cached: rules of the teachers whose contexts are kept.
        sampled: what sampling holds, as far as it was traced for other settings; it grows.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: Device,
        loaded: LoadedModel,
        others: dict[TeacherRule, LoadedModel],
        cached: Sequence[TeacherRule],
        sampled: dict[Hashable, Segments],
    ) -> None:
        self._config, self._device, self.loaded, self._others = config, device, loaded, others
        self._traced = sampled
        self._forward_pass = ForwardPass(loaded, sharded=config.fsdp, kind=device.kind)
        self._networks = [loaded.model, *(other.model for other in others.values())]
        with self._autocast():
            self.caches = {rule: FilledCache(others.get(rule, loaded)) for rule in cached}
            """Cached contexts, by the rule of their teacher."""

    def _autocast(self) -> torch.autocast:
        return autocast(self._device)

    def sampling(self, parts: Sequence[PlannedPart]) -> Segments:
        """Sample the completions of parts that sample together, all of maximum length."""
        policy, sequence = parts[0].sampling, parts[0].method.sequence
        assert policy is not None
        prompts: list[Ids] = []
        for part in parts:
            prompts += longest([x.student_ids for x in part.examples], part.rows(self._config, self._device))
        found = self._sampled(self.loaded, longest(prompts, len(prompts)), policy, "sampling")
        if isinstance(sequence, SamplesOtherPrompts):
            count = math.ceil(len(prompts) * sequence.replaced / sequence.per_example)
            found |= self._sampled(self.loaded, longest(parts[0].other_prompts, count), policy, "sampling", "again ")
        return found

    def drawing(self, part: PlannedPart, others: dict[str, LoadedModel]) -> Segments:
        """Draw a process's batch of samples before the first step, all of maximum length; of several models the most.

        Args:
            part: whose samples.
            others: models other than the student, by name.
        """
        drawn = part.method.drawn
        if drawn is None or part.sampling is None:
            return {}
        prompts = longest([drawn.prompt(x) for x in part.examples], drawn.batch_size * drawn.at_once)
        policy = replace(drawn.sampling, max_completion_length=part.sampling.max_completion_length)
        if not drawn.others:
            return self._sampled(self.loaded, prompts, policy, "drawing")
        found: Segments = {}
        for sampler in (others[name] for name in drawn.others):
            held = Bytes({"other model": tensor_bytes(weight_tensors(sampler.model))})
            for segment, peak in self._sampled(sampler, prompts, policy, "drawing").items():
                found[segment] = max(found.get(segment, Bytes()), peak + held, key=Bytes.total)
        return found

    def _sampled(
        self, loaded: LoadedModel, prompts: Sequence[Ids], sampling: Sampling, phase: str, kind: str = ""
    ) -> Segments:
        """The peaks of sampling, which settings of learning do not change."""
        shapes = tuple((name, weight.shape, weight.dtype) for name, weight in loaded.model.named_parameters())
        rows = tuple((len(ids), *(picture.digest for picture in pictures_in(ids))) for ids in prompts)
        device = "cpu" if self._config.fsdp else self._device.kind  # shards are sampled from as on a CPU
        key = (loaded.name, shapes, rows, sampling, phase, kind, self._device.mixed_precision, device)
        if key not in self._traced:
            self._traced[key] = self._trace_sampling(loaded, prompts, sampling, (phase, kind), device)
        return self._traced[key]

    def _trace_sampling(
        self, loaded: LoadedModel, prompts: Sequence[Ids], sampling: Sampling, names: tuple[str, str], device: str
    ) -> Segments:
        phase, kind = names
        live = LiveTensors(loaded.model)
        live.component = "workspace"
        with live, self._autocast():
            sample_at_its_longest(loaded, prompts, sampling, lambda name: live.begin((phase, kind + name)), device)
            states = FilledCache(loaded).token_bytes * len(prompts)
        states *= len(prompts[0]) + sampling.max_completion_length
        for peak in live.peaks.values():
            peak["keys and values"] = min(states, peak["workspace"])
            peak["workspace"] -= peak["keys and values"]
        return _segments(live)

    def learning(self, part: PlannedPart, size: int, *, again: bool) -> Segments:
        """Score a micro-batch by teachers and student, and run backward.

        Args:
            part: whose rows.
            size: completions of the micro-batch.
            again: whether an earlier micro-batch has left gradients.
        """
        live = LiveTensors(*self._networks)
        trained = [weight for weight in self.loaded.model.parameters() if weight.requires_grad]
        layers = alike_layers(self.loaded)
        last = [p for p in layers[-1].parameters() if p.requires_grad] if layers else trained
        hook = last[-1].register_post_accumulate_grad_hook(lambda _: live.begin(("student", "other layers")))
        try:
            with live:
                if again:
                    live.component = "gradients"
                    for weight in trained:
                        weight.grad = torch.zeros_like(weight)
                live.component = "activations"
                taught, base = self._teachers(part, size, live)
                self._student(part, size, taught, base, live)
                return _segments(live)
        finally:
            hook.remove()
            for weight in trained:
                weight.grad = None
            self.loaded.model.eval()

    def _rows(self, part: PlannedPart, size: int, prompt: Callable[[Example], Ids]) -> tuple[list[Ids], list[Ids]]:
        """Prompts and completions of the longest rows."""
        pairs = [(prompt(x), part.completion(x)) for x in part.examples]
        pairs.sort(key=lambda pair: -len(pair[0]) - len(pair[1]))
        chosen = [pairs[number % len(pairs)] for number in range(size)]
        return [ids for ids, _ in chosen], [ids for _, ids in chosen]

    def _teachers(
        self, part: PlannedPart, size: int, live: LiveTensors
    ) -> tuple[ForwardOutput | None, ForwardOutput | None]:
        taught = base = None
        contexts = self._rows(part, size, lambda x: x.teacher_ids or [])
        live.begin(("teacher", "context"))
        if part.method.teacher:
            taught = self._score(part.method.teacher, *contexts)
        live.begin(("teacher", "base"))
        if part.method.needs_base:
            prompts = self._rows(part, size, lambda x: x.student_ids)
            base = self._score(FROZEN, *(contexts if part.method.base_sees_context else prompts))
        return taught, base

    def _score(self, rule: TeacherRule, contexts: list[Ids], completions: list[Ids]) -> ForwardOutput:
        network = self._others.get(rule, self.loaded).model
        cache: Any = self.caches.get(rule)
        with cached_casts(network), self._autocast():
            output = self._forward_pass(network, contexts, completions, cache)
            return _selected(output)

    def _student(
        self,
        part: PlannedPart,
        size: int,
        taught: ForwardOutput | None,
        base: ForwardOutput | None,
        live: LiveTensors,
    ) -> None:
        contexts, completions = self._rows(part, size, lambda x: x.student_ids)
        model, method = self.loaded.model, part.method
        set_recomputing(model, bool(self._config.gradient_checkpointing))
        live.begin(("student", "forward"))
        with self._autocast():
            output = self._forward_pass(model, contexts, completions)
            count = len(output.hidden_ND)
            live.begin(("student", "loss"))
            live.component = "loss"
            # The second chunk needs what all later ones need.
            tokens_N = torch.zeros(min(count, 2 * output.chunk_tokens), dtype=torch.long)
            weights_N = torch.ones(len(tokens_N))
            if method.importance_cap is not None:
                with torch.no_grad():
                    chunked_loss(
                        CrossEntropy(),
                        output.hidden_ND,
                        _float32(output.head),
                        (),
                        tokens_N,
                        weights_N,
                        chunk_size=output.chunk_tokens,
                    )
            loss, _ = chunked_loss(
                method.loss,
                output.hidden_ND[torch.arange(count)],
                output.head,
                output.head_parameters,
                tokens_N,
                weights_N,
                None if taught is None else (taught.hidden_ND, taught.head),
                chunk_size=output.chunk_tokens,
                base=None if base is None else (base.hidden_ND, base.head),
                weighting=method.weighting,
            )
        live.component = "activations"
        live.begin(("student", "backward"))
        loss.backward()


def _segments(live: LiveTensors) -> Segments:
    return {segment: peak for segment, peak in live.peaks.items() if segment}


def longest(ids: Sequence[Ids], count: int) -> list[Ids]:
    """The longest of some token sequences, repeated if there are too few."""
    ordered = sorted(ids, key=len, reverse=True)
    return [ordered[number % len(ordered)] for number in range(count)]


def _selected(output: ForwardOutput) -> ForwardOutput:
    """A copy of the hidden states, as the choice of tokens with nonzero weight makes one."""
    return replace(output, hidden_ND=output.hidden_ND[torch.arange(len(output.hidden_ND))])


def _float32(head: Head) -> Head:
    return lambda hidden_ND: head(hidden_ND).float()
