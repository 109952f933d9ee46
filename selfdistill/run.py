"""One run and one optimizer step of it: sample, score, diverge, update.

A method fills the slots; nothing here asks for its name.

Legend: B completions of a batch, T completion tokens, N completion tokens of a part without padding, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from selfdistill.checkpoint import trained_parameters
from selfdistill.config import TrainConfig
from selfdistill.contexts import ChatFormat, encode, parse_context
from selfdistill.demonstrations import Demonstration, load_demonstrations
from selfdistill.distances import Drift
from selfdistill.divergence import CrossEntropy
from selfdistill.errors import UserError
from selfdistill.examiner import Examiner
from selfdistill.fused import chunked_loss
from selfdistill.guards import check_finite
from selfdistill.methods import METHODS
from selfdistill.methods.slots import Completion, Method
from selfdistill.models import CompiledLayers, add_lora, casts_kept, load_model, resolved_precision
from selfdistill.prefixes import KeptContexts
from selfdistill.schedule import batch_rows, learning_rate
from selfdistill.scores import Scorer
from selfdistill.teacher import Teacher
from selfdistill.tracking import say
from selfdistill.weights import check_skip, completion_mask, importance_weights, token_weights


@dataclass(frozen=True)
class StepResult:
    """Sums over one optimizer step's parts."""

    loss: float
    statistics: dict[str, float]
    """Weighted sums over the kept tokens of the per-token statistics."""
    importance: float
    teacher_s: float
    student_s: float


class Run:
    """Everything that lives as long as one run: model, teacher, method, encoded rows, optimizer.

    Args:
        config: resolved settings (a context that is not ``auto``).
        demonstrations: rows, where the caller has them already; else ``config.data`` is read.
        examiner: measures the model, where the caller has one for several runs; else made where ``config.test`` is set.
    """

    def __init__(
        self,
        config: TrainConfig,
        demonstrations: Sequence[Demonstration] | None = None,
        examiner: Examiner | None = None,
    ) -> None:
        precision = resolved_precision(config.mixed_precision)
        AcceleratorState._reset_state()  # it would refuse another precision than the process's first run had
        tracker = None if config.report_to == "none" else config.report_to
        self.accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=config.output_dir)
        if self.accelerator.num_processes > 1:
            raise UserError("training on several processes is not supported yet: start a single one")
        self.method: Method = METHODS[config.method](config)
        context = parse_context(config.context) if self.method.teacher else None
        if demonstrations is None:
            demonstrations = load_demonstrations(config.data, split=config.split)
        self.loaded = load_model(config.model, dtype=config.dtype, merge_adapter=True)
        for note in self.loaded.notes:
            say(f"note: {note}")
        self.chat = ChatFormat(self.loaded.tokenizer, self.loaded.end_token_ids, config.chat_template_kwargs)
        self.rows, self.dropped = encode(
            demonstrations,
            context,
            self.chat,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            window=self.loaded.window,
            on_long_prompt=config.on_long_prompt,
            completion_must_fit=self.method.trains_on_demonstration,
        )
        check_skip(
            self.method.skip_first_tokens,
            [min(len(row.completion_ids), config.max_completion_length) for row in self.rows],
        )
        steps = math.ceil(len(self.rows) * config.num_train_epochs / config.batch_size)
        self.config = config.model_copy(
            update={
                "max_steps": config.max_steps or steps,
                "learning_rate": config.learning_rate or (1e-4 if config.lora_rank else 1e-5),
                "lora_alpha": config.lora_alpha or (2.0 * config.lora_rank if config.lora_rank else None),
                "mixed_precision": precision,
            }
        )
        self._prepare()
        self.examiner = examiner or (Examiner(self.config, self.loaded) if config.test is not None else None)

    def _prepare(self) -> None:
        config, model = self.config, self.loaded.model
        model.to(self.accelerator.device)
        if config.lora_rank:
            add_lora(self.loaded, config.lora_rank, config.lora_alpha, config.seed)
            model = self.loaded.model
        self.teacher: Teacher | None = None
        if self.method.teacher:
            self.teacher = Teacher(
                self.loaded, self.method.teacher, ema_rate=config.ema_rate, snapshot_steps=config.snapshot_steps
            )
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        with self.accelerator.autocast():
            compiled = CompiledLayers(self.loaded) if config.torch_compile else None
        self.scorer = Scorer(self.loaded, compiled)
        self.kept: KeptContexts | None = None
        if self.method.teacher == "frozen":
            contexts = [row.teacher_ids or [] for row in self.rows]
            self.kept = self.scorer.keep(contexts, config.teacher_cache_mib * 2**20)
        self.drift: Drift | None = None
        if config.drift_steps:
            with self.accelerator.autocast():
                self.drift = Drift(self.loaded, self.scorer, self.chat)
        self.parameters = list(trained_parameters(model).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True
        )

    def fingerprint(self) -> str:
        """SHA-256 of every row as student, teacher and method see it: what a resumed run must find unchanged."""
        rows = [[row.student_ids, row.teacher_ids, row.completion_ids] for row in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def describe(self) -> list[str]:
        """What is about to happen, for the start of a run."""
        config, trained = self.config, sum(p.numel() for p in self.parameters)
        lines = [
            f"{config.method} on {len(self.rows)} demonstrations"
            + (f" ({self.dropped} too long, left out)" if self.dropped else "")
            + f", {config.max_steps} steps of {config.batch_size}, learning rate {config.learning_rate:g}",
            f"model: {config.model}, {trained / 1e6:.1f} M weights trained, on {self.loaded.device}"
            + (" with bfloat16 arithmetic" if config.mixed_precision == "bf16" else ""),
        ]
        if self.teacher:
            lines += [self.teacher.describe(), f"context: {config.context}"]
            if self.kept:
                lines.append(
                    f"what it reads is kept for later epochs, as much as fits in {config.teacher_cache_mib} MiB"
                )
        elif unused := [k for k in ("context", "teacher") if getattr(config, k) != TrainConfig.model_fields[k].default]:
            lines.append(f"note: {config.method} has no teacher, so {' and '.join(unused)} will not be used")
        if not self.scorer.fused:
            lines.append("the head is not separable from the model's own logits; they are taken whole (more memory)")
        return lines

    def accumulate(self, completions: Sequence[Completion]) -> StepResult:
        """Add the gradient of the batch's loss, in ``gradient_accumulation_steps`` parts.

        The weights of tokens come from the whole batch, so the number of parts changes no result.
        """
        config, method = self.config, self.method
        lengths = [len(c.ids) for c in completions]
        mask_BT = completion_mask(lengths, max(lengths))
        weights_BT = token_weights(
            mask_BT, skip_first_tokens=method.skip_first_tokens, normalisation=config.loss_normalisation
        )
        size = math.ceil(len(completions) / config.gradient_accumulation_steps)
        loss, importance, teacher_s, student_s = 0.0, 0.0, 0.0, 0.0
        statistics: dict[str, float] = {}
        for start in range(0, len(completions), size):
            part = completions[start : start + size]
            ids = [c.ids for c in part]
            weights_bT = weights_BT[start : start + size]
            kept_N = (weights_bT[mask_BT[start : start + size]] > 0).to(self.loaded.device)
            began = self._clock()
            teacher_hidden_ND, teacher_head = None, None
            if self.teacher is not None:
                with self.teacher.model() as network, casts_kept(network), self.accelerator.autocast():
                    scores = self.scorer(network, [c.row.teacher_ids or [] for c in part], ids, self.kept)
                    teacher_hidden_ND, teacher_head = scores.hidden_ND[kept_N], scores.head
            now = self._clock()
            teacher_s, began = teacher_s + now - began, now
            self.loaded.model.train(config.gradient_checkpointing)
            with self.accelerator.autocast():
                scores = self.scorer(self.loaded.model, [c.row.student_ids for c in part], ids)
                tokens_N = torch.tensor([t for row in ids for t in row], device=self.loaded.device)
                plain_N = weights_bT[mask_BT[start : start + size]].to(self.loaded.device)
                if method.importance_cap is not None and part[0].logps is not None:
                    ratio_B = self._importance(scores.hidden_ND, scores.head, tokens_N, part, weights_bT)
                    importance += float(ratio_B.sum())
                    weights_bT = weights_bT * ratio_B[:, None]
                weights_N = weights_bT[mask_BT[start : start + size]].to(self.loaded.device)
                value, per_token = chunked_loss(
                    method.loss,
                    scores.hidden_ND[kept_N],
                    scores.head,
                    scores.head_parameters,
                    tokens_N[kept_N],
                    weights_N[kept_N],
                    teacher_hidden_ND,
                    teacher_head,
                )
            self.accelerator.backward(value)
            self.loaded.model.eval()
            student_s += self._clock() - began
            loss += float(value.detach())
            for key, values_N in per_token.items():
                statistics[key] = statistics.get(key, 0.0) + float((values_N * plain_N[kept_N]).sum())
        return StepResult(loss, statistics, importance / len(completions), teacher_s, student_s)

    def _drift_of(self, network: Any) -> float:
        assert self.drift is not None
        with casts_kept(network), self.accelerator.autocast():
            return self.drift.of(network)

    def _teacher_drift(self, students: float) -> float:
        """The teacher's distance from where it began, measured only where it is not known: it moves on its own."""
        assert self.teacher is not None
        if self.teacher.kind in ("frozen", "live"):
            return students if self.teacher.kind == "live" else 0.0
        with self.teacher.model() as network:
            return self._drift_of(network)

    def _clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        return time.monotonic()

    @torch.no_grad()
    def _importance(
        self, hidden_ND: Tensor, head: Any, tokens_N: Tensor, part: Sequence[Completion], weights_bT: Tensor
    ) -> Tensor:
        """Truncated importance weights (B,), both sides at the sampling temperature."""
        assert self.method.importance_cap is not None
        scaled = lambda hidden_nD: head(hidden_nD).float() / self.config.temperature  # noqa: E731
        ones_N = torch.ones(len(tokens_N), device=tokens_N.device)
        _, statistics = chunked_loss(CrossEntropy(), hidden_ND, scaled, (), tokens_N, ones_N)
        student = statistics["student_logp"].cpu().split([len(c.ids) for c in part])
        width = weights_bT.shape[1]
        pad = torch.nn.functional.pad
        student_BT = torch.stack([pad(s, (0, width - len(s))) for s in student])
        sampled_BT = torch.stack([pad(torch.tensor(c.logps or []), (0, width - len(c.ids))) for c in part])
        return importance_weights(student_BT, sampled_BT, weights_bT > 0, self.method.importance_cap)

    def step(self, step: int) -> dict[str, float]:
        """Optimizer step ``step`` (from 0); returns its metrics."""
        config, began = self.config, self._clock()
        assert config.max_steps is not None
        assert config.learning_rate is not None
        rows = batch_rows(self.rows, step, config.batch_size, config.seed)
        with casts_kept(self.loaded.model), self.accelerator.autocast():
            completions = self.method.sequence(self.loaded, rows, step)
        rollout_s = self._clock() - began
        rate = learning_rate(
            step,
            peak=config.learning_rate,
            max_steps=config.max_steps,
            warmup_steps=config.warmup_steps,
            kind=config.lr_scheduler_type,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = self.accumulate(completions)
        check_finite(result.loss, "the loss", step + 1, Path(config.output_dir))
        update_began = self._clock()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))
        check_finite(norm, "the gradient's norm", step + 1, Path(config.output_dir))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            self.teacher.update(step + 1)
        drift_began = self._clock()
        metrics: dict[str, float] = {
            "step": step + 1,
            "epoch": (step + 1) * config.batch_size / len(self.rows),
            "loss": result.loss,
            "entropy": result.statistics["entropy"],
            "completion/length": sum(len(c.ids) for c in completions) / len(completions),
            "completion/truncated": sum(c.truncated for c in completions) / len(completions),
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": sum(len(c.ids) for c in completions),
        }
        if self.teacher is not None:
            metrics["kl/forward"] = result.statistics["forward_kl"]
            metrics["kl/reverse"] = result.statistics["reverse_kl"]
        if self.method.importance_cap is not None:
            metrics["importance"] = result.importance
        last = step + 1 == config.max_steps
        if self.drift is not None and (last or (step + 1) % config.drift_steps == 0):
            metrics["drift/student"] = self._drift_of(self.loaded.model)
            if self.teacher is not None:
                metrics["drift/teacher"] = self._teacher_drift(metrics["drift/student"])
        ended = self._clock()
        metrics["time/rollout_s"] = rollout_s
        metrics["time/teacher_s"] = result.teacher_s
        metrics["time/student_s"] = result.student_s
        metrics["time/update_s"] = drift_began - update_began
        metrics["time/drift_s"] = ended - drift_began
        metrics["time/step_s"] = ended - began
        return metrics
