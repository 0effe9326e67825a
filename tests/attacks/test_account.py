"""Ways to part weights from their ledger, or to train them past it; each succeeded once."""

from __future__ import annotations

import copy
import io
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from private_run import trainer
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import (
    EncryptedCheckpointIO,
    EncryptedDataModule,
    RedactingCheckpointIO,
    declare_public_weights,
    load_encrypted_checkpoint,
    seal,
)
from lightning_secure.errors import LedgerError
from lightning_secure.plugins import entry_point
from lightning_secure.privacy.accounting.carried_ledger import ledger_of
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.util import events

STEPS = 8


class Model(L.LightningModule):
    """A frozen part, a trainable one, and buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.back = nn.Linear(4, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(6))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.scale * self.back(x)), y)

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.head(self.back(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def loader(classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = torch.randint(0, classes, (64,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def plain(tmp_path, *plugins, **options):
    return trainer(
        tmp_path, **{"strategy": SingleDeviceStrategy("cpu"), **options}, plugins=[*plugins]
    )


def trained(tmp_path, module=None, **options):
    module = Model() if module is None else module
    run = trainer(tmp_path, **options)
    run.fit(module, loader())
    return module, run


def in_file(path, keys=None):
    """Return the ledger of a checkpoint, encrypted or not."""
    io = TorchCheckpointIO() if keys is None else EncryptedCheckpointIO(keys)
    ledger = Ledger.from_checkpoint(io.load_checkpoint(path, weights_only=True))
    assert ledger is not None, "the checkpoint has no ledger"
    return ledger


def carried(module):
    """Return the ledger of a module."""
    ledger = ledger_of(module)
    assert ledger is not None, "the module has no ledger"
    return ledger


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them, for each Trainer anew
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


# ---------------------------------------------------------------- saving


PLUGINS = {
    "encrypted": EncryptedCheckpointIO,
    "redacted": lambda keys: RedactingCheckpointIO(EncryptedCheckpointIO(keys)),
    "in the background": lambda keys: AsyncCheckpointIO(EncryptedCheckpointIO(keys)),
    "redacted in the background": lambda keys: RedactingCheckpointIO(
        AsyncCheckpointIO(EncryptedCheckpointIO(keys))
    ),
    "in the clear": lambda keys: TorchCheckpointIO(),
}


@pytest.mark.parametrize(
    ("kind", "strategy", "weights_only"),
    [(kind, SingleDeviceStrategy, False) for kind in PLUGINS]
    + [("encrypted", SingleDeviceStrategy, True), ("encrypted", DDPStrategy, False)],
)
def test_a_plain_trainer_saves_the_ledger_too(tmp_path, keys, kind, strategy, weights_only):
    module, _ = trained(tmp_path)
    plugin, path = PLUGINS[kind](keys), tmp_path / "a.ckpt"
    options = {"strategy": strategy() if strategy is DDPStrategy else strategy("cpu")}
    run = plain(tmp_path, plugin, **options)
    run.validate(module, loader(), verbose=False)
    run.save_checkpoint(path, weights_only=weights_only)
    while plugin is not None:
        if isinstance(plugin, AsyncCheckpointIO):
            plugin.teardown()
        plugin = getattr(plugin, "checkpoint_io", None)
    ledger = in_file(path, None if kind == "in the clear" else keys)
    assert (ledger.steps, ledger.private) == (STEPS, True)
    assert ledger.run_id == carried(module).run_id


class Saves(Model):
    """Has hooks of its own, which go on being called, and one that empties the checkpoint."""

    def __init__(self):
        super().__init__()
        self.called = []

    def on_save_checkpoint(self, checkpoint):
        self.called.append("save")
        checkpoint.pop("lightning_secure", None)

    def on_fit_start(self):
        self.called.append("start")

    def on_fit_end(self):
        self.called.append("end")


def test_hooks_of_the_modules_own_are_still_called(tmp_path):
    module, _ = trained(tmp_path, Saves())
    module.called.clear()
    vars(module)["on_fit_end"] = lambda: module.called.append("its instance's end")
    trained(tmp_path, module)
    run = plain(tmp_path)
    run.validate(module, loader(), verbose=False)
    assert module.called == ["start", "its instance's end"]
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert module.called[2:] == ["save"]
    assert in_file(tmp_path / "a.ckpt").steps == 2 * STEPS


def test_a_private_strategy_writes_the_ledger_where_the_hook_is_exchanged(tmp_path):
    module, run = trained(tmp_path)
    module.on_save_checkpoint = lambda checkpoint: None
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert in_file(tmp_path / "a.ckpt").steps == STEPS


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_a_copy_carries_its_own_ledger(tmp_path, how):
    module, _ = trained(tmp_path)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        torch.save(module, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    run = plain(tmp_path)
    run.fit(other, loader())
    run.save_checkpoint(tmp_path / "other.ckpt")
    assert not in_file(tmp_path / "other.ckpt").private
    assert carried(module).private, "the copy's training is not the original's"
    run = plain(tmp_path)
    run.validate(module, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "own.ckpt")
    assert in_file(tmp_path / "own.ckpt").private


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_says_what_was_trained_without_noise(tmp_path, keys):
    """Saved while and after a plain fit, loaded, and trained on privately."""
    module, _ = trained(tmp_path)
    best = ModelCheckpoint(tmp_path / "c", every_n_train_steps=4, save_top_k=-1)
    run = plain(tmp_path, EncryptedCheckpointIO(keys), callbacks=[best], enable_checkpointing=True)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "c/after.ckpt", weights_only=True)
    paths = sorted((tmp_path / "c").glob("*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        ledger = in_file(path, keys)
        assert ledger.insecure == ("weights_changed_without_noise",)
        assert ledger.epsilon() == float("inf")
        loaded = load_encrypted_checkpoint(Model, path, keys=keys)
        with pytest.raises(LedgerError, match="weights have changed"):
            trainer(tmp_path).fit(loaded, loader())
    resumed = trainer(tmp_path, max_epochs=3, plugins=[EncryptedCheckpointIO(keys)])
    with pytest.raises(LedgerError, match="weights have changed"):
        resumed.fit(Model(), loader(), ckpt_path=paths[1])


def test_checkpoints_within_a_later_private_fit_are_private(tmp_path, caplog):
    module, _ = trained(tmp_path)
    best = ModelCheckpoint(tmp_path / "c", every_n_train_steps=4, save_top_k=-1)
    trained(tmp_path, module, callbacks=[best], enable_checkpointing=True)
    ledgers = [in_file(path) for path in sorted((tmp_path / "c").glob("*.ckpt"))]
    assert [(ledger.steps, ledger.private) for ledger in ledgers] == [(12, True), (16, True)]
    assert "have changed since" not in caplog.text
    plain(tmp_path).fit(module, loader())
    assert "2 weights, 'head.weight' first, have changed since" in caplog.text


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, "validate") for kind in PLUGINS]
    + [("encrypted", way) for way in ("fit", "test", "predict")],
)
def test_every_ckpt_path_brings_the_ledger(tmp_path, keys, kind, way):
    _, run = trained(tmp_path, plugins=[PLUGINS[kind](keys)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.strategy.teardown()  # of what writes in the background
    run.strategy.checkpoint_io.teardown()
    module = Model()
    again = plain(tmp_path, PLUGINS[kind](keys), max_epochs=1)
    options = {} if way in ("fit", "predict") else {"verbose": False}
    getattr(again, way)(
        module, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, **options
    )
    assert carried(module).steps == STEPS
    trained(tmp_path, module)  # and nothing has changed
    assert carried(module).steps == 2 * STEPS


def test_a_datamodule_of_ours_brings_it_where_no_callback_does(tmp_path, keys, monkeypatch):
    monkeypatch.setattr(entry_point, "_OURS", frozenset())
    _, run = trained(tmp_path)
    run.save_checkpoint(tmp_path / "a.ckpt")
    rows = [{"x": torch.randn(4).numpy(), "y": i % 3} for i in range(64)]
    seal(rows, tmp_path / "d", keys=keys, split="val")
    module, data = Model(), EncryptedDataModule(tmp_path / "d", keys=keys, batch_size=8)
    again = plain(tmp_path)
    again.validate(
        module, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False
    )
    assert carried(module).steps == STEPS


class Wider(Model):
    """A subclass with a part that its checkpoint does not have."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False
        self.extra = nn.Linear(6, 3)


@pytest.mark.filterwarnings("ignore:Found keys that are in the model")
def test_a_subclass_gets_the_ledger_and_may_add_to_it(tmp_path, keys):
    _, run = trained(tmp_path, plugins=[EncryptedCheckpointIO(keys)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    for module in (load_encrypted_checkpoint(Wider, tmp_path / "a.ckpt", keys=keys), Wider()):
        if ledger_of(module) is None:
            again = plain(tmp_path, EncryptedCheckpointIO(keys))
            again.validate(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        module.extra.requires_grad_(False)
        module.other = nn.Linear(4, 4).requires_grad_(False)
        steps = carried(module).steps
        trained(tmp_path, module)
        assert carried(module).steps > steps == STEPS


# ---------------------------------------------------------------- training past the ledger


def _thaw(module):
    module.back.requires_grad_(True)
    module.head.requires_grad_(False)


def _freeze(module):
    module.back.requires_grad_(False)
    module.head.requires_grad_(True)


def _plainly(tmp_path, module, **options):
    plain(tmp_path, **options).fit(module, loader())


def _by_hand(module):
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    for batch in loader():
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()


def _only_head(tmp_path, module):
    _plainly(tmp_path, module)


def _only_frozen(tmp_path, module):
    _thaw(module)
    _plainly(tmp_path, module)
    _freeze(module)


def _frozen_by_hand(tmp_path, module):
    _thaw(module)
    _by_hand(module)
    _freeze(module)


def _in_another_type(tmp_path, module):
    module.to(torch.float64)
    plain(tmp_path, precision="64-true").fit(module, loader())


def _in_another_type_and_back(tmp_path, module):
    _in_another_type(tmp_path, module)
    module.to(torch.float32)


def _by_hand_and_cast(tmp_path, module):
    _by_hand(module)
    module.to(torch.float64)


def _in_half(tmp_path, module):
    plain(tmp_path, precision="bf16-true").fit(module, loader())
    module.to(torch.float32)


def _renamed_before(tmp_path, module):
    module.top, module.head = module.head, nn.Identity()
    module.training_step = lambda batch, batch_idx: F.cross_entropy(
        module.top(module.back(batch[0])), batch[1]
    )
    _plainly(tmp_path, module)
    del module.training_step
    module.head = nn.Sequential(module.top)
    del module.top


def _renamed_after(tmp_path, module):
    _by_hand(module)
    module.head = nn.Sequential(module.head)


def _another_shape_after(tmp_path, module):
    """Ten classes more than there were, beside what was trained."""
    _plainly(tmp_path, module)
    old, module.head = module.head, nn.Linear(6, 13)
    with torch.no_grad():
        module.head.weight[:3].copy_(old.weight)
        module.head.bias[:3].copy_(old.bias)


def _a_new_head(tmp_path, module):
    module.head = nn.Linear(6, 5)
    _plainly(tmp_path, module)


def _an_adapter(tmp_path, module):
    module.back = nn.Sequential(module.back, adapter := nn.Linear(6, 6))
    module.head.requires_grad_(False)
    _plainly(tmp_path, module)
    module.head.requires_grad_(True)
    adapter.requires_grad_(False)


def _permuted(tmp_path, module):
    with torch.no_grad():
        module.head.weight.copy_(module.head.weight.flip(0).clone())


def _a_buffer(tmp_path, module):
    module.scale.mul_(torch.randn(6))


def _a_buffer_of_no_checkpoint(tmp_path, module):
    module.cache.add_(1)


PAST = [
    _only_head, _only_frozen, _frozen_by_hand, _in_another_type, _in_another_type_and_back,
    _by_hand_and_cast, _in_half, _renamed_before, _renamed_after, _another_shape_after,
    _a_new_head, _an_adapter, _permuted, _a_buffer, _a_buffer_of_no_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize(
    ("past", "how"),
    [(past, "fitted") for past in PAST]
    + [
        (past, how)
        for past in (_only_head, _frozen_by_hand, _a_new_head)
        for how in ("loaded", "validated", "copied")
    ],
)
def test_training_past_the_ledger_is_refused(tmp_path, keys, past, how):
    module, run = trained(tmp_path, plugins=[EncryptedCheckpointIO(keys)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    if how == "loaded":
        module = load_encrypted_checkpoint(Model, tmp_path / "a.ckpt", keys=keys)
        _freeze(module)
    elif how == "validated":
        module = Model()
        again = plain(tmp_path, EncryptedCheckpointIO(keys))
        again.validate(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    elif how == "copied":
        module = copy.deepcopy(module)
    past(tmp_path, module)
    for _ in range(2):  # the refusal does not settle it
        with pytest.raises(LedgerError, match="have changed since"):
            trainer(tmp_path).fit(module, loader())
    again = plain(tmp_path)
    again.validate(module, loader(), verbose=False)
    again.save_checkpoint(tmp_path / "b.ckpt")
    assert not in_file(tmp_path / "b.ckpt").private


# ---------------------------------------------------------------- what is no training


def _nothing(tmp_path, module):
    pass


def _no_epoch(tmp_path, module):
    plain(tmp_path, max_epochs=0).fit(module, loader())


def _validated(tmp_path, module):
    plain(tmp_path).validate(module, loader(), verbose=False)


def _rounded(tmp_path, module):
    module.to(torch.bfloat16).to(torch.float32)


def _widened(tmp_path, module):
    module.to(torch.float64).to(torch.float32)


def _halved(tmp_path, module):
    module.half().float()


def _wrapped(tmp_path, module):
    module.head = nn.Sequential(module.head)


def _extended(tmp_path, module):
    module.more = nn.Linear(6, 3).requires_grad_(False)


def _with_a_fresh_head(tmp_path, module):
    module.head = nn.Linear(6, 5)


def _with_a_longer_cache(tmp_path, module):
    module.cache = torch.arange(9.0)


def _tied(tmp_path, module):
    module.again = module.head


@pytest.mark.parametrize(
    "change",
    [
        _nothing, _no_epoch, _validated, _rounded, _widened, _halved, _wrapped,
        _extended, _with_a_fresh_head, _with_a_longer_cache, _tied,
    ],
)  # fmt: skip
def test_what_is_no_training_is_not_taken_for_it(tmp_path, keys, change):
    fitted, run = trained(tmp_path, plugins=[EncryptedCheckpointIO(keys)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    for module in (fitted, load_encrypted_checkpoint(Model, tmp_path / "a.ckpt", keys=keys)):
        _freeze(module)
        change(tmp_path, module)
        again = plain(tmp_path)
        again.validate(module, loader(), verbose=False)
        again.save_checkpoint(tmp_path / "b.ckpt")
        assert in_file(tmp_path / "b.ckpt").private
        trained(tmp_path, module)
        assert carried(module).private


@pytest.mark.parametrize("average", [EMAWeightAveraging, StochasticWeightAveraging])
def test_averaged_weights_of_a_private_fit_are_its_own(tmp_path, average):
    options = {"swa_lrs": 0.1} if average is StochasticWeightAveraging else {}
    best = ModelCheckpoint(tmp_path / "c", save_last=True)
    module, run = trained(
        tmp_path,
        callbacks=[average(**options), best],
        enable_checkpointing=True,
        max_epochs=2,
    )
    assert in_file(best.last_model_path).private
    trained(tmp_path, module)
    tested = Model()
    run.test(tested, loader(), ckpt_path="last", weights_only=True, verbose=False)
    trained(tmp_path, tested)
    assert carried(tested).private


def test_changes_that_are_declared_public_are_accepted_and_counted(tmp_path, keys):
    with pytest.raises(LedgerError, match="carries no privacy ledger"):
        declare_public_weights(Model())
    module, _ = trained(tmp_path)
    plain(tmp_path).fit(module, loader())
    told = []
    events.subscribe("declared", told.append)
    declare_public_weights(module)
    events.unsubscribe("declared")
    assert [event.action for event in told] == ["privacy.declare"]
    assert told[0].details["changed_weights"] == 2
    _, run = trained(tmp_path, module, plugins=[EncryptedCheckpointIO(keys)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    ledger = in_file(tmp_path / "a.ckpt", keys)
    assert (ledger.steps, ledger.private, ledger.declared_public) == (2 * STEPS, True, 1)
    _only_head(tmp_path, module)  # a declaration is about what was, not about what comes
    with pytest.raises(LedgerError, match="have changed since"):
        trainer(tmp_path).fit(module, loader())


def test_a_ledger_without_a_release_leaves_nothing_on_the_module(tmp_path):
    class Bad(Model):
        def training_step(self, batch, batch_idx):
            raise ValueError("before the first step")

    module = Bad()
    before = set(vars(module))
    with pytest.raises(ValueError, match="first step"):
        trainer(tmp_path).fit(module, loader())
    assert ledger_of(module) is None
    assert not {"on_save_checkpoint", "on_fit_start", "on_fit_end"} & (set(vars(module)) - before)


# ---------------------------------------------------------------- parts of other modules


class Net(Model):
    """Everything in one part that can be taken out."""

    def __init__(self):
        super().__init__()
        self.back.requires_grad_(True)
        self.net = nn.Sequential(self.back, nn.ReLU(), self.head)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Outer(L.LightningModule):
    """Has parts that were modules of their own, and as many elements elsewhere."""

    def __init__(self, *parts, freeze=False):
        super().__init__()
        self.parts = nn.ModuleList(parts).requires_grad_(not freeze)
        self.head = nn.Linear(6, 3)
        self.tail = nn.Linear(3, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.tail(sum(part(batch[0]) for part in self.parts)), batch[1])

    validation_step = Model.validation_step

    def configure_optimizers(self):
        used = (*self.parts.parameters(), *self.tail.parameters())
        return torch.optim.SGD([p for p in used if p.requires_grad], 0.1)


def _pickled(part):
    torch.save(part, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


TAKEN = {
    "itself": lambda module: module,
    "a copy": copy.deepcopy,
    "its net": lambda module: module.net,
    "a copy of its net": lambda module: copy.deepcopy(module.net),
    "its net from a pickle": lambda module: _pickled(module.net),
    "its layers": lambda module: nn.Sequential(module.back, nn.ReLU(), module.head),
    "in a wrapper": lambda module: nn.Sequential(nn.Identity(), module),
}


def saved(tmp_path, module):
    """Return the ledger in what a plain Trainer saves of a module."""
    run = plain(tmp_path)
    run.validate(module, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    return in_file(tmp_path / "saved.ckpt")


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("taken", TAKEN)
def test_a_part_brings_its_ledger_into_another_module(tmp_path, taken, freeze):
    module, _ = trained(tmp_path, Net())
    outer = Outer(TAKEN[taken](module), freeze=freeze)
    ledger = saved(tmp_path, outer)
    assert (ledger.steps, ledger.private) == (STEPS, True)
    assert saved(tmp_path, module).private, "and keeps it"
    trained(tmp_path, outer)
    ledger = saved(tmp_path, outer)
    assert (ledger.steps, ledger.private) == (2 * STEPS, True)
    assert ledger.run_id == carried(module).run_id
    if "copy" not in taken and "pickle" not in taken:
        after = saved(tmp_path, module)
        assert (after.steps, after.private) == ((STEPS if freeze else 2 * STEPS), True)
    trained(tmp_path, outer)
    assert carried(outer).steps == 3 * STEPS


def test_teacher_and_student_of_one_run_have_one_ledger(tmp_path):
    student, _ = trained(tmp_path, Net())
    teacher = copy.deepcopy(student)
    trained(tmp_path, student)
    outer = Outer(student, teacher.requires_grad_(False))
    assert saved(tmp_path, outer).steps == 2 * STEPS
    trained(tmp_path, outer)
    assert (carried(outer).steps, carried(outer).private) == (3 * STEPS, True)


@pytest.mark.parametrize("taken", ["itself", "its net", "its layers"])
def test_parts_of_several_runs_claim_nothing(tmp_path, taken):
    first, second = (TAKEN[taken](trained(tmp_path, Net())[0]) for _ in range(2))
    outer = Outer(first, second)
    assert "weights_of_several_private_runs" in saved(tmp_path, outer).insecure
    with pytest.raises(LedgerError, match="different private runs"):
        trained(tmp_path, outer)


def test_a_part_of_another_run_in_a_private_module_is_refused(tmp_path):
    (module, _), (other, _) = (trained(tmp_path, Net()) for _ in range(2))
    module.teacher = other.net.requires_grad_(False)
    with pytest.raises(LedgerError, match="different private runs"):
        trained(tmp_path, module)


@pytest.mark.parametrize("taken", ["itself", "its net"])
def test_a_part_that_was_trained_without_noise_is_seen_in_another_module(tmp_path, taken):
    module, _ = trained(tmp_path, Net())
    outer = Outer(TAKEN[taken](module))
    _plainly(tmp_path, outer)
    assert not saved(tmp_path, outer).private
    assert not saved(tmp_path, module).private
    with pytest.raises(LedgerError, match="have changed since"):
        trained(tmp_path, outer)
    declare_public_weights(outer)
    trained(tmp_path, outer)
    assert carried(outer).private


def test_a_part_that_is_made_in_setup_brings_its_ledger(tmp_path):
    module, _ = trained(tmp_path, Net())

    class Late(Outer):
        def setup(self, stage):
            self.parts.append(module.net)

    assert saved(tmp_path, Late()).steps == STEPS


def test_public_parts_and_layers_without_weights_bring_nothing(tmp_path):
    public = nn.Linear(4, 6).requires_grad_(False)
    module = Model()
    module.back, module.act = public, nn.ReLU()
    trained(tmp_path, module)
    other = Model()
    other.back, other.act = public, module.act
    assert ledger_of(other) is None
    trained(tmp_path, other)
    assert carried(other).run_id != carried(module).run_id


class Renames(Model):
    """A later version, whose head has another name than in checkpoints of the earlier one."""

    def __init__(self):
        super().__init__()
        self.top = self.head
        del self.head
        self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state, prefix, *_):
        for key in ("weight", "bias"):
            if f"head.{key}" in state:
                state[f"top.{key}"] = state.pop(f"head.{key}")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.top(self.scale * self.back(batch[0])), batch[1])


@pytest.mark.parametrize("private", [False, True])
def test_weights_that_a_hook_renames_are_noted_as_they_were_loaded(tmp_path, private):
    _, run = trained(tmp_path)
    run.save_checkpoint(tmp_path / "a.ckpt")
    module = Renames()
    again = trainer(tmp_path) if private else plain(tmp_path)
    again.validate(
        module, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False
    )
    assert saved(tmp_path, module).private
    trained(tmp_path, module)
    assert carried(module).steps == 2 * STEPS


def test_a_plain_fit_warns_once_of_changed_weights(tmp_path, caplog):
    module, _ = trained(tmp_path)
    best = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=-1)
    run = plain(tmp_path, callbacks=[best], enable_checkpointing=True)
    run.fit(module, loader())
    assert len(list((tmp_path / "c").glob("*.ckpt"))) == 4
    assert caplog.text.count("have changed since the last private fit") == 1
