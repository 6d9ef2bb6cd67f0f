"""Image files to the pixels that a vision tower reads."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hyperlora.errors import UserError

# What the published Gemma 3 models say, and of SigLIP the models before them.
_DEFAULTS = {
    'do_normalize': True,
    'do_pan_and_scan': None,
    'do_rescale': True,
    'do_resize': True,
    'image_mean': [0.5] * 3,
    'image_std': [0.5] * 3,
    'resample': int(Image.Resampling.BILINEAR),
    'rescale_factor': 1 / 255,
    'size': None,
}
_IRRELEVANT = frozenset(
    """
    _processor_class data_format device disable_grouping do_convert_rgb image_processor_type
    image_seq_length input_data_format pan_and_scan_max_num_crops pan_and_scan_min_crop_size
    pan_and_scan_min_ratio_to_activate processor_class return_tensors
    """.split()
)
# More than eight bits for a channel: Pillow would cut off what is above 255.
_DEEP_MODES = ('I', 'F')


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes an image to a square and normalises it.

    Attributes:
      size: height and width of the square, in pixels.
      mean, std: of each channel, after multiplication by `scale`.
      scale: multiplies the bytes of an image.
      resample: a `PIL.Image.Resampling`.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    scale: float = 1 / 255
    resample: int = int(Image.Resampling.BILINEAR)

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any], size: int) -> ImageProcessor:
        """Reads the contents of a preprocessor_config.json, for images of this size.

        Raises:
          UserError: a setting is not known or not supported, or the size is another.
        """
        c = {**_DEFAULTS, **settings}
        unknown = sorted(
            key
            for key in settings.keys() - _DEFAULTS.keys() - _IRRELEVANT
            if settings[key] not in (None, False)
        )
        if unknown:
            raise UserError(f'unknown settings of the image processor: {", ".join(unknown)}')
        for key in ('do_normalize', 'do_pan_and_scan', 'do_rescale', 'do_resize'):
            if bool(c[key]) != bool(_DEFAULTS[key]):
                raise UserError(f'image processor: {key} = {c[key]!r} is not supported')
        if c['size'] not in (None, {'height': size, 'width': size}):
            raise UserError(
                f'image processor: size {c["size"]}, but the vision tower reads {size} x {size}'
            )
        return cls(
            size,
            tuple(c['image_mean']),
            tuple(c['image_std']),
            c['rescale_factor'],
            c['resample'],
        )

    def __call__(self, source: str | Path | bytes | Image.Image) -> np.ndarray:
        """Pixels `[h, w, 3]` f32 of an image, or of an image file, see `read`."""
        image = source if isinstance(source, Image.Image) else read(source)
        image = image.resize((self.size, self.size), self.resample)
        pixels = np.asarray(image, np.float32) * np.float32(self.scale)
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def read(source: str | Path | bytes, on_white: bool = False) -> Image.Image:
    """The image, in red, green and blue, of a file, given by its path or its contents.

    Grey-scale images become grey colours, of an animation the first frame is taken, and the
    orientation that a camera noted is applied. Transparency is dropped, or there is white behind.

    Raises:
      UserError: the file is missing, not an image, damaged, has more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`, or more than 8 bits for each channel.
    """
    name = 'this file' if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            _check(image, name)
            image = ImageOps.exif_transpose(image)
            if on_white:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
            return image.convert('RGB')
    except UserError:
        raise
    except Image.DecompressionBombError as e:
        raise _too_large(name) from e
    except Image.UnidentifiedImageError as e:
        raise UserError(f'{name} is not an image; give a PNG or JPEG file') from e
    except Exception as e:  # decoders raise all kinds, from SyntaxError to struct.error
        raise UserError(f'cannot read {name} as an image ({e})') from e


def _check(image: Image.Image, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:  # Pillow itself only warns
        raise _too_large(name)
    if image.mode.startswith(_DEEP_MODES):
        raise UserError(
            f'{name} has more than 8 bits for a channel (mode {image.mode}); convert it to 8'
        )


def _too_large(name: str) -> UserError:
    return UserError(f'{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller')
