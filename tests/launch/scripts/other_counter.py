"""A script that leaves its training loop to a module beside it."""

from __future__ import annotations

from tiny import parse_arguments, save, seed_everything
from trainer import Trainer

if __name__ == "__main__":
    args = parse_arguments()
    seed_everything()
    trainer = Trainer(args)
    trainer.train()
    save(trainer.accelerator, args.output_dir, state=(trainer.state.global_step, trainer.state.epoch))
