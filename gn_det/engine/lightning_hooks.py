"""A run's recorder and keeper as Lightning callbacks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from gn_det.engine.keeper import Keeper


class KeeperCallback(pl.Callback):
    """Tells the keeper what Lightning does; ends the training where the keeper says so."""

    def __init__(self, keeper: Keeper, accumulate: int) -> None:
        self.keeper, self.accumulate = keeper, accumulate

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        # Lightning's precision plugin owns the scaler of fp16.
        self.keeper.start(getattr(trainer.precision_plugin, "scaler", None))

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.keeper.before_first_batch()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            metrics: dict[str, float] = getattr(module.model, "pop_metrics", dict)()
            trainer.should_stop = self.keeper.after_iteration(metrics) or trainer.should_stop
