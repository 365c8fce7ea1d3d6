"""What `accelerate launch trainer/train.py` runs in a checkout."""

from shardprep_trainer.train import command

if __name__ == "__main__":
    command()
