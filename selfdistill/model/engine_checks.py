"""Checks for every form of vLLM: its release, what it can sample, and that it computes the same model.

Legend: L prompt and completion, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.model.fsdp import unsharded
from selfdistill.model.head import unwrap
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Rollout, Sampling

_OLDEST, _BELOW = (0, 28), (0, 33)
SUPPORTED = ">={}.{},<{}.{}".format(*_OLDEST, *_BELOW)
"""Supported releases of vLLM."""
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.01, 2.0
"""vLLM's limits: it raises lower temperatures without an error, and refuses higher ones."""
_PROBE_TOKENS = 16
_LARGEST_GAP = {torch.float32: 0.01}
_LARGEST_GAP_OTHERWISE = 0.5
"""Mean absolute difference of log-probabilities, in nats, above which the engine computes a different model."""


def is_supported(release: str) -> bool:
    """Whether a release of vLLM, such as 0.32.0, is supported."""
    parts = release.split(".")[:2]
    return all(part.isdecimal() for part in parts) and _OLDEST <= tuple(map(int, parts)) < _BELOW


def vocabulary_size(loaded: LoadedModel) -> int:
    """The number of tokens that the model has logits for."""
    size: int = unwrap(loaded.model).config.get_text_config().vocab_size
    return size


def check_temperature(sampling: Sampling) -> None:
    """Refuse temperatures that vLLM would silently alter, or refuse.

    Raises:
        UserError: the message names the problem and the remedy.
    """
    if sampling.temperature and not _LEAST_TEMPERATURE <= sampling.temperature <= _MOST_TEMPERATURE:
        raise UserError(
            f"engine vllm: samples at temperatures from {_LEAST_TEMPERATURE} to {_MOST_TEMPERATURE:g}, found "
            f"{sampling.temperature:g}; change it, or leave engine out"
        )


def probe(loaded: LoadedModel, length: int) -> tuple[list[int], Sampling]:
    """Prompt and policy of the sample that :func:`agreement_gap` compares; no token ends it."""
    prompt = list(range(min(8, vocabulary_size(loaded))))
    return prompt, Sampling(min(_PROBE_TOKENS, length - len(prompt)), temperature=1.0)


def disagreement(gap: float, dtype: torch.dtype) -> str | None:
    """What is wrong with an engine with this :func:`agreement_gap`; None if rounding explains it."""
    if gap <= _LARGEST_GAP.get(dtype, _LARGEST_GAP_OTHERWISE):
        return None
    return f"its log-probabilities are {gap:.2g} nats per token away from the model's"


def agreement_gap(loaded: LoadedModel, prompt: list[int], rollout: Rollout, dtype: torch.dtype) -> float:
    """Mean absolute difference between a sample's log-probabilities and the model's own, in nats per token."""
    own_L = _log_probs(loaded, prompt, rollout.ids, dtype)
    return float((own_L - torch.tensor(rollout.logps)).abs().mean())


@torch.no_grad()
def _log_probs(loaded: LoadedModel, prompt: list[int], completion: list[int], dtype: torch.dtype) -> Tensor:
    """The model's own log-probabilities of a completion."""
    device = loaded.device
    ids_1L = torch.tensor([prompt + completion], device=device)
    half = dtype != torch.float32
    with (
        unsharded(loaded.model),
        torch.autocast(device.type, dtype if half else None, enabled=half, cache_enabled=False),
    ):
        logits_LV = loaded.model(input_ids=ids_1L, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logp_LV = logits_LV.float().log_softmax(-1)
    return logp_LV.gather(-1, ids_1L[0, len(prompt) :, None])[:, 0].cpu()
