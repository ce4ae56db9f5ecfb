"""MIMIC-CXR for fine-tuning: frontal radiographs with a sentence of their report, another sentence in each epoch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from matex_pl.data.ms_cxr import METADATA_FILE, SPLIT_FILE, find_mimic_image, plain_or_gzipped, read_views
from matex_pl.data.pair import ImageTextPair
from matex_pl.data.table import TableDataModule, TableRow, parse_rows, read_table, read_text
from matex_pl.data.validation import BadRow, RuleError, path_below, split_name, text

Section = Literal["findings", "impression"]
SECTIONS: tuple[Section, ...] = get_args(Section)
_SPLIT_COLUMNS = ("dicom_id", "study_id", "subject_id", "split")
# A line that begins with a title in capitals and a colon starts a section.
_TITLE = re.compile(r"^[ \t]*([A-Z][A-Z /&,()-]+):", re.MULTILINE)
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9_])")
_NUMBER = re.compile(r"^(?:\d+[.)]\s*)+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_FEWEST_WORDS = 3


class MimicCxrDataModule(TableDataModule):
    """MIMIC-CXR-JPG with the reports of MIMIC-CXR: one pair per image, whose phrase is a sentence of its report.

    Both need a credentialed account and are not part of this package. In training, the seed selects another sentence in
    each epoch; validation and test keep one. Images whose report lacks the sections are left out and counted. There are
    no boxes: `MsCxrDataModule` has boxes for some of these images.

    Args:
        root: Folder of MIMIC-CXR-JPG: `files/p10/p10000032/s50414267/....jpg`, `mimic-cxr-2.0.0-split.csv` and
            `mimic-cxr-2.0.0-metadata.csv`, optionally gzipped (`.csv.gz`).
        reports: Folder of the reports, `files/p10/p10000032/s50414267.txt`; `root` by default.
        views: View positions of the images, as in the metadata. If empty, all images are used and the metadata is not
            read.
        sections: Sections of the reports that sentences come from.
        kwargs: Arguments of `TableDataModule`, except `fractions`.
    """

    def __init__(
        self,
        root: str,
        reports: str | None = None,
        views: Sequence[str] = ("PA", "AP"),
        sections: Sequence[Section] = SECTIONS,
        **kwargs: Any,
    ) -> None:
        # The split file names the split of each image, so there is no argument `fractions`.
        super().__init__(fractions=(1.0, 0.0, 0.0), **kwargs)
        if not sections or not set(sections) <= set(SECTIONS):
            raise ValueError(f"sections must be some of {', '.join(SECTIONS)}, got {list(sections)}.")
        self.root = Path(root)
        self.reports = Path(reports) if reports is not None else self.root
        self.views = list(views)
        self.sections = list(sections)
        self._sentences: dict[str, list[str]] = {}

    def read_rows(self) -> tuple[list[ImageTextPair], list[BadRow]]:
        """One pair per image that has one of the views and a sentence in its report."""
        rows, unread, self.row_warnings = read_table(plain_or_gzipped(self.root / SPLIT_FILE), {}, _SPLIT_COLUMNS)
        if self.views:
            images, unread_metadata = self._images_of_views()
            unread += unread_metadata
            rows = [row for row in rows if text(row.cells, "dicom_id") in images]
        sentences: dict[str, list[str]] = {}
        pairs, bad, warnings = parse_rows(rows, lambda row: self._pair(row, sentences))
        self.row_warnings += warnings
        with_phrase = [pair for pair in pairs if pair.phrase]
        if len(with_phrase) < len(pairs):
            rank_zero_warn(
                f"{len(pairs) - len(with_phrase)} of {len(pairs)} images have no sentence in "
                f"{' or '.join(self.sections)} of their reports and are left out."
            )
        return with_phrase, unread + bad

    def _images_of_views(self) -> tuple[set[str], list[BadRow]]:
        """Images of the views, and bad rows of the metadata."""
        path = plain_or_gzipped(self.root / METADATA_FILE)
        views, bad, warnings = read_views(path)
        self.row_warnings += warnings
        images = {image for image, view in views.items() if view in self.views}
        if not images:
            known = sorted(set(views.values()) - {""})
            raise ValueError(f"No image of {path} has one of the views {self.views}. The views are {known}.")
        return images, bad

    def _pair(self, row: TableRow, sentences: dict[str, list[str]]) -> ImageTextPair:
        """The pair of a row of the split file; the phrase is empty if the report has no sentence.

        `sentences` holds the sentences of the reports read so far, by study. The report of this image is added.
        """
        image, study, patient = (text(row.cells, name) for name in ("dicom_id", "study_id", "subject_id"))
        folder = f"files/p{patient[:2]}/p{patient}"
        path = find_mimic_image(self.root, f"{folder}/s{study}/{image}.jpg")
        if study not in sentences:
            sentences[study] = self._read_report(f"{folder}/s{study}.txt")
        self._sentences[image] = sentences[study]
        pair = ImageTextPair(
            id=image,
            patient_id=patient,
            image_id=image,
            image=str(path),
            phrase="",
            split=split_name(text(row.cells, "split")),
            source=row.source,
        )
        return self.draw_pair(pair, self.seed) if sentences[study] else pair

    def _read_report(self, name: str) -> list[str]:
        for path in (name, name.removeprefix("files/")):
            place = path_below(self.reports, path)
            if place.is_file():
                return sentences_of(read_text(place), self.sections)
        raise RuleError(name, f"there is no such report below {str(self.reports)!r}")

    def phrases_of(self, pair: ImageTextPair) -> list[str]:
        """All sentences of the report."""
        return self._sentences[pair.id]

    def draw_pair(self, pair: ImageTextPair, seed: int) -> ImageTextPair:
        """The pair with a random sentence of its report."""
        sentences = self._sentences[pair.id]
        rng = np.random.default_rng([seed, *pair.id.encode()])
        return replace(pair, phrase=sentences[rng.integers(len(sentences))])


def sentences_of(report: str, sections: Sequence[str]) -> list[str]:
    """Sentences of at least three words from the named sections of a report, in order, each once."""
    titles = [*_TITLE.finditer(report)]
    ends = [title.start() for title in titles[1:]] + [len(report)]
    parts = [
        report[title.end() : end]
        for title, end in zip(titles, ends, strict=False)
        if any(section.upper() in title[1] for section in sections)
    ]
    sentences = [_NUMBER.sub("", sentence) for part in parts for sentence in _END.split(" ".join(part.split()))]
    return list(dict.fromkeys(sentence for sentence in sentences if len(_WORD.findall(sentence)) >= _FEWEST_WORDS))
