"""Whether a vLLM server can sample for a model: its release, options, arithmetic, model and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from selfdistill.errors import UserError
from selfdistill.model.engine_checks import SUPPORTED, is_supported
from selfdistill.model.head import unwrap
from selfdistill.model.loading import LoadedModel
from selfdistill.model.vllm_client import ServerProblem, VllmClient
from selfdistill.model.vllm_worker import sizes

_EXTENSION = "selfdistill.model.vllm_worker.Worker"
_TEXT = "The quick brown fox, 12345 x 6.7:\n\tdef f(x): return 'für \u4f60\u597d'"
"""Text for comparing the two tokenizers."""


@dataclass(frozen=True)
class ServerFacts:
    """A server's description of itself."""

    release: str
    model: str
    """Name of its model in requests."""
    length: int
    """Maximum length of a prompt with its completion, in tokens."""
    adapter_rank: int
    """Maximum rank of the adapters that it accepts; 0: none."""


def checked(client: VllmClient, loaded: LoadedModel, dtype: torch.dtype) -> ServerFacts:
    """Ask a server for its description, and check it.

    Raises:
        UserError: the server does not fit the model; the message names the option to start it with.
        ServerProblem: the server does not answer.
    """
    try:
        return _checked(client, loaded, dtype)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        found = f"its answers are not vLLM's ({type(error).__name__}: {error})"
        raise _mistake(client, found, f"serve with vllm{SUPPORTED}") from None


def _checked(client: VllmClient, loaded: LoadedModel, dtype: torch.dtype) -> ServerFacts:
    release = str(_field(client, "/version", "version"))
    if not is_supported(release):
        raise _mistake(client, f"vllm {release} is not supported", f"serve with vllm{SUPPORTED}")
    info = "/server_info?config_format=json"
    remedy = "start it with VLLM_SERVER_DEV_MODE=1 (see docs/engines.md)"
    config, environment = (_field(client, info, key, remedy) for key in ("vllm_config", "vllm_env"))
    if config["lora_config"] and not environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        remedy = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or without --enable-lora"
        raise _mistake(client, "it has --enable-lora, but cannot load adapters while running", remedy)
    _check_options(client, config, dtype)
    _check_model(client, loaded)
    (served, *_) = [model for model in _field(client, "/v1/models", "data") if not model.get("parent")]
    _check_tokenizer(client, loaded, served["id"])
    adapters = config["lora_config"] or {}
    return ServerFacts(release, served["id"], int(served["max_model_len"]), int(adapters.get("max_lora_rank", 0)))


def _check_options(client: VllmClient, config: dict[str, Any], dtype: torch.dtype) -> None:
    model, name = config["model_config"], str(dtype).removeprefix("torch.")
    wanted = (
        ("--dtype", str(model["dtype"]).removeprefix("torch."), name),
        ("--logprobs-mode", model["logprobs_mode"], "processed_logprobs"),
        ("--generation-config", model["generation_config"], "vllm"),
        ("--worker-extension-cls", config["parallel_config"]["worker_extension_cls"] or "none", _EXTENSION),
    )
    if wrong := [(option, found, want) for option, found, want in wanted if found != want]:
        here = ", or change dtype or mixed_precision here" if wrong[0][0] == "--dtype" else ""
        raise _mistake(
            client,
            ", ".join(f"its {option[2:]} is {found}" for option, found, _ in wrong),
            "start it with " + " ".join(f"{option} {want}" for option, _, want in wrong) + here,
        )
    if model["quantization"]:
        raise _mistake(client, "its weights are quantised", "serve the model without quantisation")


def _check_model(client: VllmClient, loaded: LoadedModel) -> None:
    found = call_worker(client, "selfdistill_model")
    own = sizes(unwrap(loaded.model).config)
    for key in sorted(found.keys() & own.keys()):
        if found[key] != own[key]:
            raise _mistake(
                client,
                f"it has a different model: {key} is {found[key]}, {loaded.name!r} has {own[key]}",
                "serve that model",
            )


def call_worker(client: VllmClient, method: str, **options: str) -> Any:
    """The result of a method of :class:`~selfdistill.model.vllm_worker.Worker`; None if a server's workers disagree.

    Raises:
        ServerProblem: the call fails.
    """
    results = client.post("/collective_rpc", {"method": method, "kwargs": options}, "results")
    return results[0] if all(result == results[0] for result in results) else None


def _check_tokenizer(client: VllmClient, loaded: LoadedModel, model: str) -> None:
    body = {"model": model, "prompt": _TEXT, "add_special_tokens": False}
    if client.post("/tokenize", body, "tokens") != loaded.tokenizer(_TEXT, add_special_tokens=False)["input_ids"]:
        raise _mistake(client, f"its tokenizer differs from that of {loaded.name!r}", "serve the same model")


def _field(client: VllmClient, path: str, key: str, otherwise: str = "give the address of a vLLM server") -> Any:
    try:
        return client.get(path, key)
    except ServerProblem as problem:
        if problem.status is None:
            raise
        raise _mistake(client, f"it has no {path.partition('?')[0]} of vLLM", otherwise) from None


def _mistake(client: VllmClient, found: str, remedy: str) -> UserError:
    return UserError(f"engine vllm: {client.url}: {found}; {remedy}")
