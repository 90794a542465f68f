"""Names of tensors as the model defines them, without the words that wrappers add."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from moescale.errors import UnsupportedError

_WRAPPER: Final = re.compile(
    r"(?<![^.])(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|_forward_module|base_layer)\.)+"
)
"""Words of DataParallel, torch.compile, FSDP and its checkpointing, Lightning, and PEFT."""


def plain_name(name: str) -> str:
    """The name without the words of wrappers."""
    if "module" in name or "_orig_mod" in name or "base_layer" in name:
        return _WRAPPER.sub("", name)
    return name


_ADAPTER: Final = re.compile(
    r"(?<![^.])(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hada_w[12]|lokr_w[12]"
    r"|oft_[rR]|boft_[rRs]|ia3_l|vera_lambda_[bd]|randlora_\w+|modules_to_save)(?:[._]|$)"
)
"""Names of the tensors that PEFT adds: peft 0.17, `adapter_layer_names` of its tuners."""


def refuse_unmerged_adapter(names: Iterable[str]) -> list[str]:
    """Refuse an unmerged adapter of the routed experts or their routers.

    Returns:
        A warning if an adapter changes only other modules.

    Raises:
        UnsupportedError: an adapter changes tensors of the MoE.
    """
    found = [name for name in names if _ADAPTER.search(name)]
    for name in found:
        if re.search(r"experts|moe|gate\.|router", name) and "shared" not in name:
            raise UnsupportedError(
                f"{name}: belongs to an unmerged adapter (PEFT) of the MoE",
                hint="Merge it first: merge_and_unload(), then save_pretrained().",
            )
    if not found:
        return []
    return [
        f"{found[0]!r} belongs to an unmerged adapter (PEFT) of {len(found)} tensors; it is copied,"
        " because it does not change the routed experts"
    ]
