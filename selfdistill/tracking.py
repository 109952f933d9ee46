"""What a run reports: the table of metric names, ``metrics.jsonl``, and progress on the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

METRICS = {
    "step": "optimizer steps done",
    "epoch": "passes over the data",
    "loss": "what is minimised, nats per token",
    "kl/forward": "KL(teacher||student), nats per token over the kept tokens",
    "kl/reverse": "KL(student||teacher), nats per token over the kept tokens",
    "drift/student": "KL(base||student) on a few fixed prompts, nats per token; every ``drift_steps``",
    "drift/teacher": "KL(base||teacher) on the same, without the demonstration",
    "completion/length": "mean tokens per completion",
    "completion/truncated": "share of completions stopped by the length limit",
    "entropy": "of the student over the kept tokens, nats per token",
    "importance": "mean importance weight of the completions",
    "learning_rate": "of this step",
    "grad_norm": "global norm before clipping",
    "tokens": "completion tokens trained on so far",
    "time/rollout_s": "sampling, seconds",
    "time/teacher_s": "the teacher's scoring, seconds",
    "time/student_s": "the student's scoring and backward pass, seconds",
    "time/update_s": "clipping, optimizer and teacher's update, seconds",
    "time/drift_s": "measuring the two drifts, seconds; next to 0 where they were not",
    "time/step_s": "the whole step, seconds",
}
"""Every key of a line of metrics.jsonl, with its meaning and unit."""


def output() -> Console:
    """Where results are printed: standard output; into a file or a pipe 120 columns wide, so that tables keep lines."""
    return Console(width=None if sys.stdout.isatty() else 120)


class MetricsFile:
    """``metrics.jsonl``: one JSON object per step, appended.

    Opening for a run that continues cuts the lines after ``start_step``, which are computed again.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        lines = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    keep = json.loads(line)["step"] <= start_step
                except (ValueError, KeyError):
                    keep = False  # a last line that was being written when the machine stopped
                if keep:
                    lines.append(line + "\n")
        path.write_text("".join(lines), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, float]) -> None:
        """Append one step."""
        unknown = metrics.keys() - METRICS.keys()
        assert not unknown, f"metrics missing from the table: {sorted(unknown)}"
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Reporter:
    """Progress of long work: a bar with the time left on a terminal, a line now and then elsewhere.

    Everything goes to standard error; standard output is for results.
    """

    def __init__(self, what: str, total: int, *, start: int = 0, every: int = 1, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._every, self._what, self._total, self._start, self._quiet = every, what, total, start, quiet
        self._began = time.monotonic()
        self._progress: Progress | None = None
        if self.console.is_terminal and not quiet:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            ]
            self._progress = Progress(
                *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console
            )
            self._task = self._progress.add_task(what, total=total, completed=start, note="")

    def __enter__(self) -> Reporter:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, done: int, note: str = "") -> None:
        """``done`` of the total are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif not self._quiet and (done % self._every == 0 or done == self._total):
            elapsed = time.monotonic() - self._began
            left = elapsed / max(done - self._start, 1) * (self._total - done)
            say(f"{self._what} {done}/{self._total}  {note}  {elapsed:.0f} s elapsed, {left:.0f} s left")


def say(message: str) -> None:
    """One line of information on standard error."""
    print(message, file=sys.stderr, flush=True)
