"""Negation: the terms of a phrase in the scope of a negation or of a statement of normality."""

from __future__ import annotations

from dataclasses import dataclass

from matex_pl.anatomy.lexicon import Grammar, Term

SEPARATORS = ("comma", "colon", "and", "or", "with")
PLACES = ("side", "zone", "sided_zone")
# Kinds allowed in a segment that names only a place.
_NEUTRAL = (*PLACES, "carrier", "determiner", "preposition", "verb", "modifier", "to", "compare")
# Kinds allowed before a noun.
_OF_NOUN = (*PLACES, "carrier", "modifier", "degree")
# Number of terms that a scope reaches back, which bounds the time in text without a full stop.
_REACH = 40


@dataclass
class Segment:
    """Terms `start` to `end` between two separators of a sentence.

    Args:
        start: Index of the first term.
        end: Index after the last term.
        before: Separator on the left; `break` if a new statement begins.
        kinds: Kinds of the terms.
        opens: Whether the segment begins like a new statement: "small ...", "the ...".
        names_place_only: Whether the segment names only a place.
        list_follows: Whether the segment is in a list that "or" closes.
    """

    start: int
    end: int
    before: str
    kinds: frozenset[str]
    opens: bool
    names_place_only: bool
    list_follows: bool = False

    @property
    def has_verb(self) -> bool:
        """Whether the segment has a finite verb."""
        return "verb" in self.kinds

    @property
    def has_finding(self) -> bool:
        """Whether the segment names a finding."""
        return "finding" in self.kinds

    @property
    def places_a_finding(self) -> bool:
        """Whether the segment names a finding and a place."""
        return self.has_finding and bool(self.kinds.intersection(PLACES))


def sentences(terms: list[Term]) -> list[tuple[int, int]]:
    """Ranges of terms between full stops, semicolons and words like "but"."""
    ranges, start = [], 0
    for k, term in enumerate(terms):
        if term.kind in ("break", "but"):
            ranges.append((start, k))
            start = k + 1
    return [(a, b) for a, b in [*ranges, (start, len(terms))] if a < b]


def segments(terms: list[Term], start: int, end: int, grammar: Grammar) -> list[Segment]:
    """Segments of one sentence between its separators, in order; empty segments pass their separator on."""
    pieces: list[Segment] = []
    before, first = "start", start
    for k in range(start, end + 1):
        separates = k == end or terms[k].kind in SEPARATORS
        if not separates and not (k > first and _runs_on(terms, k, end, grammar)):
            continue
        if k > first:
            pieces.append(_segment(terms, first, k, before, grammar))
            before = ""
        if not separates:
            before, first = "break", k
        elif k < end:
            before = _stronger(before, terms[k].kind)
            first = k + 1
    _mark_lists(terms, pieces, grammar)
    return pieces


def _mark_lists(terms: list[Term], pieces: list[Segment], grammar: Grammar) -> None:
    """Set `list_follows` of the pieces in a list with a later "or": "no A, B, or C", but not "no A, left B or C"."""
    list_follows = False
    for piece in reversed(pieces):
        piece.list_follows = list_follows
        if piece.before == "or":
            has_comma = terms[max(piece.start - 2, 0)].kind == "comma"
            reads = any(term.text in grammar.sets["readings"] for term in terms[piece.start : piece.end])
            list_follows = has_comma or piece.places_a_finding or not reads
            piece.list_follows |= list_follows
        elif piece.before in ("break", "colon") or piece.has_verb:
            list_follows = False


def _runs_on(terms: list[Term], k: int, end: int, grammar: Grammar) -> bool:
    """Whether a new statement begins at `k` without punctuation: "no effusion there is ..."."""
    term, before = terms[k], terms[k - 1]
    says_it_of = k > 1 and (
        (before.kind == "normal" and terms[k - 2].kind in ("verb", "carrier", *PLACES))
        or (before.text in grammar.sets["perceived"] and terms[k - 2].kind in ("verb", "negate_forward"))
    )
    if before.kind != "finding" and not says_it_of:
        return False
    if term.kind == "determiner" or term.text == "no":
        return True
    if term.kind not in PLACES and term.text not in grammar.sets["openers"]:
        return False
    ends = ("finding", "normal", "verb") if says_it_of else ("finding", "normal")
    follows = next((terms[j] for j in range(k, min(k + 8, end)) if terms[j].kind not in _OF_NOUN), None)
    if follows is None or follows.kind not in ends:
        return False
    return says_it_of or (follows.kind == "normal") == (term.kind in PLACES)


def denied(terms: list[Term], pieces: list[Segment], grammar: Grammar) -> dict[int, str]:
    """Index of each denied term, with the reason, in the sentence of `pieces`."""
    reasons: dict[int, str] = {}
    if pieces and _is_exception(terms, pieces[0], grammar):
        _deny(reasons, pieces[0].start, pieces[0].end, "excepted")
    forward_end = normal_end = 0
    for at, piece in enumerate(pieces):
        for k in range(piece.start, piece.end):
            cue = _direction(terms, piece, k, grammar)
            if cue in ("forward", "contrast") and k >= forward_end:
                forward_end = _end_of_negation(pieces, at)
                start = k if cue == "contrast" else _start_of_place(terms, pieces, at, k, grammar)
                _deny(reasons, max(start, k - _REACH), forward_end, "negated")
            elif cue == "back":
                start = _start_of_negation(terms, pieces, at, k, grammar)
                end = _end_of_absence(terms, piece, k)
                if at + 1 < len(pieces) and _is_echo(terms, pieces[at + 1], grammar):
                    end = pieces[at + 1].end
                _deny(reasons, max(start, k - _REACH), end, "negated")
            elif cue == "normal" and k >= normal_end:
                start, normal_end = _normal_range(terms, pieces, at, k, grammar)
                _deny(reasons, max(start, k - _REACH), normal_end, "normal")
    return reasons


def _is_exception(terms: list[Term], piece: Segment, grammar: Grammar) -> bool:
    """Whether a place is excepted from the findings before it: "both lungs are opaque except for the left apex"."""
    cue = piece.start - 1
    if cue < 1 or terms[cue].text not in grammar.sets["exceptions"] or piece.has_finding:
        return False
    for k in range(cue - 1, max(cue - _REACH, -1), -1):
        if terms[k].kind in ("break", "but"):
            return True
        if terms[k].kind == "normal" or terms[k].kind.startswith("negate"):
            return False
    return True


def _deny(reasons: dict[int, str], start: int, end: int, reason: str) -> None:
    for k in range(start, end):
        reasons.setdefault(k, reason)


def _segment(terms: list[Term], start: int, end: int, before: str, grammar: Grammar) -> Segment:
    piece, openers = terms[start:end], grammar.sets["openers"]
    new = openers - {"the", "there"}
    names_place_only = all(term.kind in _NEUTRAL and term.text not in new for term in piece)
    kinds = frozenset(term.kind for term in piece)
    return Segment(start, end, before, kinds, piece[0].text in openers, names_place_only)


def _stronger(left: str, right: str) -> str:
    """The separator that counts among adjacent ones: ", and" joins, ", with" opens."""
    if {left, right} == {"comma", "with"}:
        return "break"
    return left if right == "comma" and left not in ("", "start") else right


def _direction(terms: list[Term], piece: Segment, k: int, grammar: Grammar) -> str:
    kind = terms[k].kind
    if kind.startswith("negate") and k == piece.start and _is_inverted(terms, piece, k, grammar):
        return "forward"
    if kind == "negate_forward":
        return "back" if _is_perception(terms, piece, k, grammar) else "forward"
    says_where = any(term.kind in PLACES for term in terms[k + 1 : min(k + 5, piece.end)])
    if kind == "contrast" or (terms[k].text == "none" and says_where):
        return "contrast"
    if kind == "negate_back":
        return "back"
    if kind == "normal":
        # "free of", "no clear consolidation", "clear opacity": not a statement of normality.
        follows = terms[k + 1].kind if k + 1 < piece.end else ""
        is_other = (terms[k].text == "free" and follows) or (terms[k].text == "clear" and follows == "finding")
        return "" if is_other else "normal"
    if kind != "negate_either":
        return ""
    follows = next((term.kind for term in terms[k + 1 : min(k + 5, piece.end)] if term.kind != "modifier"), "")
    said_of = k > piece.start and terms[k - 1].text in grammar.sets["copulas"] and terms[k].text != "no longer"
    noun = (*PLACES, "finding", "carrier", "determiner", "zone_adjective")
    return "forward" if follows in noun and not said_of else "back"


def _is_inverted(terms: list[Term], piece: Segment, k: int, grammar: Grammar) -> bool:
    """Whether the denied terms follow the verb: "not seen today is the right effusion"."""
    copulas = grammar.sets["copulas"]
    return any(term.kind == "verb" and term.text in copulas for term in terms[k + 1 : min(k + 5, piece.end)])


def _is_perception(terms: list[Term], piece: Segment, k: int, grammar: Grammar) -> bool:
    """Whether the cue denies the terms before it: "not seen", "not definitely identified"."""
    follows = {term.text for term in terms[k + 1 : min(k + 4, piece.end)]}
    return terms[k].text == "not" and not follows.isdisjoint(grammar.sets["perceived"])


def _end_of_negation(pieces: list[Segment], at: int) -> int:
    """Index after the last term that a cue in piece `at` denies: the clause's end, or a new positive finding."""
    while at + 1 < len(pieces) and _stays_negated(pieces[at + 1]):
        at += 1
    return pieces[at].end


def _stays_negated(piece: Segment) -> bool:
    if piece.before in ("or", "break", "colon"):
        return piece.before == "or"
    if piece.before != "comma":
        return not piece.opens and not piece.has_verb
    return (piece.list_follows and not piece.has_verb) or not (piece.opens or piece.places_a_finding)


def _start_of_place(terms: list[Term], pieces: list[Segment], at: int, k: int, grammar: Grammar) -> int:
    """Start of the place before the cue at `k` to which the denial applies: "the right base is free of"."""
    piece = pieces[at]
    if k - piece.start > _REACH:
        return k
    if k > piece.start:
        if not _segment(terms, piece.start, k, piece.before, grammar).names_place_only:
            return k
    elif at == 0 or piece.before not in ("comma", "colon", "start"):
        return k
    start = piece.start
    joins = ("and", "or", "comma", "colon")
    while k - start < _REACH and at > 0 and pieces[at].before in joins and pieces[at - 1].names_place_only:
        at -= 1
        start = pieces[at].start
    if at > 0 and pieces[at].before in ("and", "or") and start != piece.start:
        return piece.start
    return start


def _start_of_negation(terms: list[Term], pieces: list[Segment], at: int, k: int, grammar: Grammar) -> int:
    """Start of the noun phrase before the cue at `k`."""
    begin = max(pieces[at].start, k - _REACH)
    bare = {term.kind for term in terms[begin:k]} <= {"verb", "determiner", "modifier", "word"}
    plural = any(term.text in grammar.sets["plural_verbs"] for term in terms[begin:k])
    while at > 0 and k - pieces[at].start < _REACH:
        previous = pieces[at - 1]
        joined = pieces[at].before in ("and", "or") and not previous.has_verb and (plural or not previous.has_finding)
        if not (joined or (bare and pieces[at].before in ("comma", "colon", "with"))):
            break
        bare = False
        at -= 1
    return pieces[at].start


def _end_of_absence(terms: list[Term], piece: Segment, k: int) -> int:
    """Index after the place behind the cue at `k` that the same denial covers: "has resolved on the right"."""
    end = k + 1
    while end < min(piece.end, k + _REACH) and terms[end].kind in _NEUTRAL:
        end += 1
    says_where = end > k + 1 and (terms[k + 1].kind == "preposition" or len(terms[k + 1].sides) == 2)
    return end if says_where else k


def _normal_range(terms: list[Term], pieces: list[Segment], at: int, k: int, grammar: Grammar) -> tuple[int, int]:
    """Range of terms that the word of normality at `k` covers: its segment, and plain places joined on one side."""
    first = last = at
    before = terms[max(pieces[at].start, k - _REACH) : k]
    follows = terms[k + 1].kind if k + 1 < pieces[at].end else ""
    if follows in (*PLACES, "carrier") and any(term.kind == "finding" for term in before):
        # "left base opacity in otherwise normal lungs": of the lungs only.
        return k, pieces[at].end
    said_after = {"verb", "carrier", *PLACES}.intersection(term.kind for term in before) or k + 1 == pieces[at].end
    if said_after:
        joins = () if any(term.text == "otherwise" for term in before) else ("and", "or", "comma", "colon")
        while first > 0 and pieces[first].before in joins and _is_plain(pieces[first - 1]):
            if k - pieces[first].start >= _REACH:
                break
            first -= 1
    else:
        while last + 1 < len(pieces) and pieces[last + 1].before in ("and", "or") and _is_plain(pieces[last + 1]):
            if pieces[last + 1].opens:
                break
            last += 1
    last += last + 1 < len(pieces) and _is_echo(terms, pieces[last + 1], grammar)
    return pieces[first].start, pieces[last].end


def _is_echo(terms: list[Term], piece: Segment, grammar: Grammar) -> bool:
    """Whether the piece repeats a statement for another place: "the right lung is clear, as is the left"."""
    return piece.has_verb and not piece.has_finding and terms[piece.start].text in grammar.sets["echoes"]


def _is_plain(piece: Segment) -> bool:
    return not piece.has_finding and not piece.has_verb and "device" not in piece.kinds
