"""The demo: teach the starter model invented facts by SDFT and by SFT, and show what each gained and forgot.

The settings below were chosen on the validation phrasings of the same facts (``docs/results.md``). The demo reports
results on the test phrasings, the indirect questions and the prior questions, on which nothing was chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from selfdistill.config import TrainConfig
from selfdistill.data import (
    Demonstration,
    encode,
    general_prompts,
    load_demonstrations,
    packaged,
    parse_context,
)
from selfdistill.errors import RunStopped, UserError
from selfdistill.evaluation import Answers, Distance, answer
from selfdistill.model import ForwardPass, LoadedModel, load_model, to_best_device
from selfdistill.runtime import result_console, say, write_json
from selfdistill.training import train

CONTEXT = "document:repeats=2"
SHARED: dict[str, Any] = {
    "model": "smollm2-135m",
    "batch_size": 16,
    "max_completion_length": 24,
    "save_steps": 0,
    "logging_steps": 5,
}
SDFT: dict[str, Any] = {
    "method": "sdft",
    "context": CONTEXT,
    "teacher": "frozen",
    "temperature": 0.3,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "max_steps": 120,
}
SFT: dict[str, Any] = {"method": "sft", "learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_steps": 36}
SDFT_EVALUATIONS = (40, 80, 120)
SFT_EVALUATIONS = (12, 18, 24, 30, 36)
SHOWN = 3
"""Number of questions whose replies are printed, before and after training."""


@dataclass(frozen=True)
class Point:
    """The results of one model."""

    name: str
    step: int
    new: float
    """Accuracy on the held-out phrasings: share of replies that contain the fact."""
    indirect: float
    """The same on questions that need the fact in reverse."""
    prior: float
    """The same on general questions."""
    kl: float
    """KL(base||model) on general prompts, nats per token."""
    seconds: float
    """Training time so far in seconds, without evaluations."""


class Panel:
    """The questions on which every model of the demo is evaluated, and the base's logits for the distance.

    Args:
        base: the model before training.
        facts: file stem of the facts, ``knowledge`` or ``study``.
        part: ``test``, or ``validation`` to choose settings.
    """

    def __init__(self, base: LoadedModel, *, facts: str = "knowledge", part: str = "test") -> None:
        self.chat = base.chat()
        self.new = load_demonstrations(packaged(f"{facts}.{part}.jsonl"))
        self.indirect = load_demonstrations(packaged(f"{facts}.indirect.jsonl")) if part == "test" else []
        self.prior = load_demonstrations(packaged(f"prior/{part}/facts.jsonl"))
        self.distance = Distance(base, ForwardPass(base), self.chat, general_prompts(), 32)
        self.replies: list[str] = []
        """Replies to the held-out phrasings, of the latest evaluated model."""

    def measure(self, name: str, loaded: LoadedModel, step: int = 0, seconds: float = 0.0) -> Point:
        """Evaluate a model on all questions."""
        new = self._ask(loaded, self.new)
        self.replies = new.replies
        indirect = self._ask(loaded, self.indirect).accuracy if self.indirect else float("nan")
        prior = self._ask(loaded, self.prior).accuracy
        kl = self.distance.of(loaded.model)
        say(f"{name}, step {step}: new {new.accuracy:.2f}  indirect {indirect:.2f}  prior {prior:.2f}  KL {kl:.3f}")
        return Point(name, step, new.accuracy, indirect, prior, kl, seconds)

    def teacher(self, loaded: LoadedModel, context: str) -> float:
        """Accuracy of the teacher on the held-out phrasings: the model with ``context``."""
        return self._ask(loaded, self.new, context).accuracy

    def _ask(self, loaded: LoadedModel, rows: Sequence[Demonstration], context: str | None = None) -> Answers:
        encoded, _ = encode(
            rows,
            parse_context(context) if context else None,
            self.chat,
            max_prompt_length=None,
            max_completion_length=32,
            window=loaded.window,
        )
        prompts = [x.student_ids if x.teacher_ids is None else x.teacher_ids for x in encoded]
        return answer(loaded, prompts, rows, self.chat, max_completion_length=32, batch_size=40)


def learn(panel: Panel, settings: dict[str, Any], evaluations: Sequence[int], output_dir: Path) -> list[Point]:
    """Train by one method and evaluate it at some steps, which does not affect the training."""
    points: list[Point] = []
    measuring_s, began = 0.0, time.monotonic()

    def on_step(step: int, loaded: LoadedModel, _metrics: Any) -> None:
        nonlocal measuring_s, began
        if step == 0:
            began = time.monotonic()
        if step not in evaluations:
            return
        measure_began = time.monotonic()
        points.append(panel.measure(settings["method"], loaded, step, measure_began - began - measuring_s))
        measuring_s += time.monotonic() - measure_began

    train(TrainConfig(**{**SHARED, **settings, "output_dir": str(output_dir)}), on_step=on_step)
    return points


def as_accurate(sft: Sequence[Point], sdft: Point) -> Point:
    """SFT at the first evaluation with at least SDFT's accuracy on the new facts; else its best evaluation."""
    reached = [point for point in sft if point.new >= sdft.new]
    return reached[0] if reached else max(sft, key=lambda point: point.new)


def demo(output_dir: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Run the demo: print a table and three replies before and after training, and save all in ``output_dir``.

    Args:
        output_dir: folder of the demo; default: ``runs/demo``, or the first free of ``runs/demo-2``, ...
        seed: random seed for data order and sampling.

    Returns:
        The results in the table, also written to ``demo.json``.

    Raises:
        UserError: ``output_dir`` exists and is not empty.
        RunStopped: a signal stopped the demo.
    """
    folder = _free_folder(output_dir)
    began = time.monotonic()
    base = to_best_device(load_model(SHARED["model"]))
    panel = Panel(base)
    before = panel.measure("base", base)
    asked = panel.replies
    ceiling = panel.teacher(base, CONTEXT)
    say(f"teacher (document and answer in its context): new {ceiling:.2f}")
    del base
    data = {"data": packaged("knowledge.train.jsonl"), "seed": seed}
    try:
        sdft = learn(panel, SDFT | data, SDFT_EVALUATIONS, folder / "sdft")
        told = panel.replies
        sft = learn(panel, SFT | data, SFT_EVALUATIONS, folder / "sft")
    except RunStopped as stop:
        raise RunStopped(f"{folder}: stopped; the demo cannot be resumed, start it again", stop.signal_number) from None
    final, fair = sdft[-1], as_accurate(sft, sdft[-1])
    result: dict[str, Any] = {
        "seed": seed,
        "teacher": ceiling,
        "base": asdict(before),
        "sdft": [asdict(point) for point in sdft],
        "sft": [asdict(point) for point in sft],
        "sft_matched": asdict(fair),
        "seconds": time.monotonic() - began,
    }
    write_json(folder / "demo.json", result)
    _print(before, ceiling, final, fair, sft[-1])
    _print_answers(panel.new, asked, told)
    result_console().print(f"Results are in {folder}, after {result['seconds'] / 60:.0f} minutes.", highlight=False)
    return result


def _free_folder(output_dir: str | None) -> Path:
    """The given folder, or the first of runs/demo, runs/demo-2, ... that does not exist."""
    if output_dir is not None:
        folder = Path(output_dir)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"output_dir {output_dir!r} exists and is not empty: choose another")
    else:
        folder, number = Path("runs/demo"), 2
        while folder.exists():
            folder, number = Path(f"runs/demo-{number}"), number + 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _print(before: Point, ceiling: float, sdft: Point, fair: Point, last: Point) -> None:
    table = Table(title="Invented facts, asked in phrasings not seen in training")
    for column in ("", "new facts", "indirect", "prior", "KL", "minutes"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    how = "as accurate" if fair.new >= sdft.new else "its best"
    rows = [("base", before), (f"SDFT, {sdft.step} steps", sdft), (f"SFT, {fair.step} steps ({how})", fair)]
    if last.step != fair.step:
        rows.append((f"SFT, {last.step} steps", last))
    for name, point in rows:
        table.add_row(
            name,
            f"{point.new:.2f}",
            f"{point.indirect:.2f}",
            f"{point.prior:.2f}",
            f"{point.kl:.3f}",
            f"{point.seconds / 60:.1f}",
        )
        if point is before:
            table.add_row("teacher: base + document", f"{ceiling:.2f}", "", "", "", "")
    result_console().print(table)
    result_console().print("KL: KL(base||model) on general prompts, nats per token", highlight=False)


def _print_answers(rows: Sequence[Demonstration], before: Sequence[str], after: Sequence[str]) -> None:
    console = result_console()
    for number in (i * len(rows) // SHOWN for i in range(SHOWN)):
        console.print(f"\n{rows[number].prompt[-1]['content']}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"  before: {' '.join(before[number].split())}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"  after:  {' '.join(after[number].split())}", markup=False, highlight=False, soft_wrap=True)
