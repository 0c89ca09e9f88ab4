"""Losses of the heads: what torch computes, only of what counts, and clear words about labels that are none."""

import pytest
import torch
from conftest import randomize, tiny_config, tiny_inputs
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_dense_mapex import HEADS, inputs, predict, tiny_model

from modeling_mapex import MapexForImageClassification, MapexForPixelRegression
from modeling_mapex.task_losses_mapex import regression_loss, weighted_cross_entropy


ERRORS = (ValueError, StrictDataclassClassValidationError)


class TestMaps:
    def test_cross_entropy_is_that_of_torch(self):
        logits, labels = torch.randn(2, 3, 5, 5), torch.randint(0, 3, (2, 5, 5))
        labels[0, :2] = 255
        weights = [0.5, 2.0, 1.0]
        expected = torch.nn.functional.cross_entropy(logits, labels, torch.tensor(weights), ignore_index=255)
        torch.testing.assert_close(weighted_cross_entropy(logits, labels, weights, 255), expected)

    @pytest.mark.parametrize("model_class", HEADS)
    def test_nothing_labelled_teaches_nothing(self, model_class):
        model = tiny_model(model_class)
        labels = torch.full((3, 16, 16), 255) if model_class is HEADS[0] else torch.full((3, 16, 16), torch.nan)
        loss = model(inputs(), labels=labels).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())

    def test_values_without_data_do_not_count(self):
        predictions, labels = torch.randn(2, 4, 4, requires_grad=True), torch.randn(2, 4, 4)
        labels[0] = torch.nan
        loss = regression_loss(predictions, labels, 10.0, 2.0)
        loss.backward()
        torch.testing.assert_close(loss, ((predictions[1] - labels[1]) / 2.0).square().mean())
        assert not predictions.grad[0].any() and predictions.grad[1].all()

    def test_predictions_are_in_the_unit_of_the_labels(self):
        model, pixels = tiny_model(MapexForPixelRegression), inputs()
        plain = predict(model, pixels)
        model.config.label_mean, model.config.label_std = 100.0, 5.0
        torch.testing.assert_close(predict(model, pixels), plain * 5.0 + 100.0)

    def test_values_of_half_precision_are_as_fine_as_their_differences(self):
        """Mean and deviation are put on in fp32: near 290 a bf16 number is 2 from the next."""
        model = tiny_model(MapexForPixelRegression, label_mean=290.0, label_std=5.0)
        pixels, labels = inputs(), torch.full((3, 16, 16), 290.0)
        expected = predict(model, pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = model(pixels, labels=labels)
        for outputs in (autocast, model.to(torch.bfloat16)(pixels, labels=labels)):
            assert outputs.logits.dtype == outputs.loss.dtype == torch.float32
            assert outputs.logits.unique().numel() > 100
            assert (outputs.logits - expected).norm() < 0.1 * (expected - 290.0).norm()

    @pytest.mark.parametrize(
        "labels, words",
        [
            (torch.full((3, 16, 16), 7), "0 .. 2"),
            (torch.full((3, 16, 16), -1), "0 .. 2"),
            (torch.zeros(3, 16, 16), "whole numbers"),
            (torch.zeros(3, 16, dtype=torch.long), "height, width"),
            (torch.zeros(2, 16, 16, dtype=torch.long), "3 samples"),
        ],
    )
    def test_wrong_labels(self, labels, words):
        with pytest.raises(ValueError, match=words):
            tiny_model()(inputs(), labels=labels)

    @pytest.mark.parametrize(
        "fields, words",
        [
            ({"class_weights": [1.0]}, "class_weights"),
            ({"dense_hidden_size": 20}, "dense_hidden_size"),
            ({"dense_window_metres": 0}, "dense_window_metres"),
            ({"dense_num_frequencies": -1}, "dense_num_frequencies"),
            ({"label_std": 0.0}, "label_std"),
        ],
    )
    def test_wrong_configurations(self, fields, words):
        with pytest.raises(ERRORS, match=words):
            tiny_config(num_labels=3, **fields)


class TestClasses:
    def test_class_weights(self):
        model = randomize(MapexForImageClassification(tiny_config(num_labels=3, class_weights=[1.0, 5.0, 0.5])))
        pixels, labels = tiny_inputs(), torch.tensor([0, 1, 2])
        outputs = model(pixels, labels=labels)
        expected = torch.nn.functional.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 5.0, 0.5]))
        torch.testing.assert_close(outputs.loss, expected)

    def test_batch_of_classes_without_weight_teaches_nothing(self):
        model = randomize(MapexForImageClassification(tiny_config(num_labels=3, class_weights=[1.0, 0.0, 0.5])))
        loss = model(tiny_inputs(), labels=torch.tensor([1, 1, 1])).loss
        loss.backward()
        assert loss.item() == 0.0 and not any(p.grad is not None and p.grad.any() for p in model.parameters())

    def test_class_weights_of_many_labels(self):
        model = randomize(MapexForImageClassification(tiny_config(num_labels=3, class_weights=[1.0, 5.0, 0.5])))
        with pytest.raises(ValueError, match=r"weigh one class index of each sample, but the labels are torch.float32"):
            model(tiny_inputs(), labels=torch.ones(3, 3))
        model.config.problem_type = "multi_label_classification"
        with pytest.raises(ValueError, match="is multi_label_classification"):
            model(tiny_inputs(), labels=torch.ones(3, 3))

    @pytest.mark.parametrize(
        ("labels", "fields", "words"),
        [
            (torch.tensor([0, 1, 3]), {}, r"hold \[3\].*0 .. 2"),
            (torch.tensor([0, -1, 2]), {}, r"hold \[-1\]"),
            (torch.tensor([[0.0, 1.0, torch.nan]] * 3), {}, "NaN"),
            (torch.full((3, 3), 2.0), {"problem_type": "multi_label_classification"}, "between 0 and 1"),
            (torch.zeros(2, dtype=torch.long), {}, r"\(3,\) or \(3, 3\), got \(2,\)"),
            (torch.zeros(3, 4), {}, r"got \(3, 4\)"),
            (torch.zeros(3, 3, dtype=torch.long), {}, r"of several classes a sample, \(3, 3\), are floats"),
        ],
    )
    def test_wrong_labels(self, labels, fields, words):
        model = randomize(MapexForImageClassification(tiny_config(num_labels=3, **fields)))
        with pytest.raises(ValueError, match=words):
            model(tiny_inputs(), labels=labels)
