"""Text-to-LoRA: a sentence specialises the model (arXiv 2506.06105).

    python -m launch.train --config=configs/t2l.py:smollm2,TASKS --workdir=DIR

TASKS is a folder of tasks, a JSON file each; without it the generated tasks alone are trained on.
Tasks of another reader of `t2l.collections` are trained on alone: natural_instructions:CHECKOUT,
text_to_lora:CHECKOUT:INSTRUCTIONS (the paper's) or records:DIR.
Variants: `smollm2` (two CPU cores), `gemma2_2b`, `mistral_7b`, `llama3_8b` (the published settings,
each for the TPUs that it names; for other devices set config.mesh and groups), `tiny` (seconds; for
tests).

For tasks that are known, three stages learn more from fewer examples: `codes,TASKS` (a LoRA for
each task, made of what all share; no description is read), `from_codes,CODES` (a hypernetwork that
learns to make the LoRAs in CODES from descriptions) and `after_codes,TASKS,DIR` (the hypernetwork
in DIR, trained further on examples).

For comparison, on SmolLM2 and the same loop: `multitask` (one LoRA, on the batches of `smollm2`),
`per_task` (a LoRA for each task of the folder), and `reconstruction,LORAS` (a hypernetwork trained
towards the LoRAs that a run of `per_task` left in the folder LORAS, rather than on examples; with
objective.delta their products are compared, for which hypernetwork.shape.output_scale is 0.01).

A hypernetwork whose LoRAs are added to a multi-task LoRA has --config.hypernetwork.loras=MULTITASK
--config.hypernetwork.shape.offset=True --config.hypernetwork.shape.head_init=zero.
"""

import functools
import pathlib

from ml_collections import ConfigDict

from configs import fields
from hyperlora.errors import UserError
from t2l.collections import READERS, collect, source

# Packed rows that a per-task LoRA sees of its task: about 170 examples.
_VISITS = 86

# Tasks to hold out as a whole, by reader. Each has near relatives that are trained on (first and
# last but not middle, French and German but not Spanish words, next month and previous weekday but
# not previous month), and none is trained on under another name.
HELD_OUT = {
    'json': (
        'fv_alphabetically_last_5',
        'fv_antonym',
        'fv_capitalize_second_letter',
        'fv_choose_middle_of_3',
        'fv_choose_middle_of_5',
        'fv_color_v_animal_3',
        'fv_color_v_animal_5',
        'fv_conll2003_location',
        'fv_person_sport',
        'fv_verb_v_adjective_3',
        'ii_antonyms',
        'ii_translation_en_es',
    ),
    'generated': (
        'drop_last_letter',
        'minutes_of_time',
        'number_in_french',
        'pick_vehicle',
        'previous_month',
        'sentence_object',
        'sentence_to_future',
        'shortest_word',
        'smallest_number',
        'sort_descending',
        'superlative',
        'surname',
        'weekday_in_german',
    ),
}


def get_config(argument: str = 'smollm2') -> ConfigDict:
    """The config of a variant, of a folder of tasks or LoRAs, and of what training starts from.

    Raises:
      UserError: no such variant.
    """
    variant, folder, start = fields(argument)
    large = 'v5e:4x4', {'fsdp': 8, 'tensor': 2}
    variants = {
        'smollm2': _smollm2,
        'tiny': _tiny,
        'multitask': _multitask,
        'per_task': _per_task,
        'codes': _codes,
        'reconstruction': _reconstruction,
        'from_codes': _from_codes,
        'after_codes': _after_codes,
        'gemma2_2b': functools.partial(_published, 'gemma2_2b', 'v5e:2x2', {'fsdp': 4}),
        'mistral_7b': functools.partial(_published, 'mistral_7b', *large),
        'llama3_8b': functools.partial(_published, 'llama3_8b', *large),
    }
    if variant not in variants:
        raise UserError(f'unknown variant {variant!r} of t2l; known: {", ".join(variants)}')
    config = variants[variant](folder)
    config.init_from = start
    return config


def _sources(folder: str) -> tuple[dict, ...]:
    generated = (
        {'reader': 'generated', 'held_out': HELD_OUT['generated']},
        {'reader': 'parametric', 'weight': 0.25},
    )
    if not folder:
        return generated
    if ':' in folder and folder.split(':')[0] in READERS:
        return (source(folder.replace(':', ',')),)
    # A folder may lack them: it is the user's.
    here = pathlib.Path(folder)
    held_out = tuple(name for name in HELD_OUT['json'] if (here / f'{name}.json').is_file())
    return ({'reader': 'json', 'path': folder, 'held_out': held_out}, *generated)


def _published(base: str, topology: str, mesh: dict[str, int], folder: str) -> ConfigDict:
    """The settings of the paper, L: eight tasks a step.

    Args:
      topology, mesh: the TPUs that it is made for.
      folder: of tasks.
    """
    steps = 160_000
    config = ConfigDict(
        {
            'name': 't2l',
            'base': base,
            'base_dtype': 'bfloat16',
            'base_quantization': 'none',
            'seed': 0,
            'topology': topology,  # that `launch.aot` compiles for
            'mesh': {'slice': 1, 'data': 1, 'fsdp': 1, 'tensor': 1, **mesh},
            'remat': 'full',
            'neftune': 5.0,
            'init_from': '',  # weights to start from: a name, an export or a workdir
            'groups': 8 // max(mesh['fsdp'], 1),  # packed rows per data shard
            'accumulate': 1,
            'log_every': 10,
            'checkpoint_every': 500,
            'keep_checkpoints': 2,
            'hypernetwork': {
                'name': 'text_to_lora',
                'embedder': 'Alibaba-NLP/gte-large-en-v1.5',
                'modules': ('q_proj', 'v_proj'),
                'loras': '',  # a `lora_table` that it starts from; see `t2l.build.build`
                'shape': {
                    'rank': 8,
                    'scaling': 16 / 8**0.5,
                    'embedding_width': 1024,
                    'latent_size': 128,
                    'head_width': 512,
                    'encoder': 'linear',
                    'shared_head': False,
                    'per_rank': False,
                    'learned_positions': False,
                    'per_layer_heads': False,
                    'head_init': 'lora',
                    'offset': False,
                    'learn_offset': False,
                    'z_score': False,
                    'output_scale': 1.0,
                },
            },
            'objective': {'name': 'cross_entropy', 'label_smoothing': 0.1, 'l2': 1e-3},
            'optimizer': {
                'learning_rate': 2.5e-5,
                'end_learning_rate': 1e-7,
                'warmup_steps': steps // 5,
                'steps': steps,
                'weight_decay': 0.001,
                'b1': 0.9,
                'b2': 0.999,
                'clip_norm': 1.0,
            },
            'data': {
                'name': 'tasks',
                'description_noise': 0.0,  # see t2l.data.draw_embedding
                'gibberish': 0.0,  # share of groups that describe no task; see t2l.data
                'before': '',  # answers
                # Rows are filled with examples of one task; what fits into none is left out.
                'row_tokens': 512,
                'row_labels': 256,
                'sources': _sources(folder),
                'tasks': (),  # filled in when the tasks are read: the names of those trained on
            },
        }
    )
    config.data.steps = config.optimizer.get_ref('steps')
    return config


def _smollm2(folder: str) -> ConfigDict:
    config = _published('smollm2', 'v5e:2x2', {'fsdp': -1}, folder)
    config.base_dtype, config.base_quantization = 'float32', 'bfloat16'
    config.remat = 'none'
    config.checkpoint_every = 50
    config.hypernetwork.embedder = 'minilm'
    config.hypernetwork.modules = ('down_proj', 'o_proj', 'q_proj', 'v_proj')
    config.hypernetwork.shape.update(
        {'embedding_width': 384, 'latent_size': 256, 'head_width': 384, 'scaling': 2 * 8**0.5}
    )
    config.objective.label_smoothing = 0.0
    # Many tasks a step, with about two examples each: what tells tasks apart is learned sooner.
    config.groups = 16
    config.data.update({'description_noise': 0.3, 'gibberish': 0.05, 'before': ' '})
    config.data.update({'row_tokens': 40, 'row_labels': 20})
    config.optimizer.update(
        {'learning_rate': 1e-4, 'end_learning_rate': 1e-6, 'warmup_steps': 20, 'b2': 0.98}
    )
    config.optimizer.steps = 800
    return config


def _tiny(folder: str) -> ConfigDict:
    """A few steps of a small hypernetwork on the real base model."""
    config = _smollm2(folder)
    config.hypernetwork.modules = ('q_proj',)
    config.hypernetwork.shape.update({'latent_size': 16, 'head_width': 16})
    config.groups = 2
    config.data.gibberish = 0.0  # it takes a minute to make
    config.optimizer.update({'steps': 6, 'warmup_steps': 1})
    config.log_every = 1
    config.checkpoint_every = 2
    return config


def _multitask(folder: str) -> ConfigDict:
    """One LoRA for all tasks."""
    config = _smollm2(folder)
    shape = config.hypernetwork.shape
    config.name = 'multitask'
    config.hypernetwork = ConfigDict(
        {
            'name': 'lora_table',
            'modules': config.hypernetwork.modules,
            'shape': {'rank': shape.rank, 'scaling': shape.scaling, 'entries': 1},
        }
    )
    config.objective.l2 = 0.0
    config.data.gibberish = 0.0
    config.optimizer.learning_rate = 5e-4
    return config


def _per_task(folder: str) -> ConfigDict:
    """A LoRA per task of the folder, or per generated task."""
    config = _multitask(folder)
    config.name = 'per_task'
    config.data.sources = config.data.sources[:1]
    return _entries(config)


def _codes(folder: str) -> ConfigDict:
    """A LoRA per task that `after_codes` trains on, of the form that heads for each layer make."""
    config, after = _multitask(folder), _after_codes(folder)
    config.name = 'codes'
    config.data.sources = after.data.sources
    shape = after.hypernetwork.shape
    config.hypernetwork.modules = after.hypernetwork.modules
    config.hypernetwork.shape.update({'rank': shape.rank, 'codes': shape.head_width})
    return _entries(config)


def _entries(config: ConfigDict) -> ConfigDict:
    """As many entries as tasks, and the steps for them."""
    config.hypernetwork.shape.entries = entries = len(collect(config.data).train)
    config.optimizer.steps = -(-entries * _VISITS // config.groups)
    return config


def _after_codes(folder: str) -> ConfigDict:
    """A hypernetwork with heads for each layer, on the tasks that `smollm2` trains on but those by
    rules."""
    config = _smollm2(folder)
    config.data.sources = tuple(s for s in config.data.sources if s['reader'] != 'parametric')
    config.hypernetwork.modules = ('down_proj',)
    config.hypernetwork.shape.update({'rank': 4, 'head_width': 64, 'per_layer_heads': True})
    return config


def _from_codes(loras: str) -> ConfigDict:
    """The same, which makes the LoRAs of `codes`, whose heads it takes over."""
    config = _towards(loras, _after_codes(''))
    config.groups = 16
    config.optimizer.steps = 3000
    return config


def _reconstruction(loras: str) -> ConfigDict:
    """A hypernetwork that makes the LoRAs of `per_task`."""
    config = _smollm2('')
    config.hypernetwork.shape.update({'head_init': 'random', 'z_score': True})
    config = _towards(loras, config)
    config.groups = 8
    config.optimizer.steps = 2000
    return config


def _towards(loras: str, config: ConfigDict) -> ConfigDict:
    """Training towards the LoRAs of a checkpoint, instead of on examples."""
    if not loras:
        raise UserError('name the LoRAs to reconstruct after a comma: configs/t2l.py:VARIANT,LORAS')
    config.name = 'reconstruction'
    config.checkpoint_every = 500  # steps are short
    config.hypernetwork.loras = loras
    config.objective = ConfigDict({'name': 'reconstruction', 'delta': False})
    config.data = ConfigDict(
        {
            'name': 'reconstruction',
            'loras': config.hypernetwork.get_ref('loras'),
            'z_score': config.hypernetwork.shape.get_ref('z_score'),
            'description_noise': config.data.description_noise,
            'steps': config.optimizer.get_ref('steps'),
            'tasks': (),
        }
    )
    config.optimizer.learning_rate = 1e-3
    return config
