"""A folder of safetensors shards with a ``config.json``, as transformers writes it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from moescale.checkpoint.edit import TensorEdit
from moescale.errors import SourceError, UnsupportedError
from moescale.factors import closed_form
from moescale.families.config import CONFIG, Config, parse_config, set_count
from moescale.families.duplicate_counts import candidate_files, common_count, replace_count
from moescale.families.find import Moe
from moescale.families.formats import check_quantisation_config
from moescale.families.projections import Layer
from moescale.families.scale_key import Folded, fold_factor
from moescale.options import Options
from moescale.planning.experts import Experts
from moescale.planning.factors import one_factor
from moescale.planning.files import PROVENANCE, left_out_warnings, plan_files
from moescale.planning.formats.base import Output
from moescale.planning.overrides import ConfigOverrides, find_overrides
from moescale.planning.plan import Plan
from moescale.planning.shards import output_index
from moescale.planning.tensors import alternative, new_headers, scaled_weights
from moescale.planning.unsupported import refuse_other
from moescale.planning.weights import find_weights
from moescale.storage.base import Source


class SafetensorsCheckpoint:
    """See `moescale.planning.formats.base.Checkpoint`."""

    def __init__(self, source: Source, options: Options) -> None:
        """Read config, index and shard headers.

        Raises:
            SourceError: the checkpoint is malformed, incomplete or of another kind.
        """
        files = source.files()
        refuse_other(source, files)
        self._source, self._options = source, options
        self._config = _read_config(source, files)
        self._weights = find_weights(source, self._config, options)
        self.moe = self._weights.moe
        self.tensors = self._weights.tensors
        self.headers = self._weights.found.headers
        self.loader: str | None = self._config.loader
        again = f"the source is itself an output of moescale ({PROVENANCE}); its factors remain"
        self.warnings: Sequence[str] = [*self._weights.warnings, *([again] * (PROVENANCE in files))]

    def edits(self, factors: Mapping[Layer, float]) -> list[TensorEdit]:
        """The edit of every tensor that is scaled."""
        return scaled_weights(self.moe, factors, self.tensors, self._options)

    def remarks(
        self, edits: Sequence[TensorEdit], factors: Mapping[Layer, float], experts: Experts
    ) -> Iterator[str]:
        """Warnings about the planned changes."""
        yield from check_quantisation_config(
            edits, self._config.quantisation, alternative(self.moe, factors)
        )
        yield from _of_arch(self.moe, experts, self._options)

    def output(
        self, edits: Sequence[TensorEdit], factors: Mapping[Layer, float], experts: Experts
    ) -> Output:
        """The files of the output."""
        source, left_out = self._source, self._weights.left_out
        folded = self._folded(factors)
        text = self._new_text(folded)
        index = output_index(self._weights.found)
        others = {*self.headers, *left_out}
        others_edited, warnings = _second_files(source, self.moe, experts, others)
        files = plan_files(
            source.files(),
            self.headers,
            {edit.shard for edit in edits if edit.factor != 1.0},
            index and index[0],
            text != self._config.text,
            others_edited,
            left_out,
        )
        return Output(
            files=files,
            config=text.encode(),
            index=index,
            new_headers=new_headers(source, self.headers, edits),
            edited_files=others_edited,
            warnings=(*warnings, *left_out_warnings(files)),
            config_overrides=self._config_overrides(folded),
            fold_key=_fold_key(self.moe, self._options),
        )

    def _folded(self, factors: Mapping[Layer, float]) -> Folded | None:
        """The config with the factor in it; None if it cannot hold the factors.

        Raises:
            UnsupportedError: it cannot, and the user asked for it.
        """
        row = self.moe.architecture
        if self._options.fold == "config":
            return fold_factor(self._config, row, one_factor(factors, self._options))
        factor, *others = set(factors.values())
        if others:
            return None
        if factor == 1.0:
            return Folded(self._config.text)
        try:
            return fold_factor(self._config, row, factor)
        except UnsupportedError:
            return None

    def _new_text(self, folded: Folded | None) -> str:
        """The text of the output's config. Its numbers are replaced, and it is not parsed again."""
        options = self._options
        text = folded.text if options.fold == "config" and folded else self._config.text
        if options.experts is None:
            return text
        return set_count(text, self.moe.count_keys, options.experts)

    def _config_overrides(self, folded: Folded | None) -> ConfigOverrides | None:
        """The alternative: new values for the config instead of the weights."""
        options, moe = self._options, self.moe
        if folded is None or options.fold == "residual" or options.gate_scale is not None:
            return None
        model_type = self._config.model_type
        if model_type is None:
            model_type = moe.architecture.model_type
        return find_overrides(model_type, moe.count_keys, options.experts, folded.values)

    def completed(self, plan: Plan) -> Plan:
        """The plan, unchanged: it is already complete."""
        return plan


def _read_config(source: Source, files: Collection[str]) -> Config:
    if CONFIG not in files:
        inner = next((name for name in files if name.endswith(f"/{CONFIG}")), None)
        such = f", such as {inner.removesuffix(f'/{CONFIG}')} in it" if inner else ""
        raise SourceError(
            f"{source.identity.id}: has no {CONFIG}",
            hint="Give the folder or the repo that holds a model in the Hugging Face layout"
            f"{such}.",
        )
    return parse_config(source.read(CONFIG))


def _fold_key(moe: Moe, options: Options) -> str | None:
    """The config key that ``--fold config`` would multiply; None if there is none."""
    key = moe.architecture.scale_key if moe.architecture.can_fold else None
    return key if moe.config.has_scale and options.gate_scale is None else None


def _second_files(
    source: Source, moe: Moe, experts: Experts, others: Collection[str]
) -> tuple[dict[str, bytes], list[str]]:
    """Other files with the number of experts and their new content, and warnings about them."""
    edits: dict[str, bytes] = {}
    warnings: list[str] = []
    before, after = common_count(experts.before), experts.after
    if not isinstance(after, int):  # every layer keeps its own number
        return edits, warnings
    sizes = {name: file.size for name, file in source.files().items() if name not in others}
    for name in candidate_files(sizes):
        changed, notes = replace_count(name, source.read(name), before, after, moe.config.experts)
        warnings += notes
        if changed is not None:
            edits[name] = changed
    return edits, warnings


def _of_arch(moe: Moe, experts: Experts, options: Options) -> Iterator[str]:
    """A warning if --arch contradicts a known type of the config."""
    if moe.configured_router is None or moe.config.normalisation is None:
        return
    known_type, known_router = moe.configured_router
    n, _, m = experts.at(moe.layers[0])
    asked, known = (
        closed_form.preserve(n, m, router.balanced_weight, options.rho or 0.0)
        for router in (moe.config.normalisation, known_router)
    )
    yield (
        f"--arch {options.arch} contradicts {CONFIG}, whose model_type is {known_type!r}: the"
        f" router of {options.arch!r} gives the factor {asked:.4f}, that of {known_type!r}"
        f" {known:.4f}; tensor names are found without --arch"
    )
