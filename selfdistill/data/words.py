"""Texts as words, as scorers compare them: Unicode normalised, numbers by their value, with the signs that matter."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\p{Line_Break=SA}"
"""Scripts that write no spaces around words, or, in Korean, only around words with their particles. SA, complex
context, is Unicode's name for Thai, Lao, Khmer, Burmese and the like."""
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^\s{UNSPACED}]+")
"""A word of a text as it stands: it ends at white space; in scripts without spaces each character is one."""
_CHARACTER = regex.compile(rf"[{UNSPACED}]\p{{M}}*")
_IN_WORD = rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]"
_LETTER = rf"[[\p{{L}}\p{{M}}]--[{UNSPACED}]]"

# Format characters (soft hyphens, zero-width spaces, marks of direction), variation selectors, the Arabic tatweel.
_INVISIBLE = regex.compile(r"[\p{Cf}\uFE00-\uFE0F\u0640]+")
_TRADE_MARKS = regex.compile("[\u2122\u00ae\u00a9\u2120]")  # NFKC would make letters of them
_POWER = regex.compile(r"(?<=[\p{L}\p{Nd})\]}])(?=[\u00b2\u00b3\u00b9\u2070\u2074-\u207b])")
_SQUARED = {  # NFKC would make m2 of m²
    code: "".join(chr(int(part, 16)) for part in unicodedata.decomposition(chr(code)).split()[1:])
    for code in (*range(0x339F, 0x33A7), 0x33A8, 0x33AF)
}
_JOINED = {**_SQUARED, 0x2116: "No "}
_TOUCHING = regex.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])|(?<=[\u2080-\u2089])(?=\d)")  # 2½ is not 21/2
_OTHER_DIGIT = regex.compile(r"(?![0-9])\p{Nd}")
_ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("\u2044\u2215", "/"),
        "\u066a": "%",  # Arabic percent sign, decimal and thousands separators
        "\u066b": ".",
        "\u066c": ",",
    }
)

_GROUPS = regex.compile(
    rf"""
    (?=\d)(?<![\d.,]|{_IN_WORD})
    (?: \d{{1,3}}(?:,\d{{3}})+(?!,?\d) | \d{{1,2}}(?:,\d\d)+,\d{{3}}(?!,?\d)
    | (?<!\d['\ ]) \d{{1,3}}(?:(['\ ])\d{{3}}(?:\1\d{{3}})*(?!\1?\d)) )
    """,
    regex.VERSION1 | regex.VERBOSE,
)
"""Digits with thousands separators: commas (Indian groups, too), apostrophes or spaces."""

_OPERAND_ENDS = rf"(?:(?<!{_LETTER}){_LETTER}|\\\p{{L}}+|[)\]}}]|[\^_]-?[\d.]+)"  # of x, 2\pi, (a+b) or x^2
_OPERAND_BEGINS = rf"(?:{_LETTER}(?!{_IN_WORD})|\\\p{{L}}|\()"
_SUBTRACTS = regex.compile(
    rf"""
    (?<=(?:\d|{_OPERAND_ENDS})\s*) - (?=\s*{_OPERAND_BEGINS})
    | (?<![\p{{L}}\p{{N}}\^]) - (?={_OPERAND_BEGINS})
    | (?<!\de) (?:(?<=\s)-(?=\s)|(?<=\S)-)  # 1e-5 is a number, and so is -5 in x: -5
      (?: (?<={_OPERAND_ENDS}\s*-)(?=\s*\d) | (?<=\d\s*-)(?=\s*\d+(?:\.\d+)?\s?{_OPERAND_BEGINS}) )
    """,
    regex.VERSION1 | regex.VERBOSE,
)
"""A minus of a formula. Hyphens between words or plain numbers, as in ranges and dates, are punctuation."""
_LATEX = (
    (regex.compile(r"(?<![\\$])(\$\$?)(?=[^\s$])([^$\n]+?)(?<=\S)\1(?![\d$])"), r" \2 "),  # $x$, not $5 to $6
    (regex.compile(r"\\[cdt]?frac\s*(?|\{\s*(\d+)\s*\}|(\d))\s*(?|\{\s*(\d+)\s*\}|(\d))"), r"\1/\2"),
    (regex.compile(r"(?<=[\^_])\{\s*(-?[\p{L}\p{N}.]+)\s*\}"), r"\1"),  # x^{n+1} is not x^n+1
    (regex.compile(r"\\(?:text|math|box|fbox|operatorname)\w*\s*(?=\{)"), ""),
    (regex.compile(r"(?<=\d)(?:\\[,!;:]|\{,\})(?=\d{3})"), ","),
    (regex.compile(r"\\([%$#&_{}])"), r"\1"),
    (_SUBTRACTS, "\u2212"),
    (regex.compile(r"(?<=[\p{L}\p{N}])\\(?=\p{L})"), " "),  # 2\pi is 2 \pi, but a+\pi is not the grade a+
    (regex.compile(r"\\(?=\p{L})"), ""),
)
_SIGN_BEFORE_CURRENCY = regex.compile(r"-(\p{Sc})\s?(?=\d)")
_CURRENCY_AFTER = regex.compile(
    rf"(?=[-\d])(?<![.\^]|{_IN_WORD})(-?\d+(?:\.\d+)*(?:\^-?\d+)?)\s?(\p{{Sc}})(?!\d)", regex.VERSION1
)
_PERCENT_BEFORE = regex.compile(r"(?<!\d\s?)%(\d+(?:\.\d+)?)")

_MINUS = r"(?:(?<![\p{L}\p{N})\]])-)?"
_POWER_OF_TEN = rf"(?:e[+-]?\d{{1,4}}(?!{_IN_WORD}))?"
_COMPOUND = r"(?:m/s|m\^|[jlnvw]/\p{L})"  # units such as m/s and W/m; 5m and 5k alone may be millions, thousands
_TOKEN = regex.compile(
    rf"""
    [a-z]++ (?=[\s.,;:!?*)"'])  # most words, at once
    | (?=[-\d]) (?<![/.]|{_IN_WORD}) (?P<above>{_MINUS}\d+)\s?/\s?(?P<below>\d+) (?!\s?/|\.\d|{_IN_WORD})
    | (?=[-.\d]) (?<!{_IN_WORD}) (?P<number>(?>{_MINUS}(?:\d+(?:\.\d+)*|(?<![.)\]])\.\d+){_POWER_OF_TEN}))
      (?: (?={_COMPOUND})
        | (?P<unit>{_LETTER}(?!{_IN_WORD})) | \s?(?P<percent>[%\u2030]) | (?!{_IN_WORD}) | (?={_LETTER}{{2,}}(?!\d)) )
    | [[{UNSPACED}]--\p{{M}}][\p{{M}}\u30fc]*
    | (?:(?<![.)\]]|{_IN_WORD})\.(?=\p{{L}}))? {_IN_WORD}+ (?:\+\+|\#|\+(?!{_IN_WORD}|[+(\\]))?
    | [[\p{{S}}\#%&@/]--[\^`~|]]
    | (?<=[\p{{L}}\p{{N}}])[*_~|\\](?=[\p{{L}}\p{{N}}-])
    | (?<=[\p{{L}}\p{{N}})\]}}])\^(?=[\p{{L}}\p{{N}}-])
    """,
    regex.VERSION1 | regex.VERBOSE,
)
_VALUE = r"-?\d[\d.]*(?:e-?\d+)?"
_WITH_UNIT = regex.compile(rf"(?=[-^\d])((?:{_VALUE})?(?:\^{_VALUE})*)(\p{{L}})")
_ALONE = regex.compile(r"(-?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d{1,4})?)(?:\s?([%\u2030]))?")
_PADDED = regex.compile(r"-?0\d")
_CODE = regex.compile(r"(-?)0+(\d[\d.]*)(.*)")


def plain(text: str) -> str:
    """The text with one spelling for characters that look or mean the same; white space and letter case stay.

    NFKC with ASCII digits, straight quotes and one hyphen; no invisible characters. Powers become ``^2``, and a
    fraction keeps apart from the number before it, a number from the sign No. before it. Accents and vowel signs stay.
    """
    if text.isascii():
        return text
    text = _TOUCHING.sub(" ", _POWER.sub("^", _INVISIBLE.sub("", text.translate(_JOINED))))
    text = unicodedata.normalize("NFKC", text).translate(_ALIKE)
    return _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)


def spaced(text: str) -> str:
    """The text with spaces around each character of a script without spaces."""
    return _CHARACTER.sub(r" \g<0> ", text)


def words_of(text: str) -> list[str]:
    """The words of a text as :func:`includes` compares them, in lower case (casefold).

    - A number, with its minus and percent sign, as its value: ``1,234.50`` and ``1234.5`` are one word, and so are
      ``1/2``, ``1.2.3``, ``5k`` and ``10^5``. In ``x^2`` the exponent is one, ``^2``. A number that begins with 0 is a
      code and stays as written. The point separates decimals; commas, apostrophes and spaces separate thousands.
    - A run of letters, digits and their marks, with what a name begins or ends with: ``.net``, ``c++``, ``c#``, ``a+``.
    - A character of a script without spaces, with its marks.
    - A minus of a formula, as in ``2x - 3`` and ``-\\sqrt{3}``.
    - Any other sign that is no punctuation: a currency (always before its number), ``+ = / & @ #`` and symbols; ``* _ ^
      ~ |`` only between letters or digits, and ``\\`` only before a digit, for elsewhere they are Markdown or LaTeX.
    """
    text = unicodedata.normalize("NFKC", plain(_TRADE_MARKS.sub(" ", text)).casefold())
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _SIGN_BEFORE_CURRENCY.sub(r"\1-", _ungrouped(text))
    text = _PERCENT_BEFORE.sub(r"\1%", _CURRENCY_AFTER.sub(r"\2\1", text))
    words: list[str] = []
    tokens: list[regex.Match[str]] = []
    for token in _TOKEN.finditer(text):
        words.append(_word(token))
        tokens = [*tokens[-2:], token]
        if size := _size_of_power(tokens):
            words[-size:] = ["".join(words[-size:])]
    return words


def _size_of_power(tokens: Sequence[regex.Match[str]]) -> int:
    """How many of the last tokens make one word: 3 in 10^5 and 2^n, 2 in x^2, whose exponent it is; 0 if none do."""
    if len(tokens) < 2 or tokens[-2][0] != "^" or tokens[-2].end() != tokens[-1].start():
        return 0
    base = tokens[0] if len(tokens) > 2 and tokens[0].end() == tokens[1].start() else None
    if base and base.lastgroup and base["unit"] is None:
        return 3
    return 2 if tokens[-1].lastgroup else 0


def _word(token: regex.Match[str]) -> str:
    if token.lastgroup is None:
        return token[0]
    if token["above"]:
        return f"{_value(token['above'])}/{_value(token['below'])}"
    return _value(token["number"]) + (token["unit"] or token["percent"] or "")


def includes(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the wanted words stand among the words, one after the other.

    Signs that are none of the wanted words do not matter. A code such as 007 is also the number 7, but 7 is not 007.
    A number and a letter are also one word, and the other way round: ``5 m`` and ``5m``.
    """
    kept = [word for word in words if word[0].isalnum() or not _is_sign(word) or word in wanted]
    apart = _units_apart(wanted)
    return _stands_in(kept, wanted) or (len(apart) > 1 and _stands_in(_units_apart(kept), apart))


def _stands_in(words: Sequence[str], wanted: Sequence[str]) -> bool:
    size = len(wanted)
    return any(
        _same(words[start], wanted[0]) and all(map(_same, words[start : start + size], wanted))
        for start in range(len(words) - size + 1)
    )


def _units_apart(words: Sequence[str]) -> list[str]:
    """The words with each number and the letter behind it as two words."""
    apart: list[str] = []
    for word in words:
        with_unit = _WITH_UNIT.fullmatch(word)
        apart.extend(with_unit.groups() if with_unit else (word,))
    return apart


def same_text(one: str, wanted: str) -> bool:
    """Whether two texts are equal, white space and spelling (:func:`plain`) aside, or are the same number."""
    number = _number(wanted)
    if number is not None and (other := _number(one)) is not None:
        return _same(other, number)
    return plain(one).split() == plain(wanted).split()


def spelled(text: str) -> str:
    """The same text for the same number; else :func:`plain` text."""
    number = _number(text)
    return plain(text) if number is None else number


def _number(text: str) -> str | None:
    """The value of a text that is a number and nothing else."""
    alone = _ALONE.fullmatch(_ungrouped(plain(text).strip().casefold()))
    return None if alone is None else _value(alone[1]) + (alone[2] or "")


def _ungrouped(text: str) -> str:
    return _GROUPS.sub(lambda number: regex.sub("[,' ]", "", number[0]), text)


def _value(number: str) -> str:
    """One text for all ways to write the number, such as 12345e-1; a code or a version as it is."""
    if _PADDED.match(number) or number.count(".") > 1:
        return number
    sign, number = ("-", number[1:]) if number.startswith("-") else ("", number)
    mantissa, _, power = number.partition("e")
    whole, _, part = mantissa.partition(".")
    digits = (whole + part).rstrip("0")
    if not digits.strip("0"):
        return "0"
    exponent = int(power or 0) - len(part) + len(whole + part) - len(digits)
    return f"{sign}{digits.lstrip('0')}e{exponent}"


def _same(word: str, wanted: str) -> bool:
    if word == wanted or not word.startswith(("0", "-0")):
        return word == wanted
    code = _CODE.fullmatch(word)
    return code is not None and not _PADDED.match(wanted) and _value(code[1] + code[2]) + code[3] == wanted


def _is_sign(word: str) -> bool:
    return not any(map(str.isalnum, word))
