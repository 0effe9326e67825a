"""The autograd graph between the means over the rows and the loss.

A loss ``f(mean of the rows' losses)`` gives each row the gradient of its own loss times ``f'`` of
what all rows came to. Only a linear ``f`` has a constant there. Trial runs see another ``f`` only
where trial rows reach the part of it that bends; its graph shows it in every step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from lightning_secure.errors import UnsupportedModelError


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
_INDEXING: Final = frozenset({"Index", "IndexSelect"})
_PICKING: Final = _INDEXING | {"Select", "Unbind", "Slice", "Split", "SplitWithSizes"}
_NEAR: Final = 6
_SEARCHED: Final = 1 << 16  # operations below those that lie next to the loss
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
        fault: The operation of its graph that is not linear.
        outcome: The outcome for the step, as the error says it.

    Raises:
        UnsupportedModelError: if there is such a thing.
    """
    if fault is not None:
        raise UnsupportedModelError(
            f"rows are mixed in the loss: {fault} comes after the mean over the rows, so "
            "each row's gradient is scaled by what all rows came to, and clipping bounds nothing. "
            f"Use it on each row's own loss and return the mean of that. {ISOLATE} {outcome}"
        )


def loss_graph(loss: Tensor, rows: int) -> LossGraph:
    """Look at a loss's graph, from the loss down to where rows are still apart.

    Args:
        loss: A scalar, before it goes backward.
        rows: Rows of the batch, more than one.

    A tensor is taken to have rows if its first dimension is a multiple of their number. Where such
    rows are moved to another dimension, picked or split, they are followed from there on. So rows
    that never lie in the first dimension are not seen, nor what depends on them without a gradient,
    nor the inside of a function that has its own backward or was compiled.
    """
    found = _Walk(rows).over(loss)
    # The inside of one row, as in a loop over the rows, may be as long by chance.
    return found if found.fault is None else _Walk(rows, picks=_Picks(rows)).over(loss)


@dataclass(frozen=True)
class _Apart:
    """Rows that are apart in a tensor: one of its dimensions is a multiple of their number.

    Attributes:
        count: Their number.
        lead: The first dimensions, where only their product is a multiple.
    """

    count: int
    lead: tuple[int, ...] = ()

    def still(self, shape: tuple[int, ...]) -> bool:
        """Return whether they are in a tensor of this shape, too."""
        if self.lead and shape[: len(self.lead)] == self.lead:
            return True
        return any(size and size % self.count == 0 for size in shape)


@dataclass(frozen=True)
class _One:
    """A tensor that depends on one row only, which goes by ``row``."""

    row: object


#: Rows that were added up, or brought together otherwise.
_MET: Final = "met"
_State = _Apart | _One | str | None


class _Walk:
    """Finds how rows arrive at a loss, from below.

    Args:
        rows: Their number.
        picks: Tells which row a tensor is about, even if it seems to have all of them.
    """

    def __init__(self, rows: int, picks: _Picks | None = None) -> None:
        self._rows, self._picks = rows, picks
        self._found = LossGraph()
        # Nodes are held: another one could come to have the id of one that is gone.
        self._held: list[Node] = []
        self._states: dict[tuple[int, int], _State] = {}
        self._leaves: list[Node] = []

    def over(self, loss: Tensor) -> LossGraph:
        """Return what lies between the rows and a loss."""
        names: dict[str, None] = {}
        places: list[tuple[Node, int, Any]] = [(loss.grad_fn, loss.output_nr, None)]
        while places:
            node, output, inputs = places.pop()
            if inputs is not None:
                self._states[id(node), output] = self._state(node, output, inputs)
            elif node is not None and (id(node), output) not in self._states:
                names[_name(node)] = None
                self._held.append(node)
                self._states[id(node), output] = None
                inputs = [edge for edge in node.next_functions if edge[0] is not None]
                places.append((node, output, inputs))
                places += [(*edge, None) for edge in inputs if not self._is_leaf(*edge)]
        self._found.structure = (*names, "", *_nearest(self._leaves))
        return self._found

    def _is_leaf(self, node: Node, place: int) -> bool:
        key = id(node), place
        if key not in self._states and _has_rows(node, place, self._rows):
            row = self._picks.row_of(node, place) if self._picks else None
            self._states[key] = _Apart(self._rows) if row is None else _One(row)
            self._held.append(node)
            self._leaves.append(node)
        return key in self._states

    def _state(self, node: Node, output: int, inputs: list[tuple[Node, int]]) -> _State:
        states = [(self._states[id(item), place], item, place) for item, place in inputs]
        name = _name(node)
        if any(state is _MET for state, _, _ in states):
            return self._met(_bent_by(node, name))
        apart = [(state, _shape(i, p)) for state, i, p in states if isinstance(state, _Apart)]
        single = {state for state, _, _ in states if isinstance(state, _One)}
        if not apart and len(single) < 2:
            return single.pop() if single else None
        shape = _shape(node, output)
        if apart and name in _PICKING:
            row = _picked(node, output, self._rows, apart[0][1])
            if row is not None:
                return _One(row)
        if apart and all(state.still(shape) for state, _ in apart):
            return apart[0][0]
        if apart and name in _TAKING:
            return _moved(node, output, apart[0][0])
        if name in _TAKING and shape[:1] > (1,):
            return _Apart(shape[0])
        self._found.sums.append((node, output))
        bent = _said(name) if name in _BENT else ""
        return self._met(bent if apart else bent or _bent_by(node, name))

    def _met(self, fault: str) -> str:
        self._found.fault = self._found.fault or fault or None
        return _MET


def _moved(node: Node, output: int, apart: _Apart) -> _State:
    """Return what rows become of which many are picked, or that lie otherwise."""
    shape = _shape(node, output)
    for end in range(2, len(shape) + 1):
        if math.prod(shape[:end]) % apart.count == 0:
            return _Apart(apart.count, shape[:end])
    return _Apart(shape[0]) if shape[:1] > (1,) else _One((id(node), output))


class _Picks:
    """Tells which single row a tensor was computed of.

    Args:
        rows: Their number.
    """

    def __init__(self, rows: int) -> None:
        self._rows, self._left = rows, _SEARCHED

    def row_of(self, node: Node, place: int) -> object | None:
        """Return the row that all that lies below was picked from, if it is one."""
        found: set[object] = set()
        seen: dict[tuple[int, int], Node] = {}
        places: list[tuple[Node, int, object]] = [(node, place, None)]
        while places:
            node, place, piece = places.pop()
            if (id(node), place) in seen:
                continue
            seen[id(node), place] = node
            self._left -= 1
            inputs = [edge for edge in node.next_functions if edge[0] is not None]
            row, whole = None, _shape(*inputs[0]) if inputs else ()
            if whole and _name(node) in _PICKING:
                row = _picked(node, place, self._rows, whole)
            if row is not None and whole[0] == self._rows:
                found.add(row)
            elif inputs:  # of a row, the inside may be taken in pieces as well
                places += [(*edge, piece if row is None else row) for edge in inputs]
            elif piece is not None:
                found.add(piece)
            else:
                return None
            if len(found) > 1 or self._left < 0:
                return None
        return found.pop()


def _picked(node: Node, output: int, rows: int, whole: tuple[int, ...]) -> object | None:
    """Return which row a node takes of a tensor, if it takes one only.

    Of what is longer than there are rows, or shorter, a piece is taken for a row's own.
    """
    name, size = _name(node), whole[0] if whole else 0
    if name in _INDEXING:
        return _indexed(node, rows, size) if _shape(node, output)[:1] == (1,) else None
    if size == 0 or _signed(node._saved_dim) % len(whole):
        return None
    start, stop = _ends(node, output, name, size)
    if size % rows == 0 and start * rows // size == (stop - 1) * rows // size:
        return start * rows // size
    return None if size == rows else ("piece", start, stop)


def _ends(node: Node, output: int, name: str, size: int) -> tuple[int, int]:
    """Return where what a node takes of the first dimension begins and ends."""
    if name == "Select":
        start = _signed(node._saved_index) % size
        return start, start + 1
    if name == "Unbind":
        return output, output + 1
    if name == "Slice":
        ends = (node._saved_start, node._saved_end)
        start, stop, _ = slice(*(e if e is None else _signed(e) for e in ends)).indices(size)
        return start, stop
    if name == "Split":
        start = output * node._saved_split_size
        return start, min(start + node._saved_split_size, size)
    start = sum(node._saved_split_sizes[:output])
    return start, start + node._saved_split_sizes[output]


def _indexed(node: Node, rows: int, size: int) -> object | None:
    """Return the row that an index of one entry, or a mask with one, takes."""
    index = node._saved_index if _name(node) == "IndexSelect" else node._saved_indices[0]
    if index is None or size % rows:
        return None
    if index.dtype in {torch.bool, torch.uint8}:
        index = index.nonzero()[:, 0]
    return int(index.flatten()[0]) % size * rows // size


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


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
