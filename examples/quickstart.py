"""The main job: seal a hospital's table, train on it privately, resume, look for leaks.

    python examples/quickstart.py [--out FOLDER] [--epochs N] [--plant-leak]

Everything is written below one folder, and at the end all of it is searched for what must not be
there. ``--plant-leak`` writes one patient's name into that folder first, to show that the search
finds it. The exit code is 0 only if every line of the table holds.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torchmetrics
from faker import Faker
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from lightning_secure import (
    AnonymizationPlan,
    AuditTrail,
    CanaryHit,
    CanarySearch,
    DPConfig,
    EncryptedCheckpointIO,
    EncryptedDataModule,
    EncryptedShardWriter,
    Generalize,
    LocalKeyProvider,
    PrivacyBudget,
    PrivateStrategy,
    Pseudonymize,
    RedactingMLFlowLogger,
    Suppress,
    WriteWatch,
    load_encrypted_checkpoint,
)
from lightning_secure.errors import LightningSecureError

console = Console()

EPOCHS, MORE_EPOCHS = 30, 2
TARGET_EPSILON, DELTA = 8.0, 1e-4
# Of the 569 patients that were published in 1995, 80 % train. Public, so the sampling rate may be.
PUBLIC_ROWS = 455
VERDICTS = {True: "[green]ok[/]", False: "[red]NO[/]", None: "-"}
MARKER = ".lightning-secure-quickstart"

# Smallest and largest value of each measurement, as printed in the data set's description since
# 1995. Public constants: the model scales by them, and nothing is computed from the sealed rows.
RANGES = (
    (6.981, 28.11), (9.71, 39.28), (43.79, 188.5), (143.5, 2501.0), (0.053, 0.163),
    (0.019, 0.345), (0.0, 0.427), (0.0, 0.201), (0.106, 0.304), (0.05, 0.097),
    (0.112, 2.873), (0.36, 4.885), (0.757, 21.98), (6.802, 542.2), (0.002, 0.031),
    (0.002, 0.135), (0.0, 0.396), (0.0, 0.053), (0.008, 0.079), (0.001, 0.03),
    (7.93, 36.04), (12.02, 49.54), (50.41, 251.2), (185.2, 4254.0), (0.071, 0.223),
    (0.027, 1.058), (0.0, 1.252), (0.0, 0.291), (0.156, 0.664), (0.055, 0.208),
)  # fmt: skip

PASSWORD = "tuesday-Kestrel-4471"
DATABASE_URL = "postgresql://registry:Wintergreen-90210@db.clinic.example/oncology"


# ---------------------------------------------------------------- an ordinary LightningModule


class TumourClassifier(L.LightningModule):
    """Benign or malignant; it knows nothing of privacy or encryption."""

    low: Tensor
    high: Tensor

    def __init__(
        self,
        learning_rate: float = 1.0,
        total_steps: int = 1000,
        db_password: str = "",
        source: str = "",
        contact: str = "",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("low", torch.tensor([low for low, _ in RANGES]))
        self.register_buffer("high", torch.tensor([high for _, high in RANGES]))
        self.layer = nn.Linear(len(RANGES), 2)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)

    def forward(self, x: Tensor) -> Tensor:
        offset = 0.01 * self.high  # most measurements are skewed, and some reach zero
        low, high = torch.log(self.low + offset), torch.log(self.high + offset)
        logits: Tensor = self.layer(2 * (torch.log(x + offset) - low) / (high - low) - 1)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams["learning_rate"], momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.hparams["total_steps"]
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


# ---------------------------------------------------------------- the table of a hospital


@dataclass(frozen=True)
class Patient:
    """A row, as the hospital has it."""

    name: str
    email: str
    birth_date: str
    postcode: str
    record: str
    x: np.ndarray[Any, np.dtype[np.float32]]
    y: int


def load_patients() -> list[Patient]:
    """Return scikit-learn's breast-cancer table with identities made up by Faker."""
    table = load_breast_cancer()
    Faker.seed(20)
    fake = Faker("en_GB")
    patients = []
    for features, label in zip(table.data, table.target, strict=True):
        name = fake.unique.name()
        number = fake.unique.random_number(digits=9, fix_len=True)
        account = f"{name.lower().replace(' ', '.').strip('.')}.{number % 1000}"
        patients.append(
            Patient(
                name=name,
                email=f"{account}@{fake.free_email_domain()}",
                birth_date=fake.date_of_birth(minimum_age=25, maximum_age=90).isoformat(),
                postcode=fake.postcode(),
                record=f"MRN-{number}",
                x=features.astype(np.float32),
                y=int(label),
            )
        )
    return patients


def seal(out: Path, keys: LocalKeyProvider, patients: list[Patient]) -> None:
    """Encrypt the table to two splits; identities are dropped, coarsened or pseudonymised."""
    plan = AnonymizationPlan(
        {
            "name": Suppress(),
            "email": Suppress(),
            "birth_date": Generalize(date="decade"),
            "postcode": Generalize(prefix=2),
            "record": Pseudonymize(domain="patient"),
        }
    )
    labels = [patient.y for patient in patients]
    train, val = train_test_split(
        range(len(patients)), test_size=0.2, stratify=labels, random_state=0
    )
    for split, rows in (("train", train), ("val", val)):
        with EncryptedShardWriter(
            out / "shards",
            split=split,
            keys=keys,
            anonymize=plan,
            segment_bytes=4096,
            shard_bytes=16384,
        ) as writer:
            for row in track(rows, description=f"sealing {split:5}", console=console):
                writer.write(vars(patients[row]))


# ---------------------------------------------------------------- training


def trainer_for(out: Path, keys: LocalKeyProvider, *, epochs: int, planned: int) -> L.Trainer:
    """Return a Trainer with everything in place."""
    return L.Trainer(
        precision="bf16-mixed",
        accelerator="auto",
        devices=1,
        max_epochs=epochs,
        strategy=PrivateStrategy(
            DPConfig(
                target_epsilon=TARGET_EPSILON,
                delta=DELTA,
                max_grad_norm=1.0,
                expected_batch_size=128,
                public_dataset_size=PUBLIC_ROWS,
                planned_epochs=planned,
            )
        ),
        callbacks=[
            PrivacyBudget(every_n_epochs=10),
            AuditTrail(out / "audit"),
            ModelCheckpoint(out / "checkpoints", save_last=True, filename="{epoch}-{step}"),
        ],
        logger=RedactingMLFlowLogger(experiment_name="tumours", save_dir=out / "mlflow"),
        plugins=[EncryptedCheckpointIO(keys)],
        log_every_n_steps=1,
        enable_model_summary=False,
        default_root_dir=out,
    )


def data_for(out: Path, keys: LocalKeyProvider) -> EncryptedDataModule:
    """Return the sealed table; training sees measurements and label, and no pseudonym."""
    return EncryptedDataModule(out / "shards", keys=keys, batch_size=128, columns=("x", "y"))


# ---------------------------------------------------------------- checks


def canaries(patients: list[Patient]) -> dict[str, str | bytes]:
    """Return what must not be found in anything that was written."""
    found: dict[str, str | bytes] = {"password": PASSWORD, "url password": "Wintergreen-90210"}
    for number, patient in enumerate(patients):
        found[f"name {number}"] = patient.name
        found[f"e-mail {number}"] = patient.email
        found[f"record {number}"] = patient.record
        found[f"row {number} as float32"] = patient.x.tobytes()
        found[f"row {number} as float64"] = patient.x.astype(np.float64).tobytes()
        found[f"row {number} as float16"] = patient.x.astype(np.float16).tobytes()
        half = torch.from_numpy(patient.x).bfloat16().view(torch.uint8)
        found[f"row {number} as bfloat16"] = half.numpy().tobytes()
        found[f"row {number} as text"] = ",".join(str(value) for value in patient.x[:4])
        for form, text in printed(patient.x[:4]).items():
            found[f"row {number} as {form}"] = text.encode()
    return found


def printed(values: np.ndarray[Any, Any]) -> dict[str, str]:
    """Return some numbers as CSV, JSON, logs and lists show them, in single and double precision.

    In double precision a number of a float32 row is longer: 17.989999771118164 for 17.99.
    """
    between = {"CSV": ",", "list": ", ", "table": " ", "TSV": "\t", "lines": "\n", "CRLF": "\r\n"}
    digits = {"float32": [str(value) for value in values], "float64": map(str, values.tolist())}
    return {
        f"{name} of {precision}": separator.join(numbers)
        for precision, texts in digits.items()
        if (numbers := list(texts))
        for name, separator in between.items()
    }


def attack(name: str, act: Callable[[], object]) -> tuple[str, bool, str]:
    """Try something that must be refused, and return how it ended."""
    try:
        act()
    except LightningSecureError as error:
        return name, True, f"{type(error).__name__}: {error}"
    return name, False, "it was ACCEPTED"


def read_all(folder: Path, keys: LocalKeyProvider) -> None:
    """Read every row of the training split."""
    data = EncryptedDataModule(folder, keys=keys, batch_size=512)
    data.setup("fit")
    for _ in data.train_dataloader():
        pass


def flip_a_bit(out: Path, keys: LocalKeyProvider) -> None:
    """Change one bit of one shard, as a failing disk or a hostile administrator would."""
    folder = shutil.copytree(out / "shards", out / "attacks" / "flipped")
    shard = sorted((folder / "train").glob("*.lsec"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    read_all(folder, keys)


def swap_shards(out: Path, keys: LocalKeyProvider) -> None:
    """Put one shard of the dataset in another one's place."""
    folder = shutil.copytree(out / "shards", out / "attacks" / "swapped")
    first, second, *_ = sorted((folder / "train").glob("*.lsec"))
    shutil.copyfile(second, first)
    read_all(folder, keys)


def resume_without_ledger(out: Path, keys: LocalKeyProvider, checkpoint: Path) -> None:
    """Take the account of the privacy spent out of a checkpoint, and train on."""
    files = EncryptedCheckpointIO(keys)
    state = files.load_checkpoint(checkpoint)
    del state["lightning_secure"]
    stripped = out / "attacks" / "stripped.ckpt"
    files.save_checkpoint(state, stripped)
    trainer = trainer_for(out, keys, epochs=99, planned=99)
    module = load_encrypted_checkpoint(TumourClassifier, checkpoint, keys=keys)
    trainer.fit(module, datamodule=data_for(out, keys), ckpt_path=stripped)


def search(
    out: Path, patients: list[Patient], watch: WriteWatch
) -> tuple[list[CanaryHit], float, bool]:
    """Search every byte below ``out``, and every other file that was written.

    Returns:
        What was found, the megabytes searched, and whether a planted leak would have been seen.
    """
    finder = CanarySearch(canaries(patients))
    hits = finder.search([out, *watch.outside(out)])
    x = torch.from_numpy(patients[0].x)
    planted = f"re: {patients[-1].email.upper()} {x.tolist()} {list(map(str, patients[1].x))}"
    packed = patients[0].x.tobytes() + x.bfloat16().view(torch.uint8).numpy().tobytes()
    data = planted.replace("'", "").encode() + packed
    control = {hit.label for hit in finder.search_bytes(data, name="control")}
    expected = {
        f"e-mail {len(patients) - 1}",
        "row 0 as list of float64",
        "row 1 as list of float32",
        "row 0 as float32",
        "row 0 as bfloat16",
    }
    return hits, finder.bytes_searched / 1e6, expected <= control


# ---------------------------------------------------------------- the job


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Write all log records and warnings to a file as well, as a cluster would."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    names = ("", "lightning.pytorch", "lightning.fabric", "mlflow")
    logging.captureWarnings(True)
    for name in names:
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("lightning_secure").setLevel(logging.INFO)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()


def run(out: Path, *, epochs: int = EPOCHS, plant_leak: bool = False) -> bool:
    """Do all of it, print the table, and return whether every line holds."""
    watch = WriteWatch()
    fresh_folder(out)
    with logged_to(out / "train.log"):
        patients = load_patients()
        keys = LocalKeyProvider.generate(out / "keys" / "project.kek")
        seal(out, keys, patients)

        planned = epochs + MORE_EPOCHS
        module = TumourClassifier(
            total_steps=planned * 4,
            db_password=PASSWORD,
            source=DATABASE_URL,
            contact=patients[0].email,
        )
        trainer = trainer_for(out, keys, epochs=epochs, planned=planned)
        start = time.perf_counter()
        trainer.fit(module, datamodule=data_for(out, keys))
        seconds = time.perf_counter() - start
        first = ledger_of(trainer)
        rows_per_second = first.steps * first.public.expected_batch_size / seconds

        checkpoint = out / "checkpoints" / "last.ckpt"
        again = load_encrypted_checkpoint(TumourClassifier, checkpoint, keys=keys)
        trainer = trainer_for(out, keys, epochs=planned, planned=planned)
        trainer.fit(again, datamodule=data_for(out, keys), ckpt_path=checkpoint)
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        second = ledger_of(trainer)

        attacks = [
            attack("a flipped bit in a shard", lambda: flip_a_bit(out, keys)),
            attack("a shard in another one's place", lambda: swap_shards(out, keys)),
            attack(
                "a resume without the ledger",
                lambda: resume_without_ledger(out, keys, checkpoint),
            ),
        ]
    if plant_leak:
        (out / "notes.txt").write_text(f"follow-up with {patients[3].name}\n")
    hits, megabytes, search_works = search(out, patients, watch)
    audit = AuditTrail(out / "audit").log_file.verify()

    logger = trainer.logger
    redacted = logger.redactor.counts if isinstance(logger, RedactingMLFlowLogger) else Counter()
    epsilon = second.epsilon()
    # A line without a verdict (None) is a figure, and no check.
    enough = accuracy >= 0.93 if epochs >= EPOCHS else None
    rows: list[tuple[str, bool | None, str]] = [
        ("validation accuracy", enough, f"{accuracy:.3f}"),
        (
            "privacy spent",
            epsilon <= TARGET_EPSILON and second.private,
            f"epsilon {epsilon:.3f} of {TARGET_EPSILON:g}, delta {DELTA:g}",
        ),
        (
            "the ledger went on",
            second.run_id == first.run_id and second.steps == planned * 4,
            f"{first.steps} steps, {second.steps} after the resume",
        ),
        ("throughput", None, f"{rows_per_second:,.0f} rows/s, start-up included"),
        ("audit log", audit.records > 0, f"{audit.records} records, chain intact"),
        ("secrets kept out of MLflow", sum(redacted.values()) > 0, _counted(redacted)),
        (
            f"leaks in {megabytes:.1f} MB written",
            search_works and not hits,
            f"{len(hits)} hits (a planted one is {'seen' if search_works else 'NOT seen'})"
            + "".join(f"\n{hit.label} in {hit.path} ({hit.form})" for hit in hits[:5]),
        ),
        *attacks,
    ]
    table = Table(title="lightning_secure, the main job", show_lines=True)
    for heading in ("", "", "result"):
        table.add_column(heading, overflow="fold")
    for name, holds, result in rows:
        table.add_row(VERDICTS[holds], name, result)
    console.print(table)
    return all(holds is not False for _, holds, _ in rows)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items())) or "none"


def ledger_of(trainer: L.Trainer) -> Any:
    """Return a copy of the account as it is now."""
    strategy = trainer.strategy
    assert isinstance(strategy, PrivateStrategy)  # noqa: S101
    assert strategy.ledger is not None  # noqa: S101
    return type(strategy.ledger).from_state_dict(strategy.ledger.state_dict())


def fresh_folder(out: Path) -> None:
    """Empty the folder of the last run; touch no folder that is not one."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            raise SystemExit(
                f"{out} is not empty and not from an earlier run; choose another --out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("quickstart-run"))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="fewer skip the accuracy check")
    parser.add_argument("--plant-leak", action="store_true", help="let the search find something")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    if not run(options.out, epochs=options.epochs, plant_leak=options.plant_leak):
        sys.exit(1)


if __name__ == "__main__":
    main()
