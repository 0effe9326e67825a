"""Draws what benchmarks/shards.py measured.

    python benchmarks/picture.py benchmarks/results/shards.json docs/img/shards.svg

Grey text on no background, so that it can be read on a light page and on a dark one.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

TEXT, OURS, THEIRS = "#7d8590", "#1f9e89", "#a8b0ba"
STYLE: Any = {
    "svg.hashsalt": "lightning_secure",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.facecolor": "none",
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}
NAMES = {
    "aes": "lightning_secure, AES-256-GCM",
    "ram": "torch DataLoader, tensors in RAM",
    "litdata_plain": "litdata, plaintext",
    "mds_plain": "MosaicML MDS, plaintext",
    "webdataset_plain": "WebDataset, plaintext",
    "litdata_fernet_sample": "litdata, Fernet (samples)",
    "litdata_fernet_chunk": "litdata, Fernet (chunks)",
}


def speeds(result: dict[str, Any], size: str) -> dict[str, float]:
    """Return how fast each reader shuffles, litdata's plaintext being 1, as medians of ratios."""
    rows = {name: result["rounds"][f"{size}/shuffled/{name}"] for name in NAMES}
    rates = {
        name: [measured["rows"] / seconds for seconds in measured["seconds"]]
        for name, measured in rows.items()
    }
    return {
        name: statistics.median(
            ours / theirs for ours, theirs in zip(rates[name], rates["litdata_plain"], strict=True)
        )
        for name in NAMES
    }


def draw(result: dict[str, Any], target: Path) -> None:
    """Write the picture."""
    with mpl.rc_context(STYLE):
        _draw(result, target)


def _draw(result: dict[str, Any], target: Path) -> None:
    figure = Figure(figsize=(8, 2.5), layout="constrained")
    plots = figure.subplots(1, 2, sharey=True)
    for plot, (size, title) in zip(
        plots, (("3kb", "rows of 3 KB"), ("150kb", "rows of 150 KB")), strict=True
    ):
        values = speeds(result, size)
        names = list(NAMES)[::-1]
        bars = plot.barh(
            [NAMES[name] for name in names],
            [values[name] for name in names],
            color=[OURS if name == "aes" else THEIRS for name in names],
            height=0.7,
        )
        plot.bar_label(bars, [f"{values[name]:.2g}x" for name in names], padding=3)
        plot.set_title(title, fontsize=9)
        plot.margins(x=0.16)
        plot.set_xticks([])
        plot.tick_params(length=0)
        plot.spines[:].set_visible(False)
    figure.supxlabel("rows a second, shuffled, compared with litdata's plaintext", fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
