"""The pictures of a report as inline SVG (bars with intervals, differences with intervals, and small multiples), and
that of an explanation as PNG.

In SVG text stays text (so that a page can be searched and a reader's font used); nothing is parsed as mathematics, and
the same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from genrec.report.numbers import Rows, found_metric, metric_name, ranked, short, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart by colour-blind readers, and on paper.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_KIND = {"adapter": "#0072b2", "baseline": "#9a9a9a", "against": "#e69f00"}
KIND_WORDS = {"adapter": "adapter", "baseline": "baseline", "against": "list brought"}
_BETTER, _WORSE, _EITHER = "#0072b2", "#d55e00", "#7f7f7f"

SHOWN = len(COLOURS)  # Recommenders in the picture of segments; more cannot be told apart.
SEGMENTS_SHOWN = 13  # Segments of one kind in it.
EVENTS_SHOWN = 20  # Events in the picture of an explanation, those that change the score most.
_HALF = 5  # Segments that find room in half a line.


def _settings(picture: str) -> AbstractContextManager[None]:
    """Settings of matplotlib that exist as global state alone; what stood before stands again after the picture.

    Ids in an SVG are hashes of what they stand for; the name of the picture keeps those of two pictures apart.
    """
    import matplotlib

    return matplotlib.rc_context(
        {"svg.hashsalt": picture, "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.0}
    )


def _svg(figure: Figure, description: str) -> str:
    """A figure as an ``<svg>`` element that can stand in a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    target = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # Names in other scripts are measured by a stand-in; the reader's browser has the glyphs.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
        figure.savefig(target, format="svg", metadata=nothing)
    text = target.getvalue()
    text = text[text.index("<svg") :]
    # Groups are numbered from 1 in every picture, and an id may stand in a page once.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # The size in the head is in points; the page's style gives the width.
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1).strip()


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)


def _label(name: str, width: int = 30) -> str:
    """A name that may be long, for an axis or a legend: one line of at most ``width`` characters, head and tail.

    matplotlib leaves names that begin with an underscore out of legends, so a no-break space goes before it.
    """
    line = " ".join(name.split())
    line = line if len(line) <= width else f"{line[: width // 2]}…{line[-(width - width // 2 - 1) :]}"
    return "\N{NO-BREAK SPACE}" + line if line.startswith("_") else line


def _bars(rows: Rows, kinds: Mapping[str, str], k: int) -> Figure:
    from matplotlib.figure import Figure

    names = ranked(rows, f"recall@{k}")[::-1]  # The lowest place of the picture is the first.
    figure = Figure(figsize=(9, 0.9 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric in zip(axes, (f"recall@{k}", f"ndcg@{k}"), strict=True):
        found = [(place, rows[name][metric]) for place, name in enumerate(names) if metric in rows[name]]
        top = max((value.get("high", value["mean"]) for _, value in found), default=0.0) or 1.0
        colours = [_KIND[kinds[names[place]]] for place, _ in found]
        axis.barh([place for place, _ in found], [value["mean"] for _, value in found], color=colours, height=0.62)
        for place, value in found:
            low, high = value.get("low", value["mean"]), value.get("high", value["mean"])
            axis.plot([low, high], [place, place], color="#222222", linewidth=1.2)
            axis.text(high + 0.02 * top, place, short(value["mean"]), va="center", ha="left", fontsize=8.5)
        axis.set(xlim=(0, 1.17 * top), ylim=(-0.6, len(names) - 0.4), title=metric_name(metric))
        axis.set_yticks(range(len(names)), [_label(name) for name in names])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#e5e5e5")
        axis.locator_params(axis="x", nbins=5)
        _plain(axis)
    return figure


def bars(rows: Rows, kinds: Mapping[str, str], k: int) -> str:
    """recall@k and NDCG@k of every recommender, best first, with intervals, coloured by kind."""
    with _settings("bars"):
        return _svg(_bars(rows, kinds, k), f"Bars with 95% intervals: recall@{k} and NDCG@{k} of each recommender")


def _forest(tests: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys((test["a"], test["b"]) for test in tests))
    found = {(test["metric"], test["a"], test["b"]): test for test in tests}
    firsts = list(dict.fromkeys(a for a, _ in pairs))
    means = {pair: found[metrics[0], *pair]["difference"] for pair in pairs if (metrics[0], *pair) in found}
    pairs.sort(key=lambda pair: (firsts.index(pair[0]), means.get(pair, 0.0)))
    # Several firsts have a line each that names them, above their pairs; place 0 is the lowest.
    lines: list[tuple[str, str | None]] = []
    for first in firsts:
        lines += [(first, None)] if len(firsts) > 1 else []
        lines += [pair for pair in pairs if pair[0] == first]
    lines.reverse()
    figure = Figure(figsize=(9, 1.25 + 0.28 * len(lines)), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        axis.axvline(0, color="#444444", linewidth=1)
        for place, pair in enumerate(lines):
            test = found.get((metric, *pair))
            if test is None:
                continue
            sure = significant(test)
            colour = (_BETTER if test["difference"] > 0 else _WORSE) if sure else _EITHER
            axis.plot([test["low"], test["high"]], [place, place], color=colour, linewidth=1.8)
            axis.plot([test["difference"]], [place], "o", color=colour, markersize=5, mfc=colour if sure else "white")
        for place, (_, other) in enumerate(lines[:-1]):
            if other is None:
                axis.axhline(place + 0.5, color="#cccccc", linewidth=0.8)
        axis.set(ylim=(-0.7, len(lines) - 0.3), title=f"difference of {metric_name(metric)}")
        axis.set_xlabel(f"{_label(firsts[0])} minus the other" if len(firsts) == 1 else "the first minus the other")
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#e5e5e5")
        axis.locator_params(axis="x", nbins=5)
        _plain(axis)
    # The panels share this axis, and its labels stand left of the first.
    axes[0].set_yticks(range(len(lines)), [f"{_label(a)} minus" if b is None else _label(b) for a, b in lines])
    for tick, (_, other) in zip(axes[0].get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if other is None else "normal")
    return figure


def forest(tests: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The paired differences with their intervals, one panel a metric; filled and coloured where significant."""
    shown = [test for test in tests if test["metric"] in metrics]
    with _settings("forest"):
        return _svg(_forest(shown, metrics), "Paired differences with 95% intervals; right of zero is better")


def _multiples(segments: Mapping[str, Mapping[str, Any]], names: Sequence[str], k: int) -> Figure:
    from matplotlib.figure import Figure

    panels = {}
    for title, parts in segments.items():
        kept = {part: found for part, found in parts.items() if found["cases"]}
        largest = sorted(kept, key=lambda part: -kept[part]["cases"])[:SEGMENTS_SHOWN]
        panels[title] = {part: found for part, found in kept.items() if part in largest}
    # A panel of few segments takes half a line, and stands beside the next one if that is as small.
    places: list[tuple[int, slice]] = []
    line = half = 0
    for parts in panels.values():
        if len(parts) > _HALF:
            line, half = line + half, 0
            places.append((line, slice(0, 2)))
            line += 1
        else:
            places.append((line, slice(half, half + 1)))
            line, half = (line + 1, 0) if half else (line, 1)
    lines = line + half
    figure = Figure(figsize=(9, 0.6 + 2.7 * lines), layout="constrained")
    grid = figure.add_gridspec(lines, 2)
    axes = [figure.add_subplot(grid[place]) for place in places]
    step = 0.7 / max(len(names), 2)
    drawn = {}
    for axis, (title, parts) in zip(axes, panels.items(), strict=True):
        for turn, name in enumerate(names):
            xs: list[float] = []
            values: list[Mapping[str, float]] = []
            for at, found in enumerate(parts.values()):
                metric = found_metric(found["rows"].get(name, {}), "recall", k)
                if metric is not None:
                    xs.append(at + step * (turn - (len(names) - 1) / 2))
                    values.append(found["rows"][name][metric])
            for x, value in zip(xs, values, strict=True):
                if "low" in value:
                    axis.plot([x, x], [value["low"], value["high"]], color=COLOURS[turn], linewidth=1.6)
            means = [value["mean"] for value in values]
            drawn[name] = axis.plot(xs, means, "o", color=COLOURS[turn], markersize=4.5)[0]
        width = max(9, (60 if len(parts) <= _HALF else 120) // len(parts) * 2 // 3)
        ticks = [
            f"{textwrap.fill(_label(part, 3 * width), width)}\n{found['share']:.0%}" for part, found in parts.items()
        ]
        axis.set_xticks(range(len(parts)), ticks, fontsize=9 if len(parts) <= 8 else 8)
        axis.set(title=title, xlim=(-0.6, len(parts) - 0.4), ylim=(0, None), ylabel=f"recall@{k}")
        for at in range(1, len(parts)):
            axis.axvline(at - 0.5, color="#e5e5e5", linewidth=0.8)
        axis.tick_params(axis="x", length=0)
        axis.grid(axis="y", color="#e5e5e5")
        axis.locator_params(axis="y", nbins=5)
        _plain(axis)
    handles, labels = list(drawn.values()), [_label(name) for name in drawn]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(drawn), 3), frameon=False)
    return figure


def multiples(segments: Mapping[str, Mapping[str, Any]], names: Sequence[str], k: int) -> str:
    """recall@k of up to ``SHOWN`` recommenders in every segment, one panel a kind of segment, with intervals."""
    with _settings("multiples"):
        return _svg(_multiples(segments, names[:SHOWN], k), f"recall@{k} with 95% intervals by segment")


def _explanation(
    events: Sequence[tuple[str, float]], steps: Sequence[tuple[str, float, float | None, bool]], title: str
) -> Figure:
    from matplotlib.figure import Figure

    most = sorted(range(len(events)), key=lambda place: -abs(events[place][1]))[:EVENTS_SHOWN]
    shown = [events[place] for place in sorted(most)]
    figure = Figure(figsize=(9, 1.6 + 0.25 * max(len(shown), 5)), layout="constrained")
    # One token makes no search to draw, but one score, which the title tells.
    left, *rest = figure.subplots(1, 2 if len(steps) > 1 else 1, width_ratios=(3, 2)[: len(steps)], squeeze=False)[0]
    figure.suptitle(_label(title, 90), fontsize=10)
    colours = [_BETTER if change < 0 else _WORSE for _, change in shown]
    left.barh(range(len(shown)), [change for _, change in shown], color=colours, height=0.62)
    left.set_yticks(range(len(shown)), [_label(name, 40) for name, _ in shown])
    left.set(title="left out, the score changes by", xlabel="left of zero, the event speaks for the item")
    left.set_ylim(max(len(shown), 1) - 0.4, -0.6)  # The oldest event is above.
    left.tick_params(axis="y", length=0)
    if shown:
        left.axvline(0, color="#444444", linewidth=1)
    else:
        left.set_xticks([])
        left.text(0.5, 0.5, "no event was read", transform=left.transAxes, ha="center", va="center")
    for right in rest:
        _search(right, steps)
    left.grid(axis="x", color="#e5e5e5")
    for axis in (left, *rest):
        _plain(axis)
    return figure


def _search(right: Axes, steps: Sequence[tuple[str, float, float | None, bool]]) -> None:
    levels = range(1, len(steps) + 1)
    right.plot(levels, [score for _, score, _, _ in steps], color="#9a9a9a", linewidth=1)
    for name, colour, wanted in (("kept", _BETTER, True), ("dropped", _WORSE, False)):
        found = [(level, step[1]) for level, step in zip(levels, steps, strict=True) if step[3] is wanted]
        if found:
            right.plot(*zip(*found, strict=True), "o", color=colour, mfc=colour if wanted else "white", label=name)
    bars = [(level, step[2]) for level, step in zip(levels, steps, strict=True) if step[2] is not None]
    if bars:
        right.plot(*zip(*bars, strict=True), "_", color="#222222", markersize=14, label="last beam")
    right.set(title="score, token by token", xlim=(0.5, len(steps) + 0.5))
    right.set_xticks(levels, [_label(token, 12) for token, *_ in steps], fontsize=8 if len(steps) <= 4 else 6)
    right.legend(frameon=False)
    right.grid(axis="y", color="#e5e5e5")


def explanation(
    events: Sequence[tuple[str, float]], steps: Sequence[tuple[str, float, float | None, bool]], title: str
) -> bytes:
    """Why an item is recommended, or is not, as a PNG: events that count, and, of several tokens, the search.

    Args:
        events: Of the history, oldest first: name, and the change of the item's score where the event is left out.
            The ``EVENTS_SHOWN`` that change it most are drawn.
        steps: Of the item's identifier: token, score so far, score of the last beam, whether it was kept.
        title: Above both.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    target = io.BytesIO()
    with _settings("explanation"), warnings.catch_warnings():
        # A script that matplotlib's own font lacks is drawn as boxes; ids and numbers stay readable.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
        figure = _explanation(events, steps, title)
        FigureCanvasAgg(figure)
        figure.savefig(target, format="png", dpi=110, metadata={"Software": None})
    return target.getvalue()
