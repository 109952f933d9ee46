"""TRL's trainer beside this package's, and the studies."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import mean

from bench import Bench, Check, Found, NotRun
from models import rows, small_model, starter

from selfdistill.data.sources import packaged
from selfdistill.runtime import read_lines

ROOT = Path(__file__).resolve().parents[2]
STUDY_SECONDS = 180.0
"""Less is not worth beginning the studies: a first run, after the base was measured, would be stopped (an estimate)."""


def check_trl(bench: Bench, found: Found) -> None:
    """A step of this package against one of TRL's, and the loss of the same rollouts."""
    if importlib.util.find_spec("trl") is None:
        raise NotRun("trl is not installed")
    from against_trl import compare

    model, data, tokens = small_model(bench), rows(bench, 24, 60, 40), 8
    if bench.cuda:
        model, data, tokens = starter(bench), packaged("knowledge.train.jsonl"), 128
    for name, lora in (("full", False), ("LoRA", True)):
        options = Namespace(tokens=tokens, steps=4, lora=lora, bf16=bench.cuda)
        result = compare(options, model, data, use_cpu=not bench.cuda)
        found.add(f"{name}: step against TRL's", result.own_s / result.trl_s)
        found.add(f"{name}: step", result.own_s, "s")
        found.add(f"{name}: TRL's step", result.trl_s, "s")
        found.add(f"{name}: loss", result.own_loss, "nats")
        found.add(f"{name}: loss of TRL", result.trl_loss, "nats")
        apart = abs(result.own_loss - result.trl_loss) / abs(result.trl_loss)
        found.add(f"{name}: losses apart, relative", apart, at_most=0.02 if bench.cuda else 1e-4)  # bfloat16 on a GPU


def check_study(bench: Bench, found: Found) -> None:
    """``make study`` with the starter model for what time there is; its lines are beside the results."""
    if bench.cuda and bench.seconds < STUDY_SECONDS:
        raise NotRun(f"{bench.seconds:.0f} s are left, and a first run may take {STUDY_SECONDS:.0f} s")
    starter(bench)
    results, minutes = bench.out / "study", bench.seconds / 60 - 0.5
    files = sorted((ROOT / "configs" / "study" / "anchors").glob("*.yaml"))
    command = [sys.executable, str(ROOT / "studies" / "study.py"), "--results", str(results)]
    command += ["--minutes", f"{minutes:.2f}", *map(str, files)]
    try:
        subprocess.run(command, check=False, timeout=bench.seconds - 10, stdout=sys.stderr)
    except subprocess.TimeoutExpired:
        found.add("stopped", "in the middle of a run")
    lines = [line for file in sorted(results.glob("*.jsonl")) for line in read_lines(file)]
    found.add("runs that ended", len(lines), at_least=1)
    found.add("runs that failed", sum("failed" in line for line in lines), at_most=0)
    if lines:
        found.add("seconds a run", mean(line["seconds"]["all"] for line in lines), "s")
        found.add("peak", max(line["peak_gib"] for line in lines), "GiB")


CHECKS = (
    Check("TRL", "a step against one of TRL's", 75, check_trl),
    Check("study", "make study, for what time is left", 600, check_study),
)
