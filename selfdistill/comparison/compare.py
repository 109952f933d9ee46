"""``selfdistill compare``: the same demonstrations through several methods, on equal terms.

Every run has the same base, rows, number of steps and settings, and is measured on the same items at the same steps;
what differs is the method, the learning rate and the seed. Each run is a folder of its own, so that a comparison that
was stopped goes on where it was.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from selfdistill.comparison.compare_result import CompareResult
from selfdistill.comparison.conclusions import Compared, mean_points, points_of, sentences, table
from selfdistill.comparison.plots import Curve, trade_off
from selfdistill.config import CompareConfig, TrainConfig, TrainingSettings, dump_yaml, load_yaml, refuse_changes
from selfdistill.data import ChatFormat, Demonstration, load_demonstrations
from selfdistill.errors import RunFailed, RunStopped, UserError
from selfdistill.evaluation import Evaluator, best_context, check_inputs, rows_fingerprint
from selfdistill.methods import DemonstrationExamples, stages_of, unused_settings, uses
from selfdistill.model import LoadedModel, load_for_training, start_fingerprint
from selfdistill.runtime import StopRequests, read_lines, say, write_atomically
from selfdistill.training import check_output_dir, list_checkpoints, train

ORACLE_RAG = "document:show=document"
"""What a model that is never trained is given with each question: the right document."""
_SAFE = ":=, "
"""Kept in the names of folders, beside letters, digits and ``_.-~``."""
_BUDGET = ("max_steps", "batch_size", "num_demonstrations")
"""Settings that the sentence on the budget is about."""
EVALUATIONS = 5
"""Measurements of a run after its start, where ``eval_steps`` is 0."""


def compare(config: CompareConfig, *, resume: bool = False) -> CompareResult:
    """Run every method, learning rate and seed.

    ``output_dir`` gets ``comparison.json``, written anew after every run, ``trade_off.svg`` and a folder for each run.

    Args:
        config: settings.
        resume: go on: runs that are finished are kept.

    Returns:
        The result. Its ``details`` are what ``comparison.json`` holds: ``model``, ``data``, ``test``, ``prior``,
        ``budget``, ``sentence``, ``base``, ``teacher`` and ``moved`` (the in-context assumption), ``rag`` (the base
        with each question's document, where the rows have them), ``runs``, ``table``.

    Raises:
        UserError: anything the user can mend.
        RunStopped: a signal came; what was done is saved.
    """
    folder = check_output_dir(config.output_dir, resume=resume)
    config = _settled(config, folder, resume)
    base = load_for_training(config.model, dtype=config.dtype)
    demonstrations = _common_rows(config, base)
    evaluator = Evaluator(config, base)
    teacher = None if config.context == "auto" else evaluator.shown(base, config.context, "teacher")
    shown = {"teacher": teacher, "rag": _rag(evaluator, base)}
    _begin(folder, config, demonstrations, evaluator, base)
    del base
    config = _with_steps(config, len(demonstrations))
    done, result = _run_all(folder, config, evaluator, demonstrations, shown)
    _draw(config, done, evaluator, teacher, folder / "trade_off.svg")
    if teacher and any(run.failed is None for run in done):
        result["moved"] = _moved(config, evaluator, done)
        _write(folder, result)
    return CompareResult(folder, result)


def _settled(config: CompareConfig, folder: Path, resume: bool) -> CompareConfig:
    """The settings, checked, with the context that a resumed comparison used or that the check finds best.

    Raises:
        UserError: a setting that may not change has changed, or an input that cannot be used.
    """
    written = folder / "config.yaml"
    if resume and written.exists():
        saved = CompareConfig(**load_yaml(written, CompareConfig))
        if config.context == "auto":
            config = config.model_copy(update={"context": saved.context})
        refuse_changes(written, saved, config)
    check_inputs(config)
    if "auto" in config.vary.get("context", ()):
        raise UserError("setting 'vary': context 'auto' is what the check finds best; name the contexts to compare")
    first = [_run_config(config, method, None, config.seeds[0], values) for method, values in _kinds(config)]
    taught = [run for run in first if run.context == "auto" and uses(run, "context")]
    return config.model_copy(update={"context": best_context(taught[0])}) if taught else config


def _with_steps(config: CompareConfig, rows: int) -> CompareConfig:
    """The settings with the steps of every run and between its measurements, for so many rows."""
    count = min(rows, config.num_demonstrations or rows)
    steps = config.max_steps or math.ceil(count * config.num_train_epochs / config.batch_size)
    eval_steps = config.eval_steps or math.ceil(steps / EVALUATIONS)
    return config.model_copy(update={"max_steps": steps, "eval_steps": eval_steps})


def _begin(
    folder: Path,
    config: CompareConfig,
    demonstrations: list[Demonstration],
    evaluator: Evaluator,
    base: LoadedModel,
) -> None:
    """Write what the comparison begins with; one that is resumed must find it unchanged.

    Raises:
        UserError: it has changed.
    """
    began = {
        "the demonstrations": rows_fingerprint({"": demonstrations}),
        "the base": start_fingerprint(base),
        "the test rows or prior questions": evaluator.questions.fingerprint(),
    }
    _check_unchanged(folder, began)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "began.json", json.dumps(began))
    write_atomically(folder / "config.yaml", dump_yaml(config))


def _run_all(
    folder: Path,
    config: CompareConfig,
    evaluator: Evaluator,
    demonstrations: list[Demonstration],
    shown: dict[str, dict[str, Any] | None],
) -> tuple[list[Compared], dict[str, Any]]:
    """Every run, and the result, which is written anew after each.

    Raises:
        RunStopped: a signal came before the last run.
    """
    runs = runs_of(config)
    done: list[Compared] = []
    result: dict[str, Any] = {}
    with StopRequests() as stop:
        for number, (label, run) in enumerate(runs):
            name = Path(run.output_dir).name
            say(f"run {number + 1} of {len(runs)}: {name}")
            try:
                done.append(_one(label, run, evaluator, demonstrations))
            except RunStopped as stopped:
                stop.received = stopped.signal_number
            if done:
                result = _summary(config, evaluator, shown, done)
                _write(folder, result)
            if stop.received is not None and len(done) < len(runs):
                message = f"{folder}: stopped in run {number + 1} of {len(runs)} ({name}); what is done is kept; "
                message += f"continue with selfdistill compare --resume --output_dir {folder}"
                raise RunStopped(message, stop.received)
            gc.collect()
    return done, result


def _check_unchanged(folder: Path, began: dict[str, str]) -> None:
    """That runs to come are like those in the folder.

    Raises:
        UserError: they would learn from, begin as or be measured on something else.
    """
    file = folder / "began.json"
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else began
    if changed := [what for what, value in began.items() if there[what] != value]:
        raise UserError(
            f"{folder}: not what this comparison began with: {', '.join(changed)}; put model, data, test and prior "
            "back as they were, or compare in another --output_dir"
        )


def _rag(evaluator: Evaluator, base: LoadedModel) -> dict[str, Any] | None:
    """The base with each question's document; None where the rows have none, or one does not fit."""
    try:
        return evaluator.shown(base, ORACLE_RAG, "oracle RAG")
    except UserError as error:
        say(f"note: oracle RAG is left out: {error}")
        return None


def _write(folder: Path, result: dict[str, Any]) -> None:
    write_atomically(folder / "comparison.json", json.dumps(result, ensure_ascii=False))


def _moved(config: CompareConfig, evaluator: Evaluator, done: list[Compared]) -> dict[str, float]:
    """KL(model||base) on the test rows, of the first finished run of each method and learning rate, by its name.

    Beside the teacher's own distance it tells whether the second condition of the method holds: the teacher is nearer
    to the base than what fine-tuning makes of it.
    """
    first: dict[tuple[str, float], Compared] = {}
    for run in done:
        if run.failed is None:
            first.setdefault((run.method, run.learning_rate), run)
    base, folder = load_for_training(config.model, dtype=config.dtype), Path(config.output_dir)
    return {
        run.name: evaluator.moved(base, load_for_training(str(folder / run.folder), dtype=config.dtype))
        for run in first.values()
    }


def _kinds(config: CompareConfig) -> list[tuple[str, dict[str, Any]]]:
    """Each method with each value of what is varied beside it."""
    varied = [{name: value} for name, values in config.vary.items() for value in values] or [{}]
    return [(method, values) for method in config.methods for values in varied]


def _used(run: TrainConfig, values: dict[str, Any]) -> dict[str, Any]:
    """What is varied, as far as the run's method uses it."""
    return {name: value for name, value in values.items() if uses(run, name)}


def runs_of(config: CompareConfig) -> list[tuple[str, TrainConfig]]:
    """Every run with what it is called; what is varied and not used by a method makes no further run of it."""
    runs: dict[str, tuple[str, TrainConfig]] = {}
    for seed in config.seeds:
        for rate in config.learning_rates or (None,):
            for method, values in _kinds(config):
                run = _run_config(config, method, rate, seed, values)
                label = " ".join([method, *(f"{name}={value}" for name, value in _used(run, values).items())])
                runs.setdefault(run.output_dir, (label, run))
    return list(runs.values())


def _run_config(
    config: CompareConfig, method: str, rate: float | None, seed: int, values: dict[str, Any]
) -> TrainConfig:
    shared = {name: getattr(config, name) for name in TrainingSettings.model_fields} | values
    run = TrainConfig(**shared | {"method": method, "learning_rate": rate, "seed": seed, "output_dir": "run"})
    run = run.model_copy(update={name: TrainConfig.model_fields[name].default for name in unused_settings(run)})
    parts = [method, *(f"{name}_{quote(str(value), safe=_SAFE)}" for name, value in _used(run, values).items())]
    parts += [] if rate is None else [f"{rate:g}"]
    return run.model_copy(update={"output_dir": str(Path(config.output_dir) / "-".join([*parts, f"seed{seed}"]))})


def _common_rows(config: CompareConfig, base: LoadedModel) -> list[Demonstration]:
    """The demonstrations that every method has room for: all of them, or with ``on_long_prompt: drop`` those that fit.

    Raises:
        UserError: rows that do not fit, or that lack what a method learns from.
    """
    rows = load_demonstrations(config.data, split=config.split)
    count, chat = len(rows), ChatFormat(base.tokenizer, base.end_token_ids, config.chat_template_kwargs)
    for name, values in _kinds(config):
        for stage in stages_of(_run_config(config, name, None, config.seeds[0], values)):
            fitting, _ = stage.examples(
                rows, base, chat
            )  # of every kind, so that what is missing is told before any run
            if isinstance(stage.examples, DemonstrationExamples):
                rows = [row.demonstration for row in fitting]
    if len(rows) < count:
        say(f"{count - len(rows)} of {count} rows do not fit every method and are left out for all")
    return rows


def _one(label: str, run: TrainConfig, evaluator: Evaluator, demonstrations: list[Demonstration]) -> Compared:
    """Train where that is not done yet, and read what was measured."""
    folder = Path(run.output_dir)
    failure, failed = folder / "failed.txt", None
    if not (folder / "final").is_dir() and not failure.is_file():
        try:
            train(run, resume=folder.exists(), demonstrations=demonstrations, evaluator=evaluator)
        except RunFailed as error:
            write_atomically(failure, str(error))
        for checkpoint in list_checkpoints(folder):  # only for a run that was stopped
            shutil.rmtree(checkpoint)
    if failure.is_file():
        failed = failure.read_text(encoding="utf-8")
        say(f"note: this run failed: {failed}")
    evaluations = read_lines(folder / "evaluations.jsonl")
    saved = TrainConfig(**load_yaml(folder / "config.yaml", TrainConfig))
    open_ = {key: getattr(saved, key) for key, value in run.model_dump().items() if value in (None, "auto")}
    refuse_changes(folder / "config.yaml", saved, run.model_copy(update=open_))  # open: decided when it began
    assert saved.learning_rate is not None, "a run resolves its settings"
    return Compared(label, saved.learning_rate, run.seed, folder.name, evaluations, failed)


def _summary(
    config: CompareConfig, evaluator: Evaluator, shown: dict[str, dict[str, Any] | None], done: list[Compared]
) -> dict[str, Any]:
    budget = f"Every run has {config.max_steps} steps of {config.batch_size} prompts of the same demonstrations"
    budget += "".join(f", but for {name}, which is varied" for name in config.vary if name in _BUDGET) + "."
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
    curves = [Curve(name, mean_points(seeds), seeds) for name, seeds in points_of(done).items()]
    start = evaluator.base.get("prior_accuracy", 0.0), evaluator.base["accuracy"]
    kept = "prior abilities, share right" if config.prior else "-KL(base||model), nats per token"
    trade_off(curves, start, teacher["accuracy"] if teacher else None, kept, "new task, share right", file=file)
