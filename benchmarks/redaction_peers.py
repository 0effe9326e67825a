"""Runs in the peers' environment: what detect-secrets, Presidio and DataFog find in given texts.

Is spoken to in lines of JSON. ``{"find": [...]}`` is answered with what every peer that is
installed found in each text, as ``[start, end, kind]``; ``{"time": name, "texts": [...]}`` with how
many seconds of CPU time that peer takes for them. Presidio runs with its pattern recognizers and a
blank spaCy pipeline: no model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final

Spans = list[tuple[int, int, str]]
Find = Callable[[str], Spans]

#: What a peer calls what it finds, and what the benchmark does.
KINDS: Final = {
    "EMAIL": "e-mail", "EMAIL_ADDRESS": "e-mail",
    "IBAN_CODE": "iban",
    "IP_ADDRESS": "ip",
    "CREDIT_CARD": "card",
    "PHONE": "phone", "PHONE_NUMBER": "phone",
    "SSN": "ssn", "US_SSN": "ssn",
    **dict.fromkeys(
        ("DE_TAX_ID", "ES_NIE", "ES_NIF", "FI_PERSONAL_IDENTITY_CODE", "IT_FISCAL_CODE",
         "PL_PESEL", "SE_PERSONNUMMER", "UK_NHS", "UK_NINO"),
        "national number",
    ),
}  # fmt: skip


def detect_secrets() -> Find:
    """Return its regular expressions; its entropy plugins are left out, as we do."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    kinds: list[Any] = list(get_mapping_from_secret_type_to_class().values())
    patterns = [p for k in kinds if issubclass(k, RegexBasedDetector) for p in k().denylist]
    return lambda text: [(*m.span(), "secret") for p in patterns for m in p.finditer(text)]


def presidio() -> Find:
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
    asked = [e for e in analyzer.get_supported_entities() if e not in ("URL", "DATE_TIME")]
    return lambda text: [
        (r.start, r.end, KINDS.get(r.entity_type, "other"))
        for r in analyzer.analyze(text, "en", entities=asked)
    ]


def datafog() -> Find:
    from datafog.processing.text_processing.regex_annotator import RegexAnnotator

    annotator = RegexAnnotator()
    # Dates and postcodes are not asked of any library here.
    asked = ("EMAIL", "PHONE", "SSN", "CREDIT_CARD", "IP_ADDRESS")

    def find(text: str) -> Spans:
        _, result = annotator.annotate_with_spans(text)
        return [(s.start, s.end, KINDS[s.label]) for s in result.spans if s.label in asked]

    return find


PEERS: Final[dict[str, tuple[str, Callable[[], Find]]]] = {
    "detect-secrets": ("detect-secrets", detect_secrets),
    "presidio": ("presidio-analyzer", presidio),
    "datafog": ("datafog", datafog),
}


def main() -> None:
    ready: dict[str, Find] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        if "time" in asked:
            find = ready[asked["time"]]
            passes, start = 0, time.process_time()
            while (took := time.process_time() - start) < 0.05:
                for text in asked["texts"]:
                    find(text)
                passes += 1
            answer["seconds"] = took / passes
        else:
            for name, (package, make) in PEERS.items():
                try:
                    ready[name] = find = make()
                    spans = [find(text) for text in asked["find"]]
                except Exception as error:  # noqa: BLE001 # one that does not run is reported so
                    answer[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
                    continue
                answer[name] = {"version": version(package), "spans": spans}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
