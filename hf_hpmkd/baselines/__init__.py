"""Published methods to compare with, one file each, written from their equations.

Each is a `Distiller` of its own, so that the loop, the optimizer, the data and the checkpoints are those of every other
method. Their weights are those of their authors, or of the CIFAR-100 benchmark of Tian et al. (ICLR 2020).
"""

from hf_hpmkd.baselines.as_printed import AsPrinted
from hf_hpmkd.baselines.attention_transfer import AttentionTransfer
from hf_hpmkd.baselines.curriculum_temperature import CurriculumTemperature
from hf_hpmkd.baselines.fitnets import FitNets
from hf_hpmkd.baselines.mutual_learning import MutualLearning
from hf_hpmkd.distiller import Distiller

DISTILLERS: dict[str, type[Distiller]] = {
    "": Distiller,
    "as-printed": AsPrinted,
    "at": AttentionTransfer,
    "ctkd": CurriculumTemperature,
    "dml": MutualLearning,
    "fitnets": FitNets,
}
