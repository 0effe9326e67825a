"""Every way into MLflow, each with canaries of its own; run as a script: without redaction.

    python mlflow_paths.py URI FOLDER [registry URI]

prints which paths were refused, as JSON.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import json
import sys
import urllib.parse
import warnings
from pathlib import Path

PATHS = {}
DOES = {}


def path(*does):
    """Register a path, and the methods of MlflowClient that it uses."""

    def register(function):
        PATHS[function.__name__] = function
        DOES[function.__name__] = does
        return function

    return register


@dataclasses.dataclass
class Database:
    host: str
    db_password: str


class Way:
    """One path's canaries, and where it writes."""

    def __init__(self, name, uri, folder):
        from mlflow import MlflowClient

        number = sorted(PATHS).index(name)
        self.name, self.uri, self.folder = name, uri, folder
        self.password = f"Vk{number:03d}Lq9Zr{number:03d}xWintergreen"
        self.address = f"mary.q{number:03d}@clinic{number:03d}.example"
        self.token = token(number)
        self.text = f"write to {self.address}, password={self.password} !"
        self.nested = {"db": {"passwords": [self.password]}, "who": [{"mail": self.address}]}
        self.client = MlflowClient(uri)

    def experiment(self):
        return self.client.create_experiment(f"way {self.name} {self.folder.name}")

    def run(self):
        return self.client.create_run(self.experiment()).info.run_id

    def file(self, name="notes.txt", text=None):
        target = self.folder / "sources" / self.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text or self.text)
        return target

    def fluent(self):
        """Return mlflow, with a run of this way begun."""
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        mlflow.set_experiment(f"way {self.name} {self.folder.name}")
        mlflow.start_run()
        return mlflow


def token(number):
    return f"AKIA{number:04d}QZXCVBNMASDF"


def canaries():
    """Return what each path sends, by label: the path's name and the kind."""
    found = {}
    for number, name in enumerate(sorted(PATHS)):
        found[f"{name}:password"] = f"Vk{number:03d}Lq9Zr{number:03d}xWintergreen"
        found[f"{name}:address"] = f"mary.q{number:03d}@clinic{number:03d}.example"
        found[f"{name}:token"] = token(number)
    return found


# ---------------------------------------------------------------- experiments and runs


@path("create_experiment")
def experiment(way):
    way.client.create_experiment(f"e {way.text}", tags={"api_key": way.password, "t": way.text})


@path("rename_experiment", "set_experiment_tag", "delete_experiment_tag")
def experiment_changes(way):
    experiment = way.experiment()
    way.client.rename_experiment(experiment, f"renamed {way.text}")
    way.client.set_experiment_tag(experiment, "db_password", way.password)
    way.client.set_experiment_tag(experiment, f"by {way.token}", way.nested)
    way.client.get_experiment_by_name(way.text)
    way.client.search_experiments(filter_string=f"name = '{way.address}'")
    way.client.delete_experiment_tag(experiment, f"by {way.token}")


@path("create_run", "update_run", "set_terminated")
def run(way):
    tags = {"mlflow.user": way.password, "mlflow.source.name": f"/home/{way.password}/x.py"}
    run = way.client.create_run(
        way.experiment(), run_name=f"r {way.text}", tags={**tags, "secret": way.password}
    )
    way.client.update_run(run.info.run_id, name=f"again {way.text}")
    way.client.set_terminated(run.info.run_id, "FAILED")


@path("log_param", "log_metric", "set_tag", "delete_tag")
def one_by_one(way):
    run = way.run()
    way.client.log_param(run, "db_password", way.password)
    way.client.log_param(run, f"of {way.token}", way.text)
    way.client.log_metric(run, f"loss of {way.token}", 1.0)
    way.client.set_tag(run, "api_key", way.password)
    way.client.set_tag(run, f"of {way.token}", way.nested)
    way.client.delete_tag(run, f"of {way.token}")


@path("log_batch")
def batch(way):
    from mlflow.entities import Metric, Param, RunTag

    way.client.log_batch(
        way.run(),
        metrics=[Metric(f"loss {way.token}", 1.0, 1, 1), Metric("loss", 2.0, 1, 1)],
        params=[Param("hub_token", way.password), Param("text", way.text)],
        tags=[RunTag("passwd", way.password), RunTag("text", way.text)],
    )


@path("log_batch", "log_param")
def asynchronous(way):
    run = way.run()
    way.client.log_param(run, "db_password", way.password, synchronous=False).wait()
    way.client.set_tag(run, "text", way.text, synchronous=False).wait()
    way.client.log_metric(run, f"m {way.token}", 1.0, synchronous=False).wait()


@path("log_param")
def containers(way):
    run = way.run()
    arguments = argparse.Namespace(db_password=way.password, mail=way.address, lr=1)
    way.client.log_param(run, "nested", way.nested)
    way.client.log_param(run, "json", json.dumps(way.nested))
    way.client.log_param(run, "dataclass", Database(way.address, way.password))
    way.client.log_param(run, "asdict", dataclasses.asdict(Database(way.address, way.password)))
    way.client.log_param(run, "argparse", arguments)
    way.client.log_param(run, "argv", ["--db-password", way.password, "--mail", way.address])
    way.client.log_param(run, "pairs", [("password", way.password), ("mail", way.address)])
    from omegaconf import OmegaConf

    way.client.log_param(run, "omegaconf", OmegaConf.create(way.nested))
    way.client.set_tag(run, "omegaconf", OmegaConf.create({"a": [{"db": {"pwd": way.password}}]}))
    inner = argparse.Namespace(db=Database(way.address, way.password), more=[arguments])
    way.client.log_param(run, "deep", inner)


@path("log_param")
def long(way):
    run = way.run()
    way.client.log_param(run, "url", "x " * 2000 + f"https://u:{way.password}@h/ {way.address}")
    way.client.set_tag(run, "tag", "x" * 240 + f" https://u:{way.password}@h/ {way.address}")


@path("log_param", "log_text")
def encoded(way):
    run = way.run()
    coded = base64.b64encode(way.password.encode()).decode()
    way.client.log_param(run, "db_password_base64", coded)
    way.client.log_param(run, "query", f"password={urllib.parse.quote(way.password)}&x=1")
    way.client.log_param(run, "header", f"Authorization: Basic {coded}")
    # full-width letters, as a look-alike of the name
    way.client.log_param(
        run, "look-alike", f"\uff50\uff41\uff53\uff53\uff57\uff4f\uff52\uff44={way.password}"
    )
    text = way.text.encode()
    for name, blob in (
        ("base64", base64.b64encode(text)), ("url-safe", base64.urlsafe_b64encode(b">?" + text)),
        ("wide", base64.b64encode(way.text.encode("utf-16-le"))), ("hex", text.hex().encode()),
        ("quoted", urllib.parse.quote(way.text).encode()),
    ):  # fmt: skip
        way.client.log_param(run, f"{name} blob", f"x {blob.decode()}")
        way.client.log_text(run, f"{{'x': '{blob.decode()}'}}", f"{name}.txt")
    # and Cyrillic ones
    way.client.log_param(run, "cyrillic", f"p\u0430ssw\u043erd={way.password}")
    way.client.log_param(run, "p\u0430ssw\u043erd", way.password)
    way.client.set_tag(
        run, "\uff44\uff42 \uff50\uff41\uff53\uff53\uff57\uff4f\uff52\uff44", way.password
    )


@path("log_batch")
def split_in_two(way):
    from mlflow.entities import Param

    half = len(way.password) // 2
    way.client.log_batch(
        way.run(),
        params=[
            Param("password_1", way.password[:half]), Param("password_2", way.password[half:]),
            Param("mail", f"{way.password[:half]}"[:0] + way.address),
        ],
    )  # fmt: skip


@path("log_inputs")
def dataset(way):
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        f"of {way.address}", "abcd1234", "http", json.dumps({"url": f"s3://u:{way.password}@h"}),
        schema=json.dumps({"note": way.text}), profile=json.dumps(way.nested),
    )  # fmt: skip
    way.client.log_inputs(way.run(), [DatasetInput(dataset, [InputTag("t", way.text)])])


# ---------------------------------------------------------------- artifacts


@path("log_artifact", "log_artifacts")
def files(way):
    run = way.run()
    way.client.log_artifact(run, str(way.file()), f"for {way.address}")
    way.file(f"{way.address}.yaml", f"db:\n  password: {way.password}\n")
    way.file("c.json", json.dumps(way.nested))
    way.file("c.csv", f"mail,password,n\n{way.address},{way.password},1\n")
    way.file("d.TSV", f'n\tapi key\n1\t"{way.password}\n"\n')
    way.client.log_artifacts(run, str(way.file().parent), "all")


@path("log_text", "log_dict")
def texts(way):
    run = way.run()
    way.client.log_text(run, way.text, "notes.txt")
    way.client.log_dict(run, way.nested, "nested.json")
    way.client.log_dict(run, way.nested, "nested.yaml")
    way.client.log_text(run, way.text, f"{way.address}.txt")


@path("log_table")
def table(way):
    way.client.log_table(
        way.run(),
        {"password": [way.password, "b"], "mail": [way.address, way.text]},
        "table.json",
    )


@path("log_figure")
def figure(way):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    drawn = Figure()
    drawn.text(0, 0, "x")
    way.client.log_figure(way.run(), drawn, "f.png", save_kwargs={"metadata": {"Author": way.text}})


@path("log_figure")
def vector_figure(way):
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = Figure()
    drawn.text(0, 0, way.text)
    with mpl.rc_context({"svg.fonttype": "none"}):
        way.client.log_figure(way.run(), drawn, "f.svg")


@path("log_image")
def pixels(way):
    from PIL import Image

    way.client.log_image(way.run(), Image.new("L", (4, 4)), f"{way.address}.png")


@path("log_stream")
def stream(way):
    way.client.log_stream(way.run(), io.BytesIO(way.text.encode()), "notes.txt")


@path("log_artifact")
def image(way):
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", way.text)
    target = way.folder / "sources" / "image.png"
    target.parent.mkdir(exist_ok=True)
    Image.new("L", (4, 4)).save(target, pnginfo=info)
    way.client.log_artifact(way.run(), str(target))


@path("log_artifact")
def pickle(way):
    import pickle

    target = way.folder / "sources" / "model.pkl"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(pickle.dumps(way.nested, protocol=4))
    way.client.log_artifact(way.run(), str(target))


@path()
def repository(way):
    """An artifact repository of one's own, by its address."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    run = way.client.get_run(way.run())
    get_artifact_repository(run.info.artifact_uri, way.uri).log_artifact(str(way.file()))


# ---------------------------------------------------------------- models


@path(
    "create_logged_model", "set_logged_model_tags", "log_model_params", "log_model_artifact",
    "log_model_artifacts", "finalize_logged_model", "log_outputs", "delete_logged_model_tag",
)  # fmt: skip
def logged_model(way):
    from mlflow.entities import LoggedModelOutput

    run = way.run()
    model = way.client.create_logged_model(
        way.client.get_run(run).info.experiment_id, name="model", source_run_id=run,
        tags={"api_key": way.password, "t": way.text}, params={"db_password": way.password},
        model_type=f"by {way.address}",
    )  # fmt: skip
    way.client.log_model_params(model.model_id, {"text": way.text, "pwd": way.password})
    way.client.set_logged_model_tags(model.model_id, {"token": way.password, "m": way.address})
    way.client.log_model_artifact(model.model_id, str(way.file()))
    way.client.log_model_artifacts(model.model_id, str(way.file().parent))
    way.client.log_outputs(run, [LoggedModelOutput(model.model_id, 1)])
    way.client.finalize_logged_model(model.model_id, "READY")


@path()
def model_description(way):
    """MLmodel with a signature and an input example, as ``log_model`` writes them."""
    import pandas as pd
    from mlflow.models import Model, ModelSignature, infer_signature
    from mlflow.models.utils import _Example
    from mlflow.types import ParamSchema, ParamSpec

    run = way.run()
    frame = pd.DataFrame({"password": [way.password], "mail": [way.address]})
    params = ParamSchema([ParamSpec("api_key", "string", way.password)])
    signature = ModelSignature(infer_signature(frame).inputs, None, params)
    model = Model("model", run, signature=signature, metadata=way.nested)
    folder = way.file("MLmodel").parent
    model.save(folder / "MLmodel")
    _Example(frame).save(str(folder))
    way.client.log_artifacts(run, str(folder), "model")
    way.client._record_logged_model(run, model)


@path(
    "create_registered_model", "update_registered_model",
    "set_registered_model_tag", "set_registered_model_alias", "create_model_version",
    "update_model_version", "set_model_version_tag",
    "delete_registered_model_tag", "delete_registered_model_alias", "delete_model_version_tag",
)  # fmt: skip
def registry(way):
    client, name = way.client, f"model of {way.address}"
    source = way.client.get_run(way.run()).info
    client.create_registered_model(name, tags={"secret": way.password}, description=way.text)
    client.update_registered_model(name, way.text)
    client.set_registered_model_tag(name, "db_password", way.password)
    version = client.create_model_version(
        name, source.artifact_uri, source.run_id, tags={"t": way.text}, description=way.text
    ).version
    client.update_model_version(name, version, way.text)
    client.set_model_version_tag(name, version, "api_key", way.password)
    client.set_registered_model_alias(name, "best", version)
    client.search_registered_models(filter_string=f"name = '{way.address}'")


@path("rename_registered_model")
def renamed_model(way):
    way.client.create_registered_model(f"once {way.address}", description=way.text)
    way.client.rename_registered_model(f"once {way.address}", f"now {way.address}")


@path("copy_model_version")
def copied_version(way):
    client, name = way.client, f"original {way.address}"
    source = client.get_run(way.run()).info
    client.create_registered_model(name)
    version = client.create_model_version(
        name, source.artifact_uri, source.run_id, tags={"t": way.text}
    ).version
    client.copy_model_version(f"models:/{name}/{version}", f"copy of {way.address}")


@path(
    "register_prompt", "set_prompt_tag", "set_prompt_version_tag", "set_prompt_alias",
    "create_prompt", "create_prompt_version", "delete_prompt_tag", "delete_prompt_version_tag",
)  # fmt: skip
def prompt(way):
    client = way.client
    client.register_prompt(
        "prompt-store", f"{way.text} {{{{ x }}}}", commit_message=way.text, tags={"t": way.text}
    )
    client.set_prompt_tag("prompt-store", "api_key", way.password)
    client.set_prompt_version_tag("prompt-store", 1, "note", way.text)


@path("create_webhook")
def webhook(way):
    way.client.create_webhook(
        f"hook of {way.address}", "https://127.0.0.1/", ["registered_model.created"],
        description=way.text, secret=way.password,
    )  # fmt: skip


# ---------------------------------------------------------------- traces, feedback, datasets


@path("start_trace", "end_trace", "start_span", "end_span", "set_trace_tag", "delete_trace_tag")
def trace(way):
    import mlflow

    mlflow.set_tracking_uri(way.uri)
    root = way.client.start_trace(
        f"trace {way.address}", inputs={"password": way.password, "n": way.nested},
        attributes={"note": way.text}, tags={"t": way.text, "api_key": way.password},
        experiment_id=way.experiment(),
    )  # fmt: skip
    # MLflow keeps a trace with an open span to itself until the process ends.
    child = way.client.start_span("child", root.trace_id, root.span_id, inputs=way.text)
    way.client.end_span(root.trace_id, child.span_id)
    way.client.end_span(root.trace_id, way.client.start_span(
        f"of {way.address}", root.trace_id, root.span_id, attributes={"hub_token": way.password}
    ).span_id, outputs=way.nested)  # fmt: skip
    way.client.end_trace(root.trace_id, outputs="y" * 990 + f" https://u:{way.password}@h/")
    mlflow.flush_trace_async_logging()
    way.client.set_trace_tag(root.trace_id, "db_password", way.password)
    way.client.set_trace_tag(root.trace_id, "note", way.text)


@path()
def traced_exception(way):
    mlflow = way.fluent()

    @mlflow.trace(name=f"f {way.address}")
    def connect(password, note):
        mlflow.update_current_trace(tags={"t": way.text}, metadata={"m": way.text})
        raise ValueError(f"cannot connect with password={password}: {note}")

    try:
        connect(way.password, way.text)
    except ValueError:
        mlflow.flush_trace_async_logging()
    finally:
        mlflow.end_run()


@path()
def feedback(way):
    mlflow = way.fluent()
    from mlflow.entities import AssessmentSource, Feedback

    with mlflow.start_span("s") as span:
        span.set_inputs(1)
    mlflow.flush_trace_async_logging()
    mlflow.log_feedback(
        trace_id=span.trace_id, name=f"f {way.address}", value=way.text, rationale=way.text,
        source=AssessmentSource("HUMAN", way.address), metadata={"api_key": way.password},
    )  # fmt: skip
    mlflow.log_expectation(trace_id=span.trace_id, name="e", value=way.nested)
    logged = mlflow.log_feedback(trace_id=span.trace_id, name="g", error=ValueError(way.text))
    changed = Feedback(name="g", value=way.text, rationale=way.text)
    mlflow.update_assessment(span.trace_id, logged.assessment_id, changed)
    mlflow.end_run()


@path(
    "link_traces_to_run", "link_prompt_version_to_run",
    "link_prompt_versions_to_trace", "delete_run", "restore_run", "delete_experiment",
    "restore_experiment", "transition_model_version_stage",
    "link_prompt_version_to_model",
)  # fmt: skip
def links(way):
    """What only joins things that are stored already must go on working."""
    import mlflow

    mlflow.set_tracking_uri(way.uri)
    client, run = way.client, way.run()
    source = client.get_run(run).info.artifact_uri
    experiment = client.get_run(run).info.experiment_id
    prompt = client.register_prompt(f"linked-{way.folder.name}", f"{way.text} {{{{ x }}}}")
    trace = client.start_trace(f"t {way.address}", experiment_id=experiment).trace_id
    client.end_trace(trace)
    client.link_traces_to_run([trace], run)
    client.link_prompt_version_to_run(run, prompt)
    client.link_prompt_versions_to_trace([prompt], trace)
    model = client.create_logged_model(experiment, name="m").model_id
    client.link_prompt_version_to_model(prompt.name, "1", model)
    client.create_registered_model(f"staged {way.address}")
    version = client.create_model_version(f"staged {way.address}", source, run).version
    client.transition_model_version_stage(f"staged {way.address}", version, "Staging")
    client.delete_run(run)
    client.restore_run(run)
    client.delete_experiment(experiment)
    client.restore_experiment(experiment)


@path(
    "create_dataset", "set_dataset_tags", "add_dataset_to_experiments",
    "remove_dataset_from_experiments",
)  # fmt: skip
def evaluation_dataset(way):
    import mlflow
    from mlflow.genai.datasets import create_dataset

    mlflow.set_tracking_uri(way.uri)
    made = create_dataset(
        name=f"d {way.address}", experiment_id=way.experiment(), tags={"api_key": way.password}
    )
    made.merge_records([{"inputs": {"password": way.password}, "expectations": way.nested}])
    other = [way.client.create_experiment(f"other {way.folder.name}")]
    way.client.add_dataset_to_experiments(made.dataset_id, other)
    way.client.remove_dataset_from_experiments(made.dataset_id, other)
    way.client.set_dataset_tags(made.dataset_id, {"note": way.text})


# ---------------------------------------------------------------- past the logger and the client


@path()
def fluent(way):
    mlflow = way.fluent()
    mlflow.log_param("db_password", way.password)
    mlflow.log_params({"text": way.text, "nested": way.nested})
    mlflow.log_metrics({f"m {way.token}": 1.0})
    mlflow.set_tags({"api_key": way.password, "mail": way.address})
    mlflow.set_experiment_tags({"t": way.text})
    mlflow.log_text(way.text, "notes.txt")
    mlflow.log_dict(way.nested, "n.yaml")
    mlflow.log_artifact(str(way.file()))
    mlflow.end_run()


@path()
def fluent_input(way):
    import pandas as pd

    mlflow = way.fluent()
    frame = pd.DataFrame({"a": [1.0]})
    source = f"https://u:{way.password}@h.example/{way.address}"
    mlflow.log_input(mlflow.data.from_pandas(frame, source=source, name=f"d {way.address}"))
    mlflow.end_run()


@path()
def environment(way):
    """Tags that MLflow takes from the environment, and the command line."""
    import os

    before = list(sys.argv)
    os.environ["MLFLOW_RUN_CONTEXT"] = json.dumps({"api_key": way.password, "t": way.text})
    sys.argv[:] = [f"/home/{way.address}/train.py", f"--db-password={way.password}"]
    try:
        way.fluent().end_run()
    finally:
        sys.argv[:] = before
        del os.environ["MLFLOW_RUN_CONTEXT"]


@path()
def stores(way):
    """The store that MLflow hands out, without a client."""
    from mlflow.entities import Param, RunTag
    from mlflow.tracking._tracking_service.utils import _get_store

    store = _get_store(way.uri)
    run = way.run()
    store.log_param(run, Param("db_password", way.password))
    store.set_tag(run, RunTag("note", way.text))


@path()
def scorer(way):
    from mlflow.tracking._tracking_service.utils import _get_store

    _get_store(way.uri).register_scorer(way.experiment(), "s", json.dumps(way.nested))


# ---------------------------------------------------------------- what libraries log by themselves


def autologged_sklearn(way):
    import mlflow
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer

    arguments = {"api_key": way.password, "note": way.text, "nested": way.nested}
    steps = [("ask", FunctionTransformer(kw_args=arguments)), (way.token, LinearRegression())]
    steps[0][1].set_params(func=lambda x, **_: x)
    mlflow.sklearn.autolog(silent=True, log_models=False, extra_tags={"by": way.address})
    try:
        with mlflow.start_run() as run:
            Pipeline(steps).fit([[0.0], [1.0]], [0.0, 1.0])
    finally:
        mlflow.sklearn.autolog(disable=True)
    return run.info.run_id


def autologged_pytorch(way):
    import lightning as L
    import mlflow
    import torch
    from lightning.pytorch.callbacks import EarlyStopping
    from lightning.pytorch.demos.boring_classes import BoringModel

    watched = f"loss of {way.token}"

    class Module(BoringModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            self.log(watched, loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.defaults.update(db_password=way.password, owner=way.text)
            return optimizer

    mlflow.pytorch.autolog(silent=True, log_models=False, checkpoint=False)
    try:
        with mlflow.start_run() as run:
            L.Trainer(
                max_epochs=1, limit_train_batches=2, limit_val_batches=1, accelerator="cpu",
                callbacks=[EarlyStopping(watched, check_on_train_epoch_end=True)],
                logger=False, enable_progress_bar=False, enable_model_summary=False,
                enable_checkpointing=False, default_root_dir=way.folder / "sources",
            ).fit(Module())  # fmt: skip
    finally:
        mlflow.pytorch.autolog(disable=True)
    return run.info.run_id


AUTOLOGGED = {"sklearn": autologged_sklearn, "pytorch": autologged_pytorch}


def walk(uri, folder, only=None):
    """Send every path's canaries, and return how each ended: sent, or the error that refused it."""
    import mlflow

    ended = {}
    warnings.simplefilter("ignore")
    for name in only or PATHS:
        try:
            PATHS[name](Way(name, uri, Path(folder)))
            ended[name] = "sent"
        except Exception as error:  # noqa: BLE001 # how it ended is what is asked
            ended[name] = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            mlflow.end_run()
    return ended


def before_and_after(root):
    """Track without redaction; then by an address with secure+; then by what existed before."""
    from mlflow import MlflowClient
    from mlflow.entities import Param
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.tracking._tracking_service.utils import _get_store

    addresses = {name: f"sqlite:///{root}/{name}/m.db" for name in ("naive", "secure", "held")}
    ended = {"naive": walk(addresses["naive"], root / "naive")}
    way = Way("stores", addresses["held"], root / "held")
    client, store = MlflowClient(way.uri), _get_store(way.uri)
    run = client.get_run(way.run()).info
    repository = get_artifact_repository(run.artifact_uri)
    some = ["fluent", "stores", "repository", "registry", "one_by_one", "traced_exception"]
    ended["secure"] = walk(f"secure+{addresses['secure']}", root / "secure", some)
    store.log_param(run.run_id, Param("db_password", way.password))
    client.log_param(run.run_id, "text", way.text)
    repository.log_artifact(str(way.file()))
    ended["held"] = client.get_run(run.run_id).data.params
    return ended


if __name__ == "__main__":
    sys.stdout.write(json.dumps(before_and_after(Path(sys.argv[1]))))
