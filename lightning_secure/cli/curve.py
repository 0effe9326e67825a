"""Epsilon against steps, drawn into a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lightning_secure.errors import ConfigError, MissingExtraError
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.pld import epsilon_by, epsilon_rdp
from lightning_secure.util.files import atomic_writer

_KINDS: Final = {".svg", ".png"}
#: Each point of the tighter curve takes some hundredths of a second.
_POINTS: Final = 12


def require_drawable(path: Path) -> None:
    """Refuse, before anything is computed, what could not be drawn.

    Raises:
        ConfigError: if the file's type is neither SVG nor PNG, or its directory is absent.
        MissingExtraError: if Matplotlib is not installed.
    """
    if path.suffix not in _KINDS:
        raise ConfigError(f"--plot draws .svg or .png files, not {path.name!r}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: there is no directory {str(path.parent)!r}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "drawing needs matplotlib: pip install 'lightning-secure[plot]'. Nothing was drawn."
        ) from None


def draw(
    path: Path,
    releases: Sequence[Release],
    *,
    delta: float,
    accountant: str = "pld",
    target_epsilon: float | None = None,
) -> None:
    """Draw what the first steps of a run cost, up to all of them.

    Args:
        path: Where to; its suffix says whether as SVG or PNG.
        releases: The releases, past or planned.
        delta: Between 0 and 1.
        accountant: Of the curve beside that of Rényi DP.
        target_epsilon: A budget to draw as a line.

    Raises:
        ConfigError: if the file's type is neither SVG nor PNG, or its directory is absent.
        MissingExtraError: if Matplotlib is not installed.
    """
    require_drawable(path)
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    total = sum(release.steps for release in releases)
    # Closer at the beginning, where the curve is steep.
    counts = {max(1, round(total * (k / _POINTS) ** 2)) for k in range(_POINTS + 1)}
    steps = sorted(count for count in counts if count <= total)
    firsts = [_first(releases, count) for count in steps]
    tight = [epsilon_by(accountant, part, delta=delta) for part in firsts]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, tight, label=accountant.upper())
    if accountant != "rdp":
        rdp = [epsilon_rdp(part, delta=delta) for part in firsts]
        axes.plot(steps, rdp, linestyle="--", label="RDP")
    if target_epsilon is not None:
        axes.axhline(target_epsilon, linestyle=":", color="black", label="budget")
    axes.set_xlabel("steps")
    axes.set_ylabel(f"epsilon at delta {delta:g}")
    axes.set_xlim(0, max(total, 1))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_writer(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


def _first(releases: Sequence[Release], steps: int) -> list[Release]:
    """Return the part of the releases that the first so many steps are."""
    part = []
    for release in releases:
        if steps <= 0:
            break
        part.append(release._replace(steps=min(steps, release.steps)))
        steps -= release.steps
    return part
