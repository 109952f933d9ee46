"""Study files: what they hold, the runs they ask for, and the lines of their results.

A study file (YAML) has ``name``, ``settings`` (of all runs, as for ``selfdistill train``), ``arms`` (by name: the
settings in which it differs) and ``seeds``. It may have ``after`` (measurements of each final model when it is shown
the demonstration), ``nearest`` (if some arms have narrow anchors: the prior files whose questions are most like these)
and ``partway`` (shares of the way from the base to the final model: the models there are measured, too, as in WiSE-FT,
arXiv 2109.01903). A value ``bundled:NAME`` is a file or folder of the package; ``kinds:A+B`` is ``package:A+B``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from selfdistill.config import Settings, TrainConfig, load_yaml
from selfdistill.data import PACKAGE, packaged
from selfdistill.errors import UserError
from selfdistill.runtime import read_lines

BUNDLED = "bundled:"
KINDS = "kinds:"
"""In results from before the package itself took ``package:A+B``."""
FIXED: dict[str, Any] = {"save_steps": 0, "view_rows": 0}
"""Settings of every run: its folder is deleted at its end."""
OWN = ("output_dir", "seed", *FIXED)
"""Settings that a study file must not have."""
LESS_EXACT = {"mixed_precision": "no"}
"""Where the file names none. On a GPU it is always bf16, on a CPU without fast bfloat16 always float32."""


class After(Settings):
    """A measurement of the final model: its accuracy when shown each row's demonstration."""

    name: str
    data: str
    context: str
    scorer: str | None = None
    """Default: that of the run."""
    max_completion_length: int | None = Field(default=None, ge=1)
    """Default: that of the run."""


class Study(Settings):
    """A study file."""

    name: str = Field(pattern=r"^[\w-]+$")
    settings: dict[str, Any]
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    after: list[After] = Field(default_factory=list)
    nearest: list[str] = Field(default_factory=list)
    partway: list[float] = Field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """A run that a study asks for."""

    study: Study
    arm: str
    seed: int
    settings: dict[str, Any]
    """Settings other than the default, as the study file has them."""

    def config(self, output_dir: str, mixed_precision: str | None = None) -> TrainConfig:
        """Settings for ``train``. ``mixed_precision`` replaces that of the study file."""
        values = _with_paths(self.settings)
        forced = {} if mixed_precision is None else {"mixed_precision": mixed_precision}
        return TrainConfig(**values | forced | FIXED | {"output_dir": output_dir, "seed": self.seed})

    def is_of(self, line: dict[str, Any]) -> bool:
        """Whether the line is this run's."""
        return (line["arm"], line["seed"], line["settings"]) == (self.arm, self.seed, self.settings)


def resolved(value: Any) -> Any:
    """The value with paths in place of ``bundled:NAME``, and ``package:A+B`` in place of ``kinds:A+B``."""
    if isinstance(value, str) and value.startswith(BUNDLED):
        return packaged(value.removeprefix(BUNDLED))
    if isinstance(value, str) and value.startswith(KINDS):
        return f"{PACKAGE}:{value.removeprefix(KINDS)}"
    return [resolved(part) for part in value] if isinstance(value, list) else value


def _with_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with their values :func:`resolved`; environments of the package have no file."""
    return {name: value if name == "environment" else resolved(value) for name, value in settings.items()}


def read_studies(files: Sequence[Path]) -> list[Study]:
    """Read study files and check the settings of all their runs.

    Raises:
        UserError: a file is not a study, two have the same name, or an arm has a setting that cannot be used.
    """
    studies = []
    for file in files:
        values = load_yaml(file, Study)
        try:
            studies.append(Study(**values))
            runs_of(studies[-1])
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    names = [study.name for study in studies]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two study files have the name {twice[0]!r}: give each its own, as results go by it")
    return studies


def runs_of(study: Study) -> list[Asked]:
    """The runs of a study, seed by seed, so that an interrupted study has whole comparisons first.

    Raises:
        UserError: an arm has a setting that cannot be used.
    """
    return [Asked(study, arm, seed, _settings(study, arm)) for seed in study.seeds for arm in study.arms]


def _settings(study: Study, arm: str) -> dict[str, Any]:
    values = LESS_EXACT | study.settings | study.arms[arm]
    if own := [name for name in OWN if name in values]:
        raise UserError(f"arm {arm!r}: setting {own[0]!r} is not for a study file: the study sets it")
    if missing := [name for name in ("test", "prior") if not values.get(name)]:
        raise UserError(f"arm {arm!r}: setting {missing[0]!r} is required")
    if values.get("context", "auto") == "auto":
        raise UserError(f"arm {arm!r}: setting 'context': name one, for 'auto' may choose another on another machine")
    if study.partway and values.get("lora_rank"):
        raise UserError(f"arm {arm!r}: 'partway' needs full fine-tuning; setting 'lora_rank' is {values['lora_rank']}")
    if outside := [share for share in study.partway if not 0 < share < 1]:
        raise UserError(f"'partway' has {outside[0]}, expected shares between 0 and 1")
    paths = _with_paths(values)
    try:
        config = TrainConfig(**paths | FIXED | {"output_dir": "run"})
    except UserError as error:
        raise UserError(f"arm {arm!r}: {error}") from None
    given = config.model_dump(mode="json", exclude_unset=True, exclude_defaults=True, exclude=set(OWN))
    return {name: value if paths[name] == values[name] else values[name] for name, value in given.items()}


def chosen(studies: Sequence[Study], only: Sequence[str]) -> list[Asked]:
    """The runs of the studies and arms named in ``only``; a kind of which none is named is not restricted.

    Raises:
        UserError: a name is neither a study's nor an arm's.
    """
    names = {study.name for study in studies}
    arms = {arm for study in studies for arm in study.arms}
    if unknown := [name for name in only if name not in names | arms]:
        raise UserError(f"--only {unknown[0]}: no such study or arm; there are {', '.join(sorted(names | arms))}")
    of_names, of_arms = names.intersection(only) or names, arms.intersection(only) or arms
    return [run for study in studies if study.name in of_names for run in runs_of(study) if run.arm in of_arms]


def results_of(study: Study, folder: Path) -> list[dict[str, Any]]:
    """The lines in the study's results."""
    return read_lines(results_file(study, folder))


def results_file(study: Study, folder: Path) -> Path:
    return folder / f"{study.name}.jsonl"


def place(line: dict[str, Any]) -> tuple[Any, ...]:
    """On what a line was measured: all that it says about that but the date."""
    return tuple(value for name, value in line["where"].items() if name != "date")
