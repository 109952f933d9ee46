"""Errors that the user can fix.

Each is a :class:`UserError` with a one-line message: the file, row or setting, what was found, and what to do. The
command line prints that line and exits with code 2, without a traceback. Any other exception is a bug in this package.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

CLOSE = 0.7
"""How similar a known word must be to a word for the message to suggest it, from 0 to 1."""


RESUME = "continue with resume=True"
"""What messages advise where a run has saved its progress. The command line writes ``--resume``."""
RERUN = "rerun the same command to resume"
"""What they advise where a command has no ``resume`` and continues by itself."""


class UserError(ValueError):
    """A mistake in the data, settings, model or machine that the user can fix.

    ``str(error)`` is the line that the command line prints: where it is, what was found, what to do.
    """

    exit_code = 2


class RunStopped(UserError):
    """A signal stopped the run early; its progress is saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class CannotResume(UserError):
    """A run cannot be resumed as asked.

    Args:
        found: where it is, what was found and what to restore, the message up to the advice to begin again.
        begin_again: how the caller's user begins again.
    """

    def __init__(self, found: str, begin_again: str = "start a new run in another output_dir") -> None:
        super().__init__(f"{found}, or {begin_again}")
        self.found = found


class RunFailed(UserError):
    """Training failed, for example with a non-finite loss. Exit code 3."""

    exit_code = 3


class RunCollapsed(RunFailed):
    """A run collapsed and was stopped; ``final/`` is the model of an evaluation at least five steps earlier."""


class EngineFailed(UserError):
    """The sampling engine failed or was late. It is not used again; a run's progress is saved. Exit code 3.

    It is no :class:`RunFailed`: it says nothing about the run, which goes on with ``--resume``.
    """

    exit_code = 3


def closest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown word: the known one that may be meant, else ``otherwise``.

    It has the word as its initials, is similar, or has a part that begins with the word; case does not count.
    """
    names = {name.lstrip("-").lower(): name for name in known}
    word = word.lstrip("-").lower()
    initials = [name for name in names if "".join(part[:1] for part in name.split("_")) == word]
    longer = [name for name in names if word and f"_{word}" in f"_{name}"]
    similar = difflib.get_close_matches(word, names, 1, CLOSE) or difflib.get_close_matches(word, longer, 1, 0)
    meant = [*initials, *similar]
    return f"; did you mean {names[meant[0]]}?" if meant else otherwise


def similar_inside(path: str) -> str | None:
    """The end of a message about a path that does not exist: what may be meant in its folder, or "".

    None if the path names no folder, or one that does not exist either. Only then it may be a name on the hub.
    """
    folder = Path(path).parent
    if "/" not in path or not folder.is_dir():
        return None
    return closest(Path(path).name, [inside.name for inside in folder.iterdir()])


def one_line(error: BaseException) -> str:
    """The message of an error on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def named_error(error: BaseException) -> str:
    """The type and the message of an error, on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def shortened(text: str, most: int) -> str:
    """The text; one of more than ``most`` characters is cut and ends with ``...``."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def found_value(value: object) -> str:
    """What was found, for a message: at most 60 characters on one line."""
    return " ".join(repr(value).split())[:60]


def number_of(count: int | None, noun: str) -> str:
    """A count in a message: ``1 step``, ``2 steps``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
