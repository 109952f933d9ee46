"""The command reference: one page per command, rendered from the parser while the site is built (a MkDocs hook).

Nothing is committed that could differ from ``selfdistill COMMAND --help``. Needs neither torch nor transformers.
"""

from __future__ import annotations

from argparse import Action
from typing import TYPE_CHECKING, Any, get_args

from selfdistill.cli_parser import COMMANDS, parser

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from pydantic.fields import FieldInfo

OVERVIEW = """# Commands

Every command has its own page, made from the program's own help.

| command | what it does |
|---|---|
{rows}

Every command takes `--config FILE`: a YAML file of settings. Options on the command line override the file.
An unknown option or key is an error that names the closest one.

## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | nobody reads the output any more, as with `\\| head`; or a bug, with a traceback |
| 2 | a mistake to fix; one line says where, what was found and what to do |
| 3 | training diverged, collapsed, or lost another process |
| 4 | `check` advises against, or `learn` did not accept the skill |
| 128 + n | stopped by signal n: `train`, `compare` and `learn` first finish their step and save their progress; other \
commands, and any command at a further Ctrl-C, save nothing more |
"""


def command_parsers() -> dict[str, Any]:
    """The parser of each command, by its name."""
    (commands,) = (action for action in parser()._actions if isinstance(action.choices, dict))
    return {name: commands.choices[name] for name in COMMANDS}


def pages() -> dict[str, str]:
    """Markdown of every page of the reference, by its path in the site."""
    rows = "\n".join(f"| [`{name}`]({name}.md) | {text} |" for name, (_, text) in COMMANDS.items())
    found = {"commands/index.md": OVERVIEW.format(rows=rows)}
    for name, command in command_parsers().items():
        found[f"commands/{name}.md"] = command_page(name, command)
    return found


def command_page(name: str, command: Any) -> str:
    """The page of one command: its usage, then a table of options for each group of its help."""
    lines = [f"# selfdistill {name}", "", COMMANDS[name][1], "", "```text", command.usage, "```", ""]
    for group in command._action_groups:
        options = [action for action in group._group_actions if action.dest != "help"]
        if options:
            lines += [f"## {group.title.capitalize()}", "", "| option, default | what it does |", "|---|---|"]
            lines += [_row(action, COMMANDS[name][0].model_fields.get(action.dest)) for action in options] + [""]
    return "\n".join(lines)


def _row(action: Action, field: FieldInfo | None) -> str:
    names = [f"`{name}`" for name in action.option_strings] or [f"`{action.dest}`"]
    text = (action.help if field is None else field.description) or ""  # a field's has its marks of code
    if choices := [value for value in get_args(field.annotation) if isinstance(value, str)] if field else []:
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    default = "**required**" if field is not None and field.is_required() else _default(action.default)
    first = ", ".join(names) + (f"<br>{default}" if default else "")
    return f"| {first} | {' '.join(text.split()).replace('|', chr(92) + '|')} |"


def _default(value: Any) -> str:
    if value in (None, "", "==SUPPRESS==") or value in ([], {}, ()):
        return ""
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs: add the pages to the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
