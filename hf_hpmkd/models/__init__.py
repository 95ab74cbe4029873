"""The two model families of our own. Importing them registers both with the Auto classes of transformers.

Each lives in one file that imports nothing of ours, and `save_pretrained` puts a copy of it beside the weights.
"""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForImageClassification

from hf_hpmkd.models.cifar_resnet import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    load_cifar_resnet_file,
    read_cifar_resnet_card,
)
from hf_hpmkd.models.tabular import TabularConfig, TabularForClassification, TabularProcessor

__all__ = [
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "TabularConfig",
    "TabularForClassification",
    "TabularProcessor",
    "load_cifar_resnet_file",
    "read_cifar_resnet_card",
]

AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
CifarResNetConfig.register_for_auto_class("AutoConfig")
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")

# transformers has no Auto class for tables; AutoModel and AutoFeatureExtractor are the nearest.
AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModel.register(TabularConfig, TabularForClassification)
AutoFeatureExtractor.register(TabularConfig, TabularProcessor)
TabularConfig.register_for_auto_class("AutoConfig")
TabularForClassification.register_for_auto_class("AutoModel")
TabularProcessor.register_for_auto_class("AutoFeatureExtractor")
