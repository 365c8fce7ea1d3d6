"""The Hugging Face Trainer over a loader: `trainer_loop.py SHARDS OUT ACT ...`, in any processes.

ACT is "whole"; or "resume", which continues from the checkpoint in the middle of an epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from tests.loops.recorded import Record, each_act, loader, rank

EPOCHS = 3


class Model(torch.nn.Module):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(7, 1)
        self.record = record

    def forward(
        self, mel: torch.Tensor, label: torch.Tensor, length: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        self.record.add({"mel": mel})
        return {"loss": self.layer(mel.float()).square().mean()}


class Trainer(transformers.Trainer):
    """Reads a loader of shardprep."""

    loader: Any

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not prepared by accelerate: the loader finds its rank by itself.
        return DataLoader(self.loader, batch_size=None)


class Epochs(transformers.TrainerCallback):
    """Tells the loader which epoch the trainer is in, which matters when it resumes."""

    def __init__(self, own: Any) -> None:
        self.loader = own

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.loader.set_epoch(int(state.epoch or 0))


def train(shards: str, out: str, act: str) -> None:
    own = loader(shards)
    options = transformers.TrainingArguments(
        output_dir=f"{out}/trainer",
        num_train_epochs=EPOCHS,
        save_steps=len(own) * 3 // 2,
        learning_rate=1e-6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=10_000,
        remove_unused_columns=False,
    )
    trainer = Trainer(Model(Record(out, act, rank())), options, callbacks=[Epochs(own)])
    trainer.loader = own
    saved = sorted(Path(out).glob("trainer/checkpoint-*"), key=lambda path: len(path.name))
    step = len(own) * 3 // 2
    resumed = str(Path(out) / "trainer" / f"checkpoint-{step}") if act == "resume" else None
    assert resumed is None or Path(resumed) in saved
    trainer.train(resume_from_checkpoint=resumed)


if __name__ == "__main__":
    each_act(train)
