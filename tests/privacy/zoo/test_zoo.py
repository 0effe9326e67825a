"""Whole models: per-sample norms and clipped sums against ``torch.func``, exact and in bfloat16."""

from __future__ import annotations

import peft
import pytest
import torch
from opacus.layers import DPLSTM
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTModel,
    logging,
)

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.checks.preflight import preflight
from lightning_secure.privacy.gradients.clipped_sums import add_clipped_sums, per_sample_norms
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.rules.layer_rule import GHOST, Way

BATCH, TIME, SIZE, WORDS = 4, 5, 8, 11


class Residual(nn.Module):
    def __init__(self, channels, *, stride=1):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False),
            nn.GroupNorm(2, 2 * channels),
            nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, bias=False),
            nn.GroupNorm(2, 2 * channels),
        )
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.convs(x) + self.shortcut(x))


class Positions(nn.Module):
    """Vectors that all rows share: looked up once and broadcast, as in GPT and BERT."""

    def __init__(self, length):
        super().__init__()
        self.table = nn.Embedding(length, SIZE)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1])[None])


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, SIZE, 2, 2)
        self.first = nn.Embedding(1, SIZE)
        self.positions = Positions(5)
        layer = nn.TransformerEncoderLayer(
            SIZE, 2, 16, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(SIZE), False)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        first = self.first(torch.zeros(1, 1, dtype=torch.long)).expand(len(x), -1, -1)
        return self.head(self.encoder(self.positions(torch.cat([first, x], 1)))[:, 0])


class Decoder(nn.Module):
    """GPT-like: causal attention by one product, and the head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, SIZE)
        self.positions = Positions(TIME)
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(3))
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 16), nn.GELU(), nn.Linear(16, SIZE))
        self.head = nn.Linear(SIZE, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.positions(self.words(tokens))
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))


class Encoder(nn.Module):
    """Padding, known by a token of its own, is masked in attention and in the mean."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, SIZE, padding_idx=0)
        layer = nn.TransformerEncoderLayer(SIZE, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, tokens):
        padding = tokens == 0
        x = self.encoder(self.words(tokens), src_key_padding_mask=padding)
        return self.head((x * ~padding[..., None]).sum(1) / (~padding).sum(1, keepdim=True))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = DPLSTM(SIZE, SIZE, batch_first=True)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Checkpointed(nn.Module):
    """A model of which the middle is computed again on the way back."""

    def __init__(self, *, reentrant=None):
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE)
        self.middle = nn.Sequential(
            nn.Linear(SIZE, 16),
            nn.ReLU(inplace=True),
            nn.LayerNorm(16),
            nn.Dropout(),
            nn.Linear(16, SIZE),
        )
        self.last = nn.Linear(SIZE, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            if self.reentrant is None:
                x = self.middle(x)
            else:
                x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(x)


class Hugging(nn.Module):
    """What a model of transformers puts out, and one that knows padding by its token."""

    def __init__(self, model, *, masked=False):
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, x):
        if not self.masked:
            out = self.model(x)
            return out.logits if "logits" in out else out.pooler_output
        mask = x != 0
        # Of four dimensions, as BERT makes it of two by looking whether any row is padded.
        out = self.model(x, attention_mask=mask[:, None, None].expand(-1, -1, x.shape[1], -1))
        return torch.cat([out.pooler_output, (out[0] * mask[..., None]).sum(1)], 1)


SMALL = {
    "hidden_size": SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert():
    return BertModel(BertConfig(vocab_size=WORDS, max_position_embeddings=8, **SMALL))


def vit():
    return ViTModel(ViTConfig(image_size=4, patch_size=2, num_channels=1, **SMALL))


def gpt2():
    config = GPT2Config(
        vocab_size=WORDS, n_embd=SIZE, n_layer=1, n_head=2, n_positions=8, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def adapted():
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(bert(), config)


def partly_frozen_bert():
    model = bert()
    model.embeddings.requires_grad_(False)
    for name, parameter in model.encoder.layer[0].named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def floats(*shape):
    return lambda: torch.randn(BATCH, *shape)


def tokens():
    return torch.randint(1, WORDS, (BATCH, TIME))


def padded():
    x = tokens()
    x[1, 3:] = x[2, 1:] = 0
    return x


ZOO = {
    "MLP": (lambda: nn.Sequential(nn.Linear(5, SIZE), nn.ReLU(), nn.Linear(SIZE, 3)), floats(5)),
    "CNN": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(16, 3),
        ),
        floats(1, 8, 8),
    ),
    "ResNet": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), Residual(2), Residual(4, stride=2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        ),
        floats(1, 8, 8),
    ),
    "ViT": (ViT, floats(1, 4, 4)),
    "decoder": (Decoder, tokens),
    "encoder with padding": (Encoder, padded),
    "LSTM": (Recurrent, floats(TIME, SIZE)),
    "BERT": (lambda: Hugging(bert(), masked=True), padded),
    "BERT, partly frozen": (lambda: Hugging(partly_frozen_bert(), masked=True), padded),
    "BERT with LoRA": (lambda: Hugging(adapted(), masked=True), padded),
    "GPT-2": (lambda: Hugging(gpt2()), tokens),
    "ViT of transformers": (lambda: Hugging(vit()), floats(1, 4, 4)),
}  # fmt: skip


# Of peft 0.21 on transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def _quiet_transformers():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def build(name):
    torch.manual_seed(0)
    make, inputs = ZOO[name]
    return make(), inputs()


def loss_of(model, x):
    out = model(x).flatten(1).float() if not _exact(model) else model(x).flatten(1)
    return (out.sin() * torch.arange(1.0, out.shape[1] + 1)).sum(1).mean()


def _exact(model):
    return isinstance(model, nn.Module) and next(model.parameters()).dtype == torch.float64


def reference(model, x):
    """Each row's gradient by parameter, in float64."""
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values, row):
        out = functional_call(model, values, (row[None],)).flatten(1)
        return (out.sin() * torch.arange(1.0, out.shape[1] + 1)).sum(1).mean()

    # functorch has no rule for the fast kernels of attention.
    with sdpa_kernel(SDPBackend.MATH):
        grads = vmap(grad(loss), in_dims=(None, 0))(values, x)
    if isinstance(model, Encoder):
        # vmap's embedding knows nothing of padding_idx.
        grads["words.weight"][:, 0] = 0
    return grads


def both(name, *, autocast=False):
    """Norms and clipped sums, ours and functorch's."""
    model, x = build(name)
    model.double()
    exact = x.double() if x.is_floating_point() else x
    rows = reference(model, exact)
    norms = sum(g.flatten(1).square().sum(1) for g in rows.values()).sqrt()
    bound = float(norms.median())
    factors = (bound / norms).clamp(max=1)
    expected = {n: torch.einsum("b,b...->...", factors, g) for n, g in rows.items()}
    if autocast:
        model.float()
    engine = GradientEngine(model, max_grad_norm=bound)
    engine.attach()
    with engine.recording(rows=BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, x if autocast else exact)
        engine.scaled(loss, BATCH).backward()
    records = engine.take(BATCH)
    found = per_sample_norms(records)
    sums = {}
    add_clipped_sums(sums, records, max_grad_norm=bound)
    engine.detach()
    names = {p: n for n, p in model.named_parameters()}
    return found, norms, {names[p]: total for p, total in sums.items()}, expected


@pytest.mark.parametrize("name", ZOO)
def test_norms_and_clipped_sums_are_exact(name):
    found, norms, sums, expected = both(name)
    torch.testing.assert_close(found, norms, rtol=1e-9, atol=0)
    assert set(sums) == set(expected)
    for parameter, total in expected.items():
        torch.testing.assert_close(sums[parameter], total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_under_autocast_they_are_as_near_as_bfloat16_is(name):
    found, norms, sums, expected = both(name, autocast=True)
    torch.testing.assert_close(found.double(), norms, rtol=0.05, atol=0)
    wrong = sum(float((sums[n] - g).square().sum()) for n, g in expected.items())
    assert wrong < 0.03**2 * sum(float(g.square().sum()) for g in expected.values())
    assert all(total.dtype == torch.float32 for total in sums.values())


@pytest.mark.parametrize(
    "make",
    [
        *(lambda name=name: build(name) for name in ("encoder with padding", "GPT-2", "ViT")),
        lambda: build("BERT with LoRA"),
        lambda: (Checkpointed(reentrant=True), torch.randn(BATCH, TIME, SIZE)),
        lambda: (Checkpointed(reentrant=False), torch.randn(BATCH, TIME, SIZE)),
    ],
)
def test_they_pass_the_trial_runs(make):
    model, x = make()
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    preflight(
        engine, model, lambda b: loss_of(model, b), x, size=BATCH, backward=torch.autograd.backward
    )
    engine.detach()


# ---------------------------------------------------------------- evaluation


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_evaluation_says_what_it_said_before_and_leaves_no_record(nested):
    """Without grad a transformer goes by one fused call; with our hooks it goes layer by layer."""
    model, x = build("encoder with padding")
    model.encoder.enable_nested_tensor = model.encoder.use_nested_tensor = nested
    model.eval()
    with torch.no_grad():
        expected = model(x)
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with engine.recording(rows=BATCH):
        loss_of(model, x).backward()
    used = {p for record in engine.take(BATCH) for p in record.unit.parameters}
    assert used == set(model.parameters())
    engine.detach()


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("way", [GHOST, Way("product", kept=True), Way("product", kept=False)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_are_recorded_once(reentrant, way):
    def norms(reentrant):
        torch.manual_seed(0)
        model = Checkpointed(reentrant=reentrant).double()
        x = torch.randn(BATCH, TIME, SIZE, dtype=torch.float64)
        engine = GradientEngine(model, max_grad_norm=1.0)
        engine.attach()
        for unit in engine.units:  # which otherwise choose by time
            unit._way = way if unit.has_ghost else None
        torch.manual_seed(1)
        with engine.recording(rows=BATCH):
            engine.scaled(loss_of(model, x), BATCH).backward()
        records = engine.take(BATCH)
        sums = {}
        add_clipped_sums(sums, records, max_grad_norm=1.0)
        return per_sample_norms(records), [sums[p] for p in model.parameters()]

    found, expected = norms(reentrant), norms(None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- layers called once for all rows


def test_a_row_of_its_own_is_no_row_of_all():
    """Repeated for each row, then taken back to one: all rows would be one row's affair."""

    class Taken(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(6, SIZE), nn.Linear(SIZE, 3)

        def forward(self, x):
            return self.head(torch.tanh(x @ self.shared(torch.eye(6)[None])[0]))

    model = Taken()
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with pytest.raises(UnsupportedModelError, match="one row's gradient changes"):
        preflight(
            engine,
            model,
            lambda b: loss_of(model, b),
            torch.randn(12, 6),
            size=12,
            backward=torch.autograd.backward,
        )
    engine.detach()
