"""Models and tokenizers: safe loading, adapters, fingerprints of weights."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfdistill.config import closest
from selfdistill.errors import UserError
from selfdistill.model.starter import STARTER_MODELS, starter_model_path


@dataclass
class LoadedModel:
    """A causal language model with what is needed to prompt it and to stop it."""

    model: Any
    """``PreTrainedModel`` or ``PeftModel`` in eval mode, dropout disabled."""
    tokenizer: Any
    name: str
    """As the user gave it."""
    end_token_ids: tuple[int, ...]
    """Every token that ends a reply: the tokenizer's and those of the generation config."""
    pad_token_id: int
    window: int | None
    """Most tokens of prompt and completion together; None where the model states no limit."""
    notes: list[str] = field(default_factory=list)
    """What was decided while loading and should be said."""
    merged_adapter: bool = False
    """An adapter is folded in: a new adapter would not fit the base that the model's name stands for."""
    continues_cache: bool | None = None
    """What :func:`selfdistill.model.prefix_cache.can_continue_cache` found; None before it was asked."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_model(name: str, *, dtype: str = "float32", merge_adapter: bool = False) -> LoadedModel:
    """Load a model and its tokenizer from a starter name, a folder, a run folder or a hub id.

    A run folder stands for its ``final``. An adapter folder is loaded on its base. Only safetensors are read and no
    code from the model's folder is run.

    Args:
        name: what the user gave as ``--model``.
        dtype: ``float32``, ``bfloat16`` or ``auto`` (as the file has it).
        merge_adapter: fold an adapter into its base, so that a new one can be trained on top.

    Raises:
        UserError: no such model, not a causal LM, no weights in safetensors, no end token.
    """
    path = _resolve(name)
    _keep_freed_memory()
    adapter = (Path(path) / "adapter_config.json").is_file()
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        if adapter:
            from peft import PeftConfig, PeftModel

            base = PeftConfig.from_pretrained(path).base_model_name_or_path
            if not base:
                raise UserError(f"model {name!r}: adapter_config.json names no base model")
            if not (Path(path) / "adapter_model.safetensors").is_file():  # PEFT would unpickle a .bin
                raise UserError(
                    f"model {name!r}: the adapter has no adapter_model.safetensors, and pickled weights (.bin) are "
                    "never read, for they can run code; convert them to safetensors"
                )
            try:
                model: Any = _load_causal(_resolve(base), base, torch_dtype)
            except UserError as error:
                raise UserError(f"model {name!r}: this is an adapter, and its base cannot be loaded: {error}") from None
            model = PeftModel.from_pretrained(model, path)
            if merge_adapter:
                model = model.merge_and_unload().requires_grad_(True)
        else:
            model = _load_causal(path, name, torch_dtype)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {name!r}: cannot be loaded: {_first_line(error)}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(
            f"model {name!r}: no usable tokenizer in tokenizer.json and tokenizer_config.json ({reason})"
        ) from None
    model.eval()
    disable_dropout(model)
    loaded = describe(model, tokenizer, name)
    if adapter and merge_adapter:
        loaded.merged_adapter = True
        loaded.notes.append("its adapter is folded into its base; what is trained on top is saved as a whole model")
    return loaded


def adopt(model: Any, tokenizer: Any, name: str | None = None) -> LoadedModel:
    """A model that the caller has loaded, with its tokenizer; dropout is disabled, and training changes its weights.

    Args:
        name: for messages and saved settings; default: where transformers loaded it from.

    Raises:
        UserError: no tokenizer, an adapter that is not merged, or no end token.
    """
    if tokenizer is None:
        raise UserError("a loaded model needs its tokenizer: give tokenizer=...")
    if hasattr(model, "peft_config"):
        raise UserError(
            "the loaded model has an adapter: merge it first (model.merge_and_unload()), or give its folder"
        )
    model.eval()
    disable_dropout(model)
    return describe(model, tokenizer, name or getattr(model, "name_or_path", "") or "loaded-model")


def _keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones, on the CPU, where it is glibc.

    By default it gives large blocks back to the system, and each page of the next tensor is fetched and cleared again:
    up to half a million page faults in one optimizer step, a third of its time. This holds for the whole process, whose
    resident memory then does not fall below its peak.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    trim_threshold, mmap_threshold = -1, -3  # the parameters' numbers in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before glibc 2.35 the second may be 32 MiB at most. Where it is refused, nothing else may be set: either stops the
    # library from raising the threshold on its own.
    if mallopt is not None and (mallopt(mmap_threshold, 2**31 - 1) or mallopt(mmap_threshold, 2**25)):
        mallopt(trim_threshold, -1)  # never


def _resolve(name: str) -> str:
    """The folder or hub id behind a model's name."""
    if name in STARTER_MODELS:
        return str(starter_model_path(name))
    path = Path(name)
    if (path / "final").is_dir():
        return str(path / "final")
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            if (path / "config.yaml").is_file():
                raise UserError(f"model {name!r}: a run folder without a final model: finish it with train --resume")
            raise UserError(f"model {name!r}: the folder has neither config.json nor adapter_config.json")
        return str(path)
    if path.is_file():
        raise UserError(f"model {name!r}: this is a file; give the folder that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model {name!r}: no such folder")
    if "/" in name and path.parent.is_dir():  # before the hub is asked for what is but misspelt
        inside = closest(path.name, [folder.name for folder in path.parent.iterdir() if folder.is_dir()], "")
        raise UserError(f"model {name!r}: there is a folder {path.parent} here, and no {path.name} in it{inside}")
    return name


def _load_causal(path: str, name: str, dtype: Any) -> Any:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        if Path(path).is_dir():
            raise UserError(f"model {name!r}: config.json cannot be read: {_first_line(error)}") from None
        offline = ", which was not asked (offline mode is on)" if is_offline_mode() else ""
        raise UserError(
            f"model {name!r}: no such folder, and not found on the model hub{offline}; "
            f"give a folder, a hub id or one of: {', '.join(STARTER_MODELS)}"
        ) from None
    except ValueError as error:
        if "custom code" in str(error):
            raise UserError(f"model {name!r}: it needs code from its own folder, which is never run") from None
        raise UserError(f"model {name!r}: {_first_line(error)}") from None
    architectures = config.architectures or []
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and not any("CausalLM" in a or "LMHead" in a or "Conditional" in a for a in architectures)
    ):
        found = ", ".join(architectures) or config.model_type
        raise UserError(f"model {name!r}: {found} is not a causal language model, which this needs")
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model {name!r}: its weights are pickled (.bin), which can run code when read; convert them to safetensors"
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported here, in one line
    )
    model, info = loaded
    wrong = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if wrong:
        raise UserError(
            f"model {name!r}: {len(wrong)} weights are missing or not of the shape that config.json says, such as "
            f"{wrong[0]}"
        )
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe(model: Any, tokenizer: Any, name: str) -> LoadedModel:
    """The model with its end and pad tokens, its window, and notes on what was decided.

    Raises:
        UserError: no end token.
    """
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise UserError(
            f"model {name!r}: neither the tokenizer nor generation_config.json names an end token, so replies would "
            "never stop; set eos_token in tokenizer_config.json"
        )
    notes = []
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        notes.append(f"the tokenizer has no pad token; its end token {tokenizer.pad_token!r} is used to pad")
    if not tokenizer.chat_template:
        notes.append("the tokenizer has no chat template; the plain-text layout of selfdistill.data.contexts is used")
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LoadedModel(model, tokenizer, name, tuple(ends), pad, window, notes)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, so that train mode (gradient checkpointing) changes no number."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)
        # Layers of Falcon look it up in the configuration. They get a copy, for the model's own is saved with it.
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in configs:
                configs[id(config)] = copy.deepcopy(config)
                _zero_dropout(configs[id(config)])
            module.config = configs[id(config)]


def _zero_dropout(holder: Any) -> None:
    """Models call it attention_dropout, hidden_dropout, resid_pdrop, layerdrop and more."""
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(holder, name, 0.0)


def to_best_device(loaded: LoadedModel) -> LoadedModel:
    """Move the model to the device that accelerate would choose: a GPU where there is one."""
    from accelerate import PartialState

    loaded.model.to(PartialState().device)
    return loaded


def load_for_training(name: str, *, dtype: str = "float32") -> LoadedModel:
    """The model that a training begins from, with an adapter folded in, on the best device; see :func:`load_model`."""
    return to_best_device(load_model(name, dtype=dtype, merge_adapter=True))


def add_lora(loaded: LoadedModel, rank: int, alpha: float | None, seed: int) -> None:
    """Put a LoRA adapter named ``default`` on all linear layers but the head; the base weights are frozen.

    The adapter's weights are float32 whatever the model's data type (PEFT's ``autocast_adapter_dtype``).
    """
    from peft import LoraConfig, get_peft_model

    scale: Any = alpha or 2 * rank  # PEFT's annotation says int, but it only divides by the rank
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded.model = get_peft_model(loaded.model, config)
    loaded.model.eval()


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes, data types and bits of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def start_fingerprint(loaded: LoadedModel) -> str:
    """Fingerprint of the weights that a training begins from; empty where an adapter was folded in.

    A merged adapter's product may be rounded otherwise on another machine.
    """
    return "" if loaded.merged_adapter else weights_fingerprint(loaded.model)


def load_matching(name: str, other: LoadedModel, *, dtype: str) -> LoadedModel:
    """Load a model to be compared with another, on that one's device.

    Raises:
        UserError: it cannot be loaded, or its vocabulary is another.
    """
    loaded = load_model(name, dtype=dtype)
    # The width of the logits, which are what is compared: a tokenizer may have fewer entries, and padding differs.
    own, others = (model.config.get_text_config().vocab_size for model in (loaded.model, other.model))
    if own != others:
        raise UserError(
            f"model {name!r} has a vocabulary of {own} tokens, model {other.name!r} of {others}: a distance between "
            "them needs the same"
        )
    loaded.model.to(other.device)
    return loaded
