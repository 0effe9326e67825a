"""Every way into MLflow, on every store: nothing of what was sent may be found there."""

from __future__ import annotations

import base64
import inspect
import json
import os
import random
import re
import shutil
import sqlite3
import ssl
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import mlflow_paths
import pytest
from tracked import WARNINGS_OF_OTHERS
from tracking_server import tracking_server

from lightning_secure import RedactingMLFlowLogger, RedactionPolicy
from lightning_secure.errors import ConfigError, RedactionError
from lightning_secure.redaction.detect.split_secrets import halves
from lightning_secure.redaction.leak_search.search import CanarySearch
from lightning_secure.redaction.mlflow_store.argument_kinds import (
    ARGUMENTS,
    ARTIFACTS,
    CHECKED,
    REFUSED,
)
from lightning_secure.redaction.mlflow_store.enforce import enforce_mlflow_redaction
from lightning_secure.redaction.mlflow_store.guard import guarded_class, is_guarded
from lightning_secure.redaction.mlflow_store.server_tls import PREFIX
from lightning_secure.redaction.mlflow_store.values import Policy
from lightning_secure.redaction.redactor import REDACTED, Redactor

pytestmark = [*WARNINGS_OF_OTHERS, pytest.mark.filterwarnings("ignore::UserWarning")]

ROOT = Path(__file__).parents[2]
# What cannot be checked is not sent: pixels, pickles, webhooks' secrets, code of scorers.
UNCHECKED = {"figure", "image", "pickle", "pixels", "webhook", "scorer"}
# MLflow's file store itself knows none of these.
NOT_IN_FILES = {"evaluation_dataset", "links"}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A folder to write in, without waiting for traces that are sent by and by."""
    # MLflow takes these from the environment, and from nowhere else.
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None:
        mlflow.set_tracking_uri(None)


def found(*folders, least=10_000, **more):
    """Return the paths whose canaries are found, without the files that they were sent from."""
    for folder in folders:
        shutil.rmtree(folder / "sources", ignore_errors=True)
    search = CanarySearch({**mlflow_paths.canaries(), **more})
    hits = search.search(folders)
    assert search.bytes_searched > least
    return {hit.label.partition(":")[0] for hit in hits}


def refused(ended):
    return {name for name, how in ended.items() if how != "sent"}


# ---------------------------------------------------------------- the matrix


def test_nothing_is_found_in_a_database(quick, mlflow_database):
    enforce_mlflow_redaction()
    shutil.copy(mlflow_database, quick / "m.db")
    ended = mlflow_paths.walk(f"sqlite:///{quick}/m.db", quick)
    assert refused(ended) == UNCHECKED, ended
    assert all(ended[name].startswith("RedactionError") for name in UNCHECKED)
    assert found(quick) == set()


def test_nothing_is_found_in_files(quick):
    enforce_mlflow_redaction()
    ended = mlflow_paths.walk((quick / "runs").as_uri(), quick)
    assert refused(ended) == UNCHECKED | NOT_IN_FILES, ended
    assert found(quick) == set()


def test_an_experiment_whose_number_is_a_cards_goes_on_like_any_other(quick, monkeypatch):
    """A file store's are random, and one in a hundred is one."""
    from mlflow.store.tracking import file_store

    redactor, drawn = Redactor(), random.Random(7)

    def number_of_a_card():
        while True:
            number = drawn.randrange(10**17, 10**18)
            if redactor.redact_text(str(number)) == REDACTED:
                return number

    # MLflow's own generator, so that what happens once in a hundred times happens here.
    monkeypatch.setattr(file_store, "_generate_unique_integer_id", number_of_a_card)
    enforce_mlflow_redaction()
    ways = ["registry", "copied_version", "model_description", "logged_model", "trace", "prompt"]
    ended = mlflow_paths.walk((quick / "runs").as_uri(), quick, ways)
    assert refused(ended) == set(), ended
    # Nor do the places and numbers that MLflow finds things by lead elsewhere.
    written = [*quick.rglob("mlflow.artifactLocation"), *quick.rglob("_mlflow_experiment_ids")]
    assert len(written) == 2
    written += quick.rglob("runs/**/MLmodel")
    assert len(written) >= 3
    for path in written:
        assert not re.search(rf"[/,]{REDACTED}[/,]", path.read_text()), path
    assert found(quick, least=5_000) == set()


def test_only_where_mlflow_puts_one_is_a_number_an_experiments():
    policy, card, run = Policy(Redactor()), "614660148694459054", "0" * 31 + "a"
    for place in (f"s3://b/{card}/{run}/artifacts", f"/b/{card}/models/m-{run}"):
        assert policy.identifier(place, what="source") == place
        assert policy.stored(place, name="mlflow.artifactLocation") == place
        assert REDACTED in policy.stored(place, name="note")
    for place in (f"s3://b/{card}", f"s3://b/{card}/x", f"s3://a@b.example/{card}/{run}"):
        with pytest.raises(RedactionError, match="source holds"):
            policy.identifier(place, what="source")
        assert REDACTED in policy.stored(place, name="mlflow.artifactLocation")
    listed = f",{card},"
    assert policy.stored(listed, name="_mlflow_experiment_ids") == listed
    asked = f"tags._mlflow_experiment_ids LIKE '%{listed}%'"
    assert policy.query(asked) == asked
    assert policy.stored(listed, name="ids") == f",{REDACTED},"
    assert policy.stored(",4111111111111111,", name="_mlflow_experiment_ids") == f",{REDACTED},"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folders = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("settings")
    with tracking_server(*folders) as server:
        yield server


@pytest.fixture
def trusted(server, monkeypatch):
    """The environment in which MLflow finds its credentials, and the server's authority."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", server.user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(server.authority))


def test_nothing_is_found_on_a_server(quick, server, trusted):
    """Over TLS, to its artifacts, its log and PostgreSQL's, and PostgreSQL's files and dump.

    The queries stand in both logs, and the user has a password.
    """
    enforce_mlflow_redaction()
    ended = mlflow_paths.walk(server.address, quick)
    assert refused(ended) == UNCHECKED, ended
    assert REDACTED in server.dump().read_text()
    folders = (server.folder, server.database, quick)
    assert found(*folders, password=server.password) == set()
    # The logs are ones in which it would stand.
    basic = base64.b64encode(f"{server.user}:{server.password}".encode()).decode()
    asked = urllib.request.Request(
        f"{server.address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=q7",
        headers={"Authorization": f"Basic {basic}"},
    )
    context = ssl.create_default_context(cafile=str(server.authority))
    with pytest.raises(OSError, match="404"):
        urllib.request.urlopen(asked, context=context)
    assert "experiment_name=q7" in (server.folder / "server.log").read_text()
    assert REDACTED in (server.folder / "postgres.log").read_text()


def test_a_server_is_spoken_to_as_whom_it_says_only(server, trusted, monkeypatch):
    """Not without its authority's word, and not without a password."""
    enforce_mlflow_redaction()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = MlflowClient(server.address)
    assert client.get_experiment("0").name == "Default"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    with pytest.raises(MlflowException, match="401"):
        client.create_experiment("new")
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    with pytest.raises(MlflowException, match="CERTIFICATE_VERIFY_FAILED"):
        client.create_experiment("new")


@pytest.mark.parametrize(
    ("address", "environment", "words"),
    [
        ("http://mlflow.example", {}, "without TLS"),
        ("secure+http://mlflow.example:80/x", {}, "without TLS"),
        ("https://mlflow.example", {"MLFLOW_TRACKING_INSECURE_TLS": "true"}, "INSECURE_TLS"),
        ("https://jo:hunter2@mlflow.example", {}, "holds credentials"),
        ("http://:hunter2@localhost", {}, "holds credentials"),
    ],
)
def test_a_line_that_is_open_is_refused_in_the_store(monkeypatch, address, environment, words):
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    enforce_mlflow_redaction()
    asked = [
        lambda: mlflow.MlflowClient(address).get_run("0" * 32),
        lambda: mlflow.MlflowClient("sqlite://", address).get_registered_model("m"),
        lambda: get_artifact_repository(f"{address}/api/2.0/mlflow-artifacts/artifacts"),
        lambda: RedactingMLFlowLogger(tracking_uri=address),
    ]
    for ask in asked:
        with pytest.raises(ConfigError, match=words) as caught:
            ask()
        assert "hunter2" not in str(caught.value)
        assert caught.value.__context__ is None


def test_an_open_line_is_taken_where_somebody_says_so_for_this_host_or_for_all():
    from mlflow.tracking._tracking_service.utils import _get_store

    RedactingMLFlowLogger(tracking_uri="http://one.example", insecure_allow_http=True)
    assert _get_store("http://one.example")
    with pytest.raises(ConfigError, match=r"two.example"):
        _get_store("http://two.example")
    enforce_mlflow_redaction(insecure_allow_http=True)
    assert _get_store("http://two.example")


def test_what_holds_no_text_is_ciphertext_if_a_policy_says_so(quick, keys):
    enforce_mlflow_redaction(policy=RedactionPolicy(binaries="encrypt", keys=keys))
    ways = sorted(UNCHECKED - {"webhook", "scorer"})
    ended = mlflow_paths.walk((quick / "runs").as_uri(), quick, ways)
    assert refused(ended) == set(), ended
    assert len(list((quick / "runs").rglob("*.encrypted"))) >= len(ways)
    assert found(quick, least=5_000) == set()


def test_a_secret_that_is_split_over_two_is_found_if_they_are_sent_together(quick, mlflow_database):
    import mlflow
    from mlflow.entities import Param, RunTag

    shutil.copy(mlflow_database, quick / "m.db")
    enforce_mlflow_redaction()
    mlflow.set_tracking_uri(f"sqlite:///{quick}/m.db")
    client, parts = mlflow.MlflowClient(), ("AKIA0001QZXC", "VBNMASDF")
    run = client.create_run("0").info.run_id
    client.log_batch(
        run,
        params=[Param(n, v) for n, v in zip("abcd", ("1", *parts, "adam"), strict=True)],
        tags=[RunTag(n, v) for n, v in zip("ab", parts, strict=True)],
    )
    mlflow.set_experiment(experiment_id="0")
    with mlflow.start_run(run_id=run):
        mlflow.log_params({"e": 1, "f": parts[0], "g": parts[1]})
        mlflow.set_tags({"c": parts[0], "d": parts[1]})
    data = client.get_run(run).data
    assert [data.params[name] for name in "abcdefg"] == [
        "1", REDACTED, REDACTED, "adam", "1", REDACTED, REDACTED,
    ]  # fmt: skip
    assert [data.tags[name] for name in "abcd"] == [REDACTED] * 4
    # What cannot hold: two calls know nothing of each other.
    client.log_param(run, "h", parts[0])
    client.log_param(run, "i", parts[1])
    assert client.get_run(run).data.params["h"] == parts[0]


def test_values_that_merely_follow_each_other_are_no_halves():
    names = (Path(__file__).parent / "config_names.txt").read_text().split()
    values = [str(number % 997 / 7) for number in range(600)] + names + ["a" * 40, "0" * 64] * 3
    assert halves(values) == {}
    assert halves(["x" * 400 + " AKIA0001QZXC", "VBNMASDF " + "y" * 400]) == {
        0: "aws-access-key", 1: "aws-access-key",
    }  # fmt: skip


@pytest.mark.parametrize("flavor", ["sklearn", "pytorch"])
def test_nothing_is_found_after_autologging(quick, mlflow_database, flavor):
    """A real fit, with canaries in what the libraries log by themselves."""
    import mlflow

    (quick / "runs").mkdir()
    shutil.copy(mlflow_database, quick / "runs" / "m.db")
    enforce_mlflow_redaction()
    mlflow.set_tracking_uri(f"sqlite:///{quick}/runs/m.db")
    mlflow.set_experiment("autologged")
    way = mlflow_paths.Way("fluent", mlflow.get_tracking_uri(), quick)
    run = mlflow_paths.AUTOLOGGED[flavor](way)
    data = mlflow.MlflowClient().get_run(run).data
    assert repr(data.params).count(REDACTED) > 1, data  # what was sent has arrived
    if flavor == "pytorch":
        assert data.metrics.keys() == {f"loss of {REDACTED}"}
    assert found(quick) == set()


@pytest.fixture(scope="module")
def process(tmp_path_factory, mlflow_database):
    """A process that tracks first without redaction: its folder, and how each path ended."""
    root = tmp_path_factory.mktemp("process")
    for name in ("naive", "secure", "held"):
        (root / name).mkdir()
        shutil.copy(mlflow_database, root / name / "m.db")
    # The entry points, as an installed package has them.
    info = root / "site" / "lightning_secure_here-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: lightning-secure-here\nVersion: 1\n"
    )
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (info / "entry_points.txt").write_text(
        "\n".join(
            line
            for group, points in groups.items()
            for line in (f"[{group}]", *(f"{name} = {home}" for name, home in points.items()))
        )
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).parent / "mlflow_paths.py"), str(root)],
        capture_output=True, text=True, check=False, cwd=root,
        env={
            "PATH": os.environ["PATH"], "HOME": str(root), "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{root / 'site'}",
            "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false", "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads(done.stdout)


def test_without_redaction_nearly_all_is_found(process):
    """The search is one that finds, and the paths are ones that lead somewhere."""
    root, ended = process
    assert refused(ended["naive"]) <= {"webhook"}, ended["naive"]  # MLflow asks where it leads
    hidden = set(mlflow_paths.PATHS) - found(root / "naive", root / "mlruns")
    assert hidden <= {"webhook"}


def test_an_address_with_secure_redacts_the_whole_process(process):
    root, ended = process
    assert refused(ended["secure"]) == set(), ended["secure"]
    assert found(root / "secure") == set()
    with sqlite3.connect(root / "secure" / "m.db") as database:
        values = {value for (value,) in database.execute("SELECT value FROM params")}
    assert REDACTED in values


def test_what_existed_before_redacts_too(process):
    root, ended = process
    assert ended["held"]["db_password"] == REDACTED
    assert ended["held"]["text"].startswith(f"write to {REDACTED}")
    assert found(root / "held") == set()


# ---------------------------------------------------------------- what a newer MLflow may bring


def stores():
    from mlflow.store.model_registry import abstract_store as models
    from mlflow.store.model_registry import file_store as model_files
    from mlflow.store.model_registry import rest_store as model_server
    from mlflow.store.model_registry import sqlalchemy_store as model_database
    from mlflow.store.tracking import abstract_store as runs
    from mlflow.store.tracking import databricks_rest_store as databricks
    from mlflow.store.tracking import file_store as files
    from mlflow.store.tracking import rest_store as server
    from mlflow.store.tracking import sqlalchemy_workspace_store as database
    from mlflow.store.workspace import abstract_store as workspaces

    return [
        runs.AbstractStore, files.FileStore, server.RestStore,
        databricks.DatabricksTracingRestStore,
        database.WorkspaceAwareSqlAlchemyStore, models.AbstractStore, model_files.FileStore,
        model_server.RestStore, model_database.SqlAlchemyStore, workspaces.AbstractStore,
    ]  # fmt: skip


def methods(kind):
    for name in dir(kind):
        if not name.startswith("_") and inspect.isfunction(inspect.getattr_static(kind, name)):
            yield name, getattr(kind, name)


def test_every_method_and_argument_of_mlflows_stores_is_classified():
    seen = {}
    for store in stores():
        seen.update({name: {**seen.get(name, {}), **inspect.signature(method).parameters}
                     for name, method in methods(store)})  # fmt: skip
    assert set(seen) == CHECKED | REFUSED, "say in tables.py what the new method may store"
    assert not CHECKED & REFUSED
    arguments = {argument for name in CHECKED for argument in seen[name]}
    arguments -= {"self", "args", "kwargs"}  # the file store's, of what it does not have
    assert arguments == set(ARGUMENTS), "say in tables.py what the new argument holds"
    assert len(seen) > 240


def test_every_method_of_artifact_repositories_is_classified():
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.artifact.artifact_repository_registry import (
        get_registered_artifact_repositories,
    )

    kinds = {
        ArtifactRepository,
        *filter(inspect.isclass, get_registered_artifact_repositories().values()),
    }
    seen = {name for kind in kinds for name, _ in methods(kind)}
    parts = {
        "abort_multipart_upload", "complete_multipart_upload", "create_multipart_upload",
        "create_presigned_upload_url", "log_artifact_from_async_stream", "log_artifact_from_stream",
        "upload_archived_trace_data", "upload_archived_trace_data_bytes",
    }  # fmt: skip
    assert seen - set(ARTIFACTS) == parts, "say in tables.py whether the new method uploads"


def test_every_method_of_the_client_is_walked():
    from mlflow import MlflowClient

    walked = {method for does in mlflow_paths.DOES.values() for method in does}
    others = {  # refused, or in no store of this MLflow
        "create_mcp_access_endpoint", "create_mcp_server", "create_mcp_server_version",
        "create_workspace", "detach_prompt_from_run", "refresh_mcp_server_version_tools",
        "set_mcp_server_alias",
        "set_mcp_server_tag", "set_mcp_server_version_tag", "test_webhook",
        "update_mcp_access_endpoint", "update_mcp_server", "update_mcp_server_version",
        "unlink_traces_from_run", "update_webhook", "update_workspace",
    }  # fmt: skip
    reads = ("get_", "search_", "list_", "download_", "load_", "parse_", "delete_")
    writing = {name for name, _ in methods(MlflowClient) if not name.startswith(reads)}
    assert writing - walked == others, "add a path to mlflow_paths.py for the new method"
    assert len(writing) > 60


def test_a_method_of_a_newer_mlflow_is_refused():
    from mlflow.store.tracking.file_store import FileStore

    class Newer(FileStore):
        def __init__(self):
            self.thoughts = []

        def log_thoughts(self, run_id, thoughts):
            self.thoughts.append(thoughts)

        def set_tag(self, run_id, tag, mood=None):
            self.log_thoughts(run_id, mood or tag.value)

    from mlflow.entities import RunTag

    store = guarded_class(Newer, Policy(Redactor()))()
    with pytest.raises(RedactionError, match="log_thoughts of MLflow's Newer"):
        store.log_thoughts("0" * 32, "x")
    with pytest.raises(RedactionError, match="'mood' of set_tag"):
        store.set_tag("0" * 32, RunTag("a", "b"), mood="x")
    store.set_tag("0" * 32, RunTag("api_key", "b"))
    assert store.thoughts == [REDACTED]
    assert isinstance(store, FileStore)
    assert is_guarded(store)


def test_an_entity_of_a_newer_mlflow_is_refused():
    from mlflow.entities import Param

    class Thought(Param):
        pass

    for value in (Thought("a", "b"), [Thought("a", "b")], object()):
        with pytest.raises(RedactionError, match=r"Thought|object"):
            Policy(Redactor()).argument(value)


def test_every_scheme_has_an_entry_point():
    from mlflow.store.artifact.artifact_repository_registry import (
        get_registered_artifact_repositories,
    )
    from mlflow.tracking._model_registry.utils import _get_store_registry
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    schemes = {
        "mlflow.tracking_store": _tracking_store_registry._registry,
        "mlflow.model_registry_store": _get_store_registry()._registry,
        "mlflow.artifact_repository": get_registered_artifact_repositories(),
    }
    for group, known in schemes.items():
        # runs: and models: lead to one of the others; uc is no place for runs.
        left_out = {"", "runs", "models", *({"uc", "databricks-uc"} if "tracking" in group else ())}
        plain = {name for name in known if not name.startswith(PREFIX)} - left_out
        assert {name.removeprefix(PREFIX) for name in groups[group]} == plain


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    "name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
             "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT"],
)  # fmt: skip
def test_a_second_place_for_traces_is_refused(monkeypatch, name):
    # It is how MLflow itself is told of the second place.
    monkeypatch.setenv(name, "true")
    with pytest.raises(ConfigError, match="collector"):
        enforce_mlflow_redaction()


def test_binaries_pass_only_if_that_is_asked_for_and_names_are_redacted_even_so(quick):
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    enforce_mlflow_redaction()
    repository = get_artifact_repository((quick / "artifacts").as_uri())
    (quick / "of a@b.example").write_bytes(b"\x89PNG\0")
    with pytest.raises(RedactionError, match=f"of {REDACTED}"):
        repository.log_artifact(str(quick / "of a@b.example"))
    enforce_mlflow_redaction(insecure_allow_binaries=True)
    enforce_mlflow_redaction()
    repository.log_artifact(str(quick / "of a@b.example"))
    sent = [path.name for path in (quick / "artifacts").iterdir()]
    assert sent == [f"of {REDACTED}"]


@pytest.mark.parametrize(
    ("name", "text", "clean"),
    [
        ("a.csv", "who,password\njo,hunter2\nmo,\n", f"who,password\njo,{REDACTED}\nmo,\n"),
        ("a.CSV", 'api_key;n\r\n"a;b\nc";1\r\n', f"api_key;n\n{REDACTED};1\n"),
        ("a.tsv", "n\tapi_key\n1,2\thunter2\textra\n", f"n\tapi_key\n1,2\t{REDACTED}\textra\n"),
        ("a.csv", "n,password\n1\n", "n,password\n1\n"),
        ("a.csv", 'n,"max_new_tokens"\r\n1,"2"\r\n', 'n,"max_new_tokens"\r\n1,"2"\r\n'),
        ("a.csv", "to a@b.example\n", f"to {REDACTED}\n"),
        ("a.csv", "", ""),
        # What Python's csv refuses.
        ("a.csv", f"n,password\n{'x' * 200_000},hunter2\n", f"n,password\n{REDACTED}"),
        ("a.csv", f"password\r{'x' * 200_000}\r", f"password\r{REDACTED}"),
        ("a.csv", f"n\n{'x' * 200_000}\n", f"n\n{'x' * 200_000}\n"),
    ],
)  # fmt: skip
def test_a_column_that_is_named_like_a_secret_is_taken_out_of_rows(name, text, clean):
    assert Policy(Redactor()).file(name, text) == clean


def test_an_error_about_a_metric_does_not_repeat_what_it_was_given():
    from mlflow.entities import Metric

    for value in ("password=hunter2", b"hunter2"):
        with pytest.raises(RedactionError, match="not a number") as caught:
            Policy(Redactor()).argument([Metric("loss", value, 0, 0)])
        assert "hunter2" not in str(caught.value)
        assert caught.value.__context__ is None


def test_redactors_add_up(quick, mlflow_database):
    import mlflow

    shutil.copy(mlflow_database, quick / "m.db")
    enforce_mlflow_redaction(Redactor(extra_patterns=[r"MRN-\d+"]))
    enforce_mlflow_redaction(Redactor())
    client = mlflow.MlflowClient(f"sqlite:///{quick}/m.db")
    run = client.create_run("0").info.run_id
    client.log_param(run, "patient", "MRN-123 a@b.example")
    assert client.get_run(run).data.params == {"patient": f"{REDACTED} {REDACTED}"}
