"""Train a speaker model: `shardprep train`, or by a launcher in several processes.

`accelerate launch trainer/train.py` runs this module in a checkout, `accelerate launch -m
shardprep_trainer.train` from a wheel.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import click

from shardprep import ShardprepError, StorageError, locate, storage_error
from shardprep_trainer.config.command_line import Invocation, parse_args
from shardprep_trainer.errors import TrainerError, is_lost_peer, is_out_of_memory
from shardprep_trainer.processes.launch import (
    check_launch,
    parent_command,
    processes_to_start,
    training_program,
)
from shardprep_trainer.processes.workers import start_processes
from shardprep_trainer.run.outcome import summary

_MAIN_PROCESS_FIRST_SECONDS = 5.0


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Train as the command line says.

    Args:
        argv: Arguments without the program's name; those of the process by default.
        program: The command that the arguments follow, as the help shows it; `accelerate launch`
            with this program by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage or configuration, 130 after Ctrl-C, 143 after
        SIGTERM, and the codes of `shardprep` for shards that cannot be read and disks that
        refuse. A run that hangs exits with 124; a run that a signal kills has 128 plus the
        signal's number.
    """
    try:
        words = sys.argv[1:] if argv is None else argv
        command = program or f"accelerate launch [flags] {training_program()}"
        return _run(parse_args(words, command))
    except (TrainerError, ShardprepError) as error:
        _report(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has left, as `head` does once it has its lines.
        raise
    except OSError as error:
        _report(f"error: {storage_error(error)}")
        return StorageError.exit_code
    except (MemoryError, RuntimeError) as error:
        if is_lost_peer(error):
            _report(
                "error: another process is gone, or the network to it; see its last message. "
                "--resume continues from the newest checkpoint, which torchrun --max-restarts does "
                "by itself; if no step was done, name the network by NCCL_SOCKET_IFNAME or, on "
                f"CPUs, GLOO_SOCKET_IFNAME ({' '.join(str(error).split())[:200]})"
            )
            return TrainerError.exit_code
        if not is_out_of_memory(error):
            raise
        _report(
            "error: the memory of the device does not suffice; give a smaller --data.batch_size "
            "(or --data.global_batch) with a larger --train.accumulate, a smaller "
            "--data.eval_frames, shorter "
            f"--data.segment_frames, or a smaller model ({' '.join(str(error).split())[:200]})"
        )
        return TrainerError.exit_code
    except KeyboardInterrupt:
        _report("interrupted; nothing was saved since the last checkpoint")
        return 128 + signal.SIGINT


def _run(asked: Invocation) -> int:
    if asked.print_config:
        if _rank() == 0:
            _note(asked.notes)
            click.echo(asked.config.to_yaml(), nl=False)
        return 0
    # Refuses a system without what shards need, before anything is made.
    for place in asked.config.data.places:
        locate(place)
    environment, command = dict(os.environ), parent_command()
    check_launch(environment, command)
    share = processes_to_start(environment, command)
    return _train(asked) if share is None else start_processes(share)


def _train(asked: Invocation) -> int:
    # These import PyTorch, which takes seconds: --help and errors in options need not wait for it.
    from shardprep_trainer.processes.meeting import parting
    from shardprep_trainer.run.start import prepare
    from shardprep_trainer.run.trainer import Trainer

    if _rank() == 0:
        _note(asked.notes)
    with parting():
        trainer = Trainer(prepare(asked.config, resume=asked.resume))
        try:
            outcome = trainer.fit()
            if _rank() == 0:
                text = summary(
                    asked.config,
                    outcome,
                    processes=trainer.world_size,
                    device=trainer.device.type,
                    precision=trainer.accelerator.mixed_precision,
                    test=bool(trainer.shards.samples.get("test")),
                )
                _tell(text)
            # A launcher ends all processes as soon as one exits with a code other than 0.
            trainer.accelerator.wait_for_everyone()
        finally:
            trainer.close()
    return 128 + outcome.signal if outcome.signal else 0


def _note(notes: Sequence[str]) -> None:
    for note in notes:
        _tell(f"note: {note}")


def _report(message: str) -> None:
    """Print an error once, although every process of a launch has it.

    The launcher ends all processes as soon as one has failed. So the main process prints first; the
    others wait, and print only if the main process had no error.
    """
    if _rank() != 0:
        time.sleep(_MAIN_PROCESS_FIRST_SECONDS)
    _tell(message)


def _tell(text: str) -> None:
    """Print on stderr, if somebody reads it."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def command(argv: Sequence[str] | None = None, program: str | None = None) -> NoReturn:
    """Train as the command line says, and exit with the code of `main`."""
    # A mapped shard that is truncated, or whose disk fails, ends the process by SIGBUS. Its
    # traceback needs a stderr.
    with contextlib.suppress(RuntimeError, OSError):
        faulthandler.enable()
    try:
        code = main(argv, program)
    except BrokenPipeError:
        # Nobody reads our output any longer, as after `| head -1`: end as SIGPIPE would.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        code = 128 + signal.SIGPIPE
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Everything is written and closed. Do not let the interpreter clean up: a thread of gloo
        # sometimes aborts the process meanwhile.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def train_command(context: click.Context, words: tuple[str, ...]) -> NoReturn:
    """Train a speaker model; `shardprep train`."""
    command(words, context.command_path)


if __name__ == "__main__":
    command()
