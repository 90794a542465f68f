"""The command line: options, text and exit codes; no logic."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn, TypedDict

import typer

from moescale import errors, interrupts
from moescale.options import (
    FACTOR,
    HUB,
    MODEL,
    OUTPUT,
    ConvertOptions,
    Option,
    PlanOptions,
    Rescaling,
    option_rows,
)
from moescale.report import colour
from moescale.version import __version__

if TYPE_CHECKING:
    from moescale import Plan

# Typer has its own copy of Click, and does not export the base class of its errors.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

EXIT_CODES: dict[type[errors.MoescaleError], int] = {
    errors.UsageError: 2,
    errors.SourceError: 3,
    errors.DestinationError: 3,
    errors.VerificationError: 4,
    errors.TemporaryError: 5,
    errors.InterruptedRun: interrupts.EXIT_CODE,
}
"""Exit codes by error; all others are 1."""

OTHER = "Other"
"""The last heading of ``--help``."""

HELP_COLUMN = 24
"""The column in which the help of an option starts."""

USAGE = "SRC DST -k M [OPTIONS]"

HELP = """Run a mixture-of-experts model with another number of active experts.

Examples:

\b
  moescale ./Mixtral-8x7B -k 3 --dry-run
  moescale ./Mixtral-8x7B ./Mixtral-8x7B-3 -k 3 --verify
  moescale Qwen/Qwen3-30B-A3B ./Qwen3-30B-A3B-16 -k 16
  moescale Qwen/Qwen3-30B-A3B hf://me/Qwen3-30B-A3B-16 -k 16 --private
  moescale ./merged ./merged-4 -k 4 -n 1
  moescale Qwen3-30B-A3B.Q4_K_M.gguf Qwen3-30B-A3B-16.Q4_K_M.gguf -k 16

SRC is a directory, a GGUF file or a repo on the Hugging Face Hub (org/name, org/name@revision,
org/name/folder, org/name:QUANT, or its address); it is never written to. DST is a directory, for
GGUF also a file, or hf://org/name; without hf:// nothing is uploaded. The same command continues
an interrupted run.
"""


class _Command(typer.core.TyperCommand):
    """A command that shows its options under headings, and those for completion last."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the required arguments and options."""
        formatter.write_usage(ctx.command_path, USAGE)

    def get_params(self, ctx: Any) -> list[Any]:
        """All parameters: with our conversion of values, and our help for those that Typer adds."""
        found: list[Any] = super().get_params(ctx)
        for parameter in found:
            if short := _COMPLETION.get(parameter.name):
                parameter.help = short
            parameter.get_runtime_param = partial(
                _Conversion, _PARSERS.get(parameter.name, _unchanged)
            )
        return sorted(found, key=lambda parameter: parameter.name in _COMPLETION)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of every option, in one column under all headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "option":
                panel = getattr(parameter, "rich_help_panel", None)
                record = parameter.get_help_record(ctx)
                sections.setdefault(panel or "Other", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([(f"{names:{HELP_COLUMN}}", text) for names, text in records])


_COMPLETION = {
    "install_completion": "Install completion for this shell.",
    "show_completion": "Print the completion script.",
}

app = typer.Typer(add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _unchanged(value: Any) -> Any:
    return value


class _Conversion(NamedTuple):
    """Converts the value of a parameter without pydantic.

    Typer 0.29 imports pydantic to convert the first value and builds an adapter for every
    parameter, which takes longer than to plan a model. Older versions do not use this.
    """

    parse: Callable[[Any], Any]

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value of the parameter; None if it is not given."""
        return None if value is None else self.parse(value)


def _values(option: str) -> Callable[[], list[str]]:
    """The completions of an option; the tables are only read when the shell asks."""

    def values() -> list[str]:
        from moescale import api

        return api.values(option)

    return values


def _version(wanted: bool) -> None:
    if wanted:
        print(f"moescale {__version__}")
        raise typer.Exit


class OutputOptions(TypedDict, total=False):
    """Options of the command that the API does not have."""

    dry_run: Annotated[
        bool,
        Option(
            "Print the plan; write nothing.",
            kind=bool,
            more="Also reports what a run would refuse. DST is optional. Several numbers of experts"
            " or several rules make a table.",
        ),
    ]
    list_types: Annotated[
        bool,
        Option(
            "List the known model types.",
            panel=OTHER,
            kind=bool,
            more="With --json as data.",
        ),
    ]
    json: Annotated[bool, Option("Print one JSON object on stdout.", panel=OUTPUT, kind=bool)]
    quiet: Annotated[
        bool,
        Option("Only print the destination.", panel=OUTPUT, flags=("-q", "--quiet"), kind=bool),
    ]
    verbose: Annotated[
        bool,
        Option(
            "List every tensor and every file.",
            panel=OUTPUT,
            flags=("-v", "--verbose"),
            kind=bool,
        ),
    ]


_ROWS = option_rows(Rescaling) | option_rows(OutputOptions) | option_rows(ConvertOptions)
"""The options of the command, by name."""


def _parameters() -> list[inspect.Parameter]:
    """The parameters of the command, from which Typer reads its options."""
    source, destination = typer.Argument(metavar="SRC"), typer.Argument(metavar="DST")
    version = typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    return [
        _parameter("source", Annotated[str | None, source], None),
        _parameter("destination", Annotated[str | None, destination], None),
        *(_option(name, row) for name, row in sorted(_ROWS.items(), key=_panel_rank)),
        _parameter("version", Annotated[bool, version], False),
    ]


_PANELS = ("Options", FACTOR, HUB, MODEL, OUTPUT, OTHER)
"""The headings of ``--help``, in order; under each, options are in table order."""


def _panel_rank(item: tuple[str, Option]) -> int:
    return _PANELS.index(item[1].panel)


def _option(name: str, row: Option) -> inspect.Parameter:
    option = typer.Option(
        *row.spellings(name),
        parser=_PARSERS[name] if row.kind in _NUMBERS else None,
        metavar=row.metavar or None,
        help=row.help,
        rich_help_panel=row.panel,
        autocompletion=_values(name) if row.completes else None,
    )
    if row.kind is bool and "/" not in "".join(row.flags):
        return _parameter(name, Annotated[bool, option], False)
    return _parameter(name, Annotated[row.kind | None, option], None)


_NUMBERS: dict[type, str] = {int: "a whole number, such as 3", float: "a number, such as 1.2"}


def _number_parser(name: str, row: Option) -> Callable[[str], Any]:
    """The function that converts the value of an option which takes numbers."""

    def parse(text: str) -> Any:
        try:
            return _parse_counts(text) if name == "experts" else row.kind(text)
        except ValueError:
            raise errors.UsageError(
                f"{row.spellings(name)[-1]} is {text!r}: it must be {_NUMBERS[row.kind]}",
                hint=_HELP_HINT,
            ) from None

    return parse


_HELP_HINT = "Try 'moescale --help' for help."

_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    name: _number_parser(name, row) if row.kind in _NUMBERS else row.kind
    for name, row in _ROWS.items()
}
"""What converts the value of each option."""


def _parse_counts(text: str) -> list[int]:
    """One number of experts, or several separated by commas."""
    return [int(number) for number in text.split(",")]


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    by_name = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, by_name, default=default, annotation=kind)


def _command(source: str | None, destination: str | None, version: bool, **given: Any) -> None:
    shown = {name: given.pop(name) for name in OutputOptions.__annotations__}
    as_json, quiet, verbose = shown["json"], shown["quiet"], shown["verbose"]
    # Before numpy starts threads, which slow each other down on a busy machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if quiet or as_json:  # the client shows its own bars when it downloads a model to measure
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if shown["list_types"]:
            _list_types(as_json)
        elif source is None or (source in _SUBCOMMANDS and not os.path.lexists(source)):
            raise (
                _no_subcommand(source)
                if source
                else errors.UsageError("SRC is missing", hint=_USAGE_HINT)
            )
        elif len(counts := given.pop("experts") or []) > 1 or "," in (given["rule"] or ""):
            _check_table_only(shown, destination)
            _compare(source, counts, given, as_json)
        elif shown["dry_run"] and destination is None and not _has_job(given, counts):
            _show_record(source, given["revision"], given["verify"], as_json, quiet)
        elif shown["dry_run"]:
            wanted = {name: given[name] for name in option_rows(PlanOptions) if name in given}
            wanted["experts"] = counts[0] if counts else None
            _show_plan(source, destination, wanted, as_json, quiet, verbose)
        elif destination is None:
            raise _no_destination(source, given, counts)
        else:
            given["experts"] = counts[0] if counts else None
            _convert(source, destination, given, as_json, quiet, verbose)
    except KeyboardInterrupt:
        raise errors.InterruptedRun(interrupts.MESSAGE) from None


_USAGE_HINT = f"Try: moescale {USAGE.removesuffix(' [OPTIONS]')}, or moescale --help."

_SUBCOMMANDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("convert", "rescale", "run", "scale"), ()),
    **dict.fromkeys(("plan", "inspect", "show", "info"), ("--dry-run",)),
    "verify": ("--verify",),
    "version": ("--version",),
    "help": ("--help",),
    **dict.fromkeys(("list", "types", "models"), ("--list-types",)),
}
"""Likely subcommands of other tools, and our options with the same effect."""

_STANDALONE = ("--version", "--help", "--list-types")
"""Options that are used alone."""


def _no_subcommand(verb: str) -> errors.UsageError:
    """The error for a subcommand, with the command line that has its effect."""
    rest = sys.argv[1:]
    rest.remove(verb)
    options = [option for option in _SUBCOMMANDS[verb] if option not in rest]
    line = shlex.join(["moescale", *(() if set(options) & {*_STANDALONE} else rest), *options])
    if not rest and not options:
        return errors.UsageError(f"{verb}: there are no subcommands", hint=_USAGE_HINT)
    return errors.UsageError(f"{verb}: there are no subcommands", hint=f"Try: {line}")


def _list_types(as_json: bool) -> None:
    from moescale import api
    from moescale.report import terminal

    types = api.model_types()
    if as_json:
        _print_json({"types": [asdict(row) for row in types]})
    else:
        print(terminal.types_text(types))


def _has_job(given: dict[str, Any], counts: list[int]) -> bool:
    """Whether the options describe a plan, rather than ask for an output's record."""
    ways = ("factor", "factors", "gate_scale", "rule", "evaluate")
    return bool(counts) or any(given[name] is not None for name in ways)


def _show_record(
    location: str, revision: str | None, verify: bool, as_json: bool, quiet: bool
) -> None:
    """Show the record of an output, for a dry run without -k."""
    from moescale import api
    from moescale.report import terminal

    record = api.record(location, revision=revision, verify=verify)
    if record is None:
        hint = f"moescale {location} -k M --dry-run; -k is only optional for outputs of moescale."
        raise errors.UsageError("--experts is missing: the number of experts per token", hint=hint)
    for name, how in record.differences.items():
        _print_warning(f"{name}: {how}")
    if as_json:
        _print_json(record.as_json())
    elif not quiet:
        print(terminal.record_text(record))


def _check_table_only(shown: Mapping[str, Any], destination: str | None) -> None:
    """Refuse to run several plans.

    Raises:
        UsageError: --dry-run is missing, or a destination is given.
    """
    if not shown["dry_run"]:
        raise errors.UsageError(
            "several numbers or rules make a table, not an output",
            hint="Add --dry-run, or give only one of them.",
        )
    if destination is not None:
        raise errors.UsageError("a table of several numbers or rules has no DST")


def _compare(source: str, counts: list[int], given: dict[str, Any], as_json: bool) -> None:
    from moescale import api
    from moescale.options import CompareOptions
    from moescale.report import losses, progress

    wanted = {name: given[name] for name in option_rows(CompareOptions)}
    rules = given["rule"].split(",") if given["rule"] else [None]
    measuring = progress.measuring_printer(None if as_json else sys.stderr)
    table = api.compare(source, experts=counts, rules=rules, measuring=measuring, **wanted)
    for warning in table.warnings:
        _print_warning(warning)
    if as_json:
        _print_json(table.as_json())
    else:
        print(losses.plan_table_text(table))


def _no_destination(source: str, given: dict[str, Any], counts: list[int]) -> errors.UsageError:
    if not _has_job(given, counts) and not given["verify"]:
        hint = f"moescale {source} DST -k M; DST is only optional with --dry-run."
        return errors.UsageError("DST and --experts are missing", hint=hint)
    return errors.UsageError("DST is missing", hint="It is only optional with --dry-run.")


setattr(_command, "__signature__", inspect.Signature(_parameters()))  # noqa: B010 - mypy
app.command(
    help=HELP,
    no_args_is_help=True,
    cls=_Command,
    context_settings={"help_option_names": ["-h", "--help"]},
)(_command)


def _show_plan(
    source: str,
    destination: str | None,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from moescale import api
    from moescale.report import progress, run_commands, terminal

    measuring = progress.measuring_printer(None if quiet or as_json else sys.stderr)
    plan = api.plan(source, destination, measuring=measuring, **options)
    _warn(plan)
    if as_json:
        _print_json(plan.as_json())
    elif not quiet:
        text = terminal.plan_text(plan, verbose, terminal.blocks_for(sys.stdout))
        print(colour.plan_painted(text, sys.stdout))
        if more := run_commands.commands_text(plan, written=False):
            print(f"\n{more}")
    elif plan.destination is not None:
        print(run_commands.output_location(plan))


def _print_json(content: dict[str, Any]) -> None:
    """Print JSON piece by piece, with one line per tensor and file: there may be many."""
    encode = json.JSONEncoder().encode  # the fast one in C, which cannot indent
    before = "{"
    for key, value in content.items():
        sys.stdout.write(f"{before}\n  {encode(key)}: ")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = (f"{',' * bool(i)}\n    {encode(row)}" for i, row in enumerate(value))
            sys.stdout.write("[")
            sys.stdout.writelines(rows)
            sys.stdout.write("\n  ]")
        else:
            sys.stdout.write(json.dumps(value, indent=2).replace("\n", "\n  "))
        before = ","
    print("\n}")


def _convert(
    source: str,
    destination: str,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from moescale import api
    from moescale.report import losses, run_commands, terminal
    from moescale.report.progress import Progress, measuring_printer

    shows_text = not (quiet or as_json)
    stream = sys.stderr if shows_text else None

    def planned(plan: Plan) -> None:
        _warn(plan)
        if shows_text:
            text = terminal.plan_text(plan, verbose, terminal.blocks_for(sys.stderr))
            print(colour.plan_painted(text, sys.stderr), end="\n\n", file=sys.stderr)

    with Progress(stream) as progress:
        try:
            result = api.convert(
                source,
                destination,
                progress=progress.step,
                phase=progress.begin,
                planned=planned,
                measuring=measuring_printer(stream),
                **options,
            )
        except KeyboardInterrupt:
            raise errors.InterruptedRun(
                interrupts.MESSAGE, hint=progress.unfinished_text()
            ) from None
    for warning in result.warnings:
        _print_warning(warning)
    if as_json:
        outcome: dict[str, Any] = {
            "status": result.status,
            "verified": result.verified,
            "url": result.url,
        }
        if result.rounding:
            outcome["rounding"] = terminal.rounding_json(result)
        if result.warnings:
            outcome["warnings"] = list(result.warnings)
        _print_json({**result.plan.as_json(), "result": outcome})
        return
    found = result.plan.evaluation
    for warning in found.warnings if found else ():
        _print_warning(warning)
    if shows_text and found:
        print(losses.evaluation_text(found), end="\n\n", file=sys.stderr)
    if shows_text:
        if more := run_commands.commands_text(result.plan, written=True):
            print(more, end="\n\n", file=sys.stderr)
        text = terminal.summary(result, progress.seconds, progress.resumed)
        print(colour.summary_painted(text, sys.stderr), file=sys.stderr)
    elif options["create_pr"] and result.url is not None:
        print(result.url, file=sys.stderr)
    if result.status != "nothing":
        print(run_commands.output_location(result.plan))


def _warn(plan: Plan) -> None:
    losses = plan.evaluation.warnings if plan.evaluation else ()
    for warning in (*plan.warnings, *losses):
        _print_warning(warning)


def _print_warning(text: str) -> None:
    word = colour.painted("warning:", colour.YELLOW, sys.stderr)
    print(f"{word} {errors.printable(text)}", file=sys.stderr)


def main() -> None:
    """Run the command, and turn errors into text and exit codes."""
    _open_streams()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # we report problems ourselves
    interrupts.install_handlers()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the terminal may lack characters of a path
            exact = stream is sys.stdout and stream.encoding.lower() == "utf-8"  # for scripts
            stream.reconfigure(errors="surrogateescape" if exact else "backslashreplace")
    try:
        _run()
    finally:
        with contextlib.suppress(OSError):  # `_run` has reported it
            _flush_output()


def _open_streams() -> None:
    """Open streams that the caller has closed, so that no other file gets their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            mode = "w" if number else "r"
            stream = open(number, mode, closefd=False)  # noqa: SIM115 - stays open until the end
            setattr(sys, name, stream)


def _flush_output() -> None:
    """Flush stdout, without complaining if its reader has gone away."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing tries it again
        if not isinstance(error, BrokenPipeError):
            raise


def _run() -> NoReturn:
    try:
        code = app(prog_name="moescale", standalone_mode=False)
        if code == EXIT_CODES[errors.InterruptedRun]:  # Typer handled Ctrl-C without a message
            raise KeyboardInterrupt
        _flush_output()
        sys.exit(code)
    except _UsageError as error:
        if isinstance(error, typer.BadParameter) or sys.argv[1:]:
            if sys.argv[1:2] and sys.argv[1] in _SUBCOMMANDS:
                _fail(_no_subcommand(sys.argv[1]))
            _fail(errors.UsageError(_parser_message(error), hint=_HELP_HINT))
        error.show()  # without arguments, the error shows the help
        sys.exit(2)
    except errors.MoescaleError as error:
        _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail(errors.InterruptedRun(interrupts.MESSAGE))
    except RuntimeError as error:  # Python 3.11 wraps an interrupt while it makes a class
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        _fail(errors.InterruptedRun(interrupts.MESSAGE))
    except OSError as error:
        _fail(errors.MoescaleError(f"{error.filename or 'output'}: {error.strerror}"))


def _parser_message(error: Any) -> str:
    """The parser's message, without remote suggestions."""
    if known := getattr(error, "possibilities", None):
        asked = error.option_name.strip("-")
        error.possibilities = [
            k
            for k in known
            if k.strip("-").startswith(asked) or get_close_matches(asked, [k.strip("-")])
        ]
    return str(error.format_message())


def _fail(error: errors.MoescaleError) -> NoReturn:
    code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
    if code == interrupts.EXIT_CODE:
        interrupts.silence()
    with contextlib.suppress(OSError):  # the exit code still tells
        print(f"{colour.painted('moescale:', colour.RED, sys.stderr)} {error}", file=sys.stderr)
    sys.exit(code)
