"""Films in the model's frame, batches of them, and loaders that a run can repeat."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from matex_pl.data import ChestXrayDataModule, PhantomDataModule, Study, collate
from matex_pl.data.datamodule import EpochSampler
from matex_pl.data.study import Sample
from matex_pl.data.transforms import FilmTransform, ResizeMode

TISSUE, BRIGHT = 90, 255


class DrawnFilms(ChestXrayDataModule):
    """Films of one grey each, whose studies are given."""

    def __init__(self, listed: Sequence[Study], **settings: object) -> None:
        super().__init__(**{"image_size": 16, "batch_size": 2, "num_workers": 0, **settings})
        self.listed = list(listed)

    def list_studies(self) -> list[Study]:
        return self.listed

    def read_film(self, study: Study) -> np.ndarray:
        return np.full((20, 10), int(study.image), dtype=np.uint8)


def _study(name: str, split: str = "train", **fields: object) -> Study:
    return Study(
        **{"id": name, "patient_id": name, "film_id": name, "image": 100, "phrase": "x", "split": split, **fields}
    )


def _studies(train: int = 4, val: int = 2, test: int = 2) -> list[Study]:
    counts = {"train": train, "val": val, "test": test}
    return [_study(f"{split}-{n}", split, image=n) for split, count in counts.items() for n in range(count)]


def _bright_box(image: Tensor) -> Tensor:
    """Bounding box of what is nearer to the brightest pixel than to the film's tissue, in pixels."""
    grey = image[0].float()
    rows, columns = torch.where(grey > (grey.max() + grey[grey > 0].median()) / 2)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def _painted(shape: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    film = np.full(shape, TISSUE, dtype=np.uint8)
    film[box[1] : box[3], box[0] : box[2]] = BRIGHT
    return film


@pytest.mark.parametrize("resize_mode", ["longest", "squash"])
@pytest.mark.parametrize("shape", [(300, 240), (240, 300), (250, 250), (67, 101), (400, 30)])
@pytest.mark.parametrize("size", [(224, 224), (112, 96)])
def test_boxes_follow_the_pixels(shape: tuple[int, int], size: tuple[int, int], resize_mode: ResizeMode) -> None:
    height, width = shape
    box = (width // 5, height // 3, width // 2, height // 2)
    image, boxes, film = FilmTransform(size, resize_mode)(_painted(shape, box), [box])
    frame = torch.tensor([size[1], size[0]] * 2)
    assert image.shape == (3, *size)
    assert image.dtype == torch.uint8
    # A bright pixel at the edge is more than half covered by the box.
    torch.testing.assert_close(boxes[0] * frame, _bright_box(image), atol=0.75, rtol=0)
    rows, columns = torch.where(image[0] > 0)
    there = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    torch.testing.assert_close(film * frame, there.float())


def test_exact_halving() -> None:
    image, boxes, film = FilmTransform((32, 32))(_painted((64, 32), (8, 20, 16, 40)), [(8, 20, 16, 40)])
    torch.testing.assert_close(film, torch.tensor([8, 0, 24, 32]) / 32)
    torch.testing.assert_close(boxes, torch.tensor([[12, 10, 16, 20]]) / 32)
    assert (image[:, 10:20, 12:16] == BRIGHT).all()
    assert (image[:, :, :8] == 0).all()


@pytest.mark.parametrize("shape", [(300, 240), (240, 300), (250, 250), (100, 310)])
@pytest.mark.parametrize("size", [(224, 224), (112, 96), (96, 200)])
def test_boxes_follow_a_crop(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """The middle of the film fills the frame; a box in it follows, one that is cut ends at the frame's edge."""
    height, width = shape
    transform, frame = FilmTransform(size, "shortest"), torch.tensor([size[1], size[0]] * 2)
    inner = (width * 9 // 20, height * 9 // 20, width * 12 // 20, height * 11 // 20)
    whole = (0, 0, width, height)
    image, boxes, film = transform(_painted(shape, inner), [inner, whole])
    assert (image > 0).all()
    torch.testing.assert_close(boxes[0] * frame, _bright_box(image), atol=0.75, rtol=0)
    torch.testing.assert_close(boxes[1], torch.tensor([0.0, 0, 1, 1]))
    assert (film[:2] <= 0).all()
    assert (film[2:] >= 1).all()
    # The film keeps its shape, but for the rounding to whole pixels.
    sides = (film[2:] - film[:2]) * frame[:2]
    assert abs(float(sides[0] / sides[1]) / (width / height) - 1) < 0.01
    assert transform.count_cut([inner, whole], shape) == (int(bool((sides > frame[:2] + 1).any())), 0)


def test_boxes_beside_a_crop_are_dropped_and_counted() -> None:
    transform, film = FilmTransform((40, 40), "shortest"), np.full((100, 300), TISSUE, dtype=np.uint8)
    boxes = [(0, 0, 90, 50), (150, 20, 200, 60), (180, 20, 260, 60)]
    assert transform.count_cut(boxes, (100, 300)) == (2, 1)
    found = transform(film, boxes)[1]
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.2, 1, 0.6], [0.8, 0.2, 1, 0.6]]), atol=0.02, rtol=0)
    assert FilmTransform((40, 40), "longest").count_cut(boxes, (100, 300)) == (0, 0)


def test_a_film_that_is_resized_already_goes_the_same_way() -> None:
    film, boxes = _painted((300, 240), (60, 90, 120, 150)), [(60, 90, 120, 150)]
    for resize_mode in ("longest", "shortest", "squash"):
        transform = FilmTransform((64, 48), resize_mode, augment=True)
        whole = transform(film, boxes, seed=3)
        height, width = transform.target_size((300, 240))
        small = cv2.resize(film, (width, height), interpolation=cv2.INTER_AREA)
        for one, other in zip(whole, transform(small, boxes, size=(300, 240), seed=3), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("resize_mode", ["longest", "squash"])
def test_boxes_follow_the_pixels_under_augmentation(resize_mode: ResizeMode) -> None:
    box, size = (60, 90, 120, 150), 160
    transform = FilmTransform((size, size), resize_mode, augment=True)
    moved = []
    for seed in range(40):
        image, boxes, film = transform(_painted((300, 240), box), [box], seed=seed)
        torch.testing.assert_close(boxes[0] * size, _bright_box(image), atol=1.25, rtol=0)
        # Under a turn of six degrees the film's upright rectangle is the box relative to the film as it was before.
        inner = (boxes[0].view(2, 2).mean(0) - film[:2]) / (film[2:] - film[:2])
        torch.testing.assert_close(inner, torch.tensor([90 / 240, 120 / 300]), atol=0.06, rtol=0)
        moved.append(boxes[0])
    assert torch.stack(moved).std(0).min() > 0.005


def test_films_are_never_flipped() -> None:
    film = np.full((64, 64), TISSUE, dtype=np.uint8)
    film[:, :24] = BRIGHT
    transform = FilmTransform((64, 64), augment=True)
    for seed in range(200):
        image = transform(film, seed=seed)[0].float()
        assert image[0, 16:48, 8:16].mean() > image[0, 16:48, 48:56].mean()


def test_box_that_leaves_the_frame_is_dropped_and_clipped_ones_stay() -> None:
    film, boxes = _painted((100, 100), (0, 0, 3, 3)), [(0, 0, 3, 3), (90, 90, 120, 130)]
    transform = FilmTransform((100, 100), augment=True)
    placed = [transform(film, boxes, seed=seed)[1] for seed in range(60)]
    assert {len(found) for found in placed} == {1, 2}
    assert all((found >= 0).all() and (found <= 1).all() for found in placed)


@pytest.mark.parametrize(
    "box", [(50, 70, 60, 80), (5, 10, 5, 20), (15, 10, 5, 20), (float("nan"), 1, 2, 3), (-9, 0, -1, 9)]
)
def test_box_that_covers_nothing_is_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"covers nothing of the 40 x 60 film"):
        FilmTransform((32, 32))(np.zeros((60, 40), dtype=np.uint8), [box])


def test_wrong_films_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(h, w\) uint8, got \(8, 8, 3\)"):
        FilmTransform((32, 32))(np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="uint16"):
        FilmTransform((32, 32))(np.zeros((8, 8), dtype=np.uint16))
    with pytest.raises(ValueError, match="longest, shortest, squash, got 'stretch'"):
        FilmTransform((32, 32), "stretch")
    with pytest.raises(ValueError, match="positive height and width"):
        DrawnFilms([], image_size=0)
    with pytest.raises(ValueError, match="at least 2"):
        DrawnFilms([], batch_size=1)
    with pytest.raises(ValueError, match="must not be negative"):
        DrawnFilms([], seed=-1)


def test_error_in_a_film_names_the_study() -> None:
    data = DrawnFilms([_study("s501", boxes=[(30, 0, 40, 5)]), _study("s502", "val")])
    data.setup("fit")
    with pytest.raises(ValueError, match=r"Study 's501' \(100\): the box"):
        data.dataset("train")[0]


def test_collate() -> None:
    samples = [
        Sample(
            _study("a", film_findings=("edema",)),
            torch.zeros(3, 4, 4, dtype=torch.uint8),
            torch.zeros(2, 4),
            torch.ones(4),
        ),
        Sample(_study("b"), torch.ones(3, 4, 4, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(4)),
    ]
    batch = collate(samples)
    assert batch["image"].shape == (2, 3, 4, 4)
    assert batch["film"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert [boxes.shape for boxes in batch["boxes"]] == [(2, 4), (0, 4)]
    assert batch["id"] == batch["film_id"] == batch["patient_id"] == ["a", "b"]
    assert batch["film_findings"] == [("edema",), ()]


def test_plain_python_use(tiny_films: PhantomDataModule) -> None:
    tiny_films.setup("fit")
    batch = next(iter(tiny_films.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert tiny_films.mean_film().shape == (1, 32, 32)
    val = tiny_films.dataset("val")
    assert len(val) == len(tiny_films.studies["val"]) == sum(len(batch["id"]) for batch in tiny_films.val_dataloader())


def test_missing_steps_are_named(film_root: str) -> None:
    data = PhantomDataModule(root=str(film_root), num_train=12, num_val=6, num_test=6, film_size=64, num_workers=0)
    with pytest.raises(RuntimeError, match="Call setup"):
        data.val_dataloader()
    data.setup("fit")
    with pytest.raises(ValueError, match="Pass image_size"):
        data.val_dataloader()
    with pytest.raises(TypeError, match="abstract"):
        ChestXrayDataModule()  # type: ignore[abstract]


def test_wrong_lists_of_studies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 study ids are not unique, e.g. a\."):
        DrawnFilms([_study("a"), _study("a"), _study("b", "val")]).setup("fit")
    with pytest.raises(ValueError, match="Study 'b' is in the split 'valid'"):
        DrawnFilms([_study("a"), _study("b", "valid")]).setup("fit")


def test_empty_splits_are_refused_when_they_are_needed() -> None:
    data = DrawnFilms(_studies(test=0))
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"DrawnFilms has no test studies, which 'test' needs; it has {'train': 4, 'val': 2"
    ):
        data.setup("test")
    with pytest.raises(ValueError, match="no val studies"):
        DrawnFilms(_studies(val=0)).setup("fit")
    DrawnFilms(_studies(train=0, val=0)).setup("predict")


def test_batch_by_id() -> None:
    data = DrawnFilms(_studies())
    data.setup("fit")
    films = data.dataset("train")
    assert films.batch(["train-3", "train-1"])["id"] == ["train-3", "train-1"]
    assert films.batch(["train-3", "train-1"])["image"][:, 0, 8, 8].tolist() == [3, 1]
    with pytest.raises(KeyError, match="No study 'val-0' among 4"):
        films.batch(["train-1", "val-0"])
    with pytest.raises(ValueError, match="at least one"):
        films.batch([])


def test_no_thorax_is_known_unless_a_data_module_says_so() -> None:
    assert DrawnFilms(_studies()).thorax() is None


def test_mean_film_counts_each_training_film_once() -> None:
    listed = [_study("a", image=10, film_id="one"), _study("b", image=10, film_id="one"), _study("c", image=40)]
    data = DrawnFilms([*listed, _study("v", "val", image=250)], resize_mode="squash")
    data.setup("fit")
    torch.testing.assert_close(data.mean_film(), torch.full((1, 16, 16), 25 / 255))


def test_mean_film_of_many_spreads_over_all() -> None:
    data = DrawnFilms(
        _studies(train=0, val=0) + [_study(str(n), image=int(n >= 500)) for n in range(1000)], resize_mode="squash"
    )
    data.setup("test")
    torch.testing.assert_close(data.mean_film() * 255, torch.full((1, 16, 16), 0.5))


def test_mean_film_without_training_films() -> None:
    data = DrawnFilms(_studies(train=0, val=0))
    data.setup("test")
    torch.testing.assert_close(data.mean_film().max(), torch.tensor(0.5 / 255))


def _seen(data: ChestXrayDataModule, epoch: int) -> tuple[list[str], Tensor, list[Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    batches = list(loader)
    ids = [name for batch in batches for name in batch["id"]]
    return ids, torch.cat([batch["image"] for batch in batches]), [box for batch in batches for box in batch["boxes"]]


def test_epochs_repeat_with_any_number_of_workers(tiny_films: PhantomDataModule) -> None:
    tiny_films.setup("fit")
    ids, images, boxes = _seen(tiny_films, epoch=3)
    for workers in (1, 2):
        tiny_films.num_workers = workers
        again, same, drawn = _seen(tiny_films, epoch=3)
        assert again == ids
        assert torch.equal(same, images)
        assert all(torch.equal(a, b) for a, b in zip(drawn, boxes, strict=True))


def test_persistent_workers_go_on_with_the_epoch(tiny_films: PhantomDataModule) -> None:
    tiny_films.setup("fit")
    alone = [_seen(tiny_films, epoch)[1] for epoch in (0, 1)]
    tiny_films.num_workers = 1
    loader = tiny_films.train_dataloader()
    for epoch, images in enumerate(alone):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        assert torch.equal(torch.cat([batch["image"] for batch in loader]), images)


@pytest.mark.parametrize("workers", [0, 1])
def test_epoch_may_be_told_after_iter(tiny_films: PhantomDataModule, workers: int) -> None:
    """As Lightning does when it resumes a run."""
    tiny_films.setup("fit")
    expected = _seen(tiny_films, epoch=2)[1]
    tiny_films.num_workers = workers
    loader = tiny_films.train_dataloader()
    started = iter(loader)
    loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
    assert torch.equal(torch.cat([batch["image"] for batch in started]), expected)


def test_order_and_augmentation_depend_on_seed_and_epoch(tiny_films: PhantomDataModule) -> None:
    tiny_films.setup("fit")
    ids = _seen(tiny_films, epoch=0)[0]
    assert _seen(tiny_films, epoch=1)[0] != ids
    train = tiny_films.dataset("train", augment=True)
    assert torch.equal(train[0, 0].image, train[0, 0].image)
    assert not torch.equal(train[0, 0].image, train[1, 0].image)
    first = train[0, 0].image
    tiny_films.seed = 1
    assert not torch.equal(train[0, 0].image, first)
    assert _seen(tiny_films, epoch=0)[0] != ids
    tiny_films.augment = False
    plain = tiny_films.dataset("train")
    assert torch.equal(plain[0, 0].image, plain[5, 0].image)


def test_sampler_is_a_function_of_seed_and_epoch() -> None:
    data = DrawnFilms(_studies(train=20))
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
def test_iterating_leaves_the_global_random_numbers(tiny_films: PhantomDataModule, workers: int) -> None:
    tiny_films.setup("fit")
    tiny_films.num_workers = workers
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for loader in (tiny_films.train_dataloader(), tiny_films.val_dataloader()):
        list(loader)
    tiny_films.mean_film()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_incomplete_batches() -> None:
    data = DrawnFilms(_studies(train=5, val=3))
    data.setup("fit")
    assert [len(batch["id"]) for batch in data.train_dataloader()] == [2, 2]
    assert [len(batch["id"]) for batch in data.val_dataloader()] == [2, 1]
    data.batch_size = 8
    assert [len(batch["id"]) for batch in data.train_dataloader()] == [5]


def test_dataset_travels_to_a_spawned_worker(tiny_films: PhantomDataModule) -> None:
    tiny_films.setup("fit")
    # What Lightning sets; like a real trainer, it cannot be pickled.
    tiny_films.trainer = lambda: None  # type: ignore[assignment]
    films = tiny_films.dataset("train", augment=True)
    assert films[0].study.id
    copy = pickle.loads(pickle.dumps(films))
    assert copy.data.trainer is None
    assert copy.data._films is None
    assert torch.equal(copy[2, 1].image, films[2, 1].image)
