"""Exports: what training made, in the forms that other programs load as they are.

``merged`` is one plain Hugging Face checkpoint. ``vllm`` is an *extended base* (the base with the identifier rows in a
longer vocabulary) and the pure LoRA beside it: see ``genrec.vllm_files``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from genrec import adapter as adapters
from genrec import base as bases
from genrec import files
from genrec.adapter import Adapter
from genrec.config import Dtype, Recipe, folder_name
from genrec.dataset import Dataset
from genrec.engines import Engine
from genrec.engines.local import LocalEngine
from genrec.engines.vllm import max_lora_rank
from genrec.errors import ConfigError, DataError, suggestion
from genrec.prompts import Prompt
from genrec.tokenization import Tokenization
from genrec.toml import from_table
from genrec.validation import ValidationSet
from genrec.vllm_files import (
    CONFIG,
    WEIGHTS,
    base_parts,
    check_files,
    check_vllm,
    is_whole,
    new_folder,
    refuse,
    write_base,
    write_beside,
    write_json,
    write_model,
)

# The figures of what is exported


def validation_set(adapter: Adapter, tokenization: Tokenization, data: str | Path | None = None) -> ValidationSet:
    """The validation cases that an adapter's training used. Arguments and errors as in ``validation_sets``."""
    return validation_sets(adapter, tokenization, [adapter.prompt], data)[0]


def validation_sets(
    adapter: Adapter, tokenization: Tokenization, prompts: Sequence[Prompt], data: str | Path | None = None
) -> list[ValidationSet]:
    """The same cases rendered with each of ``prompts``.

    Args:
        adapter, tokenization: The adapter, and its own tokenization.
        prompts: Sequence prompts.
        data: Its data set's folder, where that is not where the recipe said.

    Raises:
        DataError: The data set is not there, or is another one.
    """
    told = adapter.manifest["data"]
    folder = adapter.data_folder if data is None else Path(data)
    measure = "NDCG@10 is measured again on its validation cases. Pass --data FOLDER, or --no-measure."
    if not folder.is_dir():
        raise DataError(f"{folder}: the data set of {adapter.path} is not here, and {measure}")
    loaded = Dataset.load(folder)
    if loaded.hash != told["hash"] or loaded.item_ids != list(adapter.identifiers.item_ids):
        raise DataError(
            f"{folder} is not the data set that {adapter.path} was trained on: trained {told['hash']}, "
            f"found {loaded.hash}{' in another order' if loaded.hash == told['hash'] else ''}; {measure}"
        )
    recipe = from_table(Recipe, adapter.manifest["recipe"], str(adapter.path / "genrec.json"))
    split = loaded.split(recipe.split, ties=recipe.ties, seed=recipe.split_seed)
    split = split.without_validation(adapter.not_validated)
    return [
        ValidationSet.draw(recipe, split, tokenization, prompt, loaded.user_rows, exclude_seen=adapter.exclude_seen)
        for prompt in prompts
    ]


def measure(adapter: Adapter, validation: ValidationSet, engine: Engine) -> dict[str, float]:
    """NDCG@10 on validation cases: ``trained`` as training kept it, ``exported`` as ``engine`` has it, ``change``."""
    trained, exported = float(adapter.manifest["kept"]["ndcg@10"]), validation.evaluate(engine)["ndcg@10"]
    return {"trained": trained, "exported": exported, "change": exported - trained}


@bases.quiet()
def _load(model: Path, lora: Path | None = None) -> LocalEngine:
    """An engine with an export as it lies on the disk, loaded as anybody would."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", trust_remote_code=False, local_files_only=True, use_safetensors=True
    )
    if lora is not None:
        loaded = PeftModel.from_pretrained(loaded, lora, local_files_only=True).get_base_model()
    return LocalEngine(loaded.eval())


# The exports


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        model: The folder of the checkpoint: merged, or the extended base.
        lora: The folder of the LoRA beside an extended base.
        reused: Whether the extended base was there already.
        table: ``export.json``.
    """

    model: Path
    lora: Path | None
    reused: bool
    table: dict[str, Any]


def export(
    adapter: str | Path,
    out: str | Path,
    *,
    to: Literal["vllm", "merged"],
    name: str = "adapter",
    dtype: Dtype | None = None,
    data: str | Path | None = None,
    measured: bool | None = None,
    overwrite: bool = False,
) -> Export:
    """Write an adapter in a form that other programs load.

    Args:
        adapter: The folder that training wrote.
        out: ``merged``: the folder to write. ``vllm``: the folder to write two in, ``base-HASH`` and ``NAME``; an
            extended base that is there already and whole is used again. Of the product of a "full" recipe there is
            ``base-HASH`` alone.
        to: ``vllm`` or ``merged``.
        name: What the folder of the LoRA is called, so that several can share one extended base.
        dtype: Of the model's weights; unset: that of the recipe. LoRA matrices beside a base stay as trained.
        data: The data set, for measuring; unset: the one of the recipe.
        measured: Whether NDCG@10 on the validation cases is measured again, with what was written; unset: only where
            the adapter was trained on a quantised base.
        overwrite: Replace what is there.

    Raises:
        AdapterError: The adapter cannot be loaded, or vLLM could not load it right: all reasons are named.
        ConfigError: An unknown form or dtype, or a name that is none.
        DataError: The data set for measuring is not there, or is another one.
        StorageError: A folder exists, or the disk refused. Nothing is left half-written.
    """
    loaded, out = Adapter.load(adapter), Path(out)
    dtype = dtype or loaded.manifest["recipe"].get("dtype", "float32")
    for key, value, known in (("to", to, ("vllm", "merged")), ("dtype", dtype, ("float32", "bfloat16"))):
        if value not in known:
            raise ConfigError(f"export: {key} is {value!r}. {suggestion(str(value), known)}")
    if folder_name(name, "export").startswith("base-"):
        raise ConfigError(f"export: name is {name!r}. An extended base is called so; choose another name.")
    split_up = to == "vllm" and loaded.tuning != "full"
    if split_up:
        refuse(loaded.path, check_files(loaded.path)[0])
    tokenization = loaded.tokenization()
    validation = None
    if measured or (measured is None and loaded.tuning == "qlora"):
        validation = validation_set(loaded, tokenization, data)
    table: dict[str, Any] = {
        "to": to,
        "adapter": {"name": loaded.path.absolute().name, "hash": loaded.hash, "tuning": loaded.tuning},
        "base": {key: loaded.manifest["base"].get(key) for key in ("name", "revision", "hash")},
        "identifiers": loaded.identifiers.hash,
        "fitted_on": loaded.manifest["fitted_on"],
        "exclude_seen": loaded.exclude_seen,
        "prompts": list(loaded.prompts),
        "max_length": loaded.manifest["max_length"],
        "dtype": dtype,
        "ndcg@10": None,
        "versions": adapters.versions(),
    }
    if split_up:
        return _split_up(loaded, tokenization, out, name, table, validation, overwrite)
    path = out if to == "merged" else out / f"base-{files.text_hash(loaded.hash, dtype)[:16]}"
    with new_folder(path, overwrite) as folder:
        model = loaded.model(tokenization, dtype=getattr(torch, dtype), quantised=False)
        write_model(model, tokenization, folder)
        del model
        write_beside(loaded, folder)
        if validation is not None:
            table["ndcg@10"] = measure(loaded, validation, _load(folder))
        write_json(folder / "export.json", table)
    return Export(path, None, False, table)


def _split_up(
    adapter: Adapter,
    tokenization: Tokenization,
    out: Path,
    name: str,
    table: dict[str, Any],
    validation: ValidationSet | None,
    overwrite: bool,
) -> Export:
    """An extended base, unless it is there, and a pure LoRA."""
    dtype = table["dtype"]
    hash_ = base_parts(adapter, dtype)[0]
    path = out / f"base-{hash_[:16]}"
    reused = path.exists() and is_whole(path, hash_, overwrite)
    with new_folder(out / name, overwrite) as lora:
        config = json.loads((adapter.path / CONFIG).read_text(encoding="utf-8"))
        rank = config["r"]
        write_json(lora / CONFIG, {**config, "base_model_name_or_path": f"../{path.name}", "inference_mode": True})
        shutil.copyfile(adapter.path / WEIGHTS, lora / WEIGHTS)
        write_beside(adapter, lora)
        with nullcontext(path) if reused else new_folder(path, overwrite) as base:
            if not reused:
                write_base(adapter, tokenization, base, dtype)
            refuse(adapter.path, check_vllm(lora, base))
            if validation is not None:
                table["ndcg@10"] = measure(adapter, validation, _load(base, lora))
        table |= {"extended_base": path.name, "max_lora_rank": max_lora_rank(rank)}
        write_json(lora / "export.json", table)
    return Export(path, out / name, reused, table)
