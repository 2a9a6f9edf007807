import math

import pytest
import torch

from forge import ConflictError, prepare_dataset
from forge.evaluation import loss as module
from forge.evaluation.loss import held_out_loss
from support.data import sft_messages
from support.models import text_model


def samples(count=7):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 240, (length,), generator=generator).tolist() for length in range(4, 4 + 3 * count, 3)]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return ids, labels


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_loss_is_the_models_own_on_each_sample(family, batch_size):
    model = text_model(family, layers=2).eval()
    ids, labels = samples()
    found = held_out_loss(model, ids, labels, batch_size=batch_size)
    for place, (row, own) in enumerate(zip(ids, labels, strict=True)):
        expected = model(input_ids=torch.tensor([row]), labels=torch.tensor([own])).loss.item()
        assert found.per_sample[place] == pytest.approx(expected, rel=1e-5)
    weights = [len(row) - len(row) // 2 for row in ids]
    assert list(found.tokens) == weights
    assert found.mean == pytest.approx(sum(found.sums) / sum(weights))
    assert found.perplexity == pytest.approx(math.exp(found.mean))


def test_it_is_the_loss_that_the_trainer_reports(make_trainer, tokenizer):
    rows = prepare_dataset(sft_messages(8), tokenizer).train
    trainer = make_trainer("sft", per_device_eval_batch_size=8)
    loss = trainer.evaluate(rows)["eval_loss"]
    found = held_out_loss(trainer.model, rows["input_ids"], rows["labels"])
    assert found.mean == pytest.approx(loss, rel=1e-4)


def test_a_bound_on_logits_makes_batches_smaller_and_changes_nothing(monkeypatch):
    model, (ids, labels) = text_model().eval(), samples()
    expected = held_out_loss(model, ids, labels, batch_size=7)
    widths = []
    model.register_forward_hook(lambda _m, _a, kwargs, _o: widths.append(kwargs["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(module, "MOST_LOGITS", 45 * 256)
    monkeypatch.setattr(module, "POSITIONS", 3)
    found = held_out_loss(model, ids, labels, batch_size=7)
    assert found.sums == pytest.approx(expected.sums, rel=1e-5)
    assert max(rows for rows, _ in widths) > 1
    assert all(rows * width <= 45 for rows, width in widths)


def test_samples_without_anything_to_learn():
    found = held_out_loss(text_model(), [[5, 6], [7, 8, 9], []], [[-100, -100], [7, 8, 9], []])
    assert found.tokens == (0, 2, 0)
    assert math.isnan(found.per_sample[0])
    assert math.isfinite(found.mean)
    assert math.isnan(held_out_loss(text_model(), [[5, 6]], [[-100, -100]]).mean)


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([[1, 2]], [], "1 samples and 0 labels"),
        ([[1, 2]], [[1]], "2 tokens and 1 labels"),
        ([[1, 300]], [[1, 300]], "token 300, but the model has 256"),
    ],
)
def test_bad_samples_are_refused(ids, labels, message):
    with pytest.raises(ConflictError, match=message):
        held_out_loss(text_model(), ids, labels)


def test_the_model_trains_on():
    model = text_model().train()
    held_out_loss(model, *samples(2))
    assert model.training
