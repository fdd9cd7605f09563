"""The package stays flat, small and one-directional."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vipr_utils"
ORDER = [
    "host", "metrics", "submission", "runs", "catalog", "toy", "images", "sampling", "models", "losses", "search",
    "rerank", "verification", "embedding", "training", "labels", "plots", "batch", "report", "kaggle",
]  # fmt: skip
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
NOT_IN_THE_PACKAGE = {"papermill", "nbval", "pytest", "faiss", "torchmetrics", "pytorch_metric_learning", "ranx", "oml"}
PROGRESS = {("training", "fit")}  # one line an epoch where no bar can be drawn


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imported(module: str) -> tuple[set[str], set[str]]:
    """(modules of the package, other packages) that a module imports anywhere in it."""
    inside, outside = set(), set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "vipr_utils"):
            below = (node.module or "").removeprefix("vipr_utils").strip(".")
            inside |= {below} if below else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            inside |= {n[1] for n in names if n[0] == "vipr_utils"}
            outside |= {n[0] for n in names if n[0] != "vipr_utils"}
    return inside, outside


def printing_functions(module: str) -> set[str]:
    """Outermost functions that call print; '' for the module itself."""
    found = set()
    for node in tree(module).body:
        if any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print" for n in ast.walk(node)):
            found.add(getattr(node, "name", ""))
    return found


def test_package_is_flat_with_an_empty_init_and_only_known_modules():
    assert (PACKAGE / "__init__.py").read_text() == ""
    assert [p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"] == []
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_downward_only(module):
    below = set(ORDER[: ORDER.index(module)])
    inside, _ = imported(module)
    assert inside <= below, f"{module} imports {sorted(inside - below)}, which stand at or above it"


@pytest.mark.parametrize("module", MODULES)
def test_package_imports_nothing_that_only_tests_and_batch_runs_have(module):
    _, outside = imported(module)
    assert not outside & NOT_IN_THE_PACKAGE


@pytest.mark.parametrize("module", MODULES)
def test_only_notebooks_import_the_plots(module):
    inside, outside = imported(module)
    assert module == "plots" or not {"plots"} & inside | {"matplotlib"} & outside


@pytest.mark.parametrize("module", ["metrics", "submission"])
def test_metrics_and_submission_need_no_model_and_no_network(module):
    assert not imported(module)[1] & {"torch", "torchvision", "timm", "cv2", "PIL", "matplotlib"}


@pytest.mark.parametrize("module", MODULES)
def test_package_prints_only_in_command_lines_and_progress(module):
    allowed = {"main"} | {name for where, name in PROGRESS if where == module}
    assert printing_functions(module) <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_about(module):
    assert ast.get_docstring(tree(module))


def nodes(module: str) -> int:
    """Statements and expressions, docstrings aside: a measure of size that packing lines does not change."""
    code = tree(module)
    found = sum(isinstance(node, (ast.stmt, ast.expr)) for node in ast.walk(code))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return found - 2 * sum(isinstance(n, documented) and ast.get_docstring(n) is not None for n in ast.walk(code))


def test_package_can_be_read_in_an_evening():
    found = {module: nodes(module) for module in MODULES}
    assert sum(found.values()) < 37_700, found
