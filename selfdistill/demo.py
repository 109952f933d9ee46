"""The demo: teach the starter model a skill by SFT and SDFT, each without and with anchors; show what it cost.

The skill is to name the team for a customer's message. Every arm learns from the same demonstrations in the same number
of steps, and is measured on the test split of the skill and on questions about what the base could do before.
"""

from __future__ import annotations

import copy
import gc
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from selfdistill.comparison import report, scatter
from selfdistill.config import ReportConfig, TrainConfig
from selfdistill.data import drift_prompts, load_demonstrations, packaged
from selfdistill.errors import RunStopped, UserError
from selfdistill.evaluation import Evaluation, Evaluator, generate
from selfdistill.model import LoadedModel, load_for_training, training_precision
from selfdistill.runtime import StopRequests, read_lines, result_console, say, write_json
from selfdistill.training import train

# These settings were chosen on the skill's validation rows and the validation split of the prior questions, the
# learning rate with anchors for each method. The demo measures on the test splits, on which nothing was chosen.
SHARED: dict[str, Any] = {
    "model": "smollm2-135m",
    "data": packaged("routing.train.jsonl"),
    "test": packaged("routing.test.jsonl"),
    "batch_size": 8,
    "max_steps": 24,
    "max_completion_length": 16,  # the task needs 6; replies to anchors, too, are cut here
    "drift_steps": 0,
    "save_steps": 0,
    "view_rows": 2,
    "logging_steps": 4,
}
SAMPLING: dict[str, Any] = {"temperature": 0.3}
SFT: dict[str, Any] = {"method": "sft", "learning_rate": 5e-5}
SDFT: dict[str, Any] = {
    "method": "sdft",
    "learning_rate": 1e-4,
    "context": "turns:repeats=4",
    "teacher": "frozen",
    **SAMPLING,
}
ANCHORS: dict[str, Any] = {"anchors": "package", "anchor_share": 0.5, **SAMPLING}
ARMS: dict[str, dict[str, Any]] = {
    "SFT": SFT,
    "SDFT": SDFT,
    "SFT + anchors": SFT | ANCHORS,
    "SDFT + anchors": SDFT | ANCHORS,
}
ASKED = ("SDFT + anchors", "SFT")
"""Arms whose replies are shown: what is kept, and what plain SFT forgets."""
PRIOR = packaged("prior/test")
PRIOR_OF_A_KIND = 10
"""Questions that are asked of each kind: always the same ones."""
EVALUATION_BATCH = 64
SHOWN = 3
"""Number of prompts of each sort whose replies are shown."""
REPLY_TOKENS = 48
"""Maximum length of a reply that is shown, in tokens."""

_T = TypeVar("_T")


def demo(output_dir: str | None, seed: int) -> dict[str, Any]:
    """Run the demo: print a table, the trade-off and replies before and after, and save all in ``output_dir``.

    Args:
        output_dir: folder of the demo; default: ``runs/demo``, or the first free of ``runs/demo-2``, ...
        seed: random seed for data order and sampling.

    Returns:
        What was measured, as in ``demo.json``: ``seed``, ``settings`` of each arm, ``teacher`` (its accuracy on
        the new task), ``base`` and ``arms`` (each with ``new``, ``prior``, ``kinds``, ``kl`` and ``seconds``),
        ``replies`` by model and prompt, and ``seconds`` by part of the demo.

    Raises:
        UserError: ``output_dir`` exists and is not empty.
        RunStopped: a signal stopped the demo.
    """
    folder = _free_folder(output_dir)
    try:
        with StopRequests() as stop:
            result = _measured(folder, seed, stop)
    except (RunStopped, KeyboardInterrupt) as stopped:
        number = stopped.signal_number if isinstance(stopped, RunStopped) else signal.SIGINT
        message = f"{folder}: stopped before the results; the demo cannot resume, so start it again: selfdistill demo"
        raise RunStopped(message, number) from None
    write_json(folder / "demo.json", result)
    _print(result)
    page = folder / "report.html"
    report(ReportConfig(runs=[str(_run_folder(folder, arm)) for arm in ARMS], output=str(page)))
    _say_all([f"All numbers are in {folder / 'demo.json'}.", f"A report with figures: {page}"])
    return result


def _measured(folder: Path, seed: int, stop: StopRequests) -> dict[str, Any]:
    """Measure the base, then train and measure every arm from a copy of it.

    Raises:
        RunStopped: a signal stopped the demo.
    """
    began = time.monotonic()
    settings = SHARED | {"prior": str(_prior_sample(folder / "prior")), "seed": seed}
    configs = {
        arm: TrainConfig(**settings | own | {"output_dir": str(_run_folder(folder, arm))}) for arm, own in ARMS.items()
    }
    base = load_for_training(SHARED["model"])
    loaded_at = time.monotonic()
    say("evaluating the base")
    evaluator = Evaluator(configs["SDFT"].model_copy(update={"batch_size": EVALUATION_BATCH}), base)
    teacher = evaluator.shown(base, SDFT["context"], "teacher")
    assert teacher is not None, "the package's rows have demonstrations"
    replies = {"base": _replies(base)}
    measured_at = time.monotonic()
    arms = {}
    for number, (arm, config) in enumerate(configs.items(), 1):
        if stop.received is not None:
            raise RunStopped("", stop.received)
        say(f"arm {number} of {len(ARMS)}: {arm}")
        student = replace(base, model=copy.deepcopy(base.model), notes=[])
        train(config, evaluator=evaluator, loaded=student)
        arms[arm] = _point(read_lines(Path(config.output_dir) / "evaluations.jsonl")[-1])
        if arm in ASKED:
            replies[arm] = _replies(student)
        del student
        gc.collect()
    seconds = {
        "loading": loaded_at - began,
        "base": measured_at - loaded_at,
        "arms": time.monotonic() - measured_at,
        "steps": sum(point["seconds"] for point in arms.values()),
        "all": time.monotonic() - began,
    }
    return {
        "seed": seed,
        "settings": {arm: config.model_dump(mode="json", exclude_unset=True) for arm, config in configs.items()},
        "teacher": teacher["accuracy"],
        "base": _point({**evaluator.base, "seconds": 0.0}),
        "arms": arms,
        "replies": replies,
        "seconds": seconds,
    }


def _point(found: Evaluation) -> dict[str, Any]:
    """What the demo keeps of an evaluation.

    ``new``, ``prior`` (mean over kinds) and ``kinds`` are shares of right replies; ``kl`` is KL(base||model) along the
    base's answers to general prompts, in nats per token; ``seconds`` are those of the training steps.
    """
    return {
        "new": found["accuracy"],
        "prior": found["prior_accuracy"],
        "kinds": {kind: of_kind["accuracy"] for kind, of_kind in found["prior"].items()},
        "kl": found["kl_base"],
        "seconds": found["seconds"],
    }


def _prior_sample(folder: Path) -> Path:
    """Write the prior questions that are asked, a file for each kind, and return their folder."""
    folder.mkdir()
    for file in sorted(Path(PRIOR).glob("*.jsonl")):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / file.name).write_text("".join(random.Random(0).sample(lines, PRIOR_OF_A_KIND)), encoding="utf-8")
    return folder


def _prompts() -> list[str]:
    """Prompts whose replies are shown: first new ones, then everyday ones, evenly spread over their files."""
    rows = _spread(load_demonstrations(SHARED["test"])) + _spread(drift_prompts())
    return [row.prompt[-1]["content"] for row in rows]


def _spread(rows: Sequence[_T]) -> list[_T]:
    return [rows[number * len(rows) // SHOWN] for number in range(SHOWN)]


def _replies(loaded: LoadedModel) -> dict[str, str]:
    """The model's replies by prompt."""
    prompts = _prompts()
    with training_precision(loaded.model, TrainConfig.model_fields["mixed_precision"].default):
        replies = generate(loaded, prompts, max_completion_length=REPLY_TOKENS)
    return dict(zip(prompts, replies, strict=True))


def _run_folder(folder: Path, arm: str) -> Path:
    return folder / arm.lower().replace(" + ", "-")


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


# --- printing ---


def _print(result: dict[str, Any]) -> None:
    points = {"base": result["base"], **result["arms"]}
    kinds = result["base"]["kinds"]
    table = Table(title="A skill: which team handles a customer's message?")
    for column in ("", "new", "prior", "KL", "minutes"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, point in points.items():
        minutes = "" if name == "base" else f"{point['seconds'] / 60:.1f}"
        table.add_row(name, f"{point['new']:.2f}", f"{point['prior']:.2f}", f"{point['kl']:.3f}", minutes)
        if name == "base":
            table.add_row("teacher: base + answer", f"{result['teacher']:.2f}")
    result_console().print(table)
    asked = f"{PRIOR_OF_A_KIND * len(kinds)} other questions, {PRIOR_OF_A_KIND} of each kind"
    figure = scatter(
        {name: (point["prior"], point["new"]) for name, point in points.items()},
        "prior",
        "new",
        level=("teacher", result["teacher"]),
    )
    _say_all(
        [
            "new: share of test messages that get the right team",
            f"prior: share answered correctly of {asked}:",
            f"  {', '.join(kinds)}",
            "KL: KL(base||model) along the base's answers to general prompts, nats per token",
            "minutes: of training steps, without loading and evaluation",
            "",
            *figure,
            *_shown_replies(result["replies"]),
            "",
        ]
    )


def _shown_replies(replies: dict[str, dict[str, str]]) -> list[str]:
    lines = []
    for number, prompt in enumerate(replies["base"]):
        sort, arms = ("New", ASKED[:1]) if number < SHOWN else ("Everyday", ASKED)
        lines += ["", f"{sort}: {prompt}"]
        lines += [f"  {name + ':':16}{' '.join(replies[name][prompt].split())}" for name in ("base", *arms)]
    return lines


def _say_all(lines: Sequence[str]) -> None:
    for line in lines:
        result_console().print(line, markup=False, highlight=False, soft_wrap=True)
