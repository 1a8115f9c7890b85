"""Erasure coding: the field against another implementation, every erasure pattern, and all kernels against the reference."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import reedsolo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.core import parity
from ckptd.core.parity import BLOCKS_MAX, KERNELS, NUMPY, PARITY_MAX, Combine, decode_rows, encode_rows, encoder

CASES = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def padded(block, length):
    return bytes(block).ljust(length, b"\0")


def test_the_field_is_reedsolos():
    """An independent implementation of GF(2^8) with the same polynomial and generator."""
    reedsolo.init_tables(parity.POLYNOMIAL, generator=2)
    assert [[parity.multiply(a, b) for b in range(256)] for a in range(256)] == [[reedsolo.gf_mul(a, b) for b in range(256)] for a in range(256)]
    assert [parity.invert(a) for a in range(1, 256)] == [reedsolo.gf_inverse(a) for a in range(1, 256)]
    with pytest.raises(ZeroDivisionError):
        parity.invert(0)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 1), (4, 2), (5, 3), (6, 4), (28, 4)])
def test_parity_is_the_matrix_product_that_reedsolo_computes(k, m):
    reedsolo.init_tables(parity.POLYNOMIAL, generator=2)
    rng = np.random.default_rng(k)
    data = rng.integers(0, 256, (k, 33), np.uint8)
    made = [bytearray(33) for _ in range(m)]
    encoder(k, m)([row.tobytes() for row in data], made)
    rows = encode_rows(k, m)
    for i in range(m):
        want = [0] * 33
        for j in range(k):
            want = [w ^ reedsolo.gf_mul(rows[i][j], int(b)) for w, b in zip(want, data[j], strict=True)]
        assert list(made[i]) == want


def test_the_first_parity_block_is_plain_xor_and_the_first_column_ones():
    for k in range(1, BLOCKS_MAX):
        for m in range(1, min(PARITY_MAX, BLOCKS_MAX - k) + 1):
            rows = encode_rows(k, m)
            assert rows[0] == b"\1" * k
            assert {row[0] for row in rows} == {1}
            assert all(all(row) for row in rows), "a zero would be a node that this parity does not protect"


def test_the_matrix_stays_what_it_is():
    """Parity that one version wrote is decoded by the next."""
    assert [row.hex() for row in encode_rows(4, 2)] == ["01010101", "01d95cac"]
    assert [row.hex() for row in encode_rows(5, 3)] == ["0101010101", "019c7ba6f4", "0197d47bc5"]


@pytest.mark.parametrize("n", range(2, 11))
def test_every_erasure_pattern(n):
    """All of at most m lost blocks, data and parity, for every m; blocks of different lengths, some empty."""
    rng = np.random.default_rng(n)
    patterns = 0
    for m in range(1, min(PARITY_MAX, n - 1) + 1):
        k = n - m
        lengths = [int(x) for x in rng.integers(0, 90, k)]
        lengths[0] = 0 if k > 1 else lengths[0]
        data = [rng.integers(0, 256, x, np.uint8).tobytes() for x in lengths]
        size = max(lengths)
        made = [bytearray(size) for _ in range(m)]
        encoder(k, m)(data, made)
        blocks = [*data, *(bytes(b) for b in made)]
        for count in range(1, m + 1):
            for lost in combinations(range(n), count):
                left = [b for b in range(n) if b not in lost]
                have = tuple(sorted(left, key=lambda b: (b * 7 + count) % n)[:k])  # any k of them, in any order
                got = [bytearray(size) for _ in lost]
                Combine(decode_rows(k, m, have, lost))([blocks[b] for b in have], got)
                for b, g in zip(lost, got, strict=True):
                    assert bytes(g) == padded(blocks[b], size), (n, m, lost, have)
                patterns += 1
    print(f"n = {n}: {patterns} patterns")


def test_beyond_m_nothing_is_decoded():
    with pytest.raises(ValueError, match="it takes 4 different ones"):
        decode_rows(4, 2, (0, 1, 2), (3,))
    with pytest.raises(ValueError, match="it takes 4 different ones"):
        decode_rows(4, 2, (0, 1, 2, 2), (3,))
    for k, m in ((0, 1), (29, 4), (4, 5), (32, 1), (4, -1)):
        with pytest.raises(ValueError, match="there are 1 to 32"):
            encode_rows(k, m)


@CASES
@given(st.data())
def test_all_kernels_give_the_same_bytes(data):
    """Any coefficients, zeros too; lengths around the kernels' columns; inputs that end early; buffers that begin anywhere."""
    inputs, outputs = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    length = data.draw(st.one_of(st.integers(0, 1100), st.sampled_from([256, 512, 4096, 8191])))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = tuple(rng.choice([0, 1, *range(256)], inputs).astype(np.uint8).tobytes() for _ in range(outputs))
    short = [data.draw(st.one_of(st.just(length), st.integers(0, length))) for _ in range(inputs)]
    offsets = [data.draw(st.integers(0, 70)) for _ in range(inputs)]
    ins = [memoryview(rng.integers(0, 256, o + s, np.uint8).tobytes())[o:] for o, s in zip(offsets, short, strict=True)]
    accumulate, shift = data.draw(st.booleans()), data.draw(st.sampled_from([0, 1, 16]))
    start = rng.integers(0, 256, (outputs, length), np.uint8)
    results = []
    for kernel in KERNELS:
        room = aligned(outputs, length, shift)
        for view, row in zip(room, start, strict=True):
            view[:] = row.tobytes()
        Combine(rows, kernel)(ins, room, accumulate=accumulate)
        results.append([bytes(v) for v in room])
    assert all(r == results[-1] for r in results), dict(zip(KERNELS, results, strict=True))


def aligned(count, length, shift):
    """Writable views that begin at a multiple of 64 bytes, or `shift` bytes later."""
    pitch = -(-(length + 128) // 64) * 64
    memory = np.zeros(count * pitch + 64, np.uint8)
    at = -memory.ctypes.data % 64
    return [memoryview(memory)[at + i * pitch + shift : at + i * pitch + shift + length] for i in range(count)]


def test_wrong_arguments_are_refused():
    add = Combine((b"\1\1",))
    one, two, out = bytes(8), bytes(8), bytearray(8)
    for ins, outs in (([one], [out]), ([one, two], []), ([one, two], [out, out]), ([bytes(9), two], [out]), ([one, two], [out, bytearray(7)])):
        with pytest.raises(ValueError, match="inputs and"):
            add(ins, outs)
    with pytest.raises((TypeError, BufferError, ValueError)):
        add([one, two], [bytes(8)])
    for rows in ((), (b"",), (b"\1", b"\1\1")):
        with pytest.raises(ValueError, match="rows"):
            Combine(rows)
    with pytest.raises(ValueError, match="not in tuple"):
        Combine((b"\1",), "abacus")


@pytest.mark.skipif(KERNELS == (NUMPY,), reason="built without a C compiler")
def test_the_extension_refuses_what_would_harm():
    table = bytes(48)
    view = memoryview(bytearray(100))
    native = parity._parity
    for ins, outs in (([view[:50]], [view[49:99]]), ([bytes(50)], [view[:50], view[20:70]])):
        with pytest.raises(ValueError, match="overlaps"):
            native.combine(table * len(outs), ins, outs, False, 0)
    native.combine(table, [view[:50]], [view[50:]], False, 0)
    for arguments in (
        (table, [bytes(5)], [bytearray(6)], False, 0), (table[1:], [bytes(5)], [bytearray(5)], False, 0), (table, [bytes(5)], [bytearray(5)], False, 9),
        (table, [bytes(5)], [bytearray(5)], False, -1), (table, [], [bytearray(5)], False, 0), (table * 256, [bytes(5)] * 256, [bytearray(5)], False, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="buffer|tables|kernel"):
            native.combine(*arguments)
    for arguments in ((table, 5, [bytearray(5)], False, 0), (table, [bytes(5)], [bytes(5)], False, 0), (table, ["text"], [bytearray(5)], False, 0)):
        with pytest.raises((TypeError, BufferError)):
            native.combine(*arguments)
    kept = bytearray(6)
    with pytest.raises(ValueError, match="buffer"):
        native.combine(table, [kept], [bytearray(5)], False, 0)
    kept.append(1)  # a buffer that was not given back would forbid it


def test_the_machine_tests_itself(monkeypatch):
    assert parity.self_test() == []
    right = parity._entry
    monkeypatch.setattr(parity, "_entry", lambda c: right(c ^ (c == 2)))
    monkeypatch.setattr(parity, "encode_rows", lambda k, m: tuple(bytes([2] * k) for _ in range(m)))
    assert len(parity.self_test()) == 5 * (len(KERNELS) - 1), "a wrong table must be seen in every kernel"


def test_without_a_compiler_numpy_does_the_same():
    """The fallback, in a fresh interpreter that has no extension: the same bytes."""
    code = """if True:
        import sys
        sys.modules["ckptd.core._parity"] = None
        from ckptd.core import parity
        assert parity.KERNELS == ("numpy",) and parity.self_test() == []
        made = [bytearray(70000) for _ in range(3)]
        parity.encoder(4, 3)([bytes(range(j, 256)) * (40 * j) for j in range(4)], made)
        print(b"".join(made).hex())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    made = [bytearray(70000) for _ in range(3)]
    encoder(4, 3)([bytes(range(j, 256)) * (40 * j) for j in range(4)], made)
    assert done.stdout.strip() == b"".join(made).hex()
