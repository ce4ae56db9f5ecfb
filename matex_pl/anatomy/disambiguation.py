"""What a term means where it stands: which "upper" is a zone, which "left" a side, which "no" a negation."""

from __future__ import annotations

from matex_pl.anatomy.lexicon import Grammar, Term

_BETWEEN = ("zone_adjective", "side", "and", "or", "to", "comma", "modifier", "determiner", "compare", "degree")
_ANATOMY = ("zone_adjective", "zone", "carrier", "finding", "modifier", "side", "compare")
_WHERE = ("side", "zone", "sided_zone", "zone_adjective", "determiner", "preposition", "modifier", "carrier")
_NOUNS = ("zone_adjective", "zone", "carrier", "finding")
# Nouns of a finding that goes away.
_ENDINGS = ("resolution of", "clearing of", "resolution", "clearing")
# What no sentence begins with.
_GOES_ON = ("and", "or", "to", "with", "verb", "preposition", "negate_either", "negate_back", "normal")
# How far ahead a word looks for the one that settles its meaning.
_AHEAD = 12


def settle(terms: list[Term], grammar: Grammar) -> list[Term]:
    """The same terms, those that depend on their neighbours decided; what means nothing becomes `void`."""
    terms = [_dot(terms, k, grammar) for k in range(len(terms))]
    terms = _without_contrasts([term for term in terms if term.kind != "skip"])
    terms = _without_asides(terms, grammar)
    terms = [_landmark(terms, k, grammar) for k in range(len(terms))]
    terms = [_side(terms, k, grammar) for k in range(len(terms))]
    terms = [_zone_adjective(terms, k, grammar) for k in range(len(terms))]
    return _cues(terms, grammar)


def _kind(terms: list[Term], k: int) -> str:
    return terms[k].kind if 0 <= k < len(terms) else "break"


def _text(terms: list[Term], k: int) -> str:
    return terms[k].text if 0 <= k < len(terms) else ""


def _void(term: Term) -> Term:
    return term._replace(kind="void", sides=(), zones=())


def _dot(terms: list[Term], k: int, grammar: Grammar) -> Term:
    """A full stop that only ends an abbreviation ("Rt. lower lobe", "R.L.L. opacity") goes."""
    if terms[k].text != "." or k == 0:
        return terms[k]
    before, after = terms[k - 1], _kind(terms, k + 1)
    dots_inside = before.kind == "sided_zone" and before.end - before.start == 2 * len(before.text) - 1
    goes_on = after in (*_ANATOMY, "comma") or (dots_inside and after in _GOES_ON)
    abbreviates = dots_inside or before.text in grammar.sets["dotted"]
    return terms[k]._replace(kind="skip") if goes_on and abbreviates else terms[k]


def _without_contrasts(terms: list[Term]) -> list[Term]:
    """Terms without a side that is only named to be denied: "left but not right base", "left rather than right"."""
    dropped: set[int] = set()
    for k in range(1, len(terms) - 2):
        if terms[k].kind != "contrast" and not (terms[k].kind in ("but", "and") and terms[k + 1].text == "not"):
            continue
        in_commas = _kind(terms, k - 1) == "comma"
        start = k - in_commas
        side = next((j for j in range(k + 1, min(k + 5, len(terms))) if terms[j].kind == "side"), k)
        between = {terms[j].kind for j in range(k + 1, side)}
        end = side + 1 + (in_commas and _kind(terms, side + 1) == "comma")
        of_sides = _kind(terms, start - 1) == "side" and between <= {"determiner", "preposition", "negate_forward"}
        if side > k and of_sides and _kind(terms, end) in _NOUNS:
            dropped.update(range(start, end))
    return [term for k, term in enumerate(terms) if k not in dropped] if dropped else terms


def _without_asides(terms: list[Term], grammar: Grammar) -> list[Term]:
    """Terms without "to a lesser extent" and "less so", nor the commas that set them off."""
    dropped: set[int] = set()
    for k, term in enumerate(terms):
        end = _end_of_aside(terms, k, grammar) if term.kind in ("to", "aside") else k
        if end == k:
            continue
        start = k - (_kind(terms, k - 1) == "comma")
        end += _kind(terms, end) == "comma"
        if _kind(terms, start - 1) in ("and", "or") and _kind(terms, start - 2) == "comma":
            # "left, and to a lesser extent right, basilar": one conjunction in commas.
            dropped.add(start - 2)
            closing = next((j for j in range(end, min(end + 4, len(terms))) if terms[j].kind not in _WHERE), end)
            dropped |= {closing} if _kind(terms, closing) == "comma" else set()
        dropped.update(range(start, end))
    return [term for k, term in enumerate(terms) if k not in dropped] if dropped else terms


def _end_of_aside(terms: list[Term], k: int, grammar: Grammar) -> int:
    """One past the aside that begins at `k`; `k` where none does."""
    if terms[k].kind == "aside":
        return k + 1
    for j in range(k + 1, min(k + 6, len(terms))):
        if terms[j].text in grammar.sets["measures"]:
            return j + 1
        if terms[j].kind not in ("determiner", "modifier", "degree", "word"):
            return k
    return k


def _landmark(terms: list[Term], k: int, grammar: Grammar) -> Term:
    """A midline place that something lies right or left of: "to the right of the heart" is on the right."""
    if terms[k].kind != "zone" or not {"cardiac", "mediastinal"}.intersection(terms[k].zones):
        return terms[k]
    of = k - 1 - (_kind(terms, k - 1) == "determiner")
    lies_beside = _text(terms, of) == "of" and _text(terms, of - 1) in ("right", "left")
    return _void(terms[k]) if lies_beside else terms[k]


def _side(terms: list[Term], k: int, grammar: Grammar) -> Term:
    """A side, or `void` where the word means something else."""
    if terms[k].kind != "side":
        return terms[k]
    return _void(terms[k]) if any(reads(terms, k, grammar) for reads in _NO_SIDES) else terms[k]


def _is_lone(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """A letter, "bi" or "both" that no place follows: "R/O", "L1", "both opacity and effusion"."""
    text = terms[k].text
    if text == "both":
        return not _has_pair(terms, k)
    if text == "bi":
        return _kind(terms, k + 1) not in ("zone", "zone_adjective", "carrier")
    if len(text) > 1:
        return False
    nearby = {_kind(terms, k + 1), _kind(terms, k - 1)}
    # "R/L lower lobe"
    nearby |= {_kind(terms, k + step * 2) for step in (-1, 1) if _kind(terms, k + step) in ("and", "or")}
    return not nearby & {*_ANATOMY, "device", "vessel"} or _text(terms, k + 1).isdigit()


def _is_adverb(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """An adverb or a verb of time: "right after the procedure", "left over the weekend"."""
    after, before = _text(terms, k + 1), _text(terms, k - 1)
    follows = after in grammar.sets["adverb_followers"] and before not in ("the", "on", "to")
    return follows and terms[k].text in ("right", "left")


def _is_verb(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """A participle: "the tube was left in the chest"."""
    leaves = terms[k].text == "left" and _text(terms, k - 1) in grammar.sets["leaves"]
    return leaves and _kind(terms, k + 1) not in (*_ANATOMY, "sided_zone", "and", "or", "comma")


def _names_a_shift(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """Where something goes, without "to": "right shift of the trachea", "rotated left"."""
    ends = _kind(terms, k + 1) in ("break", "but", "comma", "and", "with", "preposition")
    return _text(terms, k + 1) in grammar.sets["shift_nouns"] or (
        ends and _text(terms, k - 1) in grammar.sets["shifts"]
    )


def _is_direction(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """Whether it says where something moves: "deviated to the right", "rotated toward the left"."""
    at = k - 1 - (_text(terms, k - 1) == "the")
    if _text(terms, at) not in ("to", "toward", "towards", "toward the"):
        return False
    for j in range(at - 1, max(at - _AHEAD, -1), -1):
        if terms[j].kind in ("break", "but", "finding") and terms[j].text not in grammar.sets["shifts"]:
            return False
        if terms[j].text in grammar.sets["shifts"]:
            return True
    return False


_NO_SIDES = (_is_lone, _is_adverb, _is_verb, _names_a_shift, _is_direction)


def _has_pair(terms: list[Term], k: int) -> bool:
    """Whether "both" speaks of two places: "both lungs", not "both opacity and effusion", "both the right and ..."."""
    for j in range(k + 1, min(k + 6, len(terms))):
        if terms[j].kind in ("zone", "zone_adjective") and _kind(terms, j + 1) == "and":
            return terms[j].text.endswith(("s", "hila"))
        if terms[j].kind in ("carrier", "zone", "zone_adjective"):
            return True
        if terms[j].kind not in ("determiner", "preposition", "modifier"):
            return False
    return False


def _zone_adjective(terms: list[Term], k: int, grammar: Grammar) -> Term:
    """A zone before a noun of the lung ("upper and lower lobes") or beside a side, and `void` otherwise."""
    term = terms[k]
    if term.kind == "zone" and _is_segment(terms, k):
        return term._replace(kind="modifier", zones=())
    if term.kind != "zone_adjective":
        return term
    beside = any(_kind(terms, j) == "side" for j in (k - 1, k + 1)) or _beside_sided_zone(terms, k)
    head = _head(terms, k, grammar)
    if _is_within(terms, k):
        return term._replace(kind="modifier", zones=())
    if not _speaks_of_lungs(head, beside=beside):
        return _void(term)
    zone = term.zones[0]
    if zone == "middle":
        zone = "middle_lobe" if head is not None and "lob" in head.text else "mid"
    return term._replace(kind="zone", zones=(zone,))


def _speaks_of_lungs(head: Term | None, *, beside: bool) -> bool:
    """Whether an adjective with this noun, `beside` a side or not, is a zone of the lung."""
    if head is None:
        return beside
    if head.kind in ("elsewhere", "compare", "word", "device", "vessel", "void"):
        return False
    lobes = (" lobe", " lobes", " zone", " zones", " lung", " lungs")
    return beside or head.kind == "carrier" or head.text.endswith(lobes)


def _is_within(terms: list[Term], k: int) -> bool:
    """Whether it only says which part of another place: "right upper hilar mass", "lower mediastinum"."""
    j = next((j for j in range(k + 1, min(k + 4, len(terms))) if terms[j].kind not in ("side", "modifier")), k)
    return terms[j].kind == "zone" and not {"hilar", "mediastinal", "cardiac", "lingula"}.isdisjoint(terms[j].zones)


def _is_segment(terms: list[Term], k: int) -> bool:
    """Whether it names a segment of a lobe that is named too: "apical segment of the right lower lobe"."""
    if terms[k].zones not in (("upper",), ("lower",)) or _text(terms, k + 1) not in ("segment", "segments"):
        return False
    follows = (terms[j] for j in range(k + 3, min(k + 7, len(terms))) if terms[j].kind not in ("side", "determiner"))
    return _text(terms, k + 2) == "of" and next(follows, terms[k]).kind in ("zone", "sided_zone", "zone_adjective")


def _beside_sided_zone(terms: list[Term], k: int) -> bool:
    """A side stands before it over a list of zones: "right upper and mid"."""
    for j in range(k - 1, max(k - 6, -1), -1):
        if terms[j].kind == "side":
            return True
        if terms[j].kind not in ("zone_adjective", "zone", "and", "or", "to", "modifier", "comma"):
            return False
    return False


def _head(terms: list[Term], k: int, grammar: Grammar) -> Term | None:
    """The noun that an adjective leans on, over "and", "to" and other adjectives; None when the phrase ends before."""
    for j in range(k + 1, min(k + _AHEAD, len(terms))):
        if (
            terms[j].kind == "zone"
            and terms[j].zones[0] in ("upper", "mid", "lower", "middle_lobe")
            and " " in terms[j].text
        ):
            return terms[j]
        if terms[j].kind == "compare" and terms[j].text == "than":
            return terms[j]
        if terms[j].text == "of" and terms[j - 1].text in grammar.sets["parts"]:
            return _whole(terms, j)
        if terms[j].kind not in _BETWEEN:
            return None if terms[j].kind in ("break", "but", "verb", "preposition", "with", "colon") else terms[j]
    return None


def _whole(terms: list[Term], of: int) -> Term:
    """What a part is of: "lower half of the right lung" speaks of the lung."""
    for j in range(of + 1, min(of + 5, len(terms))):
        if terms[j].kind not in ("determiner", "side", "modifier"):
            return terms[j] if terms[j].kind == "carrier" else terms[of]
    return terms[of]


def _cues(terms: list[Term], grammar: Grammar) -> list[Term]:
    """Cues that deny nothing become `void`: "no significant change", "not clear", "nearly resolved"."""
    terms = list(terms)
    for k, term in enumerate(terms):
        if term.text in ("no", "not", "without", "without any") and term.kind == "negate_forward":
            for j in _undone(terms, k, grammar):
                terms[j] = _void(terms[j])
        elif term.kind in ("negate_either", "negate_back", "normal") or term.text.endswith(_ENDINGS):
            words = {_text(terms, j) for j in (k - 1, k - 2)}
            is_partial = term.text != "no longer" and words & grammar.sets["partial"] and "not" not in words
            earlier = {_text(terms, j) for j in range(k - 4, k)}
            if is_partial or (term.kind == "negate_back" and earlier & grammar.sets["unable"]):
                terms[k] = _void(term)
    return terms


def _undone(terms: list[Term], k: int, grammar: Grammar) -> list[int]:
    """Indices of a negation and of what it undoes, when together they deny nothing."""
    named = ("side", "zone", "sided_zone", "break", "comma", "but", "and", "or")
    for j in range(k + 1, min(k + 5, len(terms))):
        text, kind = terms[j].text, terms[j].kind
        if terms[k].text != "not" and (text in grammar.sets["change_nouns"] or text.endswith(_ENDINGS)):
            return [k, j]
        if terms[k].text == "not" and text in grammar.sets["change_adjectives"]:
            return [k, j]
        if terms[k].text == "not" and text in grammar.sets["earlier"]:
            return [k]
        if terms[k].text == "not" and kind in ("normal", "negate_either", "negate_back"):
            return [k, j]
        if kind in named or (kind == "finding" and text not in ("change", "changes")):
            return []
    return []
