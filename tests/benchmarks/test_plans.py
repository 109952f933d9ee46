"""What the docs promise of a 7B model on one GPU, held by the plan."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

LIMITS = {
    "full on bfloat16, 8-bit moments, EMA, 32 micro-batches, checkpointing": 80,
    "LoRA 16 on bfloat16, 8 micro-batches, checkpointing": 30,
    "QLoRA 16 on bfloat16, 8 micro-batches, checkpointing": 16,
}
"""GB."""


@pytest.mark.slow
def test_a_7b_model_fits_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    memory = import_module("memory")
    monkeypatch.setattr(memory, "SIZES", {"7B": memory.SIZES["7B"]})
    memory.write_inputs(tmp_path)
    settings = {name: memory.SETTINGS[name] for name in LIMITS}
    plans = {name: plan for name, (plan,) in memory.rows(tmp_path, settings, 1)}
    assert all(plan.untraced is None for plan in plans.values())
    peaks = {name: plan.peak / memory.GB for name, plan in plans.items()}
    assert {name: peak < LIMITS[name] for name, peak in peaks.items()} == dict.fromkeys(LIMITS, True), peaks
