"""Redaction inside MLflow's stores, where everything that is tracked has to pass."""
