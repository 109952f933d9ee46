"""The trainer: one optimizer step samples completions, computes the gradient, and updates student and teacher.

The method fills the slots; nothing here depends on its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selfdistill.config import TrainConfig
from selfdistill.data import Demonstration, Example, load_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluation import Distance, Evaluator, drift_from
from selfdistill.methods import Completion, SamplesFile, State
from selfdistill.model import (
    CompiledLayers,
    Engine,
    ForwardPass,
    LoadedModel,
    PrefixCache,
    Teacher,
    TeacherRule,
    cached_casts,
    can_continue_cache,
    checkpoint_activations,
    engine_for,
    full_tensor,
    is_in_4bit,
    layers_of,
    load_matching,
    load_model,
    make_optimizer,
    refuse_float16,
    set_compute_dtype,
    shard,
    unsharded,
    unwrap,
    use_engine,
)
from selfdistill.runtime import broadcast_from_rank0, say_note
from selfdistill.training.batch_gradient import BatchGradient, PartResult
from selfdistill.training.checkpoint import trained_parameters
from selfdistill.training.schedule import examples_at, learning_rate, positions_of
from selfdistill.training.selection import BatchPart, Selector
from selfdistill.training.setup import (
    EncodedPart,
    Stage,
    batch_unit,
    by_sequence,
    check_engine,
    check_first_samples,
    choose_weights,
    chosen_rows,
    divide_steps,
    keeps_contexts,
    make_accelerator,
    make_stages,
    model_digests,
    note_test_prompts,
    refuse_with_pictures,
    teacher_rules,
    with_defaults,
)
from selfdistill.training.step_metrics import is_sound, step_metrics
from selfdistill.training.stopwatch import Stopwatch

if TYPE_CHECKING:  # that module checks a trainer
    from selfdistill.training.start import Start


class Trainer:
    """The state of one run: model, teacher, stages with their encoded examples, optimizer.

    Args:
        config: settings, with a ``context`` other than ``auto``.
        demonstrations: the training data, if already loaded; else ``config.data`` is read.
        evaluator: evaluates the model, if shared by several runs; else created if ``config.test`` is set.
        loaded: the model, if already loaded; else ``config.model`` is loaded.
        start: may refuse the run before anything is drawn, and begins its folder to keep what is drawn; None: nothing
            is refused or written.
    """

    def __init__(
        self,
        config: TrainConfig,
        demonstrations: Sequence[Demonstration] | None = None,
        evaluator: Evaluator | None = None,
        loaded: LoadedModel | None = None,
        start: Start | None = None,
    ) -> None:
        self.accelerator = make_accelerator(config)
        if demonstrations is None:
            demonstrations = load_demonstrations(config.data, split=config.split, turns=config.turns)
        self.loaded = loaded or load_model(
            config.model,
            dtype=config.dtype,
            merge_adapter=True,
            adapter_base=config.adapter_base,
            load_in_4bit=config.load_in_4bit,
        )
        if config.load_in_4bit and not is_in_4bit(self.loaded.model):
            raise UserError(
                "setting 'load_in_4bit' quantises a model while reading its files, found a loaded model: give its "
                "folder or name, or leave the setting out"
            )
        use_engine(self.loaded, config)
        self.digests = model_digests("model", self.loaded)
        """Of the model and of ``teacher_model``; see :func:`selfdistill.training.resume.digests_of`."""
        for note in self.loaded.notes:
            say_note(note)
        self.chat = self.loaded.chat_for(config)
        config = config.model_copy(update={"template_date": self.chat.date})  # methods make chat formats of their own
        self.stages = make_stages(config, chosen_rows(demonstrations, config), self.loaded, self.chat)
        refuse_with_pictures(config, self.stages, self.loaded)
        self.stage = self.stages[0]
        """Stage of the current step."""
        self.control: State = {}
        """What the task's controller remembers."""
        self.config = with_defaults(config, self.stage.task, self.accelerator.mixed_precision)
        divide_steps(self.config, self.stages)
        weights = self.digests["model"] or config.model  # with a merged adapter they are known by their place
        begin = None  # a resumed run's folder has its samples, and may not change if the run is refused
        if start is not None and start.checkpoint is None:
            begin = partial(start.begin, self.config, demonstrations)
        self.samples_file = SamplesFile(Path(config.output_dir), self.chat, weights, begin)
        self._prepare(start)
        self.evaluator = evaluator or (Evaluator(self.config, self.loaded) if config.test is not None else None)
        if self.evaluator:
            note_test_prompts(self.stages[0], self.evaluator.questions.demonstrations)

    def _prepare(self, start: Start | None) -> None:
        config, model = self.config, self.loaded.model
        if not config.fsdp:  # the whole model may exceed the device's memory
            model.to(self.accelerator.device)
        elif config.lora_rank and self.loaded.merged_adapter:
            raise UserError("setting 'fsdp' with lora_rank: the model already has an adapter; export it merged first")
        if config.load_in_4bit and self.accelerator.mixed_precision == "bf16":
            set_compute_dtype(model, torch.bfloat16)
        choose_weights(self.loaded, config)
        model = self.loaded.model
        if self.loaded.pictures is not None:
            self.loaded.pictures.keep_features(not config.train_vision_tower)
        refuse_float16(model, config.model)
        self._make_teachers()
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        with self.accelerator.autocast():
            compiled = CompiledLayers(self.loaded) if config.torch_compile else None
        self.forward_pass = ForwardPass(self.loaded, compiled, sharded=config.fsdp)
        if config.fsdp:
            self._shard()
        self.engine()  # before any long work
        with self.accelerator.autocast():
            check_engine(self.stages, self.loaded)
        if start is not None:
            start.check(self)
        for stage in self.stages:
            self._draw(stage)
        self.prefix_caches = self._make_caches()
        self.selector = Selector(config, self.chat)
        self.gradient = BatchGradient(
            config, self.accelerator, self.loaded, self.selector, self.forward_pass, self.teachers, self.prefix_caches
        )
        self.drift: Distance | None = None
        if config.drift_steps:
            with unsharded(model), self.accelerator.autocast():
                self.drift = drift_from(self.loaded, self.forward_pass, self.chat)
        self.parameters = list(trained_parameters(model).values())
        self.optimizer = make_optimizer(
            self.parameters, config.optim, seed=config.seed, weight_decay=config.weight_decay
        )

    def _draw(self, stage: Stage) -> None:
        """Draw what the methods of a stage draw before the first step; parts with the same samples share it."""
        for part in stage.own_samples:
            if part.method.drawn:
                with self.accelerator.autocast():
                    part.all_drawn = part.method.drawn(self.loaded, part.examples, self.samples_file)
                part.examples = part.method.drawn.learnt(part.all_drawn)
        for part in stage.parts:
            if part.same_samples:
                part.examples = stage.task.examples

    def _make_teachers(self) -> None:
        """Create every teacher of the run."""
        self.teachers: dict[TeacherRule, Teacher] = {}
        for rule in teacher_rules(part.method for stage in self.stages for part in stage.parts):
            other = None if rule.model is None else self._other_teacher(rule.model)
            self.teachers[rule] = Teacher(self.loaded, rule, other=other, sharded=self.config.fsdp)
        tasks = [stage.task.method.teacher for stage in self.stages if stage.task.method.teacher]
        assert len(set(tasks)) < 2, "stages share one teacher"
        self.teacher = self.teachers[tasks[0]] if tasks else None
        """The task's teacher: the only one that may move."""

    def engine(self) -> Engine | None:
        """The engine, in the arithmetic of training, started if it does not run; None without one."""
        if self.loaded.engine is None:
            return None
        with self.accelerator.autocast():
            return engine_for(self.loaded)

    def _make_caches(self) -> dict[TeacherRule, PrefixCache | None]:
        """A cache for the contexts of the task's teacher, if they are kept; prompts beside it rarely come twice."""
        tasks = [stage.task for stage in self.stages if keeps_contexts(self.config, stage.task.method)]
        contexts = [example.teacher_ids for task in tasks for example in task.examples if example.teacher_ids]
        if self.teacher is None or not contexts:
            return {}
        return {self.teacher.rule: self.forward_pass.keep(contexts, self.config.teacher_cache_mib * 2**20)}

    def _other_teacher(self, name: str) -> LoadedModel:
        """Load a separate teacher; it must have the student's architecture."""
        other = load_matching(name, self.loaded, dtype=self.config.dtype, reads_chats=True)
        for what, digest in model_digests("teacher_model", other).items():
            self.digests[what] = self.digests.get(what, "") + digest  # own methods may have several
        own, others = (unwrap(model).config.model_type for model in (self.loaded.model, other.model))
        if own != others:
            raise UserError(
                f"setting 'teacher_model': {name!r} has architecture {others}, expected the student's, {own}"
            )
        return other

    def _shard(self) -> None:
        """Shard the student, the teacher and the base; probe on the device, not the CPU, what sampling asks."""
        device = self.accelerator.device
        dtype = torch.bfloat16 if self.config.mixed_precision == "bf16" else None
        token = torch.tensor([[self.loaded.pad_token_id]], device=device)
        for network in dict.fromkeys((self.loaded.model, *(n for t in self.teachers.values() for n in t.networks))):
            layers = layers_of(self.loaded, network, "fsdp")
            try:
                with self.accelerator.autocast():
                    shard(network, layers, device, lambda model: model(input_ids=token, use_cache=False), dtype)
            except (AssertionError, TypeError, ValueError) as error:
                raise UserError(f"model {self.loaded.name!r} cannot be sharded: {error}; leave fsdp out") from None
        for teacher in self.teachers.values():
            teacher.bind()
        with unsharded(self.loaded.model), self.accelerator.autocast():
            can_continue_cache(self.loaded)

    def _drift_of(self, network: Any) -> float:
        assert self.drift is not None
        with unsharded(network), cached_casts(network), self.accelerator.autocast():
            return self.drift.of(network)

    def _teacher_drift(self, students: float) -> float:
        """The teacher's drift; measured only for moving teachers, known for the others."""
        assert self.teacher is not None
        if not self.teacher.rule.moves:
            return students if self.teacher.kind == "live" else 0.0
        with self.teacher.model() as network:
            return self._drift_of(network)

    def stage_of(self, step: int) -> tuple[int, Stage]:
        """The stage of step ``step`` (from 0), with its number."""
        return [(number, stage) for number, stage in enumerate(self.stages) if stage.first_step <= step][-1]

    def step(self, step: int) -> dict[str, Any]:
        """Run optimizer step ``step`` (from 0); returns its metrics.

        If loss or gradient are non-finite, weights and optimizer stay unchanged, and the metrics have ``skipped``. They
        stay so, too, if nothing is learnt. Then an average of the student stays as well.
        """
        stopwatch, counted_before = Stopwatch(self.loaded.device), self.loaded.rollout_count
        self.updated = False  # whether the step has changed weights, so that the last one's can no longer be saved
        self.stage = stage = self.stage_of(step)[1]
        stage_step = step - stage.first_step
        positions = self._positions(stage, stage_step)
        control = self._control(stage, stage_step)

        parts = self._rolled_out(stage, positions, step, control, stopwatch)
        check_first_samples(stage, parts, stage_step)
        results = self.gradient.add(parts, stopwatch)
        with stopwatch("update"):
            rate = self._set_learning_rate(stage, stage_step)
            self.updated = True
            norm, moved = self._update_student(results)
            if self.teacher is not None:
                self.teacher.update(step + 1, student_moved=moved)
        with stopwatch("drift"):
            drift = self._measured_drift(step + 1)

        metrics = step_metrics(
            step + 1,
            positions[0].stop / len(stage.task.examples),
            results,
            learning_rate=rate,
            grad_norm=norm,
            drift=drift,
            stopwatch=stopwatch,
            rollout_count=self.loaded.rollout_count - counted_before,
            by_part=len(stage.parts) > 1,
            control=control,
        )
        self._update_control(stage, stage_step, metrics)
        return metrics

    def _control(self, stage: Stage, stage_step: int) -> float | None:
        """The number that the stage's controller sets for this step; None without a controller."""
        controller = stage.task.method.controller
        if controller is None:
            return None
        if stage_step == 0:
            self.control = controller.start
        return controller.value(self.control, stage_step, stage.steps)

    def _update_control(self, stage: Stage, stage_step: int, metrics: dict[str, Any]) -> None:
        """Let the stage's controller, if any, learn from the step's metrics."""
        if controller := stage.task.method.controller:
            state = partial(controller.update, self.control, metrics, stage_step, stage.steps)
            self.control = broadcast_from_rank0(state)  # the sums of two ranks may differ slightly

    def _positions(self, stage: Stage, stage_step: int) -> list[range]:
        """Positions of the step's examples, by part with its own samples."""
        config, shares = self.config, [part.share for part in stage.own_samples]
        return positions_of(shares, stage_step, config.batch_size, config.seed, batch_unit(config))

    def _rolled_out(
        self, stage: Stage, positions: Sequence[range], step: int, control: float | None, stopwatch: Stopwatch
    ) -> list[BatchPart]:
        """The parts of the step that have examples, with their completions; an engine then frees its memory."""
        engine = self.engine()
        synced_s = engine.sync_s if engine else 0.0
        examples = {
            part.name: examples_at(part.examples, places, self.config.seed)
            for part, places in zip(stage.own_samples, positions, strict=True)
        }
        with stopwatch("rollout"), self.accelerator.autocast():
            completions = self._completions(stage.own_samples, examples, step, stopwatch)
            if engine:
                engine.rest()
        if engine:
            stopwatch.add("sync", engine.sync_s - synced_s)
        batch_parts = []
        for part in stage.parts:
            source = stage.task.name if part.same_samples else part.name
            method = part.method.at(step - stage.first_step, stage.steps, control if part is stage.task else None)
            if own := examples[source]:
                weight = len(own) / self.config.batch_size * method.weight
                batch_parts.append(BatchPart(part.name, method, completions[source], weight, part.window))
        return batch_parts

    def _completions(
        self,
        parts: Sequence[EncodedPart],
        examples: Mapping[str, Sequence[Example]],
        step: int,
        stopwatch: Stopwatch,
    ) -> dict[str, list[Completion]]:
        """The completions of each part's examples, by name; parts that sample alike sample together."""
        completions: dict[str, list[Completion]] = {part.name: [] for part in parts}
        for alike in by_sequence(parts):
            asked = [example for part in alike for example in examples[part.name]]
            if not asked:
                continue
            with stopwatch.of(part.name for part in alike):
                made = alike[0].method.sequence(self.loaded, asked, step)
            per_example, start = len(made) // len(asked), 0
            for part in alike:
                stop = start + len(examples[part.name]) * per_example
                completions[part.name], start = made[start:stop], stop
        return completions

    def _update_student(self, results: Sequence[PartResult]) -> tuple[float, bool]:
        """Clip the gradient and step the optimizer if all is finite; the gradient's norm, and whether it stepped."""
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)))
        if self.teacher is not None:
            self.teacher.wait()  # its last update may still read the student
        moves = is_sound(results, norm) and any(p.grad is not None for p in self.parameters)
        if moves:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, moves

    def _set_learning_rate(self, stage: Stage, stage_step: int) -> float:
        config = self.config
        assert config.learning_rate is not None
        rate = learning_rate(
            stage_step,
            peak=config.learning_rate,
            max_steps=stage.steps,
            warmup_steps=config.warmup_steps,
            kind=config.lr_scheduler_type,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _measured_drift(self, done: int) -> dict[str, float]:
        """Drift of student and teacher after ``done`` steps; empty if no measurement is due."""
        due = done == self.config.max_steps or (self.drift is not None and done % self.config.drift_steps == 0)
        if self.drift is None or not due:
            return {}
        drift = {"drift/student": self._drift_of(self.loaded.model)}
        if self.teacher is not None and self.teacher.rule.model is None:
            drift["drift/teacher"] = self._teacher_drift(drift["drift/student"])
        return drift
