"""Documents as a TFDS data set of ArrayRecord files, which `documents.read_tfds` reads back.

    write_documents({'train': documents.read([documents.source('squad,FILE')])}, 'DIR')

writes DIR/documents/1.0.0; `tfds,DIR/documents/1.0.0,train` then names it wherever documents are
read. So do any other documents, as of JSONL.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from d2l.documents import Document, Question
from hyperlora.errors import UserError


@dataclasses.dataclass(eq=False)
class Splits(tfds.core.BuilderConfig):
    """What a builder writes: name of a split -> documents."""

    documents: Mapping[str, Iterable[Document]] = dataclasses.field(
        default_factory=dict, repr=False
    )


class Documents(tfds.core.GeneratorBasedBuilder):
    """A record for each question, in the layout of TFDS's SQuAD, with the name of the document. One
    without a question has a record of which the question and its answers are empty."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    'name': text,
                    'context': text,
                    'question': text,
                    'answers': tfds.features.Sequence({'text': text}),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        found = self.builder_config.documents
        return {split: self._generate_examples(documents) for split, documents in found.items()}

    def _generate_examples(self, documents: Iterable[Document]) -> Iterator:
        number = 0
        for document in documents:
            for question in document.questions or (Question(''),):
                yield (
                    number,
                    {
                        'name': document.name,
                        'context': document.text,
                        'question': question.text,
                        'answers': [{'text': answer} for answer in question.answers],
                    },
                )
                number += 1


def write_documents(splits: Mapping[str, Iterable[Document]], path: str) -> pathlib.Path:
    """Writes splits of documents into a folder, and returns that of the data set in it, which
    appears only when complete.

    Raises:
      UserError: it is there already.
    """
    tfds.disable_progress_bar()
    config = Splits(name='', documents=splits)
    builder = Documents(config=config, data_dir=path, file_format='array_record')
    folder = pathlib.Path(builder.data_path)
    if folder.exists():
        raise UserError(f'{folder}: already there; remove it or write elsewhere')
    builder.download_and_prepare()
    return folder
