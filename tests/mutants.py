"""Change the package in one place at a time, and tell which changes no test notices.

    python tests/mutants.py judge/metrics learn/losses      one line for each survivor
    python tests/mutants.py --list judge/metrics            the mutants, nothing is run

The mutants are mutmut's (`pip install mutmut`), which drop arguments, swap operators and change
numbers and texts, and four kinds of our own. Texts of errors are left as they are. The fitting test
files run for each mutant, in a fork of a process that has imported what they need. Exit code 1
where a mutant survives that `tests/survivors.yaml` does not list with its reason: a line is known
there by what it says, not by its number.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import pytest
import yaml

try:
    import libcst as cst
    from libcst.metadata import MetadataWrapper
    from mutmut.mutation.mutators import mutation_operators
except ImportError as error:
    sys.exit(f"{error}: the mutants come from mutmut. Install it: pip install mutmut")

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "vipr_utils"
LISTED = TESTS / "survivors.yaml"
FILES = {
    "judge/metrics": ["test_metrics.py"],
    "judge/submission": ["test_submission.py"],
    "judge/task": ["test_task.py"],
    "learn/losses": ["test_losses.py"],
    "learn/sampling": ["test_sampling.py"],
    "retrieve/search": [
        "test_search.py",
        "test_by_faiss.py::test_faiss_finds_what_torch_finds",
        "test_by_faiss.py::test_environment_asks_for_an_engine",
        "test_by_faiss.py::test_no_queries_and_queries_without_an_id_are_searched_too",
    ],
}
SAYS = {"__repr__", "_repr_html_", "describe"}  # what a person reads, no more
WITHOUT = [part for name in ("cacheprovider", "xdist", "nbval") for part in ("-p", f"no:{name}")]
MEMORY = 8 * 2**30  # bytes, for a mutant whose loop has no end


class Mutant(NamedTuple):
    was: str  # the lines that change, each without its indentation, in one
    now: str
    line: int
    code: str  # of the whole module


# ---------------------------------------------------------------------------------- what is changed


def one_less(node: cst.Integer) -> Iterator[cst.CSTNode]:
    """mutmut adds one."""
    if node.evaluated_value > 0:
        yield node.with_changes(value=str(node.evaluated_value - 1))


def other_way(node: cst.If | cst.While | cst.CompIf) -> Iterator[cst.CSTNode]:
    """if x -> if not x"""
    brackets = {"lpar": [cst.LeftParen()], "rpar": [cst.RightParen()]}
    opposite = cst.UnaryOperation(cst.Not(), node.test.with_changes(**brackets))
    yield node.with_changes(test=opposite)


def without_a_call(node: cst.Call) -> Iterator[cst.CSTNode]:
    """x.f(y) -> x"""
    if isinstance(node.func, cst.Attribute):
        yield node.func.value


def without_a_bound(node: cst.Slice) -> Iterator[cst.CSTNode]:
    """x[a:b] -> x[:b] and x[a:]"""
    for bound in ("lower", "upper"):
        if getattr(node, bound) is not None:
            yield node.with_changes(**{bound: None})


OPERATORS = [
    *mutation_operators,
    (cst.Integer, one_less),
    ((cst.If, cst.While, cst.CompIf), other_way),
    (cst.Call, without_a_call),
    (cst.Slice, without_a_bound),
]


class Changes(cst.CSTVisitor):
    """pairs: (node, what takes its place), texts of errors and types aside."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(
            node, cst.Raise | cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom
        ):
            return False
        if isinstance(node, cst.FunctionDef) and node.name.value in SAYS:
            return False
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                others = list(operator(node))
                if isinstance(node, cst.BaseString):
                    others = others[:1]  # the others are of another case
                self.pairs += [(node, other) for other in others]
        return True


def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module, one of those that are the same."""
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    tree = MetadataWrapper(cst.parse_module(source)).module
    found = {}
    for statement in tree.body:
        part = tree.code_for_node(statement)
        changes = Changes()
        statement.visit(changes)
        for node, other in changes.pairs:
            changed = cst.Module([statement.deep_replace(node, other)]).code
            code = source.replace(part, changed, 1)
            if code != source and code not in found and is_python(code):
                found[code] = Mutant(*difference(source.splitlines(), code.splitlines()), code)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def is_python(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def difference(old: list[str], new: list[str]) -> tuple[str, str, int]:
    """(lines that were, lines that are, number of the first of them)."""
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    was, now = (
        " ".join(line.strip() for line in lines[first : len(lines) - last]) for lines in (old, new)
    )
    return was, now, first + 1


# ------------------------------------------------------------------------------------ how it is run


class Plugin:
    """Runs the tests as they are, then again in a fork for each mutant, the quickest first.

    A fork has all that the tests import, and what a session makes for them.
    """

    def __init__(self, module: str, made: list[Mutant]) -> None:
        self.module, self.made = module, made
        self.seconds = Counter()  # of each test, as it is
        self.failed = False
        self.left, self.killed = [], Counter()

    def pytest_runtest_logreport(self, report) -> None:
        self.failed = self.failed or report.failed
        if report.when == "call":
            self.seconds[report.nodeid] += report.duration

    def pytest_runtestloop(self, session) -> bool:
        if session.config.option.collectonly:
            return True
        self.run(session.items, session)
        tests = sorted(session.items, key=self.effort)
        source = (PACKAGE / f"{self.module}.py").read_text(encoding="utf-8")
        if self.failed or self.in_a_fork(tests, session, source, limit_s=600):
            raise pytest.UsageError(f"the tests of {self.module} fail as it is")
        gc.freeze()  # forks share what is here already
        limit_s = 10 + int(4 * sum(self.seconds.values()))
        for mutant in self.made:
            status = self.in_a_fork(tests, session, mutant.code, limit_s=limit_s)
            self.note(mutant, status)
        return True

    def effort(self, test) -> float:
        """Seconds; a task takes some to make."""
        return self.seconds[test.nodeid] + 5 * ("task" in test.fixturenames)

    def note(self, mutant: Mutant, status: int) -> None:
        if status:
            self.killed["by time" if os.WIFSIGNALED(status) else "by tests"] += 1
            return
        self.left.append(mutant)
        print(f"{self.module}:{mutant.line}\n  - {mutant.was}\n  + {mutant.now}", flush=True)

    def run(self, tests: list, session) -> None:
        """All of them, or up to the first that fails; what the session made for them stays."""
        for test, following in zip(tests, [*tests[1:], session]):
            test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            if self.failed:
                return

    def in_a_fork(self, tests: list, session, code: str, *, limit_s: int) -> int:
        """Wait status of the tests with this code of the module: 0 where all of them pass."""
        child = os.fork()
        if not child:
            signal.alarm(10 * limit_s)  # of waiting
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1), os.dup2(nothing, 2)
            try:
                put_in_place(self.module, code)
                self.run(tests, session)
            except BaseException:
                os._exit(1)
            os._exit(int(self.failed))
        return os.waitpid(child, 0)[1]


def put_in_place(module: str, code: str) -> None:
    """Functions, methods and values of a module become those of this code, wherever they are known
    already.
    """
    name = "vipr_utils." + module.replace("/", ".")
    old, new = sys.modules[name], {"__name__": name}
    exec(compile(code, old.__file__, "exec"), new)
    for key, value in new.items():
        before = vars(old).get(key, value)
        if key.startswith("__") or before is value:
            continue
        if isinstance(value, type) and value.__module__ == name:
            for method, function in vars(value).items():
                change(vars(before).get(method), function)
        elif not change(before, value):
            for name_of, other in list(sys.modules.items()):
                if name_of.startswith("vipr_utils") and vars(other).get(key) is before:
                    setattr(other, key, value)


def change(before, function) -> bool:
    """Give a function of ours the code and the defaults of another."""
    if isinstance(function, property):
        return change(before.fget, function.fget)
    if not isinstance(function, FunctionType):
        return False
    before.__code__ = function.__code__
    before.__defaults__ = function.__defaults__
    before.__kwdefaults__ = function.__kwdefaults__
    return True


def survivors(module: str, only: str) -> list[Mutant]:
    """The mutants of a module that no test notices."""
    began = time.monotonic()
    plugin = Plugin(module, [mutant for mutant in mutants(module) if only in mutant.was])
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{TESTS}/{name}" for name in FILES[module]]
        arguments = [*files, "-q", "-s", *WITHOUT, f"--basetemp={folder}/tests"]
        if pytest.main(arguments, [plugin]):
            sys.exit(f"{module}: no mutant was tried")
    told = {"module": module, "mutants": len(plugin.made), "killed by": dict(plugin.killed)}
    told |= {"survive": len(plugin.left), "seconds": round(time.monotonic() - began)}
    print(json.dumps(told), flush=True)
    return plugin.left


def unlisted(module: str, left: list[Mutant]) -> list[Mutant]:
    """Those that the list of survivors gives no reason for."""
    reasons = yaml.safe_load(LISTED.read_text(encoding="utf-8")).get(module) or {}
    listed = {(pair["was"], pair["now"]) for pairs in reasons.values() for pair in pairs}
    return [mutant for mutant in left if (mutant.was, mutant.now) not in listed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(FILES), metavar="module")
    parser.add_argument("--list", action="store_true", help="the mutants, nothing is run")
    parser.add_argument("--only", default="", help="lines that hold this text")
    given = parser.parse_args()
    new = []
    os.environ["VIPR_GROCERY"] = os.devnull  # photos of the real set take minutes
    for module in given.modules or FILES:
        if given.list:
            for mutant in mutants(module):
                print(f"{module}:{mutant.line}\n  - {mutant.was}\n  + {mutant.now}")
        else:
            new += unlisted(module, survivors(module, given.only))
    print(f"{len(new)} survivors are not in {LISTED.name}")
    return int(bool(new))


if __name__ == "__main__":
    sys.exit(main())
