"""What LightningCLI leaves of a configuration in the folder of a run."""

from __future__ import annotations

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_secure import CanarySearch, RedactingSaveConfigCallback, Redactor
from lightning_secure.errors import ConfigError
from lightning_secure.redaction.redactor import REDACTED

# jsonargparse, not used by this package's own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PASSWORD, ADDRESS = "Wintergreen-90210", "mary.q@clinic.example"
CANARIES = {"password": PASSWORD, "address": ADDRESS, "record": "MRN-1234"}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns of pytest's own


class Part:
    def __init__(self, api_key: str = "", note: str = ""): ...


class Model(BoringModel):
    def __init__(
        self,
        db_password: str = "",
        urls: list[str] | None = None,
        settings: dict[str, str] | None = None,
        part: Part | None = None,
        lr: float = 0.1,
        day: str = "",
    ):
        super().__init__()


ARGUMENTS = [
    f"--model.db_password={PASSWORD}",
    f"--model.urls=['postgres://u:{PASSWORD}@h/x','MRN-1234']",
    f"--model.settings={{owner: {ADDRESS}, hub_token: {PASSWORD}}}",
    "--model.part=Part",
    f"--model.part.api_key={PASSWORD}",
    f"--model.part.note=password={PASSWORD}",
    "--model.lr=0.5",
    "--model.day=2024-01-31",
]


def saved(folder, callback, *, model=Model, arguments=ARGUMENTS, **kwargs):
    """Return the configuration that a fit has left, as text."""
    cli = LightningCLI(
        model,
        BoringDataModule,
        save_config_callback=callback,
        save_config_kwargs=kwargs,
        seed_everything_default=1,
        run=False,
        args=arguments,
        trainer_defaults={
            "fast_dev_run": False, "max_epochs": 1, "limit_train_batches": 1,
            "limit_val_batches": 0, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
            "default_root_dir": str(folder),
        },
    )  # fmt: skip
    cli.trainer.fit(cli.model, cli.datamodule)
    return (folder / kwargs.get("config_filename", "config.yaml")).read_text()


def found(folder):
    return {hit.label for hit in CanarySearch(CANARIES).search([folder])}


def test_a_configuration_is_saved_without_secrets(tmp_path):
    (tmp_path / "a").mkdir()
    saved(tmp_path / "a", SaveConfigCallback)
    assert found(tmp_path / "a") == set(CANARIES)

    redactor = Redactor(extra_patterns=[r"MRN-\d+"])
    (tmp_path / "b").mkdir()
    text = saved(tmp_path / "b", RedactingSaveConfigCallback, redactor=redactor)
    assert found(tmp_path / "b") == set()
    model = yaml.safe_load(text)["model"]
    assert model["db_password"] == model["settings"]["owner"] == REDACTED
    assert model["urls"] == [f"postgres://{REDACTED}@h/x", REDACTED]
    assert model["part"]["init_args"] == {"api_key": REDACTED, "note": f"password={REDACTED}"}
    assert (model["lr"], model["day"]) == (0.5, "2024-01-31")
    assert redactor.counts["extra-0"] == 1


def test_a_configuration_with_nothing_in_it_is_saved_as_it_is(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    clean = {"model": BoringModel, "arguments": ["--trainer.gradient_clip_val=0.5"]}
    before = saved(tmp_path / "a", SaveConfigCallback, **clean)
    after = saved(tmp_path / "b", RedactingSaveConfigCallback, config_filename="c.yml", **clean)
    assert "gradient_clip_val: 0.5" in after
    assert after == before.replace(str(tmp_path / "a"), str(tmp_path / "b"))


def test_what_is_saved_elsewhere_is_redacted_too(tmp_path):
    sent = []

    class Sending(RedactingSaveConfigCallback):
        """As Lightning's documentation shows it."""

        def save_config(self, trainer, pl_module, stage):
            sent.append(self.parser.dump(self.config, skip_none=False))

    text = saved(tmp_path, Sending, redactor=Redactor(extra_patterns=[r"MRN-\d+"]))
    assert sent == [text]


def test_a_configuration_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(RuntimeError, match="to NOT exist"):
        saved(tmp_path, RedactingSaveConfigCallback)
    assert (tmp_path / "config.yaml").read_text() == "mine"
    assert "lr: 0.5" in saved(tmp_path, RedactingSaveConfigCallback, overwrite=True)


def test_a_file_that_came_meanwhile_is_left_alone(tmp_path):
    callback = RedactingSaveConfigCallback(_Parser(), {})
    (tmp_path / "c.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="not to be overwritten"):
        callback.parser.save({}, str(tmp_path / "c.yaml"))
    with pytest.raises(ConfigError, match="multifile"):
        callback.parser.save({}, str(tmp_path / "d.yaml"), multifile=True)


def test_several_files_are_refused():
    with pytest.raises(ConfigError, match="multifile"):
        RedactingSaveConfigCallback(_Parser(), {}, multifile=True)


class _Parser:
    def dump(self, config, **options):
        return "lr: 1\n"
