"""Chooses the rule: the requested one, else ``gates`` if the router can be computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from moescale.checkpoint.tensor import Header, Tensor
from moescale.errors import CheckpointError, UnsupportedError
from moescale.families.find import Moe
from moescale.families.formats import takes_any_factor
from moescale.families.router_tensors import ScaledRouters
from moescale.options import Options
from moescale.planning.experts import Experts
from moescale.planning.tensors import find_scaled_routers

if TYPE_CHECKING:
    from moescale.planning.sampling import Routers

BY_DEFAULT = "default: it samples the model's own routers"


class RuleChoice(NamedTuple):
    """The chosen rule.

    Attributes:
        rule: its name, or ``factor`` or ``factors``.
        why: the reason for a default; None if the rule was requested.
        routers: the routers that ``gates`` samples; None for other rules.
    """

    rule: str
    why: str | None = None
    routers: Routers | None = None


def choose_rule(
    moe: Moe, experts: Experts, options: Options, headers: Mapping[str, Header]
) -> RuleChoice:
    """The requested rule, else the default.

    Raises:
        SourceError: ``gates`` was requested, but the routers cannot be computed; or scaling has no
            effect.
    """
    asked = options.method
    if asked is None and experts.trained == experts.after:
        return RuleChoice("none", "default, since the number of experts stays the same")
    if asked not in ("none", "fitted"):
        _check_effect(moe)
    if asked not in (None, "gates"):
        return RuleChoice(asked)
    if asked is None and options.fold != "residual" and not _takes_any_factor(moe):
        return RuleChoice("preserve", "default: this format takes only powers of two")
    from moescale.planning.sampling import find_gates  # here, since other rules need no numpy

    try:
        routers = find_gates(moe, headers)
    except (UnsupportedError, CheckpointError) as error:
        if asked is not None:
            raise
        why = f"default, since the router cannot be computed: {error.message}"
        return RuleChoice("preserve", why)
    return RuleChoice("gates", BY_DEFAULT if asked is None else None, routers)


def _check_effect(moe: Moe) -> None:
    """Refuse to scale experts if that has no effect.

    Raises:
        UnsupportedError: something after the experts removes every factor.
    """
    if not moe.config.scaling_has_effect:
        raise UnsupportedError(
            f"scaling has no effect on model type {moe.model_type!r}: {moe.architecture.no_effect}",
            hint="--rule none changes only the number of experts.",
        )


def remarks(rule: str, moe: Moe, experts: Experts, options: Options) -> Iterator[str]:
    """Warnings about the rule and the fold."""
    if options.fold == "residual":
        yield (
            "--fold residual equals scaling the experts except for the rounding of the divided"
            " weights and the epsilon of the norms, which stays the same while the residual stream"
            " shrinks"
        )
    changes = experts.trained != experts.after
    router = moe.config.normalisation
    if options.rule == "preserve" and changes and router and not router.renormalised:
        yield (
            "--rule preserve assumes a balanced gate, but the gate of a router that does not"
            " renormalise is far from balanced: on trained models, the rule lost more than the"
            " config edit alone (docs/study.md)"
        )
    if options.gate_scale not in (None, 1.0) and rule in ("preserve", "published"):
        yield (
            f"--rule {rule} assumes a balanced gate and ignores how --gate-scale changes the gate"
            " weights; --rule gates accounts for it"
        )


class ScalableParts(NamedTuple):
    """The parts of a model that the rule ``fitted`` can multiply.

    Attributes:
        routers: edits of the routers; None if their logits cannot be multiplied.
        experts: whether the down-projections take any factor, and scaling them has an effect.
        remarks: remarks for the user.
    """

    routers: ScaledRouters | None
    experts: bool
    remarks: Sequence[str]

    @property
    def biases(self) -> frozenset[str] | None:
        """Names of biases of the routers' logits; None if the logits cannot be multiplied."""
        return self.routers.biases if self.routers else None


def scalable_parts(moe: Moe, tensors: Sequence[Tensor]) -> ScalableParts:
    """The parts that can be multiplied.

    Raises:
        UnsupportedError: neither the experts nor the routers can.
    """
    routers, warnings = None, []
    try:
        routers = find_scaled_routers(moe, tensors)
    except (UnsupportedError, CheckpointError) as error:
        warnings.append(f"--rule fitted scales only the experts: {error.message}")
    why = None
    if not moe.config.scaling_has_effect:
        why = moe.architecture.no_effect
    elif not _takes_any_factor(moe):
        why = "the format of the experts takes only powers of two"
    if why is not None:
        if routers is None:
            raise UnsupportedError(
                f"--rule fitted can scale neither experts nor routers of {moe.model_type!r}: {why}",
                hint="--rule none changes only the number of experts.",
            )
        warnings.append(f"--rule fitted scales only the routers, not the experts: {why}")
    return ScalableParts(routers, why is None, warnings)


def _takes_any_factor(moe: Moe) -> bool:
    """Whether every projection can be multiplied by any number, not only by powers of two."""
    kinds = {
        tuple((suffix, tensor.dtype) for suffix, tensor in projection.by_suffix.items()): projection
        for projection in moe.projections
    }
    return all(takes_any_factor(projection.by_suffix) for projection in kinds.values())
