"""Folders and data sets with several splits: the one asked for is read, and what is not read is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.data.sources import packaged
from selfdistill.errors import UserError


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder(*names: str, root: str = "data-set") -> str:
    """A folder of files, each with one row whose completion is the file's own name."""
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": "q", "completion": name}
        if name.endswith(".parquet"):
            datasets.Dataset.from_list([row]).to_parquet(str(path))
        else:
            path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return root


def read(path: Any, split: str | None = "train") -> list[str]:
    return [row.completion for row in load_demonstrations(path, split=split)]


def error_of(path: Any, split: str | None = "train") -> str:
    with pytest.raises(UserError) as caught:
        load_demonstrations(path, split=split)
    return str(caught.value)


def notes_of(path: Any, split: str | None = "train") -> list[str]:
    notes: list[str] = []
    load_demonstrations(path, split=split, note=notes.append)
    return notes


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl", "validation.jsonl"),
        ("my-train.jsonl", "my_test_2.jsonl", "my.dev.jsonl"),
        ("training.jsonl", "eval.jsonl", "val.jsonl"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "data/valid-00000-of-00001.parquet"),
        ("train/a.jsonl", "test/a.jsonl", "dev/a.jsonl"),
        ("data/train/0.jsonl", "data/testing/0.jsonl", "data/validation/0.jsonl"),
        ("gsm-Train.jsonl", "gsm-TEST.jsonl", "gsm-Dev.jsonl"),
        ("traindata.jsonl", "testdata.jsonl", "devdata.jsonl"),
        ("trainset.jsonl", "testset.jsonl", "valset.jsonl"),
        ("trainingset2.jsonl", "evalset2.jsonl", "validationset2.jsonl"),
        ("myTrain.jsonl", "myTest.jsonl", "myDev.jsonl"),
        ("mathTrainSet.jsonl", "mathTestSet.jsonl", "mathValidSet.jsonl"),
        ("TrainData/a.jsonl", "TestData/a.jsonl", "ValData/a.jsonl"),
    ],
)
def test_a_folder_of_splits_is_told_apart(names: tuple[str, ...]) -> None:
    path = folder(*names, "README.md", ".hidden.jsonl", "dataset_infos.json")
    assert read(path) == [names[0]]
    assert read(path, "test") == [names[1]]
    assert read(path, None) == [names[1]]
    assert read(path, "validation") == read(path, "dev") == [names[2]]
    assert error_of(path, "probe").startswith(f"{path}: no split 'probe' in this data set, expected ")
    (said,) = notes_of(path)
    assert said.startswith(f"{path}: split 'train' is read; the other splits are ")
    assert "'test'" in said
    assert said.endswith(" (setting 'split')")


def test_the_parts_of_a_split_are_read_in_order() -> None:
    names = [f"data/train-{number:05d}-of-00003.parquet" for number in range(3)]
    path = folder(*names, "data/test-00000-of-00001.parquet")
    assert read(path) == names


def test_a_split_of_its_own_name_is_that_split() -> None:
    names = [f"data/{name}-00000-of-00001.parquet" for name in ("train_sft", "test_sft", "train_gen")]
    path = folder(*names)
    assert error_of(path) == (
        f"{path}: no split 'train' in this data set, expected test_sft, train_gen or train_sft (setting 'split')"
    )
    assert read(path, "train_sft") == [names[0]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("train.jsonl", "holdout.jsonl"),
            "holdout.jsonl is in no split, and others are in train; name it like train-holdout.jsonl, or move it "
            "elsewhere",
        ),
        (
            ("validation.jsonl", "test.jsonl"),
            "no split 'train' in this data set, expected test or validation (setting 'split')",
        ),
        (
            ("train.jsonl", "test.jsonl", "extra.jsonl"),
            "extra.jsonl is in no split, and others are in test or train; name it like train-extra.jsonl, or move it "
            "elsewhere",
        ),
        (
            ("unit.jsonl", "heldout-test.jsonl"),
            "unit.jsonl is in no split, and others are in test; name it like train-unit.jsonl, or move it elsewhere",
        ),
    ],
)
def test_rows_of_a_test_are_never_read_as_training_data(names: tuple[str, ...], message: str) -> None:
    path = folder(*names)
    assert error_of(path) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test.jsonl", "test"),
        ("dev-ops.jsonl", "validation"),
        ("unit-test-generation.jsonl", "test"),
        ("cancer-testing.jsonl", "test"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("test/a.jsonl", "test"),
    ],
)
def test_the_only_split_is_read_where_none_is_named(name: str, split: str) -> None:
    path = folder(name)
    assert read(path) == read(path, None) == read(path, split) == [name]
    assert notes_of(path) == [f"{path}: reading the only split, '{split}'"]
    assert notes_of(path, split) == []
    assert error_of(path, "probe") == (f"{path}: no split 'probe' in this data set, expected {split} (setting 'split')")


def test_the_other_split_is_said_with_the_option_that_reads_it() -> None:
    path = folder("train.jsonl", "test.jsonl")
    assert notes_of(path) == [f"{path}: split 'train' is read; the other split is 'test' (setting 'split')"]
    assert notes_of(path, None) == [f"{path}: split 'test' is read; the other split is 'train' (setting 'test_split')"]
    assert notes_of(path, "test") == [f"{path}: split 'test' is read; the other split is 'train'"]


def test_a_folder_without_splits_is_read_in_full() -> None:
    for number, names in enumerate([("a.jsonl", "b.json.jsonl"), ("dataset.jsonl", "latest.jsonl", "trained.jsonl")]):
        path = folder(*names, root=str(number))
        assert read(path) == list(names)
        assert notes_of(path)[0] == f"{path}: {len(names)} files are read as one data set: {'; '.join(names)}"
    assert notes_of(folder("a.jsonl", root="one")) == []


def test_folders_that_are_not_read_are_said() -> None:
    path = folder("a.jsonl", "main/b.jsonl", "notes/c.txt")
    assert notes_of(path) == [f"{path}: folders not read: main"]
    deep = folder("a.jsonl", "sub/deep/b.jsonl", "sub/c.txt", "more/.hidden/d.jsonl", "model/config.json", root="deep")
    assert notes_of(deep) == [f"{deep}: folders not read: sub"]
    other = folder("main/train.jsonl", "socratic/train.jsonl", root="configs")
    assert error_of(other).startswith("configs: no .jsonl, .json, .csv, .tsv or .parquet (text also compressed as")


@pytest.mark.parametrize(
    "ending", ["arrow", "avro", "feather", "jl", "jsonl.lz4", "jsonlines", "ndjson", "ods", "orc", "xls"]
)
def test_a_file_in_a_folder_that_cannot_be_read_is_named(ending: str) -> None:
    path = folder("a.jsonl", f"b.{ending}")
    kind = ending.removeprefix("jsonl.")
    assert error_of(path).startswith(f"{path}: cannot read b.{ending} (.{kind}), expected .jsonl, ")


def sets() -> datasets.DatasetDict:
    rows = {name: [{"prompt": "q", "completion": name}] for name in ("train", "test", "probe")}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(row) for name, row in rows.items()})


def test_sets_saved_and_in_memory_have_the_same_splits() -> None:
    sets().save_to_disk("saved")
    for data, name in (("saved", "saved"), (sets(), "data")):
        assert read(data) == ["train"]
        assert read(data, None) == ["test"]
        assert read(data, "probe") == ["probe"]
        assert error_of(data, "dev") == (
            f"{name}: no split 'dev' in this data set, expected train, test or probe (setting 'split')"
        )
        assert notes_of(data, "test") == [f"{name}: split 'test' is read; the other splits are 'train' and 'probe'"]


def test_the_only_split_is_the_test_where_none_is_named() -> None:
    only = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "q", "completion": "r"}])})
    assert read(only, None) == ["r"]
    for name in ("eval", "evaluation", "test"):
        assert read(datasets.DatasetDict({"dev": only["train"], name: only["train"]}), None) == ["r"]
    without = datasets.DatasetDict({"train": only["train"], "dev": only["train"]})
    assert error_of(without, None) == (
        "data: no split 'test' in this data set, expected train or dev (setting 'test_split')"
    )


def test_an_expression_of_a_split_is_left_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, split: str | None = None) -> Any:
        return sets() if split is None else datasets.Dataset.from_list([{"prompt": name, "completion": split}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/name", "train[:10%]") == ["train[:10%]"]
    assert read("owner/name", "probe") == ["probe"]


def test_a_hub_set_that_was_read_from_csv_is_said_to_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plain.csv").write_text("prompt,answer\nx,007\ny,NA\n", encoding="utf-8")
    made = datasets.load_dataset("csv", data_files="plain.csv", cache_dir="cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda _: made)
    assert [note for note in notes_of("owner/name") if "CSV" in note] == [
        "owner/name: datasets read it from CSV, so 007 became 7, and NA became null; to keep cells unchanged, give "
        "the file itself"
    ]
    assert [row.answer for row in load_demonstrations("plain.csv")] == ["007", "NA"]


def of_types(answers: list[Any], **features: Any) -> datasets.Dataset:
    """Rows with these answers in the first of the columns; media are given as they are stored, not encoded."""
    rows = datasets.Dataset.from_list([{"prompt": "q", **dict.fromkeys(features, answer)} for answer in answers])
    return rows.cast(datasets.Features({"prompt": datasets.Value("string"), **features}))


def in_all_forms(rows: datasets.Dataset) -> list[Any]:
    rows.save_to_disk("saved")
    rows.to_parquet("rows.parquet")
    return [rows, datasets.DatasetDict({"train": rows}), "saved", "rows.parquet"]


def test_an_answer_that_is_a_class_is_its_name() -> None:
    rows = of_types([1, 0, None, -1], answer=datasets.ClassLabel(names=["negative", "positive"]))
    for data in in_all_forms(rows):
        assert [row.answer for row in load_demonstrations(data, split="train", prompts_only=True)] == [
            *("positive", "negative"),
            *(None, None),
        ]


@pytest.mark.parametrize("width", ["float16", "float32", "float64"])
def test_an_answer_is_the_number_that_was_written(width: str) -> None:
    rows = of_types([3.7, 72.0, -0.1, None], answer=datasets.Value(width))
    for data in in_all_forms(rows):
        assert [row.answer for row in load_demonstrations(data, split="train", prompts_only=True)] == [
            3.7,
            72,
            -0.1,
            None,
        ]


BROKEN = {"bytes": b"no picture", "path": None}
MEDIA = {"recording": datasets.Audio(), "film": datasets.Video(), "scan": datasets.Image()}


def test_media_in_columns_that_are_not_read_are_not_decoded() -> None:
    rows = datasets.Dataset.from_list(
        [{"prompt": "q", "completion": "r"} | {name: [{name: BROKEN}] for name in MEDIA} | {"photo": BROKEN}]
    )
    text = datasets.Value("string")
    nested = {name: datasets.List({name: media}) for name, media in MEDIA.items()}
    rows = rows.cast(datasets.Features({"prompt": text, "completion": text, **nested, "photo": datasets.Image()}))
    for data in in_all_forms(rows):
        name = data if isinstance(data, str) else "data"
        assert notes_of(data) == [f"{name}: columns not used: recording, film, scan, photo"]


@pytest.mark.parametrize(("column", "media"), [("audio", datasets.Audio()), ("videos", datasets.Video())])
def test_media_are_refused_in_one_line(column: str, media: Any) -> None:
    for data in in_all_forms(of_types([BROKEN], **{column: media})):
        found = f"column {column!r}: not read, only text and pictures are supported; leave it out"
        assert error_of(data).endswith(found)


def test_files_of_the_package_are_named() -> None:
    rows = load_demonstrations("bundled:shop.test.jsonl")
    assert [row.prompt for row in rows] == [row.prompt for row in load_demonstrations(packaged("shop.test.jsonl"))]
    assert rows[2].source == "bundled:shop.test.jsonl:3"
    assert error_of("bundled:shop.tset.jsonl") == (
        "bundled:shop.tset.jsonl: no such file in the package; did you mean bundled:shop.test.jsonl?"
    )
    assert "expected one of" in error_of("bundled:../messages.py")
    (fact, *_) = load_demonstrations("bundled:prior/test/facts.jsonl")
    assert fact.source == "bundled:prior/test/facts.jsonl:1"
