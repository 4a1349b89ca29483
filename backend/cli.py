"""The command line: ``attnscope serve|import|export|doctor|migrate|evaluate``."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..db import migrate
from ..db.session import Store
from ..version import __version__
from . import doctor, exporting, importing, serve
from .config import Config, ConfigError, load


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 when something failed, 2 when it was called wrongly.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ConfigError as error:
        print(f"attnscope: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnscope", description="Watch and steer approximate attention in ComfyUI."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serving = commands.add_parser("serve", help="run the server")
    _database_options(serving)
    serving.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serving.add_argument(
        "--port", type=int, help="port to listen on (default 8420; 0: a free one)"
    )
    serving.add_argument("--frontend-dir", type=Path, help="folder of the built page")
    serving.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    serving.set_defaults(run=_serve)

    export = commands.add_parser("export", help="write runs to a file of JSON lines")
    _database_options(export)
    export.add_argument("file", type=Path, help="file to write; .gz packs it; - is stdout")
    export.add_argument("runs", nargs="*", help="ids of runs; all where left out")
    export.add_argument("--no-images", action="store_true", help="leave images out")
    export.set_defaults(run=_export)

    imports = commands.add_parser(
        "import", help="take runs from such a file, or from hybrid-attention-results.jsonl"
    )
    _database_options(imports)
    imports.add_argument("file", type=Path, help="file to read; .gz is unpacked; - is stdin")
    imports.set_defaults(run=_import)

    migrating = commands.add_parser("migrate", help="bring the database to this version's schema")
    _database_options(migrating)
    migrating.add_argument("--check", action="store_true", help="only say whether it is needed")
    migrating.set_defaults(run=_migrate)

    examining = commands.add_parser("doctor", help="say what is wrong with an installation")
    _database_options(examining)
    examining.add_argument("--json", action="store_true", help="print JSON")
    examining.set_defaults(run=_doctor)

    evaluating = commands.add_parser(
        "evaluate",
        help="measure variants on captured or synthetic query, key and value (needs torch)",
        epilog="example: attnscope evaluate --synthetic content:std=2 --variants taylor:P=3 "
        "--variants taylor:P=5,feature_projection=32",
    )
    evaluating.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="captured calls, or folders of them"
    )
    evaluating.add_argument(
        "--variants",
        action="append",
        default=[],
        metavar="SPEC",
        help="variant:setting=value,… or a JSON file; again for more; a default list otherwise",
    )
    evaluating.add_argument(
        "--synthetic",
        action="append",
        default=[],
        metavar="SPEC",
        help="kind:std=1,rows=64,columns=64,text_tokens=256,heads=1,seed=0, kind one of content, "
        "positional, iso, all; again for more",
    )
    evaluating.add_argument("--csv", type=Path, metavar="FILE", help="write a table")
    evaluating.add_argument("--json", type=Path, metavar="FILE", help="write JSON")
    evaluating.add_argument("--html", type=Path, metavar="FILE", help="write a report with charts")
    evaluating.add_argument(
        "--queries",
        type=_count,
        default=512,
        help="queries a head at which errors are measured (default 512; 0: all)",
    )
    evaluating.add_argument("--seed", type=_count, default=0, help="of the choice of queries")
    evaluating.add_argument(
        "--pairs",
        type=_count,
        default=3,
        help="times that each call and exact attention are timed, in turn (default 3; 0: none)",
    )
    evaluating.add_argument("--device", default="cpu", help="torch device (default cpu)")
    evaluating.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of synthetic tensors; captured ones keep theirs",
    )
    evaluating.set_defaults(run=_evaluate)
    return parser


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"is {text!r}; allowed: a whole number from 0")
    return value


def _database_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="TOML file (or ATTNSCOPE_CONFIG)")
    parser.add_argument("--data-dir", type=Path, help="folder of database and images")
    parser.add_argument("--database-url", help="SQLAlchemy URL of another database")


def _load(arguments: argparse.Namespace) -> Config:
    given: dict[str, Any] = {
        name: getattr(arguments, name, None)
        for name in ("host", "port", "data_dir", "database_url", "frontend_dir", "log_level")
    }
    return load(given, file=arguments.config)


def _logging(config: Config) -> None:
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _serve(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    _logging(config)
    return 0 if serve.run(config) else 1


def _export(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    try:
        count = exporting.export_file(
            config, arguments.file, arguments.runs, with_images=not arguments.no_images
        )
    except (exporting.ExportError, OSError) as error:
        return _fail("export", error)
    print(f"exported {count} runs", file=sys.stderr)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    try:
        report = importing.import_file(config, arguments.file)
    except (importing.ImportFailed, OSError) as error:
        return _fail("import", error)
    print(
        f"imported {report.runs} runs: {report.stored} events are new, {report.known} were known",
        file=sys.stderr,
    )
    return 0


def _migrate(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    config.data_dir.mkdir(parents=True, exist_ok=True)
    store = Store(config.url, config.busy_timeout)
    try:
        if arguments.check:
            fits = migrate.is_current(store)
            print("up to date" if fits else "needs migration")
            return 0 if fits else 1
        changed = migrate.upgrade(store)
        print(f"schema {migrate.head()}: {'migrated' if changed else 'was up to date'}")
        return 0
    except migrate.NewerDatabase as error:
        return _fail("migrate", error)
    finally:
        store.close()


def _doctor(arguments: argparse.Namespace) -> int:
    checks = doctor.examine(_load(arguments))
    print(doctor.as_json(checks) if arguments.json else doctor.as_text(checks))
    return 1 if any(check.state == "fail" for check in checks) else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    missing = [name for name in ("torch", "safetensors") if not importlib.util.find_spec(name)]
    if missing:
        return _fail(
            "evaluate",
            f"needs {' and '.join(missing)}, which the server does without: run it with the "
            "Python of your ComfyUI, or install it here.",
        )
    # Only this command needs torch, and takes the seconds that loading it needs.
    from . import evaluating  # noqa: PLC0415
    from .evaluation_page import PlotlyMissing  # noqa: PLC0415

    try:
        evaluating.run(arguments, sys.stdout)
    except (evaluating.EvaluationError, PlotlyMissing, OSError) as error:
        return _fail("evaluate", error)
    return 0


def _fail(command: str, error: Exception | str) -> int:
    print(f"attnscope {command}: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
