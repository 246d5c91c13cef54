"""The learning curve of a training run as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def picture(curve: Sequence[Mapping[str, float]], losses: Sequence[Mapping[str, Any]]) -> bytes:
    """The learning curve as a PNG: training loss, that of each task where there are several, and NDCG@10 and recall@10
    on validation cases, by step. ``curve`` and ``losses`` are as in ``learning_curve.json``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses], color="#555555", label="all")
    tasks = sorted({name for entry in losses for name in entry["tasks"]})
    for name in tasks if len(tasks) > 1 else ():
        told = [entry for entry in losses if name in entry["tasks"]]
        values = [entry["tasks"][name] for entry in told]
        left.plot([entry["step"] for entry in told], values, linewidth=0.7, label=name)
    if len(tasks) > 1:
        left.legend(frameon=False)
    left.set(title="training loss", xlabel="step", ylabel="cross-entropy per trained token")
    steps = [point["step"] for point in curve]
    right.plot(steps, [point["ndcg@10"] for point in curve], marker="o", markersize=3, label="NDCG@10")
    right.plot(steps, [point["recall@10"] for point in curve], marker="o", markersize=3, label="recall@10")
    best = max(curve, key=lambda point: point["ndcg@10"])
    right.axvline(best["step"], color="#999999", linestyle=":", label=f"kept (step {best['step']:.0f})")
    right.set(title="validation, full ranking", xlabel="step", ylim=(0, None))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110, metadata={"Software": None})
    return target.getvalue()
