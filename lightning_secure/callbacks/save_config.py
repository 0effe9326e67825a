"""``LightningCLI(save_config_callback=RedactingSaveConfigCallback)``: ``config.yaml``, redacted."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lightning_secure.errors import ConfigError
from lightning_secure.redaction.mlflow_store.values import Policy
from lightning_secure.redaction.redactor import Redactor


class RedactingSaveConfigCallback(SaveConfigCallback):
    """Writes the configuration of a run after secrets and personal data were taken out.

    Args:
        parser: As for Lightning's SaveConfigCallback, which makes it.
        config: As for Lightning's SaveConfigCallback.
        config_filename: Name of the file in the Trainer's ``log_dir``.
        overwrite: Whether a file that is there is replaced.
        redactor: Decides what is taken out.

    A value taken out stands as ``REDACTED`` in the file: give it again when a run is repeated from
    it, for example on the command line. A class derived from this one, with a ``save_config`` that
    sends ``self.parser.dump(self.config)`` elsewhere, sends it redacted.

    Raises:
        ConfigError: if ``multifile`` is asked for. Files that others include are not redacted.
        RuntimeError: if the file exists and is not to be overwritten.

    >>> parser = LightningArgumentParser()
    >>> _ = parser.add_argument("--db_password")
    >>> config = parser.parse_args(["--db_password=hunter2"])
    >>> callback = RedactingSaveConfigCallback(parser, config)
    >>> print(callback.parser.dump(config).strip())
    db_password: REDACTED
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Any,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
        *,
        redactor: Redactor | None = None,
    ) -> None:
        _require_one_file(multifile)
        super().__init__(
            parser,
            config,
            config_filename=config_filename,
            overwrite=overwrite,
            save_to_log_dir=save_to_log_dir,
        )
        self.parser: Any = _RedactingParser(parser, redactor or Redactor())


class _RedactingParser:
    """A parser that writes a configuration with the redactor's findings taken out."""

    def __init__(self, parser: LightningArgumentParser, redactor: Redactor) -> None:
        self._parser = parser
        self._policy = Policy(redactor)

    def dump(self, config: Any, **options: Any) -> str:
        return self._policy.file("config.yaml", self._parser.dump(config, **options))

    def save(
        self,
        config: Any,
        path: str,
        *,
        overwrite: bool = False,
        multifile: bool = False,
        **options: Any,
    ) -> None:
        _require_one_file(multifile)
        filesystem = get_filesystem(path)
        if filesystem.exists(path) and not overwrite:
            raise ConfigError(f"{path!r} exists and is not to be overwritten. Nothing was written.")
        text = self.dump(config, **options)
        with filesystem.open(path, "w") as file:
            file.write(text)


def _require_one_file(multifile: bool) -> None:
    if multifile:
        raise ConfigError(
            "RedactingSaveConfigCallback writes the configuration to one file, and was asked for "
            "multifile=True. Nothing was written."
        )
