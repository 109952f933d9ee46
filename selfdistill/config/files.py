"""Settings files: reading, writing, and which settings may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from selfdistill.config.base import Settings, read_mapping
from selfdistill.config.commands import CompareConfig
from selfdistill.config.train import OPEN, TrainConfig
from selfdistill.config.trl_names import unknown_setting
from selfdistill.data import parse_context
from selfdistill.errors import CannotResume, UserError

SettingsOfRuns = TypeVar("SettingsOfRuns", TrainConfig, CompareConfig)

MAY_CHANGE = (
    "max_steps",
    "adapter_base",
    "deterministic",
    "torch_compile",
    "fsdp",
    *OPEN,
    "teacher_cache_mib",
    "eval_steps",
    "test_split",
    "drift_steps",
    "save_steps",
    "max_skipped_steps",
    "stop_on_collapse",
    "save_total_limit",
    "logging_steps",
    "view_rows",
    "report_to",
    "judge_url",
    "engine",
    "engine_url",
    "engine_folder",
    "engine_memory_gib",
    "engine_timeout_s",
)
"""Settings that may change when a run is resumed. With ``test_split``, the rows must stay those it began with."""
AUTO = ("context", "mixed_precision")
"""Settings whose value ``auto`` is resolved when a run begins, as null is. A resumed run keeps what it began with."""
BEGUN_WITH = ("template_date", *AUTO)
"""Settings that, left open, depend on the day, on the machine or on a measurement."""
MAY_MOVE = ("model", "teacher_model", "data", "test", "prior", "anchors", "general_prompts")
"""Paths that may change on resume: the contents are compared with those the run began with."""
COMPARE_MAY_CHANGE = (
    *("methods", "seeds", "learning_rates", "vary", "arms"),
    *("adapter_base", "logging_steps", "report_to", "judge_url", "teacher_cache_mib", *OPEN),
)
"""Settings that may change when a comparison is resumed: it may get more runs, but all must match."""
COMPARE_MAY_MOVE = ("model", "data", "test", "prior", "anchors")
"""Paths that may change when a comparison is resumed, as in ``MAY_MOVE``."""


def load_yaml(path: Path, kind: type[Settings]) -> dict[str, Any]:
    """Read a settings file; ``kind`` validates the values later.

    Raises:
        UserError: the file cannot be read, is not YAML or not a mapping, or has keys unknown to ``kind``.
    """
    values = read_mapping(path, "setting names to values")
    if unknown := [unknown_setting(str(key), kind.model_fields) for key in values if key not in kind.model_fields]:
        raise UserError(f"{path}: {'; '.join(unknown)}")
    if values.get("anchors") == []:  # written where there were none; in Python an empty list is refused
        values["anchors"] = ()
    return values


def load_saved(path: Path, kind: type[Settings]) -> dict[str, Any]:
    """Read the ``config.yaml`` of a run or comparison; as :func:`load_yaml`, with the settings that it lacks.

    Before ``test_split``, the test was read with the split of the data.
    """
    values = load_yaml(path, kind)
    if values.get("test") is not None and "test_split" not in values and "split" in values:
        values["test_split"] = values["split"]
    return values


def continued(given: dict[str, Any], kind: type[SettingsOfRuns]) -> SettingsOfRuns:
    """The settings of a resumed run or comparison: those given, over those it was saved with, if it began.

    Args:
        given: settings that override ``config.yaml`` in ``output_dir``. Those outside ``MAY_CHANGE`` must be equal to
            the saved ones.
        kind: ``TrainConfig`` or ``CompareConfig``.

    Raises:
        UserError: the folder holds no run and ``given`` is not enough to start one, the folder holds something else, or
            a setting that must not change differs.
    """
    if "output_dir" not in given:
        raise UserError("resume needs the run folder: give output_dir")
    path = Path(str(given["output_dir"])) / "config.yaml"
    if not path.exists():
        if path.parent.is_dir() and any(file.name != f".{path.name}.unfinished" for file in path.parent.iterdir()):
            raise UserError(
                f"output_dir {str(given['output_dir'])!r} is not empty and has no config.yaml, so resume finds no "
                "run there; choose another"
            )
        if "model" not in given:
            raise UserError(f"{path}: no such file, so there is no run to resume; check output_dir")
        return kind(**given)
    # The run folder may have been renamed or moved.
    saved = kind(**{**load_saved(path, kind), "output_dir": given["output_dir"]})
    open_ = {key for key, value in given.items() if value is None or (key in AUTO and value == "auto")}
    before = saved.model_dump()
    if given.get("engine") == "none":
        before["engine_url"] = None  # which is refused without an engine
    config = kind(**before | {key: given[key] for key in given.keys() - open_})
    refuse_changes(path, saved, config)
    return config


def as_begun(config: SettingsOfRuns, saved: dict[str, Any]) -> SettingsOfRuns:
    """The settings of a resumed run, where :data:`BEGUN_WITH` left open became when it began: those in ``saved``."""
    left_open = [name for name in BEGUN_WITH if getattr(config, name) in (None, "auto") and name in saved]
    return config.model_copy(update={name: saved[name] for name in left_open})


def changes(before: dict[str, Any], now: dict[str, Any], *, but: tuple[str, ...] = ()) -> list[str]:
    """The differences between two sets of settings, in words, ignoring the keys in ``but``."""
    return [
        f"{key} was {_in_words(before.get(key))} and is now {_in_words(now.get(key))}"
        for key in {**now, **before}
        if before.get(key) != now.get(key) and key not in but
    ]


def _in_words(value: Any) -> str:
    """A value of a setting; sources as the command line takes them."""
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return repr(",".join(value) or "none")
    return repr(value)


def refuse_changes(path: Path, saved: SettingsOfRuns, config: SettingsOfRuns) -> None:
    """Reject settings that differ from those the run was saved with in ``path``.

    Raises:
        CannotResume: a setting differs that is not in ``MAY_CHANGE`` or ``MAY_MOVE`` (for a comparison
            ``COMPARE_MAY_CHANGE`` or ``COMPARE_MAY_MOVE``), and not ``output_dir``.
    """
    before, now = saved.model_dump(), config.model_dump()
    if "auto" not in (saved.context, config.context) and parse_context(saved.context) == parse_context(config.context):
        now["context"] = saved.context  # the same in other words
    may_change: tuple[str, ...] = COMPARE_MAY_CHANGE
    may_move: tuple[str, ...] = COMPARE_MAY_MOVE
    if isinstance(config, TrainConfig):
        may_change, may_move = MAY_CHANGE, MAY_MOVE
    may_change += tuple(key for key in may_move if before[key] and now[key])
    if changed := changes(before, now, but=(*may_change, "output_dir")):
        raise CannotResume(f"{path}: {'; '.join(changed)}; a resumed run keeps its settings: leave these out")


def with_runs_of(saved: CompareConfig, config: CompareConfig, path: Path) -> CompareConfig:
    """The settings of a resumed comparison with all its runs: those saved in ``path``, then those that are new.

    Raises:
        CannotResume: a setting names runs that cannot be added: other learning rates than the default, another varied
            setting, or arms beside methods.
    """
    before, now = saved.model_dump(), config.model_dump()
    new = [name for name in ("learning_rates", "arms") if now[name] and not before[name]]
    if not now["vary"].keys() <= before["vary"].keys():
        new.append("vary")
    if new:
        changed = changes({name: before[name] for name in new}, {name: now[name] for name in new})
        raise CannotResume(f"{path}: {'; '.join(changed)}; a resumed comparison keeps its runs: leave these out")
    runs: dict[str, Any] = {name: _added(before[name], now[name]) for name in ("methods", "seeds", "learning_rates")}
    runs["vary"] = {name: _added(values, now["vary"].get(name, ())) for name, values in before["vary"].items()}
    runs["arms"] = before["arms"] | now["arms"]
    return CompareConfig(**now | runs)


def _added(values: Sequence[Any], more: Sequence[Any]) -> list[Any]:
    """The values and those of ``more`` that are not among them; they need not be hashable."""
    return [*values, *(value for value in more if value not in values)]


def without_defaults(config: Settings) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    fields = type(config).model_fields
    default = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    return {name: value for name, value in config.model_dump().items() if value != default[name]}


def dump_yaml(config: Settings | dict[str, Any]) -> str:
    """The settings, or some of them by name, as YAML for ``--config``."""
    values = config if isinstance(config, dict) else config.model_dump()
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
