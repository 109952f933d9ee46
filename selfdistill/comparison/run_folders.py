"""Read run folders for a report.

Every run has ``config.yaml`` and ``metrics.jsonl``; ``evaluations.jsonl`` (scores at some steps),
``test_replies.jsonl`` (replies to some test rows) and ``token_views.jsonl`` (rollouts, token by token) are optional. A
folder with ``comparison.json`` holds several runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdistill.config import TrainConfig, load_saved
from selfdistill.errors import UserError

Json = dict[str, Any]

METRICS, EVALUATIONS, VIEWS = "metrics.jsonl", "evaluations.jsonl", "token_views.jsonl"
REPLIES = "test_replies.jsonl"
LACKS = {EVALUATIONS: "scores during training", VIEWS: "rollouts by token", REPLIES: "replies to test rows"}
"""What a page lacks without each of the optional files."""


@dataclass(frozen=True)
class RunFolder:
    """The contents of one run folder."""

    name: str
    curve: str
    """Name in the figures; shared by runs that differ only in their seed."""
    config: TrainConfig
    metrics: list[Json]
    evaluations: list[Json]
    views: list[Json]
    replies: list[Json]
    missing: list[str]
    """Names of missing files."""


@dataclass(frozen=True)
class Part:
    """A comparison with its runs, or all other runs."""

    title: str
    comparison: Json | None
    runs: list[RunFolder]


def read_folders(folders: Sequence[str]) -> list[Part]:
    """Read run folders and comparisons: one part per comparison, then one part with all other runs.

    Raises:
        UserError: a folder is not a run, or a file in it cannot be read.
    """
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())  # each once, however spelled
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give folders written by selfdistill train or compare")
        if (path / "skills").is_dir() and (path / "start").is_dir():
            raise UserError(f"{path}: a state of selfdistill learn, not a run; give its runs, {path}/skills/*/run")
        if not any((path / name).exists() for name in ("config.yaml", "comparison.json")):
            raise UserError(f"{path}: has neither config.yaml nor comparison.json; give a run folder")
    comparisons = [path for path in paths if (path / "comparison.json").exists()]
    alone = [path for path in paths if path not in comparisons]
    folder_names = [path.resolve().name for path in alone]
    names = [n if folder_names.count(n) == 1 else str(path) for n, path in zip(folder_names, alone, strict=True)]
    runs = [_read_run(path, name, name) for path, name in zip(alone, names, strict=True)]
    parts = [_read_comparison(path) for path in comparisons]
    return [*parts, Part(", ".join(names), None, runs)] if runs else parts


def curve_name(row: Json) -> str:
    """The name that a method's seeds share: method and learning rate."""
    return f"{row['method']} {row['learning_rate']:g}"


def _read_comparison(folder: Path) -> Part:
    path = folder / "comparison.json"
    try:
        comparison = json.loads(path.read_text(encoding="utf-8"))
        runs = [
            _read_run(folder / run["folder"], run["name"], curve_name(run), run["evaluations"])
            for run in comparison["runs"]
            if not run.get("failed")  # the comparison's sentence names the failed ones
        ]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a result of selfdistill compare; compare again") from None
    if lacking := {"sentence", "base", "table", "runs"} - comparison.keys():
        raise UserError(f"{path}: missing {', '.join(sorted(lacking))}; compare again")
    return Part(folder.resolve().name, comparison, runs)


def _read_run(folder: Path, name: str, curve: str, evaluations: list[Json] | None = None) -> RunFolder:
    """Read one run, with the given evaluations or its own file's."""
    config = TrainConfig(**load_saved(folder / "config.yaml", TrainConfig))
    if not (folder / METRICS).exists():
        raise UserError(f"{folder}: has no {METRICS}; give the folder of a run that has started")
    metrics = _lines(folder / METRICS, {"step"})
    wanted = [VIEWS] if any("kl/forward" in line for line in metrics) else []  # without a teacher there are no views
    if evaluations is None:
        wanted.insert(0, EVALUATIONS)
        evaluations = _lines(folder / EVALUATIONS, {"step", "accuracy", "items"})
    if evaluations:
        wanted.append(REPLIES)
    return RunFolder(
        name=name,
        curve=curve,
        config=config,
        metrics=metrics,
        evaluations=evaluations,
        views=_lines(folder / VIEWS, {"step", "row", "prompt", "tokens"}),
        replies=_lines(folder / REPLIES, {"step", "source", "prompt", "answer", "reply", "correct"}),
        missing=[file for file in wanted if not (folder / file).exists()],
    )


def _lines(path: Path, keys: set[str]) -> list[Json]:
    """The objects of a JSON Lines file, ignoring an incomplete last line; empty if there is no file."""
    found: list[Json] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not keys <= value.keys():
            raise UserError(f"{path}: line {number} is not an object with {', '.join(sorted(keys))}; remove the line")
        found.append(value)
    return found
