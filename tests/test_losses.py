"""Losses against loops written from the papers' formulas, and against pytorch-metric-learning."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vipr_utils.learn import losses

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances as pml_distances  # noqa: E402
from pytorch_metric_learning import losses as pml_losses  # noqa: E402
from pytorch_metric_learning import miners as pml_miners  # noqa: E402
from pytorch_metric_learning.reducers import AvgNonZeroReducer  # noqa: E402


def batch(seed=0, n=16, dim=8, products=4):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, dim, generator=generator), dim=1).requires_grad_()
    return x, torch.arange(n) % products


def slow_distance(a, b, distance):
    a, b = a.tolist(), b.tolist()
    if distance == "cosine":
        dot = sum(u * v for u, v in zip(a, b))
        return 1 - dot / math.sqrt(sum(u * u for u in a)) / math.sqrt(sum(v * v for v in b))
    if distance == "euclidean":
        return math.sqrt(sum((u - v) ** 2 for u, v in zip(a, b)))
    return sum(abs(u - v) for u, v in zip(a, b))


@pytest.mark.parametrize("distance", losses.DISTANCES)
def test_distance_matrix_equals_a_loop_over_pairs(distance):
    x, _ = batch()
    got = losses.distance_matrix(x, x[:5], distance)
    want = [[slow_distance(a, b, distance) for b in x[:5]] for a in x]
    np.testing.assert_allclose(got.detach(), want, atol=1e-5)


def test_names_of_distances():
    assert losses.DISTANCES == ("cosine", "euclidean", "manhattan")


def test_small_euclidean_distances_of_many_vectors_keep_their_digits():
    x = 1 + 1e-4 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    want = torch.cdist(x.double(), x.double())
    found = losses.distance_matrix(x, x, "euclidean").double()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("distance", losses.DISTANCES)
def test_contrastive_equals_a_loop_over_pairs(distance):
    x, labels = batch()
    margin = losses.default_margin("contrastive", distance, 8) * 1.6
    got, active = losses.contrastive(x, labels, distance=distance, margin=margin)
    positive, negative, inside = [], [], []
    for i, j in itertools.permutations(range(len(x)), 2):
        d = slow_distance(x[i], x[j], distance)
        if labels[i] == labels[j]:
            positive.append(d**2 / 2)
        else:
            inside.append(d < margin)
            if d < margin:
                negative.append((margin - d) ** 2 / 2)
    assert 0 < active < 1
    assert float(got.detach()) == pytest.approx(np.mean(positive) + np.mean(negative), abs=1e-5)
    assert active == pytest.approx(np.mean(inside))


@pytest.mark.parametrize("distance", losses.DISTANCES)
@pytest.mark.parametrize("mining", ["all", "semi_hard", "batch_hard"])
def test_triplet_equals_a_loop_over_triplets(distance, mining):
    x, labels = batch(seed=1)
    margin = losses.default_margin("triplet", distance, 8)
    got, active = losses.triplet(x, labels, distance=distance, margin=margin, mining=mining)
    n = len(x)
    d = [[slow_distance(x[i], x[j], distance) for j in range(n)] for i in range(n)]
    gaps = []
    for a in range(n):
        positives = [p for p in range(n) if p != a and labels[p] == labels[a]]
        negatives = [q for q in range(n) if labels[q] != labels[a]]
        if mining == "batch_hard":
            gaps.append(max(d[a][p] for p in positives) - min(d[a][q] for q in negatives))
        elif mining == "semi_hard":
            for p in positives:
                beyond = [d[a][q] for q in negatives if d[a][q] > d[a][p]]
                gaps += [d[a][p] - min(beyond)] if beyond else []
        else:
            gaps += [d[a][p] - d[a][q] for p in positives for q in negatives]
    values = [g + margin for g in gaps if g + margin > 0]
    assert float(got.detach()) == pytest.approx(np.mean(values), abs=1e-5)
    assert active == pytest.approx(len(values) / len(gaps))


def at_angles(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_one_semi_hard_pair_alone_is_all_there_is():
    """The negative is farther than the positive from the first photo, nearer from the second."""
    x, labels = at_angles(0.0, 30.0, 40.0), torch.tensor([0, 0, 1])
    loss, active = losses.triplet(x, labels, margin=0.2, mining="semi_hard")
    want = math.cos(math.radians(40)) - math.cos(math.radians(30)) + 0.2
    assert loss.item() == pytest.approx(want, abs=1e-6) and active == 1


def test_negative_as_near_as_the_positive_is_not_beyond_it():
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    loss, _ = losses.triplet(x, torch.tensor([0, 0, 1, 1]), margin=1.5, mining="semi_hard")
    # (0, 1): the negative at 2; (1, 0): none is farther; (2, 3): none; (3, 2): the negative at 2
    assert loss.item() == 0.5


def test_triplet_that_meets_its_margin_exactly_is_not_active():
    x, labels = torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    loss, active = losses.triplet(x, labels, margin=1.0)
    assert (loss, active) == (0, 0)


@pytest.mark.parametrize(
    "distance, theirs",
    [
        ("euclidean", pml_distances.LpDistance(normalize_embeddings=False, p=2)),
        ("manhattan", pml_distances.LpDistance(normalize_embeddings=False, p=1)),
    ],
)
@pytest.mark.parametrize("mining", ["all", "batch_hard"])
def test_triplet_and_its_gradient_equal_pytorch_metric_learning(distance, theirs, mining):
    x, labels = batch(seed=2)
    y = x.detach().clone().requires_grad_()
    margin = losses.default_margin("triplet", distance, 8)
    ours, _ = losses.triplet(x, labels, distance=distance, margin=margin, mining=mining)
    criterion = pml_losses.TripletMarginLoss(
        margin=margin, distance=theirs, reducer=AvgNonZeroReducer()
    )
    mined = (
        pml_miners.BatchHardMiner(distance=theirs)(y, labels) if mining == "batch_hard" else None
    )
    their_loss = criterion(y, labels, mined)
    ours.backward()
    their_loss.backward()
    assert ours.item() == pytest.approx(their_loss.item(), rel=1e-5)
    np.testing.assert_allclose(x.grad, y.grad, atol=1e-6)


@pytest.mark.parametrize("subcentres", [1, 3])
def test_arcface_and_its_gradient_equal_pytorch_metric_learning(subcentres):
    x, labels = batch(seed=3)
    y = x.detach().clone().requires_grad_()
    ours = losses.ArcFace(8, 4, margin=0.5, scale=16, subcentres=subcentres)
    degrees = math.degrees(0.5)
    if subcentres == 1:
        theirs = pml_losses.ArcFaceLoss(4, 8, margin=degrees, scale=16)
    else:
        theirs = pml_losses.SubCenterArcFaceLoss(
            num_classes=4, embedding_size=8, margin=degrees, scale=16, sub_centers=subcentres
        )
    with torch.no_grad():
        ours.centres.copy_(theirs.W.T)
    a, b = ours(x, labels)[0], theirs(y, labels)
    a.backward()
    b.backward()
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    np.testing.assert_allclose(x.grad, y.grad, atol=1e-6)
    np.testing.assert_allclose(ours.centres.grad.T, theirs.W.grad, atol=1e-6)


def test_arcface_loss_never_falls_as_the_angle_grows():
    head = losses.ArcFace(3, 2, margin=0.8, scale=10)
    with torch.no_grad():  # the other centre stands upright on the plane in which x turns
        head.centres.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    angles = torch.linspace(0.01, math.pi - 0.01, 50)
    x = torch.stack([angles.cos(), angles.sin(), torch.zeros(50)], 1)
    true = torch.stack([head(row[None], torch.tensor([0]))[0] for row in x])
    assert (true.diff() > 0).all()


def slow_arcface(head, x, labels):
    """(loss, accuracy) by the formula, one logit after the other."""
    total, right = 0.0, 0
    centres = head.centres.detach().view(-1, head.subcentres, head.centres.shape[1])
    for row, label in zip(x, labels.tolist()):
        cosines = [max(1 - slow_distance(row, c, "cosine") for c in group) for group in centres]
        margin = head.margins[label].item()
        angle = math.acos(cosines[label])
        right += cosines.index(max(cosines)) == label
        if angle + margin < math.pi:
            cosines[label] = math.cos(angle + margin)
        else:
            cosines[label] -= margin * math.sin(margin)
        powers = [math.exp(head.scale * cosine) for cosine in cosines]
        total -= math.log(powers[label] / sum(powers))
    return total / len(x), right / len(x)


@pytest.mark.parametrize("margin", [0.4, 1.5, torch.tensor([0.1, 0.3, 0.5, 2.0])])
@pytest.mark.parametrize("subcentres", [1, 3])
def test_arcface_equals_a_loop_over_logits_and_counts_what_is_right(margin, subcentres):
    x, labels = batch(seed=5, n=40)
    torch.manual_seed(0)
    head = losses.ArcFace(8, 4, margin=margin, scale=5, subcentres=subcentres)
    loss, accuracy = head(3 * x, labels)
    slow_loss, slow_accuracy = slow_arcface(head, x, labels)
    assert loss.item() == pytest.approx(slow_loss, rel=1e-5)
    assert 0 < slow_accuracy < 1 and accuracy.item() == pytest.approx(slow_accuracy)


def test_arcface_without_settings_has_one_centre_a_margin_of_0_3_and_a_scale_of_30():
    head = losses.ArcFace(8, 4)
    assert head.centres.shape == (4, 8) and head.margins.tolist() == pytest.approx([0.3] * 4)
    assert (head.scale, head.subcentres, head.guide) == (30, 1, None)
    bound = math.sqrt(6 / (4 + 8))  # of xavier: the centres differ and none is zero
    assert head.centres.abs().min() > 0 and head.centres.abs().max() <= bound


def test_arcface_names_its_settings_by_which_a_training_is_known():
    head = losses.ArcFace(8, 2, margin=np.array([0.2, 0.4]), scale=16, subcentres=3)
    assert repr(head) == "ArcFace(margins 0.2 to 0.4 rad, scale 16, 3 centres a class, guide None)"


def test_margins_of_arcface_are_saved_and_not_trained():
    margins = torch.tensor([0.2, 0.4])
    head = losses.ArcFace(8, 2, margin=margins)
    assert "margins" in head.state_dict() and [n for n, _ in head.named_parameters()] == ["centres"]
    margins[0] = 9
    assert losses.ArcFace(8, 2, margin=np.array([0.2, 0.4])).margins.dtype == torch.float32
    assert head.margins.tolist() == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize("sign", [1, -1])
def test_an_embedding_on_its_centre_or_opposite_gives_a_finite_gradient(sign):
    head = losses.ArcFace(3, 2)
    x = (sign * F.normalize(head.centres.detach(), dim=1)).requires_grad_()
    loss, _ = head(x, torch.arange(2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()


def test_half_precision_embeddings_give_the_float32_loss_of_arcface():
    x, labels = batch(seed=4)
    half, head = x.detach().half(), losses.ArcFace(8, 4)
    assert head(half, labels)[0].item() == pytest.approx(head(half.float(), labels)[0].item())


def test_adaptive_margins_are_widest_for_the_rarest_product():
    margins = losses.adaptive_margins([1, 16, 256])
    np.testing.assert_allclose(margins, [0.5, 0.2 + 0.3 / 3, 0.2], atol=1e-6)
    np.testing.assert_allclose(losses.adaptive_margins([0, 1, 16]), [0.5, 0.5, 0.2], atol=1e-6)
    np.testing.assert_allclose(losses.adaptive_margins([7, 7]), [0.2, 0.2], atol=1e-6)


LOSSES = {
    "contrastive": lambda x, y: losses.contrastive(x, y, margin=0.5),
    "triplet all": lambda x, y: losses.triplet(x, y, margin=0.2, mining="all"),
    "triplet semi-hard": lambda x, y: losses.triplet(x, y, margin=0.2, mining="semi_hard"),
    "triplet batch-hard": lambda x, y: losses.triplet(x, y, margin=0.2, mining="batch_hard"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_valid_pair_gives_zero_and_a_finite_gradient(name):
    x, _ = batch()
    for labels in (torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)):
        x.grad = None
        loss, share = LOSSES[name](x, labels)
        loss.backward()
        assert 0 <= share <= 1 and (share == 0 or name == "contrastive")
        assert torch.isfinite(x.grad).all()
        if name != "contrastive":
            assert loss.item() == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("distance", losses.DISTANCES)
def test_identical_embeddings_give_a_finite_gradient(name, distance):
    x = torch.ones(8, 4).div(2).requires_grad_()
    labels = torch.arange(8) % 2
    loss = {"contrastive": losses.contrastive}.get(name, losses.triplet)(
        x, labels, distance=distance, margin=0.5
    )[0]
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_embeddings_give_the_float32_loss(name):
    x, labels = batch(seed=4)
    half = x.detach().half()
    assert LOSSES[name](half, labels)[0].dtype == torch.float32
    assert LOSSES[name](half, labels)[0].item() == pytest.approx(
        LOSSES[name](half.float(), labels)[0].item(), abs=1e-6
    )


def test_unknown_names_are_named_with_the_choices():
    x, labels = batch()
    with pytest.raises(ValueError, match="'chebyshev' is unknown.*cosine"):
        losses.distance_matrix(x, x, "chebyshev")
    with pytest.raises(ValueError, match="'hardest' is unknown.*batch_hard"):
        losses.triplet(x, labels, margin=0.1, mining="hardest")


@pytest.mark.parametrize("distance", losses.DISTANCES)
def test_default_margins_sit_below_the_distance_of_random_embeddings(distance):
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(200, 128, generator=generator), dim=1)
    typical = losses.distance_matrix(x[:100], x[100:], distance).mean().item()
    assert losses.default_margin("contrastive", distance, 128) == pytest.approx(
        0.5 * typical, rel=0.02
    )
    assert losses.default_margin("triplet", distance, 128) == pytest.approx(0.2 * typical, rel=0.02)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_by_name_gives_a_finite_loss_and_a_gradient(name):
    x, labels = batch()
    loss, share = losses.criterion(name, "cosine", 8, counts=np.bincount(labels), mining="all")(
        x, labels
    )
    loss.backward()
    assert torch.isfinite(loss) and 0 <= share <= 1 and x.grad.abs().sum() > 0


def test_guided_loss_is_the_sum_of_classification_and_metric():
    x, labels = batch()
    torch.manual_seed(0)
    guided = losses.criterion("arcface+triplet", "cosine", 8, counts=np.bincount(labels))
    whole, accuracy = guided(x, labels)
    metric, guided.guide = guided.guide(x, labels)[0], None
    classification, alone = guided(x, labels)
    torch.testing.assert_close(whole, classification + metric)
    assert accuracy == alone and metric > 0 and len(list(guided.parameters())) == 1


def test_default_margins_by_hand():
    for loss, share in (("contrastive", 0.5), ("triplet", 0.2)):
        assert losses.default_margin(loss, "cosine", 314) == share
        assert losses.default_margin(loss, "euclidean", 314) == pytest.approx(share * 1.41421356)
        assert losses.default_margin(loss, "manhattan", 314) == pytest.approx(share * 19.9949292)


@pytest.mark.parametrize("distance", losses.DISTANCES)
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_losses_of_pairs_by_name_are_the_functions_with_their_settings(distance, margin):
    x, labels = batch()
    for name, asked in (
        ("contrastive", {}),
        ("triplet", {}),
        ("triplet", {"mining": "all"}),
        ("triplet", {"mining": "semi_hard"}),
    ):
        found = losses.criterion(name, distance, 8, margin=margin, **asked)(x, labels)
        wide = margin or losses.default_margin(name, distance, 8)
        want = getattr(losses, name)(x, labels, distance=distance, margin=wide, **asked)
        torch.testing.assert_close(found, want)


def test_losses_of_pairs_take_cosine_and_the_hardest_where_nothing_is_said():
    x, labels = batch()
    for loss, asked in ((losses.contrastive, {}), (losses.triplet, {"mining": "batch_hard"})):
        want = loss(x, labels, distance="cosine", margin=0.7, **asked)
        torch.testing.assert_close(loss(x, labels, margin=0.7), want)
    torch.testing.assert_close(
        losses.distance_matrix(2 * x, x), losses.distance_matrix(x, x, "cosine")
    )


def test_arcface_by_name_has_three_centres_a_class_and_the_margin_asked_for():
    counts = [1, 16, 256]
    for name, given, margins in (
        ("arcface", {}, [0.3] * 3),
        ("arcface", {"margin": 0.4}, [0.4] * 3),
        ("arcface+triplet", {"margin": 0.4}, [0.4] * 3),
        ("adaptive_arcface", {"margin": 0.4}, [0.5, 0.3, 0.2]),
    ):
        head = losses.criterion(name, "manhattan", 8, counts=counts, **given)
        assert head.margins.tolist() == pytest.approx(margins, abs=1e-6)
        assert head.centres.shape == (9, 8) and (head.scale, head.subcentres) == (30, 3)
        assert (head.guide is None) == (name != "arcface+triplet")


def test_guide_of_a_classification_is_the_triplet_loss_that_was_asked_for():
    guided = losses.criterion("arcface+triplet", "manhattan", 8, counts=[1, 2], mining="all")
    assert guided.guide.func is losses.triplet
    margin = losses.default_margin("triplet", "manhattan", 8)
    assert guided.guide.keywords == {"mining": "all", "distance": "manhattan", "margin": margin}


def test_unknown_loss_and_missing_counts_are_refused():
    with pytest.raises(ValueError, match="loss 'softmax' is unknown: use one of"):
        losses.criterion("softmax", "cosine", 8)
    with pytest.raises(ValueError, match="'arcface' needs counts"):
        losses.criterion("arcface", "cosine", 8)
