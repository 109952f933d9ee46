"""``selfdistill compare``: train on the same demonstrations with several methods, on equal terms.

All runs share the base, rows, number of steps and settings, and are evaluated on the same items at the same steps. They
differ only in method, learning rate, seed and the varied setting, or in the settings that the arms name. Each run has
its own folder, so a comparison can be resumed.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfdistill.comparison.compare_result import CompareResult
from selfdistill.comparison.conclusions import Compared, bases_of, mean_points, points_of, sentences, table
from selfdistill.comparison.kinds import first_run, kinds_of, runs_of
from selfdistill.comparison.plots import Curve, trade_off
from selfdistill.config import (
    CompareConfig,
    TrainConfig,
    as_begun,
    dump_yaml,
    load_saved,
    refuse_changes,
    with_runs_of,
)
from selfdistill.data import Demonstration, anchor_prompts, load_demonstrations
from selfdistill.errors import RESUME, EngineFailed, RunFailed, RunStopped, UserError, number_of
from selfdistill.evaluation import Evaluator, best_context, check_inputs, rows_fingerprint
from selfdistill.methods import DemonstrationExamples, OtherRows, Part, lacks_of, stages_of, uses, with_teachers_window
from selfdistill.model import (
    LoadedModel,
    load_for_training,
    network_fingerprint,
    refuse_float16,
    resolved_precision,
    start_fingerprint,
)
from selfdistill.runtime import StopRequests, folder_lock, read_lines, say, write_atomically
from selfdistill.training import check_output_dir, check_parts, list_checkpoints, remove_checkpoint, steps_of, train

ORACLE_RAG = "document:show=document"
"""Context for evaluating the untrained base: each question's own document."""
_BUDGET = ("max_steps", "batch_size", "num_demonstrations")
"""Settings that the sentence about the budget names."""
_FAILED = "failed.txt"
"""File in the folder of a run that failed: why."""
EVALUATIONS = 5
"""Evaluations of a run after its start, if ``eval_steps`` is 0."""


def compare(config: CompareConfig, *, resume: bool = False, own_files: Sequence[str] = ()) -> CompareResult:
    """Train and evaluate every method with every learning rate and seed.

    Writes to ``output_dir``: ``comparison.json``, rewritten after every run, ``trade_off.svg``, and a folder per run.

    Args:
        config: settings.
        resume: resume the comparison; its runs are kept, and others of ``config`` are added.
        own_files: names of files that may be in the folder before the comparison.

    Returns:
        The result. Its ``details`` are the content of ``comparison.json``: ``model``, ``data``, ``test``, ``prior``,
        ``budget``, ``sentence``, ``base``, ``teacher`` and ``moved`` (the in-context assumption), ``rag`` (the base
        given each question's document, if the rows have documents), ``runs``, ``table``.

    Raises:
        UserError: a mistake the user can fix, or another process uses the folder.
        RunStopped: a signal stopped the comparison; its progress is saved.
    """
    folder = check_output_dir(config.output_dir, resume=resume, own_files=own_files)
    begun = resume and folder.exists()
    with ExitStack() as held:
        if begun:
            _lock(folder, held)
        config = _settled(config, folder, resume, own_files)
        base = load_for_training(config.model, dtype=config.dtype, adapter_base=config.adapter_base)
        if not all({"lora_rank": config.lora_rank, **kind.values}["lora_rank"] for kind in kinds_of(config)):
            refuse_float16(base.model, config.model)
        config = config.model_copy(update={"template_date": base.chat(date=config.template_date).date})
        stages = [stages_of(first_run(config, kind)) for kind in kinds_of(config)]
        parts = [part for run in stages for stage in run for part in stage]
        demonstrations = _common_rows(config, base, parts)
        evaluator = Evaluator(config, base)
        teacher = None if config.context == "auto" else evaluator.shown(base, config.context, "teacher")
        shown = {"teacher": teacher, "rag": _rag(evaluator, base), **_moved_before(folder)}
        if not begun:
            _lock_new(folder, held, own_files)
        _begin(folder, config, demonstrations, parts, evaluator, base)
        del base
        config = _with_steps(config, len(demonstrations))
        done, result = _run_all(folder, config, evaluator, demonstrations, shown)
        _draw(config, done, evaluator, teacher, folder / "trade_off.svg")
        if teacher and any(run.failed is None for run in done):
            result["moved"] = _moved(config, evaluator, done)
            _write(folder, result)
        return CompareResult(folder, result)


def _lock(folder: Path, held: ExitStack) -> None:
    """Lock the comparison's folder while ``held`` is open."""
    held.enter_context(folder_lock(folder, f"output_dir {str(folder)!r}"))


def _lock_new(folder: Path, held: ExitStack, own_files: Sequence[str]) -> None:
    """Lock the folder of a new comparison: only once its inputs are checked, for locking creates the folder.

    Raises:
        UserError: another process has used the folder in the meantime.
    """
    _lock(folder, held)
    check_output_dir(str(folder), resume=False, own_files=own_files)


def _settled(config: CompareConfig, folder: Path, resume: bool, own_files: Sequence[str]) -> CompareConfig:
    """Validate the settings, add the runs of a resumed comparison, and resolve those that are ``auto``.

    They become those of the resumed comparison; in a new one the context becomes the best one.

    Raises:
        UserError: a fixed setting has changed, or an input is invalid.
    """
    written = folder / "config.yaml"
    if resume and written.exists():
        there = load_saved(written, CompareConfig)
        saved, config = CompareConfig(**there), as_begun(config, there)
        refuse_changes(written, saved, config)
        config = with_runs_of(saved, config, written)
    else:
        config = config.model_copy(update={"mixed_precision": resolved_precision(config.mixed_precision)})
    given_by = "arms" if config.arms else "vary"
    if "auto" in [kind.values.get("context") for kind in kinds_of(config)]:
        raise UserError(f"setting {given_by!r}: context 'auto' means the best one; name the contexts to compare")
    first = [first_run(config, kind) for kind in kinds_of(config)]
    _refuse_idle(config, first)
    check_inputs(config, own_files, lacks_of([stage for run in first for stage in stages_of(run)]))
    for run in first:
        check_parts(run)
    taught = [run for run in first if run.context == "auto" and uses(run, "context")]
    return config.model_copy(update={"context": best_context(taught[0])}) if taught else config


def _refuse_idle(config: CompareConfig, runs: Sequence[TrainConfig]) -> None:
    """Refuse a varied setting that none of the runs uses: they would all be one run."""
    for name in config.vary:
        if any(uses(run, name) for run in runs):
            continue
        if name.startswith("anchor_"):
            raise UserError(f"setting 'vary': {name!r} has no effect without anchors; set anchors, too")
        raise UserError(f"setting 'vary': no method here uses {name!r} ({', '.join(config.methods)}); vary another")


def _with_steps(config: CompareConfig, rows: int) -> CompareConfig:
    """Resolve ``max_steps`` and ``eval_steps`` for this number of rows."""
    steps = steps_of(config, min(rows, config.num_demonstrations or rows))
    eval_steps = config.eval_steps or math.ceil(steps / EVALUATIONS)
    return config.model_copy(update={"max_steps": steps, "eval_steps": eval_steps})


def _begin(
    folder: Path,
    config: CompareConfig,
    demonstrations: list[Demonstration],
    parts: Sequence[Part],
    evaluator: Evaluator,
    base: LoadedModel,
) -> None:
    """Write the settings and the fingerprints of the inputs; a resumed comparison must find these unchanged.

    Raises:
        UserError: an input has changed.
    """
    began = {
        "the demonstrations": rows_fingerprint({"": demonstrations}),
        "the base": start_fingerprint(base) or config.model,  # one with a merged adapter is known by its place
        "config.json of the base": network_fingerprint(base),
        "the test rows or prior questions": evaluator.questions.fingerprint(),
        "the anchors": rows_fingerprint({str(at): anchor_prompts(name) for at, name in enumerate(config.anchors)}),
    }
    for source in (part.method.examples for part in parts):
        if isinstance(source, OtherRows):
            began[f"the rows of {source.data}"] = rows_fingerprint({"": source.rows})
    _check_unchanged(folder, began, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", dump_yaml(config))  # first: without it, the folder cannot be resumed
    write_atomically(folder / "began.json", json.dumps(began))


def _run_all(
    folder: Path,
    config: CompareConfig,
    evaluator: Evaluator,
    demonstrations: list[Demonstration],
    shown: dict[str, dict[str, Any] | None],
) -> tuple[list[Compared], dict[str, Any]]:
    """Run what is not finished; returns all runs and the result, which is rewritten after each.

    Raises:
        RunStopped: a signal stopped the comparison before its last run ended.
    """
    runs = runs_of(config)
    finished = {run.output_dir: _read(label, run) for label, run in runs if _is_finished(run)}
    if finished:
        say(f"{len(finished)} of {number_of(len(runs), 'run')} finished before")

    def written() -> tuple[list[Compared], dict[str, Any]]:
        done = [finished[run.output_dir] for _, run in runs if run.output_dir in finished]
        result = _summary(config, evaluator, shown, done)
        _write(folder, result)
        return done, result

    done, result = written() if finished else ([], {})
    with StopRequests() as stop:
        for number, (label, run) in enumerate(runs, 1):
            if run.output_dir in finished:
                continue
            name = Path(run.output_dir).name
            say(f"run {number} of {len(runs)}: {name}")
            try:
                _train(run, evaluator, demonstrations)
                finished[run.output_dir] = _read(label, run)
            except RunStopped as stopped:
                stop.received = stopped.signal_number
            if finished:
                done, result = written()
            if stop.received is not None and len(finished) < len(runs):
                message = f"{folder}: stopped in run {number} of {len(runs)} ({name}); progress is saved, "
                raise RunStopped(f"{message}{RESUME}", stop.received)
            gc.collect()
    return done, result


def _check_unchanged(folder: Path, began: dict[str, str], config: CompareConfig) -> None:
    """Compare the fingerprints of the inputs, and the places of those without one, with those in the folder.

    An earlier release kept no fingerprint of anchors, config.json or rows of other parts, and an empty one of a base
    with a merged adapter.

    Raises:
        UserError: the demonstrations, the base, the evaluation data, the anchors or rows of other parts have changed.
    """
    file = folder / "began.json"
    if not file.exists():
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    before = CompareConfig(**load_saved(folder / "config.yaml", CompareConfig))
    moved = {"the base": before.model != config.model, "the anchors": before.anchors != config.anchors}

    def has_changed(what: str) -> bool:
        """By fingerprint; by place where an earlier release kept none."""
        fingerprint = there.get(what)
        return fingerprint != began[what] if fingerprint else moved.get(what, False)

    if changed := [what for what in began if has_changed(what)]:
        drops = config.on_long_prompt == "drop" and "the demonstrations" in changed
        added = ", leave out added runs that drop further rows" if drops else ""
        raise UserError(
            f"{folder}: changed since this comparison began: {', '.join(changed)}; restore model, data, test, prior, "
            f"anchors and other rows{added}, or use another output_dir"
        )


def _rag(evaluator: Evaluator, base: LoadedModel) -> dict[str, Any] | None:
    """Evaluate the base given each question's document; None if rows have none, or one does not fit."""
    try:
        return evaluator.shown(base, ORACLE_RAG, "oracle RAG")
    except EngineFailed:
        raise
    except UserError as error:
        say(f"note: oracle RAG is skipped: {error}")
        return None


def _write(folder: Path, result: dict[str, Any]) -> None:
    write_atomically(folder / "comparison.json", json.dumps(result, ensure_ascii=False))


def _moved_before(folder: Path) -> dict[str, dict[str, Any]]:
    """The distances that :func:`_moved` measured before the comparison was resumed; empty if there are none."""
    file = folder / "comparison.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {"moved": found["moved"]} if "moved" in found else {}


def _moved(config: CompareConfig, evaluator: Evaluator, done: list[Compared]) -> dict[str, float]:
    """KL(model||base) on the test rows by run name, for the first finished run of each method and learning rate.

    Together with the teacher's own distance, it shows whether the method's second condition holds: the teacher is
    nearer to the base than fine-tuned models are.
    """
    first: dict[tuple[str, float], Compared] = {}
    for run in done:
        if run.failed is None:
            first.setdefault((run.method, run.learning_rate), run)
    base = load_for_training(config.model, dtype=config.dtype, adapter_base=config.adapter_base)
    distances = {}
    for run in first.values():
        trained = Path(config.output_dir) / run.folder
        is_adapter = (trained / "final" / "adapter_config.json").is_file()  # of the base, which may have moved since
        model = load_for_training(str(trained), dtype=config.dtype, adapter_base=config.model if is_adapter else None)
        distances[run.name] = evaluator.moved(base, model)
    return distances


def _common_rows(config: CompareConfig, base: LoadedModel, parts: Sequence[Part]) -> list[Demonstration]:
    """The demonstrations that fit every part: all, or with ``on_long_prompt: drop`` those not dropped by any.

    Raises:
        UserError: rows are too long, or lack what a method learns from.
    """
    rows = load_demonstrations(config.data, split=config.split, turns=config.turns)
    count, chat = len(rows), base.chat_for(config)
    for method in (part.method for part in parts):
        fitting, _ = method.examples(rows, with_teachers_window(base, method), chat)  # all: errors before any run
        if isinstance(method.examples, DemonstrationExamples):  # a row of several replies may be several examples
            kept = {(x.demonstration.turn_of or x.demonstration).row for x in fitting}
            rows = [row for row in rows if row.row in kept]
    if len(rows) < count:
        say(f"dropped {count - len(rows)} of {count} rows for all methods: too long for at least one")
    return rows


def _is_finished(run: TrainConfig) -> bool:
    """Whether a run has its final model, or failed."""
    folder = Path(run.output_dir)
    return (folder / "final").is_dir() or (folder / _FAILED).is_file()


def _train(run: TrainConfig, evaluator: Evaluator, demonstrations: list[Demonstration]) -> None:
    """Train until the run is finished.

    Raises:
        RunStopped: a signal stopped it.
    """
    folder = Path(run.output_dir)
    try:
        train(run, resume=folder.exists(), demonstrations=demonstrations, evaluator=evaluator)
    except RunFailed as error:
        write_atomically(folder / _FAILED, str(error))
    for checkpoint in list_checkpoints(folder):  # only needed to resume
        remove_checkpoint(checkpoint)


def _read(label: str, run: TrainConfig) -> Compared:
    """The evaluations of a finished run.

    Raises:
        UserError: it has other settings.
    """
    folder = Path(run.output_dir)
    failure, failed = folder / _FAILED, None
    if failure.is_file():
        failed = failure.read_text(encoding="utf-8")
        say(f"note: this run failed: {failed}")
    evaluations = read_lines(folder / "evaluations.jsonl")
    saved = TrainConfig(**load_saved(folder / "config.yaml", TrainConfig))
    open_ = {key: getattr(saved, key) for key, value in run.model_dump().items() if value in (None, "auto")}
    refuse_changes(folder / "config.yaml", saved, run.model_copy(update=open_))  # open: resolved at the start
    assert saved.learning_rate is not None, "a run resolves its settings"
    return Compared(label, saved.learning_rate, run.seed, folder.name, evaluations, failed)


def _summary(
    config: CompareConfig, evaluator: Evaluator, shown: dict[str, dict[str, Any] | None], done: list[Compared]
) -> dict[str, Any]:
    steps, prompts = number_of(config.max_steps, "step"), number_of(config.batch_size, "prompt")
    budget = f"Every run has {steps} of {prompts} of the same demonstrations"
    stages = [parts for kind in kinds_of(config) for parts in stages_of(first_run(config, kind))]
    if beside := dict.fromkeys(part.name for parts in stages for part in parts[1:] if not part.same_samples):
        budget += f", {' and '.join(beside)} included"
    varied = {name for kind in kinds_of(config) for name in kind.values}
    budget += "".join(f", except for {name}, which is varied" for name in _BUDGET if name in varied) + "."
    return {
        "model": config.model,
        "data": config.data,
        "test": config.test,
        "prior": config.prior,
        "budget": budget,
        "sentence": sentences(done, budget),
        "base": evaluator.base,
        **shown,
        "runs": [{"name": run.name, **asdict(run)} for run in done],
        "table": table(done),
    }


def _draw(
    config: CompareConfig, done: list[Compared], evaluator: Evaluator, teacher: dict[str, Any] | None, file: Path
) -> None:
    points = points_of(done)
    curves = [Curve(name, mean_points(seeds), seeds) for name, seeds in points.items()]
    start = evaluator.base.get("prior_accuracy", 0.0), evaluator.base["accuracy"]
    bases = list(dict.fromkeys([start, *bases_of(points)]))
    kept = "prior abilities, accuracy" if config.prior else "-KL(base||model), nats per token"
    trade_off(curves, bases, teacher["accuracy"] if teacher else None, kept, "new task, accuracy", file=file)
