"""Time and memory of exhaustive spatial verification.

    python benchmarks/verification.py [queries] [gallery]

Toy products, one shop photo each, and customer photos of them, on a ground of fine texture so that
every photo has its 1,000 keypoints, as photos from a phone do. Global scores are random: what ranks
the right photo first is geometry.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from vipr_utils.data import catalog, toy
from vipr_utils.host.device import hardware
from vipr_utils.retrieve import verification
from vipr_utils.retrieve.rerank import unit
from vipr_utils.retrieve.search import Search


def draw(root: Path, split: str, products: list[int]) -> None:
    """Photos of 640 px and their table."""
    (root / split).mkdir()
    for i, product in enumerate(products):
        photo = (
            toy.shop_photo(product, 0, 0, 640)
            if split == "train"
            else toy.customer_photo(product, i, 0, 480)
        )
        grain = (
            np.random.default_rng((i, len(split)))
            .normal(0, 1, (*photo.shape[:2], 1))
            .astype(np.float32)
        )
        photo = (
            (photo + 12 * cv2.GaussianBlur(grain, (0, 0), 2.0)[..., None] * 4)
            .clip(0, 255)
            .astype(np.uint8)
        )
        cv2.imwrite(str(root / split / f"{i}.jpg"), photo[..., ::-1])
    table = {"name": [f"{i}.jpg" for i in range(len(products))], "class": products, "group": 0}
    pd.DataFrame(table).to_csv(root / f"{split}.csv", index=False)


def main(n_queries: int = 400, n_gallery: int = 100) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), "train", list(range(n_gallery)))
        draw(Path(folder), "test", [i % n_gallery for i in range(n_queries)])
        photos, _ = catalog.read(folder)
        _, queries, gallery = catalog.split(photos, "test")
        rng = np.random.default_rng(0)
        embeddings = (unit(rng.normal(size=(len(rows), 8))) for rows in (queries, gallery))
        search = Search(*embeddings, queries, gallery, cache_dir=Path(folder) / "cache")
        search = search.searched(n_gallery)
        start = time.perf_counter()
        keypoints = [
            len(photo)
            for table in (queries, gallery)
            for photo in verification.features(table, cache_dir=search.cache_dir)
        ]
        seconds = {"features_s": time.perf_counter() - start}
        start = time.perf_counter()
        found = verification.verify(search, top=0)
        seconds["pairs_s"] = time.perf_counter() - start
    first = (
        gallery["product_id"].to_numpy()[found.ranks[:, 0]] == queries["product_id"].to_numpy()
    ).mean()
    each = {
        "ms_per_photo": seconds["features_s"] / len(photos) * 1e3,
        "ms_per_pair": seconds["pairs_s"] / found.ranks.size * 1e3,
    }
    sizes = {
        "keypoints": float(np.mean(keypoints)),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(
        json.dumps({"hardware": hardware(), "right_first": float(first)} | seconds | each | sizes)
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
