"""The gradient of one optimizer batch: select the completions, weight their tokens, run student and teachers, run
backward.

Legend: b completions in a micro-batch, T completion tokens, N completion tokens of a micro-batch without padding, n
those with nonzero weight, D hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from selfdistill.config import TrainConfig
from selfdistill.errors import UserError
from selfdistill.loss import (
    CrossEntropy,
    Head,
    chunked_loss,
    importance_weights,
)
from selfdistill.methods import FROZEN, Method
from selfdistill.model import (
    ForwardOutput,
    ForwardPass,
    LoadedModel,
    PrefixCache,
    Teacher,
    TeacherRule,
    cached_casts,
    is_sharded,
    root_unsharded,
    set_recomputing,
)
from selfdistill.runtime import all_gather, all_reduce_gradients, all_reduce_sum, world_size
from selfdistill.training.checkpoint import trained_parameters
from selfdistill.training.micro_batches import Weighed, micro_batches, weigh
from selfdistill.training.selection import BatchPart, Selected, Selector
from selfdistill.training.setup import batch_unit
from selfdistill.training.stopwatch import Stopwatch

_Scored = tuple[Tensor, Head]
"""Hidden states (n, D) of the tokens with nonzero weight, and the head that maps them to logits."""


@dataclass(frozen=True)
class SamplerGap:
    """Absolute difference between a token's log-probability by the student and by what sampled it, in nats.

    Only of samples of the student's own prompt.
    """

    total: float = 0.0
    """Sum over the tokens."""
    tokens: int = 0
    largest: float = 0.0

    @classmethod
    def of(cls, differences: Sequence[Tensor]) -> SamplerGap:
        """The gap of some completions, from the difference at each of their tokens."""
        tokens = torch.cat([torch.zeros(0), *differences]).abs()
        return cls(float(tokens.sum()), len(tokens), float(tokens.max())) if len(tokens) else cls()

    def __add__(self, other: SamplerGap) -> SamplerGap:
        largest = max(self.largest, other.largest)
        return SamplerGap(self.total + other.total, self.tokens + other.tokens, largest)


@dataclass(frozen=True)
class PartResult:
    """Results of one part of a batch, over all its micro-batches and ranks."""

    selected: Selected
    loss: float
    """Mean over what is learnt, 0 if nothing is; the batch's loss is the sum over parts of weight times loss."""
    statistics: dict[str, float]
    """Weighted means of per-token statistics over the completions with a gradient; empty if there are none."""
    importance: float
    """Mean importance weight of the completions with tokens to learn; 0 if there are none, or the method has none."""
    non_finite: list[str]
    """Sources of the examples with a non-finite loss."""
    gap: SamplerGap | None
    """How far the sampler's log-probabilities were from the student's; None if the method has no importance weights."""

    @property
    def part(self) -> BatchPart:
        """The part, with the completions of the step."""
        return self.selected.part

    @property
    def turn_losses(self) -> dict[str, float]:
        """Mean loss by the number of the reply that tokens belong to, as names of metrics; empty without episodes."""
        return self._means("turn_loss", "turn_weight")

    @property
    def teacher_gains(self) -> dict[str, float]:
        """Mean log q - log p of the learnt samples that are right, and of others with a verdict, as names of metrics.

        Empty without a teacher.
        """
        return self._means("teacher_gain", "teacher_weight")

    def _means(self, sums: str, weights: str) -> dict[str, float]:
        """The statistics ``sums/...``, each divided by its weight."""
        found = {name: total for name, total in self.statistics.items() if name.startswith(f"{sums}/")}
        return {name: total / self.statistics[name.replace(sums, weights, 1)] for name, total in found.items()}


@dataclass
class _Sums:
    """Running sums over the micro-batches of a part."""

    success_reward: float
    """Smallest reward of a right sample."""
    loss: float = 0.0
    importance: float = 0.0
    weighed: int = 0
    """Completions whose importance weights are summed."""
    gap: SamplerGap = SamplerGap()
    statistics: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    non_finite: list[str] = field(default_factory=list)

    def add(self, micro: Weighed, loss: float, per_token: dict[str, Tensor], importance_b: Tensor | None) -> None:
        """Add a micro-batch: its loss, its per-token statistics (n,) and its completions' importance weights (b,)."""
        self.loss += loss
        if importance_b is not None:
            self.importance += float(importance_b[micro.has_weight_b].sum())
            self.weighed += int(micro.has_weight_b.sum())
        has_weight_bT = micro.weights_bT > 0
        if not math.isfinite(self.loss):
            losses = per_token["loss"].split(has_weight_bT.sum(dim=1).tolist())
            for completion, loss_n in zip(micro.completions, losses, strict=True):
                if not bool(loss_n.isfinite().all()):
                    self.non_finite.append(completion.example.demonstration.source)
        weights_n = micro.weights_bT[has_weight_bT].to(per_token["loss"].device)
        for name, values_n in per_token.items():
            self.statistics[name] += float((values_n * weights_n).sum())
        if "teacher_logp" in per_token:
            self._add_gains(micro, weights_n * (per_token["teacher_logp"] - per_token["student_logp"]))
        if any(c.messages for c in micro.completions):
            turns = [turn for c in micro.completions for turn in c.reply_numbers]
            turn_N = torch.tensor(turns, device=weights_n.device)
            turn_n = turn_N[has_weight_bT[micro.mask_bT].to(weights_n.device)]
            for turn in turn_n.unique().tolist():
                chosen_n = weights_n * (turn_n == turn)
                self.statistics[f"turn_weight/{turn}"] += float(chosen_n.sum())
                self.statistics[f"turn_loss/{turn}"] += float((per_token["loss"] * chosen_n).sum())

    def _add_gains(self, micro: Weighed, gains_n: Tensor) -> None:
        """Add the weighted log q - log p of each completion with a verdict, apart for right and wrong ones."""
        weight_b, count_b = micro.weights_bT.sum(dim=1), (micro.weights_bT > 0).sum(dim=1).tolist()
        for completion, weight, gain_n in zip(micro.completions, weight_b, gains_n.split(count_b), strict=True):
            if completion.verdict is not None and weight > 0:
                kind = "right" if completion.verdict.reward >= self.success_reward else "wrong"
                self.statistics[f"teacher_gain/{kind}"] += float(gain_n.sum())
                self.statistics[f"teacher_weight/{kind}"] += float(weight)


@dataclass(frozen=True)
class BatchGradient:
    """Computes the gradients of one run's batches."""

    config: TrainConfig
    accelerator: Accelerator
    loaded: LoadedModel
    """The student."""
    selector: Selector
    forward_pass: ForwardPass
    teachers: Mapping[TeacherRule, Teacher]
    """Every teacher of the run; that of ``FROZEN`` is also the base of a target that needs it."""
    prefix_caches: Mapping[TeacherRule, PrefixCache | None]
    """Cached states of the frozen teachers' contexts."""

    def add(self, parts: Sequence[BatchPart], stopwatch: Stopwatch) -> list[PartResult]:
        """Accumulate the gradient of the batch's loss, the sum over its parts of :attr:`BatchPart.weight` times loss.

        First the selector has each part's completions checked, and returns those that are learnt.

        On every rank, a micro-batch takes no more memory than the ``gradient_accumulation_steps``-th part of the rank's
        completions, if all were as long as the longest. Token weights are computed over a whole part, so the numbers of
        micro-batches and ranks do not change the result. Completions whose gradient is zero, such as those without an
        advantage, count in these weights and take no passes. A part that selects no completion adds nothing; if no part
        has a gradient, there is none.
        """
        checked = [part.name for part in parts if part.method.checker or part.method.select]
        with stopwatch("rollout"), stopwatch.of(checked):
            selected = self.selector(parts)
        unit = batch_unit(self.config)
        padded = [math.ceil(len(found.completions) / unit) * unit for found in selected]
        own = sum(math.ceil(count / world_size()) for count in padded)
        size = max(1, math.ceil(own / self.config.micro_batches))
        results = []
        for found in selected:
            with stopwatch.of([found.part.name]):
                weighed = weigh(found, self.config.loss_normalisation)
                passed = weighed.with_gradient()
                batches = micro_batches(passed, size, unit, equal=is_sharded(self.loaded.model))
                kept = float(passed.weights_bT.sum() / weighed.weights_bT.sum())
                results.append((found, self._run(found.part, batches, stopwatch), kept))
        with stopwatch("student"):
            if not is_sharded(self.loaded.model):
                all_reduce_gradients(trained_parameters(self.loaded.model).values())
            return [self._reduced(*result) for result in results]

    def _run(self, part: BatchPart, batches: Sequence[Weighed], stopwatch: Stopwatch) -> _Sums:
        """Score the part's micro-batches and run backward."""
        sums = _Sums(self.config.success_reward)
        for micro in batches:
            with stopwatch("teacher"):
                networks = self._networks()
            with root_unsharded(networks):
                with stopwatch("teacher"):
                    taught, base = self._score_teachers(part.method, micro)
                with stopwatch("student"):
                    loss, per_token, importance_b, gap = self._score_student(part.method, micro, taught, base)
                    self._backward(loss * part.weight)
            sums.add(micro, float(loss.detach()), per_token, importance_b)
            sums.gap += gap
        return sums

    @staticmethod
    def _reduced(selected: Selected, sums: _Sums, kept: float) -> PartResult:
        """The part's result over all ranks; ``kept`` is the share of the weights that took passes."""
        own = {"loss": sums.loss, "importance": sums.importance, "weighed": sums.weighed}
        total = all_reduce_sum(sums.statistics | own)
        loss, importance = total.pop("loss"), total.pop("importance") / max(1, total.pop("weighed"))
        gap = None if selected.part.method.importance_cap is None else sum(all_gather([sums.gap]), SamplerGap())
        means = {name: value / kept for name, value in total.items()}
        return PartResult(selected, loss, means, importance, all_gather(sums.non_finite), gap)

    def _networks(self) -> list[torch.nn.Module]:
        """All networks that process a micro-batch, once the last update of the teachers is done."""
        for teacher in self.teachers.values():
            teacher.wait()
        return [self.loaded.model, *(network for teacher in self.teachers.values() for network in teacher.networks)]

    def _score_teachers(self, method: Method, micro: Weighed) -> tuple[_Scored | None, _Scored | None]:
        """Run teacher and base, each on its own prompts; None for each that the method lacks."""
        taught = base = None
        contexts = [c.example.teacher_ids or [] for c in micro.completions]
        if not all(contexts) and (method.teacher or method.base_sees_context):
            source = micro.completions[contexts.index([])].example.demonstration.source
            raise UserError(
                f"method {self.config.method!r}: slot 'select': a sample of {source} has no context for the teacher; "
                "set teacher_ids of its example, or do not select it"
            )
        if method.teacher:
            taught = self._score(method.teacher, contexts, micro, self.prefix_caches.get(method.teacher))
        if method.needs_base:
            base = self._score(FROZEN, contexts if method.base_sees_context else micro.prompts, micro)
        return taught, base

    def _score(
        self,
        rule: TeacherRule,
        contexts: Sequence[Sequence[int]],
        micro: Weighed,
        prefix_cache: PrefixCache | None = None,
    ) -> _Scored:
        with self.teachers[rule].model() as network, cached_casts(network), self.accelerator.autocast():
            output = self.forward_pass(network, contexts, micro.ids, prefix_cache)
            return output.hidden_ND[micro.has_weight_N(self.loaded.device)], output.head

    def _score_student(
        self, method: Method, micro: Weighed, taught: _Scored | None, base: _Scored | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None, SamplerGap]:
        """The micro-batch's differentiable loss, its per-token statistics (n,), its importance weights (b,) and gap."""
        device, factor_b, importance_b, gap = self.loaded.device, micro.factor_b, None, SamplerGap()
        mean_n: Tensor | float = 1.0
        has_weight_N = micro.has_weight_N(device)
        set_recomputing(self.loaded.model, bool(self.config.gradient_checkpointing))
        with self.accelerator.autocast():
            output = self.forward_pass(self.loaded.model, micro.prompts, micro.ids)
            tokens_N = torch.tensor([token for ids in micro.ids for token in ids], device=device)
            if method.importance_cap is not None:
                importance_b, gap = self._importance(output, tokens_N, micro, method)
                factor_b = factor_b * importance_b
            weights_N = (micro.weights_bT * factor_b[:, None])[micro.mask_bT].float().to(device)
            hidden_nD, tokens_n, weights_n = (x[has_weight_N] for x in (output.hidden_ND, tokens_N, weights_N))
            if method.relative_weights:
                student = replace(output, hidden_ND=hidden_nD)
                mean_n = self._mean_factor(method, student, tokens_n, taught, base, micro)
            torch.clear_autocast_cache()  # older PyTorch would reuse a cast of the head made without gradients
            loss, per_token = chunked_loss(
                method.loss,
                hidden_nD,
                output.head,
                output.head_parameters,
                tokens_n,
                weights_n / mean_n,
                taught,
                chunk_size=output.chunk_tokens,
                base=base,
                weighting=method.weighting,
            )
        return loss, per_token | {"loss": per_token["loss"] / mean_n}, importance_b, gap

    @staticmethod
    @torch.no_grad()
    def _mean_factor(
        method: Method,
        student: ForwardOutput,
        tokens_n: Tensor,
        taught: _Scored | None,
        base: _Scored | None,
        micro: Weighed,
    ) -> Tensor:
        """For each token (n,) the mean of the method's weighting over its completion; above 0."""
        _, statistics = chunked_loss(
            CrossEntropy(),
            student.hidden_ND,
            student.head,
            (),
            tokens_n,
            torch.ones(len(tokens_n), device=tokens_n.device),
            taught,
            chunk_size=student.chunk_tokens,
            base=base,
            weighting=method.weighting,
        )
        factor_n = statistics["factor"]
        count_b = (micro.weights_bT > 0).sum(dim=1).to(factor_n.device)
        mean_b = torch.stack([own_n.mean() for own_n in factor_n.split(count_b.tolist())])
        return torch.where(mean_b > 0, mean_b, 1.0).repeat_interleave(count_b)

    def _backward(self, loss: Tensor) -> None:
        # FSDP averages gradients over the ranks, but the loss is a sum over them.
        times = self.accelerator.num_processes if is_sharded(self.loaded.model) else 1
        self.accelerator.backward(loss * times)
        self.loaded.model.eval()

    @torch.no_grad()
    def _importance(
        self, output: ForwardOutput, tokens_N: Tensor, micro: Weighed, method: Method
    ) -> tuple[Tensor, SamplerGap]:
        """Truncated importance weights (b,), with both policies at the sampling temperature, and their tokens' gap.

        A completion that was not sampled has weight 1.
        """
        assert method.importance_cap is not None
        sampling = method.sequence.sampling
        temperature = self.config.temperature if sampling is None else sampling.temperature

        def tempered_head(hidden_ND: Tensor) -> Tensor:
            return output.head(hidden_ND).float() / temperature

        ones_N = torch.ones(len(tokens_N), device=tokens_N.device)
        _, statistics = chunked_loss(
            CrossEntropy(), output.hidden_ND, tempered_head, (), tokens_N, ones_N, chunk_size=output.chunk_tokens
        )
        student = statistics["student_logp"].cpu().split([len(ids) for ids in micro.ids])
        width = micro.mask_bT.shape[1]
        pad = torch.nn.functional.pad
        pairs = list(zip(micro.completions, student, micro.has_weight_b.tolist(), strict=True))
        sampled = [own if c.logps is None else torch.tensor(c.logps) for c, own, _ in pairs]
        alike = [(c, own) for c, own, is_learnt in pairs if is_learnt and c.logps and not c.guided]
        gap = SamplerGap.of([(own - torch.tensor(c.logps))[c.is_own] for c, own in alike])
        student_bT, sampled_bT = (
            torch.stack([pad(logp, (0, width - len(logp))) for logp in logps]) for logps in (student, sampled)
        )
        return importance_weights(student_bT, sampled_bT, micro.weights_bT > 0, method.importance_cap), gap
