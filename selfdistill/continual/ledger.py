"""The state of a model that learns skill after skill: a folder in which every change is one rename.

::

    start/          state.yaml (base model and evaluation settings), prior/ (copied questions about the base's prior
                    abilities) and base.json (its score on them)
    skills/0001-routing/    accepted skills, in this order; the last one's model is the current model
        settings.yaml, train.jsonl, test.jsonl, validation.jsonl (streams only), run/, model/, result.json;
        prompts.jsonl (its prompts for later additions to rehearse) and memory.jsonl (earlier prompts it rehearsed);
        pictures/ (copies of all pictures of these rows)
    pending/        an addition in progress or interrupted; same contents
    refused/, undone/       additions that were refused or rolled back; read by ``history``, by an ``add`` that asks for
                    one again, and by ``restore``

A skill is accepted by renaming ``pending``. A crash before that leaves the state unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfdistill.config import LearnConfig
from selfdistill.errors import UserError
from selfdistill.runtime import fsync, remove_folder, write_atomically

START, SKILLS, PENDING, REFUSED, UNDONE = "start", "skills", "pending", "refused", "undone"
MEASURED_WITH = ("dtype", "mixed_precision", "chat_template_kwargs")
"""Settings that must be the same for the base and all skills, so that scores are comparable."""
NEEDED = ("settings.yaml", "test.jsonl", "result.json")
"""What later additions read of a skill, whatever release learnt it."""
NO_IMPROVEMENT = "no improvement"
"""Note on an accepted skill that scores no better than before."""
BEFORE: dict[str, Any] = {"anchors": []}
"""How additions behaved before a setting existed, where that differs from its default."""


@dataclass(frozen=True)
class Skill:
    """One accepted skill."""

    folder: Path

    @property
    def number(self) -> int:
        """Position in the sequence, from 1."""
        return int(self.folder.name.partition("-")[0])

    @property
    def name(self) -> str:
        """Name of the skill, under which its scores are stored; its folder may be called otherwise."""
        return str(self.result["name"])

    @property
    def model(self) -> str:
        """Folder of the model after this skill."""
        return str(self.folder / "model")

    @property
    def file(self) -> str:
        """File that its rows came from."""
        return str(yaml.safe_load((self.folder / "settings.yaml").read_text(encoding="utf-8"))["data"])

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return sum(path.lstat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def follows(self) -> str | None:
        """What :attr:`Ledger.last` was when it was added; None if an older release added it."""
        asked = json.loads((self.folder / "asked.json").read_text(encoding="utf-8"))
        return None if "follows" not in asked else str(asked["follows"])

    @property
    def replaces(self) -> str | None:
        """Name of the earlier skill that it replaces, or None."""
        return settings_of(self.folder).replaces

    @property
    def result(self) -> dict[str, Any]:
        """What was measured when the skill was added."""
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        return found


def settings_of(folder: Path) -> LearnConfig:
    """The settings that a skill was learnt with, except those that this version does not know."""
    saved = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
    return LearnConfig(**BEFORE | {key: value for key, value in saved.items() if key in LearnConfig.model_fields})


def replaced_by(skills: Sequence[Skill]) -> dict[str, str]:
    """The name of the skill that replaces each replaced one."""
    return {skill.replaces: skill.name for skill in skills if skill.replaces}


class Ledger:
    """An existing state folder.

    Raises:
        UserError: the folder does not exist, or is not a state.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        file = self.folder / START / "state.yaml"
        try:
            state = yaml.safe_load(file.read_text(encoding="utf-8"))
            self.base = str(state["model"])
            self.weights = str(state.get("weights", ""))
            """Fingerprint of the base's weights; empty if they cannot be compared."""
            self.measured_with: dict[str, Any] = {name: state[name] for name in MEASURED_WITH}
            self.has_date = "template_date" in state
            """Whether the state's date is known; that of an older release is not."""
            self.template_date: str | None = state.get("template_date")
            """The day (YYYY-MM-DD) that the chat template sees in everything that is measured and learnt here; None if
            the template does not read the clock."""
        except FileNotFoundError:
            raise UserError(
                f"state {folder!r} does not exist; create it with a first 'add', which needs model"
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
            raise UserError(f"{file}: cannot be read as a state of selfdistill learn; give another state") from None

    @property
    def skills(self) -> list[Skill]:
        """Accepted skills in order.

        Raises:
            UserError: one is missing, or a file that later additions need of it.
        """
        found = [Skill(folder) for folder in sorted((self.folder / SKILLS).glob("[0-9]*-*"))]
        for number, skill in enumerate(found, 1):
            if skill.number != number:
                raise UserError(f"{self.folder / SKILLS}: skill {number} is missing; restore its folder")
            for name in NEEDED:
                if not (skill.folder / name).exists():
                    raise UserError(f"{skill.folder / name}: no such file, but the state needs it; restore it")
        return found

    def in_force(self, replaced: str | None = None) -> list[Skill]:
        """The accepted skills that are to be retained: all but those that a later one replaces, and ``replaced``."""
        skills = self.skills
        gone = {replaced, *replaced_by(skills)}
        return [skill for skill in skills if skill.name not in gone]

    @property
    def model(self) -> str:
        """The current model."""
        skills = self.skills
        return skills[-1].model if skills else self.base

    @property
    def last(self) -> str:
        """By what an addition knows the skill that it follows: SHA-256 of its results; empty for the base."""
        skills = self.skills
        return hashlib.sha256((skills[-1].folder / "result.json").read_bytes()).hexdigest() if skills else ""

    @property
    def prior(self) -> str | None:
        """Folder of the questions about prior abilities, or None."""
        folder = self.folder / START / "prior"
        return str(folder) if folder.is_dir() else None

    @property
    def base_result(self) -> dict[str, Any]:
        """Results of the base on the prior abilities."""
        found: dict[str, Any] = json.loads((self.folder / START / "base.json").read_text(encoding="utf-8"))
        return found

    @property
    def pending(self) -> Path:
        """Folder of the pending addition."""
        return self.folder / PENDING

    @property
    def pending_name(self) -> str | None:
        """Name of the skill whose addition is pending."""
        if not self.pending.is_dir():
            return None
        return str(json.loads((self.pending / "asked.json").read_text(encoding="utf-8"))["name"])

    @property
    def interrupted(self) -> str | None:
        """Name of the skill whose pending addition has begun training; before that, another may replace it."""
        began = any((self.pending / name).exists() for name in ("run", "chunks", "model"))
        return self.pending_name if began else None

    def refuse_other_weights(self, found: str) -> None:
        """Refuse a base of another fingerprint than the state began with, such as a link that leads elsewhere by now.

        Raises:
            UserError: it has other weights. A base without a fingerprint is not compared.
        """
        if found and self.weights and found != self.weights:
            raise UserError(
                f"state {str(self.folder)!r}: its base {self.base!r} had weights {self.weights[:12]} when the state "
                f"began and has {found[:12]} now (SHA-256); restore these weights, or give their new location as model"
            )

    def move_base(self, model: str) -> None:
        """Record the base's new location."""
        self._record({"model": model})
        self.base = model

    def set_date(self, date: str | None) -> None:
        """Record the state's date."""
        self._record({"template_date": date})
        self.has_date, self.template_date = True, date

    def _record(self, changed: dict[str, Any]) -> None:
        file = self.folder / START / "state.yaml"
        write_atomically(file, yaml.safe_dump(yaml.safe_load(file.read_text(encoding="utf-8")) | changed))

    def accept(self, name: str) -> Skill:
        """Make the pending addition the next skill."""
        number = max((skill.number for skill in self.skills), default=0) + 1
        return Skill(self._move(self.pending, SKILLS, f"{number:04d}-{name}"))

    def refuse(self, name: str) -> Skill:
        """Move the pending addition to ``refused``."""
        return Skill(self._move(self.pending, REFUSED, name))

    def take_up(self, refused: Skill) -> None:
        """Make a refused addition the pending one."""
        os.rename(refused.folder, self.pending)
        fsync(self.folder / REFUSED)
        fsync(self.folder)

    def undo(self, skill: Skill) -> Skill:
        """Roll back the last skill."""
        return Skill(self._move(skill.folder, UNDONE, skill.folder.name))

    def restore(self, undone: Skill) -> Skill:
        """Make a rolled-back skill the last one again; it must have followed the one that is the last now."""
        return Skill(self._move(undone.folder, SKILLS, f"{len(self.skills) + 1:04d}-{undone.name}"))

    def put_aside(self, place: str) -> list[Skill]:
        """Refused or rolled-back additions that have a result."""
        return [
            Skill(folder) for folder in sorted((self.folder / place).glob("*")) if (folder / "result.json").exists()
        ]

    def discard(self) -> None:
        """Delete the pending addition."""
        remove_folder(self.pending)

    def _move(self, source: Path, place: str, name: str) -> Path:
        parent = self.folder / place
        parent.mkdir(exist_ok=True)
        target, count = parent / name, 1
        while target.exists():
            count += 1
            target = parent / f"{name}-{count}"
        for path in (source, *source.rglob("*")):
            fsync(path)
        os.rename(source, target)
        fsync(parent)
        fsync(self.folder)
        return target
