"""Faults of other projects that break a test: their versions, and code that shows them.

Such a test is expected to fail, and reported if it passes: then the fault has been fixed, and
`versions` ends there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Fault:
    """A fault of one package."""

    package: str
    versions: str
    """The versions with the fault; open-ended until it is fixed."""
    tests: str
    """The ids of the tests that it breaks, as a regular expression."""
    raises: type[Exception]
    """The error that they fail with; any other failure is moescale's."""
    reason: str
    reproduction: str
    """A few lines that fail in the same way, without moescale."""

    @property
    def is_here(self) -> bool:
        """Whether the installed version has it."""
        try:
            installed = version(self.package)
        except PackageNotFoundError:
            return False
        return SpecifierSet(self.versions).contains(installed, prereleases=True)

    def is_met_by(self, test_id: str) -> bool:
        """Whether it breaks the test with this id."""
        return re.search(self.tests, test_id) is not None

    def __str__(self) -> str:
        return f"{self.package} {version(self.package)}: {self.reason}"


FAULTS = [
    Fault(
        package="transformers",
        versions=">=5.24",
        tests=r"test_routed_output_is_the_factor_times_the_original\[llama4-",
        raises=AttributeError,
        reason="Llama4ForConditionalGeneration reads image_outputs, which its text model never has",
        reproduction="""
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration
tiny = dict.fromkeys(("hidden_size", "head_dim", "intermediate_size", "vocab_size"), 8)
tiny |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
config = Llama4Config(text_config=tiny | {"pad_token_id": 0}, vision_config=tiny)
Llama4ForConditionalGeneration(config)(input_ids=torch.zeros(1, 2, dtype=torch.long))
""",
    ),
]

HERE = [fault for fault in FAULTS if fault.is_here]
