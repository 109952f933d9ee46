"""Sampling with vLLM on servers that the user started, on other devices or machines.

They receive token ids and return token ids with their log-probabilities. Full weights are sent as files in a folder
that both sides see; so are LoRA adapters, to servers that accept them. A server's worker keeps the version of its
weights, which is read before and after each call to sample. This detects a server that restarted or that another run
uses.
"""

from __future__ import annotations

import atexit
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from selfdistill.config import EngineSettings
from selfdistill.errors import EngineFailed
from selfdistill.model.engine_checks import agreement_gap, disagreement, probe
from selfdistill.model.engine_weights import (
    adapter_rank,
    check_adapter,
    hub_tensors,
    is_adapter_for_engines,
    other_lora,
    weights_digest,
)
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Rollout, Sampling
from selfdistill.model.vllm_client import ServerProblem, VllmClient
from selfdistill.model.vllm_sampling import Result, VllmSampling
from selfdistill.model.vllm_server_checks import call_worker, checked
from selfdistill.model.weight_files import WeightFiles
from selfdistill.runtime import all_gather, allow_open_files, is_rank0

MOST_REQUESTS = 256
"""Concurrent requests of this process for each server; each has a thread that waits for its answer."""
_GOODBYE_S = 5.0
"""Time limit for unloading the last adapter."""


@dataclass(frozen=True)
class _Adapter:
    """An adapter that was sent to the servers."""

    name: str
    folder: Path
    digest: str


@dataclass(frozen=True)
class _Request:
    """A request for one sample."""

    client: VllmClient
    body: dict[str, Any]


class VllmServers(VllmSampling):
    """The servers of ``engine_url``; see :class:`VllmSampling`. Settings: addresses, folder and time limit.

    Raises:
        UserError: a server has a different model, tokenizer or arithmetic, or was started with the wrong options.
        EngineFailed: a server cannot be reached or is late, or its distribution differs from the model's.
    """

    limited_by = " or --max-model-len of the servers"
    longer_with = "raise --max-model-len"

    def __init__(self, loaded: LoadedModel, settings: EngineSettings, dtype: torch.dtype) -> None:
        super().__init__(loaded, settings, dtype)
        assert settings.engine_url
        allow_open_files()
        self._clients = [VllmClient(url, settings.engine_timeout_s) for url in settings.engine_url.split(",")]
        self._adapters: list[_Adapter] = []
        """Adapters that some server may have; the last one is in use."""
        self._facts = self._together(lambda: [checked(client, loaded, dtype) for client in self._clients])
        self.length = min(facts.length for facts in self._facts)
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

    def rest(self) -> None:
        """Do nothing: the servers have their own memory."""

    def close(self) -> None:
        """Disconnect from the servers, which keep running, and unload this run's adapter."""
        for client in self._clients if is_rank0() else []:
            with suppress(ServerProblem):  # it may have ended before
                _unload(VllmClient(client.url, _GOODBYE_S), self._adapters)
        self.failed = self.failed or "it has been closed"
        self._files.close()
        atexit.unregister(self.close)

    def _check_agreement(self, loaded: LoadedModel) -> None:
        """Compare log-probabilities of a short sample of each server with the model's own.

        With an adapter, other LoRA weights temporarily replace it, and the servers must be closer to the model with
        these weights than to the model itself.

        Raises:
            EngineFailed: a server differs by more than rounding, or ignores the adapter.
        """
        prompt, policy = probe(loaded, self.length)
        with other_lora(loaded):
            self._synchronise(loaded)
            every = len(self._clients)
            asked = self._requests([prompt] * every, policy, [0] * every, slice(0, every), ends=())
            rollouts = self._from_rank0(lambda: self._answers(asked, greedy=False))
            gaps = [agreement_gap(loaded, prompt, rollout, self._dtype) for rollout in rollouts]
        for client, rollout, gap in zip(self._clients, rollouts, gaps, strict=True):
            why = disagreement(gap, self._dtype)
            if not why and adapter_rank(loaded) and agreement_gap(loaded, prompt, rollout, self._dtype) <= gap:
                why = "it ignores LoRA's weights"
            if why:
                self.failed = why
                raise EngineFailed(
                    f"engine vllm: {client.url}: {why}, so it computes {loaded.name!r} differently from transformers; "
                    "leave engine out"
                )

    # --- weights ---

    def _synchronise(self, loaded: LoadedModel) -> str:
        """Send the model's weights to servers that have different ones; returns the label of these weights."""
        began = time.monotonic()
        most = min(facts.adapter_rank for facts in self._facts)
        as_adapter = is_adapter_for_engines(loaded) and adapter_rank(loaded) <= most
        digest = weights_digest(loaded)
        label = f"{digest.base}-{digest.lora}" if digest.lora and not as_adapter else digest.base
        lacking = self._from_rank0(
            lambda: [number for number, client in enumerate(self._clients) if _label(client) != label]
        )
        if lacking:
            self._send_all(loaded, [self._clients[number] for number in lacking], label, merge=not as_adapter)
        if not as_adapter:
            self._forget(self._adapters)
        elif lacking or not self._have_adapter(digest.lora):
            self._send_adapter(loaded, digest.lora)
        self.sync_s += time.monotonic() - began
        return label

    def _send_all(self, loaded: LoadedModel, clients: Sequence[VllmClient], label: str, *, merge: bool) -> None:
        """Write full weights to files, make these servers read them, and clear their prefix caches.

        The label is stored with the weights, so it is lost when a second run replaces them.
        """
        weights = hub_tensors(loaded, merge=merge)
        folder = self._together(lambda: self._files.write(weights, self._dtype))

        def replace(client: VllmClient) -> None:
            call_worker(client, "selfdistill_load", folder=str(folder), version=label)
            if not client.post("/reset_prefix_cache", {}, "success"):
                raise ServerProblem(f"{client.url}: its prefix cache is in use and cannot be reset")
            if call_worker(client, "selfdistill_confirm", version=label) != label:
                raise _rival(client)

        try:
            self._on_rank0(lambda: self._each(clients, replace))
        finally:
            self._files.remove(folder)

    def _have_adapter(self, digest: str) -> bool:
        """Whether all servers have the adapter with this digest."""
        if not self._adapters or self._adapters[-1].digest != digest:
            return False
        adapter = self._adapters[-1]
        return not self._from_rank0(
            lambda: [client.url for client in self._clients if adapter.name not in _models(client)]
        )

    def _send_adapter(self, loaded: LoadedModel, digest: str) -> None:
        """Load LoRA's weights under a new name, because blocks of the prefix cache are stored by name."""
        check_adapter(loaded)
        folder = self._together(lambda: self._files.write_adapter(loaded))
        (name,) = self._from_rank0(lambda: [f"{folder.parent.name}-{folder.name}"])
        body = {"lora_name": name, "lora_path": str(folder)}
        before, self._adapters = self._adapters, [*self._adapters, _Adapter(name, folder, digest)]
        self._on_rank0(lambda: self._each(self._clients, lambda client: client.post("/v1/load_lora_adapter", body)))
        self._forget(before)

    def _forget(self, adapters: Sequence[_Adapter]) -> None:
        self._on_rank0(lambda: self._each(self._clients if adapters else [], lambda client: _unload(client, adapters)))
        self._adapters = [adapter for adapter in self._adapters if adapter not in adapters]
        for adapter in adapters:
            self._files.remove(adapter.folder)

    def _check_labels(self, label: str) -> None:
        """Check that the servers still have the weights to sample from.

        Raises:
            ServerProblem: a server has different weights.
        """
        for client in self._clients:
            if _label(client) != label:
                raise _rival(client)

    # --- sampling ---

    def _sampled(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        own: slice,
    ) -> list[Rollout]:
        label = self._synchronise(loaded)
        asked = self._requests(prompts, sampling, seeds, own, loaded.end_token_ids)
        rollouts = self._together(lambda: self._answers(asked, greedy=sampling.temperature == 0))
        self._on_rank0(lambda: self._check_labels(label))
        return rollouts

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        own: slice,
        ends: Sequence[int],
    ) -> list[_Request]:
        """One request per sample of this rank, spread over the servers; equal prompts mostly go to the same server.

        Requests set all parameters, because defaults may come from the model's files.
        """
        found = []
        for number in range(len(prompts))[own]:
            server = number * len(self._clients) // len(prompts)
            body = {
                "model": self._adapters[-1].name if self._adapters else self._facts[server].model,
                "prompt": list(prompts[number]),
                **self._policy(sampling, seeds, number, ends),
                "min_p": 0.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "repetition_penalty": 1.0,
                "logprobs": 0,  # only of the sampled token
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
            found.append(_Request(self._clients[server], body))
        return found

    def _answers(self, requests: Sequence[_Request], *, greedy: bool) -> list[Rollout]:
        """The samples, in order. Requests are sent to each server in turn, so that all of them work from the start.

        Raises:
            ServerProblem: a server fails, or none completes a sample within the time limit.
        """
        if not requests:
            return []
        limit_s = self._settings.engine_timeout_s
        places: defaultdict[VllmClient, itertools.count[int]] = defaultdict(itertools.count)
        turns = [next(places[request.client]) for request in requests]
        rollouts: dict[int, Rollout] = {}
        with self._pool(len(requests)) as pool:
            done: SimpleQueue[Future[Rollout]] = SimpleQueue()
            numbers: dict[Future[Rollout], int] = {}
            for number in sorted(range(len(requests)), key=turns.__getitem__):
                future = pool.submit(_completion, requests[number].client, requests[number].body, greedy)
                numbers[future] = number
                future.add_done_callback(done.put)
            while len(rollouts) < len(requests):
                try:
                    future = done.get(timeout=limit_s)
                except Empty:
                    urls, left = self._settings.engine_url, len(requests) - len(rollouts)
                    raise ServerProblem(
                        f"{urls}: no sample was completed in {limit_s:g} s, {left} of {len(requests)} are pending; "
                        f"engine_timeout_s is {limit_s:g}"
                    ) from None
                rollouts[numbers[future]] = future.result()
        return [rollouts[number] for number in range(len(requests))]

    def _each(self, clients: Sequence[VllmClient], work: Callable[[VllmClient], object]) -> None:
        """Run ``work`` for these servers in parallel."""
        if not clients:
            return
        with self._pool(len(clients)) as pool:
            list(pool.map(work, clients))

    @contextmanager
    def _pool(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """Threads for this many requests; if one fails, the others are cancelled."""
        with ThreadPoolExecutor(min(count, MOST_REQUESTS * len(self._clients))) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for client in self._clients:
                    client.hang_up()
                raise

    # --- ranks ---

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (ServerProblem, OSError) as error:
            self.failed = str(error)
            remedy = error.remedy if isinstance(error, ServerProblem) else "free space, or give another engine_folder"
            raise EngineFailed(f"engine vllm: {error}; {remedy}, or leave engine out") from error

    def _from_rank0(self, work: Callable[[], list[Result]]) -> list[Result]:
        """Rank 0's result, on all ranks."""
        return all_gather(self._together(lambda: work() if is_rank0() else []))

    def _on_rank0(self, work: Callable[[], object]) -> None:
        """Work that only rank 0 does; its failure is that of all ranks."""
        self._together(lambda: work() if is_rank0() else None)


def _label(client: VllmClient) -> str:
    return call_worker(client, "selfdistill_version")


def _rival(client: VllmClient) -> ServerProblem:
    what = "received other weights, probably from a second run"
    return ServerProblem(f"{client.url}: {what}", remedy="give each run its own servers")


def _models(client: VllmClient) -> list[str]:
    return [model["id"] for model in client.get("/v1/models", "data")]


def _unload(client: VllmClient, adapters: Sequence[_Adapter]) -> None:
    """Unload those of these adapters that the server has."""
    for adapter in adapters:
        try:
            client.post("/v1/unload_lora_adapter", {"lora_name": adapter.name})
        except ServerProblem as problem:
            if problem.status is None:
                raise


def _completion(client: VllmClient, body: dict[str, Any], greedy: bool) -> Rollout:
    """One sample.

    Raises:
        ServerProblem: the server fails, or its answer is not a sample.
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
