"""`python -m nnunetv2_hiendmae.demo.seeded_train SEED <arguments of nnUNetv2_train>`

nnU-Net seeds neither the network's first weights nor its loaders and has no option for it. This seeds the three random
generators and calls nnU-Net's own entry point, nothing else. With `nnUNet_n_proc_DA=0` the loaders run in this very
process, so a training on the CPU then repeats itself.
"""

import random
import sys

import numpy as np
import torch
from nnunetv2.run.run_training import run_training_entry


def main() -> None:
    """Seeds and trains."""
    seed = int(sys.argv.pop(1))
    random.seed(seed)
    # nnU-Net's loaders draw from numpy's global generator
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    run_training_entry()


if __name__ == "__main__":
    main()
