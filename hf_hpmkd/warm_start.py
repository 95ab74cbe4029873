"""Starts a model from a larger one of its family: evenly chosen layers, leading channels. Trains and builds nothing.

The models are walked side by side. Layers in a numbered row are paired evenly (the first with the first, the last with
the last). From the larger one's tensors the leading channels are taken; where a tensor holds several parts (queries,
keys, values), those of each part.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_hpmkd.heads import find_classifier_head
from hf_hpmkd.models import CifarResNetForImageClassification, TabularForClassification
from hf_hpmkd.tasks.base import Feed

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Their layers read what others wrote one after the other, and leading channels would mix those up.
_CONCATENATING = ("DenseNet", "GhostNet")
_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
# Layers in a row: plain numbers, and those of timm's RegNet. Not conv1 and conv2, which differ in kind.
_NUMBERED = re.compile(r"(b|)(\d+)")
# Tensors that hold several parts in a row, of which the leading channels are wanted each: queries, keys and values;
# gate and value of a gated layer. (path, parts, dimension)
_PARTS = (
    (re.compile(r"(qkv|Wqkv)\.(weight|bias)$|in_proj_(weight|bias)$"), 3, 0),
    (re.compile(r"c_attn\.(weight|bias)$"), 3, -1),
    (re.compile(r"(gate_up_proj|Wi)\.(weight|bias)$"), 2, 0),
    # Swin lays four neighbouring patches side by side before it reduces them.
    (re.compile(r"downsample\.(norm\.(weight|bias)|reduction\.weight)$"), 4, -1),
)


@dataclass(frozen=True)
class WarmStart:
    """tensors: how many of the `total` parameter tensors got values from above, at least in part. fraction: share of
    all the parameters that did, in 0..1.
    """

    tensors: int
    total: int
    fraction: float


def can_warm_start(model: PreTrainedModel, above: PreTrainedModel) -> bool:
    """Whether the two share a family, so that `warm_start` can be called."""
    return _obstacle(model, above) is None


@torch.no_grad()
def warm_start(model: PreTrainedModel, above: PreTrainedModel, same_vocabulary: bool = True) -> WarmStart:
    """Copies layers and leading channels of `above` into `model`, in place; statistics of normalisation included.

    Layer i of m takes layer round(i (a - 1) / (m - 1)) of a. What has no counterpart keeps its values: channels beyond
    those above, embeddings of another vocabulary, kernels of another size, and the classifier where the classes are
    others or in another order. Equal architectures become equal models. Deterministic. same_vocabulary: whether both
    mean the same by a token id; False leaves embeddings of tokens as they are, even where there are as many.

    Raises ValueError if the two share no family (see `can_warm_start`).
    """
    if obstacle := _obstacle(model, above):
        raise ValueError(
            f"A model starts from another one of its family: {obstacle}. Start it from scratch, or "
            "name a chain of one family in chain.models."
        )
    words = None if same_vocabulary else model.get_input_embeddings()
    copied = {pair.path: pair.copy() for pair in _pairs(model, above) if words is None or pair.owner is not words}
    parameters = {path: parameter.numel() for path, parameter in model.named_parameters()}
    values = sum(copied.get(path, 0) for path in parameters)
    tensors = sum(path in copied for path in parameters)
    return WarmStart(tensors, len(parameters), values / sum(parameters.values()))


def _obstacle(model: PreTrainedModel, above: PreTrainedModel) -> str | None:
    """Why a model cannot start from another one; None if it can."""
    kinds = [type(getattr(one, "timm_model", one)) for one in (model, above)]
    if type(model) is not type(above) or kinds[0] is not kinds[1]:
        return f"{kinds[0].__name__} and {kinds[1].__name__} are two families"
    if odd := [cls.__name__ for cls in kinds[0].__mro__ if cls.__name__ in _CONCATENATING]:
        return f"channels of a {odd[0]} are of several layers, so the leading ones mean other things in a narrower one"
    if isinstance(model, TabularForClassification):
        inputs = [(c.num_numeric, c.cardinalities, c.embedding_sizes) for c in (model.config, above.config)]
        if inputs[0] != inputs[1]:
            return f"the two read other tables, {inputs[0]} and {inputs[1]} (numbers, categories, embeddings)"
    try:
        paired = {tensor.path for tensor in _pairs(model, above)}
    except ValueError as error:
        return f"their classes differ, and the classifier cannot be told from the rest ({error})"
    names = [name for name, _ in model.named_parameters()]
    matched = sum(name in paired for name in names)
    if 2 * matched < len(names):
        return f"only {matched} of {len(names)} tensors have a counterpart, so their layers are of other kinds"
    return None


# ---- pairs -----------------------------------------------------------------------------------------------------------

Channels = Callable[[int, int, int], tuple[Tensor, Tensor]]
"""Which channels of the one are which of the other: (size, size above, parts) to two index tensors of one length."""


@dataclass(frozen=True)
class _Pair:
    """A tensor of the model, the one above, and per dimension which of its places come from which."""

    path: str
    owner: nn.Module
    target: Tensor
    source: Tensor
    places: list[tuple[Tensor, Tensor]]

    def copy(self) -> int:
        """Number of values that were copied."""
        source, rank = self.source, self.target.dim()
        if is_traceable_wrapper_subclass(source):  # packed into 8 bits
            source = source.dequantize()
        values = source.to(self.target.device)
        for dim, (_, theirs) in enumerate(self.places):
            values = values.index_select(dim, theirs.to(values.device))
        if rank == 0:
            self.target.copy_(values)
        else:
            shapes = [[-1 if other == dim else 1 for other in range(rank)] for dim in range(rank)]
            index = tuple(ours.view(shape) for (ours, _), shape in zip(self.places, shapes, strict=True))
            self.target[index] = values.to(self.target.dtype)
        return values.numel()


def _pairs(model: PreTrainedModel, above: PreTrainedModel) -> Iterator[_Pair]:
    """Raises ValueError if the classes differ and there is no linear classifier to leave out."""
    head = (
        None if class_names(model) == class_names(above) else find_classifier_head(model, model.config.num_labels or 0)
    )
    channels = channels_between(model, above)
    for path, owner, target, source in _walk(model, above):
        if owner is not head and (places := _places(path, owner, target.shape, source.shape, channels)) is not None:
            yield _Pair(path, owner, target, source, places)


def channels_between(model: nn.Module, above: nn.Module) -> Channels:
    """Which channels a smaller model takes of a larger one of its family."""
    if isinstance(model, CifarResNetForImageClassification) and isinstance(above, CifarResNetForImageClassification):
        return _option_a(model.config.width, above.config.width)
    return _leading


def class_names(model: PreTrainedModel) -> list[str]:
    """In the order of the logits."""
    return [str(name) for _, name in sorted((model.config.id2label or {}).items())]


def _walk(module: nn.Module, above: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """(path, module, tensor, tensor above) of all tensors that have a counterpart in a module of the same class."""
    if type(module) is not type(above):
        return
    statistics = {name: tensor for name, tensor in module._buffers.items() if name in _STATISTICS}
    for name, target in {**module._parameters, **statistics}.items():
        source = above._parameters.get(name, above._buffers.get(name))
        if target is not None and source is not None:
            yield path + name, module, target, source
    names, theirs = list(module._modules), list(above._modules)
    for name, child in module._modules.items():
        partner = above._modules.get(counterpart(name, names, theirs) or "")
        if child is not None and partner is not None:
            yield from _walk(child, partner, f"{path}{name}.")


def counterpart(name: str, names: list[str], theirs: list[str]) -> str | None:
    """Which child of the module above answers to a child: the one of its name; in a numbered row, the one at the same
    relative place, round(i (a - 1) / (m - 1)), halves up. None if there is none.
    """
    if _NUMBERED.fullmatch(name) is None:
        return name if name in theirs else None
    for ours, others in numbered_rows(names, theirs):
        if name in ours:
            return others[relative_place(ours.index(name), len(ours), len(others))]
    return None


def numbered_rows(names: list[str], theirs: list[str]) -> list[tuple[list[str], list[str]]]:
    """The numbered rows among the children of a module, each with that of the module above; those that both have."""

    def rows(among: list[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in among:
            if numbered := _NUMBERED.fullmatch(name):
                found.setdefault(numbered[1], []).append(name)
        return found

    others = rows(theirs)
    return [(row, others[kind]) for kind, row in rows(names).items() if kind in others]


def relative_place(index: int, count: int, count_above: int) -> int:
    """Which of so many layers above answers to layer `index` of `count`: round(i (a - 1) / (m - 1)), halves up."""
    return int(index * (count_above - 1) / max(count - 1, 1) + 0.5)


def same_vocabulary(feed: Feed, above: Feed) -> bool:
    """Whether two feeds of texts mean the same by a token id; other feeds: yes."""
    ours, theirs = feed.processor, above.processor
    if not (isinstance(ours, PreTrainedTokenizerBase) and isinstance(theirs, PreTrainedTokenizerBase)):
        return True
    return ours.get_vocab() == theirs.get_vocab()


# ---- channels --------------------------------------------------------------------------------------------------------


def _places(
    path: str, owner: nn.Module, ours: torch.Size, theirs: torch.Size, channels: Channels
) -> list[tuple[Tensor, Tensor]] | None:
    """Per dimension, which places come from which; None where the tensors mean different things.

    Channels are the first two dimensions of a matrix or kernel, and the last one of any other tensor. The rest
    (kernel sizes, positions, vocabularies, windows) must agree.
    """
    rank = len(ours)
    free = (0, 1) if isinstance(owner, _MATRICES) and rank > 1 else (rank - 1,)
    if len(theirs) != rank or any(ours[dim] != theirs[dim] for dim in range(rank) if dim not in free):
        return None
    if rank > 1 and getattr(owner, "groups", 1) > 1 and ours[1] != theirs[1]:
        return None  # groups of another width: the leading channels of one are not those of the other
    parts = [1] * rank
    for pattern, count, dim in _PARTS:
        # Of ResNets, `downsample.norm` is a batch normalisation and has one part.
        if pattern.search(path) and isinstance(owner, (*_MATRICES, nn.LayerNorm, nn.MultiheadAttention)):
            parts[dim % rank] = count
    return [channels(a, b, count) for a, b, count in zip(ours, theirs, parts, strict=True)]


def _leading(ours: int, theirs: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """The leading channels that both have, of each of the parts."""
    if ours % parts or theirs % parts:
        parts = 1
    each = torch.arange(min(ours, theirs) // parts)
    first, second = (torch.cat([part * size // parts + each for part in range(parts)]) for size in (ours, theirs))
    return first, second


def _option_a(width: int, width_above: int) -> Channels:
    """Of CIFAR ResNets, whose shortcuts put zero channels on both sides of a stage's channels (option A): the leading
    channels of the first stage, and in later stages those that the shortcuts lead them to.
    """

    def inside(small: int, large: int, stage: int) -> Tensor:
        """For each channel of the narrower net's stage, its place in the wider one's."""
        if stage == 0:
            return torch.arange(small)
        few, many = small * 2 ** (stage - 1), large * 2 ** (stage - 1)  # channels before, and as many zero ones
        left, right = torch.arange(few // 2), torch.arange(few - few // 2)
        return torch.cat([left, many // 2 + inside(small, large, stage - 1), many // 2 + many + right])

    def channels(ours: int, theirs: int, parts: int = 1) -> tuple[Tensor, Tensor]:
        stage = {1: 0, 2: 1, 4: 2}.get(theirs // width_above)
        if ours == theirs or stage is None or (ours, theirs) != (width << stage, width_above << stage):
            return _leading(ours, theirs, parts)
        if ours < theirs:
            return torch.arange(ours), inside(width, width_above, stage)
        return inside(width_above, width, stage), torch.arange(theirs)

    return channels
