"""The engine ``vllm`` for real, on a CPU: it keeps the contract of engines, has local's numbers, and fails in order.

Starting vLLM takes most of the time, so tests share what runs; ``TestFaults`` ends it.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers as hf
from conftest import tiny_data
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_engines import _COMMON, EngineContract, random_catalogue, random_prompts
from transformers import AutoModelForCausalLM

from genrec import adapter as adapters
from genrec import base, quickstart, training
from genrec.adapter import Adapter
from genrec.config import VllmOptions
from genrec.decoding import Beams, Trie
from genrec.engines import pooled
from genrec.engines import vllm as vllms
from genrec.engines.head import Head
from genrec.engines.local import LocalEngine
from genrec.engines.pooled import VllmEngine
from genrec.engines.vllm import Server
from genrec.errors import AdapterError, ConfigError, EngineError
from genrec.recommender import Recommender
from genrec.vllm_files import write_for_engine

OPTIONS = VllmOptions(max_num_seqs=64, max_num_batched_tokens=2048)
HEAD = 32  # The narrowest head that vLLM's attention on a CPU takes.
ITEMS, USERS = 120, 200


@pytest.fixture(scope="session", autouse=True)
def small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama with random weights, as the contract wants it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    hf.LlamaForCausalLM(hf.LlamaConfig(**{**_COMMON, "head_dim": HEAD})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def contract_engine(checkpoint: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(checkpoint, options=OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a base, LoRA on it for atomic identifiers, and a whole model for semantic ones."""
    root = tmp_path_factory.mktemp("trained")
    quickstart.init(root)
    for shipped in root.glob("adapters/*.toml"):
        shipped.unlink()
    data = tiny_data(users=80, items=ITEMS)
    data.save(root / "data" / "tiny")
    titles = data.items["title"].to_list()
    base.create(titles, root / "adapters" / "random", vocabulary=300, width=2 * HEAD, heads=2, context=128)
    common = 'data = "data/tiny"\nmax_length = 96\nfeatures = 8\n[[tasks]]\nprompt = "prompts/next_item.jinja"\n'
    (root / "adapters" / "pretrained.toml").write_text(
        'base = "adapters/random"\ntuning = "full"\n' + common
        + "[training]\nnum_train_epochs = 6\nlearning_rate = 1e-2\n"
    )  # fmt: skip
    (root / "adapters" / "lora.toml").write_text(
        'base = "adapters/pretrained"\n' + common
        + "[lora]\nr = 4\n[training]\nnum_train_epochs = 2\nlearning_rate = 1e-2\n"
    )  # fmt: skip
    (root / "adapters" / "semantic.toml").write_text(
        'base = "adapters/random"\ntuning = "full"\n' + common
        + '[identifiers]\nscheme = "semantic"\nlevels = 3\ncodes = 6\n'
        "[training]\nnum_train_epochs = 6\nlearning_rate = 1e-2\n"
    )  # fmt: skip
    save = adapters.save

    def moved(path: Path, *, model: Any, **rest: Any) -> None:
        # The weights that validation kept may be those of the first step, where LoRA does nothing yet.
        if path.name == "lora":
            with torch.no_grad():
                for value in model.parameters():
                    if value.requires_grad:
                        value += 0.05 * torch.randn_like(value)
        save(path, model=model, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "save", moved)
        for name in ("pretrained", "lora", "semantic"):
            training.train(root / "adapters" / f"{name}.toml")
    return root


@pytest.fixture(scope="session")
def histories() -> list[list[str]]:
    rng = np.random.default_rng(1)
    return [[f"i{item}" for item in rng.integers(0, ITEMS, rng.integers(0, 12))] for _ in range(USERS)]


def pair(folder: Path) -> Iterator[tuple[Recommender, Recommender]]:
    served = Recommender.load(folder, engine="vllm", vllm=OPTIONS)
    yield Recommender.load(folder), served
    served.close()


@pytest.fixture(scope="session")
def atomic(trained: Path) -> Iterator[tuple[Recommender, Recommender]]:
    """LoRA, by ``local`` and by vLLM."""
    yield from pair(trained / "adapters" / "lora")


@pytest.fixture(scope="session")
def semantic(trained: Path) -> Iterator[tuple[Recommender, Recommender]]:
    yield from pair(trained / "adapters" / "semantic")


def assert_same(expected: Beams, found: Beams, top: int = 10) -> None:
    """Scores within 1e-3, and the same items in the same places where neighbours differ by more than that."""
    assert found.reasons == expected.reasons
    for wanted, scores, items, own in zip(expected.items, expected.scores, found.items, found.scores, strict=True):
        count = int((wanted >= 0).sum())
        assert int((items >= 0).sum()) == count
        np.testing.assert_allclose(own[:count], scores[:count], atol=1e-3)
        gaps = np.abs(np.diff(scores[:count]))
        clear = np.append(True, gaps > 1e-3) & np.append(gaps > 1e-3, True)
        shown = clear[:top] if count > top else clear[: max(0, count - 1)]  # Behind the last there may be a near one.
        np.testing.assert_array_equal(items[: len(shown)][shown], wanted[: len(shown)][shown])


def arguments(recommender: Recommender, histories: list[list[str]], **restrictions: Any) -> tuple[Any, ...]:
    """What a recommender asks its engine."""
    asked: list[tuple[Any, ...]] = []

    class Recording:
        def beam_search(self, *given: Any) -> Beams:
            asked.append(given)
            return engine.beam_search(*given)

    engine, recommender.engine = recommender.engine, Recording()  # type: ignore[assignment]
    try:
        recommender.recommend(histories, **restrictions)
    finally:
        recommender.engine = engine
    assert len(asked) == 1
    return asked[0]


class TestContract(EngineContract):
    atol = 1e-3

    @pytest.fixture
    def engine(self, contract_engine: VllmEngine) -> VllmEngine:
        return contract_engine


class TestParity:
    """The numbers of ``local``, in float32, after training."""

    @pytest.mark.parametrize("kind", ["atomic", "semantic"])
    @pytest.mark.parametrize(
        "restrictions",
        [
            {"exclude_seen": False},
            {},
            {"where": "brand <> 'studio 3'"},
            {"allowed": [f"i{item}" for item in range(0, ITEMS, 3)], "blocked": ["i3", "i6"]},
        ],
        ids=["free", "seen", "where", "allowed"],
    )
    def test_200_prompts(
        self, kind: str, restrictions: dict[str, Any], request: pytest.FixtureRequest, histories: list[list[str]]
    ) -> None:
        local, served = request.getfixturevalue(kind)
        given = arguments(local, histories, **restrictions)
        assert len(given[0]) == USERS
        assert_same(local.engine.beam_search(*given), served.engine.beam_search(*given))

    @pytest.mark.parametrize("kind", ["atomic", "semantic"])
    def test_only_a_few_items(self, kind: str, request: pytest.FixtureRequest, histories: list[list[str]]) -> None:
        local, served = request.getfixturevalue(kind)
        prompts, trie, beams, *_ = arguments(local, histories)
        rng = np.random.default_rng(2)
        only = [None if i % 3 == 0 else rng.integers(0, ITEMS, i % 30) for i in range(USERS)]
        blocked = [rng.integers(0, ITEMS, i % 7) for i in range(USERS)]
        expected = local.engine.beam_search(prompts, trie, beams, None, blocked, only)
        assert_same(expected, served.engine.beam_search(prompts, trie, beams, None, blocked, only))

    @pytest.mark.parametrize("kind", ["atomic", "semantic"])
    def test_scores_of_items(self, kind: str, request: pytest.FixtureRequest, histories: list[list[str]]) -> None:
        local, served = request.getfixturevalue(kind)
        items = ["i5", "i17", "i99"]
        for history in histories[:20]:
            np.testing.assert_allclose(served.score(history, items), local.score(history, items), atol=1e-3)

    def test_a_crowd_goes_in_waves(
        self, semantic: tuple[Recommender, Recommender], histories: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever part of the users fits the prefix cache at a time, and whatever part of the logits the memory."""
        local, served = semantic
        assert isinstance(served.engine, VllmEngine)
        given = arguments(local, histories)
        for module in (pooled, vllms):
            monkeypatch.setattr(module, "REQUESTS", 700)
        monkeypatch.setattr(pooled, "_LOGITS", 3 * 400)
        assert len(list(served.engine._waves(given[0], 50, 3))) > 10
        assert_same(local.engine.beam_search(*given), served.engine.beam_search(*given))

    @pytest.mark.parametrize("kind", ["atomic", "semantic"])
    def test_logits_that_do_not_fit_come_in_smaller_parts(
        self, kind: str, request: pytest.FixtureRequest, histories: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        local, served = request.getfixturevalue(kind)
        given = arguments(local, histories[:30])
        logits, most = Head.logits, 4

        def short(self: Head, states: torch.Tensor) -> torch.Tensor:
            if len(states) > most:
                raise torch.OutOfMemoryError("out of memory")
            return logits(self, states)

        monkeypatch.setattr(Head, "logits", short)
        assert_same(local.engine.beam_search(*given), served.engine.beam_search(*given))
        most = 0
        with pytest.raises(EngineError, match=r"no memory for the logits of one request.*gpu_memory_utilization"):
            served.engine.beam_search(*given)
        most = 1  # The engine lives on.
        assert_same(local.engine.beam_search(*given), served.engine.beam_search(*given))

    def test_later_steps_find_prompts_in_the_cache(
        self, semantic: tuple[Recommender, Recommender], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        local, served = semantic
        assert isinstance(served.engine, VllmEngine)
        engine, cached = served.engine.server._engines[0], []
        step = engine.step

        def spying() -> Any:
            found = step()
            cached.extend((len(one.prompt_token_ids), one.num_cached_tokens) for one in found)
            return found

        monkeypatch.setattr(engine, "step", spying)
        length = local.engine.context - 3  # type: ignore[attr-defined]
        prompt = np.random.default_rng(3).integers(20, 300, length)
        served.engine.beam_search([prompt], local.trie, 5)
        steps = {
            count: [hit for tokens, hit in cached if tokens == count] for count in (length, length + 1, length + 2)
        }
        assert len(steps[length]) == 1
        assert min(steps[length + 1] + steps[length + 2]) >= length - 32

    def test_what_is_written_is_found_again(self, trained: Path, atomic: tuple[Recommender, Recommender]) -> None:
        folder = trained / "exports" / "vllm"
        loaded = Adapter.load(trained / "adapters" / "lora")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        model, lora = write_for_engine(loaded, loaded.tokenization(), folder, dtype="float32")
        assert lora is not None
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
        (lora / "adapter_config.json").write_text("{}")
        with pytest.raises(AdapterError, match=r"adapter_config.json was changed.*Remove the folder"):
            write_for_engine(loaded, loaded.tokenization(), folder, dtype="float32")
        shutil.rmtree(lora)
        write_for_engine(loaded, loaded.tokenization(), folder, dtype="float32")
        assert model.is_dir()


class TestSharing:
    def test_two_loras_in_one_engine(
        self, trained: Path, atomic: tuple[Recommender, Recommender], histories: list[list[str]], tmp_path: Path
    ) -> None:
        """Engines on one base have the same processes and their own LoRA; closing one leaves the others."""
        local, served = atomic
        assert isinstance(served.engine, VllmEngine)
        loaded = Adapter.load(trained / "adapters" / "lora")
        model, lora = write_for_engine(loaded, loaded.tokenization(), trained / "exports" / "vllm", dtype="float32")
        assert lora is not None
        other = shutil.copytree(lora, tmp_path / "other")
        weights = {
            key: -value if ".lora_B." in key else value
            for key, value in load_file(lora / "adapter_model.safetensors").items()
        }
        save_file(weights, other / "adapter_model.safetensors", metadata={"format": "pt"})
        network = AutoModelForCausalLM.from_pretrained(model)
        expected = LocalEngine(PeftModel.from_pretrained(network, other).get_base_model().eval())
        given = arguments(local, histories)
        first = served.engine.beam_search(*given)
        second = VllmEngine(model, other, options=OPTIONS)
        assert second.server is served.engine.server
        found = second.beam_search(*given)
        assert_same(expected.beam_search(*given), found)
        assert np.abs(found.scores - first.scores).max() > 1e-2  # The LoRA does something.
        with pytest.raises(AdapterError, match="is no LoRA that vLLM takes"):
            VllmEngine(model, broken_lora(lora, tmp_path / "broken"), options=OPTIONS)
        assert second.server.users == 2
        second.close()
        second.close()  # Once more does nothing.
        with pytest.raises(EngineError, match="was closed"):
            second.beam_search(*given)
        assert_same(first, served.engine.beam_search(*given))

    def test_an_unfinished_call_leaves_nothing(self, contract_engine: VllmEngine) -> None:
        """A broken prompt ends its call; the requests that were under way with it do not turn up in the next one."""
        prompts, table = random_prompts(1, 40), random_catalogue(1, 30)
        whole = contract_engine.beam_search(prompts, Trie.build(table), 5)
        weight = contract_engine.server.head.weight
        try:
            contract_engine.server.head.weight = torch.full_like(weight, torch.nan)
            with pytest.raises(Exception, match="logits are not finite"):
                contract_engine.beam_search(prompts, Trie.build(np.arange(50)[:, None]), 5)
        finally:
            contract_engine.server.head.weight = weight
        np.testing.assert_array_equal(contract_engine.beam_search(prompts, Trie.build(table), 5).items, whole.items)

    def test_adapters_of_one_base_share_an_engine(self, trained: Path, atomic: tuple[Recommender, Recommender]) -> None:
        again = Recommender.load(trained / "adapters" / "lora", engine="vllm", vllm=OPTIONS)
        assert isinstance(again.engine, VllmEngine)
        assert isinstance(atomic[1].engine, VllmEngine)
        assert again.engine.server is atomic[1].engine.server
        again.close()
        assert atomic[1].engine.server.broken is None

    def test_an_engine_holds_loras_of_its_rank_and_below(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def start(self: Server, *key: Any) -> None:
            self.key, self.users, self.broken = key, 0, None  # type: ignore[assignment]

        monkeypatch.setattr(Server, "__init__", start)
        monkeypatch.setattr(Server, "_running", {})
        first = Server.shared(tmp_path, 16, "float32", OPTIONS)
        assert Server.shared(tmp_path, 8, "float32", OPTIONS) is first
        assert Server.shared(tmp_path, 32, "float32", OPTIONS) is not first
        assert Server.shared(tmp_path, 8, "bfloat16", OPTIONS) is not first
        assert Server.shared(tmp_path / "other", 8, "float32", OPTIONS) is not first
        assert first.users == 2
        first.broken = "it died"
        assert Server.shared(tmp_path, 8, "float32", OPTIONS) is not first


class TestRefusals:
    def test_heads_that_a_cpu_does_not_take(self, tmp_path: Path) -> None:
        hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON)).save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match=r"heads are 8 wide.*engine = \"local\""):
            VllmEngine(tmp_path, options=OPTIONS)

    def test_an_option_that_vllm_refuses(self, checkpoint: Path) -> None:
        with pytest.raises(ConfigError, match="vLLM refuses"):
            VllmEngine(checkpoint, options=replace(OPTIONS, quantization="no such thing"))

    def test_a_version_that_is_not_supported(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllms.metadata, "version", lambda _: "0.31.2")
        with pytest.raises(ConfigError, match=r"vllm 0.31.2 is installed; genrec takes >=0.32,<0.33.*make vllm-env"):
            VllmEngine(checkpoint)

    def test_other_numbers_than_plain_forwards(
        self, checkpoint: Path, contract_engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What stands beside a checkpoint is compared. Here it is of another model."""
        tokens = list(range(10))
        probe = {"prompts": [[5, 6]], "tokens": tokens, "logprobs": [[-1.0] * len(tokens)]}
        (checkpoint / "export.json").write_text(json.dumps({"probe": probe}))
        try:
            with pytest.raises(AdapterError, match="from those of plain forwards"):
                contract_engine.server._check(checkpoint, "float32")
        finally:
            (checkpoint / "export.json").unlink()


ORPHAN = """
import os, signal, sys
from genrec.config import VllmOptions
from genrec.engines.pooled import VllmEngine
if __name__ == "__main__":
    engine = VllmEngine(sys.argv[1], options=VllmOptions(max_num_seqs=8, max_num_batched_tokens=2048))
    print(*(process.pid for process in engine.server.processes.all), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def broken_lora(lora: Path, folder: Path) -> Path:
    """A copy of a LoRA for layers that the model has not."""
    shutil.copytree(lora, folder)
    weights = load_file(lora / "adapter_model.safetensors")
    renamed = {key.replace("q_proj", "no_proj"): value for key, value in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def counting(step: Any, counts: list[int], copy: int) -> Any:
    def counted() -> Any:
        found = step()
        counts[copy] += len(found)
        return found

    return counted


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs([one for one in processes if one.is_running()], timeout=30)[1]


class TestFaults:
    """These end the engines that the tests above share."""

    def ask(self, engine: VllmEngine, match: str) -> None:
        """One clear error, at once and again, and no process."""
        processes = list(engine.server.processes.all)
        assert len(processes) >= 2
        for _ in range(2):
            with pytest.raises(EngineError, match=match) as raised:
                engine.score([np.array([5, 6, 7])] * 3, [np.array([8])] * 3)
            assert "run the same command again" in str(raised.value)
        assert gone(processes)
        engine.close()

    def test_a_killed_engine(self, contract_engine: VllmEngine) -> None:
        contract_engine.server.processes.all[0].send_signal(signal.SIGKILL)
        self.ask(contract_engine, "died: .*lower vllm.gpu_memory_utilization")

    def test_a_killed_worker(self, semantic: tuple[Recommender, Recommender]) -> None:
        engine = semantic[1].engine
        assert isinstance(engine, VllmEngine)
        engine.server.processes.all[-1].send_signal(signal.SIGKILL)
        self.ask(engine, "died: ")

    def test_a_stalled_engine(self, atomic: tuple[Recommender, Recommender]) -> None:
        engine = atomic[1].engine
        assert isinstance(engine, VllmEngine)
        engine.server.options = replace(engine.options, timeout=2.0)
        for process in engine.server.processes.all:
            process.suspend()
        self.ask(engine, "finished no request for 2 seconds .*raise vllm.timeout")

    def test_a_killed_owner(self, checkpoint: Path, tmp_path: Path) -> None:
        script = tmp_path / "owner.py"
        script.write_text(ORPHAN)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, script, checkpoint], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        for pid in map(int, done.stdout.split()):
            try:
                process = psutil.Process(pid)
            except psutil.NoSuchProcess:
                continue
            assert process.status() == psutil.STATUS_ZOMBIE or gone([process])


class TestOptions:
    """Each starts an engine of its own; those that were shared have ended."""

    def left(self) -> set[str]:
        found = [Path(tempfile.gettempdir()).glob("genrec-engine-*"), Path("/dev/shm").glob("psm_*")]
        return {str(path) for paths in found for path in paths}

    def test_two_copies_in_bfloat16(
        self, trained: Path, histories: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Users are shared out, the second copy too has work, and nothing is left of either."""
        before = self.left()
        options = replace(OPTIONS, data_parallel_size=2)
        local = Recommender.load(trained / "adapters" / "lora", dtype="bfloat16")
        served = Recommender.load(trained / "adapters" / "lora", engine="vllm", dtype="bfloat16", vllm=options)
        assert isinstance(served.engine, VllmEngine)
        assert served.engine.server.head.weight.dtype == torch.bfloat16
        counts = [0, 0]
        for copy, engine in enumerate(served.engine.server._engines):
            monkeypatch.setattr(engine, "step", counting(engine.step, counts, copy))
        given = arguments(local, histories)
        expected, found = local.engine.beam_search(*given), served.engine.beam_search(*given)
        assert counts == [USERS // 2, USERS // 2]
        assert np.abs(found.scores - expected.scores)[expected.items == found.items].mean() < 0.05
        same = [len({*a} & {*b}) / 10 for a, b in zip(expected.items[:, :10], found.items[:, :10], strict=True)]
        assert np.mean(same) > 0.9
        served.close()
        assert self.left() <= before

    def test_closed_during_a_call(self, checkpoint: Path) -> None:
        """The call ends with an error, the program goes on, and a new engine of the same kind can be had."""
        engine, raised = VllmEngine(checkpoint, options=replace(OPTIONS, max_num_seqs=4)), []
        processes = list(engine.server.processes.all)

        def ask() -> None:
            try:
                while True:
                    engine.beam_search(random_prompts(1, 300), Trie.build(random_catalogue(1, 30)), 20)
            except EngineError as error:
                raised.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(1.5)
        engine.close()
        asking.join(60)
        assert raised == ["this engine was closed. Load the adapter again."]
        assert gone(processes)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # vLLM's, of its sockets.
    def test_a_start_without_end(self, checkpoint: Path) -> None:
        with pytest.raises(EngineError, match=r"did not start within 0.5 seconds .*Raise vllm.timeout"):
            VllmEngine(checkpoint, options=replace(OPTIONS, timeout=0.5))
        gc.collect()


@pytest.mark.slow
class TestSmolLM2:
    def test_16_prompts(self, tmp_path: Path) -> None:
        """Atomic and semantic identifiers of tokens that the model has."""
        model = base.find("smollm2").model(torch.float32)
        with base.quiet():
            model.save_pretrained(tmp_path)
        local, engine = LocalEngine(model.eval()), VllmEngine(tmp_path, options=replace(OPTIONS, max_model_len=256))
        rng = np.random.default_rng(0)
        prompts = [rng.integers(20, model.config.vocab_size, rng.integers(20, 150)) for _ in range(16)]
        atomic = rng.permutation(model.config.vocab_size)[:1000, None]
        semantic = np.unique(rng.integers(0, 256, (1000, 3)), axis=0) + np.array([300, 600, 900])
        try:
            for table in (atomic, semantic):
                trie = Trie.build(table)
                assert_same(local.beam_search(prompts, trie, 20), engine.beam_search(prompts, trie, 20))
        finally:
            engine.close()
