"""RadGraph-XL as a source of mentions, imported only when it is named: it loads torch.

The `radgraph` package and its weights are not shipped. Its annotations are entities with tokens, a label such as
``Observation::definitely absent`` and relations; observations are linked by their words, together with the anatomy
that modifies them or alone, and keep RadGraph's own assertion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ontology.linker import Dictionary
from ontology.tables import Tables
from retrieval.errors import BackendError, NotFound
from retrieval.types import Assertion, Finding

Annotate = Callable[[list[str]], Mapping[str, Any]]
ASSERTIONS = {
    "definitely present": Assertion.affirmed,
    "definitely absent": Assertion.negated,
    "uncertain": Assertion.uncertain,
}


class RadGraph(Dictionary):
    """A linker over RadGraph's annotations. `annotate` is the package's model, or a stand-in."""

    def __init__(self, tables: Tables, annotate: Annotate | None = None, model: str = "radgraph-xl") -> None:
        super().__init__(tables)
        self.annotate = annotate or _load(model)
        self.digest = hashlib.sha256(f"{self.digest} {model}".encode()).hexdigest()

    def link(self, texts: Sequence[str]) -> list[tuple[Finding, ...]]:
        """Findings of document texts. Raises BackendError where the model answers in another shape."""
        filled = [text for text in texts if text.strip()]
        answers = iter(self.annotate(filled).items()) if filled else iter(())
        try:
            found = {text: answer for text, (_, answer) in zip(filled, answers, strict=True)}
            return [self._observations(text, found[text]) if text in found else () for text in texts]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BackendError(
                "RadGraph answered in a shape that is not known; install the radgraph release"
            ) from error

    def _observations(self, text: str, annotation: Mapping[str, Any]) -> tuple[Finding, ...]:
        entities: Mapping[str, Any] = annotation["entities"]
        places = _places(text, annotation["text"].split())
        modifiers: dict[str, list[str]] = {}
        for key, entity in entities.items():
            for relation, other in entity["relations"]:
                if relation in ("modify", "located_at"):
                    modifiers.setdefault(other if relation == "modify" else key, []).append(
                        key if relation == "modify" else other
                    )
        findings = []
        for key, entity in entities.items():
            kind, _, state = entity["label"].partition("::")
            number = (
                self._concept(entity, [entities[m] for m in modifiers.get(key, ())]) if kind == "Observation" else None
            )
            if number is not None:
                span = places[entity["start_ix"]][0], places[entity["end_ix"]][1]
                findings.append(Finding(self.tables.lexicon.concepts[number], ASSERTIONS[state], span))
        return tuple(sorted(findings, key=lambda finding: finding.span))

    def _concept(self, entity: Mapping[str, Any], modifiers: Sequence[Mapping[str, Any]]) -> int | None:
        """By the words with those that modify them, else by the words alone."""
        lexicon = self.tables.lexicon
        whole = " ".join([*(m["tokens"] for m in modifiers), entity["tokens"]])
        for surface in (whole, entity["tokens"]):
            named = [m.concept for m in lexicon.mentions(lexicon.vocabulary.words(surface), True) if not m.denies]
            named = [concept for concept in named if concept not in lexicon.anatomy]
            if named:
                return named[0]
        return None


def _places(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Where the model's tokens stand in the text."""
    places, at = [], 0
    for token in tokens:
        start = text.find(token, at)
        at = (start if start >= 0 else at) + len(token)
        places.append((at - len(token), at))
    return places


def _load(model: str) -> Annotate:
    try:
        from radgraph import RadGraph as Model  # type: ignore[import-not-found]
    except ImportError as error:
        raise NotFound(
            "ontology 'radgraph': the package is not installed; install radgraph, or use 'chest'"
        ) from error
    try:
        annotate: Annotate = Model(model_type=model)
        return annotate
    except (OSError, ValueError, KeyError) as error:
        raise NotFound(f"RadGraph: the weights of '{model}' are not there; download them, or use 'chest'") from error
