"""Two processes that were given different things, and must say so before the first step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from agree_run import ALIKE, DIFFERENT, PLAIN
from launch import launch
from scenarios import rows

from lightning_secure.crypto.providers.local import LocalKeyProvider
from lightning_secure.data.writing.writer import EncryptedShardWriter

results = partial(launch, Path(__file__).parent / "agree_run.py", seconds=120)

OTHER_ROWS = "not given the same rows"
BY_RANK = "split by rank beforehand"
#: What every process must be told.
TOLD = {
    "unseeded_split": "the indices of the training dataset (rank 1 differs",
    "seeded_split": "the indices of the training dataset (rank 1 differs",
    "other_order": "the indices of the training dataset (rank 1 differs",
    "nested": "the indices of the dataset below the training dataset",
    "but_one": "the indices of the training dataset",
    "own_order": "rows of the training dataset (rank 1 read others than rank 0)",
    "own_but_one": "rows of the training dataset (rank 1 read others",
    "own_augmented": "rows of the training dataset (rank 1 read others",
    "own_in_worker": "rows of the training dataset (rank 1 read others",
    "split_by_rank": BY_RANK,
    "own_split_by_rank": BY_RANK,
    "tensors": "the class of the training dataset is",
    "one_number": "the tensors of the training dataset (rank 1 differs",
    "batch_size": "DataLoader(batch_size=) is 4 on rank 0, 5 on rank 1",
    "frozen": "parameter 'net.0.weight' is (8, 5) float32 frozen on rank 0",
    "extra_layer": "parameter 'extra.weight' is absent on rank 0",
    "width": "parameter 'net.0.weight' is (8, 5) float32 trainable on rank 0, (9, 5)",
    "lr": "lr of the optimizer's parameter group 0 is 0.1 on rank 0, 1.1 on rank 1",
    "optimizer": "the optimizer is torch.optim.sgd.SGD on rank 0, torch.optim.adam.Adam on rank 1",
    "schedule": "step_size of the schedule is 3 on rank 0, 4 on rank 1",
    "epochs": "Trainer(max_epochs=) is 1 on rank 0, 2 on rank 1",
    "precision": "Trainer(precision=) is 32-true on rank 0, bf16-mixed on rank 1",
    "delta": "DPConfig(delta=) is 1e-05 on rank 0, 2e-05 on rank 1",
    "seed": "DPConfig(insecure_seed=) (rank 1 differs from rank 0)",
    "public": "public_metrics is",
    "validation": "validation is by __main__.Validates on rank 0, none on rank 1",
    "checkpoints": "every_n_train_steps of checkpoint callback 0 is 1 on rank 0, 2 on rank 1",
    "no_checkpoints": "the checkpoint callbacks is lightning.pytorch.callbacks.model_checkpoint",
    "patience": "patience of early stopping callback 0 is 1 on rank 0, 2 on rank 1",
    "sharded_rows": "rows of the training dataset (rank 1 read others",
    "sharded_width": "parameter 'net.0.weight' is (8, 5) float32",
    "sharded_lr": "lr of the optimizer's parameter group 0",
}


def asked(request, scenarios):
    """Return the names of the scenarios that the tests to come look at."""
    items = [
        item for item in request.session.items if getattr(item, "module", None) is request.module
    ]
    names = {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")}
    return [name for name in scenarios if name in names]


@pytest.fixture(scope="module")
def different(request, tmp_path_factory):
    return results(tmp_path_factory.mktemp("different"), *asked(request, DIFFERENT))


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_in_every_process_before_the_first_step(different, name):
    for rank in different[name]:
        assert rank["raised"] is not None
        kind, text = rank["raised"]
        assert kind == "UnsupportedTrainerOptionError"
        assert TOLD[name] in text
        assert (OTHER_ROWS in text) == ("training dataset" in TOLD[name] or TOLD[name] == BY_RANK)
        assert rank["steps"] == 0
        assert rank["ledger"] is None
        assert rank["seconds"] < 20


@pytest.mark.parametrize("name", ["unseeded_split", "other_order", "but_one", "own_but_one"])
def test_rows_that_others_have_too_are_not_said_to_be_split_by_rank(different, name):
    assert all(BY_RANK not in rank["raised"][1] for rank in different[name])


@pytest.fixture(scope="module")
def alike(request, tmp_path_factory):
    return results(tmp_path_factory.mktemp("alike"), *asked(request, ALIKE))


@pytest.mark.parametrize("name", ALIKE)
def test_honest_processes_train(alike, name):
    for rank in alike[name]:
        assert rank["raised"] is None
        assert rank["steps"] == (0 if name == "unreadable" else 2)


# ---------------------------------------------------------------- a plain strategy, encrypted rows


@pytest.fixture(scope="module")
def plain(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    keys = LocalKeyProvider.generate(folder / "key.kek")
    LocalKeyProvider.generate(folder / "wrong.kek")
    for name, count in (("A", 32), ("B", 24)):
        x, y, numbers = rows(count).tensors
        with EncryptedShardWriter(folder / name, split="train", keys=keys) as writer:
            for i in range(count):
                writer.write({"x": x[i].numpy(), "y": int(y[i]), "i": int(numbers[i])})
    return results(folder, *asked(request, PLAIN))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other_generation", "the dataset's id of 'train' is"),
        ("other_batches", "batch_size is 4 on rank 0, 5 on rank 1"),
        ("other_columns", "the columns of 'train' is x, y, i on rank 0, x, y on rank 1"),
        ("other_seed", "seed is 0 on rank 0, 1 on rank 1"),
    ],
)
def test_encrypted_rows_are_agreed_on_under_any_strategy(plain, name, words):
    for rank in plain[name]:
        kind, text = rank["raised"]
        assert kind == "ConfigError"
        assert words in text


@pytest.mark.parametrize(("name", "own"), [("pinned", "manifest"), ("other_key", "manifest")])
def test_rows_that_one_process_cannot_open_are_read_in_none(plain, name, own):
    first, second = (rank["raised"] for rank in plain[name])
    assert first[0] == "ConfigError"
    assert "rank 1 failed" in first[1]
    assert second[0] == "ManifestMismatchError"
    assert own in second[1]


@pytest.mark.parametrize("name", ["global_seeds"])
def test_seeds_of_each_process_do_not_give_each_another_order(plain, name):
    seen = [row for rank in plain[name] for row in rank["seen"]]
    assert sorted(seen) == list(range(32))


@pytest.mark.parametrize(("name", "alone"), [("first_alone", [0]), ("each_alone", [0, 1])])
def test_a_trainer_of_one_process_waits_for_no_other(plain, name, alone):
    for rank, (found, count) in enumerate(zip(plain[name], (32, 24), strict=True)):
        assert found["raised"] is None
        if rank in alone:
            assert sorted(found["alone"]) == list(range(count))
