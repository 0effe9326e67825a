"""Private, confidential and accountable training for PyTorch Lightning.

``__init__.pyi`` lists the public names. Each is imported when it is used: ``import
lightning_secure`` brings in neither torch nor Lightning, MLflow or Opacus.
"""

import lazy_loader

from lightning_secure._version import __version__ as __version__

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*_names, "__version__"])


def __dir__() -> list[str]:
    return __all__
