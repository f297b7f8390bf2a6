"""Detectron2's default trainer with the features of ``gn-det train``."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.engine.hooks import IterationTimer, LRScheduler
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from torch import nn

from gn_det.checkpoint.last import last_name
from gn_det.checkpoint.meta import build_meta
from gn_det.config.defaults import edited
from gn_det.data.augment import OwnTransform
from gn_det.data.split import write_split
from gn_det.detectron2.adapt import adapt
from gn_det.detectron2.config import (
    check_for_trainer,
    prepare_config,
    require_gn_keys,
    trainer_keys_are_read,
    warn_of_norms,
)
from gn_det.detectron2.conversion import detector, to_inputs
from gn_det.detectron2.datasets import name_by_files
from gn_det.detectron2.steps import (
    LoopHook,
    Step,
    build_optimizer,
    clipped_by_detectron2,
    join_local_group,
    train_quietly,
)
from gn_det.engine import dist
from gn_det.engine.advice import explain_oom
from gn_det.engine.detector_loop import first_batch, make_loop
from gn_det.engine.evaluator import evaluate_model, verify_expected
from gn_det.engine.log import run_log
from gn_det.engine.loggers import check_loggers
from gn_det.engine.loop import parallel
from gn_det.engine.output import alone_in, checkpoints
from gn_det.engine.precision import lay_out, settle
from gn_det.engine.prepare import (
    Prepared,
    check_freeze,
    check_metric,
    describe_model,
    load_initial,
    prepare,
    prepare_folder,
)
from gn_det.engine.state import ModelMeta, Resume, TrainState, find_resume, restore
from gn_det.errors import TrainingError
from gn_det.files import check_writable

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch.optim import Optimizer


logger = logging.getLogger(__name__)


class _OwnBatches(Iterable[Any]):
    """gn_det's batches as Detectron2's inputs, starting at the current batch of the run."""

    def __init__(self, prepared: Prepared, state: TrainState) -> None:
        self.prepared, self.state = prepared, state

    def __iter__(self) -> Iterator[Any]:
        start = first_batch(self.prepared.cfg, self.state)
        return map(to_inputs, self.prepared.make_loader(start, self.state.seed))


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with the features of ``gn-det train``; used in the same way::

        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()

    Batch, learning rate and iterations of ``cfg`` are used literally (:func:`gn_det.detectron2.scale_to_machine` scales
    them). The trainer also reads SOLVER.EPOCHS, SOLVER.REFERENCE_BATCH, ACCUMULATE, AMP.DTYPE and CHECKPOINT_KEEP. It
    prints the norm census and optimizer groups, evaluates DATASETS.TEST with COCO AP, keeps ``model_best.pth``
    (TEST.BEST_METRIC) and stops early with TEST.PATIENCE. A non-finite loss stops the run and names the images. A
    signal saves a checkpoint before it ends the run, and a resumed run continues exactly.

    ``build_model``, ``build_optimizer``, ``build_lr_scheduler``, ``build_train_loader``, ``build_evaluator`` and
    ``build_hooks`` can be overridden as usual; they receive the dataset names in ``cfg``. Your own hooks run after the
    evaluation, whose results are in ``trainer.storage`` (``"segm/AP"``), and before the log is written. Batches come
    from gn_det's loader unless ``build_train_loader`` is overridden. APs come from its evaluation, which equals
    ``COCOEvaluator``, unless ``build_evaluator``, ``build_test_loader`` or ``test`` is overridden. A dataset registered
    as a function is written to ``OUTPUT_DIR/datasets`` as COCO json and read from there.

    Args:
        cfg: a config after :func:`gn_det.detectron2.add_gn_config`; not modified.
        overwrite: allow OUTPUT_DIR to contain an earlier run, whose checkpoints are then deleted.
        augment: your own torchvision.transforms.v2 transform, see :func:`gn_det.train`.

    Raises:
        UserError: configuration, data, weights or folder cannot be used.
    """

    _hooks: list[Any]

    def __init__(self, cfg: CfgNode, *, overwrite: bool = False, augment: OwnTransform | None = None) -> None:
        TrainerBase.__init__(self)
        require_gn_keys(cfg)
        self._overwrite = overwrite
        self._folder = check_writable(cfg.OUTPUT_DIR)
        own_loader = self._overrides("build_train_loader")
        #: whether the user overrides the evaluation, which must then be used
        self._own_results = self._overrides("build_evaluator", "build_test_loader", "test")
        check_for_trainer(cfg, own_loader=own_loader, own_results=self._own_results)
        check_loggers(cfg)
        if not self._own_results:  # otherwise the names depend on the user's evaluator
            check_metric(cfg)
        with run_log(self._folder, rank=dist.rank()), trainer_keys_are_read():
            # Without overwrite, an earlier run can only be continued.
            cfg = write_split(cfg, started=not overwrite and bool(checkpoints(self._folder)))
            device = dist.resolve_device(cfg.MODEL.DEVICE)
            prepared = prepare(settle(name_by_files(cfg), device), augment)
            self.cfg = cfg = _with_names(prepared.cfg, cfg)
            prepare_config(cfg)
            model = self.build_model(cfg)
            adapt(model, cfg)
            warn_of_norms(cfg, model)  # an overridden build_model may bypass Detectron2's registry
            #: config stored in checkpoints and used to resume, with the files of the sets instead of their names
            self._run_cfg = _with_names(cfg, prepared.cfg)
            self._prepared = dataclasses.replace(prepared, cfg=self._run_cfg)
            describe_model(cfg, lay_out(model, cfg))
            optimizer = self.build_optimizer(cfg, model)
            self.scheduler = self.build_lr_scheduler(cfg, optimizer)
            self._state = TrainState(model, optimizer, self.scheduler, prepared.seed)
            join_local_group()
            batches = self.build_train_loader(cfg) if own_loader else _OwnBatches(self._prepared, self._state)
            self._trainer = Step(parallel(model), batches, optimizer)
        self._point: Resume | None = None
        self._last = ""
        self._last_eval_results: dict[str, Any] = {}
        self._meta = ModelMeta(self._run_cfg, prepared.data.class_names, prepared.data.category_ids)
        self.checkpointer = _Checkpointer(self._meta, model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self._hook = LoopHook()
        self.start_iter, self.max_iter = 0, int(cfg.SOLVER.MAX_ITER)
        hooks = list(self.build_hooks())
        if self._hook not in hooks:  # an override without gn_det's: insert it after the last that steps the schedule
            place = max((i for i, hook in enumerate(hooks, start=1) if isinstance(hook, LRScheduler)), default=0)
            hooks.insert(place, self._hook)
        self.register_hooks(hooks)

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint of OUTPUT_DIR, of either engine; without one, load MODEL.WEIGHTS.

        Args:
            resume: False starts a new run; OUTPUT_DIR must not contain an earlier one, unless ``overwrite``.

        Raises:
            UserError: the checkpoint or the weights cannot be used, or OUTPUT_DIR contains an earlier run.
        """
        with alone_in(self._folder), run_log(self._folder, rank=dist.rank()):
            cfg = self._run_cfg
            self._point = find_resume(self._folder) if resume else None
            self._last = last_name(self._folder)
            if self._point is None:
                self._refuse_old_run()
                check_freeze(cfg)
                load_initial(cfg, self._state.model, self._prepared.data.images)
            else:
                restore(self._point, self._state, cfg)
            self.start_iter = self._state.iteration + 1

    def _refuse_old_run(self) -> None:
        if checkpoints(self._folder) and not self._overwrite:
            raise TrainingError(
                f"OUTPUT_DIR {self._folder} holds checkpoints of an earlier run: continue it by "
                "resume_or_load(resume=True), replace it by Trainer(cfg, overwrite=True), or set another OUTPUT_DIR"
            )

    def train(self) -> dict[str, dict[str, float]]:
        """Train from ``start_iter`` to SOLVER.MAX_ITER.

        Returns:
            Metrics of the last evaluation, ``{"bbox": {"AP": ...}, "segm": ...}`` in percent; empty without one.

        Raises:
            UserError: a non-finite loss, a full disk, or a signal (after saving a checkpoint).
        """
        cfg = self._run_cfg
        with alone_in(self._folder), run_log(self._folder, rank=dist.rank()):
            dist.on_first_rank(self._check_still_there)
            prepare_folder(cfg, self._state.model, fresh=self._point is None)
            evaluate = self._evaluate if self._prepared.data.test or self._own_results else None
            clip, forward = not clipped_by_detectron2(cfg), self._trainer.model
            loop = make_loop(cfg, self._state, forward, [], self._meta, evaluate, self._point, clip=clip)
            loop.autocast_cache = True  # like Detectron2's own trainer
            if loop.last:  # an evaluation may be pending
                loop.run(tuple)
            else:
                self._trainer.loop = self._hook.loop = loop
                with train_quietly(), explain_oom(cfg, loop):
                    TrainerBase.train(self, self.start_iter, self.max_iter)
            self._last_eval_results = _nested(self._state.results)
            verify_expected(cfg, self._state.results)
        return self._last_eval_results

    def _check_still_there(self) -> None:
        if self._point is None:
            self._refuse_old_run()
        elif last_name(self._folder) != self._last:
            raise TrainingError(
                f"OUTPUT_DIR {self._folder}: another run wrote a checkpoint there since resume_or_load; call "
                "resume_or_load(resume=True) again, on a new Trainer"
            )

    def after_step(self) -> None:
        """Call the hooks, then what gn_det's loop does last in an iteration."""
        super().after_step()
        self._hook.end_step()

    def _evaluate(self, model: nn.Module, on_progress: Any) -> Mapping[str, float]:
        if self._own_results:
            results = dist.broadcast(self.test(self.cfg, model))
            return {name: float(value) for name, value in flatten_results_dict(results).items()}
        data = self._prepared.data
        return evaluate_model(self._run_cfg, detector(model, self._run_cfg), data.test, data.class_names, on_progress)

    def _overrides(self, *names: str) -> bool:
        found = inspect.getattr_static
        return any(found(type(self), name) is not found(Trainer, name) for name in names)

    def build_hooks(self) -> list[Any]:
        """Return timer, learning rate, and evaluation with checkpoints; the log is written after added hooks."""
        return [IterationTimer(), LRScheduler(), self._hook]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Build Detectron2's optimizer; the trainer does SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model"."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Build the evaluator for :meth:`test`: COCO AP of boxes, and of masks if the model has them."""
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))


class _Checkpointer(DetectionCheckpointer):
    """For hooks of the user: prediction can use what they save, but runs do not resume from it."""

    def __init__(self, meta: ModelMeta, model: nn.Module, save_dir: str, **others: Any) -> None:
        super().__init__(model, save_dir, **others)
        self._meta = build_meta(meta.cfg, meta.class_names, meta.category_ids)

    def save(self, name: str, **others: Any) -> None:
        """Save like Detectron2, with gn_det's block of class names and configuration."""
        super().save(name, **{"gn_det": self._meta, **others})

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Do nothing, because runs resume from the trainer's own checkpoints."""


def _with_names(cfg: CfgNode, other: CfgNode) -> CfgNode:
    """Return a copy of ``cfg`` with the datasets of ``other``."""
    return edited(cfg, {"DATASETS": other.DATASETS.clone()})


def _nested(results: Mapping[str, float]) -> dict[str, Any]:
    """Return ``{"bbox": {"AP": 1}}`` for ``{"bbox/AP": 1}``; with several sets, the set comes first."""
    out: dict[str, Any] = {}
    for name, value in results.items():
        *path, last = name.split("/")
        reduce(lambda inner, part: inner.setdefault(part, {}), path, out)[last] = value
    return out
