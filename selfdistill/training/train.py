"""Run or resume a training run, from its settings to its final model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from selfdistill.config import TrainConfig, as_begun, load_saved
from selfdistill.data import Demonstration, load_demonstrations
from selfdistill.errors import RESUME, RunCollapsed, UserError
from selfdistill.evaluation import Evaluator, best_context
from selfdistill.methods import uses
from selfdistill.model import LoadedModel, full_tensors, merged, rest_engine, stored_bytes, tensor_bytes
from selfdistill.runtime import (
    all_gather,
    barrier,
    broadcast_from_rank0,
    check_folder_writable,
    check_tracker,
    is_rank0,
    own_memory,
    say,
    say_note,
    world_size,
)
from selfdistill.training.checkpoint import (
    Position,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    trained_parameters,
)
from selfdistill.training.export import whole_folder, write_model
from selfdistill.training.first_lines import first_lines
from selfdistill.training.fitting import plan_that_fits
from selfdistill.training.loop import Loop, OnStep, say_signs
from selfdistill.training.memory import MemoryPlanner
from selfdistill.training.memory_result import MemoryPlan, size_text
from selfdistill.training.model_card import model_card
from selfdistill.training.resume import check_unchanged, digests_of, where
from selfdistill.training.setup import data_fingerprint, make_accelerator, repeating
from selfdistill.training.start import Start
from selfdistill.training.traced_step import Device
from selfdistill.training.trainer import Trainer


def check_output_dir(name: str, *, resume: bool, own_files: Sequence[str]) -> Path:
    """Check that a run can use the folder, and return its path.

    Raises:
        UserError: it is a file or cannot be written; it holds files other than ``own_files`` and ``resume`` is False;
            or its run is finished and kept no checkpoint.
    """
    folder = Path(name)
    if os.path.isfile(folder):  # Path.is_file raises where it may not look
        raise UserError(f"output_dir {name!r} is a file: choose another name")
    if is_rank0():  # which writes it
        check_folder_writable(folder, f"output_dir {name!r}")
    if not resume and folder.exists() and any(file.name not in own_files for file in folder.iterdir()):
        raise UserError(f"output_dir {name!r} exists and is not empty: choose another, or continue it with resume=True")
    if resume and (folder / "final").exists() and not list_checkpoints(folder):
        raise UserError(f"output_dir {name!r}: this run is finished and has no checkpoint, so it cannot be resumed")
    return folder


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    demonstrations: Sequence[Demonstration] | None = None,
    evaluator: Evaluator | None = None,
    loaded: LoadedModel | None = None,
    on_step: OnStep | None = None,
    own_files: Sequence[str] = (),
) -> Path:
    """Train a model.

    Writes to ``output_dir``: ``config.yaml`` (resolved settings), ``metrics.jsonl``, ``evaluations.jsonl`` and
    ``test_replies.jsonl`` (with ``test``), ``token_views.jsonl``, checkpoints, and ``final/``, which
    ``AutoModelForCausalLM`` or ``PeftModel`` loads.

    Args:
        config: settings.
        resume: resume from the newest intact checkpoint in ``output_dir``, if any.
        demonstrations: the training data, if already loaded.
        evaluator: evaluates the model on ``test``, if shared by several runs.
        loaded: the model, if already loaded; its weights are trained in place.
        on_step: called before the first step, with 0 and no metrics, and after every step; see :data:`OnStep`.
        own_files: names of files that may be in ``output_dir`` before the run, such as rows from memory.

    Returns:
        The folder of the final model.

    Raises:
        UserError: a mistake the user can fix.
        RunStopped: a signal stopped the run; its progress is saved.
        RunFailed: loss or gradient were non-finite for ``max_skipped_steps`` consecutive steps; or, with
            ``stop_on_collapse``, the run collapsed.
    """
    output_dir = check_output_dir(config.output_dir, resume=resume, own_files=own_files)
    check_tracker(config.report_to)
    written = output_dir / "config.yaml"
    resumes = resume and written.exists()
    if resume and not resumes:
        say(f"note: {output_dir} holds no run to resume, so a new one begins there")
    with ExitStack() as held:
        held.enter_context(repeating(config))
        config = as_begun(config, load_saved(written, TrainConfig)) if resumes else config
        start = Start(output_dir, held)
        if resume and output_dir.exists():
            start.lock()
        demonstrations = demonstrations or load_demonstrations(config.data, split=config.split, turns=config.turns)
        _refuse_auto_context(config)
        plan, start.lines = plan_memory(config, demonstrations, loaded)  # the processes have met from here on
        start.checkpoint = broadcast_from_rank0(lambda: newest_whole(output_dir) if resume else None)
        config = plan.config if plan else config
        config = with_context(config, demonstrations, loaded)
        trainer = Trainer(config, demonstrations, evaluator, loaded, start)
        position = _start_position(trainer, start.checkpoint)  # a refused resume changes nothing in the folder
        start.begin(trainer.config, demonstrations)
        start.write_samples(trainer)
        for line in (*first_lines(trainer), *start.lines):
            say(line)
        if resumes:
            say(where(output_dir, start.checkpoint, position, trainer))
        loop = Loop(trainer, output_dir, position)
        try:
            loop.go_on(on_step)
        except RunCollapsed:
            _save_final(trainer, output_dir, loop.step, [])  # restored from before the collapse
            raise
        say_signs(loop, output_dir)
        return _save_final(trainer, output_dir, loop.step, loop.signs)


def with_context(
    config: TrainConfig, demonstrations: Sequence[Demonstration], loaded: LoadedModel | None
) -> TrainConfig:
    """Replace the context ``auto`` by the best one, if the method's teacher sees a context.

    Raises:
        UserError: there are several processes; only a single one can compare contexts.
    """
    _refuse_auto_context(config)
    if not _needs_best_context(config):
        return config
    return config.model_copy(update={"context": best_context(config, demonstrations, loaded)})


def _needs_best_context(config: TrainConfig) -> bool:
    """Whether contexts have to be compared."""
    return config.context == "auto" and uses(config, "context")


def _refuse_auto_context(config: TrainConfig) -> None:
    """Refuse to compare contexts in several processes.

    Raises:
        UserError: there are several processes; only a single one can compare contexts.
    """
    if _needs_best_context(config) and world_size() > 1:
        raise UserError(
            "setting 'context': 'auto' needs a single process; find the best with selfdistill check and name it"
        )


AMPLE = 2000
"""Where as many times the weights of student and teacher are free, as with tiny models, a run starts without a plan."""


def plan_memory(
    config: TrainConfig, demonstrations: Sequence[Demonstration], loaded: LoadedModel | None, *, always: bool = False
) -> tuple[MemoryPlan | None, list[str]]:
    """Plan the run's memory before the model is loaded; returns the plan, and lines that describe it.

    The plan's settings are the given ones, with those chosen that were left open. A model or row that cannot be used is
    not reported here, but where it is used. There is no plan where far more memory is free than a run can need
    (:data:`AMPLE`), unless ``always``.

    Raises:
        UserError: there is not enough; names the nearest settings for which there is.
    """
    rest_engine()  # of an earlier call in this process
    accelerator = make_accelerator(config)
    free = [free for free in all_gather([own_memory(accelerator.device)]) if free is not None]
    limit = min(free, default=None)  # the same on all ranks, so that all are refused or none
    if limit is not None and loaded is not None and loaded.device.type == accelerator.device.type:
        limit += tensor_bytes(loaded.model.parameters())
    try:
        if not always and limit is not None and limit > AMPLE * _weights(config, loaded):
            return None, [f"memory free: {size_text(limit)}"]
        planner = MemoryPlanner(config, demonstrations, Device.of(accelerator), loaded)
    except UserError:
        return None, []
    return plan_that_fits(planner, config, limit)


def _weights(config: TrainConfig, loaded: LoadedModel | None) -> float:
    """Bytes of the weights of student and teacher, as they are stored; infinite if they are elsewhere."""
    if config.engine != "none" and not config.engine_url:  # has its own copy, and a cache
        return math.inf
    student = tensor_bytes(loaded.model.parameters()) if loaded else stored_bytes(config.model, config.adapter_base)
    teacher = stored_bytes(config.teacher_model) if config.teacher_model else student
    return student + teacher if student and teacher else math.inf


def _start_position(trainer: Trainer, checkpoint: Path | None) -> Position:
    """Load the checkpoint, if any; returns the position at which the run starts.

    Raises:
        UserError: the run began with different examples, weights or evaluation data.
    """
    name = engine.name if (engine := trainer.engine()) else ""
    position = Position(0, 0, engine=name, digests=digests_of(trainer))
    if checkpoint is None:
        return position
    check_unchanged(checkpoint, trainer, position.digests)
    saved = load_checkpoint(checkpoint, trainer.loaded.model, trainer.optimizer, trainer.teacher)
    trainer.control = saved.control
    if saved.engine != name:
        before, now = saved.engine or "PyTorch", name or "PyTorch"
        say_note(f"the run sampled with {before} and continues with {now}, which draws different samples")
    return replace(saved, engine=name, digests=position.digests | saved.digests)


def _save_final(trainer: Trainer, output_dir: Path, step: int, signs: list[str]) -> Path:
    """Write ``final/``: the model after ``step`` and its card. Replaces an earlier one."""
    final, model = output_dir / "final", trainer.loaded.model
    adapter = hasattr(model, "peft_config")
    state = None
    if trainer.config.fsdp:
        trained = trained_parameters(model)
        state = full_tensors(
            {name: t for name, t in model.state_dict(keep_vars=True).items() if not adapter or name in trained}
        )
    if not is_rank0():
        barrier()
        return final
    if adapter and trainer.loaded.merged_adapter:
        model = merged(model, trainer.config.model)
    card = model_card(
        trainer.config,
        output_dir,
        step,
        demonstrations=len(trainer.stages[0].task.examples),
        fingerprint=data_fingerprint(trainer.stages, trainer.chat),
        adapter=hasattr(model, "peft_config"),
        pictures=trainer.loaded.pictures is not None,
        signs=signs,
    )
    advice = f"free disk space, then {RESUME}, which needs a checkpoint (save_steps)"
    say(f"writing {final}")
    with whole_folder(final, advice, replace=True) as folder:
        write_model(folder, model, trainer.loaded, card, state)
    barrier()
    return final
