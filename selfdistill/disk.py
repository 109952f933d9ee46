"""Writing so that a crash at any moment leaves what was there before."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def end_last_line(file: Path) -> None:
    """Take away a last line that was being written when the machine stopped, so that others can be appended."""
    if file.exists():
        text = file.read_bytes()
        if not text.endswith(b"\n"):
            file.write_bytes(text[: text.rfind(b"\n") + 1])


def write_json(file: Path, value: Any) -> None:
    """Write a file that is there whole or not at all."""
    temporary = file.parent / f".{file.name}.unfinished"
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, file)
