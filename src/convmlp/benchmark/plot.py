"""Published accuracy against measured speed, a panel for each batch size."""

from collections.abc import Sequence
from itertools import product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from ..common.figures import new_figure, plain
from .comparison import Row
from .variants import BASE_LINE, PUBLISHED_SIZE, is_ours

OURS, OTHERS = "#1b4f72", "#777777"
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

# Where a label may stand: how many points away, in which direction, and beside which end of the line
DISTANCES = (7, 14, 22, 32, 44, 58)
BEST, PLAIN = -1, 0
PLACES = (
    *((1, 0, BEST), (-1, 0, PLAIN), (0, 1, BEST), (0, -1, BEST), (1, 1, BEST), (1, -1, BEST), (-1, 1, BEST)),
    *((-1, -1, BEST), (0, 1, PLAIN), (0, -1, PLAIN)),
)
LEADER_FROM = 14  # points
POINT = 4.5  # points, half the side of what a marker covers


def speed_figure(rows: Sequence[Row], title: str) -> Figure:
    """A line for each model whose accuracy is published, from plain (open) to its fastest mode (filled)."""
    rows = [row for row in rows if row["top1"] is not None and "images_per_s" in row]
    batch_sizes = sorted({row["batch_size"] for row in rows})
    figure = new_figure(7 * max(1, len(batch_sizes)), 5.6)
    figure.suptitle(f"{plain(title)}\nopen: eager float32; filled: the fastest mode", fontsize=9)
    if not rows:
        return figure
    panels = figure.subplots(1, len(batch_sizes), squeeze=False, sharey=True)[0]
    labels = []
    for panel, batch_size in zip(panels, batch_sizes, strict=True):
        own = [row for row in rows if row["batch_size"] == batch_size]
        labels.append(_draw(panel, own))
        pixels = " or ".join(str(side) for side in sorted({row["input_size"][-1] for row in own}))
        panel.set_xlabel(f"images/s measured: {own[0]['task']}, batch {batch_size}, {pixels} px")
    panels[0].set_ylabel(f"ImageNet-1k top-1, %, as published for {PUBLISHED_SIZE} px")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles where the points are
    for panel, of_panel in zip(panels, labels, strict=True):
        _place(panel, of_panel, canvas.get_renderer())
    return figure


Label = tuple[str, str, list[tuple[float, float]]]  # text, colour, and the ends of the line
Place = tuple[tuple[float, float], float, tuple[int, int]]  # a point, and how far from it in which direction


def _draw(panel: Axes, rows: Sequence[Row]) -> list[Label]:
    labels = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        best = max(own, key=lambda row: row["images_per_s"])
        plain_rows = [row for row in own if (row["mode"], row["dtype"]) == BASE_LINE]
        points = [(row["images_per_s"], row["top1"]) for row in (*plain_rows, best)]
        colour = OURS if is_ours(model) else OTHERS
        panel.plot(*zip(*points, strict=True), "-", color=colour, linewidth=1.2, zorder=2)
        for point, fill in zip(points, ("white", colour) if plain_rows else (colour,), strict=True):
            panel.plot(*point, "o", markersize=6, markerfacecolor=fill, markeredgecolor=colour, zorder=3)
        how = f" ({best['mode']} {SHORT[best['dtype']]})" if plain_rows != [best] else ""
        labels.append((model + how, colour, points))
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.16, y=0.12)
    panel.grid(alpha=0.3)
    return labels


def _place(panel: Axes, labels: Sequence[Label], renderer: RendererAgg) -> None:
    """Write each label where it covers least: no point, no line, no other label."""
    scale = panel.figure.dpi / 72
    covered: list[Bbox] = []
    for _, _, points in labels:
        line = panel.transData.transform(points)
        pieces = [line[0] + (line[-1] - line[0]) * i / 20 for i in range(21)] if len(points) > 1 else [line[0]]
        covered += [_around(piece, scale) for piece in pieces] + 3 * [_around(point, POINT * scale) for point in line]
    for text, colour, points in sorted(labels, key=lambda label: label[1] != OURS):
        choices: list[tuple[int, int, Place, Bbox]] = []
        for distance, (x, y, end) in product(DISTANCES, PLACES):
            annotation = _annotate(panel, text, colour, points[end], distance, (x, y))
            annotation.update_positions(renderer)
            box = Text.get_window_extent(annotation, renderer)  # without the leader
            inside = panel.bbox.x0 < box.x0 and box.x1 < panel.bbox.x1
            inside &= panel.bbox.y0 < box.y0 and box.y1 < panel.bbox.y1
            overlaps = box.count_overlaps(covered) + (0 if inside else 100)
            annotation.remove()
            choices.append((overlaps, len(choices), (points[end], distance, (x, y)), box))
        _, _, place, box = min(choices, key=lambda choice: choice[:2])
        _annotate(panel, text, colour, *place)
        covered.append(box)


def _around(point: Sequence[float], reach: float) -> Bbox:
    x, y = point
    return Bbox([[x - reach, y - reach], [x + reach, y + reach]])


def _annotate(
    panel: Axes, text: str, colour: str, point: tuple[float, float], distance: float, direction: tuple[int, int]
) -> Annotation:
    x, y = direction
    leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3}
    annotation = panel.annotate(
        plain(text),
        point,
        xytext=(distance * x, distance * y),
        textcoords="offset points",
        ha={-1: "right", 0: "center", 1: "left"}[x],
        va={-1: "top", 0: "center", 1: "bottom"}[y],
        fontsize=8,
        color=colour,
        weight="bold" if colour == OURS else "normal",
        arrowprops=leader if distance > LEADER_FROM else None,
    )
    annotation.set_in_layout(False)
    return annotation
