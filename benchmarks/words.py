"""The strongest word of each text map: the finding, its place, or another word, on phantom images.

    python benchmarks/words.py --out docs/results/tables/words.md

Takes a model per seed of `benchmarks/choices.py`, which trains missing ones. Fuses the text components of validation
pairs again for every setting of MATEX that changes the text map alone. Settings count whose strongest word is more
often the finding or its place than before, beyond the interval. It chooses the one with the largest drop of the cosine
without that word. That setting, the presets, the other methods and the controls are scored on test pairs, with 95 %
intervals over patients. Of each method the text side alone runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from choices import pairs_with_boxes, train
from jsonargparse import auto_cli
from torch import Tensor

from matex_pl.anatomy import parse_phrase
from matex_pl.anatomy.disambiguation import settle
from matex_pl.anatomy.lexicon import read_terms, shipped_grammar
from matex_pl.anatomy.negation import denied, segments, sentences
from matex_pl.attribution import Matex, RandomMap, WordRegions
from matex_pl.attribution.core.capture import borrowed, count_blocks
from matex_pl.attribution.core.target import directions, reference_mean
from matex_pl.attribution.core.two_tower import TextTower, TwoTowerMethod
from matex_pl.attribution.shipped import shipped_methods
from matex_pl.clip.words import TokenizedPhrase, split_words, tokenized
from matex_pl.console import progress, show_messages
from matex_pl.data import ImageTextBatch
from matex_pl.evaluation.intervals import Sums, draw_patients, estimate
from matex_pl.maps import full_precision, token_map
from matex_pl.metrics.removal import text_scores
from matex_pl.report.results import Score
from matex_pl.training import ClipModule, load_module

COLUMNS = {
    "finding": "the finding",
    "place": "its place",
    "named": "finding or place",
    "sign": "strongest token is a sign",
    "drop": "drop without the word",
}
LAYERS, BETAS = (1, 2), (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
BEFORE = "text_grad_layers=2, text_beta=0.2"
ALIKE = "every token alike"
# Values per pair `(n,)` of each row and column.
Table = dict[str, dict[str, Tensor]]
Maps = Callable[[ClipModule, ImageTextBatch], Iterator[tuple[str, Tensor]]]


def main(
    runs: str = "runs/choices",
    data: str = "data/phantom",
    out: str = "docs/results/tables/words.md",
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num_pairs: int = 90,
    batch_size: int = 45,
) -> None:
    """Write the tables.

    Args:
        runs: Folder with a run per seed; missing runs are trained.
        data: Folder of the phantom images; missing images are drawn.
        out: Path of the Markdown file.
        seeds: Training seeds.
        num_pairs: Number of pairs with boxes per split, evenly spaced over it.
        batch_size: Number of pairs explained at once.
    """
    paths = [train(Path(runs) / f"seed{seed}", seed, Path(data)) for seed in seeds]
    lines = [
        "# The strongest word",
        "",
        f"Written by `python benchmarks/words.py`. {len(seeds)} models of `configs/phantom.yaml`, training seeds "
        f"{', '.join(map(str, seeds))}, {num_pairs} pairs with boxes per split, evenly spaced over it.",
        "Shares of pairs in percent, means over the models, with 95 % intervals over patients. The drop is in "
        "percentage points of the cosine.",
    ]
    val = score(paths, data, "val", num_pairs, batch_size, fused)
    best = val.best()
    lines += ["", "## Validation pairs", "", f"The chosen setting: `{best}`.", "", *val.report([*val.table], BEFORE)]
    setting = settings_of()[best]
    test = score(paths, data, "test", num_pairs, batch_size, lambda *pair: compared(*pair, best, setting))
    rows = sorted(test.table, key=lambda name: -float(test.table[name]["named"].mean()))
    lines += ["", "## Test pairs", "", "No setting was selected on these pairs.", "", *test.report(rows, BEFORE)]
    Path(out).write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(out)


class PairScores:
    """Mean over the models of each pair's values, by row and column, and draws of the patients."""

    def __init__(self, tables: Sequence[Table], patients: Sequence[str]) -> None:
        self.drawn = draw_patients(patients, 2000, 0)
        self.table: Table = {
            name: {column: torch.stack([table[name][column] for table in tables]).mean(0) for column in values}
            for name, values in tables[0].items()
        }


class Scored(PairScores):
    """Scores of text maps."""

    def best(self) -> str:
        """Setting with the largest drop among those with more findings and places; the setting before if none has."""
        before = Sums.of(self.table[BEFORE]["named"])
        gains = {name: estimate(Sums.of(row["named"]), self.drawn, before).low for name, row in self.table.items()}
        better = [name for name, low in gains.items() if (low or 0) > 0]
        return max(better or [BEFORE], key=lambda name: float(self.table[name]["drop"].mean()))

    def report(self, rows: Sequence[str], base: str) -> list[str]:
        """Lines of a Markdown table, with the differences from a base row."""
        head = ["text map", *COLUMNS.values(), "finding or place, to before", "drop, to before"]
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for name in rows:
            sums = {column: Sums.of(values) for column, values in self.table[name].items()}
            cells = [shown(estimate(sums[column], self.drawn), column) for column in COLUMNS]
            for column in ("named", "drop"):
                before = Sums.of(self.table[base][column])
                gain = estimate(sums[column], self.drawn, before)
                cells.append("-" if name == base else shown(gain, column, signed=True))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines


def shown(found: Score, column: str, *, signed: bool = False) -> str:
    """Value with its interval, shares in percent."""
    factor, digits = (1, 2) if column == "drop" else (100, 1)
    value, low, high = (factor * float(end or 0) for end in (found.value, found.low, found.high))
    plus = "+" if signed else ""
    return f"{value:{plus}.{digits}f} ({low:{plus}.{digits}f} to {high:{plus}.{digits}f})"


def score(paths: Sequence[Path], root: str, split: str, num_pairs: int, batch_size: int, maps: Maps) -> Scored:
    """Values of the pairs of a split under every model."""
    tables = []
    for path in paths:
        module = load_module(str(path))
        rows: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        patients: list[str] = []
        batches = list(pairs_with_boxes(module, root, split, num_pairs, batch_size))
        for batch in progress(batches, f"{path.parts[-5]}, {split}"):
            names, texts = zip(*maps(module, batch), strict=True)
            for name, values in zip(names, values_of(module, batch, texts), strict=True):
                for column, part in values.items():
                    rows[name][column].append(part)
            patients += batch["patient_id"]
        tables.append({name: {column: torch.cat(parts) for column, parts in row.items()} for name, row in rows.items()})
    return Scored(tables, patients)


def settings_of() -> dict[str, dict[str, Any]]:
    """Every setting of the search, by name."""
    return {
        f"text_grad_layers={layers}, text_beta={beta}": {"text_grad_layers": layers, "text_beta": beta}
        for layers, beta in product(LAYERS, BETAS)
    }


def fused(module: ClipModule, batch: ImageTextBatch) -> Iterator[tuple[str, Tensor]]:
    """Text maps of every setting."""
    images, tokens = module.inputs(batch)
    method = Matex.recommended(text_grad_layers=max(LAYERS))
    parts = method.attribute(module.clip, images, tokens, batch["phrase"], batch["content_box"]).parts
    for name, setting in settings_of().items():
        # The image maps are fused too, and small ones suffice.
        yield name, Matex.fuse(parts | {"size": module.clip.grid}, **setting).text


def compared(
    module: ClipModule, batch: ImageTextBatch, best: str, setting: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Text maps of the presets, the chosen setting, the other methods and the controls."""
    images, tokens = module.inputs(batch)
    given = (module.clip, images, tokens, batch["phrase"], batch["content_box"])
    presets = {"`Matex.paper()`": Matex.paper(), BEFORE: Matex.recommended(**settings_of()[BEFORE])}
    presets |= {f"chosen: {best}": Matex.recommended(**setting), "RandomMap": RandomMap()}
    for name, method in presets.items():
        yield name, method.attribute(*given).text
    for name, method in shipped_methods().items():
        if isinstance(method, WordRegions):
            # Its text map is a sum over patches, not a relevance towards the image.
            yield name, method.attribute(*given).text
        elif isinstance(method, TwoTowerMethod) and method.supports_text and not isinstance(method, Matex):
            yield name, text_map(method, module, batch)
    yield ALIKE, module.clip.content(tokens).float()


def text_map(method: TwoTowerMethod, module: ClipModule, batch: ImageTextBatch) -> Tensor:
    """Text maps `(B, T)` of a method, as those of `attribute`, without its work on the images."""
    clip, (images, tokens) = module.clip, module.inputs(batch)
    with borrowed(clip):
        tower = TextTower(clip, tokens, lambda: count_blocks(clip, images[:1], tokens[:1])[1])
        text, relevance_for = method.trace(tower)
        image = full_precision(clip.encode_image(images))
        reference = reference_mean(clip, method.references) if method.target == "margin" else None
        by_text = directions(image, full_precision(text.detach()), reference)[2]
        return token_map(relevance_for(by_text).values, tower.keep)


def values_of(module: ClipModule, batch: ImageTextBatch, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Values of each pair `(B,)` by column, for each of the text maps `(B, T)`."""
    images, tokens = module.inputs(batch)
    content = module.clip.content(tokens)
    phrases = tokenized(module.clip.tokenizer, tokens, content, batch["phrase"])
    found, drops = [], []
    for text in texts:
        strongest = [_strongest(phrase, row) for phrase, row in zip(phrases, text.tolist(), strict=True)]
        kinds = [
            _kinds(phrase.phrase)[word] if word >= 0 else "" for phrase, word in zip(phrases, strongest, strict=True)
        ]
        # Only words can be the strongest word, but today's token maps also rank signs.
        top = text.masked_fill(~content, -1).argmax(1).tolist()
        signs = [phrase.token_words[place] < 0 for phrase, place in zip(phrases, top, strict=True)]
        values = {kind: torch.tensor([kind == one for one in kinds]).float() for kind in ("finding", "place")}
        found.append(values | {"named": values["finding"] + values["place"], "sign": torch.tensor(signs).float()})
        owned = [
            torch.tensor(phrase.token_words) == max(word, 0) for phrase, word in zip(phrases, strongest, strict=True)
        ]
        drops.append(torch.stack(owned))
    with torch.no_grad():
        image = module.clip.encode_image(images)
    whole, *left = text_scores(module.clip, tokens, torch.stack([torch.zeros_like(content), *drops]), image)
    return [values | {"drop": 100 * (whole - rest)} for values, rest in zip(found, left, strict=True)]


def _strongest(phrase: TokenizedPhrase, relevance: Sequence[float]) -> int:
    """Index of the word with the largest share, -1 if no word has one."""
    shares = [word.share for word in phrase.words(relevance)]
    return shares.index(max(shares)) if any(shares) else -1


@cache
def _kinds(phrase: str) -> list[str]:
    """Kind of each word by the parser: `finding`, `place`, or empty for other words and denied findings."""
    grammar = shipped_grammar()
    terms = settle(read_terms(phrase, grammar), grammar)
    named = []
    for start, end in sentences(terms):
        absent = denied(terms, segments(terms, start, end, grammar), grammar)
        present = (terms[k] for k in range(start, end) if terms[k].kind == "finding" and k not in absent)
        named += [(term.start, term.end, "finding") for term in present]
    named += [(start, end, "place") for start, end in parse_phrase(phrase).spans]
    return [
        next((kind for start, end, kind in named if start < word.end and word.start < end), "")
        for word in split_words(phrase)
    ]


if __name__ == "__main__":
    show_messages()
    auto_cli(main, as_positional=False)
