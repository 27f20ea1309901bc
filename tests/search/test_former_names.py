"""Files that call the cascade's steps `stages`, as they did before, are still read."""

from pathlib import Path

import pytest

from stas_core import config
from stas_core.config import Config
from stas_core.errors import ConfigError
from stas_core.predict.postprocess import PostprocessChoice, PostprocessConfig
from stas_core.search import space
from stas_core.search.space import Dimension

STEP = {"drop": 100, "high": 130, "core": 120, "ratio": 0.1, "low": 110}
DEFAULT = PostprocessConfig.model_validate({"steps": [STEP | {"drop": 1}], "closing_px": 3})


class Settings(Config):
    postprocess: PostprocessChoice = DEFAULT


def test_a_tuned_cascade_is_read_and_written_under_its_new_name(tmp_path: Path) -> None:
    path = tmp_path / "postprocess.tuned.yaml"
    path.write_text(config.dump(PostprocessConfig.model_validate({"steps": [STEP]})).replace("steps:", "stages:"))
    read = config.load_config(Settings, None, [f"postprocess={path}"]).postprocess
    assert read.steps[0].model_dump() == STEP
    assert "steps:" in config.dump(read) and "stages" not in config.dump(read)


def test_the_former_name_replaces_a_default_as_the_new_one_does() -> None:
    former, new = (config.build(Settings, {"postprocess": {name: [STEP]}}) for name in ("stages", "steps"))
    assert former == new and former.postprocess.closing_px == 3


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="stages is the former name of steps, and both are given; keep steps"):
        config.build(PostprocessConfig, {"stages": [STEP], "steps": [STEP]})


def test_a_space_may_use_the_former_name() -> None:
    wanted = Dimension(low=5, high=60)
    assert space.check_space({"stages.0.drop": wanted}, PostprocessConfig()) == {"steps.0.drop": wanted}
    with pytest.raises(ConfigError, match=r"space has steps\.0\.drop under its former name, too"):
        space.check_space({"stages.0.drop": wanted, "steps.0.drop": wanted}, PostprocessConfig())
