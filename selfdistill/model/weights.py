"""Read a causal language model from its files, and compare the tensors in the files with the model's."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

from selfdistill.errors import UserError, number_of
from selfdistill.model.files import local_folder
from selfdistill.model.four_bits import four_bit_options, set_compute_dtype
from selfdistill.model.pictures import (
    PROCESSOR_FILES,
    fetch_processor_files,
    has_image_text_architecture,
    reads_pictures,
)
from selfdistill.model.quantisation import loading_options, refuse_scales
from selfdistill.model.starter import STARTER_MODELS
from selfdistill.model.unchanged_process import environment_variable

_COMPUTED = re.compile(r"(inv_freq|cos_cached|sin_cached|position_ids|masked_bias|att(n|ention)\.bias|causal_mask)$")
"""Buffers that old checkpoints contain and that models now compute."""
_SHOWN = 3


def load_causal(
    path: str, name: str, dtype: torch.dtype | str, *, training: bool, load_in_4bit: bool = False
) -> tuple[Any, list[str]]:
    """Load a causal language model, or an image-text model, from a folder or hub id; returns it with notes.

    Args:
        path: folder or hub id.
        name: the name given by the user, for messages.
        dtype: data type of the weights, or ``auto`` (as saved).
        training: whether the weights are to be trained.
        load_in_4bit: quantise the weights of linear layers, see :mod:`selfdistill.model.four_bits`.

    Raises:
        UserError: the model is no causal language model, or its files do not contain the weights that it computes with.
    """
    config = causal_config(path, name)
    folder = local_folder(path)
    if folder is not None and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model {name!r}: its weights are pickled (.bin), which can run code; convert them to safetensors"
        )
    options = loading_options(config, folder, name, training=training)
    if load_in_4bit:
        options |= four_bit_options()
    try:
        # A service would convert pickled weights, learn of the model, and open a pull request that is then loaded.
        with environment_variable("DISABLE_SAFETENSORS_CONVERSION", "1"):
            loaded: Any = auto_class(config, folder).from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported here, in one line
                **options,
            )
    except OSError as error:
        if "use_safetensors" not in str(error):
            raise
        raise UserError(
            f"model {name!r}: it has no safetensors on the model hub, and pickled weights (.bin) are never read, "
            "because they can run code; convert them to safetensors"
        ) from None
    model, info = loaded
    refuse_scales([key for key in sorted(info["unexpected_keys"]) if _belongs(model, key)], name)
    wrong = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if wrong:
        raise UserError(
            f"model {name!r}: weights are missing or have a different shape from config.json: {_listed(wrong, 1)}"
        )
    if load_in_4bit:
        set_compute_dtype(model, model.dtype)
    return model, _check_unexpected(model, sorted(info["unexpected_keys"]), name)


def auto_class(config: PretrainedConfig, folder: Path | None) -> Any:
    """The class that builds the model: an image-text model's if its processor's files are there."""
    return AutoModelForImageTextToText if reads_pictures(config, folder) else AutoModelForCausalLM


def causal_config(path: str, name: str) -> PretrainedConfig:
    """The configuration of a causal language model, from ``config.json``.

    Args:
        path: folder or hub id.
        name: the name given by the user, for messages.

    Raises:
        UserError: the file cannot be read, or belongs to no causal language model; or there is an adapter.
    """
    config = _config(path, name)
    needs_processor = has_image_text_architecture(config)
    if needs_processor:
        fetch_processor_files(path)
    if reads_pictures(config, local_folder(path)):
        return config
    architectures = config.architectures or []
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and not any("CausalLM" in a or "LMHead" in a or "Conditional" in a for a in architectures)
    ):
        found = ", ".join(architectures) or config.model_type
        if needs_processor:
            raise UserError(
                f"model {name!r}: {found} is an image-text model, and the files of its processor are missing "
                f"({' or '.join(PROCESSOR_FILES)}); download the whole model"
            )
        raise UserError(f"model {name!r}: {found} is not a causal language model; use one")
    return config


def _config(path: str, name: str) -> PretrainedConfig:
    try:
        # With an adapter here transformers would load both it and its base, pickled if need be.
        adapter = find_adapter_config_file(path) is not None
        config = None if adapter else AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        if Path(path).is_dir():
            raise UserError(f"model {name!r}: config.json cannot be read: {first_line(error)}") from None
        if isinstance(error.__cause__, GatedRepoError):
            raise UserError(
                f"model {name!r}: the model hub refuses access; accept the terms at https://huggingface.co/{path}, "
                "then run hf auth login"
            ) from None
        hub = "not found on the model hub, or private there (hf auth login)"
        if is_offline_mode():
            hub = "the model hub was not asked, because offline mode (HF_HUB_OFFLINE) is on"
        elif isinstance(error.__cause__, LocalEntryNotFoundError):
            hub = "the model hub cannot be reached"
        raise UserError(
            f"model {name!r}: no such folder, and {hub}; give a folder, a hub id or one of: {', '.join(STARTER_MODELS)}"
        ) from None
    except ValueError as error:
        if "custom code" in str(error):
            raise UserError(f"model {name!r}: needs code from its own folder, which is never run") from None
        raise UserError(f"model {name!r}: {first_line(error)}") from None
    if config is None and Path(path).is_dir():
        raise UserError(
            f"model {name!r}: an adapter, but a base model is needed; merge it first with selfdistill export --merge "
            "true, and give the result"
        )
    if config is None:
        raise UserError(f"model {name!r}: an adapter on the model hub; download it, and give its folder")
    return config


def _check_unexpected(model: Any, unexpected: list[str], name: str) -> list[str]:
    """Refuse tensors that belong to a part of the model but have no place in it; note those of other parts.

    If the files contain a bias, norm or layer that the model lacks, the model differs from the one that was trained. A
    vision tower, a value head or layers that predict further tokens are parts that it does not need.
    """
    buffers = dict(model.named_buffers())
    prefix = f"{model.base_model_prefix}."
    left = [key for key in unexpected if not _COMPUTED.search(key) and not {key, prefix + key} & buffers.keys()]
    wrong = [key for key in left if _belongs(model, key)]
    if wrong:
        raise UserError(
            f"model {name!r}: its files hold weights that {type(model).__name__}, as config.json describes it, has no "
            f"place for: {_listed(wrong, 1)}; use the config.json that belongs to the weights"
        )
    if not left:
        return []
    parts = [f"{part} ({count})" for part, count in Counter(_part(key, prefix) for key in left).items()]
    return [f"its files hold unused parts (number of tensors): {_listed(parts, _SHOWN)}"]


def _belongs(model: Any, key: str) -> bool:
    """Whether a tensor, named with the base model's prefix or without, belongs to a part of the model."""
    return any(_lies_in(model, name) for name in (key, f"{model.base_model_prefix}.{key}"))


def _lies_in(model: Any, key: str) -> bool:
    """Whether a tensor's name, even if the model lacks it, is inside the model.

    That is inside one of its modules, layers or weights, or in a layer after its last. Layers that predict further
    tokens do not count.
    """
    names, module = key.split(".")[:-1], model
    for place, part in enumerate(names):
        inside = module._modules.get(part)
        if inside is None:
            if isinstance(module, nn.ModuleList) and part.isdigit():
                further = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
                return int(part) >= len(module) + further
            return part in module._parameters or any(name.isdigit() for name in names[:place])
        module = inside
    return module is not model


def _part(key: str, prefix: str) -> str:
    """The part of a checkpoint to which a tensor belongs: the first names, up to a number."""
    names = key.removeprefix(prefix).split(".")
    return ".".join(names[: 2 if len(names) > 1 and names[1].isdigit() else 1])


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> list[str]:
    """Check that the model has a row for every token that its tokenizer can write; returns notes for the user.

    Raises:
        UserError: text, the chat template, or the end or begin token uses a token without a row.
    """
    rows = embedding_rows(model)
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if not beyond:
        return []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    template = str(tokenizer.chat_template or "")
    used = [token for number, token in beyond if number not in special or number in own or token in template]
    if used:
        raise UserError(
            f"model {name!r}: its embedding has {rows} rows, and its tokenizer has "
            f"{number_of(len(used), 'token')} beyond them: {_listed([repr(token) for token in used], _SHOWN)}; use the "
            "tokenizer that belongs to the model, or resize the embedding and train it first"
        )
    rest = [repr(token) for number, token in beyond if number != tokenizer.pad_token_id]  # replaced, which is noted
    if not rest:
        return []
    count, names = number_of(len(rest), "token"), _listed(rest, _SHOWN)
    return [f"the tokenizer has {count} without a row in the embedding, which no text produces: {names}"]


def embedding_rows(model: Any) -> float:
    """Number of tokens for which embedding and head have a row; infinite if unknown."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = (getattr(layer, "weight", None) for layer in layers)
    return min((weight.shape[0] for weight in weights if isinstance(weight, torch.Tensor)), default=math.inf)


def _listed(names: list[str], shown: int) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
