import numpy as np
import pytest

from vipr_utils.learn.sampling import PKSampler, ShuffledSampler, sampler, with_occurrences

LONG_TAIL = np.repeat(np.arange(20), [1, 1, 2, 3, 5, 8, 13, 21, 34, 55] * 2)


def test_each_batch_holds_p_products_with_k_images_each():
    for batch in PKSampler(LONG_TAIL, batch_size=20, images=4).batches(0):
        _, counts = np.unique(LONG_TAIL[batch], return_counts=True)
        assert counts.tolist() == [4] * 5


def test_an_epoch_shows_nearly_every_image_once():
    sampler = PKSampler(np.repeat(np.arange(50), 8), batch_size=20, images=4)
    shown = np.concatenate(sampler.batches(3))
    assert len(np.unique(shown)) == len(shown) >= 0.9 * 400


def test_batches_depend_on_seed_and_epoch_alone():
    def flat(seed, epoch):
        return np.concatenate(
            PKSampler(LONG_TAIL, batch_size=8, images=2, seed=seed).batches(epoch)
        ).tolist()

    assert flat(0, 1) == flat(0, 1)
    assert flat(0, 1) != flat(0, 2)
    assert flat(0, 1) != flat(1, 1)


@pytest.mark.parametrize(
    "epoch, settings, batches",
    [
        (0, {}, [[13, 11, 1, 0], [12, 10, 2, 4], [5, 7, 8, 9], [6, 5, 3, 1]]),
        (2, {}, [[4, 2, 11, 10], [7, 5, 0, 3], [1, 4, 13, 12], [6, 7, 8, 9]]),
        (1, {"balanced_from": 1}, [[3, 4, 7, 6], [9, 8, 12, 10], [5, 7, 9, 8], [2, 0, 13, 11]]),
        (0, {"max_images": 3}, [[12, 11, 7, 6], [10, 12, 0, 2], [9, 8, 5, 7]]),
    ],
)
def test_batches_are_the_same_on_every_machine(epoch, settings, batches):
    """Photos 0-4, 5-7, 8-9 and 10-13 are of a product each."""
    labels = np.repeat([0, 1, 2, 3], [5, 3, 2, 4])
    found = PKSampler(labels, batch_size=4, images=2, seed=3, **settings).batches(epoch)
    assert [batch.tolist() for batch in found] == batches


def test_shuffled_batches_are_the_same_on_every_machine():
    found = ShuffledSampler(np.arange(7), batch_size=3, seed=3).batches(2)
    assert [batch.tolist() for batch in found] == [[4, 0, 2], [1, 6, 3]]


@pytest.mark.parametrize("kind", ["products", "shuffled", "shuffled_domains"])
def test_seed_without_a_word_is_0_and_reaches_the_batches_of_every_kind(kind):
    def first(**settings):
        shop = LONG_TAIL % 2 == 0
        return sampler(kind, LONG_TAIL, batch_size=16, shop=shop, **settings).batches(0)[0].tolist()

    assert first() == first(seed=0) != first(seed=1)
    made = {"products": PKSampler, "shuffled": ShuffledSampler}.get(kind)
    if made:
        positions = LONG_TAIL if kind == "products" else np.arange(len(LONG_TAIL))
        for settings in ({}, {"seed": 1}):
            assert made(positions, batch_size=16, **settings).batches(0)[0].tolist() == first(
                **settings
            )


def test_settings_of_products_reach_their_sampler():
    asked = {"seed": 5, "min_images": 2, "max_images": 7, "balanced_from": 3}
    found = sampler("products", LONG_TAIL, batch_size=24, **asked)
    want = PKSampler(LONG_TAIL, batch_size=24, **asked)
    assert (found.images, found.products, len(found.rows)) == (4, 6, 16)
    for epoch in (0, 3):
        np.testing.assert_array_equal(found.batches(epoch), want.batches(epoch))


@pytest.mark.parametrize("photos", [1, 2, 3, 4, 5, 6, 7, 9])
def test_a_run_repeats_a_photo_only_where_the_product_has_fewer_than_the_run(photos):
    labels = np.repeat(np.arange(6), photos)
    found = PKSampler(labels, batch_size=12, images=4)
    for epoch in range(5):
        for batch in found.batches(epoch):
            for run in batch.reshape(-1, 4):
                _, counts = np.unique(run, return_counts=True)
                assert len(counts) == min(4, photos)
                assert counts.max() == -(-4 // len(counts))


def test_an_epoch_shows_a_photo_twice_only_to_fill_its_products_last_run():
    shown = np.concatenate(PKSampler(np.repeat(np.arange(6), 5), batch_size=8).batches(0))
    counts = np.bincount(shown, minlength=30)
    assert counts.max() == 2 and (counts == 2).sum() == 6 * 3


def test_batches_are_as_large_as_the_products_allow_and_say_so():
    with pytest.warns(UserWarning, match="batches hold 6 images, not 16: there are 3 products"):
        few = PKSampler([0, 0, 1, 1, 2, 2], batch_size=16, images=2)
    assert [sorted(batch) for batch in few.batches(0)] == [[0, 1, 2, 3, 4, 5]]
    with pytest.warns(UserWarning, match="there are 6 products with 20 images or more, 4 of each"):
        few = PKSampler(LONG_TAIL, batch_size=32, min_images=20)
    assert {len(batch) for batch in few.batches(0)} == {24}


@pytest.mark.filterwarnings("ignore:batches hold")
@pytest.mark.parametrize(
    "counts", [[1, 1], [1] * 24, [300, 1, 1, 1, 1], [300, 40, 2, 1, 1], [9, 1]]
)
def test_every_catalogue_gives_batches_for_about_its_images(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    batches = sampler("products", labels, batch_size=32).batches(0)
    assert {len(batch) for batch in batches} == {4 * min(8, len(counts))}
    for batch in batches:
        assert len(set(labels[batch])) == len(batch) // 4
    assert sum(len(batch) for batch in batches) >= 0.7 * len(labels)


def test_one_product_makes_no_batch_and_the_error_says_what_to_do():
    with pytest.raises(
        ValueError, match="need 2 of them, the data has 1 with 1 images or more: lo"
    ):
        PKSampler([0] * 9, batch_size=8)


def test_occurrences_count_what_an_epoch_has_shown_before():
    pairs = with_occurrences([np.array([4, 2, 4]), np.array([2, 7]), np.array([4])])
    assert [batch.tolist() for batch in pairs] == [
        [[4, 0], [2, 0], [4, 1]],
        [[2, 1], [7, 0]],
        [[4, 2]],
    ]


@pytest.mark.parametrize("shop", [np.zeros(20, bool), np.ones(20, bool)])
def test_photos_of_one_domain_are_shown_once_by_domain_batches(shop):
    found = sampler("shuffled_domains", np.arange(20), batch_size=8, shop=shop)
    assert sorted(np.concatenate(found.batches(0))) == list(range(20))


def test_one_shop_photo_is_shown_as_an_eighth_of_the_images():
    shop = np.arange(22) == 4
    found = sampler("shuffled_domains", np.arange(22), batch_size=8, shop=shop).batches(0)
    assert np.bincount(np.concatenate(found)).tolist() == [1] * 4 + [3] + [1] * 17


@pytest.mark.parametrize("batch_size, images", [(4, 4), (4, 1), (9, 4), (2, 2)])
def test_batches_of_less_than_two_products_of_two_images_are_refused(batch_size, images):
    with pytest.raises(ValueError, match=f"batch_size {batch_size} is no multiple of the {images}"):
        PKSampler(LONG_TAIL, batch_size=batch_size, images=images)


@pytest.mark.filterwarnings("error")
def test_smallest_batches_are_full_without_a_warning():
    batches = PKSampler(LONG_TAIL, batch_size=4, images=2).batches(0)
    assert {len(batch) for batch in batches} == {4}


def test_product_with_as_many_runs_as_there_are_batches_outweighs_no_other():
    labels = np.repeat(np.arange(4), [8, 4, 2, 2])  # 4, 2, 1 and 1 runs in 4 batches of 2
    found = PKSampler(labels, batch_size=4, images=2)
    order = found._order(np.random.default_rng(0), 0)
    assert np.bincount(order).tolist() == [4, 2, 1, 1]


def test_each_pass_over_a_product_shows_all_its_images_in_a_new_order():
    found = PKSampler(np.repeat(np.arange(2), 8), batch_size=4, images=2)
    runs = found._runs(np.arange(8), np.random.default_rng(0))
    passes = [np.concatenate([next(runs) for _ in range(4)]).tolist() for _ in range(3)]
    assert [sorted(one) for one in passes] == [list(range(8))] * 3
    assert len({tuple(one) for one in passes}) == 3


def test_max_images_caps_what_one_product_shows_in_an_epoch():
    shown = np.concatenate(PKSampler(LONG_TAIL, batch_size=16, images=4, max_images=8).batches(0))
    assert max(np.bincount(LONG_TAIL[shown])) <= 8


def test_balanced_epochs_show_products_alike_and_are_as_long():
    balanced = PKSampler(LONG_TAIL, batch_size=16, images=4, balanced_from=2)
    plain = PKSampler(LONG_TAIL, batch_size=16, images=4)
    for epoch in (0, 1):
        np.testing.assert_array_equal(balanced.batches(epoch), plain.batches(epoch))
    shown = np.concatenate(balanced.batches(2))
    assert len(shown) == pytest.approx(len(np.concatenate(plain.batches(2))), rel=0.1)
    counts = np.bincount(LONG_TAIL[shown])
    assert counts.max() <= 1.35 * counts.min()


def test_products_with_too_few_images_are_left_out():
    shown = np.concatenate(PKSampler(LONG_TAIL, batch_size=16, images=4, min_images=4).batches(0))
    assert np.bincount(LONG_TAIL)[LONG_TAIL[shown]].min() >= 4


def test_shuffled_batches_cover_everything_once():
    shown = np.concatenate(ShuffledSampler(np.arange(103), batch_size=10).batches(0))
    assert sorted(shown) == list(range(103))


def test_a_single_left_over_image_is_dropped_since_batch_statistics_need_two():
    for photos, shown in ((101, 100), (102, 102)):
        batches = ShuffledSampler(np.arange(photos), batch_size=10).batches(0)
        assert len(np.concatenate(batches)) == shown


def test_sampler_by_name_fills_the_batch_or_says_why_not():
    assert isinstance(sampler("shuffled", LONG_TAIL, batch_size=16), ShuffledSampler)
    found = sampler("products", LONG_TAIL, batch_size=16)
    assert {len(b) for b in found.batches(0)} == {16}
    shop = np.arange(len(LONG_TAIL)) % 40 == 0
    shown = np.concatenate(
        sampler("shuffled_domains", LONG_TAIL, batch_size=16, shop=shop).batches(0)
    )
    assert (
        shop[shown].mean() == pytest.approx(1 / 8, abs=0.02)
        and len(set(shown)) >= len(LONG_TAIL) - 1
    )
    with pytest.raises(
        ValueError, match="batch_size 15 is no multiple of the 4 images that each product brings"
    ):
        sampler("products", LONG_TAIL, batch_size=15)
    with pytest.raises(ValueError, match="batches 'random' are unknown: use one of"):
        sampler("random", LONG_TAIL, batch_size=16)


def test_limits_of_a_product_reach_the_batches_or_are_refused():
    labels = np.repeat(np.arange(5), [40, 8, 8, 8, 2])
    batches = sampler("products", labels, batch_size=8, min_images=4, max_images=12).batches(0)
    shown = labels[np.concatenate(batches)]
    assert 4 not in shown and (shown == 0).sum() <= 12
    for limit in ({"min_images": 2}, {"max_images": 4}, {"balanced_from": 1}):
        with pytest.raises(ValueError, match="'shuffled' take all images: .* need 'products'"):
            sampler("shuffled", labels, batch_size=8, **limit)
