"""The console: what libraries warn of while a model loads is collected, a line each, and chatter is not."""

from __future__ import annotations

import errno
import io
import logging
import re
import sys
import time
import warnings
from io import StringIO

import pytest
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfdistill.runtime.console import Printable, ProgressBar, library_warnings, result_table, say, unobeyed

LOGGER = logging.getLogger("transformers.modeling_utils")


def warn(text: str, category: type[Warning], file: str) -> None:
    warnings.warn_explicit(text, category, file, 1)


def test_each_warning_is_one_line_and_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    regex = "The tokenizer you are loading from 'm' with an incorrect regex pattern:\n  see there."
    with library_warnings() as heard:
        LOGGER.warning(regex)
        LOGGER.warning(regex)
        LOGGER.warning("Some weights were %s", "newly initialized")
        LOGGER.info("reading")
        warn("Found missing adapter keys", UserWarning, "/site-packages/peft/peft_model.py")
        assert heard == []
    assert heard == [
        "The tokenizer you are loading from 'm' with an incorrect regex pattern: see there.",
        "Some weights were newly initialized",
        "Found missing adapter keys",
    ]
    assert capfd.readouterr() == ("", "")


def test_chatter_is_left_out() -> None:
    with library_warnings() as heard:
        LOGGER.warning("LlamaForCausalLM LOAD REPORT from: m\nKey | Status")
        LOGGER.warning("`torch_dtype` is deprecated! Use `dtype` instead!")
        warn("will change", FutureWarning, "/site-packages/transformers/utils.py")
        warn("of another library", UserWarning, "/site-packages/torch/nn.py")
    assert heard == []


def test_the_libraries_say_afterwards_what_they_said_before() -> None:
    root, verbosity = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    handlers = list(root.handlers)
    transformers.logging.set_verbosity_error()
    with library_warnings():
        assert root.handlers != handlers
        assert LOGGER.isEnabledFor(logging.WARNING)
    assert root.handlers == handlers
    assert not LOGGER.isEnabledFor(logging.WARNING)
    transformers.logging.set_verbosity(verbosity)


class Shown(Printable):
    def print(self, console: Console) -> None:
        table = Table("layout", "[bold]right[/bold]", title="a < b")
        table.add_row("turns", Text("[x]\ny"))
        console.print(table)
        console.print("one & two", highlight=False)
        console.print("[three]", markup=False)


class Screen(io.StringIO):
    """A terminal, or a file; refuses to be written while ``error`` is set."""

    error: OSError | None = None
    is_terminal = True

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)

    @property
    def last(self) -> list[str]:
        """The lines drawn last, without control sequences."""
        drawn = self.getvalue().rpartition("\x1b[2K")[2]
        return re.sub(r"\x1b\[[?\d;]*\w", "", drawn).strip().split("\n")


def screen_of(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal of 80 columns as standard error."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    file = Screen()
    monkeypatch.setattr(sys, "stderr", file)
    return file


def test_the_name_of_a_task_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    with ProgressBar("[/x] [ema]", 2) as bar:
        bar.advance(2, "[live]")
    assert "[/x] [ema]" in screen.getvalue()
    assert "[live]" in screen.getvalue()


LONG = "loss 0.4321  KL(teacher||student) 0.432  120 tokens per completion, 0% truncated  3.2 s/step"


@pytest.mark.parametrize("what", ["step", "model after step 20 on /a/folder/with/a/long/name/test.jsonl, batch"])
def test_a_long_note_squeezes_nothing_else(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    screen = screen_of(monkeypatch)
    with ProgressBar(what, 12000, start=3) as bar:
        bar.advance(345, LONG)
    (line,) = screen.last
    assert line.startswith(what[:29])
    assert re.search(r" [━╸╺]+ +345/12000 0:00:0\d left [-\d]+:", line)
    assert len(line) == 80
    assert line.endswith("…")
    assert ("loss 0.4321" in line) == (what == "step")


def test_a_bar_within_another_has_a_line_of_its_own_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch)
    with ProgressBar("step", 9) as outer:
        outer.advance(4)
        with ProgressBar("batch", 3) as inner:
            inner.advance(2)
            both, until = re.compile(r"step .*4/9.*\n.*batch.*2/3"), time.monotonic() + 10
            while not both.search(screen.getvalue()) and time.monotonic() < until:  # drawn ten times a second
                time.sleep(0.02)
        outer.advance(5)
    drawn = screen.getvalue()
    assert both.search(drawn)
    assert drawn.count("\x1b[?25l") == 1  # the cursor is hidden once: one display
    assert "5/9" in screen.last[0]
    assert len(screen.last) == 1


@pytest.mark.parametrize("given", [{"FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}])
def test_what_cannot_draw_a_line_again_gets_lines(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    screen = screen_of(monkeypatch)
    screen.is_terminal = "FORCE_COLOR" not in given
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with ProgressBar("step", 4, every=2) as bar:
        for step in range(1, 5):
            bar.advance(step, "loss 1")
    assert re.fullmatch(r"step 2/4  loss 1 .*left\nstep 4/4  loss 1 .*left\n", screen.getvalue())


@pytest.mark.parametrize("terminal", [False, True])
def test_what_others_print_stays_on_standard_output_unless_it_is_the_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    screen = screen_of(monkeypatch)
    output = Screen()
    output.is_terminal = terminal
    monkeypatch.setattr(sys, "stdout", output)
    with ProgressBar("step", 2) as bar:
        bar.advance(1)
        print("from on_step")
    assert output.getvalue() == ("" if terminal else "from on_step\n")
    assert ("from on_step" in screen.getvalue()) == terminal


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize("terminal", [False, True])
def test_output_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch, error: OSError, terminal: bool) -> None:
    screen = screen_of(monkeypatch)
    screen.is_terminal = terminal
    with ProgressBar("step", 2, every=1) as bar:
        bar.advance(1)
        screen.error = error
        bar.advance(2)
        say("a line")
    say("another")
    assert sys.stderr is screen


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ipykernel: Rich finds the shell by its name, and colours are asked for."""
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr("builtins.get_ipython", lambda: shell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")


@pytest.mark.usefixtures("notebook")
def test_in_a_notebook_a_result_has_its_text_and_displays_nothing_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    text = repr(Shown())
    assert "turns" in text
    assert text.endswith("one & two\n[three]")
    assert "\x1b" not in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("notebook")
def test_a_notebook_shows_tables_as_tables() -> None:
    assert Shown()._repr_html_() == (
        "<table>\n<caption>a &lt; b</caption>\n<tr><th>layout</th><th>right</th></tr>\n"
        "<tr><td>turns</td><td>[x]<br>y</td></tr>\n</table>\n<pre>one &amp; two\n[three]</pre>\n"
    )


def test_a_terminal_obeys_nothing_in_a_text() -> None:
    assert unobeyed("é\t\n\x1b]52;c;aGk=\x07\x9b2J\r") == "é\t\n\\u001b]52;c;aGk=\\u0007\\u009b2J\\u000d"


def test_a_table_that_is_too_wide_loses_no_character() -> None:
    table = result_table("what", "[x]", title="of [base]")
    table.add_row("a name that is long", "0.123456789012 (0.10, 0.14)")
    console = Console(width=24, file=StringIO())
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "of [base]" in text
    assert "[x]" in text
    assert [column.justify for column in table.columns] == ["left", "right"]
