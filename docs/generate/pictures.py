"""Make the pictures of the documentation from a run of the demo: phantoms, and nothing else.

make demo
python -m docs.generate.pictures runs/demo
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image

from stas_core.arrays import RgbImage
from stas_core.data import images

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
FIELD = "phantom_0035"
"""A field of the demo's hold-out."""
GAP_PX = 12


def make_pictures(demo: Path) -> None:
    """Write all pictures."""
    _save("field_map_mask", _beside(*_field_map_mask(demo)), 1500)
    _save("cohort", _opened(demo / "cohort/figures/contact_sheet.png").crop((0, 862, 2010, 1660)), 1200)
    _save("curves", _opened(demo / "folds/figures/folds.png"), 1100)
    _save("out_of_fold", _opened(demo / "folds/figures/oof_examples.png"), 1200)
    _save("gallery", _opened(demo / "slides/galleries/phantom_slide_0000.png").crop((0, 60, 2194, 480)), 1200)
    _save("report", _photograph(demo, "scores/report.html"), 1300)


def _field_map_mask(demo: Path) -> list[RgbImage]:
    """Return a field, its map in colours, and its mask on it."""
    (source,) = demo.glob(f"cohort/phantom/*/images/{FIELD}.jpg")
    field = images.decode_image(source.read_bytes(), FIELD)
    plane = np.asarray(Image.open(demo / "scores/maps" / f"{FIELD}.png"))
    mask = np.asarray(Image.open(demo / "scores/masks" / f"{FIELD}.png"))
    colours = (matplotlib.colormaps["viridis"](plane)[..., :3] * 255).astype(np.uint8)
    outlined = np.array(field)
    rings = cv2.findContours(np.asarray(mask > 0, np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    for rgb, width_px in (((0, 0, 0), 7), ((255, 225, 25), 3)):
        cv2.drawContours(outlined, rings, -1, rgb, width_px)
    return [field, colours, outlined]


def _beside(*panels: RgbImage) -> Image.Image:
    gap = np.full((panels[0].shape[0], GAP_PX, 3), 255, np.uint8)
    parts = [part for panel in panels for part in (panel, gap)]
    return Image.fromarray(np.concatenate(parts[:-1], axis=1))


def _photograph(demo: Path, page: str) -> Image.Image:
    """Return what a browser shows of a page, under the paths that a user would have."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        copy = Path(folder, "report.html")
        text = (demo / page).read_text()
        written = text.partition('<span class="where">')[2].partition("</span>")[0].removesuffix("/scores")
        copy.write_text(text.replace(written, "/data/runs/demo"))
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1300, "height": 1130})
        opened.goto(copy.as_uri())
        opened.wait_for_timeout(500)  # until the first image is drawn
        path = Path(folder, "shot.png")
        opened.screenshot(path=path)
        browser.close()
        return _opened(path)


def _opened(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGB")
    image.load()
    return image


def _save(name: str, image: Image.Image, width_px: int) -> None:
    if image.width > width_px:
        image = image.resize((width_px, round(image.height * width_px / image.width)), Image.Resampling.LANCZOS)
    PICTURES.mkdir(exist_ok=True)
    image.save(PICTURES / f"{name}.webp", quality=72, method=6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder of `make demo`")
    make_pictures(parser.parse_args().demo)
