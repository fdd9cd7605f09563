"""The device that computes: one that was seen to work, its threads, seeds and precision."""

import ctypes
import os
import platform
import random
import sys
import warnings

import joblib
import numpy as np
import psutil
import threadpoolctl
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

GPU_MENUS = {  # where a platform lends a card that works
    "kaggle": "Settings > Accelerator > GPU T4 x2",
    "colab": "Runtime > Change runtime type > T4 GPU",
}


def working_device(name: str = "auto") -> torch.device:
    """A device that was seen to work; 'auto' takes the accelerator there is, else the CPU.

    torch also lists cards that it has no kernels for (Kaggle's P100): only an operation tells.
    Raises RuntimeError when a named device does not work; 'auto' warns and goes on with the CPU.
    """
    if name != "auto":
        return _seen_to_compute(name)
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        try:
            return _seen_to_compute(accelerator.type)
        except RuntimeError as error:
            warnings.warn(f"running on the CPU: {error}", stacklevel=2)
    return torch.device("cpu")


def _seen_to_compute(name: str) -> torch.device:
    """The device, after a small convolution and matrix product; RuntimeError when they fail."""
    try:
        device = torch.device(name)
        image = torch.ones(1, 1, 8, 8, device=device)
        float(functional.conv2d(image, image) + (image @ image).sum())  # fetched: it has run
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"device {name!r} does not work: {reason}. Use 'auto' or 'cpu'; on Kaggle choose "
            f"{GPU_MENUS['kaggle']}"
        ) from error
    return device


def tune(threads: int = 0) -> None:
    """Set torch's threads and keep freed memory.

    threads 0: $OMP_NUM_THREADS, else the cores of this process.

    glibc gives large blocks back to the system after every step and faults them in again at the
    next: two thirds of the time of a naive CPU loop. Does nothing elsewhere; may be called twice.
    """
    # tqdm, where a notebook has no widgets
    warnings.filterwarnings("ignore", message="IProgress not found")
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    torch.set_num_threads(threads or int(asked or cores()))
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD first: older glibc refuses more than 32 MiB, and without it the next line
        # makes it worse
        if mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 1 << 26)  # M_TOP_PAD


def single_threaded() -> None:
    """Let no operation of this thread start others; for threads beside one that computes.

    Where OpenMP has more threads than cores they sleep between operations, and each waits for the
    others to wake: beside threads that loaded photos so a training step took 1.13 times as long.
    """
    torch.get_num_threads()  # its first call in a thread sets anew what the next line limits
    threadpoolctl.threadpool_limits(1, "openmp")


def cores() -> int:
    """Processors this process may use, by affinity and by a container's limits."""
    return joblib.cpu_count()


def compute_dtype(name: str, device: torch.device, *, training: bool = False) -> torch.dtype:
    """The format in which networks compute.

    The one named; 'auto' takes $VIPR_PRECISION, else what pays on this device.

    That is bfloat16 on GPUs from Ampere on, float16 on older ones (T4), float32 on a CPU without
    units for halves. With AMX it is bfloat16, with AVX512-BF16 bfloat16 for embedding alone
    (EfficientNet-Lite0 at 160 px on an EPYC: 10.8 against 17.4 ms an image, but 80 against 71 in
    training). Emulated halves are ten times slower. Raises ValueError for another name.
    """
    if name == "auto":
        name = os.environ.get("VIPR_PRECISION") or "auto"
    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name)
    if name != "auto":
        raise ValueError(
            f"precision {name!r} is unknown, by parameter or $VIPR_PRECISION: use 'auto', "
            "'float32', 'bfloat16' or 'float16'"
        )
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    pays = device.type == "cpu" and (amx or (avx512 and not training))
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


class DepthwiseInFloat32(TorchFunctionMode):
    """Convolutions with a channel a group compute in float32 on a CPU, whatever autocast says.

    Their gradients in bfloat16 take so long that a step of EfficientNet-Lite0 at 176 px took 31.6
    ms a photo on an Intel Xeon with AMX; 23.7 all in float32, 20.0 with these alone in it.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = kwargs or {}
        if function is not torch.conv2d or args[0].device.type != "cpu" or args[1].shape[1] > 1:
            return function(*args, **given)
        image, *others = args
        with torch.autocast("cpu", enabled=False):
            return function(image.float(), *others, **given).to(image.dtype)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; what the kit itself draws comes from explicit generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of what numbers may hang on; what is not loaded is left out."""
    packages = ("torch", "torchvision", "timm", "numpy", "pandas")
    loaded = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
    return {"python": platform.python_version(), **loaded}


def hardware() -> str:
    """'Tesla T4' or '2 cores, 24 GB': what a duration was measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    counted = "1 core" if cores() == 1 else f"{cores()} cores"
    return f"{counted}, {memory_gb()[0]:.0f} GB"


def memory_gb() -> tuple[float, float]:
    """(all, available) memory in GB (1e9 bytes)."""
    memory = psutil.virtual_memory()
    return memory.total / 1e9, memory.available / 1e9
