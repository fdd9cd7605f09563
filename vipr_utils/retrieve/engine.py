"""Frozen networks on a CPU by OpenVINO, where it is installed (extra `fast`): 1.9 times as fast in
float32 as torch, 3.6 times in bfloat16 (EfficientNet-Lite0 at 224 px, Intel Xeon with AMX)."""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vipr_utils.host.device import autocast

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
LEAST_PHOTOS = 1500  # of a store: fewer are embedded before a network is compiled

# oneDNN's limit on instruction sets, which OpenVINO observes in part only, and crashes
LIMIT = "ONEDNN_MAX_CPU_ISA"

# how far embeddings of length 1 may be from torch's of the same precision
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def pays(device: torch.device, dtype: torch.dtype, n_photos: int) -> bool:
    """Whether networks are compiled here."""
    if LIMIT in os.environ or n_photos < LEAST_PHOTOS or device.type != "cpu":
        return False
    return dtype in NAMES and importlib.util.find_spec("openvino") is not None


def without_telemetry():
    """OpenVINO, which sends nothing from here: it would report each conversion, by a process that
    waits for the network beside the computation.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # to be found missing, as it may be
    import openvino

    return openvino


def compiled_later(model, size: int, dtype: torch.dtype) -> Callable:
    """features(model, images (B, 3, S, S) uint8) -> (B, C), compiled when they are first asked for;
    torch's own where that fails.
    """

    @cache
    def forward() -> Callable:
        return compiled(model, size, dtype) or type(model).features

    return lambda model, images: forward()(model, images)


class _Bytes(nn.Module):
    """The features of photos (B, S, S, 3) uint8."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        return self.model.features(photos.permute(0, 3, 1, 2))


def compiled(model, size: int, dtype: torch.dtype) -> Callable | None:
    """features(model, images) for photos of this size; None, with a warning, where OpenVINO fails
    or finds something else than torch.
    """
    openvino = without_telemetry()
    settings = {
        "INFERENCE_PRECISION_HINT": NAMES[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    photos = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    try:
        network, example = _Bytes(model.eval()), torch.from_numpy(photos)
        with autocast(torch.device("cpu"), dtype), torch.no_grad():
            expected = network(example).float()
        with torch.autocast("cpu", enabled=False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing
            shape = [-1, size, size, 3]
            converted = openvino.convert_model(network, example_input=example, input=shape)
        run = openvino.Core().compile_model(converted, "CPU", settings)
        found = torch.from_numpy(run(photos)[0])
        apart = (F.normalize(found, dim=1) - F.normalize(expected, dim=1)).abs().max().item()
        if not apart <= NEAR[dtype]:
            raise ValueError(f"embeddings are {apart:.2g} away from torch's")
    except Exception as error:  # it has many ways to fail, and is never needed
        warnings.warn(f"torch embeds, not OpenVINO: {error}", stacklevel=2)
        return None
    return lambda _, images: torch.from_numpy(run(images.permute(0, 2, 3, 1).numpy())[0])
