"""The map-style data set: `map_loop.py SHARDS OUT ACT ...`, in any processes.

ACT is "trainer" for the Hugging Face Trainer, or "lightning" for a LightningDataModule.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
import transformers
from torch.utils.data import DataLoader

import shardprep
from tests.loops.recorded import BATCH, FRAMES, Record, each_act, rank

EPOCHS = 3


class Model(torch.nn.Module):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(7, 1)
        self.record = record

    def forward(self, mel: torch.Tensor, **_: torch.Tensor) -> dict[str, torch.Tensor]:
        self.record.add({"mel": mel})
        return {"loss": self.layer(mel.float()).square().mean()}


class Module(lightning.LightningModule):
    def __init__(self, out: str) -> None:
        super().__init__()
        self.model = Model(Record(out, "lightning", 0))

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


class Shards(lightning.LightningDataModule):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, stage: str) -> None:
        self.dataset = dataset(self.folder)

    def train_dataloader(self) -> DataLoader[Any]:
        collate = self.dataset.collate
        return DataLoader(self.dataset, BATCH, shuffle=True, num_workers=2, collate_fn=collate)


def dataset(shards: str) -> shardprep.SegmentDataset:
    return shardprep.SegmentDataset(shardprep.open_shards(shards)["train"], FRAMES)


def train(shards: str, out: str, act: str) -> None:
    if act == "lightning":
        trainer = lightning.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", logger=False, default_root_dir=out
        )
        trainer.fit(Module(out), datamodule=Shards(shards))
        return
    own = dataset(shards)
    options = transformers.TrainingArguments(
        output_dir=f"{out}/trainer",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-6,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
    )
    model = Model(Record(out, act, rank()))
    transformers.Trainer(model, options, train_dataset=own, data_collator=own.collate).train()


if __name__ == "__main__":
    each_act(train)
