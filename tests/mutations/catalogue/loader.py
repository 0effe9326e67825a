"""Reading in batches: what is kept, what is refused, and what a resumed run has seen."""

from __future__ import annotations

from mutation import Mutation

RESUME = "tests/data/loader/test_resume.py"

CATALOGUE = [
    Mutation(
        "a batch that somebody keeps is overwritten",
        "data/reading/batch_buffers.py",
        "weakref.finalize(lent, spare.append, memory).atexit = False",
        "spare.append(memory)",
        "tests/data/test_buffers.py -k kept",
    ),
    Mutation(
        "a segment is decrypted over rows that another thread has put in place",
        "data/reading/batch_buffers.py",
        " if start + length <= until * item_bytes else None",
        "",
        "tests/data/loader/test_loader.py -k rows_of_another_thread",
    ),
    Mutation(
        "what a decrypting thread refuses is handed out",
        "data/loader/prefetch.py",
        "                    future.result()",
        "                    future.exception()",
        "tests/data/loader/test_loader.py -k altered_segment_reaches",
    ),
    Mutation(
        "a segment is used that is not what random access asked for",
        "data/reading/dataset.py",
        "            for other in others:\n                other.result()\n",
        "",
        "tests/data/loader/test_loader.py -k altered_segment_yields",
    ),
    Mutation(
        "an epoch is resumed on other rows",
        "data/loader/position.py",
        'if state["content"] != content:',
        "if False:",
        f"{RESUME} -k other_bytes",
    ),
    Mutation(
        "an epoch is resumed in another order",
        "data/loader/loader.py",
        "if digest(self._line(position.epoch)) != position.order:",
        "if False:",
        f"{RESUME} -k changed",
    ),
    Mutation(
        "a resumed run sees rows again",
        "data/loader/loader.py",
        "            left = resumed.left\n        else:",
        "            left = (Interval(0, len(self._dataset)),)\n        else:",
        f"{RESUME} -k any_number",
    ),
    Mutation(
        "a batch that was not trained on counts as seen",
        "data/loader/loader.py",
        "if self._trained_batches is not None:",
        "if False:",
        f"{RESUME} -k not_finished",
    ),
    Mutation(
        "rows are dropped when the number of processes changes",
        "data/datamodule.py",
        "                _count_from(trainer, loader.batches_done)",
        "                pass",
        f"{RESUME} -k change_of_batches",
    ),
    Mutation(
        "the order of rows depends on which columns are read",
        "data/reading/column_groups.py",
        "if len(self._all) == 1:",
        "if True:",
        "tests/data/loader/test_groups.py -k goes_on_in_the_middle",
    ),
]
