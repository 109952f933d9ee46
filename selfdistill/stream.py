"""A stream of rows without task boundaries: every chunk is tested before it is learnt.

The number of steps on a chunk adapts to an online validation buffer, as in Drinking from a Firehose (arXiv 2007.09335):
a share of the rows is never learnt; of those that came last, the mean loss is watched while a chunk is learnt, and when
it stops falling the next chunk comes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from selfdistill.command_config import LearnConfig
from selfdistill.config import TrainConfig
from selfdistill.contexts import ChatFormat
from selfdistill.demonstrations import Demonstration, load_demonstrations, write_demonstrations
from selfdistill.distances import mean_loss
from selfdistill.evaluate import Questions
from selfdistill.export import take_whole
from selfdistill.judge import judge_of
from selfdistill.models import LoadedModel, load_model, to_best_device, training_arithmetic
from selfdistill.tracking import StepsFile, say
from selfdistill.train import train

BUFFER = 64
"""Validation rows whose loss is watched: those that came last."""
LOOK_STEPS = 2
"""Steps between looks at their loss."""
PATIENCE = 2
"""Looks without a fall after which a chunk is left."""


def learn_stream(run: TrainConfig, config: LearnConfig, folder: Path) -> Path:
    """Learn ``train.jsonl`` of ``folder`` chunk by chunk, and return the folder of the last model.

    ``stream.jsonl`` there gets a line a chunk: ``step`` (its number, from 1), ``rows``, ``accuracy`` (of the model
    before it learnt the chunk), ``steps`` it took, and ``loss_before`` and ``loss_after``, the mean loss on the
    validation rows, nats per token. Chunks that are there already are not learnt again.
    """
    rows = load_demonstrations(str(folder / "train.jsonl"))
    held = load_demonstrations(str(folder / "test.jsonl"))
    place = json.loads((folder / "places.json").read_text(encoding="utf-8"))
    chunks = [rows[start : start + config.chunk_size] for start in range(0, len(rows), config.chunk_size)]
    work = folder / "chunks"
    work.mkdir(exist_ok=True)
    lines = StepsFile(folder / "stream.jsonl", len(chunks))
    model = run.model
    with lines:
        for number, chunk in enumerate(chunks, start=1):
            own = work / f"{number:05d}"
            if number not in lines.steps:
                last = place["train"][chunk[-1].row]
                buffer = [row for row, at in zip(held, place["test"], strict=True) if at <= last][-BUFFER:]
                line = _chunk(run, config, own, model, chunk, buffer)
                lines.write({"step": number, "rows": len(chunk), **line})
                say(
                    f"chunk {number} of {len(chunks)}: {line['accuracy']:.2f} right before it was learnt, "
                    f"{line['steps']} steps"
                )
            before, model = model, str(own / "model")
            if before != run.model:
                shutil.rmtree(Path(before).parent, ignore_errors=True)
    return Path(model)


def _chunk(
    run: TrainConfig,
    config: LearnConfig,
    folder: Path,
    model: str,
    chunk: Sequence[Demonstration],
    buffer: Sequence[Demonstration],
) -> dict[str, float]:
    """Test the model on a chunk, then teach it."""
    loaded = load_model(model, dtype=config.dtype, merge_adapter=True)
    to_best_device(loaded)
    with training_arithmetic(loaded.model, config.mixed_precision):
        asked = Questions(loaded, chunk, {}, config)
        accuracy = asked.answers(loaded, judge_of(config), what="chunk").accuracy
    watch = _Watch(asked.chat, buffer, config)
    before = watch.loss(loaded) if buffer else 0.0
    del loaded
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_demonstrations(folder / "rows.jsonl", chunk)
    final = train(
        run.model_copy(
            update={
                "model": model,
                "data": str(folder / "rows.jsonl"),
                "output_dir": str(folder / "run"),
                "max_steps": config.chunk_steps,
                "lr_scheduler_type": "constant",
                **{"save_steps": 0, "view_rows": 0, "drift_steps": 0},
            }
        ),
        on_step=watch,
    )
    take_whole(final, folder / "model")
    return {"accuracy": accuracy, "steps": watch.steps, "loss_before": before, "loss_after": watch.last}


class _Watch:
    """Ends the learning of a chunk when the loss on the validation rows stops falling; without rows, never."""

    def __init__(self, chat: ChatFormat, buffer: Sequence[Demonstration], config: LearnConfig) -> None:
        self._prompts = [chat.encode_prompt(row.prompt) for row in buffer]
        self._completions = [chat.encode_completion(row.completion) for row in buffer]
        self._precision = config.mixed_precision
        self._best, self._since = float("inf"), 0
        self.steps, self.last = 0, 0.0

    def loss(self, loaded: LoadedModel) -> float:
        """Mean loss on the validation rows, nats per token."""
        with training_arithmetic(loaded.model, self._precision):
            return mean_loss(loaded, self._prompts, self._completions)

    def __call__(self, step: int, loaded: LoadedModel) -> bool:
        self.steps = step
        if not self._prompts or step % LOOK_STEPS:
            return False
        self.last = self.loss(loaded)
        self._since = 0 if self.last < self._best else self._since + 1
        self._best = min(self._best, self.last)
        return self._since >= PATIENCE
