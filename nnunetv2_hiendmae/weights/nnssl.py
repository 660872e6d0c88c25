"""What the files of nnssl (OpenMind, nnFoundation) and of nnU-Net say about a Primus beside its tensors: crop, heads,
volumes, and the order of tokens, which no file names (docs/weights.md, "Primus")."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import UserError, printable
from nnunetv2_hiendmae.options.commands import HWD, WHD, ConvertOptions
from nnunetv2_hiendmae.volume_format import VolumeFormat, interpolation_of
from nnunetv2_hiendmae.weights.adaptation_plan import PLAN, PRIMUS_X, checked_kwargs, citations_in, read_plan
from nnunetv2_hiendmae.weights.checkpoint_io import is_weight
from nnunetv2_hiendmae.weights.encoder_file import EncoderMetadata
from nnunetv2_hiendmae.weights.find import ForeignEncoder, find_encoder
from nnunetv2_hiendmae.weights.formats import NNSSL, PRIMUS, UNKNOWN, UNKNOWN_NOTE
from nnunetv2_hiendmae.weights.nnunet import NETWORK, TRAINER, plans_of
from nnunetv2_hiendmae.weights.primus import check_stem

# of nnU-Net's normalisations, those that look at nothing but the image
_SCHEMES = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization")
_BLOCK = re.compile(r"(.*?)eva\.blocks\.\d+\.")
# of the programs, where a file names none
_CITATIONS = (
    "@article{wald2025primus, title={Primus: Enforcing Attention Usage for 3D Medical Image Segmentation}, "
    "author={Wald, Tassilo and Roy, Saikat and Isensee, Fabian and Ulrich, Constantin and others}, journal={arXiv "
    "preprint arXiv:2503.01835}, year={2025}}",
    "@article{wald2024openmind, title={An OpenMind for 3D medical vision self-supervised learning}, author={Wald, "
    "Tassilo and Ulrich, Constantin and others}, journal={arXiv preprint arXiv:2412.17041}, year={2024}}",
)
# of what was released
_OPENMIND, _NNFOUNDATION = (
    f"{licence} if it is a file that {who} released, else its author's"
    for licence, who in (("CC-BY-4.0", "OpenMind"), ("CC-BY-SA-4.0", "nnFoundation"))
)


@dataclass(frozen=True)
class PrimusSource:
    """A Primus in a file, and what the file says of it.

    Args:
        token_order: one of `TOKEN_ORDERS`; `why` says who decided.
        num_heads, img_size: in the file's axes; None: it does not say.
        planned: whether there is a plan, which says how arrays lie.
        order: old axis of each axis of the volume, where the program transposed what it read; None: it did not.
        volume: how images became arrays, in the axes of the volume.
        notes: what a user should look at, in sentences.
    """

    found: ForeignEncoder
    token_order: str
    why: str
    num_heads: int | None = None
    img_size: tuple[int, int, int] | None = None
    planned: bool = False
    order: tuple[int, ...] | None = None
    volume: VolumeFormat = VolumeFormat(orientation=UNKNOWN, interpolation=None)
    citations: tuple[str, ...] = ()
    licence: str = "not stated in the file"
    method: str | None = None
    notes: tuple[str, ...] = ()

    def options(self, said: ConvertOptions) -> ConvertOptions:
        """What was said and what the file says, in one; UserError where they contradict each other."""
        if said.axes == "xyz" and self.planned:
            raise UserError("--axes xyz: the plan in the file says how its arrays lie; leave it out")
        for name in ("num_heads", "img_size"):
            ours, theirs = getattr(said, name), getattr(self, name)
            if None not in (ours, theirs) and ours != theirs:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {ours}: the plan in the file says {theirs}; leave it out")
        known = {k: getattr(self, k) for k in ("num_heads", "img_size") if getattr(self, k) is not None}
        return replace(said, **known, token_order=self.token_order, axes=said.axes or "dhw")

    def metadata(self, spec: EncoderSpec, said: ConvertOptions) -> EncoderMetadata:
        """What is known of the encoder, whose spec is in the axes of the volume."""
        method = NNSSL.name if self.found.format is NNSSL else self.method
        if said.method and method:
            raise UserError(f"--method {said.method}: a program of its own trained it; leave it out")
        heads, depth = self.found.format.sizes.get(spec.embed_dim, (spec.num_heads, spec.depth))
        released, crop = f"a Primus of width {spec.embed_dim} that was released has", " ".join(map(str, spec.img_size))
        notes = {
            f"token order {self.token_order}: {self.why}": True,
            "its positions and rotary channels were put into the order whd, in which everything here lies": (
                self.token_order == HWD
            ),
            f"{spec.depth} blocks: {released} {depth}; was one lost?": depth != spec.depth and self.num_heads is None,
            f"{spec.num_heads} heads: {released} {heads}": heads != spec.num_heads and self.num_heads is None,
            f"the grid was taken as a cube, the crop as {crop}; --img-size says otherwise": (
                self.img_size is None and said.img_size is None
            ),
            f"the encoder's names had the prefix {printable(self.found.prefix)}": bool(self.found.prefix),
            UNKNOWN_NOTE: self.volume.orientation == UNKNOWN,
        }
        told = (*(note for note, applies in notes.items() if applies), *self.notes)
        volume = self.volume
        if not volume.channel_names:
            volume = replace(volume, normalization_schemes=volume.normalization_schemes[:1] * spec.in_channels)
        method = method or said.method or PRIMUS.name
        return EncoderMetadata(spec, method, volume, self.citations, self.licence, notes=told)


def has_primus(content: Mapping[str, Any]) -> bool:
    """Whether a file is nnssl's, or has a Primus where nnU-Net and nnssl keep a network."""
    weights = content.get(NETWORK)
    return PLAN in content or (isinstance(weights, Mapping) and any(_BLOCK.match(str(name)) for name in weights))


def find_foreign(content: Mapping[str, Any], options: ConvertOptions) -> tuple[ForeignEncoder, PrimusSource | None]:
    """The encoder in another program's file; what the file says of it, where it is a Primus. UserError: see
    `find_encoder`; or a plan is damaged or of another network, or nothing tells the order of tokens."""
    if PLAN in content:
        source = _of_nnssl(content, options)
        return source.found, source
    found = find_encoder(content, options)
    if found.format not in (PRIMUS, NNSSL):
        if options.token_order:
            told = f"--token-order {options.token_order}: a {found.format.name} file is no Primus"
            raise UserError(f"{told}; leave it out")
        return found, None
    check_stem(list(found.names))
    return found, _of_nnunet(content, found, options)


def _of_nnssl(content: Mapping[str, Any], options: ConvertOptions) -> PrimusSource:
    plan = read_plan(content)
    if options.format not in (None, NNSSL.name):
        raise UserError(f"--format {options.format}: a file with an {PLAN} is nnssl's; leave it out")
    if options.use_teacher:
        raise UserError("--use-teacher: nnssl's files have none; run the same command without it")
    arch, pretraining = plan["architecture_plans"]["arch_class_name"], plan["pretrain_plan"]
    configuration = next(iter(pretraining["configurations"].values()))
    found = _under_the_plans_key(content, plan.get("key_to_encoder"))
    check_stem(list(found.names))
    kwargs = checked_kwargs(plan, found) if arch == PRIMUS_X else {}
    crops = (plan.get("pretrain_patch_size"), kwargs.get("input_shape"), configuration.get("patch_size"))
    crop = _crop(next((tuple(crop) for crop in crops if crop), None), options.img_size, found)
    trainer = content.get(TRAINER)
    order, why = _order(arch, trainer, found) if options.token_order is None else (options.token_order, _SAID)
    forward = pretraining.get("transpose_forward") or [0, 1, 2]
    scheme, style = configuration["normalization_schemes"][0], configuration.get("spacing_style")
    known = scheme in _SCHEMES
    spacing, masked = configuration.get("spacing"), configuration.get("use_mask_for_norm")
    reader, recommended = pretraining.get("image_reader_writer"), plan.get("recommended_downstream_patchsize")
    notes = {
        f"pretrained by nnssl{f', {printable(trainer)},' if trainer else ''} on "
        f"{printable(pretraining['dataset_name'])}; network {arch}": True,
        f"the spacing of pretraining was every image's own ({printable(style)}): hiendmae plan takes the dataset's, by "
        "nnU-Net's rule; --spacing says otherwise": spacing is None,
        f"images were normalised by {printable(scheme)} whatever they were, CT too; hiendmae plan does the same": known,
        f"images were normalised by {printable(scheme)}, which plans of nnU-Net cannot do without more: hiendmae plan "
        "goes by the dataset; --window says otherwise": not known,
        "their normalisation looked at the foreground alone, that of hiendmae plan looks at all voxels": (
            any(masked) if isinstance(masked, list) else bool(masked)
        ),
        f"for fine-tuning its authors recommend crops of {recommended} voxels: --patch-size of hiendmae plan": (
            bool(recommended) and crop is not None and tuple(recommended) != crop
        ),
    }
    volume = VolumeFormat(
        spacing and tuple(spacing),
        image_reader_writer=reader,
        # of all channels alike, whatever they are called: see `VolumeFormat.scheme_of_all`
        normalization_schemes=(scheme,) if known else (),
        orientation=f"as {reader} reads it" if reader else UNKNOWN,
        # the functions have nnU-Net's names
        interpolation=interpolation_of(configuration),
    )
    back, volume = _transposed(forward, volume)
    return PrimusSource(
        found,
        order,
        why,
        kwargs.get("encoder_eva_numheads"),
        crop,
        planned=True,
        order=back,
        volume=volume,
        citations=citations_in(content) or _CITATIONS,
        licence=_NNFOUNDATION if arch == PRIMUS_X else _OPENMIND,
        notes=tuple(note for note, applies in notes.items() if applies),
    )


def _under_the_plans_key(content: Mapping[str, Any], key: str | None) -> ForeignEncoder:
    """The encoder under the plan's key, else under the one prefix of any block: released plans may lack the prefix."""
    weights = content.get(NETWORK)
    state = {k: v.detach() for k, v in weights.items() if is_weight(k, v)} if isinstance(weights, Mapping) else {}
    prefixes = {match[1] for match in map(_BLOCK.match, state) if match}
    wanted = (key or "").removesuffix("eva")
    if not prefixes:
        raise UserError(f"there is no Primus in its {NETWORK}, although its plan names one; download the file again")
    if key is None or wanted not in prefixes:
        if len(prefixes) > 1:
            told = " and ".join(repr(printable(prefix)) for prefix in sorted(prefixes))
            raise UserError(f"encoders with the prefixes {told}: which is meant? save that one alone")
        (wanted,) = prefixes
    names = {name.removeprefix(wanted): name for name in state if name.startswith(wanted)}
    outside = {name: name for name in state if not name.startswith(wanted)}
    if not wanted:
        others = tuple(prefix for prefix in prefixes if prefix)
        outside = {name: name for name in names if others and name.startswith(others)}
        names = {name: source for name, source in names.items() if name not in outside}
    return ForeignEncoder(NNSSL, (NETWORK,), wanted, names, outside, state)


def _crop(
    planned: tuple[int, ...] | None, said: tuple[int, ...] | None, found: ForeignEncoder
) -> tuple[int, ...] | None:
    """The plan's crop; that which was said where the plan's has not the positions of the file. UserError: neither
    has."""
    table, kernel = (found.names.get(name) for name in ("eva.pos_embed", "down_projection.proj.weight"))
    crop = planned or said
    if crop is None or table is None or kernel is None:
        return crop
    rows, patch = found.state[table].shape, found.state[kernel].shape[2:]
    if len(rows) != 3 or len(patch) != 3 or min(patch) == 0:
        return crop
    tokens = found.state[found.names["register_tokens"]] if "register_tokens" in found.names else None
    # rows of register tokens come first
    count = rows[1] - (tokens.shape[1] if tokens is not None and tokens.ndim == 3 else 0)
    for crop in filter(None, (planned, said)):
        sides = [divmod(size, p) for size, p in zip(crop, patch, strict=True)]
        if math.prod(whole for whole, _ in sides) == count and not any(rest for _, rest in sides):
            return crop
    raise UserError(
        f"the crop {crop} gives no grid of the {count} positions in the file with patches of {tuple(patch)} voxels; "
        "give the crop that it was pretrained on with --img-size D H W, or download it again"
    )


_SAID = "you said so"
_EVAMAE = "nnssl's class for it lays tokens out so in its default branch"


def _order(arch: str | None, trainer: Any, found: ForeignEncoder) -> tuple[str, str]:
    """Order of the tokens, and why. UserError: the file cannot tell."""
    program = trainer if isinstance(trainer, str) else ""
    if _is_nnunets(program):
        told = "networks of nnU-Net's trainers have it since dynamic-network-architectures 0.4.3 of June 2025"
        return WHD, f"{told}; of an older one say --token-order hwd"
    if arch == PRIMUS_X:
        return WHD, "PrimusX is nnFoundation's, whose branch of nnssl lays tokens out so"
    if arch is not None and "simmim" in program.lower():
        return WHD, f"{printable(program)} is a SimMIM, whose class lays tokens out so"
    if arch is not None and program:
        return HWD, f"{printable(program)} is no SimMIM and the network no PrimusX: {_EVAMAE}"
    if arch is not None and found.prefix.endswith("encoder."):
        return HWD, f"the prefix encoder. is that of VoCo, SimCLR and SwinUNETR: {_EVAMAE}"
    if arch is not None and any(name.startswith("decoder.") for name in found.names):
        return HWD, f"there is a decoder, which only a masked autoencoder has: {_EVAMAE}"
    raise UserError(
        "nothing in the file tells the order of its tokens: that of SimMIM and nnFoundation is whd, as nnU-Net's since "
        "June 2025, that of VolumeFusion, ModelsGenesis and other programs of nnssl is hwd, and the wrong one makes "
        "other features without a word; give --token-order hwd or --token-order whd"
    )


def _is_nnunets(trainer: str) -> bool:
    """Whether a trainer is nnU-Net's; those that start from nnssl's weights have names of their own."""
    return trainer.startswith(("nnUNet", "PretrainedTrainer"))


def _of_nnunet(content: Mapping[str, Any], found: ForeignEncoder, options: ConvertOptions) -> PrimusSource:
    """A Primus without a plan of nnssl's: of a checkpoint of nnU-Net, or bare."""
    trainer = content.get(TRAINER)
    order, why = _order(None, trainer, found) if options.token_order is None else (options.token_order, _SAID)
    plain = PrimusSource(found, order, why)
    if not isinstance(trainer, str) or not _is_nnunets(trainer):
        return plain
    notes = (f"the encoder of a network that {printable(trainer)} trained",)
    plain = replace(plain, method="supervised", citations=_CITATIONS[:1], notes=notes)
    arguments = content.get("init_args")
    if not isinstance(arguments, Mapping) or "plans" not in arguments:
        return plain
    plans, configuration, volume = plans_of(arguments)
    crop = _crop(tuple(configuration["patch_size"]), options.img_size, found)
    back, volume = _transposed(plans["transpose_forward"], volume)
    notes = (f"{notes[0]} on {printable(plans['dataset_name'])}",)
    return replace(plain, img_size=crop, planned=True, order=back, volume=volume, notes=notes)


def _transposed(forward: list[int], volume: VolumeFormat) -> tuple[tuple[int, ...] | None, VolumeFormat]:
    """From the axes that a program transposed volumes to, to those of the volumes: as `PrimusSource.order` says."""
    if sorted(forward) != [0, 1, 2]:
        raise UserError(f"its plan transposes the axes to {forward}, which is no order of 0, 1, 2")
    if list(forward) == [0, 1, 2]:
        return None, volume
    back = tuple(forward.index(i) for i in range(3))
    return back, replace(volume, spacing_mm=volume.spacing_mm and tuple(volume.spacing_mm[i] for i in back))
