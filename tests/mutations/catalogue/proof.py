"""Content that somebody with a key wrote, and files that are none."""

from __future__ import annotations

from mutation import Mutation

FUZZ = "tests/attacks/test_fuzz.py"
FILES = "tests/attacks/test_files.py"

CATALOGUE = [
    Mutation(
        "a pipe in place of a shard hangs the reader, and a device is read",
        "util/files.py",
        "    if not stat.S_ISREG(os.fstat(fd).st_mode):",
        "    if False:",
        f"{FILES} -k 'no_file and (folder or endless)'",
    ),
    Mutation(
        "a manifest of any length is read into memory",
        "util/files.py",
        "        if size > limit:",
        "        if False:",
        f"{FILES} -k longer_than_any",
    ),
    Mutation(
        "a small envelope takes much memory before anybody knows who wrote it",
        "crypto/signing.py",
        '    if sum(map(data.count, (b"[", b"{", b","))) > _MAX_PARTS:',
        "    if False:",
        f"{FILES} -k 'many'",
    ),
    Mutation(
        "of a field that occurs twice, the last one counts",
        "crypto/encoding.py",
        "    if len(result) != len(pairs):",
        "    if False:",
        f"{FILES} -k occurs_twice",
    ),
    Mutation(
        "a checkpoint's header may hold what has no canonical form",
        "crypto/file_header.py",
        'header = parse_json_object(data, what="its header", canonical=True)',
        'header = parse_json_object(data, what="its header")',
        f"{FILES} -k 'header_to_choke and checkpoint'",
        (("type(header[name]) in kinds", "True"),),
    ),
    Mutation(
        "offsets that go back are followed",
        "data/format/columns.py",
        "offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())",
        "offsets[0] == 0",
        f"{FUZZ} -k 'segment_with_any_content and bytes'",
    ),
    Mutation(
        "bytes that belong to no column pass",
        "data/format/columns.py",
        "    return plaintext.count(0, start, stop) == stop - start",
        "    return True",
        f"{FUZZ} -k 'segment_with_any_content and all'",
    ),
    Mutation(
        "a truth value is any byte",
        "data/format/columns.py",
        "        _require(int(flat.view(torch.uint8).max()) <= 1)",
        "        pass",
        f"{FUZZ} -k 'segment_with_any_content and bool'",
    ),
    Mutation(
        "the fast way of reading takes any byte",
        "data/reading/decode_rows.py",
        "enumerate(segments if limits else ())",
        "enumerate(())",
        f"{FUZZ} -k 'fixed_rows and bool'",
    ),
    Mutation(
        "a manifest counts more rows than its shards have bytes",
        "crypto/entries.py",
        "        if total >= 2**63 or any(shard.records > shard.size for shard in shards):",
        "        if False:",
        "tests/crypto/test_manifest.py -k more_rows",
    ),
]
