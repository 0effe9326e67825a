"""``lightning-secure anonymize``: what a source holds of people, before anything is sealed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from lightning_secure.anonymize import AnonymizationPlan, AnonymizationReport
from lightning_secure.anonymize.check import CheckedColumn, PlanCheck
from lightning_secure.cli.seal import SOURCE_KEYS, read_options, summary
from lightning_secure.errors import ConfigError, LightningSecureError
from lightning_secure.util.yaml_config import parsed


@click.command()
@click.option(
    "--check", is_flag=True, required=True, help="Look and report; nothing is written or sealed."
)
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="The configuration of seal. Its keys are not opened.",
)
@click.option(
    "--quasi-identifier",
    "quasi",
    multiple=True,
    metavar="COLUMN",
    help="Tells people apart together with the others; instead of those of --config.",
)
@click.option(
    "--sensitive",
    multiple=True,
    metavar="COLUMN",
    help="Its values must not be learnt about a person; instead of those of --config.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def anonymize(
    check: bool,
    source: Path,
    config_path: Path | None,
    quasi: tuple[str, ...],
    sensitive: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look at SOURCE for personal data and secrets that no plan names.

    Exit status: 0 none; 3 a column that the plan does not name holds some, or is called as if it
    did; 2 the arguments or the configuration are wrong; 1 the source cannot be read or sealed so.
    """
    try:
        options = read_options(parsed(config_path)) if config_path is not None else {}
        plan = options.pop("anonymize", AnonymizationPlan())
        if quasi or sensitive:
            plan = AnonymizationPlan(
                plan.columns,
                quasi_identifiers=quasi or plan.quasi_identifiers,
                sensitive=sensitive or plan.sensitive,
            )
        result = _checked(source, plan, {n: v for n, v in options.items() if n in SOURCE_KEYS})
    except ConfigError as error:
        _fail(error, 2)
    except (LightningSecureError, OSError) as error:
        _fail(error, 1)
    columns, report = result.columns, result.report
    if as_json:
        click.echo(json.dumps(_json(columns, report), indent=1))
    else:
        for name, column in columns.items():
            for line in _lines(name, column):
                click.echo(line)
        for line in summary(report):
            click.echo(line)
    forgotten = [name for name, column in columns.items() if column.forgotten]
    if forgotten and not as_json:
        click.echo(f"not in the plan: {', '.join(forgotten)}")
    sys.exit(3 if forgotten else 0)


def _checked(source: Path, plan: AnonymizationPlan, options: Mapping[str, Any]) -> PlanCheck:
    from lightning_secure.data.format.convert import count_rows
    from lightning_secure.data.sources import open_source

    result = PlanCheck(plan)
    for columns in open_source(source, **options).shown(plan).batches():
        result.look(columns, rows=count_rows(columns))
    return result


def _lines(name: str, column: CheckedColumn) -> list[str]:
    found = ", ".join(f"{rule} in {count}" for rule, count in column.found.items())
    what = [f"{found} of {column.inspected} values"] if found else []
    what += [f"is called like a {column.identifying}"] if column.identifying else []
    if not column.planned and column.text:
        what.append("text or dates without an operator: seal refuses them under a plan")
    if not what:
        return []
    return [f"{name} ({column.planned or 'not in the plan'}): {'; '.join(what)}"]


def _json(columns: Mapping[str, CheckedColumn], report: AnonymizationReport) -> dict[str, Any]:
    said = report.to_json()
    return {
        "rows": said["rows"],
        "columns": [
            {
                "name": name,
                "planned": column.planned or None,
                "text": column.text,
                "inspected": column.inspected,
                "found": dict(column.found),
                "identifying": column.identifying or None,
                "forgotten": column.forgotten,
            }
            for name, column in columns.items()
        ],
        **{name: said[name] for name in ("quasi_identifiers", "k_anonymity", "l_diversity")},
    }


def _fail(error: Exception, status: int) -> NoReturn:
    # An OSError's own text has a path in it and nothing of a row.
    click.echo(f"error: {error}", err=True)
    sys.exit(status)
