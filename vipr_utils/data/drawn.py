"""Queries to choose by where no photo can be spared: train photos as customers would take them."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from vipr_utils.data.store import decoders, read_image
from vipr_utils.data.transforms import customer_like, jpeg, shrunk
from vipr_utils.host.files import write_whole

VERSION = 1  # of the pictures: rises with the code that draws them, as does that of embeddings
LONGEST_PX = 640
COPIES = 4  # of a photo
OF_A_PRODUCT = 8
MOST = 400


def queries(photos: pd.DataFrame, *, first_row: int, cache_dir: Path) -> pd.DataFrame:
    """Catalog rows, numbered from first_row, of pictures drawn from the train photos of a catalog.

    Up to COPIES of a shop photo (where no domain is known, of any), OF_A_PRODUCT of a product and
    MOST in all, as many of each product as there can be: each is `customer_like` on the ground of
    another photo, one of a customer where there is one. split is 'drawn', source the image_id of
    the photo, path that of a JPEG in cache_dir. The same for every task on these photos.
    """
    train = photos[photos["split"] == "train"]
    root = Path(photos.attrs["root"])
    fingerprint = f"{photos.attrs['fingerprint']}-drawn{VERSION}"
    folder = Path(cache_dir).resolve() / "drawn" / fingerprint
    sources = _sources(train)
    customers = train["path"][train["domain"] != "shop"]
    grounds = (customers if len(customers) else train["path"]).to_list()
    names = sources["copy"].astype(str) + "/" + sources["name"]
    files = f"{folder}/" + names + ".jpg"

    with decoders() as pool:
        list(pool.map(partial(_draw, root, grounds), sources["path"], names, files))
    rows = sources.assign(
        source=sources["image_id"],
        image_id="drawn/" + names,
        name=names,
        path=files,
        split="drawn",
        domain="customer",
    )
    rows = rows.set_axis(range(first_row, first_row + len(rows)))
    rows.attrs = {"root": str(root), "fingerprint": fingerprint}
    return rows


def _sources(train: pd.DataFrame) -> pd.DataFrame:
    """The photos to be drawn, with the number of the copy: a turn of every product, then another.

    Which come first hangs on a fixed seed alone.
    """
    shop = train[train["domain"] == "shop"]
    sources = train if shop.empty else shop
    sources = sources.iloc[np.random.default_rng(0).permutation(len(sources))]
    copies = pd.concat([sources.assign(copy=copy) for copy in range(COPIES)])
    turn = copies.groupby("product_id").cumcount().to_numpy()
    order = np.argsort(turn, kind="stable")
    return copies.iloc[order[turn[order] < OF_A_PRODUCT][:MOST]]


def _draw(root: Path, grounds: list[str], path: str, name: str, file: str) -> None:
    """Write the picture of that name, unless it is there.

    All that is random in it hangs on the name alone.
    """
    if Path(file).is_file():
        return
    seed = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    at = int(rng.integers(len(grounds)))
    if grounds[at] == path:  # its own ground only where there is no other
        at = (at + 1) % len(grounds)
    picture = customer_like(_reduced(root / path), _reduced(root / grounds[at]), rng)
    write_whole(file, jpeg(picture, 95))


def _reduced(path: Path) -> np.ndarray:
    """A photo whose longer side has LONGEST_PX at most."""
    photo = read_image(path, least_px=LONGEST_PX)
    return shrunk(photo, LONGEST_PX / max(photo.shape))
