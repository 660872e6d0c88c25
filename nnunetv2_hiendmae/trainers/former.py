"""What nnU-Net would do in silence with folds that were trained with other plans of the same name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_hiendmae.former_plans import changes, changes_in_model, trained_folds
from nnunetv2_hiendmae.plans_section import PLAN_COMMAND


def check_checkpoint(trained: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Compares what a checkpoint was trained with and what it is to be continued or validated with, nnU-Net's
    `init_args` both.

    Returns:
        What to log; "" where they are the same.

    Raises:
        RuntimeError: arrays, network, encoder file or labels are others.
    """
    name, found = now["plans"]["plans_name"], changes(trained["plans"], now["plans"], now["configuration"])
    labels, labels_now = (about["dataset_json"].get("labels") for about in (trained, now))
    of_labels = (f"labels were {labels}, are {labels_now}",) if labels != labels_now else ()
    if refused := (*found.model, *found.encoder, *of_labels):
        raise RuntimeError(
            f"fold {now['fold']} was trained with other plans {name}: {', '.join(refused)}; plan as before to continue "
            "or validate it, else train it anew, without --c and --val"
        )
    return f"The plans changed since this training began: {found}" if str(found) else ""


def check_other_folds(model: Path, fold: int | str, plans: Mapping[str, Any], configuration: str) -> str:
    """Compares the plans in the folder of a model, which are written anew when a training starts and are what
    prediction uses, with those of a fold that is to be trained beside others.

    Returns:
        What to log; "" where they are the same, or there are no other folds.

    Raises:
        RuntimeError: arrays or network are others.
    """
    others = [number for number in trained_folds(model) if number != str(fold)]
    found = changes_in_model(model, plans, configuration)
    if not others or not str(found):
        return ""
    told = f"fold {', '.join(others)} in {model} was trained with other plans {plans['plans_name']}"
    if found.model:
        raise RuntimeError(
            f"{told}: {', '.join(found.model)}; nnU-Net would predict with all as these plans say: move that "
            f"folder away, or plan under another name: {PLAN_COMMAND} --name ..."
        )
    return f"WARNING: {told}, means over folds mix them: {found}"
