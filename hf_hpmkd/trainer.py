"""`HPMKDTrainer`: a `transformers.Trainer` whose loss listens to several teachers.

Drop-in: everything that is not distillation is upstream's. With `alpha=0` (and no feature term) it is plain `Trainer`,
bit for bit. Private names of `Trainer` that are touched here were read in transformers 5.23; each says why.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from hf_hpmkd.class_names import are_generic, require_same_classes
from hf_hpmkd.dataset_rows import (
    ROW_KEY,
    VIEW_KEY,
    RowIdCollator,
    RowIdDataset,
    as_rows,
    fetcher,
    parameters_of,
    student_inputs,
    will_be_read_raw,
)
from hf_hpmkd.distiller import Batch, Distiller, GuideRows, TeacherOutputs, check_guide
from hf_hpmkd.heads import require_outputs
from hf_hpmkd.layer_hints import LayerHints
from hf_hpmkd.tasks.base import UNAUGMENTED, FedDataset
from hf_hpmkd.teacher_cache import LiveOutputs, TeacherCache
from hf_hpmkd.teacher_kinds import Teacher, own_class_names
from hf_hpmkd.teachers import as_teacher, name_apart, reads_raw
from hf_hpmkd.training_args import HPMKDTrainingArguments

STATE_FILE = "hpmkd_state.safetensors"


class HPMKDTrainer(Trainer):
    """Trains `model`, the student, on `alpha * KD(teachers) + (1 - alpha) * CE(labels)`.

    teachers: one or several; each a classifier (transformers or timm module that takes the student's inputs), a source
    as in `load_teacher` (Hub id, folder, `timm/…`, a skops file), or a `Teacher`. None trains without teachers.
    guide_dataset: labelled rows that no teacher has seen; needed by gate=mixture, calibration and the learned
    temperature. The other arguments are those of `Trainer`. Before training the teachers' outputs on the training and
    guide rows are computed once and kept in the teacher cache (`teacher_outputs=live` runs the teachers in the loop).
    The saved model is the student alone; gate, temperature and their optimizer are kept beside the optimizer's state.
    A start from a teacher's weights, layer hints, direct training beside it, the chain and `auto` are `distill`'s.

    Raises ValueError where a teacher's classes do not fit the student's, where a teacher needs raw columns that the
    dataset no longer has, and where settings need guide rows or features that are not there.
    """

    distiller_class: type[Distiller] = Distiller  # another one makes this the trainer of another method
    teacher_cache: TeacherCache | None = None  # of the teachers' outputs; None makes one in `teacher_cache_dir`
    hints: LayerHints | None = None  # of the model whose layers the student began with; for a FedDataset
    args: HPMKDTrainingArguments
    model: Any  # upstream's own type allows None, which it never is here

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teachers: Sequence[str | nn.Module | Teacher] | str | nn.Module | Teacher | None = None,
        args: HPMKDTrainingArguments | None = None,
        *positional: Any,
        guide_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = HPMKDTrainingArguments("hpmkd_trainer")
        if not isinstance(args, HPMKDTrainingArguments):
            raise TypeError(
                f"`args` must be HPMKDTrainingArguments, got {type(args).__name__}. It takes every field of "
                "TrainingArguments: replace the class name and keep the fields."
            )
        super().__init__(model, args, *positional, **kwargs)
        if teachers is None:
            teachers = []
        elif isinstance(teachers, (str, nn.Module, Teacher)):
            teachers = [teachers]
        self.teachers: list[Any] = list(teachers)
        self.guide_dataset = guide_dataset
        self.distiller: Distiller | None = None
        self._metrics: dict[str, dict[str, list[torch.Tensor | float]]] = {"train": defaultdict(list)}
        self._outputs: TeacherOutputs | None = None
        self._guide: GuideRows | None = None
        self._prepared_for: tuple[list[Any], tuple[str, int] | None] = ([], None)  # data and teachers, what is kept
        self._scales, self._upstream_scales = False, self.loss_is_scaled_for_ga
        self._for_teachers_alone: set[str] = set()  # of the columns that `remove_unused_columns` leaves
        if self.distills and self.compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` does not go with teachers: the loss is theirs and the labels' cross-entropy. "
                "Leave it out, or train with alpha=0 and without features."
            )
        self.add_callback(_DistillationCallback(self))

    @property
    def distills(self) -> bool:
        """Whether the teachers have a say: there are some, and alpha or the feature weight is above 0."""
        return bool(self.teachers) and self.args.distills

    # ---- the loss --------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Training: the distillation loss. Evaluation, and `alpha=0`: upstream's loss; teachers are left out. In
        training layer hints, where there are any, are added to the one or the other.
        """
        try:
            return self._loss(model, inputs, return_outputs, num_items_in_batch)
        except ValueError as error:
            # One row that an epoch leaves over, where batch normalisation comes after the pooling.
            if "Expected more than 1 value per channel" not in str(error):
                raise
            with _running_statistics(model):
                return self._loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Any:
        rows, views, inputs = _without_row_ids(inputs)
        shared, inputs = inputs, self._for_student(inputs)
        if not model.training or (self.distiller is None and not self._has_hints()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert rows is not None and views is not None
        if self.distiller is None:
            loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            scaled = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
            counted = num_items_in_batch if scaled else None
            loss = loss + self._hint_term(rows, views, inputs, counted)
            return (loss, outputs) if return_outputs else loss
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        losses = self.distiller.batch_losses(Batch(logits.float(), labels, rows, views, student_inputs(shared)))
        if num_items_in_batch is None:
            num_items_in_batch = len(labels)
        loss = self._over_step(losses.total, num_items_in_batch)
        self.distiller.add_loss(loss)
        if self._has_hints():
            loss = loss + self._hint_term(rows, views, inputs, num_items_in_batch)
        self._record(losses)
        return (loss, outputs) if return_outputs else loss

    def _over_step(self, losses: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """The share of a micro-batch's losses `(batch,)` in the mean over a step's num_items; None: their own mean."""
        if num_items is None:
            return losses.mean()
        share = losses.sum() / num_items
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            share = share * self.args.world_size  # the count is over all processes, and DDP averages
        return share

    def end_hints(self) -> None:
        """No more layer hints. What they held goes."""
        if self.hints is not None:
            self.hints.close()
            self.hints = None

    def _has_hints(self) -> bool:
        """Whether this step has layer hints."""
        if self.hints is not None and not self.hints.applies(self.state.global_step / max(self.state.max_steps, 1)):
            self.end_hints()
        return self.hints is not None

    def _hint_term(
        self, rows: torch.Tensor, views: torch.Tensor, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """What a micro-batch's hints add to the loss."""
        assert self.hints is not None
        read = {name: value for name, value in inputs.items() if name != "labels"}
        losses = self.hints.losses(rows, views, read)
        self._metrics["train"]["hint_loss"].append(losses.mean().detach())
        return self.hints.weight * self._over_step(losses, num_items)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Also counts the samples for students whose forward takes no loss arguments, which upstream does not count."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.distiller is not None and num_items is None and batches:
            num_items = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                num_items = self.accelerator.gather(num_items).sum()
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """After the last backward pass of an optimizer step also updates gate and temperature."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.distiller is not None and self.accelerator.sync_gradients:
            with self.compute_loss_context_manager():
                guide_loss = self.distiller.finish_step()
            if guide_loss is not None:
                self._metrics["train"]["guide_loss"].append(guide_loss)
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._for_student(_without_row_ids(inputs)[2]), *args, **kwargs)

    def _for_student(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs without what only teachers take."""
        return {name: value for name, value in inputs.items() if name not in self._for_teachers_alone}

    # ---- teachers --------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare_teachers()
        return super().train(*args, **kwargs)

    def _prepare_teachers(self) -> None:
        """Loads the teachers and gets their outputs: from the cache, computed now, or live. Again where data sets,
        teachers or what is kept of them have changed since.
        """
        if self.distills and not self._scales:
            # The loss is a sum over the samples of a whole optimizer step divided by their number (`get_batch_samples`
            # counts them), so accumulation steps and processes of any size add up to the same gradient; but for that of
            # layer hints, which are measured in variances of a micro-batch.
            self._scales, self._upstream_scales = True, self.loss_is_scaled_for_ga
            self.loss_is_scaled_for_ga = True
        elif self._scales and not self.distills:
            self._scales, self.loss_is_scaled_for_ga = False, self._upstream_scales
        kept = (self.args.teacher_outputs, self.args.teacher_outputs_topk)
        wanted = [self.train_dataset, self.guide_dataset, *self.teachers]
        before, kept_before = self._prepared_for
        same = len(before) == len(wanted) and all(a is b for a, b in zip(before, wanted, strict=True))
        if not self.distills or (same and kept == kept_before):
            return
        self._check_before_capture()
        live = self.args.teacher_outputs == "live"
        self._outputs = self._guide = None
        # The columns that the model does not take are dropped as they are in the loop, before somebody's collator.
        collate = self._get_collator_with_removed_columns(self.data_collator)
        names = own_class_names(self.model)
        rows, num_views = as_rows(self.train_dataset, collate, names, stored=not live)
        if names and len(names) != len(rows.class_names):
            require_outputs(self.model, len(names), len(rows.class_names))
        if names and not are_generic(names) and not are_generic(rows.class_names):
            require_same_classes("The student's names (`id2label`)", names, rows.class_names)
        if self.args.kd_kind == "standardized_kl" and len(rows.class_names) == 2:
            warnings.warn(
                "Of two logits z-scores are always 1 and -1, so kd_kind=standardized_kl teaches nothing about two "
                "classes. Use kd_kind=forward_kl.",
                stacklevel=2,
            )
        guide = None
        if self.guide_dataset is not None:
            guide, _ = as_rows(self.guide_dataset, collate, rows.class_names, what="guide")
            require_same_classes("The guide rows", guide.class_names, rows.class_names)
        teachers = [as_teacher(teacher, rows, device=self.args.device) for teacher in self.teachers]
        if any(reads_raw(one) for one in teachers):
            will_be_read_raw(rows, guide)
        name_apart(teachers)
        cache = self.teacher_cache or TeacherCache(self.args.teacher_cache_dir)
        capture: dict[str, Any] = {
            "batch_size": self.args.per_device_eval_batch_size,
            "progress": not self.args.disable_tqdm,
        }
        if live:
            feed = self.train_dataset.feed if isinstance(self.train_dataset, FedDataset) else None
            self._outputs = LiveOutputs(teachers, rows, feed)
        else:
            mode, topk = self.args.teacher_outputs, self.args.teacher_outputs_topk
            stored_outputs = cache.outputs(teachers, rows, num_views, mode=mode, topk=topk, **capture)
            if self.args.device.type == "cuda" and 4 * stored_outputs.nbytes < torch.cuda.mem_get_info()[0]:
                stored_outputs.to(self.args.device)  # else every lookup waits for the device
            self._outputs = stored_outputs
        if guide is not None:
            stored = cache.outputs(teachers, guide, 0, **capture)
            everything = torch.arange(len(guide))
            logits = stored.lookup(everything, torch.full_like(everything, UNAUGMENTED))
            fetch = fetcher(self.guide_dataset, guide)
            self._guide = GuideRows(
                lambda chosen: self._for_student(self._prepare_inputs(fetch(chosen.cpu()))),
                logits.to(self.args.device),
                guide.labels.to(self.args.device),
            )
        if not live:
            for teacher in teachers:  # they have answered; the student has the device to itself
                teacher.to("cpu")
        self._prepared_for = (wanted, kept)

    def _check_before_capture(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process drives one GPU here, {self.args.n_gpu} are visible. Start with `accelerate launch`, or "
                "hide the others: CUDA_VISIBLE_DEVICES=0."
            )
        if any(one is self.model or getattr(one, "model", None) is self.model for one in self.teachers):
            raise ValueError(
                "A teacher is frozen, so the student cannot be its own. Pass a copy: copy.deepcopy(student)."
            )
        check_guide(self.args, self.guide_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Also makes the distiller, because here the student is in place and the number of steps is known."""
        self._prepare_teachers()  # a search over hyperparameters has changed the arguments since `train` began
        if self.distiller is not None:
            self.distiller.close()
            self.distiller = None
        if self.distills and self._outputs is not None:
            self.distiller = self.distiller_class(self.args, self.model, self._outputs, self._guide, num_training_steps)
            self._train_extras(self.distiller.extras)
        return super().create_scheduler(num_training_steps, optimizer)

    def _train_extras(self, extras: nn.Module | None) -> None:
        """Puts what a distiller trains beside the student into the student's optimizer, before the schedule is made."""
        if extras is None:
            return
        decayed = set(self.get_decay_parameter_names(extras))
        for decays in (True, False):
            group = [one for name, one in extras.named_parameters() if (name in decayed) == decays]
            weight_decay = self.args.weight_decay if decays else 0.0
            self.optimizer.add_param_group({"params": group, "weight_decay": weight_decay})  # type: ignore[union-attr]

    # ---- data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Upstream's, over a dataset that knows its row ids."""
        if not self.distills or isinstance(self.train_dataset, FedDataset):
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
            # Before it is wrapped, as upstream would: else raw images are decoded in each batch and thrown away. What a
            # transform reads stays.
            dataset = self._remove_unused_columns(dataset, "training")
        return self._get_dataloader(  # upstream's own call, transformers 5.23, with the dataset wrapped
            dataset=RowIdDataset(dataset),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,  # type: ignore[arg-type]
            is_training=True,
        )

    def _set_signature_columns_if_needed(self) -> None:
        # Private, transformers 5.23: the only list of columns that survive `remove_unused_columns`.
        # Teachers that take the student's inputs may take more: segment ids, which a DistilBERT has none of.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._students_columns: list[str] = list(self._signature_columns or [])
        inputs = set(self._students_columns) - {"label", "label_ids", *self.label_names}
        taken = [parameters_of(one)[0] for one in self.teachers if isinstance(one, nn.Module)]
        theirs = [name for names in taken if inputs.intersection(names) for name in names]
        self._for_teachers_alone = set(theirs) - set(self._students_columns)
        columns = [*self._students_columns, *theirs, ROW_KEY, VIEW_KEY]
        self._signature_columns = [*dict.fromkeys(columns)]  # type: ignore[assignment]

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        # Private, transformers 5.23: the outermost collator. Batches of a FedDataset are collated already, and row ids
        # must not reach somebody's collator.
        return RowIdCollator(super()._get_collator_with_removed_columns(data_collator, description))

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Private, transformers 5.23: called before `trainer_state.json` is written, so that a checkpoint which has that
        # file has the distillation state too; `on_save` comes after it.
        super()._save_optimizer_and_scheduler(output_dir)
        if self.distiller is not None and self.args.should_save:
            tensors, metadata = self.distiller.state_dict()
            save_file(tensors, Path(output_dir) / STATE_FILE, metadata=metadata)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Private, transformers 5.23: the counterpart of the above.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.distiller is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {checkpoint} has no {STATE_FILE}: it was not written by a distillation run, or with "
                "`save_only_model`. Resume from another, or start without `resume_from_checkpoint`."
            )
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        self.distiller.load_state_dict(load_file(path), metadata)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Private, transformers 5.23: upstream loads hub-format keys into models that rename them (ViT, DeiT, BEiT,
        # DINOv2, Swin) and only warns. Remove when transformers#43701 is closed and the minimum version has the fix.
        if model is None and self._reloads_by_class():
            _load_strictly(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # Private, transformers 5.23: the same upstream bug as in `_load_from_checkpoint`.
        if self._reloads_by_class():
            _load_strictly(self.model, self.state.best_model_checkpoint or "")
        else:
            super()._load_best_model()

    def _reloads_by_class(self) -> bool:
        # peft adapters, FSDP and DeepSpeed have checkpoints of their own kind.
        plain = isinstance(self.model, PreTrainedModel) and not getattr(self.model, "_hf_peft_config_loaded", False)
        return plain and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # ---- what is logged --------------------------------------------------------------------------------------------

    def _record(self, losses: Any) -> None:
        assert self.distiller is not None
        metrics = self._metrics["train"]
        metrics["kd_loss"].append(losses.kd.mean())
        metrics["ce_loss"].append(losses.ce.mean().detach())
        metrics["temperature"].append(self.distiller.temperature)
        if losses.feature is not None:
            metrics["feature_loss"].append(losses.feature.mean().detach())
        means = losses.weights.mean(0)
        for index, name in enumerate(self.distiller.outputs.names):
            metrics[f"weight/{name}"].append(means[index])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: kd_loss, ce_loss, temperature, weight/<teacher>, guide_loss, hint_loss."""
        if "loss" in logs and self._metrics["train"]:
            means = {key: float(sum(values)) / len(values) for key, values in self._metrics["train"].items() if values}
            logs = {**logs, **means, **({} if self.distiller is None else {"alpha": self.args.alpha})}
            self._metrics["train"].clear()
        super().log(logs, start_time)


@contextmanager
def _running_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block batch normalisation goes by what it has seen so far."""
    layers = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.training]
    for one in layers:
        one.eval()
    try:
        yield
    finally:
        for one in layers:
            one.train()


class _DistillationCallback(TrainerCallback):
    """Tells the distiller when training begins, and the dataset which epoch it is."""

    def __init__(self, trainer: HPMKDTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.distiller is not None and state.global_step == 0:  # a resumed run has loaded its state
            self.trainer.distiller.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate 1.15 forwards set_epoch to the dataset on one process only (data_loader.py, `elif` of line 638).
        if isinstance(self.trainer.train_dataset, FedDataset):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))


def _without_row_ids(
    inputs: Mapping[str, Any],
) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, Any]]:
    inputs = dict(inputs)
    return inputs.pop(ROW_KEY, None), inputs.pop(VIEW_KEY, None), inputs


def _load_strictly(model: PreTrainedModel, folder: str) -> None:
    model.load_state_dict(type(model).from_pretrained(folder).state_dict(), strict=True)
