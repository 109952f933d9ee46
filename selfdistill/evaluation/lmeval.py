"""Prior abilities measured by tasks of lm-eval, EleutherAI's evaluation harness; needs the extra ``lm-eval``.

Evaluates the model in memory and restores its state and all random states, so it can run in the middle of training.
"""

from __future__ import annotations

import copy
import functools
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfdistill.errors import UserError, closest, named_error, one_line
from selfdistill.model import LoadedModel, any_length
from selfdistill.runtime import quiet_logger

METRICS = ("acc", "exact_match", "em")
"""Metrics that are 0 or 1 per item; the first one that a task has is its accuracy."""

# The seeds of lm-eval's own command line, so that tasks that draw at random give the same results here.
_SEED, _OTHER_SEED = 0, 1234


@dataclass(frozen=True)
class TaskResult:
    """One lm-eval task's result."""

    name: str
    items: int
    accuracy: float
    """Share of correct items by ``metric``."""
    accuracy_norm: float | None
    """Share by ``acc_norm``, with log-likelihoods divided by the choice's length in characters; None if the task does
    not have it."""
    correct: list[bool]
    """Whether each item is correct by ``metric``, in the order of the task's data."""
    metric: str
    """lm-eval's name of the metric, with its filter: ``acc,none``."""


def lm_eval_abilities(
    loaded: LoadedModel, tasks: Sequence[str], *, include_path: str | None, limit: int | None, batch_size: int
) -> list[TaskResult]:
    """Accuracy on lm-eval tasks, one result per task; a group or tag expands to its tasks.

    Prompts, few-shot examples and metrics are lm-eval's, without a chat template. Log-probabilities are float32. Inputs
    longer than the model's context window are left-truncated by lm-eval, with a warning. A task's data is downloaded
    unless it is a local file or cached.

    Args:
        loaded: the model.
        tasks: names; those of ``include_path`` take precedence over lm-eval's own.
        include_path: folder of additional task files (YAML).
        limit: maximum number of items per task; None: all.
        batch_size: items per batch.

    Raises:
        UserError: lm-eval is not installed, the folder or a task does not exist, or a task cannot be loaded, cannot run
            or has no metric in ``METRICS``. The last is told before the tasks run: by the names of a task's metrics,
            and where the task computes them itself, by its first item.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"lm_eval_tasks needs lm-eval, which cannot be imported ({one_line(error)}); pip install "
            "'selfdistill[lm-eval]'"
        ) from None
    kind = loaded.device.type
    with _undisturbed(loaded.model), any_length(kind):
        random.seed(_SEED)
        np.random.seed(_OTHER_SEED)
        torch.manual_seed(_OTHER_SEED)
        found = _load(tasks, include_path)
        tokenizer = copy.deepcopy(loaded.tokenizer)  # lm-eval temporarily changes its padding side
        with quiet_logger("lm_eval", logging.ERROR):  # it warns that the model is already in memory, as intended
            language_model = HFLM(
                pretrained=loaded.model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=loaded.window,
                softmax_dtype=torch.float32,
                # It would switch autocast off.
                mixed_precision_dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            )
        own = {name: task for name, task in found["tasks"].items() if callable(task.get_config("process_results"))}
        if own:
            with _undisturbed(loaded.model):
                _run(language_model, {"tasks": own, "groups": {}}, limit=1)
            for task in own.values():  # the trial has drawn few-shot examples
                task.set_fewshot_seed(_OTHER_SEED)
        return _run(language_model, found, limit)


def _load(tasks: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """Load the tasks for lm-eval's ``evaluate``, set up as in its ``simple_evaluate``."""
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"lm_eval_path {include_path!r}: no such folder")
    manager = _manager(include_path)
    found: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in tasks:
        if name not in manager.all_tasks:
            elsewhere = f" or {include_path}" if include_path else ", and lm_eval_path is not given"
            hint = closest(name, manager.all_tasks, "; see lm-eval ls tasks")
            raise UserError(f"lm_eval_tasks: no task {name!r} in lm-eval{elsewhere}{hint}")
        try:
            with _uncounted():
                loaded = manager.load([name])
        except Exception as error:  # from datasets, the hub or the task's own code
            raise UserError(f"lm_eval_tasks: task {name!r} cannot be loaded: {named_error(error)}") from error
        for part, task in loaded["tasks"].items():
            if not set(METRICS) & set(task.aggregation()):
                raise _unfit(part, task.aggregation())
        found = {kind: found[kind] | loaded[kind] for kind in found}
    for task in found["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_OTHER_SEED)
    return found


@functools.cache
def _manager(include_path: str | None) -> Any:
    """Cached, because its constructor reads about ten thousand task files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _run(language_model: Any, found: dict[str, Any], limit: int | None) -> list[TaskResult]:
    import lm_eval.evaluator

    try:
        # Not simple_evaluate: it also queries the hub about the model, and git and pip about the machine.
        results = lm_eval.evaluator.evaluate(language_model, found, limit=limit, bootstrap_iters=0)
    except Exception as error:
        if isinstance(error, RuntimeError):  # from PyTorch: out of memory, or a bug
            raise
        names = ", ".join(found["tasks"])
        raise UserError(f"lm-eval: cannot run {names}: {named_error(error)}") from error
    return [_result(name, samples) for name, samples in results["samples"].items()]


def _result(name: str, samples: Sequence[dict[str, Any]]) -> TaskResult:
    first = samples[0]["filter"]  # a task with several filters lists its items once per filter
    items = sorted((item for item in samples if item["filter"] == first), key=lambda item: item["doc_id"])
    metric = next((metric for metric in METRICS if metric in items[0]), None)
    values = [item[metric] for item in items] if metric else []
    if not metric or not all(value in (0, 1) for value in values):
        raise _unfit(name, items[0]["metrics"])
    norm = float(sum(item["acc_norm"] for item in items)) / len(items) if "acc_norm" in items[0] else None
    correct = [bool(value == 1) for value in values]
    return TaskResult(name, len(items), sum(correct) / len(items), norm, correct, f"{metric},{first}")


def _unfit(name: str, metrics: Iterable[str]) -> UserError:
    return UserError(
        f"lm_eval_tasks: task {name!r} measures {', '.join(metrics)}, expected one of {', '.join(METRICS)} that is 0 "
        "or 1 per item; leave it out"
    )


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Restore the model's train/eval modes and all random states on exit, even after an error."""
    training = [(module, module.training) for module in model.modules()]
    numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        for module, was in training:
            module.training = was
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])


@contextmanager
def _uncounted() -> Iterator[None]:
    """Disable the request with which ``datasets`` counts every load, even of a local file."""
    import datasets.config

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before
