"""The start of an addition: write its rows and settings to ``pending``, or find them there.

An interrupted addition continues with the rows and settings it began with, even those of an older release.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from selfdistill.config import OPEN, LearnConfig, changes, dump_yaml
from selfdistill.continual.ledger import BEFORE, Ledger
from selfdistill.continual.lengths import check_anchor_lengths, fitting_rows
from selfdistill.continual.rehearsal import (
    MEMORY,
    as_shown,
    check_batch,
    keep_prompts,
    rehearsed,
    rehearsed_and_asked,
    run_config,
)
from selfdistill.data import Demonstration, write_demonstrations
from selfdistill.errors import UserError, number_of
from selfdistill.runtime import say, say_note, write_atomically, write_json
from selfdistill.training import chosen_rows, whole_folder

_TAKEN = (
    *("adapter_base", "logging_steps", "report_to", "save_total_limit", "judge_url"),
    *("engine_url", "engine_folder", "engine_memory_gib", "engine_timeout_s"),
    *OPEN,
)
"""Settings that an addition takes from the command that resumes it."""
_FREE = ("state", "model", "output_dir", "test", "test_split", "prior", "template_date", *_TAKEN)
"""Settings that may differ when an addition is resumed; the state refuses another ``template_date``."""


def _text(row: Demonstration) -> str:
    """The text of a row for its hash. States of 0.1.0 hashed the ``repr`` of its dataclass, so this is the same."""
    return f"Demonstration({', '.join(f'{name}={value!r}' for name, value in row.identity().items())})"


def _with_newer_settings(settings: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """Settings of an addition that an older release began, completed with settings added since.

    The addition continues as it began. So a new setting counts as equal if ``here`` has its default or the older
    release's behaviour; otherwise it gets that behaviour, which differs from ``here``.
    """
    found = {name: value for name, value in settings.items() if name not in _FREE}
    for name in here.keys() - settings.keys():
        default = LearnConfig.model_fields[name].get_default(call_default_factory=True)
        default = list(default) if isinstance(default, tuple) else default  # as in JSON
        old_behaviour = BEFORE.get(name, default)
        found[name] = here[name] if here[name] == default else old_behaviour
    return found


def begin(
    ledger: Ledger, config: LearnConfig, splits: dict[str, list[Demonstration]]
) -> dict[str, Sequence[Demonstration]]:
    """Create ``pending`` with the rows and settings of the skill, or resume it if they match.

    A different addition that has not begun training is discarded.

    Args:
        ledger: the state.
        config: settings of the addition.
        splits: its rows.

    Returns:
        The splits with the training rows that ``num_demonstrations`` draws.

    Raises:
        UserError: another addition has begun training, the skill's name is taken, the batch has no room for the
            anchors, rows or anchors are too long, or ``pending`` cannot be written.
    """
    texts = json.dumps([[_text(row) for row in rows] for rows in splits.values()])
    asked: dict[str, Any] = {"data": hashlib.sha256(texts.encode()).hexdigest(), "name": config.name}
    settings = config.model_dump()
    asked |= {"settings": {key: value for key, value in settings.items() if key not in (*_FREE, "data")}}
    used: dict[str, Sequence[Demonstration]] = {**splits, "train": chosen_rows(splits["train"], config)}
    if ledger.pending.is_dir():
        found = json.loads((ledger.pending / "asked.json").read_text(encoding="utf-8"))
        here = json.loads(json.dumps(asked))
        without = "" if "anchors" in found["settings"] else ", which began without anchors and continues without them"
        found["settings"] = _with_newer_settings(found["settings"], here["settings"])
        if found == here:
            say(f"resuming {config.name}{without}")
            _take(ledger.pending / "settings.yaml", config)
            return used
        if ledger.interrupted:
            raise UserError(
                f"{found['name']!r} is unfinished: run the same command to finish it, or discard it with selfdistill "
                f"learn --state {shlex.quote(config.state)} discard. Differences: {_changes(found, here)}"
            )
        if found["name"] != config.name:
            say_note(f"{found['name']!r} was pending, but had not begun to learn; {config.name!r} replaces it")
        ledger.discard()  # training had not begun
    if config.name in [skill.name for skill in ledger.skills]:
        advice = "give another name"
        if ledger.skills[-1].name == config.name:
            advice += f", or undo it first: selfdistill learn --state {shlex.quote(config.state)} rollback"
        raise UserError(f"setting 'name': {config.state} already has a skill {config.name!r}; {advice}")
    alone = run_config(config, ledger.model, config.context, ledger.pending, rehearses=False)
    taught = as_shown(config, fitting_rows(alone, config, used["train"]))  # a row that is dropped teaches nothing
    memory, again = rehearsed(ledger.skills, taught)
    run = run_config(config, ledger.model, config.context, ledger.pending, rehearses=bool(memory))
    check_batch(run)
    check_anchor_lengths(run, config, memory)
    if config.anchor_share and again:
        of_all = f"{again} of {number_of(again + len(memory), 'prompt')} of earlier skills"
        say_note(f"{config.name} teaches {of_all} again, so they are not rehearsed")
    if config.anchor_share and (known := rehearsed_and_asked(memory, as_shown(config, splits["test"]))):
        say_note(
            f"{known} of {number_of(len(memory), 'prompt')} of earlier skills are also test questions of "
            f"{config.name}; on these, rehearsal preserves the replies from before the addition"
        )
    with whole_folder(ledger.pending, "free disk space, then add it again") as folder:
        for split, rows in used.items():
            write_demonstrations(folder / f"{split}.jsonl", rows, copy_pictures=True)
        keep_prompts(folder, config, taught)
        if memory:
            write_demonstrations(folder / MEMORY, memory, copy_pictures=True)
        (folder / "settings.yaml").write_text(dump_yaml(config), encoding="utf-8")
        write_json(folder / "asked.json", asked)
        places = {split: [row.row for row in rows] for split, rows in used.items() if split != "test"}
        write_json(folder / "places.json", places)
    return used


def _take(file: Path, config: LearnConfig) -> None:
    """Write to the settings of the addition those that it takes from the command that resumes it."""
    there = yaml.safe_load(file.read_text(encoding="utf-8"))
    write_atomically(file, dump_yaml(there | {name: getattr(config, name) for name in _TAKEN}))


def _changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The differences between the request and the addition in ``pending``."""
    changed = changes(there["settings"], here["settings"])
    if there["data"] != here["data"]:
        changed.append("its rows or test rows differ")
    return "; ".join(changed)
