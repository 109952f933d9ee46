"""Words of texts: what is one word in which script, which numbers are one number, and where signs belong."""

# ruff: noqa: RUF001 (characters that look like others are what is tested)

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdistill.data.words import includes, plain, same_text, spelled, words_of


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Wi-Fi isn't free.", 5),
        ("C++, C#, F# and .NET", 5),
        ("a+b", 3),
        ("A+ (excellent)", 2),
        ("$1,234.50", 2),
        ("-$5 and 5 €", 5),
        ("50 % of 1/2", 3),
        ("12/05/2024", 5),
        ("1.2.3", 1),
        ("72kg", 2),
        ("5G, 3D, 1990s", 3),
        ("12ab34", 1),
        ("snake_case *bold* _it_", 5),
        ("東京タワー", 4),
        ("서울은", 3),
        ("น้ำ", 2),
        ("हिन्दी में", 2),
        ("বাংলা", 1),
        ("القاهرة؟", 1),
        ("שָׁלוֹם", 1),
        ("wi\u00adfi", 1),
        ("\U0001f44d\U0001f3fd", 2),
        ("?! \u2026 \u2014", 0),
    ],
)
def test_how_many_words(text: str, count: int) -> None:
    assert len(words_of(text)) == count, words_of(text)


@pytest.mark.parametrize(
    "ways",
    [
        ("72", "72.0", "7.2e1", "72.00", "７２", "٧٢", "७२"),
        ("1234.5", "1,234.50", "1 234.5", "1'234.5", "1\u202f234.5", "1234.5e0", "١٬٢٣٤٫٥", "1{,}234.5", "1\\,234.5"),
        ("100000", "1,00,000", "100,000", "1e5"),
        ("-5", "\u22125", "\u20135", "-5.0"),
        ("0.5", ".5", "0.50", "5e-1"),
        ("0", "0.0", "-0", "0e5"),
        ("50%", "50 %", "50.0%", "50\\%", "%50", "٥٠٪"),
        ("$5", "5$", "5 $", "$5.00", "$ 5", "\\$5"),
        ("1/2", "½", "1 / 2", "\\frac{1}{2}", "\\dfrac{1}{2}", "\\frac12", "\\tfrac1{2}", "\\dfrac {1} 2"),
        ("10^5", "10⁵", "10^{5}", "$10^{ 5 }$"),
        ("10^-5", "10⁻⁵", "10^{-5}"),
        ("x^n", "$x^{n}$"),
        ("9.8 m/s^2", "9.8m/s²", "9.80 m/s^{2}", "9.8m/s^2"),
        ("3\\sqrt{2}", "3 \\sqrt{2}", "$3 \\sqrt{2}$"),
        ("2\\pi", "$2 \\pi$", "2 \\pi"),
        ("a+\\beta", "a + \\beta"),
        ("x_1", "$x_{1}$", "x_{ 1 }"),
        ("€10^5", "10^5 €", "10⁵€"),
        ("2x - 3", "2x-3", "2x \u2013 3", "$2x$ - $3$", "2x\u22123"),
        ("x^2-1", "x² - 1", "$x^{2}-1$"),
        ("-\\sqrt{3}", "$-\\sqrt{3}$"),
        ("7-3\\sqrt{2}", "7 - 3\\sqrt{2}", "$7 - 3 \\sqrt{2}$"),
        ("x^{-n}", "x^-n"),
        ("50㎡", "50 ㎡", "50m²", "50 m^2"),
        ("3㎨", "3 m/s²"),
        ("№5", "№ 5", "No. 5"),
    ],
    ids=lambda ways: ways[0],
)
def test_ways_to_write_one_number(ways: tuple[str, ...]) -> None:
    for way in ways:
        assert words_of(way) == words_of(ways[0]), way


def test_different_numbers() -> None:
    different = [
        "5",
        "50",
        "50%",
        "-5",
        "5/2",
        "2/5",
        "5.5",
        "5.05",
        "05",
        "5k",
        "5m",
        "5e5",
        "1.2.3",
        "10^5",
        "x^n+1",
        "x^{n+1}",
        "2½",
        "105",
    ]
    for one in different:
        for other in different:
            assert (words_of(one) == words_of(other)) is (one == other), (one, other)


@pytest.mark.parametrize("minus", ["-", " - ", "\u2013", " \u2212 "])
@pytest.mark.parametrize(
    "answer",
    [
        "2x{}3",
        "x{}1",
        "a{}b",
        "1{}x",
        "4{}3i",
        "x^2{}1",
        "10^5{}1",
        "x_1{}2",
        "3(x{}2)",
        "(a+b){}c",
        "(x{}1)(x+1)",
        "f(x){}5",
        "\\pi{}3",
        "2{}\\pi",
        "\\sqrt{{3}}{}1",
        "7{}3\\sqrt{{2}}",
        "2{}3(x+1)",
        "x^{{n{}1}}",
    ],
)
def test_a_minus_is_no_other_sign(answer: str, minus: str) -> None:
    wanted = words_of(answer.format(minus))
    assert includes(words_of(f"So it is ${answer.format('-')}$."), wanted)
    for other in (" + ", "+", " = ", " ", ", "):
        assert not includes(words_of(answer.format(other)), wanted), other


@pytest.mark.parametrize("answer", ["-x", "-\\sqrt{3}", "-\\pi", "-(x+1)", "-f(x)"])
def test_a_minus_before_a_formula_belongs_to_it(answer: str) -> None:
    for sentence in ("{}", "y = {}", "**{}**", "$y={}$", "\\boxed{{{}}}", "({})", "It is {}."):
        assert includes(words_of(sentence.format(answer)), words_of(answer)), sentence
        assert not includes(words_of(sentence.format(answer[1:])), words_of(answer)), sentence


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("5", "pages 3-5"),
        ("3", "pages 3 - 5"),
        ("5", "x-5"),
        ("5", "x - 5"),
        ("16", "an F-16"),
        ("19", "covid-19"),
        ("covid-19", "COVID 19"),
        ("Eiffel Tower", "the Eiffel-Tower"),
        ("Eiffel-Tower", "the Eiffel Tower"),
        ("T-shirt", "a t shirt"),
        ("2019-2021", "2019\u20142021"),
        ("2019 - 2021", "2019\u20132021"),
        ("2024-05-12", "2024/05/12"),
        ("555-1234", "555 1234"),
        ("-5", "x = -5"),
        ("-5", "for x -5"),
        ("-5", "a) -5"),
        ("-5m", "a -5m drop"),
        ("1e-5", "0.00001"),
        ("x", "-x"),
        ("Jay-Z", "Jay Z"),
    ],
)
def test_other_hyphens_are_punctuation(wanted: str, text: str) -> None:
    assert includes(words_of(text), words_of(wanted))


def test_a_huge_number_costs_nothing() -> None:
    began = time.monotonic()
    assert words_of("1e9999") != words_of("1e9998")
    assert words_of("9" * 40) != words_of("9" * 39 + "8")
    assert time.monotonic() - began < 1


def test_signs_that_only_the_text_has_do_not_part_words() -> None:
    assert includes(words_of("> **New** = York"), words_of("New York"))
    assert not includes(words_of("> **New** = York"), words_of("New-York = big"))
    assert not includes(words_of("a b"), words_of("a/b"))


@pytest.mark.parametrize(
    ("wanted", "text", "there"),
    [
        ("5 m", "5m", True),
        ("5m", "5 m", True),
        ("10 m/s", "10m/s", True),
        ("10m/s", "10 m/s", True),
        ("9.8", "9.8m/s^2", True),
        ("9.8 m/s^2", "9.8m/s²", True),
        ("9.8 m/s^2", "9.8 m/s^{2}", True),
        ("5", "5k", False),
        ("5", "5G", False),
        ("3", "3D", False),
        ("5", "5m", False),
        ("5k", "$5 k", True),
        ("5 G", "5g", True),
        ("5", "5k/month", False),
        ("5 m", "5 km", False),
        ("5 m", "5 mm", False),
        ("5 m", "15m", False),
        ("5 m", "-5m", False),
        ("5 m", "5", False),
        ("5 s", "in 5s", True),
        ("1990", "1990s", False),
        ("72 kg", "72kg", True),
        ("12 V", "12V", True),
        ("5 %", "5m", False),
        ("m", "5m", False),
        ("12 V battery", "a 12V battery", True),
        ("007 m", "7m", False),
        ("7 m", "007m", True),
        ("5e3 m", "5000m", True),
        ("0 m", "0m", True),
        ("5 m", "5m/s", True),
        ("x^a", "$x^{a}$", True),
        ("5 и", "5и", True),
        ("5", "5W/m", True),
        ("5", "5m/year", False),
        ("5", "5n/2", False),
        ("5", "5x^2", False),
    ],
)
def test_numbers_with_units_of_one_letter(wanted: str, text: str, there: bool) -> None:
    assert includes(words_of(text), words_of(wanted)) is there


@pytest.mark.parametrize(
    ("wanted", "text", "there"),
    [
        ("10", "10^5", False),
        ("5", "10^5", False),
        ("5", "10⁻⁵", False),
        ("10", "10^-5", False),
        ("2", "x^2", False),
        ("2", "(a+b)^{2}", False),
        ("2", "2^n", False),
        ("2", "m/s²", False),
        ("3", "2^3^4", False),
        ("10^5", "about 10^5 m", True),
        ("10^5 m", "10⁵m", True),
        ("x^2 y", "x^2y", True),
        ("x", "x^2", True),
        ("n", "x^n", True),
        ("x^2", "3 x² + 1", True),
        ("9.8 m", "9.8 m/s^2", True),
        ("2", "x^2 = 2", True),
        ("x 2", "x^2", False),
        ("x_1", "$x_{1}$ is", True),
        ("x_2", "$x_{1}$ and 2", False),
        ("3\\sqrt{2}", "$3 \\sqrt{2}$", True),
        ("5", "5e3", False),
        ("007^2", "7^2", False),
        ("7^2", "007^2", True),
    ],
)
def test_powers_are_other_numbers(wanted: str, text: str, there: bool) -> None:
    assert includes(words_of(text), words_of(wanted)) is there


@pytest.mark.property
@given(st.text(alphabet="aéİßक्ी東ーน้서x01279.,+-#%$€/'&@=_*^()½²① \u200b\u00a0٣", max_size=8))
def test_an_answer_is_found_in_a_sentence(answer: str) -> None:
    wanted = words_of(answer.strip())
    for sentence in ("It is {}.", "**{}**", "({})", "“{}”", "{}, yes", "Answer: {}\n\nBecause", "<b>{}</b>"):
        if wanted:
            assert includes(words_of(sentence.format(answer.strip())), wanted), sentence
    assert same_text(answer, answer)
    assert spelled(answer) == spelled(plain(answer))


@pytest.mark.parametrize(
    "piece",
    [
        "1 ",
        "1,234 ",
        "1/",
        "1'",
        "$",
        "%",
        "+",
        "²",
        "ก",
        "\\text{",
        "_a",
        "٠",
        "-",
        "5m ",
        "\\frac1",
        "^{",
        "_{a",
        "2^",
        "x^2",
        "\\a",
        "x - ",
        "\\a-",
        "5 -",
    ],
)
def test_a_degenerate_reply_takes_no_quadratic_time(piece: str) -> None:
    began = time.monotonic()
    words_of(piece * (20_000 // len(piece)))
    assert time.monotonic() - began < 3
