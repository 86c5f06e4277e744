"""The little of torch that notebooks use around training, over numpy, for machines without torch.

It computes no gradients and trains nothing: rustune's engine does. Where torch is installed, torch itself answers.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from rustune.collators import default_data_collator
from rustune.tokenizer import TokenArray

__version__ = "0.0.0"  # below every version that a library could want
Tensor = TokenArray


class dtype(str):
    """A kind of number, by its name."""

    def __repr__(self) -> str:
        return f"torch.{str.__str__(self)}"

    __str__ = __repr__

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 2 if self == "bfloat16" else int(np.dtype(str.__str__(self)).itemsize)


float16 = half = dtype("float16")
bfloat16 = dtype("bfloat16")
float32 = float_ = dtype("float32")
float64 = double = dtype("float64")
int8, int16, int32, int64, uint8 = (dtype(name) for name in ("int8", "int16", "int32", "int64", "uint8"))
long, int_ = int64, int32
bool_ = dtype("bool")


class device(str):
    """A device by its name; everything is where the processor is, whatever the name says."""

    @property
    def type(self) -> str:
        """The kind of device."""
        return self.partition(":")[0]


class Generator:
    """A source of random numbers, which is only ever passed around."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = device

    def manual_seed(self, seed: int) -> Generator:
        """Returns the generator itself.

        Args:
            seed: Makes no difference.

        Returns:
            The generator.
        """
        return self


class Module:
    """torch.nn.Module's name, for those who ask whether something is one; nothing here is."""


class no_grad:
    """A context and a decorator that change nothing: no gradients are recorded here."""

    def __init__(self, mode: Any = True) -> None:
        pass

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that does the same."""

        @functools.wraps(function)
        def same(*arguments: Any, **options: Any) -> Any:
            return function(*arguments, **options)

        return same


inference_mode = enable_grad = set_grad_enabled = no_grad


class autocast(no_grad):
    """A context that changes nothing: the model's dtype chooses the arithmetic."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def tensor(data: Any, dtype: Any = None, **_: Any) -> TokenArray:
    """Makes an array.

    Args:
        data: Numbers, nested lists or an array.
        dtype: The kind of number; 32-bit floats for Python's floats.
        **_: Device and the like, which make no difference.

    Returns:
        The array.
    """
    made = np.array(data)
    if dtype is not None:
        made = made.astype(_numpy_name(dtype))
    elif made.dtype == np.float64 and not isinstance(data, np.ndarray):
        made = made.astype(np.float32)
    return made.view(TokenArray)


as_tensor = tensor


def _typed(name: str, kind: dtype) -> type[TokenArray]:
    """torch.LongTensor and the like: a name for annotations, and a function that makes an array of that kind."""

    def make(_: type[TokenArray], data: Any = ()) -> TokenArray:
        return tensor(data, kind)

    return type(name, (TokenArray,), {"__new__": make, "__doc__": f"Arrays of {kind!r}."})


LongTensor, IntTensor, BoolTensor = _typed("LongTensor", int64), _typed("IntTensor", int32), _typed("BoolTensor", bool_)
FloatTensor = _typed("FloatTensor", float32)


def from_numpy(array: Any) -> TokenArray:
    """Views an array.

    Args:
        array: The array.

    Returns:
        The same numbers.
    """
    made: TokenArray = np.asarray(array).view(TokenArray)
    return made


def _made_by(function: Callable[..., Any], default: str) -> Callable[..., TokenArray]:
    """zeros, ones: sizes one by one or as a sequence."""

    def make(*size: Any, dtype: Any = None, **_: Any) -> TokenArray:
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        made: TokenArray = function(shape, dtype=_numpy_name(dtype or default)).view(TokenArray)
        return made

    return make


zeros = _made_by(np.zeros, "float32")
ones = _made_by(np.ones, "float32")


def zeros_like(array: Any, **_: Any) -> TokenArray:
    """Makes zeros of an array's shape and kind.

    Args:
        array: The array.
        **_: Makes no difference.

    Returns:
        Zeros.
    """
    return from_numpy(np.zeros_like(np.asarray(array)))


def ones_like(array: Any, **_: Any) -> TokenArray:
    """Makes ones of an array's shape and kind.

    Args:
        array: The array.
        **_: Makes no difference.

    Returns:
        Ones.
    """
    return from_numpy(np.ones_like(np.asarray(array)))


def arange(*bounds: Any, **_: Any) -> TokenArray:
    """Counts.

    Args:
        *bounds: End, or start and end, or start, end and step.
        **_: Makes no difference.

    Returns:
        The numbers.
    """
    return from_numpy(np.arange(*bounds))


def cat(tensors: Sequence[Any], dim: int = 0) -> TokenArray:
    """Joins arrays along an axis they have.

    Args:
        tensors: The arrays.
        dim: The axis.

    Returns:
        One array.
    """
    return np.concatenate([np.asarray(one) for one in tensors], axis=dim).view(TokenArray)


def stack(tensors: Sequence[Any], dim: int = 0) -> TokenArray:
    """Joins arrays along a new axis.

    Args:
        tensors: The arrays.
        dim: Where the axis goes.

    Returns:
        One array.
    """
    return np.stack([np.asarray(one) for one in tensors], axis=dim).view(TokenArray)


def softmax(input: Any, dim: int = -1, **_: Any) -> TokenArray:
    """Turns scores into probabilities.

    Args:
        input: Scores.
        dim: The axis that adds up to 1.
        **_: Makes no difference.

    Returns:
        Probabilities.
    """
    scores = np.asarray(input)
    weights = np.exp(scores - scores.max(axis=dim, keepdims=True))
    return from_numpy(weights / weights.sum(axis=dim, keepdims=True))


def log_softmax(input: Any, dim: int = -1, **_: Any) -> TokenArray:
    """Turns scores into logarithms of probabilities.

    Args:
        input: Scores.
        dim: The axis whose probabilities add up to 1.
        **_: Makes no difference.

    Returns:
        Logarithms.
    """
    scores = np.asarray(input) - np.asarray(input).max(axis=dim, keepdims=True)
    return from_numpy(scores - np.log(np.exp(scores).sum(axis=dim, keepdims=True)))


def argmax(input: Any, dim: int | None = None, **_: Any) -> Any:
    """Finds where the largest value is.

    Args:
        input: Values.
        dim: The axis; None for all of them.
        **_: Makes no difference.

    Returns:
        Positions.
    """
    return np.asarray(np.argmax(np.asarray(input), axis=dim)).view(TokenArray)


def all(input: Any, dim: int | None = None) -> TokenArray:
    """Returns whether all values are true, of all or along an axis."""
    return np.asarray(np.all(np.asarray(input), axis=dim)).view(TokenArray)


def any(input: Any, dim: int | None = None) -> TokenArray:
    """Returns whether any value is true, of all or along an axis."""
    return np.asarray(np.any(np.asarray(input), axis=dim)).view(TokenArray)


def eq(input: Any, other: Any) -> TokenArray:
    """Returns where values are equal."""
    return np.asarray(np.equal(np.asarray(input), np.asarray(other))).view(TokenArray)


def isin(elements: Any, test_elements: Any) -> TokenArray:
    """Returns where values are among others."""
    return np.asarray(np.isin(np.asarray(elements), np.asarray(test_elements))).view(TokenArray)


def full(size: Any, fill_value: Any, *, dtype: Any = None, **_: Any) -> TokenArray:
    """Makes an array that holds one value everywhere.

    Args:
        size: Its shape.
        fill_value: The value.
        dtype: The kind of number; that of the value if not given.
        **_: Device and the like, which make no difference.

    Returns:
        The array.
    """
    return tensor(np.full(size, fill_value), dtype)


def exp(input: Any) -> TokenArray:
    """Returns e to the power of each value."""
    return np.asarray(np.exp(np.asarray(input))).view(TokenArray)


def log(input: Any) -> TokenArray:
    """Returns each value's natural logarithm."""
    return np.asarray(np.log(np.asarray(input))).view(TokenArray)


def mean(input: Any, dim: int | None = None) -> TokenArray:
    """Returns the mean, of all values or along an axis."""
    return np.asarray(np.mean(np.asarray(input), axis=dim)).view(TokenArray)


def is_tensor(value: Any) -> bool:
    """Tells whether something is an array of ours."""
    return isinstance(value, TokenArray)


def is_grad_enabled() -> bool:
    """Returns False: no gradients are recorded here."""
    return False


def manual_seed(seed: int) -> Generator:
    """Seeds Python's and numpy's generators.

    Args:
        seed: Any whole number.

    Returns:
        A generator.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    return Generator()


def compile(model: Any = None, **_: Any) -> Any:
    """Returns what it is given."""
    return model if model is not None else lambda same: same


def set_default_dtype(d: Any) -> None:
    """Does nothing: the model's dtype chooses the arithmetic."""


def set_float32_matmul_precision(precision: str) -> None:
    """Does nothing: the model's dtype chooses the arithmetic."""


class Dataset:
    """The parent of map-style datasets, which can be trained on: `__len__` and `__getitem__` are read."""


class IterableDataset(Dataset):
    """The parent of datasets that can only be read in order."""


class DataLoader:
    """Goes over a dataset batch by batch.

    Args:
        dataset: With `__len__` and `__getitem__`.
        batch_size: Rows of a batch.
        shuffle: Whether to draw an order for each pass, from numpy's generator.
        collate_fn: Makes a batch of rows.
        drop_last: Whether to leave out a last batch that is not full.
        **_: Workers and the like, which make no difference.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        collate_fn: Callable[[Any], Any] | None = None,
        drop_last: bool = False,
        **_: Any,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.collate_fn = collate_fn or default_data_collator
        self.drop_last = drop_last

    def __len__(self) -> int:
        rows = len(self.dataset)
        return rows // self.batch_size if self.drop_last else math.ceil(rows / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order: Iterable[int] = range(len(self.dataset))
        if self.shuffle:
            order = np.random.permutation(len(self.dataset)).tolist()
        listed = list(order)
        for at in range(len(self)):
            yield self.collate_fn([self.dataset[i] for i in listed[at * self.batch_size : (at + 1) * self.batch_size]])


def get_worker_info() -> None:
    """Returns None: this is no worker of a data loader."""


class _Switches(SimpleNamespace):
    """Settings that may be set and mean nothing here."""

    def is_available(self) -> bool:
        return False

    is_built = is_initialized = is_available


backends: Final = SimpleNamespace(
    cuda=_Switches(matmul=_Switches(allow_tf32=False)), cudnn=_Switches(), mps=_Switches(), mkl=_Switches()
)
distributed: Final = _Switches()
version: Final = SimpleNamespace(__version__=__version__, cuda=None, hip=None, git_version=None)


def _numpy_name(kind: Any) -> Any:
    """Numpy's name of a kind of number; it has no bfloat16."""
    name = str(kind).removeprefix("torch.")
    return "float32" if name == "bfloat16" else name
