"""The loop: step, report, save, stop when asked.

The order of the data, the learning rate and the randomness of every sample are functions of the seed and the step, so
a run that is resumed repeats the numbers of one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfdistill.card import model_card
from selfdistill.checkpoint import (
    Position,
    checkpoint_bytes,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)
from selfdistill.config import TrainConfig
from selfdistill.demonstrations import Demonstration
from selfdistill.disk import remove_folder, remove_leftovers, write_whole
from selfdistill.errors import UserError
from selfdistill.evaluate import summary
from selfdistill.examiner import Examiner
from selfdistill.export import whole_folder, write_model
from selfdistill.guards import RunFailed, RunStopped, StopRequests, check_disk
from selfdistill.models import LoadedModel
from selfdistill.processes import is_first, largest, wait
from selfdistill.run import Run
from selfdistill.settings_files import dump_yaml, load_yaml, refuse_changes
from selfdistill.token_views import token_views
from selfdistill.tracking import MetricsFile, Reporter, StepsFile, Tracker, check_tracker, read_lines, say

OnStep = Callable[[int, LoadedModel], object]


def check_output_dir(name: str, *, resume: bool) -> Path:
    """The run folder, refused where a new run would mix with what is there.

    Raises:
        UserError: it is a file, or it is not empty and no run is continued, or the run in it is finished and kept no
            checkpoint to continue from.
    """
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {name!r} is a file: choose another name")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise UserError(f"output_dir {name!r} exists and is not empty: choose another, or continue it with --resume")
    if resume and (folder / "final").exists() and not list_checkpoints(folder):
        raise UserError(f"output_dir {name!r}: this run is finished and kept no checkpoint, so it cannot be continued")
    return folder


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    demonstrations: Sequence[Demonstration] | None = None,
    examiner: Examiner | None = None,
    on_step: OnStep | None = None,
) -> Path:
    """Train, and return the folder of the final model.

    ``output_dir`` gets ``config.yaml`` (resolved, re-runnable), ``metrics.jsonl``, ``evaluations.jsonl`` (with
    ``test``), ``token_views.jsonl``, checkpoints, and ``final/``, which ``AutoModelForCausalLM`` or ``PeftModel``
    loads.

    Args:
        config: settings; ``context`` must not be ``auto`` (see :mod:`selfdistill.check`).
        resume: go on from the newest whole checkpoint in ``output_dir``, if there is one.
        demonstrations: rows, where the caller has them already.
        examiner: measures the model on ``test``, where the caller has one for several runs.
        on_step: called before the first step with 0, and after every step with its number; where it returns True after
            a step, the run ends there, as if it had been the last.

    Raises:
        UserError: anything the user can mend.
        RunStopped: a signal came; everything is saved.
        RunFailed: loss or gradient were not finite ``max_skipped_steps`` times in a row.
    """
    output_dir = check_output_dir(config.output_dir, resume=resume)
    check_tracker(config.report_to)
    checkpoint = newest_whole(output_dir) if resume else None
    run = Run(config, demonstrations, examiner)
    config = run.config
    assert config.max_steps is not None
    written = output_dir / "config.yaml"
    if checkpoint:
        own = checkpoint / "config.yaml"
        saved_config = TrainConfig(**load_yaml(own, TrainConfig))
        if written.exists():  # its paths are right also where a state was moved
            refuse_changes(written, TrainConfig(**load_yaml(written, TrainConfig)), config)
        refuse_changes(own, saved_config, config, moved=("model", "data"))
        if len(run.stages) > 1 and saved_config.max_steps != config.max_steps:
            raise UserError(
                f"setting 'max_steps': {saved_config.max_steps} in {own} and now {config.max_steps}; "
                f"{config.method} shares the steps between its stages, so their number must stay"
            )
    whole = run.loaded.model.parameters() if run.loaded.merged_adapter else run.parameters
    size = sum(p.numel() * p.element_size() for p in whole)
    kept = config.save_total_limit + 1 if config.save_steps else 0
    one = checkpoint_bytes(run.loaded.model, run.teacher)
    check_disk(output_dir, size + kept * one)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if is_first():
            remove_leftovers(output_dir)
            write_whole(written, dump_yaml(config))
        for stage in run.stages:
            if stage.method.fixed and is_first():
                stage.method.fixed.write(output_dir, stage.rows, run.chat)
    except OSError as error:
        raise UserError(f"output_dir {str(output_dir)!r}: cannot be written ({error.strerror})") from None
    position = Position(0, 0, run.fingerprint())
    if checkpoint:
        saved = load_checkpoint(checkpoint, run.loaded.model, run.optimizer, run.teacher)
        if saved.data != position.data:
            raise UserError(
                f"{checkpoint}: the rows are not those of the run so far: data, template, tokenizer or limits "
                "changed; put them back, or start another run"
            )
        position = saved
    for line in run.describe():
        say(line)
    if kept:
        sizes = f"{one / 2**30:.2f} GiB, the final model {size / 2**30:.2f} GiB"
        say(f"on the disk each of {config.save_total_limit} checkpoints takes {sizes}")
    if resume and not checkpoint:
        say(f"note: there is no run to continue in {output_dir}: starting from the beginning")
    elif resume and position.step >= (run.config.max_steps or 0):
        say(f"all {position.step} steps are done already: a higher --max_steps would go on")
    elif resume:
        say(f"continuing after step {position.step}")
    _loop(run, output_dir, position, on_step)
    return _save_final(run, output_dir)


def _loop(run: Run, output_dir: Path, position: Position, on_step: OnStep | None) -> None:
    config = run.config
    assert config.max_steps is not None

    def save() -> None:
        for file in (metrics_file, *watch.files):
            file.sync()
        model, keep = run.loaded.model, config.save_total_limit
        if is_first():
            save_checkpoint(output_dir, position, dump_yaml(config), model, run.optimizer, run.teacher, keep)
        wait()

    metrics_file = MetricsFile(output_dir / "metrics.jsonl", position.step)
    reporter = Reporter("step", config.max_steps, start=position.step, every=config.logging_steps)
    tracker = Tracker(run.accelerator, config, output_dir, position.step)
    watch = _Watch(run, output_dir, position.step, tracker)
    with watch, metrics_file, tracker, reporter, StopRequests() as stop:
        # What a run that was stopped there had no time for.
        watch.look(position.step, last=position.step == config.max_steps)
        if on_step and position.step == 0:
            on_step(0, run.loaded)
        for step in range(position.step, config.max_steps):
            metrics = run.step(step)
            position = replace(
                position,
                step=step + 1,
                tokens=position.tokens + int(metrics["tokens"]),
                skipped=position.skipped + 1 if "skipped" in metrics else 0,
            )
            metrics["tokens"] = position.tokens
            metrics_file.write(metrics)
            tracker.write(metrics)
            reporter.advance(step + 1, _note(metrics))
            if "skipped" in metrics:
                say(f"note: step {step + 1} was left out: {_left_out(metrics)}")
            if position.skipped >= config.max_skipped_steps:
                save()
                raise RunFailed(
                    f"{output_dir}: {position.skipped} steps in a row were left out; of the last, step {step + 1}, "
                    f"{_left_out(metrics)}; the weights are as they were before them. Lower --learning_rate, look at "
                    "these rows, or see metrics.jsonl for where it began"
                )
            enough = on_step is not None and on_step(step + 1, run.loaded) is True
            last = enough or step + 1 == config.max_steps
            try:
                watch.look(step + 1, last=last)
            except Exception:  # a judge that does not answer, memory: nothing of the training must be lost by it
                save()
                raise
            due = config.save_steps and (last or (step + 1) % config.save_steps == 0)
            received = largest(stop.received or 0, run.accelerator.device)  # any process may have got the signal
            if due or received:
                save()
            if received and not last:
                raise RunStopped(
                    f"{output_dir}: stopped after step {step + 1} of {config.max_steps}, all saved; continue with "
                    "--resume",
                    received,
                )
            if enough:
                break


class _Watch:
    """What is measured beside training: ``evaluations.jsonl`` and ``token_views.jsonl``."""

    def __init__(self, run: Run, output_dir: Path, start: int, tracker: Tracker) -> None:
        self._run, self._metrics, self._tracker = run, output_dir / "metrics.jsonl", tracker
        start = start or -1  # what was written before the first step is written anew, too
        self._evaluations = StepsFile(output_dir / "evaluations.jsonl", start) if run.examiner else None
        views = run.config.view_rows and run.teacher
        self._views = StepsFile(output_dir / "token_views.jsonl", start) if views else None
        self.files = [file for file in (self._evaluations, self._views) if file is not None]

    def look(self, step: int, *, last: bool) -> None:
        """After optimizer step ``step``; 0: before the first."""
        run, config = self._run, self._run.config
        ends = last or step == 0
        if self._views and ends and step not in self._views.steps:
            for view in token_views(run):
                self._views.write({"step": step, **view})
        due = ends or (config.eval_steps and step % config.eval_steps == 0)
        if self._evaluations and run.examiner and due and step not in self._evaluations.steps:
            found = run.examiner.measure(run.loaded) if step else run.examiner.base
            self._evaluations.write({"step": step, **found, "seconds": self._seconds() if step else 0.0})
            scores = {f"eval/{key}": found[key] for key in ("accuracy", "prior_accuracy", "kl_base") if key in found}
            self._tracker.write({"step": step, **scores})
            say(f"step {step}: {summary(found)}")

    def _seconds(self) -> float:
        """Spent on training steps, measurements aside."""
        return sum(line["time/step_s"] - line["time/drift_s"] for line in read_lines(self._metrics))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.__exit__()


def _left_out(metrics: dict[str, Any]) -> str:
    rows = metrics["skipped"]["rows"]
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{metrics['skipped']['why']} ({', '.join(rows[:5])}{more})"


def _note(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    if "kl/forward" in metrics:
        parts.append(f"KL {metrics['kl/forward']:.3f}")
    if "drift/student" in metrics:
        parts.append(f"drift {metrics['drift/student']:.3f}")
    parts.append(f"{metrics['completion/length']:.0f} tokens, {metrics['completion/truncated']:.0%} cut")
    parts.append(f"{metrics['time/step_s']:.1f} s/step")
    return "  ".join(parts)


def _save_final(run: Run, output_dir: Path) -> Path:
    """Write ``final/``, with its card, in place of an earlier one."""
    final, model = output_dir / "final", run.loaded.model
    if not is_first():
        wait()
        return final
    if hasattr(model, "peft_config") and run.loaded.merged_adapter:
        model = model.merge_and_unload(adapter_names=["default"])
    card = model_card(
        run.config,
        output_dir,
        demonstrations=len(run.stages[0].rows),
        fingerprint=run.fingerprint(),
        adapter=hasattr(model, "peft_config"),
    )
    advice = "free disk space, then continue with --resume, which needs a checkpoint (--save_steps)"
    say(f"writing {final}")
    with whole_folder(final, advice) as folder:
        write_model(folder, model, run.loaded.tokenizer, card)
        remove_folder(final)
    wait()
    return final
