"""The options of a run: one table row for each, and one frozen record of their checked values."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import struct
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    TypeGuard,
    get_args,
    get_type_hints,
)

from moescale.checkpoint.json_text import parse_strict
from moescale.errors import UsageError

Rule = Literal["preserve", "published", "gates", "measured", "fitted", "none"]

Fold = Literal["weights", "config", "scale", "residual"]

RULES: tuple[Rule, ...] = get_args(Rule)

FOLDS: tuple[Fold, ...] = get_args(Fold)

DEVICES = ("auto", "cpu", "cuda", "mps")
"""Where a model may run; ``auto`` uses a GPU if there is one."""

RUN_RULES: tuple[Rule, ...] = ("measured", "fitted")
"""The rules that run the model."""

StrPath = str | os.PathLike[str]


def _choices(values: Sequence[str], default: str) -> str:
    """The values of an option in words, the default first."""
    return ", ".join([f"{default} (default)", *(value for value in values if value != default)])


class Option(NamedTuple):
    """The table row of an option.

    The command, its completion, the signatures and docstrings of the API, and docs/options.md are
    generated from these rows.

    Attributes:
        help: its meaning, if possible in one line of ``--help``.
        metavar: the name of its value; empty for a switch.
        panel: its heading in ``--help``.
        flags: its spellings; by default ``--`` and the name with dashes.
        kind: type of the value on the command line.
        more: further text for docs/options.md and the API.
        python: further text for the API.
        completes: whether the shell completes its values; see `moescale.api.values`.
    """

    help: str
    metavar: str = ""
    panel: str = "Options"
    flags: tuple[str, ...] = ()
    kind: type = str
    more: str = ""
    python: str = ""
    completes: bool = False

    @property
    def text(self) -> str:
        """The full description, for the command and the API."""
        return f"{self.help} {self.more}".rstrip()

    def spellings(self, name: str) -> tuple[str, ...]:
        """The spellings of the option `name` on the command line."""
        return self.flags or (f"--{name.replace('_', '-')}",)


FACTOR, HUB, MODEL, OUTPUT = (
    "Which factor, and where it goes",
    "The Hub",
    "Models that are not in the table, or have several MoEs",
    "Execution and output",
)
"""Headings of all options except the first."""


class ChoiceOptions(TypedDict, total=False):
    """Options in which the plans of one table may differ."""

    experts: Annotated[
        int | None,
        Option(
            "Experts per token in the output (required).",
            "M[,M...]",
            flags=("-k", "--experts"),
            kind=int,
            more="Optional with --factor, --factors or --gate-scale, and when --verify finds a"
            " finished output.",
        ),
    ]
    rule: Annotated[
        Rule | None,
        Option(
            f"How factors are found: {_choices(RULES, 'gates')}.",
            "RULE",
            FACTOR,
            more="The default is preserve if the router cannot be computed.",
            completes=True,
        ),
    ]


class FactorOptions(TypedDict, total=False):
    """Options that decide the factors and where they are applied."""

    trained_experts: Annotated[
        int | None,
        Option(
            "Trained experts per token; default: the config's.",
            "N",
            FACTOR,
            ("-n", "--trained-experts"),
            int,
            more="Use 1 for a merge of dense models.",
        ),
    ]
    calibrate: Annotated[
        StrPath | None,
        Option(
            "Text to run the model on; default: its own output.",
            "FILE",
            FACTOR,
            kind=Path,
            more="At least 2,048 tokens; the first 65,536 are used. Needs torch, transformers and"
            " accelerate.",
        ),
    ]
    calibrate_out: Annotated[
        StrPath | None,
        Option(
            "Save the model's own text here.",
            "FILE",
            FACTOR,
            kind=Path,
            more="--calibrate can use it again.",
        ),
    ]
    device: Annotated[
        str | None,
        Option(
            f"Device for models: {_choices(DEVICES, 'auto')}.",
            "DEVICE",
            FACTOR,
            completes=True,
        ),
    ]
    max_memory: Annotated[
        str | int | None,
        Option(
            "Main memory for running the model, such as 8GiB.",
            "SIZE",
            FACTOR,
            more="The rest of the model is offloaded to disk.",
            python="A number means bytes.",
        ),
    ]
    fold: Annotated[
        Fold | None,
        Option(
            f"Where the factor goes: {_choices(FOLDS, 'weights')}.",
            "WHERE",
            FACTOR,
            more="config: multiply the model's own routed scaling key and change no weight; scale:"
            " the same with a .scale tensor in each layer (GGUF); residual: divide the embedding"
            " and the attention outputs instead of scaling the experts (gpt-oss).",
            completes=True,
        ),
    ]
    rho: Annotated[
        float | None,
        Option("Correlation of expert outputs, 0 to 1; default 0.", "R", FACTOR, kind=float),
    ]
    factor: Annotated[
        float | None, Option("This factor instead of a rule.", "F", FACTOR, kind=float)
    ]
    factors: Annotated[
        Mapping[str, float] | Mapping[int, float] | StrPath | None,
        Option(
            "Factors by layer as JSON, or a moescale.json.",
            "FILE",
            FACTOR,
            kind=Path,
            python='Also a mapping such as {0: 1.2} or {"mtp.0": 1.2}.',
        ),
    ]
    gate_scale: Annotated[
        float | None,
        Option(
            "Multiply router logits; above 1 sharpens the gate.",
            "F",
            FACTOR,
            kind=float,
            more="Below 1 flattens it.",
        ),
    ]
    part: Annotated[
        str | None,
        Option("The MoE to rescale, if there are several.", "NAME", MODEL, completes=True),
    ]
    arch: Annotated[
        str | None, Option("Treat the model as this model type.", "TYPE", MODEL, completes=True)
    ]
    pattern: Annotated[
        str | None,
        Option(
            "Regular expression for down-projection names.",
            "REGEX",
            MODEL,
            more="For an unknown architecture, together with --experts-key.",
        ),
    ]
    experts_key: Annotated[
        str | None,
        Option("Config key of experts per token, with --pattern.", "KEY", MODEL),
    ]


class Rescaling(ChoiceOptions, FactorOptions, total=False):
    """Keywords of `moescale.plan`, `convert` and `verify` that decide what is rescaled, and how.

    `help(moescale.plan)` describes each. None means: not given.
    """


class SourceOptions(TypedDict, total=False):
    """Options for reading the source."""

    revision: Annotated[str | None, Option("Branch, tag or commit of an org/name.", "REV", HUB)]


class DestinationOptions(TypedDict, total=False):
    """Options for writing the destination."""

    overwrite: Annotated[
        bool,
        Option(
            "Replace what the destination holds.",
            kind=bool,
            more="With --verify, in a finished output of the same job on disk: rewrite only the"
            " files that differ.",
        ),
    ]
    private: Annotated[
        bool | None,
        Option(
            "Visibility of a new repo; default: your setting.",
            panel=HUB,
            flags=("--private/--public",),
            kind=bool,
        ),
    ]
    create_pr: Annotated[
        bool,
        Option(
            "Open a pull request instead of a commit.",
            panel=HUB,
            kind=bool,
            more="Also needs write access.",
        ),
    ]
    commit_message: Annotated[str | None, Option("Message of the final commit.", "TEXT", HUB)]
    follow_links: Annotated[
        bool,
        Option(
            "Also upload files that SRC links to elsewhere.",
            panel=HUB,
            kind=bool,
            more="Linked shards are always uploaded; a local output has every linked file.",
        ),
    ]


class ReportOptions(TypedDict, total=False):
    """The option for a page."""

    report: Annotated[
        StrPath | None,
        Option("Also write the plan as an HTML page.", "FILE", OUTPUT, kind=Path),
    ]


class EvaluateOptions(TypedDict, total=False):
    """The option for measuring losses."""

    evaluate: Annotated[
        StrPath | None,
        Option(
            "Show the loss on this text.",
            "FILE",
            kind=Path,
            more="For the model as trained, with only the config edited, and with the plan, without"
            " writing; after a run, for the output. Needs torch, transformers and accelerate.",
        ),
    ]


class VerificationOptions(TypedDict, total=False):
    """The option for verifying the output."""

    verify: Annotated[
        bool,
        Option(
            "Verify every byte of the output.",
            kind=bool,
            more="Without other options, a finished output is verified with its own.",
        ),
    ]


class ExecutionOptions(TypedDict, total=False):
    """Options for parallel work."""

    jobs: Annotated[
        int | None,
        Option(
            "Shards in parallel; default: one per core, at most 8; 2 to the Hub.",
            "N",
            OUTPUT,
            ("-j", "--jobs"),
            int,
            more="Cores without a shard of their own edit large tensors of the others.",
        ),
    ]
    dask: Annotated[
        StrPath | None,
        Option(
            "Process the shards on a Dask cluster.",
            "ADDRESS",
            OUTPUT,
            more="The address of its scheduler, such as tcp://host:8786, or a scheduler file.",
            python="The workers need this version of moescale and access to all locations.",
        ),
    ]


class PlanOptions(
    Rescaling, SourceOptions, EvaluateOptions, DestinationOptions, ReportOptions, total=False
):
    """Keywords of `moescale.plan`."""


class CompareOptions(FactorOptions, SourceOptions, EvaluateOptions, ReportOptions, total=False):
    """Keywords of `moescale.compare`."""


class ConvertOptions(
    Rescaling,
    SourceOptions,
    VerificationOptions,
    EvaluateOptions,
    DestinationOptions,
    ReportOptions,
    ExecutionOptions,
    total=False,
):
    """Keywords of `moescale.convert`."""


class VerifyOptions(Rescaling, SourceOptions, ExecutionOptions, total=False):
    """Keywords of `moescale.verify`."""


def option_rows(keywords: type) -> dict[str, Option]:
    """The rows of a class of keywords, by name, in order of definition."""
    hints = get_type_hints(keywords, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def signature_and_doc(verb: Callable[..., Any], keywords: type) -> tuple[inspect.Signature, str]:
    """The signature of a verb with all its options, and its docstring with a line for each one."""
    signature, hints = inspect.signature(verb), get_type_hints(keywords)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    by_name, lines = inspect.Parameter.KEYWORD_ONLY, []
    for name, row in option_rows(keywords).items():
        default = False if hints[name] is bool else None
        named.append(inspect.Parameter(name, by_name, default=default, annotation=hints[name]))
        text = f"{name}: {row.text} {row.python}".rstrip()
        lines.append(_wrap(_LONG_OPTION.sub(lambda m: f"`{m[1].replace('-', '_')}`", text)))
    before, raises, after = (inspect.getdoc(verb) or "").partition("\nRaises:\n")
    of_python = "    TypeError: a keyword is unknown, or a location is not a path.\n"
    return signature.replace(parameters=named), "\n".join(
        [before.rstrip("\n"), *lines, raises + of_python + after]
    )


_LONG_OPTION = re.compile(r"--([a-z][a-z-]*)")

_wrap = textwrap.TextWrapper(
    100, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False
).fill


def wrong_keyword(verb: str, name: str, known: Sequence[str]) -> str:
    """The error message for a keyword that a verb does not have, with a suggestion."""
    message, rows = f"{verb}() has no option {name!r}", option_rows(ConvertOptions)
    if name in rows:
        return f"{message}; convert() has"
    short = (key for key, row in rows.items() if f"-{name}" in row.flags)
    meant = _SYNONYMS.get(name.lower()) or next(short, None)
    if meant is None or (meant in rows and meant not in known):
        meant = next(iter(difflib.get_close_matches(name, known, 1)), None)
    return message + (f"; {meant}?" if meant else "")


def not_a_path(verb: str, given: object) -> str:
    """The error message for a location that is not a path."""
    meant = f"; experts={given}?" if type(given) is int else ""
    return f"{verb}() takes a path or a repo as source and destination, not {given!r}{meant}"


_SYNONYMS: Mapping[str, str] = {
    "dry_run": "moescale.plan",
    "check": "verify",
    "force": "overwrite",
    "exist_ok": "overwrite",
    "token": "the variable HF_TOKEN",
    **dict.fromkeys(("k", "top_k", "topk", "m", "num_experts"), "experts"),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), "experts"),
    **dict.fromkeys(("experts_per_token", "active_experts", "n_experts"), "experts"),
    **dict.fromkeys(("trained", "original_experts", "from_experts"), "trained_experts"),
    **dict.fromkeys(("src", "model", "repo_id", "path", "checkpoint"), "source"),
    **dict.fromkeys(("dst", "out", "output", "output_dir", "target", "save_path"), "destination"),
    **dict.fromkeys(("workers", "num_workers", "threads", "num_threads", "n_jobs"), "jobs"),
    **dict.fromkeys(("method", "mode", "strategy"), "rule"),
    **dict.fromkeys(("scale", "scaling_factor", "scaling"), "factor"),
    **dict.fromkeys(("text", "dataset", "calibration"), "calibrate"),
    **dict.fromkeys(("architecture", "model_type"), "arch"),
    **dict.fromkeys(("callback", "progress_bar", "on_progress", "quiet"), "progress"),
}
"""Other words for our options, in lower case."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options that decide a plan; invalid values are refused.

    Attributes:
        experts: experts per token of the output.
        trained_experts: experts per token in training; None for the config's.
        rule: None with `factor` or `factors`, and for the default of the source.
        rho: correlation of expert outputs; None for 0.
        calibrate: the SHA-256 of the text; None for the model's own text.
        factor: replaces a rule.
        factors: by layer; they replace a rule.
        fold: where the factor goes; None for the weights.
        part: the MoE, if there are several.
        arch: the model type; None for the config's.
        gate_scale: multiplies the routers.
        pattern: a regular expression for the names of the down-projections.
        experts_key: the config key of the experts per token, with `pattern`.
    """

    experts: int | None = None
    trained_experts: int | None = None
    rule: Rule | None = None
    rho: float | None = None
    calibrate: str | None = None
    factor: float | None = None
    factors: Mapping[str, float] | None = None
    fold: Fold | None = None
    part: str | None = None
    arch: str | None = None
    gate_scale: float | None = None
    pattern: str | None = None
    experts_key: str | None = None

    def __post_init__(self) -> None:
        """Check each value, also against the others."""
        for name, value in (
            ("--experts", self.experts),
            ("--trained-experts", self.trained_experts),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be 1 or more")
        given = [self.rule is not None, self.factor is not None, self.factors is not None]
        if sum(given) > 1:
            raise UsageError("--rule, --factor and --factors exclude each other")
        if self.calibrate is not None and self.rule not in RUN_RULES:
            raise UsageError(
                "--calibrate goes with --rule fitted or measured; add one, or leave --calibrate out"
            )
        if self.rule is not None and self.rule not in RULES:
            raise UsageError(f"--rule is {self.rule!r}: it must be one of {', '.join(RULES)}")
        if (self.experts, self.factor, self.factors, self.gate_scale) == (None,) * 4:
            raise UsageError(
                "--experts is missing: the number of experts per token",
                hint="It is optional only with --factor, --factors or --gate-scale.",
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.rho is not None and not 0 <= self.rho <= 1:
            raise UsageError(f"--rho is {self.rho:g}: it must be from 0 to 1")
        if self.rho is not None and self.method not in (None, "preserve", "gates"):
            raise UsageError(
                f"--rho has no meaning for {self.method}; it is for preserve and gates"
            )
        if self.fold not in (None, *FOLDS):
            raise UsageError(f"--fold is {self.fold!r}: it must be one of {', '.join(FOLDS)}")
        if self.rule == "fitted" and self.fold in ("config", "residual"):
            raise UsageError(
                f"--fold {self.fold} needs one factor for all layers; --rule fitted gives each"
                " layer its own, and changes the routers"
            )
        if self.factor is not None:
            check_factor(self.factor, "--factor")
        for layer, factor in (self.factors or {}).items():
            file = getattr(self.factors, "file", "")
            check_factor(factor, f"{file}{': ' if file else ''}the factor of layer {layer}")
        for name in ("part", "arch", "pattern", "experts_key"):
            if getattr(self, name) == "":
                raise UsageError(f"--{name.replace('_', '-')} is empty")
        self._check_gate_scale()
        if (self.pattern is None) != (self.experts_key is None):
            raise UsageError(
                "--pattern and --experts-key need each other: the names of the down-projections,"
                " and the config key of the experts per token"
            )

    def _check_gate_scale(self) -> None:
        scales = getattr(self.factors, "router_scales", {})
        file = getattr(self.factors, "file", "")
        for layer, scale in scales.items():
            check_factor(scale, f"{file}{': ' if file else ''}the router scale of layer {layer}")
        if self.gate_scale is not None:
            check_factor(self.gate_scale, "--gate-scale")
            if any(scale != self.gate_scale for scale in scales.values()):
                raise UsageError(
                    "--gate-scale contradicts the router_scales of --factors",
                    hint="Leave --gate-scale out, or take the router_scales out of the file.",
                )
        if self.fold == "config" and (scales or self.gate_scale is not None):
            what = "--factors" if scales else "--gate-scale"
            raise UsageError(
                f"{what} changes the routers, but --fold config changes no weight",
                hint="Leave one of them out.",
            )
        if self.rule in RUN_RULES and self.gate_scale is not None:
            raise UsageError(
                f"--gate-scale does not go with --rule {self.rule}, which runs the unchanged model",
                hint="Use --rule gates, or measure the output of a run with --gate-scale.",
            )

    @property
    def method(self) -> str | None:
        """The rule, or ``factor`` or ``factors`` if they replace it; None for the default."""
        if self.factor is not None:
            return "factor"
        return "factors" if self.factors is not None else self.rule


def check_factor(factor: float, what: str = "the factor") -> None:
    """Refuse an unusable factor; `what` names it in the error.

    Raises:
        UsageError: it is not a number above 0 that float32 can hold.
    """
    try:
        (single,) = struct.unpack("<f", struct.pack("<f", factor))
    except OverflowError:
        single = math.inf
    if not 0 < single < math.inf:
        raise UsageError(f"{what} is {factor!r}: it must be above 0 and fit into float32")


def options_of(given: Rescaling, calibrate: str | None) -> Options:
    """The options from keywords; `calibrate` is the digest of the text.

    Numbers of other libraries, such as numpy, are accepted. Factors are a mapping.

    Raises:
        UsageError: a value is invalid.
    """
    values: dict[str, Any] = {**given, "calibrate": calibrate}
    values = {name: values[name] for name in Options.__dataclass_fields__ if name in values}
    for name in ("experts", "trained_experts"):
        if values.get(name) is not None:
            values[name] = int(_number(values[name], name, Integral))
    for name in ("rho", "factor", "gate_scale"):
        if values.get(name) is not None:
            values[name] = float(_number(values[name], name, Real))
    factors = values.get("factors")
    if isinstance(factors, Mapping):
        values["factors"] = factors_of(factors, "--factors")
    return Options(**values)


def _number(value: Any, name: str, kind: type) -> Any:
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    what = "a whole number" if kind is Integral else "a number"
    raise UsageError(f"--{name.replace('_', '-')} is {value!r}: it must be {what}")


def read_factors(path: StrPath) -> Factors:
    """Factors by layer from a file; see `parse_factors`.

    Raises:
        UsageError: the file cannot be read, or has no factors.
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:  # a pipe or a device may be endless
            data = file.read(FACTORS_BYTES + 1)
        if len(data) > FACTORS_BYTES:
            raise UsageError(f"--factors {path}: is too large for a file of factors")
        factors = parse_factors(data.decode("utf-8-sig"), str(path))
        factors.file = str(path)
        return factors
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error.reason
        raise UsageError(f"--factors {path}: {why}") from None


class Factors(dict[str, float]):
    """Factors by layer, with more from their file.

    Attributes:
        file: its path, for errors; empty without a file.
        router_scales: the scale of each layer's router; may be empty.
        made_for: facts about the job for which they were made; may be empty.
    """

    file: str = ""
    router_scales: Mapping[str, float] = MappingProxyType({})
    made_for: Mapping[str, Any] = MappingProxyType({})


def parse_factors(text: str, where: str) -> Factors:
    """Factors by layer from JSON; see `factors_of`.

    Raises:
        UsageError: the text has no factors.
    """
    try:
        content: Any = parse_strict(text)
    except ValueError as error:
        raise UsageError(f"{where}: is not valid JSON: {error}") from None
    return factors_of(content, where)


def factors_of(content: Any, where: str) -> Factors:
    """Factors by layer, and router scales if there are any.

    Args:
        content: ``{"factors": {"0": 1.2}, "router_scales": {"0": 1.1}}``, only the mapping of
            factors, or the content of a ``moescale.json``.
        where: its origin, for errors.

    Raises:
        UsageError: the content has none of these forms.
    """
    if isinstance(content, Factors):
        return content
    if not isinstance(content, Mapping) or "factors" not in content:
        return Factors(_factors(content, where, "factor"))
    factors = Factors(_factors(content["factors"], where, "factor"))
    if content.get("router_scales") not in (None, {}):
        factors.router_scales = _factors(content["router_scales"], where, "router scale")
    factors.made_for = made_for(content)
    return factors


def made_for(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The well-formed facts in a file of factors about the job for which they were made."""
    return {key: content[key] for key, ok in _MADE_FOR.items() if ok(content.get(key))}


def is_calibration(facts: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether the facts name a text, and how much of it was used."""
    if not isinstance(facts, dict):
        return False
    amounts = [facts[unit] for unit in ("tokens", "bytes") if unit in facts]
    return type(facts.get("text_sha256")) is str and [type(amount) for amount in amounts] == [int]


_FORM = 'Give {"factors": {"0": 1.2}}, or the moescale.json of an output.'


def _factors(content: Any, where: str, what: str) -> dict[str, float]:
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{where}: has no {what}s", hint=_FORM)
    if not any(str(layer)[-1:].isdigit() for layer in content):
        raise UsageError(f"{where}: is not a file of factors", hint=_FORM)
    for layer, factor in content.items():
        number = isinstance(factor, Real) and not isinstance(factor, bool)
        if not number or not -_LARGEST < factor < _LARGEST:
            shown = repr(factor)[:40] if isinstance(factor, (str, Real)) else "something else"
            raise UsageError(
                f"{where}: the {what} of layer {layer} is {shown}, not a number",
                hint=_FORM,
            )
    factors = {str(layer): float(factor) for layer, factor in content.items()}
    if len(factors) < len(content):  # 0 and "0"
        raise UsageError(f"{where}: names a layer twice")
    return factors


_MADE_FOR: Mapping[str, Callable[[Any], bool]] = {
    "experts": lambda value: isinstance(value, dict),
    "model_type": lambda value: isinstance(value, str),
    "gate_scale": lambda value: isinstance(value, Real),
    "rule": RULES.__contains__,
    "factors_rule": RULES.__contains__,
    "calibration": is_calibration,
}

FACTORS_BYTES = 8 << 20
"""Much larger than the provenance of any output."""

_LARGEST = 1e300
