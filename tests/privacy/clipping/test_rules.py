from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.clipping.rules import (
    RANGE,
    AdaptiveClipping,
    FlatClipping,
    PerLayerClipping,
)


def config(clipping):
    return DPConfig(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, clipping=clipping)


def test_rules_have_names():
    assert config("flat").clipping_rule == FlatClipping()
    assert config("per_layer").clipping_rule == PerLayerClipping()
    assert config("adaptive").clipping_rule == AdaptiveClipping()
    assert config(AdaptiveClipping(quantile=0.8)).clipping_rule.quantile == 0.8


@pytest.mark.parametrize("clipping", ["layerwise", "", None, 1.0, {"layer": 1.0}, FlatClipping])
def test_other_rules_are_refused(clipping):
    with pytest.raises(ConfigError, match="'flat', 'per_layer', 'adaptive'"):
        config(clipping)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (AdaptiveClipping, {"quantile": 0.0}),
        (AdaptiveClipping, {"quantile": 1.0}),
        (AdaptiveClipping, {"learning_rate": 0.0}),
        (AdaptiveClipping, {"noise_multiplier": 0.0}),
        (AdaptiveClipping, {"noise_multiplier": math.inf}),
        (PerLayerClipping, {"parts": {}}),
        (PerLayerClipping, {"parts": {"layer": 0.0}}),
        (PerLayerClipping, {"parts": {"layer": -1.0}}),
        (PerLayerClipping, {"parts": {"layer": math.nan}}),
    ],
)
def test_numbers_out_of_range_are_refused(rule, options):
    with pytest.raises(ConfigError):
        rule(**options)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("first", [1e-3, 50.0])
def test_the_bound_goes_to_the_quantile(quantile, first):
    rng, rule = np.random.default_rng(0), AdaptiveClipping(quantile=quantile)
    norms, batch, bound = rng.lognormal(1.0, 0.7, 20_000), 256, first
    found = []
    for _ in range(400):
        drawn = rng.choice(norms, batch)
        clipped = (drawn > bound).mean() + rng.normal(0, rule.noise_multiplier / 2 / batch)
        bound = rule.next_bound(bound, clipped, first=first)
        found.append(bound)
    assert np.mean(found[200:]) == pytest.approx(np.quantile(norms, quantile), rel=0.05)


def test_a_bound_stays_a_number():
    rule = AdaptiveClipping(learning_rate=1.0)
    low = high = 1.0
    for _ in range(100):
        low = rule.next_bound(low, 0.0, first=1.0)
        high = rule.next_bound(high, 1.0, first=1.0)
    assert (low, high) == (1 / RANGE, RANGE)
    assert rule.next_bound(1.0, math.nan, first=1.0) == 1.0
    assert rule.next_bound(1.0, 1e30, first=1.0) == pytest.approx(RANGE)
