"""Tables and lines of ``selfdistill learn`` for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selfdistill.config import LearnConfig
from selfdistill.continual.gates import told
from selfdistill.continual.ledger import NO_IMPROVEMENT
from selfdistill.continual.rehearsal import sum_if_known
from selfdistill.errors import RERUN, number_of
from selfdistill.runtime import result_table

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


def print_status(state: str, found: dict[str, Any], console: Console) -> None:
    """Print what ``learn status`` finds."""
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
        name = f"{line['skill']}, replaced by {line['replaced_by']}" if line["replaced_by"] else line["skill"]
        table.add_row(escape(name), *cells)
    console.print(table)
    if len(columns) > 2:
        console.print("Shares are of all examples; seconds on anchors are an estimate.", highlight=False)


def print_history(state: str, lines: list[dict[str, Any]], console: Console) -> None:
    """Print the additions of a state, by date."""
    table = Table(title=escape(f"History of {state}"))
    for column in ("", "skill", "finished", "data", "SHA-256 of rows", "before", "after", "reasons"):
        table.add_column(column, overflow="fold")
    for line in sorted(lines, key=lambda line: str(line["date"])):
        after = line.get("after", {}).get("skills", {}).get(line["name"], {}).get("accuracy")
        before, reasons = line["before"]["accuracy"], line["reasons"]
        if line["accepted"] and after is not None and after <= before:
            reasons = [NO_IMPROVEMENT]
        if line.get("replaces"):  # an older release had nothing of the kind
            reasons = [f"replaces {line['replaces']}", *reasons]
        cells = [line["what"], line["place"], line["date"], Path(line["file"]).name, line["data"][:12]]
        cells += [f"{before:.3f}", "" if after is None else f"{after:.3f}", "; ".join(reasons)]
        table.add_row(*map(escape, cells))
    console.print(table)


def print_skill(state: str, result: dict[str, Any], status: dict[str, Any] | None, console: Console) -> None:
    """Print the result of an addition, and the state's status if it was accepted."""
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
        for other, retained in result.get("retained", {}).items():
            scores = f"{retained['learnt']:.3f} when learnt, {after[other]['accuracy']:.3f} now"
            least = f"must stay at or above {max(retained['least'], 0):.3f}"
            console.print(f"{other}: {scores} ({least})", highlight=False, markup=False)
        if change := result.get("prior_change"):
            console.print(f"prior abilities: {told(change)}", highlight=False, markup=False)
    if status is not None:
        print_status(state, status, console)
    else:
        console.print(f"Refused: {'; '.join(result['reasons'])}", highlight=False, markup=False)
