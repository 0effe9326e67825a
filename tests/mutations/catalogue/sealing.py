"""Sealing from sources, by several threads, on several machines, and after an interruption."""

from __future__ import annotations

from mutation import Mutation

RESUME = "tests/data/test_resume.py"
SOURCES = "tests/data/sources"

CATALOGUE = [
    Mutation(
        "lines of a sealing's journal can be taken out",
        "data/writing/progress_log.py",
        'or (value["seq"], value["previous"]) != (self._seq, self._digest)',
        "or False",
        f"{RESUME} -k 'tampered and gap'",
    ),
    Mutation(
        "a sealing goes on from another source",
        "data/writing/resume.py",
        "if mark != earlier.source:",
        "if False:",
        f"{RESUME} -k another_source",
    ),
    Mutation(
        "a sealing goes on from shards that were exchanged",
        "data/writing/resume.py",
        "        _verify(folder, dataset.dataset_id, partition, earlier)\n",
        "",
        f"{RESUME} -k finished_shard",
    ),
    Mutation(
        "starting anew removes shards that the manifest names",
        "data/writing/progress_log.py",
        'if f"{folder.name}/{name}" not in keep:',
        "if True:",
        f"{RESUME} -k between_manifest",
    ),
    Mutation(
        "rows that were sealed before are sealed again",
        "data/writing/seal.py",
        "for columns in source.batches(writer.records - writer.unseen):",
        "for columns in source.batches():",
        f"{RESUME} -k goes_on_from_the_last",
    ),
    Mutation(
        "shards are numbered as they are done",
        "data/writing/shard_queue.py",
        "while self._running and self._running[0].done():\n"
        "            self._take(self._running.popleft().result())",
        "for future in [one for one in self._running if one.done()]:\n"
        "            self._running.remove(future)\n"
        "            self._take(future.result())",
        "tests/data/test_seal.py -k side_by_side",
    ),
    Mutation(
        "pictures keep what the camera wrote",
        "data/sources/metadata.py",
        "or marker in _JPEG_PARTS:",
        "or marker != 0xDA:",
        f"{SOURCES}/test_images.py -k bit_for_bit",
    ),
    Mutation(
        "a null becomes a NaN",
        "data/sources/arrow.py",
        "        if array.null_count:\n            rule",
        "        if False:\n            rule",
        f"{SOURCES}/test_tables.py -k 'refused_with_its and arrow'",
    ),
    Mutation(
        "rows that a Ray task lost or doubled are not missed",
        "data/writing/ray_sink.py",
        "if len(set(numbers)) != len(numbers) or sealed + dropped != rows:",
        "if False:",
        "tests/data/test_ray.py -k lost_doubled",
    ),
    Mutation(
        "the options of a sealing show a storage's password",
        "data/writing/seal_options.py",
        "kw_only=True, repr=False)",
        "kw_only=True)",
        "tests/data/test_seal.py -k password",
    ),
    Mutation(
        "an interruption before the sealing begins is a traceback",
        "cli/seal.py",
        "    console, options = Console(stderr=True), dict[str, Any]()\n",
        "    console = Console(stderr=True)\n",
        "tests/cli/test_seal.py -k interruption_while",
    ),
]
