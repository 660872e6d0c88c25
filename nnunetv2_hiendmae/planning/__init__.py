"""nnU-Net plans for our networks."""

from nnunetv2_hiendmae.planning.finetune import PlannedFinetuning, plan_finetuning

__all__ = ["PlannedFinetuning", "plan_finetuning"]
