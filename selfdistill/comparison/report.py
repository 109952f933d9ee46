"""``selfdistill report``: from run folders to one self-contained HTML file.

The template is ``report.html`` next to this file. Text from data or model is always escaped, and the page's
Content-Security-Policy allows no scripts and no network requests.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from selfdistill import __version__
from selfdistill.comparison.conclusions import assumption
from selfdistill.comparison.curves import NUMBERS_HEAD, SCORES, figures, numbers, series
from selfdistill.comparison.plots import Curve, Point, number, over, pareto_front, trade_off
from selfdistill.comparison.replies import first_of_each, shown_replies
from selfdistill.comparison.run_folders import LACKS, Json, Part, RunFolder, curve_name, read_folders
from selfdistill.config import ReportConfig, TrainConfig
from selfdistill.errors import UserError, number_of
from selfdistill.runtime import check_writable

COLOURED_TOKENS = 600
"""Most tokens of a rollout that are coloured; each is about 600 bytes of the page, and a stop of the Tab key."""
FULL_COLOUR = 3
"""Implicit reward, positive or negative, in nats, at which a token is fully coloured."""
EPISODES = {
    "episode/reward": "mean reward",
    "episode/turns": "turns",
    "episode/invalid_calls": "invalid calls",
}
"""Means over the episodes of an evaluation, by key."""
SCALE = ("model", "test", "test_split", "prior", "scorer", "judge_model", "environment", "max_completion_length")
"""Settings on which scores depend; a figure has runs that share them."""
HEADS = {"kl_base": f"{SCORES['kl_base']}, nats per token"}
"""Heads of columns of scores that have a unit, by key."""
PROFILE = 24
"""Number of completion positions in the first-token profile."""


@dataclass(frozen=True)
class Table:
    """A table of the page; the first cell of each row is its heading."""

    caption: str
    head: list[str]
    rows: list[list[str]]


def report(config: ReportConfig) -> Json:
    """Write the report.

    Returns:
        ``output`` (path) and ``summary`` (its sentences).

    Raises:
        UserError: a folder is not a run, a file in it cannot be read, or the report cannot be written.
    """
    check_writable(config.output, config.output)
    parts = read_folders(config.runs)
    shown = [_shown(part) for part in parts]
    environment = Environment(
        loader=PackageLoader("selfdistill", "comparison"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        version=__version__,
        title=", ".join(part.title for part in parts),
        parts=shown,
        missing=_missing([run for part in parts for run in part.runs]),
        full_colour=FULL_COLOUR,
    )
    target = Path(config.output)
    try:
        target.write_text(page, encoding="utf-8", errors="replace")  # a token may end in the middle of a character
    except OSError as error:
        raise UserError(f"{config.output}: cannot be written ({error.strerror})") from None
    return {"output": str(target), "summary": [sentence for part in shown for sentence in part["summary"]]}


# --- contents of the page ---


def _missing(runs: list[RunFolder]) -> list[str]:
    """What the page lacks because of missing files."""
    without = {file: [run.name for run in runs if file in run.missing] for file in LACKS}
    return [f"{LACKS[file]}: no {file} in {', '.join(names)}" for file, names in without.items() if names]


def _shown(part: Part) -> Json:
    """A part of the page, as input for the template."""
    differing, common = _settings(part.runs)
    return {
        "title": part.title,
        "summary": _summary(part),
        "facts": _facts(part.comparison) if part.comparison else [],
        "differing": differing,
        "common": common,
        "results": _results(part),
        "trade_off": None if (reason := _no_trade_off(part)) else _trade_off(part),
        "no_trade_off": reason,
        "figures": figures(part.runs),
        "numbers": Table("The curves as numbers", NUMBERS_HEAD, numbers(part.runs)),
        "replies": [shown_replies(run) for run in first_of_each(part, [run for run in part.runs if run.replies])],
        "views": [_view(run) for run in first_of_each(part, [run for run in part.runs if run.views])],
    }


def _summary(part: Part) -> list[str]:
    """The results in words."""
    said = []
    if part.comparison:
        base, teacher = part.comparison["base"], part.comparison.get("teacher")
        said.append(part.comparison["sentence"])
        said.append(f"The base model has an accuracy of {_score(base)} on the new task.")
        if teacher:
            shown = _interval(teacher["accuracy"], teacher["interval"])
            on = "" if teacher["items"] == base["items"] else f" on {number_of(teacher['items'], 'test row')} that fit"
            said.append(f"The teacher, the base given the demonstration, has {shown}{on}.")
            if part.comparison.get("moved"):
                said.append(assumption(teacher, part.comparison["moved"]))
        return said
    for run in part.runs:
        config, losses = run.config, series(run, "loss")
        steps = run.metrics[-1]["step"] if run.metrics else 0
        text = (
            f"{run.name}: {config.model} trained on {config.data} with {config.method} for {number_of(steps, 'step')}."
        )
        if run.evaluations:
            first, now = run.evaluations[0], run.evaluations[-1]
            text += f" New task: accuracy {_score(first)} at step {first['step']}, {_score(now)} at step {now['step']}."
            if now.get("prior_accuracy") is not None and first.get("prior_accuracy") is not None:
                text += f" Prior abilities: {first['prior_accuracy']:.2f}, then {now['prior_accuracy']:.2f}."
            if now.get("kl_base") is not None:
                text += f" Distance from the base: {now['kl_base']:.3f} nats per token."
        elif losses:
            text += f" The loss went from {losses[0][1]:.3f} to {losses[-1][1]:.3f} nats per token."
        said.append(text)
    return said


def _facts(comparison: Json) -> list[tuple[str, str]]:
    return [(key, str(comparison[key])) for key in ("model", "data", "test", "prior", "budget") if comparison.get(key)]


def _settings(runs: list[RunFolder]) -> tuple[Table | None, Table | None]:
    """The settings that differ between the runs, and the common ones with their meaning; None if there are none."""
    if not runs:  # all failed
        return None, None
    configs = [run.config.model_dump(exclude={"output_dir"}) for run in runs]
    differ = [key for key in configs[0] if any(config[key] != configs[0][key] for config in configs)]
    rows = [[run.name, *(str(config[key]) for key in differ)] for run, config in zip(runs, configs, strict=True)]
    meaning = {key: (field.description or "").replace("``", "") for key, field in TrainConfig.model_fields.items()}
    common = [[key, str(value), meaning[key]] for key, value in configs[0].items() if key not in differ]
    return (
        Table("Settings in which the runs differ", ["run", *differ], rows) if differ else None,
        Table("All settings" if len(runs) == 1 else "Settings of all runs", ["setting", "value", "meaning"], common),
    )


def _results(part: Part) -> list[Table]:
    """Tables of scores with their intervals."""
    tables = []
    if part.comparison:
        rows = [
            [
                curve_name(row),
                str(row["steps"]),
                *(_triple(row.get(key), digits=3 if key == "kl_base" else 2) for key in SCORES),
                f"{row['seconds'] / 60:.1f}",
            ]
            for row in part.comparison["table"]
        ]
        head = ["method", "steps", *(HEADS.get(key, words) for key, words in SCORES.items()), "minutes"]
        tables.append(Table("Each method, mean over seeds [95% interval]", head, rows))
    evaluated = [(run.name, line) for run in part.runs for line in run.evaluations]
    if part.comparison:
        evaluated.insert(0, ("base", part.comparison["base"]))
    if evaluated:
        means = {name: key for key, name in EPISODES.items() if any(key in line for _, line in evaluated)}
        priors = list(dict.fromkeys(name for _, line in evaluated for name in line.get("prior") or {}))
        head = [
            "run",
            "step",
            "new-task score",
            "questions",
            "tokens",
            "truncated",
            *means,
            *priors,
            HEADS["kl_base"],
            "minutes",
        ]
        rows = [
            [
                name,
                str(line.get("step", 0)),
                _score(line),
                str(line["items"]),
                number(line.get("completion/length")),
                number(line.get("completion/truncated")),
                *(number(line.get(key)) for key in means.values()),
                *(_prior((line.get("prior") or {}).get(prior)) for prior in priors),
                number(line.get("kl_base")),
                number(line["seconds"] / 60 if "seconds" in line else None),
            ]
            for name, line in evaluated
        ]
        tables.append(Table("Every evaluated step [95% interval over questions]", head, rows))
    return tables


def _no_trade_off(part: Part) -> str | None:
    """Why there is no plot of new-task score against prior score; None if there is one."""
    configs = [run.config for run in part.runs]
    differ = [name for name in SCALE if any(getattr(one, name) != getattr(configs[0], name) for one in configs)]
    if part.comparison is None and differ:
        return f"runs that differ in {', '.join(differ)} have scores that cannot be compared"
    return None if any(_points(run.evaluations) for run in part.runs) else "no run here has a prior score"


def _trade_off(part: Part) -> Json:
    """The plot of new-task score against prior score, and the table of its Pareto front."""
    comparison = part.comparison or {}
    befores = [line for run in part.runs for line in run.evaluations[:1]]
    if comparison:
        befores.insert(0, comparison["base"])
    starts = [_points([line]).get(0) for line in befores]
    bases = list(dict.fromkeys(point for point in starts if point is not None))
    curves = []
    labels: dict[Point, list[str]] = {}
    for name in dict.fromkeys(run.curve for run in part.runs):
        seeds = [_points(run.evaluations) for run in part.runs if run.curve == name]
        if comparison and bases:
            seeds = [{0: bases[0]} | seed for seed in seeds]
        steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
        means = [(mean(seed[step][0] for seed in seeds), mean(seed[step][1] for seed in seeds)) for step in steps]
        single = [[seed[step] for step in sorted(seed)] for seed in seeds] if len(seeds) > 1 else []
        curves.append(Curve(name, means, single))
        for point, step in zip(means, steps, strict=True):
            here, label = labels.setdefault(point, []), f"{name}, step {step}" if step else "base"
            if label not in here:
                here.append(label)
    teacher = comparison.get("teacher")
    x_label, y_label = "prior score (accuracy)", "new-task score (accuracy)"
    figure = trade_off(curves, bases, teacher and teacher["accuracy"], x_label, y_label)
    front = pareto_front([point for curve in curves for point in curve.points])
    rows = [[", ".join(labels[point]), f"{point[0]:.2f}", f"{point[1]:.2f}"] for point in front]
    table = Table("Pareto front: no point is better in both scores", ["point", "prior score", "new-task score"], rows)
    return {"figure": Markup(figure), "table": table}


def _points(evaluations: Sequence[Json]) -> dict[int, Point]:
    """(prior score, new-task score) by step, for steps with both."""
    return {
        line.get("step", 0): (line["prior_accuracy"], line["accuracy"])
        for line in evaluations
        if line.get("prior_accuracy") is not None
    }


# --- tokens ---


def _view(run: RunFolder) -> Json:
    """A run's rollouts before and after training, example by example, and the first-token profile."""
    steps = sorted({view["step"] for view in run.views})
    steps = [steps[0], steps[-1]] if len(steps) > 1 else steps
    rows: dict[str, Json] = {}
    for step in steps:
        for view in (view for view in run.views if view["step"] == step):
            row = rows.setdefault(view["row"], {"row": view["row"], "prompt": view["prompt"], "replies": []})
            row.setdefault("demonstration", view.get("demonstration"))
            row |= {"tools": view.get("tools", []), "before": view.get("before", "")}  # earlier versions wrote neither
            reply = {"heading": _heading(view), "teacher_sees": view.get("teacher_sees"), "turns": _turns(view)}
            row["replies"].append(reply)
    shown: Json = {"run": run.name, "rows": list(rows.values()), "profile": None}
    if not all(_is_scored(view) for view in run.views):
        return shown
    curves = [Curve(f"step {step}", _profile(run.views, step)) for step in steps]
    positions = range(1, 1 + max(len(curve.points) for curve in curves))
    values = [dict(curve.points) for curve in curves]
    table = [[str(at), *(number(value.get(at)) for value in values)] for at in positions]
    label = "KL(teacher||student), nats"
    profile_table = Table(f"First-token profile of {run.name}", ["token", *(c.name for c in curves)], table)
    return shown | {"profile": Markup(over(curves, "completion token", label)), "profile_table": profile_table}


def _is_scored(view: Json) -> bool:
    """Whether a teacher scored the tokens of a rollout."""
    return all("logq" in token for token in view["tokens"])


def _heading(view: Json) -> str:
    """The step of a rollout and how it ended."""
    plain = len(view["tokens"]) - COLOURED_TOKENS
    plain_ones = f", the last {number_of(plain, 'token')} not coloured" if plain > 0 and _is_scored(view) else ""
    if "turns" not in view:
        cut = ", truncated at the length limit" if view.get("truncated") else ""
        return f"Step {view['step']}{cut}{plain_ones}"
    judged = "not judged" if view["reward"] is None else f"reward {view['reward']:.2f}"
    turns = number_of(len(view["turns"]), "turn")
    return f"Step {view['step']}, {turns}{plain_ones}, {judged}" + (f": {view['feedback']}" if view["feedback"] else "")


def _turns(view: Json) -> list[Json]:
    """The turns of an episode, each with its tokens and the observations after it; a single reply is one turn."""
    tokens = iter([_token(token, coloured=at < COLOURED_TOKENS) for at, token in enumerate(view["tokens"])])
    if "turns" not in view:
        return [{"speaker": "", "tokens": list(tokens), "observations": []}]
    return [
        {
            "speaker": _speaker(turn),
            "tokens": list(islice(tokens, turn["tokens"])),
            "observations": turn["observations"],
        }
        for turn in view["turns"]
    ]


def _speaker(turn: Json) -> str:
    """The heading of the model's turn."""
    calls = f" calls {', '.join(turn['calls'])}" if turn["calls"] else ""
    return f"assistant{calls}" + (f", invalid: {turn['invalid']}" if turn["invalid"] else "")


def _profile(views: list[Json], step: int) -> list[Point]:
    """Mean KL at each of the first positions, over the rollouts that are long enough."""
    rollouts = [view["tokens"] for view in views if view["step"] == step]
    longest = min(max(map(len, rollouts)), PROFILE)
    return [(at + 1, mean(tokens[at]["kl"] for tokens in rollouts if len(tokens) > at)) for at in range(longest)]


def _token(token: Json, *, coloured: bool) -> Json:
    """A token with its implicit reward log q - log p and the strength of its colour, if a teacher scored it."""
    coloured = coloured and "logq" in token
    shown: Json = {"text": visible(token["text"]), "lines": visible(token["text"]).replace("↵", "↵\n")}
    if not token["text"]:  # a part of the character that the next token completes
        shown["lines"] = "·" if coloured else ""
    if not coloured:
        return shown
    reward = token["logq"] - token["logp"]
    return shown | {
        "reward": f"{reward:+.2f}",
        "sign": "up" if reward >= 0 else "down",
        "strength": f"{min(abs(reward) / FULL_COLOUR, 1):.2f}",
        "student": _share(math.exp(token["logp"])),
        "teacher": _share(math.exp(token["logq"])),
        "kl": f"{token['kl']:.3f}",
        "top": [(visible(text), _share(probability)) for text, probability in token["top"]],
    }


def visible(text: str) -> str:
    """A token's text with marks for invisible characters: line ends, tabs, lone spaces, control characters."""
    if not text:
        return "(empty)"
    if text.isspace():
        text = text.replace(" ", "␣")
    marks = {"\n": "↵", "\r": "␍", "\t": "⇥"}
    hidden = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return "".join(marks.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in hidden else c) for c in text)


# --- numbers as text ---


def _share(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.01 else "<1%"


def _interval(value: float, interval: Sequence[float | None] | None, *, digits: int = 2) -> str:
    """The value with its interval, if any; a single seed, or seeds with equal values, have none."""
    if interval is None or None in interval or interval[0] == interval[1]:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _score(line: Json) -> str:
    return _interval(line["accuracy"], line.get("accuracy_interval"))


def _triple(values: Sequence[float] | None, *, digits: int) -> str:
    return "" if values is None else _interval(values[0], values[1:], digits=digits)


def _prior(scores: Json | None) -> str:
    return "" if scores is None else _interval(scores["accuracy"], scores.get("interval"))
