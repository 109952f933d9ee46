"""The gradient of one optimizer batch: weight the tokens, run student and teacher, run backward.

Legend: B completions in the batch, b completions in a part, T completion tokens, N completion tokens of a part without
padding, n those with nonzero weight, D hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from selfdistill.config import TrainConfig
from selfdistill.data import ChatFormat
from selfdistill.loss import (
    CrossEntropy,
    Head,
    chunked_loss,
    completion_mask,
    group_advantages,
    importance_weights,
    token_weights,
)
from selfdistill.methods import Completion, Method
from selfdistill.model import (
    ForwardOutput,
    ForwardPass,
    LoadedModel,
    PrefixCache,
    Teacher,
    cached_casts,
    is_sharded,
    root_unsharded,
)
from selfdistill.runtime import all_gather, all_reduce_gradients, all_reduce_sum, rank_slice
from selfdistill.training.checkpoint import trained_parameters
from selfdistill.training.stopwatch import Stopwatch

_Scored = tuple[Tensor, Head]
"""Hidden states (n, D) of the tokens with nonzero weight, and the head that maps them to logits."""


@dataclass(frozen=True)
class BatchResult:
    """Results of one optimizer batch, over all its parts and ranks."""

    loss: float
    statistics: dict[str, float]
    """Weighted means of per-token statistics over the batch, such as ``entropy``."""
    importance: float
    """Mean importance weight of the completions; 0 if the method has none."""
    reward: float | None
    """Mean reward of the completions; None if the method has none."""
    non_finite: list[str]
    """Sources of the examples with a non-finite loss."""


@dataclass(frozen=True)
class _Part:
    """A micro-batch of completions, with token weights computed over the whole batch."""

    completions: Sequence[Completion]
    mask_bT: Tensor
    weights_bT: Tensor
    """Weight of each token in the batch's loss; the weights sum to 1 over the batch."""
    factor_b: Tensor
    """Factor on each completion's weights: its advantage, or 1."""

    @property
    def ids(self) -> list[list[int]]:
        return [c.ids for c in self.completions]

    @property
    def prompts(self) -> list[list[int]]:
        return [c.example.student_ids for c in self.completions]

    def has_weight_N(self, device: torch.device) -> Tensor:
        """Mask of the part's tokens with nonzero weight."""
        return self.weights_bT[self.mask_bT].to(device) > 0


@dataclass
class _Sums:
    """Running sums over the parts."""

    loss: float = 0.0
    importance: float = 0.0
    statistics: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    non_finite: list[str] = field(default_factory=list)

    def add(self, part: _Part, loss: float, per_token: dict[str, Tensor], importance_b: Tensor | None) -> None:
        """Add one part: its loss, its per-token statistics (n,) and its completions' importance weights (b,)."""
        self.loss += loss
        if importance_b is not None:
            self.importance += float(importance_b.sum())
        has_weight_bT = part.weights_bT > 0
        if not math.isfinite(self.loss):
            losses = per_token["loss"].split(has_weight_bT.sum(dim=1).tolist())
            for completion, loss_n in zip(part.completions, losses, strict=True):
                if not bool(loss_n.isfinite().all()):
                    self.non_finite.append(completion.example.demonstration.source)
        for name, values_n in per_token.items():
            weights_n = part.weights_bT[has_weight_bT].to(values_n.device)
            self.statistics[name] += float((values_n * weights_n).sum())


@dataclass(frozen=True)
class BatchGradient:
    """Computes the gradients of one run's batches."""

    config: TrainConfig
    accelerator: Accelerator
    loaded: LoadedModel
    """The student."""
    chat: ChatFormat
    forward_pass: ForwardPass
    teacher: Teacher | None
    base: Teacher | None
    """The model before training, if the loss's target needs it."""
    prefix_cache: PrefixCache | None
    """Cached states of a frozen teacher's contexts."""

    def add(self, method: Method, completions: Sequence[Completion], stopwatch: Stopwatch) -> BatchResult:
        """Accumulate the gradient of the batch's loss, in ``gradient_accumulation_steps`` parts per rank.

        Token weights are computed over the whole batch, so the numbers of parts and ranks do not change the result.
        """
        parts, reward = self._weigh(method, completions)
        sums = _Sums()
        for part in parts:
            with root_unsharded(self._networks()):
                with stopwatch("teacher"):
                    taught, base = self._score_teachers(method, part)
                with stopwatch("student"):
                    loss, per_token, importance_b = self._score_student(method, part, taught, base)
                    self._backward(loss)
            sums.add(part, float(loss.detach()), per_token, importance_b)
        with stopwatch("student"):
            if not is_sharded(self.loaded.model):
                all_reduce_gradients(trained_parameters(self.loaded.model).values())
            total = all_reduce_sum(sums.statistics | {"loss": sums.loss, "importance": sums.importance})
        loss_sum, importance = total.pop("loss"), total.pop("importance") / len(completions)
        return BatchResult(loss_sum, total, importance, reward, all_gather(sums.non_finite))

    def _weigh(self, method: Method, completions: Sequence[Completion]) -> tuple[list[_Part], float | None]:
        """This rank's share of the batch, in parts, and the mean reward."""
        lengths = [len(c.ids) for c in completions]
        mask_BT = completion_mask(lengths, max(lengths))
        weights_BT = token_weights(
            mask_BT,
            skip_first_tokens=method.skip_first_tokens,
            normalisation=self.config.loss_normalisation,
        )
        factor_B, reward = torch.ones(len(completions)), None
        if method.reward:
            rewards = method.reward(completions, self.chat)
            factor_B = torch.tensor(group_advantages(rewards, method.group_size))
            reward = sum(rewards) / len(rewards)
        own = rank_slice(len(completions))
        size = max(1, math.ceil((own.stop - own.start) / self.config.gradient_accumulation_steps))
        parts = []
        for start in range(own.start, own.stop, size):
            part = slice(start, min(start + size, own.stop))
            parts.append(_Part(completions[part], mask_BT[part], weights_BT[part], factor_B[part]))
        return parts, reward

    def _networks(self) -> list[torch.nn.Module]:
        """All networks that process a part."""
        teachers = [teacher for teacher in (self.teacher, self.base) if teacher]
        return [self.loaded.model, *(network for teacher in teachers for network in teacher.networks)]

    def _score_teachers(self, method: Method, part: _Part) -> tuple[_Scored | None, _Scored | None]:
        """Run the teacher on its own prompts and the base on the student's; None for each that the method lacks."""
        taught = base = None
        if method.teacher and self.teacher:
            contexts = [c.example.teacher_ids or [] for c in part.completions]
            taught = self._score(self.teacher, contexts, part, self.prefix_cache)
        if self.base:
            base = self._score(self.base, part.prompts, part)
        return taught, base

    def _score(
        self, teacher: Teacher, contexts: Sequence[Sequence[int]], part: _Part, cache: PrefixCache | None = None
    ) -> _Scored:
        with teacher.model() as network, cached_casts(network), self.accelerator.autocast():
            output = self.forward_pass(network, contexts, part.ids, cache)
            return output.hidden_ND[part.has_weight_N(self.loaded.device)], output.head

    def _score_student(
        self, method: Method, part: _Part, taught: _Scored | None, base: _Scored | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The part's differentiable loss, its per-token statistics (n,) and its importance weights (b,)."""
        device, factor_b, importance_b = self.loaded.device, part.factor_b, None
        has_weight_N = part.has_weight_N(device)
        # Train mode only enables gradient checkpointing: dropout is disabled.
        self.loaded.model.train(self.config.gradient_checkpointing)
        with self.accelerator.autocast():
            output = self.forward_pass(self.loaded.model, part.prompts, part.ids)
            tokens_N = torch.tensor([token for ids in part.ids for token in ids], device=device)
            if method.importance_cap is not None and part.completions[0].logps is not None:
                importance_b = self._importance(output, tokens_N, part, method.importance_cap)
                factor_b = factor_b * importance_b
            weights_N = (part.weights_bT * factor_b[:, None])[part.mask_bT].float().to(device)
            loss, per_token = chunked_loss(
                method.loss,
                output.hidden_ND[has_weight_N],
                output.head,
                output.head_parameters,
                tokens_N[has_weight_N],
                weights_N[has_weight_N],
                *(taught or (None, None)),
                base=base,
                weighting=method.weighting,
            )
        return loss, per_token, importance_b

    def _backward(self, loss: Tensor) -> None:
        # FSDP averages gradients over the ranks, but the loss is a sum over them.
        times = self.accelerator.num_processes if is_sharded(self.loaded.model) else 1
        self.accelerator.backward(loss * times)
        self.loaded.model.eval()

    @torch.no_grad()
    def _importance(self, output: ForwardOutput, tokens_N: Tensor, part: _Part, cap: float) -> Tensor:
        """Truncated importance weights (b,), with both policies at the sampling temperature."""

        def tempered_head(hidden_ND: Tensor) -> Tensor:
            return output.head(hidden_ND).float() / self.config.temperature

        ones_N = torch.ones(len(tokens_N), device=tokens_N.device)
        _, statistics = chunked_loss(CrossEntropy(), output.hidden_ND, tempered_head, (), tokens_N, ones_N)
        student = statistics["student_logp"].cpu().split([len(ids) for ids in part.ids])
        width = part.mask_bT.shape[1]
        pad = torch.nn.functional.pad
        student_bT = torch.stack([pad(logp, (0, width - len(logp))) for logp in student])
        sampled_bT = torch.stack([pad(torch.tensor(c.logps or []), (0, width - len(c.ids))) for c in part.completions])
        return importance_weights(student_bT, sampled_bT, part.weights_bT > 0, cap)
