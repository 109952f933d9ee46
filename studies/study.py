"""Run the comparisons in study files, one run at a time; can be stopped and resumed between runs.

    python studies/study.py [--only NAME]... [--minutes M] [--results FOLDER] configs/study/anchors/*.yaml
    python studies/study.py --summary configs/study/anchors/*.yaml
    python studies/study.py --figure FILE.svg --only ARM... configs/study/anchors/routing.yaml
    python studies/study.py --figure FILE.svg STUDY.yaml...

Each run appends one line to FOLDER/STUDY.jsonl. A run that has its line there is not run again: to repeat one, delete
its line. Lines made on several machines are merged by putting them into one file. The runs of a study share one base
and its measurements, and no model is kept. The arithmetic is that of the study file; on GPUs it is bf16, and on CPUs
without fast bfloat16 it is float32. The line says which.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import device_name, where
from study_file import After, Asked, chosen, read_studies, resolved, results_file, results_of
from summary import draw, table

from selfdistill.config import ModelSettings, TrainConfig
from selfdistill.data import Demonstration, anchor_prompts, load_demonstrations, parse_context
from selfdistill.errors import RunFailed, RunStopped, UserError
from selfdistill.evaluation import EvaluationSet, Evaluator, judge_of, rows_fingerprint
from selfdistill.model import LoadedModel, bfloat16_is_fast, load_for_training, training_precision
from selfdistill.runtime import (
    StopRequests,
    begin_peak,
    drop_partial_line,
    peak_memory,
    quiet_libraries,
    read_lines,
    say,
)
from selfdistill.training import train

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "comparisons" / "studies"
MEASURED = (*ModelSettings.model_fields, "max_completion_length", "test", "test_split", "prior", "mixed_precision")
"""Settings on which the measurement of a model depends."""


def arithmetic_here() -> str | None:
    """What replaces ``mixed_precision`` of the study files on this machine."""
    if torch.cuda.is_available():
        return "bf16"
    return None if bfloat16_is_fast() else "no"


@dataclass
class Shown:
    """An ``after`` of the study file, with the base's replies to it."""

    questions: EvaluationSet
    base: dict[str, Any]

    @classmethod
    def of(cls, after: After, config: TrainConfig, base: LoadedModel) -> Shown:
        """Encode the rows with their demonstrations, and ask the base."""
        own = {"scorer": after.scorer, "max_completion_length": after.max_completion_length}
        config = config.model_copy(update={name: value for name, value in own.items() if value is not None})
        lacks = parse_context(after.context).lacks
        rows = load_demonstrations(resolved(after.data), lacks=lacks)
        shown = cls(EvaluationSet(base, rows, {}, config, after.context), {})
        shown.base = shown.measure(base)
        return shown

    def measure(self, loaded: LoadedModel) -> dict[str, Any]:
        config = self.questions.config
        assert isinstance(config, TrainConfig)
        with training_precision(loaded.model, config.mixed_precision):
            answers = self.questions.answers(loaded, judge_of(config), what="shown")
        return {"accuracy": answers.accuracy, "correct": digits(answers.correct)}


@dataclass
class Start:
    """What runs share that start from the same base and are measured alike."""

    base: LoadedModel
    evaluator: Evaluator
    after: dict[str, Shown]


class Starts:
    """Makes each :class:`Start` once. A base is loaded once for all studies; training gets a copy of it."""

    def __init__(self) -> None:
        self._bases: dict[tuple[Any, ...], LoadedModel] = {}
        self._starts: dict[str, Start] = {}

    def of(self, asked: Asked, config: TrainConfig) -> Start:
        """The start of a run.

        Raises:
            UserError: the model, the test, the prior or an ``after`` cannot be used.
        """
        measured = {name: getattr(config, name) for name in MEASURED}
        key = json.dumps([asked.study.name, measured])
        if key not in self._starts:
            kind = config.model, config.dtype, config.adapter_base
            if kind not in self._bases:
                self._bases = {kind: load_for_training(kind[0], dtype=kind[1], adapter_base=kind[2])}
            base = self._bases[kind]
            say(f"{asked.study.name}: measuring the base")
            evaluator = Evaluator(config, base)
            if unknown := [name for name in asked.study.nearest if name not in evaluator.base.get("prior", {})]:
                raise UserError(f"study {asked.study.name!r}: 'nearest' names {unknown[0]!r}, which is no prior file")
            after = {one.name: Shown.of(one, config, base) for one in asked.study.after}
            # Of another study no start is kept, for each holds the base's logits.
            self._starts = {k: v for k, v in self._starts.items() if json.loads(k)[0] == asked.study.name}
            self._starts[key] = Start(base, evaluator, after)
        return self._starts[key]


def digits(correct: Sequence[bool]) -> str:
    """Right and wrong items as 1 and 0, in their order."""
    return "".join(str(int(right)) for right in correct)


def evaluation(found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a line of evaluations.jsonl."""
    prior = {name: {"accuracy": p["accuracy"], "correct": digits(p["correct"])} for name, p in found["prior"].items()}
    return {
        "step": found["step"],
        "accuracy": found["accuracy"],
        "correct": digits(found["correct"]),
        "prior_accuracy": found["prior_accuracy"],
        "prior": prior,
        "kl": found["kl_base"],
        "seconds": found["seconds"],
    }


def moved_back(model: torch.nn.Module, base: torch.nn.Module, shares: Sequence[float]) -> Iterator[float]:
    """Move the model to each share of the way from the base to where it is, the largest first, and yield the share."""
    at = 1.0
    for share in sorted(shares, reverse=True):
        with torch.no_grad():
            for own, start in zip(model.parameters(), base.parameters(), strict=True):
                own.copy_(torch.lerp(start, own, share / at))
        at = share
        yield share


def run(asked: Asked, config: TrainConfig, start: Start, demonstrations: list[Demonstration]) -> dict[str, Any]:
    """Train and measure; returns what the line says of it.

    Raises:
        RunStopped: a signal stopped the run.
        UserError: the settings or the data cannot be used.
    """
    if config.load_in_4bit:  # a base is quantised while it is read
        names = {"dtype": config.dtype, "adapter_base": config.adapter_base}
        loaded = load_for_training(config.model, load_in_4bit=True, **names)
    else:
        loaded = replace(start.base, model=copy.deepcopy(start.base.model), notes=[])
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        config = config.model_copy(update={"output_dir": str(Path(folder) / "run")})
        try:
            train(config, demonstrations=demonstrations, evaluator=start.evaluator, loaded=loaded)
        except (
            RunFailed,
            RuntimeError,
            MemoryError,
        ) as error:  # torch raises RuntimeError, for instance without memory
            if not isinstance(error, RunFailed):
                traceback.print_exc()
            first, *_ = str(error).splitlines() or ["no message"]
            return {"failed": f"{type(error).__name__}: {first}".replace(folder, "")}
        metrics = read_lines(Path(config.output_dir) / "metrics.jsonl")
        evaluations = read_lines(Path(config.output_dir) / "evaluations.jsonl")
    after = {name: {**shown.measure(loaded), "base": shown.base["accuracy"]} for name, shown in start.after.items()}
    last = {name: evaluations[-1][name] for name in ("step", "seconds")}
    partway = [
        {"share": share, **evaluation({**start.evaluator.measure(loaded, f"share {share:g}"), **last})}
        for share in moved_back(loaded.model, start.base.model, asked.study.partway)
    ]
    return {
        "evaluations": [evaluation(found) for found in evaluations],
        "after": after,
        **({"partway": partway} if partway else {}),
        "metrics": metrics[-1],
        "seconds": {"steps": evaluations[-1]["seconds"]},
    }


def one(asked: Asked, config: TrainConfig, start: Start) -> dict[str, Any]:
    """Run, and return the whole line."""
    began = time.perf_counter()
    device = start.base.device
    with contextlib.suppress(OSError):  # then it counts earlier runs, too
        begin_peak(device)
    demonstrations = load_demonstrations(config.data, split=config.split)
    rows = rows_fingerprint({"data": demonstrations}) + start.evaluator.questions.fingerprint()
    anchors = {str(at): anchor_prompts(name) for at, name in enumerate(config.anchors)}
    found = run(asked, config, start, demonstrations)
    gc.collect()
    found["seconds"] = found.get("seconds", {}) | {"all": time.perf_counter() - began}
    return {
        "arm": asked.arm,
        "seed": asked.seed,
        "settings": asked.settings,
        **({"anchor_rows": rows_fingerprint(anchors)[:16]} if anchors else {}),
        **found,
        "peak_gib": peak_memory(device) / 2**30,
        "where": where(config.mixed_precision) | {"rows": rows[:8] + rows[64:72]},  # fingerprint of its data
    }


def append(file: Path, line: dict[str, Any]) -> None:
    """Append a line by a single write, so that the file has whole lines only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8")
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, text)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Clock:
    """Whether there is time for another run: the mean of the earlier ones, of the same study if there are some."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._done: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        self._done.append(line)

    def has_time(self, lines: Sequence[dict[str, Any]]) -> bool:
        """Whether a run like those of ``lines`` on this device would end in time; if there are none, like the last."""
        here = [line for line in lines if line["where"]["device"] == device_name()] or self._done
        expected = mean([line["seconds"]["all"] for line in here]) if here else 0.0
        return self._end is None or time.monotonic() + expected < self._end


def run_all(runs: Sequence[Asked], results: Path, minutes: float | None) -> int:
    """Run what has no line yet; returns the number of runs that failed.

    Raises:
        RunStopped: a signal stopped the study; the runs that ended have their lines.
        UserError: an input cannot be used.
    """
    starts, clock, failed = Starts(), Clock(minutes), 0
    precision = arithmetic_here()
    for study in dict.fromkeys(asked.study.name for asked in runs):
        drop_partial_line(results / f"{study}.jsonl")
    with StopRequests() as stop:
        for number, asked in enumerate(runs, 1):
            lines = results_of(asked.study, results)  # now, for another process may have added some
            if any(asked.is_of(line) for line in lines):
                continue
            config, what = asked.config("run", precision), f"{asked.study.name}, {asked.arm}, seed {asked.seed}"
            start = starts.of(asked, config) if clock.has_time(lines) else None
            if stop.received is not None:
                raise RunStopped(f"stopped before {what}; run the same command to continue", stop.received)
            if start is None or not clock.has_time(lines):  # measuring the base took some
                say(f"no time left for another run; the next is {what}")
                break
            say(f"run {number} of {len(runs)}: {what}")
            line = one(asked, config, start)
            append(results_file(asked.study, results), line)
            clock.add(line)
            if "failed" in line:
                failed += 1
                say(f"note: this run failed: {line['failed']}")
        if stop.received is not None:
            raise RunStopped("stopped after the last run", stop.received)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the comparisons in study files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="study file")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a study or an arm; repeatable")
    parser.add_argument("--minutes", type=float, help="start no run that would probably end later")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--summary", action="store_true", help="print tables of what was measured, and run nothing")
    parser.add_argument("--figure", type=Path, metavar="SVG", help="draw where each arm ended, and run nothing")
    options = parser.parse_args(argv)
    try:
        studies = read_studies(options.files)
        runs = chosen(studies, options.only)
        if options.summary:
            for study in dict.fromkeys(asked.study.name for asked in runs):
                own = [asked for asked in runs if asked.study.name == study]
                print("\n".join(table(own, results_of(own[0].study, options.results))) + "\n")
            return 0
        if options.figure:
            files = dict.fromkeys(results_file(asked.study, options.results) for asked in runs)
            draw(runs, [line for file in files for line in read_lines(file)], options.figure)
            return 0
        with quiet_libraries():
            return RunFailed.exit_code if run_all(runs, options.results, options.minutes) else 0
    except UserError as error:
        print(error if error.exit_code > 128 else f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
