"""Hugging Face: what `save_pretrained` writes and `from_pretrained` reads; and the folders of its Trainer and of accelerate, with optimizer and scheduler.

    config.json                          kept as `extras.config`, and written again
    model.safetensors                    or model-00001-of-0000N.safetensors with model.safetensors.index.json {"weight_map": {name: file}}
    pytorch_model.bin                    the same with torch.save
    optimizer.pt, scheduler.pt, scaler.pt, rng_state*.pth, trainer_state.json       of the Trainer; of accelerate with .bin, and random_states_*.pkl

Reading
- a file that the index names lies beside it, or it is refused: no path, no link, no pipe. Every tensor is in the file that the index says, in no other, and
  every tensor of those files is in the index;
- one of two tied weights is stored; the other becomes its alias if config.json ties them (in a .bin they share their storage);
- the optimizer's parameters are numbered in the order of the model's modules, which a .bin tells and a safetensors file does not (it is sorted). Then the
  hint `params` is asked for, or transformers itself, if it is installed, builds the model of config.json without memory and tells; names and the
  shapes of all moments are checked against it.

Writing: weights only, as `save_pretrained` cuts and names them.

Source: transformers 5.23 (modeling_utils.save_pretrained, trainer.Trainer._save_checkpoint), huggingface_hub 1.x (split_torch_state_dict_into_shards).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ckptd.core.archive import Tensor as Stored
from ckptd.core.boxes import Box, Shape
from ckptd.core.cast import FLOATS
from ckptd.core.emit import Known, OutFile, Taken, tensor_file, whole
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint, Row, row_of
from ckptd.core.pickling import TORCH_NAMES
from ckptd.core.tensorfile import parse
from ckptd.errors import BadArgument, BadForeign
from ckptd.formats import Place, Plan, ReadOptions, WriteOptions, need_drop
from ckptd.integrations.torch_native import Reader as TorchReader
from ckptd.integrations.torch_state import BUFFER, named_by_shape, read_state

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
OPTIMIZERS, SCHEDULERS, SCALERS = ("optimizer.pt", "optimizer.bin"), ("scheduler.pt", "scheduler.bin"), ("scaler.pt",)
RANDOM = re.compile(r"(?:rng_state|random_states)(?:_(\d{1,7}))?\.(?:pth|pkl)")
JSON_FILES = {"config.json": "config", "generation_config.json": "generation_config", "trainer_state.json": "trainer_state"}
"""Files that become objects, by name."""
CONFIGS = ("extras.config", "extras.generation_config")
"""Objects that are written again; others have no place in a folder of weights."""
TIES = (
    ("lm_head.weight", ("model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight", "shared.weight",
                        "transformer.word_embeddings.weight", "model.language_model.embed_tokens.weight", "decoder.embed_tokens.weight")),
    ("embed_out.weight", ("gpt_neox.embed_in.weight",)),
    ("encoder.embed_tokens.weight", ("shared.weight",)),
    ("decoder.embed_tokens.weight", ("shared.weight",)),
    ("cls.predictions.decoder.weight", ("bert.embeddings.word_embeddings.weight",)),
    ("lm_head.decoder.weight", ("roberta.embeddings.word_embeddings.weight",)),
)  # fmt: skip
"""What `tie_word_embeddings` ties: the name that is left out, and names under which it may be stored."""
LAYERS_MAX = 10_000

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.(?:safetensors|bin)")


class HuggingFace:
    """The format "hf"."""

    name = "hf"
    title = "Hugging Face: config.json and model.safetensors, in shards or not (and a Trainer's folder, to be read)"

    def probe(self, place: Place) -> bool:
        """See Format."""
        if place.only:
            return place.only.endswith(".safetensors") or re.fullmatch(r"pytorch_model.*\.bin", place.only) is not None
        return bool(_weights_of(_Folder(place))) or bool(_steps(place))

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format. `tag`: a Trainer's step, or the file or index to be read where there are several. Hints: `params`, names of the optimizer's
        parameters in its order; `optimizer` = "no" leaves the optimizer and all beside it unread."""
        return _Read(*_chosen(place, options.tag), options).checkpoint()

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `config`: `config` (text of config.json, where the source has none)."""
        return _Written(checkpoint, options).plan()


HF = HuggingFace()


# --- which files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of the place: names in it are shown with `lead` taken off, and read with it."""

    place: Place
    lead: str = ""

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.place.label}/{self.lead}".rstrip("/")

    @property
    def sizes(self) -> dict[str, int]:
        """Size by name, of what lies in it and not deeper."""
        return {n.removeprefix(self.lead): b for n, b in self.place.files.items() if n.startswith(self.lead) and "/" not in n.removeprefix(self.lead)}


def _weights_of(folder: _Folder) -> list[str]:
    """Files or indexes of weights in the folder, the first to be taken."""
    top = [*folder.sizes]
    indexes = [n for n in top if n.endswith((".safetensors" + INDEX, ".bin" + INDEX))]
    singles = [n for n in top if n in SINGLE or (n.endswith(".safetensors") and _SHARD.fullmatch(n) is None)]
    shards = [n for n in top if _SHARD.fullmatch(n) is not None]
    return sorted({*indexes, *singles} or {*shards[:1]}, key=lambda n: ("safetensors" not in n, n not in SINGLE, n))


def _steps(place: Place) -> list[int]:
    """Steps of a Trainer's output folder that hold weights."""
    folders = {n.split("/")[0] for n in place.files if n.count("/") == 1 and n.endswith((".safetensors", ".bin"))}
    return sorted(int(m[1]) for f in folders if (m := _CHECKPOINT.fullmatch(f)) is not None)


def _chosen(place: Place, tag: str) -> tuple[_Folder, str]:
    """The folder, and the file or index of weights in it."""
    if place.only:
        return _Folder(place), place.only
    steps = _steps(place)
    folder = _Folder(place)
    found = _weights_of(folder)
    if tag in found:
        return folder, tag
    number = (_CHECKPOINT.fullmatch(tag) or re.fullmatch(r"([0-9]{1,12})", tag)) if tag else None
    if tag and (number is None or int(number[1]) not in steps):
        msg = f"{place.label}: no checkpoint {tag}"
        raise BadArgument(msg, remedy=f"--tag takes one of {', '.join([*found, *map(str, steps)][:12])}")
    if number is not None or not found:
        folder = _Folder(place, f"checkpoint-{int(number[1]) if number else steps[-1]}/")
        found = _weights_of(folder)
    same_kind = [n for n in found if n.endswith((".safetensors", ".safetensors" + INDEX)) == found[0].endswith((".safetensors", ".safetensors" + INDEX))]
    if len(same_kind) > 1:
        msg = f"{folder.label}: weights are in {' and in '.join(same_kind[:4])}"
        raise BadArgument(msg, remedy="say which: --tag NAME, or remove what is left of another save")
    if not found:
        msg = f"{folder.label}: no weights are in it"
        raise BadForeign(msg)
    return folder, found[0]


def _json(folder: _Folder, name: str) -> Any:
    """The JSON of a file; a key that stands twice is refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [k for k, _ in pairs]
            msg = f"{name}: the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice"
            raise BadForeign(msg)
        return found

    try:
        return json.loads(folder.place.read(folder.lead + name), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        msg = f"{name}: no JSON: {e}"
        raise BadForeign(msg) from e


def _shards_of(folder: _Folder, index: str) -> dict[str, list[str]]:
    """file -> the tensors that an index says are in it. Raises BadForeign: a name that is no file beside the index."""
    table = _json(folder, index)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        msg = f"{index}: no weight_map of names to files"
        raise BadForeign(msg)
    found: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        found.setdefault(file, []).append(name)
    for file, names in found.items():
        if file in {"", ".", ".."} or any(c in file for c in "/\\\0") or not file.endswith((".safetensors", ".bin")):
            msg = f"{index}: {file[:80]!r} is no name of a file of weights beside it"
            raise BadForeign(msg, remedy="an index names files of its own folder only; is it what the model's publisher wrote?")
        if file not in folder.sizes:
            msg = f"{index}: {file} is not there (or is a link, or no regular file), and should hold {names[0]} and {len(names) - 1} more"
            raise BadForeign(msg, remedy="fetch it again; of Hugging Face's cache, whose files are links, make a folder: `hf download --local-dir`")
    return found


# --- reading ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Read:
    """A folder being read."""

    folder: _Folder
    weights: str
    options: ReadOptions
    out: Checkpoint = field(default_factory=lambda: Checkpoint("hf"))
    place: Place = field(init=False)
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.place, self.sizes = self.folder.place, self.folder.sizes

    def checkpoint(self) -> Checkpoint:
        """All of it."""
        self._model()
        if not self.place.only:
            for file, name in JSON_FILES.items():
                if file in self.sizes:
                    self.out.objects[f"extras.{name}"] = _json(self.folder, file)
            self._tie()
            if self.options.hints.get("optimizer") != "no":
                self._training()
            self._say_what_is_left()
        return self.out

    # --- weights ------------------------------------------------------------------------------------------------------------

    def _model(self) -> None:
        if _SHARD.fullmatch(self.weights) is not None and not self.place.only:
            msg = f"{self.folder.label}: {self.weights} is a shard, and its index is not there"
            raise BadForeign(msg, remedy="fetch the index (model.safetensors.index.json), or give the one file")
        if not self.weights.endswith(INDEX):
            self._file(self.weights)
            return
        for file, names in _shards_of(self.folder, self.weights).items():
            found = self._file(file)
            missing, more = sorted({*names} - {*found}), sorted({*found} - {*names})
            if missing or more:
                what = f"{missing[0]} is not in it" if missing else f"{more[0]} is in it, but not in the index"
                msg = f"{file}: {what}, and {len(missing) + len(more) - 1} more" if len(missing) + len(more) > 1 else f"{file}: {what}"
                raise BadForeign(msg, remedy=f"do {file} and {self.weights} belong together? fetch both again")

    def _file(self, file: str) -> list[str]:
        """The tensors of one file; their names."""
        number = self.out.file(self.folder.lead + file, self.sizes[file])
        found = self._safetensors(file, number) if file.endswith(".safetensors") else self._torch(file, number)
        return [*found]

    def _add(self, file: str, name: str, dtype: str, shape: Shape, row: Row) -> None:
        if MODEL + name in self.out.tensors or MODEL + name in self.out.aliases:
            msg = f"{file}: {name} is in another file too"
            raise BadForeign(msg)
        self.out.add(MODEL + name, dtype, shape, [row])

    def _safetensors(self, file: str, number: int) -> Sequence[str]:
        held = parse(self.place.reader(self.folder.lead + file), self.sizes[file])
        for name, (dtype, shape, begin, _) in held.tensors.items():
            self._add(file, name, dtype, shape, row_of(Box.whole(shape), number, begin))
        return [*held.tensors]

    def _torch(self, file: str, number: int) -> Sequence[str]:
        tree = read_state(self.place, self.folder.lead + file)
        if not isinstance(tree, dict):
            msg = f"{file}: a {type(tree).__name__}, and no state dict"
            raise BadForeign(msg)
        first: dict[tuple[Any, ...], str] = {}
        for name, leaf in tree.items():
            if not isinstance(name, str) or not isinstance(leaf, Stored):
                msg = f"{file}: {name!r} is no tensor"
                raise BadForeign(msg)
            place = (leaf.begin, leaf.dtype, leaf.shape, leaf.stride) if prod(leaf.shape) else (name,)
            stored = first.setdefault(place, name)
            if stored == name:
                shape = tuple(leaf.shape)
                self._add(file, name, leaf.dtype, shape, Row(Box.whole(shape), number, leaf.begin, tuple(leaf.stride)))
            else:
                self.out.aliases[MODEL + name] = MODEL + stored
        return [*tree]

    def _tie(self) -> None:
        """What config.json ties, of which one is stored."""
        config = self.out.objects.get("extras.config")
        if not isinstance(config, dict) or not _ties(config):
            return
        heads = [a for a in config.get("architectures") or () if isinstance(a, str)]
        for alias, stored in TIES:
            if MODEL + alias in self.out.tensors or (heads and alias.startswith("lm_head") and not any(_has_head(a) for a in heads)):
                continue
            held = next((s for s in stored if MODEL + s in self.out.tensors), None)
            if held is not None and MODEL + alias not in self.out.aliases:
                self.out.aliases[MODEL + alias] = MODEL + held

    # --- what a Trainer or accelerate adds ----------------------------------------------------------------------------------

    def _training(self) -> None:
        reader = TorchReader(self.out, self.place, _listed(self.options.hints.get("params")))
        for name in self.sizes:
            found = RANDOM.fullmatch(name)
            if found is None and name not in {*OPTIMIZERS, *SCHEDULERS, *SCALERS}:
                continue
            tree = reader.tree(self.folder.lead + name)
            reader.use(self.folder.lead + name)
            if found is not None:
                self.out.per_rank.setdefault(int(found[1] or 0), {})["extras.rng_state"] = reader.value("extras.rng_state", tree)
            elif name in OPTIMIZERS:
                if not reader.hint:
                    reader.hint = self._order(tree)
                reader.optimizer(tree)
            else:
                reader.extra(name.partition(".")[0], tree)  # noqa: S610  no SQL is near
        reader.finish()
        tensors = self.out.tensors  # a weight that no optimizer knows is frozen here, or a buffer that its name or dtype tells
        self.out.buffers = {n for n in self.out.buffers if tensors[n].dtype not in FLOATS or BUFFER.fullmatch(n)}
        state = self.out.objects.get("extras.trainer_state")
        if isinstance(state, dict) and type(state.get("global_step")) is int:
            self.out.objects["step"] = state["global_step"]

    def _order(self, tree: Any) -> list[str]:
        """Names of the numbered parameters of an optimizer's tree, in its order; [] where its own names, or the order of a .bin, say it."""
        groups = tree.get("param_groups") if isinstance(tree, dict) else None
        if not isinstance(groups, list) or any(g.get("param_names") for g in groups) or not self.weights.endswith((".safetensors", ".safetensors" + INDEX)):
            return []
        numbers = [[*g.get("params", ())] for g in groups]
        if not all(type(p) is int for g in numbers for p in g):
            return []
        shapes: dict[int, Shape] = {}
        for p, slots in (tree.get("state") or {}).items():
            seen = {tuple(v.shape) for s, v in slots.items() if isinstance(v, Stored) and s != "step"}
            if len(seen) == 1:
                shapes[p] = seen.pop()
        model = self._modules()
        weights = {n.removeprefix(MODEL): t.shape for n, t in self.out.tensors.items()}
        strange = sorted({*model} - {*weights})
        if model and strange:
            self._refuse(f"transformers builds this model with a parameter {strange[0]}, which is not stored under this name")
        ways = named_by_shape(numbers, shapes, [(n, weights[n]) for n in model])
        made = [ways[0][p] for g in numbers for p in g] if len(ways) == 1 else []
        if not made:
            self._refuse("transformers is not there to say the order of the model's parameters" if not model else "they fit in several ways, or in none")
        return made

    def _refuse(self, why: str) -> None:
        msg = f"{self.folder.label}: the optimizer's parameters are numbered, and {why}"
        remedy = "--hint params=NAME,NAME,... names them in the optimizer's order; --hint optimizer=no reads the weights alone"
        raise BadArgument(msg, remedy=remedy)

    def _modules(self) -> list[str]:
        """The model's parameters in the order of its modules, as transformers makes them of config.json; [] where it cannot be asked."""
        config = self.out.objects.get("extras.config")
        if not isinstance(config, dict) or any(isinstance(v, int) and v > LAYERS_MAX for k, v in config.items() if "layer" in k):
            return []
        try:
            return _ask_transformers(config)
        except Exception as e:  # noqa: BLE001  whatever another package thinks of this file: it was a question
            self.out.notes.append(f"transformers could not be asked for the order of parameters: {type(e).__name__}: {str(e)[:200]}")
            return []

    def _say_what_is_left(self) -> None:
        read = {h.name.removeprefix(self.folder.lead) for h in self.out.files} | {*JSON_FILES, self.weights}
        left = [n for n in self.sizes if n not in read and not n.startswith(".")]
        if left:
            self.out.notes.append(f"not read: {', '.join(left[:8])}" + (f" and {len(left) - 8} more" if len(left) > 8 else ""))


def _listed(hint: Any) -> list[str]:
    if isinstance(hint, str):
        return [n.strip() for n in hint.split(",") if n.strip()]
    return [str(n) for n in hint or ()]


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether embeddings are tied. transformers 4 did not write down its default, which was yes."""
    inner = config.get("text_config")
    said = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    return said is not False


def _has_head(architecture: str) -> bool:
    return any(part in architecture for part in ("LMHead", "CausalLM", "ConditionalGeneration", "MaskedLM", "DoubleHeads"))


def _ask_transformers(config: Mapping[str, Any]) -> list[str]:
    """Parameter names of the model of config.json, built without memory. Only classes of transformers itself are used, never code that comes with a model."""
    import torch
    import transformers

    known = {k: v for k, v in config.items() if k not in {"auto_map", "quantization_config"}}
    made = transformers.AutoConfig.for_model(**known)
    for name in config.get("architectures") or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            with torch.device("meta"):
                return [n for n, _ in kind(made).named_parameters()]
    return []


# --- writing ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Written:
    """A folder to be written."""

    source: Checkpoint
    options: WriteOptions
    notes: list[str] = field(default_factory=list)

    def plan(self) -> Plan:
        """Its files."""
        unknown = sorted(set(self.options.config) - {"config"})
        if unknown:
            msg = f"--config {unknown[0]}: Hugging Face's folders have no such setting"
            raise BadArgument(msg, remedy="there is config: the text of config.json")
        if self.options.dtype and self.options.dtype not in FLOATS:
            msg = f"--dtype {self.options.dtype}: weights are written as one of {', '.join(sorted(FLOATS))}"
            raise BadArgument(msg)
        dropped = self._dropped()
        configs = self._configs()
        weights = self._weights(configs.get("config"), dropped)
        if not weights:
            msg = "there are no weights to be written"
            raise BadArgument(msg)
        files = self._shards(weights)
        for name, value in self._retyped(configs, weights).items():
            files.append(OutFile(f"{name}.json", (Known(json.dumps(value, indent=2).encode() + b"\n"),)))
        return Plan(files, dropped=dropped, notes=self.notes)

    def _dropped(self) -> list[str]:
        """What is no weight, if the user lets it go."""
        source = self.source
        optimizer = [n for n in source.tensors if n.startswith("optim.")] + ([GROUPS] if source.groups else [])
        objects = [n for n in source.objects if n not in {GROUPS, *CONFIGS}] + [n for n in source.tensors if not n.startswith((MODEL, "optim."))]
        objects += [f"{n} of rank {r}" for r, held in source.per_rank.items() for n in held]
        buffers = [n for n in source.tensors if n in source.buffers] if "buffers" in self.options.drop else []
        masters = [n for n in optimizer if n.startswith(STATE) and n.endswith(".master")]
        if masters:
            self.notes.append(f"{len(masters)} weights are not the rounding of their masters: the weights are written, the masters are not")
        target = "a folder of Hugging Face"
        return need_drop("optimizer", optimizer, self.options, target) + need_drop("objects", objects, self.options, target) + buffers

    def _configs(self) -> dict[str, Any]:
        found = {n.removeprefix("extras."): self.source.objects[n] for n in CONFIGS if n in self.source.objects}
        given = self.options.config.get("config")
        if given is not None:
            try:
                found["config"] = json.loads(given) if isinstance(given, str) else dict(given)
            except ValueError as e:
                msg = f"--config config: no JSON: {e}"
                raise BadArgument(msg) from e
        if "config" not in found:
            self.notes.append("there is no config.json: the source does not have it; put the model's beside the weights")
        return found

    def _weights(self, config: Any, dropped: Sequence[str]) -> dict[str, tuple[str, Taken]]:
        """key -> (logical name, tensor): tied weights once, unless config.json does not tie them."""
        source = self.source
        apart = isinstance(config, dict) and not _ties(config)
        classes: dict[str, list[str]] = {n: [n] for n in source.tensors if n.startswith(MODEL) and n not in dropped}
        for alias, name in source.aliases.items():
            if name in classes and alias.startswith(MODEL):
                classes[name].append(alias)
        heads = {MODEL + alias for alias, _ in TIES}
        found = {}
        for name, all_names in classes.items():
            keys = all_names if apart else [next((n for n in all_names if n not in heads), all_names[0])]
            if len(all_names) > 1 and not apart and config is None:
                self.notes.append(f"tied, and stored once as {keys[0]}: {', '.join(all_names)}")
            for key in keys:
                found[key.removeprefix(MODEL)] = name, whole(name, self._dtype(name), source.tensors[name].shape)
        derived = {d for n, d in source.derived.items() if n in classes}
        if derived and not self.options.dtype:
            self.notes.append(f"weights are written as {', '.join(sorted(derived))}, as they are computed with; --dtype F32 writes their fp32 masters")
        return found

    def _dtype(self, name: str) -> str:
        held = self.source.tensors[name].dtype
        if held not in FLOATS or name in self.source.buffers:
            return held
        return self.options.dtype or self.source.derived.get(name, held)

    def _shards(self, weights: Mapping[str, tuple[str, Taken]]) -> list[OutFile]:
        """Filled in the order of the checkpoint, each as far as `shard_bytes` lets it."""
        shards: list[dict[str, Taken]] = [{}]
        at = 0
        for key, (_, taken) in weights.items():
            size = prod(taken.shape) * ITEM_BYTES[taken.dtype]
            if shards[-1] and at + size > self.options.shard_bytes:
                shards.append({})
                at = 0
            shards[-1][key] = taken
            at += size
        if len(shards) == 1:
            return [OutFile(SINGLE[0], tensor_file(shards[0].items(), {"format": "pt"}))]
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        files = [OutFile(n, tensor_file(s.items(), {"format": "pt"})) for n, s in zip(names, shards, strict=True)]
        total = sum(p.nbytes for s in shards for t in s.values() for p in t.parts)
        count = sum(prod(t.shape) for s in shards for t in s.values())
        index = {
            "metadata": {"total_parameters": count, "total_size": total},
            "weight_map": dict(sorted((k, n) for n, s in zip(names, shards, strict=True) for k in s)),
        }
        return [*files, OutFile(SINGLE[0] + INDEX, (Known(json.dumps(index, indent=2).encode() + b"\n"),))]

    def _retyped(self, configs: Mapping[str, Any], weights: Mapping[str, tuple[str, Taken]]) -> dict[str, Any]:
        """The configurations; the dtype that config.json says is that of the weights, for transformers 5 loads them as it."""
        out = dict(configs)
        config = out.get("config")
        changed = {t.dtype for n, t in weights.values() if t.dtype != self.source.tensors[n].dtype}
        if isinstance(config, dict) and len(changed) == 1:
            key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
            out["config"] = {**config, key: TORCH_NAMES[changed.pop()]}
        return out
