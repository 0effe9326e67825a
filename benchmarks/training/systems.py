"""The training of each system: the same model, rows, optimizer, clipping norm and noise.

What is plain and what is ours run under ``Trainer.fit``. Opacus runs in the bare loop of its own
tutorials, which spares it what Lightning costs: of the two ways to compare, the one that favours
Opacus. All private systems draw by Poisson sampling and add noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_secure import DPConfig, PrivateStrategy
from training.models import TASKS, Rows, Task, loss_of

__all__ = ["SYSTEMS", "Setting", "Watch"]

CLIP, NOISE, DELTA = 1.0, 1.0, 1e-6


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The model and rows that are trained, and the way of training.

    Attributes:
        system: Who trains.
        model: What is trained.
        size: How large it is.
        batch: Rows that a step takes, or is expected to take.
        rate: Of the Poisson sampling: with 1 every step takes all rows there are, and so always
            the same number.
        device: ``cpu`` or ``cuda``.
        bf16: Whether it runs under autocast to bfloat16.
        threads: That torch uses on the processor.
        noise: Whether noise is added.
        clip: Norm that a row's gradient is clipped to.
        folder: Where files may lie.
    """

    system: str
    model: str
    size: str
    batch: int
    rate: float
    device: str
    bf16: bool
    threads: int
    noise: bool
    clip: float
    folder: Path

    @property
    def task(self) -> Task:
        """The model and its rows."""
        return TASKS[self.size][self.model]

    def net(self) -> nn.Module:
        """Return the model, with the same weights for every system."""
        torch.manual_seed(0)
        return self.task.make()

    def loader(self) -> DataLoader[Any]:
        """Return the rows as a user has them, shuffled."""
        rows = Rows(self.task, count=round(self.batch / self.rate), held=min(256, self.batch))
        return DataLoader(rows, batch_size=self.batch, shuffle=True)


class Watch(Protocol):
    """Looks on while a system trains.

    Attributes:
        rows: That went into the step so far; the system counts them.
    """

    rows: int

    def begin(self) -> None:
        """All is set up; the first step comes."""

    def step_done(self, net: nn.Module) -> bool:
        """A step is over, and gradients are still there; returns whether another is wanted."""


class _Module(L.LightningModule):
    def __init__(self, setting: Setting, watch: Watch) -> None:
        super().__init__()
        self.net = setting.net()
        self._watch = watch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self._watch.rows += len(x)
        return loss_of(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _optimizer(self.parameters())


class _Steps(L.Callback):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch.begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any
    ) -> None:
        assert isinstance(pl_module, _Module)
        if not self._watch.step_done(pl_module.net):
            trainer.should_stop = True


def _optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    # Without state: anything more would add the same to all, and bring the ratios nearer to 1.
    return torch.optim.SGD(parameters, lr=1e-3)


def _lightning(setting: Setting, watch: Watch, *, private: bool) -> None:
    strategy: dict[str, Any] = {"strategy": _private(setting)} if private else {}
    trainer = L.Trainer(
        accelerator="gpu" if setting.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if setting.bf16 else "32-true",
        max_epochs=-1,
        callbacks=[_Steps(watch)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=setting.folder,
        **strategy,
    )
    trainer.fit(_Module(setting, watch), setting.loader())


def _private(setting: Setting) -> PrivateStrategy:
    noise: dict[str, Any] = (
        {"noise_multiplier": NOISE} if setting.noise else {"insecure_noise_off": True}
    )
    return PrivateStrategy(DPConfig(delta=DELTA, max_grad_norm=setting.clip, **noise))


def _opacus(setting: Setting, watch: Watch, *, mode: str) -> None:
    net = setting.net().to(setting.device)
    plain = _optimizer(net.parameters())
    model, optimizer, *criterion, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=plain,
        criterion=nn.CrossEntropyLoss(),
        data_loader=setting.loader(),
        noise_multiplier=NOISE if setting.noise else 0.0,
        max_grad_norm=setting.clip,
        loss_reduction="mean",
        poisson_sampling=True,
        clipping="flat",
        grad_sample_mode=mode,
    )
    model.train()
    watch.begin()
    for x, y in itertools.chain.from_iterable(itertools.repeat(loader)):
        watch.rows += len(x)
        x, y = x.to(setting.device), y.to(setting.device)
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.bf16):
            logits = model(x)
            loss = _ghost_loss(criterion[0], logits, y) if criterion else loss_of(logits, y)
        loss.backward()
        optimizer.step()
        more = watch.step_done(net)
        optimizer.zero_grad(set_to_none=True)
        if not more:
            return


def _ghost_loss(criterion: Any, logits: Tensor, y: Tensor) -> Any:
    if logits.ndim == 2:
        return criterion(logits, y)
    flat = logits.reshape(-1, logits.shape[-1])
    return criterion(flat, y.reshape(-1), shape=logits.shape)


SYSTEMS: Mapping[str, Callable[[Setting, Watch], None]] = {
    "plain": partial(_lightning, private=False),
    "ours": partial(_lightning, private=True),
    "opacus_hooks": partial(_opacus, mode="hooks"),
    "opacus_functorch": partial(_opacus, mode="functorch"),
    "opacus_ghost": partial(_opacus, mode="ghost"),
}
