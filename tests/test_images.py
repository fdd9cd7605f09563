"""Every odd file a catalogue holds: decoded as a person sees it, or named; the store, transforms,
loaders.
"""

import errno
import io
import os
import pickle
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from roots import picture
from torchvision.transforms import v2 as T

from vipr_utils.data import audit, catalog, transforms
from vipr_utils.data import store as store_module
from vipr_utils.data.store import (
    BrokenImage,
    Photos,
    Store,
    build_store,
    decoders,
    loader,
    open_data,
    packed_px,
    read_image,
)
from vipr_utils.host import files, platform

SMOOTH = cv2.GaussianBlur(picture(3, 64, 96), (0, 0), 6)  # survives JPEG nearly unchanged


def saved(path, image, **how):
    image.save(path, **how)
    return path


def close(a, b, *, within: float):
    assert a.shape == b.shape
    assert np.abs(a.astype(float) - b).mean() < within


# ---------------------------------------------------------------------------------------- decoding


def test_jpeg_png_and_a_png_named_jpg_read_alike(tmp_path):
    image = Image.fromarray(SMOOTH)
    close(read_image(saved(tmp_path / "a.jpg", image, quality=95)), SMOOTH, within=2)
    np.testing.assert_array_equal(read_image(saved(tmp_path / "b.png", image)), SMOOTH)
    np.testing.assert_array_equal(
        read_image(saved(tmp_path / "c.jpg", image, format="PNG")), SMOOTH
    )


def test_cmyk_grey_and_palette_become_rgb(tmp_path):
    image = Image.fromarray(SMOOTH)
    close(
        read_image(saved(tmp_path / "a.jpg", image.convert("CMYK"), quality=95)), SMOOTH, within=4
    )
    grey = read_image(saved(tmp_path / "b.jpg", image.convert("L"), quality=95))
    assert (grey[..., 0] == grey[..., 2]).all() and grey.shape == SMOOTH.shape
    close(read_image(saved(tmp_path / "c.png", image.quantize(256))), SMOOTH, within=7)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    grey = read_image(saved(tmp_path / "a.png", Image.fromarray(ramp)))[..., 0]
    close(grey, ramp / 257, within=1)


def test_sixteen_bit_colour_is_read(tmp_path):
    cv2.imwrite(
        str(tmp_path / "a.png"), cv2.cvtColor(SMOOTH, cv2.COLOR_RGB2BGR).astype(np.uint16) * 257
    )
    close(read_image(tmp_path / "a.png"), SMOOTH, within=1)


def test_transparency_lies_on_white(tmp_path):
    layer = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (read_image(saved(tmp_path / "a.png", layer)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = 255  # a white quarter at the upper left
    turned = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    turned |= {
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
    }
    turned |= {8: np.rot90(upright, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(
        tmp_path / "a.jpg",
        Image.fromarray(np.ascontiguousarray(turned[orientation])),
        exif=exif,
        quality=95,
    )
    close(read_image(path), upright, within=4)


def test_wide_image_is_read_and_a_larger_one_refused(tmp_path, monkeypatch):
    wide = saved(tmp_path / "wide.jpg", Image.fromarray(picture(1, 100, 20_000)))
    assert read_image(wide).shape == (100, 20_000, 3)
    assert min(read_image(wide, least_px=20).shape[:2]) >= 20
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900_000)  # twice as many are refused
    with pytest.raises(BrokenImage, match=r"wide.jpg: .*2000000 pixels. exceeds limit of 1800000"):
        read_image(wide)


def broken_files(folder) -> dict:
    whole = io.BytesIO()
    Image.fromarray(picture(2, 200, 200)).save(whole, "JPEG")
    content = {
        "empty.jpg": b"",
        "cut.jpg": whole.getvalue()[:2000],
        "text.jpg": b"<html>404</html>",
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return content


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.jpg", "empty.jpg: no readable image .*cannot identify.*; replace or remove it"),
        ("cut.jpg", "cut.jpg: no readable image .*truncated.*; replace or remove it"),
        ("text.jpg", "text.jpg: no readable image"),
        ("absent.jpg", "absent.jpg: no readable image .*No such file"),
    ],
)
def test_broken_file_is_named_with_its_reason(tmp_path, name, message):
    broken_files(tmp_path)
    with pytest.raises(BrokenImage, match=message):
        read_image(tmp_path / name)


# ------------------------------------------------------------------------------------------- store


def odd_root(folder):
    """A data root whose photos are of every odd kind; returns (root, names of those that cannot be
    read).
    """
    (folder / "train").mkdir(parents=True)
    image = Image.fromarray(picture(5, 90, 120))
    image.save(folder / "train" / "plain.jpg")
    image.save(folder / "train" / "png_inside.jpg", format="PNG")
    image.convert("CMYK").save(folder / "train" / "cmyk.jpg")
    image.convert("L").save(folder / "train" / "grey.jpg")
    Image.fromarray(picture(6, 60, 20_000)).save(folder / "train" / "wide.jpg")
    Image.fromarray(picture(7, 900, 700)).save(folder / "train" / "large.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "train" / "turned.jpg", exif=exif)
    bad = broken_files(folder / "train")
    names = sorted(p.name for p in (folder / "train").iterdir())
    pd.DataFrame({"name": [*names, "absent.jpg"], "class": 1}).to_csv(
        folder / "train.csv", index=False
    )
    return folder, set(bad)


def test_store_keeps_every_readable_photo_and_lists_the_others(tmp_path):
    root, bad = odd_root(tmp_path / "root")
    photos, absent = catalog.read(root)
    store = build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    assert set(absent.file) == {"train/absent.jpg"}
    assert set(store.problems.file) == {"train/cut.jpg", "train/empty.jpg", "train/text.jpg"}
    assert "truncated" in store.problems.set_index("file").problem["train/cut.jpg"]
    for row, name in enumerate(photos.name):
        if name in bad:
            assert not store.readable[row]
            with pytest.raises(
                BrokenImage, match=f"row {row} could not be read when the store was built"
            ):
                store[row]
        else:
            shown = read_image(root / photos.path[row])
            ratio = lambda x: x.shape[1] / x.shape[0]  # noqa: E731
            assert name == "wide.jpg" or ratio(store[row]) == pytest.approx(ratio(shown), rel=0.02)
            assert max(store[row].shape) <= 6 * 64 and min(store[row].shape[:2]) >= 1


def test_root_without_a_readable_photo_is_refused(tmp_path, make_root):
    root = make_root(test=None)
    for photo in (root / "train").iterdir():
        photo.write_bytes(b"no photo")
    for _ in range(2):  # also where the store is there
        with pytest.raises(BrokenImage, match="root: no photo can be read, the last: no readable"):
            open_data(str(root), str(tmp_path))


def test_open_data_leaves_out_and_counts_what_cannot_be_read(tmp_path):
    root, _ = odd_root(tmp_path / "root")
    photos, store, lost = open_data(str(root), str(tmp_path / "cache"), px=64)
    assert len(photos) == 7 and len(lost) == 4
    assert "4 files left out" in photos.attrs["said"]
    assert all(store[row].ndim == 3 for row in photos.index)


def test_small_jpeg_is_stored_byte_for_byte_and_a_large_one_reduced(tmp_path):
    root, _ = odd_root(tmp_path / "root")
    photos, _ = catalog.read(root)
    store = build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    row = {name: i for i, name in enumerate(photos.name)}
    small, large = row["plain.jpg"], row["large.jpg"]
    file = root / "train" / "plain.jpg"
    end = store.files["bytes"].cumsum()[small]
    packed = store.blocks[0].get_tensor("jpegs")[end - file.stat().st_size : end]
    assert packed.tobytes() == file.read_bytes()
    assert min(store[large].shape[:2]) == 64


def test_store_is_found_again_and_a_damaged_one_is_built_anew(tmp_path, make_root):
    photos, _ = catalog.read(make_root())
    first = build_store(photos, cache_dir=tmp_path, store_px=64)
    expected = first[0]
    block = first.folders[0] / "0.safetensors"
    stamp = block.stat().st_mtime_ns
    assert build_store(photos, cache_dir=tmp_path, store_px=64).key == first.key
    assert block.stat().st_mtime_ns == stamp
    block.write_bytes(block.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="is no whole store .block 0 is absent or damaged"):
        again = build_store(photos, cache_dir=tmp_path, store_px=64)
    np.testing.assert_array_equal(again[0], expected)


def test_threads_that_decode_leave_warnings_as_they_were():
    before = list(warnings.filters)
    with decoders() as pool:
        list(pool.map(warnings.simplefilter, ["ignore"] * 4))
    assert warnings.filters == before


def test_store_travels_to_another_process(toy_data):
    _, store = toy_data
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))[3], store[3])


class Flaky:
    """Path.read_bytes on a disk that fails for one file, the first so many times or always."""

    def __init__(self, monkeypatch, name: str, failures: int, number: int = errno.EIO):
        self.left, self.calls, real = failures, 0, Path.read_bytes

        def read_bytes(path):
            if path.name == name and self.left:
                self.left -= 1
                self.calls += 1
                raise OSError(number, os.strerror(number), str(path))
            return real(path)

        monkeypatch.setattr(files, "WAITS_S", (0, 0, 0))
        monkeypatch.setattr(Path, "read_bytes", read_bytes)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_disk_that_fails_in_passing_is_asked_again_and_breaks_no_photo(
    tmp_path, make_root, monkeypatch, number
):
    photos, _ = catalog.read(make_root())
    flaky = Flaky(monkeypatch, "b.jpg", 3, number)
    store = build_store(photos, cache_dir=tmp_path, store_px=64)
    assert flaky.calls == 3 and store.readable.all() and store.problems.empty


def test_disk_that_goes_on_failing_stops_the_store_and_what_is_packed_stays(
    tmp_path, make_root, monkeypatch
):
    photos, _ = catalog.read(make_root())
    monkeypatch.setattr(store_module, "BLOCK", 2)
    monkeypatch.setattr(store_module, "SAMPLE", 1)  # not of c.jpg
    with monkeypatch.context() as patch:
        Flaky(patch, "c.jpg", 99)
        message = (
            r"train/c.jpg cannot be read \(Input/output error\), asked 4 times: see to its disk"
        )
        with pytest.raises(OSError, match=message):
            build_store(photos, cache_dir=tmp_path, store_px=64)
    first = next(tmp_path.glob("stores/*/0.safetensors"))
    stamp = first.stat().st_mtime_ns
    pixels = [read_image(tmp_path / "root" / path) for path in photos.path]
    Flaky(monkeypatch, "a.jpg", 99)  # is not read again
    with pytest.warns(UserWarning, match="is no whole store"):
        store = build_store(photos, cache_dir=tmp_path, store_px=64)
    assert store.readable.all() and first.stat().st_mtime_ns == stamp
    for row, photo in enumerate(pixels):
        np.testing.assert_array_equal(store[row], photo)


def test_photo_that_is_lost_while_the_store_is_built_is_absent(tmp_path, make_root, monkeypatch):
    photos, _ = catalog.read(make_root())
    flaky = Flaky(monkeypatch, "b.jpg", 99, errno.ENOENT)
    store = build_store(photos, cache_dir=tmp_path, store_px=64)
    assert flaky.calls == 1 and store.readable.tolist() == [True, False, True, True]
    assert "No such file" in store.problems["problem"].item()


def test_every_file_is_read_once(tmp_path, make_root, monkeypatch):
    photos, _ = catalog.read(make_root())
    opened, real = [], io.open
    monkeypatch.setattr(
        io, "open", lambda file, *args, **kw: opened.append(str(file)) or real(file, *args, **kw)
    )
    build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    files_read = [name for name in opened if name.endswith(".jpg")]
    assert sorted(files_read) == sorted(str(tmp_path / "root" / path) for path in photos.path)


def test_a_store_of_the_size_asked_for_is_used_whatever_others_are_there(tmp_path, make_root):
    photos, _ = catalog.read(make_root())
    first = [build_store(photos, cache_dir=tmp_path, store_px=px) for px in (96, 32)]
    assert [store.px for store in first] == [96, 32]
    again = build_store(photos, cache_dir=tmp_path, store_px=96)
    assert again.folders == first[0].folders


@pytest.mark.parametrize(
    "place", ["notebooks/me/eda/submissions/01_eda", "eda/submissions/01_eda", "datasets/me/packed"]
)
def test_an_attached_store_is_mapped_where_it_lies_and_a_truncated_one_refused(
    tmp_path, make_root, monkeypatch, place
):
    photos, _ = catalog.read(make_root())
    attached = tmp_path / "kaggle" / "input" / place
    build_store(photos, cache_dir=attached, store_px=64)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(platform, "PLATFORM_ROOT", tmp_path)
    monkeypatch.setattr(platform, "KAGGLE_WORKING", tmp_path / "kaggle" / "working")
    found = build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    assert found.folders[0].is_relative_to(attached) and len(found[0].shape) == 3
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    changed, _ = catalog.read(make_root("name,class\na.jpg,1\nb.jpg,2\nc.jpg,2\n"))
    assert build_store(changed, cache_dir=tmp_path / "cache").key != found.key
    block = found.folders[0] / "0.safetensors"
    block.write_bytes(block.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="is no whole store .*not used"):
        again = build_store(photos, cache_dir=tmp_path / "cache", store_px=64)
    assert again.folders[0].is_relative_to(tmp_path / "cache")


def test_store_among_the_outputs_of_a_run_is_found(tmp_path, make_root, monkeypatch):
    photos, _ = catalog.read(make_root())
    monkeypatch.setattr(platform, "home", lambda: tmp_path)
    folder = platform.run_folder("submissions", "01_eda")
    _, store, _ = open_data(str(tmp_path / "root"), str(tmp_path / "a"), store_dir=str(folder))
    assert store.folders[0].parent == folder / "stores"
    assert build_store(photos, cache_dir=tmp_path / "b").folders == store.folders


def test_a_store_without_room_is_refused_before_it_begins(tmp_path, make_root, monkeypatch):
    photos, _ = catalog.read(make_root())
    monkeypatch.setattr(store_module, "BLOCK", 2)
    monkeypatch.setattr(platform, "room_gb", lambda folder: 1e-6)
    message = r"will take about 0.0 GB \(by 200 of them\).*: free some, .* publish_store to False"
    with pytest.raises(OSError, match=message):
        build_store(photos, cache_dir=tmp_path, store_px=64)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("px", "seen_px", "packed"),
    [(224, 0, 352), (224, 256, 352), (0, 345, 352), (256, 0, 384), (0, 590, 608)],
)
def test_notebooks_of_a_profile_share_a_store_in_which_no_crop_is_enlarged(px, seen_px, packed):
    assert packed_px(px, seen_px) == packed >= max(1.5 * px, seen_px) and packed % 32 == 0


def test_small_networks_keep_a_little_more_than_they_look_at():
    assert [packed_px(px) for px in (48, 128, 199)] == [128, 146, 227]


def test_small_jpeg_of_many_bytes_is_encoded_anew(tmp_path, make_root):
    root = make_root()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8))
    noise.save(root / "train" / "b.jpg", quality=100)
    photos, _ = catalog.read(root)
    store = build_store(photos, cache_dir=tmp_path, store_px=64)
    assert store.files["bytes"][1] < (root / "train" / "b.jpg").stat().st_size / 1.5
    assert min(store[1].shape[:2]) == 64 and store.files["width"][1] == 90


def test_processes_that_load_photos_do_not_start_threads_of_their_own(toy_data):
    class Threads(Photos):
        def __getitem__(self, item):
            return torch.zeros(3, 1, 1, dtype=torch.uint8), cv2.getNumThreads(), item

    photos = Threads(toy_data[1], [0, 1], None)
    _, threads, _ = next(iter(loader(photos, device="cpu", workers=1)))
    assert threads.max() <= 1


def test_threads_that_load_photos_do_not_start_others_and_leave_the_networks_theirs(toy_data):
    class Threads(Photos):
        def __getitem__(self, item):
            return torch.zeros(3, 1, 1, dtype=torch.uint8), torch.get_num_threads(), item

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, threads, _ = next(iter(loader(Threads(toy_data[1], [0, 1], None), device="cpu")))
        assert threads.tolist() == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_store_of_several_folders_has_the_rows_of_each(toy_data, tmp_path, make_root):
    photos, first = toy_data
    other = build_store(catalog.read(make_root())[0], cache_dir=tmp_path, store_px=64)
    both = pickle.loads(pickle.dumps(Store(*first.folders, *other.folders)))
    assert both.key == first.key and len(both.readable) == len(photos) + 4
    np.testing.assert_array_equal(both[len(photos) + 2], other[2])
    np.testing.assert_array_equal(both[5], first[5])


def test_full_disk_while_the_store_is_written_leaves_none_behind(tmp_path, make_root, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    photos, _ = catalog.read(make_root())
    monkeypatch.setattr(platform.os, "fsync", full)
    with pytest.raises(OSError, match="disk full while writing 0.safetensors"):
        build_store(photos, cache_dir=tmp_path, store_px=64)
    monkeypatch.undo()
    assert build_store(photos, cache_dir=tmp_path, store_px=64).readable.all()


# -------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_whole_photos_are_torchvisions_resize_and_normalise_to_the_bit(fit, interpolation):
    image = picture(1, 50, 80)
    size = (32, 32) if fit == "squash" else 32
    reference = T.Compose(
        [
            T.ToImage(),
            T.Resize(size, T.InterpolationMode(interpolation)),
            T.CenterCrop(32),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(transforms.IMAGENET_MEAN, transforms.IMAGENET_STD),
        ]
    )
    found = transforms.Evaluation(32, fit, interpolation)(image)
    assert found.dtype is torch.uint8
    assert torch.equal(transforms.normalised(found), torch.as_tensor(reference(image)))


@pytest.mark.parametrize("fit", transforms.FITS)
def test_every_fit_gives_the_square_asked_for(fit):
    assert transforms.Evaluation(48, fit)(picture(1, 30, 90)).shape == (3, 48, 48)


def test_padding_keeps_the_shape_on_white():
    x = transforms.Evaluation(60, "pad")(np.zeros((30, 60, 3), np.uint8))
    assert x[:, 0].min() == 255 and x[:, 30].max() == 0


def test_unknown_fit_and_augmentation_list_the_known():
    with pytest.raises(
        ValueError, match=r"fit 'stretch' is unknown: use one of \('squash', 'crop', 'pad'\)"
    ):
        transforms.Evaluation(32, "stretch")
    with pytest.raises(
        ValueError,
        match=r"augmentation 'mild' is unknown: use one of \('kit', 'strong', 'study', 'none'\)",
    ):
        transforms.augmentation("mild", 32)


def drawn(transform, photo, n: int) -> np.ndarray:
    """(n, 3, S, S) of one photo."""
    return np.stack([transform(photo, np.random.default_rng(i)) for i in range(n)])


def test_augmentations_give_squares_and_depend_on_the_generator_alone():
    photo = picture(1, 90, 130)
    before = photo.copy()
    for name in transforms.RECIPES:
        transform = transforms.augmentation(name, 48)
        one, again, other = (transform(photo, np.random.default_rng(i)) for i in (0, 0, 1))
        assert one.shape == (3, 48, 48) and one.dtype is torch.uint8
        assert torch.equal(one, again) and torch.equal(one, other) == (name == "none")
    np.testing.assert_array_equal(photo, before)


def test_an_augmentation_without_settings_is_the_photo_as_in_evaluation():
    photo = picture(1, 90, 130)
    plain = transforms.augmentation("none", 48)(photo, np.random.default_rng(0))
    assert torch.equal(plain, transforms.Evaluation(48)(photo))


GEOMETRY = {
    "crop": ({"area": (0.3, 1.0)}, [T.RandomResizedCrop(64, scale=(0.3, 1.0))]),
    "rotation": ({"degrees": 40.0}, [T.RandomRotation(40, T.InterpolationMode.BILINEAR)]),
    "flip": ({"flipped": 0.5}, [T.RandomHorizontalFlip()]),
    "perspective": ({"perspective": 0.5}, [T.RandomPerspective(0.5)]),
    "blanked": ({"blanked": 0.5}, [T.RandomErasing(0.5, (0.02, 0.25), value=[124, 116, 104])]),
}
COLOURS = {
    "brightness": ({"brightness": 0.4}, [T.ColorJitter(brightness=0.4)]),
    "contrast": ({"contrast": 0.4}, [T.ColorJitter(contrast=0.4)]),
    "saturation": ({"saturation": 0.4}, [T.ColorJitter(saturation=0.4)]),
    "hue": ({"hue": 0.1}, [T.ColorJitter(hue=0.1)]),
    "all colours": (
        {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
        [T.ColorJitter(0.4, 0.4, 0.4, 0.1)],
    ),
}
IN_RECIPES = ["crop", "rotation", *COLOURS]  # they are tried as a whole, too


def quantiles(images: np.ndarray) -> np.ndarray:
    """What drawings of one photo look like, as distributions over drawings: (quantile, feature).

    Features: the mean of each of 4 x 4 fields and channels, 0..255.
    """
    n, _, side, _ = images.shape
    fields = images.reshape(n, 3, 4, side // 4, 4, side // 4).mean((3, 5)).reshape(n, -1)
    return np.quantile(fields, [0.1, 0.2, 0.3, 0.7, 0.8, 0.9], axis=0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in IN_RECIPES else [])
        for name in [*GEOMETRY, *COLOURS]
    ],
)
def test_drawings_are_distributed_as_torchvisions(change):
    settings, steps = (GEOMETRY | COLOURS)[change]
    photo = cv2.GaussianBlur(picture(3, 64, 64), (0, 0), 3)
    reference = T.Compose([T.ToImage(), *steps])
    torch.manual_seed(0)
    theirs = quantiles(np.stack([reference(photo) for _ in range(1500)]))
    ours = quantiles(drawn(transforms.Augmentation(64, **settings), photo, 1500))
    spread = (theirs[-1] - theirs[0]).mean()
    assert np.abs(ours - theirs).mean() < 0.06 * spread + 0.5


def test_recipes_as_a_whole_are_distributed_as_torchvisions():
    photo = cv2.GaussianBlur(picture(3, 64, 64), (0, 0), 3)
    study = [
        T.Resize((73, 73)),
        T.RandomResizedCrop(64),
        T.RandomRotation(50),
        T.RandomHorizontalFlip(),
        T.ColorJitter(0.1, 0.1, 0.1, 0.1),
    ]
    reference = T.Compose([T.ToImage(), *study])
    torch.manual_seed(0)
    theirs = quantiles(np.stack([reference(photo) for _ in range(1500)]))
    ours = quantiles(drawn(transforms.augmentation("study", 64), photo, 1500))
    assert np.abs(ours - theirs).mean() < 0.04 * (theirs[-1] - theirs[0]).mean()


def test_what_is_turned_over_the_edge_is_black_and_a_flip_is_exact():
    white = np.full((40, 40, 3), 255, np.uint8)
    turned = drawn(transforms.Augmentation(40, degrees=45.0), white, 20)
    assert (turned[:, :, 0, 0] == 0).all(1).mean() > 0.5 and (turned[:, :, 20, 20] == 255).all()
    photo = picture(1, 40, 40)
    flipped = transforms.Augmentation(40, flipped=1.0)(photo, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped.permute(1, 2, 0), photo[:, ::-1])


def test_study_resizes_to_256_for_224_and_leaves_8_percent_of_the_area():
    study = transforms.augmentation("study", 224)
    assert study.squashed and study.area == (0.08, 1.0) and study.degrees == 50 and study.hue == 0.1
    square = np.zeros((256, 256, 3), np.uint8)
    ratio = 3 / 4, 4 / 3
    crops = [
        transforms._crop(square, study.area, ratio, np.random.default_rng(i)) for i in range(300)
    ]
    shares = [crop.size / square.size for crop in crops]
    assert min(shares) < 0.12 and max(shares) > 0.85
    wide = np.zeros((10, 100, 3), np.uint8)
    wide[:, 43:56] = 1
    middle = transforms._crop(wide, (1.0, 1.0), ratio, np.random.default_rng(0))
    assert middle.shape == (10, 13, 3) and middle.all()


@pytest.mark.parametrize(("share", "height", "width"), [(1, 40, 60), (0.5, 20, 30), (1e-6, 1, 1)])
def test_a_zoom_keeps_the_central_share_of_each_side(share, height, width):
    image = picture()
    top, left = (40 - height) // 2, (60 - width) // 2
    expected = image[top : top + height, left : left + width]
    np.testing.assert_array_equal(transforms.zoomed(image, share), expected)


@pytest.mark.parametrize("share", [0, -0.5, 1.2])
def test_a_zoom_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=f"zoom {share} is no share of a photo's sides: use a num"):
        transforms.zoomed(picture(), share)


def test_photos_are_zoomed_row_by_row_before_their_transform(toy_data):
    store, show = toy_data[1], transforms.Evaluation(32)
    photos = Photos(store, [3, 4], show, zoom=[0.5, 1.0])
    torch.testing.assert_close(photos[0][0], torch.as_tensor(show(store[3][24:72, 24:72])))
    torch.testing.assert_close(photos[1][0], torch.as_tensor(show(store[4])))
    assert torch.equal(Photos(store, [3], show, zoom=0.5)[0][0], photos[0][0])


def test_product_is_cut_out_of_its_even_ground():
    photo = np.full((80, 80, 3), 250, np.uint8)
    photo[20:60, 30:50] = (200, 30, 30)
    alpha = transforms.foreground(photo)
    assert alpha[30:50, 35:45].min() > 0.99 and alpha[:10].max() < 0.01
    assert alpha.sum() == pytest.approx(38 * 18, rel=0.1)


def test_customer_like_photo_keeps_the_product_and_changes_the_ground():
    photo = np.full((80, 80, 3), 250, np.uint8)
    photo[20:60, 25:55] = (220, 20, 20)
    green = np.full((90, 120, 3), (0, 160, 0), np.uint8)
    made = transforms.customer_like(photo, green, np.random.default_rng(0))
    assert made.shape == photo.shape and made.dtype == np.uint8
    assert made[38:42, 38:42, 0].mean() > 2 * made[38:42, 38:42, 1].mean()
    assert made[:6, :6, 1].mean() > 2 * made[:6, :6, 0].mean()
    np.testing.assert_array_equal(
        transforms.customer_like(photo, green, np.random.default_rng(0)), made
    )


def test_only_shop_photos_are_made_customer_like_and_the_same_in_every_order(toy_data):
    photos, store = toy_data
    rows, shop = photos.index[:12], (photos.domain[:12] == "shop").to_numpy()
    assert 0 < shop.sum() < 12
    plain = Photos(store, rows, transforms.Evaluation(32))
    made = Photos(store, rows, transforms.Evaluation(32), shop=shop, clutter=1.0)
    changed = [not torch.equal(plain[i][0], made[i][0]) for i in range(12)]
    assert changed == shop.tolist()
    assert torch.equal(made[int(shop.argmax())][0], made[int(shop.argmax())][0])


# ----------------------------------------------------------------------------------------- loading


def test_augmentation_depends_on_seed_epoch_and_row_alone(toy_data):
    _, store = toy_data
    rows = np.arange(12)

    def make(order, seed=0):
        return Photos(store, rows[order], transforms.augmentation("kit", 32), seed=seed)

    forward, backward = make(slice(None)), make(slice(None, None, -1))
    torch.rand(7)  # the global state must not matter
    torch.testing.assert_close(forward[2][0], backward[9][0], rtol=0, atol=0)
    before = forward[2][0]
    forward.set_epoch(1)
    assert not torch.equal(forward[2][0], before) and not torch.equal(
        make(slice(None), seed=1)[2][0], before
    )


def test_a_photo_shown_twice_in_an_epoch_looks_different(toy_data):
    photos = Photos(toy_data[1], np.arange(4), transforms.augmentation("kit", 32))
    first, again = photos[2, 0][0], photos[2, 1][0]
    assert torch.equal(first, photos[2][0]) and not torch.equal(first, again)
    batches = [np.array([(2, 1), (0, 0)])]
    for workers in (0, 1):
        loaded = loader(photos, batch_sampler=batches, device="cpu", workers=workers)
        pixels, _, rows = next(iter(loaded))
        assert torch.equal(pixels[0], again) and rows.tolist() == [2, 0]


@pytest.mark.parametrize("n", [1, 2, 12])
def test_shop_photos_alone_are_laid_on_another_photo(toy_data, n):
    class Seen(dict):
        """A store that notes what it is asked for."""

        def __getitem__(self, row):
            self[row] = True
            return toy_data[1][row]

    for i in range(n):
        store = Seen()
        made = Photos(store, np.arange(n), transforms.Evaluation(32), shop=True, clutter=1.0)
        plain = Photos(toy_data[1], np.arange(n), transforms.Evaluation(32))
        assert not torch.equal(made[i][0], plain[i][0])
        assert len(store) == min(n, 2)


def test_reading_a_photo_leaves_the_global_random_state_alone(toy_data):
    photos = Photos(toy_data[1], [0, 1], transforms.augmentation("kit", 32))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    photos[0]
    torch.testing.assert_close(torch.rand(3), expected)


def test_loading_leaves_the_global_random_state_alone(toy_data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(loader(Photos(toy_data[1], [0, 1], transforms.augmentation("kit", 32)), device="cpu"))
    torch.testing.assert_close(torch.rand(3), expected)


def test_loader_with_workers_gives_the_same_batches(toy_data):
    photos = Photos(
        toy_data[1], np.arange(10), transforms.augmentation("kit", 32), labels=np.arange(10)
    )
    how = {"device": "cpu", "batch_size": 4}
    for a, b in zip(
        loader(photos, workers=0, **how), loader(photos, workers=2, **how), strict=True
    ):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_labels_and_rows_must_match(toy_data):
    with pytest.raises(ValueError, match="broadcast"):
        Photos(toy_data[1], [0, 1, 2], None, labels=[0, 1])


# ----------------------------------------------------------------------------- what a picture says


def test_hash_survives_resizing_and_differs_between_pictures():
    image = picture(1, 100, 140)
    smaller = cv2.resize(image, (70, 50), interpolation=cv2.INTER_AREA)
    bits = lambda a, b: int(np.bitwise_count(audit.difference_hash(a) ^ audit.difference_hash(b)))  # noqa: E731
    assert bits(image, smaller) <= 4
    assert bits(image, picture(2, 100, 140)) > 10


def test_border_tells_shop_from_customer_photos_on_the_toy_set(toy_data):
    photos, store = toy_data
    shop = np.array([audit.border_whiteness(store[row]) > 0.5 for row in photos.index])
    assert (shop == (photos.domain == "shop")).mean() > 0.9


# ---------------------------------------------------------------------------------- colour layouts


def test_a_colour_layout_counts_each_quarter_as_a_slow_loop_does():
    image = np.random.default_rng(0).integers(0, 256, (101, 77, 3), np.uint8)
    expected = np.zeros((4, 64), int)
    for i in range(64):
        for j in range(64):
            r, g, b = image[(2 * i + 1) * 101 // 128, (2 * j + 1) * 77 // 128] // 64
            expected[2 * (i >= 32) + (j >= 32), 16 * int(r) + 4 * int(g) + int(b)] += 1
    np.testing.assert_array_equal(audit.colour_layout(image), expected.ravel())


def test_colour_layouts_are_of_the_files_whatever_the_size_of_the_store(make_root, tmp_path):
    root = make_root()
    Image.fromarray(picture(0, 500, 700)).save(root / "train" / "b.jpg")
    photos, _ = catalog.read(root)
    store = build_store(photos, cache_dir=tmp_path, store_px=32)
    for row in (3, 1):
        shown = read_image(root / photos.path[row], least_px=64)
        np.testing.assert_array_equal(store.layouts([row])[0], audit.colour_layout(shown))
    assert store.layouts(photos.index).shape == (4, 256)


def test_colour_layout_takes_photos_smaller_than_its_grid():
    assert (
        audit.colour_layout(np.zeros((1, 3, 3), np.uint8)).reshape(4, 64)[:, 0].tolist()
        == [1024] * 4
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3, 2), (300, 7), (90, 90)])
def test_customer_like_takes_photos_of_any_size_and_a_photo_as_its_own_ground(size):
    for shop in (picture(1, *size), np.full((*size, 3), 255, np.uint8)):
        for ground in (shop, picture(2, 1, 1), picture(2, 5, 400)):
            seen = transforms.customer_like(shop, ground, np.random.default_rng(0))
            assert seen.shape == shop.shape and seen.dtype == np.uint8


def test_a_photo_that_is_all_ground_is_all_product():
    assert (transforms.foreground(np.full((20, 30, 3), 255, np.uint8)) == 1).all()
