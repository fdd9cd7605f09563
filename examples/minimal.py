"""Two folders in, five names out: python examples/minimal.py GALLERY QUERIES

GALLERY has a folder for each product, QUERIES holds photos of shoppers. Every shape is printed.
"""

import sys
from pathlib import Path

import torch

from vipr_utils.data.store import Packed, Photos, loader
from vipr_utils.data.transforms import Evaluation
from vipr_utils.learn import models
from vipr_utils.retrieve.search import top_k

gallery_folder, query_folder = map(Path, sys.argv[1:3])
gallery = sorted(path for path in gallery_folder.glob("*/*") if path.is_file())
queries = sorted(path for path in query_folder.rglob("*") if path.is_file())

model = models.create("tf_efficientnet_lite0")  # weights of ImageNet, from an installed package
transform = Evaluation(224, "squash", model.record["interpolation"])


def embed(files: list[Path]) -> tuple[torch.Tensor, list[Path]]:
    """(N, D) embeddings of length 1 of the files that can be read, and these files."""
    packed = Packed(files, store_px=352)
    for problem in packed.problems.itertuples():
        print(f"left out: {problem.file}: {problem.problem}")
    rows = packed.readable.nonzero()[0]
    found = []
    with torch.inference_mode():
        for images, _, _ in loader(Photos(packed, rows, transform), device="cpu"):
            print("images", tuple(images.shape), images.dtype)  # (B, 3, 224, 224) uint8
            found.append(model(images))
    return torch.cat(found), [files[row] for row in rows]


gallery_embeddings, gallery = embed(gallery)  # (G, 1280)
query_embeddings, queries = embed(queries)  # (Q, 1280)
print("gallery", tuple(gallery_embeddings.shape), "queries", tuple(query_embeddings.shape))
scores, ranks = top_k(query_embeddings, gallery_embeddings, k=5)  # both (Q, 5)
print("scores", scores.shape, "ranks", ranks.shape)
for query, found, similar in zip(queries, ranks, scores):
    names = [f"{gallery[row].parent.name} {score:.3f}" for row, score in zip(found, similar)]
    print(f"{query.name}: {', '.join(names)}")
