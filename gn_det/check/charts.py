"""The histograms of the report as inline SVG: no library, no script, sharp at any size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from gn_det.check.sizes import SizeTable
from gn_det.visualize.html import escape, svg

_COLORS = ("#1f77dc", "#ff7f0e")
_ROW, _LABEL, _WIDTH = 20, 190, 760


def class_chart(rows: Sequence[tuple[str, list[int], list[int]]], sets: Sequence[str]) -> str:
    """Horizontal bars, one group a class; each set is drawn on its own scale, in percent of its objects."""
    totals = [max(sum(objects[k] for _, objects, _ in rows), 1) for k in range(len(sets))]
    shares = [[objects[k] / totals[k] for k in range(len(sets))] for _, objects, _ in rows]
    most = max((max(share) for share in shares), default=0) or 1.0
    step = 7 * len(sets) + 9 if len(sets) > 1 else _ROW
    room = _WIDTH - _LABEL - 150
    parts = []
    for row, ((name, objects, images), share) in enumerate(zip(rows, shares)):
        top = row * step
        short = name if len(name) <= 26 else name[:25] + "…"
        parts.append(
            f'<text x="{_LABEL - 8}" y="{top + step / 2}" text-anchor="end" dominant-baseline="central">'
            f"{escape(short)}</text>"
        )
        height = (step - 6) / len(sets)
        for k, part in enumerate(share):
            width = max(room * part / most, 1.5 if objects[k] else 0)
            title = f"{name}: {objects[k]} objects in {images[k]} images of {sets[k]} ({part:.1%})"
            parts.append(
                f'<rect x="{_LABEL}" y="{top + 3 + k * height:.1f}" width="{width:.1f}" height="{height:.1f}" '
                f'fill="{_COLORS[k % 2]}" rx="1.5"><title>{escape(title)}</title></rect>'
            )
        numbers = " / ".join(str(n) for n in objects)
        end = _LABEL + max(room * max(share) / most, 1.5) + 8
        parts.append(
            f'<text x="{end:.1f}" y="{top + step / 2}" dominant-baseline="central" class="dim">{numbers}</text>'
        )
    return svg(parts, _WIDTH, len(rows) * step + 4)


def size_chart(sizes: SizeTable) -> str:
    """Vertical bars over log2 of the size, the anchors as marks below them."""
    left, bottom, high = 20, 210, 170
    slot = (_WIDTH - 2 * left) / len(sizes.counts)
    most = max(sizes.counts) or 1
    parts = []
    for i, (label, count) in enumerate(zip(sizes.labels(), sizes.counts)):
        x, height = left + i * slot, high * count / most
        parts.append(
            f'<rect x="{x + 4:.1f}" y="{bottom - height:.1f}" width="{slot - 8:.1f}" height="{height:.1f}" '
            f'fill="{_COLORS[0]}" rx="2"/>'
        )
        middle = x + slot / 2
        share = count / max(sizes.total, 1)
        if count:
            parts.append(_text(middle, bottom - height - 8, f"{share:.0%}" if share >= 0.01 else "&lt;1%"))
        parts.append(_text(middle, bottom + 15, escape(label), "dim"))
    parts.append(f'<line x1="{left}" y1="{bottom}" x2="{_WIDTH - left}" y2="{bottom}" stroke="#999"/>')
    for anchor in sizes.anchors:
        x = left + _position(anchor, sizes.edges) * slot
        parts.append(
            f'<path d="M{x:.1f} {bottom + 28} l-6 11 h12 z" fill="{_COLORS[1]}"><title>anchor {anchor:g}</title></path>'
        )
        parts.append(_text(x, bottom + 50, f"{anchor:g}", "anchor"))
    return svg(parts, _WIDTH, bottom + 60)


def _position(size: float, edges: Sequence[int]) -> float:
    """Place of a size in bars from the left; the edges are powers of two apart."""
    if size <= edges[0]:
        return size / edges[0]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        if size <= high:
            return i + 1 + (size - low) / (high - low)
    return len(edges) + 0.5


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" class="{kind}">{text}</text>'
