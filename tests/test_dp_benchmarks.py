"""The benchmarks of private training: their arithmetic, and that unequal work gets no ratio."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dp
import dp_picture
import dp_utility
import numpy as np
import pytest
from training.ratios import Cell, Gradients, UnequalWorkError, per_row, ratios, shorter_by

ROOT = Path(__file__).parent.parent


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    options = ("--quick", "--models", "mlp", "--batches", 32, "--rounds", 1, "--threads", 1)
    return subprocess.run(
        [sys.executable, folder / "benchmarks" / "dp.py", *map(str, (*options, *arguments))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_run_says_what_it_measured_and_times_no_other_work(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    systems = tmp_path / "benchmarks" / "training" / "systems.py"
    text = systems.read_text()
    right = "max_grad_norm=setting.clip,\n"
    assert text.count(right) == 1
    systems.write_text(
        text.replace(right, 'max_grad_norm=setting.clip * (1 + (mode == "ghost")),\n')
    )
    chosen = ("plain", "ours", "opacus_hooks", "opacus_ghost")
    done = run(tmp_path, "--only", *chosen, "--json", tmp_path / "deep" / "dp.json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "deep" / "dp.json").read_text())
    assert result["command"] == (
        f"benchmarks/dp.py --quick --only {' '.join(chosen)} --models mlp --batches 32 --rounds 1 "
        "--threads 1"
    )
    assert {"cpu", "cores", "ram_gb", "python"} <= result["machine"].keys()
    assert {"torch", "opacus", "lightning"} <= result["versions"].keys()
    assert result["threads"] == 1
    assert result["failed"].keys() == {"mlp/b32/opacus_ghost"}
    assert "its gradient is not that of opacus_hooks" in result["failed"]["mlp/b32/opacus_ghost"]
    assert {"step_vs_plain_mlp", "step_vs_opacus_best_mlp", "memory_vs_plain_mlp"} <= (
        result["ratios"].keys()
    )
    # Neither what failed nor what was not measured is there.
    assert not any("ghost" in name or "functorch" in name for name in result["ratios"])
    cells = {name.split("/")[-1]: cell for name, cell in result["cells"].items()}
    assert cells["opacus_ghost"]["seconds_per_row"] == []
    for name in ("plain", "ours", "opacus_hooks"):
        assert cells[name]["first_step_seconds"] > 0
        assert cells[name]["peak_mb"] >= cells[name]["peak_mb_later"] > 1
        assert len(cells[name]["seconds_per_row"]) == 1
    assert cells["opacus_hooks"]["peak_mb"] > cells["plain"]["peak_mb"]
    whole = json.dumps(result)
    assert os.uname().nodename not in whole
    assert str(ROOT) not in whole
    assert str(tmp_path) not in whole


@pytest.mark.parametrize(
    ("failed", "code"),
    [([], 0), (["gpt2/b32/opacus_ghost"], 0), (["mlp/b32/ours"], 1), (["mlp/b32/plain"], 1)],
)
def test_only_what_opacus_cannot_do_is_a_result(failed, code):
    assert dp.exit_code({"failed": dict.fromkeys(failed, "of something")}) == code


def gradients(factor: float, *, turned: float = 0.0) -> Gradients:
    whole = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    other = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    return Gradients(whole, (factor * (whole + turned * other)).astype(np.float32))


def test_work_is_equal_if_rows_are_clipped_a_little_harder():
    assert shorter_by(gradients(0.2), gradients(0.2)) == 0
    assert shorter_by(gradients(0.199), gradients(0.2)) == pytest.approx(0.005, abs=1e-6)


@pytest.mark.parametrize(
    ("one", "why"),
    [
        pytest.param(gradients(0.2)._replace(sum=gradients(1).sum * 1.001), "off", id="sum"),
        pytest.param(gradients(0.2)._replace(sum=gradients(1).sum[:-1]), "off", id="shape"),
        pytest.param(gradients(0.2)._replace(sum=gradients(1).sum * np.nan), "off", id="nan"),
        pytest.param(gradients(0.201), "shorter by -0.005", id="longer"),
        pytest.param(gradients(0.1), "shorter by 0.5", id="much shorter"),
        pytest.param(gradients(np.nan), "shorter by nan", id="clipped to nan"),
        pytest.param(gradients(0.2, turned=0.01), "clipped, it", id="elsewhere"),
    ],
)
def test_other_work_is_seen(one, why):
    with pytest.raises(UnequalWorkError, match=why):
        shorter_by(one, gradients(0.2))


def cell(*seconds: float, peak: float = 1.0, **known: object) -> Cell:
    return Cell(seconds_per_row=list(seconds), peak_mb=peak, peak_mb_later=peak / 2, **known)


def test_ratios_are_taken_within_rounds_and_opacus_best_is_that_of_each_round():
    systems = {
        "plain": cell(1, 2, 4, peak=10),
        "ours": cell(2, 3, 5, peak=12),  # 2, 1.5 and 1.25 times
        "opacus_hooks": cell(8, 6, 20, peak=40),
        "opacus_ghost": cell(4, 12, 10, peak=20),  # best: 4, 6 and 10
        "opacus_functorch": cell(0.1, 0.1, 0.1, failed="of something"),
    }
    larger = {"plain": cell(1, 1, 1), "ours": cell(3, 3, 3)}
    found = ratios({"wrn": {64: larger, 32: systems}})
    assert found["step_vs_plain_wrn"] == found["step_vs_plain_wrn_b32"] == 1.5
    assert found["step_vs_plain_wrn_b64"] == 3
    assert found["step_vs_opacus_best_wrn"] == 0.5
    assert found["step_opacus_hooks_vs_plain_wrn"] == 5
    assert found["memory_vs_plain_wrn"] == 1.2
    assert found["memory_vs_opacus_best_wrn"] == 0.6
    assert not any("functorch" in name for name in found)


def test_ours_failed_leaves_no_ratio():
    systems = {"plain": cell(1), "ours": cell(1, failed="of something"), "opacus_hooks": cell(1)}
    assert ratios({"mlp": {32: systems}}) == {}


def test_seconds_are_those_of_a_row():
    assert per_row([(3.0, 30), (4.0, 20), (1.0, 0), (9.0, 30)]) == 0.2


def test_worse_is_told_from_chance():
    theirs = [0.90, 0.91, 0.92, 0.90, 0.91]
    chance = dp_utility.no_worse([0.91, 0.90, 0.92, 0.91, 0.89], theirs)
    assert chance["ok"]
    assert chance["difference"] == pytest.approx(-0.002)
    worse = dp_utility.no_worse([value - 0.02 for value in (0.90, 0.91, 0.92, 0.9, 0.912)], theirs)
    assert not worse["ok"]
    assert dp_utility.no_worse([0.95] * 5, theirs)["ok"]


@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook")
def test_both_sides_learn_digits_with_the_noise_that_is_given():
    noise = 0.7
    ours, opacus = (train(0, noise, 2) for train in (dp_utility.by_lightning, dp_utility.by_opacus))
    assert min(ours.accuracy, opacus.accuracy) > 0.4
    assert ours.epsilon == pytest.approx(opacus.epsilon, rel=0.05)
    assert dp_utility.by_lightning(0, None, 2).epsilon == 0


def results() -> tuple[dict, dict]:
    cost = {
        "ratios": {
            "step_vs_plain_wrn": 1.25,
            "step_opacus_hooks_vs_plain_wrn": 3.5,
            "step_opacus_ghost_vs_plain_wrn": 2.25,
        }
    }
    accuracy = {name: {"mean": 0.9, "error": 0.01} for name in ("1/ours", "1/opacus", "plain")}
    return cost, {"accuracy": accuracy, "ours_minus_opacus": {"1": {}}}


def test_the_picture_shows_ratios_and_what_failed(tmp_path):
    for name in ("a/one.svg", "two.svg"):
        dp_picture.draw(*results(), tmp_path / name)
    text = (tmp_path / "two.svg").read_text()
    assert re.findall(r">([0-9.]+x|failed)<", text) == ["1.25x", "2.25x", "3.50x", "failed"]
    assert (tmp_path / "a" / "one.svg").read_text() == text


def test_the_stored_picture_is_that_of_the_stored_results(tmp_path):
    folder = ROOT / "benchmarks" / "results"
    stored = [folder / "dp.json", folder / "dp_utility.json", ROOT / "docs" / "img" / "dp.svg"]
    assert len({path.exists() for path in stored}) == 1
    if stored[0].exists():
        cost, utility = (json.loads(path.read_text()) for path in stored[:2])
        assert utility["ok"]
        dp_picture.draw(cost, utility, tmp_path / "again.svg")
        labels = [
            re.findall(r">([0-9.]+x|failed)<", path.read_text())
            for path in (tmp_path / "again.svg", stored[2])
        ]
        assert labels[0] == labels[1]
