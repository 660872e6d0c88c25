"""The methods, by name."""

from nnunetv2_hiendmae.pretraining.genesis import Genesis
from nnunetv2_hiendmae.pretraining.glmae import GLMAE
from nnunetv2_hiendmae.pretraining.hiendmae import HiEndMAE
from nnunetv2_hiendmae.pretraining.masked import MAE3D
from nnunetv2_hiendmae.pretraining.method import Method
from nnunetv2_hiendmae.pretraining.mim import MiM
from nnunetv2_hiendmae.pretraining.simclr import SimCLR
from nnunetv2_hiendmae.pretraining.simmim import SimMIM
from nnunetv2_hiendmae.pretraining.swinpretexts import SwinPretexts

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (HiEndMAE, MiM, GLMAE, MAE3D, SimMIM, SimCLR, Genesis, SwinPretexts)
}
