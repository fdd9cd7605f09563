"""Steps of post-processing, written as the calls they are: "k_reciprocal(k1=20, k2=6, weight=0.3)".

A step takes a Search and returns one. Those on embeddings change queries and gallery; those on
lists change scores and ranks, or expand queries by them. All are inductive, that is a query is
answered without a look at the other queries, save the one whose name says so.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import pandas as pd

from vipr_utils.retrieve import rerank, text, verification
from vipr_utils.retrieve.search import Prepared, Search

METHODS = {  # step -> what it is called in tables
    rerank.centring: "centring",
    rerank.pca: "PCA",
    rerank.whitening: "whitening",
    rerank.learned_whitening: "learned whitening",
    rerank.database_augmentation: "database augmentation",
    rerank.average_query_expansion: "average expansion",
    rerank.alpha_query_expansion: "alpha expansion",
    rerank.k_reciprocal: "k-reciprocal",
    rerank.transductive_k_reciprocal: "k-reciprocal (transductive)",
    rerank.product_votes: "product votes",
    verification.verify: "verification",
    verification.verified_expansion: "verified expansion",
    text.read: "reading",
}
STEPS = {function.__name__: function for function in METHODS}
PROJECTIONS = (rerank.centring, rerank.pca, rerank.whitening, rerank.learned_whitening)
DEPTH = 100  # photos in the lists that steps reorder
ON_PHOTOS = (verification.verify, verification.verified_expansion, text.read)
# lists of one query change by what joins or leaves the gallery near it alone
LOCAL = (rerank.average_query_expansion, rerank.alpha_query_expansion, rerank.product_votes)
ON_EMBEDDINGS = (*PROJECTIONS, rerank.database_augmentation)


def bind(step: str) -> partial:
    """The step's function with the numbers of the call, checked against its signature.

    Raises ValueError naming the step, what is wrong with it and what is expected.

    >>> bind("alpha_query_expansion(5, alpha=3)").keywords
    {'k': 5, 'alpha': 3}
    """
    try:
        call = ast.parse(step, mode="eval").body
        function = STEPS[call.func.id]
        positional = [ast.literal_eval(value) for value in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except Exception:  # Python has many words for what is no call
        forms = ", ".join(f"{name}({_numbers(function)})" for name, function in STEPS.items())
        raise ValueError(f"step {step!r} is unknown: write one as a call, of {forms}") from None
    signature = inspect.signature(function)
    expected = f"expected {call.func.id}({_numbers(function)})"
    try:
        numbers = dict(signature.bind(None, *positional, **named).arguments)
    except TypeError as error:
        raise ValueError(f"step {step!r}: {error}; {expected}") from None
    del numbers["search"]
    for name, value in numbers.items():
        whole = signature.parameters[name].annotation == "int"
        fits = type(value) is int if whole else type(value) in (int, float)
        if not fits or not 0 <= value < math.inf:
            kind = "a whole number" if whole else "a number"
            raise ValueError(f"step {step!r}: {name}={value!r}, {expected} with {kind} >= 0")
    return partial(function, **numbers)


def _numbers(function: Callable) -> str:
    """The signature without the search: 'k: int, alpha: float = 3.0'."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return ", ".join(str(parameter).replace("'", "") for parameter in parameters)


def split(stack: str) -> list[str]:
    """The steps of "a(...) + b(...)"; none of ""."""
    return [step.strip() for step in stack.split(" + ")] if stack else []


def check(steps: list[str]) -> list[partial]:
    """The bound steps. Raises ValueError for a wrong one, and for one on embeddings behind one on
    lists, which would throw the lists away."""
    bound = [bind(step) for step in steps]
    for before, step, after in zip(steps, steps[1:], bound[1:]):
        if after.func in ON_EMBEDDINGS and bind(before).func not in ON_EMBEDDINGS:
            raise ValueError(
                f"step {step!r} changes the embeddings but stands behind {before!r}, whose lists "
                "it would lose: put it first"
            )
    return bound


def apply(
    steps: list[str], search: Search, *, k: int = 5, depth: int = DEPTH
) -> tuple[Search, list[dict]]:
    """(the Search after these steps, its lists cut to k; [{step, seconds}]); [] is plain search.

    Steps on lists work on lists of max(k, depth) photos, or as many as are to be verified.
    """
    bound = check(steps)
    on_lists = [step for step in bound if step.func not in ON_EMBEDDINGS]
    tops = [step.keywords.get("top", 0) for step in on_lists]
    find = partial(Search.searched, k=max([k, depth, *tops]) if on_lists else k)
    plan = list(zip(steps, bound))
    if search.answers is not None:  # photos are compared with what may be answered alone
        looks = [step.func in ON_PHOTOS for step in bound]
        plan.insert((looks + [True]).index(True), ("narrow", Search.narrowed))
    plan.insert(len(bound) - len(on_lists), ("search", find))
    queries = rerank.unit(Prepared(search.queries, "query").rows)
    gallery = rerank.unit(Prepared(search.gallery).rows)
    search = replace(search, queries=queries, gallery=gallery)
    search, seconds = in_turn(plan, search)
    return replace(search, scores=search.scores[:, :k], ranks=search.ranks[:, :k]), seconds


def in_turn(plan: Iterable, search: Search) -> tuple[Search, list[dict]]:
    """(the Search after each (name, step) of a plan, [{step, seconds}])."""
    seconds = []
    for name, step in plan:
        began = perf_counter()
        search = step(search)
        seconds.append({"step": name, "seconds": perf_counter() - began})
    return search, seconds


def fitted(steps: list[str], gallery: np.ndarray, rows: pd.DataFrame) -> tuple:
    """The `rerank.Projection` that each of these projections is, fitted on a gallery (G, D) of
    length 1 and its catalog rows, one behind the other.
    """
    found = Search(gallery[:0], gallery, rows[:0], rows)
    for step in check(steps):
        found = step(found)
    return found.projections


def method(step: str) -> str:
    """What a step is called whatever its numbers: 'learned whitening'."""
    return METHODS[bind(step).func]


def transductive(steps: list[str]) -> bool:
    """Whether an answer depends on the other queries, which a shop that answers one has not."""
    return any(bind(step).func is rerank.transductive_k_reciprocal for step in steps)


def verified_pairs(steps: list[str]) -> int:
    """Photos of each list that these steps verify; 0 for other steps.

    A verified expansion verifies the whole list itself where nothing did before.
    """
    pairs = 0
    for step in map(bind, steps):
        if step.func is verification.verify:
            pairs += step.keywords["top"] or DEPTH
        elif step.func is verification.verified_expansion:
            pairs = pairs or DEPTH
    return pairs


def reads(steps: list[str]) -> bool:
    """Whether what is printed on photos takes part."""
    return any(bind(step).func is text.read for step in steps)


def local(steps: list[str]) -> bool:
    """Whether an index can answer by them: projections, then steps of LOCAL alone."""
    return all(bind(step).func in LOCAL for step in steps[fitted_first(steps) :])


def fitted_first(steps: list[str]) -> int:
    """How many steps at the head of the list are projections fitted on the gallery."""
    functions = [bind(step).func in PROJECTIONS for step in steps]
    return (functions + [False]).index(False)
