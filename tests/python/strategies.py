"""What people hand over by mistake, for property tests: values of any kind, cells of tables, turns of conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

# Numbers that fit no register, halves of surrogate pairs (which are in no text of UTF-8), and what is no JSON.
HUGE = st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400])
BROKEN_TEXTS = st.text(st.characters(categories=("Cs", "Lu")), min_size=1, max_size=3)
FOREIGN = (
    st.binary(max_size=3) | st.complex_numbers(max_magnitude=2) | st.sampled_from([object(), print, range(2), {1}])
)

VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    HUGE,
    st.floats(),
    st.text(max_size=5),
    BROKEN_TEXTS,
    FOREIGN,
    st.lists(st.one_of(st.integers(-2, 400), st.text(max_size=3), st.none()), max_size=3),
    st.lists(st.lists(st.integers(-2, 400), max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.dictionaries(st.integers(0, 3), st.none(), max_size=2),
    st.just(np.array([[1.5, 2.0]])),
    st.sampled_from([Path("gone"), np.float32(2), np.int64(-1)]),
)
"""Whatever may stand where an argument goes."""

CELLS: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | HUGE
    | BROKEN_TEXTS
    | FOREIGN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
"""What stands in the cells of a table, right and wrong."""

TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "wizard"]) | CELLS,
        "content": st.text(max_size=8) | CELLS,
        "from": st.sampled_from(["human", "gpt", "wizard"]) | CELLS,
        "value": st.text(max_size=8) | CELLS,
    },
)
"""Turns of conversations in either form, right and wrong."""
