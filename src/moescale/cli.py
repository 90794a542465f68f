"""The command: text, options and exit codes; no logic."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from moescale import errors, interrupts
from moescale.version import __version__

if TYPE_CHECKING:
    from moescale import Plan

# Typer has its own copy of Click, and gives the base of its errors no name of its own.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

EXIT_CODES: dict[type[errors.MoescaleError], int] = {
    errors.UsageError: 2,
    errors.SourceError: 3,
    errors.DestinationError: 3,
    errors.VerificationError: 4,
    errors.TemporaryError: 5,
    errors.InterruptedRun: interrupts.EXIT_CODE,
}
"""By error; every other one is 1."""

HELP_COLUMN = 24
"""Where the meaning of an option starts."""

HELP = """Run a mixture-of-experts model with another number of active experts.

Examples:

\b
  moescale ./Mixtral-8x7B ./Mixtral-8x7B-3 --experts 3 --dry-run
  moescale ./Mixtral-8x7B ./Mixtral-8x7B-3 --experts 3 --verify
  moescale Qwen/Qwen3-30B-A3B ./Qwen3-30B-A3B-16 --experts 16
  moescale Qwen/Qwen3-30B-A3B hf://me/Qwen3-30B-A3B-16 --experts 16 --private
  moescale ./merged ./merged-4 --experts 4 --trained-experts 1

SRC is a directory, a repo on the Hugging Face Hub (org/name or hf://org/name@revision), DST a
directory or hf://org/name; nothing is uploaded unless hf:// says so. The routed
experts' down-projections are multiplied by a factor that keeps the expected norm of the routed
output, and the number in config.json is set. SRC is never written to; an interrupted run
is continued by the same command.
"""

FACTOR, HUB, MODEL, RUN, OUTPUT = (
    "Which factor, and where it goes",
    "The Hub",
    "Models that are not in the table, or have several MoEs",
    "The run",
    "What is shown",
)
"""Headings of the options but the first ones; Typer's own take rich, which takes long to start."""


class _Command(typer.core.TyperCommand):
    """A command that shows its options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of every argument and option, in one column under all headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                usual = f"{parameter.param_type_name.capitalize()}s"
                panel = getattr(parameter, "rich_help_panel", None)
                sections.setdefault(panel or usual, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([(f"{names:{HELP_COLUMN}}", text) for names, text in records])


app = typer.Typer(add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _values(option: str) -> Callable[[], list[str]]:
    """What the shell completes; the tables are read only then."""

    def values() -> list[str]:
        from moescale import api

        return api.values(option)

    return values


def _version(wanted: bool) -> None:
    if wanted:
        print(f"moescale {__version__}")
        raise typer.Exit


@app.command(
    help=HELP,
    no_args_is_help=True,
    cls=_Command,
    context_settings={"help_option_names": ["-h", "--help"]},
)
def _command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The checkpoint to read.")],
    destination: Annotated[
        Optional[str],  # noqa: UP045 - Typer shows it
        typer.Argument(metavar="DST", help="Where to write; may be left out with --dry-run."),
    ] = None,
    experts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-k", "--experts", metavar="M", help="Experts per token of the output."),
    ] = None,
    trained_experts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "-n",
            "--trained-experts",
            metavar="N",
            rich_help_panel=FACTOR,
            help="Experts per token that the weights were trained for; default: the config's."
            " 1 restores a merge of dense models.",
        ),
    ] = None,
    rule: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=FACTOR,
            metavar="RULE",
            autocompletion=_values("rule"),
            help="preserve (default), published, gates, measured, or none.",
        ),
    ] = None,
    calibrate: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            rich_help_panel=FACTOR,
            metavar="FILE",
            help="The text that --rule measured runs the model on: 2,048 tokens or more, of which"
            " the first 65,536 are taken. Needs torch, transformers and accelerate.",
        ),
    ] = None,
    max_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=FACTOR,
            metavar="SIZE",
            help="How much of the model --rule measured holds in main memory, such as 8GiB; the"
            " rest lies on disk.",
        ),
    ] = None,
    fold: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=FACTOR,
            metavar="WHERE",
            autocompletion=_values("fold"),
            help="weights (default); config: multiply the model's own routed scaling key and"
            " leave every weight as it is; or residual: leave the experts, divide the embedding and"
            " the attention outputs (gpt-oss).",
        ),
    ] = None,
    rho: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            rich_help_panel=FACTOR,
            metavar="R",
            help="Correlation of expert outputs, 0 to 1; default 0.",
        ),
    ] = None,
    factor: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(rich_help_panel=FACTOR, metavar="F", help="This factor instead of a rule."),
    ] = None,
    factors: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            rich_help_panel=FACTOR,
            metavar="FILE",
            help="Factors by layer as JSON, or an earlier output's moescale.json.",
        ),
    ] = None,
    gate_scale: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            rich_help_panel=FACTOR,
            metavar="F",
            help="Multiply the router's weight: above 1 sharpens the gate, below 1 flattens it.",
        ),
    ] = None,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=HUB,
            metavar="REV",
            help="Branch, tag or commit of a SRC given as org/name.",
        ),
    ] = None,
    part: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=MODEL,
            metavar="NAME",
            autocompletion=_values("part"),
            help="Which MoE of a checkpoint that has several.",
        ),
    ] = None,
    arch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=MODEL,
            metavar="TYPE",
            autocompletion=_values("arch"),
            help="Treat the model as this model type.",
        ),
    ] = None,
    pattern: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=MODEL,
            metavar="REGEX",
            help="The names of the down-projections, for an architecture that is not known.",
        ),
    ] = None,
    experts_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=MODEL,
            metavar="KEY",
            help="The config key of the experts per token, likewise.",
        ),
    ] = None,
    private: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--private/--public",
            rich_help_panel=HUB,
            help="Of a repo that has to be made; default: the Hub's own.",
        ),
    ] = None,
    create_pr: Annotated[
        bool,
        typer.Option(
            "--create-pr",
            rich_help_panel=HUB,
            help="Open a pull request instead; takes the right to write.",
        ),
    ] = False,
    commit_message: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(rich_help_panel=HUB, metavar="TEXT", help="Of the commit on the Hub."),
    ] = None,
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "-j",
            "--jobs",
            rich_help_panel=RUN,
            metavar="N",
            min=1,
            help="Shards at once; default: cores, at most 8, and 2 to the Hub, for the memory.",
        ),
    ] = None,
    dask: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=RUN,
            metavar="ADDRESS",
            help="Let the workers of a Dask scheduler do the shards: tcp://host:8786, or a"
            " scheduler file.",
        ),
    ] = None,
    report_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--report",
            rich_help_panel=OUTPUT,
            metavar="FILE",
            help="Draw the plan into this HTML page too.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan and what a run would refuse; write nothing."
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Afterwards read everything again and prove it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a destination that holds something else.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON object on stdout."),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("-q", "--quiet", rich_help_panel=OUTPUT, help="Print the destination only."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", rich_help_panel=OUTPUT, help="List every tensor and every file."
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    options: dict[str, Any] = {
        "experts": experts,
        "trained_experts": trained_experts,
        "rule": rule,
        "rho": rho,
        "factor": factor,
        "factors": factors,
        "fold": fold,
        "gate_scale": gate_scale,
        "part": part,
        "arch": arch,
        "pattern": pattern,
        "experts_key": experts_key,
        "calibrate": calibrate,
        "max_memory": max_memory,
    }
    if rule == "gates":  # before numpy starts threads, which wait for each other on a busy machine
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if quiet or as_json:  # a model that is measured is downloaded by the client, with its own bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        places = {
            "revision": revision,
            "overwrite": overwrite,
            "private": private,
            "create_pr": create_pr,
            "commit_message": commit_message,
            "report": report_file,
        }
        if dry_run:
            _show_plan(source, destination, {**options, **places}, as_json, quiet, verbose)
        elif destination is None:
            raise errors.UsageError("DST is missing", hint="Only --dry-run does without it.")
        else:
            run = {**places, "jobs": jobs, "check": verify, "dask": dask}
            _convert(source, destination, {**options, **run}, as_json, quiet, verbose)
    except KeyboardInterrupt:
        raise errors.InterruptedRun(interrupts.MESSAGE) from None


def _show_plan(
    source: str,
    destination: str | None,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from moescale import api
    from moescale.report import terminal

    measuring = terminal.measuring(None if quiet or as_json else sys.stderr, options["rule"])
    plan = api.plan(source, destination, measuring=measuring, **options)
    _warn(plan)
    if as_json:
        _print_json(plan.as_json())
    elif not quiet:
        print(terminal.plan_text(plan, verbose, terminal.blocks_for(sys.stdout)))
    elif destination is not None:
        print(destination)


def _print_json(content: dict[str, Any]) -> None:
    """Print it piece by piece: with tens of thousands of tensors the text has many megabytes."""
    json.dump(content, sys.stdout, indent=2)
    print()


def _convert(
    source: str,
    destination: str,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from moescale import api
    from moescale.report import terminal

    talk = not (quiet or as_json)
    start = time.monotonic()
    with terminal.Progress(sys.stderr if talk else None) as progress:

        def planned(plan: Plan) -> None:
            nonlocal start
            start = time.monotonic()  # measuring a model may have taken hours
            _warn(plan)
            if talk:
                text = terminal.plan_text(plan, verbose, terminal.blocks_for(sys.stderr))
                print(text, end="\n\n", file=sys.stderr)
            sizes = {file.name: plan.output_size(file) for file in plan.large_files}
            progress.expect(sizes, passes=2 if options["check"] else 1)

        result = api.convert(
            source,
            destination,
            progress=progress.step,
            planned=planned,
            measuring=terminal.measuring(sys.stderr if talk else None, options["rule"]),
            **options,
        )
    if as_json:
        outcome = {"status": result.status, "verified": result.verified, "url": result.url}
        _print_json({**result.plan.as_json(), "result": outcome})
        return
    if talk:
        print(terminal.summary(result, time.monotonic() - start), file=sys.stderr)
    elif options["create_pr"] and result.url is not None:
        print(result.url, file=sys.stderr)
    print(destination)


def _warn(plan: Plan) -> None:
    for warning in plan.warnings:
        print(f"warning: {errors.printable(warning)}", file=sys.stderr)


def main() -> None:
    """The entry point: runs the command and turns errors into text and exit codes."""
    _open_streams()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what goes wrong is said by us
    interrupts.listen()
    gc.set_threshold(100_000, 50, 100)  # a plan is many objects and no cycles; looking costs time
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may have letters that a terminal has not
            exact = stream is sys.stdout and stream.encoding.lower() == "utf-8"  # for scripts
            stream.reconfigure(errors="surrogateescape" if exact else "backslashreplace")
    try:
        _run()
    finally:
        _flush_output()


def _open_streams() -> None:
    """Where the caller has closed a stream, no file of ours may get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def _flush_output() -> None:
    """Write what is left; a reader that went away is no reason to complain at the end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run() -> NoReturn:
    try:
        code = app(prog_name="moescale", standalone_mode=False)
        if code == EXIT_CODES[errors.InterruptedRun]:  # Typer's own answer, without a word
            raise KeyboardInterrupt
        sys.exit(code)
    except _UsageError as error:
        if isinstance(error, typer.BadParameter) or sys.argv[1:]:
            message = error.format_message()
            _fail(errors.UsageError(message, hint="Try 'moescale --help' for help."))
        error.show()  # without arguments, the error is the help
        sys.exit(2)
    except errors.MoescaleError as error:
        _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        _fail(errors.InterruptedRun(interrupts.MESSAGE))
    except OSError as error:
        _fail(errors.MoescaleError(f"{error.filename or 'output'}: {error.strerror}"))


def _fail(error: errors.MoescaleError) -> NoReturn:
    code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
    if code == interrupts.EXIT_CODE:
        interrupts.hush()
    print(f"moescale: {error}", file=sys.stderr)
    sys.exit(code)
