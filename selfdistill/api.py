"""What a person calls from Python: the functions and names that ``import selfdistill`` offers.

Each function takes the settings of the command of its name, with the same defaults, and returns a result that prints
itself. Nothing is printed but progress, on standard error; ``progress=False`` sends it to the logger ``selfdistill``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from selfdistill.api_inputs import Model, data_of, given_settings, kept_rows, model_of, session, train_config
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
from selfdistill.evaluation import AskResult, CheckResult, EvalResult
from selfdistill.evaluation import ask as ask_question
from selfdistill.evaluation import check as run_check
from selfdistill.evaluation import evaluate as run_evaluation
from selfdistill.methods import stages_of
from selfdistill.questions import QuestionsResult
from selfdistill.questions import make_questions as run_questions
from selfdistill.training import OnStep, Plan, Run
from selfdistill.training import export as run_export
from selfdistill.training import plan as run_plan
from selfdistill.training import train as run_training


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
    with session(progress):
        name, loaded = model_of(model, tokenizer)
        path, rows = data_of(data)
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
    with session(progress):
        given = given_settings(model, output_dir, settings)
        config, loaded = train_config(given, data, test, tokenizer, resume)
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
    with session(progress):
        given = given_settings(model, output_dir, settings)
        given["model"], loaded = model_of(given.get("model", ""), tokenizer)
        rows = None
        if data is not None:
            given["data"], rows = data_of(data)
        config = TrainConfig(**given)
        if config.documents:
            raise UserError("setting 'documents': make the questions first (selfdistill questions), then plan on them")
        stages_of(config)
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
    with session(progress):
        name, loaded = model_of(model, tokenizer)
        base_name, base_loaded = (None, None) if base is None else model_of(base, tokenizer)
        path, rows = data_of(data)
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
    with session(progress):
        given = given_settings(model, output_dir, settings)
        given |= kept_rows({"data": data, "test": test}, Path(output_dir), resume)
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
    with session(progress), tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"action": action, "state": os.fspath(state)} | settings
        for name, rows in (("data", data), ("test", test)):
            if rows is None:
                continue
            given[name], in_memory = data_of(rows)
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
    with session(progress):
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
    with session(progress):
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
    with session(progress):
        folder = str(run.output_dir) if isinstance(run, Run) else os.fspath(run)
        return run_export(ExportConfig(run=folder, output_dir=os.fspath(output_dir), merge=merge))
