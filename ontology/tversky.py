"""The modified weighted Tversky index over findings (arXiv 2508.19915, section 3): what two texts say, how alike.

A text is a *profile*: how strongly it asserts each concept (1 affirmed, less where it doubts or contradicts itself)
and which it denies. Concepts weigh by semantic type, or by their information content. With a hierarchy, a concept
lends its ancestors its strength, decayed at every step, so that a hemothorax and an effusion share something.

For reports, with I = sum of w * min(q, d), f = W(d) - I and b = W(q) - I:
    sim = I / (I + beta * (alpha * min(f, b) + (1 - alpha) * max(f, b)) + cost * C)
where C weighs what one asserts and the other denies (the signed form; the paper has only what the query itself
contradicts). alpha 0.5, beta 1, cost 0 without hierarchy is the weighted Dice index. What both deny breaks ties.

For phrases, containment: the share of the query's concepts that a document answers, by asserting a concept (or one
below it) that the query asserts, or denying one that it denies; asserting what is denied costs as much.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.types import Assertion, Finding, FindingsScore, Linker, Part, Postings

Scores = NDArray[np.float32]
# Diseases, pathologic functions and findings as in the paper; what it weighs 0, such as devices, counts a little.
TYPES = {"T047": 3.0, "T191": 3.0, "T046": 2.0, "T190": 1.0, "T037": 1.0, "T019": 1.0, "T033": 1.0}
TYPES |= {"T074": 0.3, "T061": 0.3} | dict.fromkeys(("T017", "T023", "T024", "T029", "T030", "T082"), 0.0)
DENIALS = 0.01  # share of the denials of two reports: it orders what the asserted findings leave tied


@dataclass(frozen=True)
class Index:
    """The constants of the measure.

    weights: semantic type -> weight. uniform: every concept weighs 1. information: weights by concept instead.
    decay: strength that an ancestor keeps per step (0: no hierarchy); depth: steps.
    uncertain, leaning, disputed: strength of a concept that is doubted, doubted but affirmed too (a hedge that leans
    to presence), and affirmed and denied in one text.
    others: what the weights by type are worth beside those that the ontology declares for single concepts.
    narrower: what a phrase gives a document per step that its concept lies below the one asked for.
    related: what a phrase gives a document that holds only the concept above the one asked for, or another below it.
    cost: weight of contradictions between reports.
    """

    alpha: float = 0.5
    beta: float = 1.0
    cost: float = 0.2
    decay: float = 0.5
    depth: int = 1
    uncertain: float = 0.2
    leaning: float = 0.9
    disputed: float = 0.9
    others: float = 0.02
    narrower: float = 0.95
    related: float = 0.1
    weights: Mapping[str, float] = field(default_factory=lambda: TYPES)
    uniform: bool = False
    information: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Profile:
    """asserted: concept -> strength in (0, 1]. denied: concepts that are only denied."""

    asserted: Mapping[str, float]
    denied: frozenset[str]


class Measure:
    """An `Index` over the concepts of one ontology: weights and ancestors by concept id.

    Concepts that the ontology does not have weigh 1 and have no ancestors.
    """

    def __init__(
        self,
        index: Index,
        types: Callable[[str], Sequence[str]],
        parents: Callable[[str], Sequence[str]],
        declared: Mapping[str, float] | None = None,
    ) -> None:
        self.index = index
        self._declared = declared or {}
        self._types = types
        self._parents = parents
        self._weights: dict[str, float] = {}
        self._above: dict[str, dict[str, int]] = {}

    def weight(self, concept: str) -> float:
        known = self._weights.get(concept)
        if known is None:
            known = self._weights[concept] = self._weigh(concept)
        return known

    def _weigh(self, concept: str) -> float:
        if self.index.information is not None:
            return self.index.information.get(concept, 0.0)
        types = self._types(concept)
        if not types:
            return 1.0
        weight = max(self.index.weights.get(t, 0.0) for t in types)
        if self.index.uniform:
            return float(weight > 0)
        return self._declared.get(concept, weight * self.index.others if self._declared else weight)

    def above(self, concept: str) -> dict[str, int]:
        """The concept and its ancestors with their distances."""
        known = self._above.get(concept)
        if known is None:
            known, level = {concept: 0}, [concept]
            while level:
                level = [p for node in level for p in self._parents(node) if p not in known]
                known |= {parent: 1 + min(known[c] for c in known if parent in self._parents(c)) for parent in level}
            self._above[concept] = known
        return known

    def profile(self, findings: Iterable[Finding | tuple[str, Assertion]]) -> Profile:
        """What the findings of one text come to."""
        said: dict[str, set[Assertion]] = {}
        for concept, assertion, *_ in findings:
            said.setdefault(concept, set()).add(assertion)
        strengths = {concept: self.strength(found) for concept, found in said.items()}
        asserted = {concept: strength for concept, strength in strengths.items() if strength > 0}
        return Profile(asserted, frozenset(said) - frozenset(asserted))

    def strength(self, said: set[Assertion]) -> float:
        strength = {
            (True, False): 1.0,
            (True, True): self.index.leaning,
            (False, True): self.index.uncertain,
        }.get((Assertion.affirmed in said, Assertion.uncertain in said), 0.0)
        return strength * self.index.disputed if Assertion.negated in said else strength

    def spread(self, asserted: Mapping[str, float]) -> dict[str, float]:
        """Strengths with those that ancestors inherit."""
        out = dict(asserted)
        if self.index.decay:
            for concept, strength in asserted.items():
                for above, distance in self.above(concept).items():
                    if 0 < distance <= self.index.depth:
                        out[above] = max(out.get(above, 0.0), strength * self.index.decay**distance)
        return out

    def total(self, strengths: Mapping[str, float]) -> float:
        """W: the weight of a profile."""
        return sum(self.weight(concept) * strength for concept, strength in strengths.items())

    def similarity(self, query: Profile, candidate: Profile) -> float:
        """Two reports, by the definition in the module's docstring. In [0, 1 + DENIALS].

        >>> flat = Measure(Index(), lambda concept: (), lambda concept: ())
        >>> said = Assertion.affirmed
        >>> flat.similarity(flat.profile([("a", said), ("b", said)]), flat.profile([("a", said)]))  # 2 * 1 / (2 + 1)
        0.6666666666666666
        """
        q, d = self.spread(query.asserted), self.spread(candidate.asserted)
        shared = sum(self.weight(c) * min(strength, d[c]) for c, strength in q.items() if c in d)
        ends = self.total(q) - shared, self.total(d) - shared
        contradicted = sum(self.weight(c) * candidate.asserted.get(c, 0.0) for c in query.denied)
        contradicted += sum(
            self.weight(c) * strength for c, strength in query.asserted.items() if c in candidate.denied
        )
        score = self.ratio(np.float64(shared), np.float64(ends[0]), np.float64(ends[1]), np.float64(contradicted))
        both, either = len(query.denied & candidate.denied), len(query.denied) + len(candidate.denied)
        denials = 2 * both / either if either else 0.0
        if not query.asserted:
            return denials / (1 + self.total(candidate.asserted))
        return float(score) + DENIALS * denials if score > 0 else 0.0

    def ratio(self, shared: Any, query_only: Any, other_only: Any, contradicted: Any) -> Any:
        """The index from its terms, numbers or arrays; 0 where nothing is shared."""
        low, high = np.minimum(query_only, other_only), np.maximum(query_only, other_only)
        index = self.index
        whole = shared + index.beta * (index.alpha * low + (1 - index.alpha) * high) + index.cost * contradicted
        return np.where(shared > 0, shared / np.where(whole > 0, whole, 1.0), 0.0)


def _nothing(concept: str) -> Sequence[str]:  # noqa: ARG001
    return ()


def measure(linker: Linker | None = None, index: Index | None = None) -> Measure:
    """The measure over a linker's ontology; without one (or for a linker that has none) all concepts are alike."""
    tables = getattr(linker, "tables", None)
    if tables is None:
        return Measure(index or Index(), _nothing, _nothing)
    ids, numbers = tables.lexicon.concepts, tables.numbers

    def types(concept: str) -> Sequence[str]:
        return tables.types[numbers[concept]] if concept in numbers else ()

    def parents(concept: str) -> Sequence[str]:
        return [ids[parent] for parent in tables.parents[numbers[concept]]] if concept in numbers else ()

    return Measure(index or Index(), types, parents, tables.weights)


def tversky_matrix(
    queries: Sequence[Sequence[Finding]], documents: Sequence[Sequence[Finding]], by: Measure
) -> Scores:
    """(Q, N) similarities of reports: `Measure.similarity` for all pairs, as sparse products.

    min(q, d) of strengths that take few values is a sum over these values v_1 < v_2 < ... of
    (v_i - v_(i-1)) * [q >= v_i] * [d >= v_i], so that the shared weight is one sparse product per value.
    """
    left, right = [by.profile(found) for found in queries], [by.profile(found) for found in documents]
    spread_left, spread_right = [by.spread(p.asserted) for p in left], [by.spread(p.asserted) for p in right]
    everything = [*spread_left, *spread_right, *(dict.fromkeys(p.denied, 1.0) for p in (*left, *right))]
    columns = {concept: n for n, concept in enumerate(sorted({c for held in everything for c in held}))}
    weights = np.array([by.weight(concept) for concept in columns], np.float64)
    q, d = _sparse(spread_left, columns), _sparse(spread_right, columns)
    values = np.unique(np.round(np.concatenate([[0.0], q.data, d.data]), 9))
    shared = np.zeros((len(left), len(right)))
    for low, high in pairwise(values):
        shared += (high - low) * (_at_least(q, high).multiply(weights) @ _at_least(d, high).T).toarray()
    q_raw, d_raw = _sparse([p.asserted for p in left], columns), _sparse([p.asserted for p in right], columns)
    q_denied, d_denied = (_sparse([dict.fromkeys(p.denied, 1.0) for p in side], columns) for side in (left, right))
    contradicted = (q_denied.multiply(weights) @ d_raw.T + q_raw.multiply(weights) @ d_denied.T).toarray()
    scores = by.ratio(shared, (q @ weights)[:, None] - shared, (d @ weights)[None, :] - shared, contradicted)
    both = (q_denied @ d_denied.T).toarray()
    either = np.asarray(q_denied.sum(1)) + np.asarray(d_denied.sum(1)).T
    denials = np.divide(2 * both, either, out=np.zeros_like(both), where=either > 0)
    silent = np.array([not p.asserted for p in left], bool)[:, None]
    normal = denials / (1 + (d_raw @ weights)[None, :])
    return np.where(silent, normal, np.where(scores > 0, scores + DENIALS * denials, 0.0)).astype(np.float32)


def _sparse(rows: Sequence[Mapping[str, float]], columns: Mapping[str, int]) -> Any:
    from scipy.sparse import csr_matrix

    starts = np.cumsum([0, *map(len, rows)])
    at = np.array([columns[concept] for row in rows for concept in row], np.int64)
    values = np.array([strength for row in rows for strength in row.values()], np.float64)
    return csr_matrix((values, at, starts), shape=(len(rows), len(columns)))


def _at_least(matrix: Any, value: float) -> Any:
    out = matrix.copy()
    out.data = (out.data >= value - 1e-9).astype(np.float64)
    out.eliminate_zeros()
    return out


def findings_score(by: Measure | Linker | None = None, index: Index | None = None) -> FindingsScore:
    """Scores of all rows for one query part: containment for phrases, the symmetric index for reports.

    by: a measure, or the linker whose ontology is measured with the constants of `index`.
    """
    found_by = by if isinstance(by, Measure) else measure(by, index)
    kept: dict[int, tuple[weakref.ref[Any], _Columns]] = {}

    def score(part: Part, postings: Postings) -> Scores:
        found = kept.get(id(postings))
        if found is None or found[0]() is not postings:
            for stale in [key for key, (alive, _) in kept.items() if alive() is None]:
                del kept[stale]
            found = kept[id(postings)] = (weakref.ref(postings), _Columns(found_by, postings))
        profile = found_by.profile(part.findings or ())
        return found[1].alike(profile) if part.kind == "report" else found[1].containing(profile)

    return score


_DENSE = 24  # a column with more than one row in so many is kept dense: adding it is then one pass without indices


class _Column:
    """How strongly the rows hold one concept. rows: None where `values` has one entry per row."""

    def __init__(self, values: Scores) -> None:
        held = np.flatnonzero(values).astype(np.int32)
        self.count = len(held)
        dense = self.count * _DENSE > len(values)
        self.rows = None if dense else held
        self.values = values if dense else values[held]

    def add_to(self, total: Scores, factor: float, cap: float | None = None) -> None:
        """total += factor * min(strength, cap)."""
        values = self.values if cap is None or cap >= 1 else np.minimum(self.values, np.float32(cap))
        if factor != 1:
            values = values * np.float32(factor)
        if self.rows is None:
            total += values
        else:
            total[self.rows] += values

    def raise_to(self, total: Scores, factor: float) -> None:
        """total = max(total, factor * strength)."""
        values = self.values * np.float32(factor)
        if self.rows is None:
            np.maximum(total, values, out=total)
        else:
            total[self.rows] = np.maximum(total[self.rows], values)

    def put(self, total: Scores, value: float) -> None:
        """`value` in the rows that hold the concept."""
        total[self.values > 0 if self.rows is None else self.rows] = value


class _Columns:
    """The profiles of all rows of an index, by concept. Made once per published state."""

    def __init__(self, by: Measure, postings: Postings) -> None:
        self.by = by
        self.size = postings.size
        self.asserted: dict[str, _Column] = {}
        self.denied: dict[str, _Column] = {}
        said: dict[str, dict[Assertion, NDArray[np.int32]]] = {}
        for concept, assertion in postings.concepts():
            said.setdefault(concept, {})[Assertion(assertion)] = postings.rows(concept, assertion)
        for concept, rows in said.items():
            self._read(concept, rows)
        index = by.index
        self.spread = self._inherited(lambda steps: index.decay**steps if steps <= index.depth else 0.0)
        self.closed = self._inherited(lambda steps: index.narrower**steps)
        self.totals = self._total({c: (column, by.weight(c)) for c, column in self.spread.items()})
        self.raw_totals = self._total({c: (column, by.weight(c)) for c, column in self.asserted.items()})
        self.denials = self._total({c: (column, 1.0) for c, column in self.denied.items()})

    def _read(self, concept: str, rows: Mapping[Assertion, NDArray[np.int32]]) -> None:
        bits = np.zeros(self.size, np.int8)
        order = (Assertion.affirmed, Assertion.uncertain, Assertion.negated)
        for bit, assertion in enumerate(order):
            if assertion in rows:
                bits[rows[assertion]] |= 1 << bit
        strengths = np.array([self.by.strength({a for n, a in enumerate(order) if b >> n & 1}) for b in range(8)])
        values = strengths[bits].astype(np.float32)
        asserted = _Column(values)
        denied = _Column(((bits > 0) & (values == 0)).astype(np.float32))
        if asserted.count:
            self.asserted[concept] = asserted
        if denied.count:
            self.denied[concept] = denied

    def _inherited(self, share: Callable[[int], float]) -> dict[str, _Column]:
        """Strengths with those that ancestors inherit, `share` by distance."""
        sources: dict[str, list[tuple[str, float]]] = {}
        for concept in self.asserted:
            for above, distance in self.by.above(concept).items():
                if factor := share(distance) if distance else 1.0:
                    sources.setdefault(above, []).append((concept, factor))
        out = {}
        for above, lenders in sources.items():
            if len(lenders) == 1 and lenders[0][0] == above:
                out[above] = self.asserted[above]
                continue
            values = np.zeros(self.size, np.float32)
            for concept, factor in lenders:
                self.asserted[concept].raise_to(values, factor)
            out[above] = _Column(values)
        return out

    def _total(self, columns: Mapping[str, tuple[_Column, float]]) -> Scores:
        total = np.zeros(self.size, np.float32)
        for column, weight in columns.values():
            column.add_to(total, weight)
        return total

    def alike(self, query: Profile) -> Scores:
        """(N,) similarities to a report."""
        if not query.asserted:
            return self._denials(query, slice(None)) / (1 + self.raw_totals)
        spread = self.by.spread(query.asserted)
        shared = np.zeros(self.size, np.float32)
        for concept, strength in spread.items():
            weight = self.by.weight(concept)
            if weight and concept in self.spread:
                self.spread[concept].add_to(shared, weight, strength)
        rows = np.flatnonzero(shared > 0)  # of booleans: much faster than of floats
        inside = shared[rows]
        own = np.float32(self.by.total(spread)) - inside
        other = self.totals[rows] - inside
        scores = self.by.ratio(inside, own, other, self._contradicted(query)[rows])
        out = np.zeros(self.size, np.float32)
        out[rows] = scores + np.float32(DENIALS) * self._denials(query, rows)
        return out

    def _denials(self, query: Profile, rows: NDArray[np.int64] | slice) -> Scores:
        """Dice index of the denied sets, for these rows."""
        both = self._total({c: (self.denied[c], 1.0) for c in query.denied if c in self.denied})[rows]
        either = self.denials[rows] + np.float32(len(query.denied))
        return np.asarray(2 * both / np.maximum(either, np.float32(1)))

    def _contradicted(self, query: Profile) -> Scores:
        columns = {c: (self.asserted[c], self.by.weight(c)) for c in query.denied if c in self.asserted}
        for concept, strength in query.asserted.items():
            if concept in self.denied:
                columns[concept] = self.denied[concept], self.by.weight(concept) * strength
        return self._total(columns)

    def containing(self, query: Profile) -> Scores:
        """(N,) share of what a phrase says that the rows answer; 0 for rows that contradict as much as they answer.

        What was typed was meant: concepts count alike here, but for anatomy.
        """
        weights = {concept: float(self.by.weight(concept) > 0) for concept in (*query.asserted, *query.denied)}
        if not any(weights.values()):
            weights = dict.fromkeys(weights, 1.0)
        whole = sum(weights.values()) or 1.0
        total = np.zeros(self.size, np.float32)
        for concept in query.asserted:
            total += np.float32(weights[concept] / whole) * self._answers(concept)
        for concept in query.denied:
            if concept in self.denied:
                self.denied[concept].add_to(total, weights[concept] / whole)
            if concept in self.closed:
                self.closed[concept].add_to(total, -weights[concept] / whole)
        return np.maximum(total, 0)

    def _answers(self, concept: str) -> Scores:
        """What the rows say of an asserted concept: it, one below it, or at least one near it; denying it costs."""
        values = np.zeros(self.size, np.float32)
        for above, distance in self.by.above(concept).items():
            factor = self.by.index.related if distance else 1.0
            if distance <= 1 and factor and above in self.closed:
                self.closed[above].raise_to(values, factor)
        if concept in self.denied:
            self.denied[concept].put(values, -1.0)
        return values
