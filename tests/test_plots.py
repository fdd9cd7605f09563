"""Figures: the same bytes every time, numbers in the alt text, the right frame on each image."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from PIL import Image
from roots import picture

from vipr_utils.judge import plots, runs, task
from vipr_utils.retrieve.reading import Line

COUNTS = pd.Series([9, 4, 1], index=["a", "b", "c"])
HISTORY = pd.DataFrame(
    {"epoch": [1, 2], "loss": [2.0, 1.0], "active": [0.9, 0.5], "map_at_5": [np.nan, 0.25]}
)
SCORES = pd.DataFrame(
    {"map_at_5": [0.5], "map_at_5_low": [0.4], "map_at_5_high": [0.6]}, index=["frozen"]
)
RUNGS = pd.DataFrame(
    [[0.02, *[np.nan] * 5, ""], [0.5, 0.4, 0.6, 0.48, 0.4, 0.56, ""]],
    index=["random ranking", "trained"],
    columns=runs.LADDER[:7],
)
WORDS = {"title": "Title", "caption": "Caption"}
FIGURES = {
    "bars": (
        lambda: plots.bars(COUNTS, xlabel="kind", ylabel="images", **WORDS),
        "images by kind: a 9, b 4, c 1",
    ),
    "histogram": (
        lambda: plots.histogram({"x": np.arange(5)}, xlabel="size", **WORDS),
        "size: x median 2 of 5",
    ),
    "training_curves": (
        lambda: plots.training_curves(HISTORY, title="T"),
        "loss 2.00 to 1.00, best validation mAP@5 0.25 in epoch 2",
    ),
    "scatter": (
        lambda: plots.scatter(
            np.array([[10, 5], [30, 7]]), ["", "shop"], xlabel="width (px)", ylabel="h", **WORDS
        ),
        "2 points in 2 groups: width (px) 10 to 30, h 5 to 7",
    ),
    "intervals": (lambda: plots.intervals(SCORES, **WORDS), "95 % intervals: frozen 0.500"),
    "ladder": (
        lambda: plots.ladder(RUNGS),
        "trained 0.500. Over the rung before: trained +0.480 [+0.400, +0.560].",
    ),
    "lines": (
        lambda: plots.lines(
            {"x": ([1, 2], [0.5, 0.25], [0.4, 0.2], [0.6, 0.3])}, xlabel="n", ylabel="m", **WORDS
        ),
        "x from 0.50 at 1 to 0.25 at 2",
    ),
    "image_grid": (
        lambda: plots.image_grid([picture()], columns=2, labels=["one"], **WORDS),
        "Title, 1 photos in 1 rows of 2: one",
    ),
    "matches": (
        lambda: plots.matches(
            picture(0), picture(1, 90, 50), (np.eye(100, 2), np.eye(100, 2) / 2), title="Title"
        ),
        "Title: 100 matches between a query and a gallery photo",
    ),
    "no matches": (
        lambda: plots.matches(
            picture(0), picture(1), (np.zeros((0, 2)), np.zeros((0, 2))), title="Title"
        ),
        "Title: 0 matches between a query and a gallery photo",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_repeats_byte_for_byte_and_its_alternative_text_has_the_numbers(name):
    make, words = FIGURES[name]
    first, again = make(), make()
    assert (
        first.png == again.png
        and first.png.startswith(b"\x89PNG")
        and b"matplotlib" not in first.png.lower()
    )
    assert words in first.alt
    data, metadata = first._repr_mimebundle_()
    assert data["text/plain"] == first.alt == metadata["image/png"]["alt"]


def test_picture_is_written_whole_and_stays_the_value_of_the_cell(tmp_path):
    figure = plots.bars(COUNTS, xlabel="kind", ylabel="images", **WORDS)
    assert figure.save(tmp_path / "bars.png") is figure
    assert (tmp_path / "bars.png").read_bytes() == figure.png


def test_ranked_list_marks_same_different_and_unknown(monkeypatch):
    marks = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set_title",
        lambda ax, text, **how: marks.append((text, how.get("color"))),
    )
    table = pd.DataFrame({"product_id": [1, 2, -1], "name": list("abc"), "group": 0})
    table["product"] = ["mug", "pot", ""]
    ranks = np.array([[0, 1], [1, -1], [0, 1]])
    found = task.Retrieval(
        np.full((3, 2), 0.5), ranks, np.array([[1, 0], [1, 0], [0, 0]], bool), np.ones(3), {}
    )
    figure = plots.ranked_lists(
        {i: picture(i) for i in range(3)}, table, table, found, [0, 1, 2], title="T"
    )
    assert [(t.split("  ")[0], c) for t, c in marks if "0.500" in t] == [
        ("✓ same", plots.GREEN),
        ("✗ different", plots.RED),
        ("✓ same", plots.GREEN),
        ("label unknown", plots.GREY),
        ("label unknown", plots.GREY),
    ]
    assert "2 of 6 images show the query's product" in figure.alt


def test_words_that_both_photos_show_stand_below_an_answer_and_are_framed(monkeypatch):
    labels = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set_title", lambda ax, text, **how: labels.append(text)
    )
    table = pd.DataFrame({"product_id": [1], "name": "a", "group": 0, "product": "mug"})
    lists = np.zeros((1, 1), int)
    words = np.array([["oat milk 牛奶"]], object)
    found = task.Retrieval(lists + 0.5, lists, lists == 0, np.ones(1), {}, words=words)
    plots.ranked_lists({0: picture()}, table, table, found, [0], title="T")
    assert labels[1].endswith("“oat milk ··”")

    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.text", lambda ax, x, y, text, **how: drawn.append(text)
    )
    monkeypatch.setattr(
        "matplotlib.axes.Axes.add_patch", lambda ax, patch: drawn.append(patch.get_edgecolor())
    )
    box = (0.1, 0.1, 0.5, 0.2)
    query, photo = [Line("OAT MILK 1 l", 1.0, box)], [Line("OAT", 1.0, box), Line("x", 1.0, box)]
    figure = plots.printed([picture(), picture()], [query, photo], [["OAT"], ["OAT"]], title="Read")
    frames = [to_rgba(plots.GREEN), "OAT", to_rgba(plots.GREEN), "OAT", to_rgba(plots.GREY)]
    assert drawn == frames and figure.alt == "Read: printed on both: OAT"


def test_a_curve_may_be_a_single_point():
    curves = {"x": ([2], [0.5], [0.4], [0.6])}
    figure = plots.lines(curves, xlabel="n", ylabel="m", **WORDS)
    assert "x from 0.50 at 2 to 0.50 at 2" in figure.alt


def test_histogram_draws_a_series_in_the_colour_it_is_given():
    red = plots.histogram({"x": np.ones(9)}, xlabel="red", colours=[plots.RED], **WORDS)
    pixels = np.asarray(Image.open(io.BytesIO(red.png)).convert("RGB")).astype(int)
    coloured = pixels[np.ptp(pixels, axis=2) > 60]
    assert len(coloured) > 500 and (coloured[:, 0] > coloured[:, 2]).all()
