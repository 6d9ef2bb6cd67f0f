"""Adapters and merged models against PEFT and transformers; skipped without them."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_decoder import random_lora
from test_parity import LENGTH, close
from torch_models import random_config, random_model, run, torch, transformers

from hyperlora import adapters
from hyperlora import lora as lora_lib
from hyperlora.errors import UserError
from hyperlora.models import base as bases
from hyperlora.models import families, weights
from hyperlora.models.decoder import Decoder

peft = pytest.importorskip('peft')


def logits(config, params, tokens, adapter=None):
    decoder = Decoder(config)

    @jax.jit
    def compute(params, adapter):
        hidden = decoder.apply({'params': params}, tokens, lora=adapter).hidden
        return decoder.apply({'params': params}, hidden, method='unembed')

    return np.asarray(compute(params, adapter))


@pytest.fixture(params=['llama', 'gemma2', 'qwen2'])
def model(request, tmp_path):
    """A small random model of transformers, our config and parameters of it, tokens."""
    model = random_model(random_config(request.param, 0), 0)
    model.save_pretrained(tmp_path / 'base')
    config = families.from_hf(json.loads((tmp_path / 'base/config.json').read_text()))
    params = weights.from_safetensors(tmp_path / 'base', config, np.float32)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    return model, config, params, tokens


def made_by_peft(model, folder, **settings):
    """A random adapter, saved; the model that it changes."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type='CAUSAL_LM', **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if 'lora_' in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted.eval()


ALL = list(lora_lib.MODULES)


@pytest.mark.parametrize(
    'settings',
    [
        {'r': 4, 'lora_alpha': 4, 'target_modules': ['q_proj', 'v_proj']},
        {'r': 3, 'lora_alpha': 7, 'target_modules': ALL},
        {'r': 3, 'lora_alpha': 7, 'target_modules': ALL, 'use_rslora': True, 'lora_dropout': 0.1},
        {'r': 2, 'lora_alpha': 8, 'target_modules': ['down_proj'], 'layers_to_transform': [0, 2]},
        {'r': 2, 'target_modules': r'.*\.1\..*(q_proj|up_proj)', 'init_lora_weights': 'gaussian'},
        {'r': 2, 'target_modules': ['model.layers.0.self_attn.q_proj']},
        {'r': 2, 'target_modules': ['k_proj', 'o_proj'], 'exclude_modules': r'.*\.2\..*k_proj'},
    ],
    ids=lambda settings: '-'.join(settings),
)
def test_adapters_of_peft(model, tmp_path, settings):
    model, config, params, tokens = model
    before = run(model, tokens)[0]
    wanted = run(made_by_peft(model, tmp_path, **settings), tokens)[0]
    assert np.abs(wanted - before).max() > 0.05 * np.abs(before).max()
    adapter = adapters.load(tmp_path, config, 'any fingerprint')
    close(logits(config, params, tokens, adapter), wanted)
    close(logits(config, lora_lib.merge(params, adapter), tokens), wanted)


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'rank_pattern': {'q_proj': 4}}, 'rank_pattern'),
        ({'alpha_pattern': {'q_proj': 4}}, 'alpha_pattern'),
        ({'use_dora': True}, 'use_dora'),
        ({'init_lora_weights': 'pissa'}, "init_lora_weights = 'pissa'"),
        ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
        ({'target_modules': ['q_proj', 'embed_tokens']}, 'embed_tokens'),
    ],
)
def test_adapters_that_are_more(tmp_path, settings, message):
    model = random_model(random_config('llama', 0), 0)
    made_by_peft(model, tmp_path, **{'r': 2, 'target_modules': ['q_proj']} | settings)
    with pytest.raises(UserError, match=message):
        adapters.load(tmp_path)


def test_our_adapters_in_peft(model, tmp_path):
    model, config, params, tokens = model
    adapter = random_lora(config, 1, rank=5, scaling=0.2)
    adapters.save(adapter, tmp_path, str(tmp_path / 'base'), {'base_fingerprint': 'abc'})
    adapted = peft.PeftModel.from_pretrained(model, tmp_path)
    close(logits(config, params, tokens, adapter), run(adapted.eval(), tokens)[0])


# ----------------------------------------------------------------- the commands, on SmolLM2


def command(name, *flags):
    subprocess.run([sys.executable, '-m', f'launch.{name}', *flags], check=True)


@pytest.fixture(scope='module')
def internalised(tmp_path_factory):
    """The base model as transformers reads it, and a document of several chunks as an adapter."""
    folder = tmp_path_factory.mktemp('smollm2')
    base = bases.load_base('smollm2')
    (folder / 'base').mkdir()
    weights.save_hf(folder / 'base', base.params, base.config, bases.hf_config(base))
    text = 'The grass is green. The sky is blue. The sun is yellow. Here we go. ' * 60
    needle = 'The special magic number is 4183. '
    (folder / 'document.txt').write_text(text + needle + text)
    flags = [f'--document={folder / "document.txt"}', f'--output={folder / "adapter"}']
    command('adapt', '--checkpoint=smollm2-niah', '--format=peft', *flags)
    question = 'What is the special magic number? Reply with only the number.'
    tokens = np.array([base.tokenizer.prompt(question)], np.int32)
    return folder, base, tokens


def torch_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype='float32', attn_implementation='eager'
    ).eval()


@pytest.mark.slow
def test_internalised_document_in_peft(internalised):
    folder, base, tokens = internalised
    adapter = adapters.load(folder / 'adapter', base.config, base.fingerprint)
    assert adapter.rank > 8  # several chunks
    ours = logits(base.config, base.params, tokens, adapter)
    model = torch_base(folder / 'base')
    bare = run(model, tokens)[0]
    close(logits(base.config, base.params, tokens), bare, 1e-4)
    adapted = peft.PeftModel.from_pretrained(model, folder / 'adapter').eval()
    theirs = run(adapted, tokens)[0]
    close(ours, theirs, 1e-4)
    assert np.abs(theirs - bare).max() > 0.1 * np.abs(bare).max()
    answer = adapted.generate(torch.tensor(tokens, dtype=torch.long), max_new_tokens=6)
    assert '4183' in base.tokenizer.decode(answer[0, tokens.shape[1] :])


@pytest.mark.slow
def test_merged_model_in_transformers(internalised):
    folder, base, tokens = internalised
    command('merge', f'--adapter={folder / "adapter"}', f'--output={folder / "merged"}')
    adapter = adapters.load(folder / 'adapter', base.config, base.fingerprint)
    merged = torch_base(folder / 'merged')
    assert merged.generation_config.eos_token_id == base.tokenizer.eos_id
    close(logits(base.config, base.params, tokens, adapter), run(merged, tokens)[0], 1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'merged')
    turns = [{'role': 'user', 'content': 'Why  1984?'}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt == base.tokenizer.prompt('Why  1984?', default_system=True)
