"""What the tables ``[training]`` and ``[lora]`` of a recipe may say: TRL's and PEFT's own names, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from genrec.errors import ConfigError, suggestion

_INFINITY = math.inf
TRAINING_KEYS: dict[str, tuple[Any, ...]] = {
    # Keys of SFTConfig that a recipe may set: a type and its range (both ends included), or the values that work here.
    "num_train_epochs": (int, 1, _INFINITY),
    "max_steps": (int, -1, _INFINITY),
    "per_device_train_batch_size": (int, 1, _INFINITY),
    "gradient_accumulation_steps": (int, 1, _INFINITY),
    "learning_rate": (float, 0, _INFINITY),
    "weight_decay": (float, 0, _INFINITY),
    "warmup_steps": (float, 0, _INFINITY),
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial",
        "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
    ),
    "lr_scheduler_kwargs": (dict,),
    "optim": ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    "adam_beta1": (float, 0, 0.999999),
    "adam_beta2": (float, 0, 0.999999),
    "adam_epsilon": (float, 0, 1),
    "max_grad_norm": (float, 0, _INFINITY),
    "label_smoothing_factor": (float, 0, 1),
    "logging_steps": (int, 1, _INFINITY),
    "save_steps": (int, 1, _INFINITY),
    "bf16": (bool,),
    "fp16": (bool,),
    "tf32": (bool,),
    "gradient_checkpointing": (bool,),
    "use_cpu": (bool,),
    "ddp_find_unused_parameters": (bool,),
    "ddp_timeout": (int, 1, _INFINITY),
}  # fmt: skip
_TRAINING_ELSEWHERE = {  # What a recipe says in another place.
    "max_length": "write max_length at the top level of the recipe",
    "seed": "write seed at the top level of the recipe",
    "output_dir": "the adapter's folder follows from the recipe's name",
    "model_init_kwargs": "write dtype at the top level of the recipe",
    "eval_strategy": "see [validation]",
    "eval_steps": "see [validation]",
    "average_tokens_across_devices": "a step's loss is always the mean over the tokens of all processes",
    "save_strategy": "checkpoints are written at every validation and, with save_steps, in between",
}
# What may differ when an interrupted run goes on: how fast the rest of it learns.
PACE = ("learning_rate", "warmup_steps", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs")
LORA_ELSEWHERE = {
    "trainable_token_indices": "the identifier rows are trained",
    "bias": 'an adapter holds no biases; train them with tuning = "full"',
    "modules_to_save": 'an adapter holds no whole modules; train them with tuning = "full"',
}
TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 10,
    "logging_steps": 20,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup_steps": 0.05,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": False,
    "bf16": False,
    "ddp_find_unused_parameters": False,  # A dense model uses all; looking for them costs a pass over the graph a step.
}
LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def check_keys(given: Mapping[str, Any], known: set[str], elsewhere: Mapping[str, str], table: str) -> None:
    for key in given:
        if key in elsewhere:
            raise ConfigError(f"recipe: {table}.{key} is not yours to set: {elsewhere[key]}.")
        if key not in known:
            raise ConfigError(f"recipe: unknown key {table}.{key}. {suggestion(key, known)}")


def training_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The table ``[training]`` over the defaults, with every key and value checked."""
    check_keys(given, set(TRAINING_KEYS), _TRAINING_ELSEWHERE, "training")
    for key, value in given.items():
        kind, *limits = TRAINING_KEYS[key]
        if isinstance(kind, str):
            if value not in TRAINING_KEYS[key]:
                raise ConfigError(f"recipe: training.{key} is {value!r}. {suggestion(str(value), TRAINING_KEYS[key])}")
            continue
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or type(value) is not bool)
        if not fits or (limits and not limits[0] <= value <= limits[1]):
            span = f" from {limits[0]} to {limits[1]}" if limits and limits[1] < _INFINITY else ""
            span = f" of at least {limits[0]}" if limits and not span else span
            raise ConfigError(f"recipe: training.{key} is {value!r}. It takes a value of type {kind.__name__}{span}.")
    return {**TRAINING_DEFAULTS, **given}
