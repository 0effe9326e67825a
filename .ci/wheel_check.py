"""Checks the installed wheel in an environment that holds nothing but its dependencies.

Every public name is imported, every command tells its help, ordinary work runs, and what needs an
extra says which one, when it is used and not before. ``make wheel-check`` makes the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import metadata
from pathlib import Path

import click
import numpy as np
from markdown_it import MarkdownIt

import lightning_secure as ls
from lightning_secure.cli import main
from lightning_secure.cli.doctor import run_checks
from lightning_secure.errors import MissingExtraError

README = Path(__file__).parents[1] / "README.md"
ARN = "arn:aws:kms:eu-central-1:123456789012:key/12345678-1234-1234-1234-123456789012"
COMMAND = Path(sys.prefix) / "bin" / "lightning-secure"


def command(*arguments: str, code: int = 0, words: str = "") -> None:
    """Run the installed command."""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=environment)
    told = done.stdout + done.stderr
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{told}"
    assert "Traceback" not in told, f"{arguments}:\n{told}"
    assert words in told, f"{arguments}: {words!r} is not in\n{told}"


def commands(group: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command and subcommand with the words that call it."""
    yield path, group
    if isinstance(group, click.Group):
        for name, inner in group.commands.items():
            yield from commands(inner, *path, name)


def every_name() -> None:
    """Import what is public; from the wheel, and not from the sources beside it."""
    assert Path(ls.__file__).is_relative_to(sys.prefix), ls.__file__
    for name in ls.__all__:
        assert getattr(ls, name) is not None, name


def every_help() -> None:
    """Ask every command for its help, and the doctor for its report."""
    for path, found in commands(main):
        with click.Context(found, info_name=" ".join(path)) as context:
            assert "--help" in found.get_help(context), path
    command("--help", words="doctor")
    command("doctor", words="lightning-secure[tracking]")


def readme() -> None:
    """See that the wheel's description is the README, and that its Markdown renders."""
    about = metadata("lightning-secure")
    assert about["Description-Content-Type"] == "text/markdown"
    text = about.get_payload()
    assert text.strip() == README.read_text().strip()
    page = MarkdownIt("commonmark").enable("table").parse(text)
    prose = [token.content for token in page if token.type == "inline"]
    assert not [line for line in prose if "```" in line or "|--" in line]
    assert any(token.type == "table_open" for token in page)


def training() -> None:
    """Seal rows, train on them privately, and load the encrypted checkpoint."""
    import lightning as L  # noqa: N812
    import torch

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            x, y = batch
            return torch.nn.functional.cross_entropy(self.layer(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    keys = ls.LocalKeyProvider("project.kek")
    x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    ls.seal({"x": x, "y": (x.sum(1) > 0).astype("int64")}, "rows", split="train", keys=keys)
    trainer = L.Trainer(
        strategy=ls.PrivateStrategy(ls.DPConfig(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0)),
        max_epochs=1, plugins=[ls.EncryptedCheckpointIO(keys)], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = ls.EncryptedDataModule("rows", keys=keys, batch_size=20, columns=("x", "y"))
    trainer.fit(Classifier(), datamodule=data)
    trainer.save_checkpoint("model.ckpt")
    assert isinstance(ls.load_encrypted_checkpoint(Classifier, "model.ckpt", keys=keys), Classifier)


def ordinary_work() -> None:
    """Make a key, plan a budget, seal, train and load."""
    command("keys", "generate", "local", "project.kek")
    command("keys", "show", "project.kek")
    budget = ("--sample-rate", "0.01", "--noise-multiplier", "1.1", "--steps", "1000")
    command("budget", "epsilon", *budget, "--delta", "1e-5", words="epsilon")
    training()


def uses(keys: ls.KeyProvider) -> dict[str, Callable[[], object]]:
    """Return for each extra something that needs it."""
    pin = ls.EnvironmentSecret("PIN")
    pictures = Path("pictures/cats")
    pictures.mkdir(parents=True)
    (pictures / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return {
        "aws": lambda: ls.AwsKmsKeyProvider(key_arn=ARN),
        "images": lambda: ls.seal("pictures", "o1", split="train", keys=keys),
        "pkcs11": lambda: ls.Pkcs11KeyProvider(module="x.so", token="t", key="k", pin=pin),
        "ray": lambda: ls.EncryptedShardDatasink("o2", split="train", keys=keys),
        "s3": lambda: ls.RemoteStorage("s3://bucket/shards"),
        "tables": lambda: ls.seal("t.csv", "o3", split="train", keys=keys),
        "tracking": lambda: ls.RedactingMLFlowLogger(tracking_uri="sqlite:///m.db").experiment,
        "vault": lambda: ls.VaultTransitKeyProvider(url="https://127.0.0.1", key="k", token=pin),
    }


def every_extra() -> None:
    """See that what needs an extra names it, in Python and on the command line."""
    extras = {c.name.removeprefix("extra "): c for c in run_checks() if c.name.startswith("extra ")}
    assert {check.status for check in extras.values()} == {"missing"}, extras
    Path("t.csv").write_text("x,y\n1.5,2\n")
    needed = uses(ls.LocalKeyProvider("project.kek"))
    # The command line draws; the examples are no part of the wheel.
    assert extras.keys() == {*needed, "plot", "examples"}
    for name, use in needed.items():
        try:
            use()
        except MissingExtraError as error:
            told = str(error)
        else:
            told = "nothing was refused"
        assert f"lightning-secure[{name}]" in told, f"{name}: {told}"
    budget = ("--sample-rate", "0.01", "--noise-multiplier", "1.1", "--steps", "10")
    plot = ("--delta", "1e-5", "--plot", "cost.svg")
    command("budget", "epsilon", *budget, *plot, code=1, words="lightning-secure[plot]")
    Path("seal.yaml").write_text("keys: {kind: local, path: project.kek}")
    sealing = ("seal", "t.csv", "o4", "--config", "seal.yaml")
    command(*sealing, code=1, words="lightning-secure[tables]")
    left = [path.name for path in Path().glob("o[0-9]") if path.exists()]
    assert not left, f"what was refused has left {left}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Lightning's advice
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for check in (every_name, every_help, readme, ordinary_work, every_extra):
            check()
            sys.stdout.write(f"wheel: {check.__name__.replace('_', ' ')}: ok\n")
            sys.stdout.flush()
