"""Weights in folders that an engine's servers read: a new folder for each version, deleted after reading."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.model.adapters import WEIGHTS
from selfdistill.model.engine_weights import adapter_config, adapter_tensors
from selfdistill.model.loading import LoadedModel
from selfdistill.runtime import is_rank0

FILE_BYTES = 2**30
"""Size at which a new file begins. Writing needs the memory of one file."""


class WeightFiles:
    """Folders of weights. All ranks write together, because sharded weights are gathered; rank 0 has the files.

    Args:
        parent: where the folders are, with the permissions of new files (umask); None: in the system's folder for
            temporary files, readable only by this user.

    Raises:
        UserError: the folder is not writable.
    """

    def __init__(self, parent: str | None) -> None:
        self._folder: Path | None = None
        self._versions = 0
        if is_rank0():
            try:
                self._folder = _new_folder(parent)
            except OSError as error:
                raise UserError(
                    f"setting 'engine_folder': {parent!r} cannot be written ({error.strerror}); give a folder that "
                    "this machine and the servers see"
                ) from None

    def write(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Path:
        """Write full weights in this data type; returns the folder, on rank 0 only.

        Raises:
            OSError: on rank 0, after all weights were gathered.
        """
        try:
            with self._new() as folder:
                if is_rank0():
                    _save(weights, folder, dtype)
        finally:
            deque(weights, maxlen=0)  # the other ranks gather the same number
        return folder

    def write_adapter(self, loaded: LoadedModel) -> Path:
        """Write LoRA's weights as PEFT does; see :meth:`write`."""
        weights = {name: weight.cpu().contiguous() for name, weight in adapter_tensors(loaded)}
        with self._new() as folder:
            if is_rank0():
                _save_file(weights, folder / WEIGHTS)
                adapter_config(loaded).save_pretrained(str(folder))
        return folder

    def remove(self, folder: Path | None) -> None:
        """Delete a version's folder, if there is one."""
        if folder is not None and is_rank0():
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        self.remove(self._folder)

    @contextmanager
    def _new(self) -> Iterator[Path]:
        """The folder of the next version; after an error it is deleted, which frees space for a checkpoint."""
        self._versions += 1
        folder = (self._folder or Path()) / str(self._versions)
        try:
            if is_rank0():
                folder.mkdir()
            yield folder
        except BaseException:
            self.remove(folder)
            raise


def _new_folder(parent: str | None) -> Path:
    name = f"selfdistill-engine-{secrets.token_hex(8)}"
    if parent is None:
        return Path(tempfile.mkdtemp(prefix=f"{name}-")).absolute()
    folder = Path(parent).absolute() / name
    folder.mkdir()
    return folder


def _save(weights: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    file: dict[str, Tensor] = {}
    number = 0
    for name, weight in weights:
        file[name] = (weight.to(dtype) if weight.is_floating_point() else weight).cpu().contiguous()
        if sum(part.nbytes for part in file.values()) >= FILE_BYTES:
            _save_file(file, folder / f"model-{number}.safetensors")
            file, number = {}, number + 1
    _save_file(file, folder / f"model-{number}.safetensors")


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Like ``save_file``, but every error, such as a full disk, is an ``OSError``, and the file gets the folder's read
    and write permissions."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(path.parent.stat().st_mode & 0o666)
