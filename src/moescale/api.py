"""The Python API, with the functions of the command: `plan`, `convert`, `verify` and others.

Nothing here prints, exits, changes the environment or handles signals; only the command does. All
failures are exceptions of `moescale.errors`. Ctrl-C is a `KeyboardInterrupt`, as usual; after it,
as after any error, the threads of the call have ended, and the same call resumes. Hints of errors
name the command's options, which have the same names here.

When a rule has to download a model to run it, the Hub client shows its own bars on a terminal;
`huggingface_hub.utils.disable_progress_bars` turns them off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

from moescale.calibrate.devices import check_installed, running
from moescale.calibrate.loading import Loader
from moescale.checkpoint.rounding import Rounding
from moescale.conversion.executor import Pool
from moescale.conversion.preflight import with_refusal, with_space_warning
from moescale.conversion.previous import (
    check_same_job,
    previous_options,
    previous_run,
    with_original_options,
)
from moescale.conversion.recorded_output import read_record
from moescale.conversion.repair import may_repair, repair, verify_output
from moescale.conversion.run import run
from moescale.conversion.status import check_status, status_of
from moescale.errors import (
    DestinationError,
    MoescaleError,
    UnsupportedError,
    UsageError,
    bytes_text,
)
from moescale.factors.evaluation import Evaluation
from moescale.families import listing
from moescale.families.architectures import ROWS, known_types
from moescale.families.listing import ModelType
from moescale.options import (
    DEVICES,
    FOLDS,
    RULES,
    RUN_RULES,
    CompareOptions,
    ConvertOptions,
    Options,
    PlanOptions,
    Rescaling,
    Rule,
    StrPath,
    VerifyOptions,
    not_a_path,
    options_of,
    read_factors,
    signature_and_doc,
    wrong_keyword,
)
from moescale.planning.decide import make_plan
from moescale.planning.plan import Plan
from moescale.planning.plan_table import PlanTable
from moescale.report.progress import progress_callbacks
from moescale.report.view import PLAN_VIEW
from moescale.results import Record, Result
from moescale.storage.base import Destination, Phase, Progress, Source, ignore
from moescale.storage.location import (
    Location,
    destination_location,
    expand_user,
    remarks_on,
    source_location,
)
from moescale.storage.opening import (
    check_apart,
    check_links,
    check_not_source,
    check_output_file,
    open_destination,
    open_source,
)

if TYPE_CHECKING:
    from moescale.calibrate.calibration import Calibration
    from moescale.calibrate.text import Text

# Imports take most of the time of a plan, so functions import the modules that few calls need.

_P = ParamSpec("_P")
_R = TypeVar("_R")

Measuring = Callable[[int, int], None]
"""Called with the tokens that the model processed, or the layers that ``gates`` sampled, and with
their total number."""


def _with_options(keywords: type) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Show a verb's options in its signature and docstring, and refuse other keywords."""

    def decorate(verb: Callable[_P, _R]) -> Callable[_P, _R]:
        signature, rows = signature_and_doc(verb, keywords)

        @wraps(verb)
        def checked(*args: _P.args, **given: _P.kwargs) -> _R:
            if unknown := next((name for name in given if name not in signature.parameters), None):
                raise TypeError(wrong_keyword(verb.__name__, unknown, [*signature.parameters]))
            locations = (*args, given.get("source"), given.get("destination"))
            if wrong := [p for p in locations if not isinstance(p, str | os.PathLike | None)]:
                raise TypeError(not_a_path(verb.__name__, wrong[0]))
            if isinstance(factors := given.get("factors"), str | os.PathLike):
                given["factors"] = read_factors(factors)  # here, since a pipe is read only once
            return verb(*args, **given)

        setattr(checked, "__signature__", signature)  # noqa: B010 - mypy knows no such attribute
        checked.__doc__ = rows
        return checked

    return decorate


@_with_options(PlanOptions)
def plan(
    source: StrPath,
    destination: StrPath | None = None,
    *,
    measuring: Measuring | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Plan a conversion without writing; reads the config, the index and the shard headers.

    If `convert` would refuse a local destination, the plan has a warning; a destination on the Hub
    is not checked.

    >>> import moescale
    >>> plan = moescale.plan("Mixtral-8x7B", experts=3, rule="preserve")
    >>> plan.experts.trained, plan.experts.after
    (2, 3)
    >>> plan.factors["0"]
    1.224744871391589
    >>> plan.predicted_norm["published"]  # of the routed output; 1 is that of the trained model
    0.6666666666666667

    Args:
        source: a directory, a GGUF file, ``org/name[/folder]``, ``org/name:QUANT`` for GGUF,
            ``hf://org/name[@revision][/folder]``, or the address of a model on the Hub.
        destination: a directory, for GGUF also a file, or ``hf://org/name[@branch]``.
        measuring: called with the progress of the rule.

    Raises:
        UsageError: an option is invalid.
        SourceError: the checkpoint cannot be read, or cannot be rescaled this way.
        TemporaryError: the Hub does not answer.
    """
    report, revision = options.get("report"), options.get("revision")
    measuring = measuring or ignore
    origin = source_location(source)
    target = None if destination is None else destination_location(destination)
    _check_files(options, origin, target)
    with _loader(options) as loader:
        wanted, calibration = _parsed_options(options, measuring, loader)
        if target is None:
            reader = _source(origin, None, options)
            made = _make_plan(reader, wanted, None, calibration, measuring)
        else:
            check_apart(origin, target, revision)
            overwrite = options.get("overwrite", False)
            reader = _source(origin, target, options)
            try:
                opened = _destination(target, options, reader)
            except DestinationError as error:
                made = with_refusal(
                    _make_plan(reader, wanted, target, calibration, measuring), error
                )
            else:
                made = _dry_run(reader, opened, target, wanted, calibration, measuring, overwrite)
        if options.get("evaluate") is not None:
            losses = _evaluate([made], reader, options, measuring, loader)
            made = replace(made, evaluation=losses)
    return _with_report(made, report)


@_with_options(CompareOptions)
def compare(
    source: StrPath,
    *,
    experts: Sequence[int],
    rules: Sequence[Rule | None] = (None,),
    measuring: Measuring | None = None,
    **options: Unpack[CompareOptions],
) -> PlanTable:
    """Plan every number of experts with every rule, side by side, without writing.

    >>> import moescale
    >>> table = moescale.compare("Mixtral-8x7B", experts=[3, 4], rules=["preserve", "none"])
    >>> [(plan.experts.after, plan.rule) for plan in table.plans]
    [(3, 'preserve'), (3, 'none'), (4, 'preserve'), (4, 'none')]

    Args:
        source: as for `plan`.
        experts: numbers of experts per token.
        rules: None means the default rule.
        measuring: called with the progress of the rules.

    Raises:
        MoescaleError: as for `plan`.
    """
    origin, reader, made, losses = source_location(source), None, [], None
    measuring = measuring or ignore
    _check_files(options, origin)
    own: Text | None = None
    with _loader(options) as loader:
        for count, rule in product(dict.fromkeys(experts), dict.fromkeys(rules)):
            kept = {k: v for k, v in options.items() if rule in RUN_RULES or k not in _RUN_OPTIONS}
            given: Any = {**kept, "experts": count, "rule": rule}
            wanted, calibration = _parsed_options(given, measuring, loader)
            reader = reader or _source(origin, None, options)
            if calibration is not None:
                calibration.use(own)
            made.append(_make_plan(reader, wanted, None, calibration, measuring))
            own = calibration.own if calibration is not None else own
        if not made or reader is None:
            raise UsageError("--experts is missing: the number of experts per token")
        if options.get("evaluate") is not None:
            losses = _evaluate(made, reader, options, measuring, loader)
    table = PlanTable(tuple(made), losses)
    return replace(table, remarks=tuple(_report_warnings(table, options.get("report"))))


_RUN_OPTIONS = frozenset({"calibrate", "calibrate_out", "max_memory", "device", "evaluate"})
"""Options that only apply if the model is run."""


@_with_options(ConvertOptions)
def convert(
    source: StrPath,
    destination: StrPath,
    *,
    progress: Progress | bool | None = None,
    phase: Phase | None = None,
    planned: Callable[[Plan], None] | None = None,
    measuring: Measuring | None = None,
    **options: Unpack[ConvertOptions],
) -> Result:
    """Rescale a checkpoint, or continue an interrupted run of the same job.

    >>> import moescale
    >>> result = moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3, verify=True)
    >>> result.status, result.verified
    ('new', True)
    >>> moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3).status
    'done'
    >>> moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=4)
    Traceback (most recent call last):
    moescale.errors.DestinationError: Mixtral-8x7B-3: holds Mixtral-8x7B with 3 experts per token...
    Give another destination, or --overwrite to replace its content; --verify without other...

    Args:
        source: a directory, a GGUF file, ``org/name[/folder]``, ``org/name:QUANT`` for GGUF,
            ``hf://org/name[@revision][/folder]``, or the address of a model on the Hub.
        destination: a directory, for GGUF also a file, or ``hf://org/name[@branch]``; it does not
            load before it is complete.
        progress: called with a file's name and the number of its bytes done since the last call,
            from several threads, possibly in parallel. For each of `Plan.large_files` the numbers
            add up to `Plan.output_size`, and with `verify` once more. It is not called if nothing
            is left to do. Its exceptions end the run. True shows one bar, False none; by default
            there is one in a notebook.
        phase: called when writing and verifying begin.
        planned: called with the plan, in the calling thread, before anything is written.
        measuring: called with the progress of the rule. ``measured`` and ``fitted`` run the model
            unless the destination has the factors of the same job.

    Raises:
        UsageError: an option is invalid.
        SourceError: the checkpoint cannot be read, or cannot be rescaled this way; nothing was
            written.
        DestinationError: the destination has other content, or cannot take the output.
        RewriteError: a shard could not be rewritten, or a value would overflow.
        VerificationError: `verify` found a difference.
        TemporaryError: the Hub or the cluster failed for now; the same call resumes.
    """
    report, revision = options.get("report"), options.get("revision")
    overwrite, jobs = options.get("overwrite", False), options.get("jobs")
    check, evaluate = options.get("verify", False), options.get("evaluate") is not None
    measuring, phase, planned = measuring or ignore, phase or ignore, planned or ignore
    origin, target = source_location(source), destination_location(destination)
    _check_files(options, origin, target)
    if evaluate and target.on_hub:
        raise UsageError(
            "--evaluate needs the output on this disk, and DST is on the Hub",
            hint="--dry-run --evaluate shows the loss without writing anything.",
        )
    if not check and not evaluate:
        _check_values(options)
    _check_jobs(jobs)
    check_apart(origin, target, revision)
    reader = _source(origin, target, options)
    opened = _destination(target, options, reader)
    with progress_callbacks(progress, phase) as (step, begin), _pool(options.get("dask")) as pool:
        with _loader(options) as loader:
            there = opened if check or evaluate else None
            wanted, calibration = _parsed_options(options, measuring, loader, there)
            check_not_source(reader, opened)
            made = _make_plan(reader, wanted, target, calibration, measuring, opened, overwrite)
        plan = _with_report(with_space_warning(made, opened), report)
        planned(plan)
        if plan.changes_nothing:
            return Result(plan, "nothing", False)
        jobs = jobs or pool.default_jobs(opened)
        previous = previous_run(opened)
        original = with_original_options(plan, reader, previous)
        rounding: Mapping[str, Rounding] = {}
        if check and overwrite and may_repair(original, opened, previous):
            status = repair(original, reader, opened, jobs, step, begin, pool)
        else:
            begin("writing", plan.large_sizes)
            outcome = run(
                original,
                reader,
                opened,
                previous,
                jobs=jobs,
                overwrite=overwrite,
                progress=step,
                pool=pool,
            )
            status, rounding = outcome.status, outcome.rounding
            if check:
                begin("verifying", plan.large_sizes)
                verify_output(original, reader, opened, jobs, step, pool)
            else:
                check_status(status, target)
        if evaluate:
            with _loader(options) as loader:
                losses = _evaluate([plan], reader, options, measuring, loader, target.path)
            plan = replace(plan, evaluation=losses)
    received = [f"{bytes_text(reader.received)} received"] if reader.received else []
    rounded = {name: seen for name, seen in rounding.items() if seen.blocks}
    found = tuple(_scale_warnings(rounding))
    return Result(plan, status, check, opened.url, (*received, *opened.remarks), rounded, found)


def _scale_warnings(seen: Mapping[str, Rounding]) -> Iterator[str]:
    """Warnings about the scales that were written."""
    if empty := sorted(name for name, one in seen.items() if one.empty):
        yield (
            f"{empty[0]}: every scale in it is 0 ({len(empty)} in all), so its weights are 0,"
            " scaled or not; the tensor may be damaged"
        )


@_with_options(VerifyOptions)
def verify(
    source: StrPath,
    destination: StrPath,
    *,
    progress: Progress | bool | None = None,
    measuring: Measuring | None = None,
    **options: Unpack[VerifyOptions],
) -> Result:
    """Verify that `destination` is the output of `convert` from `source` with the same options.

    >>> import moescale
    >>> result = moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3, rule="preserve")
    >>> moescale.verify("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3, rule="preserve").verified
    True
    >>> moescale.verify("Mixtral-8x7B", "Mixtral-8x7B-3").verified  # with the recorded options
    True
    >>> try:
    ...     moescale.verify("Mixtral-8x7B", "Mixtral-8x7B-3", experts=4)
    ... except moescale.errors.VerificationError as error:
    ...     print(error.message)
    Mixtral-8x7B-3: was made with experts=3, rule=preserve

    The arguments are those of `convert`. Without options, those recorded in the output's
    ``moescale.json`` are used. Missing SHA-256 sums are added there.

    Raises:
        VerificationError: files differ; names them, and tensor and offset of the first difference.
            Or the output was made with other options.
        UsageError: an option is invalid.
        SourceError: the checkpoint cannot be read, or cannot be rescaled this way.
        DestinationError: the destination cannot be read, or its provenance cannot be completed.
        TemporaryError: the Hub or the cluster failed for now.
    """
    jobs, measuring = options.get("jobs"), measuring or ignore
    _check_jobs(jobs)
    target = destination_location(destination)
    reader = open_source(source_location(source), options.get("revision"))
    opened = open_destination(target, gguf_set=reader.gguf_set)
    with progress_callbacks(progress) as (step, begin), _pool(options.get("dask")) as pool:
        with _loader(options) as loader:
            wanted, calibration = _parsed_options(options, measuring, loader, opened)
            plan = _make_plan(reader, wanted, target, calibration, measuring, opened)
        previous = previous_run(opened)
        check_same_job(plan, previous, opened)
        plan = with_original_options(plan, reader, previous)
        begin("verifying", plan.large_sizes)
        verify_output(plan, reader, opened, jobs or pool.default_jobs(opened), step, pool)
    return Result(plan, "done", True)


def record(output: StrPath, *, revision: str | None = None, verify: bool = False) -> Record | None:
    """How a finished output was made, and whether its files have changed since.

    None if the location is not an output.

    >>> import moescale
    >>> result = moescale.convert("Mixtral-8x7B", "Mixtral-8x7B-3", experts=3)
    >>> record = moescale.record("Mixtral-8x7B-3")
    >>> record.content["source"]["id"], record.options, dict(record.differences)
    ('Mixtral-8x7B', 'experts=3', {})

    All sizes are compared, and the SHA-256 of small files.

    Args:
        output: its location: a directory, or a repo as for `plan`.
        revision: a branch, tag or commit of the repo.
        verify: also read large files and compare their SHA-256, if it is recorded.

    Raises:
        SourceError: the output cannot be read.
        TemporaryError: the Hub does not answer.
    """
    return read_record(open_source(source_location(output), revision), verify)


def model_types() -> tuple[ModelType, ...]:
    """All known model types, with their treatment.

    >>> import moescale
    >>> [row.effect for row in moescale.model_types() if row.model_type == "mixtral"]
    ['scaled']
    """
    return listing.model_types()


def values(option: str) -> list[str]:
    """The values of an option: ``rule``, ``fold``, ``arch``, ``part`` or ``device``."""
    found = {
        "rule": RULES,
        "fold": FOLDS,
        "arch": known_types(),
        "part": {row.part for row in ROWS if row.part},
        "device": DEVICES,
    }
    return sorted(found[option])


def _source(source: Location, destination: Location | None, given: Mapping[str, Any]) -> Source:
    """Open the source; for uploads, `follow_links` decides about links out of it.

    Raises:
        UnsupportedError: `evaluate` is given, and the source is GGUF.
    """
    local = destination is None or not destination.on_hub
    reader = open_source(source, given.get("revision"), local or given.get("follow_links", False))
    if reader.gguf_set is not None and given.get("evaluate") is not None:
        raise UnsupportedError(
            "--evaluate runs the model with transformers, which does not work for a GGUF file",
            hint="Evaluate it with llama-perplexity.",
        )
    return reader


def _destination(target: Location, given: PlanOptions, source: Source) -> Destination:
    """Open the destination with the given options.

    Raises:
        UsageError: the destination holds the target of a link of the source.
    """
    destination = open_destination(
        target,
        given.get("private"),
        given.get("create_pr", False),
        given.get("commit_message"),
        given.get("overwrite", False),
        source.gguf_set,
    )
    check_links(source, destination)
    return destination


def _evaluate(
    plans: Sequence[Plan],
    source: Source,
    given: PlanOptions | CompareOptions,
    measuring: Measuring,
    loader: Loader,
    output: Path | None = None,
) -> Evaluation:
    """The losses of plans on a text, or that of a single plan's output."""
    check_installed("--evaluate")
    from moescale.calibrate.losses import evaluate_plans

    text, calibrated = given.get("evaluate"), given.get("calibrate")
    assert text is not None
    return evaluate_plans(
        source,
        plans,
        Path(expand_user(text)),
        loader,
        calibrated=None if calibrated is None else Path(expand_user(calibrated)),
        output=output,
        progress=measuring,
    )


def _parsed_options(
    given: PlanOptions | VerifyOptions,
    measuring: Measuring,
    loader: Loader,
    destination: Destination | None = None,
) -> tuple[Options, Calibration | None]:
    """The parsed options, and the text for rules that run the model.

    If none are given, they are those recorded in the output at `destination`.

    Raises:
        UsageError: an option is invalid.
    """
    _check_run_options(given)
    rule, text, keep = given.get("rule"), given.get("calibrate"), given.get("calibrate_out")
    asked = any(given.get(name) is not None for name in Rescaling.__annotations__)
    if destination is not None and not asked:
        if (there := previous_options(destination)) is None:
            raise UsageError(
                f"--experts is missing, and {destination.identity} does not record its options",
                hint="--experts is only optional for a finished output with a moescale.json.",
            )
        if there.rule not in RUN_RULES:
            return there, None
        from moescale.calibrate.calibration import open_calibration

        return there, open_calibration(None, loader, progress=measuring)
    if text is None and rule not in RUN_RULES:
        return options_of(given, None), None
    from moescale.calibrate.calibration import open_calibration

    calibration = open_calibration(
        None if text is None else Path(expand_user(text)),
        loader,
        None if keep is None else Path(expand_user(keep)),
        measuring,
    )
    return options_of(given, calibration.sha256), calibration


def _loader(given: PlanOptions | CompareOptions | VerifyOptions) -> Loader:
    """A loader for the model, with the given memory and device.

    Raises:
        UsageError: one of these options is wrong.
    """
    return Loader(running(given.get("max_memory"), given.get("device")))


def _check_run_options(given: PlanOptions | VerifyOptions) -> None:
    """Refuse options for running the model if it is not run."""
    text, fits = given.get("calibrate"), given.get("rule") in RUN_RULES
    runs = fits or given.get("evaluate") is not None
    for name, goes in {"max_memory": runs, "device": runs, "calibrate_out": fits}.items():
        if given.get(name) is not None and not goes:
            also = "" if name == "calibrate_out" else ", or with --evaluate"
            raise UsageError(
                f"--{name.replace('_', '-')} goes with --rule fitted or measured{also}"
            )
    if text is not None and given.get("calibrate_out") is not None:
        raise UsageError(
            "--calibrate-out saves the model's own text, but --calibrate gives another text"
        )


def _check_values(given: Rescaling) -> None:
    """Refuse wrong values before anything is read; the path of a text stands for its digest."""
    text = given.get("calibrate")
    options_of(given, None if text is None else os.fspath(text))


def _check_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}: it must be 1 or more")


def _check_files(
    options: PlanOptions | CompareOptions | ConvertOptions, *locations: Location | None
) -> None:
    """Refuse additional output files that cannot be written, or belong to somebody else.

    Raises:
        UsageError: names the option.
    """
    folders = [location.path for location in locations if location and location.path]
    if (report := options.get("report")) is not None:
        check_output_file("--report", Path(expand_user(report)), *folders)
    if (text := options.get("calibrate_out")) is not None:
        check_output_file("--calibrate-out", Path(expand_user(text)), *folders)
        from moescale.calibrate.text import check_kept

        check_kept(Path(expand_user(text)))


def _with_report(plan: Plan, file: StrPath | None) -> Plan:
    """Write the page of a plan; a failure becomes a warning of the plan."""
    return replace(plan, warnings=(*plan.warnings, *_report_warnings(plan, file)))


def _report_warnings(found: Plan | PlanTable, file: StrPath | None) -> list[str]:
    """Write a page; a failure is only a warning, since the plan may have taken hours."""
    if file is not None:
        from moescale.report import page

        try:
            page.write(found, Path(expand_user(file)))
        except MoescaleError as error:
            return [error.message]
    return []


def _dry_run(
    source: Source,
    destination: Destination,
    target: Location,
    wanted: Options,
    calibration: Calibration | None,
    measuring: Measuring,
    overwrite: bool,
) -> Plan:
    """A plan without a run; if a run would be refused, the plan has a warning."""
    try:
        beside = None if destination.remote else destination
        made = _make_plan(source, wanted, target, calibration, measuring, beside, overwrite)
    except DestinationError:  # a run would be refused, but a dry run still shows the plan
        made = _make_plan(source, wanted, target, calibration, measuring)
    try:
        if not destination.remote:
            previous = previous_run(destination)
            original = with_original_options(made, source, previous)
            check_status(status_of(original, source, destination, previous, overwrite), target)
            destination.check_writable()
        return with_space_warning(made, destination)
    except DestinationError as error:
        return with_refusal(made, error)


@contextmanager
def _pool(dask: StrPath | None) -> Iterator[Pool]:
    """The workers of a cluster, or threads of this process."""
    if dask is None:
        yield Pool()
        return
    try:
        from moescale.conversion.cluster import connect
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--dask needs {error.name}, which is not installed",
            hint="Run pip install '.[dask]' in the clone, or: pip install distributed",
        ) from None
    with connect(expand_user(dask)) as workers:
        yield workers


def _make_plan(
    source: Source,
    wanted: Options,
    target: Location | None,
    calibration: Calibration | None,
    measuring: Measuring,
    destination: Destination | None = None,
    overwrite: bool | None = None,
) -> Plan:
    """Make the plan, and attach its view; see `moescale.conversion.measured_plan.measured_plan`."""
    if calibration is None:
        made = make_plan(source, wanted, target, progress=measuring)
    else:
        from moescale.conversion.measured_plan import measured_plan

        made = measured_plan(source, wanted, target, calibration, destination, overwrite)
    remarks = () if target is None else remarks_on(target)
    return replace(made, view=PLAN_VIEW, warnings=(*made.warnings, *remarks))
