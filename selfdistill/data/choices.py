"""The letter of the option that a reply to a multiple-choice question chooses."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import regex

from selfdistill.data.words import plain


def _any_of(words: str) -> str:
    """Matches any of the words; those of scripts with spaces only as whole words."""
    patterns = []
    for word in words.split():
        spaced = regex.match(r"[\p{Latin}\p{Greek}\p{Cyrillic}]", word)
        patterns.append(rf"\b{word}\b" if spaced else regex.escape(plain(word)))
    return f"(?:{'|'.join(patterns)})"


# Words for an option, for the answer and for "is"; what may stand between "is" and the letter.
_OPTION = _any_of(
    "option choice letter alternative alternativa letra variante opción opção opzione choix вариант "
    "选项 選項 選択肢 보기 विकल्प ข้อ"
)
_ANSWER = _any_of(
    "answers? choice option solution selection antwort lösung réponse respuesta resposta risposta antwoord svar "
    "odpowiedź jawaban jawabannya cevap ответ απάντηση 答案 正解 答え 选项 選項 選択肢 정답 คำตอบ उत्तर الإجابة الجواب "
    r"התשובה opción opção opzione alternativa richtig đáp\s+án câu\s+trả\s+lời exception 正确的 正確的"
)
_IS_WORD = _any_of("is be was ist lautet es est é è är er jest adalah là είναι это 是 为 為 は 은 는 คือ है هي هو היא")
_IS = rf"(?:{_IS_WORD}|[-=:]+>?|[→】|])"
_FILL = (
    rf"(?:(?:{_OPTION}|\b(?:the|correct|right|best|most|likely|probably|definitely|clearly|certainly|indeed|therefore"
    r"|either|both|maybe|perhaps|possibly|answer|la|le|el|die)\b)[\s:]*+){0,3}+"
)
_BECAUSE = r"\b(?i:because|since|as)\b"

# Brackets, quotes, Markdown and LaTeX around a letter. Possessive, or long runs of them would take cubic time.
_OPEN = r"(?:\\(?:text|math|box)\w*\s*\{|\\[(\[]|[\s*_`~\"'(\[{<$:「【《])*+"
_CLOSE = r"(?:\\[)\]]|[^\S\n]|[*_`~\"')\]}>$」】》])*+"
_LEAD = rf"{_OPEN}(?i:{_FILL}){_OPEN}"
_OR = r"(?:,?+\s*+\b(?:or|and|oder|und|ou|et|o|y|или|и)\b|,|/|&|、|或|和)"

_IN_TAG = r"(?i)<(?:final_)?answer>((?:(?!<(?:final_)?answer>).)*?)"
_TAG = regex.compile(rf"{_IN_TAG}</(?:final_)?answer>", regex.DOTALL)
_CUT_TAG = regex.compile(rf"{_IN_TAG}\Z", regex.DOTALL)
_BOX = regex.compile(r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LINE_LABELS = regex.compile(r"^(?:[^\S\n]|[*_`>#-])*+\(?([A-Za-z])[).:]", regex.MULTILINE)
_LETTER = regex.compile(
    r"[A-Za-z](?![\p{Latin}\p{N}+#&]|[-'/]\p{Latin}|\.\p{Latin}\b)(?<![\p{Latin}\p{N}].|\p{L}[-'/&.].)"
)

# What stands before a letter.
_REACH = 120
_STATED = regex.compile(
    rf"(?i:(?:\b(?:correct|right|true|best|odd)\s+\w+(?:\s+out)?\s+|{_ANSWER})"
    r"(?:(?!not\b|n't|cannot|never|neither|nor\b|choices|options|wrong|incorrect)[^.!?\n:=。]){0,60}?"
    rf"{_IS}){_LEAD}\Z"
)
# A verb, not a colon: "Answer: A, C and D are wrong, so B" states no A.
_BY_VERB = regex.compile(rf"(?i:{_IS_WORD}){_LEAD}\Z")
_NAMED = regex.compile(
    r"(?<!(?i:not|n't|than|over|never|unlike)\s)"
    r"(?:\b(?i:choos(?:e|ing)|chose|pick(?:ed|ing)?|select(?:ed|ing)?|(?:go|going|went) with|opt for"
    r"|say|guess|prefer|left with|match(?:es)?|it'?s|it is|so|thus|hence|therefore|but|rather"
    r"|(?:must|should|would|has to|can only) be|leav(?:es|ing)(?: us with)?|lean(?:ing)? towards?"
    r"|only|probably|definitely|clearly|certainly|likely"
    rf"|donc|chọn|luego|quindi|dus|значит)\b|因此|所以|故|选择|選擇|选|選|应为|應為|(?i:{_OPTION}|{_ANSWER})){_LEAD}\Z"
)
_LINE_START = regex.compile(rf"[#>=→\p{{So}}\s-]*+{_LEAD}")

# What stands after a letter.
_LINE_END = regex.compile(rf"{_CLOSE}[.,;:!?。、]*+{_CLOSE}(?:\n|\Z)")
_LABEL_END = regex.compile(rf"{_CLOSE}[).:,;。、-]|[*\])}}】]|\s+{_BECAUSE}|\p{{Han}}")
_CORRECT = regex.compile(
    rf"{_CLOSE}(?:(?i:is|must be|seems)\s+(?:(?:the|most|only|clearly|definitely)\s+)*"
    r"(?i:correct|right|better|best|answer)\b|是?正确|是?正確|が正解|が正しい)"
)
_MARK_END = regex.compile(r"[^\S\n]*+(?:\n|\Z|[)\]}*_`\"'>.,;:!?。—])")
_NO_WORD_END = regex.compile(
    rf"\s*(?:\Z|\n|[^\p{{L}}\p{{M}}\p{{N}}\s]|{_BECAUSE}|(?:for|is|but|given|due|over(?=\s)|rather than"
    rf"|instead of|(?:and )?not)\b)|[^\p{{Latin}}\s]"
)
_REJECTED = regex.compile(
    # After "(B)" a bare "wrong" may be the text of the option.
    rf"(?i:{_CLOSE}(?:is|are|was|were|seems|can be)\s+(?:both\s+|all\s+)?"
    rf"(?:not|wrong|incorrect|false|(?:ruled )?out|eliminated)\b"
    rf"|{_CLOSE}isn't\b|[\s*_]++(?:wrong|incorrect|false|out|eliminated|not\s+(?:correct|right))\b)"
)
_REJECTED_ALONE = regex.compile(rf"(?i:{_CLOSE}(?:is|was|seems)\b(?!\s+(?:both|all)\b))")
_SEVERAL = regex.compile(
    rf"{_CLOSE}{_OR}{_LEAD}(?P<other>{_LETTER.pattern}){_CLOSE}"
    rf"(?:\n|\Z|[.,;:!?。]|{_OR}|{_BECAUSE}|(?:are|were|both|fit|have|but|for|due|given)\b)"
)
_AND = regex.compile(rf"{_CLOSE}{_OR}{_LEAD}")
_VERDICT = r"(?:(?i:wrong|incorrect|false|right|correct|true)\b[.,;:]?\s*)?"
_NEXT_LABEL = regex.compile(rf"{_CLOSE}[).:]*+\s*+{_VERDICT}{_OPEN}[A-Za-z][).:\]](?!\s+\p{{Ll}})")


def chosen_letter(reply: str) -> str | None:
    r"""The letter, A to Z, of the option that the reply chooses; None if it chooses none or several.

    The first kind of evidence that there is decides, and its last instance:

    1. ``<answer>...</answer>``, also cut off, or ``<final_answer>``, that holds a letter (``(b)``, ``B.``) or an
       option with its letter (``B: Paris``)
    2. ``\boxed{...}`` that holds one
    3. a stated answer: ``the answer is B``, ``Answer: b``, ``the correct statement is B``, also in other languages
    4. a line that is nothing but a letter
    5. a letter that is called correct: ``B is the right answer``
    6. the letter with which the reply begins, ``B) because ...``, unless others follow at once or begin other lines
    7. an option that is named and not rejected: ``option C``, ``I choose C``, ``so C``
    8. the one letter that brackets, emphasis or punctuation set apart
    9. a capital with which the reply begins

    A small letter, and a capital A or I, may be a word. It counts only in brackets or emphasis, before punctuation, the
    end of a line or a word such as "because".
    """
    text = plain(reply)
    if tags := _TAG.findall(text) or _CUT_TAG.findall(text):
        letters, rejected = _not_rejected(_letters(tags[-1]))
        stated, first = _led_by(_STATED, letters), _first(letters)
        return letter_of(tags[-1]) or _last(stated, rejected) or _last(first, rejected)
    if boxes := [letter for content in _BOX.findall(text) if (letter := letter_of(content))]:
        return boxes[-1]
    letters, rejected = _not_rejected(_letters(text))
    for found in _evidence(text, letters):
        if found:
            return _last(found, rejected)
    apart = [match for match in letters if _is_set_apart(match)] or _first(letters)
    return _last(apart, rejected) if len({match[0].upper() for match in apart}) == 1 else None


def letter_of(text: str) -> str | None:
    """The letter of a text that is a letter, or an option with its letter: ``B``, ``(b)``, ``B: Paris``."""
    return _last([match for match in _letters(plain(text).strip())[:1] if _begins(match) and _is_label(match)])


def _letters(text: str) -> list[regex.Match[str]]:
    """Letters that may be options, for they are no words."""
    return [match for match in _LETTER.finditer(text) if _is_no_word(match)]


def _not_rejected(letters: Sequence[regex.Match[str]]) -> tuple[list[regex.Match[str]], set[int]]:
    """The letters that are not called wrong, and where those begin that are.

    "A, C and D are wrong" rejects all three; "the answer is A, C and D are wrong" and "A, and C is wrong" spare A.
    """
    kept: list[regex.Match[str]] = []
    rejected: set[int] = set()
    plural_at = None
    for match in reversed(letters):
        text, end = match.string, match.end()
        if plural_at is not None and _AND.fullmatch(text, end, plural_at) and not _is_stated(match):
            plural_at = match.start()
        elif _REJECTED.match(text, end):
            plural_at = None if _REJECTED_ALONE.match(text, end) else match.start()
        else:
            kept.append(match)
            plural_at = None
            continue
        rejected.add(match.start())
    return kept[::-1], rejected


def _is_stated(match: regex.Match[str]) -> bool:
    """Whether a phrase such as "the answer is" leads the letter."""
    past = max(0, match.start() - _REACH)
    return all(lead.search(match.string, past, match.start()) for lead in (_BY_VERB, _STATED))


def _evidence(text: str, letters: Sequence[regex.Match[str]]) -> Iterator[list[regex.Match[str]]]:
    """The letters of each kind of evidence from 3 to 7."""
    yield _led_by(_STATED, letters)
    yield [match for match in letters if _begins(match, line=True) and _LINE_END.match(text, match.end())]
    yield [match for match in letters if _CORRECT.match(text, match.end())]
    listed = len(set(map(str.upper, _LINE_LABELS.findall(text)))) > 1
    yield [match for match in letters[:1] if not listed and _begins(match) and _is_label(match) and _is_alone(match)]
    yield _led_by(_NAMED, letters)


def _last(found: Sequence[regex.Match[str]], rejected: Container[int] = ()) -> str | None:
    """The last letter; None if others are named with it, as in "A or B", that are not ``rejected`` there."""
    if not found:
        return None
    several = _SEVERAL.match(found[-1].string, found[-1].end())
    if several and several.start("other") not in rejected:
        return None
    return str(found[-1][0]).upper()


def _led_by(lead: regex.Pattern[str], letters: Sequence[regex.Match[str]]) -> list[regex.Match[str]]:
    """The letters before which the pattern stands, without another such letter in it."""
    found: list[regex.Match[str]] = []
    for match in letters:
        past = found[-1].end() if found else 0
        if lead.search(match.string, max(past, match.start() - _REACH), match.start()):
            found.append(match)
    return found


def _begins(match: regex.Match[str], *, line: bool = False) -> bool:
    """Whether the text, or a line of it, begins with the letter."""
    start = match.string.rfind("\n", max(0, match.start() - _REACH), match.start()) + 1 if line else 0
    return _LINE_START.fullmatch(match.string, start, match.start()) is not None


def _is_label(match: regex.Match[str]) -> bool:
    text, end = match.string, match.end()
    return bool(_LABEL_END.match(text, end) or _LINE_END.match(text, end))


def _is_alone(match: regex.Match[str]) -> bool:
    """Whether no other letters follow at once, as in "A, B or C" and "(A) (B)"."""
    text, end = match.string, match.end()
    return not (_SEVERAL.match(text, end) or _NEXT_LABEL.match(text, end))


def _is_set_apart(match: regex.Match[str]) -> bool:
    before = match.string[max(0, match.start() - 10) : match.start()].rstrip(" \t")
    marked = not before or before[-1] in "\n([{*_`\"'<,;:—.!?。"
    return marked and _MARK_END.match(match.string, match.end()) is not None


def _first(letters: Sequence[regex.Match[str]]) -> list[regex.Match[str]]:
    """The first letter if the text begins with it and goes on with another word."""
    return [m for m in letters[:1] if _begins(m) and m.string[m.end() : m.end() + 1].isspace()]


def _is_no_word(match: regex.Match[str]) -> bool:
    """Whether the letter is not the word "a" or "I", or another small letter in a text."""
    letter, text = match[0], match.string
    if letter.isupper() and letter not in "AI":
        return True
    marked = match.start() > 0 and text[match.start() - 1] in "([{*_`\"'<$"
    return marked or _NO_WORD_END.match(text, match.end()) is not None
