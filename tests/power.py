"""What a power cut would destroy: files and folders that are not flushed when another gets its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Records flushes and renames within a folder from now on.

    Args:
        patch: of the test.
        root: the folder.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self._root = root.resolve()
        self._flushed: dict[int, int] = {}  # by inode, when it had last been changed
        self.events: list[tuple[str, str]] = []
        """``flush`` or ``rename``, with the path in the folder, which is the new one."""
        self.lost: dict[str, set[str]] = {}
        """By each name given: paths of all that was not on the disk just before, as they were just after."""
        patch.setattr(os, "fsync", self._flush)
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._recorded(getattr(os, name)))

    @property
    def names(self) -> set[str]:
        """All names given."""
        return set(self.lost)

    def lost_within(self, name: str) -> set[str]:
        """What was not on the disk of the file or folder that got this name."""
        return {lost for lost in self.lost[name] if f"{lost}/".startswith(f"{name}/")}

    def _flush(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self._flushed[found.st_ino] = found.st_mtime_ns
        self.events.append(("flush", self._name(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def _recorded(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any) -> None:
            old, new = self._name(source), self._name(target)
            waiting = {self._name(path) for path in self._root.rglob("*") if not self._is_flushed(path)}
            rename(source, target)
            self.lost[new] = {
                new + path.removeprefix(old) if f"{path}/".startswith(f"{old}/") else path for path in waiting
            }
            self.events.append(("rename", new))

        return renamed

    def _is_flushed(self, path: Path) -> bool:
        found = path.lstat()
        return self._flushed.get(found.st_ino) == found.st_mtime_ns

    def _name(self, path: Any) -> str:
        return os.path.relpath(os.path.abspath(path), self._root)
