"""What a policy does not let pass is in no store, whoever sends it and however it is worded."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import mlflow_paths
import pytest
import test_matrix

from lightning_secure import (
    AuditTrail,
    LocalKeyProvider,
    RedactingMLFlowLogger,
    decrypt_artifacts,
    open_artifact,
)
from lightning_secure.errors import AuditWriteError, ConfigError, RedactionError, WrongKeyError
from lightning_secure.redaction.mlflow_store import enforce, sinks
from lightning_secure.redaction.mlflow_store.argument_kinds import ARGUMENTS, CHECKED, Kind
from lightning_secure.redaction.mlflow_store.enforce import enforce_mlflow_redaction
from lightning_secure.redaction.policy import SINKS, RedactionPolicy, Rules
from lightning_secure.redaction.redactor import REDACTED
from lightning_secure.util import events

pytestmark = test_matrix.pytestmark
quick = test_matrix.quick

# Nothing that looks like a secret: only a policy keeps it out.
PLAIN = "plainchant evensong"


@pytest.fixture
def client(quick, mlflow_database):
    from mlflow import MlflowClient

    shutil.copy(mlflow_database, quick / "m.db")
    return MlflowClient(f"sqlite:///{quick}/m.db")


def walked(quick, only):
    """Send what looks like nothing down some of the ways, and return how each ended."""

    class Plain(mlflow_paths.Way):
        def __init__(self, *given):
            super().__init__(*given)
            self.password = self.address = self.token = self.text = PLAIN
            self.nested = {"words": [PLAIN]}

    before, mlflow_paths.Way = mlflow_paths.Way, Plain
    try:
        return mlflow_paths.walk(f"sqlite:///{quick}/m.db", quick, only)
    finally:
        mlflow_paths.Way = before


# Of experiments, runs, models, datasets: by what MLflow goes on.
NAMES = {
    "evaluation_datasets": {"name"}, "experiments": {"name"}, "logged_models": {"name"},
    "model_versions": {"name", "source"}, "registered_models": {"name"}, "runs": {"name"},
    "registered_model_tags": {"name"}, "model_version_tags": {"name"},
    "registered_model_aliases": {"name"}, "datasets": {"name"},
    "spans": {"name"}, "trace_info": {"trace_name"},
}  # fmt: skip


def places(quick):
    """Return where something is stored, but in names: tables with their columns, and artifacts."""
    shutil.rmtree(quick / "sources", ignore_errors=True)
    found = set()
    with sqlite3.connect(quick / "m.db") as database:
        database.row_factory = sqlite3.Row
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
            for row in map(dict, database.execute(f'SELECT * FROM "{table}"')):
                if table == "spans":
                    row["content"] = {**json.loads(row["content"]), "name": ""}
                if row.get("key") not in ("mlflow.runName", "mlflow.traceName"):
                    found |= {
                        (table, column, row.get("key"))
                        for column, value in row.items()
                        if column not in NAMES.get(table, ()) and PLAIN in str(value)
                    }
    for path in quick.rglob("*"):
        name = str(path.relative_to(quick))
        tracked = not name.startswith("m.db") and path.is_file()
        if tracked and (PLAIN in name or PLAIN.encode() in path.read_bytes()):
            found.add(name)
    return found


# ---------------------------------------------------------------- what can be asked for


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"params": "redact"}, "params must be one of"),
        ({"binaries": "allow"}, "binaries must be one of"),
        ({"binaries": "encrypt"}, "given together"),
        ({"params": "allowlist"}, "params='allowlist' and names"),
        ({"params": "allowlist", "allow": {"params": []}}, "names in allow"),
        ({"allow": {"params": ["lr"]}}, "without effect"),
        ({"params": "drop", "allow": {"params": ["lr"]}}, "without effect"),
        ({"params": "allowlist", "allow": {"params": "lr"}}, "list of names"),
        ({"params": "allowlist", "allow": {"params": [1]}}, "list of names"),
        ({"allow": {"param": ["lr"]}}, "allow must map sinks"),
        ({"allow": ["lr"]}, "allow must map sinks"),
    ],
)
def test_a_policy_that_would_not_do_what_it_seems_to_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        RedactionPolicy(**given)


def test_keys_without_encryption_are_refused_and_not_shown(keys):
    with pytest.raises(ConfigError, match="given together"):
        RedactionPolicy(keys=keys)
    assert "keys" not in repr(RedactionPolicy(binaries="encrypt", keys=keys))


def test_a_policy_is_a_value():
    names = ["lr"]
    policy = RedactionPolicy(params="allowlist", allow={"params": names})
    names.append("*")
    assert not policy.passes("params", "owner")
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    with pytest.raises(AttributeError):
        policy.params = "detect"


def test_names_are_compared_as_in_a_shell():
    policy = RedactionPolicy(
        params="allowlist", traces="drop", allow={"params": ["lr", "opt/*", "seed[0-9]"]}
    )
    passing = [
        n for n in ("lr", "LR", "lr2", "opt/a/b", "seed1", "seedx") if policy.passes("params", n)
    ]
    assert passing == ["lr", "opt/a/b", "seed1"]
    assert policy.passes("tags", "any")
    assert not policy.passes("traces", "any")


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_policies_the_strictest_counts_in_whatever_order(order, keys):
    rules = Rules()
    assert (rules.binaries, rules.keys, rules.strict) == ("refuse", None, False)
    stated = [
        RedactionPolicy(binaries="insecure_allow"),
        RedactionPolicy(
            params="allowlist", allow={"params": ["a", "b"]}, binaries="encrypt", keys=keys
        ),
        RedactionPolicy(
            params="allowlist", allow={"params": ["b", "c"]}, tags="drop", strict=True,
            binaries="insecure_allow",
        ),
    ]  # fmt: skip
    for policy in stated[::order]:
        rules.add(policy)
        rules.add(policy)
    assert [n for n in "abc" if rules.passes(("params",), n)] == ["b"]
    assert not rules.passes(("params", "tags"), "b")
    assert rules.drops("tags")
    assert not rules.drops("params")
    assert (rules.binaries, rules.keys, rules.strict) == ("encrypt", keys, True)
    rules.add(RedactionPolicy())
    assert rules.binaries == "refuse"
    assert not rules.passes(("params",), "a")


def test_two_keys_in_one_process_are_refused(keys, other_keys):
    rules = Rules()
    rules.add(RedactionPolicy(binaries="encrypt", keys=keys))
    with pytest.raises(ConfigError, match="one key"):
        rules.add(RedactionPolicy(binaries="encrypt", keys=other_keys, params="drop"))
    assert rules.keys is keys
    assert rules.passes(("params",), "a")


# ---------------------------------------------------------------- every argument


def test_every_text_that_a_method_may_store_stands_in_a_sink_or_among_the_names():
    seen = {}
    for store in test_matrix.stores():
        for name, method in test_matrix.methods(store):
            if name in CHECKED and not name.startswith(
                ("get_", "search_", "list_", "delete_", "batch_get_", "find_", "filter_")
            ):
                seen.setdefault(name, set()).update(inspect.signature(method).parameters)
    texts = {
        (method, argument)
        for method, arguments in seen.items()
        for argument in arguments
        if ARGUMENTS.get(argument) is Kind.TEXT
    }
    unknown = {
        (method, argument)
        for method, argument in texts
        if argument not in sinks.KEYED | sinks.FIELDS | sinks.NAMES | sinks.WHOLE
        or (argument not in sinks.NAMES and not sinks.sinks_of(method, argument))
    }
    # Reading, by other names.
    unknown -= {
        ("calculate_trace_filter_correlation", "filters"), ("query_trace_metrics", "filters"),
        ("resolve_endpoint_in_scorer", "scorer_version"),
    }  # fmt: skip
    assert unknown == set(), "say in sinks.py in which sink the new argument stands"
    assert len(texts) > 50


WAYS = [
    "one_by_one", "batch", "asynchronous", "containers", "run", "experiment_changes", "fluent",
    "files", "texts", "table", "vector_figure", "repository", "model_description", "logged_model",
    "registry", "prompt", "copied_version", "dataset", "evaluation_dataset", "trace",
    "traced_exception", "feedback", "links",
]  # fmt: skip
# Their last step is to delete a tag, which is not there.
DELETING = {"one_by_one", "experiment_changes", "logged_model", "registry", "prompt"}


@pytest.mark.parametrize("mode", ["detect", "drop", "allowlist"])
def test_what_does_not_pass_is_in_no_store_and_the_calls_go_on(client, quick, mode):
    allow = {sink: ["nothing of it"] for sink in SINKS} if mode == "allowlist" else {}
    modes = dict.fromkeys(SINKS, mode)
    enforce_mlflow_redaction(policy=RedactionPolicy(**modes, allow=allow))
    ended = walked(quick, WAYS)
    failed = {name: how for name, how in ended.items() if how != "sent"}
    found = places(quick)
    if mode == "detect":  # the ways lead somewhere, and nothing takes this out by itself
        assert failed == {}
        tables = {place[0] for place in found if isinstance(place, tuple)}
        assert len(found - tables) > 30
        assert tables >= {
            "params", "tags", "experiment_tags", "logged_model_params", "logged_model_tags",
            "registered_model_tags", "model_versions", "datasets", "input_tags",
            "evaluation_dataset_records", "trace_tags", "trace_request_metadata", "spans",
            "assessments", "latest_metrics",
        }  # fmt: skip
    else:
        assert found == set()
        assert set(failed) <= DELETING, failed
        assert all("tag" in how.lower() and "Redaction" not in how for how in failed.values())


def test_what_is_named_passes_redacted_and_the_rest_is_told_apart(client, quick, heard):
    """By the names under which it is stored, in every sink; nothing else of the same calls is."""
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    allow = {
        "params": ["lr", "db_*", "deep/*"], "metrics": ["loss"], "tags": ["team", "t"],
        "artifacts": ["kept/*"], "traces": ["mlflow.spanInputs", "ok", "m", "response_preview"],
        "models": ["description", "lr"], "datasets": ["schema", "t"],
    }  # fmt: skip
    enforce_mlflow_redaction(
        policy=RedactionPolicy(**dict.fromkeys(SINKS, "allowlist"), allow=allow)
    )
    experiment = client.create_experiment("e", (quick / "artifacts").as_uri())
    run = client.create_run(experiment, tags={"team": "a", "mood": PLAIN}).info.run_id
    client.log_batch(
        run,
        metrics=[Metric("loss", 1.0, 0, 0), Metric("loss2", 1.0, 0, 0)],
        params=[Param(k, "v") for k in ("lr", "db_password", "deep/a/b", "owner")],
        tags=[RunTag("team", "mail jo@clinic.example"), RunTag("other", PLAIN)],
    )
    client.log_metric(run, "other", 1.0)
    client.log_param(run, "other", PLAIN)
    client.log_param(run, "later", PLAIN, synchronous=False).wait()
    client.log_text(run, PLAIN, "kept/a.txt")
    client.log_text(run, PLAIN, "left/b.txt")
    (quick / "tree" / "kept").mkdir(parents=True)
    for name in ("kept/c.txt", "d.txt"):
        (quick / "tree" / name).write_text("x")
    client.log_artifacts(run, str(quick / "tree"))
    dataset = Dataset("d", "abcd", "local", PLAIN, "{}", PLAIN)
    client.log_inputs(run, [DatasetInput(dataset, [InputTag("t", "1"), InputTag("u", PLAIN)])])
    client.create_registered_model("m", {"t": PLAIN}, description="kept")
    model = client.create_logged_model(
        experiment, params={"lr": "1", "owner": PLAIN}, tags={"t": PLAIN}
    )

    got = client.get_run(run)
    assert got.data.params == {"lr": "v", "db_password": REDACTED, "deep/a/b": "v"}
    assert got.data.metrics == {"loss": 1.0}
    tags = {k: v for k, v in got.data.tags.items() if k != "mlflow.runName"}
    assert tags == {"team": f"mail {REDACTED}"}
    inside = Path(got.info.artifact_uri.removeprefix("file://"))
    assert sorted(p.name for p in inside.rglob("*") if p.is_file()) == ["a.txt", "c.txt"]
    shutil.rmtree(quick / "tree")
    (given,) = got.inputs.dataset_inputs
    assert (given.dataset.source, given.dataset.schema, given.dataset.profile) == (
        REDACTED, "{}", None,
    )  # fmt: skip
    assert [tag.key for tag in given.tags] == ["t"]
    assert client.get_registered_model("m").description == "kept"
    assert client.get_registered_model("m").tags == {}  # "t" is a tag that passes, in no model
    assert client.get_logged_model(model.model_id).params == {"lr": "1"}

    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.tracing.reset()
    root = client.start_trace(
        "name",
        inputs={"a": 1},
        attributes={"ok": 1, "no": PLAIN},
        tags={"t": "1", "ok": "2"},
        experiment_id=experiment,
    )
    child = client.start_span("child", root.trace_id, root.span_id)
    child.record_exception(ValueError(PLAIN))
    client.end_span(root.trace_id, child.span_id)
    client.end_trace(root.trace_id, outputs=PLAIN)
    trace = client.get_trace(root.trace_id)
    attributes = {name for span in trace.data.spans for name in span.attributes}
    assert {"ok", "mlflow.spanInputs"} <= attributes
    assert attributes.isdisjoint({"no", "mlflow.spanOutputs"})
    assert [span.events for span in trace.data.spans] == [[], []]
    assert set(trace.info.tags).isdisjoint({"t", "ok"})  # each is missing in one of the lists
    assert places(quick) == {
        f"{inside.relative_to(quick)}/kept/a.txt", ("trace_info", "response_preview", None),
    }  # fmt: skip
    told = {event.details["sink"] for event in heard if event.details.get("rule") == "policy"}
    assert told == set(SINKS)
    assert PLAIN not in repr(heard)


@pytest.mark.parametrize("name", ["lightning_secure.x", "mlflow.runName", "_mlflow_prompt_type"])
def test_names_that_stay_as_tags_open_no_other_sink(client, name):
    """A param may be called whatever the user likes."""
    enforce_mlflow_redaction(policy=RedactionPolicy(params="drop", metrics="drop", tags="drop"))
    run = client.create_run("0").info
    client.log_param(run.run_id, name, PLAIN)
    client.log_metric(run.run_id, name, 1.0)
    model = client.create_logged_model(run.experiment_id, params={name: PLAIN})
    client.set_tag(run.run_id, name, "stays")
    data = client.get_run(run.run_id).data
    assert (data.params, data.metrics, data.tags[name]) == ({}, {}, "stays")
    assert client.get_logged_model(model.model_id).params == {}


# ---------------------------------------------------------------- detectors that fail, audit logs


def test_what_a_detector_fails_at_is_dropped_and_told_or_raises(client, quick, heard):
    enforce_mlflow_redaction()
    run = client.create_run("0").info.run_id
    client.log_param(run, "note", "half \ud800 of it")
    assert client.get_run(run).data.params == {"note": REDACTED}
    (event,) = [event for event in heard if event.action == "redaction"]
    assert (event.outcome, dict(event.details)["rule"]) == ("failure", "encoding-failed")

    enforce_mlflow_redaction(policy=RedactionPolicy(strict=True))
    with pytest.raises(RedactionError, match="encoding failed"):
        client.set_tag(run, "note", "half \ud800 of it")
    with pytest.raises(RedactionError, match="encoding failed"):
        client.log_artifact(run, str(mlflow_paths.Way("files", client.tracking_uri, quick).file(
            "half.json", '{"a": "half \\ud800"}'
        )))  # fmt: skip
    assert "note" not in client.get_run(run).data.tags
    assert "ud800" not in repr(heard)


def test_nothing_is_sent_whose_redaction_cannot_be_recorded(client, heard):
    def full(event):
        if event.action == "redaction":
            raise AuditWriteError("no space left")

    enforce_mlflow_redaction()
    run = client.create_run("0").info.run_id
    heard.clear()
    events.subscribe("full", full)
    with pytest.raises(AuditWriteError):
        client.log_param(run, "text", "to jo@clinic.example")
    with pytest.raises(AuditWriteError):
        client.log_text(run, "to jo@clinic.example", "a.txt")
    events.unsubscribe("full")
    assert client.get_run(run).data.params == {}
    assert client.list_artifacts(run) == []


def test_the_audit_log_of_a_run_has_sinks_rules_and_counts(quick, mlflow_database):
    """Also of what the logger itself takes out, before a store sees it; and no value of any."""
    import lightning as L
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Module(BoringModel):
        def training_step(self, batch, batch_idx):
            self.log("loss of jo@clinic.example", 1.0)
            self.logger.experiment.log_text(
                self.logger.run_id, f"{batch_idx} to jo@clinic.example", f"{batch_idx}.txt"
            )
            return super().training_step(batch, batch_idx)

    (quick / "runs").mkdir()
    shutil.copy(mlflow_database, quick / "runs" / "mlflow.db")
    trail = AuditTrail(quick / "audit")
    logger = RedactingMLFlowLogger(
        save_dir=quick / "runs",
        policy=RedactionPolicy(params="allowlist", allow={"params": ["api_key", "who/*"]}),
    )
    logger.log_hyperparams({"api_key": "hunter2", "who": {"a": "jo@clinic.example"}, "lr": 1})
    L.Trainer(
        max_epochs=1, limit_train_batches=7, limit_val_batches=0, accelerator="cpu", logger=logger,
        callbacks=[trail], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, log_every_n_steps=50,
    ).fit(Module())  # fmt: skip
    assert trail.log_file.verify().records > 0
    counted, records = Counter(), list(trail.log_file.records())
    assert records[-1]["action"] == "run.end"
    for record in records:
        if record["action"] == "redaction":
            of = record["details"]
            counted[of["sink"], of["rule"]] += of["count"]
    assert counted["params", "secret-name"] == counted["params", "policy"] == 1
    assert counted["params", "e-mail"] == 1
    assert counted["artifacts", "e-mail"] == 7
    text = trail.log_file.path.read_text()
    assert "hunter2" not in text
    assert "clinic" not in text
    stored = logger.experiment.get_run(logger.run_id).data.params
    assert stored == {"api_key": REDACTED, "who/a": REDACTED}


def test_a_policy_that_nothing_would_keep_is_refused(quick):
    with pytest.raises(ConfigError, match="without effect"):
        RedactingMLFlowLogger(
            save_dir=quick, insecure_only_this_logger=True, policy=RedactionPolicy()
        )


# ---------------------------------------------------------------- files that hold no text


def drawn():
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1))


def test_figures_and_models_are_tracked_as_ciphertext(quick, mlflow_database, keys, other_keys):
    import mlflow
    from sklearn.linear_model import LinearRegression

    (quick / "runs").mkdir()
    shutil.copy(mlflow_database, quick / "runs" / "mlflow.db")
    logger = RedactingMLFlowLogger(
        save_dir=quick / "runs", policy=RedactionPolicy(binaries="encrypt", keys=keys)
    )
    client, run = logger.experiment, logger.run_id
    by = {"metadata": {"Author": PLAIN}}
    client.log_figure(run, drawn(), "figures/curve.png", save_kwargs=by)
    (quick / "weights.bin").write_bytes(b"\x00\xff" + PLAIN.encode())
    client.log_artifact(run, str(quick / "weights.bin"))
    mlflow.set_tracking_uri(logger._tracking_uri)
    mlflow.set_experiment(experiment_id=client.get_run(run).info.experiment_id)
    with mlflow.start_run(run_id=run):
        mlflow.sklearn.log_model(
            LinearRegression().fit([[0.0], [1.0]], [1.0, 3.0]), name="model",
            serialization_format="pickle", pip_requirements=["scikit-learn"],
        )  # fmt: skip
    files = {path.name: path for path in (quick / "runs").rglob("*") if path.is_file()}
    assert {
        "curve.png.encrypted",
        "weights.bin.encrypted",
        "model.pkl.encrypted",
        "MLmodel",
    } <= set(files)
    assert not any(PLAIN.encode() in path.read_bytes() for path in files.values())
    assert b"LinearRegression" not in files["model.pkl.encrypted"].read_bytes()

    got = mlflow.artifacts.download_artifacts(f"runs:/{run}/", dst_path=str(quick / "got"))
    with open_artifact(f"{got}/weights.bin.encrypted", keys=keys) as stream:
        assert stream.read() == b"\x00\xff" + PLAIN.encode()
    decrypt_artifacts(got, quick / "clear", keys=keys)
    assert (quick / "clear/figures/curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(WrongKeyError):
        decrypt_artifacts(got, quick / "no", keys=other_keys)
    # A model, which MLflow loads by what its MLmodel says.
    folder = files["MLmodel"].parent
    decrypt_artifacts(folder, quick / "part", keys=keys)
    assert not (quick / "part" / "MLmodel").exists()
    decrypt_artifacts(folder, quick / "model", keys=keys, insecure_copy_others=True)
    model = mlflow.sklearn.load_model(str(quick / "model"))
    assert model.predict([[2.0]]) == pytest.approx([5.0])
    # What is encrypted already goes on as it is.
    client.log_artifact(run, str(files["weights.bin.encrypted"]), "again")
    assert any(p.name == "weights.bin.encrypted" for p in (quick / "runs").rglob("again/*"))


def test_ciphertext_opens_also_where_names_differed_only_in_what_was_taken_out(client, quick, keys):
    """It is bound to its name, so it has to be numbered before it is encrypted."""
    enforce_mlflow_redaction(policy=RedactionPolicy(binaries="encrypt", keys=keys))
    run = client.create_run(client.create_experiment("e", (quick / "store").as_uri())).info.run_id
    (quick / "sent").mkdir()
    names = [f"{who}@clinic.example" for who in ("ann", "bob", "cy")]
    for name in names:
        (quick / "sent" / name).write_bytes(b"\0\xff" + name.encode())
    client.log_artifacts(run, str(quick / "sent"))
    got = mlflow_artifacts(run, quick / "got", client.tracking_uri)
    opened = decrypt_artifacts(got, quick / "clear", keys=keys)
    assert sorted(path.name for path in opened) == [f"2_{REDACTED}", f"3_{REDACTED}", REDACTED]
    assert {path.read_bytes()[2:].decode() for path in opened} == set(names)


def mlflow_artifacts(run, folder, uri):
    import mlflow

    return mlflow.artifacts.download_artifacts(run_id=run, dst_path=str(folder), tracking_uri=uri)


def test_an_encrypted_attachment_of_a_trace_opens_under_its_id(client, quick, keys):
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    enforce_mlflow_redaction(policy=RedactionPolicy(binaries="encrypt", keys=keys))
    repository = get_artifact_repository((quick / "trace").as_uri())
    name = "7b6f0d0e-1c5a-4a8e-9a55-0a4f3b0c2d11"
    repository.upload_attachment(name, b"\x89PNG\0")
    path = quick / f"{name}.encrypted"
    path.write_bytes(repository.download_trace_attachment(name))
    with open_artifact(path, keys=keys) as stream:
        assert stream.read() == b"\x89PNG\0"


def test_where_one_policy_refuses_binaries_another_cannot_let_them_pass(client, quick, keys):
    enforce_mlflow_redaction(policy=RedactionPolicy(binaries="encrypt", keys=keys))
    run = client.create_run(client.create_experiment("e")).info.run_id
    client.log_figure(run, drawn(), "a.png")
    enforce_mlflow_redaction(policy=RedactionPolicy(), insecure_allow_binaries=True)
    with pytest.raises(RedactionError, match="neither text nor encrypted"):
        client.log_figure(run, drawn(), "b.png")
    assert [file.path for file in client.list_artifacts(run)] == ["a.png.encrypted"]


def test_a_policy_can_stand_in_the_file_of_a_lightning_cli(quick):
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    LocalKeyProvider.generate(quick / "a.kek")
    (quick / "config.yaml").write_text(f"""
trainer:
  logger:
    class_path: lightning_secure.RedactingMLFlowLogger
    init_args:
      save_dir: {quick}/runs
      policy:
        params: allowlist
        allow: {{params: [lr, "opt/*"]}}
        traces: drop
        binaries: encrypt
        keys:
          class_path: lightning_secure.LocalKeyProvider
          init_args: {{path: {quick}/a.kek}}
""")
    cli = LightningCLI(
        BoringModel, run=False, save_config_callback=None,
        args=["--config", str(quick / "config.yaml")],
    )  # fmt: skip
    assert isinstance(cli.trainer.logger, RedactingMLFlowLogger)
    rules = enforce._POLICY.rules
    assert (rules.binaries, rules.drops("traces")) == ("encrypt", True)
    assert [n for n in ("lr", "opt/a", "who") if rules.passes(("params",), n)] == ["lr", "opt/a"]
