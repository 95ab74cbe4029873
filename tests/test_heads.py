"""What goes into a classifier's last layer, where that is one vector per sample and where it is one per token."""

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from hf_hpmkd.heads import FeatureReader, find_classifier_head

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])


def decoder(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0)
        return GPT2ForSequenceClassification(config).eval()
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_features_of_a_decoder_are_those_of_the_token_that_answers(kind):
    model = decoder(kind)
    head = find_classifier_head(model, 3)
    reader = FeatureReader(head)
    ids = torch.randint(1, 20, MASK.shape) * MASK
    inputs = {"input_ids": ids, "attention_mask": MASK}
    logits = model(**inputs).logits
    features = reader.read(logits, inputs)
    assert features.shape == (3, 16)
    assert torch.equal(head(features), logits) or torch.allclose(head(features), logits, atol=1e-6)
    alone = model(input_ids=ids[2:, :2], attention_mask=MASK[2:, :2]).logits  # without its padding
    torch.testing.assert_close(features[2:], reader.read(alone, {}), atol=1e-5, rtol=0)
    features.sum().backward()
    assert next(model.parameters()).grad is not None


def test_features_that_give_no_sample_its_logits_are_refused():
    model = decoder("gpt2")
    reader = FeatureReader(find_classifier_head(model, 3))
    logits = model(input_ids=torch.ones(2, 4, dtype=torch.long), attention_mask=MASK[:2, :4]).logits
    with pytest.raises(ValueError, match="one vector per sample"):
        reader.read(logits + 1, {})
    with pytest.raises(ValueError, match="has seen no forward pass"):
        reader.read(logits, {})


def test_of_tokens_that_give_the_same_logits_it_is_the_last_that_is_not_hidden():
    model = decoder("gpt2")
    head = find_classifier_head(model, 3)
    head.weight.data.zero_()  # all tokens give the same, as some do in 16 bits
    reader = FeatureReader(head)
    ids = torch.randint(1, 20, MASK.shape) * MASK
    hidden = model.transformer(input_ids=ids, attention_mask=MASK).last_hidden_state
    inputs = {"input_ids": ids, "attention_mask": MASK}
    features = reader.read(model(**inputs).logits, inputs)
    torch.testing.assert_close(features, hidden[torch.arange(3), MASK.sum(1) - 1])
