from __future__ import annotations

from typing import Any

from genrec.learning_curve import picture


def test_the_picture_is_a_png_and_the_same_each_time() -> None:
    curve = [{"step": float(step), "ndcg@10": 0.1 * step, "recall@10": 0.2 * step} for step in range(3)]

    def losses(second: float, **tasks: float) -> list[dict[str, Any]]:
        return [{"step": step, "loss": loss, "tasks": tasks} for step, loss in ((1, 2.0), (2, second))]

    drawn = picture(curve, losses(1.5, a=1.0))
    assert drawn.startswith(b"\x89PNG")
    assert drawn == picture(curve, losses(1.5, a=1.0)) == picture(curve, losses(1.5, other=2.0))  # One task is all.
    assert drawn != picture(curve, losses(1.0, a=1.0))
    assert picture(curve, losses(1.5, a=1.0, b=2.0)) != picture(curve, losses(1.5, a=1.0, b=3.0)) != drawn
