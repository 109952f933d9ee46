"""The runs of a comparison: their names, folders and settings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from selfdistill.config import CompareConfig, TrainConfig, TrainingSettings
from selfdistill.errors import UserError
from selfdistill.methods import stages_of, unused_settings, uses

_SAFE = ":=, "
"""Characters allowed in folder names, besides letters, digits and ``_.-~``."""
_LONGEST = 255
"""Characters of a folder name, which file systems limit. A longer one is cut, and a hash tells it from others."""


@dataclass(frozen=True)
class Kind:
    """Runs that differ only in learning rate and seed."""

    values: dict[str, Any]
    """The settings, including ``method``, in which they differ from other kinds."""
    arm: str | None = None
    """The arm's name; None: it is named after its settings."""

    def names(self, run: TrainConfig) -> tuple[str, str]:
        """Their name in tables, and the prefix of their folders' names."""
        if self.arm is not None:
            return self.arm, quote(self.arm, safe=_SAFE)
        used = {name: value for name, value in self.values.items() if name != "method" and uses(run, name)}
        label = [run.method, *(f"{name}={value}" for name, value in used.items())]
        beginning = [run.method, *(f"{name}_{value}" for name, value in used.items())]
        return " ".join(label), "-".join(quote(part, safe=_SAFE) for part in beginning)


def kinds_of(config: CompareConfig) -> list[Kind]:
    """The arms, or each method with each value of the varied setting."""
    if config.arms:
        return [Kind(values, name) for name, values in config.arms.items()]
    varied = [{name: value} for name, values in config.vary.items() for value in values] or [{}]
    return [Kind({"method": method, **values}) for method in config.methods for values in varied]


def first_run(config: CompareConfig, kind: Kind) -> TrainConfig:
    """The first run of a kind.

    Raises:
        UserError: an arm's settings cannot be used, or its method does not use one of them.
    """
    try:
        _, run = _settings(config, kind, None, config.seeds[0])
        if kind.arm is not None and (unused := [name for name in kind.values if not uses(run, name)]):
            raise UserError(f"setting {unused[0]!r}: method {run.method!r} does not use it; remove it")
        stages_of(run)
    except UserError as error:
        raise error if kind.arm is None else UserError(f"arm {kind.arm!r}: {error}") from None
    return run


def runs_of(config: CompareConfig) -> list[tuple[str, TrainConfig]]:
    """The label and settings of every run. A method that ignores the varied setting runs once per rate and seed."""
    runs: dict[str, tuple[str, TrainConfig]] = {}
    for seed in config.seeds:
        for rate in config.learning_rates or (None,):
            for kind in kinds_of(config):
                label, run = _settings(config, kind, None if "learning_rate" in kind.values else rate, seed)
                runs.setdefault(run.output_dir, (label, run))
    return list(runs.values())


def _settings(config: CompareConfig, kind: Kind, rate: float | None, seed: int) -> tuple[str, TrainConfig]:
    """The label and the settings of a run; if ``rate`` is None, its kind's own rate or that of ``train`` applies."""
    shared = {name: getattr(config, name) for name in TrainingSettings.model_fields}
    shared["eval_steps"] = config.eval_steps or 1  # 0 becomes a number once that of the steps is known
    run = TrainConfig(**shared | {"learning_rate": rate, "seed": seed, "output_dir": "run"} | kind.values)
    fields = TrainConfig.model_fields
    unused = {name: fields[name].get_default(call_default_factory=True) for name in unused_settings(run)}
    run = run.model_copy(update=unused)
    label, beginning = kind.names(run)
    ending = "-".join(["", *([] if rate is None else [f"{rate:g}"]), f"seed{seed}"])
    if len(beginning + ending) > _LONGEST:
        beginning = f"{beginning[:100]}-{hashlib.sha256(beginning.encode()).hexdigest()[:16]}"
    return label, run.model_copy(update={"output_dir": str(Path(config.output_dir) / f"{beginning}{ending}")})
