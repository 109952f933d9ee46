"""Servers that sample: how they are asked, kept in step and fail. These are fakes; tests/engine has real ones."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from children import started_together, train_together
from conftest import ENDS, final_weights, largest_difference, metrics_of
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sampled import FREE, GREEDY, own, prompts, seeds, train
from vllm_fake import FakeVllm, fake_vllm

from selfdistill.config import CheckConfig, EngineSettings, EvalConfig, TrainConfig
from selfdistill.config.files import continued
from selfdistill.data.demonstrations import load_demonstrations
from selfdistill.errors import EngineFailed, UserError
from selfdistill.evaluation import answer, check, evaluate
from selfdistill.model import (
    ForwardPass,
    LoadedModel,
    Rollout,
    Sampling,
    add_lora,
    close_engine,
    engine_for,
    load_model,
    sample,
    use_engine,
    vllm_client,
    vllm_server,
    weight_files,
)
from selfdistill.model.engine_weights import hub_tensors
from selfdistill.model.vllm_client import ServerProblem, VllmClient
from selfdistill.model.vllm_server import VllmServers
from selfdistill.runtime import read_lines
from selfdistill.training.train import train as run_training
from selfdistill.training.trainer import Trainer

Loader = Callable[..., LoadedModel]
Settings = Callable[..., TrainConfig]


@pytest.fixture
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder(ends=ENDS, tied=True)


@pytest.fixture
def fake(folder: Path) -> Iterator[FakeVllm]:
    """A server that takes adapters of rank 8."""
    with fake_vllm(folder, adapter_rank=8) as server:
        yield server
        close_engine()


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Loader:
    """A fresh model that servers sample from."""

    def loader(*servers: FakeVllm, timeout_s: float = 10, **settings: Any) -> LoadedModel:
        loaded = load_model(str(folder))
        urls = ",".join(server.url for server in servers)
        settings = {"engine_folder": str(tmp_path), **settings}
        use_engine(loaded, EngineSettings(engine="vllm", engine_url=urls, engine_timeout_s=timeout_s, **settings))
        return loaded

    return loader


@pytest.fixture
def run(settings: Settings, folder: Path, tmp_path: Path) -> Settings:
    """Settings of a tiny run that samples with servers."""

    def make(out: str, *servers: FakeVllm, **values: Any) -> TrainConfig:
        where = {"engine_url": ",".join(s.url for s in servers), "engine_folder": str(tmp_path)}
        engine = {"engine": "vllm", **where} if servers else {}
        return settings(out, **{"model": str(folder), **engine, **values})

    return make


def assert_as_our_loop(loaded: LoadedModel, policy: Sampling = FREE, count: int = 6) -> None:
    """The fakes sample as our loop does, so that the same tokens come for the same seeds."""
    batch, numbers = prompts(*range(1, count + 1)), seeds(count)
    for found, expected in zip(
        sample(loaded, batch, policy, numbers), own(loaded, batch, policy, numbers), strict=True
    ):
        assert (found.ids, found.truncated) == (expected.ids, expected.truncated)
        assert found.logps == pytest.approx(expected.logps, abs=1e-4)


def paths(server: FakeVllm) -> list[str]:
    """What was asked, without the reads of versions; of the worker its methods."""
    asked = [body["method"] if path == "/collective_rpc" else path for path, body in server.asked]
    return [path for path in asked if path != "selfdistill_version"]


# --- what is asked ---


@pytest.mark.parametrize("policy", [FREE, GREEDY, Sampling(5, 0.7, top_p=0.9, top_k=20)], ids=str)
def test_samples_are_those_of_the_server(load: Loader, fake: FakeVllm, policy: Sampling) -> None:
    assert_as_our_loop(load(fake), policy)


def test_a_request_names_all_that_a_file_could_change(load: Loader, fake: FakeVllm) -> None:
    sample(load(fake), prompts(3), FREE, [2**62])
    body = next(body for path, body in reversed(fake.asked) if path == "/v1/completions")
    assert body == {
        "model": "base",
        "prompt": prompts(3)[0],
        "seed": 2**62,
        "max_tokens": 12,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(ENDS),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def test_no_proxy_is_used(load: Loader, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert_as_our_loop(load(fake))


@pytest.mark.slow
def test_more_prompts_than_requests_at_a_time(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake)
    rollouts = sample(loaded, prompts(*[3] * 300), Sampling(2), seeds(300))
    assert rollouts[:3] == sample(loaded, prompts(*[3] * 3), Sampling(2), seeds(3))
    assert sample(loaded, [], FREE, []) == []


def test_an_engine_makes_its_own_batches(load: Loader, fake: FakeVllm, write_rows: Callable[..., Path]) -> None:
    loaded, rows = load(fake), load_demonstrations(write_rows(count=20))
    engine_for(loaded)
    fake.asked.clear()
    chat = loaded.chat()
    batch = [chat.encode_prompt(row.prompt) for row in rows]
    answer(loaded, batch, rows, chat, Sampling(3, temperature=0), batch_size=2, scored=False)
    reads = [path for path, _ in fake.asked if path == "/collective_rpc"]
    assert len(reads) == 2  # of the version, before and after all samples together


def test_several_servers_share_the_samples(load: Loader, fake: FakeVllm, folder: Path) -> None:
    with fake_vllm(folder) as other:
        loaded = load(fake, other)
        train(loaded, 1)
        assert_as_our_loop(loaded, count=9)
        # One more for the comparison at the start; the first ones go to the first server.
        assert [paths(server).count("/v1/completions") - 1 for server in (fake, other)] == [5, 4]
        close_engine()


def test_all_servers_work_from_the_start(
    load: Loader, fake: FakeVllm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "MOST_REQUESTS", 2)
    with fake_vllm(folder) as other:
        loaded = load(fake, other)
        engine_for(loaded)
        asked: list[FakeVllm] = []
        together = threading.Barrier(4, timeout=10)  # two for each server

        def ask(server: FakeVllm) -> Callable[[str, Any], None]:
            def wait(path: str, _body: Any) -> None:
                if path == "/v1/completions":
                    asked.append(server)
                    together.wait()

            return wait

        fake.instead, other.instead = ask(fake), ask(other)
        assert_as_our_loop(loaded, count=8)
        assert asked[:4].count(fake) == asked[4:].count(fake) == 2
        close_engine()


# --- weights ---


@pytest.mark.parametrize("rank", [0, 4, 16], ids=["full", "adapter", "merged"])
def test_the_server_follows_the_student(load: Loader, fake: FakeVllm, tmp_path: Path, rank: int) -> None:
    loaded = load(fake)
    if rank:
        add_lora(loaded, rank, None, seed=0)
    for _ in range(3):
        assert_as_our_loop(loaded)
        train(loaded, 1)
    fake.asked.clear()
    assert_as_our_loop(loaded)
    assert_as_our_loop(loaded)
    whole = ["selfdistill_load", "/reset_prefix_cache", "selfdistill_confirm"]
    adapter = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    assert [path for path in paths(fake) if path != "/v1/completions"] == (adapter if rank == 4 else whole)
    assert len(list(tmp_path.rglob("*.safetensors"))) == (rank == 4)  # weights are deleted when they were read
    assert len(fake.models) == 1 + (rank == 4)
    close_engine()
    assert list(tmp_path.iterdir()) == []
    assert len(fake.models) == 1


def test_large_weights_are_written_to_several_files(
    load: Loader, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "FILE_BYTES", 10_000)
    loaded, files = load(fake), []

    def count(path: str, body: Any) -> None:
        if path == "/collective_rpc" and body["method"] == "selfdistill_load":
            files.append(len(list(Path(body["kwargs"]["folder"]).glob("*.safetensors"))))

    fake.instead = count
    train(loaded, 1)
    assert_as_our_loop(loaded)
    assert files
    assert min(files) > 2


@pytest.mark.parametrize("rank", [4, 16], ids=["adapter", "merged"])
def test_the_scale_of_lora_is_a_part_of_its_version(load: Loader, fake: FakeVllm, rank: int) -> None:
    loaded = load(fake)
    add_lora(loaded, rank, None, seed=0)
    train(loaded, 2)
    assert_as_our_loop(loaded)
    for layer in loaded.model.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] *= 3
    assert_as_our_loop(loaded)


def test_adapters_of_several_ranks_and_scales(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 64}
    )
    loaded.model = get_peft_model(loaded.model, config).eval()
    train(loaded, 3)
    assert_as_our_loop(loaded)
    assert "/v1/load_lora_adapter" in paths(fake)


def test_a_server_that_was_started_again_gets_everything(load: Loader, fake: FakeVllm, folder: Path) -> None:
    loaded = load(fake)
    add_lora(loaded, 4, None, seed=0)
    train(loaded, 2)
    assert_as_our_loop(loaded)
    again = FakeVllm(folder)
    again.server_close()
    fake.models, fake.weights, fake.worker.selfdistill_held = again.models, again.weights, ""
    assert_as_our_loop(loaded)
    (name,) = fake.models.keys() - {"base"}
    del fake.models[name]  # only the adapter is gone
    fake.asked.clear()
    assert_as_our_loop(loaded)
    assert "selfdistill_load" not in paths(fake)


def test_half_replaced_weights_are_never_sampled_from(
    load: Loader, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(fake)
    engine = engine_for(loaded)
    train(loaded, 1)

    def run_out(weights_path: str) -> None:
        raise OSError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(fake.worker, "reload_weights", run_out)
        with pytest.raises(EngineFailed, match=r"/collective_rpc: status 500, 'out of memory'; see the server's log"):
            sample(loaded, prompts(3), GREEDY)
    assert fake.worker.selfdistill_version() == ""
    with pytest.raises(EngineFailed, match="it failed earlier"):
        engine.sample(loaded, prompts(3), GREEDY, None)
    assert_as_our_loop(loaded)


def test_a_prefix_cache_in_use_is_an_error(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake)
    fake.instead = lambda path, body: (200, {"success": False}) if path == "/reset_prefix_cache" else None
    with pytest.raises(EngineFailed, match="its prefix cache is in use and cannot be reset"):
        sample(loaded, prompts(3), GREEDY)


def test_a_model_computed_otherwise_is_found_at_the_start(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake)
    fake.worker.reload_weights = lambda weights_path: None  # type: ignore[method-assign]
    train(loaded, 3)
    with pytest.raises(
        EngineFailed, match=r"nats per token away from the model's, so it computes .*; leave engine out"
    ):
        engine_for(loaded)


@pytest.mark.slow
def test_a_process_that_ends_leaves_no_adapter_and_no_files(fake: FakeVllm, folder: Path, tmp_path: Path) -> None:
    code = f"""
from selfdistill.config import EngineSettings
from selfdistill.model import Sampling, add_lora, load_model, sample, use_engine
loaded = load_model({str(folder)!r})
add_lora(loaded, 4, None, seed=0)
use_engine(loaded, EngineSettings(engine="vllm", engine_url={fake.url!r}, engine_folder={str(tmp_path)!r}))
sample(loaded, [[1, 2, 3]], Sampling(5), [7])
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "/v1/load_lora_adapter" in paths(fake)
    assert list(fake.models) == ["base"]
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_leaves_the_adapter_out_is_found_at_the_start(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake)
    add_lora(loaded, 4, None, seed=0)  # it changes nothing yet
    before = [weight.clone() for weight in loaded.model.parameters()]

    def leave_out(path: str, body: Any) -> None:
        if path == "/v1/completions":
            body["model"] = "base"

    fake.instead = leave_out
    with pytest.raises(EngineFailed, match=r"nats per token away|it ignores LoRA's weights"):
        engine_for(loaded)
    assert all(torch.equal(weight, kept) for weight, kept in zip(loaded.model.parameters(), before, strict=True))


# --- what is refused at the start ---


@pytest.mark.parametrize(
    ("key", "found", "message"),
    [
        ("model_config.dtype", "torch.bfloat16", "its dtype is bfloat16; start it with --dtype float32"),
        ("model_config.logprobs_mode", "raw_logprobs", "start it with --logprobs-mode processed_logprobs"),
        (
            "model_config.generation_config",
            "auto",
            "its generation-config is auto; start it with --generation-config vllm",
        ),
        ("model_config.quantization", "fp8", "its weights are quantised; serve the model without quantisation"),
        (
            "parallel_config.worker_extension_cls",
            "",
            "extension-cls is none; start it with --worker-extension-cls selfdistill.model.vllm_worker.Worker",
        ),
    ],
)
def test_other_options_are_refused_with_the_right_one(
    load: Loader, fake: FakeVllm, key: str, found: str, message: str
) -> None:
    part, name = key.split(".")
    fake.info["vllm_config"][part][name] = found
    with pytest.raises(UserError, match=message) as error:
        engine_for(load(fake))
    assert str(error.value).startswith(f"engine vllm: {fake.url}: ")
    assert "\n" not in str(error.value)
    assert "selfdistill_load" not in paths(fake)


def test_all_options_that_differ_are_named_at_once(load: Loader, fake: FakeVllm) -> None:
    fake.info["vllm_config"]["model_config"] |= {"dtype": "torch.bfloat16", "logprobs_mode": "raw_logprobs"}
    found = "its dtype is bfloat16, its logprobs-mode is raw_logprobs"
    remedy = "start it with --dtype float32 --logprobs-mode processed_logprobs, or change dtype or mixed_precision here"
    with pytest.raises(UserError) as error:
        engine_for(load(fake))
    assert str(error.value) == f"engine vllm: {fake.url}: {found}; {remedy}"


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/version", (404, {}), "it has no /version of vLLM; give the address of a vLLM server"),
        ("/version", (200, {"version": "0.27.1"}), r"vllm 0\.27\.1 is not supported; serve with vllm>=0\.28,<0\.33"),
        ("/version", (200, b"<html>"), "it has no /version of vLLM; give the address"),
        ("/version", (302, {}), "it has no /version of vLLM; give the address"),
        (
            "/server_info",
            (200, {"vllm_config": {}, "vllm_env": {}}),
            r"not vLLM's \(KeyError: 'lora_config'\); ",
        ),
        ("/v1/models", (200, {"data": []}), r"its answers are not vLLM's \(ValueError: .*\); serve with vllm>="),
        ("/server_info", (404, {}), "it has no /server_info of vLLM; start it with VLLM_SERVER_DEV_MODE=1 .see docs"),
        (
            "/collective_rpc",
            (200, {"results": [{"hidden_size": 64}]}),
            "a different model: hidden_size is 64, '.*' has 32;",
        ),
        ("/tokenize", (200, {"tokens": [1, 2]}), "its tokenizer differs from that of '.*'; serve the same model"),
    ],
)
def test_other_servers_and_models_are_refused(
    load: Loader, fake: FakeVllm, path: str, answer: tuple[int, Any], message: str
) -> None:
    fake.instead = lambda asked, body: answer if asked == path else None
    with pytest.raises(UserError, match=message):
        engine_for(load(fake))


def test_adapters_that_cannot_come_later_are_refused(load: Loader, fake: FakeVllm) -> None:
    fake.info["vllm_env"] = {}
    with pytest.raises(UserError, match="start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or without --enable-lora"):
        engine_for(load(fake))


def test_a_folder_that_is_not_there_is_refused(load: Loader, fake: FakeVllm, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'engine_folder': '.*/none' cannot be written \(No such file or directory\)"):
        engine_for(load(fake, engine_folder=str(tmp_path / "none")))


def test_a_full_disk_is_a_line_and_leaves_its_room_to_the_checkpoint(
    load: Loader, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(fake)
    sample(loaded, prompts(3), GREEDY)
    train(loaded, 1)

    def full(weights: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"0" * 100)
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(weight_files, "save_file", full)
    with pytest.raises(EngineFailed, match=r"No space left on device; free space, or give another engine_folder"):
        sample(loaded, prompts(3), GREEDY)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_servers_of_other_users_may_read_what_a_new_file_lets_them(
    load: Loader, fake: FakeVllm, tmp_path: Path
) -> None:
    loaded, modes = load(fake), []

    def look(path: str, body: Any) -> None:
        if path == "/collective_rpc" and body["method"] == "selfdistill_load":
            folder = Path(body["kwargs"]["folder"])
            modes.extend(oct(path.stat().st_mode & 0o777) for path in (folder.parent, folder, *folder.iterdir()))

    fake.instead = look
    assert loaded.engine is not None
    before = os.umask(0o027)
    try:
        sample(loaded, prompts(3), GREEDY)
        train(loaded, 1)
        loaded.engine = loaded.engine.model_copy(update={"engine_folder": None})
        sample(loaded, prompts(3), GREEDY)
    finally:
        os.umask(before)
    assert modes == ["0o750", "0o750", "0o640", "0o700", "0o750", "0o640"]


def test_a_folder_that_the_server_may_not_read_is_a_line(load: Loader, fake: FakeVllm, tmp_path: Path) -> None:
    loaded = load(fake)

    def elsewhere(path: str, body: Any) -> None:
        if path == "/collective_rpc" and body["method"] == "selfdistill_load":
            body["kwargs"]["folder"] = str(tmp_path / "none")

    fake.instead = elsewhere
    with pytest.raises(
        EngineFailed, match=r"finds no weights in .*/none \(No such file or directory\); give an engine_f"
    ):
        sample(loaded, prompts(3), GREEDY)


def test_a_server_that_is_not_there_is_a_line(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake)
    assert loaded.engine is not None
    loaded.engine = loaded.engine.model_copy(update={"engine_url": "http://127.0.0.1:1"})
    line = "cannot be reached (Connection refused); start the server, or correct engine_url, or leave engine out"
    with pytest.raises(EngineFailed) as error:
        engine_for(loaded)
    assert str(error.value) == f"engine vllm: http://127.0.0.1:1: {line}"


def test_an_address_that_never_answers_is_a_line_before_the_time_limit(
    load: Loader, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_client, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as others:
        for _ in range(3):  # beyond its queue, where connecting waits
            waiting = others.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        loaded = load(fake)
        assert loaded.engine is not None
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        loaded.engine = loaded.engine.model_copy(update={"engine_url": url})
        with pytest.raises(EngineFailed, match=rf"{url}: cannot be reached in 0\.3 s; start the server"):
            engine_for(loaded)


# --- how sampling fails ---


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": {"message": "too long"}}), "/v1/completions: status 400, 'too long'"),
        ((500, b"x" * 1000), r"status 500, 'x{297}\.\.\.'"),
        ((302, {}), r"/v1/completions: status 302"),
        ((200, b"<html>"), "/v1/completions: found '<html>', expected 'choices' of a vLLM server"),
        ((200, {"choices": []}), "returned no sample"),
        (
            (200, {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": []}, "finish_reason": "stop"}]}),
            "returned no sample",
        ),
        (
            (200, {"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [0]}, "finish_reason": "abort"}]}),
            "returned no sample",
        ),
    ],
)
def test_an_answer_without_a_sample_is_a_line(
    load: Loader, fake: FakeVllm, answer: tuple[int, Any], message: str
) -> None:
    loaded = load(fake)
    engine_for(loaded)
    fake.instead = lambda path, body: answer if path == "/v1/completions" else None
    with pytest.raises(EngineFailed, match=message) as error:
        sample(loaded, prompts(3, 4, 5), FREE, seeds(3))
    assert "\n" not in str(error.value)


def test_a_connection_that_breaks_off_is_a_line(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake)
    engine_for(loaded)

    def break_off(path: str, _body: Any) -> None:
        if path == "/v1/completions":
            raise ConnectionError("the handler ends without an answer")

    fake.instead = break_off
    remedy = "see the server's log, and start it again if it has ended, or leave engine out"
    with pytest.raises(EngineFailed, match=rf"{fake.url}: broke off \(.*\); {remedy}"):
        sample(loaded, prompts(3), FREE, seeds(1))


def test_one_late_sample_of_many_ends_the_wait(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake, timeout_s=0.5)
    engine_for(loaded)
    hold = threading.Event()

    def late(path: str, body: Any) -> None:
        if path == "/v1/completions" and body["prompt"] == prompts(5, 6)[1]:
            hold.wait(10)

    fake.instead = late
    began = time.monotonic()
    with pytest.raises(
        EngineFailed, match=r"no sample was completed in 0\.5 s, 1 of 3 are pending; engine_timeout_s is 0\.5"
    ):
        sample(loaded, [prompts(5, 6)[number] for number in (0, 1, 0)], FREE, seeds(3))
    assert time.monotonic() - began < 5
    hold.set()


def test_samples_that_come_one_by_one_are_not_late(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake, timeout_s=0.5)
    engine_for(loaded)
    turn = threading.Lock()

    def slow(path: str, body: Any) -> None:
        if path == "/v1/completions":
            with turn:
                time.sleep(0.2)

    fake.instead = slow
    assert len(sample(loaded, prompts(*[4] * 6), FREE, seeds(6))) == 6


def test_a_server_that_does_not_answer_is_late(load: Loader, fake: FakeVllm) -> None:
    loaded = load(fake, timeout_s=0.3)
    engine_for(loaded)
    hold = threading.Event()
    fake.instead = lambda path, body: hold.wait(10) and None if path == "/collective_rpc" else None
    with pytest.raises(EngineFailed, match=r"no answer to /collective_rpc in 0\.3 s \(engine_timeout_s\)"):
        sample(loaded, prompts(3), FREE, seeds(1))
    hold.set()


def test_an_interrupt_does_not_wait_for_weights_to_be_read(load: Loader, fake: FakeVllm) -> None:
    read = threading.Event()

    def slow(path: str, body: Any) -> None:
        if path == "/collective_rpc" and body["method"] == "selfdistill_load":
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            read.wait(8)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    fake.instead = slow
    before = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            engine_for(load(fake))
    finally:
        signal.signal(signal.SIGALRM, before)
        read.set()
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("when", ["/v1/completions", "/reset_prefix_cache"])
def test_weights_that_another_run_puts_in_are_noticed(load: Loader, fake: FakeVllm, tmp_path: Path, when: str) -> None:
    loaded, rival = load(fake), load(fake)
    train(rival, 1)
    sample(loaded, prompts(3), GREEDY)
    (tmp_path / "rival").mkdir()
    save_file(dict(hub_tensors(rival)), tmp_path / "rival" / "model.safetensors")

    def interfere(path: str, body: Any) -> None:
        if path == when:  # and the other run has not got to know yet that its weights are there
            fake.worker.selfdistill_load(str(tmp_path / "rival"), "another run's")

    fake.instead = interfere
    train(loaded, 2)
    with pytest.raises(EngineFailed, match="received other weights, probably from a second run"):
        sample(loaded, prompts(3), GREEDY)


def test_a_server_that_fails_leaves_no_adapter_on_the_others(load: Loader, fake: FakeVllm, folder: Path) -> None:
    with fake_vllm(folder, adapter_rank=8) as other:
        loaded = load(fake, other)
        add_lora(loaded, 4, None, seed=0)
        sample(loaded, prompts(3), FREE, seeds(1))
        train(loaded, 1)
        there, refused = threading.Event(), (400, {"error": {"message": "no room"}})
        watch(fake, there)
        other.instead = lambda path, body: (refused if there.wait(5) else None) if "load_lora" in path else None
        with pytest.raises(EngineFailed, match="/v1/load_lora_adapter: status 400, 'no room'"):
            sample(loaded, prompts(3), FREE, seeds(1))
        assert len(fake.models) == 3  # the old and the new one
        other.instead = lambda path, body: None
        close_engine()
        assert list(fake.models) == list(other.models) == ["base"]


def watch(fake: FakeVllm, there: threading.Event) -> None:
    """Say when the server has loaded an adapter."""
    post = fake.post

    def posted(path: str, body: Any) -> Any:
        found = post(path, body)
        if path == "/v1/load_lora_adapter":
            there.set()
        return found

    fake.post = posted  # type: ignore[method-assign]


# --- runs ---


@pytest.mark.parametrize(
    "values", [{}, {"lora_rank": 4}, pytest.param({"lora_rank": 16}, marks=pytest.mark.slow)], ids=str
)
def test_a_run_with_a_server_is_that_without(run: Settings, fake: FakeVllm, values: dict[str, Any]) -> None:
    served, ours = run("served", fake, max_steps=3, **values), run("ours", max_steps=3, **values)
    run_training(served)
    run_training(ours)
    assert largest_difference(final_weights(served), final_weights(ours)) < 1e-4  # of steps of 1e-3
    for line in metrics_of(served):
        assert line["engine/gap"] <= line["engine/gap_max"] < 1e-3


def test_an_engine_far_from_the_student_is_told_once(
    run: Settings, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    completion = fake.completion

    def apart(body: dict[str, Any]) -> Any:
        status, content = completion(body)
        found = content["choices"][0]["logprobs"]
        found["token_logprobs"] = [logp - 0.5 for logp in found["token_logprobs"]]
        return status, content

    def begin(step: int, *_: Any) -> None:
        if step == 1:
            monkeypatch.setattr(fake, "completion", apart)

    run_training(run("served", fake, max_steps=4), on_step=begin)
    said = [line for line in capsys.readouterr().err.splitlines() if "away from the student's" in line]
    assert said == [
        "note: step 2: the engine's log-probabilities are 0.50 nats per token away from the student's on average; see "
        "docs/engines.md"
    ]


def test_episodes_that_a_server_has_no_room_for_are_refused_before_any_is_played(
    run: Settings, fake: FakeVllm, write_rows: Callable[..., Path]
) -> None:
    facts = {"id": "base", "parent": None, "max_model_len": 64}
    fake.instead = lambda path, body: (200, {"data": [facts]}) if path == "/v1/models" else None
    rows = [{"prompt": f"q{i}" * (1 + i), "completion": "a", "answer": 2} for i in range(4)]
    data = str(write_rows(rows, name="talks.jsonl"))
    plays = {"data": data, "environment": "python:tiny_worlds.Talk", "max_completion_length": 4}
    config = run("run", fake, max_steps=1, max_episode_length=60, **plays)
    longest = 60 + max(len(x.student_ids) for x in Trainer(run("ours", **plays)).stage.task.examples)
    refused = (
        rf"a prompt with its episode has up to {longest} tokens, and the engine allows 64: the model's context window "
        r"or --max-model-len of the servers; lower max_episode_length or max_prompt_length, or raise --max-model-len$"
    )
    with pytest.raises(UserError, match=refused):
        run_training(config)
    own = ("model", "mixed_precision", "engine", "engine_url", "engine_folder")
    served = {name: getattr(config, name) for name in own}
    with pytest.raises(UserError, match=refused):
        evaluate(EvalConfig(**plays, **served, max_episode_length=60))
    assert paths(fake).count("/v1/completions") == 1  # what the server was checked with
    run_training(run("shorter", fake, max_steps=1, max_episode_length=60 - (longest - 64), **plays))


@pytest.mark.slow
def test_the_rate_of_sampling_leaves_the_weights_out(run: Settings, fake: FakeVllm) -> None:
    def slow(_path: str, body: Any) -> None:
        if body and body.get("method") == "selfdistill_load":
            time.sleep(0.5)

    config = run("run", fake, max_steps=3)
    fake.instead = slow
    run_training(config)
    for line in read_lines(Path(config.output_dir) / "metrics.jsonl")[1:]:
        sampled = config.batch_size * line["completion/length"]
        assert line["time/sync_s"] > 0.5
        assert 0 < sampled / line["rollout/tokens_per_second"] <= line["time/rollout_s"] - line["time/sync_s"]


def test_a_server_that_fails_leaves_a_checkpoint_and_the_run_goes_on(
    run: Settings, fake: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = run("whole", fake, save_steps=100), run("cut", fake, save_steps=100)
    run_training(whole)

    def fail(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3:
            fake.instead = lambda path, body: (503, {}) if path == "/v1/completions" else None

    with pytest.raises(EngineFailed) as error:
        run_training(cut, on_step=fail)
    message = str(error.value)
    assert message.startswith(f"{cut.output_dir}: stopped after step 3: engine vllm: {fake.url}: /v1/completions: ")
    assert message.endswith("progress is saved, continue with resume=True")
    fake.instead = lambda path, body: None
    capsys.readouterr()
    run_training(cut, resume=True)
    assert "the run sampled" not in capsys.readouterr().err
    assert largest_difference(final_weights(whole), final_weights(cut)) < 1e-4
    assert [line["loss"] for line in metrics_of(cut)] == pytest.approx(
        [line["loss"] for line in metrics_of(whole)], abs=1e-4
    )


def test_a_run_goes_on_without_its_servers_and_says_so(
    run: Settings, fake: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("run", fake, max_steps=2, save_steps=2)
    run_training(first)
    given = {"output_dir": first.output_dir, "max_steps": 4}
    without = continued({**given, "engine": "none"}, TrainConfig)
    assert without.engine_url is None
    assert continued({**given, "engine_url": ""}, TrainConfig).engine_url is None
    assert continued(given, TrainConfig).engine_url == fake.url
    run_training(without, resume=True)
    said = capsys.readouterr().err
    assert "note: the run sampled with vllm 0.32.0, float32, server and continues with PyTorch" in said


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"fsdp": True}, marks=pytest.mark.slow),
        {"fsdp": True, "lora_rank": 4},
    ],
    ids=str,
)
def test_two_processes_and_two_servers_train_what_one_of_each_does(
    run: Settings, fake: FakeVllm, folder: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"batch_size": 4, "max_steps": 3, **values}
    with fake_vllm(folder, adapter_rank=8) as other:
        alone, together = run("alone", fake, **common | {"fsdp": False}), run("together", fake, other, **common)
        train_together(together, tmp_path)
        assert all("/v1/completions" in paths(server) for server in (fake, other))
    run_training(alone)
    assert largest_difference(final_weights(alone), final_weights(together)) < 1e-4


def test_what_fails_for_one_process_stops_all(run: Settings, fake: FakeVllm, tmp_path: Path) -> None:
    config = run("two", fake, batch_size=4, save_steps=100)

    def broken(*_: Any, **__: Any) -> None:
        raise ServerProblem("http://there: broken")

    def fail_in_the_second(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3 and os.environ["RANK"] == "1":
            VllmClient.post = broken

    children = started_together(lambda: run_training(config, on_step=fail_in_the_second), tmp_path / "two")
    assert [child.wait() for child in children] == [1, 1]
    for child in children:
        assert "stopped after step 3: engine vllm: http://there: broken; see" in child.log.read_text()
    train_together(config, tmp_path, resume=True)
    assert len(metrics_of(config)) == 6


# --- memory ---


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if the engine held memory from a sample until it rests: what it did last.

    Until then PyTorch must neither compute with the model nor ask how much memory is free.
    """
    did, sampled, computed = ["rest"], VllmServers.sample, ForwardPass.__call__

    def sampling(self: VllmServers, *given: Any) -> list[Rollout]:
        did.append("sample")
        return sampled(self, *given)

    def computing(self: ForwardPass, *given: Any, **options: Any) -> Any:
        assert did[-1] == "rest"
        return computed(self, *given, **options)

    def free(_: torch.device) -> int:
        assert did[-1] == "rest"
        return 2**40

    monkeypatch.setattr(VllmServers, "sample", sampling)
    monkeypatch.setattr(VllmServers, "rest", lambda _: did.append("rest"))
    monkeypatch.setattr(ForwardPass, "__call__", computing)
    for module in ("evaluation.measure", "runtime.resources"):
        monkeypatch.setattr(import_module(f"selfdistill.{module}"), "free_memory", free)
    return did


def test_the_engine_rests_while_a_run_computes(run: Settings, fake: FakeVllm, naps: list[str]) -> None:
    data = run("other", fake).data
    Trainer(run("other", fake))  # as if of an earlier call
    naps.append("sample")
    run_training(run("measured", fake, max_steps=1, test=data, view_rows=1))
    assert naps.count("sample") > 5
    assert naps[-1] == "rest"


def test_the_engine_rests_while_a_command_measures(
    run: Settings, fake: FakeVllm, folder: Path, naps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run("out", fake)
    own = ("model", "data", "mixed_precision", "engine", "engine_url", "engine_folder", "max_completion_length")
    shared = {name: getattr(config, name) for name in own}
    evaluate(EvalConfig(**shared, base=str(folder), num_samples=2))
    assert naps[-1] == "rest"
    count = naps.count("sample")
    monkeypatch.setattr("selfdistill.evaluation.spill.STEPS", 2)
    check(CheckConfig(**shared, contexts=["turns"], sample=2, spill=True))
    assert naps.count("sample") > count
    assert naps[-1] == "rest"


# --- settings ---


@pytest.mark.parametrize(
    "url",
    [
        *("10.0.0.2:8000", "http://a:1/v1", "http://u:p@a:1", "http://a:1,", "http://a:1,http://a:1"),
        *("http://a:port", "http://a:80000", "http://:8000", "http://[::1"),
    ],
)
def test_addresses_are_checked(url: str) -> None:
    with pytest.raises(UserError, match=r"setting 'engine_url': found .*, expected: distinct server addresses such as"):
        EngineSettings(engine="vllm", engine_url=url)


def test_addresses_without_an_engine_are_an_error() -> None:
    with pytest.raises(UserError, match="'engine_url': no engine uses it; add engine vllm"):
        EngineSettings(engine_url="http://a:1")
    assert EngineSettings(engine="vllm", engine_url="http://a:1/, https://b").engine_url == "http://a:1,https://b"


def test_lora_agrees_under_autocast(load: Loader, fake: FakeVllm) -> None:
    """Autocast keeps casts of weights, and those of other LoRA weights must not be compared with."""
    fake.info["vllm_config"]["model_config"]["dtype"] = "torch.bfloat16"
    loaded = load(fake)
    add_lora(loaded, 4, None, 0)
    with torch.autocast("cpu", torch.bfloat16):
        engine_for(loaded)
    assert "/v1/load_lora_adapter" in paths(fake)


def test_half_precision_is_what_the_files_have(load: Loader, fake: FakeVllm) -> None:
    loaded = replace(load(fake), model=load(fake).model.to(torch.bfloat16))
    fake.info["vllm_config"]["model_config"]["dtype"] = "torch.bfloat16"
    found: list[Any] = []

    def read(path: str, body: Any) -> None:
        if path == "/collective_rpc" and body["method"] == "selfdistill_load":
            (file,) = Path(body["kwargs"]["folder"]).iterdir()
            found.extend(weight.dtype for weight in load_file(file).values())

    fake.instead = read
    engine_for(loaded)
    assert {*found} == {torch.bfloat16}
