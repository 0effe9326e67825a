"""The README's blocks run, its links lead somewhere, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_secure import EncryptedCheckpointIO, EncryptedDataModule

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


class AnyLightningModule(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.layer(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.layer(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def rows(split):
    rng = np.random.default_rng(0)
    for i in range({"train": 600, "val": 40}[split]):
        x = rng.normal(size=4).astype("float32")
        yield {
            "name": f"Mary Whitcombe {i}",
            "birth_date": "1957-03-21",
            "record": f"MRN-{i}",
            "x": x,
            "y": int(x.sum() > 0),
        }


class LossesOfRows(AnyLightningModule):
    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = nn.functional.cross_entropy(self.layer(x), y, reduction="none")
        return {"loss": losses.mean(), "row_loss": losses}


def require_released(strategy, keys):
    """The metrics of the last block are logged, and epsilon covers them."""
    trainer = L.Trainer(
        strategy=strategy, max_epochs=1, limit_val_batches=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        plugins=[EncryptedCheckpointIO(keys)],
    )  # fmt: skip
    data = EncryptedDataModule("shards/", keys=keys, batch_size=60, columns=("x", "y"))
    trainer.fit(LossesOfRows(), datamodule=data)
    assert 0 <= trainer.callback_metrics["train_loss"] < 5
    assert "clipped" in trainer.callback_metrics
    assert 2.9 < strategy.ledger.epsilon() <= 3.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_readmes_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    names = {"rows": rows, "AnyLightningModule": AnyLightningModule}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["trainer"].strategy.ledger.steps == 20
    assert isinstance(names["model"], AnyLightningModule)
    printed = capsys.readouterr().out
    assert "AuditSummary(records=" in printed
    assert 2.9 < names["trainer"].strategy.ledger.epsilon() <= 3.0
    require_released(names["strategy"], names["keys"])
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"Whitcombe" not in written


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_the_tests_that_the_threat_model_names_exist():
    text = (ROOT / "docs" / "threat-model.md").read_text()
    defined = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 5
    for name in named:
        assert f"def {name}(" in defined, name
    for path in re.findall(r"`(tests/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_documents_name_no_machine():
    for document in DOCUMENTS:
        assert not re.search(r"/(root|home|tmp|work)/", document.read_text()), document
