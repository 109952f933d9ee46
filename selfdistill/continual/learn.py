"""``selfdistill learn``: one model, skill after skill, with the retention of each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from selfdistill.config import ExportConfig, LearnConfig
from selfdistill.continual.add_skill import add
from selfdistill.continual.ledger import REFUSED, UNDONE, Ledger
from selfdistill.continual.retention import transfer
from selfdistill.errors import UserError
from selfdistill.runtime import folder_lock, result_console
from selfdistill.training import export

NOT_ACCEPTED = 4
"""Exit code of an addition that was refused."""


def learn(config: LearnConfig) -> tuple[dict[str, Any], int]:
    """Run ``config.action`` and print the result.

    Returns:
        The result, for JSON output, and the exit code: 0 or ``NOT_ACCEPTED``.

    Raises:
        UserError: a mistake the user can fix.
    """
    if config.data and config.action not in ("add", "stream"):
        raise UserError(f"learn {config.action}: takes no data, found {config.data!r}; leave it out")
    if config.action in ("add", "stream"):
        result = add(config)
        _print_addition(config, result)
        return result, 0 if result["accepted"] else NOT_ACCEPTED
    if config.action == "rollback":
        return _rollback(config), 0
    if config.action == "discard":
        return _discard(config), 0
    ledger = Ledger(config.state)
    if config.action == "history":
        return _history(ledger), 0
    if config.action == "export":
        if not ledger.skills:
            raise UserError(f"state {config.state!r}: no skills yet, so its model is the base; use {ledger.base}")
        target = export(ExportConfig(run=ledger.model, output_dir=config.output_dir))
        result_console().print(f"exported model: {target}", highlight=False, markup=False)
        return {"output_dir": str(target)}, 0
    return _status(ledger), 0


def retention_matrix(ledger: Ledger) -> dict[str, Any]:
    """The retention matrix of a state, with prior abilities and transfer.

    Returns:
        ``skills`` (names), ``matrix`` (first the base, then after each skill; None if not measured), ``prior`` (for the
        same models), ``items`` (of each skill's test), ``transfer``.
    """
    skills = ledger.skills
    results = [skill.result for skill in skills]
    matrix: list[list[float | None]] = [[result["base"]["accuracy"] for result in results]]
    for row, result in enumerate(results):
        if row:
            matrix[row][row] = result["before"]["accuracy"]
        after = result["after"]["skills"]
        known = [after[skill.name]["accuracy"] for skill in skills[: row + 1]]
        matrix.append([*known, *[None] * (len(skills) - row - 1)])
    found = transfer(matrix)
    return {
        "skills": [skill.name for skill in skills],
        "items": [result["after"]["skills"][result["name"]]["items"] for result in results],
        "matrix": matrix,
        "prior": [x.get("prior_accuracy") for x in (ledger.base_result, *(result["after"] for result in results))],
        "transfer": asdict(found) if found else None,
    }


def _status(ledger: Ledger) -> dict[str, Any]:
    found = retention_matrix(ledger)
    console = result_console()
    table = Table(title=escape(f"Retention of each skill in {ledger.folder}"))
    table.add_column("after")
    for name, items in zip(found["skills"], found["items"], strict=True):
        table.add_column(f"{name} ({items})", justify="right", no_wrap=True)
    if found["prior"][0] is not None:
        table.add_column("prior", justify="right")
    for name, scores, prior in zip(["base", *found["skills"]], found["matrix"], found["prior"], strict=True):
        cells = ["" if score is None else f"{score:.3f}" for score in scores]
        table.add_row(escape(name), *cells, *([f"{prior:.3f}"] if prior is not None else []))
    console.print(table)
    numbers = found["transfer"]
    if numbers:
        said = [f"average {numbers['average']:.3f}"]
        said += [
            f"{name} {numbers[name]:{form}}"
            for name, form in (("backward", "+.3f"), ("forward", "+.3f"), ("forgetting", ".3f"))
            if numbers[name] is not None
        ]
        console.print(
            f"{', '.join(said)}. Backward: change of earlier skills since they were learnt; forward: gain on a skill "
            "from earlier ones, before it was learnt; forgetting: drop of the last model below the best earlier one "
            "(negative: above it).",
            highlight=False,
            markup=False,
        )
    else:
        console.print("No skills yet.", highlight=False)
    if pending := ledger.interrupted:
        way_on = "rerun the same command to resume, or 'discard' it"
        console.print(f"Adding {pending!r} was interrupted: {way_on}.", highlight=False, markup=False)
    console.print(f"Current model: {ledger.model}", highlight=False, markup=False)
    return {**found, "model": ledger.model, "pending": pending}


def _history(ledger: Ledger) -> dict[str, Any]:
    table = Table(title=escape(f"History of {ledger.folder}"))
    for column in ("", "skill", "finished", "data", "SHA-256 of rows", "before", "after", "reasons"):
        table.add_column(column, overflow="fold")
    found = [("learnt", "", skill) for skill in ledger.skills]
    for what, place in (("refused", REFUSED), ("rolled back", UNDONE)):
        found += [(what, f"{place}/", skill) for skill in ledger.put_aside(place)]
    lines = [
        {"what": what, "place": place + skill.folder.name, "file": skill.file, **skill.result}
        for what, place, skill in found
    ]
    for line in sorted(lines, key=lambda line: str(line["date"])):
        after = line.get("after", {}).get("skills", {}).get(line["name"], {}).get("accuracy")
        cells = [line["what"], line["place"], line["date"], Path(line["file"]).name, line["data"][:12]]
        cells.append(f"{line['before']['accuracy']:.3f}")
        table.add_row(*map(escape, cells), "" if after is None else f"{after:.3f}", escape("; ".join(line["reasons"])))
    result_console().print(table)
    return {"history": lines}


def _rollback(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    with folder_lock(Path(config.state), f"state {config.state!r}"):
        if not ledger.skills:
            raise UserError(f"state {config.state!r}: no skill to roll back; see learn status")
        if ledger.interrupted:
            raise UserError(f"state {config.state!r}: an addition was interrupted; finish or discard it first")
        if ledger.pending.is_dir():
            ledger.discard()  # evaluated with the model that is rolled back
        skill = ledger.skills[-1]
        place = ledger.undo(skill)
    result_console().print(f"Rolled back {skill.name}; its files are in {place}", highlight=False, markup=False)
    return {"skill": skill.name, "model": ledger.model}


def _discard(config: LearnConfig) -> dict[str, Any]:
    ledger = Ledger(config.state)
    with folder_lock(Path(config.state), f"state {config.state!r}"):
        if not ledger.pending.is_dir():
            raise UserError(f"state {config.state!r}: no interrupted addition to discard; see learn status")
        ledger.discard()
    result_console().print("Discarded the interrupted addition.", highlight=False)
    return {"model": ledger.model}


def _print_addition(config: LearnConfig, result: dict[str, Any]) -> None:
    console = result_console()
    name = result["name"]
    if "after" in result:
        before, after = result["before"], result["after"]["skills"]
        new = after[name]
        low, high = new["accuracy_interval"]
        console.print(
            f"{name}: {before['accuracy']:.3f} before, {new['accuracy']:.3f} ({low:.2f}, {high:.2f}) after, of "
            f"{new['items']}",
            highlight=False,
            markup=False,
        )
        for other, score in after.items():
            if other != name:
                console.print(f"{other}: now {score['accuracy']:.3f}", highlight=False, markup=False)
        if "prior_accuracy" in result["after"]:
            console.print(f"prior abilities: now {result['after']['prior_accuracy']:.3f}", highlight=False)
    if result["accepted"]:
        _status(Ledger(config.state))
    else:
        console.print(f"Refused: {'; '.join(result['reasons'])}", highlight=False, markup=False)
