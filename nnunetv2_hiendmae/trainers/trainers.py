"""nnU-Net trainers that fine-tune our encoders. Settings come from the plans, weights from the encoder file."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_hiendmae.environment import check_device, preprocess_command
from nnunetv2_hiendmae.errors import UserError, printable
from nnunetv2_hiendmae.files import sha256, write_with
from nnunetv2_hiendmae.host_memory import give_back_freed_memory, set_freed_memory
from nnunetv2_hiendmae.optim import adamw, parameter_groups, split_groups
from nnunetv2_hiendmae.plans_section import NNUNET_GRAD_CLIP, PLAN_COMMAND, PLANS_KEY, PlansSection
from nnunetv2_hiendmae.randomness import seed_of
from nnunetv2_hiendmae.recipes import FOREIGN, RECIPES, TRAINERS, trainer_of
from nnunetv2_hiendmae.schemas import Plans, validated
from nnunetv2_hiendmae.threads import use_allowed_cores
from nnunetv2_hiendmae.trainers.former import check_checkpoint, check_other_folds
from nnunetv2_hiendmae.trainers.loaders import seeded
from nnunetv2_hiendmae.trainers.schedule import WarmupCosine
from nnunetv2_hiendmae.volume_format import twins
from nnunetv2_hiendmae.weights import load_into, read_metadata
from nnunetv2_hiendmae.weights.hub import hub_name

# beside 0 and 1, the loaders of training and validation
_EPOCH = 2

__all__ = sorted({*TRAINERS.values(), FOREIGN.trainer})


class _ViTTrainer(nnUNetTrainer):
    """nnU-Net's training of a `ViTUNETR` or `ConvViTUNETR` with AdamW, warm-up and cosine, from an encoder file.

    The encoder file is read once, when training starts at epoch 0: continuing (`--c`), validating and predicting
    need only nnU-Net's checkpoint. `-pretrained_weights` is refused where the plans name an encoder file.

    Raises:
        RuntimeError: no such device, plans that are not for this trainer, or whose encoder file is missing, changed or
            unfit.
    """

    # pretraining method that the plans must name, None: trained from scratch
    method: str | None = None
    # whether the weights are those of a checkpoint, which may be of epoch 0
    continues: bool = False

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (the base class compares signatures)
    ):
        # before the base class creates a results folder
        try:
            check_device(device.type)
        except UserError as e:
            raise RuntimeError(str(e)) from e
        self.section = self._read_section(plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        recipe = self.section.recipe
        self.enable_deep_supervision = False
        self.initial_lr = self.section.lr
        self.weight_decay = recipe.weight_decay
        self.num_epochs = recipe.epochs
        self.num_iterations_per_epoch = recipe.iterations_per_epoch
        self.num_val_iterations_per_epoch = recipe.val_iterations_per_epoch

    @classmethod
    def _read_section(cls, plans: dict[str, Any]) -> PlansSection:
        name = plans.get("plans_name")
        if PLANS_KEY not in plans:
            told = f"plans {name} have no '{PLANS_KEY}' section, {cls.__name__} needs it"
            raise RuntimeError(f"{told}; run: {PLAN_COMMAND}")
        try:
            # somebody may have edited them
            validated(Plans, json.dumps(plans))
            section = PlansSection.from_dict(plans[PLANS_KEY])
        except ValueError as e:
            raise RuntimeError(f"plans {name} cannot be used: {e}; run: {PLAN_COMMAND}") from e
        if not cls._takes(section.method):
            told = f"plans {name} are for {_described(section.method)}, {cls.__name__} is for {cls._described()}"
            raise RuntimeError(f"{told}; use -tr {trainer_of(section.method)}, or run: {PLAN_COMMAND}")
        return section

    @classmethod
    def _takes(cls, method: str | None) -> bool:
        """Whether this is the trainer for weights of a method; None: for none."""
        return method == cls.method

    @classmethod
    def _described(cls) -> str:
        """What it is for, in words."""
        return _described(cls.method)

    def initialize(self):
        if not Path(self.preprocessed_dataset_folder).is_dir():
            data, plans = self.plans_manager.dataset_name, self.plans_manager.plans_name
            told = f"{data} is not preprocessed with {plans} ({self.preprocessed_dataset_folder} is missing)"
            raise RuntimeError(f"{told}; run: {preprocess_command(data, plans, self.configuration_name)}")
        if self.section.recipe.seed is not None:
            torch.manual_seed(self.section.recipe.seed)
        super().initialize()
        if self.section.encoder_file is not None:
            self._fresh_kernel = self._input_kernel().detach().clone()

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        # which the base class replaces by those of the checkpoint
        now = self.my_init_kwargs
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except RuntimeError:
            # tensors of other shapes: the plans tell more
            check_checkpoint(self.my_init_kwargs, now)
            raise
        except ValueError as e:
            # of the optimizer
            raise RuntimeError(
                f"the checkpoint comes from plans with another schedule than {self.plans_manager.plans_name}: {e}; "
                "plan with its --freeze-encoder, --layer-decay, --encoder-lr-scale and --decoder-warmup, or train "
                "under another --name"
            ) from e
        self._log(check_checkpoint(self.my_init_kwargs, now))
        self.continues = True

    def _log(self, told: str) -> None:
        """Into nnU-Net's log, if there is something to tell."""
        if told:
            self.print_to_log_file(told)

    def set_deep_supervision_enabled(self, enabled: bool):
        """Nothing to switch: the network has one output."""

    def configure_optimizers(self):
        """AdamW without weight decay on biases, norms, positions and CLS; nothing of a frozen encoder. One that is
        frozen for some epochs has no gradients until then, and so neither steps, decay nor moments."""
        recipe, network = self.section.recipe, self._plain_network()
        if recipe.freeze_encoder:
            network.encoder.requires_grad_(False)
        groups = parameter_groups(network, recipe.weight_decay, recipe.layer_decay)
        if self._encoder_apart:
            inner = network.encoder.parameters()
            groups = split_groups(groups, inner, recipe.encoder_lr_scale, recipe.decoder_warmup)
        optimizer = adamw(groups, self.initial_lr, recipe.betas)
        if recipe.decoder_warmup:
            network.encoder.requires_grad_(False)
        parameters = [p for group in groups for p in group["params"]]
        # nnU-Net has clipped to its own by now, and has unscaled the gradients
        largest = recipe.grad_clip if recipe.grad_clip < NNUNET_GRAD_CLIP else math.inf

        def clip(*_: Any) -> None:
            if not nn.utils.clip_grad_norm_(parameters, largest).isfinite():
                # without gradients AdamW leaves the weights as they are
                optimizer.zero_grad()

        optimizer.register_step_pre_hook(clip)
        return optimizer, WarmupCosine(optimizer, self.initial_lr, recipe.epochs, recipe.warmup_epochs)

    @property
    def _encoder_apart(self) -> bool:
        """Whether the encoder has a schedule of its own."""
        return self.section.recipe.encoder_lr_scale != 1 or self.section.recipe.decoder_warmup > 0

    def get_dataloaders(self):
        """nnU-Net's, with a seed where the plans have one: batches then depend on it and on their number, with any
        number of workers, and continuing goes on with the batch that would have come."""
        loaders = super().get_dataloaders()
        if (seed := self.section.recipe.seed) is None:
            return loaders
        iterations = self.num_iterations_per_epoch, self.num_val_iterations_per_epoch
        return tuple(
            seeded(loader, (seed, self.local_rank, which), self.current_epoch * count)
            for which, (loader, count) in enumerate(zip(loaders, iterations, strict=True))
        )

    def on_train_start(self):
        plans, configuration = self.plans_manager.plans, self.configuration_name
        self._log(check_other_folds(Path(self.output_folder_base), self.fold, plans, configuration))
        # before data loaders start their processes
        if self.device.type == "cpu":
            set_freed_memory(keep=True)
            use_allowed_cores()
        if not self.was_initialized:
            self.initialize()
        if self.current_epoch == 0 and not self.continues:
            self._load_encoder()
            for citation in self.section.citations:
                self.print_to_log_file(f"Please cite:\n{citation}", add_timestamp=False)
        super().on_train_start()

    def on_train_end(self):
        super().on_train_end()
        # validation writes its predictions in processes of its own
        give_back_freed_memory()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        recipe = self.section.recipe
        if recipe.seed is not None:
            # for stochastic depth
            torch.manual_seed(seed_of(recipe.seed, self.local_rank, _EPOCH, self.current_epoch))
        frozen = recipe.freeze_encoder or self.current_epoch < recipe.decoder_warmup
        if frozen:
            # no stochastic depth in what does not learn
            self._plain_network().encoder.eval()
        else:
            self._release_encoder()
        if self._encoder_apart:
            lr = max(group["lr"] for group in self.optimizer.param_groups if "start" in group)
            self.print_to_log_file("Encoder: frozen" if frozen else f"Learning rate of the encoder: {lr:.5g}")

    def _release_encoder(self) -> None:
        """Lets everything learn that the optimizer has."""
        held = [p for group in self.optimizer.param_groups for p in group["params"] if not p.requires_grad]
        if not held:
            return
        for parameter in held:
            parameter.requires_grad_()
        if isinstance(self.network, DistributedDataParallel):
            # it averages the gradients of what could learn when it was made
            self.network = DistributedDataParallel(self.network.module, device_ids=self.network.device_ids)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]):
        """Ends the training where no loss of an epoch was finite in any process: it has not learned, and would not.

        Raises:
            RuntimeError: so, in all processes; `checkpoint_latest.pth` has the weights from before.
        """
        super().on_train_epoch_end(train_outputs)
        losses = self._of_all_processes([float(output["loss"]) for output in train_outputs])
        if any(map(math.isfinite, losses)):
            return
        epoch, lr = self.current_epoch, self.optimizer.param_groups[0]["lr"]
        # as after the epoch before
        self.current_epoch -= 1
        kept = self._keep_weights()
        raise RuntimeError(
            f"all {len(losses)} losses of epoch {epoch} are {losses[-1]} (lr {lr:g}), {kept}; look for broken "
            f"intensities, or run: {PLAN_COMMAND} --lr ..."
        )

    def _of_all_processes(self, losses: list[float]) -> list[float]:
        if not self.is_ddp:
            return losses
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, losses)
        return [loss for part in gathered for loss in part]

    def _keep_weights(self) -> str:
        """Writes checkpoint_latest.pth, unless the weights are broken too; says where the weights from before are."""
        path = Path(self.output_folder) / "checkpoint_latest.pth"
        whole = all(p.isfinite().all() for p in self._plain_network().parameters())
        if whole and not self.disable_checkpointing and self.local_rank == 0:
            write_with(path, lambda temporary: self.save_checkpoint(str(temporary)))
        if self.is_ddp:
            # nnU-Net ends all processes with the first that fails
            dist.barrier()
        if whole and not self.disable_checkpointing:
            return f"the weights from before are in {path}"
        why = "checkpoints are disabled" if whole else "the weights are not finite either"
        return f"nothing was saved, as {why}"

    def _load_encoder(self) -> None:
        if self.section.encoder_file is None:
            return
        path = Path(self.section.encoder_file)
        encoder = self._plain_network().encoder
        if not torch.equal(self._input_kernel(), self._fresh_kernel):
            raise RuntimeError(
                f"-pretrained_weights and the plans' encoder file {path} both claim the encoder; leave the option "
                f"out, or use {TRAINERS[None]} with plans made by: {PLAN_COMMAND} --from-scratch"
            )
        del self._fresh_kernel
        if not path.is_file():
            named = hub_name(path)
            back = f"download it to there again with: hiendmae inspect {named}" if named else "put it back"
            raise RuntimeError(f"the plans' encoder file {path} does not exist; {back}, or run: {PLAN_COMMAND}")
        if sha256(path) != self.section.encoder_sha256:
            raise RuntimeError(f"the encoder file {path} changed since the plans were made; run: {PLAN_COMMAND}")
        try:
            report = load_into(encoder, path)
        except UserError as e:
            raise RuntimeError(str(e)) from e
        self.print_to_log_file(f"Encoder weights from {path}: {report.text()}")
        seen, reader = read_metadata(path).volume.image_reader_writer, self.plans_manager.plans["image_reader_writer"]
        if seen is not None and seen not in twins(reader):
            told = f"these plans read images with {reader}, the encoder saw those of {seen}"
            mend = "if nobody asked for that (nnUNetv2_move_plans_between_datasets changes it in silence), run"
            self.print_to_log_file(f"WARNING: {told}: they may lie in other directions; {mend}: {PLAN_COMMAND}")

    def _input_kernel(self) -> nn.Parameter:
        encoder = self._plain_network().encoder
        return encoder.get_parameter(encoder.input_kernel)

    def _plain_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network


class nnUNetTrainer_Pretrained(_ViTTrainer):
    """Fine-tunes an encoder that another program pretrained or trained: its method is none of ours."""

    @classmethod
    def _takes(cls, method: str | None) -> bool:
        return method is not None and method not in RECIPES

    @classmethod
    def _described(cls) -> str:
        return "weights of other programs' methods"


class nnUNetTrainer_ViTUNETR(_ViTTrainer):
    """Trains the same network from scratch: the supervised baseline. Takes stock `-pretrained_weights`."""

    method = None


# one per method, under the name that its recipe says: it insists on an encoder that the method pretrained
for _method, _recipe in RECIPES.items():
    globals()[_recipe.trainer] = type(_recipe.trainer, (_ViTTrainer,), {"method": _method, "__module__": __name__})


def _described(method: str | None) -> str:
    return "training from scratch" if method is None else f"weights of '{printable(method)}'"
