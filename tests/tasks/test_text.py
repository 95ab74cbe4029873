"""Texts: the feed against the tokenizer's own padding, rows and their fingerprints, a tokenizer trained on the spot."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaModel, T5Config

from hf_hpmkd.tasks import FedDataset, TextFeed, TextRows, train_tokenizer
from hf_hpmkd.tasks.text import most_positions, without_unknown_inputs

NAMES = ["bad", "good"]
TEXTS = [
    "A fine film .",
    "bad",
    "",
    "the worst Film I have ever seen , by far",
    "fine fine fine",
    "far too long a film",
]
PAIRS = ["fine", "too bad", "a film", "", "by far the worst film I have seen", "so fine"]


def rows_of(texts, pairs=None):
    features = Features({"text": Value("string"), "pair": Value("string"), "label": ClassLabel(names=NAMES)})
    columns = {"text": texts, "pair": pairs or texts, "label": [i % 2 for i in range(len(texts))]}
    dataset = Dataset.from_dict(columns, features=features)
    return TextRows.from_dataset(dataset, "text", "label", NAMES, pair_column="pair" if pairs else None)


@pytest.fixture
def tokenizer():
    return train_tokenizer(TEXTS, 120)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [5, 64])
def test_batches_equal_the_tokenizers_own(tokenizer, side, max_length):
    tokenizer.padding_side = side
    feed = TextFeed(tokenizer, max_length)
    rows = rows_of(TEXTS)
    dataset = FedDataset(rows, feed)
    for indices in ([3, 1, 2], [1, 2], [4, 0], [2], list(range(6))):
        texts = [TEXTS[i] for i in indices]
        expected = tokenizer(texts, padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
        batch = dataset.__getitems__(indices)
        direct = feed(rows.raw(indices))
        assert set(direct) == {"input_ids", "attention_mask", "token_type_ids"}
        for key in direct:
            assert torch.equal(batch[key], expected[key]) and torch.equal(direct[key], expected[key])
            assert batch[key].dtype == torch.long


@pytest.mark.parametrize("max_length", [7, 64])
def test_pairs_equal_the_tokenizers_own(tokenizer, max_length):
    rows, feed = rows_of(TEXTS, PAIRS), TextFeed(tokenizer, max_length)
    indices = [3, 2, 0]
    own = ([texts[i] for i in indices] for texts in (TEXTS, PAIRS))
    expected = tokenizer(*own, padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
    batch, direct = FedDataset(rows, feed).__getitems__(indices), feed(rows.raw(indices))
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[key], expected[key]) and torch.equal(direct[key], expected[key])
    assert not torch.equal(direct["input_ids"], feed({"text": [TEXTS[i] for i in indices]})["input_ids"])


def test_token_types_only_where_the_model_takes_them(tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert set(TextFeed(tokenizer, 8)({"text": TEXTS})) == {"input_ids", "attention_mask"}


def test_a_model_of_one_token_type_gets_none(tokenizer):
    """RoBERTa's kind has no embedding for the type of a pair's second text, and a tokenizer of one's own gives it."""
    without_unknown_inputs(tokenizer, BertConfig())
    assert "token_type_ids" in TextFeed(tokenizer, 8)({"text": TEXTS, "text_pair": PAIRS})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(tokenizer), type_vocab_size=1, **sizes)
    without_unknown_inputs(tokenizer, config)
    seen = TextFeed(tokenizer, 16)({"text": TEXTS, "text_pair": PAIRS})
    assert set(seen) == {"input_ids", "attention_mask"}
    assert RobertaModel(config).eval()(**seen).last_hidden_state.isfinite().all()


def test_padding_uses_the_tokenizers_values(tokenizer):
    tokenizer.pad_token = "[MASK]"
    batch = TextFeed(tokenizer, 16)({"text": ["fine film", "fine"]})
    padded = batch["attention_mask"] == 0
    assert padded.sum() == 1
    assert batch["input_ids"][padded].tolist() == [tokenizer.mask_token_id]
    assert batch["token_type_ids"][padded].tolist() == [tokenizer.pad_token_type_id]


def test_feed_refuses_what_it_cannot_pad(tokenizer):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        TextFeed(tokenizer, 1)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no padding token"):
        TextFeed(bare, 8)


def test_positions_that_begin_behind_the_padding_are_fewer():
    assert most_positions(BertConfig(max_position_embeddings=24)) == 24
    assert most_positions(RobertaConfig(max_position_embeddings=26, pad_token_id=1)) == 24  # from 2 on
    assert most_positions(T5Config()) is None


def test_the_description_is_of_the_tokenizer_not_of_its_last_call(tokenizer, tmp_path):
    feed = TextFeed(tokenizer, 16)
    before = feed.describe()
    feed({"text": TEXTS})
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=3)
    assert feed.describe() == before
    tokenizer.save_pretrained(tmp_path)
    assert TextFeed(AutoTokenizer.from_pretrained(tmp_path), 16).describe() == before
    assert TextFeed(tokenizer, 17).describe() != before
    assert TextFeed(train_tokenizer([*TEXTS, "zebra zebra"], 120), 16).describe() != before
    tokenizer.truncation_side = "left"
    assert feed.describe() != before


def test_a_trained_tokenizer_is_like_berts(tokenizer, tmp_path):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("FINE film")["input_ids"])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
    assert tokenizer.decode(tokenizer("FINE Film")["input_ids"], skip_special_tokens=True) == "fine film"
    assert tokenizer("fine")["input_ids"] == tokenizer("FINE")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("\u4e2d")["input_ids"]
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id] == [0, 1, 2]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    with pytest.raises(ValueError, match="at least 100, got 20"):
        train_tokenizer(TEXTS, 20)


def test_training_a_tokenizer_twice_gives_the_same():
    """Many rare words, so that most merges are ties."""
    texts = [f"{a}{b}{c}x{b}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr"]
    first = train_tokenizer(texts, 200).backend_tokenizer.to_str()
    for again in (texts, iter(texts), texts[::-1]):
        assert train_tokenizer(again, 200).backend_tokenizer.to_str() == first
    assert len(train_tokenizer(texts, 200)) == 200


def test_the_vocabulary_stays_within_its_size():
    many = ["".join(chr(0x4E00 + i) for i in range(500)), *TEXTS * 20]
    tokenizer = train_tokenizer(many, 100)
    assert len(tokenizer) <= 100
    ids = tokenizer("fine film")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id in tokenizer(chr(0x4E00 + 499))["input_ids"]


def test_rows_hold_texts_and_refuse_missing_ones():
    rows = rows_of(TEXTS)
    assert rows.raw([3, 0])["text"] == [TEXTS[3], TEXTS[0]]
    assert rows.labels.tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"1 of 2 rows of this part have none \(first: row 1, counted from 0, None\)"):
        rows_of(["a", None])


def test_the_fingerprint_is_of_texts_and_their_order():
    base = rows_of(["ab", "c", ""]).fingerprint
    assert base == rows_of(["ab", "c", ""]).fingerprint
    others = [["a", "bc", ""], ["ab", "", "c"], ["c", "ab", ""], ["ab", "c"], ["abc", "", ""], ["Ab", "c", ""]]
    assert len({rows_of(texts).fingerprint for texts in others} | {base}) == 7
    pairs = [(["a", "b"], ["c", "d"]), (["a", "b"], ["d", "c"]), (["c", "d"], ["a", "b"]), (["a", "b"], ["a", "b"])]
    assert len({rows_of(*pair).fingerprint for pair in pairs} | {rows_of(["a", "b"]).fingerprint}) == 5


def test_a_subset_counts_from_zero():
    rows = rows_of(TEXTS)
    part = rows.subset([5, 0])
    assert part.raw([0, 1])["text"] == [TEXTS[5], TEXTS[0]] and part.labels.tolist() == [1, 0]
    assert part.dataset["text"][:] == part.texts
    picked = TextRows.from_dataset(rows.dataset.select([5, 0]), "text", "label", NAMES)
    assert part.fingerprint == picked.fingerprint != rows.fingerprint
    pairs = rows_of(TEXTS, PAIRS).subset([5, 0])
    assert pairs.raw([1, 0]) == {"text": [TEXTS[0], TEXTS[5]], "text_pair": [PAIRS[0], PAIRS[5]]}


def test_words_of_both_texts_count_for_their_length():
    rows = rows_of(["a b c", "a", "a b"], ["d", "b c d", "c"])
    rows.max_length = 3
    assert rows.share_too_long == pytest.approx(2 / 3)
