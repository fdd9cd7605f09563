"""usage: vipr index COMMAND INDEX ..., INDEX being its folder; exit code 0, or 2 with what is wrong

build INDEX DATA         of a data root: networks, zooms and steps chosen on validation
add INDEX FOLDER         a folder for each product, or a data root whose train photos join
remove INDEX PRODUCT...  all photos of these products
search INDEX PHOTO...    files or folders of photos: what each shows, best first
versions INDEX           those to go back to
rollback INDEX [NUMBER]  go back to a version, or to the one before
export INDEX FILE        FILE.onnx: what embeds its photos, with --run a model card beside it;
                         FILE.faiss: its vectors, a table of their rows beside it
serve INDEX              answer over HTTP, this machine alone unless --host says more
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from vipr_utils.data import catalog, listing
from vipr_utils.host.files import whole_file
from vipr_utils.judge import card, runs
from vipr_utils.judge.choice import Choice
from vipr_utils.judge.task import Task
from vipr_utils.learn.models import WeightsError
from vipr_utils.retrieve import versions
from vipr_utils.retrieve.index import Index

ZOOMS = [1.0, 0.8, 0.65]
STACKS = ["product_votes(3)", "alpha_query_expansion(5, 3) + product_votes(5)"]


def build(given: argparse.Namespace) -> Index:
    """An index of a data root that answers as well as validation knows how to."""
    task = Task(
        *given.names[:1],
        gallery_domain=given.gallery_domain,
        seen_px=round((given.image_size or 224) / min(ZOOMS)),
        cache_dir=given.cache_dir,
    )
    choice = Choice.open(
        task,
        given.runs,
        backbones=given.backbones,
        image_size=given.image_size,
        max_minutes=given.max_minutes,
    )
    choice.climb(ZOOMS, STACKS, [])
    best = choice.indexable()
    return choice.index(
        given.index, best, validation=choice.score(best), data=catalog.describe_data(task.photos)
    )


def to_add(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(photos as `Index.add` takes them, strays: file, problem) of a data root's train photos, or
    of a folder with one for each product. Raises ValueError where there are none.
    """
    photos, strays = listing.listed(folder, "train")
    if photos.empty:
        photos, strays = listing.from_folder(folder, "train", ())
        photos["path"] = photos["name"]
    if photos.empty:
        raise ValueError(f"{folder} holds no photo of a product: put a folder for each into it")
    photos["path"] = [str(folder / path) for path in photos["path"]]
    return photos.rename(columns={"name": "photo", "class": "product"}), strays


def photos_of(paths: list[Path]) -> list[Path]:
    """The files named, and the photos below the folders named. Raises ValueError for none."""
    found = []
    for path in paths:
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [
            file for file in below if file == path or file.name.lower().endswith(listing.PHOTOS)
        ]
    if not found:
        raise ValueError(f"no photo in {', '.join(map(str, paths))}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """One command."""
    parser = argparse.ArgumentParser(
        "vipr index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "command",
        choices=["build", "add", "remove", "search", "versions", "rollback", "export", "serve"],
    )
    add("index", type=Path, help="its folder")
    add("names", nargs="*", help="data, folder, products, photos or a version: see above")
    add("-k", type=int, default=5, help="answers for each photo")
    add("--json", action="store_true", help="answers as JSON, a line for each photo")
    finished = "to build: finished runs whose networks take part"
    add("--runs", type=Path, default=Path("submissions"), help=finished)
    add("--backbones", nargs="*", default=["tf_efficientnet_lite0"], help="to build: frozen ones")
    add("--image-size", type=int, default=0, help="to build: pixels of frozen ones, 0 their own")
    add("--cache-dir", default="", help="to build: of packed photos and features")
    add("--gallery-domain", default="", help="to build: 'shop' to answer with shop photos alone")
    add("--max-minutes", type=float, default=0.0, help="to build: of choosing, 0 is no limit")
    add("--run", type=Path, help="to export: the run whose record the model card tells")
    add("--kind", choices=["flat", "ivfpq"], default="flat", help="to export: of FAISS's index")
    add("--host", default="127.0.0.1", help="to serve")
    add("--port", type=int, default=8000, help="to serve; 0 takes a free one")
    given = parser.parse_intermixed_args(arguments)
    try:
        for line in _lines(given):
            print(line, flush=True)
    except (ValueError, WeightsError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _lines(given: argparse.Namespace) -> Iterator[str]:
    """What the command made, found or changed."""
    folder, names = given.index, given.names
    if given.command == "build":
        index = build(given)
        yield f"{_state(index)}: {index.version.state['about']['what']}"
        return
    if given.command == "rollback":  # what is in force may be damaged
        versions.rollback(folder, int(names[0]) if names else 0)
    index = Index(folder)
    match given.command:
        case "add":
            for name in names:
                photos, strays = to_add(Path(name))
                problems = pd.concat([strays, index.add(photos)])
                yield from (f"left out: {row.file}: {row.problem}" for row in problems.itertuples())
            yield _state(index)
        case "remove":
            yield f"{index.remove(names):,} photos removed; {_state(index)}"
        case "search":
            yield from _answers(index, photos_of(list(map(Path, names))), given)
        case "versions":
            yield index.versions().to_string(index=False)
        case "rollback":
            yield _state(index)
        case "export":
            yield _exported(index, Path(names[0] if names else "model.onnx"), given)
        case "serve":
            _needs("fastapi", "fastapi uvicorn")
            from vipr_utils.run import serve

            opened = serve.listening(given.host, given.port)
            port = opened.getsockname()[1]
            yield f"{_state(index)}; http://{given.host}:{port}/docs, Ctrl-C ends it"
            serve.serve(index, opened)


def _exported(index: Index, file: Path, given: argparse.Namespace) -> str:
    """Write what embeds its photos, or their vectors."""
    if file.suffix == ".faiss":
        _needs("faiss", "faiss-cpu")
        return f"{file}: finds {index.to_faiss(file, given.kind):.1%} of the 10 nearest"
    _needs("onnxruntime", "onnx onnxruntime onnxscript")
    from vipr_utils.retrieve import export

    told = card.card(runs.load(given.run)) if given.run else ""
    apart = export.onnx(index.encoder, file)
    if told:
        with whole_file(file.with_name("README.md")) as part:
            part.write_text(told, encoding="utf-8")
    return f"{file}: at most {apart:.1e} from torch's embeddings"


def _needs(module: str, packages: str) -> None:
    """Raises ValueError where an extra is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this needs {module}: pip install {packages}")


def _state(index: Index) -> str:
    return (
        f"{index.folder}: version {index.version.number}, {len(index):,} photos of "
        f"{len(index.products):,} products"
    )


def _answers(index: Index, photos: list[Path], given: argparse.Namespace) -> Iterator[str]:
    """A line for each answer under that of its photo, or a line of JSON for each photo."""
    answers = index.search(photos, given.k)
    lists = dict(list(answers.lists.drop(columns="query").groupby(answers.lists["query"])))
    products = answers.products.set_index("query")
    for number, path in enumerate(photos):
        problem = answers.problems["problem"].get(number, "")
        table = lists.get(number, answers.lists[:0])
        told = {} if problem else products.loc[number].to_dict()
        if given.json:
            yield json.dumps(
                {
                    "photo": str(path),
                    "problem": problem,
                    **told,
                    "answers": table.to_dict("records"),
                }
            )
            continue
        yield f"{path}: {problem or _said(told)}"
        for row in table.itertuples():
            yield f"  {row.rank}  {row.similarity:.3f}  {row.product}  {row.photo}"


def _said(told: dict) -> str:
    """'milk, confidence 0.93', or that it is not in the catalogue."""
    if "there" not in told:
        return told["product"]
    nearest = f"{told['product']}, confidence {told['confidence']:.2f}"
    return nearest if told["there"] else f"not in this catalogue (nearest: {nearest})"
