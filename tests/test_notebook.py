"""The notebook runs from top to bottom."""

import pathlib
import re

NOTEBOOK = pathlib.Path(__file__).parents[1] / 'notebooks' / 'tour.ipynb'


def test_the_tour(monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv('HYPERLORA_TOUR', 'short')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {'metadata': {'path': str(NOTEBOOK.parents[1])}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
    text = ''.join(output.get('text', '') for output in outputs)
    assert re.search(r'with the LoRA: +7362\n', text)
    assert not re.search(r'without: .*7362', text)
    assert "with the LoRA: ['cities', " in text
    assert re.search(r'adapter_config.json.*\n7362 \|', text)
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 4
