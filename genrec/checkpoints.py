"""Checkpoints of a training run: everything that it needs to go on, in safetensors and JSON.

They lie in ``runs/NAME/step-00000120/``. A folder appears whole or not at all, so whatever stops a process, the newest
folder is complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from genrec import files
from genrec.errors import ConfigError, StorageError

FORMAT = 1  # Of what is written here; another one is refused.
KEPT = 2
_FOLDER = re.compile(r"step-(\d{8})")
_REMAINS = re.compile(r"\.step-\d{8}\.\d+\.(tmp|old)")


@dataclass(frozen=True)
class Checkpoint:
    """A training run between two steps.

    Attributes:
        step, total: Steps done, and steps of the whole run.
        fingerprint: What decides the run's outcome, as nested tables of plain values; a run of another one refuses it.
        weights: Trained parameters by name.
        best: Those of the best validation; empty where ``weights`` are.
        optimizer: Per parameter name what the optimizer keeps of it: tensors and plain values.
        scheduler, scaler: Their ``state_dict``, plain values; ``scaler`` is empty but under fp16.
        random: Per process the states of its generators, as ``random_state`` gives them.
        watch: Curve, losses and patience, plain values.
    """

    step: int
    total: int
    fingerprint: dict[str, Any]
    weights: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    random: list[dict[str, Any]]
    watch: dict[str, Any]


def _split(table: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Nested values as tensors by ``outer::inner``, and the plain rest."""
    tensors, plain = {}, {}
    for outer, inner in table.items():
        plain[outer] = {key: value for key, value in inner.items() if not isinstance(value, torch.Tensor)}
        for key, value in inner.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{outer}::{key}"] = value.detach().cpu().clone().contiguous()  # Optimizers share some.
    return tensors, plain


def _join(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    table = {outer: dict(inner) for outer, inner in plain.items()}
    for name, value in tensors.items():
        outer, _, key = name.rpartition("::")
        table[outer][key] = value
    return table


def _folders(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in run.iterdir() if _FOLDER.fullmatch(path.name)) if run.is_dir() else []


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run's folder, or None."""
    return next(reversed(_folders(run)), None)


def save(run: Path, made: Checkpoint) -> None:
    """Write a checkpoint into a run's folder, whole or not at all, and keep the newest two.

    Raises:
        StorageError: The disk refused; the checkpoints before are untouched.
    """
    optimizer, optimizer_plain = _split(made.optimizer)
    states, states_plain = _split({str(process): state for process, state in enumerate(made.random)})
    state = {
        "format_version": FORMAT,
        **{key: getattr(made, key) for key in ("step", "total", "fingerprint", "scheduler", "scaler", "watch")},
        "optimizer": optimizer_plain,
        "random": states_plain,
    }
    with files.new_folder(run / f"step-{made.step:08d}", overwrite=True) as folder:
        for name, tensors in (
            ("weights", made.weights), ("best", made.best), ("optimizer", optimizer), ("random", states),
        ):  # fmt: skip
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in _folders(run)[:-KEPT]:
        _remove(old)


def load(path: Path) -> Checkpoint:
    """A checkpoint's folder, read.

    Raises:
        StorageError: It is damaged, or of another format.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        found = state.pop("format_version", None)
        if found != FORMAT:
            raise StorageError(
                f"{path} is a checkpoint of format {found}, and this genrec goes on from format {FORMAT}. Go on with "
                f"the genrec that wrote it, or begin again: pass --overwrite without --resume, or remove {path.parent}."
            )
        tensors = {name: load_file(path / f"{name}.safetensors") for name in ("weights", "best", "optimizer", "random")}
        state["optimizer"] = _join(tensors["optimizer"], state["optimizer"])
        states = _join(tensors["random"], state["random"])
        state["random"] = [states[str(process)] for process in range(len(states))]
        return Checkpoint(weights=tensors["weights"], best=tensors["best"], **state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise StorageError(
            f"{path}: this checkpoint is damaged: {error}. Remove it, and pass --resume again."
        ) from error


def _remove(path: Path) -> None:
    """Remove a checkpoint, so that a part of it never stands under its name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def tidy(run: Path) -> None:
    """Remove what killed processes left half-written or half-removed in a run's folder."""
    for path in list(run.iterdir()) if run.is_dir() else ():
        if _REMAINS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def remove(run: Path) -> None:
    """Remove the checkpoints of a run's folder, oldest first, and the folder where nothing else is in it."""
    for path in _folders(run):
        _remove(path)
    tidy(run)
    if run.is_dir() and not any(run.iterdir()):
        run.rmdir()


def check(
    path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any], free: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Refuse to go on with another run than the one that was interrupted.

    Args:
        path: The checkpoint.
        there, wanted: Its fingerprint, and that of the run that would go on.
        free: Keys, and tables of them, that may differ.

    Returns:
        The old and the new value of each of those that do.

    Raises:
        ConfigError: The fingerprints differ; names the first key that does, and both values.
    """
    old, new = _flat(there), _flat(wanted)
    changed = {}
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            if any(key == one or key.startswith(f"{one}.") for one in free):
                changed[key] = [old.get(key), new.get(key)]
                continue
            raise ConfigError(
                f"--resume: {path} was made with {key} = {_shown(old.get(key))}, and this run has "
                f"{_shown(new.get(key))}. Put it back to go on, or pass --overwrite without --resume to begin again."
            )
    return changed


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(table)).items():  # As it comes back from a file: lists, no tuples.
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shown(value: Any) -> str:
    return json.dumps(value[:16] if isinstance(value, str) and len(value) == 64 else value)  # Hashes are long.


def random_state() -> dict[str, Any]:
    """The states of this process's generators: torch (CPU and, where there is one, the GPU), NumPy and Python."""
    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, left = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [int(place), int(has_gauss), float(gauss)],
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": [version, left],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators where ``random_state`` found them."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), *state["numpy_rest"]))
    version, left = state["python_rest"]
    random.setstate((version, tuple(state["python"].tolist()), left))


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies, on the CPU, of the parameters that training changes, by name."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def set_trained(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put values that ``trained`` copied back into the model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def optimizer_state(optimizer: Any, model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Per parameter name what the optimizer keeps of it: tensors and plain values, step counters too."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def set_optimizer_state(optimizer: Any, model: torch.nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Give an optimizer of the same parameters back what ``optimizer_state`` took.

    Not by its ``load_state_dict``, which would round what is float32 to the type of the parameter.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")  # Else PyTorch counts steps on the CPU.
        for parameter in group["params"]:
            if names[id(parameter)] in state:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device)
                    if isinstance(value, torch.Tensor) and (key != "step" or on_device)
                    else value
                    for key, value in state[names[id(parameter)]].items()
                }


def set_schedule(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Put a schedule and its optimizer's rates where the ``state_dict`` of another was, at the rates of this one.

    Args:
        scheduler: PyTorch's LambdaLR, as all of transformers' that a recipe may name are; fresh.
        state: Of one with the same or with other rates, groups or function.
    """
    step = state["last_epoch"]
    rates = [rate * function(step) for rate, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(
        {"last_epoch": step, "_step_count": state["_step_count"], "_last_lr": rates, "lr_lambdas": []}
    )
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
