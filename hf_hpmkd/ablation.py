"""What `hpmkd ablate` compares: the recipe, and the recipe with components of HPM-KD switched over, alone and in pairs.

A component that the recipe uses is switched off; one that it leaves off is switched on, to show what it would bring.
"""

from dataclasses import dataclass
from itertools import combinations

from hf_hpmkd.methods import Method
from hf_hpmkd.recipe import Recipe
from hf_hpmkd.recipe_configuration import free_fields
from hf_hpmkd.vocabulary import LEGAL_SCHEDULES

FULL = "full"


@dataclass(frozen=True)
class Component:
    """A component of HPM-KD that a recipe can switch. off, on: `section.key=value` words."""

    name: str
    off: tuple[str, ...]
    on: tuple[str, ...]

    def is_on(self, recipe: Recipe) -> bool:
        """Whether the recipe uses it."""
        distillation, chain = recipe.distillation, recipe.chain
        return {
            "chain": bool(chain.models) or chain.length != 0,
            "attention": distillation.gate != "uniform" or distillation.calibrate_teachers,
            "temperature": distillation.temperature_schedule != "constant",
            "warm-starts": chain.warm_start,
            "adaptive": recipe.auto.mode != "off",
        }[self.name]


COMPONENTS = (
    # Layer hints go with neither: they are of a teacher whose layers the student begins with.
    Component("chain", ("chain.length=0", "chain.models=[]"), ("chain.length=1", "distillation.hint_weight=0")),
    Component("warm-starts", ("chain.warm_start=false", "distillation.hint_weight=0"), ("chain.warm_start=true",)),
    Component(
        "attention",
        ("distillation.gate=uniform", "distillation.calibrate_teachers=false"),
        ("distillation.gate=mixture", "distillation.calibrate_teachers=true"),
    ),
    Component(
        "temperature",
        ("distillation.temperature_schedule=constant",),
        (),  # `_moving_temperature`
    ),
    Component("adaptive", ("auto.mode=off",), ("auto.mode=fast",)),
)


def ablation_methods(recipe: Recipe) -> list[Method]:
    """The recipe as it is, called "full"; each component switched over; each pair of those that it uses, off. A
    temperature that its kind of loss cannot have moving is left out.
    """
    used = [component for component in COMPONENTS if component.is_on(recipe)]
    methods = [Method(FULL, "the recipe as it is")]
    for component in COMPONENTS:
        if component in used:
            off = _off(recipe, component)
            methods.append(Method(f"no-{component.name}", f"without {component.name}", off))
        elif on := component.on or _moving_temperature(recipe):
            told = f"with {component.name}, which the recipe leaves off"
            methods.append(Method(f"with-{component.name}", told, (*on, *_unchosen(recipe, on)), optional=True))
    for one, other in combinations(used, 2):
        name = f"no-{one.name}-no-{other.name}"
        methods.append(Method(name, f"without {one.name} and {other.name}", _off(recipe, one, other)))
    return methods


def _off(recipe: Recipe, *components: Component) -> tuple[str, ...]:
    """Words that switch components off."""
    words = tuple(word for component in components for word in component.off)
    return (*words, *_unchosen(recipe, words))


def _unchosen(recipe: Recipe, words: tuple[str, ...]) -> tuple[str, ...]:
    """Words that keep the adaptive configuration, where it is on, from choosing what others set: a default it would
    take for a value that is left to it.
    """
    keys = [word.partition("=")[0] for word in words]
    if recipe.auto.mode == "off" or "auto.mode" in keys:
        return ()
    left = [name for name in free_fields(recipe) if name not in {key.partition(".")[2] for key in keys}]
    return (f"auto.choose=[{', '.join(left)}]",) if left else ("auto.mode=off",)


def _moving_temperature(recipe: Recipe) -> tuple[str, ...]:
    """Lets T move: learned from the recipe's own T, where its loss can, else by the paper's choice of schedules. Empty
    where neither goes with the loss.
    """
    it = recipe.distillation
    legal = LEGAL_SCHEDULES[it.kd_kind]
    if "learned" in legal:
        known = (it.temperature, it.temperature_min, it.temperature_max)
        low, high = min(known), max(known)
        high = high if high > low else 2 * low
        ends = (f"distillation.temperature_min={low!r}", f"distillation.temperature_max={high!r}")
        return ("distillation.temperature_schedule=learned", *ends)
    return ("distillation.temperature_schedule=auto",) if "auto" in legal else ()
