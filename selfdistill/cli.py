"""The command line: ``selfdistill demo | check | train | eval | report``.

Options are the fields of the settings in :mod:`selfdistill.config`, parsed by jsonargparse from their types. What a
user can mend is one line on standard error and exit code 2. Everything heavy is imported by the command that needs it,
so that ``--help`` and a misspelt option answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser

from selfdistill import __version__
from selfdistill.config import (
    CheckConfig,
    CompareConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    LearnConfig,
    QuestionsConfig,
    ReportConfig,
    Settings,
    TrainConfig,
    closest,
    continued,
    load_yaml,
)
from selfdistill.errors import UserError
from selfdistill.runtime import is_rank0, world_size

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0: done; 2: a mistake that the user can mend; 3: training diverged; 4: ``check`` advises against; 128 + n: stopped
    by signal n, everything saved.
    """
    exit_code, kind = 2, "error: "
    try:
        command, given = _parse(list(sys.argv[1:] if argv is None else argv))
        if world_size() > 1:
            _check_processes(command, given)
        return COMMANDS[command][2](given)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except UserError as error:
        message, exit_code = str(error), error.exit_code
        kind = "" if exit_code > 128 else kind  # stopped because it was asked to
    except KeyboardInterrupt:
        message, exit_code, kind = "interrupted", 130, ""
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        message = f"{error.filename or 'disk'}: {error.strerror}; free some space or choose another place"
    except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        what = _of_the_machine(error)
        if what is None:
            raise
        message, exit_code = what
    print(f"selfdistill: {kind}{' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return exit_code


def _check_processes(command: str, given: dict[str, Any]) -> None:
    """Several processes share one training; what is prepared for it is prepared before."""
    if command != "train":
        raise UserError(f"{world_size()} processes were started, which only train shares: start {command} alone")
    if given.get("documents"):
        raise UserError("setting 'documents': make the questions before (selfdistill questions), in a single process")


def _of_the_machine(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of an error that is no fault of the program's."""
    text = str(error)
    if world_size() > 1 and re.search("connection (was )?(closed|reset)|remote process exited|broken pipe", text, re.I):
        return f"another process of this run has ended; what was saved is whole, continue with --resume ({text})", 3
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
        advice = "raise --gradient_accumulation_steps (also with --resume), or lower --max_completion_length"
        return f"out of memory: {advice}; checkpoints are whole", 2
    return None


# --- commands: from what was given on the command line to an exit code ---


def _train(given: dict[str, Any]) -> int:
    resume = given.pop("resume", False)
    if resume and (Path(str(given.get("output_dir"))) / "config.yaml").exists():
        given.pop("documents", None)  # the settings there name the questions that were made of them
    config, saved = continued(given, TrainConfig) if resume else (TrainConfig(**given), None)
    if saved and saved.max_steps != config.max_steps:
        change = f"max_steps was {saved.max_steps} and is now {config.max_steps}"
        print(f"{change}: from here on the learning rate is that of a run of so many steps", file=sys.stderr)
    _quiet()
    from selfdistill.evaluation import check_inputs
    from selfdistill.methods import METHODS, uses
    from selfdistill.runtime import check_tracker
    from selfdistill.training import check_output_dir, train

    check_output_dir(config.output_dir, resume=resume)
    check_tracker(config.report_to)
    check_inputs(config)
    METHODS[config.method](config)  # its rules, before any long work
    if config.documents:
        from selfdistill.questions import with_questions

        config = with_questions(config)
    if config.context == "auto" and uses(config, "context"):
        if world_size() > 1:
            raise UserError("setting 'context': find the best with selfdistill check, in a single process, and name it")
        from selfdistill.evaluation import best_context

        with contextlib.redirect_stdout(sys.stderr):
            config = config.model_copy(update={"context": best_context(config)})
    final = train(config, resume=resume)
    if is_rank0():
        print(f"final model: {final}")
    return 0


def _compare(given: dict[str, Any]) -> int:
    with _result(given) as result:
        resume = given.pop("resume", False)
        config = continued(given, CompareConfig)[0] if resume else CompareConfig(**given)
        _quiet()
        from selfdistill.comparison import compare
        from selfdistill.errors import RunFailed

        result |= compare(config, resume=resume)
    return RunFailed.exit_code if all(run["failed"] for run in result["runs"]) else 0


def _eval(given: dict[str, Any]) -> int:
    with _result(given) as result:
        config = EvalConfig(**given)
        _quiet()
        from selfdistill.evaluation import evaluate

        result |= evaluate(config)
    return 0


def _check(given: dict[str, Any]) -> int:
    with _result(given) as result:
        config = CheckConfig(**given)
        _quiet()
        from selfdistill.evaluation import check

        checked = check(config)
        result |= checked.to_dict()
    return checked.exit_code


def _demo(given: dict[str, Any]) -> int:
    with _result(given) as result:
        config = DemoConfig(**given)
        _quiet()
        from selfdistill.demo import demo

        result |= demo(config.output_dir, config.seed)
    return 0


def _questions(given: dict[str, Any]) -> int:
    with _result(given) as result:
        config = QuestionsConfig(**given)
        _quiet()
        from selfdistill.questions import make_questions

        result |= make_questions(config)
        rejected = ", ".join(f"{count} {reason}" for reason, count in result["rejected"].items()) or "none"
        print(
            f"{result['train']} questions to learn, {result['test']} to test, {result['indirect']} indirect, from "
            f"{result['passages']} passages, in {config.output_dir}; rejected: {rejected}"
        )
    return 0


def _learn(given: dict[str, Any]) -> int:
    with _result(given) as result:
        config = LearnConfig(**given)
        _quiet()
        from selfdistill.continual import learn

        found, exit_code = learn(config)
        result |= found
    return exit_code


def _report(given: dict[str, Any]) -> int:
    with _result(given) as result:
        config = ReportConfig(**given)
        from selfdistill.comparison import report

        result |= report(config)
    return 0


def _export(given: dict[str, Any]) -> int:
    with _result(given) as result:
        config = ExportConfig(**given)
        _quiet()
        from selfdistill.training import export

        result["output_dir"] = str(export(config))
        print(f"exported model: {result['output_dir']}")
    return 0


COMMANDS: dict[str, tuple[type[Settings], str, Callable[[dict[str, Any]], int]]] = {
    "demo": (DemoConfig, "See it work on the starter model, in minutes.", _demo),
    "check": (CheckConfig, "Before training: will it help, and how is the demonstration best shown?", _check),
    "train": (TrainConfig, "Teach a model from demonstrations.", _train),
    "eval": (EvalConfig, "Measure the new task, what the model could do before, and how far it has moved.", _eval),
    "compare": (CompareConfig, "Train by several methods on equal terms: what each gained and lost.", _compare),
    "learn": (LearnConfig, "Keep one model learning: skill by skill, each accepted only if the others stay.", _learn),
    "questions": (QuestionsConfig, "Make questions about documents, to learn them by.", _questions),
    "report": (ReportConfig, "Show runs in one HTML file: scores, curves, settings, tokens.", _report),
    "export": (ExportConfig, "Hand on the model of a run: as it is, or its adapter merged into the base.", _export),
}


def _quiet() -> None:
    """No bars and no advice from libraries while models are loaded and saved; downloads keep their bars."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's call, not the user's
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def _result(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A dict to fill, written as JSON where ``--json`` says, which is looked at before the work begins."""
    file: str | None = given.pop("json", None)
    path = Path(file or "-").absolute()
    if file not in (None, "-") and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise UserError(f"--json {file}: cannot be written; give a file in an existing folder, or -")
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr) if file == "-" else contextlib.nullcontext():
        yield result
    text = json.dumps(result, indent=2, ensure_ascii=False)
    if file == "-":
        print(text)
    elif file is not None:
        path.write_text(text + "\n", encoding="utf-8")


# --- parsing ---

_RESUMED = ("train", "compare")
_FLAGS = {"output": ("-o", "--output")}
"""Settings that have a short name, too."""
_POSITIONAL = {"export": ("run",), "report": ("runs",), "learn": ("action", "data")}
"""Settings that are given without their names, in this order; those that are not required may be left out."""
_LACKING = {
    "run": "give a run folder",
    "runs": "give at least one",
    "action": f"put one of {', '.join(get_args(LearnConfig.model_fields['action'].annotation))} after learn, also with "
    "--config",
}
"""What to do where a required one is missing."""


def _parser() -> ArgumentParser:
    common: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
    description = "Teach a language model by self-distillation. Each command has its own --help."
    parser = ArgumentParser(prog="selfdistill", version=__version__, description=description, **common)
    commands = parser.add_subcommands(dest="command", title="commands", description=None, metavar="command")
    for name, (kind, help_text, _) in COMMANDS.items():
        fields = kind.model_fields
        places = _POSITIONAL.get(name, ())
        needed = "".join(
            {"run": " RUN", "runs": " RUN...", "action": " ACTION"}.get(key, f" --{key} {key.upper()}")
            for key, field in fields.items()
            if field.is_required()
        )
        usage = f"selfdistill {name}{needed} [options]"
        command = ArgumentParser(description=help_text, usage=usage, **common)
        command.add_argument("--config", type=str, help="YAML file of settings; options given here go before it.")
        for key in sorted(fields, key=lambda key: places.index(key) if key in places else -1):
            field = fields[key]
            hint: Any = field.annotation  # ranges are pydantic's to check
            options: dict[str, Any] = {"type": str, "nargs": "+"} if hint == list[str] else {"type": hint}
            if get_origin(hint) is tuple:  # separated by commas, which the settings split
                options = {"type": str, "metavar": "A,B"}
            if not field.is_required():
                options["default"] = field.get_default(call_default_factory=True)
            options["help"] = (field.description or "").replace("``", "") + " (required)" * field.is_required()
            if key in places and not field.is_required():
                options["nargs"] = "?"
            flags = (key,) if key in places else _FLAGS.get(key, (f"--{key}",))
            command.add_argument(*flags, **options)
        if name in _RESUMED:
            switch: dict[str, Any] = {"type": bool, "nargs": "?", "const": True, "metavar": "true"}
            command.add_argument("--resume", **switch, help="Go on with the run in --output_dir.")
        if name != "train":
            command.add_argument("--json", type=str, help="Write the result as JSON to this file; -: standard output.")
        commands.add_subcommand(name, command, help=help_text)
    return parser


def _parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and what was given for it: its options above the values of its ``--config``. No defaults."""
    try:
        found = _parser().parse_args(arguments, defaults=False).as_dict()
    except ArgumentError as error:
        raise UserError(_explained(str(error), arguments)) from None
    given = found[command := found["command"]]
    for key in _POSITIONAL.get(command, ()):
        if given.get(key) == "":  # jsonargparse's default for one that was left out
            del given[key]
    file = given.pop("config", None)
    return command, given if file is None else load_yaml(Path(file), COMMANDS[command][0]) | given


def _explained(message: str, arguments: list[str]) -> str:
    """jsonargparse's message as one line; what pydantic says of a value where it is one of a setting."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    if command not in COMMANDS:
        return f"{f'unknown command {command!r}' if command else 'no command'}, want one of {', '.join(COMMANDS)}"
    fields = COMMANDS[command][0].model_fields
    if lacking := re.match(r"the following arguments are required: \w+\.(\w+)", message):
        return f"no {lacking[1]}: {_LACKING[lacking[1]]}, see selfdistill {command} --help"
    if unknown := re.match(r"unrecognized arguments: ([^\s=]*)", message):
        known = [f"--{key}" for key in (*fields, "config", "resume" if command in _RESUMED else "json")]
        what = "option" if unknown[1].startswith("-") else "argument"
        return f"unknown {what} {unknown[1]}{closest(unknown[1], known)}"
    key, value = re.search(r'Parser key "(\w+)"', message), re.search(r"(?s)(?:Got|Given) value: (.*)\Z", message)
    if key and value and key[1] == "resume":
        return f"option --resume: found {value[1]!r}, want nothing after it, true or false"
    if key and value and key[1] in fields:
        needed = {name: "" for name, field in fields.items() if field.is_required()}
        try:
            COMMANDS[command][0](**{**needed, key[1]: value[1]})
        except UserError as error:
            parts = [part for part in str(error).split("; ") if part.startswith(f"setting '{key[1]}'")]
            if parts:
                return parts[0]
    return " ".join(message.removeprefix("argument ").split())
