"""DeepSpeed's mixture of experts: which expert a rank's local one is, and which ranks hold the partitions of an expert's group. See `deepspeed`.

    <tag>/layer_L_expert_E_mp_rank_00_model_states.pt   weights of expert E of the L-th MoE layer, under names that hold E
    <tag>/expp_rank_P_mp_rank_00_optim_states.pt        without ZeRO: the whole optimizer of the first rank that holds the P-th share of the experts

With ep_size N, a rank holds every N-th part of each layer's experts and calls them 0, 1, ...; so do `param_shapes` and `param_slice_mappings`. A group of experts is
partitioned over the ranks that hold the same ones, all other groups over all ranks. Logical tensors have the experts' global numbers, as the files of weights
have them, and as a run with ep_size 1 calls them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckptd.core.archive import Tensor as Stored
from ckptd.errors import BadForeign
from ckptd.formats import Place
from ckptd.integrations.deepspeed import EXPERT_FILE, EXPERT_OPTIM_FILE
from ckptd.integrations.deepspeed_flat import listing, mapping

EXPERT_NAME = re.compile(r"(.+\.deepspeed_experts\.)(\d{1,6})(\..+)")


class Experts:
    """The experts of a checkpoint; false if it has none. Raises BadForeign for what is not read."""

    def __init__(self, folder: Place, mp: int) -> None:
        self._files = {(int(m[1]) if m[1] else -1, int(m[2])): n for n in folder.files if (m := EXPERT_FILE.fullmatch(n))}
        self.optim = {int(m[1]): n for n in folder.files if (m := EXPERT_OPTIM_FILE.fullmatch(n))}
        self._totals: dict[str, int] = {}
        """Experts of a layer, by what stands before their numbers."""
        self._names: list[str] = []
        self._data_first = False
        self._mp = mp

    def __bool__(self) -> bool:
        return bool(self._files)

    def check(self, states: Mapping[str, Any], file: str) -> None:
        """That `states`, the model states, tell of these experts, and how ranks hold them."""
        first = next(iter(self._files.values()))
        if states.get("ds_autoep_layers"):
            msg = f"{first}: experts that AutoEP made are not read: a parameter holds several"
            raise BadForeign(msg, remedy="save it as a universal checkpoint (python -m deepspeed.checkpoint.ds_to_universal) and convert that")
        if self._mp > 1:
            msg = f"{first}: experts beside {self._mp} tensor or pipeline parallel ranks are not read: the files do not say which ranks hold the same experts"
            raise BadForeign(msg, remedy="save once with data and expert parallel ranks alone")
        counts = states.get("num_experts")
        if not isinstance(counts, list) or not all(type(c) is int and 0 <= c <= len(self._files) for c in counts):
            msg = f"{file}: num_experts does not say how many each layer has"
            raise BadForeign(msg, remedy="old versions of DeepSpeed wrote so; load and save it with a newer one")
        missing = [(layer, e) for layer, count in enumerate(counts) for e in range(count) if (layer, e) not in self._files]
        if missing or len(self._files) != sum(counts):
            some = f"layer_{missing[0][0]}_expert_{missing[0][1]}_mp_rank_00_model_states.pt is missing" if missing else f"{len(self._files)} files of experts"
            msg = f"{file}: {some}; its layers have {', '.join(map(str, counts))} experts"
            raise BadForeign(msg, remedy="the checkpoint is not whole: take another tag")
        config = states.get("ds_config")
        self._data_first = isinstance(config, dict) and bool(config.get("use_data_before_expert_parallelism"))

    def weights(self, tree: Callable[[str], Any]) -> Iterator[tuple[str, str, Stored]]:
        """(file, name, tensor) of all experts; `tree` reads a file."""
        for (_, number), file in sorted(self._files.items()):
            for name, tensor in mapping(tree(file), file).items():
                found = EXPERT_NAME.fullmatch(str(name))
                if not found or int(found[2]) != number or not isinstance(tensor, Stored):
                    msg = f"{file}: {name} is no tensor of expert {number}"
                    raise BadForeign(msg)
                self._totals[found[1]] = max(self._totals.get(found[1], 0), number + 1)
                self._names.append(str(name))
                yield file, str(name), tensor

    def ranks(self, count: int, dp: int, share: int) -> list[int]:
        """The data parallel ranks that hold this share of the experts, in the order of their partitions: `count` of `dp`."""
        return [share * count + i if self._data_first else share + i * (dp // count) for i in range(count)]

    def known(self, name: str, shares: int, share: int) -> str:
        """The logical name of what the ranks of this share call `name`."""
        if shares == 1:
            return name
        found = EXPERT_NAME.fullmatch(name)
        total = self._totals.get(found[1], 0) if found else 0
        if not found or total % shares or int(found[2]) >= total // shares:
            msg = f"{name} is partitioned over one of {shares} groups of ranks, and is no expert of {total} that these share"
            raise BadForeign(msg)
        return f"{found[1]}{share * (total // shares) + int(found[2])}{found[3]}"

    def everywhere(self, names: Sequence[str], shares: int) -> list[str]:
        """The logical names of all shares, where a share's parameters are `names` in the optimizer's order; in the order of a run with ep_size 1."""
        runs: list[list[str]] = []
        layer = None
        for name in names:
            found = EXPERT_NAME.fullmatch(name)
            if layer is None or (found[1] if found else "") != layer:
                runs.append([])
                layer = found[1] if found else ""
            runs[-1].append(name)
        return [self.known(n, shares, share) for run in runs for share in range(shares) for n in run]

    def names(self, prefix: str) -> list[str]:
        """The logical names of all that experts hold, layer by layer, behind `prefix`."""
        return [prefix + n for n in self._names]

    def local(self, name: str, shares: int, share: int) -> str | None:
        """What the ranks of this share call a logical tensor; None if it is another share's expert's."""
        found = EXPERT_NAME.fullmatch(name)
        if shares == 1 or not found or found[1] not in self._totals:
            return name
        count = self._totals[found[1]] // shares
        number = int(found[2]) - share * count
        return f"{found[1]}{number}{found[3]}" if 0 <= number < count else None

    def others(self, name: str) -> list[tuple[str, str]]:
        """(number, name) of this expert's parameter or buffer in all experts of its layer; of any other name, itself."""
        found = EXPERT_NAME.fullmatch(name)
        if not found or found[1] not in self._totals:
            return [("", name)]
        return [(str(i), f"{found[1]}{i}{found[3]}") for i in range(self._totals[found[1]])]


def shares_of(counts: Any, group: int, dp: int, file: str, *, experts: bool) -> int:
    """How many groups of ranks hold a param group, each a share of it: 1, or DeepSpeed's ep_size. `counts`: `partition_count`."""
    told = listing(counts, f"{file}: partition_count") if counts is not None else []
    count = told[group] if group < len(told) else dp
    if type(count) is not int or count < 1 or dp % count or (count != dp and not experts):
        msg = f"{file}: group {group} is partitioned over {count} of {dp} ranks, and no file is an expert's"
        raise BadForeign(msg, remedy="the checkpoint is not whole: take another tag")
    return dp // count
