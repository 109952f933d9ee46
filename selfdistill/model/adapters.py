"""Read a PEFT adapter with its base, check that the two fit, and merge them.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.model.quantisation import import_before_peft
from selfdistill.model.weights import first_line

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"
_COPY = re.compile(r"\.(token_adapter\.)?base_layer")
_BASES_OWN = re.compile(r"\.(token_adapter\.)?(base_layer|original_module)(?=\.)")
"""What PEFT adds to the names of a base's tensors where it wraps their layers."""
_SIZES = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[([\d, ]+)\]\) from checkpoint, "
    r"the shape in current model is torch\.Size\(\[([\d, ]+)\]\)"
)
_BASE_KEPT = ("gaussian", "orthogonal", "eva", "mica")
"""Ways to initialise LoRA, as ``init_lora_weights`` names them, that leave the base's weights as they are."""
_BASE_CHANGED_AGAIN = ("pissa", "olora")
"""Those that change the base's weights, and change them in the same way when the adapter is loaded."""
_SAME_LOGITS = 1e-3
"""Largest difference of logits, relative to the largest logit, that merging in float32 may leave."""


def read_config(folder: Path, name: str) -> Any:
    """The adapter's settings.

    Raises:
        UserError: the settings cannot be read, the weights are pickled, the adapter acts outside its base's layers, or
            it belongs to weights that its base does not have.
    """
    import_before_peft()
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"model {name!r}: cannot be loaded: adapter_config.json cannot be read ({reason})") from None
    if not (folder / WEIGHTS).is_file():  # PEFT would unpickle a .bin
        raise UserError(
            f"model {name!r}: the adapter has no {WEIGHTS}, and pickled weights (.bin) are never read, because they "
            "can run code; convert them to safetensors"
        )
    _refuse_outside_layers(config, name)
    way = _initialisation(config)
    if way not in (None, *_BASE_KEPT, *_BASE_CHANGED_AGAIN):
        raise UserError(
            f"model {name!r}: adapter_config.json has init_lora_weights {way!r}, which changes the base's weights in a "
            "way that PEFT does not repeat when it loads the adapter; save it as plain LoRA "
            "(path_initial_model_for_weight_conversion in PEFT), or, if its base was saved with the change, set "
            "init_lora_weights to true"
        )
    return config


def _refuse_outside_layers(config: Any, name: str) -> None:
    """Refuse an adapter whose virtual or invocation tokens act where sampling and scoring do not see them.

    Raises:
        UserError: it acts outside its base's layers.
    """
    if config.is_prompt_learning or config.is_adaption_prompt or getattr(config, "alora_invocation_tokens", None):
        kind = getattr(config.peft_type, "value", config.peft_type)
        kind = "aLoRA" if kind == "LORA" else kind
        raise UserError(
            f"model {name!r}: an adapter of kind {kind} cannot be merged into its base, so it is not supported; use "
            "one that changes the base's layers, such as LoRA"
        )


def without_adapter(model: Any, *, trained: bool) -> Any:
    """What the caller has loaded: the model itself, or the base of a ``PeftModel`` that is not to be trained.

    Raises:
        UserError: it has an adapter and is to be trained, or it cannot be measured with it.
    """
    if not hasattr(model, "peft_config"):
        return model
    import_before_peft()
    from peft import PeftModel

    if trained:
        raise UserError(
            "model: it has an adapter; to train a new one, give the model without it (PeftModel.unload) and lora_rank; "
            "to keep what it learnt, merge it first (PeftModel.merge_and_unload), or give its folder"
        )
    if not isinstance(model, PeftModel):
        raise UserError("model: it has an adapter; give the PeftModel that holds it")
    for config in model.peft_config.values():
        _refuse_outside_layers(config, model.name_or_path)
    return model.get_base_model()


def changes_base(config: Any) -> bool:
    """Whether loading an adapter changes the weights of its base, to which the adapter's update is then added."""
    return _initialisation(config) in _BASE_CHANGED_AGAIN


def _initialisation(config: Any) -> str | None:
    """How LoRA was initialised, if it has a name."""
    way = getattr(config, "init_lora_weights", None)
    return way.lower() if isinstance(way, str) else None


def attach(base: Any, config: Any, folder: Path, name: str) -> Any:
    """The base with the adapter's weights in it, as a ``PeftModel``.

    A base whose embedding differs in size from the adapter's is resized, if the adapter holds all of its rows.

    Raises:
        UserError: the adapter does not fit the base.
    """
    from peft import PeftModel, PeftModelForCausalLM

    kind = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
    config.inference_mode = True
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    _resize(base, shapes)
    does_not = f"model {name!r}: the adapter does not fit its base {base.name_or_path!r}"
    try:
        model = kind(base, config)
        result = model.load_adapter(str(folder), "default")
    except KeyError as error:
        raise UserError(f"{does_not}: {WEIGHTS} has no {error.args[0]}") from None
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise UserError(f"{does_not}: {_mismatch(error)}") from None
    read = shapes.keys() - {*result.unexpected_keys}
    left = [key for key in result.unexpected_keys if not _is_second_copy(key, read)]
    weights = model.state_dict()
    filled = {weight.data_ptr() for key, weight in weights.items() if key not in result.missing_keys}
    missing = [key for key in result.missing_keys if weights[key].data_ptr() not in filled]  # not shared by layers
    for keys, what in ((left, "the base has no place for"), (missing, f"{WEIGHTS} has no")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{does_not}: {what} {keys[0].removeprefix(_PREFIX)}{more}")
    return model


def _is_second_copy(key: str, read: set[str]) -> bool:
    """Whether PEFT has read the same from another tensor: it saves copies and tokens of resized layers twice."""
    if key.endswith(_TOKENS):
        return any(other.endswith(_TOKENS) for other in read)
    return ".modules_to_save." in key and key.replace(".modules_to_save", "") in read


def _mismatch(error: Exception) -> str:
    """The mismatch that PEFT reports, in one line; if sizes differ, those of the first tensor."""
    sizes = _SIZES.search(str(error))
    if sizes is None:
        return first_line(error)
    tensor, adapters, bases = sizes.groups()
    short = tensor.removeprefix(_PREFIX).replace(".default", "").replace(".modules_to_save", "")
    return f"{short} is {adapters.replace(', ', ' x ')} in the adapter and {bases.replace(', ', ' x ')} in the base"


def _resize(base: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the base's embedding and head as many rows as the adapter's copies of them have.

    PEFT saves full copies if the embedding was resized before training. They replace every row, so the new rows need no
    particular values. Without a copy of the embedding, and of the head if it is not tied, nothing is changed.
    """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {module: name for name, module in base.named_modules()}
    needed = {names[embedding]}
    if head is not None and head.weight is not embedding.weight:
        needed.add(names[head])
    copies = {_COPY.sub("", key.removeprefix(_PREFIX)): shape for key, shape in shapes.items()}
    rows = {copies[f"{name}.weight"][0] if f"{name}.weight" in copies else None for name in needed}
    size = rows.pop()
    if not rows and size is not None and size != embedding.weight.shape[0]:
        base.resize_token_embeddings(size, mean_resizing=False)


@torch.no_grad()
def merged(model: Any, name: str) -> Any:
    """Merge the adapter ``default`` into its base, in float32 on the CPU; every tensor then has the base's data type.

    Raises:
        UserError: PEFT cannot merge an adapter of this kind, the merged model's logits differ, or memory runs out.
    """
    base = model.base_model.model
    default = base.dtype
    # Models keep some tensors in float32, such as rotary frequencies and router biases.
    tensors = (*base.named_parameters(), *base.named_buffers())
    dtypes = {_BASES_OWN.sub("", tensor): values.dtype for tensor, values in tensors}
    cannot = f"model {name!r}: its adapter cannot be merged into its base"
    try:
        whole = _merged_in_float32(model.cpu().float().eval(), cannot)
        for tensor, values in (*whole.named_parameters(), *whole.named_buffers()):
            values.data = values.data.to(dtypes.get(tensor, default))
    except (RuntimeError, MemoryError) as error:  # torch reports a lack of CPU memory as a plain RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        needs = "merging needs all of its weights in float32, in the CPU's memory"
        raise UserError(f"{cannot}: out of memory: {needs}; free some, then load or resume it again") from None
    return whole.requires_grad_(True)


def _merged_in_float32(model: Any, cannot: str) -> Any:
    """Merge, and compare the model's logits before and after.

    Raises:
        UserError: as for :func:`merged`; the message begins with ``cannot``.
    """
    expected_BTV = _probe(model)
    try:
        whole = model.merge_and_unload(adapter_names=["default"])
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if "memory" in str(error):
            raise
        raise UserError(f"{cannot}: {first_line(error)}") from None
    found_BTV = _probe(whole)
    scale = float(expected_BTV.abs().max().clamp(min=1.0))
    if float((found_BTV - expected_BTV).abs().max()) > _SAME_LOGITS * scale:
        tied = "; it changes embeddings that its base ties" if whole.config.tie_word_embeddings else ""
        raise UserError(f"{cannot}: the merged model computes something else{tied}")
    return whole


def _probe(model: Any) -> Tensor:
    """Logits of the first few tokens of the vocabulary."""
    ids_BT = torch.arange(8, device=next(model.parameters()).device)[None]
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV
