"""Six floors, one subject a room: the package stays small, plain and one-directional."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vipr_utils"
FLOORS = ["host", "data", "learn", "retrieve", "judge", "run"]
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)
NOT_IN_THE_PACKAGE = {
    "nbval",
    "pytest",
    "torchmetrics",
    "pytorch_metric_learning",
    "ranx",
    "oml",
}
PROGRESS = {("learn/training", "announce")}  # one line an epoch where no bar can be drawn


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def floor(module: str) -> int:
    """0 for host, 5 for run; the command stands on top of them."""
    return FLOORS.index(module.split("/")[0]) if "/" in module else len(FLOORS)


def imported(module: str) -> tuple[set[str], set[str]]:
    """(modules of the package as floor/name, other packages) that a module imports anywhere."""
    inside, outside = set(), set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vipr_utils":
            parts = node.module.split(".")[1:]
            inside |= (
                {"/".join(parts)}
                if len(parts) == 2
                else {"/".join([*parts, a.name]) for a in node.names}
            )
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {a.name.split(".")[0] for a in node.names}
    return inside, outside


def printing_functions(module: str) -> set[str]:
    """Outermost functions that call print; '' for the module itself."""
    found = set()
    for node in tree(module).body:
        if any(
            isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print" for n in ast.walk(node)
        ):
            found.add(getattr(node, "name", ""))
    return found


def test_package_has_six_floors_with_empty_inits_and_one_command():
    floors = [p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert sorted(p.name for p in floors) == sorted(FLOORS)
    assert not any((p / "__init__.py").read_text() for p in [PACKAGE, *floors])
    assert [m for m in MODULES if "/" not in m] == ["__main__"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_stay_on_the_floor_or_point_down(module):
    inside, _ = imported(module)
    assert inside <= set(MODULES), (
        f"{module} imports {sorted(inside - set(MODULES))}, which are no modules"
    )
    above = sorted(name for name in inside if floor(name) > floor(module))
    assert not above, f"{module} imports {above}, which stand above it"


def test_no_two_modules_import_each_other_even_by_way_of_others():
    below = {module: imported(module)[0] for module in MODULES}
    while free := [module for module, needed in below.items() if not needed]:
        below = {m: needed - set(free) for m, needed in below.items() if m not in free}
    assert not below, f"a circle among {sorted(below)}"


@pytest.mark.parametrize("module", MODULES)
def test_package_imports_nothing_that_only_tests_and_benchmarks_have(module):
    assert not imported(module)[1] & NOT_IN_THE_PACKAGE


@pytest.mark.parametrize("module", MODULES)
def test_only_notebooks_import_the_plots(module):
    inside, outside = imported(module)
    assert module == "judge/plots" or not {"judge/plots"} & inside | {"matplotlib"} & outside


@pytest.mark.parametrize("module", ["judge/metrics", "judge/submission"])
def test_metrics_and_submission_need_no_model_and_no_network(module):
    assert not imported(module)[1] & {"torch", "torchvision", "timm", "cv2", "PIL", "matplotlib"}


@pytest.mark.parametrize("module", MODULES)
def test_package_prints_only_in_command_lines_and_progress(module):
    allowed = {"main"} | {name for where, name in PROGRESS if where == module}
    assert printing_functions(module) <= allowed


def calls(module: str, name: str) -> list[ast.Call]:
    """Of something.name(...)."""
    found = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    return [call for call in found if getattr(call.func, "attr", "") == name]


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_unpickled_but_what_a_training_hands_to_its_own_processes(module):
    for call in calls(module, "load"):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("allow_pickle", "False") == "False"
        if ast.unparse(call.func) == "torch.load":
            assert given["weights_only"] == "True" or (
                module == "learn/training" and ast.unparse(call.args[0]) == "job"
            )
    assert not imported(module)[1] & {"marshal", "shelve", "dill", "cloudpickle"}


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_about(module):
    assert ast.get_docstring(tree(module))


def nodes(module: str) -> int:
    """Statements and expressions, docstrings aside: a size that packing lines does not change."""
    code = tree(module)
    found = sum(isinstance(node, (ast.stmt, ast.expr)) for node in ast.walk(code))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return found - 2 * sum(
        isinstance(n, documented) and ast.get_docstring(n) is not None for n in ast.walk(code)
    )


def lines(module: str) -> list[str]:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()


def sizes() -> dict[str, int]:
    size = {module: nodes(module) for module in MODULES}
    for module in MODULES:
        density = size[module] / len(lines(module))
        print(f"{module:24} {size[module]:6,} nodes {density:5.2f} a line")
    print(f"{sum(size.values()):,} nodes")
    return size


@pytest.mark.xfail(
    strict=True, reason="large sizes, sessions, the Kaggle loop and the index went over it"
)
def test_package_can_be_read_in_an_evening():
    assert sum(sizes().values()) <= 34_000


def test_package_grows_no_further():
    assert sum(sizes().values()) <= 54_890  # 51,920 before what is printed on packages was read


def test_lines_are_not_packed():
    assert max(n / len(lines(module)) for module, n in sizes().items()) <= 4.5


@pytest.mark.parametrize("module", MODULES)
def test_no_line_is_longer_than_100_columns(module):
    assert not [line for line in lines(module) if len(line) > 100]


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_40_lines(module):
    functions = [n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef)]
    length = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert not {name: n for name, n in length.items() if n > 40}
