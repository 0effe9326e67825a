"""Hold two rules of language: no word that hides the party, and ``Raises: X: if ...``.

Usage: ``python .ci/words.py [FILE ...]``. Without files, reads the tracked Python, Markdown and
TOML files of the package, docs, examples, benchmarks, .ci and of the root folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Word lists, with the terms to use in their place.
FORBIDDEN = {
    "whoever whomever whosoever": "name the party: the caller, the sealer, an attacker",
    "nobody noone": "name the party that does not, or use the passive",
    "somebody someone": "name the party: another user, another process",
    "everybody everyone": "say which: all readers, all ranks",
    "anybody anyone": "say which: an attacker, other users",
}
#: An entry of a docstring's ``Raises:`` that does not state its condition.
RAISES = re.compile(r"^\s{4,}[A-Z]\w*Error: (?!if\b)")
PLACES = ("lightning_secure", "docs", "examples", "benchmarks", ".ci")
SUFFIXES = (".py", ".md", ".toml")


def tracked() -> Iterator[Path]:
    """Yield the files that are held to the word list; this one is not."""
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        path = Path(name)
        held = len(path.parts) == 1 or path.parts[0] in PLACES
        held = held and path.suffix in SUFFIXES and path.is_file()
        if held and not path.samefile(__file__):
            yield path


def findings(paths: Iterable[Path]) -> Iterator[str]:
    """Yield a line ``file:line: word: advice`` for each breach."""
    advice = {word: text for words, text in FORBIDDEN.items() for word in words.split()}
    pattern = re.compile(rf"\b({'|'.join(advice)})\b", re.IGNORECASE)
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for word in pattern.findall(line):
                yield f"{path}:{number}: {word!r}: {advice[word.lower()]}"
            if path.suffix == ".py" and RAISES.match(line):
                yield f"{path}:{number}: 'Raises:' entry: begin with 'if'"


if __name__ == "__main__":
    found = list(findings([Path(name) for name in sys.argv[1:]] or tracked()))
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.exit(bool(found))
