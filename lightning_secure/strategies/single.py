"""A strategy on one device that takes what the Trainer's options give it, or refuses."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_secure.errors import UnsupportedTrainerOptionError


class OneDeviceStrategy(SingleDeviceStrategy):
    """Lightning's strategy for one device, which it leaves on the CPU when it is passed by object.

    Raises:
        UnsupportedTrainerOptionError: if the Trainer has several devices, or several machines.
    """

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """None, so that each Trainer hands over the device that it has chosen.

        Without this property the Trainer would leave the strategy on the CPU.
        """
        return None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise UnsupportedTrainerOptionError(
                f"PrivateStrategy trains on one device and the Trainer has {len(devices)}. Use "
                "Trainer(devices=1)."
            )
        self._root_device = devices[0]

    @property
    def num_nodes(self) -> int:
        """The number of machines, which is one."""
        return 1

    @num_nodes.setter
    def num_nodes(self, nodes: int) -> None:
        # Without this property the Trainer would ignore its option.
        if nodes != 1:
            raise UnsupportedTrainerOptionError(
                f"PrivateStrategy trains on one machine and the Trainer has num_nodes={nodes}."
            )
