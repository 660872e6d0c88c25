"""What all parts of the package must agree on about a pretraining method: citation, trainer, volumes, fine-tuning."""

from dataclasses import dataclass, field

from nnunetv2_hiendmae.plans_section import FinetuneRecipe
from nnunetv2_hiendmae.volume_format import VolumeFormat


@dataclass(frozen=True)
class MethodRecipe:
    """What a method's encoder saw and how it is fine-tuned, wherever the user does not say otherwise.

    Args:
        trainer: nnU-Net trainer that insists on weights of this method.
        citations: BibTeX entries, for encoder files, plans and `hiendmae methods`.
        volume: spacing (None: the dataset's own, by nnU-Net's rule) and CT window that becomes [0, 1]; channels other
            than CT keep nnU-Net's normalisation.
        decoder_width: channels of the UNETR decoder at full resolution; `batch_size`: crops per fine-tuning batch.
        drop_path_rate: stochastic depth of the encoder in fine-tuning.
        frozen_lr: peak learning rate where the encoder is frozen; None: that of `finetune`.
        crop_limit: largest fine-tuning crop (D, H, W) in voxels, where the encoder saw larger ones; None: no limit.
    """

    trainer: str
    citations: tuple[str, ...]
    volume: VolumeFormat = VolumeFormat((1.5, 1.5, 1.5), (-175.0, 250.0), interpolation="linear")
    decoder_width: int = 32
    batch_size: int = 4
    drop_path_rate: float = 0.0
    frozen_lr: float | None = None
    crop_limit: tuple[int, int, int] | None = None
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)


RECIPES: dict[str, MethodRecipe] = {
    "hiendmae": MethodRecipe(
        trainer="nnUNetTrainer_HiEndMAE",
        citations=(
            "@article{tang2025hiendmae, title={Hi-End-MAE: Hierarchical encoder-driven masked autoencoders are "
            "stronger vision learners for medical image segmentation}, author={Tang, Fenghe and Yao, Qingsong "
            "and Ma, Wenxin and Wu, Chenxu and Jiang, Zihang and Zhou, S. Kevin}, journal={arXiv preprint "
            "arXiv:2502.08347}, year={2025}}",
        ),
    ),
    "mim": MethodRecipe(
        trainer="nnUNetTrainer_MiM",
        citations=(
            "@article{zhuang2024mim, title={MiM: Mask in Mask Self-Supervised Pre-Training for 3D Medical Image "
            "Analysis}, author={Zhuang, Jiaxin and Wu, Linshan and Wang, Qiong and Fei, Peng and Vardhanabhuti, "
            "Varut and Luo, Lin and Chen, Hao}, journal={arXiv preprint arXiv:2404.15580}, year={2024}}",
        ),
        volume=VolumeFormat(None, (-1000.0, 1000.0), interpolation="linear"),
        decoder_width=48,
        drop_path_rate=0.2,
        # lr unpublished: ours
        finetune=FinetuneRecipe(lr=1e-4, grad_clip=5.0),
    ),
    # widths 16 to 48 are published
    "glmae": MethodRecipe(
        trainer="nnUNetTrainer_GLMAE",
        citations=(
            "@article{zhuang2023glmae, title={Advancing Volumetric Medical Image Segmentation via Global-Local "
            "Masked Autoencoder}, author={Zhuang, Jia-Xin and Luo, Luyang and Chen, Hao}, journal={arXiv "
            "preprint arXiv:2306.08913}, year={2023}}",
        ),
        volume=VolumeFormat(None, (-1000.0, 1000.0), interpolation="linear"),
        # its global views have 160³ voxels
        crop_limit=(96, 96, 96),
        finetune=FinetuneRecipe(lr=3e-4),
        frozen_lr=1e-2,
    ),
    # ours: the baseline sees what Hi-End-MAE sees, so that the two can be compared
    "mae3d": MethodRecipe(
        trainer="nnUNetTrainer_MAE3D",
        citations=(
            "@inproceedings{he2022mae, title={Masked Autoencoders Are Scalable Vision Learners}, author={He, "
            "Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, "
            "Ross}, booktitle={CVPR}, year={2022}}",
        ),
    ),
    # ours for all baselines of the papers: as Hi-End-MAE
    "simmim": MethodRecipe(
        trainer="nnUNetTrainer_SimMIM",
        citations=(
            "@inproceedings{xie2022simmim, title={SimMIM: A Simple Framework for Masked Image Modeling}, "
            "author={Xie, Zhenda and Zhang, Zheng and Cao, Yue and Lin, Yutong and Bao, Jianmin and Yao, Zhuliang "
            "and Dai, Qi and Hu, Han}, booktitle={CVPR}, year={2022}}",
            "@inproceedings{chen2023mim3d, title={Masked Image Modeling Advances 3D Medical Image Analysis}, "
            "author={Chen, Zekai and Agarwal, Devansh and Aggarwal, Kshitij and Safta, Wiem and Balan, Mariann "
            "Micsinai and Brown, Kevin}, booktitle={WACV}, year={2023}}",
        ),
    ),
    "simclr": MethodRecipe(
        trainer="nnUNetTrainer_SimCLR",
        citations=(
            "@inproceedings{chen2020simclr, title={A Simple Framework for Contrastive Learning of Visual "
            "Representations}, author={Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey}, "
            "booktitle={ICML}, year={2020}}",
        ),
    ),
    "genesis": MethodRecipe(
        trainer="nnUNetTrainer_Genesis",
        citations=(
            "@article{zhou2021genesis, title={Models Genesis}, author={Zhou, Zongwei and Sodha, Vatsal and Pang, "
            "Jiaxuan and Gotway, Michael B. and Liang, Jianming}, journal={Medical Image Analysis}, volume={67}, "
            "pages={101840}, year={2021}}",
        ),
    ),
    "swinpretexts": MethodRecipe(
        trainer="nnUNetTrainer_SwinPretexts",
        citations=(
            "@inproceedings{tang2022swinunetr, title={Self-Supervised Pre-Training of Swin Transformers for 3D "
            "Medical Image Analysis}, author={Tang, Yucheng and Yang, Dong and Li, Wenqi and Roth, Holger R. and "
            "Landman, Bennett and Xu, Daguang and Nath, Vishwesh and Hatamizadeh, Ali}, booktitle={CVPR}, year={2022}}",
        ),
    ),
}
DEFAULT_METHOD = "hiendmae"
# the four methods; the others are baselines that their papers compare with
MAIN_METHODS = ("hiendmae", "mim", "glmae", "mae3d")
# what `hiendmae preprocess --like` knows besides methods: MR of heads, ours. Turned to RAS, so that the crop that goes
# with it lies along a head: 160 mm up, 192 mm from back to front, 160 mm across
MRI = "mri"
MRI_VOLUME = VolumeFormat(
    (1.0, 1.0, 1.0),
    None,
    "NibabelIOWithReorient",
    normalization_schemes=("ZScoreNormalization",),
    interpolation="linear",
)
HEAD_CROP = (160, 192, 160)
# peak learning rate without weights, whatever the method: that of nnU-Net's own vision transformers (Primus)
SCRATCH_LR = 3e-4
# ours, for weights that another program pretrained or trained, whatever its method: as the baseline, with nnU-Net's own
# batch size
FOREIGN = MethodRecipe("nnUNetTrainer_Pretrained", citations=(), volume=VolumeFormat(), batch_size=2)
# per pretraining method, None from scratch: the trainer that insists on such plans
TRAINERS = {**{name: recipe.trainer for name, recipe in RECIPES.items()}, None: "nnUNetTrainer_ViTUNETR"}


def recipe_of(method: str) -> MethodRecipe:
    """The recipe of a method of ours, or the one for weights of other methods."""
    return RECIPES.get(method, FOREIGN)


def trainer_of(method: str | None) -> str:
    """The trainer for weights of a method, ours or another; None: from scratch."""
    return TRAINERS.get(method, FOREIGN.trainer)
