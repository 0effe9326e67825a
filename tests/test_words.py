"""The word list of ``make lint`` finds planted words, and passes others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _words(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci/words.py"), *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("Encrypted for whoever reads it.", "whoever"),
        ("# Nobody's key.", "Nobody"),
        ('raise ValueError("somebody else")', "somebody"),
        ("| `x` | anyone |", "anyone"),
    ],
)
def test_a_planted_word_is_found_with_file_and_line(tmp_path: Path, line: str, word: str) -> None:
    planted = tmp_path / "planted.md"
    planted.write_text(f"A clean line.\n{line}\n", encoding="utf-8")
    run = _words(planted)
    assert run.returncode == 1
    assert f"{planted}:2: {word!r}" in run.stdout


def test_a_raises_entry_states_its_condition(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    entries = "        ConfigError: if it is wrong.\n        DataError: It is.\n"
    planted.write_text(f'"""Do.\n\n    Raises:\n{entries}"""\n', encoding="utf-8")
    run = _words(planted)
    assert (run.returncode, run.stdout.count("\n")) == (1, 1)
    assert f"{planted}:5: 'Raises:' entry" in run.stdout


def test_names_of_tests_and_other_words_pass(tmp_path: Path) -> None:
    clean = tmp_path / "clean.py"
    clean.write_text("test_nobody_is_told = 'somebodys'\n", encoding="utf-8")
    assert _words(clean).returncode == 0
