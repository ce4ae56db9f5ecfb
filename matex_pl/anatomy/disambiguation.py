"""Meaning of terms in context: which "upper" is a zone, which "left" a side, which "no" a negation."""

from __future__ import annotations

from matex_pl.anatomy.lexicon import Grammar, Term

_BETWEEN = ("zone_adjective", "side", "and", "or", "to", "comma", "modifier", "determiner", "compare", "degree")
_ANATOMY = ("zone_adjective", "zone", "carrier", "finding", "modifier", "side", "compare")
_WHERE = ("side", "zone", "sided_zone", "zone_adjective", "determiner", "preposition", "modifier", "carrier")
_NOUNS = ("zone_adjective", "zone", "carrier", "finding")
# Nouns of a finding that goes away.
_ENDINGS = ("resolution of", "clearing of", "resolution", "clearing")
# Kinds that no sentence begins with.
_GOES_ON = ("and", "or", "to", "with", "verb", "preposition", "negate_either", "negate_back", "normal")
# Number of terms searched ahead for the one that decides a meaning.
_AHEAD = 12


def settle(terms: list[Term], grammar: Grammar) -> list[Term]:
    """The terms, with a kind that depends on neighbors decided; terms without a meaning become `void`."""
    terms = [_dot(terms, k, grammar) for k in range(len(terms))]
    terms = _without_contrasts([term for term in terms if term.kind != "skip"])
    terms = _without_asides(terms, grammar)
    terms = [_void(term) if _is_landmark(terms, k) else term for k, term in enumerate(terms)]
    terms = [_void(term) if _is_no_side(terms, k, grammar) else term for k, term in enumerate(terms)]
    terms = [_zone_adjective(terms, k, grammar) for k in range(len(terms))]
    return _cues(terms, grammar)


def _kind(terms: list[Term], k: int) -> str:
    return terms[k].kind if 0 <= k < len(terms) else "break"


def _text(terms: list[Term], k: int) -> str:
    return terms[k].text if 0 <= k < len(terms) else ""


def _void(term: Term) -> Term:
    return term._replace(kind="void", sides=(), zones=())


def _dot(terms: list[Term], k: int, grammar: Grammar) -> Term:
    """The term at `k`; a full stop that only ends an abbreviation ("Rt. lower lobe", "R.L.L. opacity") is skipped."""
    if terms[k].text != "." or k == 0:
        return terms[k]
    before, after = terms[k - 1], _kind(terms, k + 1)
    dots_inside = before.kind == "sided_zone" and before.end - before.start == 2 * len(before.text) - 1
    goes_on = after in (*_ANATOMY, "comma") or (dots_inside and after in _GOES_ON)
    abbreviates = dots_inside or before.text in grammar.sets["dotted"]
    return terms[k]._replace(kind="skip") if goes_on and abbreviates else terms[k]


def _without_contrasts(terms: list[Term]) -> list[Term]:
    """Terms without sides that are named only for denial: "left but not right base", "left rather than right"."""
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
    """Terms without asides such as "to a lesser extent" and "less so", and without the commas around them."""
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
    """Index after the aside that begins at `k`; `k` if there is none."""
    if terms[k].kind == "aside":
        return k + 1
    for j, term in enumerate(terms[k + 1 : k + 6], k + 1):
        if term.text in grammar.sets["measures"]:
            return j + 1
        if term.kind not in ("determiner", "modifier", "degree", "word"):
            break
    return k


def _is_landmark(terms: list[Term], k: int) -> bool:
    """Whether the term is only a landmark in the midline: "to the right of the heart" is on the right."""
    is_midline = terms[k].kind == "zone" and {"cardiac", "mediastinal"}.intersection(terms[k].zones)
    of = k - 1 - (_kind(terms, k - 1) == "determiner")
    return bool(is_midline) and _text(terms, of) == "of" and _text(terms, of - 1) in ("right", "left")


def _is_no_side(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """Whether a word for a side means something else."""
    tests = (_is_lone, _is_adverb, _is_verb, _names_a_shift, _is_direction)
    return terms[k].kind == "side" and any(test(terms, k, grammar) for test in tests)


def _is_lone(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """Whether a letter, "bi" or "both" has no place next to it: "R/O", "L1", "both opacity and effusion"."""
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
    """Whether the side is an adverb or a verb of time: "right after the procedure", "left over the weekend"."""
    after, before = _text(terms, k + 1), _text(terms, k - 1)
    follows = after in grammar.sets["adverb_followers"] and before not in ("the", "on", "to")
    return follows and terms[k].text in ("right", "left")


def _is_verb(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """Whether the side is a participle: "the tube was left in the chest"."""
    leaves = terms[k].text == "left" and _text(terms, k - 1) in grammar.sets["leaves"]
    return leaves and _kind(terms, k + 1) not in (*_ANATOMY, "sided_zone", "and", "or", "comma")


def _names_a_shift(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """Whether the side is the direction of a shift, without "to": "right shift of the trachea", "rotated left"."""
    if _text(terms, k + 1) in grammar.sets["shift_nouns"]:
        return True
    ends = _kind(terms, k + 1) in ("break", "but", "comma", "and", "with", "preposition")
    return ends and _text(terms, k - 1) in grammar.sets["shifts"]


def _is_direction(terms: list[Term], k: int, grammar: Grammar) -> bool:
    """Whether the side is the direction of a movement: "deviated to the right", "rotated toward the left"."""
    at = k - 1 - (_text(terms, k - 1) == "the")
    if _text(terms, at) not in ("to", "toward", "towards", "toward the"):
        return False
    for j in range(at - 1, max(at - _AHEAD, -1), -1):
        if terms[j].text in grammar.sets["shifts"]:
            return True
        if terms[j].kind in ("break", "but", "finding"):
            return False
    return False


def _has_pair(terms: list[Term], k: int) -> bool:
    """Whether "both" refers to two places: "both lungs", not "both opacity and effusion", "both the right and ..."."""
    between = ("determiner", "preposition", "modifier")
    j = next((j for j in range(k + 1, min(k + 6, len(terms))) if terms[j].kind not in between), k)
    if terms[j].kind in ("zone", "zone_adjective") and _kind(terms, j + 1) == "and":
        return terms[j].text.endswith(("s", "hila"))
    return terms[j].kind in ("carrier", "zone", "zone_adjective")


def _zone_adjective(terms: list[Term], k: int, grammar: Grammar) -> Term:
    """The term at `k` as a zone if it precedes a noun of the lung ("upper and lower lobes") or adjoins a side.

    Otherwise a zone adjective becomes `void`.
    """
    term = terms[k]
    if term.kind == "zone" and _is_segment(terms, k):
        return term._replace(kind="modifier", zones=())
    if term.kind != "zone_adjective":
        return term
    beside = "side" in (_kind(terms, k - 1), _kind(terms, k + 1)) or _beside_sided_zone(terms, k)
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
    """Whether an adjective with this noun is a zone of the lung; `beside` is true if it adjoins a side."""
    if head is None:
        return beside
    if head.kind in ("elsewhere", "compare", "word", "device", "vessel", "void"):
        return False
    lobes = (" lobe", " lobes", " zone", " zones", " lung", " lungs")
    return beside or head.kind == "carrier" or head.text.endswith(lobes)


def _is_within(terms: list[Term], k: int) -> bool:
    """Whether the adjective names only a part of another place: "right upper hilar mass", "lower mediastinum"."""
    place = next((term for term in terms[k + 1 : k + 4] if term.kind not in ("side", "modifier")), terms[k])
    return place.kind == "zone" and not {"hilar", "mediastinal", "cardiac", "lingula"}.isdisjoint(place.zones)


def _is_segment(terms: list[Term], k: int) -> bool:
    """Whether the zone is a segment of a lobe named after it: "apical segment of the right lower lobe"."""
    if terms[k].zones not in (("upper",), ("lower",)) or _text(terms, k + 1) not in ("segment", "segments"):
        return False
    kinds = (term.kind for term in terms[k + 3 : k + 7] if term.kind not in ("side", "determiner"))
    return _text(terms, k + 2) == "of" and next(kinds, "zone") in ("zone", "sided_zone", "zone_adjective")


def _beside_sided_zone(terms: list[Term], k: int) -> bool:
    """Whether a side precedes the zone in a list of zones: "right upper and mid"."""
    between = ("zone_adjective", "zone", "and", "or", "to", "modifier", "comma")
    return next((term.kind for term in terms[max(k - 5, 0) : k][::-1] if term.kind not in between), "") == "side"


def _head(terms: list[Term], k: int, grammar: Grammar) -> Term | None:
    """Noun of an adjective, past "and", "to" and other adjectives; None if the phrase ends before a noun."""
    for j in range(k + 1, min(k + _AHEAD, len(terms))):
        term = terms[j]
        is_lung_zone = term.kind == "zone" and term.zones[0] in ("upper", "mid", "lower", "middle_lobe")
        if (is_lung_zone and " " in term.text) or (term.kind == "compare" and term.text == "than"):
            return term
        if term.text == "of" and terms[j - 1].text in grammar.sets["parts"]:
            # "lower half of the right lung" refers to the lung.
            whole = next((t for t in terms[j + 1 : j + 5] if t.kind not in ("determiner", "side", "modifier")), term)
            return whole if whole.kind == "carrier" else term
        if term.kind not in _BETWEEN:
            return None if term.kind in ("break", "but", "verb", "preposition", "with", "colon") else term
    return None


def _cues(terms: list[Term], grammar: Grammar) -> list[Term]:
    """The terms, with cues that deny nothing as `void`: "no significant change", "not clear", "nearly resolved"."""
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
    """Indices of a negation and of the cue that it cancels; empty if the negation stands."""
    named = ("side", "zone", "sided_zone", "break", "comma", "but", "and", "or")
    for j in range(k + 1, min(k + 5, len(terms))):
        text, kind = terms[j].text, terms[j].kind
        if terms[k].text == "not":
            if text in grammar.sets["change_adjectives"] or kind in ("normal", "negate_either", "negate_back"):
                return [k, j]
            if text in grammar.sets["earlier"]:
                return [k]
        elif text in grammar.sets["change_nouns"] or text.endswith(_ENDINGS):
            return [k, j]
        if kind in named or (kind == "finding" and text not in ("change", "changes")):
            return []
    return []
