"""The banded matrix, against explicit matrices and all ways in which a row can take part."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.noise.banded.matrix import diagonals, sensitivity


def explicit(bands, steps):
    matrix = np.zeros((steps, steps))
    for band, number in enumerate(diagonals(bands)):
        matrix += number * np.eye(steps, k=-band)[:steps, :steps]
    return matrix


def test_the_whole_matrix_is_the_square_root_of_prefix_sums():
    root = explicit(20, 20)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((20, 20))), atol=1e-12)


def moved(matrix, pattern):
    """Return how far gradients of norm one at these steps can move, whatever their directions."""
    gram = matrix.T @ matrix
    # All entries are positive, so gradients that point the same way do most.
    return np.sqrt(gram[np.ix_(pattern, pattern)].sum())


def patterns(steps, separation):
    """Yield every way to take part with at least so many steps in between."""
    for chosen in itertools.product((False, True), repeat=steps):
        found = np.flatnonzero(chosen)
        if len(found) and (len(found) == 1 or np.diff(found).min() >= separation):
            yield found


@pytest.mark.parametrize(
    ("bands", "steps", "separation"),
    [(1, 6, 1), (2, 9, 2), (3, 11, 3), (3, 12, 5), (4, 4, 7), (5, 11, 5), (2, 1, 2)],
)
def test_the_sensitivity_is_that_of_the_worst_participation(bands, steps, separation):
    matrix = explicit(bands, steps)
    worst = max(moved(matrix, pattern) for pattern in patterns(steps, separation))
    found = sensitivity(diagonals(bands), steps=steps, separation=separation)
    assert found == pytest.approx(worst, rel=1e-12)


def test_gradients_in_any_direction_move_no_further():
    rng, matrix = np.random.default_rng(0), explicit(3, 12)
    bound = sensitivity(diagonals(3), steps=12, separation=4)
    for first in range(4):
        for _ in range(20):
            gradients = np.zeros((12, 5))
            rows = rng.normal(size=(len(range(first, 12, 4)), 5))
            gradients[first::4] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            assert np.linalg.norm(matrix @ gradients) <= bound * (1 + 1e-12)


def test_rows_that_come_again_too_soon_are_refused():
    with pytest.raises(ConfigError, match="3 bands needs as many steps"):
        sensitivity(diagonals(3), steps=12, separation=2)
    # For good reason: what the squares add up to would be too little.
    matrix, pattern = explicit(3, 12), np.arange(0, 12, 2)
    assert moved(matrix, pattern) > 1.2 * np.sqrt(np.square(matrix[:, pattern]).sum())


@pytest.mark.parametrize("bands", [2, 4, 8, 16])
def test_sums_have_less_noise_than_with_independent_noise_of_the_same_epsilon(bands):
    steps, separation = 48, 16
    sums = np.tril(np.ones((steps, steps)))

    def error(bands):
        width = sensitivity(diagonals(bands), steps=steps, separation=separation)
        return np.linalg.norm(sums @ np.linalg.inv(explicit(bands, steps))) * width

    assert error(bands) < 0.85 * error(1)
    assert error(1) == pytest.approx(np.sqrt(3) * np.linalg.norm(sums))
    assert error(bands) < error(bands // 2)


@pytest.mark.parametrize("bands", [0, -1, 1.5])
def test_bands_are_a_number(bands):
    with pytest.raises(ConfigError):
        diagonals(bands)
