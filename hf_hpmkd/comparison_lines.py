"""A comparison's figures, method by method: means, paired tests with their correction, what a run would have kept.

Reads the record alone; opens no model and no data.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hf_hpmkd.comparison_record import ComparisonRecord, Result
from hf_hpmkd.paired_tests import Mean, holm, mcnemar, mean_of, paired_t, surely_better

PARTS = ("validation", "test")
_ENOUGH_ROWS = 200
KEPT = "kept"
"""What a run leaves: `hpmkd`, or `direct` where it is surely better on validation rows (`distillation.keep`)."""
KEPT_TOLD = "of hpmkd and direct the one that a run keeps, chosen on validation rows; seconds of both"


@dataclass(frozen=True)
class Line:
    """A method's figures on one part. accuracy, retention: shares. difference: to the baseline, over the seeds that
    both have. p: of the paired test of that difference, corrected (Holm) for the number of methods; None where it could
    not be made. by_rows: that the test is McNemar's on the rows of one seed, which is then the only one of all methods.
    """

    method: str
    accuracy: Mean
    difference: Mean | None
    p: float | None
    by_rows: bool
    retention: float | None
    seconds: Mean | None


def lines(record: ComparisonRecord, part: str, with_kept: bool = False) -> list[Line]:
    """One line per method that has results on a part, the baseline first, then in the order of the record.

    with_kept: then `KEPT` too, untested, where both that it chooses from are there. Methods that ended with the same
    students, as two that chose the labels alone, are one hypothesis, which is corrected for once.
    """
    names_of_all = [*(method.name for method in record.methods), *([KEPT] if with_kept else [])]
    results = {name: measured(record, name, part) for name in names_of_all}
    names = sorted((name for name in results if results[name]), key=lambda name: name != record.baseline)
    base = results.get(record.baseline, {})
    tested = [name for name in names if name not in (record.baseline, KEPT)]
    by_rows = len({seed for mine in results.values() for seed in mine}) == 1
    tests = {name: _test(results[name], base, part, by_rows) for name in tested}
    groups = same_students({name: results[name] for name in tested}, base)
    corrected: dict[str, float | None] = dict.fromkeys(tested, 1.0)  # of the baseline's own students
    for group, p in zip(groups, holm([tests[group[0]] for group in groups]), strict=True):
        corrected |= dict.fromkeys(group, p)
    found = []
    for name in names:
        p = corrected.get(name)
        mine = list(results[name].values())
        retention = [value for one in mine if (value := record.retention(one, part)) is not None]
        seconds = [float(one.seconds) for one in mine if one.seconds is not None]
        shared = [seed for seed in results[name] if seed in base] if name != record.baseline else []
        differences = [accuracy(results[name][seed], part) - accuracy(base[seed], part) for seed in shared]
        found.append(
            Line(
                name,
                mean_of([accuracy(one, part) for one in mine]),
                mean_of(differences) if differences else None,
                p,
                by_rows and name in tests,
                mean_of(retention).mean if retention else None,
                mean_of(seconds) if seconds else None,
            )
        )
    return found


def measured(record: ComparisonRecord, method: str, part: str) -> dict[int, Result]:
    """By seed a method's results that have scores of a part; `KEPT` is one, too."""
    if method == KEPT:
        return {seed: one for seed, one in kept(record).items() if part in one.scores}
    return {seed: one for seed, one in record.of_method(method).items() if part in one.scores}


def kept(record: ComparisonRecord) -> dict[int, Result]:
    """By seed the student that a run would keep; its seconds are those of both trainings. {} where a run of the recipe
    does not choose so.
    """
    distillation, auto = record.recipe.get("distillation", {}), record.recipe.get("auto", {})
    chooses = distillation.get("keep", "better") == "better" and distillation.get("direct", True)
    if not chooses or auto.get("mode", "off") != "off":
        return {}
    direct, distilled = record.of_method("direct"), record.of_method("hpmkd")
    found = {}
    for seed in direct.keys() & distilled.keys():
        one, other = direct[seed], distilled[seed]
        rights = [result.scores["validation"].right().tolist() for result in (one, other)]
        chosen = one if surely_better(rights[0], rights[1])[0] else other
        seconds = None if one.seconds is None or other.seconds is None else one.seconds + other.seconds
        found[seed] = dataclasses.replace(chosen, method=KEPT, seconds=seconds)
    return dict(sorted(found.items()))


def accuracy(result: Result, part: str) -> float:
    """Share of rows, 0 to 1."""
    return float(result.scores[part].accuracy)


def same_students(results: dict[str, dict[int, Result]], base: dict[int, Result]) -> list[list[str]]:
    """The methods, those together that ended with the same weights with every seed; without those that are the baseline
    over again.

    Where weights are not known of all, the same are those that answered the same rows right, on all parts that everyone
    was asked about, of so many rows that chance does not do it (`_ENOUGH_ROWS` each).
    """
    everyone = [one for mine in [*results.values(), base] for one in mine.values()]
    parts = [part for part in PARTS if all(part in one.scores for one in everyone)]
    are_known = all(one.weights for one in everyone)
    enough = all(sum(one.scores[part].rows for part in parts) >= _ENOUGH_ROWS for one in everyone)

    def told(name: str, mine: dict[int, Result]) -> frozenset[tuple[object, ...]]:
        if are_known:
            return frozenset((seed, one.weights) for seed, one in mine.items())
        hits = frozenset((seed, part, one.scores[part].hits) for seed, one in mine.items() for part in parts)
        return hits if enough else hits | {(name,)}

    groups: dict[frozenset[tuple[object, ...]], list[str]] = {}
    for name, mine in results.items():
        if told(name, mine) != told("", base):
            groups.setdefault(told(name, mine), []).append(name)
    return list(groups.values())


def _test(mine: dict[int, Result], base: dict[int, Result], part: str, by_rows: bool) -> float | None:
    shared = [seed for seed in mine if seed in base]
    if by_rows and shared:
        one, other = mine[shared[0]].scores[part], base[shared[0]].scores[part]
        return mcnemar(one.right().tolist(), other.right().tolist())
    return paired_t([accuracy(mine[s], part) for s in shared], [accuracy(base[s], part) for s in shared])


def common_part(records: Sequence[ComparisonRecord]) -> str:
    """The test part where all finished students of all comparisons have it, else validation."""
    return "test" if all("test" in one.scores for record in records for one in record.results) else "validation"
