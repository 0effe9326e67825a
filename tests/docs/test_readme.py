"""The README's blocks run, its links lead somewhere, and what it names exists."""

from __future__ import annotations

import inspect
import json
import re
import statistics
import tomllib
from pathlib import Path

import click
import lightning as L
import numpy as np
import picture
import pytest
import redaction
import torch
from torch import nn

import lightning_secure
from lightning_secure import EncryptedCheckpointIO, EncryptedDataModule
from lightning_secure.cli import main

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
    data = EncryptedDataModule("patients/", keys=keys, batch_size=60, columns=("x", "y"))
    trainer.fit(LossesOfRows(), datamodule=data)
    # Of two classes it is about 0.65, in 10 steps of 60 expected rows, each with noise of its own.
    noise = 20 * 2.5 / 60 / 10**0.5
    assert abs(trainer.callback_metrics["train_loss"] - 0.65) < 7 * noise
    assert "clipped" in trainer.callback_metrics
    assert 2.9 < strategy.ledger.epsilon() <= 3.0


def require_nothing_in_the_clear(folder, names):
    """No row and no weight stands in a file; written in the clear, both would be found."""
    weights = names["trainer"].lightning_module.state_dict()
    row, weight = names["table"]["x"][0], weights["net.0.weight"][0].numpy()
    torch.save({"row": torch.from_numpy(row), **weights}, folder / "plain.pt")
    for needle in (row.tobytes(), weight.tobytes()):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 5
        assert [p.name for p in files if needle in p.read_bytes()] == ["plain.pt"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_readmes_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    assert blocks[0].count("\n") < 40
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(blocks[0], "README.md", "exec"), names)
    accuracy, spent = capsys.readouterr().out.splitlines()[-1].split()
    assert 0.85 < float(accuracy.strip("tensor()")) < 0.97
    assert 2.9 < float(spent) <= 3.0
    require_nothing_in_the_clear(tmp_path, names)
    names |= {"rows": rows}
    for block in blocks[1:]:
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["model"], names["Digits"])
    assert "AuditSummary(records=" in capsys.readouterr().out
    require_released(names["strategy"], names["keys"])
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"Whitcombe" not in written


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_the_readmes_speeds_are_those_of_the_stored_result():
    text = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(
        r"On (\w+) cores, .* 3 KB are read ([\d.]+) times as fast as litdata reads its plaintext "
        r"shuffled, and ([\d.]+) times as fast as it does at its best; rows of 150 KB ([\d.]+) "
        r"times as fast as it does at its best, and ([\d.]+) times as fast as it does with "
        r"Fernet\. `Trainer\.fit` of a small CNN takes ([\d.]+) times as long as with tensors in "
        r"RAM\.",
        text,
    )
    result = json.loads((ROOT / "benchmarks" / "results" / "shards.json").read_text())
    fits, found = result["fits"]["seconds"], result["ratios"]
    fit = statistics.median(a / b for a, b in zip(fits["aes"], fits["ram"], strict=True))
    assert said.groups() == (
        {2: "two"}[result["machine"]["cores"]],
        f"{picture.speeds(result, '3kb')['aes']:.1f}",
        f"{found['window_aes_vs_litdata_plain_3kb']:.1f}",
        f"{found['window_aes_vs_litdata_plain_150kb']:.2f}",
        f"{found['window_aes_vs_litdata_fernet_150kb']:.1f}",
        f"{fit:.2f}",
    )


def test_the_readmes_figures_of_redaction_are_those_of_the_stored_result():
    """Neither stands there without the other."""
    text = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(
        r"at least ([\d.]+) % of e-mail and IP addresses, .* and ([\d.]+) % of secrets in their "
        r"documented formats are found; of 1,500 harmless lines (\d+) are taken for one\. "
        r"`log_metrics` of ten metrics takes (\d+) µs longer beside files and (\d+) µs beside "
        r"SQLite; long params go through at ([\d.]+) MB/s, ([\d.]+) times as fast as through "
        r"Presidio's patterns, and short ones at ([\d.]+) MB/s\.",
        text,
    )
    stored = ROOT / "benchmarks" / "results" / "redaction.json"
    assert (said is not None) == stored.exists()
    if said is None:
        return
    result = json.loads(stored.read_text())
    us, speed = result["systems"]["lightning_secure"], result["speed"]
    long, short = speed["params"]["long"], speed["params"]["short"]
    found = [us["personal"][kind]["recall"] for kind in redaction.RECALL]
    assert not result["quick"]
    assert said.groups() == (
        f"{100 * min(found):.1f}",
        f"{100 * us['secrets']['secret']['recall']:.1f}",
        f"{us['harmless']['hit_as_secret']}",
        f"{speed['log_metrics_of_ten']['file']['overhead_p50_us']:.0f}",
        f"{speed['log_metrics_of_ten']['sqlite']['overhead_p50_us']:.0f}",
        f"{long['lightning_secure']['MB_per_s']:.0f}",
        f"{long['presidio']['we_are_faster']:.0f}",
        f"{short['lightning_secure']['MB_per_s']:.1f}",
    )


def test_the_readmes_costs_of_privacy_are_those_of_the_stored_results():
    text = (ROOT / "README.md").read_text()
    results = ROOT / "benchmarks" / "results"
    ratios = json.loads((results / "dp.json").read_text())["ratios"]
    models = {"gpt2": "GPT-2", "vit": "ViT", "wrn": "WRN", "mlp": "MLP"}
    kinds = ("step_vs_plain", "step_vs_opacus_best", "memory_vs_plain")
    for model, label in models.items():
        said = re.search(rf"^\| {label}[^|]*\| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
        assert said.groups() == tuple(f"{ratios[f'{kind}_{model}']:.2f}" for kind in kinds)
    found = json.loads((results / "dp_utility.json").read_text())["ours_minus_opacus"]
    said = re.findall(r"([+-][\d.]+) ± ([\d.]+) at epsilon (\d+)", text)
    assert said == [
        (f"{item['difference']:+.3f}", f"{item['error']:.3f}", epsilon)
        for epsilon, item in found.items()
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_options_that_a_document_names_exist(document):
    text = document.read_text()
    for words in re.findall(r"(?<!install )lightning-secure ([a-z]+(?: [a-z]+)?)", text):
        command: click.Command = main
        for word in words.split():
            if isinstance(command, click.Group):
                assert word in command.commands, words
                command = command.commands[word]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in re.findall(r"(?:`|^)make\s+([a-z]+(?:[ -][a-z]+)*)", text, re.MULTILINE):
        assert set(words.split()) <= set(targets), words
    for path in re.findall(r"`((?:benchmarks|examples)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for name, option in re.findall(r"`(\w+)\((\w+)=", text):
        if name in lightning_secure.__all__:
            parameters = inspect.signature(getattr(lightning_secure, name)).parameters
            assert option in parameters, f"{name}({option}=)"


def test_the_changelog_counts_the_formats_that_were_added():
    vendors = ROOT / "lightning_secure" / "redaction" / "detect" / "vendors.toml"
    count = len(tomllib.loads(vendors.read_text())["rules"])
    text = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    assert f"with {count} more formats that issuers document" in text


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
