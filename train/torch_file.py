"""PyTorch's checkpoint files (``torch.save``), read and written without PyTorch.

Such a file is a zip archive: ``<name>/data.pkl`` is a pickle of plain values in which each tensor
is described, ``<name>/data/<key>`` are the numbers of a tensor's storage. A pickle can run any
program, so only what ``torch.load(weights_only=True)`` would take is read: opcodes of plain values,
and the few names below, none of which does anything but describe. All members are stored as they
are, so what is read into memory is never larger than the file.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np

from pipeline.errors import EvenmixError

TYPES = {
    "FloatStorage": np.dtype("float32"),
    "DoubleStorage": np.dtype("float64"),
    "HalfStorage": np.dtype("float16"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
}
# A thousand tensors are described in about 100 kB.
MAX_PICKLE_BYTES = 64 << 20
PROTOCOL = 2
PLAIN = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
CONTAINERS = {"EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
FILLING = {"MARK", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}
TENSORS = {"GLOBAL", "REDUCE", "BUILD", "BINPERSID"}
PUTS = {"BINPUT", "LONG_BINPUT"}
OPCODES = {"PROTO", "STOP", "BINUNICODE", "BINGET", "LONG_BINGET"}
OPCODES |= PLAIN | CONTAINERS | FILLING | TENSORS | PUTS


@dataclass(frozen=True, slots=True)
class Storage:
    """A row of ``size`` numbers in the file."""

    key: str
    dtype: np.dtype[Any]
    size: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in the file; offset and strides are in numbers, not in bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """An open file; ``value`` is what was saved, with a StoredTensor for each tensor.

    Raises:
        EvenmixError: the file cannot be read, is no such file, or holds more than plain values.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self._archive = zipfile.ZipFile(Path(path).expanduser())
        except (OSError, zipfile.BadZipFile) as error:
            raise EvenmixError(
                f"{path} is no whole PyTorch checkpoint ({error}); download it again, or save it "
                "with a PyTorch newer than 1.6"
            ) from error
        names = self._archive.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise EvenmixError(f"{path} is no PyTorch checkpoint: it has {len(pickles)} data.pkl")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in names and self._read("byteorder") != b"little":
            raise EvenmixError(f"{path} was written on a big-endian machine, which is not read")
        self.value = self._unpickle()

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._archive.close()

    def read(self, tensor: StoredTensor) -> np.ndarray:
        """Return the numbers of a tensor.

        Raises:
            EvenmixError: the file is damaged, or the description does not fit its storage.
        """
        storage = tensor.storage
        data = self._read(f"data/{storage.key}")
        ends = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
        if (
            len(data) != storage.size * storage.dtype.itemsize
            or math.prod(tensor.shape) > storage.size - tensor.offset
            or tensor.offset + sum(ends) >= max(storage.size, 1)
        ):
            raise EvenmixError(f"{self.path} is damaged: {tensor} is larger than its storage")
        numbers = np.frombuffer(data, storage.dtype)[tensor.offset :]
        strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)

    def _read(self, name: str) -> bytes:
        try:
            member = self._archive.getinfo(self._folder + name)
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise EvenmixError(f"{self.path}: {name} is compressed or encrypted; save it again")
            if name == "data.pkl" and member.file_size > MAX_PICKLE_BYTES:
                raise EvenmixError(f"{self.path}: {name} is larger than {MAX_PICKLE_BYTES} bytes")
            return self._archive.read(member)
        except (KeyError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            raise EvenmixError(
                f"{self.path} is damaged: {name}: {error}; download it again"
            ) from error

    def _unpickle(self) -> Any:
        data = self._read("data.pkl")
        try:
            _check_opcodes(data)
            return _Unpickler(io.BytesIO(data)).load()
        except (
            pickle.UnpicklingError,
            ArithmeticError,
            AttributeError,
            EOFError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise EvenmixError(
                f"{self.path} holds more than weights and plain values ({error}); it is not read, "
                "because it could run a program"
            ) from error


def write_torch_file(path: str, value: Any) -> None:
    """Save nested dicts of plain values and numpy arrays so that ``torch.load`` reads tensors.

    Raises:
        OSError: the file cannot be written; one that was there before is untouched.
    """
    whole = Path(path)
    part = whole.with_name(f"{whole.name}.part")
    tensors: list[np.ndarray] = []
    with zipfile.ZipFile(part, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle(value, tensors))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, tensor in enumerate(tensors):
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    part.replace(whole)


class _Rebuild:
    """Stands for torch._utils._rebuild_tensor_v2; a pickle can call it, but not change it."""

    __slots__ = ()

    def __call__(
        self,
        storage: Storage,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_: Any,
    ) -> StoredTensor:
        numbers = (offset, *shape, *strides)
        if (
            not isinstance(storage, Storage)
            or len(shape) != len(strides)
            or not all(isinstance(number, int) and number >= 0 for number in numbers)
        ):
            raise pickle.UnpicklingError("a tensor is described wrongly")
        return StoredTensor(storage, offset, tuple(shape), tuple(strides))


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
} | {("torch", name): dtype for name, dtype in TYPES.items()}


class _Unpickler(pickle.Unpickler):
    """Knows the names above and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _device, size = pid
        if kind != "storage" or not (isinstance(dtype, np.dtype) and isinstance(size, int)):
            raise pickle.UnpicklingError("a storage is described wrongly")
        return Storage(str(key), dtype, size)


def _check_opcodes(data: bytes) -> None:
    """Refuse opcodes that ``torch.save`` does not write, and a memo larger than the pickle."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name}")
        if opcode.name in PUTS and (not isinstance(argument, int) or argument > len(data)):
            raise pickle.UnpicklingError(f"memo {argument}")


def _pickle(value: Any, tensors: list[np.ndarray]) -> bytes:
    """Return the pickle of nested values; arrays are appended to ``tensors`` and described."""

    def encode(value: Any) -> bytes:
        if isinstance(value, dict):
            items = (encode(key) + encode(item) for key, item in value.items())
            return b"}(" + b"".join(items) + b"u"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(encode, value)) + b"t"
        if isinstance(value, np.ndarray):
            return described(value)
        # A plain value's opcodes, without those that begin and end a pickle.
        return pickle.dumps(value, PROTOCOL)[2:-1]

    def described(array: np.ndarray) -> bytes:
        kind = next(name for name, dtype in TYPES.items() if dtype == array.dtype)
        key = str(len(tensors))
        tensors.append(array)
        strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        storage = encode("storage") + f"ctorch\n{kind}\n".encode()
        storage = b"(" + storage + b"".join(map(encode, (key, "cpu", array.size))) + b"tQ"
        arguments = storage + b"".join(map(encode, (0, array.shape, strides, False)))
        no_hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + no_hooks + b"tR"

    return b"\x80\x02" + encode(value) + b"."
