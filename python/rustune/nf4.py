"""NF4, the 4-bit number format of QLoRA, for numpy arrays; bit for bit what bitsandbytes computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rustune._native import ConfigError, Nf4Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Nf4Tensor", "quantize"]


def quantize(
    array: ArrayLike, block_size: int = 64, double_quant: bool = False, *, dtype: str | None = None
) -> Nf4Tensor:
    """Quantize an array to 4 bits a number.

    Consecutive numbers of the row-major array share a scale, the largest magnitude among them.

    Args:
        array: float32, float16, or bfloat16 of the `ml_dtypes` package; of any shape and memory layout.
        block_size: How many numbers share a scale: a power of two from 32 to 4096.
        double_quant: Whether the scales are stored in 8 bits too.
        dtype: `"bfloat16"` if a uint16 array holds the bits of bfloat16 numbers.

    Returns:
        The quantized tensor. Its `dequantize()` gives float32 numbers rounded to the dtype of `array`.

    Raises:
        ConfigError: The dtype or the block size cannot be used.
        ShapeError: The array is empty.
        DataError: A number is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> tensor = quantize(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64))
        >>> tensor.packed.shape, tensor.absmax.tolist(), tensor.nbytes
        ((64,), [1.0, 1.0], 72)
    """
    values = np.asarray(array)
    kind = values.dtype.name
    if dtype is not None:
        if dtype == "bfloat16" and kind == "uint16":
            kind = "bfloat16"
        elif dtype != kind:
            message = f"dtype = {dtype}: the array is {kind}; only the bits of bfloat16 can come as uint16"
            raise ConfigError(message)
    if kind not in ("float32", "float16", "bfloat16"):
        message = (
            f"array.dtype = {kind}: expected float32, float16 or bfloat16; convert with .astype(numpy.float32)"
            + (', or pass dtype="bfloat16" if these are its bits' if kind == "uint16" else "")
        )
        raise ConfigError(message)
    flat = np.ascontiguousarray(values).reshape(-1)
    if not flat.dtype.isnative:
        flat = flat.astype(flat.dtype.newbyteorder("="))
    if kind != "float32":
        flat = flat.view(np.uint16)
    return Nf4Tensor.quantize(flat, list(values.shape), kind, block_size, double_quant)
