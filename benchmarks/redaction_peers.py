"""Runs in the peers' environment: what detect-secrets, Presidio and DataFog find in given texts.

Reads ``{"texts": [...], "throughput": [...]}`` from standard input. Writes, for every peer that is
installed, the spans found in each text, and in how many seconds it went through the texts of
``throughput``. Presidio runs with its pattern recognizers and a blank spaCy pipeline: no model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

Spans = list[tuple[int, int]]


def detect_secrets() -> Callable[[str], Spans]:
    """Return its regular expressions; its entropy plugins are left out, as we do."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    kinds: list[Any] = list(get_mapping_from_secret_type_to_class().values())
    patterns = [p for k in kinds if issubclass(k, RegexBasedDetector) for p in k().denylist]
    return lambda text: [m.span() for p in patterns for m in p.finditer(text)]


def presidio() -> Callable[[str], Spans]:
    import spacy
    import tldextract.tldextract
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    class Blank(SpacyNlpEngine):  # type: ignore[misc]
        def load(self) -> None:
            self.nlp = {"en": spacy.blank("en")}

        def is_loaded(self) -> bool:
            return True

    # With the list that it brings along: it would fetch one from the network.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())
    engine = Blank()
    engine.load()
    analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
    kinds = [e for e in analyzer.get_supported_entities() if e not in ("URL", "DATE_TIME")]
    return lambda text: [(r.start, r.end) for r in analyzer.analyze(text, "en", entities=kinds)]


def datafog() -> Callable[[str], Spans]:
    from datafog.processing.text_processing.regex_annotator import RegexAnnotator

    annotator = RegexAnnotator()
    # Dates and postcodes are not asked of anybody here.
    kinds = ("EMAIL", "PHONE", "SSN", "CREDIT_CARD", "IP_ADDRESS")

    def find(text: str) -> Spans:
        _, result = annotator.annotate_with_spans(text)
        return [(s.start, s.end) for s in result.spans if s.label in kinds]

    return find


def answers(asked: dict[str, list[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    peers = {
        "detect-secrets": ("detect-secrets", detect_secrets),
        "presidio": ("presidio-analyzer", presidio),
        "datafog": ("datafog", datafog),
    }
    for name, (package, make) in peers.items():
        try:
            find = make()
            spans = [find(text) for text in asked["texts"]]
        except Exception as error:  # noqa: BLE001 # a peer that does not run is reported as that
            yield name, {"failed": f"{type(error).__name__}: {error}"[:200]}
            continue
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for text in asked["throughput"]:
                find(text)
            best = min(best, time.perf_counter() - start)
        yield name, {"version": version(package), "spans": spans, "seconds": best}


if __name__ == "__main__":
    json.dump(dict(answers(json.load(sys.stdin))), sys.stdout)
