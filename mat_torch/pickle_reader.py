"""Reads the authors' pickles as data: nothing in a file is imported, called or compiled.

A pickle is a program for a stack machine that may import and call anything. Python's own reader
runs it; forbidding names there is not enough, since the BUILD and SETITEM instructions also reach
``__setstate__``, ``__setitem__`` and attributes of whatever lies on the stack. So the program runs
here on a machine of our own. It knows only the instructions a checkpoint needs, its names are
labels that are never imported, and what it builds are plain containers, numbers and the inert
records of this module.

The names in a released checkpoint, and no others, have a meaning:

- ``torch_utils.persistence._reconstruct_persistent_obj`` and six classes of ``torch.nn.modules``
  make a `Module`, which keeps the class name and the state (embedded source is dropped);
- ``dnnlib.util.EasyDict`` and ``collections.OrderedDict`` make dicts;
- ``torch.storage._load_from_bytes`` keeps its bytes, which ``torch.load(weights_only=True)`` reads
  once the tensor is wanted;
- ``torch._utils._rebuild_tensor_v2`` and ``_rebuild_parameter`` make a `TensorRecord`, whose sizes
  are checked against the storage before a tensor exists;
- ``numpy.dtype`` and ``numpy.core.multiarray.scalar`` make plain numbers.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "EasyDict",
    "Module",
    "PickleError",
    "TensorRecord",
    "load_weights_only",
    "module_tensors",
    "read_pickle",
    "shown",
]

_MAX_NAME = 512
"""Characters of a tensor's full name; the released ones have 70. It also bounds nesting."""

_MAX_INTEGER_BITS = 128
"""Sizes need 64; a limit keeps arithmetic on hostile integers cheap."""

_MAX_DIMENSIONS = 16
"""Dimensions of a tensor; the released ones have 5."""

_MAX_TENSORS = 100_000
"""Tensors of one network; the released ones have 487. Tables that refer to each other multiply."""

_HIGHEST_PROTOCOL = 5


class PickleError(ValueError):
    """A pickle that is damaged, or asks for something no MAT checkpoint needs. One sentence."""


def shown(text: str, limit: int = 120) -> str:
    """Text from a file as one printable line in quotes, so that it cannot forge a message."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")


# -- what a pickle may make ------------------------------------------------------------------------


class EasyDict(dict[str, Any]):
    """Stand-in for ``dnnlib.util.EasyDict``: a dict, without its attribute access."""


class Module:
    """Stand-in for a pickled module: data alone, with no behaviour of the class it names.

    Attributes:
        class_name: Name of the class in the authors' code, or under ``torch.nn.modules``.
        state: The module's ``__dict__``, its values built of the types of this file; None where
            the pickle gave none.
    """

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: dict[Any, Any] | None = None) -> None:
        self.class_name = class_name
        self.state = state

    def __repr__(self) -> str:
        return f"Module({shown(self.class_name)})"


class _Storage:
    """The bytes of a torch archive that holds one storage, read when first wanted."""

    __slots__ = ("_data", "_elements")

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data
        self._elements: Tensor | None = None

    def elements(self) -> Tensor:
        """All elements, [n]. Tensors of one storage share this memory."""
        if self._elements is None:
            assert self._data is not None, "the bytes go only once the elements are there"
            self._elements = _storage_elements(self._data)
            self._data = None
        return self._elements


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as a pickle describes it: a view of a storage.

    Attributes:
        storage: Where the elements are.
        offset: Index of the first element.
        size: Shape.
        stride: Steps in elements, one a dimension.
    """

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor, a view without a copy.

        Raises:
            PickleError: If the archive is refused or damaged, or the view leaves the storage.
        """
        elements = self.storage.elements()
        count = elements.numel()
        wanted = 1
        for size in self.size:
            wanted *= size
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)
        )
        # More elements than the storage has are repeated ones: a short file that claims to be huge.
        if wanted > count or self.offset > count or (wanted > 0 and last >= count):
            raise PickleError(
                f"a tensor of shape {list(self.size)}, strides {list(self.stride)} and offset "
                f"{self.offset} does not fit its storage of {count} elements; the file is damaged"
            )
        try:
            if wanted == 0:
                return torch.empty(self.size, dtype=elements.dtype)
            return elements.as_strided(self.size, self.stride, self.offset)
        except (RuntimeError, TypeError, OverflowError) as error:
            # Beside a dimension of 0 or 1, another size or stride may claim anything.
            raise PickleError(
                f"no tensor has the shape {list(self.size)} and strides {list(self.stride)}; "
                "the file is damaged"
            ) from error


# -- torch archives --------------------------------------------------------------------------------

_DTYPES = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    }
)


def load_weights_only(stream: IO[bytes]) -> Any:
    """What a torch archive (zip or legacy) holds, by ``torch.load(weights_only=True)``, on the CPU.

    Raises:
        PickleError: If the archive is damaged or holds more than tensors and plain data; the
            message names what it asked for.
    """
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types here, builtins among them
        # Message of torch.load: "... GLOBAL posix.system was not an allowed global by default".
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name:
            raise PickleError(
                f"a torch archive asks for {shown(name[1])}, which no state dict needs; "
                "it was refused and nothing was executed"
            ) from error
        raise PickleError("a torch archive is damaged, cut short or no state dict") from error


def _storage_elements(data: bytes) -> Tensor:
    loaded = load_weights_only(io.BytesIO(data))
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise PickleError(
            f"'torch.storage._load_from_bytes' is given a {shown(type(loaded).__name__)} "
            "instead of a storage"
        )
    if loaded.dtype not in _DTYPES:
        raise PickleError(f"a storage holds {loaded.dtype}, which no MAT checkpoint has")
    elements = torch.empty(0, dtype=loaded.dtype).set_(loaded)
    assert isinstance(elements, Tensor)
    # An archive may declare a storage and then not fill it: that would be uninitialised memory.
    if elements.device.type != "cpu" or elements.numel() * elements.element_size() > len(data):
        raise PickleError("a storage claims more elements than its archive holds")
    return elements


# -- the names -------------------------------------------------------------------------------------

_Arguments: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class _Name:
    """A name of the file that we know, and what calling it makes. A label: nothing is imported."""

    text: str
    make: Callable[[_Machine, _Name, _Arguments], Any]

    def misused(self, how: str) -> PickleError:
        return PickleError(f"'{self.text}' is {how}, which no MAT checkpoint does")


class _NumberType:
    """Stand-in for a NumPy dtype of plain numbers."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "="

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


_NUMBER_CODES = frozenset(
    ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
)


def _make_ordered_dict(machine: _Machine, name: _Name, arguments: _Arguments) -> dict[Any, Any]:
    if arguments:
        raise name.misused("called with arguments")
    return {}


def _make_easy_dict(machine: _Machine, name: _Name, arguments: _Arguments) -> EasyDict:
    if arguments:
        raise name.misused("called with arguments")
    return EasyDict()


def _make_torch_module(machine: _Machine, name: _Name, arguments: _Arguments) -> Module:
    if arguments:
        raise name.misused("called with arguments")
    return Module(name.text.rpartition(".")[2])


def _make_persistent(machine: _Machine, name: _Name, arguments: _Arguments) -> Module:
    """Argument: dict(type, version, module_src, class_name, state). The source is dropped."""
    if len(arguments) != 1 or not isinstance(arguments[0], dict):
        raise name.misused("called without its dict")
    meta = arguments[0]
    class_name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(class_name, str) or not isinstance(state, dict | None):
        raise name.misused("given a class name or state of the wrong type")
    return Module(class_name, {} if state is None else state)


def _make_storage(machine: _Machine, name: _Name, arguments: _Arguments) -> _Storage:
    if len(arguments) != 1 or not isinstance(arguments[0], bytes):
        raise name.misused("called with something else than bytes")
    # Bytes that the file holds once make one storage, however often they are called upon.
    return machine.storages.setdefault(id(arguments[0]), _Storage(arguments[0]))


def _make_tensor(machine: _Machine, name: _Name, arguments: _Arguments) -> TensorRecord:
    """Arguments: storage, offset, size, stride; then up to three more, which are dropped."""
    if not 4 <= len(arguments) <= 7:
        raise name.misused(f"called with {len(arguments)} arguments")
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, _Storage):
        raise name.misused("called without a storage")
    if not _is_sizes((offset,)) or not _is_sizes(size) or not _is_sizes(stride):
        raise name.misused("given sizes that are not tuples of whole numbers from 0 to 2**63 - 1")
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
        raise name.misused(f"given {len(size)} sizes and {len(stride)} strides")
    return TensorRecord(storage, offset, size, stride)


def _is_sizes(value: object) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _make_parameter(machine: _Machine, name: _Name, arguments: _Arguments) -> TensorRecord:
    """Arguments: tensor, requires_grad, hooks; the last two are dropped."""
    if len(arguments) != 3 or not isinstance(arguments[0], TensorRecord):
        raise name.misused("called without a tensor")
    return arguments[0]


def _make_number_type(machine: _Machine, name: _Name, arguments: _Arguments) -> _NumberType:
    """Arguments: code such as "f8"[, align, copy]."""
    code = arguments[0] if arguments else None
    if not isinstance(code, str) or code not in _NUMBER_CODES:
        of = shown(code) if isinstance(code, str) else "no code"
        raise name.misused(f"called with {of} instead of a plain number type")
    return _NumberType(code)


def _make_number(machine: _Machine, name: _Name, arguments: _Arguments) -> Any:
    """Arguments: number type, bytes. Returns a Python bool, int, float or complex."""
    if (
        len(arguments) != 2
        or not isinstance(arguments[0], _NumberType)
        or not isinstance(arguments[1], bytes)
    ):
        raise name.misused("called with something else than a number type and bytes")
    dtype, data = arguments[0].dtype(), arguments[1]
    if len(data) != dtype.itemsize:
        raise name.misused(f"given {len(data)} bytes for one {dtype}")
    return np.frombuffer(data, dtype)[0].item()


_MAKERS: dict[str, Callable[[_Machine, _Name, _Arguments], Any]] = {
    "collections.OrderedDict": _make_ordered_dict,
    "dnnlib.util.EasyDict": _make_easy_dict,
    "torch_utils.persistence._reconstruct_persistent_obj": _make_persistent,
    "torch.storage._load_from_bytes": _make_storage,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_parameter": _make_parameter,
    "numpy.dtype": _make_number_type,
    "numpy.core.multiarray.scalar": _make_number,
    "numpy._core.multiarray.scalar": _make_number,
}
_TORCH_MODULE = re.compile(
    r"torch\.nn\.modules\.[a-z]+\."
    r"(Sequential|ModuleList|Softmax|GELU|LayerNorm|AdaptiveAvgPool2d)"
)


def _find_name(module: str, attribute: str) -> _Name:
    """The label for a name of the file.

    Raises:
        PickleError: If no MAT checkpoint uses it.
    """
    text = f"{module}.{attribute}"
    make = _MAKERS.get(text)
    if make is None and _TORCH_MODULE.fullmatch(text):
        make = _make_torch_module
    # A pickle gives module and attribute apart; a dotted attribute would be a walk from object to
    # object, which is never meant here, even where the joined text looks right.
    if make is None or "." in attribute:
        raise PickleError(
            f"the pickle asks for {shown(text)}, which is no part of a MAT checkpoint; "
            "it was refused and nothing was executed"
        )
    return _Name(text, make)


# -- the machine -----------------------------------------------------------------------------------


class _Machine:
    """Runs one pickle. Frames of the stack between marks are lists of their own in `outer`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[int, _Storage] = {}

    def run(self, stream: IO[bytes]) -> Any:
        for name, argument in _operations(stream):
            if name == "STOP":
                break
            step = _STEPS.get(name)
            if step is None:
                raise PickleError(
                    f"the pickle uses the instruction {name}, which no MAT checkpoint needs; "
                    "it was refused and nothing was executed"
                )
            step(self, argument)
        return self.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        self.need(1)
        return self.stack.pop()

    def top(self) -> Any:
        self.need(1)
        return self.stack[-1]

    def need(self, count: int) -> None:
        if len(self.stack) < count:
            raise PickleError("the pickle takes more from its stack than it put there")

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        if not self.outer:
            raise PickleError("the pickle goes back to a mark that it did not set")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def pop_one_or_mark(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def push_tuple(self, count: int) -> None:
        self.need(count)
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def push_integer(self, value: int) -> None:
        if value.bit_length() > _MAX_INTEGER_BITS:
            raise PickleError(f"the pickle has a number of more than {_MAX_INTEGER_BITS} bits")
        self.push(value)

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"the pickle recalls memo {index}, which it never stored")
        self.push(self.memo[index])

    def stack_name(self) -> None:
        attribute, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise PickleError("the pickle makes a name of something else than text")
        self.push(_find_name(module, attribute))

    def call(self) -> None:
        """REDUCE and NEWOBJ: what a known name makes of its arguments."""
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, _Name):
            raise PickleError(f"the pickle calls a {type(name).__name__}, which is data")
        if not isinstance(arguments, tuple):
            raise name.misused("called without a tuple of arguments")
        self.push(name.make(self, name, arguments))

    def build(self) -> None:
        """BUILD: state for a module or a number type; nothing else here has any."""
        state, target = self.pop(), self.top()
        if isinstance(target, Module) and target.state is None and isinstance(state, dict):
            target.state = state
        elif isinstance(target, _NumberType) and _is_number_state(state):
            target.order = state[1]
        else:
            what = target.text if isinstance(target, _Name) else type(target).__name__
            raise PickleError(f"the pickle gives a state to {shown(what)}, which takes no such one")

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise PickleError(f"the pickle appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError(f"the pickle sets items of a {type(target).__name__}")
        for key in items[::2]:
            _check_key(key)
        target.update(zip(items[::2], items[1::2], strict=True))

    def add_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not set:
            raise PickleError(f"the pickle adds to a {type(target).__name__}")
        for key in items:
            _check_key(key)
        target.update(items)

    def pop_pair(self) -> list[Any]:
        value, key = self.pop(), self.pop()
        return [key, value]


def _check_key(key: object) -> None:
    # Hashing nested tuples takes exponential time where they share parts, and no depth is safe.
    if type(key) not in (str, int):
        raise PickleError(f"the pickle has a {type(key).__name__} as a key, not text or a number")


def _is_number_state(state: object) -> bool:
    """(version, byte order, subarray, names, fields, size, alignment, flags) without structure."""
    return (
        isinstance(state, tuple)
        and len(state) >= 5
        and isinstance(state[1], str)
        and state[1] in ("<", ">", "=", "|")
        and all(part is None for part in state[2:5])
    )


def _check_protocol(protocol: int) -> None:
    if protocol > _HIGHEST_PROTOCOL:
        raise PickleError(
            f"the pickle has protocol {protocol}; up to {_HIGHEST_PROTOCOL} can be read"
        )


def _global_name(argument: str) -> _Name:
    """The argument of GLOBAL and INST is both parts with a space between."""
    module, _, attribute = argument.partition(" ")
    return _find_name(module, attribute)


def _refuse_instance(argument: str) -> None:
    name = _global_name(argument)  # an unknown one is reported by name
    raise name.misused("called by the instruction INST")


def _refuse_persistent_id() -> None:
    raise PickleError("the pickle refers to an object outside itself (a persistent id)")


_Step: TypeAlias = Callable[[_Machine, Any], object]


def _steps() -> dict[str, _Step]:
    """Instruction → what it does; the second argument is the instruction's own."""
    steps: dict[str, _Step] = {
        # Bookkeeping.
        "PROTO": lambda m, a: _check_protocol(a),
        "FRAME": lambda m, a: None,
        "MARK": lambda m, a: m.mark(),
        "POP": lambda m, a: m.pop_one_or_mark(),
        "POP_MARK": lambda m, a: m.pop_to_mark(),
        "MEMOIZE": lambda m, a: m.memo.update({len(m.memo): m.top()}),
        # Constants and containers.
        "NONE": lambda m, a: m.push(None),
        "NEWTRUE": lambda m, a: m.push(True),
        "NEWFALSE": lambda m, a: m.push(False),
        "EMPTY_LIST": lambda m, a: m.push([]),
        "EMPTY_DICT": lambda m, a: m.push({}),
        "EMPTY_SET": lambda m, a: m.push(set()),
        "EMPTY_TUPLE": lambda m, a: m.push(()),
        "TUPLE": lambda m, a: m.push(tuple(m.pop_to_mark())),
        "TUPLE1": lambda m, a: m.push_tuple(1),
        "TUPLE2": lambda m, a: m.push_tuple(2),
        "TUPLE3": lambda m, a: m.push_tuple(3),
        "APPEND": lambda m, a: m.append([m.pop()]),
        "APPENDS": lambda m, a: m.append(m.pop_to_mark()),
        "SETITEM": lambda m, a: m.set_items(m.pop_pair()),
        "SETITEMS": lambda m, a: m.set_items(m.pop_to_mark()),
        "ADDITEMS": lambda m, a: m.add_items(m.pop_to_mark()),
        # Names.
        "GLOBAL": lambda m, a: m.push(_global_name(a)),
        "STACK_GLOBAL": lambda m, a: m.stack_name(),
        "REDUCE": lambda m, a: m.call(),
        "NEWOBJ": lambda m, a: m.call(),
        "BUILD": lambda m, a: m.build(),
        "INST": lambda m, a: _refuse_instance(a),
        "PERSID": lambda m, a: _refuse_persistent_id(),
        "BINPERSID": lambda m, a: _refuse_persistent_id(),
    }
    for name in ("BININT", "BININT1", "BININT2", "LONG1", "LONG4"):
        steps[name] = _Machine.push_integer
    for name in (
        *("BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    ):
        steps[name] = _Machine.push
    for name in ("BINPUT", "LONG_BINPUT"):
        steps[name] = lambda m, a: m.memo.update({a: m.top()})
    for name in ("BINGET", "LONG_BINGET"):
        steps[name] = _Machine.recall
    return steps


_STEPS = _steps()


class _Bounded:
    """A stream whose read allocates no more than is left, whatever length a file claims."""

    def __init__(self, stream: IO[bytes]) -> None:
        start = stream.tell()
        self._left = stream.seek(0, io.SEEK_END) - start
        stream.seek(start)
        self._stream = stream

    def read(self, size: int = -1, /) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        data = self._stream.read(size)
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._stream.readline()
        self._left -= len(data)
        return data


def _operations(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """(instruction, argument) one by one, decoded but not acted upon, up to STOP."""
    try:
        for opcode, argument, _ in pickletools.genops(_Bounded(stream)):  # type: ignore[arg-type]
            yield opcode.name, argument
    except ValueError as error:
        raise PickleError("the pickle is damaged or cut short") from error


# -- public ----------------------------------------------------------------------------------------


def read_pickle(stream: IO[bytes]) -> Any:
    """The object in a pickle, built of data alone.

    Args:
        stream: A seekable binary stream at the start of the pickle.

    Returns:
        None, bool, int, float, complex, str, bytes, tuple, list, set, dict, `EasyDict`, `Module`,
        `TensorRecord`, and the private labels of names, nested as in the file.

    Raises:
        PickleError: If the pickle is damaged, or asks for a name or an instruction that no MAT
            checkpoint has; the message names it. Nothing is ever executed.
    """
    return _Machine().run(stream)


def module_tensors(module: Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a module tree, by the name its state dict gives it.

    Args:
        module: Root of the tree, from `read_pickle`.

    Returns:
        Name → tensor, in the types of the file, as views of the file's storages.

    Raises:
        PickleError: If the state is not that of a module, a tensor is refused (see
            `TensorRecord.tensor`), or one module with content has two places in the tree.
    """
    tensors: dict[str, Tensor] = {}
    has_content = {id(module): True}
    pending = [("", module)]
    while pending:
        prefix, current = pending.pop()
        for name, record in _own_tensors(current):
            full = _joined(prefix, name)
            if full in tensors:
                raise PickleError(f"the tensor {shown(full)} is there twice")
            if len(tensors) == _MAX_TENSORS:
                raise PickleError(f"a network has more than {_MAX_TENSORS} tensors")
            tensors[full] = record.tensor()
        for name, child in _children(current):
            if id(child) not in has_content:
                has_content[id(child)] = any(_own_tensors(child)) or any(_children(child))
                pending.append((_joined(prefix, name) + ".", child))
            elif has_content[id(child)]:
                # A tree that refers to itself can unfold without end.
                raise PickleError(f"the module {shown(prefix + name)} has two places in its tree")
    return tensors


def _joined(prefix: str, name: str) -> str:
    if not name or len(prefix) + len(name) > _MAX_NAME:
        raise PickleError(f"{shown(name)} in {shown(prefix)} is no name that a module can have")
    return prefix + name


def _table(module: Module, key: str) -> dict[str, Any]:
    table = (module.state or {}).get(key, {})
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise PickleError(f"the {key} of {module!r} is no table of names")
    return table


def _own_tensors(module: Module) -> Iterator[tuple[str, TensorRecord]]:
    transient = (module.state or {}).get("_non_persistent_buffers_set", ())
    for key in ("_parameters", "_buffers"):
        for name, value in _table(module, key).items():
            if isinstance(value, TensorRecord):
                if not (key == "_buffers" and isinstance(transient, set) and name in transient):
                    yield name, value
            elif value is not None:
                raise PickleError(f"{shown(name)} of {module!r} is no tensor")


def _children(module: Module) -> Iterator[tuple[str, Module]]:
    for name, value in _table(module, "_modules").items():
        if isinstance(value, Module):
            yield name, value
        elif value is not None:
            raise PickleError(f"{shown(name)} of {module!r} is no module")
