"""What the user asked for, as one frozen object that refuses what is wrong by itself."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moescale.checkpoint.json_text import parse_strict
from moescale.errors import UsageError

Rule = Literal["preserve", "published", "gates", "measured", "none"]

Fold = Literal["weights", "config", "residual"]

RULES: tuple[Rule, ...] = ("preserve", "published", "gates", "measured", "none")


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


def parse_factors(text: str, where: str) -> dict[str, float]:
    """Factors by layer from ``{"factors": {"0": 1.2}}``, the bare mapping, or a provenance file.

    Raises:
        UsageError: the text is none of these.
    """
    try:
        content: Any = parse_strict(text)
    except ValueError as error:
        raise UsageError(f"{where}: is not valid JSON: {error}") from None
    if isinstance(content, dict) and "factors" in content:
        content = content["factors"]
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{where}: holds no factors", hint='It needs {"factors": {"0": 1.2}}.')
    for layer, factor in content.items():
        if type(factor) not in (int, float) or not -_LARGEST < factor < _LARGEST:
            shown = repr(factor)[:40] if isinstance(factor, (str, int, float)) else "something else"
            raise UsageError(f"{where}: the factor of layer {layer} is {shown}, not a number")
    return {layer: float(factor) for layer, factor in content.items()}


_LARGEST = 1e300
