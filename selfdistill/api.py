"""The Python API: the functions of ``import selfdistill``.

Each function takes the settings of the command of the same name, with the same defaults, and returns a result that
prints itself, or the path of what it wrote. Progress goes to standard error, or with ``progress=False`` to the logger
``selfdistill``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from selfdistill.api_inputs import (
    Model,
    callback_of,
    check_adapter,
    check_config,
    check_start,
    data_of,
    given_settings,
    learn_config,
    model_of,
    on_best_device,
    rows_of_run,
    run_to_plan,
    session,
    train_config,
)
from selfdistill.comparison import CompareResult
from selfdistill.comparison import compare as run_comparison
from selfdistill.comparison import report as write_report
from selfdistill.config import (
    AskConfig,
    CompareConfig,
    EvalConfig,
    ExportConfig,
    MergeConfig,
    QuestionsConfig,
    ReportConfig,
    TrainConfig,
    continued,
)
from selfdistill.continual import LearnResult
from selfdistill.continual import learn as run_action
from selfdistill.data import Message, Rows
from selfdistill.errors import UserError
from selfdistill.evaluation import AskResult, CheckResult, EvalResult
from selfdistill.evaluation import ask as ask_question
from selfdistill.evaluation import check as run_check
from selfdistill.evaluation import evaluate as run_evaluation
from selfdistill.model import switched_back, with_own_dtype
from selfdistill.questions import QuestionsResult, with_questions
from selfdistill.questions import make_questions as run_questions
from selfdistill.runtime import planned_devices
from selfdistill.training import Fit, Plan, Run, repeating
from selfdistill.training import export as run_export
from selfdistill.training import merge as run_merge
from selfdistill.training import plan as run_plan
from selfdistill.training import plan_for as run_plan_for
from selfdistill.training import train as run_training


def check(model: Model, data: Rows, *, tokenizer: Any = None, progress: bool = True, **settings: Any) -> CheckResult:
    """Before training, check whether self-distillation will help and which context is best.

    Args:
        model: the model; see :data:`Model`.
        data: demonstrations; see :data:`Rows`.
        tokenizer: of a loaded model.
        progress: show bars and notes.
        settings: the options of ``selfdistill check``, except ``memory`` and ``device``, for which there is
            :func:`memory_plan`. ``anchors`` may also be rows in memory.

    Raises:
        UserError: settings, data or model are invalid, or no context layout fits.
    """
    with session(progress):
        name, loaded = model_of(model, tokenizer)
        path, rows = data_of(data)
        config, anchors = check_config(with_own_dtype({"model": name, "data": path, **settings}, loaded))
        return run_check(config, rows, on_best_device(loaded), anchors=anchors)


def train(
    model: Model | TrainConfig | None = None,
    data: Rows | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    test: Rows | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    on_step: Callable[[int, Any, dict[str, Any]], object] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Teach a model from demonstrations.

    Args:
        model: the model; see :data:`Model`. A loaded model is trained in place; with ``lora_rank`` it stays as it was.
            Or a :class:`TrainConfig` with all settings.
        data: demonstrations; see :data:`Rows`. In-memory rows are saved as ``data.jsonl`` in the run folder.
        output_dir: the run folder. An existing run is never overwritten.
        test: held-out rows on which the model is evaluated. In-memory rows are saved as ``test.jsonl``.
        tokenizer: of a loaded model.
        resume: resume the run in ``output_dir`` with the settings saved there. Reload a model that was trained in
            place, or leave ``model`` and ``tokenizer`` out: the run then loads it by its name.
        on_step: called as ``on_step(step, model, metrics)`` after every step, with the transformers model (with
            ``lora_rank`` a ``PeftModel``), which :func:`evaluate` takes; see :data:`OnStep`. If it raises an exception,
            the run stops there with its progress saved.
        progress: show bars and notes.
        settings: fields of :class:`TrainConfig`. ``anchors`` may also be rows in memory, saved as ``anchors.jsonl``.

    Raises:
        UserError: a mistake the user can fix.
        RunStopped: a signal stopped the run; its progress is saved.
        RunFailed: training diverged or collapsed.
    """
    with session(progress, resume=resume):
        callback = callback_of(on_step)
        given = given_settings(model, output_dir, settings)
        loaded = None
        if "model" in given or tokenizer is not None:
            given["model"], loaded = model_of(given.get("model"), tokenizer)
        rows = rows_of_run(data, test, given)
        config = train_config(given | rows.paths, loaded, resume=resume)
        with repeating(config), rows.kept(), switched_back(loaded) if loaded else nullcontext():
            check_start(config, loaded, rows, resume=resume)
            if config.documents:
                config = with_questions(config)
            run_training(config, resume=resume, loaded=loaded, on_step=callback, own_files=rows.names)
        return Run(config.output_dir)


def plan(
    model: Model | TrainConfig,
    data: Rows | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    test: Rows | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **settings: Any,
) -> Plan:
    """What :func:`train` would do: settings, one row as student and teacher see it, time and memory of a step.

    Two steps are done in memory, on a copy of a loaded model, and discarded; nothing is left behind. The arguments are
    those of :func:`train`; without ``output_dir`` the plan is that of a run in a temporary folder, so training with
    ``plan.config`` needs one.
    """
    with session(progress), tempfile.TemporaryDirectory() as folder:
        config, loaded, rows = run_to_plan(model, data, test, output_dir, tokenizer, settings, folder)
        check_adapter(config, loaded)
        with repeating(config), rows.kept(planned=True):
            return run_plan(config, loaded, own_files=rows.names, temporary=folder)


def memory_plan(
    model: Model | TrainConfig,
    data: Rows | None = None,
    *,
    memory: str | None = None,
    device: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **settings: Any,
) -> Fit:
    """The memory and a rough time that :func:`train` would need on a GPU, and the nearest settings that fit into it.

    Reads ``config.json``, the tokenizer and the data, but no weights.

    Args:
        model: as for :func:`train`.
        data: as for :func:`train`.
        memory: of the GPU, such as ``80GiB`` or ``24GB``; of several, ``8x80GiB``; default: that of ``device``.
        device: a GPU such as ``h100``, several such as ``8xh100``, or ``this`` for the device here, which is measured
            for a second. Without it, no time is planned.
        output_dir: as for :func:`train`; need not be given.
        tokenizer: of a loaded model.
        progress: show notes.
        settings: fields of :class:`TrainConfig`.

    Raises:
        UserError: settings, data or model are invalid, or neither ``memory`` nor ``device`` is given.
    """
    size, name, count = planned_devices(memory, device)
    with session(progress), tempfile.TemporaryDirectory() as folder:
        config, loaded, rows = run_to_plan(model, data, None, output_dir, tokenizer, settings, folder)
        with rows.kept(planned=True):
            return run_plan_for(config, size, name, loaded, own_files=rows.names, count=count)


def evaluate(
    model: Model,
    data: Rows,
    *,
    base: Model | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **settings: Any,
) -> EvalResult:
    """Evaluate the new task, prior abilities and the distance from the base.

    Args:
        model: the model; see :data:`Model`. Also a ``PeftModel``.
        data: rows of the new task, with ``completion`` or ``answer``; see :data:`Rows`.
        base: the model before training, evaluated on the same items.
        tokenizer: of a loaded model and a loaded base.
        progress: show bars and notes.
        settings: the options of ``selfdistill eval``.

    Raises:
        UserError: settings, data or model are invalid.
    """
    with session(progress):
        name, loaded = model_of(model, tokenizer, beside=base, trained=False)
        base_name, base_loaded = (None, None) if base is None else model_of(base, tokenizer, model, trained=False)
        path, rows = data_of(data)
        config = EvalConfig(**with_own_dtype({"model": name, "data": path, "base": base_name, **settings}, loaded))
        details = run_evaluation(config, rows, on_best_device(loaded), base_loaded)
        return EvalResult(name, path, replies=details.pop("replies"), details=details)


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
    """Train with several methods on equal terms, and compare what each gained and forgot.

    Args:
        model: a folder or name; every run loads it again.
        data: demonstrations; see :data:`Rows`. In-memory rows are saved in ``output_dir``.
        test: held-out rows on which every run is evaluated.
        output_dir: folder of the comparison, with a run folder for each method, learning rate and seed.
        resume: resume the comparison; its runs are kept, and ``methods``, ``seeds`` and more values may be added.
        progress: show bars and notes.
        settings: the options of ``selfdistill compare``. ``anchors`` may also be rows in memory.

    Raises:
        UserError: a mistake the user can fix.
        RunStopped: a signal stopped the comparison; its progress is saved.
    """
    with session(progress, resume=resume, alone="compare"):
        given = given_settings(model, output_dir, settings)
        if not isinstance(given.get("model", ""), str):
            raise UserError("model: found a loaded model, but every run loads its own; save it and give its folder")
        rows = rows_of_run(data, test, given)
        given |= rows.paths
        config = continued(given, CompareConfig) if resume else CompareConfig(**given)
        with repeating(config), rows.kept():
            return run_comparison(config, resume=resume, own_files=rows.names)


def learn(
    action: str,
    data: Rows | None = None,
    *,
    state: str | os.PathLike[str],
    test: Rows | None = None,
    progress: bool = True,
    **settings: Any,
) -> LearnResult:
    """Teach one model skill after skill, each accepted only if earlier ones are retained.

    Args:
        action: ``add``, ``stream``, ``status``, ``history``, ``rollback``, ``restore``, ``discard`` or ``export``.
        data: demonstrations of the skill; see :data:`Rows`. In-memory rows need ``name``, the name of the skill.
        state: folder that holds one model's state.
        test: held-out rows of the skill.
        progress: show bars and notes.
        settings: the options of ``selfdistill learn``.

    Raises:
        UserError: a mistake the user can fix.
        RunStopped: a signal stopped the action; repeat the call to resume.
    """
    with session(progress, alone="learn"):
        config, in_memory = learn_config({"action": action, "state": state} | settings, {"data": data, "test": test})
        with repeating(config):
            return run_action(config, in_memory)


def ask(
    run: str | os.PathLike[str],
    question: str | Sequence[Message],
    *,
    base: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> AskResult:
    """Ask a model one question, and optionally its base. With ``environment``, each plays an episode.

    Args:
        run: run folder, model folder, hub id or ``smollm2-135m``.
        question: one user turn, or the chat messages of a conversation.
        base: a second model that is asked the same.
        progress: show bars and notes.
        settings: the options of ``selfdistill ask``, such as ``image``. ``environment`` may also be functions.

    Raises:
        UserError: a model cannot be loaded, the picture cannot be used or read by it, or the environment fails.
    """
    with session(progress):
        conversation = question if isinstance(question, list | tuple) else None
        places: dict[str, Any] = {"run": run, "base": base, "question": question if conversation is None else ""}
        return ask_question(AskConfig(**places, **settings), conversation)


def make_questions(
    model: str | os.PathLike[str],
    documents: str | os.PathLike[str],
    *,
    output_dir: str | os.PathLike[str],
    progress: bool = True,
    **settings: Any,
) -> QuestionsResult:
    """Make questions about documents, as training data that teaches their content.

    Args:
        model: the model to teach. It answers the questions and, without a writer, writes them.
        documents: a folder of ``.txt``, ``.md``, ``.html`` or ``.pdf`` files, or one file.
        output_dir: folder for ``train.jsonl``, ``test.jsonl`` and ``indirect.jsonl``.
        progress: show bars and notes.
        settings: the options of ``selfdistill questions``.

    Raises:
        UserError: a mistake the user can fix.
    """
    with session(progress, alone="make_questions"):
        places: dict[str, Any] = {"model": model, "documents": documents, "output_dir": output_dir}
        config = QuestionsConfig(**places | settings)
        return QuestionsResult(Path(config.output_dir), run_questions(config))


def report(
    *runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] = "report.html"
) -> Path:
    """Write a report of runs and comparisons as one HTML file that opens offline; returns its path.

    Args:
        runs: folders written by :func:`train` or :func:`compare`, or lists of them.
        output: the file to write.

    Raises:
        UserError: no runs, one that cannot be read, or a file that cannot be written.
    """
    listed = [run for given in runs for run in (given if isinstance(given, list | tuple) else [given])]
    folders = [os.fspath(run) if isinstance(run, os.PathLike) else run for run in listed]
    if pages := [folder for folder in folders if str(folder).endswith(".html")]:
        raise UserError(f"{pages[0]}: expected a folder; for the output file write output={pages[0]!r}")
    places: dict[str, Any] = {"runs": folders, "output": output}
    write_report(ReportConfig(**places))
    return Path(output)


def export(
    run: str | os.PathLike[str],
    *,
    output_dir: str | os.PathLike[str],
    step: int | None = None,
    merge: bool = False,
    adapter_base: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Copy the final model of a run to a folder; returns its path.

    ``step`` writes the model of that step's checkpoint instead. ``merge`` merges a LoRA adapter into its base, which
    ``adapter_base`` names if it was moved.
    """
    with session(progress, alone="export"):
        places: dict[str, Any] = {"run": run, "output_dir": output_dir, "adapter_base": adapter_base}
        return run_export(ExportConfig(**places, step=step, merge=merge))


def merge(
    model: str | os.PathLike[str],
    add: str | os.PathLike[str],
    subtract: str | os.PathLike[str] | None = None,
    *,
    output_dir: str | os.PathLike[str],
    scale: float = 1.0,
    progress: bool = True,
) -> Path:
    """Write ``model`` + ``scale`` * (``add`` - ``subtract``), tensor by tensor, to a folder; returns its path.

    ``subtract`` may be left out if ``add`` is an adapter, whose base it then is.
    """
    with session(progress, alone="merge"):
        places: dict[str, Any] = {"model": model, "add": add, "subtract": subtract, "output_dir": output_dir}
        return run_merge(MergeConfig(**places, scale=scale))
