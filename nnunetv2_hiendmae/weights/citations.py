"""BibTeX of each pretraining method: the one home for what encoder files, plans and `hiendmae methods` quote."""

CITATIONS: dict[str, tuple[str, ...]] = {
    "hiendmae": (
        "@article{tang2025hiendmae, title={Hi-End-MAE: Hierarchical encoder-driven masked autoencoders are stronger "
        "vision learners for medical image segmentation}, author={Tang, Fenghe and Yao, Qingsong and Ma, Wenxin and "
        "Wu, Chenxu and Jiang, Zihang and Zhou, S. Kevin}, journal={arXiv preprint arXiv:2502.08347}, year={2025}}",
    ),
    "mim": (
        "@article{zhuang2024mim, title={MiM: Mask in Mask Self-Supervised Pre-Training for 3D Medical Image "
        "Analysis}, author={Zhuang, Jiaxin and Wu, Linshan and Wang, Qiong and Fei, Peng and Vardhanabhuti, Varut and "
        "Luo, Lin and Chen, Hao}, journal={arXiv preprint arXiv:2404.15580}, year={2024}}",
    ),
    "glmae": (
        "@article{zhuang2023glmae, title={Advancing Volumetric Medical Image Segmentation via Global-Local Masked "
        "Autoencoder}, author={Zhuang, Jia-Xin and Luo, Luyang and Chen, Hao}, "
        "journal={arXiv preprint arXiv:2306.08913}, year={2023}}",
    ),
    "mae3d": (
        "@inproceedings{he2022mae, title={Masked Autoencoders Are Scalable Vision Learners}, "
        "author={He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and "
        "Girshick, Ross}, booktitle={CVPR}, year={2022}}",
    ),
}
