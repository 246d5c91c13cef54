from __future__ import annotations

from genrec.learning_curve import picture


def test_the_picture_is_a_png_and_the_same_each_time() -> None:
    curve = [{"step": float(step), "ndcg@10": 0.1 * step, "recall@10": 0.2 * step} for step in range(3)]
    drawn = picture(curve, [(1, 2.0), (2, 1.5)])
    assert drawn.startswith(b"\x89PNG")
    assert drawn == picture(curve, [(1, 2.0), (2, 1.5)])
    assert drawn != picture(curve, [(1, 2.0), (2, 1.0)])
