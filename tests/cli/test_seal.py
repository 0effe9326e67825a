from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lightning_secure import cli
from lightning_secure.anonymize import Keep, Suppress
from lightning_secure.cli.seal import read_config
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.sources.arrow import Fill, Stack
from lightning_secure.data.writing.split_rules import SplitByColumn
from lightning_secure.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "seal.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a key; paths of a configuration are relative to it."""
    monkeypatch.chdir(tmp_path)
    LocalKeyProvider.generate("project.kek")
    Path("t.csv").write_text("x,y\n" + "".join(f"{i}.5,{i}\n" for i in range(200)))
    return tmp_path


def run(*arguments: object, config: str | Path | None = "keys: {kind: local, path: project.kek}"):
    if isinstance(config, str):
        Path("seal.yaml").write_text(config)
        config = Path("seal.yaml")
    return CliRunner().invoke(cli.main, ["seal", *map(str, arguments), "--config", str(config)])


def dataset(root="o", split="train", **options):
    keys = LocalKeyProvider("project.kek")
    return EncryptedShardDataset(root, split=split, keys=keys, **options)


def test_the_example_seals_a_hospitals_table(here):
    from faker import Faker
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    fake = Faker("en_GB")
    fake.seed_instance(7)
    people = [
        {"name": fake.name(), "email": fake.email(), "born": fake.date_of_birth().isoformat(),
         "postcode": fake.postcode(), "record": f"R{number:06d}"}
        for number in range(len(table.target))
    ]  # fmt: skip
    with open("patients.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*people[0], *table.feature_names, "diagnosis"])
        for number, person in enumerate(people):
            numbers = [
                "" if number == 5 and i == 4 else v for i, v in enumerate(table.data[number])
            ]
            writer.writerow([*person.values(), *numbers, table.target[number]])

    result = run("patients.csv", "shards", config=EXAMPLE)
    assert result.exit_code == 0, result.output
    train, val = (dataset("shards", split, output="dict") for split in ("train", "val"))
    assert len(train) + len(val) == 568  # one had a null, and the configuration drops it
    assert f"train: {len(train)} rows sealed" in result.output
    expected = np.delete(table.data[:, :5], 5, axis=0).astype("float32")
    rows = [*train, *val]
    order = np.lexsort(expected.T)
    mine = np.array([row["x"].numpy() for row in rows])
    assert np.array_equal(mine[np.lexsort(mine.T)], expected[order])
    assert {name for row in rows for name in row} == {
        "born", "postcode", "record", "diagnosis", "x",
    }  # fmt: skip
    assert {int(row["born"]) % 10 for row in rows} == {0}
    assert {len(row["postcode"]) for row in rows} == {2}
    assert not {row["record"] for row in rows} & {person["record"] for person in people}
    written = b"".join(p.read_bytes() for p in Path("shards").rglob("*") if p.is_file())
    for person in people:
        assert person["name"].encode() not in written
        assert person["record"].encode() not in written
    # A second time there is nothing to do.
    again = run("patients.csv", "shards", config=EXAMPLE)
    assert again.exit_code == 0
    assert f"({len(train)} of them before this call)" in again.output


def test_an_interrupted_sealing_goes_on_by_itself(here, monkeypatch):
    config = (
        "keys: {kind: local, path: project.kek}\nsegment_bytes: 64\nshard_bytes: 256\nthreads: 1"
    )
    monkeypatch.setattr("lightning_secure.data.sources.tables.BATCH_BYTES", 400)
    from lightning_secure.data.writing import seal as module

    pour = module._pour

    def stop(source, writer, progress):
        def shown(done, total):
            progress(done, total)
            if done > 100:
                raise KeyboardInterrupt

        pour(source, writer, shown)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_pour", stop)  # nobody presses Ctrl-C in a test
        result = run("t.csv", "o", config=config)
    assert (result.exit_code, "goes on" in result.output) == (130, True)
    result = run("t.csv", "o", config=config)
    assert result.exit_code == 0, result.output
    assert "of them before this call" in result.output
    assert dataset().__getitems__(range(200)).batch()[1].tolist() == list(range(200))


def test_an_interruption_while_the_keys_are_opened_is_one(here, monkeypatch):
    def asked(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lightning_secure.cli.seal.provider_of", asked)  # no key is pressed in a test
        result = run("t.csv", "memory://example/data")
    assert (result.exit_code, "interrupted" in result.output) == (130, True)


@pytest.mark.parametrize(
    ("config", "status", "words"),
    [
        ("keys: {kind: local, path: project.kek}\ncolour: red", 2, "unknown key 'colour'"),
        ("keys: {kind: local, path: project.kek, size: 3}", 2, "unknown key 'size'"),
        ("keys: {kind: magic}", 2, "kind: local"),
        ("split: train", 2, "has no part `keys`"),
        ("keys: {kind: local, path: none.kek}", 1, "cannot be opened"),
        ("keys: {kind: local, path: project.kek}\nthreads: two", 2, "threads must be of type int"),
        ("keys: {kind: local, path: project.kek}\nthreads: 0", 2, "threads"),
        ("keys: {kind: local, path: project.kek}\ncolumns: [z]", 2, "no column 'z'"),
        ("keys: {kind: local, path: project.kek}\ntypes: {x: int64}", 1, "does not fit"),
        ("keys: {kind: local, path: project.kek}\ndecode: true", 2, "no option 'decode'"),
        ("keys: [\nsecret: hunter2", 2, "not valid YAML in line"),
        ("keys: 1\nkeys: 2", 2, "a key twice"),
        ("passphrase=hunter2:", 2, "(not shown)"),
        ("- list", 2, "must be of type dict"),
        ("keys: !!python/object/apply:os.system [ls]", 2, "not valid YAML"),
        ("a: &a [x]\nb: *nothing", 2, "not valid YAML"),
    ],
)
def test_what_is_wrong_is_one_paragraph_and_a_status(here, config, status, words):
    result = run("t.csv", "o", config=config)
    text = " ".join(result.output.split())
    assert (result.exit_code, words in text) == (status, True), text
    assert "Traceback" not in text
    assert "hunter2" not in text
    assert not list(here.rglob("*.lsec"))


def test_bad_paths_are_errors_too(here):
    for source, destination, config, status in (
        ("none.csv", "o", "keys: {kind: local, path: project.kek}", 2),
        ("t.csv", "t.csv", "keys: {kind: local, path: project.kek}", 2),
        ("t.csv", "o", Path("none.yaml"), 2),
    ):
        result = run(source, destination, config=config)
        assert (result.exit_code, "error: " in result.output) == (status, True), result.output


def test_restart_begins_anew_and_an_existing_split_stays(here):
    assert run("t.csv", "o").exit_code == 0
    result = run("t.csv", "o", "--restart")
    assert result.exit_code == 2
    assert "exists" in result.output
    config = "keys: {kind: local, path: project.kek}\nreplace: true"
    assert run("t.csv", "o", "--restart", config=config).exit_code == 0


def test_a_configuration_says_it_all(here):
    Path("c.yaml").write_text(
        "keys: {kind: local, path: project.kek}\n"
        "split: {column: cohort}\n"
        "stack: {x: {columns: [a, b], dtype: float64}}\n"
        "nulls: {a: drop, b: {fill: 0.5}}\n"
        "anonymize: {a: keep, n: suppress}\n"
        "decode: true\n"
        "size: [8, 9]\n"
    )
    options = read_config(Path("c.yaml"))
    assert options["split"] == SplitByColumn(column="cohort")
    assert options["stack"] == {"x": Stack(columns=("a", "b"), dtype="float64")}
    assert options["nulls"] == {"a": "drop", "b": Fill(0.5)}
    assert dict(options["anonymize"].columns) == {"a": Keep(), "n": Suppress()}
    assert (options["decode"], options["size"]) == (True, (8, 9))


@pytest.mark.parametrize(
    "text",
    [
        "split: {ratio: {a: 1.0}}",
        "split: {column: a, seed: 1}",
        "split: {ratio: {a: 0.5}, seed: 1}",
        "split: 7",
        "stack: {x: [a]}",
        "stack: {x: {dtype: float32}}",
        "nulls: {a: mean}",
        "nulls: {a: {fill: 1, drop: 2}}",
        "anonymize: {a: hash}",
        "anonymize: {a: {pseudonymize: 7}}",
        "anonymize: {a: {generalize: {colour: 1}}}",
        "anonymize: {a: {generalize: {prefix: 1, width: 2}}}",
        "anonymize: {a: {}}",
        "size: 8",
    ],
)
def test_parts_that_make_no_sense_are_refused(here, text):
    Path("c.yaml").write_text(f"keys: {{kind: local, path: project.kek}}\n{text}\n")
    with pytest.raises(ConfigError):
        read_config(Path("c.yaml"))
