"""Shared by vLLM in this process and on servers: the policy, the ranks' shares of the prompts, and error handling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from selfdistill.config import EngineSettings
from selfdistill.errors import EngineFailed, UserError
from selfdistill.model.engine import Answered
from selfdistill.model.engine_checks import check_temperature, vocabulary_size
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Rollout, Sampling, cut_at_next_turn
from selfdistill.runtime import RaisedOnAllRanks, all_gather, rank_slice

Result = TypeVar("Result")


class VllmSampling(ABC):
    """Sampling with vLLM, for models of one configuration, one at a time.

    Args:
        loaded: the first model to sample from.
        settings: the engine's settings.
        dtype: data type of the engine's arithmetic.
    """

    length: int
    """Maximum length of a prompt with its completion, in tokens."""
    limited_by: str
    """What else may limit the length besides the model's context window, for messages."""
    longer_with: str
    """How to raise that limit."""

    def __init__(self, loaded: LoadedModel, settings: EngineSettings, dtype: torch.dtype) -> None:
        self.sync_s = 0.0
        self.failed: str | None = None
        """Why it is no longer used."""
        self._settings, self._dtype = settings, dtype
        self._vocabulary = vocabulary_size(loaded)

    def sample(
        self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None
    ) -> list[Rollout]:
        """One completion per prompt; see :func:`selfdistill.model.sampling.sample`.

        A sample depends on its own seed, and on its batch only through rounding.

        Raises:
            UserError: a prompt with its completion exceeds the engine's length, or vLLM cannot use the policy.
            EngineFailed: the engine failed, now or earlier, or was late; raised on all ranks.
        """
        if self.failed:
            raise EngineFailed(f"engine vllm: it failed earlier ({self.failed}) and is not used again")
        self.check_room(prompts, sampling.max_completion_length)
        check_temperature(sampling)
        assert sampling.temperature == 0 or seeds is not None, "sampling needs a seed per prompt"
        rollouts = all_gather(self._sampled(loaded, prompts, sampling, seeds, rank_slice(len(prompts))))
        if not loaded.tokenizer.chat_template:
            rollouts = [cut_at_next_turn(loaded, rollout) for rollout in rollouts]
        return rollouts

    def check_room(self, prompts: Sequence[Sequence[int]], tokens: int, what: Answered = "completion") -> None:
        """Refuse prompts after which it has no room for so many tokens; see :meth:`Engine.check_room`."""
        longest = max(map(len, prompts), default=0) + tokens
        if longest > self.length:
            raise UserError(
                f"engine vllm: a prompt with its {what} has up to {longest} tokens, and the engine allows "
                f"{self.length}: the model's context window{self.limited_by}; lower max_{what}_length or "
                f"max_prompt_length, or {self.longer_with}"
            )

    @abstractmethod
    def _sampled(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        own: slice,
    ) -> list[Rollout]:
        """Load the model's weights, and sample this rank's ``own`` share of the prompts."""

    def _policy(
        self, sampling: Sampling, seeds: Sequence[int] | None, number: int, ends: Sequence[int]
    ) -> dict[str, Any]:
        """The parameters of sample ``number`` in vLLM's terms; it ends only at the tokens ``ends``."""
        seeded = {} if seeds is None or sampling.temperature == 0 else {"seed": seeds[number]}
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k if sampling.top_k < self._vocabulary else 0,
            "max_tokens": sampling.max_completion_length,
            "stop_token_ids": list(ends),
            "ignore_eos": True,  # so that no other tokens stop it
            **seeded,
        }

    def _together(self, work: Callable[[], Result]) -> Result:
        """Do this rank's part of a joint task; if one rank fails, all do, so that no rank waits for another.

        Raises:
            UserError: a mistake, on all ranks.
            EngineFailed: on all ranks.
        """
        found: list[Result] = []
        problem: UserError | None = None
        try:
            with self._guarded():
                found.append(work())
        except UserError as error:
            problem = error
        except BaseException:  # an answer may still arrive
            self.failed = self.failed or "it was interrupted"
            raise
        problems = all_gather([] if problem is None else [(isinstance(problem, EngineFailed), str(problem))])
        if not problems:
            return found[0]
        of_engine, message = problems[0]
        if not of_engine:
            raise RaisedOnAllRanks(message) from problem
        self.failed = self.failed or "the engine of another process failed"
        raise EngineFailed(message) from problem

    @abstractmethod
    def _guarded(self) -> AbstractContextManager[None]:
        """Turn the engine's exceptions into :class:`EngineFailed`, and record them in ``failed``."""
