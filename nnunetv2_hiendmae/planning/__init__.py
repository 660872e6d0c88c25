"""nnU-Net plans for our networks."""

from nnunetv2_hiendmae.planning.finetune import PlannedFinetuning, plan_finetuning
from nnunetv2_hiendmae.planning.plans import write_plans

__all__ = ["PlannedFinetuning", "plan_finetuning", "write_plans"]
