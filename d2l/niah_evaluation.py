"""Evaluation of a trained hypernetwork: needle in a haystack by document length and depth.

Source: Doc-to-LoRA (arXiv 2602.15902), section 4.
"""

from __future__ import annotations

import pathlib
import re
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from d2l import haystacks
from d2l.internalize import Answerer, Internalizer, Question
from d2l.niah import NEEDLE, QUESTION, Writer, random_numbers
from d2l.prompts import in_context_prompt
from hyperlora import trained
from hyperlora.errors import UserError
from hyperlora.evaluation import plots, record
from hyperlora.generation import answer, answer_in_batches
from hyperlora.models.base import BaseModel
from hyperlora.trained import Trained

_DEPTH_BINS = 10


def exact_match(answer: str, number: str) -> bool:
    """The answer is the number alone, as the question asks."""
    return answer.strip() == number


def right_number(answer: str, number: str) -> bool:
    """The answer holds the number and no other, perhaps in a sentence."""
    return re.findall(r'\d+', answer) == [number]


SCORES = exact_match, right_number


def needle_examples(
    config: ConfigDict, writer: Writer, haystack: haystacks.Haystack, length: int
) -> tuple[list[list[int]], list[str], np.ndarray]:
    """The examples of a length; each depends on (seed, length, index) alone.

    Returns:
      Tokens of each document (the writer's), the number hidden in it, and its depth (0 first, 1
      last), evenly spread.
    """
    depths = np.linspace(0, 1, config.examples)
    documents, numbers = [], []
    for i, depth in enumerate(depths):
        rng = np.random.default_rng((config.seed, length, i))
        numbers += random_numbers(rng, 1)
        documents.append(
            writer.write(rng, haystack, length, NEEDLE.format(numbers[-1]), float(depth)).tokens
        )
    return documents, numbers, depths


def evaluate(config: ConfigDict, checkpoint: str, workdir: pathlib.Path) -> None:
    """Scores answers (see `SCORES`); writes metrics.json, niah_depth.png, niah_length.png.

    Methods: `d2l` has the document internalised and not in the prompt, `in_context` in the prompt
    of the base model (cut to its window), `no_document` nowhere.

    metrics.json is written after every length; a rerun with the same settings skips the lengths
    in it. Its seconds are per example and include compilation.

    Args:
      config: see configs/eval_niah.py.
      checkpoint: see `trained.load`.
      workdir: existing folder to write to.

    Raises:
      UserError: a setting makes no sense, the checkpoint cannot be loaded, or the workdir holds
        an evaluation with other settings.
    """
    _check(config)
    haystack = haystacks.get(config.haystack)
    model = trained.load(checkpoint, quantization=config.base_quantization)
    base = model.base
    path = workdir / 'metrics.json'
    scores = {score.__name__: {} for score in SCORES}
    metrics = record.resume(
        path,
        config,
        {**scores, 'counts': {}, 'depth': {}, 'seconds': {}},
        free=('lengths',),
        checkpoint=checkpoint,
        weights=record.digest(model.params),
        base=base.name,
    )
    todo = [n for n in sorted(set(config.lengths)) if str(n) not in metrics['exact_match']]
    answerer = Answerer(Internalizer(model))
    writer = Writer(model.hypernetwork.encoder.tokenizer)
    start, work_done = time.perf_counter(), 0

    def work(length):  # for the ETA: reading takes most of the time, up to a window of tokens
        return min(length, base.config.max_length)

    for length in todo:
        documents, numbers, depths = needle_examples(config, writer, haystack, length)
        results = _answer_all(config, model, answerer, documents)
        key = str(length)
        for score in SCORES:
            metrics[score.__name__][key] = {
                method: float(np.mean([score(text, numbers[i]) for i, text in texts.items()]))
                for method, (texts, _) in results.items()
            }
        metrics['counts'][key] = {m: len(texts) for m, (texts, _) in results.items()}
        metrics['depth'][key] = _by_depth(
            depths, [exact_match(text, numbers[i]) for i, text in results['d2l'][0].items()]
        )
        metrics['seconds'][key] = {m: spent for m, (_, spent) in results.items()}
        record.write(path, metrics)
        work_done += work(length)
        left = (time.perf_counter() - start) / work_done * sum(work(n) for n in todo if n > length)
        scores = '; '.join(
            f'{name.replace("_", " ")} '
            + '  '.join(f'{m} {value:.2f}' for m, value in metrics[name][key].items())
            for name in (score.__name__ for score in SCORES)
        )
        print(f'{length} tokens: {scores}  ETA {left / 60:.0f} min', flush=True)
    _draw(workdir, metrics, base)


def _check(config: ConfigDict) -> None:
    if not config.lengths or not all(isinstance(n, int) and n > 0 for n in config.lengths):
        raise UserError(f'lengths must be numbers of tokens like 256,1024, not {config.lengths}')
    if config.examples < 1 or config.max_new_tokens < 1 or config.seed < 0:
        raise UserError('examples and max_new_tokens must be positive, seed not negative')
    if not 0 <= config.baseline_examples <= config.examples:
        raise UserError(
            f'baseline_examples must be from 0 to examples ({config.examples}), '
            f'not {config.baseline_examples}'
        )


def _answer_all(
    config: ConfigDict, model: Trained, answerer: Answerer, documents: list[list[int]]
) -> dict[str, tuple[dict[int, str], float]]:
    """Method -> (answers by index of the example, seconds per example)."""
    base, read = model.base, model.hypernetwork.encoder.tokenizer.decode
    question = base.tokenizer.prompt(QUESTION)
    new = config.max_new_tokens
    everyone = range(len(documents))

    def d2l():
        texts = answerer([Question(document, question) for document in documents], new)
        return dict(zip(everyone, texts, strict=True))

    def no_document():  # the same prompt for all
        return dict.fromkeys(everyone, answer(base, [question], new)[0])

    def in_context():
        # Spread over the examples, so over the depths.
        chosen = np.linspace(0, len(documents) - 1, config.baseline_examples).round()
        prompts = {}
        for i in map(int, chosen):
            document = base.tokenizer.encode(read(documents[i]))
            prompts[i] = in_context_prompt(base, document, QUESTION, new)
        texts = answer_in_batches(base, list(prompts.values()), new)
        return dict(zip(prompts, texts, strict=True))

    results = {}
    for method in (d2l, no_document, *([in_context] if config.baseline_examples else [])):
        start = time.perf_counter()
        texts = method()
        results[method.__name__] = texts, (time.perf_counter() - start) / len(texts)
    return results


def _by_depth(depths: np.ndarray, right: list[bool]) -> dict[str, dict[str, float]]:
    """Exact match by depth, the bins named by their bounds."""
    bins = np.minimum((depths * _DEPTH_BINS).astype(int), _DEPTH_BINS - 1)
    right = np.asarray(right)
    return {
        f'{k / _DEPTH_BINS:.1f}-{(k + 1) / _DEPTH_BINS:.1f}': {
            'exact_match': float(right[bins == k].mean()),
            'n': int((bins == k).sum()),
        }
        for k in range(_DEPTH_BINS)
        if (bins == k).any()
    }


def _draw(workdir: pathlib.Path, metrics: dict[str, Any], base: BaseModel) -> None:
    lengths = sorted(metrics['exact_match'], key=int)
    bins = sorted({depth for length in lengths for depth in metrics['depth'][length]})
    values = np.asarray(
        [
            [
                metrics['depth'][length].get(depth, {}).get('exact_match', np.nan)
                for length in lengths
            ]
            for depth in bins
        ]
    )
    title = f'Needle in a haystack ({pathlib.Path(metrics["settings"]["haystack"]).name})'
    plots.heat_map(
        workdir / 'niah_depth.png',
        values,
        bins,
        lengths,
        'depth of the needle',
        'document length (tokens)',
        f'{title}: exact match of d2l',
    )
    scores = metrics['right_number']
    methods = {m: None for length in lengths for m in scores[length]}
    lines = {m: {int(n): scores[n][m] for n in lengths if m in scores[n]} for m in methods}
    plots.curves(
        workdir / 'niah_length.png',
        lines,
        'document length (tokens)',
        'right number in the answer',
        title,
        {f'window of {base.name}': base.config.max_length},
    )
