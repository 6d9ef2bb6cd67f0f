"""Images -> LoRAs of a model that sees none.

Axes: n images, s tokens of a context, t soft tokens of an image, d width.

Source: Doc-to-LoRA (arXiv 2602.15902), the experiment with a vision-language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from d2l import chunking
from d2l.captioner import SHOTS
from hyperlora import hypernetwork
from hyperlora import lora as lora_lib
from hyperlora.errors import UserError
from hyperlora.lora import Lora
from hyperlora.models import vision
from hyperlora.models.images import ImageProcessor
from hyperlora.trained import Trained


class ImageInternalizer:
    """Images -> LoRAs. The context encoder reads them itself, or a captioner gives it soft tokens.

    Attributes:
      trained: the hypernetwork and its base model.
    """

    def __init__(self, trained: Trained, captioner: Trained | None = None):
        """
        Args:
          captioner: for a context encoder that reads texts alone.

        Raises:
          UserError: not a hypernetwork for documents, not a captioner, or nothing that reads
            images.
        """
        trained.require('doc_to_lora')
        encoder = trained.hypernetwork.encoder
        self.trained, self.captioner = trained, captioner
        if captioner is not None:
            captioner.require('captioner')
            config = captioner.config.hypernetwork.copy_and_resolve_references()
            config.mix = True  # also if it was only trained by `alignment`
            mixing = hypernetwork.build(config, captioner.base)
            self._process = ImageProcessor(config.vision.image_size)
            self._soft = jax.jit(lambda *args: mixing.generate(*args)[0])
        elif encoder.images:
            self._process = encoder.images
        else:
            raise UserError(f'{encoder.name} reads no images; name a captioner')
        self._generate = jax.jit(trained.hypernetwork.generate)

    def contexts(self, images: Sequence[Image.Image]) -> dict[str, jax.Array]:
        """What the hypernetwork's encoder reads of images (see `ImageProcessor`)."""
        encoder = self.trained.hypernetwork.encoder
        if self.captioner is None:
            pixels = np.stack([self._process(image) for image in images])
            tokens = vision.tokens_with_images(encoder.config, encoder.tokenizer.encode, ['', ''])
            rows = np.asarray([tokens] * len(images), np.int32)
            return {'tokens': rows, 'mask': np.ones(rows.shape, bool), 'pixels': pixels[:, None]}
        soft = self.soft_tokens(images)[:, len(encoder.tokenizer.encode(SHOTS)) :]
        shape = soft.shape[:2]
        return {'tokens': np.zeros(shape, np.int32), 'mask': np.ones(shape, bool), 'soft': soft}

    def soft_tokens(self, images: Sequence[Image.Image]) -> jax.Array:
        """What the captioner makes of images, `[n, t, d]`."""
        pixels = np.stack([self._process(image) for image in images])
        encoder = self.trained.hypernetwork.encoder
        return self._soft(self.captioner.params, encoder.params, {'pixels': pixels})

    def texts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The same of texts."""
        encode = self.trained.hypernetwork.encoder.tokenizer.encode
        chunks = [encode(text) for text in texts]
        tokens, mask = chunking.pad(chunks, -(-max(map(len, chunks)) // 8) * 8)
        return {'tokens': tokens, 'mask': mask}

    def __call__(self, contexts: dict[str, jax.Array]) -> Lora:
        """The LoRAs of contexts, a row each."""
        encoder = self.trained.hypernetwork.encoder
        chunks, shared = self._generate(self.trained.params, encoder.params, contexts)
        return chunks if shared is None else lora_lib.concatenate(chunks, shared)
