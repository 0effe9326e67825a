"""A strategy whose weights have an account: it is read, written and kept with them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_secure.errors import PrivacyError
from lightning_secure.privacy.accounting.carried_ledger import bring_ledger, write_ledger
from lightning_secure.privacy.accounting.ledger import Ledger, require_account
from lightning_secure.privacy.accounting.ledger_state import CHECKPOINT_KEY
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.collective import Collective, Single
from lightning_secure.privacy.config import DPConfig
from lightning_secure.strategies.account import announce_plain
from lightning_secure.strategies.steps import required, stop_before_any_minimum


class AccountedStrategy(Strategy):
    """Carries the account of a module's weights through fits and checkpoints.

    Args:
        config: The privacy configuration.
        journal: Directory of the run's journal; None for the default.
        options: For Lightning's own strategy, which comes after this one among the bases.

    Attributes:
        asks_checkpoint_io: Every checkpoint goes through the CheckpointIO.

    Raises:
        LedgerError: if a checkpoint is resumed without its ledger.

    Guarantees:
        Every checkpoint holds the account of the weights in it, weights-only ones too.
    """

    asks_checkpoint_io: ClassVar[bool] = True
    #: The processes that train together.
    talks_to: ClassVar[type[Collective]] = Single

    def __init__(
        self, config: DPConfig, *, journal: str | Path | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.config = config
        self._journal = journal
        self._ledger: Ledger | None = None
        self._restored: Ledger | None = None
        self._collective = self.talks_to()

    @property
    def ledger(self) -> Ledger | None:
        """The ledger of the module's weights; None before its first fit."""
        return self._ledger

    def connect(self, model: pl.LightningModule) -> None:
        """Take a model, and forget what an earlier attempt may have left behind."""
        self._restored = None
        super().connect(model)

    def stop_training(self) -> None:
        """Make the Trainer take no further step; its ``min_epochs`` and ``min_steps`` give way."""
        stop_before_any_minimum(self._module.trainer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write the account into every checkpoint, weights-only ones too."""
        if CHECKPOINT_KEY not in checkpoint:  # the module's own hook does it, unless exchanged
            write_ledger(self._module, checkpoint)
        if self.is_global_zero:  # which alone writes it
            step = int(checkpoint.get("global_step", 0))
            announce_plain(self.checkpoint_io, str(filepath), step)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, and the account with it if the run is to go on.

        Raises:
            LedgerError: if the checkpoint is to be trained further and has no account.
        """
        with self._collective.together():
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
            if self._module.trainer.state.fn == TrainerFn.FITTING:
                self._restored = require_account(checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take over weights and their account together, also where the run is then refused."""
        load = partial(super().load_model_state_dict, checkpoint, strict=strict)
        bring_ledger(self._module, checkpoint, load)

    def _charge(self, ledger: Ledger, release: Release) -> None:
        """Enter a single release in the account that every process has, or in none."""

        def charged() -> PrivacyError | None:
            try:
                ledger.charge(release)
            except PrivacyError as error:
                return error
            return None

        # The first process has the journal. What it cannot charge, all refuse for its reason.
        if (refused := self._collective.once(charged)) is not None:
            self._collective.fail(refused)
        if self._collective.rank > 0:
            ledger.enter(release)

    @property
    def _module(self) -> pl.LightningModule:
        return required(self.lightning_module)
