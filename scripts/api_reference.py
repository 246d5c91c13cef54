"""docs/api.md from the docstrings of the public API: `make docs`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from griffe import GriffeLoader, Parser
from griffe2md import render_object_docs

ROOT = Path(__file__).resolve().parent.parent
# What the page holds, in the order of work; all errors follow.
OBJECTS = (
    "dataset.Dataset",
    "config.Recipe",
    "config.Task",
    "training.train",
    "prompts.Prompt",
    "recommender.Recommender",
    "recommendations.Recommendations",
    "recommendations.Recommendation",
    "memory.Memory",
    "explanations.Explanation",
    "explanations.Step",
    "explanations.Event",
    "rendering.render",
    "rendering.Rendered",
    "batch.run_batch",
    "config.Spec",
    "evaluation.evaluate",
)
HEAD = """# The Python API

Written by `make docs` from the docstrings; change those. [python-api.md](python-api.md) introduces it by example.
"""
CONFIG: dict[str, Any] = {
    "docstring_style": "google",
    "docstring_section_style": "list",
    "heading_level": 2,
    "filters": ["!^_"],
    "members_order": "source",
    "show_root_full_path": True,
    "show_object_full_path": False,
    "summary": False,
    "separate_signature": True,
    "show_signature_annotations": True,
    "show_if_no_docstring": False,
    "signature_crossrefs": False,
    "line_length": 10_000,  # Longer lines would be left to black, if that is installed; `_wrapped` breaks them.
}


def _wrapped(text: str) -> str:
    """The page with signatures that are longer than a line broken as ruff breaks them."""
    pattern = re.compile(r"(?<=^```python\n)\w+\(.{90,}(?=\n```$)", re.MULTILINE)
    code = "".join(f"def {signature}: pass\n" for signature in pattern.findall(text))
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100", "-"]
    made = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout
    broken = iter(re.findall(r"^def (.*?):\n    pass$", made, re.MULTILINE | re.DOTALL))
    return pattern.sub(lambda _: next(broken), text)


def page() -> str:
    """The whole page, read from the sources; nothing is imported."""
    loader = GriffeLoader(
        search_paths=[str(ROOT)],
        docstring_parser=Parser.google,
        docstring_options={"warn_unknown_params": False, "warn_missing_types": False},  # Several names on one line.
        allow_inspection=False,
    )
    loader.load("genrec")
    errors = [f"errors.{name}" for name in loader.modules_collection["genrec.errors"].classes]
    objects = (loader.modules_collection[f"genrec.{name}"] for name in (*OBJECTS, *errors))
    parts = [HEAD, *(render_object_docs(found, dict(CONFIG)) for found in objects)]
    text = "\n".join(parts)
    text = re.sub(r"\[([^\]\[]+)\]\(#[^\s)]+\)", r"\1", text)  # Links to headings that the page has not.
    text = re.sub(r"^(#+ `)genrec\.[a-z_]+\.", r"\1", text, flags=re.MULTILINE)
    text = _wrapped(text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
