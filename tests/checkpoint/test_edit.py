"""The edit of one tensor: final, compared by all of its attributes, and a row for tables."""

from __future__ import annotations

import copy
import pickle

import pytest

from moescale.checkpoint.edit import Layer, TensorEdit
from moescale.checkpoint.tensor import Tensor

TENSOR = Tensor("w2", "BF16", (2,), 0, 4)
EDIT = TensorEdit(TENSOR, 1.5, layer=Layer("", 3), shard="model.safetensors")

CHANGES = {
    "tensor": TENSOR._replace(start=100, stop=104),
    "factor": 2.0,
    "operation": "divide",
    "store_as": "F32",
    "role": "scale",
    "format": "FP8",
    "layer": Layer("", 4),
    "shard": "other.safetensors",
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_edit_differs_from_another_in_any_attribute(name: str) -> None:
    """Also in those that its row does not have, such as the place of the bytes."""
    assert EDIT.with_(**{name: CHANGES[name]}) != EDIT
    assert EDIT.with_(**{name: getattr(EDIT, name)}) == EDIT


def test_an_edit_cannot_be_changed() -> None:
    """A plan is frozen, and so are its edits."""
    with pytest.raises(AttributeError, match="with_"):
        EDIT.factor = 2.0
    assert EDIT.factor == 1.5


def test_copies_are_equal() -> None:
    """Workers of a cluster get pickled edits; equal edits have equal hashes."""
    for same in (pickle.loads(pickle.dumps(EDIT)), copy.copy(EDIT), copy.deepcopy(EDIT)):
        assert same == EDIT
        assert hash(same) == hash(EDIT)


def test_an_edit_equals_its_row() -> None:
    """As a mapping it is compared like one."""
    assert dict(EDIT) == EDIT
    assert EDIT != {**EDIT, "factor": 2.0}
