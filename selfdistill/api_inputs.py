"""Convert the arguments of :mod:`selfdistill.api` to settings, rows and models."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfdistill.config import CheckConfig, LearnConfig, TrainConfig, continued
from selfdistill.data import (
    PICTURE_FOLDER,
    PROMPT_ROWS,
    Demonstration,
    Rows,
    load_demonstrations,
    load_prompts,
    write_demonstrations,
)
from selfdistill.errors import UserError, closest
from selfdistill.evaluation import check_inputs
from selfdistill.methods import lacks_of, own_names, stages_of, whose
from selfdistill.model import LoadedModel, adopt, check_base, to_best_device, with_own_dtype
from selfdistill.runtime import check_tracker, is_rank0, progress_shown, quiet_libraries, say_note, world_size
from selfdistill.training import OnStep, accelerator_state_kept, check_output_dir, check_parts

Model = str | os.PathLike[str] | Any
"""A folder, run folder, hub id or ``smollm2-135m``; or a loaded ``PreTrainedModel``, with ``tokenizer=``.

A loaded model is moved to the best device and put into eval mode, and its dropout is set to zero. Its generation config
gets the end token that the chat template writes, and a tokenizer without a usable pad token gets the end token as one.
Its weights keep their data type, which is the call's ``dtype``.
All of this remains after the call; what training freezes, and gradient checkpointing, are restored. With ``lora_rank``
the model stays as it was, and the adapter is in the run's ``final``.
"""


@contextmanager
def session(progress: bool, *, resume: bool = False, alone: str | None = None) -> Iterator[None]:
    """Silence libraries while models load and save, show or hide progress, and leave the caller's accelerators alone.

    ``alone`` names a function that writes to a folder; of several processes only the first may, unless it trains.

    Raises:
        UserError: an argument is neither True nor False, or there are several processes.
    """
    if alone and world_size() > 1 and (alone in ("compare", "learn") or not is_rank0()):
        raise UserError(f"found {world_size()} processes, but only train supports several: run {alone} in one")
    for name, value in (("progress", progress), ("resume", resume)):
        if not isinstance(value, bool):
            raise UserError(f"{name}: found {value!r}, expected True or False")
    with quiet_libraries(), progress_shown(progress), accelerator_state_kept():
        yield


def given_settings(
    model: Model | TrainConfig | None, output_dir: str | os.PathLike[str] | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """The given settings; keyword arguments override those of a :class:`TrainConfig`.

    Raises:
        UserError: ``output_dir`` is no path, or a setting belongs into ``method_settings``.
    """
    given: dict[str, Any] = {}
    if isinstance(model, TrainConfig):
        given = model.model_dump(exclude_unset=True)
    elif model is not None:
        given["model"] = os.fspath(model) if isinstance(model, os.PathLike) else model
    if output_dir is not None:
        if not isinstance(output_dir, str | os.PathLike):
            raise UserError(f"setting 'output_dir': found {output_dir!r}, expected: text")
        given["output_dir"] = os.fspath(output_dir)
    given |= settings
    _refuse_own_settings(given)
    return given


def _refuse_own_settings(given: dict[str, Any]) -> None:
    """Refuse settings that only some methods know, and say how to give them.

    Raises:
        UserError: there is one.
    """
    method = given.get("method", TrainConfig.model_fields["method"].default)
    for name in [name for name in given if name not in TrainConfig.model_fields]:
        if name in own_names(method):
            shown, written = getattr(method, "__name__", method), f"method_settings={{{name!r}: {given[name]!r}}}"
            raise UserError(f"unknown setting {name!r}; write this setting of {shown} as {written}")
        if (hint := whose(name)) and not closest(name, TrainConfig.model_fields):
            raise UserError(f"unknown setting {name!r}{hint}")


def model_of(
    model: Model, tokenizer: Any, beside: Model | None = None, *, trained: bool = True
) -> tuple[str, LoadedModel | None]:
    """The model's name, and the model itself if already loaded.

    Args:
        model: the model.
        tokenizer: of a loaded model.
        beside: another model of the same call, which may be the one that the tokenizer belongs to.
        trained: see :func:`selfdistill.model.adopt`.

    Raises:
        UserError: the model cannot be used, or there is a tokenizer without a loaded model.
    """
    if not isinstance(model, str | os.PathLike):
        loaded = adopt(model, tokenizer, trained=trained)
        return loaded.name, loaded
    name = os.fspath(model)
    if tokenizer is not None and (beside is None or isinstance(beside, str | os.PathLike)):
        raise UserError(
            f"tokenizer: found one beside the path {name!r}, which has its own; load the model and give both, or save "
            "the tokenizer in a copy of the folder"
        )
    return name, None


def on_best_device(loaded: LoadedModel | None) -> LoadedModel | None:
    """The model where it is measured; training moves it by itself."""
    return None if loaded is None else to_best_device(loaded)


def callback_of(on_step: Callable[[int, Any, dict[str, Any]], object] | None) -> OnStep | None:
    """The caller's function as training calls it: after each step, with the model itself.

    Only True ends the run, also that of NumPy or PyTorch: a function may return something else for its own use.

    Raises:
        UserError: it is no function.
    """
    if on_step is None:
        return None
    if not callable(on_step):
        raise UserError(f"on_step: found {on_step!r}, expected a function of step, model and metrics")

    def after(step: int, loaded: LoadedModel, metrics: dict[str, Any]) -> bool:
        found: Any = on_step(step, loaded.model, metrics) if step > 0 else None
        return (found.item() if getattr(found, "ndim", None) == 0 else found) is True

    return after


def reading_of(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How to read the rows, as arguments of ``load_demonstrations``, by the setting of the data."""
    turns = given.get("turns", "auto")
    return {
        "data": {"split": given.get("split", "train"), "turns": turns},
        "test": {"split": given.get("test_split"), "turns": turns},
        "anchors": PROMPT_ROWS,
    }


def data_of(data: Rows, name: str = "data") -> tuple[str, Rows | None]:
    """The path of the data; or, for in-memory rows, ``name`` and the rows themselves."""
    return (os.fspath(data), None) if isinstance(data, str | os.PathLike) else (name, data)


class RowsInFolder:
    """The data of a run: paths, or in-memory rows that its folder keeps, so that it can be resumed.

    Args:
        given: data by setting, ``data``, ``test`` and ``anchors``; None: not given.
        output_dir: the run folder.
        reading: how the rows are read; see :func:`reading_of`.

    Raises:
        UserError: rows are invalid; or several processes would have to share them.
    """

    def __init__(
        self, given: dict[str, Rows | None], output_dir: str | None, reading: dict[str, dict[str, Any]]
    ) -> None:
        self.paths: dict[str, str] = {}
        """By setting."""
        self._rows: dict[Path, list[Demonstration]] = {}
        for name, data in given.items():
            if data is None:
                continue
            self.paths[name], rows = data_of(data)
            if rows is None:
                continue
            if output_dir is None:
                raise UserError("setting 'output_dir' is required: the run folder")
            if world_size() > 1:
                raise UserError(f"setting {name!r}: {world_size()} processes read the rows, so give a file")
            file = Path(output_dir) / f"{name}.jsonl"
            self._rows[file] = load_demonstrations(rows, note=say_note, name=name, **reading[name])
            self.paths[name] = str(file)

    @property
    def names(self) -> list[str]:
        """Of the files that the folder keeps, and of the folder of their pictures."""
        return [*(file.name for file in self._rows), *([PICTURE_FOLDER] if self._rows else [])]

    @contextmanager
    def kept(self, *, planned: bool = False) -> Iterator[None]:
        """Write the files; remove them again if the run neither begins nor goes on, or is only ``planned``.

        Raises:
            UserError: a file of that name holds other rows, or cannot be written.
        """
        missing = [file for file in self._rows if not self._is_there(file)]
        folders = {file.parent for file in missing}
        created = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
        pictures = [path for path in (folder / PICTURE_FOLDER for folder in folders) if not path.exists()]
        before = {folder: _written(folder) for folder in folders}
        try:
            for file in missing:
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_name(f".{file.name}.unfinished")
                write_demonstrations(unfinished, self._rows[file])
                unfinished.replace(file)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
        try:
            yield
        except UserError as error:
            error.args = (self._as_given(str(error)), *error.args[1:])
            raise
        finally:
            for path in (*missing, *pictures):
                if not planned and _written(path.parent) != before[path.parent]:
                    continue
                if path in missing:
                    path.unlink(missing_ok=True)
                else:
                    shutil.rmtree(path, ignore_errors=True)
            for folder in created:  # the innermost first
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def _as_given(self, message: str) -> str:
        """A message about the files in terms of the rows in memory: ``run/data.jsonl:1, 2`` as ``data[0], data[1]``."""
        for file in self._rows:
            name, path = file.stem, re.escape(str(file))
            before = f"{path}:|lines? " if message.startswith(f"{file}: ") else f"{path}:"
            for found in re.finditer(rf"(?<!\w)(?:{before})(\d+(?:, \d+)*)", message):
                places = ", ".join(f"{name}[{int(line) - 1}]" for line in found[1].split(", "))
                message = message.replace(found[0], places, 1)
            message = message.replace(f"{file}: ", f"{name}: ")
        return message

    def _is_there(self, file: Path) -> bool:
        if not file.exists():
            return False
        before = load_demonstrations(str(file))
        if [row.identity() for row in before] != [row.identity() for row in self._rows[file]]:
            raise UserError(
                f"{file}: its rows differ from those given: give the same rows, or choose another output_dir"
            )
        return True


def _written(folder: Path) -> tuple[int, int] | None:
    """When a run last wrote its settings: as it begins, or goes on."""
    file = folder / "config.yaml"
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None


def rows_of_run(data: Rows | None, test: Rows | None, given: dict[str, Any]) -> RowsInFolder:
    """The rows of a run or a comparison: data and test, and the anchors among its settings if they are in memory."""
    rows = {"data": data, "test": test, "anchors": _anchors_in_memory(given)}
    return RowsInFolder(rows, given.get("output_dir"), reading_of(given))


def _anchors_in_memory(given: dict[str, Any]) -> Rows | None:
    """The anchors that are rows in memory; None if there are none, or they are paths.

    An empty list is refused, because rows may have been filtered down to none. An empty tuple is what settings hold
    where there are no anchors.

    Raises:
        UserError: the list is empty, or has rows and paths.
    """
    anchors = given.get("anchors")
    if isinstance(anchors, list) and not anchors:
        raise UserError("setting 'anchors': found an empty list; for no anchors give None")
    listed = [anchors] if isinstance(anchors, str | os.PathLike) else anchors
    if not isinstance(listed, list | tuple):
        return listed
    places = [source for source in listed if isinstance(source, str | os.PathLike)]
    if len(places) == len(listed):
        return None
    if places:
        raise UserError(
            f"setting 'anchors': found rows together with {os.fspath(places[0])!r}; write the rows to a file and give "
            "its path"
        )
    return anchors


def check_config(given: dict[str, Any]) -> tuple[CheckConfig, list[Demonstration] | None]:
    """The settings of a check, and its anchors if they are rows in memory.

    Raises:
        UserError: a mistake the user can fix.
    """
    rows = _anchors_in_memory(given)
    if rows is None:
        return CheckConfig(**given), None
    return CheckConfig(**given | {"anchors": ("anchors",)}), load_prompts(rows, say_note, "anchors")


def train_config(given: dict[str, Any], loaded: LoadedModel | None, *, resume: bool) -> TrainConfig:
    """The settings of a run: those given, over those saved in its folder if it is resumed."""
    given = with_own_dtype(given, loaded)
    if not resume:
        return TrainConfig(**given)
    if "output_dir" in given and (Path(given["output_dir"]) / "config.yaml").exists():
        given.pop("documents", None)  # the saved settings name the questions made from them
        if loaded is not None:
            given.pop("dtype")  # the weights are compared, with their type
    return continued(given, TrainConfig)


def learn_config(given: dict[str, Any], rows: dict[str, Rows | None]) -> tuple[LearnConfig, dict[str, Rows]]:
    """The settings of an action of ``learn``, and those of its rows that are in memory.

    Args:
        given: its settings, without data.
        rows: data by setting, ``data`` and ``test``; None: not given.

    Raises:
        UserError: a mistake the user can fix.
    """
    _refuse_own_settings(given)
    if _anchors_in_memory(given) is not None:
        raise UserError("setting 'anchors': learn reads them again when it resumes, so give the path of a file")
    paths: dict[str, str] = {}
    in_memory: dict[str, Rows] = {}
    for name, data in rows.items():
        if data is None:
            continue
        paths[name], found = data_of(data, name)
        if found is not None:
            in_memory[name] = found
    if in_memory and given["action"] in ("add", "stream") and not given.get("name"):
        raise UserError("in-memory rows have no name: give name=..., the name of the skill")
    return LearnConfig(**given | paths), in_memory


def check_start(config: TrainConfig, loaded: LoadedModel | None, rows: RowsInFolder, *, resume: bool) -> None:
    """Check settings and files before any long work.

    Raises:
        UserError: a mistake the user can fix.
    """
    check_output_dir(config.output_dir, resume=resume, own_files=rows.names)
    check_tracker(config.report_to)
    check_inputs(config, rows.names, lacks_of(stages_of(config)))
    check_parts(config)
    if loaded is not None and config.documents:
        raise UserError("setting 'documents': the model writes the questions first, so give its folder or name")
    check_adapter(config, loaded)


def check_adapter(config: TrainConfig, loaded: LoadedModel | None) -> None:
    """Check that a loaded model that gets an adapter stays as it was, and that the adapter can be loaded again.

    Raises:
        UserError: it would be sharded, or there is no such base.
    """
    if loaded is None or not config.lora_rank:
        return
    if config.fsdp:
        raise UserError(
            "setting 'fsdp': with lora_rank a loaded model stays as it was, but its weights would be sharded; give its "
            "folder or name"
        )
    check_base(loaded)


def run_to_plan(
    model: Model | TrainConfig,
    data: Rows | None,
    test: Rows | None,
    output_dir: str | os.PathLike[str] | None,
    tokenizer: Any,
    settings: dict[str, Any],
    folder: str,
) -> tuple[TrainConfig, LoadedModel | None, RowsInFolder]:
    """Settings, model and rows of a run that is only planned, by default in ``folder``.

    Raises:
        UserError: its questions about documents are not made yet, or settings or rows are invalid.
    """
    given = {"output_dir": folder} | given_settings(model, output_dir, settings)
    given["model"], loaded = model_of(given.get("model", ""), tokenizer)
    rows = rows_of_run(data, test, given)
    config = TrainConfig(**with_own_dtype(given | rows.paths, loaded))
    if config.documents:
        raise UserError("setting 'documents': make the questions first (selfdistill questions), then plan on them")
    return config, loaded, rows
