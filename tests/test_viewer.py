"""Maps as DICOM objects and arrays: the study, the geometry on the stored pixels, and refusals."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from matex_pl.attribution import AttributionMethod
from matex_pl.cli import main
from matex_pl.clip.words import tokenized
from matex_pl.commands.explain import explain
from matex_pl.data.images import read_image
from matex_pl.maps import Attribution, patch_mean
from matex_pl.viewer.objects import dicom_kinds, save_objects
from matex_pl.viewer.outputs import check_map_files
from matex_pl.viewer.placed import PlacedMap
from matex_pl.viewer.source import read_source
from matex_pl.visualization.draw import overlay

pytest.importorskip("imagecodecs")
pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import set_pixel_data  # noqa: E402
from pydicom.uid import (  # noqa: E402
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    XRayRadiofluoroscopicImageStorage,
)

PHRASE = "Left lower lobe consolidation."
# Left, top, right and bottom of a bright square in the stored image.
SQUARE = (24, 30, 44, 48)
PLACE = {
    "FrameOfReferenceUID": "1.2.9",
    "ImagePositionPatient": [0, 0, 0],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PixelSpacing": [0.2, 0.2],
    "SliceThickness": 1,
}
WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


class Brightness(AttributionMethod):
    """A method whose map is known: the pixels in the model's frame, bright is 1."""

    cost = "none"

    def attribute(
        self, clip: Any, images: Tensor, tokens: Tensor, phrases: Sequence[str], *boxes: Tensor | None
    ) -> Attribution:
        gray = (images * clip.std.view(-1, 1, 1) + clip.mean.view(-1, 1, 1))[:, 0].clip(0, 1)
        content = clip.content(tokens)
        found = tokenized(clip.tokenizer, tokens, content, phrases)
        return Attribution(
            gray, patch_mean(gray, clip.grid), content.float(), content, torch.zeros(len(gray)), {}, found
        )


def square(height: int, width: int, high: int = 4095) -> np.ndarray:
    """Pixels with 0 outside of the square and `high` inside, `(height, width)` uint16."""
    pixels = np.zeros((height, width), np.uint16)
    pixels[SQUARE[1] : SQUARE[3], SQUARE[0] : SQUARE[2]] = high
    return pixels


def write_image(path: Path, pixels: np.ndarray, kind: str = "MONOCHROME2", bits: int = 12, **tags: Any) -> Path:
    """A radiograph with the elements of a patient and a study; a tag with None is left out."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID = DigitalXRayImageStorageForPresentation
    set_pixel_data(header, pixels, kind, bits, generate_instance_uid=False)
    given = {
        "SpecificCharacterSet": "ISO_IR 100",
        "SOPInstanceUID": "1.2.3.1.1",
        "SeriesInstanceUID": "1.2.3.1",
        "StudyInstanceUID": "1.2.3",
        "PatientID": "P1",
        "PatientName": "Müller^Hans",
        "PatientBirthDate": "19500101",
        "PatientSex": "M",
        "AccessionNumber": "A7",
        "StudyID": "S",
        "StudyDate": "20200101",
        "StudyTime": "1200",
        "Modality": "DX",
        "BodyPartExamined": "CHEST",
        "PatientOrientation": ["L", "F"],
    }
    for name, value in (given | tags).items():
        setattr(header, name, value)
        if value is None:
            delattr(header, name)
    header.save_as(path, enforce_file_format=True)
    return path


def placed(size: tuple[int, int], phrase: str = PHRASE, threshold: float = 0.5) -> PlacedMap:
    heat = square(*size, 1).astype(np.float32)
    return PlacedMap(
        heat, phrase, "Matex", 0.31, threshold, boxes=np.array([SQUARE], np.float64), settings={"tau": 1.0}
    )


def write_objects(folder: Path, image: Path, shown: PlacedMap, kinds: str = "gsps,seg") -> dict[str, Dataset]:
    """The new objects, read back."""
    asked = dicom_kinds(kinds)
    paths = save_objects(read_source(image, asked), [shown], [folder / "map.dcm"], asked)
    return {kind: pydicom.dcmread(path) for kind, path in zip(asked, paths, strict=True)}


def outline(state: Dataset, layer: str = "OUTLINES") -> list[np.ndarray]:
    """Polylines of a layer, `(N, 2)` each."""
    return [
        np.array(item.GraphicData, float).reshape(-1, 2)
        for annotation in state.GraphicAnnotationSequence
        if annotation.GraphicLayer == layer
        for item in annotation.GraphicObjectSequence
    ]


def bounds(points: np.ndarray) -> list[float]:
    return [*points.min(0), *points.max(0)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "image.dcm", square(72, 80), **WINDOW)


# The ratio of the sides is that of the frame, or not; the crop leaves the square in.
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (96, 96)])
@pytest.mark.parametrize("mode", ["longest", "shortest", "squash"])
def test_the_map_lies_on_the_stored_pixels(tmp_path, workdir, mode, size):
    source = write_image(tmp_path / "image.dcm", square(*size), **WINDOW)
    words = {"ckpt_path": "good.ckpt", "method": Brightness(), "resize_mode": mode}
    assert explain(str(source), [PHRASE], out="map.dcm", dicom="gsps,seg", **words) == Path("map.dcm")
    explain(str(source), [PHRASE], out="map.npz", **words)

    lines = outline(pydicom.dcmread("map.gsps.dcm"))
    assert len(lines) == 1
    assert np.array_equal(lines[0][0], lines[0][-1])
    assert bounds(lines[0]) == pytest.approx(SQUARE, abs=0.5)
    # Boxes have the corners of the model's pixels.
    corner = max(size) / 32
    assert bounds(outline(pydicom.dcmread("map.gsps.dcm"), "BOXES")[0]) == pytest.approx(SQUARE, abs=corner)

    levels = pydicom.dcmread("map.seg.dcm")
    assert (levels.Rows, levels.Columns) == size
    inside = np.frombuffer(levels.PixelData, np.uint8)[: size[0] * size[1]].reshape(size) >= 128
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == pytest.approx(SQUARE, abs=0.5)

    with np.load("map.npz", allow_pickle=False) as arrays:
        heat = arrays["map"]
        assert arrays["boxes"][0] == pytest.approx(SQUARE, abs=corner)
        assert arrays["word_relevance"].sum() == pytest.approx(1)
    assert heat.shape == size
    assert np.array_equal(np.rint(heat * 255), np.frombuffer(levels.PixelData, np.uint8)[: heat.size].reshape(size))
    capture = pydicom.dcmread("map.dcm").pixel_array[: size[0], : size[1]]
    gray = read_image(source).pixels
    assert np.array_equal(capture, overlay(np.repeat(gray[..., None], 3, 2), heat))


@pytest.mark.parametrize(
    ("pixels", "kind", "bits", "tags"),
    [
        (square(72, 80), "MONOCHROME2", 12, WINDOW),
        (4095 - square(72, 80), "MONOCHROME1", 12, WINDOW),
        (4095 - square(72, 80), "MONOCHROME2", 12, {**WINDOW, "PresentationLUTShape": "INVERSE"}),
        (square(72, 80, 40000), "MONOCHROME2", 16, {"WindowCenter": 20000, "WindowWidth": 40000}),
        (square(72, 80, 700) + 100, "MONOCHROME2", 16, {}),
        (square(72, 80, 700) + 100, "MONOCHROME2", 16, {"WindowCenter": 5, "WindowWidth": 0}),
        (square(72, 80, 200).astype(np.uint8), "MONOCHROME2", 8, {"RescaleSlope": 2, "RescaleIntercept": -100}),
    ],
    ids=["12 bits", "monochrome1", "inverse", "16 bits", "no window", "bad window", "rescale"],
)
@pytest.mark.filterwarnings("ignore:.*window of width 0.*")
def test_the_presentation_state_shows_the_image_as_the_package_reads_it(tmp_path, pixels, kind, bits, tags):
    source = write_image(tmp_path / "image.dcm", pixels, kind, bits, **tags)
    made = write_objects(tmp_path, source, placed((72, 80)))
    state, voi = made["gsps"], made["gsps"].SoftcopyVOILUTSequence[0]
    # The steps of a viewer, by pydicom.
    values = pixels * float(state.RescaleSlope) + float(state.RescaleIntercept)
    shown = (values - (voi.WindowCenter - 0.5)) / (voi.WindowWidth - 1) + 0.5
    shown = 1 - shown if state.PresentationLUTShape == "INVERSE" else shown
    read = read_image(source).pixels
    assert np.abs(shown.clip(0, 1) * 255 - read).max() < 1
    assert read[40, 30] > 150 > 100 > read[5, 5]
    # The image below the color is the same.
    assert np.array_equal(made["sc"].pixel_array[5, 5], [read[5, 5]] * 3)


def test_tables_of_the_image_are_those_of_the_presentation_state(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], np.arange(0, 65536, 16, dtype=np.uint16).tobytes()
    source = write_image(tmp_path / "image.dcm", square(72, 80), VOILUTSequence=[table], **WINDOW)
    voi = write_objects(tmp_path, source, placed((72, 80)))["gsps"].SoftcopyVOILUTSequence[0]
    assert voi.VOILUTSequence[0].LUTData == table.LUTData
    assert "WindowCenter" not in voi


def test_the_objects_join_the_study_as_new_instances(tmp_path, image):
    made = [write_objects(tmp_path, image, placed((72, 80))) for _ in range(2)]
    source = pydicom.dcmread(image)
    for kind, item in made[0].items():
        for name in (
            "PatientID",
            "PatientName",
            "PatientBirthDate",
            "StudyInstanceUID",
            "AccessionNumber",
            "StudyDate",
        ):
            assert item[name].value == source[name].value, (kind, name)
        assert item.SpecificCharacterSet == "ISO_IR 192"
        assert item.SeriesDescription == f"Matex: {PHRASE}"
        assert item.Manufacturer == "matex_pl"
    ids = [
        item[name].value for run in made for item in run.values() for name in ("SOPInstanceUID", "SeriesInstanceUID")
    ]
    ids += [source.SOPInstanceUID, source.SeriesInstanceUID]
    assert len(set(ids)) == len(ids)
    assert [item.Modality for item in made[0].values()] == ["OT", "PR", "SEG"]

    capture, state, segments = made[0].values()
    assert capture.BurnedInAnnotation == "YES"
    assert all(part in capture.DerivationDescription for part in (PHRASE, "Matex", "not for diagnosis", '{"tau": 1.0}'))
    assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert list(capture.PatientOrientation) == ["L", "F"]
    # The text stands below the image, in ink.
    assert capture.Columns >= 80
    assert (capture.pixel_array[72:] > 200).sum() > 100
    referenced = state.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == source.SeriesInstanceUID
    assert referenced.ReferencedImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    text = state.GraphicAnnotationSequence[-1].TextObjectSequence[0].UnformattedTextValue
    assert all(part in text for part in (PHRASE, "Matex", "0.50", "not for diagnosis"))
    segment = segments.SegmentSequence[0]
    code = segment.SegmentedPropertyTypeCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("130402", "DCM")
    assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "Matex"
    assert segments.SegmentationType == "FRACTIONAL"
    assert highdicom.seg.segread(tmp_path / "map.seg.dcm").segment_numbers == [1]


def test_several_maps_are_instances_of_one_series(tmp_path, image):
    kinds = dicom_kinds("gsps")
    maps = [placed((72, 80)), placed((72, 80), "Right effusion.")]
    paths = save_objects(read_source(image), maps, [tmp_path / "1.dcm", tmp_path / "2.dcm"], kinds)
    assert [path.name for path in paths] == ["1.dcm", "1.gsps.dcm", "2.dcm", "2.gsps.dcm"]
    found = [pydicom.dcmread(path) for path in paths]
    assert found[0].SeriesInstanceUID == found[2].SeriesInstanceUID != found[1].SeriesInstanceUID
    assert [item.InstanceNumber for item in found] == [1, 1, 2, 2]


def test_a_parametric_map_where_the_image_has_a_frame_of_reference(tmp_path):
    source = write_image(
        tmp_path / "slice.dcm", square(72, 80), SOPClassUID=CTImageStorage, PatientOrientation=None, **PLACE, **WINDOW
    )
    made = write_objects(tmp_path, source, placed((72, 80)), "seg,pm")
    found = made["pm"]
    # No orientation is made up.
    assert not made["sc"].PatientOrientation
    mapping = found.SharedFunctionalGroupsSequence[0].get("RealWorldValueMappingSequence")
    mapping = mapping or found.PerFrameFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    assert found.FrameOfReferenceUID == PLACE["FrameOfReferenceUID"]
    values = np.frombuffer(found.PixelData, np.uint16).reshape(72, 80) * mapping[0].RealWorldValueSlope
    assert np.allclose(values, placed((72, 80)).heat)
    assert "130402" in str(mapping[0])


@pytest.mark.parametrize("phrase", ["肺炎 in both lungs, 左下葉.", "a\\b", "Opacity. " * 400, "W" * 300])
def test_any_phrase_is_written(tmp_path, image, phrase):
    for item in write_objects(tmp_path, image, placed((72, 80), phrase)).values():
        assert len(item.SeriesDescription.encode()) <= 64
        assert item.SeriesDescription[7:10] == phrase.replace("\\", "/")[:3]


@pytest.mark.parametrize(
    "tags",
    [
        {"PatientSex": "unknown", "StudyDate": "2020-01-01", "PatientBirthDate": "1950"},
        {"PatientName": None, "StudyID": None, "AccessionNumber": None, "PatientOrientation": None},
        {"FrameOfReferenceUID": "1.2.9"},
        {"RescaleSlope": 1.5},
        {"PixelSpacing": [0.1, 0.3]},
        {"ImagerPixelSpacing": [0.2, 0.2], "LossyImageCompression": "01", "LossyImageCompressionRatio": 12},
        {"SOPClassUID": ComputedRadiographyImageStorage, "Modality": "CR"},
    ],
    ids=lambda tags: " ".join(tags),
)
@pytest.mark.filterwarnings("ignore:.*[Ii]nvalid.*")
def test_sloppy_and_poor_headers_are_kept_as_they_are(tmp_path, tags):
    source = write_image(tmp_path / "image.dcm", square(72, 80), **WINDOW, **tags)
    made = write_objects(tmp_path, source, placed((72, 80)))
    for name in ("PatientSex", "StudyDate", "PatientBirthDate", "AccessionNumber"):
        value = pydicom.dcmread(source).get(name)
        assert all(item.get(name) in (value, value or "", value or None) for item in made.values())
    if "PatientOrientation" in tags:
        assert not made["sc"].PatientOrientation
        assert not made["seg"].PatientOrientation
    if "PixelSpacing" in tags:
        area = made["gsps"].DisplayedAreaSelectionSequence[0]
        assert list(area.PresentationPixelSpacing) == list(made["sc"].PixelSpacing) == [0.1, 0.3]
    if "LossyImageCompression" in tags:
        assert made["sc"].LossyImageCompression == made["seg"].LossyImageCompression == "01"


def test_a_map_without_places_above_the_threshold_has_no_outline(tmp_path, image):
    empty = PlacedMap(np.zeros((72, 80), np.float32), PHRASE, "Matex", 0.1, 0.5)
    made = write_objects(tmp_path, image, empty)
    assert outline(made["gsps"]) == outline(made["gsps"], "BOXES") == []
    assert made["seg"].NumberOfFrames == 1


def test_outlines_close_at_the_borders_and_around_holes(tmp_path, image):
    heat = np.ones((72, 80), np.float32)
    heat[20:40, 30:50] = 0
    lines = outline(write_objects(tmp_path, image, PlacedMap(heat, PHRASE, "Matex", 0.1, 0.5))["gsps"])
    assert sorted(bounds(line) for line in lines) == [
        pytest.approx([0, 0, 80, 72], abs=0.5),
        pytest.approx([30, 20, 50, 40], abs=0.5),
    ]


def test_maps_of_single_words_from_the_command_line(workdir):
    chosen = ["image.png", PHRASE, "--ckpt_path=good.ckpt", "--method=word_regions"]
    main(["explain", *chosen, "--out=map.npz"])
    with np.load("map.npz", allow_pickle=False) as found:
        maps, words = found["word_maps"], list(found["words"])
    assert (maps.shape, maps.dtype) == ((len(words), 90, 70), np.float32)
    # Signed.
    assert maps.min() < 0 < maps.max()
    main(["explain", *chosen, "--out=words.png"])
    main(["explain", *chosen[:-1], "--method=rollout", "--out=whole.png"])
    words, whole = (Image.open(name) for name in ("words.png", "whole.png"))
    assert words.width == whole.width
    # A row of four tiles below the panel.
    assert words.height > whole.height + 100
    strip = np.asarray(words)[whole.height :].astype(int)
    assert ((strip[..., 0] - strip[..., 2]) > 60).any()
    assert ((strip[..., 2] - strip[..., 0]) > 60).any()


def test_arrays_from_the_command_line(workdir, capsys):
    main(["explain", "image.png", PHRASE, "--ckpt_path=good.ckpt", "--out=map.npz", "--method=rollout"])
    assert capsys.readouterr().out.splitlines()[-1] == "map.npz"
    with np.load("map.npz", allow_pickle=False) as found:
        arrays = dict(found)
    assert (arrays["map"].shape, arrays["map"].dtype) == ((90, 70), np.float32)
    assert str(arrays["phrase"]) == PHRASE
    assert list(arrays["words"]) == ["Left", "lower", "lobe", "consolidation"]
    assert len(arrays["word_relevance"]) == 4
    assert len(arrays["tokens"]) == len(arrays["token_relevance"]) > 4
    assert "word_maps" not in arrays
    settings = json.loads(str(arrays["settings"]))
    assert settings["method"]["class_path"].endswith("Rollout")
    assert len(settings["model"]["weights"]) == 64
    # A second run replaces its own file.
    main(["explain", "image.png", PHRASE, "--ckpt_path=good.ckpt", "--out=map.npz", "--method=rollout"])


def test_the_commands_of_the_guide(workdir, capsys):
    write_image(workdir / "chest.dcm", square(72, 80), **WINDOW)
    Path("image.png").rename("chest.png")
    write_image(workdir / "slice.dcm", square(72, 80), SOPClassUID=CTImageStorage, **PLACE, **WINDOW)
    page = (Path(__file__).parents[1] / "docs" / "guides" / "viewer.md").read_text(encoding="utf-8")
    lines = [line for line in page.replace("\\\n", " ").splitlines() if line.startswith("matex explain")]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line)[1:]
        words[words.index("--ckpt_path") + 1] = "good.ckpt"
        main(words)
    made = {path.name for path in workdir.glob("*map*")} | {path.name for path in Path("explained").iterdir()}
    assert made >= {"map.dcm", "map.gsps.dcm", "map.seg.dcm", "slice_map.pm.dcm", "map.npz", "sentence-01.gsps.dcm"}
    with np.load("map.npz", allow_pickle=False) as arrays:
        listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^(\| `\w+`.*?\|) .*\|$", page, re.MULTILINE))))
        assert set(arrays) <= listed


def test_every_sentence_of_a_folder_gets_its_objects(workdir):
    write_image(workdir / "chest.dcm", square(72, 80), **WINDOW)
    report = "Left lower lobe consolidation. No effusion. Right upper lobe nodule."
    words = ["chest.dcm", "--report", report, "--ckpt_path=good.ckpt", "--out=folder", "--threshold=0.3"]
    main(["explain", *words, "--dicom=gsps"])
    names = [f"sentence-0{number}{kind}.dcm" for number in (1, 3) for kind in ("", ".gsps")]
    record = json.loads(Path("folder/explain.json").read_text(encoding="utf-8"))
    assert set(names) <= set(record["files"]) == {path.name for path in Path("folder").iterdir()}
    assert record["dicom"] == ["sc", "gsps"]
    found = [pydicom.dcmread(Path("folder") / name) for name in names]
    assert len({item.SeriesInstanceUID for item in found}) == 2
    state = found[1]
    assert (
        "at 0.30 of the map (as given)"
        in state.GraphicAnnotationSequence[-1].TextObjectSequence[0].UnformattedTextValue
    )
    boxes = [[box[edge] for edge in ("x0", "y0", "x1", "y1")] for box in record["sentences"][0]["boxes"]]
    assert np.allclose([bounds(line) for line in outline(state, "BOXES")], boxes, atol=1e-4)

    # The same call again replaces the folder, with new instances.
    main(["explain", *words, "--dicom=gsps"])
    assert pydicom.dcmread("folder/sentence-01.dcm").SOPInstanceUID != found[0].SOPInstanceUID


def test_every_image_of_a_table_gets_its_objects(workdir, capsys):
    write_image(workdir / "chest.dcm", square(72, 80), **WINDOW)
    Path("reports.csv").write_text("image,report\nchest.dcm,Left lower lobe consolidation.\n", encoding="utf-8")
    words = ["explain", "--manifest=reports.csv", "--ckpt_path=good.ckpt", "--out=folders", "--dicom=seg"]
    main(words)
    made = pydicom.dcmread("folders/chest/sentence-01.seg.dcm").SOPInstanceUID
    # A finished folder is left as it is; other objects are made.
    main(words)
    assert pydicom.dcmread("folders/chest/sentence-01.seg.dcm").SOPInstanceUID == made
    main([*words[:-1], "--dicom=gsps"])
    assert not Path("folders/chest/sentence-01.seg.dcm").exists()
    assert Path("folders/chest/sentence-01.gsps.dcm").is_file()

    Path("reports.csv").write_text("image,report\nimage.png,Left lower lobe consolidation.\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main([*words[:3], "--out=others", "--dicom=seg"])
    assert "has no patient and study" in capsys.readouterr().err
    assert not Path("others").exists()


REFUSED = {
    "png": ({}, "--out=map.dcm", "has no patient and study"),
    "patient": ({"PatientID": None}, "--out=map.dcm", "has no PatientID (0010,0020)"),
    "empty patient": ({"PatientID": ""}, "--out=map.dcm", "has no PatientID (0010,0020)"),
    "study": ({"StudyInstanceUID": None}, "--out=map.dcm", "has no StudyInstanceUID (0020,000D)"),
    "series": ({"SeriesInstanceUID": None}, "--out=map.dcm", "has no SeriesInstanceUID (0020,000E)"),
    "instance": ({"SOPInstanceUID": "1.2.a"}, "--out=map.dcm", "an invalid SOPInstanceUID (0008,0018): '1.2.a'"),
    "frames": ({"NumberOfFrames": 2}, "--out=map.dcm", "is a multi-frame object with 2 frames"),
    "private class": ({"SOPClassUID": "1.2.3.4.5"}, "--out=map.dcm", "which is no class of DICOM"),
    "fluoroscopy": ({"SOPClassUID": XRayRadiofluoroscopicImageStorage}, "--dicom=seg", "Leave seg and pm out"),
    "kind": ({}, "--dicom=sc,pdf", "--dicom must be one of sc, gsps, seg, pm, got 'pdf'"),
    "parametric map": ({}, "--dicom=pm", "A Parametric Map needs a frame of reference"),
    "input": ({}, "--out=image.dcm", "is an input of this command"),
    "foreign": ({}, "--out=foreign.dcm", "is no earlier output"),
    "foreign state": ({}, "--out=other.dcm", "'other.gsps.dcm' is not replaced"),
    "suffix": ({}, "--out=map.gif", "out must end in .png, .npz or .dcm, or name a folder, got 'map.gif'"),
    "arrays": ({}, "--out=map.npz", "--dicom gsps needs an output in .dcm or a folder"),
    "picture": ({}, "--out=map.png", "--dicom gsps needs an output in .dcm or a folder"),
    "folder": ({}, "--compare=mirrored", "out must end in .png, got 'map.dcm'"),
    "report": ({}, "Right nodule.", "A file in .dcm takes the map of one phrase"),
    "all methods": ({}, "--method=all", "--method all compares methods on one phrase"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*[Ii]nvalid.*")
def test_refusals_before_the_model_is_loaded(workdir, capsys, name):
    tags, option, message = REFUSED[name]
    frames = {"NumberOfFrames"} & tags.keys()
    pixels = np.stack([square(72, 80)] * 2) if frames else square(72, 80)
    write_image(workdir / "image.dcm", pixels, **WINDOW, **tags)
    for path in ("foreign.dcm", "other.gsps.dcm"):
        Path(path).write_text("mine", encoding="utf-8")
    before = sorted(path.name for path in workdir.iterdir())
    words = ["--ckpt_path=none.ckpt", "--out=map.dcm", "--dicom=gsps", option]
    with pytest.raises(SystemExit) as ended:
        main(["explain", "image.png" if name == "png" else "image.dcm", PHRASE, *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in workdir.iterdir()) == before
    assert Path("foreign.dcm").read_text(encoding="utf-8") == "mine"


def test_colors_are_refused(tmp_path):
    image = write_image(tmp_path / "image.dcm", np.zeros((72, 80, 3), np.uint8), "RGB", 8, PlanarConfiguration=0)
    with pytest.raises(ValueError, match="photometric interpretation 'RGB'"):
        check_map_files(str(tmp_path / "map.dcm"), str(image))


def test_a_slice_without_its_place_gets_no_segmentation(tmp_path):
    image = write_image(tmp_path / "image.dcm", square(72, 80), SOPClassUID=CTImageStorage)
    with pytest.raises(ValueError, match=r"has no FrameOfReferenceUID .*leave seg out"):
        check_map_files(str(tmp_path / "map.dcm"), str(image), "seg")


def test_the_extra_is_named_if_it_is_missing(tmp_path, image, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match=r"highdicom: pip install 'matex_pl\[dicom\]'"):
        check_map_files(str(tmp_path / "map.dcm"), str(image))
