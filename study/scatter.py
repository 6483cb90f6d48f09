"""A picture of caches: what a row takes in memory, what it costs, and what is found in it."""
import math
from html import escape
from pathlib import Path

WIDTH, HEIGHT, EDGE = 860, 520, 60
FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12"
     font-family="Helvetica, Arial, 'DejaVu Sans', sans-serif" fill="#26292e">
  <rect width="{width}" height="{height}" fill="#fbfaf6"/>
  <text x="{edge}" y="24">KL to full precision over MiB of a row with {tokens:,} tokens, both log;
    red: no key is found, green: as many as full precision finds</text>
{marks}
</svg>
"""


def scatter(file, rows, answers, tokens):
    """Draws a point for every row of bench.py quality that takes bytes and has a KL.

    answers  rows of `study.quality.answered`; tokens: of the length that the bytes are of
    """
    points = [row for row in rows if row["bytes"] and row["kl"] > 0]
    found = {row["cache"]: 0 for row in rows}
    for row in answers:
        found[row["cache"]] += sum(row["hits"])
    best = max(1, found[rows[0]["cache"]])
    sizes, losses = ([math.log(value(row)) for row in points]
                     for value in (lambda row: row["bytes"][1], lambda row: row["kl"]))
    marks = []
    for row, size, loss in zip(points, sizes, losses):
        x = place(size, sizes, EDGE, WIDTH - 3 * EDGE)
        y = place(loss, losses, HEIGHT - EDGE, EDGE)
        green = round(200 * min(1, found[row["cache"]] / best))
        color = f"rgb({200 - green},{green},40)" if answers else "#5b6068"
        label = escape(f"{row['cache']}: {row['bytes'][1] / 2**20:.1f} MiB, KL {row['kl']:.3f}")
        marks += [f'  <circle cx="{x:.0f}" cy="{y:.0f}" r="6" fill="{color}"/>',
                  f'  <text x="{x + 9:.0f}" y="{y + 4:.0f}">{label}</text>']
    frame = {"width": WIDTH, "height": HEIGHT, "edge": EDGE, "tokens": tokens}
    Path(file).write_text(FRAME.format(**frame, marks="\n".join(marks)), encoding="utf-8")


def place(value, values, first, last):
    """Where a value lies between first and last, the places of the smallest and the largest."""
    span = max(values) - min(values) or 1
    return first + (value - min(values)) / span * (last - first)
