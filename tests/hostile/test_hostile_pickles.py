"""Pickles that call, lie, nest, repeat or end early: BadForeign and nothing else; nothing is executed, nothing is allocated beyond its bound."""

from __future__ import annotations

import argparse
import builtins
import collections
import copyreg
import datetime as dt
import functools
import os
import pathlib
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from ckptd.core.inert import FAMILIES, KNOWN, MARKERS
from ckptd.core.pickles import COLLISIONS_MAX, Dtype, Global, Limits, Made, MetadataIndex, load
from ckptd.errors import BadForeign

PROTOCOLS = range(6)


class Calls:
    """An object whose pickle calls what it is told."""

    def __init__(self, what, *args):
        self.what, self.args = what, args

    def __reduce__(self):
        return self.what, self.args


class SetsState:
    def __reduce__(self):
        return functools.partial, (os.system,), (os.system, ("true",), {}, None)  # functools.partial has a __setstate__


def refused(data: bytes, **options) -> BadForeign:
    with pytest.raises(BadForeign) as e:
        load(data, **options)
    assert len(str(e.value)) < 1000
    return e.value


def raw(module: str, name: str, args: bytes = b"(X\x04\x00\x00\x00truet", protocol: int = 2) -> bytes:
    """A call of a name that need not exist here."""
    if protocol >= 4:
        text = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
        return b"\x80\x04" + text + b"\x93" + args + b"R."
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + args + b"R."


GADGETS = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("os", "execv"), ("builtins", "eval"), ("builtins", "exec"),
    ("builtins", "getattr"), ("builtins", "__import__"), ("builtins", "open"), ("builtins", "compile"), ("builtins", "globals"),
    ("builtins", "type"), ("builtins", "map"), ("builtins", "filter"), ("__builtin__", "eval"), ("__builtin__", "apply"),
    ("__builtin__", "execfile"), ("functools", "partial"), ("functools", "reduce"), ("subprocess", "Popen"), ("subprocess", "check_output"),
    ("torch.hub", "load"), ("torch.hub", "load_state_dict_from_url"), ("torch", "load"), ("torch.storage", "_load_from_bytes"),
    ("torch.jit", "load"), ("torch.jit.annotations", "parse_type_line"), ("torch.serialization", "load"), ("torch.package", "PackageImporter"),
    ("torch._inductor.codecache", "compile_file"), ("torch.utils._config_module", "ConfigModule.load_config"),
    ("torch._dynamo.guards", "GuardBuilder.get"), ("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression"),
    ("torch.distributed.rpc", "PythonUDF"), ("torch.utils.bottleneck.__main__", "run_cprofile"), ("torch.utils.data.datapipes.utils.decoder", "basichandlers"),
    ("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_import_dotted_name"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"), ("torch._tensor", "_rebuild_from_type"), ("torch.nn.modules.linear", "Linear"),
    ("runpy", "run_path"), ("runpy", "_run_code"), ("pickle", "loads"), ("_pickle", "loads"), ("pickle", "Unpickler"), ("marshal", "loads"),
    ("types", "FunctionType"), ("types", "CodeType"), ("types", "MethodType"), ("operator", "attrgetter"), ("operator", "methodcaller"),
    ("operator", "itemgetter"), ("importlib", "import_module"), ("pkgutil", "resolve_name"), ("pydoc", "locate"), ("pydoc", "pipepager"),
    ("code", "InteractiveInterpreter"), ("timeit", "timeit"), ("cProfile", "run"), ("profile", "Profile.run"), ("pdb", "run"), ("bdb", "Bdb"),
    ("doctest", "debug_script"), ("trace", "Trace"), ("idlelib.run", "Executive"), ("asyncio.unix_events", "_UnixSubprocessTransport._start"),
    ("numpy.testing._private.utils", "runstring"), ("numpy.f2py.crackfortran", "getlincoef"), ("numpy", "load"), ("numpy", "memmap"),
    ("numpy", "fromfile"), ("numpy.core.multiarray", "fromfile"), ("ctypes", "CDLL"), ("webbrowser", "open"), ("shutil", "rmtree"), ("socket", "socket"),
    ("ssl", "get_server_certificate"), ("urllib.request", "urlopen"), ("http.client", "HTTPSConnection"), ("sys", "exit"), ("sys", "setrecursionlimit"),
    ("pip", "main"), ("venv", "create"), ("test.support.script_helper", "assert_python_ok"), ("distutils.file_util", "write_file"), ("logging.config", "dictConfig"),
    ("lib2to3.pgen2.grammar", "Grammar.loads"), ("dill", "loads"), ("cloudpickle.cloudpickle", "_make_function"), ("joblib", "load"), ("copyreg", "add_extension"),
    ("copyreg", "__newobj__"), ("site", "main"), ("multiprocessing.util", "spawnv_passfds"), ("threading", "Thread"), ("_thread", "start_new_thread"),
    ("torchx", "x"), ("deepspeedx.a", "b"), ("megatron_evil", "x"), ("torch.distributed.fsdpx", "y"), ("numpy.randomx", "z"), ("", ""), ("a" * 201, "b"), ("os\x00", "system"),
    ("os", "path.join"), ("collections", "OrderedDict.__init__"), ("builtins", "dict.fromkeys"), ("torch", "Size.__class__"), ("argparse", "os.system"),
    ("datetime", "sys.modules"), ("pathlib", "os.system"), ("types", "SimpleNamespace.__init__"), ("codecs", "decode"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), GADGETS, ids=lambda t: t[:40])
def test_gadgets_are_refused_by_name(module, name):
    for protocol in (2, 4):
        data = raw(module, name, protocol=protocol) if len(module) < 256 else b""
        error = refused(data)
        assert "byte" in error.message
        assert error.remedy
        if module and len(module) < 100 and "\x00" not in module and not module.startswith("__"):
            assert f"{module}.{name}" in error.message
    refused(raw(module, name).replace(b"R.", b"\x81."))  # NEWOBJ
    refused(b"\x80\x04" + raw(module, name)[2:-2] + b"}\x92.")
    refused(b"\x80\x02}X\x01\x00\x00\x00ac" + module.encode() + b"\n" + name.encode() + b"\ns.")  # held, not called


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_executed(protocol, tmp_path):
    canary = tmp_path / "canary"
    touch = f"touch {canary}"
    gadgets = [
        Calls(os.system, touch), Calls(builtins.eval, f"open({str(canary)!r}, 'w')"), Calls(builtins.exec, f"open({str(canary)!r}, 'w')"),
        Calls(builtins.open, str(canary), "w"), Calls(builtins.getattr, Calls(builtins.__import__, "os"), "system"),
        Calls(functools.partial, os.system, touch), Calls(subprocess.check_output, ["touch", str(canary)]),
        Calls(pathlib.Path.touch, pathlib.Path(canary)),
        Calls(copyreg._reconstructor, os._wrap_close, object, None), Calls(collections.defaultdict, Calls(functools.partial, os.system, touch)),
        Calls(map, os.system, [touch]), Calls(collections.OrderedDict, Calls(map, os.system, [touch])), SetsState(),
    ]  # fmt: skip
    for gadget in gadgets:
        for shape in (gadget, [gadget], {"a": {"b": gadget}}, ("x", gadget, 1.5), {"fine": 1, "z": gadget}):
            data = pickle.dumps(shape, protocol)
            refused(data)
            refused(data[:-1])  # cut behind the call: a reader that executes as it goes has executed
            refused(data[:-1] + b"\xff\xff")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Calls(os.system, touch), protocol))  # the canary sings for a reader that calls
    assert canary.exists()


def test_a_name_put_together_at_run_time_is_the_name_it_is():
    for get in (b"\x8c\x02os\x94\x8c\x06system\x94\x930h\x00h\x01\x93", b"\x8c\x02os\x8c\x06system\x93", b"X\x02\x00\x00\x00os\x8d\x06\x00\x00\x00\x00\x00\x00\x00system\x93",
                b"U\x02osU\x06system\x93", b"Vos\nVsystem\n\x93", b"V\\u006fs\nVsyste\\u006d\n\x93", b"S'os'\nS'system'\n\x93", b"T\x02\x00\x00\x00osU\x06system\x93"):  # fmt: skip
        assert "os.system" in refused(b"\x80\x04" + get + b"\x8c\x04true\x85R.").message
    for bad in (b"K\x01K\x02\x93.", b"B\x02\x00\x00\x00osC\x06system\x93.", b"\x8c\x02os]\x93.", b"]]\x93.", b"\x93.", b"\x8c\x01a\x93."):
        refused(b"\x80\x04" + bad)


@pytest.mark.parametrize("op", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"(ios\nsystem\n", b"(cos\nsystem\nX\x04\x00\x00\x00trueo", b"Pid\n", b"\x97", b"\x97\x98",
                                b"\xff", b"\x00", b"\x99", b"x", b"\x80\x06", b"\x80\xff", b"\x93"], ids=repr)  # fmt: skip
def test_opcodes_that_are_not_read(op):
    for protocol in PROTOCOLS:
        refused(b"\x80" + bytes([protocol]) + op + b".")
        refused(b"\x80" + bytes([protocol]) + b"N" + op + b".")


def test_an_extension_registry_is_not_asked():
    code = 0x7E57
    copyreg.add_extension("os", "system", code)
    try:
        data = pickle.dumps(Calls(os.system, "true"), 2)
        copyreg.remove_extension("os", "system", code)
        copyreg.add_extension(os.system.__module__, "system", code)
        data = pickle.dumps(Calls(os.system, "true"), 2)
        assert b"\x83" in data
        assert "EXT2" in refused(data).message
    finally:
        copyreg.remove_extension(os.system.__module__, "system", code)


def test_only_what_the_tables_make_is_called():
    for func in (b"N", b"K\x01", b"]", b"}", b"\x8c\x04eval", b"ctorch\nfloat32\n", b"ctorch\nFloatStorage\n", b"ctorch\nTensor\n", b"cbuiltins\nint\n",
                 b"cbuiltins\nobject\n", b"cnumpy\nndarray\n", b"cargparse\nNamespace\n)R", b"ctorch\nSize\n)R", b"\x8f", b"cnumpy\ndtype\n\x8c\x02f4\x85R"):  # fmt: skip
        for call in (b")R", b"K\x01\x85R", b")\x81", b")}\x92", b"NR", b"]R", b"}R", b"K\x05R", b"\x8c\x01aR", b"N\x81", b"))\x92"):
            refused(b"\x80\x04" + func + call + b".")
    for (module, name), build in KNOWN.items():
        assert build.__module__ == "ckptd.core.inert", (module, name)
    assert not MARKERS & KNOWN.keys()
    assert not [family for family in FAMILIES if family.split(".")[0] in {"os", "sys", "builtins", "subprocess", "posix"} or family in {"torch", "numpy"}]


def test_builders_of_ours_survive_any_argument():
    values = [b"N", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"G\x7f\xf8" + bytes(6), b"\x8c\x00", b"\x8c\x01a", b"C\x00", b"C\x01a", b")", b"]", b"}",
              b"\x8f", b"K\x01\x85", b"]K\x01a", b"))\x86", b"]]]aa", b"}K\x01K\x02s", b"ctorch\nfloat32\n", b"ctorch\nTensor\n", b"cargparse\nNamespace\n)R",
              b"cnumpy\ndtype\n\x8c\x02f4\x85R", b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R",
              b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)R", b"cbuiltins\nslice\nK\x01\x85R", b"\x88", b"G\x3f\xf0" + bytes(6)]  # fmt: skip
    made = tried = 0
    for module, name in KNOWN:
        head = b"\x80\x04c" + module.encode() + b"\n" + name.encode() + b"\n"
        for first in [b"", *values]:
            for second in [b"", *values] if first else [b""]:
                for tail in (b"R.",) if second else (b"R.", b"R}b.", b"RN}K\x01K\x02s\x86b.", b"RK\x01K\x02s.", b"R(K\x01e."):
                    tried += 1
                    try:
                        load(head + b"(" + first + second + b"t" + tail)
                        made += 1
                    except BadForeign:
                        pass
    print(f"{tried} calls, {made} made something")


@pytest.mark.parametrize("target", [b"N", b"K\x01", b")", b"\x8c\x01a", b"C\x01a", b"\x8f", b"ctorch\nfloat32\n", b"ctorch\nTensor\n", b"cnumpy\ndtype\n\x8c\x02f4\x85R",
    b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R", b"\x96" + struct.pack("<Q", 3) + b"abc", b"cbuiltins\nslice\nK\x01\x85R",
    b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)R"], ids=repr)  # fmt: skip
def test_items_are_set_in_dicts_and_lists_only(target):
    """CVE-2026-24747: torch's unpickler before 2.10 did a SETITEM on whatever there was, tensors too."""
    for op in (b"K\x00K\x01s", b"(K\x00K\x01u", b"K\x00a", b"(K\x00e", b"(u", b"(e", b"(K\x00u"):
        refused(b"\x80\x04" + target + op + b".")
    for op in (b"(K\x00\x90", b"(\x90", b"}b", b"K\x01b"):
        if target != b"\x8f" or op[-1:] == b"b":
            refused(b"\x80\x04" + target + op + b".")
    refused(b"\x80\x04](K\x00K\x01u.")
    refused(b"\x80\x04}(K\x00e.")
    refused(b"\x80\x04}(K\x00u.")


def test_state_is_given_once_and_to_objects():
    index = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81"
    state = b"}X\x03\x00\x00\x00fqnX\x01\x00\x00\x00as"
    value, _ = load(b"\x80\x04" + index + state + b"b.")
    assert value == MetadataIndex("a")
    assert hash(value) == hash(MetadataIndex("a", None, 7))
    refused(b"\x80\x04" + index + state + b"b" + state + b"b.")  # after it was a key, its hash would change
    refused(b"\x80\x04}" + index + b"K\x01s.")  # a key that has no name yet
    refused(b"\x80\x04" + index + b"}X\x03\x00\x00\x00fqnX\x01\x00\x00\x00\x00sb.")
    refused(b"\x80\x04" + index + b"}X\x09\x00\x00\x00__class__Nsb.")
    refused(b"\x80\x02cargparse\nNamespace\n)R}b}b.")
    value, _ = load(b"\x80\x02cargparse\nNamespace\n)R}X\x09\x00\x00\x00__class__X\x01\x00\x00\x00asb.")
    assert type(value) is Made
    assert value.get("__class__") == "a"


@pytest.mark.parametrize("key", [b"]", b"}", b"\x8f", b"]\x85", b")]\x86", b"cargparse\nNamespace\n)R", b"\x96" + struct.pack("<Q", 1) + b"a", b"\x8a\x09" + b"\xff" * 8 + b"\x00",
    b"\x8a\x08" + struct.pack("<q", 2**61 - 1), b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R", b"(" + b"K\x01" * 65 + b"t",
    b")" + b"2\x86" * 20, b")" + b"\x85" * 100, b"cbuiltins\nslice\nK\x01\x85R"], ids=lambda k: repr(k[:20]))  # fmt: skip
def test_keys_are_atoms_and_small_tuples(key):
    refused(b"\x80\x04}" + key + b"K\x01s.")
    refused(b"\x80\x04}(" + key + b"K\x01u.")
    refused(b"\x80\x04(" + key + b"K\x01d.")
    refused(b"\x80\x04\x8f(" + key + b"\x90.")
    refused(b"\x80\x04(" + key + b"\x91.")
    refused(b"\x80\x04cbuiltins\nset\n](" + key + b"e\x85R.")
    refused(b"\x80\x04ccollections\nOrderedDict\n]](" + key + b"K\x01ea\x85R.")


def test_keys_that_collide_are_counted():
    """Ints hash to themselves, tuples of ints alike in every process: whoever writes the file can make a dict quadratic."""
    p1, p2, p5, mask = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64 - 1
    rotl = lambda x: ((x << 31) | (x >> 33)) & mask
    rotr = lambda x: ((x >> 31) | (x << 33)) & mask
    inverse1, inverse2 = pow(p1, -1, 2**64), pow(p2, -1, 2**64)
    target = (hash((1, 2)) - (2 ^ (p5 ^ 3527539))) & mask
    keys, first = [], 0
    while len(keys) < 3 * COLLISIONS_MAX:  # the hash of a pair is invertible: for any first item there is a second
        first += 1
        acc = rotl((p5 + first * p2) & mask) * p1 & mask
        second = (rotr(target * inverse1 & mask) - acc) * inverse2 & mask
        if second < 2**61 - 1 and hash((first, second)) == hash((1, 2)):
            keys.append((first, second))
    refused(pickle.dumps(dict.fromkeys(keys), 4))
    refused(pickle.dumps(set(keys), 4))
    refused(pickle.dumps(set(keys), 2))
    refused(pickle.dumps([{k: 1} for k in keys], 4))
    load(pickle.dumps({(i, j): 1 for i in range(100) for j in range(100)}, 4))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_and_every_extension(protocol):
    for name, part in positive().items():
        if name not in {"random", "numpy"}:  # large, and of the same opcodes
            data = pickle.dumps(part, protocol)
            value, used = load(data)
            assert used == len(data)
            for n in range(len(data)):
                refused(data[:n])
            again, used = load(data + b"\xff" * 100)  # a stream of several pickles is the caller's to read on
            assert used == len(data)
            assert name == "dtype" or repr(again) == repr(value)


LENGTHS = [0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


def test_lengths_that_lie_allocate_nothing():
    heads = [(b"B", 4), (b"\x8e", 8), (b"\x96", 8), (b"X", 4), (b"\x8d", 8), (b"T", 4), (b"\x8b", 4), (b"\x95", 8), (b"j", 4), (b"r", 4)]
    tracemalloc.start()
    for head, width in heads:
        for n in LENGTHS:
            field = (n & (256**width - 1)).to_bytes(width, "little")
            for rest in (b"", b"abc", b"abc."):
                try:
                    load(b"\x80\x04" + head + field + rest)
                except BadForeign:
                    pass
                if n > 3:
                    refused(b"\x80\x04" + head + field + rest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    for text in (b"I" + b"9" * 5000 + b"\n.", b"L" + b"9" * 5000 + b"L\n.", b"I1_000\n.", b"I 1\n.", b"I\n.", b"Inan\n.", b"L0x10L\n.", b"F\n.", b"Fx\n.", b"g-1\n.", b"Np-1\n.", b"gx\n.", b"V\\ud\n.",
                 b"S'\\x41'\n.", b"S'a\n.", b"S\n.", b"Sa\n."):  # fmt: skip
        refused(text)
    refused(b"\x80\x04\x8b" + (5000).to_bytes(4, "little") + b"\x01" * 5000 + b".")


SMALL = Limits(bytes_max=1 << 20, opcodes_max=100_000, containers_max=10_000, memo_max=5_000, copied_bytes_max=1 << 20, nodes_max=100_000)


@pytest.mark.parametrize("bomb", [
    b"]" * 90_000, b"}" * 90_000, b"\x8f" * 90_000, b"(" * 90_000, b"N" * 200_000, b"]2" * 60_000, b"N" + b"\x94" * 90_000, b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(90_000)),
    b"".join(b"Np%d\n" % i for i in range(20_000)), b")" + b"\x85" * 90_000 + b".", b"]" * 5000 + b"a" * 4999 + b".", b"(" * 201 + b"l" * 201 + b".", b")" + b"2\x86" * 15 + b"2\x86" * 200 + b".",
    b"](" * 90_000, b"cargparse\nNamespace\n\x94" + b"h\x00)R" * 30_000, b"cargparse\nNamespace\n\x940" + b"h\x00)\x81" * 30_000,
    b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"\x94\x8c\x06latin1\x94c_codecs\nencode\n\x94" + b"0h\x02h\x00h\x01\x86R" * 1000 + b".",
    b"(" + b"N" * 5000 + b"t\x94cbuiltins\nlist\n\x94" + b"h\x01h\x00\x85R" * 1000 + b".",
    b"B" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"\x94cbuiltins\nbytearray\n\x94" + b"h\x01h\x00\x85R" * 1000 + b".",
    b"".join(b"](" + (b"h" + bytes([i - 1]) if i else b"N") * 10 + b"e\x94" for i in range(20)) + b".",
    b"]\x94" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(60)) + b".",
], ids=lambda b: repr(b[:12]) + str(len(b)))  # fmt: skip
def test_bombs(bomb):
    for limits in (SMALL, Limits()):
        if limits is SMALL or len(bomb) < 1000:
            began = time.monotonic()
            tracemalloc.start()
            refused(b"\x80\x04" + bomb, limits=limits)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 16 << 20
            assert time.monotonic() - began < 20


def test_the_defaults_hold_for_a_bomb_of_their_own_size():
    began = time.monotonic()
    refused(bytes(257 << 20))
    refused(b"\x80\x04" + b"(" * (1 << 20))
    refused(b"\x80\x04" + b")" * 100 + b"\x85" * (1 << 20) + b".")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["made", "newobj", "state", "pairs", "list", "tuple", "dict", "slice"])
def test_a_deep_value_is_refused_and_freed(name):
    """In a process of its own: CPython frees slices, for one, by recursion, and a deep enough one ends the process."""
    n = 400_000
    head = b"cargparse\nNamespace\n\x940"
    data = {
        "made": head + b"h\x00" * n + b")R" + b"\x85R" * (n - 1), "newobj": head + b"h\x00" * n + b")\x81" + b"\x85\x81" * (n - 1), "state": head + b"h\x00)\x81" * n + b"b" * (n - 1),
        "pairs": head + b"h\x00)\x81K\x01" * n + b"N" + b"s" * n, "list": b"]" * n + b"a" * (n - 1), "tuple": b")" + b"\x85" * n,
        "dict": b"}K\x01" * n + b"N" + b"s" * n, "slice": b"cbuiltins\nslice\n\x940" + b"h\x00" * n + b"K\x01\x85R" + b"\x85R" * (n - 1),
    }[name]  # fmt: skip
    code = "import sys; from ckptd.core.pickles import load; from ckptd.errors import BadForeign\ntry: load(sys.stdin.buffer.read())\nexcept BadForeign: print('refused')"
    done = subprocess.run([sys.executable, "-c", code], input=b"\x80\x04" + data + b".", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"refused\n"), done.stderr[-500:]


def test_rings_of_plain_containers_are_refused():
    ring: list = []
    ring.append(ring)
    table: dict = {"a": [1, 2, 3]}
    table["self"] = [{"t": table}]
    pad = list(map(str, range(50)))
    for value in (ring, table, [pad, ring], (pad, table), argparse.Namespace(a=table, p=pad)):
        refused(pickle.dumps([value, pad], 4))
    owner = argparse.Namespace(pad=pad)
    owner.me = owner  # an object that knows itself: DeviceMesh does
    value, _ = load(pickle.dumps(owner))
    assert value.get("me") is value


def test_malformed_stacks_are_refused():
    for data in (b"", b".", b"\x80", b"\x80\x04", b"\x80\x04.", b"0.", b"2.", b"1.", b"(.", b"t.", b"u.", b"e.", b"d.", b"l.", b"b.", b"R.", b"\x81.", b"\x92.", b"s.", b"a.", b"\x85.", b"\x86.", b"\x87.", b"NN.", b"(N.",
                 b"N(.", b"NN(.", b"Q.", b"NQ.", b"\x90.", b"\x91.", b"h\x00.", b"j\x00\x00\x00\x00.", b"q\x00.", b"\x94.", b"Nh\x00.", b"(K\x01d.", b"K\x01(b.", b"K\x01(R.", b"](K\x01(e."):  # fmt: skip
        refused(data)
    assert load(b"N.")[0] is None
    assert load(b"\x80\x02NK\x010.")[0] is None
    assert load(b"N(K\x01K\x021.") == (None, 8)


@pytest.mark.parametrize(("state", "raw_bytes"), [
    ((1, (4,), "f4", False), 15), ((1, (4,), "f4", False), 17), ((1, (2**60,), "f4", False), 16), ((1, (2**31, 2**31), "f4", False), 16), ((1, (-1,), "f4", False), 4), ((1, (0, 2**62), "f4", False), 0),
    ((1, (2**62,), "V0", False), 0), ((1, (1,) * 65, "f4", False), 4), ((1, (4,), "O8", False), 32), ((1, (4,), "f4,i4", False), 32), ((1, (1,), "f16", False), 16), ((1, (True,), "f4", False), 4),
    ((1, 4, "f4", False), 16), ((1, (1.0,), "f4", False), 4), ((1, (4,), "<f4", False), 16), ((1, (4,), "V1000000000", False), 16), ((1, (4,), "(2,)f4", False), 32),
], ids=str)  # fmt: skip
def test_arrays_that_lie(state, raw_bytes):
    version, shape, code, fortran = state
    body = pickle.dumps(shape, 2)[2:-1]
    dtype = b"cnumpy\ndtype\nX" + struct.pack("<I", len(code)) + code.encode() + b"\x89\x88\x87R"
    data = b"\x80\x04cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01" + body + dtype + b"\x89B" + struct.pack("<I", raw_bytes) + bytes(raw_bytes) + b"tb."
    tracemalloc.start()
    refused(data)
    refused(b"\x80\x04cnumpy._core.numeric\n_frombuffer\n(B" + struct.pack("<I", raw_bytes) + bytes(raw_bytes) + dtype + body + b"X\x01\x00\x00\x00CtR.")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_arrays_of_objects_are_refused():
    for value in (np.array([1, "a", None], object), np.zeros(2, [("a", "f4"), ("b", "O")]), np.zeros(2, [("a", "f4")]), np.dtype("O"), np.dtype([("a", "i4")])):
        for protocol in PROTOCOLS:
            refused(pickle.dumps(value, protocol))


# --- what must be read ------------------------------------------------------------------------------------------------------


def positive():
    return {
        "none": None, "bools": [True, False], "ints": [0, 1, 255, 256, 65535, 65536, -1, 2**31, -(2**31), 2**63, 2**100, -(2**200)], "floats": [0.0, -1.5, 1e300, float("inf")],
        "text": ["", "é", "x" * 300, "\ud800", "a\nb\\c", "日本"], "bytes": [b"", b"\xff\x00", b"y" * 300], "bytearray": [bytearray(b"xy"), bytearray()], "complex": 1 - 2j,
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((),)), "sets": [{1, 2}, frozenset({"a"}), set()], "dicts": {1: "a", (1, "b"): 2, None: 3, 1.5: 4, b"k": 5, False: 6},
        "odict": collections.OrderedDict(a=1, b=collections.OrderedDict()), "counter": collections.Counter("aab"), "deque": collections.deque([1, 2], 5), "default": collections.defaultdict(list, {"a": [1]}),
        "slice": slice(1, None, 2), "range": range(1, 9, 2), "path": pathlib.PurePosixPath("/a/b"), "namespace": argparse.Namespace(lr=1e-3, betas=(0.9, 0.95)),
        "when": dt.datetime(2026, 1, 2, 3, 4, 5), "delta": dt.timedelta(1), "random": random.Random(3).getstate(), "array": np.arange(6, dtype=">i2").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.complex64(1j), np.str_("ab"), np.datetime64("2026-01-02"), np.timedelta64(3, "ns")],
        "arrays": [np.zeros((0, 3), "f2"), np.array(True), np.array(["a", "bcd"]), np.array([b"x"]), np.array(["2026-01"], "M8[M]")], "numpy": np.random.RandomState(1).get_state(), "dtype": np.dtype("<f8"),
    }  # fmt: skip


def same(ours, theirs) -> bool:
    if isinstance(theirs, np.ndarray | np.generic):
        return type(ours) is type(theirs) and ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    if isinstance(theirs, np.dtype):
        return np.dtype(ours.text) == theirs
    if isinstance(theirs, dict):
        return type(ours) is dict and list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, collections.deque):
        return ours == list(theirs)
    if isinstance(theirs, list | tuple):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(theirs, pathlib.PurePath):
        return ours == str(theirs)
    if isinstance(theirs, argparse.Namespace):
        return ours.what == Global("argparse", "Namespace") and ours.state == vars(theirs)
    if isinstance(theirs, dt.datetime | dt.timedelta):
        return ours.what == Global("datetime", type(theirs).__name__) and ours.args == theirs.__reduce__()[1]
    return type(ours) is type(theirs) and ours == theirs


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_training_writes_is_read(protocol):
    value = positive()
    for data in (pickle.dumps(value, protocol), pickletools.optimize(pickle.dumps(value, protocol)), pickle._dumps(value, min(protocol, 4))):
        ours, used = load(data)
        assert used == len(data)
        for name, theirs in pickle.loads(data).items():
            assert same(ours[name], theirs), (name, ours[name], theirs)


def test_shared_values_stay_shared_and_generators_are_inert():
    x = [1]
    ours, _ = load(pickle.dumps({"a": x, "b": x}))
    assert ours["a"] is ours["b"]
    for generator in (np.random.default_rng(3), np.random.RandomState(3), np.random.Generator(np.random.MT19937(1))):
        for protocol in range(2, 6):
            value, _ = load(pickle.dumps(generator, protocol))
            assert type(value) is Made
            assert value.what.module.startswith("numpy.random")


def test_objects_of_training_libraries_are_made_and_never_looked_for():
    for module, name in (("deepspeed.runtime.zero.config", "ZeroStageEnum"), ("megatron.core.enums", "ModelType"), ("transformers.training_args", "TrainingArguments"), ("accelerate.utils.dataclasses", "FP8"),
                         ("deepspeed.utils.tensor_fragment", "fragment_address"), ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"), ("torch.optim.lr_scheduler", "LambdaLR"),
                         ("deepspeed.checkpoint.universal_checkpoint", "SubparamShape"), ("torch.distributed.tensor.placement_types", "_StridedShard"), ("torch.distributed.fsdp.api", "ShardingStrategy")):  # fmt: skip
        value, _ = load(raw(module, name, b"K\x01\x85"))
        assert (value.what, value.args) == (Global(module, name), (1,))
        value, _ = load(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")\x81}X\x01\x00\x00\x00aK\x05sb.")
        assert value.get("a") == 5
        assert value.get("b", 7) == 7
        value, _ = load(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")\x81N}X\x01\x00\x00\x00aK\x05s\x86b(K\x01K\x02eK\x01K\x02s.")
        assert (value.get("a"), list(value.items), list(value.pairs)) == (5, [1, 2], [(1, 2)])


def test_dtypes_have_the_codes_of_safetensors():
    torch = pytest.importorskip("torch")
    codes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.bool: "BOOL", torch.complex64: "C64", torch.complex128: "complex128", torch.uint16: "U16"}
    value, _ = load(pickle.dumps(list(codes)))
    assert value == [Dtype(c) for c in codes.values()]
    value, _ = load(pickle.dumps({(torch.bfloat16, torch.float32): 1}))  # megatron's distributed optimizer has such keys
    assert value == {(Dtype("BF16"), Dtype("F32")): 1}
    every = {getattr(torch, d) for d in dir(torch) if isinstance(getattr(torch, d), torch.dtype)}
    for dtype in every:
        value, _ = load(pickle.dumps(dtype))
        assert type(value) is Dtype
    assert load(pickle.dumps(torch.Size((1, 2))))[0] == (1, 2)


def test_a_large_metadata_is_read_in_seconds():
    dcp = pytest.importorskip("torch.distributed.checkpoint.metadata")
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    n = 4000
    names = [f"model.layers.{i}.weight" for i in range(n)]
    properties = dcp.TensorProperties(torch.float32)
    metadata = dcp.Metadata({k: dcp.TensorStorageMetadata(properties, torch.Size((8, 4)), [dcp.ChunkStorageMetadata(torch.Size((4 * j, 0)), torch.Size((4, 4))) for j in range(2)]) for k in names},
                            {k: tuple(k.split(".")) for k in names}, {dcp.MetadataIndex(k, torch.Size((4 * j, 0)), j): _StorageInfo("__0_0.distcp", 7 * j, 7) for k in names for j in range(2)})  # fmt: skip
    data = pickle.dumps(metadata)
    began = time.process_time()
    value, _ = load(data)
    took = time.process_time() - began
    print(f"{2 * n} shards in {took:.2f} s, {len(data)} bytes")
    assert took < 4
    assert value.get("storage_data")[MetadataIndex(names[3], (4, 0))].get("offset") == 7
