"""Annotations of every format become the same mask, and come back from the files that are written of it."""

import gzip
import io
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as pycoco

from stas_core import config
from stas_core.data import coco, images, truth
from stas_core.data.annotations import AnnotationConfig, describe
from stas_core.data.asap import to_asap
from stas_core.data.edges import bridged, outlines
from stas_core.data.geojson import to_geojson
from stas_core.data.labelme import to_labelme
from stas_core.errors import InputError, OversizedAnnotation, UnclearMask, UnreadableAnnotation
from stas_core.predict.annotation_files import EXPORTED, write_annotation
from tests.conftest import ROOT

CONFIG = AnnotationConfig()
MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=14))
SQUARE = [[10, 5], [30, 5], [30, 20], [10, 20], [10, 5]]
HOLE = [[12, 8], [20, 8], [20, 15], [12, 15], [12, 8]]
SIZE = (40, 60)


def read(data: bytes, size: tuple[int, int] = SIZE, image_id: str = "0007", **values: Any) -> np.ndarray:
    settled = config.build(AnnotationConfig, values)
    return truth.read_annotation(data, f"{image_id}.x", size, settled, image_id)[0]


def square(*holes: Any) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[5:20, 10:30] = True
    if holes:
        mask[8:15, 12:20] = False
    return mask


def feature(geometry: Any, **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": "STAS"}} | properties}


POLYGON = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}


@settings(max_examples=30, deadline=None)
@given(MASKS)
def test_what_is_written_of_a_mask_gives_it_back_in_every_format(mask: np.ndarray) -> None:
    size = (mask.shape[0], mask.shape[1])
    for form in EXPORTED:
        data = write_annotation({"STAS": mask}, form, image_id="0007", image_path="a/0007.png")
        loose = {"coordinates": "pixels"}  # fields of a few pixels are no larger than shares
        assert np.array_equal(read(data, size, **loose), mask), form
        assert np.array_equal(read(gzip.compress(data), size, **loose), mask), form


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-60, 400), st.integers(-60, 300)), min_size=3, max_size=9), st.integers(0, 2))
def test_the_formats_of_polygons_agree_about_any_outline(points: list[tuple[int, int]], decimals: int) -> None:
    """Wherever the points lie, on a grid of 1, 0.1 or 0.01 px, also outside of the image."""
    corners = np.array(points, float) / 10**decimals
    size, loose = (40, 60), {"coordinates": "pixels", "on_degenerate": "ignore"}
    flat = {"segmentation": [corners.ravel().tolist()]}
    found = [
        read(data, size, **loose)
        for data in (
            to_geojson({"STAS": [("1", [[corners]])]}),
            coco.to_coco([("0007.png", size, [flat])], "STAS"),
            to_asap({"STAS": [corners]}),
            to_labelme([corners - 0.5], size, "0007.png"),
        )
    ]
    for other in found[1:3]:
        assert np.array_equal(other, found[0])
    off = np.count_nonzero(found[3] != found[0])  # half a pixel less and more is not always nothing
    assert off == 0 or decimals
    inside = (corners >= 0).all() and (corners <= (60, 40)).all()
    if inside:
        plain = pycoco.decode(pycoco.merge(pycoco.frPyObjects([corners.ravel().tolist()], *size))).astype(bool)
        assert np.array_equal(found[0], plain)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=30)))
def test_compressed_rle_is_what_pycocotools_makes_of_it(mask: np.ndarray) -> None:
    packed = pycoco.encode(np.asfortranarray(mask.view(np.uint8)))["counts"].decode()
    runs = coco.decompress(packed)
    assert sum(runs) == mask.size
    plain = {"size": list(mask.shape), "counts": runs}
    loose = {"coordinates": "pixels", "on_degenerate": "ignore"}
    for rle in (plain, plain | {"counts": packed}):
        data = coco.to_coco([("0007.png", (mask.shape[0], mask.shape[1]), [{"segmentation": rle}])], "STAS")
        assert np.array_equal(read(data, (mask.shape[0], mask.shape[1]), **loose), mask)


@pytest.mark.parametrize(
    "values",
    [
        {"type": "FeatureCollection", "features": [feature(POLYGON)]},
        feature(POLYGON),
        [feature(POLYGON)],
        feature({"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE]]}),
        feature({"type": "GeometryCollection", "geometries": [POLYGON]}),
        feature(POLYGON, classification={"names": ["STAS"], "color": [1, 2, 3]}),
        feature(POLYGON, classification="STAS", isLocked=True, measurements={"area": 3}),
    ],
)
def test_geojson_is_read_in_all_its_forms_with_its_holes(values: Any) -> None:
    data = json.dumps(values).encode()
    for form in (data, b"\xef\xbb\xbf \n" + data, gzip.compress(data)):
        assert np.array_equal(read(form), square(HOLE))


def test_a_hole_takes_away_only_from_its_own_polygon() -> None:
    beyond = [[28, 8], [40, 8], [40, 15], [28, 15]]
    two = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE, HOLE, beyond], [HOLE]]}
    expected = square()
    expected[8:15, 28:30] = False
    assert np.array_equal(read(json.dumps(feature(two)).encode()), expected)
    ring = bridged(outlines(square(HOLE))[0])  # labelme's way of a hole
    assert np.array_equal(read(to_labelme([ring], SIZE, "0007.png")), square(HOLE))


def test_classes_are_labels_and_what_has_none_is_unclassified() -> None:
    line = {"type": "LineString", "coordinates": [[1, 1], [5, 5]]}
    derived = feature(POLYGON, classification={"names": ["Tumor", "Positive"]})
    data = json.dumps([feature(POLYGON), derived, feature(None), feature(line, classification=None)]).encode()
    found = describe(data, "a", None, CONFIG)
    assert found.labels == {"STAS": 2, "Tumor: Positive": 1, "Unclassified": 1}
    with pytest.raises(
        InputError, match=r"'Tumor: Positive' \(1 shape\), 'Unclassified' \(1 shape\): not in"
    ) as caught:
        read(data)
    assert "'annotation.labels.Tumor: Positive=target'" in str(caught.value)
    with pytest.raises(InputError, match="shape_type 'feature without geometry' has no area"):
        read(data, unknown_labels="ignore")
    line_only = json.dumps(feature(line)).encode()
    with pytest.raises(InputError, match="shape_type 'LineString' has no area; redraw it as a polygon"):
        read(line_only)


@pytest.mark.parametrize("features", ["[]", "[{}]", "[{}, {}]"])
def test_no_features_are_a_field_without_targets(features: str) -> None:
    none = '{"type": "FeatureCollection", "features": []}'
    assert not read(features.replace("{}", none).encode()).any()
    assert not read(none.encode()).any()


EMPTY = {"type": "GeometryCollection", "geometries": []}


@pytest.mark.parametrize(
    "geometry",
    [
        {"type": "MultiPolygon", "coordinates": []},
        EMPTY,
        {"type": "GeometryCollection", "geometries": [EMPTY, {"type": "MultiPolygon", "coordinates": []}]},
        {"type": "FeatureCollection", "features": []},
        {"type": "LineString", "coordinates": []},
        None,
    ],
)
def test_a_target_with_an_empty_geometry_is_told(geometry: Any) -> None:
    for values in (feature(geometry), [feature(POLYGON), feature(geometry)]):
        data = json.dumps(values).encode()
        with pytest.raises(InputError, match=r"a target covers nothing: shape \d: no_area: shape_type '.*'"):
            read(data)
        _, findings, _ = truth.read_annotation(data, "a", SIZE, AnnotationConfig(on_degenerate="ignore"))
        assert [finding.kind for finding in findings] == ["no_area"]
    ignored = json.dumps([feature(POLYGON), feature(geometry, classification="note")]).encode()
    assert np.array_equal(read(ignored, labels={"STAS": "target", "note": "ignore"}), square(HOLE))
    if geometry is not None and geometry["type"] != "FeatureCollection":
        with pytest.raises(InputError, match=r"'Unclassified' \(1 shape\)"):
            read(json.dumps(geometry).encode())


def test_an_empty_part_of_a_target_takes_nothing_from_it() -> None:
    parts = [EMPTY, POLYGON, {"type": "MultiPolygon", "coordinates": []}]
    whole = feature({"type": "GeometryCollection", "geometries": parts})
    data = json.dumps(whole).encode()
    mask, findings, _ = truth.read_annotation(data, "a", SIZE, CONFIG)
    assert np.array_equal(mask, square(HOLE)) and findings == []


def test_an_empty_target_of_the_other_formats_is_told() -> None:
    no_points: dict[str, Any] = {"label": "STAS", "points": [], "shape_type": "polygon"}
    no_segmentations: list[Any] = [[], None, [[]]]
    for data in (
        *(json.dumps(coco_values({"segmentation": empty})).encode() for empty in no_segmentations),
        json.dumps(coco_values({})).encode(),
        json.dumps(coco_values({"segmentation": {"size": [40, 60], "counts": [2400]}})).encode(),
        asap(annotation([])),
        asap('<Annotation Type="Polygon" PartOfGroup="STAS"/>'),
        json.dumps({"shapes": [no_points]}).encode(),
        json.dumps({"shapes": [no_points | {"shape_type": "rectangle"}]}).encode(),
    ):
        with pytest.raises(InputError, match="a target covers nothing: shape 0: "):
            read(data)


@pytest.mark.parametrize(
    "hole", [[], [[15, 9]], [[15, 9], [15, 9]], [[12, 8], [20, 15]], [[12, 8], [20, 15], [12, 8]], [[12, 8]] * 4]
)
def test_a_hole_without_area_takes_nothing_away_and_is_told(hole: Any) -> None:
    far = [[5_000_000, 5], [5_000_000, 20], [10, 20], [10, 5]]
    for rings, expected in (
        ([SQUARE, hole], square()),
        ([SQUARE, hole, HOLE, hole], square(HOLE)),
        ([far, hole], None),
    ):
        data = json.dumps(feature({"type": "Polygon", "coordinates": rings})).encode()
        for on_degenerate in ("keep_rest", "error"):
            given = AnnotationConfig(on_degenerate=on_degenerate)
            mask, findings, _ = truth.read_annotation(data, "a", SIZE, given)
            assert mask.any() if expected is None else np.array_equal(mask, expected)
            assert findings[0].kind == "hole_without_area"
            assert f"{1 + (len(rings) > 2)} hole(s) of fewer than 3 different points" in findings[0].message


def coco_values(*annotations: Any, **image: Any) -> dict[str, Any]:
    listed = {"id": 5, "file_name": "train/0007.jpg", "height": 40, "width": 60} | image
    other = {"id": "b", "file_name": "0008.png", "height": 9, "width": 9}
    made = [{"id": i, "image_id": 5, "category_id": 2} | one for i, one in enumerate(annotations)]
    return {"images": [listed, other], "annotations": made, "categories": [{"id": 2, "name": "STAS"}]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_coco_file_says_all_of_each_of_its_images(encoding: str) -> None:
    halves = [[10, 5, 30, 5, 30, 10, 10, 10], [10, 10, 30, 10, 30, 20, 10, 20]]
    data = json.dumps(coco_values({"segmentation": halves})).encode(encoding)
    assert np.array_equal(read(data), square())
    assert not read(data, (9, 9), "0008").any()
    found = describe(data, "coco.json", None, CONFIG)
    assert (found.images, found.labels) == (("0007", "0008"), {"STAS": 2})
    with pytest.raises(InputError, match="a COCO file of 2 images, none of them called 0009; add it there"):
        read(data, image_id="0009")
    with pytest.raises(InputError, match="annotation is for 60x40 px, the image has 61x40"):
        read(data, (40, 61))


def test_an_image_of_a_coco_file_is_found_by_its_name_in_any_case_and_form_of_accents() -> None:
    polygon = {"segmentation": [[10, 5, 30, 5, 30, 20, 10, 20]]}
    for name, wanted in (("M\u00fcller.jpg", "Mu\u0308ller"), ("x/Mu\u0308ller.JPG", "m\u00fcller"), ("A.png", "a")):
        data = json.dumps(coco_values(polygon, file_name=name)).encode()
        mask, findings, _ = truth.read_annotation(data, "coco.json", SIZE, CONFIG, wanted)
        assert np.array_equal(mask, square()) and findings == []
    values = coco_values(polygon)
    values["images"][1] |= {"file_name": "train/A7.JPG"}
    values["images"].append({"id": 9, "file_name": "a7.jpg", "height": 40, "width": 60})
    with pytest.raises(InputError, match=r"names 2 images A7 \('train/A7.JPG', 'a7.jpg'\); ids must be unique"):
        read(json.dumps(values).encode(), image_id="A7")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (coco_values({"segmentation": [[1, 2, 3]]}), "is no list of x, y"),
        (coco_values({"segmentation": [[1, 2, 3, "4"]]}), "is no list of x, y"),
        (coco_values({"segmentation": {"size": [40, 60], "counts": [1, 2]}}), "do not add up to the 2400 px"),
        (coco_values({"segmentation": {"size": [40, 60], "counts": [-1, 2401]}}), "do not add up"),
        (coco_values({"segmentation": {"size": [4000, 6000], "counts": [24_000_000]}}), "RLE of [4000, 6000]"),
        (coco_values({"segmentation": {"size": [40, 60], "counts": "z" * 90}}), "compressed RLE"),
        (coco_values({"segmentation": [], "image_id": 77}), "has image_id 77, which it lacks"),
        (coco_values({"segmentation": [], "category_id": {}}), "has category_id {}"),
        (coco_values(height=-3), "has height -3"),
        (coco_values(file_name=None), "file_name of image 5 is None"),
        (coco_values(id="b"), "the image id 'b' is there twice"),
        (coco_values({"segmentation": [], "bbox": [1, 2, 3, 4]}), "shape_type 'box' has no area"),
    ],
)
def test_a_coco_file_that_contradicts_itself_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(json.dumps(values).encode())
    assert message in str(caught.value)


def asap(inner: str, head: str = "") -> bytes:
    return (
        f'<?xml version="1.0"?>{head}<ASAP_Annotations><Annotations>{inner}</Annotations></ASAP_Annotations>'.encode()
    )


def annotation(points: Any, kind: str = "Polygon", group: str = "STAS") -> str:
    listed = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(points))
    return f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}"><Coordinates>{listed}</Coordinates></Annotation>'


def test_asap_is_read_by_its_groups_and_the_order_of_its_points() -> None:
    swapped = annotation(SQUARE[:4]).replace('Order="1"', 'Order="9"').replace('Order="2"', 'Order="1"')
    swapped = swapped.replace('Order="9"', 'Order="2"')
    assert np.array_equal(read(asap(annotation(SQUARE[:4]))), square())
    assert not np.array_equal(read(asap(swapped)), square())
    assert np.array_equal(read(asap(annotation(SQUARE[:4])).decode().encode("utf-16")), square())
    found = describe(asap(annotation(SQUARE, group="None") + annotation(SQUARE, group="_2")), "a", None, CONFIG)
    assert (found.format, found.labels) == ("asap", {"Unclassified": 1, "_2": 1})
    _, findings, _ = truth.read_annotation(asap(annotation(SQUARE, "Spline")), "a", SIZE, CONFIG)
    assert [finding.kind for finding in findings] == ["spline"]
    with pytest.raises(InputError, match="shape_type 'dot' has no area"):
        read(asap(annotation(SQUARE[:1], "Dot")))


LAUGHS = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>'
FILE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (asap(annotation(SQUARE, group="&c;"), LAUGHS), "declares a document type, which could hold entities"),
        (asap(annotation(SQUARE, group="&b;"), FILE), "declares a document type"),
        (asap('<Annotation><Coordinates><Coordinate X="1"/></Coordinates></Annotation>'), "without numbers X and Y"),
        (asap(annotation(SQUARE))[:-30], "damaged XML"),
        (b"<Annotations MicronsPerPixel='0.5'></Annotations>", "XML of <Annotations>, expected <ASAP_Annotations>"),
        (b"<html><body>404</body></html>", "XML of <html>"),
        (b'{"hello": 1}', "has the keys 'hello', but neither `shapes` (labelme), `type` (GeoJSON)"),
        (b"[1, 2]", "no list of GeoJSON features; read are labelme, GeoJSON, COCO, ASAP XML and mask images"),
        (b"STAS 1 2 3", "give JPEG, PNG"),
        (gzip.compress(b"{}", mtime=0)[:-4], "cut short"),
        (b"\x1f\x8bnothing", "damaged gzip"),
        (gzip.compress(b"", mtime=0), "0 bytes"),
        (json.dumps(feature({"type": "Circle"})).encode(), "an item of type 'Circle'"),
        (json.dumps(feature({"type": []})).encode(), "an item of type [], expected those of GeoJSON"),
        (json.dumps(feature({"type": "Polygon", "coordinates": [[["1", 2]]]})).encode(), "'1' is not a number"),
        (json.dumps(feature({"type": "Polygon", "coordinates": []})).encode(), "a polygon without an outline"),
        (b'{"type": "Polygon", "coordinates": [[[NaN, 1], [2, 1], [2, 2]]]}', "Unclassified"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(data)
    assert message in str(caught.value)


def test_numbers_that_are_not_finite_shares_and_percent_are_refused_in_every_format() -> None:
    for far in ("NaN", "Infinity", "1e400"):
        polygon = f"[[[{far}, 1], [2, 1], [2, 2]]]"
        text = json.dumps(feature({"type": "Polygon", "coordinates": "here"})).replace('"here"', polygon)
        with pytest.raises(InputError, match="NaN, infinite or too large"):
            read(text.encode())
    shares = np.array(SQUARE[:4]) / (60, 40)
    for data in (
        to_geojson({"STAS": [("1", [[shares]])]}),
        coco.to_coco([("0007.png", SIZE, [{"segmentation": [shares.ravel().tolist()]}])], "STAS"),
        to_asap({"STAS": [shares]}),
    ):
        with pytest.raises(InputError, match="these look like shares of its sides"):
            read(data)


def test_archives_and_points_beyond_the_limits_are_refused_before_they_take_memory() -> None:
    with pytest.raises(OversizedAnnotation, match="more than the limit of 64,000,000"):
        read(gzip.compress(b" " * 70_000_000))
    many = b'{"type": "Polygon", "coordinates": [[' + b"[0,0]," * 1_400_000
    with pytest.raises(OversizedAnnotation, match="outline its targets with fewer points"):
        read(many)
    with pytest.raises(UnreadableAnnotation):
        read(b"[" * 100_000)


def picture(array: np.ndarray, form: str = "PNG", colours: Any = None, **options: Any) -> bytes:
    image, sink = Image.fromarray(array), io.BytesIO()
    if colours:
        image = image.convert("P") if image.mode != "L" else Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(colours)
    image.save(sink, form, **options)
    return sink.getvalue()


CLASSES = np.zeros(SIZE, np.uint8)
CLASSES[5:20, 10:30] = 2
CLASSES[30:35, 5:9] = 1
RED = np.zeros((*SIZE, 3), np.uint8)
RED[CLASSES == 2] = (200, 0, 0)
RED[CLASSES == 1] = (0, 0, 250)


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (picture(CLASSES // 2 * 255), {}),
        (picture(CLASSES // 2), {}),
        (picture((CLASSES // 2).astype(np.uint16) * 65535), {}),
        (picture((CLASSES // 2).astype(np.uint16) * 300), {"300": "target"}),
        (picture(CLASSES), {"2": "target", "1": "ignore"}),
        (picture(CLASSES, "TIFF"), {"2": "target", "1": "ignore"}),
        (picture(CLASSES, colours=[0, 0, 0, 0, 0, 250, 200, 0, 0]), {"2": "target", "1": "ignore"}),
        (picture(CLASSES, colours=[0, 0, 0, 0, 0, 250, 200, 0, 0]), {"#C80000": "target", "#0000fa": "ignore"}),
        (picture(RED), {"#c80000": "target", "#0000fa": "ignore"}),
        (picture(np.repeat(CLASSES[..., None], 3, axis=2)), {"2": "target", "1": "ignore"}),
        (picture(np.where(CLASSES == 2, 0, 255).astype(np.uint8)), {"0": "target", "255": "ignore"}),
    ],
)
def test_masks_are_read_by_the_values_that_labels_list(data: bytes, labels: dict[str, str]) -> None:
    assert np.array_equal(read(data, labels={"STAS": "target", **labels}), square())


def test_values_that_no_label_lists_are_told_and_blurred_ones_go_to_the_nearest_on_request() -> None:
    with pytest.raises(
        UnclearMask, match=r"holds 3 values \(0, 1, 2\).*; or say what .* annotation.labels.<value>=target"
    ):
        read(picture(CLASSES))
    with pytest.raises(InputError, match=r"'1' \(1 shape\): not in annotation.labels"):
        read(picture(CLASSES), labels={"2": "target"})
    with pytest.raises(InputError, match="a mask of 60x40 px, the image has 61x40; pair it with its own image"):
        read(picture(CLASSES), (40, 61))
    blurred = picture(CLASSES // 2 * 255, "JPEG", quality=95)
    with pytest.raises(UnclearMask, match="JPEG, which blurs"):
        read(blurred)
    assert np.array_equal(read(blurred, mask_tolerance=60), square())
    soft = np.clip(RED.astype(int) + np.random.default_rng(0).integers(-9, 10, RED.shape), 0, 255).astype(np.uint8)
    labels = {"#c80000": "target", "#0000fa": "ignore"}
    assert np.array_equal(read(picture(soft), labels=labels, mask_tolerance=9), square())
    with pytest.raises(UnclearMask, match="is it a picture"):
        read(picture(soft), labels=labels)
    assert describe(picture(CLASSES // 2), "a", None, CONFIG).labels == {"foreground": 1}
    assert images.decode_mask(picture(CLASSES // 2), "a").sum() == 300


def test_the_examples_of_the_documents_are_read() -> None:
    page = (ROOT / "docs" / "annotations.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", page.partition("## An example of each")[2], re.M)
    examples = [block for block in blocks if block.strip()[0] in "{<"]
    areas = [read(block.encode(), (942, 1716)).sum() for block in examples]
    assert areas == [300, 300 - 56, 300, 150]  # the second has a hole, the last is a triangle
