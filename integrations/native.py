"""ckptd's own checkpoints as a format: a store, a job, a step's directory, a folder of images, or one image.

Reading goes by index and manifest (`storage.checkpoint`), so everything that they promise is checked; of the newest steps the first valid one is taken.
Writing makes images as ranks of a job would have made them, cut along the first dimension as FSDP2 cuts, and, from the bytes that were written, checksums,
index and manifest. A `session.restore()` accepts the result on any mesh, and stock PyTorch loads the images.

What a job's objects become
- `optim.<name>.param_groups` of all ranks: one list of groups, the pipeline stages' parameters one after the other. Several optimizers become one,
  whose groups say of which they were (`OPTIMIZER`); so they are several again when ckptd's format is written;
- `optim.<name>.scalars`: numbers become 0-d tensors (`step` F32, others I64 or F64), for other formats have tensors there; `optim.python_slots` says
  which they were, so that the way back gives numbers. What is no number stays an object;
- an object that is equal on all ranks is one object, and `per_rank` otherwise: random states, data loaders;
- a tied weight's second copy is a replica of the first; a rank's own copies of a buffer (`name@r3`) are left out, and a note says so.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ckptd.core import checksum, manifest, typed
from ckptd.core.boxes import Box, Shape, chunk
from ckptd.core.cast import FLOATS, NUMPY
from ckptd.core.emit import Known, OutFile, Segment, Take
from ckptd.core.image import Entry, Image, Layout, Piece, header_bytes_of, lay_out, parse
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint, Tensor, row_of
from ckptd.errors import BadArgument, BadForeign, BadImage, CkptdError, NotFound, Unstorable
from ckptd.formats import Place, Plan, ReadOptions, WriteOptions, check_settings
from ckptd.storage import checkpoint

SCALARS, PYTHON_SLOTS, STEP = "optim.scalars", "optim.python_slots", "step"
OPTIMIZER = "ckptd_optimizer"
"""Key of a param group: the name of its optimizer, where a job has several, or gave the one a name."""
WINDOW_BYTES = 8 * checksum.BLOCK_BYTES
SETTINGS = ("job", "attempt", "step")
"""Of `--config`: the job's name, the attempt's and the step's number."""
COMMON_SLOTS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "exp_inf")
"""Slots of torch's optimizers: what a parameter without any state is said to lack."""

_DIRECTORY = re.compile(r"((?:[^/]+/)?step-[0-9]{8,18}(?:\.a[1-9][0-9]{0,17})?)/(?:manifest\.json|index\.msgpack\.zst|images/r[0-9]{5,}\.safetensors)")
_IMAGE = re.compile(r"r[0-9]{5,}\.safetensors")
_OWN = re.compile(r"(.+)@r([0-9]+)")
_GROUPS_OF = re.compile(r"optim\.(.*)param_groups")
_BUFFER = re.compile(r"(.*\.)?(running_mean|running_var|num_batches_tracked|inv_freq|rotary_emb\..*|position_ids|(attn_)?bias_mask|causal_mask)")


class AsTensor(np.ndarray[Any, Any]):
    """An array that was a torch tensor in the object that it is from, and becomes one again."""


class Native:
    """The format "ckptd"."""

    name = "ckptd"
    title = "ckptd: images, index and manifest; restores on any mesh, and stock PyTorch reads it"

    def probe(self, place: Place) -> bool:
        """See Format."""
        if place.only:
            return place.only.endswith(".safetensors") and _is_image(place, place.only)
        if any(_DIRECTORY.fullmatch(name) for name in place.files):
            return True
        first = next((n for n in place.files if _IMAGE.fullmatch(n.removeprefix("images/"))), "")
        return bool(first) and ("/" in first or _is_image(place, first))

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format. `tag`: a job, a step's number, or a step's directory. Hint `views`: "bytes" gives tensors of dtypes without a name here as bytes."""
        images = [place.only] if place.only else [n for n in place.files if _IMAGE.fullmatch(n)]
        found = _of_images(place, images) if images else _of_index(place, options.tag)
        try:
            return _Reader(place, found, views_as_bytes=options.hints.get("views") == "bytes").checkpoint()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as e:  # objects are what a file says they are
            msg = f"{place.label}: its objects are not what a job writes: {type(e).__name__}: {e}"
            raise BadForeign(msg) from e

    def prove_bytes(self, place: Place, options: ReadOptions, progress: Callable[[int, int], None] | None = None) -> None:
        """Compare every byte of the step that `read` takes with its checksums. Images alone have none. Raises ChecksumMismatch, StoreFailed."""
        if place.only or any(_IMAGE.fullmatch(n) for n in place.files):
            return
        found = _of_index(place, options.tag)
        done, total = 0, sum(place.files[n] for n in found.names.values())
        for rank, name in sorted(found.names.items()):
            for at, window in _windows(place, name, place.files[name]):
                for block in checksum.blocks_of(at, at + len(window)):
                    low = block * checksum.BLOCK_BYTES - at
                    checksum.check_block(name, block, window[low : low + checksum.BLOCK_BYTES], found.digests[rank])
                done += len(window)
                if progress:
                    progress(done, total)

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `ranks`: number of images. `config`: `SETTINGS`."""
        return _Writer(checkpoint, options).plan()


CKPTD = Native()


# --- finding ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Found:
    """A step, by index or by the headers of images: what lies where, and what each rank's image says of itself."""

    step: int
    names: dict[int, str] = field(default_factory=dict)
    """rank -> file"""
    infos: dict[str, manifest.TensorInfo] = field(default_factory=dict)
    rows: dict[str, list[manifest.Row]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    objects: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    digests: dict[int, bytes] = field(default_factory=dict)


def _header(place: Place, name: str) -> tuple[bytes, int]:
    size = place.files[name]
    return place.read(name, 0, header_bytes_of(place.read(name, 0, min(8, size)), size)), size


def _is_image(place: Place, name: str) -> bool:
    try:
        return b'"ckptd":' in _header(place, name)[0]
    except (BadImage, BadForeign, NotFound):
        return False


def _of_images(place: Place, names: Sequence[str]) -> _Found:
    """Images without index and manifest: their headers say what they hold; whether that is everything, `Checkpoint.prove` says."""
    found: _Found | None = None
    for name in names:
        image: Image = parse(*_header(place, name))
        rank = image.meta.rank
        if found is None:
            found = _Found(image.meta.step)
        if rank in found.names or image.meta.step != found.step:
            msg = f"{name}: it is the image of rank {rank} at step {image.meta.step}, beside {next(iter(found.names.values()))} of step {found.step}"
            raise BadForeign(msg, remedy="give one image, or the images of one step")
        found.names[rank] = name
        for entry in image.entries:
            p = entry.piece
            info = found.infos.setdefault(p.name, manifest.TensorInfo(p.dtype, p.shape, p.view))
            if info != manifest.TensorInfo(p.dtype, p.shape, p.view):
                msg = f"{name}: {p.name} has another dtype or shape than in another image"
                raise BadForeign(msg)
            begin = image.header_bytes + entry.begin
            found.rows.setdefault(p.name, []).append(manifest.Row(rank, p.box, begin, begin + p.nbytes))
        found.aliases |= image.meta.aliases
        found.objects[rank] = image.meta.objects
    assert found is not None  # noqa: S101  the caller has names
    found.notes.append("images without index and manifest: nothing says what their bytes were, so no checksum was looked at")
    return found


def _of_index(place: Place, tag: str) -> _Found:
    """The newest valid step, of those that `tag` means."""
    if "manifest.json" in place.files or not any(_DIRECTORY.fullmatch(n) for n in place.files):
        candidates = [""]
    else:
        candidates = _tagged(place, sorted({m[1] for n in place.files if (m := _DIRECTORY.fullmatch(n))}), tag)
    known = sorted(((_age(place, d), d) for d in candidates), reverse=True)
    troubles: list[CkptdError] = []
    for _, directory in known:
        full = place.full(directory).rstrip("/")
        try:
            stored, index = checkpoint.read_checkpoint(place.store, full)
        except CkptdError as e:
            troubles.append(e)
            continue
        lead = f"{directory}/" if directory else ""
        notes = [f"passed over: {e.message}" for e in troubles]
        return _Found(
            index.step, {i.rank: lead + i.name for i in stored.images}, dict(index.tensors), {n: [*r] for n, r in index.rows.items()},
            dict(index.aliases), {r: i.objects for r, i in index.images.items()}, notes,
            {r: i.digests for r, i in index.images.items()},
        )  # fmt: skip
    raise troubles[0]


def _age(place: Place, directory: str) -> tuple[int, int]:
    try:
        name = f"{directory}/manifest.json" if directory else "manifest.json"
        found = manifest.decode_manifest(place.read(name))
    except CkptdError:
        return -1, -1
    return found.attempt, found.step


def _tagged(place: Place, directories: Sequence[str], tag: str) -> list[str]:
    """The directories that a tag means: a job's, those of a step, or one."""
    chosen = [d for d in directories if not tag or tag in {d, d.rpartition("/")[2], d.rpartition("/")[0]} or _has_step(d, tag)]
    if not chosen:
        msg = f"{place.label}: no step is {tag!r}"
        raise NotFound(msg, remedy="`ckptd ls` lists the steps; --tag takes a job, a step's number, or a step's directory")
    jobs = {d.rpartition("/")[0] for d in chosen}
    if len(jobs) > 1:
        msg = f"{place.label} holds steps of {len(jobs)} jobs: {', '.join(sorted(jobs)[:4])}"
        raise BadArgument(msg, remedy="give the job's directory, or --tag JOB")
    return chosen


def _has_step(directory: str, tag: str) -> bool:
    split = checkpoint.split_directory(directory if "/" in directory else f"job/{directory}")
    job, _, number = tag.rpartition("/")
    return split is not None and number.isdecimal() and split[1] == int(number) and job in {"", split[0]}


# --- reading ----------------------------------------------------------------------------------------------------------------


class _Reader:
    """One checkpoint being made of what was found."""

    def __init__(self, place: Place, found: _Found, *, views_as_bytes: bool) -> None:
        self._place, self._found, self._views = place, found, views_as_bytes
        self._out = Checkpoint("ckptd", notes=found.notes)
        self._files = {rank: self._out.file(name, place.files[name]) for rank, name in sorted(found.names.items())}
        self._absent: set[str] = set()
        self._prefixes: set[str] = set()

    def checkpoint(self) -> Checkpoint:
        """All of it."""
        out = self._out
        values = {r: self._decoded(objects) for r, objects in sorted(self._found.objects.items())}
        for objects in values.values():
            self._absent |= {str(n) for n in objects.pop("absent", None) or ()}
            self._prefixes |= {m[1] for n in objects if (m := _GROUPS_OF.fullmatch(n))}
        if len(self._prefixes) > 1:
            names = ", ".join(sorted(p.rstrip(".") or "(unnamed)" for p in self._prefixes))
            out.notes.append(f"several optimizers ({names}) are read as one, their groups one after the other")
        self._tensors()
        self._objects(values)
        self._name_buffers()
        return out

    # --- tensors

    def _tensors(self) -> None:
        found, out = self._found, self._out
        own: set[str] = set()
        for name, info in found.infos.items():
            match = _OWN.fullmatch(name)
            if name.startswith("object/") or name in self._absent or name in found.aliases:
                continue
            if match and match[1] in found.infos:
                own.add(match[1])
                continue
            new = self._canonical(name)
            if new in out.tensors:
                msg = f"{name}: two optimizers have state of one parameter"
                raise BadForeign(msg)
            out.add(new, self._dtype(name, info), info.shape, self._rows(name))
        for alias, name in found.aliases.items():
            tensor = out.tensors.get(name)
            if tensor is None or (alias in found.infos and found.infos[alias] != found.infos[name]):
                msg = f"{alias}: it is tied to {name}, which is not there or not of the same shape"
                raise BadForeign(msg)
            out.aliases[alias] = name
            replicas = (*tensor.replicas, *self._rows(alias)) if alias in found.infos else tensor.replicas
            out.tensors[name] = Tensor(tensor.dtype, tensor.shape, tensor.rows, replicas)
        self._own = own
        if own:
            some = ", ".join(sorted(own)[:3]) + (f" and {len(own) - 3} more" if len(own) > 3 else "")
            out.notes.append(f"each rank has its own {some}: rank 0's is taken")

    def _canonical(self, name: str) -> str:
        for prefix in sorted(self._prefixes - {""}, key=len, reverse=True):
            lead = f"optim.{prefix}state."
            if name.startswith(lead):
                return STATE + name.removeprefix(lead)
        return name

    def _dtype(self, name: str, info: manifest.TensorInfo) -> str:
        if info.view and not self._views:
            msg = f"{name}: {info.view} is a dtype that other formats are not told of"
            raise BadForeign(msg, remedy="--hint views=bytes takes such tensors as bytes, with one more dimension")
        return info.dtype

    def _rows(self, name: str) -> Iterable[Any]:
        return [row_of(r.box, self._files[r.image], r.begin) for r in self._found.rows.get(name, ())]

    # --- objects

    def _decoded(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, entry in objects.items():
            plain = entry["value"] if isinstance(entry, dict) and "value" in entry else entry
            found[name] = typed.decode(plain, self._array)
        return found

    def _array(self, kind: str, reference: str) -> np.ndarray[Any, Any]:
        info, rows = self._found.infos.get(reference), self._found.rows.get(reference, ())
        if info is None or len(rows) != 1 or rows[0].box != Box.whole(info.shape):
            msg = f"{reference}: an object refers to it, and no image holds it whole"
            raise BadForeign(msg)
        raw = self._place.read(self._found.names[rows[0].image], rows[0].begin, rows[0].end - rows[0].begin)
        made: np.ndarray[Any, Any]
        if info.view == "complex128":
            made = np.frombuffer(raw, np.complex128).reshape(info.shape[:-1]).copy()
        elif info.dtype == "BF16":
            made = (np.frombuffer(raw, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(info.shape)
        elif info.view or info.dtype.startswith("F8"):
            msg = f"{reference}: arrays of {info.view or info.dtype} in objects are not read"
            raise BadForeign(msg)
        else:
            made = np.frombuffer(raw, NUMPY[info.dtype]).reshape(info.shape).copy()
        return made.view(AsTensor) if kind == "tensor" else made

    def _objects(self, values: Mapping[int, dict[str, Any]]) -> None:
        out = self._out
        merged = []
        for prefix in sorted(self._prefixes):
            by_rank = [v[f"optim.{prefix}param_groups"] for v in values.values() if f"optim.{prefix}param_groups" in v]
            named = {OPTIMIZER: prefix[:-1]} if prefix else {}
            merged += [{**g, **named} for g in _merged(by_rank)]
        if self._prefixes:
            out.objects[GROUPS] = merged
        self._scalars(values)
        for name in dict.fromkeys(n for v in values.values() for n in v):
            if _GROUPS_OF.fullmatch(name) or re.fullmatch(r"optim\.(.*)scalars", name):
                continue
            held = {r: v[name] for r, v in values.items() if name in v}
            alike = len({_text_of(name, v) for v in held.values()}) == 1
            if alike and not name.startswith("rng.") and self._policy(name) != "rng":
                out.objects[name] = next(iter(held.values()))
            else:
                for rank, value in held.items():
                    out.per_rank.setdefault(rank, {})[name] = value
        out.objects[STEP] = self._found.step

    def _policy(self, name: str) -> str:
        entry = next((o[name] for o in self._found.objects.values() if name in o), None)
        return str(entry.get("policy", "")) if isinstance(entry, dict) else ""

    def _scalars(self, values: Mapping[int, dict[str, Any]]) -> None:
        """Python numbers of the optimizer's state as tensors; the rest as an object."""
        rest: dict[str, dict[str, Any]] = {}
        python: set[str] = set()
        for objects in values.values():
            for name in [n for n in objects if re.fullmatch(r"optim\.(.*)scalars", n)]:
                for fqn, slots in objects[name].items():
                    for slot, value in slots.items():
                        full = f"{STATE}{fqn}.{slot}"
                        if isinstance(value, bool | int | float) and _fits(value):
                            python.add(slot)
                            if full not in self._out.tensors:
                                self._out.literal(full, *_literal(slot, value))
                        else:
                            rest.setdefault(fqn, {})[slot] = value
        if rest:
            self._out.objects[SCALARS] = rest
        if python:
            self._out.objects[PYTHON_SLOTS] = sorted(python)

    def _name_buffers(self) -> None:
        """A session does not say which names are buffers; ranks' own copies, integers, and what modules of torch and transformers call them are."""
        known = {f"{MODEL}{p}" for g in self._out.groups for p in g["params"]}
        for name, tensor in self._out.tensors.items():
            if name.startswith(MODEL) and name not in known and (name in self._own or tensor.dtype not in FLOATS or _BUFFER.fullmatch(name)):
                self._out.buffers.add(name)


def _fits(value: float) -> bool:
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _literal(slot: str, value: float) -> tuple[str, bytes]:
    if slot == STEP and abs(value) <= 1 << 24 and struct.unpack("<f", struct.pack("<f", value))[0] == value:
        return "F32", struct.pack("<f", value)
    if isinstance(value, bool):
        return "BOOL", bytes([value])
    if isinstance(value, int):
        return "I64", struct.pack("<q", value)
    return "F64", struct.pack("<d", value)


def _merged(by_rank: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ranks' param groups as one list: equal hyper-parameters at the same place are one group, whose parameters are all of theirs."""
    out: list[dict[str, Any]] = []
    texts: list[str] = []
    taken: set[str] = set()
    for groups in by_rank:
        for i, group in enumerate(groups):
            hyper = {k: _number(v) for k, v in group.items() if k != "params"}
            text = _text_of("group", hyper)
            new = [p for p in group["params"] if p not in taken]
            taken.update(new)
            if i < len(out) and texts[i] == text:
                out[i]["params"] += new
            elif new or i >= len(out):
                out.append({**hyper, "params": new})
                texts.append(text)
    return out


def _number(value: Any) -> Any:
    """A learning rate that is a 0-d tensor, as the number it is."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _text_of(name: str, value: Any) -> str:
    """An object as text in which arrays stand with their bytes' hash: equal text, equal objects."""

    def put(_path: str, item: Any) -> tuple[str, str] | None:
        if isinstance(item, np.ndarray):
            kind = "tensor" if isinstance(item, AsTensor) else "ndarray"
            return kind, f"{item.dtype}{item.shape}{xxhash.xxh3_128_hexdigest(np.ascontiguousarray(item).tobytes())}"
        return None

    return repr(typed.encode(value, name, put))


# --- writing ----------------------------------------------------------------------------------------------------------------


class _Writer:
    """One target being planned."""

    def __init__(self, source: Checkpoint, options: WriteOptions) -> None:
        check_settings(options, SETTINGS, "ckptd")
        if options.ranks < 1 or (options.tp, options.pp) != (1, 1):
            msg = f"{options.ranks} images with tp {options.tp} and pp {options.pp}"
            raise BadArgument(msg, remedy="give --ranks alone: a restore cuts to any mesh, whatever the images are")
        self._source, self._options = source, options
        self._job = str(options.config.get("job", "converted"))
        self._attempt = _whole("attempt", options.config.get("attempt", 1))
        self._step = _whole("step", options.config.get("step", self._guess_step()))
        self._pieces: list[list[Piece]] = [[] for _ in range(options.ranks)]
        self._bytes: list[dict[str, Any]] = [{} for _ in range(options.ranks)]
        """By rank: of each piece's name, its bytes if they are known, or the tensor that it is taken of, with the dtype."""
        self._dropped: list[str] = []
        self._inlined: list[str] = []
        self._notes: list[str] = []

    def plan(self) -> Plan:
        """See Format.write."""
        directory = checkpoint.step_dir(self._job, self._step)
        self._place_tensors()
        objects = self._place_objects()
        layouts = [
            lay_out(
                pieces, job=self._job, rank=rank, world_size=len(self._pieces), coords={"rank": rank}, aliases=self._source.aliases,
                objects_bytes=len(json.dumps(objects[rank])),
            )
            for rank, pieces in enumerate(self._pieces)
        ]  # fmt: skip
        files = [
            OutFile(f"{directory}/{manifest.image_name(r)}", (Known(self._header_of(layout, objects[r])), *self._segments(r, layout.entries)))
            for r, layout in enumerate(layouts)
        ]
        names = [f.name for f in files]
        return Plan(
            files, dropped=self._dropped, inlined=self._inlined, notes=self._notes, finish=lambda place: _seal(place, directory, names)
        )  # fmt: skip

    def _header_of(self, layout: Layout, objects: Mapping[str, Any]) -> bytes:
        return layout.render(attempt=self._attempt, step=self._step, objects=objects)

    def _segments(self, rank: int, entries: Iterable[Entry]) -> Iterable[Segment]:
        for entry in entries:
            held = self._bytes[rank][entry.piece.name]
            yield Known(held) if isinstance(held, bytes) else Take(held[0], entry.piece.box, entry.piece.dtype)

    def _guess_step(self) -> int:
        """The step that the checkpoint tells, or that its optimizer counted."""
        step = self._source.objects.get(STEP)
        if isinstance(step, int | float) and not isinstance(step, bool):
            return int(step)
        return int(max((v for n, v in self._source.scalars.items() if n.startswith(STATE) and n.endswith(".step")), default=0))

    # --- tensors

    def _place_tensors(self) -> None:
        source, drop = self._source, self._options.drop
        python = self._python_slots()
        owners = self._owners()
        for name, tensor in source.tensors.items():
            if (name.startswith("optim.") and "optimizer" in drop) or (name in source.buffers and "buffers" in drop):
                self._dropped.append(name)
            elif name.startswith(STATE) and name.rpartition(".")[2] in python and name in source.scalars:
                self._inlined.append(name)
            else:
                fqn, _, slot = name.removeprefix(STATE).rpartition(".")
                stored = f"optim.{owners[fqn]}.state.{fqn}.{slot}" if name.startswith(STATE) and owners.get(fqn) else name
                self._place(stored, name, tensor)
        for alias, name in source.aliases.items():
            self._place(alias, name, source.tensors[name])  # a session that ties them has both names
        masters = [n for n in source.tensors if n.startswith(STATE) and n.endswith(".master")]
        if masters and "optimizer" not in drop:
            self._notes.append(
                f"{len(masters)} masters of 16-bit weights are state of their own ({masters[0]} ...): a session that has none of it restores with strict=False"
            )

    def _place(self, stored: str, name: str, tensor: Tensor) -> None:
        dtype = self._options.dtype if self._options.dtype and name.startswith(MODEL) and tensor.dtype in FLOATS else tensor.dtype
        for rank, box in enumerate(_cut(tensor.shape, len(self._pieces))):
            if box is not None:
                self._pieces[rank].append(Piece(stored, dtype, tensor.shape, box))
                self._bytes[rank][stored] = (name,)

    def _owners(self) -> dict[str, str]:
        """Parameter -> the name of its optimizer, where there are names."""
        return {p: str(g[OPTIMIZER]) for g in self._source.groups if g.get(OPTIMIZER) for p in g["params"]}

    def _python_slots(self) -> set[str]:
        return {str(s) for s in self._source.objects.get(PYTHON_SLOTS) or ()}

    # --- objects

    def _place_objects(self) -> list[dict[str, Any]]:
        """The objects of every image, as typed JSON; their arrays become pieces."""
        out: list[dict[str, Any]] = [{} for _ in self._pieces]
        drop = self._options.drop
        if "optimizer" not in drop:
            self._place_optimizer(out[0])
        for name, value in self._source.objects.items():
            if name in {GROUPS, SCALARS, PYTHON_SLOTS, STEP}:
                continue
            self._place_object(out, 0, name, value)
        lost = []
        for rank, objects in sorted(self._source.per_rank.items()):
            for name, value in objects.items():
                if rank < len(out):
                    self._place_object(out, rank, name, value)
                elif not name.startswith("rng"):
                    lost.append(f"{name} of rank {rank}")
        if any(n.startswith("rng") for o in self._source.per_rank.values() for n in o):
            self._notes.append("random states belong to the mesh that they were saved on: a restore reseeds them")
        if lost and "objects" not in drop:
            msg = f"{lost[0]}: there are {len(out)} images, and each holds one rank's objects"
            raise Unstorable(msg, remedy=f"--ranks {max(self._source.per_rank) + 1} keeps them, --drop objects leaves them out")
        self._dropped += lost
        return out

    def _place_optimizer(self, out: dict[str, Any]) -> None:
        source, owners = self._source, self._owners()
        state = source.state()
        numbers: dict[str, dict[str, Any]] = {fqn: {} for fqn in state}
        for name in self._inlined:
            fqn, _, slot = name.removeprefix(STATE).rpartition(".")
            value = source.scalars[name]
            numbers[fqn][slot] = int(value) if slot == STEP and float(value).is_integer() else value
        for fqn, values in (source.objects.get(SCALARS) or {}).items():
            numbers.setdefault(fqn, {}).update(values)
        slots = sorted({s for held in state.values() for s in held} or COMMON_SLOTS)
        absent = []
        for owner in sorted({owners.get(p, "") for p in (*state, *(p for g in source.groups for p in g["params"]))}):
            lead = f"optim.{owner}." if owner else "optim."
            groups = [{k: v for k, v in g.items() if k != OPTIMIZER} for g in source.groups if g.get(OPTIMIZER, "") == owner]
            if groups:
                name = f"{lead}param_groups"
                out[name] = {"policy": "optimizer", "value": typed.encode(groups, name, self._putter(0))}
            else:
                self._notes.append("there are no param groups: a restore leaves the optimizer's own, and says that they are missing")
            mine = {fqn: v for fqn, v in numbers.items() if owners.get(fqn, "") == owner}
            out[f"{lead}scalars"] = {"policy": "optimizer", "value": typed.encode(mine, f"{lead}scalars", self._putter(0))}
            absent += [f"{lead}state.{p}.{s}" for g in groups for p in g["params"] if p not in state for s in slots]
        if absent:
            out["absent"] = {"policy": "absent", "value": absent}

    def _place_object(self, out: list[dict[str, Any]], rank: int, name: str, value: Any) -> None:
        if "objects" in self._options.drop:
            self._dropped.append(name if rank == 0 else f"{name} of rank {rank}")
            return
        policy = "rng" if name.startswith("rng") else "same"
        try:
            out[rank][name] = {"policy": policy, "value": typed.encode(value, name, self._putter(rank))}
        except Unstorable as e:
            raise Unstorable(e.message, remedy="--drop objects leaves all objects out, but for the optimizer's") from e

    def _putter(self, rank: int) -> typed.PutArray:
        def put(path: str, value: Any) -> tuple[str, str] | None:
            if not (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
                return None
            name = f"object/{path}@r{rank}"
            while name in self._bytes[rank]:
                name += "~"
            plain = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(value.shape)
            dtype = _DTYPES.get(plain.dtype.str.lstrip("<|="))
            if dtype is None:
                shape: Shape = (*plain.shape, plain.dtype.itemsize)
                self._pieces[rank].append(Piece(name, "U8", shape, Box.whole(shape), plain.dtype.name))
            else:
                self._pieces[rank].append(Piece(name, dtype, plain.shape, Box.whole(plain.shape)))
            self._bytes[rank][name] = plain.tobytes()
            return ("tensor" if isinstance(value, AsTensor) else "ndarray"), name

        return put


_DTYPES = {
    np.dtype(t).str.lstrip("<|="): code for code, t in NUMPY.items() if code != "BF16" and not code.startswith("F8")
}


def _whole(name: str, value: Any) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if number < 0:
        msg = f"--config {name}={value}: it is a number from 0 on"
        raise BadArgument(msg)
    return number


def _cut(shape: Shape, ranks: int) -> list[Box | None]:
    """The box of each rank, along the first dimension as `torch.chunk` cuts; a number, or a tensor without elements, is rank 0's."""
    whole = Box.whole(shape)
    if not whole.numel or not shape or ranks == 1:
        return [whole, *[None] * (ranks - 1)]
    boxes: list[Box | None] = []
    for rank in range(ranks):
        start, size = chunk(shape[0], ranks, rank)
        boxes.append(Box((start, *whole.start[1:]), (size, *shape[1:])) if size else None)
    return boxes


def _seal(place: Place, directory: str, names: Sequence[str]) -> list[OutFile]:
    """Index and manifest of the images that lie at `place`: checksums are made of the bytes that were written."""
    images: dict[int, Image] = {}
    digests: dict[int, bytes] = {}
    for rank, name in enumerate(names):
        header, size = _header(place, name)
        images[rank] = parse(header, size)
        digests[rank] = b"".join(checksum.digests_of(window) for _, window in _windows(place, name, size))
    index = manifest.build_index(images, digests)
    data = manifest.encode_index(index)
    text = manifest.encode_manifest(manifest.make_manifest(index, data, created_unix_s=time.time()))
    return [
        OutFile(f"{directory}/{manifest.INDEX_NAME}", (Known(data),)),
        OutFile(f"{directory}/{manifest.MANIFEST_NAME}", (Known(text),)),
    ]


def _windows(place: Place, name: str, size: int) -> Iterator[tuple[int, memoryview]]:
    """(place, bytes) of a file, in windows of whole checksum blocks; each is good until the next."""
    buffer = memoryview(bytearray(min(WINDOW_BYTES, max(size, 1))))
    for at in range(0, size, WINDOW_BYTES):
        window = buffer[: min(WINDOW_BYTES, size - at)]
        place.store.get(place.full(name), at, window)
        yield at, window
