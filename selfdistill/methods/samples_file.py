"""The file in a run folder with the samples that are drawn before the first step."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from selfdistill.data import ChatFormat, Example
from selfdistill.errors import RESUME, UserError
from selfdistill.runtime import agreed, broadcast_from_rank0, drop_partial_line, is_rank0, write_atomically

SAMPLES_FILE = "teacher_samples.jsonl"
"""Its name."""

Sample = tuple[str, Example, list[int]]
"""The key of what a sample depends on, its example, and its ids."""


class SamplesFile:
    """One line per sample: its ids, their text, the key of what it depends on, and the weights that were loaded.

    Args:
        folder: the run folder, which may not exist.
        chat: decodes the ids.
        weights: identifies the weights from which the run starts.
        begin: creates the folder with the settings, before the first line is appended. None: samples are not kept as
            they are drawn; and those of any weights are read, because a checkpoint's are compared elsewhere.
    """

    def __init__(self, folder: Path, chat: ChatFormat, weights: str, begin: Callable[[], object] | None) -> None:
        self.folder = folder
        self._path, self._chat, self._weights, self._begin = folder / SAMPLES_FILE, chat, weights, begin
        self.grows = begin is not None
        """Whether samples are kept as they are drawn."""
        self._has_begun = False

    def read(self) -> dict[str, list[int]]:
        """The ids of the samples by key, without those on incomplete or corrupt lines, or of other weights."""
        return broadcast_from_rank0(self._read)

    def _read(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        for line in text.split("\n")[:-1]:  # not splitlines: text may contain U+2028
            with suppress(ValueError, KeyError, TypeError):  # left by a crash
                kept = json.loads(line)
                key, ids = kept["key"], [operator.index(token) for token in kept["ids"]]
                if not self.grows or kept.get("weights", self._weights) == self._weights:
                    found[key] = ids
        return found

    def append(self, samples: Sequence[Sample]) -> None:
        """Append samples and flush them to disk; nothing unless the file grows. All ranks call it, and rank 0 writes.

        Raises:
            UserError: the folder cannot be written, or another process works in it.
        """
        if self._begin is not None:
            agreed(partial(self._append, self._begin, samples))

    def _append(self, begin: Callable[[], object], samples: Sequence[Sample]) -> None:
        first, self._has_begun = not self._has_begun, True
        if first:
            begin()
        if not is_rank0():
            return
        try:
            if first:
                drop_partial_line(self._path)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._lines(samples))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}); free disk space, then {RESUME}"
            ) from None

    def write(self, samples: Sequence[Sample]) -> None:
        """Replace the file by these samples, on rank 0."""
        if is_rank0():
            write_atomically(self._path, self._lines(samples))

    def _lines(self, samples: Sequence[Sample]) -> str:
        lines = [
            {
                "source": x.demonstration.source,
                "text": self._chat.decode(ids),
                "ids": ids,
                "key": key,
                "weights": self._weights,
            }
            for key, x, ids in samples
        ]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
