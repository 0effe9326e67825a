from __future__ import annotations

import datetime as dt
import decimal

import numpy as np
import pytest

from lightning_secure.anonymize import (
    AnonymizationPlan,
    Generalize,
    Keep,
    Pseudonymize,
    Suppress,
)
from lightning_secure.data.format.columns import Column
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.sources.arrow import Fill, Stack, arrow_type
from lightning_secure.data.writing.seal import seal
from lightning_secure.errors import ConfigError, DataError, MissingExtraError

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
pq = pytest.importorskip("pyarrow.parquet")

N = 1000
TABLE = pa.table(
    {
        "f": np.linspace(0, 1, N, dtype="float32"),
        "i": pa.array(range(N), pa.int16()),
        "u": pa.array(range(N), pa.uint32()),
        "b": pa.array([i % 3 == 0 for i in range(N)]),
        "s": [f"text {i}" for i in range(N)],
        "c": pa.array([f"kind {i % 4}" for i in range(N)]).dictionary_encode(),
        "raw": pa.array([bytes([i % 256]) * (i % 5) for i in range(N)]),
        "d": pa.array([dt.date(1970, 1, 1) + dt.timedelta(i) for i in range(N)]),
        "t": pa.array([dt.datetime(2020, 1, 1) + dt.timedelta(hours=i) for i in range(N)]),
        "v": pa.array([[i, i + 0.5] for i in range(N)], pa.list_(pa.float32(), 2)),
        "r": pa.array([list(range(i % 4)) for i in range(N)], pa.list_(pa.int64())),
    }
)


def rows(root, keys, **options):
    data = EncryptedShardDataset(root, split="train", keys=keys, output="dict", **options)
    return data, data.__getitems__(range(len(data))).batch()


def sealed(source, root, keys, **options):
    seal(source, root, keys=keys, **options)
    return rows(root, keys)


def check(batch):
    assert np.array_equal(batch["f"], TABLE["f"].to_numpy())
    assert batch["i"].tolist() == list(range(N))
    assert batch["u"].tolist() == list(range(N))
    assert batch["b"].tolist() == TABLE["b"].to_pylist()
    assert batch["s"] == TABLE["s"].to_pylist()
    assert batch["c"] == TABLE["c"].to_pylist()
    assert batch["raw"] == TABLE["raw"].to_pylist()
    assert batch["d"].tolist() == list(range(N))
    assert batch["t"][:2].tolist() == [1577836800000000, 1577840400000000]
    assert batch["v"].tolist() == TABLE["v"].to_pylist()
    assert [row.tolist() for row in batch["r"]] == TABLE["r"].to_pylist()


def as_parquet(folder):
    pq.write_table(TABLE, folder / "t.parquet", row_group_size=77)
    return folder / "t.parquet"


def as_folder(folder):
    for start in range(0, N, 300):
        pq.write_table(TABLE.slice(start, 300), folder / f"part-{start:04d}.parquet")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: TABLE,
        lambda folder: pa.concat_tables([TABLE.slice(0, 10), TABLE.slice(10)]),
        lambda folder: TABLE.combine_chunks().to_batches()[0],
        lambda folder: TABLE.to_reader(max_chunksize=100),
        as_parquet,
        as_folder,
    ],
    ids=["table", "chunks", "batch", "reader", "parquet", "folder"],
)
def test_every_type_of_column_comes_back(tmp_path, keys, make):
    folder = tmp_path / "in"
    folder.mkdir()
    data, batch = sealed(make(folder), tmp_path / "out", keys)
    check(batch)
    kinds = {
        column.name: (column.kind, column.dtype, column.shape) for column in data.schema.columns
    }
    assert kinds["u"] == ("tensor", "int64", ())
    assert kinds["v"] == ("tensor", "float32", (2,))
    assert kinds["r"] == ("ragged", "int64", ())
    assert kinds["c"][0] == kinds["s"][0] == "string"
    remarks = data.entry.attributes
    assert remarks["unit.d"] == "date32[day] since 1970-01-01"
    assert remarks["unit.t"] == "timestamp[us] since 1970-01-01"


def test_a_pandas_frame_comes_back(tmp_path, keys):
    frame = TABLE.drop_columns(["v", "r"]).to_pandas()
    _, batch = sealed(frame, tmp_path, keys)
    assert batch["s"] == TABLE["s"].to_pylist()
    assert batch["c"] == TABLE["c"].to_pylist()
    assert np.array_equal(batch["f"], TABLE["f"].to_numpy())


def test_a_csv_comes_back(tmp_path, keys):
    lines = [
        "id,zip,x,born,note",
        *(f"{i},{i:05d},{i / 8},2000-01-0{i % 9 + 1},n{i}" for i in range(N)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data, batch = sealed(tmp_path / "t.csv", tmp_path / "o", keys, types={"zip": "string"})
    assert batch["id"].tolist() == list(range(N))
    assert batch["zip"][:2] == ["00000", "00001"]
    assert batch["x"].tolist() == [i / 8 for i in range(N)]
    assert batch["born"][0] == 10957
    assert batch["note"][7] == "n7"
    assert data.schema.columns[2] == Column("x", "tensor", "float64")


def test_tensors_of_arrow_come_back(tmp_path, keys):
    images = np.arange(24, dtype="uint8").reshape(2, 3, 4)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    _, batch = sealed(pa.table({"x": column}), tmp_path, keys)
    assert np.array_equal(batch["x"], images)


def test_columns_are_chosen_typed_and_stacked(tmp_path, keys):
    data, batch = sealed(
        TABLE, tmp_path, keys,
        columns=["s"], types={"i": "float64"}, stack={"x": Stack(columns=("i", "f"))},
    )  # fmt: skip
    assert data.schema.names == ("s", "x")
    assert batch["x"].shape == (N, 2)
    assert batch["x"].dtype.is_floating_point
    assert batch["x"][5].tolist() == [5.0, float(TABLE["f"][5].as_py())]


# ---------------------------------------------------------------- nulls


HOLES = {"a": [1.0, None, 3.0, 4.0], "b": [1, 2, None, 4], "s": ["x", "y", "z", None]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: pa.table(HOLES),
        lambda: pd.DataFrame(HOLES),
        lambda: pd.DataFrame({"a": [1.0, float("nan"), 3.0, 4.0]}),
        lambda: pa.table({"a": pa.array(["u", None], pa.dictionary(pa.int8(), pa.string()))}),
    ],
    ids=["arrow", "pandas", "nan", "category"],
)
def test_a_null_is_refused_with_its_column_and_row(tmp_path, keys, make):
    with pytest.raises(DataError, match="column 'a' has a null in row 1, counted from 0") as caught:
        seal(make(), tmp_path, keys=keys)
    assert caught.value.__context__ is None
    assert not list(tmp_path.rglob("*.lsec"))


def test_the_row_of_a_null_is_counted_through_the_whole_source(tmp_path, keys):
    values = [1.0] * 5000
    values[4321] = None
    pq.write_table(pa.table({"a": values}), tmp_path / "t.parquet", row_group_size=1000)
    with pytest.raises(DataError, match="row 4321"):
        seal(tmp_path / "t.parquet", tmp_path / "o", keys=keys)


def test_nulls_follow_a_declared_rule(tmp_path, keys):
    rules = {"a": "drop", "b": Fill(-1), "s": Fill("?")}
    data, batch = sealed(pa.table(HOLES), tmp_path, keys, nulls=rules)
    assert batch["a"].tolist() == [1.0, 3.0, 4.0]
    assert batch["b"].tolist() == [1, -1, 4]
    assert batch["s"] == ["x", "z", "?"]
    assert data.entry.attributes["nulls.a"] == "drop"


@pytest.mark.parametrize(
    "options",
    [
        {"nulls": {"a": Fill("text"), "b": "drop", "s": "drop"}},
        {"nulls": {"a": "mean", "b": "drop"}},
        {"nulls": {"z": "drop"}},
        {"columns": ["z"]},
        {"types": {"a": "decimal"}},
        {"types": {"z": "int8"}},
        {"stack": {"x": Stack(columns=("z",))}},
        {"stack": {"s": Stack(columns=("a",))}},
        {"stack": {"x": Stack(columns=("a",)), "y": Stack(columns=("a",))}},
    ],
)
def test_options_that_do_not_fit_the_table_are_refused(tmp_path, keys, options):
    with pytest.raises(ConfigError):
        seal(pa.table(HOLES), tmp_path, keys=keys, **options)


def test_a_stack_must_make_sense():
    for options in ({"columns": ()}, {"columns": ("a", "a")}, {"columns": ("a",), "dtype": "text"}):
        with pytest.raises(ConfigError):
            Stack(**options)
    with pytest.raises(ConfigError, match="'decimal'"):
        arrow_type("decimal")


# ---------------------------------------------------------------- what cannot be sealed


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (pa.array([2**63], pa.uint64()), "that int64 cannot hold"),
        (pa.array([decimal.Decimal("1.5")]), "decimal128"),
        (pa.array([dt.time(3)]), "time64"),
        (pa.array([dt.timedelta(3)]), "duration"),
        (pa.array([{"k": 1}]), "struct"),
        (pa.array([["a"]]), "string"),
        (pa.array([[1, None]]), "list with a null"),
        (pa.array([[["a"]]], pa.list_(pa.list_(pa.string(), 1), 1)), "list"),
        (pa.array([[1.0, float("nan")]], pa.list_(pa.float32(), 2)), "NaN"),
    ],
)
def test_types_and_values_that_cannot_be_sealed_are_refused(tmp_path, keys, array, words):
    with pytest.raises(DataError, match=words) as caught:
        seal(pa.table({"secret": array}), tmp_path, keys=keys)
    assert "'secret'" in str(caught.value)
    assert str(2**63) not in str(caught.value)
    assert caught.value.__context__ is None


def test_errors_of_arrow_do_not_carry_values(tmp_path, keys):
    lines = ["n,x", *(f"{i},1.5" for i in range(400_000)), "Ada Lovelace,2.5"]
    (tmp_path / "late.csv").write_text("\n".join(lines))
    (tmp_path / "early.csv").write_text("n,x\nAda Lovelace,2.5\n")
    (tmp_path / "odd.csv").write_text("n,x\nAda Lovelace\n")
    for name, options in (
        ("late", {}),
        ("early", {"types": {"n": "int64"}}),
        ("odd", {}),
    ):
        with pytest.raises(DataError) as caught:
            seal(tmp_path / f"{name}.csv", tmp_path / "o", keys=keys, **options)
        assert "Ada" not in str(caught.value)
        assert caught.value.__context__ is None
    with pytest.raises(DataError) as caught:
        seal(pa.table({"n": ["Ada"]}), tmp_path / "o", keys=keys, types={"n": "int8"})
    assert "Ada" not in str(caught.value)


def test_a_damaged_or_unequal_parquet_file_is_named(tmp_path, keys):
    (tmp_path / "in").mkdir()
    path = as_parquet(tmp_path / "in")
    (tmp_path / "in" / "u.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"u\.parquet"):
        seal(tmp_path / "in", tmp_path / "o", keys=keys)
    pq.write_table(pa.table({"z": [1]}), tmp_path / "in" / "u.parquet")
    with pytest.raises(DataError, match=r"u\.parquet.*other columns"):
        seal(tmp_path / "in", tmp_path / "o", keys=keys)
    data = bytearray(path.read_bytes())
    data[100:3000] = bytes(2900)
    path.write_bytes(data)
    with pytest.raises(DataError, match="beyond row"):
        seal(path, tmp_path / "o", keys=keys)


@pytest.mark.parametrize(
    "frame",
    [
        lambda: pd.DataFrame({"a": [1]}, index=pd.Index(["k"], name="key")),
        lambda: pd.DataFrame({"a": [1, "x"]}),
        lambda: pd.DataFrame([[1, 2]], columns=["a", "a"]),
    ],
)
def test_frames_that_would_lose_something_are_refused(tmp_path, keys, frame):
    with pytest.raises(DataError):
        seal(frame(), tmp_path, keys=keys)


def test_two_columns_of_one_name_are_refused(tmp_path, keys):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(DataError, match="one name"):
        seal(table, tmp_path, keys=keys)


# ---------------------------------------------------------------- anonymisation


PLAN = {"born": Generalize(date="year"), "name": Suppress(), "record": Pseudonymize(domain="p")}
PEOPLE = pa.table(
    {
        "name": ["Ada", "Bob"],
        "record": ["r1", "r2"],
        "born": pa.array([dt.date(1815, 12, 10), dt.date(1901, 1, 1)]),
        "x": [1.0, 2.0],
    }
)


def test_dates_are_generalised_before_they_are_sealed(tmp_path, keys):
    _, batch = sealed(PEOPLE, tmp_path, keys, anonymize=AnonymizationPlan(PLAN))
    assert batch["born"].tolist() == [1815, 1901]
    assert "name" not in batch
    assert all(len(text) == 32 for text in batch["record"])


@pytest.mark.parametrize("unit", ["s", "ns"])
def test_timestamps_are_generalised_too(tmp_path, keys, unit):
    stamps = pa.array([dt.datetime(1999, 5, 6, 7, 8, 9)], pa.timestamp(unit, "UTC"))
    plan = AnonymizationPlan({"t": Generalize(date="decade")})
    _, batch = sealed(pa.table({"t": stamps}), tmp_path, keys, anonymize=plan)
    assert batch["t"].tolist() == [1990]


def test_dates_that_the_plan_does_not_name_are_refused(tmp_path, keys):
    plan = {name: operator for name, operator in PLAN.items() if name != "born"}
    with pytest.raises(DataError, match="'born' holds dates"):
        seal(PEOPLE, tmp_path, keys=keys, anonymize=AnonymizationPlan(plan))
    _, batch = sealed(PEOPLE, tmp_path, keys, anonymize=AnonymizationPlan({**plan, "born": Keep()}))
    assert batch["born"].tolist() == [-56270, -25202]


def test_a_column_cannot_be_stacked_past_the_plan(tmp_path, keys):
    plan = AnonymizationPlan({**PLAN, "x": Suppress()})
    with pytest.raises(ConfigError, match="'x' is stacked"):
        seal(PEOPLE, tmp_path, keys=keys, anonymize=plan, stack={"f": Stack(columns=("x",))})


# ---------------------------------------------------------------- resuming, extras


@pytest.mark.parametrize("rules", [{}, {"f": "drop"}], ids=["all", "some"])
def test_a_table_goes_on_after_an_interruption(tmp_path, keys, rules):
    class UnpluggedError(Exception):
        pass

    def stop(done, total):
        if done > 500:
            raise UnpluggedError

    values = [None if i % 10 == 0 and rules else float(i) for i in range(N)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"f": pa.array(values), "i": range(N)}), path, row_group_size=50)
    options = {"keys": keys, "nulls": rules, "segment_bytes": 128, "shard_bytes": 1024}
    with pytest.raises(UnpluggedError):
        seal(path, tmp_path / "o", progress=stop, **options)
    done = seal(path, tmp_path / "o", resume=True, **options)
    assert done.resumed["train"] > 350
    _, batch = rows(tmp_path / "o", keys)
    assert batch["i"].tolist() == [i for i in range(N) if values[i] is not None]


def test_how_a_table_is_chunked_does_not_make_it_another(keys):
    from lightning_secure.data.sources import open_source

    chunked = pa.concat_tables([TABLE.slice(0, 10), TABLE.slice(10)])
    assert open_source(TABLE).identity() == open_source(chunked).identity()
    assert open_source(TABLE).identity() != open_source(TABLE.slice(1)).identity()
    assert open_source(TABLE).identity() != open_source(TABLE, columns=["f"]).identity()


def test_without_pyarrow_the_extra_is_named(tmp_path, keys, monkeypatch):
    import sys

    (tmp_path / "t.csv").write_text("a\n1\n")
    frame = pd.DataFrame({"a": [1]})
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what a missing package looks like
    for source in (tmp_path / "t.csv", frame):
        with pytest.raises(MissingExtraError, match=r"lightning-secure\[tables\]"):
            seal(source, tmp_path / "o", keys=keys)
