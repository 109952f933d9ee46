"""A stream of rows without task boundaries: each chunk is tested before it is learnt.

The number of steps per chunk adapts to an online validation buffer, as in Drinking from a Firehose (arXiv 2007.09335).
A share of the rows is held out, and training on a chunk ends when the mean loss on the latest held-out rows stops
falling. They are not the test rows, because a stopping criterion must not also measure the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfdistill.config import LearnConfig, TrainConfig
from selfdistill.continual.lengths import chunks_of, encoded_rows, fitting_rows
from selfdistill.continual.rehearsal import cost_of
from selfdistill.data import Demonstration, Example, NothingFits, load_demonstrations, write_demonstrations
from selfdistill.errors import RunStopped, number_of
from selfdistill.evaluation import EvaluationSet, judge_of, mean_loss
from selfdistill.model import LoadedModel, load_for_training, training_precision, use_engine
from selfdistill.runtime import StepsFile, StopRequests, fsync, say
from selfdistill.training import take_whole, train

BUFFER = 64
"""Number of latest validation rows on which the loss is monitored."""
LOOK_STEPS = 2
"""Steps between measurements of the validation loss."""
PATIENCE = 2
"""Measurements without improvement after which training on a chunk ends."""
OF_CHUNKS: dict[str, Any] = {"lr_scheduler_type": "constant", "save_steps": 0, "view_rows": 0, "drift_steps": 0}
"""Settings of the training on every chunk, whatever those of the addition are."""


def learn_stream(run: TrainConfig, config: LearnConfig, folder: Path, stop: StopRequests) -> Path:
    """Learn ``train.jsonl`` in ``folder`` chunk by chunk, and return the folder of the last model.

    ``validation.jsonl`` holds the validation rows, and ``places.json`` the stream positions of both. A validation row
    is used from the first chunk whose last row follows it.

    ``stream.jsonl`` gets one line per chunk: ``step`` (its number, from 1), ``rows`` (those within the length limits),
    ``accuracy`` (before training on the chunk), ``steps``, ``training`` (its cost), and ``loss_before`` and
    ``loss_after``: the mean loss on the validation rows, in nats per token, or None if there are none yet. Chunks
    already in the file are skipped. A chunk's anchors are those of the addition; their target is the model before the
    chunk.

    Raises:
        UserError: rows are too long and ``on_long_prompt`` is ``error``, or all rows are; raised before training.
        RunStopped: a signal arrived between or within chunks.
    """
    rows = load_demonstrations(str(folder / "train.jsonl"))
    held = load_demonstrations(str(folder / "validation.jsonl"))
    place = json.loads((folder / "places.json").read_text(encoding="utf-8"))
    chunks, fitting = chunks_of(rows, config), {row.row for row in fitting_rows(run, config, rows)}
    work = folder / "chunks"
    work.mkdir(exist_ok=True)
    model = run.model
    with StepsFile(folder / "stream.jsonl", len(chunks)) as lines:
        for number, chunk in enumerate(chunks, start=1):
            own = work / f"{number:05d}"
            if number not in lines.steps:
                last = place["train"][chunk[-1].row]
                buffer = [row for row, at in zip(held, place["validation"], strict=True) if at <= last]
                learnt = [row for row in chunk if row.row in fitting]
                line = _chunk(_of_chunk(run, number), config, own, model, learnt, buffer[-BUFFER:])
                lines.write({"step": number, **line})
                fsync(folder / "stream.jsonl")
                say(f"chunk {number} of {len(chunks)}: {_said(line)}")
            if (own / "model").is_dir():
                model = str(own / "model")
                for before in (path for path in work.iterdir() if path.name < own.name):
                    shutil.rmtree(before, ignore_errors=True)
            if stop.received is not None and number < len(chunks):
                raise RunStopped("stopped", stop.received)
    assert model != run.model, "a chunk has rows that fit, and so a model"
    return Path(model)


def _of_chunk(run: TrainConfig, number: int) -> TrainConfig:
    """The run with the chunk's own seed: with a shared seed, every chunk would draw the same few anchors."""
    return run.model_copy(update={"seed": run.seed + number - 1})


def _said(line: dict[str, Any]) -> str:
    """A line of ``stream.jsonl`` as text."""
    if not line["rows"]:
        return "all its rows are too long, 0 steps"
    loss = "no validation rows yet, so it took chunk_steps"
    if line["loss_before"] is not None:
        loss = f"validation loss {line['loss_before']:.3f} before, {line['loss_after']:.3f} after"
    return f"accuracy {line['accuracy']:.2f} before training, {number_of(line['steps'], 'step')}; {loss}"


def _chunk(
    run: TrainConfig,
    config: LearnConfig,
    folder: Path,
    model: str,
    chunk: Sequence[Demonstration],
    buffer: Sequence[Demonstration],
) -> dict[str, Any]:
    """Test the model on the rows of a chunk, then train on them; the chunk may be empty."""
    if not chunk:
        return {"rows": 0, "accuracy": None, "steps": 0, "loss_before": None, "loss_after": None, "training": None}
    loaded = load_for_training(model, dtype=config.dtype, adapter_base=config.adapter_base)
    use_engine(loaded, config)
    chat = loaded.chat_for(config)
    with training_precision(loaded.model, config.mixed_precision):
        questions = EvaluationSet(loaded, chunk, {}, config)
        accuracy = questions.answers(loaded, judge_of(config), what="test of a chunk").accuracy
    try:
        watch = _Watch(encoded_rows(loaded, chat, buffer, config, "drop"), config)
    except NothingFits:
        watch = _Watch([], config)
    before = watch.loss(loaded)
    del loaded
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_demonstrations(folder / "rows.jsonl", chunk)
    own = run.model_copy(
        update={
            "model": model,
            "data": str(folder / "rows.jsonl"),
            "output_dir": str(folder / "run"),
            "max_steps": config.chunk_steps,
            **OF_CHUNKS,
        }
    )
    take_whole(train(own, on_step=watch), folder / "model", model)
    losses = {"loss_before": before, "loss_after": watch.last}
    training = cost_of(own, len(config.anchors))
    return {"rows": len(chunk), "accuracy": accuracy, "steps": watch.steps, **losses, "training": training}


class _Watch:
    """Ends training on a chunk when the validation loss stops falling; never without validation rows."""

    def __init__(self, rows: Sequence[Example], config: LearnConfig) -> None:
        self._rows = [row for row in rows if row.completion_ids]
        self._precision, self._most = config.mixed_precision, config.chunk_steps
        self._best, self._since = float("inf"), 0
        self.steps = 0
        self.last: float | None = None

    def loss(self, loaded: LoadedModel) -> float | None:
        """Mean loss on the validation rows, nats per token."""
        if not self._rows:
            return None
        with training_precision(loaded.model, self._precision):
            seen = ((row.student_ids, row.completion_ids, row.is_own) for row in self._rows)
            prompts, completions, own = zip(*seen, strict=True)
            return mean_loss(loaded, prompts, completions, own)

    def __call__(self, step: int, loaded: LoadedModel, _metrics: dict[str, Any]) -> bool:
        self.steps = step
        if step % LOOK_STEPS and step < self._most:
            return False
        self.last = found = self.loss(loaded)
        if found is None:
            return False
        self._since = 0 if found < self._best else self._since + 1
        self._best = min(self._best, found)
        return self._since >= PATIENCE
