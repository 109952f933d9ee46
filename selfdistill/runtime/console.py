"""Terminal output: results, progress and log lines."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from selfdistill.runtime.distributed import is_rank0

_logger = logging.getLogger("selfdistill")
_silent: ContextVar[bool] = ContextVar("silent", default=False)
_noted: ContextVar[set[str] | None] = ContextVar("noted", default=None)
_bars: ContextVar[Progress | None] = ContextVar("bars", default=None)
"""The bars that the terminal shows now."""


def result_console() -> Console:
    """Console for results on standard output; 120 columns wide in a file or pipe, so table rows do not wrap."""
    return Console(width=None if sys.stdout.isatty() else 120, emoji=False)


def result_table(*columns: str, title: str | None = None) -> Table:
    """A table of results whose first column is to the left and whose others, numbers, are to the right.

    Where the console is too narrow, cells continue on further lines, so that no text is lost. Neither the title nor
    the columns are markup.
    """
    table = Table(title=None if title is None else escape_markup(title))
    for number, column in enumerate(columns):
        table.add_column(escape_markup(column), justify="right" if number else "left", overflow="fold")
    return table


def unobeyed(text: str) -> str:
    r"""The text with what a terminal would obey written as ``\u001b``: control characters, except tab and newline."""
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) == "Cc" and c not in "\t\n" else c for c in text)


class _ProgressConsole(Console):
    """Console that falls silent when its reader ends; rich itself would exit."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


SECONDS_BETWEEN_LINES = 10
"""Interval of progress lines without a terminal."""


def _new_bars() -> Progress | None:
    """What shows bars on a terminal; None without one, or where lines cannot be drawn again.

    The note is last, and takes the room that the rest leaves.
    """
    console = _ProgressConsole(stderr=True, highlight=False, emoji=False)
    if not (console.is_interactive and sys.stderr.isatty()):  # rich takes FORCE_COLOR for a terminal
        return None
    cut: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"}
    others = 50  # columns of a terminal that the rest takes
    what = Column(max_width=max(console.width - others, others // 5), **cut)
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=what),
        BarColumn(10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, **cut)),
        console=console,
        expand=True,
        redirect_stdout=sys.stdout.isatty(),  # else what others print there would go to standard error
    )


class ProgressBar:
    """Progress of a long task: a bar with the remaining time on a terminal, occasional lines elsewhere.

    Writes to standard error; standard output is for results. A bar within another is shown below it, and removed at its
    end.

    Args:
        what: name of the task.
        total: number of parts.
        start: parts already done.
        every: without a terminal, parts between lines; default: a line every ten seconds and at the end.
        quiet: show nothing.
    """

    def __init__(self, what: str, total: int, *, start: int = 0, every: int | None = None, quiet: bool = False) -> None:
        what = what.encode("utf-8", "backslashreplace").decode()  # a file's name in it may not be UTF-8
        self._every, self._what, self._total, self._start = every, what, total, start
        self._quiet = quiet or _silent.get() or not is_rank0()
        self._began = self._said = time.monotonic()

    def __enter__(self) -> ProgressBar:
        shown = _bars.get()
        self._outermost = shown is None
        self._bars = None if self._quiet else shown or _new_bars()
        if self._bars is not None:
            self._task = self._bars.add_task(self._what, total=self._total, completed=self._start, note="")
            if self._outermost:
                self._bars.start()
                _bars.set(self._bars)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is None:
            return
        with suppress(OSError):  # the terminal is closed
            if self._outermost:
                _bars.set(None)
                self._bars.stop()
            else:
                self._bars.remove_task(self._task)

    def advance(self, done: int, note: str = "") -> None:
        """Report that ``done`` parts in total are done."""
        if self._bars is not None:
            self._bars.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        due = done % self._every == 0 if self._every else now - self._said >= SECONDS_BETWEEN_LINES
        due = due or done == self._total
        if due and not self._quiet:
            elapsed, self._said = now - self._began, now
            left = elapsed / max(done - self._start, 1) * (self._total - done)
            say(f"{self._what} {done}/{self._total}  {note}  {elapsed:.0f} s elapsed, {left:.0f} s left")


@contextmanager
def progress_shown(show: bool) -> Iterator[None]:
    """Show progress on standard error, or hide bars and send lines to the logger ``selfdistill``; no note repeats."""
    before = _noted.get()
    silent, noted = _silent.set(_silent.get() or not show), _noted.set(set() if before is None else before)
    try:
        yield
    finally:
        _silent.reset(silent)
        _noted.reset(noted)


@contextmanager
def quiet_logger(name: str, level: int) -> Iterator[None]:
    """Silence what a library logs below ``level``."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and advice from transformers and PEFT; downloads keep their bars."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated")
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            if bars:
                transformers.utils.logging.enable_progress_bar()


_CHATTER = re.compile(
    r"LOAD REPORT|deprecated|will be removed|torchvision|ensure_weight_tying|no longer tied after merging|mean_resizing"
    r"|model has new|tokens have been added|`quantization_config` or equivalent|at your own risk|[Ff]lash"
)
"""Messages of the libraries at load time that a user of this package need not or cannot act on."""


class _Listener(logging.Handler):
    """Collects the messages of log records."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def library_warnings() -> Iterator[list[str]]:
    """Collect warnings from transformers and PEFT instead of printing them, each once and on one line.

    The list is filled when the context ends. Advice to programmers is left out.
    """
    import transformers

    heard: list[str] = []
    listener = _Listener()
    verbosity = transformers.logging.get_verbosity()
    handlers = {logger: logger.handlers for logger in map(logging.getLogger, ("transformers", "peft"))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transformers.logging.set_verbosity_warning()
        for logger in handlers:
            logger.handlers = [listener]
        try:
            yield heard
        finally:
            for logger, before in handlers.items():
                logger.handlers = before
            transformers.logging.set_verbosity(verbosity)
    said = listener.messages + [str(one.message) for one in caught if _is_theirs(one)]
    heard += dict.fromkeys(" ".join(message.split()) for message in said if not _CHATTER.search(message))


def _is_theirs(warning: warnings.WarningMessage) -> bool:
    """Whether a warning comes from transformers or PEFT and is meant for users."""
    aside = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning)
    return bool({"transformers", "peft"} & {*Path(warning.filename).parts}) and not issubclass(warning.category, aside)


def say(message: str) -> None:
    """Print a line to standard error, on rank 0 only; nothing if its reader has ended, such as a closed terminal."""
    if not is_rank0():
        return
    if _silent.get():
        _logger.info(message)
    else:
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)


def say_at_once(message: str) -> None:
    """Print a line as :func:`say` does, from a signal handler: without the streams, which the signal may interrupt.

    With hidden progress nothing is printed.
    """
    if is_rank0() and not _silent.get():
        before = "\n" if os.isatty(2) else ""  # after a bar, or the ^C
        with suppress(OSError):  # such as a closed terminal
            os.write(2, f"{before}{message}\n".encode())


def say_note(message: str, topic: str | None = None) -> None:
    """Print a note with :func:`say`; within :func:`progress_shown`, only the first time.

    There, of notes with the same ``topic``, only the first is printed.
    """
    noted = _noted.get()
    if noted is not None:
        if (topic or message) in noted:
            return
        noted.add(topic or message)
    say(f"note: {message}")


_PLAIN: dict[str, Any] = {"width": 100, "emoji": False, "force_jupyter": False, "force_terminal": False}
"""Options of a console that renders text without colours. In a notebook Rich would display the text instead."""


class _Page(Console):
    """Renders what is printed as HTML: tables as tables, everything else as text."""

    def __init__(self) -> None:
        super().__init__(**_PLAIN)
        self.html = ""

    def print(self, *objects: Any, **options: Any) -> None:
        for one in objects:
            if isinstance(one, Table):
                self.html += _html_table(one)
            else:
                with self.capture() as text:
                    super().print(one, **options)
                self.html = f"{self.html}<pre>{escape(text.get().rstrip())}</pre>\n".replace("</pre>\n<pre>", "\n")


def _html_table(table: Table) -> str:
    def row(cells: Iterable[Any], tag: str) -> str:
        texts = [Text.from_markup(cell) if isinstance(cell, str) else cell for cell in cells]
        shown = [escape(text.plain).replace("\n", "<br>") for text in texts]
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in shown)}</tr>\n"

    title = f"<caption>{escape(Text.from_markup(str(table.title)).plain)}</caption>\n" if table.title else ""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    head = row((column.header for column in table.columns), "th")
    return f"<table>\n{title}{head}{''.join(row(cells, 'td') for cells in rows)}</table>\n"


class Printable(ABC):
    """A result that prints itself: in a terminal, as text in a Python session, as HTML in a notebook."""

    @abstractmethod
    def print(self, console: Console) -> None:
        """Print the result to a console."""

    def __repr__(self) -> str:
        console = Console(file=StringIO(), **_PLAIN)
        self.print(console)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def figure(self) -> str:
        """An SVG shown below the text in a notebook; empty by default."""
        return ""

    def _repr_html_(self) -> str:
        page = _Page()
        self.print(page)
        return page.html + self.figure()
