import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from markdown_it import MarkdownIt

from matex_pl.report.benchmark import (
    SAME_MAP,
    control_sentences,
    cost_table,
    difference_tables,
    finding_tables,
    group_table,
    paper_table,
    verdict,
    write_report,
)
from matex_pl.report.gallery import Panel, encode
from matex_pl.report.tables import MISSING, clean
from matex_pl.visualization.draw import single_line

HOSTILE = [
    "<script>alert(1)</script>",
    "a \"quoted\" onerror=alert(1) 'x'",
    "| pipe | pipe \\| ",
    "two\nlines\r\n\n# heading",
    "`code` *bold* _em_ [link](http://evil.example/x) ![i](http://evil.example/y) $x$",
    "</svg></style>--><img src=http://evil.example/z>",
    "{{ 7 * 7 }}{% raw %}",
    "right\u202eleft \x00\x07\ud800 中文",
    "&lt;b&gt;",
]
LOADING = ("src", "href", "xlink:href", "srcset", "poster", "action", "data", "background", "formaction")
FILLS = ("mean_colour", "mean_film")


def metric(label, group, higher, fill=None, percent=False):
    return {
        "label": label,
        "group": group,
        "fill": fill,
        "higher_is_better": higher,
        "percent": percent,
        "says": f"{label} in one sentence.",
    }


METRICS = {
    "pointing_game": metric("Pointing game", "localisation", True),
    "cnr": metric("Contrast to noise", "localisation", True),
    "miou": metric("Mean IoU", "localisation", True),
    "energy_in_box": metric("Energy in the boxes", "localisation", True),
    **{f"confidence_drop/{f}": metric("Confidence drop", "confidence", False, f, True) for f in FILLS},
    **{f"confidence_increase/{f}": metric("Confidence increase", "confidence", True, f, True) for f in FILLS},
    **{f"remove/{f}": metric("Drop when removed", "confidence", True, f, True) for f in FILLS},
    "confidence_drop": metric("Confidence drop", "confidence", False, None, True),
    "confidence_increase": metric("Confidence increase", "confidence", True, None, True),
    "insertion/blur": metric("Insertion", "curves", True, "blur"),
    "insertion/mean_film": metric("Insertion", "curves", True, "mean_film"),
    "deletion/mean_colour": metric("Deletion", "curves", False, "mean_colour"),
    "deletion/mean_film": metric("Deletion", "curves", False, "mean_film"),
    "prompt_sensitivity": metric("Prompt sensitivity", "sensitivity", False),
    "outside_thorax_mass": metric("Mass outside the thorax", "mass", None),
    "mean_map_mass": metric("Mean map mass", "mass", None),
    "sanity": metric("Sanity", "sanity", False),
}
FINDINGS = ("nodule", "effusion", "pneumothorax", "cardiomegaly", "consolidation")
METHODS = ("MATEX", "MATEX, no prior", "M2IB", "Grad-ECLIP", "Chefer et al.", "RISE", "Saliency", "Attention rollout")
CONTROLS = ("Prior of the phrase", "Centre of the film", "Noise")


DIFFERENCES = (
    {"difference": 0.1, "low": 0.02, "high": 0.18},
    {"difference": 0.03, "low": -0.05, "high": 0.11},
    {"difference": -0.2, "low": -0.3, "high": -0.1},
    {"difference": None, "low": None, "high": None},
)


def score(rng, key, skill, n=100):
    scale = 40 if METRICS[key]["percent"] else 1
    value = scale * float(np.clip(skill + rng.normal(0, 0.08), 0, 1))
    return {"value": value, "low": value - 0.07 * scale, "high": value + 0.06 * scale, "n": n}


def row(rng, name, modality, skill, control=False):
    keys = [key for key in METRICS if (key.startswith("confidence_") and "/" not in key) == (modality == "text")]
    if modality == "text":
        keys += ["mean_map_mass", "sanity"]
    share = np.linspace(0, 1, 17)
    entry = {
        "name": name,
        "modality": modality,
        "control": control,
        "class": {"MATEX": "Matex", "Prior of the phrase": "PriorOnly"}.get(name, "Other"),
        "settings": {"tau": 0.2},
        "note": "500 masks" if name == "RISE" else "",
        "key": "0f" * 8,
        "seconds_per_pair": 0.02 + 0.5 * (name == "RISE"),
        "error": None,
        "scores": {key: score(rng, key, skill) for key in keys},
        "per_finding": {},
        "sanity_curve": {
            "stages": ["projection", "block 3", "block 2", "block 1", "patch embedding"],
            "correlation": [float(1 - (1 - skill) * 0.2 * i) if control else 0.9 ** (i + 1) for i in range(5)],
        },
    }
    if modality == "image":
        entry["threshold"] = 0.35
        entry["per_finding"] = {f: {k: score(rng, k, skill, 20) for k in ("pointing_game", "miou")} for f in FINDINGS}
        entry["curves"] = {
            key: {
                "share": share.tolist(),
                "score": (share ** (1 - skill) if "insertion" in key else (1 - share) ** (1 + 5 * skill)).tolist(),
            }
            for key in METRICS
            if METRICS[key]["group"] == "curves"
        }
    return entry


def fake_results(methods=METHODS, controls=CONTROLS, findings=FINDINGS, refuses=True):
    """Results of the benchmark's shape with methods, the last of which may refuse the model, and controls."""
    rng = np.random.default_rng(0)
    rows = [row(rng, name, "image", 0.8 - 0.07 * i) for i, name in enumerate(methods)]
    rows += [row(rng, name, "image", 0.45 - 0.15 * i, control=True) for i, name in enumerate(controls)]
    rows += [row(rng, name, "text", 0.7 - 0.05 * i) for i, name in enumerate(methods[:4])]
    rows += [row(rng, name, "text", 0.3, control=True) for name in controls[-1:]]
    if refuses:
        for key in ("scores", "per_finding", "curves", "sanity_curve"):
            del rows[len(methods) - 1][key]
        rows[len(methods) - 1] |= {"error": "No attention weights in this tower.", "seconds_per_pair": None}
    for entry in rows:
        entry["per_finding"] = dict(zip(findings, entry.get("per_finding", {}).values(), strict=False))
    rivals = (*methods[1:2], *controls)
    compared = zip(methods, (DIFFERENCES, [DIFFERENCES[0]] * 4, [DIFFERENCES[1]] * 4), strict=False)
    comparisons = [
        {"row": name, "against": against, "metric": key, "n": 100, **difference}
        for name, differences in compared
        for key in ("pointing_game", "confidence_drop/mean_film")
        for against, difference in zip(rivals, differences, strict=False)
        if against != name
    ]
    return {
        "format": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "model": {
            "checkpoint": "runs/phantom/last.ckpt",
            "weights": "ab" * 32,
            "image_size": [112, 112],
            "grid": [7, 7],
        },
        "data": {
            "class": "PhantomDataModule",
            "settings": {"root": "data/phantom"},
            "split": "test",
            "pairs": 100,
            "patients": 90,
            "boxed": 100,
            "findings": dict.fromkeys(findings, 20),
            "fingerprint": "cd" * 32,
            "validation_pairs": 24,
            "sanity_pairs": 16,
        },
        "settings": {"resamples": 1000},
        "seed": 0,
        "versions": {"matex_pl": "0.1.0", "torch": "2.8"},
        "machine": "two cores",
        "forward_seconds_per_pair": 0.004,
        "metrics": copy.deepcopy(METRICS),
        "rows": rows,
        "comparisons": comparisons,
        "published": {
            "source": "Tables 1 and 2 of the paper, MS-CXR",
            "image": {
                "MATEX": {"drop": [0.51, 0.03], "increase": [47.55, 1.1], "roar": [37.9, 0.79]},
                "KernelSHAP": {"drop": [2.37, 0.04], "increase": [10.24, 0.68], "roar": [12.67, 1.02]},
            },
            "text": {"MATEX": {"drop": [1.91, 0.06], "increase": [50.07, 0.46], "roar": [16.98, 0.66]}},
        },
    }


def fake_panels(folder, rows=METHODS):
    rng = np.random.default_rng(1)
    picture = encode(rng.integers(0, 255, (60, 110, 3), dtype=np.uint8))
    return [
        Panel(name, kind, f"study-{kind}", f"{name} on {kind}, cosine 0.31", picture)
        for kind in ("best", "worst", "random")
        for name in rows
    ]


def small(**changes):
    """Two methods, one control and one finding, none of which refuses."""
    return {**fake_results(("MATEX", "M2IB"), CONTROLS[:1], ("nodule",), refuses=False), **changes}


def hostile():
    """Results in which every text that a user could have written is hostile."""
    results = fake_results((*HOSTILE, "Refused"), CONTROLS, tuple(HOSTILE))
    attack = " ".join(HOSTILE)
    results["model"]["checkpoint"] = results["data"]["class"] = results["machine"] = results["created"] = attack
    results["data"]["split"] = results["published"]["source"] = attack
    results["published"]["image"][attack] = {"drop": [1.0, 0.1]}
    for row in results["rows"]:
        row |= {"note": attack, "class": attack, "settings": {attack: attack}}
        row["error"] = row["error"] and attack
    for entry in results["metrics"].values():
        entry |= {"says": attack, "label": f"{entry['label']} {HOSTILE[0]} {HOSTILE[2]}"}
    return results


def with_values(values, key, spread=0.1):
    """The small results with these values of one metric for the maps of the film, and intervals to each side."""
    results = small()
    for row in results["rows"]:
        if row["modality"] == "image":
            value = values[row["name"]]
            ends = (None, None) if value is None else (value - spread, value + spread)
            row["scores"][key] = {"value": value, "low": ends[0], "high": ends[1], "n": 100}
        else:
            row["scores"].pop(key, None)
    return results


def best_of(table):
    """Which rows are marked in the first column."""
    return [line.name for line in table.methods + table.controls if line.cells[0].best]


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.inside = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.inside.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self.inside), data))

    def words(self, within="body"):
        return " ".join(" ".join(data for inside, data in self.texts if within in inside).split())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def tables_of(text):
    """Every table of a Markdown text as rows of cells, as GitHub reads them."""
    tables = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append(tokens[i + 1])
    return tables


def plain(token):
    return "".join(child.content for child in token.children)


def write(tmp_path, results, panels=()):
    write_report(results, panels, tmp_path)
    html, tables = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "tables.md"))
    return html, tables


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    html, tables = write(folder, fake_results(), fake_panels(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "tables.md"]
    return html, tables


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    panels = [Panel(p.row, text, text, text, p.jpeg) for text in HOSTILE for p in fake_panels(folder, HOSTILE[:2])]
    return write(folder, hostile(), panels)


def test_hostile_text_stays_text_on_the_page(report, attacked):
    page = Page(attacked[0])
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in Page(report[0]).elements}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not page.all("script")
    assert not page.inside
    for text in HOSTILE:
        assert single_line(text) in page.words()
        assert any(image["alt"] == single_line(text) for image in page.all("img"))


def test_hostile_text_stays_text_in_plots(attacked):
    labels = Page(attacked[0]).words("svg")
    for text in HOSTILE:
        name = single_line(text)
        assert (name if len(name) <= 22 else name[:21].rstrip() + "…") in labels


def test_hostile_text_stays_text_in_markdown(attacked):
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(attacked[1])
    children = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in children} <= {"text", "text_special", "strong_open", "strong_close", "softbreak"}
    assert not [token for token in tokens if token.type in ("html_block", "fence", "code_block")]
    assert {token.tag for token in tokens if token.type == "heading_open"} == {"h1", "h2"}
    first = [plain(row[0]) for row in tables_of(attacked[1])[0]]
    for text, cell in zip(HOSTILE, first[1:], strict=False):
        assert cell.startswith(single_line(text))


def test_tables_in_markdown_have_as_many_cells_as_heads(report, attacked):
    for text in (report[1], attacked[1]):
        lines = text.splitlines()
        rules = [i for i, line in enumerate(lines) if line.startswith("|:")]
        assert len(rules) == len(tables_of(text)) > 8
        for table, rule in zip(tables_of(text), rules, strict=True):
            assert {len(row) for row in table} == {lines[rule].count("-:") + 1}
            # GitHub drops cells that are too many, a reader of the raw text does not.
            body = lines[rule + 1 : rule + len(table)]
            assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in body} == {len(table[0]) + 1}


def test_the_page_loads_nothing(report, attacked):
    for html in (report[0], attacked[0]):
        page = Page(html)
        links = [value for _, attrs in page.elements for name, value in attrs.items() if name in LOADING]
        assert links
        assert all(value.startswith(("#", "data:image/jpeg;base64,")) for value in links)
        assert not page.all("link")
        assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", html))
        assert "@import" not in html
        policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
        assert policy.startswith("default-src 'none'")


def test_every_reference_on_the_page_has_its_one_target(report):
    page = Page(report[0])
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    wanted = {attrs[name][1:] for _, attrs in page.elements for name in ("href", "xlink:href") if name in attrs}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", report[0]))
    assert wanted <= set(ids)
    sections = [attrs["id"] for attrs in page.all("section") if "id" in attrs]
    assert len(sections) == len(set(sections)) == len(page.all("nav")) * 9


def test_plots_take_the_colours_of_the_page(report):
    drawn = "".join(re.findall(r"<svg.*?</svg>", report[0], re.DOTALL))
    assert "var(--accent)" in drawn
    assert "currentColor" in drawn
    assert not re.findall(r"(?:fill|stroke): #\w+", drawn)
    assert "<style" not in drawn
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in Page(report[0]).all("svg"))


def test_heads_say_what_they_head(report):
    page = Page(report[0])
    assert {attrs.get("scope") for attrs in page.all("th")} == {"col", "colgroup", "row", "rowgroup"}
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html")[0]["lang"] == "en"


def test_matplotlib_is_left_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    write(tmp_path, small())
    assert dict(matplotlib.rcParams) == before


def test_the_same_results_give_the_same_page(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    assert write(first, small()) == write(second, small())


def test_best_is_in_the_direction_of_the_metric():
    results = with_values({"MATEX": 0.2, "M2IB": 0.7, CONTROLS[0]: 0.9}, "pointing_game")
    assert best_of(group_table(results, "image", "localisation")) == ["M2IB"]
    results = with_values({"MATEX": 20.0, "M2IB": 70.0, CONTROLS[0]: 1.0}, "confidence_drop/mean_colour")
    assert best_of(paper_table(results, "image")) == ["MATEX"]
    results = with_values({"MATEX": 0.2, "M2IB": 0.7, CONTROLS[0]: 0.9}, "outside_thorax_mass")
    assert best_of(group_table(results, "image", "mass")) == []


def test_ties_as_printed_share_the_mark():
    results = with_values({"MATEX": 0.701, "M2IB": 0.703, CONTROLS[0]: 0.1}, "pointing_game")
    assert best_of(group_table(results, "image", "localisation")) == ["MATEX", "M2IB"]


@pytest.mark.parametrize("value", [None, math.nan])
def test_no_value_is_never_the_best(value):
    results = with_values({"MATEX": value, "M2IB": 0.1, CONTROLS[0]: 0.9}, "pointing_game")
    table = group_table(clean(results), "image", "localisation")
    assert [line.cells[0].text for line in table.methods] == [MISSING, "0.10"]
    assert best_of(table) == []


def test_bold_on_the_page_and_in_markdown(tmp_path):
    results = with_values({"MATEX": 0.2, "M2IB": 0.7, CONTROLS[0]: 0.9}, "pointing_game")
    html, tables = write(tmp_path, results)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td([^>]*)>(.*?)<small>(.*?)</small>', html)
    assert ("M2IB", ' class="best"', "<strong>0.70</strong>", "0.60 to 0.80") in rows
    assert ("MATEX", "", "0.20", "0.10 to 0.30") in rows
    assert (CONTROLS[0], "", "0.90", "0.80 to 1.00") in rows
    assert "| M2IB | **0.70** (0.60 to 0.80) |" in tables
    assert f"| Control: {CONTROLS[0]} | 0.90 (0.80 to 1.00) |" in tables


def test_interval_and_count_stand_with_the_value():
    results = small()
    row = results["rows"][0]
    row["scores"]["pointing_game"] = {"value": 0.84, "low": 0.77, "high": 0.9, "n": 88}
    row["scores"]["confidence_drop/mean_film"] = {"value": 1.5, "low": None, "high": None, "n": 100}
    table = group_table(results, "image", "localisation")
    assert (table.methods[0].cells[0].text, table.methods[0].cells[0].interval) == ("0.84", "0.77 to 0.90")
    assert table.columns[0].counted == "n = 88 to 100"
    drop = paper_table(results, "image")
    place = [column.detail for column in drop.columns].index("mean film")
    assert (drop.methods[0].cells[place].text, drop.methods[0].cells[place].interval) == ("1.50", "")


def test_small_shares_get_a_third_decimal_and_zero_no_sign():
    results = with_values({"MATEX": 0.0123, "M2IB": -0.0001, CONTROLS[0]: 0.02}, "outside_thorax_mass", 0.01)
    table = group_table(results, "image", "mass")
    assert [line.cells[0].text for line in table.methods] == ["0.012", "0.000"]


def test_published_figures_stand_in_their_own_columns():
    table = paper_table(fake_results(), "image")
    assert [column.published for column in table.columns] == [False] * 4 + [True] * 3
    assert table.heads == [(False, 4), (True, 3)]
    assert [cell.text for cell in table.methods[0].cells[4:]] == ["0.51 ± 0.03", "47.55 ± 1.10", "37.90 ± 0.79"]
    only = table.methods[-1]
    assert (only.name, only.note) == ("KernelSHAP", "published only")
    assert {cell.text for cell in only.cells[:4]} == {MISSING}
    assert {cell.text for line in table.controls for cell in line.cells[4:]} == {MISSING}
    assert paper_table(small(published=None), "image").heads == []


def test_controls_stand_apart():
    table = group_table(fake_results(), "image", "localisation")
    assert [line.name for line in table.controls] == list(CONTROLS)
    assert not {line.name for line in table.methods} & set(CONTROLS)


def test_a_method_that_refuses_is_named_with_its_reason(report):
    refused = METHODS[-1]
    table = group_table(fake_results(), "image", "localisation")
    assert refused not in [line.name for line in table.methods]
    assert refused not in [line.name for line in cost_table(fake_results()).methods]
    assert f"{refused} (film): No attention weights in this tower." in Page(report[0]).words()
    assert f"- Left out: {refused} (film): No attention weights in this tower." in report[1]


def test_cost_in_seconds_and_forwards():
    results = small(forward_seconds_per_pair=0.004)
    cells = cost_table(results).methods[0].cells
    assert [cell.text for cell in cells] == ["film", "0.02", "5"]
    assert [cell.text for cell in cost_table({**results, "forward_seconds_per_pair": None}).methods[0].cells][
        2
    ] == MISSING


def test_findings_have_a_column_each():
    results = fake_results()
    tables = finding_tables(results, "image")
    assert [table.title for table in tables] == ["Pointing game\N{NO-BREAK SPACE}↑", "Mean IoU\N{NO-BREAK SPACE}↑"]
    assert [column.label for column in tables[0].columns] == list(FINDINGS)
    value = results["rows"][1]["per_finding"]["effusion"]["pointing_game"]["value"]
    assert tables[0].methods[1].cells[1].text == f"{value:.2f}"


@pytest.mark.parametrize(
    ("low", "difference", "high", "higher", "word"),
    [
        (0.1, 0.2, 0.3, True, "better"),
        (0.1, 0.2, 0.3, False, "worse"),
        (0.1, 0.2, 0.3, None, "higher"),
        (-0.3, -0.2, -0.1, True, "worse"),
        (-0.3, -0.2, -0.1, False, "better"),
        (-0.3, -0.2, -0.1, None, "lower"),
        (-0.1, 0.2, 0.3, True, "undecided"),
        (0.0, 0.2, 0.3, True, "undecided"),
        (None, 0.2, None, True, "open"),
        (None, None, None, True, "open"),
    ],
)
def test_verdict_of_a_comparison(low, difference, high, higher, word):
    comparison = {"difference": difference, "low": low, "high": high}
    assert verdict(comparison, {"higher_is_better": higher}) == word


def test_comparisons_are_told_in_sentences():
    game, matex, drop, *_ = control_sentences(fake_results(("MATEX", "RISE, slow", "Noisy"), refuses=False))
    assert game == (
        "Pointing game, how many of 3 methods are better: than “RISE, slow” 1, than Prior of the phrase 1, "
        "than Centre of the film 1, than Noise 1. Noisy is better than none."
    )
    assert matex == (
        "Pointing game (n = 100): MATEX is better than “RISE, slow” (+0.10; 0.02 to 0.18); it is worse than Centre of "
        "the film (-0.20; -0.30 to -0.10); it is not distinguishable from Prior of the phrase (+0.03; -0.05 to 0.11); "
        "it could not be compared with Noise."
    )
    # Where less is better, more is worse.
    assert drop == (
        "Confidence drop (mean film), how many of 3 methods are better: than “RISE, slow” 0, than Prior of the phrase "
        "0, than Centre of the film 1, than Noise 0. “RISE, slow” and Noisy are better than none."
    )


def test_comparisons_are_drawn_for_matex_and_listed_for_all(report):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", report[0])
    assert [caption for caption in captions if "minus" in caption] == [
        "Pointing game: MATEX minus each of these; right of the line is better",
        "Confidence drop (mean film): MATEX minus each of these; left of the line is better",
    ]
    table = difference_tables(fake_results())[0]
    assert [line.name for line in table.methods] == list(METHODS[:3])
    assert [column.label for column in table.columns] == [f"minus {name}" for name in (METHODS[1], *CONTROLS)]
    cells = table.methods[0].cells
    assert [cell.text for cell in cells] == ["+0.10", "+0.03", "-0.20", MISSING]
    assert [cell.best for cell in cells] == [True, False, False, False]
    assert table.methods[1].cells[0].text == MISSING


@pytest.mark.parametrize(
    ("key", "words"), [("sanity", "weights are shuffled"), ("prompt_sensitivity", "another study's")]
)
def test_maps_that_do_not_change_are_named(key, words):
    results = with_values({"MATEX": 0.3, "M2IB": SAME_MAP + 0.05, CONTROLS[0]: 1.0}, key)
    sentence = next(s for s in control_sentences(results) if words in s)
    assert sentence.startswith("M2IB (film, 0.95) gives nearly the same map")
    assert sentence.endswith("Of the controls: Prior of the phrase (film, 1.00).")
    results = with_values({"MATEX": 0.3, "M2IB": 0.4, CONTROLS[0]: 0.1}, key)
    assert next(s for s in control_sentences(results) if words in s).startswith("No method gives")
    results = with_values({"MATEX": None, "M2IB": None, CONTROLS[0]: None}, key)
    assert not [s for s in control_sentences(results) if words in s]


def test_the_prior_is_warned_of_where_it_is_used():
    results = small()
    assert "MATEX and Prior of the phrase take a prior" in control_sentences(results)[-1]
    results["rows"][0]["settings"] = {"delta": 0}
    assert "Prior of the phrase takes a prior" in control_sentences(results)[-1]
    results["rows"] = [row for row in results["rows"] if not row["control"]]
    assert not [sentence for sentence in control_sentences(results) if "prior" in sentence]


@pytest.mark.parametrize("change", ["null", "nan", "no scores", "no value", "null scores", "null curves"])
def test_what_is_absent_is_a_dash(tmp_path, change):
    results = small()
    for row in results["rows"]:
        if change in ("null", "nan"):
            value = None if change == "null" else math.nan
            parts = [row["scores"], *row["per_finding"].values()]
            for part in parts:
                part.update({key: {"value": value, "low": value, "high": value, "n": 0} for key in part})
            row["seconds_per_pair"] = value
            row["sanity_curve"]["correlation"] = [value] * 5
            for curve in row.get("curves", {}).values():
                curve["score"] = [value] * len(curve["share"])
        elif change == "no scores":
            row.update(scores={}, per_finding={}, curves={}, sanity_curve={})
        elif change == "no value":
            row["scores"] = {key: {} for key in row["scores"]}
        elif change == "null curves":
            row.update(curves=dict.fromkeys(row.get("curves", {})), sanity_curve={"stages": [], "correlation": []})
        else:
            row.update(scores=None, per_finding=None, curves=None, sanity_curve=None, settings=None, note=None)
    html, tables = write(tmp_path, results)
    shown = Page(html).words()
    assert not re.search(r"\b(nan|None|Undefined)\b", shown + tables)
    assert ("Nothing was localised" in shown) == (change != "null curves")


def test_results_of_almost_nothing(tmp_path):
    html, tables = write(tmp_path, {"format": 1, "rows": []})
    assert "Nothing was localised" in html
    assert "Nothing was localised" in tables
    assert not Page(html).all("table")


def test_without_boxes_the_rest_is_there(tmp_path):
    results = small()
    results["data"]["boxed"] = 0
    for row in results["rows"]:
        for key in ("pointing_game", "cnr", "miou", "energy_in_box"):
            if key in row["scores"]:
                row["scores"][key] = {"value": None, "low": None, "high": None, "n": 0}
    for comparison in results["comparisons"]:
        comparison.update(difference=None, low=None, high=None, n=0)
    html, tables = write(tmp_path, results)
    words = Page(html).words()
    assert "better than none" not in words
    assert "could not be compared" not in words
    assert "No pair has a box, so pointing is not measured." in words
    assert "Nothing was localised" in words
    assert "## Insertion and deletion, maps of the film" in tables
    # The order is then drawn by the first metric that there is.
    assert "Confidence drop (mean colour)" in Page(html).words("figcaption")


def test_one_method_alone_is_never_the_best(tmp_path):
    results = fake_results(("MATEX",), (), ("nodule",), refuses=False)
    results["rows"] = results["rows"][:1]
    html, tables = write(tmp_path, results)
    assert "1 attribution method and 0 controls" in Page(html).words()
    assert "<strong>0" not in html
    assert not re.search(r"\*\*\d", tables)
    assert "| MATEX | 0." in tables


def test_plots_are_in_order_from_the_best(tmp_path):
    results = with_values({"MATEX": 0.2, "M2IB": 0.7, CONTROLS[0]: 0.5}, "pointing_game")
    html, _ = write(tmp_path, results)
    svg = next(
        figure
        for figure in re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
        if ">Pointing game" in figure and "minus" not in figure
    )
    heights = {label: float(y) for y, label in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>([^<]*)</text>', svg)}
    assert heights["M2IB"] < heights[CONTROLS[0]] < heights["MATEX"]


def test_panels_stand_with_their_method(tmp_path):
    panels = fake_panels(tmp_path, ("MATEX", "M2IB"))
    html, _ = write(tmp_path, small(), panels)
    part = html[html.index('<section id="panels">') : html.index('<section id="reading">')]
    assert re.findall(r"<summary>(.*?) <small>", part) == ["MATEX", "M2IB"]
    assert re.findall(r'alt="(\w+) on (\w+),', part) == [
        (row, kind) for row in ("MATEX", "M2IB") for kind in ("best", "worst", "random")
    ]
    assert panels[0].source in part


def test_a_reader_never_sees_half_a_report(tmp_path, monkeypatch):
    write(tmp_path, small())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writing = Path.write_text

    def fail_at_the_second(path, text, **options):
        if "tables" in path.name:
            raise OSError("disk full")
        return writing(path, text, **options)

    monkeypatch.setattr(Path, "write_text", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        write_report(small(machine="another"), [], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_is_made(tmp_path):
    write(tmp_path / "a" / "b", small())
    assert (tmp_path / "a" / "b" / "report.html").is_file()


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"format 1, got 7.*run the benchmark again"):
        write_report(small(format=7), [], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_results_are_not_changed(tmp_path):
    results = small(machine=HOSTILE[3], forward_seconds_per_pair=math.inf)
    before = copy.deepcopy(results)
    write(tmp_path, results)
    assert results == before
