"""Where a conversion may write: what it reads, and what is no Hugging Face folder, stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megavlm.checkpoint import journal, retention
from megavlm.checkpoint.errors import CheckpointError, HuggingFaceError
from megavlm.checkpoint.hf import export_hf
from megavlm.checkpoint.hf.importing import import_hf
from megavlm.checkpoint.hf.targets import check_apart
from megavlm.checkpoint.hf.texts import KEPT
from megavlm.testing.families import CASES
from megavlm.testing.families.case import make_hf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ and checkpoint/, which was made of it."""
    root = tmp_path_factory.mktemp("made")
    make_hf(next(case for case in CASES if case.name == "Llama 2, Vicuna"), root / "hf")
    import_hf(root / "hf", root / "checkpoint")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """hf/ and run/checkpoints/00000001-all/."""
    shutil.copytree(made / "hf", tmp_path / "hf")
    shutil.copytree(made / "checkpoint", tmp_path / "run" / "checkpoints" / "00000001-all")
    return tmp_path


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


CHECKPOINT = "run/checkpoints/00000001-all"
REFUSED = [
    (CHECKPOINT, CHECKPOINT),
    (CHECKPOINT, f"run/../{CHECKPOINT}"),
    (CHECKPOINT, "linked"),
    ("run", CHECKPOINT),
    ("run", "run"),
    (CHECKPOINT, "run"),
    (CHECKPOINT, "run/checkpoints"),
    (CHECKPOINT, f"{CHECKPOINT}/out"),
    ("run", f"{CHECKPOINT}/{KEPT}"),
]


@pytest.mark.parametrize(("source", "target"), REFUSED)
def test_an_export_never_replaces_what_it_reads(root: Path, source: str, target: str) -> None:
    (root / "linked").symlink_to(root / CHECKPOINT)
    before = contents(root)
    with pytest.raises(HuggingFaceError, match=str((root / target).resolve())):
        export_hf(root / source, root / target, overwrite=True)
    assert contents(root) == before


def test_a_run_that_began_with_a_folder_keeps_its_texts(root: Path) -> None:
    """<run>/from_hf looks like a Hugging Face folder, and holds what the export is made of."""
    (root / CHECKPOINT / KEPT).rename(root / "run" / KEPT)
    (root / "run" / "recipe.yaml").write_text("")
    with pytest.raises(HuggingFaceError, match="is what is converted"):
        check_apart(root / "run" / KEPT, [root / "run" / KEPT], around=[root / "run"])
    check_apart(root / "run" / "out", [root / "run" / KEPT], around=[root / "run"])


@pytest.mark.parametrize("target", ["hf", "hf/out", "hf/.."])
def test_an_import_never_writes_into_what_it_reads(root: Path, target: str) -> None:
    before = contents(root)
    with pytest.raises(HuggingFaceError, match="which is converted|is what is converted"):
        import_hf(root / "hf", root / target)
    assert contents(root) == before and not list(root.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["notes.txt", "state.json", "recipe.yaml", "checkpoints"])
def test_only_a_hugging_face_folder_is_overwritten(root: Path, name: str) -> None:
    target = root / "mine"
    if name != "notes.txt":
        shutil.copytree(root / "hf", target)
    target.mkdir(exist_ok=True)
    (target / name).write_text("precious")
    before = contents(target)
    with pytest.raises(HuggingFaceError, match="mine is no Hugging Face folder"):
        export_hf(root / CHECKPOINT, target, overwrite=True)
    (root / "file").write_text("precious")
    with pytest.raises(HuggingFaceError, match="file is a file"):
        export_hf(root / CHECKPOINT, root / "file", overwrite=True)
    assert contents(target) == before


def test_overwriting_leaves_a_neighbour_named_old_alone(root: Path) -> None:
    export_hf(root / CHECKPOINT, root / "out")
    expected = contents(root / "out")
    (root / "out.old").mkdir()
    (root / "out.old" / "mine").write_text("precious")
    (root / "out" / "stray").write_text("of the folder that is replaced")
    with pytest.raises(HuggingFaceError, match="not empty: give another folder, or allow overwriting it"):
        export_hf(root / CHECKPOINT, root / "out")
    assert export_hf(root / CHECKPOINT, root / "out", overwrite=True).folder == root / "out"
    assert contents(root / "out") == expected
    assert (root / "out.old" / "mine").read_text() == "precious"
    assert {p.name for p in root.iterdir()} == {"hf", "run", "out", "out.old"}


def test_what_came_to_be_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="came to be"):
        journal.publish(tmp_path / "a.tmp", tmp_path / "a")
    assert (tmp_path / "a.tmp").is_dir() and (tmp_path / "a" / "mine").is_file()


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_conversion_never_moves_latest(root: Path, kind: str) -> None:
    place = root / "run" / "checkpoints"
    (place / "latest").write_text('"00000001-all"')
    if kind == "import":
        import_hf(root / "hf", place / "imported")
    else:
        export_hf(root / CHECKPOINT, place / "exported")
    assert (place / "latest").read_text() == '"00000001-all"'


def test_pruning_deletes_leftovers_of_saves_only(root: Path) -> None:
    place = root / "run" / "checkpoints"
    for name in ("00000002-all.tmp", "00000001-all.0a1b2c3d.old", "00000001-all.old", "exported.tmp", "mine.old"):
        (place / name).mkdir()
    assert set(retention.prune(root / "run", retention.Rules(keep_last=1))) == {"00000002-all.tmp", "00000001-all.0a1b2c3d.old"}
    assert {p.name for p in place.iterdir()} == {"00000001-all", "00000001-all.old", "exported.tmp", "mine.old"}
