"""``selfdistill learn``: one model, skill after skill, with the retention of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfdistill.config import ExportConfig, LearnConfig
from selfdistill.continual.add_skill import add
from selfdistill.continual.gates import GATES, told
from selfdistill.continual.ledger import NO_IMPROVEMENT, REFUSED, UNDONE, Ledger, settings_of
from selfdistill.continual.rehearsal import remembered, sum_if_known
from selfdistill.continual.retention import transfer
from selfdistill.continual.stream import OF_CHUNKS
from selfdistill.data import Rows
from selfdistill.errors import RERUN, UserError, number_of
from selfdistill.evaluation import Evaluation
from selfdistill.runtime import Printable, folder_lock, result_table, say_note
from selfdistill.training import export, state_card

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
            _print_skill(self.state, details, self.status, console)
        elif self.action == "history":
            _print_history(self.state, details["history"], console)
        elif self.action == "status":
            _print_status(self.state, details, console)
        elif self.action == "rollback":
            line = f"Rolled back {details['skill']}; its files are in {details['folder']}"
            console.print(line, highlight=False, markup=False)
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
    learnt = []
    for skill, result in found:
        scores = [result["base"], *(after["skills"][skill.name] for after in (result["after"], now))]
        learnt.append((skill.name, settings_of(skill.folder).method, skill.file, scores))
    prior = [measured["prior_accuracy"] for measured in (ledger.base_result, now) if "prior_accuracy" in measured]
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return state_card(text, ledger.base, learnt, prior)


def retention_matrix(ledger: Ledger) -> dict[str, Any]:
    """The retention matrix of a state, with prior abilities and transfer.

    Returns:
        ``skills`` (names), ``matrix`` (first the base, then after each skill; None if not measured), ``prior`` (for the
        same models), ``items`` (of each skill's test), ``prior_items``, ``transfer``; ``intervals`` and
        ``prior_intervals`` (of ``matrix`` and ``prior``), and ``must_keep`` (the score of each skill that later
        additions must keep by default).
    """
    skills = ledger.skills
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
            result["after"]["skills"][skill.name]["accuracy_interval"][0]
            for skill, result in zip(skills, results, strict=True)
        ],
        "prior": [prior.get("prior_accuracy") for prior in priors],
        "prior_intervals": [prior.get("prior_interval") for prior in priors],
        "prior_items": sum(len(file["correct"]) for file in ledger.base_result.get("prior", {}).values()),
        "transfer": asdict(found) if found else None,
    }


def _status(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    memory = [
        {"skill": skill.name, "remembered": len(remembered(skill.folder)), "training": skill.result.get("training")}
        for skill in ledger.skills
    ]
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


_TRANSFER = (
    " Backward: change of earlier skills since they were learnt; forward: gain on a skill from earlier ones, before it "
    "was learnt; forgetting: drop of the last model below the best earlier one (negative: above it)."
)


_SKILL_WIDTH = 8
"""Least width of a skill's column: room for its score, and for its name in several lines."""


def _print_retention(state: str, found: dict[str, Any], console: Console) -> None:
    """Print the retention matrix, in several tables if it is too wide for the console."""
    rows = ["base", *found["skills"], *(["must keep"] if found["skills"] else [])]
    of_skills = zip(
        found["skills"], found["items"], zip(*found["matrix"], found["must_keep"], strict=True), strict=True
    )
    columns = [(f"{name} ({items})", list(scores)) for name, items, scores in of_skills]
    if found["prior"][0] is not None:
        columns.append((f"prior ({found['prior_items']})", [*found["prior"], None][: len(rows)]))
    at_a_time = max((console.width - 2 * _SKILL_WIDTH) // (_SKILL_WIDTH + 3), 1)  # 3: its padding and border
    for start in range(0, max(len(columns), 1), at_a_time):
        shown = columns[start : start + at_a_time]
        title = None if start else f"Retention of each skill in {state}"
        table = result_table("after", *(name for name, _ in shown), title=title)
        for column in table.columns[1:]:
            column.min_width = _SKILL_WIDTH
        for name, *scores in zip(rows, *(scores for _, scores in shown), strict=True):
            table.add_row(escape(name), *("" if score is None else f"{score:.3f}" for score in scores))
        console.print(table)


def _print_status(state: str, found: dict[str, Any], console: Console) -> None:
    _print_retention(state, found, console)
    numbers = found["transfer"]
    if numbers:
        said = [f"average {numbers['average']:.3f}"]
        said += [
            f"{name} {numbers[name]:{form}}"
            for name, form in (("backward", "+.3f"), ("forward", "+.3f"), ("forgetting", ".3f"))
            if numbers[name] is not None
        ]
        explained = _TRANSFER if len(said) > 1 else ""
        console.print(f"{', '.join(said)}.{explained}", highlight=False, markup=False)
        console.print("Later additions must keep the last line, unless they set max_skill_drop.", highlight=False)
        _print_gates(found["skills"], found["gates"], console)
        _print_memory(found["memory"], console)
    else:
        console.print("No skills yet.", highlight=False)
    if pending := found["pending"]:
        when = "" if found["has_begun"] else " before it began to learn"
        how = f"was interrupted{when}: {RERUN}, or 'discard' it"
        if found["running"]:
            how = "is in progress in another process"
        console.print(f"Adding {pending!r} {how}.", highlight=False, markup=False)
    console.print(f"Current model: {found['model']}", highlight=False, markup=False)


def _print_gates(names: list[str], gates: list[dict[str, Any]], console: Console) -> None:
    """Print the gates that skills were accepted with where they are not the defaults."""
    found = []
    for name, values in zip(names, gates, strict=True):
        other = [f"{gate} {at:g}" for gate, at in values.items() if at != LearnConfig.model_fields[gate].default]
        found += [f"{name} ({', '.join(other)})"] if other else []
    if found:
        console.print(
            f"Accepted with other gates than the defaults: {', '.join(found)}.", highlight=False, markup=False
        )


_COSTS: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "earlier prompts rehearsed": ("d", lambda cost: cost["rehearsed"]),
    "share rehearsed": (".1%", lambda cost: cost["memory"]["share"]),
    "share of general anchors": (".1%", lambda cost: cost["anchors"]["share"]),
    "seconds": (".0f", lambda cost: cost["seconds"]),
    "of which on anchors": (
        ".0f",
        lambda cost: sum_if_known([cost[what].get("estimated_seconds") for what in ("memory", "anchors")]),
    ),
}
"""Columns of the cost table: by title, the number's format and how to compute it; None: an older release learnt the
skill."""


def _print_memory(memory: list[dict[str, Any]], console: Console) -> None:
    """Print the number of prompts kept per skill and the cost of learning it; columns without a number above 0 are
    left out."""
    columns = {"prompts kept": [str(line["remembered"]) for line in memory]}
    for title, (form, number) in _COSTS.items():
        numbers = [number(line["training"]) if line["training"] else None for line in memory]
        if any(numbers):
            columns[title] = ["" if found is None else f"{found:{form}}" for found in numbers]
    title = "Prompts of each skill that later ones rehearse, and the cost of learning it"
    table = result_table("skill", *columns, title=title)
    for line, *cells in zip(memory, *columns.values(), strict=True):
        table.add_row(escape(line["skill"]), *cells)
    console.print(table)
    if len(columns) > 2:
        console.print("Shares are of all examples; seconds on anchors are an estimate.", highlight=False)


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


def _print_history(state: str, lines: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=escape(f"History of {state}"))
    for column in ("", "skill", "finished", "data", "SHA-256 of rows", "before", "after", "reasons"):
        table.add_column(column, overflow="fold")
    for line in sorted(lines, key=lambda line: str(line["date"])):
        after = line.get("after", {}).get("skills", {}).get(line["name"], {}).get("accuracy")
        before, reasons = line["before"]["accuracy"], line["reasons"]
        if line["accepted"] and after is not None and after <= before:
            reasons = [NO_IMPROVEMENT]
        cells = [line["what"], line["place"], line["date"], Path(line["file"]).name, line["data"][:12]]
        cells += [f"{before:.3f}", "" if after is None else f"{after:.3f}", "; ".join(reasons)]
        table.add_row(*map(escape, cells))
    console.print(table)


def _rollback(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    with folder_lock(Path(config.state), f"state {config.state!r}"):
        if not ledger.skills:
            raise UserError(f"state {config.state!r}: no skill to roll back; see learn status")
        if ledger.interrupted:
            raise UserError(f"state {config.state!r}: an addition was interrupted; finish or discard it first")
        if ledger.pending.is_dir():
            ledger.discard()  # it was evaluated with the model being rolled back
        skill = ledger.skills[-1]
        place = ledger.undo(skill)
    return {"skill": skill.name, "model": ledger.model, "folder": str(place)}


def _discard(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    with folder_lock(Path(config.state), f"state {config.state!r}"):
        if not ledger.pending.is_dir():
            raise UserError(f"state {config.state!r}: no interrupted addition to discard; see learn status")
        ledger.discard()
    return {"model": ledger.model}


def _print_skill(state: str, result: dict[str, Any], status: dict[str, Any] | None, console: Console) -> None:
    name = result["name"]
    if "after" in result:
        before, after = result["before"], result["after"]["skills"]
        new = after[name]
        low, high = new["accuracy_interval"]
        console.print(
            f"{name}: {before['accuracy']:.3f} before, {new['accuracy']:.3f} ({low:.2f}, {high:.2f}) after, on "
            f"{number_of(new['items'], 'test item')}",
            highlight=False,
            markup=False,
        )
        for other, retained in result["retained"].items():
            scores = f"{retained['learnt']:.3f} when learnt, {after[other]['accuracy']:.3f} now"
            least = f"must stay at or above {max(retained['least'], 0):.3f}"
            console.print(f"{other}: {scores} ({least})", highlight=False, markup=False)
        if change := result.get("prior_change"):
            console.print(f"prior abilities: {told(change)}", highlight=False, markup=False)
    if status is not None:
        _print_status(state, status, console)
    else:
        console.print(f"Refused: {'; '.join(result['reasons'])}", highlight=False, markup=False)


_ACTIONS: dict[str, Callable[[LearnConfig], dict[str, Any]]] = {
    "status": _status,
    "history": _history,
    "rollback": _rollback,
    "discard": _discard,
    "export": _export,
}
