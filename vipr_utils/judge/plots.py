"""Figures for the notebooks, each a Picture.

A figure has its title above, its caption below, and an alt text that carries its numbers.
"""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from matplotlib import cycler, rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vipr_utils.host.files import write_whole
from vipr_utils.judge.board import gain

# Okabe and Ito's colours, told apart by colour-blind readers: https://jfly.uni-koeln.de/color/
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
SKY = "#56B4E9"
GREY = "#8A8A8A"
STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 88,
    "font.size": 8.5,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, "#CC79A7", SKY, "#F0E442", GREY]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
}
styled = rc_context(STYLE)  # decorates every function that draws


@dataclass(frozen=True)
class Picture:
    """A PNG with its alt text, which is its text/plain: a cell's last expression to look at."""

    png: bytes
    alt: str

    def _repr_mimebundle_(self, include=None, exclude=None):
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}

    def save(self, path: Path) -> Picture:
        """Write the PNG whole and return the picture, so that a cell can end with it."""
        write_whole(path, self.png)
        return self


def _picture(figure: Figure, title: str, caption: str, alt: str) -> Picture:
    """Title above, caption below; a PNG of 256 colours, whose bytes repeat.

    Photos in full colour would take four times the room on a page.
    """
    width = max(figure.get_figwidth(), 4.5)  # inches
    title, caption = textwrap.fill(title, int(width * 11)), textwrap.fill(caption, int(width * 15))
    figure.draw_without_rendering()  # the layout places what is there; words go around it
    figure.set_layout_engine("none")
    height, drawn = figure.get_figheight(), figure.get_tightbbox()  # inches
    figure.text(0.01, (drawn.y1 + 0.12) / height, title, va="bottom", size=12, weight="bold")
    figure.text(0.01, (drawn.y0 - 0.12) / height, caption, va="top", size=9, color="#444444")
    full, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(full, bbox_inches="tight", pad_inches=0.12)
    picture = Image.open(full).convert("RGB")
    picture.quantize(256, Image.Quantize.MEDIANCUT, dither=0).save(reduced, "PNG", optimize=True)
    return Picture(reduced.getvalue(), alt)


def _axes(width: float, height: float, **settings):
    """Axes of a figure of this size in inches."""
    return Figure((width, height)).subplots(subplot_kw=settings)


@styled
def bars(values: pd.Series, *, title: str, xlabel: str, ylabel: str, caption: str) -> Picture:
    """One bar per entry with its value on top; at most about 30 entries.

    values: counts, indexed by the names below the bars.
    """
    ax = _axes(min(9, 2.5 + 0.45 * len(values)), 4)
    named = values.rename(lambda name: textwrap.fill(str(name), 12))
    named.plot.bar(
        ax=ax,
        width=0.7,
        rot=0,
        xlabel=xlabel,
        ylabel=ylabel,
    )
    ax.bar_label(ax.containers[0], fontsize=7)
    listed = ", ".join(f"{name} {value:,g}" for name, value in values.items())
    alt = f"Bar chart: {ylabel} by {xlabel}: {listed}"
    return _picture(ax.figure, title, caption, alt)


@styled
def histogram(
    series: dict[str, np.ndarray],
    *,
    title: str,
    xlabel: str,
    caption: str,
    ylabel: str = "% of images",
    colours=None,
) -> Picture:
    """Overlaid histograms in percent of each series.

    series: values by name; an empty one is drawn as nothing. colours: one for each series.
    """
    ax = _axes(7.2, 3.9, xlabel=xlabel, ylabel=ylabel)
    ax.hist(
        list(series.values()),
        bins=30,
        weights=[np.full(len(values), 100 / max(1, len(values))) for values in series.values()],
        label=[f"{name} ({len(values):,})" for name, values in series.items()],
        color=colours,
        histtype="stepfilled",
        alpha=0.6,
    )
    ax.legend()
    medians = ", ".join(
        f"{name} median {np.median(values):.4g} of {len(values):,}"
        for name, values in series.items()
        if len(values)
    )
    return _picture(ax.figure, title, caption, f"Histogram of {xlabel}: {medians}")


@styled
def scatter(
    xy: np.ndarray, groups, *, title: str, caption: str, xlabel: str, ylabel: str
) -> Picture:
    """Points (N, 2); those of the seven largest groups in colour, the rest grey.

    groups: a name for each point; of equally large ones the smaller name goes first.
    """
    groups = np.asarray(groups)
    sizes = pd.Series(groups).value_counts().sort_index()
    ax = _axes(6.4, 5, xlabel=xlabel, ylabel=ylabel)
    ax.plot(*xy.T, ".", color="#CCCCCC")
    for group in sizes.nlargest(7).index:
        ax.plot(*xy[groups == group].T, ".", alpha=0.6, label=group)
    ax.figure.legend(loc="outside right center")
    (left, low), (right, high) = xy.min(axis=0), xy.max(axis=0)
    alt = (
        f"Scatter of {len(xy):,} points in {len(sizes)} groups: "
        f"{xlabel} {left:.4g} to {right:.4g}, {ylabel} {low:.4g} to {high:.4g}"
    )
    return _picture(ax.figure, title, caption, alt)


@styled
def training_curves(history: pd.DataFrame, *, title: str) -> Picture:
    """Loss, share of active pairs (or accuracy) and validation mAP@5 over the epochs."""
    panels = {
        "loss": "training loss",
        "active": "active share / accuracy",
        "map_at_5": "validation mAP@5",
    }
    history = history.set_index("epoch").reindex(columns=list(panels))
    figure = Figure((9, 3.8))
    for ax, column in zip(figure.subplots(1, 3, sharex=True), panels):
        known = history[column].dropna()
        ax.plot(known, ".-")
        ax.set(xlabel="epoch", ylabel=panels[column])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss = history["loss"].iloc
    alt = f"Training curves over {len(history)} epochs: loss {loss[0]:.2f} to {loss[-1]:.2f}"
    if len(known):
        alt += f", best validation mAP@5 {known.max():.2f} in epoch {known.idxmax()}"
    caption = (
        "Left: mean training loss. "
        "Middle: share of pairs or triplets that still give a gradient (ArcFace: accuracy). "
        "Right: mAP@5 on the validation split that chooses the epoch."
    )
    return _picture(figure, title, caption, alt)


@styled
def intervals(table: pd.DataFrame, *, title: str, caption: str, xlabel: str = "mAP@5") -> Picture:
    """A forest plot, a row an entry, the first on top; a line at 0 where these are differences.

    table: columns map_at_5, map_at_5_low, map_at_5_high; a score without an interval is a point.
    """
    rows = len(table)
    ax = _axes(7.2, 2 + 0.36 * rows, xlabel=xlabel, ylim=(rows - 0.5, -0.5))
    places = range(rows)
    columns = ["map_at_5", "map_at_5_low", "map_at_5_high"]
    scores, low, high = table[columns].astype(float).ffill(axis=1).to_numpy().T
    labels = [f"{name} {score:.3f}" for name, score in zip(table.index, scores)]
    ax.hlines(
        places,
        low,
        high,
        color=SKY,
        linewidth=4,
    )
    ax.plot(scores, places, "o")
    if low.min() < 0:  # differences
        ax.axvline(0, color=GREY)
    ax.set_yticks(places, [textwrap.fill(label, 48) for label in labels])
    alt = f"{xlabel} with 95 % intervals: {', '.join(labels)}"
    return _picture(ax.figure, title, caption, alt)


@styled
def ladder(table: pd.DataFrame) -> Picture:
    """The rungs of a series with their intervals, the first on top; a sentence where none is there.

    The caption says what each rung gains over the one before it, with the interval of the paired
    difference where there is one; a training that was cut short is marked beside its rung.

    table: of `runs.ladder`.
    """
    title = "The ladder so far"
    if table.empty:
        sentence = "No score on this data yet: notebooks 03 to 07 put one rung each on the ladder."
        return _picture(Figure((7.2, 0.4)), title, sentence, sentence)
    marks = [f" (cut short {cut})" if cut else "" for cut in table["cut_short"]]
    gained = table.dropna(subset="gain")[["gain", "gain_low", "gain_high"]]
    steps = [f"{rung} {gain(*gains)}" for rung, *gains in gained.itertuples()]
    listed = ", ".join(steps).replace(" [+nan, +nan]", "")
    over = f" Over the rung before: {listed}." if steps else ""
    picture = intervals(
        table.set_index(table.index + marks),
        title=title,
        caption=f"All test queries, whole gallery. Bars: 95 % over products.{over}",
    )
    return Picture(picture.png, f"{picture.alt}.{over}")


@styled
def lines(
    series: dict[str, tuple],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    caption: str,
    yscale: str = "linear",
) -> Picture:
    """Named curves (x, y, low, high), each in its band. yscale: 'linear' or 'log'."""
    ax = _axes(7.2, 4.2, xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    ends = []
    for name, (x, y, low, high) in series.items():
        (line,) = ax.plot(x, y, "o-", label=name)
        ax.fill_between(x, low, high, alpha=0.18)
        points = line.get_xydata()
        start, first = points[0]
        end, last = points[-1]
        ends.append(f"{name} from {first:.2f} at {start:g} to {last:.2f} at {end:g}")
    ax.legend()
    alt = f"Curves of {ylabel} over {xlabel}: {'; '.join(ends)}"
    return _picture(ax.figure, title, caption, alt)


def _grid(tiles: list, columns: int, side: float) -> Figure:
    """Photos of `side` inches in rows.

    tiles: (picture or None for an empty place, label above, colour of label and frame).
    """
    rows = math.ceil(len(tiles) / columns)
    figure = Figure((side * columns, (side + 0.4) * rows + 0.6), layout="compressed")
    for place, (picture, label, colour) in enumerate(tiles, start=1):
        if picture is not None:
            ax = figure.add_subplot(
                rows,
                columns,
                place,
                xticks=[],
                yticks=[],
            )
            ax.set_title(label, color=colour, pad=4)
            ax.spines[:].set(
                visible=colour != "black",
                color=colour,
                linewidth=3,
            )
            ax.imshow(picture)
    return figure


@styled
def image_grid(
    pictures: list, *, columns: int, title: str, caption: str, labels=(), alt: str = ""
) -> Picture:
    """Photos in rows of `columns`, each with its label above.

    pictures: (H, W, 3) uint8 arrays; alt: said in place of the number of photos and the labels.
    """
    tiles = [(picture, label, "black") for picture, label in zip_longest(pictures, labels)]
    figure = _grid(tiles, columns, min(9.2 / columns, 1.5))
    rows = math.ceil(len(pictures) / columns)
    listed = f": {', '.join(labels[:12])}" if labels else ""
    alt = alt or f"{title}, {len(pictures)} photos in {rows} rows of {columns}{listed}"
    return _picture(figure, title, caption, alt.replace("\n", " "))


@styled
def ranked_lists(
    store, queries: pd.DataFrame, gallery: pd.DataFrame, result, chosen, *, title: str
) -> Picture:
    """Each row: a query and its ranked images with class, group and similarity.

    Same product: green frame and a tick; different: red frame and a cross; unknown: grey frame.
    What is printed on both photos stands below where the result has it.
    chosen: positions of queries; result: a task.Retrieval, or one for each of them.
    """
    results = result if isinstance(result, list) else [result] * len(chosen)
    tiles, right = [], 0
    for at, found in zip(chosen, results):
        query = queries.iloc[at]  # query.name is its row number in the catalog
        tiles.append((store[query.name], f"query {query['name']}\n{_product(query)}", "black"))
        right += found.hits[at].sum()
        words = np.full(len(found.ranks[at]), "") if found.words is None else found.words[at]
        for row, hit, score, word in zip(found.ranks[at], found.hits[at], found.scores[at], words):
            product = gallery.iloc[row]
            colour, mark = (GREEN, "✓ same") if hit else (RED, "✗ different")
            if query["product_id"] < 0:
                colour, mark = GREY, "label unknown"
            picture = store[product.name] if row >= 0 else None  # a list that ends early
            # `verify` adds the matching points to a cosine, which never reaches 2
            how_like = f"{score:.3f}" if score < 2 else f"{int(score)} matches"
            label = f"{mark}  {how_like}\n{_product(product)}"
            if word:
                short = textwrap.shorten(word, 22, placeholder="…")
                label += f"\n“{_drawable(short)}”"
            tiles.append((picture, label, colour))
    k = found.ranks.shape[1]
    caption = (
        "Left: the query. Then its ranked gallery images, best first: "
        "tick or cross, similarity (or how many points match), class and group."
    )
    alt = (
        f"Ranked lists of {len(chosen)} queries: "
        f"{right} of {len(chosen) * k} images show the query's product"
    )
    return _picture(_grid(tiles, k + 1, 1.53), title, caption, alt)


@styled
def printed(photos: list[np.ndarray], lines: list, words: list, *, title: str) -> Picture:
    """A query beside a gallery photo, a frame around each line that was read on them, a green one
    with its words where the other photo says the same.

    lines: of each photo, as `reading.lines` gives them; words: of each, as `text.shared` does.
    """
    figure = Figure((7.6, 4.4), layout="compressed")
    for ax, photo, found, same in zip(figure.subplots(1, 2), photos, lines, words):
        ax.imshow(photo)
        ax.set_axis_off()
        for line in found:
            start, end = np.reshape(line.box, (2, 2)) * photo.shape[1::-1]
            both = sorted(set(line.text.split()) & set(same))
            colour = GREEN if both else GREY
            frame = Rectangle(start, *(end - start), fill=False, edgecolor=colour, lw=1.5)
            ax.add_patch(frame)
            if both:
                ax.text(
                    end[0],
                    (start[1] + end[1]) / 2,
                    _drawable(" ".join(both)),
                    fontsize=7,
                    va="center",
                    color="white",
                    bbox={"color": colour, "pad": 1.2},
                    clip_on=True,
                )
    said = ", ".join(words[1])
    caption = f"Left: the query. Right: the photo put first. Printed on both: {_drawable(said)}."
    return _picture(figure, title, caption, f"{title}: printed on both: {said}")


def _drawable(text: str) -> str:
    """With a point for each character beyond Latin, which the figures' font may lack."""
    return re.sub(r"[^\u0000-\u024f]", "·", text)


def _product(row) -> str:
    return f"class {row['product']} · group {row['group']}"


@styled
def matches(query: np.ndarray, photo: np.ndarray, points: tuple, *, title: str) -> Picture:
    """A query beside a gallery photo, verified points joined by lines.

    points: (a (M, 2), b (M, 2)) of verification.inliers; at most 60 are drawn.
    """
    ax = Figure((5.2, 3.2), layout="compressed").subplots()
    height, width = query.shape[:2]
    photo_width = round(photo.shape[1] * height / photo.shape[0])
    ax.imshow(np.hstack([query, cv2.resize(photo, (photo_width, height))]))
    ax.axvline(width, color="white", linewidth=4)
    ax.set_axis_off()
    starts = points[0] * max(height, width)
    ends = points[1] * max(height, photo_width) + [width, 0]
    every = math.ceil(len(starts) / 60) or 1
    x, y = np.stack([starts, ends])[:, ::every].transpose(2, 0, 1)  # both (2, lines)
    ax.plot(
        x,
        y,
        "o-",
        linewidth=0.9,
        markersize=3,
    )
    caption = (
        "Left: the query. Right: the gallery photo. "
        f"{len(starts)} points lie where one homography puts them; at most 60 are drawn."
    )
    alt = f"{title}: {len(starts)} matches between a query and a gallery photo"
    return _picture(ax.figure, title, caption, alt)
