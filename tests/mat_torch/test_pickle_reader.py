"""The pickle reader gives data and runs nothing, whatever is in the file."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mat_torch.pickle_reader import (
    EasyDict,
    Module,
    PickleError,
    TensorRecord,
    module_tensors,
    read_pickle,
)

# -- making pickles --------------------------------------------------------------------------------


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    """What the authors' loader does with embedded source, as far as danger goes."""
    exec(meta["module_src"], {})
    return meta


@contextmanager
def _authors_modules() -> Iterator[None]:
    """The two modules a released pickle refers to, while one is written."""
    persistence = types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util = types.ModuleType("dnnlib.util")
    util.EasyDict = _AuthorsDict  # type: ignore[attr-defined]
    modules = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence")
        yield


class _AuthorsDict(dict[str, Any]):
    pass


_AuthorsDict.__module__, _AuthorsDict.__qualname__ = "dnnlib.util", "EasyDict"
_AuthorsDict.__name__ = "EasyDict"


class _Persistent:
    """A module as the authors' code pickles it."""

    def __init__(self, source: str, **state: Any) -> None:
        self.meta = _AuthorsDict(
            type="class", version=6, module_src=source, class_name="Net", state=state
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,)


def _network(source: str = "") -> _Persistent:
    """A small tree: two tensors of its own, a Sequential with a Linear's worth below it."""
    inner = _Persistent(
        source,
        _parameters=OrderedDict(weight=torch.nn.Parameter(torch.arange(6.0).view(2, 3).t())),
        _buffers=OrderedDict(),
        _modules=OrderedDict(),
        gain=np.float64(0.5),
    )
    sequence = torch.nn.Sequential()
    sequence._modules["0"] = inner  # type: ignore[assignment]
    return _Persistent(
        source,
        _parameters=OrderedDict(scale=torch.tensor(2.0, dtype=torch.float16), absent=None),
        _buffers=OrderedDict(kept=torch.tensor([1, 2]), dropped=torch.ones(1)),
        _non_persistent_buffers_set={"dropped"},
        _modules=OrderedDict(conv=sequence, act=torch.nn.GELU(), none=None),
    )


def _dumps(value: object, protocol: int = 4) -> bytes:
    with _authors_modules():
        return pickle.dumps(value, protocol)


def _loads(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data))


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _bytes(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def _name(module: str, attribute: str) -> bytes:
    return _text(module) + _text(attribute) + b"\x93"


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def _program(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


_PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_LOAD = ("torch.storage", "_load_from_bytes")
_ORDERED = ("collections", "OrderedDict")
_SEQUENTIAL = ("torch.nn.modules.container", "Sequential")


def _archive(value: object, *, zipped: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _typed(tensor: torch.Tensor) -> torch.storage.TypedStorage:
    """What torch pickles of a tensor (Tensor.storage() is the same, and warns)."""
    return torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
        wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
    )


def _storage(count: int) -> bytes:
    """Instructions that push a float32 storage of this many elements."""
    return _call(_name(*_LOAD), _bytes(_archive(_typed(torch.arange(float(count))))))


def _sizes(*values: int) -> bytes:
    return (
        b"(" + b"".join(b"\x8a\x09" + v.to_bytes(9, "little", signed=True) for v in values) + b"t"
    )


def _tensor(storage: bytes, offset: int, size: bytes, stride: bytes) -> bytes:
    return _call(
        _name(*_TENSOR),
        storage,
        b"\x8a\x09" + offset.to_bytes(9, "little", signed=True),
        size,
        stride,
        b"\x89",
        _call(_name(*_ORDERED)),
    )


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_module_tree_gives_the_names_and_values_of_its_state_dict(protocol: int) -> None:
    network = _network()
    if protocol == 3:  # sets are a name of builtins there, which no released file has
        del network.meta["state"]["_non_persistent_buffers_set"]
        del network.meta["state"]["_buffers"]["dropped"]
        network.meta["state"]["_modules"] = {"conv": network.meta["state"]["_modules"]["conv"]}
        sequence = network.meta["state"]["_modules"]["conv"]
        del sequence.__dict__["_non_persistent_buffers_set"]
    read = _loads(_dumps({"G_ema": network}, protocol))
    tensors = module_tensors(read["G_ema"])
    assert set(tensors) == {"scale", "kept", "conv.0.weight"}
    assert torch.equal(tensors["scale"], torch.tensor(2.0, dtype=torch.float16))
    assert torch.equal(tensors["kept"], torch.tensor([1, 2]))
    assert torch.equal(tensors["conv.0.weight"], torch.arange(6.0).view(2, 3).t())


def test_modules_are_inert_records_without_their_source() -> None:
    module = _loads(_dumps(_network("a = 1")))
    assert type(module) is Module
    assert module.class_name == "Net"
    assert module.state is not None
    assert "module_src" not in module.state
    assert module.state["_modules"]["conv"].class_name == "Sequential"


def test_plain_data_is_read_as_pickle_reads_it() -> None:
    shared = [1, 2]
    value: dict[str, Any] = {
        "none": None,
        "numbers": [True, False, 0, 255, 65535, -5, 2**40, 0.25],
        "text": ("", "é", "x" * 300),
        "bytes": (b"", b"\x00" * 300),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "set": {1, "a"},
        "ordered": OrderedDict(a=1),
        "numpy": (np.float32(0.5), np.int64(-3), np.bool_(True), np.complex64(1j)),
        "shared": (shared, shared),
    }
    read = _loads(pickle.dumps(value, 4))
    assert read == value
    assert read["shared"][0] is read["shared"][1]


def test_a_container_that_holds_itself_is_read() -> None:
    items: list[Any] = [()]
    items[0] = (items,)
    read = _loads(pickle.dumps(items, 4))
    assert read[0][0] is read


def test_a_number_in_foreign_byte_order_has_its_value() -> None:
    dtype = _call(_name("numpy", "dtype"), _text("f8"), b"\x89\x88")
    state = b"(K\x03" + _text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    scalar = _call(
        _name("numpy.core.multiarray", "scalar"), dtype + state, _bytes(struct.pack(">d", 0.5))
    )
    assert _loads(_program(scalar)) == 0.5


def test_the_dicts_of_the_authors_are_dicts() -> None:
    read = _loads(_dumps(_AuthorsDict(size=3)))
    assert type(read) is EasyDict
    assert read == {"size": 3}


def test_tensors_of_one_storage_share_it() -> None:
    program = _program(_storage(4), b"q\x00", b"0", b"]", *(_two_views()))
    first, second = (record.tensor() for record in _loads(program))
    first[0] = 7.0
    assert second[0] == 7.0


def _two_views() -> list[bytes]:
    view = _tensor(b"h\x00", 0, _sizes(4), _sizes(1))
    return [view, b"a", view, b"a"]


# -- payloads --------------------------------------------------------------------------------------


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _creating(path: str) -> str:
    return f"open({path!r}, 'w').close()"


def _live_payloads() -> dict[str, tuple[Callable[[str], bytes], str | None]]:
    """Name → (pickle that creates a file under Python's own reader, name to be refused)."""

    def chain(path: str) -> bytes:
        opened = _call(_name("builtins", "getattr"), _name("builtins", "open"), _text("__call__"))
        return _program(_call(opened, _text(path), _text("w")))

    def module_source(path: str) -> bytes:
        return _dumps({"G_ema": _Persistent(_creating(path))})

    def nested(zipped: bool) -> Callable[[str], bytes]:
        def make(path: str) -> bytes:
            inner = _archive({"a": _Call(builtins.eval, _creating(path))}, zipped=zipped)
            storage = _call(_name(*_LOAD), _bytes(inner))
            return _program(_tensor(storage, 0, _sizes(1), _sizes(1)))

        return make

    return {
        "os.system": (lambda p: pickle.dumps(_Call(os.system, f"touch '{p}'"), 4), "system"),
        "eval": (lambda p: pickle.dumps(_Call(builtins.eval, _creating(p)), 4), "builtins.eval"),
        "exec": (lambda p: pickle.dumps(_Call(builtins.exec, _creating(p)), 2), "__builtin__.exec"),
        "protocol 0": (lambda p: pickle.dumps(_Call(builtins.eval, _creating(p)), 0), "eval"),
        "getattr chain": (chain, "builtins.getattr"),
        "INST": (
            lambda p: _program(b"(", _text(_creating(p)), b"ibuiltins\neval\n"),
            "builtins.eval",
        ),
        "OBJ": (
            lambda p: _program(b"(cbuiltins\neval\n", _text(_creating(p)), b"o"),
            "builtins.eval",
        ),
        "attribute path": (
            lambda p: _program(_call(_name("os", "path.os.system"), _text(f"touch '{p}'"))),
            "os.path.os.system",
        ),
        "BUILD of attributes": (
            lambda p: _program(
                _call(_name(*_ORDERED)),
                b"}" + _text("a") + _call(_name("builtins", "eval"), _text(_creating(p))) + b"sb",
            ),
            "builtins.eval",
        ),
        "embedded source": (module_source, None),
        "nested legacy archive": (nested(False), "eval"),
        "nested zip archive": (nested(True), "eval"),
    }


@pytest.mark.parametrize("case", _live_payloads())
def test_a_payload_that_runs_under_pickle_does_not_run_here(case: str, tmp_path: Path) -> None:
    make, refused = _live_payloads()[case]
    sentinel = tmp_path / "ran"
    data = make(str(sentinel))
    # Python's own reader runs it, or this test would hold for a dud.
    # (The tensor around a nested payload cannot be made, after it ran.)
    with _authors_modules(), suppress(AttributeError, TypeError):
        pickle.loads(data)
    assert sentinel.exists()
    sentinel.unlink()
    # Ours does not.
    if refused is None:
        assert set(_loads(data)) == {"G_ema"}
    else:
        with pytest.raises(PickleError, match=refused.replace(".", r"\.")):
            _tensors_of(_loads(data))
    assert not sentinel.exists()


def _tensors_of(read: Any) -> Any:
    return read.tensor() if isinstance(read, TensorRecord) else read


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("torch.nn.modules.x", "os.system"),
        ("torch.nn.modules.x.os", "system"),
        ("torch.nn.modules.container", "Sequential.__init__"),
        ("torch.nn.modules", "container.Sequential"),
        ("torch.nn.modules.container", "Sequential\n"),
        ("torch.nn.modules.container", "ModuleDict"),
        ("torch.nn.modules.module", "Module"),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch_utils.persistence", "_module_to_src_dict"),
        ("torch_utils.persistence", "persistent_class"),
        ("dnnlib.util", "call_func_by_name"),
        ("dnnlib.util", "EasyDict.__setattr__"),
        ("collections", "defaultdict"),
        ("collections", "OrderedDict.__reduce__"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "core.multiarray.scalar"),
        ("copyreg", "_reconstructor"),
        ("_codecs", "encode"),
        ("builtins", "set"),
        ("", ""),
        ("mat_torch.pickle_reader", "Module"),
        ("mat_torch.pickle_reader", "_STEPS"),
    ],
)
def test_names_that_only_resemble_known_ones_are_refused_by_name(
    module: str, attribute: str
) -> None:
    imported = set(sys.modules)
    with pytest.raises(PickleError) as refusal:
        _loads(_program(_name(module, attribute)))
    assert ascii(f"{module}.{attribute}") in str(refusal.value)
    assert set(sys.modules) == imported


def test_a_refused_name_cannot_forge_lines_of_the_message() -> None:
    with pytest.raises(PickleError) as refusal:
        _loads(_program(_name("os\nAll is well.\x1b[2J", "y" * 10_000)))
    message = str(refusal.value)
    assert message.isprintable()
    assert len(message) < 400


_DTYPE = _call(_name("numpy", "dtype"), _text("f8"))

_HOSTILE = {
    # Calls with arguments of the wrong kind.
    "module with arguments": (_call(_name(*_SEQUENTIAL), b"K\x01"), "container.Sequential"),
    "persistent without dict": (_call(_name(*_PERSISTENT), b"K\x01"), "_reconstruct_persistent"),
    "persistent of a name": (
        _call(_name(*_PERSISTENT), _name(*_LOAD)),
        "_reconstruct_persistent_obj",
    ),
    "persistent with odd state": (
        _call(
            _name(*_PERSISTENT),
            b"}(" + _text("class_name") + _text("a") + _text("state") + b"K\x01u",
        ),
        "_reconstruct_persistent_obj",
    ),
    "easy dict with arguments": (_call(_name("dnnlib.util", "EasyDict"), b"}"), "EasyDict"),
    "ordered dict with arguments": (_call(_name(*_ORDERED), b"]"), "OrderedDict"),
    "storage of text": (_call(_name(*_LOAD), _text("a")), "_load_from_bytes"),
    "storage of two": (_call(_name(*_LOAD), b"C\x01a", b"C\x01b"), "_load_from_bytes"),
    "tensor without storage": (
        _tensor(b"C\x01a", 0, _sizes(1), _sizes(1)),
        "_rebuild_tensor_v2",
    ),
    "tensor of few arguments": (_call(_name(*_TENSOR), _storage(1)), "_rebuild_tensor_v2"),
    "tensor of negative size": (
        _tensor(_storage(1), 0, _sizes(-1), _sizes(1)),
        "_rebuild_tensor_v2",
    ),
    "tensor of negative stride": (
        _tensor(_storage(2), 1, _sizes(2), _sizes(-1)),
        "_rebuild_tensor_v2",
    ),
    "tensor of negative offset": (
        _tensor(_storage(1), -1, _sizes(1), _sizes(1)),
        "_rebuild_tensor_v2",
    ),
    "tensor with a list for sizes": (
        _tensor(_storage(1), 0, b"]", b"]"),
        "_rebuild_tensor_v2",
    ),
    "tensor of unequal ranks": (
        _tensor(_storage(1), 0, _sizes(1), _sizes(1, 1)),
        "_rebuild_tensor_v2",
    ),
    "tensor of 17 dimensions": (
        _tensor(_storage(1), 0, _sizes(*[1] * 17), _sizes(*[1] * 17)),
        "_rebuild_tensor_v2",
    ),
    "parameter of no tensor": (
        _call(_name("torch._utils", "_rebuild_parameter"), b"K\x01", b"\x89", b"}"),
        "_rebuild_parameter",
    ),
    "object dtype": (_call(_name("numpy", "dtype"), _text("O")), r"numpy\.dtype"),
    "object dtype by number": (_call(_name("numpy", "dtype"), _text("O8")), r"numpy\.dtype"),
    "structured dtype": (_call(_name("numpy", "dtype"), _text("i4,O")), r"numpy\.dtype"),
    "dtype of nothing": (_call(_name("numpy", "dtype")), r"numpy\.dtype"),
    "dtype of a list": (_call(_name("numpy", "dtype"), b"]"), r"numpy\.dtype"),
    "scalar without dtype": (
        _call(_name("numpy.core.multiarray", "scalar"), _text("O"), b"C\x01a"),
        r"multiarray\.scalar",
    ),
    "scalar of too few bytes": (
        _call(_name("numpy._core.multiarray", "scalar"), _DTYPE, b"C\x01a"),
        r"multiarray\.scalar",
    ),
    # State and items given to what has none.
    "dtype with fields": (_DTYPE + b"(K\x03" + _text("<") + b"N}}tb", "_NumberType"),
    "dtype with odd order": (_DTYPE + b"(K\x03" + _text("O") + b"NNNtb", "_NumberType"),
    "state for an ordered dict": (
        _call(_name(*_ORDERED)) + b"}" + _text("items") + _name(*_LOAD) + b"sb",
        "dict",
    ),
    "state for a tensor": (
        _tensor(_storage(1), 0, _sizes(1), _sizes(1)) + b"(" + _storage(1) + b"K\x00))tb",
        "TensorRecord",
    ),
    "state for a storage": (_storage(1) + b"}b", "_Storage"),
    "state for a name": (
        _name(*_LOAD) + b"N}" + _text("__call__") + b"K\x01s\x86b",
        "_load_from_bytes",
    ),
    "slots for a module": (_call(_name(*_SEQUENTIAL)) + b"N}\x86b", "Module"),
    "state for a module, twice": (_call(_name(*_SEQUENTIAL)) + b"}b}b", "Module"),
    "items of a module": (_call(_name(*_SEQUENTIAL)) + b"K\x01K\x02s", "Module"),
    "items of a name": (_name(*_ORDERED) + b"K\x01K\x02s", "_Name"),
    "append to a tensor": (_tensor(_storage(1), 0, _sizes(1), _sizes(1)) + b"K\x01a", "TensorRec"),
    "append to a module": (_call(_name(*_SEQUENTIAL)) + b"(K\x01e", "Module"),
    "add to a dict": (b"}(K\x01\x90", "dict"),
    "odd items": (b"}(K\x01u", "items"),
    # Calls of data.
    "call of a module": (_call(_call(_name(*_SEQUENTIAL))), "Module"),
    "call of text": (_call(_text("os.system"), _text("true")), "str"),
    "call of a dict": (_call(b"}"), "dict"),
    "new object of data": (b"K\x01)\x81", "int"),
    "call without a tuple": (_name(*_ORDERED) + b"]R", "OrderedDict"),
    "name of numbers": (b"K\x01K\x02\x93", "name"),
    # Instructions no checkpoint has.
    "persistent id": (b"Pabc\n", "persistent id"),
    "persistent id from the stack": (b"K\x01Q", "persistent id"),
    "known name by INST": (b"(icollections\nOrderedDict\n", "OrderedDict"),
    "extension": (b"\x82\x01", "EXT1"),
    "buffer": (b"\x97", "NEXT_BUFFER"),
    "keyword construction": (_name(*_ORDERED) + b")}\x92", "NEWOBJ_EX"),
    # Tricks with stack and memo.
    "empty stack": (b"0", "mark"),
    "call on an empty stack": (b"R", "stack"),
    "tuple of too few": (b"K\x01\x87", "stack"),
    "no mark": (b"t", "mark"),
    "unknown memo": (b"h\x05", "memo"),
    "memo of nothing": (b"q\x05", "stack"),
    "reaching below a mark": (b"K\x01(a", "stack"),
    "tuple as a key": (b"})K\x01s", "key"),
    "name as a key": (b"}" + _name(*_ORDERED) + b"K\x01s", "key"),
    "tuple in a set": (b"\x8f()\x90", "key"),
    "huge integer": (b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096, "128 bits"),
    "newer protocol": (b"\x80\x09K\x01", "protocol 9"),
}


@pytest.mark.parametrize("case", _HOSTILE)
def test_hostile_use_of_what_is_known_is_refused(case: str) -> None:
    body, message = _HOSTILE[case]
    with pytest.raises(PickleError, match=message):
        _loads(_program(body))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, [5], [1]),
        (1, [4], [1]),
        (5, [0], [1]),
        (4, [], []),
        (0, [2, 2], [3, 1]),
        (0, [2], [2**62]),
        (2**62, [1], [1]),
        (0, [10**12], [0]),
        (0, [2**32, 2**32], [0, 0]),
        (0, [0, 2**62, 2**62], [1, 1, 1]),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(
    offset: int, size: list[int], stride: list[int]
) -> None:
    record = _loads(_program(_tensor(_storage(4), offset, _sizes(*size), _sizes(*stride))))
    with pytest.raises(PickleError, match="damaged"):
        record.tensor()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "Tensor"),
        ({"a": 1}, "dict"),
        (_typed(torch.ones(2, dtype=torch.complex64)), "complex64"),
        (_Call(os.getcwd), r"posix\.getcwd|nt\.getcwd"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_an_inner_archive_is_a_storage_of_numbers_or_refused(
    value: object, message: str, zipped: bool
) -> None:
    storage = _call(_name(*_LOAD), _bytes(_archive(value, zipped=zipped)))
    record = _loads(_program(_tensor(storage, 0, _sizes(1), _sizes(1))))
    with pytest.raises(PickleError, match=message):
        record.tensor()


def test_an_inner_archive_without_its_elements_is_refused() -> None:
    """The list of storages to fill, emptied, would leave memory as it was found."""
    archive = _archive(_typed(torch.arange(1000.0)))
    start = archive.rindex(b"]q\x00")
    storage = _call(_name(*_LOAD), _bytes(archive[:start] + b"]q\x00."))
    record = _loads(_program(_tensor(storage, 0, _sizes(1), _sizes(1))))
    with pytest.raises(PickleError, match="claims more elements"):
        record.tensor()


# -- sizes that are claimed, not there -------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
        b"\x8d" + struct.pack("<Q", 2**62) + b"abc",
        b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"abc",
        b"B" + struct.pack("<I", 2**32 - 1) + b"abc",
        b"X" + struct.pack("<I", 2**32 - 1) + b"abc",
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc",
        b"\x8b" + struct.pack("<i", -1) + b"abc",
        b"\xff",
        b"",
    ],
)
def test_a_claimed_length_beyond_the_file_is_damage(body: bytes) -> None:
    with pytest.raises(PickleError, match="damaged or cut short"):
        _loads(b"\x80\x04" + body)


def test_deep_nesting_is_read_without_recursion() -> None:
    depth = 200_000
    read = _loads(_program(b"]" * depth, b"a" * (depth - 1)))
    for _ in range(depth - 1):
        (read,) = read
    assert read == []


def test_a_tree_deeper_than_any_name_is_refused() -> None:
    module = b"".join(
        _call(_name(*_SEQUENTIAL)) + b"}" + _text("_modules") + b"}" + _text("a")
        for _ in range(2000)
    )
    leaf = _call(_name(*_SEQUENTIAL))
    read = _loads(_program(module, leaf, b"ssb" * 2000))
    with pytest.raises(PickleError, match="no name that a module can have"):
        module_tensors(read)


def _tree(children: dict[str, Any]) -> Module:
    return Module("Net", {"_parameters": {}, "_buffers": {}, "_modules": children})


def test_a_tree_that_contains_itself_is_refused() -> None:
    children: dict[str, Any] = {}
    children["again"] = root = _tree(children)
    with pytest.raises(PickleError, match="two places"):
        module_tensors(root)


def test_a_tree_that_multiplies_is_refused() -> None:
    module = _tree({})
    for _ in range(200):
        module = _tree({"a": module, "b": module})
    with pytest.raises(PickleError, match="two places"):
        module_tensors(module)


def test_an_empty_module_may_have_two_places() -> None:
    act = Module("GELU", {})
    assert module_tensors(_tree({"a": act, "b": act})) == {}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_modules": []}, "_modules"),
        ({"_modules": {1: Module("a")}}, "_modules"),
        ({"_modules": {"a": 1}}, "no module"),
        ({"_modules": {"": _tree({"a": Module("b")})}}, "no name"),
        ({"_parameters": {"a": [1.0]}}, "no tensor"),
        ({"_buffers": {"a": Module("b")}}, "no tensor"),
    ],
)
def test_a_state_that_is_no_modules_is_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(PickleError, match=message):
        module_tensors(Module("Net", state))


def test_two_tensors_of_one_name_are_refused() -> None:
    record = _loads(_program(_tensor(_storage(1), 0, _sizes(1), _sizes(1))))
    with pytest.raises(PickleError, match="twice"):
        module_tensors(Module("Net", {"_parameters": {"a": record}, "_buffers": {"a": record}}))


def test_reading_changes_no_name_for_the_next_file() -> None:
    attack = _program(_name(*_LOAD), b"N}", _text("make"), _name(*_ORDERED), b"s\x86b")
    with pytest.raises(PickleError, match="_load_from_bytes"):
        _loads(attack)
    record = _loads(_program(_tensor(_storage(2), 0, _sizes(2), _sizes(1))))
    assert torch.equal(record.tensor(), torch.arange(2.0))


# -- any bytes at all ------------------------------------------------------------------------------

_FUZZ = settings(max_examples=200, deadline=None, database=None)


def _refusal(data: bytes) -> str:
    """Read all that is there: why it was refused, or nothing. No other way to fail is caught."""
    try:
        read = _loads(data)
        for value in read.values() if isinstance(read, dict) else [read]:
            if isinstance(value, Module):
                module_tensors(value)
            elif isinstance(value, TensorRecord):
                value.tensor()
    except PickleError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """A small valid file whose embedded source would create a file."""
    sentinel = tmp_path_factory.mktemp("armed") / "ran"
    data = _dumps({"G_ema": _network(_creating(str(sentinel))), "D": _network("")})
    return data, sentinel


@_FUZZ
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_damage(armed: tuple[bytes, Path], cut: float) -> None:
    data, sentinel = armed
    with pytest.raises(PickleError, match="cut short"):
        _loads(data[: int(cut * len(data))])
    assert not sentinel.exists()


@_FUZZ
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1)
)
def test_changed_bytes_are_read_or_refused(
    armed: tuple[bytes, Path], flips: list[tuple[float, int]]
) -> None:
    data, sentinel = bytearray(armed[0]), armed[1]
    for position, bits in flips:
        data[int(position * len(data))] ^= bits
    assert _refusal(bytes(data)).isprintable()
    assert not sentinel.exists()


_WORDS = [
    *(bytes([code]) for code in b"()]}tabsue0R1NKh" + b"\x81\x85\x86\x87\x88\x8f\x90\x93\x94"),
    b"K\x00",
    b"K\x01",
    b"h\x00",
    b"h\x01",
    b"q\x00",
    _sizes(1),
    _bytes(_archive(_typed(torch.ones(2)))),
    _text("_modules"),
    _text("a"),
    *(_name(*name) for name in (_PERSISTENT, _TENSOR, _LOAD, _ORDERED, _SEQUENTIAL)),
    _name("torch._utils", "_rebuild_parameter"),
    _name("dnnlib.util", "EasyDict"),
    _name("numpy", "dtype"),
    _name("numpy.core.multiarray", "scalar"),
    _call(_name(*_SEQUENTIAL)),
    _tensor(_storage(1), 0, _sizes(1), _sizes(1)),
    _DTYPE,
    _name("os", "mkdir"),
]


@settings(_FUZZ, max_examples=400)
@given(words=st.lists(st.sampled_from(_WORDS), max_size=40))
def test_any_program_is_read_or_refused(words: list[bytes]) -> None:
    assert _refusal(_program(*words)).isprintable()


@_FUZZ
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    assert _refusal(data).isprintable()


@_FUZZ
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1)
)
def test_changed_bytes_of_an_inner_archive_give_a_tensor_or_a_refusal(
    flips: list[tuple[float, int]],
) -> None:
    archive = bytearray(_archive(_typed(torch.arange(4.0))))
    for position, bits in flips:
        archive[int(position * len(archive))] ^= bits
    storage = _call(_name(*_LOAD), _bytes(bytes(archive)))
    assert _refusal(_program(_tensor(storage, 0, _sizes(4), _sizes(1)))).isprintable()
