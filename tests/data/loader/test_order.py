from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_secure.data.loader.epoch_order import (
    EpochLine,
    Interval,
    deal,
    digest,
    left_after,
    without,
)

RECORDS = [70, 5, 64, 1, 33]
PER_SEGMENT = [8, 5, 7, 1, 10]
SHAPES = [
    (-(-rows // each), rows, each, 100) for rows, each in zip(RECORDS, PER_SEGMENT, strict=True)
]


def line(*, records=RECORDS, shapes=SHAPES, **options):
    options = {"seed": 3, "epoch": 0, "shuffle": True, "window_bytes": 300, **options}
    return EpochLine(records, [segments for segments, *_ in shapes], **options)


def rows_of(epoch: EpochLine, *, shapes=SHAPES, wanted=lambda start, stop: True) -> dict[int, int]:
    """Return the row of the split at each position of the line."""
    first = np.cumsum([0, *(rows for _, rows, _, _ in shapes)])
    found = {}
    for group in epoch.groups():
        picked = [shapes[shard] for shard in group.shards]
        for window in epoch.windows(group, picked, wanted=wanted):
            for index, (shard, segment) in enumerate(
                zip(window.shards.tolist(), window.segments.tolist(), strict=True)
            ):
                targets = window.targets[window.starts[index] : window.starts[index + 1]]
                targets = (window.start + targets).tolist()
                number = int(group.shards[shard])
                start = int(first[number]) + segment * shapes[number][2]
                for row, target in enumerate(targets, start):
                    assert target not in found
                    found[target] = row
    return found


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_line_has_each_row_once(shuffle):
    order = rows_of(line(shuffle=shuffle))
    assert sorted(order) == sorted(order.values()) == list(range(sum(RECORDS)))
    assert ([order[i] for i in range(len(order))] == list(range(len(order)))) is not shuffle


def test_the_order_depends_on_seed_and_epoch_alone():
    base = rows_of(line())
    assert rows_of(line()) == base
    others = [line(seed=4), line(epoch=1), line(seed=2**64 - 1, epoch=2**64 - 1)]
    assert all(rows_of(other) != base for other in others)
    assert len({digest(other) for other in [line(), *others]}) == 4


def test_the_order_is_the_one_that_earlier_versions_had():
    """Philox and this use of it may never change: a checkpoint says what is left of an order."""
    order = rows_of(line())
    assert [order[i] for i in range(12)] == [60, 77, 8, 58, 61, 78, 12, 15, 76, 59, 80, 10]
    assert digest(line())[:16] == "76eccfcf68f264d9"


def test_rows_of_many_shards_are_near_each_other():
    shapes = [(10, 80, 8, 100)] * 40
    epoch = line(records=[80] * 40, shapes=shapes, window_bytes=1600)
    assert [len(group.shards) for group in epoch.groups()] == [16, 16, 8]
    order = rows_of(epoch, shapes=shapes)
    near = {order[position] // 80 for position in range(128)}
    assert len(near) > 8


def test_shards_of_very_many_segments_are_not_opened_together():
    shapes = [(2**20, 2**20, 1, 1)] * 3
    epoch = line(records=[2**20] * 3, shapes=shapes)
    assert [len(group.shards) for group in epoch.groups()] == [1, 1, 1]


def test_windows_that_nobody_wants_are_left_out():
    some = rows_of(line(), wanted=lambda start, stop: start < 20)
    assert 20 <= len(some) < 60
    assert some.items() <= rows_of(line()).items()


def flat(intervals):
    return [position for start, stop in intervals for position in range(start, stop)]


@st.composite
def remains(draw):
    cuts = sorted(draw(st.sets(st.integers(0, 200), min_size=2, max_size=8)))
    return [Interval(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=False)]


WORLDS, BATCHES = st.integers(1, 7), st.integers(1, 9)


@given(left=remains(), world_size=WORLDS, batch_size=BATCHES, drop_last=st.booleans())
def test_everybody_gets_as_many_batches_and_each_row_once(left, world_size, batch_size, drop_last):
    options = {"world_size": world_size, "batch_size": batch_size, "drop_last": drop_last}
    shares = [deal(left, rank=rank, **options) for rank in range(world_size)]
    steps = {share.steps for share in shares}
    assert len(steps) == 1
    dealt = [flat(share.intervals) for share in shares]
    assert [len(rows) for rows in dealt] == [share.rows for share in shares]
    for share in shares:
        bounds = [share.bound(step) for step in range(share.steps + 1)]
        sizes = np.diff(bounds)
        assert bounds[0] == 0
        assert bounds[-1] == share.rows
        assert ((sizes >= 1) & (sizes <= batch_size)).all()
        assert not drop_last or (sizes == batch_size).all()
    everything, total = sorted(itertools.chain(*dealt)), flat(left)
    if drop_last:
        assert len(set(everything)) == len(everything) == steps.pop() * world_size * batch_size
        assert set(everything) <= set(total)
    else:
        assert set(everything) == set(total)
        if len(total) >= world_size and batch_size > 1:
            assert everything == total


@given(left=remains(), batch_size=BATCHES, worlds=st.lists(WORLDS, min_size=1, max_size=4),
       data=st.data())  # fmt: skip
def test_a_run_that_is_broken_off_again_and_again_reads_each_row(left, batch_size, worlds, data):
    total, seen = flat(left), []
    for turn, world_size in enumerate(worlds):
        options = {"world_size": world_size, "batch_size": batch_size, "drop_last": False}
        shares = [deal(left, rank=rank, **options) for rank in range(world_size)]
        last = turn == len(worlds) - 1
        step = shares[0].steps if last else data.draw(st.integers(0, shares[0].steps))
        for share in shares:
            seen += flat(share.intervals)[: share.bound(step)]
        left = left_after(left, step, **options)
    assert left == []
    assert set(seen) == set(total)
    if len(total) > 7 * 9 and batch_size > 1 and all(w == 1 for w in worlds):
        assert sorted(seen) == total


@given(left=remains(), world_size=WORLDS, batch_size=BATCHES, data=st.data())
def test_as_many_processes_go_on_as_if_nothing_had_happened(left, world_size, batch_size, data):
    options = {"world_size": world_size, "batch_size": batch_size, "drop_last": False}
    if sum(stop - start for start, stop in left) < world_size or batch_size == 1:
        return
    before = [deal(left, rank=rank, **options) for rank in range(world_size)]
    step = data.draw(st.integers(0, before[0].steps))
    rest = left_after(left, step, **options)
    for rank, share in enumerate(before):
        after = deal(rest, rank=rank, **options)
        assert after.steps == share.steps - step
        assert flat(after.intervals) == flat(share.intervals)[share.bound(step) :]


def test_rows_are_repeated_where_the_loader_says_so_and_nowhere_else():
    for rows, world_size, batch_size in itertools.product(range(1, 20), range(1, 7), range(1, 4)):
        options = {"world_size": world_size, "batch_size": batch_size, "drop_last": False}
        shares = [deal([Interval(0, rows)], rank=rank, **options) for rank in range(world_size)]
        more = sum(share.rows for share in shares) - rows
        expected = (batch_size == 1 and rows % world_size != 0) or rows < world_size
        assert (more > 0) == expected, (rows, options)
        assert more < world_size


def test_what_is_taken_away_is_gone():
    left = [Interval(0, 10), Interval(20, 30)]
    assert without(left, []) == left
    assert without(left, [Interval(0, 30)]) == []
    assert without(left, [Interval(2, 4), Interval(4, 5), Interval(8, 22), Interval(21, 23)]) == [
        Interval(0, 2),
        Interval(5, 8),
        Interval(23, 30),
    ]
