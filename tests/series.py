"""The notebooks' cells run in this process, without kernels: seconds where papermill takes minutes.

Their parameters are small here. What a cell ends in is shown as a notebook would show it.
"""

import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEMS = sorted(notebook.stem for notebook in (ROOT / "notebooks").glob("*.ipynb"))
REPRESENTATIONS = ("_repr_mimebundle_", "_repr_html_", "_repr_png_")
COMMON = {
    "device": "cpu",
    "precision": "float32",
    "image_size": 32,
    "batch_size": 16,
    "epochs": 1,
    "weights": "none",
    "backbone": "test_resnet",
    "backbones": ["test_resnet"],
}
SMALL = {
    "01_eda": {"max_images": 60},
    "02_augmentation_preview": {"n_images": 4},
    "03_scratch_siamese": {
        "losses": ["triplet"],
        "distances": ["cosine"],
        "network": "test_resnet",
        "embedding_dim": 16,
    },
    "04_pretrained_sweep": {
        "test_size": 32,
        "head_epochs": 2,
        "whitening_dim": 8,
    },
    "05_subset_finetune": {"n_products": 3},
    "06_submission": {
        "zooms": [1.0, 0.8],
        "most_runs": 1,
        "stacks": ["k_reciprocal(5, 2, 0.3) + product_votes(3)"],
        "verified": ["verify(5) + product_votes(3)"],
    },
    "07_reranking": {
        "candidates": [
            "learned_whitening(8)",
            "k_reciprocal(5, 2, 0.3)",
            "verify(5)",
        ],
        "zooms": [1.0],
        "stacks": ["product_votes(3)"],
        "verified": ["verify(5) + product_votes(3)"],
        "poolings": ["gem"],
        "resolutions": [24],
        "multi_sizes": [],
        "clean_similarity": 0.5,
    },
}


def run(stem: str, **values) -> dict:
    """The names of a notebook after its last cell; values: parameters beside the small ones."""
    notebook = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    names = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            execute("".join(cell["source"]), f"{stem}[{cell['id']}]", names)
        if "parameters" in cell["metadata"].get("tags", []):
            given = COMMON | SMALL.get(stem, {}) | values
            names |= {name: given[name] for name in given if name in names}
    return names


def execute(source: str, place: str, names: dict) -> None:
    """Run a cell; if it ends in an expression, show its value."""
    tree = ast.parse(source, place)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, place, "exec"), names)
    if last:
        value = eval(compile(ast.Expression(last.value), place, "eval"), names)
        for representation in REPRESENTATIONS:
            getattr(value, representation, value.__repr__)()
