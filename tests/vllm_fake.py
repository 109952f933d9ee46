"""What a vLLM server answers, from a model of our own: quick, and it can be made to fail."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from selfdistill.model import LoadedModel, Sampling, load_model, sample
from selfdistill.model.vllm_worker import Worker

Reply = tuple[int, Any]


class FakeWorker(Worker):
    """Our own part of a server's worker, around the fake's weights."""

    def __init__(self, server: FakeVllm) -> None:
        self._server = server
        config = server.original.model.config
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=config), device_config=SimpleNamespace(device_type="none")
        )

    def reload_weights(self, weights_path: str) -> None:
        """As vLLM's own."""
        for file in Path(weights_path).glob("*.safetensors"):
            self._server.weights |= load_file(file)
        self._server.models = {"base": self._server.fresh()}


class FakeVllm(ThreadingHTTPServer):
    """Samples by our own loop, with the weights that it was given.

    ``instead`` may answer a request by its path and body in the place of the server; None leaves it to the server.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, adapter_rank: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.original = load_model(str(folder))
        self.worker = FakeWorker(self)
        self.weights = {name: weight.clone() for name, weight in self.original.model.named_parameters()}
        self.models = {"base": self.fresh()}
        self.lock = threading.Lock()
        self.asked: list[tuple[str, Any]] = []
        self.instead: Callable[[str, Any], Reply | None] = lambda path, body: None
        self.info: dict[str, Any] = {
            "vllm_config": {
                "model_config": {
                    "dtype": "torch.float32",
                    "logprobs_mode": "processed_logprobs",
                    "generation_config": "vllm",
                    "quantization": None,
                },
                "parallel_config": {"worker_extension_cls": "selfdistill.model.vllm_worker.Worker"},
                "lora_config": {"max_lora_rank": adapter_rank} if adapter_rank else None,
            },
            "vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True},
        }

    def get(self, path: str) -> Reply:
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/server_info":
            return 200, self.info
        parents = {name: None if name == "base" else "base" for name in self.models}
        return 200, {"data": [{"id": name, "parent": parent, "max_model_len": 512} for name, parent in parents.items()]}

    def post(self, path: str, body: Any) -> Reply:
        if path == "/tokenize":
            return 200, {"tokens": self.models["base"].tokenizer(body["prompt"])["input_ids"]}
        if path == "/collective_rpc":
            try:
                return 200, {"results": [getattr(self.worker, body["method"])(**body["kwargs"])]}
            except OSError as error:
                return 500, {"error": {"message": str(error)}}
        if path == "/v1/load_lora_adapter":
            loaded = self.fresh()
            loaded.model = PeftModel.from_pretrained(loaded.model, body["lora_path"]).eval()
            self.models[body["lora_name"]] = loaded
        if path == "/v1/unload_lora_adapter":
            return (200 if self.models.pop(body["lora_name"], None) else 404), {}
        return self.completion(body) if path == "/v1/completions" else (200, {"success": True})

    def fresh(self) -> LoadedModel:
        loaded = copy.deepcopy(self.original)  # transformers cannot load in two threads at once
        loaded.model.load_state_dict(self.weights, strict=False)  # tied ones once
        return loaded

    def completion(self, body: dict[str, Any]) -> Reply:
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        loaded = self.models[body["model"]]
        loaded.end_token_ids = tuple(body["stop_token_ids"])
        policy = Sampling(body["max_tokens"], body["temperature"], body["top_p"], body["top_k"])
        (found,) = sample(loaded, [body["prompt"]], policy, [body["seed"]] if "seed" in body else None)
        choice = {
            "token_ids": found.ids,
            "logprobs": {"token_logprobs": found.logps},
            "finish_reason": "length" if found.truncated else "stop",
        }
        return 200, {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.answer(self.server.instead(path, None) or self.server.get(path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
        found = self.server.instead(self.path, body)
        if found is None:
            with self.server.lock:
                found = self.server.post(self.path, body)
        self.answer(found)

    def answer(self, reply: Reply) -> None:
        status, content = reply
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def fake_vllm(folder: Path, adapter_rank: int = 0) -> Iterator[FakeVllm]:
    """A fake server that answers until the end of the block."""
    with FakeVllm(folder, adapter_rank) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
