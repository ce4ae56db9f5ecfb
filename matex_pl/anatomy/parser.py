"""From a radiologist's phrase to the regions that it names: terms, sentences, denials, mentions, regions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from matex_pl.anatomy.disambiguation import settle
from matex_pl.anatomy.lexicon import Grammar, Term, read_terms, shipped_grammar
from matex_pl.anatomy.negation import PLACES, denied, segments, sentences
from matex_pl.anatomy.regions import Region, RegionTable, shipped_regions

Span = tuple[int, int]
_JOINS = ("and", "or", "comma", "to", "compare")
_TIGHT = ("carrier", "determiner", "preposition", "modifier", "degree")
_ELSEWHERE = ("device", "vessel", "elsewhere")
_STOPS = ("preposition", "verb", "and", "or", "comma", "with", "break", "but", "colon", *PLACES)
# Largest distance, in terms, of a noun from its side.
_AHEAD = 8


@dataclass(frozen=True)
class ParsedPhrase:
    """Regions that a phrase names.

    Args:
        regions: Regions, each once.
        spans: Character ranges of the original text that name the regions, in order.
        ignored: `(span, reason)` of places and sides that name no region.
    """

    regions: frozenset[Region] = frozenset()
    spans: tuple[Span, ...] = ()
    ignored: tuple[tuple[Span, str], ...] = ()


@dataclass
class Mention:
    """A side, a zone, or both together: "right", "lower lobe of the left lung", "RLL".

    Args:
        first: Index of the first term.
        last: Index of the last term.
        sides: Sides that the mention names, or that other mentions share with it.
        zones: Zones that the mention names, or that other mentions share with it.
        side_follows: Whether the side comes after the zone.
        has_carrier: Whether a bare side has its own noun, as in "left lung".
        has_one_place: Whether the zones lie on one side or in the midline, without need of a side.
        is_closed: Whether later terms cannot belong to the mention.
        after: Link to the mention before: `start`, `join`, or `far`.
        finding: Index of the finding at this place, if any.
        finding_follows: Whether that finding comes after the mention.
        lends_only: Whether the mention only gives its side to another mention and names no region itself.
        ignored: Reason why the mention names no region; empty if it names one.
    """

    first: int
    last: int
    sides: set[str] = field(default_factory=set)
    zones: list[str] = field(default_factory=list)
    side_follows: bool = False
    has_carrier: bool = False
    has_one_place: bool = False
    is_closed: bool = False
    after: str = "start"
    finding: int | None = None
    finding_follows: bool = False
    lends_only: bool = False
    ignored: str = ""

    @property
    def needs_side(self) -> bool:
        """Whether the mention names a zone that has two sides, and no side."""
        return bool(self.zones) and not self.sides and not self.has_one_place

    @property
    def is_bare_side(self) -> bool:
        """Whether the mention names a side and no zone."""
        return bool(self.sides) and not self.zones

    @property
    def awaits_zone(self) -> bool:
        """Whether the mention is a side without a noun, which may share the zone of a joined mention."""
        return self.is_bare_side and not self.has_carrier and not self.finding_follows


def parse_phrase(text: str, table: RegionTable | None = None, *, knowledge_prior: bool = False) -> ParsedPhrase:
    """Regions that `text` names. No string raises an error.

    Args:
        text: Phrase or report in English.
        table: Boxes by zone and side, see `load_regions`; the package's own by default.
        knowledge_prior: Whether a finding without a named place gets its usual place ("edema": both hila). This leaks
            knowledge about the finding into the prior.
    """
    table = shipped_regions() if table is None else table
    grammar = shipped_grammar()
    terms = settle(read_terms(text, grammar), grammar)
    regions: set[Region] = set()
    spans: set[Span] = set()
    ignored: list[tuple[Span, str]] = []
    for start, end in sentences(terms):
        sentence = _Sentence(terms, start, end, table, grammar)
        for mention in sentence.mentions:
            named = set() if mention.ignored or mention.lends_only else sentence.regions_of(mention)
            span = (terms[mention.first].start, terms[mention.last].end)
            if named or mention.lends_only:
                spans.add(span)
                regions |= named
            else:
                ignored.append((span, mention.ignored or "no such place on that side"))
        places = ((terms[k], reason) for k, reason in sentence.denied.items() if terms[k].kind in PLACES)
        ignored += (((term.start, term.end), reason) for term, reason in places)
        if knowledge_prior:
            for term, named in sentence.usual_places():
                spans.add((term.start, term.end))
                regions |= named
    return ParsedPhrase(frozenset(regions), tuple(sorted(spans)), tuple(sorted(ignored)))


def patient_sides(text: str) -> list[Term]:
    """Terms of `text` that name a side of the patient, in order, also in denials.

    Words that only look like a side are left out, and so are sides of devices, vessels or other parts of the body.
    """
    grammar, table = shipped_grammar(), shipped_regions()
    read = read_terms(text, grammar)
    terms = settle(read, grammar)
    no_side = {term.start for term in terms if term.kind == "void"}
    for start, end in sentences(terms):
        for mention in _Sentence(terms, start, end, table, grammar).mentions:
            if mention.ignored:
                no_side |= {term.start for term in terms[mention.first : mention.last + 1]}
    # From `read`, because settling drops sides that are named only for denial, "left rather than right".
    return [term for term in read if term.sides and term.start not in no_side]


class _Sentence:
    """One sentence, with its mentions and the sides and zones that they share."""

    def __init__(self, terms: list[Term], start: int, end: int, table: RegionTable, grammar: Grammar) -> None:
        self.terms, self.start, self.end, self.table, self.grammar = terms, start, end, table, grammar
        self.pieces = segments(terms, start, end, grammar)
        self.denied = denied(terms, self.pieces, grammar)
        self._index()
        self.mentions = list(self._read_mentions())
        for before, mention in zip([None, *self.mentions], self.mentions, strict=False):
            mention.has_one_place = all(len(table.get(zone, ())) == 1 for zone in mention.zones)
            self._find_noun(mention, before)
            if mention.is_bare_side and not mention.has_carrier and self._stands_alone(mention):
                mention.zones = self._zone_before(mention)
        kept = [mention for mention in self.mentions if not mention.ignored]
        _share_within_groups(kept)
        self._share_with_compared(kept)
        self._share_over_clause(kept)

    def regions_of(self, mention: Mention) -> set[Region]:
        """Regions of a mention; none if its side has no such place."""
        sides = mention.sides or {"right", "left"}
        zones = mention.zones or ["whole"]
        return {region for zone in zones for region in self._boxes(zone, sides, said=bool(mention.sides))}

    def usual_places(self) -> Iterator[tuple[Term, set[Region]]]:
        """Findings without a named place, with their usual regions."""
        placed = False
        for piece, following in itertools.zip_longest(self.pieces, self.pieces[1:]):
            if piece.before not in ("and", "or", "with") or piece.opens:
                placed = False
            placed = placed or bool(piece.kinds.intersection(PLACES))
            place_follows = following and following.names_place_only and following.kinds.intersection(PLACES)
            for k in range(piece.start, piece.end):
                usual = self.grammar.usual_places.get(self.terms[k].text)
                if usual and not placed and not place_follows and k not in self.denied:
                    sides, zone = usual
                    yield self.terms[k], self._boxes(zone, set(sides), said=True)

    def _index(self) -> None:
        """Index, per term, the clause, and the last finding and noun before the term in its piece."""
        everywhere = range(self.start, self.end)
        self.clause = dict.fromkeys(everywhere, 0)
        self.finding_before: dict[int, int | None] = dict.fromkeys(everywhere)
        self.noun_before: dict[int, int | None] = dict.fromkeys(everywhere)
        clause, clause_has_finding, last = 0, False, None
        for at, piece in enumerate(self.pieces):
            if piece.before in ("comma", "break") and clause_has_finding and piece.has_finding:
                clause += self._begins_clause(at)
            clause_has_finding = clause_has_finding or piece.has_finding
            finding = noun = subject = None
            for k in range(piece.start, piece.end):
                self.clause[k], self.finding_before[k], self.noun_before[k] = clause, finding, noun
                kind = self.terms[k].kind
                # "tubes, one at the apex"
                noun = last if noun is None and self.terms[k].text in self.grammar.sets["pronouns"] else noun
                finding = k if kind == "finding" else finding
                noun = k if kind == "finding" or kind in _ELSEWHERE else noun
                subject = noun if subject is None else subject
                # "opacity over the spine lies in the left base": the opacity does.
                noun = subject if kind == "verb" else noun
            last = noun if noun is not None else last

    def _begins_clause(self, at: int) -> bool:
        """Whether the sides named before piece `at` no longer apply to it."""
        piece = self.pieces[at]
        if self.terms[piece.start].kind in ("preposition", "degree"):
            return False
        texts = {self.terms[k].text for k in range(piece.start, min(piece.start + 3, piece.end))}
        if texts & self.grammar.sets["attached"]:
            return False
        # "Right lung: upper zone nodule, lower zone consolidation"
        second = self.pieces[1] if len(self.pieces) > 1 else piece
        headed = second.before == "colon" and self.pieces[0].names_place_only and "side" in self.pieces[0].kinds
        return not headed or bool(piece.kinds & {"side", "sided_zone"})

    def _read_mentions(self) -> Iterator[Mention]:
        current: Mention | None = None
        for k in range(self.start, self.end):
            term = self.terms[k]
            if term.kind not in PLACES or k in self.denied:
                continue
            link = self._link(current.last, k) if current else "start"
            if current and link == "tight" and self._add(current, k):
                continue
            if current:
                yield current
            current = Mention(k, k, set(term.sides), list(term.zones), after="join" if link == "tight" else link)
            current.is_closed = term.kind == "sided_zone" or self._is_midline(term)
        if current:
            yield current

    def _add(self, mention: Mention, k: int) -> bool:
        """Add the next place to the mention if its side or zone is still missing; return whether it was added."""
        term = self.terms[k]
        if mention.is_closed:
            # "lower lobes bilaterally", "retrocardiac on the left": a side after a midline place adds nothing.
            if term.kind != "side" or not self._is_midline(self.terms[mention.last]) or self._leads_zone(k):
                return False
            mention.sides = mention.sides or set(term.sides)
        elif term.kind == "side" and not mention.sides:
            mention.sides, mention.side_follows = set(term.sides), True
            mention.is_closed = True
        elif term.kind == "zone" and mention.is_bare_side:
            mention.zones = list(term.zones)
            mention.is_closed = self._is_midline(term)
        elif term.kind == "sided_zone" and not mention.sides:
            # "basal segment LLL"
            mention.sides, mention.is_closed = set(term.sides), True
            mention.zones += [zone for zone in term.zones if zone not in mention.zones]
        elif term.kind == "zone" and mention.zones == list(term.zones):
            pass
        else:
            return False
        mention.last = k
        return True

    def _leads_zone(self, k: int) -> bool:
        """Whether the side at `k` comes directly before its own zone: "retrocardiac left lower lobe"."""
        following = next((j for j in range(k + 1, min(k + 4, self.end)) if self.terms[j].kind != "modifier"), k)
        return self.terms[following].kind == "zone" and not self._is_midline(self.terms[following])

    def _is_midline(self, term: Term) -> bool:
        return bool(term.zones) and all("midline" in self.table.get(zone, ()) for zone in term.zones)

    def _link(self, left: int, right: int) -> str:
        """Link of two terms: `tight`, `join` (by "and", "to", "greater than", ...) or `far`."""
        joins: list[str] = []
        for k in range(left + 1, right):
            kind = self.terms[k].kind
            if kind in _JOINS:
                joins.append(kind)
            elif kind not in _TIGHT or k in self.denied:
                return "far"
        if not joins:
            return "tight"
        comma_only = joins == ["comma"] and self.terms[right].kind == "side"
        said_with_on = self.terms[left - 1].kind in ("determiner", "preposition") if left > self.start else False
        return "far" if comma_only and said_with_on else "join"

    def _find_noun(self, mention: Mention, previous: Mention | None) -> None:
        """Find the finding at the mention; ignore the mention of a device, a vessel or another part of the body."""
        following = self._noun_after(mention)
        before = self.noun_before[mention.first]
        if following is not None and self.terms[following].kind in _ELSEWHERE:
            mention.ignored = f"belongs to {self.terms[following].text!r}"
        elif following is None and before is not None and self.terms[before].kind in _ELSEWHERE:
            mention.ignored = f"belongs to {self.terms[before].text!r}"
        elif following is not None:
            mention.finding, mention.finding_follows = following, True
        elif previous and previous.ignored and mention.after == "join":
            mention.ignored = previous.ignored
        else:
            mention.finding = self.finding_before[mention.first]

    def _stands_alone(self, mention: Mention) -> bool:
        """Whether the side is a subject by itself: "the left is obscured", "as is the left"."""
        if mention.first == 0:
            return False
        before = self.terms[mention.first - 1]
        if mention.last + 1 < self.end and self._is_predicate(self.terms[mention.last + 1]):
            return before.text == "the" or before.kind in ("comma", "but", "and")
        starts = self.terms[max(mention.first - 3, 0)].text
        return before.text == "the" and starts in self.grammar.sets["echoes"]

    def _is_predicate(self, term: Term) -> bool:
        """Whether the term is a predicate: "is obscured", or "blunted" alone."""
        return term.kind in ("verb", "normal") or (term.kind == "finding" and term.text.endswith("ed"))

    def _zone_before(self, mention: Mention) -> list[str]:
        """Zones of the statement before, even if denied; none for a whole lung."""
        has_verb = False
        for k in range(mention.first - 1, max(mention.first - 2 * _AHEAD, 0) - 1, -1):
            term = self.terms[k]
            has_verb = has_verb or self._is_predicate(term)
            if term.kind == "carrier" or term.text == "\n\n":
                break
            has_side = any(other.kind == "side" for other in self.terms[max(k - 2, 0) : k])
            if term.kind == "sided_zone" or (term.kind == "zone" and (has_side or not self._is_midline(term))):
                return list(term.zones) if has_verb else []
        return []

    def _noun_after(self, mention: Mention) -> int | None:
        noun = None
        for k in range(mention.last + 1, min(mention.last + 1 + _AHEAD, self.end)):
            kind = self.terms[k].kind
            if kind == "carrier" and mention.is_bare_side:
                mention.has_carrier = True
            if kind in _STOPS:
                follows = self._joined_device(mention, k)
                return noun if noun is not None or follows is None else follows
            if kind in _ELSEWHERE:
                return k
            if noun is not None:
                return noun
            if kind == "finding":
                noun = k
        return noun

    def _joined_device(self, mention: Mention, k: int) -> int | None:
        """Index of the device after a conjunction of sides, if any: "right and left chest tubes"."""
        joins = self.terms[k].kind in ("and", "or", "compare") and k + 1 < self.end and self.terms[k + 1].kind == "side"
        if not joins or not mention.is_bare_side or mention.has_carrier:
            return None
        for j in range(k + 2, min(k + 2 + _AHEAD, self.end)):
            if self.terms[j].kind in _ELSEWHERE:
                return j
            if self.terms[j].kind in (*_STOPS, "finding"):
                return None
        return None

    def _share_with_compared(self, mentions: list[Mention]) -> None:
        """Give a bare side the zone of the place it is compared with: "the right hilum is larger than the left"."""
        for before, mention in itertools.pairwise(mentions):
            if mention.awaits_zone and before.zones and before.sides and self._kind_before(mention) == "compare":
                mention.zones = list(before.zones)

    def _share_over_clause(self, mentions: list[Mention]) -> None:
        """Give zones without a side the sides of the rest of their clause."""
        for at, mention in enumerate(mentions):
            if not mention.needs_side:
                continue
            group = [mention]
            group += itertools.takewhile(lambda other: other.after == "join" and other.needs_side, mentions[at + 1 :])
            following = mentions[at + len(group) :][:2]
            if following and self._answers(group[-1], following[0]):
                self._take_following(group, following)
                continue
            before = next((m for m in reversed(mentions[max(at - 4, 0) : at]) if m.sides), None)
            if before and self._in_one_clause(before, mention):
                mention.sides = set(before.sides)
                is_entire = before.has_carrier and self._is_entire(before)
                apart = before.finding is not None and mention.finding is not None and before.finding != mention.finding
                before.lends_only = before.lends_only or (before.is_bare_side and not apart and not is_entire)
        for before, mention in itertools.pairwise(mentions):
            self._drop_comparison(before, mention)

    def _in_one_clause(self, before: Mention, after: Mention) -> bool:
        return self.clause[before.first] == self.clause[after.first]

    def _is_entire(self, mention: Mention) -> bool:
        """Whether the mention covers a whole lung, which a zone in it does not replace: "throughout both lungs"."""
        near = self.terms[max(mention.first - 2, self.start) : mention.last + 1]
        return any(term.text in self.grammar.sets["entire"] for term in near)

    def _answers(self, zone: Mention, side: Mention) -> bool:
        """Whether a side after a zone belongs to it: "lower lobe opacity on the right", "... in the left lung"."""
        # "in the left lung"
        is_placed = self._kind_before(side) == "preposition"
        says_where = side.is_bare_side and not side.finding_follows and is_placed
        if not (side.awaits_zone or says_where) or not self._in_one_clause(zone, side):
            return False
        between = range(zone.last + 1, min(side.first, zone.last + 1 + 3 * _AHEAD))
        last_join = max((k for k in between if self.terms[k].kind in ("and", "with", "or")), default=zone.last)
        kinds = {self.terms[k].kind for k in range(last_join + 1, side.first)}
        # "apical and lateral components on the right", but neither "at the base and on the right" nor a new finding
        joins_words = self.terms[last_join].kind != "with" and "word" in kinds and "finding" not in kinds
        return not any(k in self.denied for k in between) and (last_join == zone.last or joins_words)

    def _kind_before(self, mention: Mention) -> str:
        """Kind of the term before a mention and its determiner; empty at the beginning of the sentence."""
        k = mention.first - 1
        k -= k > self.start and self.terms[k].kind == "determiner"
        return self.terms[k].kind if k >= self.start else ""

    def _take_following(self, zones: list[Mention], following: list[Mention]) -> None:
        first = following[0]
        first.lends_only = True
        # "worse on the left": the other side has it too.
        near = self.terms[max(first.first - 4, self.start) : first.first]
        sides = {"right", "left"} if any(term.kind == "degree" for term in near) else set(first.sides)
        for mention in following[1:]:
            if mention.after == "join" and mention.awaits_zone:
                sides |= mention.sides
                mention.lends_only = True
        for zone in zones:
            zone.sides = set(sides)

    def _drop_comparison(self, before: Mention, mention: Mention) -> None:
        """Drop sides of a zone that is already named: "Bibasilar opacities, left greater than right"."""
        if not (before.zones or before.lends_only or len(before.sides) == 2) or not mention.is_bare_side:
            return
        if mention.finding is None and not mention.has_carrier and mention.sides <= before.sides:
            mention.lends_only = self._in_one_clause(before, mention)
            # The next side is compared with the same zone.
            mention.sides = set(before.sides) if mention.lends_only else mention.sides

    def _boxes(self, zone: str, sides: set[str], *, said: bool) -> set[Region]:
        """Regions of a zone on these sides, or of its fallback; `said` is true if the phrase names the sides."""
        boxes = self.table.get(zone, {})
        regions = {boxes[side] for side in sides if side in boxes}
        fallbacks = [f"{side} {zone}" for side in sides if f"{side} {zone}" in self.grammar.fallback]
        if "midline" in boxes or not boxes:
            if not (boxes and said and fallbacks and len(sides) == 1):
                return set(boxes.values())
        elif regions:
            return regions
        instead = self.table.get(self.grammar.fallback[fallbacks[0]] or "", {}) if fallbacks else {}
        return {instead[side] for side in sides if side in instead}


def _share_within_groups(mentions: list[Mention]) -> None:
    """Share sides over joined zones ("right upper and lower"), and zones over joined sides ("right and left lower")."""
    joined = [pair for pair in itertools.pairwise(mentions) if pair[1].after == "join"]
    led_by = {id(mention): before for before, mention in joined if before.awaits_zone}
    for before, mention in joined:
        if mention.needs_side and before.zones and before.sides and not before.side_follows:
            # "right and left upper and lower lobes": both sides of both.
            lead = led_by.get(id(before))
            mention.sides = before.sides | (lead.sides if lead else set())
    for mention, following in reversed(joined):
        if mention.needs_side and following.side_follows:
            mention.sides = set(following.sides)
        elif mention.awaits_zone and _gives_zone(following, mention):
            mention.zones = list(following.zones)
    for before, mention in joined:
        if mention.awaits_zone and before.zones and before.sides:
            mention.zones = list(before.zones)


def _gives_zone(following: Mention, mention: Mention) -> bool:
    """Whether a zone also belongs to the bare side before it: "right and left lower lobe"."""
    has_place = bool(following.zones and following.sides) and not following.side_follows
    return has_place and (mention.finding is None or not following.finding_follows)
