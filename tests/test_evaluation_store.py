"""Maps on disk: what is read is what was written, and only where nothing that decides it has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from matex_pl.attribution import AttributionMethod, CenterMap, Chefer, Matex, Rise, Saliency, WordRegions
from matex_pl.attribution.shipped import method_names, shipped_methods
from matex_pl.clip import Clip, load_clip
from matex_pl.data import ImageTextBatch, PhantomDataModule
from matex_pl.evaluation.store import MapStore, describe_method, pair_keys, weight_hash
from matex_pl.evaluation.tensors import read_head, write_tensors
from matex_pl.maps import Attribution

FIELDS = ("image", "grid", "text", "content", "score")


@pytest.fixture
def batch(tiny_images: PhantomDataModule) -> ImageTextBatch:
    tiny_images.prepare_data()
    tiny_images.setup("test")
    return next(iter(tiny_images.test_dataloader()))


def _maps(clip: Clip, method: AttributionMethod, batch: ImageTextBatch) -> Attribution:
    images, tokens = clip.normalize(batch["image"]), clip.tokenize(batch["phrase"])
    return method.attribute(clip, images, tokens, batch["phrase"], batch["content_box"])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "method",
    [Matex.recommended(), Matex(fuse_at="grid"), Chefer(), Saliency(), Rise(masks=8, fill="blur"), CenterMap()],
)
def test_what_is_read_is_what_was_written(tmp_path, tiny_clip, batch, method):
    keys, maps = pair_keys(batch), _maps(tiny_clip, method, batch)
    store = MapStore(tmp_path, "weights", method)
    assert store.missing([*keys, "x"]) == [*keys, "x"]
    store.write(keys[:1], Attribution(*(getattr(maps, name)[:1] for name in FIELDS)))
    store.write(keys[1:], Attribution(*(getattr(maps, name)[1:] for name in FIELDS)))
    again = MapStore(tmp_path, "weights", method)
    assert again.missing([*keys, "x"]) == ["x"]
    read = again.read(keys[::-1])
    for name in FIELDS:
        assert torch.equal(getattr(read, name), getattr(maps, name).flip(0))


def test_interactions_are_read_as_written(tmp_path, tiny_clip, batch):
    keys, maps = pair_keys(batch), _maps(tiny_clip, WordRegions(steps=1), batch)
    store = MapStore(tmp_path, "weights", WordRegions(steps=1))
    store.write(keys, maps)
    assert torch.equal(store.read(keys[::-1]).interactions, maps.interactions.flip(0))
    assert store.read_units(keys).keys() == {"grid", "text", "content", "score"}
    store.write(keys, _maps(tiny_clip, Chefer(), batch))
    assert store.read(keys).interactions is None


def test_maps_of_patches_are_kept_without_their_pixels(tmp_path, tiny_clip, batch):
    size = {}
    for method in (Chefer(), Saliency()):
        store = MapStore(tmp_path, "weights", method)
        store.write(pair_keys(batch), _maps(tiny_clip, method, batch))
        size[type(method)] = sum(path.stat().st_size for path in _files(store.folder))
    assert size[Saliency] - size[Chefer] > 0.9 * batch["image"][:, 0].numel() * 4


def test_keys_tell_pixels_phrases_images_and_pairs_apart(batch):
    keys = pair_keys(batch)
    assert len(set(keys)) == len(keys)
    assert pair_keys(batch) == keys
    image = batch["image"].clone()
    image[0, 0, 0, 0] += 1
    content_box = batch["content_box"].clone()
    content_box[0, 0] += 0.01
    for name, value in {
        "image": image,
        "content_box": content_box,
        "phrase": ["Other.", *batch["phrase"][1:]],
        "id": ["other", *batch["id"][1:]],
    }.items():
        changed = pair_keys({**batch, name: value})
        assert changed[0] != keys[0]
        assert changed[1:] == keys[1:]


def test_other_weights_or_settings_have_another_folder(tmp_path):
    folders = {
        MapStore(tmp_path, weights, method).folder
        for weights in ("a", "b")
        for method in (
            *(Matex(), Matex(lambda_s=2.0), Chefer(), Chefer(target="margin")),
            *(Matex(flow="relevance"), Matex(flow_layers=2), Matex(consistency_of="relevance")),
        )
    }
    assert len(folders) == 14
    assert MapStore(tmp_path, "a", Matex()).folder in folders


def test_the_hash_sees_every_weight_and_the_mean_image(tiny_clip, tiny_json):
    first = weight_hash(tiny_clip)
    assert weight_hash(tiny_clip) == first
    twin = load_clip(tiny_json)
    twin.load_state_dict(tiny_clip.state_dict())
    assert weight_hash(twin) == first
    seen = {first}
    for value in twin.state_dict().values():
        before = value.flatten()[-1].clone()
        value.flatten()[-1].fill_(0.123)
        seen.add(weight_hash(twin))
        value.flatten()[-1].copy_(before)
    assert len(seen) == len(twin.state_dict()) + 1


def test_every_shipped_method_can_be_described():
    for method in shipped_methods().values():
        described = describe_method(method)
        assert json.loads(json.dumps(described)) == described
        rebuilt = type(method)(**described["init_args"])
        assert rebuilt.settings == method.settings
    assert len(shipped_methods()) == len(method_names())


class Forgetful(CenterMap):
    """Does not keep its argument."""

    def __init__(self, radius: float = 1.0) -> None:
        self._r = radius


def test_a_method_that_forgets_its_arguments_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"The settings of Forgetful cannot be read.*'radius'.*Keep each argument"):
        MapStore(tmp_path, "weights", Forgetful())


def test_a_damaged_file_is_no_map(tmp_path, tiny_clip, batch):
    keys, method = pair_keys(batch), Chefer()
    store = MapStore(tmp_path, "weights", method)
    store.write(keys, _maps(tiny_clip, method, batch))
    [path] = _files(store.folder)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\0" * 100):
        path.write_bytes(broken)
        with pytest.warns(UserWarning, match="is damaged"):
            assert MapStore(tmp_path, "weights", method).missing(keys) == keys
    path.write_bytes(whole)
    assert not MapStore(tmp_path, "weights", method).missing(keys)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def no_room(tensors, path, head):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("matex_pl.evaluation.tensors.save_file", no_room)
    with pytest.raises(OSError, match="No space"):
        write_tensors(tmp_path / "a" / "b.safetensors", {"x": torch.ones(2)}, {})
    assert not _files(tmp_path)
    assert read_head(tmp_path / "a" / "b.safetensors") is None


def test_reading_what_is_not_there_names_it(tmp_path):
    with pytest.raises(KeyError, match="1 of 1 pairs have no map"):
        MapStore(tmp_path, "weights", Chefer()).read(["s1:abc"])
