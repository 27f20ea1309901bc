"""Image and mask of a cohort's row, as prepare_data measured them."""

from stas_core import storage
from stas_core.arrays import Mask, RgbImage
from stas_core.data import images
from stas_core.data.cohort import CohortRow, require_mask
from stas_core.errors import ChangedInput, SizeMismatch


def load_image(row: CohortRow, scale: float) -> RgbImage:
    """Read a row's image at a scale.

    Raises:
        InputError: it cannot be read, or is not the image that prepare_data measured.
    """
    data = storage.read_bytes(row.image_uri)
    image = images.decode_image(data, row.image_uri)
    if image.shape[:2] != (row.height, row.width):
        raise SizeMismatch(
            f"{row.image_uri} is now {image.shape[1]}x{image.shape[0]} px, the cohort says {row.width}x{row.height}; "
            "run prepare_data again"
        )
    if storage.fingerprint(data) != row.image_fingerprint:
        raise ChangedInput(
            f"{row.id}: {row.image_uri} has changed since its mask was made from its annotation; run prepare_data again"
        )
    return images.resize(image, scale)


def load_mask(row: CohortRow) -> Mask:
    """Read a row's mask at native size.

    Raises:
        InputError: it cannot be read, or is not the mask that prepare_data made.
    """
    mask = images.decode_mask(storage.read_bytes(row.mask_uri), row.mask_uri)
    require_mask(mask, row.mask_fingerprint, row.mask_uri)
    return mask
