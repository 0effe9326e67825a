"""What the attacks on private runs begin with."""

from __future__ import annotations

import lightning as L

from lightning_secure import DPConfig, PrivateStrategy


def trainer(tmp_path, *, public=(), dp=None, **options):
    """Return a trainer that trains privately and leaves nothing behind."""
    settings = {"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 1.0}
    config = DPConfig(**{**settings, "expected_batch_size": 8, **(dp or {})})
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "strategy": PrivateStrategy(config, public_metrics=public),
    }
    return L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, **{**defaults, **options}
    )
