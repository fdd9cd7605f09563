"""The device that computes: one that was seen to work, its threads, seeds and precision."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import random
import re
import warnings
from pathlib import Path

import numpy as np
import torch


def working_device(name: str = "auto") -> torch.device:
    """A device that was seen to work; 'auto' takes CUDA, Apple's MPS, else the CPU.

    `cuda.is_available()` is also true for cards that the installed torch has no kernels for
    (Kaggle's P100): here a real operation runs and the card's capability is held against torch's
    list. Raises RuntimeError when a named device does not work; 'auto' warns and goes on with the
    CPU.
    """
    if name != "auto":
        if problem := _problem(name):
            raise RuntimeError(f"device {name!r} does not work: {problem}. 'auto' takes what does")
        return torch.device(name)
    if torch.cuda.is_available():
        if not (problem := _problem("cuda")):
            return torch.device("cuda")
        warnings.warn(f"the GPU cannot be used, running on the CPU: {problem}", stacklevel=2)
    if torch.backends.mps.is_available() and not _problem("mps"):
        return torch.device("mps")
    return torch.device("cpu")


def _problem(name: str) -> str:
    """Why this device cannot compute, '' when it can."""
    try:
        dev = torch.device(name)
        if dev.type == "cuda":
            capability, built = torch.cuda.get_device_capability(dev), torch.cuda.get_arch_list()
            if not _has_kernels(capability, built):
                return (
                    f"{torch.cuda.get_device_name(dev)} is sm_{capability[0]}{capability[1]}, "
                    f"torch {torch.__version__} has kernels for {', '.join(built)}. On Kaggle "
                    "choose Settings > Accelerator > GPU T4 x2"
                )
        x = torch.ones(8, 8, device=dev)
        if float((x @ x).sum()) != 512.0:
            return "a small matrix product came out wrong"
    except (RuntimeError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def _has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a card of this capability runs what was built.

    sm_* runs on the same major, PTX (compute_*) on later ones too.
    """
    listed = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch) for arch in built]
    listed = [
        (m[1], (int(m[2]), int(m[3]))) for m in listed if m
    ]  # ROCm's gfx* names say nothing here
    return not listed or any(
        oldest <= capability and (kind == "compute" or oldest[0] == capability[0])
        for kind, oldest in listed
    )


def tune(threads: int = 0) -> None:
    """Set torch's threads and keep freed memory.

    threads 0: $OMP_NUM_THREADS, else the cores of this process.

    glibc gives large blocks back to the system after every step and faults them in again at the
    next: two thirds of the time of a naive CPU loop. Does nothing elsewhere; may be called twice.
    """
    warnings.filterwarnings(
        "ignore", message="IProgress not found"
    )  # tqdm, where a notebook has no widgets
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    torch.set_num_threads(threads or (int(asked) if asked.isdigit() else 0) or cores())
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD first: older glibc refuses more than 32 MiB, and without it the next line
        # makes it worse
        if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 1 << 26)  # M_TOP_PAD


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_dtype(name: str, device: torch.device, *, training: bool = False) -> torch.dtype:
    """The format in which networks compute.

    The one named; 'auto' takes $VIPR_PRECISION, else what pays on this device.

    That is bfloat16 on GPUs from Ampere on, float16 on older ones (T4), float32 on a CPU without
    units for halves. With AMX it is bfloat16, with AVX512-BF16 bfloat16 for embedding alone
    (EfficientNet-Lite0 at 160 px on an EPYC: 10.8 against 17.4 ms an image, but 80 against 71 in
    training). Emulated halves are ten times slower. Raises ValueError for another name.
    """
    asked = os.environ.get("VIPR_PRECISION") or "auto" if name == "auto" else name
    if asked not in ("auto", "float32", "bfloat16", "float16"):
        source = "precision" if name != "auto" else "$VIPR_PRECISION"
        raise ValueError(
            f"{source} {asked!r} is unknown: use 'auto', 'float32', 'bfloat16' or 'float16'"
        )
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    units = (
        ("_is_amx_tile_supported",)
        if training
        else ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    pays = device.type == "cpu" and any(getattr(torch.cpu, unit, bool)() for unit in units)
    return torch.bfloat16 if pays else torch.float32


def precision_used(name: str, device: torch.device) -> dict[str, str]:
    """The `precision` entry of run.json: what `compute_dtype` gives for either use."""
    uses = ("embedding", "training")
    return {
        use: str(compute_dtype(name, device, training=use == "training")).removeprefix("torch.")
        for use in uses
    }


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Layers that gain by it compute in this half precision; with float32 none does."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; what the kit itself draws comes from explicit generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of what numbers may hang on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "numpy", "pandas"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """'Tesla T4' or '2 cores, 24 GB': what a duration was measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    gigabytes = memory_gb()[0]
    of = f"{cores()} cores" if cores() > 1 else "1 core"
    return of + (f", {gigabytes:.0f} GB" if gigabytes else "")


def memory_gb() -> tuple[float, float]:
    """(all, available) memory in GB (1e9 bytes); 0 where the system does not say."""
    everything = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        if hasattr(os, "sysconf")
        else 0.0
    )
    try:
        available = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        return everything, int(available[1]) * 1024 / 1e9
    except (OSError, TypeError):
        return everything, everything
