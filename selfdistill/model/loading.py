"""Safe loading of models and tokenizers, adapters, and fingerprints of weights."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import sys
from collections.abc import Mapping
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
from selfdistill.data import ChatFormat
from selfdistill.errors import UserError
from selfdistill.model.starter import STARTER_MODELS, starter_model_path


@dataclass
class LoadedModel:
    """A causal language model with its tokenizer and special tokens."""

    model: Any
    """``PreTrainedModel`` or ``PeftModel`` in eval mode, dropout disabled."""
    tokenizer: Any
    name: str
    """The name given by the user."""
    end_token_ids: tuple[int, ...]
    """All tokens that end a reply: those of the generation config and the tokenizer's."""
    pad_token_id: int
    window: int | None
    """Maximum number of tokens of prompt plus completion; None if the model states no limit."""
    notes: list[str] = field(default_factory=list)
    """Decisions made while loading, to tell the user."""
    merged_adapter: bool = False
    """Whether an adapter was merged; a new adapter would then not fit the base that ``name`` refers to."""
    continues_cache: bool | None = None
    """Result of :func:`selfdistill.model.prefix_cache.can_continue_cache`; None before its first call."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def chat(self, kwargs: Mapping[str, Any] | None = None, date: str | None = None) -> ChatFormat:
        """How the model's tokenizer encodes messages; see :class:`ChatFormat`."""
        return ChatFormat(self.tokenizer, self.end_token_ids, kwargs or {}, date)


def load_model(name: str, *, dtype: str = "float32", merge_adapter: bool = False) -> LoadedModel:
    """Load a model and its tokenizer from a starter name, a folder, a run folder or a hub id.

    A run folder stands for its ``final`` folder. An adapter is loaded together with its base. Only safetensors are
    read, and no code from the model's folder is run.

    Args:
        name: the value of ``--model``.
        dtype: ``float32``, ``bfloat16`` or ``auto`` (as saved).
        merge_adapter: merge an adapter into its base, so that a new one can be trained.

    Raises:
        UserError: the model does not exist, is not a causal LM, has no safetensors weights, or has no end token.
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
                    "never read, because they can run code; convert them to safetensors"
                )
            try:
                model: Any = _load_causal(_resolve(base), base, torch_dtype)
            except UserError as error:
                raise UserError(f"model {name!r}: an adapter whose base cannot be loaded: {error}") from None
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
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(
            f"model {name!r}: no usable tokenizer in tokenizer.json and tokenizer_config.json ({reason})"
        ) from None
    model.eval()
    disable_dropout(model)
    loaded = describe(model, tokenizer, name)
    if adapter and merge_adapter:
        loaded.merged_adapter = True
        loaded.notes.append("its adapter is merged into its base; training saves a full model")
    return loaded


def adopt(model: Any, tokenizer: Any, name: str | None = None) -> LoadedModel:
    """A model that the caller has loaded, with its tokenizer; dropout is disabled, and training changes its weights.

    Args:
        name: for messages and saved settings; default: where transformers loaded it from.

    Raises:
        UserError: no tokenizer, an adapter that is not merged, or no end token.
    """
    if not isinstance(model, PreTrainedModel):
        found = type(model).__name__
        if hasattr(model, "peft_config"):
            raise UserError("model: it has an adapter; merge it first (model.merge_and_unload()), or give its folder")
        raise UserError(f"model: found {found}, expected a folder, a name or a transformers PreTrainedModel")
    if not hasattr(tokenizer, "apply_chat_template"):
        found = "none" if tokenizer is None else type(tokenizer).__name__
        raise UserError(f"tokenizer: found {found}; a loaded model needs its tokenizer: give tokenizer=...")
    if model.dtype == torch.float16:
        raise UserError("model: its weights are float16, which training overflows; load it in float32 or bfloat16")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model: all its weights are frozen (requires_grad=False); unfreeze those to be trained")
    model.eval()
    disable_dropout(model)
    return describe(model, tokenizer, name or model.name_or_path or "loaded-model")


def _keep_freed_memory() -> None:
    """On the CPU, let glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system, and every page of the next tensor is mapped and cleared again: up
    to half a million page faults per optimizer step, a third of its time. The setting is process-wide, and resident
    memory then stays at its peak.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return
    trim_threshold, mmap_threshold = -1, -3  # the parameters' numbers in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before glibc 2.35 the mmap threshold is at most 32 MiB. If it is refused, set nothing: setting either parameter
    # stops glibc from raising the threshold by itself.
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
                raise UserError(f"model {name!r}: a run folder without a final model; finish it with train --resume")
            raise UserError(f"model {name!r}: the folder has neither config.json nor adapter_config.json")
        return str(path)
    if path.is_file():
        raise UserError(f"model {name!r}: this is a file; give the folder that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model {name!r}: no such folder")
    if "/" in name and path.parent.is_dir():  # a misspelt folder, not a hub id
        inside = closest(path.name, [folder.name for folder in path.parent.iterdir() if folder.is_dir()], "")
        raise UserError(f"model {name!r}: the folder {path.parent} has no {path.name} in it{inside}")
    return name


def _load_causal(path: str, name: str, dtype: Any) -> Any:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        if Path(path).is_dir():
            raise UserError(f"model {name!r}: config.json cannot be read: {_first_line(error)}") from None
        offline = " (not contacted: offline mode is on)" if is_offline_mode() else ""
        raise UserError(
            f"model {name!r}: no such folder, and not found on the model hub{offline}; "
            f"give a folder, a hub id or one of: {', '.join(STARTER_MODELS)}"
        ) from None
    except ValueError as error:
        if "custom code" in str(error):
            raise UserError(f"model {name!r}: needs code from its own folder, which is never run") from None
        raise UserError(f"model {name!r}: {_first_line(error)}") from None
    architectures = config.architectures or []
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and not any("CausalLM" in a or "LMHead" in a or "Conditional" in a for a in architectures)
    ):
        found = ", ".join(architectures) or config.model_type
        raise UserError(f"model {name!r}: {found} is not a causal language model; use one")
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model {name!r}: its weights are pickled (.bin), which can run code; convert them to safetensors"
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
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"model {name!r}: weights missing or not of the shape in config.json: {wrong[0]}{more}")
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
    notes = []
    written = ChatFormat(tokenizer, (), {}).turn_end_id
    if tokenizer.chat_template and written is None and ends:
        names = " or ".join(map(repr, tokenizer.convert_ids_to_tokens(ends)))
        notes.append(f"the chat template writes no control token after a reply; replies end with {names}")
    elif written is not None and written not in ends:
        token = tokenizer.convert_ids_to_tokens(written)
        notes.append(f"the chat template ends replies with {token!r}, so it is an end token, here and in saved models")
        ends.append(written)
        if model.generation_config is not None:
            model.generation_config.eos_token_id = list(ends)
    if not ends:
        raise UserError(
            f"model {name!r}: neither the tokenizer nor generation_config.json names an end token, so replies would "
            "never stop; set eos_token in tokenizer_config.json"
        )
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        notes.append(f"the tokenizer has no pad token; using its end token {tokenizer.pad_token!r}")
    if not tokenizer.chat_template:
        notes.append(
            "the tokenizer has no chat template; using a plain-text layout (User:, Assistant:), in which a reply ends "
            "where the next turn begins"
        )
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LoadedModel(model, tokenizer, name, tuple(ends), pad, window, notes)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, so that train mode (gradient checkpointing) changes no result."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)
        # Falcon's layers read it from the configuration. Give them a copy, because the model's own is saved with it.
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in configs:
                configs[id(config)] = copy.deepcopy(config)
                _zero_dropout(configs[id(config)])
            module.config = configs[id(config)]


def _zero_dropout(holder: Any) -> None:
    """Attributes are named attention_dropout, hidden_dropout, resid_pdrop, layerdrop and so on."""
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(holder, name, 0.0)


def to_best_device(loaded: LoadedModel) -> LoadedModel:
    """Move the model to the device that accelerate chooses: a GPU if there is one."""
    from accelerate import PartialState

    loaded.model.to(PartialState().device)
    return loaded


def load_for_training(name: str, *, dtype: str = "float32") -> LoadedModel:
    """Load a model to train, with any adapter merged, on the best device; see :func:`load_model`."""
    return to_best_device(load_model(name, dtype=dtype, merge_adapter=True))


def add_lora(loaded: LoadedModel, rank: int, alpha: float | None, seed: int) -> None:
    """Add a LoRA adapter named ``default`` to all linear layers except the head, and freeze the base weights.

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
    """Fingerprint of the weights before training; empty if an adapter was merged.

    Merging may round differently on another machine.
    """
    return "" if loaded.merged_adapter else weights_fingerprint(loaded.model)


def load_matching(name: str, other: LoadedModel, *, dtype: str) -> LoadedModel:
    """Load a model to compare with ``other``, on the device of ``other``.

    Raises:
        UserError: it cannot be loaded, or its vocabulary size differs.
    """
    return matched(load_model(name, dtype=dtype), other)


def matched(loaded: LoadedModel, other: LoadedModel) -> LoadedModel:
    """Move a model to the device of ``other``, with which it is to be compared.

    Raises:
        UserError: its vocabulary size differs.
    """
    # Compare the width of the logits: a tokenizer may have fewer entries, and padding differs.
    own, others = (model.config.get_text_config().vocab_size for model in (loaded.model, other.model))
    if own != others:
        raise UserError(
            f"model {loaded.name!r} has a vocabulary of {own} tokens, model {other.name!r} one of {others}; use models "
            "with the same vocabulary"
        )
    loaded.model.to(other.device)
    return loaded
