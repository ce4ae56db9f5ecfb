import base64
import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from markdown_it import MarkdownIt

from matex_pl.report.benchmark import benchmark_tables, write_report
from matex_pl.report.gallery import Panel, encode
from matex_pl.report.results import BenchmarkResult, Comparison, parse, read
from matex_pl.report.tables import MISSING
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
FILLS = {"mean_color": "mean color", "mean_image": "mean image"}
UP, DOWN = "\N{NO-BREAK SPACE}↑", "\N{NO-BREAK SPACE}↓"


def metric(label, group, higher, fill=None, percent=False):
    return {
        "label": label,
        "group": group,
        "fill": FILLS.get(fill, fill),
        "higher_is_better": higher,
        "percent": percent,
        "description": f"{label} in one sentence.",
    }


METRICS = {
    "pointing_game": metric("Pointing game", "localization", True),
    "cnr": metric("Contrast to noise", "localization", True),
    "miou": metric("Mean IoU", "localization", True),
    "energy_pointing_game": metric("Energy in the boxes", "localization", True),
    **{f"confidence_drop/{f}": metric("Confidence drop", "paper", False, f, True) for f in FILLS},
    **{f"confidence_increase/{f}": metric("Confidence increase", "paper", True, f, True) for f in FILLS},
    **{f"top20_removal/{f}": metric("Drop when removed", "confidence", True, f, True) for f in FILLS},
    "confidence_drop": metric("Confidence drop", "paper", False, None, True),
    "confidence_increase": metric("Confidence increase", "paper", True, None, True),
    "insertion/blur": metric("Insertion", "curves", True, "blur"),
    "insertion/mean_image": metric("Insertion", "curves", True, "mean_image"),
    "deletion/mean_color": metric("Deletion", "curves", False, "mean_color"),
    "deletion/mean_image": metric("Deletion", "curves", False, "mean_image"),
    "prompt_sensitivity": metric("Prompt sensitivity", "sensitivity", False),
    "outside_thorax_mass": metric("Mass outside the thorax", "mass", None),
    "mean_map_mass": metric("Mean map mass", "mass", None),
    "sanity": metric("Sanity", "sanity", False),
}
FINDINGS = ("nodule", "effusion", "pneumothorax", "cardiomegaly", "consolidation")
METHODS = ("MATEX", "MATEX, as printed", "M2IB", "Grad-ECLIP", "Chefer et al.", "RISE", "Saliency", "Attention rollout")
CONTROLS = ("Prior of the phrase", "Center of the image", "Noise")


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
        for key in ("pointing_game", "confidence_drop/mean_image")
        for against, difference in zip(rivals, differences, strict=False)
        if against != name
    ]
    return {
        "format": 2,
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
    }


def fake_panels(folder, rows=METHODS):
    rng = np.random.default_rng(1)
    picture = encode(rng.integers(0, 255, (60, 110, 3), dtype=np.uint8))
    return [
        Panel(name, kind, f"pair-{kind}", f"{name} on {kind}, cosine 0.31", picture)
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
    results["data"]["split"] = attack
    for row in results["rows"]:
        row |= {"note": attack, "class": attack, "settings": {attack: attack}}
        row["error"] = row["error"] and attack
    for entry in results["metrics"].values():
        entry |= {"description": attack, "label": f"{entry['label']} {HOSTILE[0]} {HOSTILE[2]}"}
    return results


def with_values(values, key, spread=0.1):
    """The small results with these values of one metric for the maps of the image, and intervals to each side."""
    results = small()
    for row in results["rows"]:
        if row["modality"] == "image":
            value = values[row["name"]]
            ends = (None, None) if value is None else (value - spread, value + spread)
            row["scores"][key] = {"value": value, "low": ends[0], "high": ends[1], "n": 100}
        else:
            row["scores"].pop(key, None)
    return results


SVG = "data:image/svg+xml;base64,"


def texts_of(svg):
    """The texts of a plot with their heights, from the top."""
    found = [(float(y), text) for y, text in re.findall(r"<text[^>]*translate\([\d.]+ ([\d.]+)\)[^>]*>([^<]*)<", svg)]
    found += [(float(y), text) for y, text in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>([^<]*)<', svg)]
    return {text: height for height, text in sorted(found)}


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

    def plots(self):
        """The SVG pictures by alternative text."""
        images = [image for image in self.all("img") if image["src"].startswith(SVG)]
        return {image["alt"]: base64.b64decode(image["src"].removeprefix(SVG)).decode() for image in images}


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


def table_of(text, title):
    """The table beneath a heading: its cells by name of the line, the heads under ''."""
    part = text[text.index(f"## {title}") :]
    rows = [[plain(cell) for cell in row] for row in tables_of(part)[0]]
    return {"": rows[0][1:]} | {row[0]: row[1:] for row in rows[1:]}


def bold(text, title):
    """Names of the lines whose first cell is marked."""
    part = text[text.index(f"## {title}") :].partition("\n\n\n")[0].partition("\n## ")[0]
    return re.findall(r"^\| ([^|]*) \| \*\*", part, re.MULTILINE)


def tables(results):
    return benchmark_tables(parse(BenchmarkResult, results))


def write(folder, results, panels=()):
    write_report(parse(BenchmarkResult, results), panels, folder)
    return tuple((folder / name).read_text(encoding="utf-8") for name in ("report.html", "tables.md"))


LOCALIZATION = "Localization, maps of the image"
TABLE_1 = "Table 1: maps of the image"
MASS = "Location of the mass, maps of the image"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    html, text = write(folder, fake_results(), fake_panels(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "tables.md"]
    return html, text


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    panels = [Panel(p.row, text, text, text, p.jpeg) for text in HOSTILE for p in fake_panels(folder, HOSTILE[:2])]
    return write(folder, hostile(), [*panels, *fake_panels(folder, HOSTILE[:1])])


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
    plots = Page(attacked[0]).plots()
    assert len(plots) > 20
    drawn = "".join(plots.values())
    pictures = [Page(svg.partition("<svg")[1] + svg.partition("<svg")[2]) for svg in plots.values()]
    assert not {"script", "img", "foreignobject", "a"} & {tag for page in pictures for tag, _ in page.elements}
    assert all(link.startswith("#") for link in re.findall(r'(?:href="|url\()([^")]*)', drawn))
    labels = " ".join(page.words("text") for page in pictures)
    for text in HOSTILE:
        name = single_line(text)
        assert (name if len(name) <= 24 else name[:23].rstrip() + "…") in labels


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
        assert all(value.startswith(("data:image/jpeg;base64,", SVG)) for value in links)
        assert not page.all("link")
        assert "url(" not in html
        assert "@import" not in html
        policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
        assert policy.startswith("default-src 'none'")


def test_the_page_opens_with_a_chart_a_table_and_three_images(report):
    html = report[0]
    opening = Page(html[: html.index("<details")])
    assert list(opening.plots()) == [f"Pointing game{UP}"]
    assert len(opening.all("table")) == 1
    kinds = [image["alt"] for image in opening.all("img") if image["src"].startswith("data:image/jpeg")]
    assert kinds == [f"MATEX on {kind}, cosine 0.31" for kind in ("best", "random", "worst")]
    # Whatever else there is can be opened beneath.
    assert "<section" not in html[html.index("<details") :]


def test_heads_say_what_they_head(report):
    page = Page(report[0])
    assert {attrs.get("scope") for attrs in page.all("th")} == {"col", "colgroup", "row", "rowgroup"}
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(image["alt"] for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) > 8


def test_matplotlib_is_left_as_it_was_and_the_same_results_give_the_same_page(tmp_path):
    before = dict(matplotlib.rcParams)
    assert write(tmp_path / "a" / "new", small()) == write(tmp_path / "b", small())
    assert dict(matplotlib.rcParams) == before


def test_best_is_in_the_direction_of_the_metric():
    results = with_values({"MATEX": 0.2, "M2IB": 0.7, CONTROLS[0]: 0.9}, "pointing_game")
    assert bold(tables(results), LOCALIZATION) == ["M2IB"]
    results = with_values({"MATEX": 20.0, "M2IB": 70.0, CONTROLS[0]: 1.0}, "confidence_drop/mean_color")
    assert bold(tables(results), TABLE_1) == ["MATEX"]
    results = with_values({"MATEX": 0.2, "M2IB": 0.7, CONTROLS[0]: 0.9}, "outside_thorax_mass")
    assert bold(tables(results), MASS) == []


def test_ties_as_printed_share_the_mark():
    results = with_values({"MATEX": 0.701, "M2IB": 0.703, CONTROLS[0]: 0.1}, "pointing_game")
    assert bold(tables(results), LOCALIZATION) == ["MATEX", "M2IB"]


@pytest.mark.parametrize("value", [None, math.nan])
def test_no_value_is_never_the_best(value):
    text = tables(with_values({"MATEX": value, "M2IB": 0.1, CONTROLS[0]: 0.9}, "pointing_game"))
    found = table_of(text, LOCALIZATION)
    assert (found["MATEX"][0], found["M2IB"][0]) == (MISSING, "0.10 (0.00 to 0.20)")
    assert bold(text, LOCALIZATION) == []


def test_one_method_alone_is_never_the_best():
    results = fake_results(("MATEX",), (), ("nodule",), refuses=False)
    results["rows"] = results["rows"][:1]
    text = tables(results)
    assert not re.search(r"\*\*[+-]?\d", text)
    assert "| MATEX | 0." in text


def test_bold_on_the_page_and_in_markdown(tmp_path):
    results = with_values({"MATEX": 0.2, "M2IB": 0.7, CONTROLS[0]: 0.9}, "pointing_game")
    html, text = write(tmp_path, results)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td([^>]*)>(.*?)<small>(.*?)</small>', html)
    assert ("M2IB", ' class="best"', "<strong>0.70</strong>", "0.60 to 0.80") in rows
    assert ("MATEX", "", "0.20", "0.10 to 0.30") in rows
    assert (CONTROLS[0], "", "0.90", "0.80 to 1.00") in rows
    assert "| M2IB | **0.70** (0.60 to 0.80) |" in text
    assert f"| Control: {CONTROLS[0]} | 0.90 (0.80 to 1.00) |" in text
    # The chart has the best on top and the controls apart beneath, though this one is better.
    (chart,) = (svg for caption, svg in Page(html).plots().items() if caption == f"Pointing game{UP}")
    heights = texts_of(chart)
    assert heights["M2IB"] < heights["MATEX"] < heights[CONTROLS[0]]


def test_interval_and_count_stand_with_the_value():
    results = small()
    row = results["rows"][0]
    row["scores"]["pointing_game"] = {"value": 0.84, "low": 0.77, "high": 0.9, "n": 88}
    row["scores"]["confidence_drop/mean_image"] = {"value": 1.5, "low": None, "high": None, "n": 100}
    text = tables(results)
    found = table_of(text, LOCALIZATION)
    assert (found[""][0], found["MATEX"][0]) == (f"Pointing game{UP} (n = 88 to 100)", "0.84 (0.77 to 0.90)")
    drop = table_of(text, TABLE_1)
    assert drop["MATEX"][drop[""].index(f"Confidence drop{DOWN} (mean image, n = 100)")] == "1.50"


def test_small_shares_get_a_third_decimal_and_zero_no_sign():
    results = with_values({"MATEX": 0.0123, "M2IB": -0.0001, CONTROLS[0]: 0.02}, "outside_thorax_mass", 0.01)
    found = table_of(tables(results), MASS)
    assert [found[name][0].partition(" ")[0] for name in ("MATEX", "M2IB")] == ["0.012", "0.000"]


def test_published_figures_stand_in_their_own_columns():
    found = table_of(tables(fake_results()), TABLE_1)
    assert [head.startswith("Published: ") for head in found[""]] == [False] * 4 + [True] * 3
    assert found["MATEX, as printed"][4:] == ["0.51 ± 0.03", "47.55 ± 1.10", "37.90 ± 0.79"]
    assert found["KernelShap (published only)"][:5] == [MISSING] * 4 + ["2.37 ± 0.04"]
    controls = [cells for name, cells in found.items() if name.startswith("Control: ")]
    assert len(controls) == len(CONTROLS)
    assert {cell for cells in controls for cell in cells[4:]} == {MISSING}


def test_a_method_that_refuses_is_named_with_its_reason(report):
    refused = METHODS[-1]
    assert refused not in table_of(report[1], LOCALIZATION)
    assert refused not in table_of(report[1], "Cost")
    assert f"{refused} (image): No attention weights in this tower." in Page(report[0]).words()
    assert f"- Left out: {refused} (image): No attention weights in this tower." in report[1]


def test_cost_in_seconds_and_forwards():
    assert table_of(tables(small(forward_seconds_per_pair=0.004)), "Cost")["MATEX"] == ["0.02", "5"]
    assert table_of(tables(small(forward_seconds_per_pair=None)), "Cost")["MATEX"] == ["0.02", MISSING]


def test_findings_have_a_column_each(report):
    value = fake_results()["rows"][1]["per_finding"]["effusion"]["pointing_game"]["value"]
    part = report[0].partition("All metrics per finding")[2]
    heads = re.findall(r'<th scope="col">(\w+)<', part)
    assert heads[: len(FINDINGS) + 1] == ["Method", *FINDINGS]
    line = re.search(rf'<tr><th scope="row">{METHODS[1]}</th>(.*?)</tr>', part)[1]
    assert f"{value:.2f}" in re.findall(r"<td[^>]*>(?:<strong>)?([\d.]+)", line)[1]


@pytest.mark.parametrize(
    ("low", "difference", "high", "higher", "is_better"),
    [
        (0.1, 0.2, 0.3, True, True),
        (0.1, 0.2, 0.3, False, False),
        (0.1, 0.2, 0.3, None, False),
        (-0.3, -0.2, -0.1, True, False),
        (-0.3, -0.2, -0.1, False, True),
        (-0.1, 0.2, 0.3, True, False),
        (0.0, 0.2, 0.3, True, False),
        (None, 0.2, None, True, False),
        (None, None, None, True, False),
    ],
)
def test_better_is_what_is_surely_better(low, difference, high, higher, is_better):
    comparison = Comparison(row="a", against="b", metric="cnr", difference=difference, low=low, high=high)
    assert comparison.is_better(higher) == is_better


def test_comparisons_are_drawn_for_matex_and_listed_for_all(report):
    captions = [caption for caption in Page(report[0]).plots() if "minus" in caption]
    assert captions == [
        "Pointing game: MATEX minus each control; right of the line is better",
        "Confidence drop (mean image): MATEX minus each control; left of the line is better",
    ]
    title = f"Each method minus each control: Pointing game{UP}"
    found = table_of(report[1], title)
    assert list(found)[1:] == list(METHODS[:3])
    assert found[""] == [f"minus {name} (n = 100)" for name in (METHODS[1], *CONTROLS)]
    assert found["MATEX"] == ["+0.10 (0.02 to 0.18)", "+0.03 (-0.05 to 0.11)", "-0.20 (-0.30 to -0.10)", MISSING]
    assert found[METHODS[1]][0] == MISSING
    # Where less is better, more is worse.
    assert bold(report[1], title) == ["MATEX"]
    assert bold(report[1], f"Each method minus each control: Confidence drop (mean image){DOWN}") == []


def test_the_prior_is_warned_of_where_it_is_used():
    results = small()
    assert "Read with care: MATEX; Prior of the phrase. These rows use a prior" in tables(results)
    results["rows"][0]["settings"] = {"delta": 0}
    assert "Read with care: Prior of the phrase. These" in tables(results)
    results["rows"] = [row for row in results["rows"] if not row["control"]]
    assert "prior" not in tables(results)


@pytest.mark.parametrize("change", ["null", "nan", "no scores", "no value", "null scores"])
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
        else:
            row.update(scores=None, per_finding=None, curves=None, sanity_curve=None, settings=None, note=None)
    html, text = write(tmp_path, results)
    assert not re.search(r"\b(nan|None|Undefined)\b", Page(html).words() + text)
    assert "Localization was not measured" in Page(html).words()


def test_results_of_almost_nothing(tmp_path):
    html, text = write(tmp_path, {"format": 2, "rows": []})
    assert "Localization was not measured" in html
    assert "Localization was not measured" in text
    assert not Page(html).all("table")


def test_without_boxes_the_rest_is_there(tmp_path):
    results = small()
    results["data"]["boxed"] = 0
    for row in results["rows"]:
        for key in ("pointing_game", "cnr", "miou", "energy_pointing_game"):
            if key in row["scores"]:
                row["scores"][key] = {"value": None, "low": None, "high": None, "n": 0}
    for comparison in results["comparisons"]:
        comparison.update(difference=None, low=None, high=None, n=0)
    html, text = write(tmp_path, results)
    words = Page(html).words()
    assert "No pair has a box, so pointing is not measured." in words
    assert "Localization was not measured" in words
    assert "minus" not in words
    assert "## Insertion and deletion, maps of the image" in text
    # The order is then drawn by the first metric that there is.
    assert next(iter(Page(html).plots())) == f"Confidence drop (mean color){DOWN}"


def test_panels_stand_with_their_method(tmp_path):
    panels = fake_panels(tmp_path, ("MATEX", "M2IB"))
    html, _ = write(tmp_path, small(), panels)
    part = html[html.index('<details id="panels">') : html.index('<details id="reading">')]
    assert re.findall(r"<summary>(\w+) <small>", part) == ["MATEX", "M2IB"]
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
        write(tmp_path, small(machine="another"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 7}, r"format is 7 .*Run `matex benchmark` again"),
        ({"rows": [{"name": "MATEX"}]}, r"rows\.0\.modality is missing"),
        ({"metrics": {"cnr": {"percent": "often"}}}, r"metrics\.cnr\.percent is 'often'"),
    ],
)
def test_results_that_cannot_be_read_name_the_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"results.json is not .*{message}"):
        parse(BenchmarkResult, small(**change))
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        read(BenchmarkResult, tmp_path / "results.json")


def test_results_are_not_changed():
    results = small(machine=HOSTILE[3], forward_seconds_per_pair=math.inf)
    before = copy.deepcopy(results)
    tables(results)
    assert results == before
