"""Images through text-only weights: a model that never saw one says what it shows.

A hypernetwork that was trained on texts alone reads an image's activations; the text-only base
model, with that LoRA, is asked what is in the image and chooses among the names of ten things.

Axes: n pictures, o options of each, p tokens of the question, k labels, t soft tokens, d width.

Source: Doc-to-LoRA (arXiv 2602.15902), the experiment with a vision-language model.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from d2l import captions
from d2l.image_internalizer import ImageInternalizer
from d2l.pictures import PREFIX, QUESTION, Picture, read
from hyperlora import trained
from hyperlora.errors import UserError
from hyperlora.evaluation import plots, record
from hyperlora.lora import Lora
from hyperlora.models.base import BaseModel
from hyperlora.models.decoder import Decoder, prefix

_SHEET = 40  # pictures on the contact sheet


@functools.partial(jax.jit, static_argnames='decoder')
def _log_probs(decoder, params, prompt, labels, weights, lora, soft):
    """Weighted log-probability of the labels after a prompt.

    Args:
      prompt: `[n, p]`, read once for all the o answers to it.
      labels, weights: `[n, o, k]`.

    Returns:
      `[n, o]`.
    """
    n, options, count = labels.shape
    variables, length = {'params': params}, prompt.shape[1]
    out = decoder.apply(variables, prompt, lora=lora, soft=soft, cache_length=length + count)
    labels, weights = labels.reshape(-1, count), weights.reshape(-1, count)
    cache = jax.tree.map(lambda x: jnp.repeat(x, options, 1), out.cache)
    positions = jnp.broadcast_to(length + jnp.arange(count), labels.shape)
    answers = decoder.apply(variables, labels, positions, lora=lora, cache=cache).hidden
    last = jnp.repeat(out.hidden[:, -1:], options, 0)
    hidden = jnp.concatenate([last, answers[:, :-1]], 1)  # that predict the labels

    def of_label(hidden, label):
        logits = decoder.apply(variables, hidden, method='unembed')
        return jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], -1)[:, 0]

    found = jax.lax.map(lambda x: of_label(*x), (hidden.swapaxes(0, 1), labels.T)).T
    return (found * weights).sum(1).reshape(n, options)


class Chooser:
    """The text-only model, choosing among names by their likelihood after the question."""

    def __init__(self, base: BaseModel, names: Sequence[str]):
        self.base, self._decoder = base, Decoder(base.config)
        tokenizer = base.tokenizer
        # Names with an end of a turn after them, and as captions.
        self._said = {name: [*tokenizer.encode(name), tokenizer.eos_id] for name in set(names)}
        self._captions = {name: captions.answer(tokenizer, name) for name in set(names)}
        both = [*self._said.values(), *self._captions.values()]
        self._longest = max(map(len, both))

    def __call__(
        self,
        options: Sequence[Sequence[str]],
        lora: Lora | None = None,
        soft: jax.Array | None = None,
    ) -> list[int]:
        """The likeliest option of each picture, by the mean over its tokens.

        Args:
          options: n lists of o names.
          lora: of n rows, or None for the model as it is.
          soft: `[n, t, d]`, a captioner's soft tokens, which are read instead of the question.
        """
        tokenizer = self.base.tokenizer
        if soft is None:
            prompt, ids = tokenizer.prompt(QUESTION), self._said
        else:
            prompt, ids = captions.prompt(tokenizer, soft.shape[1]), self._captions
        labels = np.zeros((len(options), len(options[0]), self._longest), np.int32)
        weights = np.zeros(labels.shape, np.float32)
        for row, names in enumerate(options):
            for column, name in enumerate(names):
                answer = ids[name]
                labels[row, column, : len(answer)] = answer
                weights[row, column, : len(answer)] = 1 / len(answer)
        prompts = np.asarray([prompt] * len(options), np.int32)
        if soft is not None:
            soft = prefix(soft, len(prompt))
        scores = _log_probs(self._decoder, self.base.params, prompts, labels, weights, lora, soft)
        return np.asarray(scores).argmax(1).tolist()


def choose_options(
    rng: np.random.Generator, pictures: Sequence[Picture], groups: Sequence[str]
) -> list[list[str]]:
    """For each picture a name of every group, in their order: its own of its own."""
    names = {
        group: sorted({picture.name for picture in pictures if picture.group == group})
        for group in groups
    }
    return [
        [
            picture.name
            if group == picture.group
            else names[group][rng.integers(len(names[group]))]
            for group in groups
        ]
        for picture in pictures
    ]


def evaluate(config: ConfigDict, checkpoint: str, workdir: pathlib.Path) -> None:
    """Scores choices among ten names; writes metrics.json, image_confusion.png and
    image_sheet.png.

    Methods: `d2l`, with the LoRA of the image; `d2l_other`, of another image; `d2l_shuffled`, of
    the image's soft tokens in random order and places; `d2l_caption`, of the right name as a text,
    an upper bound; `captioner`, the vision-language model itself, another one; `no_image`.

    Args:
      config: see configs/eval_images.py.
      checkpoint: see `trained.load`.
      workdir: existing folder to write to; a rerun with the same settings goes on.

    Raises:
      UserError: bad settings; a checkpoint or pictures that do not fit.
    """
    if min(config.limit, config.seed) < 0 or config.batch < 1:
        raise UserError('limit and seed must not be negative, and batch must be positive')
    model = trained.load(checkpoint)
    captioner = trained.load(config.captioner, model.base) if config.captioner else None
    internalizer = ImageInternalizer(model, captioner)
    pictures, groups = _pictures(config)
    options = choose_options(np.random.default_rng(config.seed), pictures, groups)
    right = [groups.index(picture.group) for picture in pictures]
    chooser = Chooser(model.base, [name for names in options for name in names])
    path = workdir / 'metrics.json'
    metrics = record.resume(
        path,
        config,
        {'accuracy': {}, 'seconds': {}, 'chosen': {}},
        free=('batch',),
        checkpoint=checkpoint,
        weights=record.digest(model.params),
        captioner=captioner and record.digest(captioner.params),
        groups=groups,
        pictures=len(pictures),
    )
    methods = _methods(internalizer, chooser, pictures, options, np.random.default_rng(1))
    for name, method in methods.items():
        if name in metrics['accuracy']:
            continue
        start, chosen = time.perf_counter(), []
        for first in range(0, len(pictures), config.batch):
            # The last batch is filled up: one shape is compiled.
            rows = np.arange(first, first + config.batch) % len(pictures)
            chosen += method(rows)
        chosen = chosen[: len(pictures)]
        metrics['accuracy'][name] = float(np.mean(np.equal(chosen, right)))
        metrics['seconds'][name] = (time.perf_counter() - start) / len(pictures)
        metrics['chosen'][name] = chosen
        record.write(path, metrics)
        print(f'{name}: {metrics["accuracy"][name]:.3f} of {len(pictures)}', flush=True)
    _draw(workdir, metrics['chosen']['d2l'], right, groups, pictures, options)


def _methods(
    internalizer: ImageInternalizer,
    chooser: Chooser,
    pictures: Sequence[Picture],
    options: Sequence[Sequence[str]],
    rng: np.random.Generator,
) -> dict[str, Callable[[np.ndarray], list[int]]]:
    """Name -> (indices of pictures -> indices of the options chosen)."""
    shift = rng.integers(1, len(pictures), len(pictures))

    def choose(rows, lora=None, soft=None):
        return chooser([options[row] for row in rows], lora, soft)

    def contexts(rows):
        return internalizer.contexts([pictures[row].image for row in rows])

    def d2l(rows):
        return choose(rows, internalizer(contexts(rows)))

    def d2l_other(rows):
        return choose(rows, internalizer(contexts((rows + shift[rows]) % len(pictures))))

    def d2l_caption(rows):
        texts = [f'{PREFIX} {pictures[row].name}' for row in rows]
        return choose(rows, internalizer(internalizer.texts(texts)))

    def d2l_shuffled(rows):
        found = contexts(rows)
        first = len(internalizer.trained.base.tokenizer.encode(PREFIX))
        soft = np.array(found['soft'])
        for row in soft:
            rng.shuffle(row[first:])
        return choose(rows, internalizer({**found, 'soft': soft}))

    def captioner(rows):
        soft = internalizer.soft_tokens([pictures[row].image for row in rows])
        return choose(rows, None, soft)

    def no_image(rows):
        return choose(rows)

    found = [d2l, d2l_other, d2l_caption, no_image]
    if internalizer.captioner is not None:
        found += [d2l_shuffled, captioner]
    return {method.__name__: method for method in found}


def _pictures(config: ConfigDict) -> tuple[list[Picture], list[str]]:
    """The pictures of the config, as many of each group, and the groups."""
    found = [p for p in read(config.sources) if config.style in ('', p.style)]
    groups = list(config.groups) or list(dict.fromkeys(p.group for p in found))
    pictures = []
    for group in groups:
        own = [picture for picture in found if picture.group == group]
        if not own:
            raise UserError(f'no picture of the group {group!r} in the style {config.style!r}')
        # Spread over the group.
        count = min(config.limit or len(own), len(own))
        pictures += [own[i] for i in np.linspace(0, len(own) - 1, count).round().astype(int)]
    if len(groups) < 2:
        raise UserError('there must be two groups at least to choose from')
    return pictures, groups


def _draw(workdir, chosen, right, groups, pictures, options) -> None:
    counts = np.zeros((len(groups), len(groups)))
    np.add.at(counts, (right, chosen), 1)
    plots.heat_map(
        workdir / 'image_confusion.png',
        counts / counts.sum(1, keepdims=True),
        groups,
        [f'{i}' for i in range(1, len(groups) + 1)],
        'what the image shows',
        'what was chosen, in the same order',
        'Images through text-only weights',
    )
    some = np.linspace(0, len(pictures) - 1, min(_SHEET, len(pictures))).round().astype(int)
    plots.contact_sheet(
        workdir / 'image_sheet.png',
        [pictures[i].image for i in some],
        [options[i][chosen[i]] for i in some],
        [chosen[i] == right[i] for i in some],
    )
