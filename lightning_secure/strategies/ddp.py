"""``Trainer(strategy=PrivateDDPStrategy(...))``: DP-SGD on several devices and machines."""

from __future__ import annotations

from typing import ClassVar

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy

from lightning_secure.privacy.gradients.clipping.rules import (
    ClippingRule,
    FlatClipping,
    PerLayerClipping,
)
from lightning_secure.privacy.step import required
from lightning_secure.strategies.processes import SeveralProcesses


class PrivateDDPStrategy(SeveralProcesses, DDPStrategy):
    """:class:`~lightning_secure.strategies.private.PrivateStrategy` on several devices.

    Args:
        config: As for one device; ``expected_batch_size`` is that of all processes together.
        public_metrics: As for one device.
        journal: As for one device. The first process alone reads and writes it.
        accelerator: As for any strategy; normally left to the Trainer.
        parallel_devices: As for any strategy; normally left to the Trainer.
        cluster_environment: As for any strategy; normally found by the Trainer.
        checkpoint_io: As for any strategy; normally a plugin of the Trainer.
        precision_plugin: As for any strategy; normally left to the Trainer.
        process_group_backend: As for ``DDPStrategy``: by default NCCL on CUDA and Gloo on the CPU.
        timeout: How long a process waits for the others before it fails.

    Every process holds the whole model and reads the whole dataset, and draws from every
    ``world_size``-th row. As with ``DDPStrategy``, a DataLoader's ``batch_size`` is that of one
    device: without ``expected_batch_size``, a step draws ``batch_size * world_size`` rows on
    average. A run may go on with another number of processes; its public numbers stay.

    There is no torch DDP wrapper, which would average gradients before they are clipped and noised:
    the module runs as it is. What ``training_step`` logs is each process's own.

    Raises:
        UnsupportedModelError: if ``PrivateStrategy`` raises it, or a training step exchanges
            something with other processes.
        UnsupportedTrainerOptionError: if ``PrivateStrategy`` raises it, or the processes were given
            other rows, another order of rows, model, optimizer, options or promise. The message
            names what differs, and on which ranks.
        ConfigError: if an argument is unknown.
        PrivacyError: if another process has failed, or the noise is not in the sum exactly once.

    Guarantees:
        Those of ``PrivateStrategy``, for the rows of all processes together. The processes trust
        each other and the network between them: clipped sums travel over it before the noise is
        in them, and the account when training begins.

    Source:
        Abadi et al. 2016, arXiv:1607.00133; Bu et al. 2023, arXiv:2210.00038.

    >>> from lightning_secure import DPConfig
    >>> config = DPConfig(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    >>> PrivateDDPStrategy(config).ledger is None  # Trainer(strategy=..., devices=2) opens it
    True
    """

    strategy_name = "private_ddp"
    clippings: ClassVar[tuple[type[ClippingRule], ...]] = (FlatClipping, PerLayerClipping)

    def configure_ddp(self) -> None:
        """Give every process the weights and buffers of the first one, and wrap nothing."""
        _sync_module_states(required(self.model))
