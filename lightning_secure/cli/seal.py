"""``lightning-secure seal``: from a table or a folder of pictures to encrypted shards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lightning_secure.cli.local import pins
from lightning_secure.cli.providers import provider_of
from lightning_secure.configuration import known, parsed, typed
from lightning_secure.errors import ConfigError, LightningSecureError
from lightning_secure.redaction.anonymize import (
    AnonymizationPlan,
    Generalize,
    Keep,
    Operator,
    Pseudonymize,
    Suppress,
)

__all__ = ["read_config", "seal"]

#: Keys of the file that are handed on as they are, with their type.
_PLAIN: Final[Mapping[str, type]] = {
    "segment_bytes": int,
    "shard_bytes": int,
    "threads": int,
    "allow_nonfinite": bool,
    "replace": bool,
    "columns": list,
    "types": dict,
    "decode": bool,
    "spool": str,
}


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination")
@click.option(
    "--config",
    "config_path",
    required=True,
    type=click.Path(path_type=Path),
    help="YAML file that says which split, under which key, and what happens to which column.",
)
@click.option(
    "--restart",
    is_flag=True,
    help="Start anew. Without it, a sealing that was interrupted goes on where it got to.",
)
@pins
def seal(source: Path, destination: str, config_path: Path, restart: bool, **pinned: Any) -> None:
    """Seal SOURCE (.csv, .parquet, or a folder) into the dataset DESTINATION, a folder or a URL.

    Exit status: 0 sealed; 2 the arguments or the configuration are wrong; 1 anything else was
    refused or failed; 130 interrupted. Unless it is 0, no split of this call that was not there
    before is in the dataset.
    """
    from lightning_secure.data.seal import seal as run

    console = Console(stderr=True)
    try:
        options = read_config(config_path)
        with Progress(
            SpinnerColumn(),
            TextColumn("sealing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TimeRemainingColumn(),
            console=console,
        ) as bar:
            task = bar.add_task("seal", total=None)
            result = run(
                source,
                destination,
                resume=not restart,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                **pinned,
                **options,
            )
    except ConfigError as error:
        _fail(console, error, 2)
    except (LightningSecureError, OSError) as error:
        _fail(console, error, 1)
    except KeyboardInterrupt:
        if "://" in destination and "spool" not in options:
            console.print("interrupted; nothing was kept. With spool: FOLDER, it would have been")
        else:
            console.print("interrupted; the same command goes on where this one got to")
        sys.exit(130)
    for name, rows in result.rows.items():
        before = result.resumed[name]
        note = f" ({before} of them before this call)" if before else ""
        click.echo(f"{name}: {rows} rows sealed{note}")
    click.echo(f"generation {result.generation}, manifest {result.manifest_digest}")


def _fail(console: Console, error: Exception, status: int) -> None:
    # An OSError's own text has a path in it and nothing of a row.
    console.print(f"error: {error}", style="red", markup=False, highlight=False)
    sys.exit(status)


def read_config(path: Path) -> dict[str, Any]:
    """Return the arguments of :func:`lightning_secure.data.seal.seal` that a file asks for.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or has a key that is not known.
        MissingExtraError: The provider that it names needs a package that is not installed.
        KeyAccessError: The key that it names cannot be used.
    """
    config = parsed(path)
    known(config, {*_PLAIN, "split", "keys", "stack", "nulls", "anonymize", "size"}, "the file")
    if "keys" not in config:
        raise ConfigError("the configuration names no keys: to whom would the rows be sealed?")
    options: dict[str, Any] = {
        name: typed(config[name], kind, name) for name, kind in _PLAIN.items() if name in config
    }
    readers: dict[str, Callable[[Any], Any]] = {
        "split": _split,
        "stack": _stack,
        "nulls": _nulls,
        "anonymize": _plan,
        "size": lambda value: tuple(typed(value, list, "size")),
        "keys": lambda value: provider_of(value, path),
    }
    options |= {name: read(config[name]) for name, read in readers.items() if name in config}
    return options


def _split(value: Any) -> Any:
    from lightning_secure.data.splits import SplitByColumn, SplitByRatio

    if isinstance(value, str):
        return value
    fields = known(value, {"ratio", "seed", "group", "column"}, "split")
    if fields.keys() == {"column"}:
        return SplitByColumn(column=typed(fields["column"], str, "split: column"))
    if "column" in fields or not {"ratio", "seed"} <= fields.keys():
        raise ConfigError("split: takes a name, or column, or ratio and seed (and group).")
    return SplitByRatio(
        ratios=typed(fields["ratio"], dict, "split: ratio"),
        seed=typed(fields["seed"], int, "split: seed"),
        group=fields.get("group"),
    )


def _stack(value: Any) -> Any:
    from lightning_secure.data.sources.arrow import Stack

    result = {}
    for name, entry in typed(value, dict, "stack").items():
        fields = known(entry, {"columns", "dtype"}, f"stack: {name}")
        columns = tuple(typed(fields.get("columns"), list, f"stack: {name}: columns"))
        result[name] = Stack(columns=columns, dtype=fields.get("dtype", "float32"))
    return result


def _nulls(value: Any) -> Any:
    from lightning_secure.data.sources.arrow import Fill

    result: dict[str, Any] = {}
    for name, rule in typed(value, dict, "nulls").items():
        if rule == "drop":
            result[name] = rule
        elif isinstance(rule, dict) and rule.keys() == {"fill"}:
            result[name] = Fill(rule["fill"])
        else:
            raise ConfigError(f"nulls: {name}: is neither drop nor fill: VALUE.")
    return result


def _plan(value: Any) -> AnonymizationPlan:
    return AnonymizationPlan(
        {name: _operator(name, rule) for name, rule in typed(value, dict, "anonymize").items()}
    )


def _operator(name: str, rule: Any) -> Operator:
    if rule == "keep":
        return Keep()
    if rule == "suppress":
        return Suppress()
    fields = known(rule, {"pseudonymize", "generalize"}, f"anonymize: {name}")
    if fields.keys() == {"pseudonymize"}:
        return Pseudonymize(domain=typed(fields["pseudonymize"], str, f"{name}: pseudonymize"))
    if fields.keys() == {"generalize"}:
        what = f"anonymize: {name}: generalize"
        return Generalize(**known(fields["generalize"], {"date", "prefix", "width"}, what))
    raise ConfigError(f"anonymize: {name}: takes one of keep, suppress, pseudonymize, generalize.")
