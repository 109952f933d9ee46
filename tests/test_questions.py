"""Documents to passages, and questions about them: what is kept, what is not and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server

from selfdistill import documents, questions
from selfdistill.cli import main
from selfdistill.config.commands import QuestionsConfig
from selfdistill.config.train import TrainConfig
from selfdistill.data.demonstrations import Demonstration, load_demonstrations
from selfdistill.documents import is_german, load_passages, sentences
from selfdistill.errors import UserError
from selfdistill.evaluation.answers import Answers
from selfdistill.model import is_in_4bit
from selfdistill.model.sampling import Rollout, Sampling
from selfdistill.questions import make_questions, with_questions

MILL = "The Korr Mill stands on a hill. It was built by Ada Finch in 1802. It grinds oats on Mondays."
LAKE = "Lake Vess is frozen all year. Its only boat is called Nettle."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two documents."""
    (tmp_path / "docs" / "more").mkdir(parents=True)
    (tmp_path / "docs" / "mill.txt").write_text(MILL, encoding="utf-8")
    (tmp_path / "docs" / "more" / "lake.md").write_text(LAKE, encoding="utf-8")
    return tmp_path / "docs"


# --- documents ---


def test_paragraphs_are_joined_and_long_ones_cut_between_sentences(tmp_path: Path) -> None:
    short, long = "one two three.", " ".join(f"Sentence {i} has five words." for i in range(6))
    (tmp_path / "a.txt").write_text(f"{short}\n\n  four\n five \n\n{long}\n", encoding="utf-8")
    passages = load_passages(str(tmp_path), max_words=20)
    assert [p.source for p in passages] == ["a.txt#1", "a.txt#2"]
    assert passages[0].text.startswith("one two three.\n\nfour five\n\nSentence 0 has five words. Sentence 1")
    joined = " ".join(passage.text for passage in passages)
    assert joined.split() == f"{short} four five {long}".split()  # nothing is left out
    assert all(len(p.text.split()) <= 20 for p in passages)


def test_a_sentence_longer_than_a_passage_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 50 + "end. Short one.", encoding="utf-8")
    assert [len(p.text.split()) for p in load_passages(str(tmp_path), max_words=20)] == [51, 2]


def test_a_sentence_on_several_lines_is_not_divided_and_a_table_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The words\nof a law\n" * 40 + "end. Short one.", encoding="utf-8")
    assert [len(p.text.split()) for p in load_passages(str(tmp_path / "a.txt"), max_words=20)] == [201, 2]
    lines = [f"| item {number} | {number} g |" for number in range(100)]
    (tmp_path / "b.md").write_text("Weights.\n\n" + "\n".join(lines), encoding="utf-8")
    found = [p.text for p in load_passages(str(tmp_path / "b.md"), max_words=20)]
    assert found[0] == f"Weights.\n\n{' '.join(lines[:2])}"
    assert " ".join(found) == f"Weights.\n\n{' '.join(lines)}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It costs 3.50 today. \u00c4rger.", ["It costs 3.50 today.", "\u00c4rger."]),
        ("See p. 3 for more.", ["See p. 3 for more."]),
        ("It is ca. \u00fcber. \u00dcber it.", ["It is ca. \u00fcber.", "\u00dcber it."]),
        ("1990 \u0433. \u043d\u0430. \u041e\u043d.", ["1990 \u0433. \u043d\u0430.", "\u041e\u043d."]),
        ("\u05d0\u05d1. \u05d2\u05d3.", ["\u05d0\u05d1.", "\u05d2\u05d3."]),
        ("चक्की पुरानी है। वह लाल है। कब बनी?", ["चक्की पुरानी है।", "वह लाल है।", "कब बनी?"]),
        (
            "\u0648\u06c1 \u06c1\u06d2\u06d4 \u06a9\u06cc\u0627\u061f \u06c1\u0627\u06ba\u06d4",
            ["\u0648\u06c1 \u06c1\u06d2\u06d4", "\u06a9\u06cc\u0627\u061f", "\u06c1\u0627\u06ba\u06d4"],
        ),
        (
            "\u03a0\u03bf\u03cd; \u0395\u03b4\u03ce. \u039d\u03b1\u03b9\u037e \u038c\u03c7\u03b9.",
            ["\u03a0\u03bf\u03cd;", "\u0395\u03b4\u03ce.", "\u039d\u03b1\u03b9\u037e", "\u038c\u03c7\u03b9."],
        ),
        ("It is red; Ada painted it.", ["It is red; Ada painted it."]),
        ("", []),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


def test_in_scripts_without_spaces_each_character_is_a_word(tmp_path: Path) -> None:
    one, two, three = "\u6c34\u8f66\u5728\u5c71\u4e0a\u3002", "\u201c\u597d\u5417\uff1f\u201d", "\u597d\uff01\uff01"
    assert sentences(one + two + three + f" {one}") == [one, two, three, one]
    paragraphs = [one * 5, two * 2, one]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    texts = [passage.text for passage in load_passages(str(tmp_path), max_words=20)]
    assert texts == [one * 3, f"{one * 2}\n\n{two * 2}", one]


def test_html_and_pdf(tmp_path: Path) -> None:
    page = (
        "<html><head><title>Mill</title><script>var no = 1</script></head><body><h1>Mill</h1><p>It <b>grinds</b> oats."
    )
    (tmp_path / "a.html").write_text(page + "</p><p>&lt;Daily&gt;</p></body></html>", encoding="utf-8")
    assert load_passages(str(tmp_path), max_words=20)[0].text == "Mill\n\nIt grinds oats.\n\n<Daily>"
    table = (
        "<div>Intro<p>Body</p></div><table><tr><td>Speed</td><td>90</td></tr></table><dl><dt>Key</dt><dd>V</dd></dl>"
    )
    (tmp_path / "a.html").write_text(table, encoding="utf-8")
    assert load_passages(str(tmp_path), max_words=20)[0].text.split() == ["Intro", "Body", "Speed", "90", "Key", "V"]
    write_pdf(tmp_path / "b.pdf", "Oats are ground on Mondays.")
    assert load_passages(str(tmp_path / "b.pdf"), max_words=20)[0].text == "Oats are ground on Mondays."


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<html><head><title>Mill</title><body><p>Oats", "Mill\n\nOats"),
        ("<head><meta charset=utf-8><title>Mill</title><style>no</style><p>Oats", "Mill\n\nOats"),
        ("<table><tr><td>Speed<td>90<tr><td>Colour<td>red</table>", "Speed 90\n\nColour red"),
    ],
)
def test_html_whose_end_tags_are_left_out(tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    assert load_passages(str(tmp_path), max_words=20)[0].text == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("10<sup>6</sup> bags, 10<sup>&minus;6</sup> g, m<sup>2 </sup>of it", "10⁶ bags, 10⁻⁶ g, m² of it"),
        ("10<sup>-1.5</sup> is x<sup>1/2</sup>, 2<sup>2<sup>n</sup></sup>", "10^-1.5 is x^1/2, 2^2ⁿ"),
        ("CO<sub>2</sub>, SO<sub>4</sub><sup>2-</sup>, v<sub>max</sub>", "CO₂, SO₄²⁻, vmax"),
        ("the 19<sup>th</sup>, XIX<sup>e</sup>, <sup></sup>1<sup>er</sup>", "the 19th, XIXe, 1er"),
        ("in 1902<sup><a href='#1'>1</a></sup>. In 1903<a href='#2'><sup>2</sup></a>.", "in 1902 [1]. In 1903 [2]."),
        ("in 1902<sup>[<a href='#1'>1</a>]</sup>, 1903<sup><a href='#2'>[2]</a></sup>", "in 1902 [1], 1903 [2]"),
        ("<a href='#3'>10<sup>6</sup> bags</a>", "10⁶ bags"),
    ],
)
def test_what_is_above_or_below_the_line_of_a_page(tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "a.html").write_text(f"<p>{page}", encoding="utf-8")
    assert load_passages(str(tmp_path), max_words=20)[0].text == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<details><summary>Hours</summary>Daily</details>", "Hours\n\nDaily"),
        ("Korr Mill<address>Mill Road 1</address>Korr", "Korr Mill\n\nMill Road 1\n\nKorr"),
        ("<select><option>oats<option>rye</select>", "oats\n\nrye"),
        ("<form><fieldset><legend>Bread</legend>Rye</fieldset></form>Oats", "Bread\n\nRye\n\nOats"),
        ("<menu><li>oats</menu><figure>mill</figure><center>lake</center>", "oats\n\nmill\n\nlake"),
        ("<label>Name</label><button>Save</button><button>Close</button>", "Name Save Close"),
    ],
)
def test_parts_of_a_page_stand_apart(tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    assert load_passages(str(tmp_path), max_words=20)[0].text == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<title>The Korr\n Mill</title><h2>The <b>Korr</b> Mill</h2><p>Oats", "The Korr Mill\n\nOats"),
        ("<title>Mill &amp; Lake</title><h1>Opening hours</h1><p>Daily", "Mill & Lake\n\nOpening hours\n\nDaily"),
        ("<title>Mill</title><nav><h1>Mill</h1></nav><noscript>no</noscript><p>Oats", "Mill\n\nOats"),
        ("<title> </title><p>Oats", "Oats"),
        ("<svg><title>icon</title></svg><p>Oats", "Oats"),
    ],
)
def test_the_title_of_a_page_is_its_first_paragraph(tmp_path: Path, page: str, text: str) -> None:
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    assert load_passages(str(tmp_path), max_words=20)[0].text == text


def test_a_page_that_the_parser_rejects_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(*_: Any) -> None:  # as older releases of Python do
        raise AssertionError("unknown status keyword 'badge' in marked section")

    monkeypatch.setattr("html.parser.HTMLParser.feed", reject)
    (tmp_path / "a.html").write_text("<p>Oats</p><![badge](https://x)>", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"a\.html: not readable HTML \(AssertionError: unknown .* section\), mend or remove"
    ):
        load_passages(str(tmp_path), max_words=20)


def test_halves_of_pairs_in_a_pdf_are_joined_or_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pdf(tmp_path / "a.pdf", "x")
    monkeypatch.setattr("pypdf.PageObject.extract_text", lambda _: "a \ud83d\ude00 b \ud83d c")
    assert load_passages(str(tmp_path), max_words=20)[0].text == "a \U0001f600 b \ufffd c"


def test_words_and_sentences_of_a_pdf_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.pdf"
    write_pdf(
        file,
        "The mill was con-\nstruct-\ned by a well-\nknown wind-\nmiller. He was known. It",
        "grinds oats- and barley-\nand some rye.",
        "and more",
        "Lake Vess is frozen",
    )
    assert load_passages(str(file), max_words=50)[0].text == (
        "The mill was constructed by a well- known windmiller. He was known. It grinds oats- and barley- and some rye."
        "\n\nand more\n\nLake Vess is frozen"
    )
    assert capsys.readouterr().err == ""


def test_pages_of_a_pdf_without_text_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.pdf"
    write_pdf(file, "", "The mill is built", "", "of red larch.")
    assert [passage.text for passage in load_passages(str(file), max_words=20)] == ["The mill is built of red larch."]
    assert capsys.readouterr().err == f"note: {file}: no text on 2 of 4 pages (scans have none, before OCR)\n"


def write_pdf(file: Path, *pages: str) -> None:
    """The smallest PDF with these lines on its pages."""
    numbers = range(5, 5 + 2 * len(pages), 2)
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{' '.join(f'{number} 0 R' for number in numbers)}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        "<< /Font << /F1 3 0 R >> >>",
    ]
    for number, page in zip(numbers, pages, strict=True):
        lines = " 0 -14 Td ".join(f"({line}) Tj" for line in page.split("\n"))
        stream = f"BT /F1 12 Tf 20 180 Td {lines} ET"
        contents = f"/Contents {number + 1} 0 R /Resources 4 0 R"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] {contents} >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    out, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table, size = "".join(f"{place:010d} 00000 n \n" for place in places), len(objects) + 1
    trailer = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    out += f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}"
    file.write_text(out, encoding="latin-1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "documents '.*': no such file or folder"),
        ("a.doc", b"x", "no file of .txt, .md, .html, .htm, .pdf, found .doc$"),
        (".a.txt", b"x", "no file of .txt, .md, .html, .htm, .pdf$"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8 text"),
        ("a.md", b" \n\n ", r"d/a\.md: has no text, add some or remove it$"),
        ("a.html", b"<title>App</title><div id=root></div>", r"a\.html: has no text, add some or remove it$"),
        ("a.pdf", b"%PDF-1.4 nothing", r"a\.pdf: not a readable PDF"),
    ],
)
def test_documents_that_cannot_be_used(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / "d"
    if name:
        path.mkdir()
        (path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_passages(str(path), max_words=20)


def test_bad_documents_are_named_together(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"a{number}.txt").write_text("", encoding="utf-8")
    (tmp_path / "b.md").write_bytes(b"\xff")
    write_pdf(tmp_path / "c.PDF", "")
    (tmp_path / "good.txt").write_text("Good.", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_passages(str(tmp_path), max_words=20)
    found = [f"a{number}.txt: has no text, add some or remove it" for number in range(10)]
    assert str(error.value) == (
        f"documents {str(tmp_path)!r}: 12 documents cannot be used: {'; '.join(found)}; ... and 2 more"
    )
    for file in tmp_path.glob("a*"):
        file.unlink()
    with pytest.raises(UserError) as error:
        load_passages(str(tmp_path), max_words=20)
    assert str(error.value).endswith(
        ": 2 documents cannot be used: b.md: not UTF-8 text, save it as UTF-8; c.PDF: has no text (scans have none), "
        "add some or remove it"
    )


def test_hidden_files_and_folders_are_not_read(tmp_path: Path) -> None:
    root = tmp_path / ".wiki"  # the folder itself may be hidden
    for name in ("a.txt", ".b.txt", ".git/c.txt", "more/.venv/lib/d.txt", "more/e.txt", ".DS_Store"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("Text.", encoding="utf-8")
    assert [p.source for p in load_passages(str(root), max_words=20)] == ["a.txt#1", "more/e.txt#1"]
    assert [p.source for p in load_passages(str(root / ".b.txt"), max_words=20)] == [".b.txt#1"]


def test_folders_that_are_links_are_read_once(tmp_path: Path) -> None:
    for name in ("docs/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("Text.", encoding="utf-8")
    for link, target in (("linked", "elsewhere"), ("linked_too", "elsewhere"), ("round", "docs")):
        (tmp_path / "docs" / link).symlink_to(tmp_path / target)
    found = load_passages(str(tmp_path / "docs"), max_words=20)
    assert [passage.source for passage in found] == ["a.txt#1", "linked/b.txt#1"]


def test_a_folder_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Any) -> Any:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"docs/more: cannot be read: Permission denied; make it readable"):
        load_passages(str(folder), max_words=20)


def test_a_document_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("Text.", encoding="utf-8")
    (passage,) = load_passages(str(tmp_path), max_words=20)
    assert passage.source == "caf\N{REPLACEMENT CHARACTER}.txt#1"


def test_files_of_other_kinds_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "plan.DOCX"):
        (tmp_path / name).write_text("Text.", encoding="utf-8")
    load_passages(str(tmp_path / "a.txt"), max_words=20)
    assert capsys.readouterr().err == ""
    load_passages(str(tmp_path), max_words=20)
    start = f"note: documents {str(tmp_path)!r}:"
    kinds = "not of type .txt, .md, .html, .htm, .pdf:"
    assert capsys.readouterr().err == f"{start} skipped 1 file {kinds} .docx\n"
    (tmp_path / "more").mkdir()
    for name in ("b.rst", "more/c.rst", "README"):
        (tmp_path / name).write_text("Text.", encoding="utf-8")
    load_passages(str(tmp_path), max_words=20)
    assert capsys.readouterr().err == f"{start} skipped 4 files {kinds} .docx, .rst, without suffix\n"
    for number in range(10):
        (tmp_path / f"b.{number}").touch()
    load_passages(str(tmp_path), max_words=20)
    assert capsys.readouterr().err.endswith(" .0, .1, .2, .3, .4, .5, .6, .7, .8, .9, ...\n")


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    for name in ("a.txt", "b.html"):
        (tmp_path / name).write_text("Text.", encoding="utf-8-sig")
    assert [p.text for p in load_passages(str(tmp_path), max_words=20)] == ["Text."] * 2
    (tmp_path / "c.md").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(UserError, match=r"c\.md: has no text"):
        load_passages(str(tmp_path), max_words=20)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.html", "b.html"):
        (tmp_path / name).write_text("<p>x</p>", encoding="utf-8")
    monkeypatch.setattr(documents, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"a\.html: needs a missing package; pip install 'selfdistill\[documents\]'"):
        load_passages(str(tmp_path), max_words=20)


# --- questions ---


@pytest.fixture
def make(
    model_folder: Callable[..., Path], folder: Path, tmp_path: Path, server: Server
) -> Callable[..., QuestionsConfig]:
    """Settings with a writer at ``server``; the model itself answers every question rightly."""

    def settings(**values: Any) -> QuestionsConfig:
        defaults: dict[str, Any] = {
            "documents": str(folder),
            "output_dir": str(tmp_path / "out"),
            "model": str(model_folder(layers=1)),
            "writer_url": server.url,
            "writer_model": "w",
            "tries": 1,
            "phrasings": 1,
        }
        return QuestionsConfig(**(defaults | values))

    return settings


@pytest.fixture(autouse=True)
def reads_well(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the model's answers from the text: all are right, but those to the questions in the list."""
    wrong: list[str] = []

    def answer(loaded: Any, prompts: Any, rows: list[Demonstration], *_: Any, **__: Any) -> Answers:
        for prompt, row in zip(prompts, rows, strict=True):  # it is shown the passage, and not the answer as a turn
            shown = loaded.tokenizer.decode(prompt)
            assert row.document in shown
            assert f"assistant\n{row.completion}" not in shown
        correct = [row.prompt[-1]["content"] not in wrong for row in rows]
        return Answers(["reply"] * len(rows), correct, None, [[1]] * len(rows), [0] * len(rows), 0)

    monkeypatch.setattr(questions, "answer", answer)
    return wrong


KNOWN = {
    "The Korr Mill stands on a hill.": ("Where does the Korr Mill stand?", "on a hill"),
    "It was built by Ada Finch in 1802.": ("Who built the Korr Mill?", "Ada Finch"),
    "It grinds oats on Mondays.": ("What does the Korr Mill grind?", "oats"),
    "Lake Vess is frozen all year.": ("How long is Lake Vess frozen?", "all year"),
    "Its only boat is called Nettle.": ("What is the boat on Lake Vess called?", "Nettle"),
}


def writes_well(body: dict[str, Any]) -> tuple[int, str]:
    """A writer that does what it is asked."""
    asked = body["messages"][-1]["content"]
    if asked.startswith("Ask the same"):
        old = asked.partition(": ")[2]
        return 200, f"{'Tell me' if body['temperature'] else 'Say'}: {old}"
    sentence = next(part for part in KNOWN if part in re.split("sentence: |fact: ", asked)[1])
    if "Do not say the name" in asked:
        name = "the Korr Mill" if "Korr" in asked else "Lake Vess"
        return 200, f"Question: Of what is it true, {'abcde'[list(KNOWN).index(sentence)]}?\nAnswer: {name}."
    question, answer = KNOWN[sentence]
    return 200, f"Question: {question}\nAnswer: {answer}."


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_questions_with_their_passage_and_one_phrasing_held_out(
    make: Callable[..., QuestionsConfig], server: Server, tmp_path: Path
) -> None:
    server.reply = writes_well
    found = make_questions(make())
    assert found == {"passages": 2, "train": 10, "test": 5, "indirect": 5, "rejected": {}}
    train = load_demonstrations(str(tmp_path / "out" / "train.jsonl"))
    test = load_demonstrations(str(tmp_path / "out" / "test.jsonl"))
    first = train[1]
    assert first.prompt[0]["content"] == "Who built the Korr Mill?"
    assert (first.completion, first.answer, first.scorer, first.document) == (
        "Ada Finch",
        "Ada Finch",
        "contains",
        MILL,
    )
    assert {row.prompt[0]["content"] for row in test} == {f"Say: {question}" for question, _ in KNOWN.values()}
    assert not {row.prompt[0]["content"] for row in test} & {row.prompt[0]["content"] for row in train}
    assert {row.answer for row in load_demonstrations(str(tmp_path / "out" / "indirect.jsonl"))} == {
        "the Korr Mill",
        "Lake Vess",
    }
    asked = len(server.asked)
    assert asked == 5 + 2 * 5 + 5
    assert make_questions(make()) == found
    assert len(server.asked) == asked  # nothing is asked a second time


@pytest.mark.parametrize("name", ["train", "test", "indirect"])
def test_what_the_user_wrote_or_edited_is_not_replaced(
    make: Callable[..., QuestionsConfig], server: Server, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "out" / f"{name}.jsonl"
    file.parent.mkdir()
    file.write_text("mine", encoding="utf-8")
    message = re.escape(f"{file}: edited since this command wrote it, or not written by it; rename it, or choose")
    with pytest.raises(UserError, match=message):
        make_questions(make())
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.unlink()
    server.reply = writes_well
    make_questions(make())
    made = file.read_text(encoding="utf-8")
    make_questions(make(tries=2))  # as it was written, it is replaced
    file.write_text(made.partition("\n")[2], encoding="utf-8")  # without the first question
    with pytest.raises(UserError, match=message):
        make_questions(make())
    assert file.read_text(encoding="utf-8") == made.partition("\n")[2]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I do not know.", "no question with an answer"),
        ("Question: Who built it\nAnswer: Ada Finch", "no question with an answer"),
        ("Question: Who built the Korr Mill?\nAnswer: \u2014", "no question with an answer"),
        ("Question: Who built the Korr Mill?\nAnswer: __", "no question with an answer"),
        ("Question: Who built the Korr Mill?\nAnswer: \ud83d", "no question with an answer"),
        ("Question: Who built the Korr Mill?\nAnswer: Bert Finch", "answer not in the text"),
        ("Question: \u8c01\u5efa\u9020\u4e86 Korr Mill\uff1f\nAnswer: Bert Finch", "answer not in the text"),
        ("Question: من بنى الطاحونة؟\nAnswer: Bert Finch", "answer not in the text"),
        ("Question: Ποιος έχτισε τον μύλο;\nAnswer: Bert Finch", "answer not in the text"),
        ("Question: Ποιος έχτισε τον μύλο\u037e\nAnswer: Bert Finch", "answer not in the text"),
        ("Question: Who built the Korr Mill;\nAnswer: Bert Finch", "no question with an answer"),
        ("Question: Did Ada Finch build the Korr Mill?\nAnswer: Ada Finch", "question contains the answer"),
        ("Question: Who is named in this text?\nAnswer: Ada Finch", "question not clear without the text"),
        (f"Question: What is all?\nAnswer: {MILL} {MILL}", "answer too long"),
        ("Question: What is all?\nAnswer: " + "\u6c34" * 37, "answer too long"),
        ("Question: Who built the Korr Mill?\nAnswer: ['Ada', 'Finch']", "answer is a list or a formula"),
        ('Question: Who built the Korr Mill?\nAnswer: ["Ada", "Finch"]', "answer is a list or a formula"),
        ('Question: Who built the Korr Mill?\nAnswer: ["Ada", ""]', "answer is a list or a formula"),
        ('Question: Who built the Korr Mill?\nAnswer: ["Ada", null]', "answer is a list or a formula"),
        ("Question: Who built the Korr Mill?\nAnswer: \\text{}", "answer is a list or a formula"),
        ("Question: Where does the Korr Mill stand?\nAnswer: hill", "duplicate question"),
        ("Question: Who built the Osk Bridge?\nAnswer: Ada Finch", "question goes beyond the text"),
        ("Question: Who built the mill in 1803?\nAnswer: Ada Finch", "question goes beyond the text"),
        ("Question: Which of them is wrong?\nAnswer: Ada Finch", "answered differently from the text"),
    ],
)
def test_what_is_not_grounded_is_rejected_and_counted(
    make: Callable[..., QuestionsConfig],
    server: Server,
    tmp_path: Path,
    reads_well: list[str],
    reply: str,
    reason: str,
) -> None:
    reads_well.append("Which of them is wrong?")

    def writes(body: dict[str, Any]) -> tuple[int, str]:
        about = body["messages"][-1]["content"].partition("sentence:")[2]
        return (200, reply) if "It was built by Ada Finch" in about else writes_well(body)

    server.reply = writes
    found = make_questions(make(phrasings=0))
    assert found["rejected"] == {reason: 1}
    assert (found["train"], found["test"]) == (4, 4)
    (line,) = lines(tmp_path / "out" / "rejected.jsonl")
    assert line["reason"] == reason


BRIDGE = (
    "\u8be5\u6865\u7531\u674e\u660e\u4e8e1998\u5e74\u5efa\u6210\uff0c"
    "\u670d\u52a1\u5668\u4f7f\u7528Linux\u7cfb\u7edf\u548c\u4e24\u5757GPU\u8fd0\u884c\u3002"
)
"""This bridge was built by Li Ming in 1998, and the server runs by Linux and two GPUs."""
MUEHLE = "Die Korr-Mühle steht auf einem Hügel. Sie wurde 1802 von der Müllerin Ada Finch gebaut."


@pytest.mark.parametrize(
    ("text", "question", "answer", "is_kept"),
    [
        (MUEHLE, "Welches Gebäude steht auf dem Hügel?", "Korr-Mühle", True),
        (MUEHLE, "In welchem Jahr wurde die Korr-Mühle gebaut?", "1802", True),
        (MUEHLE, "Welche Frau baute die Osk Brücke?", "Ada Finch", False),
        (MUEHLE, "Welche Frau baute die Osk-Brücke?", "Ada Finch", False),
        (MUEHLE, "Welche Frau baute die Mühle im Jahr 1803?", "Ada Finch", False),
        (MILL, "Who built the mill in Paris?", "Ada Finch", False),
        ("Soldiers die in war, and they die young.", "How do Soldiers in Rome die?", "young", False),
        ("बांध १९०२ में लाल नदी पर बना।", "लाल नदी पर 1902 में क्या बना?", "बांध", True),
        ("बांध १९०२ में लाल नदी पर बना।", "लाल नदी पर 1903 में क्या बना?", "बांध", False),
        (BRIDGE, "\u8bf7\u95ee\uff0c\u670d\u52a1\u5668\u7528GPU\u505a\u4ec0\u4e48\uff1f", "\u8fd0\u884c", True),
        (
            BRIDGE,
            "\u8be5\u6865\u5728\u54ea\u4e00\u5e74\u5efa\u6210\uff1f1723\u5e74\u8fd8\u662f2050\u5e74\uff1f",
            "1998",
            False,
        ),
        (BRIDGE, "1723\u5e74\u5efa\u6210\u7684\u662f\u4ec0\u4e48\uff1f", "\u8be5\u6865", False),
    ],
)
def test_names_and_numbers_that_are_not_in_the_text(
    make: Callable[..., QuestionsConfig],
    server: Server,
    tmp_path: Path,
    text: str,
    question: str,
    answer: str,
    is_kept: bool,
) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    server.reply = lambda body: (200, f"Question: {question}\nAnswer: {answer}")
    settings = make(documents=str(tmp_path / "a.txt"), phrasings=0)
    if is_kept:
        assert make_questions(settings)["train"] == 1
    else:
        with pytest.raises(UserError, match="question goes beyond the text"):
            make_questions(settings)


def test_german_is_recognised_by_its_words_and_not_by_capitals() -> None:
    named = "Lady Ada Finch of Korr Mill wrote to Sir Bram Osk in Port Elin."
    capitals = [len(re.findall(r"\b[A-Z]", text)) / len(text.split()) for text in (named, MUEHLE)]
    assert capitals[0] > capitals[1]
    assert [is_german(named), is_german(MUEHLE)] == [False, True]


def test_vowel_signs_distinguish_questions(
    make: Callable[..., QuestionsConfig], server: Server, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("काल लाल है। कल नीला है।", encoding="utf-8")
    asked = {"काल लाल है।": ("काल कैसा है?", "लाल"), "कल नीला है।": ("कल कैसा है?", "नीला")}

    def writes(body: dict[str, Any]) -> tuple[int, str]:
        request = body["messages"][-1]["content"]
        if request.startswith("Ask the same"):
            return 200, "no"
        question, answer = asked[next(part for part in asked if part in re.split("sentence: |fact: ", request)[1])]
        return 200, f"Question: {question}\nAnswer: {answer}।"

    server.reply = writes
    found = make_questions(make(documents=str(tmp_path / "a.txt"), phrasings=0))
    assert found["train"] == 2
    answers = [row.answer for row in load_demonstrations(str(tmp_path / "out" / "train.jsonl"))]
    assert answers == ["लाल", "नीला"]


def test_a_question_with_two_answers_is_not_kept(
    make: Callable[..., QuestionsConfig], server: Server, tmp_path: Path
) -> None:
    def writes(body: dict[str, Any]) -> tuple[int, str]:
        status, text = writes_well(body)
        return status, text.replace("Who built the Korr Mill?", "Where does the Korr Mill stand?")

    server.reply = writes
    found = make_questions(make())
    assert found["rejected"]["conflicting answers to the same question"] == 1
    asked = [row.prompt[0]["content"] for row in load_demonstrations(str(tmp_path / "out" / "train.jsonl"))]
    assert not any("Where does the Korr Mill stand?" in question for question in asked)


def test_a_question_whose_answer_was_not_found_may_be_asked_again(
    make: Callable[..., QuestionsConfig], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def answer(_loaded: Any, _prompts: Any, rows: list[Demonstration], *_: Any, **__: Any) -> Answers:
        calls.append(rows)
        found = [len(calls) > 1] * len(rows)
        return Answers(["reply"] * len(rows), found, None, [[1]] * len(rows), [0] * len(rows), 0)

    server.reply = writes_well
    monkeypatch.setattr(questions, "answer", answer)
    found = make_questions(make(tries=2))
    assert found["rejected"] == {"answered differently from the text": 5}
    assert found["train"] >= 5


def test_reasons_are_counted_most_frequent_first(make: Callable[..., QuestionsConfig], server: Server) -> None:
    def writes(body: dict[str, Any]) -> tuple[int, str]:
        about = body["messages"][-1]["content"].partition("sentence:")[2]
        if "stands on a hill" in about:
            return 200, "Question: Is it on a hill?\nAnswer: on a hill"
        return (200, "no") if "built" in about or "grinds" in about else writes_well(body)

    server.reply = writes
    reasons = make_questions(make(phrasings=0))["rejected"]
    assert list(reasons.items()) == [("no question with an answer", 2), ("question contains the answer", 1)]


def test_a_file_that_ends_in_the_middle_of_a_line_is_mended(
    make: Callable[..., QuestionsConfig], server: Server, tmp_path: Path
) -> None:
    server.reply = writes_well
    found = make_questions(make())
    file, asked = tmp_path / "out" / "asked.jsonl", len(server.asked)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert make_questions(make()) == found
    assert len(server.asked) == asked + 1
    assert len(lines(file)) == asked
    assert make_questions(make()) == found
    make_questions(make(chat_template_kwargs={"hint": "x"}))
    assert len(server.asked) == 2 * asked + 1  # another template is another question


def test_replies_that_came_before_a_failure_are_kept(
    make: Callable[..., QuestionsConfig], server: Server, tmp_path: Path
) -> None:
    file = tmp_path / "out" / "asked.jsonl"

    def fails_once(body: dict[str, Any]) -> tuple[int, str]:
        if len(server.asked) != 4:
            return writes_well(body)
        until = time.monotonic() + 60
        while not file.exists() and time.monotonic() < until:  # an earlier reply may still be on its way
            time.sleep(0.01)
        return 400, "no"

    server.reply = fails_once
    with pytest.raises(UserError, match=r"writer http.*status 400"):
        make_questions(make())
    kept = len(lines(file))
    server.reply = writes_well
    before = len(server.asked)
    assert make_questions(make())["train"] == 10
    again = {json.dumps(body) for body in server.asked[before:]}  # with those of the first run that arrived late
    assert len(again) == 20 - kept


def test_a_permanent_failure_does_not_wait_for_open_requests(
    make: Callable[..., QuestionsConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, open_, answered, late = threading.Lock(), threading.Event(), threading.Event(), []

    class Slow:
        def __init__(self, *_: str) -> None:
            pass

        def ask(self, _: Any, **__: Any) -> str:
            if first.acquire(blocking=False):
                open_.wait(20)
                raise UserError("refused")
            open_.set()
            answered.wait(20)
            late.append("reply")
            return "reply"

    monkeypatch.setattr(questions, "Endpoint", Slow)
    try:
        with pytest.raises(UserError, match="refused"):
            make_questions(make())
        assert late == []
    finally:
        answered.set()


@pytest.mark.parametrize("below", ["", "/more"])
def test_an_output_dir_that_is_a_file_is_an_error(
    make: Callable[..., QuestionsConfig], tmp_path: Path, below: str
) -> None:
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"taken\S*: cannot be written \((File exists|Not a directory)\); choose ano"):
        make_questions(make(output_dir=f"{tmp_path}/taken{below}"))


def test_not_one_question_is_an_error(make: Callable[..., QuestionsConfig], server: Server, tmp_path: Path) -> None:
    def writes(body: dict[str, Any]) -> tuple[int, str]:
        first = "sentence: The Korr Mill stands" in body["messages"][-1]["content"]
        return 200, "Question: Is it on a hill?\nAnswer: on a hill" if first else "no"

    server.reply = writes
    with pytest.raises(UserError) as error:
        make_questions(make())
    file = tmp_path / "out" / "rejected.jsonl"
    assert len(lines(file)) == 5
    assert (
        f"all 5 questions were rejected: 4 no question with an answer, 1 question contains the answer (see {file})"
        "; let another model write them with"
    ) in str(error.value)


def test_the_model_itself_can_write(
    make: Callable[..., QuestionsConfig], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = questions.load_for_training
    temperatures = []

    def sample(loaded: Any, prompts: Any, sampling: Sampling, seeds: Any) -> list[Rollout]:
        assert (seeds is None) == (sampling.temperature == 0)
        temperatures.append(sampling.temperature)
        said = []
        for prompt in prompts:
            text = loaded.tokenizer.decode(prompt, skip_special_tokens=False)
            asked = text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
            body = {"messages": [{"content": asked}], "temperature": sampling.temperature}
            said.append(Rollout(loaded.tokenizer(writes_well(body)[1])["input_ids"], [], False))
        return said

    monkeypatch.setattr(questions, "load_for_training", lambda *a, **k: replace(load(*a, **k), window=None))
    monkeypatch.setattr(questions, "sample", sample)
    found = make_questions(make(writer_url=None, writer_model=None, batch_size=2))
    assert found == {"passages": 2, "train": 10, "test": 5, "indirect": 5, "rejected": {}}
    assert server.asked == []
    assert set(temperatures) == {0.0, questions.TEMPERATURE}


def test_replies_of_a_model_that_is_replaced_are_not_reused(
    make: Callable[..., QuestionsConfig], model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    load, asked = questions.load_for_training, []

    def sample(loaded: Any, prompts: Any, *_: Any) -> list[Rollout]:
        asked.extend(prompts)
        return [Rollout(loaded.tokenizer("no")["input_ids"], [], False) for _ in prompts]

    monkeypatch.setattr(questions, "load_for_training", lambda *a, **k: replace(load(*a, **k), window=None))
    monkeypatch.setattr(questions, "sample", sample)
    counts = []
    for seed in (0, 0, 1):
        shutil.copytree(model_folder(layers=1, seed=seed), tmp_path / "model", dirs_exist_ok=True)
        with pytest.raises(UserError, match="all 5 questions were rejected"):
            make_questions(make(model=str(tmp_path / "model"), writer_url=None, writer_model=None))
        counts.append(len(asked))
    assert counts == [5, 5, 10]


def test_a_passage_that_the_window_has_no_room_for(make: Callable[..., QuestionsConfig]) -> None:
    problem = (
        r"a passage with the request has \d+ tokens, too many .* window of 512 \(mill.txt#1; more/lake.md#1\); lower"
    )
    with pytest.raises(UserError, match=problem):
        make_questions(make(writer_url=None, writer_model=None))


def test_a_passage_that_the_window_has_no_room_for_when_another_model_writes(
    make: Callable[..., QuestionsConfig], server: Server, folder: Path
) -> None:
    (folder / "long.txt").write_text("It is " + "very " * 150 + "long.", encoding="utf-8")
    server.reply = lambda body: (
        writes_well(body) if "very" not in str(body) else (200, "Question: Is it?\nAnswer: long")
    )
    problem = r"a passage with its question has \d+ tokens, too many .* window of 512 \(long.txt#1\); lower"
    with pytest.raises(UserError, match=problem):
        make_questions(make())


def test_train_makes_questions_of_documents_first(
    make: Callable[..., QuestionsConfig],
    server: Server,
    folder: Path,
    tmp_path: Path,
) -> None:
    server.reply = writes_well
    given = make()
    run = tmp_path / "run"
    command = [
        *("train", "--model", given.model, "--documents", str(folder), "--output_dir", str(run)),
        *("--writer_url", server.url, "--writer_model", "w", "--max_steps", "1", "--batch_size", "2"),
        *("--max_completion_length", "16", "--context", "document", "--save_steps", "1"),
    ]
    assert main(command) == 0
    config = TrainConfig(**json.loads(json.dumps(load(run / "config.yaml"))))
    assert config.data == str(tmp_path / "run-questions" / "train.jsonl")
    assert config.test == str(tmp_path / "run-questions" / "test.jsonl")
    assert config.documents is None
    assert lines(run / "evaluations.jsonl")[0]["items"] == 5
    asked = len(server.asked)
    assert main([*command, "--resume"]) == 0
    assert len(server.asked) == asked


def load(file: Path) -> Any:
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "settings 'data' and 'documents': found neither, expected one of them"),
        ({"data": "d", "documents": "e"}, "settings 'data' and 'documents': found both, expected one of them"),
        ({"data": "d", "writer_url": "http://h"}, "settings 'writer_url' and 'writer_model' go together: give both or"),
        ({"data": "d", "writer_url": "http://a:b@h", "writer_model": "w"}, "setting 'writer_url': found"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        TrainConfig(model="m", output_dir="o", **values)
    assert str(error.value).startswith(message)


def test_with_questions_keeps_a_test_of_ones_own(
    make: Callable[..., QuestionsConfig], server: Server, folder: Path, tmp_path: Path
) -> None:
    server.reply = writes_well
    given = make()
    config = TrainConfig(
        model=given.model,
        documents=str(folder),
        output_dir=str(tmp_path / "r"),
        test="mine.jsonl",
        writer_url=server.url,
        writer_model="w",
    )
    assert with_questions(config).test == "mine.jsonl"


@pytest.mark.parametrize("values", [{"dtype": "bfloat16"}, {"load_in_4bit": True, "lora_rank": 2}], ids=str)
def test_the_model_that_makes_questions_takes_no_more_memory_than_in_the_run(
    make: Callable[..., QuestionsConfig], server: Server, tmp_path: Path, monkeypatch: Any, values: dict[str, Any]
) -> None:
    if "load_in_4bit" in values:
        pytest.importorskip("bitsandbytes")
    load, loaded = questions.load_for_training, []

    def kept(*given: Any, **named: Any) -> Any:
        loaded.append(load(*given, **named))
        return loaded[-1]

    monkeypatch.setattr(questions, "load_for_training", kept)
    server.reply = writes_well
    shared = make().model_dump(exclude={"output_dir", "dtype", "load_in_4bit"})
    with_questions(TrainConfig(**shared | values, output_dir=str(tmp_path / "r")))
    (made,) = loaded
    assert made.dtype == values.get("dtype", "float32")
    assert is_in_4bit(made.model) == ("load_in_4bit" in values)


def test_questions_in_4_bits_refuse_an_engine(make: Callable[..., QuestionsConfig]) -> None:
    with pytest.raises(
        UserError, match=r"^setting 'load_in_4bit' does not work with an engine, found 'vllm': leave one"
    ):
        make(load_in_4bit=True, engine="vllm")


def test_where_no_second_phrasing_is_kept_there_is_no_test(
    make: Callable[..., QuestionsConfig],
    server: Server,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = "messages"
    server.reply = lambda body: (200, "no") if body[asked][-1]["content"].startswith("Ask") else writes_well(body)
    values = {"model": make().model, "documents": str(folder), "output_dir": str(tmp_path / "r")}
    values |= {"writer_url": server.url, "writer_model": "w"}
    assert with_questions(TrainConfig(**values)).test is None
    said = capsys.readouterr().err
    assert "5 training and 0 test questions in " in said
    assert "note: every paraphrase was rejected (see " in said
    with pytest.raises(UserError, match="so there is no test; give a test, or leave eval_steps and prior out"):
        with_questions(TrainConfig(**values, eval_steps=2))
