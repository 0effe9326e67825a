"""The accuracy of private training for its epsilon, beside Opacus.

    python benchmarks/dp_utility.py [--quick] [--json FILE]

A small network learns scikit-learn's digits, by us (``Trainer.fit`` with ``PrivateStrategy``) and
by Opacus (``PrivacyEngine`` in a bare loop), with the same initial weights, rows, sampling rate,
steps, optimizer, clipping norm and noise. The noise is calibrated once for each epsilon, for both.
A seed decides the initial weights and which rows are kept for testing; draws and noise are ours
from the operating system's generator, and so never the same twice.

Errors are standard errors over the seeds. The difference is taken for each seed, and the exit code
is 1, and ``ok`` false, if at some epsilon we are worse by more than chance explains (Student's t,
one-sided, 99 %).
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from loading.machine import commit, describe_machine
from opacus import PrivacyEngine
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import DPConfig, PrivateStrategy
from lightning_secure.privacy.accounting.pld import calibrate_noise

ROOT = Path(__file__).resolve().parent.parent
#: Rows divide by the batch, so that both sides have the same sampling rate.
ROWS, BATCH, WIDTH, CLIP, RATE, DELTA = 1400, 200, 64, 1.0, 1.0, 1e-5
EPSILONS = (1.0, 3.0, 8.0)
STEPS_PER_EPOCH = ROWS // BATCH
CONFIDENCE = 0.99


class Run(NamedTuple):
    """The outcome of one training run.

    Attributes:
        accuracy: On rows that it has not seen.
        epsilon: By its own account; 0 without privacy.
    """

    accuracy: float
    epsilon: float = 0.0


class Digits(NamedTuple):
    """Rows to train on, and rows to test with."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def split(cls, seed: int) -> Digits:
        x, y = load_digits(return_X_y=True)
        parts = train_test_split(x / 16, y, train_size=ROWS, random_state=seed, stratify=y)
        train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
        return cls(train_x.float(), train_y.long(), test_x.float(), test_y.long())

    def loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH, shuffle=True)

    def accuracy(self, net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(self.test_x).argmax(1) == self.test_y).float().mean())


def make_net(seed: int) -> nn.Sequential:
    """Return the network; Tanh suits clipping (Papernot et al. 2020, arXiv:2007.14191)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))


def make_optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE)


class Module(L.LightningModule):
    """The network, as any user would write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.parameters())


def by_lightning(seed: int, noise: float | None, epochs: int) -> Run:
    """Train with ``Trainer.fit``: with our strategy, or plainly if no noise is given."""
    digits, module = Digits.split(seed), Module(make_net(seed))
    options: dict[str, Any] = {}
    if noise is not None:
        config = DPConfig(noise_multiplier=noise, delta=DELTA, max_grad_norm=CLIP)
        options["strategy"] = PrivateStrategy(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **options,
        )
        trainer.fit(module, digits.loader())
    accuracy = digits.accuracy(module.net)
    if noise is None:
        return Run(accuracy)
    ledger = options["strategy"].ledger
    if ledger.steps != epochs * STEPS_PER_EPOCH:
        raise RuntimeError(f"{ledger.steps} steps were taken, not {epochs * STEPS_PER_EPOCH}")
    return Run(accuracy, ledger.epsilon())


def by_opacus(seed: int, noise: float, epochs: int) -> Run:
    """Train as Opacus' tutorials do."""
    digits, net = Digits.split(seed), make_net(seed)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=net,
        optimizer=make_optimizer(net.parameters()),
        data_loader=digits.loader(),
        noise_multiplier=noise,
        max_grad_norm=CLIP,
    )
    model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for x, y in itertools.islice(batches, epochs * STEPS_PER_EPOCH):
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call] # torch does not type it
        optimizer.step()
    return Run(digits.accuracy(net), engine.get_epsilon(DELTA))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def no_worse(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return how ours differ from theirs, seed by seed, and whether chance explains it.

    Args:
        ours: Accuracies.
        theirs: With the same seeds.
    """
    difference, error = mean_and_error([a - b for a, b in zip(ours, theirs, strict=True)])
    allowed = float(student.ppf(CONFIDENCE, len(ours) - 1)) * error
    return {"difference": difference, "error": error, "ok": difference >= -allowed}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result of one run."""
    seeds = range(arguments.seeds)
    runs: dict[str, list[Run]] = {"plain": []}
    noises = {
        epsilon: calibrate_noise(
            target_epsilon=epsilon,
            delta=DELTA,
            sample_rate=BATCH / ROWS,
            steps=arguments.epochs * STEPS_PER_EPOCH,
        )
        for epsilon in arguments.epsilons
    }
    start = time.perf_counter()
    for seed in seeds:
        print(
            f"{time.perf_counter() - start:5.0f} s  seed {seed + 1} of {len(seeds)}",
            file=sys.stderr,
            flush=True,
        )
        runs["plain"].append(by_lightning(seed, None, arguments.epochs))
        for epsilon, noise in noises.items():
            for name, train in (("ours", by_lightning), ("opacus", by_opacus)):
                runs.setdefault(f"{epsilon:g}/{name}", []).append(
                    train(seed, noise, arguments.epochs)
                )
    accuracies = {name: [run.accuracy for run in several] for name, several in runs.items()}
    compared = {
        f"{epsilon:g}": no_worse(accuracies[f"{epsilon:g}/ours"], accuracies[f"{epsilon:g}/opacus"])
        for epsilon in noises
    }
    return {
        "machine": describe_machine(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("lightning-secure", "lightning", "torch", "opacus", "scikit-learn")
        },
        "commit": commit(ROOT),
        "command": arguments.command,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hyperparameters": {
            "rows": ROWS,
            "expected_batch_size": BATCH,
            "hidden_units": WIDTH,
            "max_grad_norm": CLIP,
            "learning_rate": RATE,
            "epochs": arguments.epochs,
            "delta": DELTA,
            "noise_multiplier": {f"{epsilon:g}": noise for epsilon, noise in noises.items()},
        },
        "epsilon_by_own_account": {
            name: max(run.epsilon for run in several)
            for name, several in runs.items()
            if name != "plain"
        },
        "accuracies": accuracies,
        "accuracy": {
            name: dict(zip(("mean", "error"), mean_and_error(values), strict=True))
            for name, values in accuracies.items()
        },
        "ours_minus_opacus": compared,
        "ok": all(item["ok"] for item in compared.values()),
    }


def table(result: dict[str, Any]) -> str:
    """Return accuracies with their errors, as lines of text."""

    def cell(name: str) -> str:
        found = result["accuracy"][name]
        return f"{found['mean']:.4f} ± {found['error']:.4f}"

    lines = [f"{'epsilon':>8}  {'ours':15}  {'Opacus':15}  difference"]
    for epsilon, found in result["ours_minus_opacus"].items():
        difference = f"{found['difference']:+.4f} ± {found['error']:.4f}"
        worse = "" if found["ok"] else "  worse"
        cells = "  ".join(cell(f"{epsilon}/{name}") for name in ("ours", "opacus"))
        lines.append(f"{epsilon:>8}  {cells}  {difference}{worse}")
    return "\n".join([*lines, f"{'none':>8}  {cell('plain')}"])


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Accuracy for epsilon, beside Opacus.")
    parser.add_argument("--quick", action="store_true", help="five seeds, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--seeds", type=int, help="at least 2; 20 by default")
    parser.add_argument("--epsilons", nargs="+", type=float, default=list(EPSILONS))
    parser.add_argument("--epochs", type=int, default=15)
    arguments = parser.parse_args()
    words = ["benchmarks/dp_utility.py"]
    words += ["--quick"] * arguments.quick
    words += ["--seeds", str(arguments.seeds)] if arguments.seeds is not None else []
    if arguments.epsilons != list(EPSILONS):
        words += ["--epsilons", *(f"{epsilon:g}" for epsilon in arguments.epsilons)]
    words += ["--epochs", str(arguments.epochs)] if arguments.epochs != 15 else []
    arguments.command = " ".join(words)
    if arguments.seeds is None:
        arguments.seeds = 5 if arguments.quick else 20
    if arguments.seeds < 2:
        parser.error("there is no error bar to fewer than 2 seeds")
    return arguments


def main() -> int:
    """Measure, print and write; 1 if we are worse by more than chance explains."""
    arguments = parse()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the network is so small that a second one would only wait
    result = measure(arguments)
    print(table(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
