"""torch.save files that lie, overlap, hide or announce what is not there: BadForeign. And what torch 2.13 writes: read, byte by byte as torch does."""

from __future__ import annotations

import argparse
import collections
import fractions
import io
import os
import pathlib
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from ckptd.core.archive import Storage, Tensor, part, read_torch, read_zip
from ckptd.core.pickles import Dtype, Made, item_bytes
from ckptd.errors import BadForeign

torch = pytest.importorskip("torch")


def port(data: bytes):
    return lambda begin, count: data[begin : begin + count]


def read(data: bytes):
    return read_torch(port(data), len(data))


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def refused(data: bytes, what: str = "") -> None:
    with pytest.raises(BadForeign) as e:
        read(data)
    assert what in e.value.message, e.value.message


def refused_zip(data: bytes, what: str = "") -> None:
    with pytest.raises(BadForeign) as e:
        read_zip(port(data), len(data))
    assert what in e.value.message, e.value.message


# --- a zip writer that lies on demand ---------------------------------------------------------------------------------------


class Zip:
    """Entries as they are told, for better or worse. `local` and `central` change fields of an entry's two descriptions."""

    LOCAL = {"sign": b"PK\x03\x04", "version": 20, "flags": 0x800, "method": 0, "time": 0, "date": 0, "crc": None, "packed": None, "size": None, "names": None, "extras": None}
    CENTRAL = {"sign": b"PK\x01\x02", "by": 0, "version": 20, "flags": 0x800, "method": 0, "time": 0, "date": 0, "crc": None, "packed": None, "size": None, "names": None, "extras": None, "comment": 0, "disk": 0, "internal": 0, "mode": 0, "begin": None}

    def __init__(self):
        self.body, self.directory, self.count = bytearray(), bytearray(), 0

    def add(self, name, data=b"", *, local=None, central=None, extra=b"", central_extra=b"", local_name=None, behind=b""):
        raw = name if isinstance(name, bytes) else name.encode()
        begin = len(self.body)
        told = {"crc": zlib.crc32(data), "packed": len(data), "size": len(data)}
        other = raw if local_name is None else local_name
        self.body += struct.pack("<4s5H3L2H", *({**self.LOCAL, **told, "names": len(other), "extras": len(extra), **(local or {})}.values()))
        self.body += other + extra + data + behind
        self.directory += struct.pack("<4s6H3L5H2L", *({**self.CENTRAL, **told, "names": len(raw), "extras": len(central_extra), "begin": begin, **(central or {})}.values()))
        self.directory += raw + central_extra
        self.count += 1
        return self

    def end(self, *, comment=b"", **told) -> bytes:
        fields = {"sign": b"PK\x05\x06", "disk": 0, "first": 0, "here": self.count, "count": self.count, "bytes": len(self.directory), "begin": len(self.body), "comment": len(comment), **told}
        return bytes(self.body + self.directory) + struct.pack("<4s4H2LH", *fields.values()) + comment

    def end64(self, locator=None, narrow=None, **told) -> bytes:
        fields = {"sign": b"PK\x06\x06", "length": 44, "by": 45, "version": 45, "disk": 0, "first": 0, "here": self.count, "count": self.count, "bytes": len(self.directory), "begin": len(self.body), **told}
        place = {"sign": b"PK\x06\x07", "disk": 0, "begin": len(self.body) + len(self.directory), "disks": 1, **(locator or {})}
        wide = struct.pack("<4sQ2H2L4Q", *fields.values()) + struct.pack("<4sLQL", *place.values())
        last = self.end(**(narrow or {}))
        return last[:-22] + wide + last[-22:]


def plain() -> Zip:
    return Zip().add("a/data.pkl", b"\x80\x02}.").add("a/byteorder", b"little").add("a/data/0", bytes(16))


def with_pickle(pickled: bytes, *storages: tuple[str, bytes]) -> bytes:
    made = Zip().add("a/data.pkl", pickled)
    for key, data in storages:
        made.add(f"a/data/{key}", data)
    return made.end()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor_pickle(*, kind=b"FloatStorage", key="0", numel=4, offset=0, shape=(4,), stride=(1,), tail=b".", pid=None, grad=b"\x89", more=b"", rebuild=b"_rebuild_tensor_v2") -> bytes:
    ints = lambda values: pickle.dumps(values, 2)[2:-1]
    pid = pid or b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + text(key) + text("cpu") + ints(numel) + b"t"
    return b"\x80\x02ctorch._utils\n" + rebuild + b"\n(" + pid + b"Q" + ints(offset) + ints(shape) + ints(stride) + grad + b"ccollections\nOrderedDict\n)R" + more + b"tR" + tail


def test_the_honest_forms_are_read():
    assert read(plain().end()) == {}
    assert read(plain().end64()) == {}
    assert read(plain().end64(narrow={"here": 0xFFFF, "count": 0xFFFF, "bytes": 0xFFFFFFFF, "begin": 0xFFFFFFFF})) == {}
    tensor = read(with_pickle(tensor_pickle(), ("0", bytes(16))))
    assert (tensor.shape, tensor.stride, tensor.dtype, tensor.nbytes, tensor.contiguous) == ((4,), (1,), "F32", 16, True)
    wide = struct.pack("<2H2Q", 1, 16, 4, 4)
    data = Zip().add("a/data.pkl", b"\x80\x02}.", local={"packed": 2**32 - 1, "size": 2**32 - 1}, extra=wide, central={"packed": 2**32 - 1, "size": 2**32 - 1}, central_extra=wide).end()
    assert read(data) == {}
    assert read_zip(port(Zip().end()), 22).entries == {}


NAMES = ["../x", "/x", "a/../../x", "a/..", "..", ".", "a/./b", "a//b", "a/", "/", "", "a\\b", "C:\\x", "a\x00b", "a\nb", "a\x7fb", "x" * 65535, "x" * 1025, b"a/\xff\xfe", "..\\..\\x", "./x", "a/\x1b[2J"]


@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n)[:20])
def test_names_that_lead_elsewhere(name):
    refused_zip(plain().add(name, b"x").end(), "name")
    refused_zip(Zip().add(name, b"x").end(), "name")


def test_names_that_clash():
    for first, second in (("a/data/1", "a/data/1"), ("a/data/x", "a/data/X"), ("a/straße", "a/STRASSE"), ("A/data.pkl", "a/data.pkl")):
        refused_zip(Zip().add(first, b"1").add(second, b"2").end(), "same name")


@pytest.mark.parametrize("changes", [
    {"method": 8}, {"method": 12}, {"method": 99}, {"flags": 0x801}, {"flags": 0x840}, {"flags": 0x2800}, {"flags": 0x820}, {"comment": 1}, {"disk": 1}, {"sign": b"PK\x01\x03"}, {"mode": 0xA1FF0000}, {"mode": 0x41ED0000},
    {"packed": 15}, {"packed": 17}, {"size": 15}, {"size": 17, "packed": 17}, {"size": 15, "packed": 15}, {"size": 2**31, "packed": 2**31}, {"size": 2**32 - 1}, {"size": 2**32 - 1, "packed": 2**32 - 1}, {"begin": 2**32 - 1},
    {"begin": 0}, {"begin": 1}, {"begin": 10_000}, {"crc": 7}, {"names": 7}, {"names": 200}, {"names": 0}, {"extras": 4}, {"extras": 60_000}, {"flags": 0x808},
], ids=str)  # fmt: skip
def test_descriptions_that_lie(changes):
    made = plain().add("a/data/1", bytes(16), central=changes).add("a/version", b"3")
    refused_zip(made.end())
    refused_zip(made.end64())
    local = {k: v for k, v in changes.items() if k in Zip.LOCAL}
    if local and set(local) != {"packed"} or local:
        refused_zip(plain().add("a/data/1", bytes(16), local=local).add("a/version", b"3").end())


def test_overlaps_and_gaps():
    """Fifield's bomb quotes local headers inside other entries; all entries here stand side by side."""
    made = plain()
    at = len(made.body)
    made.add("a/data/1", bytes(100))
    inner = Zip().add("a/data/2", bytes(10))
    quoted = Zip()
    quoted.body, quoted.directory, quoted.count = made.body[:], made.directory[:], made.count
    quoted.body[at + 30 + 8 : at + 30 + 8 + len(inner.body)] = inner.body
    quoted.directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0, 20, 0x800, 0, 0, 0, zlib.crc32(bytes(10)), 10, 10, 8, 0, 0, 0, 0, 0, at + 38) + b"a/data/2"
    quoted.count += 1
    refused_zip(quoted.end())
    twice = plain().add("a/data/1", bytes(16))
    twice.directory += twice.directory[-54:].replace(b"a/data/1", b"a/data/2")
    twice.count += 1
    refused_zip(twice.end())
    refused_zip(plain().add("a/data/1", bytes(16), behind=b"hidden").add("a/version", b"3").end(), "next begins")
    refused_zip(plain().add("a/data/1", bytes(16), behind=b"hidden").end(), "next begins")
    moved = plain()
    moved.body[0:0] = bytes(7)
    refused_zip(moved.end())


def test_what_stands_before_behind_and_between():
    good = plain().end()
    for junk in (b"\x00", b"#!/bin/sh\n", b"PK\x03\x04", good, b"\x80\x02}."):
        refused_zip(junk + good)
        refused_zip(good + junk)
        if junk != good:
            refused(junk + good, "plain pickle" if junk[:1] == b"\x80" else "")
            refused(good + junk)
    refused_zip(plain().end(comment=b"hello"))
    second = plain()
    refused_zip(good[:-22] + bytes(second.directory) + good[-22:])  # two directories
    other = Zip().add("a/data.pkl", b"\x80\x02].").end()
    for data in (other + good, good + other, other[:-22] + good, good[:-22] + other):
        refused_zip(data)
    refused_zip(plain().end64()[:-22] + good[-42:])  # two ends


@pytest.mark.parametrize("told", [{"disk": 1}, {"first": 1}, {"here": 2}, {"count": 2}, {"count": 4, "here": 4}, {"count": 2, "here": 2}, {"count": 0, "here": 0}, {"count": 65535, "here": 65535}, {"bytes": 0}, {"bytes": 2**32 - 1},
    {"begin": 0}, {"begin": 2**32 - 1}, {"begin": 5}, {"sign": b"PK\x05\x07"}, {"bytes": 100}], ids=str)  # fmt: skip
def test_ends_that_lie(told):
    refused_zip(plain().end(**told))
    if told.get("count") != 65535 and 2**32 - 1 not in told.values():
        refused_zip(plain().end64(narrow=told))


@pytest.mark.parametrize("told", [{"disk": 1}, {"first": 1}, {"here": 2}, {"count": 2}, {"count": 2**63, "here": 2**63}, {"count": 2**64 - 1, "here": 2**64 - 1}, {"count": 0, "here": 0}, {"bytes": 0}, {"bytes": 2**63}, {"bytes": 2**64 - 1},
    {"begin": 2**63}, {"begin": 2**64 - 1}, {"begin": 0}, {"length": 45}, {"length": 2**63}, {"length": 0}, {"sign": b"PK\x06\x05"}, {"bytes": 2**64 - 1, "begin": 300}, {"count": 10**9, "here": 10**9}], ids=str)  # fmt: skip
def test_zip64_ends_that_lie(told):
    full = {"here": 0xFFFF, "count": 0xFFFF, "bytes": 0xFFFFFFFF, "begin": 0xFFFFFFFF}
    tracemalloc.start()
    refused_zip(plain().end64(**told))
    refused_zip(plain().end64(narrow=full, **told))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    for locator in ({"disk": 1}, {"begin": 0}, {"begin": 2**64 - 1}, {"disks": 2}, {"disks": 0}):
        refused_zip(plain().end64(locator=locator))


def test_zip64_extras_that_lie():
    full = {"packed": 2**32 - 1, "size": 2**32 - 1}
    for extra in (b"", b"\x01\x00\x00\x00", struct.pack("<2HQ", 1, 8, 16), struct.pack("<2H2Q", 1, 16, 2**63, 2**63), struct.pack("<2H2Q", 1, 16, 2**64 - 1, 16), struct.pack("<2H3Q", 1, 24, 16, 16, 0),
                  struct.pack("<2H2Q", 1, 16, 16, 16) * 2, struct.pack("<2H2Q", 1, 15, 16, 16), struct.pack("<2H2Q", 1, 17, 16, 16), struct.pack("<2H2Q", 2, 16, 16, 16), struct.pack("<2H2Q", 1, 16, 17, 17), b"\x01"):  # fmt: skip
        refused_zip(plain().add("a/data/1", bytes(16), central=full, central_extra=extra).add("a/version", b"3").end())
        if extra != struct.pack("<2H2Q", 1, 16, 16, 16) * 2 and extra[:4] != b"\x01\x00\x18\x00" or extra == b"":
            refused_zip(plain().add("a/data/1", bytes(16), local=full, extra=extra).add("a/version", b"3").end())
    refused_zip(plain().add("a/data/1", bytes(16), central_extra=struct.pack("<2H2Q", 1, 16, 16, 16)).end())  # sizes told twice


def test_sizes_behind_the_data():
    follows = {"flags": 0x808, "crc": 0, "packed": 0, "size": 0}
    crc = zlib.crc32(bytes(16))
    for good in (struct.pack("<4s3L", b"PK\x07\x08", crc, 16, 16), struct.pack("<4sL2Q", b"PK\x07\x08", crc, 16, 16)):
        made = plain().add("a/data/1", bytes(16), local=follows, central={"flags": 0x808}, behind=good).add("a/version", b"3")
        assert read_zip(port(made.end()), len(made.end())).entries["a/data/1"].nbytes == 16
    for bad in (b"", struct.pack("<3L", crc, 16, 16), struct.pack("<4s3L", b"PK\x07\x08", crc, 15, 16), struct.pack("<4s3L", b"PK\x07\x08", 1, 16, 16), struct.pack("<4s3L", b"PK\x07\x09", crc, 16, 16), bytes(16), bytes(24), bytes(17)):
        refused_zip(plain().add("a/data/1", bytes(16), local=follows, central={"flags": 0x808}, behind=bad).add("a/version", b"3").end())


def test_compressed_and_encrypted_bombs():
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as z:
            z.writestr("a/data.pkl", bytes(10 << 20))
        tracemalloc.start()
        refused(file.getvalue(), "compressed")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as z:  # Python's own stored zip is as plain as torch's
        z.writestr("a/data.pkl", b"\x80\x02K\x07.")
    assert read(file.getvalue()) == 7


def test_archives_that_are_no_torch_files():
    refused(Zip().end(), "")
    refused(Zip().add("a/other", b"x").end(), "data.pkl")
    refused(Zip().add("data.pkl", b"\x80\x02}.").end(), "data.pkl")
    refused(Zip().add("a/data.pkl", b"\x80\x02}.").add("b/data.pkl", b"\x80\x02}.").end(), "2 entries")
    refused(Zip().add("a/data.pkl", b"\x80\x02}.").add("b/version", b"3").end(), "b/version")
    refused(Zip().add("a/data.pkl", b"\x80\x02}.").add("a/constants.pkl", b"").end(), "constants.pkl")
    refused(Zip().add("a/data.pkl", b"\x80\x02}.").add("a/byteorder", b"big").end(), "little-endian")
    refused(Zip().add("a/data.pkl", b"\x80\x02}.").add("a/byteorder", b"little" * 9).end(), "little-endian")
    refused(with_pickle(b"\x80\x02}.x"), "ends at byte")
    crc = Zip().add("a/data.pkl", b"\x80\x02}.", local={"crc": 5}, central={"crc": 5}).end()
    refused(crc, "CRC")
    for data in (b"", b"\x80", b"PK", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), bytes(600), b"\x89PNG", b"GGUF", b"{}", b"\x80\x02}.", pickle.dumps({"a": np.zeros(3)}), pickle.dumps(os.system)):
        refused(data)


def test_a_file_that_shrinks_while_it_is_read():
    data = saved({"a": torch.zeros(3)})
    for n in range(0, len(data), 7):
        with pytest.raises(BadForeign):
            read_torch(port(data[:n]), len(data))


# --- storages and tensors that lie ------------------------------------------------------------------------------------------


def test_storages_that_differ_from_their_entries():
    """CVE-2026-24747, second half: torch before 2.10 believed the number of elements in the pickle."""
    good = tensor_pickle()
    assert read(with_pickle(good, ("0", bytes(16)))).storage == Storage("0", "F32", 4, 30 + 10 + len(good) + 30 + 8, 16)
    for n in (0, 1, 4, 15, 17, 32, 1000):
        refused(with_pickle(good, ("0", bytes(n))), "announced")
    for numel in (0, 3, 5, 2**31, 2**62, 2**63, 2**64, -1, True, 4.0, "4", None):
        refused(with_pickle(tensor_pickle(numel=numel), ("0", bytes(16))))
    refused(with_pickle(good), "missing")
    refused(with_pickle(good, ("1", bytes(16))), "missing")
    for key in ("../data.pkl", "/0", "0\x00", "", "00", "9" * 5000):
        refused(with_pickle(tensor_pickle(key=key), ("0", bytes(16))), "missing")
    for kind in (b"DoubleStorage", b"HalfStorage", b"ByteStorage", b"QInt8Storage", b"float32", b"Tensor", b"NoStorage", b"Size"):
        refused(with_pickle(tensor_pickle(kind=kind), ("0", bytes(16))))


@pytest.mark.parametrize("pid", [b"N", b")", b"]", text("storage"), text("storage") + b"\x85", b"(" + text("module") + b"ctorch\nTensor\n" + text("a") + text("b") + b"K\x01t", b"(" + text("storage") + b"NNNNt",
    b"(" + text("storage") + b"ctorch\nFloatStorage\nK\x00" + text("cpu") + b"K\x04t", b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + b"NK\x04t", b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04Nt",
    b"(ccollections\nOrderedDict\n)Rctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04t"], ids=lambda p: repr(p[:30]))  # fmt: skip
def test_persistent_ids_that_are_no_storages(pid):
    refused(with_pickle(tensor_pickle(pid=pid), ("0", bytes(16))))


@pytest.mark.parametrize("changes", [
    {"shape": (5,)}, {"offset": 1}, {"stride": (2,)}, {"offset": -1}, {"stride": (-1,)}, {"shape": (-1,)}, {"shape": (2, 2)}, {"shape": (2, 2), "stride": (3, 1)}, {"shape": (1,) * 65, "stride": (0,) * 65}, {"shape": (2**62,), "stride": (2**62,)},
    {"shape": (2**31, 2**31), "stride": (0, 0)}, {"shape": (2**64,), "stride": (0,)}, {"offset": 2**63}, {"shape": [4]}, {"shape": None}, {"stride": None}, {"stride": (1.0,)}, {"shape": (True,)}, {"shape": ("4",)}, {"offset": None}, {"offset": True},
    {"grad": b"N"}, {"grad": b"K\x01"}, {"more": b"}X\x04\x00\x00\x00conj\x88s"}, {"more": b"}X\x03\x00\x00\x00neg\x88s"}, {"more": b"K\x07"}, {"more": b"NN"}, {"shape": (0,), "offset": -4}, {"shape": (1 << 32,), "stride": (0,)},
    {"rebuild": b"_rebuild_tensor"}, {"rebuild": b"_rebuild_tensor_v3"}, {"rebuild": b"_rebuild_parameter"}, {"rebuild": b"_rebuild_qtensor"}, {"rebuild": b"_rebuild_sparse_tensor"}, {"rebuild": b"_rebuild_wrapper_subclass_"},
], ids=str)  # fmt: skip
def test_tensors_that_leave_their_storage(changes):
    refused(with_pickle(tensor_pickle(**changes), ("0", bytes(16))))


def test_tensors_are_never_written_to_while_reading():
    """CVE-2026-24747, first half: a SETITEM on a tensor; and the same on everything else that is no dict."""
    for op in (b"K\x00G" + bytes(8) + b"s.", b"(K\x00K\x01u.", b"K\x00a.", b"(K\x00e.", b"}b.", b"N}\x86b.", b")R.", b")\x81.", b"K\x00\x85R."):
        refused(with_pickle(tensor_pickle(tail=op), ("0", bytes(16))))


def test_gadgets_in_every_pickle_of_every_form(tmp_path):
    """CVE-2025-32434 was the tar form and the rebuilders that torch's own list let through, with weights_only=True."""
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for value in (Evil(), {"a": torch.zeros(2), "b": Evil()}, [torch.nn.Parameter(torch.ones(1)), Evil()]):
        refused(saved(value), "system")
        refused(saved(value, _use_new_zipfile_serialization=False), "system")
    evil = pickle.dumps(Evil(), 2)
    magic, version, system = (pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    for stream in ([evil], [magic, evil], [magic, version, evil], [magic, version, system, evil], [magic, version, system, pickle.dumps({}, 2), evil]):
        refused(b"".join(stream), "system")
    for name in ("storages", "tensors", "pickle"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
            for member in (name, "pickle"):
                info = tarfile.TarInfo(member)
                info.size = len(evil)
                tar.addfile(info, io.BytesIO(evil))
        refused(file.getvalue(), "tar")
    for rebuild in (b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(X\x04\x00\x00\x00truetNtR.", b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nset\nctorch\nTensor\n)NtR.",
                    b"ctorch._tensor\n_rebuild_from_type_v2\n(X\x02\x00\x00\x00osctorch\nTensor\n)NtR.", b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nctorch\nTensor\n)NtR.",
                    b"ctorch._utils\n_rebuild_qtensor\n(" + b"N" * 7 + b"tR.", b"ctorch._utils\n_rebuild_parameter\n(ctorch\nTensor\n\x88NtR.", b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n(NNNNtR."):  # fmt: skip
        refused(with_pickle(b"\x80\x02" + rebuild))
    assert not canary.exists()


def test_every_truncation():
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        data = saved({"a": torch.arange(4.0), "b": torch.zeros(2, dtype=torch.bfloat16)}, **options)
        read(data)
        for n in range(len(data)):
            refused(data[:n])
        refused(data + b"\x00")


def test_streams_that_lie():
    data = saved({"a": torch.arange(4.0)}, _use_new_zipfile_serialization=False)
    assert data[-24:-16] == struct.pack("<q", 4)
    for n in (0, 3, 5, -1, 2**62):
        refused(data[:-24] + struct.pack("<q", n) + data[-16:], "says otherwise")
    magic, version, system = (pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    refused(magic + pickle.dumps(1002, 2) + system)
    refused(magic + version + pickle.dumps({"little_endian": False}, 2))
    refused(magic + version + pickle.dumps([], 2))
    pid = lambda numel, view=b"N": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("k") + text("cpu") + b"K" + bytes([numel]) + view + b"t"
    head = magic + version + system
    body = lambda keys, raw: pickle.dumps(keys, 2) + raw
    good = tensor_pickle(pid=pid(4))
    assert read(head + good + body(["k"], struct.pack("<q", 4) + bytes(16))).begin == len(head + good + body(["k"], b"")) + 8
    for keys in ([], ["k", "k"], ["x"], ["k", "x"], "k", ("k",), {"k": 1}, None, [1]):
        refused(head + good + body(keys, struct.pack("<q", 4) + bytes(16)))
    refused(head + good + body(["k"], struct.pack("<q", 4) + bytes(15)))
    refused(head + good + body(["k"], struct.pack("<q", 4) + bytes(17)))
    view = lambda key, offset, numel: b"(" + text(key) + pickle.dumps(offset, 2)[2:-1] + pickle.dumps(numel, 2)[2:-1] + b"t"
    assert read(head + tensor_pickle(pid=pid(4, view("v", 2, 2)), shape=(2,)) + body(["k"], struct.pack("<q", 4) + bytes(16))).storage.numel == 2
    for lie in (view("v", 2, 3), view("v", -1, 2), view("v", 0, -1), view("v", 2**62, 2**62), b"K\x01", b")"):
        refused(head + tensor_pickle(pid=pid(4, lie), shape=(2,)) + body(["k"], struct.pack("<q", 4) + bytes(16)))


def test_a_stream_larger_than_the_first_window():
    value = {f"layer.{i}.weight": i for i in range(60_000)} | {"t": torch.arange(5)}
    data = saved(value, _use_new_zipfile_serialization=False)
    ours = read(data)
    assert len(data) > 1 << 20
    assert bytes_of(data, ours["t"]) == torch.arange(5).numpy().tobytes()


# --- what torch writes ------------------------------------------------------------------------------------------------------


def bytes_of(data: bytes, tensor: Tensor) -> bytes:
    """The tensor's elements in order, gathered by hand."""
    size = item_bytes(tensor.dtype)
    flat = np.frombuffer(data, np.uint8)
    index = np.zeros(tensor.shape, np.int64)
    for dim, (n, step) in enumerate(zip(tensor.shape, tensor.stride, strict=True)):
        index += (np.arange(n) * step * size).reshape([-1 if d == dim else 1 for d in range(len(tensor.shape))])
    return flat[(tensor.begin + index.reshape(-1, 1) + np.arange(size)).reshape(-1)].tobytes() if tensor.numel else b""


def torch_bytes(tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(data: bytes, ours, theirs) -> bool:
    if isinstance(theirs, torch.Tensor):
        assert type(ours) is Tensor, ours
        assert ours.shape == tuple(theirs.shape)
        assert ours.requires_grad == theirs.requires_grad
        assert not ours.numel or ours.stride == theirs.stride()
        assert ours.contiguous == theirs.is_contiguous()
        assert ours.nbytes == theirs.numel() * theirs.element_size()
        return bytes_of(data, ours) == torch_bytes(theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(data, ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple):
        return type(ours) is (tuple if isinstance(theirs, tuple) else list) and len(ours) == len(theirs) and all(same(data, a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(theirs, np.ndarray | np.generic):
        return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    return type(ours) is type(theirs) and ours == theirs


FORMS = [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}, {"pickle_protocol": 5}]


def check(value, **options) -> None:
    data = saved(value, **options)
    assert same(data, read(data), torch.load(io.BytesIO(data), weights_only=False))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_what_torch_saves_is_read(options):
    base = torch.arange(60.0).reshape(3, 4, 5)
    linear = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3)
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    parameter.tensor_model_parallel = True  # megatron marks its parameters so
    marked = torch.ones(2)
    marked.note = "x"
    check({
        "model": linear.state_dict(), "optimizer": optimizer.state_dict(), "nested": {"a": [base, (base, {"b": base})], 3: None, (1, "x"): 2.5},
        "views": [base[1], base[:, 1:3], base.T if base.dim() == 2 else base.permute(2, 0, 1), base[..., ::2], base[1:, 2, 3], base.expand(3, 4, 5), torch.ones(1).expand(7, 3), base[3:], base.flatten()[60:]],
        "parameters": [parameter, torch.nn.Parameter(torch.ones(2), requires_grad=False), torch.nn.Buffer(torch.ones(2)), marked], "scalar": torch.tensor(3), "empty": [torch.zeros(0), torch.zeros(0, 4), torch.zeros(3, 0)], "size": base.shape,
        "odict": collections.OrderedDict(a=torch.ones(1)), "rng": torch.get_rng_state(), "numpy": [np.arange(5), np.random.RandomState(5).get_state(), np.float32(2)], "bytes": b"\xff\x00", "text": "é", "requires": torch.ones(2, requires_grad=True),
    }, **options)  # fmt: skip


@pytest.mark.parametrize("options", FORMS[:2], ids=str)
def test_every_dtype_is_read(options):
    dtypes = sorted({getattr(torch, d) for d in dir(torch) if isinstance(getattr(torch, d), torch.dtype)}, key=str)
    seen = 0
    for dtype in dtypes:
        try:
            tensor = torch.zeros(24, dtype=torch.uint8).view(dtype) if dtype.is_floating_point or "bits" in str(dtype) else torch.zeros(3, dtype=dtype)
            tensor.view(torch.uint8).copy_(torch.arange(tensor.numel() * tensor.element_size(), dtype=torch.uint8) if dtype is not torch.bool else torch.tensor([1, 0, 1], dtype=torch.uint8))
            data = saved([tensor, tensor[1:], dtype], **options)
        except UserWarning:  # complex32: torch announces that it is an experiment
            continue
        except (RuntimeError, KeyError):
            continue  # quantised and sub-byte ones, which torch itself cannot make so
        ours = read(data)
        assert bytes_of(data, ours[0]) == tensor.view(torch.uint8).numpy().tobytes()
        assert bytes_of(data, ours[1]) == tensor.view(torch.uint8).numpy().tobytes()[tensor.element_size() :]
        assert ours[2] == Dtype(ours[0].dtype)
        seen += 1
    print(f"{seen} dtypes")
    assert seen >= 18


def test_shared_storages_stay_shared():
    base = torch.arange(10)
    data = saved([base, base[2:5], base.view(2, 5)])
    assert len({t.storage for t in read(data)}) == 1
    assert read(data)[1].begin == read(data)[0].begin + 16


def test_what_is_refused_says_so():
    for value, word in ((torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "_rebuild_qtensor"), (torch.zeros(3, 3).to_sparse(), "_rebuild_sparse_tensor"),
                        (torch.zeros(3, dtype=torch.complex64).conj(), "conjugated"), (torch.zeros(3, device="meta"), "_rebuild_meta"), (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"), (fractions.Fraction(1, 2), "fractions.Fraction")):  # fmt: skip
        refused(saved(value), word)


def test_files_without_crcs_and_without_data():
    torch.serialization.set_crc32_options(False)
    try:
        data = saved({"a": torch.arange(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert bytes_of(data, read(data)["a"]) == torch.arange(3).numpy().tobytes()


def test_archives_beyond_four_gigabytes(tmp_path):
    """zip64 throughout. Nothing is written into the tensors' bytes, and nobody touches their memory: the file is a hole."""
    file = tmp_path / "big.pt"
    value = {"a": torch.empty(5 << 30, dtype=torch.uint8), "b": torch.zeros(3), "c": torch.empty(2 << 30, dtype=torch.bfloat16)}
    with torch.serialization.skip_data():
        torch.save(value, file)
    size = file.stat().st_size
    assert size > 9 << 30
    with file.open("rb") as f:
        ours = read_torch(lambda begin, count: os.pread(f.fileno(), count, begin), size)
    assert (ours["a"].nbytes, ours["b"].nbytes, ours["c"].nbytes) == (5 << 30, 12, 4 << 30)
    assert ours["b"].begin > 5 << 30
    with file.open("rb") as f:
        whole = zipfile.ZipFile(f)
        for tensor in ours.values():
            info = whole.getinfo(f"big/data/{tensor.storage.key}")
            assert info.header_offset < tensor.begin <= info.header_offset + 8192
            assert info.file_size == tensor.nbytes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A real dcp.save of one process, with a DTensor; and a torch.save of DTensors."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    folder = tmp_path_factory.mktemp("dcp")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        weight = distribute_tensor(torch.arange(12.0).reshape(4, 3), mesh, [Shard(0), Replicate()])
        state = {"model": {"w": weight, "b": torch.ones(3, dtype=torch.bfloat16)}, "optim": {"lr": [1e-3, 2], "betas": (0.9, 0.95)}, "rng": torch.get_rng_state()}
        dcp.save(state, checkpoint_id=folder / "ckpt")
        yield folder / "ckpt", state, saved({"w": weight, "n": torch.nn.Parameter(weight)})
    finally:
        dist.destroy_process_group()


def test_dcp_is_read(checkpoint):
    from ckptd.core.pickles import MetadataIndex, load

    folder, state, _ = checkpoint
    data = (folder / ".metadata").read_bytes()
    metadata, used = load(data)
    assert used == len(data)
    tensors = metadata.get("state_dict_metadata")
    assert tensors["model.w"].get("size") == (4, 3)
    assert tensors["model.b"].get("properties").state[0] == Dtype("BF16")
    assert [(c.get("offsets"), c.get("sizes")) for c in tensors["model.w"].get("chunks")] == [((0, 0), (4, 3))]
    assert tensors["optim.lr"].what.name == "BytesStorageMetadata"
    assert metadata.get("planner_data")["model.w"] == ("model", "w")
    assert metadata.get("storage_meta").get("checkpoint_id") == str(folder)
    seen = {}
    for index, info in metadata.get("storage_data").items():
        assert type(index) is MetadataIndex
        blob = (folder / info.get("relative_path")).read_bytes()
        begin, length = info.get("offset"), info.get("length")
        value = read_torch(part(port(blob), begin), length)
        item = blob[begin : begin + length]
        seen[index.fqn] = bytes_of(item, value) if type(value) is Tensor else value
    assert metadata.get("storage_data")[MetadataIndex("model.w", (0, 0))].get("length") > 0
    assert seen == {"model.w": torch_bytes(state["model"]["w"].to_local()), "model.b": torch_bytes(state["model"]["b"]), "optim.lr": [1e-3, 2], "optim.betas": (0.9, 0.95), "rng": torch_bytes(state["rng"])}


def test_dtensors_are_read(checkpoint):
    _, state, data = checkpoint
    value = read(data)
    for name in ("w", "n"):
        weight = value[name]
        assert type(weight) is Made
        assert weight.what.name == "DTensor"
        assert bytes_of(data, weight.get("_local_tensor")) == torch_bytes(state["model"]["w"].to_local())
        placements = weight.get("_spec").get("placements")
        assert [p.what.name for p in placements] == ["Shard", "Replicate"]
        assert placements[0].get("dim") == 0
        assert weight.get("_spec").get("tensor_meta").args[0] == (4, 3)
        assert weight.get("_spec").get("mesh").get("_mesh_dim_names") == ("dp", "tp")


def test_paths_and_namespaces_of_megatron():
    value = {"args": argparse.Namespace(save=pathlib.PurePosixPath("/x/y"), lr=3e-4, dtype=torch.bfloat16), "iteration": 7}
    ours = read(saved(value))
    assert ours["args"].get("save") == "/x/y"
    assert ours["args"].get("dtype") == Dtype("BF16")
