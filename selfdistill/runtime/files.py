"""Writing so that a crash at any moment leaves what was there before."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfdistill.errors import UserError


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_partial_line(file: Path) -> None:
    """Take away a last line that was being written when the machine stopped, so that others can be appended."""
    if file.exists():
        text = file.read_bytes()
        if not text.endswith(b"\n"):
            file.write_bytes(text[: text.rfind(b"\n") + 1])


def write_atomically(file: Path, text: str) -> None:
    """Write a text file, UTF-8, that is there whole or as it was before."""
    temporary = file.parent / f".{file.name}.unfinished"
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, file)


def write_json(file: Path, value: Any) -> None:
    """:func:`write_atomically` of a value as JSON."""
    write_atomically(file, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def remove_folder(folder: Path) -> None:
    """Remove a folder, which is there whole or, by this name, not at all."""
    if folder.exists():
        hidden = folder.parent / f".{folder.name}.removed"
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed was writing into ``folder``, or removing from it, with this module."""
    for path in (*folder.glob(".*.unfinished"), *folder.glob(".*.removed")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Flush the files of a folder to the disk, and write their sizes and SHA-256 to its ``manifest.json`` last."""
    files = {}
    for path in sorted(folder.iterdir()):
        fsync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, files)
    fsync(folder)


def corruption(folder: Path) -> str | None:
    """What of a sealed folder is not as it was written, in a few words; None where it is whole.

    Files that the manifest does not name are no damage; see :func:`unlisted_files`.

    Raises:
        UserError: this user may not read it, which is no damage.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except PermissionError:
        raise UserError(f"{folder}: may not be read (permission denied): go on as the user who began") from None
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
            raise UserError(f"{path}: may not be read (permission denied): go on as the user who began") from None
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def unlisted_files(folder: Path) -> list[str]:
    """Names in a sealed folder that its manifest does not have."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return sorted(path.name for path in folder.iterdir() if path.name not in files and path.name != MANIFEST)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes from ``folder``, which is made where it is not there; the lock ends with the process.

    Where the file system knows no locks there is none.

    Raises:
        UserError: another process is at it, or the folder cannot be written; begins with ``what``.
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
        raise UserError(f"{what}: another process is at work on it; wait for it, or stop it") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)
