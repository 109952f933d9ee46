"""The beginning of an addition: its rows and settings, written to ``pending`` or found there.

An addition that was interrupted goes on with the rows and settings it began with, also those of an older release.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from selfdistill.config import LearnConfig, changes, dump_yaml
from selfdistill.continual.ledger import Ledger
from selfdistill.data import Demonstration, write_demonstrations
from selfdistill.errors import UserError
from selfdistill.runtime import say, write_json
from selfdistill.training import whole_folder

_FREE = ("state", "model", "adapter_base", "output_dir", "test", "test_split", "prior", "logging_steps", "report_to")
"""Settings that may differ when an addition is resumed."""


def _text(row: Demonstration) -> str:
    """A row as the text that states of 0.1.0 hashed, which was the ``repr`` of its dataclass."""
    return f"Demonstration({', '.join(f'{name}={value!r}' for name, value in row.identity().items())})"


def _with_newer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older release, with the defaults of those that it did not have."""
    newer = LearnConfig.model_fields.keys() - {*settings, *_FREE, "data"}
    defaults = {name: LearnConfig.model_fields[name].get_default(call_default_factory=True) for name in newer}
    return {**settings, **defaults}


def begin(ledger: Ledger, config: LearnConfig, splits: dict[str, list[Demonstration]]) -> None:
    """Create ``pending`` with the rows and settings of the skill, or resume it if they match.

    Raises:
        UserError: another addition is pending, or the skill's name is taken.
    """
    texts = json.dumps([[_text(row) for row in rows] for rows in splits.values()])
    asked: dict[str, Any] = {"data": hashlib.sha256(texts.encode()).hexdigest(), "name": config.name}
    settings = config.model_dump()
    asked |= {"settings": {key: value for key, value in settings.items() if key not in (*_FREE, "data")}}
    if ledger.pending.is_dir():
        found, here = json.loads((ledger.pending / "asked.json").read_text(encoding="utf-8")), json.dumps(asked)
        found["settings"] = _with_newer_settings(found["settings"])
        if found == json.loads(here):
            say(f"resuming {config.name}")
            return
        if ledger.interrupted:
            raise UserError(
                f"state {config.state!r}: adding {found['name']!r} was interrupted, and "
                f"{_changes(found, json.loads(here))}; resume with the same command, rows and settings, or drop it "
                f"with selfdistill learn --state {config.state} discard"
            )
        ledger.discard()  # training had not begun
    if config.name in [skill.name for skill in ledger.skills]:
        raise UserError(f"setting 'name': {config.state} already has a skill {config.name!r}; give another --name")
    with whole_folder(ledger.pending, "free disk space, then add it again") as folder:
        for split, rows in splits.items():
            write_demonstrations(folder / f"{split}.jsonl", rows)
        (folder / "settings.yaml").write_text(dump_yaml(config), encoding="utf-8")
        write_json(folder / "asked.json", asked)
        places = {split: [row.row for row in rows] for split, rows in splits.items() if split != "test"}
        write_json(folder / "places.json", places)


def _changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The differences between the request and the addition in ``pending``."""
    changed = changes(there["settings"], here["settings"])
    return "; ".join(changed + ["its rows or test rows differ"] * (there["data"] != here["data"]))
