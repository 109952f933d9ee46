"""Files to rows: every format with its places, cells as they stand, and files that are not what their names say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.errors import UserError

GOOD = {"prompt": "2+2?", "completion": "4"}
LINE = json.dumps(GOOD)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def parquet() -> bytes:
    datasets.Dataset.from_list([GOOD]).to_parquet("made.parquet")
    return Path("made.parquet").read_bytes()


def message_of(path: str) -> str:
    with pytest.raises(UserError) as caught:
        load_demonstrations(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- tables ---


def test_cells_are_text_as_they_stand_and_empty_ones_are_null() -> None:
    cells = ["007", "NA", "null", "NaN", "1.50", "72", "True", " x ", "1e5", "1,234", "N/A", "None"]
    lines = [f'q{number},"{cell}",' for number, cell in enumerate(cells)]
    Path("a.csv").write_text("prompt,answer,document\n" + "\n".join(lines) + "\n", encoding="utf-8")
    rows = load_demonstrations("a.csv")
    assert [row.answer for row in rows] == cells
    assert {row.document for row in rows} == {None}
    assert [row.prompt[0]["content"] for row in rows] == [f"q{number}" for number in range(len(cells))]


def test_a_row_of_a_table_has_the_number_of_its_first_line() -> None:
    text = 'prompt,completion\r\n"two\r\nlines","say ""hi"""\r\n\r\nb,c\u2028d\r\n'
    Path("a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = load_demonstrations("a.csv")
    assert [row.source for row in rows] == ["a.csv:2", "a.csv:5"]
    assert rows[0].prompt[0]["content"] == "two\r\nlines"
    assert [row.completion for row in rows] == ['say "hi"', "c\u2028d"]


def test_a_table_with_tabs_and_a_long_document() -> None:
    document = "word " * 60_000
    Path("a.tsv").write_text(f"prompt\tcompletion\tdocument\nq\tr, s\t{document}\n", encoding="utf-8")
    (row,) = load_demonstrations("a.tsv")
    assert (row.completion, row.document) == ("r, s", document)


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        (['"Come in."\tr', '"Come in," he said.\tr'], ['"Come in."', '"Come in," he said.']),
        (['"Come in."\tr'], ['"Come in."']),
        (['a 6" pipe\tr', '"I am "free""\tr'], ['a 6" pipe', '"I am "free""']),  # quotes doubled only at an end
        (['"say ""hi"""\tr', '"Come in."\tr'], ['say "hi"', "Come in."]),
        (['"two\nlines"\tr', "q\tr"], ["two\nlines", "q"]),
        (['"a\ttab"\tr'], ["a\ttab"]),
        (['""\tr', '"q"\tr'], ["", "q"]),
    ],
)
def test_quotes_in_a_table_with_tabs_are_text_where_nothing_shows_quoting(lines: list[str], prompts: list[str]) -> None:
    Path("a.tsv").write_text("\n".join(["document\tcompletion\tprompt", *(f"{line}\tq" for line in lines)]))
    assert [row.document or "" for row in load_demonstrations("a.tsv")] == prompts


def test_names_in_quotes_show_that_cells_are_quoted() -> None:
    Path("a.tsv").write_text('"prompt"\t"completion"\n"q"\t"r"\n')
    (row,) = load_demonstrations("a.tsv")
    assert (row.prompt[0]["content"], row.completion) == ("q", "r")


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("prompt,completion,,\nq,r,,\np,s,,\n,,,\n", []),
        (",prompt,,completion\n,q,,r\n,p,,s\n", []),
        ("prompt,completion, \nq,r,\np,s,\n", []),
        (",prompt,completion\n0,q,r\n1,p,s\n", ["a.csv: columns not used: one without a name"]),
        (",prompt,completion,,\n0,q,r,,\n1,p,s,,\n", ["a.csv: columns not used: one without a name"]),
        ("prompt,completion,id,\nq,r,1,x\np,s,2,\n", ["a.csv: columns not used: id, one without a name"]),
    ],
)
def test_columns_without_a_name_are_none_if_they_are_empty(text: str, notes: list[str]) -> None:
    Path("a.csv").write_text(text, encoding="utf-8")
    said: list[str] = []
    rows = load_demonstrations("a.csv", note=said.append)
    assert [(row.prompt[0]["content"], row.source) for row in rows] == [("q", "a.csv:2"), ("p", "a.csv:3")]
    assert said == notes


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "prompt,completion\nq,r,s\nq\n",
            "a.csv: all 2 rows: found 3 cells, 1 cell, expected 2 (prompt, completion)",
        ),
        (
            "a.csv",
            "prompt,completion,prompt\nq,r,s\n",
            "a.csv: line 1 names the column 'prompt' twice, expected each once",
        ),
        (
            "a.csv",
            "prompt;completion\nq;r\n",
            "a.csv: separated by semicolons; use commas in a .csv, or tabs in a .tsv",
        ),
        (
            "a.csv",
            '"prompt";"completion"\n"q";"r"\n',
            "a.csv: separated by semicolons; use commas in a .csv, or tabs in a .tsv",
        ),
        (
            "a.tsv",
            "Frage;Antwort;prompt\nq;r;s\n",
            "a.tsv: separated by semicolons; use commas in a .csv, or tabs in a .tsv",
        ),
        (
            "a.csv",
            "prompt|completion\nq|r\n",
            "a.csv: separated by vertical bars; use commas in a .csv, or tabs in a .tsv",
        ),
        (
            "a.csv",
            "Frage,Antwort\nq,r\n",
            "a.csv: line 1 is 'Frage,Antwort', expected names of columns, such as 'prompt', in a table with commas; "
            "name the columns in line 1",
        ),
        (
            "a.csv",
            "prompt,completion,, \nq,r,s,t\n",
            "a.csv: line 1 does not name all columns that have values; name them or leave them out",
        ),
        (
            "a.csv",
            "prompt,completion,,\nq,r,,\nq,r,\n",
            "a.csv: 1 bad row: line 3, found 3 cells, expected 4 (prompt, completion)",
        ),
        ("a.csv", 'prompt,completion\nq,"r\n', "a.csv: line 2 is not a row of a table: unexpected end of data"),
        ("a.csv", "prompt,completion\n", "a.csv: no rows, expected at least one"),
        ("a.csv", "", "a.csv: no rows, expected at least one"),
        (
            "a.csv",
            "prompt,completion\nq,\n,r\n",
            "a.csv: 1 bad row: line 3, column 'prompt': found null, expected text or a list of messages",
        ),
    ],
)
def test_bad_table(name: str, text: str, message: str) -> None:
    Path(name).write_text(text, encoding="utf-8")
    assert message_of(name) == message


# --- compression ---


@pytest.mark.parametrize(
    ("name", "text", "sources"),
    [
        ("a.jsonl", f"{LINE}\n\n{LINE}\n", [":1", ":3"]),
        ("a.json", f"[{LINE}, {LINE}]", ["[0]", "[1]"]),
        ("a.csv", "prompt,completion\n2+2?,4\n2+2?,4\n", [":2", ":3"]),
        ("a.tsv", "prompt\tcompletion\n2+2?\t4\n2+2?\t4\n", [":2", ":3"]),
    ],
)
def test_packed_text_is_read_like_the_text(name: str, text: str, sources: list[str]) -> None:
    data = text.encode()
    for packed, content in ((".gz", gzip.compress(data, mtime=0)), (".zst", zstd(data)), (".GZ", gzip.compress(data))):
        Path(name + packed).write_bytes(content)
        rows = load_demonstrations(name + packed)
        assert [row.source for row in rows] == [f"{name}{packed}{source}" for source in sources]
        assert {row.completion for row in rows} == {"4"}


def test_files_packed_in_several_parts_are_read_whole() -> None:
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)):
        Path(name).write_bytes(b"".join(pack(f"{LINE}\n".encode()) for _ in range(3)))
        assert len(load_demonstrations(name)) == 3


def test_a_packed_file_that_is_cut_is_named() -> None:
    for name, pack, what in (("a.jsonl.gz", gzip.compress, "gzip"), ("a.jsonl.zst", zstd, "zstd")):
        Path(name).write_bytes(pack(LINE.encode() * 500)[:-9])
        assert message_of(name).startswith(f"{name}: not a readable {what} file: ")


# --- names that do not fit ---


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TABLE = b"prompt,completion\nq,r\n"
MISNAMED = [
    ("a.json", lines(GOOD, GOOD), "JSON Lines", "a JSON list", "rename it to end with .jsonl"),
    ("a.jsonl", json.dumps([GOOD]).encode(), "a JSON list", "JSON Lines", "rename it to end with .json"),
    (
        "a.jsonl",
        json.dumps([GOOD, GOOD], indent=2).encode(),
        "a JSON list",
        "JSON Lines",
        "rename it to end with .json",
    ),
    (
        "a.jsonl",
        json.dumps(GOOD, indent=2).encode(),
        "one JSON object over several lines",
        "JSON Lines",
        "write each row on one line",
    ),
    ("a.jsonl", TABLE, "a table with commas", "JSON Lines", "rename it to end with .csv"),
    ("a.json", TABLE.replace(b",", b"\t"), "a table with tabs", "a JSON list", "rename it to end with .tsv"),
    ("a.csv", TABLE.replace(b",", b"\t"), "a table with tabs", "a table with commas", "rename it to end with .tsv"),
    ("a.tsv", TABLE, "a table with commas", "a table with tabs", "rename it to end with .csv"),
    ("a.csv", lines(GOOD, GOOD), "JSON Lines", "a table with commas", "rename it to end with .jsonl"),
    ("a.csv", json.dumps([GOOD]).encode(), "a JSON list", "a table with commas", "rename it to end with .json"),
    ("a.parquet", lines(GOOD), "JSON Lines", "a parquet file", "rename it to end with .jsonl"),
    ("a.parquet", TABLE, "a table with commas", "a parquet file", "rename it to end with .csv"),
    ("a.jsonl", gzip.compress(lines(GOOD), mtime=0), "a gzip file", "JSON Lines", "rename it to end with .jsonl.gz"),
    ("a.csv", zstd(TABLE), "a zstd file", "a table with commas", "rename it to end with .csv.zst"),
    ("a.jsonl.gz", lines(GOOD), "JSON Lines", "a gzip file", "rename it to end with .jsonl"),
    (
        "a.json.gz",
        gzip.compress(lines(GOOD, GOOD), mtime=0),
        "JSON Lines",
        "a JSON list",
        "rename it to end with .jsonl.gz",
    ),
    ("a.jsonl.zst", zstd(TABLE), "a table with commas", "JSON Lines", "rename it to end with .csv.zst"),
    ("a.jsonl.gz", zstd(lines(GOOD)), "a zstd file", "a gzip file", "rename it to end with .jsonl.zst"),
    ("a.jsonl", LINE.encode("utf-16"), "UTF-16 text", "JSON Lines", "save it as UTF-8"),
    ("a.jsonl", LINE.encode("utf-16-le"), "UTF-16 text", "JSON Lines", "save it as UTF-8"),
    ("a.csv", TABLE.decode().encode("utf-16-be"), "UTF-16 text", "a table with commas", "save it as UTF-8"),
    ("a.csv", b"PK\x03\x04rest", "a ZIP archive or spreadsheet", "a table with commas", "convert it to JSON Lines"),
    ("a.json", b"BZh9rest", "a bzip2 file", "a JSON list", "convert it to JSON Lines"),
    (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a Git LFS pointer instead of the file",
        "a parquet file",
        "fetch it with git lfs pull",
    ),
]


@pytest.mark.parametrize(("name", "content", "found", "want", "advice"), MISNAMED)
def test_a_file_of_another_format_than_its_name_says(
    name: str, content: bytes, found: str, want: str, advice: str
) -> None:
    Path(name).write_bytes(content)
    assert message_of(name) == f"{name}: found {found}, expected {want}; {advice}"


def test_a_parquet_file_under_another_name() -> None:
    content = parquet()
    for name, want in (("a.jsonl", "JSON Lines"), ("a.json", "a JSON list"), ("a.csv", "a table with commas")):
        Path(name).write_bytes(content)
        assert message_of(name) == f"{name}: found a parquet file, expected {want}; rename it to end with .parquet"


def test_renamed_as_advised_the_files_are_read() -> None:
    for _, content, _, _, advice in MISNAMED:
        if "rename" in advice:
            right = "right" + advice.rpartition(" ")[2]
            Path(right).write_bytes(content)
            assert load_demonstrations(right), advice
