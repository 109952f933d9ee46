"""The clock of what a device does."""

from __future__ import annotations

import time

import pytest
import torch

from selfdistill.runtime import clock


@pytest.mark.parametrize(("device", "waited"), [("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_the_clock_waits_for_the_gpu_that_it_times(
    monkeypatch: pytest.MonkeyPatch, device: str, waited: list[str]
) -> None:
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(str(device)))
    before = time.monotonic()
    assert before <= clock(torch.device(device)) <= time.monotonic()
    assert waits == waited
