"""The console: what libraries warn of while a model loads is collected, a line each, and chatter is not."""

from __future__ import annotations

import errno
import io
import logging
import sys
import warnings
from io import StringIO

import pytest
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfdistill.runtime.console import Printable, ProgressBar, library_warnings, result_table, say

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


def test_the_name_of_a_task_is_no_markup(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with ProgressBar("[/x] [ema]", 2) as bar:
        bar.advance(2, "[live]")
    said = capfd.readouterr().err
    assert "[/x] [ema]" in said
    assert "[live]" in said


class Unread(io.StringIO):
    """A file that refuses to be written while ``error`` is set."""

    error: OSError | None = None

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize("colour", ["", "1"])
def test_output_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch, error: OSError, colour: str) -> None:
    monkeypatch.setenv("FORCE_COLOR", colour)
    file = Unread()
    monkeypatch.setattr(sys, "stderr", file)
    with ProgressBar("step", 2, every=1) as bar:
        bar.advance(1)
        file.error = error
        bar.advance(2)
        say("a line")
    say("another")
    assert sys.stderr is file


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
