"""Sampling with vLLM in servers that the user started, on other devices or machines.

They get token ids and return token ids with their log-probabilities. Full weights go to them over files in a folder
that both sides see; so does LoRA, as an adapter, to servers that take it. A server keeps the version of its weights as
a label, which is read before and after every sampling: one that was restarted, or that another run uses, is noticed.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from selfdistill.config import EngineSettings
from selfdistill.errors import EngineFailed, UserError
from selfdistill.model.engine_checks import agreement_gap, check_limits, disagreement, probe, vocabulary_size
from selfdistill.model.engine_weights import adapter_rank, hub_tensors, other_lora, weights_digest
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Rollout, Sampling, cut_at_next_turn
from selfdistill.model.vllm_client import ServerProblem, VllmClient
from selfdistill.model.vllm_server_checks import checked
from selfdistill.model.weight_files import WeightFiles
from selfdistill.runtime import RaisedOnAllRanks, all_gather, is_rank0, rank_slice

Result = TypeVar("Result")
_MOST_REQUESTS = 256
"""Requests of this process that are under way at a time; each has a thread that waits for its answer."""
_GOODBYE_S = 5.0
"""Time limit for unloading the last adapter."""
_CHANGING = "selfdistill: weights are being replaced"
"""Label of a server from before its weights are replaced until they are complete."""


@dataclass(frozen=True)
class _Adapter:
    """The adapter that the servers have."""

    name: str
    folder: Path
    digest: str


class VllmServers:
    """The servers of ``engine_url``, for models of one configuration, one at a time.

    Args:
        loaded: the first model to sample from.
        settings: addresses, folder and time limit.
        dtype: of training's arithmetic, which the servers must have, too.

    Raises:
        UserError: a server has another model, tokenizer or arithmetic, or was started with other options.
        EngineFailed: a server cannot be reached or is late, or samples from another distribution than the model's.
    """

    def __init__(self, loaded: LoadedModel, settings: EngineSettings, dtype: torch.dtype) -> None:
        assert settings.engine_url
        self.sync_s = 0.0
        self.failed: str | None = None
        """Why they are not used any more."""
        self._settings, self._dtype = settings, dtype
        self._vocabulary = vocabulary_size(loaded)
        self._clients = [VllmClient(url, settings.engine_timeout_s) for url in settings.engine_url.split(",")]
        self._adapter: _Adapter | None = None
        self._facts = self._together(lambda: [checked(client, loaded, dtype) for client in self._clients])
        self.length = min(facts.length for facts in self._facts)
        """Most tokens of a prompt and its completion."""
        releases = ", ".join(sorted({facts.release for facts in self._facts}))
        self.name = f"vllm {releases}, {str(dtype).removeprefix('torch.')}, server"
        self._files = self._together(lambda: WeightFiles(settings.engine_folder))
        atexit.register(self.close)
        try:
            self._check_agreement(loaded)
        except BaseException:
            self.close()
            raise

    def describe(self) -> str:
        """Name, addresses and length, in words."""
        ranks = [facts.adapter_rank for facts in self._facts]
        adapters = f"LoRA up to rank {min(ranks)} as adapters" if all(ranks) else "LoRA merged"
        return f"{self.name} at {self._settings.engine_url}, at most {self.length} tokens, {adapters}"

    def sample(
        self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None
    ) -> list[Rollout]:
        """One completion per prompt; see :func:`selfdistill.model.sampling.sample`.

        A sample depends on its own seed, and on its batch only as far as rounding does.

        Raises:
            UserError: a prompt with its completion exceeds the servers' length, or vLLM cannot sample so.
            EngineFailed: a server failed, now or earlier, or was late; on all ranks together.
        """
        if self.failed:
            raise EngineFailed(f"engine vllm: it failed before ({self.failed}) and is not used again")
        check_limits(prompts, sampling, self.length, " or --max-model-len of the servers", "raise --max-model-len")
        label = self._synchronise(loaded)
        own = rank_slice(len(prompts))
        asked = self._requests(loaded, prompts[own], sampling, None if seeds is None else seeds[own])
        rollouts = all_gather(self._together(lambda: self._answers(asked, greedy=sampling.temperature == 0)))
        self._from_rank0(lambda: self._check_labels(label))
        if not loaded.tokenizer.chat_template:
            rollouts = [cut_at_next_turn(loaded, rollout) for rollout in rollouts]
        return rollouts

    def rest(self) -> None:
        """Nothing: their memory is their own."""

    def close(self) -> None:
        """Leave the servers, which go on, without this run's adapter."""
        if self._adapter and is_rank0():
            for client in self._clients:
                with suppress(ServerProblem):  # it may have ended before
                    _unload(VllmClient(client.url, _GOODBYE_S), self._adapter.name)
        self.failed = self.failed or "it was ended"
        self._files.close()
        atexit.unregister(self.close)

    def _check_agreement(self, loaded: LoadedModel) -> None:
        """Compare log-probabilities of a short sample of each server with the model's own.

        With an adapter, other weights of LoRA are in its place, and the servers must be closer to the model with these
        than to the model itself.

        Raises:
            EngineFailed: they differ by more than rounding, or leave the adapter out.
        """
        prompt, policy = probe(loaded, self.length)
        with other_lora(loaded):
            self._synchronise(loaded)
            asked = self._requests(loaded, [prompt] * len(self._clients), policy, [0] * len(self._clients), ends=())
            rollouts = self._from_rank0(lambda: self._answers(asked, greedy=False))
            gaps = [agreement_gap(loaded, prompt, rollout, self._dtype) for rollout in rollouts]
        for client, rollout, gap in zip(self._clients, rollouts, gaps, strict=True):
            why = disagreement(gap, self._dtype)
            if not why and adapter_rank(loaded) and agreement_gap(loaded, prompt, rollout, self._dtype) <= gap:
                why = "it leaves LoRA's weights out"
            if why:
                self.failed = why
                raise EngineFailed(
                    f"engine vllm: {client.url}: {why}, so it computes {loaded.name!r} otherwise than transformers "
                    "does; leave engine out"
                )

    # --- weights ---

    def _synchronise(self, loaded: LoadedModel) -> str:
        """Give the servers the model's weights where they have others; returns the label of these weights."""
        began = time.monotonic()
        as_adapter = 0 < adapter_rank(loaded) <= min(facts.adapter_rank for facts in self._facts)
        digest = weights_digest(loaded)
        label = f"{digest.base}-{digest.lora}" if digest.lora and not as_adapter else digest.base
        lacking = self._from_rank0(
            lambda: [number for number, client in enumerate(self._clients) if _label(client) != label]
        )
        if lacking:
            self._send_all(loaded, [self._clients[number] for number in lacking], label, merge=not as_adapter)
        if not as_adapter:
            self._forget_adapter()
        elif lacking or not self._have_adapter(digest.lora):
            self._send_adapter(loaded, digest.lora)
        self.sync_s += time.monotonic() - began
        return label

    def _send_all(self, loaded: LoadedModel, clients: Sequence[VllmClient], label: str, *, merge: bool) -> None:
        """Write full weights to files, have these servers read them, and forget what the old ones computed."""
        weights = hub_tensors(loaded, merge=merge)
        folder = self._together(lambda: self._files.write(weights, self._dtype))

        def replace(client: VllmClient) -> None:
            client.post("/update_weight_version", {"new_version": _CHANGING})
            client.post("/collective_rpc", {"method": "selfdistill_load", "kwargs": {"folder": str(folder)}})
            if not client.post("/reset_prefix_cache", {}, "success"):
                raise ServerProblem(f"{client.url}: its prefix cache is in use and cannot be reset")
            client.post("/update_weight_version", {"new_version": label})

        try:
            self._from_rank0(lambda: self._each(clients, replace))
        finally:
            self._files.remove(folder)

    def _have_adapter(self, digest: str) -> bool:
        """Whether all servers have the adapter of this digest."""
        adapter = self._adapter
        if adapter is None or adapter.digest != digest:
            return False
        return not self._from_rank0(
            lambda: [client.url for client in self._clients if adapter.name not in _models(client)]
        )

    def _send_adapter(self, loaded: LoadedModel, digest: str) -> None:
        """Load LoRA's weights under a new name, because blocks of the prefix cache are kept by name."""
        hub_tensors(loaded)  # refuses other adapters
        folder = self._together(lambda: self._files.write_adapter(loaded))
        (name,) = self._from_rank0(lambda: [f"{folder.parent.name}-{folder.name}"])
        body = {"lora_name": name, "lora_path": str(folder)}
        self._from_rank0(lambda: self._each(self._clients, lambda client: client.post("/v1/load_lora_adapter", body)))
        self._forget_adapter()
        self._adapter = _Adapter(name, folder, digest)

    def _forget_adapter(self) -> None:
        if self._adapter is None:
            return
        adapter, self._adapter = self._adapter, None
        self._from_rank0(lambda: self._each(self._clients, lambda client: _unload(client, adapter.name)))
        self._files.remove(adapter.folder)

    def _check_labels(self, label: str) -> list[None]:
        """Whether the servers still have the weights that were to be sampled from.

        Raises:
            ServerProblem: one has others.
        """
        for client in self._clients:
            if _label(client) != label:
                raise ServerProblem(f"{client.url}: got other weights while it sampled, as if a second run used it")
        return []

    # --- sampling ---

    def _requests(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        ends: tuple[int, ...] | None = None,
    ) -> list[dict[str, Any]]:
        """One request per sample; ``ends``: end tokens in place of the model's.

        They name all parameters: the defaults of those left out may come from files.
        """
        greedy = sampling.temperature == 0
        assert greedy or seeds is not None, "sampling needs a seed per prompt"
        policy = {
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k if sampling.top_k < self._vocabulary else 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(loaded.end_token_ids if ends is None else ends),
            "ignore_eos": True,  # so that no other tokens stop it
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return [
            policy | {"prompt": list(prompt)} | ({} if seeds is None or greedy else {"seed": seeds[number]})
            for number, prompt in enumerate(prompts)
        ]

    def _answers(self, requests: Sequence[dict[str, Any]], *, greedy: bool) -> list[Rollout]:
        """Send each request to one of the servers, those of equal prompts mostly to one; their samples in order.

        Raises:
            ServerProblem: a server fails, or none completes a sample within the time limit.
        """
        if not requests:
            return []
        limit_s = self._settings.engine_timeout_s
        rollouts: dict[int, Rollout] = {}
        with self._pool(len(requests)) as pool:
            done: SimpleQueue[Future[Rollout]] = SimpleQueue()
            numbers: dict[Future[Rollout], int] = {}
            for number, request in enumerate(requests):
                server = number * len(self._clients) // len(requests)
                model = self._adapter.name if self._adapter else self._facts[server].model
                future = pool.submit(_completion, self._clients[server], request | {"model": model}, greedy)
                numbers[future] = number
                future.add_done_callback(done.put)
            while len(rollouts) < len(requests):
                try:
                    future = done.get(timeout=limit_s)
                except Empty:
                    urls, left = self._settings.engine_url, len(requests) - len(rollouts)
                    raise ServerProblem(
                        f"{urls}: no sample was completed in {limit_s:g} s, {left} of {len(requests)} are left; "
                        f"engine_timeout_s is {limit_s:g}"
                    ) from None
                rollouts[numbers[future]] = future.result()
        return [rollouts[number] for number in range(len(requests))]

    def _each(self, clients: Sequence[VllmClient], work: Callable[[VllmClient], object]) -> list[None]:
        """Do this for these servers at the same time."""
        with self._pool(len(clients)) as pool:
            list(pool.map(work, clients))
        return []

    @contextmanager
    def _pool(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads for so many requests; where one fails, the others are dropped."""
        with ThreadPoolExecutor(min(count, _MOST_REQUESTS)) as pool:
            try:
                yield pool
            except BaseException as error:
                self.failed = self.failed or str(error) or "it was interrupted"
                pool.shutdown(wait=False, cancel_futures=True)
                for client in self._clients:
                    client.hang_up()
                raise

    # --- ranks ---

    def _together(self, work: Callable[[], Result]) -> Result:
        """Do this rank's work; where that of one rank fails, all raise the same.

        Raises:
            UserError: a mistake.
            EngineFailed: a problem with a server or its files.
        """
        found: list[Result] = []
        failure = mistake = None
        try:
            found.append(work())
        except UserError as error:
            mistake = str(error)
        except ServerProblem as problem:
            failure = f"{problem}; {problem.remedy}"
        except OSError as error:
            failure = f"{error}; make room, or give another engine_folder"
        problems = [problem for problem in all_gather([(failure, mistake)]) if any(problem)]
        if not problems:
            return found[0]
        failure, mistake = problems[0]
        self.failed = failure or mistake
        if mistake:
            raise RaisedOnAllRanks(mistake)
        raise EngineFailed(f"engine vllm: {failure}, or leave engine out")

    def _from_rank0(self, work: Callable[[], list[Result]]) -> list[Result]:
        """What rank 0 finds, on all ranks."""
        return all_gather(self._together(lambda: work() if is_rank0() else []))


def _label(client: VllmClient) -> str:
    return str(client.get("/weight_info", "weight_version"))


def _models(client: VllmClient) -> list[str]:
    return [model["id"] for model in client.get("/v1/models", "data")]


def _unload(client: VllmClient, name: str) -> None:
    """Unload an adapter, if the server still has it."""
    try:
        client.post("/v1/unload_lora_adapter", {"lora_name": name})
    except ServerProblem as problem:
        if problem.status is None:
            raise


def _completion(client: VllmClient, body: dict[str, Any], greedy: bool) -> Rollout:
    """One sample.

    Raises:
        ServerProblem: the server fails, or what it returns is no sample.
    """
    choices = client.post("/v1/completions", body, "choices", waits=True)
    try:
        (choice,) = choices
        ids, logps, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
        assert len(ids) == len(logps)
        assert reason in ("stop", "length")
    except (LookupError, TypeError, ValueError, AssertionError):
        raise ServerProblem(f"{client.url}: returned no sample, but {str(choices)[:200]!r}") from None
    return Rollout(ids, [0.0] * len(ids) if greedy else logps, reason == "length")
