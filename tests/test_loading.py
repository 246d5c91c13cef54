from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from genrec.config import VllmOptions
from genrec.errors import ConfigError
from genrec.loading import ENGINES, EngineName, check_engine
from genrec.recommender import Recommender


def test_engines_are_those_of_a_job() -> None:
    from typing import get_args, get_type_hints

    from genrec.config import Job

    assert set(ENGINES) == set(get_args(EngineName)) == set(get_args(get_type_hints(Job)["engine"]))


def test_unknown_engine_is_refused_with_the_closest(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine is 'vlm'\. Did you mean 'vllm'\?"):
        Recommender.load(workspace / "adapters" / "lora", engine="vlm")  # type: ignore[arg-type]


def test_vllm_that_is_not_installed_is_one_message_with_the_next_command(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name.startswith("vllm"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    path = inside / "adapters" / "lora"
    dummy = Recommender.load(path, engine="dummy")
    calls: tuple[Callable[[], Any], ...] = (
        lambda: Recommender.load(path, engine="vllm"),
        lambda: dummy.with_model(engine="vllm"),
        lambda: check_engine("vllm", "cpu"),
    )
    for call in calls:
        with pytest.raises(ConfigError, match="make vllm-env") as error:
            call()
        assert "\n" not in str(error.value)
    assert not Path("exports").exists()


def test_vllm_is_not_started_with_less_room_than_a_prompt_takes(inside: Path, vllm: list[Any]) -> None:
    path = inside / "adapters" / "lora"
    with pytest.raises(ConfigError, match=r"vllm\.max_model_len is 63, and prompts of .*lora .* up to 64 tokens"):
        Recommender.load(path, engine="vllm", vllm=VllmOptions(max_model_len=63))
    assert not vllm
    Recommender.load(path, engine="vllm", vllm=VllmOptions(max_model_len=64))


def test_vllm_is_given_what_it_takes(inside: Path, vllm: list[Any]) -> None:
    path, options = inside / "adapters" / "lora", VllmOptions(max_num_seqs=8)
    dummy = Recommender.load(path, engine="dummy")
    found = [Recommender.load(path, engine="vllm", dtype="bfloat16", vllm=options)]
    found[0].close()
    found.append(dummy.with_model(engine="vllm"))
    assert [rec.engine for rec in found] == vllm
    assert [(engine.dtype, engine.options) for engine in vllm] == [("bfloat16", options), ("float32", VllmOptions())]
    assert {engine.model_folder.parent for engine in vllm} == {inside / "exports" / "vllm"}


def test_answers_are_those_of_the_engine_and_closing_ends_it(inside: Path, vllm: list[Any]) -> None:
    path = inside / "adapters" / "lora"
    local, rec = Recommender.load(path), Recommender.load(path, engine="vllm")
    assert rec.recommend(["i3", "i4"]) == local.recommend(["i3", "i4"])
    with pytest.raises(ConfigError, match=r"similar needs a model, and VllmEngine has none\. Load with engine='local'"):
        rec.similar("i3")
    rec.close()
    local.close()  # Nothing to end, and it goes on.
    assert vllm[0].closed
    assert len(local.recommend(["i3"], 3)) == 3


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta"])
def test_vllm_takes_no_device(inside: Path, vllm: list[Any], device: str) -> None:
    path = inside / "adapters" / "lora"
    with pytest.raises(ConfigError, match=rf"device is '{device}', and vLLM takes the GPUs .*Leave device out"):
        Recommender.load(path, engine="vllm", device=device)
    with pytest.raises(ConfigError, match="vLLM takes the GPUs"):
        Recommender.load(path, engine="dummy").with_model(engine="vllm", device=device)
    assert not vllm


def test_vllm_takes_two_dtypes(inside: Path, vllm: list[Any]) -> None:
    with pytest.raises(ConfigError, match="dtype is 'float16', and the engine vllm takes float32 or bfloat16"):
        Recommender.load(inside / "adapters" / "lora", engine="vllm", dtype="float16")


def test_without_a_model_dummy_stays_dummy(inside: Path) -> None:
    dummy = Recommender.load(inside / "adapters" / "lora", engine="dummy")
    assert dummy.with_model(engine="dummy").engine is dummy.engine
