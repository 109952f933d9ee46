"""A study as a table, with means over seeds, their 95% intervals and what was measured where; and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from string import ascii_uppercase
from typing import Any

from study_file import Asked, place, runs_of

from selfdistill.comparison.plots import Curve, trade_off
from selfdistill.errors import UserError
from selfdistill.evaluation import seeds_interval

Line = dict[str, Any]


def cell(values: Sequence[float], most: float = 1.0) -> str:
    """Mean over seeds and, from two seeds on, its Student's t interval, within what is possible."""
    middle, low, high = seeds_interval(values)
    return f"{middle:.3f}" + ("" if low is None or high is None else f" ({max(low, 0):.2f} to {min(high, most):.2f})")


def scores(line: Line, number: int, covered: Sequence[str]) -> dict[str, float]:
    """The columns of a line at its evaluation ``number``; ``after`` is known of the base and of the final model."""
    found = line["evaluations"][number]
    kinds = {name: prior["accuracy"] for name, prior in found["prior"].items()}
    columns = {"new": found["accuracy"], "prior": mean(kinds.values())}
    if covered:
        columns["covered"] = mean(kinds[name] for name in covered)
        if others := [value for name, value in kinds.items() if name not in covered]:
            columns["uncovered"] = mean(others)
    columns |= kinds if len(kinds) > 1 else {}
    columns["KL"] = found["kl"]
    if number == 0:
        columns |= {name: after["base"] for name, after in line["after"].items()}
    elif number == len(line["evaluations"]) - 1:
        columns |= {name: after["accuracy"] for name, after in line["after"].items()}
    return columns


def draw(runs: Sequence[Asked], lines: Sequence[Line], file: Path) -> str:
    """Draw new against prior of each arm's final models, as means over seeds, into ``file``.

    Returns:
        The figure for a page.

    Raises:
        UserError: the runs are not measured alike, or several studies have an arm of the same name.
    """
    curves, base = [], None
    for name in ("test", "prior"):
        if len(found := {run.settings[name] for run in runs}) > 1:
            values = ", ".join(map(str, found))
            raise UserError(f"the figure's runs have several values of {name!r}: {values}; draw the runs of each alone")
    for arm in dict.fromkeys(run.arm for run in runs):
        if len(names := list(dict.fromkeys(run.study.name for run in runs if run.arm == arm))) > 1:
            raise UserError(f"arm {arm!r} is in several studies, {' and '.join(names)}; draw one of them at a time")
        own = [line for run in runs if run.arm == arm for line in lines if run.is_of(line) and "failed" not in line]
        if ends := [scores(line, -1 % len(line["evaluations"]), ()) for line in own]:
            curves.append(Curve(arm, [(mean(end["prior"] for end in ends), mean(end["new"] for end in ends))]))
        base = base or next(((start["prior"], start["new"]) for line in own if (start := scores(line, 0, ()))), None)
    return trade_off(curves, base, None, "prior questions answered", "new task answered", file=file)


class Places:
    """The machines and precisions of the lines, named A, B, ..."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = lines
        self._found = list(dict.fromkeys(map(place, lines)))

    def of(self, lines: Sequence[Line]) -> str:
        return " ".join(ascii_uppercase[n] for n, found in enumerate(self._found) if found in map(place, lines))

    def split(self, lines: Sequence[Line]) -> list[list[Line]]:
        """The lines of each place."""
        return [own for found in self._found if (own := [line for line in lines if place(line) == found])]

    def describe(self) -> list[str]:
        described = []
        for own in self.split(self._lines):
            at, days = own[0]["where"], sorted({line["where"]["date"] for line in own})
            threads = "thread" if at["threads"] == 1 else "threads"
            described.append(
                f"- {self.of(own)}: {at['device']}, {at['threads']} {threads}, {at['precision']}, torch {at['torch']}, "
                f"transformers {at['transformers']}, selfdistill {at['selfdistill']}, rows {at['rows']}: "
                f"{len(own)} runs, {' to '.join(dict.fromkeys((days[0], days[-1])))}"
            )
        return described


def groups(lines: Sequence[Line], places: Places) -> list[list[Line]]:
    """The lines to average: all of an arm, or those of each place apart where a seed was run at several."""
    seeds = [line["seed"] for line in lines]
    return [list(lines)] if len(set(seeds)) == len(seeds) else places.split(lines)


def rows(runs: Sequence[Asked], lines: Sequence[Line], places: Places) -> list[tuple[dict[str, str], bool]]:
    """Cells by column of each row, and whether it is a mean over several places."""
    covered, made = runs[0].study.covered, []

    def add(name: str, group: list[Line], number: int) -> None:
        found = [scores(line, number, covered) for line in group]
        points = [line["evaluations"][number] for line in group]
        cells = {"arm": name, "steps": str(points[0]["step"]), "seeds": str(len(group)) if number else ""}
        for column in found[0]:
            if values := [columns[column] for columns in found if column in columns]:
                cells[column] = cell(values, math.inf if column == "KL" else 1.0)
        several = len(places.split(group)) > 1
        if number and not several:
            cells["minutes"] = f"{mean(point['seconds'] for point in points) / 60:.1f}"
        made.append((cells | {"where": places.of(group)}, several))

    def add_partway(arm: str, group: list[Line]) -> None:
        """The same columns for models between the base and the final one."""
        ends: dict[float, list[Line]] = {}  # a line has the shares that the study file had when it was made
        for line in group:
            for point in line.get("partway", []):
                end = line | {"evaluations": [line["evaluations"][0], point], "after": {}}
                ends.setdefault(point["share"], []).append(end)
        for share in sorted(ends, reverse=True):
            add(f"{arm}, {share:.0%} of the way", ends[share], 1)

    for own in places.split(lines):
        add("base", own[:1], 0)
    for arm in dict.fromkeys(run.arm for run in runs):
        for group in groups([line for line in lines if line["arm"] == arm], places):
            for number in range(1, len(group[0]["evaluations"])) if group else ():
                add(arm, group, number)
            if group:
                add_partway(arm, group)
    return made


def table(runs: Sequence[Asked], lines: Sequence[Line]) -> list[str]:
    """The table of a study.

    Args:
        runs: the runs to show, all of one study.
        lines: its results. Lines of other settings are left out, as are repeated lines of the same place.
    """
    study = runs[0].study
    first: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if any(run.is_of(line) for run in runs):
            first.setdefault((line["arm"], line["seed"], place(line)), line)
    own = list(first.values())
    done = [line for line in own if "failed" not in line]
    missing = sum(not any(run.is_of(line) for line in own) for run in runs)
    text = [f"## {study.name}", ""]
    if done:
        places = Places(done)
        made = rows(runs, done, places)
        columns = list(dict.fromkeys(column for cells, _ in made for column in cells))
        columns = [*(name for name in columns if name not in ("minutes", "where")), "minutes", "where"]
        text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        text += [f"| {' | '.join(cells.get(column, '') for column in columns)} |" for cells, _ in made]
        text += ["", *places.describe()]
        if mixed := list(dict.fromkeys(cells["arm"] for cells, several in made if several)):
            text.append(f"- **Means over several machines, precisions or versions**: {', '.join(mixed)}")
        elif len(places.describe()) > 1:
            text.append("- **Rows come from several machines, precisions or versions**: compare within one letter")
    text += [f"- failed: {line['arm']}, seed {line['seed']}: {line['failed']}" for line in own if "failed" in line]
    text += [f"- not yet run: {missing} of {len(runs)} runs"] if missing else []
    if other := sum(not any(run.is_of(line) for run in runs_of(study)) for line in lines):
        text.append(f"- left out: {other} {'line' if other == 1 else 'lines'} of other settings")
    return text
