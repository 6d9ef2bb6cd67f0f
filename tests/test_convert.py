"""Checkpoints of the original implementations, converted: the same LoRAs, the same logits."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import GOLDEN, read_golden
from ml_collections import ConfigDict
from test_torch_files import D2L, REFERENCE, T2L

import d2l.build
import t2l.build
from d2l.context_encoders import CONTEXT_ENCODERS, per_layer_activations
from hyperlora import checkpointing, torch_files
from hyperlora import lora as lora_lib
from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel, load_params
from hyperlora.models.decoder import Decoder
from hyperlora.models.embedders import load_embedder
from hyperlora.models.published import WordTokenizer
from hyperlora.models.vision import soft_tokens
from hyperlora.upstream import convert

ROOT = pathlib.Path(__file__).parents[1]


def find(*parts):
    """The folder of the reference that holds the file."""
    for root in (REFERENCE, GOLDEN):
        if root.joinpath(*parts).exists():
            return str(root.joinpath(*parts[:-1]))
    pytest.skip(f'no {"/".join(parts)} (set HYPERLORA_GOLDEN)')


def read(case):
    """(description, arrays) of a case."""
    if not (REFERENCE / f'{case}.npz').exists():
        find(f'{case}.json')
        return read_golden(case)
    with np.load(REFERENCE / f'{case}.npz') as arrays:
        return json.loads((REFERENCE / f'{case}.json').read_text()), dict(arrays)


def close(ours, wanted, tolerance=1e-4):
    """Within a share of the largest value."""
    assert ours.shape == wanted.shape
    assert np.abs(np.asarray(ours) - wanted).max() <= tolerance * np.abs(wanted).max()


def logits(base, tokens, lora, rank_weights=None):
    config, params = base
    decoder = Decoder(config)

    @jax.jit
    def run(params, tokens, lora, rank_weights):
        out = decoder.apply({'params': params}, tokens, lora=lora, rank_weights=rank_weights)
        return decoder.apply({'params': params}, out.hidden, method='unembed')

    return np.asarray(run(params, tokens.astype(np.int32), lora, rank_weights))


@pytest.mark.parametrize('case', T2L)
def test_text_to_lora(case, tmp_path):
    meta, arrays = read(case)
    base = mistral()
    params, record = convert(find(f'{case}_ckpt', 'hypermod.pt'), base, dtype='float32')
    # Through the file, as a user would.
    checkpointing.export(tmp_path / 'out', params, record, 'float32')
    params, record = checkpointing.load_export(tmp_path / 'out')
    *decoder, fingerprint = load_params(base)
    # What `trained.load` compares; the reference has neither a tokenizer nor embeddings of its own.
    model = BaseModel(base, *decoder, WordTokenizer(), fingerprint)
    assert record['encoder_fingerprint'] == load_embedder('base', model).fingerprint
    module = t2l.build.make_module(ConfigDict(record['config']['hypernetwork']), decoder[0])
    recon = 'all_embs/encoded_task_emb' in arrays
    tasks = [f'in/t{i}/task_embs' for i in range(2)] if recon else ['in/task_embs']
    embeddings = np.concatenate([arrays[t] for t in tasks])
    lora, shared = jax.jit(module.apply)({'params': params}, embeddings)
    assert shared is None
    prefix = 'base_model.model.model.layers'
    for name, pair in lora.pairs.items():
        for factor, ours in (('A', pair.a), ('B', pair.b.swapaxes(-1, -2))):
            # What the original exports for the first task, scaled back where it reconstructs.
            for layer in range(meta['n_layers']):
                key = f'{prefix}.{layer}.self_attn.{name}.lora_{factor}.weight'
                close(ours[layer, 0], arrays[f'adapter/{key}'])
            if not recon:
                wanted = arrays[f'gen_raw/{name}/{factor}']
                close(ours, wanted.reshape(meta['n_layers'], -1, *wanted.shape[1:]))
    if not recon:
        assert float(lora.scaling) == meta['scaling']
        valid = arrays['in/attention_mask'].astype(bool)
        ours = logits(decoder, arrays['in/input_ids'], lora)
        close(ours[valid], arrays['logits'][valid])


def encoder_of(case):
    return (
        find('d2l_ctx_gemma3', 'config.json')
        if case == 'd2l_h_cross_encoder_gemma3_for_gemma2'
        else ''
    )


def doc_to_lora_source(case, monkeypatch):
    """Its pytorch_model.bin; where that is not at hand, what it holds is put in its place."""
    if (REFERENCE / f'{case}_ckpt').exists():
        return str(REFERENCE / f'{case}_ckpt')
    meta, arrays = read(case)
    keys = ('hypernet_config', 'ctx_encoder_args')
    held = {
        'base_model_name_or_path': meta['base_dir'],
        **{key: meta[key] for key in keys},
        **{k.removeprefix('hypernet/'): v for k, v in arrays.items() if k.startswith('hypernet/')},
    }
    monkeypatch.setattr(torch_files, 'load', lambda _: held)
    return 'pytorch_model.bin'


@pytest.mark.parametrize('case', D2L)
def test_doc_to_lora(case, tmp_path, monkeypatch):
    meta, arrays = read(case)
    base, encoder = find(meta['base_dir'], 'model.safetensors'), encoder_of(case)
    params, record = convert(doc_to_lora_source(case, monkeypatch), base, encoder, dtype='float32')
    checkpointing.export(tmp_path / 'out', params, record, 'float32')
    params, record = checkpointing.load_export(tmp_path / 'out')
    decoder = load_params(base)[:2]
    reader = load_params(encoder, images=True)[:2] if encoder else decoder
    config = ConfigDict(record['config']['hypernetwork'])
    module = d2l.build.make_module(config, decoder[0], reader[0])
    count = decoder[0].num_layers if module.config.layer_to_layer else config.encoder.num_layers
    mask = arrays['ctx_attn_mask'].astype(bool)
    features = CONTEXT_ENCODERS[config.encoder.name](
        *reader, arrays['ctx_ids'].astype(np.int32), num_layers=count
    )
    wanted = arrays['ctx_features']
    wanted = wanted if wanted.ndim == 4 else wanted[:, None]
    close(np.asarray(features).swapaxes(1, 2)[mask], wanted.swapaxes(1, 2)[mask], 2e-5)
    chunks, shared = jax.jit(module.apply)({'params': params}, features, mask)
    for name, pair in chunks.pairs.items():
        close(pair.a.swapaxes(0, 1), arrays[f'gen/{name}/A'])
        close(pair.b.swapaxes(0, 1), arrays[f'gen/{name}/B'])
    counts = arrays['n_ctx_chunks']
    owner = np.repeat(np.arange(len(counts)), counts)
    own = jnp.asarray(owner[None] == np.arange(len(counts))[:, None], jnp.float32)
    lora, rank_weights = lora_lib.compose(chunks, shared, 1, own)
    valid = arrays['attention_mask'].astype(bool)
    rows = np.repeat(np.arange(len(counts)), arrays['n_queries'])
    ours = logits(decoder, arrays['input_ids'], lora, rank_weights[rows])
    close(ours[valid], arrays['logits'][valid])


def test_doc_to_lora_of_an_image(monkeypatch):
    """A hypernetwork trained on text reads an image; the base model is text-only."""
    arrays = read('d2l_i_image_ctx_gemma3')[1]
    source = doc_to_lora_source('d2l_h_cross_encoder_gemma3_for_gemma2', monkeypatch)
    base, encoder = (
        find('d2l_base_gemma2', 'model.safetensors'),
        find('d2l_ctx_gemma3_mm', 'config.json'),
    )
    params, record = convert(source, base, encoder, dtype='float32')
    decoder, reader = load_params(base)[:2], load_params(encoder, images=True)[:2]
    config = ConfigDict(record['config']['hypernetwork'])
    module = d2l.build.make_module(config, decoder[0], reader[0])
    tokens = arrays['ctx_ids'].astype(np.int32)
    pixels = arrays['pixel_values'].transpose(0, 2, 3, 1)[:, None]
    soft = soft_tokens(*reader, tokens, pixels)
    features = per_layer_activations(*reader, tokens, soft, num_layers=decoder[0].num_layers)
    close(features, arrays['ctx_features'], 2e-5)
    mask = np.ones(arrays['ctx_ids'].shape, bool)
    own, shared = jax.jit(module.apply)({'params': params}, features, mask)
    lora = lora_lib.concatenate(own, shared)
    for name, pair in lora.pairs.items():
        close(pair.a.swapaxes(0, 1), arrays[f'combined/{name}/A'])
        close(pair.b.swapaxes(0, 1), arrays[f'combined/{name}/B'])
    close(logits(decoder, arrays['input_ids'], lora), arrays['logits'])


# ------------------------------------------------------------------------------- bad input


LINEAR = 't2l_d_sft_linear_ckpt'


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a Text-to-LoRA checkpoint."""
    return shutil.copytree(find(LINEAR, 'hypermod.pt'), tmp_path / 'checkpoint')


def refused(*args, match, **kwargs):
    with pytest.raises(UserError, match=match):
        convert(*map(str, args), **kwargs)


def mistral():
    return find('t2l_base_mistral', 'config.json')


def test_another_base_is_refused(checkpoint, monkeypatch):
    refused(checkpoint, find('d2l_base_gemma2', 'config.json'), match='3 layers.*not for the one')
    refused(
        doc_to_lora_source('d2l_a_per_layer_gemma2', monkeypatch),
        mistral(),
        match='not for the one',
    )


def test_the_encoder_must_be_the_right_one(monkeypatch):
    case = 'd2l_h_cross_encoder_gemma3_for_gemma2'
    source = doc_to_lora_source(case, monkeypatch)
    base = find('d2l_base_gemma2', 'model.safetensors')
    refused(source, base, match='d2l_ctx_gemma3: give it as --encoder')
    refused(source, base, encoder=base, match='of width 40.* 48 wide')
    own = doc_to_lora_source('d2l_a_per_layer_gemma2', monkeypatch)
    refused(own, base, encoder=encoder_of(case), match='leave --encoder out')


def test_tensors_that_do_not_fit(checkpoint, monkeypatch):
    state = torch_files.load(checkpoint / 'hypermod.pt')
    head = state['heads.q_proj.weight']

    def with_state(**changes):
        changed = {k: v for k, v in {**state, **changes}.items() if v is not None}
        monkeypatch.setattr(torch_files, 'load', lambda _: changed)

    with_state(**{'mixer.1.bias': None})
    refused(checkpoint, mistral(), match='mixer.1.bias')
    with_state(**{'mixer.9.bias': head, 'heads.q_proj.weight': head[:5]})
    refused(
        checkpoint, mistral(), match=r'head_q_proj/kernel is \(64, 5\), not .*mixer.9.bias is unkn'
    )
    with_state(
        **{f'_orig_mod.{name}': value for name, value in state.items()}, **dict.fromkeys(state)
    )
    convert(str(checkpoint), mistral())  # what torch.compile renames
    monkeypatch.setattr(torch_files, 'load', lambda _: [1, 2])
    refused(checkpoint, mistral(), match='not a checkpoint')


def test_damaged_files(checkpoint, tmp_path):
    args = checkpoint / 'args.yaml'
    args.write_text(args.read_text() + '\nlr: [1')
    refused(checkpoint, mistral(), match='args.yaml: cannot read')
    args.write_text('lr: 1')
    refused(checkpoint, mistral(), match='not a checkpoint.*use_one_hot_task_emb')
    args.unlink()
    refused(checkpoint, mistral(), match='no args.yaml')
    refused(tmp_path, mistral(), match=str(tmp_path))
    refused(tmp_path / 'nowhere', mistral(), match='nowhere')
    data = (checkpoint / 'hypermod.pt').read_bytes()
    (checkpoint / 'hypermod.pt').write_bytes(data[: len(data) // 2])
    refused(checkpoint, mistral(), match='hypermod.pt')


def test_descriptions_of_another_embedder(checkpoint):
    args = checkpoint / 'args.yaml'
    settings = yaml.safe_load(args.read_text())
    args.write_text(yaml.safe_dump(settings | {'emb_model': 'Alibaba-NLP/gte-large-en-v1.5'}))
    refused(checkpoint, mistral(), match='gte-large-en-v1.5.*--embedder')
    args.write_text(yaml.safe_dump(settings | {'use_one_hot_task_emb': True}))
    refused(checkpoint, mistral(), match='does not read task descriptions')


def test_the_command_writes_nothing_of_a_hostile_file(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/ran',)

    with zipfile.ZipFile(tmp_path / 'pytorch_model.bin', 'w') as file:
        file.writestr('archive/data.pkl', pickle.dumps(Hostile(), 2))
        file.writestr('archive/version', '3')
    output = tmp_path / 'out'
    arguments = [f'--source={tmp_path}', f'--base={mistral()}', f'--output={output}']
    done = subprocess.run(
        [sys.executable, '-m', 'launch.convert', *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stderr.startswith('error: '), done.stderr
    assert 'system' in done.stderr
    assert not output.exists() and not (tmp_path / 'ran').exists()
