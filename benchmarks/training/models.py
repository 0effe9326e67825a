"""The models, in plain torch, and the rows that they are trained on.

All systems get the same: every layer is one that Opacus has a rule for, the batch is the first
dimension everywhere, and no parameter lies outside of a layer (what a transformer adds to its
tokens comes out of an ``nn.Embedding``). Dropout is left out, so that gradients can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

__all__ = ["TASKS", "Rows", "Task", "loss_of"]


class Mlp(nn.Sequential):
    """Three hidden layers.

    Args:
        features: Of a row.
        width: Of the hidden layers.
        classes: To tell apart.
    """

    def __init__(self, *, features: int, width: int, classes: int) -> None:
        layers: list[nn.Module] = []
        for inputs in (features, width, width):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, classes))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(16, inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(16, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        alike = inputs == outputs and stride == 1
        self.shortcut = None if alike else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(x))
        beside = x if self.shortcut is None else self.shortcut(hidden)
        hidden = self.first(hidden)
        result: Tensor = beside + self.second(functional.relu(self.second_norm(hidden)))
        return result


class WideResNet(nn.Module):
    """WRN-16 with GroupNorm, as it is trained privately (De et al. 2022, arXiv:2204.13650).

    Args:
        widening: The 4 of WRN-16-4.
        classes: To tell apart.
    """

    def __init__(self, *, widening: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        widths = [16, *(size * widening for size in (16, 32, 64))]
        blocks = []
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            blocks += [
                _Block(inputs, outputs, 1 if number == 0 else 2),
                _Block(outputs, outputs, 1),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(16, widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.norm(self.blocks(self.stem(x))))
        result: Tensor = self.head(hidden.mean((2, 3)))
        return result


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self._heads, self._causal = heads, causal
        self.into: nn.Module = nn.Linear(width, 3 * width)
        self.out: nn.Module = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.into(x).view(batch, time, 3, self._heads, width // self._heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=self._causal
        )
        result: Tensor = self.out(attended.transpose(1, 2).reshape(batch, time, width))
        return result


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, causal=causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class _Positions(nn.Module):
    """An offset for each place; looked up for every row, so that rows can be told apart."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: Opacus' ghost mode takes no other indices.
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]).contiguous()
        result: Tensor = x + self.table(places)
        return result


class VisionTransformer(nn.Module):
    """ViT, classified by its first token.

    Args:
        image: Pixels of a side.
        patch: Pixels of a patch's side.
        width: Of a token.
        depth: Layers.
        heads: Of each.
        classes: To tell apart.
    """

    def __init__(
        self, *, image: int, patch: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Embedding(1, width)
        self.positions = _Positions((image // patch) ** 2 + 1, width)
        self.layers = nn.Sequential(*(_Layer(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        first = self.first(torch.zeros(len(x), 1, dtype=torch.long, device=x.device))
        hidden = self.layers(self.positions(torch.cat([first.to(patches.dtype), patches], 1)))
        result: Tensor = self.head(self.norm(hidden[:, 0]))
        return result


class Gpt(nn.Module):
    """GPT-2.

    Args:
        vocabulary: Tokens there are.
        length: Tokens of a row.
        width: Of a token.
        depth: Layers.
        heads: Of each.
        tied: Whether the output layer has the weight of the tokens' embedding.
    """

    def __init__(
        self, *, vocabulary: int, length: int, width: int, depth: int, heads: int, tied: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = _Positions(length, width)
        self.layers = nn.Sequential(*(_Layer(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.layers(self.positions(self.tokens(x)))))
        return result


class _Lora(nn.Module):
    """A frozen layer, and a product of two small ones beside it."""

    def __init__(self, base: nn.Linear, rank: int = 16) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def with_lora(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a transformer of which only adapters of attention are trained."""
    model = make().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, _Attention):
            assert isinstance(module.into, nn.Linear)
            assert isinstance(module.out, nn.Linear)
            module.into, module.out = _Lora(module.into), _Lora(module.out)
    return model


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model of one size.

    Attributes:
        make: Returns the model, its weights from torch's generator.
        row: Shape of an input row.
        classes: That the output tells apart; of a language model, its vocabulary.
        tokens: Whether a row is a sequence of tokens, of which each has the next as its class.
    """

    make: Callable[[], nn.Module]
    row: tuple[int, ...]
    classes: int
    tokens: bool = False


def _image(factory: Callable[..., nn.Module], image: int, **options: int) -> Task:
    make = partial(factory, classes=10, **options)
    return Task(make=make, row=(3, image, image), classes=10)


def _gpt(
    *, vocabulary: int, length: int, tied: bool = False, lora: bool = False, **options: int
) -> Task:
    make: Callable[[], nn.Module] = partial(
        Gpt, vocabulary=vocabulary, length=length, tied=tied, **options
    )
    if lora:
        make = partial(with_lora, make)
    return Task(make=make, row=(length,), classes=vocabulary, tokens=True)


def _perceptron(width: int) -> Task:
    make = partial(Mlp, features=784, width=width, classes=10)
    return Task(make=make, row=(784,), classes=10)


def _vit(*, image: int, **options: int) -> Task:
    return _image(partial(VisionTransformer, image=image), image, **options)


#: By size. ``full`` is that of the papers; the others keep its proportions (four times as wide in
#: the feed-forward layer, heads of 64, a vocabulary that has its share of the weights).
TASKS: Mapping[str, Mapping[str, Task]] = {
    "full": {
        "mlp": _perceptron(1024),
        "wrn": _image(WideResNet, 32, widening=4),
        "vit": _vit(image=224, patch=16, width=768, depth=12, heads=12),
        "gpt2": _gpt(vocabulary=50257, length=128, width=768, depth=12, heads=12, tied=False),
        "gpt2_tied": _gpt(vocabulary=50257, length=128, width=768, depth=12, heads=12, tied=True),
        "gpt2_lora": _gpt(vocabulary=50257, length=128, width=768, depth=12, heads=12, lora=True),
    },
    "small": {
        "mlp": _perceptron(1024),
        "wrn": _image(WideResNet, 32, widening=4),
        "vit": _vit(image=128, patch=16, width=256, depth=4, heads=4),
        "gpt2": _gpt(vocabulary=4096, length=64, width=256, depth=4, heads=4, tied=False),
        "gpt2_tied": _gpt(vocabulary=4096, length=64, width=256, depth=4, heads=4, tied=True),
        "gpt2_lora": _gpt(vocabulary=4096, length=64, width=256, depth=4, heads=4, lora=True),
    },
    "quick": {
        "mlp": _perceptron(512),
        "wrn": _image(WideResNet, 16, widening=2),
        "vit": _vit(image=96, patch=16, width=192, depth=1, heads=3),
        "gpt2": _gpt(vocabulary=1024, length=32, width=192, depth=1, heads=3, tied=False),
        "gpt2_tied": _gpt(vocabulary=1024, length=32, width=192, depth=1, heads=3, tied=True),
        "gpt2_lora": _gpt(vocabulary=1024, length=32, width=192, depth=1, heads=3, lora=True),
    },
}


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Random rows; a few are held, and come again and again.

    Args:
        task: What they are for.
        count: How many there seem to be.
        held: How many are held.
    """

    def __init__(self, task: Task, *, count: int, held: int) -> None:
        generator = torch.Generator().manual_seed(20261124)
        self._count = count
        if task.tokens:
            shape = (held, task.row[0] + 1)
            text = torch.randint(task.classes, shape, generator=generator)
            self._x, self._y = text[:, :-1].clone(), text[:, 1:].clone()
        else:
            self._x = torch.randn(held, *task.row, generator=generator)
            self._y = torch.randint(task.classes, (held,), generator=generator)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = index % len(self._x)
        return self._x[row], self._y[row]


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss, over rows and, where there are some, over their tokens."""
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
