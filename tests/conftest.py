"""Type checks at every annotated call, a small made cohort, and the private data beside the checkout where present."""

import signal
from pathlib import Path

import cv2
import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401 - the hook finds it by name

install_import_hook("stas_core", "tests.typechecker.checked")

from stas_core import config  # noqa: E402 - after the hook
from stas_core.data import cohort, images  # noqa: E402
from stas_core.data.annotations import AnnotationConfig  # noqa: E402
from stas_core.data.cohort import CohortRow, SplitConfig  # noqa: E402
from stas_core.data.phantom import PhantomConfig, make_phantom, phantom_id  # noqa: E402
from stas_core.train.recipe import FoldRecipe  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a shell in the background hands to all it starts: the
    signal.signal(signal.SIGINT, signal.default_int_handler)  # stages that tests press Ctrl-C on would never hear it

# The same examples in every run, and no deadline: a busy machine must not fail a test. `--hypothesis-profile=search`
# looks for others.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 8
TINY_MODEL = {
    "encoder": "mobilenetv3_small_050",
    "encoder_weights": "none",
    "decoder_channels": [16, 16, 8, 8, 8],
    "activation": "relu",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write the files of tests/golden anew")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say what stays in one process under `-n`: the tests that share a Ray, else those of a file."""
    shares_ray = "ray_nodes" in getattr(item, "fixturenames", ())
    item.add_marker(pytest.mark.xdist_group("ray" if shares_ray else item.path.stem))


def pytest_configure() -> None:
    """Leave other cores to other test processes: `make test` starts one for each."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real images and oracle pairs, or skip."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"real data folder {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images/ and annotations/ of eight 96x128 phantom fields."""
    folder = tmp_path_factory.mktemp("phantom")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    phantom = PhantomConfig(num_images=NUM_IMAGES, height=96, width=128, seed=3)
    for index in range(NUM_IMAGES):
        made, name = make_phantom(phantom, index), phantom_id(index)
        (folder / "images" / f"{name}.jpg").write_bytes(images.encode_jpeg(made.image))
        (folder / "annotations" / f"{name}.json").write_bytes(made.labelme)
    return folder


@pytest.fixture(scope="session")
def cohort_uri(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the cohort table of the phantom fields: two folds, no hold-out, made in plain Python."""
    out = tmp_path_factory.mktemp("cohort")
    (out / "masks").mkdir()
    rows = []
    for image in sorted((phantom_folder / "images").iterdir()):
        annotation = phantom_folder / "annotations" / f"{image.stem}.json"
        measured = cohort.measure(image.read_bytes(), annotation.read_bytes(), image.stem, config=AnnotationConfig())
        (out / "masks" / f"{image.stem}.png").write_bytes(images.encode_mask(measured.mask))
        uris = {"image_uri": str(image), "annotation_uri": str(annotation), "mask_uri": f"masks/{image.stem}.png"}
        rows.append({"id": image.stem, "group": image.stem, "split": cohort.TRAIN, **uris, **measured.values})
    split = SplitConfig(num_folds=2, hold_out_fraction=0)
    folds = cohort.draw_split([row["stratum"] for row in rows], None, split).folds
    cohort.write_cohort(str(out / "cohort.parquet"), [row | {"fold": f} for row, f in zip(rows, folds, strict=True)])
    return str(out / "cohort.parquet")


@pytest.fixture(scope="session")
def cohort_rows(cohort_uri: str) -> list[CohortRow]:
    """Return the rows of the small cohort."""
    return cohort.read_cohort(cohort_uri)


@pytest.fixture(scope="session")
def tiny_recipe() -> FoldRecipe:
    """Return a recipe that trains in a second: three epochs of two steps on 64 px crops."""
    return config.build(
        FoldRecipe,
        {
            "data": {"crop_px": 64},
            "model": TINY_MODEL,
            "optim": {"batch_size": 2, "micro_batch_size": 2},
            "schedule": {"warmup_epochs": 1},
            "training": {"epochs": 3, "top_k": 2},
            "inference": {"flips": ["identity", "lr"]},
        },
    )
