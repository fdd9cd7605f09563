"""The look-up page, opened in a real browser without a network."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from vipr_utils import __main__ as command
from vipr_utils.data import catalog
from vipr_utils.judge import page, runs
from vipr_utils.judge.task import View, scored

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HOSTILE = "</script><img src=x onerror=document.title='hacked'>\"'&"


@pytest.fixture(scope="module")
def found(toy_data):
    """(view, lists, better lists) of the toy set, drawn: half of the first answers are right."""
    photos, _ = toy_data
    view = View(*catalog.split(photos, "test")[1:])
    rng = np.random.default_rng(0)
    wanted = view.queries["product_id"].to_numpy()
    products = view.gallery["product_id"].to_numpy()

    def lists(share):
        ranks = np.array([rng.permutation(len(products))[:5] for _ in wanted])
        for q in np.flatnonzero(rng.random(len(wanted)) < share):
            right = rng.choice(np.flatnonzero(products == wanted[q]))
            ranks[q] = [right, *[row for row in ranks[q] if row != right][:4]]
        return scored(view, -np.sort(-rng.random(ranks.shape), axis=1), ranks)

    return view, lists(0.3), lists(0.8)


@pytest.fixture(scope="module")
def written(found, toy_data, tmp_path_factory):
    """A page of two runs with a map, a ladder and a hostile name; photos in the file."""
    view, worse, better = found
    queries = view.queries.copy()
    queries.iloc[0, queries.columns.get_loc("name")] = HOSTILE
    ladder = pd.DataFrame(
        {"map_at_5": [0.1, 0.7], "map_at_5_low": [np.nan, 0.6], "map_at_5_high": [np.nan, 0.8]},
        index=["random ranking", HOSTILE],
    )
    return page.write(
        tmp_path_factory.mktemp("page") / "page.html",
        View(queries, view.gallery),
        {"first": worse, "second": better},
        toy_data[1],
        title=f"toy {HOSTILE}",
        ladder=ladder,
        embeddings=np.random.default_rng(0).normal(size=(len(queries), 8)),
        confidence=np.linspace(0, 1, len(queries)),
    )


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("Chromium is not here: install it to try the page")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser, written):
    """The page, opened; no request may leave the file, and no script may fail."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened, asked, errors = context.new_page(), [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    opened.goto(written.as_uri())
    opened.wait_for_selector("#list li")
    yield opened
    assert not errors
    assert all(url.startswith(("file://", "data:")) for url in asked)
    context.close()


def count(tab) -> int:
    return int(tab.inner_text("#count").split(" of ")[0].replace(",", ""))


def test_page_filters_sorts_searches_and_turns(tab, found):
    view, worse, better = found
    right, before = better.hits[:, 0], worse.hits[:, 0]
    assert count(tab) == len(view.queries)
    for value, wanted in [
        ("right", right),
        ("wrong", ~right),
        ("rescued", right & ~before),
        ("broken", ~right & before),
    ]:
        tab.select_option("#verdict", value)
        assert count(tab) == wanted.sum() > 0
    tab.select_option("#verdict", "all")
    group = tab.eval_on_selector_all("#group option", "all => all[1].value")
    tab.select_option("#group", group)
    assert count(tab) == (view.queries["group"].astype(str) == group).sum()
    tab.select_option("#group", "")
    tab.select_option("#sort", "worst")
    places = tab.eval_on_selector_all(
        "[data-query]", "all => all.map((one) => Number(one.dataset.query))"
    )
    values = better.average_precision[places]
    assert (np.diff(values) >= 0).all() and len(values) == min(25, len(view.queries))
    tab.select_option("#sort", "doubt")
    told = tab.eval_on_selector_all(".query", "all => all.map((one) => one.innerText)")
    sure = [float(re.search(r"confidence (\S+)", text)[1]) for text in told]
    assert sure == sorted(sure) and sure[0] < sure[-1]
    product = view.queries["product"].iloc[3]
    tab.fill("#words", product)
    text = view.queries["name"].where(np.arange(len(view.queries)) > 0, HOSTILE)
    text = (text + " " + view.queries["product"]).str.lower()
    assert count(tab) == text.str.contains(product.lower(), regex=False).sum()
    tab.fill("#words", "")
    if len(view.queries) > 25:
        first = tab.inner_text("#list li:first-child .name >> nth=1")
        tab.click("#next")
        assert "page 2" in tab.inner_text("#page")
        assert tab.inner_text("#list li:first-child .name >> nth=1") != first
        tab.click("#before")
        assert tab.is_disabled("#before")


def test_query_opens_by_keyboard_and_closes_again(tab):
    tab.focus("[data-query] >> nth=1")
    tab.keyboard.press("Enter")
    assert tab.is_visible("#dialog") and tab.locator("#dialog img").count() == 11
    assert "AP@5" in tab.inner_text("#dialog")
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#dialog")
    assert tab.evaluate("document.activeElement.dataset.query") == "1"


def test_map_pans_zooms_and_opens_what_is_clicked(tab):
    before = tab.evaluate("[...place(4)]")
    tab.focus("#map")
    tab.keyboard.press("+")
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("[...place(4)]") != before
    tab.evaluate("view.x = queries.x[4]; view.y = queries.y[4]; paint()")
    box = tab.locator("#map").bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tab.is_visible("#dialog")


def test_what_came_with_the_data_is_text(tab, written):
    assert HOSTILE in tab.inner_text("h1") and "hacked" not in tab.title()[:6]
    assert HOSTILE in tab.inner_text("#ladder")
    tab.fill("#words", "onerror")
    assert count(tab) == 1 and HOSTILE in tab.inner_text("#list")
    assert tab.locator("img[src=x]").count() == 0
    assert written.read_text().count("</script>") == 2  # those of the template


def test_every_photo_has_a_text_and_is_shown(tab):
    images = tab.locator("#list img")
    texts = images.evaluate_all("all => all.map((image) => image.alt)")
    assert all(re.match(r"(query|answer \d, (right|wrong)): .", text) for text in texts)
    tab.locator("#list img >> nth=0").scroll_into_view_if_needed()
    assert tab.evaluate("document.querySelector('#list img').naturalWidth") > 16


@pytest.mark.parametrize(
    "scheme, width",
    [
        ("light", 1200),
        pytest.param("dark", 360, marks=pytest.mark.long),
        pytest.param("light", 360, marks=pytest.mark.long),
        pytest.param("dark", 1200, marks=pytest.mark.long),
    ],
)
def test_page_is_accessible_wide_and_narrow_light_and_dark(browser, written, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    tab = context.new_page()
    tab.goto(written.as_uri())
    tab.wait_for_selector("#list li")
    results = axe.Axe().run(tab)
    assert results.violations_count == 0, results.generate_report()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    tab.click("[data-query] >> nth=0")
    results = axe.Axe().run(tab)
    assert results.violations_count == 0, results.generate_report()
    context.close()


@pytest.mark.long
def test_five_thousand_queries_stay_smooth(browser, found, toy_data, tmp_path, monkeypatch):
    view, _, better = found
    times = -(-5000 // len(view.queries))
    queries = pd.concat([view.queries] * times)[:5000]
    rows = np.arange(5000) % len(view.queries)
    large = View(queries, view.gallery)
    lists = scored(large, better.scores[rows], better.ranks[rows])
    monkeypatch.setattr(page, "INLINE_BYTES", 0)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.txt").write_text("a folder of the user's")
    path = page.write(tmp_path / "page.html", large, {"run": lists}, toy_data[1], title="large")
    assert (tmp_path / "page" / "mine.txt").is_file()
    assert path.stat().st_size < 3_000_000 and len(list(tmp_path.glob("page_files/*/*.jpg"))) > 5000
    tab = browser.new_page()
    tab.goto(path.as_uri())
    tab.wait_for_selector("#list li")
    assert count(tab) == 5000 and tab.locator("#list li.row").count() == 25
    tab.click("#next")
    assert "page 2 of 200" in tab.inner_text("#page")
    assert tab.get_attribute("#list li.row:first-child", "aria-posinset") == "26"
    took = tab.evaluate(
        "(() => { const start = performance.now(); at('sort').value = 'worst'; select();"
        " document.body.offsetHeight; return performance.now() - start })()"
    )
    assert took < 500
    tab.locator("#list img >> nth=0").scroll_into_view_if_needed()
    tab.wait_for_function("document.querySelector('#list img').naturalWidth > 16")
    tab.close()


def test_queries_without_labels_are_shown_as_such(browser, found, toy_data, tmp_path):
    view, worse, _ = found
    queries = view.queries.assign(product_id=-1, product="", group=-1, domain="")
    unlabelled = View(queries, view.gallery)
    lists = scored(unlabelled, worse.scores, np.where(np.arange(5) < 3, worse.ranks, -1))
    words = np.full(lists.ranks.shape, "", object)
    words[0, 0] = "<b>oat</b> milk"
    lists = replace(lists, words=words)
    path = page.write(tmp_path / "p.html", unlabelled, {"run": lists}, toy_data[1], title="t")
    tab = browser.new_page()
    tab.goto(path.as_uri())
    tab.wait_for_selector("#list li")
    assert "not known" in tab.inner_text("#list") and "wrong" not in tab.inner_text("#list")
    assert tab.locator("#list li.row:first-child figure").count() == 3
    assert tab.locator("#list .printed").all_inner_texts() == ["“<b>oat</b> milk”"]
    assert tab.is_hidden("#map-part") and tab.is_hidden("#ladder-part")
    tab.close()


# ------------------------------------------------------------------------------- a run's own lists


def test_lists_come_back_as_they_were_saved(found, tmp_path):
    view, worse, _ = found
    worse.ranks[0, 3:] = -1
    page.save_lists(tmp_path, view, worse)
    again, confidence = page.load_lists(tmp_path, view)
    assert confidence is None
    np.testing.assert_array_equal(again.ranks, worse.ranks)
    kept = worse.ranks >= 0
    np.testing.assert_allclose(again.scores[kept], worse.scores[kept], atol=1e-5)
    told = np.linspace(0, 1, len(view.queries))
    page.save_lists(tmp_path, view, worse, told)
    np.testing.assert_allclose(page.load_lists(tmp_path, view)[1], told, atol=1e-5)
    words = np.full(worse.ranks.shape, "", object)
    words[0, :2] = ['oat, "milk"', "nan"]
    page.save_lists(tmp_path, view, replace(worse, words=words))
    assert (page.load_lists(tmp_path, view)[0].words == words).all()
    with pytest.raises(runs.RunError, match="not in this data"):
        page.load_lists(tmp_path, View(view.queries[1:], view.gallery))
    with pytest.raises(runs.RunError, match="run notebook 06"):
        page.load_lists(tmp_path / "none", view)


def test_command_makes_the_page_of_a_run(found, toy_root, tmp_path, capsys, monkeypatch):
    view, worse, better = found
    for name, lists in (("a", worse), ("b", better), ("old/b", worse)):
        page.save_lists(tmp_path / name, view, lists, np.full(len(view.queries), 0.123))
    monkeypatch.setattr(runs, "load", lambda folder: {"params": {}})
    monkeypatch.setattr(runs, "ladder", lambda *_: None)
    settings = ["--data", str(toy_root), "--cache-dir", str(tmp_path / "cache")]
    both = [str(tmp_path / "b"), "--beside", str(tmp_path / "a")]
    assert command.main(["page", *both, *settings]) == 0
    text = (tmp_path / "b" / "page.html").read_text()
    assert capsys.readouterr().out.strip().endswith("page.html") and '/a"' in text
    assert "0.123" in text.partition('"confidence"')[2][:20]
    assert command.main(["page", *both[:2], str(tmp_path / "old" / "b"), *settings]) == 0
    text = (tmp_path / "b" / "page.html").read_text()
    assert f'"name": "{tmp_path.name}/b"' in text and '"name": "old/b"' in text
    assert command.main(["page", str(tmp_path / "none"), *settings]) == 2
