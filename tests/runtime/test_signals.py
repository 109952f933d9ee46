"""The first signal is answered with a line, the second stops at once."""

from __future__ import annotations

import signal

import pytest

from selfdistill.runtime import StopRequests, progress_shown


def test_the_first_signal_is_answered_once(capfd: pytest.CaptureFixture[str]) -> None:
    line = "stopping at the end of the step, batch or measurement; another Ctrl-C stops at once, without saving\n"
    with StopRequests() as outer:
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.received == signal.SIGINT
            assert capfd.readouterr() == ("", line)
        with StopRequests(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert outer.received == signal.SIGINT
    assert capfd.readouterr() == ("", "")


def test_hidden_progress_hides_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_shown(False), StopRequests():
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr() == ("", "")


def test_a_closed_standard_error_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("os.write", fails)
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert stop.received == signal.SIGHUP
