"""One run and one optimizer step of it: sample, score, diverge, update.

A method fills the slots; nothing here asks for its name.

Legend: B completions of a batch, T completion tokens, N completion tokens of a part without padding, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from selfdistill.config import TrainConfig
from selfdistill.data import ChatFormat, Demonstration, Encoded, load_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluation import Drift, Examiner, check_answers
from selfdistill.loss import Divergence, check_skip
from selfdistill.methods import METHODS, check_steps, unused_settings, uses
from selfdistill.methods.slots import Method
from selfdistill.model import (
    CompiledLayers,
    KeptContexts,
    LoadedModel,
    Scorer,
    Teacher,
    add_lora,
    casts_kept,
    joined,
    layers_of,
    load_like,
    load_model,
    resolved_precision,
    shard,
    start_fingerprint,
    unwrap,
    weights_fingerprint,
    whole,
)
from selfdistill.runtime import PATIENCE, launched, say, several, wait
from selfdistill.training.batch_gradient import BatchGradient
from selfdistill.training.checkpoint import trained_parameters
from selfdistill.training.schedule import batch_rows, learning_rate


@dataclass
class Stage:
    """A method, or one stage of it, with its rows and its part of the steps."""

    method: Method
    rows: list[Encoded]
    dropped: int
    """Rows left out because they do not fit."""
    first_step: int = 0
    steps: int = 0


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
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise UserError("the launcher's own FSDP was switched on (--use_fsdp): leave it out, and give --fsdp true")
        precision = resolved_precision(config.mixed_precision)
        AcceleratorState._reset_state()  # it would refuse another precision than the process's first run had
        tracker = None if config.report_to == "none" else config.report_to
        self.accelerator = Accelerator(
            mixed_precision=precision,
            log_with=tracker,
            project_dir=config.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        if launched() != self.accelerator.num_processes:
            raise UserError(
                f"{launched()} processes were started and accelerate joins {self.accelerator.num_processes}: on CPUs "
                "set ACCELERATE_USE_CPU=true in the environment; on GPUs give each process its own"
            )
        wait()  # a process that finds a mistake and ends must not be missed by one that is still joining
        parts = self.accelerator.num_processes * config.gradient_accumulation_steps
        if config.fsdp and self.accelerator.num_processes == 1:
            raise UserError(
                "setting 'fsdp' shares a model between processes, and this is one: start several, or give --fsdp false"
            )
        if config.fsdp and config.batch_size % parts:
            raise UserError(
                f"setting 'fsdp' needs parts of one size: batch_size {config.batch_size} is not a multiple of "
                f"{self.accelerator.num_processes} processes times gradient_accumulation_steps "
                f"{config.gradient_accumulation_steps}"
            )
        if demonstrations is None:
            demonstrations = load_demonstrations(config.data, split=config.split)
        if config.num_demonstrations is not None and config.num_demonstrations < len(demonstrations):
            drawn = set(random.Random(config.seed).sample(range(len(demonstrations)), config.num_demonstrations))
            demonstrations = [row for number, row in enumerate(demonstrations) if number in drawn]
        methods = METHODS[config.method](config)
        self.loaded = load_model(config.model, dtype=config.dtype, merge_adapter=True)
        self.began_as = start_fingerprint(self.loaded)
        """Fingerprint of the model's weights and of another teacher's, which a run that goes on must find unchanged."""
        for note in self.loaded.notes:
            say(f"note: {note}")
        self.chat = ChatFormat(self.loaded.tokenizer, self.loaded.end_token_ids, config.chat_template_kwargs)
        self.stages = [Stage(method, *method.rows(demonstrations, self.loaded, self.chat)) for method in methods]
        self.stage = self.stages[0]
        """Of the step at hand."""
        for stage in self.stages:
            if stage.method.reward:
                check_answers([row.demonstration for row in stage.rows], config.scorer)
            check_skip(
                stage.method.skip_first_tokens,
                [min(len(row.completion_ids), config.max_completion_length) for row in stage.rows],
            )
        steps = math.ceil(len(self.stage.rows) * config.num_train_epochs / config.batch_size)
        self.config = config.model_copy(
            update={
                "max_steps": config.max_steps or steps,
                "learning_rate": config.learning_rate or (1e-4 if config.lora_rank else 1e-5),
                "lora_alpha": config.lora_alpha or (2.0 * config.lora_rank if config.lora_rank else None),
                "mixed_precision": precision,
            }
        )
        assert self.config.max_steps is not None
        check_steps(self.config.max_steps, config.method, methods)
        ends = [self.config.max_steps * number // len(self.stages) for number in range(len(self.stages) + 1)]
        for stage, start, end in zip(self.stages, ends[:-1], ends[1:], strict=True):
            stage.first_step, stage.steps = start, end - start
        self._prepare()
        self.examiner = examiner or (Examiner(self.config, self.loaded) if config.test is not None else None)

    def _prepare(self) -> None:
        config, model = self.config, self.loaded.model
        if not config.fsdp:  # else it may be more than the device holds
            model.to(self.accelerator.device)
        elif config.lora_rank and self.loaded.merged_adapter:
            raise UserError("setting 'fsdp' with lora_rank: the model has an adapter already; export it with --merge")
        if config.lora_rank:
            add_lora(self.loaded, config.lora_rank, config.lora_alpha, config.seed)
            model = self.loaded.model
        self.teacher: Teacher | None = None
        kinds = {stage.method.teacher for stage in self.stages if stage.method.teacher}
        assert len(kinds) < 2, "stages share one teacher"
        other = None if config.teacher_model is None else self._other_teacher(config.teacher_model)
        for kind in kinds:
            self.teacher = Teacher(
                self.loaded, kind, ema_rate=config.ema_rate, snapshot_steps=config.snapshot_steps, other=other
            )
        base: Teacher | None = None
        if any(isinstance(s.method.loss, Divergence) and s.method.loss.needs_base for s in self.stages):
            frozen = self.teacher is not None and self.teacher.kind == "frozen" and other is None
            base = self.teacher if frozen else Teacher(self.loaded, "frozen")
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        with self.accelerator.autocast():
            compiled = CompiledLayers(self.loaded) if config.torch_compile else None
        self.scorer = Scorer(self.loaded, compiled, sharded=config.fsdp)
        if config.fsdp:
            self._shard(*([self.teacher] if self.teacher else []), *([base] if base else []))
        for stage in self.stages:
            if stage.method.fixed:
                with self.accelerator.autocast():
                    stage.rows = stage.method.fixed(self.loaded, stage.rows, Path(config.output_dir))
        self.kept: KeptContexts | None = None
        if self.teacher and self.teacher.kind == "frozen" and not config.fsdp:
            contexts = [row.teacher_ids or [] for s in self.stages if s.method.teacher for row in s.rows]
            self.kept = self.scorer.keep(contexts, config.teacher_cache_mib * 2**20)
        self.gradient = BatchGradient(
            config, self.accelerator, self.loaded, self.chat, self.scorer, self.teacher, base, self.kept
        )
        self.drift: Drift | None = None
        if config.drift_steps:
            with whole(model), self.accelerator.autocast():
                self.drift = Drift(self.loaded, self.scorer, self.chat)
        self.parameters = list(trained_parameters(model).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay, fused=True
        )

    def _other_teacher(self, name: str) -> LoadedModel:
        """A model that teaches, of the student's architecture, for it is scored in the same way."""
        other = load_like(name, self.loaded, dtype=self.config.dtype)
        self.began_as += "+" + weights_fingerprint(other.model) if self.began_as else ""
        own, others = (unwrap(model).config.model_type for model in (self.loaded.model, other.model))
        if own != others:
            raise UserError(f"setting 'teacher_model': {name!r} is of the kind {others}, the student of the kind {own}")
        return other

    def _shard(self, *teachers: Teacher) -> None:
        """Cut the student and what scores beside it into shards."""
        device = self.accelerator.device
        dtype = torch.bfloat16 if self.config.mixed_precision == "bf16" else None
        token = torch.tensor([[self.loaded.pad_token_id]], device=device)
        for teacher in teachers:
            teacher.release()
        for network in dict.fromkeys((self.loaded.model, *(n for teacher in teachers for n in teacher.networks))):
            layers = layers_of(self.loaded, network, "fsdp")
            try:
                with self.accelerator.autocast():
                    shard(network, layers, device, lambda model: model(input_ids=token, use_cache=False), dtype)
            except (AssertionError, TypeError, ValueError) as error:
                raise UserError(f"model {self.loaded.name!r} cannot be sharded: {error}; leave fsdp out") from None
        for teacher in teachers:
            teacher.bind()

    def fingerprint(self) -> str:
        """SHA-256 of every row as student, teacher and method see it: what a resumed run must find unchanged."""
        rows = [[row.student_ids, row.teacher_ids, row.completion_ids] for stage in self.stages for row in stage.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def describe(self) -> list[str]:
        """What is about to happen, for the start of a run."""
        config, trained = self.config, sum(p.numel() for p in self.parameters)
        lines = [
            f"{config.method} on {len(stage.rows)} {stage.method.rows.what}"
            + (f" ({stage.dropped} too long, left out)" if stage.dropped else "")
            + f", {stage.steps} steps of {config.batch_size}, learning rate {config.learning_rate:g}"
            for stage in self.stages
        ]
        lines += [
            f"model: {config.model}, {trained / 1e6:.1f} M weights trained, on {self.loaded.device}"
            + (" with bfloat16 arithmetic" if config.mixed_precision == "bf16" else ""),
        ]
        if self.teacher:
            lines += [self.teacher.describe(), *([f"context: {config.context}"] if uses(config, "context") else [])]
            if self.kept:
                lines.append(
                    f"what it reads is kept for later epochs, as much as fits in {config.teacher_cache_mib} MiB"
                )
        if several():
            shares = " and of all weights" if config.fsdp else ""
            lines.append(
                f"{self.accelerator.num_processes} processes, each of which has its share of every batch{shares}"
            )
        if unused := unused_settings(config):
            lines.append(f"note: with these settings {config.method} does not use {', '.join(unused)}")
        if not self.scorer.fused:
            lines.append("the head is not separable from the model's own logits; they are taken whole (more memory)")
        return lines

    def _drift_of(self, network: Any) -> float:
        assert self.drift is not None
        with whole(network), casts_kept(network), self.accelerator.autocast():
            return self.drift.of(network)

    def _teacher_drift(self, students: float) -> float:
        """The teacher's distance from where it began, measured only where it is not known: it moves on its own."""
        assert self.teacher is not None
        if self.teacher.kind in ("frozen", "live"):
            return students if self.teacher.kind == "live" else 0.0
        with self.teacher.model() as network:
            return self._drift_of(network)

    def stage_of(self, step: int) -> tuple[int, Stage]:
        """Number and stage of step ``step`` (from 0)."""
        return next((n, s) for n, s in reversed(list(enumerate(self.stages))) if s.first_step <= step)

    def step(self, step: int) -> dict[str, Any]:
        """Optimizer step ``step`` (from 0); returns its metrics.

        Where the loss or the gradient is not finite the weights and the optimizer stay as they are, and the metrics say
        so in ``skipped``.
        """
        config, began = self.config, self.gradient.clock()
        assert config.max_steps is not None
        assert config.learning_rate is not None
        self.stage = stage = self.stage_of(step)[1]
        method, done = stage.method, step - stage.first_step
        rows = batch_rows(stage.rows, done, config.batch_size, config.seed)
        with self.accelerator.autocast():
            completions = method.sequence(self.loaded, rows, step)
        rollout_s = self.gradient.clock() - began
        rate = learning_rate(
            done,
            peak=config.learning_rate,
            max_steps=stage.steps,
            warmup_steps=config.warmup_steps,
            kind=config.lr_scheduler_type,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = self.gradient.add(method, completions)
        update_began = self.gradient.clock()
        norm = float(joined(torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)))
        skipped = None
        if math.isfinite(result.loss) and math.isfinite(norm):
            self.optimizer.step()
        else:
            sources = [c.row.demonstration.source for c in completions]
            why = f"the gradient's norm is {norm}" if math.isfinite(result.loss) else f"the loss is {result.loss}"
            skipped = {"why": why, "rows": list(dict.fromkeys(result.unsound or sources))}
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            self.teacher.update(step + 1)
        drift_began = self.gradient.clock()
        metrics: dict[str, Any] = {
            "step": step + 1,
            "epoch": (done + 1) * config.batch_size / len(stage.rows),
            "loss": result.loss,
            "entropy": result.statistics["entropy"],
            "completion/length": sum(len(c.ids) for c in completions) / len(completions),
            "completion/truncated": sum(c.truncated for c in completions) / len(completions),
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": sum(len(c.ids) for c in completions),
        }
        if method.teacher is not None:
            metrics["kl/forward"] = result.statistics["forward_kl"]
            metrics["kl/reverse"] = result.statistics["reverse_kl"]
        if method.importance_cap is not None:
            metrics["importance"] = result.importance
        if result.reward is not None:
            metrics["reward"] = result.reward
        last = step + 1 == config.max_steps
        if self.drift is not None and (last or (step + 1) % config.drift_steps == 0):
            metrics["drift/student"] = self._drift_of(self.loaded.model)
            if self.teacher is not None:
                metrics["drift/teacher"] = self._teacher_drift(metrics["drift/student"])
        ended = self.gradient.clock()
        metrics["time/rollout_s"] = rollout_s
        metrics["time/teacher_s"] = result.teacher_s
        metrics["time/student_s"] = result.student_s
        metrics["time/update_s"] = drift_began - update_began
        metrics["time/drift_s"] = ended - drift_began
        metrics["time/step_s"] = ended - began
        if skipped:
            metrics = {key: value for key, value in metrics.items() if math.isfinite(value)} | {"skipped": skipped}
        return metrics
