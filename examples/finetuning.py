"""What `run_image_classification.py`, `run_semantic_segmentation.py` and `run_pixel_regression.py` share: a run with
its checkpoints, and the training, test and saving of a model in it.
"""

import hashlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import Stop, check_trackers, message_of
from finetuning_data import Data, check_samples, differ_in_size
from finetuning_head import fit_head
from finetuning_model import LEARNING_RATES, choose_trained, parameter_groups
from finetuning_options import DataArguments, FinetuningArguments, ModelArguments
from finetuning_results import Scores, count_unread, intervals, peak_memory, predict, results_table
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from modeling_mapex import MapexTrainer
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.image_processing_mapex import MapexImageProcessor, NoValidPixelError


COMPLETE = "complete"  # a file in each checkpoint that is wholly written
FOLDERS = ("checkpoints", "model")  # what a run writes
FILES = ("run.json", "results.json", "confusion.png", "predictions.png")
# A run may go on with others of these.
FREE_SETTINGS = {"output_dir", "overwrite", "stop_after", "report_to", "push_to_hub", "num_workers", "cache_dir"}


class Run:
    """The folder of a run: what it was asked for, its checkpoints, and whether it is finished.

    Args:
        args (`FinetuningArguments`)
        settings: The other dataclasses of options.

    Raises:
        Stop: the folder cannot be written, holds something else, or a run with other settings.
    """

    def __init__(self, args: FinetuningArguments, *settings):
        self.args, self.folder = args, Path(args.output_dir)
        options = {name: value for part in (*settings, args) for name, value in asdict(part).items()}
        self.settings = {name: value for name, value in options.items() if name not in FREE_SETTINGS}
        for name in ("shards", "model"):
            self.settings[f"{name}_contents"] = digest_of(options[name])
        check_ranges(options)
        if args.push_to_hub and self.settings["convnet"]:
            raise Stop("--convnet is there to compare with, and has no code to push: leave out --push_to_hub.")
        self.file, self.checkpoints = self.folder / "run.json", self.folder / "checkpoints"
        if torch.cuda.device_count() > 1 or torch.distributed.is_torchelastic_launched():
            raise Stop("This script trains on one device, in one process: choose it by CUDA_VISIBLE_DEVICES=0.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise Stop(f"Cannot write to --output_dir {self.folder}: {error}") from error
        if not self.file.exists():
            if found := sorted(path.name for path in self.folder.iterdir()):
                raise Stop(f"{self.folder} holds something else than a run ({found[:5]}): choose another --output_dir.")
            return
        earlier = json.loads(self.file.read_text())
        changed = [
            f"{name}: {earlier.get(name)} -> {value}"
            for name, value in self.settings.items()
            if json.dumps(earlier.get(name)) != json.dumps(value)  # the order of classes matters
        ]
        if changed and not args.overwrite:
            raise Stop(
                f"{self.folder} is of a run with other settings ({'; '.join(changed)}). Go on with those, or begin "
                "anew with --overwrite or another --output_dir."
            )

    def finished(self) -> dict[str, Any] | None:
        """The results of the run, if it is at its end."""
        file = self.folder / "results.json"
        if self.args.overwrite or not file.exists():
            return None
        results = json.loads(file.read_text())
        print(f"The run in {self.folder} is finished: {file} has its results. --overwrite runs it again.")
        if self.args.push_to_hub:
            raise Stop(f"Push its model by: hf upload {self.args.push_to_hub} {self.folder / 'model'}")
        return results

    def begin(self) -> str | None:
        """Note the settings; the checkpoint to go on from."""
        if self.args.overwrite and self.file.exists():
            for name in FOLDERS:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in FILES:
                (self.folder / name).unlink(missing_ok=True)
        self.file.write_text(json.dumps(self.settings, indent=1))
        return self.last_checkpoint()

    def last_checkpoint(self) -> str | None:
        """What there is to go on from. What a kill has left of a checkpoint that was being written is deleted."""
        while self.checkpoints.is_dir() and (last := get_last_checkpoint(str(self.checkpoints))) is not None:
            if (Path(last) / COMPLETE).exists():
                return last
            print(f"{last} is incomplete: the run was ended while it was written. Going on from the one before.")
            shutil.rmtree(last)
        return None

    def write_results(self, results: dict[str, Any]) -> None:
        """Whole or not at all: they say that the run is finished."""
        part = self.folder / "results.json.part"
        part.write_text(json.dumps(results, indent=1))
        part.replace(self.folder / "results.json")


def digest_of(name: str | None) -> str | None:
    """Of the names and sizes of the files in a local folder: a run does not go on with other data or weights."""
    folder = Path(name or "")
    if name is None or not folder.is_dir():
        return None  # on the Hub
    files = sorted((str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]


def check_ranges(options: dict[str, Any]) -> None:
    """Raise `Stop` for numbers that no run can have."""
    for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "eval_steps"):
        if options[name] is not None and options[name] < 1:
            raise Stop(f"--{name} must be at least 1, got {options[name]}.")
    if not 0 <= options["warmup"] < 1:
        raise Stop(f"--warmup is a share of the steps, from 0 to less than 1, got {options['warmup']}.")


@contextmanager
def naming_samples() -> Iterator[None]:
    """An end with a message, not with a traceback, where a sample holds nothing at all."""
    try:
        yield
    except NoValidPixelError as error:
        raise Stop(message_of(error)) from error


class Complete(TrainerCallback):
    """Marks checkpoints that are wholly written."""

    def on_save(self, args, state, control, **kwargs):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class Epochs(TrainerCallback):
    """Tells the collator which epoch it is, so that augmentation differs from one to the next."""

    def __init__(self, collator: MapexCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


class Session(TrainerCallback):
    """Ends training with a checkpoint after Ctrl-C, SIGTERM or `--stop_after`, and evaluates at the very end."""

    def __init__(self, stop_after: int | None):
        self.stop_after = stop_after
        self.interrupted = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True
        elif self.interrupted or state.global_step == self.stop_after:
            self.interrupted = control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """To signals; the second Ctrl-C ends at once, and the last checkpoint is gone on from."""

        def interrupt(number: int, frame) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nEnding after this step, with a checkpoint.")

        handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class Clock(TrainerCallback, ExportableState):
    """Seconds of training up to a checkpoint, those of earlier sessions included."""

    def __init__(self):
        self.seconds = 0.0
        self.since = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds + time.perf_counter() - self.since}}


class FinetuningTrainer(MapexTrainer):
    """Augments what it trains on, and not what it evaluates on. Maps of samples that are larger than what it trains on
    are made in windows of that size.
    """

    def __init__(self, *args, eval_collator: MapexCollator, in_windows: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator, self.in_windows = eval_collator, in_windows
        self.unread = 0  # labelled pixels in windows without data

    def evaluate(self, *args, **kwargs):
        self.unread = 0
        metrics = super().evaluate(*args, **kwargs)
        if self.unread:
            print(f"{self.unread} labelled pixels have no valid pixel of any sensor around them and do not count.")
        return metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not self.in_windows:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits, labels = predict(model, inputs, self.args.per_device_eval_batch_size)
            self.unread += count_unread(inputs["labels"], labels)
            loss = model.map_loss(logits, labels)
        return loss, None if prediction_loss_only else logits, labels

    def get_eval_dataloader(self, eval_dataset=None):
        augmenting, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = augmenting


class Finetuning:
    """One run: a model, its data and how it is measured.

    Args:
        run (`Run`), data (`Data`), scores (`Scores`): Of this run.
        model: From [`build_model`].
        model_args, data_args, args: Options.
        collator_options: Of [`MapexCollator`], for the labels.
        preprocess (`Callable`, *optional*): `preprocess_logits_for_metrics` of `Trainer`.
        probe (`bool`): Whether the head begins as a regression on the features, see [`fit_head`].
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        scores: Scores,
        model,
        model_args: ModelArguments,
        data_args: DataArguments,
        collator_options: dict[str, Any],
        preprocess=None,
        probe: bool = False,
    ):
        self.run, self.data, self.scores, self.args = run, data, scores, run.args
        self.model_args, self.preprocess = model_args, preprocess
        self.config = model.config
        check_trackers(self.args.report_to, get_available_reporting_integrations())
        self.best = self.args.best_metric or scores.best
        if self.best not in (*scores.names, "loss"):
            raise Stop(f"There is no metric `{self.best}` for --best_metric: choose one of {[*scores.names, 'loss']}.")
        processor = MapexImageProcessor.from_config(model.config)
        self.collator = MapexCollator(processor, **collator_options)
        self.training_collator = MapexCollator(
            processor,
            crop_size=data_args.crop_size,
            flip=data_args.flip,
            modality_dropout=data_args.modality_dropout,
            seed=self.args.seed,
            **collator_options,
        )
        for side, chips in data.sides.items():
            check_samples(self.training_collator if side == "train" else self.collator, chips)
        self.evaluated_alone = any(differ_in_size(chips) for side, chips in data.sides.items() if side != "train")
        if self.evaluated_alone:
            print("Samples differ in size: they are evaluated one at a time.")
        self.try_batch(model)
        if probe and (self.args.overwrite or self.run.last_checkpoint() is None):
            batch_size = 1 if self.evaluated_alone else self.args.batch_size
            with naming_samples():
                fit_head(model, self.collator, data.sides, batch_size, self.args.seed)
        self.model = choose_trained(model, model_args)
        self.state: TrainerState | None = None
        self.workers = data_args.num_workers
        self.dataset = None if Path(data_args.shards).is_dir() else data_args.shards

    @torch.no_grad()
    def try_batch(self, model) -> None:
        """Forward passes as in training and in evaluation, to find what does not fit before training begins."""
        sides = self.data.sides
        first = sides["train"].__getitems__(list(range(min(2, len(sides["train"])))))
        try:
            model.eval()(**self.training_collator(first))
            if self.in_windows:
                predict(model, self.collator([sides["test"][0]]), self.args.batch_size)
        except ValueError as error:
            raise Stop(f"{error}") from error

    def options(self) -> TrainingArguments:
        args = self.args
        interval = "epoch" if args.eval_steps is None else "steps"
        choosing = {
            "eval_strategy": interval,
            "load_best_model_at_end": True,
            "metric_for_best_model": self.best,
            "greater_is_better": self.best not in ("loss", *self.scores.smaller_is_better),
        }
        if args.eval_steps is not None:
            choosing |= dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), args.eval_steps)
        if not self.is_validated:
            choosing = {"eval_strategy": "no"}
        return TrainingArguments(
            output_dir=str(self.run.checkpoints),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps or -1,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=1 if self.evaluated_alone else args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            learning_rate=self.learning_rate,  # for the logs: the optimiser has those of its groups
            lr_scheduler_type="cosine",
            warmup_steps=args.warmup,
            max_grad_norm=args.max_grad_norm,
            bf16=args.bf16,
            activation_checkpointing=args.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if args.gradient_checkpointing else None,
            logging_strategy=interval,
            save_strategy=interval,
            save_total_limit=2,
            **choosing,
            batch_eval_metrics=True,
            # Else a run that goes on forgets how long it has not improved.
            restore_callback_states_from_checkpoint=True,
            remove_unused_columns=False,  # inputs are dictionaries
            label_names=["labels"],
            dataloader_num_workers=self.workers,
            dataloader_pin_memory=torch.accelerator.is_available(),
            use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
            disable_tqdm=not sys.stderr.isatty(),  # in a file a bar is a line for each step
            report_to=args.report_to or [],
            seed=args.seed,
        )

    def trainer(self, model, **options) -> FinetuningTrainer:
        return FinetuningTrainer(
            model,
            self.options(),
            train_dataset=self.data.sides["train"],
            eval_dataset=self.data.sides.get("validation"),
            data_collator=self.training_collator,
            eval_collator=self.collator,
            in_windows=self.in_windows,
            compute_metrics=self.scores,
            preprocess_logits_for_metrics=self.preprocess,
            **options,
        )

    @property
    def in_windows(self) -> bool:
        return self.data.spec["kind"] in ("mask", "map") and self.config.dense_window_metres is not None

    @property
    def is_validated(self) -> bool:
        return "validation" in self.data.sides

    @property
    def learning_rate(self) -> float:
        given = self.args.learning_rate
        return LEARNING_RATES[self.model_args.method] if given is None else given

    @property
    def layer_decay(self) -> float:
        default = 1.0 if self.model_args.from_scratch else 0.75
        return default if self.args.layer_decay is None else self.args.layer_decay

    def train(self) -> None:
        """Begin or go on, to the best model.

        Raises:
            Stop: interrupted, with a checkpoint.
        """
        checkpoint = self.run.begin()
        if checkpoint is not None:
            state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
            print(f"Going on from step {state.global_step}.")
            if self.is_over(state):  # it was stopped while it was evaluated
                self.load(state, checkpoint)
                return
        args, session = self.args, Session(self.args.stop_after)
        callbacks = [Epochs(self.training_collator), session, Clock(), Complete()]
        if self.is_validated and args.patience:
            callbacks.append(EarlyStoppingCallback(args.patience))
        layers = self.config.num_hidden_layers
        groups = parameter_groups(self.model, layers, self.learning_rate, self.layer_decay, args.weight_decay)
        trainer = self.trainer(self.model, callbacks=callbacks, optimizers=(torch.optim.AdamW(groups), None))
        with session.listening(), naming_samples():
            trainer.train(resume_from_checkpoint=checkpoint)
        self.state = trainer.state
        if session.interrupted and not self.is_over(trainer.state):
            raise Stop(f"Stopped at step {self.state.global_step}. Run the same command again to go on.")

    def is_over(self, state: TrainerState) -> bool:
        """Whether the run that a checkpoint is of has come to its end."""
        stopping = state.stateful_callbacks.get("EarlyStoppingCallback")
        waited = stopping["attributes"]["early_stopping_patience_counter"] if stopping else 0
        return state.global_step >= state.max_steps or (bool(self.args.patience) and waited >= self.args.patience)

    def load(self, state: TrainerState, last: str) -> None:
        """The best weights of a run that is over."""
        best = str(self.run.checkpoints / Path(state.best_model_checkpoint or last).name)
        if self.model_args.method == "lora":
            self.model.load_adapter(best, self.model.active_adapter, is_trainable=True)
        else:
            self.model.load_state_dict(type(self.model).from_pretrained(best, dtype=torch.float32).state_dict())
        self.state = state

    def finish(self, per_class=None) -> dict[str, Any]:
        """Test the best model as it is saved, save it with its card, and write `results.json`.

        Args:
            per_class (`Callable`, *optional*): From the table of the scores to what the results say of each class.

        Returns:
            `dict`: The results.
        """
        state, model = self.state, self.model
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if self.model_args.method == "lora":
            model = model.merge_and_unload()  # what is tested, saved and pushed is an ordinary model
        self.model = model.requires_grad_(True)
        test = self.data.sides["test"]
        with naming_samples():
            measured = self.trainer(model).evaluate(test, metric_key_prefix="test")
        table = self.scores.table
        metrics = self.scores.metrics(table, np.ones(len(table)))
        best = [entry for entry in state.log_history if entry["step"] == state.best_global_step]
        validation = {
            name.removeprefix("eval_"): value for entry in best for name, value in entry.items() if "eval_" in name
        }
        results = {
            "metrics": metrics,
            "intervals": intervals(self.scores, table, test.places(), self.args.bootstrap),
            "loss": measured["test_loss"],
            "validation": {name: value for name, value in validation.items() if name in metrics or name == "loss"},
            "samples": {side: len(chips) for side, chips in self.data.sides.items()},
            "places": {side: len(set(chips.places())) for side, chips in self.data.sides.items()},
            "parameters": {"all": model.num_parameters(), "trained": trained},
            "experts": [len(ids) for ids in self.config.expert_ids],
            "steps": state.global_step,
            "best_step": state.best_global_step if self.is_validated else state.global_step,
            "seconds": state.stateful_callbacks["Clock"]["attributes"]["seconds"],
            "peak_memory_mb": peak_memory(),
            "ms_per_chip": 1000 * measured["test_runtime"] / len(test),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "settings": self.run.settings,
        }
        if per_class is not None:
            results["per_class"] = per_class(table)
        model.training_record = {"metrics": metrics, "hyperparameters": self.hyperparameters()}
        if self.dataset is not None:
            model.config.card_data = {**(model.config.card_data or {}), "datasets": [self.dataset]}
        model.save_pretrained(self.run.folder / "model")
        return results

    def hyperparameters(self) -> dict[str, Any]:
        """For the card."""
        wanted = ("method", "learning_rate", "layer_decay", "batch_size", "weight_decay", "warmup", "crop_size", "seed")
        values = {name: self.run.settings[name] for name in wanted if self.run.settings[name] is not None}
        values |= {"learning_rate": self.learning_rate, "layer_decay": self.layer_decay}
        return {**values, "steps": self.state.global_step}

    def close(self, results: dict[str, Any]) -> dict[str, float]:
        """Write the results, which ends the run, push the model, and give the test metrics."""
        print("\n" + results_table(results))
        self.run.write_results(results)
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        folder = self.run.folder / "model"
        print(f"The model is in {folder}, the results are in {self.run.folder / 'results.json'}.")
        if self.args.push_to_hub:
            try:
                self.model.push_to_hub(self.args.push_to_hub)
            except OSError as error:
                raise Stop(
                    f"All is saved, but not pushed: {error}\nTry again by: hf upload {self.args.push_to_hub} {folder}"
                ) from error
        return results["metrics"]
