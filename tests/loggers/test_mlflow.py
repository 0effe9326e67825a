from __future__ import annotations

import dataclasses
import pickle
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from tracked import ADDRESS, CANARIES, PASSWORD, TOKEN, WARNINGS_OF_OTHERS

from lightning_secure.errors import ConfigError, MissingExtraError, RedactionError
from lightning_secure.loggers.client import RedactingClient
from lightning_secure.loggers.mlflow import RedactingMLFlowLogger
from lightning_secure.plugins.checkpoint import EncryptedCheckpointIO
from lightning_secure.redaction.leak_search.search import CanarySearch
from lightning_secure.redaction.redactor import REDACTED, Redactor
from lightning_secure.util.files import exclusive_lock

pytestmark = WARNINGS_OF_OTHERS


@dataclasses.dataclass
class Database:
    host: str = "db"
    passwords: tuple[str, ...] = (PASSWORD,)


DIRTY = {
    "db_password": PASSWORD,
    "nested": {"list": [{"api_keys": {"prod": PASSWORD}}, [{"a": {"password1": PASSWORD}}]]},
    "joined/secrets/db": PASSWORD,
    "joined.api_key_prod": PASSWORD,
    "api": {"key": PASSWORD},
    "argv": ["train.py", "--db-password", PASSWORD, "--lr", "3"],
    "command": f"export AWS_SECRET_ACCESS_KEY={PASSWORD}; x -H 'Authorization: Bearer {PASSWORD}'",
    "text": f"see token: {PASSWORD} and password={PASSWORD}",
    "url": f"postgresql://u:{PASSWORD}@db/x",
    "contact": {"email": ADDRESS, "list": [ADDRESS, {"k": TOKEN}]},
    f"by {ADDRESS}": 1,
    "long": "x" * 240 + f" https://u:{PASSWORD}@h/",
    "lr": 0.1,
    "name": "adam",
}


class Model(BoringModel):
    def __init__(self, **hyperparameters):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log(f"loss of {ADDRESS}", loss["loss"])
        client, run = self.logger.experiment, self.logger.run_id
        client.set_tag(run, "owner", ADDRESS)
        client.log_param(run, f"token{batch_idx}", TOKEN)
        client.log_text(run, f"mail {ADDRESS}", "notes.txt")
        client.log_dict(run, {"db_password": PASSWORD}, "config.json")
        return loss


def trained(root, logger, keys, **options):
    trainer = L.Trainer(
        **{
            "max_epochs": 1,
            "limit_train_batches": 3,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "logger": logger,
            "plugins": [EncryptedCheckpointIO(keys)],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": root,
            **options,
        }
    )
    trainer.fit(Model(**DIRTY))
    return logger._mlflow_client._client.get_run(logger.run_id)


def require_clean(*folders):
    search = CanarySearch(CANARIES)
    assert search.search(folders) == []
    assert search.bytes_searched > 10_000
    # The search is one that can find something.
    assert search.search_bytes(ADDRESS.encode(), name="control")


def test_nothing_secret_reaches_a_database(tmp_path, keys):
    logger = RedactingMLFlowLogger(
        "experiment",
        save_dir=tmp_path / "runs",
        tags={"owner": ADDRESS, "db_password": PASSWORD},
        run_name=f"run of {ADDRESS}",
    )
    run = trained(tmp_path, logger, keys)
    require_clean(tmp_path / "runs")
    params = run.data.params
    assert params["db_password"] == params["contact/email"] == REDACTED
    assert params["api/key"] == params["joined.api_key_prod"] == REDACTED
    assert params["argv"] == f"['train.py', '--db-password', '{REDACTED}', '--lr', '3']"
    assert params["url"] == f"postgresql://{REDACTED}@db/x"
    assert params["long"].startswith("x" * 240)
    assert (params["lr"], params["name"]) == ("0.1", "adam")
    assert params[f"by {REDACTED}"] == "1"
    assert run.data.metrics[f"loss of {REDACTED}"] > 0
    assert run.data.tags["owner"] == run.data.tags["db_password"] == REDACTED
    assert run.data.tags["mlflow.user"] == REDACTED
    assert "/" not in run.data.tags["mlflow.source.name"]
    assert run.info.run_name == f"run of {REDACTED}"
    assert run.info.status == "FINISHED"
    assert logger.redactor.counts["secret-name"] > 0
    assert logger.redactor.counts["e-mail"] > 0


def test_nothing_secret_reaches_a_server(tmp_path, keys, mlflow_server):
    """Over HTTP, to the server's database, its artifacts and its own log."""
    address, folder = mlflow_server
    logger = RedactingMLFlowLogger("over http", tracking_uri=address, tags={"owner": ADDRESS})
    run = trained(tmp_path, logger, keys)
    assert run.data.params["db_password"] == REDACTED
    require_clean(folder)


def test_encrypted_checkpoints_are_logged_and_others_refused(tmp_path, keys):
    logger = RedactingMLFlowLogger("models", save_dir=tmp_path / "runs", log_model=True)
    callback = ModelCheckpoint(tmp_path / "c", filename="best")
    trained(tmp_path, logger, keys, callbacks=[callback])
    (path,) = (tmp_path / "runs").rglob("best.ckpt")
    assert path.read_bytes().startswith(b"LSECCKPT")
    require_clean(tmp_path / "runs")

    plain = RedactingMLFlowLogger("plain", save_dir=tmp_path / "plain", log_model="all")
    with pytest.raises(RedactionError, match=r"best.ckpt.*not sent"):
        trained(
            tmp_path,
            plain,
            keys,
            plugins=[],
            callbacks=[ModelCheckpoint(tmp_path / "d", filename="best")],
        )
    require_clean(tmp_path / "plain")


def test_every_way_to_write_is_redacted_or_refused(client):
    """A method that nobody has looked at, also one of a newer MLflow, does not pass."""
    from mlflow import MlflowClient

    proxy, _, _ = client
    looked_at = {
        "create_experiment", "create_run", "delete_experiment", "delete_run", "delete_tag",
        "log_artifact", "log_artifacts", "log_batch", "log_dict", "log_metric", "log_param",
        "log_text", "rename_experiment", "restore_experiment", "restore_run", "set_experiment_tag",
        "set_tag", "set_terminated", "tracking_uri", "update_run",
    }  # fmt: skip
    reads = ("get_", "search_", "list_", "download_")
    refused = 0
    for name in dir(MlflowClient):
        if name.startswith("_") or name.startswith(reads) or name in looked_at:
            continue
        with pytest.raises(RedactionError, match=name):
            getattr(proxy, name)
        refused += 1
    assert refused > 60
    with pytest.raises(AttributeError):
        proxy._tracking_client  # noqa: B018
    with pytest.raises(AttributeError):
        proxy.no_such_method  # noqa: B018


def test_text_files_are_redacted_and_others_refused(client):
    proxy, run, folder = client
    tree = folder / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "notes.txt").write_text(f"mail {ADDRESS}")
    (tree / "sub" / f"{ADDRESS} notes.yaml").write_text(f"url: https://u:{PASSWORD}@h/\n")
    proxy.log_artifact(run, str(tree / "notes.txt"), f"for {ADDRESS}")
    proxy.log_artifact(run, str(tree))
    proxy.log_artifacts(run, str(tree), "all")
    stored = sorted(p.name for p in (folder / "runs" / "artifacts").rglob("*") if p.is_file())
    assert stored == sorted([f"{REDACTED} notes.yaml"] * 2 + ["notes.txt"] * 3)
    require_clean(folder / "runs")
    for data in (b"\x89PNG\r\n\x1a\n\xff", b"text\0text"):
        (tree / "binary").write_bytes(data)
        with pytest.raises(RedactionError, match="could not be checked"):
            proxy.log_artifact(run, str(tree / "binary"))
        with pytest.raises(RedactionError):
            proxy.log_artifacts(run, str(tree))


def test_names_that_become_alike_do_not_replace_each_other(client):
    proxy, run, folder = client
    (folder / "tree").mkdir()
    for name in ("a@b.example", "c@d.example", "e@f.example"):
        (folder / "tree" / name).write_text(name[0])
    proxy.log_artifacts(run, str(folder / "tree"))
    stored = [p for p in (folder / "runs" / "artifacts").rglob("*") if p.is_file()]
    assert sorted(p.read_text() for p in stored) == ["a", "c", "e"]


def test_secrets_do_not_pass_through_the_client(client):
    from mlflow.entities import Param, RunTag

    proxy, run, folder = client
    proxy.log_param(run, "joined/secrets/db", PASSWORD)
    proxy.log_param(run, "words", f"--db-password {PASSWORD}")
    proxy.log_param(run, "half", f"{PASSWORD} \ud800")
    proxy.set_tag(run, "api_keys.prod", PASSWORD)
    proxy.log_batch(run, params=[Param("tokens", PASSWORD)], tags=[RunTag("password1", PASSWORD)])
    proxy.log_text(run, f"a: 1\npasswords:\n  - {PASSWORD}\nb: 2\n", "hparams.yaml")
    proxy.log_dict(run, {"a": [{"name": "DB_PASSWORD", "value": PASSWORD}]}, "env.json")
    (folder / "config.json").write_text(f'{{"db": {{"password": "{PASSWORD}"}}, "lr": 3}}')
    proxy.log_artifact(run, str(folder / "config.json"))
    require_clean(folder / "runs")
    (stored,) = (folder / "runs").rglob("config.json")
    assert stored.read_text() == f'{{"db": {{"password": "{REDACTED}"}}, "lr": 3}}'


def test_entities_and_numbers_keep_their_other_fields(client):
    from mlflow.entities import Metric, Param, RunTag

    proxy, run, _ = client
    proxy.log_batch(
        run,
        metrics=[Metric(ADDRESS, 1.5, 123, 4)],
        params=[Param("api_key", "k"), Param("lr", "0.1")],
        tags=[RunTag("t", TOKEN)],
    )
    proxy.log_metric(run, "m", torch.tensor(2.5), step=3)
    proxy.set_experiment_tag(proxy.get_run(run).info.experiment_id, "owner", ADDRESS)
    data = proxy.get_run(run).data
    assert data.metrics == {REDACTED: 1.5, "m": 2.5}
    assert data.params == {"api_key": REDACTED, "lr": "0.1"}
    assert data.tags["t"] == REDACTED
    (point,) = proxy.get_metric_history(run, REDACTED)
    assert (point.timestamp, point.step) == (123, 4)
    proxy.set_terminated(run, "FAILED")
    assert proxy.get_run(run).info.status == "FAILED"


def test_a_place_with_a_secret_in_it_is_refused(client):
    proxy, run, _ = client
    with pytest.raises(RedactionError, match="artifact_location"):
        proxy.create_experiment("new", f"ftp://u:{PASSWORD}@h/x")
    with pytest.raises(RedactionError, match="artifact_file"):
        proxy.log_text(run, "x", f"{ADDRESS}.txt")


def test_a_run_can_be_continued(tmp_path):
    first = RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    run = first.run_id
    again = RedactingMLFlowLogger("experiment", save_dir=tmp_path, run_id=run)
    again.log_metrics({"a": 1.0, "text": ADDRESS}, step=1)
    assert again.experiment.get_run(run).data.metrics == {"a": 1.0}


def test_half_a_secret_is_not_left_where_a_value_is_cut(tmp_path):
    """Lightning cuts values to 250 characters, and half a credential is recognised by nothing."""
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    logger.log_hyperparams({"long": "x" * 228 + f" https://u:{PASSWORD}@host/"})
    value = logger.experiment.get_run(logger.run_id).data.params["long"]
    assert PASSWORD[:6] not in value
    assert value == ("x" * 228 + f" https://{REDACTED}@host/")[:250]


def test_names_that_become_alike_are_kept_apart(tmp_path):
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    logger.log_metrics({"a@b.example": 1.0, "c@d.example": 2.0})
    logger.log_hyperparams({"a@b.example": 1.0, "c@d.example": 2.0})
    data = logger.experiment.get_run(logger.run_id).data
    assert data.metrics == {REDACTED: 1.0, f"{REDACTED}_2": 2.0}
    assert data.params == {REDACTED: "1.0", f"{REDACTED}_2": "2.0"}


def test_a_step_like_the_one_before_is_not_looked_at_again(tmp_path, monkeypatch):
    """By nobody: neither by the logger, nor by the client, nor by the store."""
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    metrics = {"train/loss": 1.0, "lr": 0.1, "epoch": 3}
    logger.log_metrics(metrics, step=0)
    seen, redact_text = [], Redactor.redact_text

    def watched(self, text):
        seen.append(text)
        return redact_text(self, text)

    monkeypatch.setattr(Redactor, "redact_text", watched)
    logger.log_metrics(metrics, step=1)
    assert not seen
    logger.log_metrics({**metrics, f"by {ADDRESS}": 2.0}, step=2)
    assert f"by {ADDRESS}" in seen
    data = logger.experiment.get_run(logger.run_id).data
    assert data.metrics == {**metrics, f"by {REDACTED}": 2.0}


def test_objects_are_logged_as_redacted_text(tmp_path):
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    logger.log_hyperparams({"who": object(), "space": {"in": Path("a"), "cc": [{"b": ADDRESS}]}})
    logger.log_hyperparams(Namespace(owner=ADDRESS, n=3))
    params = logger.experiment.get_run(logger.run_id).data.params
    assert (params["space/in"], params["owner"], params["n"]) == ("a", REDACTED, "3")
    assert params["space/cc/0/b"] == REDACTED


def test_secrets_in_objects_are_taken_out_before_they_become_text(tmp_path):
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    nested = {"database": Database(), "list": [Namespace(api_keys={"prod": PASSWORD})]}
    logger.log_hyperparams(Namespace(**nested))
    params = logger.experiment.get_run(logger.run_id).data.params
    assert (params["database/host"], params["database/passwords"]) == ("db", REDACTED)
    require_clean(tmp_path)


def test_a_logger_does_not_inherit_the_database_of_another(tmp_path):
    first = RedactingMLFlowLogger("experiment", save_dir=tmp_path / "a")
    assert first.run_id  # from here on MLflow has the first one's address in the environment
    second = RedactingMLFlowLogger("experiment", save_dir=tmp_path / "b")
    assert second._tracking_uri != first._tracking_uri


def test_a_container_in_a_metrics_name_is_looked_into_before_its_brackets_go(tmp_path):
    """Lightning takes them away, and what is left passes for words; at every step."""
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="special characters"):
            logger.log_metrics({f"('password', '{PASSWORD}')": 1.0, "[1, 2]": 2.0})
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics == {f"password {REDACTED}": 1.0, "1 2": 2.0}
    require_clean(tmp_path)


def test_a_logger_that_has_logged_goes_to_another_process(tmp_path):
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    logger.log_metrics({"a": 1.0})
    again = pickle.loads(pickle.dumps(logger))
    again.log_metrics({"to jo@clinic.example": 2.0})
    metrics = logger.experiment.get_run(again.run_id).data.metrics
    assert metrics == {"a": 1.0, f"to {REDACTED}": 2.0}


def test_a_redactor_of_the_users_own_is_used(tmp_path):
    redactor = Redactor(extra_patterns=[r"MRN-\d+"])
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path, redactor=redactor)
    logger.log_hyperparams({"patient": "MRN-123"})
    assert logger.experiment.get_run(logger.run_id).data.params == {"patient": REDACTED}
    assert redactor.counts["extra-0"] == 1


def test_the_environments_server_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/env.db")
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path / "unused")
    assert logger._tracking_uri.endswith("env.db")
    # By a second one too, which may find there what MLflow was told by the first.
    assert logger.run_id
    second = RedactingMLFlowLogger("experiment", save_dir=tmp_path / "unused")
    assert second._tracking_uri == logger._tracking_uri
    assert not (tmp_path / "unused").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    third = RedactingMLFlowLogger("experiment", save_dir=tmp_path / "used")
    assert third._tracking_uri == f"sqlite:///{tmp_path}/used/mlflow.db"


@pytest.mark.parametrize("uri", ["http://mlflow.example:5000", "http://10.0.0.7"])
def test_a_server_without_tls_is_refused(uri):
    with pytest.raises(ConfigError, match="without TLS"):
        RedactingMLFlowLogger("experiment", tracking_uri=uri)
    assert RedactingMLFlowLogger("experiment", tracking_uri=uri, insecure_allow_http=True)


@pytest.mark.parametrize("uri", ["http://localhost:5000", "http://127.0.0.1", "https://a.example"])
def test_a_local_or_encrypted_server_is_fine(uri):
    assert RedactingMLFlowLogger("experiment", tracking_uri=uri)


@pytest.mark.parametrize(
    ("missing", "words"), [("mlflow", "pip install mlflow-skinny"), ("sqlalchemy", "tracking")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing, words):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else object()
    )
    with pytest.raises(MissingExtraError, match=words):
        RedactingMLFlowLogger("experiment", save_dir=tmp_path)


def test_telemetry_is_off(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    RedactingMLFlowLogger("experiment", save_dir=tmp_path)
    import os

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_tags_that_are_no_dict_are_left_to_mlflow():
    class Recorder:
        def create_run(self, experiment_id, tags=None):
            return tags

    assert RedactingClient(Recorder(), Redactor()).create_run("1", tags=None) is None


def test_sqlite_files_are_where_they_were_asked_for(tmp_path):
    logger = RedactingMLFlowLogger("experiment", save_dir=tmp_path / "deep" / "runs")
    assert logger.run_id
    assert Path(tmp_path / "deep" / "runs" / "mlflow.db").exists()


def test_of_several_processes_the_first_alone_touches_the_store(tmp_path, monkeypatch):
    """Before there is a process group, the launcher's environment says which one this is."""
    monkeypatch.setenv("RANK", "1")
    other = RedactingMLFlowLogger(save_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    # What was left in the environment does not keep a process from logging that is the first.
    monkeypatch.delenv("RANK")
    (tmp_path / "runs").mkdir()
    other.log_metrics({"loss": 1.0}, 0)
    run = other.experiment.get_run(other.run_id)
    assert run.data.metrics == {"loss": 1.0}
    assert isinstance(other.experiment, RedactingClient)


def test_two_jobs_open_a_new_store_one_after_the_other(tmp_path):
    begun = time.monotonic()
    RedactingMLFlowLogger(save_dir=tmp_path / "first")
    ample = 1 + 4 * (time.monotonic() - begun)
    opened = threading.Event()

    def opens():
        RedactingMLFlowLogger(save_dir=tmp_path)
        opened.set()

    thread = threading.Thread(target=opens)
    with exclusive_lock(tmp_path / "mlflow.db.lock"):  # as another job holds it meanwhile
        thread.start()
        assert not opened.wait(ample)
        assert not (tmp_path / "mlflow.db").exists()
    assert opened.wait(60)
    thread.join()
