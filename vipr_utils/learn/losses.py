"""Contrastive and triplet losses under three distances, and the ArcFace family.

Embeddings (B, D) are L2-normalised by the model; labels (B,) are integers. Every loss is a scalar
in float32: half precision is left before any distance is taken. Margins carry the unit of their
distance: cosine in [0, 2], euclidean in [0, 2], manhattan in [0, 2 sqrt(D)].
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

DISTANCES = ("cosine", "euclidean", "manhattan")
LOSSES = ("contrastive", "triplet", "arcface", "adaptive_arcface", "arcface+triplet")


def distance_matrix(x: torch.Tensor, y: torch.Tensor, distance: str = "cosine") -> torch.Tensor:
    """Pairwise distances (B, D), (C, D) -> (B, C), smaller is nearer.

    cosine: 1 - <x, y> / (|x| |y|). euclidean: |x - y|_2. manhattan: |x - y|_1.
    """
    x, y = x.float(), y.float()
    if distance == "cosine":
        return 1.0 - F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    if distance == "euclidean":  # the exact form: the fast one loses small distances to rounding
        return torch.cdist(x, y, p=2.0, compute_mode="donot_use_mm_for_euclid_dist")
    if distance == "manhattan":
        return torch.cdist(x, y, p=1.0)
    raise ValueError(f"distance {distance!r} is unknown: use one of {DISTANCES}")


def default_margin(loss: str, distance: str, embedding_dim: int) -> float:
    """A margin for 'contrastive' or 'triplet' in the distance's own unit.

    Two random unit vectors in many dimensions lie at cosine 1, euclidean sqrt(2), manhattan
    1.13 sqrt(D). Contrastive asks for half of that between different products, triplet for a fifth.
    """
    random = {
        "cosine": 1.0,
        "euclidean": math.sqrt(2.0),
        "manhattan": math.sqrt(4.0 * embedding_dim / math.pi),
    }
    share = {"contrastive": 0.5, "triplet": 0.2}
    return share[loss] * random[distance]


def criterion(
    loss: str,
    distance: str,
    embedding_dim: int,
    *,
    margin: float = 0.0,
    mining: str = "batch_hard",
    counts=None,
):
    """The loss of that name for training.fit: (embeddings, labels) -> (loss, active or accuracy).

    margin 0 takes default_margin, or 0.3 radians for ArcFace; mining is for triplets. counts (C,)
    images per label are what the ArcFace family needs, with three sub-centres a class:
    adaptive_arcface sets its margins by them; arcface+triplet adds a triplet loss to the
    classification (metric-guided: Bai 2020, arXiv:2008.10545).
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is unknown: use one of {LOSSES}")
    if loss in ("contrastive", "triplet"):
        margin = margin or default_margin(loss, distance, embedding_dim)
        if loss == "contrastive":
            return partial(contrastive, distance=distance, margin=margin)
        return partial(triplet, mining=mining, distance=distance, margin=margin)
    if counts is None:
        raise ValueError(f"loss {loss!r} needs counts, the images of each label")
    margins = adaptive_margins(counts) if loss == "adaptive_arcface" else margin or 0.3
    guide = None
    if loss == "arcface+triplet":
        guide = criterion("triplet", distance, embedding_dim, mining=mining)
    return ArcFace(embedding_dim, len(counts), margin=margins, subcentres=3, guide=guide)


def contrastive(
    embeddings, labels, *, distance: str = "cosine", margin: float
) -> tuple[torch.Tensor, float]:
    """(loss, share of negative pairs inside the margin).

    Mean over positive pairs of d^2 / 2 plus mean over negative pairs inside the margin of
    (margin - d)^2 / 2, all pairs of the batch. Batches with no pair of a kind add 0 for it.
    Source: Hadsell, Chopra, LeCun 2006; the negative mean runs over active pairs, which are few
    late in training.
    """
    d = distance_matrix(embeddings, embeddings, distance)
    same, different = _pairs(labels)
    hinge = (margin - d).clamp(min=0)
    active = different & (hinge > 0)
    loss = 0.5 * _mean(d.square(), same) + 0.5 * _mean(hinge.square(), active)
    return loss, _share(active, different)


def triplet(
    embeddings, labels, *, distance: str = "cosine", margin: float, mining: str = "batch_hard"
) -> tuple[torch.Tensor, float]:
    """(loss, share of active triplets): mean over the active of max(0, d(a, p) - d(a, n) + margin).

    mining: 'all' valid triplets of the batch; 'semi_hard': for each (a, p) the nearest negative
    farther than the positive but inside the margin (Schroff et al. 2015, arXiv:1503.03832), pairs
    without one left out; 'batch_hard': farthest positive and nearest negative of each anchor
    (Hermans et al. 2017, arXiv:1703.07737).
    """
    d = distance_matrix(embeddings, embeddings, distance)
    same, different = _pairs(labels)
    positive = d.masked_fill(~same, -torch.inf)  # what is missing makes the gap -inf
    negative = d.masked_fill(~different, torch.inf)
    if mining == "batch_hard":  # (B,) by anchor
        gap = positive.amax(1) - negative.amin(1)
    elif mining == "semi_hard":  # (B, B) by anchor and positive
        beyond = torch.where(d[:, None, :] > d[:, :, None], negative[:, None, :], torch.inf)
        gap = positive - beyond.amin(2)
    elif mining == "all":  # (B, B, B) by anchor, positive and negative
        gap = positive[:, :, None] - negative[:, None, :]
    else:
        raise ValueError(f"mining {mining!r} is unknown: use 'all', 'semi_hard' or 'batch_hard'")
    active = gap + margin > 0
    return _mean(gap + margin, active), _share(active, gap.isfinite())


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return part.sum() / whole.sum().clamp(min=1)


def _pairs(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(same product and not itself, different product), both (B, B) bool."""
    equal = labels[:, None] == labels[None, :]
    return equal & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~equal


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the masked values; 0 (with a gradient of 0) when the mask is empty."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


class ArcFace(nn.Module):
    """Angular-margin softmax over learned class centres: (embeddings, labels) -> (loss, accuracy).

    logits = scale * cos(theta + margin of the true class), cross-entropy. margin in radians, one
    number or one per class (adaptive margins for long tails: Ha et al. 2020, arXiv:2010.05350).
    subcentres K > 1: the nearest of K centres speaks for the class (Deng et al. 2020, ECCV).
    guide: a loss of pairs that is added (Bai 2020, arXiv:2008.10545).
    Source: Deng et al. 2019, arXiv:1801.07698. The centres are parameters: the optimiser's, too.
    """

    def __init__(
        self,
        embedding_dim: int,
        n_classes: int,
        *,
        margin=0.3,
        scale: float = 30.0,
        subcentres: int = 1,
        guide=None,
    ):
        super().__init__()
        self.centres = nn.Parameter(torch.empty(n_classes * subcentres, embedding_dim))
        nn.init.xavier_uniform_(self.centres)
        margins = torch.as_tensor(margin, dtype=torch.float32).expand(n_classes).clone()
        self.register_buffer("margins", margins)
        self.scale, self.subcentres, self.guide = scale, subcentres, guide

    def extra_repr(self) -> str:
        """Its settings: a checkpoint of a loss that names others is not taken up."""
        low, high = self.margins.aminmax()
        return (
            f"margins {low:.3g} to {high:.3g} rad, scale {self.scale:g}, {self.subcentres} centres "
            f"a class, guide {self.guide}"
        )

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        centres = F.normalize(self.centres, dim=1)
        cosines = F.normalize(embeddings.float(), dim=1) @ centres.T
        cosines = cosines.view(len(embeddings), -1, self.subcentres).amax(2)  # (B, C)
        true = cosines.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)  # (B, 1)
        margin = self.margins[labels][:, None]
        # Past theta = pi - margin the cosine would rise again: there a straight line goes on.
        straight = true - margin.sin() * margin
        shifted = torch.where(true > -margin.cos(), torch.cos(true.acos() + margin), straight)
        logits = self.scale * cosines.scatter(1, labels[:, None], shifted)
        loss = F.cross_entropy(logits, labels)
        if self.guide:
            loss = loss + self.guide(embeddings, labels)[0]
        return loss, (cosines.argmax(1) == labels).float().mean()


def adaptive_margins(counts) -> torch.Tensor:
    """ArcFace margins (C,) in radians: 0.5 for the rarest product, 0.2 for the commonest.

    Proportional to counts^(-1/4), scaled to that range. Source: Ha et al. 2020, arXiv:2010.05350.
    """
    rarity = torch.as_tensor(counts, dtype=torch.float32).clamp(min=1).pow(-0.25)
    rarity = rarity - rarity.min()
    return 0.2 + 0.3 * rarity / rarity.max().clamp(min=1e-12)
