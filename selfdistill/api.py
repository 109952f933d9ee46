"""What a person calls from Python: the functions and names that ``import selfdistill`` offers.

Each function takes the settings of the command of its name, with the same defaults, and returns a result that prints
itself. Nothing is printed but progress, on standard error; ``progress=False`` sends it to the logger ``selfdistill``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfdistill.comparison import CompareResult
from selfdistill.comparison import compare as run_comparison
from selfdistill.comparison import report as write_report
from selfdistill.config import (
    AskConfig,
    CheckConfig,
    CompareConfig,
    EvalConfig,
    ExportConfig,
    LearnConfig,
    QuestionsConfig,
    ReportConfig,
    TrainConfig,
    continued,
)
from selfdistill.continual import LearnResult
from selfdistill.continual import learn as run_action
from selfdistill.data import Rows, load_demonstrations, write_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluation import AskResult, CheckResult, EvalResult, check_inputs
from selfdistill.evaluation import ask as ask_question
from selfdistill.evaluation import check as run_check
from selfdistill.evaluation import evaluate as run_evaluation
from selfdistill.methods import METHODS
from selfdistill.model import LoadedModel, adopt, to_best_device
from selfdistill.questions import QuestionsResult, with_questions
from selfdistill.questions import make_questions as run_questions
from selfdistill.runtime import check_tracker, progress_shown, say
from selfdistill.training import OnStep, Plan, Run, check_output_dir
from selfdistill.training import export as run_export
from selfdistill.training import plan as run_plan
from selfdistill.training import train as run_training

Model = str | os.PathLike[str] | Any
"""A folder, run folder, hub id or ``smollm2-135m``; or a loaded ``PreTrainedModel``, with ``tokenizer=``."""


def check(model: Model, data: Rows, *, tokenizer: Any = None, progress: bool = True, **settings: Any) -> CheckResult:
    """Before training: will it help, and how is the demonstration best shown?

    Args:
        model: which model; see :data:`Model`.
        data: demonstrations: a path, dicts, :class:`Demonstration`s or a ``datasets.Dataset``.
        tokenizer: of a loaded model.
        progress: show bars and notes.
        settings: fields of :class:`selfdistill.config.CheckConfig`.

    Raises:
        UserError: bad settings, data or model, or no layout that fits.
    """
    with _session(progress):
        name, loaded = _model(model, tokenizer)
        path, rows = _data(data)
        return run_check(CheckConfig(model=name, data=path, **settings), rows, loaded)


def train(
    model: Model | TrainConfig | None = None,
    data: Rows | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    test: Rows | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Teach a model from demonstrations.

    Args:
        model: which model; see :data:`Model`. A loaded one is trained in place. A :class:`TrainConfig` stands for all
            settings.
        data: demonstrations; rows in memory are kept as ``data.jsonl`` in the run folder.
        output_dir: the run folder. An existing one is never overwritten.
        test: held-out rows on which the model is measured; kept as ``test.jsonl`` where they are in memory.
        tokenizer: of a loaded model.
        resume: go on with the run in ``output_dir``; the settings saved there hold.
        on_step: called as ``on_step(step, model, metrics)`` after every step; ends the run where it returns True.
        progress: show bars and notes.
        settings: fields of :class:`TrainConfig`.

    Raises:
        UserError: anything the user can mend.
        RunStopped: a signal came; everything is saved.
        RunFailed: training diverged.
    """
    with _session(progress):
        given = _given(model, output_dir, settings)
        config, loaded = _train_config(given, data, test, tokenizer, resume)
        run_training(config, resume=resume, loaded=loaded, on_step=on_step)
        return Run(Path(config.output_dir))


def plan(
    model: Model | TrainConfig,
    data: Rows | None = None,
    *,
    output_dir: str | os.PathLike[str] = "runs/plan",
    tokenizer: Any = None,
    progress: bool = True,
    **settings: Any,
) -> Plan:
    """What :func:`train` would do: settings, one row as student and teacher see it, time and memory of a step.

    Two steps are done in memory and thrown away; nothing is written. The arguments are those of :func:`train`.
    """
    with _session(progress):
        given = _given(model, output_dir, settings)
        given["model"], loaded = _model(given.get("model", ""), tokenizer)
        rows = None
        if data is not None:
            given["data"], rows = _data(data)
        config = TrainConfig(**given)
        if config.documents:
            raise UserError("setting 'documents': make the questions first (selfdistill questions), then plan on them")
        METHODS[config.method](config)
        return run_plan(config, None if rows is None else load_demonstrations(rows), loaded)


def evaluate(
    model: Model,
    data: Rows,
    *,
    base: Model | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **settings: Any,
) -> EvalResult:
    """Measure the new task, what the model could do before, and how far it has moved from its base.

    Args:
        model: which model; see :data:`Model`.
        data: rows of the new task, with ``completion`` or ``answer``.
        base: the model it began as, measured on the same items.
        tokenizer: of a loaded model, and of a loaded base.
        progress: show bars and notes.
        settings: fields of :class:`selfdistill.config.EvalConfig`.

    Raises:
        UserError: bad settings, data or model.
    """
    with _session(progress):
        name, loaded = _model(model, tokenizer)
        base_name, base_loaded = (None, None) if base is None else _model(base, tokenizer)
        path, rows = _data(data)
        config = EvalConfig(model=name, data=path, base=base_name, **settings)
        details = run_evaluation(config, rows, loaded, base_loaded)
        return EvalResult(name, path, details)


def compare(
    model: str | os.PathLike[str] | None = None,
    data: Rows | None = None,
    *,
    test: Rows | None = None,
    output_dir: str | os.PathLike[str],
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> CompareResult:
    """Train by several methods on equal terms: what each gained and lost.

    Args:
        model: a name; every run loads it anew.
        data: demonstrations; rows in memory are kept in the folder.
        test: held-out rows on which every run is measured.
        output_dir: a folder with a run folder for each method, learning rate and seed.
        resume: go on; finished runs are kept, and ``seeds`` may be more.
        progress: show bars and notes.
        settings: fields of :class:`selfdistill.config.CompareConfig`.

    Raises:
        UserError: anything the user can mend.
        RunStopped: a signal came; what was done is saved.
    """
    with _session(progress):
        given = _given(model, output_dir, settings)
        given |= _kept_rows({"data": data, "test": test}, Path(output_dir), resume)
        config = continued(given, CompareConfig)[0] if resume else CompareConfig(**given)
        return run_comparison(config, resume=resume)


def learn(
    action: str,
    data: Rows | None = None,
    *,
    state: str | os.PathLike[str],
    test: Rows | None = None,
    progress: bool = True,
    **settings: Any,
) -> LearnResult:
    """Keep one model learning: skill by skill, each accepted only if the others stay.

    Args:
        action: ``add``, ``stream``, ``status``, ``history``, ``rollback``, ``discard`` or ``export``.
        data: demonstrations of the skill. Rows in memory need ``name``, the skill's.
        state: folder that is the memory of one model.
        test: held-out rows of the skill.
        progress: show bars and notes.
        settings: fields of :class:`selfdistill.config.LearnConfig`.

    Raises:
        UserError: anything the user can mend.
        RunStopped: a signal came; the same call goes on.
    """
    with _session(progress), tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"action": action, "state": os.fspath(state)} | settings
        for name, rows in (("data", data), ("test", test)):
            if rows is None:
                continue
            given[name], in_memory = _data(rows)
            if in_memory is not None:
                if not given.get("name"):
                    raise UserError("rows in memory have no name: give name=..., the skill's")
                given[name] = str(Path(folder) / f"{name}.jsonl")
                write_demonstrations(Path(given[name]), load_demonstrations(in_memory, completion_required=False))
        return run_action(LearnConfig(**given))


def ask(
    run: str | os.PathLike[str],
    question: str,
    *,
    base: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> AskResult:
    """Ask a model, and its base beside it, one question.

    Args:
        run: run folder, model folder, hub id or ``smollm2-135m``.
        question: one user turn.
        base: a second model to ask the same.
        progress: show bars and notes.
        settings: fields of :class:`selfdistill.config.AskConfig`.
    """
    with _session(progress):
        base_name = None if base is None else os.fspath(base)
        return ask_question(AskConfig(run=os.fspath(run), question=question, base=base_name, **settings))


def make_questions(
    model: str | os.PathLike[str],
    documents: str | os.PathLike[str],
    *,
    output_dir: str | os.PathLike[str],
    progress: bool = True,
    **settings: Any,
) -> QuestionsResult:
    """Make questions about documents, to learn them by.

    Args:
        model: the model that is to be taught; it writes and answers the questions.
        documents: a folder of ``.txt``, ``.md``, ``.html`` or ``.pdf`` files, or one file.
        output_dir: where ``train.jsonl``, ``test.jsonl`` and ``indirect.jsonl`` go.
        progress: show bars and notes.
        settings: fields of :class:`selfdistill.config.QuestionsConfig`.
    """
    with _session(progress):
        places: dict[str, Any] = {"model": model, "documents": documents, "output_dir": output_dir}
        config = QuestionsConfig(**{name: os.fspath(place) for name, place in places.items()} | settings)
        return QuestionsResult(Path(config.output_dir), run_questions(config))


def report(*runs: str | os.PathLike[str] | Run, output: str | os.PathLike[str] = "report.html") -> Path:
    """Write runs and comparisons into one HTML file that opens offline; returns its path."""
    folders = [str(run.output_dir) if isinstance(run, Run) else os.fspath(run) for run in runs]
    write_report(ReportConfig(runs=folders, output=os.fspath(output)))
    return Path(output)


def export(
    run: str | os.PathLike[str] | Run, *, output_dir: str | os.PathLike[str], merge: bool = False, progress: bool = True
) -> Path:
    """Copy the final model of a run to a folder; ``merge`` folds a LoRA adapter into its base."""
    with _session(progress):
        folder = str(run.output_dir) if isinstance(run, Run) else os.fspath(run)
        return run_export(ExportConfig(run=folder, output_dir=os.fspath(output_dir), merge=merge))


# --- from what the caller gave to settings, rows and models ---


@contextmanager
def _session(progress: bool) -> Iterator[None]:
    """Libraries quiet while models load and save, and progress shown or not."""
    import warnings

    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    with warnings.catch_warnings(), progress_shown(progress):
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's call, not the user's
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            if bars:
                transformers.utils.logging.enable_progress_bar()


def _given(
    model: Model | TrainConfig | None, output_dir: str | os.PathLike[str] | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings that were given, those of a :class:`TrainConfig` below the others."""
    given: dict[str, Any] = {}
    if isinstance(model, TrainConfig):
        given = model.model_dump(exclude_unset=True)
    elif model is not None:
        given["model"] = os.fspath(model) if isinstance(model, os.PathLike) else model
    if output_dir is not None:
        given["output_dir"] = os.fspath(output_dir)
    return given | settings


def _model(model: Model, tokenizer: Any) -> tuple[str, LoadedModel | None]:
    """The model's name, and the model itself where it is loaded already."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model), None
    loaded = to_best_device(adopt(model, tokenizer))
    return loaded.name, loaded


def _data(data: Rows) -> tuple[str, Rows | None]:
    """The path of the data, or a word for it and the rows themselves where they are in memory."""
    return (os.fspath(data), None) if isinstance(data, str | os.PathLike) else ("data", data)


def _train_config(
    given: dict[str, Any], data: Rows | None, test: Rows | None, tokenizer: Any, resume: bool
) -> tuple[TrainConfig, LoadedModel | None]:
    """The settings of a run, all that is theirs checked, and the model where it is loaded already."""
    loaded = None
    if "model" in given:
        given["model"], loaded = _model(given["model"], tokenizer)
    folder = Path(str(given["output_dir"])) if "output_dir" in given else None
    if resume and folder and (folder / "config.yaml").exists():
        given.pop("documents", None)  # the settings there name the questions that were made of them
    given |= _kept_rows({"data": data, "test": test}, folder, resume)
    saved = None
    if resume:
        config, saved = continued(given, TrainConfig)
    else:
        config = TrainConfig(**given)
    if saved and saved.max_steps != config.max_steps:
        change = f"max_steps was {saved.max_steps} and is now {config.max_steps}"
        say(f"{change}: from here on the learning rate is that of a run of so many steps")
    check_output_dir(config.output_dir, resume=resume)
    check_tracker(config.report_to)
    check_inputs(config)
    METHODS[config.method](config)  # its rules, before any long work
    if config.documents:
        if loaded is not None:
            raise UserError("setting 'documents': the model writes the questions first, so give its name or folder")
        config = with_questions(config)
    return config, loaded


def _kept_rows(given: dict[str, Rows | None], folder: Path | None, resume: bool) -> dict[str, str]:
    """The paths of the data by setting; rows in memory are written into the folder, so that the run can go on.

    Raises:
        UserError: rows that cannot be used; a folder that is taken; or other rows than a run that goes on began with.
    """
    paths: dict[str, str] = {}
    for name, rows in given.items():
        if rows is None:
            continue
        paths[name], in_memory = _data(rows)
        if in_memory is None:
            continue
        if folder is None:
            raise UserError("setting 'output_dir' is required: give output_dir=...")
        file = check_output_dir(str(folder), resume=resume) / f"{name}.jsonl"
        loaded = load_demonstrations(in_memory, completion_required=name == "data")
        paths[name] = str(file)
        if resume and file.exists():
            before = load_demonstrations(str(file), completion_required=False)
            if [row.identity() for row in before] != [row.identity() for row in loaded]:
                raise UserError(f"{file}: the run began with other rows: give the same, or choose another output_dir")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_demonstrations(file, loaded)
    return paths
