"""`MapexTrainer`: transformers' `Trainer` with MAPEX's model card, results included."""

from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from .modelcard_mapex import fetch_model_card, write_model_card


# What an evaluation reports beside metrics.
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


class MapexTrainer(Trainer):
    """`Trainer`, but for the model card: `push_to_hub` and `create_model_card` write MAPEX's, with the metrics of the
    last evaluation, or of that of the best model where this is loaded at the end, and the hyperparameters, where
    `Trainer` would replace it by its own. The model remembers them, so that `model.push_to_hub` writes them too.
    """

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        best = self.state.best_global_step
        if self.args.load_best_model_at_end and best is not None:
            for logs in self.state.log_history:
                if logs["step"] == best:
                    self._record(logs, best)
        return result

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        self._record(logs, self.state.global_step)

    def _record(self, logs: dict[str, float], step: int) -> None:
        """What the model is to remember of an evaluation, which other logs are not."""
        metrics = {
            name.removeprefix("eval_"): value
            for name, value in logs.items()
            if name.startswith("eval_") and name.removeprefix("eval_") not in _NOT_METRICS
        }
        model = self.accelerator.unwrap_model(self.model)
        if metrics and hasattr(model, "training_record"):
            model.training_record = {
                "metrics": metrics,
                "hyperparameters": {
                    **extract_hyperparameters_from_trainer(self),
                    "steps": step,
                },
            }

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        dataset_tags: str | list[str] | None = None,
    ) -> None:
        """Write the card to `args.output_dir`, unless there, or in the repository that is pushed to, is one that was
        edited.

        Args:
            language (`str`), license (`str`), dataset_tags (`str` or `list[str]`), *optional*:
                For the head of the card; kept in `config.card_data` of the model, for cards to come.
            tags (`str` or `list[str]`, *optional*): Added to those of the card.
            model_name (`str`, *optional*): Given by `Trainer.push_to_hub`; the card has the name of the repository.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        datasets = [dataset_tags] if isinstance(dataset_tags, str) else dataset_tags
        given = {"language": language, "license": license, "datasets": datasets}
        given = {name: value for name, value in given.items() if value is not None}
        if given:
            model.config.card_data = {**(model.config.card_data or {}), **given}
            model.config.save_pretrained(self.args.output_dir)
        if self.hub_model_id is not None:
            places = {"revision": self.args.hub_revision, "token": self.args.hub_token}
            fetch_model_card(self.args.output_dir, self.hub_model_id, **places)
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        write_model_card(model, self.args.output_dir, [*tags, "generated_from_trainer"], self.hub_model_id)
