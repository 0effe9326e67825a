"""The gradient engine: per-sample clipping, sums and noise for one model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.gradients.clipped_sums import add_clipped_sums
from lightning_secure.privacy.gradients.clipping.layers import layer_groups
from lightning_secure.privacy.gradients.clipping.rules import (
    ClippingRule,
    FlatClipping,
    PerLayerClipping,
)
from lightning_secure.privacy.gradients.counted_targets import CountedMeans
from lightning_secure.privacy.gradients.products import widened
from lightning_secure.privacy.gradients.recorder import Recorder
from lightning_secure.privacy.gradients.rules.find_units import find_units
from lightning_secure.privacy.gradients.rules.layer_rule import Record
from lightning_secure.privacy.noise.banded.noise import BandedNoise
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.util.validate import positive

_FLAT: Final = FlatClipping()


class GradientEngine:
    """Per-sample clipping and noise for one model.

    :meth:`attach` puts hooks on the model. A step then is :meth:`begin_step`; for each chunk of
    rows :meth:`recording` around a forward and a backward pass, which begins with what
    :meth:`scaled` makes of the mean loss, and :meth:`add_chunk`; and :meth:`release`, once.

    Args:
        model: Its trainable parameters are those that require grad now.
        max_grad_norm: Clipping bound.
        loss_scale: Power of two by which :meth:`scaled` multiplies, for gradients in float16.
        clipping: Whether it is for all layers together or shared out among them.
        homes: From parameters that layers compute with to those that the optimizer has in their
            place, and that get the gradients; the others get their own.

    Attributes:
        units: The trainable layers.
        parameters: Parameters that they compute with, each once.
        homes: For each of them, the one that gets its gradient.
        means: Exchanges means of counted targets, which would mix rows, while it records.

    Raises:
        UnsupportedModelError: if nothing is trainable, ``clipping`` does not fit the layers, or for
            the reasons of :func:`find_units`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        loss_scale: float = 1.0,
        clipping: ClippingRule = _FLAT,
        homes: Mapping[nn.Parameter, nn.Parameter] | None = None,
    ) -> None:
        self.units = find_units(model)
        self.parameters = list(dict.fromkeys(p for unit in self.units for p in unit.parameters))
        if not self.parameters:
            raise UnsupportedModelError("the model has no trainable parameter. No step was taken.")
        self.homes = {p: (homes or {}).get(p, p) for p in self.parameters}
        self._covered = frozenset(map(id, [*self.homes, *self.homes.values()]))
        norms = nn.modules.batchnorm._BatchNorm
        self._statistics = [(n, m) for n, m in model.named_modules() if isinstance(m, norms)]
        self.require_covered(model.named_parameters())
        self._max_grad_norm = max_grad_norm
        self._loss_scale = loss_scale
        self._factor = 1.0
        self._layers = None
        if isinstance(clipping, PerLayerClipping):
            self._layers = layer_groups(self.units, clipping.parts)
        self._recorder = Recorder(self.units)
        self.means = CountedMeans()
        self._sums: dict[nn.Parameter, Tensor] = {}

    @property
    def called(self) -> tuple[object, ...]:
        """The layers that the last pass went through, in the order of their first calls."""
        return self._recorder.called

    def require_covered(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Make sure that no parameter can be trained past the clipping and the noise.

        Args:
            parameters: By name; for example those of an optimizer.

        Raises:
            UnsupportedModelError: if a trainable parameter is accounted for by none of the engine's
                layers: it was added or unfrozen later, or belongs to no layer of the model.
        """
        for name, parameter in parameters:
            if parameter.requires_grad and id(parameter) not in self._covered:
                raise UnsupportedModelError(
                    f"parameter {name!r} is trainable, and no layer that is clipped and noised "
                    "accounts for it. It was added or unfrozen after the run began, is not part of "
                    "the model, or is unknown to its layer's rule (as after weight_norm). Its "
                    "gradient was not released."
                )

    def attach(self) -> None:
        """Put the hooks on the model."""
        # A loss that was compiled before goes past what is exchanged in it.
        torch.compiler.reset()
        self._recorder.attach()

    def detach(self) -> None:
        """Take the hooks off the model and forget everything un-noised."""
        self._recorder.detach()
        self._sums = {}
        for unit in self.units:
            if hasattr(unit.module, "ft_compute_sample_grad"):
                del unit.module.ft_compute_sample_grad

    @contextlib.contextmanager
    def recording(self, *, rows: int | None = None, whole: bool = False) -> Iterator[None]:
        """Record a forward and a backward pass.

        Args:
            rows: Rows of the batch; see :meth:`Recorder.recording`.
            whole: Whether the records keep inputs and gradients whatever the norms need.
        """
        self._factor = 1.0
        with self._recorder.recording(rows=rows, whole=whole), self.means.applied(rows):
            yield

    def scaled(self, loss: Tensor, rows: int) -> Tensor:
        """Return what goes backward in place of a mean loss; records are scaled back.

        It is the sum of the rows' losses, times the fixed scale. Backward from a mean, each row's
        gradient is divided by the number of rows, and rounded in the precision of the layer: one
        more row would change the rounding of all others together, and in float16 decide which of
        them overflow. So the others' number stays out of it.

        Args:
            loss: The mean over ``rows`` rows, a scalar.
            rows: How many.

        Raises:
            UnsupportedModelError: if the loss is a float16 or a bfloat16.
        """
        if loss.dtype in (torch.float16, torch.bfloat16):
            raise UnsupportedModelError(
                f"the loss is a {str(loss.dtype)[6:]}. float16 ends at 65504, bfloat16 counts to "
                "256: one more row would change all others' gradients together. Compute it in "
                "float32, or from model(x).float(). This step was not taken."
            )
        self._factor = rows * self._loss_scale
        return loss.to(widened(loss.dtype)) * self._factor

    def unscaled(self, gradient: Tensor) -> Tensor:
        """Return an ordinary gradient as it would be without :meth:`scaled`."""
        return gradient.to(widened(gradient.dtype)) / self._factor

    def take(self, batch: int) -> list[Record]:
        """Return and forget the records of the last block.

        Raises:
            UnsupportedModelError: if nothing was recorded, or a layer's first dimension is not the
                batch.
        """
        records = self._recorder.take(batch, factor=self._factor)
        if not records:
            raise UnsupportedModelError(
                "the loss does not depend on any trainable layer: nothing could be clipped. This "
                "step was not taken."
            )
        return records

    def begin_step(self, max_grad_norm: float | None = None) -> None:
        """Forget the sums of the last step; refuse statistics that are frozen no longer.

        Args:
            max_grad_norm: Bound of this step, to which its rows are clipped and its noise is
                scaled; by default that of the last one.
        """
        self._sums = {}
        if max_grad_norm is not None:
            positive(max_grad_norm=max_grad_norm)
            self._max_grad_norm = max_grad_norm
        for name, module in self._statistics:
            if module.training or module.track_running_stats is False:
                raise UnsupportedModelError(
                    f"layer {name!r} was frozen by eval() when the run began, and is not any more: "
                    "it would mix rows. Keep it in eval(). This step was not taken."
                )

    def add_chunk(self, batch: int) -> Tensor:
        """Clip the recorded chunk of ``batch`` rows and add it to the step's sums.

        Returns:
            The rows' gradient norms before clipping, shape ``(batch,)``. They are not private.
        """
        return add_clipped_sums(
            self._sums,
            self.take(batch),
            max_grad_norm=self._max_grad_norm,
            layers=self._layers,
        )

    def release(
        self,
        noise: GaussianNoise | BandedNoise,
        *,
        noise_multiplier: float,
        expected_batch_size: int,
        combine: Callable[[dict[nn.Parameter, Tensor], bool], None] | None = None,
    ) -> None:
        """Put the noised mean gradient into ``.grad`` of every trainable parameter.

        Args:
            noise: Source of the noise.
            noise_multiplier: Its standard deviation over the clipping norm.
            expected_batch_size: The public divisor.
            combine: Makes sums over several processes of those of each, in the dict; it is told
                whether noise was added to them here.

        The sums are gone afterwards, also if this fails.
        """
        sums, self._sums = self._sums, {}
        std = noise_multiplier * self._max_grad_norm
        for parameter in self.parameters:
            if parameter not in sums:  # no row was drawn, or none came this way
                sums[parameter] = torch.zeros_like(parameter, dtype=widened(parameter.dtype))
            noise.add_(sums[parameter], std=std)
        if combine is not None:
            combine(sums, std > 0)
        torch._foreach_div_([sums[parameter] for parameter in self.parameters], expected_batch_size)
        for parameter in self.parameters:
            total, home = sums.pop(parameter), self.homes[parameter]
            if home.requires_grad:  # and was not frozen by the user since
                home.grad = total.to(home.dtype)
