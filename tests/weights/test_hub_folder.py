"""`hiendmae convert --to hub-folder`: what is uploaded is whole, says what a reader must know, and names no patient."""

import json
import re
from dataclasses import replace

import pytest
from command_line import run
from foreign_files import VIT, random_state, write_checkpoint
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from run_data import PLANS, tiny_settings, write_labelled, write_preprocessed

from nnunetv2_hiendmae.architectures import EncoderSpec
from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.files import ENCODER, LOG, PROBE_ENCODER, sha256
from nnunetv2_hiendmae.pretraining.loop import run_pretraining
from nnunetv2_hiendmae.pretraining.settings import ProbeCases
from nnunetv2_hiendmae.training.volumes import find_cases
from nnunetv2_hiendmae.volume_format import VolumeFormat
from nnunetv2_hiendmae.weights import EncoderMetadata, check_encoder_file, convert_checkpoint, save_encoder
from nnunetv2_hiendmae.weights.hub_folder import published

SEEN = VolumeFormat((1.5, 1.25, 1.0), (-175.0, 250.0), "SimpleITKIO", normalization_schemes=("CTNormalization",))
PROBE = {
    "dataset": "Dataset200_Organs",
    "fold": 0,
    "train": ["smith_01"],
    "test": ["jones_02", "doe_03"],
    "dice": 0.625,
}
TRAINING = {"step": 4, "cases": 12, "datasets": ["Dataset100_CT"], "options": {"mask_ratio": 0.75}, "probe": PROBE}
METADATA = EncoderMetadata(
    VIT,
    "mae3d",
    SEEN,
    ("@article{a,\n  title={T}}", "see https://doi.org/10.1/x/y"),
    licence="CC-BY-4.0",
    source="/data/Jane Doe/start.pth",
    training={**TRAINING, "start": {"file": "C:\\me\\e.safetensors", "source": "hf://lab/x@0/e", "sha256": "5" * 64}},
    notes=("weights of /data/jane/run/x.pth, file:///data/jane/x.pth and/or 1/4 of https://host/a/b",),
)


@pytest.fixture
def run_dir(tmp_path):
    """A run's encoder file with its log: two epochs of two steps, and a step that came after the file was written."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_encoder(folder / "encoder.safetensors", random_state(VIT), METADATA)
    lines = [{"step": s, "epoch": s // 2, "loss": loss, "lr": 1e-3} for s, loss in enumerate((9, 8, 1, 2, 70))]
    lines[3]["probe_dice"] = 0.375
    log = "\n".join(map(json.dumps, [{"step": -1, "epoch": 0, "probe_dice": 0.125}, *lines]))
    (folder / "log.jsonl").write_text(f'{log}\n{{"step": {{}}}}\n{{"step": 5, "epo')
    return folder


def rows_of(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+) \| (.+) \|$", card, re.MULTILINE))


def export(run_dir, output, **options):
    return convert_checkpoint(run_dir / "encoder.safetensors", output, to="hub-folder", **options)


def test_the_folder_is_ready_to_upload(run_dir, tmp_path, capsys):
    out = tmp_path / "my hub"
    code, told, _ = run(capsys, "convert", run_dir / "encoder.safetensors", "--to", "hub-folder", "-o", out)
    assert code == 0 and f"next: hf upload ORG/REPO '{out}'" in told and "README.md before" in told
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "encoder.safetensors"]
    # the Hub's own readers
    card = ModelCard.load(out / "README.md")
    assert metadata_load(out / "README.md") == card.data.to_dict()
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "nnunetv2_hiendmae"
    assert card.data.pipeline_tag == "image-feature-extraction" and {"mae3d", "vit"} <= set(card.data.tags)
    text = card.text
    rows = rows_of(text)
    assert rows["spacing (D H W)"] == "1.5 × 1.25 × 1 mm" and rows["window"] == "-175 to 250 HU"
    assert rows["datasets"] == r"Dataset100\_CT" and rows["cases"] == "12" and rows["options"] == r"mask\_ratio 0.75"
    assert rows[r"embed\_dim"] == "12"
    assert rows["parameters"] == str(sum(t.numel() for t in random_state(VIT).values()))
    # of steps 2 and 3, the last epoch that the file has seen
    assert rows["loss"] == "1.5" and rows["dice"] == "0.625" and rows["test"] == "2"
    assert "@article{a,\n  title={T}}" in text and "https://doi.org/10.1/x/y" in text
    assert sha256(out / "encoder.safetensors") in text
    config = json.loads((out / "config.json").read_text())
    assert config["library_name"] == "nnunetv2_hiendmae" and EncoderSpec.from_dict(config["spec"]) == VIT
    assert {p.stat().st_mode & 0o444 for p in out.iterdir()} == {0o444}


def test_no_names_of_cases_and_no_paths(run_dir, tmp_path):
    out = tmp_path / "out"
    export(run_dir, out)
    metadata = check_encoder_file(out / "encoder.safetensors")
    assert metadata.source == "start.pth"
    assert metadata.training["start"]["file"] == "e.safetensors"
    assert metadata.training["start"]["source"] == "hf://lab/x@0/e"
    assert metadata.notes == ("weights of x.pth, x.pth and/or 1/4 of https://host/a/b",)
    assert metadata.citations == METADATA.citations
    for file in out.iterdir():
        content = file.read_bytes()
        assert not [name for name in (b"smith", b"jones", b"Jane", b"jane", b"me\\", b"/data/") if name in content], (
            file
        )


def test_what_names_nothing_stays_the_same_file(run_dir, tmp_path):
    plain = replace(METADATA, source=None, training={"step": 4}, notes=(), version="0.1.0")
    assert published(plain) == plain
    save_encoder(run_dir / "encoder.safetensors", random_state(VIT), plain)
    export(run_dir, tmp_path / "out")
    made = tmp_path / "out" / "encoder.safetensors"
    assert made.read_bytes() == (run_dir / "encoder.safetensors").read_bytes()


def test_a_probe_of_the_log_is_told(run_dir, tmp_path):
    save_encoder(run_dir / "encoder.safetensors", random_state(VIT), replace(METADATA, training={"step": 4}))
    export(run_dir, tmp_path / "out")
    assert r"| probe\_dice | 0.375 |" in (tmp_path / "out" / "README.md").read_text()


def test_of_a_real_run_with_a_probe(nnunet, tmp_path):
    """What pretraining writes is what is read here: both encoders, and no case of the probe is named."""
    write_preprocessed(nnunet.preprocessed, {"miller": (20, 20, 20)})
    chosen = ProbeCases("Dataset002_Labelled", 0, ("smith",), ("jones",))
    shapes = dict.fromkeys((*chosen.train, *chosen.test), (20, 20, 20))
    write_labelled(nnunet.preprocessed, shapes, [{"train": [*chosen.train], "val": [*chosen.test]}])
    short = {"epochs": 1, "steps_per_epoch": 1, "batch_size": 1, "warmup_epochs": 0, "probe_epochs": 1}
    settings = tiny_settings("mae3d", probe=chosen, **short)
    run_pretraining(settings, find_cases(settings.datasets, PLANS, settings.configuration), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    for name, dice in ((ENCODER, "probe\\_dice"), (PROBE_ENCODER, "dice")):
        out = tmp_path / f"hub_{name}"
        convert_checkpoint(tmp_path / "run" / name, out, to="hub-folder")
        rows = rows_of((out / "README.md").read_text())
        assert float(rows[dice]) == pytest.approx(log[-1]["probe_dice"], abs=1e-6)
        assert float(rows["loss"]) == pytest.approx(log[-1]["loss"], rel=1e-5)
        content = b"".join(file.read_bytes() for file in out.iterdir())
        assert not [case for case in (b"miller", b"smith", b"jones") if case in content]


def test_a_foreign_checkpoint_without_a_run(tmp_path, capsys):
    source, out = write_checkpoint(tmp_path / "c.pth", "mim"), tmp_path / "out"
    assert run(capsys, "convert", source, "--num-heads", 2, "--to", "hub-folder", "-o", out)[0] == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "other" and card.data.license_name
    assert "none stated" in card.text and "## Losses" not in card.text and "## Probe" not in card.text
    assert sha256(source) in card.text


def test_what_came_from_the_hub_names_its_model(run_dir, tmp_path):
    named = replace(METADATA, source=f"hf://lab/vit@{'a' * 40}/x.pth")
    save_encoder(run_dir / "encoder.safetensors", random_state(VIT), named)
    export(run_dir, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "lab/vit" and named.source in card.text


def test_hostile_texts_stay_texts(run_dir, tmp_path):
    hostile = replace(
        METADATA,
        method="x\n---\nlicense: mit <script>",
        licence="free\n\n# Heading <script>",
        notes=("<script>", "![](https://host/seen.png)"),
        training={"<script>|": "a | b\n\n# Heading"},
        citations=("@a{b}\n````\n# Heading",),
    )
    save_encoder(run_dir / "encoder.safetensors", random_state(VIT), hostile)
    export(run_dir, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other" and hostile.method in card.data.tags
    assert "\n# Heading" not in card.text.split("## Citation")[0] and "<script>" not in card.text.replace(r"\<", "")
    assert r"!\[\](https" in card.text
    assert card.text.split("## Citation")[1].count("````") == 2


def test_what_is_there_is_kept(run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    export(run_dir, out)
    (out / "README.md").write_text("mine")
    (out / ".gitattributes").write_text("kept")
    command = ("convert", run_dir / "encoder.safetensors", "--to", "hub-folder", "-o")
    code, _, err = run(capsys, *command, out)
    assert code == 2 and "--force" in err and (out / "README.md").read_text() == "mine"
    assert run(capsys, *command, out, "--force")[0] == 0
    assert "## Encoder" in (out / "README.md").read_text() and (out / ".gitattributes").read_text() == "kept"
    # a run's folder would be uploaded with its log
    code, _, err = run(capsys, *command, run_dir, "--force")
    assert code == 2 and "log.jsonl" in err and not (run_dir / "README.md").exists()
    (tmp_path / "file").touch()
    code, _, err = run(capsys, *command, tmp_path / "file", "--force")
    assert code == 2 and "is a file" in err
    assert {p.name for p in tmp_path.iterdir()} == {"run", "out", "file"}


def test_a_folder_appears_whole(run_dir, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no card")

    monkeypatch.setattr("nnunetv2_hiendmae.weights.hub_folder.model_card", fail)
    with pytest.raises(UserError, match="no card"):
        export(run_dir, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
