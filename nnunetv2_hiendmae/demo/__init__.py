"""The whole story on small real images: pretrain, plan, stock training, stock prediction, a Dice table and pictures."""

from nnunetv2_hiendmae.demo.run import run_demo

__all__ = ["run_demo"]
