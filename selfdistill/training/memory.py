"""The memory of a run, planned from config.json before any weights are read.

Every number is the size of tensors that the run will hold, W bytes of weights, P trained ones among them:

    weights    W: the model in its data type, tied weights once; with LoRA also the factors, in float32; with
               load_in_4bit 0.516 bytes per weight of its linear layers
    teacher    full: W for a copy; LoRA: the factors
    average    full: 4 bytes per weight for the float32 average of bfloat16 weights, which on a GPU is in host memory,
               as are the parts in which it is moved; elsewhere, the float32 copy of such a part is there while the next
               step samples
    moments    of AdamW: 8 bytes per trained weight, or 2 with adamw_8bit
    contexts   cached keys and values of a frozen teacher's contexts
    pictures   features that a frozen vision tower made of the rows' pictures
    drift      the base's logits, with which the drift is measured
    gradients  P, from the first micro-batch on, or as far as the backward pass has come

    engine     its key/value cache and a copy of the weights; on a GPU only while it samples

:mod:`selfdistill.training.traced_step` counts what a step adds, in three phases that do not overlap, and what
a method draws before the first step. So the peak is that of the largest phase:

    drawing    like sampling, plus the other model if another one samples; without moments, contexts and drift

    sampling   casts of the weights, keys and values, workspace; also after other prompts, such as those with a guide
    teacher    casts, activations without gradient
    student    casts, activations, loss (logits of a chunk and the head's gradient), gradients

Not counted: evaluations on ``test``, fragmentation of a caching allocator, and a GPU's context.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selfdistill.config import TrainConfig
from selfdistill.data import Demonstration
from selfdistill.errors import UserError
from selfdistill.evaluation import DRIFT_PROMPTS, DRIFT_TOKENS
from selfdistill.model import (
    LoadedModel,
    TeacherRule,
    alike_layers,
    can_checkpoint,
    checkpoint_activations,
    fake_model,
    freeze_vision,
    has_full_attention,
    moment_bytes,
    refuse_unlike,
    set_compute_dtype,
    staging_bytes,
    tensor_bytes,
    unwrap,
    weight_tensors,
)
from selfdistill.runtime import quiet_logger
from selfdistill.training.memory_result import GIB, MIB, MemoryPlan, Phase
from selfdistill.training.planned_caches import contexts_bytes, features_bytes
from selfdistill.training.planned_parts import characters, longest_lengths, planned_methods, planned_stages
from selfdistill.training.rates import Rates
from selfdistill.training.setup import chosen_rows, keeps_contexts, teacher_rules
from selfdistill.training.sharding import Sharding
from selfdistill.training.step_time import TimePlan, time_plan
from selfdistill.training.traced_step import (
    Bytes,
    Device,
    PlannedPart,
    Segments,
    TracedStep,
    arithmetic,
    autocast,
    sampled_together,
)

TIMED_ROWS = 64
"""Most rows, of all lengths, whose average determines the time of a step."""
FEW_LAYERS = (2, 3)
"""Numbers of layers to trace if all layers are alike; from there a peak grows in proportion."""
_Trace = tuple[dict[str, Bytes], Bytes, str | None]
"""What a step's phases add to permanent memory, what is cached for later steps, and why there is neither, if so."""


class MemoryPlanner:
    """Plans runs that differ in settings, on the same model and rows.

    Args:
        config: settings of a run.
        demonstrations: its rows.
        device: what it is planned for.
        loaded: the model, if already loaded.

    Raises:
        UserError: the model's files cannot be used, or no row fits.
    """

    def __init__(
        self,
        config: TrainConfig,
        demonstrations: Sequence[Demonstration],
        device: Device,
        loaded: LoadedModel | None = None,
    ) -> None:
        self._device, self._loaded = device, loaded
        self.has_model = loaded is not None
        """Whether the model is already loaded."""
        self._rows = sorted(chosen_rows(demonstrations, config), key=characters, reverse=True)
        self.has_pictures = any(row.images for row in self._rows)
        """Whether any row has a picture."""
        self._models: dict[tuple[Any, ...], LoadedModel] = {}
        self._plans: dict[tuple[str, bool], MemoryPlan] = {}
        self._traces: dict[tuple[str, bool], _Trace] = {}
        self._sampled: dict[Hashable, Segments] = {}
        self._teachers: dict[str, LoadedModel] = {}
        self.can_checkpoint = can_checkpoint(self._model(config).model)
        """Whether the model can recompute activations."""
        self._others(config)
        planned_stages(config, self._rows, self._model(config), config.batch_size)

    def plan(self, config: TrainConfig, *, least: bool = False) -> MemoryPlan:
        """Plan a run with these settings; the same settings are planned once.

        Args:
            config: the settings.
            least: the minimum that every step needs: the shortest rows and samples of one token.
        """
        key = (config.model_dump_json(), least)
        if key not in self._plans:
            self._plans[key] = self._plan(config, least)
        return self._plans[key]

    def _plan(self, config: TrainConfig, least: bool) -> MemoryPlan:
        device, loaded = self.device(config), self._model(config)
        rows = self._rows[::-1] if least else self._rows
        stages = planned_stages(config, rows, loaded, config.batch_size, least=least)
        others = self._others(config)
        tasks = [parts[0].method for parts in stages]
        cached = list({task.teacher for task in tasks if task.teacher and keeps_contexts(config, task)})
        if self.has_pictures or not has_full_attention(loaded.model.config.get_text_config()):
            cached = []
        sharding = Sharding.of(config, device, loaded, others) if config.fsdp else None
        key = (config.model_dump_json(exclude={"optim"}), least)  # the moments are no part of a trace
        if key not in self._traces:
            self._traces[key] = self._trace(config, stages, others, cached, sharding)
        added, cached_bytes, untraced = self._traces[key]
        traced, permanent = dict(added), self.permanent(config) + cached_bytes
        if config.engine != "none" and device.kind == "cuda":
            traced["sampling"] = Bytes({"engine": _engine_bytes(config, device, loaded)})
            if sharding:  # sends one gathered weight at a time
                traced["sampling"]["casts"] = sharding.largest
        averaged, host = _averaged(config, loaded), 0
        if _is_on_host(config, device):
            host = _total_average(averaged) + 3 * staging_bytes(averaged)
        elif "sampling" in traced:  # meanwhile a thread moves the average
            moved = Bytes({"average": 2 * staging_bytes(averaged, device.shares(config))})
            traced["sampling"] = traced["sampling"] + moved
        before = Bytes({name: permanent[name] for name in permanent if name not in ("moments", "contexts", "drift")})
        phases = tuple(
            Phase(name, (before if name == "drawing" else permanent) + size) for name, size in traced.items()
        )
        return MemoryPlan(config, device, phases, longest_lengths(stages), _dtype(loaded), untraced, host)

    def _trace(
        self,
        config: TrainConfig,
        stages: list[list[PlannedPart]],
        others: dict[TeacherRule, LoadedModel],
        cached: Sequence[TeacherRule],
        sharding: Sharding | None,
    ) -> _Trace:
        device = self.device(config)
        try:
            with quiet_logger("torch._subclasses.fake_tensor", logging.CRITICAL):  # the plan reports failures
                models, sampled = self._traced_models(config), self._sampled
                steps = [TracedStep(config, device, model, others, cached, sampled) for model in models]
                layers, samplers = len(alike_layers(self._model(config))), self._samplers(config)
                phases = _phases(config, device, steps, stages, samplers, layers, sharding)
                loaded, cache = self._model(config), config.teacher_cache_mib * MIB
                networks = {rule: others.get(rule, loaded) for rule in cached}
                with autocast(device):
                    contexts = contexts_bytes(networks, stages, len(self._rows), cache)
                    pictures = features_bytes(loaded, stages, self._rows, 1 + len(others))
                return phases, Bytes({"contexts": contexts, "pictures": pictures}), None
        except UserError:  # of a method of the user's
            raise
        except Exception as error:  # whatever a model's code makes of tensors without data
            untraced = f"what a step adds, because this model does not run without data ({type(error).__name__})"
            return {"step": sharding("step", Bytes()) if sharding else Bytes()}, Bytes(), untraced

    def time(self, config: TrainConfig, rates: Rates) -> TimePlan:
        """Rough time of a run with these settings on a device with these rates."""
        loaded, others = self._model(config), self._others(config)
        spread = self._rows[:: math.ceil(len(self._rows) / TIMED_ROWS)]
        stages = planned_stages(config, spread, loaded, TIMED_ROWS)
        return time_plan(config, self.device(config), loaded, others, stages, rates, len(self._rows))

    def arithmetic(self, config: TrainConfig) -> str:
        """``bf16`` or ``no``: in which numbers a run with these settings multiplies."""
        return arithmetic(_dtype(self._model(config)), self.device(config).mixed_precision)

    def _traced_models(self, config: TrainConfig) -> list[LoadedModel]:
        """The models to trace: with a few layers if all are alike, which takes less time."""
        loaded = self._model(config)
        if len(alike_layers(loaded)) <= max(FEW_LAYERS) or config.teacher_model:
            return [loaded]
        return [self._model(config, layers) for layers in FEW_LAYERS]

    def device(self, config: TrainConfig) -> Device:
        """The device, in the arithmetic of these settings."""
        if config.mixed_precision == "auto":
            return self._device
        return replace(self._device, mixed_precision=config.mixed_precision)

    def permanent(self, config: TrainConfig) -> Bytes:
        """Permanent memory, by component, without what is cached for later steps."""
        return _permanent(config, self.device(config), self._model(config), self._others(config))

    def _others(self, config: TrainConfig) -> dict[TeacherRule, LoadedModel]:
        """Separate teachers, by their rules."""
        names = {rule: rule.model for rule in teacher_rules(planned_methods(config)) if rule.model is not None}
        return {rule: self._other(name, config) for rule, name in names.items()}

    def _samplers(self, config: TrainConfig) -> dict[str, LoadedModel]:
        """Models other than the student that sample before the first step, by name."""
        drawn = [method.drawn for method in planned_methods(config) if method.drawn]
        return {name: self._other(name, config) for samples in drawn for name in samples.others}

    def _other(self, name: str, config: TrainConfig) -> LoadedModel:
        if name not in self._teachers:
            fake = fake_model(name, dtype=config.dtype, trained=False)
            refuse_unlike(name, fake.model.config, fake.tokenizer, self._model(config), reads_chats=True)
            self._teachers[name] = fake
        return self._teachers[name]

    def _model(self, config: TrainConfig, layers: int | None = None) -> LoadedModel:
        computed = (config.dtype, config.load_in_4bit, bool(config.gradient_checkpointing))
        key = (*computed, config.lora_rank, config.train_vision_tower, layers)
        if key not in self._models:
            like = next(iter(self._models.values()), self._loaded)
            loaded = fake_model(
                config.model,
                dtype="auto" if self._loaded else config.dtype,
                adapter_base=config.adapter_base,
                lora_rank=config.lora_rank,
                like=like,
                layers=layers,
                load_in_4bit=config.load_in_4bit,
            )
            if config.load_in_4bit and self.device(config).mixed_precision == "bf16":
                set_compute_dtype(loaded.model, torch.bfloat16)
            if loaded.pictures is not None:
                loaded.pictures.keep_features(not config.train_vision_tower)
                if not config.train_vision_tower:
                    freeze_vision(loaded.model)
            if config.gradient_checkpointing:
                checkpoint_activations(loaded.model)
            self._models[key] = loaded
        return self._models[key]


def _permanent(
    config: TrainConfig,
    device: Device,
    loaded: LoadedModel,
    others: dict[TeacherRule, LoadedModel],
) -> Bytes:
    """Permanent memory, without what is cached for later steps."""
    model, shares = loaded.model, device.shares(config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    rules = teacher_rules(planned_methods(config))
    averaged = [] if _is_on_host(config, device) else _averaged(config, loaded)
    teachers = sum(_teacher_bytes(config, rule, loaded, others) for rule in rules)
    vocabulary = model.config.get_text_config().vocab_size
    permanent = Bytes(
        {
            "weights": tensor_bytes(weight_tensors(model)) // shares,
            "moments": moment_bytes(trained, config.optim) // shares,
            "teacher": teachers // shares,
            "average": _total_average(averaged) // shares + staging_bytes(averaged, shares),
        }
    )
    if config.drift_steps:
        permanent["drift"] = DRIFT_PROMPTS * DRIFT_TOKENS * vocabulary * 4
    if config.engine != "none" and device.kind == "cpu":  # on a GPU it sleeps while the model learns
        permanent["engine"] = _engine_bytes(config, device, loaded)
    return permanent


def _teacher_bytes(
    config: TrainConfig, rule: TeacherRule, loaded: LoadedModel, others: dict[TeacherRule, LoadedModel]
) -> int:
    """Weights that a teacher scores with, beyond the student's; see :class:`selfdistill.model.Teacher`."""
    if rule in others:
        return tensor_bytes(others[rule].model.parameters())
    if config.lora_rank:
        return tensor_bytes(p for p in loaded.model.parameters() if p.requires_grad) if rule.moves else 0
    if rule.kind == "live":
        return 0
    moving = (p for p in loaded.model.parameters() if p.requires_grad)  # it shares the frozen ones
    return tensor_bytes((*moving, *loaded.model.buffers()))


def has_moving_teacher(config: TrainConfig) -> bool:
    """Whether a teacher of a run with these settings follows the student."""
    return any(rule.moves for rule in teacher_rules(planned_methods(config)))


def _averaged(config: TrainConfig, loaded: LoadedModel) -> list[Tensor]:
    """The weights of which a teacher keeps a float32 average, in addition to those that score.

    It is moved in parts of ``staging_bytes``, of which a float32 copy is made, with twice their size.
    """
    if config.lora_rank or not has_moving_teacher(config):
        return []
    return [p for p in loaded.model.parameters() if p.requires_grad and p.dtype != torch.float32]


def _total_average(averaged: Sequence[Tensor]) -> int:
    return 4 * sum(weight.numel() for weight in averaged)


def _dtype(loaded: LoadedModel) -> torch.dtype:
    """Data type of a model's weights, or of those that its 4-bit weights stand for."""
    found: torch.dtype = unwrap(loaded.model).dtype
    return found


def _is_on_host(config: TrainConfig, device: Device) -> bool:
    """Whether such an average is in host memory rather than the device's."""
    return device.kind == "cuda" and not config.fsdp


def _engine_bytes(config: TrainConfig, device: Device, loaded: LoadedModel) -> int:
    """The engine's key/value cache, and its copy of the weights in the arithmetic of training; servers have theirs."""
    if config.engine_url:
        return 0
    size = 2 if device.mixed_precision == "bf16" else _dtype(loaded).itemsize
    count = sum(p.numel() for name, p in loaded.model.named_parameters() if ".lora_" not in name)
    return int(config.engine_memory_gib * GIB) + size * count


def _phases(
    config: TrainConfig,
    device: Device,
    steps: Sequence[TracedStep],
    stages: list[list[PlannedPart]],
    samplers: dict[str, LoadedModel],
    layers: int,
    sharding: Sharding | None,
) -> dict[str, Bytes]:
    """What each phase of a step adds at its peak, in its largest part and segment."""
    found: dict[str, Bytes] = {}
    for parts in stages:
        sizes = [part.rows(config, device) for part in parts]
        size = max(1, math.ceil(sum(sizes) / config.micro_batches))
        traced: list[list[Segments]] = []
        for part in parts:
            if part.method.drawn and (config.engine == "none" or part.method.drawn.others):
                traced.append([step.drawing(part, samplers) for step in steps])
        if config.engine == "none":
            traced += [[step.sampling(alike) for step in steps] for alike in sampled_together(parts)]
        for number, (part, own) in enumerate(zip(parts, sizes, strict=True)):
            traced.append([step.learning(part, min(size, own), again=number > 0 or own > size) for step in steps])
        for peaks in traced:
            for (phase, _), whole in _extrapolated(peaks, layers).items():
                added = sharding(phase, whole) if sharding else whole
                found[phase] = max(found.get(phase, Bytes()), added, key=lambda added: added.total())
    return found


def _extrapolated(peaks: Sequence[Segments], layers: int) -> Segments:
    """The peaks with all layers, extrapolated from those with ``FEW_LAYERS``; a single one already has all."""
    if len(peaks) == 1:
        return peaks[0]
    few, more = FEW_LAYERS
    found: Segments = {}
    for segment, fewer in peaks[0].items():
        other = peaks[1][segment]
        slopes = {name: (other[name] - fewer[name]) / (more - few) for name in fewer | other}
        found[segment] = Bytes({name: round(fewer[name] + (layers - few) * slope) for name, slope in slopes.items()})
    return found
