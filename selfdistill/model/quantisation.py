"""Quantised checkpoints: recognised by their files, dequantised if transformers can, else refused.

Also the safe import of bitsandbytes, which quantises weights and moments.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from selfdistill.errors import UserError

_DEQUANTISED = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Kinds that transformers converts to ordinary weights while loading, without extra packages."""
_SCALE = re.compile(
    r"[._]([a-z]+_scale(_inv|_\d+)?|scale_(weight|input|inv)|scales?_?\d*|zero_point|zeros|qzeros|qweight|g_idx|absmax"
    r"|quant_map|quant_state\..*|weight_packed|SCB|weight_format|amax|blocks)$"
)
_INSTEAD = "use the original model, or dequantise it with the tool that quantised it"


def quantisation_of(config: PretrainedConfig, folder: Path | None) -> str | None:
    """The kind of quantisation that a model's files name, e.g. ``fp8``, ``gptq`` or ``modelopt``; None: none."""
    holders = (config, config.get_text_config(decoder=True))
    for holder in holders:
        for key in ("quantization_config", "compression_config", "quantization"):
            found = getattr(holder, key, None)
            if found:
                settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
                kind = settings.get("quant_method") or settings.get("quantization_status")
                return str(getattr(kind, "value", kind) or "of a kind that config.json does not name")
    if folder is None or not (folder / "hf_quant_config.json").is_file():
        return None
    try:
        producer = json.loads((folder / "hf_quant_config.json").read_text(encoding="utf-8"))["producer"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        producer = "hf_quant_config.json"
    return str(producer)


def loading_options(config: PretrainedConfig, folder: Path | None, name: str, *, training: bool) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that dequantise weights; empty for other models.

    Raises:
        UserError: the weights are quantised, and will be trained or cannot be dequantised here.
    """
    kind = quantisation_of(config, folder)
    if kind is None:
        return {}
    if training:
        raise UserError(
            f"model {name!r}: its weights are quantised ({kind}), and quantised weights cannot be trained; {_INSTEAD}"
        )
    if kind not in _DEQUANTISED:
        known = " and ".join(_DEQUANTISED)
        raise UserError(
            f"model {name!r}: its weights are quantised ({kind}), and only {known} can be read, for evaluation; "
            f"{_INSTEAD}"
        )
    return {"quantization_config": _DEQUANTISED[kind](dequantize=True)}


def refuse_scales(names: list[str], name: str) -> None:
    """Refuse a checkpoint whose files hold scales of quantised weights that the model has no place for.

    Args:
        names: names of tensors that belong to the model's parts and have no place in it.
        name: the name given by the user, for messages.

    Raises:
        UserError: the message names the first.
    """
    scales = [tensor for tensor in names if _SCALE.search(tensor) and not tensor.endswith("logit_scale")]
    if scales:
        more = f" and {len(scales) - 1} more" if len(scales) > 1 else ""
        raise UserError(
            f"model {name!r}: its files hold scales of quantised weights that config.json does not mention, so its "
            f"weights would be wrong: {scales[0]}{more}; {_INSTEAD}"
        )


def import_bitsandbytes(asked: str) -> Any:
    """Import bitsandbytes, and prevent it from fetching code from the model hub, as it would on some CPUs.

    Args:
        asked: what needs it, for the message.

    Raises:
        UserError: bitsandbytes is not installed, or cannot be loaded.
    """
    if sys.modules.get("bitsandbytes") is None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"{asked} needs bitsandbytes; install it with pip install 'selfdistill[bitsandbytes]'")
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns of what is prevented
    present = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # so that importing it fails
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{asked} needs bitsandbytes, which cannot be loaded here: {error}") from None
    finally:
        del sys.modules["kernels"]
        if present is not None:
            sys.modules["kernels"] = present
    return bitsandbytes


def import_before_peft() -> None:
    """Import bitsandbytes safely, if it is installed, before PEFT imports it; see :func:`import_bitsandbytes`."""
    with suppress(UserError):
        import_bitsandbytes("an adapter")
