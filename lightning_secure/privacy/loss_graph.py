"""What lies between the means over the rows and the loss, read off the autograd graph.

A loss ``f(mean of the rows' losses)`` gives each row the gradient of its own loss times ``f'`` of
what all rows came to. Only a linear ``f`` has a constant there. Trial runs see another ``f`` only
where trial rows reach the part of it that bends; its graph shows it in every step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from lightning_secure.errors import UnsupportedModelError

__all__ = ["ISOLATE", "LossGraph", "loss_graph", "require_linear"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: The way on, in every refusal of rows that meet.
ISOLATE: Final = "Or set DPConfig(isolate_rows=True), which is slower: each row runs by itself."

#: Linear in all their inputs together.
_LINEAR: Final = _names(
    "Add Sub Rsub Neg Sum Mean Nansum Clone Alias View UnsafeView ReshapeAlias Squeeze Unsqueeze "
    "Expand Permute T Transpose MT Mt Numpy_T Select Slice Unbind Split SplitWithSizes Index "
    "IndexSelect Gather Take TakeAlongDim MaskedSelect Narrow Diagonal Trace Stack Cat Repeat "
    "RepeatInterleave Flip Roll Cumsum ToCopy CopyBackwards Copy CopySlices AsStrided Detach "
    "ConstantPadNd Tril Triu Unfold SqueezeMultiple Real Contiguous Fill Zero Positive"
)
#: Linear in one input while the others at the places given are constants.
_PRODUCTS: Final = {
    "Mul": (0, 1),
    "Dot": (0, 1),
    "Vdot": (0, 1),
    "Mv": (0, 1),
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "LinalgVecdot": (0, 1),
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Addbmm": (1, 2),
    "Baddbmm": (1, 2),
    "Addr": (1, 2),
    "Addcmul": (1, 2),
}
#: Linear while the input at the place given is a constant.
_OVER: Final = {"Div": 1, "Addcdiv": 2, "Lerp": 2}
#: Make one number or several of all rows, and not by adding them up.
_BENT: Final = _names(
    "Logsumexp Norm LinalgVectorNorm LinalgMatrixNorm Prod Max Min Amax Amin Aminmax Median "
    "Nanmedian Mode Kthvalue Var Std VarMean StdMean Cumprod Cummax Cummin Logcumsumexp Topk Dist "
    "Renorm"
)
#: Take some entries or another shape, and add nothing up.
_TAKING: Final = _names(
    "View UnsafeView ReshapeAlias Squeeze Unsqueeze Expand Permute T Transpose Mt Numpy_T Select "
    "Slice Unbind Split SplitWithSizes Index IndexSelect Gather Take TakeAlongDim MaskedSelect "
    "Narrow Diagonal Clone Alias ToCopy AsStrided Unfold Sort PackPaddedSequence Cat Stack Roll "
    "Flip Repeat RepeatInterleave CopySlices Embedding"
)
_ONE_ROW: Final = frozenset({"Select", "Unbind", "Slice", "Split", "SplitWithSizes"})
_NEAR: Final = 6
_NUMBER: Final = re.compile(r"Backward\d*$")
_SAID: Final = {
    "Mul": "a product of two of them",
    "Div": "a division by one of them",
    "Maximum": "maximum",
    "Minimum": "minimum",
    "ClampMin": "clamp",
    "ClampMax": "clamp",
    "Logsumexp": "logsumexp",
    "LinalgVectorNorm": "norm",
}

Node = Any  # torch.autograd.graph.Node, which shows less than there is


@dataclass
class LossGraph:
    """The part of a graph between the rows and the loss.

    Attributes:
        fault: What is not linear in it; None if nothing is.
        structure: Names of the operations that were met, each once, and of those next to them.
        sums: Where rows were added up: node, and which of its outputs.
        slopes: Once the loss went backward, its slope at each of them.
    """

    fault: str | None = None
    structure: tuple[str, ...] = ()
    sums: list[tuple[Node, int]] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)

    def watch(self) -> None:
        """Keep the slopes when the loss goes backward."""
        for node, place in self.sums:
            node.register_prehook(self._kept(place))

    def _kept(self, place: int) -> Any:
        def keep(grads: Sequence[Tensor | None]) -> None:
            slope = grads[place]
            if slope is not None:
                self.slopes.append(slope.detach() if slope.numel() == 1 else slope.detach().sum())

        return keep

    def taken(self) -> tuple[float, ...]:
        """Return the slopes and forget the graph."""
        if len(self.slopes) > 1:  # together, since each could be waited for
            slopes = torch.stack([s.reshape(()).double() for s in self.slopes]).tolist()
        else:
            slopes = [float(slope) for slope in self.slopes]
        self.sums, self.slopes = [], []
        return tuple(slopes)


def require_linear(fault: str | None, *, outcome: str) -> None:
    """Make sure that the loss is linear in the rows' means.

    Args:
        fault: What is not linear in its graph.
        outcome: What became of the step.

    Raises:
        UnsupportedModelError: There is such a thing.
    """
    if fault is not None:
        raise UnsupportedModelError(
            f"rows are mixed in the loss: {fault} comes after the mean over the rows, so "
            "each row's gradient is scaled by what all rows came to, and clipping bounds nothing. "
            f"Use it on each row's own loss and return the mean of that. {ISOLATE} {outcome}"
        )


def loss_graph(loss: Tensor, rows: int) -> LossGraph:
    """Look at a loss's graph, from the loss down to where rows are added up.

    Args:
        loss: A scalar, before it goes backward.
        rows: Rows of the batch, more than one.

    A tensor is taken to have rows if its first dimension is a multiple of their number. So rows
    that lie in another dimension are not seen, nor what depends on them without a gradient, nor
    the inside of a function that has its own backward or was compiled.
    """
    found = LossGraph()
    names: dict[str, None] = {}
    # Nodes are held: another one could come to have the id of one that is gone.
    seen: dict[tuple[int, int, bool], Node] = {}
    places = [(loss.grad_fn, loss.output_nr, "")]
    of_rows: list[Node] = []
    while places:
        node, output, bent = places.pop()
        if node is None or (id(node), output, bool(bent)) in seen:
            continue
        seen[id(node), output, bool(bent)] = node
        name = _name(node)
        names[name] = None
        inputs = [
            (item, place, _has_rows(item, place, rows))
            for item, place in node.next_functions
            if item is not None
        ]
        if name not in _TAKING and any(has_rows for _, _, has_rows in inputs):
            found.sums.append((node, output))
            fault = bent or (_said(name) if name in _BENT else "")
            if fault and found.fault is None and not _of_one_row(node, rows):
                found.fault = fault
        inner = bent or _bent_by(node, name)
        for item, place, has_rows in inputs:
            if has_rows:
                of_rows.append(item)
            else:
                places.append((item, place, inner))
    found.structure = (*names, "", *_nearest(of_rows))
    return found


def _nearest(nodes: list[Node]) -> list[str]:
    """Return names of the operations next to some, to tell whether they are others one day."""
    for node in nodes:  # which grows meanwhile
        if len(nodes) >= _NEAR:
            break
        nodes += [item for item, _ in node.next_functions if item is not None]
    return list(dict.fromkeys(_name(node) for node in nodes[:_NEAR]))


def _name(node: Node) -> str:
    return _NUMBER.sub("", str(node.name()))


def _said(name: str) -> str:
    return _SAID.get(name, name.lower())


def _shape(node: Node, place: int) -> tuple[int, ...]:
    described = node._input_metadata
    return tuple(described[place].shape) if place < len(described) else ()


def _has_rows(node: Node, place: int, rows: int) -> bool:
    shape = _shape(node, place)
    return len(shape) > 0 and shape[0] >= rows and shape[0] % rows == 0


def _bent_by(node: Node, name: str) -> str:
    """Return what to call an operation that is not linear in its inputs, or nothing."""
    if name in _LINEAR or _opaque(node):
        return ""
    edges = [item is not None for item, _ in node.next_functions]
    if name in _PRODUCTS:
        both = all(place < len(edges) and edges[place] for place in _PRODUCTS[name])
        return _said("Mul") if both else ""
    if name in _OVER:
        place = _OVER[name]
        return _said("Div") if place < len(edges) and edges[place] else ""
    if name == "Pow" and getattr(node, "_saved_exponent", None) == 1:
        return ""
    return _said(name)


def _opaque(node: Node) -> bool:
    """Return whether a node's own code cannot be seen: of Python, compiled, or of an extension."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) or "::" in node.name()


def _of_one_row(node: Node, rows: int) -> bool:
    """Return whether what is added up is the inside of one row, as in a loop over the rows.

    Its length may be a multiple of their number by chance.
    """
    places = [node]
    seen: dict[int, Node] = {}
    while places:
        node = places.pop()
        for item, place in node.next_functions:
            if item is None or id(item) in seen:
                continue
            seen[id(item)] = item
            if _name(item) in _ONE_ROW and _takes_one(item, place, rows):
                return True
            places.append(item)
    return False


def _takes_one(node: Node, place: int, rows: int) -> bool:
    whole = next((_shape(item, p) for item, p in node.next_functions if item is not None), ())
    return tuple(whole[:1]) == (rows,) and _shape(node, place) in (whole[1:], (1, *whole[1:]))
