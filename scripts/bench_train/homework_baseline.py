"""The homework's own training code, with its known mistakes, to compare ours with.

    python -m scripts.bench_train.homework_baseline Dataset/ [--steps 70000] [--out submission.csv]

The Dataset opens one `.pt` file for each utterance and takes a random segment. The DataLoader pads
with -20 and drops the last batch. The model is a linear layer, one ConformerBlock of the
`conformer` package, a mean over the frames and a linear classifier. It is trained by AdamW with
warm-up and a cosine schedule. We wrote this code from the homework's description. It repeats the
mistakes of the published code on purpose:

- The block expects (B, T, D) but gets (T, B, D), so it attends over the batch. `--axis right`
  corrects this mistake.
- The best checkpoint is no copy of the weights, so later steps change it: it is always the last.
- Validation uses random segments, leaves out the last batch, and averages over batches.
- Padding counts like speech.

`--model boss` has self-attentive pooling and AM-softmax instead. The model embeds each test
utterance in full length, one at a time. Axis legend: B batch, T frames, F mel bins, D width,
S speakers.
"""

from __future__ import annotations

import csv
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, random_split

from scripts.bench_train.homework_model import AXES, KINDS, HomeworkModel

SEGMENT, PAD = 128, -20.0
RATE, WARMUP = 1e-3, 1000
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """A data set in the homework's layout.

    Attributes:
        speakers: Names in the order of their numbers.
        labelled: Files and speaker numbers.
        test: Test files in their own order.
        n_mels: Mel bins F.
    """

    speakers: list[str]
    labelled: list[tuple[Path, int]]
    test: list[Path]
    n_mels: int


def read_source(root: Path) -> Source:
    """Read the three JSON files of a data set."""
    metadata = json.loads((root / "metadata.json").read_text())
    numbers = json.loads((root / "mapping.json").read_text())["speaker2id"]
    labelled = [
        (root / entry["feature_path"], numbers[name])
        for name, entries in metadata["speakers"].items()
        for entry in entries
    ]
    test = json.loads((root / "testdata.json").read_text())["utterances"]
    paths = [root / entry["feature_path"] for entry in test]
    return Source(sorted(numbers, key=numbers.__getitem__), labelled, paths, metadata["n_mels"])


class HomeworkDataset(Dataset[Batch]):
    """A random segment of each utterance, from its own `.pt` file."""

    def __init__(self, files: Sequence[tuple[Path, int]], segment: int = SEGMENT) -> None:
        self.files, self.segment = files, segment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        path, label = self.files[index]
        mel = torch.load(path, weights_only=True)
        if len(mel) > self.segment:
            start = random.randint(0, len(mel) - self.segment)
            mel = mel[start : start + self.segment]
        return mel.float(), torch.tensor(label)


def collate(samples: Sequence[Batch]) -> Batch:
    """Pad segments to the longest of them and stack: (B, T, F) and (B,)."""
    mels, labels = zip(*samples, strict=True)
    return pad_sequence(list(mels), batch_first=True, padding_value=PAD), torch.stack(labels)


def warmup_steps(steps: int) -> int:
    """The homework's warm-up, but a tenth of the run if the run is not longer than the warm-up."""
    return WARMUP if steps > WARMUP else steps // 10


def cosine_schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LambdaLR:
    """Linear warm-up, then half a cosine down to 0."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, steps - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return LambdaLR(optimizer, factor)


def forward(model: HomeworkModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of a batch, both scalars."""
    mel, labels = batch[0].to(device), batch[1].to(device)
    scores = model(mel)
    return model.loss(scores, labels), (scores.argmax(1) == labels).float().mean()


def train_step(
    model: HomeworkModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    device: torch.device,
) -> tuple[float, float]:
    """One step as published: it reads loss and accuracy from the device each time."""
    loss, accuracy = forward(model, batch, device)
    answer = loss.item(), accuracy.item()
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return answer


def endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    """All batches, epoch after epoch without end."""
    while True:
        yield from loader


@torch.no_grad()
def validate(model: HomeworkModel, loader: Iterable[Batch], device: torch.device) -> float:
    """The mean over batches of their accuracy on random segments, as published."""
    model.eval()
    found = [forward(model, batch, device)[1].item() for batch in loader]
    model.train()
    return sum(found) / len(found)


@torch.no_grad()
def predict(
    model: HomeworkModel, files: Sequence[Path], device: torch.device
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Embed and classify utterances in full length, one at a time.

    Returns:
        Speaker numbers (N,) and embeddings (N, D).
    """
    model.eval()
    labels, embeddings = [], []
    for path in files:
        mel = torch.load(path, weights_only=True).float().to(device).unsqueeze(0)
        embedding = model.embed(mel)
        labels.append(int(model.classifier(embedding).argmax()))
        embeddings.append(embedding[0].cpu().numpy())
    return labels, np.stack(embeddings)


def build_loader(files: Any, batch_size: int, workers: int, *, shuffle: bool) -> DataLoader[Batch]:
    """The homework's DataLoader."""
    return DataLoader(
        files,
        batch_size,
        shuffle=shuffle,
        drop_last=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
    )


def train_baseline(
    dataset_dir: Path,
    steps: int,
    *,
    width: int = 512,
    heads: int = 8,
    head_dim: int = 64,
    kind: str = "strong",
    axis: str = "wrong",
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    warmup: int | None = None,
    valid_steps: int | None = None,
    device: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train as published and predict the test utterances.

    Args:
        dataset_dir: Data set in the homework's layout.
        steps: Optimiser steps.
        width: Width D of the block.
        heads: Attention heads.
        head_dim: Width of a head.
        kind: "strong" or "boss".
        axis: "wrong" as published, or "right".
        seed: Decides split, weights, order, segments and dropout.
        batch_size: Segments a step.
        workers: Of each DataLoader.
        warmup: Warm-up steps; by default 1,000, or a tenth of a run that is not longer.
        valid_steps: Steps between validations; by default 2,000 or the whole run.
        device: Where to compute; a GPU where there is one.
        tell: Called with a line of text after each validation.

    Returns:
        `predictions` {file name: speaker}, `embeddings` (N, D) in the order of testdata.json,
        `val_accuracy` as the published code reports it (the best), `last_val_accuracy`,
        `samples_per_s` of the training steps, `seconds` in all, and `steps`.

    Raises:
        ValueError: The validation split is smaller than a batch.
    """
    began = time.perf_counter()
    random.seed(seed)
    torch.manual_seed(seed)
    source = read_source(dataset_dir)
    data = HomeworkDataset(source.labelled)
    train_size = int(0.9 * len(data))
    if len(data) - train_size < batch_size:
        raise ValueError(
            f"{dataset_dir}: a tenth of {len(data)} utterances is less than a batch of "
            f"{batch_size}, and the homework's validation drops it; take a smaller batch"
        )
    parts = random_split(data, [train_size, len(data) - train_size])
    train_loader = build_loader(parts[0], batch_size, workers, shuffle=True)
    valid_loader = build_loader(parts[1], batch_size, workers, shuffle=False)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = {"dim": width, "heads": heads, "head_dim": head_dim, "kind": kind, "axis": axis}
    model = HomeworkModel(source.n_mels, len(source.speakers), **shape).to(place)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    warmup = warmup_steps(steps) if warmup is None else warmup
    schedule = cosine_schedule(optimizer, warmup, steps)
    every = valid_steps or min(2000, steps)
    best, last, best_state_dict, training = -1.0, 0.0, None, 0.0
    batches, started = endless(train_loader), time.perf_counter()
    for step in range(1, steps + 1):
        train_step(model, next(batches), optimizer, schedule, place)
        if step % every == 0 or step == steps:
            training += time.perf_counter() - started
            last = validate(model, valid_loader, place)
            tell(f"step {step:,}: validation {last:.4f}")
            if last > best:
                # Not a copy, as in the published code: every later step changes it too.
                best, best_state_dict = last, model.state_dict()
            started = time.perf_counter()
    assert best_state_dict is not None
    model.load_state_dict(best_state_dict)
    labels, embeddings = predict(model, source.test, place)
    names = [source.speakers[label] for label in labels]
    return {
        "predictions": dict(zip((path.name for path in source.test), names, strict=True)),
        "embeddings": embeddings,
        "val_accuracy": best,
        "last_val_accuracy": last,
        "samples_per_s": steps * batch_size / training,
        "seconds": time.perf_counter() - began,
        "steps": steps,
    }


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_NEW = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.argument("dataset", type=_FOLDER)
@click.option("--steps", type=click.IntRange(1), default=70000)
@click.option("--warmup", type=click.IntRange(0), help="Warm-up steps.  [default: 1000]")
@click.option("--valid-steps", type=click.IntRange(1), help="Steps between validations.")
@click.option("--width", default=512)
@click.option("--heads", default=8)
@click.option("--head-dim", default=64)
@click.option("--model", "kind", type=click.Choice(KINDS), default="strong")
@click.option(
    "--axis", type=click.Choice(AXES), default="wrong", help="As published (wrong), or corrected."
)
@click.option("--batch", "batch_size", type=click.IntRange(1), default=32)
@click.option("--workers", type=click.IntRange(0), default=0)
@click.option("--seed", default=0)
@click.option("--out", type=_NEW, default="submission.csv", help="CSV to write, Id,Category.")
@click.option("--embeddings", type=_NEW, help="Test embeddings to write (npz).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(dataset: Path, out: Path, embeddings: Path | None, as_json: bool, **options: Any) -> None:
    """Train the homework's model on DATASET as published, and predict its test utterances."""
    try:
        result = train_baseline(dataset, tell=lambda line: click.echo(line, err=True), **options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    predictions, vectors = result.pop("predictions"), result.pop("embeddings")
    with out.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerows([("Id", "Category"), *predictions.items()])
    if embeddings is not None:
        np.savez(embeddings, key=[Path(name).stem for name in predictions], embedding=vectors)
    if as_json:
        click.echo(json.dumps(result))
    else:
        accuracy = f"{result['val_accuracy']:.4f}, as the published code reports it"
        click.echo(f"validation {accuracy}; {out}")


if __name__ == "__main__":
    main()
