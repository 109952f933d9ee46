"""The start of an addition: write its rows and settings to ``pending``, or find it there, refused or accepted.

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
from selfdistill.continual.gates import GATES
from selfdistill.continual.ledger import BEFORE, REFUSED, Ledger, Skill, replaced_by
from selfdistill.continual.lengths import check_anchor_lengths, fitting_rows
from selfdistill.continual.rehearsal import (
    MEMORY,
    as_shown,
    check_batch,
    keep_prompts,
    longer_replies,
    rehearsed,
    rehearsed_and_asked,
    run_config,
)
from selfdistill.continual.splits import rows_to_learn
from selfdistill.data import Demonstration, write_demonstrations
from selfdistill.errors import UserError, number_of
from selfdistill.runtime import say, say_note, write_atomically, write_json
from selfdistill.training import whole_folder

_TAKEN = (
    *GATES,
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


def _request(ledger: Ledger, config: LearnConfig, splits: dict[str, list[Demonstration]]) -> dict[str, Any]:
    """What is asked of an addition, by which it is known again: its rows, settings and the skill that it follows."""
    texts = json.dumps([[_text(row) for row in rows] for rows in splits.values()])
    settings = {key: value for key, value in config.model_dump().items() if key not in (*_FREE, "data")}
    asked = {"data": hashlib.sha256(texts.encode()).hexdigest(), "name": config.name, "settings": settings}
    found: dict[str, Any] = json.loads(json.dumps(asked | {"follows": ledger.last}))
    return found


def _request_in(folder: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What was asked of the addition in ``folder``, to be compared with ``here``."""
    found: dict[str, Any] = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    return found | {"settings": _with_newer_settings(found["settings"], here["settings"])}


def already_learnt(
    ledger: Ledger, config: LearnConfig, splits: dict[str, list[Demonstration]]
) -> dict[str, Any] | None:
    """The result of the skill if it was learnt as it is asked now, with any gates; None if there is none.

    Raises:
        UserError: the skill of this name was learnt otherwise.
    """
    skill = next((skill for skill in ledger.skills if skill.name == config.name), None)
    if skill is None:
        return None
    asked = _request(ledger, config, splits)
    if changed := _changes(_request_in(skill.folder, asked), asked):
        advice = f"give another name, with replaces {config.name!r} if this skill is to replace it"
        if ledger.skills[-1].name == config.name:
            advice += f", or undo it first: selfdistill learn --state {shlex.quote(config.state)} rollback"
        message = f"setting 'name': {config.state} already has a skill {config.name!r}; {advice}"
        raise UserError(f"{message}. Differences: {changed}")
    say(f"{config.name} is already skill {skill.number} of {config.state}, learnt from these rows with these settings")
    return skill.result


def check_replaced(config: LearnConfig, skills: Sequence[Skill]) -> None:
    """Check that what is replaced is one of ``skills``, and replaced by none of them.

    Raises:
        UserError: it is not.
    """
    by = replaced_by(skills)
    names = [skill.name for skill in skills if skill.name not in by]
    if config.replaces is None or config.replaces in names:
        return
    known = f"give one of {', '.join(names)}" if names else "leave it out"
    found = f"{config.state} has no skill {config.replaces!r} to replace"
    if config.replaces in by:
        found = f"{by[config.replaces]!r} has already replaced {config.replaces!r}"
    raise UserError(f"setting 'replaces': {found}; {known}")


def begin(
    ledger: Ledger, config: LearnConfig, splits: dict[str, list[Demonstration]]
) -> dict[str, Sequence[Demonstration]]:
    """Create ``pending`` with the rows and settings of the skill, or go on with it if it is there or was refused.

    It must match but for its gates. A refused one must have been trained on the current model, and be complete: its
    measurements are decided on again. A different addition that has not begun training is discarded.

    Args:
        ledger: the state.
        config: settings of the addition.
        splits: its rows.

    Returns:
        The splits, with the training rows of :func:`rows_to_learn`.

    Raises:
        UserError: another addition has begun training, the batch has no room for the anchors, rows or anchors are too
            long, or ``pending`` cannot be written.
    """
    asked = _request(ledger, config, splits)
    kept = ledger.in_force(config.replaces)
    train, note_on_rows = rows_to_learn(kept, config, splits["train"])
    used: dict[str, Sequence[Demonstration]] = {**splits, "train": train}
    if ledger.pending.is_dir():
        found = _request_in(ledger.pending, asked)
        if not (changed := _changes(found, asked)):
            began = json.loads((ledger.pending / "asked.json").read_text(encoding="utf-8"))["settings"]
            without = "" if "anchors" in began else ", which began without anchors and continues without them"
            say(f"resuming {config.name}{without}")
            _take(ledger.pending / "settings.yaml", config)
            return used
        if ledger.interrupted:
            raise UserError(
                f"{found['name']!r} is unfinished: run the same command to finish it, or discard it with selfdistill "
                f"learn --state {shlex.quote(config.state)} discard. Differences: {changed}"
            )
        if found["name"] != config.name:
            say_note(f"the addition of {found['name']!r}, which had not begun to learn, is discarded")
        ledger.discard()  # training had not begun
    if _take_up(ledger, config, asked):
        return used
    alone = run_config(config, ledger.model, config.context, ledger.pending, rehearses=False)
    taught = as_shown(config, fitting_rows(alone, config, used["train"]))  # a row that is dropped teaches nothing
    memory, again = rehearsed(kept, taught)
    run = run_config(config, ledger.model, config.context, ledger.pending, rehearses=bool(memory))
    check_batch(run)
    check_anchor_lengths(run, config, memory)
    if note_on_rows:
        say_note(note_on_rows)
    if config.replaces:
        say_note(f"{config.name} replaces {config.replaces}, which is no longer rehearsed and has no gate any more")
    if config.anchor_share and again:
        of_all = f"{again} of {number_of(again + len(memory), 'prompt')} of earlier skills"
        say_note(f"{config.name} teaches {of_all} again, so they are not rehearsed")
    if config.anchor_share and (known := rehearsed_and_asked(config, memory, splits["test"])):
        say_note(
            f"{known} of {number_of(len(memory), 'prompt')} of earlier skills are also test questions of "
            f"{config.name}; on these, rehearsal preserves the replies from before the addition"
        )
    if config.anchor_share and memory and (longer := longer_replies(config, kept)):
        say_note(
            f"rehearsed replies end after {config.max_completion_length} tokens, but {longer[0]} was learnt with up to "
            f"{longer[1]}; raise max_completion_length"
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


def _take_up(ledger: Ledger, config: LearnConfig, asked: dict[str, Any]) -> bool:
    """Whether the same addition was refused with whole measurements of a model that is still there; then it is pending
    again, with the gates of now."""
    for refused in ledger.put_aside(REFUSED):
        whole = all((refused.folder / name).exists() for name in ("model", "after.json"))
        if whole and _request_in(refused.folder, asked) == asked:
            date = refused.result["date"]
            say(f"{config.name} was refused on {date}; deciding again from its measurements, without training")
            ledger.take_up(refused)
            _take(ledger.pending / "settings.yaml", config)
            return True
    return False


def _take(file: Path, config: LearnConfig) -> None:
    """Write to the settings of the addition those that it takes from the command that resumes it."""
    there = yaml.safe_load(file.read_text(encoding="utf-8"))
    write_atomically(file, dump_yaml(there | {name: getattr(config, name) for name in _TAKEN}))


def _changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The differences between the addition ``there`` and the request; empty if there are none."""
    changed = changes(there["settings"], here["settings"])
    if there["data"] != here["data"]:
        changed.append("its rows or test rows differ")
    return "; ".join(changed)
