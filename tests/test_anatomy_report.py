"""Reports in the styles of hospitals: their sentences, and the reasons why some get no map."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from matex_pl.anatomy.report import reason_without_map, split_report

PHRASES = Path(__file__).with_name("phrases")
HOSPITAL = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PORTABLE AP)

 INDICATION:  ___ year old woman with hypoxia, s/p lobectomy  // eval for pneumonia,
 effusion

 TECHNIQUE:  Single portable AP view of the chest.

 COMPARISON:  Chest radiograph ___.

 FINDINGS:

 There is no focal consolidation or pneumothorax.  Bilateral nodular opacities most
 likely represent metastases. The cardiomediastinal silhouette is normal. Right PICC
 tip terminates 3.5 cm above the cavoatrial junction. Dr. Smith was paged at 10:30
 a.m. on ___. Opacity in the left lower lobe measures approx. 3.5 cm.

 IMPRESSION:

 1.  Left lower lobe consolidation, concerning for pneumonia.
 2.  No pneumothorax.
 3.  Follow-up chest radiograph in 6 weeks is recommended to document resolution.
"""
# Report, and its sentences with their reasons; "" for a map.
REPORTS = [
    (
        HOSPITAL,
        [
            ("CHEST (PORTABLE AP)", "technique"),
            ("year old woman with hypoxia, s/p lobectomy // eval for pneumonia, effusion", "history"),
            ("Single portable AP view of the chest.", "technique"),
            ("Chest radiograph ___.", "comparison"),
            ("There is no focal consolidation or pneumothorax.", "negated"),
            ("Bilateral nodular opacities most likely represent metastases.", ""),
            ("The cardiomediastinal silhouette is normal.", "normal"),
            ("Right PICC tip terminates 3.5 cm above the cavoatrial junction.", ""),
            ("Dr. Smith was paged at 10:30 a.m. on ___.", "administrative"),
            ("Opacity in the left lower lobe measures approx. 3.5 cm.", ""),
            ("Left lower lobe consolidation, concerning for pneumonia.", ""),
            ("No pneumothorax.", "negated"),
            (
                "Follow-up chest radiograph in 6 weeks is recommended to document resolution.",
                "recommendation",
            ),
        ],
    ),
    (
        "HISTORY: cough. COMPARISON: None. FINDINGS: The heart is mildly enlarged. There is a small left effusion; no "
        "right effusion. IMPRESSION: 1. Cardiomegaly. 2. Small left effusion.",
        [
            ("cough.", "history"),
            ("None.", "comparison"),
            ("The heart is mildly enlarged.", ""),
            ("There is a small left effusion", ""),
            ("no right effusion.", "negated"),
            ("Cardiomegaly.", ""),
            ("Small left effusion.", ""),
        ],
    ),
    # One finding per line, without full stops.
    (
        "Left basal consolidation\nNo effusion\nHeart size normal\nRight apical pneumothorax, 2 cm\nPICC in SVC",
        [
            ("Left basal consolidation", ""),
            ("No effusion", "negated"),
            ("Heart size normal", "normal"),
            ("Right apical pneumothorax, 2 cm", ""),
            ("PICC in SVC", ""),
        ],
    ),
    # Lower case, with headings of organs, which stay in their sentences.
    (
        "history: fever\n\nfindings: lungs: clear. heart: enlarged. bones: old left rib fractures.\n"
        "impression: cardiomegaly.",
        [
            ("fever", "history"),
            ("lungs: clear.", "normal"),
            ("heart: enlarged.", ""),
            ("bones: old left rib fractures.", ""),
            ("cardiomegaly.", ""),
        ],
    ),
    # A paragraph without a heading below COMPARISON describes the image.
    (
        "CLINICAL HISTORY: Shortness of breath.\n\nCOMPARISON: ___.\n\nAs compared to the previous radiograph, there "
        "is a new right lower lobe opacity. The left lung is clear. No pneumothorax.Small effusion on the left.\n\n"
        "Dictated by: J. Smith, MD",
        [
            ("Shortness of breath.", "history"),
            ("As compared to the previous radiograph, there is a new right lower lobe opacity.", ""),
            ("The left lung is clear.", "normal"),
            ("No pneumothorax.", "negated"),
            ("Small effusion on the left.", ""),
            ("J. Smith, MD", "administrative"),
        ],
    ),
    # Markdown, and bullets.
    (
        "**Findings**\n- Mild cardiomegaly\n- Right lower lobe opacity, e.g. pneumonia, approx. 2 x 3 cm\n\n"
        "**Impression**\n\N{BULLET} Right lower lobe pneumonia\n",
        [
            ("Mild cardiomegaly", ""),
            ("Right lower lobe opacity, e.g. pneumonia, approx. 2 x 3 cm", ""),
            ("Right lower lobe pneumonia", ""),
        ],
    ),
    (
        "IMPRESSION\n1) Left apical pneumothorax (2.3 cm) 2) Subcutaneous emphysema\n3) ETT in place",
        [("Left apical pneumothorax (2.3 cm)", ""), ("Subcutaneous emphysema", ""), ("ETT in place", "")],
    ),
    (
        "FINDINGS:\r\nThe lungs are\r\nhyperinflated.\r\n\r\nIMPRESSION:\r\nCOPD.\r\n",
        [("The lungs are hyperinflated.", ""), ("COPD.", "")],
    ),
    (
        "Rt. lower lobe opacity. R.L.L. atelectasis vs. pneumonia. Size is .5 cm. There is edema! Is there a left "
        "effusion? Seen by Drs. J. Doe and A. Roe. ? left base pneumonia.",
        [
            ("Rt. lower lobe opacity.", ""),
            ("R.L.L. atelectasis vs. pneumonia.", ""),
            ("Size is .5 cm.", "no finding"),
            ("There is edema!", ""),
            ("Is there a left effusion?", ""),
            ("Seen by Drs. J. Doe and A. Roe.", "no finding"),
            ("? left base pneumonia.", ""),
        ],
    ),
    ("", []),
    (" \n ... \n 1. \n ___ ", []),
]


@pytest.mark.parametrize(("report", "expected"), REPORTS)
def test_sentences_of_reports(report: str, expected: list[tuple[str, str]]) -> None:
    found = split_report(report)
    assert [(sentence.text, sentence.reason) for sentence in found] == expected
    for sentence in found:
        assert " ".join(report[sentence.start : sentence.end].split()) == sentence.text


def test_sentences_know_their_heading() -> None:
    headings = [sentence.heading for sentence in split_report(HOSPITAL)]
    assert headings == ["EXAMINATION", "INDICATION", "TECHNIQUE", "COMPARISON", *["FINDINGS"] * 6, *["IMPRESSION"] * 3]


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("No significant change since the prior study.", "comparison"),
        ("Unchanged.", "comparison"),
        ("The patient is rotated.", "technique"),
        ("PA and lateral views of the chest show a left effusion.", ""),
        ("S/p CABG.", "history"),
        ("Status post right IJ placement; a tiny pneumothorax at the right apex is suspected.", ""),
        ("Evaluate for pneumothorax.", "history"),
        ("Cannot exclude a small left effusion.", ""),
        ("The right lung is clear but the left base is opacified.", ""),
        ("Interval removal of the left chest tube without pneumothorax.", "negated"),
        ("Recommend CT to evaluate the nodule.", "recommendation"),
        ("Left upper lobe nodule, for which CT is recommended.", ""),
        ("Degenerative changes of the spine.", ""),
        ("Low lung volumes.", ""),
        ("Findings were discussed with Dr. J. Doe by phone.", "administrative"),
        ("Heart size is at the upper limits of normal.", "normal"),
        ("The previously seen left effusion has resolved.", "negated"),
        ("Degree of confidence is high.", "no finding"),
    ],
)
def test_reasons(sentence: str, reason: str) -> None:
    assert reason_without_map(sentence) == reason


def test_phrases_with_a_place_and_a_finding_get_a_map() -> None:
    """The sets of the region parser name a place in each of these phrases; a few of them name no finding."""
    rows = []
    for path in sorted(PHRASES.glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += [
                (row[0].replace("\\n", "\n"), row[1])
                for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            ]
    placed = [text for text, places in rows if places not in ("-", "")]
    missed = [text for text in placed if reason_without_map(text)]
    assert len(placed) > 900
    assert len(missed) <= 6, missed


@settings(max_examples=60, deadline=None, derandomize=True)
@example("1.\n\n2.")
@example("IMPRESSION:" * 50)
@given(st.text(st.sampled_from("ab AB.;:\n-1)?\u2022_Findings: no effusion")) | st.text())
def test_no_text_breaks_the_splitter(text: str) -> None:
    last = 0
    for sentence in split_report(text):
        assert last <= sentence.start < sentence.end <= len(text)
        assert sentence.text == " ".join(text[sentence.start : sentence.end].split())
        last = sentence.end


def test_a_long_text_takes_linear_time() -> None:
    report = "There is a left effusion. No pneumothorax\n" * 3000
    assert len(split_report(report)) == 6000


def test_ends_of_lines() -> None:
    """A word that ends like a preposition ends its sentence, and so does a carriage return alone."""
    for text in ("Left effusion, posterior\nNo pneumothorax", "FINDINGS:\rLeft effusion\rNo pneumothorax"):
        found = split_report(text)
        assert [sentence.reason for sentence in found] == ["", "negated"]
        assert all(text[sentence.start : sentence.end] == sentence.text for sentence in found)
    assert len(split_report("Effusion of the left\nLung base and\nRight effusion.")) == 2
