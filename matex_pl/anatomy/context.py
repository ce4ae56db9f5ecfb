"""What a term means where it stands: which "upper" is a zone, which "left" a side, which "no" a negation."""

from __future__ import annotations

from matex_pl.anatomy.lexicon import Grammar, Term

_BETWEEN = ("zone_adjective", "side", "and", "or", "to", "comma", "modifier", "determiner", "compare", "degree")
_ANATOMY = ("zone_adjective", "zone", "carrier", "finding", "modifier", "side", "compare")
# How far ahead a word looks for the one that settles its meaning.
_AHEAD = 12


def settle(terms: list[Term], grammar: Grammar) -> list[Term]:
    """The same terms, those that depend on their neighbours decided; what means nothing becomes `void`."""
    terms = [_dot(terms, k, grammar) for k in range(len(terms))]
    terms = [term for term in terms if term.kind != "skip"]
    terms = [_side(terms, k, grammar) for k in range(len(terms))]
    terms = [_zone_adjective(terms, k) for k in range(len(terms))]
    return _cues(terms, grammar)


def _kind(terms: list[Term], k: int) -> str:
    return terms[k].kind if 0 <= k < len(terms) else "break"


def _text(terms: list[Term], k: int) -> str:
    return terms[k].text if 0 <= k < len(terms) else ""


def _void(term: Term) -> Term:
    return term._replace(kind="void", sides=(), zones=())


def _dot(terms: list[Term], k: int, grammar: Grammar) -> Term:
    """A full stop that only ends an abbreviation ("Rt. lower lobe") goes."""
    abbreviates = terms[k].text == "." and _text(terms, k - 1) in grammar.sets["dotted"]
    return terms[k]._replace(kind="skip") if abbreviates and _kind(terms, k + 1) in _ANATOMY else terms[k]


def _side(terms: list[Term], k: int, grammar: Grammar) -> Term:
    term = terms[k]
    if term.kind != "side":
        return term
    before, after = _text(terms, k - 1), _text(terms, k + 1)
    if len(term.text) == 1 and not ({_kind(terms, k + 1), _kind(terms, k - 1)} & {*_ANATOMY, "device", "vessel"}):
        return _void(term)
    if len(term.text) == 1 and after.isdigit():
        return _void(term)
    if term.text == "both" and not _has_pair(terms, k):
        return _void(term)
    if (
        term.text in ("right", "left")
        and after in grammar.sets["adverb_followers"]
        and before not in ("the", "on", "to")
    ):
        return _void(term)
    if (
        term.text == "left"
        and before in grammar.sets["leaves"]
        and _kind(terms, k + 1) not in (*_ANATOMY, "sided_zone")
    ):
        return _void(term)
    if after in grammar.sets["shift_nouns"]:
        return _void(term)
    return _void(term) if _is_direction(terms, k, grammar) else term


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


def _has_pair(terms: list[Term], k: int) -> bool:
    """Whether "both" speaks of places: "both lungs", "both upper lobes", not "both opacity and effusion"."""
    for j in range(k + 1, min(k + 6, len(terms))):
        if terms[j].kind in ("carrier", "zone", "zone_adjective", "side"):
            return True
        if terms[j].kind not in ("determiner", "preposition", "modifier"):
            return False
    return False


def _zone_adjective(terms: list[Term], k: int) -> Term:
    """A zone before a noun of the lung ("upper and lower lobes") or beside a side, and `void` otherwise."""
    term = terms[k]
    if term.kind != "zone_adjective":
        return term
    beside = any(_kind(terms, j) == "side" for j in (k - 1, k + 1)) or _beside_sided_zone(terms, k)
    head = _head(terms, k)
    if head is None or head.kind in ("elsewhere", "compare", "word", "device", "vessel", "void"):
        lungs = False
    else:
        lungs = (
            head.kind == "carrier"
            or head.text.endswith((" lobe", " lobes", " zone", " zones", " lung", " lungs"))
            or beside
        )
    if not lungs and not (beside and head is None):
        return _void(term)
    zone = term.zones[0]
    if zone == "middle":
        zone = "middle_lobe" if head is not None and "lob" in head.text else "mid"
    return term._replace(kind="zone", zones=(zone,))


def _beside_sided_zone(terms: list[Term], k: int) -> bool:
    """A side stands before it over a list of zones: "right upper and mid"."""
    for j in range(k - 1, max(k - 6, -1), -1):
        if terms[j].kind == "side":
            return True
        if terms[j].kind not in ("zone_adjective", "zone", "and", "or", "to", "modifier", "comma"):
            return False
    return False


def _head(terms: list[Term], k: int) -> Term | None:
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
        if terms[j].kind not in _BETWEEN:
            return None if terms[j].kind in ("break", "but", "verb", "preposition", "with", "colon") else terms[j]
    return None


def _cues(terms: list[Term], grammar: Grammar) -> list[Term]:
    """Cues that deny nothing become `void`: "no significant change", "not clear", "nearly resolved"."""
    terms = list(terms)
    for k, term in enumerate(terms):
        if term.text in ("no", "not", "without", "without any") and term.kind == "negate_forward":
            for j in _undone(terms, k, grammar):
                terms[j] = _void(terms[j])
        elif term.kind in ("negate_either", "negate_back", "normal") or term.text.endswith("resolution of"):
            words = {_text(terms, j) for j in (k - 1, k - 2)}
            if term.text != "no longer" and words & grammar.sets["partial"] and "not" not in words:
                terms[k] = _void(term)
    return terms


def _undone(terms: list[Term], k: int, grammar: Grammar) -> list[int]:
    """Indices of a negation and of what it undoes, when together they deny nothing."""
    named = ("side", "zone", "sided_zone", "break", "comma", "but", "and", "or")
    for j in range(k + 1, min(k + 5, len(terms))):
        text, kind = terms[j].text, terms[j].kind
        if terms[k].text != "not" and text in grammar.sets["change_nouns"]:
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
