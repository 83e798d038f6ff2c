"""Every kind of picture file, opened and shown to a real (tiny) model, or refused in one sentence."""

import numpy as np
import pytest
from PIL import Image

import tiny
from laco.errors import LacoError
from laco.evaluate.generation import encode
from laco.pictures import down_sampled, open_picture

RED, WHITE = (200, 30, 20), (255, 255, 255)


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tiff", "ppm"])
def test_usual_formats_are_read(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (20, 10), RED).save(path)
    picture = open_picture(path)
    assert picture.size == (20, 10)
    assert np.abs(pixels(picture).astype(int) - RED).max() < 12  # JPEG and WebP lose a little


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    Image.new("RGB", (8, 8), WHITE).convert(mode).save(tmp_path / f"p.{suffix}")
    assert (pixels(open_picture(tmp_path / f"p.{suffix}")) >= 250).all()


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (*RED, 0))
    picture.paste((*RED, 255), (0, 0, 4, 8))
    picture.convert(mode).save(tmp_path / "p.png")
    shown = pixels(open_picture(tmp_path / "p.png"))
    assert np.abs(shown[0, 0].astype(int) - RED).max() < 3
    assert tuple(shown[0, 7]) == WHITE


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"p.{suffix}")
    shown = pixels(open_picture(tmp_path / f"p.{suffix}"))[..., 0]
    np.testing.assert_array_equal(shown.ravel(), np.arange(256))


def test_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (30, 10), WHITE)
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    picture.save(tmp_path / "p.jpg", exif=exif)
    assert open_picture(tmp_path / "p.jpg").size == (10, 30)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE)]
    frames[0].save(tmp_path / "p.gif", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(open_picture(tmp_path / "p.gif")).astype(int) - RED).max() < 3


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "truncated":
        tiny.picture(0, 200, 200).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "header only":
        tiny.picture().save(path)
        path.write_bytes(path.read_bytes()[:20])
    elif kind == "text":
        path.write_text("not a picture\n")
    elif kind == "empty":
        path.touch()
    elif kind == "postscript":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    elif kind == "directory":
        path.mkdir()
    elif kind == "one pixel":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "ribbon":
        Image.new("RGB", (20000, 20)).save(path)
    elif kind == "bomb":
        path.write_bytes(b"P6\n20000 20000\n255\n")  # the header is enough
    elif kind == "float":
        path = tmp_path / "float.tiff"
        Image.new("F", (8, 8)).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("truncated", "is truncated, damaged"),
        ("header only", "is not a picture|is truncated, damaged"),
        ("text", "is not a picture"),
        ("empty", "is not a picture"),
        ("postscript", "is not a picture"),
        ("directory", "is a directory"),
        ("missing", "there is no picture"),
        ("one pixel", "is 1x1 pixels; a picture needs at least 2x2"),
        ("ribbon", "is 20000x20 pixels, its sides differ by more than 200 times"),
        ("bomb", "has more than 178 million pixels"),
        ("float", "no agreed range"),
    ],
)
def test_refused_in_one_sentence_that_names_the_file(tmp_path, kind, sentence):
    path = damaged(tmp_path, kind)
    with pytest.raises(LacoError, match=sentence) as caught:
        open_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 3), (2, 400), (3, 50), (1200, 800)])
@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_odd_sizes_reach_the_model_as_they_are(tmp_path, size, vision):
    """Sides of 3 look like channels to a careless image processor; a plain colour must stay this colour."""
    Image.new("RGB", size, RED).save(tmp_path / "p.png")
    picture = open_picture(tmp_path / "p.png")
    model, processor = tiny.llava(vision=vision)
    inputs = encode(processor, ["what?"], [[picture]])
    given = inputs["pixel_values"][0]
    images = processor.image_processor
    expected = (np.array(RED) / 255 - images.image_mean) / images.image_std
    np.testing.assert_allclose(given.numpy(), np.broadcast_to(expected[:, None, None], given.shape), atol=0.01)
    assert model(**inputs).logits.isfinite().all()


def test_down_sampling_by_a_fraction_rounds_the_sides(monkeypatch):
    """Half of the pixels: sides of 96 become 68; whole factors are as they were."""
    picture, sizes, resize = tiny.picture(0, 96, 96), [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *way: sizes.append(size) or resize(self, size, *way))
    assert [down_sampled(picture, factor).size for factor in (1.414, 2, 3, 4.0)] == [(96, 96)] * 4
    assert sizes[::2] == [(68, 68), (48, 48), (32, 32), (24, 24)]
    assert down_sampled(picture, 1) is picture
