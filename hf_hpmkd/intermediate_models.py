"""Finds models of a size: between a teacher and a student, for a chain that shrinks in geometric steps, or so many
times smaller than a teacher, for a student. Trains nothing.

A model found is a name that `build_classifier` builds. Sizes are counted on the meta device.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from hf_hpmkd.classifiers import Classifier, build_classifier
from hf_hpmkd.model_names import parse_name, split_variant
from hf_hpmkd.model_shapes import Shape, read_shape
from hf_hpmkd.models import read_cifar_resnet_card
from hf_hpmkd.tasks.base import Rows

TOLERANCE = 0.15
"""A size may miss its target by this share, where the family allows."""

SMALLER_TOLERANCE = 1.5
"""The size of a model that is so many times smaller may miss its target by this factor."""

_BUILDS = 30  # per model looked for
_GOOD = 0.07  # no further search below this score
_DEPTH_FACTORS = (1.0, 0.9, 1.1, 0.8, 1.25, 0.6, 1.7)
_DEPTH_WEIGHT = 0.3  # what a wrong depth counts against a wrong size, both as logarithms


@dataclass(frozen=True)
class Intermediate:
    """A model of the chain: its name, its parameters, and the size that was looked for."""

    name: str
    num_params: int
    target: int


class Student(Protocol):
    """The student that a chain leads to: a model's name, and how its configuration is got from the Hub."""

    model: str
    revision: str | None
    trust_remote_code: bool


def build_intermediate(name: str, rows: Rows, student: Student, *, seed: int = 0, meta: bool = False) -> Classifier:
    """The intermediate model called `name`; one of the student's own architecture is got as the student is, at its
    revision. Other arguments, and what is raised, as in `build_classifier`.
    """
    same = split_variant(name)[0] == split_variant(student.model)[0]
    hub: dict[str, Any] = {"revision": student.revision, "trust_remote_code": student.trust_remote_code} if same else {}
    return build_classifier(name, rows, seed=seed, meta=meta, **hub)


def geometric_sizes(largest: int, smallest: int, count: int) -> list[int]:
    """The sizes between teacher and student, |θ_i| = |θ_T| (|θ_S| / |θ_T|)^(i/L) for i = 1 ... L - 1 with L = count + 1
    (Haase & da Silva 2025, component 2).

    largest, smallest: parameters of teacher and student; count: 0 gives none, 1 the geometric mean. Rounded, largest
    first. Raises ValueError unless 0 < smallest < largest and count >= 0.
    """
    if not 0 < smallest < largest:
        raise ValueError(
            f"A chain leads from a larger model to a smaller one, got {largest:,} and {smallest:,} parameters. Choose "
            "a smaller student or a larger teacher, or set chain.length to 0."
        )
    if count < 0:
        raise ValueError(f"The number of models between must be 0 or more, got {count}.")
    return [round(largest * (smallest / largest) ** (i / (count + 1))) for i in range(1, count + 1)]


def find_intermediates(
    student: str,
    teachers: Sequence[tuple[str, int]],
    rows: Rows,
    count: int,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[Intermediate]:
    """`count` models between the largest teacher and the student, largest first, of strictly falling size.

    teachers: name and number of parameters of each that has one; names that cannot be built again are fine. rows: as
    `build_classifier` takes them. revision, trust_remote_code: of the student. The models are the student grown, so
    that its preprocessing and warm starts serve the whole chain; where its family has no sizes to choose, a teacher
    shrunk. Sizes lie within TOLERANCE of the geometric grid where the family allows, else as near as it has them.

    Raises ValueError, with all that was tried, if there are no such models; what `build_classifier` raises for the
    student.
    """
    if count == 0:
        return []
    small = build_classifier(student, rows, meta=True, revision=revision, trust_remote_code=trust_remote_code)
    if not teachers:
        raise ValueError(
            f"Models between {student!r} and its teachers can be built where the size of a teacher is known, and it is "
            "of none here. Set chain.models to names of your own, or chain.length to 0."
        )
    ranked = sorted(teachers, key=lambda teacher: -teacher[1])
    targets = geometric_sizes(ranked[0][1], small.num_params, count)
    bounds = (small.num_params, ranked[0][1])
    tried: list[str] = []
    built = _build_teachers(ranked, rows, small, tried)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    for name, model in ((student, small), *built):
        family = _Family(name, model, rows, bounds, options if name == student else {})
        others = [other for other in ((student, small), *built) if other[0] != name]
        found = _choose(family.candidates(targets, others), targets, bounds)
        if found:
            return found
        tried += family.tried()
    raise ValueError(
        f"Between {student!r} ({bounds[0]:,} parameters) and {ranked[0][0]!r} ({bounds[1]:,} parameters) no chain of "
        f"{count} models can be built. Tried: {'; '.join(dict.fromkeys(tried)) or 'nothing'}. Set chain.models to "
        "names of your own, or chain.length to 0."
    )


def find_smaller(models: Sequence[tuple[str, dict[str, Any]]], rows: Rows, times: float) -> tuple[Intermediate, int]:
    """A model of the family of the largest of `models`, with about `times` fewer parameters, and which one that is.

    models: names, each with the further arguments of `build_classifier`; times: above 1. rows: as `build_classifier`
    takes them. Raises ValueError if one of the models cannot be built, and, with all that was tried, if the family has
    none within SMALLER_TOLERANCE of that size.
    """
    if not models:
        raise ValueError("A smaller model needs one to be like, but none of the teachers is a network. Name a student.")
    built = []
    for given, options in models:
        try:
            name = buildable(given)
            built.append((build_classifier(name, rows, meta=True, **options), name))
        except (OSError, ValueError) as error:
            # Which one is the largest is not known without it, and another time it may be there.
            raise ValueError(
                f"Which teacher is the largest takes all of them, and {given} cannot be built here: {error} (Or name a "
                "student instead.)"
            ) from error
    index = max(range(len(built)), key=lambda one: built[one][0].num_params)
    large, name = built[index]
    target = max(1, round(large.num_params / times))
    bounds = (math.floor(target / SMALLER_TOLERANCE), min(math.ceil(target * SMALLER_TOLERANCE), large.num_params))
    family = _Family(name, large, rows, bounds, models[index][1])
    near = family.candidates([target], [])[0]
    if not near:
        raise ValueError(
            f"No model like {name} ({large.num_params:,} parameters) is about {times:.15g} times smaller ({target:,}). "
            f"Tried: {'; '.join(family.tried())}. Choose another compression, or name a student."
        )
    best = min(near, key=lambda one: one[0])[1]
    return Intermediate(best.name, best.num_params, target), index


def _build_teachers(
    teachers: Sequence[tuple[str, int]], rows: Rows, student: Classifier, tried: list[str]
) -> list[tuple[str, Classifier]]:
    built: dict[str, Classifier] = {}
    for given, _ in teachers:
        try:
            name = buildable(given)
            # A tokenizer, or the statistics of pixels and columns, would be learned from the same rows once more.
            shared = student.family != "hub" and parse_name(name, rows.task).family != "hub"
            processor = student.feed.processor if shared else None
            if name not in built:
                built[name] = build_classifier(name, rows, meta=True, processor=processor)
        except (OSError, ValueError) as error:
            tried.append(f"{given}: cannot be built here ({str(error)[:200]})")
    return list(built.items())


def buildable(name: str) -> str:
    """The name of the architecture of a weights file; other names as they are. Raises ValueError for another file, and
    as `read_cifar_resnet_card` does.
    """
    if not name.endswith(".safetensors"):
        return name
    path = Path(name).expanduser()
    depth = read_cifar_resnet_card(path)["architecture"]["depth"]
    try:
        with safe_open(path, framework="pt") as file:
            return f"cifar-resnet-{depth}x{file.get_slice('conv1.weight').get_shape()[0]}"
    except SafetensorError as error:
        raise ValueError(f"{name} holds no weights of a CIFAR ResNet: {error}") from error


@dataclass(frozen=True)
class _Candidate:
    name: str
    num_params: int
    depth: int | None = None  # layers of all stages; None where they are not ours to choose


@dataclass
class _Family:
    """The models that can be made from one model by other depths and widths, or its named relatives."""

    name: str
    base: Classifier
    rows: Rows
    bounds: tuple[int, int]  # sizes lie strictly between
    options: dict[str, Any]
    counted: dict[str, int | None] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)

    def count(self, name: str) -> int | None:
        """Parameters of a model of the family; None if it cannot be built."""
        if name not in self.counted:
            processor = getattr(self.base.feed, "processor", None)
            try:
                built = build_classifier(name, self.rows, meta=True, processor=processor, **self.options)
                self.counted[name] = built.num_params
            except (OSError, ValueError) as error:
                self.counted[name] = None
                self.refusals.append(f"{name}: {str(error)[:200]}")
        return self.counted[name]

    def candidates(
        self, targets: Sequence[int], others: Sequence[tuple[str, Classifier]]
    ) -> list[list[tuple[float, _Candidate]]]:
        """Per target, models between the bounds with their scores; 0 is a perfect one."""
        shape = read_shape(self.name, self.base.model)
        if shape is None:
            pool = list(self._relatives(len(targets)))
            return [[(abs(math.log(one.num_params / target)), one) for one in pool] for target in targets]
        far = _farthest(shape, self.base, others)
        scored = []
        for target in targets:
            depths, widths = _ideal(shape, self.base.num_params, far, target)
            scored.append(list(self._search(shape, depths, widths, target)))
        return scored

    def _search(
        self, shape: Shape, depths: Sequence[float], widths: Sequence[float], target: int
    ) -> Iterator[tuple[float, _Candidate]]:
        ideal, builds, best = sum(depths), len(self.counted), math.inf
        choices = dict.fromkeys(tuple(max(1, round(depth * factor)) for depth in depths) for factor in _DEPTH_FACTORS)
        for chosen in choices:
            for name in self._widths(shape, chosen, widths, target):
                size = self.counted[name]
                if size is None or not self.bounds[0] < size < self.bounds[1]:
                    continue
                score = abs(math.log(size / target)) + _DEPTH_WEIGHT * abs(math.log(sum(chosen) / ideal))
                best = min(best, score)
                yield score, _Candidate(name, size, sum(chosen))
            if best < _GOOD or len(self.counted) - builds > _BUILDS:
                return

    def _widths(self, shape: Shape, depths: tuple[int, ...], widths: Sequence[float], target: int) -> Iterator[str]:
        """Models of these depths whose sizes close in on the target: secant steps on logarithms."""
        if shape.kind == "mlp":
            widths = _resample(widths, depths[0])
        scale, power = 1.0, 2.0  # parameters grow with about the square of the width
        last: tuple[float, float] | None = None
        names = set()
        for _ in range(6):
            name = shape.named(depths, [width * scale for width in widths])
            if name in names:
                return
            names.add(name)
            size = self.count(name)
            yield name
            if size is None:
                scale *= 1.1  # the next width may be one that the family takes
                continue
            miss = math.log(target / size)
            if abs(miss) < 0.01:
                return
            if last and abs(math.log(scale / last[0])) > 1e-6:
                power = min(3.0, max(0.5, (math.log(size) - last[1]) / math.log(scale / last[0])))
            last = (scale, math.log(size))
            scale *= math.exp(miss / power)

    def _relatives(self, wanted: int) -> Iterator[_Candidate]:
        """Named variants of a timm architecture: those whose names differ in digits alone, else in all but their first
        word.
        """
        parsed = parse_name(self.name, self.rows.task)
        if parsed.family != "timm":
            return
        import timm

        architecture = parsed.source.split(".")[0]
        words = architecture.split("_")
        stem = "_".join(words[: 2 if words[0] == "tf" else 1])
        siblings = [name for name in timm.list_models(f"{stem}*") if _digitless(name) == _digitless(architecture)]
        cousins = [name for name in timm.list_models(f"{stem}_*") if name not in siblings]
        found = 0
        for group in (siblings, cousins):
            if found >= wanted:
                return
            for name in group:
                size = self.count(f"timm/{name}")
                if size is not None and self.bounds[0] < size < self.bounds[1]:
                    found += 1
                    yield _Candidate(f"timm/{name}", size)

    def tried(self) -> list[str]:
        """What was built and counted, and what could not be."""
        sizes = [f"{name} ({size:,})" for name, size in self.counted.items() if size is not None]
        more = [f"and {len(sizes) - 8} more"] if len(sizes) > 8 else []
        none = [] if self.counted else [f"{self.name}: its family has no sizes to choose from"]
        return none + sizes[:8] + more + self.refusals[:4]


def _digitless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _farthest(shape: Shape, base: Classifier, others: Sequence[tuple[str, Classifier]]) -> tuple[Shape, int] | None:
    """The model of the same kind that differs most in size from the base: the other end of the interpolation."""
    ends = []
    for name, other in others:
        far = read_shape(name, other.model)
        fits = far and far.kind == shape.kind and len(far.depths) == len(shape.depths)
        if far and fits and (len(far.widths) == len(shape.widths) or shape.kind == "mlp"):
            ends.append((abs(math.log(other.num_params / base.num_params)), other.num_params, far))
    best = max(ends, key=lambda end: end[0], default=None)
    return (best[2], best[1]) if best and best[0] > 0.05 else None


def _ideal(shape: Shape, size: int, far: tuple[Shape, int] | None, target: int) -> tuple[list[float], list[float]]:
    """Depths and widths on the geometric line through two shapes, at the target's place between their sizes. With one
    shape alone, depth and width grow by the same factor: parameters go with depth times width squared.
    """
    if far is None:
        factor = (target / size) ** (1 / 3)
        # Nothing leads around the layers of a perceptron, so deep ones train badly.
        deeper = math.sqrt(factor) if shape.kind == "mlp" else factor
        return [depth * deeper for depth in shape.depths], [width * factor for width in shape.widths]
    other, other_size = far
    place = math.log(target / size) / math.log(other_size / size)
    depths = [a * (b / a) ** place for a, b in zip(shape.depths, other.depths, strict=True)]
    length = max(len(shape.widths), len(other.widths))
    pairs = zip(_resample(shape.widths, length), _resample(other.widths, length), strict=True)
    return depths, [a * (b / a) ** place for a, b in pairs]


def _resample(widths: Sequence[float], length: int) -> list[float]:
    """A profile of widths read at `length` evenly spaced places, between its numbers on a logarithmic scale."""
    if length == len(widths):
        return list(widths)
    if length == 1:
        return [math.exp(sum(map(math.log, widths)) / len(widths))]
    values = []
    for index in range(length):
        place = index * (len(widths) - 1) / (length - 1)
        low = min(int(place), max(len(widths) - 2, 0))
        high = min(low + 1, len(widths) - 1)
        values.append(widths[low] * (widths[high] / widths[low]) ** (place - low))
    return values


def _choose(
    scored: Sequence[Sequence[tuple[float, _Candidate]]], targets: Sequence[int], bounds: tuple[int, int]
) -> list[Intermediate]:
    """One candidate per target with the smallest sum of scores; [] if there are none. Sizes fall, at every step by a
    quarter of a step of the grid at least: of two models of nearly one size, the second would be a stage for nothing.
    """
    ratio = (bounds[1] / bounds[0]) ** (0.25 / (len(targets) + 1))
    chains: list[tuple[float, int, list[_Candidate]]] = [(0.0, bounds[1], [])]  # score, last size, models
    for options in scored:
        longer: dict[str, tuple[float, int, list[_Candidate]]] = {}
        for score, candidate in options:
            size = candidate.num_params
            fitting = [chain for chain in chains if chain[1] >= ratio * size and size >= ratio * bounds[0]]
            if not fitting:
                continue
            total, _, before = min(fitting, key=lambda chain: chain[0])
            if candidate.name not in longer or total + score < longer[candidate.name][0]:
                longer[candidate.name] = (total + score, size, [*before, candidate])
        chains = list(longer.values())
    best = min(chains, key=lambda chain: chain[0], default=(0.0, 0, []))[2]
    return [Intermediate(one.name, one.num_params, target) for one, target in zip(best, targets, strict=bool(best))]
