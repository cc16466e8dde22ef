"""Pictures to inputs and boxes there and back."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detection_data.augmentation import Augmentation
from detection_data.transforms import Preprocessing, image_to_input, load_image, transform_for
from popdet.config import DataConfig
from runtime.errors import BadInputFile

SIDES = st.integers(1, 900)
PRE = Preprocessing("squash", 32, 48, "rgb", 1 / 255.0, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, Preprocessing, bool, np.ndarray]:
    width, height = draw(SIDES), draw(SIDES)
    resize = draw(st.sampled_from(["squash", "pad"]))
    pre = Preprocessing(resize, draw(SIDES), draw(SIDES), "rgb", 1.0, (0.0,) * 3, (1.0,) * 3)
    fractions = np.array(draw(st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=5))).reshape(-1, 4)
    low, high = np.minimum(fractions[:, :2], fractions[:, 2:]), np.maximum(fractions[:, :2], fractions[:, 2:])
    return width, height, pre, draw(st.booleans()), np.hstack([low, high]) * [width, height, width, height]


@given(scenes())
@settings(max_examples=200, deadline=None)
def test_boxes_come_back_where_they_were(scene: tuple) -> None:
    width, height, pre, flip, boxes = scene
    transform = transform_for(width, height, pre, Augmentation(flip=flip))
    back = transform.boxes_to_original(transform.boxes_to_input(boxes))
    # float32 keeps 24 bits of an input coordinate; a shrunk one is stretched again on the way back
    np.testing.assert_allclose(back, boxes, atol=2e-4 * max(1.0, 1 / transform.scale_x, 1 / transform.scale_y))


@given(scenes())
@settings(max_examples=200, deadline=None)
def test_boxes_stay_inside_the_content_and_keep_their_order(scene: tuple) -> None:
    width, height, pre, flip, boxes = scene
    transform = transform_for(width, height, pre, Augmentation(flip=flip))
    assert transform.content_width <= pre.width and transform.content_height <= pre.height
    inside = transform.boxes_to_input(boxes)
    assert (inside[:, :2] <= inside[:, 2:]).all()
    assert (inside >= -1e-3).all()
    assert (inside <= np.array([transform.content_width, transform.content_height] * 2) + 1e-3).all()


def test_pad_keeps_the_ratio_and_squash_fills_the_input() -> None:
    pad = Preprocessing("pad", 100, 100, "rgb", 1.0, (0.0,) * 3, (1.0,) * 3)
    padded = transform_for(200, 50, pad)
    assert (padded.content_width, padded.content_height, padded.scale_x, padded.scale_y) == (100, 25, 0.5, 0.5)
    squashed = transform_for(200, 50, Preprocessing("squash", 100, 100, "rgb", 1.0, (0.0,) * 3, (1.0,) * 3))
    assert (squashed.content_width, squashed.content_height, squashed.scale_x, squashed.scale_y) == (100, 100, 0.5, 2.0)


def test_boxes_beyond_the_image_are_clipped_on_the_way_back() -> None:
    transform = transform_for(100, 60, PRE)
    back = transform.boxes_to_original(np.array([[-5, -5, 480, 320]], np.float32))
    assert back.tolist() == [[0, 0, 100, 60]]


def test_pixels_are_normalised_per_channel() -> None:
    image = Image.new("RGB", (48, 32), (255, 0, 51))
    made, _ = image_to_input(image, PRE)
    assert made.shape == (3, 32, 48) and made.dtype == np.float32
    np.testing.assert_allclose(made[:, 5, 7], [(1 - 0.5) / 0.25, (0 - 0.4) / 0.2, (0.2 - 0.3) / 0.1], rtol=1e-5)


def test_bgr_swaps_the_channels_before_mean_and_std() -> None:
    pre = Preprocessing("squash", 16, 16, "bgr", 1.0, (1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    made, _ = image_to_input(Image.new("RGB", (16, 16), (10, 20, 30)), pre)
    assert made[:, 0, 0].tolist() == [29.0, 18.0, 7.0]


def test_padding_is_the_mean_colour_right_and_below() -> None:
    pre = Preprocessing("pad", 32, 32, "rgb", 1 / 255.0, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
    made, transform = image_to_input(Image.new("RGB", (64, 32), (255, 255, 255)), pre)
    assert transform.content_height == 16
    assert (made[:, :16] > 0).all() and (made[:, 16:] == 0).all()


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_flip_moves_pixels_and_boxes_together(resize: str) -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[10:20, 5:30] = 255
    pre = Preprocessing(resize, 80, 100, "rgb", 1 / 255.0, (0.0,) * 3, (1.0,) * 3)
    made, transform = image_to_input(Image.fromarray(pixels), pre, Augmentation(flip=True))
    ys, xs = np.nonzero(made[0] > 0.5)
    box = transform.boxes_to_input(np.array([[5, 10, 30, 20]]))[0]
    np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=1.0)
    assert box[0] == 70


def test_preprocessing_survives_the_manifest_and_matches_the_config() -> None:
    pre = Preprocessing.from_config(DataConfig(), 64, 96)
    assert Preprocessing.from_dict(pre.to_dict()) == pre
    assert (pre.height, pre.width, pre.mean) == (64, 96, (0.485, 0.456, 0.406))


@pytest.mark.parametrize(("key", "value"), [
    ("resize", "crop"), ("channel_order", "yuv"), ("height", 0), ("width", "wide"), ("std", [1, 0, 1]), ("mean", [1, 2]),
    ("pixel_scale", float("nan")), ("mean", 3),
])
def test_an_unusable_preprocessing_value_is_refused(key: str, value: object) -> None:
    with pytest.raises(BadInputFile, match=r"m\.json.*preprocessing"):
        Preprocessing.from_dict({**PRE.to_dict(), key: value}, "m.json")


def test_a_missing_or_unknown_preprocessing_key_is_named() -> None:
    tree = PRE.to_dict()
    del tree["mean"]
    with pytest.raises(BadInputFile, match=r"preprocessing\.mean is missing"):
        Preprocessing.from_dict(tree)
    with pytest.raises(BadInputFile, match=r"preprocessing\.gamma is unknown"):
        Preprocessing.from_dict({**PRE.to_dict(), "gamma": 2})


@pytest.mark.parametrize("cut", [0.0, 0.02, 0.3, 0.7])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_named(tmp_path, suffix: str, cut: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(BadInputFile, match=rf"cut\.{suffix}.*replace"):
        load_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow grumbles about TIFF tags
def test_damaged_bytes_never_escape_as_another_error(tmp_path) -> None:
    """Fuzzing: 300 pictures with random bytes overwritten either decode or are named."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    path = tmp_path / "fuzz.img"
    refused = 0
    for suffix in ("jpeg", "png", "gif", "bmp", "tiff", "webp"):
        Image.fromarray(pixels).save(path, format=suffix)
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(50):
            broken = content.copy()
            broken[rng.integers(0, len(broken), 8)] = rng.integers(0, 255, 8)
            path.write_bytes(broken.tobytes())
            try:
                load_image(path)
            except BadInputFile as error:
                assert "fuzz.img" in str(error)
                refused += 1
    assert refused > 30


def test_missing_folder_and_text_instead_of_an_image(tmp_path) -> None:
    (tmp_path / "note.jpg").write_text("hello")
    for name, message in (("absent.jpg", "no such image"), (".", "is a folder"), ("note.jpg", "not an image")):
        with pytest.raises(BadInputFile, match=message):
            load_image(tmp_path / name)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_usual_mode_becomes_rgb(tmp_path, mode: str) -> None:
    path = tmp_path / "x.tiff"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    image = load_image(path)
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(path)
    assert load_image(path).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied_only_on_request(tmp_path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert load_image(path).size == (40, 20)
    assert load_image(path, upright=True).size == (20, 40)
