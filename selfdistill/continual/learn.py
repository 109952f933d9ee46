"""``selfdistill learn``: one model, skill after skill, with the retention of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from selfdistill.config import ExportConfig, LearnConfig
from selfdistill.continual.add_skill import add
from selfdistill.continual.gates import GATES
from selfdistill.continual.ledger import REFUSED, START, UNDONE, Ledger, replaced_by, settings_of
from selfdistill.continual.rehearsal import remembered
from selfdistill.continual.retention import transfer
from selfdistill.continual.stream import OF_CHUNKS
from selfdistill.continual.tables import print_history, print_skill, print_status
from selfdistill.data import Rows
from selfdistill.errors import UserError
from selfdistill.evaluation import Evaluation
from selfdistill.runtime import Printable, folder_lock, say_note
from selfdistill.training import export, size_text, state_card

NOT_ACCEPTED = 4
"""Exit code of an addition that was refused."""


@dataclass(frozen=True, repr=False)
class LearnResult(Printable):
    """The result of one action on a state."""

    action: str
    state: str
    details: dict[str, Any]
    """The object that ``selfdistill learn --json`` writes."""
    status: dict[str, Any] | None = None
    """Details of ``status`` after the action; None unless a skill was accepted."""

    @property
    def accepted(self) -> bool:
        """Whether a skill was accepted; True for actions that add none."""
        return bool(self.details.get("accepted", True))

    @property
    def exit_code(self) -> int:
        """0, or ``NOT_ACCEPTED``."""
        return 0 if self.accepted else NOT_ACCEPTED

    def print(self, console: Console) -> None:
        """Print a table or a line, depending on the action."""
        details = self.details
        if self.action in ("add", "stream"):
            print_skill(self.state, details, self.status, console)
        elif self.action == "history":
            print_history(self.state, details["history"], console)
        elif self.action == "status":
            print_status(self.state, details, console)
        elif self.action == "rollback":
            files = f"its files are in {details['folder']} ({size_text(details['bytes'])})"
            console.print(f"Rolled back {details['skill']}; {files}", highlight=False, markup=False)
        elif self.action == "restore":
            console.print(f"Restored {details['skill']}", highlight=False, markup=False)
        elif self.action == "discard":
            console.print("Discarded the interrupted addition.", highlight=False)
        else:
            console.print(f"exported model: {details['output_dir']}", highlight=False, markup=False)


def learn(config: LearnConfig, in_memory: Mapping[str, Rows] | None = None) -> LearnResult:
    """Run ``config.action``.

    Args:
        config: settings.
        in_memory: rows that are in memory, by setting; see :func:`add`.

    Raises:
        UserError: a mistake the user can fix.
        RunStopped: a signal arrived while adding a skill; the same command resumes.
    """
    adds = config.action in ("add", "stream")
    if not adds and config.data:
        raise UserError(f"learn {config.action}: takes no data, found {config.data!r}; leave it out")
    if ignored := sorted(config.model_fields_set & _unused(config.action)):
        say_note(f"learn {config.action} ignores these settings: {', '.join(ignored)}")
    if not adds:
        return LearnResult(config.action, config.state, _ACTIONS[config.action](config))
    _note_on_prior(config)
    details = add(config, in_memory)
    return LearnResult(config.action, config.state, details, _status(config) if details["accepted"] else None)


def _unused(action: str) -> set[str]:
    """Settings that an action does not use."""
    if action == "add":
        return {"output_dir", "chunk_size", "chunk_steps"}
    if action == "stream":
        return {"output_dir", "max_steps", "num_train_epochs", "eval_steps", "save_total_limit", *OF_CHUNKS}
    used = {"state", "action"} | ({"output_dir"} if action == "export" else set())
    return LearnConfig.model_fields.keys() - used


def _note_on_prior(config: LearnConfig) -> None:
    """Say that prior abilities are not measured, where that is decided or their gate is set."""
    start = Path(config.state) / START
    if config.prior or (start / "prior").is_dir():
        return
    if not start.is_dir():
        say_note(
            f"{config.state} is created without prior questions, so what the model loses outside its skills is not "
            "measured; they can only be given now, with prior"
        )
    if "max_prior_drop" in config.model_fields_set:
        say_note(f"max_prior_drop has no effect: {config.state} has no prior questions")


def _export(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    if not ledger.skills:
        raise UserError(f"state {config.state!r}: no skills yet, so its model is the base; use {ledger.base}")
    target = export(ExportConfig(run=ledger.model, output_dir=config.output_dir), _card(ledger))
    return {"output_dir": str(target)}


def _card(ledger: Ledger) -> str:
    """The card of the current model. The one that its last run wrote knows neither base nor earlier skills."""
    found = [(skill, skill.result) for skill in ledger.skills]
    now, readme = found[-1][1]["after"], Path(ledger.model) / "README.md"
    learnt, by = [], replaced_by(ledger.skills)
    for skill, result in found:
        scores = [result["base"], *(after["skills"][skill.name] for after in (result["after"], now))]
        name = f"{skill.name} (replaced)" if skill.name in by else skill.name
        learnt.append((name, settings_of(skill.folder).method, skill.file, scores))
    prior = [measured["prior_accuracy"] for measured in (ledger.base_result, now) if "prior_accuracy" in measured]
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return state_card(text, ledger.base, learnt, prior)


def retention_matrix(ledger: Ledger) -> dict[str, Any]:
    """The retention matrix of a state, with prior abilities and transfer.

    Returns:
        ``skills`` (names), ``matrix`` (first the base, then after each skill; None if not measured), ``prior`` (for the
        same models), ``items`` (of each skill's test), ``prior_items``, ``transfer``; ``intervals`` and
        ``prior_intervals`` (of ``matrix`` and ``prior``), and ``must_keep`` (the score of each skill that later
        additions must keep by default; None if it is replaced).
    """
    skills, in_force = ledger.skills, ledger.in_force()
    results = [skill.result for skill in skills]
    measured: list[list[Evaluation | None]] = [[result["base"] for result in results]]
    for row, result in enumerate(results):
        if row:
            measured[row][row] = result["before"]
        after = result["after"]["skills"]
        known = [after[skill.name] for skill in skills[: row + 1]]
        measured.append([*known, *[None] * (len(skills) - row - 1)])
    matrix, intervals = (
        [[None if score is None else score[key] for score in scores] for scores in measured]
        for key in ("accuracy", "accuracy_interval")
    )
    found, priors = transfer(matrix), [ledger.base_result, *(result["after"] for result in results)]
    return {
        "skills": [skill.name for skill in skills],
        "items": [result["after"]["skills"][result["name"]]["items"] for result in results],
        "matrix": matrix,
        "intervals": intervals,
        "must_keep": [
            result["after"]["skills"][skill.name]["accuracy_interval"][0] if skill in in_force else None
            for skill, result in zip(skills, results, strict=True)
        ],
        "prior": [prior.get("prior_accuracy") for prior in priors],
        "prior_intervals": [prior.get("prior_interval") for prior in priors],
        "prior_items": sum(len(file["correct"]) for file in ledger.base_result.get("prior", {}).values()),
        "transfer": asdict(found) if found else None,
    }


def _status(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    by, memory = replaced_by(ledger.skills), []
    for skill in ledger.skills:
        count = 0 if skill.name in by else len(remembered(skill.folder))
        line = {"skill": skill.name, "replaced_by": by.get(skill.name), "remembered": count}
        memory.append(line | {"training": skill.result.get("training")})
    pending = ledger.pending_name
    found = {
        "memory": memory,
        "gates": [settings_of(skill.folder).model_dump(include=set(GATES)) for skill in ledger.skills],
        "model": ledger.model,
        "pending": pending,
        "has_begun": ledger.interrupted is not None,
        "running": pending is not None and _is_locked(config.state),
    }
    return retention_matrix(ledger) | found


def _is_locked(state: str) -> bool:
    """Whether another process changes the state."""
    try:
        with folder_lock(Path(state), ""):
            return False
    except UserError:
        return True


def _history(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    found = [("learnt", "", skill) for skill in ledger.skills]
    for what, place in (("refused", REFUSED), ("rolled back", UNDONE)):
        found += [(what, f"{place}/", skill) for skill in ledger.put_aside(place)]
    lines = [
        {"what": what, "place": place + skill.folder.name, "file": skill.file, **skill.result}
        for what, place, skill in found
    ]
    return {"history": lines}


def _rollback(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    with folder_lock(Path(config.state), f"state {config.state!r}"):
        if not ledger.skills:
            raise UserError(f"state {config.state!r}: no skill to roll back; see learn status")
        _drop_pending(ledger)
        undone = ledger.undo(ledger.skills[-1])
    size = undone.bytes
    return {"skill": undone.name, "model": ledger.model, "folder": str(undone.folder), "bytes": size}


def _drop_pending(ledger: Ledger) -> None:
    """Discard what was evaluated with a model that will not be the current one, unless it has begun training."""
    if ledger.interrupted:
        raise UserError(f"state {str(ledger.folder)!r}: an addition was interrupted; finish or discard it first")
    if ledger.pending.is_dir():
        ledger.discard()


def _restore(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    with folder_lock(Path(config.state), f"state {config.state!r}"):
        undone = [skill for skill in ledger.put_aside(UNDONE) if skill.follows == ledger.last]
        found = [skill for skill in undone if Path(skill.model).exists()]
        if not found:
            after = ledger.skills[-1].name if ledger.skills else "the base"
            what = "still has its model" if undone else "was rolled back"
            raise UserError(f"state {config.state!r}: no skill that followed {after} {what}; see learn history")
        _drop_pending(ledger)
        skill = ledger.restore(max(found, key=lambda skill: str(skill.result["date"])))
    return {"skill": skill.name, "model": ledger.model}


def _discard(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    with folder_lock(Path(config.state), f"state {config.state!r}"):
        if not ledger.pending.is_dir():
            raise UserError(f"state {config.state!r}: no interrupted addition to discard; see learn status")
        ledger.discard()
    return {"model": ledger.model}


_ACTIONS: dict[str, Callable[[LearnConfig], dict[str, Any]]] = {
    "status": _status,
    "history": _history,
    "rollback": _rollback,
    "restore": _restore,
    "discard": _discard,
    "export": _export,
}
