"""Crash-safe writing: a crash at any moment leaves the previous contents intact."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from selfdistill.errors import UserError


def fsync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_partial_line(file: Path) -> None:
    """Remove an incomplete last line, left by a crash, so that new lines can be appended."""
    if file.exists():
        text = file.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(file, text.rfind(b"\n") + 1)  # writing it again could lose everything


def check_writable(file: str, what: str, otherwise: str = "") -> None:
    """Check before long work that a file can be written at its end.

    Args:
        file: its path; it may exist.
        what: start of the error message.
        otherwise: end of the error message, after the advice.

    Raises:
        UserError: it is a folder, its folder does not exist, or the user may not write it.
    """
    path = Path(file).absolute()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{what}: cannot be written; give a file in an existing folder{otherwise}")


def existing(path: Path) -> Path:
    """The path as an absolute one, or the nearest folder above it that exists."""
    path = path.absolute()
    while not os.path.exists(path):  # Path.exists raises where it may not look
        path = path.parent
    return path


def check_folder_writable(folder: Path, what: str) -> None:
    """Check before long work that a folder can be written, or be made where it is missing; nothing is made.

    Args:
        folder: the folder, which may not exist.
        what: start of the error message.

    Raises:
        UserError: the user may not write it, or the nearest folder above it that exists.
    """
    place = existing(folder)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"{what}: {place} is not a folder that you may write to; choose another place")


def write_atomically(file: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: after a crash, the file is either complete or unchanged.

    What is not UTF-8, as part of a file's name may be, is escaped as in JSON.
    """
    temporary = file.parent / f".{file.name}.unfinished"
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    fsync(temporary)
    os.replace(temporary, file)


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON with :func:`write_atomically`."""
    write_atomically(file, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON lacks: NaN, and the infinite ones."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


WRITTEN = "written.json"
"""File with the SHA-256 of all contents that :func:`write_own` wrote to its folder."""


def refuse_edited(files: Sequence[Path]) -> None:
    """Refuse to replace files whose content :func:`write_own` did not write.

    Raises:
        UserError: there is one.
    """
    for file in files:
        if file.exists() and sha256(file) not in _written(file.parent):
            raise UserError(
                f"{file}: edited since this command wrote it, or not written by it; rename it, or choose another "
                "output_dir"
            )


def write_own(file: Path, write: Callable[[Path], None]) -> None:
    """Replace a file atomically by what ``write`` writes to a path, so that :func:`refuse_edited` knows the content."""
    temporary = file.parent / f".{file.name}.unfinished"
    write(temporary)
    write_json(file.parent / WRITTEN, sorted({*_written(file.parent), sha256(temporary)}))
    os.replace(temporary, file)


def _written(folder: Path) -> list[str]:
    file = folder / WRITTEN
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []


def remove_folder(folder: Path) -> None:
    """Remove a folder atomically: under this name it is either complete or gone. What a link points to stays."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        hidden = _hidden(folder)
        _remove(hidden)
        os.replace(folder, hidden)
        _remove(hidden)


def _hidden(folder: Path) -> Path:
    """Where a folder is while it is being removed; see :func:`unfinished`."""
    return folder.parent / f".{folder.name}.removed"


def replace_folder(folder: Path, new: Path) -> None:
    """Rename ``new`` to ``folder``, and remove what was there before; if that cannot be removed, it stays hidden.

    Raises:
        OSError: it cannot be renamed; ``folder`` is then what it was.
    """
    old = _hidden(folder)
    with suppress(OSError):
        _remove(old)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    with suppress(OSError):
        _remove(old)


def unfinished(folder: Path) -> list[Path]:
    """The temporary files and folders of this module that a killed process left in ``folder``."""
    return [*folder.glob(".*.unfinished"), *folder.glob(".*.removed")]


def remove_unfinished(folder: Path, begins: str = "") -> None:
    """Remove what :func:`unfinished` lists, of names that begin so."""
    for path in unfinished(folder):
        if path.name.startswith(begins):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder with its contents, a file or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Flush a folder's files to disk, then write their sizes and SHA-256 to its ``manifest.json``."""
    files = {}
    for path in sorted(folder.iterdir()):
        fsync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, files)
    fsync(folder)


def corruption(folder: Path) -> str | None:
    """Describe how a folder differs from its manifest; None if it is intact.

    Extra files are not corruption; see :func:`unlisted_files`.

    Raises:
        UserError: the user may not read the folder, which is not corruption.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except PermissionError:
        raise UserError(f"{folder}: permission denied; resume as the user who started the run") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if not sizes:
        return f"{MANIFEST} names no file"
    for name, (size, digest) in sizes.items():
        path = folder / name
        try:
            if Path(name).name != name or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} of {size} bytes"
            if sha256(path) != digest:
                return f"{name} has changed since it was written (SHA-256)"
        except PermissionError:
            raise UserError(f"{path}: permission denied; resume as the user who started the run") from None
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def unlisted_files(folder: Path) -> list[str]:
    """Names of files in a folder that its manifest does not list."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return sorted(path.name for path in folder.iterdir() if path.name not in files and path.name != MANIFEST)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Lock ``folder`` against other processes, creating it if missing; the lock ends with the process.

    On a file system without locks, nothing is locked.

    Args:
        folder: the folder to lock.
        what: start of the error messages.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{what}: in use by another process; wait for it, or stop it") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)
