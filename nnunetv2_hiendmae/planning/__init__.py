"""nnU-Net plans for our networks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunetv2_hiendmae.planning.finetune import PlannedFinetuning, plan_finetuning

__all__ = ["PlannedFinetuning", "plan_finetuning"]


def __getattr__(name: str) -> Any:
    # on first use: it imports the encoders, which a worker of preprocessing does not need
    if name in __all__:
        from nnunetv2_hiendmae.planning import finetune

        return getattr(finetune, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
