"""The programme of `same_results.py`: every command on tiny data, in the current folder, by the package on PYTHONPATH.

One process imports nnU-Net (8 s), and each command runs in a forked child of it, through its console entry point. What
a command prints is kept under logs/, JSON under told/.
"""

import json
import multiprocessing
import sys
from importlib.metadata import entry_points
from pathlib import Path

import lightning_fabric  # noqa: F401 (imported once, for all children)
import nnunetv2.experiment_planning.plan_and_preprocess_entrypoints
import nnunetv2.inference.predict_from_raw_data
import nnunetv2.run.run_training  # noqa: F401
import numpy as np
import SimpleITK as sitk
import torch

CT, PLAIN_CT, MR, RESULTS = "Dataset001_CT", "Dataset002_PlainCT", "Dataset003_MR", "Dataset004_Results"
CHANNELS = {CT: ("CT",), PLAIN_CT: ("CT",), MR: ("T1", "T2")}
CASES = 6
HERE = ("-device", "cpu")
CROP = ("--crop-size", 32, 32, 32)
SHORT = ("--epochs", 2, "--steps-per-epoch", 2, "--batch-size", 2, "--checkpoint-every", 1, "--workers", 0, *HERE)
QUICK = ("--epochs", 3, "--warmup-epochs", 1, "--iterations-per-epoch", 4, "--val-iterations-per-epoch", 1)
QUICK = (*QUICK, "--batch-size", 2, "--lr", 0.003, "--decoder-width", 4)
COMMANDS = ("env", "doctor", "methods", "presets", "inspect", "convert", "preprocess", "pretrain", "plan", "splits")
COMMANDS = (*COMMANDS, "compare", "classify train", "classify predict", "reconstruct", "attention", "demo")
DECODER = ("decoder_dim=12", "decoder_depth=1", "decoder_heads=2")
MIM = (*DECODER, "crops_level2=2", "crops_level3=2")
# run -> datasets and what it is told; hiendmae's options are those of the released code
PRETRAINING = {
    "hiendmae": (CT, PLAIN_CT, *CROP, "--accumulate", 2, "--warmup-epochs", 1),
    "hiendmae_mr": (MR, *CROP),
    "mim": (CT, PLAIN_CT, *CROP, "--set", *MIM, "curriculum=coarse_to_fine"),
    "mim_convvit": (CT, PLAIN_CT, "--encoder", "convvit_tiny", "--crop-size", 32, 32, 32, "--set", *MIM),
    "glmae": (CT, PLAIN_CT, *CROP, "--set", *DECODER, "local_views=2", "head_hidden=24", "head_dim=12", "augment=true"),
    "mae3d": (CT, *CROP, "--set", *DECODER, "normalize_target=false"),
}


def run(script: str, *arguments: object, told: str | None = None) -> str:
    """Output of a console script, which has to succeed; `told` names the file under told/ that keeps its JSON."""
    arguments = [str(a) for a in arguments]
    number = len(list(Path("logs").glob("*.out")))
    name = "_".join([f"{number:03d}", script, *(Path(a).name for a in arguments[:2])])
    log = Path("logs", f"{name}.out")
    process = multiprocessing.get_context("fork").Process(target=_child, args=(script, arguments, log))
    process.start()
    process.join()
    if process.exitcode:
        errors = log.with_suffix(".err").read_text(encoding="utf-8")
        sys.exit(f"{script} {' '.join(arguments)} ended with {process.exitcode}:\n{errors}")
    said = log.read_text(encoding="utf-8")
    if told:
        Path("told", f"{told}.json").write_text(said, encoding="utf-8")
    return said


def _child(script: str, arguments: list[str], log: Path) -> None:
    sys.stdout, sys.stderr = log.open("w", encoding="utf-8"), log.with_suffix(".err").open("w", encoding="utf-8")
    sys.argv = [script, *arguments]
    # nnU-Net asks for all cores again, and starts its pools by spawning: 8 s each
    torch.set_num_threads = lambda _: None
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda _=None: context("fork")
    # nnU-Net seeds nothing
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    (entry,) = entry_points(group="console_scripts", name=script)
    sys.exit(entry.load()())


# ---- data -----------------------------------------------------------------------------------------------------------


def write_dataset(name: str, labelled: bool, seed: int) -> None:
    """Ellipsoid bodies with an organ and, in every second case, a lesion; sizes, spacings and orientations differ."""
    rng = np.random.default_rng(seed)
    folder = Path("nnUNet_raw", name)
    for sub in ("imagesTr", "imagesTs", *(["labelsTr"] if labelled else [])):
        (folder / sub).mkdir(parents=True)
    for case in range(CASES):
        shape, spacing = rng.integers(26, 40, 3), rng.choice([1.25, 1.5, 2.0], 3)
        axes = np.meshgrid(*(np.linspace(-1, 1, s) for s in shape), indexing="ij")
        radius = np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, rng.uniform(-0.2, 0.2, 3), strict=True)))
        seg = ((radius < 0.6).astype(np.uint8) + (radius < 0.25)) if case % 2 else (radius < 0.6).astype(np.uint8)
        for channel, kind in enumerate(CHANNELS[name]):
            tissue = (radius < 0.9) + 0.1 * seg + 0.05 * rng.standard_normal(shape)
            image = (1000 * (tissue - 1) if kind == "CT" else 100 * (1 + channel) * tissue.clip(0)).astype(np.float32)
            for sub in ("imagesTr", *(["imagesTs"] if case == 0 else [])):
                write_image(image, folder / sub / f"case{case}_{channel:04d}.nii.gz", spacing, turned=case % 3 == 2)
        if labelled:
            write_image(seg, folder / "labelsTr" / f"case{case}.nii.gz", spacing, turned=case % 3 == 2)
    write_dataset_json(name, CHANNELS[name])


def write_image(array: np.ndarray, path: Path, spacing: np.ndarray, turned: bool) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1].tolist())
    image.SetOrigin((3.0, -20.0, 7.0))
    if turned:
        image.SetDirection((-0.8, 0.6, 0, -0.6, -0.8, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))


def write_dataset_json(name: str, channels: tuple[str, ...]) -> None:
    content = {
        "channel_names": {str(i): c for i, c in enumerate(channels)},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    Path("nnUNet_raw", name, "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def write_results() -> None:
    """Results as nnU-Net leaves them, of three runs; one lacks a fold, and some values are undefined."""
    rng = np.random.default_rng(4)
    folds = json.loads(Path("nnUNet_preprocessed", RESULTS, "splits_final.json").read_text(encoding="utf-8"))
    for plans in ("A", "B", "C"):
        model = Path("nnUNet_results", RESULTS, f"nnUNetTrainer__{plans}__3d_fullres")
        for number, fold in enumerate(folds[: 4 if plans == "C" else None]):
            rows = []
            for case in fold["val"]:
                dice = [None if d < 0.05 else d for d in rng.random(2)]
                metrics = {str(i + 1): {"Dice": float("nan") if d is None else d} for i, d in enumerate(dice)}
                rows.append({"prediction_file": f"somewhere/{case}.nii.gz", "metrics": metrics})
            path = model / f"fold_{number}" / "validation" / "summary.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"metric_per_case": rows}), encoding="utf-8")
        (model / "dataset.json").write_bytes(Path("nnUNet_raw", RESULTS, "dataset.json").read_bytes())


# ---- the commands, in order -----------------------------------------------------------------------------------------


def convert(checkpoints: Path) -> None:
    """Every recorded checkpoint of the tests; heads are in the record beside it."""
    for checkpoint in sorted(checkpoints.glob("*.pth")):
        config = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))["config"]
        hints = ("--num-heads", config.get("encoder", config)["heads"])
        name = f"convert/{checkpoint.stem}"
        run("hiendmae", "convert", checkpoint, "-o", f"{name}.safetensors", *hints, "--json", told=checkpoint.stem)
        run("hiendmae", "inspect", checkpoint, *hints, "--json", told=f"{checkpoint.stem}_inspect")
        if "mim" not in name:
            for to in ("timm", "monai"):
                run("hiendmae", "convert", f"{name}.safetensors", "-o", f"{name}_{to}.safetensors", "--to", to)


def preprocess() -> None:
    hiendmae = ("hiendmae", "preprocess", "-np", 1, "-d")
    run(*hiendmae, CT, PLAIN_CT, "--spacing", 2, 2, 1.5)
    run(*hiendmae, MR)
    # without a spacing of its own, with another reader and the published window
    run(*hiendmae, CT, "-p", "LikeMiM", "--like", "convert/mim_pretrain.safetensors")
    run(*hiendmae, PLAIN_CT, "-p", "LikeMethod", "--like", "glmae", "--window", -200, 300)


def pretrain() -> None:
    for name, told in PRETRAINING.items():
        datasets = [d for d in told if d in CHANNELS]
        encoder = () if "--encoder" in told else ("--encoder", "vit_nano_p8")
        options = (*encoder, *told[len(datasets) :], *SHORT, "--pictures-every", 2)
        run("hiendmae", "pretrain", "-d", *datasets, "--method", name.split("_")[0], *options, "-o", f"runs/{name}")
        run("hiendmae", "inspect", f"runs/{name}", "--json", told=f"{name}_run")
        run("hiendmae", "inspect", f"runs/{name}/encoder.safetensors", "--json", told=f"{name}_encoder")
    teacher = ("runs/glmae/checkpoint_latest.pth", "-o", "convert/teacher.safetensors", "--use-teacher")
    run("hiendmae", "convert", *teacher, "--json", told="teacher")
    run("hiendmae", "convert", "runs/mae3d/encoder.safetensors", "-o", "convert/to_timm.safetensors", "--to", "timm")


def plan_and_finetune() -> None:
    run("hiendmae", "splits", "-d", CT, "--shots", 1, 2, "--json", told="splits_ct")
    vit, hybrid = "runs/hiendmae/encoder.safetensors", "runs/mim_convvit/encoder.safetensors"
    plan = ("hiendmae", "plan", "-d", CT, "-np", 1, "-w")
    run(*plan, "convert/glmae_encoder.safetensors")
    run(
        *plan,
        "convert/mae3d_pretrain.safetensors",
        "--patch-size",
        64,
        48,
        48,
        "--layer-decay",
        0.75,
        "--name",
        "Decay",
    )
    run(*plan, vit, *QUICK)
    run(*plan, vit, *QUICK, "--from-scratch")
    run(*plan, vit, *QUICK, "--freeze-encoder")
    run(*plan, hybrid, *QUICK, "--patch-size", 32, 32, 64, "--reader", "auto", "--spacing", 1.5, 1.5, 1.5)
    for plans, trainer in (
        ("nnUNetPlans_HiEndMAE", "nnUNetTrainer_HiEndMAE"),
        ("nnUNetPlans_MiM", "nnUNetTrainer_MiM"),
    ):
        run("nnUNetv2_preprocess", "-d", 1, "-plans_name", plans, "-c", "3d_fullres", "-np", 1)
        model = ("-p", plans, "-tr", trainer, *HERE)
        run("nnUNetv2_train", 1, "3d_fullres", 0, *model)
        predict = ("-i", f"nnUNet_raw/{CT}/imagesTs", "-o", f"predictions/{plans}", "-npp", 0, "-nps", 0)
        more = ("--disable_tta", "--save_probabilities")
        run("nnUNetv2_predict", "-d", 1, "-c", "3d_fullres", "-f", 0, *predict, *model, *more)


def compare() -> None:
    images = Path("nnUNet_raw", RESULTS, "imagesTr")
    images.mkdir(parents=True)
    for case in range(10):
        write_image(np.full((2, 2, 2), case, np.float32), images / f"case{case}_0000.nii.gz", np.ones(3), turned=False)
    write_dataset_json(RESULTS, ("CT",))
    splits = ("hiendmae", "splits", "-d", RESULTS, "--json")
    run(*splits, "--shots", 1, 3, 5, told="splits_shots")
    run(*splits, "--fraction", 0.25, "--of-fold", 1, "--seed", 2, told="splits_fraction")
    run(*splits, "--remove", 8, told="splits_removed")
    run(*splits, "--list", told="splits_list")
    write_results()
    run("hiendmae", "compare", "-d", RESULTS, "-o", "compare/all", "--json", told="compare_all")
    some = ("--baseline", "A", "--folds", 0, 1, 2, 3, "--runs", "B", "C", "--seed", 5)
    run("hiendmae", "compare", "-d", RESULTS, *some, "-o", "compare/some", "--json", told="compare_some")
    run("hiendmae", "compare", "-d", CT, "-o", "compare/trained", "--json", told="compare_trained")


def classify() -> None:
    cases = [f"{dataset}/case{case}" for dataset in (CT, PLAIN_CT) for case in range(CASES)]
    rows = [f"{case},{('healthy', 'ill')[int(case[-1]) % 2]}\n" for case in cases]
    Path("labels.csv").write_text("case,label\n" + "".join(rows), encoding="utf-8")
    both, labels = ("-d", CT, PLAIN_CT, "--workers", 0, *HERE), ("--labels", "labels.csv")
    train = ("hiendmae", "classify", "train", *both, *labels, "--epochs", 2, "--batch-size", 4)
    run(*train, "-w", "runs/hiendmae/encoder.safetensors", "-o", "classify/resized")
    crops = ("--input", "crops", "--crops", 2, "--fraction", 0.5, "--freeze-encoder", "-f", 1)
    run(*train, "-w", "runs/mim_convvit/encoder.safetensors", "-o", "classify/crops", *crops)
    predict = ("hiendmae", "classify", "predict", *both, "-m", "classify/resized")
    run(*predict, "--model", "last", *labels, "-o", "classify/predicted.csv")


def look() -> None:
    """Pictures of what was learnt, and the lists."""
    image = ("--image", f"nnUNet_raw/{CT}/imagesTr/case2_0000.nii.gz")
    for name in ("hiendmae", "mim", "glmae"):
        run("hiendmae", "reconstruct", f"runs/{name}", "-o", f"reconstruct/{name}", "--cases", 2, *HERE)
    heads = ("--heads", "mean", 1, "--layers", 0, 5)
    run("hiendmae", "attention", "runs/hiendmae", *image, "--cross", "--voxel", 14, 12, 15, "-o", "attention/cross")
    weights = ("-w", "runs/glmae/encoder.safetensors")
    run("hiendmae", "attention", *weights, *image, "--voxel", 14, 12, 15, *heads, "-o", "attention/voxel")
    run("hiendmae", "attention", *weights, *image, "--voxel", 9, 9, 9, "--cls", "-o", "attention/cls")
    for name in ("methods", "presets"):
        run("hiendmae", name, "--json", told=name)
    for command in COMMANDS:
        run("hiendmae", *command.split(), "--help")


def main(checkpoints: Path) -> None:
    for folder in ("logs", "told", "nnUNet_preprocessed", "nnUNet_results", "convert"):
        Path(folder).mkdir()
    for seed, (name, labelled) in enumerate({CT: True, PLAIN_CT: False, MR: False}.items()):
        write_dataset(name, labelled, seed)
    convert(checkpoints)
    preprocess()
    pretrain()
    plan_and_finetune()
    compare()
    classify()
    look()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
