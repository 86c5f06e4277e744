"""`rustune.nf4`: the vectors of bitsandbytes through numpy, memory layouts, dtypes and errors."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rustune.nf4 as nf4
from rustune._native import ConfigError, DataError, RustuneError, ShapeError

CODE_BOOK = np.array(
    [float.fromhex(text) for text in (
        "-0x1p+0 -0x1.647362p-1 -0x1.0cd66p-1 -0x1.94654p-2 -0x1.23449ap-2 -0x1.7a6a7ep-3 -0x1.74f0e2p-4 0x0p+0 "
        "0x1.45f5fep-4 0x1.4995c6p-3 0x1.f809bap-3 0x1.5a0674p-2 0x1.c34970p-2 0x1.200f56p-1 0x1.722766p-1 0x1p+0"
    ).split()],
    dtype=np.float32,
)  # fmt: skip
THRESHOLDS = ((CODE_BOOK[:-1] + CODE_BOOK[1:]) / np.float32(2)).astype(np.float32)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, bfloat16 as its bits in uint16."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    dtypes = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}
    tensors = {}
    for name, about in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in about["data_offsets"])
            tensors[name] = np.frombuffer(data[start:end], dtypes[about["dtype"]]).reshape(about["shape"])
    return tensors


def widen(array: np.ndarray) -> np.ndarray:
    """float32 values of an array, whose uint16 are bits of bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def quantize(array: np.ndarray, block_size: int = 64, double_quant: bool = False) -> nf4.Nf4Tensor:
    return nf4.quantize(array, block_size, double_quant, dtype="bfloat16" if array.dtype == np.uint16 else None)


def twin(array: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed bytes and scales, straight from the definition."""
    flat = widen(array).reshape(-1)
    blocks = [flat[i : i + block_size] for i in range(0, flat.size, block_size)]
    absmax = np.array([np.abs(block).max() for block in blocks], dtype=np.float32)
    scaled = [
        block * (np.float32(1) / max(scale, np.float32(1e-38))) for block, scale in zip(blocks, absmax, strict=True)
    ]
    codes = np.searchsorted(THRESHOLDS, np.concatenate(scaled), side="left").astype(np.uint8)
    codes = np.append(codes, [7] * (codes.size % 2)).astype(np.uint8)
    return codes[0::2] << 4 | codes[1::2], absmax


def test_golden_vectors_of_every_block_size(golden: Path) -> None:
    tensors = read_safetensors(golden / "nf4_extra.safetensors")
    names = [name.removesuffix("/input") for name in tensors if name.endswith("/input")]
    assert len(names) == 24
    for name in names:
        tensor = quantize(tensors[f"{name}/input"], int(name.rsplit("_", 1)[1]))
        assert np.array_equal(tensor.packed, tensors[f"{name}/packed"].reshape(-1)), name
        assert np.array_equal(tensor.absmax, tensors[f"{name}/absmax"]), name
        assert tensor.dtype == {"f32": "float32", "f16": "float16", "bf1": "bfloat16"}[name[:3]]


def test_vectors_of_bitsandbytes(shared_data: Path) -> None:
    tensors = read_safetensors(shared_data / "nf4" / "nf4_golden.safetensors")
    cases = json.loads((shared_data / "nf4" / "nf4_golden.json").read_text())["cases"]
    assert len(cases) == 11
    for case in cases:
        name, block_size = case["name"], case["blocksize"]
        plain = quantize(tensors[f"{name}.input"], block_size)
        assert plain.shape == tuple(case["shape"])
        assert f"torch.{plain.dtype}" == case["dtype"]
        assert np.array_equal(plain.packed, tensors[f"{name}.plain.packed"].reshape(-1)), name
        assert np.array_equal(plain.absmax, tensors[f"{name}.plain.absmax"]), name
        assert np.array_equal(plain.dequantize(), widen(tensors[f"{name}.plain.dequant"])), name
        double = quantize(tensors[f"{name}.input"], block_size, double_quant=True)
        assert double.nested is not None
        codes, _, offset = double.nested
        assert np.array_equal(double.packed, tensors[f"{name}.dq.packed"].reshape(-1)), name
        # One step on near-ties.
        assert np.abs(codes.astype(int) - tensors[f"{name}.dq.absmax"]).max() <= 1, name
        assert offset == pytest.approx(float(tensors[f"{name}.dq.offset"][0]), rel=3e-7)


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 700),
    exponent=st.integers(5, 12),
    dtype=st.sampled_from(["<f4", "<f2"]),
)
def test_any_array_equals_the_definition(seed: int, size: int, exponent: int, dtype: str) -> None:
    array = np.random.default_rng(seed).normal(size=size).astype(dtype)
    tensor = nf4.quantize(array, 1 << exponent)
    packed, absmax = twin(array, 1 << exponent)
    assert np.array_equal(tensor.packed, packed)
    assert np.array_equal(tensor.absmax, absmax)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:size]
    back = CODE_BOOK[codes] * np.repeat(absmax, 1 << exponent)[:size]
    assert np.array_equal(tensor.dequantize(), back.astype(dtype).astype(np.float32))


def test_attributes() -> None:
    array = np.linspace(-1, 1, 3 * 70, dtype=np.float32).reshape(3, 70)
    plain, double = nf4.quantize(array), nf4.quantize(array, double_quant=True)
    assert (plain.shape, plain.dtype, plain.block_size, plain.double_quant) == ((3, 70), "float32", 64, False)
    assert plain.packed.dtype == np.uint8 and plain.packed.shape == (105,)
    assert plain.absmax.dtype == np.float32 and plain.absmax.shape == (4,)
    assert plain.nbytes == 105 + 4 * 4
    assert plain.nested is None
    assert double.double_quant and double.nested is not None
    assert np.abs(double.absmax - plain.absmax).max() < 0.01
    assert double.dequantize().shape == (3, 70) and double.dequantize().dtype == np.float32
    assert repr(plain) == "Nf4Tensor(shape=(3, 70), dtype='float32', block_size=64, double_quant=False)"
    assert repr(nf4.quantize(array[0])) == "Nf4Tensor(shape=(70,), dtype='float32', block_size=64, double_quant=False)"


def test_memory_layout_does_not_matter() -> None:
    array = np.random.default_rng(5).normal(size=(48, 96)).astype(np.float32)
    want = nf4.quantize(array)
    big_endian = array.astype(">f4")
    strided = np.repeat(array, 2, axis=1)[:, ::2]
    for same in (np.asfortranarray(array), strided, array.T.copy().T, big_endian, array[::-1][::-1]):
        tensor = nf4.quantize(same)
        assert np.array_equal(tensor.packed, want.packed)
        assert tensor.shape == (48, 96)
    read_only = array.copy()
    read_only.flags.writeable = False
    assert np.array_equal(nf4.quantize(read_only).packed, want.packed)
    half = array.astype(np.float16)
    assert np.array_equal(nf4.quantize(half.T).packed, nf4.quantize(half.T.copy()).packed)
    assert nf4.quantize(np.float32(3)).shape == ()


def test_bfloat16_by_its_bits() -> None:
    values = np.random.default_rng(6).normal(size=(5, 33)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    by_bits = nf4.quantize(bits, dtype="bfloat16")
    assert by_bits.dtype == "bfloat16"
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(by_bits.packed, nf4.quantize(wide).packed)
    back = by_bits.dequantize()
    assert not np.any(back.view(np.uint32) & 0xFFFF)  # values of bfloat16


def test_bfloat16_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.arange(0x3F00, 0x3F00 + 90, dtype=np.uint16).reshape(2, 45)
    by_name = nf4.quantize(bits.view(ml_dtypes.bfloat16).T)
    by_bits = nf4.quantize(bits.T, dtype="bfloat16")
    assert (by_name.dtype, by_name.shape) == ("bfloat16", (45, 2))
    assert np.array_equal(by_name.packed, by_bits.packed)


@pytest.mark.parametrize("dtype", ["float64", "int8", "int64", "bool", "complex64", "uint16", "U3", "O"])
def test_other_dtypes_are_refused_by_name(dtype: str) -> None:
    array = np.zeros((4, 4), dtype=dtype)
    with pytest.raises(ConfigError, match=array.dtype.name):
        nf4.quantize(array)


def test_errors_name_the_thing() -> None:
    array = np.ones((4, 8), dtype=np.float32)
    for block_size in (0, -64, 16, 48, 8192):
        with pytest.raises(ConfigError, match=f"block_size = {block_size}"):
            nf4.quantize(array, block_size)
    with pytest.raises(ConfigError, match="bfloat16"):
        nf4.quantize(array, dtype="bfloat16")
    with pytest.raises(ShapeError, match="at least one value"):
        nf4.quantize(np.zeros((0, 4), dtype=np.float32))
    for value, name in ((np.nan, "NaN"), (np.inf, "inf")):
        broken = array.copy()
        broken[2, 5] = value
        with pytest.raises(DataError, match=rf"\[2, 5\] is {name}"):
            nf4.quantize(broken)
    assert issubclass(ConfigError, RustuneError) and issubclass(ConfigError, ValueError)


def test_threads_may_quantize_at_once() -> None:
    array = np.random.default_rng(7).normal(size=(2048, 2048)).astype(np.float32)
    want = nf4.quantize(array, double_quant=True).packed
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(nf4.quantize(array, double_quant=True).packed)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(result, want) for result in results)
