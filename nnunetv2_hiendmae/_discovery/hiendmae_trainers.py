from nnunetv2_hiendmae.trainers import *
