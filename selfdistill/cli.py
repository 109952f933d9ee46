"""The command line: parse, call the function of the command, mostly in :mod:`selfdistill.api`, print the result.

A user's mistake prints one line on standard error and exits with code 2. Heavy imports are inside the commands, so that
``--help`` and errors about options are fast.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import os
import re
import select
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from selfdistill.cli_parser import COMMANDS, SWITCHES, parse
from selfdistill.config import CheckConfig, DemoConfig, EpisodeSettings, run_settings
from selfdistill.errors import RunFailed, UserError
from selfdistill.runtime import (
    Printable,
    check_writable,
    finite,
    is_out_of_memory,
    is_rank0,
    leave,
    planned_devices,
    result_console,
    say,
    say_note,
    world_size,
)

if TYPE_CHECKING:
    from selfdistill.training import Run

_OF_ANOTHER_PROCESS = {
    "connection (was )?(closed|reset)|remote process exit|broken pipe": "has ended",
    "timed out (waiting|after)|(operation|application) timeout": "has not answered in time",
}
"""What gloo, NCCL and their store say, and what it means."""
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit code. 0: done; 1: nobody reads the output any more, as with ``| head``; 2: a mistake the user can fix;
        3: training diverged or collapsed (in ``compare``: every run), or an engine or another process failed;
        4: ``check`` advises against training, or ``learn`` refused the skill; 128 + n: stopped by signal n. ``train``,
        ``compare`` and ``learn`` first finish their step and save their progress; other commands, and any command at a
        further Ctrl-C, save nothing more.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does; a file's name may not be UTF-8
    try:
        exit_code = _run(argv)
        sys.stdout.flush()
        return exit_code
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        if not closed:
            raise
        for stream in closed:  # Python flushes it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 1


def _is_closed(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return bool(poll.poll(0))


def _run(argv: Sequence[str] | None) -> int:
    """Run a command; returns its exit code."""
    exit_code, kind, command = 2, "error: ", ""
    try:
        try:
            command, given = parse(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:  # --help and --version; elsewhere it is the user's own code that exits
            return int(stop.code or 0)
        if world_size() > 1:
            _check_processes(command, given)
        _check_settings(command, given)
        return _RUN[command](given)
    except UserError as error:
        message, exit_code = str(error), error.exit_code
        kind = "" if exit_code > 128 else kind  # stopped on request: not an error
    except KeyboardInterrupt:
        message, exit_code, kind = "interrupted", 130, ""
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        message = f"{error.filename or 'disk'}: {error.strerror}; free some space or choose another place"
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError
        what = _of_the_machine(error, command)
        if what is None:
            raise
        message, exit_code = what
    line = " ".join(message.splitlines()).replace("resume=True", "--resume")
    with contextlib.suppress(OSError):  # such as a closed terminal, which must not change the exit code
        print(f"selfdistill: {kind}{line}", file=sys.stderr, flush=True)
    return exit_code


def _check_processes(command: str, given: dict[str, Any]) -> None:
    """Refuse commands and settings that do not work with several processes."""
    if command != "train":
        raise UserError(f"found {world_size()} processes, but only train supports several: run {command} in one")
    if given.get("documents"):
        raise UserError("setting 'documents': make the questions first (selfdistill questions), in a single process")


def _check_settings(command: str, given: dict[str, Any]) -> None:
    """Find wrong and missing settings before anything heavy is imported."""
    for option in ("memory", "device"):
        if option in given and command == "train" and not given.get("dry_run"):
            uses = "; a run uses a GPU by itself if PyTorch finds one" if option == "device" else ""
            raise UserError(f"option --{option} only makes a plan: add --dry_run{uses}")
    planned_devices(given.get("memory"), given.get("device"))
    if given.get("resume"):  # the folder has the other settings
        if given.get("dry_run"):
            raise UserError("option --dry_run: a dry run does not resume; leave --resume out")
        if "output_dir" not in given:
            raise UserError("--resume needs the run folder: give --output_dir")
        return
    COMMANDS[command][0](**{name: value for name, value in given.items() if name not in ("json", *SWITCHES)})


def _of_the_machine(error: Exception, command: str) -> tuple[str, int] | None:
    """Message and exit code of an error that the machine caused in a command; None for any other error."""
    text = str(error)
    for words, what in _OF_ANOTHER_PROCESS.items() if world_size() > 1 else ():
        if re.search(words, text, re.I):
            return f"another process of this run {what}; its checkpoints are intact, continue with --resume ({text})", 3
    if unrepeatable := re.match(r".* does not have a deterministic implementation", text):
        return f"setting 'deterministic': {unrepeatable[0]}; leave it out", 2
    if re.match("Deterministic behavior was enabled .* it uses CuBLAS", text):
        found = "found cuBLAS already in use; set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
        return f"setting 'deterministic': {found}", 2
    if is_out_of_memory(error):
        advice, trains = _saving(command, text)
        if unused := re.search(r"([\d.]+ [MG]iB) is reserved by PyTorch but unallocated.* (PYTORCH_\S+=\S+)", text):
            advice += f"; {unused[1]} were reserved but not in use, so {unused[2]} in the environment may help"
        return f"out of memory: {advice}" + ("; checkpoints are intact" if trains else ""), 2
    return None


def _saving(command: str, said: str) -> tuple[str, bool]:
    """What to do if a command runs out of memory, with settings that it has; whether it trains, with checkpoints."""
    known = COMMANDS[command][0].model_fields if command else {}
    if "gradient_accumulation_steps" in known:
        also = " (also with --resume)" if command in SWITCHES["resume"] else ""
        value = re.search(r"raise gradient_accumulation_steps( to \d+)", said)
        more = f"--gradient_accumulation_steps{value[1] if value else ''}{also}"
        return f"raise {more}, or lower --max_completion_length", True
    lower = [f"--{name}" for name in ("batch_size", "sample", "max_completion_length") if name in known]
    if not lower:
        return "free some of the machine's memory", False
    advice = f"lower {' or '.join(filter(None, [', '.join(lower[:-1]), lower[-1]]))}"
    return advice + (", or use --dtype bfloat16" if "dtype" in known else ""), False


# --- commands: from the given options to an exit code ---


def _result_of(function: str) -> Callable[[dict[str, Any]], int]:
    """A command that prints the result of a function of the API; the exit code is the result's, or 0 if it has none."""

    def command(given: dict[str, Any]) -> int:
        from selfdistill import api

        with _printed(given) as show:
            result = getattr(api, function)(**given)
            show(result, result.details)
        return int(getattr(result, "exit_code", 0))

    return command


def _train(given: dict[str, Any]) -> int:
    from selfdistill import api
    from selfdistill.model import engine_runs

    planned_for = _planned_for(given)
    if given.pop("dry_run", False):
        given.pop("resume", None)
        if planned_for:
            found = api.memory_plan(**given, **planned_for)
            found.print(result_console())
            return 0 if found.fits else 2
        api.plan(**given).print(result_console())
        return 0
    run = api.train(**given)
    if is_rank0():
        print(f"final model: {run.final}")
        say(f"to try it: {_asking(run)}")
    if not engine_runs():
        leave()
    return 0


def _asking(run: Run) -> str:
    """The command that asks the trained model, in the environment of its training."""
    command, config = f'selfdistill ask {shlex.quote(str(run.output_dir))} "QUESTION"', run.config
    given = {name: getattr(config, name) for name in EpisodeSettings.model_fields if config.environment != "none"}
    others = {name: value for name, value in given.items() if value != EpisodeSettings.model_fields[name].default}
    return command + "".join(f" --{name} {shlex.quote(str(value))}" for name, value in others.items())


def _planned_for(given: dict[str, Any]) -> dict[str, Any]:
    """Remove and return the options that name a device to plan for."""
    return {name: given.pop(name) for name in ("memory", "device") if name in given}


def _compare(given: dict[str, Any]) -> int:
    from selfdistill import api

    with _printed(given) as show:
        result = api.compare(**given)
        show(result, result.details)
        folder = result.output_dir
        line = f"Results are in {folder}; view them with: selfdistill report {folder}"
        result_console().print(line, highlight=False, markup=False)
    return RunFailed.exit_code if result.all_failed else 0


def _check(given: dict[str, Any]) -> int:
    from selfdistill import api

    planned_for = _planned_for(given)
    with _printed(given) as show:
        plan = _plan_of_check(given, planned_for) if planned_for else {}
        result = api.check(**given)
        show(result, result.to_dict() | plan)
    return result.exit_code


def _plan_of_check(given: dict[str, Any], planned_for: dict[str, Any]) -> dict[str, Any]:
    """Print the plan of a training run with a check's settings, before the model is loaded; return its JSON.

    If there can be no plan, the check still runs.
    """
    from selfdistill import api

    try:
        found = api.memory_plan(**run_settings(CheckConfig(**given)), **planned_for)
    except UserError as error:
        say_note(f"no memory plan: {error}")
        return {"plan": None}
    found.print(result_console())
    return {"plan": found.to_dict()}


def _demo(given: dict[str, Any]) -> int:
    from selfdistill.api_inputs import session
    from selfdistill.demo import demo

    with _printed(given) as show, session(progress=True):
        config = DemoConfig(**given)
        show(None, demo(config.output_dir, config.seed))
    return 0


def _report(given: dict[str, Any]) -> int:
    from selfdistill.comparison import report
    from selfdistill.config import ReportConfig

    with _printed(given) as show:
        details = report(ReportConfig(**given))
        print(f"report: {details['output']}")
        show(None, details)
    return 0


def _export(given: dict[str, Any]) -> int:
    from selfdistill import api

    with _printed(given) as show:
        folder = api.export(given.pop("run"), **given)
        print(f"exported model: {folder}")
        show(None, {"output_dir": str(folder)})
    return 0


def _merge(given: dict[str, Any]) -> int:
    from selfdistill import api

    with _printed(given) as show:
        folder = api.merge(given.pop("model"), given.pop("add"), given.pop("subtract", None), **given)
        print(f"merged model: {folder}")
        show(None, {"output_dir": str(folder)})
    return 0


_RUN: dict[str, Callable[[dict[str, Any]], int]] = {
    "demo": _demo,
    "check": _check,
    "train": _train,
    "ask": _result_of("ask"),
    "eval": _result_of("evaluate"),
    "compare": _compare,
    "learn": _result_of("learn"),
    "questions": _result_of("make_questions"),
    "report": _report,
    "export": _export,
    "merge": _merge,
}


@contextlib.contextmanager
def _printed(given: dict[str, Any]) -> Iterator[Callable[[Printable | None, dict[str, Any]], None]]:
    """Yield a function that prints a result and, with ``--json``, writes its details as JSON.

    Checks before the work that the file can be written, and writes it before anything is printed; the result is printed
    also if that fails. With ``-`` the JSON goes to standard output, and everything else to standard error.
    """
    file: str | None = given.pop("json", None)
    if file not in (None, "-"):
        check_writable(file, f"--json {file}", ", or -")
    shown: list[dict[str, Any]] = []

    def show(result: Printable | None, details: dict[str, Any]) -> None:
        try:
            if file not in (None, "-"):
                text = json.dumps(finite(details), indent=2, ensure_ascii=False)
                Path(file).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        finally:
            if result is not None:
                result.print(result_console())
        shown.append(details)

    with contextlib.redirect_stdout(sys.stderr) if file == "-" else contextlib.nullcontext():
        yield show
    if file == "-":
        utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
        print(json.dumps(finite(shown[0]), indent=2, ensure_ascii=not utf8))
