"""Adapter of ai-toolkit: its trainer, judged by its validation loss and ended by an exception."""

from __future__ import annotations

from typing import Any

from dvar.stopping.integrations.trainers.held_loss import HeldLossJudge

LOSS = "val/loss"
"""Under which ai-toolkit keeps its validation loss: fixed images, latents, noise and sigmas."""


class ConceptLearned(Exception):
    """The way out of ai-toolkit's training loop, which has no other."""


def build_trainer(base: Any) -> Any:
    """Return a class of trainers that judge their validation loss and stop by themselves.

    Its settings are ``window`` and ``threshold`` under ``dvar`` in the config of the process. After a stop comes what
    follows the loop: the save without a step, the end of the log and the hook of a run that is done.

    Args:
        base: ai-toolkit's `DiffusionTrainer`.
    """

    class DvarTrainer(base):  # type: ignore[misc]  # a class of another program
        def hook_before_train_loop(self) -> None:
            super().hook_before_train_loop()
            self.dvar_judge = HeldLossJudge(
                self.save_root,
                self.get_conf("dvar.window", 310),
                self.get_conf("dvar.threshold", 0.15),
                may_stop=self.accelerator.num_processes == 1,
            )
            self.dvar_stops = False
            if self.accelerator.is_main_process:  # the others have the same folder
                self.dvar_judge.begin(self._count_updates(self.step_num))
            if self.train_config.validation_config is None:
                print("dvar: the config has no train.validation_config, so there is no loss to judge: add one")

        def validate(self) -> None:
            super().validate()
            loss = self.additional_logs.get(LOSS)
            if loss is not None and self.accelerator.is_main_process:  # after the update of this step
                self.dvar_stops = self.dvar_judge(self._count_updates(self.step_num + 1), loss)

        def _count_updates(self, steps: int) -> int:
            """Return the updates after this many steps, which ai-toolkit counts by batches."""
            updates: int = steps // max(1, self.train_config.gradient_accumulation_steps)
            return updates

        def end_step_hook(self) -> None:
            super().end_step_hook()
            if self.dvar_stops:
                raise ConceptLearned

        def run(self) -> None:
            try:
                super().run()
            except ConceptLearned:
                if self.progress_bar is not None:
                    self.progress_bar.close()
                self.save()
                self.logger.finish()
                self.accelerator.end_training()
                self.done_hook()

    return DvarTrainer
