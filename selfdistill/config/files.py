"""Files of settings: read, written, and what may change when a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml

from selfdistill.config.base import Settings, closest
from selfdistill.config.commands import CompareConfig
from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError

SettingsOfRuns = TypeVar("SettingsOfRuns", TrainConfig, CompareConfig)

MAY_CHANGE = (
    "max_steps",
    "torch_compile",
    "fsdp",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "eval_steps",
    "drift_steps",
    "save_steps",
    "max_skipped_steps",
    "stop_on_collapse",
    "save_total_limit",
    "logging_steps",
    "report_to",
)
"""Settings that may be given anew when a run is continued."""
MAY_MOVE = ("model", "teacher_model", "data", "test", "prior")
"""Places that may be given anew: what lies there is compared with what the run began with."""
COMPARE_MAY_CHANGE = ("methods", "seeds", "learning_rates", "vary", "logging_steps", "report_to")
"""The same of a comparison: it may get more runs, but all are to be alike."""


def load_yaml(path: Path, kind: type[Settings]) -> dict[str, Any]:
    """Read a settings file; the values are checked when a ``kind`` is made of them.

    Raises:
        UserError: it cannot be read, is not YAML, is not a mapping, or has a key that ``kind`` has not.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the settings: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file of settings: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path}: found {found}, expected a mapping of setting names to values")
    for key in values:
        if key not in kind.model_fields:
            raise UserError(f"{path}: unknown setting '{key}'{closest(str(key), kind.model_fields)}")
    return values


def continued(given: dict[str, Any], kind: type[SettingsOfRuns]) -> tuple[SettingsOfRuns, SettingsOfRuns | None]:
    """The settings of a run, or a comparison, that goes on, and those it was saved with (None where it never began).

    ``given`` are settings above those of ``config.yaml`` in its ``output_dir``: those of ``MAY_CHANGE``, and others as
    long as they are the same.

    Raises:
        UserError: no run there and no settings for a new one, something else there, or a setting that may not change
            would.
    """
    if "output_dir" not in given:
        raise UserError("--resume needs the run folder: give --output_dir")
    path = Path(str(given["output_dir"])) / "config.yaml"
    if not path.exists():
        if path.parent.is_dir() and any(file.name != f".{path.name}.unfinished" for file in path.parent.iterdir()):
            raise UserError(
                f"output_dir {str(given['output_dir'])!r} is not empty and has no config.yaml, so it is not a run to "
                "continue with --resume: choose another"
            )
        if "model" not in given:
            raise UserError(f"{path}: no such file, so there is no run to continue with --resume; check --output_dir")
        return kind(**given), None
    # The folder's name may have changed, too: it is where the run is.
    saved = kind(**{**load_yaml(path, kind), "output_dir": given["output_dir"]})
    # What was left to us (null, auto) was decided when the run began.
    open_ = {key for key, value in given.items() if value is None or (key, value) == ("context", "auto")}
    config = kind(**saved.model_dump() | {key: given[key] for key in given.keys() - open_})
    refuse_changes(path, saved, config)
    return config, saved


def changes(before: dict[str, Any], now: dict[str, Any], *, but: tuple[str, ...] = ()) -> list[str]:
    """What differs between two sets of settings, in words, ``but`` for some of them."""
    return [
        f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
        for key in {**now, **before}
        if before.get(key) != now.get(key) and key not in but
    ]


def refuse_changes(path: Path, saved: SettingsOfRuns, config: SettingsOfRuns) -> None:
    """Stop a run from going on with other settings than those it was saved with in ``path``.

    Raises:
        UserError: a setting outside ``MAY_CHANGE`` (``COMPARE_MAY_CHANGE``) differs; the folder's name may, for it may
            have been moved, and so may a run's ``MAY_MOVE``.
    """
    before, now = saved.model_dump(), config.model_dump()
    may_change: tuple[str, ...] = COMPARE_MAY_CHANGE
    if isinstance(config, TrainConfig):
        may_change = MAY_CHANGE + tuple(key for key in MAY_MOVE if before[key] and now[key])
    if changed := changes(before, now, but=(*may_change, "output_dir")):
        raise UserError(
            f"{path}: {'; '.join(changed)}: with --resume a run keeps its settings; leave these out, or start another "
            "run in another --output_dir"
        )


def dump_yaml(config: Settings) -> str:
    """The settings as YAML that ``--config`` reads back to the same values."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
