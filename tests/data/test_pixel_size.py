import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from stas_core import config, verdicts
from stas_core.data.images import read_mpp
from stas_core.data.reference import common_mpp
from stas_core.errors import CheckpointError, ConfigError
from stas_core.predict.ensemble import check_mpp
from stas_core.verdicts import LOOK, VerdictConfig
from tests.ground.test_verdicts import made_row
from tests.workflows.made import make_ensemble
from workflows.folds import training
from workflows.folds.training import TrainFoldsConfig


def encoded(kind: str, **values: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, kind, **values)
    return file.getvalue()


def ome(text: str) -> bytes:
    tags = ImageFileDirectory_v2()
    tags[270] = text
    return encoded("TIFF", tiffinfo=tags)


@pytest.mark.parametrize(
    ("data", "mpp"),
    [
        (encoded("TIFF", dpi=(50_800, 50_800)), 0.5),
        (encoded("PNG", dpi=(101_600, 101_600)), 0.25),
        (encoded("JPEG", dpi=(72, 72)), None),  # of a screen
        (encoded("TIFF", dpi=(300, 300)), None),
        (encoded("TIFF", dpi=(50_800, 20_000)), None),  # not square
        (encoded("PNG"), None),
        (ome('<Pixels PhysicalSizeX="0.25" PhysicalSizeXUnit="µm"/>'), 0.25),
        (ome('<Pixels PhysicalSizeX="0.25"/>'), 0.25),
        (ome('<Pixels PhysicalSizeX="0.25" PhysicalSizeXUnit="mm"/>'), None),
    ],
)
def test_a_pixel_size_is_read_where_a_microscope_wrote_it(data: bytes, mpp: float | None) -> None:
    assert read_mpp(data, "a") == (None if mpp is None else pytest.approx(mpp, rel=1e-3))


def test_a_cohort_of_one_pixel_size_states_it() -> None:
    same = [made_row(number, 0.1, mpp=0.5 + 0.001 * number, mpp_source="file") for number in range(3)]
    assert common_mpp(same) == 0.501 and verdicts.of_cohort(same, 0, VerdictConfig()).level == "ok"
    assert common_mpp([*same, made_row(3, 0.1)]) is None and common_mpp([]) is None
    mixed = [*same, made_row(3, 0.1, mpp=0.25, mpp_source="file")]
    assert common_mpp(mixed) is None
    (reason,) = verdicts.of_cohort(mixed, 0, VerdictConfig()).reasons
    assert reason.level == LOOK and "0.25 to 0.502 um per pixel" in reason.figure


def test_a_training_does_not_contradict_its_cohort() -> None:
    rows = [made_row(number, 0.1, mpp=0.25, mpp_source="file") for number in range(3)]
    unknown = [made_row(0, 0.1)]
    for given, cohort, found in ((None, rows, 0.25), (0.26, rows, 0.26), (0.5, unknown, 0.5), (None, unknown, None)):
        assert training._mpp(config.build(TrainFoldsConfig, {"data": {"mpp": given}}), cohort) == found
    with pytest.raises(ConfigError, match=r"data\.mpp = 0\.5, and the images of the cohort have 0\.25 um per pixel"):
        training._mpp(config.build(TrainFoldsConfig, {"data": {"mpp": 0.5}}), rows)


def test_images_of_another_scale_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = f"{make_ensemble(tmp_path)}/fold_0/checkpoints/last"
    (unknown,) = check_mpp([member], 0.5)
    assert unknown.endswith("no checkpoint states what its models were trained at")
    record = Path(member) / "checkpoint.json"
    record.write_text(record.read_text().replace('"mpp": null', '"mpp": 0.5'))
    assert check_mpp([member], 0.52) == ()
    assert check_mpp([member], None)[0].endswith("data.mpp is not given")
    with pytest.raises(ConfigError, match=r"data\.mpp = 0\.25: the models were trained at 0\.5 um.*score_slides"):
        check_mpp([member], 0.25)
    other = f"{make_ensemble(tmp_path / 'other')}/fold_0/checkpoints/last"
    Path(other, "checkpoint.json").write_text(record.read_text().replace('"mpp": 0.5', '"mpp": 0.25'))
    with pytest.raises(CheckpointError, match="one resolution"):
        check_mpp([member, other], None)
