"""The tensors of a torch file (pytorch_model.bin), with nothing unpickled.

Since torch 1.6 such a file is a zip directory: data.pkl says what the tensors are, data/0, data/1 ... hold their bytes.
data.pkl is a program for a stack machine that can call any function. `_Reader` runs the few instructions that a
state_dict needs, and knows the names in NAMES only. A tensor is a place in the file until it is read.
"""

import os
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.files import READ_ERRORS, naming, open_regular, reason

# What data.pkl may name: the classes of storages, and the two functions that published files call.
STORAGES = {
    "torch HalfStorage": torch.float16,
    "torch FloatStorage": torch.float32,
    "torch BFloat16Storage": torch.bfloat16,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
NAMES = {*STORAGES, ORDERED_DICT, REBUILD}
MAX_PROGRAM = 2**24  # bytes of data.pkl: that of 12b has 2**17
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip: magic, lengths of name and extra field
FAULTS = (*READ_ERRORS, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error)


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a torch file: a view, with shape and stride in elements, of a storage."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int  # element of the storage
    begin: int  # byte of the file at which the storage begins

    def read(self) -> Tensor:
        """The values, contiguous. Reads only the part of the storage that they span. Raises UserError."""
        try:
            if 0 in self.shape:
                return torch.empty(self.shape, dtype=self.dtype)
            span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))
            data = torch.empty(span * self.dtype.itemsize, dtype=torch.uint8)
            with open_regular(self.path) as file:
                file.seek(self.begin + self.first * self.dtype.itemsize)
                if file.readinto(data.numpy()) < len(data):
                    raise OSError("it is shorter than it was")
            return data.view(self.dtype).as_strided(self.shape, self.stride).contiguous()
        except (OSError, ValueError, RuntimeError, OverflowError, TypeError) as error:  # the last three: of torch
            raise UserError(f"{self.path} cannot be read: {reason(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    begin: int
    count: int


@dataclass(frozen=True)
class _Name:
    name: str


_MARK = object()


def read_torch_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of a torch file by their names; no tensor is read yet. Runs no code from the file.

    Raises UserError if the file is damaged, names anything outside of NAMES, or is in the format before torch 1.6.
    """
    try:
        with naming(path), open_regular(path) as file:
            if not zipfile.is_zipfile(file):
                raise UserError(
                    f"{path} is not a zip file. If it is in torch's format before 1.6, only unpickling can read it; if "
                    f"you trust it, convert it: python -c \"import torch; f = '{path}'; "
                    f'torch.save(torch.load(f, weights_only=True), f)"'
                )
            with zipfile.ZipFile(file) as archive:
                return _Reader(path, file, archive).tensors()
    except FAULTS as error:
        raise UserError(f"{path} is not a torch file that can be read: {reason(error) or repr(error)}"[:500]) from None


class _Reader:
    """The stack machine of pickle, without its power to call. Every problem is a ValueError."""

    def __init__(self, path: Path, file, archive: zipfile.ZipFile):
        self.path, self.file, self.bytes = path, file, os.fstat(file.fileno()).st_size
        self.members = {info.filename: info for info in archive.infolist()}
        programs = [name for name in self.members if re.fullmatch("[^/]*/data.pkl", name)]
        if len(programs) != 1:
            raise ValueError("it has not exactly one data.pkl")
        if any(info.compress_type for info in self.members.values()) or self.members[programs[0]].flag_bits & 1:
            raise ValueError("it is compressed or encrypted")
        if self.members[programs[0]].file_size > MAX_PROGRAM:
            raise ValueError("data.pkl is too large")
        self.root = programs[0].removesuffix("data.pkl")
        if (order := f"{self.root}byteorder") in self.members and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        self.program = archive.read(programs[0])
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def tensors(self) -> dict[str, FileTensor]:
        for opcode, argument, position in pickletools.genops(self.program):
            if opcode.name == "STOP":
                break
            self._run(opcode.name, argument, position)
        if len(self.stack) != 1 or type(self.stack[0]) is not dict:
            raise ValueError("it holds no dictionary")
        for name, value in self.stack[0].items():
            if type(value) is not FileTensor:
                raise ValueError(f"its entry {name[:100]!r} is not a tensor")
        return self.stack[0]

    def _run(self, opcode: str, argument, position: int) -> None:
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "GLOBAL":
                if argument not in NAMES:
                    raise ValueError(f"it names {argument[:100]!r}, which no state_dict needs")
                self.stack.append(_Name(argument))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                self.stack.append(argument)
            case "NEWTRUE" | "NEWFALSE" | "NONE":
                self.stack.append({"NEWTRUE": True, "NEWFALSE": False, "NONE": None}[opcode])
            case "MARK":
                self.stack.append(_MARK)
            case "EMPTY_TUPLE" | "EMPTY_DICT":
                self.stack.append(() if opcode == "EMPTY_TUPLE" else {})
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "TUPLE":
                self.stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [self._pop() for _ in range(int(opcode[-1]))]
                self.stack.append(tuple(reversed(values)))
            case "BINPERSID":
                self.stack.append(self._storage(self._pop()))
            case "REDUCE":
                arguments, function = self._pop(), self._pop()
                self.stack.append(self._call(function, arguments))
            case "SETITEM" | "SETITEMS":
                values = self._since_mark() if opcode == "SETITEMS" else [self._pop(), self._pop()][::-1]
                for name, value in zip(values[::2], values[1::2], strict=True):
                    if type(self.stack[-1]) is not dict or type(name) is not str:
                        raise ValueError(f"data.pkl is no state_dict at byte {position}")
                    self.stack[-1][name] = value
            case "BUILD":  # the attribute _metadata of a state_dict: versions of its modules, which are not needed
                self._pop()
                if type(self.stack[-1]) is not dict:
                    raise ValueError(f"data.pkl is no state_dict at byte {position}")
            case _:
                raise ValueError(f"data.pkl has the instruction {opcode}, which no state_dict needs")

    def _pop(self):
        if self.stack[-1] is _MARK:
            raise ValueError("data.pkl takes a mark for a value")
        return self.stack.pop()

    def _since_mark(self) -> list:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _storage(self, identity) -> _Storage:
        """The storage that data.pkl calls ("storage", class, name of the file, device, number of elements)."""
        kind, storage, key, _, count = identity
        if kind != "storage" or type(key) is not str or type(count) is not int or type(storage) is not _Name:
            raise ValueError("data.pkl describes a storage in an unknown way")
        dtype, member = STORAGES[storage.name], self.members[f"{self.root}data/{key}"]
        self.file.seek(member.header_offset)
        magic, name, extra = LOCAL_HEADER.unpack(self.file.read(LOCAL_HEADER.size))
        begin = member.header_offset + LOCAL_HEADER.size + name + extra
        if magic != b"PK\3\4" or member.file_size != count * dtype.itemsize or begin + member.file_size > self.bytes:
            raise ValueError(f"data/{key[:20]} does not have {count} elements")
        return _Storage(dtype, begin, count)

    def _call(self, function, arguments):
        if type(function) is not _Name or type(arguments) is not tuple:
            raise ValueError("data.pkl calls what is no function")
        if function.name == ORDERED_DICT and not arguments:
            return {}
        if function.name != REBUILD or not 6 <= len(arguments) <= 7:
            raise ValueError(f"data.pkl calls {function.name}")
        storage, first, shape, stride = arguments[:4]
        numbers = (first, *shape, *stride)
        if type(storage) is not _Storage or len(shape) != len(stride) or not all(type(n) is int for n in numbers):
            raise ValueError("data.pkl describes a tensor in an unknown way")
        elements, last = 1, first
        for size, step in zip(shape, stride):
            elements *= size
            last += (size - 1) * step
        if min(numbers) < 0 or elements > storage.count or (elements and last >= storage.count):
            raise ValueError("a tensor is larger than its storage")
        if first > storage.count:
            raise ValueError("a tensor begins after its storage")
        return FileTensor(self.path, storage.dtype, tuple(shape), tuple(stride), first, storage.begin)
