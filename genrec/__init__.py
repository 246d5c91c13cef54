"""genrec: an interaction log and a catalogue in, a generative recommender out.

The names below are the public API; each is loaded when it is first used, so that ``import genrec`` stays light.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from genrec.errors import GenrecError

if TYPE_CHECKING:
    from genrec.batch import run_batch
    from genrec.config import Recipe, Spec, Task
    from genrec.dataset import Dataset
    from genrec.evaluation import evaluate
    from genrec.prompts import Prompt
    from genrec.recommendations import Recommendation, Recommendations
    from genrec.recommender import Recommender
    from genrec.training import train

# PEFT imports bitsandbytes where that is installed, which on some processors says at every start that it would rather
# fetch other code from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = [
    "Dataset",
    "GenrecError",
    "Prompt",
    "Recipe",
    "Recommendation",
    "Recommendations",
    "Recommender",
    "Spec",
    "Task",
    "__version__",
    "evaluate",
    "run_batch",
    "train",
]

_HOMES = {
    "Dataset": "dataset",
    "Prompt": "prompts",
    "Recipe": "config",
    "Recommendation": "recommendations",
    "Recommendations": "recommendations",
    "Recommender": "recommender",
    "Spec": "config",
    "Task": "config",
    "evaluate": "evaluation",
    "run_batch": "batch",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'genrec' has no attribute {name!r}")
    return getattr(import_module(f"genrec.{_HOMES[name]}"), name)
