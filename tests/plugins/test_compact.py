"""A checkpoint holds what it names: not the rows that lie beside a row that a module kept."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from lightning_secure.data.datamodule import EncryptedDataModule
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.plugins.checkpoint import EncryptedCheckpointIO, opened
from lightning_secure.plugins.compact import save_named, save_without_data


def written(value, save=save_named):
    file = io.BytesIO()
    save(value, file)
    return file.getvalue()


def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def shared(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_a_row_that_a_module_keeps_takes_no_other_row_with_it(tmp_path, keys):
    rows = np.arange(64 * 8, dtype="float64").reshape(64, 8) + 0.5
    with EncryptedShardWriter(tmp_path / "d", split="train", keys=keys) as writer:
        writer.write_batch({"x": rows})
    data = EncryptedDataModule(tmp_path / "d", keys=keys, batch_size=4)
    data.setup("fit")
    (batch,) = next(iter(data.train_dataloader()))
    module = torch.nn.Module()
    module.register_buffer("kept", batch[1])
    checkpoint = {"state_dict": module.state_dict(), "sample": batch[2, 3:5]}

    def found(plaintext):
        return [row for row in rows.tolist() if np.array(row).tobytes() in plaintext]

    assert len(found(written(checkpoint, torch.save))) == 64, "all of the window"
    path = tmp_path / "x.ckpt"
    EncryptedCheckpointIO(keys).save_checkpoint(checkpoint, path)
    with opened(path, keys=keys) as file:
        assert found(file.read()) == [batch[1].tolist()]
    back = EncryptedCheckpointIO(keys).load_checkpoint(path)
    assert torch.equal(back["state_dict"]["kept"], batch[1])
    assert torch.equal(back["sample"], batch[2, 3:5])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_names_all_of_its_memory_is_written_as_torch_writes_it():
    layer = torch.nn.LSTM(4, 8, 2)
    tied = torch.nn.Linear(8, 8)
    flat = torch.arange(24.0)
    value = {
        "layer": layer.state_dict(),
        "tied": {"a": tied.weight, "b": tied.weight, "c": tied.weight.T},
        "parts": [flat[:10], flat[10:].view(2, 7)],
        "turned": torch.arange(6).view(2, 3).T,
        "one": torch.tensor(3.0, requires_grad=True),
        "none": torch.empty(0, 3),
        "text": "x",
        "all windows": torch.arange(5000.0).unfold(0, 1000, 1),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    assert written(value) == written(value, torch.save)


BASE = torch.arange(4000, dtype=torch.float64) + 0.25
VIEWS = {
    "row": lambda base: [base[100:110]],
    "same twice": lambda base: [base[100:110], base[100:110]],
    "overlapping": lambda base: [base[101:110], base[105:120]],
    "apart": lambda base: [base[11:20], base[3000:3003]],
    "turned": lambda base: [base.view(40, 100)[3:5].T],
    "column": lambda base: [base.view(40, 100)[:, 7]],
    "two columns": lambda base: [base.view(40, 100)[:, 7], base.view(40, 100)[:, 9]],
    "grid": lambda base: [base.view(40, 100)[2:9:2, 5:50:3], base.view(40, 100)[4]],
    "expanded": lambda base: [base[33:34].expand(10**6), base[30:36]],
    "expanded alone": lambda base: [base[33:35].view(2, 1).expand(2, 10**6)],
    "sliding": lambda base: [base[51:61].unfold(0, 4, 1), base[52]],
    "sliding alone": lambda base: [base[51:61].unfold(0, 4, 1)],
    "empty": lambda base: [base[5:5], base[7:7].view(0, 1)],
    "scalar": lambda base: [base[77]],
    "parameter": lambda base: [torch.nn.Parameter(base[8:12])],
    "sparse": lambda base: [
        torch.sparse_coo_tensor(torch.arange(6).view(2, 3), base[8:11], (9, 9))
    ],
    "conjugate": lambda base: [torch.view_as_complex(base.view(-1, 2))[5:9].conj()],
    "other type": lambda base: [base.view(torch.int32)[9:13]],
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_comes_back_alone(name):
    views = VIEWS[name](BASE.clone())
    data = written(views)
    back = loaded(data)
    for view, one in zip(views, back, strict=True):
        assert type(one) is type(view)
        assert (one.dtype, one.shape, one.requires_grad) == (
            view.dtype, view.shape, view.requires_grad
        )  # fmt: skip
        assert (
            torch.equal(one.to_dense(), view.to_dense())
            if view.is_sparse
            else torch.equal(one.resolve_conj(), view.resolve_conj())
        )
    if name not in ("conjugate", "other type"):
        named = {value for view in views for value in view.detach().to_dense().unique().tolist()}
        there = {value for value in BASE.tolist() if np.float64(value).tobytes() in data}
        assert there <= named
    if name != "two columns":  # between which there are zeros
        assert len(data) < len(written(views, torch.save)) - 10_000


def test_tensors_that_share_elements_share_them_afterwards():
    base = torch.arange(1000.0)
    value = {"a": base[10:20], "again": base[10:20], "b": base[15:40], "c": base[500:600:2]}
    back = loaded(written(value))
    assert shared(back["a"], back["again"])
    back["a"][5] = -1
    assert back["b"][0] == back["again"][5] == -1
    assert not shared(back["a"], back["c"])


def test_what_belongs_to_a_tensor_stays_with_it():
    base = torch.arange(1000.0)
    view = base[3:6].detach().requires_grad_()
    view.note = "kept"
    (back,) = loaded(written([view]))
    assert back.note == "kept"
    assert back.requires_grad


class Image(torch.Tensor):
    """As torchvision's: a class over ordinary memory."""


@pytest.mark.filterwarnings("ignore:.*quant", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", ["image", "quantised"])
def test_a_view_of_another_kind_comes_back_alone(kind):
    base = BASE.float()
    if kind == "quantised":
        view = torch.quantize_per_tensor(base, 1.0, 0, torch.qint32)[8:12]
    else:
        view = base[8:12].as_subclass(Image).requires_grad_()
        view.note = "kept"
    data = written([view, view])
    with torch.serialization.safe_globals([Image]):
        back, again = loaded(data)
    assert again is back
    assert type(back) is type(view)
    assert torch.equal(back, view)
    assert vars(back) == vars(view)
    assert back.requires_grad == view.requires_grad
    assert len(data) < len(written([view], torch.save)) - 10_000


def test_a_trial_copies_few_of_many_small_tensors():
    many = {f"w{i}": torch.ones(15000) for i in range(100)}
    states = {f"s{i}": torch.full((5000,), 7, dtype=torch.uint8) for i in range(20)}
    buffer = io.BytesIO()
    save_without_data({**many, **states}, buffer)
    assert len(buffer.getvalue()) < 1.3e6
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert {name: one.shape for name, one in loaded.items() if name in many} == {
        name: one.shape for name, one in many.items()
    }
    assert all(torch.equal(loaded[name], one) for name, one in states.items())
