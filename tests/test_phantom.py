"""The synthetic images, their boxes and phrases, and the cache on disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from matex_pl.anatomy import named_side, parse_phrase, swap_sides
from matex_pl.cli import main
from matex_pl.data import PhantomDataModule
from matex_pl.data.phantom import FINDINGS, Phantom, cache, draw_phantom, phantom_cache, phantom_masks, write_phrase
from matex_pl.data.phantom.canvas import Canvas
from matex_pl.data.phantom.devices import Device, draw_token
from matex_pl.data.phantom.findings import plan_findings, reshape_build
from matex_pl.data.phantom.image import PlacedFinding, phantom_build, phantom_rng
from matex_pl.data.phantom.module import thorax_share
from matex_pl.data.phantom.phrases import TEMPLATES
from matex_pl.data.phantom.thorax import SIDES, draw_thorax, sample_build

NUM_IMAGES = 120
SPLITS = {"train": 6, "val": 2, "test": 2}

DENIAL = re.compile(r"\b(?:No|Without|There is no)\b[^.]*\.", re.IGNORECASE)
WORDS = {
    "atelectasis": ("atelectasis",),
    "cardiomegaly": ("cardiomegaly",),
    "consolidation": ("consolidation",),
    "edema": ("edema",),
    "pleural effusion": ("effusion",),
    "pneumonia": ("pneumonia", "consolidation"),
    "pneumothorax": ("pneumothorax", "ptx"),
    "nodule": ("nodule",),
    "lung opacity": ("opacity", "consolidation"),
}
NAMED = {
    **WORDS,
    "cardiomegaly": ("cardiomegaly", "cardiac enlargement", "enlarged", "enlargement of the cardiac"),
    "lung opacity": ("opacity", "opacification"),
    "consolidation": ("consolidation", "consolidated"),
    "nodule": ("nodule", "nodular"),
}


@pytest.fixture(scope="module")
def images() -> list[Phantom]:
    return [draw_phantom(index) for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def loose_images() -> list[Phantom]:
    return [draw_phantom(index, framing="loose") for index in range(60)]


def _plans(count: int) -> list[tuple]:
    return [plan_findings(phantom_rng(index, 0, "plan")) for index in range(count)]


def _phrases(images: list[Phantom]) -> list[tuple[Phantom, PlacedFinding, str]]:
    rng = np.random.default_rng(0)
    return [
        (
            image,
            finding,
            write_phrase(finding, rng, image_findings=[other.name for other in image.findings], device=image.device),
        )
        for image in images
        for finding in image.findings
        for _ in range(5)
    ]


def _boxed(image: Phantom) -> np.ndarray:
    inside = np.zeros(image.image.shape, bool)
    for finding in image.findings:
        for x0, y0, x1, y1 in finding.boxes:
            inside[int(y0) : int(y1), int(x0) : int(x1)] = True
    return inside


def test_images_are_the_same_in_another_process(images: list[Phantom], loose_images: list[Phantom]) -> None:
    script = "from matex_pl.data.phantom import draw_phantom\n"
    script += "for f in draw_phantom(7), draw_phantom(7, framing='loose'): print(f.findings, int(f.image.sum()))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    drawn = (images[7], loose_images[7])
    assert printed.splitlines() == [f"{image.findings} {int(image.image.sum())}" for image in drawn]


def test_images_differ_by_index_seed_and_framing(images: list[Phantom], loose_images: list[Phantom]) -> None:
    assert not np.array_equal(images[0].image, images[1].image)
    assert not np.array_equal(images[0].image, draw_phantom(0, seed=1).image)
    assert not np.array_equal(images[0].image, loose_images[0].image)
    assert not np.array_equal(loose_images[0].image, draw_phantom(0, seed=1, framing="loose").image)


def test_streams_of_random_numbers_keep_their_places() -> None:
    """Another order of the streams would redraw all images."""
    streams = ("anatomy", "texture", "plan", "reshape", "findings", "device", "exposure", "shortcut", "phrase")
    numbers = [446, 169, 48, 432, 805, 970, 109, 416, 928]
    assert [int(phantom_rng(3, 1, stream).integers(1000)) for stream in streams] == numbers


def test_tight_images_show_the_patient_alone(images: list[Phantom]) -> None:
    """Tight is the default, and draws nothing that loose framing adds."""
    build = phantom_build(5, 0)
    assert (build.scale, build.middle, build.margin) == (1.0, 0.5, 0.0)
    assert np.array_equal(images[5].image, draw_phantom(5, framing="tight").image)
    canvas, plain = build.canvas(64), Canvas(64, midline=build.midline, tilt=build.tilt)
    np.testing.assert_array_equal(canvas.x, plain.x)
    np.testing.assert_array_equal(canvas.y, plain.y)


def test_size_scales_boxes() -> None:
    small, large = draw_phantom(3, size=112), draw_phantom(3, size=224)
    assert large.image.shape == (224, 224)
    for a, b in zip(small.findings, large.findings, strict=True):
        np.testing.assert_allclose(np.array(a.boxes) * 2, b.boxes, atol=8)


def test_shortcut_changes_only_the_corner_of_the_finding(images: list[Phantom]) -> None:
    with_it = 0
    for index, image in enumerate(images[:40]):
        tagged = draw_phantom(index, shortcut=1.0, shortcut_finding="nodule")
        changed = np.argwhere(tagged.image != image.image)
        assert tagged.findings == image.findings
        if any(finding.name == "nodule" for finding in image.findings):
            with_it += 1
            assert changed.min(0)[0] > 0.88 * 192
            assert changed.max(0)[1] < 0.13 * 192
        else:
            assert len(changed) == 0
    assert with_it > 0


def test_shortcut_probability() -> None:
    share = np.mean([phantom_rng(index, 0, "shortcut").random() < 0.3 for index in range(2000)])
    assert share == pytest.approx(0.3, abs=0.04)


def _inside(zone: np.ndarray, box: tuple[float, ...]) -> float:
    x0, y0, x1, y1 = (round(edge) for edge in box)
    return float(zone[y0:y1, x0:x1].mean())


def test_thorax_holds_the_findings_and_not_the_token(images: list[Phantom]) -> None:
    # Other images than those that the zone was counted on.
    zone = PhantomDataModule(image_size=192, seed=1).thorax().numpy()
    shares = {name: [] for name in FINDINGS}
    for image in images:
        for finding in image.findings:
            shares[finding.name] += [_inside(zone, box) for box in finding.boxes]
            for x0, y0, x1, y1 in finding.boxes:
                assert zone[int((y0 + y1) / 2), int((x0 + x1) / 2)]
    assert np.mean(np.concatenate(list(shares.values()))) > 0.96
    assert min(np.mean(found) for found in shares.values()) > 0.85
    tagged = np.zeros((192, 192), np.uint8)
    draw_token(tagged)
    assert tagged.any()
    assert not zone[tagged > 0].any()
    assert 0.5 < zone.mean() < 0.65
    rows, columns = np.nonzero(zone)
    np.testing.assert_allclose([rows.mean(), columns.mean()], [94, 96], atol=5)


def test_thorax_is_counted_on_the_drawn_cavities_and_hearts() -> None:
    drawn = []
    for index in range(5):
        plans = plan_findings(phantom_rng(index, 3, "plan"))
        build = phantom_build(index, 3)
        reshaped = reshape_build(
            sample_build(phantom_rng(index, 3, "anatomy")), plans, phantom_rng(index, 3, "reshape")
        )
        assert build == reshaped
        canvas = Canvas(64, midline=build.midline, tilt=build.tilt)
        chest = draw_thorax(canvas, build, phantom_rng(index, 3, "texture"))
        drawn.append(np.maximum.reduce([chest.heart, *chest.lungs.values()]) > 0.5)
    differs = np.abs(thorax_share(64, seed=3, num_images=5) - np.mean(drawn, axis=0)) > 1e-6
    # Heart and lungs are drawn one by one there, so that half-covered pixels of both are covered by neither.
    assert differs.mean() < 0.005


def test_thorax_in_the_models_frame() -> None:
    square = PhantomDataModule(image_size=192).thorax()
    padded = PhantomDataModule(image_size=(192, 384)).thorax()
    assert padded.shape == (192, 384)
    assert torch.equal(padded[:, 96:288], square)
    assert padded.sum() == square.sum()
    squashed = PhantomDataModule(image_size=(192, 384), resize_mode="squash").thorax()
    assert (squashed != square.repeat_interleave(2, dim=1)).float().mean() < 0.01
    with pytest.raises(ValueError, match="image_size is not set"):
        PhantomDataModule().thorax()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 50}, "multiple of 4"),
        ({"shortcut": 30}, "Give a share"),
        ({"shortcut_finding": "tumour"}, "must be one of atelectasis"),
        ({"framing": "wide"}, "framing must be one of tight, loose, got 'wide'"),
    ],
)
def test_wrong_arguments_name_the_way_out(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_phantom(0, **arguments)


def test_first_names_and_counts_are_balanced() -> None:
    plans = _plans(4500)
    first = Counter(image[0].name for image in plans)
    assert set(first) == set(FINDINGS)
    assert max(first.values()) / min(first.values()) < 1.3
    counts = Counter(len(image) for image in plans)
    assert counts[1] / len(plans) == pytest.approx(0.70, abs=0.03)
    assert counts[3] / len(plans) == pytest.approx(0.08, abs=0.02)


def test_findings_on_a_image_do_not_share_a_name_or_a_third_of_a_lung() -> None:
    for plans in _plans(1000):
        assert len({plan.name for plan in plans}) == len(plans)
        cells = [
            (side, plan.zone) for plan in plans for side in plan.sides if plan.name not in ("edema", "pleural effusion")
        ]
        assert len(set(cells)) == len(cells)


def test_boxes_lie_on_the_image_and_on_the_patients_side(images: list[Phantom]) -> None:
    for image in images:
        for finding in image.findings:
            assert len(finding.boxes) == (2 if finding.side == "both" else 1)
            for box in finding.boxes:
                x0, y0, x1, y1 = box
                assert 0 <= x0 < x1 <= 192
                assert 0 <= y0 < y1 <= 192
                assert min(x1 - x0, y1 - y0) >= 4, finding
            middle = np.mean([(box[0] + box[2]) / 2 for box in finding.boxes])
            if finding.side == "right":
                assert middle < 96
            if finding.side == "left":
                assert middle > 96


def test_boxes_hold_the_change(images: list[Phantom]) -> None:
    """Most of what a finding changes is in its box, and little of the image outside changes."""
    for index, image in enumerate(images[:60]):
        # Volume loss and a large heart also move the outlines of organs.
        if {finding.name for finding in image.findings} & {"atelectasis", "cardiomegaly"}:
            continue
        healthy = draw_phantom(index, show_findings=False)
        change = np.abs(image.image.astype(float) - healthy.image)
        inside = _boxed(image)
        assert change[inside].mean() > 8
        assert change[~inside].mean() < 0.15 * change[inside].mean()
        for finding in image.findings:
            for x0, y0, x1, y1 in finding.boxes:
                assert change[int(y0) : int(y1), int(x0) : int(x1)].mean() > 5


def test_heart_is_large_only_with_cardiomegaly(images: list[Phantom]) -> None:
    widths = [f.boxes[0][2] - f.boxes[0][0] for image in images for f in image.findings if f.name == "cardiomegaly"]
    assert widths
    assert min(widths) / 192 > 0.38
    healthy = [draw_phantom(index, show_findings=False) for index in range(3)]
    assert all(image.findings == () for image in healthy)


def test_no_phrase_denies_a_finding_of_its_image(images: list[Phantom]) -> None:
    denials = 0
    for image, _, phrase in _phrases(images):
        for denial in DENIAL.findall(phrase):
            denials += 1
            for finding in image.findings:
                assert not any(word in denial.lower() for word in WORDS[finding.name]), phrase
        normal_heart = re.search(r"(heart|silhouette|contours).*\bnormal\b", phrase, re.IGNORECASE)
        assert not (normal_heart and any(f.name == "cardiomegaly" for f in image.findings)), phrase
    assert denials > 50


def test_phrases_name_the_finding_and_mostly_its_place(images: list[Phantom]) -> None:
    placed, total = 0, 0
    for _, finding, phrase in _phrases(images):
        assert any(word in phrase.lower() for word in NAMED[finding.name]), phrase
        assert "{" not in phrase
        assert len(phrase.split()) < 30, phrase
        if finding.side in ("right", "left"):
            total += 1
            placed += bool(re.search(rf"\b{finding.side}\b|\b{finding.side[0].upper()}[UML]L\b|lingula", phrase, re.I))
    assert 0.8 < placed / total < 0.97


def test_phrases_never_name_the_other_side(images: list[Phantom]) -> None:
    other = {"right": r"\bleft\b|\bL[UL]L\b|lingula", "left": r"\bright\b|\bR[UML]L\b"}
    for _, finding, phrase in _phrases([Phantom(f.image, f.findings) for f in images]):
        if finding.side in other:
            assert not re.search(other[finding.side], phrase, re.IGNORECASE), phrase


def _templates() -> list[str]:
    """Every template with every place and device that can stand in it."""
    content = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    placed = [
        text.format(size="", place=place)
        for entry in content["findings"].values()
        for text, kind in entry["placed"]
        for places in content["places"][kind].values()
        for place in places
    ]
    devices = [text.format(side=side) for texts in content["devices"].values() for text in texts for side in SIDES]
    normal = [text for text, _ in content["normal"]]
    bare = [text.format(size="") for entry in content["findings"].values() for text in entry["bare"]]
    return [*placed, *bare, *(f"{placed[k % len(placed)]} {text}" for k, text in enumerate(devices + normal))]


def test_every_template_has_its_mirror_image() -> None:
    sided = 0
    for text in _templates():
        here, there = parse_phrase(text).regions, swap_sides(text)
        assert swap_sides(there) == text
        zones = {region.zone for region in here}
        one_side = {region.side for region in here} in ({"right"}, {"left"})
        assert bool(named_side(text)) == (one_side and not zones & {"middle_lobe", "lingula"}), text
        if named_side(text):
            sided += 1
            mirrored = parse_phrase(there).regions
            assert {region.zone for region in mirrored} == zones
            assert {named_side(text), named_side(there)} == set(SIDES)
    assert sided > 300


def test_device_sentences_follow_the_device() -> None:
    finding = PlacedFinding("nodule", "left", "upper", ((1.0, 1.0, 9.0, 9.0),), "small")
    rng = np.random.default_rng(0)
    phrases = {write_phrase(finding, rng, device=Device("pacemaker", "right")) for _ in range(60)}
    assert any("Right chest pacemaker" in phrase for phrase in phrases)


def test_cache_holds_the_images_and_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, pairs = phantom_cache(tmp_path, splits=SPLITS, size=64, num_workers=1)
    assert images.shape == (10, 64, 64)
    np.testing.assert_array_equal(images[8], draw_phantom(8, size=64).image)
    assert pairs[0].id == "phantom-00000-1"
    assert Counter({s.image_id: s.split for s in pairs}.values()) == Counter(SPLITS)
    pair = next(s for s in pairs if s.image == 8)
    assert pair.boxes == draw_phantom(8, size=64).findings[0].boxes
    assert pair.finding in pair.image_findings

    monkeypatch.setattr(cache, "_write_images", lambda *_: pytest.fail("drawn twice"))
    again, same = phantom_cache(tmp_path, splits=SPLITS, size=64, num_workers=2)
    assert same == pairs
    assert not again.flags.writeable


def test_cache_key_follows_the_settings(tmp_path: Path) -> None:
    for arguments in ({}, {"seed": 1}, {"shortcut": 0.5}, {"shortcut_finding": "nodule"}, {"framing": "loose"}):
        phantom_cache(tmp_path, splits={"train": 1}, size=64, **arguments)
    assert len(_contents(tmp_path)) == 5
    # Caches of tight images have the name from before there was a framing.
    settings = {"seed": 0, "size": 64, "shortcut": 0.0, "shortcut_finding": "pneumothorax", "splits": {"train": 1}}
    assert (tmp_path / cache._cache_key(settings)).exists()
    phantom_cache(tmp_path, splits={"train": 1}, size=64, framing="tight")
    assert len(_contents(tmp_path)) == 5


def test_interrupted_run_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> list:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_draw_chunk", killed)
        with pytest.raises(KeyboardInterrupt):
            phantom_cache(tmp_path, splits=SPLITS, size=64, num_workers=1)
    assert _contents(tmp_path) == []
    assert len(phantom_cache(tmp_path, splits=SPLITS, size=64, num_workers=1)[0]) == 10


def test_two_runs_at_once_draw_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, drawn = cache._write_images, []

    def slow(folder: Path, *rest: object) -> None:
        drawn.append(folder)
        # Longer than the other run takes to come here, were it not for the lock.
        time.sleep(0.5)
        write(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "_write_images", slow)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(phantom_cache, tmp_path, splits=SPLITS, size=64, num_workers=1) for _ in range(2)]
    assert [len(run.result()[0]) for run in runs] == [10, 10]
    assert len(drawn) == 1
    assert len(_contents(tmp_path)) == 1


@pytest.mark.slow
def test_processes_draw_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_worker_count", lambda wanted, _: wanted)
    one, pairs = phantom_cache(tmp_path / "one", splits={"train": 70}, size=64, num_workers=1)
    two, same = phantom_cache(tmp_path / "two", splits={"train": 70}, size=64, num_workers=2)
    np.testing.assert_array_equal(one, two)
    assert pairs == same
    records = json.loads(_contents(tmp_path / "two")[0].joinpath("pairs.json").read_text())
    assert [record["id"] for record in records] == [pair.id for pair in pairs]


def test_a_killed_run_leaves_no_processes_and_no_images(tmp_path: Path) -> None:
    code = "from matex_pl.data.phantom import phantom_cache; import sys; "
    code += "phantom_cache(sys.argv[1], splits={'train': 20000}, size=192, num_workers=3)"
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        assert _comes_true(lambda: len(children.read_text().split()) == 3 and any(tmp_path.glob(".*/images.npy")))
        workers = [Path(f"/proc/{pid}") for pid in children.read_text().split()]
        assert _comes_true(lambda: np.load(next(tmp_path.glob(".*/images.npy")), mmap_mode="r")[0].any())
    finally:
        run.kill()
        run.wait()
    assert _comes_true(lambda: not any(_runs(worker) for worker in workers))
    assert _comes_true(lambda: not _contents(tmp_path))


def _comes_true(condition: Callable[[], bool], seconds: float = 40) -> bool:
    """Whether a condition holds before the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError, StopIteration, ValueError):
            if condition():
                return True
        time.sleep(0.05)
    return False


def _runs(process: Path) -> bool:
    """Whether a process is there, and not only its entry in the table."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


def test_what_a_killed_run_left_is_removed_and_what_is_in_work_is_not(tmp_path: Path) -> None:
    folder = Path(phantom_cache(tmp_path, splits=SPLITS, size=64, num_workers=1)[0].filename).parent
    key = folder.name
    shutil.rmtree(folder)
    # Of a killed run of these images, and of other images.
    gone, other = tmp_path / f".{key}-gone", tmp_path / ".other-0"
    for unfinished in (gone, other):
        unfinished.mkdir()
        (unfinished / "images.npy").write_bytes(b"half")
    phantom_cache(tmp_path, splits=SPLITS, size=64, num_workers=1)
    assert set(_contents(tmp_path)) == {folder, other}
    assert {path.name for path in folder.iterdir()} == {"images.npy", "pairs.json"}


def _contents(root: Path) -> list[Path]:
    """What lies in the folder of the caches, but for the locks."""
    return [path for path in root.iterdir() if path.suffix != ".lock"]


def test_masks_cover_the_drawn_organs(images: list[Phantom]) -> None:
    """Lungs are darker than the heart and the rest; findings of the lung lie in the lung of their side."""
    for index, image in enumerate(images[:40]):
        masks = phantom_masks(index)
        left, right, heart = masks["left_lung"], masks["right_lung"], masks["heart"]
        assert not ((left & right) | (left & heart) | (right & heart)).any()
        healthy = draw_phantom(index, show_findings=False).image
        names = {finding.name for finding in image.findings}
        if not names & {"cardiomegaly", "atelectasis"}:
            assert healthy[left | right].mean() < healthy[heart].mean() - 30
            # A ring of four pixels around the lungs, without black air.
            ring = cv2.dilate((left | right).astype(np.uint8), np.ones((9, 9))).astype(bool) & ~(left | right)
            assert healthy[left | right].mean() < healthy[ring].mean() - 20
        assert np.nonzero(right)[1].mean() < np.nonzero(heart)[1].mean() < np.nonzero(left)[1].mean()
        for finding in image.findings:
            for (x0, y0, x1, y1), side in zip(finding.boxes, _sides(finding), strict=True):
                inside = masks[f"{side}_lung" if side else "heart"][int(y0) : int(y1), int(x0) : int(x1)]
                assert inside.mean() > (0.7 if finding.name in ("nodule", "cardiomegaly") else 0.25), finding
                assert inside.any(0).mean() > 0.9


def _sides(finding: PlacedFinding) -> tuple[str, ...]:
    return SIDES if finding.side == "both" else (finding.side,)


def test_loose_framing_moves_the_same_patient(images: list[Phantom], loose_images: list[Phantom]) -> None:
    """Findings, device and organs stay; the patient is smaller, shifted and turned, with both lungs on the image."""
    centers, tilts, scales = [], [], []
    for index, loose in enumerate(loose_images):
        assert loose.device == images[index].device
        drawn = [[(f.name, f.side, f.zone, f.size) for f in image.findings] for image in (images[index], loose)]
        assert drawn[0] == drawn[1]
        build, tight = phantom_build(index, 0, framing="loose"), phantom_build(index, 0)
        assert replace(build, middle=0.5, scale=1.0, margin=0.0, midline=tight.midline, tilt=tight.tilt) == tight
        masks, before = phantom_masks(index, framing="loose"), phantom_masks(index)
        assert 0.7 <= build.scale <= 1
        for name, mask in masks.items():
            assert mask.sum() == pytest.approx(before[name].sum() * build.scale**2, rel=0.03)
            assert mask.sum() == mask[1:-1, 1:-1].sum()
        # No collimation cuts the lungs.
        lungs = masks["left_lung"] | masks["right_lung"]
        healthy = draw_phantom(index, framing="loose", show_findings=False)
        assert (healthy.image[lungs] == 0).mean() < 0.01
        scales.append(build.scale)
        tilts.append(build.tilt - tight.tilt)
        centers.append([places.mean() / 192 for places in np.nonzero(lungs)])
    assert min(scales) < 0.75
    assert max(scales) > 0.95
    assert 2 < np.std(tilts) < 6
    assert np.all(np.std(centers, axis=0) > 0.03)


def test_loose_images_show_arms_and_abdomen(images: list[Phantom], loose_images: list[Phantom]) -> None:
    """Wide of the chest lies tissue, and not only the black border of a small image."""
    shares = []
    for index, image in enumerate(loose_images):
        build = phantom_build(index, 0, framing="loose")
        canvas = build.canvas(192)
        outside = (np.abs(canvas.x) > build.half_width + 0.08) | (canvas.y > build.angle["left"] + 0.05)
        shares.append((image.image[outside] > 40).mean())
    assert np.mean(shares) > 0.3


def test_loose_boxes_are_tight_around_the_change() -> None:
    """The box of a nodule ends where the image changes: a rotated rectangle's box would be larger."""
    alone = [index for index, plans in enumerate(_plans(200)) if [plan.name for plan in plans] == ["nodule"]]
    for index in alone[:8]:
        image = draw_phantom(index, framing="loose")
        change = np.abs(image.image.astype(float) - draw_phantom(index, framing="loose", show_findings=False).image)
        rows, columns = np.nonzero(change > 0.35 * change.max())
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        np.testing.assert_allclose(image.findings[0].boxes[0], found, atol=2)
    assert len(alone) >= 8


def test_the_tag_stays_in_the_corner_of_loose_images() -> None:
    number = next(index for index in range(99) if any(plan.name == "nodule" for plan in _plans(99)[index]))
    settings = {"shortcut": 1.0, "shortcut_finding": "nodule"}
    tags = [
        draw_phantom(number, framing=framing, **settings).image != draw_phantom(number, framing=framing).image
        for framing in ("tight", "loose")
    ]
    tag = np.zeros((192, 192), np.uint8)
    draw_token(tag)
    for changed in tags:
        assert changed.any()
        assert not changed[tag == 0].any()


def test_loose_phantoms_in_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_json: str, capsys: pytest.CaptureFixture
) -> None:
    """`matex check-data` and `matex fit` take the framing, and a wrong one is refused by name."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(tiny_json, encoding="utf-8")
    words = ["--config", "phantom.yaml", "--data.num_workers=0"]
    words += [f"--data.num_{split}=4" for split in ("train", "val", "test")]
    main(["check-data", *words, "--model", "tiny.json", "--data.framing=loose"])
    main(
        [
            "fit",
            *words,
            "--model.name",
            "tiny.json",
            "--data.framing=loose",
            "--data.batch_size=2",
            "--trainer.fast_dev_run=true",
        ]
    )
    (folder,) = (path for path in _contents(Path("data/phantom")) if path.is_dir())
    np.testing.assert_array_equal(np.load(folder / "images.npy")[2], draw_phantom(2, framing="loose").image)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *words, "--data.framing=wide"])
    assert "tight" in capsys.readouterr().err


def test_loaders_of_validation_have_masks_and_training_has_none(tmp_path: Path) -> None:
    data = PhantomDataModule(str(tmp_path), 4, 3, 1, stored_size=64, image_size=64, batch_size=4, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    for name, mask in batch["masks"].items():
        assert torch.equal(mask[0], torch.from_numpy(phantom_masks(4, size=64)[name]))
    assert set(batch["masks"]) == {"left_lung", "right_lung", "heart"}
    assert next(iter(data.train_dataloader()))["masks"] == {}
