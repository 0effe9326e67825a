"""A table of vectors that is the weight of a linear layer as well, as in language models.

The gradient of a sample is the sum of both uses', and its squared norm those of the two and twice
their inner product. That product runs over the rows that the sample looked up, so no gradient as
large as the table is formed for a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_secure.privacy.gradients.formulas import gram, rounding
from lightning_secure.privacy.gradients.products import widened
from lightning_secure.privacy.gradients.rules.embedding import EmbeddingUnit
from lightning_secure.privacy.gradients.rules.layer_rule import Gradients, Record, accumulate
from lightning_secure.privacy.gradients.rules.linear import LinearUnit


class TiedPair(NamedTuple):
    """Two records of one weight.

    Attributes:
        table: Its use as a table.
        head: Its use as a linear layer, which may have a bias.
    """

    table: Record
    head: Record

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The shared weight, and maybe a bias."""
        return (*self.table.parameters, *self.head.parameters[1:])

    @property
    def rounds(self) -> bool:
        """Whether weighted gradients of the layer must be rounded."""
        return self.head.rounds

    def rows(self, keep: Tensor) -> TiedPair:
        """Return the records of those samples for which ``keep`` is true."""
        return TiedPair(self.table.rows(keep), self.head.rows(keep))

    def weighted(self, weights: Tensor) -> TiedPair:
        """Return records of weighted gradients, each rounded to the type that it has."""
        return TiedPair(self.table.weighted(weights), self.head.weighted(weights))

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return the sums over both uses."""
        sums: dict[nn.Parameter, Tensor] = {}
        for record in self:
            for parameter, total in record.weighted_sum(weights).items():
                accumulate(sums, parameter, total)
        return sums

    def squares(self) -> Tensor:
        """Return the squared norm of each sample's gradient, shape ``(batch,)``.

        With tokens ``v_t``, the gradients ``e_t`` of their vectors, and inputs ``x_s`` and output
        gradients ``g_s`` of the layer, the inner product is ``sum_ts g_s[v_t] <e_t, x_s>``. It
        may be negative, and the whole a small difference, so a bound of its rounding is added.
        """
        unit = self.table.unit
        assert isinstance(unit, EmbeddingUnit)  # noqa: S101 # so they were chosen
        tokens, vectors = unit.timed(*self.table.evidence())
        inputs, grads = LinearUnit.timed(*self.head.evidence())
        index = tokens.unsqueeze(1).expand(-1, grads.shape[1], -1)
        # (batch, times of the layer, times of the table)
        chosen = grads.gather(2, index).to(widened(grads.dtype))
        products = gram(inputs, vectors).mul_(chosen)
        cross = products.sum((1, 2), dtype=torch.float64)
        steps = torch.linalg.vector_norm(inputs, dim=2, dtype=chosen.dtype).unsqueeze(2)
        sizes = steps * torch.linalg.vector_norm(vectors, dim=2).unsqueeze(1)
        relative = rounding(inputs.shape[2], inputs.dtype)  # as for Gram matrices
        error = relative * chosen.abs_().mul_(sizes).sum((1, 2))
        scale = self.table.scale**2
        parts = self.table.squares().double() + self.head.squares() + 2 * scale * cross
        result: Tensor = parts.clamp(min=0).to(error.dtype) + 2 * scale * error
        return result


def tied_pairs(records: Sequence[Record]) -> tuple[list[TiedPair], list[Record]]:
    """Pick pairs of a table and a linear layer that share one weight, and nothing with others.

    Args:
        records: Records that share a parameter with another.

    Returns:
        The pairs, and what is left.
    """
    uses = Counter(id(p) for record in records for p in record.unit.parameters)
    heads = {
        id(record.unit.weight): record
        for record in records
        if type(record.unit) is LinearUnit and record.unit.weight is not None
    }
    pairs: list[TiedPair] = []
    for record in records:
        head = heads.get(id(record.unit.parameters[0]))
        there = head is not None and head.inputs is not None and record.inputs is not None
        if type(record.unit) is EmbeddingUnit and head is not None and there:
            shared = [uses[id(p)] for p in (*head.unit.parameters, *record.unit.parameters)]
            if sum(shared) == len(shared) + 2 and uses[id(record.unit.weight)] == 2:
                pairs.append(TiedPair(record, head))
    taken = {id(record) for pair in pairs for record in pair}
    return pairs, [record for record in records if id(record) not in taken]
