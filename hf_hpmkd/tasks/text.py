"""Texts: rows of strings or of pairs of them, a feed that tokenises a part once, and a small tokenizer trained on the
spot.

A raw batch is `{"text": list of strings}`; of pairs it has the second ones as "text_pair".
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_hpmkd.tasks.base import Rows, column_values, json_digest
from hf_hpmkd.tasks.word_dropout import WordDropout, drop_words
from hf_hpmkd.vocabulary import TEXT_CLASSIFICATION

SPECIAL_TOKENS = PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
MAX_ALPHABET = 1000
MAX_TEXT_LENGTH = 128
"""Tokens that networks built here read of a text, where nobody says more and the network can."""

TEXT_COLUMNS = ("text", "sentence")
"""What a column of texts is usually called."""

PAIR_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
"""What two columns are usually called that hold a pair of texts."""


NO_TOKENIZER = "{} has no tokenizer. Save the one it was trained with beside the model: `tokenizer.save_pretrained`."

_MARKS = 3  # tokens, beside the special ones, that a tokenizer without words may have: a space, the end of a word

# Position numbers of these start behind the padding index, so that many positions are never used.
_POSITIONS_AFTER_PADDING = ("roberta", "camembert", "longformer", "mpnet")


def usual_pair(columns: Iterable[str]) -> list[str]:
    """Of columns of strings the two that PAIR_COLUMNS says are a pair; [] for none, and beside a `text` of which they
    are no part: it may be both, joined.
    """
    there = set(columns)
    found = [list(pair) for pair in PAIR_COLUMNS if there.issuperset(pair)]
    return next((pair for pair in found if "text" in pair or "text" not in there), [])


def require_texts(texts: Sequence[Any], where: str, way_out: str = "") -> None:
    """Raises ValueError where a row has none. where, way_out: words behind "rows" and at the end, for the message."""
    wrong = [row for row, text in enumerate(texts) if not isinstance(text, str)]
    if wrong:
        raise ValueError(
            f"Every row needs a text; {len(wrong):,} of {len(texts):,} rows{where} have none (first: row {wrong[0]}, "
            f"counted from 0, {texts[wrong[0]]!r}). Remove them, or write an empty text.{way_out}"
        )


def without_unknown_inputs(tokenizer: Any, config: PretrainedConfig) -> None:
    """Takes token types from a tokenizer, in place, whose model knows one alone (RoBERTa's kind): those of a pair's
    second text are another, for which it has no embedding. A tokenizer of one's own gives them unless told otherwise.
    """
    if getattr(config, "type_vocab_size", None) == 1:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]


def require_words(tokenizer: Any, source: str) -> None:
    """Raises FileNotFoundError for a tokenizer that knows no words: of a folder without its files transformers makes
    one of the special tokens alone, to which every text is the same.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)) + _MARKS:
        raise FileNotFoundError(NO_TOKENIZER.format(source))


class TextRows(Rows):
    """Rows with one text each, or a pair. Build with `from_dataset`. augmentation: None has no views. max_length: see
    `Rows`. pairs: the second text of each row, None for single ones.
    """

    task = TEXT_CLASSIFICATION

    def __init__(
        self,
        dataset: Dataset,
        texts: Sequence[str],
        labels: Sequence[int] | Tensor,
        class_names: Sequence[str],
        augmentation: WordDropout | None = None,
        max_length: int | None = None,
        pairs: Sequence[str] | None = None,
    ) -> None:
        super().__init__(dataset, labels, class_names)
        self.max_length = max_length
        self.augmentation = augmentation
        self.supports_views = augmentation is not None
        self.keeps_labels = augmentation is None
        self.texts = list(texts)
        self.pairs = None if pairs is None else list(pairs)
        for column in (self.texts, self.pairs or []):
            require_texts(column, " of this part")

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        text_column: str,
        label_column: str,
        class_names: Sequence[str],
        augmentation: WordDropout | None = None,
        max_length: int | None = None,
        pair_column: str | None = None,
    ) -> "TextRows":
        """Raises ValueError for a row without a text, or without the second one where there is a pair_column. An empty
        text is a text.
        """
        texts, labels = column_values(dataset, text_column), column_values(dataset, label_column)
        pairs = None if pair_column is None else column_values(dataset, pair_column)
        return cls(dataset, texts, labels, class_names, augmentation, max_length, pairs)

    @property
    def read_length(self) -> int:
        """Tokens that a network built for these rows reads of a text, if it can."""
        return self.max_length or MAX_TEXT_LENGTH

    @cached_property
    def share_too_long(self) -> float:
        """Share of the texts, or pairs, that have more words than that, and so more tokens for sure."""
        words = np.array([len(text.split()) for text in self.texts])
        if self.pairs is not None:
            words += np.array([len(text.split()) for text in self.pairs])
        return float((words > self.read_length).sum()) / max(1, len(self))

    def _raw(self, positions: Tensor, views: Tensor | None) -> dict[str, Any]:
        raw = {}
        for key, column in (("text", self.texts), ("text_pair", self.pairs)):
            if column is None:
                continue
            raw[key] = [column[position] for position in positions.tolist()]
            if views is not None and self.augmentation is not None:
                raw[key] = drop_words(raw[key], positions, views, self.augmentation, second=key == "text_pair")
        return raw

    def _hash_inputs(self, digest: Any) -> None:
        for column in (self.texts, self.pairs):
            if column is None:
                continue
            encoded = [text.encode("utf-8", "surrogatepass") for text in column]
            digest.update(np.asarray([len(text) for text in encoded], dtype="<i8").tobytes())
            for text in encoded:
                digest.update(text)

    def subset(self, indices: Sequence[int] | Tensor) -> "TextRows":
        positions = torch.as_tensor(indices, dtype=torch.long)
        picked = positions.tolist()
        dataset, texts = self.dataset.select(picked), [self.texts[position] for position in picked]
        pairs = None if self.pairs is None else [self.pairs[position] for position in picked]
        about = (self.class_names, self.augmentation, self.max_length, pairs)
        return TextRows(dataset, texts, self.labels[positions], *about)

    def view_key(self) -> dict[str, Any]:
        return {} if self.augmentation is None else self.augmentation.describe()


class EncodedTexts:
    """Token ids of a whole part, end to end in one tensor per key; a batch is padded to its own longest row."""

    def __init__(self, rows: dict[str, list[list[int]]], pad_values: dict[str, int], padding_side: str) -> None:
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]], dtype=torch.long)
        self.lengths = lengths
        self._starts = torch.cumsum(lengths, 0) - lengths
        # int32 halves the memory; a batch becomes int64, as models expect.
        self._flat = {
            key: torch.from_numpy(np.fromiter(chain.from_iterable(value), dtype=np.int32, count=int(lengths.sum())))
            for key, value in rows.items()
        }
        self._pad_values = pad_values
        self._left = padding_side == "left"

    def take(self, positions: Tensor) -> dict[str, Tensor]:
        lengths = self.lengths[positions]
        longest = int(lengths.max()) if len(lengths) else 0
        offsets = torch.arange(longest)[None, :]
        if self._left:
            offsets = offsets - (longest - lengths)[:, None]
        real = (offsets >= 0) & (offsets < lengths[:, None])
        places = torch.where(real, self._starts[positions][:, None] + offsets, 0)
        return {
            key: torch.where(real, flat[places].long(), self._pad_values[key])
            if longest
            else flat.new_zeros(len(positions), 0).long()
            for key, flat in self._flat.items()
        }


class TextFeed:
    """Tokenises: `{"input_ids", "attention_mask"}` of `(batch, longest)`, and `token_type_ids` where the
    tokenizer gives them.

    max_length: tokens kept of a text or pair, special tokens included, at least 2, and more than a pair has of these;
    of a pair that is longer, the longer text is cut first, then both. Padding goes to the longest row of the batch, on
    the tokenizer's side. Raises ValueError if the tokenizer has no padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if max_length < 2:
            raise ValueError(f"`max_length` must be at least 2 tokens, got {max_length}.")
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token. Set one: `tokenizer.pad_token = tokenizer.eos_token`."
            )
        self.processor = tokenizer
        self.max_length = max_length

    def _tokenise(self, texts: list[str], pairs: list[str] | None) -> dict[str, list[list[int]]]:
        encoded = self.processor(texts, pairs, truncation=True, max_length=self.max_length, padding=False)
        return {key: encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}

    def encode(self, raw: dict[str, Any]) -> EncodedTexts:
        pad_values = {
            "input_ids": int(self.processor.pad_token_id),
            "attention_mask": 0,
            "token_type_ids": int(self.processor.pad_token_type_id),
        }
        return EncodedTexts(self._tokenise(raw["text"], raw.get("text_pair")), pad_values, self.processor.padding_side)

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        return self.encode(raw).take(torch.arange(len(raw["text"])))

    def describe(self) -> dict[str, Any]:
        tokenizer = self.processor
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            # Calls leave their padding and truncation behind in the backend; they are no part of what it is.
            rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        else:
            rules = {
                "vocabulary": tokenizer.get_vocab(),
                "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
            }
        return {
            "feed": "text",
            "tokenizer": json_digest(rules),
            "pad_token_id": int(tokenizer.pad_token_id),
            "padding_side": tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side,
            "inputs": sorted(tokenizer.model_input_names),
            "max_length": self.max_length,
        }


def most_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model has positions for; None where its config does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    after_padding = any(kind in config.model_type for kind in _POSITIONS_AFTER_PADDING)
    return positions - (config.pad_token_id or 0) - 1 if after_padding else positions


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8000) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer in BERT's manner ([CLS] text [SEP]), learnt from these texts; the same texts
    give the same.

    vocab_size: most entries it may have, at least 100; few texts give fewer. At most half of them are single
    characters; rarer characters become [UNK]. Raises ValueError below 100.
    """
    if vocab_size < 100:
        raise ValueError(f"`vocab_size` must be at least 100, got {vocab_size}.")
    texts = list(texts)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts = Counter("".join(normalizer.normalize_str(text) for text in texts))
    common = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(common[: min(MAX_ALPHABET, (vocab_size - len(SPECIAL_TOKENS)) // 4)])
    # Left alone, the trainer numbers characters inside words in the random order of a hash map, and ties between merges
    # go by number. So these pieces are handed over in order, as special tokens, and only the vocabulary is kept.
    inner = [f"##{character}" for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    learner.train_from_iterator(texts, trainer)
    return _bert_like(learner.get_vocab())


def _bert_like(vocab: dict[str, int]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} $B:1 {END}:1",
        special_tokens=[(token, vocab[token]) for token in (START, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        mask_token=MASK,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
