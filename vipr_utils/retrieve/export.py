"""An encoder as ONNX, for those who search without torch (extra `export`)."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vipr_utils.host.files import whole_file
from vipr_utils.retrieve.encoder import Encoder
from vipr_utils.retrieve.rerank import Projection

NEAR = 1e-4  # how far ONNX Runtime's embeddings may be from torch's
OPSET = 18


class _Projected(nn.Module):
    """x -> (x - mean) @ matrix, of length 1."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(projection.mean, dtype=torch.float32))
        matrix = projection.matrix
        matrix = None if matrix is None else torch.as_tensor(matrix, dtype=torch.float32)
        self.register_buffer("matrix", matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - self.mean
        return F.normalize(centred if self.matrix is None else centred @ self.matrix, dim=1)


class Network(nn.Module):
    """An encoder as one network: a view (B, 3, S, S) of uint8 for each look -> (B, D)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.looks = encoder.looks
        self.models = nn.ModuleList(look.model.eval() for look in encoder.looks)
        self.behind = nn.ModuleList(
            nn.Sequential(*map(_Projected, look.projections)) for look in encoder.looks
        )
        self.joined = nn.Sequential(*map(_Projected, encoder.projections))
        weights = torch.tensor([look.weight for look in encoder.looks])
        self.register_buffer("scales", (weights / weights.sum()).sqrt())

    def forward(self, *views: torch.Tensor) -> torch.Tensor:
        parts = []
        for i, (look, view) in enumerate(zip(self.looks, views)):
            model = self.models[i]
            features = model.features(view)
            x = features if look.features else model.neck(features)
            parts.append(self.behind[i](F.normalize(x.float(), dim=1)) * self.scales[i])
        return self.joined(F.normalize(torch.cat(parts, dim=1), dim=1))


def onnx(encoder: Encoder, path: Path) -> float:
    """Write the encoder to path; how far ONNX Runtime's embeddings are from torch's at most.

    Inputs view0, view1, ... (B, 3, S, S) uint8 RGB, one a look; output embedding (B, D) of length
    1. How a photo becomes a view stands in the metadata, as JSON under `views`: the central share
    of each side that is seen (of customers' and of shop photos), then squashed to S pixels by that
    interpolation. Raises ValueError, and leaves the old file, where it is further away than NEAR.
    """
    network = Network(encoder).eval()
    rng = np.random.default_rng(0)
    views = []
    for look in encoder.looks:
        shape = 2, 3, look.image_size, look.image_size
        views.append(torch.from_numpy(rng.integers(0, 256, shape, np.uint8)))
    with whole_file(Path(path)) as part:
        apart = _written(network, views, part, metadata(encoder))
        if not apart <= NEAR:
            raise ValueError(f"ONNX Runtime is {apart:.2g} away from torch, expected {NEAR:g}")
    return apart


def _written(network: Network, views: list[torch.Tensor], path: Path, about: dict) -> float:
    """Write the network and what is said of it; how far it is from torch at most."""
    import onnx as library

    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        torch.onnx.export(
            network,
            tuple(views),
            str(path),
            input_names=[f"view{i}" for i in range(len(views))],
            output_names=["embedding"],
            dynamic_shapes=(tuple({0: batch} for _ in views),),
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    model = library.load(str(path))
    library.helper.set_model_props(model, about)
    library.save(model, str(path))
    return _apart(network, path, views)


def _apart(network: Network, path: Path, views: list[torch.Tensor]) -> float:
    """The largest difference of ONNX Runtime's embeddings to torch's, of one photo and of all."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    apart = 0.0
    for n in (1, len(views[0])):
        some = [view[:n] for view in views]
        with torch.inference_mode():
            wanted = network(*some).numpy()
        given = {f"view{i}": view.numpy() for i, view in enumerate(some)}
        found = session.run(None, given)[0]
        apart = max(apart, float(np.abs(found - wanted).max()))
    return apart


def metadata(encoder: Encoder) -> dict[str, str]:
    """What is said in the file, all as text."""
    views = []
    for look in encoder.looks:
        record = look.model.record
        view = {
            "image_size": look.image_size,
            "seen_of_customers_photos": look.zoom[0],
            "seen_of_shop_photos": look.zoom[1],
            "fit": "squash",
            "interpolation": record["interpolation"],
            "backbone": record["name"],
            "weights": record["weights"],
        }
        views.append(view)
    return {"views": json.dumps(views), "similarity": "cosine", "made_by": "vipr_utils"}
