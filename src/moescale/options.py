"""What the user asked for, as one frozen object that refuses what is wrong by itself."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal, TypedDict, TypeGuard

from moescale.checkpoint.json_text import parse_strict
from moescale.errors import UsageError

Rule = Literal["preserve", "published", "gates", "measured", "none"]

Fold = Literal["weights", "config", "residual"]

RULES: tuple[Rule, ...] = ("preserve", "published", "gates", "measured", "none")

StrPath = str | os.PathLike[str]


class Rescaling(TypedDict, total=False):
    """Keywords of `moescale.plan`, `convert` and `verify`: what shall be rescaled, and how.

    The names and meanings are those of the command's long options; None is as good as left out.

    Attributes:
        experts: experts per token of the output; required but with `factor`, `factors` or
            `gate_scale`.
        trained_experts: experts per token that the weights were trained for; default: the config's.
            1 restores a merge of dense models.
        rule: how the factor is found; default ``preserve``.
        rho: correlation of expert outputs, 0 to 1, for the rules ``preserve`` and ``gates``.
        factor: this one instead of a rule.
        factors: one for each MoE layer instead, by the layer's name (``"0"``, ``"mtp.0"``); or the
            path of a JSON file, or of the ``moescale.json`` of an earlier output.
        fold: where the factor goes; default ``weights``.
        gate_scale: what the routers' weights are multiplied by.
        part: which MoE of a checkpoint that has several.
        arch: treat the model as this model type.
        pattern: expression for the down-projections' names, for an architecture that is not known.
        experts_key: the config key of the experts per token, likewise.
        calibrate: path of the text for the rule ``measured``.
        max_memory: of main memory for weights then: bytes, or text such as ``8GiB``.
    """

    experts: int | None
    trained_experts: int | None
    rule: Rule | None
    rho: float | None
    factor: float | None
    factors: Mapping[str, float] | StrPath | None
    fold: Fold | None
    gate_scale: float | None
    part: str | None
    arch: str | None
    pattern: str | None
    experts_key: str | None
    calibrate: StrPath | None
    max_memory: str | int | None


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; a value that is wrong by itself is refused here.

    Attributes:
        experts: experts per token of the output; None keeps the config's number.
        trained_experts: experts per token that the weights were trained for; None: the config's.
        rule: how the factor is found; None where `factor` or `factors` is given.
        rho: correlation of expert outputs, 0 to 1.
        calibrate: SHA-256 of the text that the rule ``measured`` runs the model on.
        factor: this constant instead of a rule.
        factors: a factor for each MoE layer instead of a rule.
        fold: where the factor goes; ``config`` multiplies the model's own routed scaling key,
            ``residual`` divides what else writes into the residual stream.
        part: which MoE of a checkpoint that has several.
        arch: treat the model as this model type.
        gate_scale: what the router's weight is multiplied by, to sharpen or flatten the gate.
        pattern: expression for the names of the down-projections, for an unknown architecture.
        experts_key: config key of the experts per token, for an unknown architecture.
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
        """Check each value by itself and against the others."""
        for name, value in (
            ("--experts", self.experts),
            ("--trained-experts", self.trained_experts),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be 1 or more")
        given = [self.rule is not None, self.factor is not None, self.factors is not None]
        if sum(given) > 1:
            raise UsageError("--rule, --factor and --factors exclude each other")
        if (self.rule == "measured") != (self.calibrate is not None):
            raise UsageError(
                "--rule measured and --calibrate go together: the rule, and the text for it"
            )
        if self.rule is not None and self.rule not in RULES:
            raise UsageError(f"--rule is {self.rule!r}: it must be one of {', '.join(RULES)}")
        if (self.experts, self.factor, self.factors, self.gate_scale) == (None,) * 4:
            raise UsageError(
                "--experts is missing: how many experts a token shall be sent to",
                hint="It may be left out only with --factor, --factors or --gate-scale.",
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.rho is not None and not 0 <= self.rho <= 1:
            raise UsageError(f"--rho is {self.rho:g}: it must be from 0 to 1")
        if self.rho is not None and self.method not in ("preserve", "gates"):
            raise UsageError(
                f"--rho has no meaning for {self.method}; it goes with preserve and gates"
            )
        if self.fold not in (None, "weights", "config", "residual"):
            raise UsageError(f"--fold is {self.fold!r}: it must be weights, config or residual")
        if self.rule == "measured" and self.fold in ("config", "residual"):
            raise UsageError(
                f"--fold {self.fold} takes one factor for all layers, --rule measured gives each"
                " its own"
            )
        if self.factor is not None:
            check_factor(self.factor, "--factor")
        for layer, factor in (self.factors or {}).items():
            check_factor(factor, f"the factor of layer {layer}")
        for name in ("part", "arch", "pattern", "experts_key"):
            if getattr(self, name) == "":
                raise UsageError(f"--{name.replace('_', '-')} is empty")
        self._check_gate_scale()
        if (self.pattern is None) != (self.experts_key is None):
            raise UsageError(
                "--pattern and --experts-key go together: the down-projections' names, and the"
                " config key of the experts per token"
            )

    def _check_gate_scale(self) -> None:
        if self.gate_scale is None:
            return
        check_factor(self.gate_scale, "--gate-scale")
        if self.fold == "config":
            raise UsageError(
                "--gate-scale changes the routers, --fold config leaves every weight as it is",
                hint="Leave one of them out.",
            )
        if self.method == "measured":
            raise UsageError(
                "--gate-scale does not go with --rule measured, which runs the model as it is",
                hint="Use --rule gates, or measure the output of a run with --gate-scale.",
            )

    @property
    def method(self) -> str:
        """The rule, or ``factor`` or ``factors`` where those replace it."""
        if self.factor is not None:
            return "factor"
        return "factors" if self.factors is not None else self.rule or "preserve"


def check_factor(factor: float, what: str = "the factor") -> None:
    """Refuse a factor that cannot be multiplied by; `what` it is, for the error.

    Raises:
        UsageError: it is not a number above 0 that float32 can hold.
    """
    try:
        (single,) = struct.unpack("<f", struct.pack("<f", factor))
    except OverflowError:
        single = math.inf
    if not 0 < single < math.inf:
        raise UsageError(f"{what} is {factor!r}: it must be above 0, and float32 must hold it")


def options_of(given: Rescaling, calibrate: str | None) -> Options:
    """What was asked for; `calibrate` is the digest of its text.

    Numbers may be of any kind, such as those of numpy; a file of factors is read.

    Raises:
        UsageError: a value is wrong by itself, or no number.
    """
    values: dict[str, Any] = {**given, "calibrate": calibrate}
    values.pop("max_memory", None)
    for name in ("experts", "trained_experts"):
        if values.get(name) is not None:
            values[name] = int(_number(values[name], name, Integral))
    for name in ("rho", "factor", "gate_scale"):
        if values.get(name) is not None:
            values[name] = float(_number(values[name], name, Real))
    factors = values.get("factors")
    if isinstance(factors, Mapping):
        values["factors"] = _factors(factors, "--factors")
    elif factors is not None:
        values["factors"] = read_factors(factors)
    return Options(**values)


def _number(value: Any, name: str, kind: type) -> Any:
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    what = "a whole number" if kind is Integral else "a number"
    raise UsageError(f"--{name.replace('_', '-')} is {value!r}: it must be {what}")


def read_factors(path: StrPath) -> Factors:
    """Factors by layer from a file; see `parse_factors`.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    try:
        with open(path, "rb") as file:  # a pipe or a device may have no end
            data = file.read(FACTORS_BYTES + 1)
        if len(data) > FACTORS_BYTES:
            raise UsageError(f"--factors {path}: is too long for a file of factors")
        return parse_factors(data.decode("utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error.reason
        raise UsageError(f"--factors {path}: {why}") from None


class Factors(dict[str, float]):
    """Factors by layer; `made_for` is what their file says of the job that they are of."""

    made_for: Mapping[str, Any] = MappingProxyType({})


def parse_factors(text: str, where: str) -> Factors:
    """Factors by layer from ``{"factors": {"0": 1.2}}``, the bare mapping, or a provenance file.

    Raises:
        UsageError: the text is none of these.
    """
    try:
        content: Any = parse_strict(text)
    except ValueError as error:
        raise UsageError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(content, dict) or "factors" not in content:
        return Factors(_factors(content, where))
    factors = Factors(_factors(content["factors"], where))
    factors.made_for = {key: content[key] for key, ok in _MADE_FOR.items() if ok(content.get(key))}
    return factors


def is_calibration(facts: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether they name a text and how much of it was used."""
    if not isinstance(facts, dict):
        return False
    amounts = [facts[unit] for unit in ("tokens", "bytes") if unit in facts]
    return type(facts.get("text_sha256")) is str and [type(amount) for amount in amounts] == [int]


def _factors(content: Any, where: str) -> dict[str, float]:
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{where}: holds no factors", hint='It needs {"factors": {"0": 1.2}}.')
    for layer, factor in content.items():
        if not isinstance(layer, str):
            raise UsageError(f"{where}: the layer {layer!r} must be text, such as {str(layer)!r}")
        number = isinstance(factor, Real) and not isinstance(factor, bool)
        if not number or not -_LARGEST < factor < _LARGEST:
            shown = repr(factor)[:40] if isinstance(factor, (str, Real)) else "something else"
            raise UsageError(f"{where}: the factor of layer {layer} is {shown}, not a number")
    return {layer: float(factor) for layer, factor in content.items()}


_MADE_FOR: Mapping[str, Callable[[Any], bool]] = {
    "experts": lambda value: isinstance(value, dict),
    "model_type": lambda value: isinstance(value, str),
    "gate_scale": lambda value: isinstance(value, Real),
    "rule": RULES.__contains__,
    "factors_rule": RULES.__contains__,
    "calibration": is_calibration,
}

FACTORS_BYTES = 8 << 20
"""Much more than an earlier output's provenance has."""

_LARGEST = 1e300
