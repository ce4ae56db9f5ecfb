"""Image files of every kind, the sizes at which they are decoded, and the cache of resized ones."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import resource
import signal
import struct
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, get_args

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from matex_pl.data import NihDataModule
from matex_pl.data.cache import ImageCache, _kept_image
from matex_pl.data.images import read_image, read_levels, read_size, resize_image
from matex_pl.data.transforms import ImageTransform, ResizeMode

HEIGHT, WIDTH = 120, 90


def _ramp() -> np.ndarray:
    """An image that is brighter to the right and, more slowly, downwards: `(120, 90)` in [0, 1]; all corners differ."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (2 * columns / (WIDTH - 1) + rows / (HEIGHT - 1)) / 3


def _bytes() -> np.ndarray:
    return np.rint(_ramp() * 255).astype(np.uint8)


def _gray() -> Image.Image:
    return Image.fromarray(_bytes())


def _save(image: Image.Image, path: Path, **settings: object) -> Path:
    image.save(path, **settings)
    return path


def _palette(path: Path) -> Path:
    return _save(_gray().convert("P"), path / "image.png")


def _see_through(path: Path) -> Path:
    image = _gray().convert("RGBA")
    image.putalpha(Image.fromarray(np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)))
    return _save(image, path / "image.png")


def _deep(path: Path) -> Path:
    cv2.imwrite(str(path / "image.png"), np.rint(_ramp() * 4095).astype(np.uint16))
    return path / "image.png"


def _deep_color(path: Path) -> Path:
    cv2.imwrite(str(path / "image.png"), np.rint(np.stack([_ramp()] * 3, -1) * 65535).astype(np.uint16))
    return path / "image.png"


def _white_is_zero(path: Path, dtype: type) -> Path:
    levels = np.rint((1 - _ramp()) * 65535).astype(dtype)
    path = _save(Image.fromarray(levels), path / "image.tif")
    # PhotometricInterpretation, a short, from 1 to 0: Pillow does not write it.
    one, zero = (struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0))
    assert path.read_bytes().count(one) == 1
    path.write_bytes(path.read_bytes().replace(one, zero))
    return path


KINDS = {
    "png": lambda path: _save(_gray(), path / "image.png"),
    "png_rgb": lambda path: _save(_gray().convert("RGB"), path / "image.png"),
    "png_palette": _palette,
    "png_rgba": _see_through,
    "png_gray_alpha": lambda path: _save(_gray().convert("LA"), path / "image.png"),
    "png_16": _deep,
    "png_16_rgb": _deep_color,
    "tiff_16": lambda path: _save(Image.fromarray(np.rint(_ramp() * 65535).astype(np.uint16)), path / "image.tif"),
    "tiff_16_white_is_0": lambda path: _white_is_zero(path, np.uint16),
    "tiff_float_white_is_0": lambda path: _white_is_zero(path, np.float32),
    "tiff_float": lambda path: _save(Image.fromarray(_ramp().astype(np.float32)), path / "image.tif"),
    "jpeg": lambda path: _save(_gray(), path / "image.jpg", quality=95),
    "jpeg_rgb": lambda path: _save(_gray().convert("RGB"), path / "image.jpg", quality=95),
    "jpeg_cmyk": lambda path: _save(_gray().convert("RGB").convert("CMYK"), path / "image.jpg", quality=95),
    "jpeg_progressive": lambda path: _save(_gray(), path / "image.jpg", quality=95, progressive=True),
    "bmp": lambda path: _save(_gray(), path / "image.bmp"),
    "webp": lambda path: _save(_gray().convert("RGB"), path / "image.webp", lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_image(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path)
    image = read_image(path)
    assert image.pixels.dtype == np.uint8
    assert image.size == read_size(path) == image.pixels.shape == (HEIGHT, WIDTH)
    np.testing.assert_allclose(image.pixels, _ramp() * 255, atol=6)
    small = read_image(path, lambda size: (size[0] // 3, size[1] // 3))
    assert small.size == (HEIGHT, WIDTH)
    np.testing.assert_allclose(small.pixels, cv2.resize(_ramp(), (30, 40), interpolation=cv2.INTER_AREA) * 255, atol=6)


@pytest.mark.parametrize("suffix", ["tif", "webp"])
def test_first_of_several_pages_with_a_warning(tmp_path: Path, suffix: str) -> None:
    pages = [Image.fromarray(np.full((HEIGHT, WIDTH), level, dtype=np.uint8)) for level in (90, 20, 200)]
    path = _save(pages[0], tmp_path / f"image.{suffix}", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match=rf"image\.{suffix} has 3 pages\. Only the first is used"):
        image = read_image(path)
    np.testing.assert_allclose(image.pixels, 90, atol=2)


def test_levels_keep_what_is_hardly_above_black(tmp_path: Path) -> None:
    """An image is stretched to 8 bits, in which 1 of 65,535 is nothing."""
    levels = np.array([[0, 1], [65535, 0]], dtype=np.uint16)
    path = _save(Image.fromarray(levels), tmp_path / "image.png")
    assert read_image(path).pixels.tolist() == [[0, 0], [255, 0]]
    assert read_levels(path).tolist() == levels.tolist()
    turned = read_levels(_white_is_zero(tmp_path, np.uint16))
    np.testing.assert_allclose(turned / 65535, _ramp(), atol=1e-4)
    several = tmp_path / "several.tif"
    Image.fromarray(levels).save(several, save_all=True, append_images=[Image.fromarray(levels)])
    with pytest.warns(UserWarning, match=r"several\.tif has 2 pages\. Only the first is used"):
        assert read_levels(several).tolist() == levels.tolist()


def test_what_is_see_through_is_black(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 255))
    image.paste((255, 255, 255, 0), (0, 0, 4, 8))
    pixels = read_image(_save(image, tmp_path / "image.png")).pixels
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


def test_sixteen_bits_are_kept_until_after_resizing(tmp_path: Path) -> None:
    """Steps far below one of the 256 levels of 16 bits."""
    deep = (np.repeat(np.arange(8), 16) * 12 + 30000)[None].repeat(128, 0).astype(np.uint16)
    deep[0, 0], deep[0, 1] = 29000, 31000
    cv2.imwrite(str(tmp_path / "image.png"), deep)
    pixels = read_image(tmp_path / "image.png", lambda size: (8, 8)).pixels
    expected = cv2.resize((deep - 29000) / 2000.0, (8, 8), interpolation=cv2.INTER_AREA) * 255
    np.testing.assert_allclose(pixels, expected, atol=0.51)
    assert len(np.unique(pixels[4])) == 8


def test_image_of_one_deep_level_is_black(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "image.png"), np.full((9, 9), 4000, dtype=np.uint16))
    assert not read_image(tmp_path / "image.png").pixels.any()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(_gray(), tmp_path / f"read.{suffix}", exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    read = read_image(path)
    assert read.size == read_size(path) == expected.shape
    np.testing.assert_allclose(read.pixels, expected, atol=6 if suffix == "jpg" else 0)
    small = read_image(path, lambda size: (size[0] // 2, size[1] // 2)).pixels
    np.testing.assert_allclose(small, resize_image(expected, small.shape), atol=4)
    stored = read_image(path, apply_exif_orientation=False)
    assert stored.size == read_size(path, apply_exif_orientation=False) == (HEIGHT, WIDTH)


def test_turned_tiff_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = _save(_gray(), tmp_path / "image.tif", exif=exif)
    with pytest.raises(ValueError, match="TIFF with the orientation 6"):
        read_image(path)


@pytest.mark.parametrize("size", [(2500, 3000), (1537, 1111), (801, 803)])
@pytest.mark.parametrize("target", [224, 96])
def test_reduced_decoding_is_the_image(tmp_path: Path, size: tuple[int, int], target: int) -> None:
    """A JPEG decoded at a part of its scale beside the whole image averaged: the same to a gray level or two."""
    rng = np.random.default_rng(0)
    rough = rng.normal(size=(size[0] // 40 + 2, size[1] // 40 + 2)).astype(np.float32)
    image = cv2.resize(rough, size[::-1], interpolation=cv2.INTER_CUBIC)
    image = np.clip(128 + 50 * image, 0, 255).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "image.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    fit = ImageTransform((target, target)).target_size
    pixels = read_image(tmp_path / "image.jpg", fit).pixels.astype(float)
    whole = resize_image(cv2.imread(str(tmp_path / "image.jpg"), cv2.IMREAD_GRAYSCALE), fit(size)).astype(float)
    # Of steps of up to 50 levels from one of its pixels to the next.
    assert np.abs(pixels - whole).mean() < 1.2
    assert np.abs(pixels - whole).max() <= 10
    assert abs((pixels - whole).mean()) < 0.2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("image.png", b"not an image"),
        ("image.png", b""),
        ("image.jpg", b"\xff\xd8\xff\xe0 no more"),
        ("image.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ],
    ids=["text", "empty", "jpeg_start", "postscript"],
)
def test_what_is_no_image_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_image, read_size):
        with pytest.raises(ValueError, match=rf"No readable image at '.*{name}' \(.+\)\. Copy the file again"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"There is no image at '.*none\.png'"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("kind", ["png", "png_16", "png_16_rgb", "jpeg", "jpeg_progressive", "tiff_16"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match="No readable image"):
        read_image(path)
    with pytest.raises(ValueError, match="No readable image"):
        read_image(path, lambda size: (12, 9))


@lru_cache
def content_of(write: Callable[[Path], Path]) -> bytes:
    """Content of a file that a function writes into a folder."""
    with TemporaryDirectory() as folder:
        return write(Path(folder)).read_bytes()


def check_damaged(path: Path, content: bytes, data: st.DataObject) -> None:
    """A file changed in up to four places is read, or refused by name; any other error is a bug, and any other form."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of them in the headers.
        most = data.draw(st.sampled_from([len(changed) - 1, min(700, len(changed) - 1)]))
        place = data.draw(st.integers(0, max(most, 0)))
        changed[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(changed)
    for fit in (None, lambda size: (7, 5)):
        try:
            image = read_image(path, fit)
        except ValueError as error:
            if str(path) not in str(error):
                raise
            continue
        assert image.pixels.dtype == np.uint8
        assert image.pixels.shape == (image.size if fit is None else (7, 5))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(), kind=st.sampled_from(["png", "png_16_rgb", "png_palette", "jpeg", "jpeg_cmyk", "tiff_16", "bmp"])
)
def test_damaged_files_are_read_or_refused(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    check_damaged(tmp_path / "image", content_of(KINDS[kind]), data)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    size=st.tuples(st.integers(4, 64), st.integers(4, 64)),
    resize_mode=st.sampled_from(get_args(ResizeMode)),
    inner=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_boxes_and_image_go_the_same_way(
    shape: tuple[int, int], size: tuple[int, int], resize_mode: ResizeMode, inner: tuple[float, ...]
) -> None:
    """A box has the same place in the image's rectangle as it had in the image, but for what the frame cuts off."""
    (x0, x1), (y0, y1) = sorted(inner[:2]), sorted(inner[2:])
    assume(x1 - x0 > 0.01 and y1 - y0 > 0.01)
    box = np.array([x0, y0, x1, y1]) * np.tile(shape[::-1], 2)
    transform = ImageTransform(size, resize_mode)
    _, boxes, image, _ = transform(np.zeros(shape, dtype=np.uint8), [box.tolist()])
    expected = image[:2].repeat(2) + torch.tensor([x0, y0, x1, y1]) * (image[2:] - image[:2]).repeat(2)
    cut, lost = transform.count_cut([box.tolist()], shape)
    assert len(boxes) == 1 - lost
    if not lost:
        torch.testing.assert_close(boxes[0], expected.clamp(0, 1).float(), atol=1e-4, rtol=0)
        assert resize_mode == "shortest" or not cut


SIDES = st.integers(1, 24)
# What files hold, and in which of them: gray, colors, colors with opacity; of 8, 16 and 32 bits.
STORED = {
    "png": (np.uint8, st.tuples(SIDES, SIDES) | st.tuples(SIDES, SIDES, st.sampled_from([3, 4]))),
    "deep.png": (np.uint16, st.tuples(SIDES, SIDES) | st.tuples(SIDES, SIDES, st.sampled_from([3, 4]))),
    "tif": (np.float32, st.tuples(SIDES, SIDES)),
    "int.tif": (np.int32, st.tuples(SIDES, SIDES)),
    "bool.png": (np.bool_, st.tuples(SIDES, SIDES)),
}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    kind=st.sampled_from(list(STORED)),
    resize_mode=st.sampled_from(get_args(ResizeMode)),
    augment=st.booleans(),
)
def test_any_pixels_become_a_image(
    tmp_path: Path, data: st.DataObject, kind: str, resize_mode: ResizeMode, augment: bool
) -> None:
    """Pixels of every type, shape and value: a read whose grays are in their order, or, of NaN and Inf, an error."""
    dtype, shapes = STORED[kind]
    pixels = data.draw(arrays(dtype, shapes))
    path = tmp_path / f"read.{kind}"
    if dtype == np.uint16:
        cv2.imwrite(str(path), pixels)
    else:
        Image.fromarray(pixels).save(path)
    if dtype == np.float32 and not np.isfinite(pixels).all():
        with pytest.raises(ValueError, match="a pixel is not finite"):
            read_image(path)
        return
    read = read_image(path).pixels
    assert (read.shape, read.dtype) == (pixels.shape[:2], np.uint8)
    if pixels.ndim == 2:
        order = np.argsort(pixels, axis=None)
        assert (np.diff(read.ravel()[order].astype(int)) >= 0).all()
        # Eight bits stay as they are; others run over all levels.
        expected = {0, 255} if dtype != np.uint8 and np.ptp(pixels.astype(float)) else {read.min(), read.max()}
        assert {read.min(), read.max()} == (expected if dtype != np.bool_ else {255 * x for x in np.unique(pixels)})
    transform = ImageTransform((16, 12), resize_mode, augment=augment)
    image, boxes, rectangle, _ = transform(read, [(0, 0, *read.shape[::-1])], seed=data.draw(st.integers(0, 2**31)))
    assert (image.shape, image.dtype) == ((3, 16, 12), torch.uint8)
    assert rectangle.isfinite().all()
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_cache_keeps_images_and_sees_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = KINDS["jpeg"](tmp_path), ImageCache(tmp_path / "kept")
    pad, crop = ImageTransform((32, 32)), ImageTransform((32, 32), "shortest")
    first = cache.read(path, pad.target_size, pad.settings)
    assert first.size == (HEIGHT, WIDTH)
    np.testing.assert_array_equal(first.pixels, read_image(path, pad.target_size).pixels)
    assert cache.read(path, crop.target_size, crop.settings).pixels.shape == (43, 32)
    kept = sorted((tmp_path / "kept").rglob("*.npz"))
    assert len(kept) == 2
    assert sorted((tmp_path / "kept").rglob("*.part")) == []

    with monkeypatch.context() as context:
        context.setattr("matex_pl.data.cache.read_image", lambda *_, **__: pytest.fail("decoded again"))
        again = cache.read(path, pad.target_size, pad.settings)
    np.testing.assert_array_equal(again.pixels, first.pixels)
    assert again.size == first.size

    for broken in kept:
        broken.write_bytes(b"half a fi")
    np.testing.assert_array_equal(cache.read(path, pad.target_size, pad.settings).pixels, first.pixels)

    _save(Image.fromarray(255 - _bytes()), path)
    os.utime(path, ns=(1, 1))
    np.testing.assert_allclose(
        cache.read(path, pad.target_size, pad.settings).pixels, 255 - first.pixels.astype(int), atol=9
    )
    with pytest.raises(FileNotFoundError, match="There is no image"):
        cache.read(tmp_path / "none.png", pad.target_size, pad.settings)


def test_a_damaged_image_of_the_cache_is_decoded_anew(tmp_path: Path) -> None:
    """Any byte of it, those of the archive's own headers too."""
    path, cache = KINDS["png"](tmp_path), ImageCache(tmp_path / "kept")
    image = cache.read(path, lambda size: (4, 3), "")
    (kept,) = (tmp_path / "kept").rglob("*.npz")
    content = kept.read_bytes()
    for place, change in itertools.product(range(len(content)), (0x01, 0xFF)):
        kept.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
        found = _kept_image(kept)
        if found is not None:
            np.testing.assert_array_equal(found.pixels, image.pixels)
            assert found.size == image.size


def _cached(root: Path, folder: Path) -> NihDataModule:
    from test_cli import nih_folder

    root = root if root.exists() else nih_folder(root)
    return NihDataModule(str(root), cache_dir=str(folder), image_size=32, num_workers=0, batch_size=4)


def _killed_in_half(file: BinaryIO, **arrays: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    file.write(content.getvalue()[: len(content.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _keep_one_and_a_half(data: NihDataModule) -> None:
    images = data.dataset("val")
    images[0]
    np.savez = _killed_in_half
    images[len(images) - 1]


def test_killed_while_a_image_is_kept(tmp_path: Path) -> None:
    root, folder = tmp_path / "nih", tmp_path / "kept"
    data = _cached(root, folder)
    data.setup("fit")
    process = multiprocessing.get_context("fork").Process(target=_keep_one_and_a_half, args=(data,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (part,) = folder.rglob("*.part")
    assert part.stat().st_size > 0
    assert len(list(folder.rglob("*.npz"))) == 1

    for hours in (0, 2):
        os.utime(part, (time.time() - hours * 3600,) * 2)
        data = _cached(root, folder)
        data.setup("fit")
        assert part.exists() == (hours == 0)
        for pair, sample in zip(data.pairs["val"], data.dataset("val"), strict=False):
            whole = ImageTransform((32, 32))(data.read_image(pair), pair.boxes)[0]
            torch.testing.assert_close(sample.image, whole, atol=1, rtol=0)
    assert len(list(folder.rglob("*.npz"))) == len({pair.image for pair in data.pairs["val"]})


def test_a_cache_that_takes_no_images_is_named_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Nothing can be written in .*file/kept: Not a directory\. Give another folder"):
        _cached(tmp_path / "nih", tmp_path / "file" / "kept").setup("fit")


def test_a_full_cache_that_takes_no_more_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an administrator may share it, read-only."""

    def refuse(folder: Path) -> None:
        raise OSError(f"Nothing can be written in {folder}")

    monkeypatch.setattr("matex_pl.data.cache.check_folder", refuse)
    with pytest.raises(OSError, match="Nothing can be written"):
        _cached(tmp_path / "nih", tmp_path / "kept").setup("fit")
    monkeypatch.undo()
    data = _cached(tmp_path / "nih", tmp_path / "kept")
    data.setup("fit")
    images = data.dataset("val")
    wanted = [images[index].image for index in range(len(images))]
    monkeypatch.setattr("matex_pl.data.cache.check_folder", refuse)
    monkeypatch.setattr("matex_pl.data.cache.read_image", None)
    data = _cached(tmp_path / "nih", tmp_path / "kept")
    with pytest.warns(UserWarning, match="cache_dir .* is full or read-only .*Nothing can be written"):
        data.setup("fit")
    for index, image in enumerate(wanted):
        assert torch.equal(data.dataset("val")[index].image, image)


def test_a_cache_without_room_is_done_without(tmp_path: Path) -> None:
    data = _cached(tmp_path / "nih", tmp_path / "kept")
    data.setup("fit")
    images, limits = data.dataset("val"), resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            found = [images[index].image for index in range(len(images))]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(found) > 1
    assert [str(warning.message) for warning in caught] == [
        f"cache_dir {tmp_path / 'kept'} is full or read-only (File too large). Images that are not cached are decoded "
        "each time."
    ]
    assert [path for path in (tmp_path / "kept").rglob("*") if path.is_file()] == []
    # As soon as there is room again, images are kept.
    for index, image in enumerate(found):
        assert torch.equal(images[index].image, image)
    assert list((tmp_path / "kept").rglob("*.npz"))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("resize_mode", ["longest", "shortest", "squash"])
def test_data_module_reads_through_the_cache(tmp_path: Path, resize_mode: ResizeMode, cached: bool) -> None:
    from test_cli import nih_folder

    root = nih_folder(tmp_path / "nih")
    cache_dir = str(tmp_path / "kept") if cached else None
    data = NihDataModule(
        str(root), cache_dir=cache_dir, image_size=32, num_workers=0, batch_size=4, resize_mode=resize_mode
    )
    data.setup("fit")
    first, again = next(iter(data.val_dataloader())), next(iter(data.val_dataloader()))
    assert torch.equal(first["image"], again["image"])
    assert len(list((tmp_path / "kept").rglob("*.npz"))) == (len(set(first["image_id"])) if cached else 0)
    pair = data.pairs["val"][0]
    transform = ImageTransform((32, 32), resize_mode)
    torch.testing.assert_close(transform(data.read_image(pair), pair.boxes)[0], first["image"][0])
