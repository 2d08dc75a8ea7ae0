"""Inner products of domains' gradients, tensor by tensor, and the cosines of each part of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.evidence.matching import KINDS, Place, places_of
from surgery.live.heads import positions
from surgery.live.hooks import collecting_from
from surgery.live.losses import Loss, cross_entropy
from surgery.live.prompts import Batch, each
from surgery.scores.weights import zeros_on_disk
from surgery.tables import Cell

Products = tuple[tuple[float, ...], ...]  # [domain, domain]
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Part:
    """A part of a model, and the cosines of some domains' gradients in it.

    ``name``: a module's path, or a name for the modules that it sums. ``layer``: its number, None outside. ``kind``:
    "model", "layer", "module", or what ``places_of`` says. ``norms``: domain → ‖g‖. ``cosines``: domain → domain →
    cosine in [−1, 1], None where a gradient is zero.
    """

    name: str
    layer: int | None
    kind: str
    norms: dict[str, float]
    cosines: dict[str, dict[str, float | None]]

    @classmethod
    def of(cls, name: str, layer: int | None, kind: str, domains: Sequence[str], products: Sequence[Products]) -> Part:
        """The part that some tensors make up: their inner products added."""
        every = range(len(domains))
        total = [[math.fsum(one[a][b] for one in products) for b in every] for a in every]
        norms = {domain: math.sqrt(total[at][at]) for at, domain in enumerate(domains)}
        cosines = {
            a: {b: _cosine(total[i][j], total[i][i] * total[j][j]) for j, b in enumerate(domains)}
            for i, a in enumerate(domains)
        }
        return cls(name, layer, kind, norms, cosines)

    def row(self, pairs: Pairs) -> tuple[Cell, ...]:
        """The cosine of each pair of domains."""
        return tuple(self.cosines[a][b] for a, b in pairs)


@dataclass(frozen=True)
class Pull:
    """Two domains whose gradients agree or clash in one module: its path, layer and kind, and the cosine there."""

    module: str
    layer: int | None
    kind: str
    first: str
    second: str
    cosine: float

    def cells(self) -> tuple[Cell, ...]:
        """Its row in a table."""
        return self.module, f"{self.first}–{self.second}", self.cosine


def gathered(
    dims: Mapping[str, int], domains: Sequence[str], products: Mapping[str, Products]
) -> tuple[Part, tuple[Part, ...], tuple[Part, ...], tuple[Part, ...]]:
    """The whole model, its kinds of module, its layers, and the modules of every layer, each the sum of its tensors."""
    places = places_of(dims)

    def sums(groups: Mapping[tuple[int | None, str], list[str]], label: str | None) -> tuple[Part, ...]:
        return tuple(
            Part.of(label or _name(names, places), *key, domains, [products[name] for name in names])
            for key, names in groups.items()
        )

    kinds: dict[str, list[str]] = {}
    layers: dict[int, list[str]] = {}
    modules: dict[tuple[int | None, str], list[str]] = {}
    for name, place in places.items():
        kinds.setdefault(place.kind, []).append(name)
        if place.number is not None:
            layers.setdefault(place.number, []).append(name)
            modules.setdefault((place.number, place.kind), []).append(name)
    return (
        Part.of("model", None, "model", domains, list(products.values())),
        tuple(part for k in KINDS if k in kinds for part in sums({(None, k): kinds[k]}, k)),
        tuple(part for at in sorted(layers) for part in sums({(at, "layer"): layers[at]}, f"layer {at}")),
        sums(dict(sorted(modules.items(), key=lambda item: (item[0][0], KINDS.index(item[0][1])))), None),
    )


def pulls(stages: Sequence[Sequence[Part]], pairs: Pairs, count: int) -> tuple[tuple[Pull, ...], tuple[Pull, ...]]:
    """The strongest conflicts (the lowest first) and synergies (the highest first) among attention and MLP modules.

    By the mean cosine over the stages; ties in the order of the modules.
    """
    if count < 0:
        raise ValueError(f"strongest={count}: expected 0 or more")
    found = []
    for parts in zip(*stages, strict=True):
        for a, b in pairs if parts[0].kind in ("attention", "mlp") else ():
            values = [value for part in parts if (value := part.cosines[a][b]) is not None]
            if values:
                mean = math.fsum(values) / len(values)
                found.append(Pull(parts[0].name, parts[0].layer, parts[0].kind, a, b, mean))
    found.sort(key=lambda pull: pull.cosine)
    conflicts = [pull for pull in found if pull.cosine < 0][:count]
    synergies = sorted((pull for pull in found if pull.cosine > 0), key=lambda pull: -pull.cosine)[:count]
    return tuple(conflicts), tuple(synergies)


def _cosine(product: float, squares: float) -> float | None:
    return max(-1.0, min(1.0, product / math.sqrt(squares))) if squares > 0 else None


def _name(names: Sequence[str], places: Mapping[str, Place]) -> str:
    """The path of a module, or of the layer with the kind, where several of its modules are of that kind."""
    homes = {places[name].module for name in names}
    first = next(iter(homes))
    return first if len(homes) == 1 else f"{first.rpartition('.')[0]}[{places[names[0]].kind}]"


CHUNK = 1 << 16  # numbers of a gradient at a time: what fits the cache, and a run of the file, at once
Data = Mapping[str, Iterable[Batch]]


def inner_products(
    model: nn.Module, trained: Mapping[str, nn.Parameter], data: Data, losses: Mapping[str, Loss]
) -> tuple[dict[str, Products], dict[str, int], dict[str, float]]:
    """⟨g_a, g_b⟩ of every two domains in each of those parameters; and by domain the response tokens and mean loss."""
    dtype = max((torch.promote_types(p.dtype, torch.float32) for p in trained.values()), key=lambda one: one.itemsize)
    *starts, count = torch.tensor([0, *(p.numel() for p in trained.values())]).cumsum(0).tolist()
    places = {name: slice(at, at + p.numel()) for at, (name, p) in zip(starts, trained.items(), strict=True)}
    sums, tokens, values = [], {}, {}
    devices = {p.device for p in trained.values() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        for domain, batches in data.items():
            flat = zeros_on_disk(count, dtype)
            views = {name: flat[place] for name, place in places.items()}
            tokens[domain], values[domain] = _sum(model, trained, views, domain, batches, losses[domain])
            sums.append(flat)
    products = {}
    for name, place in places.items():
        gram = _products([flat[place] for flat in sums], list(tokens.values()))
        for domain, square in zip(data, gram.diagonal().tolist(), strict=True):
            if not math.isfinite(square):
                raise ValueError(f"the gradient of {name!r} is NaN or infinite on the batches of {domain!r}")
        products[name] = tuple(map(tuple, gram.tolist()))
    return products, tokens, values


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, a tied one once, under its first name.

    Raises:
        ValueError: there is none, or the weights are quantised, offloaded or sharded; the message says what to do.
    """
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"{name!r} is offloaded, and takes no gradient there: load the model without offloading")
        if hasattr(p, "placements"):
            raise ValueError(f"{name!r} is sharded over processes: gradients are compared in one process")
        narrow = p.element_size() < 2 or not p.dtype.is_floating_point
        if (narrow or getattr(model, "is_quantized", False)) and not hasattr(model, "peft_config"):
            raise ValueError(f"the model is quantised ({name!r} is {p.dtype}): load it in bfloat16, or add an adapter")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("every parameter is frozen: say which to differentiate, as by model.requires_grad_(True)")
    return found


def losses_of(data: Data, loss: Loss | Mapping[str, Loss] | None) -> dict[str, Loss]:
    if not isinstance(data, Mapping) or len(data) < 2:
        raise ValueError('expected two domains or more, like {"math": load_prompts(...), "qa": load_prompts(...)}')
    if not isinstance(loss, Mapping):
        return dict.fromkeys(data, cross_entropy if loss is None else loss)
    if set(loss) != set(data):
        raise ValueError(f"there are losses for {sorted(loss)} and data for {sorted(data)}: expected one for each")
    return dict(loss)


def _sum(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    sums: Mapping[str, Tensor],
    domain: str,
    batches: Iterable[Batch],
    loss: Loss,
) -> tuple[int, float]:
    """Add Σ over batches of tokens · gradient to ``sums``; the tokens, and the mean loss."""
    tokens, total, weight = 0, 0.0, 0

    def add(name: str, grad: Tensor) -> None:
        numbers = grad.reshape(-1)
        for at in range(0, len(numbers), CHUNK):
            part = numbers[at : at + CHUNK].cpu()
            sums[name][at : at + CHUNK].add_(part, alpha=weight)

    with collecting_from(model, trained, add):
        for at, batch in enumerate(each(f"gradients of {domain}", batches)):
            weight = int(positions(batch).sum())
            if not weight:
                raise ValueError(f"batch {at} of {domain!r} has no response token to predict")
            value = loss(model, batch)
            if value.ndim or not value.requires_grad:
                what = f"of the shape {tuple(value.shape)}" if value.ndim else "that no trained weight has a part in"
                raise ValueError(f"the loss of {domain!r} is {what}: expected a scalar that can be differentiated")
            if not math.isfinite(float(value.detach())):
                raise ValueError(f"the loss of {domain!r} is {float(value.detach())} on batch {at}")
            value.backward()
            tokens, total = tokens + weight, total + weight * float(value.detach())
    if not tokens:
        raise ValueError(f"the data of {domain!r} is empty: expected batches of prompts with responses")
    return tokens, total / tokens


def _products(rows: list[Tensor], tokens: list[int]) -> Tensor:
    """The inner products of one tensor's mean gradients, ``[domain, domain]`` in float64, a chunk at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for at in range(0, len(rows[0]), CHUNK):
        chunk = torch.stack([row[at : at + CHUNK].double() for row in rows])
        total += chunk @ chunk.T
    scale = 1 / torch.tensor(tokens, dtype=torch.float64)
    return total * scale[:, None] * scale
