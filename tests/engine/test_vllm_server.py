"""Real vLLM servers: what they sample, from which weights, and how a run survives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from children import train_together
from conftest import ENDS, NEEDS_VLLM, final_weights, largest_difference, metrics_of
from safetensors.torch import save_file
from sampled import FREE, GREEDY, differences, frequency_pvalue, gap, own, prompts, seeds, train
from vllm_serve import VllmServe, networks_apart

from selfdistill.config import EngineSettings, TrainConfig
from selfdistill.errors import EngineFailed, UserError
from selfdistill.model import (
    LoadedModel,
    Sampling,
    add_lora,
    engine_for,
    load_model,
    sample,
    use_engine,
    vllm_server,
)
from selfdistill.model.engine import close_engine
from selfdistill.model.engine_weights import WeightsDigest, hub_tensors
from selfdistill.model.vllm_client import VllmClient
from selfdistill.model.vllm_server import VllmServers
from selfdistill.training.train import train as run_training

pytestmark = NEEDS_VLLM
Loader = Callable[..., LoadedModel]
Settings = Callable[..., TrainConfig]
WITH_LORA = ("--enable-lora", "--max-lora-rank", "8")
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


def served(server: VllmServe) -> Iterator[VllmServe]:
    """The server, until the end of the module's tests; then no process of it is left."""
    try:
        yield server.wait()
        close_engine()
        server.send(signal.SIGTERM)
        psutil.wait_procs([psutil.Process(pid) for pid in server.processes()], timeout=20)
        assert server.processes() == []
    finally:
        server.kill()


@pytest.fixture(scope="module")
def one(model_folder: Callable[..., Path], logs: Path) -> Iterator[VllmServe]:
    """A server of the tied model that takes adapters."""
    yield from served(VllmServe(model_folder(head_dim=32, ends=ENDS, tied=True), logs / "one", WITH_LORA))


@pytest.fixture(scope="module")
def two(model_folder: Callable[..., Path], logs: Path) -> Iterator[VllmServe]:
    """Another one of the same model."""
    yield from served(VllmServe(model_folder(head_dim=32, ends=ENDS, tied=True), logs / "two", WITH_LORA))


@pytest.fixture(scope="module")
def networks() -> Iterator[tuple[str, str, str, str] | None]:
    with networks_apart() as names:
        yield names


@pytest.fixture(scope="module")
def apart(model_folder: Callable[..., Path], logs: Path, networks: Any) -> Iterator[VllmServe]:
    """A server of the untied model without adapters, with a shorter window, in a network of its own if possible."""
    netns, host = (networks[0], networks[2]) if networks else (None, "127.0.0.1")
    folder = model_folder(head_dim=32, ends=ENDS)
    yield from served(VllmServe(folder, logs / "apart", ("--max-model-len", "256"), netns, host))


@pytest.fixture
def load(model_folder: Callable[..., Path]) -> Loader:
    """A fresh model that servers sample from."""

    def loader(*servers: VllmServe, tied: bool = True, timeout_s: float = TIMEOUT_S, **options: Any) -> LoadedModel:
        loaded = load_model(str(model_folder(head_dim=32, ends=ENDS, tied=tied, **options)))
        urls = ",".join(server.url for server in servers)
        use_engine(loaded, EngineSettings(engine="vllm", engine_url=urls, engine_timeout_s=timeout_s))
        return loaded

    return loader


@pytest.fixture
def run(settings: Settings, model_folder: Callable[..., Path], tmp_path: Path) -> Settings:
    """Settings of a tiny run that samples with servers."""

    def make(out: str, *servers: VllmServe, tied: bool = True, **values: Any) -> TrainConfig:
        model = str(model_folder(head_dim=32, ends=ENDS, tied=tied))
        urls = ",".join(server.url for server in servers)
        where = {"engine_url": urls, "engine_folder": str(tmp_path)}
        engine = {"engine": "vllm", "engine_timeout_s": TIMEOUT_S, **where}
        return settings(out, **{"model": model, "learning_rate": 1e-2, **engine, **values})

    return make


def asked(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, dict[str, Any]], Any]) -> list[tuple[str, str]]:
    """Server and path of every request from now on, or the worker's method, but for reads of the version.

    ``change`` may alter a request, or answer it.
    """
    found: list[tuple[str, str]] = []
    send = VllmClient.post

    def post(self: VllmClient, path: str, body: dict[str, Any], *key: str, **options: Any) -> Any:
        method = body.get("method", path)
        found.extend([] if method == "selfdistill_version" else [(self.url, method)])
        answer = change(path, body)
        return send(self, path, body, *key, **options) if answer is None else answer

    monkeypatch.setattr(VllmClient, "post", post)
    return found


# --- what they sample ---


def test_greedy_tokens_are_those_of_our_loop(load: Loader, one: VllmServe) -> None:
    loaded, batch = load(one), prompts(5, 1, 40, 17, 2, 3, 64, 64)
    rollouts = sample(loaded, batch, GREEDY)
    assert rollouts == own(loaded, batch, GREEDY)
    assert any(r.truncated for r in rollouts) or len({len(r.ids) for r in rollouts}) > 2


def test_a_sample_stops_at_every_end_token_and_keeps_it(load: Loader, one: VllmServe) -> None:
    loaded, batch = load(one), prompts(*[6] * 40)
    rollouts = sample(loaded, batch, FREE, seeds(40))
    ends = set(loaded.end_token_ids)
    assert all((r.ids[-1] in ends) != r.truncated for r in rollouts)
    assert all(not ends & set(r.ids[:-1]) for r in rollouts)
    assert len({r.ids[-1] for r in rollouts if not r.truncated}) > 3
    assert 0 < sum(r.truncated for r in rollouts) < 40


@pytest.mark.parametrize("policy", [Sampling(1, 0.7), Sampling(1, 1.0, top_p=0.9, top_k=12)], ids=str)
def test_tokens_are_as_frequent_as_the_policy_says(load: Loader, one: VllmServe, policy: Sampling) -> None:
    assert frequency_pvalue(load(one), policy, 1000) > 0.001


@pytest.mark.parametrize("policy", [FREE, Sampling(12, 0.7)], ids=["1", "0.7"])
def test_log_probabilities_are_those_of_the_policy(load: Loader, one: VllmServe, policy: Sampling) -> None:
    assert gap(load(one), policy) < 1e-3


def test_a_sample_depends_on_its_seed_and_prompt_alone(load: Loader, one: VllmServe) -> None:
    loaded, batch, numbers = load(one), prompts(5, 30, 12, 5), seeds(4)
    together = [r.ids for r in sample(loaded, batch, FREE, numbers)]
    assert [sample(loaded, [p], FREE, [n])[0].ids for p, n in zip(batch, numbers, strict=True)] == together
    assert [r.ids for r in sample(loaded, batch[::-1], FREE, numbers[::-1])] == together[::-1]
    assert [r.ids for r in sample(loaded, batch, FREE, seeds(4, step=1))] != together


def test_two_servers_share_the_samples(
    load: Loader, one: VllmServe, two: VllmServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, batch = load(one, two), prompts(*range(1, 21))
    train(loaded, 1)
    sample(loaded, batch, GREEDY)
    train(loaded, 2)
    paths = asked(monkeypatch, lambda path, body: None)
    rollouts = sample(loaded, batch, FREE, seeds(20))
    assert max(differences(loaded, batch, rollouts)) < 1e-3
    for server in (one, two):
        assert paths.count((server.url, "/v1/completions")) == 10
        assert paths.count((server.url, "selfdistill_load")) == 1


# --- from which weights ---


@pytest.mark.parametrize("lora", [0, 4, 16], ids=["full", "adapter", "rank beyond the server's"])
def test_after_optimizer_steps_they_are_the_students(
    load: Loader, one: VllmServe, monkeypatch: pytest.MonkeyPatch, lora: int
) -> None:
    loaded = load(one)
    if lora:
        add_lora(loaded, lora, None, seed=0)
    paths = asked(monkeypatch, lambda path, body: None)
    assert gap(loaded) < 1e-3
    for number, steps in enumerate((1, 1, 8)):  # after 1, 2 and 10
        train(loaded, steps)
        paths.clear()
        assert gap(loaded, step=number) < 1e-3
        new = {path for _, path in paths} - {"/v1/completions"}
        assert new == ({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} if lora == 4 else set(WEIGHTS_CHANGE))
    with monkeypatch.context() as patch:  # without the synchronisation
        patch.setattr(vllm_server, "weights_digest", lambda loaded: WeightsDigest("one", "for all"))
        sample(loaded, prompts(3), GREEDY)  # what there is then is taken over once
        train(loaded, 3)
        assert gap(loaded) > 1e-2
    assert gap(loaded) < 1e-3


WEIGHTS_CHANGE = ("selfdistill_load", "/reset_prefix_cache", "selfdistill_confirm")


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "merged"])
def test_a_server_without_adapters_gets_full_weights(load: Loader, apart: VllmServe, lora: int) -> None:
    loaded = load(apart, tied=False)
    if lora:
        add_lora(loaded, lora, None, seed=0)
    assert sample(loaded, prompts(40), GREEDY) == own(loaded, prompts(40), GREEDY)
    train(loaded, 3)
    assert gap(loaded) < 1e-3


def test_student_and_base_in_turn_are_told_apart(load: Loader, one: VllmServe, monkeypatch: pytest.MonkeyPatch) -> None:
    student, base = load(one), load(one)
    add_lora(student, 4, None, seed=0)
    train(student, 3)
    assert gap(student) < 1e-3
    paths = asked(monkeypatch, lambda path, body: None)
    assert gap(base) < 1e-3
    assert gap(student) < 1e-3
    assert "selfdistill_load" not in {path for _, path in paths}  # the base's weights stay


def test_the_packed_head_of_a_tied_model_goes_along(
    load: Loader, one: VllmServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(one)
    assert gap(loaded) < 1e-3

    version: list[str] = []

    def as_vllm_does(path: str, body: dict[str, Any]) -> list[str] | None:
        if body.get("method") == "selfdistill_load":
            version[:] = [body["kwargs"]["version"]]
            body |= {"method": "reload_weights", "kwargs": {"weights_path": body["kwargs"]["folder"]}}
            return None
        return version if version and path == "/collective_rpc" else None

    with monkeypatch.context() as patch:
        asked(patch, as_vllm_does)
        train(loaded, 3)
        assert gap(loaded) > 1e-2
    train(loaded, 1)
    assert gap(loaded) < 1e-3


def test_the_prefix_cache_is_reset_with_the_weights(
    load: Loader, one: VllmServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, long = load(one), (300,)  # longer than a block of the cache
    assert gap(loaded, lengths=long) < 1e-3
    train(loaded, 3)
    assert gap(loaded, lengths=long) < 1e-3
    with monkeypatch.context() as patch:
        asked(patch, lambda path, body: True if path == "/reset_prefix_cache" else None)
        train(loaded, 3)
        assert gap(loaded, lengths=long) > 1e-2
    train(loaded, 1)
    assert gap(loaded, lengths=long) < 1e-3


def test_a_new_adapter_has_a_new_name(load: Loader, one: VllmServe, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, long = load(one), (300,)
    add_lora(loaded, 4, None, seed=0)
    train(loaded, 3)
    assert gap(loaded, lengths=long) < 1e-3
    first = adapters_of(one)
    train(loaded, 3)
    assert gap(loaded, lengths=long) < 1e-3
    second = adapters_of(one)
    assert len(first) == len(second) == 1
    assert first != second
    with monkeypatch.context() as patch:  # the server refuses new weights under an old name
        asked(patch, lambda path, body: body.update(lora_name=second[0]) if "load_lora" in path else None)
        train(loaded, 1)
        with pytest.raises(EngineFailed, match=r"/v1/load_lora_adapter: status 400, .* already been loaded"):
            sample(loaded, prompts(3), GREEDY)
    close_engine()
    assert gap(loaded, lengths=long) < 1e-3
    close_engine()


def adapters_of(server: VllmServe) -> list[str]:
    return [model["id"] for model in VllmClient(server.url, 10).get("/v1/models", "data") if model["parent"]]


def test_a_run_that_ends_leaves_no_adapter_and_no_files(load: Loader, one: VllmServe, tmp_path: Path) -> None:
    close_engine()
    loaded = load(one)
    assert loaded.engine is not None
    use_engine(loaded, loaded.engine.model_copy(update={"engine_folder": str(tmp_path)}))
    add_lora(loaded, 4, None, seed=0)
    sample(loaded, prompts(3), GREEDY)
    assert len(adapters_of(one)) == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1  # the adapter's, none of full weights
    close_engine()
    assert adapters_of(one) == []
    assert list(tmp_path.iterdir()) == []


# --- when they fail ---


def test_an_engine_core_that_dies_leaves_a_checkpoint_and_the_run_goes_on(
    load: Loader, run: Settings, two: VllmServe
) -> None:
    whole, cut = run("whole", two, save_steps=100), run("cut", two, save_steps=100)
    run_training(whole)
    close_engine()
    student = load(two)
    train(student, 3)
    assert student.engine is not None
    other = VllmServers(student, student.engine, torch.float32)

    def kill(step: int, _loaded: Any, _metrics: Any) -> None:
        if step == 3:
            (core,) = (pid for pid in two.processes() if "EngineCore" in "".join(psutil.Process(pid).cmdline()))
            os.kill(core, signal.SIGKILL)

    with pytest.raises(EngineFailed) as error:
        run_training(cut, on_step=kill)
    message = str(error.value)
    assert message.startswith(f"{cut.output_dir}: stopped after step 3: engine vllm: {two.url}: ")
    assert message.endswith("progress is saved, continue with resume=True")
    assert "\n" not in message
    assert "see the server's log" in message
    two.kill()
    with pytest.raises(EngineFailed, match=r"cannot be reached \(Connection refused\)"):
        run_training(cut, resume=True)
    two.start()
    two.wait()
    # It has the weights of its folder again, of which the other engine does not know.
    batch = prompts(5, 40)
    assert max(differences(student, batch, other.sample(student, batch, FREE, seeds(2)))) < 1e-3
    other.close()
    run_training(cut, resume=True)
    assert largest_difference(final_weights(whole), final_weights(cut)) < 1e-3  # of steps of 1e-2
    for a, b in zip(metrics_of(whole), metrics_of(cut), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_server_that_stands_still_is_late(load: Loader, one: VllmServe) -> None:
    close_engine()
    loaded = load(one, timeout_s=2)
    sample(loaded, prompts(3), GREEDY)
    one.send(signal.SIGSTOP)
    try:
        with pytest.raises(EngineFailed, match=rf"{one.url}: no answer to /collective_rpc in 2 s \(engine_timeout_s\)"):
            sample(loaded, prompts(3), GREEDY)
        with pytest.raises(EngineFailed, match=r"no answer to /version in 2 s"):
            sample(loaded, prompts(3), GREEDY)
    finally:
        one.send(signal.SIGCONT)
    sample(loaded, prompts(3), GREEDY)
    halt = threading.Timer(0.5, lambda: one.send(signal.SIGSTOP))
    halt.start()
    try:
        with pytest.raises(EngineFailed, match=r"no sample was completed in 2 s, \d+ of 200 are pending"):
            sample(loaded, prompts(*[20] * 200), Sampling(400, temperature=0.01), seeds(200))
    finally:
        halt.join()
        one.send(signal.SIGCONT)
    assert sample(loaded, prompts(3), GREEDY) == own(loaded, prompts(3), GREEDY)


def test_weights_that_another_run_puts_in_are_noticed(
    load: Loader, one: VllmServe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded, rival = load(one), load(one)
    train(rival, 3)
    save_file(dict(hub_tensors(rival)), tmp_path / "model.safetensors")
    theirs = {"folder": str(tmp_path), "version": "another run's"}
    for when in ("/reset_prefix_cache", "/v1/completions"):
        sample(loaded, prompts(3), GREEDY)
        train(loaded, 1)

        def interfere(path: str, body: dict[str, Any], when: str = when) -> None:
            if path == when:
                patch.undo()
                VllmClient(one.url, 10).post("/collective_rpc", {"method": "selfdistill_load", "kwargs": theirs})

        with monkeypatch.context() as patch:
            asked(patch, interfere)
            with pytest.raises(EngineFailed, match="received other weights, probably from a second run"):
                sample(loaded, prompts(3), GREEDY)
    assert gap(loaded) < 1e-3


def test_another_model_is_refused_before_it_gets_weights(load: Loader, one: VllmServe) -> None:
    close_engine()
    with pytest.raises(UserError, match=r"a different model: tie_word_embeddings is 1, '.*' has 0; serve that model"):
        engine_for(load(one, tied=False))
    with pytest.raises(UserError, match=r"a different model: max_position_embeddings is 512, '.*' has 1024; serve"):
        engine_for(load(one, room=1024))
    assert gap(load(one)) < 1e-3


def test_another_tokenizer_is_refused(load: Loader, one: VllmServe) -> None:
    close_engine()
    with pytest.raises(UserError, match=r"its tokenizer differs from that of '.*'; serve the same model"):
        engine_for(load(one, merges=(("q", "u"),)))


def test_a_length_beyond_the_servers_is_an_error(load: Loader, apart: VllmServe) -> None:
    loaded = load(apart, tied=False)
    assert "at most 256 tokens, LoRA merged" in engine_for(loaded).describe()
    too_short = r"engine allows 256: the model's context window or --max-model-len of the servers; "
    with pytest.raises(UserError, match=too_short):
        sample(loaded, prompts(250), GREEDY)


def test_a_folder_that_a_server_does_not_see_is_named(
    load: Loader, one: VllmServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(one)
    engine_for(loaded)

    def elsewhere(path: str, body: dict[str, Any]) -> None:
        if body.get("method") == "selfdistill_load":
            body["kwargs"]["folder"] = "/elsewhere/1"

    with monkeypatch.context() as patch:
        asked(patch, elsewhere)
        train(loaded, 1)
        with pytest.raises(EngineFailed, match=r"finds no weights in /elsewhere/1 \(No such file"):
            sample(loaded, prompts(3), GREEDY)
    assert gap(loaded) < 1e-3


# --- runs ---


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}], ids=str)
def test_a_run_samples_from_its_student(run: Settings, one: VllmServe, options: dict[str, Any]) -> None:
    config = run("run", one, max_steps=4, **options)
    run_training(config)
    for line in metrics_of(config):
        assert line["engine/gap"] <= line["engine/gap_max"] < 1e-3
        assert line["importance"] == pytest.approx(1, abs=1e-3)
    times = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["time/sync_s"] < line["time/rollout_s"] for line in times)


@pytest.mark.parametrize("values", [{}, {"fsdp": True}, {"fsdp": True, "lora_rank": 4}], ids=str)
def test_two_processes_and_two_servers_train_what_one_of_each_does(
    run: Settings, one: VllmServe, two: VllmServe, tmp_path: Path, values: dict[str, Any]
) -> None:
    close_engine()
    common: dict[str, Any] = {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, **values}
    alone, together = run("alone", one, **common | {"fsdp": False}), run("together", one, two, **common)
    train_together(together, tmp_path)
    run_training(alone)
    assert largest_difference(final_weights(alone), final_weights(together)) < 1e-4  # of steps of 1e-3
    for a, b in zip(metrics_of(alone), metrics_of(together), strict=True):
        assert max(a["engine/gap_max"], b["engine/gap_max"]) < 1e-3
        assert a == pytest.approx(b, abs=1e-4)


def test_trainer_and_server_on_hosts_of_their_own(run: Settings, apart: VllmServe, networks: Any) -> None:
    if networks is None:
        pytest.skip("NOT TESTED BETWEEN HOSTS: network namespaces need root and ip (iproute2)")
    _, trainer, ours, theirs = networks
    near, far = run("near", apart, tied=False, max_steps=3), run("far", apart, tied=False, max_steps=3)
    run_training(near)
    close_engine()
    values = {key: value for key, value in far.model_dump(exclude_defaults=True).items() if key != "engine_url"}
    options = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    url = apart.url.replace(ours, theirs)
    command = [sys.executable, "-m", "selfdistill", "train", *options, "--engine_url", url]
    done = subprocess.run(["ip", "netns", "exec", trainer, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"server at {url}" in done.stderr
    assert largest_difference(final_weights(near), final_weights(far)) < 1e-3  # of steps of 1e-2
