"""Pictures of rows: what is read, what is refused in one line, and where they stand in messages."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image, ImageColor

from selfdistill.data import (
    Demonstration,
    draw_shapes,
    load_demonstrations,
    parse_context,
    shown_text,
    write_demonstrations,
)
from selfdistill.data.shapes import COLOURS
from selfdistill.errors import UserError

Write = Callable[..., Path]
RED = Image.new("RGB", (8, 6), "red")


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def row(*images: Any, **others: Any) -> dict[str, Any]:
    return {"prompt": "What is it?", "completion": "a", "images": list(images), **others}


def one(value: Any) -> Demonstration:
    return load_demonstrations([row(value)])[0]


def problem_of(value: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        load_demonstrations([value])
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix("data: 1 bad row: data[0], ")


# --- what is read ---


def test_every_form_of_a_picture_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    RED.save(path)
    forms = [str(path), path, RED, {"bytes": png(RED), "path": None}, {"bytes": None, "path": str(path)}, png(RED)]
    for form in forms:
        (picture,) = one(form).images
        assert picture.decoded().tobytes() == RED.tobytes()
        assert (picture.data is None) == (form in (str(path), path) or form == {"bytes": None, "path": str(path)})
    (picture,) = load_demonstrations([{"prompt": "q", "completion": "a", "image": str(path)}])[0].images
    assert picture.decoded().size == (8, 6)


def test_paths_begin_at_the_file_of_the_rows_or_in_the_working_directory(
    write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    RED.save(tmp_path / "pictures" / "a.png")
    made = load_demonstrations(str(write_rows([row("pictures/a.png")])))
    assert made[0].images[0].path == str(tmp_path / "pictures" / "a.png")
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    assert load_demonstrations("pictures/train.jsonl")[0].images == made[0].images


def test_in_a_folder_of_files_paths_begin_at_each_rows_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ("train/b.jsonl", "train/c.parquet", "data/a-train.jsonl")
    for number, file in enumerate(files):
        path = tmp_path / "set" / file
        (path.parent / "img").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (number, 0, 0)).save(path.parent / "img" / f"{number}.png")
        rows = [row(f"img/{number}.png")]
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text(json.dumps(rows[0]))
    (tmp_path / "set" / "img").mkdir()
    RED.save(tmp_path / "set" / "img" / "0.png")  # of nobody
    found = {demonstration.images[0].path for demonstration in load_demonstrations("set")}
    assert found == {
        str((tmp_path / "set" / file).parent / "img" / f"{number}.png") for number, file in enumerate(files)
    }


def test_paths_of_a_saved_data_set_begin_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list([row("a.png")]).save_to_disk("saved")
    RED.save(tmp_path / "saved" / "a.png")
    assert load_demonstrations("saved")[0].images[0].path == str(tmp_path / "saved" / "a.png")


def test_pictures_of_a_data_set_stay_undecoded(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    columns = {"prompt": ["q", "r"], "completion": ["a", "b"], "images": [[str(tmp_path / "a.png")], []]}
    features = {"prompt": datasets.Value("string"), "completion": datasets.Value("string")}
    made = datasets.Dataset.from_dict(
        columns, features=datasets.Features({**features, "images": datasets.List(datasets.Image())})
    )
    first, second = load_demonstrations(made)
    assert first.images[0].path == str(tmp_path / "a.png")
    assert second.images == ()
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "saved")
    for path in ("rows.parquet", "saved"):
        assert load_demonstrations(str(tmp_path / path))[0].images[0].digest == first.images[0].digest


def test_pictures_are_upright_in_rgb_and_white_where_they_are_transparent() -> None:
    left_red = Image.new("RGB", (8, 4), "blue")
    left_red.paste("red", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    (turned,) = one({"bytes": png(left_red, exif=exif), "path": None}).images
    assert turned.decoded().size == (4, 8)
    assert turned.decoded().getpixel((1, 1)) == (255, 0, 0)
    (clear,) = one(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).images
    assert clear.decoded().getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "P", "1", "CMYK", "LA"):
        assert one(Image.new(mode, (4, 4))).images[0].decoded().mode == "RGB"


# --- what is refused ---


def test_a_picture_that_is_not_there_is_named_with_its_row(write_rows: Write, tmp_path: Path) -> None:
    path = write_rows([row(), row("b.png")])
    with pytest.raises(UserError) as error:
        load_demonstrations(str(path))
    found = f"{path}: 1 bad row: line 2, column 'images[0]': 'b.png' does not exist (looked in {tmp_path})"
    assert str(error.value) == found


def test_a_broken_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    noise = Image.effect_noise((64, 64), 80)
    (tmp_path / "cut.png").write_bytes(png(noise)[:2000])
    (tmp_path / "cut.jpg").write_bytes(png(noise, format="JPEG")[:600])
    (tmp_path / "none.png").write_bytes(b"")
    for name in ("text.png", "none.png"):
        place = repr(str(tmp_path / name))
        unread = f"column 'images[0]': {place} is not a picture that Pillow reads; convert it, such as to PNG"
        assert problem_of(row(tmp_path / name)) == unread
    for name in ("cut.png", "cut.jpg"):
        problem = problem_of(row(RED, tmp_path / name))
        assert problem.startswith(f"column 'images[1]': {str(tmp_path / name)!r} cannot be decoded (")
        assert problem.endswith("); replace it"), name


def test_a_broken_picture_that_was_opened_is_refused() -> None:
    first, second, rest = png(Image.effect_noise((300, 300), 80)).split(b"IDAT")
    problem = problem_of(row(Image.open(io.BytesIO(first + b"IDAT" + second + b"ID\0T" + rest))))
    assert problem.startswith("column 'images[0]': the PIL image cannot be decoded (")
    assert problem.endswith("); replace it")


@pytest.mark.parametrize("side", [9500, 20000])  # Pillow itself warns of the first and refuses the second
def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(side: int) -> None:
    bomb = png(Image.new("1", (side, side)))
    assert len(bomb) < 100_000
    problem = problem_of(row({"bytes": bomb, "path": "big.png"}))
    assert problem == "column 'images[0]': 'big.png' has more than 89,478,485 pixels; make it smaller"


def test_an_animation_and_deep_channels_are_refused() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    film = png(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert problem_of(row(film)) == (
        "column 'images[0]': the picture has 3 frames, expected a single picture; save one frame"
    )
    assert problem_of(row(Image.open(io.BytesIO(film)))) == (
        "column 'images[0]': the PIL image has 3 frames, expected a single picture; save one frame"
    )
    assert one(Image.open(io.BytesIO(film)).copy()).images  # of the current frame alone
    deep = png(Image.new("I;16", (4, 4), 40000))
    assert "has mode I;16, expected 8 bits per channel; convert it" in problem_of(row(deep))
    assert "has mode F, expected 8 bits per channel; convert it" in problem_of(row(Image.new("F", (4, 4))))


BASE64 = "'iVBORw0KGgoiVBORw0KGgoiVBORw0KGgoiVBO...'"
WANT = "expected a path, a PIL image or an object with bytes and path"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (row(3), f"column 'images[0]': found the number 3, {WANT}"),
        (row({"url": "x"}), f"column 'images[0]': found an object, {WANT}"),
        (row({"bytes": None, "path": None}), f"column 'images[0]': found an object, {WANT}"),
        (row(" "), f"column 'images[0]': found only whitespace, {WANT}"),
        (row(images="a.png"), "column 'images': found 'a.png', expected a list of pictures"),
        (
            row("https://x.org/a.png"),
            "column 'images[0]': found 'https://x.org/a.png', expected a file: pictures are not downloaded; save it "
            "first",
        ),
        (row("iVBORw0KGgo" * 90), f"column 'images[0]': {BASE64} cannot be read (File name too long)"),
        (row("a\0.png"), r"column 'images[0]': 'a\x00.png' cannot be read (embedded null byte)"),
        (row(RED, image=RED), "has 'image' and 'images', expected one of them"),
    ],
)
def test_what_is_no_picture_is_refused(value: dict[str, Any], problem: str) -> None:
    assert problem_of(value) == problem


def test_a_path_with_half_of_a_surrogate_pair_is_refused() -> None:
    assert problem_of(row("\ud800.png")).startswith(r"column 'images[0]': '\ud800.png' cannot be read (")


def test_as_many_pictures_as_places() -> None:
    place, text = {"type": "image"}, {"type": "text", "text": "Look"}
    two = [{"role": "user", "content": [place, text, place]}]
    found = problem_of({"prompt": two, "completion": "a", "images": [RED]})
    assert found == "column 'prompt': 2 parts of type 'image' for 1 pictures; give equal numbers"
    found = problem_of({"prompt": two, "completion": "a"})
    problem = "found a part of type 'image', but no picture in the column 'images'; add it"
    assert found == f"column 'prompt[0].content[0]': {problem} and column 'prompt[0].content[2]': {problem}"
    reply = [{"role": "assistant", "content": [place]}]
    found = problem_of({"prompt": "q", "completion": reply, "images": [RED]})
    assert found.startswith("column 'completion[0].content[0]': found a part of type 'image'")


def test_pictures_after_a_learnt_reply_are_refused() -> None:
    place, text = {"type": "image"}, {"type": "text", "text": "Look"}
    turns = [
        {"role": "user", "content": [place, text]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": [place]},
        {"role": "assistant", "content": "b"},
    ]
    rows = [{"messages": turns, "images": [RED, RED]}]
    assert len(load_demonstrations(rows, turns="last")[0].prompt) == 3
    with pytest.raises(UserError, match="column 'messages': pictures after the first learnt reply, expected"):
        load_demonstrations(rows, turns="all")


# --- where they stand ---


def test_without_places_pictures_stand_before_the_first_user_turn_as_in_trl() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": "two"},
    ]
    blue = Image.new("RGB", (4, 4), "blue")
    (made,) = load_demonstrations([{"prompt": turns, "completion": "a", "images": [RED, blue]}])
    marks = "".join(picture.mark for picture in made.images)
    assert [turn["content"] for turn in made.prompt] == ["s", f"{marks}one", "r", "two"]
    (made,) = load_demonstrations(
        [{"messages": [*turns, {"role": "assistant", "content": "a"}], "images": [RED, blue]}]
    )
    assert made.prompt[1]["content"] == f"{marks}one"
    assert one(RED).prompt[0]["content"] == f"{one(RED).images[0].mark}What is it?"
    assert shown_text(made.prompt[1]["content"]) == "[picture][picture]one"


def test_pictures_stand_at_their_places_as_arrow_writes_them() -> None:
    parts = [
        {"type": "text", "text": "a "},
        {"type": "image", "text": None},
        {"type": "text", "text": " b"},
        {"type": "image", "text": None},
    ]
    blue = Image.new("RGB", (4, 4), "blue")
    turns = [{"role": "user", "content": parts}]
    (made,) = load_demonstrations([{"prompt": turns, "completion": "x", "images": [RED, blue]}])
    red_mark, blue_mark = (picture.mark for picture in made.images)
    assert made.prompt[0]["content"] == f"a {red_mark} b{blue_mark}"


def test_pictures_stay_with_their_results_where_these_are_put_in_order(tmp_path: Path) -> None:
    blue = Image.new("RGB", (8, 6), "blue")
    calls = [{"id": name, "name": "look", "arguments": {}} for name in "ab"]
    results = [{"role": "tool", "tool_call_id": name, "content": [{"type": "image"}]} for name in "ba"]
    asks = {"role": "assistant", "tool_calls": calls}
    prompt = [{"role": "user", "content": "Look"}, asks, *results]
    (made,) = load_demonstrations([{"prompt": prompt, "completion": "r", "images": [RED, blue]}])
    assert [picture.decoded().tobytes() for picture in made.images] == [blue.tobytes(), RED.tobytes()]
    assert [turn["content"] for turn in made.prompt[2:]] == [picture.mark for picture in made.images]
    write_demonstrations(tmp_path / "rows.jsonl", [made])
    (again,) = load_demonstrations(str(tmp_path / "rows.jsonl"))
    assert again.identity() == made.identity()


@pytest.mark.parametrize("spec", ["turns:repeats=2", "example", "rewritten"])
def test_contexts_show_the_picture_wherever_they_show_the_prompt(spec: str) -> None:
    (made,) = load_demonstrations([row(RED, privileged_context="In other words?")])
    messages = parse_context(spec).messages(made, [made])
    shown = sum(turn["content"].count(made.images[0].mark) for turn in messages)
    assert shown == (3 if spec.startswith("turns") else 1)


def test_rows_with_pictures_are_written_and_read_back(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    parts = [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "it?"}]
    rows = [
        row(str(tmp_path / "a.png"), Image.new("RGB", (4, 4), "blue")),
        {"prompt": [{"role": "user", "content": parts}], "completion": "x", "images": [RED]},
        {"prompt": "none", "completion": "y"},
    ]
    made = load_demonstrations(rows)
    (tmp_path / "run").mkdir()
    write_demonstrations(tmp_path / "run" / "rows.jsonl", made)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[1]["prompt"][0]["content"] == parts
    again = load_demonstrations(str(tmp_path / "run" / "rows.jsonl"))
    assert [x.identity() for x in again] == [x.identity() for x in made]
    assert [x.identity() for x in load_demonstrations(made)] == [x.identity() for x in made]


def test_pictures_can_be_copied_beside_their_rows(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    blue = Image.new("RGB", (4, 4), "blue")
    made = load_demonstrations([row(str(tmp_path / "a.png"), blue), row(str(tmp_path / "a.png"), completion="b")])
    (tmp_path / "first").mkdir()
    write_demonstrations(tmp_path / "first" / "rows.jsonl", made, copy_pictures=True)
    (tmp_path / "a.png").unlink()
    again = load_demonstrations(str(tmp_path / "first" / "rows.jsonl"))
    write_demonstrations(tmp_path / "first" / "again.jsonl", again, copy_pictures=True)  # they are there
    assert len(list((tmp_path / "first" / "pictures").iterdir())) == 2
    (tmp_path / "first").rename(tmp_path / "moved")
    for name in ("rows", "again"):
        found = load_demonstrations(str(tmp_path / "moved" / f"{name}.jsonl"))
        assert [x.identity()["images"] for x in found] == [x.identity()["images"] for x in made]


def test_a_picture_that_changed_before_it_was_copied_is_refused(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    made = load_demonstrations([row(str(tmp_path / "a.png"))])
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: cannot be read again \(its bytes have changed\); restore it, and"):
        write_demonstrations(tmp_path / "rows.jsonl", made, copy_pictures=True)


def test_the_picture_is_part_of_a_rows_identity_and_text_rows_are_as_before() -> None:
    red, blue = one(RED), one(Image.new("RGB", (8, 6), "blue"))
    assert red.identity() != blue.identity()
    assert "images" not in load_demonstrations([{"prompt": "q", "completion": "a"}])[0].identity()
    notes: list[str] = []
    load_demonstrations([row(RED), row(Image.new("RGB", (8, 6), "blue"), completion="b")], note=notes.append)
    assert notes == []


# --- drawn shapes ---


def test_drawn_shapes_have_the_colour_that_their_rows_name(tmp_path: Path) -> None:
    rows = draw_shapes(tmp_path / "new" / "train.jsonl", 12)
    made = load_demonstrations(str(tmp_path / "new" / "train.jsonl"))
    assert [x.completion for x in made] == [row["completion"] for row in rows]
    assert {x.completion for x in made} == set(COLOURS)
    for x in made:
        counts = x.images[0].decoded().getcolors()
        _, (_, colour) = sorted(counts or [], reverse=True)
        assert colour == ImageColor.getrgb(x.completion)


def test_the_name_of_the_file_is_the_seed_of_its_shapes(tmp_path: Path) -> None:
    one, again, other = (
        [row["completion"] for row in draw_shapes(tmp_path / file, 12)]
        for file in ("a/train.jsonl", "b/train.jsonl", "a/test.jsonl")
    )
    assert one == again != other
    assert (tmp_path / "a" / "train3.png").read_bytes() == (tmp_path / "b" / "train3.png").read_bytes()
