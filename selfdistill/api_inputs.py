"""Convert the arguments of :mod:`selfdistill.api` to settings, rows and models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfdistill.config import (
    TrainConfig,
    continued,
)
from selfdistill.data import Rows, load_demonstrations, write_demonstrations
from selfdistill.errors import UserError
from selfdistill.evaluation import check_inputs
from selfdistill.methods import stages_of
from selfdistill.model import LoadedModel, adopt, to_best_device
from selfdistill.questions import with_questions
from selfdistill.runtime import check_tracker, progress_shown, say
from selfdistill.training import check_output_dir

Model = str | os.PathLike[str] | Any
"""A folder, run folder, hub id or ``smollm2-135m``; or a loaded ``PreTrainedModel``, with ``tokenizer=``."""


@contextmanager
def session(progress: bool) -> Iterator[None]:
    """Silence libraries while models load and save; show progress or not."""
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


def given_settings(
    model: Model | TrainConfig | None, output_dir: str | os.PathLike[str] | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """The given settings; keyword arguments override those of a :class:`TrainConfig`."""
    given: dict[str, Any] = {}
    if isinstance(model, TrainConfig):
        given = model.model_dump(exclude_unset=True)
    elif model is not None:
        given["model"] = os.fspath(model) if isinstance(model, os.PathLike) else model
    if output_dir is not None:
        given["output_dir"] = os.fspath(output_dir)
    return given | settings


def model_of(model: Model, tokenizer: Any) -> tuple[str, LoadedModel | None]:
    """The model's name, and the model itself if already loaded."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model), None
    loaded = to_best_device(adopt(model, tokenizer))
    return loaded.name, loaded


def data_of(data: Rows) -> tuple[str, Rows | None]:
    """The path of the data; or, for in-memory rows, ``data`` and the rows themselves."""
    return (os.fspath(data), None) if isinstance(data, str | os.PathLike) else ("data", data)


def train_config(
    given: dict[str, Any], data: Rows | None, test: Rows | None, tokenizer: Any, resume: bool
) -> tuple[TrainConfig, LoadedModel | None]:
    """The validated settings of a run, and the model if already loaded."""
    loaded = None
    if "model" in given:
        given["model"], loaded = model_of(given["model"], tokenizer)
    folder = Path(str(given["output_dir"])) if "output_dir" in given else None
    if resume and folder and (folder / "config.yaml").exists():
        given.pop("documents", None)  # the saved settings name the questions made from them
    given |= kept_rows({"data": data, "test": test}, folder, resume)
    saved = None
    if resume:
        config, saved = continued(given, TrainConfig)
    else:
        config = TrainConfig(**given)
    if saved and saved.max_steps != config.max_steps:
        change = f"max_steps was {saved.max_steps} and is now {config.max_steps}"
        say(f"{change}: the learning rate follows the new schedule from here on")
    check_output_dir(config.output_dir, resume=resume)
    check_tracker(config.report_to)
    check_inputs(config)
    stages_of(config)  # validates the settings before any long work
    if config.documents:
        if loaded is not None:
            raise UserError("setting 'documents': the model writes the questions first, so give its folder or name")
        config = with_questions(config)
    return config, loaded


def kept_rows(given: dict[str, Rows | None], folder: Path | None, resume: bool) -> dict[str, str]:
    """The paths of the data by setting; in-memory rows are written to the folder, so that the run can be resumed.

    Raises:
        UserError: rows are invalid, the folder is taken, or the rows are not those of the resumed run.
    """
    paths: dict[str, str] = {}
    for name, rows in given.items():
        if rows is None:
            continue
        paths[name], in_memory = data_of(rows)
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
