"""The benchmark of the detectors: its arithmetic, its exit code, and how it speaks to the peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import redaction
import redaction_data
import redaction_speed
from redaction_data import Case

from lightning_secure.redaction.mlflow_store.guard import call_inside
from lightning_secure.redaction.redactor import REDACTED

PEERS = Path(redaction.__file__).with_name("redaction_peers.py")
STORES = {"sqlite": 50.0, "file": 49.0, "discard": 20.0}


def test_recall_is_of_what_is_hidden_and_precision_of_what_is_said():
    cases = [Case("", "phone, not named", 0, 10), Case("", "card", 20, 30)]
    found = [
        (0, 5, "phone"), (5, 10, "phone"),  # both together hide it
        (20, 29, "card"),  # all but the last digit
        (40, 50, "card"),
        (22, 28, "phone"),  # personal data, but not what it is said to be
    ]  # fmt: skip
    assert redaction.by_kind([cases, []], [found, [(0, 1, "ssn")]]) == {
        "phone, not named": {"found": 1, "of": 1, "recall": 1.0, "findings": 0, "wrong": 0,
                             "precision": None},
        "card": {"found": 0, "of": 1, "recall": 0.0, "findings": 2, "wrong": 1, "precision": 0.5},
        "phone": {"found": 0, "of": 0, "recall": None, "findings": 3, "wrong": 1,
                  "precision": 0.6667},
        "ssn": {"found": 0, "of": 0, "recall": None, "findings": 1, "wrong": 1, "precision": 0.0},
    }  # fmt: skip


def test_everybody_is_timed_in_turn():
    seen = []

    def work(name, seconds):
        def done():
            seen.append(name)
            return seconds

        return done

    assert redaction_speed.turns([work("a", 1.0), work("b", 2.0)], 3) == [[1.0] * 3, [2.0] * 3]
    assert "".join(seen) == "abbaab"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A run over less, without peers; returns the exit code, and what was written."""
    personal, secrets = redaction.personal, redaction.secrets
    monkeypatch.setattr(redaction, "personal", lambda each, seed: personal(2, seed))
    monkeypatch.setattr(redaction, "secrets", lambda each, seed: secrets(1, seed))
    monkeypatch.setattr(redaction, "harmless", lambda n, seed: redaction_data.harmless(50, seed))
    monkeypatch.setattr(redaction, "configuration_names", lambda: ["hub_token", "pad_token_id"])
    monkeypatch.setattr(redaction, "parameters", lambda: ['{"lr": 0.1}'])
    monkeypatch.setattr(redaction, "short_parameters", lambda: ["lr", "0.1"])
    added = {store: {"overhead_p50_us": us, "without_us": 1.0} for store, us in STORES.items()}
    monkeypatch.setattr(redaction, "metrics_overhead", lambda rounds: added)

    def run():
        target = tmp_path / "redaction.json"
        code = redaction.main(["--quick", "--peers", str(tmp_path), "--json", str(target)])
        return code, json.loads(target.read_text())

    return run


def test_a_run_says_what_it_found_and_what_was_asked(small, capsys):
    code, result = small()
    assert code == 0
    assert result["systems"]["lightning_secure"]["personal"]["e-mail"]["of"] == 20
    assert result["key_names"] == {
        "names": 2,
        "hits": ["hub_token"],
        "found": ["hub_token", "api_key", "db_password", "aws_secret_access_key"],
    }
    printed = capsys.readouterr().out
    assert "log_metrics of ten, file: added, p50" in printed
    assert "make redaction-peers" in printed


def test_a_target_of_detection_that_is_missed_is_the_exit_code(small, capsys, monkeypatch):
    monkeypatch.setattr(redaction.PersonalDataDetector, "find", lambda self, text: iter(()))
    code, result = small()
    assert code == 1
    assert "phone: recall" in result["missed"]
    assert "MISSED" in capsys.readouterr().out


def test_a_speed_that_is_missed_is_said_and_no_more(small, monkeypatch):
    added = {store: {"overhead_p50_us": 51.0, "without_us": 1.0} for store in STORES}
    monkeypatch.setattr(redaction, "metrics_overhead", lambda rounds: added)
    code, result = small()
    assert code == 0
    assert {what for what in result["missed"] if "log_metrics" in what} == {
        "log_metrics of ten, sqlite: added, p50",
        "log_metrics of ten, file: added, p50",
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_metrics_are_logged_by_a_logger_that_redacts_and_by_one_that_does_not(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with redaction_speed.loggers("file") as (ours, plain):
        metrics = {"m 4111111111111111": 1.0}
        ours.log_metrics(metrics, 1)
        call_inside(plain.log_metrics, metrics, 1)
        read = ours.experiment.get_run
        assert read(ours.run_id).data.metrics == {f"m {REDACTED}": 1.0}
        assert read(plain.run_id).data.metrics == metrics
    found = redaction_speed.metrics_overhead(1, ["discard"])
    assert list(found) == ["discard"]
    assert all(of["with_us"] > 0 < of["without_us"] for of in found.values())


def test_peers_are_asked_line_by_line_and_one_that_does_not_run_is_reported():
    """Of the peers only detect-secrets is installed here."""
    with subprocess.Popen(
        [sys.executable, PEERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for asked in (
            {"find": ["key AKIAIOSFODNN7EXAMPLE", "adam"]},
            {"time": "detect-secrets", "texts": ["adam"] * 9},
        ):
            process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.close()
        found, took = map(json.loads, process.stdout)
    assert found["detect-secrets"]["spans"] == [[[4, 24, "secret"]], []]
    assert "failed" in found["presidio"]
    assert took["seconds"] > 0
