"""From files to token ids; no model weights needed."""

from selfdistill.data.bundled import general_prompts, packaged
from selfdistill.data.chat_format import ChatFormat, thought_and_said
from selfdistill.data.contexts import Document, context_spec, parse_context
from selfdistill.data.demonstrations import (
    SCORER_NAMES,
    Demonstration,
    Message,
    Rows,
    load_demonstrations,
    load_prompts,
    not_object,
    text_of,
    write_demonstrations,
    wrong,
)
from selfdistill.data.encoding import Example, NothingFits, encode
from selfdistill.data.rows import RawRow, check_rows, first_ten, join_surrogates, one_line, read_jsonl, repeated_key
from selfdistill.data.scorers import FUNCTION, JUDGE, contains, default_scorer, doubt_about, reference, score
from selfdistill.data.words import includes, words_of

__all__ = [
    "FUNCTION",
    "JUDGE",
    "SCORER_NAMES",
    "ChatFormat",
    "Demonstration",
    "Document",
    "Example",
    "Message",
    "NothingFits",
    "RawRow",
    "Rows",
    "check_rows",
    "contains",
    "context_spec",
    "default_scorer",
    "doubt_about",
    "encode",
    "first_ten",
    "general_prompts",
    "includes",
    "join_surrogates",
    "load_demonstrations",
    "load_prompts",
    "not_object",
    "one_line",
    "packaged",
    "parse_context",
    "read_jsonl",
    "reference",
    "repeated_key",
    "score",
    "text_of",
    "thought_and_said",
    "words_of",
    "write_demonstrations",
    "wrong",
]
