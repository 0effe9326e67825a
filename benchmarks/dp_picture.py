"""Draws what benchmarks/dp.py and benchmarks/dp_utility.py measured.

    python benchmarks/dp_picture.py benchmarks/results/dp.json benchmarks/results/dp_utility.json \
        docs/img/dp.svg

On the left, how many times as long a step takes as without privacy; on the right, the accuracy that
is left, with standard errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from picture import OURS, STYLE, TEXT, THEIRS

MODELS = {"mlp": "MLP", "wrn": "WRN-16", "vit": "ViT", "gpt2": "GPT-2"}
SYSTEMS = {
    "ours": ("lightning_secure", OURS),
    "opacus_ghost": ("Opacus, ghost", THEIRS),
    "opacus_hooks": ("Opacus, hooks", "#8b949e"),
    "opacus_functorch": ("Opacus, functorch", "#6e7681"),
}


def slowdown(result: dict[str, Any], model: str, system: str) -> float | None:
    """Return how many times as long as without privacy a step takes; None if it failed."""
    name = f"step_vs_plain_{model}" if system == "ours" else f"step_{system}_vs_plain_{model}"
    value: float | None = result["ratios"].get(name)
    return value


def draw(cost: dict[str, Any], utility: dict[str, Any], target: Path) -> None:
    """Write the picture."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _costs(left, cost)
        _accuracies(right, utility)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})


def _costs(plot: Axes, cost: dict[str, Any]) -> None:
    names = [model for model in MODELS if slowdown(cost, model, "ours") is not None]
    height = 0.8 / len(SYSTEMS)
    for row, (system, (label, color)) in enumerate(SYSTEMS.items()):
        values = [slowdown(cost, model, system) for model in names]
        places = [place + row * height for place in range(len(names))]
        bars = plot.barh(
            places, [value or 1 for value in values], height, color=color, label=label, log=True
        )
        texts = ["failed" if value is None else f"{value:.2f}x" for value in values]
        plot.bar_label(bars, texts, padding=3, fontsize=7)
    plot.set_yticks([place + 1.5 * height for place in range(len(names))])
    plot.set_yticklabels([MODELS[name] for name in names])
    plot.invert_yaxis()
    plot.set_xlim(left=1)
    plot.margins(x=0.2)
    plot.set_xticks([])
    plot.set_xticks([], minor=True)
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)
    plot.set_title("a step, compared with one without privacy (logarithmic)", fontsize=9)
    plot.legend(fontsize=7, frameon=False, loc="lower right")


def _accuracies(plot: Axes, utility: dict[str, Any]) -> None:
    epsilons = list(utility["ours_minus_opacus"])
    for shift, (name, label, color) in enumerate(
        (("ours", "lightning_secure", OURS), ("opacus", "Opacus", "#8b949e"))
    ):
        found = [utility["accuracy"][f"{epsilon}/{name}"] for epsilon in epsilons]
        plot.errorbar(
            # Beside each other, or the one would hide the other.
            [float(epsilon) * (1, 1.04)[shift] for epsilon in epsilons],
            [item["mean"] for item in found],
            [item["error"] for item in found],
            color=color,
            marker="o",
            markersize=3,
            capsize=2,
            label=label,
        )
    plot.axhline(
        utility["accuracy"]["plain"]["mean"],
        color=TEXT,
        linewidth=0.8,
        linestyle=":",
        label="without privacy",
    )
    plot.set_xscale("log")
    plot.set_xticks([float(epsilon) for epsilon in epsilons], epsilons)
    plot.set_xticks([], minor=True)
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["bottom", "left"]].set_color(TEXT)
    plot.set_title("accuracy on digits, by epsilon", fontsize=9)
    plot.legend(fontsize=7, frameon=False, loc="lower right")


if __name__ == "__main__":
    costs, accuracies, picture = map(Path, sys.argv[1:])
    draw(json.loads(costs.read_text()), json.loads(accuracies.read_text()), picture)
