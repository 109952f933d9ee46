"""What can only be measured on a GPU: exactness, times, memory against plan, TRL beside it, and the studies.

    python benchmarks/gpu [--device cuda] [--pack FOLDER] [--out runs/gpu] [--only NAME]... [--minutes 9.5]

``--pack`` names what ``make gpu-pack`` made, for a machine that reaches no package index. Every check has a time limit,
and one that fails does not stop the others. A table is printed at the end; OUT/gpu.json has all numbers, and is written
anew after each check. The exit code is 1 if a check failed. With ``--device cpu`` all sizes are small: that tries the
checks, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "gpu"), str(ROOT / "benchmarks"), str(ROOT)]

from bench import Bench  # noqa: E402
from pack import PackError, unpack  # noqa: E402
from worker import NotStarted, Result, Worker  # noqa: E402

CPU_SECONDS = 60.0
"""What a check may take on a CPU."""
LEAST_SECONDS = 5.0
"""Less is not worth beginning a check."""


def use(packed: Path, work: Path) -> None:
    """Let this process and those that it starts import the wheels, and pip find the starter model.

    Raises:
        PackError: a file is missing or was changed.
    """
    site = unpack(packed, work)
    sys.path.insert(0, str(site))
    os.environ["PIP_NO_INDEX"] = "1"
    os.environ["PIP_FIND_LINKS"] = str(work / "wheels")
    os.environ["SELFDISTILL_CACHE"] = str(work / "cache")


def write(out: Path, device: dict[str, Any], results: Sequence[Result]) -> None:
    """Write what there is, whole or not at all."""
    text = json.dumps({**device, "checks": [result.row() for result in results]}, indent=1) + "\n"
    (out / "gpu.json.new").write_text(text, encoding="utf-8")
    os.replace(out / "gpu.json.new", out / "gpu.json")


def run(bench: Bench, names: Sequence[str], minutes: float) -> list[Result]:
    """Run the checks for so long; what is not begun by then is not run.

    Raises:
        NotStarted: there is no GPU, something cannot be imported, or a name is none of a check.
    """
    end, results = time.monotonic() + 60 * minutes, []
    with Worker(bench) as worker:
        worker.start()
        known = [name for name, _, _ in worker.checks]
        if unknown := sorted(set(names) - {*known}):
            raise NotStarted(f"--only {unknown[0]!r}: expected one of {', '.join(known)}")
        for name, what, seconds in worker.checks:
            if names and name not in names:
                continue
            limit = min(seconds if bench.cuda else CPU_SECONDS, end - time.monotonic())
            if limit < LEAST_SECONDS:
                results.append(Result(name, what, "not run", "no time is left"))
            else:
                results.append(worker.run(name, what, limit))
            print(f"{name}: {results[-1].outcome}, {results[-1].seconds:.1f} s", file=sys.stderr, flush=True)
            write(bench.out, worker.device, results)
    return results


def print_table(results: Sequence[Result]) -> None:
    """A Markdown table with a line for each number."""
    print("| check | number | value |\n|---|---|---|")
    for result in results:
        why = f": {result.why}" if result.why else ""
        print(f"| **{result.name}**, {result.what} | {result.outcome}{why} | {result.seconds:.1f} s |")
        for number in result.numbers:
            print(f"| {result.name} | {number.name} | {'' if number.passes else '**fails** '}{number.text()} |")


def main() -> int:
    parser = argparse.ArgumentParser(description="What can only be measured on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--pack", type=Path, help="folder that `make gpu-pack` filled")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="default: %(default)s")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a check; repeatable")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all checks (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-"))
    try:
        if options.pack:
            use(options.pack, scratch / "pack")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        results = run(Bench(options.device, options.out.resolve(), scratch), options.only, options.minutes)
    except (PackError, NotStarted) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print_table(results)
    for result in results:
        if result.outcome == "not run":
            print(f"NOT RUN: {result.name}: {result.why}", file=sys.stderr)
    return 1 if any(result.outcome == "failed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
