"""Pictures of a row: checked once when the row is read, and decoded again when a model needs their pixels.

In a message, a mark with its hash stands for a picture, so contexts can move texts with pictures. A mark
counts only if its row has that picture: text alone never becomes a picture.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from selfdistill.data.columns import PICTURE_COLUMNS, is_empty
from selfdistill.data.rows import describe_value, quoted
from selfdistill.errors import UserError, one_line

MOST_PIXELS = 89_478_485
"""Maximum pixels of a picture: Pillow's limit against decompression bombs."""
PICTURE_FOLDER = "pictures"
"""Folder beside a file of rows, for pictures that were not files, or that are to stay with the rows."""
_DEEP = ("I", "F")
"""Beginnings of the modes with more than 8 bits a channel, which Pillow would clip."""
_BORDER = "\U0010fffc"
_MARK = re.compile(f"{_BORDER}([0-9a-f]{{64}}){_BORDER}")
_WANT = "a path, a PIL image or an object with bytes and path"


class PictureRefusal(UserError):
    """The model's processor rejects a picture."""


class _BadPicture(ValueError):
    """A picture that cannot be used; the message says why."""


@dataclass(frozen=True)
class Picture:
    """A picture as a file or its bytes; its pixels are decoded at each use and not kept."""

    digest: str
    """SHA-256 of the file's bytes."""
    path: str | None = None
    data: bytes | None = None

    @property
    def mark(self) -> str:
        """The mark for the picture in a text."""
        return f"{_BORDER}{self.digest}{_BORDER}"

    def read(self) -> bytes:
        """The bytes of its file.

        Raises:
            UserError: it has changed since the row was read.
        """
        try:
            data = self.data if self.data is not None else Path(self.path or "").read_bytes()
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from None
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise self._unreadable("its bytes have changed")
        return data

    def decoded(self) -> Image.Image:
        """The picture upright, in RGB; raises what :meth:`read` raises."""
        data = self.read()
        try:
            with _problems_of("it"):
                return _decoded(data)
        except _BadPicture as error:
            raise self._unreadable(str(error)) from None

    def _unreadable(self, reason: str) -> UserError:
        return UserError(f"{self.path}: cannot be read again ({reason}); restore it, and start again")


class PromptIds(list[int]):
    """Token ids of a prompt, with its pictures."""

    def __init__(self, ids: Sequence[int], pictures: Sequence[Picture]) -> None:
        super().__init__(ids)
        self.pictures = tuple(pictures)
        """In the order of the prompt; a picture that is shown twice appears twice."""


class PictureTokens(Protocol):
    """How a model's processor writes pictures in a prompt."""

    token: str
    """The chat template's text for a picture."""

    def expanded(self, pictures: Sequence[Picture]) -> list[str]:
        """The tokens that replace each picture's token in the prompt."""
        ...


def continued_by(prompt: Sequence[int], ids: Sequence[int]) -> PromptIds:
    """A prompt with further tokens at its end, and its pictures."""
    return PromptIds([*prompt, *ids], pictures_in(prompt))


def pictures_in(ids: Sequence[int]) -> tuple[Picture, ...]:
    """The pictures of a prompt; none of plain token ids."""
    return ids.pictures if isinstance(ids, PromptIds) else ()


def by_digest(rows: Sequence[Any]) -> dict[str, Picture]:
    """The pictures of some demonstrations, by their hashes."""
    return {picture.digest: picture for row in rows for picture in row.images}


# --- reading ---


def pictures_of(row: Mapping[str, Any], folder: str, problems: list[str]) -> tuple[Picture, ...]:
    """The pictures of a raw row, each decoded once as a check.

    Args:
        row: its columns.
        folder: where relative paths start; if there is no such file, in the working directory.
        problems: receives one line per problem.
    """
    held = [column for column in PICTURE_COLUMNS if not is_empty(row.get(column))]
    if len(held) > 1:
        problems.append("has 'image' and 'images', expected one of them")
    if not held:
        return ()
    column, value = held[0], row[held[0]]
    if column == "image":
        value = [value]
    if not isinstance(value, list | tuple):
        problems.append(f"column '{column}': found {describe_value(value)}, expected a list of pictures")
        return ()
    found = []
    for number, one in enumerate(value):
        try:
            found.append(_picture(one, folder))
        except _BadPicture as error:
            at = column if column == "image" else f"{column}[{number}]"
            problems.append(f"column '{at}': {error}")
    return tuple(found)


def read_picture(path: str) -> Picture:
    """The picture in a file of the setting ``image``; a relative path starts in the working directory.

    Raises:
        UserError: there is no such file, or it cannot be used.
    """
    try:
        return _picture(path, "")
    except _BadPicture as error:
        raise UserError(f"setting 'image': {error}") from None


def _picture(value: Any, folder: str) -> Picture:
    if isinstance(value, Picture):
        return value
    path, data = None, value
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        path, data = value.get("path"), value.get("bytes")
    elif isinstance(value, str | os.PathLike):
        path, data = os.fspath(value), None
    elif isinstance(value, Image.Image):
        data = _as_file(value)
    if isinstance(path, str) and re.match(r"(https?|s3|gs|hf)://|data:", path) and data is None:
        raise _BadPicture(f"found {quoted(path)}, expected a file: pictures are not downloaded; save it first")
    if data is None and isinstance(path, str) and path.strip():
        path, data = _read(path, folder)
        with _problems_of(_named(path)):
            _decoded(data)
        return Picture(hashlib.sha256(data).hexdigest(), path)
    if not isinstance(data, bytes):
        raise _BadPicture(f"found {describe_value(value)}, expected {_WANT}")
    with _problems_of("the picture" if path is None else _named(str(path))):
        _decoded(data)
    return Picture(hashlib.sha256(data).hexdigest(), data=data)


def _named(path: str) -> str:
    """A path in full, because its end tells files apart; a text too long for a path, such as base64, is shortened."""
    return repr(path) if len(path) <= 300 else quoted(path)


def _as_file(image: Image.Image) -> bytes:
    """A PIL image as the bytes of a PNG file, upright and in RGB."""
    buffer = io.BytesIO()
    with _problems_of("the PIL image"):
        _upright(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _read(path: str, folder: str) -> tuple[str, bytes]:
    """The absolute path and the bytes of a picture's file."""
    beside = os.path.join(folder, path)
    place = os.path.abspath(beside if os.path.exists(beside) else path)
    try:
        return place, Path(place).read_bytes()
    except FileNotFoundError:
        raise _BadPicture(f"{_named(path)} does not exist (looked in {os.path.abspath(folder)})") from None
    except (OSError, ValueError) as error:  # a ValueError: a null byte, or half of a surrogate pair
        raise _BadPicture(f"{_named(path)} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _decoded(data: bytes) -> Image.Image:
    """The picture that a file's bytes hold, upright and in RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused from its header
        with Image.open(io.BytesIO(data)) as image:
            return _upright(image)


@contextmanager
def _problems_of(name: str) -> Iterator[None]:
    """Say in one line why the picture ``name`` cannot be used."""
    try:
        yield
    except _BadPicture as error:
        raise _BadPicture(f"{name} {error}") from None
    except Image.DecompressionBombError:
        raise _BadPicture(f"{name} has more than {MOST_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise _BadPicture(f"{name} is not a picture that Pillow reads; convert it, such as to PNG") from None
    except Exception as error:  # decoders raise many kinds of errors on corrupt files
        raise _BadPicture(f"{name} cannot be decoded ({one_line(error)}); replace it") from None


def _upright(image: Image.Image) -> Image.Image:
    """The picture rotated according to its EXIF data, in RGB, with white for transparency.

    Its size and its number of frames are checked before it is decoded.
    """
    if image.width * image.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    if getattr(image, "is_animated", False) and image.format != "MPO":
        frames = getattr(image, "n_frames", "several")
        raise _BadPicture(f"has {frames} frames, expected a single picture; save one frame")
    image.load()
    if image.mode.startswith(_DEEP):
        raise _BadPicture(f"has mode {image.mode}, expected 8 bits per channel; convert it")
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    above = image.convert("RGBA")
    below = Image.new("RGBA", above.size, "white")
    return Image.alpha_composite(below, above).convert("RGB")


def undecoded(rows: Any) -> Any:
    """A ``datasets.Dataset`` whose pictures, and other media, stay bytes or paths until needed."""
    for column, feature in rows.features.items():
        if (bare := _undecoded(feature)) != feature:
            rows = rows.cast_column(column, bare)
    return rows


def _undecoded(feature: Any) -> Any:
    """A column's type in which media, at any depth, are bytes and paths."""
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if hasattr(feature, "embed_storage"):
        return replace(feature, decode=False)
    return replace(feature, feature=_undecoded(feature.feature)) if hasattr(feature, "feature") else feature


def saved(pictures: Sequence[Picture], folder: Path, copied: bool = False) -> list[str]:
    """Paths of the pictures relative to this folder, to which those that are not files, or all, are copied."""
    paths = []
    for picture in pictures:
        path = Path(picture.path or "")
        if copied or picture.data is not None:
            path, data = Path(PICTURE_FOLDER) / picture.digest[:16], picture.read()
            (folder / PICTURE_FOLDER).mkdir(exist_ok=True)
            if not (folder / path).is_file() or (folder / path).read_bytes() != data:
                (folder / path).write_bytes(data)
        paths.append(str(path))
    return paths


# --- in messages ---


def marked(value: Any, column: str, pictures: Sequence[Picture], problems: list[str]) -> Any:
    """A raw chat or text with marks for its pictures. They replace its parts of type ``image``, or, if there are none,
    come before the first user turn's text, as in TRL.

    Args:
        value: the column's value.
        column: its name.
        pictures: the row's.
        problems: receives one line per problem.
    """
    if not pictures:
        return value
    if isinstance(value, str):
        return "".join(picture.mark for picture in pictures) + value
    if not isinstance(value, list):
        return value
    places = sum(_is_place(part) for message in value for part in _parts(message))
    if not places:
        return _before_first_turn(value, column, pictures, problems)
    if places != len(pictures):
        problems.append(
            f"column '{column}': {places} parts of type 'image' for {len(pictures)} pictures; give equal numbers"
        )
    left = itertools.cycle(pictures)
    return [
        {**message, "content": [_mark(next(left)) if _is_place(part) else part for part in _parts(message)]}
        if _parts(message)
        else message
        for message in value
    ]


def _before_first_turn(value: list[Any], column: str, pictures: Sequence[Picture], problems: list[str]) -> list[Any]:
    """Messages with all marks before the text of the first user turn."""
    for number, message in enumerate(value):
        content = message.get("content") if isinstance(message, dict) and message.get("role") == "user" else None
        if isinstance(content, list):
            content = [*map(_mark, pictures), *content]
        elif isinstance(content, str):
            content = "".join(picture.mark for picture in pictures) + content
        if content is not None:
            return [*value[:number], {**message, "content": content}, *value[number + 1 :]]
    problems.append(f"column '{column}': no user turn to hold the pictures")
    return value


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) and message.get("role") != "assistant" else None
    return content if isinstance(content, list) else []


def _is_place(part: Any) -> bool:
    """Whether a part of a message is a picture's place; Arrow writes null for keys that only other parts have."""
    held = {key for key, value in part.items() if value is not None} if isinstance(part, dict) else set()
    return held == {"type"} and part["type"] == "image"


def _mark(picture: Picture) -> dict[str, str]:
    return {"type": "text", "text": picture.mark}


def marks_in(text: str) -> str:
    """The marks of a text, one after the other."""
    return "".join(found[0] for found in _MARK.finditer(text))


def refuse_late(replies: Sequence[Mapping[str, Any]], column: str, problems: list[str]) -> None:
    """Report a problem if pictures come after the first learnt reply."""
    if any(_MARK.search(message["content"]) for message in replies):
        problems.append(f"column '{column}': pictures after the first learnt reply, expected them before it")


def shown_text(text: str) -> str:
    """A text for a person or a judge, with a word instead of each picture."""
    return _MARK.sub("[picture]", text)


def split_at_pictures(text: str, known: Mapping[str, Picture]) -> list[str | Picture]:
    """A text split at the marks of known pictures; the parts in between may be empty."""
    pieces: list[str | Picture] = [""]
    for number, piece in enumerate(_MARK.split(text)):
        if number % 2 and piece in known:
            pieces += [known[piece], ""]
        else:
            pieces[-1] = f"{pieces[-1]}{_BORDER}{piece}{_BORDER}" if number % 2 else f"{pieces[-1]}{piece}"
    return pieces


def in_order(pictures: Sequence[Picture], turns: Sequence[Mapping[str, Any]]) -> tuple[Picture, ...]:
    """A row's pictures in the order of its turns."""
    known = {picture.digest: picture for picture in pictures}
    return tuple(known[digest] for turn in turns for digest in _MARK.findall(turn["content"]) if digest in known)


def in_parts(text: str, pictures: Sequence[Picture]) -> Any:
    """A message's content as in rows: parts if it has pictures."""
    pieces = split_at_pictures(text, {picture.digest: picture for picture in pictures})
    return text if len(pieces) == 1 else as_parts([piece for piece in pieces if isinstance(piece, str)])


def as_parts(texts: Sequence[str]) -> list[dict[str, str]]:
    """Texts with a picture between each pair, as parts of a message."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text or len(texts) == 1 else []
    return parts
