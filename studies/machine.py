"""Where something was measured."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import selfdistill
from selfdistill.model import resolved_precision


def device_name() -> str:
    """The GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def where(mixed_precision: str) -> dict[str, Any]:
    """What the numbers of a run with this setting may depend on besides its settings and its data."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "precision": {"bf16": "bfloat16", "no": "float32"}[resolved_precision(mixed_precision)],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "selfdistill": selfdistill.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
