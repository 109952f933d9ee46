"""A model's weights as stored in safetensors files, read one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.model.adapters import WEIGHTS, changes_base, read_config
from selfdistill.model.files import local_folder, resolve

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_PREFIX, _FIRST, _SECOND = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_MORE_THAN_LORA = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")
_MERGE_FIRST = "merge it first with selfdistill export --merge true, and give the result"


class StoredWeights:
    """The tensors of a model folder by name.

    Raises:
        UserError: the folder has no such files, or they cannot be read.
    """

    base: StoredWeights | None = None
    """An adapter's base; None for a full model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        try:
            self.files = {tensor: folder / file for tensor, file in self._index().items()}
            """The file of each tensor."""
            self._open: dict[Path, Any] = {file: _opened(file) for file in sorted(set(self.files.values()))}
            slices = {tensor: self._open[file].get_slice(tensor) for tensor, file in self.files.items()}
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"model {name!r}: its weights cannot be read ({error})") from None
        self.shapes = {tensor: tuple(part.get_shape()) for tensor, part in slices.items()}
        self.types = {tensor: str(part.get_dtype()) for tensor, part in slices.items()}
        """Data types, as safetensors names them."""

    def _index(self) -> dict[str, str]:
        """The file name of each tensor."""
        if (self.folder / _INDEX).is_file():
            return dict(json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
        if (self.folder / _WHOLE).is_file():
            return dict.fromkeys(_opened(self.folder / _WHOLE).keys(), _WHOLE)
        raise FileNotFoundError(f"{self.folder} has neither {_WHOLE} nor {_INDEX}")

    def is_float(self, tensor: str) -> bool:
        """Whether a tensor holds plain numbers rather than quantised ones."""
        return self.types[tensor] in _FLOATS

    def read(self, tensor: str) -> Tensor:
        """A tensor: a float32 copy if it holds plain numbers, else unchanged."""
        value: Tensor = self._open[self.files[tensor]].get_tensor(tensor)
        return value.float() if self.is_float(tensor) else value


class _StoredAdapter(StoredWeights):
    """A LoRA adapter on its base: the base's tensors, with the adapter's update added.

    Raises:
        UserError: the adapter is not just LoRA on linear layers, does not fit its base, or the base is missing.
    """

    def __init__(self, name: str, folder: Path) -> None:
        config = read_config(folder, name)
        self.name, self.folder = name, folder
        try:
            self._adapter = _opened(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"model {name!r}: its weights cannot be read ({error})") from None
        keys = set(self._adapter.keys())
        modules = sorted(key.removesuffix(_FIRST) for key in keys if key.endswith(_FIRST))
        is_lora = getattr(config.peft_type, "value", config.peft_type) == "LORA"
        more = changes_base(config) or any(getattr(config, option, None) for option in _MORE_THAN_LORA)
        if not is_lora or more or keys != {module + part for module in modules for part in (_FIRST, _SECOND)}:
            raise UserError(f"model {name!r}: the adapter is more than LoRA on linear layers; {_MERGE_FIRST}")
        self._modules = {f"{module.removeprefix(_PREFIX)}.weight": module for module in modules}
        self._scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        self.base = base = stored_weights(str(config.base_model_name_or_path))
        self.files, self.shapes, self.types = base.files, base.shapes, base.types
        for tensor, module in self._modules.items():
            sizes = (self._adapter.get_slice(module + part).get_shape() for part in (_SECOND, _FIRST))
            (rows, _), (_, columns) = sizes
            if base.shapes.get(tensor) != (rows, columns):
                raise UserError(
                    f"model {name!r}: the adapter changes {tensor} of {rows} x {columns}, and the files of its base "
                    f"{base.name!r} have no such tensor; {_MERGE_FIRST}"
                )

    def read(self, tensor: str) -> Tensor:
        assert self.base is not None
        value = self.base.read(tensor)
        if module := self._modules.get(tensor):
            first, second = (self._adapter.get_tensor(module + part).float() for part in (_FIRST, _SECOND))
            value = value.addmm(second, first, alpha=self._scaling)
        return value


def stored_bytes(name: str, adapter_base: str | None = None) -> int:
    """Bytes of a model's weight files on this machine, for an adapter with its base's; 0 if they are not there.

    Args:
        name: the value of ``--model``.
        adapter_base: the base of an adapter, if it is not where ``adapter_config.json`` says.

    Raises:
        UserError: there is no such folder, or the adapter's settings cannot be read.
    """
    folder = local_folder(resolve(name))
    if folder is None:
        return 0
    own = sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())
    if not (folder / "adapter_config.json").is_file():
        return own
    base = stored_bytes(str(adapter_base or read_config(folder, name).base_model_name_or_path))
    return own + base if base else 0


def stored_weights(name: str) -> StoredWeights:
    """The stored weights of a model: a full model, or a LoRA adapter with its base.

    Args:
        name: run folder, model folder, hub id in the local cache, or ``smollm2-135m``, the only one that is downloaded.

    Raises:
        UserError: there is no such model on this machine, or its weights cannot be read.
    """
    folder = local_folder(resolve(name))
    if folder is None:
        raise UserError(f"model {name!r}: not on this machine; download it first, or give a folder")
    return (_StoredAdapter if (folder / "adapter_config.json").is_file() else StoredWeights)(name, folder)


def overwrite_tensor(file: Path, name: str, value: Tensor) -> None:
    """Overwrite one tensor in a safetensors file in place; ``value`` must have its data type and shape."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start, stop = json.loads(stream.read(length))[name]["data_offsets"]
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert stop - start == data.nbytes
        stream.seek(8 + length + start)
        stream.write(data.data)


def _opened(file: Path) -> Any:
    return safe_open(str(file), framework="pt")
