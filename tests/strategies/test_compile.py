"""Compiled modules: the same weights, or a refusal."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import DPConfig, PrivateStrategy
from lightning_secure.errors import UnsupportedModelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
    # dynamo looks at attributes of tensors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class Model(L.LightningModule):
    def __init__(self, prepare=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)
        if prepare:
            prepare(self)

    def forward(self, x):
        x = self.net(x)
        return self.head(self.attend(x, x, x, need_weights=False)[0][:, 0])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def wrapped(backend, **options):
    def prepare(model):
        model.net = torch.compile(model.net, backend=backend, **options)
        model.attend = torch.compile(model.attend, backend=backend, **options)

    return prepare


def in_place(backend):
    return lambda model: model.net.compile(backend=backend)


def fitted(tmp_path, model, compiled=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 5, generator=generator)
    data = TensorDataset(x, (x.sum((1, 2)) > 0).long())
    run = L.Trainer(
        strategy=PrivateStrategy(
            DPConfig(delta=1e-5, max_grad_norm=0.5, insecure_noise_off=True, insecure_seed=3)
        ),
        accelerator="cpu", max_epochs=1, limit_train_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    run.fit(model if compiled is None else compiled, DataLoader(data, batch_size=8))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("plain"), Model())


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("prepare", [wrapped("aot_eager"), in_place("eager")])
def test_a_compiled_submodule_gives_the_same_weights(tmp_path, expected, prepare):
    found = fitted(tmp_path, Model(prepare))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_compiled_module_gives_the_same_weights(tmp_path, expected):
    model = Model()
    found = fitted(tmp_path, model, torch.compile(model, backend="eager"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_what_leaves_no_place_to_record_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="fullgraph"):
        fitted(tmp_path, Model(wrapped("eager", fullgraph=True)))
