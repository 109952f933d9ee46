"""From files to token ids; no model weights needed."""

from selfdistill.data.bundled import general_prompts, packaged
from selfdistill.data.chat_format import NEXT_TURN, ChatFormat, TemplateRefusal, thought_and_said
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
from selfdistill.data.encoding import Example, NothingFits, encode, encode_prompts, text_changes
from selfdistill.data.rows import RawRow, check_rows, first_ten, join_surrogates, one_line, read_jsonl, repeated_key
from selfdistill.data.scorers import FUNCTION, JUDGE, contains, default_scorer, doubt_about, score, words_of

__all__ = [
    "FUNCTION",
    "JUDGE",
    "NEXT_TURN",
    "SCORER_NAMES",
    "ChatFormat",
    "Demonstration",
    "Document",
    "Example",
    "Message",
    "NothingFits",
    "RawRow",
    "Rows",
    "TemplateRefusal",
    "check_rows",
    "contains",
    "context_spec",
    "default_scorer",
    "doubt_about",
    "encode",
    "encode_prompts",
    "first_ten",
    "general_prompts",
    "join_surrogates",
    "load_demonstrations",
    "load_prompts",
    "not_object",
    "one_line",
    "packaged",
    "parse_context",
    "read_jsonl",
    "repeated_key",
    "score",
    "text_changes",
    "text_of",
    "thought_and_said",
    "words_of",
    "write_demonstrations",
    "wrong",
]
