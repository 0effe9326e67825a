"""Rotates keys of a dataset until it is killed: ``python rotate_forever.py ROOT KEY KEY``.

For each line on its input it forks a process that goes on with rotations in an order drawn from
that line, and says its id. Forked, because importing torch takes longer than the whole test.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.key_rotation.rotate import (
    add_recipient,
    remove_recipient,
    rotate_data,
    rotate_kek,
    rotate_partition,
)


def main() -> None:
    root = Path(sys.argv[1])
    first, second = (LocalKeyProvider(path) for path in sys.argv[2:])
    trusted = [first.signer.public_key, second.signer.public_key]
    both = [LocalKeyProvider(path, trusted=trusted) for path in sys.argv[2:]]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            rotate(root, both, random.Random(line))
        say(str(child))
        os.waitpid(child, 0)
        say("ended")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def rotate(root: Path, both: list[LocalKeyProvider], draw: random.Random) -> None:
    while True:
        manifest = read_manifest(root, trusted=both[0].trusted_signers)
        holders = {key.key_id for key in manifest.partitions["train"]}
        keys, other = sorted(both, key=lambda one: one.key_id not in holders)
        step = draw.randrange(5)
        if step == 0 and len(holders) == 1:
            rotate_kek(root, keys=keys, to=other)
        elif step == 1:
            others = [other] if len(holders) == 2 else []
            rotate_partition(root, "train", keys=keys, recipients=others)
        elif step == 2 and len(holders) == 1:
            add_recipient(root, "train", keys=keys, recipient=other)
        elif step == 3 and len(holders) == 2:
            remove_recipient(root, "train", keys=keys, key_id=other.key_id)
        elif len(holders) == 1:
            rotate_data(root, "train", keys=keys)


if __name__ == "__main__":
    main()
