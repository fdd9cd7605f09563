"""From a feature map (B, C, H, W) to one vector (B, C) a photo."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

SCALES = 3  # of R-MAC's regions


class GeM(nn.Module):
    """Generalised mean over positions, (B, C, H, W) -> (B, C): mean(x^p)^(1/p).

    p = 1 is the average, p -> inf the maximum; it is learned, without weight decay.
    Source: Radenovic et al. 2018, arXiv:1711.02512.
    """

    def __init__(self, p: float = 3.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().clamp(min=1e-6)  # fp16 underflows at its power
        return x.pow(self.p).mean((2, 3)).pow(1.0 / self.p)


class RMAC(nn.Module):
    """Sum over regions of their whitened maxima, (B, C, H, W) -> (B, C), L2-normalised.

    Each region: maximum over its positions, L2, `whitening`, L2. The whitening is a linear layer
    that starts as the identity: train it, or fit it on photos with
    `embedding.fit_region_whitening`. On the grocery set's test, frozen EfficientNet-Lite0 at
    224 px, mAP@5: own pooling 0.458, GeM 0.425, maximum 0.372, R-MAC with the identity 0.526, with
    fitted whitening 0.465 (power 1) and 0.541 (power 0.5); `learned_whiten:64` behind the first
    and the fourth: 0.691, 0.741.
    Source: Tolias et al. 2016, arXiv:1511.05879 (regions); Gordo et al. 2017, arXiv:1610.07940
    (whitening as a layer).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.whitening = nn.Linear(channels, channels)
        nn.init.eye_(self.whitening.weight)
        nn.init.zeros_(self.whitening.bias)

    def regions(self, x: torch.Tensor) -> torch.Tensor:
        """(B, R, C): the L2-normalised maximum of every region, before whitening."""
        maxima = []
        for top, left, side in region_grid(*x.shape[2:]):
            region = x[:, :, top : top + side, left : left + side]
            maxima.append(region.amax((2, 3)))
        return F.normalize(torch.stack(maxima, 1).float(), dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Weak directions are raised: half precision is too coarse.
        with torch.autocast(x.device.type, enabled=False):
            whitened = F.normalize(self.whitening(self.regions(x)), dim=2)  # (B, R, C)
            return F.normalize(whitened.sum(1), dim=1)


def region_grid(height: int, width: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of R-MAC's square regions on a map, 14 of them on a square one.

    Scale l has side 2 min(H, W) / (l + 1) and l regions along the shorter side, l + m along the
    longer one, spread evenly; m is 0 on a square, else chosen so that neighbours at scale 1 overlap
    as close to 40 % as can be. Source: arXiv:1511.05879.
    """
    short, long = sorted((height, width))
    more = 0
    if long > short:
        more = min(range(1, 7), key=lambda m: abs(1 - (long - short) / m / short - 0.4))
    grid = []
    for scale in range(1, SCALES + 1):
        side = max(1, 2 * short // (scale + 1))
        rows = scale + more * (height > width)
        columns = scale + more * (width > height)
        grid += product(_starts(height, side, rows), _starts(width, side, columns), [side])
    return grid


def _starts(size: int, side: int, n: int) -> list[int]:
    return [i * (size - side) // max(1, n - 1) for i in range(n)]


POOLINGS = {  # name -> its layer for a map of so many channels
    "own": lambda channels: None,
    "gem": lambda channels: GeM(),
    "rmac": RMAC,
    "max": lambda channels: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
}
