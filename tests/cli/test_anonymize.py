from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lightning_secure import cli
from lightning_secure.anonymize import AnonymizationReport
from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.reading.dataset import EncryptedShardDataset

ROWS = """record,email,born,zip,note,dx,x
R1,ada@x.org,1957-03-21,80233,fine,flu,0.5
R2,bob@x.org,1951-01-02,80239,the password is hunter2,gout,1.5
R3,cleo@x.org,1961-01-02,90233,fine,flu,2.5
R4,dan@x.org,1962-01-02,90239,call +1 212 555 0199,flu,3.5
"""
PLAN = """
types: {zip: string, born: date}
anonymize:
  record: {pseudonymize: patient}
  email: suppress
  born: {generalize: {date: decade}}
  zip: {generalize: {prefix: 2}}
  note: redact
  dx: keep
quasi_identifiers: [born, zip]
sensitive: [dx]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a table; paths of a configuration are relative to it."""
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(ROWS)
    # The key is not there: looking needs none.
    Path("plan.yaml").write_text(f"keys: {{kind: local, path: none.kek}}{PLAN}")
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(cli.main, [*map(str, arguments)])


def there(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_what_no_plan_names_is_reported_and_nothing_is_written(here):
    before = there(here)
    result = run("anonymize", "--check", "t.csv")
    assert result.exit_code == 3, result.output
    assert "email (not in the plan): e-mail in 4 of 4 values" in result.output
    assert "secret-assigned in 1" in result.output
    assert "not in the plan: email, born, zip, note" in result.output
    for value in ("hunter2", "ada@", "1957", "80233"):
        assert value not in result.output
    assert there(here) == before


def test_with_the_configuration_of_seal_it_is_what_a_sealing_would_say(here):
    result = run("anonymize", "--check", "t.csv", "--config", "plan.yaml", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert said["rows"] == 4
    assert said["k_anonymity"] == {
        "before": {"least": 1, "exact": True},
        "after": {"least": 2, "exact": True},
    }
    # In the nineties everybody has the flu.
    assert said["l_diversity"]["dx"]["after"]["least"] == 1
    note = next(column for column in said["columns"] if column["name"] == "note")
    assert note["found"] == {"secret-assigned": 1, "phone": 1}
    assert (note["planned"], note["forgotten"]) == ("redact", False)
    text = run("anonymize", "--check", "t.csv", "--config", "plan.yaml").output
    assert "k-anonymity 1 before, 2 after" in text


def test_one_column_that_is_forgotten_is_enough(here):
    text = Path("plan.yaml").read_text()
    Path("plan.yaml").write_text(text.replace("  email: suppress\n", ""))
    result = run("anonymize", "--check", "t.csv", "--config", "plan.yaml", "--json")
    assert result.exit_code == 3
    forgotten = [c["name"] for c in json.loads(result.output)["columns"] if c["forgotten"]]
    assert forgotten == ["email"]


def test_quasi_identifiers_can_be_given(here):
    result = run(
        "anonymize", "--check", "t.csv", "--quasi-identifier", "dx", "--sensitive", "zip", "--json"
    )
    said = json.loads(result.output)
    assert said["k_anonymity"]["before"] == {"least": 1, "exact": True}
    assert said["l_diversity"]["zip"]["before"]["least"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["t.csv"], 2, "Missing option '--check'"),
        (["--check", "none.csv"], 2, "cannot be sealed"),
        (["--check", "t.csv", "--config", "none.yaml"], 2, "cannot be read"),
        (["--check", "t.csv", "--sensitive", "dx"], 2, "no quasi_identifiers"),
        (["--check", "t.csv", "--quasi-identifier", "zip_code"], 1, "renamed"),
        (["--check", "bad.csv", "--config", "plan.yaml"], 2, "no column 'zip'"),
    ],
)
def test_what_is_wrong_is_one_line_and_a_status(here, arguments, status, words):
    Path("bad.csv").write_text("x,dx\n1,hunter2\n")
    result = run("anonymize", *arguments)
    assert (result.exit_code, words in result.output) == (status, True), result.output
    assert "Traceback" not in result.output
    assert "hunter2" not in result.output


def test_seal_writes_the_report_that_the_manifest_names(here):
    LocalKeyProvider.generate("none.kek")
    result = run("seal", "t.csv", "o", "--config", "plan.yaml", "--report", "report.json")
    assert result.exit_code == 0, result.output
    assert "k-anonymity 1 before, 2 after" in result.output
    data = EncryptedShardDataset("o", split="train", keys=LocalKeyProvider("none.kek"))
    written = json.loads(Path("report.json").read_text())["train"]
    assert data.anonymization_report.to_json() == written
    assert f"report {data.entry.attributes['anonymization.report.sha256']}" in result.output
    again = AnonymizationReport.parse(canonical_json(written))
    assert again.digest == data.anonymization_report.digest
    assert "hunter2" not in Path("report.json").read_text()


def test_a_report_that_cannot_be_written_is_said_and_the_rows_stand(here):
    LocalKeyProvider.generate("none.kek")
    result = run("seal", "t.csv", "o", "--config", "plan.yaml", "--report", "no/folder/r.json")
    assert result.exit_code == 4, result.output
    assert "the rows are sealed" in result.output
    data = EncryptedShardDataset("o", split="train", keys=LocalKeyProvider("none.kek"))
    assert (len(data), data.anonymization_report.rows) == (4, 4)
