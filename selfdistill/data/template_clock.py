"""The clock that chat templates read: pinned to one day, so that a run sees the same prompts from start to end."""

from __future__ import annotations

import datetime
import json

_DIRECTIVES = "aAbBcdHIjmMpSuUVwWxXyYGZ"
_MACRO = (
    "{% macro strftime_now(format) -%}{%- set known = KNOWN -%}"
    "{%- for piece in format.split('%%') -%}{%- if not loop.first -%}%{%- endif -%}"
    "{%- for part in piece.split('%') -%}"
    "{%- if loop.first -%}{{ part }}"
    "{%- elif part[:2] in known -%}{{ known[part[:2]] }}{{ part[2:] }}"
    "{%- else -%}{{ known[part[:1]] }}{{ part[1:] }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}{% endmacro %}\n"  # the environment removes the line break after a block
)


def pinned(template: str, day: datetime.date) -> str:
    """The template with its ``strftime_now(format)`` shadowed by a macro that knows only midnight of ``day``."""
    moment = datetime.datetime.combine(day, datetime.time())
    known = {letter: moment.strftime(f"%{letter}") for letter in _DIRECTIVES}
    known |= {f"-{letter}": value.lstrip("0") or "0" for letter, value in known.items() if value.isdigit()}
    known |= {"e": f"{day.day:2}", "F": day.isoformat(), "D": day.strftime("%m/%d/%y"), "T": "00:00:00", "f": "000000"}
    return _MACRO.replace("KNOWN", json.dumps(known)) + template
