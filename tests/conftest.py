"""What the tests share, ``shared.py``, where they run: the process that hands them out to others needs none of it."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import Any

import pytest
import stress

pytest.register_assert_rewrite("shared")


@pytest.hookimpl(trylast=True)  # after xdist, whose plugin of this name is in the process that hands tests out
def pytest_configure(config: Any) -> None:
    if not config.pluginmanager.hasplugin("dsession"):
        shared = vars(import_module("shared"))
        globals().update({name: value for name, value in shared.items() if not name.startswith("__")})


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, which took a quarter of the time of comparisons."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if stress.TALLIES and not hasattr(terminalreporter.config, "workerinput"):
        terminalreporter.section("promises")
        for line in stress.table():
            terminalreporter.write_line(line)
