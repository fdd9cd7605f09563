"""Put the tables of submissions/reference between the marks of RESULTS.md: `make results`.

The findings above them are written by hand. A table is one task whose rows may be compared: same
data, protocol, queries and gallery.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from soak import KILLS

from vipr_utils.host.files import whole_file
from vipr_utils.judge import runs

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "submissions" / "reference"
BENCH = ROOT / "benchmarks" / "results.json"
SOAK = ROOT / "benchmarks" / "soak.json"
CATALOGUE = ROOT / "benchmarks" / "catalogue.json"
START, END = "<!-- results:start -->", "<!-- results:end -->"
FOLD = 12  # rows of a table that are still shown open
REMOVED = "cross_domain|cut_to_object|centred|-all"  # levers tried at v0.1 and removed
SUBSET_VIEWS = {
    "subset queries, subset gallery": "subset's own gallery",
    "subset queries, full gallery": "whole gallery",
    "all queries, full gallery": "all queries, whole gallery",
}
NO_VALUE = "–"
SIZES = ["n_queries", "n_gallery"]


def number(value, form: str = ".3f") -> str:
    return NO_VALUE if pd.isna(value) else format(value, form)


def reported(run: str) -> str:
    """What the reference study reports for the setting of a run, as it writes it."""
    value = runs.STUDY.get(run.split(":")[0], float("nan"))
    return number(value, ".3f" if round(value, 3) == value else ".4f")


def interval(value, low, high, form: str = ".3f") -> str:
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; columns that say the same in every row are left out."""
    varying = [column for column in table if len(table) == 1 or table[column].nunique() > 1]
    lines = [varying, ["---"] * len(varying), *table[varying].astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def section(title: str, text: str, table: pd.DataFrame) -> str:
    """Heading, the sentence that says what is constant, the table, folded where it is long."""
    shown = markdown(table)
    if len(table) > FOLD:
        shown = f"<details><summary>{len(table)} rows</summary>\n\n{shown}\n\n</details>"
    return f"### {title}\n\n{text}\n\n{shown}"


def pixels(record: dict) -> str:
    """Side of the photos in training, and in search where it is another."""
    trained = record["params"].get("image_size") or (record["model"] or {}).get("image_size")
    searched = record["params"].get("test_size") or trained
    return f"{trained}, searched at {searched}" if searched != trained else str(trained)


def rows(folder: Path) -> pd.DataFrame:
    """Every scored row of a folder of runs with what its record adds; seeds merged."""
    board = runs.scoreboard(folder)
    board = board[~board["run"].str.contains("07_reranking")]  # has a table of its own
    merged = runs.over_seeds(board)
    added = []
    for path in sorted(folder.glob("*/run.json")):
        record = runs.load(path.parent)
        for system in record["metrics"].get("rows") or [record["metrics"]]:
            name = f": {system['name']}" if "name" in system else ""
            run = path.parent.name.split("-seed")[0] + name
            added.append({"run": run, "px": pixels(record), "ms": system.get("ms")})
    added = pd.DataFrame(added).groupby("run", as_index=False).agg({"px": "first", "ms": "mean"})
    frozen = merged["run"].str.contains("frozen$")
    merged = merged.merge(added, on="run", how="left")
    merged.loc[frozen, "px"] = merged["px"].str.split().str[-1]  # trained at no size
    return merged


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of one task for reading."""
    shown = []
    for row in table.to_dict("records"):
        if row["seeds"] > 1:
            spread = f"{row['least']:.3f} to {row['most']:.3f} over {row['seeds']} seeds"
            score = f"{row['map_at_5']:.3f}, {spread}"
        else:
            score = interval(row["map_at_5"], row["map_at_5_low"], row["map_at_5_high"])
        cut = f" **(cut short {row['cut_short']})**" if row["cut_short"] else ""
        shown.append(
            {
                "run": row["run"].replace("tf_efficientnet_lite", "Lite") + cut,
                "px": row["px"],
                "mAP@5": score,
                "P@1": number(row["precision_at_1"]),
                "ms an image": number(row["ms"], ".1f"),
                "minutes, whole run": number(row["seconds"] / 60, ".1f"),
                "cores": row["hardware"].split()[0],
                "the study": reported(row["run"]),
            }
        )
    return pd.DataFrame(shown)


def subsets(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run and strategy, its three views beside each other."""
    parts = table["run"].str.extract(r"(?P<run>[^:]+): (?P<strategy>\w+), (?P<view>.+)")
    table = table.drop(columns="run").join(parts)
    table["size"] = [f"{q:,.0f} × {g:,.0f}" for q, g in zip(table.n_queries, table.n_gallery)]
    table["score"] = [
        interval(*values) for values in table[runs.SCORES[:3]].itertuples(index=False)
    ]
    shown = []
    for (run, strategy), group in table.groupby(["run", "strategy"]):
        views = group.set_index("view")
        row = {"run": run, "subset": strategy, "px": group["px"].iloc[0]}
        row["queries × own gallery"] = views["size"]["subset queries, subset gallery"]
        row |= {title: views["score"][view] for view, title in SUBSET_VIEWS.items()}
        row["minutes, whole run"] = f"{group['seconds'].iloc[0] / 60:.1f}"
        row["the study"] = reported(run)
        shown.append(row)
    return pd.DataFrame(shown)


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """One row a lever, the paired difference under each gallery in a column."""
    table = table.assign(
        change=[
            interval(*values, form="+.3f")
            for values in table[["difference", "low", "high"]].itertuples(index=False)
        ]
    )
    wide = table.pivot(index="run", columns="view", values="change")
    wide = wide[["test", "shop", "customer"]].reset_index()
    return wide.set_axis(["run", "whole gallery", "shop photos", "customer photos"], axis=1)


def ablation(record: dict) -> pd.DataFrame:
    """One row a method of notebook 07 with its difference to plain search."""
    shown = []
    for row in record["metrics"]["rows"]:
        change = interval(row["difference"], row["difference_low"], row["difference_high"], "+.3f")
        plain = row["name"] == "plain search"
        shown.append(
            {
                "method": row["name"],
                "setting": row["setting"],
                "mAP@5": interval(row["map_at_5"], row["map_at_5_low"], row["map_at_5_high"]),
                "difference": NO_VALUE if plain else change,
                "verdict": NO_VALUE if plain else row["verdict"],
                "ms an image": number(row["ms_per_image"], ".1f"),
                "seconds": number(row["seconds"], ".1f"),
                "MB": number(row["peak_mb"], ".0f"),
            }
        )
    return pd.DataFrame(shown)


def spread(path: Path) -> tuple[str, str]:
    """(a sentence for tables of trained networks, section) of benchmarks/spread.py; '' without."""
    if not path.is_file():
        return "", ""
    record = json.loads(path.read_text(encoding="utf-8"))
    found = pd.DataFrame(record["rows"])
    first = found[found["time"] == 1]
    shown, most = [], []
    for recipe, rows in first.groupby("recipe", sort=False):
        by_seed = rows[rows["threads"] == 1].sort_values("seed")["map_at_5"]
        by_threads = rows[rows["seed"] == 0].sort_values("threads")["map_at_5"]
        again = found[(found["recipe"] == recipe) & (found["time"] == 2)]["map_at_5"]
        scores = [", ".join(f"{x:.3f}" for x in part) for part in (by_seed, by_threads, again)]
        most.append([by_seed.max() - by_seed.min(), by_threads.max() - by_threads.min()])
        columns = ["seeds 0, 1, 2 by one thread", "seed 0 by 1, 2, 4 threads", "seed 0 again"]
        shown.append({"recipe": recipe} | dict(zip(columns, scores)))
    by_seed, by_threads = np.max(most, axis=0)
    sentence = (
        " An interval is of the queries alone: trained anew, small runs ended up to "
        f"{by_seed:.3f} apart by seed and {by_threads:.3f} by number of threads (*How far training "
        "spreads*)."
    )
    text = (
        f"`benchmarks/spread.py`, {record['data']}, {record['hardware']}: the recipes of "
        "`gap_seen-baseline` and `study_scratch-triplet-cosine`, in float32."
    )
    return sentence, section("How far training spreads", text, pd.DataFrame(shown))


def tasks(table: pd.DataFrame, sentence: str) -> list[str]:
    """A section for each task, the one with the most pairs of query and gallery photo first."""
    same_task = ["data", "protocol", "n_queries", "n_gallery"]
    table = table.drop_duplicates([*same_task, "px", *runs.SCORES])
    groups = sorted(table.groupby(same_task), key=lambda group: -group[0][2] * group[0][3])
    sections = []
    for (data, protocol, queries, gallery), group in groups:
        where = f"{queries:,.0f} queries × {gallery:,.0f} gallery photos"
        title = f"{data.capitalize()}, protocol `{protocol}`, {where}"
        sections.append(section(title, f"Best first.{sentence}", scores(group)))
    return sections


def levers(folder: Path, removed: bool, sentence: str) -> list[str]:
    """The paired differences on the groceries and on the toy set, of one kind of lever."""
    sections = []
    places = {"grocery": folder, "toy set of 24 products, version 2": folder / "toy"}
    for data, place in places.items():
        pairs = runs.against_baselines(place)
        if pairs.empty:
            continue
        pairs = pairs[pairs["run"].str.contains(REMOVED) == removed]
        title = f"{'Removed levers' if removed else 'Levers'}, one at a time: {data}"
        text = "Paired difference of mAP@5 to the sweep's baseline, by the gallery searched."
        sections.append(section(title, text + sentence, differences(pairs)))
    return sections


def regret(folder: Path, sentence: str) -> str:
    """One row a series: what its notebook 06 submitted, beside the best row of all its boards."""
    shown = []
    for series in sorted(path for path in folder.iterdir() if path.is_dir()):
        final = runs.load(series / "06_submission")
        board = runs.scoreboard(series)
        same = (board[["n_queries", "n_gallery"]] == [final["metrics"][n] for n in SIZES]).all(
            axis=1
        )
        best = board[same & board["run"].str.match(r"0\d")].iloc[0]
        score, asked = final["metrics"], final["validation"]
        shown.append(
            {
                "data": final["data"]["root"],
                "queries × gallery": f"{score['n_queries']:,} × {score['n_gallery']:,}",
                "chosen by": f"{asked['n_queries']} queries, {asked['how']}",
                "submitted": interval(*(score[name] for name in runs.SCORES[:3])),
                "best row of all boards": f"{best['map_at_5']:.3f}",
                "regret": f"{best['map_at_5'] - score['map_at_5']:.3f}",
                "against shop photos": number(score["rows"][-1].get("shop", float("nan"))),
                "minutes of 06": f"{final['seconds'] / 60:.1f}",
                "what": final["chosen"]["what"].replace("|", "\\|"),
            }
        )
    text = (
        "The submission of notebook 06 beside the best row that any notebook of its series shows. "
        "packages: 400 drawn queries of 100 drawn packages, one shop photo each; g81-shop: the "
        "groceries with their 81 shop photos as the whole gallery. The minutes of 06 are those of "
        "a cache that earlier notebooks, and of these two sets an earlier run, had filled."
    )
    return section("No regret", text + sentence, pd.DataFrame(shown))


def drawn(path: Path) -> str:
    """One row a data set: how drawn queries ordered the candidates, and what they chose."""
    shown = []
    for data in json.loads(path.read_text(encoding="utf-8")):
        tried = pd.DataFrame(data["rows"])
        order = tried["validation"].corr(tried["test"], method="spearman")
        shown.append(
            {
                "data": data["data"],
                "drawn queries": data["n_validation"],
                "candidates": len(tried),
                "rank correlation": f"{order:.2f}",
                "plain": f"{data['plain']:.3f}",
                "chosen: drawn": f"{tried['validation'][tried['chosen']].iloc[0]:.3f}",
                "chosen: true": f"{data['chosen']:.3f}",
                "best: true": f"{data['best']:.3f}",
                "regret": f"{data['regret']:.3f}",
            }
        )
    text = (
        "Where a product has one photo, queries are drawn from it to choose by. Their level is far "
        "too high; their order is nearly right. Frozen Lite0, all candidates of the climb in "
        "`benchmarks/choice.py --validation drawn`, on sets whose true queries have labels."
    )
    return section("Choosing by drawn queries", text, pd.DataFrame(shown))


def at_full_size(folder: Path) -> str:
    """What the series took at Products-10K's numbers, and what that means on Kaggle's T4 x2."""
    rehearsed = json.loads((folder / "rehearsal.json").read_text(encoding="utf-8"))
    t4 = json.loads((folder / "t4.json").read_text(encoding="utf-8"))
    shown = [
        {
            "notebook": row["notebook"],
            "minutes": f"{row['seconds'] / 60:.1f}",
            "peak memory, GB": f"{row['resident_gb']:.1f}",
            "address space, GB": f"{row['address_space_gb']:.1f}",
            "outputs so far, GB": f"{row['kept_gb']:.1f}",
            "scratch so far, GB": f"{row['scratch_gb']:.1f}",
        }
        for row in rehearsed["notebooks"]
    ]
    stages = [
        {
            "notebook": row["notebook"],
            "stage": stage["stage"],
            "seconds": f"{stage['seconds']:.0f}",
            "peak memory, GB": number(stage["resident_gb"], ".1f"),
            "disk, GB": number(stage["disk_gb"], ".1f"),
        }
        for row in rehearsed["notebooks"]
        for stage in row["stages"]
    ]
    networks = [
        {
            "network": row["network"],
            "px": row["px"],
            "GFLOP a photo": f"{row['gflop']:.1f}",
            "photos a second, a card": f"{t4['operations_a_second'] / row['gflop'] / 1e9:,.0f}",
            "in training": f"{t4['operations_a_second'] / row['gflop'] / 3e9:,.0f}",
        }
        for row in t4["networks"]
    ]
    minutes = pd.DataFrame(t4["notebooks"])
    sums = minutes.set_index("notebook").map("{:.0f}".format).reset_index()
    whole = minutes["minutes"][minutes["training"] + minutes["embedding"] > 0].sum() / 60
    sides = f"photos of {rehearsed['side']} px, {rehearsed['hardware']}"
    measured = (
        "`make rehearsal`: 9,691 products, 141,931 gallery photos and 55,000 queries, drawn, "
        f"{sides}; notebooks by the files of `params/kaggle_t4` with networks next to nothing at "
        "32 px, a pass or a few minutes of training; 01 alone by two threads, the others by one "
        "each, up to two at a time beside other work. The address space of each process was "
        "limited to 30 GB."
    )
    arithmetic = (
        "No T4 was timed. Minutes by sums (`benchmarks/t4.py`): *training* trainings × "
        "`max_minutes`, or epochs × photos × step where that is less; *embedding* passes × photos "
        "× the slower of the network on two cards and four cores that look at photos "
        f"({t4['look_ms']['none']:.1f} ms each, {t4['look_ms']['strong']:.1f} in training); "
        "*search* 2 × queries × gallery × dimensions at 4 TFLOP/s; *rehearsal* all minutes of the "
        "table above, so that what needs no network is counted as slow as there and some is "
        f"counted twice. A card is taken to do {t4['operations_a_second'] / 1e12:.0f} TFLOP/s in "
        "float16, a quarter of its data sheet; a step costs three passes. With a GPU "
        f"**{whole:.1f} hours** in all, the longest notebook {minutes['minutes'].max() / 60:.1f}; "
        "01 and 02 run without one."
    )
    sections = [
        section("The series at Products-10K's size", measured, pd.DataFrame(shown)),
        section("The same by stage", "Sections of the notebooks.", pd.DataFrame(stages)),
        section("`kaggle_t4` on T4 ×2, by arithmetic", arithmetic, sums),
        section("Networks of `kaggle_t4`", "Operations as counted.", pd.DataFrame(networks)),
    ]
    return "\n\n".join(sections)


UNKNOWN = "not looked into"
REASONS = {  # (group, contestant) -> why the kit falls short of what is asked there
    ("search", "floor"): "the k best are taken from every section of scores as it is computed; "
    "the smaller the gallery the more that weighs",
    ("search", "FAISS flat"): "torch's and FAISS's products differ by processor and by run; "
    "$VIPR_SEARCH=faiss takes the other",
    ("search", "usearch exact"): "torch's threads sleep between two calls, and to wake them takes "
    "longer than to search a small gallery",
    ("search", "scikit-learn"): "its product is the same one; what it can lose is the sorting",
    ("metrics", "torchmetrics, no interval"): "torchmetrics computes no interval, which "
    "takes most of the kit's time",
    ("pipeline", "floor"): "a photo is also copied out of the store",
    ("embedding", "floor"): "two cores load and compute: what loading takes is not hidden, and "
    "half precision makes the rest shorter",
    ("embedding", "naive loop"): "it computes the same float32 network by the same library",
    ("embedding", "pytorch-metric-learning"): "as the naive loop",
    ("embedding", "open-metric-learning"): "as the naive loop",
    (
        "training",
        "floor",
    ): "two cores augment and compute, and the floor has neither optimiser nor average",
    ("training", "naive loop"): "it computes the same float32 network by the same library",
}


def missed(row: pd.Series, seconds: pd.Series) -> dict[str, str]:
    """What the kit misses of what is asked in its row: contestant -> by how much."""
    short = {}
    for value in seconds.filter(like="floor: "):
        if row.get("of_floor") and row["seconds"] > row["of_floor"] * value:
            short["floor"] = f"{row['seconds'] / value:.2f} of {row['of_floor']}"
    for name, asked in row.get("rivals", {}).items():
        if name in seconds and seconds[name] < asked * row["seconds"]:
            short[name] = f"{seconds[name] / row['seconds']:.2f} of {asked:g}"
    return short


def beside_rivals(path: Path) -> str:
    """One row a comparison: the kit, the floor below it, and what rivals take beside it; behind the
    table what is asked and missed, and why.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    shown, misses = [], {}
    for what, group in pd.DataFrame(record["rows"]).groupby("what", sort=False):
        seconds = group.set_index("contestant")["seconds"]
        row = group.set_index("contestant").loc["kit"]
        floor = seconds.filter(like="floor: ")
        short = missed(row, seconds)
        for name, amount in short.items():
            misses.setdefault((row["group"], name), []).append(f"{what}: {amount}")
        others = seconds.drop(["kit", *floor.index]) / seconds["kit"]
        times = "; ".join(f"{name} {value:.2f}" for name, value in others.items())
        shown.append(
            {
                "what": what if len(row["runs"]) > 1 else f"{what} (one run)",
                "kit, ms": f"{1000 * row['seconds']:,.1f}",
                "MB beyond its inputs": number(row.get("peak_mb"), ",.0f"),
                "floor": ", ".join(floor.index.str.removeprefix("floor: ")) or NO_VALUE,
                "kit / floor": ", ".join(f"{row['seconds'] / x:.2f}" for x in floor) or NO_VALUE,
                "rivals, times as long as the kit": times or NO_VALUE,
                "misses": ", ".join(short) or NO_VALUE,
            }
        )
    found = {name: version for name, version in record["versions"].items() if version[0].isdigit()}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    machine = f"{record['hardware']}, {record['processor']}, {record['threads']} threads"
    text = (
        f"`make bench`: medians of {len(record['rows'][0]['runs'])} runs in turn, kit and rivals "
        f"in two processes on the same data; {machine}, photos: {record['data']}. {versions}."
    )
    lines = [
        f"- {name}, in {group}: {REASONS.get((group, name), UNKNOWN)}. {'; '.join(amounts)}."
        for (group, name), amounts in misses.items()
    ]
    table = section("Beside rivals and floors", text, pd.DataFrame(shown))
    return "\n\n".join([table, "What is asked and missed:", "\n".join(lines)])


def figures_of(title: str, text: str, found: list[tuple[str, str]]) -> str:
    """A section with a row for each (what, figure)."""
    return section(title, text, pd.DataFrame(found, columns=["what", "figure"]))


def catalogue_uses(series: Path) -> str:
    """What notebook 08 found on the photos of a series: a row a figure."""
    record = runs.load(series / "08_catalogue_uses")["metrics"]
    uses = record["uses"]
    told, strangers = uses["prediction"], uses["strangers"]
    interval = f"[{told['low']:.3f}, {told['high']:.3f}]"
    found = [
        ("product named right, all queries", f"{told['accuracy']:.3f}"),
        (
            f"product named right, the surest {told['coverage']:.0%}",
            f"{told['accuracy_at_coverage']:.3f} {interval}",
        ),
        ("expected calibration error", f"{told['calibration_error']:.3f}"),
        (
            f"{strangers['n_products']} products not sold here, frozen Lite0: AUROC",
            f"{strangers['auroc']:.3f}",
        ),
        ("strangers let in where 95 % of the others are", f"{strangers['fpr_at_95']:.3f}"),
    ]
    for how, scores in uses["clusters"].items():
        figures = "adjusted Rand {adjusted_rand:.3f}, NMI {nmi:.3f}, pairwise F1 {pairwise_f1:.3f}"
        found.append((f"clusters of the queries, {how}", figures.format(**scores)))
    for row in uses["propagation"]:
        figures = f"{row['spread']:.3f}; nearest labelled photo {row['nearest labelled photo']:.3f}"
        name = f"labels spread from {row['labelled a product']} a product, frozen Lite0"
        found.append((name, figures))
    for how, rows in uses["photos_a_product"].items():
        figures = "; ".join(f"{row['photos']}: {row['precision_at_1']:.3f}" for row in rows)
        found.append((f"first answer right by gallery photos a product, {how}", figures))
    for row in uses["slices"]:
        low, high = row["map_at_5_low"], row["map_at_5_high"]
        figures = f"{row['map_at_5']:.3f} [{low:.3f}, {high:.3f}]"
        name = f"mAP@5, {row['kind']}: {row['part']}, {row['n_queries']:,.0f} queries"
        found.append((name, figures))
    text = (
        f"Notebook 08, grocery, {record['n_queries']:,} queries × {record['n_gallery']:,} gallery "
        "photos, by what notebook 06 chose. Confidence is fitted on validation queries."
    )
    return figures_of("What ranked lists are good for", text, found)


def living_catalogue(path: Path) -> str:
    """Updates, kills and answers of an index, from benchmarks/catalogue.py."""
    record = json.loads(path.read_text(encoding="utf-8"))
    size = f"{record['rows']:,} × {record['dim']}"
    found = [
        (f"{what}, index of {size}", f"{seconds:.2f} s")
        for what, seconds in record["updates"].items()
    ]
    served, killed = record["served"], record["killed"]
    for what in ("search", "add"):
        figures = served[what]
        name = f"{what} over HTTP, {served['clients']} clients for {served['seconds']:.0f} s"
        times = f"{figures['p50_ms']:,.0f} ms, 99 % within {figures['p99_ms']:,.0f} ms"
        found.append((name, f"median {times}, {figures['requests']:,} requests"))
    found.append(("errors and lost updates among them", f"{served['errors']}, {served['lost']}"))
    name = f"{killed['kills']} kills at random moments of {killed['updates']} updates"
    figures = f"{killed['neither']} left something else than the version before or after"
    found.append((name, figures))
    text = (
        f"`benchmarks/catalogue.py`: {record['hardware']}. Vectors are drawn at random; over HTTP "
        "Lite0 embeds photos of 256 px at 224 px, and the index holds 10,000."
    )
    return figures_of("A catalogue that lives", text, found)


def soaked(path: Path) -> str:
    """What the long checks tried and what was lost, from tests/soak.py."""
    record = json.loads(path.read_text(encoding="utf-8"))
    lost = [part for part, found in record.items() if not found["passed"]]
    found = []
    if "calls" in record:
        cases = record["calls"]["told"]
        ways = {"fails": "failed", "is full": "found the disk full", "kills": "killed the process"}
        counts = [f"{sum(case[way] for case in cases):,} {name}" for way, name in ways.items()]
        name = f"system calls under {len(cases)} kinds of files, every one in turn"
        found.append((name, ", ".join(counts)))
    if "series killed" in record:
        told = record["series killed"]["told"][0]
        phases = ", ".join(f"{n} {phase}" for phase, n in told["kills"].items() if n)
        tried = f"{sum(told['kills'].values())} ({phases}); {told['ended']} came to their end"
        found.append(("kills of a series at random moments", tried))
    if "index killed" in record:
        found.append(("kills of updates of an index", str(KILLS)))
    if "long" in record:
        for told in record["long"]["told"]:
            megabytes = [told[when]["memory_mb"] for when in ("before", "after")]
            tried = "{:,.0f} MB after a quarter, {:,.0f} MB after all".format(*megabytes)
            found.append((f"{told['times']:,} {told['work']}, one process", tried))
    for part, name in (
        ("hostile", "tests of hostile files"),
        ("planted", "tests of planted faults"),
    ):
        if part in record:
            passed = record[part]["tests"].get("passed", 0)
            found.append((name, f"{passed:,} passed"))
    if "fuzz" in record:
        for told in record["fuzz"]["told"]:
            tried = f"{told['executions']:,} in {told['seconds']:,} s"
            found.append((f"executions of fuzzed {told['target']}", tried))
    if "mutants" in record:
        for told in record["mutants"]["told"]:
            tried = f"{told['mutants']:,}, of which {told['survive']:,} survive, with reasons"
            found.append((f"mutants of `{told['module']}`", tried))
    if "fiftieth" in record:
        minutes = record["fiftieth"]["minutes"]
        found.append(("the series by `params/kaggle_t4` at a fiftieth", f"{minutes:.0f} minutes"))
    hours = sum(part["minutes"] for part in record.values()) / 60
    hardware = next(iter(record.values()))["hardware"]
    text = (
        f"`make soak`: {hours:.1f} hours on {hardware}. A file must be that of before or after; "
        "what goes on must come to what was never interrupted; hostile files must meet documented "
        f"errors alone. What was lost: {', '.join(lost) or 'nothing'}."
    )
    return figures_of("Nothing lost, nothing silently wrong", text, found)


def read_packages(path: Path) -> str:
    """What reading gains beside the best without it, from benchmarks/reading.py."""
    record = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for row in record["rows"]:
        for part, scores in row["parts"].items():
            gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*scores["difference"])
            before, after = scores["precision_at_1"]
            cells = [row["task"], row["what"], part, scores["queries"]]
            cells += [f"{scores['without']:.3f}", f"{scores['with']:.3f}", gain]
            cells += [f"{before:.3f} → {after:.3f}"]
            if part == "all":
                cells.append(
                    f"{row['before']['another variant']} → {row['after']['another variant']}"
                )
            else:
                cells.append("")
            found.append(cells)
    rows = [row for row in record["rows"] if row["what"] == "the choice"]
    sure = ", ".join(r["task"] for r in rows if r["parts"]["all"]["difference"][1] > 0)
    names = ["task", "what", "queries of", "number", "without", "with", "gain", "P@1"]
    table = pd.DataFrame(found, columns=[*names, "another variant first"])
    text = (
        "Grocery and drawn packages whose lines differ by a word alone; frozen Lite0 at 224 px, "
        "no training; both sides chosen on validation, by the climb of notebook 06, reading among "
        f"its rungs or not. Beside the best without it the gain clears zero for: {sure or 'none'}. "
        "*Trained*: a Lite0 of notebook 04 by laptop's settings, 15 minutes, trained once (*How "
        "far training spreads*), takes part. Before the gallery is read 60 queries and ten photos "
        "at the head of each list are; reading stays where its gain on validation over the best "
        "without it clears zero. "
        f"{record['hardware']}."
    )
    return section("What is printed on packages", text, table)


def read_otherwise(path: Path) -> str:
    """Other ways to join text and embeddings, and products asked for by their names."""
    record = json.loads(path.read_text(encoding="utf-8"))
    table = pd.DataFrame(record["rivals"]).round(3)
    table = table.rename(columns={"way": "text joins by", "test": "mAP@5"})
    names, asked = record["names"], record["names"]["photo to name"]
    back = names["name to photo"]
    return section(
        "Text beside the embedding, and alone",
        f"Grocery, plain search, each way at the weight that validates best. **A product without "
        f"any photo**: of {names['queries']:,} queries that show packages the text names the right "
        f"one of {names['names']} products for {asked['first']:.0%}, and has it among five for "
        f"{asked['of five']:.0%}; a name finds a photo of its product first for "
        f"{back['first']:.0%}, among five for {back['of five']:.0%}.",
        table,
    )


def results(folder: Path = REFERENCE) -> str:
    """The tables of RESULTS.md."""
    table = rows(folder)
    removed = table["run"].str.contains(REMOVED)
    on_subset = table["run"].str.contains("subset queries|all queries")
    sentence, spreads = spread(folder / "spread.json")
    sections = [regret(folder / "series", sentence)] if (folder / "series").is_dir() else []
    if (folder / "drawn.json").is_file():
        sections.append(drawn(folder / "drawn.json"))
    if (folder / "series" / "grocery" / "08_catalogue_uses").is_dir():
        sections.append(catalogue_uses(folder / "series" / "grocery"))
    if (folder / "reading.json").is_file():
        path = folder / "reading.json"
        sections += [read_packages(path), read_otherwise(path)]
    if folder == REFERENCE and CATALOGUE.is_file():
        sections.append(living_catalogue(CATALOGUE))
    if folder == REFERENCE and SOAK.is_file():
        sections.append(soaked(SOAK))
    if folder == REFERENCE and BENCH.is_file():
        sections.append(beside_rivals(BENCH))
    if (folder / "rehearsal.json").is_file():
        sections.append(at_full_size(folder))
    if spreads:
        sections.append(spreads)
    sections += tasks(table[~removed & ~on_subset], sentence)
    if on_subset.any():
        text = (
            "Grocery, protocol `test`, 20 products, one core. Every row's own gallery is another: "
            "compare along a row. The whole gallery has 2,721 photos, all queries are 2,485."
        )
        sections.append(
            section("Fine-tuning on a subset", text + sentence, subsets(table[on_subset]))
        )
    if (folder / "07_reranking").is_dir():
        record = runs.load(folder / "07_reranking")
        minutes = f"{record['seconds'] / 60:.0f} minutes in all on one core beside other runs"
        text = f"Grocery, protocol `test`, 2,485 × 2,721, frozen Lite0, {minutes}."
        sections.append(section("Post-processing, notebook 07", text, ablation(record)))
    sections += levers(folder, False, sentence)
    if removed.any():
        sections.append("## Tried at v0.1 and removed")
        shown = scores(table[removed])
        shown.insert(1, "protocol", table["protocol"][removed].to_numpy())
        text = (
            "Object crops, centring by domain, cross-domain batches, and all of them: none cleared "
            "zero, or it hurt. Grocery, `test` 2,485 × 2,721 and `unseen` 289 × 2,432, one core; "
            "compare within a protocol."
        )
        sections.append(section("Removed levers, scores", text + sentence, shown))
        sections += levers(folder, True, sentence)
    return "\n\n".join(sections)


def inserted(page: str, tables: str) -> str:
    """The text with what stands between its result marks replaced."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no {START} ... {END}: put both marks where the tables belong")
    return f"{before}{START}\n{tables}\n{END}{after}"


if __name__ == "__main__":
    text = inserted((ROOT / "RESULTS.md").read_text(encoding="utf-8"), results())
    with whole_file(ROOT / "RESULTS.md") as part:
        part.write_text(text, encoding="utf-8")
