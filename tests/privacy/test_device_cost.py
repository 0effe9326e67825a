"""What a private step would cost on a GPU, as counted on a processor; see the benchmark."""

from __future__ import annotations

import device_cost
import pytest


@pytest.fixture(scope="module")
def counts():
    return device_cost.table(size="quick", batch=16, models=device_cost.MODELS)


@pytest.mark.parametrize(
    ("model", "seconds", "launches", "kept"),
    [
        ("gpt2", 1.25, 3.2, 1.1),
        ("vit", 1.25, 3.7, 1.5),
        ("wrn", 1.35, 3.8, 2.4),
        ("gpt2_lora", 1.1, 1.6, 1.1),
    ],
)
def test_all_products_are_tensor_cores_and_few(counts, model, seconds, launches, kept):
    """One float32 product of full size would cost twelve."""
    cell = counts[model]
    for system in ("plain", "ours"):
        assert cell[system]["bf16_gflop"] > 0
        assert "float32_gflop" not in cell[system]
    assert 0.9 < cell["ratio_of_predicted_time"] <= seconds
    assert cell["ratio_of_launches"] <= launches
    assert cell["ratio_of_bytes_kept"] <= kept
