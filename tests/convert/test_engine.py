"""What the engine does between a reader and a writer: comparing beside planning, 16-bit values that lie in the source, threads, files of one form."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
import torch

from ckptd import convert as engine
from ckptd.core.boxes import Box
from ckptd.core.cast import cast
from ckptd.core.emit import Known, OutFile, Sealed, Take, Taken, torch_file, whole
from ckptd.core.logical import Checkpoint, row_of
from ckptd.errors import Divergent, Unstorable
from ckptd.formats import Plan, place_of
from ckptd.reading import Pool
from ckptd.windows import Sums, flat

pytestmark = pytest.mark.timeout(60)

WEIGHT, MASTER = "model.w", "optim.state.w.master"
SHAPE = (48, 64)


class Source:
    """A folder with an fp32 master, its rounding, and a second copy of the master."""

    name = "toy"

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.asked = folder, []
        self.master = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
        self.master[0, :3] = np.nan, np.inf, 3.4e38  # the last is rounded to infinity
        self.weight = cast(self.master.reshape(-1), "F32", "BF16")
        self.copy = self.master.copy()

    def opened(self, *_):
        (self.folder / "a.bin").write_bytes(self.master.tobytes() + self.weight.tobytes() + self.copy.tobytes())
        made, size = Checkpoint("toy"), self.master.nbytes
        file = made.file("a.bin", (self.folder / "a.bin").stat().st_size)
        whole_box = Box.whole(SHAPE)
        made.add(MASTER, "F32", SHAPE, [row_of(whole_box, file, 0), row_of(whole_box, file, size + size // 2)])
        made.add(WEIGHT, "BF16", SHAPE, [row_of(whole_box, file, size)])
        made.pairs.append((WEIGHT, MASTER))
        made.prove()
        return place_of(str(self.folder)), self, made

    def write(self, checkpoint, _options):
        self.asked.append(sorted(checkpoint.tensors))
        takes = [Take(n, Box.whole(SHAPE), t.dtype) for n, t in sorted(checkpoint.tensors.items())]
        if MASTER not in checkpoint.tensors:
            takes.append(Take(WEIGHT, Box.whole(SHAPE), "BF16"))
        return Plan([OutFile("out.bin", tuple(takes))])


@pytest.fixture
def source(tmp_path, monkeypatch):
    made = Source(tmp_path / "in")
    monkeypatch.setattr(engine, "open_checkpoint", made.opened)
    monkeypatch.setattr(engine, "format_named", lambda _: made)
    return made


def test_sixteen_bits_that_lie_in_the_source_are_its_own(source, tmp_path):
    report = engine.convert(str(source.folder), str(tmp_path / "out"), "toy")
    assert (tmp_path / "out/out.bin").read_bytes() == source.master.tobytes() + source.weight.tobytes()
    assert source.asked == [[WEIGHT]]
    assert report.read_bytes == source.master.nbytes + source.weight.nbytes, "the master was read again for its rounding"


def test_a_weight_that_is_no_rounding_is_kept_beside_its_master(source, tmp_path):
    source.weight[7] += np.uint16(1)
    report = engine.convert(str(source.folder), str(tmp_path / "out"), "toy")
    assert (tmp_path / "out/out.bin").read_bytes() == source.weight.tobytes() + source.master.tobytes()
    assert source.asked[-1] == [WEIGHT, MASTER]
    assert any("not the rounding" in n for n in report.notes)


def test_a_writer_that_refuses_the_usual_outcome_is_asked_for_the_real_one(source, tmp_path, monkeypatch):
    write = source.write

    def picky(checkpoint, options):
        if MASTER not in checkpoint.tensors:
            raise Unstorable("no master")
        return write(checkpoint, options)

    monkeypatch.setattr(source, "write", picky)
    with pytest.raises(Unstorable, match="no master"):
        engine.convert(str(source.folder), str(tmp_path / "out"), "toy")
    source.weight[7] += np.uint16(1)
    engine.convert(str(source.folder), str(tmp_path / "out"), "toy")
    assert source.asked == [[WEIGHT, MASTER]]


def test_copies_that_differ_leave_nothing_whatever_the_writer_says(source, tmp_path, monkeypatch):
    source.copy[3, 3] += 1
    for refuse in (False, True):
        if refuse:
            monkeypatch.setattr(source, "write", lambda *_: (_ for _ in ()).throw(Unstorable("no room")))
        with pytest.raises(Divergent, match=r"optim\.state\.w\.master"):
            engine.convert(str(source.folder), str(tmp_path / "out"), "toy")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_pool_gives_every_item_once_and_ends_with_the_first_error():
    pool = Pool(2)
    try:
        assert sorted(pool.map(lambda n: n * n, range(500))) == [(n, n * n) for n in range(500)]
        assert list(pool.map(str, [])) == []

        def items():
            yield from range(5)
            raise ValueError("items")

        with pytest.raises(ValueError, match="items"):
            list(pool.map(str, items()))
        begun = []

        def work(n):
            begun.append(n)
            return 1 // (n - 3)

        with pytest.raises(ZeroDivisionError):
            list(pool.map(work, range(10_000)))
        assert len(begun) < 100
        begun.clear()
        for item, _ in pool.map(lambda n: begun.append(n), range(10_000)):
            time.sleep(0.05)  # a slow caller holds up the threads
            assert len(begun) < 50
            if item > 2:
                break
    finally:
        pool.close()


def archive(tree, values: bytes) -> bytes:
    """The file that the engine makes of a tree with one tensor."""
    from ckptd.core.crc import crc32

    file, out, sums = OutFile("x", torch_file(tree)), bytearray(), Sums()
    for segment, mark in flat(file.segments):
        data = segment.data if isinstance(segment, Known) else values if isinstance(segment, Take) else bytes(segment.nbytes)
        if mark:
            sums.parts.setdefault(mark, []).append((len(out), crc32(data), len(data)))
        out += data
    at = 0
    for segment in file.segments:
        if isinstance(segment, Sealed):
            out[at : at + segment.nbytes] = segment.make(sums.joined())
        at += segment.nbytes
    assert len(out) == file.nbytes
    return bytes(out)


def test_files_of_one_form_share_all_but_their_tensor():
    a, b = (np.random.default_rng(n).standard_normal((3, 5)).astype(np.float32) for n in (0, 1))
    made = {}
    for more in (0, False, 1, True, "1"):
        for name, values in (("a", a), ("b", b)):
            tree = {"param": whole(name, "F32", (3, 5)), "cat_dim": more}
            loaded = torch.load(io.BytesIO(archive(tree, values.tobytes())), weights_only=True)
            assert type(loaded["cat_dim"]) is type(more)
            assert loaded["cat_dim"] == more
            assert np.array_equal(loaded["param"].numpy(), values)
            made[name] = torch_file(tree)
    assert [type(s) for s in made["a"]] == [type(s) for s in made["b"]]
    assert made["a"][0] is made["b"][0]
    alone = torch.load(io.BytesIO(archive(whole("a", "F32", (3, 5)), a.tobytes())), weights_only=True)
    assert np.array_equal(alone.numpy(), a)
    with pytest.raises(Unstorable, match="storage of 15"):
        torch_file(Taken("F32", (4, 5), whole("a", "F32", (3, 5)).parts))
