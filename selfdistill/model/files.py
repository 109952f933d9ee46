"""Find a model's files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import cached_file

from selfdistill.errors import UserError, similar_inside
from selfdistill.model.starter import STARTER_MODELS, starter_folder, starter_model_path

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
_MISTRAL = ("mistral", "ministral", "mixtral", "pixtral")
"""How the types of models begin whose tokenizers transformers reads with mistral-common."""
_SETTINGS = ("config.json", "adapter_config.json")
"""One of them is in every model folder."""
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_GO_ALONG = ("*processor_config.json", "chat_template.json", "generation_config.json", *LICENCES)
_TEXT = ("", ".json", ".md", ".txt")


def resolve(name: str) -> str:
    """The folder or hub id behind a model's name.

    Raises:
        UserError: there is no such folder, or it holds no model; or both a starter model and a folder have the name.
    """
    path = Path(name)
    if name in STARTER_MODELS:
        if any((path / inside).exists() for inside in ("final", *_SETTINGS)):
            raise UserError(
                f"model {name!r}: the starter model, and a folder here; give ./{name} for the folder, or rename it to "
                "use the starter model"
            )
        return str(starter_model_path(name))
    for starter in STARTER_MODELS:  # the base of an adapter, as its settings name it on another machine
        if path.is_absolute() and path.name == starter_folder(starter) and not os.path.exists(path):
            return str(starter_model_path(starter))
    if (path / "final").is_dir():
        return str(path / "final")
    run = path.parent if path.name == "final" and not path.exists() else path
    has_settings = any((run / settings).is_file() for settings in _SETTINGS)
    if (run / "config.yaml").is_file() and not has_settings:
        raise UserError(f"model {name!r}: a run folder without a final model; resume its training")
    if path.is_dir():
        if not has_settings:
            if (path / "skills").is_dir() and (path / "start").is_dir():
                skills = sorted(path.glob("skills/*/model"))
                own = f"give its current model, {skills[-1]}" if skills else "it has no skill yet, so give its base"
                raise UserError(f"model {name!r}: a state of selfdistill learn; {own}")
            raise UserError(f"model {name!r}: the folder has neither config.json nor adapter_config.json")
        return str(path)
    if path.is_file():
        raise UserError(f"model {name!r}: this is a file; give the folder that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model {name!r}: no such folder")
    if (hint := similar_inside(name)) is not None:
        raise UserError(f"model {name!r}: no such folder{hint}")
    return name


def local_folder(path: str) -> Path | None:
    """The folder of a model's files on this machine: the folder itself, or the cached snapshot of a hub id.

    Nothing is downloaded.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # neither a folder nor a possible hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def tokenizer_options(path: str, model_type: str) -> dict[str, Any]:
    """With which options transformers reads a tokenizer from its files.

    Beside ``tekken.json`` it would use mistral-common if that is installed, which cannot keep names of control tokens
    as text. The option makes it read ``tokenizer.json``, and mends the pattern that its older releases wrote there.

    Args:
        path: folder or hub id.
        model_type: of ``config.json``.
    """
    if not model_type.startswith(_MISTRAL):
        return {}
    try:
        cached_file(path, "tekken.json")
    except OSError:  # not there
        return {}
    return {"fix_mistral_regex": True}


def files_that_go_along(folder: Path) -> list[Path]:
    """Files of a base that should be copied next to a model trained from it, because training does not write them.

    These are the settings of its processors (text, images, video, sound), its processor's chat template, its generation
    settings, and its licence with notices and use policy. No code, pickles or model card.
    """
    found = {file for pattern in _GO_ALONG for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.suffix.lower() in _TEXT)
