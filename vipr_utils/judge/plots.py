"""Figures for the notebooks: each is a Picture with a caption inside and an alt text that carries its numbers."""

from __future__ import annotations

import base64
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from PIL import Image

from vipr_utils.host.files import whole_file

# Okabe and Ito's colours, told apart by colour-blind readers: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#8A8A8A",
)
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY)


@dataclass(frozen=True)
class Picture:
    """A PNG with its alt text. Notebooks show it as the last expression of a cell; the alt text is its text/plain."""

    png: bytes
    alt: str

    def _repr_mimebundle_(self, include=None, exclude=None):
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}

    def save(self, path: Path) -> Picture:
        """Write the PNG whole and return the picture, so that a cell can end with it."""
        with whole_file(path) as part:
            part.write_bytes(self.png)
        return self


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **spacing):
    figure = Figure(figsize=(width, height), dpi=88, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **spacing)
    return figure, axes


def _finish(figure, title: str, caption: str, alt: str) -> Picture:
    """Title above, wrapped caption below; a PNG of 128 colours, a fifth of the size, whose bytes repeat."""
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()  # inches
    left, room = box.x0 / width, max(box.width, 4.5)
    above, below = (box.y1 + 0.12) / height, (box.y0 - 0.12) / height
    wrapped = "\n".join(textwrap.wrap(title, int(room * 11)))
    figure.text(left, above, wrapped, fontsize=12, fontweight="bold", va="bottom")
    figure.text(
        left,
        below,
        "\n".join(textwrap.wrap(caption, int(room * 15))),
        fontsize=9,
        color="#444444",
        va="top",
    )
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.12)
    picture = (
        Image.open(out)
        .convert("RGB")
        .quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    )
    picture.save(out := io.BytesIO(), "PNG", optimize=True)
    return Picture(out.getvalue(), alt)


def _style(ax, xlabel: str = "", ylabel: str = "", grid: str = "y") -> None:
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#E4E4E4", linewidth=0.8)
    ax.set_axisbelow(True)


# ------------------------------------------------------------------------------------------------------- charts


def bars(values: pd.Series, *, title: str, xlabel: str, ylabel: str, caption: str) -> Picture:
    """One bar per entry with its value on top; at most about 30 entries."""
    figure, ((ax,),) = _figure(min(9, 2.5 + 0.45 * len(values)), 2.8)
    drawn = ax.bar(range(len(values)), values, color=BLUE, width=0.7)
    ax.set_xticks(
        range(len(values)), [str(i) for i in values.index], rotation=45 if len(values) > 8 else 0
    )
    if len(values) <= 14:
        ax.bar_label(drawn, fmt=lambda v: f"{v:,.0f}" if v == int(v) else f"{v:.2f}", fontsize=8)
    _style(ax, xlabel, ylabel)
    listed = ", ".join(
        f"{i} {v:,.0f}" if v == int(v) else f"{i} {v:.2f}" for i, v in values.head(12).items()
    )
    return _finish(
        figure,
        title,
        caption,
        f"Bar chart: {ylabel} by {xlabel}: {listed}{' ...' if len(values) > 12 else ''}",
    )


def long_tail(counts: pd.Series, *, title: str, caption: str) -> Picture:
    """Images per product, most first, on a log axis, with the median and the products under four images marked."""
    n = np.sort(counts.to_numpy())[::-1]
    figure, ((ax,),) = _figure(7.2, 2.9)
    ax.fill_between(np.arange(1, len(n) + 1), n, step="mid", color=SKY, alpha=0.6)
    ax.step(np.arange(1, len(n) + 1), n, where="mid", color=BLUE)
    ax.axhline(np.median(n), color=RED, linestyle="--", linewidth=1.2)
    ax.annotate(
        f"median {np.median(n):g}",
        (len(n), np.median(n)),
        color=RED,
        fontsize=9,
        ha="right",
        va="bottom",
    )
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    _style(ax, "products, most images first", "training images (log)")
    alt = f"Long tail: {len(n):,} products, {n[0]:,} images for the first, median {np.median(n):g}, {n[-1]} for the last"
    return _finish(figure, title, caption, f"{alt}; {(n < 4).sum():,} products have fewer than 4")


def histogram(
    series: dict[str, np.ndarray], *, title: str, xlabel: str, caption: str, bins=30
) -> Picture:
    """Overlaid histograms as shares of each series."""
    figure, ((ax,),) = _figure(7.2, 2.8)
    edges = np.histogram_bin_edges(
        np.concatenate([np.asarray(v, float) for v in series.values()]), bins
    )
    for (name, values), colour in zip(series.items(), COLOURS):
        weights = np.full(len(values), 100 / max(1, len(values)))
        ax.hist(
            values,
            edges,
            weights=weights,
            alpha=0.55,
            color=colour,
            label=f"{name} ({len(values):,})",
        )
    ax.legend(fontsize=8, frameon=False)
    _style(ax, xlabel, "% of images")
    medians = ", ".join(
        f"{k} median {np.median(v):.4g} of {len(v):,}" for k, v in series.items() if len(v)
    )
    return _finish(figure, title, caption, f"Histogram of {xlabel}: {medians}")


def sizes(
    width: np.ndarray, height: np.ndarray, domain: np.ndarray, *, title: str, caption: str
) -> Picture:
    """Width against height of every photo, coloured by domain."""
    figure, ((ax,),) = _figure(4.6, 3.6)
    for name, colour in zip(sorted(set(domain)), COLOURS):
        chosen = domain == name
        ax.scatter(
            width[chosen],
            height[chosen],
            s=12,
            color=colour,
            alpha=0.5,
            label=f"{name or 'unknown'} ({chosen.sum():,})",
        )
    ax.legend(fontsize=8, frameon=False)
    _style(ax, "width (px)", "height (px)", grid="both")
    alt = f"Scatter of image sizes: width {width.min()} to {width.max()} px, height {height.min()} to {height.max()} px"
    return _finish(
        figure, title, caption, f"{alt}, median {np.median(width):.0f} x {np.median(height):.0f}"
    )


def training_curves(history: pd.DataFrame, *, title: str) -> Picture:
    """Loss, share of active pairs (or accuracy) and validation mAP@5 over the epochs."""
    figure, axes = _figure(9, 2.6, 1, 3, gridspec_kw={"wspace": 0.32})
    scored = history.dropna(subset="map_at_5") if "map_at_5" in history else history.head(0)
    panels = (("loss", history), ("active", history), ("map_at_5", scored))
    labels = ("training loss", "active share / accuracy", "validation mAP@5")
    for ax, (column, frame), label, colour in zip(axes[0], panels, labels, COLOURS):
        if len(frame):
            ax.plot(frame["epoch"], frame[column], color=colour, marker="o", markersize=3)
        _style(ax, "epoch", label)
        ax.set_xticks(np.unique(np.linspace(1, max(1, len(history)), 5).round()))
    first, last = history.iloc[0], history.iloc[-1]
    alt = f"Training curves over {len(history)} epochs: loss {first.loss:.2f} to {last.loss:.2f}"
    if len(scored):
        alt += f", best validation mAP@5 {scored.map_at_5.max():.2f} in epoch {int(scored.loc[scored.map_at_5.idxmax(), 'epoch'])}"
    caption = "Left: mean training loss. Middle: share of pairs or triplets that still give a gradient (ArcFace: accuracy). "
    return _finish(
        figure, title, caption + "Right: mAP@5 on the validation split that chooses the epoch.", alt
    )


def similarity_histogram(similarity: np.ndarray, query_products, gallery_products) -> Picture:
    """Cosine similarities (Q, G) of same-product against different-product pairs, with the chance that a random
    same pair beats a random different pair (area under the ROC curve)."""
    same = np.asarray(query_products)[:, None] == np.asarray(gallery_products)[None, :]
    a, b = np.sort(similarity[same]), similarity[~same]
    b = b[:: max(1, len(b) // 200_000)]
    auc = (
        float((np.searchsorted(a, b, "left") * -1.0 + len(a)).mean() / max(1, len(a)))
        if len(a)
        else float("nan")
    )
    figure, ((ax,),) = _figure(7.2, 2.7)
    edges = np.linspace(min(similarity.min(), 0), 1, 60)
    for values, colour, name in ((b, GREY, "different products"), (a, BLUE, "same product")):
        ax.hist(
            values,
            edges,
            weights=np.full(len(values), 100 / max(1, len(values))),
            color=colour,
            alpha=0.6,
            label=name,
        )
        ax.axvline(
            np.median(values) if len(values) else 0, color=colour, linestyle="--", linewidth=1.2
        )
    ax.legend(fontsize=8, frameon=False)
    _style(ax, "cosine similarity", "% of pairs")
    medians = (
        f"median {np.median(a):.2f} for the same product, {np.median(b):.2f} for different ones"
        if len(a)
        else "no same pairs"
    )
    caption = f"All query x gallery pairs; dashed: medians. A random same pair beats a random different pair in {auc:.1%} of draws."
    return _finish(
        figure,
        "Similarity of same and different products",
        caption,
        f"Histogram of similarities: {medians}, AUC {auc:.2f}",
    )


def scatter(xy: np.ndarray, groups, *, title: str) -> Picture:
    """A map (N, 2) of embeddings; the seven largest groups in colour, the rest grey."""
    groups = pd.Series(np.asarray(groups))
    largest = (
        groups.value_counts(sort=True)
        .sort_index()
        .sort_values(ascending=False, kind="stable")
        .index[:7]
    )
    figure, ((ax,),) = _figure(5.6, 4.4)
    rest = ~groups.isin(largest)
    ax.scatter(*xy[rest.to_numpy()].T, s=9, color="#CCCCCC")
    for group, colour in zip(largest, COLOURS):
        ax.scatter(*xy[(groups == group).to_numpy()].T, s=14, color=colour, label=f"group {group}")
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color("#DDDDDD")
    caption = f"{len(groups):,} images; colours are the {len(largest)} largest product groups. Only nearness means something here."
    return _finish(
        figure,
        title,
        caption,
        f"Map of {len(groups):,} embeddings in {groups.nunique()} groups, {len(largest)} in colour",
    )


def intervals(table: pd.DataFrame, *, title: str, caption: str, xlabel: str = "mAP@5") -> Picture:
    """A forest plot: one row per entry of columns map_at_5, map_at_5_low, map_at_5_high, first entry on top; a line at 0 where
    these are differences."""
    figure, ((ax,),) = _figure(7.2, 0.9 + 0.36 * len(table))
    y = np.arange(len(table))[::-1]
    middle, low, high = (
        table[c].to_numpy(float) for c in ("map_at_5", "map_at_5_low", "map_at_5_high")
    )
    ax.errorbar(
        middle,
        y,
        xerr=[middle - low, high - middle],
        fmt="o",
        color=BLUE,
        ecolor=SKY,
        elinewidth=4,
        markersize=5,
    )
    if np.nanmin(low) < 0:  # differences
        ax.axvline(0, color=GREY, linewidth=1)
    for x, row in zip(middle, y):
        ax.annotate(
            f"{x:.3f}", (x, row), textcoords="offset points", xytext=(0, 5), ha="center", fontsize=8
        )
    ax.set_yticks(y, [str(i) for i in table.index], fontsize=8)
    ax.set_ylim(-0.6, len(table) - 0.3)
    _style(ax, xlabel, grid="x")
    listed = ", ".join(f"{name} {x:.3f}" for name, x in zip(table.index, middle))
    return _finish(figure, title, caption, f"{xlabel} with 95 % intervals: {listed}")


def lines(
    series: dict[str, tuple],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    caption: str,
    log_x: bool = False,
) -> Picture:
    """Named curves (x, y) or (x, y, low, high), the band where given."""
    figure, ((ax,),) = _figure(7.2, 3.0)
    for (name, (x, y, *band)), colour in zip(series.items(), COLOURS):
        ax.plot(x, y, color=colour, marker="o", markersize=4, label=name)
        if band:
            ax.fill_between(x, *band, color=colour, alpha=0.18, linewidth=0)
    if log_x:
        ax.set_xscale("log")
    if len(series) > 1:
        ax.legend(fontsize=8, frameon=False)
    _style(ax, xlabel, ylabel, grid="both")
    first = {name: [np.asarray(v) for v in s[:2]] for name, s in series.items()}
    ends = "; ".join(
        f"{n} from {y[0]:.2f} at {x[0]:g} to {y[-1]:.2f} at {x[-1]:g}"
        for n, (x, y) in first.items()
    )
    return _finish(figure, title, caption, f"Curves of {ylabel} over {xlabel}: {ends}")


# ------------------------------------------------------------------------------------------------------- photos


def denormalised(image, *, mean, std) -> np.ndarray:
    """A network input (3, S, S) back to (S, S, 3) uint8."""
    x = np.asarray(image).transpose(1, 2, 0) * np.asarray(std) + np.asarray(mean)
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


def _photo(ax, image: np.ndarray, *, least_px: int = 140, **how) -> None:
    """One picture in its axes, reduced to what the page can show, so that notebooks stay small."""
    step = max(1, min(image.shape[:2]) // least_px)
    ax.imshow(image[::step, ::step], **how)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def image_grid(
    pictures: list, *, columns: int, title: str, caption: str, labels=(), alt: str = ""
) -> Picture:
    """Photos in rows of `columns`, each with its label above. pictures: (H, W, 3) uint8 arrays."""
    rows = -(-len(pictures) // columns)
    side, lines = min(9.2 / columns, 1.5), max((str(t).count("\n") + 1 for t in labels), default=0)
    label = 0.16 * lines + 0.06  # inches above each photo
    figure, axes = _figure(side * columns, (side + label) * rows, rows, columns)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.05, hspace=(label + 0.04) / (side - label))
    for i, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if i < len(pictures):
            _photo(ax, pictures[i])
            if labels:
                ax.set_title(labels[i], fontsize=8, pad=3)
    listed = f": {', '.join(map(str, labels[:12]))}" if labels else ""
    alt = alt or f"{title}, {len(pictures)} photos in {rows} rows of {columns}{listed}"
    return _finish(figure, title, caption, alt.replace("\n", " "))


def ranked_lists(
    store,
    queries: pd.DataFrame,
    gallery: pd.DataFrame,
    result,
    chosen,
    *,
    title: str,
    caption: str = "",
) -> Picture:
    """Each row: a query and its ranked images with class, group and similarity.

    Same product: green frame and a tick; different: red frame and a cross; unknown label: grey frame.
    chosen: positions of queries; result: a task.Retrieval, or one for each of them.
    """
    results = result if isinstance(result, list) else [result] * len(chosen)
    k = results[0].ranks.shape[1]
    figure, axes = _figure(9.2, 1.95 * len(chosen), len(chosen), k + 1)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.08, hspace=0.36)
    right = 0
    for line, at, result in zip(axes, chosen, results):
        query = queries.iloc[at]
        _photo(line[0], store[queries.index[at]])
        line[0].set_title(f"query {query['name']}\n{_what(query)}", fontsize=8)
        for rank, ax in enumerate(line[1:]):
            row = result.ranks[at, rank]
            if row < 0:
                ax.set_axis_off()
                continue
            shown = gallery.iloc[row]
            _photo(ax, store[gallery.index[row]])
            same = bool(result.hits[at, rank])
            right += same
            colour, mark = (GREEN, "✓ same") if same else (RED, "✗ different")
            if query["product_id"] < 0:
                colour, mark = GREY, "label unknown"
            ax.spines[:].set(visible=True, color=colour, linewidth=3)
            ax.set_title(
                f"{mark}  {result.scores[at, rank]:.3f}\n{_what(shown)}", fontsize=8, color=colour
            )
    caption = (
        caption
        or "Left: the query. Then its ranked gallery images, best first: tick or cross, similarity, class and group."
    )
    alt = f"Ranked lists of {len(chosen)} queries: {right} of {len(chosen) * k} images show the query's product"
    return _finish(figure, title, caption, alt)


def matches(
    query: np.ndarray,
    photo: np.ndarray,
    points: tuple,
    *,
    title: str,
    caption: str = "",
    most: int = 60,
) -> Picture:
    """A query beside a gallery photo, verified points joined by lines; points: (a (M, 2), b (M, 2)) of verification.inliers.

    The lines are spread over the rainbow from the top of the query down, so that parallel ones can be told apart; of more
    than `most` every second, third ... is drawn.
    """
    figure, axes = _figure(7.2, 3.4, 1, 2, gridspec_kw={"wspace": 0.06})
    for ax, image in zip(axes[0], (query, photo)):
        _photo(ax, image, least_px=240, extent=(0, image.shape[1], image.shape[0], 0))
    a, b = (x * max(image.shape[:2]) for x, image in zip(points, (query, photo)))
    drawn = np.argsort(a[:, 1], kind="stable")[:: -(-len(a) // most) or 1]
    for at, colour in zip(drawn, colormaps["turbo"](np.linspace(0.05, 0.95, len(drawn)))):
        line = {
            "coordsA": axes[0, 0].transData,
            "coordsB": axes[0, 1].transData,
            "color": colour,
            "linewidth": 0.9,
        }
        figure.add_artist(ConnectionPatch(a[at], b[at], **line))
        for ax, spot in zip(axes[0], (a[at], b[at])):
            ax.plot(
                *spot, "o", color=colour, markersize=3, markeredgecolor="white", markeredgewidth=0.4
            )
    shown = f", {len(drawn)} of them drawn" if len(drawn) < len(a) else ""
    caption = (
        caption
        or f"Left: the query. Right: the gallery photo. {len(a)} points lie where one homography puts them{shown}."
    )
    return _finish(
        figure,
        title,
        caption,
        f"{title}: {len(a)} matches between a query and a gallery photo{shown}",
    )


def _what(row) -> str:
    return f"class {row['product_id']} · group {row['group']}"
