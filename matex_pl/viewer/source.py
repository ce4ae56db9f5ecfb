"""The DICOM image that a map belongs to: checks of its elements, and the elements that new objects take from it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matex_pl import __version__
from matex_pl.data.dicom import is_dicom, read_header
from matex_pl.data.levels import need

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

DicomKind = Literal["sc", "gsps", "seg", "pm"]
"""Kinds of objects: Secondary Capture, Grayscale Softcopy Presentation State, Segmentation, Parametric Map."""

# Elements of patient and study, which the new objects share with the image.
_SHARED = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientSex",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientComments",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "LongitudinalTemporalInformationModified",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianName",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "TimezoneOffsetFromUTC",
    # Of the series, to file the object under.
    "BodyPartExamined",
    "Laterality",
)
# Elements that highdicom reads from an image; sloppy values of patients and studies are copied later.
_EMPTY = (
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_NEEDED = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
_PLACE = ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
# Further elements for objects with pixels.
_PICTURE = ("PatientOrientation", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
# CT, MR and PET: their segmentations need a place in the patient.
_SLICES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128")
# Angiography, fluoroscopy, multi-frame captures and ultrasound: highdicom segments only those with functional groups.
_SEVERAL_FRAMES = tuple(
    f"1.2.840.10008.5.1.4.1.1.{part}" for part in ("12.1", "12.2", "7.1", "7.2", "7.3", "7.4", "3.1")
)
_CAPTURE: tuple[DicomKind, ...] = ("sc",)
_SERIES_NUMBERS = {"sc": 9101, "gsps": 9102, "seg": 9103, "pm": 9104}


@dataclass(frozen=True)
class Source:
    """A DICOM image that maps can be attached to.

    Args:
        path: File of the image.
        header: Elements of the image without its pixels, as in the file.
        reference: The elements that highdicom reads, all of them valid.
    """

    path: Path
    header: Dataset
    reference: Dataset


def read_source(path: str | Path, kinds: Collection[DicomKind] = _CAPTURE) -> Source:
    """A DICOM image to attach maps to. Its pixels are not decoded.

    Args:
        path: File of the image.
        kinds: Kinds of the objects to attach.

    Raises:
        ImportError: The extra `dicom` is not installed.
        ValueError: The file is no DICOM image with one gray frame, an id is missing, or a kind needs more of the image.
    """
    with Path(path).open("rb") as file:
        if not is_dicom(file.read(132)):
            raise ValueError(
                f"{path} is no DICOM image, and has no patient and study to attach a map to. Give a DICOM image, or "
                "an output that ends in .png or .npz."
            )
    need("highdicom", "DICOM objects need highdicom")
    header = read_header(Path(path))
    # Texts of any character set become Unicode.
    header.decode()
    for name in _NEEDED:
        value = str(header.get(name) or "").strip()
        if not value:
            raise ValueError(f"{path} has no {_tag(name)}, without which no map can be attached. Add the element.")
        if name.endswith("UID") and not getattr(header[name].value, "is_valid", False):
            raise ValueError(f"{path} has an invalid {_tag(name)}: {value!r}. Correct the element.")
    if header.SOPClassUID.type != "SOP Class":
        raise ValueError(
            f"{path} has the {_tag('SOPClassUID')} {str(header.SOPClassUID)!r}, which is no class of DICOM. Maps are "
            "attached to images of a public class."
        )
    if header.NumberOfFrames > 1 or "PerFrameFunctionalGroupsSequence" in header:
        raise ValueError(
            f"{path} is a multi-frame object with {header.NumberOfFrames} frames. Maps are attached to images of one "
            "frame: extract a frame first."
        )
    colors = str(header.get("PhotometricInterpretation") or "")
    if colors not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(
            f"{path} has the photometric interpretation {colors!r}. Maps are attached to gray images: MONOCHROME1 or "
            "MONOCHROME2."
        )
    if header.SOPClassUID in _SEVERAL_FRAMES and {"seg", "pm"} & set(kinds):
        raise ValueError(
            f"{path} is of the class {header.SOPClassUID.name}, which may have several frames and gets neither a "
            "Segmentation nor a Parametric Map. Leave seg and pm out of --dicom."
        )
    lacking = [name for name in _PLACE if not header.get(name)]
    if lacking and ("pm" in kinds or ("seg" in kinds and header.SOPClassUID in _SLICES)):
        kind, name = ("pm", "A Parametric Map") if "pm" in kinds else ("seg", "A Segmentation of a slice")
        raise ValueError(
            f"{name} needs a frame of reference, and {path} has no {_tag(lacking[0])}. Projection images mostly have "
            f"none: leave {kind} out of --dicom."
        )
    return Source(Path(path), header, _reference(header, has_place=not lacking))


def new_equipment() -> dict[str, Any]:
    """Names of this software, as highdicom's constructors take them."""
    # The first 4 KB of a file hold the manufacturer, by which `check_output` recognizes earlier outputs.
    return {
        "manufacturer": "matex_pl",
        "manufacturer_model_name": "matex_pl",
        "software_versions": __version__,
        "device_serial_number": "1",
    }


def new_ids(kind: DicomKind, series: str, number: int) -> dict[str, Any]:
    """Series and a new instance of it, as highdicom's constructors take them.

    Args:
        kind: Kind of the object.
        series: UID of the series.
        number: Number of the instance in the series, from 1.
    """
    from highdicom import UID

    return {
        "series_instance_uid": series,
        "series_number": _SERIES_NUMBERS[kind],
        "sop_instance_uid": UID(),
        "instance_number": number,
    }


def attach(item: Dataset, source: Source, description: str) -> None:
    """Put a new object into the study of its image: patient, study and accession as in the image.

    Args:
        item: New object, which is changed.
        source: The image.
        description: Description of the series, at most 64 characters.
    """
    if "PixelData" in item and "FrameOfReferenceUID" not in item:
        # Empty stands for unknown.
        item.PatientOrientation = []
    for name in (*_SHARED, *(_PICTURE if "PixelData" in item else ())):
        if name in source.header:
            item[name] = copy.deepcopy(source.header[name])
    # All texts are Unicode: phrases may have characters that the image's set lacks.
    item.SpecificCharacterSet = "ISO_IR 192"
    item.SeriesDescription = description
    item.SeriesDate, item.SeriesTime = item.InstanceCreationDate, item.InstanceCreationTime


def _reference(header: Dataset, *, has_place: bool) -> Dataset:
    """Elements of an image that highdicom reads."""
    from pydicom.dataset import Dataset

    found = Dataset()
    names = [*_NEEDED, "Rows", "Columns", "PhotometricInterpretation", "BitsAllocated", "BitsStored"]
    if has_place:
        names += _PLACE
    for name in (*names, "SliceThickness"):
        if header.get(name) not in (None, ""):
            found[name] = copy.deepcopy(header[name])
    for name in _EMPTY:
        setattr(found, name, "")
    found.SamplesPerPixel = 1
    if has_place:
        found.setdefault("SliceThickness", None)
    found.Modality = str(header.get("Modality") or "OT")
    return found


def _tag(name: str) -> str:
    """Name and number of an element."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.tag import Tag

    tag = Tag(tag_for_keyword(name) or 0)
    return f"{name} ({tag.group:04X},{tag.element:04X})"
