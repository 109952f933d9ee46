"""Several replies per episode: the model continues from its cached states instead of reading everything again.

Legend: B episodes, L positions of the cache, W new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from selfdistill.model.decoding_steps import ReadRows
from selfdistill.model.device import any_length
from selfdistill.model.fsdp import unsharded
from selfdistill.model.loading import LoadedModel
from selfdistill.model.precision import cached_casts
from selfdistill.model.prefix_cache import States, can_continue_cache, fill, has_full_attention
from selfdistill.model.rollout_count import counting
from selfdistill.model.sampling import Rollout, Sampling, decode, read, sample
from selfdistill.runtime import all_gather, rank_slice


@dataclass(frozen=True)
class _Known:
    """An episode's cached states between two turns."""

    ids: list[int]
    states: States


def keeps_episodes(loaded: LoadedModel) -> bool:
    """Whether a model can go on with an episode from cached states; if not, it reads each anew at every turn."""
    with unsharded(loaded.model):
        return has_full_attention(loaded.model.config.get_text_config()) and can_continue_cache(loaded)


class TurnSampler:
    """Samples the replies of episodes turn by turn, many episodes at a time.

    Keys and values of an episode are kept until its next turn, so only new tokens are read. Every reply equals what
    :func:`selfdistill.model.sampling.sample` draws from the same tokens, up to rounding. That function is used if a
    model cannot continue from cached states, and with an engine, which has its own cache.

    Args:
        loaded: the model. Its weights must not change.
        count: number of episodes; their assignment to ranks is fixed.
    """

    def __init__(self, loaded: LoadedModel, count: int) -> None:
        self._loaded, self._own = loaded, rank_slice(count)
        self._config = loaded.model.config.get_text_config()
        self._known: dict[int, _Known] = {}
        self._goes_on = loaded.engine is None and keeps_episodes(loaded)

    def __call__(
        self,
        episodes: Sequence[int],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """The next reply of some episodes; omitted episodes are never continued.

        Args:
            episodes: their numbers, ascending.
            prompts: all tokens of each so far, beginning with those of its previous turn.
            sampling: the sampling policy of each reply.
            seeds: one per episode, from :func:`selfdistill.model.sampling.sample_seed`; not needed for greedy decoding.

        Returns:
            One rollout per episode, on every rank.
        """
        loaded = self._loaded
        if not self._goes_on:
            return sample(loaded, prompts, sampling, seeds)
        own = [place for place, number in enumerate(episodes) if self._own.start <= number < self._own.stop]
        mine = [prompts[place] for place in own]
        with counting(loaded) as rollouts:
            with unsharded(loaded.model), cached_casts(loaded.model), any_length(loaded.device.type):
                drawn = self._turn(
                    [episodes[place] for place in own],
                    mine,
                    sampling,
                    None if seeds is None else [seeds[place] for place in own],
                )
            rollouts += all_gather(drawn)
        return rollouts

    def _turn(
        self, episodes: list[int], prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int] | None
    ) -> list[Rollout]:
        """The turn of this rank's episodes."""
        known, self._known = self._known, {}
        if not episodes:
            return []
        before = [known.get(number) for number in episodes]
        known.clear()
        goes_on = [x for x, ids in zip(before, prompts, strict=True) if x is not None and x.ids == ids[: len(x.ids)]]
        rows = self._read_on(goes_on, prompts) if len(goes_on) == len(prompts) else read(self._loaded, prompts)
        states: dict[int, States] = {}

        def leave(cache: DynamicCache, mask_BL: Tensor, places: list[int], samples: list[int]) -> None:
            are_rest = len(states) + len(places) == len(prompts)
            states.update(zip(samples, _taken(cache, mask_BL, places, release=are_rest), strict=True))

        rollouts = decode(self._loaded, rows, sampling, seeds, leave)
        for place, (number, rollout) in enumerate(zip(episodes, rollouts, strict=True)):
            self._known[number] = _Known([*prompts[place], *rollout.ids[:-1]], states[place])
        return rollouts

    def _read_on(self, known: list[_Known], prompts: Sequence[Sequence[int]]) -> ReadRows:
        """Read the new tokens after the cached ones, whose states are consumed."""
        device = self._loaded.device
        filled_B = torch.tensor([len(x.ids) for x in known], device=device)
        new = [list(ids[len(x.ids) :]) for x, ids in zip(known, prompts, strict=True)]
        cache = DynamicCache(config=self._config)
        layers: Any = cache.layers
        for layer in reversed(layers):  # only one layer at a time is held twice
            fill(layer, [[x.states.pop()] for x in known])
        done, width = cache.get_seq_length(), max(map(len, new))
        pads = [width - len(ids) for ids in new]
        ids_BW = torch.tensor(
            [[self._loaded.pad_token_id] * pad + ids for pad, ids in zip(pads, new, strict=True)], device=device
        )
        known_BL = torch.arange(done, device=device) >= done - filled_B[:, None]
        new_BW = torch.arange(width, device=device) >= torch.tensor(pads, device=device)[:, None]
        mask_BL = torch.cat([known_BL, new_BW], dim=1).long()
        logits_BV = self._loaded.model(
            input_ids=ids_BW,
            attention_mask=mask_BL,
            position_ids=(mask_BL.cumsum(1)[:, done:] - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        padded = [pad > 0 or len(x.ids) < done for pad, x in zip(pads, known, strict=True)]
        return ReadRows(cache, logits_BV, mask_BL, padded, torch.zeros_like(filled_B))


def _taken(cache: DynamicCache, mask_BL: Tensor, places: Sequence[int], *, release: bool) -> list[States]:
    """Copies of the states of some rows, without padding. With ``release``, each layer is freed once it is copied."""
    layers: Any = cache.layers
    kept = [mask_BL[place].nonzero()[:, 0] for place in places]  # as a mask, each layer would wait for the device
    taken: list[States] = [[] for _ in places]
    for layer in layers:
        for states, place, index_L in zip(taken, places, kept, strict=True):
            pair = (layer.keys[place][:, index_L], layer.values[place][:, index_L])
            states.append(pair)
        if release:
            layer.release()
    return taken
