"""Images in the model's frame, batches of them, and loaders that a run can repeat."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from matex_pl.data import ChestXrayDataModule, ImageTextPair, PhantomDataModule, collate
from matex_pl.data.datamodule import EpochSampler
from matex_pl.data.pair import Sample
from matex_pl.data.transforms import ImageTransform, ResizeMode

TISSUE, BRIGHT = 90, 255


class DrawnImages(ChestXrayDataModule):
    """Images of one gray each, whose pairs are given."""

    def __init__(self, listed: Sequence[ImageTextPair], **settings: object) -> None:
        super().__init__(**{"image_size": 16, "batch_size": 2, "num_workers": 0, **settings})
        self.listed = list(listed)

    def list_pairs(self) -> list[ImageTextPair]:
        return self.listed

    def read_image(self, pair: ImageTextPair) -> np.ndarray:
        return np.full((20, 10), int(pair.image), dtype=np.uint8)


def _pair(name: str, split: str = "train", **fields: object) -> ImageTextPair:
    return ImageTextPair(
        **{"id": name, "patient_id": name, "image_id": name, "image": 100, "phrase": "x", "split": split, **fields}
    )


def _pairs(train: int = 4, val: int = 2, test: int = 2) -> list[ImageTextPair]:
    counts = {"train": train, "val": val, "test": test}
    return [_pair(f"{split}-{n}", split, image=n) for split, count in counts.items() for n in range(count)]


def _bright_box(image: Tensor) -> Tensor:
    """Bounding box of what is nearer to the brightest pixel than to the image's tissue, in pixels."""
    gray = image[0].float()
    rows, columns = torch.where(gray > (gray.max() + gray[gray > 0].median()) / 2)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def _painted(shape: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.full(shape, TISSUE, dtype=np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = BRIGHT
    return image


@pytest.mark.parametrize("resize_mode", ["longest", "squash"])
@pytest.mark.parametrize("shape", [(300, 240), (240, 300), (250, 250), (67, 101), (400, 30)])
@pytest.mark.parametrize("size", [(224, 224), (112, 96)])
def test_boxes_follow_the_pixels(shape: tuple[int, int], size: tuple[int, int], resize_mode: ResizeMode) -> None:
    height, width = shape
    box = (width // 5, height // 3, width // 2, height // 2)
    image, boxes, pixels, _ = ImageTransform(size, resize_mode)(_painted(shape, box), [box])
    frame = torch.tensor([size[1], size[0]] * 2)
    assert image.shape == (3, *size)
    assert image.dtype == torch.uint8
    # A bright pixel at the edge is more than half covered by the box.
    torch.testing.assert_close(boxes[0] * frame, _bright_box(image), atol=0.75, rtol=0)
    rows, columns = torch.where(image[0] > 0)
    there = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    torch.testing.assert_close(pixels * frame, there.float())


def test_exact_halving() -> None:
    image, boxes, pixels, _ = ImageTransform((32, 32))(_painted((64, 32), (8, 20, 16, 40)), [(8, 20, 16, 40)])
    torch.testing.assert_close(pixels, torch.tensor([8, 0, 24, 32]) / 32)
    torch.testing.assert_close(boxes, torch.tensor([[12, 10, 16, 20]]) / 32)
    assert (image[:, 10:20, 12:16] == BRIGHT).all()
    assert (image[:, :, :8] == 0).all()


@pytest.mark.parametrize("shape", [(300, 240), (240, 300), (250, 250), (100, 310)])
@pytest.mark.parametrize("size", [(224, 224), (112, 96), (96, 200)])
def test_boxes_follow_a_crop(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """The middle of the pixels fills the frame; a box in it follows, one that is cut ends at the frame's edge."""
    height, width = shape
    transform, frame = ImageTransform(size, "shortest"), torch.tensor([size[1], size[0]] * 2)
    inner = (width * 9 // 20, height * 9 // 20, width * 12 // 20, height * 11 // 20)
    whole = (0, 0, width, height)
    image, boxes, pixels, _ = transform(_painted(shape, inner), [inner, whole])
    assert (image > 0).all()
    torch.testing.assert_close(boxes[0] * frame, _bright_box(image), atol=0.75, rtol=0)
    torch.testing.assert_close(boxes[1], torch.tensor([0.0, 0, 1, 1]))
    assert (pixels[:2] <= 0).all()
    assert (pixels[2:] >= 1).all()
    # The pixels keeps its shape, but for the rounding to whole pixels.
    sides = (pixels[2:] - pixels[:2]) * frame[:2]
    assert abs(float(sides[0] / sides[1]) / (width / height) - 1) < 0.01
    assert transform.count_cut([inner, whole], shape) == (int(bool((sides > frame[:2] + 1).any())), 0)


def test_boxes_beside_a_crop_are_dropped_and_counted() -> None:
    transform, image = ImageTransform((40, 40), "shortest"), np.full((100, 300), TISSUE, dtype=np.uint8)
    boxes = [(0, 0, 90, 50), (150, 20, 200, 60), (180, 20, 260, 60)]
    assert transform.count_cut(boxes, (100, 300)) == (2, 1)
    found = transform(image, boxes)[1]
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.2, 1, 0.6], [0.8, 0.2, 1, 0.6]]), atol=0.02, rtol=0)
    assert ImageTransform((40, 40), "longest").count_cut(boxes, (100, 300)) == (0, 0)


def test_a_image_that_is_resized_already_goes_the_same_way() -> None:
    image, boxes = _painted((300, 240), (60, 90, 120, 150)), [(60, 90, 120, 150)]
    for resize_mode in ("longest", "shortest", "squash"):
        transform = ImageTransform((64, 48), resize_mode, augment=True)
        whole = transform(image, boxes, seed=3)
        height, width = transform.target_size((300, 240))
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        for one, other in zip(whole[:3], transform(small, boxes, size=(300, 240), seed=3)[:3], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("resize_mode", ["longest", "squash"])
def test_boxes_follow_the_pixels_under_augmentation(resize_mode: ResizeMode) -> None:
    box, size = (60, 90, 120, 150), 160
    transform = ImageTransform((size, size), resize_mode, augment=True)
    moved = []
    for seed in range(40):
        image, boxes, pixels, _ = transform(_painted((300, 240), box), [box], seed=seed)
        torch.testing.assert_close(boxes[0] * size, _bright_box(image), atol=1.25, rtol=0)
        # Under a turn of six degrees the pixels's upright rectangle is the box relative to the pixels as it was before.
        inner = (boxes[0].view(2, 2).mean(0) - pixels[:2]) / (pixels[2:] - pixels[:2])
        torch.testing.assert_close(inner, torch.tensor([90 / 240, 120 / 300]), atol=0.06, rtol=0)
        moved.append(boxes[0])
    assert torch.stack(moved).std(0).min() > 0.005


@pytest.mark.parametrize("resize_mode", ["longest", "shortest", "squash"])
@pytest.mark.parametrize("augment", [False, True])
def test_masks_follow_the_pixels(resize_mode: ResizeMode, augment: bool) -> None:
    """A mask covers the bright pixels that it marks, also under augmentation; an image without masks is the same."""
    box = (60, 90, 150, 190)
    pixels = _painted((300, 240), box)
    mask = np.zeros((300, 240), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    transform = ImageTransform((160, 128), resize_mode, augment=augment)
    for seed in range(8):
        image, _, _, masks = transform(pixels, seed=seed, masks={"heart": mask, "none": np.zeros_like(mask)})
        assert torch.equal(image, transform(pixels, seed=seed).image)
        bright = image[0] > (int(image[0].float().median()) + int(image.max())) // 2
        both, either = (masks["heart"] & bright).sum(), (masks["heart"] | bright).sum()
        assert both / either > 0.93
        assert not masks["none"].any()


@pytest.mark.parametrize("shape", [(300, 240), (240, 300), (61, 500)])
@pytest.mark.parametrize("resize_mode", ["longest", "shortest", "squash"])
def test_maps_and_boxes_return_to_the_pixels_of_the_image(shape: tuple[int, int], resize_mode: ResizeMode) -> None:
    """The center of a bump and a box in the frame are at their place on the image, exact to half a pixel."""
    transform, (height, width) = ImageTransform((64, 80), resize_mode), shape
    box = np.array([0.4 * width, 0.4 * height, 0.6 * width, 0.6 * height])
    framed = transform(np.zeros(shape, np.uint8), [box.tolist()])
    boxes = transform.boxes_on_image(framed.boxes.numpy(), shape)
    if framed.boxes.numel() and framed.boxes.min() > 0 and framed.boxes.max() < 1:
        np.testing.assert_allclose(boxes[0], box, atol=0.5)
    y, x = np.mgrid[:64, :80]
    center = framed.boxes[0].view(2, 2).mean(0).numpy() * [80, 64]
    heat = np.exp(-(((x + 0.5 - center[0]) ** 2 + (y + 0.5 - center[1]) ** 2) / 50)).astype(np.float32)
    placed = transform.map_on_image(heat, shape)
    assert placed.shape == shape
    rows, columns = np.indices(shape)
    found = [float((placed * (axis + 0.5)).sum() / placed.sum()) for axis in (columns, rows)]
    np.testing.assert_allclose(found, [width / 2, height / 2], atol=0.5)
    # A linear map is the same line on the image, and 0 where a crop cut.
    line = transform.map_on_image(np.tile((np.arange(80) + 0.5) / 80, (64, 1)), shape)
    left, right = transform.boxes_on_image(np.array([[0, 0, 1, 1]]), shape)[0, [0, 2]]
    visible = (np.arange(width) + 0.5 > left + 1) & (np.arange(width) + 0.5 < right - 1)
    assert not line[:, np.arange(width) + 1 < left].any()
    slope = np.diff(line[height // 2, visible])
    assert slope.max() - slope.min() < 0.01 * max(slope.max(), 1e-3) + 2e-3


def test_images_are_never_flipped() -> None:
    pixels = np.full((64, 64), TISSUE, dtype=np.uint8)
    pixels[:, :24] = BRIGHT
    transform = ImageTransform((64, 64), augment=True)
    for seed in range(200):
        image = transform(pixels, seed=seed)[0].float()
        assert image[0, 16:48, 8:16].mean() > image[0, 16:48, 48:56].mean()


def test_box_that_leaves_the_frame_is_dropped_and_clipped_ones_stay() -> None:
    image, boxes = _painted((100, 100), (0, 0, 3, 3)), [(0, 0, 3, 3), (90, 90, 120, 130)]
    transform = ImageTransform((100, 100), augment=True)
    placed = [transform(image, boxes, seed=seed)[1] for seed in range(60)]
    assert {len(found) for found in placed} == {1, 2}
    assert all((found >= 0).all() and (found <= 1).all() for found in placed)


@pytest.mark.parametrize(
    "box", [(50, 70, 60, 80), (5, 10, 5, 20), (15, 10, 5, 20), (float("nan"), 1, 2, 3), (-9, 0, -1, 9)]
)
def test_box_that_covers_nothing_is_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"covers nothing of the 40 x 60 image"):
        ImageTransform((32, 32))(np.zeros((60, 40), dtype=np.uint8), [box])


def test_wrong_images_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels must be \(h, w\) uint8, got \(8, 8, 3\)"):
        ImageTransform((32, 32))(np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="uint16"):
        ImageTransform((32, 32))(np.zeros((8, 8), dtype=np.uint16))
    with pytest.raises(ValueError, match="longest, shortest, squash, got 'stretch'"):
        ImageTransform((32, 32), "stretch")
    with pytest.raises(ValueError, match="positive height and width"):
        DrawnImages([], image_size=0)
    with pytest.raises(ValueError, match="at least 2"):
        DrawnImages([], batch_size=1)
    with pytest.raises(ValueError, match="must not be negative"):
        DrawnImages([], seed=-1)


def test_error_in_a_image_names_the_pair() -> None:
    data = DrawnImages([_pair("s501", boxes=[(30, 0, 40, 5)]), _pair("s502", "val")])
    data.setup("fit")
    with pytest.raises(ValueError, match=r"Pair 's501' \(100\): The box"):
        data.dataset("train")[0]


def test_collate() -> None:
    samples = [
        Sample(
            _pair("a", image_findings=("edema",)),
            torch.zeros(3, 4, 4, dtype=torch.uint8),
            torch.zeros(2, 4),
            torch.ones(4),
        ),
        Sample(_pair("b"), torch.ones(3, 4, 4, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(4)),
    ]
    batch = collate(samples)
    assert batch["image"].shape == (2, 3, 4, 4)
    assert batch["content_box"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert [boxes.shape for boxes in batch["boxes"]] == [(2, 4), (0, 4)]
    assert batch["id"] == batch["image_id"] == batch["patient_id"] == ["a", "b"]
    assert batch["image_findings"] == [("edema",), ()]


def test_plain_python_use(tiny_images: PhantomDataModule) -> None:
    tiny_images.setup("fit")
    batch = next(iter(tiny_images.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert tiny_images.mean_image().shape == (1, 32, 32)
    val = tiny_images.dataset("val")
    assert len(val) == len(tiny_images.pairs["val"]) == sum(len(batch["id"]) for batch in tiny_images.val_dataloader())


def test_missing_steps_are_named(image_root: str) -> None:
    data = PhantomDataModule(root=str(image_root), num_train=12, num_val=6, num_test=6, stored_size=64, num_workers=0)
    with pytest.raises(RuntimeError, match="Call setup"):
        data.val_dataloader()
    data.setup("fit")
    with pytest.raises(ValueError, match="Pass image_size"):
        data.val_dataloader()
    with pytest.raises(TypeError, match="abstract"):
        ChestXrayDataModule()  # type: ignore[abstract]


def test_wrong_lists_of_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 pair ids are not unique, e.g. a\."):
        DrawnImages([_pair("a"), _pair("a"), _pair("b", "val")]).setup("fit")
    with pytest.raises(ValueError, match="Pair 'b' is in the split 'valid'"):
        DrawnImages([_pair("a"), _pair("b", "valid")]).setup("fit")


def test_empty_splits_are_refused_when_they_are_needed() -> None:
    data = DrawnImages(_pairs(test=0))
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"DrawnImages has no test pairs, which 'test' needs\. Pairs: {'train': 4, 'val': 2"
    ):
        data.setup("test")
    with pytest.raises(ValueError, match="no val pairs"):
        DrawnImages(_pairs(val=0)).setup("fit")
    DrawnImages(_pairs(train=0, val=0)).setup("predict")


def test_batch_by_id() -> None:
    data = DrawnImages(_pairs())
    data.setup("fit")
    images = data.dataset("train")
    assert images.batch(["train-3", "train-1"])["id"] == ["train-3", "train-1"]
    assert images.batch(["train-3", "train-1"])["image"][:, 0, 8, 8].tolist() == [3, 1]
    with pytest.raises(KeyError, match="No pair 'val-0' among 4"):
        images.batch(["train-1", "val-0"])
    with pytest.raises(ValueError, match="at least one"):
        images.batch([])


def test_no_thorax_is_known_unless_a_data_module_says_so() -> None:
    assert DrawnImages(_pairs()).thorax() is None


def test_mean_image_counts_each_training_image_once() -> None:
    listed = [_pair("a", image=10, image_id="one"), _pair("b", image=10, image_id="one"), _pair("c", image=40)]
    data = DrawnImages([*listed, _pair("v", "val", image=250)], resize_mode="squash")
    data.setup("fit")
    torch.testing.assert_close(data.mean_image(), torch.full((1, 16, 16), 25 / 255))


def test_mean_image_of_many_spreads_over_all() -> None:
    data = DrawnImages(
        _pairs(train=0, val=0) + [_pair(str(n), image=int(n >= 500)) for n in range(1000)], resize_mode="squash"
    )
    data.setup("test")
    torch.testing.assert_close(data.mean_image() * 255, torch.full((1, 16, 16), 0.5))


def test_mean_image_without_training_images() -> None:
    data = DrawnImages(_pairs(train=0, val=0))
    data.setup("test")
    torch.testing.assert_close(data.mean_image().max(), torch.tensor(0.5 / 255))


def _seen(data: ChestXrayDataModule, epoch: int) -> tuple[list[str], Tensor, list[Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    batches = list(loader)
    ids = [name for batch in batches for name in batch["id"]]
    return ids, torch.cat([batch["image"] for batch in batches]), [box for batch in batches for box in batch["boxes"]]


def test_epochs_repeat_with_any_number_of_workers(tiny_images: PhantomDataModule) -> None:
    tiny_images.setup("fit")
    ids, images, boxes = _seen(tiny_images, epoch=3)
    for workers in (1, 2):
        tiny_images.num_workers = workers
        again, same, drawn = _seen(tiny_images, epoch=3)
        assert again == ids
        assert torch.equal(same, images)
        assert all(torch.equal(a, b) for a, b in zip(drawn, boxes, strict=True))


def test_persistent_workers_go_on_with_the_epoch(tiny_images: PhantomDataModule) -> None:
    tiny_images.setup("fit")
    alone = [_seen(tiny_images, epoch)[1] for epoch in (0, 1)]
    tiny_images.num_workers = 1
    loader = tiny_images.train_dataloader()
    for epoch, images in enumerate(alone):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        assert torch.equal(torch.cat([batch["image"] for batch in loader]), images)


@pytest.mark.parametrize("workers", [0, 1])
def test_epoch_may_be_told_after_iter(tiny_images: PhantomDataModule, workers: int) -> None:
    """As Lightning does when it resumes a run."""
    tiny_images.setup("fit")
    expected = _seen(tiny_images, epoch=2)[1]
    tiny_images.num_workers = workers
    loader = tiny_images.train_dataloader()
    started = iter(loader)
    loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
    assert torch.equal(torch.cat([batch["image"] for batch in started]), expected)


def test_order_and_augmentation_depend_on_seed_and_epoch(tiny_images: PhantomDataModule) -> None:
    tiny_images.setup("fit")
    ids = _seen(tiny_images, epoch=0)[0]
    assert _seen(tiny_images, epoch=1)[0] != ids
    train = tiny_images.dataset("train", augment=True)
    assert torch.equal(train[0, 0].image, train[0, 0].image)
    assert not torch.equal(train[0, 0].image, train[1, 0].image)
    first = train[0, 0].image
    tiny_images.seed = 1
    assert not torch.equal(train[0, 0].image, first)
    assert _seen(tiny_images, epoch=0)[0] != ids
    tiny_images.augment = False
    plain = tiny_images.dataset("train")
    assert torch.equal(plain[0, 0].image, plain[5, 0].image)


def test_sampler_is_a_function_of_seed_and_epoch() -> None:
    data = DrawnImages(_pairs(train=20))
    data.setup("fit")

    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(data.dataset("train"), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 2) == order(0, 2)
    assert sorted(index for _, index in order(0, 2)) == list(range(20))
    assert {epoch for epoch, _ in order(0, 2)} == {2}
    orders = [tuple(index for _, index in order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_the_global_random_numbers(tiny_images: PhantomDataModule, workers: int) -> None:
    tiny_images.setup("fit")
    tiny_images.num_workers = workers
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for loader in (tiny_images.train_dataloader(), tiny_images.val_dataloader()):
        list(loader)
    tiny_images.mean_image()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_incomplete_batches() -> None:
    data = DrawnImages(_pairs(train=5, val=3))
    data.setup("fit")
    assert [len(batch["id"]) for batch in data.train_dataloader()] == [2, 2]
    assert [len(batch["id"]) for batch in data.val_dataloader()] == [2, 1]
    data.batch_size = 8
    assert [len(batch["id"]) for batch in data.train_dataloader()] == [5]


def test_dataset_travels_to_a_spawned_worker(tiny_images: PhantomDataModule) -> None:
    tiny_images.setup("fit")
    # What Lightning sets; like a real trainer, it cannot be pickled.
    tiny_images.trainer = lambda: None  # type: ignore[assignment]
    images = tiny_images.dataset("train", augment=True)
    assert images[0].pair.id
    copy = pickle.loads(pickle.dumps(images))
    assert copy.data.trainer is None
    assert copy.data._images is None
    assert torch.equal(copy[2, 1].image, images[2, 1].image)
