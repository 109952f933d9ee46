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
@pytest.mark.parametrize("name", LIMITS)
def test_a_7b_model_fits_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not name.startswith("LoRA"):
        pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    memory = import_module("memory")
    monkeypatch.setattr(memory, "SIZES", {"7B": memory.SIZES["7B"]})
    memory.write_inputs(tmp_path)
    ((_, (plan,)),) = memory.rows(tmp_path, {name: memory.SETTINGS[name]}, 1)
    assert plan.untraced is None
    assert plan.peak / memory.GB < LIMITS[name]
