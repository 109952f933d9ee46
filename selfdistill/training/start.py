"""The start of a run: when its folder is locked, checked and begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from selfdistill.config import TrainConfig, dump_yaml
from selfdistill.data import Demonstration
from selfdistill.errors import UserError
from selfdistill.evaluation import SYSTEM_TURN, shared_system_turn
from selfdistill.runtime import (
    agreed,
    broadcast_from_rank0,
    folder_lock,
    is_rank0,
    remove_unfinished,
    write_atomically,
    write_json,
)
from selfdistill.training.disk import check_disk
from selfdistill.training.resume import refuse_changed_rows, refuse_changed_settings
from selfdistill.training.trainer import Trainer


class Start:
    """The run folder until the first step: checked before anything is drawn, begun before anything is written there.

    Args:
        folder: the run folder, which may not exist.
        held: keeps the folder locked while it is open.
    """

    def __init__(self, folder: Path, held: ExitStack) -> None:
        self.folder = folder
        self.checkpoint: Path | None = None
        """From which the run resumes, if it does; set before the trainer is built."""
        self.lines: list[str] = []
        """What the run says about memory and disk space."""
        self._held, self._locked = held, False

    def lock(self) -> None:
        """Lock the folder, once."""
        if is_rank0() and not self._locked:
            self._held.enter_context(folder_lock(self.folder, f"output_dir {str(self.folder)!r}"))
        self._locked = True

    def check(self, trainer: Trainer) -> None:
        """Check what needs no samples, before hours may be spent on drawing them.

        Raises:
            UserError: the run cannot be resumed with these settings, or there is not enough disk space.
        """
        if self.checkpoint:
            agreed(partial(refuse_changed_settings, self.folder, self.checkpoint, trainer))
            agreed(partial(refuse_changed_rows, self.checkpoint, trainer))
        about_disk = broadcast_from_rank0(partial(check_disk, trainer, self.folder, self.checkpoint))
        self.lines = [*self.lines, *about_disk]

    def begin(self, config: TrainConfig, demonstrations: Sequence[Demonstration]) -> None:
        """Lock the folder and write the settings, without which it cannot be resumed, and the rows' system turn.

        Raises:
            UserError: the folder is in use or not writable.
        """
        self.lock()
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            if is_rank0():
                remove_unfinished(self.folder)
                write_atomically(self.folder / "config.yaml", dump_yaml(config))
                write_json(self.folder / SYSTEM_TURN, shared_system_turn(demonstrations))

    def write_samples(self, trainer: Trainer) -> None:
        """Write the samples that a method drew before the first step.

        Raises:
            UserError: the folder is not writable.
        """
        with self._writing():
            parts = [part for stage in trainer.stages for part in stage.own_samples]
            drawn = [(part.method.drawn, part.all_drawn) for part in parts if part.method.drawn]
            if drawn:
                trainer.samples_file.write([kept for draw, examples in drawn for kept in draw.samples(examples)])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"output_dir {str(self.folder)!r}: cannot be written ({error.strerror})") from None
