"""MiM's alignment between levels: a finer view is to find the region of the coarser crop it was cut from."""

from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_hiendmae.architectures.layers import init_transformer
from nnunetv2_hiendmae.architectures.tokens import take_tokens

ALIGNMENTS = ("infonce", "byol", "none")


class RegionAlignment(nn.Module):
    """Alignment of one pair of levels (METHODS §3; the paper's equation is not published, this one is ours).

    "infonce": cosines of query and region keys over τ, cross-entropy with the region of origin; the other regions of
    the same crop are the negatives. Query and keys have an MLP (width-width-width, GELU) each.
    "byol": 2 − 2·cos of query and region of origin. Only the query has an MLP: one on the coarse side would get no
    gradient.

    Args:
        kind: "infonce" or "byol".
        width: of the features.
        tau: temperature of "infonce".
    """

    def __init__(self, kind: str, width: int, tau: float):
        super().__init__()
        self.kind, self.tau = kind, tau
        self.query = Mlp(width, width)
        self.key = Mlp(width, width) if kind == "infonce" else nn.Identity()
        init_transformer(self)

    def forward(self, features: Tensor, regions: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Loss per view, and whether the region of origin is the most similar one.

        Args:
            features: (M, F) of the finer views.
            regions: (M, R, F) of the coarser crops, without gradient.
            origin: (M,) region that each view was cut from.

        Returns:
            (M,) float32 each.
        """
        query, keys = self.query(features).float(), self.key(regions).float()
        # not a matrix product: autocast would round the cosines to half precision, too coarse for neighbouring tokens
        cosines = F.cosine_similarity(query[:, None], keys, dim=-1)
        found = (cosines.detach().argmax(dim=1) == origin).float()
        if self.kind == "infonce":
            return F.cross_entropy(cosines / self.tau, origin, reduction="none"), found
        return 2 - 2 * take_tokens(cosines[:, :, None], origin[:, None])[:, 0, 0], found
