"""Rollouts: batched sampling with a separate random generator per sample.

Legend: B unfinished samples, L length so far, T completion tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from selfdistill.data import NEXT_TURN, pictures_in
from selfdistill.errors import UserError
from selfdistill.model.decoding_steps import ReadRows, select_rows, steps_for
from selfdistill.model.device import any_length, pass_tokens, running_sum, tokens_per_check
from selfdistill.model.engine import Answered, engine_for
from selfdistill.model.fsdp import unsharded
from selfdistill.model.loading import LoadedModel
from selfdistill.model.pictures import has_own_positions, position_shift
from selfdistill.model.precision import cached_casts
from selfdistill.model.prefix_cache import can_continue_cache, common_prefix_length
from selfdistill.model.rollout_count import counting
from selfdistill.runtime import all_gather, rank_slice


@dataclass(frozen=True)
class Sampling:
    """The sampling policy: softmax(logits / temperature), truncated to ``top_k`` tokens and then to ``top_p`` mass."""

    max_completion_length: int
    """In tokens."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    """1: no limit."""
    top_k: int = 0
    """0: no limit."""

    @property
    def is_full(self) -> bool:
        """Whether every token may be sampled, with its probability at the temperature."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Rollout:
    """One completion."""

    ids: list[int]
    """Sampled tokens, including the end token, if any."""
    logps: list[float]
    """Log-probability of each token under the sampling policy (0 for greedy)."""
    truncated: bool
    """Reached the length limit without an end token."""


def sample_seed(seed: int, step: int, row: int, generation: int) -> int:
    """A 63-bit seed for one sample: the first 8 bytes of SHA-256 of the four numbers."""
    digest = hashlib.sha256(f"{seed}/{step}/{row}/{generation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
) -> list[Rollout]:
    """Sample one completion per prompt, stopping each at any of the model's end tokens.

    Without a chat template a sample also stops where the plain-text layout's next turn begins.

    Token t of a sample is the inverse of the policy's cumulative distribution at the t-th uniform number of the
    sample's own generator. So a sample depends only on its seed and prompt, not on its batch, padding or earlier
    samples. If ``loaded`` has an engine, it samples instead of PyTorch, from the same policy with other random numbers.
    ``loaded.rollout_count`` counts the tokens and the time.

    Args:
        loaded: the model to sample from.
        prompts: token ids, not empty.
        sampling: the policy.
        seeds: one per prompt, from :func:`sample_seed`; not needed for greedy decoding.

    Returns:
        One rollout per prompt, on every rank.

    Raises:
        UserError: an engine cannot sample from this model, with this policy or from prompts with pictures; or the model
            does not support a key/value cache.
        EngineFailed: the engine does not start, fails or is late.
    """
    if loaded.engine is not None and any(map(pictures_in, prompts)):
        raise UserError("setting 'engine': prompts with pictures can be sampled only by PyTorch; leave it out")
    with counting(loaded) as rollouts:
        if loaded.engine is not None:
            rollouts += engine_for(loaded).sample(loaded, prompts, sampling, seeds)
        else:
            own = rank_slice(len(prompts))
            own_prompts, own_seeds = prompts[own], None if seeds is None else seeds[own]
            with unsharded(loaded.model), cached_casts(loaded.model), any_length(loaded.device.type):
                drawn = decode(loaded, read(loaded, own_prompts), sampling, own_seeds) if own_prompts else []
            rollouts += all_gather(drawn)
    return rollouts


def check_room(loaded: LoadedModel, prompts: Sequence[Sequence[int]], tokens: int, what: Answered) -> None:
    """Check before anything is sampled that an engine has room for prompts and what follows; PyTorch always has.

    Args:
        loaded: the model to sample from.
        prompts: token ids.
        tokens: maximum number of tokens after a prompt.
        what: what these are, a completion or an episode.

    Raises:
        UserError: it has not; or as :func:`sample`.
        EngineFailed: the engine does not start.
    """
    if loaded.engine is not None:
        engine_for(loaded).check_room(prompts, tokens, what)


def sample_at_its_longest(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    at: Callable[[str], object],
    kind: str,
) -> None:
    """Sample the first and the last token, as if samples ended just before the last: the peak memory of sampling.

    The tokens between have states of zeros. When samples end, the states of the others are copied, one layer at a time.
    Meant for fake tensors, whose end tokens :func:`sample` could not detect.

    Args:
        loaded: the model.
        prompts: token ids.
        sampling: the policy.
        at: called with the name of each part of the work before it begins.
        kind: of the device that is meant.
    """
    zeros_B = torch.zeros(len(prompts), dtype=torch.float64)
    uniform_B = zeros_B if sampling.temperature > 0 else None
    between = max(0, sampling.max_completion_length - 2)
    with cached_casts(loaded.model):
        at("prompts")
        rows = read(loaded, prompts)
        logits_BV, rows.padded = rows.logits_BV, [True] * len(prompts)  # as other prompts would be
        at("states")
        steps = steps_for(loaded, rows, between + 1, kind)
        steps.skip(between)
        at("choice")
        token_B, _ = choose(logits_BV.float(), sampling, uniform_B)
        at("last token")
        logits_BV = steps(token_B)
        at("last choice")
        choose(logits_BV.float(), sampling, uniform_B)
        if len(prompts) > 1:
            at("rows that stay")
            steps.keep(list(range(steps.copied(len(prompts)))))


def cut_at_next_turn(loaded: LoadedModel, rollout: Rollout) -> Rollout:
    """The rollout up to the beginning of the plain-text layout's next turn, if it contains one."""
    for end in range(1, len(rollout.ids) + 1):
        if _at_next_turn(loaded, rollout.ids[:end]):
            return Rollout(rollout.ids[:end], rollout.logps[:end], truncated=False)
    return rollout


def decode(
    loaded: LoadedModel,
    rows: ReadRows,
    sampling: Sampling,
    seeds: Sequence[int] | None,
    leave: Callable[[DynamicCache, Tensor, list[int], list[int]], object] | None = None,
) -> list[Rollout]:
    """Continue each row as :func:`sample` does.

    Where looking for ended samples waits for the device, that happens every few tokens
    (:func:`selfdistill.model.device.tokens_per_check`). Until then they go on, and their further tokens are dropped.

    Args:
        loaded: the model.
        rows: the sequences to continue; consumed.
        sampling: the policy.
        seeds: one per row.
        leave: called when samples have ended, before their rows leave the batch, with the cache, the mask of the tokens
            of each row and its sample, the indices of the rows that end, and the indices of their samples. The last
            token of a sample is not among them.
    """
    device, count, limit = loaded.device, len(rows.logits_BV), sampling.max_completion_length
    width, every = rows.mask_BL.shape[1], tokens_per_check(device.type)
    uniform_BT = _uniform_numbers(sampling, seeds, device)
    logits_BV, steps = rows.logits_BV, steps_for(loaded, rows, limit - 1, device.type)
    tokens = torch.empty(count, limit, dtype=torch.long, device=device)
    logps = torch.zeros(count, limit, device=device)
    lengths: dict[int, int] = {}  # of the samples that have ended
    alive = list(range(count))  # the sample in each row of the batch
    alive_B = torch.arange(count, device=device)
    checked = 0
    for t in range(limit):
        uniform_B = None if uniform_BT is None else uniform_BT[:, t]
        logits_BV = logits_BV.float() if loaded.pictures is None else loaded.pictures.allowed(logits_BV.float())
        token_B, logp_B = choose(logits_BV, sampling, uniform_B)
        tokens[alive_B, t], logps[alive_B, t] = token_B, logp_B
        is_last = t == limit - 1
        if is_last or (t + 1) % every == 0:
            found = _ends(loaded, tokens[alive_B, : t + 1], checked)  # waits for the device
            ends = {row: length for row, length in found.items() if alive[row] not in lengths}
            lengths |= {alive[row]: length for row, length in ends.items()}
            going, checked = [row for row, i in enumerate(alive) if i not in lengths], t + 1
            leaving = sorted([*ends, *going]) if is_last else list(ends)
            if leave is not None and leaving:
                valid = [width + ends.get(row, limit) - 1 for row in range(len(alive))]
                leave(steps.cache, _masked(steps.mask_BL, valid), leaving, [alive[row] for row in leaving])
            if is_last or not going:
                break
            if len(going) <= steps.staying(len(alive)):  # finished rows leave the batch
                keep_B = torch.tensor(going, device=device)
                steps.keep(going)
                alive, alive_B, token_B = [alive[row] for row in going], alive_B[keep_B], token_B[keep_B]
                if uniform_BT is not None:
                    uniform_BT = uniform_BT[keep_B.to(uniform_BT.device)]
        logits_BV = steps(token_B)
    drawn = enumerate(zip(tokens.tolist(), logps.tolist(), strict=True))
    return [Rollout(ids[: lengths.get(i)], known[: lengths.get(i)], i not in lengths) for i, (ids, known) in drawn]


def _uniform_numbers(sampling: Sampling, seeds: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """The numbers by which each sample's tokens are chosen, ``uniform_BT``; None for greedy decoding."""
    if sampling.temperature == 0:
        return None
    assert seeds is not None, "sampling needs a seed per prompt"
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    length = sampling.max_completion_length
    uniform_BT = torch.stack([torch.rand(length, generator=g, dtype=torch.float64) for g in generators])
    return uniform_BT if device.type == "mps" else uniform_BT.to(device)  # it has no float64


def _masked(mask_BL: Tensor, lengths: list[int]) -> Tensor:
    """A mask without what follows the first places of each row."""
    place_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return mask_BL * (place_L < torch.tensor(lengths, device=mask_BL.device)[:, None])


def _ends(loaded: LoadedModel, tokens_BT: Tensor, checked: int) -> dict[int, int]:
    """Number of tokens up to the end, for the rows that end after their first ``checked`` tokens."""
    start = max(0, checked - _TAIL)
    found = [_end(loaded, ids, checked - start) for ids in tokens_BT[:, start:].tolist()]
    return {row: start + length for row, length in enumerate(found) if length is not None}


def _end(loaded: LoadedModel, ids: list[int], checked: int) -> int | None:
    """Number of tokens up to the first end after the first ``checked`` tokens."""
    for length in range(checked + 1, len(ids) + 1):
        if ids[length - 1] in loaded.end_token_ids or _at_next_turn(loaded, ids[:length]):
            return length
    return None


_TAIL = 2 * len(NEXT_TURN)
"""Tokens that contain the beginning of the next turn if a sample ends with it: each has at least one character."""


def _at_next_turn(loaded: LoadedModel, ids: list[int]) -> bool:
    """Whether a sample has reached the next turn of the plain-text layout; never with a chat template."""
    return not loaded.tokenizer.chat_template and NEXT_TURN in loaded.tokenizer.decode(ids[-_TAIL:])


def read(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> ReadRows:
    """Prefill: read the prompts.

    Equal prompts are computed once, as is a prefix that all share. The rest is left-padded.
    """
    model, device = loaded.model, loaded.device
    keys = [(tuple(prompt), pictures_in(prompt)) for prompt in prompts]
    unique = dict(zip(keys, prompts, strict=True))
    places = {key: number for number, key in enumerate(unique)}
    index = [places[key] for key in keys]  # the row of each prompt
    rows = [ids for ids, _ in unique]

    cache = DynamicCache(config=model.config.get_text_config())
    common = _common_beginning(loaded, rows, cache, pictured=any(pictures for _, pictures in unique))
    if common:
        beginning = torch.tensor([rows[0][:common]], device=device)
        model(input_ids=beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(rows))

    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    padded_rows = [[loaded.pad_token_id] * pad + list(row[common:]) for pad, row in zip(pads, rows, strict=True)]
    ids_BL = torch.tensor(padded_rows, device=device)
    mask_BL = torch.tensor([[1] * common + [0] * pad + [1] * (width - common - pad) for pad in pads], device=device)
    seen: dict[str, Any] = {}
    if loaded.pictures is not None:
        seen = loaded.pictures.inputs(model, list(unique.values()), ids_BL, pads)
    if not (seen and has_own_positions(model)):
        seen["position_ids"] = (mask_BL.cumsum(1)[:, common:] - 1).clamp(min=0)
    logits_BV = model(
        input_ids=ids_BL, attention_mask=mask_BL, past_key_values=cache, use_cache=True, logits_to_keep=1, **seen
    ).logits[:, -1]
    shift_B = torch.zeros_like(mask_BL[:, 0]) if "position_ids" in seen else position_shift(model)
    if not any(getattr(layer, "is_initialized", True) for layer in cache.layers):
        raise UserError(
            f"model {loaded.name!r}: does not support a key/value cache, which sampling needs; use another model"
        )
    index_B = torch.tensor(index, device=device)
    if len(rows) < len(prompts):
        select_rows(cache, index_B)
    padded = [pads[place] > 0 for place in index]
    return ReadRows(cache, logits_BV[index_B], mask_BL[index_B], padded, shift_B[index_B])


def _common_beginning(
    loaded: LoadedModel, rows: Sequence[Sequence[int]], cache: DynamicCache, *, pictured: bool
) -> int:
    """Tokens with which all rows begin, if they can be read once and that is worth a pass of its own; else 0.

    The padding then follows them. A sliding window counts cache positions, so it must not span a gap.
    """
    if len(rows) == 1 or pictured or any(cache.is_sliding):
        return 0
    common = min(common_prefix_length(rows[0], row) for row in rows)
    is_worth_it = common * (len(rows) - 1) > pass_tokens(loaded.device.type)
    return common if is_worth_it and can_continue_cache(loaded) else 0


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Next tokens by inverse cumulative distribution, and their log-probabilities under the policy.

    Args:
        logits_BV: float32 logits.
        sampling: the policy; temperature 0 takes the most likely token.
        uniform_B: float64 numbers in [0, 1); None for greedy decoding.

    Returns:
        ``token_B`` (int64) and ``logp_B`` (float32), on the logits' device.
    """
    device = logits_BV.device
    if uniform_B is None:
        return logits_BV.argmax(-1), torch.zeros(len(logits_BV), device=device)
    if device.type == "mps":  # has no float64
        logits_BV = logits_BV.cpu()
    uniform_B = uniform_B.to(logits_BV.device)
    probs_BV = (logits_BV / sampling.temperature).softmax(-1, dtype=torch.float64)
    if sampling.top_k > 0 or sampling.top_p < 1:
        sorted_BV, order_BV = torch.sort(probs_BV, dim=-1, descending=True, stable=True)
        if 0 < sampling.top_k < sorted_BV.shape[-1]:
            sorted_BV[:, sampling.top_k :] = 0
        sorted_BV /= sorted_BV.sum(-1, keepdim=True)
        # Keep a token if the mass before it is below top_p: the smallest set that reaches top_p, never empty.
        sorted_BV.masked_fill_(running_sum(sorted_BV) - sorted_BV >= sampling.top_p, 0)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV)
    cumulative_BV = running_sum(probs_BV)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=probs_BV.shape[-1] - 1)
    logp_B = (probs_BV.gather(-1, token_B[:, None]) / cumulative_BV[:, -1:]).log()[:, 0]
    return token_B.to(device), logp_B.float().to(device)
