"""What a reader of the notebooks may rely on, checked without running them (`make nbval` runs
them).
"""

import ast
import json
import re
import statistics
from functools import cache
from pathlib import Path

import nbformat
import papermill
import pytest
import stamp
import yaml

from vipr_utils.run import params

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEMS = [n.stem for n in NOTEBOOKS]
PARAMETER_FILES = sorted((ROOT / "params").rglob("*.yaml"))
COMMON = {
    "data_root": "str",
    "output_dir": "str",
    "cache_dir": "str",
    "run_name": "str",
    "seed": "int",
    "device": "str",
    "protocol": "Literal[test, seen, unseen]",
    "image_size": "int",
    "batch_size": "int",
    "epochs": "int",
    "max_minutes": "float",
    "weights": "str",
}
DEFAULTS = {
    "data_root": "",
    "output_dir": "submissions",
    "cache_dir": "",
    "run_name": "",
    "seed": 0,
    "device": "auto",
}
OF_THIS_MACHINE = {"data_root", "output_dir", "cache_dir"}  # a parameter file need not repeat these
SILENT = {
    "tune",
    "seed_everything",
    "to_csv",
    "save_table",
}  # calls at the end of a cell that give nothing to look at
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|tmp|root|work|Users)/\S*")
REPOSITORY = stamp.ADDRESS.removeprefix("https://github.com/")

every_notebook = pytest.mark.parametrize("stem", STEMS)


@cache
def cells(stem: str) -> list[dict]:
    return json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(stem: str) -> list[dict]:
    return [c for c in cells(stem) if c["cell_type"] == "code"]


def tagged(stem: str, tag: str) -> list[str]:
    return [source(c) for c in code(stem) if tag in c["metadata"].get("tags", [])]


def outputs(stem: str) -> list[dict]:
    return [o for c in code(stem) for o in c["outputs"]]


def text_of(output: dict) -> str:
    data = {k: v for k, v in output.get("data", {}).items() if k.startswith("text/")}
    return "\n".join("".join(v) for v in [output.get("text", ""), *data.values()])


def length(cell: dict) -> int:
    """Lines a reader reads: blank ones do not count."""
    return sum(bool(line.strip()) for line in source(cell).splitlines())


def test_the_series_is_there():
    assert len(NOTEBOOKS) >= 8
    assert [s[:2] for s in STEMS[:7]] == [f"{i:02d}" for i in range(1, 8)] and STEMS[
        -1
    ] == "09_scoreboard"


# --------------------------------------------------------------------------- parameters, bootstrap


@every_notebook
def test_parameters_cell_has_the_common_names_with_one_meaning(stem):
    found = params.parameters_of(ROOT / "notebooks" / f"{stem}.ipynb")
    common = {name: kind for name, (kind, _) in found.items() if name in COMMON}
    assert common == {name: COMMON[name] for name in common}
    assert {"output_dir", "run_name"} <= set(common)
    assert {name: found[name][1] for name in DEFAULTS if name in found} == {
        name: value for name, value in DEFAULTS.items() if name in found
    }
    first = [name for name in COMMON if name in found]
    assert list(found)[: len(first)] == first, "the common names come first, in one order"


@every_notebook
def test_notebook_that_computes_with_a_network_has_the_precision_as_a_parameter(stem):
    computes = any(re.search(r"embedding\.|task\.", source(cell)) for cell in code(stem))
    found = params.parameters_of(ROOT / "notebooks" / f"{stem}.ipynb")
    assert found.get("precision") == (
        ("Literal[auto, float32, bfloat16, float16]", "auto") if computes else None
    )


@every_notebook
def test_papermill_finds_every_parameter_with_its_type_and_default(stem):
    found = params.parameters_of(ROOT / "notebooks" / f"{stem}.ipynb")
    shown = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{stem}.ipynb"))
    assert {name: s["inferred_type_name"] for name, s in shown.items()} == {
        name: kind for name, (kind, _) in found.items()
    }
    assert {name: ast.literal_eval(s["default"]) for name, s in shown.items()} == {
        n: d for n, (_, d) in found.items()
    }


@every_notebook
def test_parameter_line_says_its_unit_or_rule_and_papermill_can_read_it(stem):
    (parameters,) = tagged(stem, "parameters")
    for node in ast.parse(parameters).body:
        lines = parameters.splitlines()[node.lineno - 1 : node.end_lineno]
        assert re.fullmatch(r'\w+: (\w+|"(list\[)?[\w, +]+\[[\w, +]+\]{1,2}") = .*', lines[0]), (
            lines[0]
        )
        assert re.search(r"  # \w.{3,}$", lines[-1]), f"{lines[-1]!r} has no unit or rule"
        assert "".join(lines).count("=") == 1, f"a second '=' hides {lines} from papermill"


def test_one_bootstrap_cell_opens_every_notebook_with_the_same_bytes():
    found = {stem: tagged(stem, "bootstrap") for stem in STEMS}
    assert all(len(cells) == 1 for cells in found.values())
    assert {cells[0] for cells in found.values()} == {stamp.bootstrap()}, "make stamp writes it"
    tags = [["parameters"], ["bootstrap", "nbval-ignore-output"]]
    assert all([c["metadata"].get("tags") for c in code(stem)[:2]] == tags for stem in STEMS)


@every_notebook
def test_badges_and_bootstrap_cell_are_of_the_projects_address_and_release(stem):
    notebook = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    before = json.dumps(notebook)
    assert json.dumps(stamp.stamped(notebook)) == before, "make stamp"


def test_readme_has_both_badges_of_every_notebook_at_the_projects_address():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert stamp.badges(readme) == readme, "make stamp"
    for stem in STEMS:
        file = f"{REPOSITORY}/blob/main/notebooks/{stem}.ipynb"
        assert (
            readme.count(f"](https://kaggle.com/kernels/welcome?src=https://github.com/{file})")
            == 1
        )
        assert readme.count(f"](https://colab.research.google.com/github/{file})") == 1


def test_another_address_would_reach_every_badge(monkeypatch):
    monkeypatch.setattr(stamp, "ADDRESS", "https://github.com/some-one/else.where")
    badge = source(cells(STEMS[0])[0])
    assert stamp.badges(badge).count("github.com/some-one/else.where/blob/") == 1
    assert stamp.badges(badge).count("google.com/github/some-one/else.where/blob/") == 1
    assert REPOSITORY not in stamp.badges(badge)


@every_notebook
def test_smoke_parameters_are_the_notebooks_defaults(stem):
    values = yaml.safe_load((ROOT / "params" / "smoke" / f"{stem}.yaml").read_text()) or {}
    found = params.parameters_of(ROOT / "notebooks" / f"{stem}.ipynb")
    assert values == {name: found[name][1] for name in values}
    assert set(found) - OF_THIS_MACHINE <= set(values), "a default that the file does not write out"


@pytest.mark.parametrize("file", [str(f.relative_to(ROOT)) for f in PARAMETER_FILES])
def test_parameter_file_fits_its_notebook(file):
    found = params.load_runs([ROOT / file])
    assert found


# --------------------------------------------------------------------------------------- the story


@every_notebook
def test_header_has_title_badges_and_what_to_expect(stem):
    header = source(cells(stem)[0])
    assert re.match(rf"# {stem[:2]} · \S.*\n\n\*\*.+\?\*\*\n\S", header), (
        "title, then the question and its answer"
    )
    for badge in (
        f"https://kaggle.com/kernels/welcome?src=https://github.com/{REPOSITORY}/blob/main/"
        f"notebooks/{stem}.ipynb",
        f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{stem}.ipynb",
    ):
        assert f"]({badge})" in header
    assert re.search(
        r"^\| Reads \| Writes \| Time \| Expect \|\n\|[-|]+\|\n\|( [^|]{3,} \|){4}", header, re.M
    )


@every_notebook
def test_numbers_in_the_answer_stand_in_the_outputs(stem):
    answer = source(cells(stem)[0]).split("?**\n")[1].split("\n\n")[0]
    printed = " ".join(text_of(o) for o in outputs(stem))
    numbers = re.findall(r"\*\*([\d.,]+)(?: ?%)?\*\*", answer)
    assert numbers, "the answer names its number in bold"
    assert not [n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n)}", printed)]


@every_notebook
def test_footer_says_what_was_learned_and_leads_on(stem):
    text = "\n".join(source(c) for c in cells(stem) if c["cell_type"] == "markdown")
    assert "## What we learned" in text and "## What did not help" in text
    footer = source(cells(stem)[-1]).splitlines()[-1]
    place = STEMS.index(stem)
    previous, following = ([None, *STEMS, None][i] for i in (place, place + 2))
    link = {None: "../README.md"}
    assert re.search(rf"Previous: \[[^\]]+\]\({link.get(previous, f'{previous}.ipynb')}\)", footer)
    assert re.search(rf"Next: \[[^\]]+\]\({link.get(following, f'{following}.ipynb')}\)", footer)


@every_notebook
def test_links_lead_somewhere(stem):
    text = "\n".join(source(c) for c in cells(stem) if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / "notebooks" / path).is_file(), target
        assert not anchor or path or f'<a id="{anchor}"></a>' in text, target


@every_notebook
def test_code_cells_are_short(stem):
    lengths = [length(c) for c in code(stem)]
    told = lengths[2:]  # parameters and bootstrap are read once
    assert statistics.median(told) <= 6, sorted(told)
    assert max(lengths[1:]) <= 25, sorted(
        lengths
    )  # the parameters are a list: a line each, as many as are used


@pytest.mark.parametrize(
    "stem, most", [("04_pretrained_sweep", 24), ("05_subset_finetune", 24), ("07_reranking", 37)]
)
def test_notebook_is_short(stem, most):
    assert len(cells(stem)) <= most


@every_notebook
def test_code_assembles_no_keyword_dictionaries(stem):
    for cell in code(stem):
        for node in ast.walk(ast.parse(source(cell))):
            splatted = isinstance(node, ast.Call) and any(k.arg is None for k in node.keywords)
            formats = splatted and getattr(node.func, "attr", "") == "format"
            assert not splatted or formats, ast.unparse(node)


@every_notebook
def test_code_keeps_to_plain_imports(stem):
    for cell in code(stem):
        assert not re.search(r"^\s*[!%]|import \*", source(cell), re.M), source(cell)
        ast.parse(source(cell))


# ------------------------------------------------------------------------------- what is committed


@every_notebook
def test_notebook_file_is_valid_small_and_carries_nothing_that_changes(stem):
    file = ROOT / "notebooks" / f"{stem}.ipynb"
    assert file.stat().st_size < 500_000
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}, (
        "a Python version here changes with the machine"
    )
    assert all(set(c.metadata) <= {"tags"} for c in notebook.cells)


@every_notebook
def test_every_cell_was_run_from_top_to_bottom(stem):
    assert [c["execution_count"] for c in code(stem)] == list(range(1, len(code(stem)) + 1))


@every_notebook
def test_cell_that_ends_in_something_to_look_at_shows_it(stem):
    for cell in code(stem):
        last = ast.parse(source(cell)).body[-1]
        called = (
            last.value.func
            if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call)
            else None
        )
        name = getattr(called, "attr", getattr(called, "id", ""))
        if isinstance(last, ast.Expr) and name not in SILENT:
            assert cell["outputs"], f"nbval compares nothing here:\n{source(cell)}"


@every_notebook
def test_outputs_hold_no_error_and_no_warning(stem):
    for output in outputs(stem):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
        assert "Warning" not in text_of(output)


@every_notebook
def test_figure_has_an_alternative_text_with_its_numbers(stem):
    figures = [o for o in outputs(stem) if "image/png" in o.get("data", {})]
    assert figures or stem.startswith("09"), "a notebook shows something"
    for figure in figures:
        text = "".join(figure["data"].get("text/plain", ""))
        assert not text.startswith("<Figure") and len(text) > 30 and re.search(r"\d", text), text
        assert figure["metadata"]["image/png"]["alt"] == text


@every_notebook
def test_no_machine_path_in_sources_and_outputs(stem):
    for text in [source(c) for c in cells(stem)] + [text_of(o) for o in outputs(stem)]:
        assert not (found := MACHINE_PATH.search(text)), found[0]
