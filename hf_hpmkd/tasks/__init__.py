"""One adapter per task: the rows of a part of a data set, and the preprocessing of one model ("feed")."""

from hf_hpmkd.tasks.base import UNAUGMENTED, Encoded, FedDataset, Feed, Rows, StaticFeed
from hf_hpmkd.tasks.images import Augmentation, ImageFeed, ImageRows, ProcessorFeed, augment
from hf_hpmkd.tasks.tables import TableFeed, TableRows
from hf_hpmkd.tasks.text import TextFeed, TextRows, train_tokenizer
from hf_hpmkd.tasks.word_dropout import WordDropout

__all__ = [
    "UNAUGMENTED",
    "Augmentation",
    "Encoded",
    "FedDataset",
    "Feed",
    "ImageFeed",
    "ImageRows",
    "ProcessorFeed",
    "Rows",
    "StaticFeed",
    "TableFeed",
    "TableRows",
    "TextFeed",
    "TextRows",
    "WordDropout",
    "augment",
    "train_tokenizer",
]
