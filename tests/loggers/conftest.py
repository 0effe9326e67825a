from __future__ import annotations

import shutil

import pytest

from lightning_secure import RedactingMLFlowLogger


@pytest.fixture
def store(tmp_path, mlflow_database):
    """A folder with a database for runs."""
    (tmp_path / "runs").mkdir()
    shutil.copy(mlflow_database, tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs"


@pytest.fixture
def client(store):
    """A logger's client, its run, and the folder that the runs' folder lies in."""
    logger = RedactingMLFlowLogger("experiment", save_dir=store)
    return logger.experiment, logger.run_id, store.parent
