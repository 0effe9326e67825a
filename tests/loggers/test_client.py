"""What reaches MLflow past the types that its client asks for; each succeeded once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tracked import WARNINGS_OF_OTHERS

from lightning_secure import EncryptedShardWriter, LocalKeyProvider
from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.errors import AuditWriteError, RedactionError
from lightning_secure.redaction.artifacts.recognise import is_sealed
from lightning_secure.redaction.mlflow_store.guard import call_inside
from lightning_secure.redaction.redactor import REDACTED
from lightning_secure.util import events

pytestmark = WARNINGS_OF_OTHERS

SECRET = "hunter-A1x-Kestrel"
ADDRESS = "zoe.quill@clinic.example"


def stored(folder: Path) -> bytes:
    files = b"".join(p.read_bytes() for p in (folder / "runs").rglob("*") if p.is_file())
    assert b"experiment" in files
    return files


def test_values_that_are_no_text_are_redacted_before_they_become_text(client):
    from mlflow.entities import Metric, Param, RunTag

    proxy, run, folder = client
    proxy.log_batch(
        run,
        metrics=[Metric("m", 1, 1, 0, dataset_name=ADDRESS, dataset_digest=ADDRESS)],
        params=[
            Param("dict", {"password": SECRET}),
            Param("bytes", f"password={SECRET}".encode()),
            Param("list", ["--password", SECRET]),
            Param("db_password", 918273645),
            Param("depth", 12),
        ],
        tags=[RunTag("config", {"password": SECRET}), RunTag("note", f"mail {ADDRESS}".encode())],
    )
    proxy.log_param(run, "other", f"password={SECRET}".encode())
    proxy.set_tag(run, "third", {"password": SECRET})
    proxy.log_metric(run, "n", 1.0, dataset_name="d", dataset_digest=ADDRESS)
    experiment = proxy.get_run(run).info.experiment_id
    proxy.create_run(experiment, tags={"c": {"password": SECRET}, ADDRESS: "x"})
    proxy.create_experiment("e", tags={"c": {"password": SECRET}})
    data = stored(folder)
    for secret in (SECRET, ADDRESS, "918273645"):
        assert secret.encode() not in data
    assert data.count(REDACTED.encode()) >= 9
    assert proxy.get_run(run).data.params["depth"] == "12"
    assert proxy.get_run(run).data.metrics["m"] == 1.0


def test_mlflows_own_errors_do_not_repeat_a_secret(client):
    from mlflow.entities import Metric, Param, RunTag

    proxy, run, _ = client
    proxy.log_param(run, "config", "a")
    for act in (
        lambda: proxy.log_batch(run, params=[Param("config", {"password": SECRET})]),
        lambda: proxy.log_param(run, "config", {"password": SECRET}),
        lambda: proxy.log_batch(run, tags=[RunTag("/../x", {"password": SECRET})]),
        lambda: proxy.set_terminated(run, status=f"password={SECRET}"),
        lambda: proxy.log_metric(run, "n", f"password={SECRET}"),
        lambda: proxy.log_batch(run, metrics=[Metric("n", SECRET, 0, 0)]),
    ):
        with pytest.raises(Exception, match=r"config|\.\.|status|not a number") as caught:
            act()
        error = caught.value
        while error is not None:
            assert SECRET not in str(error)
            error = error.__context__


# ---------------------------------------------------------------- files that begin like sealed ones

HEAD = canonical_json({"checkpoint": "a", "run_id": "b", "step": 1, "key": {}})
CHECKPOINT = b"LSECCKPT\x01\x00" + len(HEAD).to_bytes(4, "little") + HEAD
TEXT = f"password={SECRET} of {ADDRESS}, twice\n".encode() * 9


@pytest.mark.parametrize(
    "data",
    [
        b"LSECCKPT\n" + TEXT,
        b"LSECCKPT",
        CHECKPOINT,
        CHECKPOINT + TEXT,
        CHECKPOINT + bytes(56),
        CHECKPOINT.replace(b'"step":1', b'"step":x') + bytes(100),
        b"LSECSHRD" + TEXT,
        b"LSECSHRD\x01\x00\x01\x00".ljust(4096, b"\0") + TEXT,
        b"LSECSHRD" + TEXT.ljust(5000, b"\0"),
        b"LSECSHRD\x01\x00\x01\x00",
    ],
)
def test_a_file_that_only_begins_like_a_sealed_one_is_checked(client, data):
    proxy, run, folder = client
    (folder / "notes.txt").write_bytes(data)
    assert not is_sealed(data)
    try:
        proxy.log_artifact(run, str(folder / "notes.txt"))
    except RedactionError:
        assert not list((folder / "runs").rglob("notes.txt"))
    for secret in (SECRET, ADDRESS):
        assert secret.encode() not in stored(folder)


def test_no_file_is_sent_whose_redaction_cannot_be_recorded(client):
    """Neither by a logger that leaves MLflow's stores as they are: nothing else tells the log."""
    proxy, run, folder = client
    (folder / "sent").mkdir()
    (folder / "sent" / "notes.txt").write_text(f"write to {ADDRESS}")

    def full(event):
        if event.action == "redaction":
            raise AuditWriteError("no space left")

    events.subscribe("full", full)
    for send, path in (("log_artifact", "sent/notes.txt"), ("log_artifacts", "sent")):
        with pytest.raises(AuditWriteError):
            call_inside(getattr(proxy, send), run, str(folder / path))  # past the redacting store
    assert not list((folder / "runs").rglob("notes.txt"))


@pytest.mark.parametrize("rows", [1, 40, 4000])
def test_shards_pass_as_they_are(client, rows):
    proxy, run, folder = client
    keys = LocalKeyProvider.generate(folder / "k.kek")
    with EncryptedShardWriter(
        folder / "shards", split="train", keys=keys, segment_bytes=4096
    ) as writer:
        for row in range(rows):
            writer.write({"text": "all work and no play makes a dull row " * 2, "y": row})
    shards = sorted((folder / "shards").rglob("*.lsec"))
    assert shards
    for shard in shards:
        assert is_sealed(shard.read_bytes())
        assert not is_sealed(shard.read_bytes() + bytes(5000))
        assert not is_sealed(shard.read_bytes()[: 4096 + 16])
    proxy.log_artifact(run, str(shards[0]))
    sent = next((folder / "runs" / "artifacts").rglob("*.lsec"))
    assert sent.read_bytes() == shards[0].read_bytes()


# ---------------------------------------------------------------- MLflow's telemetry


def test_telemetry_stops_if_mlflow_was_imported_first_and_the_user_wanted_it(tmp_path):
    script = f"""
import os
import mlflow
from mlflow.telemetry import get_telemetry_client
before = get_telemetry_client()
assert before is not None, "this MLflow sends nothing, and the test shows nothing"
before._is_config_fetched = True
before._fetch_config = lambda: None  # which would ask a server
before.activate()
from mlflow.tracking._tracking_service.utils import _get_store
from lightning_secure import RedactingMLFlowLogger, enforce_mlflow_redaction
from lightning_secure.redaction.mlflow_store.guard import is_guarded
logger = RedactingMLFlowLogger("x", save_dir={str(tmp_path)!r}, insecure_only_this_logger=True)
assert get_telemetry_client() is None
store = _get_store("sqlite:///{tmp_path}/mlflow.db")
assert not is_guarded(store), "it was to leave the rest of the process alone"
enforce_mlflow_redaction()
assert is_guarded(store)
assert before._is_stopped
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "false",
            "PYTHONPATH": str(Path(__file__).parents[2]), "https_proxy": "http://127.0.0.1:9",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
