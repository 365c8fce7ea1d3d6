"""Lightning over a loader: `lightning_loop.py SHARDS OUT ACT ...`, in one or two processes.

ACT is "1" or "2", the number of processes that Lightning starts itself; "resume1" or "resume2",
which continues from the checkpoint in the middle of an epoch that the former left; "workers" for
a DataLoader with workers; or "stateful" and "resume-stateful" for a StatefulDataLoader with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.loops.recorded import Record, each_act, loader

EPOCHS = 3


class Model(lightning.LightningModule):
    def __init__(self, out: str, name: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(7, 1)
        self.out, self.name = out, name

    def on_fit_start(self) -> None:
        self.record = Record(self.out, self.name, self.global_rank)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.record.add(batch)
        return self.layer(batch["mel"].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def train(shards: str, out: str, act: str) -> None:
    batches: Any = loader(shards)
    if act == "workers":
        batches = DataLoader(batches, batch_size=None, num_workers=2)
    elif act.endswith("stateful"):
        batches = StatefulDataLoader(batches, batch_size=None, num_workers=2)
    devices = 2 if act.endswith("2") else 1
    # In the middle of the second epoch.
    step = len(loader(shards, rank=0, world_size=devices)) * 3 // 2
    folder = Path(out) / ("stateful" if act.endswith("stateful") else str(devices))
    saved = ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[saved],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    resumed = folder / f"step={step}.ckpt" if act.startswith("resume") else None
    trainer.fit(Model(out, act), batches, ckpt_path=resumed, weights_only=False)


if __name__ == "__main__":
    each_act(train)
