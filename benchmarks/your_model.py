"""Memory and time by plan of the 7B commands in docs/your_model.md; nothing is computed. Prints the page's table.

Usage: python benchmarks/your_model.py [RUN ...]
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from memory import GB, SIZES, write_model

from selfdistill.cli_parser import parse
from selfdistill.config import TrainConfig
from selfdistill.data import load_demonstrations
from selfdistill.runtime import GPUS
from selfdistill.training.fitting import Fit, fit
from selfdistill.training.rates import named_rates
from selfdistill.training.traced_step import Device

PAGE = Path(__file__).resolve().parents[1] / "docs" / "your_model.md"
DEFAULT = "h100"
"""GPU of commands that name none."""
LABELS = ("memory by plan", "chosen for it", "a step, roughly", "all steps")


def commands() -> dict[str, tuple[dict[str, Any], str, int]]:
    """Settings of the page's training commands by run folder, with the GPU and the number of processes of each."""
    found = {}
    for block in re.findall(r"^```console\n\$ (.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        words = shlex.split(block.replace("\\\n", " "))
        command, given = parse(words[words.index("selfdistill") + 1 :])
        if command == "train":
            processes = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
            values = {name: value for name, value in given.items() if name in TrainConfig.model_fields}
            found[Path(values["output_dir"]).name] = values, given.get("device", DEFAULT), processes
    return found


def write_files(folder: Path) -> dict[str, str]:
    """The model's ``config.json`` and the rows: prompts and anchors of about 100 tokens, 500 more for the teacher."""
    write_model(folder / "7B", SIZES["7B"])
    rows = [json.dumps({"prompt": f"{i:03} " + "x" * 70, "completion": "y" * 400}) for i in range(500)]
    anchors = [f"{i:03} " + "z" * 90 for i in range(300)]
    for name, lines in {"demos.jsonl": rows, "traffic.txt": anchors}.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"model": str(folder / "7B"), "data": str(folder / "demos.jsonl"), "anchors": str(folder / "traffic.txt")}


def plans(names: list[str]) -> Iterator[Fit]:
    """Plans of the commands with these run folders."""
    known = commands()
    with tempfile.TemporaryDirectory() as name:
        files = write_files(Path(name))
        for run in names:
            values, gpu, processes = known[run]
            config = TrainConfig(**values | files)
            device, limit = Device("cuda", "bf16", processes), int(GPUS[gpu].memory_gb * GB)
            yield fit(config, load_demonstrations(config.data), device, limit, rates=partial(named_rates, gpu))


def cells(found: Fit) -> list[str]:
    """Memory, chosen settings and time of a plan, as in the page's table."""
    assert found.time is not None
    config, time = found.plan.config, found.time
    beside = f", {found.plan.host / GB:.0f} GB of the machine's" if found.plan.host else ""
    fits = "" if found.fits else ", does not fit"
    return [
        f"{found.plan.peak / GB:.0f} GB{beside}{fits}",
        f"{config.micro_batches} micro-batch{'es' * (config.micro_batches > 1)}"
        + (", checkpointing" if config.gradient_checkpointing else ""),
        f"{time.step.total:.0f} s",
        f"{time.steps} in {time.total / 60:.0f} min",
    ]


def main() -> None:
    for run in sys.argv[1:] or commands():
        (found,) = plans([run])
        print(f"{run}: {found.verdict()}", flush=True)
        for label, cell in zip(LABELS, cells(found), strict=True):
            print(f"| {label} | {cell} |", flush=True)


if __name__ == "__main__":
    main()
