"""``lightning-secure seal``: from a table or a folder of pictures to encrypted shards."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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

from lightning_secure.anonymize import AnonymizationPlan, AnonymizationReport
from lightning_secure.anonymize.classes import ClassCount
from lightning_secure.anonymize.reading import PLAN_KEYS, plan_rules
from lightning_secure.anonymize.report import BeforeAndAfter
from lightning_secure.cli.dataset_options import pins
from lightning_secure.cli.providers import provider_of
from lightning_secure.errors import ConfigError, LightningSecureError
from lightning_secure.util.files import as_path, atomic_writer
from lightning_secure.util.yaml_config import known, parsed, typed

if TYPE_CHECKING:
    from lightning_secure.data.writing.seal import Sealed

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
#: Keys that say how a source is read.
SOURCE_KEYS: Final = ("columns", "types", "stack", "nulls", "decode", "size")


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
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path),
    help="File for what anonymize: found and did, as JSON by split that this call has sealed.",
)
@pins
def seal(
    source: Path,
    destination: str,
    config_path: Path,
    restart: bool,
    report_path: Path | None,
    **pinned: Any,
) -> None:
    """Seal SOURCE (.csv, .parquet, or a folder) into the dataset DESTINATION, a folder or a URL.

    Exit status: 0 sealed; 4 sealed, but --report could not be written; 2 the arguments or the
    configuration are wrong; 1 anything else was refused or failed; 130 interrupted. Unless it is 0
    or 4, no split of this call that was not there before is in the dataset.
    """
    from lightning_secure.data.writing.seal import seal as run

    console, options = Console(stderr=True), dict[str, Any]()
    try:
        options = read_config(config_path)
        with _bar(console) as progress:
            result = run(
                source, destination, resume=not restart, progress=progress, **pinned, **options
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
    _tell(result)
    if report_path is not None:
        try:
            _write(report_path, result.reports)
        except (ConfigError, OSError) as error:
            console.print("the rows are sealed, and the manifest has the report for readers")
            _fail(console, error, 4)


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function that moves a bar of the rows that are sealed."""
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
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tell(sealed: Sealed) -> None:
    for name, rows in sealed.rows.items():
        before = sealed.resumed[name]
        note = f" ({before} of them before this call)" if before else ""
        click.echo(f"{name}: {rows} rows sealed{note}")
        if report := sealed.reports.get(name):
            for line in (*summary(report), f"report {report.digest}"):
                click.echo(f"  {line}")
    click.echo(f"generation {sealed.generation}, manifest {sealed.manifest_digest}")


def _write(path: Path, reports: Mapping[str, AnonymizationReport]) -> None:
    value = {name: json.loads(report.text) for name, report in reports.items()}
    with atomic_writer(as_path(path, what="the report")) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def summary(report: AnonymizationReport) -> Iterator[str]:
    """Yield what a report says of k and l, a line each."""
    if report.k_anonymity is not None:
        yield f"k-anonymity {_change(report.k_anonymity)}"
    for name, figure in report.l_diversity.items():
        yield f"l-diversity of {name} {_change(figure)}"
    if report.unknown and report.quasi_identifiers:
        yield f"k-anonymity is not known: {report.unknown}"


def _change(figure: BeforeAndAfter) -> str:
    return f"{_figure(figure.before)} before, {_figure(figure.after)} after"


def _figure(count: ClassCount) -> str:
    if count.least is None:
        return "not sealed" if count.exact else "unknown"
    return f"{'' if count.exact else 'at most '}{count.least}"


def _fail(console: Console, error: Exception, status: int) -> None:
    # An OSError's own text has a path in it and nothing of a row.
    console.print(f"error: {error}", style="red", markup=False, highlight=False)
    sys.exit(status)


def read_config(path: Path) -> dict[str, Any]:
    """Return the arguments of :func:`lightning_secure.data.writing.seal.seal` that a file asks for.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, or has a key that is not known.
        MissingExtraError: if the provider that it names needs a package that is not installed.
        KeyAccessError: if the key that it names cannot be used.
    """
    config = parsed(path)
    options = read_options(config)
    if "keys" not in config:
        raise ConfigError(
            "the configuration has no part `keys`, which names the key provider. Nothing was "
            "sealed."
        )
    return {**options, "keys": provider_of(config["keys"], path)}


def read_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same without the keys, of which none is looked at.

    Raises:
        ConfigError: if there is a key that is not known, or a value makes no sense.
    """
    more = {"split", "keys", "stack", "nulls", "size", *PLAN_KEYS}
    known(dict(config), {*_PLAIN, *more}, "the file")
    options: dict[str, Any] = {
        name: typed(config[name], kind, name) for name, kind in _PLAIN.items() if name in config
    }
    readers: dict[str, Callable[[Any], Any]] = {
        "split": _split,
        "stack": _stack,
        "nulls": _nulls,
        "size": lambda value: tuple(typed(value, list, "size")),
    }
    options |= {name: read(config[name]) for name, read in readers.items() if name in config}
    plan = {name: config[name] for name in PLAN_KEYS if name in config}
    if plan:
        options["anonymize"] = AnonymizationPlan(*plan_rules(plan, what="the file"))
    return options


def _split(value: Any) -> Any:
    from lightning_secure.data.writing.split_rules import SplitByColumn, SplitByRatio

    if isinstance(value, str):
        return value
    fields = known(value, {"ratio", "seed", "group", "column"}, "split")
    if fields.keys() == {"column"}:
        return SplitByColumn(column=typed(fields["column"], str, "split: column"))
    if "column" in fields or not {"ratio", "seed"} <= fields.keys():
        raise ConfigError(
            "split: must be a name, or have `column`, or have `ratio` and `seed` (and `group`)."
        )
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
            raise ConfigError(f"nulls: {name}: the rule must be drop or fill: VALUE.")
    return result
