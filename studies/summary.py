"""A study as a table, with means over seeds, their 95% intervals and what was measured where; and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from string import ascii_uppercase
from typing import Any

from intervals import cell
from study_file import Asked, place, runs_of

from selfdistill.comparison.conclusions import mean_points
from selfdistill.comparison.plots import Curve, Point, trade_off
from selfdistill.errors import UserError
from selfdistill.evaluation import seeds_interval

Line = dict[str, Any]
COMPARED = ("new", "prior", "nearest", "far")
"""Columns whose paired differences are printed."""


def scores(line: Line, number: int, nearest: Sequence[str]) -> dict[str, float]:
    """The columns of a line at its evaluation ``number``; ``after`` is known of the base and of the final model."""
    found = line["evaluations"][number]
    kinds = {name: prior["accuracy"] for name, prior in found["prior"].items()}
    columns = {"new": found["accuracy"], "prior": mean(kinds.values())}
    if nearest:
        columns["nearest"] = mean(kinds[name] for name in nearest)
        if others := [value for name, value in kinds.items() if name not in nearest]:
            columns["far"] = mean(others)
    columns |= kinds if len(kinds) > 1 else {}
    columns["KL"] = found["kl"]
    if number == 0:
        columns |= {name: after["base"] for name, after in line["after"].items()}
    elif number == len(line["evaluations"]) - 1:
        columns |= {name: after["accuracy"] for name, after in line["after"].items()}
    return columns


def point(line: Line, number: int) -> Point:
    """The line's place in the figure at its evaluation ``number``: prior and new."""
    found = scores(line, number, ())
    return found["prior"], found["new"]


def draw(runs: Sequence[Asked], lines: Sequence[Line], file: Path) -> str:
    """Draw new against prior of each arm's final models, as means over seeds, into ``file``; and every base.

    Returns:
        The figure for a page.

    Raises:
        UserError: the runs are not measured alike, or several studies have an arm of the same name.
    """
    curves: list[Curve] = []
    bases: dict[Point, None] = {}
    for name in ("test", "prior"):
        if len(found := {run.settings[name] for run in runs}) > 1:
            values = ", ".join(map(str, found))
            raise UserError(f"the figure's runs have several values of {name!r}: {values}; draw the runs of each alone")
    for arm in dict.fromkeys(run.arm for run in runs):
        if len(names := list(dict.fromkeys(run.study.name for run in runs if run.arm == arm))) > 1:
            raise UserError(f"arm {arm!r} is in several studies, {' and '.join(names)}; draw one of them at a time")
        own = [line for run in runs if run.arm == arm for line in lines if run.is_of(line) and "failed" not in line]
        ends: dict[int, list[list[Point]]] = {}  # a seed may have been run on several machines
        for line in own:
            ends.setdefault(line["seed"], []).append([point(line, -1 % len(line["evaluations"]))])
        if ends:
            curves.append(Curve(arm, mean_points([mean_points(of_seed) for of_seed in ends.values()])))
        bases |= dict.fromkeys(point(line, 0) for line in own)
    return trade_off(curves, list(bases), None, "prior questions answered", "new task answered", file=file)


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
    nearest, made = runs[0].study.nearest, []

    def add(name: str, group: list[Line], number: int) -> None:
        found = [scores(line, number, nearest) for line in group]
        points = [line["evaluations"][number] for line in group]
        cells = {"arm": name, "steps": str(points[0]["step"]), "seeds": str(len(group)) if number else ""}
        for column in found[0]:
            if values := [columns[column] for columns in found if column in columns]:
                cells[column] = cell(values, math.inf if column == "KL" else 1.0, 3)
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


def differences(runs: Sequence[Asked], lines: Sequence[Line], nearest: Sequence[str]) -> list[str]:
    """Self-distillation minus each other method whose arm is otherwise like it (its rate aside), seed by seed.

    Two lines are a pair if they have the same seed and place. A seed with several pairs counts once, and pairs of a
    single seed are left out.
    """
    alike = {run.arm: {k: v for k, v in run.settings.items() if k not in ("method", "learning_rate")} for run in runs}
    method = {run.arm: run.settings.get("method", "sdft") for run in runs}
    pairs = [(a, b) for a in alike for b in alike if method[a] == "sdft" != method[b] and alike[a] == alike[b]]
    ends = {(line["arm"], line["seed"], place(line)): scores(line, -1, nearest) for line in lines}
    said = []
    for mine, other in pairs:
        seeds: dict[int, list[dict[str, float]]] = {}
        for (arm, seed, at), end in ends.items():
            if arm == mine and (theirs := ends.get((other, seed, at))):
                seeds.setdefault(seed, []).append({name: end[name] - theirs[name] for name in COMPARED if name in end})
        if len(seeds) < 2:
            continue
        cells = []
        for name in next(iter(seeds.values()))[0]:
            middle, low, high = seeds_interval([mean(pair[name] for pair in of_seed) for of_seed in seeds.values()])
            interval = "" if low == high else f" ({low:+.3f} to {high:+.3f})"
            cells.append(f"{name} {middle:+.3f}{interval}")
        said.append(f"- {mine} minus {other}, {len(seeds)} seeds: {', '.join(cells)}")
    return said


def table(runs: Sequence[Asked], lines: Sequence[Line]) -> list[str]:
    """The table of a study.

    Args:
        runs: the runs to show, all of one study.
        lines: its results. Lines of other settings are left out, as are repeated lines of the same place and failures
            that a later run made good.
    """
    study = runs[0].study
    first: dict[tuple[Any, ...], Line] = {}
    for line in sorted(lines, key=lambda line: "failed" in line):
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
        arms = [arm for arm, _ in {(line["arm"], line["anchor_rows"]) for line in done if "anchor_rows" in line}]
        if changed := sorted({arm for arm in arms if arms.count(arm) > 1}):
            text.append(f"- **Anchors changed between the runs of**: {', '.join(changed)}")
        text += differences(runs, done, study.nearest)
    text += [f"- failed: {line['arm']}, seed {line['seed']}: {line['failed']}" for line in own if "failed" in line]
    text += [f"- not yet run: {missing} of {len(runs)} runs"] if missing else []
    if other := sum(not any(run.is_of(line) for run in runs_of(study)) for line in lines):
        text.append(f"- left out: {other} {'line' if other == 1 else 'lines'} of other settings")
    return text
