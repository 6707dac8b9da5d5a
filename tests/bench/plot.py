"""The report's figures as horizontal bars on a logarithmic scale: plain SVG, written by hand."""

import math
from xml.sax.saxutils import escape

from tests.bench.figures import FIGURES, GroupKey, Row, Spread, summarise
from tests.bench.report import NOT_COMPARABLE, OURS, group_name

PANELS = [
    ("first", "Stall of the first save, over memcpy"),
    ("warm", "Stall of a warm save, over memcpy"),
    ("durable", "Time to durable, over the slower of raw write+fsync and SHA-256"),
    ("loop", "Training loop with one save, over the same loop without"),
]
WIDTH, LABEL_WIDTH, VALUE_WIDTH = 860, 250, 70
BAR, GAP, HEAD, FOOT = 16, 6, 46, 26
LOW = 0.5
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.t{font-weight:600;font-size:13px}.o{fill:#1f6feb}.p{fill:#9aa4b2}"
    ".g{stroke:#ccc}.w{stroke:#222;stroke-width:1.2}.one{stroke:#d1242f;stroke-dasharray:3 3}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.w{stroke:#ddd}.g{stroke:#444}}"
)


def main_group(groups: list[GroupKey]) -> GroupKey:
    """Pick the state that is drawn: 1 GB in large tensors, else the largest there is."""
    return (1 << 30, "large") if (1 << 30, "large") in groups else max(groups)


def _ticks(high: float) -> list[float]:
    ticks = [1.0]
    while ticks[-1] * 2 <= high:
        ticks.append(ticks[-1] * 2)
    return ticks


def _panel(top: int, title: str, bars: list[tuple[str, str, Spread]]) -> tuple[list[str], int]:
    """Draw one panel; returns its elements and its height."""
    high = max(2.0, *(found.high for _, _, found in bars)) * 1.1
    span = WIDTH - LABEL_WIDTH - VALUE_WIDTH

    def at(value: float) -> float:
        share = math.log(max(value, LOW) / LOW) / math.log(high / LOW)
        return round(LABEL_WIDTH + span * share, 1)

    bottom = top + HEAD + len(bars) * (BAR + GAP)
    drawn = [f'<text class="t" x="8" y="{top + 20}">{escape(title)}</text>']
    for tick in _ticks(high):
        kind = "one" if tick == 1 else "g"
        drawn.append(f'<line class="{kind}" x1="{at(tick)}" x2="{at(tick)}" y1="{top + HEAD - 6}" y2="{bottom}"/>')
        drawn.append(f'<text x="{at(tick)}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
    for number, (kind, label, found) in enumerate(bars):
        y = top + HEAD + number * (BAR + GAP)
        middle = y + BAR / 2
        drawn += [
            f'<text x="{LABEL_WIDTH - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{at(found.median) - LABEL_WIDTH:.1f}" height="{BAR}"/>',
            f'<line class="w" x1="{at(found.low)}" x2="{at(found.high)}" y1="{middle}" y2="{middle}"/>',
            f'<text x="{at(found.high) + 6}" y="{y + 12}">{found.median:.2f}</text>',
        ]
    return drawn, HEAD + len(bars) * (BAR + GAP) + FOOT


def render(rows: list[Row], titles: dict[str, str]) -> str:
    """Return the SVG; bars are sorted, ours stand out, thin lines show lowest to highest."""
    summaries = summarise(rows, FIGURES)
    group = main_group(list(summaries))
    drawn: list[str] = []
    top = 30
    for name, title in PANELS:
        found = [
            ("o" if peer in OURS else "p", titles[peer], spreads[name])
            for peer, spreads in summaries[group].items()
            if peer in titles and peer not in NOT_COMPARABLE
        ]
        bars = sorted(((k, t, s) for k, t, s in found if s is not None), key=lambda bar: bar[2].median)
        if bars:
            elements, height = _panel(top, title, bars)
            drawn += elements
            top += height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}">'
    caption = f'<text x="8" y="18">{escape(group_name(group))}; logarithmic scale, 1 is the machine\'s limit</text>'
    return "\n".join([head, f"<style>{STYLE}</style>", caption, *drawn, "</svg>"]) + "\n"
