"""`matex prior`: how a phrase is read, in words and as a picture."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matex_pl.anatomy import load_regions
from matex_pl.cli import main
from matex_pl.commands.prior import on_image
from matex_pl.visualization.draw import DESIGN_WIDTH, INK, on_background
from matex_pl.visualization.prior import SIDE, TEXT_LINES, marked_runs, meet, place_labels, prior_panel

MARGIN, TOP = 20, 88

MANY = (
    "Right upper, mid and lower, left apex, lingula, hila, costophrenic angles, both hemidiaphragms, cardiac, "
    "mediastinal, retrocardiac, right middle lobe opacity, left lung."
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prior(capsys):
    """Run the command; what it prints."""

    def run(phrase, *more):
        main(["prior", phrase, *more])
        return capsys.readouterr().out

    return run


def chest(path="prior.png"):
    """The map over the outline, without the frame and the text around it."""
    return np.array(Image.open(path))[TOP : TOP + SIDE, MARGIN : MARGIN + SIDE].astype(int)


def peak(path="prior.png"):
    """Where M is highest, (x, y) in parts of the image: the end of the color map is the only bright yellow there."""
    yellow = chest(path) @ np.array([1, 1, -1])
    assert yellow.max() > 280
    rows, columns = np.nonzero(yellow > yellow.max() - 12)
    return columns.mean() / SIDE, rows.mean() / SIDE


@pytest.mark.parametrize(
    ("phrase", "place", "words"),
    [
        ("Left lower lobe consolidation.", (0.75, 0.8), "right, bottom"),
        ("Right apical pneumothorax.", (0.25, 0.2), "left, top"),
        ("Opacity in the right lung.", (0.25, 0.5), "left, full height"),
        ("Enlarged cardiac silhouette.", (0.565, 0.65), "middle, bottom"),
    ],
)
@pytest.mark.parametrize("shape", ["parabola", "gaussian", "plateau"])
def test_m_is_highest_where_the_words_say(prior, phrase, place, words, shape):
    assert words in prior(phrase, "--prior_shape", shape)
    assert peak() == pytest.approx(place, abs=0.03)


def test_the_reading_in_words(prior):
    said = prior("Left lower lobe consolidation. No right effusion, no right pneumothorax.", "--out", "out/left.png")
    assert said == (
        "Phrase, with brackets around words that name a region:\n"
        "  [Left lower lobe] consolidation. No right effusion, no right pneumothorax.\n\n"
        "Regions by the patient's side, with x to the right and y down as fractions of the image:\n"
        "  side  zone   x             y             on the image\n"
        "  left  lower  0.50 to 1.00  0.60 to 1.00  right, bottom\n\n"
        'Ignored:\n  "right": negated (2 times)\n\n'
        "M runs from 1 to 2.5.\n\n"
        "out/left.png\n"
    )
    assert [path.name for path in Path("out").iterdir()] == ["left.png"]


def test_paper_mirrors_the_map_and_not_the_markers(prior):
    assert "right, bottom" in prior("Left lower lobe consolidation.", "--out", "patient.png")
    said = prior("Left lower lobe consolidation.", "--out", "paper.png", "--laterality", "paper")
    assert "left  lower  0.00 to 0.50  0.60 to 1.00  left, bottom" in said
    assert "laterality paper: mirrored" in said
    assert peak("paper.png") == pytest.approx((0.25, 0.8), abs=0.02)
    corners = [(slice(8, 40), slice(8, 40)), (slice(8, 40), slice(-40, -8))]
    for corner in corners:
        np.testing.assert_array_equal(chest("patient.png")[corner], chest("paper.png")[corner])
    # An R has ink in its upper right quarter, an L has none.
    for corner, is_r in zip(corners, (True, False), strict=True):
        rows, columns = np.nonzero((chest("paper.png")[corner] == INK).all(-1))
        upper_right = (rows < rows.mean() - 2) & (columns > columns.mean() + 3)
        assert upper_right.any() == is_r


@pytest.mark.parametrize("phrase", ["", " \n\t", "null", "-", "Pneumonia.", "Diffuse opacities in the lungs."])
def test_nothing_named(prior, phrase):
    said = prior(phrase)
    assert "Regions: none" in said
    assert "M is 1 everywhere: the phrase names no region." in said
    prior("", "--out", "empty.png")
    np.testing.assert_array_equal(chest(), chest("empty.png"))


def test_strength_1_switches_the_prior_off(prior):
    assert "M is 1 everywhere: lambda_s is 1." in prior("Left apex.", "--lambda_s", "1")
    assert (chest() @ np.array([1, 1, -1])).max() < 280


def test_what_is_ignored_is_said_with_its_reason(prior):
    said = prior("Left chest tube in place. The heart is normal. No right effusion. Left apical opacity.")
    assert "\"Left\": belongs to 'chest tube'" in said
    assert '"heart": normal' in said
    assert '"right": negated' in said
    assert "[Left apical] opacity" in said


def test_knowledge_prior(prior):
    assert "Regions: none" in prior("Pulmonary edema.")
    said = prior("Pulmonary edema.", "--knowledge_prior", "true")
    assert said.count("hilar") == 2
    assert "[Pulmonary edema]." in said


def test_a_table_of_your_own(prior):
    Path("mine.yaml").write_text("lower: {left: [0.1, 0.1, 0.3, 0.3]}", encoding="utf-8")
    said = prior("Left lower lobe and right apical opacity.", "--regions", "mine.yaml")
    assert "left  lower  0.10 to 0.30  0.10 to 0.30  left, top" in said
    assert "right" not in said.split("Ignored")[0].split("on the image")[1]
    assert peak() == pytest.approx((0.2, 0.2), abs=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "prior.jpg"], "out must end in .png, got 'prior.jpg'"),
        (["--out", "folder.png"], "The output 'folder.png' is a folder"),
        (["--out", "file/prior.png"], "Nothing can be written in file: .* Give another folder"),
        (["--lambda_s", "0.5"], "lambda_s must be at least 1 .* got 0.5"),
        (["--lambda_s", ".nan"], "lambda_s must be at least 1"),
        (["--lambda_s", ".inf"], "lambda_s must be finite"),
        (["--lambda_s", "much"], "lambda_s"),
        (["--laterality", "left"], r"(?s)laterality.*'patient', 'paper'.*left"),
        (["--prior_shape", "round"], r"(?s)prior_shape.*'parabola', 'gaussian', 'plateau'.*round"),
        (["--regions", "none.yaml"], "No such file .*'none.yaml'"),
        (["--regions", "folder.png"], "Is a directory: 'folder.png'"),
        (["--regions", "binary.yaml"], "binary.yaml is no YAML: the file is binary"),
        (["--regions", "broken.yaml"], "broken.yaml, line 1: The line is no YAML"),
        (["--regions", "list.yaml"], "list.yaml holds no settings"),
        (["--regions", "box.yaml"], "box.yaml: The box of left lower needs 0 <= u0 < u1"),
        (["--color", "red"], "color"),
    ],
)
def test_errors_end_with_status_2_and_leave_nothing(here, capsys, words, message):
    Path("folder.png").mkdir()
    Path("file").write_text("", encoding="utf-8")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    Path("broken.yaml").write_text("lower: {left: [", encoding="utf-8")
    Path("list.yaml").write_text("- lower", encoding="utf-8")
    Path("box.yaml").write_text("lower: {left: [0.5, 0, 0.2, 1]}", encoding="utf-8")
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(["prior", "Left lower lobe consolidation.", *words])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    assert re.search(message, said.err)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("words", [["explain", "none.png", "Nodule.", "--ckpt_path", "x"], ["fit", "-c", "none.yaml"]])
def test_other_errors_of_use_have_status_2_too(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "none." in capsys.readouterr().err


@pytest.mark.parametrize(
    "phrase",
    [
        "Left lower lobe consolidation. " * 3300,
        "Left lower lobe consolidation. " + "x" * 100_000,
        "No right effusion. " * 5300,
        "left\n" * 20_000,
        "Épanchement 肺 of the left apex ≥ 3 µm \U0001fac1\ud800 \x1b[31m",
        MANY,
    ],
    ids=["long", "long word", "long denied", "long run", "unicode", "many"],
)
def test_no_phrase_is_refused(here, prior, phrase):
    prior(phrase)
    height, width, _ = np.array(Image.open("prior.png")).shape
    assert width == DESIGN_WIDTH
    assert TOP + SIDE < height <= TOP + SIDE + 48 + TEXT_LINES * 34 + 10
    assert [path.name for path in here.iterdir()] == ["prior.png"]


def test_control_characters_do_not_reach_the_terminal(prior):
    assert "\x1b" not in prior("Left \x1b[31mapex\x1b[0m opacity.")


def test_a_terminal_without_the_letters_gets_their_codes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    main(["prior", "Épanchement, left apex."])
    sys.stdout.flush()
    assert b"\\xc9panchement, [left apex]." in raw.getvalue()


def test_a_long_phrase_keeps_what_names_regions(prior):
    before = "There is no acute process. " * 3000
    hot = on_background(np.ones((1, 1), np.float32))[0, 0]

    def shaded(phrase):
        prior(phrase)
        text = np.array(Image.open("prior.png"))[TOP + SIDE + 48 :]
        return (text == hot).all(-1).sum(), len(text)

    pixels, height = shaded(before + "Left apical opacity." + before)
    assert height < TEXT_LINES * 34
    assert pixels == pytest.approx(shaded("Left apical opacity.")[0], rel=0.05)
    pixels, height = shaded(before)
    assert height == TEXT_LINES * 34 + 10
    assert not pixels


def test_runs_are_the_phrase():
    runs = list(marked_runs("a left b right", [(2, 6)], [(9, 14)]))
    assert runs == [("a ", ""), ("left", "names"), (" b ", ""), ("right", "ignored")]
    assert list(marked_runs("", [], [])) == []


@pytest.mark.parametrize("laterality", ["patient", "paper"])
def test_labels_of_the_whole_table_never_overlap(laterality):
    regions = sorted(region for sides in load_regions().values() for region in sides.values())
    boxes = [on_image(region.box, laterality) for region in regions]
    labels = [label.place for label in place_labels(boxes, [f"{region.side} {region.zone}" for region in regions])]
    assert len(labels) == len(regions)
    for k, label in enumerate([*labels, (0, 0, 48, 48), (SIDE - 48, 0, SIDE, 48)]):
        assert min(label) >= 0
        assert max(label) <= SIDE
        assert not any(meet(label, other) for other in labels[:k])


def test_equal_boxes_are_drawn_once_with_both_names():
    assert [label.text for label in place_labels([(0.1, 0.1, 0.4, 0.4)] * 2, ["left mid", "lingula"])] == [
        "left mid / lingula"
    ]


def test_the_outline_has_lungs_heart_and_body(prior):
    prior("Pneumonia.")
    picture = chest()
    shades = {
        tuple(picture[int(y * SIDE), int(x * SIDE)]) for x, y in ((0.25, 0.4), (0.55, 0.65), (0.5, 0.95), (0, 0.6))
    }
    assert len(shades) == 4
    assert tuple(picture[int(0.4 * SIDE), int(0.25 * SIDE)]) == tuple(picture[int(0.4 * SIDE), int(0.75 * SIDE)])


@pytest.mark.parametrize("prior", [np.zeros((4, 4)), np.full((4, 4), 3.0), np.full((4, 4), np.nan), np.ones(4)])
def test_a_prior_out_of_range_is_refused(prior):
    with pytest.raises(ValueError, match=r"prior must be \(H, W\) in \[1, lambda_s = 2.5\]"):
        prior_panel(prior=prior, lambda_s=2.5, boxes=[], names=[], phrase="", naming=[])


def test_help_is_there(capsys):
    with pytest.raises(SystemExit) as end:
        main(["prior", "--help"])
    assert end.value.code == 0
    assert "the patient's right on the left" in " ".join(capsys.readouterr().out.split())
