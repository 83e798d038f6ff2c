"""Opening picture files: every way a file can disappoint ends in one clear sentence.

What is decided here (ours, no source):
- EXIF orientation is applied, as viewers do; of an animation the first frame is read.
- Transparency is laid over white, as transformers does; 16-bit grey, which Pillow would clip, is scaled.
- A side of one pixel (a tracking pixel, a failed download) and sides that differ by more than 200 times
  (Qwen-VL's limit) show nothing after an encoder's resize, so they are refused instead of answered about.
- More than about 179 million pixels, Pillow's limit against decompression bombs, are refused.
- Only formats that Pillow decodes by itself are tried: EPS, for one, would start a foreign program.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from laco.errors import LacoError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MIN_SIDE = 2
MAX_RATIO = 200


def open_picture(path: str | Path) -> Image.Image:
    """Reads a picture file as 8-bit RGB, upright.

    Raises:
        LacoError: the file is missing, a directory, not a picture, truncated or damaged, or of a size that no
            encoder can make sense of; the sentence names the file.
    """
    path = Path(path)
    if not path.exists():
        raise LacoError(f"there is no picture {path}")
    if path.is_dir():
        raise LacoError(f"{path} is a directory; name a picture file")
    Image.init()
    try:
        picture = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except PermissionError as error:
        raise LacoError(f"{path} may not be read: permission denied") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise LacoError(f"{path} has more than {most} million pixels; scale it down first") from error
    except Exception as error:  # damaged headers raise nearly anything
        raise LacoError(f"{path} is not a picture that can be read ({', '.join(FORMATS)})") from error
    with picture:
        check_size(picture.size, path)
        try:
            picture.load()
            return to_rgb(ImageOps.exif_transpose(picture))
        except Exception as error:  # as above, now the decoders of the single formats
            raise LacoError(f"{path} is truncated, damaged or of an unknown kind: {error}") from error


def check_size(size: tuple[int, int], name: object) -> None:
    """Refuses pictures, (width, height) in pixels, that show nothing after an encoder's resize."""
    width, height = size
    if min(size) < MIN_SIDE:
        raise LacoError(f"{name} is {width}x{height} pixels; a picture needs at least {MIN_SIDE}x{MIN_SIDE}")
    if max(size) > MAX_RATIO * min(size):
        raise LacoError(
            f"{name} is {width}x{height} pixels, its sides differ by more than {MAX_RATIO} times; cut it into pieces"
        )


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: transparency over white, 16-bit grey scaled."""
    if picture.mode == "F" or (picture.mode == "I" and np.asarray(picture).max() > 0xFFFF):
        raise LacoError(f"pixels of mode {picture.mode} have no agreed range; convert to 8 bits first")
    if picture.mode.startswith("I"):
        return picture.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def down_sampled(picture: Image.Image, factor: float) -> Image.Image:
    """A picture at 1/factor of its resolution (mean of factor x factor pixels), enlarged to its size again.

    The baseline that every compression has to beat: as little detail as 1/factor^2 of the tokens could hold. `factor`
    is 1 or more; a side has a whole number of pixels, so it is rounded.
    """
    if factor == 1:
        return picture
    width, height = picture.size
    small = picture.resize((max(round(width / factor), 1), max(round(height / factor), 1)), Image.Resampling.BOX)
    return small.resize((width, height), Image.Resampling.BICUBIC)
