"""Word dropout: shares, replay, and what a data set makes of views that may change a label."""

import pytest
import torch
from datasets import Dataset

from hf_hpmkd.tasks import FedDataset, TextFeed, TextRows, train_tokenizer
from hf_hpmkd.tasks.word_dropout import WordDropout, drop_words

LONG = [" ".join(f"w{row}x{place}" for place in range(40)) for row in range(250)]


def views_of(texts: list[str], view: int, how: WordDropout) -> list[str]:
    return drop_words(texts, torch.arange(len(texts)), torch.full((len(texts),), view), how)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.7])
def test_words_are_left_out_at_the_rate_wherever_they_stand(rate: float) -> None:
    left = [text.split() for text in views_of(LONG, 0, WordDropout(rate))]
    share = sum(map(len, left)) / 10_000
    assert abs(share - (1 - rate)) < 4 * (rate * (1 - rate) / 10_000) ** 0.5
    for place in (0, 39):  # 250 texts each
        kept = sum(f"w{row}x{place}" in words for row, words in enumerate(left)) / 250
        assert abs(kept - (1 - rate)) < 4 * (rate * (1 - rate) / 250) ** 0.5


def test_what_is_left_stands_in_its_order() -> None:
    for text, view in zip(LONG, views_of(LONG, 3, WordDropout(0.5)), strict=True):
        words = iter(text.split())
        assert all(word in words for word in view.split())


def test_a_view_is_the_same_in_any_batch_and_another_one_for_another_seed() -> None:
    how = WordDropout(0.3)
    whole = views_of(LONG, 2, how)
    picked = [7, 3, 249]
    alone = drop_words([LONG[row] for row in picked], torch.tensor(picked), torch.tensor([2, 2, 2]), how)
    assert alone == [whole[row] for row in picked]
    others = [views_of(LONG, 1, how), views_of(LONG, 2, WordDropout(0.3, seed=1))]
    assert all(sum(a == b for a, b in zip(whole, other, strict=True)) < 3 for other in others)


def test_long_batches_are_drawn_piece_by_piece_to_the_same_end() -> None:
    texts = [*LONG, *LONG]
    assert views_of(texts, 0, WordDropout())[:250] == views_of(LONG, 0, WordDropout())
    assert views_of(texts, 0, WordDropout())[250:] != views_of(LONG, 0, WordDropout())
    alone = drop_words([texts[400]], torch.tensor([400]), torch.tensor([0]), WordDropout())
    assert alone == [views_of(texts, 0, WordDropout())[400]]


def test_other_words_are_left_out_of_the_second_text_of_a_pair() -> None:
    data = Dataset.from_dict({"first": LONG, "second": LONG, "label": [0, 1] * 125})
    rows = TextRows.from_dataset(data, "first", "label", ["a", "b"], WordDropout(0.5), pair_column="second")
    seen = rows.raw(torch.arange(250), torch.zeros(250, dtype=torch.long))
    assert seen["text"] == views_of(LONG, 0, WordDropout(0.5))
    pairs = [(set(one.split()), set(other.split())) for one, other in zip(seen["text"], seen["text_pair"], strict=True)]
    share = sum(len(one & other) for one, other in pairs) / 10_000
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 10_000) ** 0.5  # as two draws that know nothing of each other


def test_no_text_is_emptied_and_unaugmented_ones_are_untouched() -> None:
    texts = ["one", "", "  two   words ", "one"]
    views = torch.tensor([0, 0, -1, 1])
    assert drop_words(texts, torch.arange(4), views, WordDropout(0.999)) == texts
    assert drop_words([], torch.arange(0), torch.arange(0), WordDropout()) == []


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1.0}, {"seed": -1}])
def test_settings_that_mean_nothing_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        WordDropout(**settings)


def rows_of(texts: list[str], augmentation: WordDropout | None) -> TextRows:
    dataset = Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(len(texts))]})
    return TextRows.from_dataset(dataset, "text", "label", ["no", "yes"], augmentation)


def test_the_views_of_an_epoch_reach_the_model() -> None:
    rows = rows_of(LONG, WordDropout(0.4))
    feed = TextFeed(train_tokenizer(LONG, 300), 64)
    data = FedDataset(rows, feed, num_views=3)
    data.set_epoch(4)
    batch = data.__getitems__([10, 0, 5])
    assert batch["hpmkd_view"].tolist() == [(row + 4) % 3 for row in (10, 0, 5)]
    texts = drop_words(
        [LONG[row] for row in (10, 0, 5)], torch.tensor([10, 0, 5]), batch["hpmkd_view"], WordDropout(0.4)
    )
    assert torch.equal(batch["input_ids"], feed({"text": texts})["input_ids"])


def test_rows_tell_that_a_view_may_be_of_another_class() -> None:
    plain, varied = rows_of(LONG, None), rows_of(LONG, WordDropout())
    assert (plain.supports_views, plain.keeps_labels, plain.view_key()) == (False, True, {})
    assert varied.supports_views and not varied.keeps_labels
    assert varied.view_key() == {"policy": "word_dropout", "rate": 0.2, "seed": 0, "revision": 1}
    assert varied.fingerprint == plain.fingerprint and varied.subset([1]).view_key() == varied.view_key()
