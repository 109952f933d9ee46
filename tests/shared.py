"""What the tests share: tiny random models with a byte tokenizer, saved to folders, and small demonstrations files."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import datetime
import functools
import importlib.util
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from chat_server import Server
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfdistill import cli_parser
from selfdistill.config.method import MethodName
from selfdistill.config.train import TrainConfig
from selfdistill.errors import UserError
from selfdistill.evaluation import endpoint
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.loss.log_probs import log_softmax
from selfdistill.methods import stages_of
from selfdistill.methods.sequences import Completion
from selfdistill.methods.slots import Method
from selfdistill.model import episode_sampling, forward, sampling
from selfdistill.model.engine import close_engine
from selfdistill.model.loading import LoadedModel, load_model
from selfdistill.training.batch_gradient import PartResult
from selfdistill.training.checkpoint import list_checkpoints
from selfdistill.training.selection import BatchPart
from selfdistill.training.stopwatch import Stopwatch
from selfdistill.training.trainer import Trainer

torch.set_num_threads(1)

# Where the tests were started in the background or by nohup, these are ignored, and some tests send them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def _no_wait(descriptor: int) -> None:
    """In place of ``os.fsync``: what a killed process has written is kept without it, and no test cuts the power."""
    os.fstat(descriptor)  # refuses what fsync refuses


os.fsync = _no_wait


def _once_by_architecture(probe: Callable[[LoadedModel], bool], field: str) -> Callable[[LoadedModel], bool]:
    """A start-up probe that runs once for all plain Llamas that differ in their weights alone; it takes passes."""
    found: dict[str, bool] = {}

    def probed(loaded: LoadedModel) -> bool:
        if getattr(loaded, field) is None and type(loaded.model) is LlamaForCausalLM:
            shape = sorted(item for item in vars(loaded.model.config).items() if item[0] != "_name_or_path")
            key = repr((shape, loaded.window))
            if key not in found:
                found[key] = probe(loaded)
            setattr(loaded, field, found[key])
        return probe(loaded)

    return probed


forward.head_agrees = _once_by_architecture(forward.head_agrees, "separate_head")
forward.can_continue_cache = _once_by_architecture(forward.can_continue_cache, "continues_cache")
sampling.can_continue_cache = episode_sampling.can_continue_cache = forward.can_continue_cache
cli_parser.parser = functools.cache(cli_parser.parser)  # most commands of tests end sooner than a parser is made


VOCABULARY = 300
ENDS = (257, *range(40, 75))  # with these a sample of a tiny model ends after about eight tokens
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>", "<|stop|>")  # ids 256 to 259
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if hint is defined %}{{ hint }}{% endif %}{% endif %}"
)


DOCUMENTS = ("The mill stood by the river for ninety years.", "Nobody in Varn has two keys.")
"""Of the rows of ``all_of_them``."""

VLLM: dict[str, Any] = {"engine": "vllm", "engine_memory_gib": 0.02, "engine_timeout_s": 60}
NEEDS_VLLM = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="NOT TESTED: vllm is not installed; run make test-vllm"
    ),
    pytest.mark.usefixtures("ended_engine"),
]


@pytest.fixture
def cudnn_attention() -> Iterator[None]:
    """As it is on a GPU."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture(scope="module")
def ended_engine() -> Iterator[None]:
    """End the engine after the module's tests."""
    yield
    close_engine()


def byte_tokenizer(
    *, template: str | None = CHATML, pad: bool = True, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """One token per byte, in the order of ByteLevel's alphabet, then the special tokens, then the merges."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>" if pad else None
    )
    tokenizer.chat_template = template
    return tokenizer


def write_model(
    folder: Path,
    *,
    tied: bool = False,
    ends: tuple[int, ...] = (257,),
    seed: int = 0,
    room: int = 512,
    head_dim: int = 8,
    layers: int = 2,
    **tokenizer_options: Any,
) -> None:
    """Write a tiny random Llama, whose window is ``room``, and its byte tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=room,
        tie_word_embeddings=tied,
        initializer_range=0.25,  # distributions far from uniform
        attention_dropout=0.1,  # must never act
        bos_token_id=None,
        eos_token_id=list(ends),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = list(ends)
    model.save_pretrained(folder)
    byte_tokenizer(**tokenizer_options).save_pretrained(folder)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return byte_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny Llama: options of :func:`write_model`."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            write_model(folder, **options)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def load(model_folder: Callable[..., Path]) -> Callable[..., LoadedModel]:
    """A fresh :class:`LoadedModel` of ``model_folder(**options)``."""

    def loader(*, dtype: str = "float32", **options: Any) -> LoadedModel:
        return load_model(str(model_folder(**options)), dtype=dtype)

    return loader


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows to a ``.jsonl`` file: given ones, or ``count`` made-up questions with answers of unlike lengths."""

    def write(rows: list[dict[str, Any]] | None = None, *, count: int = 6, name: str = "train.jsonl") -> Path:
        if rows is None:
            rows = [{"prompt": f"q{i}" * (1 + i % 3), "completion": "ab" * (1 + i % 4)} for i in range(count)]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def settings(
    model_folder: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> Callable[..., TrainConfig]:
    """Settings of a tiny run into ``out``: six rows, three steps an epoch, nothing measured beside the steps."""
    data = write_rows()

    def make(out: str = "run", **values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "model": str(model_folder(ends=ENDS)),
            "data": str(data),
            "output_dir": str(tmp_path / out),
            "context": "turns",
            "max_completion_length": 10,
            "batch_size": 2,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "save_steps": 0,
            "drift_steps": 0,
            "view_rows": 0,
            "mixed_precision": "no",
        }
        return TrainConfig(**(defaults | values))

    return make


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str | None]]:
    """Let it be the given day; returns the days that chat templates see from then on."""
    chat = LoadedModel.chat

    def begin(day: str) -> list[str | None]:
        today = SimpleNamespace(today=lambda: datetime.date.fromisoformat(day))
        monkeypatch.setattr("selfdistill.data.chat_format.datetime", SimpleNamespace(date=today))
        seen: list[str | None] = []

        def recorded(*arguments: Any, **options: Any) -> Any:
            found = chat(*arguments, **options)
            seen.append(found.date)
            return found

        monkeypatch.setattr(LoadedModel, "chat", recorded)
        return seen

    return begin


def quick(names: Sequence[str], *kept: str) -> list[Any]:
    """Parameters of a test: all names, of which those that try a mechanism a second time are slow ones."""
    assert set(kept) <= set(names)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


def needs(method: Any, other_model: str) -> dict[str, Any]:
    """Settings that a method needs, or that keep its steps short: groups of four; another model if it must have one."""
    values: dict[str, Any] = {}
    if method in ("grpo", "sdpo", "pope", "sort", "trapo", "actguide", "npo"):
        values["num_generations"] = 4
    if method == "sort":
        values["method_settings"] = {"plan": 0}
    if method in ("npo", "t3s"):
        values["teacher_model"] = other_model
    if method == "trapo":
        values["method_settings"] = {"sizes": (1, 1, 1, 1)}
    return values


def methods_where(holds: Callable[[Method], bool], **values: Any) -> list[str]:
    """The methods that accept these settings and of which ``holds`` is true, in any of their stages."""
    found = []
    for name in get_args(MethodName):
        required = {"model": "m", "data": "d", "output_dir": "o", "scorer": "exact", "method": name}
        with contextlib.suppress(UserError):
            stages = stages_of(TrainConfig(**(required | needs(name, "m") | values)))
            found += [name] if any(holds(part.method) for parts in stages for part in parts) else []
    return found


@pytest.fixture
def all_of_them(
    settings: Callable[..., TrainConfig],
    write_rows: Callable[..., Path],
    model_folder: Callable[..., Path],
    tmp_path: Path,
) -> Callable[..., TrainConfig]:
    """Settings with which every method runs: documents, general prompts, an answer that half of all replies have."""
    rows = [
        {
            "prompt": f"q{i}" * (1 + i % 3),
            "completion": "ab" * (1 + i % 4),
            "document": DOCUMENTS[i % 2],
            "scorer": "regex",
            "answer": r"[\s\S]{4,}",
        }
        for i in range(6)
    ]
    data = write_rows(rows, name="rows.jsonl")
    general = tmp_path / "general.txt"
    general.write_text("Who?\n\nWhy is that so?\nWhen\n", encoding="utf-8")

    def make(out: str = "run", **values: Any) -> TrainConfig:
        more: dict[str, Any] = {"data": str(data), "general_prompts": str(general)}
        more |= needs(values.get("method"), str(model_folder(ends=ENDS, seed=1)))
        return settings(out, **(more | values))

    return make


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def share_apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Share of the weights that differ by more than 1e-5.

    AdamW moves a weight by about the rate even if its gradient is nothing but rounding, so single ones may differ.
    """
    assert a.keys() == b.keys()
    return float((torch.cat([(a[name] - b[name]).abs().flatten() for name in a]) > 1e-5).float().mean())


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def row_log_probs(model: Any, context: list[int], completion: list[int]) -> Tensor:
    """Of every token at each place of the completion, computed in float64, whatever the type of the weights."""
    weights = {name: value.double() for name, value in (*model.named_parameters(), *model.named_buffers())}
    ids = {"input_ids": torch.tensor([context + completion])}
    logits_LV = torch.func.functional_call(model, weights, kwargs=ids).logits[0]
    assert logits_LV.dtype == torch.float64
    return logits_LV[len(context) - 1 : -1].log_softmax(-1)


def per_token(loss: Divergence | CrossEntropy, student: Tensor, teacher: Tensor | None, tokens: Tensor) -> Tensor:
    """The loss of logits, without a target and a pull."""
    log_q = None if teacher is None else log_softmax(teacher.detach())
    return loss.from_log_probs(log_softmax(student), log_q, tokens)


def add_gradient(run: Trainer, completions: Sequence[Completion], method: Method | None = None) -> PartResult:
    """Accumulate the gradient of a step that has nothing but these completions of the task."""
    task = run.stage.task
    part = BatchPart(task.name, method or task.method, completions, 1.0)
    (result,) = run.gradient.add([part], Stopwatch(run.loaded.device))
    return result


def final_weights(config: TrainConfig) -> dict[str, Tensor]:
    (file,) = (Path(config.output_dir) / "final").glob("*.safetensors")
    return load_file(file)


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what the clock says."""
    return {k: v for k, v in line.items() if not k.startswith("time/") and k != "rollout/tokens_per_second"}


def metrics_of(config: TrainConfig) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what the clock says."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [timeless(json.loads(line)) for line in lines]


class Cut(BaseException):
    """A crash: the run saves nothing, as it does for an ``Exception``."""


def crash_at(step: int) -> Callable[[int, Any], None]:
    def on_step(done: int, _loaded: Any, _metrics: Any) -> None:
        if done == step:
            raise Cut

    return on_step


def assert_same_run(a: TrainConfig, b: TrainConfig) -> None:
    """Final model, every tensor of the last checkpoint (weights, moments, average) and every metric."""
    assert same(final_weights(a), final_weights(b))
    last_a, last_b = (list_checkpoints(Path(c.output_dir))[-1] for c in (a, b))
    assert last_a.name == last_b.name
    for name in ("weights", "optimizer", "teacher"):
        x, y = (load_file(last / f"{name}.safetensors") for last in (last_a, last_b))
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x), name
    assert metrics_of(a) == metrics_of(b)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint, "WAITS_S", (0.01, 0.01))
    with Server() as it:
        thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield it
        it.shutdown()
        thread.join()
