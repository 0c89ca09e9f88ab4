"""Fine-tuning and pretraining with transformers' Trainer."""

import pytest
import torch
from conftest import tiny_config, tiny_inputs
from huggingface_hub import ModelCard
from torch.utils.data import Dataset, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_mapex import MapexForImageClassification, MapexForPreTraining, MapexTrainer


class Chips(Dataset):
    """Eight labelled chips of three modalities."""

    def __init__(self):
        self.pixel_values = tiny_inputs(batch_size=8)
        self.labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": {name: p[index] for name, p in self.pixel_values.items()}, "labels": self.labels[index]}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.values = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def arguments(folder, **overrides):
    options = {
        "output_dir": str(folder),
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "seed": 0,
    }
    return TrainingArguments(**{**options, **overrides})


def first_step(folder, batch_size, accumulation):
    torch.manual_seed(0)
    model = MapexForImageClassification(tiny_config(num_labels=3, initializer_range=0.02))
    kept = Gradients()
    args = arguments(
        folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, logging_steps=1
    )
    trainer = Trainer(model, args, train_dataset=Chips(), data_collator=default_collate, callbacks=[kept])
    trainer.train()
    return trainer.state.log_history[0]["loss"], kept.values


def test_accumulation_equals_one_big_batch(tmp_path):
    """Four batches of two are one of eight, in the logged loss and in every gradient."""
    loss, gradients = first_step(tmp_path, 8, 1)
    accumulated_loss, accumulated = first_step(tmp_path, 2, 4)
    assert accumulated_loss == pytest.approx(loss, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-6)


def accuracy(evaluated) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}


def test_fine_tuning_learns_evaluates_saves_and_resumes(tmp_path):
    model = MapexForImageClassification(tiny_config(num_labels=3, initializer_range=0.02))
    args = arguments(
        tmp_path,
        max_steps=40,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=20,
        logging_steps=10,
    )
    chips = Chips()
    trainer = Trainer(
        model,
        args,
        train_dataset=chips,
        eval_dataset=chips,
        data_collator=default_collate,
        compute_metrics=accuracy,
    )
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0
    loaded = MapexForImageClassification.from_pretrained(tmp_path / "checkpoint-40")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key

    again = Trainer(
        MapexForImageClassification(tiny_config(num_labels=3, initializer_range=0.02)),
        args,
        train_dataset=chips,
        data_collator=default_collate,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert again.state.global_step == 40
    # Not weight by weight: Adam turns the rounding of a tiny gradient into a step, and routing into another choice.
    assert again.evaluate(chips)["eval_loss"] < 0.05 * untrained


def test_pretraining(tmp_path):
    """Trainer pretrains too, and evaluates the loss without labels."""
    model = MapexForPreTraining(tiny_config(initializer_range=0.02))
    chips = Chips()

    def unlabelled(samples):
        return {
            "pixel_values": {
                name: torch.stack([sample["pixel_values"][name] for sample in samples]) for name in chips.pixel_values
            }
        }

    args = arguments(tmp_path, max_steps=20, learning_rate=3e-3, per_device_train_batch_size=4)
    trainer = Trainer(model, args, train_dataset=chips, eval_dataset=chips, data_collator=unlabelled)
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < untrained


class TestModelCard:
    def test_of_the_best_model_where_that_is_loaded(self, tmp_path):
        """Told that more loss is better, it takes the first."""
        options = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
        options |= {"metric_for_best_model": "loss", "greater_is_better": True}
        chips, args = Chips(), arguments(tmp_path, eval_strategy="steps", max_steps=8, learning_rate=3e-3, **options)
        model = MapexForImageClassification(tiny_config(num_labels=3, initializer_range=0.02))
        datasets = {"train_dataset": chips, "eval_dataset": chips, "data_collator": default_collate}
        trainer = MapexTrainer(model, args, **datasets)
        trainer.train()
        record = model.training_record
        assert record["hyperparameters"]["steps"] == trainer.state.best_global_step < 8
        last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        measured = trainer.evaluate()["eval_loss"]
        assert record["metrics"]["loss"] == pytest.approx(measured, rel=1e-5) and measured > 1.01 * last

    def trained(self, folder, **overrides):
        model = MapexForImageClassification(tiny_config(num_labels=3, initializer_range=0.02))
        args = arguments(folder, max_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=0.002, **overrides)
        chips = Chips()
        trainer = MapexTrainer(
            model,
            args,
            train_dataset=chips,
            eval_dataset=chips,
            data_collator=default_collate,
            compute_metrics=accuracy,
        )
        trainer.train()
        return trainer

    def test_results_of_the_last_evaluation(self, tmp_path):
        trainer = self.trained(tmp_path)
        last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        trainer.save_model()
        trainer.create_model_card(license="mit", language="en", dataset_tags="me/floods", tags=["floods"])
        card = ModelCard.load(tmp_path / "README.md")
        metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert metrics == {"loss": last["eval_loss"], "accuracy": last["eval_accuracy"]}
        assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["me/floods"])
        assert {"floods", "generated_from_trainer"} <= set(card.data.tags)
        assert "| learning_rate | `0.002` |" in card.text and "| steps | `2` |" in card.text
        loaded = MapexForImageClassification.from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path / "again")
        assert ModelCard.load(tmp_path / "again" / "README.md").data.license == "mit"

    def test_edited_card_stays(self, tmp_path):
        trainer = self.trained(tmp_path)
        (tmp_path / "README.md").write_text("# Mine\n")
        trainer.save_model()
        trainer.create_model_card()
        assert (tmp_path / "README.md").read_text().endswith("# Mine\n")


def test_the_best_model_comes_back_with_its_experts(tmp_path):
    """`Trainer` reads the checkpoint's file by itself, where each expert has keys of its own."""
    model = MapexForImageClassification(tiny_config(num_labels=3, initializer_range=0.02))
    args = arguments(
        tmp_path,
        max_steps=6,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="order",
    )
    steps = iter((1.0, 3.0, 2.0))  # the second is the best
    trainer = Trainer(
        model,
        args,
        train_dataset=Chips(),
        eval_dataset=Chips(),
        data_collator=default_collate,
        compute_metrics=lambda _: {"order": next(steps)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = MapexForImageClassification.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    last = MapexForImageClassification.from_pretrained(tmp_path / "checkpoint-6").state_dict()
    name = "mapex.layers.1.mlp.experts.up_proj"
    assert not torch.equal(best[name], last[name])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, best[key]), key
