"""The tables and the plot of `hpmkd bench auto`: gains over direct training and regrets against a grid, from results
as `bench.json` holds them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hf_hpmkd.components.adaptive_configuration import DIRECT, WARM_WORDS
from hf_hpmkd.paired_tests import Mean, mean_of
from hf_hpmkd.report import markdown

ENOUGH_ROWS = 1_000
"""Training rows, for regrets test rows, from which on sets are summed up apart too: with fewer, figures vary more."""

_OTHERS = ("faster", "fixed")
"""Methods beside direct training and auto."""


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Tables as Markdown: per data set, and over all of them."""
    lines: list[list[str]] = []
    sets = _by_set(results)
    methods = _everywhere([found for of_set in sets if (found := _regrets(of_set))])
    for of_set in sets:
        found = _regrets(of_set)
        gain = mean_of([100 * _gain(one, "auto") for one in of_set])
        others = (np.mean([100 * _gain(one, name) for one in of_set]) for name in _OTHERS)
        lines.append(
            [
                of_set[0]["data"],
                str(len(of_set)),
                f"{100 * np.mean([one['methods']['direct']['accuracy'] for one in of_set]):.2f}",
                *(f"{other:+.2f}" for other in others),
                f"{gain.mean:+.2f}{_interval(gain)}",
                f"{sum(map(_distils, of_set))} of {len(of_set)}",
                *(f"{found[method]:.2f}" if found else "" for method in methods),
            ]
        )
    header = ["data", "seeds", "direct, %", *(f"{name}, points" for name in (*_OTHERS, "auto")), "distilled"]
    table = markdown([*header, *(f"regret {method}" for method in methods)], lines, left=1)
    return f"{table}\n\n{totals(results)}"


def totals(results: Sequence[dict[str, Any]]) -> str:
    """What holds over all data sets, each counting as much as any other, as Markdown paragraphs."""
    sets = _by_set(results)
    parts = [f"{len(sets)} data sets, {len(results)} runs. Gains and regrets are points of test accuracy."]
    parts += [f"Mean gain of {told} over direct training." for told in _mean_gains(sets)]
    large = [of_set for of_set in sets if of_set[0]["train_rows"] >= ENOUGH_ROWS]
    if 0 < len(large) < len(sets):
        parts.append(
            f"On the {len(large)} sets with {ENOUGH_ROWS:,} training rows and more: {', '.join(_mean_gains(large))}."
        )
    parts.append(_what_was_chosen(results))
    if all("unproven" in auto for one in results if (auto := one["methods"]["auto"]).get("kept") == "direct"):
        parts.append(_cost_of_proof(sets))
    parts.append(_never_worse(sets))
    if told := regrets(results):
        parts.append(told)
    seconds = [one["methods"]["auto"]["trial_seconds"] for one in results]
    deciding = [one["methods"]["auto"]["deciding_seconds"] for one in results]
    most = f"median {np.median(deciding):.1f} s (at most {max(deciding):.1f})"
    extra = [_extra_seconds(one["methods"]["auto"]) for one in results]
    beside = (
        f"{np.mean(extra):.1f} s of it (at most {max(extra):.1f}) on tries that did not go on as a student of the run"
    )
    parts.append(f"Tries took {np.mean(seconds):.1f} s a run, {beside}; deciding {most}.")
    if grown := growth(results):
        parts.append(grown)
    return "\n\n".join(parts)


def regrets(results: Sequence[dict[str, Any]]) -> str:
    """How far each method stays behind the best cell of the grid, over all data sets that have one; "" for none."""
    with_grid = [of_set for of_set in _by_set(results) if _regrets(of_set)]
    if not with_grid:
        return ""
    count = sum(bool(one["grid"]) for one in results)
    against = f"Mean regret against the best cell of the grid on test rows ({count} runs)"
    told = f"{against}: {_mean_regrets(with_grid)}; of the whole grid validation rows choose."
    surer = [of_set for of_set in with_grid if of_set[0]["test_rows"] >= ENOUGH_ROWS]
    if 0 < len(surer) < len(with_grid):
        told += (
            f"\n\nThe best of many cells is best by luck where few rows tell it. On the {len(surer)} sets with "
            f"{ENOUGH_ROWS:,} test rows and more: {_mean_regrets(surer)}."
        )
    return told


def _mean_gains(sets: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Of each method its name and mean gain, with the interval over the sets."""
    told = []
    for method in (*_OTHERS, "auto"):
        gain = mean_of([float(np.mean([100 * _gain(one, method) for one in of_set])) for of_set in sets])
        told.append(f"{method} {gain.mean:+.2f}{_interval(gain)}")
    return told


def _mean_regrets(sets: Sequence[list[dict[str, Any]]]) -> str:
    found = [_regrets(of_set) for of_set in sets]
    return ", ".join(f"{method} {np.mean([one[method] for one in found]):.2f}" for method in _everywhere(found))


def _what_was_chosen(results: Sequence[dict[str, Any]]) -> str:
    distilled = [_gain(one, "auto") for one in results if _distils(one)]
    autos = [one["methods"]["auto"] for one in results]
    plain = sum(auto["chosen"] == str(DIRECT) for auto in autos)
    back = sum(auto.get("kept") == "direct" for auto in autos)
    kept = [auto["chosen"] for auto in autos if auto.get("kept") != "direct" and auto["chosen"] != str(DIRECT)]
    warm = sum(WARM_WORDS in one for one in kept)
    told = f"Of {len(results)} runs {len(distilled)} kept a distilled student"
    told += f", and gained {100 * np.mean(distilled):+.2f} there" if distilled else ""
    told += f"; {len(kept) - len(distilled)} kept direct training of another kind" if len(kept) > len(distilled) else ""
    told += f", {warm} of them from a teacher's weights" if warm else ""
    told += f"; {back} chose something else and gave it up for plain direct training" if back else ""
    return told + (f"; {plain} chose plain direct training at once." if plain else ".")


def _cost_of_proof(sets: Sequence[list[dict[str, Any]]]) -> str:
    """What auto would have gained, had every student been kept that promised to be better."""

    def gain(one: dict[str, Any]) -> float:
        auto, direct = one["methods"]["auto"], one["methods"]["direct"]
        return 100 * (auto.get("unproven", auto["accuracy"]) - direct["accuracy"])

    mean = mean_of([float(np.mean([gain(one) for one in of_set])) for of_set in sets])
    runs = [one for of_set in sets for one in of_set]
    lost, kept = sum(gain(one) < 0 for one in runs), sum(_gain(one, "auto") < 0 for one in runs)
    told = f"Had every student been kept, the mean gain would be {mean.mean:+.2f}{_interval(mean)}"
    return f"{told}, with a loss in {lost} runs instead of {kept}."


def _never_worse(sets: Sequence[list[dict[str, Any]]]) -> str:
    """On which sets the interval of the gain lies above half a point, or one test row if that is more, of a loss."""
    open_ = []
    judged = 0
    for of_set in sets:
        gain = mean_of([100 * _gain(one, "auto") for one in of_set])
        if gain.low is None:
            continue
        judged += 1
        if gain.low <= -max(0.5, 100 / of_set[0]["test_rows"]):
            open_.append(of_set[0]["data"])
    if not judged:
        return "With one seed a set has no interval."
    told = f"On {judged - len(open_)} of {judged} sets the 95 % interval of auto's gain lies above -0.5 points"
    return f"{told} (or one test row)" + (f"; not on {', '.join(open_)}." if open_ else ".")


def _extra_seconds(auto: dict[str, Any]) -> float:
    """What was spent on tries beside direct training and the winner, whose tries go on, unless all were at once."""
    going_on = None if auto.get("seeds") else auto["chosen"]
    spent = {trial["name"]: trial["seconds"] for trial in auto["trials"] if trial["name"] != going_on}
    return sum(spent.values())  # the last rung's seconds are those of all before


def _everywhere(regrets: Sequence[dict[str, float]]) -> list[str]:
    """The methods with a regret on every set; none where no set has any."""
    return [method for method in (regrets[0] if regrets else {}) if all(method in one for one in regrets)]


def growth(results: Sequence[dict[str, Any]]) -> str:
    """What auto does with so many runs of the prior, as Markdown, in the runs with a grid where it was tried with each
    number; empty where there is none.
    """
    found = {name for one in results for name in one["methods"] if name.startswith("auto-")}
    names = [*sorted(found, key=lambda name: int(name.removeprefix("auto-"))), "auto"]
    sets = _by_set([one for one in results if one["grid"] and all(name in one["methods"] for name in names)])
    if not found or not sets:
        return ""
    lines = [
        [
            name.removeprefix("auto-").replace("auto", "all"),
            str(len(sets)),
            f"{np.mean([np.mean([100 * _gain(one, name) for one in of_set]) for of_set in sets]):+.2f}",
            f"{np.mean([_regrets(of_set)[name] for of_set in sets]):.2f}",
            f"{np.mean([one['methods'][name]['trial_seconds'] for of_set in sets for one in of_set]):.1f}",
        ]
        for name in names
    ]
    return markdown(("runs of the prior", "data sets", "gain, points", "regret, points", "tries, s"), lines, left=0)


def _by_set(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[one for one in results if one["data"] == name] for name in sorted({one["data"] for one in results})]


def _distils(one: dict[str, Any]) -> bool:
    """Whether the student that was kept is a distilled one."""
    auto = one["methods"]["auto"]
    return auto["distils"] and auto.get("kept") != "direct"


def _gain(one: dict[str, Any], method: str) -> float:
    return one["methods"][method]["accuracy"] - one["methods"]["direct"]["accuracy"]


def _interval(mean: Mean) -> str:
    return "" if mean.low is None else f" ({mean.low:+.2f} to {mean.high:+.2f})"


def _regrets(of_set: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Points below the best cell of the grid, by mean test accuracy over the seeds that trained it; {} without any.
    random: the cell that is best on validation rows among direct training and as many cells as auto's steps would pay
    for, drawn at random. whole grid: the one that is best on validation rows among all.
    """
    of_set = [one for one in of_set if one["grid"]]
    if not of_set:
        return {}
    best = np.mean([[cell["accuracy"] for cell in one["grid"]] for one in of_set], axis=0).max()
    methods = [name for name in of_set[0]["methods"] if all(name in one["methods"] for one in of_set)]
    found = {name: np.mean([one["methods"][name]["accuracy"] for one in of_set]) for name in methods}
    found["random"] = np.mean([_random_search(one) for one in of_set])
    found["whole grid"] = np.mean([_best_on_validation(one["grid"]) for one in of_set])
    return {name: round(100 * float(best - value), 6) + 0.0 for name, value in found.items()}  # no -0.00


def _random_search(one: dict[str, Any]) -> float:
    """Expected test accuracy over many draws."""
    auto, grid = one["methods"]["auto"], one["grid"]
    # What auto trained beside direct training: its other tries, and the whole student unless that is the direct one.
    steps = auto["extra_steps"] + (auto["chosen"] != str(DIRECT)) * auto["total_steps"]
    count = min(max(1, math.floor(steps / auto["total_steps"])), len(grid) - 1)
    random = np.random.default_rng(0)
    accuracies = []
    for _ in range(500):
        drawn = [grid[0], *(grid[1 + index] for index in random.permutation(len(grid) - 1)[:count])]
        accuracies.append(_best_on_validation(drawn))
    return float(np.mean(accuracies))


def _best_on_validation(cells: Sequence[dict[str, float]]) -> float:
    """Test accuracy of the cell that validation rows say is the best."""
    return max(cells, key=lambda cell: cell["validation"])["accuracy"]


def gains_plot(results: Sequence[dict[str, Any]]) -> Figure:
    """A row per data set: gain of auto and of the fixed setting over direct training, seeds as small dots."""
    names = sorted({one["data"] for one in results})
    figure = Figure(figsize=(7.2, 1.4 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    for colour, shift, method in (("#c44e52", 0.12, "fixed"), ("#4c72b0", -0.12, "auto")):
        for place, name in enumerate(names):
            gains = [100 * _gain(one, method) for one in results if one["data"] == name]
            axes.plot(gains, [place + shift] * len(gains), "o", color=colour, alpha=0.4, markersize=3.5)
            label = method if place == 0 else None
            axes.plot(np.mean(gains), place + shift, "D", color=colour, markersize=5, label=label)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("points of test accuracy over direct training")
    axes.legend(fontsize=9)
    return figure
