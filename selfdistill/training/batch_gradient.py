"""The gradient of one optimizer batch: score, diverge, weigh, add up.

Legend: B completions of a batch, b those of a part, T completion tokens, N completion tokens of a part without padding,
D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

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
from selfdistill.methods.sequences import Completion
from selfdistill.methods.slots import Method
from selfdistill.model import (
    KeptContexts,
    LoadedModel,
    Scorer,
    Scores,
    Teacher,
    casts_kept,
    is_sharded,
    outside_layers_whole,
)
from selfdistill.runtime import add_gradients, add_up, gather, share
from selfdistill.training.checkpoint import trained_parameters


@dataclass(frozen=True)
class BatchResult:
    """Sums over one optimizer batch's parts."""

    loss: float
    statistics: dict[str, float]
    """Weighted sums over the kept tokens of the per-token statistics."""
    importance: float
    reward: float | None
    unsound: list[str]
    """Places of the rows whose loss is not finite."""
    teacher_s: float
    student_s: float


def sound(values: Tensor) -> bool:
    """Whether every number is finite."""
    return bool(values.isfinite().all())


@dataclass(frozen=True)
class BatchGradient:
    """What scores and differentiates the batches of one run."""

    config: TrainConfig
    accelerator: Accelerator
    loaded: LoadedModel
    """The student."""
    chat: ChatFormat
    scorer: Scorer
    teacher: Teacher | None
    base: Teacher | None
    """The model as it was before training, where a target asks for it."""
    kept: KeptContexts | None

    def add(self, method: Method, completions: Sequence[Completion]) -> BatchResult:
        """Add the gradient of the batch's loss, in ``gradient_accumulation_steps`` parts of each process's share.

        The weights of tokens come from the whole batch, so the number of parts and processes changes no result.
        """
        config, device = self.config, self.loaded.device
        lengths = [len(c.ids) for c in completions]
        mask_BT = completion_mask(lengths, max(lengths))
        weights_BT = token_weights(
            mask_BT, skip_first_tokens=method.skip_first_tokens, normalisation=config.loss_normalisation
        )
        rewards = method.reward(completions, self.chat) if method.reward else []
        factor_B = torch.tensor(group_advantages(rewards, method.group_size) if rewards else [1.0] * len(completions))
        own = share(len(completions))
        size = max(1, math.ceil((own.stop - own.start) / config.gradient_accumulation_steps))
        loss, importance, teacher_s, student_s = 0.0, 0.0, 0.0, 0.0
        statistics: dict[str, float] = {}
        unsound: list[str] = []
        sharded = is_sharded(self.loaded.model)
        teachers = [teacher for teacher in (self.teacher, self.base) if teacher]
        networks = [self.loaded.model, *(network for teacher in teachers for network in teacher.networks)]
        for start in range(own.start, own.stop, size):
            rows = slice(start, min(start + size, own.stop))
            part, mask_bT, weights_bT, factor_b = completions[rows], mask_BT[rows], weights_BT[rows], factor_B[rows]
            ids, prompts = [c.ids for c in part], [c.row.student_ids for c in part]
            plain_N = weights_bT[mask_bT].to(device)
            kept_N = plain_N > 0
            began = self.clock()
            with outside_layers_whole(networks):
                taught, based = None, None
                if method.teacher and self.teacher:
                    taught = self._scored(self.teacher, [c.row.teacher_ids or [] for c in part], ids, kept_N, self.kept)
                if self.base:
                    based = self._scored(self.base, prompts, ids, kept_N)
                now = self.clock()
                teacher_s, began = teacher_s + now - began, now
                self.loaded.model.train(config.gradient_checkpointing)
                with self.accelerator.autocast():
                    scores = self.scorer(self.loaded.model, prompts, ids)
                    tokens_N = torch.tensor([t for row in ids for t in row], device=device)
                    if method.importance_cap is not None and part[0].logps is not None:
                        ratio_b = self._importance(scores, tokens_N, part, weights_bT > 0, method.importance_cap)
                        importance += float(ratio_b.sum())
                        factor_b = factor_b * ratio_b
                    weights_N = (weights_bT * factor_b[:, None])[mask_bT].float().to(device)
                    value, per_token = chunked_loss(
                        method.loss,
                        scores.hidden_ND[kept_N],
                        scores.head,
                        scores.head_parameters,
                        tokens_N[kept_N],
                        weights_N[kept_N],
                        *(taught or (None, None)),
                        base=based,
                        weighting=method.weighting,
                    )
                times = self.accelerator.num_processes if sharded else 1  # of sharded gradients the mean is taken
                self.accelerator.backward(value * times)
            self.loaded.model.eval()
            student_s += self.clock() - began
            loss += float(value.detach())
            if not math.isfinite(loss):
                per_row = per_token["loss"].split((weights_bT > 0).sum(dim=1).tolist())
                unsound += [c.row.demonstration.source for c, x in zip(part, per_row, strict=True) if not sound(x)]
            for key, values_N in per_token.items():
                statistics[key] = statistics.get(key, 0.0) + float((values_N * plain_N[kept_N]).sum())
        began = self.clock()
        if not sharded:
            add_gradients(trained_parameters(self.loaded.model).values())
        sums = add_up(statistics | {"loss": loss, "importance": importance})
        student_s += self.clock() - began
        loss, importance = sums.pop("loss"), sums.pop("importance") / len(completions)
        reward = sum(rewards) / len(rewards) if rewards else None
        return BatchResult(loss, sums, importance, reward, gather(unsound), teacher_s, student_s)

    def _scored(
        self,
        teacher: Teacher,
        contexts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        kept_N: Tensor,
        kept: KeptContexts | None = None,
    ) -> tuple[Tensor, Head]:
        """What a model without gradient says of the kept tokens: hidden states and head."""
        with teacher.model() as network, casts_kept(network), self.accelerator.autocast():
            scores = self.scorer(network, contexts, completions, kept)
            return scores.hidden_ND[kept_N], scores.head

    @torch.no_grad()
    def _importance(
        self, scores: Scores, tokens_N: Tensor, part: Sequence[Completion], kept_bT: Tensor, cap: float
    ) -> Tensor:
        """Truncated importance weights (b,), both sides at the sampling temperature."""
        scaled = lambda hidden_nD: scores.head(hidden_nD).float() / self.config.temperature  # noqa: E731
        ones_N = torch.ones(len(tokens_N), device=tokens_N.device)
        _, statistics = chunked_loss(CrossEntropy(), scores.hidden_ND, scaled, (), tokens_N, ones_N)
        student = statistics["student_logp"].cpu().split([len(c.ids) for c in part])
        width = kept_bT.shape[1]
        pad = torch.nn.functional.pad
        student_bT = torch.stack([pad(s, (0, width - len(s))) for s in student])
        sampled_bT = torch.stack([pad(torch.tensor(c.logps or []), (0, width - len(c.ids))) for c in part])
        return importance_weights(student_bT, sampled_bT, kept_bT, cap)

    def clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        return time.monotonic()
