"""The parser of the command line: a command's options are the fields of its settings, grouped by topic.

jsonargparse parses values by type; the settings validate ranges and combinations. Errors are one line.
"""

from __future__ import annotations

import itertools
import json
import re
from argparse import Action, ArgumentError
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from pydantic.fields import FieldInfo

from selfdistill import __version__
from selfdistill.config import (
    AskConfig,
    CheckConfig,
    CompareConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    LearnConfig,
    MergeConfig,
    QuestionsConfig,
    ReportConfig,
    Settings,
    TrainConfig,
    load_yaml,
    name_here,
)
from selfdistill.errors import UserError, closest
from selfdistill.runtime import GPUS, THIS

COMMANDS: dict[str, tuple[type[Settings], str]] = {
    "demo": (DemoConfig, "Teach the starter model a skill with SFT and SDFT, with and without anchors, and compare."),
    "check": (CheckConfig, "Before training, check whether self-distillation will help and which context is best."),
    "train": (TrainConfig, "Train a model on demonstrations."),
    "ask": (AskConfig, "Ask a model one question, and optionally its base."),
    "eval": (EvalConfig, "Evaluate the new task, prior abilities and the distance from the base."),
    "compare": (CompareConfig, "Train with several methods on equal terms, and compare what each gained and forgot."),
    "learn": (LearnConfig, "Teach one model skill after skill, each accepted only if earlier ones are retained."),
    "questions": (QuestionsConfig, "Write questions about documents, as training data that teaches their content."),
    "report": (ReportConfig, "Write a report of runs as one HTML file: scores, curves, settings and tokens."),
    "export": (ExportConfig, "Copy the final model of a run to a folder, unchanged or with its adapter merged."),
    "merge": (
        MergeConfig,
        "Transfer what another model has learnt, without training (PaST): model + scale * (add - subtract).",
    ),
}
"""Settings and description of each command."""

MAIN = {
    "check": ("model", "data", "contexts", "max_completion_length", "sample", "batch_size"),
    "train": (
        *("model", "data", "output_dir", "context", "anchors", "lora_rank", "max_steps", "learning_rate"),
        *("max_completion_length", "test", "prior", "method"),
    ),
    "ask": ("run", "question", "base", "system", "image", "max_completion_length", "temperature", "seed"),
    "eval": ("model", "data", "base", "prior", "max_completion_length", "replies"),
    "compare": ("model", "data", "test", "output_dir", "methods", "seeds", "max_steps", "prior"),
    "learn": ("action", "data", "state", "model", "name", "test", "prior", "max_steps"),
    "questions": ("documents", "output_dir", "model"),
}
"""Settings that everybody needs, shown first; a command that is not listed shows all of its settings."""

TOPICS: dict[str, str] = {
    "model and data": (
        "model adapter_base data documents split turns dtype chat_template_kwargs template_date max_prompt_length "
        "max_completion_length on_long_prompt num_demonstrations general_prompts"
    ),
    "episodes": "environment max_turns max_episode_length",
    "method": "method methods seed seeds vary arms cold_start_steps method_settings",
    "anchors": "anchors anchor_share anchor_divergence",
    "teacher and context": (
        "context contexts hint teacher ema_rate snapshot_steps teacher_model teacher_cache_mib fine_tuned"
    ),
    "sampling": "temperature top_p top_k num_generations num_samples",
    "loss": (
        "divergence jsd_weight support support_top_k support_tail entry_clip sampled_baseline target_teacher "
        "target_student target_base skip_first_tokens loss_normalisation importance_cap "
        "success_reward"
    ),
    "optimisation": (
        "max_steps num_train_epochs batch_size learning_rate learning_rates lr_scheduler_type warmup_steps optim "
        "weight_decay max_grad_norm max_skipped_steps stop_on_collapse lora_rank lora_alpha train_vision_tower "
        "load_in_4bit"
    ),
    "evaluation": (
        "test test_split prior base sample eval_steps drift_steps hints spill scorer judge_url judge_model "
        "lm_eval_tasks lm_eval_path lm_eval_limit replies"
    ),
    "skills and gates": (
        "action state name replaces test_share min_teacher max_prior_drop max_skill_drop chunk_size chunk_steps "
        "remember"
    ),
    "questions about documents": "writer_url writer_model passage_words tries phrasings",
    "engine": "engine engine_url engine_folder engine_memory_gib engine_timeout_s",
    "devices and memory": (
        "mixed_precision gradient_accumulation_steps gradient_checkpointing torch_compile fsdp deterministic"
    ),
    "output": "output_dir save_steps save_total_limit logging_steps view_rows report_to",
}
"""All other settings, by topic."""

SWITCHES = {
    "resume": ("train", "compare"),
    "dry_run": ("train",),
    "memory": ("train", "check"),
    "device": ("train", "check"),
}
"""Options that are not settings, and their commands."""
_SWITCH_HELP = {
    "resume": "Resume the run in --output_dir.",
    "dry_run": "Print settings, one example as student and teacher see it, time and memory; do not train.",
    "memory": "Plan training on a GPU with SIZE of memory, such as 80GiB, or on several, 8x80GiB, without loading "
    "weights. With train, it needs --dry_run.",
    "device": f"Plan for a named device, with a rough time: {', '.join(GPUS)}, several such as 8xh100, or {THIS} (the "
    "current device).",
}
_VALUES = {"memory": "SIZE", "device": "NAME"}
"""Metavars of the options that take a value."""
_FLAGS = {"output": ("-o", "--output")}
"""Option names of settings that also have a short form."""
_POSITIONAL = {"export": ("run",), "report": ("runs",), "learn": ("action", "data"), "ask": ("run", "question")}
"""Positional settings, in this order; those not required may be omitted."""
_LACKING = {
    "run": "give a run folder",
    "runs": "give at least one run folder",
    "question": "give it in quotes after the run",
    "action": f"give one of {', '.join(get_args(LearnConfig.model_fields['action'].annotation))} after learn, even "
    "with --config",
}
"""What to do if a required positional setting is missing."""


class _Formatter(DefaultHelpFormatter):
    """Formats help without types, which the metavars show, and with short defaults."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=32, **options)

    def _get_help_string(self, action: Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, "", "==SUPPRESS==") or isinstance(default, dict | list) or not action.option_strings:
            return text
        value = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = value.lower() if isinstance(default, bool) else value
        return f"{text} [{shown}]" if shown else text


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Parse the command line.

    Returns:
        The command, and the given settings without defaults. Options override the values of ``--config``.

    Raises:
        UserError: an unknown command or option, a value of the wrong type, or a missing positional setting.
    """
    try:
        found = parser(_command(arguments)).parse_args(arguments, defaults=False).as_dict()
    except ArgumentError as error:
        raise UserError(_explained(str(error), arguments)) from None
    given = found[command := found["command"]]
    for key in _POSITIONAL.get(command, ()):
        if given.get(key) == "":  # jsonargparse's default for an omitted one
            del given[key]
    file = given.pop("config", None)
    return command, given if file is None else load_yaml(Path(file), COMMANDS[command][0]) | given


def _command(arguments: list[str]) -> str:
    """The first word that is no option; empty if there is none."""
    return next((word for word in arguments if not word.startswith("-")), "")


def parser(chosen: str | None = None) -> ArgumentParser:
    """The parser of all commands; where one is ``chosen``, only it has options, which take time to make."""
    common: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": _Formatter}
    description = "Teach a language model by self-distillation. Each command has its own --help."
    root = ArgumentParser(prog="selfdistill", version=__version__, description=description, **common)
    commands = root.add_subcommands(dest="command", title="commands", description=None, metavar="command")
    for name, (kind, help_text) in COMMANDS.items():
        command = ArgumentParser(description=help_text, usage=_usage(name, kind), **common)
        commands.add_subcommand(name, command, help=help_text)
        if chosen not in (None, name):
            continue
        for title, keys in _groups(name, kind):
            group = command.add_argument_group(title)
            for key in keys:
                _add_setting(group, name, kind, key)
        group = command.add_argument_group("files and switches")
        group.add_argument("--config", type=str, metavar="FILE", help="YAML file of settings; options override it.")
        for switch, wanted in SWITCHES.items():
            if name in wanted:
                options: dict[str, Any] = {"type": bool, "nargs": "?", "const": True, "metavar": "true"}
                if switch in _VALUES:
                    options = {"type": str, "metavar": _VALUES[switch]}
                group.add_argument(f"--{switch}", **options, help=_SWITCH_HELP[switch])
        if name != "train":
            group.add_argument("--json", type=str, metavar="FILE", help="Write the result as JSON; -: standard output.")
    return root


def _usage(name: str, kind: type[Settings]) -> str:
    places = {"run": " RUN", "runs": " RUN...", "action": " ACTION", "question": ' "QUESTION"'}
    needed = [
        places.get(key, f" --{key} {key.upper()}") for key, field in kind.model_fields.items() if field.is_required()
    ]
    return f"selfdistill {name}{''.join(needed)} [options]"


def _groups(name: str, kind: type[Settings]) -> list[tuple[str, list[str]]]:
    """The groups of a command's help, as (title, settings): main settings, then the others by topic."""
    first = list(MAIN.get(name, kind.model_fields))
    places = _POSITIONAL.get(name, ())
    first.sort(key=lambda key: places.index(key) if key in places else len(places))
    groups = [("main settings", first)]
    for topic, names in TOPICS.items():
        rest = [key for key in names.split() if key in kind.model_fields and key not in first]
        if rest:
            groups.append((topic, rest))
    return groups


def _add_setting(group: Any, command: str, kind: type[Settings], key: str) -> None:
    """Add one setting as an option, or as a positional argument if it is one."""
    field = kind.model_fields[key]
    hint: Any = field.annotation
    options: dict[str, Any] = {"type": str, "nargs": "+"} if hint == list[str] else {"type": hint}
    if get_origin(hint) is tuple:  # separated by commas, which the settings split
        options = {"type": str, "metavar": "A,B"}
    if hint == dict[str, dict[str, Any]]:  # a file, which the settings read
        options = {"type": str, "metavar": "FILE"}
    if not field.is_required():
        options["default"] = field.get_default(call_default_factory=True)
    if hint in (bool, bool | None):
        options |= {"nargs": "?", "const": True}  # without a value it is true
    if "metavar" not in options and (metavar := _metavar(hint)):
        options["metavar"] = metavar
    required = " (required)" if field.is_required() else ""
    options["help"] = (field.description or "").replace("``", "") + required
    if key in _POSITIONAL.get(command, ()):
        options["metavar"] = key
        if not field.is_required():
            options["nargs"] = "?"
        group.add_argument(key, **options)
    else:
        group.add_argument(*_FLAGS.get(key, (f"--{key}",)), **options)


def _metavar(hint: Any) -> str | None:
    """The metavar of a type; None if its values are listed."""
    parts = {part for part in get_args(hint) if part is not type(None)} or {hint}
    for kind, name in ((bool, "true|false"), (int, "N"), (float, "X"), (str, "TEXT")):
        if parts == {kind}:
            return name
    if int in parts:  # beside words
        return "|".join([*(word for part in parts if get_origin(part) is Literal for word in get_args(part)), "N"])
    if get_origin(hint) is list:
        return "TEXT"
    return "JSON" if get_origin(hint) is dict else None


def _explained(message: str, arguments: list[str]) -> str:
    """jsonargparse's message as one line; for an invalid value of a setting, pydantic's message."""
    command = _command(arguments)
    if command not in COMMANDS:
        found = f"unknown command {command!r}" if command else "no command"
        return f"{found}, expected one of {', '.join(COMMANDS)}{closest(command, COMMANDS)}"
    fields = COMMANDS[command][0].model_fields
    switches = [switch for switch, wanted in SWITCHES.items() if command in wanted]
    if lacking := re.match(r"the following arguments are required: \w+\.(\w+)", message):
        return f"no {lacking[1]}: {_LACKING[lacking[1]]}; see selfdistill {command} --help"
    if unknown := re.match(r"unrecognized arguments: (.*)", message):
        places = _POSITIONAL.get(command, ())
        known = [*(key for key in fields if key not in places), "config", *switches]
        known += ["json"] if command != "train" else []
        first, *others = re.findall(r"(?:^|(?<=\s)(?=--))([^\s=]*)(?:[\s=](?!--)(\S*))?", unknown[1])
        if (name := first[0].removeprefix("--")) in places and name != first[0]:
            return f"{command} takes {name} without {first[0]}: selfdistill {command} {' '.join(places).upper()}"
        if listed := _listed(first[0], arguments, fields):
            return listed
        return "; ".join(_unknown(word, value, arguments, known) for word, value in [first, *others])
    key, value = re.search(r'Parser key "(\w+)"', message), re.search(r"(?s)(?:Got|Given) value: (.*)\Z", message)
    if key and value and key[1] in switches:
        return f"option --{key[1]}: found {value[1]!r}, expected true, false or no value"
    if key and value and key[1] in fields:
        needed = {name: "" for name, field in fields.items() if field.is_required()}
        try:
            COMMANDS[command][0](**{**needed, key[1]: value[1]})
        except UserError as error:
            parts = [part for part in re.split("; (?=setting ')", str(error)) if part.startswith(f"setting '{key[1]}'")]
            if parts:
                return parts[0]
    return " ".join(message.removeprefix("argument ").split())


def _unknown(word: str, value: str, arguments: list[str], known: list[str]) -> str:
    """What to say about a word that is no option, and the value after it."""
    name, what = word.removeprefix("--"), "option" if word.startswith("-") else "argument"
    if own := _own_setting(name, value, arguments):
        return f"unknown option {word}; {own}"
    hint = name_here(name, known, "--")
    if not hint and "method_settings" in known:
        hint = _other_methods(name)
    return f"unknown {what} {word}{hint or '; see --help for the names'}"


def _listed(word: str, arguments: list[str], fields: dict[str, FieldInfo]) -> str:
    """What to write where a word follows the value of an option whose values commas separate; empty elsewhere."""
    before = arguments[: arguments.index(word)] if word in arguments else []
    if len(before) < 2 or not before[-2].startswith("--"):
        return ""
    field = fields.get(before[-2].removeprefix("--"))
    if field is None or get_origin(field.annotation) is not tuple:
        return ""
    after = itertools.takewhile(lambda one: not one.startswith("-"), arguments[len(before) :])
    values = ",".join([before[-1], *after])
    return f"option {before[-2]} takes several values with commas between them: {before[-2]} {values}"


def _own_setting(name: str, value: str, arguments: list[str]) -> str:
    """How to write a setting that only the chosen method knows; empty if it has none of this name."""
    *_, method = ["", *re.findall(r"(?:^|\s)--method[\s=](\S+)", " ".join(arguments))]
    from selfdistill.methods import own_names  # imports torch, which takes seconds

    if name not in own_names(method):
        return ""
    written = value if re.fullmatch(r"[-+.\de]+|true|false|null", value) else json.dumps(value)
    return f"write this setting of {method} as --method_settings '{{\"{name}\": {written}}}'"


def _other_methods(name: str) -> str:
    """The methods that know a setting of this name; empty if none does."""
    from selfdistill.methods import whose  # imports torch, which takes seconds

    return whose(name)
