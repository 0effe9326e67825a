"""What is left when something breaks off, and what travels along with what was meant."""

from __future__ import annotations

from mutation import Mutation

CATALOGUE = [
    Mutation(
        "a sealing's journal goes on behind half a line",
        "data/journal.py",
        "        if self._broken:\n",
        "        if False:\n",
        "tests/data/test_resume.py -k could_not_be_written",
        more=(("                os.ftruncate(self._fd, whole)\n", "                pass\n"),),
    ),
    Mutation(
        "a split is put into the manifest under a key that is gone",
        "crypto/keys.py",
        "            self._require_kept()\n",
        "",
        "tests/data/test_interruptions.py -k destroyed_while",
    ),
]
