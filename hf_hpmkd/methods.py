"""What `hpmkd compare` compares: a method is a name, the recipe's values that it changes, and which teachers it hears.

Methods differ in how the student learns and in nothing else, so they may not touch what makes the terms equal: data,
teachers, student, seed, rows per step. Epochs they may, to set one method's time beside that of a longer one; the table
then says how many steps each had.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hf_hpmkd.recipe import Recipe, RecipeError, read_recipe, recipe_tree
from hf_hpmkd.recipe_faults import did_you_mean

Heard = Literal["all", "best", "best-network", "peer", "constant", "shuffled", "permuted"]
Loss = Literal["", "as-printed", "at", "ctkd", "dml", "fitnets"]

DEFAULT_METHODS = ("direct", "kd-best", "kd-mean", "hpmkd")
SECTIONS = ("distillation", "chain", "auto", "training")
RESERVED, RESERVED_ENDINGS = ("kept", "teachers"), (".run", ".runs", ".result", ".json", ".log", ".lock")
EQUAL_FOR_ALL = (
    "training.seed",
    "training.max_steps",
    "training.min_steps",
    "training.batch_size",
    "training.gradient_accumulation_steps",
)
_EQUAL = "{}: must be the same for all methods. Set it for the whole comparison, behind the recipe."


@dataclass(frozen=True)
class Method:
    """One way to train the student. overrides: `section.key=value` words, later ones win.

    teachers: "all" hears every teacher of the recipe; "best" the one that is right on most guide rows, "best-network"
    the one of the networks that is; "peer" an untrained model like the student; "constant", "shuffled" and "permuted"
    all of them, spoiled (`control_teachers`). loss: what takes the place of the KD loss (`baselines`), "" nothing.
    fresh_views: every epoch sees augmented views of its own, which no teacher's stored outputs can follow. optional:
    left out, and said so, where teachers or student show before any training that it cannot work; others are refused.
    """

    name: str
    description: str
    overrides: tuple[str, ...] = ()
    teachers: Heard = "all"
    loss: Loss = ""
    fresh_views: bool = False
    optional: bool = False


_NO_CHAIN = ("chain.length=0", "chain.models=[]", "chain.warm_start=false")
_DIRECT = (
    "distillation.alpha=0",
    "distillation.feature_weight=0",
    "distillation.hint_weight=0",
    *_NO_CHAIN,
    "auto.mode=off",
)

# Plain distillation: fixed weights, fixed T, the teachers as they are, no chain. alpha and T stay the recipe's.
PLAIN = (
    "distillation.kd_kind=forward_kl",
    "distillation.temperature_schedule=constant",
    "distillation.gate=uniform",
    "distillation.calibrate_teachers=false",
    "distillation.feature_weight=0",
    "distillation.hint_weight=0",
    *_NO_CHAIN,
    "auto.mode=off",
)

# The loss of a baseline is (1 - alpha) cross-entropy + alpha term, so one half each is the authors' 1 : weight.
_HALF = (*PLAIN, "distillation.alpha=0.5")
_LIVE = (*_HALF, "distillation.teacher_outputs=live", "distillation.topk=null")

METHODS = (
    Method(
        "direct",
        "the labels alone: same steps, same augmented views, no teacher",
        _DIRECT,
    ),
    Method(
        "direct-fresh",
        "the labels alone, with new augmented views in every epoch (texts as they are)",
        _DIRECT,
        fresh_views=True,
    ),
    Method(
        "direct-warm",
        "the labels alone, from a teacher's weights where the student can begin with them",
        (*_DIRECT, "chain.warm_start=true"),
    ),
    Method("kd-best", "plain KD (Hinton) from the single teacher that is best on guide rows", PLAIN, "best"),
    Method("kd-mean", "plain KD from the plain mean of all teachers", PLAIN),
    Method("hpmkd", "the recipe as it is"),
    Method("adaptive", "the recipe, its configuration chosen by tries (fast)", ("auto.mode=fast",)),
    Method(
        "ca-mkd",
        "KD from the mean weighted by each teacher's loss on the label (CA-MKD, logits only)",
        (*PLAIN, "distillation.gate=label"),
    ),
    # The weights of the next three are those of their papers' CIFAR-100 settings, as alpha : 1 - alpha.
    Method(
        "dkd",
        "decoupled KD from the plain mean (weights 1 and 8, T 4, equal to cross-entropy)",
        (*PLAIN, "distillation.kd_kind=dkd", "distillation.temperature=4", "distillation.alpha=0.5"),
    ),
    Method(
        "dist",
        "DIST, correlations with the plain mean (weights 2 and 2 to cross-entropy's 1, T 4)",
        (*PLAIN, "distillation.kd_kind=dist", "distillation.temperature=4", f"distillation.alpha={2 / 3:.6f}"),
    ),
    Method(
        "standardized-kd",
        "KD on z-scored logits of the plain mean (weight 9 to cross-entropy's 0.1, T 2)",
        (
            *PLAIN,
            "distillation.teacher_outputs=full",
            "distillation.topk=null",
            "distillation.kd_kind=standardized_kl",
            "distillation.temperature=2",
            f"distillation.alpha={9 / 9.1:.6f}",
        ),
    ),
    Method(
        "paper",
        "HPM-KD's loss as printed: no factor T², gate trained jointly, schedule picked after 10 % of the steps",
        (
            *PLAIN,
            "distillation.gate=joint",
            "distillation.entropy_weight=0.01",
            "distillation.temperature_schedule=auto",
            "distillation.temperature_min=2",
            "distillation.temperature_max=6",
        ),
        loss="as-printed",
    ),
    Method(
        "takd",
        "plain KD down a chain of one teacher assistant, which alone teaches the student (TAKD)",
        (*PLAIN, "chain.length=1", "chain.guidance=previous"),
    ),
    Method(
        "ctkd",
        "KD from the plain mean at a temperature learned against the student (CTKD, global form, alpha 0.9)",
        (*PLAIN, "distillation.alpha=0.9"),
        loss="ctkd",
    ),
    Method("fitnets", "a hint from the middle of the best network among teachers", _LIVE, "best-network", "fitnets"),
    Method("at", "attention maps of the best network among teachers", _LIVE, "best-network", "at"),
    Method("dml", "deep mutual learning with a second student, no teacher", _LIVE, "peer", "dml"),
    # A start from such a teacher's weights would be a real one, so there is none.
    Method("control-constant", "the recipe, from nothing, with teachers that answer every row alike", (), "constant"),
    Method("control-shuffled", "the recipe, from nothing, with teachers that answer other rows", (), "shuffled"),
    Method("control-permuted", "the recipe, from nothing, with teachers whose classes are exchanged", (), "permuted"),
)


def with_overrides(method: Method, words: Sequence[str]) -> Method:
    """The method with more values of the recipe changed, which win."""
    return replace(method, overrides=(*method.overrides, *words)) if words else method


def known_methods() -> dict[str, Method]:
    """The methods that come with the package, by name."""
    return {method.name: method for method in METHODS}


def describe_methods() -> str:
    """The methods as text to print, each with the values that it sets."""
    lines = []
    for method in METHODS:
        lines.append(f"{method.name:16} {method.description}")
        if method.overrides:
            lines.append(f"{'':16}   {' '.join(word.removeprefix('distillation.') for word in method.overrides)}")
    return "\n".join(lines)


def parse_method(text: str) -> Method:
    """A method given as 'name: section.key=value ...'; a word without "=" names a method that it builds on.

    Raises ValueError for another form, a name that is taken, or an unknown method to build on.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if not colon or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            "A method has the form 'name: section.key=value ...', the name of letters, digits, dots, hyphens and "
            f"underscores; got {text!r}. Example: --method 'kd-soft: kd-mean distillation.temperature=8'"
        )
    known = known_methods()
    if name in known:
        raise ValueError(f"Method {name!r} comes with the package. Give yours another name.")
    if name in RESERVED or name.endswith(RESERVED_ENDINGS):
        raise ValueError(
            f"Method {name!r}: {', '.join(RESERVED)} and names that end in {' or '.join(RESERVED_ENDINGS)} are what a "
            "comparison calls other things. Give yours another name."
        )
    overrides: list[str] = []
    bases: list[Method] = []
    for word in shlex.split(rest):
        if "=" in word:
            overrides.append(word)
        elif word in known:
            bases.append(known[word])
        else:
            raise ValueError(
                f"Method {name!r} builds on {word!r}, which is none.{did_you_mean(word, known)} Known: "
                f"{', '.join(known)}. Values are given as section.key=value."
            )
    if len(bases) > 1:
        raise ValueError(f"Method {name!r} must build on one method at most, got {', '.join(b.name for b in bases)}.")
    base = bases[0] if bases else Method("", "")
    description = " ".join([f"{base.name} with" if bases else "the recipe with", *(overrides or ["nothing changed"])])
    return replace(base, name=name, description=description, overrides=(*base.overrides, *overrides))


def choose_methods(names: Sequence[str] | None, given: Sequence[str] = ()) -> list[Method]:
    """The methods of these names (None: a default handful), then those given in full. Raises ValueError for unknown or
    repeated ones.
    """
    known = known_methods()
    chosen = []
    for name in DEFAULT_METHODS if names is None else names:
        if name not in known:
            raise ValueError(
                f"There is no method {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}. A method of your "
                "own is given as --method 'name: section.key=value ...'."
            )
        chosen.append(known[name])
    chosen += [parse_method(text) for text in given]
    twice = sorted({method.name for method in chosen if [other.name for other in chosen].count(method.name) > 1})
    if twice:
        raise ValueError(f"Each method must be named once, got {', '.join(twice)} twice.")
    return chosen


def method_recipe(recipe: Recipe, method: Method, seed: int) -> Recipe:
    """The recipe that trains the student of one method and seed. Raises RecipeError for values that cannot be used or
    that would make the terms unequal.
    """
    source = f"method {method.name}"
    faults = [fault for word in method.overrides if (fault := _unequal(word.partition("=")[0].strip()))]
    if faults:
        raise RecipeError(source, faults)
    made = read_recipe(recipe_tree(recipe), source, [*method.overrides, f"training.seed={seed}"])
    names = [key.partition(".")[2] for key in EQUAL_FOR_ALL if key != "training.seed"]
    if faults := [_EQUAL.format(f"training.{n}") for n in names if vars(made.training)[n] != vars(recipe.training)[n]]:
        raise RecipeError(source, faults)  # a whole section was given
    return made


def _unequal(key: str) -> str | None:
    if key in EQUAL_FOR_ALL:
        return _EQUAL.format(key)
    if key.split(".")[0] not in SECTIONS:
        return (
            f"{key}: a method may set {' and '.join(f'{section}.*' for section in SECTIONS)}; the rest is the same for "
            "all. Set it for the whole comparison, behind the recipe."
        )
    return None
