"""The benchmark of shards measures, and gives no result for a reader that returns other rows."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = folder / "benchmarks" / "shards.py"
    options = ("--quick", "--records", 200, "--rounds", 2, "--cache", folder / "cache")
    (folder / "cache").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, script, *map(str, options), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def copy(tmp_path):
    """The benchmarks in a folder where they may be changed."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    return tmp_path


def test_a_quick_run_says_what_it_measured_and_where(copy):
    done = run(copy, "--only", "ours", "ram", "--json", copy / "deep" / "result.json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((copy / "deep" / "result.json").read_text())
    command = "benchmarks/shards.py --quick --only ours ram --records 200 --rounds 2"
    assert result["command"] == command
    assert {"cpu", "cores", "aes_instructions", "ram_gb", "python"} <= result["machine"].keys()
    assert result["versions"]["ours"]["cryptography"]
    for mode in ("sequential", "shuffled", "random"):
        for size in ("3kb", "150kb"):
            measured = result["rounds"][f"{size}/{mode}/aes"]
            assert len(measured["seconds"]) == 2
            assert min(measured["seconds"]) > 0
    ratios = result["ratios"]
    assert {
        "window_aes_vs_ram_3kb",
        "window_aes_vs_ram_batches_150kb",
        "trainer_fit_aes_vs_ram",
        "loader_extra_memory_mb",
    } <= ratios.keys()
    assert not any("litdata" in name for name in ratios)  # what was not measured is not there
    assert ratios["provider_calls_per_partition"] == 1
    assert 0 < ratios["size_overhead_64k"] < 0.01
    text = json.dumps(result)
    assert os.uname().nodename not in text
    assert str(copy) not in text
    assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param("x.copy()", "x[::-1].copy()", id="labels of other rows"),
        pytest.param(
            "SequentialSampler(tensors)", "Listed([1, *range(1, len(x))])", id="a row twice"
        ),
        pytest.param(
            "SequentialSampler(tensors)", "Listed([*range(1, len(x))])", id="a row missing"
        ),
    ],
)
def test_a_reader_that_returns_other_rows_gets_no_result(copy, right, wrong):
    module = copy / "benchmarks" / "loading" / "ram.py"
    text = module.read_text()
    assert text.count(right) == 1
    module.write_text(text.replace(right, wrong))
    done = run(copy, "--only", "ram", "--json", copy / "result.json")
    assert done.returncode == 1
    assert "rows that are not the" in done.stderr
    assert not (copy / "result.json").exists()


def test_a_system_that_fails_ends_the_run_and_says_why(copy):
    done = run(copy, "--only", "litdata", "--peers", sys.prefix, "--json", copy / "result.json")
    assert done.returncode == 1
    assert "litdata has ended" in done.stderr
    assert "No module named 'litdata'" in done.stderr
    assert not (copy / "result.json").exists()


@pytest.fixture(scope="module")
def picture():
    spec = importlib.util.spec_from_file_location("picture", ROOT / "benchmarks" / "picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def labels(svg: Path) -> list[str]:
    return re.findall(r">([0-9.]+x)<", svg.read_text())


def test_the_picture_shows_medians_of_ratios_within_rounds(picture, tmp_path):
    def measured(*seconds):
        return {"rows": 60, "seconds": list(seconds)}

    rounds = {
        f"{size}/shuffled/{name}": measured(4, 8, 4)
        for size in ("3kb", "150kb")
        for name in picture.NAMES
    }
    rounds["3kb/shuffled/aes"] = measured(2, 2, 1)  # 2, 4 and 4 times as fast
    rounds["150kb/shuffled/aes"] = measured(8, 8, 5)  # 0.5, 1 and 0.8 times
    picture.draw({"rounds": rounds}, tmp_path / "deep" / "a.svg")
    picture.draw({"rounds": rounds}, tmp_path / "b.svg")
    others = ["1x"] * (len(picture.NAMES) - 1)
    assert labels(tmp_path / "b.svg") == [*others, "4x", *others, "0.8x"]
    assert (tmp_path / "deep" / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_picture_in_the_readme_is_that_of_the_stored_result(picture, tmp_path):
    result, svg = ROOT / "benchmarks" / "results" / "shards.json", ROOT / "docs/img/shards.svg"
    assert result.exists() == svg.exists()
    if result.exists():
        picture.draw(json.loads(result.read_text()), tmp_path / "again.svg")
        assert labels(tmp_path / "again.svg") == labels(svg)
