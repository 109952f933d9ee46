"""From files to token ids; no model weights needed."""

from selfdistill.data.bundled import anchor_prompts, general_prompts, packaged
from selfdistill.data.chat_format import NEXT_TURN, ChatFormat, TemplateRefusal, scored_text, thought_and_said
from selfdistill.data.contexts import Context, Document, context_spec, parse_context, with_feedback, with_guide
from selfdistill.data.demonstrations import (
    CODE,
    SCORER_NAMES,
    Demonstration,
    Lacks,
    Rows,
    as_row,
    load_demonstrations,
    load_prompts,
    nothing_to_show,
    write_demonstrations,
)
from selfdistill.data.encoding import ContextEncoder, Example, NothingFits, encode, encode_prompts, notes_on
from selfdistill.data.episodes import Replies
from selfdistill.data.hints import Hint, HintPart, context_of, first_steps_and_answer, first_words, hintable
from selfdistill.data.messages import Message, Turns, not_object, text_of, wrong
from selfdistill.data.named import FUNCTION, named
from selfdistill.data.readers import read_jsonl
from selfdistill.data.rows import RawRow, check_rows, first_ten, from_text, join_surrogates, one_line, repeated_key
from selfdistill.data.scorers import (
    JUDGE,
    Verdict,
    as_verdict,
    by_tests,
    contains,
    default_scorer,
    doubt_about,
    is_scorable,
    nothing_to_score,
    reference,
    score,
    verdict,
    verdicts,
)
from selfdistill.data.sources import Note
from selfdistill.data.template_columns import schema_of
from selfdistill.data.words import includes, words_of

__all__ = [
    "CODE",
    "FUNCTION",
    "JUDGE",
    "NEXT_TURN",
    "SCORER_NAMES",
    "ChatFormat",
    "Context",
    "ContextEncoder",
    "Demonstration",
    "Document",
    "Example",
    "Hint",
    "HintPart",
    "Lacks",
    "Message",
    "Note",
    "NothingFits",
    "RawRow",
    "Replies",
    "Rows",
    "TemplateRefusal",
    "Turns",
    "Verdict",
    "anchor_prompts",
    "as_row",
    "as_verdict",
    "by_tests",
    "check_rows",
    "contains",
    "context_of",
    "context_spec",
    "default_scorer",
    "doubt_about",
    "encode",
    "encode_prompts",
    "first_steps_and_answer",
    "first_ten",
    "first_words",
    "from_text",
    "general_prompts",
    "hintable",
    "includes",
    "is_scorable",
    "join_surrogates",
    "load_demonstrations",
    "load_prompts",
    "named",
    "not_object",
    "notes_on",
    "nothing_to_score",
    "nothing_to_show",
    "one_line",
    "packaged",
    "parse_context",
    "read_jsonl",
    "reference",
    "repeated_key",
    "schema_of",
    "score",
    "scored_text",
    "text_of",
    "thought_and_said",
    "verdict",
    "verdicts",
    "with_feedback",
    "with_guide",
    "words_of",
    "write_demonstrations",
    "wrong",
]
