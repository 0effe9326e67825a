"""A run by LightningCLI that fails, with secrets in all that Lightning writes of it.

    python leaking_run.py FOLDER

It runs twice, in ``FOLDER/plain`` as Lightning does by itself and in ``FOLDER/redacted`` with what
this package has against it. In each, ``outside.json`` lists what was written elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import rich.console
import rich.logging
import rich.traceback
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_secure import RedactingFilter, RedactingSaveConfigCallback, WriteWatch

PASSWORD, ADDRESS, TOKEN = "Wintergreen-90210", "mary.q@clinic.example", "AKIAIOSFODNN7EXAMPLE"

log = logging.getLogger("a.hospital")


class Model(BoringModel):
    def __init__(self, db_password: str = "", source: str = "", contact: str = ""):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        password = self.hparams.db_password
        self.log(f"loss of {ADDRESS}", batch.mean())
        log.warning("batch %d for %s", batch_idx, ADDRESS, extra={"token": TOKEN})
        if batch_idx == 2:
            try:
                raise ConnectionError(f"{self.hparams.source} refused {len(password)} letters")
            except ConnectionError:
                log.exception("no connection")
                raise RuntimeError(f"{ADDRESS} cannot be read") from KeyError(f"token={TOKEN}")
        return super().training_step(batch, batch_idx)


def arguments(folder: Path, redacted: bool) -> list[str]:
    logger = f"{{class_path: CSVLogger, init_args: {{save_dir: {folder}}}}}"
    if redacted:
        logger = (
            f"{{class_path: lightning_secure.RedactingLogger, init_args: {{logger: {logger}}}}}"
        )
    return [
        "--seed_everything=1",
        f"--trainer.logger={logger}",
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        *(["--trainer.plugins=lightning_secure.RedactingCheckpointIO"] if redacted else []),
        f"--model.db_password={PASSWORD}",
        f"--model.source=postgres://u:{PASSWORD}@db/x",
        f"--model.contact={ADDRESS}",
    ]


def run(folder: Path, *, redacted: bool) -> None:
    watch = WriteWatch()
    os.chdir(folder)
    output = (folder / "output.txt").open("w")
    rich.traceback.install(
        show_locals=True, console=rich.console.Console(file=output, width=200, force_terminal=True)
    )
    console = rich.console.Console(file=(folder / "rich.log").open("w"), width=200)
    handlers = [
        logging.FileHandler(folder / "train.log"),
        rich.logging.RichHandler(
            console=console, rich_tracebacks=True, tracebacks_show_locals=True
        ),
    ]
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    guard = RedactingFilter().install() if redacted else contextlib.nullcontext()
    with guard, contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            cli = LightningCLI(
                Model,
                BoringDataModule,
                save_config_callback=RedactingSaveConfigCallback
                if redacted
                else SaveConfigCallback,
                run=False,
                args=arguments(folder, redacted),
            )
            cli.trainer.fit(cli.model, cli.datamodule)
        except RuntimeError:
            sys.excepthook(*sys.exc_info())
    output.close()
    (folder / "outside.json").write_text(json.dumps([str(p) for p in watch.outside(folder)]))


if __name__ == "__main__":
    root = Path(sys.argv.pop())
    warnings.simplefilter("ignore")
    for name in ("plain", "redacted"):
        (root / name).mkdir()
        child = os.fork()
        if child == 0:
            run(root / name, redacted=name == "redacted")
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(1)
