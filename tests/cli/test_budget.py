from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import lightning as L
import pytest
import torch
from click.testing import CliRunner
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_secure import DPConfig, EncryptedCheckpointIO, PrivateStrategy, cli
from lightning_secure.privacy.accounting.ledger import Ledger, journal_path

# q, sigma, T, delta; PLD; RDP. The same table as in tests/privacy/test_accounting.py.
REFERENCE = [
    (("1", 1.0, 1, 1e-5), 4.3772, 4.7285),
    (("0.01", 4.0, 10_000, 1e-5), 0.9470, 1.0355),
    (("0.01", 1.0, 1000, 1e-5), 1.8282, 2.1014),
    (("256/60000", 1.1, 14_062, 1e-5), 2.3817, 2.5966),
    (("4096/50000", 10.0, 875, 1e-5), 0.9028, 0.9877),
]


def budget(*arguments):
    return CliRunner().invoke(cli.main, ["budget", *map(str, arguments)])


def answer(*arguments):
    result = budget(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def plan(rate="0.01", noise=1.0, steps=1000, delta=1e-5):
    return (
        "--sample-rate", rate, "--noise-multiplier", noise, "--steps", steps, "--delta", delta,
    )  # fmt: skip


def goal(rate="0.01", target=2.0, steps=1000, delta=1e-5):
    return ("--sample-rate", rate, "--target-epsilon", target, "--steps", steps, "--delta", delta)


# ---------------------------------------------------------------- before a run


@pytest.mark.parametrize(("case", "pld", "rdp"), REFERENCE)
def test_reference_values(case, pld, rdp):
    found = answer("epsilon", *plan(*case))
    assert found["epsilon"] == pytest.approx(pld, rel=1e-4)
    assert found["epsilon_rdp"] == pytest.approx(rdp, rel=1e-4)


@pytest.mark.parametrize(("limit", "pld"), [(550, 4.836), (700, 1.829)])
def test_cutting_off_large_draws_is_not_free(limit, pld):
    found = answer("epsilon", *plan(), "--dataset-size", 50_000, "--truncated-at", limit)
    assert found["epsilon"] == pytest.approx(pld, rel=1e-3)
    assert "epsilon_rdp" not in found


@pytest.mark.parametrize(("case", "pld", "rdp"), REFERENCE[1::3])
def test_the_noise_of_the_reference_values_is_found_again(case, pld, rdp):
    rate, noise, steps, delta = case
    found = answer("noise", *goal(rate, pld, steps, delta))
    assert found["noise_multiplier"] == pytest.approx(noise, rel=1e-3)
    assert pld * (1 - 1e-3) <= found["epsilon"] <= pld


def test_noise_by_another_accountant():
    found = answer("noise", *goal(target=2.1014), "--accountant", "rdp")
    assert found["noise_multiplier"] == pytest.approx(1.0, rel=1e-3)
    assert found["accountant"] == "rdp"
    result = budget("noise", *goal(), "--accountant", "opacus-gdp")
    assert result.exit_code == 2


def test_opacus_is_shown_beside():
    found = answer("epsilon", *plan(), "--accountant", "opacus-prv", "--accountant", "opacus-gdp")
    assert found["epsilon_opacus_prv"] == pytest.approx(1.8384, rel=1e-3)
    assert found["epsilon_opacus_gdp"] < found["epsilon"]


def test_without_json_it_is_a_table():
    result = budget("epsilon", *plan())
    assert result.exit_code == 0
    assert "epsilon_rdp       2.10137" in result.output


def test_the_installed_command_answers_quickly():
    command = Path(sys.executable).with_name("lightning-secure")
    start = time.perf_counter()
    done = subprocess.run(
        [command, "budget", "epsilon", *map(str, plan("256/60000", 1.1, 14_062)), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert time.perf_counter() - start < 10  # about 1.5 alone on two cores
    assert json.loads(done.stdout)["epsilon"] == pytest.approx(2.3817, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("epsilon", *plan(rate="1.5")), "sample_rate must lie above 0 and at most at 1, not 1.5"),
        (("epsilon", *plan(rate="0")), "sample_rate"),
        (("epsilon", *plan(rate="nan")), "sample_rate"),
        (("epsilon", *plan(rate="1/0")), "nor a fraction"),
        (("epsilon", *plan(rate="many")), "nor a fraction"),
        (("epsilon", *plan(noise=0)), "noise_multiplier must be a finite number above 0"),
        (("epsilon", *plan(noise="inf")), "noise_multiplier"),
        (("epsilon", *plan(steps=0)), "steps must be a whole number above 0"),
        (("epsilon", *plan(steps=1.5)), "not a valid integer"),
        (("epsilon", *plan(delta=1)), "delta must lie between 0 and 1"),
        (("epsilon", *plan(), "--dataset-size", 10), "given together"),
        (
            ("epsilon", *plan(), "--dataset-size", 10, "--truncated-at", 5, "--plot", "x.svg"),
            "leave out",
        ),
        (("epsilon", *plan(), "--dataset-size", 0, "--truncated-at", 5), "dataset_size"),
        (("epsilon", *plan(), "--plot", "x.pdf"), "draws .svg or .png"),
        (("epsilon", *plan(), "--plot", "nowhere/x.svg"), "no directory"),
        (("noise", *goal(target=-1)), "target_epsilon must be a finite number above 0"),
        (
            ("noise", *goal(target=0.1, delta=1e-30), "--accountant", "opacus-rdp"),
            "no amount of noise",
        ),
        (("show", "nothing.ckpt"), "there is no checkpoint"),
    ],
)
def test_wrong_arguments_are_told_in_a_paragraph(arguments, words):
    result = budget(*arguments)
    assert result.exit_code in (1, 2)
    assert words in " ".join(result.output.split())
    assert isinstance(result.exception, SystemExit)
    assert result.output.count("\n") <= 4


# ---------------------------------------------------------------- drawings


def test_the_curve_is_drawn_as_svg(tmp_path):
    path = tmp_path / "curve.svg"
    answer("noise", *goal(), "--plot", path)
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    lines = root.findall(".//{*}g[@id='axes_1']/{*}g")
    assert sum(g.get("id", "").startswith("line2d") for g in lines) == 3  # PLD, RDP, the budget


def test_the_curve_is_drawn_as_png(tmp_path):
    path = tmp_path / "curve.png"
    answer("epsilon", *plan(steps=3), "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_needs_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    result = budget("epsilon", *plan(), "--plot", tmp_path / "x.svg")
    assert result.exit_code == 1
    assert "pip install 'lightning-secure[plot]'" in result.output
    assert not (tmp_path / "x.svg").exists()


# ---------------------------------------------------------------- after a run


def fitted(folder, *plugins, **config):
    run = L.Trainer(
        strategy=PrivateStrategy(
            DPConfig(**{"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 1.0, **config})
        ),
        max_steps=5, limit_val_batches=0, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        plugins=list(plugins),
    )  # fmt: skip
    run.fit(BoringModel())
    run.save_checkpoint(folder / "x.ckpt")
    return run.strategy.ledger


def test_the_account_of_a_plain_checkpoint(tmp_path):
    ledger = fitted(tmp_path)
    found = answer("show", tmp_path / "x.ckpt", "--plot", tmp_path / "x.svg")
    assert found["epsilon"] == ledger.epsilon()
    assert found["epsilon_rdp"] == ledger.epsilon_rdp()
    assert (found["steps"], found["abandoned_steps"], found["private"]) == (5, 0, True)
    assert found["run_id"] == ledger.run_id
    assert (tmp_path / "x.svg").exists()
    text = budget("show", tmp_path / "x.ckpt").output
    assert ledger.state_dict()["journal_key"] not in text + json.dumps(found)


def test_the_account_of_an_encrypted_checkpoint(tmp_path, keys, other_keys):
    ledger = fitted(tmp_path, EncryptedCheckpointIO(keys))
    path = tmp_path / "x.ckpt"
    assert answer("show", path, "--keys", keys._path)["epsilon"] == ledger.epsilon()
    assert "no key was given" in budget("show", path).output
    result = budget("show", path, "--keys", other_keys._path)
    assert result.exit_code == 1
    data = bytearray(path.read_bytes())
    data[-500] ^= 1
    path.write_bytes(data[:-40])
    assert "rejected" in budget("show", path, "--keys", keys._path).output


def test_what_the_run_released_since_is_added(tmp_path):
    ledger = fitted(tmp_path)
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state["lightning_secure"]["privacy"]["releases"] = [[1.0, ledger.public.sample_rate, 2]]
    torch.save(state, tmp_path / "older.ckpt")
    journal = ("--journal", tmp_path / "privacy_journal")
    found = answer("show", tmp_path / "older.ckpt", *journal)
    assert (found["steps"], found["run_steps"]) == (2, 5)
    assert found["epsilon"] < found["run_epsilon"] == ledger.epsilon()
    assert "there is none" in budget("show", tmp_path / "x.ckpt", "--journal", tmp_path).output


def test_a_run_that_is_not_private_has_no_epsilon(tmp_path):
    fitted(tmp_path, insecure_seed=1)
    found = answer("show", tmp_path / "x.ckpt", "--journal", tmp_path / "privacy_journal")
    assert found["private"] is False
    assert found["epsilon"] is found["epsilon_rdp"] is found["run_epsilon"] is None
    assert found["insecure"] == ["insecure_seed"]
    result = budget("show", tmp_path / "x.ckpt", "--plot", tmp_path / "x.svg")
    assert "there is no curve to draw" in result.output
    assert "epsilon                infinite" in budget("show", tmp_path / "x.ckpt").output


@pytest.mark.parametrize("content", [b"", b"LSEC", b"not a checkpoint", None, "other"])
def test_what_has_no_account_is_said_to_have_none(tmp_path, content):
    path = tmp_path / "x.ckpt"
    if content == "other":
        torch.save([1, 2], path)
    elif content is None:
        torch.save({"state_dict": {"w": torch.zeros(3)}}, path)
    else:
        path.write_bytes(content)
    result = budget("show", path)
    assert result.exit_code == 1
    assert "no checkpoint" in result.output or "no privacy ledger" in result.output


class Payload:
    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


def test_showing_a_checkpoint_runs_nothing_of_it(tmp_path):
    torch.save({"lightning_secure": Payload()}, tmp_path / "x.ckpt")
    result = budget("show", tmp_path / "x.ckpt")
    assert result.exit_code == 1
    assert "ran code" not in result.output
    assert "not safe" in result.output


def test_a_lost_journal_is_begun_anew(tmp_path):
    ledger = fitted(tmp_path)
    folder = tmp_path / "privacy_journal"
    arguments = ("recover", tmp_path / "x.ckpt", "--journal", folder, "--steps")
    assert "File exists" in budget(*arguments, 9).output
    journal_path(ledger, folder).unlink()
    assert "the checkpoint alone has 5 steps" in budget(*arguments, 4).output
    result = budget(*arguments, 9)
    assert result.exit_code == 0, result.output
    assert answer("show", tmp_path / "x.ckpt", "--journal", folder)["run_steps"] == 9
    assert Ledger.from_checkpoint(torch.load(tmp_path / "x.ckpt", weights_only=True)).steps == 5
